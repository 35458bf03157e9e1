#!/bin/bash
# Dovecot submission 2.3.19.1 (Debian 12) tells its SIZE limit only after the login, and never offers SMTPUTF8.
#
# Before the login SIZE has no number. A client that sends EHLO only before AUTH, as Python's smtplib does, does not know it:
# ask again. And mail to an address beyond ASCII cannot be sent, though the server behind Dovecot (aiosmtpd 1.4.6) takes it.
#
#     C: EHLO client.example
#     S: 250 dovecot.example
#     S: 250 8BITMIME
#     S: 250 AUTH PLAIN
#     S: 250 BURL imap
#     S: 250 CHUNKING
#     S: 250 ENHANCEDSTATUSCODES
#     S: 250 SIZE
#     S: 250 PIPELINING
#     (logged in)
#     C: EHLO client.example
#     S: 250 dovecot.example
#     S: 250 8BITMIME
#     S: 250 AUTH
#     S: 250 BURL imap imap://dovecot.example
#     S: 250 CHUNKING
#     S: 250 ENHANCEDSTATUSCODES
#     S: 250 PIPELINING
#     S: 250 SIZE 33553408
#     (the server behind)
#     C: EHLO client.example
#     S: 250 behind.example
#     S: 250 SIZE 33554432
#     S: 250 8BITMIME
#     S: 250 SMTPUTF8
#     S: 250 HELP

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian dovecot-core=1:2.3.19.1+dfsg1-2.1+deb12u7 dovecot-submissiond=1:2.3.19.1+dfsg1-2.1+deb12u7 \
    libexttextcat-2.0-0=3.4.5-1 liblua5.3-0=5.3.6-2 libsodium23=1.0.18-1+deb12u1 libstemmer0d=2.2.0-2
obtain pip install --no-input --target python aiosmtpd==1.4.6
port=$(free_port) behind=$(free_port)
cat >dovecot.conf <<EOF
protocols = submission
listen = 127.0.0.1
log_path = /dev/stderr
ssl = no
disable_plaintext_auth = no
hostname = dovecot.example
mail_location = maildir:/run/mail
passdb {
  driver = static
  args = password=secret
}
userdb {
  driver = static
  args = uid=nobody gid=nogroup home=/run
}
submission_relay_host = 127.0.0.1
submission_relay_port = $behind
service submission-login {
  inet_listener submission {
    port = $port
  }
}
EOF
start_as_installed "
user dovecot 64001
user dovenull 64002
exec /usr/sbin/dovecot -F -c $dir/dovecot.conf"

client "$port" <<EOF
sys.path.insert(0, "python")
from aiosmtpd.controller import Controller
from aiosmtpd.handlers import Sink

behind = Controller(Sink(), "127.0.0.1", $behind, enable_SMTPUTF8=True, server_hostname="behind.example")
behind.start()
say("EHLO client.example")
smtp.login("ann@origin.example", "secret")
print("(logged in)")
say("EHLO client.example")
print("(the server behind)")
smtp = smtplib.SMTP("127.0.0.1", $behind)
say("EHLO client.example")
behind.stop()
EOF
