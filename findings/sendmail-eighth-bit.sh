#!/bin/bash
# Sendmail 8.17.1 (Debian 12, built without SMTPUTF8) strips the eighth bit of an address, and accepts it: another address.
#
# Where SMTPUTF8 is not announced, no address beyond ASCII may be sent (RFC 6531). Programs do it all the same; other servers take
# it as it is or refuse it. Here 250 is for a recipient nobody wrote to: the sender counts the mail as sent, and it is lost, or
# comes back for a strange address. Look for the keyword, and refuse the message before sending.
#
#     SMTPUTF8 is announced: False
#     C: MAIL FROM:<ann@origin.example>
#     S: 250 2.1.0 <ann@origin.example>... Sender ok
#     C: RCPT TO:<jürgen@one.example>
#     S: 250 2.1.5 <jC<rgen@one.example>... Recipient ok

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian sendmail-bin=8.17.1.9-2+deb12u2 sendmail-base=8.17.1.9-2+deb12u2 sendmail-cf=8.17.1.9-2+deb12u2 m4=1.4.19-3 \
    libwrap0=7.6.q-32 liblockfile1=1.17-1+b1
port=$(free_port)
cat >sendmail.mc <<EOF
include(\`/usr/share/sendmail/cf/m4/cf.m4')
OSTYPE(\`linux')
define(\`confDOMAIN_NAME', \`sendmail.example')
define(\`QUEUE_DIR', \`/run')
define(\`confPID_FILE', \`/run/pid')
define(\`confTO_IDENT', \`0s')
FEATURE(\`accept_unresolvable_domains')
FEATURE(\`no_default_msa')
FEATURE(\`promiscuous_relay')
DAEMON_OPTIONS(\`Name=MTA, Addr=127.0.0.1, Port=$port')
MAILER(\`smtp')
EOF
start_as_installed "
hostname mta.sendmail.example
echo '127.0.0.1 localhost mta.sendmail.example' >/etc/hosts
m4 -D_CF_DIR_=/usr/share/sendmail/cf/ $dir/sendmail.mc >/etc/sendmail.cf
exec /usr/libexec/sendmail/sendmail -C /etc/sendmail.cf -bD"

client "$port" <<'EOF'
smtp.ehlo()
print("SMTPUTF8 is announced:", smtp.has_extn("smtputf8"))
smtp.command_encoding = "utf-8"
say("MAIL FROM:<ann@origin.example>")
say("RCPT TO:<j\u00fcrgen@one.example>")
EOF
