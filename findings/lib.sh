# shellcheck shell=bash
# What the findings share: programs in a temporary folder, run on loopback.
# Exit 0: they did what the head of the script shows (lines indented by five); 1: something else; 2: they cannot be run.
set -euo pipefail
export LC_ALL=C
script=$(realpath "$0") dir=$(mktemp -d) server=
chmod 755 "$dir"
cd "$dir"
trap cleaned_up EXIT

cleaned_up() {
    { kill -KILL "$server" && wait "$server"; } 2>/dev/null || true
    rm -rf "$dir"
}

cannot() {
    echo "cannot be run: $*" >&2
    exit 2
}

# obtain COMMAND ...: gets a package
obtain() { "$@" >obtained 2>&1 || cannot "$*: $(tail -3 obtained)"; }

# debian PACKAGE=VERSION ...: unpacks them into root/
debian() {
    obtain apt-get download "$@"
    for deb in ./*.deb; do dpkg-deb -x "$deb" root; done
}

free_port() { python3 -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'; }

# start COMMAND ...: runs a server until the script ends
start() {
    "$@" >log 2>&1 &
    server=$!
}

# start_as_installed COMMANDS: in namespaces with root/ laid over /usr, /etc and /var/lib; outside nothing changes
start_as_installed() {
    [ "$(id -u)" = 0 ] || cannot "needs root, for namespaces"
    mkdir -p over root/usr root/etc root/var/lib
    cat >system.sh <<SYSTEM
mount -t tmpfs none over
for name in usr etc var/lib; do
    mkdir -p over/\$name/upper over/\$name/work
    mount -t overlay none -o lowerdir=root/\$name:/\$name,upperdir=over/\$name/upper,workdir=over/\$name/work /\$name
done
mount -t tmpfs none /run
mount -t tmpfs none /var/spool
user() { echo "\$1:x:\$2:\$2::/:/bin/false" >>/etc/passwd; echo "\$1:x:\$2:" >>/etc/group; }
install_postfix() { # with main.cf, a log of its own, and nothing that listens
    user postfix 64002
    echo postdrop:x:64003: >>/etc/group
    mkdir -p /etc/postfix /var/spool/postfix
    cp main.cf /etc/postfix
    sed "s/^smtp  *inet.*//; s/^#postlog/postlog/; s/^\(smtp  *unix .* - .* \)y /\1n /" \
        /usr/share/postfix/master.cf.dist >/etc/postfix/master.cf
    postfix set-permissions create-missing
    postfix start
}
$1
SYSTEM
    start unshare --mount --uts --pid --fork --kill-child --propagation private sh -eu system.sh
}

# sink [KEYWORD ...]: an SMTP server on port $port that offers these, refuses recipients named refused, and keeps each mail in a
# file mail-NUMBER, and what clients say in the file commands
sink() {
    port=$(free_port)
    echo "$SINK" >sink.py
    echo >log
    start python3 sink.py "$port" "$@"
    until grep -q ready log; do
        kill -0 "$server" || cannot "$(cat log)"
        sleep 0.1
    done
}

# postfix_conf PORT [LINE ...]: a main.cf of Postfix that hands all mail to that port
postfix_conf() {
    printf '%s\n' 'compatibility_level = 3.6' 'myhostname = origin.example' 'mydestination =' \
        'inet_interfaces = loopback-only' 'inet_protocols = ipv4' "relayhost = [127.0.0.1]:$1" \
        'maillog_file = /var/log/postfix.log' "${@:2}"
}

# start_chasquid: with its default settings, on $port, for the domains and aliases that are in etc/domains
start_chasquid() {
    port=$(free_port)
    mkdir -p etc/certs/chasquid.example etc/domains
    openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=chasquid.example \
        -keyout etc/certs/chasquid.example/privkey.pem -out etc/certs/chasquid.example/fullchain.pem 2>log
    printf '%s\n' 'hostname: "chasquid.example"' "smtp_address: \"127.0.0.1:$port\"" 'submission_address: ""' \
        "data_dir: \"$dir/data\"" 'mail_log_path: "<stderr>"' >etc/chasquid.conf
    start root/usr/bin/chasquid -config_dir etc -alsologtostderr
}

