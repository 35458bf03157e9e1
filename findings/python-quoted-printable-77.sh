#!/bin/bash
# Python's binascii.b2a_qp(), and with it quopri, writes lines of quoted-printable with 77 and 78 characters.
#
# RFC 2045 (6.7, rule 5) allows 76. It counts a blank at the end of a line as one character and then writes =20 for it. A gateway that
# holds senders to the rule encodes such a part anew, and a DKIM signature made before is wrong. The email package has an encoder of
# its own, which is right; take that, or strip blanks from the ends of lines first.
#
#     a line of 73 letters and a blank: at most 76 characters
#     a line of 74 letters and a blank: at most 77 characters
#     a line of 75 letters and a blank: at most 78 characters
#     the same by email.quoprimime: at most 76 characters

# Seen with Python 3.11.2 to 3.13.0.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

cat >lengths.py <<'EOF'
import email.quoprimime, quopri

def longest(encoded):
    return f"at most {max(map(len, encoded.splitlines()))} characters"

for letters in 73, 74, 75:
    text = b"x" * letters + b" \nend\n"
    assert quopri.decodestring(quopri.encodestring(text)) == text
    print(f"a line of {letters} letters and a blank:", longest(quopri.encodestring(text)))
print("the same by email.quoprimime:", longest(email.quoprimime.body_encode(text.decode())))
EOF
python3 lengths.py >seen 2>&1 || cannot "$(cat seen)"
compare
