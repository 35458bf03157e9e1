#!/bin/bash
# Courier 1.0.16 (Debian 12, default settings) refuses a message that is too large with 534.
#
# Elsewhere 534 is a reply to AUTH: the login is too weak (RFC 4954). A sender that takes every 534 for that stops the account
# and asks for another password, because of one large message. RFC 1870 has 552 for it. The limit of 10 MiB is not announced.
#
#     S: 250 SIZE
#     C: MAIL FROM:<ann@origin.example> SIZE=10485761
#     S: 534 SIZE=Message too big.

# shellcheck source-path=SCRIPTDIR source=courier.sh
. "$(dirname "$0")/courier.sh"

client "$port" <<'EOF'
code, keywords = smtp.ehlo()
heard(code, next(word for word in keywords.splitlines() if word.startswith(b"SIZE")))
say("MAIL FROM:<ann@origin.example> SIZE=10485761")
EOF
