#!/bin/bash
# mailparser and postal-mime (npm) show a text file that was sent "inline" as a part of the text: there is no file.
#
# Content-Disposition: inline says only where it may be shown (RFC 2183, 2.1), and it has a file name here. These readers (helpdesks and
# webmail are built on them) add text/plain to the text, and an HTML file to the HTML, lose the name and list no attachment. With
# Python's email an inline HTML file stands in for the HTML of the mail in get_body(), and iter_attachments() leaves it out. Files of other
# types, text/csv too, stay. Some mail programs send all text files so; send files as "attachment".
#
#     mailparser 3.14.2
#       inline list.txt: no file; text: See the file. / content
#       inline list.csv: list.csv; text: See the file.
#       inline page.html: no file; text: See the file. / content
#       attachment list.txt: list.txt; text: See the file.
#     postal-mime 4.0.0
#       inline list.txt: no file; text: See the file. / content
#       inline list.csv: list.csv; text: See the file.
#       inline page.html: no file; text: See the file. / content
#       attachment list.txt: list.txt; text: See the file.
#     Python's email 3
#       inline list.txt: list.txt; text: See the file.
#       inline list.csv: list.csv; text: See the file.
#       inline page.html: no file; text: <p>content</p>
#       attachment list.txt: list.txt; text: See the file.
#     mail (Ruby) 2.7.1
#       inline list.txt: list.txt; text: See the file.
#       inline list.csv: list.csv; text: See the file.
#       inline page.html: page.html; text: See the file.
#       attachment list.txt: list.txt; text: See the file.

# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

for program in node npm ruby; do
    command -v "$program" >/dev/null || cannot "there is no $program"
done
debian ruby-mail=2.7.1+dfsg1-2 ruby-mini-mime=1.1.1-2
obtain npm install --no-audit --no-fund --prefix . mailparser@3.14.2 postal-mime@4.0.0

# mail DISPOSITION NAME TYPE CONTENT: writes a mail with that file
mail() {
    cat >"$1 $2" <<EOF
From: ann@origin.example
To: bob@one.example
Subject: a file
MIME-Version: 1.0
Content-Type: multipart/mixed; boundary="between"

--between
Content-Type: text/plain; charset="utf-8"

See the file.
--between
Content-Type: $3; charset="utf-8"
Content-Disposition: $1; filename="$2"

$4
--between--
EOF
    sed -i 's/$/\r/' "$1 $2"
    mails+=("$1 $2")
}
mails=()
mail inline list.txt text/plain content
mail inline list.csv text/csv content
mail inline page.html text/html '<p>content</p>'
mail attachment list.txt text/plain content

cat >read.mjs <<'EOF'
import {readFileSync} from 'node:fs';
import {simpleParser} from 'mailparser';
import PostalMime from 'postal-mime';

for (const [name, parse] of [['mailparser', simpleParser], ['postal-mime', PostalMime.parse]]) {
    console.log(name, JSON.parse(readFileSync(`node_modules/${name}/package.json`)).version);
    for (const mail of process.argv.slice(2)) {
        const {attachments, text} = await parse(readFileSync(mail));
        const lines = text.split('\n').filter(line => line).join(' / ');
        console.log(`  ${mail}: ${attachments.map(file => file.filename).join() || 'no file'}; text: ${lines}`);
    }
}
EOF
cat >read.py <<'EOF'
import email, email.policy, sys

print("Python's email 3")
for name in sys.argv[1:]:
    with open(name, "rb") as file:
        mail = email.message_from_binary_file(file, policy=email.policy.default)
    files = ",".join(part.get_filename() for part in mail.iter_attachments())
    print(f"  {name}: {files or 'no file'}; text: {mail.get_body(('html', 'plain')).get_content().strip()}")
EOF
cat >read.rb <<'EOF'
require "mail"
puts "mail (Ruby) #{Mail::VERSION.version}"
ARGV.each do |name|
  mail = Mail.new(File.binread(name))
  files = mail.attachments.map(&:filename).join(",")
  puts "  #{name}: #{files.empty? ? "no file" : files}; text: #{(mail.html_part || mail.text_part).decoded.strip}"
end
EOF
{ node read.mjs "${mails[@]}" && python3 read.py "${mails[@]}" && ruby -I root/usr/lib/ruby/vendor_ruby read.rb "${mails[@]}"; } \
    >seen 2>error || cannot "$(cat error)"
compare
