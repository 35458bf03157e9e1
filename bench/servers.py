"""200 mixed messages over four connections through every real SMTP server that this machine can get.

    python3 bench/servers.py [--messages N] [--folder FOLDER] [SERVER ...]

What arrived is compared byte for byte with what was composed (or given as `raw`), after the trace fields that the
server put before it are taken away. Debian's servers are downloaded and unpacked into FOLDER, never installed (they
would remove each other); those of npm and PyPI are installed there. All run from there, by configuration files of
their own, on loopback; those that cannot do without root are skipped without it. A postfix is used as installed.

Prints a table: server, version, messages, identical, duplicates, time. What cannot be obtained is a row that says so. Exit 1
when a message is lost, doubled or changed, but where the server is known to do that (its `own`).
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import email
import email.policy
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import rig

CONNECTIONS = 4
PATIENCE_S = 120.0
TRACE = b"""return-path received delivered-to x-original-to envelope-to delivery-date authentication-results received-spf
x-envelope-from""".split()


class CannotBeObtained(Exception):
    """Why a server is not there; a row of the table."""


# -- the messages


class Case(NamedTuple):
    """A message to submit; `given`: what must arrive, where the client composed it."""

    kind: str
    submission: dict[str, Any]
    given: bytes | None = None

    @property
    def recipients(self) -> set[str]:
        asked = self.submission
        return {address for name in ("to", "cc", "bcc") for address in asked.get(name, ())}


def cases(count: int) -> dict[str, Case]:
    """By id; the kinds in turn."""
    made = [KINDS[n % len(KINDS)](n) for n in range(count)]
    return {case.submission["id"]: case for case in made}


def composed(kind: str, n: int, **fields: Any) -> Case:
    asked = {
        "id": f"case-{n}", "from": "sender@origin.example", "to": ["ann@one.example"], "subject": f"{kind} {n}",
        "message_id": f"case-{n}@origin.example", "headers": {"X-Case": f"case-{n}"}, **fields,
    }  # fmt: skip
    return Case(kind, asked)


def raw(kind: str, n: int, head: bytes, body: bytes) -> Case:
    """CRLF line ends and a complete header: such a message goes out byte for byte."""
    first = f"Date: Mon, 1 Jun 2026 10:00:00 +0200\r\nMessage-ID: <raw-{n}@origin.example>\r\nX-Case: case-{n}\r\n"
    given = first.encode() + head + b"From: sender@origin.example\r\nTo: ann@one.example\r\n\r\n" + body
    fields = {"from": "sender@origin.example", "to": ["ann@one.example"], "raw": base64.b64encode(given).decode()}
    return Case(kind, {"id": f"case-{n}", **fields}, given if given.endswith(b"\r\n") else given + b"\r\n")


def plain(n: int) -> Case:
    return composed("plain", n, body="Hello,\n\n  this is plain text.   \n\ttabs\t\n-- \nsigned\n")


def html_and_text(n: int) -> Case:
    return composed("html and text", n, text=f"plain {n} ü\n", html=f"<p>Größe <b>{n}</b></p>\n<pre>.\n</pre>\n")


def utf8_headers(n: int) -> Case:
    subject = f"Größenänderungsgenehmigungsverfahrensübersicht, 請求書 🧾, и ваш заказ {n}, über mehrere Zeilen"
    sender = {"from": "Zoë Müller <sender@origin.example>"}
    return composed("UTF-8 headers", n, **sender, subject=subject, body="ü\n")


def attachment(n: int) -> Case:
    content = random.Random(n).randbytes(1_000_000 if n % 50 == 3 else 20_000)
    one = {"filename": f"Überblick {n}.bin", "content": base64.b64encode(content).decode()}
    return composed("attachment", n, body="See the file.\n", attachments=[one])


def dots(n: int) -> Case:
    return composed("dots", n, body=".\n..\n.leading\n\n.\nend\n.\n")


def long_lines(n: int) -> Case:
    return composed("long lines", n, body="x" * 2_000 + "\n" + "words " * 2_000 + "\n")


def limit_lines(n: int) -> Case:
    return composed("lines at the limit", n, body="".join("x" * length + "\n" for length in range(985, 985 + n % 15)))


def empty(n: int) -> Case:
    return composed("empty", n, subject="", body="")


def several(n: int) -> Case:
    people = {"to": ["ann@one.example", "bob@two.example"], "cc": ["carl@one.example"], "bcc": ["dora@two.example"]}
    return composed("several recipients", n, body="to you all\n", **people)


def raw_odd(n: int) -> Case:
    head = b"Subject: folded\r\n  and folded\r\n\t again  \r\nX-Empty:\r\nReceived: from here by there; today\r\n"
    return raw("raw, odd", n, head, b".\r\n..x\r\n\r\ntrailing   \r\n.\r\n" + b"no line end" * (n % 2))


def raw_8bit(n: int) -> Case:
    head = b"Subject: 8bit\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n"
    head += b"Content-Transfer-Encoding: 8bit\r\n"
    return raw("raw, 8-bit", n, head, "Grüße 日本語\r\n".encode() + bytes(range(0xA0, 0x100)) + b"\r\n")


def raw_utf8_header(n: int) -> Case:
    head = f"Subject: Grüße {n}\r\nMIME-Version: 1.0\r\nContent-Type: text/plain; charset=utf-8\r\n"
    return raw("raw, UTF-8 header", n, head.encode(), b"text\r\n")


def raw_long_line(n: int) -> Case:
    return raw("raw, long line", n, b"Subject: long\r\n", b"x" * 5_000 + b"\r\nend\r\n")


KINDS = [
    plain, html_and_text, utf8_headers, attachment, dots, long_lines, limit_lines, empty, several,
    raw_odd, raw_8bit, raw_utf8_header, raw_long_line,
]  # fmt: skip


# -- what arrived


class Copy(NamedTuple):
    """What one delivery of the server brought, for one recipient or several."""

    recipients: list[str]
    content: bytes

    @property
    def id(self) -> str:
        found = re.search(rb"^X-Case: (\S+)", self.content, re.MULTILINE)
        return found[1].decode() if found else "?"


def without_trace(arrived: bytes, expected: bytes) -> bytes:
    """What is left when whole trace fields are taken from the front, as few as it takes to get at what was sent."""
    arrived = re.sub(rb"\r?\n", b"\r\n", arrived)
    start = len(arrived) - len(expected)
    if start > 0 and arrived.endswith(expected):
        fields = re.split(rb"\r\n(?![ \t])", arrived[:start])
        if all(field.partition(b":")[0].lower() in TRACE for field in fields[:-1]) and not fields[-1]:
            return expected
    while (found := re.match(rb"([^:\s]+):.*\r\n(?:[ \t].*\r\n)*", arrived)) and found[1].lower() in TRACE:
        arrived = arrived[found.end() :]
    return arrived


def difference(sent: bytes, arrived: bytes) -> str:
    """The first line that is not the same, in both."""
    ours, theirs = sent.split(b"\r\n"), arrived.split(b"\r\n")
    at = next((n for n, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other), None)
    if at is None:
        return f"{len(ours)} lines sent, {len(theirs)} arrived"
    return f"line {at + 1}: sent {_short(ours[at])}, arrived {_short(theirs[at])}"


def _short(line: bytes) -> str:
    words = re.sub(r"\d+", "N", repr(line[:60])[1:])
    return f"{words} of {len(line)}" if len(line) > 60 else words


def reads_as_asked(content: bytes, asked: Mapping[str, Any]) -> bool:
    """What a reader's program makes of it: subject, texts and files as they were submitted."""
    message = email.message_from_bytes(content, policy=email.policy.default)
    texts = {"plain": asked.get("body", asked.get("text")), "html": asked.get("html")}
    for kind, text in texts.items():
        part = message.get_body((kind,))
        got = part.get_content().replace("\r\n", "\n") if part else None
        if text is not None and got not in (text, text + "\n"):
            return False
    files = [part.get_payload(decode=True) for part in message.iter_attachments()]
    given = [base64.b64decode(one["content"]) for one in asked.get("attachments", ())]
    return message["Subject"] == asked["subject"] and files == given and message["Bcc"] is None


