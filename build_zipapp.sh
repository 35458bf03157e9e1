#!/usr/bin/env bash
# Builds mailproxy.pyz: mailproxy.py and both packages it needs, in one file that any Python from 3.11 on runs.
#
#     ./build_zipapp.sh [OUTPUT]        (default: mailproxy.pyz beside this script)
#
# Needs bash and Python 3.11 or newer with pip ($PYTHON names another than python3). The same sources give
# the same bytes with the same Python: fixed times, order and modes, nothing compressed, nothing that names this machine.
set -euo pipefail

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
output=${1:-$here/mailproxy.pyz}
python=${PYTHON:-python3}

fail() {
    printf 'build_zipapp.sh: %s\n' "$1" >&2
    exit 1
}

[[ ! -e $output || -f $output ]] || fail "$output is there and is no file: name another one"
command -v "$python" >/dev/null || fail "$python is not there: install Python 3.11 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$python is older than 3.11"
"$python" -m pip --version >/dev/null 2>&1 || fail "$python has no pip (on Debian: apt-get install python3-pip)"

work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT

# What goes inside, to the byte. This is the only place that pins it.
cat >"$work/requirements.txt" <<'PINS'
aiosmtplib==5.1.3 \
    --hash=sha256:f7d76ce3d4995a65a178c1f11e1bd1607706b921d00cb768e7a2c7f7ef5517a8
prometheus-client==0.26.0 \
    --hash=sha256:fa93d06737aa02bacd05794768508bb97d2fbee28cb3bca04eaae92f0ca953d6
PINS

PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps --only-binary :all: \
    --no-compile --target "$work/tree" --requirement "$work/requirements.txt"
cp -- "$here/mailproxy.py" "$here/LICENSE" "$work/tree/"

# The stdlib's own entry point (zipapp -m) would drop the exit status.
cat >"$work/tree/__main__.py" <<'MAIN'
import os
import signal
import sys

if callable(signal.getsignal(signal.SIGINT)):  # Ctrl-C while it starts: no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

if sys.version_info < (3, 11):  # the environment of whoever calls sendmail; the system may have a newer one
    system = "/usr/bin/python3"
    if os.path.exists(system) and os.path.realpath(system) != os.path.realpath(sys.executable):
        os.execv(system, [system, "-I"] + sys.argv)
    sys.exit("mailproxy needs Python 3.11 or newer; this is " + sys.version.split()[0])

import mailproxy

sys.exit(mailproxy.main())
MAIN

"$python" -I -B - "$work/tree" "$work/mailproxy.pyz" <<'PACK'
"""Write the tree into a zip file whose bytes depend on its contents and the version of Python alone."""

import importlib.util
import marshal
import sys
import zipfile
from pathlib import Path

LEFT_OUT = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}  # pip's notes about this very installation


def bytecode(name: str, source: bytes) -> bytes:
    """The .pyc of this Python, never checked against its source (PEP 552): starting takes half the time.

    Other Pythons ignore it and compile the source beside it. Marshal's version 2 has no back references,
    which depend on what else this process has in memory. Constant slices (Python 3.14) need version 5; there
    a second writing of what was read back refers back only to what stands in the file.
    """
    code = compile(source, f"mailproxy.pyz/{name}", "exec", dont_inherit=True, optimize=0)
    unchecked = (0b01).to_bytes(4, "little")
    if sys.version_info < (3, 14):
        written = marshal.dumps(code, 2)
    else:
        written = marshal.dumps(marshal.loads(marshal.dumps(code, 5)), 5)
    return importlib.util.MAGIC_NUMBER + unchecked + importlib.util.source_hash(source) + written


def contents(tree: Path) -> dict[str, bytes]:
    """Every file by its name in the archive, each source with its bytecode beside it."""
    files = {}
    for path in tree.rglob("*"):
        name = path.relative_to(tree).as_posix()
        if not path.is_file() or path.name in LEFT_OUT or "__pycache__" in path.parts or name.startswith("bin/"):
            continue
        files[name] = path.read_bytes()
        if path.suffix == ".py" and name != "__main__.py":
            files[name + "c"] = bytecode(name, files[name])
    return files


def entry(name: str) -> zipfile.ZipInfo:
    """A directory entry that says the same on every machine."""
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system = 3  # Unix
    info.external_attr = 0o100644 << 16
    return info


tree, target = map(Path, sys.argv[1:])
with target.open("wb") as archive:
    archive.write(b"#!/usr/bin/env python3\n")
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as pyz:
        for name, content in sorted(contents(tree).items()):
            pyz.writestr(entry(name), content)
PACK

chmod 0755 "$work/mailproxy.pyz"
mv -f -- "$work/mailproxy.pyz" "$output"
