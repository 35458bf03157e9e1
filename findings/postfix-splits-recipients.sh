#!/bin/bash
# Postfix 3.7.11 (Debian 12, default settings) makes two mails of one to 51 recipients, with the same Message-ID.
#
# default_destination_recipient_limit is 50: the first 50 go in one transaction, the rest in another, to a relay too, whatever number of
# recipients that one takes. What stands behind Postfix and knows a mail by its Message-ID (to drop what comes twice, to count, to archive)
# must not take the second for a repetition: compare the envelope as well. For one transaction set smtp_destination_recipient_limit.
# (Here the two go one after the other, to be told apart; by default at the same time.)
#
#     transaction 1: 50 recipients, Message-ID <one@origin.example>
#     transaction 2: 1 recipients, Message-ID <one@origin.example>

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian postfix=3.7.11-0+deb12u1
mkdir -p root/var/lib/postfix
sink PIPELINING
trap 'kill "$sink"; cleaned_up' EXIT
sink=$server
printf 'From: ann@origin.example\nSubject: hello\nMessage-ID: <one@origin.example>\n\ntext\n' >mail
postfix_conf "$port" 'smtp_destination_concurrency_limit = 1' >main.cf
# shellcheck disable=SC2016 # it is for that shell
start_as_installed '
install_postfix
sendmail -i -f ann@origin.example $(seq --format "user%g@one.example" 51) <mail
until [ -s mail-1 ] && [ -s mail-2 ]; do sleep 0.1; done'
timeout 60 tail --pid="$server" -f /dev/null || cannot "$(tail -5 log)"

python3 - >seen <<'EOF'
import pathlib

counts = sorted((said.count("RCPT") for said in pathlib.Path("commands").read_text().split("MAIL FROM")[1:]), reverse=True)
for number, count in enumerate(counts, 1):
    (name,) = [line for line in pathlib.Path(f"mail-{number}").read_text().splitlines() if line.startswith("Message-ID")]
    print(f"transaction {number}: {count} recipients,", name.replace(":", ""))
EOF
compare
