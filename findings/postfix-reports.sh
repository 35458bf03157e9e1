# shellcheck shell=bash
# Lets Postfix 3.7.11 (Debian 12) write the delivery status notifications (RFC 3464) that it sends to ann@origin.example into these
# files: relayed, delayed, failed (all as asked for by the sender), failed-utf8 (to an address beyond ASCII) and failed-subject (to an
# ASCII address, with a Subject beyond ASCII).
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian postfix=3.7.11-0+deb12u1
mkdir -p root/var/lib/postfix
sink 8BITMIME SMTPUTF8
trap 'kill "$sink"; cleaned_up' EXIT
sink=$server
printf 'From: ann@origin.example\nSubject: hello\n\ntext\n' >mail
printf 'From: ann@origin.example\nSubject: Grüße\n\ntext\n' >mail8
postfix_conf "$port" 'delay_warning_time = 1s' 'transport_maps = inline:{ { late.example = smtp:[127.0.0.1]:1 } }' \
    'queue_run_delay = 1s' 'minimal_backoff_time = 1s' >main.cf
# shellcheck disable=SC2016 # it is for that shell
start_as_installed '
install_postfix
# reported NAME: keeps the report that comes, under that name
reported() {
    until report=$(grep -l "^Content-Type: multipart/report" mail-*) && grep -q "^--.*--" "$report"; do sleep 0.1; done 2>/dev/null
    sed "s/\r$//" "$report" >"$1"
    rm mail-*
}
sendmail -i -N success -f ann@origin.example bob@one.example <mail; reported relayed
sendmail -i -N delay -f ann@origin.example bob@late.example <mail; reported delayed
sendmail -i -f ann@origin.example refused@one.example <mail; reported failed
sendmail -i -f ann@origin.example refused@bücher.example <mail; reported failed-utf8
sendmail -i -f ann@origin.example refused@one.example <mail8; reported failed-subject'
timeout 60 tail --pid="$server" -f /dev/null || cannot "$(tail -5 log)"
