#!/bin/bash
# OpenSMTPD 6.8.0p2 (Debian 12, default settings) says "too many recipients" to MAIL after 100 messages over one connection.
#
# 452 4.5.3 is about the recipients of a message (RFC 3463), but this one has none yet. A sender that splits or defers it errs:
# over a new connection it is accepted at once. So count messages, 100 for each connection, or open another after a 452 to MAIL.
#
#     C: MAIL FROM:<ann@origin.example>
#     S: 452 4.5.3 Too many recipients: Too many messages sent
#     (a new connection)
#     C: MAIL FROM:<ann@origin.example>
#     S: 250 2.0.0 Ok

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian opensmtpd=6.8.0p2-4+b4 libevent-2.1-7=2.1.12-stable-8+deb12u1
start_opensmtpd

client "$port" <<'EOF'
for _ in range(100):
    smtp.sendmail("ann@origin.example", ["bob@one.example"], "Subject: hello\r\n\r\n")
say("MAIL FROM:<ann@origin.example>")
print("(a new connection)")
smtp.connect("127.0.0.1", int(sys.argv[1]))
smtp.ehlo()
say("MAIL FROM:<ann@origin.example>")
EOF
