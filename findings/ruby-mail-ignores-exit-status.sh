#!/bin/bash
# Ruby's mail 2.7.1 (Debian 12; ActionMailer 6.1 sends by it) ignores the exit status of sendmail and exim.
#
# deliver! returns as if the mail were on its way, also where the program says 75 (EX_TEMPFAIL) or 78 (EX_CONFIG) and kept nothing:
# nobody learns that it is lost. A sendmail that cannot reach its server must keep the mail itself, in a spool; or the application
# sends by SMTP, which does raise.
#
#     mail 2.7.1
#     sendmail exits with 75: deliver! returned
#     exim exits with 78: deliver! returned
#     smtp to a closed port: Errno::ECONNREFUSED

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

command -v ruby >/dev/null || cannot "there is no ruby"
debian ruby-mail=2.7.1+dfsg1-2 ruby-mini-mime=1.1.1-2
for status in 75 78; do
    printf '#!/bin/sh\ncat >/dev/null\nexit %s\n' "$status" >"exits-$status"
    chmod +x "exits-$status"
done
port=$(free_port)

ruby -I root/usr/lib/ruby/vendor_ruby - "$port" >seen 2>&1 <<'EOF' || cannot "$(cat seen)"
require "mail"
puts "mail #{Mail::VERSION.version}"
mail = Mail.new(from: "ann@origin.example", to: "bob@one.example", subject: "lost", body: "text")
{
  "sendmail exits with 75" => [:sendmail, {location: "./exits-75"}],
  "exim exits with 78" => [:exim, {location: "./exits-78"}],
  "smtp to a closed port" => [:smtp, {address: "127.0.0.1", port: ARGV[0].to_i}],
}.each do |what, (method, settings)|
  mail.delivery_method method, settings
  begin
    mail.deliver!
    puts "#{what}: deliver! returned"
  rescue StandardError => error
    puts "#{what}: #{error.class}"
  end
end
EOF
compare
