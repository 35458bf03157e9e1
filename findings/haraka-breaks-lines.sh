#!/bin/bash
# Haraka 3.3.4 (npm, default settings) puts CRLF and a space into lines of 991 to 998 octets, and accepts the message.
#
# RFC 5322 (2.1.1) allows 998, and some programs break lines only there. A word of the text has a space in it then, and the body
# hash of a DKIM signature made before is wrong. Keep lines at 990 octets or fewer; or set data_line_length in connection.ini.
#
#     sent: 990 y, arrived: b'990 y\r\n'
#     sent: 991 y, arrived: b'990 y\r\n 1 y\r\n'
#     sent: 998 y, arrived: b'990 y\r\n 8 y\r\n'

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

obtain npm install --no-audit --no-fund --prefix . Haraka@3.3.4
port=$(free_port)
mkdir config plugins
cp node_modules/Haraka/config/connection.ini config
echo "listen=127.0.0.1:$port" >config/smtp.ini
echo haraka.example >config/me
echo keep >config/plugins
cat >plugins/keep.js <<'EOF'
exports.hook_rcpt = next => next(OK);
exports.hook_queue = (next, {transaction}) => {
    const file = require('fs').createWriteStream('kept');
    file.on('close', () => next(OK, 'kept'));
    transaction.message_stream.pipe(file);
};
EOF
start node node_modules/Haraka/bin/haraka -c .

client "$port" <<'EOF'
import pathlib, re

for length in 990, 991, 998:
    smtp.sendmail("ann@origin.example", ["bob@one.example"], "Subject: long\r\n\r\n" + "y" * length + "\r\n")
    body = pathlib.Path("kept").read_bytes().decode().partition("\r\n\r\n")[2]
    print(f"sent: {length} y, arrived:", re.sub("y+", lambda run: f"{len(run[0])} y", body).encode())
EOF
