#!/bin/bash
# curl 7.88.1 (Debian 12) greets the mail server with the name of the file that it sends, and leaves its line ends as they are.
#
# What curl says in EHLO is the path of the URL, and to a URL without one -T adds the name of the file, as for FTP. A server that checks
# that name refuses it, or counts it as spam. A text file of Unix has LF at the end of lines, and only CRLF is one in SMTP (RFC 5321,
# 2.3.8): Haraka 3.3 and Sendmail 8.17 refuse a bare LF, others repair it, and a DKIM signature is made of something else then. So write
# the path, and --crlf:
#
#     curl smtp://HOST -T report.txt:
#     C: EHLO report.txt
#     From: ann@origin.example\nSubject: report\n\nall is well\n\r\n
#     curl smtp://HOST/mail.origin.example --crlf -T report.txt:
#     C: EHLO mail.origin.example
#     From: ann@origin.example\r\nSubject: report\r\n\r\nall is well\r\n

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

command -v curl >/dev/null || cannot "there is no curl"
debian curl=7.88.1-10+deb12u15 libcurl4=7.88.1-10+deb12u15
printf 'From: ann@origin.example\nSubject: report\n\nall is well\n' >report.txt

# send WORD ...: calls curl so, and shows the greeting and the bytes that came
send() {
    echo "curl ${*/127.0.0.1:"$port"/HOST}:"
    rm -f commands mail-1
    LD_LIBRARY_PATH=$(echo root/usr/lib/*/) root/usr/bin/curl --silent --show-error --mail-from ann@origin.example \
        --mail-rcpt bob@one.example "$@" >error 2>&1 || cannot "$(cat error)"
    grep EHLO commands
    python3 -c 'print(str(open("mail-1", "rb").read())[2:-1])'
}

sink ENHANCEDSTATUSCODES
{
    send "smtp://127.0.0.1:$port" -T report.txt
    send "smtp://127.0.0.1:$port/mail.origin.example" --crlf -T report.txt
} >seen
compare
