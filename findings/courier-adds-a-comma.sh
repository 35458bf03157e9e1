#!/bin/bash
# Courier 1.0.16 (Debian 12, default settings) puts a comma before a comment behind an address, in From, too.
#
# RFC 5322 (3.4) allows comments there, and mailers of old wrote the name or the desk so. What Courier sends on has an empty place in the
# list of authors: some readers show a second one without an address, others cannot parse it (mailparser 3.14 of npm, Ruby's mail 2.7), and
# a DKIM signature made before is wrong. Write the words into the name before the address, "Ann Example, sales" <ann@origin.example>.
# Lines sent (-), and queued (+); what Python's email says of the From of the latter:
#
#     - From: Ann Example <ann@origin.example> (sales)
#     + From: Ann Example <ann@origin.example>, (sales)
#     - To: <bob@one.example> (his desk)
#     + To: bob@one.example, (his desk)
#     - Reply-To: "Ann Example" <ann@origin.example>
#     + Reply-To: "Ann Example" <ann@origin.example>, (until May)
#     -  (until May)
#     ObsoleteHeaderDefect('address-list entry with no content')

# shellcheck source-path=SCRIPTDIR source=courier.sh
. "$(dirname "$0")/courier.sh"

client "$port" <<'EOF'
import difflib, email.policy, pathlib

sent = """\
From: Ann Example <ann@origin.example> (sales)
To: <bob@one.example> (his desk)
Cc: carol@one.example (Carol)
Reply-To: "Ann Example" <ann@origin.example>
 (until May)
Subject: hello
Message-ID: <one@origin.example>
Date: Mon, 1 Jun 2026 10:00:00 +0000

text
"""
smtp.sendmail("ann@origin.example", ["bob@one.example"], sent)
kept = next(pathlib.Path("queue/tmp").rglob("D*")).read_text()
arrived = kept[kept.index("From:") :]
print(*(line.rstrip() for line in difflib.ndiff(sent.splitlines(), arrived.splitlines()) if line[0] in "+-"), sep="\n")
print(*map(repr, email.message_from_string(arrived, policy=email.policy.default)["From"].defects))
EOF
