#!/bin/bash
# sendmail -t with recipients on the command line too: Exim 4.96 takes them off the list, Postfix 3.7 and dma 0.13 add them.
#
# Exim does as some manuals of old say: who stands on the command line gets no copy, even when the header names him. A script that was
# written where another sendmail is (an archive address behind -t, say) loses those recipients there, with exit status 0 and not
# a word in the log. (`extract_addresses_remove_arguments = false` in Exim's configuration makes it add them.) Give all recipients as
# arguments and leave -t away, or name all in the header (Bcc, for who is not to be seen).
#
#     To: bob@one.example, carol@one.example; sendmail -t carol@one.example dan@one.example
#     Exim: bob
#     Postfix: bob carol dan
#     dma: bob carol dan

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian exim4-daemon-light=4.96-15+deb12u11 exim4-base=4.96-15+deb12u11 dma=0.13-1+b1
rm root/usr/sbin/sendmail
debian postfix=3.7.11-0+deb12u1
mkdir -p root/var/lib/postfix
sink ENHANCEDSTATUSCODES
trap 'kill "$sink"; cleaned_up' EXIT
sink=$server
printf 'To: bob@one.example, carol@one.example\nSubject: hello\n\ntext\n' >mail
exim_conf "$port" >exim.conf
postfix_conf "$port" >main.cf
printf 'SMARTHOST 127.0.0.1\nPORT %s\nMAILNAME origin.example\n' "$port" >dma.conf
# shellcheck disable=SC2016 # it is for that shell
start_as_installed '
user Debian-exim 64001
mkdir -p /run/exim /etc/dma /var/spool/dma
chown Debian-exim:Debian-exim /run/exim
chown root:mail /var/spool/dma
chmod 2775 /var/spool/dma
cp exim.conf /etc; cp dma.conf /etc/dma
chmod 0644 /etc/exim.conf

try() {
    program=$1; shift
    rm -f commands
    "$@" -i -f ann@origin.example -t carol@one.example dan@one.example <mail
    until grep -q QUIT commands; do sleep 0.1; done
    sleep 1 # dma has a connection for each
    echo "$program:" $(sed -n "s/C: RCPT TO:<\(.*\)@.*/\1/p" commands | sort) >>seen
}
try Exim exim4 -C /etc/exim.conf -odf
install_postfix
try Postfix sendmail
try dma dma -D'
echo 'To: bob@one.example, carol@one.example; sendmail -t carol@one.example dan@one.example' >seen
for _ in $(seq 300); do
    kill -0 "$server" 2>/dev/null || break
    sleep 0.1
done
[ "$(wc -l <seen)" = 4 ] || cannot "$(tail -5 log)"
compare
