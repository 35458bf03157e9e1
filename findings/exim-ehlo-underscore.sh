#!/bin/bash
# Exim 4.96 (Debian 12, default settings) answers 501 to an EHLO name with an underscore.
#
# By RFC 5321 (4.1.2) it may, but names of containers have underscores; chasquid, Courier, Haraka, OpenSMTPD and Sendmail take
# them. A program that greets with the name of its machine can send nothing here. The 501 is about the name, not about a
# message: greet with another name or the address in brackets. In Exim `helo_allow_chars = _` allows it.
#
#     C: EHLO web_1.example
#     S: 501 Syntactically invalid EHLO argument(s)
#     C: MAIL FROM:<ann@origin.example>
#     S: 503 HELO or EHLO required
#     C: HELO [127.0.0.1]
#     S: 250 exim.example Hello [127.0.0.1] [127.0.0.1]

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

debian exim4-base=4.96-15+deb12u11 exim4-daemon-light=4.96-15+deb12u11
port=$(free_port)
cat >exim.conf <<EOF
primary_hostname = exim.example
local_interfaces = 127.0.0.1
daemon_smtp_ports = $port
tls_advertise_hosts =
rfc1413_hosts =
host_lookup =
EOF
start_as_installed "
user Debian-exim 64001
mkdir -p /var/spool/exim4 /var/log/exim4; chown Debian-exim /var/spool/exim4 /var/log/exim4
exec /usr/sbin/exim4 -C $dir/exim.conf -bdf"

client "$port" <<'EOF'
say("EHLO web_1.example")
say("MAIL FROM:<ann@origin.example>")
say("HELO [127.0.0.1]")
EOF
