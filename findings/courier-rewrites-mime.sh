#!/bin/bash
# Courier 1.0.16 (Debian 12, default settings) takes a message with an attachment apart and writes it anew.
#
# The body gets another boundary and a preamble, so the body hash of a DKIM signature made before is wrong, and whoever checks it
# takes the mail for forged. Sign behind Courier, or put `opt MIME=none` into /etc/courier/bofh. Lines sent (-), and queued (+):
#
#     - MIME-Version: 1.0
#     + Mime-Version: 1.0
#     - Content-Type: multipart/mixed; boundary="of-the-sender"
#     + Content-Type: multipart/mixed; boundary="=_vm-..."
#     - --of-the-sender
#     + This is a MIME-formatted message.  If you see this text it means that your
#     + E-mail software does not support MIME-formatted messages.
#     +
#     + --=_vm-...
#     - Content-Type: text/plain; charset="utf-8"
#     + Content-Type: text/plain; charset=utf-8
#     - --of-the-sender
#     + --=_vm-...
#     - --of-the-sender--
#     + --=_vm-...--

# shellcheck source-path=SCRIPTDIR source=courier.sh
. "$(dirname "$0")/courier.sh"

client "$port" <<'EOF'
import difflib, pathlib, re

sent = """\
From: ann@origin.example
To: bob@one.example
Subject: a file
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="of-the-sender"

--of-the-sender
Content-Type: text/plain; charset="utf-8"
Content-Transfer-Encoding: 7bit

See the file.
--of-the-sender
Content-Type: application/octet-stream; name="a.bin"
Content-Transfer-Encoding: base64
Content-Disposition: attachment; filename="a.bin"

Y29udGVudA==
--of-the-sender--
"""
smtp.sendmail("ann@origin.example", ["bob@one.example"], sent)
kept = next(pathlib.Path("queue/tmp").rglob("D*")).read_text()
arrived = re.sub(r"=_vm(-\d+)+", "=_vm-...", kept[kept.index("From:") :])
print(*(line.rstrip() for line in difflib.ndiff(sent.splitlines(), arrived.splitlines()) if line[0] in "+-"), sep="\n")
EOF