# start_opensmtpd: on $port, as installed; it takes mail to everybody, and throws it away
start_opensmtpd() {
    port=$(free_port)
    cat >smtpd.conf <<EOF
listen on 127.0.0.1 port $port hostname opensmtpd.example
table all { "@" = nobody }
action "discard" mda "cat >/dev/null" virtual <all>
match from any for any action "discard"
EOF
    start_as_installed "
user opensmtpd 64001
user opensmtpq 64002
mkdir -p /var/lib/opensmtpd/empty; mkdir -m 711 /var/spool/smtpd
exec /usr/sbin/smtpd -d -f $dir/smtpd.conf"
}

# exim_conf PORT: a configuration of Exim that hands all mail to that port
exim_conf() {
    printf '%s\n' 'primary_hostname = origin.example' 'spool_directory = /run/exim' 'log_file_path = /run/exim/%slog' \
        'keep_environment =' 'begin routers' 'all:' 'driver = manualroute' 'transport = out' 'route_list = * 127.0.0.1' \
        'self = send' 'begin transports' 'out:' 'driver = smtp' "port = $1"
}

# client PORT: runs the Python of standard input with smtp connected, and compares what it prints;
# say(LINE) prints a command and its reply, heard(CODE, TEXT) a reply
client() {
    { echo "$CLIENT" && cat; } >client.py
    timeout 100 python3 client.py "$1" >seen 2>&1 || [ $? = 1 ] || cannot "$(cat seen); the server's log: $(tail -5 log)"
    compare
}

# compare: what is in seen with the head of the script
compare() {
    if diff <(sed -n 's/^#     //p' "$script") seen >differences; then
        echo "as it was: ${script##*/}"
    else
        echo "changed (<: was, >: is): ${script##*/}"
        cat differences
        exit 1
    fi
}

CLIENT='
import smtplib, sys, time

for second in range(30):
    try:
        smtp = smtplib.SMTP("127.0.0.1", int(sys.argv[1]), "client.example", timeout=60)
        break
    except OSError as error:
        why = error
        time.sleep(1)
else:
    print("the server does not greet:", why)
    sys.exit(2)

def heard(code, text):
    print(*(f"S: {code} {part}" for part in text.decode().split("\n")), sep="\n")

def say(line):
    print("C: " + line)
    heard(*smtp.docmd(line))
'

SINK='
import pathlib, socketserver, sys

class Session(socketserver.StreamRequestHandler):
    def reply(self, *lines):
        self.wfile.write("".join(line + "\r\n" for line in lines).encode())

    def handle(self):
        self.reply("220 sink.example ESMTP")
        for line in self.rfile:
            command = line.decode(errors="backslashreplace").rstrip("\r\n")
            with open("commands", "a") as file:
                print("C:", command, file=file)
            verb = command[:4].upper()
            if verb == "EHLO":
                self.reply(*(f"250-{word}" for word in ["sink.example", *sys.argv[2:]]), "250 HELP")
            elif verb == "RCPT" and "<refused@" in command:
                self.reply("550 5.1.1 no such user here")
            elif verb == "DATA":
                self.reply("354 go on")
                content = b"".join(iter(self.rfile.readline, b".\r\n"))
                number = len(list(pathlib.Path().glob("mail-*"))) + 1
                pathlib.Path(f"mail-{number}").write_bytes(content)
                self.reply("250 2.0.0 taken")
            elif verb == "QUIT":
                return self.reply("221 2.0.0 bye")
            else:
                self.reply("250 2.1.0 ok")

socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer.daemon_threads = True
with socketserver.ThreadingTCPServer(("127.0.0.1", int(sys.argv[1])), Session) as server:
    print("ready", flush=True)
    server.serve_forever()
'
