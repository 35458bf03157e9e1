#!/bin/bash
# Cyrus 3.6.1 (Debian 12, default settings) says 250 to a mail whose Message-ID and Date it has had, and throws it away.
#
# It does not look at the rest: a mail that was made once and is sent again with another text (a reminder, a correction, a file that was
# forgotten, all from one template) is gone, and neither its sender nor its reader can know. RFC 5322 (3.6.4) lets a Message-ID stand
# for one version of one mail only. Make another for each; keep both as they are only where the same mail is repeated, in doubt whether it
# arrived: then this server is what makes one of two. (`duplicatesuppression: no` in imapd.conf ends it.)
#
#     Message-ID: <one@origin.example>, Date: 1 Jun 2026, Subject: the meeting
#     S: 250 2.1.5 Success
#     Message-ID: <one@origin.example>, Date: 1 Jun 2026, Subject: the meeting is off
#     S: 250 2.1.5 Success
#     Message-ID: <two@origin.example>, Date: 1 Jun 2026, Subject: with another Message-ID
#     S: 250 2.1.5 Success
#     Message-ID: <one@origin.example>, Date: 2 Jun 2026, Subject: on another day
#     S: 250 2.1.5 Success
#     in the mailbox: the meeting; with another Message-ID; on another day

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian cyrus-imapd=3.6.1-4+deb12u5 cyrus-common=3.6.1-4+deb12u5 libical3=3.0.16-1+b1 libpcre3=2:8.39-15 \
    libwrap0=7.6.q-32 libxapian30=1.4.22-1
mv root/lib/x86_64-linux-gnu/* root/usr/lib/x86_64-linux-gnu
mkdir -p root/var/lib mailboxes
port=$(free_port)
printf '%s\n' 'configdirectory: /var/lib/cyrus' 'partition-default: /var/lib/mailboxes' 'defaultpartition: default' \
    'servername: cyrus.example' 'autocreate_quota: 0' 'autocreate_post: yes' >imapd.conf
printf '%s\n' 'START {' 'recover cmd="/usr/sbin/cyrus ctl_cyrusdb -r"' '}' \
    'SERVICES {' "lmtp cmd=\"lmtpd -a\" listen=\"127.0.0.1:$port\" proto=tcp4" '}' >cyrus.conf
start_as_installed "
user cyrus 64001
mkdir -p /var/lib/cyrus/{db,log,msg,proc,quota,sieve,socket,user} /run/cyrus/{lock,proc,socket} /var/lib/mailboxes
mount --bind mailboxes /var/lib/mailboxes
chown -R cyrus:cyrus /run/cyrus /var/lib/cyrus /var/lib/mailboxes
cp cyrus.conf imapd.conf /etc
exec /usr/lib/cyrus/bin/master -D"

client "$port" <<'EOF'
import pathlib

smtp.docmd("LHLO client.example")
for name, date, subject in (
    ("one", "1 Jun 2026", "the meeting"),
    ("one", "1 Jun 2026", "the meeting is off"),
    ("two", "1 Jun 2026", "with another Message-ID"),
    ("one", "2 Jun 2026", "on another day"),
):
    for command in "MAIL FROM:<ann@origin.example>", "RCPT TO:<bob@one.example>", "DATA":
        smtp.docmd(command)
    fields = f"Message-ID: <{name}@origin.example>", f"Date: {date} 10:00:00 +0000", f"Subject: {subject}", "From: ann@origin.example"
    smtp.send("".join(f"{line}\r\n" for line in (*fields, "", "text", ".")))
    print(", ".join(fields[:3]).replace(" 10:00:00 +0000", ""))
    code, reply = smtp.getreply()
    heard(code, reply.partition(b" SESSIONID")[0])
kept = [path.read_text() for path in sorted(pathlib.Path("mailboxes").rglob("[0-9]*."))]
print("in the mailbox:", "; ".join(line.partition(" ")[2] for mail in kept for line in mail.splitlines() if line.startswith("Subject:")))
EOF
