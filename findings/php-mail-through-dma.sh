#!/bin/bash
# PHP 8's mail() through dma 0.13 (Debian 12): the header arrives with CR CR LF, and does not end.
#
# Since PHP 8 mail() writes CRLF behind header lines, and leaves the body as it is: most often LF. sendmail(8) has always been given LF;
# Exim, Postfix and msmtp take both. dma makes CRLF of each LF, so an empty line is CR by then and ends no header: Date and
# Message-ID are not added, a reader shows the text as a part of the header, and servers that refuse a bare CR refuse the mail. With
# PHP 8.2.4 or newer set mail.mixed_lf_and_crlf = On in php.ini; or take another sendmail.
#
#     mail.mixed_lf_and_crlf=0:
#     To: bob@one.example\r\r\nSubject: hello\r\r\nFrom: ann@origin.example\r\r\n\r\r\none\r\ntwo\r\n\r\r\n
#     mail.mixed_lf_and_crlf=1:
#     To: bob@one.example\r\nSubject: hello\r\nFrom: ann@origin.example\r\nDate: ...\r\nMessage-Id: <...>\r\n\r\none\r\ntwo\r\n\r\n

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

command -v php >/dev/null || cannot "there is no php"
[ "$(php -r 'echo PHP_VERSION_ID >= 80204;')" ] || cannot "PHP is older than 8.2.4"
debian dma=0.13-1+b1
sink ENHANCEDSTATUSCODES
trap 'kill "$sink"; cleaned_up' EXIT
sink=$server
printf 'SMARTHOST 127.0.0.1\nPORT %s\nMAILNAME origin.example\n' "$port" >dma.conf
cat >send.php <<'EOF'
<?php
mail('bob@one.example', 'hello', "one\ntwo\n", ['From' => 'ann@origin.example']) or exit(1);
EOF
# shellcheck disable=SC2016 # it is for that shell
start_as_installed '
mkdir -p /etc/dma /var/spool/dma
chown root:mail /var/spool/dma
chmod 2775 /var/spool/dma
cp dma.conf /etc/dma
for mixed in 0 1; do
    rm -f mail-1
    echo mail.mixed_lf_and_crlf=$mixed:
    php -n -d sendmail_path="/usr/sbin/dma -D -t -i" -d mail.mixed_lf_and_crlf=$mixed send.php
    until [ -s mail-1 ]; do sleep 0.1; done
    python3 -c "import re
content = re.sub(rb\"(Date: |Message-Id: <)[^\r>]*\", rb\"\\1...\", open(\"mail-1\", \"rb\").read())
print(str(content[content.index(b\"To:\"):])[2:-1])"
done >seen'
wait "$server" || cannot "$(tail -5 log)"
compare
