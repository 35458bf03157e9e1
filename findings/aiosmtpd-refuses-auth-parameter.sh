#!/bin/bash
# aiosmtpd 1.4.6 (PyPI) offers AUTH, and refuses the parameter AUTH= of MAIL that belongs to it.
#
# RFC 4954 (5) lets a client name who handed a mail in, or say AUTH=<> where it does not tell; a server that offers AUTH has to know the
# parameter, if only to ignore it. curl says it by --mail-auth, Exim by authenticated_sender. 555 is final: the client is logged in, and
# each of its mails is refused, without a word of AUTH. Leave the option out for this server; Postfix 3.7, Exim 4.96, Sendmail 8.17,
# OpenSMTPD 6.8 and smtp-server 3.21 take it.
#
#     S: 250 AUTH LOGIN PLAIN
#     curl 7.88.1: exit status 0
#     C: MAIL FROM:<ann@origin.example> SIZE=50
#     S: 250 OK
#     curl 7.88.1 --mail-auth <>: exit status 55
#     C: MAIL FROM:<ann@origin.example> AUTH=<> SIZE=50
#     S: 555 MAIL FROM parameters not recognized or not implemented

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

obtain pip install --no-input --target python aiosmtpd==1.4.6
port=$(free_port)
cat >server.py <<'EOF'
import sys, threading
sys.path.insert(0, "python")
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Sink
from aiosmtpd.smtp import AuthResult

def login(server, session, envelope, mechanism, given):
    return AuthResult(success=True)

how = {"auth_require_tls": False, "authenticator": login, "server_hostname": "aiosmtpd.example"}
Controller(Sink(), "127.0.0.1", int(sys.argv[1]), **how).start()
print("ready", flush=True)
threading.Event().wait()
EOF
echo >log
start python3 server.py "$port"

printf 'From: ann@origin.example\r\nSubject: hello\r\n\r\ntext\r\n' >mail
with_curl() {
    local status=0
    curl --silent --verbose "smtp://127.0.0.1:$port/client.example" --user ann:secret --mail-from ann@origin.example \
        --mail-rcpt bob@one.example --upload-file mail "$@" 2>said || status=$?
    sed -i 's/\r$//; s/^>/C:/; s/^</S:/' said
    echo "$(curl --version | awk 'NR == 1 { print $1, $2 }')${*:+ $*}: exit status $status"
    sed -n '/^C: MAIL/,/^S:/p' said
}
until grep -q ready log; do
    kill -0 "$server" || cannot "$(cat log)"
    sleep 0.1
done
{
    with_curl >plain
    sed -n 's/^S: 250-AUTH/S: 250 AUTH/p' said
    cat plain
    with_curl --mail-auth '<>'
} >seen
compare
