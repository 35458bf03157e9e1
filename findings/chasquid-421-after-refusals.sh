#!/bin/bash
# chasquid 1.11 (Debian 12, default settings) ends the connection at the third wrong recipient, with 421 as its reply.
#
# A mail to a list that has three dead addresses reaches nobody: the recipients that were accepted before are lost with the
# connection, and those behind are not asked for. 421 is transient (RFC 5321, 4.2.2): whoever then repeats the whole mail comes to the
# same end, for days. Keep the refusals that were heard, and leave those recipients out at the next try.
#
#     C: RCPT TO:<bob@here.example>
#     S: 250 2.1.5 You have an eerie feeling...
#     C: RCPT TO:<dead1@here.example>
#     S: 550 5.1.1 Destination address is unknown (user does not exist)
#     C: RCPT TO:<dead2@here.example>
#     S: 550 5.1.1 Destination address is unknown (user does not exist)
#     C: RCPT TO:<dead3@here.example>
#     S: 421 4.5.0 Too many errors, bye

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian chasquid=1.11-2+b2
mkdir -p etc/domains/here.example
echo 'bob: ann@here.example' >etc/domains/here.example/aliases
start_chasquid

client "$port" <<'EOF'
smtp.ehlo()
smtp.docmd("MAIL FROM:<ann@origin.example>")
for name in "bob", "dead1", "dead2", "dead3":
    say(f"RCPT TO:<{name}@here.example>")
EOF
