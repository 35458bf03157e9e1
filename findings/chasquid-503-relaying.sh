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
port=$(free_port)
mkdir -p etc/certs/chasquid.example etc/domains/here.example
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=chasquid.example -keyout etc/certs/chasquid.example/privkey.pem \
    -out etc/certs/chasquid.example/fullchain.pem 2>log
cat >etc/chasquid.conf <<EOF
hostname: "chasquid.example"
smtp_address: "127.0.0.1:$port"
submission_address: ""
data_dir: "$dir/data"
mail_log_path: "<stderr>"
EOF
start root/usr/bin/chasquid -config_dir etc -alsologtostderr

client "$port" <<'EOF'
smtp.ehlo()
smtp.docmd("MAIL FROM:<ann@origin.example>")
say("RCPT TO:<bob@one.example>")
EOF
