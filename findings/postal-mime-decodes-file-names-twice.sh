#!/bin/bash
# postal-mime 4.0.0 (npm) decodes encoded words in an extended file name.
#
# RFC 2231 (section 4) says what filename*=utf-8''... means: octets in percent signs, nothing more; encoded words (RFC 2047, section 5)
# have no place in parameters. A file named `a =?utf-8?q?b?= c` that was sent right arrives as `a b c`. A sender can do nothing about it
# but to choose other names.
#
#     postal-mime 4.0.0
#     report =?=.txt -> report =?=.txt
#     a =?utf-8?q?b?= c -> a b c

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

obtain npm install --no-audit --no-fund --prefix . postal-mime@4.0.0

cat >program.mjs <<'EOF'
import {readFileSync} from "node:fs";
import PostalMime from "postal-mime";

console.log("postal-mime", JSON.parse(readFileSync("node_modules/postal-mime/package.json")).version);
for (const name of ["report =?=.txt", "a =?utf-8?q?b?= c"]) {
    const mail = "From: ann@origin.example\r\nMIME-Version: 1.0\r\nContent-Type: application/octet-stream\r\n" +
        `Content-Disposition: attachment; filename*=utf-8''${encodeURIComponent(name)}\r\n\r\ntext\r\n`;
    const {attachments} = await PostalMime.parse(mail);
    console.log(name, "->", attachments[0].filename);
}
EOF
node program.mjs >seen 2>&1 || cannot "$(cat seen)"
compare
