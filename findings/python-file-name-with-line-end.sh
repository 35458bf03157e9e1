#!/bin/bash
# Python's email reads a long file name with a line end in it, also one that it wrote itself.
#
# A file name of more than a line's length may be folded within its quotes (RFC 5322, 2.2.3), and many programs fold it there. With
# message_from_bytes() as it is used most, without a policy, get_filename() gives the name with the line end: no such file can be saved
# on some systems, and the name in a reply, a ticket or a link is another one. Read with policy=email.policy.default.
#
#     written:           filename="figures of the third quarter,\n as they were reported by the branches.pdf"
#     read:              'figures of the third quarter,\n as they were reported by the branches.pdf'
#     read, CRLF:        'figures of the third quarter,\r\n as they were reported by the branches.pdf'
#     by policy.default: 'figures of the third quarter, as they were reported by the branches.pdf'

# Seen with Python 3.11.2 to 3.13.0.
# shellcheck source-path=SCRIPTDIR source=lib.sh
. "$(dirname "$0")/lib.sh"

cat >names.py <<'EOF'
import email, email.policy
from email.mime.application import MIMEApplication

part = MIMEApplication(b"content")
name = "figures of the third quarter, as they were reported by the branches.pdf"
part.add_header("Content-Disposition", "attachment", filename=name)
written = part.as_bytes()
folded = written[written.index(b"filename=") :].partition(b".pdf")
print("written:          ", repr((folded[0] + b'.pdf"').decode())[1:-1])
print("read:             ", repr(email.message_from_bytes(written).get_filename()))
on_the_wire = written.replace(b"\n", b"\r\n")
print("read, CRLF:       ", repr(email.message_from_bytes(on_the_wire).get_filename()))
print("by policy.default:", repr(email.message_from_bytes(on_the_wire, policy=email.policy.default).get_filename()))
EOF
python3 names.py >seen 2>&1 || cannot "$(cat seen)"
compare
