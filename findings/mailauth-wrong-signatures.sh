#!/bin/bash
# mailauth 4.13.3 (npm) makes wrong DKIM signatures of an 8-bit Subject with an à in it, and takes right ones for wrong.
#
# It reads the header byte by byte and takes 0xA0 for a space, of which "relaxed" makes 0x20; RFC 6376 (2.8) has only blank and tab. In
# UTF-8 (RFC 6532) à ends with that byte, the Cyrillic Р does, and many a Chinese character. ä and é pass, so that it is seldom seen. What
# mailauth signs is forged to all others, and what others sign is to whoever receives by it. (ZoneMTA 3.10 and WildDuck 1.46 are built on
# 4.9.5, which reads the same.) Encode the words of headers (RFC 2047): then there is no such byte.
#
#     mailauth 4.13.3, nodemailer 10.6.1, dkimpy 1.1.8
#     Größe: mailauth signs, dkimpy says right; nodemailer signs, mailauth says pass, dkimpy says right
#     Voilà: mailauth signs, dkimpy says wrong; nodemailer signs, mailauth says fail, dkimpy says right
#     Работа: mailauth signs, dkimpy says wrong; nodemailer signs, mailauth says fail, dkimpy says right
#     =?utf-8?q?Voil=C3=A0?=: mailauth signs, dkimpy says right; nodemailer signs, mailauth says pass, dkimpy says right

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

obtain npm install --no-audit --no-fund --prefix . mailauth@4.13.3 nodemailer@10.6.1
obtain pip install --no-input --target python dkimpy==1.1.8

cat >verify.py <<'EOF'
import sys
sys.path.insert(0, "python")
import dkim

record = b"v=DKIM1; k=rsa; p=" + sys.argv[1].encode()
print("right" if dkim.verify(sys.stdin.buffer.read(), dnsfunc=lambda name, timeout=5: record) else "wrong", end="")
EOF
cat >sign.js <<'EOF'
const {execFileSync} = require('child_process');
const {generateKeyPairSync} = require('crypto');
const {dkimSign} = require('mailauth/lib/dkim/sign');
const {dkimVerify} = require('mailauth/lib/dkim/verify');
const nodemailer = require('nodemailer');

const keys = generateKeyPairSync('rsa', {modulusLength: 2048});
const privateKey = keys.privateKey.export({type: 'pkcs1', format: 'pem'});
const published = keys.publicKey.export({type: 'spki', format: 'der'}).toString('base64');
const resolver = async () => [[`v=DKIM1; k=rsa; p=${published}`]];
const dkimpy = mail => execFileSync('python3', ['verify.py', published], {input: mail}).toString();

async function byMailauth(mail) {
    const {signatures} = await dkimSign(mail, {signatureData: [{signingDomain: 'origin.example', selector: 'one', privateKey}]});
    return Buffer.concat([Buffer.from(signatures), mail]);
}

async function byNodemailer(raw) {
    const dkim = {domainName: 'origin.example', keySelector: 'one', privateKey};
    const transport = nodemailer.createTransport({streamTransport: true, buffer: true, newline: 'windows', dkim});
    return (await transport.sendMail({envelope: {from: 'ann@origin.example', to: 'bob@one.example'}, raw})).message;
}

(async () => {
    const version = name => `${name} ${require(`${name}/package.json`).version}`;
    console.log(`${version('mailauth')}, ${version('nodemailer')}, dkimpy ${process.argv[2]}`);
    for (const subject of ['Größe', 'Voilà', 'Работа', '=?utf-8?q?Voil=C3=A0?=']) {
        const mail = Buffer.from(`From: ann@origin.example\r\nTo: bob@one.example\r\nSubject: ${subject}\r\n\r\ntext\r\n`);
        const signed = await byNodemailer(mail);
        const [{status}] = (await dkimVerify(signed, {resolver})).results;
        console.log(`${subject}: mailauth signs, dkimpy says ${dkimpy(await byMailauth(mail))}; ` +
            `nodemailer signs, mailauth says ${status.result}, dkimpy says ${dkimpy(signed)}`);
    }
})();
EOF
dkimpy=$(python3 -c 'import importlib.metadata as metadata, sys; sys.path.insert(0, "python"); print(metadata.version("dkimpy"))')
node sign.js "$dkimpy" >seen 2>error || cannot "$(cat error)"
compare
