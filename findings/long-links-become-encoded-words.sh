#!/bin/bash
# Python's email, PHPMailer (by mail()) and Perl's Email::MIME make encoded words of a long List-Unsubscribe: it is no link any more.
#
# RFC 2369 (section 2) has a URL in angle brackets there, where encoded words must not stand (RFC 2047, section 5): who looks for the link
# need not decode anything and finds none, so a one-click unsubscription (RFC 8058) does not work. All words of a header get it that are
# too long for a line: links with a key in them, and by Python and PHPMailer also the Message-ID in In-Reply-To, when the mail that is
# answered comes from Microsoft 365 (80 characters and more), and the answer stands outside its thread. But a line may have 998
# (RFC 5322, 2.1.1). In Python say policy.clone(max_line_length=998), in PHPMailer isSMTP(), in Email::MIME header, not header_str.
#
#     List-Unsubscribe
#       Python's email 3: =?utf-8?q?=3Chttps=3A//news=2Eorigin=2Ee...
#       the same, max_line_length=998: <https://news.origin.example/unsubscribe...
#       PHPMailer 6.6.3, mail(): =?us-ascii?Q?<https://news.origin.exampl...
#       PHPMailer 6.6.3, SMTP: <https://news.origin.example/unsubscribe...
#       Email::MIME 1.953, header_str: =?UTF-8?B?PGh0dHBzOi8vbmV3cy5vcmlnaW4uZX...
#       Email::MIME 1.953, header: <https://news.origin.example/unsubscribe...
#       nodemailer 10.6.1: <https://news.origin.example/unsubscribe...
#       mail (Ruby) 2.7.1: <https://news.origin.example/unsubscribe...
#     In-Reply-To
#       Python's email 3: =?utf-8?q?=3CAM0PR07MB4417AAAA1111BBBB22...
#       the same, max_line_length=998: <AM0PR07MB4417AAAA1111BBBB2222CCCC3333DD...
#       PHPMailer 6.6.3, mail(): =?us-ascii?Q?<AM0PR07MB4417AAAA1111BBBB2...
#       PHPMailer 6.6.3, SMTP: <AM0PR07MB4417AAAA1111BBBB2222CCCC3333DD...
#       Email::MIME 1.953, header_str: <AM0PR07MB4417AAAA1111BBBB2222CCCC3333DD...
#       Email::MIME 1.953, header: <AM0PR07MB4417AAAA1111BBBB2222CCCC3333DD...
#       nodemailer 10.6.1: <AM0PR07MB4417AAAA1111BBBB2222CCCC3333DD...
#       mail (Ruby) 2.7.1: <AM0PR07MB4417AAAA1111BBBB2222CCCC3333DD...

# Seen with Python 3.6 to 3.13.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

for program in node npm perl php python3 ruby; do
    command -v "$program" >/dev/null || cannot "there is no $program"
done
debian libphp-phpmailer=6.6.3-1 ruby-mail=2.7.1+dfsg1-2 ruby-mini-mime=1.1.1-2 libemail-mime-perl=1.953-1 \
    libemail-simple-perl=2.218-1 libemail-address-xs-perl=1.05-1+b1 libemail-date-format-perl=1.008-1 \
    libemail-mime-contenttype-perl=1.028-1 libemail-mime-encodings-perl=1.317-1 libemail-messageid-perl=1.408-1 \
    libmodule-runtime-perl=0.016-2 libmime-types-perl=2.24-1
obtain npm install --no-audit --no-fund --prefix . nodemailer@10.6.1

cat >python.py <<'EOF'
import sys
from email.message import EmailMessage
from email.policy import SMTP

for policy in SMTP, SMTP.clone(max_line_length=998):
    print("# the same, max_line_length=998" if policy.max_line_length == 998 else "# Python's email 3")
    mail = EmailMessage(policy)
    mail[sys.argv[1]] = sys.argv[2]
    print(mail.as_string())
EOF
cat >phpmailer.php <<'EOF'
<?php
$folder = 'root/usr/share/php/libphp-phpmailer/src';
foreach (['Exception', 'PHPMailer'] as $name) require "$folder/$name.php";
foreach (['isMail' => 'mail()', 'isSMTP' => 'SMTP'] as $way => $name) {
    $mailer = new PHPMailer\PHPMailer\PHPMailer(true);
    echo '# PHPMailer ', $mailer::VERSION, ", $name\n";
    $mailer->$way();
    $mailer->setFrom('me@origin.example');
    $mailer->addAddress('ann@one.example');
    [$mailer->Subject, $mailer->Body] = ['hello', 'text'];
    $mailer->addCustomHeader($argv[1], $argv[2]);
    $mailer->preSend();
    echo $mailer->getSentMIMEMessage();
}
EOF
cat >email_mime.pl <<'EOF'
use Email::MIME;
for my $way ("header_str", "header") {
    print "# Email::MIME $Email::MIME::VERSION, $way\n";
    print Email::MIME->create($way => [From => 'me@origin.example', @ARGV], body => "text\n")->as_string;
}
EOF
cat >nodemailer.js <<'EOF'
const nodemailer = require('nodemailer');
const transport = nodemailer.createTransport({streamTransport: true, buffer: true});
const [name, value] = process.argv.slice(2);
console.log(`# nodemailer ${require('nodemailer/package.json').version}`);
transport.sendMail({to: 'ann@one.example', headers: {[name]: value}}).then(({message}) => console.log(String(message)));
EOF
cat >mail.rb <<'EOF'
require "mail"
puts "# mail (Ruby) #{Mail::VERSION.version}"
mail = Mail.new(from: "me@origin.example", to: "ann@one.example", body: "text")
mail.header[ARGV[0]] = ARGV[1]
puts mail.encoded
EOF

# value NAME: of what programs say and write, the names of those behind # and the beginning of that field
value() {
    python3 -c '
import re, sys
for line in re.sub(r"\n[ \t]+", " ", sys.stdin.read().replace("\r", "")).splitlines():
    if line.startswith("# "):
        print(end=f"  {line[2:]}: ")
    elif line.startswith(sys.argv[1]):
        print(line.partition(":")[2].strip()[:40] + "...")' "$1"
}

url='https://news.origin.example/unsubscribe?list=weekly&subscriber=7f3b9c0e5d2a4b6c8d1e3f5a7b9c0d2e&signature=4b6c8d1e3f5a7b9c0d2e7f3b'
perl=(perl -I root/usr/share/perl5 -I root/usr/lib/x86_64-linux-gnu/perl5/5.36)
for field in "List-Unsubscribe=<$url>" \
    'In-Reply-To=<AM0PR07MB4417AAAA1111BBBB2222CCCC3333DDDD4444@AM0PR07MB4417.eurprd07.prod.outlook.com>'; do
    named=("${field%%=*}" "${field#*=}")
    echo "${named[0]}"
    {
        python3 python.py "${named[@]}" && php phpmailer.php "${named[@]}" && "${perl[@]}" email_mime.pl "${named[@]}" &&
            node nodemailer.js "${named[@]}" &&
            ruby -I root/usr/lib/ruby/vendor_ruby mail.rb "${named[@]}"
    } 2>error | value "${named[0]}" || cannot "$(cat error)"
done >seen
compare