# -- the servers


class Server:
    """A real server: it accepts mail for all, and `keep`s what comes in a folder."""

    name = ""
    packages: ClassVar[Sequence[str]] = ()  # Debian's, unpacked
    as_root = False
    account: ClassVar[Mapping[str, object]] = {}  # settings that mailproxy needs for it
    own: ClassVar[Mapping[str, str]] = {}  # kind of message -> what the server is known to do to it

    def __init__(self, store: Path) -> None:
        if self.as_root and os.getuid() != 0:
            raise CannotBeObtained("needs root")
        self.store = store
        self.port = rig.free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self.root = self._unpacked() if self.packages else store
        self.obtain()

    # what a server says of itself

    def obtain(self) -> None:
        """Make sure that it is there; CannotBeObtained."""

    def version(self) -> str:
        raise NotImplementedError

    def command(self) -> Sequence[object]:
        """What starts it in the foreground; writes its configuration into self.folder."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Debian's own folders of libraries, of the unpacked packages."""
        folders = [str(self.root / name) for name in ("usr/lib/x86_64-linux-gnu", "usr/lib", "lib/x86_64-linux-gnu")]
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(folders)} if self.packages else dict(os.environ)

    # its life

    def start(self, folder: Path) -> None:
        self.folder = folder
        for name in ("kept", "kept/tmp", "kept/new"):
            (folder / name).mkdir(parents=True)
            (folder / name).chmod(0o777)
        self.keep = self.write("keep", KEEP.format(kept=folder / "kept"), 0o755)
        with (folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [str(word) for word in self.command()], cwd=folder, env=self.environment(),
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        rig.wait_until(self._greets, 30, lambda: f"{self.name} to greet; its log ends:\n{self.log_tail()}")

    def stop(self) -> None:
        """It and its session, which it leads."""
        if self._process is not None:
            for ending in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, ending)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(5)

    def _greets(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            raise CannotBeObtained(f"it does not start: {self.log_tail()}")
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 10) as line:
            return line.recv(4).startswith(b"220")
        time.sleep(0.05)
        return False

    def log_tail(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-1500:]

    def copies(self) -> Iterator[Copy]:
        """Files of `keep`: a line of recipients, then the message."""
        for path in (self.folder / "kept" / "new").iterdir():
            first, _, content = path.read_bytes().partition(b"\n")
            yield Copy([word.lower() for word in first.decode().split()], content)

    # tools

    def in_its_own_system(self, users: Sequence[str], laid: str, *command: object) -> Sequence[object]:
        """The command in namespaces with these users, and what the script lays over compiled-in paths; root."""
        lines = [f"{user}:x:{64001 + n}:{64001 + n}::/:/bin/false" for n, user in enumerate(users)]
        self.write("passwd", "\n".join([Path("/etc/passwd").read_text().rstrip(), *lines, ""]))
        groups = [f"{user}:x:{64001 + n}:" for n, user in enumerate(users)]
        self.write("group", "\n".join([Path("/etc/group").read_text().rstrip(), *groups, ""]))
        etc = f"mount --bind {self.folder}/passwd /etc/passwd; mount --bind {self.folder}/group /etc/group\n"
        script = self.write("system", f"{etc}{laid}\nexec {' '.join(map(str, command))}\n")
        return ["unshare", "-m", "-u", "-p", "--fork", "--kill-child", "--propagation", "private", "sh", "-eu", script]

    def write(self, name: str, text: str, mode: int = 0o644) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        return path

    def debian_version(self, package: str) -> str:
        [deb] = (self.store / "debs").glob(f"{package}_*.deb")
        return said("dpkg-deb", "-f", deb, "Version")

    def _unpacked(self) -> Path:
        debs, root = self.store / "debs", self.store / "root" / self.name.split()[0]
        debs.mkdir(parents=True, exist_ok=True)
        for package in self.packages:
            if not list(debs.glob(f"{package}_*.deb")):
                said("apt-get", "-q", "download", package, cwd=debs)
        if not root.exists():
            part = root.with_name(f"{root.name}.part")
            part.mkdir(parents=True, exist_ok=True)
            for package in self.packages:
                [deb] = debs.glob(f"{package}_*.deb")
                said("dpkg-deb", "-x", deb, part)
            for path in part.rglob("*"):  # set-user-id programs would not find their libraries
                if path.is_file() and not path.is_symlink() and path.stat().st_mode & 0o6000:
                    path.chmod(path.stat().st_mode & 0o777)
            part.rename(root)
        return root

    def npm(self, package: str) -> Path:
        """The folder of an npm package, installed into the store."""
        folder = self.store / "npm" / "node_modules" / package
        if not folder.exists():
            folder.parent.parent.mkdir(parents=True, exist_ok=True)
            said("npm", "install", "--no-audit", "--no-fund", package, cwd=folder.parent.parent)
        return folder


