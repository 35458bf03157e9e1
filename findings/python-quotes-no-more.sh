#!/bin/bash
# Python's email takes the quotes from a local part like "a..b", so that the address cannot be used any more.
#
# There are mailboxes with two dots in a row, or one at the end (those of Japanese mobile phones, for instance). RFC 5321 (4.1.2) has them
# in quotes. The newer API of Python reads them right, and writes them without: into the header of whoever answers or forwards with it,
# and, by smtplib.send_message(), into RCPT TO, where it is a syntax error. Give the recipients yourself.
#
#     read:            "a..b"@one.example
#     addr_spec:       a..b@one.example
#     str():           a..b@one.example
#     in a reply:      To: a..b@one.example
#     C: RCPT TO:<a..b@one.example>
#     given by hand:   to_addrs=['"a..b"@one.example']
#     C: RCPT TO:<"a..b"@one.example>

# Seen with Python 3.11.2 to 3.13.0.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

cat >reply.py <<'EOF'
import email, email.policy, smtplib, sys
from email.message import EmailMessage

received = email.message_from_string('From: "a..b"@one.example\n\nhello\n', policy=email.policy.default)
sender = received["From"].addresses[0]
print("read:           ", '"a..b"@one.example')
print("addr_spec:      ", sender.addr_spec)
print("str():          ", sender)
reply = EmailMessage()
reply["From"], reply["To"], reply["Subject"] = "ann@origin.example", sender, "an answer"
print("in a reply:     ", reply.as_string().splitlines()[1])

def recipient():
    line = [line for line in open("commands") if "rcpt" in line][-1]
    return line.replace("rcpt", "RCPT").replace("to:", "TO:")

with smtplib.SMTP("127.0.0.1", int(sys.argv[1])) as smtp:
    smtp.send_message(reply)
    print(recipient(), end="")
    print("""given by hand:   to_addrs=['"a..b"@one.example']""")
    smtp.send_message(reply, to_addrs=['"a..b"@one.example'])
    print(recipient(), end="")
EOF
sink ENHANCEDSTATUSCODES
python3 reply.py "$port" >seen 2>&1 || cannot "$(cat seen)"
compare
