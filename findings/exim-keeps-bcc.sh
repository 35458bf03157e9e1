#!/bin/bash
# Exim 4.96 (Debian 12, as sendmail) leaves Bcc in the mail when the recipients are arguments: everybody reads who else has it.
#
# Only with -t does it take the field out. Postfix 3.7 and dma 0.13 always do, so a program that was tried with one of these, names the
# recipients on the command line and leaves Bcc to the sendmail, betrays it here. Take the field out before.
#
#     sendmail -t:
#     C: RCPT TO:<bob@one.example>
#     C: RCPT TO:<carol@one.example>
#     To: bob@one.example
#     sendmail bob@one.example carol@one.example:
#     C: RCPT TO:<bob@one.example>
#     C: RCPT TO:<carol@one.example>
#     To: bob@one.example
#     Bcc: carol@one.example

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian exim4-daemon-light=4.96-15+deb12u11 exim4-base=4.96-15+deb12u11
sink PIPELINING
trap 'kill "$sink"; cleaned_up' EXIT
sink=$server
printf 'To: bob@one.example\nBcc: carol@one.example\nSubject: hello\n\ntext\n' >mail
exim_conf "$port" >exim.conf
# shellcheck disable=SC2016 # it is for that shell
start_as_installed '
user Debian-exim 64001
mkdir -p /run/exim
chown Debian-exim:Debian-exim /run/exim
cp exim.conf /etc
chmod 0644 /etc/exim.conf
try() {
    rm -f commands mail-1
    echo "sendmail $*:"
    exim4 -C /etc/exim.conf -odf -i -f ann@origin.example "$@" <mail
    grep RCPT commands
    sed -n "s/\r$//; /^To:/p; /^Bcc:/p" mail-1
}
{ try -t; try bob@one.example carol@one.example; } >seen'
wait "$server" || cannot "$(tail -5 log)"
compare
