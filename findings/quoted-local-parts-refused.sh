#!/bin/bash
# OpenSMTPD 6.8.0p2 (Debian 12) and smtp-server 3.21.6 (npm) call addresses with quotes a syntax error.
#
# RFC 5321 (4.1.2) has quotes around local parts that could not be written otherwise: "a..b", as mobile phones of Japan had them,
# or "john smith". OpenSMTPD refuses all quotes, smtp-server those with two dots, a space or an @; both refuse a..b without quotes, too,
# so there is no way to write it, and as sender of a mail neither. 501 says "syntax error", and is final: programs that clean lists by
# that take a mailbox that works off the list. Such mail needs another relay; Postfix, Exim, Sendmail, Haraka and aiosmtpd take it.
#
#     OpenSMTPD
#     C: RCPT TO:<"bob"@one.example>
#     S: 501 5.1.3 Recipient address syntax error
#     C: RCPT TO:<"a..b"@one.example>
#     S: 501 5.1.3 Recipient address syntax error
#     C: RCPT TO:<"john smith"@one.example>
#     S: 501 5.1.3 Recipient address syntax error
#     C: RCPT TO:<a..b@one.example>
#     S: 501 5.1.3 Recipient address syntax error
#     C: RSET
#     S: 250 2.0.0 Reset state
#     C: MAIL FROM:<"a..b"@one.example>
#     S: 553 5.1.0 Sender address syntax error
#     smtp-server
#     C: RCPT TO:<"bob"@one.example>
#     S: 250 Accepted
#     C: RCPT TO:<"a..b"@one.example>
#     S: 501 Error: Bad recipient address syntax
#     C: RCPT TO:<"john smith"@one.example>
#     S: 501 Error: Bad recipient address syntax
#     C: RCPT TO:<a..b@one.example>
#     S: 501 Error: Bad recipient address syntax
#     C: RSET
#     S: 250 Flushed
#     C: MAIL FROM:<"a..b"@one.example>
#     S: 501 Error: Bad sender address syntax

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian opensmtpd=6.8.0p2-4+b4 libevent-2.1-7=2.1.12-stable-8+deb12u1
obtain npm install --no-audit --no-fund --prefix . smtp-server@3.21.6
cat >server.js <<'EOF'
const {SMTPServer} = require('smtp-server');
const server = new SMTPServer({authOptional: true, hideSTARTTLS: true});
server.listen(Number(process.argv[2]), '127.0.0.1', () => console.log('ready'));
EOF
node_port=$(free_port)
echo >node.log
node server.js "$node_port" >>node.log 2>&1 &
trap 'kill "$node"; cleaned_up' EXIT
node=$!
until grep -q ready node.log; do
    kill -0 "$node" || cannot "$(cat node.log)"
    sleep 0.1
done
start_opensmtpd

client "$port" <<EOF
for name, port in {"OpenSMTPD": int(sys.argv[1]), "smtp-server": $node_port}.items():
    smtp = smtplib.SMTP("127.0.0.1", port, "client.example")
    smtp.ehlo()
    smtp.docmd("MAIL FROM:<ann@origin.example>")
    print(name)
    for local in '"bob"', '"a..b"', '"john smith"', "a..b":
        say(f"RCPT TO:<{local}@one.example>")
    say("RSET")
    say('MAIL FROM:<"a..b"@one.example>')
EOF
