#!/bin/bash
# A mail to two recipients, of whom the server refuses one: what clients do, and what they tell the program that sends.
#
# RFC 5321 (3.3) lets a client go on with the others. Some do and call it success: look at what they return, or nobody learns of the
# refusal. Others do not: one dead address keeps the mail from everybody. PHPMailer goes on and reports a failure: a program that
# tries again sends to Ann once more. A queue that keeps count of each recipient, or a mail to each, avoids all of that.
#
#     PHPMailer 6.6.3: exception: SMTP Error: The following recipients failed; Ann has the mail
#     nodemailer 10.6.1: returned; rejected is refused@one.example; Ann has the mail
#     smtplib of Python 3: returned refused@one.example; Ann has the mail
#     Symfony Mailer 5.4: exception: Expected response code "250/251/252" but got code "550"; Ann has nothing
#     mail (Ruby) 2.7.1: Net::SMTPFatalError; Ann has nothing
#     curl 7.88.1: exit status 55; Ann has nothing

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

for program in curl node npm php python3 ruby; do
    command -v "$program" >/dev/null || cannot "there is no $program"
done
debian libphp-phpmailer=6.6.3-1 php-symfony-mailer=5.4.53+dfsg-0+deb12u1 php-symfony-mime=5.4.53+dfsg-0+deb12u1 \
    php-symfony-event-dispatcher=5.4.53+dfsg-0+deb12u1 php-symfony-event-dispatcher-contracts=2.5.5-0+deb12u1 \
    php-symfony-deprecation-contracts=2.5.5-0+deb12u1 php-symfony-service-contracts=2.5.5-0+deb12u1 php-psr-container=1.1.2-1 \
    php-psr-event-dispatcher=1.0.0-2 php-psr-log=1.1.4-2 php-email-validator=3.2.5-1 php-doctrine-lexer=2.1.0-2+deb12u1 \
    php-doctrine-deprecations=1.0.0-2+deb12u1 ruby-mail=2.7.1+dfsg1-2 ruby-mini-mime=1.1.1-2
obtain npm install --no-audit --no-fund --prefix . nodemailer@10.6.1

cat >phpmailer.php <<'EOF'
<?php
$folder = 'root/usr/share/php/libphp-phpmailer/src';
foreach (['Exception', 'PHPMailer', 'SMTP'] as $name) require "$folder/$name.php";
$mailer = new PHPMailer\PHPMailer\PHPMailer(true);
echo 'PHPMailer ', $mailer::VERSION, ': ';
$mailer->isSMTP();
[$mailer->Host, $mailer->Port, $mailer->Subject, $mailer->Body] = ['127.0.0.1', $argv[1], 'hello', 'text'];
$mailer->setFrom('me@origin.example');
$mailer->addAddress('ann@one.example');
$mailer->addAddress('refused@one.example');
try {
    $mailer->send();
    echo 'returned';
} catch (Exception $error) {
    echo 'exception: ', explode(': refused', $error->getMessage())[0];
}
EOF
cat >symfony.php <<'EOF'
<?php
set_include_path('root/usr/share/php');
require 'Symfony/Component/Mailer/autoload.php';
$transport = Symfony\Component\Mailer\Transport::fromDsn("smtp://127.0.0.1:$argv[1]");
$mail = (new Symfony\Component\Mime\Email())->from('me@origin.example')->subject('hello')->text('text');
echo 'Symfony Mailer 5.4: ';
try {
    $transport->send($mail->to('ann@one.example', 'refused@one.example'));
    echo 'returned';
} catch (Exception $error) {
    echo 'exception: ', explode(', with', $error->getMessage())[0];
}
EOF
cat >nodemailer.js <<'EOF'
const mail = {from: 'me@origin.example', to: 'ann@one.example, refused@one.example', subject: 'hello', text: 'text'};
const transport = require('nodemailer').createTransport({host: '127.0.0.1', port: Number(process.argv[2])});
const says = words => process.stdout.write(`nodemailer ${require('nodemailer/package.json').version}: ${words}`);
transport.sendMail(mail).then(({rejected}) => says(`returned; rejected is ${rejected}`), error => says(error.message));
EOF
cat >smtplib_.py <<'EOF'
import smtplib, sys

print("smtplib of Python 3: ", end="")
with smtplib.SMTP("127.0.0.1", int(sys.argv[1])) as smtp:
    refused = smtp.sendmail("me@origin.example", ["ann@one.example", "refused@one.example"], "Subject: hello\r\n\r\ntext\r\n")
print("returned", *refused, end="")
EOF
cat >mail.rb <<'EOF'
require "mail"
print "mail (Ruby) #{Mail::VERSION.version}: "
mail = Mail.new(from: "me@origin.example", to: ["ann@one.example", "refused@one.example"], subject: "hello", body: "text")
mail.delivery_method :smtp, address: "127.0.0.1", port: ARGV[0].to_i
begin
  mail.deliver!
  print "returned"
rescue StandardError => error
  print error.class
end
EOF
with_curl() {
    local status=0
    printf 'Subject: hello\n\ntext\n' >text
    curl --silent "smtp://127.0.0.1:$1/client.example" --mail-from me@origin.example --mail-rcpt ann@one.example \
        --mail-rcpt refused@one.example --upload-file text || status=$?
    printf '%s: exit status %s' "$(curl --version | awk 'NR == 1 { print $1, $2 }')" "$status"
}

sink ENHANCEDSTATUSCODES
for command in "php phpmailer.php" "node nodemailer.js" "python3 smtplib_.py" "php symfony.php" "ruby -I root/usr/lib/ruby/vendor_ruby mail.rb" \
    with_curl; do
    rm -f mail-*
    $command "$port" 2>error || cannot "$command: $(cat error)"
    [ -e mail-1 ] && echo "; Ann has the mail" || echo "; Ann has nothing"
done >seen
compare
