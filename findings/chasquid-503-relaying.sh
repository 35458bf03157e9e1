#!/bin/bash
# chasquid 1.11 (Debian 12, default settings) refuses to relay with 503.
#
# 503 is "bad sequence of commands" (RFC 5321), a mistake of the client; others answer a missing login by 530, 550 or 554. Only
# the enhanced code and the text say that neither the commands nor the recipient are wrong: log in, and it passes.
#
#     C: RCPT TO:<bob@one.example>
#     S: 503 5.7.1 Relay not allowed

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian chasquid=1.11-2+b2
mkdir -p etc/domains/here.example
start_chasquid

client "$port" <<'EOF'
smtp.ehlo()
smtp.docmd("MAIL FROM:<ann@origin.example>")
say("RCPT TO:<bob@one.example>")
EOF
