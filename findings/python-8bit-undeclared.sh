#!/bin/bash
# Python's smtplib sends 8-bit text without saying so, and to servers that do not take it.
#
# EmailMessage.set_content() chooses Content-Transfer-Encoding: 8bit for any text beyond ASCII with short lines. RFC 6152 allows
# that only after the server offered 8BITMIME, and with BODY=8BITMIME behind MAIL FROM. send_message() looks at neither: what
# a server without it makes of the bytes is its own affair, and one with it does not know that it has to convert them for the
# next hop. Say set_content(text, cte="quoted-printable"), or flatten with policy.clone(cte_type="7bit").
#
#     the server does not offer 8BITMIME:
#     C: MAIL FROM:<ann@origin.example>
#     Content-Transfer-Encoding: 8bit
#     Gr\xc3\xbc\xc3\x9fe
#     the server offers 8BITMIME:
#     C: MAIL FROM:<ann@origin.example>
#     Content-Transfer-Encoding: 8bit
#     Gr\xc3\xbc\xc3\x9fe
#     with cte="quoted-printable":
#     C: MAIL FROM:<ann@origin.example>
#     Content-Transfer-Encoding: quoted-printable
#     Gr=C3=BC=C3=9Fe

# Seen with Python 3.11.2 to 3.13.0.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

cat >send.py <<'EOF'
import smtplib, sys
from email.message import EmailMessage

message = EmailMessage()
message["From"], message["To"], message["Subject"] = "ann@origin.example", "bob@one.example", "hello"
message.set_content("Grüße\n", **dict(argument.split("=") for argument in sys.argv[2:]))
with smtplib.SMTP("127.0.0.1", int(sys.argv[1])) as smtp:
    smtp.send_message(message)
EOF

# send SENTENCE ARGUMENT ...: sends, and shows what was said of the eight bits
send() {
    echo "$1:"
    shift
    rm -f commands mail-1
    python3 send.py "$port" "$@" >error 2>&1 || cannot "$(cat error)"
    sed -n 's|^C: mail from|C: MAIL FROM|Ip' commands
    python3 -c 'for line in open("mail-1", "rb").read().splitlines():
    if b"Transfer" in line or line.startswith(b"Gr"): print(str(line)[2:-1])'
}

sink ENHANCEDSTATUSCODES
send "the server does not offer 8BITMIME" >seen
kill "$server"
sink 8BITMIME
send "the server offers 8BITMIME" >>seen
send 'with cte="quoted-printable"' cte=quoted-printable >>seen
compare
