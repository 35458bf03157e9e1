#!/bin/bash
# Sendmail 8.17.1 with OpenDKIM 2.11 (Debian 12) sends a wrong signature where addresses of a header have no space between them.
#
# Sendmail puts a space behind the comma of To, Cc and Reply-To, and does so after the milter has signed what came in. "relaxed" does not
# help: it makes one space of several, and does not bring forth one (RFC 6376, 3.4.2). RFC 5322 allows `a@one.example,b@one.example`, and
# scripts that join their list by "," write it. Such mail is taken for forged by those who check, and all other mail is fine, so nobody
# looks here. Write ", " between addresses, which Sendmail leaves alone; who signs before a Sendmail needs that, too.
#
#     came in: To: bob@one.example, carol@one.example
#     went out: To: bob@one.example, carol@one.example
#     dkimpy 1.1.8: the signature (relaxed/simple) is right
#     came in: To: bob@one.example,carol@one.example
#     went out: To: bob@one.example, carol@one.example
#     dkimpy 1.1.8: the signature (relaxed/simple) is wrong
#     came in: Cc: team: eve@one.example,fred@one.example;
#     went out: Cc: team: eve@one.example, fred@one.example;
#     dkimpy 1.1.8: the signature (relaxed/simple) is wrong
#     came in: Reply-To: ann@origin.example,dan@origin.example
#     went out: Reply-To: ann@origin.example, dan@origin.example
#     dkimpy 1.1.8: the signature (relaxed/simple) is wrong

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian sendmail-bin=8.17.1.9-2+deb12u2 sendmail-base=8.17.1.9-2+deb12u2 sendmail-cf=8.17.1.9-2+deb12u2 m4=1.4.19-3 \
    libwrap0=7.6.q-32 liblockfile1=1.17-1+b1 opendkim=2.11.0~beta2-8+deb12u1 libopendkim11=2.11.0~beta2-8+deb12u1 \
    liblua5.3-0=5.3.6-2 libhashkit2=1.1.4-1 libmemcached11=1.1.4-1 libmilter1.0.1=8.17.1.9-2+deb12u2 \
    libopendbx1=1.4.6-16+b1 librbl1=2.11.0~beta2-8+deb12u1 libvbr2=2.11.0~beta2-8+deb12u1
obtain pip install --no-input --target python dkimpy==1.1.8
sink 8BITMIME
trap 'kill "$sink"; cleaned_up' EXIT
sink=$server sink_port=$port milter_port=$(free_port) port=$(free_port)
mkdir queue
openssl genrsa -out key.pem 2048 2>/dev/null
openssl rsa -in key.pem -pubout -outform DER 2>/dev/null | base64 -w 0 >public
cat >opendkim.conf <<EOF
Background no
Canonicalization relaxed/simple
Domain origin.example
KeyFile /etc/key.pem
Selector one
Socket inet:$milter_port@127.0.0.1
Syslog no
UserID root
EOF
cat >sendmail.mc <<EOF
include(\`root/usr/share/sendmail/cf/m4/cf.m4')
OSTYPE(\`linux')
define(\`ALIAS_FILE', \`')
define(\`QUEUE_DIR', \`$dir/queue')
define(\`RELAY_MAILER_ARGS', \`TCP \$h $sink_port')
define(\`SMART_HOST', \`relay:[127.0.0.1]')
define(\`confDOMAIN_NAME', \`sendmail.example')
define(\`confPID_FILE', \`/run/sendmail.pid')
define(\`confTO_IDENT', \`0s')
FEATURE(\`accept_unresolvable_domains')
FEATURE(\`nocanonify')
FEATURE(\`no_default_msa')
FEATURE(\`promiscuous_relay')
DAEMON_OPTIONS(\`Name=MTA, Addr=127.0.0.1, Port=$port')
INPUT_MAIL_FILTER(\`opendkim', \`S=inet:$milter_port@127.0.0.1, F=T')
MAILER(\`smtp')
EOF
root/usr/bin/m4 -D_CF_DIR_=root/usr/share/sendmail/cf/ sendmail.mc >sendmail.cf 2>log || cannot "$(cat log)"
echo 127.0.0.1 localhost sendmail.example >hosts # Sendmail waits for a full name
start_as_installed "
hostname sendmail.example
mount --bind hosts /etc/hosts
install -m 600 key.pem /etc
opendkim -x $dir/opendkim.conf &
exec /usr/libexec/sendmail/sendmail -C $dir/sendmail.cf -bD"

client "$port" <<'EOF'
import importlib.metadata, pathlib
sys.path.insert(0, "python")
import dkim

record = b"v=DKIM1; p=" + pathlib.Path("public").read_bytes()
fields = (
    "To: bob@one.example, carol@one.example",
    "To: bob@one.example,carol@one.example",
    "Cc: team: eve@one.example,fred@one.example;",
    "Reply-To: ann@origin.example,dan@origin.example",
)
for number, field in enumerate(fields, 1):
    mail = f"From: ann@origin.example\r\n{field}\r\nDate: Mon, 1 Jun 2026 10:00:00 +0000\r\nSubject: hello\r\n\r\ntext\r\n"
    for second in range(30):
        try:
            if second:  # OpenDKIM was not there yet
                smtp.connect("127.0.0.1", int(sys.argv[1]))
            smtp.sendmail("ann@origin.example", ["bob@one.example"], mail)
            break
        except smtplib.SMTPException:
            time.sleep(1)
    arrived = pathlib.Path(f"mail-{number}")
    while not arrived.exists() or not arrived.read_bytes().endswith(b"text\r\n"):
        time.sleep(0.1)
    came = arrived.read_bytes()
    print("came in:", field)
    print("went out:", next(line for line in came.decode().splitlines() if line.startswith(field.split()[0])))
    right = dkim.verify(came, dnsfunc=lambda name, timeout=5: record)
    print(f"dkimpy {importlib.metadata.version('dkimpy')}: the signature (relaxed/simple) is", "right" if right else "wrong")
EOF