KEEP = """\
#!/bin/sh
# keep [RECIPIENT]: standard input becomes a file, whole or not at all
set -e
file=$(mktemp "{kept}/tmp/XXXXXXXXXXXX")
{{ echo "${{1:-$LOCAL_PART@$DOMAIN}}"; cat; }} > "$file"
chmod 644 "$file"
mv "$file" "{kept}/new/"
"""


def said(*command: object, cwd: Path | None = None) -> str:
    """What a program says; CannotBeObtained when it is not there or fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBeObtained(str(error)) from error
    if done.returncode:
        raise CannotBeObtained(f"{words[0]}: {(done.stderr or done.stdout).strip()[-200:]}")
    return done.stdout.strip()


class Postfix(Server):
    name = "Postfix"
    as_root = True

    def __init__(self, store: Path, more: str = "") -> None:
        super().__init__(store)
        self._more = more  # of main.cf

    def obtain(self) -> None:
        if not shutil.which("postconf", path="/usr/sbin:/usr/bin"):
            raise CannotBeObtained("postfix is not installed (its package removes other mail servers: not done here)")

    def version(self) -> str:
        return said("/usr/sbin/postconf", "-dh", "mail_version")

    def command(self) -> Sequence[object]:
        private = ("active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming", "private", "trace")
        owned = {f"queue/{name}": 0o700 for name in (*private, "saved")} | {"data": 0o700}
        owned |= {"queue/maildrop": 0o730, "queue/public": 0o710}
        for name, mode in {"etc": 0o755, "queue": 0o755, "queue/pid": 0o755, **owned}.items():
            (self.folder / name).mkdir(mode)
            (self.folder / name).chmod(mode)
            if name in owned:
                shutil.chown(self.folder / name, "postfix", "postdrop" if mode in (0o730, 0o710) else None)
        self.write("etc/main.cf", POSTFIX_MAIN.format(folder=self.folder) + self._more)
        self.write("etc/master.cf", POSTFIX_MASTER.format(port=self.port, keep=self.keep))
        for path in (self.folder / "etc").iterdir():
            os.utime(path, (0, 0))  # Postfix waits until a fresh one is two seconds old
        return [said("/usr/sbin/postconf", "-dh", "daemon_directory") + "/master", "-c", self.folder / "etc", "-s"]


POSTFIX_MAIN = """\
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
maillog_file = {folder}/maillog
maillog_file_prefixes = {folder}
myhostname = postfix.test
mydestination =
mynetworks = 127.0.0.0/8
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
alias_maps =
alias_database =
virtual_mailbox_domains = static:all
virtual_mailbox_maps = static:all
virtual_transport = keep
keep_destination_recipient_limit = 1
message_drop_headers =
local_header_rewrite_clients =
smtpd_relay_restrictions = permit_mynetworks, reject
strict_smtputf8 = yes
in_flow_delay = 0
"""

POSTFIX_MASTER = """\
127.0.0.1:{port} inet n - n - - smtpd
cleanup   unix      n - n - 0 cleanup
qmgr      unix      n - n 300 1 qmgr
tlsmgr    unix      - - n 1000? 1 tlsmgr
rewrite   unix      - - n - - trivial-rewrite
bounce    unix      - - n - 0 bounce
defer     unix      - - n - 0 bounce
trace     unix      - - n - 0 bounce
proxymap  unix      - - n - - proxymap
error     unix      - - n - - error
retry     unix      - - n - - error
anvil     unix      - - n - 1 anvil
postlog   unix-dgram n - n - 1 postlogd
keep      unix      - n n - 10 pipe user=nobody argv={keep} ${{recipient}}
"""


class Exim(Server):
    name = "Exim"
    packages = ("exim4-base", "exim4-daemon-heavy", "libmariadb3", "libspf2-2")
    as_root = True

    def version(self) -> str:
        return self.debian_version("exim4-daemon-heavy")

    def command(self) -> Sequence[object]:
        (self.folder / "spool").mkdir()
        program = self.root / "usr/sbin/exim4"
        facts = {"program": program, "folder": self.folder, "port": self.port, "keep": self.keep}
        config = self.write("exim.conf", EXIM_CONF.format(**facts))
        for path in (self.folder, self.folder / "spool"):
            shutil.chown(path, "nobody", "nogroup")
        as_nobody = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
        return self.in_its_own_system(("Debian-exim",), "", *as_nobody, program, "-C", config, "-bdf")


EXIM_CONF = """\
exim_path = {program}
exim_user = nobody
exim_group = nogroup
keep_environment = LD_LIBRARY_PATH : PATH
primary_hostname = exim.test
spool_directory = {folder}/spool
log_file_path = {folder}/%slog
pid_file_path = {folder}/exim.pid
local_interfaces = 127.0.0.1
daemon_smtp_ports = {port}
deliver_drop_privilege = true
tls_advertise_hosts =
host_lookup =
rfc1413_hosts =
smtputf8_advertise_hosts = *
smtp_accept_queue_per_connection = 0
qualify_domain = exim.test
acl_smtp_rcpt = acl_accept
acl_smtp_data = acl_accept
begin acl
acl_accept:
  accept
