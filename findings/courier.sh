# shellcheck shell=bash
# Starts Courier 1.0.16 (Debian 12) with its default settings: what comes from loopback stays in its queue.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian courier-mta=1.0.16-3+b6 courier-base=1.0.16-3+b6 courier-authlib=0.71.4-1+b2 courier-authdaemon=0.71.4-1+b2 \
    libcourier-unicode4=2.1.2-2+b2 libgdbm6=1.23-3 libidn12=1.41-1 libltdl7=2.4.7-7~deb12u1
port=$(free_port)
mkdir queue
start_as_installed "
user courier 64001
mkdir -p /run/courier
mount --bind queue /var/lib/courier
cd /var/lib/courier; mkdir -p allfilters filters msgq msgs track tmp; chmod 750 *; chmod 770 tmp
chown -R courier:courier /run/courier /var/lib/courier /etc/courier
cd /etc/courier
echo courier.example > me
sed -i 's/^BOFHCHECKDNS=.*/BOFHCHECKDNS=0/' esmtpd
ln -sf /usr/lib/courier/makedat /usr/bin/makedat
makeacceptmailfor; makealiases; makesmtpaccess
prefix=/usr exec_prefix=/usr sysconfdir=/etc/courier sbindir=/usr/sbin
set -a; . /etc/courier/esmtpd
/usr/sbin/couriertcpd -address=127.0.0.1 -access=/etc/courier/smtpaccess.dat -pid=/run/courier/esmtpd.pid -noidentlookup \
    -nodnslookup -user=courier -group=courier $port /usr/lib/courier/courier/modules/esmtp/courieresmtpd
exec sleep infinity"
