#!/bin/bash
# email-bounce-parser 1.0.22 and baunsu 0.2.3 (npm) take a report of success for a bounce, and one of a delay, too.
#
# Who asks for it (DSN, RFC 3461: NOTIFY=SUCCESS) hears that a mail was delivered or relayed, by the same kind of report as of a failure; only
# "Action" tells them apart (RFC 3464, 2.3.3), and Postfix reports delays by it, also unasked where delay_warning_time is set. With
# these readers a list loses the addresses that work. email-bounce-parser has "permanent", which is right here; Sisimai 4.25 gives delays
# the reason "expired", as it does to mail that was given up: look at its "action". flufl.bounce 6.0.0 makes the difference.
#
#     relayed
#       email-bounce-parser 1.0.22: bounce of bob@one.example, permanent: false
#       baunsu 0.2.3: bounce
#       Sisimai 4.25.15: nothing
#       flufl.bounce 6.0.0: nothing
#     delayed
#       email-bounce-parser 1.0.22: bounce of bob@late.example, permanent: false
#       baunsu 0.2.3: bounce
#       Sisimai 4.25.15: expired bob@late.example, action delayed
#       flufl.bounce 6.0.0: temporary bob@late.example
#     failed
#       email-bounce-parser 1.0.22: bounce of refused@one.example, permanent: true
#       baunsu 0.2.3: bounce
#       Sisimai 4.25.15: userunknown refused@one.example, action failed
#       flufl.bounce 6.0.0: permanent refused@one.example

# shellcheck source-path=SCRIPTDIR source=postfix-reports.sh
. "$(dirname "$0")/postfix-reports.sh"

debian libsisimai-perl=4.25.15-1 libclass-accessor-lite-perl=0.08-3 libjson-perl=4.10000-1
obtain pip install --no-input --target python flufl.bounce==6.0.0
obtain npm install --no-audit --no-fund --ignore-scripts --prefix . email-bounce-parser@1.0.22 baunsu@0.2.3 mailparser@3.14.2
# re2, which email-bounce-parser uses, would have to be compiled for minutes: RegExp with those methods of it
cat >node_modules/re2/re2.js <<'EOF'
module.exports = class extends RegExp {
    match(text) { return text.match(this); }
    replace(text, by) { return text.replace(this, by); }
    split(text) { return text.split(this); }
};
EOF
cat >reader.js <<'EOF'
const [Baunsu, BounceParser, {simpleParser}] = ['baunsu', 'email-bounce-parser', 'mailparser'].map(require);
const says = (name, words) => console.log(`  ${name} ${require(`${name}/package.json`).version}: ${words}`);
const report = require('fs').readFileSync(process.argv[2]);
simpleParser(report).then(({text}) => {
    const {bounce, data} = new BounceParser().read(text);
    const found = bounce && `bounce of ${data.recipient}, permanent: ${data.error.permanent}`;
    says('email-bounce-parser', found || 'nothing');
    const baunsu = new Baunsu();
    baunsu.on('end', (error, {bounced}) => says('baunsu', bounced ? 'bounce' : 'nothing'));
    baunsu.detect(report);
});
EOF
cat >reader.pl <<'EOF'
use Sisimai;
my $found = Sisimai->make($ARGV[0]) || [];
my @told = map { $_->reason . ' ' . $_->recipient->address . ', action ' . $_->action } @$found;
print '  Sisimai ', Sisimai->version, ': ', join('; ', @told) || 'nothing', "\n";
EOF
cat >reader.py <<'EOF'
import email, importlib.metadata, sys
sys.path.insert(0, "python")
from flufl.bounce import all_failures

with open(sys.argv[1], "rb") as file:
    found = dict(zip(("temporary", "permanent"), all_failures(email.message_from_binary_file(file))))
told = [f"{kind} {address.decode()}" for kind, addresses in found.items() for address in addresses]
print(f"  flufl.bounce {importlib.metadata.version('flufl.bounce')}:", *told or ["nothing"])
EOF
for name in relayed delayed failed; do
    echo "$name"
    { node reader.js "$name" && perl -I root/usr/share/perl5 reader.pl "$name" && python3 reader.py "$name"; } 2>error ||
        cannot "$(cat error)"
done >seen
compare