begin routers
keep:
  driver = accept
  transport = keep
begin transports
keep:
  driver = pipe
  command = {keep}
  message_prefix =
  message_suffix =
  path = /usr/bin:/bin
"""


class OpenSMTPD(Server):
    """Its folders and users are compiled in: it gets them in a mount namespace of its own."""

    name = "OpenSMTPD"
    packages = ("opensmtpd", "libevent-2.1-7")
    as_root = True

    def version(self) -> str:
        return self.debian_version("opensmtpd")

    def command(self) -> Sequence[object]:
        config = self.write("smtpd.conf", OPENSMTPD_CONF.format(port=self.port, keep=self.keep))
        laid = f"""\
mount --bind {self.root}/usr/libexec /usr/libexec
mount -t tmpfs none /var/lib; mkdir -p /var/lib/opensmtpd/empty
mount -t tmpfs none /var/spool; mkdir -m 711 /var/spool/smtpd"""
        return self.in_its_own_system(
            ("opensmtpd", "opensmtpq"), laid, self.root / "usr/sbin/smtpd", "-d", "-f", config
        )


OPENSMTPD_CONF = """\
table all {{ "@" = nobody }}
listen on 127.0.0.1 port {port} hostname opensmtpd.test
action "keep" mda "{keep} %{{rcpt}}" virtual <all>
match from any for any action "keep"
"""


class Chasquid(Server):
    name = "chasquid"
    packages = ("chasquid",)
    account: ClassVar[Mapping[str, object]] = {"verify_tls": "false"}  # it does not start without a certificate

    def version(self) -> str:
        return self.debian_version("chasquid")

    def command(self) -> Sequence[object]:
        certs = self.folder / "etc/certs/chasquid.test"
        certs.mkdir(parents=True)
        names = ["-keyout", certs / "privkey.pem", "-out", certs / "fullchain.pem", "-subj", "/CN=chasquid.test"]
        said("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names)
        for domain in ("one.example", "two.example"):
            aliases = [f"{name}: | {self.keep} {name}@{domain}\n" for name in ("ann", "bob", "carl", "dora")]
            self.write(f"etc/domains/{domain}/aliases", "".join(aliases))
        self.write("etc/chasquid.conf", CHASQUID_CONF.format(folder=self.folder, port=self.port))
        return [self.root / "usr/bin/chasquid", "-config_dir", self.folder / "etc", "-alsologtostderr"]


CHASQUID_CONF = """\
hostname: "chasquid.test"
smtp_address: "127.0.0.1:{port}"
submission_address: ""
data_dir: "{folder}/data"
mail_log_path: "<stderr>"
"""


class Sendmail(Server):
    name = "Sendmail"
    packages = ("sendmail-bin", "sendmail-base", "sendmail-cf", "m4", "libwrap0", "liblockfile1")
    as_root = True

    def version(self) -> str:
        return self.debian_version("sendmail-bin")

    def command(self) -> Sequence[object]:
        (self.folder / "queue").mkdir()
        rules = self.root / "usr/share/sendmail/cf"
        facts = {"rules": rules, "folder": self.folder, "port": self.port, "keep": self.keep}
        source = self.write("sendmail.mc", SENDMAIL_MC.format(**facts))
        made = subprocess.run(
            [self.root / "usr/bin/m4", f"-D_CF_DIR_={rules}/", source],
            env=self.environment(),
            capture_output=True,
            text=True,
        )
        self.write("sendmail.cf", made.stdout)
        self.write("hosts", "127.0.0.1 localhost mta.sendmail.test\n")
        laid = f"hostname mta.sendmail.test; mount --bind {self.folder}/hosts /etc/hosts"  # it waits for a full name
        program = self.root / "usr/libexec/sendmail/sendmail"
        return self.in_its_own_system((), laid, program, "-C", self.folder / "sendmail.cf", "-bD", "-q1m")


SENDMAIL_MC = """\
include(`{rules}/m4/cf.m4')
OSTYPE(`linux')
define(`confDOMAIN_NAME', `sendmail.test')
define(`QUEUE_DIR', `{folder}/queue')
define(`confPID_FILE', `{folder}/pid')
define(`STATUS_FILE', `{folder}/status')
define(`ALIAS_FILE', `')
define(`confDONT_BLAME_SENDMAIL', `GroupWritableDirPathSafe,RunProgramInUnsafeDirPath,RunWritableProgram')
define(`confTO_IDENT', `0s')
define(`SMART_HOST', `keep:there')
FEATURE(`promiscuous_relay')
FEATURE(`accept_unresolvable_domains')
FEATURE(`no_default_msa')
FEATURE(`nocanonify')
DAEMON_OPTIONS(`Name=MTA, Addr=127.0.0.1, Port={port}')
MAILER(`local')
MAILER(`smtp')
MAILER_DEFINITIONS
Mkeep, P={keep}, F=nDFM8/u, L=0, U=65534:65534, T=DNS/RFC822/X-Unix, A=keep $u
"""


class Courier(Server):
    """Its folders are compiled in, too: /usr, /etc and /var/lib are overlaid with its own, for it alone."""

    name = "Courier"
    packages = (
        "courier-mta", "courier-base", "courier-authlib", "courier-authdaemon", "courier-authlib-userdb",
        "libcourier-unicode4", "libgdbm6", "libidn12", "libltdl7",
    )  # fmt: skip
    as_root = True

    def version(self) -> str:
        return self.debian_version("courier-mta")

    def command(self) -> Sequence[object]:
        facts = {"folder": self.folder, "root": self.root, "keep": self.keep, "port": self.port}
        return self.in_its_own_system(("courier",), COURIER_SYSTEM.format(**facts), "sleep", "infinity")


COURIER_SYSTEM = """\
mkdir {folder}/over; mount -t tmpfs none {folder}/over
for name in usr etc var/lib; do
    mkdir -p {folder}/over/$name/upper {folder}/over/$name/work
    mount -t overlay none -o lowerdir={root}/$name:/$name,upperdir={folder}/over/$name/upper,workdir={folder}/over/$name/work /$name
done
cp {folder}/passwd {folder}/group /etc/
mount -t tmpfs none /run; mkdir -p /run/courier/authdaemon
cd /var/lib/courier; mkdir -p allfilters filters msgq msgs track tmp; chmod 750 *; chmod 770 tmp
chown -R courier:courier /run/courier /var/lib/courier /etc/courier
cd /etc/courier
echo courier.test > me; echo courier.test > defaultdomain; echo '<postmaster@courier.test>' > dsnfrom
printf 'one.example\ntwo.example\n' | tee locals > esmtpacceptmailfor.dir/all
echo '|{keep} "$RECIPIENT"' > aliasdir/.courier-default; chown courier:courier aliasdir/.courier-default
echo "opt MIME=none" > bofh
sed -i 's/^BOFHCHECKDNS=.*/BOFHCHECKDNS=0/' esmtpd
ln -sf /usr/lib/courier/makedat /usr/bin/makedat
makeacceptmailfor; makealiases; makesmtpaccess
/usr/lib/courier/courier-authlib/authdaemond &
(set -a; . /etc/courier/courierd; exec /usr/lib/courier/courier/courierd) &
prefix=/usr exec_prefix=/usr sysconfdir=/etc/courier sbindir=/usr/sbin
set -a; . /etc/courier/esmtpd; set +a
/usr/sbin/couriertcpd -address=127.0.0.1 -access=/etc/courier/smtpaccess.dat -pid=/run/courier/esmtpd.pid \\
    -maxprocs=40 -maxperc=40 -maxperip=40 -noidentlookup -nodnslookup -user=courier -group=courier \\
    {port} /usr/lib/courier/courier/modules/esmtp/courieresmtpd"""


class NodeSmtpServer(Server):
    name = "smtp-server"

    def obtain(self) -> None:
        self.module = self.npm("smtp-server")

    def version(self) -> str:
        return str(json.loads((self.module / "package.json").read_text())["version"])

    def command(self) -> Sequence[object]:
        kept = self.folder / "kept"
        return ["node", self.write("server.js", NODE_SERVER.format(module=self.module, port=self.port, kept=kept))]


NODE_SERVER = """\
const fs = require('fs'), {{SMTPServer}} = require('{module}');
let n = 0;
new SMTPServer({{
  authOptional: true, disabledCommands: ['STARTTLS', 'AUTH'],
  onData(stream, session, done) {{
    const pieces = [session.envelope.rcptTo.map(one => one.address).join(' ') + '\\n'];
    stream.on('data', piece => pieces.push(piece));
    stream.on('end', () => {{
      fs.writeFileSync('{kept}/new/' + n++, Buffer.concat(pieces.map(one => Buffer.from(one))));
      done();
    }});
  }}
}}).listen({port}, '127.0.0.1');
"""


class Dovecot(Server):
    """Its submission service: a login, and then it speaks for the server behind it (here smtp-server)."""

    name = "Dovecot"
    packages = (
        "dovecot-core", "dovecot-submissiond", "libexttextcat-2.0-0", "liblua5.3-0", "libsodium23", "libstemmer0d",
    )  # fmt: skip
    as_root = True
    account: ClassVar[Mapping[str, object]] = {"user": "me@one.example", "password": "secret"}

    def obtain(self) -> None:
        self.behind = NodeSmtpServer(self.store)

    def version(self) -> str:
        return self.debian_version("dovecot-core")

    def command(self) -> Sequence[object]:
        self.behind.start(self.folder / "behind")
        facts = {"folder": self.folder, "port": self.port, "behind": self.behind.port}
        config = self.write("dovecot.conf", DOVECOT_CONF.format(**facts))
        laid = f"mount -t overlay none -o lowerdir={self.root}/usr:/usr /usr\nmkdir {self.folder}/run"
        return self.in_its_own_system(("dovecot", "dovenull"), laid, "/usr/sbin/dovecot", "-F", "-c", config)

    def stop(self) -> None:
        super().stop()
        self.behind.stop()

    def copies(self) -> Iterator[Copy]:
        return self.behind.copies()


DOVECOT_CONF = """\
base_dir = {folder}/run
state_dir = {folder}/run
protocols = submission
listen = 127.0.0.1
log_path = /dev/stderr
ssl = no
disable_plaintext_auth = no
auth_mechanisms = plain login
hostname = dovecot.test
mail_location = maildir:{folder}/run/mail
passdb {{
  driver = static
  args = password=secret
}}
userdb {{
  driver = static
  args = uid=nobody gid=nogroup home=/tmp
}}
submission_relay_host = 127.0.0.1
submission_relay_port = {behind}
service submission-login {{
  inet_listener submission {{
    port = {port}
  }}
  chroot =
}}
service anvil {{
  chroot =
}}
"""


class Haraka(Server):
    name = "Haraka"
    own: ClassVar[Mapping[str, str]] = {
        "raw, long line": "it breaks lines longer than its data_line_length, 992 octets"
    }

    def obtain(self) -> None:
        self.module = self.npm("Haraka")

    def version(self) -> str:
        return str(json.loads((self.module / "package.json").read_text())["version"])

    def command(self) -> Sequence[object]:
        self.write("config/smtp.ini", f"listen=127.0.0.1:{self.port}\nnodes=0\n")
        shutil.copy(self.module / "config" / "connection.ini", self.folder / "config")  # it crashes without
        self.write("config/plugins", "keep\n")
        self.write("config/me", "haraka.test\n")
        self.write("config/loglevel", "WARN\n")
        self.write("plugins/keep.js", HARAKA_PLUGIN.format(kept=self.folder / "kept"))
        self.write("package.json", "{}")
        return ["node", self.module / "bin" / "haraka", "-c", self.folder]


HARAKA_PLUGIN = """\
const fs = require('fs');
let n = 0;
exports.hook_rcpt = (next) => next(OK);
exports.hook_queue = (next, connection) => {{
  const transaction = connection.transaction, file = fs.createWriteStream('{kept}/tmp/' + n);
  file.write(transaction.rcpt_to.map(one => one.user + '@' + one.host).join(' ') + '\\n');
  const name = n++;
  file.on('close', () => {{ fs.renameSync('{kept}/tmp/' + name, '{kept}/new/' + name); next(OK); }});
  transaction.message_stream.pipe(file);
}};
"""


class Aiosmtpd(Server):
    name = "aiosmtpd"
    own: ClassVar[Mapping[str, str]] = {"raw, long line": "it takes lines of up to 999 octets only"}

    def obtain(self) -> None:
        self.module = self.store / "pypi"
        if not (self.module / "aiosmtpd").exists():
            said(sys.executable, "-m", "pip", "install", "-q", "--target", self.module, "aiosmtpd")

    def version(self) -> str:
        [dist] = self.module.glob("aiosmtpd-*.dist-info")
        return dist.name.removeprefix("aiosmtpd-").removesuffix(".dist-info")

    def command(self) -> Sequence[object]:
        facts = {"module": self.module, "port": self.port, "kept": self.folder / "kept"}
        return [sys.executable, self.write("server.py", AIOSMTPD_SERVER.format(**facts))]


AIOSMTPD_SERVER = """\
import itertools, os, sys, threading
sys.path.insert(0, "{module}")
from aiosmtpd.controller import Controller
number = itertools.count()

class Keep:
    async def handle_DATA(self, server, session, envelope):
        name = next(number)
        with open(f"{kept}/tmp/{{name}}", "wb") as file:
            file.write(" ".join(envelope.rcpt_tos).encode() + b"\\n" + envelope.original_content)
        os.rename(f"{kept}/tmp/{{name}}", f"{kept}/new/{{name}}")
        return "250 OK"

Controller(Keep(), "127.0.0.1", {port}, enable_SMTPUTF8=True).start()
threading.Event().wait()
"""


SERVERS: list[type[Server]] = [
    Postfix,
    Exim,
    OpenSMTPD,
    Chasquid,
    Courier,
    Sendmail,
    Haraka,
    NodeSmtpServer,
    Dovecot,
    Aiosmtpd,
]


# -- the run


class Outcome(NamedTuple):
    """A row of the table, and what is to be said below it."""

    row: tuple[str, ...]
    remarks: list[str]
    wrong: bool


def run(kind: type[Server], count: int, store: Path, folder: Path) -> Outcome:
    try:
        server = kind(store)
    except CannotBeObtained as reason:
        return Outcome((kind.name, "cannot be obtained here", "", "", "", ""), [f"{kind.name}: {reason}"], False)
    try:
        server.start(folder / "server")
        return judged(server, *sent(server, count, folder / "daemon"))
    except (CannotBeObtained, rig.BenchError) as reason:
        return Outcome((kind.name, server.version(), str(count), "0", "", ""), [f"{kind.name}: {reason}"], True)
    finally:
        server.stop()


def sent(server: Server, count: int, folder: Path) -> tuple[dict[str, Case], dict[str, dict[str, Any]], float]:
    """Send them; return them, their records, and the seconds it took until all were final."""
    account = {"host": "127.0.0.1", "port": server.port, "max_connections": CONNECTIONS, **server.account}
    asked = cases(count)
    with rig.Daemon(folder, {"smtp": account}) as daemon:
        daemon.command("suspend")
        for start in range(0, count, 50):
            daemon.submit([case.submission for case in list(asked.values())[start : start + 50]])
        began = time.monotonic()
        daemon.command("activate")
        with contextlib.suppress(rig.BenchError):
            daemon.wait_for_status(lambda status: not status["pending"], PATIENCE_S)
        took_s = time.monotonic() - began
        records = {message_id: daemon.ask("GET", f"/message/{message_id}?content=1") for message_id in asked}
        expected = sum(
            len(case.recipients) for id_, case in asked.items() if records[id_]["message"]["status"] == "sent"
        )

        def arrived() -> bool:
            time.sleep(0.1)
            return sum(len(copy.recipients) for copy in server.copies()) >= expected

        with contextlib.suppress(rig.BenchError):
            rig.wait_until(arrived, 30, lambda: "the copies")
        time.sleep(0.3)  # a second copy might be under way
    return asked, records, took_s


def judged(server: Server, asked: dict[str, Case], records: dict[str, dict[str, Any]], took_s: float) -> Outcome:
    copies: dict[str, list[Copy]] = {}
    for copy in server.copies():
        copies.setdefault(copy.id, []).append(copy)
    faults: Counter[tuple[str, str]] = Counter()
    identical = duplicates = 0
    for id_, case in asked.items():
        record = records[id_]["message"]
        brought = Counter(recipient for copy in copies.get(id_, ()) for recipient in copy.recipients)
        duplicates += sum(brought.values()) - len(brought)
        if record["status"] != "sent":
            fault = f"{record['status']}: {record['error']}"
        elif set(brought) != case.recipients:
            fault = f"sent, but it arrived for {sorted(brought) or 'nobody'}"
        else:
            fault = fault_of(case, record, copies[id_])
        identical += not fault
        if fault:
            faults[case.kind, re.sub(r"case-\d+|\d{4,}", "N", fault)] += 1
    for id_ in copies.keys() - asked.keys():
        faults["none", f"a message that nobody sent: {id_}"] += 1
    remarks = [
        f"{server.name}, {kind}, {times} times: {fault}" + (f" ({server.own[kind]})" if kind in server.own else "")
        for (kind, fault), times in sorted(faults.items())
    ]
    attempts = sum(record["message"]["attempts"] for record in records.values())
    if attempts != len(asked):
        remarks.append(f"{server.name}: {attempts} attempts for {len(asked)} messages")
    wrong = duplicates > 0 or any(kind not in server.own for kind, _ in faults)
    figures = (str(len(asked)), str(identical), str(duplicates), f"{took_s:.1f} s")
    return Outcome((server.name, server.version(), *figures), remarks, wrong)


def fault_of(case: Case, record: Mapping[str, Any], copies: Iterable[Copy]) -> str:
    """What is wrong with the copies of a message, or nothing."""
    expected = case.given if case.given is not None else composition(record)
    for copy in copies:
        content = without_trace(copy.content, expected)
        if content != expected:
            return difference(expected, content)
        if case.given is None and not reads_as_asked(content, case.submission):
            return "it does not read as it was submitted"
    return ""


def composition(record: Mapping[str, Any]) -> bytes:
    """What mailproxy composes of a stored message."""
    import mailproxy  # of the zipapp: the same program that the daemon ran

    message = mailproxy.parse_message(record["message"], now=None)
    parts = [mailproxy.complete(part, part.content, "", "") for part in message.attachments]
    return bytes(mailproxy.compose(message, parts, date=record["created_at"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=200)
    parser.add_argument(
        "--folder", type=Path, default=Path("/var/tmp/mailproxy-servers"), help="where servers are kept"
    )
    parser.add_argument("servers", nargs="*", metavar="SERVER", help=", ".join(kind.name for kind in SERVERS))
    args = parser.parse_args()
    rig.end_cleanly_when_told()
    sys.path.insert(0, str(rig.built_zipapp()))
    wanted = {name.lower() for name in args.servers}
    outcomes = []
    for kind in SERVERS:
        if not wanted or kind.name.lower() in wanted:
            folder = Path(tempfile.mkdtemp(prefix="mailproxy-server-"))
            folder.chmod(0o755)
            try:
                outcomes.append(run(kind, args.messages, args.folder, folder))
                print(*outcomes[-1].row, sep="  ", file=sys.stderr)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    header = ("server", "version", "messages", "identical", "duplicates", "time")
    print(rig.markdown_table(header, [outcome.row for outcome in outcomes]))
    print("\n".join(["", *(f"- {remark}" for outcome in outcomes for remark in outcome.remarks)]))
    return int(any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
