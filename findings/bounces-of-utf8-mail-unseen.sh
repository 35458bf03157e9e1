#!/bin/bash
# Postfix 3.7.11 reports that a mail with SMTPUTF8 failed, and flufl.bounce 6.0.0 (of Mailman) finds no bounce in it.
#
# The report has the type message/global-delivery-status then (RFC 6533), as it may name addresses beyond ASCII. An 8-bit Subject is enough
# for that, also where all addresses are ASCII. flufl.bounce knows only message/delivery-status, Perl's Mail::DeliveryStatus::BounceParser
# (1.543) tells no address; so dead addresses stay on the list, and whoever sends to them loses reputation. Sisimai 4.25 reads all of them.
# Encode the words of headers (RFC 2047), and have bounces to addresses beyond ASCII read by something else.
#
#     failed: message/delivery-status
#       flufl.bounce 6.0.0: refused@one.example
#       BounceParser 1.543: bounce of refused@one.example
#       Sisimai 4.25.15: failed refused@one.example
#     failed-subject: message/global-delivery-status
#       flufl.bounce 6.0.0: nothing
#       BounceParser 1.543: bounce of nobody
#       Sisimai 4.25.15: failed refused@one.example
#     failed-utf8: message/global-delivery-status
#       flufl.bounce 6.0.0: nothing
#       BounceParser 1.543: bounce of nobody
#       Sisimai 4.25.15: failed refused@bücher.example

# shellcheck source-path=SCRIPTDIR source=postfix-reports.sh
. "$(dirname "$0")/postfix-reports.sh"

debian libsisimai-perl=4.25.15-1 libclass-accessor-lite-perl=0.08-3 libjson-perl=4.10000-1 libmailtools-perl=2.21-2 \
    libmail-deliverystatus-bounceparser-perl=1.543+repacked-1 libmime-tools-perl=5.510-1 libtimedate-perl=2.3300-2
obtain pip install --no-input --target python flufl.bounce==6.0.0

cat >reader.py <<'EOF'
import email, importlib.metadata, sys
sys.path.insert(0, "python")
from flufl.bounce import all_failures

with open(sys.argv[1], "rb") as file:
    temporary, permanent = all_failures(email.message_from_binary_file(file))
print(f"  flufl.bounce {importlib.metadata.version('flufl.bounce')}:", b" ".join(temporary | permanent).decode() or "nothing")
EOF
cat >reader.pl <<'EOF'
use Mail::DeliveryStatus::BounceParser;
use Sisimai;
my ($name) = @ARGV;
open(my $file, '<', $name);
my $bounce = Mail::DeliveryStatus::BounceParser->new($file);
my $addresses = join(' ', $bounce->addresses) || 'nobody';
print "  BounceParser $Mail::DeliveryStatus::BounceParser::VERSION: ", $bounce->is_bounce ? "bounce of $addresses" : 'nothing', "\n";
my $found = Sisimai->make($name) || [];
print '  Sisimai ', Sisimai->version, ': ', join(' ', map { $_->action . ' ' . $_->recipient->address } @$found) || 'nothing', "\n";
EOF
for name in failed failed-subject failed-utf8; do
    echo "$name: $(sed -n 's,^Content-Type: \(message/.*delivery-status\)$,\1,p' "$name")"
    { python3 reader.py "$name" && perl -I root/usr/share/perl5 reader.pl "$name"; } 2>error || cannot "$(cat error)"
done >seen
compare
