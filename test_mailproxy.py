"""The tests of mailproxy: real sockets, real files, real servers; fake only time and dice."""

from __future__ import annotations

import ast
import asyncio
import atexit
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import datetime
import email
import email.message
import email.policy
import enum
import errno
import fcntl
import functools
import gc
import gzip
import hashlib
import hmac
import http.client
import http.server
import importlib.util
import inspect
import io
import ipaddress
import itertools
import json
import logging
import lzma
import marshal
import math
import operator
import os
import platform
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import smtplib
import socket
import socketserver
import sqlite3
import ssl
import stat
import subprocess
import sys
import tempfile
import termios
import textwrap
import threading
import time
import tracemalloc
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.utils import getaddresses
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import aiosmtplib
import dkim
import hypothesis
import hypothesis.strategies as st
import prometheus_client
import prometheus_client.parser
import psycopg
import pytest
import yaml
from aiosmtpd.smtp import SMTP, AuthResult
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import HealthCheck, given, settings

import mailproxy
from mailproxy import Attachment, Reply, S3Object, Source

# ======================================================================
# RIGS - the world around the daemon: servers that behave as they are told
# ======================================================================
#
# Each rig is a context manager on loopback, on a port of its own, and stops
# only what it started. Every wait has a deadline, and waits for a condition.

PROGRAM = Path(__file__).with_name("mailproxy.py")
ENGINES = ["sqlite", "postgresql"]


def starter() -> Path:
    """A script that runs the program from its bytecode: Python compiles a script anew at every start."""
    folder = tempfile.mkdtemp(prefix="mailproxy-starter-")
    atexit.register(shutil.rmtree, folder)
    os.chmod(folder, 0o755)  # other users run it too
    os.mkdir(f"{folder}/compiled", 0o755)
    code = marshal.dumps(mailproxy.__spec__.loader.get_code("mailproxy"))  # which is not compiled anew
    Path(folder, "compiled", "mailproxy.pyc").write_bytes(importlib.util.MAGIC_NUMBER + bytes(12) + code)
    script = Path(folder, "mailproxy.py")
    shorter = "vars(mailproxy).update(json.loads(os.environ.get('PAUSES', '{}')))"  # constants, as JSON
    imports = ("import json, os, sys", f"sys.path[0] = {folder + '/compiled'!r}", "import mailproxy")
    lines = (*imports, shorter, "sys.exit(mailproxy.main())")
    script.write_text("\n".join(lines) + "\n")
    return script


STARTER = starter()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it, and what it starts too
for size in ("COLUMNS", "LINES"):  # of a terminal that the programs under test do not have
    os.environ.pop(size, None)


def found(program: str) -> str | None:
    """The path of a program, also where servers live and the PATH of a user does not look."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def needs(*programs: str) -> None:
    """Skip the test where a program (or "root") is missing; fail it where REQUIRE_TEST_SERVERS promised them all."""
    there = {"root": os.geteuid() == 0}
    missing = [program for program in programs if not there.get(program, found(program))]
    if missing and os.environ.get("REQUIRE_TEST_SERVERS"):
        pytest.fail(f"needs {', '.join(missing)}")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def install_from_npm(folder: Path, *packages: str) -> Path:
    """Put packages of npm into the folder, which is returned."""
    needs("node", "npm")
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefer-offline", *packages]
    installed = subprocess.run(command, cwd=folder, capture_output=True, timeout=100)
    if installed.returncode and not os.environ.get("REQUIRE_TEST_SERVERS"):
        pytest.skip("npm cannot install what this needs")
    return folder


def wait_until(
    condition: Callable[[], Any], what: str | Callable[[], str], timeout: float = 30, pause: float = 0.01
) -> Any:
    """The first true value of the condition, which is asked ever less often, at first after `pause`; a failure that
    says what never came after `timeout` seconds."""
    began = time.monotonic()
    while not (value := condition()):
        waited = time.monotonic() - began
        if waited > timeout:
            pytest.fail(f"{what() if callable(what) else what}: not within {timeout} s")
        time.sleep(min(max(waited / 10, pause), 0.1))
    return value


def free_port() -> int:
    """A port nobody listens on just now, of those that Linux gives to no outgoing connection meanwhile."""
    for port in random.SystemRandom().sample(range(10_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Nobody else is in here with this file."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes of this run."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def node_modules(together: Path) -> Path:
    """The packages of npm that tests of several sections use, installed once: each time takes half a second."""
    folder = together / "npm"
    with locked(together / "npm.lock"):
        if not folder.exists():
            installing = Path(tempfile.mkdtemp(dir=together))
            install_from_npm(installing, "axe-core@4", "nodemailer@10", "standardwebhooks@1").rename(folder)
    return folder / "node_modules"


@contextlib.contextmanager
def open_folder(prefix: str, *, in_memory: bool = False) -> Iterator[Path]:
    """A folder that servers running as other users can walk into; pytest's own are closed to them. For many files that
    need not outlive anything it may be in memory, where there is room."""
    memory = "/dev/shm" if in_memory and os.access("/dev/shm", os.W_OK) else None
    if memory and shutil.disk_usage(memory).free < 2**31:
        memory = None
    with tempfile.TemporaryDirectory(prefix=prefix, dir=memory, ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


# --- certificates --------------------------------------------------------


class Certificate(NamedTuple):
    """A certificate and its key, as PEM files."""

    cert: Path
    key: Path

    def server_context(self) -> ssl.SSLContext:
        """What a server that shows this certificate listens with."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.cert, self.key)
        return context


class PrivateCA:
    """A certificate authority nobody trusts unless told to; passes the strict checks of Python 3.13."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"CA of {folder.name}"[:64])])
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(self._signed(self._name, self._key, path_length=0))

    def good(self) -> Certificate:
        """The certificate of the server the tests mean: localhost, 127.0.0.1 and ::1."""
        return self.issue("good", "localhost", "127.0.0.1", "::1")

    def issue(
        self, label: str, *names: str, usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH
    ) -> Certificate:
        """A certificate for DNS names and addresses, valid from a month ago for two months."""
        key, alternatives = ec.generate_private_key(ec.SECP256R1()), []
        for name in names or (label,):
            try:
                alternatives.append(x509.IPAddress(ipaddress.ip_address(name)))
            except ValueError:
                alternatives.append(x509.DNSName(name))
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, label)])
        written = Certificate(self._folder / f"{label}.pem", self._folder / f"{label}.key")
        extensions = (x509.SubjectAlternativeName(alternatives), x509.ExtendedKeyUsage([usage]))
        written.cert.write_bytes(self._signed(subject, key, *extensions))
        written.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()))
        return written

    def _signed(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        *extensions: x509.ExtensionType,
        path_length: int | None = None,  # of an authority
    ) -> bytes:
        is_ca, now = path_length is not None, datetime.datetime.now(datetime.UTC)
        usage = dict.fromkeys(inspect.signature(x509.KeyUsage).parameters, False)
        usage |= {"digital_signature": not is_ca, "key_cert_sign": is_ca, "crl_sign": is_ca}
        builder = (
            x509.CertificateBuilder(self._name, subject, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=30))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(is_ca, path_length), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM)


# --- a mail server whose behaviour the recipient's address chooses -------
#
#     ok@ (and any other)   accepted                    temp@  451 at RCPT, always
#     perm@                 550 at RCPT                 550@, 452@ ...  that reply at RCPT (421@ hangs up too)
#     greylist2@            450 twice, then accepted    datatemp@, dataperm@  451, 554 at the end of data
#     slow@, slow3@, slow200ms@  waits before the reply to the end of data
#     slowrcpt3@            waits before the reply to RCPT
#     drop@, drop1@         cuts the connection at RCPT (always; the first time)
#     lost@, lost1@         cuts it at the end of data, and keeps no message
#     dropdata@, dropdata1@ cuts it at the end of data, and keeps the message
#
# Behind the word anything may follow: perm+7@, slow3.invoice@, 550-x@. A sender
# such as 451@ gets that reply at MAIL.
#
# What a provider does whatever the address is a rule: it is asked before each reply (to EHLO, MAIL, RCPT and the
# end of data, ".") and gives one, or None for the usual. "drop" cuts the connection; a 421, or words that end with
# "Bye", close it afterwards.

_MANNER = re.compile(r"(?P<word>[245]\d\d|[a-z]+)(?P<number>\d+)?(?P<milli>ms)?(?:[+.-].*)?")
_REFUSALS = {"temp": "451 4.3.0 Try again later", "perm": "550 5.1.1 No such user here"}
_DATA_REFUSALS = {"datatemp": "451 4.3.0 Not stored, try again", "dataperm": "554 5.6.0 Not taken"}


class Manner(NamedTuple):
    """What an address asks of the server."""

    word: str
    number: int | None
    seconds: float

    @classmethod
    def of(cls, address: str) -> Manner:
        match = _MANNER.fullmatch(address.rpartition("@")[0])
        if not match:
            return cls("ok", None, 0)
        number = int(match["number"]) if match["number"] else None
        seconds = 1.0 if number is None else float(number)
        return cls(match["word"], number, seconds / 1000 if match["milli"] else seconds)


@dataclass(frozen=True)
class Received:
    """A message the server took responsibility for (or pretended not to)."""

    sender: str
    recipients: list[str]
    content: bytes  # as sent, its dots unstuffed
    arrived_at: float
    connection: int  # 1 for the first connection, and so on
    options: list[str]  # of MAIL: SIZE=..., BODY=8BITMIME, SMTPUTF8

    @functools.cached_property
    def message(self) -> email.message.EmailMessage:
        return email.message_from_bytes(self.content, policy=email.policy.default)


@dataclass
class Visit:
    """What one connection has seen so far, for the rule of a provider."""

    number: int = 0  # of the connection; 0 until greeted
    taken: int = 0  # messages
    refused: int = 0  # commands, by the rule
    recipients: int = 0  # RCPT commands of this transaction


Rule = Callable[[str, Visit, str], Any]  # verb, visit, argument -> a reply or None, or a coroutine that ends so


class _Line(SMTP):
    """One connection to the server, which is its event_handler."""

    number = 0  # until greeted

    def connection_made(self, transport: Any) -> None:
        refusal = None if self.number else self.event_handler._admit(self)  # it comes once more after STARTTLS
        if not refusal:
            return super().connection_made(transport)
        transport.write(refusal.encode() + b"\r\n")
        return transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self.number:
            self.event_handler._lines.pop(self.number, None)
            super().connection_lost(error)

    def eof_received(self) -> bool | None:
        return super().eof_received() if self.number else None

    async def smtp_BDAT(self, size: str) -> None:
        server, envelope = self.event_handler, self.envelope
        envelope.content = envelope.original_content = await self._reader.readexactly(int(size.split()[0]))
        said = await server._ruled(self, "BDAT", size)
        if said is None and envelope.rcpt_tos:
            said = await server.handle_DATA(self, self.session, envelope)
        self._set_post_data_state()
        await self.push(said or "503 5.5.1 For nobody")


@dataclass(kw_only=True, eq=False)
class SmtpServer:
    """A real SMTP server on a thread of its own; keeps what it received and counts who came."""

    certificate: Certificate | None = None  # offers STARTTLS
    implicit_tls: bool = False
    accounts: dict[str, str] = field(default_factory=dict)  # user -> password; AUTH is required when given
    size_limit: int = 50_000_000
    max_recipients: int = 1_000  # of one transaction, then 452 4.5.3
    max_connections: int = 1_000  # at once, then 421 at the greeting
    smtputf8: bool = True
    pipelining: bool = False
    chunking: bool = False  # and pipelining
    rule: Rule | None = None  # of the provider, from now on

    host, port = "127.0.0.1", 0
    connections = 0  # ever greeted
    refused = 0  # turned away at the greeting
    most_connections = 0  # at once

    def __post_init__(self) -> None:
        self.received: list[Received] = []
        self.logins: list[tuple[str, bool]] = []  # user, accepted
        self.visits: Counter[str] = Counter()  # RCPT commands by address
        self.heard: Counter[str] = Counter()  # what the rule was asked about, by verb
        self.said: Counter[str] = Counter()  # what it said, by verb
        context = self.certificate.server_context() if self.certificate else None
        self._tls, starttls = (context, None) if self.implicit_tls else (None, context)
        self._options: dict[str, Any] = {
            "data_size_limit": self.size_limit,
            "enable_SMTPUTF8": self.smtputf8,
            "hostname": "sink.test",
            "tls_context": starttls,
            "auth_require_tls": starttls is not None,
            "authenticator": self._authenticate,
        }
        self._lines: dict[int, _Line] = {}
        self._news = threading.Condition()

    def __enter__(self) -> SmtpServer:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listen; after a stop on the same port again."""
        listening = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(listening)), daemon=True)
        self._thread.start()
        assert listening.wait(30), "the SMTP server did not start"

    def stop(self) -> None:
        """Cut every connection and listen no more: from now on connections are refused."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join(30)
            assert not self._thread.is_alive(), "the SMTP server did not stop"

    def cut_connections(self) -> None:
        """Close all connections without a word, as a server does with idle ones."""
        asyncio.run_coroutine_threadsafe(self._abort_all(), self._loop).result(30)

    def wait_for(self, count: int, timeout: float = 30) -> list[Received]:
        """The messages received, once there are at least so many."""
        with self._news:
            came = self._news.wait_for(lambda: len(self.received) >= count, timeout)
            received = list(self.received)
        if not came:
            pytest.fail(f"{len(received)} messages of {count} came within {timeout} s: {received}")
        return received

    def received_by(self, recipient: str) -> list[Received]:
        with self._news:
            return [received for received in self.received if recipient in received.recipients]

    async def _serve(self, listening: threading.Event) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        server = await self._loop.create_server(
            lambda: _Line(self, loop=self._loop, **self._options), self.host, self.port, ssl=self._tls
        )
        self.port = server.sockets[0].getsockname()[1]
        listening.set()
        await self._stopping.wait()
        server.close()
        await self._abort_all()

    async def _abort_all(self) -> None:
        for line in list(self._lines.values()):
            if line.transport:
                line.transport.abort()
        while self._lines:
            await asyncio.sleep(0.005)

    def _admit(self, line: _Line) -> str | None:
        """Count a connection in, or the words that turn it away."""
        with self._news:
            if len(self._lines) >= self.max_connections:
                self.refused += 1
                return "421 4.7.0 Too many connections"
            self.connections += 1
            line.number, line.visit = self.connections, Visit(self.connections)
            self._lines[line.number] = line
            self.most_connections = max(self.most_connections, len(self._lines))
        return None

    def _authenticate(self, _line: Any, _session: Any, _envelope: Any, _mechanism: str, login: Any) -> AuthResult:
        user, password = login.login.decode(), login.password.decode()
        accepted = user in self.accounts and self.accounts[user] == password
        with self._news:
            self.logins.append((user, accepted))
        return AuthResult(success=accepted, handled=False, auth_data=login)

    async def handle_EHLO(self, _line: Any, session: Any, _envelope: Any, hostname: str, words: list[str]) -> list[str]:
        session.host_name = hostname
        if said := await self._ruled(_line, "EHLO", hostname):
            return [said]
        if not self.accounts:
            words = [word for word in words if not word.startswith("250-AUTH")]
        if self.pipelining or self.chunking:
            words[-1:-1] = ["250-PIPELINING", "250-CHUNKING"][: 1 + self.chunking]
        return words

    async def handle_MAIL(self, line: Any, session: Any, envelope: Any, address: str, options: list[str]) -> str:
        if self.accounts and not session.authenticated:
            return "530 5.7.0 Authentication required"
        line.visit.recipients = 0
        if said := await self._ruled(line, "MAIL", address):
            return said
        word = Manner.of(address).word
        if word.isdigit():
            return await self._say(line, word)
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 2.1.0 Ok"

    async def handle_RCPT(self, line: Any, _session: Any, envelope: Any, address: str, _options: list[str]) -> str:
        with self._news:
            self.visits[address] += 1
        line.visit.recipients += 1
        if said := await self._ruled(line, "RCPT", address):
            return said
        manner = Manner.of(address)
        if manner.word == "slowrcpt":
            await asyncio.sleep(manner.seconds)
        if manner.word == "drop" and self._still(address, manner):
            await self._hang_up(line)
        if manner.word == "greylist" and self.visits[address] <= (manner.number or 1):
            return "450 4.7.1 Greylisted, try again"
        if manner.word.isdigit():
            return await self._say(line, manner.word)
        if manner.word in _REFUSALS:
            return _REFUSALS[manner.word]
        if len(envelope.rcpt_tos) >= self.max_recipients:
            return "452 4.5.3 Too many recipients"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 Ok"

    async def handle_DATA(self, line: Any, _session: Any, envelope: Any) -> str:
        if said := await self._ruled(line, ".", envelope.original_content.decode("latin-1")):
            return said
        asked = {address: Manner.of(address) for address in envelope.rcpt_tos}
        await asyncio.sleep(max(m.seconds if m.word == "slow" else 0 for m in asked.values()))
        for address, manner in asked.items():
            if manner.word in _DATA_REFUSALS:
                return _DATA_REFUSALS[manner.word]
            if manner.word == "lost" and self._still(address, manner):
                await self._hang_up(line)
        received = Received(
            sender=envelope.mail_from,
            recipients=list(envelope.rcpt_tos),
            content=bytes(envelope.original_content),
            arrived_at=time.time(),
            connection=line.number,
            options=list(envelope.mail_options),
        )
        with self._news:
            self.received.append(received)
            self._news.notify_all()
        line.visit.taken += 1
        if any(m.word == "dropdata" and self._still(address, m) for address, m in asked.items()):
            await self._hang_up(line)
        return f"250 2.0.0 Ok: queued as {len(self.received)}"

    def _still(self, address: str, manner: Manner) -> bool:
        """Whether the address misbehaves this time: drop@ always does, drop1@ the first time."""
        return manner.number is None or self.visits[address] <= manner.number

    async def _ruled(self, line: Any, verb: str, argument: str) -> str | None:
        """What the provider's rule says in place of the usual reply."""
        self.heard[verb] += 1
        said = self.rule(verb, line.visit, argument) if self.rule else None
        if inspect.isawaitable(said):
            said = await said
        if said is None:
            return None
        line.visit.refused += 1
        self.said[verb] += 1
        if said == "drop":
            await self._hang_up(line)
        return await self._say(line, said)

    async def _say(self, line: Any, reply: str) -> str:
        """The reply of an address such as 550@, or of a rule; 421 ends the connection (RFC 5321 3.8)."""
        reply = f"{reply} {reply[0]}.0.0 As the address asks" if reply.isdigit() else reply
        if reply.startswith("421") or reply.endswith("Bye"):
            line.transport.write(reply.encode() + b"\r\n")
            line.transport.close()
            await asyncio.Event().wait()  # ends when the connection does
        return reply

    async def _hang_up(self, line: Any) -> None:
        line.transport.abort()
        await asyncio.Event().wait()  # ends when the connection does


# --- the upstream that receives delivery reports -------------------------


@dataclass
class Answer:
    """How the upstream answers one call."""

    status: int = 200
    body: Any = field(default_factory=lambda: {"ok": True})  # JSON; bytes go out as they are
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0  # seconds before it
    before: bytes = b""  # informational answers
    close: bool = False  # hangs up instead

    @property
    def acknowledges(self) -> bool:
        refuses = isinstance(self.body, dict) and self.body.get("ok") is False
        return 200 <= self.status < 300 and not refuses and not self.close


class ReportCall(NamedTuple):
    """One call of the daemon, and how it was answered."""

    path: str
    headers: http.client.HTTPMessage
    content: bytes
    entries: list[dict[str, Any]]
    arrived_at: float
    answer: Answer


class ReportReceiver:
    """The upstream: takes `proxy_sync` calls; answers as scripted, else with 200."""

    def __init__(self) -> None:
        self.calls: list[ReportCall] = []
        self.answers: deque[Answer] = deque()  # for the calls to come, one each
        self.inside: Callable[[list[dict[str, Any]]], object] | None = None  # runs before the answer
        self._news = threading.Condition()
        self._closing = threading.Event()
        requests = type("Request", (_ReportRequest,), {"receiver": self})
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), requests)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/proxy_sync"

    def __enter__(self) -> ReportReceiver:
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """Every entry of every call so far, in order, the unacknowledged ones too."""
        with self._news:
            return [entry for call in self.calls for entry in call.entries]

    @property
    def acknowledged(self) -> list[dict[str, Any]]:
        """The entries of the calls that were acknowledged, in order."""
        with self._news:
            return [entry for call in self.calls if call.answer.acknowledges for entry in call.entries]

    def entries_of(self, message_id: str) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["id"] == message_id]

    def wait_for(self, condition: Callable[[ReportReceiver], Any], timeout: float = 30) -> Any:
        """The first true value of the condition, asked again after each call."""
        with self._news:
            value = self._news.wait_for(lambda: condition(self), timeout)
            seen = [[(entry.get("id"), entry.get("status")) for entry in call.entries] for call in self.calls]
        if not value:
            pytest.fail(f"the report did not come within {timeout} s; calls so far: {seen[-20:]}")
        return value

    def wait_for_entry(self, message_id: str, status: str, timeout: float = 30) -> dict[str, Any]:
        return self.wait_for(
            lambda reports: next((e for e in reports.entries_of(message_id) if e["status"] == status), None), timeout
        )


class _ReportRequest(http.server.BaseHTTPRequestHandler):
    receiver: ReportReceiver

    def do_POST(self) -> None:
        receiver, arrived_at = self.receiver, time.time()
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        entries = json.loads(content).get("delivery_report", [])
        if receiver.inside:
            receiver.inside(entries)
        with receiver._news:
            answer = receiver.answers.popleft() if receiver.answers else Answer()
            receiver.calls.append(ReportCall(self.path, self.headers, content, entries, arrived_at, answer))
            receiver._news.notify_all()
        receiver._closing.wait(answer.delay)
        content = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        with contextlib.suppress(ConnectionError):
            if answer.close:
                return self.connection.shutdown(socket.SHUT_RDWR)
            self.wfile.write(answer.before)
            self.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_args: object) -> None:
        pass


# --- the daemon itself, as a process -------------------------------------


class HttpAnswer(NamedTuple):
    """What the daemon answered."""

    status: int
    headers: http.client.HTTPMessage
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


def called(port: int, method: str, path: str, headers: Mapping[str, str] | None = None, body: Any = None) -> HttpAnswer:
    """One request over a connection of its own."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return HttpAnswer(answer.status, answer.headers, answer.read())


FORKER = """
import contextlib, gc, json, os, select, socket, sys
sys.path[0] = sys.argv[1]
import argparse, configparser, csv, ctypes, difflib, html, urllib.request, mailproxy, prometheus_client, psycopg

def taken(descriptor):
    return socket.socket(fileno=descriptor)

orders, running = taken(os.dup(0)), {}  # by what tells of their end: processes, and who wants to hear of it
gc.freeze()
while True:
    ready = select.select([orders] * (orders.fileno() >= 0) + [*running], [], [])[0]
    for ended in running.keys() & ready:
        child, line = running.pop(ended)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(OSError):
            line.send(b"%d" % status)
        line.close()
        os.close(ended)
    if orders in ready:
        order, files, *_ = socket.recv_fds(orders, 1_000_000, 4)
        if not order:
            orders.close()
        elif child := os.fork():
            line = taken(files.pop())
            line.send(b"%d" % child)
            running[os.pidfd_open(child)] = child, line
            for file in files:
                os.close(file)
        else:
            break
    if orders.fileno() < 0 and not running:
        sys.exit()
orders.close()
for ended, (_, line) in running.items():
    os.close(ended)
    line.close()
for descriptor, file in enumerate(files):
    if descriptor < 3:
        os.dup2(file, descriptor)
    os.close(file)
sys.argv, folder, environment = json.loads(order)
os.chdir(folder)
os.environ.clear()
os.environ.update(environment)
sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1, errors="backslashreplace")
vars(mailproxy).update(json.loads(os.environ.get("PAUSES", "{}")))
try:
    status = mailproxy.main()
except SystemExit as end:
    status = end.code
sys.stdout.flush()
os._exit(status)  # what Python does at its end costs more than a command
"""


@functools.cache
def forker() -> socket.socket:
    """The line to a Python that has loaded the program, and forks itself for each order."""
    ours, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
    command = [sys.executable, "-X", "utf8", "-c", FORKER, STARTER.with_name("compiled")]
    with theirs:
        process = subprocess.Popen(command, stdin=theirs, start_new_session=True)
    atexit.register(lambda: (ours.close(), process.wait(60)))
    return ours


class Forked:
    """The program in a process of its own: what subprocess.Popen([sys.executable, STARTER, ...]) is, in a fifth of its
    time. What Python itself, or the C library, reads in its environment at its start has no effect."""

    def __init__(
        self, words: Sequence[object], *, cwd: Path, env: Mapping[str, str], called: object = STARTER, **files: Any
    ) -> None:
        order = json.dumps([[str(called), *map(str, words)], str(cwd), dict(env)]).encode()
        self._line, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            given = [*(files[name] for name in ("stdin", "stdout", "stderr")), theirs]
            socket.send_fds(forker(), [order], [file if isinstance(file, int) else file.fileno() for file in given])
        self.pid, self.returncode = int(self._line.recv(20)), None

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("mailproxy", timeout)
            self.returncode = int(self._line.recv(20))
            self._line.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    terminate = functools.partialmethod(send_signal, signal.SIGTERM)
    kill = functools.partialmethod(send_signal, signal.SIGKILL)


def start_program(
    words: Sequence[object], *, env: Mapping[str, str], called: object = STARTER, **options: Any
) -> subprocess.Popen[bytes] | Forked:
    """The program as a process, forked where the environment changes nothing that would take a Python of its own."""
    early = re.compile("PYTHON|LC_|LANG|LD_|MALLOC_|TZ")
    if any(early.match(name) and value != os.environ.get(name) for name, value in env.items()):
        return subprocess.Popen([sys.executable, called, *words], env={**env, "PYTHONUTF8": "1"}, **options)
    return Forked(words, env=env, called=called, **options)


class Daemon:
    """The real program: `mailproxy.py serve` in a folder of its own, on a port of its own.

    `smtp` becomes the default account and `reports` the upstream; what `config` says wins.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Mapping[str, object]] | None = None,
        *,
        smtp: SmtpServer | Postfix | None = None,
        reports: ReportReceiver | None = None,
        token: str | None = None,
        environment: Mapping[str, str] | None = None,
        within: Sequence[object] = (),  # a command that runs it
    ) -> None:
        self.folder = folder
        self.config: dict[str, dict[str, object]] = {
            "storage": {"db_path": Storage.place(folder)},
            "server": {"host": "127.0.0.1", "port": 0},
        }
        if token:
            self.config["server"]["api_token"] = token
        if smtp:
            self.config["smtp"] = {"host": smtp.host, "port": smtp.port}
        if reports:
            self.config["client"] = {"client_sync_url": reports.url}
        for section, values in (config or {}).items():
            self.config.setdefault(section, {}).update(values)
        self.token, self.within = token, within
        self.port = 0
        self.process: subprocess.Popen[bytes] | Forked | None = None
        shared = str(self.config["storage"]["db_path"]).startswith("postgresql:")
        shorter = {"PAUSES": '{"LEASE_S": 2}'} if shared else {}
        self._environment = {**_plain_environment(), "HOME": str(folder), **shorter, **(environment or {})}
        self._log_file = folder / "daemon.log"
        self._threads = threading.local()  # a kept connection for each thread
        self._connections: list[http.client.HTTPConnection] = []  # of all threads, to the present process

    def __enter__(self) -> Daemon:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self.stop()
        finally:
            self._hang_up()
            print(self.log, file=sys.stderr)  # pytest shows it when the test fails

    def start(self, timeout: float = 30) -> None:
        """Start and wait until it is ready."""
        self.write_config()
        self._log_starts_at = len(self.log)
        self._hang_up()
        words = ["serve", "--config", self.folder / "config.ini"]
        with self._log_file.open("ab") as log, open(os.devnull, "rb") as nothing:
            outside = {"cwd": self.folder, "env": self._environment, "stdin": nothing, "stdout": log, "stderr": log}
            if self.within:
                self.process = subprocess.Popen([*self.within, sys.executable, STARTER, *words], **outside)
            else:
                self.process = start_program(words, **outside)
        self.port = wait_until(self._port_in_log, "the daemon's address in its log", timeout)
        wait_until(lambda: self.get("/ready").status == 200, "the daemon's readiness", timeout)

    def write_config(self) -> None:
        """Write config.ini as `self.config` has it; a running daemon reads it again at SIGHUP."""
        lines = []
        for section, values in self.config.items():
            lines += [f"[{section}]", *(f"{key} = {value}" for key, value in values.items())]
        (self.folder / "config.ini").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def signal(self, number: int) -> None:
        assert self.process
        self.process.send_signal(number)

    def stop(self, timeout: float = 40) -> int | None:
        """SIGTERM, and the exit status once it is down; the one it ended with when it is down already."""
        if not self.process:
            return None
        if self.process.poll() is None:
            self.process.terminate()
        return self.wait_for_exit(timeout)

    def wait_for_exit(self, timeout: float = 40) -> int:
        """The exit status; a daemon that stays up is killed, and the test fails."""
        assert self.process
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"the daemon was still there after {timeout} s")

    def kill(self) -> None:
        """SIGKILL: it gets no chance to say goodbye."""
        assert self.process
        self.process.kill()
        self.process.wait(30)

    def restart(self) -> None:
        self.stop()
        self.start()

    @property
    def log(self) -> str:
        """All it has written so far, over restarts too."""
        return self._log_file.read_text(encoding="utf-8", errors="replace") if self._log_file.exists() else ""

    def wait_for_log(self, words: str, timeout: float = 30) -> str:
        """The first line of the log with these words in it."""
        said = f"{words!r} in the log"
        return wait_until(lambda: next((line for line in self.log.splitlines() if words in line), None), said, timeout)

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> HttpAnswer:
        """One request; a body that is not bytes is sent as JSON. This thread's connection is kept."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"X-API-Token": self.token} if self.token else {}
        if content is not None:
            sent["Content-Type"] = "application/json"
        sent.update(headers or {})
        connection = getattr(self._threads, "connection", None)
        if connection not in self._connections or time.monotonic() > self._threads.until:
            connection = self._threads.connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            self._connections.append(connection)
        self._threads.until = time.monotonic() + 60  # the daemon closes a connection that was idle for 75 s
        try:
            connection.request(method, path, content, sent)
            answer = connection.getresponse()
            return HttpAnswer(answer.status, answer.headers, answer.read())
        except (OSError, http.client.HTTPException):
            connection.close()
            raise

    get = functools.partialmethod(request, "GET")
    post = functools.partialmethod(request, "POST")
    delete = functools.partialmethod(request, "DELETE")

    def submit(self, *messages: Mapping[str, Any]) -> None:
        """Submit messages that must all be accepted."""
        answer = self.post("/commands/add-messages", {"messages": messages})
        assert (answer.status, answer.json.get("rejected")) == (200, []), answer.content
        assert answer.json["queued"] == len(messages)

    def message(self, message_id: str) -> dict[str, Any]:
        return dict(self._story(message_id)["message"])

    def attempts(self, message_id: str) -> list[dict[str, Any]]:
        return list(self._story(message_id)["attempts"])

    def wait_status(self, message_id: str, status: str, timeout: float = 30) -> dict[str, Any]:
        """The record of a message once it has that status."""
        last: dict[str, Any] = {}

        def has_status() -> bool:
            last.update(self.message(message_id))
            return last["status"] == status

        wait_until(has_status, lambda: f"{message_id} to be {status}; it is {last}", timeout)
        return last

    def status(self) -> dict[str, Any]:
        return dict(self.get("/status").json)

    @contextlib.contextmanager
    def db(self) -> Iterator[Any]:
        """A connection that reads the queue as an operator's sqlite3 or psql does; its rows have names."""
        where = str(self.config["storage"]["db_path"])
        if where.startswith("postgresql:"):
            with psycopg.connect(where, autocommit=True, prepare_threshold=None) as connection:
                connection.row_factory = NamedRow.factory
                yield connection
            return
        with contextlib.closing(sqlite3.connect(f"file:{urllib.parse.quote(where)}?mode=ro", uri=True)) as file:
            file.row_factory = sqlite3.Row
            yield file

    def change(self, statement: str, *values: int) -> None:
        """Change the queue behind the daemon's back; each {} is a number."""
        where = str(self.config["storage"]["db_path"])
        if where.startswith("postgresql:"):
            with psycopg.connect(where) as connection:
                connection.execute(statement.format(*values).encode())
            return
        with contextlib.closing(sqlite3.connect(where, isolation_level=None)) as file:
            file.execute(statement.format(*values))

    def _story(self, message_id: str) -> dict[str, Any]:
        answer = self.get("/message/" + urllib.parse.quote(message_id, safe=""))
        assert answer.status == 200, answer.content
        return dict(answer.json)

    def _hang_up(self) -> None:
        while self._connections:
            self._connections.pop().close()

    def _port_in_log(self) -> int | None:
        """The port of the address it says it listens on since the last start."""
        assert self.process
        new = self.log[self._log_starts_at :]
        if self.process.poll() is not None:
            pytest.fail(f"the daemon ended with status {self.process.returncode}:\n{new}")
        match = re.search(r"http://127\.0\.0\.1:(\d+)", new)
        return int(match[1]) if match else None


def _plain_environment() -> dict[str, str]:
    """This environment without what would configure the daemon, or send loopback through a proxy."""
    unwanted = re.compile(r"MAILPROXY_.*|AWS_.*|.*_PROXY|NOTIFY_SOCKET|WATCHDOG_.*|COLUMNS|LINES", re.IGNORECASE)
    return {name: value for name, value in os.environ.items() if not unwanted.fullmatch(name)}


# --- Postfix -------------------------------------------------------------


@dataclass(frozen=True)
class Delivered:
    """One recipient's copy, as it lies in the mailbox."""

    recipient: str
    trace: email.message.Message  # what Postfix put before it: Return-Path, Received ...
    content: bytes  # what was sent, with bare line feeds

    @classmethod
    def read(cls, path: Path) -> Delivered:
        """A copy, parted into what Postfix added at its head and what was sent."""
        added = (b"Return-Path:", b"X-Original-To:", b"Delivered-To:", b"Received:", b" ", b"\t")
        lines = path.read_bytes().splitlines(keepends=True)
        end = next(number for number, line in enumerate(lines) if not line.startswith(added))
        trace = email.message_from_bytes(b"".join(lines[:end]))
        return cls(trace["X-Original-To"], trace, b"".join(lines[end:]))

    @functools.cached_property
    def message(self) -> email.message.EmailMessage:
        return email.message_from_bytes(self.content, policy=email.policy.default)


class Postfix:
    """A Postfix of the test's own, with its queue and configuration in a folder of its own; needs root.

    It accepts every domain, offers STARTTLS, and puts each recipient's copy into
    one Maildir through virtual(8). `users` (user -> password) makes AUTH a must. With `relay_to`, a port of
    this machine, it brings all mail there instead.
    """

    def __init__(
        self, *, certificate: Certificate, users: Mapping[str, str] | None = None, relay_to: int | None = None
    ) -> None:
        self.host, self.port = "127.0.0.1", free_port()
        self._certificate, self._users, self._relay_to = certificate, users or {}, relay_to

    @staticmethod
    def needed(*, with_users: bool = False) -> None:
        """Skip the test (or fail it, where servers were promised) when it cannot run here."""
        needs("postfix", "root", *(["saslpasswd2"] if with_users else []))

    def __enter__(self) -> Postfix:
        with contextlib.ExitStack() as stack:
            self.folder = stack.enter_context(open_folder("mailproxy-postfix-"))
            self._lay_out()
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    @property
    def log(self) -> str:
        log = self.folder / "log"
        return log.read_text(errors="replace") if log.exists() else ""

    def wait_for(self, count: int, timeout: float = 30) -> list[Delivered]:
        """Every copy in the mailbox, once there are at least so many."""
        inbox = self.folder / "mail" / "inbox" / "new"

        def missed() -> str:
            return f"{count} copies in {inbox}; the end of Postfix's log:\n{self.log[-3000:]}"

        wait_until(lambda: inbox.exists() and len(list(inbox.iterdir())) >= count, missed, timeout)
        return [Delivered.read(path) for path in inbox.iterdir()]

    def _lay_out(self) -> None:
        """The folders and files `postfix set-permissions` would make, and no more."""
        private = ("active", "bounce", "corrupt", "defer", "deferred", "flush", "hold", "incoming", "private", "saved")
        for name, owner, group, mode in [
            ("etc", "root", None, 0o755),
            ("queue", "root", None, 0o755),
            ("data", "postfix", None, 0o700),
            ("mail", "nobody", None, 0o700),
            *((f"queue/{name}", "postfix", None, 0o700) for name in (*private, "trace")),
            ("queue/pid", "root", None, 0o755),
            ("queue/maildrop", "postfix", "postdrop", 0o730),
            ("queue/public", "postfix", "postdrop", 0o710),
        ]:
            path = self.folder / name
            path.mkdir()
            path.chmod(mode)
            shutil.chown(path, owner, group)
        (cert, key), nobody = self._certificate, (self.folder / "mail").stat().st_uid
        relay = _RELAY_CF.format(port=self._relay_to) if self._relay_to else ""
        main_cf = _MAIN_CF.format(folder=self.folder, nobody=nobody, cert=cert, key=key)
        self._write("main.cf", main_cf + relay + self._sasl())
        self._write("master.cf", _MASTER_CF.format(port=self.port))

    def _write(self, name: str, text: str) -> None:
        """A file of the configuration, dated long ago: Postfix waits until a fresh one is two seconds old."""
        path = self.folder / "etc" / name
        path.write_text(text)
        os.utime(path, (0, 0))

    def _sasl(self) -> str:
        if not self._users:
            return ""
        folder = self.folder / "etc" / "sasl"
        folder.mkdir()
        passwords = folder / "users.db"
        for user, password in self._users.items():
            command = [found("saslpasswd2"), "-p", "-c", "-f", passwords, "-u", "postfix.test", user]
            subprocess.run(command, input=password.encode(), check=True, timeout=30)
        shutil.chown(passwords, "postfix")
        mechanisms = "pwcheck_method: auxprop\nauxprop_plugin: sasldb\nmech_list: PLAIN LOGIN CRAM-MD5\n"
        (folder / "smtpd.conf").write_text(f"{mechanisms}sasldb_path: {passwords}\n")
        return _SASL_CF.format(folder=folder)

    def _start(self, stack: contextlib.ExitStack) -> None:
        asked = [found("postconf"), "-c", self.folder / "etc", "-hx", "daemon_directory"]
        where = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        command = [f"{where}/master", "-c", self.folder / "etc", "-s"]
        with (self.folder / "master.out").open("wb") as out:  # it signals its whole process group when it ends
            outside = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out, "start_new_session": True}
            master = subprocess.Popen(command, cwd=self.folder / "queue", **outside)
        stack.callback(self._stop, master)
        wait_until(lambda: self._greets(master), lambda: f"Postfix's greeting; its log:\n{self.log[-3000:]}")

    def _greets(self, master: subprocess.Popen[bytes]) -> bool:
        if master.poll() is not None:
            output = (self.folder / "master.out").read_text()
            pytest.fail(f"Postfix ended with status {master.returncode}:\n{output}{self.log}")
        with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 10) as line:
            return line.recv(4) == b"220 "
        return False

    def _stop(self, master: subprocess.Popen[bytes]) -> None:
        master.terminate()
        try:
            master.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(master.pid, signal.SIGKILL)
            master.wait(10)


# What arrives stays as it was sent, a Bcc header that should not be there included.
_MAIN_CF = """\
compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
maillog_file = {folder}/log
maillog_file_prefixes = {folder}
myhostname = postfix.test
mydestination =
mynetworks = 127.0.0.0/8
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
alias_maps =
alias_database =
virtual_mailbox_domains = static:all
virtual_mailbox_maps = static:inbox/
virtual_mailbox_base = {folder}/mail
virtual_uid_maps = static:{nobody}
virtual_gid_maps = static:{nobody}
virtual_mailbox_limit = 0
message_size_limit = 60000000
message_drop_headers =
local_header_rewrite_clients =
smtpd_relay_restrictions = permit_mynetworks, reject
strict_smtputf8 = yes
in_flow_delay = 0
smtpd_tls_security_level = may
smtpd_tls_cert_file = {cert}
smtpd_tls_key_file = {key}
smtpd_tls_received_header = yes
"""

# It delivers nothing itself, but gives all to another server of this machine.
_RELAY_CF = """\
virtual_mailbox_domains =
relayhost = [127.0.0.1]:{port}
"""

_SASL_CF = """\
cyrus_sasl_config_path = {folder}
smtpd_sasl_auth_enable = yes
smtpd_sasl_local_domain = postfix.test
smtpd_client_restrictions = permit_sasl_authenticated, reject
"""

_MASTER_CF = """\
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
virtual   unix      - n n - - virtual
smtp      unix      - - n - - smtp
anvil     unix      - - n - 1 anvil
postlog   unix-dgram n - n - 1 postlogd
"""


# --- PostgreSQL ----------------------------------------------------------


class PostgresServer:
    """A PostgreSQL of the test's own, on a port and a Unix socket (in `folder`) of its own; as root it runs as nobody.

    The role `mailproxy` owns the databases and has no other rights; the role `guarded` must give its password.
    POSTGRES_BIN, a folder of programs, chooses another version than Debian's newest.
    """

    def __init__(self, **settings: object) -> None:
        self.host, self.port = "127.0.0.1", int(settings.get("port", 0)) or free_port()
        given = {"listen_addresses": self.host, "port": self.port, "fsync": "off", "full_page_writes": "off"}
        given |= {"autovacuum": "off", "shared_buffers": "32MB", "max_connections": 400}  # for the life of a test
        self._settings = {**given, **settings}
        self._databases, self._used = itertools.count(1), collections.defaultdict[bool, list[str]](list)
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def programs() -> Path:
        """Where they are; skips the test (or fails it, where servers were promised) when they are nowhere."""
        newest = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), default="")
        folder = Path(os.environ.get("POSTGRES_BIN", newest))
        needs(*(str(folder / program) for program in ("initdb", "postgres")))
        return folder

    def __enter__(self) -> PostgresServer:
        with contextlib.ExitStack() as stack:
            self._programs = self.programs()
            self.folder = stack.enter_context(open_folder("mailproxy-postgres-", in_memory=True))
            self._outside: dict[str, Any] = {"cwd": self.folder, "env": {"PATH": os.defpath, "LC_ALL": "C"}}
            if os.geteuid() == 0:  # which initdb refuses
                self._outside.update(user="nobody", group="nogroup", extra_groups=[])
                shutil.chown(self.folder, "nobody")
            self.lay_out("initdb", "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
            hba = "local all all trust\nhost all guarded all scram-sha-256\nhost all,replication all all trust\n"
            (self.folder / "data" / "pg_hba.conf").write_text(hba)
            self.start()
            stack.callback(self.stop, signal.SIGQUIT)
            self.run("CREATE ROLE mailproxy LOGIN", "CREATE ROLE guarded LOGIN PASSWORD 'open sesame'")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def lay_out(self, program: str, *words: str) -> None:
        """Make the folder of the data by initdb or pg_basebackup."""
        command = [self._programs / program, "-D", self.folder / "data", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, **self._outside)
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        """Start it and wait until it takes connections."""
        options = [word for name, value in self._settings.items() for word in ("-c", f"{name}={value}")]
        command = [self._programs / "postgres", "-D", self.folder / "data", "-k", self.folder, *options]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._outside)
        wait_until(self._answers, lambda: f"PostgreSQL; its log:\n{(self.folder / 'log').read_text()[-3000:]}")

    def stop(self, how: int = signal.SIGINT) -> None:
        """SIGTERM waits for its clients, SIGINT (fast) sends them away, SIGQUIT (immediate) is a crash."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(30)

    def restart(self, how: int = signal.SIGINT) -> None:
        self.stop(how)
        self.start()

    def url(self, database: str, role: str = "mailproxy", port: int | None = None) -> str:
        return f"postgresql://{role}@{self.host}:{port or self.port}/{database}"

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"test_{os.getpid()}_{next(self._databases)}"
        self.run(f"CREATE DATABASE {name} OWNER mailproxy")
        return self.url(name)

    @contextlib.contextmanager
    def lending(self, *, tables: bool = True) -> Iterator[Callable[[], str]]:
        """Makes databases with the tables of a new queue, or with none, in a tenth of their time where one that was
        given back is emptied."""
        lent: list[str] = []

        def lend() -> str:
            if not self._used[tables]:
                lent.append(self.new_database().rpartition("/")[2])
                if tables:
                    mailproxy.queue_file(self.url(lent[-1]), {}, observe_commit=lambda seconds: None).examine(make=True)
                    self.run(KEEP_TABLES, database=lent[-1])
                return self.url(lent[-1])
            name = self._used[tables].pop()
            lent.append(name)
            others = "datname = current_database() AND pid <> pg_backend_pid()"
            self.run(
                f"ALTER DATABASE {name} RESET ALL", f"ALTER DATABASE {name} OWNER TO mailproxy",
                f"SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE {others}",  # noqa: S608
                *([EMPTY_TABLES] if tables else DROP_TABLES), database=name,
            )  # fmt: skip
            return self.url(name)

        yield lend
        self._used[tables] += lent

    def run(self, *statements: str, database: str = "postgres") -> None:
        """Run statements as the superuser, each in a transaction of its own."""
        with psycopg.connect(self.url(database, "postgres"), autocommit=True, options=WRITABLE) as connection:
            for statement in statements:
                connection.execute(statement)

    def _answers(self) -> bool:
        assert self.process
        assert self.process.poll() is None, (self.folder / "log").read_text()[-3000:]
        with contextlib.suppress(psycopg.OperationalError):
            self.run("SELECT 1")
            return True
        return False


WRITABLE = "-c default_transaction_read_only=off"
DROP_TABLES = (
    "DROP SCHEMA public CASCADE", "CREATE SCHEMA public AUTHORIZATION pg_database_owner",
    "GRANT USAGE ON SCHEMA public TO PUBLIC",
)  # fmt: skip
KEEP_TABLES = """DO $$ DECLARE name text; BEGIN  -- as they are
    CREATE SCHEMA untouched;
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP
        EXECUTE format('CREATE TABLE untouched.%1$I AS TABLE public.%1$I', name);
    END LOOP;
END $$"""
EMPTY_TABLES = """DO $$ DECLARE name text; BEGIN  -- but for what was kept
    SET LOCAL session_replication_role = replica;  -- without their triggers
    FOR name IN SELECT tablename FROM pg_tables WHERE schemaname = 'public' LOOP
        IF pg_relation_size(name::regclass) > 100000 THEN
            EXECUTE format('TRUNCATE %I', name);
        ELSE
            EXECUTE format('DELETE FROM %I', name);  -- in less time
        END IF;
        EXECUTE format('INSERT INTO %1$I TABLE untouched.%1$I', name);
    END LOOP;
END $$"""


class PgBouncer:
    """A pgbouncer before the server, in transaction mode: each transaction may get another session."""

    def __init__(self, server: PostgresServer, pool_size: int = 10) -> None:
        self._server, self._pool_size, self.port = server, pool_size, free_port()

    def __enter__(self) -> PgBouncer:
        needs("pgbouncer")
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(open_folder("mailproxy-pgbouncer-"))
            lines = {
                "listen_addr": self._server.host, "listen_port": self.port, "unix_socket_dir": "", "auth_type": "any",
                "pool_mode": "transaction", "default_pool_size": self._pool_size, "max_client_conn": 200,
                "logfile": folder / "log", "server_round_robin": 1, "ignore_startup_parameters": "extra_float_digits",
            }  # fmt: skip
            where = f"host={self._server.host} port={self._server.port} user=mailproxy"
            text = "".join(f"{name} = {value}\n" for name, value in lines.items())
            (folder / "ini").write_text(f"[databases]\n* = {where}\n[pgbouncer]\n{text}")
            outside: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            if os.geteuid() == 0:
                outside.update(user="nobody", group="nogroup", extra_groups=[])
                shutil.chown(folder, "nobody")
            process = subprocess.Popen([found("pgbouncer"), "-q", folder / "ini"], **outside)
            stack.callback(process.wait, 30)
            stack.callback(process.kill)
            wait_until(self._listens, "pgbouncer to listen")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection((self._server.host, self.port), 10):
            return True
        return False


class NamedRow(dict[str, Any]):
    """A row whose columns have names and places, as those of sqlite3.Row."""

    @classmethod
    def factory(cls, cursor: psycopg.Cursor[Any]) -> Callable[[Sequence[Any]], NamedRow]:
        names = [column.name for column in cursor.description or ()]
        return lambda values: cls(zip(names, values, strict=True))

    def __missing__(self, place: int) -> Any:
        return list(self.values())[place]


class Storage:
    """What daemons and queues of the tests take for db_path: a file in their folder, if no test says otherwise."""

    place: Callable[..., str] = staticmethod(lambda folder, tables=True: str(folder / "queue.db"))


# --- the rigs as fixtures ------------------------------------------------


@pytest.fixture(scope="session")
def postgres_server(together: Path) -> Iterator[PostgresServer]:
    """One for all tests of all processes; a test that breaks it makes another."""
    port, lock = together / "postgres.port", together / "postgres.lock"
    with contextlib.ExitStack() as stack, (together / "postgres.users").open("w") as users:
        with locked(lock):
            if ours := not port.exists():
                server = stack.enter_context(PostgresServer())
                port.write_text(str(server.port))
            else:
                server = PostgresServer(port=port.read_text())
                fcntl.flock(users, fcntl.LOCK_SH)
        yield server
        if ours:
            with locked(lock):
                port.unlink()
            fcntl.flock(users, fcntl.LOCK_EX)  # when the others are done


@pytest.fixture(scope="session")
def pgbouncer(postgres_server: PostgresServer) -> Iterator[PgBouncer]:
    """One before that, in transaction mode."""
    with PgBouncer(postgres_server) as pooler:
        yield pooler


@pytest.fixture
def postgres(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database."""
    with postgres_server.lending(tables=False) as lend:
        yield lend()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test on each engine: its daemons and queues have a file, or a database, for each folder."""
    kind = str(request.param)
    if kind == "sqlite":
        yield kind
        return
    server = request.getfixturevalue("postgres_server")
    port = request.getfixturevalue("pgbouncer").port if kind == "pgbouncer" else server.port
    with server.lending() as lend, server.lending(tables=False) as lend_empty:
        databases: dict[Path, str] = {}

        def place(folder: Path, tables: bool = True) -> str:
            if folder not in databases:
                make = server.new_database if kind == "pgbouncer" else lend if tables else lend_empty
                databases[folder] = make().replace(f":{server.port}/", f":{port}/")
            return databases[folder]

        monkeypatch.setattr(Storage, "place", place)
        yield kind


def on(*engines: str) -> Callable[[Callable[..., Any]], Any]:
    """Runs a test on these engines."""
    parameters = pytest.mark.parametrize("engine", engines, indirect=True)
    return lambda test: pytest.mark.usefixtures("engine")(parameters(test))


both_engines, only_sqlite, also_pgbouncer = on(*ENGINES), on("sqlite"), on(*ENGINES, "pgbouncer")


@pytest.fixture(scope="session")
def ca(tmp_path_factory: pytest.TempPathFactory) -> PrivateCA:
    """A certificate authority of the tests' own."""
    return PrivateCA(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def smtp() -> Iterator[SmtpServer]:
    """A mail server whose behaviour the recipient's address chooses."""
    with SmtpServer() as server:
        yield server


@pytest.fixture
def reports() -> Iterator[ReportReceiver]:
    """The upstream that receives the delivery reports."""
    with ReportReceiver() as receiver:
        yield receiver


@pytest.fixture
def daemon(tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver) -> Iterator[Daemon]:
    """The daemon between the two, as it comes out of the box."""
    with Daemon(tmp_path, smtp=smtp, reports=reports) as running:
        yield running


# ======================================================================
# SOURCE - the file can be read downward, and its papers are true
# ======================================================================

SOURCE = PROGRAM.read_text(encoding="utf-8")
BANNER = re.compile(r"^# =+\n# ([A-Z][A-Z ]+?) - .+\n# =+\n#", re.MULTILINE)
LONGEST_FUNCTION = 60  # lines
ROOMS = {SOURCE.count("\n", 0, found.start()) + 1: found[1] for found in BANNER.finditer(SOURCE)}  # by first line


@functools.cache
def syntax_tree() -> ast.Module:
    return ast.parse(SOURCE)


def room_at(line: int) -> int:
    """The number of the room a line is in; 0 above all of them."""
    return bisect.bisect_right(list(ROOMS), line)


def names_bound_by(node: ast.stmt) -> list[str]:
    """The names a statement at module level defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [name.id for target in targets if target for name in ast.walk(target) if isinstance(name, ast.Name)]


def names_used(node: ast.AST, bound: frozenset[str] = frozenset()) -> Iterator[tuple[str, int]]:
    """The names of the module that code uses, annotations left out: they are never evaluated."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        inner = list(ast.walk(node))
        bound |= {found.arg for found in inner if isinstance(found, ast.arg)}
        bound |= {found.id for found in inner if isinstance(found, ast.Name) and not isinstance(found.ctx, ast.Load)}
        bound |= {found.name for found in inner if isinstance(found, ast.ExceptHandler) and found.name}
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in bound:
        yield node.id, node.lineno
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and name not in ("annotation", "returns"):
                yield from names_used(child, bound)


def test_a_room_never_names_a_room_below_it_and_no_name_is_bound_twice() -> None:
    bound = [(name, room_at(node.lineno)) for node in syntax_tree().body for name in names_bound_by(node)]
    room_of = dict(bound)

    titles = ["FRONT DOOR", *ROOMS.values()]
    downward = [
        f"line {line}: {titles[room_at(line)]} names {name} of {titles[room_of[name]]}"
        for node in syntax_tree().body
        for name, line in names_used(node)
        if room_of.get(name, 0) > room_at(line)
    ]

    assert len(room_of) > 500
    assert downward == []
    assert [name for name, times in Counter(name for name, _ in bound).items() if times > 1] == []


def test_the_rooms_stand_in_the_order_of_the_map_at_the_front_door() -> None:
    paragraph = (mailproxy.__doc__ or "").partition("from the top of this file to its end")[2]
    map_lines = [line for line in paragraph.splitlines() if line.startswith("    ")]

    on_the_map = [room for line in map_lines for room in re.split(r"  +", line.strip())[0].split(", ")]

    assert on_the_map == list(ROOMS.values())


def test_a_function_fits_on_a_screen() -> None:
    functions = [node for node in ast.walk(syntax_tree()) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]

    lines = {f"{node.name} at {node.lineno}": (node.end_lineno or 0) - node.lineno + 1 for node in functions}

    assert {name: count for name, count in lines.items() if count > LONGEST_FUNCTION} == {}


def test_the_file_keeps_the_budget_that_the_readme_names() -> None:
    budget = re.search(r"budget of\s+([0-9,]+) lines", PROGRAM.with_name("README.md").read_text(encoding="utf-8"))

    assert budget
    assert len(SOURCE.splitlines()) <= int(budget[1].replace(",", "")) <= 12_300


def test_the_tables_of_the_pages_are_those_of_the_program() -> None:
    printed = {name: table for text in PAGES.values() for name, _, table in PRINTED.findall(text)}

    assert printed == {name: table() for name, table in TABLES_OF_PAGES.items()}, write_papers.__doc__


def test_the_links_of_the_pages_lead_somewhere() -> None:
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            leads_to = (README.parent / page).parent / path if path else README.parent / page
            assert leads_to.exists(), f"{page}: {target}"
            if anchor:
                assert anchor in heading_anchors(leads_to.read_text(encoding="utf-8")), f"{page}: {target}"


def test_the_readme_is_short_and_leads_to_each_page() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 200
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in PAGES["README.md"]


def test_no_private_name_of_the_standard_library_is_used() -> None:
    tree = syntax_tree()
    own = {"_make", "_asdict", "_replace", "_field_defaults", "_exit"}  # which are documented
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    own |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}

    used = {ast.unparse(node) for node in attributes if re.match("_[^_]", node.attr) and node.attr not in own}
    overridden = [
        f"{kind.__qualname__}.{name}"
        for kind in vars(mailproxy).values()
        if isinstance(kind, type) and kind.__module__ == mailproxy.__name__
        for base in kind.__mro__[1:]
        if base.__module__ != mailproxy.__name__
        for name in vars(kind).keys() & vars(base).keys() - {"_abc_impl", "_is_protocol"}
        if re.match("_[^_]", name) and not issubclass(kind, enum.Enum | tuple)
    ]

    assert (used, overridden) == (set(), [])


def test_nothing_at_module_level_can_change() -> None:
    """Tables may be dicts that nobody writes to; what begins empty is there to be filled."""
    assigned = [node for node in syntax_tree().body if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]

    assert [ast.unparse(node) for node in assigned if ast.unparse(node.value) in ("{}", "[]")] == []
    assert not [node for node in ast.walk(syntax_tree()) if isinstance(node, ast.Global)]


# ======================================================================
# SETTINGS
# ======================================================================


def written(folder: Path, text: str, name: str = "config.ini") -> str:
    """A config file with this text; its path."""
    path = folder / name
    path.write_bytes(text.encode())
    return str(path)


def loaded(folder: Path, text: str = "", environ: dict[str, str] | None = None, **overrides: str):
    named = {name.replace("__", "."): value for name, value in overrides.items()}
    return mailproxy.load_settings(written(folder, text), environ or {}, named)


def refusal(folder: Path, text: str = "", environ: dict[str, str] | None = None, **overrides: str) -> str:
    """The sentence with which these settings are refused."""
    with pytest.raises(mailproxy.ConfigurationError) as caught:
        loaded(folder, text, environ, **overrides)
    return str(caught.value)


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nothing = mailproxy.load_settings(None, {}, {})
    text = "[server]\nport = 1001\nmax_batch = 7\n[delivery]\nmax_retries = 4\n"
    environ = {"MAILPROXY_SERVER_PORT": "1002", "MAILPROXY_SERVER_MAX_BATCH": "8", "MAILPROXY_DELIVERY_MAX_RETRIES": ""}
    all_three = loaded(tmp_path, text, environ, server__port="1003")

    assert (nothing.server.host, nothing.server.port, nothing.storage.db_path) == (
        "127.0.0.1",
        8000,
        f"{tmp_path}/mailproxy.db",
    )
    assert nothing.delivery.retry_delays == (60, 300, 900, 3600, 7200)
    assert nothing.attachments.max_attachment_bytes == 25 * 1024 * 1024
    assert (nothing.client.client_sync_url, dict(nothing.accounts)) == (None, {})
    assert (nothing.source, nothing.warnings) == (None, ())
    assert (all_three.server.port, all_three.server.max_batch) == (1003, 8)
    assert (all_three.delivery.max_retries, all_three.delivery.max_concurrency) == (4, 100)


def test_the_file_is_the_named_one_else_that_of_the_variable_else_that_of_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "[server]\nport = 1\n")
    variable = {"MAILPROXY_CONFIG": written(tmp_path, "[server]\nport = 2\n", "b.ini")}
    named = written(tmp_path, "\ufeff[server]\r\nport = 3\r\n", "a.ini")

    for port, config, environ in [(1, None, {}), (2, None, variable), (3, named, variable)]:
        settings = mailproxy.load_settings(config, environ, {})
        assert (settings.server.port, settings.warnings) == (port, ())
    for config, environ in [("/nowhere/else.ini", {}), (None, {"MAILPROXY_CONFIG": "/nowhere/else.ini"})]:
        with pytest.raises(mailproxy.ConfigurationError, match=r"/nowhere/else.ini: cannot be read: No such file"):
            mailproxy.load_settings(config, environ, {})
    (tmp_path / "config.ini").write_bytes("[smtp]\npassword = pässword\n".encode("latin-1"))
    with pytest.raises(mailproxy.ConfigurationError, match=r"config.ini: is not UTF-8 text"):
        mailproxy.load_settings(None, {}, {})


VALUES = [
    ("server", "port", "0", 0),
    ("server", "host", "[::1]", "::1"),
    ("server", "tls_cert", "", None),
    *(("scheduler", "active", text, value) for text, value in [("No", False), ("on", True), ("0", False)]),
    ("delivery", "send_interval_seconds", "0.05", 0.05),
    *(("delivery", "default_priority", text, value) for text, value in [("High", 1), ("3", 3)]),
    ("delivery", "retry_delays", "1, 2,3", (1, 2, 3)),
    ("delivery", "allow_recipients", "A@B.example @Bücher.example", ("a@b.example", "@xn--bcher-kva.example")),
    ("delivery", "redirect_to", "All@bücher.example", "All@xn--bcher-kva.example"),
    ("attachments", "allow_hosts", "files.example, 10.0.0.0/8, ::1", ("files.example", "10.0.0.0/8", "::1")),
    ("attachments", "allow_hosts", "a.example\n  b.example", ("a.example", "b.example")),
    ("logging", "level", "DEBUG", "debug"),
    ("logging", "format", "JSON", "json"),
    ("client", "client_sync_url", "http://127.0.0.1:9/x?y=1", "http://127.0.0.1:9/x?y=1"),
    ("client", "client_sync_user", "100% ; # mine", "100% ; # mine"),
    ("s3", "addressing", "Virtual", "virtual"),
    ("sendmail", "aliases", "Root: ops@b.example,\n  www-data :Web@Bücher.example",
        ("root: ops@b.example", "www-data: Web@xn--bcher-kva.example")),
]  # fmt: skip


@pytest.mark.parametrize(("section", "key", "text", "value"), VALUES)
def test_a_value_becomes_what_its_setting_is(tmp_path, section, key, text, value):
    settings = loaded(tmp_path, f"[{section}]\n{key} = {text}\n")

    assert getattr(getattr(settings, section), key) == value


WRONG_VALUES = [
    ("server port", ["http", "65536", "-1", "8_000"], '"{}" is not a whole number from 0 to 65535'),
    ("server port", [""], "is empty; it must be a whole number"),
    ("server host", ["a b", "127.0.0.1:80", "*", "[]"], '"{}" is not the name or the address of a server'),
    ("server host", [""], "is empty; it must be the name or the address of a server"),  # it would be all addresses
    ("server unix_socket", ["/x" * 60], "is not a path of at most 103 bytes"),
    ("server tls_cert", ["/nowhere.pem"], '"{}" is not the path of a file that can be read'),
    ("server tls_cert", [__file__], "requires tls_key"),
    ("server tls_key", [__file__], "requires tls_cert"),
    ("server api_token", ["env:NOT_SET"], "{} is not set"),
    ("server api_token", ["file:/nowhere"], "{} cannot be read: No such file"),
    ("server api_token", ["tökén"], "a token must be ASCII"),
    ("scheduler active", ["maybe"], '"{}" is not true or false'),
    ("delivery send_interval_seconds", ["0", "nan", "inf", "1.2.3"], "is not a number of seconds from 0.01"),
    ("delivery retry_delays", ["1,soon", ","], '"{}" is not a list of whole seconds'),
    ("delivery retry_delays", [""], "is empty"),
    ("delivery default_priority", ["4"], "is not 0 to 3, or immediate, high, medium, low"),
    ("delivery redirect_to", ["nobody", "<a@b.test>"], '"{}" is not a mail address'),
    ("delivery allow_recipients", ["a@b, c", "<a@b.test>"], "is not a list of mail addresses or @domains"),
    ("delivery max_retries", ["1\n  2"], "continues on several lines"),
    (
        "attachments allow_hosts",
        ["10.0.0.0/33", "http://files.example/", "ü" * 64, "[1::2::3]", "."],
        "is not a list of host names",
    ),
    ("logging level", ["loud"], '"{}" is not one of debug, info, warning, error'),
    ("client client_sync_url", ["ftp://x/"], '"{}" is not an http:// or https:// URL'),
    ("client client_sync_url", ["//x/", "http://x:99999/"], "is not an http:// or https:// URL"),
    ("client client_sync_url", ["https://u:hunter2@x/", "htp://x/?token=hunter2"], "the value is not an http:// or"),
    ("s3 endpoint", ["https://u:hunter2@x/"], "the value is not an http:// or https:// URL without user"),
    ("smtp host", ["smtp://u:hunter2@x"], "the value is not the name or the address of a server"),
    ("smtp oauth2_token_url", ["htp://u:hunter2@x"], "the value is not an http or https URL"),
    ("storage db_path", ["postgre://u:hunter2@x/y"], "the value is not a path, or the URL of a PostgreSQL database"),
    ("client client_sync_user", ["a\x01b"], "is not text on one line"),
    ("client client_sync_user", ["a:b"], "must not hold a colon"),
    ("client client_sync_password", ["env:"], "the value is not a secret"),
    ("client client_sync_password", ["env:NOT_SET"], "{} is not set"),
    ("client client_sync_password", ["x"], "requires client_sync_user"),
    ("client client_sync_token", ["file:/"], "{} is not a regular file"),
    ("client client_sync_token", ["two words"], "must be ASCII without spaces"),
    ("client client_sync_secret", ["whsec_?", "whsec_", "whsec_A", "hunter2", "open sesame"], "must be base64, with"),
    ("client client_sync_secret", ["YWI-", "YQ", "whsec_whsec_YQ==", "YQ==YQ==", "whsec_Yé=="], "must be base64, with"),
    ("sendmail aliases", ["root", "root: ops", "a@b: c@d", ": a@b"], "is not a list of pairs such as root: ops@"),
    ("sendmail spool", ["spool"], '"{}" is not an absolute path'),
    ("server submit_socket", ["/x" * 60], "is not a path of at most 103 bytes"),
    ("smtp port", ["0"], '"{}" is not a whole number from 1 to 65535'),
    ("account:a start_tls", ["often"], '"{}" is not one of auto, required, never'),
]


@pytest.mark.parametrize(("name", "text", "problem"), [(a, text, c) for a, texts, c in WRONG_VALUES for text in texts])
def test_a_wrong_value_is_refused_with_file_section_key_and_what_it_should_be(tmp_path, name, text, problem):
    section, key = name.split()

    sentence = refusal(tmp_path, f"[{section}]\n{key} = {text}\n")

    assert sentence.startswith(f"{tmp_path}/config.ini: [{section}] {key}: ")
    assert problem.format(text) in sentence
    assert not any(secret in sentence for secret in ("two words", "tökén", "hunter2", "sesame", "YQ"))


OF_THE_FILE, OF_THE_ENVIRONMENT = "[server]\nport = http\n", {"MAILPROXY_SERVER_PORT": "x"}
ORIGINS = [
    (OF_THE_FILE, {"MAILPROXY_SERVER_PORT": "1"}, {"server__port": "2"}, '{}/config.ini: [server] port: "http" is not'),
    ("", OF_THE_ENVIRONMENT, {}, 'environment variable MAILPROXY_SERVER_PORT: [server] port: "x" is not'),
    ("", OF_THE_ENVIRONMENT, {"server__port": "2"}, "environment variable MAILPROXY_SERVER_PORT: [server] port: "),
    ("", {}, {"server__port": "x"}, 'command line: [server] port: "x" is not'),
    ("", {}, {"server__prot": "1"}, "command line: [server] prot: unknown key; did you mean port?"),
    ("", {}, {"port": "1"}, "command line: port: write SECTION.KEY=VALUE"),
]


@pytest.mark.parametrize(("text", "environ", "overrides", "start"), ORIGINS)
def test_a_wrong_value_says_where_it_stands_also_where_another_wins_over_it(tmp_path, text, environ, overrides, start):
    assert refusal(tmp_path, text, environ, **overrides).startswith(start.format(tmp_path))


UNKNOWN = [
    ("[server]\nprot = 1\n", "[server] prot: unknown key; did you mean port?"),
    ("[server]\nretry_delays = 1\n", "[server] retry_delays: unknown key; it belongs in [delivery]"),
    ("[smtp]\nusername = x\n", "[smtp] username: unknown key; did you mean user?"),
    ("[account:a]\nhost = x\ntenant_id = 3\n", "[account:a] tenant_id: unknown key"),
    ("[Server]\nport = 1\n", "[Server]: unknown section; did you mean server?"),
    ("[DEFAULT]\nport = 1\n", "[DEFAULT]: unknown section"),
    ("[deliverry]\n", "[deliverry]: unknown section; did you mean delivery?"),
    ("[account:default]\nhost = x\n", "the default account is the section [smtp]"),
    ("[account:a]\n", "[account:a]: is empty"),
    ("[server]\nport = 1\nport = 2\n", "[server] port: is given a second time in line 3"),
    ("[server]\nport = 1\nPORT = 2\n", "[server] port: is given a second time in line 3"),
    ("[server]\nport = 1\n[server]\n", "[server]: is given a second time in line 3"),
    ("[account:a]\nhost = x\n[account: a]\nhost = y\n", "[account:a]: is given a second time"),
    ("port = 1\n", "line 1 stands before the first [section]"),
    ("[client]\nhunter2-the-password\n", "line 2 is not of the form key = value"),
]


@pytest.mark.parametrize(("text", "problem"), UNKNOWN)
def test_what_cannot_be_read_or_is_not_known_is_refused_with_the_line_or_the_nearest_name(tmp_path, text, problem):
    sentence = refusal(tmp_path, text)

    assert sentence.startswith(f"{tmp_path}/config.ini: ")
    assert problem in sentence
    assert "hunter2" not in sentence


@pytest.mark.parametrize(
    ("text", "environ", "warnings"),
    [
        ("[smtp]\n", {"MAILPROXY_URL": "http://x", "MAILPROXY_TOKEN": "t"}, ()),
        ("[smtp]\nuser = me\n", {}, ("[smtp] has no host: there is no default account",)),
        ("", {"MAILPROXY_SERVER_PROT": "s3cret"}, (
            "environment variable MAILPROXY_SERVER_PROT matches no setting and is ignored; "
            "did you mean MAILPROXY_SERVER_PORT?",
        )),
        ("[client]\nclient_sync_user = 'me'\n[account:a]\nhost = a\nuser = it's\npassword = env:QUOTED\n", {"QUOTED": '"x"'}, (
            "{}: [client] client_sync_user: the quotes are a part of the value; are they meant to be?",
            "{}: [account:a] password: the quotes are a part of the value; are they meant to be?",
        )),
    ],
)  # fmt: skip
def test_what_is_likely_a_mistake_is_a_warning(tmp_path, text, environ, warnings):
    settings = loaded(tmp_path, text, environ)

    told = tuple(warning.format(tmp_path / "config.ini") for warning in warnings)
    assert ("default" in settings.accounts, settings.warnings) == (False, told)


def test_the_queue_lies_beside_the_config_file_unless_one_lies_in_the_working_directory_from_before(
    tmp_path, monkeypatch
):
    (tmp_path / "etc").mkdir()
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    beside, here, other = (
        tmp_path / "etc" / "mailproxy.db",
        tmp_path / "run" / "mailproxy.db",
        tmp_path / "run" / "config.ini",
    )

    def found(text: str = "", config: str | None = "../etc/config.ini", **environ: str) -> tuple[str, Sequence[str]]:
        written(tmp_path / "etc", text)
        settings = mailproxy.load_settings(config, environ, {})
        return settings.storage.db_path, settings.warnings

    assert found() == found("[storage]\ndb_path =\n") == (str(beside), ())
    assert found(config=None) == found(config="/dev/null") == (str(here), ())
    assert found(config=None, MAILPROXY_CONFIG="../etc/config.ini") == (str(beside), ())
    here.touch()
    path, (warning,) = found()
    assert path == str(here)
    assert f"the queue is {here}, not {beside}: move it there" in warning
    assert found("[storage]\ndb_path = ./mine.db\n") == ("./mine.db", ())  # of the working directory, as any path
    assert found(MAILPROXY_STORAGE_DB_PATH="/x/mine.db") == ("/x/mine.db", ())
    other.touch()
    assert found(config=None) == (str(here), ())
    beside.touch()
    assert found() == (str(beside), ())


def test_accounts_are_handed_on_as_they_were_written_also_where_a_secret_is_missing(tmp_path):
    text = (
        "[smtp]\nhost = a.example\nport: 25\npassword = env:NO\n[s3]\nsecret_access_key = file:/no\n"
        "[account:second one]\nhost = b.example\nretry_delays = 1,2\n"
    )

    settings = loaded(tmp_path, text, {"MAILPROXY_SMTP_PORT": "2525"}, **{"account:second one__port": "26"})

    assert {name: dict(keys) for name, keys in settings.accounts.items()} == {
        "default": {"host": "a.example", "port": "2525", "password": "env:NO"},
        "second one": {"host": "b.example", "port": "26", "retry_delays": "1,2"},
    }


def test_without_a_token_only_this_machine_may_come_in(tmp_path):
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost", "LOCALHOST"):
        assert loaded(tmp_path, f"[server]\nhost = {host}\n").server.api_token == ()
    for host in ("0.0.0.0", "::", "10.1.2.3", "mail.example"):
        sentence = refusal(tmp_path, f"[server]\nhost = {host}\n")
        assert f"[server] host: {host} can be reached from outside" in sentence
        assert "set api_token" in sentence
        loaded(tmp_path, f"[server]\nhost = {host}\napi_token = t\n")
        loaded(tmp_path, f"[server]\nhost = {host}\nunix_socket = /run/x.sock\n")


def test_a_client_of_the_daemon_may_read_what_the_daemon_could_not_start_with(tmp_path):
    path = written(tmp_path, "[server]\nhost = ::\nport = 81\n[client]\nclient_sync_token = file:/nowhere\n")

    assert mailproxy.read_settings(path, {}, {}).server.port == 81


def test_several_tokens_are_valid_at_a_time_wherever_they_stand(tmp_path):
    (tmp_path / "token").write_text("in-file-1 in-file-2\n")
    environ = {"OLD": "from-env"}
    settings = loaded(tmp_path, f"[server]\napi_token = plain, env:OLD file:{tmp_path}/token, plain\n", environ)

    assert mailproxy.api_tokens(settings, environ) == ("plain", "from-env", "in-file-1", "in-file-2")


def test_a_secret_is_itself_or_in_the_environment_or_in_a_file_without_its_last_line_end(tmp_path):
    path, key = tmp_path / "secret", bytes(range(24))
    for content, secret in [("s3cret", "s3cret"), ("s\n", "s"), ("s\r\n", "s"), ("s\n\n", "s\n"), (" s3 é ", " s3 é ")]:
        for encoding in "utf-8", "utf-8-sig":  # which Windows writes
            path.write_bytes(content.encode(encoding))
            assert mailproxy.reveal(mailproxy.Secret(f"file:{path}"), {}) == secret

    assert mailproxy.reveal(mailproxy.Secret("env:X"), {"X": "s3cret"}) == "s3cret"
    assert mailproxy.reveal(mailproxy.Secret("environment"), {}) == "environment"
    assert mailproxy.webhook_key("whsec_" + base64.b64encode(key).decode()) == key
    for written in ("whsec_YWI=", "whsec_YWI", "YWI="):
        assert mailproxy.webhook_key(written) == b"ab"


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("env:NOT_SET", "env:NOT_SET is not set"),
        ("file:{}/none", "cannot be read: No such file or directory"),
        ("file:{}", "is not a regular file"),
        ("file:{}/pipe", "is not a regular file"),
        ("file:{}/empty", "is empty"),
        ("file:{}/latin", "is not UTF-8 text"),
    ],
)
def test_a_secret_that_cannot_be_read_is_named_by_its_reference(tmp_path, reference, problem):
    os.mkfifo(tmp_path / "pipe")
    for name, content in [("empty", b"\n"), ("latin", b"p\xe4ss")]:
        (tmp_path / name).write_bytes(content)

    with pytest.raises(mailproxy.SecretUnavailable, match=problem):
        mailproxy.reveal(mailproxy.Secret(reference.format(tmp_path)), {})


def test_the_aws_variables_stand_in_for_what_s3_leaves_out(tmp_path):
    environ = {
        "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_SESSION_TOKEN": "session",
        "AWS_DEFAULT_REGION": "eu-south-1", "AWS_REGION": "eu-west-1", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000",
    }  # fmt: skip
    own = "[s3]\naccess_key_id = mine\nsecret_access_key = own\nregion = r\n"

    for text, told in [("[s3]\naccess_key_id =\n", "id key session eu-west-1"), (own, "mine own None r")]:
        s3 = loaded(tmp_path, text, environ).s3
        secrets = (s3.access_key_id, s3.secret_access_key, s3.session_token)
        values = [secret and mailproxy.reveal(secret, environ) for secret in secrets]
        assert " ".join(map(str, [*values, s3.region])) == told
        assert s3.endpoint == "http://127.0.0.1:9000"


def test_no_secret_is_in_what_is_described_or_printed(tmp_path):
    text = (
        "[server]\napi_token = hunter2a, env:TOKEN\n"
        "[client]\nclient_sync_url = http://127.0.0.1/x?key=hunter2b\nclient_sync_user = me\n"
        "client_sync_password = hunter2c\nclient_sync_secret = hunter2dhunter2d\n"
        "[smtp]\nhost = a\npassword = hunter2e\n[account:x]\nhost = b\npassword = file:/run/x\n"
        "oauth2_client_secret = hunter2f\noauth2_refresh_token = hunter2g\n[s3]\nsecret_access_key = hunter2h\n"
        "[account:y]\noauth2_token_url = https://c:hunter2j@x.org/t?key=hunter2k\n"
    )
    settings, config = loaded(tmp_path, text, {"TOKEN": "hunter2i"}), f"{tmp_path}/config.ini"

    rows = list(mailproxy.describe(settings))

    assert "hunter2" not in repr(rows)
    assert "hunter2" not in repr(settings).replace("key=hunter2b", "")
    assert set(rows) >= {
        ("server", "api_token", "(set), env:TOKEN", config),
        ("client", "client_sync_url", "http://127.0.0.1/x?...", config),
        ("smtp", "password", "(set)", config),
        ("account:x", "password", "file:/run/x", config),
        ("account:y", "oauth2_token_url", "https://c@x.org/t?...", config),
        ("server", "port", "8000", "default"),
    }


def test_what_only_a_restart_can_change_is_named(tmp_path):
    old = loaded(tmp_path, "[server]\nport = 81\n[logging]\nlevel = debug\n")
    new = loaded(tmp_path, "[server]\nport = 82\nunix_socket = /x\n[storage]\ndb_path = other.db\n")

    in_force, differ = mailproxy.renewed(old, new)

    assert differ == ["storage.db_path", "server.port", "server.unix_socket"]
    assert (in_force.server, in_force.logging.level) == (old.server, "info")
    assert mailproxy.renewed(old, old) == (old, [])


def test_bare_local_names_are_completed_by_sendmail_domain_from_and_aliases(tmp_path, monkeypatch):
    def names(text: str) -> mailproxy.LocalNames:
        return mailproxy.local_names(loaded(tmp_path, f"[sendmail]\n{text}").sendmail)

    named = names("domain = a.test\nfrom = no-reply@a.test\naliases = root: x@b.test, root: y@b.test\n")
    assert named.recipients("ROOT") == ["x@b.test", "y@b.test"]
    assert named.recipients("jo") == ["jo@a.test"]
    assert named.recipients("root@c.test") == ["root@c.test"]
    assert (named.sender_of("root"), named.sender_of("a@b")) == ("no-reply@a.test", "a@b")

    mailname = tmp_path / "mailname"
    mailname.write_text("m.test\n")
    monkeypatch.setattr(mailproxy, "MAILNAME", str(mailname))
    assert (names("").recipients("jo"), names("").sender_of("jo")) == (["jo@m.test"], "jo@m.test")

    mailname.unlink()
    monkeypatch.setattr(mailproxy.socket, "gethostname", lambda: "vm")
    monkeypatch.setattr(mailproxy.socket, "getfqdn", lambda name: "vm.h.test")
    assert names("").recipients("jo") == ["jo@vm.h.test"]
    monkeypatch.setattr(mailproxy.socket, "getfqdn", lambda name: "localhost")
    assert names("").sender_of("jo") == "jo@vm"
    with pytest.raises(mailproxy.Rejected, match="this host has no domain: set aliases"):
        names("").recipients("jo")


# config.ini and the table of docs/configuration.md are printed from the table of settings, by `write_papers` (see README).

CONFIG_INI_HEAD = """\
# config.ini of mailproxy: every setting with its meaning and its default.
# All of it may be left out. Take the # away to change a line.
#
# The command line wins over the environment, which wins over this file: [server] port
# is MAILPROXY_SERVER_PORT there, [smtp] host MAILPROXY_SMTP_HOST; for [account:ID] there
# are none. Any secret may be written env:NAME or file:/path. A # or ; begins a comment
# only at the start of a line, and % is a character like any other.
"""
CONFIG_INI_ACCOUNT = """\
# A further account, under the ID messages name it by. All keys of [smtp] are known here.
#[account:ID]
#host =
#port =
"""


def default_and_meaning(row: mailproxy.Setting) -> tuple[str, str]:
    """The default and the meaning of a setting, as config.ini and docs/configuration.md have them."""
    if row.else_of:
        return "", f"{row.meaning} Left out: {row.else_of} of [delivery]."
    return "" if row.default is mailproxy.NEEDED else mailproxy.as_written(row.default), row.meaning


def config_ini() -> str:
    """A config.ini with every setting in it, commented out, with its meaning and default."""
    lines = [CONFIG_INI_HEAD]
    for section, kind in mailproxy.CLASSES.items():
        lines += [f"[{section}]", f"# {kind.__doc__}", ""]
        for row in mailproxy.TABLE[section]:
            default, meaning = default_and_meaning(row)
            words = f"{meaning} [{row.kind.words}{'; needs a restart' if row.at_start else ''}]"
            lines += textwrap.wrap(words, 98, initial_indent="# ", subsequent_indent="# ")
            lines += [f"#{row.key} = {default}".rstrip(), ""]
        if section == "smtp":
            lines += [CONFIG_INI_ACCOUNT]
    return "\n".join(lines).rstrip() + "\n"


def settings_table() -> str:
    """All settings as Markdown, a table for each section, for docs/configuration.md."""
    lines = []
    for section, kind in mailproxy.CLASSES.items():
        name = "[smtp] and [account:ID]" if section == "smtp" else f"[{section}]"
        lines += ["", f"### {name}", "", f"{kind.__doc__}", ""]
        lines += ["| setting | default | meaning | value |", "|---|---|---|---|"]
        for row in mailproxy.TABLE[section]:
            default, meaning = default_and_meaning(row)
            shown = f"`{default}`" if default else ""
            restart = " Needs a restart." if row.at_start else ""
            lines.append(f"| `{row.key}` | {shown} | {meaning}{restart} | {row.kind.words} |")
    return "\n".join(lines) + "\n"


def test_config_ini_holds_every_setting_with_its_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = config_ini()
    switched_on = re.sub(r"(?m)^#([a-z0-9_]+ =)", r"\1", printed.replace("#[account:ID]\n#host =\n#port =\n", ""))
    defaults = mailproxy.load_settings(None, {}, {})

    for read in (loaded(tmp_path, printed), loaded(tmp_path, switched_on)):
        for section in mailproxy.SECTIONS:
            assert getattr(read, section) == getattr(defaults, section)
    assert PROGRAM.with_name("config.ini").read_text(encoding="utf-8") == printed
    accounts = [("smtp", row.key) for row in mailproxy.ACCOUNT_TABLE]
    for section, key in [*((row.section, row.key) for row in mailproxy.SETTINGS_TABLE), *accounts]:
        assert f"\n#{key} =" in printed.partition(f"[{section}]\n")[2]


# ======================================================================
# SUBMISSION
# ======================================================================


NOON = 1_700_000_000.0


def submission_fields(**fields: Any) -> dict[str, Any]:
    """A message that passes, with these fields instead; None takes a field out."""
    whole = {"id": "m-1", "from": "a@example.com", "to": ["b@example.org"], "subject": "Hello", "body": "Hi\n"}
    return {name: value for name, value in {**whole, **fields}.items() if value is not None}


def parsed_submission(**fields: Any) -> mailproxy.Message:
    return mailproxy.parse_message(submission_fields(**fields), new_id=lambda: "new")


def reason_to_refuse(**fields: Any) -> str:
    with pytest.raises(mailproxy.Rejected) as rejected:
        parsed_submission(**fields)
    return str(rejected.value)


def as_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def test_a_plain_submission_becomes_a_message_with_all_defaults_settled() -> None:
    message = parsed_submission()
    ids = {mailproxy.parse_message(submission_fields()).message_id for _ in range(50)}

    assert (message.id, message.account_id, message.priority) == ("m-1", "default", 2)
    assert message.sender == mailproxy.Mailbox("", "a@example.com")
    assert message.to == (mailproxy.Mailbox("", "b@example.org"),)
    assert (message.text, message.html, message.subject) == ("Hi\n", None, "Hello")
    assert message.return_path == "a@example.com"
    assert message.message_id == "new@example.com"
    assert message.unknown == mailproxy.parse_message({**submission_fields(), "colour": None}).unknown == ()
    assert parsed_submission(name="x", tenant_id=5).unknown == ("name", "tenant_id")
    assert len(ids) == 50
    assert all(message_id.endswith("@example.com") for message_id in ids)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("id", [None, ""]), ("from", [None, "  "]), ("to", [None, [], " , ", ["", " "]]), ("subject", [None]),
        ("body", [None]),
    ],
)  # fmt: skip
def test_what_is_missing_is_said_in_fixed_words(field: str, values: list[Any]) -> None:
    for value, html in itertools.product(values, (None, True)):
        assert reason_to_refuse(**{field: value}, html=html) == f"missing {field}"


ONE_FILE = {"filename": "a", "content": "YQ=="}
INVALID_ATTACHMENTS: list[dict[str, Any]] = [
    {}, {"filename": "a"}, {"content": "YQ=="}, {"s3": "bucket/key"}, {"storage_path": ""}, {"storage_path": 5},
    {"storage_path": "base64:?"}, {"storage_path": "ftp://x", "fetch_mode": "http_url"},
    *({"storage_path": "x", "fetch_mode": mode} for mode in ("carrier pigeon", 5, ["base64"])),
    *({**ONE_FILE, "filename": name} for name in ("", "a\nb", "a\0b", "\ud800", 5)),
    *({**ONE_FILE, "content": content} for content in (None, "?", 5)),
    *({**ONE_FILE, "content_type": kind} for kind in ("pdf", "a/b\r\nX: y")), {**ONE_FILE, "url": "http://x.org"},
    {**ONE_FILE, "inline": "yes"}, {**ONE_FILE, "content_id": "a b"}, {**ONE_FILE, "content_md5": "xyz"},
    {**ONE_FILE, "colour": "\ud800"},
    *({"url": f"http://{rest}"} for rest in ("", "[::1", "x.org:99999/", "x.org/a b", "x.org/\r\nX: y")),
    *({"url": url} for url in ("ftp://x.org/a", "file:///etc/passwd", 5, "//x.org/a")), {"s3": {"bucket": "b"}},
    {"s3": {"bucket": "b", "key": ""}}, {"s3": {"bucket": "b", "key": 5}},
    {"s3": {"bucket": "b", "key": "k", "addressing": "round"}},
    {"s3": {"bucket": "b", "key": "k", "endpoint": "gopher://x"}},
    {"s3": {"bucket": "b", "key": "k", "colour": "\ud800"}},
]  # fmt: skip
INVALID_FIELDS: dict[str, list[Any]] = {
    "id": [7, True, "x" * 256, "a\nb", "a\0b", "\ud800", ["x"]], "account_id": ["", 5, "a\x7f"],
    "from": [
        5, ["a@example.com"], "a@b.com, c@d.com", "nobody", "a@b.com\r\nBcc: x@y.com", "a@b.com\ud800",
        "Evil\nX: y <a@b.com>",
    ],
    "from_name": ["a\nb", 1, "\udfff"],
    "to": [
        5, {"a@b.com": 1}, [5], ["a@b.com", None], "Team: a@b.com, c@d.com;", "undisclosed-recipients:;", "a b@c.com",
        "<a@b.com", '"open <a@b.com>', "a@b.com c@d.com", "a@b@c.com", "@c.com", "a@", "a@-b.com", "a@b..com",
        ".@b.com", "..@b.com", f"{'a' * 61}..@b.com", "<a..b>", "a@[1.2.3]", "<a@[IPv6:::1% x]>", "a@[1.2.3.4", "a@b.com\n", "a@b.com\x00",
        f"{'x' * 65}@b.com", f"{'é' * 33}@b.com", "a@" + ".".join(["x" * 60] * 5),
        f"{'x' * 60}@{'.'.join(['y' * 60] * 3)}.{'z' * 30}", "a@" + "x" * 64 + ".com", "a\u2028@b.com", "a@\u200b.com",
        "\u00a0@b.com", "=?utf-8?q?a=0D=0ABcc=3A?= <a@b.com>",
    ],
    "cc": ["nobody"], "bcc": [7], "reply_to": ["x"], "return_path": ["x", "a@b.com, c@d.com"],
    "subject": [5, "a\tb", "a\r\nBcc: x", "a\u2028b", "a\0", "\ud83d", "a\x85b", "a\x0bb"],
    "body": [5, "a\0b", "a\ud800", ["x"]], "text": ["twice"], "html": [5, "a\0"], "content_type": ["markdown", 1],
    "headers": [
        [], "X: y", {"X Y": "z"}, {"": "z"}, {"X:": "z"}, {"X-É": "z"}, {"X": True}, {"X": {"a": 1}}, {"X": [["a"]]},
        {"X": "a\nB: c"}, {"X\nY": "a"}, {"X": "\0"}, {"X": "\ud800"}, {"X": float("inf")}, {"X": 2**64},
        {"From": "x@y.com"}, {"TO": "x"}, {"cc": "x"}, {"Bcc": "x"}, {"content-type": "x"}, {"Content-Anything": "x"},
        {"MIME-version": "1"}, {"Return-Path": "x"}, {"Date": "tomorrow"}, {"Message-ID": "x"},
        {"Date": ["Fri, 21 Nov 1997 09:55:06 -0600"] * 2}, {"Subject": "a", "subject": "b"}, {"Reply-To": "nobody"},
    ],
    "message_id": ["x", "a b@c", "a@é", "<a@b", 5, "a@" + "b" * 1000, "@b", "a@", "a@b\nX: y"],
    "priority": [4, -1, 1.0, 1e308, True, "urgent", 10**30, [1]], "deferred_ts": [-1, 1.5, 2**63, 10**10, "5", False],
    "expires_ts": [NOON, 1e20, -1, "5", 10**10], "batch_code": [5, "a\nb", "\ud800"],
    "raw": [
        5, "?", as_base64(b"no header"), as_base64(b""), as_base64(b"\r\nA: b\r\n\r\n"), as_base64(b"A: b\r\n\r\nx\0y"),
        as_base64(b"From me\r\nA: b\r\n\r\n"), as_base64(b" A: b\r\n\r\n"),
    ],
    "attachments": [{}, "x", [5], *([one] for one in INVALID_ATTACHMENTS)],
    "colour": ["\ud800", ["\ud800"], {"a": {"\ud800": 1}}, float("nan"), [float("inf")]],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(name, one) for name, all_ in INVALID_FIELDS.items() for one in all_])
def test_an_invalid_field_is_named_also_one_that_means_nothing_but_could_not_be_kept(field: str, value: object) -> None:
    named = "body" if field == "text" else field
    assert reason_to_refuse(**{field: value}).startswith(f"invalid {named}: ")


def test_a_submission_that_is_no_object_or_has_a_name_that_is_no_unicode_is_refused_in_words_that_are() -> None:
    reason = reason_to_refuse(**{"\ud800": 1})

    assert reason.encode().startswith(b"invalid '\\ud800': ")
    with pytest.raises(mailproxy.Rejected, match=r"^invalid message: "):
        mailproxy.parse_message(["id"])


LONGEST = f"{'x' * 64}@{'y' * 60}.{'y' * 60}.{'y' * 60}.{'z' * 6}"
MAILBOXES = [
    ("a@b.com", "|a@b.com"), ("A.B+c@B.com", "|A.B+c@B.com"), (" a@b.com ", "|a@b.com"), ("<a@b.com>", "|a@b.com"),
    ("Ann <a@b.com>", "Ann|a@b.com"), ("Ann Lee<a@b.com>", "Ann Lee|a@b.com"),
    ("J. R. Öhm <a@b.com>", "J. R. Öhm|a@b.com"), ('"Doe, John" <a@b.com>, c@d.com', "Doe, John|a@b.com", "|c@d.com"),
    (r'"say \"hi\" \\" <a@b.com>', 'say "hi" \\|a@b.com'), ('Dr. "Who <is>" X <a@b.com>', "Dr. Who <is> X|a@b.com"),
    ("Bob (Sales) <a@b.com>", "Bob (Sales)|a@b.com"), ("a@b.com (Cron Daemon)", "Cron Daemon|a@b.com"),
    ("a@b.com <a@b.com>", "a@b.com|a@b.com"), ("=?utf-8?b?SsO2cmc=?= <a@b.com>", "Jörg|a@b.com"),
    ("Ann <a@b.com> (Sales)", "Ann|a@b.com"), ("<a@b.com>(Ann) , c@d.com ( Carl )", "Ann|a@b.com", "Carl|c@d.com"),
    ("=?nonsense?q?x?= <a@b.com>", "=?nonsense?q?x?=|a@b.com"),
    ("=?utcß-8?b?SsO8cmdl?= <a@b.com>", "=?utcß-8?b?SsO8cmdl?=|a@b.com"), ("a@b.com,,c@d.com,", "|a@b.com", "|c@d.com"),
    (["Ann <a@b.com>", "c@d.com"], "Ann|a@b.com", "|c@d.com"), ('"john doe"@b.com', '|"john doe"@b.com'),
    ('<"a>b,c"@b.com>', '|"a>b,c"@b.com'), ("jörg@b.com", "|jörg@b.com"),
    ("a@bücher.example", "|a@xn--bcher-kva.example"), ("a@BÜCHER.example", "|a@xn--bcher-kva.example"),
    ("a@straße.example", "|a@xn--strae-oqa.example"), ("a@bücher。example", "|a@xn--bcher-kva.example"),
    ("a@xn--bcher-kva.example", "|a@xn--bcher-kva.example"), ("a@localhost", "|a@localhost"),
    ("a@[127.0.0.1]", "|a@[127.0.0.1]"), ("Ann <a@[IPv6:2001:db8::1]>", "Ann|a@[IPv6:2001:db8::1]"), ("",), (None,),
    (LONGEST, f"|{LONGEST}"), ("a..b@c.com", "|a..b@c.com"), ("a.@c.com, .a@c.com", "|a.@c.com", "|.a@c.com"),
    ("Ann <a..@bücher.example>", "Ann|a..@xn--bcher-kva.example"), (["é..@c.com"], "|é..@c.com"),
    (f"{'a' * 60}..@c.com", f"|{'a' * 60}..@c.com"),
]  # fmt: skip


@pytest.mark.parametrize("row", MAILBOXES)
def test_addresses_are_read_as_people_and_rfc_5322_write_them(row: tuple[Any, ...]) -> None:
    assert [f"{box.name}|{box.address}" for box in mailproxy.parse_mailboxes(row[0], "to")] == list(row[1:])
    assert len(LONGEST) == 254


ANN = mailproxy.Mailbox("Ann", "a@b.com")
TO_NAMED_ONES = {"to": "Ann <a@Example.org>, b@x.org", "cc": ["a@example.ORG"], "bcc": "A@example.org, b@x.org"}
HEADERS_THAT_ARE_FIELDS = {"message-id": "<x@y>", "SUBJECT": "=?utf-8?q?=C3=9C?=", "Reply-To": "Ann <a@b.com>"}
BECOMES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"from_name": "Ann", "from": "a@b.com"}, {"sender": ANN}),
    ({"from": "Ann <a@b.com>", "from_name": "Bob"}, {"sender": ANN}),
    (TO_NAMED_ONES, {"recipients": ("a@Example.org", "b@x.org", "A@example.org")}),
    ({"return_path": "x@y.com"}, {"return_path": "x@y.com"}),
    ({"return_path": "<x@y.com>"}, {"return_path": "x@y.com"}), ({"return_path": "<>"}, {"return_path": ""}),
    ({"return_path": ""}, {"return_path": "a@example.com"}), ({"body": "x"}, {"text": "x", "html": None}),
    ({"body": ""}, {"text": "", "html": None}), ({"body": "x", "content_type": "plain"}, {"text": "x", "html": None}),
    ({"body": "x", "content_type": "html"}, {"text": None, "html": "x"}),
    ({"body": "x", "content_type": "text/html"}, {"text": None, "html": "x"}),
    ({"body": "x", "html": True}, {"text": None, "html": "x"}),
    ({"body": "x", "html": False}, {"text": "x", "html": None}),
    ({"body": "x", "html": "y"}, {"text": "x", "html": "y"}),
    ({"body": "x", "text": "y", "content_type": "html"}, {"text": "y", "html": "x"}),
    ({"body": None, "text": "y"}, {"text": "y", "html": None}),
    ({"body": None, "html": "y"}, {"text": None, "html": "y"}),
    ({"body": None, "text": "x", "html": "y"}, {"text": "x", "html": "y"}), ({"subject": ""}, {"subject": ""}),
    ({"headers": {"X-One": "a\tb", "X-Null": None, "X-None": []}}, {"headers": (("X-One", "a b"),)}),
    ({"deferred_ts": 9_999_999_999, "expires_ts": None}, {"deferred_ts": 9_999_999_999, "expires_ts": None}),
    ({"headers": {"X-Two": [1, "b", 2.5]}}, {"headers": (("X-Two", "1"), ("X-Two", "b"), ("X-Two", "2.5"))}),
    (
        {"headers": HEADERS_THAT_ARE_FIELDS, "reply_to": "c@d.com", "message_id": "other@y"},
        {"message_id": "x@y", "subject": "Ü", "headers": (), "reply_to": (ANN,)},
    ),
    *(({"message_id": given}, {"message_id": "x.1@y.z"}) for given in ("x.1@y.z", "<x.1@y.z>", " <x.1@y.z> ")),
    *(({"priority": given}, {"priority": 1}) for given in ("high", "1", 1)),
    *(({"priority": given}, {"priority": 0}) for given in (0, "immediate")),
    *(({"priority": given}, {"priority": 3}) for given in (3, "LOW")), ({"priority": "Medium"}, {"priority": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), BECOMES)
def test_a_field_becomes_what_the_message_has(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    message = parsed_submission(**fields)

    assert {name: getattr(message, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({"message_id": "x.1@y.z"}, "x.1@y.z"),
        ({"message_id": " <x.1@y.z>"}, "<x.1@y.z>"),
        ({"message_id": "< x.1@y.z>"}, "<x.1@y.z>"),
        ({"message_id": "other@y.z", "headers": {"Message-ID": "<x.1@y.z>"}}, "<x.1@y.z>"),
        ({"message_id": "other@y.z", "raw": as_base64(b"Message-ID: <x.1@y.z>\n\n")}, "<x.1@y.z>"),
    ],
)
def test_the_message_id_that_is_shown_and_kept_is_the_one_that_is_sent(fields: dict[str, Any], shown: str) -> None:
    fields = {**submission_fields(), **fields}
    message = mailproxy.parse_message(fields)

    submission = mailproxy.submission_of(fields, message, parsed_account(), NOON)

    assert submission.message_id == shown
    assert shown.strip("<>") == message.message_id == "x.1@y.z"


def test_times_in_milliseconds_are_refused_and_what_was_taken_before_that_was_so_can_still_be_read_back() -> None:
    before = submission_fields(expires_ts=1_700_000_000_000, deferred_ts=1_700_000_000_000, subject="a\tb")

    assert "milliseconds" in reason_to_refuse(expires_ts=1_700_000_000_000)
    assert "milliseconds" in reason_to_refuse(deferred_ts=1_700_000_000_000)
    message = mailproxy.parse_message(before, contents={}, message_id="old@example.com")
    assert (message.deferred_ts, message.expires_ts, message.subject) == (1_700_000_000_000, 1_700_000_000_000, "a b")


LINE_BREAKS = ("\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029")


@pytest.mark.parametrize("line_break", LINE_BREAKS, ids=ascii)
def test_a_line_break_in_any_value_of_a_header_and_in_any_address_is_invalid(line_break: str) -> None:
    values = ("{}a@b.com", "a@b.com{}", "a@b{}.com", "Ann{}Lee <a@b.com>", "<a@b.com{}>", '"Ann{}" <a@b.com>')
    fields = ("from", "from_name", "to", "cc", "bcc", "reply_to", "return_path", "subject", "message_id")
    parts = ("filename", "content_type", "content_id", "content_md5")

    for value in (value.format(line_break) for value in values):
        wrong: list[tuple[str, Any]] = [(name, value) for name in fields]
        wrong += [("headers", {name: value}) for name in ("X-A", "Subject", "Reply-To", "Message-ID", "Date")]
        wrong += [("headers", {value: "x"}), ("headers", {"X-A": ["x", value]}), ("to", ["c@d.com", value])]
        wrong += [("attachments", [{**ONE_FILE, name: f"a/b; c=d{value}"}]) for name in parts]
        for name, given_value in wrong:
            assert reason_to_refuse(**{name: given_value}).startswith(f"invalid {name}: "), (name, given_value)


def test_the_batch_serves_for_a_priority_and_time_limits_that_passed_do_not_spoil_what_is_read_back() -> None:
    fields = submission_fields(expires_ts=5, deferred_ts=4)

    message = mailproxy.parse_message(fields, message_id="old@example.com", default_priority=0)

    assert (message.expires_ts, message.deferred_ts, message.message_id) == (5, 4, "old@example.com")
    assert message.priority == 0


@pytest.mark.parametrize(
    ("raw", "message_id"),
    [
        (b"Subject: x\r\n\r\nbody", "new@example.com"), (b"message-ID : <own@id>\n\nbody", "own@id"),
        (b"Message-ID:\r\n <folded@id>\r\n\r\n", "folded@id"), (b"Message-ID: strange\r\n\r\n", ""),
        (b"X: y\r\n\r\nMessage-ID: <not@header>\r\n", "new@example.com"), (b"Subject: header only", "new@example.com"),
    ],
)  # fmt: skip
def test_a_raw_message_keeps_its_message_id_and_what_is_beside_it_means_nothing(raw: bytes, message_id: str) -> None:
    message = parsed_submission(raw=as_base64(raw), attachments="nonsense")

    assert (message.raw, message.message_id) == (raw, message_id)
    assert message.unknown == ("subject", "body", "attachments")
    assert (message.subject, message.text, message.attachments) == ("", None, ())


@pytest.mark.parametrize("line", [b" x", b"A: b", b"Bcc: a@b.com,", b" <a@b.com>,"], ids=repr)
def test_a_raw_header_of_300_000_lines_costs_no_more_than_its_length(line: bytes) -> None:
    raw = b"\n".join([b"To: a@b.com,", *[line] * 300_000, b"", b"body"])
    started = time.process_time()

    message = parsed_submission(raw=as_base64(raw))
    composed = mailproxy.compose(message, (), date=SENT_AT)

    assert time.process_time() - started < 3
    assert composed.endswith(b"\r\nMessage-ID: <new@example.com>\r\n\r\nbody")
    assert composed.count(b"\r\n") == (300_004 if b"Bcc" not in line else 4)


# --- attachments ----------------------------------------------------------


def test_base64_is_read_with_white_space_in_either_alphabet_and_without_padding() -> None:
    content = bytes(range(256)) * 2000
    in_lines = base64.encodebytes(content).decode()
    broken_by_padding = base64.b64encode(content[:-1]).decode() + "QUFB"

    for written in ("+/+/YQ==", "-_-_YQ", " +/+/\r\n\tYQ = = ", "+/-_YQ=", "+/+/YQ", "+/+/YQ==\n"):
        assert mailproxy.decode_base64(written) == b"\xfb\xff\xbf\x61"
    for written in (in_lines, in_lines.replace("\n", "").rstrip("=")):
        assert mailproxy.decode_base64(written) == content
    assert len(in_lines) > 2 * mailproxy.BASE64_PIECE
    for written in ("a", "abcde", "YQ==YQ==", "Y*Q=", "YQ\0=", "é", "data:x;base64,YQ==", "Y=Q=", broken_by_padding):
        with pytest.raises(ValueError, match="padding" if written is broken_by_padding else r"[a-z]"):
            mailproxy.decode_base64(written)


@pytest.mark.parametrize(
    ("given", "source", "location", "content"),
    [
        ({"filename": "a", "content": "YQ=="}, "content", "", b"a"),
        ({"filename": "a", "content": ""}, "content", "", b""),
        ({"url": "https://x.org/a?b=c"}, "url", "https://x.org/a?b=c", b""),
        ({"url": "HTTP://x.org:8080/"}, "url", "HTTP://x.org:8080/", b""),
        ({"storage_path": "vol:a/b.pdf"}, "endpoint", "vol:a/b.pdf", b""),
        ({"storage_path": "/a/b"}, "filesystem", "/a/b", b""),
        ({"storage_path": "http://x.org/a"}, "url", "http://x.org/a", b""),
        ({"storage_path": "base64:YQ"}, "content", "", b"a"),
        ({"storage_path": "YQ==", "fetch_mode": "base64"}, "content", "", b"a"),
        ({"storage_path": "base64:YQ==", "fetch_mode": "base64"}, "content", "", b"a"),
        ({"storage_path": "a/b", "fetch_mode": "filesystem"}, "filesystem", "a/b", b""),
        ({"storage_path": "/a/b", "fetch_mode": "endpoint"}, "endpoint", "/a/b", b""),
        ({"storage_path": "https://x.org", "fetch_mode": "http_url"}, "url", "https://x.org", b""),
    ],
)
def test_attachments_have_their_sources(given: dict[str, Any], source: str, location: str, content: bytes) -> None:
    (attachment,) = parsed_submission(attachments=[given]).attachments

    assert (attachment.source, attachment.location, attachment.content) == (source, location, content)


def test_an_attachment_keeps_what_it_is_called_and_is() -> None:
    given = {
        "filename": "Größe/1.png", "s3": {"bucket": "b", "key": "k/ü\t\n", "region": "r", "addressing": "path"},
        "content_type": "Image/PNG; x=Y", "content_id": "<logo@x>", "inline": True, "content_md5": "AB" * 16,
    }  # fmt: skip

    (attachment,) = parsed_submission(attachments=[given]).attachments

    assert attachment.s3 == mailproxy.S3Object("b", "k/ü\t\n", region="r", addressing="path")
    assert (attachment.filename, attachment.content_type) == ("Größe/1.png", "image/png; x=Y")
    assert (attachment.content_id, attachment.inline, attachment.content_md5) == ("logo@x", True, "ab" * 16)


MAILBOX_NAMES = st.text(st.one_of(st.characters(), st.sampled_from(" .'&-_,;:<>@=?\"()\t")), max_size=20)
MAILBOX_ADDRESSES = st.from_regex(r"[a-z.+'@\-]{1,70}@[a-zA-Z.\-]{1,70}", fullmatch=True)
MAILBOX_SHAPES = st.sampled_from(("{address}", "{name}<{address}>", "{name} <{address}>", "{name}{address}"))


@settings(max_examples=200, deadline=None)
@given(MAILBOX_NAMES, MAILBOX_ADDRESSES, MAILBOX_SHAPES)
def test_usual_mailboxes_are_understood_as_the_general_way_does(name: str, address: str, shape: str) -> None:
    def outcome_of(read: Callable[[str, str], object]) -> object:
        try:
            return read(shape.format(name=name, address=address), "to")
        except mailproxy.Rejected as error:
            return str(error)

    def read_in_general(text: str, field: str) -> object:
        return tuple(mailproxy._mailboxes_of(mailproxy.line_of(text, field), field))

    assert outcome_of(mailproxy.parse_mailboxes) == outcome_of(read_in_general)


# --- payloads -------------------------------------------------------------


def stored_and_read_back(fields: dict[str, Any]) -> tuple[Any, ...]:
    """The message, the one that is read back, its payload and contents, and the fields restored from them."""
    message = mailproxy.parse_message(fields)
    payload, contents = mailproxy.stored_form(fields, message)
    kept = json.loads(payload)
    again = mailproxy.parse_message(kept, contents=contents, message_id=message.message_id)
    return message, again, (payload, contents), mailproxy.restored_fields(kept, contents)


@pytest.mark.parametrize("fields", [{"colour": "blue"}, {"id": "é", "headers": {"X": None}}])
def test_a_payload_is_json_without_the_fields_that_are_null(fields: dict[str, Any]) -> None:
    for whole in (submission_fields(**fields), {**submission_fields(**fields), "cc": None}):
        message, again, stored, restored = stored_and_read_back(whole)

        assert stored == (json.dumps(submission_fields(**fields), ensure_ascii=False), {})
        assert again == message
        assert restored == submission_fields(**fields)


def test_a_payload_is_kept_without_contents_and_read_back_as_the_same_message() -> None:
    files = [
        {"filename": "a", "content": "YQ=="}, {"filename": "b", "url": "http://x.org/"},
        {"filename": "c", "storage_path": "base64:Yw=="}, {"filename": "d", "storage_path": "base64:="},
    ]  # fmt: skip
    raw = submission_fields(raw=as_base64(b"A: b\r\n\r\n\xff"), subject=None, body=None)

    message, again, (payload, _), restored = stored_and_read_back(submission_fields(attachments=files))
    raw_message, raw_again, _, raw_restored = stored_and_read_back(raw)

    assert (again, raw_again, raw_restored) == (message, raw_message, raw)
    assert mailproxy.parse_message(restored).attachments == message.attachments
    assert restored["attachments"][0] == files[0]
    assert restored["attachments"][2] == {"filename": "c", "storage_path": "base64:Yw==", "fetch_mode": "base64"}
    assert "YQ==" not in payload


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(mailproxy.MESSAGE_FIELDS)), JSON_VALUES))
def test_whatever_json_is_submitted_it_is_accepted_or_rejected_and_never_breaks_anything(fields: Any) -> None:
    whole = {**submission_fields(), **fields}

    try:
        mailproxy.parse_message(whole)
    except mailproxy.Rejected as rejected:
        str(rejected).encode()
    else:
        stored_and_read_back(whole)


@pytest.mark.parametrize(
    "hostile",
    [
        "a" * 10**6, "a." * 500_000, "a@" * 500_000, '"' * 10**6, '"\\' * 500_000, "<" * 10**6, "(" * 10**6,
        '"a" ' * 250_000, "a@b.com," * 125_000 + '"', "a@" + "b." * 500_000, " " * 10**6 + "x", "[" * 10**6,
        "=?a?q?" * 160_000 + " <a@b.com>", "a <" * 300_000, "é@" * 500_000, "\\" * 10**6, "a@" + "b" * 10**6,
    ],
    ids=lambda text: f"{text[:8]!r}",
)  # fmt: skip
def test_a_megabyte_of_hostile_address_costs_no_more_than_its_length(hostile: str) -> None:
    started = time.process_time()

    with contextlib.suppress(mailproxy.Rejected):
        parsed_submission(to=hostile)

    assert time.process_time() - started < 10


# --- accounts -------------------------------------------------------------


def parsed_account(**fields: Any) -> mailproxy.Account:
    return mailproxy.parse_account({"id": "a", "host": "mail.example.com", "port": 587, **fields})


def test_an_account_has_the_manners_of_the_contract_unless_it_or_the_configuration_says_otherwise() -> None:
    defaults = mailproxy.DeliverySettings(retry_delays=(1,), max_connections_per_account=2, hostname="a.example")

    silent = mailproxy.parse_account({"id": "a", "host": "h", "port": 25}, source="config", defaults=defaults)

    assert parsed_account() == mailproxy.Account(id="a", host="mail.example.com", port=587)
    assert parsed_account(limit_per_minute=0).limits == {}
    assert (silent.retry_delays, silent.max_connections, silent.source) == ((1,), 2, "config")
    assert (silent.timeout, silent.hostname, parsed_account(hostname="b").hostname) == (None, "a.example", "b")


def test_json_and_config_ini_say_the_same_account() -> None:
    from_json = parsed_account(
        user="u", password="p", use_tls=True, verify_tls=False, ttl=10, timeout=2.5, limit_per_hour=100,
        retry_delays=[60, 300], max_connections=3, auth="xoauth2", max_retries=4, limit_per_day=None,
        account_replies=["550 daily limit", 554, "451 4.7.1"], limit_behavior="error", hostname="[192.0.2.1]",
        implicit_tls=True, start_tls="required", ca_file="/ca", client_cert="/c", client_key="/k", limit_per_minute=7,
        max_messages_per_connection=9, max_recipients=2, in_doubt="error", limit_counts="recipients", batch_size=8,
        max_age_seconds=99,
        oauth2={"token_url": "https://x.org/t", "client_id": "c", "client_secret": "s", "scope": "mail"},
    )  # fmt: skip
    from_ini = parsed_account(
        port="587", user="u", password="p", use_tls="yes", verify_tls="False", ttl="10", timeout="2.5",
        limit_per_hour="100", retry_delays="60, 300", max_connections="3", auth="XOAUTH2", max_retries="4",
        account_replies="550 daily limit, 554\n451 4.7.1", limit_behavior="Reject", hostname="192.0.2.1",
        implicit_tls="on", start_tls="Required", ca_file="/ca", client_cert="/c", client_key="/k", limit_per_minute="7",
        max_messages_per_connection="9", max_recipients="2", in_doubt="Error", limit_counts="Recipients",
        batch_size="8", max_age_seconds="99",
        limit_per_day="", oauth2_token_url="https://x.org/t", oauth2_client_id="c", oauth2_client_secret="s",
        oauth2_scope="mail",
    )  # fmt: skip

    assert from_json == from_ini
    alike = [name for name, value in parsed_account()._asdict().items() if getattr(from_json, name) == value]
    assert alike == ["id", "host", "port", "oauth2_refresh_token", "limit_per_day", "source"]  # all others were told
    assert from_json.limits == {"minute": 7, "hour": 100}
    assert from_json.retry_delays == (60, 300)
    assert from_json.account_replies == ((550, None, "daily limit"), (554, None, ""), (451, "4.7.1", ""))
    assert mailproxy.account_fields(from_json)["account_replies"] == ["550 daily limit", "554", "451 4.7.1"]


def test_the_names_of_hosts_are_names_or_addresses_and_never_have_a_port() -> None:
    hosts = ["mail", "::1", "[::1]", "192.0.2.1", "fe80::1%eth0", "bücher.example"]
    names = [
        "mail",
        "mail.example.com.",
        "192.0.2.1",
        "[192.0.2.1]",
        "2001:db8::1",
        "[IPv6:2001:db8::1]",
        "bücher.example",
    ]

    judged = [parsed_account(host=host).host for host in hosts]
    said = [parsed_account(hostname=name).hostname for name in names]

    assert judged == ["mail", "::1", "::1", "192.0.2.1", "fe80::1%eth0", "xn--bcher-kva.example"]
    assert said[:4] == ["mail", "mail.example.com", "[192.0.2.1]", "[192.0.2.1]"]
    assert said[4:] == ["[IPv6:2001:db8::1]", "[IPv6:2001:db8::1]", "xn--bcher-kva.example"]


@pytest.mark.parametrize(
    ("encryption", "accounts"),
    [
        ("auto", [{}, {"use_tls": False}, {"port": 465, "use_tls": False}]),
        ("required", [{"use_tls": True}, {"use_tls": True, "start_tls": "never"}, {"port": 2525, "use_tls": 1}]),
        ("required", [{"start_tls": "required"}, {"port": 465, "use_tls": False, "start_tls": "required"}]),
        ("never", [{"start_tls": "never"}]),
        ("implicit", [{"implicit_tls": True}, {"port": 465}, {"port": 465, "use_tls": True}]),
    ],
)
def test_when_an_account_turns_to_tls(encryption: str, accounts: list[dict[str, Any]]) -> None:
    for once in (parsed_account(**fields) for fields in accounts):
        again = mailproxy.parse_account(mailproxy.account_fields(once))
        assert once.encryption == again.encryption == encryption


INVALID_ACCOUNT_FIELDS: dict[str, list[Any]] = {
    "id": ["a\nb", 5], "host": ["a b", 5, "smtp://x", "x:25", "[::1]:25"], "port": [0, 65536, "x", True, 25.0], "user": ["a\n"],
    "password": [5, "a\0"], "use_tls": ["perhaps"], "start_tls": ["often"], "auth": ["ntlm", "xoauth2", "oauthbearer"],
    "oauth2": [
        5, {"client_id": "c"}, {"token_url": "ftp://x", "client_id": "c", "refresh_token": "r"},
        {"token_url": "https://x", "client_id": "c"}, {"tenant": "x"},
        {"token_url": "https://x", "client_id": "c", "refresh_token": "r", "client_secret": False},
    ],
    "ttl": [0], "timeout": [-1, "1e9", float("inf")], "max_connections": [0], "limit_per_minute": [-1],
    "limit_per_day": [1.5], "limit_behavior": ["drop"], "limit_counts": ["bytes", 1, [], True], "in_doubt": ["x"], "retry_delays": [[], "60, x", [-1], 60],
    "batch_size": [0], "max_age_seconds": [0], "max_recipients": [0], "max_retries": [-1], "client_key": ["/k"],
    "hostname": ["a b", "a_b", "-a.example", "a..b", "[a]", "a" * 64, 5],
    "account_replies": [550, ["550", "daily"], "250", "600 x", "5500", "550 5.7", "550 4.7.1", "550 5.7.x", "550 1", [None]],
}  # fmt: skip
MISSING_OF_ACCOUNTS = [({"id": None}, "id"), ({"id": ""}, "id"), ({"host": ""}, "host"), ({"port": None}, "port")]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        *((fields, f"missing {name}") for fields, name in MISSING_OF_ACCOUNTS),
        *(({name: one}, f"invalid {name}: ") for name, all_ in INVALID_ACCOUNT_FIELDS.items() for one in all_),
    ],
)
def test_an_account_out_of_range_names_the_field(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(mailproxy.Rejected) as rejected:
        parsed_account(**fields)

    assert str(rejected.value).startswith(reason)


def test_a_row_of_the_table_is_all_that_a_field_of_an_account_needs() -> None:
    nested = {row.key for row in mailproxy.ACCOUNT_TABLE if row.key.startswith("oauth2_")}
    others = {"id", "oauth2"} | {row.key for row in mailproxy.ACCOUNT_TABLE} - nested

    assert set(mailproxy.ACCOUNT_FIELDS) == others
    assert {f"oauth2_{name}" for name in mailproxy.OAUTH2_FIELDS} == nested
    assert set(mailproxy.account_fields(parsed_account())) == others - mailproxy.SECRET_FIELDS | {"source"}


def test_no_secret_leaves_with_an_account() -> None:
    oauth2 = {"token_url": "https://c:S4@x.org:1/t?key=S5", "client_id": "c", "client_secret": "env:S1"}
    guarded = parsed_account(password="S3", oauth2={**oauth2, "refresh_token": "S2"})

    shown = json.dumps(mailproxy.account_fields(guarded))

    assert not any(secret in shown for secret in ("S1", "S2", "S3", "S4", "S5"))
    assert not any(secret in repr(guarded) for secret in ("S1", "S2", "S3"))
    assert json.loads(shown)["oauth2"] == {"token_url": "https://c@x.org:1/t?...", "client_id": "c", "scope": None}


# ======================================================================
# DISPOSITION
# ======================================================================

SETTLED_AT = 1_800_000_000.0
IN_A_MINUTE = SETTLED_AT + 60
STAGE, CAUSE, SIGNAL, STATUS = mailproxy.Stage, mailproxy.Cause, mailproxy.LaneSignal, mailproxy.Status


def word(stage: str, code: int, text: str = "as told", enhanced: str | None = None, **fields: Any) -> Any:
    """A reply of the server, or ours when a cause is given."""
    return mailproxy.Reply(STAGE(stage), code, text, enhanced, **fields)


def ours(stage: str, text: str, code: int = 451) -> Any:
    return word(stage, code, text, cause=CAUSE.LOCAL)


TAKEN = word("end-of-data", 250)
GREYLISTED = word("rcpt", 450, "Greylisted", "4.7.1")
NO_SUCH_USER = word("rcpt", 550, "No such user", "5.1.1")
TOO_MANY = word("rcpt", 452, "Too many recipients", "4.5.3")
CLOSING = word("mail", 421, "Going down", "4.3.2")
TIMED_OUT = word("rcpt", 451, "no answer within 60 s", "4.4.2", cause=CAUSE.TIMEOUT)
LOST = word("mail", 451, "connection lost", "4.4.2", cause=CAUSE.LOST)
LOST_AFTER_THE_DOT = word("end-of-data", 451, "connection lost", "4.4.2", cause=CAUSE.LOST)
SILENT_AFTER_THE_DOT = word("end-of-data", 451, "no answer", "4.4.2", cause=CAUSE.TIMEOUT)
NOT_FETCHED = ours("attachment", "Attachment fetch failed: 503")
GONE = ours("attachment", "Attachment fetch failed: 404", 550)


def claimed(attempts: int = 0, age_s: int = 0, **settled: str) -> Any:
    """A claim; `settled` has the status of recipients that had their word in earlier attempts."""
    outcomes = {
        name: mailproxy.RecipientOutcome(STATUS(status), 250 if status == "sent" else 451, f"was {status}")
        for name, status in settled.items()
    }
    return mailproxy.Claim(
        1, "m-1", "main", 2, "<m-1@example.com>", 0, SETTLED_AT - age_s, attempts, None, outcomes or None, 0, 100, "{}"
    )


def settled(
    replies: Any, claim: Any = None, reused: bool = False, untried: Any = (), jitter: float = 0, **account: Any
) -> Any:
    return mailproxy.settle(
        claim or claimed(),
        mailproxy.Attempt(SETTLED_AT - 1, SETTLED_AT, dict(replies), "main-1", reused),
        mailproxy.Account("main", "mail.example.com", 25, **{"retry_delays": (60, 300), **account}),
        SETTLED_AT,
        jitter,
        untried,
    )


# What becomes of the message, what it says of the lane, an attempt counted, a slot of the limits used; until when, why.
DONE = ("sent", "up", True, True, None, "")
FAILED = ("error", "up", True, False, None, "")
FAILED_UNASKED = ("error", "none", True, False, None, "")
LATER = ("deferred", "up", True, False, IN_A_MINUTE, "retry")
LATER_THE_REST = ("deferred", "up", True, True, IN_A_MINUTE, "retry")
LATER_UNANSWERED = ("deferred", "none", True, False, IN_A_MINUTE, "retry")
LATER_WITH_PARTS = ("deferred", "none", True, False, IN_A_MINUTE, "attachment")
IN_DOUBT = ("deferred", "none", True, True, IN_A_MINUTE, "in_doubt")
NOW_THE_REST = ("queued", "up", False, True, None, "")
NOW_THE_OTHERS = ("queued", "up", False, False, None, "")
COOLED = ("deferred", "cool", False, False, None, "connection")
REFUSED = ("deferred", "account", False, False, None, "login")
COOLED_WITH_SOME_SENT = ("deferred", "account", False, True, None, "login")


@pytest.mark.parametrize(
    ("replies", "verdict", "error"),
    [
        # all recipients have the same reply
        ({"a": TAKEN}, DONE, None),
        ({"a": NO_SUCH_USER}, FAILED, "550 5.1.1 No such user"),
        ({"a": GREYLISTED}, LATER, "450 4.7.1 Greylisted"),
        ({"a": word("mail", 451, enhanced="4.1.8")}, LATER, "451 4.1.8 as told"),
        ({"a": word("data", 451)}, LATER, "451 as told"),
        ({"a": word("end-of-data", 452)}, LATER, "452 as told"),
        ({"a": word("end-of-data", 554)}, FAILED, "554 as told"),
        ({"a": TOO_MANY}, LATER, "452 4.5.3 Too many recipients"),
        # some have another than the others
        ({"a": TAKEN, "b": NO_SUCH_USER}, DONE, "1 of 2 recipients refused: 550 5.1.1 No such user"),
        ({"a": TAKEN, "b": GREYLISTED}, NOW_THE_REST, None),
        ({"a": NO_SUCH_USER, "b": GREYLISTED}, LATER, "450 4.7.1 Greylisted"),
        ({"a": TAKEN, "b": TOO_MANY}, NOW_THE_REST, None),
        ({"a": TAKEN, "b": word("rcpt", 552, enhanced="5.5.3")}, NOW_THE_REST, None),
        ({"a": TAKEN, "b": word("rcpt", 552)}, NOW_THE_REST, None),
        ({"a": TAKEN, "b": word("rcpt", 552, enhanced="5.2.2")}, DONE, "1 of 2 recipients refused: 552 5.2.2 as told"),
        ({"a": word("rcpt", 552)}, FAILED, "552 as told"),
        # the server says nothing
        ({"a": TIMED_OUT}, LATER_UNANSWERED, "no answer within 60 s"),
        ({"a": LOST}, LATER_UNANSWERED, "connection lost"),
        ({"a": LOST_AFTER_THE_DOT}, IN_DOUBT, "in doubt: connection lost"),
        ({"a": SILENT_AFTER_THE_DOT}, IN_DOUBT, "in doubt: no answer"),
        # the lane is at fault, not the message
        ({"a": CLOSING}, COOLED, "421 4.3.2 Going down"),
        ({"a": word("end-of-data", 421)}, COOLED, "421 as told"),
        ({"": ours("connect", "refused")}, COOLED, "refused"),
        ({"": word("connect", 554, "Go away")}, COOLED, "554 Go away"),
        ({"": word("connect", 421)}, COOLED, "421 as told"),
        ({"": ours("tls", "expired")}, COOLED, "expired"),
        ({"": word("ehlo", 550)}, COOLED, "550 as told"),
        ({"": word("auth", 454)}, COOLED, "454 as told"),
        ({"": word("auth", 451, "silence", cause=CAUSE.TIMEOUT)}, COOLED, "silence"),
        ({"a": word("mail", 451)}, COOLED, "451 as told"),
        (
            {"a": word("end-of-data", 432, "Concurrent connections limit exceeded", "4.3.2")},
            COOLED,
            "432 4.3.2 Concurrent connections limit exceeded",
        ),
        ({"": word("auth", 535, "Bad password")}, REFUSED, "535 Bad password"),
        ({"": ours("auth", "no such file")}, REFUSED, "no such file"),
        (
            {"": word("connect", 554, "You've reached your daily relay quota")},
            REFUSED,
            "554 You've reached your daily relay quota",
        ),
        ({"a": word("mail", 530)}, REFUSED, "530 as told"),
        ({"a": word("end-of-data", 534)}, FAILED, "534 as told"),
        (
            {"a": TAKEN, "b": word("rcpt", 450, "Mail send limit exceeded")},
            COOLED_WITH_SOME_SENT,
            "450 Mail send limit exceeded",
        ),
        # it hung up, or wants to, after some had their word: the others go on at once
        ({"a": NO_SUCH_USER, "b": LOST}, NOW_THE_OTHERS, None),
        ({"a": GREYLISTED, "b": CLOSING}, NOW_THE_OTHERS, None),
        ({"a": TAKEN, "b": word("rcpt", 450, "too many recipients from 192.0.2.1", "4.7.1")}, NOW_THE_REST, None),
        # the server was not asked
        ({"": NOT_FETCHED}, LATER_WITH_PARTS, "Attachment fetch failed: 503"),
        ({"": GONE}, FAILED_UNASKED, "Attachment fetch failed: 404"),
        ({"": ours("composition", "a bug", 554)}, FAILED_UNASKED, "a bug"),
        ({"a": ours("mail", "too large", 552)}, FAILED_UNASKED, "too large"),
        ({"a": ours("rcpt", "not here", 550), "b": TAKEN}, DONE, "1 of 2 recipients refused: not here"),
    ],
)
def test_what_becomes_of_a_message_after_one_attempt(replies: Any, verdict: Any, error: Any) -> None:
    that = settled(replies)

    assert (that.status, that.lane, that.counted, that.slot_used, that.deferred_ts, that.reason) == verdict
    assert that.error == error


ABOUT_ACCOUNT = """\
mail 451 4.7.550 Access denied, please try again later
rcpt 550 - Requested action not taken: mailbox unavailable Mail send limit exceeded.
end-of-data 421 4.7.28 detected an unusual rate of mail originating from your address
end-of-data 554 5.2.2 mailbox full; STOREDRV.Submission.Exception:QuotaExceededException.MapiExceptionShutoffQuotaExceeded
auth 451 - Authentication failed: Maximum credits exceeded"""
ABOUT_SESSION = """\
mail 550 - This message has exceeded the max number of messages per session. IB510
rcpt 450 4.7.1 Error: too many recipients from 192.0.2.1
end-of-data 454 - Throttling failure: Maximum sending rate exceeded."""
ABOUT_MESSAGE = """\
mail 553 5.7.1 Sender address rejected: not owned by auth user
rcpt 554 5.7.1 <a@example.org>: Recipient address rejected: Quota exceeded
rcpt 550 5.1.1 <a>: user account suspended
rcpt 421 4.7.1 Client host [192.0.2.1] blocked using grey.rbl; Greylisting in action
rcpt 550 5.7.1 Recipient daily message limit exceeded
end-of-data 432 4.3.2 STOREDRV.Deliver; recipient thread limit exceeded
end-of-data 550 5.7.30 Gmail requires all large senders to authenticate with DKIM
end-of-data 554 5.4.6 Message exceeded 50 hops
end-of-data 534 - Message header size exceeds policy limit."""


@pytest.mark.parametrize(
    ("whose", "said"), [("account", ABOUT_ACCOUNT), ("session", ABOUT_SESSION), ("message", ABOUT_MESSAGE)]
)
def test_the_words_of_providers_say_what_a_reply_is_about(whose: str, said: str) -> None:
    for line in said.splitlines():
        stage, code, enhanced, text = line.split(" ", 3)
        reply = word(stage, int(code), text, None if enhanced == "-" else enhanced)
        assert mailproxy.about(reply, mailproxy.Account("main", "mx.test", 25), relays=False).about == whose, line


@pytest.mark.parametrize(
    ("replies", "before", "left"),
    [
        ({"a": TAKEN, "b": NO_SUCH_USER}, {}, {"a": "sent", "b": "error"}),
        ({"a": TAKEN, "b": GREYLISTED}, {}, {"a": "sent", "b": "deferred"}),
        ({"a": TAKEN, "b": TOO_MANY}, {}, {"a": "sent", "b": "deferred"}),
        ({"b": GREYLISTED}, {"a": "sent", "b": "deferred"}, {"a": "sent", "b": "deferred"}),
        ({"b": NO_SUCH_USER}, {"a": "sent", "b": "deferred"}, {"a": "sent", "b": "error"}),
        ({"b": CLOSING}, {"a": "sent"}, {"a": "sent", "b": "deferred"}),
        ({"b": CLOSING, "c": NO_SUCH_USER}, {"a": "sent"}, {"a": "sent", "c": "error", "b": "deferred"}),
        ({"": word("connect", 421)}, {"a": "sent", "b": "deferred"}, {"a": "sent", "b": "deferred"}),
        ({"": NOT_FETCHED}, {"a": "sent", "b": "deferred"}, {"a": "sent", "b": "deferred"}),
        ({"": GONE}, {"a": "sent", "b": "deferred"}, {"a": "sent", "b": "error"}),
        ({"a": TAKEN}, {}, {}),
        ({"b": TAKEN}, {"a": "sent", "b": "deferred"}, {}),
    ],
)
def test_a_recipient_that_had_its_final_word_keeps_it(replies: Any, before: Any, left: Any) -> None:
    disposition = settled(replies, claimed(**before))

    outcomes = disposition.recipients or {}
    assert {address: outcome.status for address, outcome in outcomes.items()} == left
    if disposition.status is STATUS.SENT:  # also when the server of this attempt refused all
        refused = list(left.values()).count("error")
        assert (disposition.error or "").partition(" recipients")[0] == (f"{refused} of {len(left)}" if refused else "")
        assert disposition.slot_used == (TAKEN in replies.values())


def test_outcomes_have_code_and_words_and_recipients_left_for_another_transaction_count_no_attempt_yet() -> None:
    disposition = settled({"a": TAKEN, "b": NO_SUCH_USER, "c": TIMED_OUT}, untried=["d"])

    assert (disposition.status, disposition.counted) == (STATUS.QUEUED, False)
    assert disposition.recipients == {
        "a": (STATUS.SENT, 250, "250 as told"),
        "b": (STATUS.ERROR, 550, "550 5.1.1 No such user"),
        "c": (STATUS.DEFERRED, 451, "no answer within 60 s"),
        "d": mailproxy.UNTRIED,
    }


@pytest.mark.parametrize("last", [TAKEN, CLOSING])
def test_a_message_given_up_between_transactions_has_all_its_recipients(last: Any) -> None:
    disposition = settled({"b": NO_SUCH_USER, "c": last}, claimed(a="sent"), untried=["d"])

    given_up = mailproxy.given_up(disposition, "account deleted")

    assert (given_up.status, list(given_up.recipients)) == (STATUS.SENT, ["a", "b", "c", "d"])
    assert given_up.recipients["d"] == (STATUS.ERROR, 451, "account deleted")


def test_giving_up_is_sent_when_a_server_has_it_for_somebody() -> None:
    waits, sent = (
        mailproxy.given_up(mailproxy.untouched(claimed(a=status, b="deferred")), "account deleted")
        for status in ("deferred", "sent")
    )

    assert (waits.status, waits.error, sent.status) == ("error", "account deleted", "sent")
    assert sent.error == "1 of 2 recipients refused: was deferred"
    assert waits.recipients["b"].status is sent.recipients["b"].status is STATUS.ERROR


@pytest.mark.parametrize(
    ("words", "pause_s"),
    [("1 seconds", 1), ("92 seconds", 92), ("05 min", 300), ("9000 s", 3600), ("0 seconds", None), ("00s", None)],
)
def test_a_pause_that_the_server_names_is_kept_unless_it_is_none(words: str, pause_s: float | None) -> None:
    reply = word("connect", 421, f"Too many connections, try again in {words}")

    assert mailproxy.about(reply, mailproxy.Account("main", "mx.test", 25), relays=False).pause_s == pause_s


def test_a_message_in_doubt_is_told_so_whatever_ends_it_before_its_retry() -> None:
    waits = settled({"a": LOST_AFTER_THE_DOT})

    ended = mailproxy.given_up(waits, "account deleted")

    assert (waits.status, ended.status, ended.reason) == ("deferred", "error", "")
    assert ended.error == "account deleted; last: in doubt: connection lost"
    assert mailproxy.given_up(waits, f"expired; last: {waits.error}").error == f"expired; last: {waits.error}"


@pytest.mark.parametrize("lost", [LOST, word("data", 451, "connection lost", cause=CAUSE.LOST), LOST_AFTER_THE_DOT])
def test_a_kept_connection_that_turns_out_dead_counts_no_attempt_but_after_the_dot_there_is_doubt(lost: Any) -> None:
    disposition = settled({"a": lost, "b": lost}, reused=True)

    if lost.in_doubt:
        assert (disposition.status, disposition.counted, disposition.reason) == ("deferred", True, "in_doubt")
    else:
        assert disposition == mailproxy.untouched(claimed())


@pytest.mark.parametrize("reply", [LOST_AFTER_THE_DOT, SILENT_AFTER_THE_DOT])
def test_what_is_in_doubt_is_an_error_when_the_account_says_so(reply: Any) -> None:
    disposition = settled({"a": reply}, in_doubt="error")

    assert disposition.status is STATUS.ERROR
    assert disposition.error.startswith("in doubt: ")


@pytest.mark.parametrize(
    ("attempts", "jitter", "asked_s", "pause_s"),
    [(0, 0, None, 60), (1, 0, None, 300), (2, 0, None, 300), (99, 0, None, 300), (0, 1, None, 72), (0, -1, None, 48),
     (1, 0.5, None, 330), (0, 0, 5, 60), (0, 0, 90, 90), (0, 0, 90.2, 91)],
)  # fmt: skip
def test_a_pause_follows_the_schedule_with_a_fifth_of_jitter_or_is_the_longer_one_that_was_asked_for(
    attempts: int, jitter: float, asked_s: float | None, pause_s: int
) -> None:
    failure = GREYLISTED if asked_s is None else NOT_FETCHED._replace(retry_after_s=asked_s)

    assert settled({"": failure}, claimed(attempts), jitter=jitter).deferred_ts == SETTLED_AT + pause_s


@pytest.mark.parametrize(
    ("claim", "max_retries", "status"),
    [
        (claimed(attempts=0), 1, "deferred"),
        (claimed(attempts=1), 1, "error"),
        (claimed(attempts=500), 0, "deferred"),
        (claimed(age_s=431_999), 0, "deferred"),
        (claimed(age_s=432_000), 0, "error"),
    ],
)
@pytest.mark.parametrize("reply", [GREYLISTED, NOT_FETCHED])
def test_a_message_is_given_up_after_its_last_retry_and_when_it_is_too_old(
    reply: Any, claim: Any, max_retries: int, status: str
) -> None:
    disposition = settled({"a": reply}, claim, max_retries=max_retries)

    assert (disposition.status, disposition.error) == (status, mailproxy.spoken(reply))


_LAST_WORDS = st.sampled_from([TAKEN, GREYLISTED, NO_SUCH_USER, TOO_MANY, CLOSING, TIMED_OUT, LOST, LOST_AFTER_THE_DOT])


@given(
    replies=st.dictionaries(st.sampled_from("abcd"), _LAST_WORDS, min_size=1),
    before=st.dictionaries(st.sampled_from("efg"), st.sampled_from(["sent", "error"])),
    reused=st.booleans(),
    untried=st.lists(st.just("z"), max_size=1),
)
def test_no_accepted_recipient_is_ever_forgotten(replies: Any, before: Any, reused: bool, untried: list[str]) -> None:
    disposition = settled(replies, claimed(**before), reused=reused, untried=untried)

    accepted = {a for a, status in before.items() if status == "sent"}
    accepted |= {a for a, reply in replies.items() if reply.accepted}
    outcomes = disposition.recipients or {}
    if disposition.status is not STATUS.SENT or outcomes:
        assert {a for a, o in outcomes.items() if o.status is STATUS.SENT} == accepted
    assert bool(accepted) or disposition.status is not STATUS.SENT
    assert not accepted or disposition.status is not STATUS.ERROR
    assert disposition.slot_used == any(
        r.accepted or (r.in_doubt and disposition.lane != "cool") for r in replies.values()
    )


# ======================================================================
# RATE LIMITS
# ======================================================================


def test_a_held_message_takes_room_until_it_is_given_back():
    windows = mailproxy.SendWindows({"minute": 3})

    windows.held += 2
    assert windows.room(1000.0) == 1
    windows.give_back(2)
    assert windows.room(1000.0) == 3
    with pytest.raises(ValueError, match="1 messages given back, but 0 held"):
        windows.give_back()


def test_without_limits_there_is_always_room_and_new_ones_judge_what_was_sent_before_also_before_a_restart():
    windows = mailproxy.SendWindows({})
    windows.held += 100_005
    windows.count(5.0, 100_000)
    assert windows.room(5.0) > 10**9
    assert (windows.opens_at(5.0), windows.left(5.0)) == (5.0, {})

    windows.count(100_000.0, 5)
    windows.limits = {"minute": 6, "hour": 4}

    assert windows.left(100_001.0) == {"minute": 1, "hour": 0}
    windows = mailproxy.SendWindows({"minute": 10, "hour": 10, "day": 10}, [(80_000.0, 2), (1000.0, 1), (79_000.0, 3)])
    assert windows.left(80_001.0) == {"minute": 8, "hour": 5, "day": 4}


@pytest.mark.parametrize(
    ("limits", "sent", "held", "opens_at"),
    [
        ({"minute": 2}, [10_010.5, 10_030.0], 0, 10_071),  # to the second
        ({"hour": 2}, [10_010.5, 10_030.0], 0, 13_620),  # 10,010.5 lies in the minute to 10,020
        ({"day": 2}, [10_010.5, 10_030.0], 0, 10_020 + 86_400),
        ({"minute": 2, "hour": 2, "day": 2}, [10_010.5, 10_030.0], 0, 10_020 + 86_400),
        ({"minute": 2}, [], 2, 10_100),  # held ones are taken for sent now
        ({"minute": 0}, [], 0, 10_100),  # a limit of nothing is asked about again and again
    ],
)
def test_a_window_opens_when_its_oldest_bucket_has_left_it(limits, sent, held, opens_at):
    windows = mailproxy.SendWindows(limits)
    windows.held += len(sent) + held
    for moment in sent:
        windows.count(moment)

    assert windows.opens_at(10_040.0) == opens_at
    assert windows.room(opens_at - 0.001) == 0
    if sent:
        assert windows.room(opens_at) > 0


def test_a_window_has_room_for_several_when_so_many_have_left_it():
    windows = mailproxy.SendWindows({"minute": 5, "hour": 6})
    windows.held += 5
    for moment, n in ((1000.0, 2), (1010.0, 1), (1020.0, 1)):
        windows.count(moment, n)

    assert [windows.opens_at(1030.0, n) for n in (1, 2, 3)] == [1060, 4620, 4620]  # one is still held
    windows.limits = {"minute": 5}
    assert [windows.opens_at(1030.0, n) for n in (1, 2, 3, 4, 5)] == [1060, 1060, 1070, 1080, 1090]


def test_a_clock_that_goes_back_a_little_loses_no_message():
    windows = mailproxy.SendWindows({"minute": 3})
    windows.held += 3

    for moment in (1000.0, 990.0, 1001.0):
        windows.count(moment)

    assert [windows.room(moment) for moment in (1001.0, 1059.0, 1061.0)] == [0, 0, 3]


def test_the_memory_of_the_windows_is_bounded_whatever_the_limit():
    windows = mailproxy.SendWindows({"day": 1_000_000})
    windows.held += 200_000

    for tick in range(200_000):
        windows.count(tick * 0.9)

    buckets = [len(window._buckets) for window in windows._windows.values()]
    assert all(len_now <= most for len_now, most in zip(buckets, (62, 62, 1_442), strict=True))


def lengths_of(limits):
    """The windows that have a limit: length, grain, limit."""
    windows = {"minute": (60, 1), "hour": (3_600, 60), "day": (86_400, 60)}
    return [(*windows[name], limit) for name, limit in limits.items()]


def as_stored(moments):
    """What the queue remembers of sends: their number in each minute, and until when it was."""
    untils = sorted(math.floor(moment) + 1 for moment in moments)
    minutes = [list(minute) for _, minute in itertools.groupby(untils, lambda until: until // 60)]
    return [(minute[-1], len(minute)) for minute in minutes]


limits_of_all_kinds = st.fixed_dictionaries(
    {}, optional={"minute": st.integers(1, 4), "hour": st.integers(1, 9), "day": st.integers(1, 15)}
)
sending_pauses = st.sampled_from([0.0, 0.3, 1.0, 17.5, 60.0, 61.0, 700.0, 3_600.0, 30_000.0]) | st.floats(0, 4_000)
sending_steps = st.tuples(
    sending_pauses, st.sampled_from(["begin", "begin", "sent", "failed", "restart"]), st.floats(0, 1)
)


@given(limits=limits_of_all_kinds, story=st.lists(sending_steps, max_size=80), start=st.floats(0, 1e9))
@settings(max_examples=200, deadline=None)
def test_no_true_window_ever_holds_more_than_its_limit(limits, story, start):
    windows, now = mailproxy.SendWindows(limits), start
    begun, sent, counted = [], [], []

    for pause, what, when in story:
        now += pause
        if what == "begin" and windows.room(now) > 0:
            windows.held += 1
            begun.append(now)
        elif what == "sent" and begun:
            began_at = begun.pop(0)
            sent.append(min(now, began_at + (now - began_at) * when))  # the server took it somewhere between
            windows.count(now)
            counted.append(now)
        elif what == "failed" and begun:
            begun.pop()
            windows.give_back()
        elif what == "restart":
            windows = mailproxy.SendWindows(limits, as_stored(counted))
            windows.held += len(begun)

    for length, _, limit in lengths_of(limits):
        assert all(sum(moment - length < other <= moment for other in sent) <= limit for moment in sent)


@given(
    limits=limits_of_all_kinds,
    pauses_s=st.lists(sending_pauses, min_size=1, max_size=60),
    start=st.integers(0, 10**9),
    restarts=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_no_message_waits_more_than_a_grain_longer_than_it_must(limits, pauses_s, start, restarts):
    windows, now, sent = mailproxy.SendWindows(limits), float(start), []

    for pause in pauses_s:
        now += pause
        if windows.room(now) > 0:
            windows.held += 1
            windows.count(now)
            sent.append(now)
        if restarts:
            windows = mailproxy.SendWindows(limits, as_stored(sent))

    opens_at = windows.opens_at(now)
    more = 61 if restarts else 0  # what was sent within a minute is kept as sent at the last second of it
    reached = [window for window in lengths_of(limits) if len(sent) >= window[2]]
    assert windows.room(opens_at) > 0
    assert now <= opens_at <= max([now, *(sent[-limit] + length + grain + more for length, grain, limit in reached)])


# ======================================================================
# COMPOSITION
# ======================================================================

SENT_AT = 1_700_000_000.0


def composed_submission(**fields: Any) -> bytes:
    """The bytes of a submission with these fields, its attachments as if they had been fetched."""
    whole = {"id": "m-1", "from": "a@example.com", "to": ["b@example.org"], "subject": "Hello", "body": "Hi\n"}
    given_fields = {name: value for name, value in {**whole, **fields}.items() if value is not None}
    message = mailproxy.parse_message(given_fields, new_id=lambda: "new")
    parts = [one._replace(content_type=one.content_type or "application/octet-stream") for one in message.attachments]
    octets = mailproxy.compose(message, parts, date=SENT_AT)
    if message.raw is None and isinstance(given_fields["to"], list):
        stored = json.loads(mailproxy.stored_form(given_fields, message)[0])
        usual = mailproxy.compose_usual(stored, message.message_id, SENT_AT)
        assert usual in (None, (message.return_path, *message.recipients, octets))
    assert octets.count(b"\r") == octets.count(b"\n") == octets.count(b"\r\n")  # which the transport relies on
    return octets


def test_usual_mail_is_composed_a_short_way_into_the_same_bytes() -> None:
    mailboxes = ["a@example.com", "Al O'B-c <a@b.example>", f"{'n' * 58} <a@b>", f"{'n' * 61} <a@b>", "N  M <a@b.de>"]
    mailboxes += [
        "A. B <a@b.de>",
        "Ä <a@b.de>",
        "<a@b.de>",
        "a@b.de ",
        f"{'l' * 60}@b.example",
        "=?x?= <a@b.de>",
        "a..b@c.de",
    ]
    subjects = ["Hello", "s" * 66, "s " * 33, "a =?utf-8?q?b?=", "", "ü", " a", "a  b", "s" * 990]
    bodies = [
        "Hi",
        "",
        "\n",
        "a\r\rb\r\r\nc\rd\n\x0be\x85f\x1cg",
        "a\r\n\r\n",
        "ü" * 20,
        "x" * 991,
        "x\n" * 60_000,
        ".\n..\n",
    ]
    for sender, to in itertools.product(mailboxes, mailboxes):
        composed_submission(**{"from": sender}, to=[to])  # which compares
    for subject, body in itertools.product(subjects, bodies):
        composed_submission(subject=subject, body=body, deferred_ts=int(SENT_AT) + len(body))

    fields = {"id": "m", "from": mailboxes[1], "to": [mailboxes[0]], "subject": subjects[1], "text": "Hi"}
    sender, recipient, octets = mailproxy.compose_usual(fields, "new@b.example", SENT_AT)
    assert (sender, recipient, octets.count(b"\r\n ")) == ("a@b.example", "a@example.com", 0)
    assert mailproxy.compose_usual({**fields, "cc": ["b@example.com"]}, "new@b.example", SENT_AT) is None


def read_by_a_client(octets: bytes) -> EmailMessage:
    """The message as the email package reads it, after it was found fit for the wire."""
    assert b"\n" not in octets.replace(b"\r\n", b"")
    assert b"\r" not in octets.replace(b"\r\n", b"")
    assert max(map(len, octets.split(b"\r\n"))) <= 998
    assert octets.endswith(b"\r\n")
    return email.message_from_bytes(octets, policy=email.policy.default)


def attachment_fields(content: bytes = b"x", **fields: Any) -> dict[str, Any]:
    return {"filename": "a.bin", "content": base64.b64encode(content).decode(), **fields}


def text_read(part: Any) -> str:
    content = part.get_content()
    assert isinstance(content, str)
    return content.replace("\r\n", "\n")


def test_a_plain_message_is_written_exactly_like_this() -> None:
    octets = composed_submission(
        cc="Ann Lee <c@x.org>", bcc="secret@x.org", reply_to="r@x.org", headers={"X-Tag": [1, "b"]}
    )

    assert octets.decode("ascii").split("\r\n") == [
        "From: a@example.com",
        "To: b@example.org",
        "Cc: Ann Lee <c@x.org>",
        "Reply-To: r@x.org",
        "Subject: Hello",
        "Date: Tue, 14 Nov 2023 22:13:20 +0000",
        "Message-ID: <new@example.com>",
        "MIME-Version: 1.0",
        "X-Tag: 1",
        "X-Tag: b",
        'Content-Type: text/plain; charset="utf-8"',
        "Content-Transfer-Encoding: 7bit",
        *("", "Hi", ""),
    ]


# --- the email package as the judge ---------------------------------------

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
HEADER_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=200)
# Readers strip and join white space in names as they like.
NAMES = HEADER_TEXT.map(lambda text: " ".join(text.split())).filter(lambda name: "=?" not in name)
LOCAL_PARTS = st.from_regex(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]{1,20}(\.[a-z]{1,20})?", fullmatch=True)
DOMAINS = st.from_regex(r"[a-z0-9]{1,20}(\.[a-z]{2,9}){0,3}", fullmatch=True)
ADDRESSES = st.builds("{}@{}".format, LOCAL_PARTS, DOMAINS)
PEOPLE = st.lists(st.tuples(NAMES, ADDRESSES), min_size=1, max_size=5)
TYPES = st.sampled_from(["image/png", "message/rfc822", "a/b; c=d"])
FILE = {"filename": HEADER_TEXT.filter(lambda name: name.strip()), "content": st.binary(max_size=300)}
FILES = st.lists(st.fixed_dictionaries(FILE, optional={"inline": st.booleans(), "content_type": TYPES}), max_size=3)


def mailboxes_written(people):
    """The people as a client would write them: names quoted, with all that needs it escaped."""
    return [f'"{name.replace(chr(92), chr(92) * 2).replace(chr(34), chr(92) + chr(34))}" <{a}>' for name, a in people]


def mailboxes_read(octets, header):
    """Names and addresses of a header (the newer parser puts spaces between encoded words until 3.13)."""
    written = str(email.message_from_bytes(octets)[header])
    return [(str(make_header(decode_header(name))), address) for name, address in getaddresses([written])]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(PEOPLE, PEOPLE, HEADER_TEXT, HEADER_TEXT, ANY_TEXT, st.none() | ANY_TEXT, FILES)
def test_what_is_accepted_is_composed_and_reads_back_as_it_was_meant(to, reply_to, subject, tag, text, html, files):
    attachments = [{**one, "content": base64.b64encode(one["content"]).decode()} for one in files]
    people = {"to": mailboxes_written(to), "reply_to": ", ".join(mailboxes_written(reply_to))}
    bodies = {"body": None, "text": text, "html": html, "attachments": attachments}

    octets = composed_submission(**people, **bodies, headers={"X-Tag": tag}, subject=subject)

    message = read_by_a_client(octets)
    assert octets.isascii()
    assert mailboxes_read(octets, "To") == to
    assert mailboxes_read(octets, "Reply-To") == reply_to
    assert message["Subject"] == subject
    assert message["X-Tag"] == tag.strip(" ")
    for subtype, written in (("plain", text), ("html", html)):
        body = message.get_body((subtype,))
        assert (body is None) == (written is None)
        plain_ends = (written or "").replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
        assert body is None or text_read(body).removesuffix("\n") == plain_ends
    related = [one for one in files if one.get("inline") and html is not None]
    sent = related + [one for one in files if one not in related]
    leaves = [part for part in message.walk() if part.get_filename() is not None]
    names = [re.sub(r"[/\\]", "_", one["filename"]).strip() for one in sent]
    assert [part.get_filename() for part in leaves] == names
    for part, one in zip(leaves, sent, strict=True):
        if part.get_content_type() != "message/rfc822":
            assert part.get_payload(decode=True) == one["content"]


# --- header ---------------------------------------------------------------

LONG_NAME = "Minutes of the annual general meeting of the members, second part, with all annexes and votes.pdf"


@pytest.mark.parametrize(
    "subject",
    ["", " ", "Größe", "a  b", " a ", "=?utf-8?q?x?=", "word " * 60, "x" * 5000, "日本語" * 400, "a" * 71,
     "a" * 68, "plain then ünusual then plain again " * 5, "😀" * 50, "e\u0301" * 80, "a" + " " * 3000 + "b",
     "?=", "=? ?=", "a" + "日本" * 30, "aé" * 40, "é 😀" * 30, "aa😀" + "é日 " * 30],
    ids=lambda text: ascii(text[:12]),
)  # fmt: skip
def test_every_subject_arrives_as_it_was_written(subject):
    assert read_by_a_client(composed_submission(subject=subject))["Subject"] == subject


def test_header_lines_are_short_even_when_they_are_encoded():
    octets = composed_submission(subject="Grüße " * 30, to=[f"Jürgen {i} <j{i}@example.org>" for i in range(40)])

    assert max(map(len, octets.partition(b"\r\n\r\n")[0].split(b"\r\n"))) <= 76


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("ab é日😀"), min_size=60, max_size=150))
def test_encoded_words_end_with_a_character_and_before_the_last_one_without_padding_rather_at_a_space(text):
    words = [word.strip() for word in mailproxy._encoded_words(text, beside=9)]

    assert str(make_header(decode_header("\r\n ".join(words)))) == text
    assert max(map(len, words)) <= 75
    assert all(decode_header(word)[0][0].decode() for word in words)  # each one by itself
    assert not any("=?=" in word for word in words[:-1])


def test_an_encoded_subject_is_cut_at_its_spaces():
    subject = "Überraschend viele schöne grüne Bäume stehen dieses Jahr in voller Blüte, überall"

    header = composed_submission(subject=subject).partition(b"Subject: ")[2].partition(b"\r\nDate")[0]

    first, second, *_ = [decode_header(word)[0][0].decode() for word in header.decode().split()]
    assert " " in (first[-1], second[0])
    assert len(first) > 20


def test_extra_headers_replace_what_would_be_generated():
    date = "Fri, 21 Nov 1997 09:55:06 -0600"
    headers = {"Date": date, "Message-ID": "<x@y>", "reply-to": "c@d.org", "subject": "S"}

    message = read_by_a_client(composed_submission(headers=headers))

    assert {name: message.get_all(name) for name in headers} == {name: [value] for name, value in headers.items()}


REFERENCES = " ".join(f"<{i}.{'x' * 40}@example.com>" for i in range(50))


@pytest.mark.parametrize(
    ("name", "value", "written"),
    [
        ("References", REFERENCES, REFERENCES),  # ASCII is folded and not otherwise touched
        ("List-Unsubscribe", f"<https://x.org/?{'a' * 500}>", f"<https://x.org/?{'a' * 500}>"),
        ("Sender", "Jörg <j@example.org>", "=?utf-8?b?SsO2cmc=?= <j@example.org>"),  # the address stays readable
    ],
    ids=["many words", "a long word", "a name that is encoded"],
)
def test_an_extra_header_is_written_as_it_was_given_as_far_as_it_is_ascii(name, value, written):
    octets = composed_submission(headers={name: value})

    header = octets.partition(b"\r\n\r\n")[0].replace(b"\r\n ", b" ").decode()
    assert f"{name}: {written}" in header.split("\r\n")


@pytest.mark.parametrize("content_type", ["plain", "html"])
def test_a_bcc_is_in_no_header(content_type):
    octets = composed_submission(bcc=["Hidden Person <hidden@example.org>"], content_type=content_type)

    assert b"hidden" not in octets.lower()


def test_a_local_part_in_utf_8_goes_out_as_it_is_and_needs_smtputf8():
    fields = {"id": "1", "from": "a@b.org", "to": "Jörg <jörg@bücher.example>", "subject": "ü", "body": "x"}
    unusual = mailproxy.parse_message(fields)
    plain = mailproxy.parse_message({**fields, "to": "j@bücher.example"})

    octets = mailproxy.compose(unusual, (), date=SENT_AT)

    assert "\r\nTo: =?utf-8?b?SsO2cmc=?= <jörg@xn--bcher-kva.example>\r\n".encode() in octets
    assert mailproxy.has_utf8_header(octets)
    assert mailproxy.compose(plain, (), date=SENT_AT).isascii()


@pytest.mark.parametrize(
    "name", [LONG_NAME, LONG_NAME.replace(",", ""), 'the "x" \\ ' * 40 + "y", "a" * 400, f"b {'a' * 300}"]
)
def test_a_long_name_in_ascii_is_in_quotes_and_folded_between_its_words(name):
    octets = composed_submission(to=mailboxes_written([(name, "a@b.org")]) * 2)

    lines = octets.partition(b"\r\nSubject")[0].partition(b"To: ")[2].split(b"\r\n")
    assert mailboxes_read(octets, "To") == [(name, "a@b.org")] * 2
    assert [one.display_name for one in read_by_a_client(octets)["To"].addresses] == [name] * 2
    assert lines[0].startswith(b'"')
    assert max(map(len, name.split())) > 60 or max(map(len, lines)) <= 76


def test_local_parts_with_dots_where_none_may_stand_are_quoted():
    octets = composed_submission(to="Ann <a..b@x.org>, .c@x.org", cc="d.@x.org", reply_to='"e."@x.org')

    lines = octets.split(b"\r\n")
    assert lines[1:4] == [b'To: Ann <"a..b"@x.org>, ".c"@x.org', b'Cc: "d."@x.org', b'Reply-To: "e."@x.org']


def test_the_date_of_a_scheduled_message_is_its_time():
    for deferred_ts, date in ((int(SENT_AT) - 9, SENT_AT), (int(SENT_AT) + 9, SENT_AT + 9)):
        for octets in (composed_submission(deferred_ts=deferred_ts), composed_raw(b"A: b", deferred_ts=deferred_ts)):
            assert email.message_from_bytes(octets, policy=email.policy.default)["Date"].datetime.timestamp() == date


def test_a_message_is_the_same_bytes_on_every_attempt():
    fields = {"text": "a", "html": "b", "body": None, "message_id": "x@y", "attachments": [attachment_fields()]}

    assert composed_submission(**fields) == composed_submission(**fields)


# --- body -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("plain", "7bit"),
        ("x" * 990, "7bit"),
        ("x" * 991, "quoted-printable"),
        ("Grüße aus Köln, und noch etwas mehr Text dazu", "quoted-printable"),
        ("日本語だけの文章です", "base64"),
        (". \n.\n..\nFrom me \n \t\n" + "é" + "x " * 2000, "quoted-printable"),
        pytest.param("Grüße, x = y\t. and so on " * 20_000, "quoted-printable", id="a very long line"),
        pytest.param("x" * 65_535 + "\n" + "y" * 200_000, "quoted-printable", id="a line end at a step"),
        pytest.param(
            "".join("é" + "x" * n + b + "\n" for n in range(200) for b in " \t"), "quoted-printable", id="blanks"
        ),
        pytest.param("é" + "".join("x" * n + " =" for n in range(2000)), "quoted-printable", id="steps"),
    ],
)
def test_text_goes_in_the_plainest_encoding_that_keeps_it(text, encoding):
    octets = composed_submission(body=text)

    message = read_by_a_client(octets)
    assert message["Content-Transfer-Encoding"] == encoding
    assert encoding == "7bit" or max(map(len, octets.split(b"\r\n"))) <= 76
    assert text_read(message).removesuffix("\n") == text.removesuffix("\n")


def test_html_with_its_pictures_beside_the_text_and_before_the_attachments():
    octets = composed_submission(
        body=None,
        text="see",
        html='<img src="cid:logo">',
        attachments=[
            attachment_fields(b"pdf", filename="a.pdf", content_type="application/pdf"),
            attachment_fields(b"png", filename="logo.png", content_type="image/png", content_id="logo", inline=True),
        ],
    )

    message = read_by_a_client(octets)
    types = [part.get_content_type() for part in message.walk()]
    picture = next(part for part in message.walk() if part.get_content_type() == "image/png")
    assert types == [
        "multipart/mixed", "multipart/alternative", "text/plain", "multipart/related", "text/html",
        "image/png", "application/pdf",
    ]  # fmt: skip
    assert (picture["Content-ID"], picture.get_content_disposition()) == ("<logo>", "inline")
    assert [part.get_content() for part in message.iter_attachments()] == [b"pdf"]


def attachment_read(content=b"x", **fields):
    """The only attachment of a message, as a client reads it."""
    octets = composed_submission(attachments=[attachment_fields(content, **fields)])
    (attached,) = read_by_a_client(octets).iter_attachments()
    return attached


@pytest.mark.parametrize(
    ("name", "arrives_as"),
    [
        ("a.pdf", "a.pdf"),
        ("two words.pdf", "two words.pdf"),
        ('say "hi".pdf', 'say "hi".pdf'),
        ("../../etc/passwd", ".._.._etc_passwd"),
        ("C:\\x.txt", "C:_x.txt"),
        ("Größe 日本.pdf", "Größe 日本.pdf"),
        ("100%;a=b'c.pdf", "100%;a=b'c.pdf"),
        ("ü" * 250 + ".pdf", "ü" * 250 + ".pdf"),
        ("x" * 240 + ".pdf", "x" * 240 + ".pdf"),
        ("a =?utf-8?q?b?= c.pdf", "a =?utf-8?q?b?= c.pdf"),
        ("a  b c " * 30 + ".pdf", "a  b c " * 30 + ".pdf"),
        ("日本 " * 60, ("日本 " * 60).strip()),
    ],
    ids=lambda name: ascii(name[:12]),
)
def test_file_names_arrive_as_they_are_but_for_path_separators(name, arrives_as):
    assert attachment_read(filename=name).get_filename() == arrives_as


@pytest.mark.parametrize(
    ("filename", "content_type", "written", "name"),
    [
        ("a.pdf", "application/pdf", 'filename="a.pdf"', None),
        ("x" * 200, "application/pdf", f'filename="{"x" * 200}"', None),
        (LONG_NAME, "application/pdf", f'filename="{LONG_NAME}"', None),
        ("Größe.pdf", "application/pdf", "filename*=utf-8''Gr%C3%B6%C3%9Fe.pdf", "Größe.pdf"),
        ("=?a?q?b?=", "a/b", "filename*=utf-8''%3D%3Fa%3Fq%3Fb%3F%3D", "=?a?q?b?="),
        ("Größe.pdf", "a/b; Name=own.pdf", "filename*=utf-8''Gr%C3%B6%C3%9Fe.pdf", "own.pdf"),
        ("日本" * 30, "a/b", f"filename*=utf-8''{urllib.parse.quote('日本' * 30)}", "日本" * 30),
    ],
    ids=lambda value: ascii(value)[:12],
)
def test_a_file_name_is_quoted_where_it_is_ascii_and_old_readers_find_any_other_as_name(
    filename, content_type, written, name
):
    octets = composed_submission(attachments=[attachment_fields(filename=filename, content_type=content_type)])

    header = octets.rpartition(b"\r\n\r\n")[0].rpartition(b"\r\n\r\n")[0].rpartition(b"Content-Type:")[2].decode()
    part = email.message_from_string(f"Content-Type:{header}\r\n\r\n")  # by the older rules
    shown = part.get_param("name")
    assert f"\r\n {written}\r\n" in f"{header}\r\n"
    assert part.get_filename() == filename
    assert (shown and str(make_header(decode_header(shown)))) == name


@pytest.mark.parametrize("content_type", ["text/x\r\nX-Evil: y", "nonsense", "", "multipart/mixed", "a/" + "b" * 999])
def test_what_a_server_calls_an_attachment_cannot_harm_the_header(content_type):
    fields = {"id": "1", "from": "a@b.org", "to": "c@d.org", "subject": "", "body": ""}
    message = mailproxy.parse_message({**fields, "attachments": [{"url": "http://x"}]})
    part = message.attachments[0]._replace(filename="a\r\nX-Evil: y\0.bin", content_type=content_type, content=b"x")

    (arrived,) = read_by_a_client(mailproxy.compose(message, [part], date=SENT_AT)).iter_attachments()

    assert arrived["X-Evil"] is None
    assert (arrived.get_content_type(), arrived.get_content()) == ("application/octet-stream", b"x")


def test_an_attached_message_stays_a_message():
    attached = attachment_read(b"From: x@y.org\nSubject: inner\n\nbody\n", content_type="message/rfc822")

    assert attached.get_content_type() == "message/rfc822"
    assert attached.get_content()["Subject"] == "inner"


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"no header", b"Subject: \xff\r\n\r\n", b"A: b\r\n\r\n" + b"x" * 2000, b"A: b\r\n\r\n\xc3"]
)
def test_an_attached_message_that_would_not_travel_unencoded_becomes_a_file(content):
    attached = attachment_read(content, content_type="message/rfc822")

    assert (attached.get_content_type(), attached.get_content()) == ("application/octet-stream", content)


def test_a_calendar_keeps_the_method_of_its_content_type():
    content_type = "text/calendar; charset=utf-8; method=REQUEST"

    attached = attachment_read("BEGIN:VCALENDAR ü\r\n".encode(), content_type=content_type)

    assert attached.get_content_type() == "text/calendar"
    assert dict(attached["Content-Type"].params) == {"charset": "utf-8", "method": "REQUEST"}


def test_large_attachments_are_base64_in_lines_of_76_characters():
    content = bytes(range(256)) * 1000

    octets = composed_submission(attachments=[attachment_fields(content)])

    (attached,) = read_by_a_client(octets).iter_attachments()
    assert attached.get_content() == content
    assert max(map(len, octets.split(b"\r\n"))) <= 78


# --- raw, staging ---------------------------------------------------------


def composed_raw(octets, **fields):
    return composed_submission(raw=base64.b64encode(octets).decode(), subject=None, body=None, **fields)


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        pytest.param(
            b"Return-Path: <x@y>\r\nDATE : x\r\nMessage-Id: <a@b>\r\nX-Odd:   \xff \r\n\tfold\r\n\r\n.\r\n\xe9  \r\n\r\nend",
            None,
            id="byte for byte",
        ),
        (  # but for every Bcc, line ends, and what it lacks
            b"bcc: x@y.org,\n z@y.org\nSubject: x\nBCC : a@b.org\nTo: c@d.org\r\r\n\rbody\rmore\nBcc: kept in the body\n",
            b"Subject: x\r\nTo: c@d.org\r\nDate: Tue, 14 Nov 2023 22:13:20 +0000\r\nMessage-ID: <new@example.com>\r\n"
            b"\r\nbody\r\nmore\r\nBcc: kept in the body\r\n",
        ),
        (b"Date: x\nMessage-ID: <a@b>", b"Date: x\r\nMessage-ID: <a@b>\r\n\r\n"),
    ],
)
def test_a_complete_message_goes_out_as_it_is_but_for_bcc_line_ends_and_what_it_lacks(given, sent):
    assert composed_raw(given) == (sent or given)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([b"Bcc: x", b"A: b", b" c", b"\r", b"\n", b"\r\n", b"x", b":"]), max_size=15))
def test_no_complete_message_that_is_accepted_hides_a_bcc_from_us(pieces):
    try:
        octets = composed_raw(b"A: b\r\n" + b"".join(pieces))
    except mailproxy.Rejected:
        return

    header = io.BytesIO(octets.partition(b"\r\n\r\n")[0])
    assert not any(line.lower().startswith(b"bcc") for line in header)


@pytest.mark.parametrize("given_raw", [None, base64.b64encode(b"To: real@example.org\r\n\r\nx").decode()])
def test_staging_sends_everything_to_one_address_and_tells_the_real_ones(given_raw):
    fields = {"id": "1", "from": "a@b.org", "to": "real@x.org", "cc": "c@x.org", "bcc": "d@x.org", "subject": "s"}
    message = mailproxy.parse_message({**fields, "body": "x", "raw": given_raw})

    redirected = mailproxy.redirect(message, "test@staging.org")

    arrived = email.message_from_bytes(mailproxy.compose(redirected, (), date=SENT_AT))
    assert redirected.recipients == ("test@staging.org",)
    assert arrived["X-Original-To"] == "real@x.org, c@x.org, d@x.org"


# ======================================================================
# LOG AND METRICS
# ======================================================================


class Lines:
    """A file that stands for stderr."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("wb")

    def configure(self, level: str = "info", line_format: str = "text", **options: Any) -> None:
        mailproxy.configure_logging(level, line_format, descriptor=self._file.fileno(), **options)

    def read(self) -> list[str]:
        return self._path.read_text(encoding="utf-8").split("\n")[:-1]

    def close(self) -> None:
        self._file.close()


@pytest.fixture
def lines(tmp_path: Path) -> Iterator[Lines]:
    """A place for log lines; the logging of the test process is put back afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("mailproxy")
    kept = (root.handlers[:], root.level, ours.level)
    hooks = (sys.excepthook, sys.unraisablehook, mailproxy.threading.excepthook)
    with contextlib.closing(Lines(tmp_path / "log")) as lines:
        yield lines
    sys.excepthook, sys.unraisablehook, mailproxy.threading.excepthook = hooks
    logging.captureWarnings(False)
    root.handlers, level, own = kept
    root.setLevel(level)
    ours.setLevel(own)


LOG = logging.getLogger("mailproxy")


def test_a_line_is_time_level_sentence_and_fields_and_a_traceback_indented_below_it(lines):
    lines.configure()

    mailproxy.event(LOG, logging.INFO, "100%s\nINFO forged", message="m1", account=None, seconds=0.12345, to=["a", "b"])
    mailproxy.event(LOG, logging.INFO, "cooling", until=1795869769)
    mailproxy.event(LOG, logging.ERROR, "it failed", exc_info=ValueError("a\n2026 INFO forged\x1b"), message="m1")

    line, until, failure, *traceback = lines.read()
    assert datetime.datetime.fromisoformat(line[:20]).tzinfo is datetime.UTC
    assert line[20:] == " INFO 100%s\\nINFO forged message=m1 seconds=0.123 to=a,b"
    assert until[20:] == " INFO cooling until=2026-11-28T12:42:49Z"
    assert failure[20:] == " ERROR it failed message=m1"
    assert traceback == ["    ValueError: a", "    2026 INFO forged\\x1b"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *(("plain", "plain"), ("two words", '"two words"'), ("", '""'), ("a=b", '"a=b"'), ("città", "città")),
        *(('say "hi"', '"say \\"hi\\""'), ("back\\slash", '"back\\\\slash"'), ("a\r\nforged", '"a\\r\\nforged"')),
        *(("\x1b[31mred", '"\\x1b[31mred"'), ("\u2028\u202e", '"\\u2028\\u202e"'), ("\ud800", '"\\ud800"')),
        *((mailproxy.Secret("hunter2"), "Secret()"), (mailproxy.Status.SENT, "sent"), (True, "True")),
    ],
)
def test_whatever_a_value_holds_it_stays_on_its_line(lines, value, shown):
    lines.configure()

    mailproxy.event(LOG, logging.INFO, "seen", value=value)

    assert [line[20:] for line in lines.read()] == [f" INFO seen value={shown}"]


def test_the_request_is_named_in_every_line_it_causes(lines):
    lines.configure()

    async def request(name: str) -> None:
        mailproxy.request_id.set(name)
        await asyncio.sleep(0)
        mailproxy.event(LOG, logging.INFO, "seen")

    async def both() -> None:
        await asyncio.gather(request("r1"), request("r2"))
        mailproxy.event(LOG, logging.INFO, "outside")

    asyncio.run(both())

    assert [line[25:] for line in lines.read()] == [" seen request=r1", " seen request=r2", " outside"]


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_level_can_be_changed_while_running_and_libraries_say_nothing_below_warning(lines, level):
    lines.configure("debug", "text")
    logging.getLogger("some.library").info("password hunter2")
    logging.getLogger("some.library").warning("%s is odd", "this")
    lines.configure(level, "json")
    levels = ("debug", "info", "warning", "error")

    for log in (LOG, logging.getLogger("some.library")):
        for name in levels:
            log.log(getattr(logging, name.upper()), "%s", "seen")

    text, *rest = lines.read()
    assert text[20:] == " WARNING this is odd logger=some.library"
    seen = [json.loads(line) for line in rest]
    at_least = levels[levels.index(level) :]
    assert [line["level"] for line in seen if "logger" not in line] == list(at_least)
    assert [line["level"] for line in seen if "logger" in line] == [name for name in at_least if name in levels[2:]]
    assert {line["event"] for line in seen} == {"seen"}


def test_json_lines_keep_the_types_of_fields(lines):
    lines.configure("info", "json")

    mailproxy.event(
        LOG, logging.WARNING, "seen\n", code=250, ok=True, took=1/3, status=mailproxy.Status.SENT,
        to=["ü", "\ud800"], time="forged", exc_info=ValueError("why"),
    )  # fmt: skip

    line = json.loads(lines.read()[0])
    assert line.pop("time").endswith("Z")
    assert line.pop("traceback") == "ValueError: why"
    fields = {"code": 250, "ok": True, "took": 0.333, "status": "sent", "to": ["ü", "\ud800"]}
    assert line == {"level": "warning", "event": "seen\n", **fields}


def test_journald_gets_priorities_and_no_time_where_systemd_says_that_stderr_is_the_journal(lines):
    lines.configure("debug", "text", journal=True)

    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.CRITICAL):
        mailproxy.event(LOG, level, "seen")
    mailproxy.event(LOG, logging.ERROR, "failed", exc_info=ValueError("a\nb"))

    seen = ["<7>seen", "<6>seen", "<4>seen", "<3>seen"]
    assert lines.read() == [*seen, "<3>failed", "<3>    ValueError: a", "<3>    b"]
    found = os.fstat(lines._file.fileno())
    for named, is_it in (
        ({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}, True),
        ({"JOURNAL_STREAM": "8:1"}, False),
    ):
        assert mailproxy.stderr_is_journal(named, lines._file.fileno()) is is_it
    assert not mailproxy.stderr_is_journal({}, lines._file.fileno())


def test_a_reader_that_is_slow_or_went_away_stops_nothing(lines):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    mailproxy.configure_logging("info", "text", descriptor=writing)

    mailproxy.event(LOG, logging.INFO, "x" * 500_000)

    assert 0 < len(os.read(reading, 1_000_000)) < 500_000  # what cannot be written at once is dropped
    os.close(reading)
    mailproxy.event(LOG, logging.INFO, "nobody reads this")
    speak = "import mailproxy, logging; mailproxy.configure_logging('info', 'text'); logging.warning('seen')"
    ended = subprocess.run([sys.executable, "-c", speak], stderr=writing, cwd=PROGRAM.parent, timeout=30, check=False)
    assert ended.returncode == 0
    os.close(writing)
    mailproxy.event(LOG, logging.INFO, "nor this")


NOBODY_CATCHES = """
import asyncio, logging, sys, threading, time, warnings
import mailproxy
mailproxy.configure_logging("info", "json")
warnings.warn("deprecated thing")
writer = threading.Thread(target=lambda: 1 / 0, name="writer")
writer.start()
writer.join()
async def main():
    loop = asyncio.get_running_loop()
    loop.call_soon(lambda: [][1])
    await asyncio.sleep(0.01)
asyncio.run(main())
class Odd:
    def __del__(self):
        raise OSError("odd")
Odd()
raise RuntimeError("the end\\nof it")
"""


def test_every_line_is_json_whoever_speaks():
    ended = subprocess.run(
        [sys.executable, "-c", NOBODY_CATCHES],
        capture_output=True,
        text=True,
        cwd=PROGRAM.parent,
        timeout=30,
        check=False,
    )

    found = [json.loads(line) for line in ended.stderr.splitlines()]
    assert ended.returncode == 1
    assert [(line["level"], line.get("logger"), line.get("thread")) for line in found] == [
        ("warning", "py.warnings", None), ("error", None, "writer"), ("error", "asyncio", None), ("error", None, None),
        ("critical", None, None),
    ]  # fmt: skip
    endings = ["ZeroDivisionError: division by zero", "IndexError: list index out of range", "OSError: odd"]
    for line, ending in zip(found[1:], [*endings, "RuntimeError: the end\nof it"], strict=True):
        assert line["traceback"].endswith(ending)


# --- metrics -------------------------------------------------------------


def samples(exposition: bytes) -> dict[str, float]:
    """The exposition as {name{label="value"}: number}, labels in alphabetical order."""
    found = {}
    for family in prometheus_client.parser.text_string_to_metric_families(exposition.decode()):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_names_follow_the_conventions_of_prometheus_and_no_label_is_made_up_or_outlives_its_account(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    there = {"host": "127.0.0.1", "port": smtp.port}
    with SleepyDaemon(tmp_path, {"account:leaves": there, "account:stays": there}) as daemon:
        daemon.submit(letter("a", account_id="stays"))
        wait_sent(daemon, "a")
        for number in range(50):
            daemon.request(f"BREW{number}", f"/brew/{number}")
        exposition = daemon.get("/metrics").content

        for family in prometheus_client.parser.text_string_to_metric_families(exposition.decode()):
            assert family.documentation.endswith(".")
            assert family.name.startswith(("mailproxy_", "process_"))
            names = {sample.name for sample in family.samples}
            assert not {name for name in names if name.endswith("_created")}
            assert all(name.endswith("_total") == (family.type == "counter") for name in names)
            assert family.type != "histogram" or family.name.endswith("_seconds")
        unmatched = 'mailproxy_http_requests_total{code="404",method="other",route="unmatched"}'
        assert samples(exposition)[unmatched] == 50
        assert b"BREW" not in exposition
        assert b'mailproxy_account_up{account="leaves"}' in exposition

        del daemon.config["account:leaves"]
        daemon.write_config()
        daemon.signal(signal.SIGHUP)
        daemon.wait_for_log("configuration reloaded")
        exposition = daemon.get("/metrics").content
        assert b'account="leaves"' not in exposition
        assert samples(exposition)['mailproxy_messages_sent_total{account="stays"}'] == 1


def test_what_is_known_beforehand_is_there_at_zero_and_an_account_takes_its_series_along():
    metrics, odd = mailproxy.Metrics("1"), 'a"b\\c\nd'
    for account_id in ("gone", "kept", odd):
        metrics.know(account_id)
    found = samples(metrics.exposition())
    for name in (
        *('messages_failed_total{account="gone"}', 'messages_deferred_total{account="gone",reason="login"}'),
        *('smtp_connects_total{account="gone",outcome="login_refused"}', 'report_requests_total{outcome="timeout"}'),
        *('attachment_fetches_total{outcome="deferred",source="s3"}', f'messages_sent_total{{account="{odd}"}}'),
    ):
        assert found[f"mailproxy_{name}"] == 0
    for account_id in ("gone", "kept"):
        metrics.messages_sent.labels(metrics.label(account_id)).inc()
        metrics.smtp_transaction_seconds.labels(metrics.label(account_id)).observe(1)
        metrics.queue_wait_seconds.labels(metrics.label(account_id)).observe(1)
        metrics.account_up.labels(account_id).set(1)

    metrics.forget("gone")
    metrics.forget("never known")
    metrics.messages_failed.labels(metrics.label("gone")).inc()

    found = samples(metrics.exposition())
    assert not [name for name in found if "gone" in name]
    assert found['mailproxy_messages_failed_total{account="unknown"}'] == 1
    assert found['mailproxy_messages_sent_total{account="kept"}'] == 1
    metrics.know("gone")
    assert samples(metrics.exposition())['mailproxy_messages_sent_total{account="gone"}'] == 0
    assert not [name for name in samples(mailproxy.Metrics("1").exposition()) if "account=" in name]


# ======================================================================
# QUEUE FILE
# ======================================================================


@contextlib.contextmanager
def queue_file(
    folder: Path,
    schema: str = "CREATE TABLE t (x INTEGER PRIMARY KEY)",
    *steps: str,
    observe: Any = lambda seconds: None,
) -> Iterator[Any]:
    """An open queue file and a runner for coroutines on one loop."""
    where = Storage.place(folder, tables=False)
    if where.startswith("postgresql:"):
        file = mailproxy.PostgresFile(where, f"{mailproxy.SCHEMA}; {schema}", steps, observe_commit=observe)
    else:
        file = mailproxy.QueueFile(where, schema, steps, observe_commit=observe)
    with asyncio.Runner() as runner:
        file.open()
        try:
            yield file, runner.run
        finally:
            runner.run(file.close())


def rows_of(folder: Path, statement: str = "SELECT x FROM t ORDER BY x") -> list[Any]:
    """What another process sees in the file now."""
    where = Storage.place(folder)
    if where.startswith("postgresql:"):
        with psycopg.connect(where) as session:
            return [row[0] for row in session.execute(statement)]
    with contextlib.closing(sqlite3.connect(folder / "queue.db")) as other:
        return [row[0] for row in other.execute(statement)]


@contextlib.contextmanager
def another_process(folder: Path, *statements: str) -> Iterator[None]:
    """Another connection to the file, which has run the statements and not ended their transaction."""
    with contextlib.closing(sqlite3.connect(folder / "queue.db", isolation_level=None)) as other:
        for statement in statements:
            other.execute(statement).fetchall()
        yield


def insert(x: int) -> Callable[[sqlite3.Connection], Any]:
    return lambda db: db.execute("INSERT INTO t VALUES (?)", (x,))


async def all_of(file: Any, *works: Any) -> list[Any]:
    """What becomes of pieces of work that are asked for in one turn of the loop."""
    return await asyncio.gather(*(file.write(work) for work in works), return_exceptions=True)


@both_engines
def test_writes_that_wait_together_share_a_commit(tmp_path: Path) -> None:
    commits: list[float] = []
    with queue_file(tmp_path, observe=commits.append) as (file, run):
        run(all_of(file, *map(insert, range(200))))

        assert rows_of(tmp_path) == list(range(200))
        assert len(commits) < 50


@both_engines
def test_work_that_raises_is_undone_alone_and_the_others_are_in_the_file(tmp_path: Path, engine: str) -> None:
    def insert_and_raise(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO t VALUES (2)")
        raise KeyError("two")

    kind = "IntegrityError" if engine == "sqlite" else "UniqueViolation"
    with queue_file(tmp_path) as (file, run):
        results = run(all_of(file, insert_and_raise, insert(1), insert_and_raise, insert(3), insert(1)))

        assert [type(results[i]).__name__ for i in (0, 2, 4)] == ["KeyError", "KeyError", kind]
        assert not file.refuses
        assert rows_of(tmp_path) == [1, 3]


@both_engines
def test_the_same_work_for_many_callers_is_done_in_one_call_and_should_it_raise_for_each_alone(tmp_path: Path) -> None:
    def insert_all(db: sqlite3.Connection, xs: Sequence[int]) -> list[tuple[int, int]]:
        db.executemany("INSERT INTO t VALUES (?)", [(x,) for x in xs])
        return [(x, len(xs)) for x in xs]

    async def together(file: Any, first: int, xs: Sequence[int]) -> list[Any]:
        writes = [file.write_together(insert_all, x) for x in xs]
        return (await asyncio.gather(file.write(insert(first)), *writes, return_exceptions=True))[1:]

    with queue_file(tmp_path) as (file, run):
        results = run(together(file, 1000, range(50)))

        assert [x for x, _ in results] == list(range(50))
        assert max(callers for _, callers in results) > 1

        results = run(together(file, 1001, [101, 102, 101, 103]))
        assert [isinstance(result, file.mistakes) for result in results] == [False, False, True, False]
        assert rows_of(tmp_path) == [*range(50), 101, 102, 103, 1000, 1001]


def test_what_was_asked_before_the_end_is_written_and_nothing_afterwards(tmp_path: Path) -> None:
    async def ask_and_close() -> list[Any]:
        await file.read(lambda db: db.execute("SELECT x FROM t").fetchall())
        writes = [asyncio.ensure_future(file.write(insert(x))) for x in range(20)]
        await asyncio.sleep(0)
        await file.close()
        return await asyncio.gather(*writes)

    file = mailproxy.QueueFile(str(tmp_path / "queue.db"), "CREATE TABLE t (x)", observe_commit=lambda s: None)
    file.open()
    asyncio.run(ask_and_close())

    assert {path.name for path in tmp_path.iterdir()} == {"queue.db", "queue.db.lock"}  # so it can be moved
    assert rows_of(tmp_path) == list(range(20))
    with pytest.raises(mailproxy.StorageUnavailable):
        asyncio.run(file.write(insert(20)))


def test_who_asked_together_the_last_time_shares_a_commit_again_though_one_comes_after_the_other(
    tmp_path: Path,
) -> None:
    commits: list[float] = []

    async def write(first: int, turns: int) -> int:
        before = len(commits)
        writes = []
        for x in range(first, first + 10):
            writes.append(asyncio.ensure_future(file.write(insert(x))))
            for _ in range(turns):
                await asyncio.sleep(0)
        await asyncio.gather(*writes)
        return len(commits) - before

    with queue_file(tmp_path, observe=commits.append) as (file, run):
        assert [run(write(10, 0)), run(write(20, 3))] == [1, 1]


def test_what_is_asked_while_another_process_writes_comes_along_with_the_first(tmp_path: Path) -> None:
    commits: list[float] = []

    async def write() -> None:
        with another_process(tmp_path, "BEGIN IMMEDIATE"):
            writes = [asyncio.ensure_future(file.write(insert(1)))]
            for _ in range(20):  # in so many turns of the loop the writer has it
                await asyncio.sleep(0)
            writes += [asyncio.ensure_future(file.write(insert(x))) for x in range(2, 20)]
            await asyncio.sleep(0)
        await asyncio.gather(*writes)

    with queue_file(tmp_path, observe=commits.append) as (file, run):
        run(write())
        assert len(commits) == 1
    assert rows_of(tmp_path) == list(range(1, 20))


def test_while_the_disk_writes_the_loop_can_do_something(tmp_path: Path) -> None:
    with queue_file(tmp_path) as (file, run):
        done: list[str] = []
        file.meanwhile = functools.partial(done.append, "meanwhile")

        async def write() -> None:
            await asyncio.gather(file.write(insert(1)), file.write(insert(2)))
            done.append("written")

        run(write())
        assert done == ["meanwhile", "written"]


def test_a_locked_file_is_read_refuses_what_is_written_and_comes_back_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailproxy, "BUSY_TIMEOUT_MS", 50)
    with queue_file(tmp_path) as (file, run):
        run(file.write(insert(1)))
        with another_process(tmp_path, "BEGIN IMMEDIATE"):
            assert run(file.read(lambda db: list(map(tuple, db.execute("SELECT x FROM t"))))) == [(1,)]
            with pytest.raises(mailproxy.StorageUnavailable):
                run(file.write(insert(2)))
            assert file.refuses

        run(file.write(insert(3)))

        assert not file.refuses
        assert rows_of(tmp_path) == [1, 3]
        with pytest.raises(mailproxy.StorageUnavailable, match="readonly"):
            run(file.read(insert(4)))


def test_a_file_that_refused_is_trusted_again_only_after_something_was_written(tmp_path: Path) -> None:
    def too_much(db: sqlite3.Connection) -> None:
        db.execute("PRAGMA max_page_count = 4")  # of this connection, which is closed after its failure
        db.execute("UPDATE t SET y = zeroblob(100000)")

    with queue_file(tmp_path, "CREATE TABLE t (x, y); INSERT INTO t VALUES (1, '')") as (file, run):
        with pytest.raises(mailproxy.StorageUnavailable, match="full"):
            run(file.write(too_much))

        for x, refuses in ((2, True), (1, False)):
            run(file.write(lambda db, x=x: db.execute("DELETE FROM t WHERE x = ?", (x,))))
            assert file.refuses is refuses


def test_the_wal_stays_small_in_a_burst_while_somebody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailproxy, "CHECKPOINT_PAGES", 250)  # 1 MB
    wal = tmp_path / "queue.db-wal"

    sizes: list[int] = []

    async def listing(file: Any) -> None:
        while len(sizes) < 100:
            await file.read(lambda db: db.execute("SELECT sum(length(x)) FROM t").fetchall())

    async def burst(file: Any) -> None:
        """10 MB, in commits of 100 kB."""
        reading = asyncio.ensure_future(listing(file))
        while len(sizes) < 100:
            await file.write(lambda db: db.execute("INSERT INTO t VALUES (zeroblob(100000))"))
            sizes.append(wal.stat().st_size)
        await reading

    with queue_file(tmp_path, "CREATE TABLE t (x)") as (file, run):
        run(burst(file))

    assert max(sizes) < 5_000_000


def test_a_wal_that_grew_while_another_process_looked_at_the_file_shrinks_again(tmp_path: Path) -> None:
    wal = tmp_path / "queue.db-wal"
    with queue_file(tmp_path, "CREATE TABLE t (x)") as (file, run):
        with another_process(tmp_path, "BEGIN", "SELECT * FROM t"):
            run(file.write(lambda db: db.execute("INSERT INTO t VALUES (zeroblob(30000000))")))
            assert wal.stat().st_size > 30_000_000

        for number in range(3):  # the first copies the WAL into the file, the next begins it anew
            run(file.write(insert(number)))

        assert wal.stat().st_size < 20_000_000


def test_the_file_and_its_siblings_are_private_even_when_they_were_not_and_commits_are_synced(tmp_path: Path) -> None:
    (tmp_path / "queue.db").touch(mode=0o644)
    pragmas = ("journal_mode", "synchronous")

    with queue_file(tmp_path) as (file, run):
        found = run(file.write(lambda db: [db.execute(f"PRAGMA {p}").fetchone()[0] for p in pragmas]))
        run(file.write(insert(1)))
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}

    assert modes == dict.fromkeys(("queue.db", "queue.db-wal", "queue.db-shm", "queue.db.lock"), 0o600)
    assert found == ["wal", 2]


@pytest.mark.parametrize(("name", "words"), [("queue.db", "with pid {pid};"), ("linked.db", "has 2 names")])
def test_a_second_process_is_refused_and_told_why(tmp_path: Path, name: str, words: str) -> None:
    with queue_file(tmp_path):
        if name != "queue.db":
            os.link(tmp_path / "queue.db", tmp_path / name)
        second = mailproxy.QueueFile(str(tmp_path / name), "", observe_commit=lambda seconds: None)

        with pytest.raises(mailproxy.ConfigurationError, match=words.format(pid=os.getpid())):
            second.open()


def test_a_file_is_migrated_in_one_step_or_left_as_it_was_and_a_newer_one_is_refused(tmp_path: Path) -> None:
    newest = "CREATE TABLE t (x, y DEFAULT 7, z DEFAULT 8)"
    steps = ("ALTER TABLE t ADD COLUMN y DEFAULT 7; ALTER TABLE t ADD COLUMN z DEFAULT 8", "SELECT nonsense")
    with queue_file(tmp_path, "CREATE TABLE t (x)") as (file, run):
        run(file.write(insert(1)))

    with pytest.raises(mailproxy.ConfigurationError), queue_file(tmp_path, "", "CREATE TABLE u (x); SELECT nonsense"):
        pass
    assert rows_of(tmp_path, "PRAGMA user_version") == [1]
    assert rows_of(tmp_path, "SELECT name FROM sqlite_master WHERE name = 'u'") == []

    with queue_file(tmp_path, newest, *steps) as (file, run):
        assert run(file.read(lambda db: list(map(tuple, db.execute("SELECT x, y, z FROM t"))))) == [(1, 7, 8)]
    assert rows_of(tmp_path, "PRAGMA user_version") == [3]
    with pytest.raises(mailproxy.ConfigurationError, match="newer"), queue_file(tmp_path, newest, *steps[:1]):
        pass


def test_a_migration_that_is_killed_is_undone_and_repeated(tmp_path: Path) -> None:
    path, wal = tmp_path / "queue.db", tmp_path / "queue.db-wal"
    step = "ALTER TABLE messages ADD COLUMN tenant; UPDATE messages SET tenant = 'all', payload = payload || ' '"
    for_ever = "; WITH RECURSIVE count(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM count) SELECT max(n) FROM count"
    with queue_file(tmp_path, mailproxy.SCHEMA, *mailproxy.MIGRATIONS) as (file, run):
        run(file.write(backlog(scheduled=9_998, sent=1, ready_of_another=1)))
        run(file.write(lambda db: db.execute("UPDATE messages SET payload = printf('%2000s', '{}')")))

    steps = f"(*mailproxy.MIGRATIONS, {step + for_ever!r})"
    open_it = f"import mailproxy; mailproxy.QueueFile({str(path)!r}, '', {steps}, observe_commit=print).open()"
    for written in (3, 9):  # MB, of 20
        with subprocess.Popen([sys.executable, "-c", open_it], cwd=PROGRAM.parent) as migration:
            wait_until(lambda: wal.exists() and wal.stat().st_size > written * 1_000_000, "the migration")  # noqa: B023
            migration.kill()
        assert migration.returncode == -signal.SIGKILL
    untouched = rows_of(tmp_path, "SELECT count(*) FROM messages WHERE length(payload) = 2000")
    assert (untouched, rows_of(tmp_path, "PRAGMA user_version")) == ([10_000], [len(mailproxy.MIGRATIONS) + 1])

    with queue_file(tmp_path, "", *mailproxy.MIGRATIONS, step):
        moved = rows_of(tmp_path, "SELECT count(*) FROM messages WHERE length(payload) = 2001 AND tenant = 'all'")
        assert (moved, rows_of(tmp_path, "PRAGMA integrity_check")) == ([10_000], ["ok"])
        assert rows_of(tmp_path, "PRAGMA user_version") == [len(mailproxy.MIGRATIONS) + 2]


def test_what_is_no_queue_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    pipe, folder, foreign = (tmp_path / name / "queue.db" for name in ("pipe", "folder", "foreign"))
    folder.mkdir(parents=True)
    for place in pipe, foreign:
        place.parent.mkdir()
    os.mkfifo(pipe, 0o666)
    with contextlib.closing(sqlite3.connect(foreign)) as other:
        other.execute("CREATE TABLE theirs (a)")
    pipe_mode = pipe.stat().st_mode

    for place, flaw in (pipe, "not a regular file"), (folder, "not a regular file"), (foreign, "of another program"):
        with pytest.raises(mailproxy.ConfigurationError, match=f"{place} is .*{flaw}"), queue_file(place.parent):
            pass

    assert (pipe.stat().st_mode, os.listdir(pipe.parent)) == (pipe_mode, ["queue.db"])
    assert rows_of(foreign.parent, "SELECT name FROM sqlite_master") == ["theirs"]


def test_an_sqlite_that_is_too_old_and_a_folder_that_is_not_there_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(mailproxy.ConfigurationError, match="does not exist"), queue_file(tmp_path / "nowhere"):
        pass
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(mailproxy.ConfigurationError, match="newer"), queue_file(tmp_path):
        pass


# ======================================================================
# QUEUE
# ======================================================================

NOW = 1_800_000_000


class QueueRig:
    """A queue on a real file, with a clock that the test turns."""

    def __init__(self, folder: Path, run: Callable[[Any], Any]) -> None:
        self.now: float = NOW
        self.run = run
        where = Storage.place(folder)
        kind = mailproxy.PostgresFile if where.startswith("postgresql:") else mailproxy.QueueFile
        self.file = kind(
            where,
            mailproxy.SCHEMA,
            mailproxy.MIGRATIONS,
            mailproxy.USED_BY_MIGRATIONS,
            observe_commit=lambda seconds: None,
        )
        self.file.open()
        self.queue = mailproxy.Queue(self.file, now=lambda: self.now)
        run(self.queue.load())

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The queue's method of that name, run to its end."""
        return lambda *words, **options: self.run(getattr(self.queue, name)(*words, **options))

    def sql(self, statement: str) -> list[Any]:
        if self.file.path.startswith("postgresql:"):
            with psycopg.connect(self.file.path, autocommit=True, prepare_threshold=None) as other:
                cursor = other.execute(statement)
                return cursor.fetchall() if cursor.description else []
        with contextlib.closing(sqlite3.connect(self.file.path, isolation_level=None)) as other:
            return other.execute(statement).fetchall()

    def accepted(self, *submissions: Any) -> None:
        assert self.accept(submissions) == [None] * len(submissions)

    def claimed(self, most: int = 100, account: str = "main", retried_first: bool = False) -> list[Any]:
        return self.claim([mailproxy.Order(account, most, retried_first=retried_first)])[0]

    def outcome(self, claim: Any, status: Any, **options: Any) -> Any:
        fields = {"lane": mailproxy.LaneSignal.UP, "counted": True, "slot_used": status is SENT, **options}
        reply = mailproxy.Reply(mailproxy.Stage.END_OF_DATA, 250 if status is SENT else 451, "as told")
        attempt = mailproxy.Attempt(self.now, self.now, {"to@example.com": reply}, "main-1")
        return mailproxy.Outcome(claim, attempt, mailproxy.Disposition(status, **fields), sent=status is SENT)

    def recorded(self, claim: Any, status: Any, **options: Any) -> None:
        self.record(self.outcome(claim, status, **options))

    def fields_of(self, id_: str) -> dict[str, Any]:
        return self.look_up(id_)[0].fields


SENT, ERROR, DEFERRED, QUEUED = (mailproxy.Status(word) for word in ("sent", "error", "deferred", "queued"))


@pytest.fixture
def rig(tmp_path: Path, engine: str) -> Iterator[QueueRig]:
    with asyncio.Runner() as runner:
        rig = QueueRig(tmp_path, runner.run)
        yield rig
        runner.run(rig.file.close())


def submission(id_: str, **fields: Any) -> Any:
    given = {
        "account_id": "main", "priority": 2, "deferred_ts": None, "expires_ts": None, "batch_code": None,
        "message_id": f"<{id_}@example.com>", "parts": 0, "addressees": 1, "sought": "\nto@example.com\n\thello",
        "subject": None, "payload": '{"subject": "hello"}',
        "contents": {},
    }  # fmt: skip
    return mailproxy.Submission(id=id_, **{**given, **fields})


def ids(claims: Sequence[Any]) -> list[str]:
    return [claim.id for claim in claims]


@also_pgbouncer
def test_messages_are_claimed_once_by_priority_and_within_one_in_the_order_of_acceptance(rig: QueueRig) -> None:
    rig.accepted(submission("a"), submission("b", priority=0), submission("c"), submission("d", priority=3))
    rig.accepted(submission("other", account_id="other"))
    (first,) = rig.claimed(1)

    assert ids([first, *rig.claimed()]) == ["b", "a", "c", "d"]
    assert rig.claimed() == []
    rig.queue.release([first])
    assert ids(rig.claimed()) == ["b"]
    assert ids(rig.claimed(account="other")) == ["other"]


def test_new_and_retried_mail_take_turns(rig: QueueRig) -> None:
    rig.accepted(*(submission(f"old{i}") for i in range(3)))
    for claim in rig.claimed():
        rig.recorded(claim, DEFERRED, deferred_ts=NOW + 60, reason="retry")
    rig.accepted(*(submission(f"new{i}") for i in range(3)))
    rig.now += 61
    rig.catch_up()

    assert ids(rig.claimed(4)) == ["new0", "old0", "new1", "old1"]
    assert ids(rig.claimed(4, retried_first=True)) == ["old2", "new2"]


def test_what_waits_is_ready_when_its_time_has_come_which_is_known_without_asking(rig: QueueRig) -> None:
    rig.catch_up()
    rig.accepted(submission("later", deferred_ts=NOW + 10), submission("now"))
    assert rig.queue.next_ts == NOW + 10
    (claim,) = rig.claimed()
    rig.recorded(claim, DEFERRED, deferred_ts=NOW + 5, reason="retry")
    assert rig.queue.next_ts == NOW + 5

    rig.now += 10

    assert rig.catch_up() == ({"main"}, [])
    assert ids(rig.claimed()) == ["later", "now"]


@also_pgbouncer
def test_submissions_that_wait_together_are_stored_in_one_go_and_each_judged_alone(rig: QueueRig) -> None:
    states = {"sent": SENT, "failed": ERROR, "deferred": DEFERRED, "on the wire": QUEUED}
    rig.accepted(*(submission(id_, payload='{"subject": "first"}') for id_ in (*states, "waits")))
    for claim in rig.claimed(len(states)):
        status = states[claim.id]
        rig.recorded(claim, status, deferred_ts=NOW + 60 if status is DEFERRED else None, error="as told")
    batches = [["new", "sent"], ["waits", "on the wire"], [], ["failed", "deferred"], ["new", "newer"]]

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(rig.queue.accept([submission(id_) for id_ in batch]) for batch in batches))

    verdicts = rig.run(all_at_once())

    assert verdicts == [[None, "already sent"], [None, "in delivery"], [], [None, None], ["known", None]]
    order = [row[0] for row in rig.sql("SELECT id FROM messages ORDER BY seq")]
    assert order == ["sent", "on the wire", "new", "newer", "waits", "failed", "deferred"]
    assert rig.tallies()[0]["main"] == (6, 0, 1)
    for id_ in order:
        record, attempts = rig.look_up(id_)
        kept = id_ in ("sent", "on the wire")
        assert record.payload["subject"] == ("first" if kept else "hello")
        assert (record.fields["attempts"], record.fields["error"]) == ((1, "as told") if kept else (0, None))
        assert len(attempts) == kept


@pytest.mark.parametrize("longest", [20, 100_000])
def test_of_many_submissions_those_that_are_known_already_are_found_wherever_they_stand(
    rig: QueueRig, longest: int
) -> None:
    known = (0, 31, 32, 50, 74)
    rig.accepted(*(submission(f"m{i}") for i in known))
    for claim in rig.claimed():
        rig.recorded(claim, SENT)

    verdicts = rig.accept([submission(f"m{i}", payload=f'{{"n": "{i:0{longest}}"}}') for i in range(75)])

    assert verdicts == ["already sent" if i in known else None for i in range(75)]
    assert rig.tallies()[0]["main"] == (70, 0, 5)
    assert [(claim.id, int(json.loads(claim.payload or '{"n": -1}')["n"])) for claim in rig.claimed()] == [
        (f"m{i}", i if longest == 20 else -1) for i in range(75) if i not in known
    ]


def test_contents_live_and_die_with_the_submission_that_was_stored_whose_place_is_never_given_twice(
    rig: QueueRig,
) -> None:
    rig.accepted(submission("sent", contents={0: b"first"}))
    rig.recorded(rig.claimed()[0], SENT)
    rig.accept([submission("sent", contents={0: b"again"}), submission("new", contents={0: b"\0\xff", -1: b"raw"})])
    assert (rig.contents(1), rig.contents(3)) == ({0: b"first"}, {0: b"\0\xff", -1: b"raw"})

    rig.delete(["new"])
    rig.load()
    rig.accepted(submission("newer"))

    assert rig.sql("SELECT seq, position FROM contents") == [(1, 0)]
    assert rig.sql("SELECT seq FROM messages ORDER BY seq") == [(1,), (4,)]


def test_outcomes_that_wait_together_are_recorded_in_one_go(rig: QueueRig) -> None:
    rig.accepted(submission("a"), submission("b"), submission("c", account_id="other"))
    outcomes = [rig.outcome(claim, SENT) for claim in rig.claimed() + rig.claimed(account="other")]

    async def all_at_once() -> None:
        await asyncio.gather(*(rig.queue.record(outcome) for outcome in outcomes))

    rig.run(all_at_once())

    assert [(rig.fields_of(id_)["status"], len(rig.look_up(id_)[1])) for id_ in "abc"] == [("sent", 1)] * 3
    assert [rig.standing(id_).sends for id_ in ("main", "other")] == [[(NOW + 1, 2)], [(NOW + 1, 1)]]
    assert [entry["id"] for entry in rig.unreported(10).values()] == ["a", "b", "c"]


def test_only_final_reported_messages_are_purged_and_what_was_sent_is_remembered_for_a_time(rig: QueueRig) -> None:
    rig.accepted(*(submission(id_) for id_ in ("sent", "failed", "deferred", "unreported", "waiting")))
    claims = {claim.id: claim for claim in rig.claimed()}
    rig.recorded(claims["sent"], SENT)
    rig.recorded(claims["failed"], ERROR, error="no")
    rig.recorded(claims["deferred"], DEFERRED, deferred_ts=NOW + 9999, reason="retry")
    rig.acknowledge(rig.unreported(10))
    rig.recorded(claims["unreported"], SENT)
    rig.now += 100

    assert rig.tallies()[2] == 1
    assert [rig.purge(50, unreported_too=too) for too in (False, False, True)] == [2, 0, 1]
    assert rig.tallies()[2] == 0
    assert rig.sql("SELECT id FROM messages ORDER BY seq") == [("deferred",), ("waiting",)]
    assert rig.accept([submission("sent"), submission("failed")]) == ["known", None]
    rig.now += 1000
    assert rig.forget(1000) == 2
    assert rig.accept([submission("sent")]) == [None]


@also_pgbouncer
def test_states_are_reported_in_the_order_they_came_about_and_stamped_unless_they_changed(rig: QueueRig) -> None:
    rig.accepted(submission("a"), submission("b"), submission("c"))
    a, b, c = rig.claimed()
    rig.recorded(c, SENT)
    rig.recorded(a, ERROR, error="550 no")
    rig.recorded(b, DEFERRED, deferred_ts=NOW, reason="retry", error="451 later")
    states = rig.unreported(10)
    assert [(s["id"], s["status"]) for s in states.values()] == [("c", "sent"), ("a", "error"), ("b", "deferred")]

    rig.catch_up()
    assert [entry["id"] for entry in rig.unreported(10).values()] == ["c", "a"]  # a deferral that is over is left out
    rig.recorded(rig.claimed()[0], SENT)

    assert rig.acknowledge(states) == 2
    assert [(entry["id"], entry["status"]) for entry in rig.unreported(10).values()] == [("b", "sent")]


def test_what_was_acknowledged_is_passed_over_until_nothing_is_left_to_report(rig: QueueRig) -> None:
    rig.accepted(submission("a"), submission("b"), submission("c"))
    for claim in rig.claimed():
        rig.recorded(claim, SENT)
    rig.acknowledge(rig.unreported(2))
    rig.sql("UPDATE messages SET report_order = 1 WHERE id = 'a'")  # as in a database that was restored

    asked = []
    for _ in range(4):
        states = rig.unreported(2)
        asked.append([entry["id"] for entry in states.values()])
        rig.acknowledge(states)

    assert asked == [["c"], [], ["a"], []]


def test_a_message_that_has_expired_is_given_up_unless_it_is_on_the_wire_and_sent_where_some_have_it(
    rig: QueueRig,
) -> None:
    rig.accepted(*(submission(id_, expires_ts=NOW + 5) for id_ in ("on the wire", "partly", "waits")))
    _, partly = rig.claimed(2)
    recipients = {
        "has@example.com": mailproxy.RecipientOutcome(SENT, 250, "ok"),
        "waits@example.com": mailproxy.RecipientOutcome(DEFERRED, 451, "later"),
    }
    rig.recorded(partly, DEFERRED, deferred_ts=NOW + 1, reason="retry", recipients=recipients)
    rig.now += 6

    assert {entry[:2] for entry in rig.catch_up()[1]} == {("partly", "main"), ("waits", "main")}

    assert rig.fields_of("waits")["error"] == "expired: expires_ts has passed"
    assert [rig.fields_of(id_)["status"] for id_ in ("on the wire", "partly", "waits")] == ["queued", "sent", "error"]
    served = {address: outcome["status"] for address, outcome in rig.fields_of("partly")["recipients"].items()}
    assert served == {"has@example.com": "sent", "waits@example.com": "error"}


def test_what_is_too_old_is_given_up_piece_by_piece_when_its_server_cannot_be_used(
    rig: QueueRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailproxy, "CHUNK", 2)
    old = [submission(id_, priority=n) for n, id_ in enumerate(("on the wire", "limit", "connection", "ready"))]
    rig.accepted(*old, submission("other", account_id="other"), submission("late", deferred_ts=NOW + 50))
    for claim in rig.claimed(3)[1:]:
        rig.recorded(claim, DEFERRED, deferred_ts=NOW + 99, reason=claim.id)
    rig.now += 60
    rig.accepted(submission("young"))
    rig.catch_up()

    rig.queue.give_up_aged("main", NOW + 10, "550 gone")

    ended = []
    while rig.queue.next_ts <= rig.now:
        ended.append(rig.catch_up()[1])
    assert [len(some) for some in ended] == [2, 1]
    why = "expired: max_age_seconds reached; last: 550 gone"
    assert sorted((id_, account, how.status, how.error) for some in ended for id_, account, how in some) == [
        (id_, "main", ERROR, why) for id_ in ("connection", "limit", "ready")
    ]
    assert rig.tallies()[0]["main"][:2] == (3, 0)
    rig.now += 60
    assert rig.catch_up()[1] == []


def test_a_rate_limited_turn_is_deferred_and_those_behind_it_wait_untouched(rig: QueueRig) -> None:
    rig.accepted(*(submission(f"m{i}") for i in range(5)))

    for claim in rig.claimed(3):
        rig.recorded(claim, DEFERRED, deferred_ts=NOW + 60, reason="limit", counted=False)

    assert [entry["status"] for entry in rig.unreported(10).values()] == ["deferred"] * 3
    rig.queue.release(behind := rig.claimed())
    assert ids(behind) == ["m3", "m4"]
    assert rig.let_go(["main"], ("limit",)) == {"main"}
    assert ids(rig.claimed()) == ["m0", "m1", "m2", "m3", "m4"]  # each keeps its place


@pytest.mark.parametrize(
    ("step_s", "moved"),
    [(3600, {"scheduled": 60, "earlier": 60, "retry": 3660}), (-3600, {"earlier": -3540, "retry": -3540})],
)
def test_when_the_clock_is_set_what_was_put_off_keeps_its_pause(rig: QueueRig, step_s: int, moved: Any) -> None:
    rig.accepted(submission("scheduled", deferred_ts=NOW + 60), submission("earlier"))
    rig.recorded(rig.claimed()[0], DEFERRED, deferred_ts=NOW + 60, reason="retry")
    rig.now += 10
    rig.accepted(submission("retry"), submission("sent", priority=0))
    rig.recorded(rig.claimed(1)[0], SENT)
    rig.recorded(rig.claimed()[0], DEFERRED, deferred_ts=NOW + 60, reason="retry")

    rig.move_times(step_s, NOW + 5)

    due = dict(rig.sql("SELECT id, deferred_ts FROM messages WHERE deferred_ts IS NOT NULL"))
    assert {id_: ts - NOW for id_, ts in due.items()} == {"scheduled": 60, **moved}
    assert rig.standing("main").sends == [(NOW + 11 + step_s, 1)]
    assert rig.queue.next_ts == 0


def test_sends_are_counted_by_the_minute_move_with_the_clock_and_are_dropped_after_a_day(rig: QueueRig) -> None:
    rig.accepted(*(submission(f"m{i}") for i in range(90)))
    for claim in rig.claimed():
        rig.recorded(claim, SENT)
        rig.now += 1
    assert rig.standing("main").sends == [(NOW + 59, 59), (NOW + 90, 31)]

    rig.move_times(60, NOW)  # each to where its neighbour was

    assert rig.standing("main").sends == [(NOW + 119, 59), (NOW + 150, 31)]
    for now, kept in ((NOW + 86_400 + 120, 2), (NOW + 86_400 + 300, 0)):
        rig.now = now
        rig.forget(1)
        assert len(rig.standing("main").sends) == kept


def test_failed_messages_get_a_new_life(rig: QueueRig) -> None:
    rig.accepted(submission("failed"), submission("sent"))
    for claim, status in zip(rig.claimed(), (ERROR, SENT), strict=True):
        rig.recorded(claim, status, error="550 no")

    assert rig.tallies()[2] == 1
    assert rig.retry(["failed", "sent", "unknown"], {"main"}) == (1, ["unknown"], ["sent"], [])
    assert rig.tallies()[2] == 0

    fields = rig.fields_of("failed")
    assert (fields["status"], fields["attempts"], fields["error"], fields["error_ts"]) == ("queued", 0, None, None)
    assert ids(rig.claimed()) == ["failed"]
    assert rig.delete(["failed", "sent", "unknown"]) == (1, ["unknown"], ["failed"])  # that is on the wire


def test_a_claim_that_nobody_waits_for_any_more_leaves_nothing_on_the_wire(rig: QueueRig) -> None:
    rig.accepted(submission("a"))

    async def given_up() -> None:
        asked = asyncio.ensure_future(rig.queue.claim([mailproxy.Order("main", 1, retried_first=False)]))
        await asyncio.sleep(0)  # it is asked
        asked.cancel()
        await rig.file.write(lambda db: None)
        while rig.queue.in_delivery:
            await asyncio.sleep(0.001)

    rig.run(given_up())

    assert ids(rig.claimed()) == ["a"]


def test_the_mail_of_a_deleted_account_fails_also_what_was_just_deferred_and_no_others(rig: QueueRig) -> None:
    rig.accepted(submission("a"), submission("b", deferred_ts=NOW + 99), submission("other", account_id="x"))
    outcome = rig.outcome(rig.claimed()[0], DEFERRED, deferred_ts=NOW + 60)

    async def both() -> Any:
        return await asyncio.gather(rig.queue.record(outcome), rig.queue.fail_orphans("main", "account deleted"))

    assert len(rig.run(both())[1]) == 2
    assert rig.sql("SELECT id FROM messages WHERE error = 'account deleted' ORDER BY seq") == [("a",), ("b",)]


@only_sqlite
def test_many_messages_that_are_named_are_looked_up_by_few_statements(rig: QueueRig) -> None:
    """One for each, open until it was read, took minutes for ten thousand, and nobody could submit meanwhile."""
    many, statements = [submission(f"m{n}") for n in range(100)], list[str]()
    rig.accepted(*many)
    rig.run(rig.file.write(lambda db: db.set_trace_callback(statements.append)))

    assert rig.accept(many) == ["known"] * 100
    assert rig.retry([one.id for one in many], {"main"}) == (0, [], [one.id for one in many], [])
    assert rig.delete([one.id for one in many]) == (100, [], [])

    assert sum(sql.startswith("SELECT") for sql in statements) < 10


def test_an_id_with_a_nul_is_nobodys(rig: QueueRig) -> None:
    rig.accepted(submission("a"))

    assert rig.delete(["a\0b"]) == (0, ["a\0b"], [])
    assert rig.retry(["a\0b", "a"], {"main"}) == (0, ["a\0b"], ["a"], [])


def test_a_timeline_is_bounded(rig: QueueRig) -> None:
    rig.accepted(submission("a"))
    for _ in range(100 + 5):
        rig.recorded(rig.claimed()[0], DEFERRED, deferred_ts=NOW, reason="retry")
        rig.catch_up()

    assert len(rig.look_up("a")[1]) == 100


QUEUE_OF_VERSION_1 = """
CREATE TABLE accounts (id TEXT PRIMARY KEY, definition TEXT NOT NULL) WITHOUT ROWID;
INSERT INTO accounts VALUES ('main', '{"id": "main", "host": "mail.example.com", "port": 25}');
CREATE TABLE attempts (seq INTEGER NOT NULL, number INTEGER NOT NULL, started_at REAL NOT NULL, ended_at REAL NOT NULL,
    outcome TEXT NOT NULL, stage TEXT, code INTEGER, enhanced_code TEXT, text TEXT, recipients TEXT, connection TEXT,
    PRIMARY KEY (seq, number)) WITHOUT ROWID;
INSERT INTO attempts VALUES (1, 1, 18e8, 18e8, 'sent', 'end-of-data', 250, NULL, 'as told', NULL, 'main-1'),
    (3, 1, 18e8, 18e8, 'deferred', 'end-of-data', 451, NULL, 'as told', NULL, 'main-1');
CREATE TABLE contents (seq INTEGER NOT NULL, position INTEGER NOT NULL, content BLOB NOT NULL,
    PRIMARY KEY (seq, position));
INSERT INTO contents VALUES (4, 0, X'00FF');
CREATE TABLE holds (account_id TEXT PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO holds VALUES ('main', 1);
CREATE TABLE last_gone (seq INTEGER NOT NULL);
INSERT INTO last_gone VALUES (6);
CREATE TABLE messages (seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, account_id TEXT NOT NULL,
    priority INTEGER NOT NULL, created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, deferred_ts INTEGER,
    sent_ts INTEGER, error_ts INTEGER, error TEXT, reported_ts INTEGER, report_order INTEGER,
    attempts INTEGER NOT NULL DEFAULT 0, turn INTEGER NOT NULL DEFAULT 0, deferral TEXT, ready_at REAL NOT NULL,
    deadline INTEGER, expires_ts INTEGER, batch_code TEXT, message_id TEXT NOT NULL, recipients TEXT,
    parts INTEGER NOT NULL, size_bytes INTEGER NOT NULL, payload TEXT NOT NULL);
INSERT INTO messages VALUES
    (1, 'sent', 'main', 2, 18e8, 18e8, NULL, 18e8, NULL, NULL, NULL, 1, 1, 1, NULL, 18e8, 1800432000, NULL, NULL,
        '<sent@example.com>', NULL, 0, 2, '{}'),
    (3, 'retry', 'main', 2, 18e8, 18e8, 1800000120, NULL, NULL, '451 as told', NULL, 3, 1, 1, 'retry', 18e8,
        1800432000, NULL, NULL, '<retry@example.com>', NULL, 0, 2, '{}'),
    (4, 'ready', 'main', 2, 18e8, 18e8, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0, NULL, 18e8, 1800432000, NULL, NULL,
        '<ready@example.com>', NULL, 0, 4, '{}'),
    (5, 'later', 'main', 0, 18e8, 18e8, 1800003600, NULL, NULL, NULL, NULL, NULL, 0, 0, 'schedule', 1800003600,
        1800432000, NULL, NULL, '<later@example.com>', NULL, 0, 2, '{}');
CREATE TABLE sends (account_id TEXT NOT NULL, until_ts INTEGER NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY (account_id, until_ts)) WITHOUT ROWID;
INSERT INTO sends VALUES ('main', 1800000001, 1), ('main', 1800000002, 1);
CREATE TABLE sent_ids (id TEXT PRIMARY KEY, sent_ts INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO sent_ids VALUES ('purged', 1800000001);
CREATE TABLE suspensions (account_id TEXT PRIMARY KEY) WITHOUT ROWID;
INSERT INTO suspensions VALUES ('main');
CREATE TABLE switches (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO switches VALUES ('active', 1);
CREATE TABLE tallies (account_id TEXT PRIMARY KEY, ready INTEGER NOT NULL, waiting INTEGER NOT NULL,
    unreported INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO tallies VALUES ('main', 1, 2, 2);
CREATE INDEX messages_ready ON messages (account_id, turn, priority, seq)
    WHERE sent_ts IS NULL AND error_ts IS NULL AND deferred_ts IS NULL;
CREATE INDEX messages_waiting ON messages (deferred_ts)
    WHERE sent_ts IS NULL AND error_ts IS NULL AND deferred_ts IS NOT NULL;
CREATE INDEX messages_held_back ON messages (account_id, deferral)
    WHERE deferred_ts IS NOT NULL AND deferral IN ('limit', 'connection', 'login');
CREATE INDEX messages_pending ON messages (seq) WHERE sent_ts IS NULL AND error_ts IS NULL;
CREATE INDEX messages_deadline ON messages (deadline)
    WHERE sent_ts IS NULL AND error_ts IS NULL AND deadline IS NOT NULL;
CREATE INDEX messages_unreported ON messages (report_order) WHERE report_order IS NOT NULL;
CREATE INDEX messages_reported ON messages (reported_ts)
    WHERE report_order IS NULL AND (sent_ts IS NOT NULL OR error_ts IS NOT NULL);
CREATE INDEX messages_unreported_final ON messages (coalesce(sent_ts, error_ts))
    WHERE report_order IS NOT NULL AND (sent_ts IS NOT NULL OR error_ts IS NOT NULL);
CREATE INDEX sent_ids_by_age ON sent_ids (sent_ts);
CREATE TRIGGER tally_update AFTER UPDATE OF deferred_ts, sent_ts, error_ts, report_order ON messages BEGIN
    UPDATE tallies SET ready = ready - 1 WHERE account_id = new.account_id; END;
CREATE TRIGGER tally_delete AFTER DELETE ON messages BEGIN
    UPDATE tallies SET ready = ready - 1 WHERE account_id = old.account_id; END;
CREATE TRIGGER remember_seq AFTER DELETE ON messages WHEN old.seq > (SELECT seq FROM last_gone) BEGIN
    UPDATE last_gone SET seq = old.seq; END;
CREATE TRIGGER forget_old_attempts AFTER INSERT ON attempts WHEN new.number > 100 BEGIN
    DELETE FROM attempts WHERE seq = new.seq AND number <= new.number - 100; END;
CREATE TRIGGER remember_sent AFTER DELETE ON messages WHEN old.sent_ts IS NOT NULL BEGIN
    INSERT INTO sent_ids VALUES (old.id, old.sent_ts) ON CONFLICT DO UPDATE SET sent_ts = excluded.sent_ts; END;
PRAGMA user_version = 1;
"""


def definitions(of: QueueRig) -> dict[str, str]:
    """What the file consists of, by name."""
    rows = of.sql("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: re.sub(r"--.*|\s", "", sql) for name, sql in rows}


def test_a_queue_of_version_1_goes_on_as_the_newest_one(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as db:
        db.executescript(QUEUE_OF_VERSION_1)
    (tmp_path / "new").mkdir()
    with asyncio.Runner() as runner:
        new, rig = QueueRig(tmp_path / "new", runner.run), QueueRig(tmp_path, runner.run)

        assert definitions(rig) == definitions(new)
        assert rig.sql("PRAGMA user_version") == new.sql("PRAGMA user_version") == [(3,)]
        assert rig.tallies()[0]["main"] == (1, 2, 2)
        assert [(rig.tallies()[2],)] == rig.sql("SELECT count(*) FROM messages WHERE error_ts IS NOT NULL")
        assert rig.standing("main") == mailproxy.Standing([(NOW + 2, 2)], suspended=True, held_back=False)
        assert (rig.known().switches["active"], list(rig.known().definitions)) == (1, ["main"])
        assert [entry["id"] for entry in rig.unreported(10).values()] == ["sent", "retry"]
        verdicts = rig.accept([submission("sent", payload="{}"), submission("purged"), submission("new")])
        assert verdicts == ["known", "known", None]
        assert rig.sql("SELECT max(seq) FROM messages") == [(7 + 2,)]  # 6 was given to one that was deleted
        rig.now += 120
        assert rig.catch_up() == ({"main"}, [])
        assert ids(rig.claimed()) == ["ready", "retry", "new"]
        assert rig.contents(4) == {0: b"\x00\xff"}
        assert [attempt["code"] for attempt in rig.look_up("retry")[1]] == [451]
        for one in (rig, new):
            runner.run(one.file.close())


# Written by the last program of version 2 itself, of messages in every state, with delivery suspended at the end.
QUEUE_OF_VERSION_2 = PROGRAM.with_name("bench") / "queue_of_version_2.xz"


@only_sqlite
def test_a_queue_that_was_written_by_version_2_is_all_there(rig: QueueRig, smtp: SmtpServer, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "queue.db").write_bytes(lzma.decompress(QUEUE_OF_VERSION_2.read_bytes()))
    with contextlib.closing(sqlite3.connect(tmp_path / "old" / "queue.db")) as db:
        columns = [row[1] for row in db.execute("PRAGMA table_info(messages)") if row[1] != "deadline"]
        others = ("contents", "attempts", "accounts", "suspensions", "sends", "sent_ids", "tallies", "sqlite_sequence")
        everything = [f"SELECT {', '.join(columns)} FROM messages", *(f"SELECT * FROM {name}" for name in others)]  # noqa: S608
        before = [db.execute(sql).fetchall() for sql in everything]

    old = QueueRig(tmp_path / "old", rig.run)

    assert [old.sql(sql) for sql in everything] == before
    assert [(old.tallies()[2],)] == old.sql("SELECT count(*) FROM messages WHERE error_ts IS NOT NULL") != [(0,)]
    assert list(map(len, before)) == [13, 3, 9, 4, 1, 3, 1, 5, 1]
    assert definitions(old) == definitions(rig)
    assert (old.sql("PRAGMA user_version"), old.sql("PRAGMA integrity_check")) == ([(3,)], [("ok",)])
    rig.run(old.file.close())
    with Daemon(tmp_path / "old", smtp=smtp, config={"delivery": {"retry_delays": 1}}) as daemon:
        for account_id in ("paused", "limited", "careful", "away"):
            account = {"id": account_id, "host": smtp.host, "port": smtp.port}
            assert daemon.post("/account", account).status == 200
        assert (daemon.post("/account/paused/activate").status, daemon.post("/commands/activate").status) == (200, 200)
        for id_ in ("limited", "raw", "queued", "held back"):
            daemon.wait_status(id_, "sent")
        for record in daemon.get("/messages").json["messages"]:
            to = mailproxy.parse_mailboxes(record["message"]["to"], "to")[0].address
            query = {"to": to, "subject": record["subject"]} if record["subject"] else {"to": to}
            assert record["id"] in listed(daemon, urllib.parse.urlencode(query))


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_pages_cover_every_message_once(rig: QueueRig, monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    monkeypatch.setattr(mailproxy, "STRETCH", 7)
    rig.accepted(*(submission(f"m{i}", batch_code="even" if i % 2 == 0 else None) for i in range(40)))
    rig.delete([f"m{i}" for i in range(8, 24)])

    found, after, ended = [], None, False
    while not ended:
        records, after = rig.page(after, 5, batch_code="even", order=order)
        found += [record.fields["id"] for record in records]
        ended = after is None

    expected = [f"m{i}" for i in (*range(0, 8, 2), *range(24, 40, 2))]
    assert found == (expected[::-1] if order == "desc" else expected)


@pytest.mark.parametrize("order", ["asc", "desc"])
def test_a_search_goes_together_with_every_other_choice(
    rig: QueueRig, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr(mailproxy, "LOOK", 3)
    refused = {"to@example.com": mailproxy.RecipientOutcome(ERROR, 550, "550 no")}
    for n in range(12):
        rig.accepted(submission(f"m{n}", sought=f"\nto{n % 2}@example.com\n\thello"))
        (claim,) = rig.claimed()
        if n % 4 < 2:
            rig.recorded(claim, ERROR, error="550 no", recipients=refused)
        elif n % 4 == 2:
            rig.recorded(claim, SENT)
        else:
            rig.recorded(claim, DEFERRED, deferred_ts=NOW + 60, reason="retry")
        rig.now += 1
    choices = {
        (): range(12), ("status", "error"): (0, 1, 4, 5, 8, 9), ("status", "sent"): (2, 6, 10),
        ("status", "deferred"): (3, 7, 11), ("active_only", True): (3, 7, 11), ("refused", True): (0, 1, 4, 5, 8, 9),
        ("since", NOW + 6): range(6, 12), ("until", NOW + 3): range(4),
    }  # fmt: skip

    for choice, expected in choices.items():
        only, found, after, ended = dict([choice]) if choice else {}, [], None, False
        while not ended:
            records, after = rig.page(after, 2, order=order, to="TO1@example.com", subject="Hell", **only)
            found += [record.fields["id"] for record in records]
            ended = after is None
        assert found == [f"m{n}" for n in expected if n % 2][:: -1 if order == "desc" else 1], choice


# One row, what was handed in, one row for each account.
SHORT_SCANS = (
    "SCAN CONSTANT ROW",
    "SCAN new",
    "SCAN sqlite_sequence",
    "SCAN failures",
    "SCAN json_each",
    "SCAN tallies",
    "SCAN (subquery",
    "SCAN suspended_batches",
)


@only_sqlite
def test_no_hot_statement_scans_or_sorts_the_table_or_costs_more_with_a_backlog(rig: QueueRig) -> None:
    """Costs are counted in steps of SQLite's virtual machine, because time is not to be trusted."""
    statements: set[str] = set()
    steps = [0]

    def step() -> None:
        steps[0] += 1

    def watch(db: sqlite3.Connection) -> None:
        db.set_trace_callback(statements.add)
        db.set_progress_handler(step, 1)

    def steps_in_the_life_of(id_: str) -> dict[str, int]:
        counts: dict[str, int] = {}
        another = f"{id_}, another"

        def counted(what: str, result: Any) -> Any:
            counts[what], steps[0] = steps[0], 0
            return result

        rig.run(rig.file.write(watch))
        rig.run(rig.file.read(watch))
        rig.accepted(submission(f"of another account, {id_}", account_id="other"))
        steps[0] = 0
        counted("accept", rig.accepted(submission(id_, contents={0: b"content"})))
        (claim,) = counted("claim", rig.claimed(1))
        counted("defer", rig.recorded(claim, DEFERRED, deferred_ts=int(rig.now) + 1, reason="retry"))
        rig.now += 1
        counted("catch up", rig.catch_up())
        (claim,) = counted("claim again", rig.claimed(1))
        counted("payload", rig.payload(claim.seq))
        counted("contents", rig.contents(claim.seq))
        counted("sent", rig.recorded(claim, SENT))
        states = counted("unreported", rig.unreported(10))
        counted("acknowledge", rig.acknowledge(states))
        counted("tallies", rig.tallies())
        counted("purge", rig.purge(3600, unreported_too=True))
        counted("let go", rig.let_go(["main"], ("limit",)))
        counted("accept another", rig.accepted(submission(another)))
        counted("known", rig.accept([submission(another)]))
        counted("replace", rig.accepted(submission(another, payload="{}")))
        limited = {"deferred_ts": int(rig.now) + 60, "reason": "limit", "counted": False}
        counted("defer limited", rig.recorded(*rig.claimed(1), DEFERRED, **limited))
        counted("standing", rig.standing("main"))
        counted("let the cooled go", rig.let_go(["main"], ("connection", "login")))
        counted("let the limited go", rig.let_go(["main"], ("limit",)))
        counted("fail", rig.recorded(*rig.claimed(1), ERROR, error="no"))
        rig.queue.give_up_aged("other", NOW - 1, "550 gone")
        counted("give up aged", rig.catch_up())
        counted("retry", rig.retry([another], {"main"}))
        counted("look up", rig.look_up(id_))
        counted("delete", rig.delete([another]))
        counted("forget", rig.forget(3600))
        counted("load", rig.load())
        counted("answers", rig.answers())
        return counts

    rig.accepted(submission("scheduled", account_id="third", deferred_ts=2 * NOW, expires_ts=3 * NOW))
    steps_in_the_life_of("the first")
    alone = steps_in_the_life_of("alone")
    rig.page(None, 10, active_only=True)
    rig.page(None, 10, status="sent", order="desc")
    for query in ({"to": "a@b"}, {"subject": "x", "since": 1}, {"until": 5}, {"refused": True}, {"status": "error"}):
        rig.page(None, 10, **query)
        rig.page(None, 10, order="desc", **query)
    rig.suspend_batch("none")
    rig.activate_batch("none")
    rig.fail_orphans("main", "account deleted")
    hot = [statement for statement in statements if statement.startswith(("SELECT", "INSERT", "UPDATE", "DELETE"))]
    plans = {(statement, row[3]) for statement in hot for row in rig.sql(f"EXPLAIN QUERY PLAN {statement}")}
    rig.run(rig.file.write(backlog(scheduled=50_000, sent=5_000, ready_of_another=5_000)))
    rig.load()
    beside_a_backlog = steps_in_the_life_of("beside a backlog")

    assert len(hot) > 50
    assert not [plan for plan in plans if "TEMP B-TREE" in plan[1] or scans_without_an_end(*plan)]
    assert all(alone.values())
    assert beside_a_backlog == {what: pytest.approx(n, rel=0.1, abs=20) for what, n in alone.items()}


def test_a_suspended_batch_costs_a_claim_nothing_and_what_was_broken_off_is_finished(rig: QueueRig) -> None:
    rig.accepted(*[submission(f"b-{n}", batch_code="b", priority=0) for n in range(3_000)], submission("other"))
    steps = [0]

    def count(db: Any) -> None:
        if isinstance(db, sqlite3.Connection):
            db.set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 1)

    assert rig.suspend_batch("b") is False
    rig.run(rig.file.write(count))
    assert ids(rig.claimed()) == ["other"]
    assert steps[0] < 300
    assert rig.sql("SELECT count(*) FROM messages WHERE turn = 2") == [(3_000,)]

    rig.run(rig.file.write(lambda db: db.execute("UPDATE messages SET turn = 0 WHERE seq > 2000")))  # broken off
    rig.load()
    assert rig.claimed() == []
    rig.activate_batch("b")
    claims = rig.claimed(3_000)
    assert ids(claims) == [f"b-{n}" for n in range(3_000)]
    assert rig.suspend_batch("b") is True  # some of it is on the wire
    rig.recorded(claims[0], DEFERRED, deferred_ts=int(rig.now) + 1, reason="retry")
    rig.queue.release(claims[1:])
    rig.now += 2
    rig.catch_up()
    assert rig.claimed() == []
    rig.activate_batch("b")
    assert ids(rig.claimed(2)) == ["b-1", "b-0"]  # in turn: new, come back


@pytest.mark.parametrize("engine", ENGINES[1:], indirect=True)
def test_what_another_daemon_has_on_the_wire_is_not_touched_and_late_outcomes_count_only_when_sent(
    rig: QueueRig, tmp_path: Path
) -> None:
    other = QueueRig(tmp_path, rig.run)
    for one, instance in ((rig, "a"), (other, "b")):
        one.file.instance = instance
    leased = "INSERT INTO leases (account_id, instance) VALUES ('main', '{}')"
    rig.run(rig.file.write(lambda db: db.execute(leased.format("a"))))
    rig.accepted(*(submission(id_, expires_ts=NOW + 5) for id_ in ("sent", "failed", "released", "lost")))

    assert other.claimed() == []
    claims = {claim.id: claim for claim in rig.claimed()}
    assert other.delete(list(claims)) == (0, [], list(claims))
    assert other.accept([submission("failed", payload="{}")]) == ["in delivery"]
    other.now += 6
    assert (other.catch_up()[1], other.fail_orphans("main", "account deleted")) == ([], [])
    rig.queue.release([claims["released"]])
    rig.answers()
    assert other.delete(["released"]) == (1, [], [])

    takeover = ("DELETE FROM leases", "DELETE FROM claims", leased.format("b"))  # when the lease of "a" was over
    other.run(other.file.write(lambda db: [db.execute(statement) for statement in takeover]))
    other.now = NOW
    assert ids(other.claimed()) == ["sent", "failed", "lost"]
    rig.recorded(claims["sent"], SENT)
    rig.recorded(claims["failed"], ERROR, error="550 no")
    assert [(id_, other.fields_of(id_)["status"]) for id_ in ("sent", "failed")] == [
        ("sent", "sent"),
        ("failed", "queued"),
    ]
    assert rig.claimed() == []
    rig.run(other.file.close())


@pytest.mark.parametrize("engine", ENGINES[1:], indirect=True)
def test_a_batch_that_one_daemon_suspends_or_activates_is_so_for_all_at_once(rig: QueueRig, tmp_path: Path) -> None:
    other = QueueRig(tmp_path, rig.run)
    for one, instance in ((rig, "a"), (other, "b")):
        one.file.instance = instance
    rig.run(rig.file.write(lambda db: db.execute("INSERT INTO leases (account_id, instance) VALUES ('main', 'a')")))

    rig.suspend_batch("b")
    other.accepted(submission("first", batch_code="b"), submission("other"))
    assert ids(rig.claimed()) == ["other"]
    other.activate_batch("b")
    rig.accepted(submission("second", batch_code="b"))
    assert ids(rig.claimed()) == ["first", "second"]
    rig.run(other.file.close())


def scans_without_an_end(statement: str, step: str) -> bool:
    """True for a step through a table that is neither a seek nor the head of an index, nor all that is changed."""
    if not step.startswith("SCAN") or step.startswith(SHORT_SCANS):
        return False
    return not ("USING" in step and ("LIMIT" in statement or "INDEXED BY messages_held_back" in statement))


def backlog(*, scheduled: int, sent: int, ready_of_another: int) -> Callable[[sqlite3.Connection], None]:
    """Rows that have nothing to do with what is measured beside them."""

    def work(db: sqlite3.Connection) -> None:
        db.set_progress_handler(None, 0)
        for kind, n, account_id, deferred_ts, final_ts in (
            ("sent", sent, "main", None, NOW),
            ("scheduled", scheduled, "main", 2 * NOW, None),
            ("ready", ready_of_another, "other", None, None),
        ):
            db.execute(
                "INSERT INTO messages (id, account_id, priority, created_at, updated_at, deferred_ts, sent_ts, "
                "reported_ts, ready_at, expires_ts, message_id, parts, size_bytes, payload) "
                "WITH RECURSIVE count(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM count WHERE n < :n) "
                "SELECT :kind || n, :account, 2, :now, :now, :deferred, :final, :final, :now, 3 * :now, '', 0, 2, '{}' "
                "FROM count",
                {"kind": kind, "n": n, "account": account_id, "now": NOW, "deferred": deferred_ts, "final": final_ts},
            )

    return work


# ======================================================================
# POSTGRESQL
# ======================================================================


class Wire:
    """A proxy before a server. While `deaf_after` is set, nothing goes back once a client has said that; `cut` ends it all."""

    def __init__(self, port: int) -> None:
        self._port, self.deaf_after, self.forwards = port, b"", True
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> Wire:
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._listener.close()
        self.cut()

    def cut(self) -> None:
        """End every connection, at once."""
        while self._sockets:
            with contextlib.suppress(OSError):
                self._sockets.pop().shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                server = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += [client, server]
                deaf = threading.Event()
                for source, target, is_client in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pump, args=(source, target, is_client, deaf), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, is_client: bool, deaf: threading.Event) -> None:
        with contextlib.suppress(OSError), source, target:
            while content := source.recv(65_536):
                if is_client and self.deaf_after and self.deaf_after in content:
                    deaf.set()
                    if not self.forwards:
                        continue
                if is_client or not deaf.is_set():
                    target.sendall(content)
            target.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def queue_at(url: str) -> Iterator[QueueRig]:
    """A queue in that database."""
    with asyncio.Runner() as runner, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Storage, "place", lambda folder: url)
        rig = QueueRig(Path(), runner.run)
        try:
            yield rig
        finally:
            runner.run(rig.file.close())


@pytest.mark.parametrize("forwards", [True, False])
def test_what_became_of_a_commit_that_was_not_answered_is_found_out(
    postgres_server: PostgresServer, postgres: str, monkeypatch: pytest.MonkeyPatch, forwards: bool
) -> None:
    monkeypatch.setattr(mailproxy, "ANSWER_S", 1.0)
    monkeypatch.setattr(mailproxy, "BEGIN", [part.replace("'5s'", "'2s'") for part in mailproxy.BEGIN])
    with (
        Wire(postgres_server.port) as wire,
        queue_at(postgres.replace(f":{postgres_server.port}", f":{wire.port}")) as rig,
    ):
        rig.accepted(submission("before"))
        wire.forwards, wire.deaf_after = forwards, b"COMMIT;"
        asked = threading.Timer(1.5, lambda: setattr(wire, "deaf_after", b""))
        asked.start()

        if forwards:
            rig.accepted(submission("a"))
        else:
            with pytest.raises(mailproxy.StorageUnavailable, match="cannot be written"):
                rig.accept([submission("a")])
        wire.deaf_after = b""

        rig.accepted(submission("after"))
        stored = ["before", "a", "after"] if forwards else ["before", "after"]
        assert rig.sql("SELECT id FROM messages ORDER BY seq") == [(id_,) for id_ in stored]
        assert not rig.file.refuses


def test_when_nobody_can_say_whether_it_was_stored_the_client_is_told_to_submit_again(
    postgres_server: PostgresServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailproxy, "ANSWER_S", 0.5)
    monkeypatch.setattr(mailproxy, "CONNECT_S", 0.5)
    with (
        Wire(postgres_server.port) as wire,
        queue_at(postgres.replace(f":{postgres_server.port}", f":{wire.port}")) as rig,
    ):
        wire.deaf_after = b"COMMIT;"  # and so is whoever asks what became of it
        with pytest.raises(mailproxy.StorageUnavailable, match="not known; submit it again with the same ids"):
            rig.accept([submission("a")])

        wire.deaf_after = b""
        assert rig.accept([submission("a")]) == ["known"]


def test_a_session_that_was_lost_while_nobody_needed_it_costs_nothing(
    postgres_server: PostgresServer, postgres: str
) -> None:
    with queue_at(postgres) as rig:
        rig.accepted(submission("a"))
        rig.look_up("a")
        ours = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{}' AND pid <> pg_backend_pid()"
        postgres_server.run(ours.format(postgres.rpartition("/")[2]))

        rig.accepted(submission("b"))
        assert rig.fields_of("b")["status"] == "queued"


def test_a_database_that_is_away_refuses_and_comes_back_by_itself(tmp_path: Path) -> None:
    with PostgresServer() as server, queue_at(server.new_database()) as rig:
        rig.accepted(submission("a"))
        server.stop()
        for asked in (lambda: rig.accept([submission("b")]), lambda: rig.look_up("a")):
            with pytest.raises(mailproxy.StorageUnavailable, match="refused"):
                asked()
        assert rig.file.refuses

        server.start()
        rig.accepted(submission("b"))
        assert not rig.file.refuses
        assert ids(rig.claimed()) == ["a", "b"]


def test_a_transaction_that_was_stopped_does_not_hold_the_others_for_long(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailproxy, "BEGIN", [part.replace("'5s'", "'1s'") for part in mailproxy.BEGIN])
    with queue_at(postgres) as rig, queue_at(postgres) as other:
        stopped = threading.Event()

        def stop(db: Any) -> None:
            db.execute("UPDATE switches SET value = 1").fetchall()
            stopped.wait(20)

        async def both() -> list[Any]:
            first = asyncio.ensure_future(rig.file.write(stop))
            await asyncio.sleep(0.2)
            while True:
                with contextlib.suppress(mailproxy.StorageUnavailable):
                    await asyncio.wait_for(asyncio.to_thread(other.accept, [submission("a")]), 10)
                    stopped.set()
                    return await asyncio.gather(first, return_exceptions=True)

        (refused,) = rig.run(both())
        assert isinstance(refused, mailproxy.StorageUnavailable)


@pytest.mark.parametrize("setting", ["off", "local", "remote_apply"])
def test_what_was_accepted_is_on_disk_whatever_the_role_is_set_to(
    postgres_server: PostgresServer, postgres: str, setting: str
) -> None:
    def position(db: Any) -> str:
        db.execute("INSERT INTO switches VALUES ('any', 1) ON CONFLICT (name) DO UPDATE SET value = switches.value + 1")
        return str(db.execute("SELECT pg_current_wal_insert_lsn()").fetchone()[0])

    def is_flushed(written: str, db: Any) -> bool:
        return bool(db.execute(f"SELECT pg_current_wal_flush_lsn() > CAST('{written}' AS pg_lsn)").fetchone()[0])

    postgres_server.run(f"ALTER DATABASE {postgres.rpartition('/')[2]} SET synchronous_commit = {setting}")
    with queue_at(postgres) as rig:
        for _ in range(20):  # now and then the server flushes by itself
            written = rig.run(rig.file.write(position))
            assert rig.run(rig.file.read(functools.partial(is_flushed, written)))


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
def test_daemons_write_in_turn_whatever_isolation_the_role_is_set_to(
    postgres_server: PostgresServer, postgres: str, level: str
) -> None:
    postgres_server.run(f"ALTER DATABASE {postgres.rpartition('/')[2]} SET default_transaction_isolation = '{level}'")
    with queue_at(postgres) as rig:
        (found,) = rig.run(rig.file.write(lambda db: db.execute("SHOW transaction_isolation").fetchone()))
    assert found == "read committed"


def test_a_database_that_becomes_one_of_another_version_is_not_written_and_waited_for(postgres: str) -> None:
    with queue_at(postgres) as rig, psycopg.connect(postgres, autocommit=True) as connection:
        rig.accepted(submission("a"))
        connection.execute("UPDATE switches SET value = value + 1 WHERE name = 'schema'")
        for _ in range(2):
            with pytest.raises(mailproxy.StorageUnavailable, match="a newer mailproxy"):
                rig.accept([submission("b")])

        connection.execute("UPDATE switches SET value = value - 1 WHERE name = 'schema'")
        rig.accepted(submission("b"))
        assert not rig.file.refuses


def test_what_does_not_fit_into_text_is_replaced_and_quotes_stay_quotes(postgres: str) -> None:
    texts = ["\0", "\ud800", "'; DROP TABLE messages; --", "\\", "\\'", "%s %(x)s ?:x", "E'\\x00'", "\u2028 \U0001f600"]
    with queue_at(postgres) as rig:
        rig.accepted(*(submission(f"m{n}", payload=json.dumps({"subject": text})) for n, text in enumerate(texts)))
        found = [rig.look_up(f"m{n}")[0].payload["subject"] for n in range(len(texts))]
        assert found == texts
        for claim, text in zip(rig.claimed(), texts, strict=True):
            rig.recorded(claim, ERROR, error=text)
        errors = [rig.fields_of(f"m{n}")["error"] for n in range(len(texts))]
        assert errors == ["\N{REPLACEMENT CHARACTER}", "?", *texts[2:]]
        assert rig.look_up("\0") is None


WRONG = {
    "password": ("{guarded}", 'password authentication failed for user "guarded"'),
    "no password": ("postgresql://guarded@127.0.0.1:{port}/{name}", "no password"),
    "database": ("postgresql://mailproxy@127.0.0.1:{port}/nowhere", 'database "nowhere" does not exist'),
    "user": ("postgresql://nobody@127.0.0.1:{port}/{name}", 'role "nobody" does not exist'),
    "rights": ("postgresql://stranger@127.0.0.1:{port}/{name}", "permission denied for schema public"),
    "standby": ("{url}?options=-cdefault_transaction_read_only%3Don", "is read-only"),
    "reference": ("postgresql://guarded:env:NOT_SET@127.0.0.1:{port}/{name}", "env:NOT_SET is not set"),
    "URL": ("postgresql://mailproxy:Geheim%zz@127.0.0.1/{name}", "is not the URL of a database"),
    "port": ("postgresql://mailproxy:Geheim@127.0.0.1:port/{name}", 'invalid integer value "port"'),
    "hosts": ("postgresql://guarded:wrong@127.0.0.1:1,127.0.0.1:{port}/{name}", 'user "guarded"\n'),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_a_database_is_said_in_one_sentence_at_the_start(
    postgres_server: PostgresServer, postgres: str, tmp_path: Path, wrong: str
) -> None:
    with contextlib.suppress(psycopg.errors.DuplicateObject):
        postgres_server.run("CREATE ROLE stranger LOGIN")
    name, port = postgres.rpartition("/")[2], postgres_server.port
    guarded = f"postgresql://guarded:Geheim@127.0.0.1:{port}/{name}"
    url, words = (text.format(guarded=guarded, url=postgres, port=port, name=name) for text in WRONG[wrong])

    for command in ("serve", "check"):
        ended = run_command(command, "--db", url, "--port", "0", folder=tmp_path)

        assert (ended.returncode, words in ended.stderr, "Traceback" in ended.stderr) == (2, True, False), ended
        assert "Geheim" not in ended.stdout + ended.stderr


@pytest.mark.parametrize(("version", "words"), [(2, "an older mailproxy"), (99, "a newer mailproxy")])
def test_a_database_of_another_version_is_refused(postgres: str, version: int, words: str) -> None:
    with queue_at(postgres) as rig:
        rig.run(
            rig.file.write(lambda db: db.execute("UPDATE switches SET value = ? WHERE name = 'schema'", (version,)))
        )
    with pytest.raises(mailproxy.ConfigurationError, match=words), queue_at(postgres):
        pass


def test_the_password_may_stand_elsewhere_and_is_never_shown(
    postgres_server: PostgresServer, postgres: str, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("open sesame\n")
    name = postgres.rpartition("/")[2]
    postgres_server.run(f"ALTER DATABASE {name} OWNER TO guarded")
    ways = {
        "open%20sesame": {}, "env:PASSWORD": {"PASSWORD": "open sesame"}, f"file:{tmp_path}/password": {},
        "": {"PGPASSWORD": "open sesame"},
    }  # fmt: skip
    for password, environment in ways.items():
        url = f"postgresql://guarded{':' * bool(password)}{password}@127.0.0.1:{postgres_server.port}/{name}"
        (tmp_path / "config.ini").write_text(f"[storage]\ndb_path = {url if password else 'env:WHOLE'}\n")

        ended = run_command("check", folder=tmp_path, environment={**environment, "WHOLE": url})

        assert (ended.returncode, "The settings are right" in ended.stdout) == (0, True), ended
        shown = f"postgresql://guarded@127.0.0.1:{postgres_server.port}/{name}" if password else "env:WHOLE"
        assert re.search(rf"storage.db_path +{re.escape(shown)} ", ended.stdout)
        assert not re.search("sesame|PASSWORD|/password", ended.stdout + ended.stderr), ended
    assert run_command("backup", "copy", "--db", postgres, folder=tmp_path).stderr.startswith(
        f"mailproxy: the queue is in PostgreSQL ({postgres}): back it up with pg_dump"
    )


def test_without_psycopg_it_is_said_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "psycopg.py").write_text("raise ImportError('No module named psycopg')\n")

    ended = run_command("check", "--db", "postgresql://a@127.0.0.1/b", environment={"PYTHONPATH": str(tmp_path)})

    assert (ended.returncode, "needs psycopg 3" in ended.stderr, "python3-psycopg" in ended.stderr) == (2, True, True)


def everything_in(rig: QueueRig) -> dict[str, list[Any]]:
    """All rows of all tables that are moved, numbers as SQLite has them."""
    tables = [table for table in mailproxy.TABLES if table != "switches"]
    rows = {table: sorted(rig.sql(f"SELECT * FROM {table}"), key=repr) for table in tables}  # noqa: S608
    switches = f"SELECT name, value FROM switches WHERE name NOT IN {mailproxy.OWN_SWITCHES} ORDER BY name"  # noqa: S608
    return {**rows, "switches": rig.sql(switches)}


def test_a_queue_moves_into_the_database_and_back_and_nothing_is_lost_or_sent_twice(
    postgres: str, smtp: SmtpServer, tmp_path: Path
) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    old, new = (tmp_path / name / "queue.db" for name in ("old", "new"))
    old.write_bytes(lzma.decompress(QUEUE_OF_VERSION_2.read_bytes()))
    with asyncio.Runner() as runner:
        rig = QueueRig(tmp_path / "old", runner.run)
        (seq,) = rig.sql("SELECT seq FROM sqlite_sequence WHERE name = 'messages'")
        rig.suspend_batch("rests")
        before = everything_in(rig)
        refused = run_command("import", old, "--db", postgres)
        assert (refused.returncode, "in use" in refused.stderr) == (2, True), refused
        runner.run(rig.file.close())

    moved = run_command("import", old, "--db", postgres)
    assert (moved.returncode, moved.stdout) == (0, f"13 messages moved from {old} to {postgres}\n"), moved
    for again, words in (
        (run_command("import", old, "--db", postgres), "was moved before; start the other one"),
        (run_command("serve", "--db", old), "was moved"),
    ):
        assert (again.returncode, words in again.stderr) == (2, True), again
    with queue_at(postgres) as rig:
        assert everything_in(rig) == before
        assert rig.sql("SELECT last_seq FROM counters") == [seq]
        rig.run(rig.file.write(lambda db: db.execute("INSERT INTO claims VALUES (1, 'gone')")))
        claimed = run_command("import", postgres, "--db", new)
        assert (claimed.returncode, "on the wire" in claimed.stderr) == (2, True), claimed
        rig.run(rig.file.write(lambda db: db.execute("DELETE FROM claims")))

    back = run_command("import", postgres, "--db", new)
    assert (back.returncode, new.stat().st_mode & 0o777) == (0, 0o600), back
    with asyncio.Runner() as runner:
        rig = QueueRig(tmp_path / "new", runner.run)
        assert everything_in(rig) == before
        assert rig.sql("SELECT seq FROM sqlite_sequence WHERE name = 'messages'") == [seq]
        assert rig.tallies()[0] == {row[0]: row[1:] for row in before["tallies"]}
        rig.accepted(submission("next"))
        assert rig.sql("SELECT max(seq) FROM messages") == [(seq[0] + 1,)]
        runner.run(rig.file.close())
    for source, target, words in ((postgres, tmp_path / "third.db", "was moved before"), (new, postgres, "not empty")):
        refused = run_command("import", source, "--db", target)
        assert (refused.returncode, words in refused.stderr) == (2, True), refused


def test_daemons_that_start_together_make_the_tables_once(postgres: str) -> None:
    files = [mailproxy.queue_file(postgres, {}, observe_commit=lambda seconds: None) for _ in range(8)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda file: file.open(), files))
    with asyncio.Runner() as runner:
        for file in files:
            runner.run(file.close())


# ======================================================================
# LEASES
# ======================================================================

SHORT_LEASE = {"LEASE_S": 1.5}  # of a daemon of these tests


@contextlib.contextmanager
def nodes(
    folder: Path, url: str, names: str = "ab", pauses: Any = SHORT_LEASE, **options: Any
) -> Iterator[list[Daemon]]:
    """Daemons that share the database, each called by a letter."""
    with contextlib.ExitStack() as stack:
        daemons = []
        for name in names:
            (folder / name).mkdir()
            config = {"storage": {"db_path": url, "node": name}, **options.get("config", {})}
            given = {**options, "config": config, "environment": {"PAUSES": json.dumps(pauses)}}
            daemons.append(stack.enter_context(Daemon(folder / name, **given)))
        yield daemons


@dataclass
class Pair:
    """Two nodes that stay, with the mail server and the upstream that they share."""

    a: Daemon
    b: Daemon
    smtp: SmtpServer
    reports: ReportReceiver
    ids: Iterator[int] = field(default_factory=itertools.count)

    def lane(self, **fields: Any) -> str:
        """A new account, added through node a; both know it."""
        account_id = f"lane-{next(self.ids)}"
        ask(self.a, "/account", account_at(account_id, self.smtp, **fields))
        wait_until(lambda: account_id in self.b.status()["accounts"], "the other node to know the account", 5)
        return account_id

    def owned(self, account_id: str, by: Daemon) -> str:
        """The same; that node has the lane."""
        other = self.b if by is self.a else self.a
        for number in itertools.count():
            by.submit(letter(f"{account_id}-{number}", account_id=account_id))
            by.wait_status(f"{account_id}-{number}", "sent")
            if owner(by, account_id) == by.config["storage"]["node"]:
                return account_id
            assert number < 20, other.status()


def owner(daemon: Daemon, account_id: str = "default") -> Any:
    return daemon.status()["accounts"][account_id]["node"]


def owner_of(daemons: Sequence[Daemon], account_id: str = "default") -> tuple[Daemon, list[Daemon]]:
    """The node that has the lane, and the others."""
    name = wait_until(lambda: owner(daemons[0], account_id), "somebody to have the lane")
    by_name = {daemon.config["storage"]["node"]: daemon for daemon in daemons}
    return by_name.pop(name), list(by_name.values())


def usual_delivery_s(daemon: Daemon, id_: str, **fields: object) -> float:
    """How long a message takes from its submission to its delivery: the median of three, since the machine may be busy."""
    took = []
    for n in range(3):
        began = time.monotonic()
        daemon.submit(letter(f"{id_}-{n}", **fields))
        daemon.wait_status(f"{id_}-{n}", "sent")
        took.append(time.monotonic() - began)
    return sorted(took)[1]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer) -> Iterator[Pair]:
    folder, url = tmp_path_factory.mktemp("pair"), postgres_server.new_database()
    with SmtpServer() as smtp, ReportReceiver() as reports:
        with nodes(folder, url, smtp=smtp, reports=reports, pauses={}) as (a, b):
            yield Pair(a, b, smtp, reports)


def test_mail_for_a_lane_of_another_node_is_on_the_wire_at_once(pair: Pair) -> None:
    lane = pair.lane()
    pair.a.submit(letter(f"{lane}-first", account_id=lane))
    pair.a.wait_status(f"{lane}-first", "sent")
    has, (other,) = owner_of([pair.a, pair.b], lane)

    assert usual_delivery_s(other, f"{lane}-other", account_id=lane) < 1
    assert owner(pair.a, lane) == owner(pair.b, lane) == has.config["storage"]["node"]
    assert has.attempts(f"{lane}-other-0")[0]["connection"] == f"{lane}-1"  # the one that was open


def test_lanes_that_get_mail_together_are_shared_among_the_nodes(pair: Pair) -> None:
    for number in itertools.count(1):
        lanes = [pair.lane() for _ in range(8)]
        ask(pair.a, "/commands/suspend")
        wait_until(lambda: not pair.b.status()["active"], "the suspension", 5)
        pair.b.submit(*(letter(lane, account_id=lane) for lane in lanes))

        ask(pair.a, "/commands/activate")

        for lane in lanes:
            pair.a.wait_status(lane, "sent")
        if {owner(pair.a, lane) for lane in lanes} == {"a", "b"}:
            return
        assert number < 8  # where one had no processor meanwhile, the other took them all


def test_a_message_on_the_wire_of_another_node_is_neither_deleted_nor_replaced(pair: Pair) -> None:
    lane = pair.lane()
    slow = letter(f"{lane}-slow", "slow@example.com", account_id=lane)
    pair.a.submit(slow)
    wait_until(lambda: pair.b.status()["in_delivery"], "the transaction", 5)
    _, (other,) = owner_of([pair.a, pair.b], lane)

    assert b"\nmailproxy_messages_in_delivery 1.0\n" in other.get("/metrics").content
    answers = [ask(other, "/commands/delete-messages", {"ids": [slow["id"]]})]
    again, changed = [
        other.post("/commands/add-messages", {"messages": [{**slow, **fields}]}) for fields in ({}, {"body": "other"})
    ]

    assert answers[0]["in_delivery"] == [slow["id"]]
    assert (again.status, again.json["known"]) == (200, [slow["id"]])
    assert (changed.status, changed.json["rejected"][0]["reason"]) == (400, "in delivery")
    other.wait_status(slow["id"], "sent")
    assert subjects(pair.smtp).count(slow["id"]) == 1


def test_accounts_suspensions_and_batches_are_known_to_all_nodes(pair: Pair) -> None:
    lane = pair.lane()
    ask(pair.b, f"/account/{lane}/suspend")
    wait_until(lambda: pair.a.status()["accounts"][lane]["state"] == "suspended", "the suspension", 5)
    pair.a.submit(letter(f"{lane}-waits", account_id=lane))
    ask(pair.b, "/commands/suspend", {"batch_code": lane})
    pair.a.submit(letter(f"{lane}-batch", account_id=lane, batch_code=lane))
    assert lane in pair.a.status()["suspended_batches"]

    ask(pair.a, f"/account/{lane}/activate")
    pair.b.wait_status(f"{lane}-waits", "sent")
    assert pair.b.message(f"{lane}-batch")["status"] == "queued"
    ask(pair.a, "/commands/activate", {"batch_code": lane})
    pair.b.wait_status(f"{lane}-batch", "sent")

    ask(pair.a, "/commands/suspend")
    wait_until(lambda: pair.b.status()["active"] is False, "delivery to be suspended everywhere", 5)
    pair.b.submit(letter(f"{lane}-later", account_id=lane))
    ask(pair.b, "/commands/activate")
    pair.a.wait_status(f"{lane}-later", "sent")


@pytest.mark.parametrize("path", ["/commands", "/account/{lane}"])
def test_nothing_is_sent_that_was_submitted_after_another_node_suspended_it(pair: Pair, path: str) -> None:
    lane = pair.lane()
    pair.a.submit(letter(f"{lane}-first", account_id=lane))
    pair.a.wait_status(f"{lane}-first", "sent")
    has, (other,) = owner_of([pair.a, pair.b], lane)
    path = path.format(lane=lane)

    def suspended() -> bool:
        status = has.status()
        return not status["active"] or status["accounts"][lane]["state"] == "suspended"

    for number in range(4):
        ask(other, f"{path}/suspend")
        has.submit(letter(f"{lane}-{number}", account_id=lane))
        wait_until(suspended, "the suspension", 5)
        assert has.message(f"{lane}-{number}")["status"] == "queued"
        ask(other, f"{path}/activate")
        has.wait_status(f"{lane}-{number}", "sent")


def test_an_account_added_through_one_node_is_known_to_the_next_request_at_another(pair: Pair) -> None:
    for number in range(3):
        lanes = [f"added-{number}-{what}" for what in ("mail", "switched", "listed", "deleted")]
        for lane in lanes:
            ask(pair.a, "/account", account_at(lane, pair.smtp))
            if lane is lanes[0]:
                pair.b.submit(letter(lane, account_id=lane))
            elif lane is lanes[1]:
                ask(pair.b, f"/account/{lane}/suspend")
            elif lane is lanes[2]:
                assert lane in [account["id"] for account in pair.b.get("/accounts").json["accounts"]]
            else:
                assert pair.b.delete(f"/account/{lane}").status == 200
        pair.a.wait_status(lanes[0], "sent")


def test_a_failed_message_of_a_lane_that_another_node_has_is_retried_there_at_once(pair: Pair) -> None:
    with MoodySmtpServer(RCPT=["550 no", "550 not this one", "550 nor this"]) as server:
        lane, took = pair.lane(host=server.host, port=server.port), []
        failed = [letter(f"{lane}-{n}", account_id=lane) for n in range(3)]
        pair.a.submit(*failed)
        for message in failed:
            pair.a.wait_status(message["id"], "error")
        _, (other,) = owner_of([pair.a, pair.b], lane)

        for message in failed:  # the median of three, since the machine may be busy
            began = time.monotonic()
            assert ask(other, "/commands/retry-messages", {"ids": [message["id"]]})["queued"] == 1
            other.wait_status(message["id"], "sent")
            took.append(time.monotonic() - began)
        assert sorted(took)[1] < 1


def test_an_account_added_through_one_node_is_known_to_a_retry_at_another(pair: Pair) -> None:
    for number in range(3):
        lane, id_ = pair.lane(), f"comes-back-{number}"
        pair.a.submit(letter(id_, account_id=lane, deferred_ts=int(time.time()) + 1000))
        pair.a.delete(f"/account/{lane}")
        wait_until(lambda lane=lane: lane not in pair.b.status()["accounts"], "the other node to know it", 5)
        ask(pair.a, "/account", account_at(lane, pair.smtp))
        assert ask(pair.b, "/commands/retry-messages", {"ids": [id_]})["queued"] == 1
        pair.b.wait_status(id_, "sent")


def test_mail_goes_by_what_another_node_made_of_its_account_before_it_was_submitted(pair: Pair) -> None:
    with SmtpServer() as second:
        lane = pair.lane()
        pair.a.submit(letter(f"{lane}-first", account_id=lane))
        pair.a.wait_status(f"{lane}-first", "sent")
        has, (other,) = owner_of([pair.a, pair.b], lane)
        for number in range(4):
            server, id_ = (second, pair.smtp)[number % 2], f"{lane}-{number}"
            ask(other, "/account", account_at(lane, server))
            has.submit(letter(id_, account_id=lane))
            has.wait_status(id_, "sent")
            assert id_ in subjects(server)

        ask(other, "/account", account_at(lane, pair.smtp, limit_per_minute=6))
        has.submit(*letters(f"{lane}-limited", 3, account_id=lane))
        wait_until(lambda: has.status()["accounts"][lane]["state"] == "limited", "the limit", 5)
        assert sum(subject.startswith(f"{lane}-") for subject in (*subjects(pair.smtp), *subjects(second))) == 6


def test_an_account_deleted_through_one_node_and_added_again_as_it_was_through_another_is_known(pair: Pair) -> None:
    lane = pair.lane()
    for number in range(3):
        assert pair.b.delete(f"/account/{lane}").status == 200
        ask(pair.a, "/account", account_at(lane, pair.smtp))
        pair.b.submit(letter(f"{lane}-{number}", account_id=lane))
        pair.b.wait_status(f"{lane}-{number}", "sent")


def test_an_account_deleted_through_one_node_is_gone_from_the_other(pair: Pair) -> None:
    lane = pair.lane()
    scheduled = letter(f"{lane}-scheduled", account_id=lane, deferred_ts=int(time.time()) + 1000)
    pair.b.submit(scheduled)

    assert pair.a.delete(f"/account/{lane}").json == {"ok": True, "failed": 1}

    wait_until(lambda: lane not in pair.b.status()["accounts"], "the other node to know it", 5)
    answer = pair.b.post("/commands/add-messages", {"messages": [letter(f"{lane}-late", account_id=lane)]})
    assert answer.json["rejected"][0]["reason"] == "account not found"
    pair.reports.wait_for_entry(scheduled["id"], "error")


@pytest.mark.parametrize("how", ["run-now", "activate", "replace"])
def test_the_cooling_of_a_lane_is_shown_and_ended_through_any_node(pair: Pair, how: str) -> None:
    with MoodySmtpServer(GREETING=["554 no"]) as server:
        lane = pair.lane(host=server.host, port=server.port)
        pair.a.submit(letter(f"{lane}-m", account_id=lane))
        has, (other,) = owner_of([pair.a, pair.b], lane)

        def seen_by_the_other() -> bool:
            shown = other.status()["accounts"][lane]
            return shown["state"] == "cooling" and "no" in shown["reason"] and shown["until"] > time.time()

        wait_until(seen_by_the_other, "the state of the lane", 5)
        command = {"run-now": "/commands/run-now", "activate": f"/account/{lane}/activate", "replace": "/account"}[how]
        ask(other, command, account_at(lane, server) if how == "replace" else None)
        other.wait_status(f"{lane}-m", "sent", 4)

        said = run_command("status", "--url", f"http://127.0.0.1:{other.port}").stdout
        assert re.search(rf"{lane} +\w+ .* {has.config['storage']['node']}\b", said)
        assert re.search(rf"node +{other.config['storage']['node']}\n", said)


def test_every_node_shows_what_all_of_them_accepted_and_sent_of_late(pair: Pair) -> None:
    lane, both = pair.lane(), (pair.a, pair.b)

    def counted(daemon: Daemon) -> list[int]:
        columns = daemon.status()["recent"]
        return [sum(column[name] for column in columns) for name in ("accepted", "sent")]

    at_least = [[number + 2 for number in counted(daemon)] for daemon in both]
    for daemon in both:
        daemon.submit(letter(f"{lane}-{daemon.port}", account_id=lane))
        daemon.wait_status(f"{lane}-{daemon.port}", "sent")
    for daemon, wanted in zip(both, at_least, strict=True):
        wait_until(lambda d=daemon, w=wanted: all(map(operator.ge, counted(d), w)), "the sums of both nodes", 10)


def test_the_metrics_name_the_node(pair: Pair) -> None:
    lane = pair.lane()
    pair.a.submit(letter(f"{lane}-m", account_id=lane))
    pair.a.wait_status(f"{lane}-m", "sent")
    has, (other,) = owner_of([pair.a, pair.b], lane)
    name = has.config["storage"]["node"]

    shown, hidden = [daemon.get("/metrics").content.decode() for daemon in (has, other)]

    assert f'mailproxy_account_up{{account="{lane}",node="{name}"}} 1.0' in shown
    assert f'mailproxy_smtp_connections{{account="{lane}",node="{name}",state="idle"}} 1.0' in shown
    assert re.search(rf'mailproxy_build_info{{node="{name}",', shown)
    assert f'mailproxy_account_up{{account="{lane}"' not in hidden
    assert pair.a.status()["reporter"] == pair.b.status()["reporter"] in ("a", "b")


def test_others_take_the_lanes_of_a_node_that_was_killed(
    tmp_path: Path, postgres: str, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    config = {"smtp": {"limit_per_minute": 8, "max_connections": 2}}  # one is slow, the other keeps to the order
    with nodes(tmp_path, postgres, smtp=smtp, reports=reports, config=config) as daemons:
        daemons[0].submit(letter("m-0"))
        daemons[0].wait_status("m-0", "sent")
        has, (other,) = owner_of(daemons)
        other.submit(*letters("n", 4), letter("slow", "slow2@example.com", priority=0))
        wait_until(lambda: other.status()["in_delivery"], "the last one", 10)
        wait_sent(other, *(f"n-{n}" for n in range(4)))
        has.kill()
        other.submit(*letters("o", 6))

        other.wait_status("slow", "sent")
        other.wait_for_log(f"others take its lanes over node={has.config['storage']['node']}")
        wait_until(lambda: other.status()["accounts"]["default"]["state"] == "limited", "the limit", 10)
        sent = [message["id"] for message in other.get("/messages?status=sent").json["messages"]]
        reports.wait_for(lambda reports: {entry["id"] for entry in reports.acknowledged} >= set(sent))

    assert len(sent) == 8
    assert len(smtp.received) <= 9  # the one on the wire may have come twice
    order = [entry["id"] for entry in reports.acknowledged if entry["status"] == "sent"]
    assert [id_ for id_ in dict.fromkeys(order) if id_[0] == "n"] == [f"n-{n}" for n in range(4)]


def test_a_database_that_ends_idle_sessions_at_once_keeps_nobody_from_taking_over(
    tmp_path: Path, postgres: str, postgres_server: PostgresServer, smtp: SmtpServer
) -> None:
    postgres_server.run(f"ALTER DATABASE {postgres.rpartition('/')[2]} SET idle_session_timeout = '100ms'")
    with nodes(tmp_path, postgres, smtp=smtp) as daemons:
        daemons[0].submit(letter("first"))
        daemons[0].wait_status("first", "sent")
        has, (other,) = owner_of(daemons)
        has.kill()
        other.submit(letter("second"))
        other.wait_status("second", "sent", 10)
        assert "cannot be renewed" not in other.log


def test_a_node_that_was_stopped_longer_than_its_lease_begins_no_transaction_when_it_wakes(
    tmp_path: Path, postgres: str, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    config = {"delivery": {"max_connections_per_account": 1}}
    with nodes(tmp_path, postgres, smtp=smtp, reports=reports, config=config) as daemons:
        daemons[0].submit(*letters("m", 12, "slow100ms@example.com"))
        smtp.wait_for(3)
        has, (other,) = owner_of(daemons)
        has.signal(signal.SIGSTOP)
        wait_until(lambda: other.status()["pending"] == 0, "the other to send it all", 20)
        has.signal(signal.SIGCONT)
        wait_until(lambda: has.status()["pending"] == 0, "it to wake", 5)
        has.submit(letter("last"))
        has.wait_status("last", "sent")
        wait_until(lambda: owner(has) in ("a", "b"), "the lane")
        reports.wait_for(lambda reports: len({entry["id"] for entry in reports.acknowledged}) == 13)

    assert len(subjects(smtp)) <= 14  # the one on the wire may have come twice
    assert len(set(subjects(smtp))) == 13


def test_a_node_that_stops_in_order_hands_over_at_once(
    tmp_path: Path, postgres: str, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    ids = (f"idle-{n}" for n in itertools.count())

    def its_idle_lane() -> str | None:
        id_ = next(ids)
        ask(has, "/account", account_at(id_, smtp))
        has.submit(letter(id_, account_id=id_))
        has.wait_status(id_, "sent")
        return id_ if owner(has, id_) == has.config["storage"]["node"] else None

    with nodes(tmp_path, postgres, smtp=smtp, reports=reports, pauses={}) as daemons:
        daemons[0].submit(letter("first"))
        daemons[0].wait_status("first", "sent")
        has, (other,) = owner_of(daemons)
        idle = wait_until(its_idle_lane, "a lane of the same node")
        wait_until(lambda: idle in other.status()["accounts"], "the account", 5)
        has.submit(letter("slow", "slow4@example.com"))
        wait_until(lambda: has.status()["in_delivery"], "it on the wire")

        began = time.monotonic()
        has.signal(signal.SIGTERM)
        other.submit(letter("next", account_id=idle))
        other.wait_status("next", "sent")
        assert time.monotonic() - began < 3.5  # before what is on the wire is done
        assert has.stop() == 0
        other.submit(letter("last"))
        other.wait_status("last", "sent")
        reports.wait_for_entry("last", "sent")

        assert time.monotonic() - began < 10  # no lease has run out
        assert other.status()["reporter"] == owner(other) == other.config["storage"]["node"]
    arrived = [subject for subject in subjects(smtp) if not subject.startswith("idle")]
    assert Counter(arrived) == Counter(["first", "slow", "next", "last"])


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_the_lanes_of_a_node_that_ended_are_taken_over_also_while_they_have_no_mail_to_send(
    tmp_path: Path, postgres: str, smtp: SmtpServer, end: str
) -> None:
    config = {"account:limited": {"host": smtp.host, "port": smtp.port, "limit_per_hour": 2}}
    with nodes(tmp_path, postgres, smtp=smtp, config=config) as daemons:
        accounts = ("default", "limited")
        daemons[0].submit(letter("m"), *letters("n", 3, account_id="limited"))
        wait_until(lambda: daemons[0].status()["deferred"], "the limit", 10)
        wait_sent(daemons[0], "m", "n-0", "n-1")
        had = {id_: owner(daemons[0], id_) for id_ in accounts}
        has, (other,) = owner_of(daemons)
        getattr(has, end)()

        now = other.config["storage"]["node"]
        wait_until(lambda: {owner(other, id_) for id_ in accounts} == {now}, lambda: f"{now} to have all of {had}", 10)
        shown = other.status()["accounts"]
        assert [shown[id_]["state"] for id_ in accounts] == ["up", "limited"]
        assert len(smtp.received) == 3


def test_limits_are_exact_when_a_lane_changes_hands(tmp_path: Path, postgres: str, smtp: SmtpServer) -> None:
    config = {"smtp": {"limit_per_hour": 6, "max_connections": 2}, "delivery": {"send_interval_seconds": 0.1}}
    with nodes(tmp_path, postgres, smtp=smtp, config=config) as (a, b):
        a.submit(*letters("m", 4))
        smtp.wait_for(4)
        has, (other,) = owner_of([a, b])
        has.stop()
        other.submit(*letters("n", 4))
        wait_until(lambda: other.status()["accounts"]["default"]["state"] == "limited", "the limit", 10)
        has.start()
        other.stop()
        has.submit(letter("last"))
        wait_until(lambda: has.status()["accounts"]["default"]["state"] == "limited", "the limit", 10)
    assert len(smtp.received) == 6


def test_a_node_of_the_same_name_is_refused_and_one_that_died_is_waited_for(
    tmp_path: Path, postgres: str, smtp: SmtpServer
) -> None:
    with nodes(tmp_path, postgres, "a", smtp=smtp) as (first,):
        done = run_command(
            "serve", "--config", first.folder / "config.ini", environment={"PAUSES": json.dumps(SHORT_LEASE)}
        )
        assert done.returncode == 2
        assert "the node a runs already: give each daemon a `node` of its own" in done.stderr
        assert first.get("/ready").status == 200

        first.kill()
        first.start()
        first.submit(letter("m"))
        first.wait_status("m", "sent")

        first.signal(signal.SIGSTOP)
        (tmp_path / "b").mkdir()
        environment = {"PAUSES": json.dumps(SHORT_LEASE)}
        with Daemon(tmp_path / "b", first.config, environment=environment) as second:
            first.signal(signal.SIGCONT)
            assert first.wait_for_exit() == 2
            assert second.get("/ready").status == 200
        assert (first.log.count("the node a runs already"), "Traceback" in first.log) == (1, False)


def test_accounts_of_config_ini_that_differ_are_named_in_the_logs_of_both(
    tmp_path: Path, postgres: str, smtp: SmtpServer
) -> None:
    same = {"account:same": {"host": smtp.host, "port": smtp.port, "password": "one"}}
    with nodes(tmp_path, postgres, smtp=smtp, config={**same, "account:x": {"host": "mx.example.com", "port": 25}}) as (
        a,
        b,
    ):
        assert "differs" not in a.log + b.log
        b.config["account:x"]["port"] = 26
        b.config["account:y"] = {"host": "my.example.com", "port": 25}
        b.config["delivery"] = {"hostname": "b.example.com"}  # which is a node's own
        b.write_config()
        b.signal(signal.SIGHUP)
        for daemon, node in ((a, "b"), (b, "a")):
            for account in ("x", "y"):
                daemon.wait_for_log(f"another node account={account} node={node}")
        assert "account=same" not in a.log + b.log


def test_a_node_that_finds_the_schema_of_another_version_gives_its_lanes_up(
    tmp_path: Path, postgres: str, smtp: SmtpServer
) -> None:
    newer = {**SHORT_LEASE, "MIGRATIONS": [*mailproxy.MIGRATIONS, ""]}
    with nodes(tmp_path, postgres, "a", smtp=smtp) as (old,):
        old.submit(letter("first"))
        old.wait_status("first", "sent")
        old.change("UPDATE switches SET value = value + 1 WHERE name = 'schema'")
        with nodes(tmp_path, postgres, "b", smtp=smtp, pauses=newer) as (new,):
            new.submit(letter("second"))
            new.wait_status("second", "sent")

            ready = old.get("/ready")
            assert (ready.status, "a newer mailproxy" in ready.json["error"]) == (503, True)
            assert "the lease cannot be renewed" in old.log
            assert owner(new) == "b"
        old.change("UPDATE switches SET value = value - 1 WHERE name = 'schema'")
        wait_until(lambda: old.get("/ready").status == 200, "the old one to work again", 5)
        old.submit(letter("third"))
        old.wait_status("third", "sent")


def test_behind_a_pooler_a_look_now_and_then_takes_the_place_of_notifications(
    tmp_path: Path, postgres: str, postgres_server: PostgresServer, pgbouncer: PgBouncer, smtp: SmtpServer,
    reports: ReportReceiver,
) -> None:  # fmt: skip
    url = postgres.replace(f":{postgres_server.port}/", f":{pgbouncer.port}/")
    with nodes(tmp_path, url, smtp=smtp, reports=reports, pauses={}) as daemons:
        daemons[0].submit(letter("first"))
        daemons[0].wait_status("first", "sent")
        has, (other,) = owner_of(daemons)
        assert usual_delivery_s(other, "next") < 1
        ask(other, "/account", account_at("new", smtp))
        wait_until(lambda: "new" in has.status()["accounts"], "the account", 5)
        has.stop()
        other.submit(letter("last"))
        other.wait_status("last", "sent")
        reports.wait_for_entry("last", "sent")


def test_a_node_whose_event_loop_hangs_does_not_keep_its_lanes(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailproxy, "LEASE_S", 1.0)

    async def story() -> None:
        file = mailproxy.PostgresFile(
            postgres, mailproxy.SCHEMA, mailproxy.MIGRATIONS, observe_commit=lambda seconds: None
        )
        file.open()
        leases = mailproxy.Leases(file, "a", lambda: 0.1, logging.getLogger("mailproxy"))
        await leases.enter()
        await asyncio.sleep(1.2)
        assert leases.lasts()

        with psycopg.connect(postgres, autocommit=True) as db:  # the loop does nothing else meanwhile
            runs_out = "SELECT until_ts < clock_timestamp() FROM nodes"
            wait_until(lambda: db.execute(runs_out).fetchone() == (True,), "the lease to run out", 10)
        assert not leases.lasts()
        await leases.leave()
        await file.close()

    asyncio.run(story())


def test_a_database_that_is_away_at_the_start_is_waited_for(
    tmp_path: Path, postgres: str, postgres_server: PostgresServer, smtp: SmtpServer
) -> None:
    pooler, answers, said = PgBouncer(postgres_server), list[int](), list[str]()
    url = postgres.replace(f":{postgres_server.port}/", f":{pooler.port}/")
    daemon = Daemon(tmp_path, {"storage": {"db_path": url}}, smtp=smtp)

    def begin_later() -> None:
        wait_until(lambda: daemon.port, "it to listen")
        paths = ("/health", "/ready", "/status", "/accounts")
        answers.extend(called(daemon.port, "GET", path).status for path in paths)
        said.append(called(daemon.port, "GET", "/ready").json["error"])
        batch = json.dumps({"messages": [letter("early")]})
        answers.append(called(daemon.port, "POST", "/commands/add-messages", body=batch).status)
        stack.enter_context(pooler)

    with contextlib.ExitStack() as stack:
        threading.Thread(target=begin_later, daemon=True).start()
        with daemon:
            daemon.submit(letter("m"))
            daemon.wait_status("m", "sent")
            assert daemon.stop() == 0
    assert answers == [200, 503, 503, 503, 503]
    assert re.fullmatch("the database postgresql://.* cannot be reached: .*refused", *said)
    assert daemon.log.count("the database is waited for") == 1


def test_a_start_that_the_database_does_not_answer_in_the_middle_is_tried_again(
    postgres_server: PostgresServer, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mailproxy, "ANSWER_S", 0.5)
    with Wire(postgres_server.port) as wire, asyncio.Runner() as runner:
        url = postgres.replace(f":{postgres_server.port}/", f":{wire.port}/")
        file = mailproxy.queue_file(url, {}, observe_commit=lambda seconds: None)

        def watchers() -> int:
            return [thread.name for thread in threading.enumerate()].count("queue-deadlines")

        before = watchers()
        wire.deaf_after = b"SHOW"
        for _ in range(2):
            with pytest.raises(mailproxy.StorageUnavailable):
                file.open()
        wire.deaf_after = b""
        monkeypatch.setattr(mailproxy, "ANSWER_S", 10)
        monkeypatch.setattr(mailproxy, "BEGIN", [part.replace("'5s'", "'300ms'") for part in mailproxy.BEGIN])
        with psycopg.connect(postgres) as db:
            db.execute(f"SELECT pg_advisory_xact_lock({mailproxy.SCHEMA_LOCK})")  # as a node that was stopped there
            with pytest.raises(mailproxy.StorageUnavailable, match="lock timeout"):
                file.open()

        file.open()
        wait_until(lambda: watchers() <= before + 1, "the threads of the other tries to end")
        runner.run(file.close())


# ======================================================================
# OUTBOUND HTTP
# ======================================================================


LOOPBACK_ALLOWED = mailproxy.AddressPolicy(["127.0.0.1"])
NOBODY_ALLOWED = mailproxy.AddressPolicy([])


class Scripted(socketserver.ThreadingTCPServer):
    """For each connection it keeps the request and runs a script on the socket."""

    request_queue_size = 128
    connections = 0

    def __init__(self, script, context=None, host="127.0.0.1", family=socket.AF_INET):
        self.address_family, self.stopping, self.requests = family, threading.Event(), []
        self._script, self._context = script, context
        super().__init__((host, 0), None)
        self.port = self.server_address[1]

    def url(self, path="/file.bin"):
        return f"{'https' if self._context else 'http'}://127.0.0.1:{self.port}{path}"

    def get_request(self):
        self.connections += 1
        return super().get_request()

    def finish_request(self, request, client_address):
        request.settimeout(10)
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if self._context is not None:
                request = stack.enter_context(self._context.wrap_socket(request, server_side=True))
            received = b""
            while b"\r\n\r\n" not in received:
                piece = request.recv(65536)
                if not piece:
                    return
                received += piece
            head, _, body = received.partition(b"\r\n\r\n")
            announced = re.search(rb"(?i)content-length: (\d+)", head)
            while announced and len(body) < int(announced[1]):
                body += request.recv(65536)
            self.requests.append((head.decode("latin-1"), body))
            self._script(self, request)

    def handle_error(self, request, client_address):
        raise  # a mistake of the test: told by the thread that meets it


@contextlib.contextmanager
def scripted(script, **options):
    if isinstance(script, bytes):
        answer, script = script, lambda server, connection: connection.sendall(answer)
    with Scripted(script, **options) as server:
        accepting = threading.Thread(target=server.serve_forever, args=(0.02,))
        accepting.start()
        try:
            yield server
        finally:
            server.stopping.set()
            server.shutdown()
            accepting.join()


def answered(body=b"hello", headers=(), status="200 OK"):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def http_get(url, ca_file=None, **options):
    options = {"timeout_s": 10, "max_bytes": 1_000_000} | options
    return mailproxy.http_request("GET", url, trust=lambda: mailproxy.tls_context(ca_file), **options)


def http_failure_of(url, **options):
    with pytest.raises(mailproxy.HttpFailure) as caught:
        http_get(url, **options)
    return caught.value


def trickle(octets, pause_s=0.02):
    def script(server, connection):
        for octet in itertools.chain(octets, itertools.cycle(b"x")):
            connection.sendall(bytes([octet]))
            if server.stopping.wait(pause_s):
                return

    return script


# --- what is sent, what comes back


def test_a_request_goes_out_once_and_its_answer_comes_back_whole():
    with scripted(answered(b"body", ["X-One: 1", "X-One: 2"])) as server:
        options = {"headers": {"X-Token": "t"}, "timeout_s": 10, "max_bytes": 100}
        answer = mailproxy.http_request("POST", server.url("/a?b=c"), body=b"{}", **options)
        as_user = http_get(f"http://us%40er:p%C3%A0ss@127.0.0.1:{server.port}/x")

    assert (answer.status, answer.body, answer.headers["x-one"]) == (200, b"body", "1, 2")
    head, body = server.requests[0]
    assert head.startswith("POST /a?b=c HTTP/1.1\r\n")
    assert body == b"{}"
    for line in (f"Host: 127.0.0.1:{server.port}", "X-Token: t", "Accept-Encoding: identity"):
        assert line in head
    assert f"Authorization: {mailproxy.basic_authorization('us@er', 'pàss')}" in server.requests[1][0]
    assert as_user.url == server.url("/x")


def test_every_status_is_an_answer_and_a_redirect_is_not_followed():
    for status in ("204 No Content", "302 Found", "404 Not Found", "429 Slow", "500 Oh"):
        with scripted(answered(b"", ["Location: /elsewhere"], status)) as server:
            assert http_get(server.url()).status == int(status[:3])
        assert len(server.requests) == 1


PATHS = [
    ("", "/"), ("/a//b/./../c", "/a//b/./../c"), ("//a", "//a"), ("/a b", "/a%20b"), ("/a%20b+c%2Fd", "/a%20b+c%2Fd"),
    ("/è?q=à b", "/%C3%A8?q=%C3%A0%20b"), ("/a#fragment", "/a"), ("/100%", "/100%"), ("?x=1", "/?x=1"),
]  # fmt: skip
NO_URLS = [
    "", "file:///etc/passwd", "ftp://h/x", "//h/x", "http:/h", "http://", "http:///x", "http://h:0/", "http://h:65536/",
    "http://h:x/", "http://a b/", "http://h%2f@/", "http://[::1/", "http://[::1%25lo]/", "http://h\r\nX: y/",
    "http://h/\x00", "http://h/a\tb", "http://h/\ud800", "http://" + "ü" * 300 + "/", "javascript:alert(1)",
    "http://h\\x/",
]  # fmt: skip


def test_the_path_is_sent_as_given_and_only_what_cannot_be_sent_is_encoded():
    with scripted(answered()) as server:
        for path, _ in PATHS:
            http_get(f"http://127.0.0.1:{server.port}{path}")

    assert [head.split(" HTTP/1.1")[0] for head, _ in server.requests] == [f"GET {sent}" for _, sent in PATHS]


@pytest.mark.parametrize("url", NO_URLS)
def test_what_is_no_http_url_is_refused_for_good_before_anything_is_sent(url):
    failure = http_failure_of(url, resolve=lambda host, port: pytest.fail("resolved"))

    assert not failure.transient
    assert failure.reason == "not a valid http or https URL"


# --- deadlines

IN_CHUNKS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
ONCE_AGAIN = answered(b"", ["Location: /again"], "302 Found")


@pytest.mark.parametrize(
    "script",
    [
        lambda server, connection: server.stopping.wait(10),
        trickle(b"HTTP/1.1 200 OK\r\nX-Long: "),
        trickle(b"HTTP/1.1 200 OK\r\n\r\n"),
        trickle(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"),
        trickle(IN_CHUNKS + b"fffff\r\n"),
        trickle(b"HTTP/1.1 404 Gone\r\nContent-Length: 100000\r\n\r\n"),
        trickle(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000, 0.001),
        lambda server, connection: server.stopping.wait(0.1) or connection.sendall(ONCE_AGAIN),
    ],
    ids=["silent", "head", "until close", "length", "chunked", "error", "continue", "redirects"],
)
def test_the_deadline_cuts_whatever_trickles_and_all_redirects_share_it(script):
    with scripted(script) as server:
        begun = time.monotonic()
        failure = http_failure_of(server.url(), timeout_s=0.25, redirects=5)
        took = time.monotonic() - begun

    assert failure.transient
    assert "within 0.25 s" in failure.reason
    assert 0.2 < took < 8
    assert len(server.requests) <= 3


@pytest.mark.parametrize(("scheme", "body"), [("http", bytes(20_000_000)), ("https", b"")], ids=["body", "handshake"])
def test_the_deadline_holds_for_what_nobody_reads_or_answers(scheme, body):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        begun = time.monotonic()
        failure = http_failure_of(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}/", timeout_s=0.25, body=body)

    assert failure.transient
    assert "within" in failure.reason
    assert time.monotonic() - begun < 8


def test_an_unknown_name_and_a_refused_connection_are_passing_failures_and_tell_no_secrets():
    def resolve(host, port):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"127.0.0.1:{listener.getsockname()[1]}"
    unknown = http_failure_of("http://gone.example/x?signature=secret", resolve=resolve)
    refused = http_failure_of(f"http://user:pass@{place}/token?signature=secret")
    with scripted(answered()) as server:
        unsendable = http_failure_of(server.url(), headers={"Authorization": "Bearer geheim\r\nX: y"})

    assert (unknown.transient, refused.transient, unsendable.transient) == (True, True, False)
    assert unknown.reason == "the name gone.example cannot be resolved: Name or service not known"
    assert refused.reason == f"no connection to http://{place}: Connection refused"
    assert "geheim" not in unsendable.reason
    assert unsendable.__cause__ is None


# --- size limits


def test_an_endless_body_is_left_at_the_limit_and_a_bomb_costs_no_more():
    sent = []

    def endless(server, connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while not server.stopping.is_set():
            connection.sendall(bytes(65536))
            sent.append(65536)

    kept = io.BytesIO()
    with scripted(endless) as server:
        assert isinstance(http_failure_of(server.url(), max_bytes=1_000_000), mailproxy.TooLarge)
    with scripted(answered(gzip.compress(bytes(50_000_000)), ["Content-Encoding: gzip"])) as server:
        assert isinstance(http_failure_of(server.url(), max_bytes=1_000_000, into=kept), mailproxy.TooLarge)

    assert sum(sent) < 20_000_000
    assert len(kept.getvalue()) <= 1_000_000


LARGE = os.urandom(300_000) + bytes(3_000_000)
NO_CODINGS = ("identity", "aws-chunked", "none", "UTF-8", "binary, identity", "", "application/gzip")
CHUNKED = (  # with white space that RFC 9110 5.5 allows, and what servers send although no RFC does
    b"Transfer-Encoding: chunked \t", b"Transfer-Encoding: chunked\r\nTransfer-Encoding: CHUNKED",
    b"Transfer-Encoding : chunked", b"Transfer-Encoding:\r\n chunked", b"Warning in line 3\r\nTransfer-Encoding: chunked",
    b"X-Name: a\rb\r\nTransfer-Encoding: chunked", b"\xc3\xa4: a\r\nTransfer-Encoding: chunked",
)  # fmt: skip
EARLY_HINTS, CONTINUE = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n", b"HTTP/1.1 100 \r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (answered(bytes(1000)), bytes(1000)),
        (answered(b""), b""),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil close", b"until close"),
        (IN_CHUNKS + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nT: v\r\n\r\n", b"abcde"),
        (answered(gzip.compress(b"a" * 1000, mtime=0), ["Content-Encoding: GZIP"]), b"a" * 1000),
        (answered(gzip.compress(b"ab", mtime=0) + gzip.compress(b"cd"), ["Content-Encoding: gzip"]), b"abcd"),
        (answered(zlib.compress(b"abc"), ["Content-Encoding: deflate"]), b"abc"),
        (answered(gzip.compress(LARGE, mtime=0), ["Content-Encoding: gzip"]), LARGE),
        *((informational * 3 + answered(), b"hello") for informational in (EARLY_HINTS, CONTINUE)),
        *((answered(b"bytes", [f"Content-Encoding: {coding}"]), b"bytes") for coding in NO_CODINGS),
        *((b"HTTP/1.1 200 OK\r\n" + field + b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n", b"abc") for field in CHUNKED),
        *((answered(b"abc", [field]), b"abc") for field in ("Content-Length: 3", "Transfer-Encoding: identity")),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3, 3\r\n\r\nabcd", b"abc"),
    ],
    ids=itertools.count(),
)
def test_a_body_within_the_limit_comes_whole(answer, body):
    with scripted(answer) as server:
        whole = http_get(server.url(), max_bytes=max(1000, len(body)))

    assert (whole.status, whole.body, "link" in whole.headers) == (200, body, False)


OVER_LIMIT = [
    answered(bytes(1001)),
    b"HTTP/1.1 200 OK\r\n\r\n" + bytes(1001),
    IN_CHUNKS + b"3e9\r\n" + bytes(1001) + b"\r\n0\r\n\r\n",
    answered(gzip.compress(bytes(1001)), ["Content-Encoding: gzip"]),
    answered(gzip.compress(bytes(600)) + gzip.compress(bytes(600)), ["Content-Encoding: gzip"]),
]
NOT_ASKED_FOR = [
    answered(b"x", [f"Content-Encoding: {coding}"]) for coding in ("br", "ZSTD", "gzip, gzip", "aws-chunked,compress")
]
BROKEN_OFF = [
    b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
    IN_CHUNKS + b"64\r\nshort",
    b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nContent-Encoding: gzip\r\n\r\nshort",
    answered(gzip.compress(os.urandom(900))[:-20], ["Content-Encoding: gzip"]),
    answered(b"not compressed", ["Content-Encoding: gzip"]),
    *(b"HTTP/1.1 200 OK\r\nContent-Le", b"HTTP/1.1 200 OK\r\nServer: x\r\n", b"SSH-2.0-OpenSSH\r\n", b""),
    *(EARLY_HINTS, CONTINUE),
    b"HTTP/1.1 200 OK\r\n" + 101 * b"X-Name: a\r\n" + b"\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3, 3\r\n\r\nab",
    *(answered(b"abc", [f"Content-Length: {length}"]) for length in ("5", "x", "+3", "9" * 5000)),
]


@pytest.mark.parametrize("answer", [*OVER_LIMIT, *NOT_ASKED_FOR, *BROKEN_OFF], ids=itertools.count())
def test_too_large_or_in_a_coding_that_nobody_asked_for_fails_for_good_and_what_breaks_off_for_now(answer):
    with scripted(answer) as server:
        failure = http_failure_of(server.url(), max_bytes=1000)

    assert failure.transient == (answer in BROKEN_OFF)
    assert isinstance(failure, mailproxy.TooLarge) == (answer in OVER_LIMIT)
    assert ("larger than the 1000 bytes allowed" in failure.reason) == (answer in OVER_LIMIT)


def test_of_an_error_answer_only_the_beginning_is_read_and_nothing_goes_into_a_file():
    kept = io.BytesIO()
    with scripted(answered(b"hello")) as server, open("/dev/full", "wb", buffering=0) as full:
        answer = http_get(server.url(), into=kept)
        failure = http_failure_of(server.url(), into=full)
    with scripted(answered(bytes(5_000_000), status="404 Not Found")) as server:
        error = http_get(server.url(), max_bytes=10, into=kept)

    assert (answer.body, kept.getvalue()) == (b"", b"hello")
    assert (error.status, len(error.body)) == (404, 262_144)
    assert failure.transient
    assert str(failure).endswith("cannot be stored: No space left on device")


# --- the address policy

FORBIDDEN_ADDRESSES = """
    0.0.0.0 0.1.2.3 10.1.2.3 100.64.0.1 100.100.100.200 127.0.0.1 127.255.255.254 168.63.129.16 169.254.169.254 172.16.0.1
    172.31.255.255 192.0.0.8 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.51.100.1 203.0.113.1 224.0.0.1
    239.255.255.250 240.0.0.1 255.255.255.255 :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254
    64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::1 100::1 2001::1 2001:0:7f00:1:: 2001:20::1 2001:db8::1 2002:7f00:1::1
    2002:808:808::1 3fff::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%lo fec0::1 ff02::1 4000::1 ::ffff:0:7f00:1"""
PUBLIC_ADDRESSES = """
    1.1.1.1 8.8.8.8 100.63.255.255 172.32.0.1 192.0.1.1 223.255.255.255 2606:4700::1111 2a00:1450::1 ::ffff:8.8.8.8
    64:ff9b::808:808"""


def is_permitted(host, address, *allowed):
    try:
        policy = mailproxy.AddressPolicy(mailproxy.HOSTS.parse(", ".join(allowed)) if allowed else ())
        return bool(policy.permitted(host, [(socket.AF_INET, (address, 80))]))
    except mailproxy.HttpFailure:
        return False


def test_only_a_public_address_is_let_through():
    every = f"{FORBIDDEN_ADDRESSES} {PUBLIC_ADDRESSES}".split()

    assert [address for address in every if is_permitted("host.example", address)] == PUBLIC_ADDRESSES.split()


@hypothesis.given(st.ip_addresses())
@hypothesis.settings(max_examples=300, deadline=None)
def test_nothing_that_python_calls_private_is_public(address):
    if mailproxy.is_public(address) and (address.version == 4 or address not in mailproxy.NAT64):
        mapped = getattr(address, "ipv4_mapped", None)
        assert (mapped or address).is_global


@pytest.mark.parametrize(
    ("allowed", "host", "address", "permitted"),
    [
        ("127.0.0.1", "any.example", "127.0.0.1", True), ("127.0.0.1", "any.example", "::ffff:127.0.0.1", True),
        ("10.0.0.0/8", "any.example", "10.200.0.1", True), ("10.0.0.7/8", "any.example", "10.200.0.1", True),
        ("::1", "any.example", "::1", True), ("[::1]", "any.example", "::1", True),
        ("fd00::/8", "any.example", "fd12::1", True), ("Files.Example", "files.example.", "10.0.0.1", True),
        ("Bücher.example", "xn--bcher-kva.example", "10.0.0.1", True), (" localhost ", "LOCALHOST", "127.0.0.1", True),
        ("127.0.0.1", "any.example", "127.0.0.2", False), ("127.0.0.1", "any.example", "::1", False),
        ("files.example", "evil.files.example", "10.0.0.1", False),
        ("files.example", "files.example.evil.example", "10.0.0.1", False),
        ("10.0.0.0/8", "10.0.0.1", "192.168.0.1", False),
    ],
)  # fmt: skip
def test_allow_hosts_lets_through_what_it_names_and_nothing_else(allowed, host, address, permitted):
    assert is_permitted(host, address, allowed) == permitted


def test_no_spelling_of_a_forbidden_address_gets_a_packet_to_it():
    spellings = r"""
        127.0.0.1 127.1 2130706433 0x7f000001 0177.0.0.1 017700000001 0 0.0.0.0 [::1] [::] [::ffff:127.0.0.1]
        [::ffff:7f00:1] localhost public.example@127.0.0.1 public.example:80@localhost public.example\@127.0.0.1
        127.0.0.1. ①②⑦.0.0.1 １２７.0.0.1 127。0。0。1"""

    with scripted(answered(), host="::", family=socket.AF_INET6) as server:
        assert http_get(f"http://127.0.0.1:{server.port}/").status == 200
        for place in spellings.split():
            failure = http_failure_of(f"http://{place}:{server.port}/", policy=NOBODY_ALLOWED)
            assert re.search("is not public|cannot be resolved", failure.reason), place

    assert server.connections == 1


def test_of_several_addresses_the_permitted_ones_are_tried_one_after_the_other():
    def at(*addresses):
        return {"resolve": lambda host, port: [(socket.AF_INET, address) for address in addresses]}

    with scripted(answered()) as server:
        with socket.create_server(("127.0.0.1", 0)) as gone:
            nobody, forbidden, here = gone.getsockname(), ("127.0.0.2", server.port), ("127.0.0.1", server.port)
        second = http_get("http://two.example/", **at(nobody, here))
        permitted = http_get("http://two.example/", policy=LOOPBACK_ALLOWED, **at(forbidden, here))

    assert (second.body, permitted.status) == (b"hello", 200)
    assert server.connections == 2


def test_a_name_is_resolved_once_so_it_cannot_change_between_judgement_and_connection():
    with scripted(answered()) as forbidden:
        asked = []

        def rebinding(host, port):
            asked.append(host)
            return [(socket.AF_INET, ("192.0.2.1" if len(asked) > 1 else "127.0.0.1", forbidden.port))]

        failure = http_failure_of("http://rebinding.example/", policy=NOBODY_ALLOWED, resolve=rebinding)

    assert (failure.transient, "is not public" in failure.reason) == (False, True)
    assert (len(asked), forbidden.connections) == (1, 0)


def test_the_proxy_of_the_environment_is_not_used(monkeypatch):
    with scripted(answered(b"proxy")) as proxy, scripted(answered(b"origin")) as origin:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)

        assert http_get(origin.url()).body == b"origin"


# --- TLS


@pytest.fixture
def http_tls(ca):
    """Of a server that is localhost, and by no other name."""
    return ca.issue("localhost").server_context()


def test_https_is_verified_against_the_authority_given(http_tls, ca):
    with scripted(answered(os.urandom(100_000)), context=http_tls) as server:
        answer = http_get(f"https://localhost:{server.port}/", ca_file=str(ca.ca_file))
        unknown_authority = http_failure_of(f"https://localhost:{server.port}/")
        wrong_name = http_failure_of(f"https://127.0.0.1:{server.port}/", ca_file=str(ca.ca_file))
        no_file = http_failure_of(f"https://localhost:{server.port}/", ca_file="/nowhere/ca.pem")

    assert answer.status == 200
    assert [failure.transient for failure in (unknown_authority, wrong_name, no_file)] == [True] * 3
    assert "certificate" in unknown_authority.reason
    assert "certificate" in wrong_name.reason
    assert "/nowhere/ca.pem" in no_file.reason


def test_the_deadline_cuts_what_trickles_under_tls_and_a_forbidden_address_gets_no_hello(http_tls, ca):
    with scripted(trickle(b"HTTP/1.1 200 OK\r\n\r\n"), context=http_tls) as server:
        forbidden = http_failure_of(server.url(), policy=NOBODY_ALLOWED)
        assert server.connections == 0
        begun = time.monotonic()
        slow = http_failure_of(f"https://localhost:{server.port}/", ca_file=str(ca.ca_file), timeout_s=0.5)

    assert "is not public" in forbidden.reason
    assert "within" in slow.reason
    assert time.monotonic() - begun < 8


# --- redirects


def following(url, **options):
    return http_get(url, **({"policy": LOOPBACK_ALLOWED, "redirects": 5} | options))


def test_five_redirects_are_followed_and_a_sixth_is_not():
    def one_less(server, connection):
        left = int(server.requests[-1][0].split()[1].strip("/"))
        connection.sendall(answered(b"", [f"Location: /{left - 1}"], "302 Found") if left else answered(b"here"))

    with scripted(one_less) as server:
        assert following(server.url("/5")).body == b"here"
        with pytest.raises(mailproxy.HttpFailure, match="more than 5 redirects") as caught:
            following(server.url("/6"))

    assert not caught.value.transient


def test_every_redirect_is_judged_anew_and_one_to_anything_but_http_ends_it_for_good():
    with scripted(answered(b"secret"), host="127.0.0.2") as forbidden:
        leading = answered(b"", [f"Location: http://127.0.0.2:{forbidden.port}/"], "307 Temporary Redirect")
        with scripted(leading) as server, pytest.raises(mailproxy.HttpFailure, match="is not public"):
            following(server.url())
    for location in ("file:///etc/passwd", "ftp://127.0.0.1/x", "http://h:0/", "data:,x", "http://[x"):
        refused = pytest.raises(mailproxy.HttpFailure, match="redirects to what is not")
        with scripted(answered(b"", [f"Location: {location}"], "301 Moved")) as server, refused as caught:
            following(server.url())
        assert not caught.value.transient

    assert forbidden.connections == 0


def test_a_password_in_the_url_is_not_carried_to_another_server():
    with scripted(answered(b"other")) as other:
        with scripted(answered(b"", [f"Location: {other.url()}"], "302 Found")) as server:
            answer = following(f"http://user:pass@127.0.0.1:{server.port}/")

    assert answer.body == b"other"
    assert "Authorization" in server.requests[0][0]
    assert "Authorization" not in other.requests[0][0]


# ======================================================================
# ATTACHMENTS
# ======================================================================


FETCH_TIME = 1_700_000_000.0


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def a_fetcher(s3=None, **changes):
    """Changes are settings of [attachments] and [client], or of the door."""
    changes = {"timeout_seconds": 5, "allow_hosts": ("127.0.0.1",)} | changes
    sections = [
        kind(**{key: changes.pop(key) for key in set(kind._fields) & changes.keys()})
        for kind in (mailproxy.AttachmentSettings, mailproxy.ClientSettings)
    ]
    door = {
        "reveal": lambda secret: secret.given,
        "folder": tempfile.gettempdir(),
        "in_thread": asyncio.to_thread,
        "monotonic": Clock(),
        "now": lambda: FETCH_TIME,
        "observe": lambda source, outcome: None,
    }
    return mailproxy.AttachmentFetcher(*sections, s3 or mailproxy.S3Settings(), **(door | changes))


async def part_of(fetcher, attachment):
    """The one part of a message with that attachment, or the reply that says why there is none."""
    found = await fetcher.fetch_all([attachment])
    parts = found if isinstance(found, Reply) else fetcher.parts([attachment], found)
    return parts if isinstance(parts, Reply) else parts[0]


def named_bytes(part):
    return part.filename, part.content_type, part.content


def fetched(attachment, **changes):
    return asyncio.run(part_of(a_fetcher(**changes), attachment))


def from_url(url, filename="", **fields):
    return Attachment(filename, Source.URL, url, **fields)


def fetched_from(answer, path="/file.bin", filename="", given=(), **changes):
    """What becomes of an attachment with these given fields whose server answers so."""
    with scripted(answer) as server:
        return fetched(from_url(server.url(path), filename, **dict(given)), **changes)


def assert_failed(outcome, *, transient, saying):
    assert isinstance(outcome, Reply)
    assert outcome.text.startswith("Attachment fetch failed: ")
    assert (outcome.stage, outcome.cause) == (mailproxy.Stage.ATTACHMENT, mailproxy.Cause.LOCAL)
    assert (outcome.transient, outcome.permanent) == (transient, not transient)
    assert saying in outcome.text


# --- from a URL


BILL = 'Content-Disposition: attachment; filename="bill 7.pdf"'
OCTETS = "Content-Type: application/octet-stream"


@pytest.mark.parametrize(
    ("path", "headers", "name", "type_", "filename", "content_type"),
    [
        ("/download?id=7", ["Content-Type: Application/PDF; x=y", BILL], "", None, "bill 7.pdf", "application/pdf"),
        ("/a/b%20%C3%A8.txt?x=/y.pdf", [], "", None, "b è.txt", "text/plain"),
        ("/a.txt", ["Content-Type: image/png"], "mine.pdf", None, "mine.pdf", "image/png"),
        ("/a.txt", [OCTETS], "mine.pdf", None, "mine.pdf", "application/pdf"),
        ("/a.txt", [OCTETS], "mine", None, "mine", "application/octet-stream"),
        ("/a.txt", ["Content-Type: nonsense"], "mine.tar.gz", None, "mine.tar.gz", "application/gzip"),
        ("/a.txt", ["Content-Type: image/png"], "mine.pdf", "text/csv; charset=x", "mine.pdf", "text/csv; charset=x"),
        ("/", [], "", None, "attachment", "application/octet-stream"),
        ("/..%2f..%2fetc%2Fpasswd", [], "", None, ".._.._etc_passwd", "application/octet-stream"),
    ],
)
def test_the_message_names_first_then_the_answer_then_the_url(path, headers, name, type_, filename, content_type):
    part = fetched_from(answered(b"x", headers), path, name, {"content_type": type_})

    assert named_bytes(part) == (filename, content_type, b"x")


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("attachment", ""),
        ("attachment; filename=plain.pdf", "plain.pdf"),
        ("filename=plain.pdf", "plain.pdf"),
        ('attachment; filename="with; semicolon=.pdf"; size=3', "with; semicolon=.pdf"),
        (r'attachment; filename="quo\"ted.pdf"', 'quo"ted.pdf'),
        ("attachment; FileName=x.pdf ; creation-date=y", "x.pdf"),
        ("attachment; filename*=UTF-8''%e2%82%ac%20rates.pdf", "€ rates.pdf"),
        ("attachment; filename=\"fallback.pdf\"; filename*=UTF-8'en'%C3%A8.pdf", "è.pdf"),
        ("attachment; filename*=UTF-8''%ff; filename=fallback.pdf", "fallback.pdf"),
        ("attachment; filename*=no-such''%41; filename=fallback.pdf", "fallback.pdf"),
        ("attachment; filename*=ISO-8859-1''%e8.pdf", "è.pdf"),
        ('attachment; filename="../../etc/passwd"', "passwd"),
        ('attachment; filename="C:\\\\Users\\\\me.pdf"', "me.pdf"),
        ('attachment; filename="è.pdf"'.encode().decode("latin-1"), "è.pdf"),
        ('attachment; filename="\xe8.pdf"', "è.pdf"),
        ('attachment; x="; filename=wrong.pdf"; filename=right.pdf', "right.pdf"),
        ("attachment; filename*=x\x00''a; filename=fallback.pdf", "fallback.pdf"),
        ("attachment; filename*0; filename*", ""),
    ],
)
def test_the_name_is_read_from_content_disposition(header, name):
    assert mailproxy.disposition_filename(header) == name


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("plain.pdf", "plain.pdf"), ("Report 3/2024.pdf", "Report 3_2024.pdf"), ("a\\b.pdf", "a_b.pdf"),
        ("line\r\nbreak\x00\x7f\u2028.pdf", "linebreak.pdf"), ("gnp\u202efdp.exe", "gnpfdp.exe"),
        ("🙂 è.pdf", "🙂 è.pdf"), ('quo"ted.pdf', 'quo"ted.pdf'), ("\ud800.pdf", ".pdf"),
        ("..", "attachment"), (" ", "attachment"), ("x" * 300 + ".pdf", "x" * 196 + ".pdf"),
    ],
)  # fmt: skip
def test_a_file_name_is_made_safe(name, safe):
    assert mailproxy.safe_filename(name) == safe


@pytest.mark.parametrize(
    ("status", "transient"),
    [
        *((status, True) for status in (500, 502, 503, 504, 408, 429)),
        *((status, False) for status in (400, 401, 403, 404, 410, 418, 204, 206, 304)),
    ],
)
def test_some_answers_pass_and_all_others_last(status, transient):
    outcome = fetched_from(answered(b"", ["Retry-After: 77"], f"{status} x"))

    assert_failed(outcome, transient=transient, saying=f"answered {status}")
    assert outcome.retry_after_s == (77 if transient else None)


@pytest.mark.parametrize(
    ("header", "pause_s"),
    [
        ("120", 120.0), (" 0 ", 0.0), ("Tue, 14 Nov 2023 22:15:00 GMT", 100.0),
        ("Tue, 14 Nov 2023 22:00:00 GMT", 0.0),
        ("", None), ("soon", None), ("-5", None), ("1.5", None), ("²", None), ("9" * 400, 3600.0),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date_and_an_hour_at_most(header, pause_s):
    assert mailproxy.retry_after_s(header, FETCH_TIME) == pause_s


def test_a_slow_server_a_refused_connection_and_a_name_that_is_not_found_in_time_defer():
    def resolve(host, port):
        if host == "nowhere.example":
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        ended.wait(30)

    async def story():
        urls = [server.url(), "http://nowhere.example/", "http://slow.example/"]
        outcomes = [await part_of(a_fetcher(), from_url(urls[0] + "?token=secret"))]
        fetcher = a_fetcher(timeout_seconds=0.2, resolve=resolve)
        outcomes += [await part_of(fetcher, from_url(url + "?token=secret")) for url in urls[1:]]
        ended.set()
        return outcomes

    ended = threading.Event()
    slow = fetched_from(lambda server, connection: server.stopping.wait(10), "/?token=secret", timeout_seconds=0.3)
    with scripted(b"") as server:
        pass
    outcomes = [slow, *asyncio.run(story())]

    reasons = ["within 0.3 s", "Connection refused", "cannot be resolved", "no answer from slow.example within 0.2 s"]
    for outcome, reason in zip(outcomes, reasons, strict=True):
        assert_failed(outcome, transient=True, saying=reason)
        assert "secret" not in outcome.text


def test_a_forbidden_address_and_a_wrong_scheme_fail():
    with scripted(answered()) as server:
        forbidden = fetched(from_url(server.url()), allow_hosts=())
        assert server.connections == 0

    assert_failed(forbidden, transient=False, saying="127.0.0.1 (127.0.0.1) is not public")
    assert_failed(fetched(from_url("ftp://h/x")), transient=False, saying="not a valid http or https URL")


GZIP_TYPES = ("x-gzip", "gzip", "GZIP; x=y", "x-tgz", "x-compressed-tar", "gzip-compressed", "tar+gzip")


@pytest.mark.parametrize(
    ("path", "filename", "headers", "is_undone"),
    [
        ("/report.csv", "", ["Content-Type: text/csv"], True),
        ("/report.csv", "report.csv", [], True),
        ("/report.csv.gz", "", ["Content-Type: text/csv"], False),
        ("/report.csv.gz?x=1", "report.csv", [], True),
        ("/download?id=7", "backup.tar.gz", [], False),
        ("/download?id=7", "backup.TGZ", ["Content-Type: application/x-tar"], False),
        *(("/download", "", [f"Content-Type: application/{type_}"], False) for type_ in GZIP_TYPES),
        ("/download", "", ['Content-Disposition: attachment; filename="a.txt.gz"'], False),
    ],
)
def test_gzip_is_undone_but_not_of_a_file_that_is_itself_one(path, filename, headers, is_undone):
    content = gzip.compress(b"hello", mtime=0)
    forms = [hashlib.md5(form).hexdigest() for form in (b"hello", content)]
    answer = answered(content, ["Content-Encoding: gzip", *headers])

    parts = [fetched_from(answer, path, filename, {"content_md5": md5}) for md5 in (None, *forms)]

    assert [part.content for part in parts] == [b"hello" if is_undone else content] * 3
    assert_failed(fetched_from(answer, path, filename, {"content_md5": "0" * 32}), transient=False, saying="its MD5 is")


@pytest.mark.parametrize("broken", [b"no gzip", gzip.compress(b"hello")[:-9], gzip.compress(bytes(2000))], ids=range(3))
def test_the_md5_of_a_gzip_file_that_cannot_be_undone_or_is_too_large_then_is_that_of_its_bytes(broken):
    answer, limits = answered(broken, ["Content-Encoding: gzip"]), {"max_attachment_bytes": 1000}
    right = fetched_from(answer, "/a.gz", "", {"content_md5": hashlib.md5(broken).hexdigest()}, **limits)
    wrong = fetched_from(answer, "/a.gz", "", {"content_md5": hashlib.md5(bytes(2000)).hexdigest()}, **limits)

    assert right.content == broken
    assert_failed(wrong, transient=False, saying="its MD5 is")


def test_in_a_burst_the_same_url_is_a_gzip_file_to_one_message_and_a_text_to_another():
    content = gzip.compress(b"hello", mtime=0)
    with scripted(answered(content, ["Content-Encoding: gzip"])) as server:
        fetcher = a_fetcher()

        async def burst():
            names = ("a.csv", "a.csv.gz", "b.csv", "b.tgz")
            return [(await part_of(fetcher, from_url(server.url(), name))).content for name in names]

        assert asyncio.run(burst()) == [b"hello", content] * 2
        assert server.connections == 2


def test_content_and_what_is_fetched_are_judged_alike():
    digest = hashlib.md5(b"hello").hexdigest()

    def outcomes(md5=None, **changes):
        own = Attachment("a/b.txt", Source.CONTENT, content=b"hello", content_md5=md5)
        return [fetched(own, **changes), fetched_from(answered(), "/", "a/b.txt", {"content_md5": md5}, **changes)]

    for part in outcomes() + outcomes(digest.upper()):
        assert named_bytes(part) == ("a_b.txt", "text/plain", b"hello")
    for outcome in outcomes("0" * 32):
        assert_failed(outcome, transient=False, saying=f"its MD5 is {digest}")
    for outcome in outcomes(max_attachment_bytes=4):
        assert_failed(outcome, transient=False, saying="larger than the 4 bytes")


# --- once in a burst


def test_the_same_url_in_a_burst_is_fetched_once():
    observed = []

    def script(server, connection):
        server.stopping.wait(0.2)
        connection.sendall(answered(b"hello"))

    with scripted(script) as server:
        fetcher = a_fetcher(observe=lambda source, outcome: observed.append((source.value, outcome)))

        async def burst():
            url = server.url()
            together = await asyncio.gather(*(part_of(fetcher, from_url(url, f"{n}.txt")) for n in range(50)))
            return [*together, await part_of(fetcher, from_url(url, "50.txt"))]

        parts = asyncio.run(burst())

    assert [part.filename for part in parts] == [f"{n}.txt" for n in range(51)]
    assert {part.content for part in parts} == {b"hello"}
    assert server.connections == 1
    assert collections.Counter(observed) == {("url", "fetched"): 1, ("url", "cached"): 50}
    assert mailproxy.AttachmentSettings().cache_bytes >= mailproxy.AttachmentSettings().max_attachment_bytes


def test_what_was_fetched_is_forgotten_by_size_and_when_the_md5_says_so():
    contents = [bytes([n]) * 400 for n in range(8)]
    newer = hashlib.md5(contents[4]).hexdigest()

    def script(server, connection):
        connection.sendall(answered(contents[len(server.requests) - 1]))

    with scripted(script) as server:
        fetcher = a_fetcher(cache_bytes=900)

        async def first_byte(path, md5=None):
            return (await part_of(fetcher, from_url(server.url(f"/{path}"), content_md5=md5))).content[0]

        async def story():
            return [*[await first_byte(path) for path in "aabacab"], await first_byte("b", newer)]

        assert asyncio.run(story()) == [0, 0, 1, 0, 2, 0, 3, 4]


@pytest.mark.parametrize(
    ("control", "for_s"),
    [
        ("", 30), ("public, max-age=3600", 30), ("max-age=10", 10), ("private, Max-Age = \"5\"", 5), ("s-maxage=5", 30),
        ("max-age=0", 0), ("no-store", 0), ("private, No-Cache, max-age=60", 0), ("max-age=" + "9" * 5000, 30),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["url", "endpoint", "s3"])
def test_what_was_fetched_serves_others_as_long_as_its_cache_control_says_and_30_s_at_most(control, for_s, source):
    clock = Clock()

    def script(server, connection):
        connection.sendall(answered(str(len(server.requests)).encode(), [f"Cache-Control: {control}"]))

    with scripted(script) as server:
        fetcher = a_fetcher(
            monotonic=clock, client_attachment_url=server.url(), s3=s3_defaults(endpoint=server.url(""))
        )
        asked = {"url": from_url(server.url()), "endpoint": from_endpoint("x"), "s3": from_s3("x")}[source]

        async def story():
            contents = []
            for at_s in (0, max(for_s - 1, 0), for_s + 1):
                clock.now = at_s
                contents.append((await part_of(fetcher, asked)).content)
            return contents

        assert asyncio.run(story()) == ([b"1", b"1", b"2"] if for_s else [b"1", b"2", b"3"])


def test_who_joins_a_fetch_of_what_may_not_be_stored_fetches_it_again():
    def script(server, connection):
        wait_until(lambda: len(joined) == 5, "others that wait")
        connection.sendall(answered(b"hello", ["Cache-Control: no-store"]))

    with scripted(script) as server:
        joined = []
        fetcher = a_fetcher()

        async def one():
            joined.append(server)
            return await part_of(fetcher, from_url(server.url()))

        async def burst():
            return await asyncio.gather(*(one() for _ in range(5)))

        parts = asyncio.run(burst())

    assert [part.content for part in parts] == [b"hello"] * 5
    assert server.connections == 5


def test_no_more_files_are_kept_than_descriptors_are_for_them():
    with scripted(answered(b"x")) as server:
        fetcher = a_fetcher()

        async def story():
            before = len(os.listdir("/proc/self/fd"))
            for number in range(mailproxy.KEPT_FILES + 20):
                await part_of(fetcher, from_url(server.url(f"/{number}")))
            return len(os.listdir("/proc/self/fd")) - before

        assert asyncio.run(story()) <= mailproxy.KEPT_FILES + 10


def test_failures_are_not_kept():
    script = [answered(b"", status="503 x"), answered(b"hello")]
    with scripted(lambda server, connection: connection.sendall(script[len(server.requests) - 1])) as server:
        fetcher = a_fetcher()

        async def twice():
            return [await part_of(fetcher, from_url(server.url())) for _ in range(2)]

        first, second = asyncio.run(twice())

    assert (first.transient, second.content) == (True, b"hello")


def test_those_who_joined_a_fetch_go_on_when_the_first_is_cancelled():
    def script(server, connection):
        cancelled.wait(10)
        connection.sendall(answered(b"hello"))

    cancelled = threading.Event()
    with scripted(script) as server:
        fetcher = a_fetcher()

        async def cancel_the_first():
            first, second = (asyncio.create_task(part_of(fetcher, from_url(server.url()))) for _ in range(2))
            while not server.requests:
                await asyncio.sleep(0.001)
            first.cancel()
            cancelled.set()
            return await second

        assert asyncio.run(cancel_the_first()).content == b"hello"
    assert server.connections == 1


def test_a_slow_server_leaves_threads_to_the_others():
    with scripted(lambda server, connection: server.stopping.wait(30)) as slow, scripted(answered(b"fast")) as fast:
        fetcher = a_fetcher(timeout_seconds=2)

        async def race():
            pool = mailproxy.FETCHES_PER_HOST + 1
            asyncio.get_running_loop().set_default_executor(concurrent.futures.ThreadPoolExecutor(pool))
            waiting = [asyncio.create_task(part_of(fetcher, from_url(slow.url(f"/{n}")))) for n in range(20)]
            while slow.connections < mailproxy.FETCHES_PER_HOST:
                await asyncio.sleep(0.001)
            part = await part_of(fetcher, from_url(fast.url()))
            assert not any(task.done() for task in waiting)
            return part, await asyncio.gather(*waiting)

        part, outcomes = asyncio.run(race())

    assert part.content == b"fast"
    assert slow.connections <= 2 * mailproxy.FETCHES_PER_HOST
    for outcome in outcomes:
        assert_failed(outcome, transient=True, saying="")


def test_attachments_that_together_are_too_large_fail():
    inline = [Attachment("a", Source.CONTENT, content=bytes(600)) for _ in range(2)]

    def together(attachments, **changes):
        fetcher = a_fetcher(**changes)
        found = asyncio.run(fetcher.fetch_all(attachments))
        return found if isinstance(found, Reply) else fetcher.parts(attachments, found)

    assert len(together(inline, max_message_bytes=1200)) == 2
    assert_failed(together(inline, max_message_bytes=1199), transient=False, saying="together")
    with scripted(answered(bytes(600))) as server:
        mixed = [inline[0], from_url(server.url("/1"))]
        from_urls = [from_url(server.url(f"/{number}")) for number in range(3)]
        assert len(together(mixed, max_message_bytes=1200)) == 2
        assert_failed(together(mixed, max_message_bytes=1199), transient=False, saying="together")
        server.requests.clear()
        assert_failed(together(from_urls, max_message_bytes=1199), transient=False, saying="together")
        assert len(server.requests) == 2


def test_servers_that_stall_in_the_midst_of_large_attachments_keep_no_memory_from_others(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    begun = b"HTTP/1.1 200 OK\r\nContent-Length: 5000000\r\n\r\n" + bytes(250_000)

    def stall(server: Any, connection: Any) -> None:
        connection.sendall(begun)
        server.stopping.wait(90)

    attachments = {"allow_hosts": "127.0.0.1", "timeout_seconds": 90, "memory_budget_bytes": 25_000_000}
    config = {"attachments": attachments, "smtp": {"max_connections": 8}}
    content = base64.b64encode(bytes(2_250_000)).decode()
    with (
        scripted(stall) as slow,
        scripted(answered(bytes(2_250_000))) as fast,
        SleepyDaemon(tmp_path, config, smtp=smtp) as daemon,
    ):
        daemon.submit(*(letter(f"s-{n}", attachments=[{"filename": "x", "url": slow.url(f"/{n}")}]) for n in range(40)))
        wait_until(lambda: slow.connections == 4, "the slow fetches")

        daemon.submit(letter("own", attachments=[{"filename": "x", "content": content}]))
        daemon.submit(letter("elsewhere", attachments=[{"filename": "x", "url": fast.url()}]))

        smtp.wait_for(2, timeout=60)
        assert set(subjects(smtp)) == {"own", "elsewhere"}


def test_an_account_whose_attachments_hang_leaves_threads_to_the_others(tmp_path: Path, smtp: SmtpServer) -> None:
    attachments, fewer = {"allow_hosts": "127.0.0.0/8", "timeout_seconds": 90}, {"PAUSES": '{"FETCHES": 4}'}
    with (
        scripted(lambda server, connection: server.stopping.wait(90), host="0.0.0.0") as slow,
        scripted(answered(b"quick")) as fast,
        SleepyDaemon(tmp_path, {"attachments": attachments}, smtp=smtp, environment=fewer) as daemon,
    ):
        ask(daemon, "/account", account_at("other", smtp))
        parts = [[{"filename": "x", "url": f"http://127.0.1.{n}:{slow.port}/"}] for n in range(8)]
        daemon.submit(*(letter(f"s-{n}", attachments=part) for n, part in enumerate(parts)))
        wait_until(lambda: slow.connections == 3, "three of four threads that hang")

        daemon.submit(letter("quick", account_id="other", attachments=[{"filename": "x", "url": fast.url()}]))

        smtp.wait_for(1)
        assert (subjects(smtp), slow.connections) == (["quick"], 3)


def test_an_account_whose_server_is_slow_keeps_no_more_memory_than_its_connections_need(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    def script(server: Any, connection: Any) -> None:
        server.stopping.wait(0.1)
        connection.sendall(answered(bytes(900_000)))

    config = {"attachments": {"allow_hosts": "127.0.0.1", "memory_budget_bytes": 10_000_000}}
    with (
        MoodySmtpServer(**{".": [90.0] * 20}) as moody,
        scripted(script) as files,
        SleepyDaemon(tmp_path, config, smtp=smtp) as daemon,
    ):
        ask(daemon, "/account", account_at("slow", moody, max_connections=1))
        parts = [[{"filename": "x", "url": files.url(f"/{n}")}] for n in range(12)]
        daemon.submit(*(letter(f"s-{n}", account_id="slow", attachments=part) for n, part in enumerate(parts)))
        wait_until(
            lambda: moody.heard["."] and len(files.requests) >= daemon.status()["in_delivery"],
            "a slow transaction, and the files of all that were claimed",
        )

        content = base64.b64encode(bytes(900_000)).decode()
        daemon.submit(letter("m", attachments=[{"filename": "x", "content": content}]))

        smtp.wait_for(1, timeout=60)
        daemon.kill()


# --- from the endpoint


def from_endpoint(path, filename=""):
    return Attachment(filename, Source.ENDPOINT, path)


def test_the_endpoint_is_asked_by_storage_path_with_the_credentials_of_the_report():
    with scripted(answered(b"%PDF", ["Content-Type: text/html; charset=utf-8"])) as server:
        part = fetched(
            from_endpoint("invoices:2024/è 7.pdf"),
            client_attachment_url=server.url("/attachments"),
            client_sync_token=mailproxy.Secret("t"),
            allow_hosts=(),
        )

    head, body = server.requests[0]
    assert head.startswith("POST /attachments HTTP/1.1")
    assert "Authorization: Bearer t" in head
    assert "Content-Type: application/json" in head
    assert json.loads(body) == {"storage_path": "invoices:2024/è 7.pdf"}
    assert named_bytes(part) == ("è 7.pdf", "application/pdf", b"%PDF")


def test_the_endpoint_may_have_an_authority_of_its_own_and_is_not_followed_elsewhere(http_tls, ca):
    with scripted(answered(b"", ["Location: /login"], "302 x"), context=http_tls) as server:
        url = f"https://localhost:{server.port}/"
        trusted = fetched(from_endpoint("x"), client_attachment_url=url, ca_file=str(ca.ca_file))
        untrusted = fetched(from_endpoint("x"), client_attachment_url=url)

    assert_failed(trusted, transient=False, saying="the attachment endpoint for 'x' answered 302")
    assert len(server.requests) == 1
    assert_failed(untrusted, transient=True, saying="is not trusted")


def test_without_an_endpoint_its_secret_or_credentials_the_reason_is_told():
    def reveal(secret):
        raise mailproxy.SecretUnavailable(f"{secret.given} cannot be read")

    there = {"client_attachment_url": "http://127.0.0.1:9/", "client_sync_token": mailproxy.Secret("file:/run/token")}
    unreadable = fetched(from_endpoint("x"), **there, reveal=reveal)
    assert_failed(unreadable, transient=True, saying="file:/run/token cannot be read")
    assert_failed(fetched(from_endpoint("x")), transient=False, saying="client_attachment_url")
    nobody = fetched(from_s3(), s3=mailproxy.S3Settings(endpoint="http://127.0.0.1:9"))
    assert_failed(nobody, transient=False, saying="no S3 credentials")


# --- from the file system


@pytest.fixture
def stored_files(tmp_path):
    stored_files = tmp_path / "base"
    (stored_files / "sub").mkdir(parents=True)
    (stored_files / "sub" / "a.txt").write_bytes(b"inside")
    (stored_files / "top.txt").write_bytes(b"top")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (tmp_path / "base-sibling").mkdir()
    (tmp_path / "base-sibling" / "secret.txt").write_bytes(b"secret")
    (stored_files / "link-in").symlink_to("sub/a.txt")
    (stored_files / "link-folder").symlink_to(stored_files / "sub")
    (stored_files / "link-out").symlink_to(tmp_path / "secret.txt")
    (stored_files / "link-up").symlink_to("..")
    (stored_files / "loop").symlink_to("loop")
    (stored_files / "dangling").symlink_to("nowhere")
    os.mkfifo(stored_files / "fifo")
    return stored_files


def from_file(stored_files, path, **changes):
    return fetched(
        Attachment("", Source.FILESYSTEM, path), base_dir=str(stored_files) if stored_files else None, **changes
    )


INSIDE = ["sub/a.txt", "./sub//a.txt", "sub/../sub/a.txt", "link-in", "link-folder/a.txt"]


@pytest.mark.parametrize("path", [*INSIDE, "{stored_files}/sub/a.txt", "{stored_files}/link-in"])
def test_a_file_below_base_dir_is_read(stored_files, path):
    part = from_file(stored_files, path.format(stored_files=stored_files))

    content_type = "text/plain" if path.endswith("txt") else "application/octet-stream"
    assert named_bytes(part) == (path.rpartition("/")[2], content_type, b"inside")


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt", "sub/../../secret.txt", "{stored_files}/../secret.txt", "/etc/passwd",
        "../base-sibling/secret.txt", "link-out",
        "link-up/secret.txt", "link-up/base-sibling/secret.txt", ".", "", "sub/..", "{stored_files}", "/",
    ],
)  # fmt: skip
def test_nothing_outside_base_dir_is_read(stored_files, path):
    assert_failed(
        from_file(stored_files, path.format(stored_files=stored_files)),
        transient=False,
        saying="is not below [attachments] base_dir",
    )


@pytest.mark.parametrize(
    ("path", "saying"),
    [
        ("gone.txt", "No such file"), ("top.txt/x", "Not a directory"), ("sub", "not a regular file"),
        ("fifo", "not a regular file"),
        ("loop", "symbolic links"), ("dangling", "No such file"), ("x" * 300, "name too long"),
    ],
)  # fmt: skip
def test_what_is_no_file_fails_at_once(stored_files, path, saying):
    assert_failed(from_file(stored_files, path), transient=False, saying=saying)


def test_a_link_that_appears_after_the_path_was_judged_is_not_followed(stored_files):
    copy = io.BytesIO()
    with pytest.raises(OSError, match=r"Too many levels|symbolic link"):
        mailproxy.copy_regular_file(str(stored_files), ["link-out"], 100, copy)
    with pytest.raises(OSError, match=r"Not a directory|symbolic link"):
        mailproxy.copy_regular_file(str(stored_files), ["link-up", "secret.txt"], 100, copy)
    assert not copy.getvalue()


def test_a_file_too_large_fails_a_missing_base_dir_defers_and_none_refuses(stored_files):
    assert_failed(
        from_file(stored_files, "sub/a.txt", max_attachment_bytes=5), transient=False, saying="larger than the 5 bytes"
    )
    assert_failed(from_file(stored_files / "unmounted", "a.txt"), transient=True, saying="No such file")
    assert_failed(from_file(None, "a.txt"), transient=False, saying="base_dir is not configured")


# --- from S3: signatures

AMAZONS_EXAMPLE = ("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", None)
MAY_24_2013 = 1_369_353_600


@pytest.mark.parametrize(
    ("method", "path", "headers", "payload", "signature"),
    [
        ("GET", "/test.txt", {"Range": "bytes=0-9"}, b"",
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
        ("PUT", "/test%24file.text",
            {"Date": "Fri, 24 May 2013 00:00:00 GMT", "x-amz-storage-class": "REDUCED_REDUNDANCY"},
            b"Welcome to Amazon S3.", "98ad721746da40c64f1a55b78f14c238d841ea1380cd77a1b5971af0ece108bd"),
        ("GET", "/?lifecycle", {}, b"", "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        ("GET", "/?prefix=J&max-keys=2", {}, b"", "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ],
)  # fmt: skip
def test_signatures_are_those_amazon_published(method, path, headers, payload, signature):
    target = mailproxy.http_target(f"https://examplebucket.s3.amazonaws.com{path}")

    signed = mailproxy.sign_s3(
        method, target, headers, hashlib.sha256(payload).hexdigest(), AMAZONS_EXAMPLE, "us-east-1", MAY_24_2013
    )

    assert signed["authorization"].endswith(f"Signature={signature}")


KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=20)


@hypothesis.given(
    key=KEYS, version=st.text("aB0 +/=&%~", max_size=5), token=st.none() | st.text("ab/+=", min_size=1, max_size=9)
)
@hypothesis.settings(max_examples=100, deadline=None)
def test_signatures_of_any_key_are_those_botocore_makes(key, version, token):
    auth = pytest.importorskip("botocore.auth")
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    keys = ("id", "secret", token)
    defaults = mailproxy.S3Settings(endpoint="https://files.example:9000/prefix")
    target = mailproxy.s3_target(S3Object("papers", key, version_id=version or None), defaults, "eu-south-1")
    assert mailproxy.http_target(target.url) == target

    signed = mailproxy.sign_s3("GET", target, {}, mailproxy.EMPTY_SHA256, keys, "eu-south-1", FETCH_TIME)

    request = AWSRequest("GET", target.url, headers={"x-amz-content-sha256": mailproxy.EMPTY_SHA256})
    request.context["timestamp"] = "20231114T221320Z"
    request.headers["X-Amz-Date"] = request.context["timestamp"]
    if token:
        request.headers["X-Amz-Security-Token"] = token
    signer = auth.S3SigV4Auth(Credentials("id", "secret", token), "s3", "eu-south-1")
    canonical = signer.canonical_request(request)
    assert signed["authorization"].endswith(
        f"Signature={signer.signature(signer.string_to_sign(request, canonical), request)}"
    )


@pytest.mark.parametrize(
    ("wanted", "defaults", "url"),
    [
        (S3Object("papers", "a/b.pdf"), {}, "https://papers.s3.eu-west-1.amazonaws.com/a/b.pdf"),
        (S3Object("papers", "a"), {}, "https://papers.s3.cn-north-1.amazonaws.com.cn/a"),
        (S3Object("pa.pers", "a"), {}, "https://s3.eu-west-1.amazonaws.com/pa.pers/a"),
        (S3Object("Papers", "a"), {}, "https://s3.eu-west-1.amazonaws.com/Papers/a"),
        (S3Object("papers", "a", addressing="path"), {}, "https://s3.eu-west-1.amazonaws.com/papers/a"),
        (S3Object("papers", "a"), {"endpoint": "http://minio:9000"}, "http://minio:9000/papers/a"),
        (S3Object("papers", "a"), {"endpoint": "http://minio:9000/s3/"}, "http://minio:9000/s3/papers/a"),
        (S3Object("papers", "a"), {"endpoint": "http://minio", "addressing": "virtual"},
            "http://papers.minio/a"),
        (S3Object("papers", "a", addressing="path"), {"endpoint": "http://minio", "addressing": "virtual"},
            "http://minio/papers/a"),
        (S3Object("papers", "a", endpoint="https://other"), {"endpoint": "http://minio"},
            "https://other/papers/a"),
        (S3Object("papers", "/a//b/../c d+é%20'.x "), {"endpoint": "http://m"},
            "http://m/papers//a//b/../c%20d%2B%C3%A9%2520%27.x%20"),
        (S3Object("papers", "a?b#c", version_id="v/+="), {"endpoint": "http://m"},
            "http://m/papers/a%3Fb%23c?versionId=v%2F%2B%3D"),
        (S3Object("papers", "a"), {"endpoint": "http://[::1]:9000"}, "http://[::1]:9000/papers/a"),
    ],
)  # fmt: skip
def test_where_an_object_is_asked_for(wanted, defaults, url):
    region = "cn-north-1" if "cn-north-1" in url else "eu-west-1"

    assert mailproxy.s3_target(wanted, mailproxy.S3Settings(**defaults), region).url == url


@pytest.mark.parametrize(
    ("bucket", "key", "region"), [("a/b", "k", "r"), ("x.example#", "k", "r"), ("", "k", "r"), ("b", "k", "r.x/")]
)
def test_names_that_cannot_be_are_refused_for_good(bucket, key, region):
    with pytest.raises(mailproxy.HttpFailure) as caught:
        mailproxy.s3_target(S3Object(bucket, key), mailproxy.S3Settings(), region)

    assert not caught.value.transient


# --- from S3: servers


def from_s3(key="a.txt", bucket="papers", **fields):
    return Attachment("", Source.S3, s3=S3Object(bucket, key, **fields))


def s3_defaults(**changes):
    given = {"access_key_id": "AKID", "secret_access_key": "geheim"} | changes
    secret = ("access_key_id", "secret_access_key", "session_token")
    return mailproxy.S3Settings(**{k: mailproxy.Secret(v) if k in secret else v for k, v in given.items()})


def test_the_endpoint_of_the_configuration_is_not_judged_that_of_a_message_is():
    with scripted(answered(b"hello")) as server:
        operators = fetched(from_s3(), s3=s3_defaults(endpoint=server.url("")), allow_hosts=())
        before = server.connections
        senders = fetched(from_s3(endpoint=server.url("")), s3=s3_defaults(), allow_hosts=())

    assert named_bytes(operators) == ("a.txt", "text/plain", b"hello")
    assert_failed(senders, transient=False, saying="is not public")
    assert (before, server.connections) == (1, 1)


def s3_says(status, code, message="Because.", headers=(), extra=""):
    document = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message>{extra}</Error>"
    return answered(document.encode(), headers, f"{status} x")


@pytest.mark.parametrize(
    "wrong_region",
    [
        s3_says(301, "PermanentRedirect", headers=["x-amz-bucket-region: eu-west-3"]),
        s3_says(400, "AuthorizationHeaderMalformed", extra="<Region>eu-west-3</Region>"),
    ],
)
def test_a_bucket_in_another_region_is_asked_for_there_once(wrong_region):
    with scripted(
        lambda server, connection: connection.sendall([wrong_region, answered(b"hello")][len(server.requests) - 1])
    ) as server:
        part = fetched(from_s3(), s3=s3_defaults(endpoint=server.url("")))
    with scripted(wrong_region) as stubborn:
        outcome = fetched(from_s3(), s3=s3_defaults(endpoint=stubborn.url("")))

    assert part.content == b"hello"
    assert ["/us-east-1/s3/" in server.requests[0][0], "/eu-west-3/s3/" in server.requests[1][0]] == [True, True]
    assert_failed(outcome, transient=False, saying="answered")
    assert len(stubborn.requests) == 2


@pytest.mark.parametrize(
    ("status", "code", "transient"),
    [(503, "SlowDown", True), (500, "InternalError", True), (404, "NoSuchKey", False), (403, "AccessDenied", False)],
)
def test_an_error_is_told_in_the_words_of_s3_without_credentials(status, code, transient):
    with scripted(s3_says(status, code, "Not for AKID &amp; geheim-token, no.")) as server:
        outcome = fetched(from_s3(), s3=s3_defaults(endpoint=server.url(""), session_token="geheim-token"))

    assert_failed(
        outcome, transient=transient, saying=f"s3://papers/a.txt answered {status} {code}: Not for ... & ..., no."
    )


@pytest.mark.parametrize("ahead_s", [-1200, 0, 1200])
def test_a_wrong_clock_is_told_as_what_it_is(ahead_s):
    def door(server, connection):
        """Refuses what was signed more than 15 minutes ago or ahead, as S3 does."""
        stamp = re.search(r"x-amz-date: (\w+)", server.requests[-1][0], re.IGNORECASE)[1]
        signed_at = datetime.datetime.strptime(f"{stamp[:-1]}+0000", "%Y%m%dT%H%M%S%z").timestamp()
        skewed = s3_says(403, "RequestTimeTooSkewed", "The difference is too large.")
        connection.sendall(skewed if abs(signed_at - time.time()) > 900 else answered(b"hello"))

    with scripted(door) as server:
        defaults = s3_defaults(endpoint=server.url(""))
        outcome = fetched(from_s3(), s3=defaults, now=lambda: time.time() + ahead_s)

    if not ahead_s:
        assert outcome.content == b"hello"
        return
    assert_failed(
        outcome,
        transient=False,
        saying="answered 403 RequestTimeTooSkewed: The difference is too large.; check the clock of this machine",
    )


TRICKY_KEYS = [
    "plain.txt", "with space.txt", "a+b=c&d.txt", "naïve/日本.txt", "it's (a) *!~$@:,;?.txt",
    "%20literal.txt", "a//b/./c..txt", "trailing ",
    "hash#question?x=1.txt", "tab\tbell\a.txt",
]  # fmt: skip


@pytest.fixture(scope="module")
def moto_s3():
    """A server that checks signatures; credentials of a user and of a session; versions of a key."""

    def is_up():
        with socket.socket() as line:
            return not line.connect_ex(("127.0.0.1", port))

    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto.server")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "4"}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(is_up, "moto's start")
        yield furnished(boto3, f"http://127.0.0.1:{port}")
    finally:
        server.terminate()
        server.wait(10)


def furnished(boto3, url):
    def client(service, key_id, secret):
        return boto3.client(
            service, endpoint_url=url, region_name="us-east-1", aws_access_key_id=key_id, aws_secret_access_key=secret
        )

    iam = client("iam", "anyone", "anything")
    allowed = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]})
    iam.create_user(UserName="mailproxy")
    key = iam.create_access_key(UserName="mailproxy")["AccessKey"]
    iam.put_user_policy(UserName="mailproxy", PolicyName="all", PolicyDocument=allowed)
    role = iam.create_role(RoleName="sender", AssumeRolePolicyDocument=allowed)["Role"]["Arn"]
    user = (key["AccessKeyId"], key["SecretAccessKey"])
    client("iam", *user).put_role_policy(RoleName="sender", PolicyName="all", PolicyDocument=allowed)
    session = client("sts", *user).assume_role(RoleArn=role, RoleSessionName="sender")["Credentials"]
    s3 = client("s3", *user)
    s3.create_bucket(Bucket="papers")
    s3.put_bucket_versioning(Bucket="papers", VersioningConfiguration={"Status": "Enabled"})
    for tricky in TRICKY_KEYS:
        s3.put_object(Bucket="papers", Key=tricky, Body=tricky.encode())
    versions = [s3.put_object(Bucket="papers", Key="v.txt", Body=body)["VersionId"] for body in (b"old", b"new")]
    return {
        "defaults": {"endpoint": url, "access_key_id": user[0], "secret_access_key": user[1]},
        "session": {
            "endpoint": url,
            "access_key_id": session["AccessKeyId"],
            "secret_access_key": session["SecretAccessKey"],
            "session_token": session["SessionToken"],
        },
        "versions": versions,
    }


@pytest.mark.parametrize("key", TRICKY_KEYS)
def test_objects_of_any_name_come_from_a_server_that_checks_signatures(moto_s3, key):
    part = fetched(from_s3(key), s3=s3_defaults(**moto_s3["defaults"]), now=time.time)

    assert part.content == key.encode()


def test_a_bucket_in_the_host_name_is_understood_by_a_server(moto_s3):
    port = int(moto_s3["defaults"]["endpoint"].rpartition(":")[2])
    defaults = moto_s3["defaults"] | {"endpoint": f"http://s3.us-east-1.amazonaws.com:{port}"}
    asked = []

    def resolve(host, port):
        asked.append(host)
        return [(socket.AF_INET, ("127.0.0.1", port))]

    part = fetched(from_s3("with space.txt"), s3=s3_defaults(**defaults), resolve=resolve, now=time.time)

    assert part.content == b"with space.txt"
    assert asked == ["papers.s3.us-east-1.amazonaws.com"]


def test_versions_and_session_tokens_are_signed(moto_s3):
    defaults, session = s3_defaults(**moto_s3["defaults"]), moto_s3["session"]

    def content(key, defaults, **fields):
        return fetched(from_s3(key, **fields), s3=defaults, now=time.time).content

    assert content("v.txt", defaults, version_id=moto_s3["versions"][0]) == b"old"
    assert content("v.txt", defaults) == b"new"
    assert content("plain.txt", s3_defaults(**session)) == b"plain.txt"
    outcome = fetched(from_s3("plain.txt"), s3=s3_defaults(**session | {"session_token": "none"}), now=time.time)
    assert_failed(outcome, transient=False, saying="answered 4")


@pytest.mark.parametrize(
    ("changes", "key", "saying"),
    [
        ({"secret_access_key": "wrong"}, "plain.txt", "403 SignatureDoesNotMatch"),
        ({"access_key_id": "AKIAUNKNOWN"}, "plain.txt", "403 InvalidAccessKeyId"),
        ({}, "gone.txt", "404 NoSuchKey"),
    ],
)
def test_what_the_server_refuses_fails_in_its_words(moto_s3, changes, key, saying):
    outcome = fetched(from_s3(key), s3=s3_defaults(**(moto_s3["defaults"] | changes)), now=time.time)

    assert_failed(outcome, transient=False, saying=saying)
    assert moto_s3["defaults"]["secret_access_key"] not in outcome.text


# ======================================================================
# DELIVERY AGENT
# ======================================================================


class ScriptedServer:
    """An SMTP server that does as it is told, for one session after the other.

    `replies` maps the beginning of a command ("." for the end of data) to what is said; a list
    gives one for each time. "drop" closes, "reset" rudely, "silence" says nothing any more, "trickle TEXT" says it
    one byte at a time; a text with line breaks is sent as it is.
    """

    def __init__(self, replies=None, offers="PIPELINING", tls=None, implicit_tls=None, deaf=False, injected=""):
        self.replies = {"": "250 ok", "DATA": "354 go", "AUTH": "235 ok", **(replies or {})}
        self.replies = {verb: list(said) if isinstance(said, list) else said for verb, said in self.replies.items()}
        self.offers = offers.split(",") if offers else []
        self.tls, self.implicit_tls, self.deaf, self.injected = tls, implicit_tls, deaf, injected
        self.heard, self.packets, self.contents, self.sessions = [], [], [], 0
        self.never, self.tasks = asyncio.Event(), []

    async def __call__(self, reader, writer):
        self.tasks.append(asyncio.current_task())
        self.sessions += 1
        self.lines, self.rest = collections.deque(), b""
        try:
            await self.speak(writer, "GREETING", "220 test")
            while line := await self.line(reader):
                self.heard.append(line.decode().strip())
                await self.obey(reader, writer, line.decode().strip())
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async def line(self, reader):
        while not self.lines:
            packet = await reader.read(65_536)
            if not packet:
                return b""
            self.packets.append(packet)
            *lines, self.rest = (self.rest + packet).split(b"\n")
            self.lines.extend(lines)
        return self.lines.popleft()

    async def obey(self, reader, writer, command):
        if command.startswith("EHLO ") and "EHLO us" not in self.replies:
            lines = ["test", *self.offers]
            writer.write("".join(f"250{'-' if line is not lines[-1] else ' '}{line}\r\n" for line in lines).encode())
            return
        if command == "STARTTLS" and command not in self.replies:
            writer.write(f"220 go\r\n{self.injected}".encode())
            await writer.start_tls(self.tls)
            self.offers = [offer for offer in self.offers if offer != "STARTTLS"]
            return
        if command.startswith("BDAT "):
            await self.take_chunk(reader, int(command.split()[1]))
            await self.speak(writer, "BDAT", "250 2.0.0 queued as 1")
            return
        said = await self.speak(writer, command, None)
        if command == "QUIT":
            raise ConnectionError
        if said.startswith("354") and self.deaf:
            await self.never.wait()
        if said.startswith("354"):
            await self.take_content(reader, writer)

    async def take_content(self, reader, writer):
        lines = []
        while (line := await self.line(reader)) != b".\r":
            if not line:
                raise ConnectionError
            lines.append(line + b"\n")
            if "MID-DATA" in self.replies:
                await self.speak(writer, "MID-DATA", None)
        self.contents.append(b"".join(lines))
        await self.speak(writer, ".", "250 2.0.0 queued as 1")

    async def take_chunk(self, reader, size):
        heard = b"".join([line + b"\n" for line in self.lines]) + self.rest
        self.packets.append(await reader.readexactly(max(0, size - len(heard))))
        self.contents.append((heard + self.packets[-1])[:size])
        *lines, self.rest = heard[size:].split(b"\n")
        self.lines = collections.deque(lines)

    async def speak(self, writer, command, otherwise):
        known = [verb for verb in self.replies if command.startswith(verb)]
        said = self.replies[max(known, key=len)] if otherwise is None or max(known, key=len) else otherwise
        if isinstance(said, list):
            said = said.pop(0) if len(said) > 1 else said[0]
        if said in ("drop", "reset"):
            await asyncio.sleep(0.01)  # what was said before arrives
            if said == "reset":
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0" + bytes(4))
            raise ConnectionError
        if said == "silence":
            await self.never.wait()
        for piece in said.removeprefix("trickle ") if said.startswith("trickle ") else [said + "\r\n"]:
            writer.write(piece.encode())
            await writer.drain()
            if len(piece) == 1:
                await asyncio.sleep(0.03)
        return said


def in_a_thread(call):
    return asyncio.to_thread(call)


def no_form(url, fields, timeout_s):
    raise OSError("no token endpoint here")


def smtp_agent(*, post_form=no_form, reveal=lambda secret: secret.given, end_of_data_timeout_s=1.0, hostname="us"):
    return mailproxy.DeliveryAgent(
        hostname=hostname,
        reveal=reveal,
        in_thread=in_a_thread,
        post_form=post_form,
        end_of_data_timeout_s=end_of_data_timeout_s,
    )


def smtp_account(port, **fields):
    defaults = {"id": "main", "host": "127.0.0.1", "timeout": 5.0}
    if "timeout" in fields:  # short: no time to build a TLS context
        defaults["start_tls"] = "never"
    return mailproxy.Account(port=port, **{**defaults, **fields})


def encrypted(when):
    return {"implicit_tls": True} if when == "implicit" else {"start_tls": when}


def with_smtp_server(server, story, agent=None, **account):
    """Run `story(open)` where open() is a session at the server, or the reply in its place."""

    async def main():
        listening = await asyncio.start_server(server, account.get("host", "127.0.0.1"), 0, ssl=server.implicit_tls)
        port = listening.sockets[0].getsockname()[1]
        using = agent or smtp_agent()

        async def open_session(**more):
            return await using.open_session(smtp_account(port, **account), name="main-1", **more)

        try:
            async with asyncio.timeout(20):
                return await story(open_session)
        finally:
            listening.close()
            for task in server.tasks:
                task.cancel()
            await asyncio.gather(*server.tasks, return_exceptions=True)

    return asyncio.run(main())


def transact(server, *recipients, content=b"Subject: x\r\n\r\nhello\r\n", times=1, agent=None, **account):
    """Run the transaction in a session; the replies of the last one, and whether the session is usable.

    The server keeps the replies of each (`outcomes`), what it was taken to offer, and whether it knows `bdat`.
    """
    asked = {name: account.pop(name) for name in ("careful", "chunking") if name in account}

    async def story(open_session):
        session = await open_session()
        assert isinstance(session, mailproxy.Session), session
        server.taken_to_offer, server.outcomes = session.offers, []
        for _ in range(times):
            envelope = mailproxy.Envelope("from@x", recipients)
            replies = await session.transact(envelope, content, smtputf8=False, **asked)
            server.outcomes.append(replies)
        usable, server.bdat = session.usable, session.bdat
        await session.quit()
        return replies, usable

    return with_smtp_server(server, story, agent, **account)


def opened(server, agent=None, **account):
    """Why there is no session, None: there is one."""

    async def story(open_session):
        session = await open_session()
        return session if isinstance(session, mailproxy.Reply) else await session.quit()

    return with_smtp_server(server, story, agent, **account)


def said_by(reply):
    return f"{reply.stage}: {reply.words} ({reply.cause})"


smtp_modes = pytest.mark.parametrize("offers", ["PIPELINING", ""], ids=["pipelined", "in turn"])


@pytest.mark.parametrize(
    ("mail", "said", "commands"),
    [
        ("250 fine", "mail: 250 fine (server)", ["MAIL FROM:<me@x>", "RSET", "QUIT"]),
        ("530 5.7.0 log in", "mail: 530 5.7.0 log in (server)", ["MAIL FROM:<me@x>", "QUIT"]),
        ("421 busy", "mail: 421 busy (server)", ["MAIL FROM:<me@x>"]),
        ("drop", "mail: 451 4.4.2 connection closed by the server (lost)", ["MAIL FROM:<me@x>"]),
    ],
)
def test_a_server_can_be_asked_about_a_sender_without_a_mail(mail, said, commands):
    async def story(open_session):
        session = await open_session()
        reply = await session.probe("me@x")
        await session.quit()
        return said_by(reply)

    server = ScriptedServer({"MAIL": mail})

    assert (with_smtp_server(server, story), server.heard[1:]) == (said, commands)


# ----- replies and contents


@pytest.mark.parametrize(
    ("code", "lines", "words"),
    [
        (250, ["2.0.0 Ok: queued"], "250 2.0.0 Ok: queued"),
        (550, ["5.1.1 <a@x>: no such", "5.1.1 user"], "550 5.1.1 <a@x>: no such user"),
        (550, ["4.1.1 wrong class"], "550 4.1.1 wrong class"),  # stays in the text
        (450, ["4.1 short"], "450 4.1 short"),
        (450, ["4.2.1"], "450 4.2.1"),
        (550, ["550 5.1.1 no such", "550-5.1.1: user", "5.1.1"], "550 5.1.1 no such user"),  # some say it twice
        (554, ["5.7.1 554 5.7.1 Relay denied", "554"], "554 5.7.1 Relay denied"),
        (550, ["#5.1.0 Address rejected", "451 is not it"], "550 5.1.0 Address rejected 451 is not it"),
        (451, ["a\x00b\tc \x1b[31m\u202ered"], "451 a b c [31m red"),
        (451, ["  spaces  ", "", " here"], "451 spaces here"),
        (421, [], "421"),
        pytest.param(550, ["x" * 50_000], f"550 {'x' * 1_000}", id="bounded"),
    ],
)
def test_a_reply_is_one_line_with_the_enhanced_code_taken_out(code, lines, words):
    reply = mailproxy.server_reply(mailproxy.Stage.RCPT, code, lines)

    assert reply.words == words
    assert reply.text.isprintable()


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        (b"", b".\r\n"),
        (b"a\r\nb\r\n", b"a\r\nb\r\n.\r\n"),
        (b"no end", b"no end\r\n.\r\n"),
        (b".\r\n..\r\n.a\r\n", b"..\r\n...\r\n..a\r\n.\r\n"),
    ],
)
def test_dots_are_doubled_where_a_line_starts(content, sent):
    assert list(mailproxy.data_pieces(content)) == [(sent, True)]


@given(st.lists(st.sampled_from([b"\r\n", b".", b"x", b"y" * 70_000, b".z" * 65_536]), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_content_cut_in_pieces_is_the_content_as_a_whole(parts):
    content = b"".join(parts)

    pieces, lasts = zip(*mailproxy.data_pieces(content), strict=True)

    whole = content + (b"" if content.endswith(b"\n") or not content else b"\r\n")
    assert b"".join(pieces) == re.sub(rb"(?m)^\.", b"..", whole) + b".\r\n"
    assert all(len(piece) <= 131_076 for piece in pieces)
    assert lasts == (False,) * (len(pieces) - 1) + (True,)


# ----- transactions


@pytest.mark.parametrize(
    ("offers", "packets"),
    [
        ("PIPELINING", ["MAIL FROM:<from@x>\r\nRCPT TO:<a@x>\r\nRCPT TO:<b@x>\r\nDATA\r\n"]),
        ("", ["MAIL FROM:<from@x>\r\n", "RCPT TO:<a@x>\r\n", "RCPT TO:<b@x>\r\n", "DATA\r\n"]),
    ],
    ids=["one packet with PIPELINING", "without it each command waits for the answer to the last"],
)
def test_a_message_is_accepted_for_all_its_recipients(offers, packets):
    server = ScriptedServer(offers=offers)

    replies, usable = transact(server, "a@x", "b@x", content=b".dot\r\nline\r\n", times=2)

    accepted = mailproxy.Reply(mailproxy.Stage.END_OF_DATA, 250, "queued as 1", "2.0.0")
    assert replies == {"a@x": accepted, "b@x": accepted}
    assert usable
    transaction = [*packets, "..dot\r\nline\r\n.\r\n"]  # the content waits for the go-ahead; no RSET is spent
    assert [packet.decode() for packet in server.packets] == ["EHLO us\r\n", *transaction * 2, "QUIT\r\n"]


def test_mail_says_what_the_server_offered_to_hear():
    server = ScriptedServer(offers="SIZE 1000,8BITMIME,SMTPUTF8")

    transact(server, "ü@x", content="ü\r\n".encode())

    assert server.heard[1:3] == ["MAIL FROM:<from@x> SIZE=4 BODY=8BITMIME SMTPUTF8", "RCPT TO:<ü@x>"]


@pytest.mark.parametrize("header", ["Subject: ü\r\n", "Subject: u\r\n"])
@pytest.mark.parametrize("offers", ["8BITMIME,SMTPUTF8", "8BITMIME", ""])
def test_a_header_in_utf_8_is_said_to_be_so_where_the_server_knows_it(header, offers):
    server = ScriptedServer(offers=offers)

    transact(server, "a..b@x", ".@x", content=f"{header}\r\nü\r\n".encode())

    options = " BODY=8BITMIME" if offers else ""
    options += " SMTPUTF8" if "SMTPUTF8" in offers and "ü" in header else ""
    assert server.heard[1:4] == [f"MAIL FROM:<from@x>{options}", 'RCPT TO:<"a..b"@x>', 'RCPT TO:<"."@x>']


AS_1 = "end-of-data: 250 2.0.0 queued as 1 (server)"


@smtp_modes
@pytest.mark.parametrize(
    ("replies", "outcome", "usable"),
    [
        # each recipient has its own reply, and the others get the message
        ({"RCPT TO:<b": "550 5.1.1 who?", "RCPT TO:<c": "450 later"},
         {"a": AS_1, "b": "rcpt: 550 5.1.1 who? (server)", "c": "rcpt: 450 later (server)"}, True),
        # a 421 is the reply for all, but for those who had theirs, and ends the session
        ({"MAIL": "421 4.3.2 bye"}, dict.fromkeys("ab", "mail: 421 4.3.2 bye (server)"), False),
        ({"RCPT": "421 4.3.2 bye"}, dict.fromkeys("ab", "rcpt: 421 4.3.2 bye (server)"), False),
        ({"DATA": "421 4.3.2 bye"}, dict.fromkeys("ab", "data: 421 4.3.2 bye (server)"), False),
        ({".": "421 4.3.2 bye"}, dict.fromkeys("ab", "end-of-data: 421 4.3.2 bye (server)"), False),
        ({"RCPT TO:<a": "550 no", "RCPT TO:<b": "421 bye"},
         {"a": "rcpt: 550 no (server)", **dict.fromkeys("bcd", "rcpt: 421 bye (server)")}, False),
        # an answer that does not fit ends the session, and nothing is sent
        ({"MAIL": "hello there"}, {"a": "mail: 451 4.4.2 malformed reply: hello there (local)"}, False),
        ({"MAIL": "354 go"}, {"a": "mail: 451 4.5.0 the answer does not fit: 354 go (local)"}, False),
        ({"RCPT": "250-one\r\n550 two"}, {"a": "rcpt: 451 4.4.2 malformed reply: 550 two (local)"}, False),
        ({"RCPT": "9"}, {"a": "rcpt: 451 4.4.2 malformed reply: 9 (local)"}, False),
        ({"DATA": "250 fine"}, {"a": "data: 451 4.5.0 the answer does not fit: 250 fine (local)"}, False),
        ({"DATA": "354 go\r\n250 queued already"},
         {"a": "data: 451 4.4.2 an unexpected reply: 250 queued already (local)"}, False),
        ({"MAIL": "250-" + "x" * 70_000 + "\r\n250-\r\n250-"},
         {"a": "mail: 451 4.4.2 an endless reply (local)"}, False),
        ({"MAIL": "250-x\r\n" * 40_000 + "250-"}, {"a": "mail: 451 4.4.2 an endless reply (local)"}, False),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_a_server_says_becomes_a_reply_for_each_recipient(offers, replies, outcome, usable):
    server = ScriptedServer(replies, offers)

    came, still_usable = transact(server, *outcome, timeout=0.5)

    assert {recipient: said_by(reply) for recipient, reply in came.items()} == outcome
    assert still_usable == usable
    assert bool(server.contents) == any("end-of-data" in reply for reply in outcome.values())


@smtp_modes
@pytest.mark.parametrize(
    ("replies", "stage", "words"),
    [
        ({"MAIL": "451 4.7.1 not you"}, "mail", "451 4.7.1 not you"),
        ({"RCPT": "550 no"}, "rcpt", "550 no"),
        ({"DATA": "554 no"}, "data", "554 no"),
        ({".": "552 5.3.4 too much"}, "end-of-data", "552 5.3.4 too much"),
    ],
)
def test_after_a_refusal_the_session_is_reset_and_carries_the_next_message(offers, replies, stage, words):
    once = {verb: [said, {"DATA": "354 go"}.get(verb, "250 ok")] for verb, said in replies.items()}
    if "MAIL" in replies and offers:  # without a sender it takes nothing
        once |= {"RCPT": ["503 who from?", "250 ok"], "DATA": ["503 who from?", "354 go"]}
    server = ScriptedServer(once, offers)

    transact(server, "a@x", times=2)

    first, second = (replies["a@x"] for replies in server.outcomes)
    assert (first.stage, first.words) == (stage, words)
    assert second.accepted
    assert server.heard.count("RSET") == 1


@pytest.mark.parametrize(
    ("replies", "stage", "words", "contents", "usable"),
    [
        ({"MAIL": "550 no", "RCPT": "503 what?", "DATA": "503 what?"}, "mail", "550 no", [], True),  # the first counts
        ({"RCPT": "550 no"}, "rcpt", "550 no", [b""], True),  # a go-ahead for nobody is answered by a lone dot,
        ({"MAIL": "450 4.7.1 not now"}, "mail", "450 4.7.1 not now", [], False),  # but not beside a recipient taken
    ],
)
def test_of_commands_in_one_packet_the_first_refusal_counts_and_no_empty_message_is_sent(
    replies, stage, words, contents, usable
):
    server = ScriptedServer(replies, "PIPELINING")

    refused, still_usable = transact(server, "a@x")

    assert (refused["a@x"].stage, refused["a@x"].words) == (stage, words)
    assert (server.contents, still_usable) == (contents, usable)


def test_a_refused_reset_makes_the_connection_stale_not_the_message_bad():
    server = ScriptedServer({"RCPT": ["550 no", "250 ok"], "RSET": "500 what?"}, "")

    replies, usable = transact(server, "a@x", times=2)

    assert replies["a@x"].cause is mailproxy.Cause.LOST
    assert replies["a@x"].stage is mailproxy.Stage.MAIL
    assert not usable


@pytest.mark.parametrize(
    ("offers", "recipient", "words"),
    [
        ("SIZE 10", "a@x", "552 5.3.4 message of 21 bytes; the server takes 10 at most"),
        ("", "ü@x", "550 5.6.7 the message needs SMTPUTF8, which the server does not offer"),
        ("", "a@x>\r\nRCPT TO:<b@x", "501 5.1.3 an address with control characters"),
    ],
)
def test_what_cannot_be_said_to_the_server_is_refused_without_asking(offers, recipient, words):
    server = ScriptedServer(offers=offers)

    replies, usable = transact(server, recipient)

    assert [(reply.words, reply.cause) for reply in replies.values()] == [(words, "local")]
    assert usable
    assert server.heard == ["EHLO us", "QUIT"]


@pytest.mark.parametrize("offer", ["SIZE", "SIZE 0", "SIZE many", "SIZE " + "9" * 5000], ids=lambda offer: offer[:9])
def test_a_size_that_says_nothing_limits_nothing(offer):
    replies, _ = transact(ScriptedServer(offers=offer), "a@x")

    assert replies["a@x"].accepted


@pytest.mark.parametrize(
    ("offer", "limits"),
    [
        ("LIMITS RCPTMAX=20 mailmax=5 RCPTDOMAINMAX=1 OTHER=7", (5, 20, 1)),
        ("LIMITS RCPTMAX=0 MAILMAX=many XRCPTDOMAINMAX=3", (None, None, None)),
        ("SIZE 5", (None, None, None)),
    ],
)
def test_the_limits_that_a_server_announces_are_known(offer, limits):
    server = ScriptedServer(offers=offer)

    transact(server, "a@x")

    assert server.taken_to_offer[-3:] == limits


# ----- transactions by BDAT

CHUNKING = "PIPELINING,CHUNKING,SIZE 100000,8BITMIME,SMTPUTF8"


@pytest.mark.parametrize(
    ("content", "sent"),
    [
        (b"", b""), (b".\r\n..\r\n.a\r\n", b".\r\n..\r\n.a\r\n"),
        (b"a\r\n.\r\nb", b"a\r\n.\r\nb\r\n"), (b"\xff", b"\xff\r\n"),
        (b"x" * 65_534, b"x" * 65_534 + b"\r\n"),
    ],
    ids=range(5),
)  # fmt: skip
def test_a_small_message_is_one_packet_where_chunking_and_pipelining_are_offered(content, sent):
    server = ScriptedServer(offers=CHUNKING)

    transact(server, "a@x", "ü@x", content=content, times=2, chunking=True)

    options = f"SIZE={len(content)}{'' if content.isascii() else ' BODY=8BITMIME'} SMTPUTF8"
    commands = f"MAIL FROM:<from@x> {options}\r\nRCPT TO:<a@x>\r\nRCPT TO:<ü@x>\r\nBDAT {len(sent)} LAST\r\n"
    assert b"".join(server.packets[1:-1]) == (commands.encode() + sent) * 2
    assert [replies["a@x"].words for replies in server.outcomes] == ["250 2.0.0 queued as 1"] * 2


@pytest.mark.parametrize(
    ("offers", "content", "fresh_s", "asked"),
    [
        (CHUNKING, b"a\r\n", 1, {"careful": True}), (CHUNKING, b"a\r\n", 1, {"chunking": False}),
        (CHUNKING, b"a\r\n", 0, {}),  # it may be dead
        (CHUNKING, b"x" * 65_535, 1, {}),
        ("PIPELINING", b"a\r\n", 1, {}), ("CHUNKING", b"a\r\n", 1, {}), ("PIPELINING,CHUNKING,SIZE 2", b"a", 1, {}),
    ],
    ids=range(7),
)  # fmt: skip
def test_a_content_that_is_large_or_may_not_be_wanted_goes_by_data(monkeypatch, offers, content, fresh_s, asked):
    monkeypatch.setattr(mailproxy, "FRESH_S", fresh_s)
    server = ScriptedServer(offers=offers)

    replies, _ = transact(server, "a@x", content=content, **{"chunking": True, **asked})

    assert (replies["a@x"].accepted, "DATA" in server.heard, "BDAT" in str(server.heard)) == (True, True, False)


NO_ANSWER, NO_FIT = "end-of-data: 451 4.4.2 no answer within 0.5 s", "end-of-data: 451 4.4.2 the answer does not fit"
DOUBT, CLOSED, TOO_MANY = (
    "end-of-data: 451 4.4.2 conn",
    "451 4.4.2 connection closed",
    "end-of-data: 451 4.4.2 an unexpec",
)


@pytest.mark.parametrize(
    ("replies", "outcome", "usable", "by_data"),
    [
        # the first refusal counts, and for each recipient its own; the content's is for the others
        ({"MAIL": "450 no", "RCPT": "503 who?", "BDAT": "503 who?"}, {"a": "mail: 450 no (server)"}, True, False),
        ({"RCPT TO:<b": "550 who?"}, {"a": AS_1, "b": "rcpt: 550 who? (server)"}, True, False),
        ({"RCPT": "550 who?", "BDAT": "503 5.5.1 nobody"}, dict.fromkeys("ab", "rcpt: 550 who? (server)"), True, False),
        ({"RCPT TO:<b": "450 who?", "BDAT": "554 5.6.0 no"},
         {"a": "end-of-data: 554 5.6.0 no (server)", "b": "rcpt: 450 who? (server)"}, True, False),
        # a 421 is the last word: what was to come after it was not taken
        ({"MAIL": "421 bye"}, {"a": "mail: 421 bye (server)"}, False, False),
        ({"RCPT TO:<a": "550 no", "RCPT TO:<b": "421 bye"},
         {"a": "rcpt: 550 no (server)", **dict.fromkeys("bc", "rcpt: 421 bye (server)")}, False, False),
        ({"BDAT": "421 bye"}, {"a": "end-of-data: 421 bye (server)"}, False, False),
        ({"BDAT": "250 ok\r\n421 bye"}, {"a": "end-of-data: 250 ok (server)"}, False, False),
        # replies come in order: a server that closes without any has not taken the content
        ({"MAIL": "drop"}, {"a": f"mail: {CLOSED}"}, False, True),
        ({"MAIL": "550 no", "RCPT": "drop"}, {"a": "mail: 550 no (server)"}, False, False),
        # else it may have, for those who were not refused
        *(({"RCPT TO:<a": "550 no", at: "drop"}, {"a": "rcpt: 550 no (server)", "b": DOUBT}, False, True)
          for at in ("RCPT TO:<b", "BDAT")),
        ({"RCPT": "550 no", "BDAT": "drop"}, {"a": "rcpt: 550 no (server)"}, False, True),
        ({"BDAT": ["250 2.0.0 queued as 1", "drop"]}, {"a": DOUBT}, False, False),  # it does know BDAT
        *(({verb: "reset"}, dict.fromkeys("ab", DOUBT), False, True) for verb in ("MAIL", "RCPT TO:<b", "BDAT")),
        *(({verb: "silence"}, {"a": NO_ANSWER}, False, True) for verb in ("MAIL", "RCPT", "BDAT")),
        # nobody knows what a reply is for when one does not fit, or they are too many
        *(({verb: "334 go"}, {"a": NO_FIT}, False, True) for verb in ("MAIL", "RCPT", "BDAT")),
        *(({"BDAT": f"{said}\r\n250 ok"}, {"a": TOO_MANY}, False, True) for said in ("250 ok", "554 no")),
        ({"MAIL": "550 no"}, {"a": "mail: 550 no (server)"}, False, True),  # and yet it took the content?
        ({"RCPT": "550 no"}, {"a": "rcpt: 550 no (server)"}, False, True),
        # BDAT is not known: nothing was taken
        *(({"BDAT": said}, {}, False, True) for said in ("500 5.5.2 a\r\n500 b", "501 a", "502 a", "503 a", "504 a")),
        ({"BDAT": "554 5.5.1 what?"}, {}, False, True),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_server_says_to_a_chunk_becomes_a_reply_for_each_recipient(replies, outcome, usable, by_data):
    server, times = ScriptedServer(replies, CHUNKING), 2 if isinstance(replies.get("BDAT"), list) else 1
    agent = smtp_agent(end_of_data_timeout_s=0.5)

    timeout = 0.5 if NO_ANSWER in outcome.values() else 20  # it is that of the connection, too
    came, still_usable = transact(server, *(outcome or "a"), times=times, agent=agent, chunking=True, timeout=timeout)

    assert {one: said_by(reply)[: len(outcome[one])] for one, reply in came.items()} == outcome
    assert [reply.in_doubt for reply in came.values()] == ["end-of-data: 451" in said for said in outcome.values()]
    assert (still_usable, server.bdat is False) == (usable, by_data)


def test_a_chunk_of_which_a_part_was_not_sent_is_not_in_doubt():
    async def story(open_session):
        session = await open_session()
        session._transport.pause_reading()
        session._transport.write(b"NOOP\r\n" * 1_000_000)  # more than the network takes before its answers are read
        return await session.transact(mailproxy.Envelope("from@x", ["a@x"]), b"x", smtputf8=False, chunking=True)

    replies = with_smtp_server(ScriptedServer(offers=CHUNKING), story, timeout=0.3)

    assert said_by(replies["a@x"]) == "mail: 451 4.4.2 no answer within 0.3 s (timeout)"


def test_after_a_refused_chunk_the_session_is_reset_and_asked_first():
    server = ScriptedServer({"BDAT": "554 5.6.0 no"}, CHUNKING)

    transact(server, "a@x", times=2, chunking=True)

    assert [replies["a@x"].code for replies in server.outcomes] == [554, 250]
    assert server.heard[-5:] == ["RSET", "MAIL FROM:<from@x> SIZE=21", "RCPT TO:<a@x>", "DATA", "QUIT"]


# ----- servers that misbehave


@smtp_modes
@pytest.mark.parametrize(
    ("deed", "cause", "text"),
    [
        ("drop", "lost", "connection "),
        *((deed, "timeout", "no answer within 0.3 s") for deed in ("silence", "trickle 250-slow" + " ly" * 20)),
    ],
)
def test_an_answer_that_does_not_come_is_a_transient_reply_of_its_stage(offers, deed, cause, text):
    def outcome(at):
        agent = smtp_agent(end_of_data_timeout_s=0.3)
        return transact(ScriptedServer({at: deed}, offers), "a@x", timeout=0.3, agent=agent)

    stages = {"MAIL": "mail", "RCPT": "rcpt", "DATA": "data", ".": "end-of-data"}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # they wait at the same time
        outcomes = list(pool.map(outcome, stages))

    for stage, (replies, usable) in zip(stages.values(), outcomes, strict=True):
        reply = replies["a@x"]
        assert (reply.stage, reply.code, reply.cause) == (stage, 451, cause)
        assert text in reply.text
        assert reply.in_doubt == (stage == "end-of-data")
        assert not usable


@smtp_modes
@pytest.mark.parametrize("careful", [False, True])
def test_a_connection_lost_among_the_recipients_keeps_the_refusals_heard(offers, careful):
    server = ScriptedServer({"RCPT TO:<b": "550 no", "RCPT TO:<c": "drop"}, offers)

    replies, usable = transact(server, "a@x", "b@x", "c@x", "d@x", careful=careful)

    assert replies.pop("b@x").words == "550 no"
    assert {(reply.stage, reply.cause) for reply in replies.values()} == {("rcpt", "lost")}
    assert not usable


@pytest.mark.parametrize(("taken", "contents"), [("250 ok", [b"Subject: x\r\n\r\nhello\r\n"]), ("450 later", [])])
def test_a_careful_transaction_says_data_after_the_replies_to_the_recipients_and_not_for_nobody(taken, contents):
    server = ScriptedServer({"RCPT TO:<b": taken, "RCPT": "550 no"})

    replies, usable = transact(server, "a@x", "b@x", careful=True)

    data = ["DATA", "Subject: x\r\n\r\nhello\r\n."] if contents else []
    assert [packet.decode().strip() for packet in server.packets[2:-1]] == data
    assert (server.contents, usable, replies["a@x"].words) == (contents, True, "550 no")
    assert replies["b@x"].accepted == bool(contents)


@pytest.mark.parametrize(("said", "in_doubt"), [("what?", True), ("354 more", True), ("250 ok\r\n250 ok", False)])
def test_an_answer_to_the_content_that_does_not_fit_leaves_it_in_doubt_but_not_what_follows_a_success(said, in_doubt):
    replies, usable = transact(ScriptedServer({".": said}), "a@x")

    assert (replies["a@x"].in_doubt, replies["a@x"].accepted) == (in_doubt, not in_doubt)
    assert replies["a@x"].stage is mailproxy.Stage.END_OF_DATA
    assert not usable


@pytest.mark.parametrize("implicit_tls", [False, True])
def test_a_connection_closed_while_idle_is_noticed_and_its_message_is_not_in_doubt(ca, implicit_tls):
    context = ca.good().server_context() if implicit_tls else None
    server = ScriptedServer({".": ["250 ok\r\n421 idle for too long"]}, implicit_tls=context)

    async def story(open_session):
        session = await open_session()
        await session.transact(mailproxy.Envelope("from@x", ["a@x"]), b"one\r\n", smtputf8=False)
        while session.usable:
            await asyncio.sleep(0.001)
        await asyncio.wait(server.tasks)
        replies = await session.transact(mailproxy.Envelope("from@x", ["b@x"]), b"two\r\n", smtputf8=False)
        await session.quit()  # no error: Python 3.11.2 cannot abort a TLS connection that was closed twice
        return replies["b@x"]

    reply = with_smtp_server(server, story, ca_file=str(ca.ca_file), implicit_tls=implicit_tls)

    assert (reply.stage, reply.cause) == ("mail", "lost")
    assert server.contents == [b"one\r\n"]


@pytest.mark.parametrize(("encryption", "tls"), [("never", None), ("required", "TLSv1.3"), ("implicit", "TLSv1.3")])
def test_a_large_content_arrives_byte_for_byte(ca, encryption, tls):
    context = ca.good().server_context()
    offers = "STARTTLS,PIPELINING" if encryption == "required" else "PIPELINING"
    server = ScriptedServer(offers=offers, tls=context, implicit_tls=context if encryption == "implicit" else None)
    content = b"".join(b"%07d .dots\r\n.lead\r\n" % number for number in range(40_000))

    replies, _ = transact(server, "a@x", content=content, ca_file=str(ca.ca_file), **encrypted(encryption))

    assert (replies["a@x"].accepted, server.taken_to_offer.tls) == (True, tls)
    assert server.contents == [content.replace(b"\n.", b"\n..")]


@pytest.mark.parametrize(
    ("server", "outcome"),
    [
        ({"deaf": True}, "data: 451 4.4.2 no answer within 0.3 s (timeout)"),
        ({"replies": {"MID-DATA": "552 5.3.4 enough of it"}}, "data: 552 5.3.4 enough of it (server)"),
    ],
    ids=["stops reading", "refuses in the middle"],
)
def test_a_server_that_does_not_take_the_whole_content_leaves_no_doubt(server, outcome):
    replies, usable = transact(ScriptedServer(**server), "a@x", content=(b"x" * 76 + b"\r\n") * 300_000, timeout=0.3)

    assert (said_by(replies["a@x"]), replies["a@x"].in_doubt, usable) == (outcome, False, False)


def test_a_transaction_that_is_cancelled_ends_its_connection():
    server = ScriptedServer({"DATA": "silence"})

    async def story(open_session):
        session = await open_session()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await session.transact(mailproxy.Envelope("from@x", ["a@x"]), b"one\r\n", smtputf8=False)
        return session.usable

    assert with_smtp_server(server, story) is False


def test_an_opening_that_is_cancelled_before_its_login_closes_its_connection():
    server = ScriptedServer(offers="AUTH PLAIN")

    async def story(open_session):
        at_the_login = asyncio.Event()

        async def never():
            at_the_login.set()
            await asyncio.Event().wait()

        opening = asyncio.ensure_future(open_session(may_log_in=never))
        await at_the_login.wait()
        opening.cancel()
        await asyncio.wait(server.tasks)  # they end when the client has gone

    with_smtp_server(server, story, user="me")

    assert server.heard == ["EHLO us"]


# ----- opening a session


def test_a_host_that_cannot_be_reached_is_a_reply_that_says_why():
    port = free_port()

    nobody, unknown = (
        asyncio.run(smtp_agent().open_session(smtp_account(port, host=host), name="main-1"))
        for host in ("localhost", "nowhere.invalid")
    )

    assert {(reply.stage, reply.code, reply.cause) for reply in (nobody, unknown)} == {("connect", 451, "local")}
    assert f"localhost[127.0.0.1]:{port}: Connection refused" in nobody.text
    assert unknown.text.startswith("look-up of nowhere.invalid failed: ")


def test_an_address_that_does_not_answer_leaves_time_for_the_next_one():
    server, looked_up = ScriptedServer(), []

    async def story_of_two_addresses():
        listening = await asyncio.start_server(server, "127.0.0.1", 0)
        good = listening.sockets[0].getsockname()

        async def two_addresses(call):
            if getattr(call, "func", None) is not mailproxy.resolve_name:
                return await asyncio.to_thread(call)
            looked_up.append(call.args[0])
            return [(socket.AF_INET, where) for where in (("127.0.0.1", 1), good)]

        agent = mailproxy.DeliveryAgent(hostname="us", reveal=str, in_thread=two_addresses, post_form=no_form)
        async with listening:
            session = await agent.open_session(smtp_account(good[1], host="mail.x"), name="main-1")
            await session.quit()
            return session

    session = asyncio.run(story_of_two_addresses())

    assert isinstance(session, mailproxy.Session)
    assert looked_up == ["mail.x"]


GREETED, TLS = {}, {"start_tls": "auto"}
LOGIN = {"user": "me", "password": mailproxy.Secret("pw"), "auth": "plain"}


@pytest.mark.parametrize(
    ("replies", "offers", "account", "outcome"),
    [
        ({"GREETING": "421 4.7.0 too many"}, "", GREETED, "connect: 421 4.7.0 too many (server)"),
        ({"GREETING": "554-go\r\n554 away"}, "", GREETED, "connect: 554 go away (server)"),
        ({"GREETING": "drop"}, "", GREETED, "connect: 451 4.4.1 connection lost (lost)"),
        (
            {"GREETING": "silence"},
            "",
            GREETED,
            "connect: 451 4.4.1 no answer in time; if TLS is expected here, set implicit_tls",
        ),
        ({"GREETING": "SSH-2.0-OpenSSH"}, "", GREETED, "connect: 451 4.5.0 the answer does not fit: Malformed SMTP"),
        ({"EHLO us": "421 not now"}, "", GREETED, "ehlo: 421 not now (server)"),
        ({"EHLO us": "silence"}, "", GREETED, "ehlo: 451 4.4.2 no answer in time (timeout)"),
        ({"EHLO us": "550 no", "HELO": "550 still no"}, "", GREETED, "ehlo: 550 still no (server)"),
        (
            {"EHLO us": "500 what?", "HELO": "500 what?"},
            "",
            GREETED,
            "ehlo: 500 what? (this port speaks LMTP: set host",
        ),
        ({"EHLO us": "500 -", "HELO": "502 -", "LHLO": "500 -"}, "", GREETED, "ehlo: 502 - (server)"),
        (
            {"GREETING": "220 LMTP", "EHLO us": "503 -", "HELO": "503 -"},
            "",
            GREETED,
            "ehlo: 503 - (this port speaks LM",
        ),
        ({}, "", {"start_tls": "required"}, "tls: 454 4.7.5 the account requires TLS, but the server does not offer"),
        ({"STARTTLS": "454 4.7.0 not now"}, "STARTTLS", TLS, "tls: 454 4.7.0 not now (server)"),
        ({"STARTTLS": "drop"}, "STARTTLS", TLS, "tls: 454 4.7.5 connection lost (lost)"),
        ({"STARTTLS": "silence"}, "STARTTLS", TLS, "tls: 454 4.7.5 no answer in time (timeout)"),
        ({"STARTTLS": "220 go\r\n250 in clear"}, "STARTTLS", TLS, "tls: "),  # no handshake follows
        ({}, "", LOGIN, "auth: 451 4.7.0 the server offers no AUTH; the account wants to log in (plain) (local)"),
        ({}, "AUTH X", LOGIN, "auth: 451 4.7.0 the server offers only AUTH X; the account wants to log in (plain)"),
        (
            {},
            "STARTTLS",
            LOGIN | {"start_tls": "never"},
            "auth: 451 4.7.0 the server offers no AUTH; the account wants to "
            "log in (plain); it may after STARTTLS: set start_tls = auto (local)",
        ),
        ({"AUTH": "454 4.7.0 later"}, "AUTH PLAIN", LOGIN, "auth: 454 4.7.0 later (server)"),
        ({"AUTH": "421 bye"}, "AUTH PLAIN", LOGIN, "auth: 421 bye (server)"),
        ({"AUTH": "250 fine"}, "AUTH PLAIN", LOGIN, "auth: 451 4.5.0 the answer does not fit: 250 fine (local)"),
        ({"AUTH": "drop"}, "AUTH PLAIN", LOGIN, "auth: 451 4.7.0 connection lost (lost)"),
        ({"AUTH": "silence"}, "AUTH PLAIN", LOGIN, "auth: 451 4.7.0 no answer in time (timeout)"),
    ],
)
def test_an_opening_that_comes_to_nothing_is_a_reply_of_its_stage_and_never_mail(replies, offers, account, outcome):
    server = ScriptedServer(replies, offers)

    reply = opened(server, timeout=0.5 if "silence" in replies.values() else 30, **account)

    assert said_by(reply).startswith(outcome)
    assert not any(line.startswith("MAIL") for line in server.heard)


@pytest.mark.parametrize(
    ("host", "account", "agents", "name"),
    [
        ("127.0.0.1", {"hostname": "of.account"}, "of.machine", "of.account"),
        ("127.0.0.1", {}, "of.machine", "of.machine"),
        ("127.0.0.1", {}, "", "[127.0.0.1]"),
        ("::1", {}, "", "[IPv6:::1]"),
    ],
)
def test_our_name_is_that_of_the_account_else_the_machines_else_the_address_of_the_connection(
    host, account, agents, name
):
    server = ScriptedServer()

    assert opened(server, smtp_agent(hostname=agents), host=host, **account) is None
    assert server.heard[0] == f"EHLO {name}"


@pytest.mark.parametrize(
    ("machine", "name"),
    [("box.example.com", "box.example.com"), ("box", ""), ("localhost", ""), ("LocalHost.localdomain", ""), (None, "")],
)
def test_a_machine_without_a_name_that_others_know_says_none(machine, name, monkeypatch):
    monkeypatch.setattr(mailproxy.socket, "gethostname", lambda: machine)
    monkeypatch.setattr(mailproxy.socket, "getfqdn", lambda short: f"elsewhere.{short}")

    async def looked_up(call):
        if machine is None:
            raise TimeoutError
        return call()

    assert asyncio.run(mailproxy.delivery_agent({}, looked_up)).hostname == name


def test_what_a_server_offers_after_the_login_counts_and_one_that_refuses_to_say_it_again_changes_nothing():
    then = {"offers": ["SIZE 5000", "SMTPUTF8"]}, {"replies": {"EHLO us": "503 5.5.1 twice"}}
    more, refusing = (LoginServer("PLAIN", after_login=after) for after in then)

    taken = []
    for server in (more, refusing):
        transact(server, "a@x", user=server.user, password=mailproxy.Secret(server.secret))
        taken.append((server.taken_to_offer.size_bytes, server.taken_to_offer.smtputf8, server.taken_to_offer.auth))

    assert taken == [(5000, True, ("plain",)), (None, False, ("plain",))]
    assert more.heard[2] == refusing.heard[2] == "EHLO us"


def test_a_server_of_the_old_kind_is_greeted_by_helo():
    server = ScriptedServer({"EHLO us": "502 unknown"})

    replies, _ = transact(server, "a@x")

    assert replies["a@x"].accepted
    assert server.heard[:3] == ["EHLO us", "HELO us", "MAIL FROM:<from@x>"]


# ----- TLS


@pytest.fixture
def quiet_loop(caplog):
    """asyncio's servers log the handshakes that fail."""
    caplog.set_level("CRITICAL", logger="asyncio")


@pytest.mark.parametrize(
    ("offers", "start_tls", "heard"),
    [
        ("STARTTLS,PIPELINING", "auto", ["EHLO us", "STARTTLS", "EHLO us", "MAIL FROM:<from@x>"]),
        ("STARTTLS,PIPELINING", "required", ["EHLO us", "STARTTLS", "EHLO us", "MAIL FROM:<from@x>"]),
        ("STARTTLS,PIPELINING", "never", ["EHLO us", "MAIL FROM:<from@x>"]),
        ("PIPELINING", "auto", ["EHLO us", "MAIL FROM:<from@x>"]),
    ],
)
def test_starttls_is_used_when_it_is_offered_and_wanted_and_ehlo_is_said_again(ca, offers, start_tls, heard):
    server = ScriptedServer(offers=offers, tls=ca.good().server_context())

    replies, _ = transact(server, "a@x", ca_file=str(ca.ca_file), start_tls=start_tls)

    assert replies["a@x"].accepted
    assert server.heard[: len(heard)] == heard


@pytest.mark.usefixtures("quiet_loop")
@pytest.mark.parametrize("encryption", ["auto", "required", "implicit"])
@pytest.mark.parametrize("wrong", ["authority", "name"])
def test_a_certificate_that_does_not_fit_is_a_reply_and_never_mail_but_for_who_does_not_verify(ca, encryption, wrong):
    context = (ca.good() if wrong == "authority" else ca.issue("elsewhere.example")).server_context()
    account = {**encrypted(encryption), "ca_file": None if wrong == "authority" else str(ca.ca_file)}

    def server():
        return ScriptedServer(
            offers="STARTTLS", tls=context, implicit_tls=context if encryption == "implicit" else None
        )

    refusing = server()
    assert said_by(opened(refusing, **account)).startswith("tls: 454 4.7.5 the server's certificate is not accepted: ")
    assert "MAIL" not in str(refusing.heard)
    assert opened(server(), verify_tls=False, **account) is None


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A private authority and a server's certificate as most instructions make them: without key usage."""
    needs("openssl")
    folder = tmp_path_factory.mktemp("recipe")
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -subj /CN=Ours -days 30 -config plain.cnf",
        "req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=mail -config plain.cnf",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out server.pem -days 30 -extfile names.cnf",
        "req -x509 -newkey rsa:2048 -nodes -keyout self.key -out self.pem -subj /CN=localhost -days 30"
        " -addext subjectAltName=IP:127.0.0.1",
    ):
        (folder / "plain.cnf").write_text("[req]\ndistinguished_name = dn\nx509_extensions = ca\n[dn]\n[ca]\n"
                                          "basicConstraints = CA:TRUE\n")  # fmt: skip
        (folder / "names.cnf").write_text("subjectAltName = IP:127.0.0.1\n")
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.mark.usefixtures("quiet_loop")
@pytest.mark.parametrize(
    ("shown", "account", "outcome"),
    [
        ("server", {"ca_file": "ca.pem"}, None),
        ("self", {"ca_file": "self.pem"}, None),
        ("server", {"ca_file": "server.pem"}, None),  # also without its authority, which Python before 3.13 wanted
        ("self", {}, "self-signed certificate; name a copy of it (in PEM) as ca_file, or set verify_tls = false"),
        ("server", {}, "unable to get local issuer certificate; name the certificate of its authority as ca_file"),
        ("server", {"ca_file": "self.pem"}, "unable to get local issuer certificate; name the certificate of its"),
        ("server", {"ca_file": "ca.pem", "host": "localhost"}, "'localhost'.; set host to a name that is in it"),
    ],
)
def test_a_private_authority_of_the_commonest_recipe_will_do_and_a_certificate_refused_says_what_to_do(
    recipe, shown, account, outcome
):
    context = Certificate(recipe / f"{shown}.pem", recipe / f"{shown}.key").server_context()
    server = ScriptedServer(implicit_tls=context)

    reply = opened(
        server,
        implicit_tls=True,
        **{name: str(recipe / said) if name == "ca_file" else said for name, said in account.items()},
    )

    assert (reply is None) == (outcome is None)
    assert outcome is None or outcome in reply.text


@pytest.mark.usefixtures("quiet_loop")
def test_tls_spoken_to_a_port_in_clear_says_so():
    reply = opened(ScriptedServer(), implicit_tls=True)

    assert (reply.stage, reply.transient) == ("tls", True)
    assert "this port begins in clear: set implicit_tls = false" in reply.text


def test_words_injected_before_the_handshake_are_not_taken_for_the_servers(ca):
    injected = "250-injected\r\n250 PIPELINING\r\n"
    server = ScriptedServer(offers="STARTTLS", tls=ca.good().server_context(), injected=injected)

    transact(server, "a@x", ca_file=str(ca.ca_file))

    assert not server.taken_to_offer.pipelining


@pytest.mark.parametrize("field", ["ca_file", "client_cert"])
def test_a_certificate_file_that_cannot_be_used_is_a_reply(tmp_path, field):
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("not a certificate")

    replies = [opened(ScriptedServer(), **{field: str(file)}) for file in (nonsense, tmp_path / "none")]

    assert {(reply.stage, reply.code, reply.cause) for reply in replies} == {("tls", 454, "local")}
    assert all("certificate files cannot be used" in reply.text for reply in replies)


def test_certificates_are_read_once_and_again_for_an_account_that_was_replaced_and_when_told_so(ca, tmp_path):
    context, ours = ca.good().server_context(), tmp_path / "client.pem"
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca.ca_file)
    server, agent, written, shown = ScriptedServer(), smtp_agent(), [], []

    async def look(reader, writer):
        shown.append(written.index(writer.get_extra_info("ssl_object").getpeercert(binary_form=True)))
        await server(reader, writer)

    def renew_certificate():
        ours.write_bytes(
            b"".join(file.read_bytes() for file in ca.issue("client.example", usage=ExtendedKeyUsageOID.CLIENT_AUTH))
        )
        written.append(ssl.PEM_cert_to_DER_cert(ours.read_text().partition("-----BEGIN EC")[0]))

    async def story():
        listening = await asyncio.start_server(look, "127.0.0.1", 0, ssl=context)
        port = listening.sockets[0].getsockname()[1]
        account = smtp_account(port, ca_file=str(ca.ca_file), client_cert=str(ours), **encrypted("implicit"))
        for step in ("begin", "keep", "replace", "tell"):
            renew_certificate()
            if step == "replace":
                account = account._replace()
            if step == "tell":
                agent.contexts.clear()
            session = await agent.open_session(account, name="main-1")
            await session.quit()
        listening.close()

    asyncio.run(story())

    assert shown == [0, 0, 2, 3]


@pytest.mark.usefixtures("quiet_loop")
def test_a_client_certificate_is_shown_after_starttls_and_who_has_none_sends_no_mail(ca):
    context, ours = ca.good().server_context(), ca.issue("client.example", usage=ExtendedKeyUsageOID.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(ca.ca_file)
    account = {"ca_file": str(ca.ca_file), "start_tls": "required"}
    asked, refusing = (ScriptedServer(offers="STARTTLS", tls=context) for _ in range(2))

    replies, _ = transact(asked, "a@x", client_cert=str(ours.cert), client_key=str(ours.key), **account)
    refusal = opened(refusing, **account)

    assert replies["a@x"].accepted
    assert asked.heard[:4] == ["EHLO us", "STARTTLS", "EHLO us", "MAIL FROM:<from@x>"]
    assert refusal.transient
    assert refusing.heard == ["EHLO us", "STARTTLS"]


# ----- logging in


class LoginServer(ScriptedServer):
    """Knows one user, and what a login looks like by each method; `echo` repeats what it was told."""

    user, secret = "mé", "gehëim"

    def __init__(self, methods, replies=None, echo=False, bare="", after_login=None, **fields):
        super().__init__(replies, offers=f"AUTH {methods},PIPELINING", **fields)
        self.logins, self.echo, self.bare, self.after_login = [], echo, bare, after_login or {}

    async def obey(self, reader, writer, command):
        if not command.startswith("AUTH ") or command in self.replies:
            await super().obey(reader, writer, command)
            return
        _, method, *said = command.split()
        if said and self.bare:
            writer.write(f"{self.bare}\r\n".encode())
            return
        right, told = await getattr(self, method.lower().replace("-", "_"))(reader, writer, *said)
        self.logins.append(method)
        self.offers = self.after_login.get("offers", self.offers)
        self.replies.update(self.after_login.get("replies", {}))
        refusal = f"535 5.7.8 refused {told}" if self.echo else "535 5.7.8 refused"
        writer.write((("235 2.7.0 ok" if right else refusal) + "\r\n").encode())

    async def plain(self, reader, writer, said):
        return base64.b64decode(said).decode() == f"\0{self.user}\0{self.secret}", said

    async def login(self, reader, writer, said=None):
        said = said or base64.b64encode(await self.asked(reader, writer, "Username:"))
        password = await self.asked(reader, writer, "Password:")
        return (base64.b64decode(said).decode(), password.decode()) == (self.user, self.secret), password.decode()

    async def cram_md5(self, reader, writer):
        user, digest = (await self.asked(reader, writer, "<1@x>")).decode().split()
        return (user, digest) == (self.user, hmac.new(self.secret.encode(), b"<1@x>", "md5").hexdigest()), ""

    async def xoauth2(self, reader, writer, said):
        if base64.b64decode(said).decode() == f"user={self.user}\x01auth=Bearer {self.secret}\x01\x01":
            return True, said
        assert await self.asked(reader, writer, '{"status":"400","schemes":"Bearer"}') == b""
        return False, said

    async def oauthbearer(self, reader, writer, said):
        gs2, host, port, token, *rest = base64.b64decode(said).decode().split("\x01")
        assert (gs2, host, port.isascii(), rest) == ("n,a=m=3Dé=2C,", "host=127.0.0.1", True, ["", ""])
        if token == f"auth=Bearer {self.secret}":
            return True, said
        assert await self.asked(reader, writer, '{"status":"invalid_token"}') == b"\x01"
        return False, said

    async def asked(self, reader, writer, challenge):
        writer.write(b"334 " + base64.b64encode(challenge.encode()) + b"\r\n")
        return base64.b64decode(await self.line(reader))


def log_in_at(server, agent=None, **fields):
    return opened(server, agent, **{"user": server.user, "password": mailproxy.Secret(server.secret), **fields})


@pytest.mark.parametrize("method", ["plain", "login", "cram-md5"])
@pytest.mark.parametrize(("secret", "words"), [(LoginServer.secret, None), ("wrong", "535 5.7.8 refused")])
def test_each_method_is_one_login_with_a_password_in_utf_8_and_a_refusal_has_the_servers_words(method, secret, words):
    server = LoginServer("PLAIN LOGIN CRAM-MD5")

    reply = log_in_at(server, password=mailproxy.Secret(secret), auth=method)

    assert reply is None or (reply.stage, reply.cause) == ("auth", "server")
    assert (reply and reply.words.partition(" (")[0]) == words
    assert server.logins == [method.upper()]


@pytest.mark.parametrize(
    ("bare", "words", "logins"),
    [
        ("501 5.5.4 syntax", None, ["LOGIN"]),
        ("504 no", None, ["LOGIN"]),
        ("501 5.7.0 failed", "501 5.7.0 failed", []),
        ("535 5.7.8 who?", "535 5.7.8 who?", []),
    ],
)
def test_auth_login_says_the_name_on_a_line_of_its_own_where_the_command_may_not_have_it(bare, words, logins):
    server = LoginServer("LOGIN", bare=bare)

    reply = log_in_at(server)

    assert ((reply and reply.words), server.logins) == (words, logins)
    assert sum(line.startswith("AUTH") for line in server.heard) == 1 + len(logins)


@pytest.mark.parametrize(
    ("methods", "hint"),
    [
        ("CRAM-MD5 LOGIN PLAIN", "refused (to CRAM-MD5: if the password is right, auth = plain would help)"),
        ("CRAM-MD5 LOGIN", "refused (to CRAM-MD5: if the password is right, auth = login would help)"),
        ("CRAM-MD5", "refused"),
    ],
)
def test_a_refusal_of_cram_md5_says_which_other_method_would_help(methods, hint):
    server = LoginServer(methods)

    assert log_in_at(server, password=mailproxy.Secret("wrong")).text == hint
    assert server.logins == ["CRAM-MD5"]


@pytest.mark.parametrize(("encrypted", "method"), [(True, "PLAIN"), (False, "CRAM-MD5")])
def test_auto_hides_the_password_from_the_wire_one_way_or_the_other(ca, encrypted, method):
    server = LoginServer("LOGIN PLAIN CRAM-MD5", implicit_tls=ca.good().server_context() if encrypted else None)

    assert log_in_at(server, implicit_tls=encrypted, ca_file=str(ca.ca_file)) is None
    assert server.logins == [method]


@pytest.mark.parametrize("secret", ["wröng", "w"])
@pytest.mark.parametrize("method", ["plain", "login", "xoauth2"])
def test_credentials_that_a_server_repeats_are_not_in_the_reply(method, secret):
    server = LoginServer("PLAIN LOGIN XOAUTH2", echo=True)

    reply = log_in_at(server, password=mailproxy.Secret(secret), auth=method)

    assert reply.code == 535
    assert "***" in reply.text
    assert secret not in reply.text
    for word in reply.text.split():
        with contextlib.suppress(ValueError):
            assert secret.encode() not in base64.b64decode(word, validate=True)


def test_a_secret_that_cannot_be_read_is_a_reply_and_no_connection():
    def reveal(secret):
        raise mailproxy.SecretUnavailable(f"{secret.given} is not set")

    server = ScriptedServer(offers="AUTH PLAIN")

    reply = opened(server, smtp_agent(reveal=reveal), user="me", password=mailproxy.Secret("env:PW"))

    assert said_by(reply) == "auth: 451 4.7.0 env:PW is not set (local)"
    assert server.sessions == 0


# ----- access tokens


class TokenEndpoint:
    """Answers in turn with what it was given; keeps the forms it got."""

    def __init__(self, *answers):
        self.answers, self.forms = list(answers), []

    def __call__(self, url, fields, timeout_s):
        self.forms.append((url, dict(fields)))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        status, body = answer
        return status, body if isinstance(body, bytes) else json.dumps(body).encode()


def token_granted(token, **fields):
    return 200, {"access_token": token, "expires_in": 3600, "token_type": "Bearer", **fields}


OAUTH2 = {
    "oauth2_token_url": "https://x/token", "oauth2_client_id": "client",
    "oauth2_client_secret": mailproxy.Secret("cs"), "oauth2_refresh_token": mailproxy.Secret("rt"),
}  # fmt: skip


def by_token(**fields):
    return smtp_account(
        25, user=LoginServer.user, **OAUTH2 | {f"oauth2_{name}": value for name, value in fields.items()}
    )


def keeper_of(endpoint, now=lambda: 0.0, in_thread=in_a_thread):
    reveal = operator.attrgetter("given")
    return mailproxy.DeliveryAgent(hostname="us", post_form=endpoint, reveal=reveal, in_thread=in_thread, monotonic=now)


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({}, {"grant_type": "refresh_token", "client_secret": "cs", "refresh_token": "rt"}),
        ({"client_secret": None}, {"grant_type": "refresh_token", "refresh_token": "rt"}),
        (
            {"refresh_token": None, "scope": "https://x/.default"},
            {"grant_type": "client_credentials", "client_secret": "cs", "scope": "https://x/.default"},
        ),
    ],
)
def test_a_token_is_asked_for_by_refresh_token_or_client_credentials(fields, form):
    endpoint = TokenEndpoint(token_granted("t1"))

    assert asyncio.run(keeper_of(endpoint).token(by_token(**fields))) == "t1"
    assert endpoint.forms == [("https://x/token", {"client_id": "client", **form})]


async def in_no_time(call):
    """A call that is done before it is awaited, as one in an executor may be from Python 3.14 on."""
    return call()


@pytest.mark.parametrize("in_thread", [in_a_thread, in_no_time])
@pytest.mark.parametrize("answer", [token_granted("t"), (400, {"error": "invalid_grant"})])
def test_connections_that_ask_at_the_same_time_share_one_fetch_and_its_outcome(answer, in_thread):
    endpoint = TokenEndpoint(answer)

    async def story():
        keeper = keeper_of(endpoint, in_thread=in_thread)
        return await asyncio.gather(*(keeper.token(by_token()) for _ in range(16)))

    tokens = asyncio.run(story())

    assert len(endpoint.forms) == 1
    assert len(set(tokens)) == 1


def test_the_latest_refresh_token_is_used_and_a_late_refusal_of_an_old_token_costs_no_new_one():
    endpoint = TokenEndpoint(token_granted("t1", refresh_token="rt2"), token_granted("t2"), token_granted("t3"))
    keeper = keeper_of(endpoint)

    tokens = [asyncio.run(keeper.token(by_token()))]
    for _ in range(2):  # connections that were shown the same one
        keeper.invalidate(by_token(), "t1")
        tokens.append(asyncio.run(keeper.token(by_token())))
    tokens.append(asyncio.run(keeper.token(by_token(refresh_token=mailproxy.Secret("of an account replaced")))))

    assert tokens == ["t1", "t2", "t2", "t3"]
    assert [form["refresh_token"] for _, form in endpoint.forms] == ["rt", "rt2", "of an account replaced"]


@pytest.mark.parametrize(
    ("answer", "words", "cause"),
    [
        (
            (400, {"error": "invalid_grant", "error_description": "rt cs"}),
            "535 5.7.8 token endpoint: 400 invalid_grant",
            "local",
        ),
        ((401, b"<html>"), "535 5.7.8 token endpoint: 401", "local"),
        ((429, {}), "454 4.7.0 token endpoint: 429", "server"),
        ((500, b""), "454 4.7.0 token endpoint: 500", "server"),
        ((200, b"[]"), "454 4.7.0 token endpoint: 200", "server"),
        ((200, {"access_token": 7}), "454 4.7.0 token endpoint: 200", "server"),
        ((200, {"access_token": "\ud800"}), "454 4.7.0 token endpoint: 200", "server"),
        ((200, b"[" * 100_000), "454 4.7.0 token endpoint: 200", "server"),
        (OSError("refused"), "451 4.7.0 token endpoint: refused", "lost"),
        (TimeoutError(), "451 4.7.0 no answer from the token endpoint in time", "timeout"),
    ],
)
def test_a_token_that_cannot_be_fetched_is_a_reply_of_the_login_and_the_next_who_asks_tries_again(answer, words, cause):
    keeper = keeper_of(TokenEndpoint(answer, token_granted("t")))

    reply = asyncio.run(keeper.token(by_token()))

    assert (reply.stage, reply.words, reply.cause) == ("auth", words, cause)
    assert asyncio.run(keeper.token(by_token())) == "t"


@pytest.mark.parametrize(
    ("life", "kept_s"),
    [("3600", 3540), (3600, 3540), (30, 15), (0, 0), (-5, 0), (None, 3540), ("soon", 3540), ([], 3540),
     (10**400, 3540), (float("inf"), 86_340), (1e300, 86_340), (float("nan"), 0)],
    ids=lambda value: str(value)[:8],
)  # fmt: skip
def test_whatever_is_said_of_its_life_a_token_is_a_token_and_is_renewed_in_the_end(life, kept_s):
    clock = [0.0]
    endpoint = TokenEndpoint(*((200, {"access_token": token, "expires_in": life}) for token in ("t1", "t2")))
    keeper = keeper_of(endpoint, lambda: clock[0])

    tokens = []
    for clock[0] in (0, max(0, kept_s - 1), kept_s + 1):
        tokens.append(asyncio.run(keeper.token(by_token())))

    assert tokens == ["t1", "t1" if kept_s else "t2", "t2"]


@pytest.mark.parametrize(
    ("tokens", "status", "logins"),
    [
        ([LoginServer.secret], None, 1),
        (["revoked", LoginServer.secret], None, 2),  # a refused token is renewed once
        (["wrong"], ("400", "invalid_token"), 2),  # and the challenge says why
    ],
)
@pytest.mark.parametrize(
    ("offered", "auth", "method"),
    [
        ("PLAIN XOAUTH2 OAUTHBEARER", "auto", "XOAUTH2"),
        ("PLAIN OAUTHBEARER", "auto", "OAUTHBEARER"),
        ("PLAIN XOAUTH2 OAUTHBEARER", "oauthbearer", "OAUTHBEARER"),
    ],
)
def test_xoauth2_and_oauthbearer_log_in_with_the_token(offered, auth, method, tokens, status, logins):
    endpoint, server = TokenEndpoint(*map(token_granted, tokens)), LoginServer(offered)
    server.user = "mé" if method == "XOAUTH2" else "m=é,"

    reply = log_in_at(server, smtp_agent(post_form=endpoint), auth=auth, **OAUTH2)

    said = status and f"535 5.7.8 refused (status {status[method == 'OAUTHBEARER']})"
    assert (reply and reply.words) == said
    assert server.logins == [method] * logins
    assert len(endpoint.forms) == logins


@pytest.mark.parametrize("waiting", [True, False], ids=["one goes first", "all together"])
def test_connections_with_an_old_token_renew_it_once_and_who_waits_is_not_refused(waiting):
    endpoint = TokenEndpoint(token_granted("old"), token_granted(LoginServer.secret))
    server, first_is_open = LoginServer("XOAUTH2"), asyncio.Event()

    async def story(open_session):
        async def first():
            session = await open_session()
            first_is_open.set()
            return session

        options = {"may_log_in": first_is_open.wait} if waiting else {}
        others = [open_session(**options) for _ in range(7)]
        return [await session.quit() for session in await asyncio.gather(*others, first())]

    with_smtp_server(server, story, smtp_agent(post_form=endpoint), user=LoginServer.user, **OAUTH2)

    assert len(endpoint.forms) == 2
    assert len(server.logins) == 1 + 8 or not waiting


# ======================================================================
# SUBMISSION BY SMTP
# ======================================================================

DATED = "Date: Sat, 28 Nov 2026 12:00:00 +0000\r\n"


class Typist:
    """An SMTP client that says exactly what it is told to; its replies are lists of lines."""

    def __init__(self, port: int, *, greeting: str = "220", hello: bool = True) -> None:
        self.line = socket.create_connection(("127.0.0.1", port), 30)
        self.line.settimeout(30)
        self.file = self.line.makefile("rb")
        assert self.reply()[0].startswith(greeting)
        if hello:
            self.asked("EHLO client.test")

    def __enter__(self) -> Typist:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.file.close()
        self.line.close()

    def say(self, text: str | bytes) -> None:
        self.line.sendall(text.encode() if isinstance(text, str) else text)

    def reply(self) -> list[str]:
        lines: list[str] = []
        while not lines or lines[-1][3:4] == "-":
            lines.append(self.file.readline().decode().rstrip("\r\n"))
        return lines

    def asked(self, *commands: str) -> str:
        """The last line of the reply to the last of these commands, which are sent in one go."""
        self.say("".join(f"{command}\r\n" for command in commands))
        return [self.reply() for _ in commands][-1][-1]

    def asked_each(self, *commands: str) -> list[str]:
        return [self.asked(command)[:9] for command in commands]

    def begin(self, sender: str = "app@example.com", *recipients: str) -> None:
        """Up to the content of a mail."""
        to = [f"RCPT TO:<{recipient}>" for recipient in recipients or ("ok@example.com",)]
        assert self.asked(f"MAIL FROM:<{sender}>", *to, "DATA").startswith("354")

    def sent(self, content: str | bytes, *recipients: str, sender: str = "app@example.com") -> str:
        """The reply to a mail; the content as it goes onto the wire, but for the dot."""
        self.begin(sender, *recipients)
        self.say((content.encode() if isinstance(content, str) else content) + b".\r\n")
        return self.reply()[-1]

    def secure(self, ca: PrivateCA) -> None:
        self.line = ssl.create_default_context(cafile=ca.ca_file).wrap_socket(self.line, server_hostname="localhost")
        self.file = self.line.makefile("rb")

    def ended(self) -> bool:
        """Whether the server closed the connection; this side is closed then, too, for which the server waits."""
        with self.file, self.line:
            return self.file.read() == b""


def mail_of(subject: str, message_id: str = "", body: str = "Hello\r\n") -> str:
    """A small mail; with a Message-ID it is known when it comes again."""
    message_id = f"Message-ID: <{message_id}>\r\n" if message_id else ""
    return f"From: app@example.com\r\nSubject: {subject}\r\n{DATED}{message_id}\r\n{body}"


def smtp_port(daemon: Daemon) -> int:
    """Where it takes mail by SMTP since its last start."""
    return int(re.findall(r"submission by SMTP listens at=\S+:(\d+)", daemon.log)[-1])


@contextlib.contextmanager
def daemon_with_smtp(
    folder: Path, smtp: SmtpServer | Postfix | None, config: Mapping[str, Any] | None = None, **more: Any
) -> Iterator[tuple[Daemon, int]]:
    """A daemon that takes mail by SMTP, and where."""
    sections = {**(config or {}), "submission": {"listen": "127.0.0.1:0", **(config or {}).get("submission", {})}}
    with Daemon(folder, sections, smtp=smtp, **more) as daemon:
        yield daemon, smtp_port(daemon)


def id_in(reply: str) -> str:
    assert reply.startswith("250 2.0.0 "), reply
    return reply.split()[-1]


def test_mail_by_smtp_goes_out_byte_for_byte_with_the_envelope_as_given(tmp_path, smtp):
    content = (
        b"Received: from a by b\r\nX-Mailproxy-Priority: high\r\nMessage-Id:  <odd@example.com> \r\nSUBJECT:\tStrange \r\n"
        b"x-mailproxy-id: the\r\n one\r\nFrom: \xc3\xa9 <e@example.com>\r\n" + DATED.encode() + b"\r\n"
        b"..two dots\r\n.\r\n\tX-Mailproxy-Id: stays\r\nX-Mailproxy-Id: stays\r\n\xff\xfe 8 bit \r\n\r\n..\r\n"
    )
    with daemon_with_smtp(tmp_path, smtp) as (daemon, port), smtplib.SMTP("127.0.0.1", port) as client:
        refused = client.sendmail(
            "bounce+1@example.com", ["ok@example.com", "OK@example.com"], content, ["BODY=8BITMIME"]
        )
        record = daemon.wait_status("the one", "sent")
        (arrived,) = smtp.wait_for(1)

    assert refused == {}
    assert (record["priority"], record["message_id"]) == (1, "<odd@example.com>")
    assert (arrived.sender, arrived.recipients) == ("bounce+1@example.com", ["ok@example.com", "OK@example.com"])
    ours = b"X-Mailproxy-Priority: high\r\n", b"x-mailproxy-id: the\r\n one\r\n"
    assert arrived.content == functools.reduce(lambda text, field: text.replace(field, b""), ours, content)


EMPTY_FIELDS = "X-Mailproxy-Account:\r\nX-Mailproxy-Id: \r\nX-Mailproxy-Priority:\r\n"  # as good as none


def test_the_account_is_that_of_the_field_else_the_login_name_else_the_default(tmp_path, smtp):
    other = {"host": smtp.host, "port": smtp.port}
    config = {"account:billing": other, "account:news": other}
    with daemon_with_smtp(tmp_path, smtp, config, token="secret") as (daemon, port):
        found = []
        for login, field_ in [("news", "X-Mailproxy-Account: billing\r\n"), ("news", ""), ("someone", EMPTY_FIELDS)]:
            with Typist(port) as client:
                secret = base64.b64encode(f"\0{login}\0secret".encode()).decode()
                assert client.asked(f"AUTH PLAIN {secret}").startswith("235 2.7.0")
                id_ = id_in(client.sent(field_ + mail_of(login)))
                found.append(daemon.wait_status(id_, "sent")["account_id"])
        with Typist(port) as client:
            client.asked(f"AUTH PLAIN {secret}")
            refused = client.sent("X-Mailproxy-Account: nobody's\r\n" + mail_of("x"))

    assert found == ["billing", "news", "default"]
    assert refused == "554 5.6.0 account not found"


def test_mail_with_an_empty_sender_keeps_it(tmp_path, smtp):
    with daemon_with_smtp(tmp_path, smtp) as (daemon, port), Typist(port) as client:
        id_ = id_in(client.sent(mail_of("Undeliverable"), sender=""))
        daemon.wait_status(id_, "sent")
        (arrived,) = smtp.wait_for(1)
    assert arrived.sender in ("", "<>")


def test_a_mail_that_comes_again_is_one_copy_where_it_has_a_message_id(tmp_path, smtp):
    once, twice = mail_of("once", "1@example.com"), mail_of("twice")
    with daemon_with_smtp(tmp_path, smtp) as (daemon, port), Typist(port) as client:
        ids = [id_in(client.sent(mail)) for mail in (once, once, twice, twice)]
        daemon.wait_status(ids[0], "sent")
        ids += [id_in(client.sent(once)), id_in(client.sent(once, "other@example.com"))]
        for id_ in ids:
            daemon.wait_status(id_, "sent")

    assert len({*ids[:2], ids[4]}) == 1
    assert len(set(ids)) == 4
    assert sorted(arrived.message["Subject"] for arrived in smtp.received) == ["once", "once", "twice", "twice"]


SMUGGLED = "MAIL FROM:<evil@example.com>\r\nRCPT TO:<victim@example.com>\r\nDATA\r\nSubject: smuggled\r\n\r\nx\r\n.\r\n"


@pytest.mark.parametrize(
    "end", ["\n.\n", "\r.\r", "\n.\r\n", "\r\n.\n", "\r\n.\r", "\r.\r\n", "\r\n\0.\r\n", "\n\n.\r\n", "\r\r\n.\r\r\n"]
)
def test_only_crlf_dot_crlf_ends_a_mail_and_nothing_is_hidden_in_one(tmp_path, end):
    taken = []

    async def take(mail):
        taken.append(mail)
        return mailproxy.reply_to_submission("1", "a reason" if b"\0" in mail.content else None)

    with smtp_to(take) as port, Typist(port) as client:
        reply = client.sent(mail_of("first", body=f"text{end}{SMUGGLED[:-3]}"))
        assert reply.startswith("554 5.6.0 ")
        assert client.sent(mail_of("second")).startswith("250")
    assert [b"second" in mail.content for mail in taken][-1:] == [True]
    assert not any(mail.sender.startswith("evil") for mail in taken)


@contextlib.contextmanager
def smtp_to(take: Callable[[Any], Any], **more: Any) -> Iterator[int]:
    """The SMTP server of mailproxy with nothing behind it but this function; its port."""
    names = mailproxy.LocalNames(
        "example.com", "host.example.com", None, {"root": ("ops@example.com", "on@call.example")}
    )
    listening: concurrent.futures.Future[int] = concurrent.futures.Future()
    done = threading.Event()

    async def serve() -> None:
        server = mailproxy.SmtpServer(take, names, **more)
        listening.set_result((await server.start_tcp("127.0.0.1", 0, None))[0][1])
        await asyncio.to_thread(done.wait)
        await server.stop(1)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        serving = pool.submit(asyncio.run, serve())
        try:
            yield listening.result(10)
        finally:
            done.set()
            serving.result(20)


class Kept(list):
    """Takes every mail."""

    async def __call__(self, mail: Any) -> str:
        self.append(mail)
        return f"250 2.0.0 Ok: queued as {len(self)}"


def test_content_arrives_whole_however_it_is_cut_into_packets():
    """At every place, byte by byte, and far above what is kept in memory."""
    wire = b".\r\n..a\r\n...\r\n\r\n..\r\n.b\r\n" + b"".join(b"..%d\r\n" % n for n in range(30))
    content = re.sub(rb"(?m)^\.(?=.)", b"", wire[1:])

    async def main() -> list[Any]:
        kept = Kept()
        names = mailproxy.LocalNames("", "host", None, {})
        for cut in [[n] for n in range(len(wire) + 20)] + [list(range(400))]:
            said = (
                b"EHLO x\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\nDATA\r\n" + wire[1:] + b".\r\nQUIT\r\n"
            )
            begins = said.index(b"DATA")
            reader = asyncio.StreamReader()
            server = mailproxy.SmtpServer(kept, names, most_clients=mailproxy.SMTP_MEMORY_BYTES // 100)
            streams = SimpleNamespace(read=reader.read, write=lambda said: None, drain=lambda: asyncio.sleep(0))
            session = asyncio.create_task(mailproxy.SmtpSession(server, streams, streams).serve())
            for start, end in pairwise([0, *(begins + at for at in cut if begins + at < len(said)), len(said)]):
                reader.feed_data(said[start:end])
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            await session
        return kept

    kept = asyncio.run(main())
    assert {mail.content for mail in kept} == {content}
    assert len(kept) == len(wire) + 21


def test_commands_in_a_row_are_answered_in_order():
    kept = Kept()
    with smtp_to(kept) as port, Typist(port, hello=False) as client:
        client.say(f"EHLO x\r\nNOOP\r\n{SMUGGLED}{SMUGGLED}RSET\r\nQUIT\r\n")
        offers = client.reply()
        codes = [client.reply()[0][:3] for _ in range(11)]
        assert client.ended()

    assert [offer[4:].split()[0] for offer in offers[1:]] == [
        "PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "AUTH", "ENHANCEDSTATUSCODES",
    ]  # fmt: skip
    assert codes == ["250", *["250", "250", "354", "250"] * 2, "250", "221"]
    assert len(kept) == 2


ADDRESS_254 = f"{'a' * 64}@{'.'.join(['b' * 61] * 3)}.ccc"


@pytest.mark.parametrize(
    ("commands", "replies"),
    [
        (["DATA", "RCPT TO:<a@b.example>"], ["503 5.5.1", "503 5.5.1"]),
        (["MAIL FROM:<a@b.example>", "MAIL FROM:<a@b.example>", "DATA"], ["250 2.1.0", "503 5.5.1", "554 5.5.1"]),
        (["mail from: <a@b.example> size=5 body=8bitmime", "rcpt to: c@d.example", "data"], ["250 2.1.0", "250 2.1.5", "354 End w"]),
        (["MAIL FROM:<@x.example,@y.example:a@b.example> SMTPUTF8", "RCPT TO:<\"a>b\"@c.example>"], ["250 2.1.0", "250 2.1.5"]),
        (["MAIL FROM:<ü@bücher.example>", "RCPT TO:<ü@b.example>"], ["250 2.1.0", "250 2.1.5"]),
        ([f"MAIL FROM:<{ADDRESS_254}>", f"RCPT TO:<{ADDRESS_254}c>"], ["250 2.1.0", "501 5.1.3"]),
        (["MAIL FROM:a b", "MAIL FROM:<a@b", "MAIL TO:<a@b.example>", "MAIL"], ["555 5.5.4", *["501 5.5.4"] * 3]),
        (["MAIL FROM:<a@b.example> SIZE=99999999999999999999", "MAIL FROM:<> SIZE=x"], ["552 5.3.4", "555 5.5.4"]),
        (["MAIL FROM:<a@b.example> RET=HDRS", "MAIL FROM:<a@@b>", "MAIL FROM:<>"], ["555 5.5.4", "501 5.1.7", "250 2.1.0"]),
        (["MAIL FROM:<root>", "RCPT TO:<root>", "RCPT TO:<Postmaster>", "RCPT TO:<>"], ["250 2.1.0", "250 2.1.5", "250 2.1.5", "501 5.1.3"]),
        (["MAIL FROM:<a@b.example>", "RCPT TO:<c@d.example> NOTIFY=NEVER", "EHLO x", "DATA"], ["250 2.1.0", "555 5.5.4", "250 ENHAN", "503 5.5.1"]),
        (["VRFY root", "HELP", "EXPN x", "ETRN", "BDAT 3 LAST", ""], ["252 2.0.0", *["500 5.5.2"] * 5]),
        (["STARTTLS", "AUTH CRAM-MD5", "AUTH PLAIN %%", "AUTH PLAIN eA==", "AUTH PLAIN AGEAYg==", "AUTH PLAIN AGEAYg=="], ["503 5.5.1", "504 5.5.4", "501 5.5.2", "504 5.5.4", "235 2.7.0", "503 5.5.1"]),
        (["AUTH LOGIN", "YQ==", "Yg=="], ["334 VXNlc", "334 UGFzc", "235 2.7.0"]),
        (["AUTH LOGIN YQ==", "*", "AUTH PLAIN", "AGEAYg=="], ["334 UGFzc", "501 5.7.0", "334 ", "235 2.7.0"]),
        (["NOOP\0", "NOOP \r", "RSET"], ["500 5.5.2", "500 5.5.2", "250 2.0.0"]),
    ],
    ids=lambda given: given[0][:30] if given[0][:3].isalpha() else "",
)  # fmt: skip
def test_each_command_has_its_reply(commands, replies):
    with smtp_to(Kept()) as port, Typist(port) as client:
        assert client.asked_each(*commands) == replies


def test_bare_local_names_become_addresses_as_sendmail_has_them():
    kept = Kept()
    with smtp_to(kept) as port, Typist(port) as client:
        client.sent(mail_of("x"), "root", "Postmaster", "c@d.example", sender="cron")
    assert kept[0][:2] == (
        "cron@example.com",
        ["ops@example.com", "on@call.example", "Postmaster@example.com", "c@d.example"],
    )


def test_everything_is_bounded(tmp_path):
    kept, limit = Kept(), mailproxy.COMMAND_BYTES
    with smtp_to(kept, most_bytes=lambda: 5000, most_clients=3) as port:
        with Typist(port) as client:
            longest = "NOOP " + "x" * (limit - 7)
            assert client.asked_each(longest, longest + "x", "NOOP " + "x" * 99_999) == [
                "250 2.0.0",
                "500 5.5.2",
                "500 5.5.2",
            ]
            client.say(b"NOOP\nNOOP\r\n")
            assert [client.reply()[0][:3] for _ in range(2)] == ["500", "250"]
            secret = base64.b64encode(b"\0a\0" + b"b" * 9_201).decode()
            assert client.asked_each(f"AUTH PLAIN {secret}AAAA", f"AUTH PLAIN {secret}") == ["500 5.5.2", "235 2.7.0"]

            assert client.asked("MAIL FROM:<a@b.example> SIZE=5001").startswith("552 5.3.4")
            assert client.sent("x" * 6000 + "\r\n").startswith("552 5.3.4")
            assert client.sent(b"x" * 4998 + b"\r\n").startswith("250")

            client.asked("MAIL FROM:<a@b.example>")
            many = [f"RCPT TO:<{number}@d.example>" for number in range(1000)]
            assert client.asked(*many).startswith("250")
            assert client.asked("RCPT TO:<x@d.example>", "RCPT TO:<y@d.example>").startswith("452 4.5.3")
            assert client.asked("DATA").startswith("354")
            assert client.asked(".").startswith("250")
            assert len(kept[-1].recipients) == 1000

            with Typist(port), Typist(port), Typist(port, greeting="421", hello=False) as turned_away:
                assert turned_away.ended()

            assert {client.asked("WHAT")[:9] for _ in range(19)} == {"500 5.5.2"}
            assert client.asked("WHAT").startswith("421 4.7.0")
            assert client.ended()


@pytest.mark.parametrize(
    "said",
    [
        "GET / HTTP/1.1\r\nHost: 127.0.0.1:2525\r\n",
        "POST / HTTP/1.1\r\nHost: 127.0.0.1:2525\r\nContent-Length: 200\r\n\r\n",
        "\x16\x03\x01\x02\r\n",
    ],
)
def test_a_page_in_a_browser_cannot_submit(said):
    kept = Kept()
    with smtp_to(kept) as port, Typist(port, hello=False) as client:
        client.say(said + SMUGGLED)
        assert client.reply()[0].startswith("500 5.5.2")
        assert client.ended()
    assert not kept


def test_silent_and_slow_clients_are_ended_and_progress_is_enough(monkeypatch):
    kept = Kept()
    monkeypatch.setattr(mailproxy, "SMTP_IDLE_S", 1.2)
    with smtp_to(kept) as port, Typist(port) as silent, Typist(port) as within, Typist(port) as slow:
        within.begin()
        slow.begin()
        for _ in range(14):
            slow.say("0123456789\r\n")
            time.sleep(0.1)
        slow.say(".\r\n")
        assert slow.reply()[0].startswith("250")
        for client in (silent, within):
            assert client.reply()[0].startswith("421 4.4.2")
            assert client.ended()
    assert len(kept) == 1


def test_a_client_that_does_not_read_its_replies_holds_up_nobody(monkeypatch):
    monkeypatch.setattr(mailproxy, "SMTP_IDLE_S", 0.5)
    monkeypatch.setattr(mailproxy, "CLOSE_S", 0.3)
    with smtp_to(Kept()) as port, Typist(port) as deaf:
        deaf.line.settimeout(5)
        with contextlib.suppress(OSError):
            while True:
                deaf.say(b"EHLO x\r\n" * 10_000)
        with Typist(port) as client:
            assert client.asked("NOOP").startswith("250")


def test_a_session_that_has_ended_leaves_nothing_behind():
    with smtp_to(Kept()) as port:
        for end in ("QUIT\r\n", "", "DATA\r\n"):
            with Typist(port) as client:
                client.begin() if end == "DATA\r\n" else client.say(end)

        def left() -> list[Any]:
            gc.collect()
            return [found for found in gc.get_objects() if isinstance(found, mailproxy.SmtpSession)]

        wait_until(lambda: not left(), "the end of all sessions")


def test_a_token_is_the_password_and_login_comes_before_mail(tmp_path, smtp):
    with daemon_with_smtp(tmp_path, smtp, token="secret, other") as (daemon, port), Typist(port) as client:
        right, wrong = (base64.b64encode(f"\0me\0{word}".encode()).decode() for word in ("other", "secret, other"))
        commands = "MAIL FROM:<a@b.example>", f"AUTH PLAIN {wrong}", f"AUTH PLAIN {right}", "MAIL FROM:<a@b.example>"
        assert client.asked_each(*commands) == ["530 5.7.0", "535 5.7.8", "235 2.7.0", "250 2.1.0"]
        daemon.token = "other"
        assert b"\nmailproxy_auth_failures_total 1.0" in daemon.get("/metrics").content
        assert "SMTP login without a valid token peer=127.0.0.1" in daemon.log
        assert wrong not in daemon.log


@pytest.mark.parametrize("given", [{}, {"server__api_token": "secret"}, {"server__tls_cert": os.devnull}])
def test_a_listener_for_others_needs_a_token_and_a_certificate(tmp_path, given):
    with pytest.raises(mailproxy.ConfigurationError, match=r"\[submission\] listen: 0.0.0.0 can be reached"):
        loaded(tmp_path, submission__listen="0.0.0.0:0", **given)


@pytest.mark.parametrize("listen", ["2525", "127.0.0.1:", "::1:25", "localhost:70000", "[::1]:x", "a b:25"])
def test_where_to_listen_is_an_address_and_a_port(tmp_path, listen):
    with pytest.raises(mailproxy.ConfigurationError, match="is not an address and a port"):
        loaded(tmp_path, submission__listen=listen)


def test_starttls_comes_before_the_login_where_others_can_connect_and_clear_bytes_are_dropped(tmp_path, smtp, ca):
    certificate = ca.good()
    config = {"submission": {"listen": "0.0.0.0:0", "tls_cert": certificate.cert, "tls_key": certificate.key}}
    right = base64.b64encode(b"\0me\0secret").decode()
    with daemon_with_smtp(tmp_path, smtp, config, token="secret") as (daemon, port), Typist(port) as client:
        offers = "\n".join([client.say("EHLO x\r\n") or "", *client.reply()])
        assert "STARTTLS" in offers
        assert "AUTH" not in offers
        assert client.asked_each(f"AUTH PLAIN {right}", "MAIL FROM:<a@b.example>") == ["538 5.7.1", "530 5.7.0"]

        client.say("STARTTLS\r\nMAIL FROM:<evil@example.com>\r\n" + "NOOP\r\n" * 1_000)
        assert client.reply()[0].startswith("220")
        client.secure(ca)
        client.say("EHLO x\r\n")
        offers = "\n".join(client.reply())
        assert "STARTTLS" not in offers
        assert "AUTH PLAIN LOGIN" in offers
        assert client.asked_each("MAIL FROM:<a@b.example>", f"AUTH PLAIN {right}") == ["530 5.7.0", "235 2.7.0"]
        daemon.wait_status(id_in(client.sent(mail_of("safe"))), "sent")


def test_what_cannot_be_taken_is_refused_with_the_reason(tmp_path, smtp):
    refused = {
        "no header": "invalid raw: does not begin with the header",
        "Subject: x\r\n\r\n\0\r\n": "invalid raw: must not have NUL",
        "X-Mailproxy-Priority: urgent\r\n" + mail_of("x"): "invalid priority: must be 0 to 3",
        f"X-Mailproxy-Id: {'x' * 256}\r\n" + mail_of("x"): "invalid id: ",
    }
    with daemon_with_smtp(tmp_path, smtp) as (daemon, port), Typist(port) as client:
        for content, reason in refused.items():
            assert client.sent(content.removesuffix("\r\n") + "\r\n").startswith(f"554 5.6.0 {reason}")
        slow = "X-Mailproxy-Id: busy\r\n" + mail_of("slow")
        assert id_in(client.sent(slow, "slow@example.com")) == "busy"
        wait_until(lambda: smtp.visits["slow@example.com"], "the mail on the wire")
        assert client.sent(slow.replace("Hello", "other"), "slow@example.com").startswith("451 4.3.0 in delivery")
        daemon.wait_status("busy", "sent")
        assert client.sent(slow.replace("Hello", "other"), "slow@example.com") == "554 5.6.0 already sent"
        metrics = daemon.get("/metrics").content
    assert b'mailproxy_messages_accepted_total{account="default"} 1.0' in metrics
    assert b"mailproxy_messages_rejected_total 6.0" in metrics


def test_a_storage_that_refuses_is_452_and_the_session_goes_on(tmp_path, smtp):
    storage = FaultyStorage(tmp_path)
    with daemon_with_smtp(tmp_path, smtp, environment=storage.environment) as (daemon, port), Typist(port) as client:
        with storage.fails("full"):
            assert client.sent(mail_of("first", "1@example.com")).startswith("452 4.3.1 ")
            assert client.sent(mail_of("large", body="x" * 76 * 10 + "\r\n" * 500_000)).startswith("452 4.3.1 ")
        id_ = id_in(client.sent(mail_of("first", "1@example.com")))
        daemon.wait_status(id_, "sent")
    assert len(smtp.received) == 1


def test_what_was_answered_with_250_survives_kill_9(tmp_path, smtp):
    config = {"scheduler": {"active": False}}
    with daemon_with_smtp(tmp_path, smtp, config) as (daemon, port), Typist(port) as client:
        ids = [id_in(client.sent(mail_of(f"mail {number}"))) for number in range(5)]
        client.begin()
        daemon.kill()
        daemon.start()
        assert [record["id"] for record in daemon.get("/messages").json["messages"]] == ids


def test_at_sigterm_a_mail_that_is_coming_in_is_stored_and_all_others_are_told(tmp_path, smtp):
    config = {"scheduler": {"active": False}}
    with daemon_with_smtp(tmp_path, smtp, config) as (daemon, port), Typist(port) as idle, Typist(port) as busy:
        busy.begin()
        busy.say("Subject: first half\r\n")
        daemon.signal(signal.SIGTERM)
        assert idle.reply()[0].startswith("421 4.3.2")
        assert idle.ended()
        with pytest.raises(ConnectionRefusedError):
            Typist(port)
        busy.say("\r\nsecond half\r\n.\r\n")
        id_ = id_in(busy.reply()[0])
        assert busy.reply()[0].startswith("421 4.3.2")
        assert busy.ended()
        assert daemon.wait_for_exit() == 0
        daemon.start()
        assert [record["id"] for record in daemon.get("/messages").json["messages"]] == [id_]


def test_large_mail_from_many_connections_takes_little_memory(tmp_path, smtp):
    """Each is larger than all that may be in memory for its connection."""
    config = {"scheduler": {"active": False}, "submission": {"max_connections": 200}}
    line = b"x" * 76 + b"\r\n"
    with daemon_with_smtp(tmp_path, smtp, config) as (daemon, port), contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Typist(port)) for _ in range(20)]
        for client in clients:
            client.begin()
        for part in range(10):
            for client in clients:
                client.say((b"Subject: x\r\n\r\n" if not part else b"") + line * 5_000)
        for client in clients:
            client.say(b".\r\n")
        ids = [id_in(client.reply()[0]) for client in clients]
        peak_mib = int(re.findall(r"VmHWM:\s+(\d+)", Path(f"/proc/{daemon.process.pid}/status").read_text())[0]) / 1024
        answer = daemon.get(f"/message/{ids[-1]}?content=1").json
    assert len(base64.b64decode(answer["message"]["message"]["raw"])) == 14 + 50_000 * 78
    assert peak_mib < 130


# The mail libraries and programs that other people's software submits with. Each logs in under STARTTLS, with the token
# as its password, and sends a mail with its own name as subject, with a line of one dot, to two recipients.

PHPMAILER = """<?php
require '/usr/share/php/libphp-phpmailer/autoload.php';
$mail = new PHPMailer\\PHPMailer\\PHPMailer(true);
$mail->isSMTP();
[$mail->Host, $mail->Port, $mail->SMTPAuth, $mail->SMTPSecure] = ['localhost', getenv('PORT'), true, 'tls'];
[$mail->Username, $mail->Password, $mail->CharSet] = ['app', 'secret', 'utf-8'];
$mail->SMTPOptions = ['ssl' => ['cafile' => getenv('CA')]];
$mail->setFrom('app@example.com', 'Äpp');
$mail->addAddress('ok@example.com', 'Zoë');
$mail->addBCC('ok+bcc@example.com');
$mail->Subject = 'PHPMailer';
$mail->Body = "One line\\r\\n.\\r\\nünd another\\r\\n";
$mail->send();
"""
SYMFONY = """<?php
require '/usr/share/php/Symfony/Component/Mailer/autoload.php';
$stream = ['ssl' => ['cafile' => getenv('CA')]];
$transport = new Symfony\\Component\\Mailer\\Transport\\Smtp\\EsmtpTransport('localhost', (int) getenv('PORT'));
$transport->setUsername('app')->setPassword('secret')->getStream()->setStreamOptions($stream);
$mail = (new Symfony\\Component\\Mime\\Email())->from('Äpp <app@example.com>')->to('Zoë <ok@example.com>');
$mail->bcc('ok+bcc@example.com')->subject('Symfony')->text("One line\\n.\\nünd another\\n");
(new Symfony\\Component\\Mailer\\Mailer($transport))->send($mail);
"""
NODEMAILER = """
const transport = require('nodemailer').createTransport({
  host: 'localhost', port: process.env.PORT, pool: true, maxConnections: 3, requireTLS: true,
  auth: {user: 'app', pass: 'secret'}, tls: {ca: require('fs').readFileSync(process.env.CA)},
});
const mail = {from: 'Äpp <app@example.com>', to: 'Zoë <ok@example.com>', bcc: 'ok+bcc@example.com',
  text: 'One line\\n.\\nünd another\\n', subject: 'nodemailer'};
Promise.all(Array.from({length: 20}, () => transport.sendMail(mail))).then(() => transport.close());
"""
UTF_8 = "Content-Type: text/plain; charset=utf-8\r\nContent-Transfer-Encoding: 8bit\r\n"
LETTER = f"From: app@example.com\r\nSubject: {{}}\r\n{DATED}{UTF_8}\r\nOne line\r\n.\r\nünd another\r\n"


CLIENTS = {
    "swaks": (
        "swaks --server localhost --port $PORT --tls --tls-verify --tls-ca-path $CA --auth LOGIN --auth-user app"
        " --auth-password secret --from app@example.com --to ok@example.com,ok+bcc@example.com --data @swaks.eml"
    ),
    "msmtp": (
        "msmtp --host=localhost --port=$PORT --tls=on --tls-trust-file=$CA --auth=plain --user=app"
        " --passwordeval='echo secret' --from=app@example.com ok@example.com ok+bcc@example.com <msmtp.eml"
    ),
    "curl": (
        "curl -sS --ssl-reqd --cacert $CA --user app:secret --url smtp://localhost:$PORT --mail-from app@example.com"
        " --mail-rcpt ok@example.com --mail-rcpt ok+bcc@example.com --upload-file curl.eml"
    ),
    "PHPMailer": "php PHPMailer",
    "Symfony": "php Symfony",
    "nodemailer": "node nodemailer",
}


@pytest.mark.parametrize("name", CLIENTS)
def test_mail_libraries_and_programs_submit(tmp_path, smtp, ca, name, request):
    command, certificate = CLIENTS[name], ca.good()
    needs(command.split()[0])
    scripts = {"PHPMailer": PHPMAILER, "Symfony": SYMFONY, "nodemailer": NODEMAILER}
    (tmp_path / name).write_text(scripts.get(name, ""))
    (tmp_path / f"{name}.eml").write_text(LETTER.format(name), newline="")
    modules = request.getfixturevalue("node_modules") if name == "nodemailer" else ""
    config = {"submission": {"tls_cert": certificate.cert, "tls_key": certificate.key}}
    with daemon_with_smtp(tmp_path, smtp, config, token="secret") as (daemon, port):
        environment = {
            **os.environ,
            "PORT": str(port),
            "CA": str(ca.ca_file),
            "NODE_PATH": str(modules),
            "HOME": str(tmp_path),
        }
        ended = subprocess.run(
            ["sh", "-c", command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert ended.returncode == 0, (ended.stdout, ended.stderr, daemon.log)
        mails = smtp.wait_for(20 if name == "nodemailer" else 1)

    for arrived in mails:
        assert (arrived.sender, arrived.recipients) == ("app@example.com", ["ok@example.com", "ok+bcc@example.com"])
        assert arrived.message["Subject"] == name
        assert arrived.message["Bcc"] is None
        assert arrived.message.get_content().replace("\r\n", "\n").strip() == "One line\n.\nünd another"


def test_a_postfix_relays_through_it(tmp_path, smtp, ca):
    """Its bounces, with an empty sender, too."""
    Postfix.needed()
    with daemon_with_smtp(tmp_path, smtp) as (daemon, port), Postfix(certificate=ca.good(), relay_to=port) as postfix:
        with smtplib.SMTP(postfix.host, postfix.port) as client:
            client.sendmail("", ["ok@example.com"], mail_of("a bounce"))
            client.sendmail("app@example.com", [f"ok+{n}@example.com" for n in range(100)], mail_of("to many"))
            for number in range(20):
                client.sendmail("app@example.com", ["ok@example.com"], mail_of(f"mail {number}"))
        arrived = smtp.wait_for(23)  # it parts mail to more than 50
        wait_until(lambda: daemon.status()["pending"] == 0, "the end of all mail")
    assert {mail.message["Subject"] for mail in arrived} == {"a bounce", "to many", *(f"mail {n}" for n in range(20))}
    assert sum(len(mail.recipients) for mail in arrived) == 121


# --- sendmail -bs --------------------------------------------------------


def spoken(folder: Path, *mails: str, stdin: bytes | None = None, **settings: str) -> list[str]:
    """The replies to these mails on the standard output of sendmail -bs; their lines may end with LF."""
    said = "".join(f"MAIL FROM:<app@example.com>\nRCPT TO:<ok@example.com>\nDATA\n{mail}.\n" for mail in mails)
    given = stdin or f"EHLO x\n{said}QUIT\n".encode()
    environment = {"MAILPROXY_CONFIG": str(folder / "config.ini"), **settings}
    ended = run_command("sendmail", "-bs", folder=folder, stdin=given, environment=environment)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def test_sendmail_bs_speaks_smtp_and_takes_lf_and_crlf(tmp_path, smtp):
    with daemon_with_smtp(tmp_path, smtp, {"server": {"port": free_port()}}) as (daemon, _):
        lf = mail_of("lf", "1@example.com", "..\n.a\n").replace("\r\n", "\n")
        replies = spoken(tmp_path, lf, mail_of("crlf"), lf, mail_of("lost\rin it"))
        verdicts = [reply[:9] for reply in replies if reply[:9] in ("250 2.0.0", "554 5.6.0", "221 2.0.0")]
        assert verdicts == [*["250 2.0.0"] * 3, "554 5.6.0", "221 2.0.0"]
        for reply in replies:
            if "queued as" in reply:
                daemon.wait_status(id_in(reply), "sent")
        smtp.wait_for(2)
    contents = {received.message["Subject"]: received.content for received in smtp.received}
    assert contents == {"lf": mail_of("lf", "1@example.com", ".\r\na\r\n").encode(), "crlf": contents["crlf"]}
    assert contents["crlf"].startswith(mail_of("crlf").partition("\r\n\r\n")[0].encode())


def test_sendmail_bs_without_a_daemon_keeps_mail_in_the_spool_or_says_later(tmp_path, smtp):
    """Also where standard input is a file."""
    (tmp_path / "spool").mkdir()
    config = {"server": {"port": free_port()}, "sendmail": {"spool": tmp_path / "spool"}}
    with daemon_with_smtp(tmp_path, smtp, config) as (daemon, _):
        daemon.stop()
        assert any(reply.startswith("250 2.0.0 Ok: queued as") for reply in spoken(tmp_path, mail_of("kept")))
        daemon.start()
        smtp.wait_for(1)
        daemon.stop()
        daemon.config["sendmail"].clear()
        daemon.write_config()
        (reply,) = [reply for reply in spoken(tmp_path, mail_of("later")) if reply[0] == "4"]
        assert reply.startswith("451 4.3.0 cannot reach http://127.0.0.1:")
        daemon.start()
    assert [received.message["Subject"] for received in smtp.received] == ["kept"]


def test_symfonys_default_transport_is_sendmail_bs(tmp_path, smtp):
    needs("php")
    wrapper = tmp_path / "sendmail"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {STARTER} sendmail "$@"\n')
    wrapper.chmod(0o755)
    transport = (
        "Symfony\\Component\\Mailer\\Transport::fromDsn('sendmail://default?command='.urlencode('./sendmail -bs'))"
    )
    script = re.sub(
        r"(?s)\$stream =.*?;\n\$transport = .*?;\n\$transport->.*?;",
        f"$transport = {transport};".replace("\\", r"\\"),
        SYMFONY,
    )
    (tmp_path / "script.php").write_text(script)
    with daemon_with_smtp(tmp_path, smtp, {"server": {"port": free_port()}}):
        environment = {**_plain_environment(), "MAILPROXY_CONFIG": str(tmp_path / "config.ini")}
        ended = subprocess.run(["php", "script.php"], cwd=tmp_path, env=environment, capture_output=True, timeout=60)
        assert ended.returncode == 0, ended
        (arrived,) = smtp.wait_for(1)
    assert arrived.recipients == ["ok@example.com", "ok+bcc@example.com"]
    assert arrived.message.get_content().replace("\r\n", "\n").strip() == "One line\n.\nünd another"


# ======================================================================
# HTTP SERVER
# ======================================================================

TOKEN_HEADER = "X-API-Token: secret\r\n"
HOST_AND_TOKEN = b"Host: x\r\n" + TOKEN_HEADER.encode()
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class HttpService:
    """A server of a few routes on a loopback port, with what it observed and logged."""

    def __init__(self, **limits):
        self.observed, self.failures, self.clients = [], [], []
        self.threads = self.finished = 0
        self.started, self.release = asyncio.Event(), asyncio.Event()
        self.server = mailproxy.HttpServer(
            self.routes(),
            limits=mailproxy.ServerSettings(**limits),
            admit=lambda request, is_public: mailproxy.ensure(
                is_public or request.headers.get("x-api-token") == "secret", 401, "Invalid or missing API token"
            ),
            observe=lambda request, status, seconds: self.observed.append((request.route, request.method, status)),
            in_thread=self.in_thread,
            log_failure=lambda request, error: self.failures.append((request.id, error)),
        )

    def routes(self):
        message = self.telling(lambda request: {**request.parameters, "length": len(request.body)})
        handlers = {
            "GET /health": self.telling(lambda request: {"status": "ok"}),
            "POST /echo": self.echo,
            "POST /length": self.telling(lambda request: {"length": len(request.body)}),
            "GET /query": self.telling(lambda request: {"query": request.query}),
            "GET /message/{id}": message,
            "DELETE /message/{id}": message,
            "POST /account/{id}/suspend": message,
            "GET /bug": self.raising(RuntimeError("the password is hunter2")),
            "GET /no": self.raising(mailproxy.HttpError(409, "no", headers={"Retry-After": "5"}, rejected=[1])),
            "GET /stream": self.streaming(b"[1", b",2", b"]"),
            "GET /broken-stream": self.streaming(b"[1", OSError("disk gone")),
            "GET /broken-at-once": self.streaming(OSError("disk gone")),
            "GET /endless": self.streaming(*[b"x" * 65_536] * 10_000),
            "GET /large": self.large,
            "POST /slow": self.slow,
        }
        public = "GET /health"
        return [mailproxy.Route(*row.split(), handler, public=row == public) for row, handler in handlers.items()]

    async def in_thread(self, work):
        self.threads += 1
        return await asyncio.to_thread(work)

    async def echo(self, request):
        return mailproxy.json_response({"ok": True, "got": await request.json_object()})

    def telling(self, content):
        async def handler(request):
            return mailproxy.json_response({"ok": True, **content(request)})

        return handler

    def raising(self, error):
        async def handler(request):
            raise error

        return handler

    def streaming(self, *pieces):
        async def sent():
            try:
                for piece in pieces:
                    if isinstance(piece, Exception):
                        raise piece
                    yield piece
            finally:
                self.finished += 1

        async def handler(request):
            return mailproxy.Response(body=sent())

        return handler

    async def large(self, request):
        return mailproxy.Response(body=b"x" * 30_000_000)

    async def slow(self, request):
        self.started.set()
        await self.release.wait()
        self.finished += 1
        return mailproxy.json_response({"ok": True})

    async def connect(self, port=None, tls=None):
        """A client, which the end of the story closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port or self.port, ssl=tls)
        self.clients.append(writer)
        return reader, writer

    async def answers_to(self, sent, *, bytewise=False):
        """All that comes back on one connection until the server ends it, or the client who half-closes it."""
        reader, writer = await self.connect()
        for piece in map(bytes, zip(sent, strict=True)) if bytewise else [sent]:
            writer.write(piece)
            await asyncio.sleep(0)
        writer.write_eof()
        return await reader.read(-1)

    async def answer_to(self, sent, **how):
        """The first of them, with all that follows as its content."""
        head, _, content = (await self.answers_to(sent, **how)).partition(b"\r\n\r\n")
        return http_answer(head, content)


def http_answer(head, content=b""):
    status_line, *lines = head.decode().removesuffix("\r\n\r\n").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return HttpAnswer(int(status_line.split()[1]), headers, content)


async def read_http_answer(reader):
    """One answer with a Content-Length."""
    answer = http_answer(await reader.readuntil(b"\r\n\r\n"))
    answer = answer._replace(content=await reader.readexactly(int(answer.headers.get("content-length", 0))))
    if answer.content.startswith(b'{"ok": false'):
        others = {400: ("bad_json", "bad_field"), 503: ("busy",)}.get(answer.status, ())
        assert answer.json["code"] in (mailproxy.PROBLEMS[answer.status], *others)
    return answer


def http_request(method="POST", path="/echo", headers="", body=b""):
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{TOKEN_HEADER}{length}{headers}\r\n".encode() + body


async def http_until(condition):
    """Waits for a condition; the story's own timeout bounds it."""
    while not condition():
        await asyncio.sleep(0.005)


def with_http_service(story, **limits):
    """Runs a story against a started service, which may take thirty seconds and leaves nothing behind."""

    async def told():
        loop_errors = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
        service = HttpService(**limits)
        ((_, service.port),) = await service.server.start_tcp("127.0.0.1", 0, None)
        try:
            async with asyncio.timeout(30):
                await story(service)
        finally:
            for writer in service.clients:
                writer.close()
            await service.server.stop(0)
        assert not asyncio.all_tasks() - {asyncio.current_task()}
        assert not loop_errors

    asyncio.run(told())


def served(**limits):
    """Makes a test of the story of a started service."""

    def test_of(story):
        def test(**given):
            with_http_service(functools.partial(story, **given), **limits)

        signature = inspect.signature(story)
        test.__name__, test.__doc__ = story.__name__, story.__doc__
        test.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
        return test

    return test_of


@served()
async def test_a_request_is_answered_with_json_and_the_connection_stays_also_when_it_comes_byte_by_byte(service):
    reader, writer = await service.connect()

    for _ in range(3):
        writer.write(HEALTH)
        answer = await read_http_answer(reader)

        assert (answer.status, answer.json) == (200, {"ok": True, "status": "ok"})
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert "connection" not in answer.headers
    assert service.observed == [("/health", "GET", 200)] * 3
    bytewise = await service.answer_to(b"\r\n" + http_request(body=b'{"a": 1}'), bytewise=True)
    assert bytewise.json["got"] == {"a": 1}


REFUSED_LINES = {
    400: [
        *(b"GET  /health HTTP/1.1", b"GET\t/health HTTP/1.1", b"GET /health HTTP/1.1 ", b"G@T /health HTTP/1.1"),
        *(b"GET /health http/1.1", b"GET /health HTTP/1.10"),
        *(b"OPTIONS * HTTP/1.1", b"CONNECT x:80 HTTP/1.1", b"GET ftp://x/health HTTP/1.1", b"GET health HTTP/1.1"),
        *(b"GET /health#a HTTP/1.1", b"GET /h\xc3\xa9 HTTP/1.1"),
        *(b"GET /message/%00 HTTP/1.1", b"GET /message/%4 HTTP/1.1", b"GET /message/%zz HTTP/1.1"),
        *(b"GET /message/%ff HTTP/1.1", b"GET /message/%c0%ae HTTP/1.1"),  # no UTF-8, and an overlong dot
        *(b"GET /query?a=%00 HTTP/1.1", b"GET /query?a=%ff HTTP/1.1", b"GET /query?a=%x HTTP/1.1"),
    ],
    505: [b"GET /health HTTP/2.0", b"GET /health HTTP/3.0"],
}
REFUSED_FIELDS = {
    400: [
        *(b"", b"Host: x\r\nHost: x\r\n", b"Host:\r\nHost:\r\n", b"Host: x y\r\n"),  # one Host that can be one
        *(b"Host: x\r\nA: b\n", b"Host: x\rA: b\r\n"),
        *(b"Host: x\r\nA: b\0c\r\n", b"Host: x\r\nA: \x1b[0m\r\n"),
        *(
            b"Host : x\r\n",
            b"Host\t: x\r\n",
            b" Host: x\r\n",
            b"Host: x\r\nA: b\r\n c\r\n",
            b"Host: x\r\nA: b\r\n\tc\r\n",
        ),
        *(b"Host: x\r\nnonsense\r\n", b"Host: x\r\n: b\r\n", b"Host: x\r\nA(b): c\r\n", b"Host: x\r\nA\xe9: c\r\n"),
    ],
    431: [b"Host: x\r\n" + b"A: b\r\n" * 100, b"Host: x\r\nA: " + b"b" * 33_000 + b"\r\n"],
}
REFUSED_STARTS = {
    400: [
        *(b"GET /health\r\n\r\n", b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),  # the last: TLS
        *(b"GET /health HTTP/1.1\nHost: x\n\n", b"GET /health HTTP/1.1\r\nHos"),
        b"POST /length HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    431: [b"GET /" + b"a" * 40_000, b"GET /health HTTP/1.1\r\nA: " + b"a" * 40_000],
    505: [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
}


@pytest.mark.parametrize(
    ("before", "table", "behind"),
    [
        (b"", REFUSED_LINES, b"\r\n" + HOST_AND_TOKEN + b"\r\n"),
        (b"GET /health HTTP/1.1\r\n", REFUSED_FIELDS, b"\r\n"),
        (b"", REFUSED_STARTS, b""),
    ],
    ids=["line", "fields", "start"],
)
@served()
async def test_a_head_that_is_not_strictly_right_is_refused_however_it_comes(service, before, table, behind):
    for status, part in ((status, part) for status, parts in table.items() for part in parts):
        head = before + part + behind
        for bytewise in (False, True)[: 1 + (len(head) < 200)]:
            answer = await service.answer_to(head, bytewise=bytewise)

            assert (answer.status, answer.json["ok"]) == (status, False), part[:80]
            assert answer.json["error"]
            assert len(answer.headers["x-request-id"]) == 16
    assert not service.failures


AMBIGUOUS = {
    400: [
        *(b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked\r\nContent-Length: 5"),
        *(b"Content-Length: 5\r\nContent-Length: 6", b"Content-Length: 5\r\nContent-Length: 5"),
        *(b"Content-Length: 5, 5", b"Content-Length: +5", b"Content-Length: -5", b"Content-Length: 0x5"),
        *(b"Content-Length: 1_0", b"Content-Length: \xb2", b"Content-Length: 5.0", b"Content-Length:"),
        *(b"Transfer-Encoding: \x0bchunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding:\r\n chunked"),
    ],
    413: [b"Content-Length: " + b"9" * 30, b"Content-Length: " + b"9" * 5000],
    501: [
        *(b"Transfer-Encoding: xchunked", b"Transfer-Encoding: identity", b"Transfer-Encoding: gzip, chunked"),
        *(b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", b"Transfer-Encoding: chunked, identity"),
        *(b'Transfer-Encoding: "chunked"', b"Transfer-Encoding:"),
    ],
}


@served()
async def test_a_body_whose_end_is_in_doubt_is_refused_and_nothing_behind_it_is_read_as_a_request(service):
    for status, fields in ((status, fields) for status, rows in AMBIGUOUS.items() for fields in rows):
        head = b"POST /length HTTP/1.1\r\n" + HOST_AND_TOKEN + fields + b"\r\n\r\n"
        answer = await service.answer_to(head + b"0\r\n\r\n" + HEALTH)

        assert (answer.status, answer.headers["connection"]) == (status, "close"), fields[:80]
        assert b"HTTP/1.1 " not in answer.content


CHUNKED_HEAD = b"POST /length HTTP/1.1\r\n" + HOST_AND_TOKEN + b"Transfer-Encoding: Chunked\r\n\r\n"


@served()
async def test_a_chunked_body_is_put_together_and_the_next_request_follows(service):
    reader, writer = await service.connect()
    for body, length in [
        *((b"5\r\nhello\r\n0\r\n\r\n", 5), (b"5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n", 6), (b"0\r\n\r\n", 0)),
        *((b"A\r\n0123456789\r\n0\r\n\r\n", 10), (b"0005\r\nhello\r\n000\r\n\r\n", 5)),
        *((b'5;a=b;c="d"\r\nhello\r\n0;x\r\n\r\n', 5), (b"5\r\nhello\r\n0\r\nA: b\r\nContent-Length: 7\r\n\r\n", 5)),
        (b"1\r\nx\r\n" * 5000 + b"0\r\n\r\n", 5000),
    ]:
        writer.write(CHUNKED_HEAD + body + HEALTH)

        assert (await read_http_answer(reader)).json == {"ok": True, "length": length}
        assert (await read_http_answer(reader)).json["status"] == "ok"


BAD_CHUNKS = {
    400: [
        *(b"+5\r\nhello\r\n0\r\n\r\n", b"-5\r\nhello\r\n0\r\n\r\n", b"0x5\r\nhello\r\n0\r\n\r\n"),
        *(b"0_5\r\nhello\r\n0\r\n\r\n", b" 5\r\nhello\r\n0\r\n\r\n", b"5 \r\nhello\r\n0\r\n\r\n"),
        *(b"g\r\nhello\r\n0\r\n\r\n", b"\r\nhello\r\n0\r\n\r\n", b"1" * 17 + b"\r\nhello\r\n0\r\n\r\n"),
        *(b"4\r\nhello\r\n0\r\n\r\n", b"6\r\nhello\r\n0\r\n\r\n"),
        *(b"5\nhello\r\n0\r\n\r\n", b"5\r\nhello\n0\r\n\r\n", b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
        b"5;" + b"a" * 70_000 + b"\r\nhello\r\n0\r\n\r\n",
        *(b"0\r\nno trailer\r\n\r\n", b"0\r\nA: b\r\n c\r\n\r\n"),
        *(b"5\r\nhel", b"5\r\nhello\r\n"),
    ],
    431: [b"0\r\n" + b"A: bcdefgh\r\n" * 5000],
}


@served()
async def test_a_malformed_chunked_body_is_refused_and_ends_the_connection(service):
    for status, body in ((status, body) for status, rows in BAD_CHUNKS.items() for body in rows):
        answer = await service.answer_to(CHUNKED_HEAD + body + HEALTH * body.endswith(b"0\r\n\r\n"))

        assert answer.status == status, body[:80]
        assert b"HTTP/1.1 " not in answer.content


@served()
async def test_a_path_or_method_that_is_not_there_is_404_or_405_or_without_a_token_401(service):
    allowed = dict.fromkeys(("PUT /health", "OPTIONS /health"), "GET, HEAD")
    allowed |= {"TRACE /echo": "POST", "BREW /message/1": "DELETE, GET, HEAD"}
    missing = ["/nowhere", "//health", "/health/", "/message/", "/message/../health", "/./health", "/message/a/b"]
    heads = [*allowed, *(f"GET {path}" for path in missing), "POST /account/a%2Fsuspend"]
    for head in heads:
        answer = await service.answer_to(f"{head} HTTP/1.1\r\nHost: x\r\n{TOKEN_HEADER}\r\n".encode() + HEALTH)

        assert (answer.status, answer.headers.get("allow")) == (405 if head in allowed else 404, allowed.get(head))
        assert answer.content.count(b"HTTP/1.1 200") == 1, head

    for head in ("GET /nowhere", "POST /health", "GET /echo", "GET /message/1", "BREW /", "POST /echo"):
        answer = await service.answer_to(f"{head} HTTP/1.1\r\nHost: x\r\n\r\n".encode())

        assert answer.status == 401, head
        assert answer.json == {"ok": False, "error": "Invalid or missing API token", "code": "unauthorized"}


@served()
async def test_a_path_is_decoded_segment_by_segment_and_a_query_has_all_that_it_gives(service):
    paths = [
        *(("/message/a", "a"), ("/message/a%2Fb", "a/b"), ("/message/%2e%2e", ".."), ("/message/..", "..")),
        *(("/message/a%20b+c", "a b+c"), ("/message/%C3%A9%E2%82%AC", "é€"), ("/message/a%252Fb", "a%2Fb")),
        *(("http://other.example/message/a", "a"), ("HTTPS://other.example:1/message/a?x=y", "a")),
        ("/m%65ssage/a", "a"),
    ]
    queries = [
        *(
            ("", {}),
            ("?", {}),
            ("?a=1&b=2", {"a": ["1"], "b": ["2"]}),
            ("?a=1&a=2", {"a": ["1", "2"]}),
            ("?a", {"a": [""]}),
        ),
        *(("?a=b=c&&", {"a": ["b=c"]}), ("?a+b=c%2Bd+e", {"a b": ["c+d e"]}), ("?a=/?:@", {"a": ["/?:@"]})),
        ("?%C3%A9=%E2%82%AC", {"é": ["€"]}),
    ]
    for path, id_ in paths:
        assert (await service.answer_to(http_request("GET", path))).json["id"] == id_
    for query, fields in queries:
        assert (await service.answer_to(http_request("GET", f"/query{query}"))).json["query"] == fields
    assert {route for route, _, _ in service.observed} == {"/message/{id}", "/query"}


@served()
async def test_a_body_that_is_or_may_be_json_is_read_as_json_and_any_other_is_415(service):
    read = ["", *("Content-Type: application/json\r\n", "Content-Type: Application/JSON; charset=utf-8\r\n")]
    read += ["Content-Type: application/problem+json\r\n", "Content-Encoding: identity\r\n"]
    read += ["Content-Type: application/x-www-form-urlencoded\r\n"]
    other = ["Content-Type: text/plain\r\n", "Content-Type: multipart/form-data\r\n", "Content-Encoding: gzip\r\n"]
    for header in (*read, *other):
        for content, got in (('{"a": "é"}', {"a": "é"}), ('\ufeff{"a": 1}', {"a": 1})):
            answer = await service.answer_to(http_request(headers=header, body=content.encode()))
            assert (answer.status, answer.json.get("got")) == ((200, got) if header in read else (415, None)), header
        assert (await service.answer_to(http_request(headers=header))).json["got"] == {}


BAD_JSON = {
    "not JSON": [b"{nonsense", b"  ", b"{} {}", b"{}\xef\xbb\xbf", b'{"a": "\x01"}'],
    "not a JSON object": [b"[]", b"null"],
    "not JSON: 'utf-8' codec can't decode byte 0xe9 in position 7": [b'{"a": "\xe9"}'],
    "codec can't decode byte 0xff in position 0": ["{}".encode("utf-16")],
    "position 7": [b'{"a": "\xed\xa0\x80"}'],
    "NaN": [b'{"a": NaN}'],
    "-Infinity": [b'{"a": -Infinity}'],
    "out of range": [b'{"a": 1e999}'],
    "Exceeds the limit (4300 digits)": [b'{"a": ' + b"9" * 5000 + b"}"],
    "nested deeper than 64": [
        *(b'{"a": ' + b"[" * 100_000, b'{"a":' * 70 + b"1" + b"}" * 70, b'{"a":[1,' * 40 + b"1" + b"]}" * 40)
    ],
    "'a' twice": [b'{"a": 1, "b": 2, "a": 3}'],
    "'id' twice": [b'{"m": [{"id": 1, "id": 2}]}'],
    "m contains half a surrogate pair (\\ud800)": [b'{"m": [1, {"subject": "a\\ud800b"}]}'],
    "a contains half a surrogate pair (\\udc00)": [b'{"a": "\\uDC00"}'],
    "a contains half a surrogate pair (\\ud800)": [b'{"a": {"\\ud800": 1}}'],
}


@served()
async def test_json_that_is_not_strictly_right_is_400_and_says_why(service):
    for words, body in ((words, body) for words, bodies in BAD_JSON.items() for body in bodies):
        answer = await service.answer_to(http_request(body=body))

        assert (answer.status, answer.json["code"]) == (400, "bad_json"), body[:80]
        assert words in answer.json["error"]
    pair_64_deep = b'{"m":' * 63 + b'{"a": "\\ud83d\\ude00"}' + b"}" * 63
    got = (await service.answer_to(http_request(body=pair_64_deep))).json["got"]
    assert functools.reduce(operator.getitem, ["m"] * 63, got) == {"a": "😀"}
    for size, threads in ((200_000, 0), (300_000, 1)):  # the large one is parsed on a thread
        answer = await service.answer_to(http_request(body=json.dumps({"a": "x" * size}).encode()))
        assert (answer.json["got"], service.threads) == ({"a": "x" * size}, threads)
    assert not service.failures
    assert mailproxy.json_response({"a": "\udc80é"}).body == b'{"a": "\\udc80\xc3\xa9"}\n'


LONG = mailproxy.STEP_BYTES


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        {"a": ["x" * LONG * 3], "b": "y" * 9000, "c": ""},
        {"a": '\\"/\n' * LONG, "b": {"c": '"' * 9000}},
        {"a": "aé日😀" * LONG},
        {"n" * 9000: "v" * 9000},
        {"messages": [{"subject": "\ud83d", "body": "short"}]},  # half a pair there is left to who judges messages
        {"messages": [{"subject": "\ud83d", "body": "x" * mailproxy.LONG_STRING_BYTES * 2}]},
    ],
    ids=["base64", "escapes", "octets", "name", "half a pair", "half a pair beside a long text"],
)
def test_long_strings_of_a_large_body_are_read_as_any_other(content, ensure_ascii):
    if ensure_ascii or "messages" not in content:
        body = json.dumps(content, ensure_ascii=ensure_ascii).encode()
        assert mailproxy.parse_large_json_object(body, "messages") == content


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (b"\\ud800", "a contains half a surrogate pair"),
        (b"\\x", r"Invalid \\escape"),
        (b"\n", "Invalid control character"),
        (b'" "', "delimiter"),
        (b"\xff", "codec can't decode"),
    ],
)
def test_what_is_wrong_in_a_long_string_is_told_as_in_any_other(wrong, words):
    body = b'{"a": "' + b"x" * LONG + wrong + b"x" * LONG + b'"}'

    with pytest.raises(mailproxy.HttpError, match=words) as of_large:
        mailproxy.parse_large_json_object(body)
    with pytest.raises(mailproxy.HttpError) as of_any:
        mailproxy.parse_json_object(body)

    assert str(of_large.value) == str(of_any.value)


def test_json_of_very_many_values_is_413_before_it_takes_the_memory_and_marks_within_texts_are_none():
    many = mailproxy.JSON_VALUES + 1
    for values in (b"[]," * many, b"{}," * many, b'"",' * many, b'"\\"",' * 2 * many):
        for before, behind in ((b"", b""), (b'"",', b',""')):
            with pytest.raises(mailproxy.HttpError, match="more than 2000000 values") as refused:
                mailproxy.parse_large_json_object(b'{"a": [' + before + values + b"0" + behind + b"]}")
            assert refused.value.status == 413

    texts = {"a": [',"' * many, ",:" * many]}
    assert mailproxy.parse_large_json_object(json.dumps(texts).encode()) == texts


@served()
async def test_the_clients_own_request_id_comes_back_when_it_is_a_decent_one_also_of_a_refused_request(service):
    for sent_id in ("abc-123", "x" * 128, "!~", "x" * 129, "a b", "é", ""):
        sent = HEALTH.replace(b"\r\n\r\n", f"\r\nX-Request-Id: {sent_id}\r\n\r\n".encode())
        returned = (await service.answer_to(sent)).headers["x-request-id"]

        assert (returned == sent_id) is (sent_id in ("abc-123", "x" * 128, "!~"))
        assert re.fullmatch(r"[!-~]{1,128}", returned)
    for sent in [
        b"GET /health HTTP/2.0\r\nX-Request-Id: mine\r\n\r\n",
        b"GET /health HTTP/1.1\r\nbad line\r\nX-Request-Id: mine\r\n\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: x\r\nx-request-id:mine\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX-Request-Id: mine\r\nA: " + b"b" * 40_000,
        b"GET /health HTTP/1.1\r\nX-Request-Id: mine\r\nHost: x\n",
        http_request("GET", "/bug", "X-Request-Id: mine\r\n"),
    ]:
        assert (await service.answer_to(sent)).headers["x-request-id"] == "mine"


@served()
async def test_a_long_row_of_requests_is_answered_in_order_and_leaves_the_loop_to_others(service):
    requests = [http_request(body=b'{"n": %d}' % number) for number in range(2000)]
    reader, writer = await service.connect()
    turns = 0

    async def answers():
        return [(await read_http_answer(reader)).json["got"]["n"] for _ in requests]

    writer.write(b"".join(requests))
    reading = asyncio.create_task(answers())
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1

    assert reading.result() == list(range(2000))
    assert turns > 1500


@served()
async def test_the_connection_goes_on_or_ends_as_the_client_wishes(service):
    for sent, connection in [
        (b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "keep-alive"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "close"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: TE, Close\r\n\r\n", "close"),
        (b"GET /health HTTP/1.0\r\n\r\n", "close"),
    ]:
        reader, writer = await service.connect()
        writer.write(sent)

        assert (await read_http_answer(reader)).headers["connection"] == connection
        if connection == "close":
            assert await reader.read() == b""
            await http_until(lambda: len(service.server._connections) == 1)  # that which is kept


@served()
async def test_head_is_answered_as_get_without_the_body_and_a_body_that_means_nothing_is_dropped(service):
    get = await service.answer_to(HEALTH)
    head = await service.answer_to(HEALTH.replace(b"GET", b"HEAD"))
    missing = await service.answer_to(b"HEAD /nowhere HTTP/1.1\r\nHost: x\r\n\r\n")

    assert (head.status, head.headers["content-length"], head.content) == (200, str(len(get.content)), b"")
    assert (missing.status, missing.content) == (401, b"")
    for method in ("GET", "DELETE", "HEAD"):
        answers = await service.answers_to(http_request(method, "/message/1", body=b"x" * 100_000) + HEALTH)
        assert answers.count(b"HTTP/1.1 200") == 2, method
        assert b'"length": 100000' not in answers


@served()
async def test_a_body_that_anybody_may_send_with_a_get_is_not_kept_in_memory(service):
    piece = b"x" * 50_000
    for fields, sent in (
        (b"Content-Length: 20000000", [piece] * 400),
        (b"Transfer-Encoding: chunked", [*[b"c350\r\n" + piece + b"\r\n"] * 400, b"0\r\n\r\n"]),
    ):
        reader, writer = await service.connect()
        tracemalloc.start()
        try:
            for part in (b"GET /health HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n\r\n", *sent):
                writer.write(part)
                await writer.drain()
            answer = await read_http_answer(reader)
            most_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

        assert answer.status == 200
        assert most_bytes < 2_000_000


CHUNKED = b"Transfer-Encoding: chunked\r\n"


@served()
async def test_a_stream_is_sent_in_chunks_and_one_that_fails_is_seen_to_be_cut(service):
    for line, head_has, body, goes_on in [
        ("GET /stream HTTP/1.1", CHUNKED, b"2\r\n[1\r\n2\r\n,2\r\n1\r\n]\r\n0\r\n\r\n", True),
        ("HEAD /stream HTTP/1.1", CHUNKED, b"", True),
        ("GET /stream HTTP/1.0", b"Connection: close\r\n", b"[1,2]", False),
        ("GET /broken-stream HTTP/1.1", CHUNKED, b"2\r\n[1\r\n", False),
        ("GET /broken-at-once HTTP/1.1", b"HTTP/1.1 500 ", None, True),
    ]:
        sent = f"{line}\r\nHost: x\r\n{TOKEN_HEADER}Connection: keep-alive\r\n\r\n".encode()
        head, _, rest = (await service.answers_to(sent + HEALTH)).partition(b"\r\n\r\n")

        assert head_has in head + b"\r\n", line
        assert (CHUNKED in head + b"\r\n") == (head_has == CHUNKED)
        assert rest.count(b"HTTP/1.1 200") == goes_on
        assert body is None or rest.partition(b"HTTP/1.1 200")[0] == body
        assert [str(error) for _, error in service.failures] == ["disk gone"] * ("broken" in line)
        service.failures.clear()


@served()
async def test_a_handler_says_no_in_its_own_words_and_one_that_fails_is_a_500_that_tells_nothing(service):
    no = await service.answer_to(http_request("GET", "/no"))
    assert (no.status, no.headers["retry-after"]) == (409, "5")
    assert no.json == {"ok": False, "error": "no", "code": "conflict", "rejected": [1]}
    assert not service.failures

    reader, writer = await service.connect()
    writer.write(http_request("GET", "/bug") + HEALTH)
    bug, after = await read_http_answer(reader), await read_http_answer(reader)
    ((request_id, error),) = service.failures
    assert (bug.status, after.status) == (500, 200)
    assert bug.json["error"].startswith("internal error")
    assert b"hunter2" not in bug.content
    assert request_id == bug.headers["x-request-id"]
    assert error.__traceback__


@served()
async def test_100_continue_is_sent_before_a_body_that_is_welcome_and_before_no_other(service):
    reader, writer = await service.connect()
    writer.write(http_request(headers="Expect: 100-continue\r\nContent-Length: 2\r\n"))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(b"{}")
    assert (await read_http_answer(reader)).status == 200

    for path, token, length, status in [
        ("/echo", "", 2, 401),
        ("/nowhere", TOKEN_HEADER, 2, 404),
        ("/echo", TOKEN_HEADER, 2**40, 413),
    ]:
        reader, writer = await service.connect()
        fields = f"Host: x\r\n{token}Expect: 100-continue\r\nContent-Length: {length}\r\n"
        writer.write(f"POST {path} HTTP/1.1\r\n{fields}\r\n".encode())
        answer = await read_http_answer(reader)

        assert (answer.status, answer.headers["connection"]) == (status, "close")


@served(max_body_bytes=1_000_000)
async def test_a_body_of_the_limit_is_taken_and_who_is_still_sending_32_mib_sees_the_refusal(service):
    def sent_whole_by_a_client_that_reads_only_afterwards(head):
        with socket.create_connection(("127.0.0.1", service.port), timeout=25) as client:
            for piece in (head.encode(), *[b"x" * 65_536] * 512):
                client.sendall(piece)
            return b"".join(iter(lambda: client.recv(65_536), b""))

    for size, status in ((1_000_000, 200), (1_000_001, 413)):
        assert (await service.answer_to(http_request("POST", "/length", body=b"x" * size))).status == status
    for path, fields, status in [
        ("/echo", f"{TOKEN_HEADER}Content-Length: 33554432\r\n\r\n", 413),
        ("/echo", "Content-Length: 33554432\r\n\r\n", 401),
        ("/nowhere", f"{TOKEN_HEADER}Content-Length: 33554432\r\n\r\n", 404),
        ("/echo", f"{TOKEN_HEADER}Transfer-Encoding: chunked\r\n\r\n2000000\r\n", 413),
    ]:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\n{fields}"
        answer = await asyncio.to_thread(sent_whole_by_a_client_that_reads_only_afterwards, head)
        assert answer.startswith(b"HTTP/1.1 %d " % status)


@served(head_timeout_seconds=0.2)
async def test_a_head_that_does_not_come_in_time_is_408(service):
    reader, writer = await service.connect()

    answering = asyncio.create_task(read_http_answer(reader))
    writer.write(b"GET /")
    while not answering.done():  # it moves, but never ends
        writer.write(b"a")
        await asyncio.sleep(0.01)

    answer = answering.result()
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert answer.headers["x-request-id"]


@served(body_timeout_seconds=0.6)
async def test_a_body_without_progress_is_408_and_one_that_moves_is_not(service):
    reader, writer = await service.connect()
    writer.write(http_request("POST", "/length", headers="Content-Length: 20\r\n"))

    for _ in range(20):
        writer.write(b"x")
        await asyncio.sleep(0.04)
    moving = await read_http_answer(reader)
    writer.write(http_request("POST", "/length", headers="Content-Length: 20\r\n") + b"x")
    stuck = await read_http_answer(reader)

    assert (moving.status, stuck.status) == (200, 408)


@served(head_timeout_seconds=0.5, idle_timeout_seconds=0.5, body_timeout_seconds=0.5)
async def test_a_connection_on_which_nothing_is_asked_is_closed_without_a_word_and_a_slow_handler_is_not_ended(service):
    busy, writer = await service.connect()
    writer.write(http_request("POST", "/slow"))
    await service.started.wait()
    never_asked, _ = await service.connect()
    asked_once, writer = await service.connect()
    writer.write(HEALTH)
    await read_http_answer(asked_once)

    assert await never_asked.read() == b""
    assert await asked_once.read() == b""
    service.release.set()
    assert (await read_http_answer(busy)).status == 200


@served(body_timeout_seconds=0.6)
async def test_a_client_that_reads_one_large_answer_slowly_is_not_cut_off_and_one_that_does_not_read_is(service):
    _, stuck = await service.connect()
    stuck.transport.pause_reading()
    stuck.write(http_request("GET", "/endless"))
    reader, writer = await service.connect()
    writer.write(http_request("GET", "/large"))

    assert b"Content-Length: 30000000" in await reader.readuntil(b"\r\n\r\n")
    for _ in range(30):
        await reader.readexactly(1_000_000)
        await asyncio.sleep(0.03)

    await http_until(lambda: service.finished == 1)
    await http_until(lambda: len(service.observed) == 2)
    assert not service.failures
    stuck.transport.abort()


@served()
async def test_a_client_that_goes_away_does_not_stop_the_handler_and_a_broken_upload_leaves_nothing_behind(service):
    _, writer = await service.connect()
    writer.write(http_request("POST", "/slow"))
    await service.started.wait()
    (connection,) = service.server._connections.values()
    writer.transport.abort()
    await http_until(connection.reader.at_eof)
    service.release.set()
    await http_until(lambda: service.finished == 1)
    await http_until(lambda: not service.server._connections)
    service.observed.clear()

    for _ in range(20):
        _, writer = await service.connect()
        writer.write(http_request("POST", "/length", headers="Content-Length: 100000\r\n") + b"x" * 10_000)
        await writer.drain()
        writer.transport.abort()
    await http_until(lambda: not service.server._connections)
    assert not service.failures
    assert all(status == 400 for _, _, status in service.observed)


@served(max_connections=2)
async def test_one_connection_too_many_is_turned_away_with_503(service):
    first, second = await service.connect(), await service.connect()
    for reader, writer in (first, second):
        writer.write(HEALTH)
        assert (await read_http_answer(reader)).status == 200

    reader, writer = await service.connect()
    writer.write(HEALTH)
    answer = await read_http_answer(reader)
    assert (answer.status, answer.headers["connection"]) == (503, "close")
    assert answer.headers["x-request-id"]
    writer.write_eof()  # else it waits a while for what the client may still send
    assert await reader.read() == b""

    first[1].close()
    await http_until(lambda: len(service.server._connections) < 2)
    assert (await service.answer_to(HEALTH)).status == 200


@served()
async def test_stopping_closes_idle_connections_at_once_and_answers_requests_in_progress(service):
    idle, writer = await service.connect()
    writer.write(HEALTH)
    await read_http_answer(idle)
    busy, writer = await service.connect()
    writer.write(http_request("POST", "/slow") + HEALTH)
    await service.started.wait()
    sending, sender = await service.connect()
    sender.write(http_request("POST", "/length", headers="Content-Length: 2\r\n") + b"x")
    await http_until(lambda: [each._idle_at for each in service.server._connections.values()].count(math.inf) == 2)

    stopping = asyncio.create_task(service.server.stop(20))
    assert await idle.read() == b""
    with pytest.raises(ConnectionRefusedError):
        await service.connect()
    assert not stopping.done()
    sender.write(b"x")
    service.release.set()

    for reader, its_writer in ((sending, sender), (busy, writer)):
        answer = await read_http_answer(reader)
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert await reader.read() == b""
        its_writer.close()
    await stopping


@served()
async def test_stopping_cuts_what_is_not_done_within_the_grace(service):
    reader, writer = await service.connect()
    writer.write(http_request("POST", "/slow"))
    await service.started.wait()
    await service.server.stop(0.1)

    assert (await reader.read(), service.finished) == (b"", 0)


@served()
async def test_a_unix_socket_has_its_mode_replaces_that_of_a_dead_process_and_goes_with_the_server(service, tmp_path):
    path = str(tmp_path / "api.sock")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    (tmp_path / "file").write_text("precious")

    async def status():
        reader, writer = await asyncio.open_unix_connection(path)
        service.clients.append(writer)
        writer.write(HEALTH)
        return (await read_http_answer(reader)).status

    await service.server.start_unix(path, 0o660)
    assert (stat.S_IMODE(os.stat(path).st_mode), await status()) == (0o660, 200)
    second = HttpService()
    with pytest.raises(OSError, match="another process listens there") as refused:
        await second.server.start_unix(path)
    assert refused.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError, match="already in use"):
        await second.server.start_unix(str(tmp_path / "file"))
    await second.server.stop(0)
    assert await status() == 200

    await service.server.stop(1)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "precious")]


@served(max_body_bytes=1000)
async def test_tls_serves_keeps_the_connection_streams_and_shows_a_413_to_a_client_that_is_still_sending(service, ca):
    ((_, port),) = await service.server.start_tcp("127.0.0.1", 0, ca.good().server_context())
    reader, writer = await service.connect(port, ssl.create_default_context(cafile=ca.ca_file))

    writer.write(HEALTH + http_request("GET", "/stream"))
    assert (await read_http_answer(reader)).status == 200
    await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.write(http_request("POST", "/echo", headers="Content-Length: 10000000\r\n"))
    for _ in range(100):
        writer.write(b"x" * 100_000)
        await writer.drain()
    assert (await read_http_answer(reader)).status == 413


@served(max_connections=3)
async def test_clients_that_do_not_finish_the_tls_handshake_are_counted_and_cut_off_and_too_many_hung_up_on(
    service, ca
):
    ((_, port),) = await service.server.start_tcp("127.0.0.1", 0, ca.good().server_context())

    silent = [await service.connect(port) for _ in range(3 + mailproxy.TURNED_AWAY)]
    await http_until(lambda: len(service.server._connections) == len(silent))
    reader, _ = await service.connect(port)
    with contextlib.suppress(ConnectionResetError):
        assert await reader.read() == b""
    assert not any(reader.at_eof() for reader, _ in silent)

    for writer in service.clients:
        writer.close()
    await http_until(lambda: not service.server._connections)
    service.server.limits = service.server.limits._replace(head_timeout_seconds=0.2)
    reader, writer = await service.connect(port)
    writer.write(b"\x16")
    assert await reader.read() == b""


HTTP_WORDS = [
    *(b"GET ", b"POST ", b"/health", b"/echo", b" HTTP/1.1", b"\r\n", b"\r\n\r\n", b"Host: x\r\n"),
    *(TOKEN_HEADER.encode(), b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    *(b"3\r\nabc\r\n", b"{}", b"Expect: 100-continue\r\n", b"%", b"?a=b", b"\r", b"\n", b": "),
]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(HTTP_WORDS)), max_size=20).map(b"".join))
def test_no_bytes_at_all_lead_to_a_500_a_hung_connection_or_a_leaked_task(sent):
    async def story(service):
        answers = await service.answers_to(sent)

        assert b"HTTP/1.1 500" not in answers
        assert not service.failures
        if sent and sent.strip(b"\r\n"):
            assert answers.startswith(b"HTTP/1.1 ")

    with_http_service(story)


def test_judging_a_hostile_head_takes_no_noticeable_time_and_what_it_holds_is_not_in_the_repr():
    for text in (
        "a:" * 20_000 + "\0",
        "a" * 30_000 + "\0",
        "a: " + " " * 30_000 + "\0",
        "a:b\r\n" * 6000 + "\0",
        ":" * 30_000,
    ):
        request = mailproxy.Request(
            "GET", "", "unmatched", {}, {}, {"x-api-token": "hunter2"}, b"hunter2", "", "unix", None
        )
        begun = time.thread_time()

        with pytest.raises(mailproxy.HttpError):
            request.read_head(b"GET / HTTP/1.1\r\nHost: x\r\n" + text.encode())

        assert time.thread_time() - begun < 0.5
        assert "hunter2" not in repr(request)


# ======================================================================
# CONSOLE
# ======================================================================
#
# One Chromium for all tests of a process; each begins with a new tab's empty storage.


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser, driven by selenium; its window is 1280 by 900."""
    needs("chromium", "chromedriver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = found("chromium")
    profile = tmp_path_factory.mktemp("chromium")
    for word in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", f"user-data-dir={profile}"):
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="session")
def axe(node_modules: Path) -> str:
    """The script that finds what keeps people out (axe-core)."""
    return (node_modules / "axe-core/axe.min.js").read_text()


class Browser:
    """What a person does with the page of a daemon: keys, and reading."""

    def __init__(self, driver: Any, daemon: Daemon) -> None:
        self.driver, self.daemon = driver, daemon
        self.media(light="light", width=1280, height=900)
        driver.get("about:blank")
        driver.get_log("browser"), driver.get_log("performance")
        self.url = f"http://127.0.0.1:{daemon.port}/"
        driver.get(self.url)

    def media(self, *, light: str, width: int, height: int) -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        scheme = {"name": "prefers-color-scheme", "value": light}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def js(self, script: str, *words: Any) -> Any:
        return self.driver.execute_script(f"return {script}", *words)

    def text(self, selector: str = "body") -> str:
        """What is seen there, on one line."""
        shown = "(one => one?.checkVisibility() ? one.innerText : '')(document.querySelector(arguments[0]))"
        return " ".join(str(self.js(shown, selector)).split())  # innerText is there of what is hidden, too

    def sees(self, words: str, selector: str = "body") -> None:
        there = functools.partial(self.text, selector)
        wait_until(lambda: words in there(), lambda: f"{words!r} in {there()[:2000]!r}", 10, 0.05)

    def focus(self) -> tuple[str, str]:
        """Role and accessible name of what has the keyboard."""
        element = self.driver.switch_to.active_element
        return element.aria_role, element.accessible_name

    def keys(self, *words: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*words).perform()

    def tab_to(self, name: str) -> None:
        """Go to a control by the tabulator key only."""
        for _ in range(40):
            if self.driver.switch_to.active_element.accessible_name == name:
                return
            self.keys(TAB * max(1, self.js(HOW_FAR, name)))
        pytest.fail(f"no control named {name!r}")

    def press(self, name: str) -> None:
        self.tab_to(name)
        self.keys(ENTER)

    def ids(self) -> list[str]:
        return list(self.js("[...document.querySelectorAll('#messages li')].map(row => row.dataset.key)"))

    def faults(self) -> list[str]:
        """What the page complained of, and its policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[dict[str, Any]]:
        """What it has asked for since, from the daemon and elsewhere."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        return [one["request"] for one in sent if not one["request"]["url"].startswith(("about:", "data:", "chrome"))]


ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"
HOW_FAR = """(name => {  // a guess, to press the key as often at once
    const all = (document.querySelector("dialog[open]") ?? document).querySelectorAll("a, button, input, select");
    const shown = [...all].filter(one => !one.disabled && one.checkVisibility()), here = document.activeElement;
    const called = one => (one.ariaLabel || one.labels?.[0]?.textContent || one.textContent).trim();
    const first = shown.findIndex(one => here == document.body || here.compareDocumentPosition(one) & 4);
    return shown.slice(first).findIndex(one => called(one) == name) + 1;
})(arguments[0])"""


def test_the_page_is_one_answer_without_data_that_admits_only_its_own_script(daemon: Daemon) -> None:
    page = daemon.get("/")

    policy = page.headers["Content-Security-Policy"]
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert len(page.content) <= 40_000
    loaded_or_active = rb"(src|href|action)=(?!.data:)|<[^>]+ on\w+=|https?://(?!www.w3.org/2000/svg)|innerHTML|cookie"
    assert not re.search(loaded_or_active, page.content)
    for word in ("default-src", "base-uri", "form-action", "frame-ancestors"):
        assert f"{word} 'none'" in policy
    for tag in (b"script", b"style"):
        (text,) = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page.content, re.DOTALL)
        assert f"{tag.decode()}-src 'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'" in policy
    assert "unsafe" not in policy
    assert daemon.request("HEAD", "/").status == 200


def test_the_console_asks_for_the_token_and_keeps_it_for_the_tab_only(chromium: Any, tmp_path: Path) -> None:
    with Daemon(tmp_path, {"smtp": NOWHERE, "scheduler": {"active": "false"}}, token="s3cret") as daemon:
        daemon.submit(mail("private"))
        browser = Browser(chromium, daemon)
        browser.sees("The daemon asks for its token")
        assert browser.focus()[1] == "Token"
        assert "private" not in browser.driver.page_source
        browser.keys("wrong", ENTER)
        browser.sees("not one of the daemon's")
        browser.keys(" s3cret\u200b\u2026", ENTER)  # as it was copied out of a page
        browser.sees("private", "#messages")

        browser.driver.refresh()
        browser.sees("private", "#messages")
        assert browser.js("[document.cookie, localStorage.length, location.href]") == ["", 0, browser.url]
        assert browser.js("Object.entries(sessionStorage)") == [["token", "s3cret"]]
        browser.js("sessionStorage.clear()")
        assert {request["url"].split("?")[0] for request in browser.requests()} <= {
            f"{browser.url}{path}" for path in ("", "status", "messages")
        }


def test_the_queue_is_steered_by_the_keyboard_and_the_page_follows_without_a_reload(
    chromium: Any, tmp_path: Path, smtp: SmtpServer
) -> None:
    accounts = {"account:acc1": {"host": smtp.host, "port": smtp.port}}
    with Daemon(tmp_path, {**accounts, "delivery": {"retry_delays": "1000"}}, smtp=smtp) as daemon:
        browser = Browser(chromium, daemon)
        browser.sees("No message yet: submit one", "#empty")
        browser.press("Suspend")
        browser.sees("Delivery is suspended", "#delivery")
        assert daemon.status()["active"] is False
        assert browser.focus() == ("button", "Suspend")

        daemon.submit(mail("first", to="ann@example.net", subject="Hello"), mail("gone", to="perm@example.com"))
        daemon.submit(mail("second", to="bob@example.net", account_id="acc1", subject="Grüße <b>"))
        browser.sees("3", "#waiting")
        browser.sees("Grüße <b>", "#messages")
        browser.press("Suspend acc1")
        browser.sees("suspended by hand", "#accounts")
        browser.press("Activate acc1")
        wait_until(lambda: daemon.status()["accounts"]["acc1"]["state"] != "suspended", "its activation")

        browser.press("Hello")
        browser.sees("None yet: it waits for its turn", "#attempts")
        browser.keys(ESCAPE)
        wait_until(lambda: browser.focus() == ("link", "Hello"), lambda: f"the place, not {browser.focus()}")
        daemon.submit(mail("newest", deferred_ts=FAR, subject="On top"))
        browser.sees("On top", "#messages")
        assert browser.focus() == ("link", "Hello")
        assert browser.ids() == ["newest", "second", "gone", "first"]

        browser.js("document.getElementById('run').focus()")
        browser.press("Activate")
        browser.press("Run now")
        browser.sees("550 5.1.1 No such user here", "#messages")
        browser.sees("1", "#failed")
        browser.sees("4 accepted, 2 sent, 0 deferred, 1 failed", "#chart-text")
        assert browser.js("document.getElementById('chart').role") == "img"
        assert browser.faults() == []


def test_a_message_is_looked_at_retried_and_deleted_by_the_keyboard(
    chromium: Any, tmp_path: Path, smtp: SmtpServer
) -> None:
    evil = "<script>document.title = 'evil'</script><img src=//127.0.0.1:1/x onerror=alert(1)><b>bold</b>"
    with Daemon(tmp_path, {"scheduler": {"active": "true"}}, smtp=smtp) as daemon:
        daemon.submit(mail("a/b <i>", to="perm1@example.com", subject=evil, body=None, html=evil, text="The text"))
        wait_until(lambda: told(daemon)["failed"] == 1, "its failure")
        browser = Browser(chromium, daemon)
        browser.sees("No such user here", "#messages")
        browser.press(evil)
        browser.sees("error rcpt 550 5.1.1 No such user here", "#attempts")
        assert browser.js("[...document.querySelectorAll('#content pre')].map(one => one.textContent)") == [
            "The text",
            evil,
        ]
        assert browser.js("document.querySelectorAll('#detail img, #detail script, #detail b').length") == 0
        exact = browser.js("document.querySelector('#attempts time').title")
        assert str(datetime.datetime.now(datetime.UTC).year) in exact
        browser.press("Show as it goes on the wire")
        browser.sees("To: perm1@example.com", "#eml")

        daemon.post("/commands/suspend")
        browser.js("document.getElementById('h-detail').focus()")
        browser.press("Retry")
        browser.sees("is queued anew", "#said")
        wait_until(lambda: told(daemon)["failed"] == 0, "its new life")
        browser.sees("queued", "#fields")

        browser.js("document.getElementById('h-detail').focus()")
        browser.press("Delete")
        browser.sees("Delete the message a/b <i>?", "dialog[open]")
        assert browser.focus()[1] == "Cancel"
        browser.keys(ESCAPE)
        wait_until(lambda: browser.text("dialog[open]") == "", "the dialog's end")
        assert daemon.message("a/b <i>")["status"] == "queued"
        assert browser.focus() == ("button", "Delete")
        browser.keys(ENTER)
        browser.sees("Delete the message", "dialog[open]")
        browser.press("Delete")
        browser.sees("No message yet", "#empty")
        assert daemon.get("/messages").json["messages"] == []
        wait_until(lambda: browser.js("document.title") == "mailproxy", lambda: browser.js("document.title"))
        assert [fault for fault in browser.faults() if "status of 404" not in fault] == []
        assert {urllib.parse.urlsplit(request["url"]).netloc for request in browser.requests()} == {
            f"127.0.0.1:{daemon.port}"
        }


def test_messages_are_found_and_paged_by_cursor_and_lists_are_not_asked_for_while_nothing_happens(
    chromium: Any, quiet: Daemon
) -> None:
    quiet.post("/account", {"id": "acc1", **NOWHERE})
    others = [mail(f"m-{i}", to=f"r{i}@example.com", subject=f"Number {i}.", deferred_ts=FAR) for i in range(60)]
    quiet.submit(*others, mail("wanted", to="Ann@example.net", account_id="acc1", subject="The bill"))
    browser = Browser(chromium, quiet)
    browser.sees("The bill", "#messages")
    browser.press("Older")
    wait_until(lambda: browser.ids() == [f"m-{i}" for i in range(35, 10, -1)], "the second page")
    browser.keys(ENTER)
    wait_until(lambda: browser.ids() == [f"m-{i}" for i in range(10, -1, -1)], "the last page")
    for name, typed in (
        ("Recipient", "ann@example.net"),
        ("Subject", "BILL"),
        ("Account", "acc1"),
        ("State", "queued"),
    ):
        browser.js("document.getElementById('search').reset()")
        wait_until(lambda: len(browser.ids()) == 25, "all of them")
        browser.js("document.getElementById('h-messages').focus()")
        browser.tab_to(name)
        browser.keys(typed, ENTER)
        wait_until(lambda: browser.ids() == ["wanted"], "what this finds")
    browser.js("document.querySelector('[name=since]').value = '2100-01-01T00:00'")
    browser.press("Search")
    browser.sees("No message is like that", "#empty")
    browser.requests()
    time.sleep(2.3)  # what does not happen has no condition to wait for
    asked = [request["url"] for request in browser.requests()]
    assert (f"{browser.url}status" in asked, sum("/messages" in url for url in asked) <= 1) == (True, True)

    browser.press("Clear")
    browser.tab_to("Recipient")
    browser.keys("ann", ENTER)
    browser.sees("to: must be a mail address", "#said")
    wait_until(lambda: len(browser.ids()) == 25, "all of them")


@pytest.mark.parametrize("light", ["light", "dark"])
def test_a_phone_shows_all_of_it_and_axe_finds_nothing_serious(
    chromium: Any, daemon: Daemon, smtp: SmtpServer, axe: str, light: str
) -> None:
    def refusal(verb: str, *_: Any) -> str | None:
        return f"550 5.1.1 No such user: https://x.test/{'u' * 200}" if verb == "RCPT" else None

    smtp.rule = refusal
    daemon.post("/account", {"id": "a" * 255, **NOWHERE})
    daemon.submit(mail("m" * 255, to=f"perm.{'long' * 14}@example.com", subject="W" * 200))
    daemon.submit(mail("m-2", to="perm@example.com"))
    wait_until(lambda: told(daemon)["pending"] == 0, "outcomes")
    browser = Browser(chromium, daemon)
    browser.media(light=light, width=375, height=700)
    browser.sees("No such user", "#messages")
    browser.press("W" * 200)
    browser.sees("No such user", "#attempts")
    browser.press("Delete")
    browser.sees("Delete the message", "dialog[open]")

    assert browser.js("document.documentElement.scrollWidth") == 375
    browser.keys(ESCAPE)
    browser.driver.execute_script(axe)
    found_by_axe = browser.driver.execute_async_script("axe.run().then(arguments[0])")["violations"]
    assert [
        (one["id"], one["nodes"][0]["html"]) for one in found_by_axe if one["impact"] in ("serious", "critical")
    ] == []


def test_the_page_is_one_request_and_usable_at_once(chromium: Any, quiet: Daemon) -> None:
    browser = Browser(chromium, quiet)
    browser.sees("Delivery is suspended", "#delivery")

    def times() -> dict[str, Any]:
        return dict(browser.js("performance.getEntriesByType('navigation')[0].toJSON()"))

    def is_quick() -> bool:
        browser.driver.refresh()
        return bool(0 < times()["domContentLoadedEventEnd"] < 1000)

    assert times()["decodedBodySize"] <= 40_000
    wait_until(is_quick, "a second without other work for the machine")
    assert {urllib.parse.urlsplit(one["url"]).path for one in browser.requests()} <= {"/", "/status", "/messages"}


def test_a_page_of_another_port_or_by_a_name_that_points_here_does_and_reads_nothing(
    chromium: Any, quiet: Daemon
) -> None:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    quiet.submit(mail("precious"))
    with serving(Page) as port:
        chromium.get(f"http://127.0.0.1:{port}/")
        attack = """const [url, done] = arguments; const tried = [];
            const read = options => fetch(url + "status", options).then(answer => answer.text()).catch(() => "refused");
            const form = {method: "POST", mode: "no-cors", body: '{"ids": ["precious"]}'};
            Promise.all([read({}), read({mode: "no-cors"}), fetch(url + "commands/delete-messages", form),
                fetch(url + "commands/activate", {method: "POST", mode: "no-cors"})]).then(all => done(all.slice(0, 2)))"""
        assert chromium.execute_async_script(attack, f"http://127.0.0.1:{quiet.port}/") == ["refused", ""]
    assert (quiet.status()["active"], listed(quiet)) == (False, ["precious"])
    assert quiet.request("GET", "/", headers={"Host": f"evil.example.co:{quiet.port}"}).status == 403


# ======================================================================
# DISPATCHER
# ======================================================================


FRIENDLY = {
    "GREETING": "220 moody.test", "EHLO": "250 moody.test", "MAIL": "250 2.1.0 Ok", "RCPT": "250 2.1.5 Ok",
    "DATA": "354 Go", ".": "250 2.0.0 Taken", "RSET": "250 2.0.0 Ok", "QUIT": "221 2.0.0 Bye",
    "AUTH": "235 2.7.0 Welcome",
}  # fmt: skip


class MoodySmtpServer:
    """An SMTP server that says what it is told, a thread for each connection.

    `moods` maps a verb ("GREETING", "EHLO", "MAIL", "RCPT", "DATA", "." for the end of data) to
    what it says the next times; afterwards it is friendly. That is a reply (a 421 hangs up too),
    "drop" (hangs up), "trickle" (a byte now and then, without end), or seconds, or an event, to wait for
    before the friendly reply. `friendly` replies take the place of the usual ones.
    """

    def __init__(self, *, friendly: Mapping[str, str] | None = None, **moods: list[Any]) -> None:
        self.moods = {verb: deque(said) for verb, said in moods.items()}
        self.friendly = {**FRIENDLY, **(friendly or {})}
        self.heard: Counter[str] = Counter()  # verbs
        self.received: list[str] = []  # one "." for each message
        self.most_connections = 0
        self.most_transactions = 0
        self._open: set[socket.socket] = set()
        self._sending: set[socket.socket] = set()  # where a transaction is under way
        self._stopping = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.host, self.port = self._listener.getsockname()

    @property
    def connections(self) -> int:
        return len(self._open)

    def __enter__(self) -> MoodySmtpServer:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stopping.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in list(self._open):
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                line, _ = self._listener.accept()
                self._open.add(line)
                self.most_connections = max(self.most_connections, len(self._open))
                threading.Thread(target=self._converse, args=(line,), daemon=True).start()

    def _converse(self, line: socket.socket) -> None:
        with contextlib.suppress(OSError), line, line.makefile("rb") as commands:
            said = self._say(line, "GREETING")
            while said and (command := commands.readline().decode()):
                verb = command[:4].strip().upper()
                if verb == "MAIL":
                    self._sending.add(line)
                    self.most_transactions = max(self.most_transactions, len(self._sending))
                said = self._say(line, verb)
                if verb == "DATA" and said.startswith("354"):
                    while commands.readline() not in (b".\r\n", b""):
                        pass
                    said = self._say(line, ".")
        self._open.discard(line)

    def _say(self, line: socket.socket, verb: str) -> str:
        """Answer a verb; what was said, or nothing when that was the end."""
        self.heard[verb] += 1
        mood = self.moods[verb].popleft() if self.moods.get(verb) else 0.0
        if isinstance(mood, threading.Event):
            mood.wait(60)
            mood = 0.0
        if mood == "drop":
            return ""
        while mood == "trickle" and not self._stopping.wait(0.05):
            line.sendall(b"2")
        if isinstance(mood, float):
            self.received += verb if verb == "." else ""
            self._stopping.wait(mood)
            mood = self.friendly[verb]
        if verb == ".":
            self._sending.discard(line)
        line.sendall(mood.encode() + b"\r\n")
        return "" if mood.startswith(("421", "221")) else mood


@pytest.fixture
def black_hole() -> Iterator[socket.socket]:
    """A server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=500) as listener:
        yield listener


class SleepyDaemon(Daemon):
    """A daemon whose dispatch loop sleeps for a minute: whatever is to happen must wake it."""

    def __init__(self, folder: Path, config: Any = None, **options: Any) -> None:
        super().__init__(folder, config, **options)
        self.config.setdefault("delivery", {}).setdefault("send_interval_seconds", 60)


@contextlib.contextmanager
def moody_daemon(
    folder: Path, config: Any = None, *, reports: ReportReceiver | None = None, **moods: Any
) -> Iterator[tuple[MoodySmtpServer, SleepyDaemon]]:
    """A daemon whose default account is at a server that says what it is told."""
    with MoodySmtpServer(**moods) as moody, SleepyDaemon(folder, config, smtp=moody, reports=reports) as daemon:
        yield moody, daemon


def letter(id_: str, *to: str, **fields: Any) -> dict[str, Any]:
    """A message as a client submits it; the recipients' addresses say how the server takes it."""
    recipients = list(to) or ["ok@example.com"]
    return {"id": id_, "from": "me@example.com", "to": recipients, "subject": id_, "body": "Hello.", **fields}


def letters(name: str, count: int, to: str = "ok@example.com", **fields: Any) -> list[dict[str, Any]]:
    return [letter(f"{name}-{number}", to, **fields) for number in range(count)]


def account_at(id_: str, server: Any, **fields: Any) -> dict[str, Any]:
    host, port = server.getsockname() if isinstance(server, socket.socket) else (server.host, server.port)
    return {"id": id_, "host": host, "port": port, **fields}


def subjects(server: SmtpServer) -> list[str]:
    """The ids of the messages the server has, in the order of their arrival."""
    return [received.message["Subject"] for received in list(server.received)]


def wait_sent(daemon: Daemon, *ids: str) -> list[dict[str, Any]]:
    return [daemon.wait_status(id_, "sent") for id_ in ids]


def wait_still(daemon: Daemon) -> None:
    """Until nothing is on the wire."""
    wait_until(lambda: daemon.status()["in_delivery"] == 0, "an empty wire")


def state_of(daemon: Daemon, account: str = "default") -> str:
    return str(daemon.status()["accounts"][account]["state"])


def cpu_seconds(daemon: Daemon) -> float:
    assert daemon.process
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def ask(daemon: Daemon, path: str, body: Any = None) -> Any:
    answer = daemon.post(path, body)
    assert answer.status == 200, answer.content
    return answer.json


QUICK: dict[str, dict[str, object]] = {"delivery": {"retry_delays": 0}, "smtp": {"timeout": 1}}

# -- what a server says decides about its message


@both_engines
def test_what_the_server_does_decides_about_the_message(tmp_path: Path, reports: ReportReceiver) -> None:
    stories = {  # recipient: status in the end, attempts, the beginning of the error
        "ok@example.com": ("sent", 1, None),
        "perm@example.com": ("error", 1, "550 5.1.1 No such user here"),
        "greylist2@example.com": ("sent", 3, None),
        "dataperm@example.com": ("error", 1, "554 5.6.0 Not taken"),
        "temp@example.com": ("error", 3, "451 4.3.0 Try again later"),
        "datatemp@example.com": ("error", 3, "451 4.3.0 Not stored"),
        "lost1@example.com": ("sent", 2, None),
        "dropdata1@example.com": ("sent", 2, None),
        "slowrcpt2@example.com": ("error", 3, "no answer within"),
        "müller@example.com": ("error", 1, "the message needs SMTPUTF8"),
    }
    config = {"delivery": {"retry_delays": "0", "max_retries": 2}, "smtp": {"max_connections": 12}}
    with (
        SmtpServer(smtputf8=False, size_limit=20_000) as smtp,
        SleepyDaemon(tmp_path, config, smtp=smtp, reports=reports) as daemon,
    ):
        ask(daemon, "/account", account_at("careful", smtp, in_doubt="error"))
        ask(daemon, "/account", account_at("one by one", smtp, in_doubt="error", max_recipients=1))
        ask(daemon, "/account", account_at("hasty", smtp, timeout=0.3))
        accounts = {"slowrcpt2@example.com": "hasty"}
        daemon.submit(
            *(letter(to, to, account_id=accounts.get(to)) for to in stories), letter("large", body="x" * 30_000)
        )
        daemon.submit(letter("doubt", "dropdata@example.com", account_id="careful"))
        daemon.submit(letter("some", "ok@example.com", "dropdata+2@example.com", account_id="one by one"))

        for to, (status, attempts, error) in stories.items():
            record = daemon.wait_status(to, status)
            assert (record["attempts"], str(record["error"])[: len(error or "None")]) == (attempts, str(error)), record
            assert reports.wait_for_entry(to, status)["error"] == record["error"]
        assert daemon.wait_status("large", "error")["error"].startswith("message of 31")
        assert daemon.wait_status("doubt", "error")["error"].startswith("in doubt: ")
        words = "1 of 2 recipients refused or in doubt: connection"
        assert daemon.wait_status("some", "sent")["error"].startswith(words)
        assert words in daemon.wait_for_log("message sent to some message=some")
        assert len(smtp.received_by("dropdata@example.com")) == 1
        assert smtp.visits["perm@example.com"] == 1
        assert len(smtp.received_by("dropdata1@example.com")) == 2
        assert "in doubt" in daemon.wait_for_log("message deferred message=dropdata1@example.com")
        assert state_of(daemon) == "up"


@both_engines
def test_what_went_to_some_is_sent_and_says_so_wherever_one_looks_however_the_others_ended(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    no, later = "550 5.1.1 No such user here", "451 4.3.0 Try again later"
    with Daemon(tmp_path, {"delivery": {"retry_delays": "1000"}}, smtp=smtp, reports=reports) as daemon:
        ask(daemon, "/account", account_at("once", smtp, max_retries=1, retry_delays=[0]))
        ask(daemon, "/account", account_at("gone", smtp))
        daemon.submit(
            letter("refused", "ok@example.com", "perm@example.com", "550@example.com"),
            letter("given-up", "ok@example.com", "temp@example.com", account_id="once"),
            letter("expired", "temp@example.com", "ok@example.com", expires_ts=4_000_000_000),
            letter("deleted", "ok@example.com", "temp@example.com", account_id="gone"),
            letter("served", "ok@example.com", "greylist1@example.com"),
        )
        for id_ in ("deleted", "expired"):
            daemon.wait_status(id_, "deferred")
        failed = daemon.delete("/account/gone").json["failed"]
        daemon.change("UPDATE messages SET expires_ts = 1 WHERE id = 'expired'")  # no test waits until 2096
        daemon.submit(letter("due", deferred_ts=1))  # something is due: it looks

        for id_, error in {
            "refused": f"2 of 3 recipients refused: {no}", "given-up": f"1 of 2 recipients refused: {later}",
            "expired": f"1 of 2 recipients refused: {later}", "deleted": f"1 of 2 recipients refused: {later}",
        }.items():  # fmt: skip
            record, entry = daemon.wait_status(id_, "sent"), reports.wait_for_entry(id_, "sent")
            assert (record["error"], record["error_ts"], entry["error"], entry["error_ts"]) == (error, None) * 2
            assert record["recipients"] == entry["recipients"]
            assert Counter(one["status"] for one in record["recipients"].values())["sent"] == 1
            if id_ != "deleted":  # that is one line for the account
                assert error in daemon.wait_for_log(f"message sent to some message={id_} ")
        assert (daemon.wait_status("served", "sent")["error"], failed) == (None, 0)
        daemon.wait_status("due", "sent")
        counts = re.findall(
            r'_(partly_refused|sent|failed)_total{account="(\w+)"} (\d)', daemon.get("/metrics").content.decode()
        )
        assert {f"{what} {account}": int(n) for what, account, n in counts if account != "gone"} == {
            "partly_refused default": 2, "sent default": 4, "failed default": 0,
            "partly_refused once": 1, "sent once": 1, "failed once": 0,
            "partly_refused unknown": 1, "sent unknown": 1,
        }  # fmt: skip
        command = [sys.executable, STARTER, "messages", "--url", f"http://127.0.0.1:{daemon.port}"]
        options = {"capture_output": True, "text": True, "env": _plain_environment()}
        lines = subprocess.run(command, check=True, **options).stdout.splitlines()
        assert lines[0].endswith("REMARK")
        assert lines[1].endswith(f"2 of 3 recipients refused: {no}")


def test_what_not_every_server_takes_goes_out_as_the_server_can_take_it(
    tmp_path: Path, reports: ReportReceiver
) -> None:
    def plain(verb: str, _visit: Visit, _argument: str) -> str | None:
        return "250 plain.test" if verb == "EHLO" else None

    subjects = {"Subject: ü".encode(): {"SMTPUTF8"}, "Subject: ü".encode("latin-1"): set(), b"Subject: u": set()}
    dotted = {"return_path": "b..o@example.com", "to": ["a..b@example.com", "perm@example.com"]}
    with (
        SmtpServer() as modern,
        SmtpServer(rule=plain) as old,
        Daemon(tmp_path, smtp=modern, reports=reports) as daemon,
    ):
        ask(daemon, "/account", account_at("old", old))
        raw = {f"raw {number}": as_base64(subject + b"\r\n\r\n\xfc\r\n") for number, subject in enumerate(subjects)}
        daemon.submit(*(letter(name, raw=content) for name, content in raw.items()), letter("dotted", **dotted))
        daemon.submit(*(letter(f"{name} old", raw=content, account_id="old") for name, content in raw.items()))
        daemon.submit(letter("later", deferred_ts=(later := int(time.time()) + 2)))
        recipients = reports.wait_for_entry("dotted", "sent")["recipients"]
        old.wait_for(3)
        received = modern.wait_for(5)
        warnings = [line for line in daemon.log.splitlines() if "without 8BITMIME" in line]

    by_first_line = {one.content.partition(b"\r\n")[0]: one for one in received}
    for subject, options in subjects.items():
        said = {option for option in by_first_line[subject].options if not option.startswith("SIZE=")}
        assert said == {"BODY=8BITMIME", *options}
    assert {one.content.partition(b"\r\n")[0] for one in old.received} == subjects.keys()
    assert all(b"\r\n\r\n\xfc\r\n" in one.content for one in old.received)
    assert {re.search(r'message="(.*?)"', line)[1] for line in warnings} == {f"{name} old" for name in raw}
    by_subject = {one.message["Subject"]: one for one in received}
    assert (by_subject["dotted"].sender, by_subject["dotted"].recipients) == ("b..o@example.com", ["a..b@example.com"])
    assert recipients["a..b@example.com"]["status"] == "sent"
    assert by_subject["later"].message["Date"].datetime.timestamp() == later


@both_engines
def test_many_recipients_are_split_and_who_was_accepted_is_never_sent_to_again(
    tmp_path: Path, reports: ReportReceiver
) -> None:
    config = {"delivery": {"retry_delays": 3}, "smtp": {"max_recipients": 10}}  # so long that the deferral is reported
    with SmtpServer(max_recipients=4) as smtp, SleepyDaemon(tmp_path, config, smtp=smtp, reports=reports) as daemon:
        recipients = [f"ok+{number}@example.com" for number in range(25)]
        daemon.submit(letter("many", *recipients))

        assert daemon.wait_status("many", "sent")["attempts"] == 1
        assert max(len(received.recipients) for received in smtp.received) == 4
        assert sorted(a for received in smtp.received for a in received.recipients) == sorted(recipients)
        assert reports.wait_for_entry("many", "sent")["recipients"] is None

        smtp.received.clear()
        daemon.submit(letter("m", "ok@a.example", "greylist2@a.example", "perm@a.example"))
        deferral = reports.wait_for_entry("m", "deferred")
        assert {a: o["status"] for a, o in deferral["recipients"].items()} == {
            "ok@a.example": "sent", "greylist2@a.example": "deferred", "perm@a.example": "error",
        }  # fmt: skip
        record = daemon.wait_status("m", "sent")
        assert [received.recipients for received in smtp.received] == [["ok@a.example"], ["greylist2@a.example"]]
        assert smtp.visits["perm@a.example"] == 1
        refused = {"status": "error", "code": 550, "text": "No such user here"}
        assert (record["attempts"], record["recipients"]["perm@a.example"]) == (2, refused)
        assert record["error"].startswith("1 of 3 recipients refused: 550 5.1.1 No such user")


@both_engines
def test_between_two_transactions_of_a_message_kill_9_sends_nothing_twice_and_a_deleted_account_nothing_more(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    with SleepyDaemon(tmp_path, smtp=smtp, reports=reports) as daemon:
        ask(daemon, "/account", account_at("web", smtp, max_recipients=1))
        daemon.submit(letter("m", "ok@example.com", "slow500ms@example.com", account_id="web"))
        wait_until(lambda: smtp.visits["slow500ms@example.com"], "the second transaction")
        daemon.kill()
        daemon.start()
        assert daemon.wait_status("m", "sent")["attempts"] == 1
        assert len(smtp.received_by("ok@example.com")) == 1

        daemon.submit(letter("n", "ok+n@example.com", "slow600ms@example.com", "never@example.com", account_id="web"))
        wait_until(lambda: smtp.visits["slow600ms@example.com"], "the second transaction")
        daemon.delete("/account/web")
        recipients = reports.wait_for_entry("n", "sent")["recipients"]
        assert {a: outcome["status"] for a, outcome in recipients.items()} == {
            "ok+n@example.com": "sent", "slow600ms@example.com": "sent", "never@example.com": "error",
        }  # fmt: skip
        assert recipients["never@example.com"]["text"] == "account deleted"
        assert not smtp.received_by("never@example.com")


def test_a_connection_that_breaks_before_the_dot_counts_an_attempt_only_when_it_was_new(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    new = {**QUICK, "smtp": {"max_connections": 1, "max_messages_per_connection": 1}}
    with moody_daemon(tmp_path, new, MAIL=["drop"], RCPT=["drop"], DATA=["drop"]) as (_, daemon):
        daemon.submit(*letters("m", 3))

        assert [record["attempts"] for record in wait_sent(daemon, "m-0", "m-1", "m-2")] == [2, 2, 2]
        timeline = [(attempt["outcome"], attempt["stage"]) for attempt in daemon.attempts("m-1")]
        assert timeline == [("deferred", "rcpt"), ("sent", "end-of-data")]

        with MoodySmtpServer(MAIL=[0.0, "drop"], RCPT=[0.0, 0.0, "drop"]) as moody:
            ask(daemon, "/account", account_at("kept", moody))
            for number in range(4):
                daemon.submit(letter(f"k-{number}", account_id="kept"))
                assert daemon.wait_status(f"k-{number}", "sent")["attempts"] == 1
            assert (moody.heard["GREETING"], len(moody.received)) == (3, 4)

        ask(daemon, "/account", account_at("idle", smtp))
        for round_ in range(3):
            daemon.submit(*letters(f"r{round_}", 8, "slow20ms@example.com", account_id="idle"))
            sent = wait_sent(daemon, *(f"r{round_}-{number}" for number in range(8)))
            assert {record["attempts"] for record in sent} == {1}
            smtp.cut_connections()
        assert len(smtp.received) == 24


def test_a_refusal_at_any_step_decides_in_the_servers_words_and_a_421_cools_the_lane(
    tmp_path: Path, reports: ReportReceiver
) -> None:
    with moody_daemon(tmp_path, {"smtp": {"max_connections": 1}}, reports=reports) as (moody, daemon):
        for verb, (code, status) in itertools.product(
            ("MAIL", "RCPT", "DATA", "."), ((451, "deferred"), (554, "error"))
        ):
            words = f"{code} {code // 100}.6.0 Said at {verb}"
            moody.moods[verb] = deque([words])
            daemon.submit(letter(words), letter(f"next {words}"))

            record = daemon.wait_status(words, status)
            assert (record["attempts"], record["error"]) == (1, words)
            assert daemon.wait_status(f"next {words}", "sent")["attempts"] == 1
        assert (moody.heard["GREETING"], state_of(daemon)) == (1, "up")

        for verb in ("GREETING", "MAIL", "RCPT", "DATA", "."):
            words = f"421 4.3.2 Going down at {verb}"
            moody.moods[verb] = deque([words])
            account = f"at {verb}"
            ask(daemon, "/account", account_at(account, moody, max_connections=1))
            daemon.submit(letter(words, account_id=account), letter(f"next {words}", account_id=account))

            deferral = reports.wait_for_entry(words, "deferred")
            assert (deferral["attempts"], deferral["error"]) == (0, words)
            lane = daemon.status()["accounts"][account]
            assert (lane["state"], lane["reason"]) == ("cooling", words)
            ask(daemon, "/commands/run-now")
            assert [record["attempts"] for record in wait_sent(daemon, words, f"next {words}")] == [1, 1]
            assert state_of(daemon, account) == "up"


# -- lanes


def test_a_lane_whose_server_is_down_waits_and_leaves_its_other_mail_alone_until_run_now(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    smtp.stop()
    with SleepyDaemon(tmp_path, smtp=smtp, reports=reports) as daemon:
        began = time.time()
        daemon.submit(*letters("m", 30))

        deferral = reports.wait_for_entry("m-0", "deferred")
        wait_still(daemon)
        account = daemon.status()["accounts"]["default"]
        counts = Counter(record["status"] for record in daemon.get("/messages").json["messages"])
        assert (account["state"], account["connections"]) == ("cooling", 0)
        assert "refused" in account["reason"]
        assert began + 3 <= account["until"] <= time.time() + 7
        assert (deferral["attempts"], deferral["error"]) == (0, account["reason"])
        assert abs(deferral["deferred_ts"] - account["until"]) <= 1
        assert (1 <= counts["deferred"] <= 5, counts["deferred"] + counts["queued"]) == (True, 30)
        assert 'mailproxy_account_up{account="default"} 0.0' in daemon.get("/metrics").content.decode()

        ask(daemon, "/commands/run-now")
        wait_until(lambda: daemon.log.count("account cooling down") >= 2, "a longer pause than the test takes")
        wait_still(daemon)
        smtp.start()
        daemon.restart()  # what waited for the server is tried at the start
        assert daemon.wait_status("m-0", "sent", timeout=10)["attempts"] == 1
        smtp.wait_for(30)


def test_after_cooling_one_connection_finds_out_before_others_follow(tmp_path: Path) -> None:
    go_on = threading.Event()
    with moody_daemon(tmp_path, QUICK, GREETING=["554 Not now"] * 50, MAIL=[go_on] + [0.02] * 30) as (moody, daemon):
        daemon.submit(*letters("m", 30))
        daemon.wait_for_log("account cooling down")
        wait_still(daemon)
        wait_until(lambda: not moody.connections, "the refused connection to end")
        moody.moods["GREETING"].clear()
        moody.most_connections = 0

        ask(daemon, "/commands/run-now")
        wait_until(lambda: moody.heard["MAIL"] == 1, "the probe")
        alone = moody.most_connections
        go_on.set()
        wait_until(lambda: len(moody.received) == 30, "all the mail")

        assert alone == 1
        assert moody.most_connections > 1
        assert daemon.get("/messages?status=sent").json["messages"][0]["attempts"] == 1


def test_a_server_that_takes_fewer_connections_gets_fewer(tmp_path: Path, reports: ReportReceiver) -> None:
    with (
        SmtpServer(max_connections=2) as smtp,
        SleepyDaemon(tmp_path, {"smtp": {"max_connections": 8}}, smtp=smtp, reports=reports) as daemon,
    ):
        daemon.submit(*letters("m", 30, "slow20ms@example.com"))

        smtp.wait_for(30)
        wait_sent(daemon, "m-29")
        assert (smtp.most_connections, state_of(daemon)) == (2, "up")
        assert smtp.refused <= 6
        assert {entry["status"] for entry in reports.entries} <= {"sent"}


def test_connections_grow_to_the_most_allowed_and_end_as_the_account_says(tmp_path: Path, smtp: SmtpServer) -> None:
    config = {"smtp": {"max_connections": 3, "max_messages_per_connection": 5, "ttl": 1}}
    with Daemon(tmp_path, config, smtp=smtp) as daemon:
        daemon.submit(*letters("m", 30, "slow20ms@example.com"))

        received = smtp.wait_for(30)
        by_connection = Counter(one.connection for one in received)
        assert smtp.most_connections == 3
        assert max(by_connection.values()) <= 5
        wait_until(lambda: daemon.status()["accounts"]["default"]["connections"] == 0, "the end of their life")


def dispatcher_of(queue: Any, clock: Any, open_session: Any = None) -> Any:
    return mailproxy.Dispatcher(
        queue=queue, settings=mailproxy.DeliverySettings(), clock=clock, jitter=lambda: 0, open_session=open_session,
        fetcher=None, memory=SimpleNamespace(), in_thread=None, metrics=mailproxy.Metrics("test"), log=LOG,
        reports_due=lambda: None,
    )  # type: ignore[arg-type] # fmt: skip


def test_what_connections_take_next_is_composed_ahead_and_what_cannot_be_fails_when_its_turn_has_come() -> None:
    dispatcher = dispatcher_of(None, mailproxy.Clock(time.time, time.monotonic))
    account = mailproxy.Account(id="main", host="mx.test", port=25)
    lane = dispatcher.lanes["main"] = mailproxy.Lane(account, mailproxy.SendWindows({}), dispatcher.clock)
    payload = json.dumps({"id": "m", "from": "a@example.com", "to": ["b@example.org"], "subject": "S", "body": "B"})
    lane.busy = 2
    dispatcher._at_work.add(lane)
    lane.ready += [(claimed()._replace(payload=text), None) for text in ("{}", payload, payload)]

    dispatcher.compose_ahead()

    assert [composed and composed.envelope.recipients for _, composed in lane.ready] == [None, ("b@example.org",), None]


def test_an_opening_that_was_called_back_ends_before_its_login_though_its_cancellation_was_swallowed() -> None:
    """As asyncio.wait_for of Python 3.11 does with one that comes together with the reply."""

    async def open_session(*_: Any, may_log_in: Callable[[], Any], **__: Any) -> Any:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await may_log_in()

    async def called_back() -> Any:
        dispatcher = dispatcher_of(None, mailproxy.Clock(time.time, time.monotonic), open_session=open_session)
        account = mailproxy.Account(id="main", host="mx.test", port=25)
        dispatcher.add_lane(account, mailproxy.Standing((), suspended=False, held_back=False))
        lane = dispatcher.lanes["main"]
        lane.first_is_in = asyncio.Event()  # another one goes first
        opening = asyncio.create_task(dispatcher._session(lane, None))
        for _ in range(3):
            await asyncio.sleep(0)
        dispatcher._recall(lane)
        return await asyncio.wait_for(opening, 30)

    assert asyncio.run(called_back()) is None


def test_what_an_old_limit_holds_back_while_the_account_is_replaced_goes_by_the_new_one(rig: QueueRig) -> None:
    dispatcher = dispatcher_of(rig.queue, mailproxy.Clock(lambda: rig.now, lambda: rig.now))
    account = mailproxy.Account(id="main", host="mx.test", port=25, limit_per_day=1)
    rig.accepted(submission("m"))
    record, replacement = rig.queue.record, asyncio.Event()

    async def record_late(outcome: mailproxy.Outcome) -> None:
        await replacement.wait()
        await record(outcome)

    async def replaced() -> None:
        rig.queue.record = record_late
        dispatcher.add_lane(account, mailproxy.Standing([(int(rig.now), 1)], suspended=False, held_back=False))
        await dispatcher.turn()  # it takes "m", to be held back
        dispatcher.replace_account(account._replace(limit_per_day=None))
        replacement.set()
        for _ in range(2):
            while dispatcher.busy:
                await asyncio.sleep(0.01)
            await dispatcher.turn()
        await dispatcher.drain()

    rig.run(replaced())
    assert rig.fields_of("m")["error"].startswith("internal error")  # it was tried: there is nothing to compose


@pytest.mark.parametrize("greeting_s", [0.0, 0.3])
def test_a_wrong_password_costs_one_login_a_try_even_where_the_refusal_takes_its_time(
    tmp_path: Path, greeting_s: float
) -> None:
    words = {"EHLO": "250-moody.test\r\n250 AUTH PLAIN", "AUTH": "535 5.7.8 Wrong password"}
    moods = {"friendly": words, "GREETING": [0.0, *[greeting_s] * 100], "AUTH": [0.2] * 100}
    with SleepyDaemon(tmp_path) as daemon, MoodySmtpServer(**moods) as moody:
        wrong = account_at("main", moody, user="me", password="wrong", max_connections=30)
        ask(daemon, "/account", wrong)
        daemon.submit(*letters("m", 100, account_id="main"))
        daemon.wait_for_log("cannot log in")
        wait_still(daemon)
        assert (moody.heard["AUTH"], moody.heard["GREETING"] > 1) == (1, True)
        ask(daemon, "/commands/run-now")
        wait_until(lambda: daemon.log.count("cannot log in") == 2, "another login")
        wait_still(daemon)

        account = daemon.status()["accounts"]["main"]
        assert (account["state"], account["reason"], moody.heard["AUTH"]) == ("cooling", words["AUTH"], 2)
        assert account["until"] - time.time() > 40
        assert {(m["status"], m["error"]) for m in daemon.get("/messages").json["messages"]} == {
            ("queued", None), ("deferred", "535 5.7.8 Wrong password"),
        }  # fmt: skip
        assert 'mailproxy_account_up{account="main"} 0.0' in daemon.get("/metrics").content.decode()

        moody.friendly["AUTH"] = FRIENDLY["AUTH"]  # the server changes its mind; the definition does not
        moody.moods["AUTH"].clear()
        ask(daemon, "/account", wrong)
        wait_until(lambda: len(moody.received) == 100, "all the mail")
        wait_still(daemon)
        assert {message["attempts"] for message in daemon.get("/messages").json["messages"]} == {1}
        assert state_of(daemon, "main") == "up"


def test_connections_that_are_open_log_in_as_soon_as_the_first_is_in(tmp_path: Path) -> None:
    words = {"EHLO": "250-moody.test\r\n250 AUTH PLAIN"}
    login = {"user": "me", "password": "right", "max_connections": 8}
    with moody_daemon(tmp_path, {"smtp": login}, friendly=words, AUTH=[0.5, *[50.0] * 7]) as (moody, daemon):
        daemon.submit(*letters("m", 8))
        wait_until(lambda: moody.heard["EHLO"] == 8, "all connections")
        wait_until(lambda: moody.heard["AUTH"] == 8, "all logins, at the same time")
        daemon.kill()


def test_when_the_message_of_the_connection_that_logs_in_first_expires_another_one_logs_in(tmp_path: Path) -> None:
    words = {"EHLO": "250-moody.test\r\n250 AUTH PLAIN"}
    login = {"user": "me", "password": "right", "max_connections": 3}
    auth = [threading.Event(), "535 5.7.8 Wrong password"]
    with moody_daemon(tmp_path, {"smtp": login}, friendly=words, AUTH=auth) as (moody, daemon):
        daemon.submit(letter("first", expires_ts=int(time.time()) + 4))
        wait_until(lambda: moody.heard["AUTH"] == 1, "a login without an answer")
        daemon.submit(*letters("m", 2))
        wait_until(lambda: moody.heard["EHLO"] == 3, "two more connections")
        assert moody.heard["AUTH"] == 1

        assert daemon.wait_status("first", "error")["error"].startswith("expired")
        daemon.wait_for_log("cannot log in")
        wait_still(daemon)
        assert moody.heard["AUTH"] == 2  # not two at a time
        ask(daemon, "/commands/run-now")
        wait_sent(daemon, "m-0", "m-1")
        daemon.kill()


def test_a_server_that_trickles_costs_its_own_mail_a_timeout_and_nobody_else_anything(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    slow = {"timeout": 1, "max_connections": 1, "max_messages_per_connection": 1}
    with MoodySmtpServer() as moody, SleepyDaemon(tmp_path, {"delivery": {"retry_delays": 3600}}, smtp=smtp) as daemon:
        ask(daemon, "/account", account_at("slow", moody, **slow))
        for verb, attempts, error in (
            ("MAIL", 1, "no answer within 1 s"), ("RCPT", 1, "no answer within 1 s"),
            ("DATA", 1, "no answer within 1 s"), ("GREETING", 0, "no answer in time"), ("EHLO", 0, "no answer in time"),
        ):  # fmt: skip
            moody.moods[verb] = deque(["trickle"])
            daemon.submit(letter(verb, account_id="slow"), letter(f"other {verb}"))

            wait_sent(daemon, f"other {verb}")
            record = daemon.wait_status(verb, "deferred")
            assert (record["attempts"], error in record["error"]) == (attempts, True)
            assert state_of(daemon, "slow") == ("up" if attempts else "cooling")
            assert [attempt["stage"] for attempt in daemon.attempts(verb)][:attempts] == [verb.lower()][:attempts]
            if not attempts:
                ask(daemon, "/commands/run-now")
                wait_sent(daemon, verb)


@pytest.mark.parametrize(("holes", "messages", "slots", "stuck"), [(2, 500, 12, 24), (12, 20, 4, 48)])
def test_black_holes_hold_up_nobody_else(
    tmp_path: Path, smtp: SmtpServer, black_hole: socket.socket, holes: int, messages: int, slots: int, stuck: int
) -> None:
    with SleepyDaemon(tmp_path, {"delivery": {"max_concurrency": slots}}, smtp=smtp) as daemon:
        for hole in (f"hole{number}" for number in range(holes)):
            ask(daemon, "/account", account_at(hole, black_hole, timeout=60, max_connections=16))
            daemon.submit(*letters(hole, messages, account_id=hole))
        wait_until(lambda: daemon.status()["in_delivery"] == stuck, "the black holes to take what they can")

        for number in range(3):
            daemon.submit(letter(f"m-{number}"))
            smtp.wait_for(number + 1, timeout=20)

        ask(daemon, "/account", account_at("hole0", smtp))  # what hangs is given up at once
        smtp.wait_for(3 + messages)
        started = time.monotonic()
        assert daemon.stop() == 0  # nor do the others hold up the end
        assert time.monotonic() - started < 20


def test_servers_that_take_their_time_to_greet_get_no_more_transactions_at_a_time_than_there_are_slots(
    tmp_path: Path,
) -> None:
    slow = {"GREETING": [0.5] * 10, ".": [0.1] * 20}
    config = {"delivery": {"max_concurrency": 2}, "smtp": {"max_connections": 6}}
    with MoodySmtpServer(**slow) as moody, SleepyDaemon(tmp_path, config, smtp=moody) as daemon:
        ask(daemon, "/account", account_at("other", moody))
        daemon.submit(*letters("m", 6), *letters("o", 6, account_id="other"))
        wait_sent(daemon, *(f"{name}-{number}" for name in "mo" for number in range(6)))

        assert moody.most_connections > 2
        assert moody.most_transactions == 2


def test_slow_transactions_leave_slots_to_others(tmp_path: Path, smtp: SmtpServer) -> None:
    with SleepyDaemon(tmp_path, {"delivery": {"max_concurrency": 4}}, smtp=smtp) as daemon:
        ask(daemon, "/account", account_at("slow", smtp))
        daemon.submit(*letters("s", 10, "slow60@example.com", account_id="slow"))
        wait_until(lambda: smtp.visits["slow60@example.com"] == 3, "the slow ones")

        daemon.submit(*letters("m", 5))

        smtp.wait_for(5)
        assert smtp.visits["slow60@example.com"] == 3
        daemon.kill()


def test_a_message_that_waits_for_a_slot_expires_in_time_and_can_be_called_back(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    go_on = threading.Event()
    config = {"delivery": {"max_concurrency": 1}}
    with MoodySmtpServer(DATA=[go_on]) as moody, SleepyDaemon(tmp_path, config, smtp=smtp) as daemon:
        for name in ("slow", "other"):
            ask(daemon, "/account", account_at(name, moody if name == "slow" else smtp))
        daemon.submit(letter("slow", account_id="slow"))
        wait_until(lambda: moody.heard["DATA"] == 1, "the slot to be taken")
        daemon.submit(letter("short", expires_ts=int(time.time()) + 4), letter("other", account_id="other"))
        wait_until(lambda: daemon.status()["in_delivery"] == 3, "the others to wait for it")

        assert daemon.wait_status("short", "error")["error"].startswith("expired")
        ask(daemon, "/account/other/suspend")
        wait_until(lambda: daemon.status()["in_delivery"] == 1, "the slow one only on the wire")
        go_on.set()
        wait_sent(daemon, "slow")
        ask(daemon, "/account/other/activate")
        wait_sent(daemon, "other")
        assert subjects(smtp) == ["other"]


def test_a_message_that_waits_for_a_slot_gets_one_when_sighup_allows_more(tmp_path: Path, smtp: SmtpServer) -> None:
    config = {"delivery": {"max_concurrency": 1}}
    with MoodySmtpServer(DATA=[threading.Event()]) as moody, SleepyDaemon(tmp_path, config, smtp=smtp) as daemon:
        ask(daemon, "/account", account_at("slow", moody))
        daemon.submit(letter("slow", account_id="slow"))
        wait_until(lambda: moody.heard["DATA"] == 1, "the slot to be taken")
        daemon.submit(letter("other"))
        wait_until(lambda: smtp.most_connections == 1, "the other one to wait for it")

        daemon.config["delivery"]["max_concurrency"] = 2
        daemon.write_config()
        daemon.signal(signal.SIGHUP)

        wait_sent(daemon, "other")
        daemon.kill()


@pytest.mark.parametrize("slots", [1, 3])
def test_slots_are_shared_in_turn(tmp_path: Path, smtp: SmtpServer, slots: int) -> None:
    with SleepyDaemon(tmp_path, {"delivery": {"max_concurrency": slots}}, smtp=smtp) as daemon:
        ask(daemon, "/commands/suspend")
        for name in ("a", "b", "c"):
            ask(daemon, "/account", account_at(name, smtp))
            daemon.submit(*letters(name, 20, "slow10ms@example.com", account_id=name))
        ask(daemon, "/commands/activate")

        smtp.wait_for(60)
        half = Counter(subject[0] for subject in subjects(smtp)[:30])
        assert min(half.values()) >= 7, half
        assert smtp.most_connections <= 9  # kept ones included


# -- what a lane learns, with a clock that the test turns


class LaneRig:
    """A lane whose clock the test turns."""

    def __init__(self, **account: Any) -> None:
        self.now = 1000.0
        definition = mailproxy.Account("main", "mail.example.com", 25, **account)
        windows = mailproxy.SendWindows(definition.limits)
        self.lane = mailproxy.Lane(definition, windows, mailproxy.Clock(lambda: self.now, lambda: self.now))

    def pause_after(self, signal: str) -> float:
        """The seconds until the lane may be tried again; they pass."""
        self.lane.cool(mailproxy.LaneSignal(signal), "451 not now", 0)
        assert (self.lane.state, self.wanted) == ("cooling", 0)
        began, self.now = self.now, self.lane.until
        self.lane.end_pause()
        return self.now - began

    @property
    def free(self) -> int:
        return self.lane.connections_free(self.now, 100)

    @property
    def wanted(self) -> int:
        return self.lane.wants(self.now, 100)


def test_the_pauses_of_a_lane_grow_until_something_works() -> None:
    rig = LaneRig()

    assert [rig.pause_after("cool") for _ in range(5)] == [5, 15, 60, 300, 300]
    assert rig.lane.works(rig.lane.generation)
    assert (rig.lane.state, rig.pause_after("cool")) == ("up", 5)
    rig = LaneRig()
    assert [rig.pause_after("account") for _ in range(5)] == [60, 300, 900, 3600, 3600]


def test_a_lane_has_one_connection_until_that_is_there_and_after_cooling_until_it_has_worked() -> None:
    rig = LaneRig(max_connections=3)

    assert (rig.free, rig.wanted) == (1, 1)
    rig.lane.busy, rig.lane.first_is_in = 1, asyncio.Event()
    assert (rig.free, rig.wanted, rig.lane.connections_free(rig.now, 2)) == (2, 2, 1)
    rig.pause_after("cool")
    assert (rig.lane.state, rig.lane.status()["until"], rig.free) == ("probing", None, 0)
    rig.lane.works(rig.lane.generation)
    assert (rig.lane.state, rig.free) == ("up", 2)

    rig.lane.limit, rig.lane.grows_at = 1, rig.now + mailproxy.GROWTH_PAUSE_S  # one more was refused
    growth = []
    for _ in range(4):
        growth.append(rig.free)
        rig.now += mailproxy.GROWTH_PAUSE_S
    assert growth == [0, 1, 2, 2]


def test_a_transaction_has_the_recipients_that_the_server_takes_at_a_time() -> None:
    left = ["a@x.test", "b@y.test", "c@X.test", "d@z.test"]
    account = mailproxy.Account("main", "mail.example.com", 25, max_recipients=3)
    offers = mailproxy.Offers(None, True, False, True, (), None)

    for offered, most, served in (({}, math.inf, "abc"), ({"rcptmax": 2}, 9, "ab"), ({"rcptdomainmax": 1}, 9, "ac"),
                                  ({"rcptdomainmax": 2}, 2, "ab"), ({"rcptdomainmax": 9}, 1, "a")):  # fmt: skip
        got = mailproxy.Turn(most=most).served(left, account, offers._replace(**offered))
        assert "".join(address[0] for address in got) == served


@pytest.mark.parametrize(("signal", "heals"), [("cool", True), ("account", False)])
def test_what_began_before_the_failure_ends_the_cooling_unless_the_account_was_refused(
    signal: str, heals: bool
) -> None:
    rig = LaneRig()
    rig.lane.cool(mailproxy.LaneSignal(signal), "451 not now", 0)

    assert rig.lane.generation == 1  # failures of what began in generation 0 tell nothing
    assert (rig.lane.works(0), rig.lane.state) == (heals, "up" if heals else "cooling")
    rig.lane.works(1)
    assert rig.lane.state == "up"


# -- slots and memory, a share for each lane


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ("a60 a20 a10 b20", "a60 b20"),  # a quarter is kept for others
        ("a40 a40 a10 b25 c10", "a40 b25 c10"),  # within a lane nobody is overtaken
        ("a70 b50 c30", "a70 c30"),  # one that has none overtakes one that does not fit
        ("a75 b25 c2 d2 c2 a0", "a75 b25 c2 d2 a0"),  # next to nothing is given to who has none, come what may
    ],
)
def test_no_lane_takes_what_is_kept_for_others(asked: str, got: str) -> None:
    shares, given = mailproxy.Shares(100, small=2), []

    async def ask_for(word: str) -> None:
        await shares.take(word[0], int(word[1:]))
        given.append(word)

    async def story() -> None:
        tasks = [asyncio.create_task(ask_for(word)) for word in asked.split()]
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()

    asyncio.run(story())
    assert given == got.split()
    assert shares.used == sum(int(word[1:]) for word in given)


def test_what_is_given_back_or_not_waited_for_any_more_goes_to_others() -> None:
    async def story() -> list[Any]:
        shares = mailproxy.Shares(100)
        await shares.take("a", 60)
        impatient, patient = (asyncio.create_task(shares.take(lane, 60)) for lane in "bc")
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.sleep(0)
        waited = not patient.done()
        shares.give_back("a", 20)
        await patient
        return [waited, shares.used, shares.waiting]

    assert asyncio.run(story()) == [True, 100, {}]


# -- limits


@both_engines
def test_a_limit_is_exact_with_many_connections_and_submitters(tmp_path: Path, reports: ReportReceiver) -> None:
    with SmtpServer() as smtp, SleepyDaemon(tmp_path, reports=reports) as daemon:
        limited = account_at("main", smtp, max_connections=16, limit_per_minute=20, limit_per_day=1_000_000)
        ask(daemon, "/account", limited)
        began = time.time()
        batches = [letters(f"s{n}", 25, "slow10ms@example.com", account_id="main") for n in range(4)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda batch: daemon.submit(*batch), batches))

        reports.wait_for(lambda r: sum(entry["status"] == "deferred" for entry in r.entries) == 50)
        account = daemon.status()["accounts"]["main"]
        deferral = next(entry for entry in reports.entries if entry["status"] == "deferred")
        assert len(smtp.received) == 20
        assert (account["state"], account["limits_left"]["minute"]) == ("limited", 0)
        assert (deferral["error"], deferral["attempts"]) == ("rate limit reached: 20 per minute", 0)
        assert abs(deferral["deferred_ts"] - account["until"]) <= 1
        assert began + 59 < deferral["deferred_ts"] < time.time() + 62
        statuses = Counter(message["status"] for message in daemon.get("/messages").json["messages"])
        assert statuses == {"sent": 20, "deferred": 50, "queued": 30}  # those behind wait untouched

        daemon.submit(letter("late", account_id="main"))
        ask(daemon, "/account", {**limited, "limit_per_minute": 30})
        smtp.wait_for(30)
        wait_until(lambda: state_of(daemon, "main") == "limited", "the higher limit")
        wait_still(daemon)
        assert len(smtp.received) == 30
        assert "late" not in subjects(smtp)


@both_engines
def test_what_was_on_the_wire_at_kill_9_takes_nothing_from_the_limits_and_what_was_sent_without_one_counts(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    with SleepyDaemon(tmp_path) as daemon, socket.create_server(("127.0.0.1", 0)) as never_greets:
        ask(daemon, "/account", account_at("main", smtp))
        daemon.submit(*letters("a", 2, account_id="main"))
        wait_sent(daemon, "a-0", "a-1")
        ask(daemon, "/account", account_at("main", never_greets, limit_per_day=12))
        daemon.submit(*letters("m", 11, account_id="main"))
        for _ in range(3):
            wait_until(lambda: daemon.status()["in_delivery"], "mail on the wire")
            daemon.kill()
            daemon.start()

        ask(daemon, "/account", account_at("main", smtp, limit_per_day=12))

        smtp.wait_for(12)
        wait_until(lambda: state_of(daemon, "main") == "limited", "the limit, with one message left")
        assert (daemon.status()["accounts"]["main"]["limits_left"], len(smtp.received)) == ({"day": 0}, 12)


@both_engines
def test_minute_hour_and_day_hold_together_across_kill_9(tmp_path: Path, smtp: SmtpServer) -> None:
    """Time passes by making what was sent older, while the daemon is down."""

    def after(seconds: int) -> str:
        daemon.kill()
        moved = "UPDATE sends SET until_ts = until_ts - {}, minute = -(minute - {})"
        daemon.change(moved, seconds, math.ceil(seconds / 60))
        daemon.change("UPDATE sends SET minute = -minute")
        daemon.start()
        judged = daemon.log.count("message=m-29 ")
        ask(daemon, "/account", account)  # what waited for the limit is judged again
        wait_until(lambda: daemon.log.count("message=m-29 ") > judged, "the limit")
        assert state_of(daemon, "main") == "limited"
        return str(daemon.wait_status("m-29", "deferred")["error"])

    account = account_at(
        "main", smtp, limit_per_minute=3, limit_per_hour=5, limit_per_day=6, max_connections=16, batch_size=100
    )
    with SleepyDaemon(tmp_path) as daemon:
        two_hours_ago = int(time.time()) - 7200
        daemon.change("INSERT INTO sends VALUES ('main', {}, {}, 1)", two_hours_ago // 60, two_hours_ago)
        ask(daemon, "/account", account)
        daemon.submit(*letters("m", 30, "slow50ms@example.com", account_id="main"))
        daemon.wait_status("m-29", "deferred")

        reasons = [after(0), after(62), after(62), after(3662)]  # the limits count whole seconds

        assert reasons == [
            "rate limit reached: 3 per minute", "rate limit reached: 5 per hour, 6 per day",
            "rate limit reached: 5 per hour, 6 per day", "rate limit reached: 6 per day",
        ]  # fmt: skip
        assert smtp.visits["slow50ms@example.com"] == 5


def test_deleting_an_account_and_adding_it_again_makes_no_room_in_its_limits(tmp_path: Path, smtp: SmtpServer) -> None:
    limited = account_at("main", smtp, limit_per_hour=4, max_connections=9)
    with SleepyDaemon(tmp_path) as daemon:
        ask(daemon, "/account", limited)
        daemon.submit(*letters("a", 3, "slow500ms@example.com", account_id="main"))
        wait_until(lambda: smtp.visits["slow500ms@example.com"] == 3, "mail on the wire")

        daemon.delete("/account/main")
        ask(daemon, "/account", limited)
        daemon.submit(*letters("b", 3, account_id="main"))

        wait_until(lambda: state_of(daemon, "main") == "limited", "the limit")
        wait_still(daemon)
        assert len(smtp.received) == 4


def test_slots_come_back_when_nothing_was_sent_and_a_limit_may_fail_what_comes_up(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    with SleepyDaemon(tmp_path, {"smtp": {"limit_per_minute": 3}}, smtp=smtp) as daemon:
        ask(daemon, "/account", account_at("strict", smtp, limit_per_minute=2, limit_behavior="error"))
        daemon.submit(*letters("p", 8, "perm@example.com"), *letters("t", 8, "temp@example.com"), *letters("m", 4))
        daemon.submit(*letters("s", 150, account_id="strict", batch_code="strict"))

        def counted(query: str, field_name: str) -> Counter[str]:
            return Counter(m[field_name] for m in daemon.get(f"/messages?{query}").json["messages"])

        errors = {None: 2, "rate limit reached: 2 per minute": 148}
        wait_until(lambda: counted("account_id=strict", "error") == errors, "the end of what is above the limit")
        states = {"error": 8, "deferred": 9, "sent": 3}
        wait_until(lambda: counted("account_id=default", "status") == states, "each in its place")
        assert (state_of(daemon), len(smtp.received)) == ("limited", 5)


COUNTS_RECIPIENTS = {"limit_counts": "recipients", "max_connections": 8}


def accepted_by(server: SmtpServer) -> int:
    return sum(len(received.recipients) for received in list(server.received))


def counted_sends(daemon: Daemon) -> int:
    with daemon.db() as db:
        return int(db.execute("SELECT coalesce(sum(n), 0) FROM sends WHERE account_id = 'main'").fetchone()[0])


@both_engines
def test_a_limit_that_counts_recipients_is_exact_over_connections_and_restarts(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    to = ("slow10ms.a@example.com", "slow10ms.b@example.com")
    with SleepyDaemon(tmp_path) as daemon:
        ask(daemon, "/account", account_at("main", smtp, limit_per_minute=11, **COUNTS_RECIPIENTS))
        daemon.submit(*[letter(f"m-{n}", *to, account_id="main") for n in range(20)])

        limited = wait_until(
            lambda: next(iter(daemon.get("/messages?status=deferred").json["messages"]), None), "the limit"
        )
        wait_still(daemon)
        assert (accepted_by(smtp), counted_sends(daemon)) == (10, 10)  # one more has no room for both
        assert (limited["error"], limited["attempts"]) == ("rate limit reached: 11 recipients per minute", 0)
        assert daemon.status()["accounts"]["main"]["limits_left"] == {"minute": 1}
        daemon.restart()
        daemon.submit(letter("one", account_id="main", priority=0), letter("two", *to, account_id="main"))
        ask(daemon, "/account", account_at("main", smtp, limit_per_minute=11, **COUNTS_RECIPIENTS))
        wait_until(lambda: state_of(daemon, "main") == "limited", "the limit")
        wait_still(daemon)
        assert (accepted_by(smtp), counted_sends(daemon), subjects(smtp)[-1]) == (11, 11, "one")

        daemon.kill()
        daemon.start()
        ask(daemon, "/account", account_at("main", smtp, limit_per_minute=13))  # messages: those to two as well
        wait_until(lambda: state_of(daemon, "main") == "limited", "the limit")
        assert (accepted_by(smtp), counted_sends(daemon)) == (15, 13)


def test_the_slots_of_refused_recipients_come_back_and_a_message_beyond_the_whole_limit_goes_in_parts(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    everybody = [f"ok.{n}@example.com" for n in range(7)]
    with SleepyDaemon(tmp_path) as daemon:
        limited = account_at("main", smtp, limit_per_day=6, **COUNTS_RECIPIENTS)
        ask(daemon, "/account", limited)
        ask(daemon, "/account", {**limited, "id": "strict", "limit_behavior": "reject"})
        refused = ("ok@example.com", "perm@example.com", "550@example.com")
        daemon.submit(*[letter(f"m-{n}", *refused, account_id="main") for n in range(8)])
        wait_until(lambda: state_of(daemon, "main") == "limited", "the limit")
        wait_still(daemon)
        assert (accepted_by(smtp), daemon.status()["accounts"]["main"]["limits_left"]) == (4, {"day": 2})

        daemon.submit(letter("many", *everybody, account_id="main", priority=0))
        daemon.submit(letter("too-many", *everybody, account_id="strict"))
        daemon.submit(letter("some", *refused, *everybody[:3], account_id="strict"))
        assert daemon.wait_status("too-many", "error")["error"] == "rate limit reached: 6 recipients per day"
        assert daemon.wait_status("some", "sent")["error"].startswith("2 of 6 recipients refused")
        assert daemon.status()["accounts"]["strict"]["limits_left"] == {"day": 2}
        for parts in (6, 7):
            daemon.stop()
            with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as db, db:
                db.execute("DELETE FROM sends")  # a day passes
            daemon.start()
            ask(daemon, "/account", limited)
            wait_until(lambda: sum(smtp.visits[one] for one in everybody) == 3 + parts, "the next part")  # noqa: B023
        assert daemon.wait_status("many", "sent")["error"] is None
        parts_of_many = [received for received in smtp.received if received.message["Subject"] == "many"]
        assert [len(received.recipients) for received in parts_of_many] == [6, 1]


@both_engines
def test_when_the_window_opens_those_that_waited_go_first(tmp_path: Path, smtp: SmtpServer) -> None:
    with SleepyDaemon(tmp_path, {"smtp": {"limit_per_minute": 20, "max_connections": 1}}, smtp=smtp) as daemon:
        daemon.stop()
        opens_ts = int(time.time()) + 2
        daemon.change("INSERT INTO sends VALUES ('default', {}, {}, 20)", opens_ts // 60 - 1, opens_ts - 60)
        daemon.start()
        daemon.submit(*letters("m", 80))

        received = smtp.wait_for(20)
        wait_still(daemon)
        assert 0 <= received[0].arrived_at - opens_ts < 20
        assert subjects(smtp) == [f"m-{number}" for number in range(20)]


# -- what is due, and in which order


def test_run_now_in_test_mode_brings_out_what_is_due_and_no_more(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    with SleepyDaemon(
        tmp_path, {"delivery": {"test_mode": "true", "send_interval_seconds": 0.1}}, smtp=smtp, reports=reports
    ) as daemon:
        daemon.submit(*letters("m", 70), letter("later", deferred_ts=int(time.time()) + 3600))
        time.sleep(0.3)
        assert (len(smtp.received), len(reports.calls)) == (0, 0)

        ask(daemon, "/commands/run-now")
        reports.wait_for(lambda r: len(r.acknowledged) == 70)
        daemon.submit(letter("next"))
        time.sleep(0.3)
        assert len(smtp.received) == 70

        ask(daemon, "/commands/run-now")
        reports.wait_for_entry("next", "sent")


@both_engines
def test_mail_is_given_up_for_its_age_only_after_a_try_and_expires_wherever_it_waits(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    config = {
        "delivery": {"max_age_seconds": 1, "retry_delays": 1},
        **{f"account:{id_}": {"host": smtp.host, "port": smtp.port} for id_ in ("gone", "quiet")},
        "account:down": {"host": smtp.host, "port": free_port()},
    }
    with SleepyDaemon(tmp_path, config, smtp=smtp, reports=reports) as daemon:
        ask(daemon, "/account", account_at("limited", smtp, limit_per_day=1))
        for account in ("gone", "quiet", "down"):
            ask(daemon, f"/account/{account}/suspend")
            daemon.submit(
                letter(f"{account}-later", account_id=account, deferred_ts=int(time.time()) + 3600),
                letter(f"{account}-expires", account_id=account, expires_ts=int(time.time()) + 2),
                *letters(account, 3, account_id=account),
            )
        daemon.submit(letter("refused", "temp@example.com", account_id="quiet"))
        daemon.submit(*letters("limited", 3, account_id="limited"), letter("retried", "greylist1@example.com"))
        del daemon.config["account:gone"]
        daemon.write_config()
        daemon.signal(signal.SIGHUP)
        daemon.wait_status("retried", "deferred")
        daemon.signal(signal.SIGSTOP)
        time.sleep(1)
        daemon.signal(signal.SIGCONT)

        for account in ("gone", "quiet", "down"):
            error = reports.wait_for_entry(f"{account}-expires", "error")["error"]
            assert error == "expired: expires_ts has passed"
        ask(daemon, "/account", account_at("limited", smtp))
        for account in ("quiet", "down"):
            ask(daemon, f"/account/{account}/activate")

        wait_sent(daemon, "retried", *(f"{account}-{n}" for account in ("quiet", "limited") for n in range(3)))
        assert "451" in reports.wait_for_entry("refused", "error")["error"]
        assert smtp.visits["temp@example.com"] == 1
        for n in range(3):
            error = reports.wait_for_entry(f"down-{n}", "error")["error"]
            assert error.startswith("expired: max_age_seconds reached; last: ")
            assert "refused" in error
        assert {daemon.message(f"gone-{n}")["status"] for n in range(3)} == {"queued"}
        assert {daemon.message(f"{id_}-later")["status"] for id_ in ("gone", "quiet", "down")} == {"deferred"}


def test_what_waits_for_a_connection_or_an_attachment_expires_at_its_time(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver, black_hole: socket.socket
) -> None:
    config = {"smtp": {"max_connections": 1}, "attachments": {"allow_hosts": "127.0.0.1"}}
    with SleepyDaemon(tmp_path, config, smtp=smtp, reports=reports) as daemon:
        ask(daemon, "/account", account_at("hole", black_hole))
        ask(daemon, "/account", account_at("other", smtp))
        daemon.submit(*letters("quick", 40))
        wait_still(daemon)
        never = {"filename": "never", "url": f"http://127.0.0.1:{black_hole.getsockname()[1]}/"}
        expires = {"expires_ts": int(time.time()) + 2}
        daemon.submit(
            letter("slow", "slow30@example.com", **expires),
            *letters("behind", 3, **expires),
            letter("connecting", account_id="hole", **expires),
            letter("fetching", account_id="other", attachments=[never], **expires),
        )

        for id_ in ("behind-0", "behind-2", "connecting", "fetching"):
            ended = reports.wait_for_entry(id_, "error", timeout=10)
            assert (ended["error"], ended["attempts"]) == ("expired: expires_ts has passed", 0)
        assert daemon.message("slow")["status"] == "queued"
        daemon.kill()


@both_engines
def test_one_connection_keeps_to_priority_and_order_and_lets_retries_take_turns(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    config = {"delivery": {"retry_delays": 1}, "smtp": {"max_connections": 1}}
    with SleepyDaemon(tmp_path, config, smtp=smtp) as daemon:
        daemon.submit(*(letter(f"old-{number}", f"greylist1+{number}@example.com") for number in range(4)))
        wait_until(lambda: len(smtp.visits) == 4, "the first attempts")
        wait_still(daemon)
        ask(daemon, "/commands/suspend")
        daemon.submit(*letters("low", 3, priority="low"), *letters("new", 4), letter("now", priority=0))
        wait_until(lambda: daemon.status()["deferred"] == 0, "the time of the retries")

        ask(daemon, "/commands/activate")
        smtp.wait_for(12)
        order = subjects(smtp)
        assert order[0] == "now"
        assert order[-3:] == ["low-0", "low-1", "low-2"]
        assert [name for name in order if name.startswith("new")] == [f"new-{n}" for n in range(4)]
        assert [name for name in order if name.startswith("old")] == [f"old-{n}" for n in range(4)]
        kinds = [name[:3] for name in order[1:9]]
        assert all(one != other for one, other in pairwise(kinds)), order


# -- clocks and names that are wrong

TWIST = """
import os, socket, sys, time

true_time, true_look_up = time.time, socket.getaddrinfo


def twisted_time():
    with open(os.environ["WALL_CLOCK_AHEAD"]) as file:
        return true_time() + int(file.read())


def twisted_look_up(host, *more, **options):
    if host and "hangs.example" in str(host):
        time.sleep(60)
    return true_look_up(host, *more, **options)


time.time, socket.getaddrinfo = twisted_time, twisted_look_up
"""


class TwistedDaemon(SleepyDaemon):
    """A daemon whose wall clock the test can set, and whose look-ups of hangs.example do not end."""

    def __init__(self, folder: Path, config: Any = None, **options: Any) -> None:
        self._ahead = folder / "ahead"
        self.set_clock(0)
        (folder / "sitecustomize.py").write_text(TWIST)  # Python runs it before the program
        environment = {"PYTHONPATH": str(folder), "WALL_CLOCK_AHEAD": str(self._ahead)}
        super().__init__(folder, config, environment=environment, **options)

    def set_clock(self, ahead_s: int) -> None:
        """How far the daemon's wall clock is ahead of the true one."""
        new = self._ahead.with_suffix(".new")
        new.write_text(str(ahead_s))
        new.replace(self._ahead)


HOUR_S = 3600


def test_a_clock_that_is_set_by_an_hour_neither_stops_mail_nor_lets_it_rush(tmp_path: Path, smtp: SmtpServer) -> None:
    config = {"delivery": {"retry_delays": 2, "send_interval_seconds": 0.1}}
    with TwistedDaemon(tmp_path, config, smtp=smtp) as daemon:
        ask(daemon, "/account", account_at("limited", smtp, limit_per_hour=3))
        daemon.submit(*letters("l", 9, "ok+l@example.com", account_id="limited"))
        wait_until(lambda: daemon.message("l-8")["status"] == "deferred", "the limit")
        daemon.submit(letter("scheduled", deferred_ts=int(time.time()) + HOUR_S))
        for round_, ahead_s in enumerate((HOUR_S, -HOUR_S)):
            began = time.monotonic()
            daemon.submit(letter(f"m-{round_}", f"greylist1+{round_}@example.com"))
            daemon.wait_status(f"m-{round_}", "deferred")

            daemon.set_clock(ahead_s)
            wait_until(lambda n=round_: daemon.log.count("the wall clock was set") > n, "the daemon to see it")
            now = time.time() + ahead_s
            assert -1 <= daemon.message(f"m-{round_}")["deferred_ts"] - now <= 5
            assert HOUR_S - 100 <= daemon.message("l-8")["deferred_ts"] - now <= HOUR_S + 61
            daemon.wait_status(f"m-{round_}", "sent", timeout=20)

            assert time.monotonic() - began > 1.5
            assert len(smtp.received_by("ok+l@example.com")) == 3
            assert daemon.status()["accounts"]["limited"]["limits_left"] == {"hour": 0}
        assert daemon.message("scheduled")["status"] == "sent"

        daemon.kill()
        daemon.start()
        assert daemon.status()["accounts"]["limited"]["limits_left"] == {"hour": 0}


def test_a_clock_that_is_set_by_years_makes_no_mail_too_old(tmp_path: Path, smtp: SmtpServer) -> None:
    config = {"delivery": {"retry_delays": 1, "send_interval_seconds": 0.1}}
    with TwistedDaemon(tmp_path, config, smtp=smtp) as daemon:
        daemon.submit(letter("m", "greylist2@example.com"))
        daemon.wait_status("m", "deferred")

        daemon.set_clock(10 * 365 * 24 * HOUR_S)
        daemon.wait_status("m", "sent")

        assert smtp.visits["greylist2@example.com"] == 3


def test_hosts_whose_look_up_hangs_hold_up_nobody_else(tmp_path: Path, smtp: SmtpServer) -> None:
    with TwistedDaemon(tmp_path, smtp=smtp) as daemon:
        for number in range(60):
            ask(daemon, "/account", {"id": f"a-{number}", "host": f"{number}.hangs.example", "port": 25})
            daemon.submit(letter(f"a-{number}", account_id=f"a-{number}"))
        wait_until(lambda: daemon.status()["in_delivery"] == 60, "look-ups without an end")

        daemon.submit(letter("m"), letter("large", body="x" * 300_000))

        smtp.wait_for(2)
        started = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - started < 20


# -- accounts


def test_a_suspended_account_delivers_nothing_and_others_go_on(tmp_path: Path, smtp: SmtpServer) -> None:
    with SleepyDaemon(tmp_path, smtp=smtp) as daemon:
        ask(daemon, "/account", account_at("main", smtp))
        daemon.submit(*letters("s", 25, "slow100ms@example.com", account_id="main"))
        wait_until(lambda: smtp.visits["slow100ms@example.com"] >= 5, "mail on the wire")

        ask(daemon, "/account/main/suspend")
        begun = smtp.visits["slow100ms@example.com"]
        daemon.submit(letter("m"))
        wait_sent(daemon, "m")
        wait_still(daemon)
        assert smtp.visits["slow100ms@example.com"] <= begun + 1  # one may have been on its way
        assert state_of(daemon, "main") == "suspended"
        daemon.restart()
        assert state_of(daemon, "main") == "suspended"

        ask(daemon, "/account/main/activate")
        smtp.wait_for(26)
        assert len(smtp.received) == 26


@pytest.mark.parametrize(
    "switch", ["/account/main/{}", "/commands/{}", "/commands/{}?batch_code=b"], ids=["account", "all", "batch"]
)
def test_a_message_to_many_rests_between_two_transactions_once_it_is_suspended(
    tmp_path: Path, smtp: SmtpServer, switch: str
) -> None:
    with SleepyDaemon(tmp_path, smtp=smtp) as daemon:
        ask(daemon, "/account", account_at("main", smtp, max_recipients=1))
        everybody = ["ok@example.com", "slow2000ms@example.com", "ok@1.example.com", "ok@2.example.com"]
        daemon.submit(letter("m", *everybody, account_id="main", batch_code="b"))
        wait_until(lambda: smtp.visits["slow2000ms@example.com"], "the second transaction")

        ask(daemon, switch.format("suspend"))
        wait_still(daemon)
        assert [one.recipients for one in smtp.received] == [[one] for one in everybody[:2]]  # what began is finished
        assert daemon.message("m")["status"] == "queued"

        ask(daemon, switch.format("activate"))
        wait_sent(daemon, "m")
        assert [one.recipients[0] for one in smtp.received] == everybody
        assert daemon.message("m")["attempts"] == 1


@both_engines
def test_the_mail_of_a_deleted_account_ends_as_errors(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver, black_hole: socket.socket
) -> None:
    with SleepyDaemon(tmp_path, smtp=smtp, reports=reports) as daemon:
        ask(daemon, "/account", account_at("main", black_hole, limit_per_minute=100))
        daemon.submit(*letters("m", 30, account_id="main"), letter("large", body="x" * 100_000, account_id="main"))
        wait_until(lambda: daemon.status()["in_delivery"], "connections to nowhere")

        assert daemon.delete("/account/main").status == 200

        reports.wait_for(lambda r: len(r.entries) == 31)
        assert {(entry["status"], entry["error"]) for entry in reports.entries} == {("error", "account deleted")}
        assert (daemon.status()["pending"], daemon.status()["in_delivery"]) == (0, 0)


def test_staging_sends_everything_to_one_address_or_to_allowed_ones_only(tmp_path: Path, smtp: SmtpServer) -> None:
    with SleepyDaemon(tmp_path, {"delivery": {"redirect_to": "staging@bücher.example"}}, smtp=smtp) as daemon:

        def renew(**delivery: object) -> None:
            before = daemon.log.count("configuration reloaded")
            daemon.config["delivery"] = {"retry_delays": 1, **delivery}
            daemon.write_config()
            daemon.signal(signal.SIGHUP)
            wait_until(lambda: daemon.log.count("configuration reloaded") > before, "the new configuration")

        daemon.submit(letter("all", "a@example.com", "b@example.com"))
        received = smtp.wait_for(1)[0]
        assert received.recipients == ["staging@xn--bcher-kva.example"]
        assert "a@example.com" in received.message["X-Original-To"]

        renew(redirect_to="greylist9@example.org")
        daemon.submit(letter("waits", "a@example.com"))
        daemon.wait_status("waits", "deferred")
        renew(allow_recipients="@Bücher.example, a@example.com")
        assert daemon.wait_status("waits", "sent")["recipients"] is None
        assert smtp.received[1].recipients == ["a@example.com"]

        daemon.submit(letter("m", "A@example.com", "x@bücher.example", "b@example.com"), letter("n", "b@example.com"))
        assert daemon.wait_status("n", "error")["error"] == "recipient not allowed here"
        assert daemon.wait_status("m", "sent")["recipients"]["b@example.com"]["status"] == "error"
        assert sorted(smtp.wait_for(3)[2].recipients) == ["A@example.com", "x@xn--bcher-kva.example"]


# -- accidents


def test_a_damaged_row_becomes_an_error_of_its_own(tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver) -> None:
    damage = {"m-1": "{cut off", "m-2": "[1, 2]", "m-3": '{"a@example.com": ["nonsense", 1, ""]}'}
    columns = ("priority", "created_at", "expires_ts", "attempts", "ready_at", "parts", "deferred_ts")
    with SleepyDaemon(tmp_path, smtp=smtp, reports=reports) as daemon:
        ask(daemon, "/commands/suspend")
        daemon.submit(*letters("m", 6), letter("late", expires_ts=int(time.time()) + 1))
        daemon.submit(letter("large", body="x" * 100_000))
        daemon.submit(*(letter(column) for column in columns))
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db", timeout=10)) as db, db:
            for id_, recipients in damage.items():
                db.execute("UPDATE messages SET recipients = ? WHERE id = ?", (recipients, id_))
            db.execute("UPDATE messages SET payload = '{\"subject\": ' WHERE id = 'm-4'")
            db.execute("UPDATE messages SET payload = '{}' WHERE id = 'large'")
            db.execute("UPDATE messages SET recipients = '{' WHERE id = 'late'")
            for column in columns:  # each is text, where a number should be
                db.execute(f"UPDATE messages SET {column} = 'x' WHERE id = ?", (column,))  # noqa: S608
        for path in ("/message/m-1", "/message/m-4?content=1", "/messages"):
            assert daemon.get(path).status == 200, path
        reports.wait_for_entry("late", "error")

        ask(daemon, "/commands/activate")

        wait_sent(daemon, "m-0", "m-5")
        for id_ in (*damage, "m-4", "large", *columns[:-1]):
            assert reports.wait_for_entry(id_, "error")["error"].startswith("internal error: ")
        assert sorted(subjects(smtp)) == ["m-0", "m-5"]


def test_an_outcome_that_cannot_be_written_ends_its_message_in_doubt(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    with SleepyDaemon(tmp_path, smtp=smtp, reports=reports) as daemon:
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db", timeout=10)) as db, db:
            db.execute(
                "CREATE TRIGGER damage BEFORE UPDATE OF sent_ts ON messages WHEN new.id = 'm-1' "
                "AND new.sent_ts IS NOT NULL BEGIN SELECT RAISE(ABORT, 'damaged'); END"
            )
        daemon.submit(*letters("m", 3))

        error = reports.wait_for_entry("m-1", "error")["error"]
        assert error == "in doubt: internal error (IntegrityError)"
        wait_sent(daemon, "m-0", "m-2")
        assert daemon.status()["in_delivery"] == 0
        daemon.restart()
        assert sorted(subjects(smtp)) == ["m-0", "m-1", "m-2"]


def test_a_stalled_server_keeps_no_memory_from_the_attachments_of_another_account(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    config = {"attachments": {"memory_budget_bytes": 3_000_000}}

    def large(id_: str, to: str, size_bytes: int, account: str) -> dict[str, Any]:
        content = base64.b64encode(bytes(size_bytes)).decode()
        return letter(id_, to, account_id=account, attachments=[{"filename": "a", "content": content}])

    with SleepyDaemon(tmp_path, config, smtp=smtp) as daemon:
        ask(daemon, "/account", account_at("stalled", smtp))
        daemon.submit(*(large(f"s-{number}", "slow60@example.com", 700_000, "stalled") for number in range(6)))
        wait_until(lambda: smtp.visits["slow60@example.com"] and daemon.status()["in_delivery"] == 6, "the stall")

        daemon.submit(large("m", "ok@example.com", 100_000, "default"))
        smtp.wait_for(1)
        daemon.submit(*(large(f"m-{number}", "slow50ms@example.com", 600_000, "default") for number in range(8)))

        smtp.wait_for(9)
        daemon.kill()


def test_three_messages_refused_alike_stop_the_others_and_one_accepted_lets_them_go(tmp_path: Path) -> None:
    refusals = [f"554 5.7.0 <m-{number}@x> {number}A9: policy violation" for number in range(4)]
    with moody_daemon(tmp_path, {"smtp": {"max_connections": 2}}, MAIL=[0.0, *refusals[:3]], **{".": [1.0]}) as (
        moody,
        daemon,
    ):
        daemon.submit(*letters("m", 8))
        told = daemon.wait_for_log("an account is refused")

        wait_until(lambda: len(moody.received) == 5, "the others, as soon as the slow one is through", timeout=4)
        wait_still(daemon)
        records = daemon.get("/messages").json["messages"]
        assert Counter(record["status"] for record in records) == {"error": 3, "sent": 5}
        assert ("ERROR" in told, "policy violation" in told, "ask the provider" in told) == (True, True, True)
        assert state_of(daemon) == "up"


def test_an_outage_of_the_storage_is_told_once_and_so_is_its_end(tmp_path: Path, smtp: SmtpServer) -> None:
    storage = FaultyStorage(tmp_path)
    with Daemon(tmp_path, smtp=smtp, environment=storage.environment) as daemon:
        with storage.fails("full"):
            assert submitted(daemon, letter("refused")).status == 503
            ask(daemon, "/commands/run-now")
            daemon.wait_for_log("delivery waits for the storage")
            tries = refused_commits(daemon)
            wait_until(lambda: refused_commits(daemon) > tries, "another try")

        daemon.submit(letter("m"))
        wait_sent(daemon, "m")
        daemon.wait_for_log("delivery goes on: the storage works again")
        assert daemon.log.count("delivery waits for the storage") == 1


# -- the end


def test_sigterm_lets_what_is_on_the_wire_finish_and_a_second_one_ends_at_once_and_loses_nothing(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    with SleepyDaemon(tmp_path, {"smtp": {"max_connections": 10}}, smtp=smtp) as daemon:
        daemon.submit(*letters("m", 15, "slow800ms@example.com"))
        wait_until(lambda: smtp.visits["slow800ms@example.com"] == 10, "mail on the wire")
        assert daemon.stop() == 0
        assert len(smtp.received) == 10

        daemon.start()
        smtp.wait_for(15)
        wait_still(daemon)
        assert len(set(subjects(smtp))) == len(smtp.received) == 15

        daemon.submit(*letters("n", 12, "slow60@example.com"))
        wait_until(lambda: smtp.visits["slow60@example.com"] == 10, "mail on the wire")
        daemon.signal(signal.SIGTERM)
        wait_until(lambda: daemon.log.count("stopping") == 2, "the beginning of the end")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait_for_exit(20) == 0
        with daemon.db() as db:
            pending = "SELECT count(*) FROM messages WHERE sent_ts IS NULL AND error_ts IS NULL"
            assert db.execute(pending).fetchone()[0] == 12


def test_waiting_costs_no_processor_time(tmp_path: Path, smtp: SmtpServer, black_hole: socket.socket) -> None:
    with SleepyDaemon(
        tmp_path, {"smtp": {"max_connections": 20}, "delivery": {"send_interval_seconds": 0.5}}, smtp=smtp
    ) as daemon:
        expires_ts = int(time.time()) + 2
        daemon.submit(letter("overdue", "slow30@example.com", expires_ts=expires_ts))
        wait_until(lambda: smtp.visits["slow30@example.com"] == 1, "what will be overdue on the wire")
        ask(daemon, "/account", account_at("down", SimpleNamespace(host="127.0.0.1", port=free_port())))
        ask(daemon, "/account", account_at("limited", smtp, limit_per_minute=1))
        ask(daemon, "/account", account_at("hole", black_hole))
        ask(daemon, "/account", account_at("suspended", smtp))
        ask(daemon, "/account/suspended/suspend")
        for account in ("down", "limited", "hole", "suspended"):
            daemon.submit(*letters(account, 60, account_id=account))
        daemon.submit(*letters("slow", 5, "slow30@example.com"))
        wait_until(lambda: state_of(daemon, "limited") == "limited" and state_of(daemon, "down") == "cooling", "a jam")
        wait_until(lambda: smtp.visits["slow30@example.com"] == 6, "mail on the wire")
        wait_until(lambda: time.time() > expires_ts + 0.2, "what is overdue")

        for command in ("activate", "suspend"):
            ask(daemon, f"/commands/{command}")
            before = cpu_seconds(daemon)
            time.sleep(0.5)
            assert cpu_seconds(daemon) - before < 0.08, command
        daemon.kill()


def test_a_server_that_knows_no_bdat_has_mail_by_data_until_its_account_is_replaced(tmp_path: Path) -> None:
    with (
        SmtpServer(chunking=True, rule=lambda verb, *_: "500 5.5.1 What?" if verb == "BDAT" else None) as server,
        SleepyDaemon(tmp_path, {"smtp": {"max_connections": 1}}, smtp=server) as daemon,
    ):
        daemon.submit(*letters("ignorant", 3))
        sent = wait_sent(daemon, *(f"ignorant-{n}" for n in range(3)))
        assert (server.heard["BDAT"], {record["attempts"] for record in sent}) == (1, {1})
        assert "account=default error=" in daemon.wait_for_log("no CHUNKING with this server")

        server.rule = None
        daemon.config["delivery"]["retry_delays"] = 1
        for number, (section, *setting) in enumerate([("smtp", "timeout", 50), ("delivery", "chunking", "false")], 1):
            daemon.config[section].update([setting])
            daemon.write_config()
            daemon.signal(signal.SIGHUP)
            wait_until(lambda: daemon.log.count("configuration reloaded") == number, "the configuration")  # noqa: B023
            daemon.submit(letter(section), letter(f"{section} again", "lost1@example.com"))
            wait_sent(daemon, section, f"{section} again")
            assert server.heard["BDAT"] == 3  # the second attempt goes by DATA


# ======================================================================
# PROVIDERS AS THEY ARE - what a reply is about, and what becomes of the mail
# ======================================================================
#
# A test for each row: the server has a rule, the daemon comes as it is, only the pauses of its lanes are shorter.
# Whether something was tried too often is counted, not timed.

SHORT_PAUSES = {"COOLING_S": [0.3], "ACCOUNT_COOLING_S": [0.5]}


@contextlib.contextmanager
def providers(
    folder: Path, reports: ReportReceiver, *rules: Rule | None, pauses: Any = None, delays: str = "3600", **account: Any
) -> Iterator[tuple[SleepyDaemon, list[SmtpServer]]]:
    """A daemon with an account, p0, p1 and so on, at a provider for each rule."""
    environment = {"PAUSES": json.dumps({**SHORT_PAUSES, **(pauses or {})})}
    config = {"delivery": {"retry_delays": delays}}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(SmtpServer(pipelining=True, rule=rule, max_recipients=100)) for rule in rules]
        daemon = stack.enter_context(SleepyDaemon(folder, config, reports=reports, environment=environment))
        for number, server in enumerate(servers):
            ask(daemon, "/account", account_at(f"p{number}", server, **account))
        yield daemon, servers


def refuses(at: str, reply: str) -> Rule:
    return lambda verb, _visit, _argument: reply if verb == at else None


def mail_for(account: str, count: int, *to: str) -> list[dict[str, Any]]:
    return [letter(f"{account}-{n}", *to, account_id=account) for n in range(count)]


def wait_all_settled(daemon: Daemon) -> None:
    """Until every message has had its end, and it was reported."""
    wait_until(lambda: (now := daemon.status())["pending"] == now["unreported"] == 0, "the end of all mail", 15)


def became(daemon: Daemon, account: str = "p0") -> Counter[tuple[str, int]]:
    """How many messages of the account have which status and attempts."""
    records = daemon.get(f"/messages?account_id={account}").json["messages"]
    return Counter((record["status"], record["attempts"]) for record in records)


def account_up(daemon: Daemon, account: str = "p0") -> float:
    exposition = daemon.get("/metrics").content.decode()
    return float(re.search(rf'mailproxy_account_up{{account="{account}"}} (\S+)', exposition)[1])


def errors_of(daemon: Daemon, account: str = "p0") -> list[str]:
    return [line for line in daemon.log.splitlines() if " ERROR " in line and f"account={account} " in line]


def no_trouble(daemon: Daemon, reports: ReportReceiver, servers: list[SmtpServer], count: int) -> None:
    """Every message went out once and at its first attempt; nobody was told of anything else."""
    wait_all_settled(daemon)
    for number, server in enumerate(servers):
        assert became(daemon, f"p{number}") == {("sent", 1): count}
        assert sorted(subjects(server)) == sorted(f"p{number}-{n}" for n in range(count))
        assert (account_up(daemon, f"p{number}"), state_of(daemon, f"p{number}")) == (1, "up")
    assert {entry["status"] for entry in reports.entries} == {"sent"}
    assert not re.search(r"cooling| ERROR ", daemon.log)


# -- about the session


def test_a_connection_that_refuses_all_mail_takes_none_from_another(tmp_path: Path, reports: ReportReceiver) -> None:
    here: dict[str, int] = {}

    async def one_at_a_time(verb: str, visit: Visit, _: str) -> str | None:
        if verb == "MAIL" and here.setdefault("the first", visit.number) != visit.number:
            return "432 4.3.2 Concurrent connections limit exceeded"
        await asyncio.sleep(0.05 if verb == "." else 0)
        return None

    with providers(tmp_path, reports, one_at_a_time, max_connections=2) as (daemon, servers):
        daemon.submit(*mail_for("p0", 20))

        no_trouble(daemon, reports, servers, 20)
        assert servers[0].said["MAIL"] <= 3


def test_a_server_that_serves_three_at_a_time_gets_no_more(tmp_path: Path, reports: ReportReceiver) -> None:
    served = most = 0

    async def three(verb: str, _visit: Visit, _: str) -> str | None:
        nonlocal served, most
        if verb == "." and served == 3:
            return "432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded"
        if verb == ".":
            served += 1
            most = max(most, served)
            await asyncio.sleep(0.1)
            served -= 1
        return None

    with providers(tmp_path, reports, three) as (daemon, servers):
        daemon.submit(*mail_for("p0", 45))

        no_trouble(daemon, reports, servers, 45)
        assert (most, servers[0].said["."] < 15) == (3, True), servers[0].said


@pytest.mark.parametrize(("most", "connections"), [(5, 1), (1, 4)])
def test_so_many_messages_a_session_cost_a_new_connection_each_and_nothing_else(
    tmp_path: Path, reports: ReportReceiver, most: int, connections: int
) -> None:
    replies = (
        "421 4.7.0 Too many messages in this connection", "451 4.7.0 Temporary server error", "452 4.4.5 Enough",
        "550 This message has exceeded the max number of messages per session. IB510", "drop",
    )  # fmt: skip

    def full(reply: str, verb: str, visit: Visit, _: str) -> str | None:
        return reply if verb == "MAIL" and visit.taken >= most else None

    rules = [functools.partial(full, reply) for reply in replies]
    with providers(tmp_path, reports, *rules, max_connections=connections) as (daemon, servers):
        for number in range(len(replies)):
            daemon.submit(*mail_for(f"p{number}", 20))

        no_trouble(daemon, reports, servers, 20)
        for server in servers:
            assert 20 / most <= server.connections < 20 / most + connections
            assert max(Counter(received.connection for received in server.received).values()) == most


def test_where_no_session_is_served_mail_waits_untouched_until_one_is(tmp_path: Path, reports: ReportReceiver) -> None:
    reply = "432 4.3.2 Concurrent connections limit exceeded"
    with providers(tmp_path, reports, refuses("MAIL", reply)) as (daemon, [server]):
        daemon.submit(*mail_for("p0", 20))
        daemon.wait_for_log("cooling")
        assert daemon.status()["accounts"]["p0"]["reason"] == reply
        assert set(became(daemon)) <= {("queued", 0), ("deferred", 0)}
        server.rule = None

        wait_all_settled(daemon)
        assert became(daemon) == {("sent", 1): 20}
        assert {(e["status"], e["attempts"]) for e in reports.entries} == {("deferred", 0), ("sent", 1)}
        assert (len(server.received), account_up(daemon), errors_of(daemon)) == (20, 1, [])


def rate(limit: int, window_s: float) -> Rule:
    """So many MAIL commands in any window, then 450."""
    times: deque[float] = deque(maxlen=limit)

    def rule(verb: str, _visit: Visit, _: str) -> str | None:
        now = time.monotonic()
        if verb == "MAIL" and len(times) == limit and now - times[0] < window_s:
            return "450 4.7.1 Error: too much mail from 127.0.0.1"
        if verb == "MAIL":
            times.append(now)
        return None

    return rule


def test_a_rate_limit_of_the_server_costs_few_refusals(tmp_path: Path, reports: ReportReceiver) -> None:
    pauses = {"COOLING_S": [0.05, 0.15, 0.6, 3]}  # a hundredth of the usual, and of a minute
    with providers(tmp_path, reports, rate(10, 0.6), pauses=pauses) as (daemon, [server]):
        daemon.submit(*mail_for("p0", 40))

        wait_all_settled(daemon)
        assert became(daemon) == {("sent", 1): 40}
        assert (len(server.received), server.said["MAIL"] < 60, errors_of(daemon)) == (40, True, [])


def test_a_server_that_says_how_long_to_wait_is_left_alone_for_so_long(tmp_path: Path, reports: ReportReceiver) -> None:
    times: list[float] = []

    def wait_a_second(verb: str, _visit: Visit, _: str) -> str | None:
        times.extend([time.monotonic()] if verb == "MAIL" else [])
        return "450 4.7.1 Too many messages. Try again in 1 seconds" if verb == "MAIL" and len(times) == 1 else None

    with providers(tmp_path, reports, wait_a_second, pauses={"COOLING_S": [0.01]}, max_connections=1) as (daemon, _):
        daemon.submit(*mail_for("p0", 3))

        wait_all_settled(daemon)
        assert became(daemon) == {("sent", 1): 3}
        assert times[1] - times[0] >= 1


# -- about the account

ACCOUNT_REPLIES = [  # at which verb, the reply, a word of the cure
    ("MAIL", "530 5.7.0 Authentication required", "user"),
    ("MAIL", "530 5.7.57 Client not authenticated to send mail", "user"),
    (".", "550 5.4.5 Daily user sending limit exceeded. For more information", "limit_per_day"),
    (".", "554 5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException; Failed", "limit_per_day"),
    (".", "550 5.4.6 Unusual sending activity detected.", "blocked"),
    (".", "550 5.1.8 Access denied, bad outbound sender", "blocked"),
    ("RCPT", "554 5.7.1 <ok@example.com>: Relay access denied", "user"),
    ("RCPT", "504 5.5.2 <foo>: Helo command rejected: need fully-qualified hostname", "hostname"),
    (".", "554 5.7.0 Ask Joe at the office", ""),  # known by account_replies only
]


def test_what_a_server_says_of_the_account_never_touches_its_queue(tmp_path: Path, reports: ReportReceiver) -> None:
    rules = [refuses(at, reply) for at, reply, _ in ACCOUNT_REPLIES]
    with providers(tmp_path, reports, *rules, account_replies="454 no, 554 5.7.0 ask joe") as (daemon, servers):
        for number in range(len(rules)):
            daemon.submit(*mail_for(f"p{number}", 20))
        for number, (_, reply, cure) in enumerate(ACCOUNT_REPLIES):
            account = f"p{number}"
            errors = wait_until(lambda account=account: errors_of(daemon, account), f"a line about {reply}", 15)
            assert (reply in errors[0], cure in errors[0].replace(reply, "")) == (True, True), errors
            assert daemon.status()["accounts"][account]["reason"] == reply
            assert account_up(daemon, account) == 0
            assert set(became(daemon, account)) <= {("queued", 0), ("deferred", 0)}
            servers[number].rule = None  # it changes its mind

        wait_all_settled(daemon)
        for number, (verb, reply, _) in enumerate(ACCOUNT_REPLIES):
            account, server = f"p{number}", servers[number]
            assert became(daemon, account) == {("sent", 1): 20}
            assert sorted(subjects(server)) == sorted(f"{account}-{n}" for n in range(20))
            assert account_up(daemon, account) == 1
            first = server.said[verb] - (len(errors_of(daemon, account)) - 1)  # a line for each later try
            assert 1 <= first <= 5, (reply, server.said)
        deferred = [entry for entry in reports.entries if entry["status"] == "deferred"]
        assert {entry["error"] for entry in deferred} == {reply for _, reply, _ in ACCOUNT_REPLIES}
        assert {(e["status"], e["attempts"]) for e in reports.entries} == {("deferred", 0), ("sent", 1)}


def test_relaying_denied_to_one_recipient_holds_up_no_others(tmp_path: Path, reports: ReportReceiver) -> None:
    def internal_only(verb: str, _visit: Visit, address: str) -> str | None:
        return "554 5.7.1 Relay access denied" if verb == "RCPT" and "outside" in address else None

    with providers(tmp_path, reports, internal_only) as (daemon, _):
        daemon.submit(letter("m", "outside@example.com", account_id="p0"), *mail_for("p0", 5))

        wait_all_settled(daemon)
        assert became(daemon) == {("error", 1): 1, ("sent", 1): 5}
        assert (len(errors_of(daemon)) <= 1, account_up(daemon), state_of(daemon, "p0")) == (True, 1, "up")


@pytest.mark.parametrize("at", ["MAIL", "RCPT", "."])
def test_the_same_refusal_to_every_message_stops_the_lane_before_the_queue_is_lost(
    tmp_path: Path, reports: ReportReceiver, at: str
) -> None:
    counter = itertools.count(4711)

    def unknown_words(verb: str, _visit: Visit, argument: str) -> str | None:
        return f"554 5.7.1 Policy forbids {argument[:14]} (ref {next(counter)})" if verb == at else None

    with providers(tmp_path, reports, unknown_words, max_connections=1) as (daemon, [server]):
        daemon.submit(*(letter(f"m-{n}", f"ok+{n}@example.com", account_id="p0") for n in range(20)))
        wait_until(lambda: errors_of(daemon), "a line that says so", 15)
        assert (account_up(daemon), "forbids" in daemon.status()["accounts"]["p0"]["reason"]) == (0, True)
        server.rule = None

        wait_all_settled(daemon)
        lost = 2 + len(errors_of(daemon))  # three, and one for each later try
        assert lost <= 5
        assert became(daemon) == {("error", 1): lost, ("sent", 1): 20 - lost}
        assert (server.said[at], account_up(daemon), state_of(daemon, "p0")) == (lost, 1, "up")


# -- about the message


def test_a_421_about_one_content_is_only_that_messages(tmp_path: Path, reports: ReportReceiver) -> None:
    def fears(verb: str, _visit: Visit, content: str) -> str | None:
        return "421 4.7.0 Because of the nature of the content" if verb == "." and "poison" in content else None

    with providers(tmp_path, reports, fears, max_connections=3) as (daemon, [server]):
        good = mail_for("p0", 90, "slow50ms@example.com")
        daemon.submit(*good[:5], letter("poison", account_id="p0"), *good[5:])

        wait_until(lambda: daemon.message("poison")["attempts"] == 1, "the attempt that counts, while others pass")
        assert daemon.message("poison")["error"] == "421 4.7.0 Because of the nature of the content"
        wait_until(lambda: daemon.status()["pending"] == 1, "the end of all others")
        assert (became(daemon)["sent", 1], server.said["."] <= 12) == (90, True), server.said
        assert account_up(daemon) == 1
        assert {e["id"] for e in reports.entries if e["status"] == "deferred"} == {"poison"}


# -- about recipients


def test_every_second_recipient_refused_for_now_is_served_at_once(tmp_path: Path, reports: ReportReceiver) -> None:
    def every_other(verb: str, visit: Visit, _: str) -> str | None:
        return "451 4.3.0 One destination at a time" if verb == "RCPT" and visit.recipients % 2 == 0 else None

    with providers(tmp_path, reports, every_other) as (daemon, servers):
        recipients = [f"ok+{n}@example.com" for n in range(20)]
        daemon.submit(*mail_for("p0", 1, *recipients))

        wait_sent(daemon, "p0-0")
        assert sorted(a for r in servers[0].received for a in r.recipients) == sorted(recipients)
        assert len(servers[0].received) == 5
        assert {entry["status"] for entry in reports.entries} <= {"sent"}
        assert became(daemon) == {("sent", 1): 1}


def test_greylisting_keeps_its_connection_and_its_schedule(tmp_path: Path, reports: ReportReceiver) -> None:
    with providers(tmp_path, reports, None, delays="1, 3600", max_connections=1) as (daemon, [server]):
        daemon.submit(*(letter(f"m-{n}", f"greylist1+{n}@example.com", account_id="p0") for n in range(10)))
        wait_all_settled(daemon)
        assert became(daemon) == {("sent", 2): 10}
        assert set(server.visits.values()) == {2}

        daemon.submit(letter("both", "ok@example.com", "greylist1+both@example.com", account_id="p0"))
        assert daemon.wait_status("both", "sent")["attempts"] == 1
        daemon.submit(letter("later", "ok+later@example.com", "greylist9@example.com", account_id="p0"))
        assert daemon.wait_status("later", "deferred")["attempts"] == 1
        assert server.visits["greylist9@example.com"] == 2
        assert len(server.received_by("ok+later@example.com")) == 1
        assert (server.connections, "cooling" in daemon.log) == (1, False)


def strict(errors: int, last: str) -> Rule:
    """Ends the session after so many recipients nobody knows."""

    def rule(verb: str, visit: Visit, argument: str) -> str | None:
        if verb == "RCPT" and visit.refused >= errors and last.startswith("421"):
            return last
        if verb == "RCPT" and "unknown" in argument:
            return "550 5.1.1 No such user" + (last if visit.refused == errors - 1 and last == ". Bye" else "")
        return None

    return rule


@pytest.mark.parametrize("last", [". Bye", "421 4.7.0 Error: too many errors"])
def test_a_server_that_hangs_up_after_errors_costs_no_recipient_and_no_time(
    tmp_path: Path, reports: ReportReceiver, last: str
) -> None:
    with providers(tmp_path, reports, strict(3, last), strict(20, last)) as (daemon, [server, patient]):
        mixed = [f"{'unknown' if n % 2 else 'ok'}+{n}@example.com" for n in range(8)]
        single = [letter(f"s-{n}", f"{'unknown' if n % 2 else 'ok'}@example.com", account_id="p0") for n in range(20)]
        daemon.submit(*mail_for("p0", 20, *mixed), *single)
        daemon.submit(*mail_for("p1", 1, *(f"unknown+{n}@example.com" for n in range(100)), "ok@example.com"))

        wait_all_settled(daemon)
        for record in daemon.get("/messages?account_id=p0").json["messages"]:
            if record["id"].startswith("p0"):
                statuses = {address: outcome["status"] for address, outcome in record["recipients"].items()}
                assert statuses == {address: "error" if "unknown" in address else "sent" for address in mixed}
                assert record["error"].startswith("4 of 8 recipients refused: 550 5.1.1 No such user")
        copies = Counter((r.message["Subject"], address) for r in server.received for address in r.recipients)
        assert (len(copies), set(copies.values())) == (20 * 4 + 10, {1})
        assert became(daemon) == {("sent", 1): 30, ("error", 1): 10}
        record = daemon.message("p1-0")
        assert Counter(outcome["code"] for outcome in record["recipients"].values()) == {550: 100, 250: 1}
        assert (record["attempts"], len(patient.received), "cooling" in daemon.log) == (1, 1, False)
        assert patient.connections <= 12


def test_a_tarpit_that_doubles_its_delay_costs_no_attempt(tmp_path: Path, reports: ReportReceiver) -> None:
    async def tarpit(verb: str, visit: Visit, argument: str) -> str | None:
        if verb != "RCPT" or "unknown" not in argument:
            return None
        await asyncio.sleep(0.02 * 2**visit.refused)
        return "550 5.1.1 No such user"

    with providers(tmp_path, reports, tarpit) as (daemon, [server]):
        daemon.submit(*mail_for("p0", 1, *(f"unknown+{n}@example.com" for n in range(6)), "ok@example.com"))

        wait_all_settled(daemon)
        assert became(daemon) == {("sent", 1): 1}
        assert (server.connections, server.heard["MAIL"]) == (1, 1)


def test_150_recipients_where_100_are_taken_go_in_two_transactions(tmp_path: Path, reports: ReportReceiver) -> None:
    with providers(tmp_path, reports, None, max_recipients=150) as (daemon, [server]):
        daemon.submit(*mail_for("p0", 1, *(f"ok+{n}@example.com" for n in range(150))))

        wait_all_settled(daemon)
        assert became(daemon) == {("sent", 1): 1}
        assert [len(received.recipients) for received in server.received] == [100, 50]
        assert server.heard["MAIL"] == 2


# ======================================================================
# REPORTER
# ======================================================================


def mail(id_: str = "m-1", to: str = "ok@example.com", **fields: Any) -> dict[str, Any]:
    """A message as a client submits it; the recipient's address says how the server will take it."""
    return {"id": id_, "from": "me@example.com", "to": [to], "subject": "hello", "body": "Hello.", **fields}


# -- the signature, and what an answer means


def test_the_signature_is_the_one_of_the_standard_webhooks_specification() -> None:
    key = mailproxy.webhook_key("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")

    signature = mailproxy.webhook_signature(key, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')

    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_2xx_acknowledges_unless_its_json_says_ok_false() -> None:
    taken = [b'{"ok": true}', b'{"ok": null}', b'{"ok": 0}', b"[false]", b'{"error": ["m-1"], "not_found": ["m-2"]}']
    taken += [b"", b"<html>thank you</html>", b"\xff\xfe", b"[" * 100_000]
    refused = [(200, b'{"ok": false}'), (200, b'{"ok": false, "queued": 3}'), (301, b'{"ok": true}')]
    refused += [(307, b""), (404, b""), (500, b'{"ok": true}')]

    for status, body in [*((200, body) for body in taken), (204, b""), (299, b"<html>thank you</html>"), *refused]:
        answer = mailproxy.parse_acknowledgement(status, body)
        outcome = "refused" if (status, body) in refused else "acknowledged"
        assert (answer.outcome, answer.problem is None) == (outcome, outcome == "acknowledged"), (status, body)


def test_of_an_acknowledgement_only_sensible_numbers_count_and_remarks_are_not_endless() -> None:
    numbers = {b'"queued": 3': (3, None), b'"next_sync_after": 1800000000': (0, 1_800_000_000)}
    numbers[b'"next_sync_after": 1800000000.5'] = (0, 1_800_000_000.5)
    for nothing in (b"0", b"-1", b"true", b'"3"', b'null, "next_sync_after": null', b"1" + b"0" * 5000):
        numbers[b'"queued": ' + nothing] = (0, None)
    for nothing in (b"true", b"NaN", b"Infinity", b"1" + b"0" * 400, b"1800000000000"):  # the last is in milliseconds
        numbers[b'"next_sync_after": ' + nothing] = (0, None)

    for fields, expected in numbers.items():
        answer = mailproxy.parse_acknowledgement(200, b"{" + fields + b"}")
        assert (answer.problem, answer.queued, answer.next_sync_after) == (None, *expected), fields
    answer = mailproxy.parse_acknowledgement(200, json.dumps({"error": "é" * 9_000, "not_found": ["m"]}).encode())
    assert {name: len(remark) <= 500 for name, remark in answer.remarks.items()} == {"error": True, "not_found": True}


# -- when the calls come: a reporter whose clock the test turns


class ReporterRig(QueueRig):
    """A reporter on a real queue; the upstream is a list of answers, and time passes as the test says."""

    def __init__(self, folder: Path, run: Callable[[Any], Any], delivery: Any = None, **client: Any) -> None:
        super().__init__(folder, run)
        self.monotonic = 5_000.0
        self.answers: deque[Any] = deque()
        self.calls: list[tuple[float, str, list[str]]] = []  # when, id, ids of the messages
        self.inside: Callable[[], object] | None = None
        self.reporter = mailproxy.Reporter(
            self.queue, client=mailproxy.ClientSettings(**{"client_sync_url": "http://upstream.test/", **client}),
            delivery=mailproxy.DeliverySettings(**(delivery or {})), call=self._call, dispatching=lambda: False,
            clock=mailproxy.Clock(lambda: self.now, lambda: self.monotonic), in_thread=asyncio.to_thread,
            metrics=mailproxy.Metrics("test"), log=logging.getLogger("mailproxy"),
        )  # fmt: skip

    async def _call(self, report_id: str, report: bytes) -> Any:
        entries = json.loads(report)["delivery_report"]
        self.calls.append((self.monotonic, report_id, [entry["id"] for entry in entries]))
        if self.inside:
            self.inside()
        answer = self.answers.popleft() if self.answers else {}
        if isinstance(answer, Exception):
            raise answer
        status, body, *headers = answer if isinstance(answer, tuple) else (200, answer)
        return mailproxy.HttpAnswer(status, *(headers or [{}]), json.dumps(body).encode(), "http://upstream.test/")

    def pass_time(self, seconds: float) -> None:
        """Let the reporter turn whenever it wants to, for so long."""
        end = self.monotonic + seconds
        while True:
            pause_s = self.run(self.reporter.turn())
            step_s = min(pause_s, end - self.monotonic)
            self.monotonic, self.now = self.monotonic + step_s, self.now + step_s
            if step_s < pause_s:
                return
            assert len(self.calls) < 1_000, "a tight loop"

    def once_inside(self, act: Callable[[], object]) -> None:
        """Act while the next call is made."""

        def inside() -> None:
            self.inside = None
            act()

        self.inside = inside

    def times(self) -> list[float]:
        return [round(at - 5_000.0, 3) for at, _, _ in self.calls]

    def told(self) -> list[list[str]]:
        return [ids for _, _, ids in self.calls]

    def fail(self, *ids: str) -> None:
        """Bring messages into their final state, one after the other."""
        for id_ in ids:
            self.accepted(submission(id_))
        self.fail_orphans("main", "given up")
        self.reporter.ring()


@pytest.fixture
def make_reporter(tmp_path: Path, engine: str) -> Iterator[Callable[..., ReporterRig]]:
    with asyncio.Runner() as runner, contextlib.ExitStack() as closing:

        def make(delivery: Any = None, **client: Any) -> ReporterRig:
            rig = ReporterRig(tmp_path, runner.run, delivery, **client)
            closing.callback(lambda: runner.run(rig.file.close()))
            return rig

        yield make


UNREACHABLE = mailproxy.HttpFailure("no connection", transient=True)
LONGER_AND_LONGER = [UNREACHABLE, (500, {}), (200, {"ok": False}), (302, {}), UNREACHABLE, UNREACHABLE]


@pytest.mark.parametrize(
    ("interval_s", "answers", "seconds", "times"),
    [
        (300, [], 900, [0, 300, 600, 900]),
        (300, LONGER_AND_LONGER, 700, [0, 1, 6, 36, 96, 396, 696]),
        (100, [UNREACHABLE, UNREACHABLE, {}, UNREACHABLE, {}], 110, [0, 1, 6, 106, 107]),
        (300, [{"queued": 1}] * 8, 200, [0, 0, 1, 3, 8, 23, 83, 143]),
    ],
    ids=["each interval", "longer and longer pauses", "after success anew", "queued, which brings nothing"],
)
def test_when_the_upstream_is_called(
    make_reporter: Any, interval_s: int, answers: list[Any], seconds: float, times: list[float]
) -> None:
    rig = make_reporter(sync_interval_seconds=interval_s)
    rig.answers.extend(answers)

    rig.pass_time(seconds)

    assert rig.times() == times
    failures = sum(answer not in ({}, {"queued": 1}) for answer in answers)
    assert len({id_ for _, id_, _ in rig.calls}) == len(times) - failures  # a call that failed is made again


def test_a_failed_batch_goes_out_again_as_it_was_under_the_same_id_and_newer_states_follow(make_reporter: Any) -> None:
    rig = make_reporter()
    rig.fail("a")
    rig.answers.extend([UNREACHABLE, (503, {}), (200, {"ok": False})])
    rig.pass_time(0.5)

    rig.fail("b", "c")
    rig.pass_time(40)

    assert rig.told() == [["a"], ["a"], ["a"], ["a"], ["b", "c"]]
    *tried, newer = [id_ for _, id_, _ in rig.calls]
    assert len(set(tried)) == 1
    assert newer not in tried
    assert rig.unreported(10) == {}


@pytest.mark.parametrize(
    ("answers", "times"),
    [([UNREACHABLE] * 3, [0, 1, 6, 10]), ([{"next_sync_after": NOW + 100_000}], [0, 10])],
    ids=["a pause after failures", "next_sync_after"],
)
def test_run_now_ends(make_reporter: Any, answers: list[Any], times: list[float]) -> None:
    rig = make_reporter()
    rig.answers.extend(answers)
    rig.pass_time(10)

    rig.reporter.run_now()
    rig.pass_time(0)

    assert rig.times() == times


def busy(retry_after: str, status: int = 503) -> Any:
    return status, {}, {"retry-after": retry_after}


@only_sqlite
def test_the_pause_an_upstream_asks_for_is_kept_and_ended_by_run_now(make_reporter: Any) -> None:
    rig = make_reporter()
    answers = {
        "7": 7,
        " 007 ": 7,
        "0": 1,
        "3600": 3600,
        "3601": 3600,
        "9" * 400: 3600,
        "garbage": 1,
        "": 1,
        "-5": 1,
        "1.5": 1,
    }
    answers |= {"7, 8": 1, "٣": 1, "Mon, 99 Foo 2026 25:00:00 GMT": 1, "Sun, 06 Nov 99999 08:49:37 GMT": 1}
    answers |= {"Sun, 06 Nov 1994 08:49:37 GMT": 1, "Sat, 06 Nov 2094 08:49:37 GMT": 3600}
    soon = ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y"]  # RFC 9110 5.6.7
    for retry_after, pause_s in [*answers.items(), *((form, 20) for form in soon)]:
        retry_after = datetime.datetime.fromtimestamp(rig.now + 20, datetime.UTC).strftime(retry_after)
        rig.calls.clear()
        rig.answers.extend([busy(retry_after), {}])
        rig.reporter.run_now()
        began = rig.monotonic

        rig.pass_time(pause_s)

        assert [round(at - began) for at, *_ in rig.calls] == [0, pause_s], retry_after

    rig.calls.clear()
    rig.fail("a")
    rig.answers.extend([UNREACHABLE, UNREACHABLE, busy("2", 429), busy("100", 500), busy("100", 200), busy("100")])
    began = rig.monotonic
    rig.reporter.run_now()
    rig.pass_time(80)
    assert [round(at - began) for at, *_ in rig.calls] == [0, 1, 6, 8, 68]  # of a 500 it is not heard, nor of a 200
    rig.fail("b")
    rig.pass_time(20)
    rig.fail("c")
    rig.pass_time(20)
    rig.reporter.run_now()
    rig.pass_time(0)
    assert rig.told()[4:] == [["a"], ["b"], ["b"], ["c"]]


def test_a_report_that_is_too_large_for_the_upstream_goes_out_in_smaller_ones(make_reporter: Any) -> None:
    rig = make_reporter()
    rig.fail("a", "b", "c", "d", "e")
    rig.answers.extend([(413, {}), (413, {})])

    rig.pass_time(10)

    assert rig.told() == [["a", "b", "c", "d", "e"], ["a", "b"], ["a"], ["b"], ["c"], ["d"], ["e"]]


def test_run_now_during_a_call_that_fails_is_not_forgotten(make_reporter: Any) -> None:
    rig = make_reporter()
    rig.pass_time(1)
    rig.reporter.run_now()
    rig.answers.append(UNREACHABLE)

    rig.once_inside(rig.reporter.run_now)
    rig.pass_time(0)

    assert rig.times() == [0, 1, 1]


def test_an_upstream_that_asks_for_run_now_in_each_call_makes_no_tight_loop(make_reporter: Any) -> None:
    rig = make_reporter()
    rig.inside = rig.reporter.run_now

    rig.pass_time(8)

    assert rig.times() == [0, 0, 1, 3, 8]


def test_no_empty_calls_before_next_sync_after_but_reports_go_out_and_a_shorter_interval_counts_from_now_on(
    make_reporter: Any,
) -> None:
    rig = make_reporter(sync_interval_seconds=300)
    rig.answers.append({"next_sync_after": rig.now + 1_000})
    rig.pass_time(500)
    rig.fail("a")

    rig.pass_time(900)

    assert rig.times() == [0, 500, 1_000, 1_300]
    assert rig.told() == [[], ["a"], [], []]
    rig.reporter.client = rig.reporter.client._replace(sync_interval_seconds=120)
    rig.pass_time(20)
    assert rig.times()[4:] == [1_420]


def test_queued_goes_on_at_once_while_it_brings_submissions(make_reporter: Any) -> None:
    rig = make_reporter()
    rig.answers.extend({"queued": 1} for _ in range(20))

    def submit() -> None:
        rig.queue.new_ids += 1

    rig.inside = submit
    rig.pass_time(0)

    assert rig.times() == [0] * 21


def test_what_only_replaces_a_message_is_no_new_submission(make_reporter: Any) -> None:
    """Else an upstream that submits the same failing message in each call is called without a pause."""
    rig = make_reporter()
    for content in "one", "other":
        rig.accepted(submission("a", payload=json.dumps({"subject": content})))

    assert rig.queue.new_ids == 1


def test_batches_hold_the_states_in_the_order_they_came_about_and_what_changed_meanwhile_again(
    make_reporter: Any,
) -> None:
    rig = make_reporter(report_batch_size=2)
    rig.fail("a", "b", "c", "d", "e")

    def change_it() -> None:
        rig.sql("UPDATE messages SET report_order = report_order + 100, error = 'changed' WHERE id = 'a'")

    rig.once_inside(change_it)
    rig.pass_time(0)

    assert rig.told() == [["a", "b"], ["c", "d"], ["e", "a"]]


def test_in_test_mode_the_upstream_is_called_at_run_now_alone(make_reporter: Any) -> None:
    rig = make_reporter({"test_mode": True}, sync_interval_seconds=10)
    rig.fail("a")
    rig.pass_time(100)
    assert rig.calls == []

    rig.reporter.run_now()
    rig.pass_time(100)

    assert rig.times() == [100]


@pytest.mark.parametrize(("url", "kept_s", "until_s"), [(None, [90], 45), ("http://upstream.test/", [95, 60], 80)])
def test_final_messages_are_purged_by_age_with_an_upstream_only_after_their_report(
    make_reporter: Any,
    url: str | None,
    kept_s: list[float],
    until_s: float,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO, "mailproxy")
    monkeypatch.setattr(mailproxy, "CHUNK", 1)
    rig = make_reporter({"delivery_report_retention_seconds": 100}, client_sync_url=url)
    rig.fail("a", "b")
    rig.answers.extend([UNREACHABLE] * 4)
    for seconds in kept_s:
        rig.pass_time(seconds)
        assert rig.look_up("a") is not None

    rig.pass_time(until_s)

    assert rig.look_up("a") is None
    assert (rig.calls == []) == (url is None)
    assert [record.fields for record in caplog.records if record.message == "final messages purged"] == [
        {"messages": 2}
    ]


# -- against a real upstream


class Relay(NamedTuple):
    """A daemon between its two neighbours, for the tests that leave it as they found it."""

    daemon: Daemon
    smtp: SmtpServer
    reports: ReportReceiver


@pytest.fixture(scope="module")
def relays(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Callable[[str], Relay]]:
    with contextlib.ExitStack() as stack:

        @functools.cache
        def relay_on(engine: str) -> Relay:
            smtp, reports = stack.enter_context(SmtpServer()), stack.enter_context(ReportReceiver())
            folder, config = tmp_path_factory.mktemp(engine), {}
            if engine == "postgresql":
                config = {"storage": {"db_path": request.getfixturevalue("postgres_server").new_database()}}
            daemon = stack.enter_context(Daemon(folder, config, smtp=smtp, reports=reports))
            reports.wait_for(lambda r: r.calls)
            return Relay(daemon, smtp, reports)

        yield relay_on


@pytest.fixture
def relay(request: pytest.FixtureRequest, relays: Callable[[str], Relay]) -> Relay:
    """One for all tests on an engine."""
    return relays(request.getfixturevalue("engine") if "engine" in request.fixturenames else "sqlite")


@both_engines
def test_a_result_is_reported_within_a_second_with_all_its_members_and_a_deferral_with_its_reason(relay: Relay) -> None:
    daemon, smtp, reports = relay
    daemon.submit(mail("later", deferred_ts=int(time.time()) + 3_600))
    waits_s = []
    for id_ in ("told-1", "told-2", "told-3"):  # the best of three: the machine may be busy
        began_at, visits = int(time.time()), smtp.visits["told@example.com"]
        daemon.submit(mail(id_, "told@example.com", batch_code="june", message_id="<x@example.com>", priority="high"))
        wait_until(lambda: smtp.visits["told@example.com"] > visits, "the mail")  # noqa: B023
        began = time.monotonic()
        entry = reports.wait_for_entry(id_, "sent")
        waits_s.append(time.monotonic() - began)

        assert entry == {
            "id": id_, "account_id": "default", "priority": 1, "status": "sent",
            "sent_ts": entry["sent_ts"], "error_ts": None, "error": None, "deferred_ts": None, "attempts": 1,
            "message_id": "<x@example.com>", "batch_code": "june", "recipients": None,
        }  # fmt: skip
        assert began_at <= entry["sent_ts"] <= time.time()
        wait_until(lambda: daemon.message(id_)["reported_ts"], "the stamp")  # noqa: B023
    assert min(waits_s) < 1
    assert reports.calls[0].entries == []

    recipients = {
        "temp@example.com": ("deferred", 451), "ok@example.com": ("sent", 250), "perm@example.com": ("error", 550),
    }  # fmt: skip
    to, *cc = recipients
    daemon.submit(mail("back", to=to, cc=cc))
    entry = reports.wait_for_entry("back", "deferred")
    assert "451" in entry["error"]
    assert entry["deferred_ts"] > time.time()
    assert {address: (r["status"], r["code"]) for address, r in entry["recipients"].items()} == recipients
    assert daemon.message("back")["recipients"] == entry["recipients"]
    assert reports.entries_of("later") == []  # its time has not come: nothing to report
    assert daemon.post("/commands/delete-messages", {"ids": ["back", "later"]}).json["removed"] == 2


@both_engines
def test_a_burst_makes_few_calls_in_order(daemon: Daemon, reports: ReportReceiver) -> None:
    reports.wait_for(lambda r: r.calls)

    def hold(_entries: Any) -> None:
        reports.inside = None
        wait_until(lambda: daemon.status()["pending"] == 0, "all results")

    reports.inside = hold
    daemon.submit(*[mail(f"m-{n}", to="perm@example.com") for n in range(200)])
    reports.wait_for(lambda r: len(r.acknowledged) == 200)

    assert len(reports.calls) <= 3  # the one at the start, the first results, all others
    failed = re.findall("message failed message=(m-[0-9]+)", daemon.log)
    assert [entry["id"] for entry in reports.acknowledged] == failed


def test_a_steady_stream_of_results_makes_few_calls(daemon: Daemon, reports: ReportReceiver) -> None:
    reports.wait_for(lambda r: r.calls)
    began = time.monotonic()
    for n in range(30):
        daemon.submit(mail(f"m-{n}", to="perm@example.com"))
        time.sleep(0.05)
    reports.wait_for(lambda r: len(r.acknowledged) == 30)

    assert len(reports.calls) <= 4 + (time.monotonic() - began) / 0.3


@both_engines
def test_without_an_acknowledgement_nothing_is_stamped_and_run_now_tries_at_once(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    refusals = [
        *(Answer(close=True), Answer(delay=30), Answer(status=500), Answer(body={"ok": False})),
        Answer(status=302, headers={"Location": "/elsewhere"}),
    ]
    config = {"client": {"timeout_seconds": 2, "client_sync_secret": "b3BlbiBzZXNhbWU="}}
    with Daemon(tmp_path, config, smtp=smtp, reports=reports) as daemon:
        reports.wait_for(lambda r: r.calls)
        reports.answers.extend(refusals)
        daemon.submit(mail())
        for number in range(1, len(refusals) + 1):  # by itself it would wait for 1, 5, 30, 60, 300 s
            wait_until(lambda: daemon.log.count("report not acknowledged") >= number, "a refusal")  # noqa: B023
            if reports.answers:
                assert (daemon.message("m-1")["reported_ts"], daemon.status()["unreported"]) == (None, 1)
            daemon.post("/commands/run-now")
        wait_until(lambda: daemon.message("m-1")["reported_ts"], "the stamp")

        told = [call for call in reports.calls if call.entries]
        assert [call.path for call in told] == ["/proxy_sync"] * 6
        assert len({call.headers["webhook-id"] for call in told}) == 1


def test_whatever_a_2xx_says_it_acknowledges(relay: Relay) -> None:
    remarks = {"error": ["strange is strange"], "not_found": ["strange"], "sent": []}
    informational = b"".join(b"HTTP/1.1 %d Wait\r\nX: y\r\n\r\n" % status for status in (100, 102, 103, 102, 199))
    answers = [Answer(status=202, body=body, before=informational) for body in (remarks, b"thanks " * 500_000)]
    answers += [
        Answer(body=b"not compressed", headers={"Content-Encoding": coding}) for coding in ("br", "gzip", "gzip, gzip")
    ]
    ids = [f"taken-{number}" for number in range(len(answers))]
    for id_, answer in zip(ids, answers, strict=True):
        relay.reports.answers.append(answer)
        relay.daemon.submit(mail(id_))
        wait_until(lambda: relay.daemon.message(id_)["reported_ts"], "the stamp")  # noqa: B023

    assert [entry["id"] for entry in relay.reports.entries if entry["id"] in ids] == ids  # each once
    for words in ("field=error", "field=not_found"):
        assert "strange" in relay.daemon.wait_for_log(words)


def test_the_upstream_is_told_who_calls_and_can_verify_it(tmp_path: Path, reports: ReportReceiver) -> None:
    key = b"0123456789abcdef0123456789abcdef"
    both = {"client_sync_token": "t0ken", "client_sync_user": "me", "client_sync_password": "x"}
    secret = {"client_sync_secret": "whsec_" + base64.b64encode(key).decode()}
    with Daemon(tmp_path, reports=reports, environment={"TOKEN": "t0ken"}) as daemon:
        for number, (config, authorization) in enumerate([
            ({"client_sync_user": "jörg", "client_sync_password": "pässwort"}, "Basic asO2cmc6cMOkc3N3b3J0"),
            ({"client_sync_token": "env:TOKEN"}, "Bearer t0ken"),
            (both, "Bearer t0ken"),
            ({}, None),
            (secret, None),
        ], 1):  # fmt: skip
            daemon.config["client"] = {"client_sync_url": f"{reports.url}?{number}", **config}
            daemon.write_config()
            daemon.signal(signal.SIGHUP)
            wait_until(lambda: daemon.log.count("configuration reloaded") == number, "the configuration")  # noqa: B023
            daemon.post("/commands/run-now")
            reports.wait_for(lambda r: r.calls and r.calls[-1].path.endswith(f"?{number}"))  # noqa: B023

            headers, content = reports.calls[-1].headers, reports.calls[-1].content
            assert headers["Authorization"] == authorization
            assert headers["Content-Type"] == "application/json"
            if config is not secret:
                assert headers["webhook-signature"] is None
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + content
        expected = base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
        assert headers["webhook-signature"] == f"v1,{expected}"
        assert abs(int(headers["webhook-timestamp"]) - time.time()) < 10
        assert "t0ken" not in daemon.log
        assert "pässwort" not in daemon.log


VERIFY_JS = """
const { Webhook } = require("standardwebhooks");
const { secret, content, headers } = JSON.parse(require("fs").readFileSync(0));
const verified = (text) => { try { return new Webhook(secret).verify(text, headers); } catch (error) { return error.message; } };
console.log(JSON.stringify([verified(content), verified(content + " ")]));
"""


def verified_by_pypi(secret: str, content: str, headers: Mapping[str, str]) -> list[Any]:
    webhook = pytest.importorskip("standardwebhooks").Webhook(secret)
    with pytest.raises(Exception, match="No matching signature found") as refused:
        webhook.verify(content + " ", headers)
    return [webhook.verify(content, headers), str(refused.value)]


@pytest.fixture(scope="session")
def webhooks_of_npm(node_modules: Path) -> Callable[..., list[Any]]:
    """The verdicts of the official library on a call, and on one with another content."""

    def verified(secret: str, content: str, headers: Mapping[str, str]) -> list[Any]:
        call = json.dumps({"secret": secret, "content": content, "headers": headers})
        options = {"cwd": node_modules.parent, "capture_output": True, "text": True, "timeout": 30}
        run = subprocess.run(["node", "-e", VERIFY_JS], input=call, **options)
        assert run.returncode == 0, run.stderr
        return list(json.loads(run.stdout))

    return verified


def test_the_official_libraries_verify_a_call_whose_id_is_the_same_over_retries(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver, webhooks_of_npm: Callable[..., list[Any]]
) -> None:
    secret = base64.b64encode(b"\xfb\xff a key of 25 bytes \xfe\xff!").decode()
    reports.answers.append(Answer())
    reports.answers.append(Answer(status=429, headers={"Retry-After": "1"}))
    with Daemon(tmp_path, {"client": {"client_sync_secret": secret}}, smtp=smtp, reports=reports) as daemon:
        daemon.submit(mail("für-Ännchen", subject="ö"))
        wait_until(lambda: daemon.message("für-Ännchen")["reported_ts"], "the stamp")

    tried = [call for call in reports.calls if call.entries]
    assert len(tried) == 2
    assert len({call.headers["webhook-id"] for call in tried}) == 1
    for call, verified in itertools.product(tried, (verified_by_pypi, webhooks_of_npm)):
        given = {name.lower(): value for name, value in call.headers.items()}
        for prefix in ("", "whsec_"):
            report, refusal = verified(prefix + secret, call.content.decode(), given)
            assert report["delivery_report"][0]["id"] == "für-Ännchen"
            assert "No matching signature found" in refusal


def test_a_secret_that_cannot_be_read_any_more_costs_no_report(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    secret = tmp_path / "secret"
    secret.write_text("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n")
    config = {"client": {"client_sync_secret": f"file:{secret}"}}
    with Daemon(tmp_path, config, smtp=smtp, reports=reports) as daemon:
        reports.wait_for(lambda r: r.calls)
        secret.write_text("whsec_&&&")
        daemon.submit(mail())
        daemon.wait_for_log("report not acknowledged")

        secret.write_text("YW5vdGhlciBvbmU=")
        daemon.post("/commands/run-now")

        reports.wait_for_entry("m-1", "sent")


def test_the_upstream_may_use_every_endpoint_from_inside_the_call(relay: Relay) -> None:
    daemon, _, reports = relay
    statuses: list[int] = []

    def call_back(entries: list[dict[str, Any]]) -> None:
        reports.inside = None
        submitted = daemon.post("/commands/add-messages", {"messages": [mail("from-inside")]})
        others = [daemon.get(path) for path in ("/status", "/messages", "/ready", "/metrics", "/message/calls")]
        told_to = daemon.post("/commands/run-now")
        statuses.extend(answer.status for answer in (submitted, *others, told_to))

    reports.inside = call_back
    daemon.submit(mail("calls"))

    reports.wait_for_entry("from-inside", "sent")
    assert statuses == [200] * 7


@both_engines
def test_a_purged_message_is_remembered_as_sent(daemon: Daemon, reports: ReportReceiver) -> None:
    daemon.submit(mail("gone"), mail("bad", to="perm@example.com"), mail("later", deferred_ts=9_000_000_000))
    wait_until(lambda: reports.entries_of("gone") and reports.entries_of("bad"), "the reports")
    wait_until(lambda: daemon.status()["unreported"] == 0, "the stamps")
    kept = daemon.post("/commands/cleanup-messages", {"older_than_seconds": 3_600}).json
    removed = daemon.post("/commands/cleanup-messages", {"older_than_seconds": 0}).json

    assert (kept, removed) == ({"ok": True, "removed": 0}, {"ok": True, "removed": 2})
    assert [m["id"] for m in daemon.get("/messages").json["messages"]] == ["later"]
    again = daemon.post("/commands/add-messages", {"messages": [mail("gone"), mail("bad")]}).json
    assert (again["queued"], again["known"], again["rejected"]) == (1, ["gone"], [])


# ======================================================================
# CONTROL PLANE
# ======================================================================


def submitted(daemon: Daemon, *messages: Any, **batch: Any) -> HttpAnswer:
    """The answer to a batch, good or bad."""
    return daemon.post("/commands/add-messages", {"messages": list(messages), **batch})


def listed(daemon: Daemon, query: str = "") -> list[str]:
    """The ids of a listing."""
    return [record["id"] for record in daemon.get(f"/messages?{query}").json["messages"]]


def counted(daemon: Daemon) -> dict[str, Any]:
    """What /status ought to say, counted over the table."""
    with daemon.db() as db:
        row = db.execute(
            "SELECT count(*) FILTER (WHERE pending) AS pending, "
            "count(*) FILTER (WHERE pending AND deferred_ts IS NOT NULL) AS deferred, "
            "count(*) FILTER (WHERE error_ts IS NOT NULL) AS failed, "
            "count(*) FILTER (WHERE report_order IS NOT NULL) AS unreported, "
            "min(created_at) FILTER (WHERE pending) AS oldest_pending_ts "
            "FROM (SELECT *, sent_ts IS NULL AND error_ts IS NULL AS pending FROM messages) AS judged"
        ).fetchone()
    return dict(row)


def told(daemon: Daemon) -> dict[str, Any]:
    status = daemon.status()
    return {name: status[name] for name in ("pending", "deferred", "failed", "unreported", "oldest_pending_ts")}


FAR = 4_000_000_000
NOWHERE = {"host": "127.0.0.1", "port": 9}


@pytest.fixture
def quiet(tmp_path: Path, smtp: SmtpServer) -> Iterator[Daemon]:
    """A daemon that is suspended: what is submitted stays as it is."""
    with Daemon(tmp_path, {"scheduler": {"active": "false"}}, smtp=smtp) as running:
        yield running


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all submissions of a table; nothing listens where it would deliver."""
    with Daemon(tmp_path_factory.mktemp("judge"), {"smtp": NOWHERE, "scheduler": {"active": "false"}}) as running:
        yield running


# -- how it goes


def test_health_ready_and_status_are_true_and_to_be_asked_costs_one_commit_a_second_at_most(quiet: Daemon) -> None:
    def commits() -> float:
        (line,) = re.findall(rb"^mailproxy_storage_commit_seconds_count (.*)$", quiet.get("/metrics").content, re.M)
        return float(line)

    before, began = commits(), time.monotonic()
    assert [quiet.get("/ready").json for _ in range(40)] == [{"ok": True}] * 40
    assert commits() - before <= 2 + 2 * (time.monotonic() - began)
    assert quiet.get("/health").json == {"ok": True, "status": "ok"}
    status = quiet.status()
    default = status["accounts"].pop("default")
    recent = status.pop("recent")
    assert [column["ts"] - recent[0]["ts"] for column in recent] == list(range(0, 900, 10))
    assert status == {
        "ok": True, "active": False, "version": mailproxy.__version__, "pending": 0, "deferred": 0,
        "in_delivery": 0, "failed": 0, "unreported": 0, "oldest_pending_ts": None, "suspended_batches": [], "accounts": {},
    }  # fmt: skip
    assert (default["state"], default["reason"], default["until"], default["connections"]) == ("up", None, None, 0)

    due = int(time.time()) + 2
    quiet.submit(mail(deferred_ts=due))
    assert told(quiet)["deferred"] == 1 or time.time() >= due
    wait_until(lambda: told(quiet)["deferred"] == 0, "its time")
    assert (told(quiet)["pending"], quiet.message("m-1")["status"]) == (1, "queued")


def test_status_says_how_many_failed_and_what_happened_in_the_last_15_minutes(tmp_path: Path, smtp: SmtpServer) -> None:
    with Daemon(tmp_path, {"delivery": {"retry_delays": "1000"}}, smtp=smtp) as daemon:
        daemon.submit(
            mail("a"), mail("b", to="perm@example.com"), mail("c", to="temp@example.com"), mail("d", to="550@x.y")
        )
        wait_until(lambda: smtp.received and told(daemon)["failed"] == 2 and told(daemon)["deferred"] == 1, "outcomes")
        wait_until(lambda: sum(column["sent"] for column in daemon.status()["recent"]) == 1, "the one that was sent")
        status = daemon.status()
        assert told(daemon) == counted(daemon)
        totals = {name: sum(column[name] for column in status["recent"]) for name in status["recent"][0]}
        assert (totals.pop("ts") > 0, totals) == (True, {"accepted": 4, "sent": 1, "deferred": 1, "failed": 2})
        assert abs(status["recent"][-1]["ts"] - time.time()) < 20

        assert daemon.post("/commands/suspend").status == 200
        assert daemon.post("/commands/retry-messages", {"ids": ["b"]}).json["queued"] == 1
        assert told(daemon)["failed"] == 1
        assert daemon.post("/commands/delete-messages", {"ids": ["d"]}).json["removed"] == 1
        assert told(daemon) == {**counted(daemon), "failed": 0}


def test_what_happened_is_forgotten_after_15_minutes_and_a_turned_clock_leaves_nothing_behind() -> None:
    now = [18e8]
    recent = mailproxy.Recent(lambda: now[0])
    for moment in (18e8, 18e8 + 895, 18e8 + 905, 18e8 + 9_000, 18e8):
        now[0] = moment
        recent.count("sent")

    assert sum(column["sent"] for column in recent.columns()) == 1
    assert recent.columns()[-1] == {"ts": 18e8, "accepted": 0, "sent": 1, "deferred": 0, "failed": 0}


@pytest.mark.parametrize("path", ["/health", "/ready", "/status", "/messages", "/accounts", "/metrics"])
def test_head_works_where_get_does(judge: Daemon, path: str) -> None:
    got, head = judge.get(path), judge.request("HEAD", path)

    assert (head.status, head.content) == (200, b"")
    assert head.headers["Content-Type"] == got.headers["Content-Type"]


def test_metrics_have_the_names_of_the_contract_and_true_numbers(
    daemon: Daemon, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    daemon.post("/account", account_at("few", smtp, limit_per_minute=1))
    daemon.submit(mail("first", account_id="few"), mail("limited", account_id="few"))
    reports.wait_for_entry("limited", "deferred")
    daemon.submit(mail("a"), mail("b", to="perm@example.com"), mail("c", deferred_ts=FAR))
    submitted(daemon, {"id": "bad"})
    wait_until(lambda: {"a", "b"} <= {entry["id"] for entry in reports.acknowledged}, "the reports")
    wait_until(lambda: daemon.status()["unreported"] == 0, "the stamps")

    text = daemon.get("/metrics").content.decode()
    lines = [line.removeprefix("mailproxy_") for line in text.splitlines() if not line.startswith("#")]
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    by_account = {
        "messages_accepted_total": 3, "messages_sent_total": 1, "messages_failed_total": 1, "account_up": 1,
        "smtp_transaction_seconds_count": 2, "queue_wait_seconds_count": 1,
    }  # fmt: skip
    expected = {f'{name}{{account="default"}}': value for name, value in by_account.items()}
    expected |= {"messages_rejected_total": 1, "messages_pending": 2, "messages_in_delivery": 0}
    expected |= {"reports_unacknowledged": 0, "scheduler_active": 1, "auth_failures_total": 0}
    expected |= {"storage_commit_failures_total": 0, 'rate_limited_total{account="few"}': 1}
    assert {name: values.get(name) for name in expected} == expected
    assert 0 <= values["oldest_pending_seconds"] < 20
    assert values['report_requests_total{outcome="acknowledged"}'] >= 2
    assert values['smtp_connects_total{account="default",outcome="ok"}'] >= 1
    for name in (
        *("messages_deferred_total{", "smtp_connections{", "build_info{", "process_"),
        *("http_requests_total{", "http_request_seconds_bucket{", "storage_commit_seconds_bucket{"),
        "attachment_fetches_total{",
    ):
        assert any(line.startswith(name) for line in lines), name
    assert "example.com" not in text


@both_engines
def test_the_numbers_of_status_are_those_of_the_table_whatever_happens(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    reports.answers.extend([Answer(status=500)] * 50)
    with Daemon(tmp_path, smtp=smtp, reports=reports) as daemon:
        kinds = [("ok", {}), ("bad", {"to": "perm@example.com"}), ("back", {"to": "temp@example.com"})]
        kinds.append(("later", {"deferred_ts": FAR}))
        daemon.submit(*[mail(f"{name}-{n}", **fields) for name, fields in kinds for n in range(5)])
        wait_until(lambda: told(daemon)["unreported"] == 15, "all results")
        assert told(daemon) == counted(daemon)
        assert (told(daemon)["pending"], told(daemon)["deferred"]) == (10, 10)

        daemon.post("/commands/suspend")
        daemon.post("/commands/delete-messages", {"ids": ["later-0", "back-0", "bad-0", "ok-0"]})
        assert told(daemon) == counted(daemon)
        daemon.post("/commands/retry-messages", {"ids": ["bad-1", "bad-2"]})
        daemon.submit(mail("later-1"), mail("back-1", deferred_ts=FAR), mail("bad-3"))
        assert told(daemon).items() >= {"pending": 11, "deferred": 7, "unreported": 8}.items()
        assert told(daemon) == counted(daemon)

        daemon.restart()
        assert told(daemon) == counted(daemon)
        reports.answers.clear()
        daemon.post("/commands/run-now")
        wait_until(lambda: told(daemon)["unreported"] == 0, "the stamps")
        daemon.post("/commands/cleanup-messages", {"older_than_seconds": 0})
        assert told(daemon) == counted(daemon)
        daemon.post("/commands/activate")
        wait_until(lambda: told(daemon)["pending"] == 7, "what can be delivered")
        wait_until(lambda: told(daemon) == counted(daemon), "numbers that are true")


# -- what is refused


REJECTED: list[tuple[str, Any, str]] = [
    *(("id", id_, "missing id") for id_ in (None, "")),
    *(("id", id_, "invalid id:") for id_ in (7, "x" * 256, "two\nlines", "\ud83d")),
    *((name, None, f"missing {name}") for name in ("from", "to", "subject", "body")),
    *(("subject", value, "invalid subject:") for value in ("two\r\nBcc: x@example.com", "half an emoji \ud83d")),
    ("from", ["a@example.com"], "invalid from: must be one address in a string"),
    ("to", ["no address"], "invalid to:"), ("account_id", "nobody", "account not found"),
    *(("priority", value, "invalid priority") for value in (1.5, 1e308, -1)),
    ("deferred_ts", 2**63, "invalid deferred_ts"), ("expires_ts", 1, "invalid expires_ts"),
    ("headers", {"Bcc": "x@example.com"}, "invalid headers"), ("attachments", [{"filename": "x"}], "invalid attachments: "),
    ("no object", "no object", "invalid message:"), ("no object", None, "invalid message:"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "reason"), REJECTED)
def test_each_message_is_judged_alone_and_rejected_with_its_reason(
    judge: Daemon, field: str, value: Any, reason: str
) -> None:
    message = value if field == "no object" else {**mail(), field: value}

    alone = submitted(judge, message)
    good = [mail(f"{number} beside {reason} {value!r:.40}", deferred_ts=FAR) for number in (1, 2)]
    among = submitted(judge, good[0], message, good[1])

    rejected = alone.json["rejected"]
    assert rejected[0]["id"] == (None if field in ("id", "no object") else "m-1")
    assert rejected[0]["reason"].startswith(reason)
    if field == "account_id":
        assert (rejected[0]["code"], rejected[0]["field"]) == ("unknown_account", field)
    else:
        kind = f"{reason.split()[0]}_field"
        assert (rejected[0]["code"], rejected[0].get("field", "no object")) == (kind, field)
    refused = {"error": "all messages rejected", "rejected": rejected}
    assert (alone.status, alone.json) == (400, {"ok": False, **refused, "code": "all_rejected", "detail": refused})
    assert (among.status, among.json) == (200, {"ok": True, "queued": 2, "rejected": rejected})


BATCH, QUERY, WEB = "POST /commands/add-messages", "GET /messages?", {"id": "x", "host": "mx.example.com", "port": 25}
REFUSED: list[tuple[str, Any, int, str]] = [
    *((BATCH, body, 400, "messages") for body in (b"", b"{}", b'{"messages": null}', b'{"messages": {}}')),
    *((BATCH, {"messages": [], "default_priority": value}, 400, "default_priority") for value in (4, 1.5)),
    *((BATCH, body, 400, words) for body, words in [(b'{"messages": [', "JSON"), (b"[]", "object")]),
    (BATCH, {"messages": [{}] * 1001}, 413, "1000"),
    *((f"POST /commands/{path}", b"[]", 400, "object") for path in ("activate", "run-now", "suspend")),
    *((f"POST /commands/{path}", b"no json", 400, "JSON") for path in ("activate", "run-now", "suspend")),
    *(("POST /commands/delete-messages", body, 400, "ids") for body in ({}, {"ids": None}, {"ids": "m-1"})),
    ("POST /commands/retry-messages", {"ids": [1]}, 400, "ids"),
    *(("POST /commands/cleanup-messages", {"older_than_seconds": age}, 400, "older_than_seconds")
      for age in (-1, "1", True, 1.5, 2**64)),
    *((f"{QUERY}limit={value}", None, 400, "limit") for value in ("0", "10001", "", "1.0", "%EF%BC%91")),
    *((f"{QUERY}after={value}", None, 400, "after") for value in ("x", "-1", "99999999999999999999")),
    *((f"{QUERY}{name}=perhaps", None, 400, name) for name in ("status", "active_only", "content", "order")),
    ("GET /message/nobody?content=x", None, 400, "content"),
    *(("POST /account", {**WEB, field: values[0]}, 400, field) for field, values in INVALID_ACCOUNT_FIELDS.items()),
    *(("POST /account", {**WEB, "id": id_}, 400, "id") for id_ in (None, "", "x" * 256)),
    *(("POST /account", {**WEB, field: None}, 400, field) for field in ("host", "port")),
    ("POST /account", {**WEB, "port": 25.5}, 400, "port"), ("POST /account", {**WEB, "batch_size": 2**63}, 400, "batch_size"),
    *((line, None, 404, "") for line in ("GET /message/x", "DELETE /account/x")),
    *((f"POST /account/x/{verb}", None, 404, "") for verb in ("suspend", "activate")),
]  # fmt: skip


@pytest.mark.parametrize(("line", "body", "status", "words"), REFUSED)
def test_a_request_that_means_nothing_is_refused_and_what_is_wrong_is_named(
    judge: Daemon, line: str, body: Any, status: int, words: str
) -> None:
    answer = judge.request(*line.split(), body)

    by_status = {400: "bad_json" if words in ("JSON", "object") else "bad_field", 404: "not_found", 413: "too_large"}
    assert (answer.status, answer.json["ok"], answer.json["code"]) == (status, False, by_status[status])
    assert words in answer.json["error"]
    assert "x" not in {one["id"] for one in judge.get("/accounts").json["accounts"]}


# -- submission


def test_in_a_batch_null_means_left_out_its_priority_wins_and_the_second_of_an_id_is_rejected(judge: Daemon) -> None:
    odd = submitted(judge, mail("odd", colour="blue", tenant_id=None, cc=None, priority=None, batch_code=None))
    empty = submitted(judge, default_priority=None)
    submitted(judge, mail("p-1"), mail("p-2", priority=0), default_priority="low")
    twice = submitted(judge, mail("twin", subject="first"), mail("twin", subject="second"))
    bad_first = submitted(judge, mail("twin-2", to="nobody"), mail("twin-2"))

    warnings = [{"id": "odd", "unknown": ["colour"]}]
    assert odd.json == {"ok": True, "queued": 1, "rejected": [], "warnings": warnings}
    record = judge.message("odd")
    assert record["message"]["colour"] == "blue"
    assert not {"cc", "tenant_id", "priority", "batch_code"} & set(record["message"])
    assert empty.json == {"ok": True, "queued": 0, "rejected": []}
    assert [judge.message(id_)["priority"] for id_ in ("odd", "p-1", "p-2")] == [2, 3, 0]
    assert (twice.status, twice.json["queued"]) == (200, 1)
    duplicate = {"reason": "duplicate id in this batch", "code": "duplicate_id", "field": "id"}
    assert twice.json["rejected"] == [{"id": "twin", **duplicate}]
    assert judge.message("twin")["message"]["subject"] == "first"
    assert bad_first.status == 400
    assert bad_first.json["rejected"][1] == {"id": "twin-2", **duplicate}


def test_the_largest_numbers_break_nothing(judge: Daemon) -> None:
    most = 2**63 - 1
    fields = {"max_age_seconds": most, "limit_per_day": most, "batch_size": most, "max_retries": most}
    assert judge.post("/account", {"id": "large", **NOWHERE, **fields}).status == 200

    last = 9_999_999_999
    assert submitted(judge, mail("l", account_id="large", deferred_ts=last, expires_ts=last)).json["queued"] == 1
    assert judge.message("l")["deferred_ts"] == last
    assert judge.delete("/account/large").json == {"ok": True, "failed": 1}


@pytest.mark.parametrize("id_", ["a/b", "ä ö/ü?#%", "100%25", "..", "x" * 255, "💌"])
def test_an_id_may_have_any_printable_characters(judge: Daemon, id_: str) -> None:
    assert submitted(judge, mail(id_)).json["queued"] == 1

    assert judge.message(id_)["id"] == id_
    assert judge.post("/commands/delete-messages", {"ids": [id_]}).json["removed"] == 1
    assert judge.get("/message/" + urllib.parse.quote(id_, safe="")).status == 404


def test_a_batch_of_many_megabytes_holds_up_nobody(judge: Daemon) -> None:
    ids = [f"big-{n}" for n in range(500)]
    batch = json.dumps({"messages": [mail(id_, text="x" * 60_000, body=None) for id_ in ids]}).encode()

    def longest_wait() -> float:
        """Of those who ask meanwhile."""
        answers: list[HttpAnswer] = []
        thread = threading.Thread(target=lambda: answers.append(judge.post("/commands/add-messages", batch)))
        waits = [0.0]
        thread.start()
        while thread.is_alive():
            began = time.monotonic()
            assert judge.get("/health").status == 200
            waits.append(time.monotonic() - began)
        thread.join()
        assert answers[0].json == {"ok": True, "queued": 500, "rejected": []}
        assert judge.post("/commands/delete-messages", {"ids": ids}).json["removed"] == 500
        return max(waits)

    # Other processes and the GIL have their part in it; a loop that is held up is so each time.
    assert any(longest_wait() < 0.6 for _ in range(5)), "the event loop was held up"


# -- commands


@both_engines
def test_the_same_id_again_replaces_what_was_not_sent_and_a_retry_takes_only_what_failed(
    daemon: Daemon, smtp: SmtpServer
) -> None:
    bad = {"to": "perm@example.com"}
    daemon.submit(mail("back", to="temp@example.com"), mail("bad", **bad), mail("lost", **bad), mail("good"))
    daemon.submit(mail("later", deferred_ts=FAR))
    for id_, status in [("back", "deferred"), ("bad", "error"), ("lost", "error"), ("good", "sent")]:
        daemon.wait_status(id_, status)
        wait_until(lambda id_=id_: daemon.message(id_)["reported_ts"], "the report")
    daemon.post("/commands/suspend")

    again = submitted(daemon, mail("back"), mail("bad"), mail("good", subject="Anything else")).json
    retried = daemon.post("/commands/retry-messages", {"ids": ["lost", "good", "later", "nobody", "lost"]}).json

    assert (again["queued"], again["rejected"]) == (
        2,
        [{"id": "good", "reason": "already sent", "code": "already_sent"}],
    )
    assert (retried["ok"], retried["queued"], retried["not_found"]) == (True, 1, ["nobody"])
    assert sorted(retried["not_failed"]) == ["good", "later"]
    for id_ in ("back", "bad", "lost"):
        anew = daemon.message(id_)
        assert (anew["status"], anew["attempts"]) == ("queued", 0)
        assert [anew[name] for name in ("error", "error_ts", "deferred_ts", "reported_ts")] == [None] * 4
        assert daemon.attempts(id_) == [] or id_ == "lost"
    daemon.post("/commands/activate")
    for id_, status in [("back", "sent"), ("bad", "sent"), ("lost", "error")]:
        daemon.wait_status(id_, status)
    assert len(smtp.received) == 3
    assert smtp.visits["perm@example.com"] == 3


A_FILE = {"filename": "a.bin", "content": as_base64(b"\0\xff\xfe")}
A_PLACE = {"filename": "b", "url": "https://files.example.com/b"}
RAW_A, RAW_B = (as_base64(f"Subject: {name}\r\n\r\nHello.\r\n".encode()) for name in "ab")
SAME: list[tuple[dict[str, Any], dict[str, Any]]] = [  # what was submitted, and what is the same
    ({}, {"priority": "medium", "account_id": "default", "content_type": "plain", "cc": None, "deferred_ts": None}),
    ({"priority": "high"}, {"priority": 1}), ({"to": ["a@example.com", "B <b@example.com>"]}, {"to": "a@example.com,B <b@example.com>"}),
    ({"html": True}, {"content_type": "text/html"}), ({"text": "Hello.", "body": None}, {}),
    ({"from_name": "Me"}, {"from": "Me <me@example.com>"}), ({"return_path": "me@example.com"}, {}), ({"colour": "red"}, {"colour": 5}),
    ({"headers": {"X-A": 5, "X-B": ["b", "c"]}}, {"headers": {"x-b": ["b", "c"], "x-a": "5"}}),
    ({"headers": {"Subject": "hello"}, "subject": ""}, {}), ({"message_id": "<a@b>"}, {"message_id": "a@b"}),
    ({"attachments": [A_FILE]}, {"attachments": [{**A_FILE, "content": "AP/ +\n"}]}), ({"attachments": []}, {}),
    ({"attachments": [A_FILE]}, {"attachments": [{"filename": "a.bin", "storage_path": "base64:AP_-", "inline": False}]}),
    ({"attachments": [A_PLACE, A_FILE]}, {"attachments": [{**A_PLACE, "content_type": None}, A_FILE]}),
    ({"raw": RAW_A}, {"raw": RAW_A.rstrip("="), "subject": "means nothing"}), ({"raw": RAW_A}, {"raw": as_base64(b"Subject: a\n\nHello.\n")}),
]  # fmt: skip
OTHER: list[tuple[dict[str, Any], dict[str, Any]]] = [  # what was submitted, and what is not the same
    *(({}, {name: value}) for name, value in {"subject": "Hello", "body": "hello", "priority": 3, "batch_code": "b", "expires_ts": FAR,
      "deferred_ts": FAR, "to": "b@example.com", "cc": "b@example.com", "reply_to": "b@example.com", "from_name": "Me",
      "return_path": "<>", "html": True, "headers": {"X-A": "b"}, "message_id": "a@b", "attachments": [A_FILE]}.items()),
    ({"attachments": [A_FILE]}, {"attachments": [{**A_FILE, "content": as_base64(b"\0\xff\xff")}]}),
    ({"attachments": [A_FILE]}, {"attachments": [{**A_FILE, "filename": "b.bin"}]}),
    ({"attachments": [A_PLACE]}, {"attachments": [{**A_PLACE, "url": "https://files.example.com/c"}]}),
    ({"attachments": [A_PLACE]}, {"attachments": [{"filename": "b", "s3": {"bucket": "files", "key": "b"}}]}),
    ({"headers": {"X-A": ["b", "c"]}}, {"headers": {"X-A": ["c", "b"]}}), ({"raw": RAW_A}, {"raw": RAW_B}), ({"raw": RAW_A}, {}),
]  # fmt: skip


def test_the_same_content_again_is_known_however_it_is_written_and_other_content_replaces_it(judge: Daemon) -> None:
    first, again = (
        [{**mail(f"again-{number}"), **fields} for number, fields in enumerate(part)]
        for part in zip(*SAME, *OTHER, strict=True)
    )
    same, other = ([one["id"] for one in part] for part in (again[: len(SAME)], again[len(SAME) :]))
    judge.submit(*first)
    before = [judge.message(id_) for id_ in same]

    answer = submitted(judge, *again)
    once_more = submitted(judge, *again, default_priority=None)
    alone = submitted(judge, again[0])

    assert (answer.status, answer.json["rejected"], answer.json["queued"]) == (200, [], len(OTHER))
    assert answer.json["known"] == same
    assert [judge.message(id_) for id_ in same] == before
    assert (once_more.json["queued"], once_more.json["known"]) == (0, same + other)
    assert (alone.status, alone.json) == (200, {"ok": True, "queued": 0, "rejected": [], "known": ["again-0"]})


def test_of_an_id_that_is_known_only_the_first_in_a_batch_counts_and_what_is_wrong_beside_it_is_named(
    judge: Daemon,
) -> None:
    first = mail("known", colour="red")
    judge.submit(first)

    answer = submitted(
        judge, first, {**first, "subject": "Another"}, {**first, "id": 7}, {**first, "id": "new", "to": []}
    )
    worse = [
        submitted(judge, {**first, field: value})
        for field, value in {"to": 7, "subject": None, "expires_ts": 1}.items()
    ]
    no_batch = submitted(judge, first, default_priority="urgent")

    assert (answer.status, answer.json["queued"], answer.json["known"]) == (200, 0, ["known"])
    assert answer.json["warnings"] == [{"id": "known", "unknown": ["colour"]}]
    assert [(one["id"], one["code"], one["field"]) for one in answer.json["rejected"]] == [
        ("known", "duplicate_id", "id"), (None, "invalid_field", "id"), ("new", "missing_field", "to"),
    ]  # fmt: skip
    assert [(one.status, one.json["rejected"][0]["field"]) for one in worse] == [
        (400, field) for field in ("to", "subject", "expires_ts")
    ]
    assert (no_batch.status, no_batch.json["code"]) == (400, "bad_field")
    assert judge.message("known")["message"] == {key: value for key, value in first.items() if value is not None}


@both_engines
def test_a_submission_that_is_repeated_succeeds_whatever_became_of_it_and_nobody_gets_it_twice(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    some = {"to": ["ok@example.com", "some@example.com"], "cc": "temp@example.com"}
    refused = ["ok@example.com", "perm@example.com"]
    with Daemon(tmp_path, smtp=smtp) as daemon:
        assert daemon.post("/account", {"id": "web", "host": smtp.host, "port": smtp.port}).status == 200
        mails = [
            *(mail("purged"), mail("deleted"), {**mail("some"), **some}, {**mail("refused"), "to": refused}),
            *(mail("gone", account_id="web"), mail("failed", "550@example.com"), {**mail("forgotten"), **some}),
            mail("waits", deferred_ts=FAR, expires_ts=FAR),
        ]  # fmt: skip
        daemon.submit(*mails[:2])
        for id_ in ("purged", "deleted"):
            daemon.wait_status(id_, "sent")
        assert daemon.post("/commands/delete-messages", {"ids": ["deleted"]}).json["removed"] == 1
        assert daemon.post("/commands/cleanup-messages", {"older_than_seconds": 0}).json["removed"] == 1
        daemon.submit(*mails[2:])
        ends = {"some": "deferred", "forgotten": "deferred", "failed": "error", "waits": "deferred"}
        for one in mails[2:]:
            daemon.wait_status(one["id"], ends.get(one["id"], "sent"))
        while daemon.get("/message/late").status == 404 or daemon.message("late")["status"] != "sent":  # a slow machine
            daemon.post("/commands/delete-messages", {"ids": ["late", "expired"]})
            soon = {"expires_ts": int(time.time()) + 2}
            late = [mail("late", **soon), mail("expired", deferred_ts=FAR, **soon)]
            daemon.submit(*late)
            daemon.wait_status("expired", "error")
        mails += late
        assert daemon.delete("/account/web").status == 200
        assert daemon.post("/commands/delete-messages", {"ids": ["forgotten"]}).json["removed"] == 1
        daemon.kill()
        daemon.start()
        copies = len(smtp.received)

        again = submitted(daemon, *mails).json
        wait_until(lambda: smtp.visits["550@example.com"] == 2, "the second try")
        daemon.wait_status("failed", "error")
        others = submitted(daemon, *({**one, "subject": "Another"} for one in mails)).json

        past = {"reason": "invalid expires_ts: lies in the past", "code": "invalid_field", "field": "expires_ts"}
        assert (again["queued"], again["rejected"]) == (1, [{"id": "expired", **past}])
        assert again["known"] == [one["id"] for one in mails if one["id"] not in ("failed", "expired")]
        assert others["known"] == ["purged", "deleted", "forgotten"]  # what is gone is not compared
        assert {entry["id"]: entry["code"] for entry in others["rejected"]} == {
            **dict.fromkeys(("some", "refused"), "already_sent"), "gone": "unknown_account",
            **dict.fromkeys(("late", "expired"), "invalid_field"),
        }  # fmt: skip
        assert others["queued"] == 2
        wait_until(lambda: smtp.visits["550@example.com"] == 3, "the third try")
        daemon.wait_status("failed", "error")
        assert len(smtp.received) == copies


def test_the_id_of_a_message_that_is_gone_is_known_no_longer_than_the_configuration_says(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    with Daemon(tmp_path, {"delivery": {"id_retention_seconds": 1}}, smtp=smtp) as daemon:
        daemon.submit(mail("gone"))
        daemon.wait_status("gone", "sent")
        daemon.post("/commands/delete-messages", {"ids": ["gone"]})

        def queued_again() -> int:
            daemon.post("/commands/run-now")
            return int(submitted(daemon, mail("gone")).json["queued"])

        wait_until(queued_again, "the end of its time", 10)


def test_who_is_in_doubt_gets_a_failed_message_again_only_where_the_account_or_the_content_says_so(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    config = {"delivery": {"max_retries": 1, "retry_delays": 0}, "smtp": {"in_doubt": "error"}}
    with Daemon(tmp_path, config, smtp=smtp, reports=reports) as daemon:
        daemon.submit(mail("doubt", "dropdata@example.com"))
        first = daemon.wait_status("doubt", "error")
        wait_until(lambda: daemon.message("doubt")["reported_ts"], "the report")
        assert submitted(daemon, mail("doubt", "dropdata@example.com")).json["queued"] == 1
        reports.wait_for(lambda all_of_them: len(all_of_them.entries_of("doubt")) == 2)
        again = daemon.message("doubt")

        assert (again["status"], again["error"], again["recipients"]) == ("error", first["error"], first["recipients"])
        assert "in doubt" in again["error"]
        assert smtp.visits["dropdata@example.com"] == 1
        submitted(daemon, mail("doubt", "dropdata@example.com", subject="Another"))
        reports.wait_for(lambda all_of_them: len(all_of_them.entries_of("doubt")) == 3)
        assert smtp.visits["dropdata@example.com"] == 2

        account = {"host": smtp.host, "port": smtp.port, "max_recipients": 1, "in_doubt": "error"}
        assert daemon.post("/account", {"id": "one by one", **account}).status == 200
        two = {**mail("two", account_id="one by one"), "to": ["dropdata+2@example.com", "late@example.com"]}
        smtp.rule = lambda verb, visit, argument: (
            "550 5.1.1 Not yet" if verb == "RCPT" and "late@" in argument else None
        )
        daemon.submit(two)
        daemon.wait_status("two", "error")
        smtp.rule = None
        daemon.submit(two)
        words = daemon.wait_status("two", "sent")["error"]
        assert words.startswith("1 of 2 recipients refused or in doubt: connection")
        assert (smtp.visits["dropdata+2@example.com"], smtp.visits["late@example.com"]) == (1, 2)


@both_engines
def test_however_often_a_message_is_submitted_while_it_is_delivered_it_goes_out_once(
    daemon: Daemon, smtp: SmtpServer
) -> None:
    def submit_often(name: str) -> set[int]:
        return {
            submitted(daemon, *(mail(f"often-{n}", "slow50ms@example.com", subject=subject) for n in range(20))).status
            for _ in range(6)
            for subject in ("hello", name)
        }

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        statuses = set().union(*threads.map(submit_often, "abcd"))

    assert statuses <= {200, 400}
    for n in range(20):
        daemon.wait_status(f"often-{n}", "sent")
    ids = Counter(received.message["Message-ID"] for received in smtp.received)
    assert (len(smtp.received), set(ids.values())) == (20, {1})


@both_engines
def test_what_is_on_the_wire_is_neither_replaced_nor_deleted(relay: Relay) -> None:
    daemon, smtp, _ = relay
    daemon.submit(mail("slow", to="slow2@example.com"))
    wait_until(lambda: smtp.visits["slow2@example.com"], "the transaction")

    assert daemon.status()["in_delivery"] == 1
    in_delivery = {"id": "slow", "reason": "in delivery", "code": "in_delivery"}
    assert submitted(daemon, mail("slow")).json["rejected"] == [in_delivery]
    assert submitted(daemon, mail("slow", to="slow2@example.com")).json["known"] == ["slow"]
    assert daemon.post("/commands/delete-messages", {"ids": ["slow", "nobody"]}).json == {
        "ok": True, "removed": 0, "not_found": ["nobody"], "in_delivery": ["slow"]
    }  # fmt: skip
    daemon.wait_status("slow", "sent")


def test_a_command_takes_no_body_or_an_empty_object(judge: Daemon) -> None:
    for body in (None, {}):
        for path in ("activate", "run-now", "suspend"):
            assert judge.post(f"/commands/{path}", body).status == 200
    for body in (None, {}, {"older_than_seconds": None}):  # the configured retention
        assert judge.post("/commands/cleanup-messages", body).json == {"ok": True, "removed": 0}


# -- listing


TEN_MESSAGES = [
    mail(
        f"m-{n}",
        account_id="other" if n % 2 else None,
        batch_code="even fifth" if n % 5 == 0 else None,
        deferred_ts=FAR if n >= 8 else None,
    )
    for n in range(10)
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that holds ten messages of two accounts, two batches and two states."""
    config = {"smtp": NOWHERE, "account:other": NOWHERE, "scheduler": {"active": "false"}}
    with Daemon(tmp_path_factory.mktemp("shelf"), config) as running:
        running.submit(*TEN_MESSAGES)
        yield running


@pytest.mark.parametrize(
    ("query", "numbers"),
    [
        ("", range(10)), ("active_only=true", range(10)),
        ("status=queued", range(8)), ("status=deferred", [8, 9]), ("status=sent", []),
        ("account_id=other", [1, 3, 5, 7, 9]), ("account_id=default&status=deferred", [8]), ("account_id=nobody", []),
        ("batch_code=even%20fifth", [0, 5]), ("batch_code=even+fifth&limit=1", [0]),
        ("limit=3", [0, 1, 2]), ("limit=10000", range(10)), ("order=asc&limit=2&after=3", [3, 4]),
        ("order=desc", range(9, -1, -1)), ("order=desc&limit=2", [9, 8]), ("order=desc&limit=2&after=3", [1, 0]),
        ("order=desc&account_id=other&status=queued", [7, 5, 3, 1]), ("tenant_id=7&colour", range(10)),
    ],
)  # fmt: skip
def test_a_listing_holds_what_the_filters_ask_for_in_the_order_of_acceptance(
    shelf: Daemon, query: str, numbers: Any
) -> None:
    assert listed(shelf, query) == [f"m-{n}" for n in numbers]


# -- finding


def in_raw(header: str) -> str:
    return base64.b64encode(f"{header}\r\n\r\nHello.\r\n".encode("utf-8", "surrogateescape")).decode()


BERLIN = "Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?=\r\n =?utf-8?q?_aus?= Berlin"
TO_BE_FOUND = [
    mail("plain", "Ann <Ann.Smith@Example.NET>", subject="Your order 4711"),
    mail("cc", "ok@example.com", cc="x@y.example, ann.smith@example.net", subject="STRASSE 5"),
    mail("bcc", "ok@example.com", bcc=["ann.smith@example.net"], subject="Die Straße"),
    mail("raw", "ann.smith@example.net", raw=in_raw(BERLIN), subject=None, body=None),
    mail("other", "joann.smith@example.net", subject="mail of ann.smith@example.net"),
    mail("idn", "ok@bücher.example", subject="x", headers={"Subject": "Instead 100%_*?"}),
    mail("some", cc="perm@example.com", subject="y"),
    mail("none", "perm@example.com", subject="order"),
    mail("bare", "ok@example.com", raw=in_raw("X: y"), subject=None, body=None),
]


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that has sent what could be sent, and has some more that waits."""
    with SmtpServer() as server, Daemon(tmp_path_factory.mktemp("findings"), smtp=server) as running:
        for one in TO_BE_FOUND:
            running.submit(one)
        wait_until(lambda: not running.status()["pending"], "the deliveries")
        running.post("/commands/suspend")
        with sqlite3.connect(str(running.config["storage"]["db_path"]), timeout=30) as db:
            db.execute("UPDATE messages SET created_at = 1000 * seq")
            db.execute("UPDATE sought SET created_at = 1000 * last_seq")
        expired = mail("expired", "ok@example.com", expires_ts=int(time.time()) + 1, subject="z")
        running.submit(expired, mail("waits", "ann.smith@example.net", subject="ORDER", batch_code="b"))
        running.wait_status("expired", "error")
        yield running


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("to=ann.smith@example.net", "plain cc bcc raw waits"), ("to=ANN.SMITH@EXAMPLE.NET", "plain cc bcc raw waits"),
        ("to=Ann%20%3Cann.smith@example.net%3E&order=desc&limit=2", "waits raw"), ("to=smith@example.net", ""),
        ("to=ok@xn--bcher-kva.example", "idn"), ("to=OK@B%C3%9CCHER.example", "idn"), ("to=perm@example.com", "some none"),
        ("subject=order", "plain none waits"), ("subject=stra%C3%9Fe", "cc bcc"), ("subject=strasse", "cc bcc"),
        ("subject=%C3%BC%C3%9Fe%20AUS%20b", "raw"), ("subject=ann.smith", "other"), ("subject=100%25_*?", "idn"),
        ("subject=r%204&to=ann.smith@example.net", "plain"), ("subject=order&active_only=1", "waits"),
        ("subject=order&status=error", "none"), ("to=ann.smith@example.net&batch_code=b", "waits"),
        ("since=8000&until=9000", "none bare"), ("until=1999", "plain"), ("since=9001", "expired waits"),
        ("since=9001&active_only=1", "waits"), ("since=1000&until=4000&to=ann.smith@example.net&order=desc", "raw bcc cc plain"),
        ("refused=1", "some none"), ("refused=true&order=desc", "none some"), ("refused=1&subject=y", "some"), ("refused=1&to=ann.smith@example.net", ""),
        ("refused=0&since=9001", "expired waits"), ("status=error", "none expired"), ("refused=1&since=7001", "none"),
    ],
)  # fmt: skip
def test_messages_are_found_by_recipient_subject_time_and_refusal(findings: Daemon, query: str, ids: str) -> None:
    assert listed(findings, query) == ids.split()


@pytest.mark.parametrize(
    "way", ["to=ann.smith@example.net", "subject=r", "since=2000&until=8000", "refused=1", "account_id=default"]
)
def test_a_cursor_works_in_both_directions(findings: Daemon, way: str) -> None:
    there, back = listed(findings, way), listed(findings, f"{way}&order=desc")
    cursor, seen = "", []
    while cursor is not None:
        page = findings.get(f"/messages?{way}&limit=1{cursor and f'&after={cursor}'}").json
        seen += [record["id"] for record in page["messages"]]
        cursor = page["next"]
        if cursor:
            assert listed(findings, f"{way}&order=desc&after={cursor}") == seen[-2::-1]

    assert seen == there == back[::-1]


@pytest.mark.parametrize(
    "query",
    [
        "to=", "to=ann", "to=a@b.example,c@d.example", "to=" + "x" * 300 + "@example.net", "to=a@b%0A.example",
        "subject=", "subject=" + "x" * 1001, "subject=a%0Ab", "since=", "since=1d", "since=-1", "since=1.5",
        "since=1764340000000", "until=yesterday", "until=99999999999999999999", "refused=", "refused=2", "refused=maybe",
        "order=", "order=down", "after=", "after=x", "after=-1", "limit=", "limit=0", "limit=10001", "status=lost",
        "to=a@b.example&to=a@b.example", "subject=a&subject=b", "since=1&since=1", "refused=1&refused=1", "limit=1&limit=2",
        "order=asc&order=asc", "content=1&content=1",
        "subject=%FF&to=%C3%BC@b.example", "to=a%00@b.example", "since=%zz", "batch_code=%",
    ],
)  # fmt: skip
def test_a_bad_field_of_a_query_is_named(shelf: Daemon, query: str) -> None:
    answer = shelf.get(f"/messages?{query}")

    assert (answer.status, answer.json["code"]) == (400, "bad_field")
    assert answer.json["error"].startswith(query.partition("=")[0] + ": must be ")


def test_a_search_ends_in_time_and_goes_on_from_there(rig: QueueRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailproxy, "LOOK", 15)
    monkeypatch.setattr(mailproxy, "READING_S", 0.0)
    rig.accepted(*[submission(f"m-{n}", sought=f"\nto@example.com\n\t{n}") for n in range(40)])

    for order, found in (("asc", ["m-38"]), ("desc", ["m-38"])):
        after, seen, pages = None, [], 0
        while pages == 0 or after is not None:
            records, after = rig.page(after, 50, order=order, subject="38")
            seen, pages = seen + [record.fields["id"] for record in records], pages + 1
        assert (seen, pages) == (found, 4)


def test_the_subject_of_a_raw_message_is_told_as_its_reader_sees_it(findings: Daemon) -> None:
    records = findings.get("/messages").json["messages"]

    subjects = {record["id"]: record["subject"] for record in records}
    assert (subjects["raw"], subjects["bare"]) == ("Grüße aus Berlin", "")
    assert (subjects["idn"], subjects["plain"]) == ("Instead 100%_*?", "Your order 4711")
    assert findings.message("raw")["subject"] == "Grüße aus Berlin"


# -- the message itself


def test_a_message_is_shown_as_it_goes_on_the_wire(quiet: Daemon, smtp: SmtpServer) -> None:
    file = {"filename": "a.txt", "content": base64.b64encode(b"x" * 400_000).decode()}
    in_header = in_raw("Subject: =?utf-8?q?x?=\nBcc: hidden@example.com\nTo: ok@example.com")
    quiet.submit(
        mail("one", bcc="hidden@example.com", attachments=[file]), mail("raw/ü", raw=in_header, subject=None, body=None)
    )
    answers = [quiet.get(f"/message/{id_}/eml") for id_ in ("one", "raw%2F%C3%BC")]
    time.sleep(1.1)  # what takes its time from the clock would differ

    quiet.post("/commands/activate")
    received = {one.message["Message-ID"]: one.content for one in smtp.wait_for(2)}

    for answer in answers:
        assert (answer.status, answer.headers["Content-Type"]) == (200, "message/rfc822")
        message = email.message_from_bytes(answer.content, policy=email.policy.default)
        assert answer.content == received[message["Message-ID"]]
        assert b"hidden@" not in answer.content
    assert quiet.get("/message/one/eml").content == answers[0].content
    assert quiet.request("HEAD", "/message/one/eml").content == b""
    nobody = quiet.get("/message/nobody/eml")
    assert (nobody.status, nobody.json["ok"]) == (404, False)
    quiet.config["delivery"] = {"redirect_to": "staging@example.org"}
    quiet.write_config()
    quiet.restart()
    redirected = email.message_from_bytes(quiet.get("/message/one/eml").content, policy=email.policy.default)
    assert (redirected["To"], redirected["X-Original-To"]) == (
        "staging@example.org",
        "ok@example.com, hidden@example.com",
    )


def test_what_a_message_refers_to_is_fetched_when_it_is_shown_or_the_reason_why_not_is_told(tmp_path: Path) -> None:
    config = {"smtp": NOWHERE, "scheduler": {"active": "false"}, "attachments": {"base_dir": str(tmp_path / "files"),
        "memory_budget_bytes": 10_000_000}}  # fmt: skip
    (tmp_path / "files").mkdir()
    with Daemon(tmp_path, config) as daemon:
        daemon.submit(mail("m", attachments=[{"filename": "a.bin", "storage_path": str(tmp_path / "files" / "a.bin")}]))
        gone = daemon.get("/message/m/eml")
        assert (gone.status, gone.json["code"]) == (502, "attachment_unavailable")
        assert gone.json["error"].startswith("Attachment fetch failed: ")

        (tmp_path / "files" / "a.bin").write_bytes(os.urandom(3_000_000))
        sizes = [len(daemon.get("/message/m/eml").content) for _ in range(8)]  # many times the budget
        assert sizes == [sizes[0]] * 8
        assert sizes[0] > 4_000_000
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            at_once = list(pool.map(lambda _: len(daemon.get("/message/m/eml").content), range(12)))
        assert at_once == [sizes[0]] * 12


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize(("limit", "pages"), [(5, 2), (10, 1), (11, 1), (9, 2), (1, 10)])
def test_next_is_null_exactly_at_the_end(shelf: Daemon, limit: int, pages: int, order: str) -> None:
    seen, after = 1, ""
    while cursor := shelf.get(f"/messages?order={order}&limit={limit}{after}").json["next"]:
        assert isinstance(cursor, str)
        seen, after = seen + 1, f"&after={cursor}"

    assert seen == pages


def test_a_record_has_every_member_and_the_payload(shelf: Daemon) -> None:
    record = shelf.get("/messages?batch_code=even+fifth").json["messages"][1]

    assert set(record) >= {
        "id", "account_id", "priority", "status", "created_at", "updated_at", "deferred_ts", "sent_ts",
        "error_ts", "error", "reported_ts", "batch_code", "attempts", "message", "recipients",
    }  # fmt: skip
    assert (record["id"], record["account_id"], record["status"]) == ("m-5", "other", "queued")
    assert time.time() - 1800 < record["created_at"] <= time.time()
    assert record["message"] == {**mail("m-5", account_id="other", batch_code="even fifth")}
    assert shelf.get("/message/m-5").json == {"ok": True, "message": record, "attempts": []}


@both_engines
def test_pages_are_complete_while_mail_is_delivered_and_contents_are_left_out_unless_asked_for(
    quiet: Daemon, smtp: SmtpServer
) -> None:
    content, raw = os.urandom(300_000), b"From: me@example.com\r\nSubject: raw\r\n\r\nHello.\r\n"
    attachments = [
        {"filename": "a.bin", "content": base64.b64encode(content).decode()},
        {"filename": "b.txt", "url": "https://example.com/b.txt"},
    ]
    written = {"id": "raw", "from": "me@example.com", "to": "you@example.com", "raw": base64.b64encode(raw).decode()}
    quiet.submit(mail("with", attachments=attachments), written)
    bare = {record["id"]: record["message"] for record in quiet.get("/messages").json["messages"]}
    full = {record["id"]: record["message"] for record in quiet.get("/messages?content=1").json["messages"]}
    assert "content" not in bare["with"]["attachments"][0]
    assert "raw" not in bare["raw"]
    assert full["with"]["attachments"] == attachments
    assert base64.b64decode(full["raw"]["raw"]) == raw
    assert quiet.get("/message/with?content=true").json["message"]["message"] == full["with"]
    assert quiet.get("/message/with?content=0").json["message"]["message"] == bare["with"]
    quiet.post("/commands/delete-messages", {"ids": ["with", "raw"]})

    quiet.post("/account", account_at("other", smtp))
    quiet.submit(*TEN_MESSAGES)
    found, after = listed(quiet, "limit=3"), quiet.get("/messages?limit=3").json["next"]
    quiet.post("/commands/activate")
    quiet.wait_status("m-4", "sent")
    quiet.post("/commands/delete-messages", {"ids": ["m-2", "m-4"]})
    while after:
        page = quiet.get(f"/messages?limit=3&after={urllib.parse.quote(after)}").json
        found, after = found + [record["id"] for record in page["messages"]], page["next"]
    assert found == [f"m-{n}" for n in range(10) if n != 4]


@pytest.mark.parametrize(
    ("to", "outcome", "reply"),
    [
        ("perm@example.com", "error", ("rcpt", 550, "5.1.1")),
        ("perm@example.com, ok@example.com", "sent", ("end-of-data", 250, "2.0.0")),
        ("perm@example.com, greylist1@example.com", "deferred", ("rcpt", 450, "4.7.1")),
    ],
)
@both_engines
def test_the_timeline_tells_of_every_attempt_with_the_reply_that_made_it_end_so(
    relay: Relay, to: str, outcome: str, reply: tuple[str, int, str]
) -> None:
    relay.daemon.submit(mail(to, to=to))
    relay.daemon.wait_status(to, outcome)

    (attempt,) = relay.daemon.attempts(to)

    told_of = ("outcome", "stage", "code", "enhanced_code")
    assert tuple(attempt[name] for name in told_of) == (outcome, *reply)
    assert set(attempt) == {*told_of, "started_at", "ended_at", "text", "recipients", "connection"}


# -- accounts


def test_accounts_of_config_ini_are_changed_there_only_and_their_mail_waits_while_they_are_not_there(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    shop = {"host": smtp.host, "port": smtp.port}
    config = {"smtp": {"password": "s3cret-1", "user": "u"}, "account:shop": shop}
    oauth2 = {"token_url": "https://example.com/t", "client_id": "c", "client_secret": "s3cret-2", "scope": "x"}
    named = {"name": "ignored", "tenant_id": 1, "ttl": None, "max_retries": 7}
    with Daemon(tmp_path, config, smtp=smtp) as daemon:

        def accounts() -> dict[str, Any]:
            return {one["id"]: one for one in daemon.get("/accounts").json["accounts"]}

        web = account_at("web", smtp, user="ü", password="s3cret-3", oauth2=oauth2, **named)
        ignored = [{"id": "web", "unknown": ["name", "tenant_id"]}]
        assert daemon.post("/account", web).json == {"ok": True, "warnings": ignored}
        sources = {"default": "config", "shop": "config", "web": "http"}
        assert {id_: one["source"] for id_, one in accounts().items()} == sources
        assert (accounts()["web"]["user"], accounts()["web"]["ttl"]) == ("ü", 300)
        assert b"s3cret" not in b"".join(daemon.get(path).content for path in ("/accounts", "/status", "/metrics"))
        for answer, section in [
            (daemon.post("/account", account_at("default", smtp)), "[smtp]"),
            (daemon.post("/account", account_at("shop", smtp)), "[account:shop]"),
            (daemon.delete("/account/shop"), "[account:shop]"),
            (daemon.delete("/account/default"), "[smtp]"),
        ]:
            assert (answer.status, answer.json["ok"]) == (409, False)
            assert section in answer.json["error"]

        assert daemon.post("/account/shop/suspend").json == {"ok": True, "active": False}
        daemon.submit(mail("a", account_id="shop"), mail("b", account_id="shop", deferred_ts=FAR))
        del daemon.config["account:shop"]
        daemon.config["delivery"] = {"retry_delays": "7, 8", "max_retries": 3}
        daemon.write_config()
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: "account not found" in json.dumps(daemon.status()["accounts"]), "its absence")
        assert submitted(daemon, mail("c", account_id="shop")).json["rejected"][0]["reason"] == "account not found"
        wait_until(lambda: accounts()["web"]["retry_delays"] == [7, 8], "the defaults of config.ini")
        assert accounts()["web"]["max_retries"] == 7

        daemon.restart()
        absent = daemon.status()["accounts"]["shop"]
        assert (absent["pending"], absent["reason"]) == (2, "account not found")
        daemon.config["account:shop"] = shop
        daemon.write_config()
        daemon.signal(signal.SIGHUP)
        wait_until(lambda: daemon.status()["accounts"]["shop"]["state"] == "suspended", "its return")
        daemon.post("/account/shop/activate")
        daemon.wait_status("a", "sent")
        assert daemon.message("b")["status"] == "deferred"
        assert "s3cret" not in daemon.log


def test_no_default_account_is_needed_and_secrets_by_reference_are_not_in_the_database(tmp_path: Path) -> None:
    secret = tmp_path / "password"
    secret.write_text("s3cret-in-file")
    with SmtpServer(accounts={"u": "s3cret-in-file", "v": "s3cret-in-env"}) as server:
        with Daemon(tmp_path, environment={"PASSWORD": "s3cret-in-env"}) as daemon:
            daemon.post("/account", account_at("f", server, user="u", password=f"file:{secret}"))
            daemon.post("/account", account_at("e", server, user="v", password="env:PASSWORD"))
            daemon.submit(mail("a", account_id="f"), mail("b", account_id="e"))
            server.wait_for(2)
            (refused,) = submitted(daemon, mail("c")).json["rejected"]
            assert refused["reason"].startswith("missing account configuration")
            daemon.stop()

        files = b"".join(path.read_bytes() for path in tmp_path.glob("queue.db*"))
        assert b"s3cret" not in files
        assert b"env:PASSWORD" in files
        assert "s3cret" not in daemon.log


@both_engines
def test_a_replaced_account_delivers_as_it_says_now_and_suspensions_hold_also_after_a_restart(
    daemon: Daemon, smtp: SmtpServer
) -> None:
    with SmtpServer() as other:
        daemon.post("/account", account_at("web/1", smtp))
        daemon.submit(mail("a", account_id="web/1"))
        smtp.wait_for(1)
        daemon.post("/account", account_at("web/1", other))
        daemon.submit(mail("b", account_id="web/1"))
        other.wait_for(1)

        daemon.post("/account", account_at("idle", smtp))
        assert daemon.post("/account/idle/suspend").json == {"ok": True, "active": False}
        daemon.submit(mail("kept", account_id="idle"), mail("c"))
        daemon.wait_status("c", "sent")
        assert daemon.post("/commands/suspend").json == {"ok": True, "active": False}
        daemon.submit(mail("d", account_id="web/1"), mail("e"))
        daemon.restart()

        assert daemon.status()["active"] is False
        assert [daemon.message(id_)["status"] for id_ in ("d", "e")] == ["queued"] * 2
        assert daemon.post("/commands/activate").json == {"ok": True, "active": True}
        daemon.wait_status("e", "sent")
        other.wait_for(2)
        assert daemon.status()["accounts"]["idle"]["state"] == "suspended"
        assert daemon.message("kept")["status"] == "queued"
        assert daemon.post("/account/idle/activate").json == {"ok": True, "active": True}
        daemon.wait_status("kept", "sent")
        assert daemon.delete("/account/web%2F1").status == 200


@both_engines
def test_a_suspended_batch_rests_and_nothing_else_does(daemon: Daemon, smtp: SmtpServer) -> None:
    def arrived() -> list[str]:
        return sorted(one.message["Subject"] for one in smtp.received)

    def titled(id_: str, **fields: Any) -> dict[str, Any]:
        return mail(id_, subject=id_, **fields)

    daemon.submit(titled("back", to="greylist1@example.com", batch_code="b"))
    daemon.submit(titled("bad", to="perm@example.com", batch_code="b"))
    daemon.wait_status("back", "deferred")
    daemon.wait_status("bad", "error")
    assert daemon.post("/commands/suspend?batch_code=b").json == {"ok": True, "active": False}
    expires = int(time.time()) + 2
    daemon.submit(
        titled("later", batch_code="b"), titled("other", batch_code="c"), titled("bare"),
        titled("scheduled", batch_code="b", deferred_ts=int(time.time()) + 1),
        titled("expires", batch_code="b", expires_ts=expires),
    )  # fmt: skip
    assert daemon.post("/commands/retry-messages", {"ids": ["bad"]}).json["queued"] == 1
    daemon.post("/commands/run-now")
    daemon.wait_status("bare", "sent")
    daemon.wait_status("other", "sent")
    wait_until(lambda: daemon.message("scheduled")["status"] == "queued", "its time")

    for restarted in (False, True):
        status = daemon.status()
        assert (status["active"], status["suspended_batches"]) == (True, ["b"])
        states = [daemon.message(id_)["status"] for id_ in ("back", "bad", "later", "scheduled")]
        assert (states, arrived()) == (["deferred", *["queued"] * 3], ["bare", "other"])
        if not restarted:
            assert daemon.wait_status("expires", "error")["error_ts"] == expires
            daemon.restart()
            daemon.post("/account/default/suspend")

    assert daemon.post("/commands/activate", {"batch_code": "b"}).json == {"ok": True, "active": True}
    assert daemon.status()["suspended_batches"] == []
    daemon.submit(titled("last", batch_code="b"))
    assert arrived() == ["bare", "other"]
    daemon.post("/account/default/activate")
    for id_ in ("later", "scheduled", "last"):
        daemon.wait_status(id_, "sent")
    daemon.wait_status("bad", "error")
    assert arrived() == ["bare", "last", "later", "other", "scheduled"]


@both_engines
def test_what_is_claimed_of_a_batch_comes_back_when_it_is_suspended(daemon: Daemon, smtp: SmtpServer) -> None:
    daemon.submit(*[mail(f"m-{n}", "slow100ms@example.com", batch_code="b") for n in range(200)])
    wait_until(lambda: len(smtp.received) > 3, "the first ones")

    daemon.post("/commands/suspend", {"batch_code": "b"})
    on_the_wire = 5
    seen = len(smtp.received)
    daemon.submit(mail("other", "ok@example.com"))
    daemon.wait_status("other", "sent")
    wait_until(lambda: not daemon.status()["in_delivery"], "the end of what was on the wire")

    assert len(smtp.received) <= seen + on_the_wire + 1
    assert daemon.status()["pending"] > 150


@pytest.mark.parametrize(
    ("query", "body"),
    [
        ("?batch_code=", None), ("", {"batch_code": ""}), ("", {"batch_code": 7}), ("", {"batch_code": ["b"]}),
        ("", {"batch_code": {}}), ("", {"batch_code": True}), ("?batch_code=b&batch_code=b", None), ("", {"batch_code": "x" * 1001}),
        ("?batch_code=b", {"batch_code": "c"}), ("", {"batch_code": "a\nb"}),
    ],
)  # fmt: skip
def test_a_bad_batch_code_suspends_nothing(shelf: Daemon, query: str, body: Any) -> None:
    for command in ("suspend", "activate"):
        answer = shelf.post(f"/commands/{command}{query}", body)
        assert (answer.status, answer.json["code"]) == (400, "bad_field")
        assert answer.json["error"].startswith("batch_code: ")
    assert (shelf.status()["suspended_batches"], shelf.status()["active"]) == ([], False)


@both_engines
def test_the_undelivered_mail_of_a_deleted_account_becomes_reported_errors_also_when_it_is_retried(
    daemon: Daemon, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    daemon.post("/account", account_at("web", smtp, max_connections=1))
    ways = {"later": {"deferred_ts": FAR}, "back": {"to": "temp@example.com"}, "bad": {"to": "perm@example.com"}}
    daemon.submit(*[mail(id_, account_id="web", **fields) for id_, fields in ways.items()])
    daemon.wait_status("back", "deferred")
    reports.wait_for_entry("bad", "error")
    daemon.submit(mail("slow", account_id="web", to="slow500ms@example.com"))
    wait_until(lambda: smtp.visits["slow500ms@example.com"], "the transaction")
    daemon.submit(*[mail(f"m-{n}", account_id="web") for n in range(100)])

    answer = daemon.delete("/account/web")

    assert answer.status == 200
    assert daemon.delete("/account/web").status == 404
    assert submitted(daemon, mail("new", account_id="web")).json["rejected"][0]["reason"] == "account not found"
    reports.wait_for_entry("slow", "sent")
    reports.wait_for(lambda r: sum(e["error"] == "account deleted" for e in r.entries) == 102)
    assert answer.json["failed"] <= 102
    assert daemon.status()["pending"] == 0
    assert "web" not in daemon.status()["accounts"]

    answer = daemon.post("/commands/retry-messages", {"ids": ["bad"]})
    gone = {"ok": True, "queued": 0, "not_found": [], "not_failed": [], "account_not_found": ["bad"]}
    assert answer.json == gone
    bad = daemon.message("bad")
    assert (bad["status"], bad["error"], bad["attempts"]) == ("error", "account not found", 0)
    reports.wait_for(lambda r: "account not found" in [entry["error"] for entry in r.entries])


def test_where_the_storage_refuses_an_account_is_neither_added_nor_deleted(tmp_path: Path, smtp: SmtpServer) -> None:
    storage = FaultyStorage(tmp_path)

    def rename(old: str, new: str) -> None:
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as db, db:
            db.execute(f"ALTER TABLE {old} RENAME TO {new}")

    def there() -> list[str]:
        return [one["id"] for one in daemon.get("/accounts").json["accounts"]]

    with Daemon(tmp_path, smtp=smtp, environment=storage.environment) as daemon:
        rename("sends", "away")  # what its limits have seen already cannot be read
        assert daemon.post("/account", account_at("web", smtp)).status == 503
        rename("away", "sends")
        assert there() == ["default"]
        daemon.restart()
        assert there() == ["default"]
        assert daemon.post("/account", account_at("web", smtp)).status == 200

        daemon.submit(mail("m", account_id="web", to="slowrcpt20@example.com"))
        wait_until(lambda: smtp.visits["slowrcpt20@example.com"], "the transaction")
        with storage.fails("full"):
            assert daemon.delete("/account/web").status == 503
            smtp.cut_connections()
            wait_until(lambda: "storage message=m " in daemon.log, "the outcome to wait for the storage")
        wait_until(lambda: daemon.message("m")["attempts"] == 1, "the outcome")
        assert daemon.message("m")["status"] == "deferred"
        assert "web" in daemon.status()["accounts"]
        assert daemon.delete("/account/web").json == {"ok": True, "failed": 1}
        assert daemon.message("m")["error"] == "account deleted"


@both_engines
def test_accounts_that_come_and_go_in_the_midst_of_everything_break_nothing(
    daemon: Daemon, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    until = time.monotonic() + 0.6
    answers: list[HttpAnswer] = []
    accepted: list[str] = []

    def come_and_go(worker: int) -> None:
        for number in itertools.count(1):
            tos = {f"m-{worker}-{number}-{word}": f"{word}@example.com" for word in ("ok", "temp", "slow20ms")}
            answer = submitted(daemon, *[mail(id_, to=to, account_id="web") for id_, to in tos.items()])
            accepted.extend(tos if answer.status == 200 else [])
            limited = account_at("web", smtp, limit_per_minute=1_000_000 if worker % 2 else 0)
            method, path, body = [
                ("POST", "/account", limited), ("DELETE", "/account/web", None), ("POST", "/account/web/suspend", None),
                ("POST", "/account/web/activate", None), ("POST", "/commands/run-now", None), ("GET", "/status", None),
            ][(number + worker) % 6]  # fmt: skip
            answers.extend([answer, daemon.request(method, path, body)])
            if time.monotonic() > until:
                return

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(come_and_go, range(4)))
    daemon.delete("/account/web")

    assert {answer.status for answer in answers} <= {200, 400, 404}
    wait_until(lambda: daemon.status()["pending"] == 0, "the end of all")
    assert accepted
    wait_until(lambda: daemon.status()["unreported"] == 0, "the reports")
    final = {entry["id"] for entry in reports.acknowledged if entry["status"] in ("sent", "error")}
    assert final == set(accepted)
    assert told(daemon) == counted(daemon)
    assert "Traceback" not in daemon.log


# ======================================================================
# DAEMON
# ======================================================================


# -- who may come in


def test_every_endpoint_but_two_wants_the_token(tmp_path: Path) -> None:
    with Daemon(tmp_path, token="t0ken") as daemon:
        bare = {"X-API-Token": ""}
        for method, path in [("GET", "/status"), ("POST", "/account"), ("GET", "/nowhere"), ("PUT", "/status")]:
            answer = daemon.request(method, path, headers=bare)
            assert (answer.status, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            sentence = "Invalid or missing API token"
            assert answer.json == {"ok": False, "error": sentence, "code": "unauthorized", "detail": sentence}
        assert [daemon.get(path, headers=bare).status for path in ("/health", "/ready")] == [200, 200]

        for headers, status in [
            ({"X-API-Token": "t0ken"}, 200),
            *(({"X-API-Token": token}, 401) for token in ("T0ken", "t0ken2", "t\xf6ken")),
            *(({"X-API-Token": "", "Authorization": f"{word} t0ken"}, 200) for word in ("Bearer", "bearer ")),
            *(({"X-API-Token": "", "Authorization": words}, 401) for words in ("Basic t0ken", "Bearer")),
        ]:
            assert daemon.get("/status", headers=headers).status == status, headers
        assert (daemon.get("/nowhere").status, daemon.request("PUT", "/status").status) == (404, 405)
        assert "t0ken" not in daemon.log


def started(folder: Path, config: str, **environment: str) -> Ended:
    """A daemon that is expected to refuse to start."""
    (folder / "config.ini").write_text(config)
    return run_command("serve", "--config", folder / "config.ini", folder=folder, environment=environment)


@pytest.mark.parametrize(
    ("config", "saying"),
    [
        ("host = 0.0.0.0\nport = 0", "api_token"),
        ("port = {taken}", "cannot listen on 127.0.0.1"),
        ("port = 0\n[storage]\ndb_path = {newer}", "newer"),
    ],
)
def test_what_cannot_be_served_is_said(tmp_path: Path, config: str, saying: str) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "newer.db")) as db:
        db.execute("PRAGMA user_version = 999")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = config.format(taken=taken.getsockname()[1], newer=tmp_path / "newer.db")
        refused = started(tmp_path, f"[server]\n{where}\n")

    assert refused.returncode == 2
    assert saying in refused.stderr


# -- the queue file


def test_a_second_daemon_on_the_same_file_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon:
        (tmp_path / "second").mkdir()
        refused = started(tmp_path / "second", f"[storage]\ndb_path = {tmp_path}/queue.db\n[server]\nport = 0\n")

        assert refused.returncode == 2
        assert daemon.process
        assert f"pid {daemon.process.pid}" in refused.stderr
        assert "Traceback" not in refused.stderr
        assert daemon.get("/ready").status == 200


def test_the_file_and_its_siblings_are_the_owners_alone(tmp_path: Path, smtp: SmtpServer) -> None:
    (tmp_path / "queue.db").touch(mode=0o644)
    with Daemon(tmp_path, smtp=smtp) as daemon:
        daemon.submit(mail())
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("queue.db*")}

        assert set(modes) >= {"queue.db", "queue.db-wal", "queue.db-shm"}
        assert set(modes.values()) == {0o600}


def test_while_another_process_holds_the_write_lock_nothing_is_accepted(tmp_path: Path, smtp: SmtpServer) -> None:
    with Daemon(tmp_path, smtp=smtp) as daemon:
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            answer = submitted(daemon, mail("refused-1"), mail("refused-2"))
            assert daemon.get("/health").status == 200
            other.execute("ROLLBACK")

        assert (answer.status, answer.json["ok"]) == (503, False)
        assert answer.json["error"]
        assert listed(daemon) == []
        daemon.submit(mail("refused-1"))
        daemon.wait_status("refused-1", "sent")


TABLES = ("messages", "switches", "accounts", "suspensions")


def test_a_storage_that_refuses_is_a_503_everywhere_and_all_resumes_by_itself(tmp_path: Path, smtp: SmtpServer) -> None:
    with Daemon(tmp_path, smtp=smtp) as daemon:
        daemon.submit(mail("later", deferred_ts=FAR))
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as db, db:
            for table in TABLES:
                db.execute(f"ALTER TABLE {table} RENAME TO away_{table}")
        answers = [
            submitted(daemon, mail("refused")),
            *[daemon.get(path) for path in ("/ready", "/messages", "/message/later")],
            *[daemon.post(f"/commands/{name}") for name in ("suspend", "activate", "cleanup-messages")],
            *[daemon.post(f"/commands/{name}-messages", {"ids": ["later"]}) for name in ("delete", "retry")],
            daemon.post("/account", account_at("refused", smtp)),
            daemon.post("/account/default/suspend"),
        ]
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as db, db:
            for table in TABLES:
                db.execute(f"ALTER TABLE away_{table} RENAME TO {table}")

        assert [(answer.status, answer.json["ok"]) for answer in answers] == [(503, False)] * len(answers)
        assert all(answer.json["error"] for answer in answers)
        wait_until(lambda: daemon.get("/ready").status == 200, "readiness")
        assert listed(daemon) == ["later"]
        assert (daemon.status()["active"], set(daemon.status()["accounts"])) == (True, {"default"})
        daemon.submit(mail("after"))
        daemon.wait_status("after", "sent")
        assert "Traceback" not in daemon.log


# -- a storage that fails while the daemon runs

FAULTY_STORAGE = r"""
/* Preloaded into the daemon: as long as the symbolic link $FAULT is there, the storage fails as it says. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(const char *call) {
    char fault[32];
    ssize_t size = readlink(getenv("FAULT"), fault, sizeof fault - 1);
    if (size < 0)
        return 0;
    fault[size] = 0;
    errno = !strcmp(fault, "full") ? ENOSPC : !strcmp(fault, "read-only") ? EROFS : EIO;
    return !strcmp(call, "write") ? errno != EIO : errno == EIO;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t at) {
    return fails("write") ? -1 : REAL(pwrite)(fd, bytes, size, at);
}

ssize_t pwrite64(int fd, const void *bytes, size_t size, off64_t at) {
    return fails("write") ? -1 : REAL(pwrite64)(fd, bytes, size, at);
}

int fsync(int fd) { return fails("sync") ? -1 : REAL(fsync)(fd); }

int fdatasync(int fd) { return fails("sync") ? -1 : REAL(fdatasync)(fd); }
"""


def refused_commits(daemon: Daemon) -> float:
    """How often the storage refused so far."""
    metrics = daemon.get("/metrics").content.decode()
    return float(re.findall(r"^mailproxy_storage_commit_failures_total (.+)", metrics, re.MULTILINE)[0])


class FaultyStorage:
    """Makes the storage of one daemon fail at the border to the system, and mends it."""

    def __init__(self, folder: Path) -> None:
        needs("cc")
        self._fault, library = folder / "fault", folder / "faulty.so"
        command = ["cc", "-shared", "-fPIC", "-o", library, "-x", "c", "-"]
        subprocess.run(command, input=FAULTY_STORAGE.encode(), check=True, timeout=60)
        self.environment = {"LD_PRELOAD": str(library), "FAULT": str(self._fault)}

    @contextlib.contextmanager
    def fails(self, how: str) -> Iterator[None]:
        """Writes fail because the disk is "full" or "read-only"; or syncs do, with an input/output "error"."""
        self._fault.symlink_to(how)
        try:
            yield
        finally:
            self._fault.unlink()


def test_while_the_storage_fails_nothing_is_accepted_or_sent_and_then_all_resumes(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    """It fails while two messages are on the wire and four wait, and comes back."""
    storage = FaultyStorage(tmp_path)
    config = {"smtp": {"max_connections": 2}}
    with Daemon(tmp_path, config, smtp=smtp, reports=reports, environment=storage.environment) as daemon:
        for name in ("full", "read-only", "error"):
            ids, there = [f"{name}-{number}" for number in range(6)], listed(daemon)
            slow, quick = f"slow600ms+{name}@example.com", f"ok+{name}@example.com"
            daemon.submit(*(letter(id_, slow if id_ in ids[:2] else quick) for id_ in ids))
            wait_until(lambda: smtp.visits[slow] == 2, "mail on the wire")  # noqa: B023

            with storage.fails(name):
                answer = submitted(daemon, *letters(f"refused-{name}", 3, body="x" * 10_000))
                assert (answer.status, answer.json["ok"]) == (503, False)
                wait_until(lambda: daemon.log.count(f"storage message={name}-") == 2, "two outcomes to wait")  # noqa: B023
                assert daemon.get("/ready").status == 503
                assert [daemon.message(id_)["status"] for id_ in ids] == ["queued"] * 6
                assert (smtp.visits[slow], smtp.visits[quick]) == (2, 0)

            wait_sent(daemon, *ids)
            assert sorted(id_ for id_ in subjects(smtp) if name in id_) == ids
            assert listed(daemon) == [*there, *ids]

        wait_until(lambda: daemon.status()["unreported"] == 0, "the reports")
        told_of = [(entry["id"], entry["status"], entry["attempts"]) for entry in reports.acknowledged]
        assert sorted(told_of) == [(id_, "sent", 1) for id_ in sorted(listed(daemon))]
        assert len(smtp.received) == len(told_of)
        assert daemon.stop() == 0
        with daemon.db() as db:
            assert db.execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_a_storage_that_fails_at_the_start_is_said_and_nothing_is_sent(tmp_path: Path, smtp: SmtpServer) -> None:
    storage = FaultyStorage(tmp_path)
    smtp.stop()
    with Daemon(tmp_path, smtp=smtp, environment=storage.environment) as daemon:
        daemon.submit(*letters("m", 3))
        wait_until(lambda: state_of(daemon) == "cooling", "its finding nobody there")
        daemon.kill()
        smtp.start()

        with storage.fails("error"):
            refused = started(tmp_path, (tmp_path / "config.ini").read_text(), **storage.environment)
        assert refused.returncode == 2
        assert "the queue cannot be written: disk I/O error" in refused.stderr
        assert smtp.received == []

        daemon.start()
        ask(daemon, "/account/default/activate")  # ends the pause that cooling left
        wait_sent(daemon, "m-0", "m-1", "m-2")


def test_what_is_being_put_together_when_the_storage_fails_is_not_sent_before_it_is_back(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    storage = FaultyStorage(tmp_path)
    config = {"attachments": {"allow_hosts": "127.0.0.1"}}
    with (
        Daemon(tmp_path, config, smtp=smtp, environment=storage.environment) as daemon,
        socket.create_server(("127.0.0.1", 0)) as web,
    ):
        url = f"http://127.0.0.1:{web.getsockname()[1]}/"
        daemon.submit(letter("m", attachments=[{"filename": "hello.txt", "url": url}]))
        line, _ = web.accept()
        with line, storage.fails("full"):
            assert submitted(daemon, letter("refused")).status == 503
            line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nHello")
            wait_until(lambda: daemon.status()["in_delivery"] == 0, "its return to the queue")
            assert smtp.received == []

        wait_sent(daemon, "m")
        assert subjects(smtp) == ["m"]


# -- killed again and again


def test_nothing_is_lost_while_the_daemon_and_its_servers_are_killed(tmp_path: Path) -> None:
    """A short run of the script that is made for long ones."""
    chaos = PROGRAM.parent / "bench" / "chaos.py"
    options = ["--rounds=3", "--seed=1", "--clients=2", "--smtp", "--reports", "--program", STARTER]
    run = subprocess.run(
        [sys.executable, chaos, *options], capture_output=True, text=True, timeout=110,
        env={**_plain_environment(), "TMPDIR": str(tmp_path)},
    )  # fmt: skip

    assert run.stdout, run.stderr
    verdict = json.loads(run.stdout.splitlines()[-1])
    assert (run.returncode, verdict["ok"], verdict["offenders"]) == (0, True, {})
    assert verdict["counts"]["kills"] >= 3
    assert verdict["counts"]["accepted"] > 0


# -- its end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@both_engines
def test_a_signal_ends_it_after_what_is_in_progress(tmp_path: Path, smtp: SmtpServer, number: int) -> None:
    with Daemon(tmp_path, smtp=smtp) as daemon:
        daemon.submit(mail(to="slow500ms@example.com"))
        wait_until(lambda: smtp.visits["slow500ms@example.com"], "the transaction")
        with socket.create_connection(("127.0.0.1", daemon.port)) as line:
            line.settimeout(30)
            line.sendall(b"POST /commands/run-now HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{")
            wait_until(lambda: daemon.get("/health").status == 200, "its arrival")
            daemon.signal(number)
            daemon.wait_for_log("stopping")
            line.sendall(b"}")
            answer = b"".join(iter(lambda: line.recv(4096), b""))

        assert daemon.wait_for_exit() == 0
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert len(smtp.received) == 1
        with daemon.db() as db:
            assert db.execute("SELECT count(*) FROM messages WHERE sent_ts IS NOT NULL").fetchone()[0] == 1


def test_an_upstream_that_hangs_does_not_keep_it_from_ending(tmp_path: Path, reports: ReportReceiver) -> None:
    reports.answers.append(Answer(delay=60))
    with Daemon(tmp_path, reports=reports) as daemon:
        reports.wait_for(lambda r: r.calls)
        daemon.signal(signal.SIGTERM)
        daemon.wait_for_log("stopping")
        daemon.signal(signal.SIGTERM)

        assert daemon.wait_for_exit(25) == 0


def test_a_loop_that_dies_takes_the_daemon_down_loudly(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    with Daemon(tmp_path, smtp=smtp, reports=reports) as daemon:
        daemon.submit(mail(deferred_ts=int(time.time()) + 3600))
        with contextlib.closing(sqlite3.connect(tmp_path / "queue.db")) as db, db:
            db.execute("UPDATE messages SET report_order = 'no place'")
        with contextlib.suppress(http.client.HTTPException, OSError):  # it may be dead before it answers
            daemon.post("/commands/run-now")

        assert daemon.wait_for_exit() == 1
        assert "loop=reporter" in daemon.wait_for_log("a loop ended")


def test_a_client_that_goes_away_disturbs_nobody(relay: Relay) -> None:
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", relay.daemon.port)) as line:
            line.sendall(b"GET /messages HTTP/1.1\r\nHost: x\r\n\r\n" * 20)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    relay.daemon.submit(mail("undisturbed"))
    relay.daemon.wait_status("undisturbed", "sent")
    assert " ERROR " not in relay.daemon.log


# -- SIGHUP


def test_sighup_takes_over_what_can_change_and_names_what_cannot(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    with Daemon(tmp_path, smtp=smtp, token="old-token") as daemon:
        daemon.config["server"]["api_token"] = "new-token"
        daemon.config["server"]["max_batch"] = 2
        daemon.config["server"]["host"] = "::1"
        daemon.config["storage"]["db_path"] = tmp_path / "other.db"
        daemon.config["delivery"] = {"retry_delays": "7", "test_mode": "true"}
        daemon.config["logging"] = {"level": "debug", "format": "json"}
        daemon.config["client"] = {"client_sync_url": reports.url}
        daemon.config["account:new"] = {"host": smtp.host, "port": smtp.port}
        daemon.write_config()
        daemon.signal(signal.SIGHUP)

        line = json.loads(daemon.wait_for_log("configuration reloaded"))
        assert set(line["needs_restart"].split(", ")) == {"server.host", "storage.db_path", "delivery.test_mode"}
        reports.wait_for(lambda r: r.calls)
        assert daemon.get("/status").status == 401
        daemon.token = "new-token"
        accounts = {one["id"]: one for one in daemon.get("/accounts").json["accounts"]}
        assert set(accounts) == {"default", "new"}
        assert accounts["default"]["retry_delays"] == [7]
        assert submitted(daemon, mail("a"), mail("b"), mail("c")).status == 413
        daemon.submit(mail(account_id="new"))
        reports.wait_for_entry("m-1", "sent")
        assert daemon.request("GET", "/status", headers={"X-Request-Id": "look-for-me"}).status == 200
        assert json.loads(daemon.wait_for_log("look-for-me"))["request"] == "look-for-me"


def test_sighup_ends_what_waits_for_a_password_or_an_upstream_that_is_mended(tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.write_text("wrong")
    with SmtpServer(accounts={"me": "right"}) as smtp, ReportReceiver() as reports, ReportReceiver() as other:
        reports.answers += [Answer(status=503, headers={"Retry-After": "3600"})] * 2
        login = {"smtp": {"user": "me", "password": f"file:{password}"}}
        with Daemon(tmp_path, login, smtp=smtp, reports=reports) as daemon:
            daemon.submit(mail())
            wait_until(lambda: daemon.status()["accounts"]["default"]["state"] == "cooling", "a refused login")
            wait_until(lambda: reports.calls, "a call")
            password.write_text("right")
            daemon.config["client"]["client_sync_url"] = other.url
            daemon.write_config()
            daemon.signal(signal.SIGHUP)

            other.wait_for_entry("m-1", "sent")
            assert smtp.logins[0] == ("me", False)


def test_a_broken_file_changes_nothing_and_is_said(tmp_path: Path, smtp: SmtpServer) -> None:
    with Daemon(tmp_path, {"server": {"max_batch": 3}}, smtp=smtp) as daemon:
        broken = [("server", {"max_batch": "many"}), ("account:x", {"host": "h", "port": "0"}), ("typo", {"a": "b"})]
        for section, values in broken:
            before = dict(daemon.config)
            daemon.config[section] = {**daemon.config.get(section, {}), **values}
            daemon.write_config()
            log = daemon.log.count("not reloaded")
            daemon.signal(signal.SIGHUP)
            wait_until(lambda log=log: daemon.log.count("not reloaded") > log, "the complaint")
            assert f"[{section}]" in daemon.log
            daemon.config = before

        assert submitted(daemon, *[mail(f"m-{n}") for n in range(4)]).status == 413
        assert set(daemon.status()["accounts"]) == {"default"}


def test_sighup_cannot_open_the_door_to_everybody(tmp_path: Path) -> None:
    """The host needs a restart: a new one must not be what makes a token needless."""
    (tmp_path / "before.ini").write_text("[server]\nhost = 0.0.0.0\napi_token = t0ken\n")
    (tmp_path / "after.ini").write_text("[server]\nhost = 127.0.0.1\n")
    before, after = (mailproxy.load_settings(str(tmp_path / name), {}, {}) for name in ("before.ini", "after.ini"))
    daemon = mailproxy.Daemon(before, {}, reload=lambda: after)

    with pytest.raises(mailproxy.ConfigurationError, match="api_token"):
        daemon._read_again()


# -- the log


def test_the_log_ties_message_account_and_request_together(tmp_path: Path, smtp: SmtpServer) -> None:
    config = {"logging": {"format": "JSON", "level": "INFO", "delivery_activity": "true"}}
    with Daemon(tmp_path, config, smtp=smtp) as daemon:
        batch = {"messages": [mail("good"), mail("bad", to="perm@example.com"), mail("worse", to=None)]}
        answer = daemon.request("POST", "/commands/add-messages", batch, headers={"X-Request-Id": "req-1"})
        daemon.wait_status("good", "sent")
        daemon.wait_status("bad", "error")
        daemon.wait_for_log("message failed")
        daemon.wait_for_log("message sent")

    lines = [json.loads(line) for line in daemon.log.splitlines()]
    assert answer.headers["X-Request-Id"] == "req-1"
    told = {(line["event"], line.get("message"), line.get("account"), line.get("request")) for line in lines}
    assert told >= {
        ("message accepted", "good", "default", "req-1"),
        ("message rejected", "worse", None, "req-1"),
        ("message sent", "good", "default", None),
        ("message failed", "bad", "default", None),
    }
    assert all({"time", "level", "event"} <= set(line) for line in lines)


# -- systemd


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told_how_it_is(tmp_path: Path, abstract: bool) -> None:
    name = f"mailproxy-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name if abstract else name)
        systemd.settimeout(10)
        environment = {"NOTIFY_SOCKET": "@" + name if abstract else name, "WATCHDOG_USEC": "200000"}
        with Daemon(tmp_path, environment=environment) as daemon:
            told = [systemd.recv(4096).decode() for _ in range(4)]
            assert sorted(told) == ["READY=1"] + ["WATCHDOG=1"] * 3
            daemon.signal(signal.SIGHUP)
            while not told[-1].startswith("RELOADING=1\nMONOTONIC_USEC="):
                told.append(systemd.recv(4096).decode())
            while told[-1] != "READY=1":
                told.append(systemd.recv(4096).decode())
            daemon.stop()
            while told[-1] != "STOPPING=1":
                told.append(systemd.recv(4096).decode())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no heap for each thread")
def test_all_threads_take_their_memory_from_one_heap() -> None:
    code = (
        "import ctypes, mailproxy, threading\n"
        "mailproxy.share_one_heap()\n"
        "for _ in range(4):\n"
        "    threading.Thread(target=lambda: bytes(100_000)).start()\n"
        "ctypes.CDLL(None).malloc_stats()\n"
    )

    told = subprocess.run(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, cwd=Path(mailproxy.__file__).parent,
        timeout=30, check=True,
    ).stderr  # fmt: skip

    assert told.count("Arena ") == 1


def test_the_unit_test_of_the_notifier_needs_no_systemd() -> None:
    silent = mailproxy.SystemdNotifier({})
    silent.tell("READY=1")
    gone = mailproxy.SystemdNotifier({"NOTIFY_SOCKET": "/nowhere/notify", "WATCHDOG_USEC": "5000000"})
    gone.tell("READY=1")

    assert silent.watchdog_interval_s is None
    assert gone.watchdog_interval_s == 1.25
    assert mailproxy.SystemdNotifier({"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}).watchdog_interval_s is None


# ======================================================================
# COMMAND LINE
# ======================================================================


def run_command(
    *words: object, folder: Path | None = None, environment: Mapping[str, str] | None = None, stdin: bytes = b"",
    called: object = STARTER,
) -> Ended:  # fmt: skip
    """Run the program as a user does, with nothing of ours in its environment."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as complaints:
        given.write(stdin)
        given.seek(0)
        outside = {"cwd": folder or Path.cwd(), "env": {**_plain_environment(), **(environment or {})}}
        command = start_program(words, called=called, stdin=given, stdout=out, stderr=complaints, **outside)
        try:
            status = command.wait(60)
        finally:
            command.kill()
        for file in out, complaints:
            file.seek(0)
        return Ended(status, out.read().decode(), complaints.read().decode())


class Ended(NamedTuple):
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def sentence(self) -> str:
        """What it said on stderr, which is one line."""
        assert self.stderr.count("\n") == 1, self.stderr
        return self.stderr.strip()


Run = Callable[..., Ended]


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command inside this process, which is quick."""

    def run_here(*words: object) -> Ended:
        capsys.readouterr()
        try:
            status = mailproxy.main([str(word) for word in words])
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        said = capsys.readouterr()
        return Ended(status, said.out, said.err)

    return run_here


@pytest.fixture
def asking(daemon: Daemon, here: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command inside this process, towards the daemon of the test, in its folder."""
    monkeypatch.chdir(daemon.folder)
    monkeypatch.setenv("MAILPROXY_URL", f"http://127.0.0.1:{daemon.port}")
    return here


class Running(Forked):
    """A command that writes to pipes, as subprocess.Popen has them."""

    def __init__(
        self, *words: object, stdout: int = subprocess.PIPE, cwd: object = ".", env: Mapping[str, str]
    ) -> None:
        piped = stdout == subprocess.PIPE
        (out, stdout), (complaints, stderr) = os.pipe() if piped else (None, stdout), os.pipe()
        self.stdout, self.stderr = os.fdopen(out) if piped else None, os.fdopen(complaints)
        with open(os.devnull) as nothing:
            super().__init__(words, cwd=Path(str(cwd)).absolute(), env=env, stdin=nothing, stdout=stdout, stderr=stderr)
        for descriptor in [stderr] + [stdout] * piped:
            os.close(descriptor)

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """What it wrote besides, which is not much, once it has ended."""
        self.wait(timeout)
        return self.stdout.read() if self.stdout else "", self.stderr.read()

    def close(self) -> None:
        self.kill()
        self.wait(60)
        for file in filter(None, (self.stdout, self.stderr)):
            file.close()


@contextlib.contextmanager
def running(*words: object, env: Mapping[str, str] | None = None, **options: Any) -> Iterator[Running]:
    """A command that goes on until it is told to stop, or is killed at the end of the test."""
    with contextlib.closing(Running(*words, env=_plain_environment() if env is None else env, **options)) as process:
        yield process


def on_screen(
    *words: object, until: bytes | None = None, stop: signal.Signals = signal.SIGINT, **environment: str
) -> tuple[bytes, int, str]:
    """What a command shows in a terminal, stopped once it showed `until`; its exit status, and what it complained of."""
    screen, terminal = pty.openpty()
    seen = b""
    with running(*words, stdout=terminal, env={**_plain_environment(), "TERM": "xterm", **environment}) as process:
        os.close(terminal)
        with contextlib.suppress(OSError):  # EIO: the terminal's other end is closed
            while piece := os.read(screen, 4096):
                seen += piece
                if until and until in seen:
                    process.send_signal(stop)
                    until = None
        _, complaints = process.communicate(timeout=60)
    os.close(screen)
    return seen, process.returncode, complaints


def printed_rows(printed: str, first_column: str) -> dict[str, dict[str, str]]:
    """The table that begins with this column, by its first column; it must be aligned."""
    lines = printed.splitlines()
    start = next(n for n, line in enumerate(lines) if line.split()[:1] == [first_column])
    names = lines[start].split()
    edges = [*(match.start() for match in re.finditer(r"\S+", lines[start])), 10_000]
    rows = ([line[a:b].strip() for a, b in pairwise(edges)] for line in lines[start + 1 :] if line)
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}


def url_of(daemon: Daemon) -> str:
    return f"http://127.0.0.1:{daemon.port}"


def note(id_: str, to: str | list[str] = "ok@c.test", **fields: object) -> dict[str, object]:
    """A message to submit."""
    return {"id": id_, "from": "a@b.test", "to": to, "subject": "Hi", "body": "x", **fields}


QUIET: dict[str, dict[str, object]] = {"scheduler": {"active": "false"}, "smtp": {"host": "mx.test", "port": 25}}

# --- usage


def test_the_help_teaches_with_examples_that_are_true_and_needs_little(here: Run) -> None:
    needless = {"argparse", "configparser", "csv", "ctypes", "difflib", "prometheus_client"}
    code = f"import sys, mailproxy; mailproxy.main([sys.argv[1]]); print({needless} & sys.modules.keys())"
    version, overview = (
        subprocess.run([sys.executable, "-c", code, word], stdout=subprocess.PIPE, text=True, cwd=PROGRAM.parent).stdout
        for word in ("--version", "--help")
    )
    assert version == f"mailproxy {mailproxy.__version__}\nset()\n"
    assert overview.startswith("usage: mailproxy COMMAND")
    assert overview.endswith("set()\n")
    assert run_command("--version") == (0, f"mailproxy {mailproxy.__version__}\n", "")

    nothing = here()
    assert nothing.returncode == 2
    for command in mailproxy.COMMANDS:
        assert f"\n    {command.name} " in nothing.stderr
        ended = here(command.name, "--help")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert here("help", command.name) == ended
        assert f"examples:\n  mailproxy {command.name}" in ended.stdout

    for example in mailproxy.EXAMPLES.splitlines():
        words = shlex.split(re.split(r" \| | && | [<>] ", example)[0])
        assert words[0] == "mailproxy"
        assert mailproxy.parsed(words[1:])[0].name == words[1]


def test_without_its_packages_it_says_what_to_run() -> None:
    ended = subprocess.run([sys.executable, "-I", "-S", PROGRAM, "serve"], capture_output=True, text=True)

    packages = "the packages aiosmtplib and prometheus-client are needed"
    remedy = "run `python3 -m pip install aiosmtplib prometheus-client`, or use mailproxy.pyz, which contains them"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", f"mailproxy: {packages}: {remedy}\n")


NO_CALLS = ("status --colour", "message", "retry", "messages --limit 10001", "messages --status lost")
NO_URLS = ("127.0.0.1:8000", "ftp://here", "http://", "unix:relative", "http://h:x", "'http://a b'")


@pytest.mark.parametrize(
    ("words", "status", "complaint"),
    [
        ("sevre", 2, 'unknown command "sevre"; did you mean serve?; see mailproxy help'),
        *((words, 2, f"see mailproxy {words.split()[0]} --help") for words in NO_CALLS),
        ("messages --stauts error", 2, "did you mean --status?; see mailproxy messages --help"),
        ("help sevre", 2, "did you mean serve?; see mailproxy help"),
        ("messages --limit 0", 2, "must be a number from 1 to 10000; see mailproxy messages --help"),
        ("serve --config missing.ini", 2, "missing.ini"),
        ("serve --port http", 2, "[server] port"),
        ("serve --set 'delivery.hostname=\"-\"'", 2, 'hostname: "-" is not a host name, or an address literal'),
        ("serve --set 'delivery.hostname=\"-\"'", 2, "; remove the quotes"),
        ("serve --set server.prot=1", 2, "did you mean port?"),
        ("serve --set server.port", 2, "SECTION.KEY=VALUE"),
        ("serve --port 0 --host 0.0.0.0", 2, "api_token"),
        ("serve --port 0 --set smtp.host=mx.test --set smtp.port=0", 2, "[smtp]"),
        ("check --set server.prot=1", 2, "did you mean port?"),
        ("check --set smtp.host=mx.test --set smtp.port=99999", 2, "port"),
        ("check --db no/folder/q.db", 2, "no/folder"),
        ("check --set smtp.host=mx.test --set smtp.port=25 --set smtp.user=u --set smtp.password=env:NO_", 2, "NO_"),
        *((f"status --url {url}", 2, "is not the URL of a daemon") for url in NO_URLS),
        ("status --url http://127.0.0.1:9 --token file:/no/such", 2, "file:/no/such"),
        ("send", 2, "nothing to send: give --from"),
        ("send x.eml --subject s", 2, "an .eml file is sent as it is"),
        ("send x.eml --csv y.csv", 2, "--csv cannot be combined with"),
        ("send --attach no/such", 1, "no/such cannot be read: No such file"),
        ("send --url http://127.0.0.1:9 no/such.eml", 1, "no/such.eml cannot be read: No such file"),
    ],
)
def test_a_mistake_is_one_sentence(words: str, status: int, complaint: str, here: Run) -> None:
    ended = here(*shlex.split(words))

    assert ended.returncode == status
    assert ended.sentence.startswith("mailproxy: ")
    assert complaint in ended.sentence
    assert "are right" not in ended.stdout


def test_a_reader_that_goes_away_is_no_event_and_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    for output, *end in (writing, 141, ""), (full, 1, "mailproxy: No space left on device\n"):
        with running("check", cwd=tmp_path, stdout=output) as process:
            os.close(output)
            _, complaints = process.communicate(timeout=60)
        assert [process.returncode, complaints] == end


# --- serve and check


def test_the_queue_of_serve_lies_beside_its_config_file_and_one_that_it_finds_elsewhere_is_told(tmp_path: Path) -> None:
    etc, cwd = tmp_path / "etc", tmp_path / "cwd"
    etc.mkdir()
    cwd.mkdir()
    (etc / "config.ini").write_text("[server]\nport = 0\n")

    def said() -> str:
        with running(
            "serve", "--config", "../etc/config.ini", cwd=cwd, env=_plain_environment() | {"MAILPROXY_X": "1"}
        ) as serve:
            lines = [serve.stderr.readline(), serve.stderr.readline()]  # that it listens, and the first warning
            serve.terminate()
            lines.append(serve.stderr.read())
            assert serve.wait(20) == 0
        return "".join(lines)

    assert "MAILPROXY_X matches no setting and is ignored" in said()
    assert [file.name for file in (*etc.glob("*.db"), *cwd.glob("*"))] == ["mailproxy.db"]
    (etc / "mailproxy.db").rename(cwd / "mailproxy.db")
    assert f"the queue is {cwd}/mailproxy.db, not {etc}/mailproxy.db: move it there, or set db_path" in said()
    assert [*etc.glob("*.db")] == []


def test_a_config_file_that_was_found_is_the_one_that_is_read_again(tmp_path: Path) -> None:
    """Were it gone, and the daemon went by the defaults, it would ask nobody for a token."""
    (tmp_path / "config.ini").write_text("[server]\nport = 0\napi_token = t0ken\n")

    with running("serve", cwd=tmp_path) as serve:
        assert "listens" in serve.stderr.readline()
        (tmp_path / "config.ini").unlink()
        serve.send_signal(signal.SIGHUP)
        line = serve.stderr.readline()

    assert 'configuration not reloaded error="./config.ini: cannot be read' in line


def test_serve_goes_by_its_options_and_is_found_by_config_ini_over_tls_or_a_unix_socket(
    tmp_path: Path, ca: PrivateCA
) -> None:
    certificate, port, folder, token = ca.good(), free_port(), tmp_path / "tls", {"TOKEN": "sesame"}
    folder.mkdir()
    (folder / "config.ini").write_text(
        f"[server]\nport = {port}\ntls_cert = {certificate.cert}\ntls_key = {certificate.key}\napi_token = env:TOKEN\n"
    )
    (tmp_path / "config.ini").write_text(f"[server]\nunix_socket = {tmp_path}/m.sock\n")
    options = ["--host", "127.0.0.1", "--port", port, "--db", tmp_path / "q.db", "--set", "smtp.host=mx.test"]
    options += ["--set", "smtp.port=2525", "--set", "logging.format=json"]
    env = {**_plain_environment(), **token, "MAILPROXY_SERVER_PORT": "1"}

    with running("serve", *options, cwd=folder, env=env) as serving, running("serve", cwd=tmp_path) as over_socket:
        assert str(port) in str(json.loads(serving.stderr.readline()))
        assert "listens" in over_socket.stderr.readline()
        accounts = run_command("accounts", folder=folder, environment=token)
        over_unix = run_command("run-now", folder=tmp_path)
        stranger = run_command("status", "--url", f"https://127.0.0.1:{port}", folder=tmp_path)
        serving.terminate()
        _, rest = serving.communicate(timeout=60)

    assert serving.returncode == 0, rest
    assert accounts.returncode == 0, accounts.stderr
    assert printed_rows(accounts.stdout, "ID")["default"]["SERVER"] == "mx.test:2525"
    assert (tmp_path / "q.db").exists()
    assert over_unix.returncode == 0, over_unix.stderr
    assert stranger.returncode == 1
    assert f"the certificate of https://127.0.0.1:{port} is not trusted" in stranger.sentence


def test_serve_that_cannot_start_says_why_and_exits_2(tmp_path: Path, daemon: Daemon) -> None:
    ended = run_command("serve", "--port", 0, "--db", "no/such/folder/q.db", folder=tmp_path)
    same_queue = run_command("serve", "--config", daemon.folder / "config.ini", folder=daemon.folder)
    same_port = run_command("serve", "--port", daemon.port, "--db", tmp_path / "other.db", folder=tmp_path)

    assert (ended.returncode, same_queue.returncode, same_port.returncode) == (2, 2, 2)
    assert "no/such/folder" in ended.sentence
    assert str(daemon.process.pid) in same_queue.sentence
    assert f"127.0.0.1:{daemon.port}" in same_port.stderr.splitlines()[-1]


def test_serve_that_is_stopped_while_it_waits_for_its_database_ends_without_an_alarm(tmp_path: Path) -> None:
    with running("serve", "--db", "postgresql://u@127.0.0.1:9/x", "--port", "0", cwd=tmp_path) as process:
        while "mailproxy listens" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate()

    assert process.returncode == 0
    assert [line.split()[1] for line in said.splitlines()] == ["INFO", "INFO"]


def test_check_shows_what_is_in_force_and_where_it_comes_from_but_no_secret(
    tmp_path: Path, here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.ini").write_text(
        "[server]\nport = 8026\napi_token = open-sesame\n[smtp]\nhost = mx.test\nport = 587\npassword = hunter2\n"
    )
    monkeypatch.chdir(tmp_path)
    nothing = here("check", "--connect", "--config", "/dev/null", "--db", "q.db")
    monkeypatch.setenv("MAILPROXY_DELIVERY_MAX_RETRIES", "3")
    monkeypatch.setenv("MAILPROXY_SERVER_PROT", "1")
    ended = here("check")

    assert ended.returncode == 0
    assert "MAILPROXY_SERVER_PROT" in ended.sentence  # which matches no setting
    rows = printed_rows(ended.stdout.partition("\n\nSee the warnings above; the settings are right: ")[0], "SETTING")
    assert rows["server.port"] == {"SETTING": "server.port", "VALUE": "8026", "FROM": "./config.ini"}
    assert rows["delivery.max_retries"]["FROM"] == "environment variable MAILPROXY_DELIVERY_MAX_RETRIES"
    assert rows["storage.db_path"]["FROM"] == "default"
    assert "default (mx.test:587)" in ended.stdout
    assert not re.search("open-sesame|hunter2", ended.stdout)
    assert (nothing.returncode, nothing.stderr) == (0, "")
    assert "There is no account to log into.\n\nThe settings are right: " in nothing.stdout
    assert not (tmp_path / "q.db").exists()


LEFT_OPEN = {
    "smtp": {"host": "mx.test", "port": 587, "user": "me@example.com"},
    "account:a": {"host": "mx.test", "port": 25, "user": "u", "password": "env:NOT_SET"},
    "account:b": {"host": "mx.test", "port": 25, "user": "u", "password": "file:/nowhere"},
    "s3": {"access_key_id": "env:NO_KEY"},
    "client": {"client_sync_user": "'me'"},
}


def test_check_and_the_start_say_what_the_configuration_leaves_open(tmp_path: Path, here: Run) -> None:
    with Daemon(tmp_path, LEFT_OPEN) as daemon:
        checked = here("check", "--config", tmp_path / "config.ini")
        daemon.post("/account", {"id": "old", "host": "mx.test", "port": 25})
        daemon.stop()
        with contextlib.closing(sqlite3.connect(str(daemon.config["storage"]["db_path"]))) as db, db:
            db.execute("UPDATE accounts SET definition = replace(definition, 'mx.test', 'mx.test:25')")
        daemon.start()
        logged = daemon.log

    told = [
        "account default: has a user but no password: set password, or remove user", "account a, password: env:NOT_SET is not set",
        "account b, password: file:/nowhere cannot be read: No such file", "[s3] access_key_id: env:NO_KEY is not set",
        "[client] client_sync_user: the quotes are a part of the value; are they meant to be?",
    ]  # fmt: skip
    assert checked.returncode == 2
    assert checked.stdout.endswith("\nThe settings are not usable yet.\n")
    for sentence in told:
        assert (checked.stderr.count(sentence), logged.count(sentence)) == (1, 2), sentence
    assert "account old of the queue is left out; replace it by POST /account: invalid host: must be" in logged
    (tmp_path / "port.ini").write_text("[smtp]\nhost = mx.test:587\nport = 587\n")
    nowhere = here(
        "check", "--config", "/dev/null", "--db", "/nowhere/q.db", "--set", "server.submit_socket=/none/s.sock"
    )
    assert nowhere.returncode == 2
    assert "[storage] db_path: the folder /nowhere does not exist" in nowhere.stderr
    assert "[server] submit_socket: the folder /none does not exist" in nowhere.stderr
    assert f"[storage] db_path: {tmp_path} is not a regular file" in here("check", "--db", tmp_path).stderr
    with_port = here("check", "--config", tmp_path / "port.ini")
    assert with_port.returncode == 2
    assert '"mx.test:587" is not the name or the address of a server, without a port' in with_port.sentence


class PickySmtpServer(SmtpServer):
    """Knows who may send."""

    async def handle_MAIL(self, *_: Any) -> str:
        return "553 5.7.1 Not an address of yours"


def test_check_connect_goes_as_far_as_mail_and_shows_what_each_server_offers_or_refuses(
    tmp_path: Path, ca: PrivateCA, here: Run
) -> None:
    with (
        SmtpServer(
            certificate=ca.good(), accounts={"u": "hunter2", "550@x.org": "s"}, size_limit=35_000_000, pipelining=True
        ) as good,
        SmtpServer(certificate=ca.good(), accounts={"u": "other"}) as strict,
        SmtpServer(smtputf8=False) as plain,
        PickySmtpServer() as picky,
        socket.create_server(("127.0.0.1", 0)) as silent,
    ):
        tls = {"ca_file": ca.ca_file, "host": "localhost", "use_tls": "true", "timeout": 30}
        login = {"user": "u", "password": "hunter2", **tls}
        sections = {
            "smtp": {**login, "port": good.port},
            "account:strict": {**login, "port": strict.port},
            "account:nobody": {**tls, "port": good.port},
            "account:other": {**login, "user": "550@x.org", "password": "s", "port": good.port},
            "account:picky": {"host": picky.host, "port": picky.port},
            "account:late": {"host": "127.0.0.1", "port": silent.getsockname()[1], "timeout": 1},
        }
        with Daemon(tmp_path, sections) as daemon:
            daemon.post("/account", {"id": "added", "host": plain.host, "port": plain.port})
            ended = here("check", "--connect", "--config", tmp_path / "config.ini")
        right = ("--set", f"smtp.host={plain.host}", "--set", f"smtp.port={plain.port}")
        all_right = here("check", "--connect", "--config", "/dev/null", "--db", tmp_path / "none.db", *right)

    assert ended.returncode == 1
    refused = "mailproxy: no mail can leave through "
    login = f": {mailproxy.CHECK_LOGIN}\n"
    table, _, verdict = ended.stdout.rpartition("\n\n")
    assert verdict == "The settings are not usable yet.\n"
    rows = printed_rows(table, "ACCOUNT")
    assert ended.stderr == f"{refused}strict{login}{refused}nobody{login}{refused}other\n{refused}late\n"
    offers = {"TLS": "TLSv1.3", "AUTH": "LOGIN PLAIN", "SIZE": "35.0 MB", "SMTPUTF8": "yes", "PIPELINING": "yes"}
    server = {"SERVER": f"localhost:{good.port}", **offers}
    assert rows["default"] == {"ACCOUNT": "default", **server, "RESULT": "logged in as u, takes mail from <>"}
    said = "mail: 530 5.7.0 Authentication required (to mail from <>)"
    assert rows["nobody"] == {"ACCOUNT": "nobody", **server, "RESULT": said}
    assert rows["other"]["RESULT"] == "mail: 550 5.0.0 As the address asks (to mail from <550@x.org>)"
    added = {"TLS": "none", "AUTH": "none", "SMTPUTF8": "no", "RESULT": "connected, takes mail from <>"}
    assert {name: rows["added"][name] for name in added} == added
    assert rows["picky"]["RESULT"] == "connected, not mail from <>: 553 5.7.1 Not an address of yours"
    assert rows["strict"]["RESULT"].startswith("auth: 535 ")
    assert rows["late"]["RESULT"].startswith("connect: 451 4.4.1 no answer in time; if TLS is expected here, set")
    assert "hunter2" not in ended.stdout
    assert (all_right.returncode, all_right.stderr) == (0, "")
    assert all_right.stdout.splitlines()[-1].startswith("The settings are right: mail goes out through default (")


@pytest.mark.parametrize(
    ("user", "host", "sender"),
    [
        ("me@example.com", "localhost", "me@example.com"), ("me", "smtp.example.com", "me@example.com"),
        ("AD\\me", "example.com.", "postmaster@example.com"), (None, "mx.eu.example.com", "postmaster@eu.example.com"),
        ("ü@example.com", "mail.example.com", "postmaster@example.com"), ("me", "127.0.0.1", ""), (None, "::1", ""),
    ],
)  # fmt: skip
def test_the_sender_that_check_asks_about_is_the_login_name_or_fits_the_server(
    user: Any, host: str, sender: str
) -> None:
    assert mailproxy.own_address(parsed_account(user=user, host=host)) == sender


# --- reaching the daemon

START_IT = "start it with `mailproxy serve`, or name it by --url or MAILPROXY_URL"


@pytest.fixture(scope="module")
def strict_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that wants a token, takes no large bodies, and has no account."""
    with Daemon(tmp_path_factory.mktemp("strict"), {"server": {"max_body_bytes": 100_000}}, token="sesame") as daemon:
        yield daemon


def test_a_daemon_that_cannot_be_asked_or_wants_another_token_is_one_sentence_and_exit_1(
    reports: ReportReceiver, smtp: SmtpServer, strict_daemon: Daemon, here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = f"http://127.0.0.1:{free_port()}"
    for url, complaint in [
        (closed, f"mailproxy: cannot reach {closed}: Connection refused; {START_IT}"),
        ("unix:/no/such.sock", START_IT),
        (reports.url, "not as mailproxy does"),
        (f"http://127.0.0.1:{smtp.port}", "gave no complete HTTP answer"),
    ]:
        ended = here("status", "--url", url)
        assert ended.returncode == 1
        assert complaint in ended.sentence

    asked = ["status", "--url", url_of(strict_daemon)]
    assert here(*asked, "--config", "/dev/null").returncode == 1
    monkeypatch.setenv("MAILPROXY_TOKEN", "salami")
    wrong = here(*asked)
    assert wrong.returncode == 1
    assert "MAILPROXY_TOKEN" in wrong.sentence
    assert "sesame" not in wrong.stderr
    monkeypatch.setenv("MINE", "sesame")
    assert here(*asked, "--token", "env:MINE").returncode == 0
    monkeypatch.setenv("MAILPROXY_TOKEN", "sesame")
    assert here(*asked).returncode == 0


def test_config_ini_tells_where_the_daemon_is_and_its_token(tmp_path: Path, here: Run) -> None:
    config = tmp_path / "config.ini"
    for server, asked, url, token in [
        ("", None, "http://127.0.0.1:8000", "sesame"),
        ("port = 8025", None, "http://127.0.0.1:8025", "sesame"),
        ("host = 0.0.0.0", None, "http://127.0.0.1:8000", "sesame"),
        ("host = ::", None, "http://[::1]:8000", "sesame"),
        ("host = 10.1.2.3", None, "http://10.1.2.3:8000", "sesame"),
        ("unix_socket = /run/mailproxy.sock", None, "unix:/run/mailproxy.sock", "sesame"),
        ("", "http://127.0.0.1:9", "http://127.0.0.1:9", "sesame"),
        ("", "unix:/run/mailproxy.sock", "unix:/run/mailproxy.sock", "sesame"),
        ("", "https://mail.example.com", "https://mail.example.com", None),  # the token is for no other machine
        ("port = 0", "https://mail.example.com", "https://mail.example.com", None),
        ("host = 10.1.2.3", "http://10.1.2.3:8000", "http://10.1.2.3:8000", "sesame"),
        ("port = 0", "http://127.0.0.1:9", "http://127.0.0.1:9", "sesame"),
    ]:
        config.write_text(f"[server]\napi_token = sesame\n{server}\n")
        assert mailproxy.find_daemon({}, url=asked, config=str(config))[:2] == (url, token)

    any_port = here("status", "--config", config)
    assert any_port.returncode == 2
    assert "--url" in any_port.sentence


# --- what the commands show


def test_status_accounts_and_json_show_what_the_daemon_answers(daemon: Daemon, asking: Run) -> None:
    account = {"id": "billing", "host": "mx.test", "port": 587, "user": "u", "password": "hunter2"}
    encryptions = {"a": ("implicit", {"port": 465}), "b": ("starttls never", {"start_tls": "never"})}
    encryptions["c"] = "starttls auto", {"port": 465, "use_tls": False}
    encryptions["billing"] = "starttls required", {"use_tls": True, "limit_per_hour": 100, "limit_per_day": 500}
    for id_, (_, fields) in encryptions.items():
        daemon.post("/account", {**account, "id": id_, **fields})
    daemon.submit(note("m", subject="Grüße", attachments=[{"filename": "x", "content": "Tm90ZQ=="}]))
    wait_until(lambda: daemon.message("m")["reported_ts"], "the report")

    status, accounts = asking("status"), asking("accounts").stdout
    assert (status.returncode, status.stderr) == (0, "")
    assert re.search(r"^delivery +active\npending +0$", status.stdout, re.MULTILINE)
    assert printed_rows(status.stdout, "ACCOUNT")["default"]["STATE"] == "up"
    shown = {"SERVER": "mx.test:587", "USER": "u", "FROM": "http", "LIMITS": "100/hour 500/day"}
    rows = printed_rows(accounts, "ID")
    assert rows["billing"].items() >= shown.items()
    assert {id_: rows[id_]["TLS"] for id_ in encryptions} == {id_: words for id_, (words, _) in encryptions.items()}
    assert "hunter2" not in accounts
    paths = {"status": "/status", "accounts": "/accounts", "messages": "/messages?limit=50", "message m": "/message/m"}
    paths |= {"messages --content": "/messages?limit=50&content=1", "message m --content": "/message/m?content=1"}
    for words, path in paths.items():
        ended = asking(*words.split(), "--json")
        assert (ended.returncode, ended.stderr) == (0, "")
        assert json.loads(ended.stdout) == daemon.get(path).json
        assert ("Tm90ZQ==" in ended.stdout) == ("content" in path)
    (options,) = (command.options for command in mailproxy.COMMANDS if command.name == "messages")
    assert {f"--{name.replace('_', '-')}" for name in mailproxy.LISTING} <= {
        name for names, _ in options for name in names
    }
    for words in ("message", "\udcff"), ("messages", "--subject", "\udcff"), ("suspend", "--account", "\udcff"):
        assert "percent-encoded UTF-8" in asking(*words).sentence  # which a terminal of another encoding gives

    in_words, as_json = asking("message", "unknown"), asking("message", "unknown", "--json")
    assert in_words == (1, "", "mailproxy: there is no message with this id\n")
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout)["ok"] is False
    assert as_json.sentence == f"mailproxy: {json.loads(as_json.stdout)['error']}"


def test_messages_are_a_table_that_says_why_and_when_and_fits_the_terminal(
    daemon: Daemon, asking: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    later, wide = int(time.time()) + 3 * 3600 + 600, "x" * 50
    daemon.submit(
        note("one", ["ok@c.test, other@c.test", "last@c.test"], batch_code="b1"),
        note("two", '"Doe, Jane" <perm@c.test>'),
        note("three", deferred_ts=later),
        note(wide, deferred_ts=later, subject="漢字" * 40),
    )
    daemon.wait_status("one", "sent")
    daemon.wait_status("two", "error")

    def shown(*words: str) -> dict[str, dict[str, str]]:
        return printed_rows(asking("messages", *words).stdout, "ID")

    rows = shown()
    assert list(rows) == ["one", "two", "three", wide]
    assert (rows["one"]["STATUS"], rows["one"]["TO"], rows["one"]["ATTEMPTS"]) == ("sent", "ok@c.test +2", "1")
    assert rows["two"]["TO"] == '"Doe, Jane" <perm@c.test>'
    assert "550 5.1.1 No such user here" in rows["two"]["REMARK"]
    assert rows["three"]["REMARK"] == "due in 3 h"
    assert list(shown("--active")) == ["three", wide]
    assert list(shown("--status", "error", "--account", "default")) == ["two"]
    assert list(shown("--batch", "b1")) == ["one"]

    assert b"\x1b[31mtwo  " in on_screen("messages", "--url", url_of(daemon), NO_COLOR="")[0]
    assert b"\x1b" not in on_screen("messages", "--url", url_of(daemon), NO_COLOR="1")[0]
    piped = asking("messages").stdout
    assert "漢字" * 40 in piped
    assert "\x1b" not in piped
    monkeypatch.setenv("COLUMNS", "60")
    narrow = asking("messages").stdout
    assert all(mailproxy.text_width(line) <= 60 for line in narrow.splitlines())
    assert "…" in narrow
    monkeypatch.setenv("COLUMNS", "20")
    assert f"\n{'x' * 3}…{'x' * 4} " in asking("messages").stdout


@pytest.mark.parametrize(
    ("columns", "reason"),
    [(40, "550 5.1.1 N…"), (60, "550 5.1.1 No such use…"), (80, "550 5.1.1 No such user here"),
     (120, "550 5.1.1 No such user here, aaaaa")],
)  # fmt: skip
def test_the_middle_of_long_ids_and_addresses_gives_way_before_the_reason(
    monkeypatch: pytest.MonkeyPatch, columns: int, reason: str
) -> None:
    id_, to = f"newsletter-{'2026-' * 30}0815", f"{'a' * 40}.smith@{'mail.' * 20}example.net"
    record = {
        "id": id_, "status": "error", "account_id": "default", "attempts": 1, "created_at": 1, "deferred_ts": None,
        "error": f"550 5.1.1 No such user here, {to}: {'x' * 100}", "subject": "Your order " * 9, "message": {"to": [to]},
    }  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(columns))

    lines = mailproxy._messages_in_words({"messages": [record]})

    assert [len(line) <= columns for line in lines] == [True, True]
    assert reason in lines[1]
    assert re.search(r"^new\S*…\S*15 ", lines[1])
    assert columns < 48 or re.search(r" aaa\S*…\S*net ", lines[1])
    assert "Your" in lines[1]
    assert mailproxy.cut("漢字" * 9, 8, middle=True) == "漢…漢字"
    assert [mailproxy.cut("abcdef", width, middle=True) for width in (1, 2, 3, 6)] == ["…", "…f", "a…f", "abcdef"]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_words_of_a_server_are_read_whole_on_any_terminal(
    daemon: Daemon, smtp: SmtpServer, asking: Run, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    blocked = "554 5.7.1 Blocked, because the sender is not authenticated: see https://mx.test/why?n=" + "7" * 60
    smtp.rule = lambda verb, *_: blocked if verb == "RCPT" else None
    daemon.submit(note("m"))
    daemon.wait_status("m", "error")
    daemon.post("/account", {"id": "cold", "host": "127.0.0.1", "port": 9})
    refused = "127.0.0.1[127.0.0.1]:9: Connection refused"
    cold = {"state": "cooling", "reason": refused, "until": None, "pending": 3, "connections": 0}
    monkeypatch.setenv("COLUMNS", str(columns))

    attempts = asking("message", "m").stdout.partition("ATTEMPT")[2].splitlines()
    accounts = mailproxy._status_in_words({**daemon.status(), "failed": 7, "accounts": {"cold": cold}})
    checked = asking("check", "--connect", "--config", daemon.folder / "config.ini").stdout.partition("ACCOUNT")[2]

    assert attempts[-1] == f"    {blocked}"
    assert columns < 80 or re.match(r"1 +20\d\d-\d\d-\d\d \d\d:\d\d:\d\d +\d\.\d\d s +error +rcpt$", attempts[1])
    assert "failed       7" in accounts
    assert [line.split() for line in accounts if "cold" in line] == [
        ["cold", "cooling", "3", "0", *(refused.split() if columns > 80 else ())]
    ]
    assert accounts[-1].endswith(refused)
    assert f"connect: 451 4.4.1 {refused}\n" in checked
    assert [line for line in (*attempts, *accounts) if len(line) > columns and line[0] != " "] == []


def test_messages_are_found_and_shown_as_they_go_on_the_wire_by_commands_too(
    daemon: Daemon, asking: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = "Subject: =?utf-8?q?Gr=C3=BC=C3=9Fe?="
    raw = {"raw": in_raw(header), "subject": None, "body": None}
    daemon.submit(note("one", "Ann <ann@example.net>"), note("two", ["ok@c.test", "perm@c.test"]), note("raw", **raw))
    wait_until(lambda: not daemon.status()["pending"], "the deliveries")

    def shown(*words: str) -> list[str]:
        ended = asking("messages", *words)
        assert (ended.returncode, ended.stderr) == (0, "")
        return [] if ended.stdout == "no messages\n" else list(printed_rows(ended.stdout, "ID"))

    assert shown("--to", "ANN@example.net", "--since", "1d") == ["one"]
    assert shown("--subject", "grüsse") == ["raw"]
    assert "Grüße" in asking("messages", "--subject", "grüsse").stdout
    assert shown("--refused") == ["two"]
    assert "1 of 2 recipients refused: 550" in asking("messages", "--refused").stdout
    assert shown("--order", "desc") == ["raw", "two", "one"]
    assert (
        shown("--until", "2020-01-31") == shown("--since", "2099-01-31 14:00") == shown("--until", "1000000000") == []
    )
    assert shown("--since", "2020-01-31T14:00Z", "--until", "0 min") == ["one", "two", "raw"]
    first = asking("messages", "--last", 2)
    assert list(printed_rows(first.stdout, "ID")) == ["raw", "two"]
    (cursor,) = re.findall(r"--after (\S+)", first.sentence)
    assert shown("--last", "2", "--after", cursor) == ["one"]
    for words in (("--since", "soon"), ("--until", "99d99"), ("--last", "0"), ("--since", "9" * 30 + "d")):
        assert asking("messages", *words).returncode == (0 if words[1].startswith("999") else 2)
    refused = asking("messages", "--to", "ann")
    assert refused == (1, "", "mailproxy: to: must be a mail address\n")

    story = asking("message", "raw").stdout
    assert re.findall("^(?:from|to|subject) +(.*)$", story, re.M) == ["a@b.test", "ok@c.test", "Grüße"]
    eml = asking("message", "raw", "--eml")
    assert (eml.returncode, eml.stderr) == (0, "")
    assert eml.stdout.encode() == daemon.get("/message/raw/eml").content
    assert asking("message", "unknown", "--eml") == (1, "", "mailproxy: there is no message with this id\n")
    daemon.submit(note("url", attachments=[{"filename": "a", "url": "http://127.0.0.1:9/a"}], deferred_ts=FAR))
    unfetched = asking("message", "url", "--eml")
    assert (unfetched.returncode, unfetched.stdout) == (1, "")
    assert unfetched.stderr.startswith("mailproxy: Attachment fetch failed: ")

    assert (
        asking("suspend", "--batch", "b1").stdout == "delivery of batch b1 is suspended; submission and reports go on\n"
    )
    assert re.search("^suspended batches +b1$", asking("status").stdout, re.M)
    assert asking("suspend", "--batch", "b1", "--account", "default").returncode == 2
    assert asking("activate", "--batch", "b1").stdout == "delivery of batch b1 is active\n"
    assert daemon.status()["suspended_batches"] == []


def test_words_for_people_have_fitting_units_and_nothing_that_steers_a_terminal() -> None:
    spans = {0: "0 s", 119: "119 s", 120: "2 min", 7199: "119 min", 7200: "2 h", 172_800: "2 d"}
    assert {seconds: mailproxy.relative(0, seconds).removesuffix(" ago") for seconds in spans} == spans
    assert mailproxy.relative(7200, 0) == "in 2 h"
    lines = mailproxy.table(("ID", "ERROR"), [("m", "550 \x1b[2J\r\n\u202e")])
    assert lines[1] == "m   550 \\x1b[2J\\r\\n\\u202e"


def test_a_long_list_says_how_to_go_on_and_following_begins_with_the_newest(daemon: Daemon, asking: Run) -> None:
    asking("suspend")
    ids = [f"m{n}" for n in range(700)]
    daemon.submit(*map(note, ids))
    first = asking("messages")
    cursor = re.search(r"--after (\S+)", first.sentence)
    assert cursor
    second = asking("messages", "--after", cursor[1], "--limit", 10_000)
    assert list(printed_rows(first.stdout, "ID")) == ids[:50]
    assert list(printed_rows(second.stdout, "ID")) == ids[50:]
    assert second.stderr == ""
    backwards = re.search(r"There are more; (--.+) shows them", asking("messages", "--last", 2).sentence)
    assert backwards
    assert list(printed_rows(asking("messages", *backwards[1].split(), "--limit", 3).stdout, "ID")) == ids[-3:-6:-1]

    client = mailproxy.Client(url_of(daemon))
    newest, more = (mailproxy._newest(client, {}, known) for known in ({}, {"m100": ""}))
    with running("messages", "--follow", "--limit", "2", "--url", client.url) as following:
        assert [following.stdout.readline().split()[2] for _ in range(2)] == ids[-2:]
    assert [record["id"] for record in newest] == ids[-mailproxy.FOLLOWED_MESSAGES :]
    assert [record["id"] for record in more] == ids


def test_following_shows_what_comes_and_changes_also_after_a_restart_of_the_daemon(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    with Daemon(tmp_path, {"server": {"port": free_port()}}, smtp=smtp) as daemon:
        daemon.submit(note("first"), note("old"))
        daemon.wait_status("old", "sent")
        daemon.wait_status("first", "sent")
        with running("messages", "--follow", "--limit", "1", "--url", url_of(daemon)) as following:
            lines = [following.stdout.readline()]
            daemon.stop()
            away = following.stderr.readline()
            daemon.start()
            daemon.submit(note("new", deferred_ts=int(time.time()) + 9))
            lines.append(following.stdout.readline())
            daemon.submit(note("new"))
            while "sent" not in lines[-1]:
                lines.append(following.stdout.readline())
            following.send_signal(signal.SIGINT)
            following.communicate(timeout=60)

    assert re.match(r"\d\d:\d\d:\d\d  sent      old +default  ok@c\.test  \"Hi\"", lines[0])
    assert START_IT in away
    assert re.match(r"\d\d:\d\d:\d\d  deferred  new +default  ok@c\.test  \"Hi\"  due in \d s$", lines[1])
    assert re.match(r"\d\d:\d\d:\d\d  sent      new ", lines[-1])
    assert following.returncode == 130


def test_run_now_delivers_in_test_mode_and_a_message_is_shown_with_all_its_attempts(
    tmp_path: Path, smtp: SmtpServer, here: Run
) -> None:
    id_ = "in/voice 4711?#%"
    with Daemon(tmp_path, {"delivery": {"test_mode": "true", "retry_delays": "0"}}, smtp=smtp) as daemon:
        daemon.submit(note(id_, "greylist@c.test"))
        ran = here("run-now", "--url", url_of(daemon))
        wait_until(lambda: daemon.message(id_)["attempts"] == 1, "the first attempt")
        wait_until(
            lambda: here("run-now", "--url", url_of(daemon)) and daemon.message(id_)["status"] == "sent",
            "the second attempt",
        )
        ended = here("message", id_, "--url", url_of(daemon))

    assert (ran.returncode, ended.returncode) == (0, 0), ran.stderr + ended.stderr
    assert re.search(rf"^id +{re.escape(id_)}\nstatus +sent$", ended.stdout, re.MULTILINE)
    assert re.search(r"^message-id +<\S+@b\.test>$", ended.stdout, re.MULTILINE)
    attempts = printed_rows(ended.stdout, "ATTEMPT")
    assert "450 4.7.1 Greylisted, try again" in attempts["1"]["REPLY"]
    assert attempts["2"]["REPLY"].startswith("250 ")


def test_delivery_is_suspended_and_taken_up_and_retry_and_delete_name_what_they_left_as_it_is(
    daemon: Daemon, smtp: SmtpServer, asking: Run
) -> None:
    daemon.post("/account", {"id": "a/b", "host": smtp.host, "port": smtp.port})
    for words, active, state in [
        (["suspend"], False, None),
        (["activate"], True, None),
        (["suspend", "--account", "a/b"], True, "suspended"),
        (["activate", "--account", "a/b"], True, "up"),
    ]:
        assert asking(*words).returncode == 0
        status = daemon.status()
        assert status["active"] is active
        assert state in (None, status["accounts"]["a/b"]["state"])
    assert asking("suspend", "--account", "nobody").returncode == 1

    daemon.submit(note("m", "perm@c.test"))
    daemon.wait_status("m", "error")
    retried = asking("retry", "m", "unknown")
    wait_until(lambda: smtp.visits["perm@c.test"] == 2, "the second attempt")
    assert retried == (1, "1 message queued again\n", "mailproxy: not found: unknown\n")
    assert daemon.wait_status("m", "error")["attempts"] == 1
    assert asking("delete", "m") == (0, "1 message removed\n", "")
    assert asking("delete", "m", "n")[::2] == (1, "mailproxy: not found: m, n\n")


# --- demo


def test_the_demo_shows_all_five_ways_wherever_it_runs(tmp_path: Path) -> None:
    folder, temporary = tmp_path / "here", tmp_path / "tmp"
    folder.mkdir()
    temporary.mkdir()
    (folder / "config.ini").write_text("[nonsense]\nx = 1\n")
    folder.chmod(0o555)
    elsewhere = ("MAILPROXY_CLIENT_CLIENT_SYNC_URL", "http_proxy", "HTTP_PROXY")
    misleading = {"MAILPROXY_CONFIG": "/no/such", "MAILPROXY_SERVER_PORT": "8000", "MAILPROXY_NONSENSE": "1"}
    environment = {"TMPDIR": str(temporary), **misleading, **dict.fromkeys(elsewhere, "http://127.0.0.1:9/")}

    ended = run_command("demo", folder=folder, environment=environment)

    assert (ended.returncode, ended.stderr) == (0, "")
    rows = printed_rows(ended.stdout.partition("\n\nall delivered")[0], "MESSAGE")
    once = dict.fromkeys(("plain", "picture", "scheduled"), ("sent", "1"))
    ends = {id_: (row["STATUS"], row["ATTEMPTS"]) for id_, row in rows.items()}
    assert ends == {**once, "refused": ("error", "1"), "greylisted": ("sent", "2")}
    for way in [
        r"app +-> mailproxy +POST /commands/add-messages",
        r'mailproxy -> smtp +plain +"Your receipt"',
        r'mailproxy -> smtp +picture +"Grüße mit Bild".*text/html \+ image/png',
        r"smtp +-> mailproxy +refused +550 ",
        r"mailproxy -> app +refused +report: error: 550 ",
        r"smtp +-> mailproxy +greylisted +450 ",
        r"mailproxy -> app +greylisted +report: sent",
        r'mailproxy -> smtp +scheduled +"On time"',
        r"mailproxy -> app +scheduled +report: sent",
    ]:
        assert re.search(rf"^ +\d+\.\d\ds  {way}", ended.stdout, re.MULTILINE), way
    assert "\nall delivered and reported" in ended.stdout
    assert "\x1b" not in ended.stdout
    assert list(temporary.iterdir()) == []


def test_the_demo_is_coloured_in_a_terminal_and_leaves_nothing_behind_when_it_is_stopped(tmp_path: Path) -> None:
    for stop in signal.SIGINT, signal.SIGTERM:
        seen, *ended = on_screen("demo", until=b"250 2.0.0", stop=stop, TMPDIR=str(tmp_path), NO_COLOR="")
        assert b"\x1b[32m250 2.0.0" in seen
        assert ended == [130, ""]
        assert list(tmp_path.iterdir()) == []


def test_a_demo_that_is_kept_says_where_its_console_is_and_goes_on_until_it_is_stopped(tmp_path: Path) -> None:
    seen, *ended = on_screen("demo", "--keep", until=b"It goes on until Ctrl-C", TMPDIR=str(tmp_path), NO_COLOR="1")
    assert re.search(rb"a browser: http://127\.0\.0\.1:\d+/\r\n", seen)
    assert ended == [0, ""]
    assert list(tmp_path.iterdir()) == []


def test_a_demo_that_is_not_through_in_time_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(mailproxy.CommandFailed, match=r"no final report of .*scheduled within 0.3 s"):
        asyncio.run(mailproxy.Demo(str(tmp_path), patience_s=0.3).run())


# --- send


def test_a_message_is_sent_from_options_and_with_an_id_only_once(daemon: Daemon, asking: Run, smtp: SmtpServer) -> None:
    (daemon.folder / "bill.pdf").write_bytes(b"%PDF-1.4 x")
    words = ["send", "--from", "Shop <shop@a.test>", "--to", "x@c.test, y@c.test", "--cc", "z@c.test", "--bcc"]
    words += ["b@c.test", "--subject", "Grüße", "--body", "-", "--html", "<b>Hi</b>", "--attach", "bill.pdf"]
    words += ["--id", "m1", "--priority", "high", "--url", url_of(daemon)]

    ended = run_command(*words, folder=daemon.folder, stdin="Hällo\n".encode())
    priority = daemon.wait_status("m1", "sent")["priority"]
    again = run_command(*words, folder=daemon.folder, stdin="Hällo\n".encode())
    plainer = ["send", "--from", "a@b.test", "--subject", "s", "--body", "<p>", "--html"]
    refused, html = asking(*plainer, "--to", "nobody"), asking(*plainer, "--to", "html@c.test")

    assert (ended, again, priority) == ((0, "m1: queued\n", ""), (0, "m1: known\n", ""), 1)
    mail, other = smtp.wait_for(2)
    assert mail.recipients == ["x@c.test", "y@c.test", "z@c.test", "b@c.test"]
    assert (mail.message["From"], mail.message["Subject"]) == ("Shop <shop@a.test>", "Grüße")
    assert "Bcc" not in mail.message
    kinds = [part.get_content_type() for part in mail.message.walk() if not part.is_multipart()]
    assert kinds == ["text/plain", "text/html", "application/pdf"]
    assert "Hällo" in mail.message.get_body(("plain",)).get_content()
    assert (html.returncode, other.message.get_content_type()) == (0, "text/html")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.sentence.startswith("mailproxy: the message was refused: invalid to: ")


def test_an_eml_file_goes_out_as_it_is_to_whom_its_headers_name(asking: Run, daemon: Daemon, smtp: SmtpServer) -> None:
    eml = b'From: S <shop@a.test>\nTo: friends: x@c.test, "Y, Z" <y@c.test>;\nBcc: b@c.test\nSubject: =?utf-8?q?a?=\n'
    (daemon.folder / "x.eml").write_bytes(eml + b"Message-ID: <7@a.test>\nX-Mine: kept\n\nline\n.dot\n")

    assert asking("send", "x.eml", "--id", "e1").returncode == 0
    assert asking("send", "x.eml", "--id", "e2", "--to", "only@c.test", "--from", "bounce@a.test").returncode == 0

    smtp.wait_for(2)
    (first,), (second,) = smtp.received_by("x@c.test"), smtp.received_by("only@c.test")
    assert (first.sender, first.recipients) == ("shop@a.test", ["x@c.test", "y@c.test", "b@c.test"])
    assert (second.sender, second.recipients) == ("bounce@a.test", ["only@c.test"])
    assert b"X-Mine: kept\r\n" in first.content
    assert b"\r\n\r\nline\r\n.dot\r\n" in first.content
    assert b"b@c.test" not in first.content


def test_options_win_over_headers_that_cannot_be_read_and_the_newest_resent_block_over_the_older_ones(
    asking: Run, daemon: Daemon, smtp: SmtpServer
) -> None:
    bad = daemon.folder / "bad.eml"
    bad.write_bytes(b"From: Cron Daemon\nTo: a@b c@d\nSubject: bad\n\nbody\n")
    resent = b"Resent-From: r@a.test\nResent-To: new@c.test\nResent-From: o@a.test\nResent-To: old@c.test\n"
    resent += b"Resent-Bcc: b@c.test\nFrom: a@b.test\nTo: x@c.test\n\nbody\n"

    unread = asking("send", bad, "--from", "me@a.test")
    assert (unread.returncode, "cannot be read: To: a@b c@d" in unread.sentence) == (1, True)
    assert asking("send", bad, "--from", "me@a.test", "--to", "y@c.test").returncode == 0
    assert run_command("send", "-", "--url", url_of(daemon), stdin=resent).returncode == 0

    mails = {mail.sender: mail for mail in smtp.wait_for(2)}
    assert mails["me@a.test"].recipients == ["y@c.test"]
    assert b"From: Cron Daemon\r\nTo: a@b c@d\r\n" in mails["me@a.test"].content
    assert mails["r@a.test"].recipients == ["new@c.test"]
    assert b"Bcc" not in mails["r@a.test"].content


def test_ctrl_c_at_any_moment_ends_a_command_with_130_and_without_a_traceback(tmp_path: Path) -> None:
    write_csv(tmp_path, "to,subject\nx@c.test,s\n")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        command = [sys.executable, "-X", "importtime", PROGRAM, "send", "--csv", "people.csv", "--from", "a@b.test"]
        for moment in (r"\| +sqlite3\n", r"\| +aiosmtplib\n", "asked"):
            outside = {"cwd": tmp_path, "env": _plain_environment(), "stderr": subprocess.PIPE, "text": True}
            with subprocess.Popen([*command, "--url", f"http://127.0.0.1:{port}"], **outside) as process:
                said, asking = "", contextlib.ExitStack()
                while moment != "asked" and not re.search(moment, said):
                    said += process.stderr.readline()
                with asking:
                    if moment == "asked":
                        asking.enter_context(silent.accept()[0]).recv(1)
                    process.send_signal(signal.SIGINT)
                    said += process.communicate(timeout=60)[1]
            assert (process.returncode, "Traceback" in said) == (130, False), said


def write_csv(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "people.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_the_rows_of_a_csv_are_sent_once_however_often_it_runs_and_a_terminal_shows_a_bar(
    asking: Run, daemon: Daemon, smtp: SmtpServer
) -> None:
    csv = write_csv(daemon.folder, 'To,Subject,body,\nx@c.test,Hi,"a, b",\nperm@c.test,Hi,c\nx@c.test,Hi,"a, b",,\n')
    words = ["send", "--csv", csv, "--from", "a@b.test"]

    first = asking(*words)
    smtp.wait_for(2)
    wait_until(lambda: daemon.status()["pending"] == 0, "an empty queue")
    with csv.open("a") as file:
        file.write("new@c.test,Hi,d\n")
    seen, *ended = on_screen(*words, "--priority", "low", "--url", url_of(daemon))
    wait_until(lambda: daemon.status()["pending"] == 0, "the second failure of one")

    assert first == (0, "3 of 3\n3 messages: 3 queued, 0 known, 0 refused\n", "")
    piped = ["send", "--csv", "-", "--from", "a@b.test", "--url", url_of(daemon)]
    again = run_command(*piped, stdin=csv.read_bytes().replace(b"new@c.test,Hi,d\n", b""))
    assert again.stdout.endswith("3 messages: 1 queued, 2 known, 0 refused\n")
    assert ended == [0, ""]
    bar = f"\r[{'#' * 40}] 4 of 4\r\x1b[K"
    assert seen.decode().endswith(f"{bar}4 messages: 2 queued, 2 known, 0 refused\r\n")
    assert len(smtp.wait_for(3)) == 3
    assert len(smtp.received_by("x@c.test")) == 2
    assert daemon.get("/messages").json["messages"][0]["message"]["body"] == "a, b"


def test_wrong_columns_refuse_a_csv_as_a_whole_and_wrong_rows_themselves(
    asking: Run, daemon: Daemon, smtp: SmtpServer
) -> None:
    for header, complaint in [
        (
            "from,to,sujbect,body",
            'unknown column "sujbect"; did you mean subject?; columns are fields of a message: acc',
        ),
        ("from,to,subject,to", "the column to is given twice"),
        ("to,subject,body", "the column from is missing; add it, or give --from"),
        ("from,to,subject,body,raw", 'unknown column "raw"'),
        ("", "the column from is missing"),
    ]:
        ended = asking("send", "--csv", write_csv(daemon.folder, f"{header}\n1,2,3,4\n"))
        assert ended.returncode == 2
        assert complaint in ended.sentence

    (daemon.folder / "a b.txt").write_text("x")
    csv = write_csv(
        daemon.folder,
        "id;from;to;subject;body;attachments;headers;deferred_ts\n"
        'good;a@b.test;x@c.test,y@c.test;;b;a b.txt;"{""X-Mine"": 7}";1\n'
        "bad;a@b.test;nobody;s;b;;;\n"
        "good;a@b.test;x@c.test;s;b;;;\n"
        "gone;a@b.test;x@c.test;s;b;no/such;;\n"
        "long;a@b.test;x@c.test;s;b;;;;more\n"
        ";;;;;;; ;\n\n",  # as Excel writes rows that were emptied
        "utf-8-sig",
    )

    ended = asking("send", "--csv", csv)

    assert ended.returncode == 1
    assert ended.stdout == "5 of 5\n5 messages: 1 queued, 0 known, 4 refused\n"
    complaints = {int(line): words for line, words in re.findall(r"people\.csv line (\d)(.*)", ended.stderr)}
    reasons = {4: "duplicate id", 5: "no/such cannot be read", 6: "more cells", 3: "invalid to"}
    assert list(complaints) == list(reasons)
    assert all(reason in complaints[line] for line, reason in reasons.items())
    (mail,) = smtp.wait_for(1)
    assert (mail.recipients, mail.message["X-Mine"]) == (["x@c.test", "y@c.test"], "7")
    assert [part.get_filename() for part in mail.message.iter_attachments()] == ["a b.txt"]


def test_a_daemon_with_small_batches_takes_a_long_csv_too(tmp_path: Path, here: Run) -> None:
    csv = write_csv(tmp_path, "to,subject\n" + "".join(f"x@c.test,{n}\n" for n in range(450)))
    with Daemon(tmp_path, {**QUIET, "server": {"max_batch": 90}}) as daemon:
        words = ["send", "--csv", csv, "--from", "a@b.test", "--body", "b", "--url", url_of(daemon)]
        ended, again = here(*words), here(*words, "--json")
        assert daemon.status()["pending"] == 450

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == "450 messages: 450 queued, 0 known, 0 refused"
    assert sum(len(json.loads(line)["known"]) for line in again.stdout.splitlines()) == 450


def test_a_csv_that_is_cut_off_says_how_to_go_on_and_sends_nothing_twice(
    daemon: Daemon, smtp: SmtpServer, asking: Run
) -> None:
    recipients = [f"x{n}@c.test" for n in range(mailproxy.BATCH_MESSAGES + 2)]
    rows = "".join(f"{recipient},s,b,{'late.txt' if recipient == recipients[-1] else ''}\n" for recipient in recipients)
    csv = write_csv(daemon.folder, f"to,subject,body,attachments\n{rows}")
    late = daemon.folder / "late.txt"
    os.mkfifo(late)  # opening it waits for the other side
    words = ["send", "--csv", csv.name, "--from", "a@b.test", "--url"]

    with running(*words, url_of(daemon), cwd=daemon.folder) as sending:
        sending.stdout.readline()
        with late.open("wb"):  # from when on it reads: it is interrupted there, or at the end of the file
            sending.send_signal(signal.SIGINT)
        _, complaint = sending.communicate(timeout=60)
    assert sending.returncode == 130
    late.unlink()
    late.write_text("here")
    unheard = asking(*words, f"http://127.0.0.1:{free_port()}")
    again = asking(*words, url_of(daemon))

    hint = "of 202 are through; run it again, and nothing is sent twice"
    assert complaint == f"mailproxy: interrupted; 200 {hint}\n"
    assert unheard.returncode == 1
    assert f"name it by --url or MAILPROXY_URL; 0 {hint}" in unheard.sentence
    assert again.returncode == 0, again.stderr
    wait_until(lambda: daemon.status()["pending"] == 0, "all sent")
    assert Counter(mail.recipients[0] for mail in smtp.received) == Counter(recipients)


# --- sendmail


def test_the_options_of_sendmail_are_understood() -> None:
    for words, call in [
        ("-t -i", ((), None, "", True, False, "m")),  # PHP's mail()
        ("-t -i -fshop@a.test", ((), "shop@a.test", "", True, False, "m")),
        ("-FCronDaemon -i -odi -oem -oi -t -f root", ((), "root", "CronDaemon", True, False, "m")),  # cronie
        ("-i -FCronDaemon -B8BITMIME -oem root", (("root",), None, "CronDaemon", False, False, "m")),  # Debian's cron
        ("-oem -oi -f me@a.test -- x@c.test -y", (("x@c.test", "-y"), "me@a.test", "", False, False, "m")),  # mutt
        ("-i -f me@a.test x@c.test y@c.test", (("x@c.test", "y@c.test"), "me@a.test", "", False, False, "m")),
        ("-bm -ti", ((), None, "", True, False, "m")),
        ("-tfme@a.test", ((), "me@a.test", "", True, True, "m")),
        ("x@c.test -r me@a.test", (("x@c.test",), "me@a.test", "", False, True, "m")),
        ("-N success,delay -R hdrs -V id -h 3 -X /tmp/l -L tag x@c.test", (("x@c.test",), None, "", False, True, "m")),
        ("-O a=b -p x -v -q15m -G x@c.test", (("x@c.test",), None, "", False, True, "m")),
        ("-f <> x@c.test", (("x@c.test",), "", "", False, True, "m")),
        ("-f '' x@c.test", (("x@c.test",), "", "", False, True, "m")),
        ("-f 'N (\\) <me@a.test>' x@c.test", (("x@c.test",), "N (\\) <me@a.test>", "", False, True, "m")),
        ("-f 'N <me@a.test>' x@c.test", (("x@c.test",), "me@a.test", "", False, True, "m")),
        ("--read-envelope-from -t", ((), None, "", True, True, "m")),
        ("-bs -oi", ((), None, "", False, False, "s")),
        ("-bp -Ac", ((), None, "", False, True, "p")),
        ("-bi", ((), None, "", False, True, "i")),
        ("-q1h -v", ((), None, "", False, True, "q")),
    ]:
        assert mailproxy.sendmail_call(shlex.split(words)) == call, words


ADDRESS_LISTS = [  # what they say by RFC 5322; None: nothing that can be read whole
    ("", []),
    (" ,, (nobody) ", []),
    ("a@b", ["a@b"]),
    ("root", ["root"]),
    ("J\udcff <a@b>, \udcff@b", ["a@b", "\udcff@b"]),  # which is no UTF-8
    ('"Doe, J." <j@d>,\r\n\tMary Q. Smith <m@s> , x@[192.0.2.1]', ["j@d", "m@s", "x@[192.0.2.1]"]),
    ("=?utf-8?q?J=C3=B6?= <jo@d>, Jö <jö@d>", ["jo@d", "jö@d"]),
    ('"john \\" doe"@d, a..b.@docomo.test', ['"john \\" doe"@d', "a..b.@docomo.test"]),
    ("a@b, undisclosed-recipients:;", ["a@b"]),
    ("all: N <x@c> (N), y@c;, z", ["x@c", "y@c", "z"]),
    ("MAILER-DAEMON <>", [""]),
    ("x@c.d <x@c.d>, Sales [EU] <y@c>", ["x@c.d", "y@c"]),  # which should be quoted, and mean one thing only
    # RFC 5322 A.5, A.6.1, A.6.3
    ("Pete(A nice \\) chap) <pete(his account)@silly.test(his host)>", ["pete@silly.test"]),
    ("A Group(Some people)\r\n     :Chris Jones <c@(Chris's host.)public.example>,\r\n         joe@example.org,\r\n"
     "  John <jdoe@one.test> (my dear friend); (the end of the group)",
     ["c@public.example", "joe@example.org", "jdoe@one.test"]),
    ("(Empty list)(start)Hidden recipients  :(nobody(that I know))  ;", []),
    ("Joe Q. Public <john.q.public@example.com>", ["john.q.public@example.com"]),
    ("Mary Smith <@node.test:mary@example.net>, , jdoe@test  . example", ["mary@example.net", "jdoe@test.example"]),
    ("John Doe <jdoe@machine(comment).  example>", ["jdoe@machine.example"]),
    # not whole
    *((text, None) for text in (
        "Cron Daemon", "d@e.example c@b.example", "x@c <y@c>", "a@b; c@d", "x@c N <y@c>", 'o"brien@c', "a@b, <c@d", "a@b>", "(a@b",
        "a@", "@b", "a@b@c", "undisclosed-recipients:", "a: b: c@d;;", "a: b@c; d@e", "a@b:", "a@b\x01", "[1.2.3.4]",
        ":" * 1000, "a" + ":" * 1000, "(" * 100_000, "<" * 100_000, "a " * 50_000, "a." * 50_000 + ":",
    )),
    ("(" * 100_000 + ")" * 100_000 + "a@b", ["a@b"]),
    ("a@b," * 30_000, ["a@b"] * 30_000),
]  # fmt: skip


@pytest.mark.parametrize(("text", "addresses"), ADDRESS_LISTS, ids=lambda given: ascii(given)[:30])
def test_a_list_of_addresses_is_read_whole_or_not_at_all_in_linear_time(text: str, addresses: list[str] | None) -> None:
    began = time.process_time()
    spots = mailproxy.read_addresses(text.encode("utf-8", "surrogateescape"))

    assert (None if spots is None else [address for address, _ in spots]) == addresses
    assert time.process_time() - began < 3


NAMES = mailproxy.LocalNames("vm.test", "vm", None, {})


def fields_of(words: str, content: bytes | str, names: mailproxy.LocalNames = NAMES) -> dict[str, Any]:
    given = content if isinstance(content, bytes) else content.encode()
    return mailproxy.sendmail_fields(mailproxy.sendmail_call(shlex.split(words)), given, "root", names)


UNTOUCHED = [  # fields that go byte for byte
    "From: Cron Daemon", "From: MAILER-DAEMON <>", "From:", "To: a@b.test, undisclosed-recipients:;",
    "To: d@e.test c@b.test", "To: a@b.test; c", "Cc: " + ":" * 1000, "X-Other: root", "To: \xff root",
    "From: Pete(A nice \\) chap) <pete(his account)@silly.test(his host)>", 'Reply-To:"Doe, J."   <j@d.test>  ',
    "Sender:\r\n a@b.test\r\n\t(folded)", "Subject: " + "(" * 10_000, "To : a@b.test",
]  # fmt: skip


@pytest.mark.parametrize("line", UNTOUCHED, ids=lambda line: line[:30])
def test_a_header_field_that_has_no_bare_name_or_cannot_be_read_whole_goes_byte_for_byte(line: str) -> None:
    field = line.encode("latin-1")
    other = b"" if line.startswith("From") else b"From: a@b.test\r\n"

    raw = base64.b64decode(fields_of("x@c.test", other + field + b"\r\n\r\nbody\r\n")["raw"])

    assert raw == other + field + b"\r\n\r\nbody\r\n"


def test_sendmail_completes_the_header_where_bare_names_stand_and_nothing_else() -> None:
    for content, header, body in [
        ("Hello\n", "From: CronDaemon <root@vm.test>\r\n", "Hello\r\n"),
        ("", "From: CronDaemon <root@vm.test>\r\n", ""),
        ("\nHello\n", "From: CronDaemon <root@vm.test>\r\n", "Hello\r\n"),
        ("Subject: s\nHello\n", "From: CronDaemon <root@vm.test>\r\nSubject: s\r\n", "Hello\r\n"),
        ("From: a@b.test\r\nX: 1\r\n 2\r\n\r\nb\r\n", "From: a@b.test\r\nX: 1\r\n 2\r\n", "b\r\n"),
        ("From me Mon Jan 1\nFrom: a@b.test\n\nb", "From: a@b.test\r\n", "b"),
        ("\ufeffFrom: a@b.test\n\n\ufeffb", "From: a@b.test\r\n", "\ufeffb"),
        ("\ufeffHello\n", "From: CronDaemon <root@vm.test>\r\n", "\ufeffHello\r\n"),
        ("From: root (Cron D)\nTo: a, x@y.z\n\nb", "From: root@vm.test (Cron D)\r\nTo: a@vm.test, x@y.z\r\n", "b"),
        ("From: =?utf-8?q?J=C3=B6?= <jo>\n\n", "From: =?utf-8?q?J=C3=B6?= <jo@vm.test>\r\n", ""),
        ("From: a@b.test\nCc: all:x ( (y) ),\n N <z>;\n\n",
         "From: a@b.test\r\nCc: all:x@vm.test ( (y) ),\r\n N <z@vm.test>;\r\n", ""),
        ("From: a@b.test\rTo: x@c.test\r\rone\rtwo", "From: a@b.test\r\nTo: x@c.test\r\n", "one\r\ntwo"),
        ("From: a@b.test\r\r\nTo: b\r\nCc: c\n\r\r\none\0\r\r\n", "From: a@b.test\r\nTo: b@vm.test\r\nCc: c@vm.test\r\n", "one\r\n"),
    ]:  # fmt: skip
        assert base64.b64decode(fields_of("-FCronDaemon x@c.test", content)["raw"]).decode() == f"{header}\r\n{body}"
    named = NAMES._replace(sender="cron@h.test", aliases={"root": ["ops@h.test"]})
    cron = fields_of("-FCron root", "From: root (Cron Daemon)\nTo: root\n\n", named)
    assert (cron["from"], cron["to"]) == ("cron@h.test", ["ops@h.test"])
    assert base64.b64decode(cron["raw"]) == b"From: cron@h.test (Cron Daemon)\r\nTo: root@vm.test\r\n\r\n"
    assert b'From: "Evil Bcc: x" <root@vm.test>\r\n' in base64.b64decode(
        fields_of("-F 'Evil\n Bcc: x' x@c.test", "x")["raw"]
    )


RESENT = "Resent-From: me\nResent-Bcc: b@c.test\nResent-To: y@c.test\n"


def test_the_envelope_is_that_of_the_options_else_of_the_newest_resent_block_else_of_the_header() -> None:
    for words, header, *envelope in [
        ("x@c.test", "From: a@b.test", "a@b.test", None, ["x@c.test"]),
        ("-f bounce x@c.test", "From: a@b.test", "bounce@vm.test", None, ["x@c.test"]),
        ("root", "Subject: s", "root@vm.test", None, ["root@vm.test"]),
        ("-f <> x@c.test", "From: a@b.test", "a@b.test", "<>", ["x@c.test"]),
        ("x@c.test", "From: MAILER-DAEMON <>", "root@vm.test", "<>", ["x@c.test"]),
        ("x@c.test", "From: Cron Daemon", "root@vm.test", None, ["x@c.test"]),
        ("x@c.test", "From: \udcfc@b.test", "root@vm.test", None, ["x@c.test"]),
        ("-f a@b.test x@c.test", "From: ((((", "a@b.test", None, ["x@c.test"]),
        ("-t", "To: x@c.test\nCc: N <y@c.test>\nBcc: z", "root@vm.test", None, ["x@c.test", "y@c.test", "z@vm.test"]),
        ("-t w@c.test", "To: x@c.test", "root@vm.test", None, ["w@c.test", "x@c.test"]),
        ("-t w@c.test", "To: x y\nCc: v@c.test", "root@vm.test", None, ["w@c.test", "v@c.test"]),
        ("-t", "To: x@c.test\nResent-To: y@c.test", "root@vm.test", None, ["y@c.test"]),
        ("-t", f"{RESENT}From: a@b.test\nTo: x@c.test", "me@vm.test", None, ["b@c.test", "y@c.test"]),
        (
            "-t",
            f"Resent-From: r@b.test\nResent-To: z@c.test\nResent-Sender: s@b.test\n{RESENT}",
            "s@b.test",
            None,
            ["z@c.test"],
        ),
        ("-t", f"Resent-From: r@b.test\nResent-Cc: z@c.test\nReceived: x\n{RESENT}", "r@b.test", None, ["z@c.test"]),
        ("w@c.test", f"Resent-From: a b\n{RESENT}From: a@b.test", "root@vm.test", None, ["w@c.test"]),
        ("w@c.test", "To: x@c.test", "root@vm.test", None, ["w@c.test"]),
        ("x@c.test,y@c.test", "To: z@c.test", "root@vm.test", None, ["x@c.test", "y@c.test"]),
        ("-t", "To: all: N <x@c.test> (N), y@c.test;", "root@vm.test", None, ["x@c.test", "y@c.test"]),
    ]:
        fields = fields_of(words, os.fsencode(f"{header}\n\nbody\n"))
        assert [fields["from"], fields.get("return_path"), fields["to"]] == envelope, (words, header)
    for text in "root admin", "x@c.test y@c.test", 'o"brien@c.test', "x@c.test N <y@c.test>":
        for words, content, status in ("-t", f"To: {text}\n\n", os.EX_DATAERR), (shlex.quote(text), "", os.EX_NOUSER):
            with pytest.raises(mailproxy.CommandFailed, match="address") as refusal:
                fields_of(words, content)
            assert refusal.value.status == status
    with pytest.raises(mailproxy.Rejected, match="this host has no domain: set aliases"):
        fields_of("root", "", NAMES._replace(domain=""))


SESAME = {"MAILPROXY_TOKEN": "sesame"}


@pytest.fixture
def local(tmp_path: Path, smtp: SmtpServer) -> Iterator[Daemon]:
    """A daemon that local users submit to, and MAILPROXY_CONFIG in `environment` for those who do."""
    config = {"server": {"submit_socket": tmp_path / "submit"}, "sendmail": {"domain": "vm.test"}}
    config["sendmail"] |= {"aliases": "admin: ops@c.test", "spool": tmp_path / "spool"}
    with Daemon(tmp_path, config, smtp=smtp, token="sesame", environment=HASTE) as daemon:
        yield daemon


HASTE = {"PAUSES": json.dumps({"SPOOL_PAUSE_S": 0.05})}


def sendmail_of(daemon: Daemon, *words: object, stdin: bytes = b"", folder: Path | None = None) -> Ended:
    """Call sendmail as programs on the machine of the daemon do."""
    environment = {"MAILPROXY_CONFIG": str(daemon.folder / "config.ini")}
    return run_command("sendmail", *words, stdin=stdin, environment=environment, folder=folder)


def test_sendmail_goes_by_the_configuration_of_the_daemon_never_by_that_of_the_callers_folder(
    local: Daemon, smtp: SmtpServer, tmp_path: Path
) -> None:
    content = b"To: x@c.test\nBcc: admin\nSubject: Gr\xc3\xbc\xc3\x9fe\n\nfirst\n.\nsec\0ond\n"
    app = tmp_path / "app"
    app.mkdir()
    (app / "config.ini").write_text("[database]\nhost = 10.0.0.1\n")

    for words in ["-t", "-i"], ["-t", "-f", "shop@a.test"]:
        assert sendmail_of(local, *words, stdin=content, folder=app) == (0, "", "")
    smtp.wait_for(2)
    assert run_command("sendmail", "x@c.test", folder=app).returncode == os.EX_TEMPFAIL  # nobody listens

    whole, cut = sorted(smtp.received_by("x@c.test"), key=lambda mail: len(mail.content), reverse=True)
    assert whole.recipients == ["x@c.test", "ops@c.test"]
    assert whole.sender == whole.message["From"] == f"{mailproxy.login_name()}@vm.test"
    assert whole.message["Date"]
    assert whole.message["Message-ID"]
    assert "Subject: Grüße\r\n".encode() in whole.content
    assert b"admin" not in whole.content
    assert b"\r\n\r\nfirst\r\n.\r\nsecond\r\n" in whole.content
    assert cut.sender == "shop@a.test"
    assert cut.content.endswith(b"\r\n\r\nfirst\r\n")


def test_sendmail_takes_mail_from_a_caller_whose_folder_a_deployment_has_removed(
    local: Daemon, smtp: SmtpServer, tmp_path: Path
) -> None:
    release = tmp_path / "release"
    release.mkdir()
    command = ["sh", "-c", 'rmdir "$PWD" && exec "$@"', "sh", sys.executable, STARTER, "sendmail", "-i", "x@c.test"]
    environment = _plain_environment() | {"MAILPROXY_CONFIG": str(local.folder / "config.ini")}

    ended = subprocess.run(command, input=b"Subject: s\n\nb", cwd=release, env=environment, capture_output=True)

    assert (ended.returncode, ended.stderr) == (0, b"")
    assert len(smtp.wait_for(1)) == 1


@pytest.mark.parametrize("words", ["-i x@c.test", "-bs"])
def test_sendmail_waits_for_the_end_of_a_mail_also_where_its_input_does_not_block(
    words: str, local: Daemon, smtp: SmtpServer
) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    environment = _plain_environment() | {"MAILPROXY_CONFIG": str(local.folder / "config.ini")}
    command = [sys.executable, STARTER, "sendmail", *words.split()]
    with subprocess.Popen(command, stdin=reading, stdout=subprocess.DEVNULL, env=environment) as sendmail:
        os.close(reading)
        with open(writing, "wb", buffering=0) as mail:
            mail.write(b"MAIL FROM:<a@b.test>\r\nRCPT TO:<x@c.test>\r\nDATA\r\n" if words == "-bs" else b"")
            mail.write(b"From: a@b.test\r\n\r\nfirst\r\n")
            wait_until(lambda: empty(writing), "the first part to be read")
            mail.write(b"second\r\n" + (b".\r\nQUIT\r\n" if words == "-bs" else b""))

    assert sendmail.returncode == 0
    (received,) = smtp.wait_for(1)
    assert received.content.endswith(b"\r\n\r\nfirst\r\nsecond\r\n")


def empty(pipe: int) -> bool:
    """True when nobody has yet to read anything of a pipe."""
    return fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)) == bytes(4)


def test_by_the_names_mailq_and_newaliases_sendmail_lists_the_queue_and_does_nothing(
    local: Daemon, tmp_path: Path
) -> None:
    def called(name: str, *words: str) -> tuple[int, str, str]:
        config = {"MAILPROXY_CONFIG": str(local.folder / "config.ini"), "MAILPROXY_URL": url_of(local), **SESAME}
        ended = run_command(*words, environment=config, called=tmp_path / name)
        return ended.returncode, ended.stdout, ended.stderr

    assert called("mailq") == (0, "Mail queue is empty\n", "")
    local.submit(mail("m1", to="temp@c.test"))
    assert called("mailq")[1].splitlines()[1].startswith("m1 ")
    assert called("sendmail", "-bp")[1].splitlines()[1].startswith("m1 ")
    for words in ["newaliases"], ["sendmail", "-bi"], ["sendmail", "-q"], ["sendmail", "-q30m", "-v"]:
        assert called(*words) == (0, "", "")
    assert called("sendmail", "-bd")[0] == os.EX_USAGE


def test_sendmail_has_the_exit_status_of_sysexits(strict_daemon: Daemon) -> None:
    rightly = {"MAILPROXY_URL": url_of(strict_daemon), **SESAME}
    for words, content, wrongly, status in [
        ("-t", b"Subject: nobody\n\n", {}, os.EX_USAGE),
        ("-t", b"To: d@e.test c@b.test\n\n", {}, os.EX_DATAERR),
        ("", b"", {}, os.EX_USAGE),
        ("-f", b"", {}, os.EX_USAGE),
        ("'nobody at all@'", b"x", {}, os.EX_NOUSER),
        ("x@-.test", b"x", {}, os.EX_NOUSER),
        ("root", b"x", {"MAILPROXY_SENDMAIL_DOMAIN": ""}, os.EX_CONFIG),  # which has none
        ("x@c.test", b"x", {"MAILPROXY_TOKEN": "salami"}, os.EX_NOPERM),
        ("x@c.test", b"x", {"MAILPROXY_URL": "nonsense"}, os.EX_CONFIG),
        ("x@c.test", b"x", {"MAILPROXY_CONFIG": "/nowhere.ini"}, os.EX_CONFIG),
        ("x@c.test", b"x", {"MAILPROXY_URL": "http://127.0.0.1:9"}, os.EX_TEMPFAIL),
        ("x@c.test", b"x", {}, os.EX_CONFIG),  # there is no account
        ("x@c.test", b"x" * 300_000, {}, os.EX_UNAVAILABLE),
    ]:
        ended = run_command("sendmail", *shlex.split(words), environment=rightly | wrongly, stdin=content)
        assert (words, ended.returncode, ended.stdout) == (words, status, "")
        assert ended.sentence.startswith("mailproxy: ")


def test_signed_messages_verify_after_sendmail(local: Daemon, smtp: SmtpServer, tmp_path: Path) -> None:
    needs("openssl")
    key = rsa.generate_private_key(65_537, 2048)
    private = key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    public = base64.b64encode(key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    signer = PrivateCA(tmp_path).issue("signer", usage=ExtendedKeyUsageOID.EMAIL_PROTECTION)
    header = b'From: "A,  B" <a@b.test>\r\nTo: x@c.test,  undisclosed-recipients:;\r\nReply-To: some body\r\n'
    header += b"Subject: =?utf-8?q?Gr=C3=BC?=\r\n\tfolded\r\nDate: Mon, 1 Jan 2024 00:00:00 +0000\r\n"
    header += b"Message-ID: <1@b.test>\r\n"
    body = b"\r\n.\r\nFrom here\r\n\r\n.dot  \r\n\r\n\r\n"
    fields = [b"From", b"To", b"Reply-To", b"Subject", b"Date", b"Message-ID"]

    signature = dkim.sign(
        header + body, b"s", b"b.test", private, include_headers=fields, canonicalize=(b"simple", b"simple")
    )
    assert sendmail_of(local, "-t", "-i", stdin=(signature + header + body).replace(b"\r\n", b"\n")).returncode == 0
    (tmp_path / "body").write_bytes(b"Hello\r\n.\r\nyou\r\n")
    sign = [
        "openssl",
        "smime",
        "-sign",
        "-signer",
        signer.cert,
        "-inkey",
        signer.key,
        "-in",
        tmp_path / "body",
        "-text",
    ]
    signed = subprocess.run(sign, capture_output=True, check=True).stdout
    assert sendmail_of(local, "-i", "x@c.test", stdin=b"From: a@b.test\nSubject: s\n" + signed).returncode == 0

    by_dkim, by_smime = sorted(smtp.wait_for(2), key=lambda mail: b"DKIM" not in mail.content)
    assert dkim.verify(by_dkim.content, dnsfunc=lambda name, timeout=5: b"v=DKIM1; k=rsa; p=" + public)
    (tmp_path / "received").write_bytes(by_smime.content)
    verify = ["openssl", "smime", "-verify", "-in", tmp_path / "received", "-CAfile", tmp_path / "ca.pem"]
    verified = subprocess.run(verify, capture_output=True)
    assert verified.returncode == 0, verified.stderr
    assert b"Hello\r\n.\r\nyou\r\n" in verified.stdout


def as_user(number: int) -> list[str]:
    """What runs a command as another user."""
    return ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups"]


@functools.cache
def installed_program() -> Path:
    """The program where every user can run it, by the Python of the system: tests may run from closed folders."""
    needs("root", "setpriv", "/usr/bin/python3")
    if subprocess.run(["/usr/bin/python3", "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]).returncode:
        pytest.skip("needs Python 3.11 in /usr/bin")
    folder = Path(tempfile.mkdtemp(prefix="mailproxy-installed-"))
    atexit.register(shutil.rmtree, folder)
    folder.chmod(0o755)
    shutil.copy(PROGRAM, folder)
    for package in (aiosmtplib, prometheus_client):
        shutil.copytree(Path(package.__file__).parent, folder / package.__name__)
    subprocess.run(["/usr/bin/python3", "-m", "compileall", "-q", folder], check=True)
    lines = STARTER.read_text().splitlines()
    program = folder / "mailproxy"
    program.write_text(
        "\n".join(["#!/usr/bin/python3 -I", lines[0], f"sys.path[:0] = [{str(folder)!r}]", *lines[2:], ""])
    )
    program.chmod(0o755)
    (folder / "sendmail").symlink_to(program)
    return folder / "sendmail"


@contextlib.contextmanager
def installed_daemon(smtp: SmtpServer) -> Iterator[Daemon]:
    """A daemon as the head of the unit installs it: under a user of its own, its token readable by that user only, its
    state in a directory that others may walk through."""
    start = f'shift 2; exec {installed_program().with_name("mailproxy")} "$@"'
    with open_folder("mailproxy-installed-") as folder:
        for name in "state", "run":
            (folder / name).mkdir(mode=0o711)
            os.chown(folder / name, NOBODY, NOBODY)
        daemon = Daemon(folder, smtp=smtp, token="sesame", environment=HASTE)
        daemon.config["storage"]["db_path"] = folder / "state" / "mailproxy.db"
        daemon.config["server"] |= {"api_token": f"file:{folder}/token", "submit_socket": folder / "run" / "submit"}
        daemon.config["sendmail"] = {"domain": "vm.test", "spool": folder / "state" / "spool"}
        (folder / "token").write_text("sesame")
        (folder / "token").chmod(0o400)
        os.chown(folder / "token", NOBODY, NOBODY)
        daemon.within = [*as_user(NOBODY), "sh", "-c", start, "sh"]
        try:
            yield daemon
        finally:
            daemon.__exit__()


def test_an_ordinary_user_sends_while_the_daemon_is_up_is_away_and_is_back_each_mail_once(smtp: SmtpServer) -> None:
    with installed_daemon(smtp) as daemon:
        spool = daemon.folder / "state" / "spool"

        def send(subject: str, **environment: str) -> None:
            command = [*as_user(65_534), installed_program(), "-t"]
            content = f"To: x@c.test\nSubject: {subject}\n\nbody\n".encode()
            config = {"MAILPROXY_CONFIG": str(daemon.folder / "config.ini"), **environment}
            outside = {"cwd": "/", "env": _plain_environment() | config, "umask": 0o077}
            ended = subprocess.run(command, input=content, capture_output=True, **outside)
            assert (ended.returncode, ended.stderr) == (0, b"")

        daemon.start()
        send("by the socket")
        smtp.wait_for(1)
        assert (spool.stat().st_mode & 0o7777, spool.stat().st_uid) == (0o1733, NOBODY)
        send("by the spool, taken at once", MAILPROXY_SERVER_SUBMIT_SOCKET="/nowhere")
        smtp.wait_for(2)
        daemon.stop()
        send("first, while it is away")
        send("second, while it is away")
        assert len(list(spool.iterdir())) == 2
        daemon.start()
        smtp.wait_for(4)
        wait_until(lambda: not list(spool.iterdir()), "an empty spool")
        daemon.restart()
        send("by the socket again")

        subjects = [received.message["Subject"] for received in smtp.wait_for(5)]
        assert Counter(subjects).most_common(1)[0][1] == 1, subjects
        assert smtp.received[0].sender == "nobody@vm.test"
        assert "ERROR" not in daemon.log


def test_what_does_not_fit_into_the_spool_leaves_no_half_of_itself_there(tmp_path: Path) -> None:
    spool, config = tmp_path / "spool", tmp_path / "config.ini"
    spool.mkdir()
    config.write_text(f"[server]\nsubmit_socket = {tmp_path}/nowhere\n[sendmail]\nspool = {spool}\n")
    full = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh"]  # stands for a full disk
    command = [*full, sys.executable, STARTER, "sendmail", "-i", "-f", "a@b.test", "x@c.test"]
    environment = _plain_environment() | {"MAILPROXY_CONFIG": str(config)}

    ended = subprocess.run(command, input=b"x" * 100_000, env=environment, capture_output=True)

    assert ended.returncode == os.EX_TEMPFAIL
    assert b"the spool" in ended.stderr
    assert list(spool.iterdir()) == []
    assert subprocess.run(command, input=b"x", env=environment, capture_output=True).returncode == os.EX_OK
    assert [file.name[0] for file in spool.iterdir()] == ["0"]


def test_nothing_in_the_spool_harms_the_daemon_or_anybodys_files(smtp: SmtpServer) -> None:
    with installed_daemon(smtp) as daemon:
        daemon.config["server"]["max_body_bytes"] = 100_000
        daemon.start()
        spool, theirs = daemon.folder / "state" / "spool", daemon.folder / "theirs"
        daemon.stop()
        good = json.dumps({"messages": [mail("mine")]})
        theirs.write_text(json.dumps({"messages": [mail("theirs")]}))
        theirs.chmod(0o644)
        before = theirs.stat()

        (spool / "1-symbolic-link").symlink_to(theirs)
        os.link(theirs, spool / "2-hard-link")
        os.mkfifo(spool / "3-pipe", 0o666)
        (spool / "4-folder").mkdir(0o777)
        (spool / "5-too-large").write_text(f'{{"messages": [{json.dumps(mail("large", body="x" * 100_000))}]}}')
        (spool / "6-half").write_text(good[:-9])
        (spool / "7-closed").write_text(good)
        (spool / ("8-long-name" * 23)).write_text("x")
        (spool / "9-no-account").write_text(json.dumps({"messages": [mail("lost", account_id="none")]}))
        (spool / ".being-written").write_text(json.dumps({"messages": [mail("half")]}))
        for file in spool.iterdir():
            if file.name[0] in "34567":
                os.chown(file, 65_534, 65_534)
        (spool / "7-closed").chmod(0o600)
        (spool / "a-good-one").write_text(good)
        daemon.start()

        (received,) = smtp.wait_for(1)
        wait_until(lambda: all(file.name[0] == "." for file in spool.iterdir()), "a spool that was looked through")
        (spool / "a-good-one-that-came-back").write_text(good)  # as after a crash before it was removed
        wait_until(lambda: all(file.name[0] == "." for file in spool.iterdir()), "a spool that was looked through")
        assert [record["id"] for record in daemon.get("/messages").json["messages"]] == ["mine"]
        for number, reason in [
            ("1-", "Too many levels of symbolic links"), ("2-", "not a regular file with one name"),
            ("3-", "not a regular"), ("4-", "not a regular"), ("5-", "max_body_bytes"),
            ("6-", "JSON"), ("7-", "Permission denied"), ("8-", "JSON"), ("9-", "account not found"),
        ]:  # fmt: skip
            assert reason in daemon.wait_for_log(f"spool/{number}")
        assert (spool / ".being-written").exists()
        after = theirs.stat()
        assert (after.st_mtime, after.st_mode, after.st_uid) == (before.st_mtime, before.st_mode, before.st_uid)
        assert received.recipients == ["ok@example.com"]


def test_a_spooled_mail_that_cannot_be_removed_or_is_taken_back_holds_up_no_other(smtp: SmtpServer) -> None:
    with installed_daemon(smtp) as daemon:
        spool = daemon.folder / "state" / "spool"
        spool.mkdir()
        spool.chmod(0o1777)  # and root's: the daemon may remove nothing
        for id_ in "first", "second":
            (spool / id_).write_text(json.dumps({"messages": [mail(id_)]}))
        daemon.start()

        smtp.wait_for(2)
        assert "Operation not permitted" in daemon.wait_for_log("the spool cannot be used")
        wait_until(lambda: len(listed(daemon)) == 2, "both")
        daemon.stop()

        os.chown(spool, NOBODY, NOBODY)
        for file in spool.iterdir():
            file.unlink()
        taken_back = [spool / f"1-{n}" for n in range(200)]
        for file in taken_back:
            file.write_text("x")
        (spool / "2").write_text(json.dumps({"messages": [mail("third")]}))
        daemon.start()
        wait_until(lambda: not taken_back[0].exists(), "the first look at them")
        for file in taken_back[:0:-1]:
            file.unlink(missing_ok=True)

        smtp.wait_for(3)
        assert "the spool cannot be used" not in daemon.log.split("stopped status=0")[1]


def test_spooled_mail_waits_while_the_daemon_is_out_of_descriptors(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    for n in range(300):
        (spool / f"{n:03}").write_text(json.dumps({"messages": [mail(f"m-{n}")]}))
    with Daemon(tmp_path, {**QUIET, "sendmail": {"spool": spool}}, environment=HASTE) as daemon:
        assert daemon.process
        wait_until(lambda: not (spool / "000").exists(), "the first mail to be taken", pause=0.001)
        limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
        assert "Too many open files" in daemon.wait_for_log("the spool cannot be used")
        resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE, limits)

        wait_until(
            lambda: daemon.status()["pending"] == 300, lambda: f"all mail; there is {daemon.status()['pending']}"
        )
        assert "set aside" not in daemon.log


@pytest.mark.parametrize(
    ("program", "script", "sender", "subject", "body"),  # run by sh, $SENDMAIL in its environment
    [
        ("php", """php -n -d sendmail_path="$SENDMAIL -t -i" -r 'exit(mail("x@c.test", "From PHP", "Hello\n.\nyou",
           "From: Shop <shop@a.test>\r\nContent-Type: text/plain; charset=utf-8", "-fbounce@a.test") ? 0 : 1);'""",
         "bounce@a.test", "From PHP", "Hello\n.\nyou"),
        ("mutt", """echo Grüße >text; echo "set sendmail='$SENDMAIL -oem -oi' from=me@a.test use_envelope_from copy=no" >rc
           LC_ALL=C.UTF-8 mutt -n -F rc -s 'From mutt' -a text -- x@c.test <text""",
         "me@a.test", "From mutt", "Grüße"),
        ("sh", """{ printf 'From: root (Cron Daemon)\nTo: x@c.test\nSubject: Cron <root@vm> backup\n\n'; printf 'disk\\000 full'
           } | $SENDMAIL -i -FCronDaemon -B8BITMIME -oem x@c.test""",  # with the words of Debian's cron
         f"{mailproxy.login_name()}@vm.test", "Cron <root@vm> backup", "disk full"),
        ("mailx", """echo "set sendmail=$SENDMAIL" >.mailrc; echo Hello | mailx -s 'From mailx' x@c.test""",
         f"{mailproxy.login_name()}@vm.test", "From mailx", "Hello"),
        ("git", """printf '%s\n' 'From 0123 Mon Sep 17 00:00:00 2001' 'From: A <a@b.test>' 'Subject: [PATCH] x' \
           'Date: Mon, 1 Jan 2024 00:00:00 +0000' '' 'the patch' >0001.patch
           git send-email --smtp-server="$SENDMAIL" --to=x@c.test --from='A <a@b.test>' --suppress-cc=all \\
           --confirm=never 0001.patch""",
         "a@b.test", "[PATCH] x", "the patch"),
    ],
    ids=["php", "mutt", "sh", "mailx", "git"],
)  # fmt: skip
def test_programs_that_know_sendmail_send_through_it(
    program: str, script: str, sender: str, subject: str, body: str, local: Daemon, smtp: SmtpServer
) -> None:
    needs(program)
    if program == "git":
        needs(f"{subprocess.getoutput('git --exec-path')}/git-send-email")
    wrapper = local.folder / "sendmail"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {STARTER} sendmail "$@"\n')
    wrapper.chmod(0o755)
    environment = {
        **_plain_environment(), "SENDMAIL": str(wrapper), "HOME": str(local.folder),
        "MAILPROXY_CONFIG": str(local.folder / "config.ini"),
        **{f"GIT_{who}_{what}": "a@b.test" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
    }  # fmt: skip
    ended = subprocess.run(
        ["sh", "-ec", script], cwd=local.folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True
    )
    assert ended.returncode == 0, ended.stderr
    (mail,) = smtp.wait_for(1)
    assert (mail.sender, mail.recipients, mail.message["Subject"]) == (sender, ["x@c.test"], subject)
    part = next(part for part in mail.message.walk() if part.get_content_type() == "text/plain")
    assert body in part.get_content().replace("\r\n", "\n")


# --- backup


def test_a_backup_is_a_whole_queue_while_the_daemon_writes(tmp_path: Path) -> None:
    batches = ([note(f"{n}-{m}", body="b" * 5000) for m in range(10)] for n in itertools.count())
    with Daemon(tmp_path, QUIET) as daemon:
        for batch in itertools.islice(batches, 11):
            daemon.submit(*batch)
        with running("backup", "copy.db", cwd=tmp_path) as backing_up:
            while backing_up.poll() is None:
                daemon.submit(*next(batches))
            said, complaints = backing_up.communicate()
        pending = daemon.status()["pending"]

    assert (backing_up.returncode, complaints) == (0, "")
    copy = tmp_path / "copy.db"
    with contextlib.closing(sqlite3.connect(f"file:{copy}?mode=ro", uri=True)) as db:
        (count,) = db.execute("SELECT count(*) FROM messages").fetchone()
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert 100 < count <= pending
    assert count % 10 == 0  # a submission is in it or is not
    assert re.fullmatch(rf"copy\.db: {count} messages, \d+\.\d [kM]B, checked\n", said)
    assert copy.stat().st_mode & 0o777 == 0o600
    assert {path.name for path in tmp_path.iterdir() if "copy" in path.name} == {"copy.db"}
    with Daemon(tmp_path, {**QUIET, "storage": {"db_path": copy}}) as restored:
        assert restored.status()["pending"] == count


def test_a_backup_is_of_a_queue_only_and_overwrites_only_what_it_may(daemon: Daemon, here: Run) -> None:
    no_queue = daemon.folder / "q.db"
    for content in None, b"", b"no database at all" * 100:
        if content is not None:
            no_queue.write_bytes(content)
        ended = here("backup", daemon.folder / "copy.db", "--db", no_queue)
        assert ended.returncode == 1
        assert "q.db" in ended.sentence
        assert not list(daemon.folder.glob("*copy*"))

    there, nowhere = daemon.folder / "there.db", daemon.folder / "no" / "x.db"
    words = ["--config", daemon.folder / "config.ini"]
    there.write_text("mine")
    for target, forced, complaint in [
        (there, (), "--force"),
        (daemon.folder / "queue.db", ("--force",), "queue in use"),
        (daemon.folder, ("--force",), "folder"),
        (nowhere, (), f"{nowhere} cannot be written: No such file or directory"),
    ]:
        ended = here("backup", target, *forced, *words)
        assert ended.returncode == 1
        assert complaint in ended.sentence
        assert there.read_text() == "mine"
    assert here("backup", there, "--force", *words).returncode == 0
    assert there.read_bytes()[:6] == b"SQLite"


# ======================================================================
# SECURITY - what is promised of the HTTP side, shown by those who attack it
# ======================================================================


# -- openapi.json

PROBLEM_CODES = (
    "bad_json bad_field bad_request all_rejected unauthorized not_found method_not_allowed timeout conflict too_large "
    "unsupported_media_type headers_too_large internal attachment_unavailable storage_unavailable busy foreign_origin "
    "version_not_supported"
)
REJECTION_CODES = "missing_field invalid_field unknown_account no_account already_sent in_delivery duplicate_id"


def test_openapi_json_says_what_the_route_table_routes(tmp_path: Path) -> None:
    with Daemon(tmp_path, token="t0ken") as daemon:
        assert daemon.get("/openapi.json", headers={"X-API-Token": ""}).status == 401
        document = daemon.get("/openapi.json").json

        operations = {(method, path): row for path, rows in document["paths"].items() for method, row in rows.items()}
        assert document["openapi"].startswith("3.1")
        assert {("post", "/commands/add-messages"), ("delete", "/account/{id}")} < set(operations)
        for (method, path), row in operations.items():
            public = path in ("/", "/health", "/ready")
            assert (row.get("security"), "401" in row["responses"]) == ([] if public else None, not public)
            bare = daemon.request(method.upper(), path.replace("{id}", "x"), headers={"X-API-Token": ""})
            assert bare.status == (200 if public else 401), path
            other = daemon.request("PATCH", path.replace("{id}", "x"))
            assert other.status == 405
            assert set(other.headers["Allow"].lower().split(", ")) - {"head"} == set(document["paths"][path])
        for pointer in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
            assert functools.reduce(operator.getitem, pointer.split("/"), document)
        names = [row["operationId"] for row in operations.values()]
        assert len(set(names)) == len(names)
        assert {"submit_messages", "list_messages", "get_message", "put_account"} < {*names}
        assert all(name.isidentifier() and row["summary"] for name, row in zip(names, operations.values(), strict=True))
        schemas = document["components"]["schemas"]
        assert schemas["Problem"]["properties"]["code"] == {"$ref": "#/components/schemas/ProblemCode"}
        assert "code" in schemas["Problem"]["required"]
        assert set(schemas["ProblemCode"]["enum"]) == set(PROBLEM_CODES.split())
        assert set(schemas["RejectionCode"]["enum"]) == set(REJECTION_CODES.split())


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Path]]:
    """A daemon, and its openapi.json in a folder for what is generated of it."""
    with (
        open_folder("mailproxy-generated-", in_memory=True) as folder, SmtpServer() as smtp,
        Daemon(tmp_path_factory.mktemp("described"), smtp=smtp, token="t0ken") as daemon,
    ):  # fmt: skip
        (folder / "openapi.json").write_bytes(daemon.get("/openapi.json").content)
        yield daemon, folder


def run_generator(folder: Path, *command: object) -> None:
    ran = subprocess.run([str(word) for word in command], cwd=folder, capture_output=True, text=True, timeout=100)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_typed_python_client_is_made_of_openapi_json_and_works(
    described: tuple[Daemon, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openapi_python_client")
    daemon, folder = described
    (folder / "client.json").write_text('{"post_hooks": []}')
    generator = Path(sys.executable).with_name("openapi-python-client")
    options = ["--path=openapi.json", "--meta=none", "--config=client.json", "--fail-on-warning"]
    run_generator(folder, generator, "generate", *options, "--output-path=mailproxy_client")
    monkeypatch.syspath_prepend(folder)
    models = importlib.import_module("mailproxy_client.models")
    client_class = importlib.import_module("mailproxy_client").AuthenticatedClient

    def call(name: str, *arguments: object, **named: object) -> Any:
        function = importlib.import_module(f"mailproxy_client.api.default.{name}").sync
        return function(*arguments, client=client, **named)

    with client_class(base_url=f"http://127.0.0.1:{daemon.port}", token="t0ken") as client:
        server = {"host": "127.0.0.1", "port": int(daemon.config["smtp"]["port"])}
        assert call("put_account", body=models.Account(id="web", **server, use_tls=False, retry_delays=[60])).ok
        message = models.Message(
            id="typed", from_="me@example.com", to=["ok@example.com"], subject="Typed", text="Hello.",
            account_id="web", priority=models.MessagePriorityType0.HIGH,
        )  # fmt: skip
        assert call("submit_messages", body=models.Batch(messages=[message])).queued == 1
        daemon.wait_status("typed", "sent")

        (record,) = call("list_messages", status=models.ListMessagesStatus.SENT, account_id="web").messages
        history = call("get_message", "typed")
        accounts = {account.id: account for account in call("list_accounts").accounts}
        refused = call("submit_messages", body=models.Batch(messages=[models.Message(id="x", from_="x", to="x")]))
        known = call("submit_messages", body=models.Batch(messages=[message])).known

    assert (record.id, record.priority, record.status.value, record.error) == ("typed", 1, "sent", None)
    assert [attempt.code for attempt in history.attempts] == [250]
    assert (accounts["web"].use_tls, accounts["web"].retry_delays, accounts["web"].oauth2) == (False, [60], None)
    assert refused.rejected[0].reason.startswith("invalid from")
    assert (refused.code, known) == (models.ProblemCode.ALL_REJECTED, ["typed"])
    assert (refused.rejected[0].code, refused.rejected[0].field) == (models.RejectionCode.INVALID_FIELD, "from")


TYPESCRIPT = """
import type { operations } from "./api";

type Batch = operations["submit_messages"]["requestBody"]["content"]["application/json"];
type Answer = operations["submit_messages"]["responses"][200]["content"]["application/json"];
type Account = operations["put_account"]["requestBody"]["content"]["application/json"];
const message = { id: "a", from: "me@example.com", to: ["ok@example.com"], subject: "S", text: "T" };

export const right: Batch = { messages: [{ ...message, priority: "high" }, { ...message, priority: 1, cc: null }] };
export const queued = (answer: Answer): number => answer.queued + answer.rejected.length;
export const account: Account = { id: "web", host: "mx.example.com", port: 25, use_tls: true, oauth2: null };
// @ts-expect-error
export const nonsense: Batch = { messages: "nonsense" };
// @ts-expect-error
export const nobody: Batch = { messages: [{ id: "a", from: "me@example.com" }] };
// @ts-expect-error
export const urgent: Batch = { messages: [{ ...message, priority: "urgent" }] };
// @ts-expect-error
export const perhaps: Account = { ...account, use_tls: "perhaps" };
"""


def test_typescript_refuses_nonsense_by_the_types_made_of_openapi_json(described: tuple[Daemon, Path]) -> None:
    _, folder = described
    install_from_npm(folder, "openapi-typescript@7", "typescript@5")
    (folder / "program.ts").write_text(TYPESCRIPT)

    tools = folder / "node_modules" / ".bin"
    run_generator(folder, tools / "openapi-typescript", "openapi.json", "-o", "api.ts")
    run_generator(folder, tools / "tsc", "--skipLibCheck", "--noEmit", "--strict", "--lib", "es5", "program.ts")


@pytest.mark.timeout(180)
def test_schemathesis_finds_nothing(tmp_path: Path, smtp: SmtpServer) -> None:
    pytest.importorskip("schemathesis")
    with Daemon(tmp_path, smtp=smtp, token="t0ken") as daemon:
        daemon.submit(mail("there"), mail("later", deferred_ts=4_000_000_000))
        script, url = PROGRAM.parent / "bench" / "api.py", f"http://127.0.0.1:{daemon.port}"
        command = [sys.executable, script, "--url", url, "--token", "t0ken", "--examples", "1"]
        options = {"cwd": tmp_path, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        storage = {"HYPOTHESIS_STORAGE_DIRECTORY": str(PROGRAM.with_name(".hypothesis"))}  # tables that take a second
        tried = subprocess.run(command, timeout=170, env=os.environ | storage, **options)

        assert tried.returncode == 0, tried.stdout[-10_000:] + tried.stderr
        assert "No issues found" in tried.stdout
        assert " ERROR " not in daemon.log
        assert "Traceback" not in daemon.log
        for path in ("/commands/activate", "/account/default/activate"):
            daemon.post(path)
        smtp.wait_for(5)
        assert {received.recipients[0] for received in smtp.received} == {"ok@example.com"}


# -- whatever is accepted can be read when it arrives

PRINTABLE = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=60)
GENERATED_TEXT = st.one_of(*[PRINTABLE] * 15, st.text(max_size=60))  # mostly fit for a header
ADDRESS_TEXT = st.one_of(
    st.builds("{}@example.com".format, st.text("abcXYZ09+-_'é", min_size=1, max_size=12)),
    st.builds('"{}" <ok@example.com>'.format, PRINTABLE.map(lambda text: text.replace("\\", "").replace('"', ""))),
    st.builds("{} <ok@example.com>".format, st.text("abcé .=?_", max_size=12)),
    st.builds("{}@example.com".format, st.text('ab."', min_size=1, max_size=6)),
    st.emails(),
    st.just("ok@bücher.example"),
)
ADDRESS_LIST = st.one_of(ADDRESS_TEXT, st.lists(ADDRESS_TEXT, min_size=1, max_size=3))
HEADER_NAME = st.sampled_from(["X-Test", "List-Id", "References"]) | st.text("abXY-09_!", min_size=1, max_size=20)
HEADER_VALUE = st.one_of(GENERATED_TEXT, st.integers(), st.lists(GENERATED_TEXT, max_size=2))
CONTENT_TYPE = st.sampled_from(["text/plain", "application/pdf", "message/rfc822", "image/png; name=x"])
ATTACHMENT = st.fixed_dictionaries(
    {"filename": GENERATED_TEXT, "content": st.binary(max_size=90).map(lambda raw: base64.b64encode(raw).decode())},
    optional={"content_type": CONTENT_TYPE, "content_id": st.text("abc.@-", max_size=20), "inline": st.booleans()},
)
ENVELOPE = {"from": ADDRESS_TEXT, "to": ADDRESS_LIST}
WRITTEN_MESSAGE = st.fixed_dictionaries(
    {**ENVELOPE, "subject": GENERATED_TEXT, "body": GENERATED_TEXT | st.text("x\r\n. \t=é", max_size=2000)},
    optional={
        **dict.fromkeys(("html", "from_name"), GENERATED_TEXT),
        **dict.fromkeys(("cc", "bcc", "reply_to"), ADDRESS_LIST),
        "return_path": ADDRESS_TEXT,
        "headers": st.dictionaries(HEADER_NAME, HEADER_VALUE, max_size=3),
        "attachments": st.lists(ATTACHMENT, max_size=2),
    },
)
RAW_BODY = st.binary(max_size=200).map(lambda body: b"Subject: x\r\n\r\n" + body.replace(b"\0", b""))
RAW_MESSAGE = st.fixed_dictionaries({**ENVELOPE, "raw": RAW_BODY.map(lambda raw: base64.b64encode(raw).decode())})


@pytest.mark.timeout(120)
def test_every_message_that_is_accepted_arrives_and_can_be_read(tmp_path: Path, smtp: SmtpServer) -> None:
    config = {"delivery": {"max_retries": 1, "retry_delays": 60}, "smtp": {"max_connections": 5}}
    waiting: dict[str, Mapping[str, Any]] = {}
    with Daemon(tmp_path, config, smtp=smtp) as daemon:

        @hypothesis.settings(
            max_examples=60, deadline=None, database=None, derandomize=True,
            suppress_health_check=list(HealthCheck), phases=[hypothesis.Phase.generate],
        )  # fmt: skip
        @hypothesis.given(st.lists(st.one_of(WRITTEN_MESSAGE, WRITTEN_MESSAGE, RAW_MESSAGE), min_size=1, max_size=12))
        def submit(messages: list[dict[str, Any]]) -> None:
            batch = [{"id": f"g-{len(waiting)}-{n}", **message} for n, message in enumerate(messages)]
            answer = submitted(daemon, *batch)
            assert answer.status in (200, 400), answer.content
            rejected = {entry["id"]: entry["reason"] for entry in answer.json["rejected"]}
            assert all(re.match("missing |invalid ", reason) for reason in rejected.values()), rejected
            waiting.update({message["id"]: message for message in batch if message["id"] not in rejected})

        submit()
        wait_until(lambda: daemon.status()["pending"] == 0, "the end of the queue", 120)

        records = daemon.get("/messages").json["messages"]
        assert len(waiting) > 50  # fewer on a busy machine, where hypothesis stops earlier
        assert {record["id"]: record["error"] for record in records} == dict.fromkeys(waiting)
        submitted_as = {record["message_id"]: waiting[record["id"]] for record in records}
        for received in smtp.received:
            lines, message = received.content.split(b"\r\n"), received.message
            assert not any(b"\r" in line or b"\n" in line for line in lines)
            if "raw" not in submitted_as.get(message["Message-ID"], {"raw": ""}):
                assert max(map(len, lines)) <= 998
                parts = [part for part in message.walk() if part.get_content_type() != "message/rfc822"]
                assert not any(part.defects for part in parts)
                assert all(message.get_all(name, []) != [] for name in ("From", "Date", "Message-ID", "MIME-Version"))
                assert (message["Bcc"], len(message.get_all("Subject", []))) == (None, 1)
        assert " ERROR " not in daemon.log


# -- strangers


def test_a_wrong_token_is_counted_and_logged_without_its_value_and_any_of_the_right_ones_is_let_in(
    tmp_path: Path,
) -> None:
    with Daemon(tmp_path, {"server": {"api_token": "old-t0ken, new-t0ken"}}) as daemon:
        statuses = [
            daemon.get("/status", headers={"X-API-Token": token}).status
            for token in ("guess-5f3a", "", "old-t0ke", "old-t0ken, new-t0ken", "old-t0ken", "new-t0ken")
        ]

        assert statuses == [401, 401, 401, 401, 200, 200]
        daemon.token = "old-t0ken"
        assert "mailproxy_auth_failures_total 4.0" in daemon.get("/metrics").content.decode()
        assert daemon.log.count("request without a valid token") == 4
        assert "guess-5f3a" not in daemon.log


def test_strangers_who_open_connections_without_end_neither_stop_delivery_nor_fill_the_log(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    def answers_again() -> bool:
        with contextlib.suppress(OSError, http.client.HTTPException):
            return daemon.get("/health").status == 200
        return False

    limit = ["sh", "-c", 'ulimit -n 300; exec "$@"', "sh"]
    with Daemon(tmp_path, smtp=smtp, token="t0ken", within=limit) as daemon:
        assert daemon.post("/account", {"id": "new", "host": smtp.host, "port": smtp.port}).status == 200
        daemon.submit(mail("beside-them", account_id="new", deferred_ts=int(time.time()) + 2))
        with contextlib.ExitStack() as strangers:
            for _ in range(350):
                stranger = strangers.enter_context(socket.socket())
                stranger.setblocking(False)  # as many are let in as are let in
                stranger.connect_ex(("127.0.0.1", daemon.port))
            smtp.wait_for(1)
        wait_until(answers_again, "the API again")

        assert "fewer HTTP connections" in daemon.log
        assert len(daemon.log) < 5000


FOREIGN = [
    *(
        {"Origin": origin}
        for origin in ("https://evil.example", "null", "", "https://{own}", "http://localhost:{port}")
    ),
    {"Origin": "http://{own}, http://evil.example"},
    *({"Origin": "http://{own}", "Sec-Fetch-Site": site} for site in ("cross-site", "same-site", "Cross-Site")),
    *({"Host": host} for host in ("evil.example.co", "127.0.0.1.evil.co:8000", "LOCALHOST.evil.co.")),
    {"Host": "evil.example.co:8000", "Origin": "http://evil.example.co:8000"},
]
OUR_OWN = [
    *({"Host": host} for host in ("localhost:8000", "mailproxy", "127.0.0.2:80", "[::1]:8000", "mail.internal", "a.example")),
    *({"Origin": "http://{own}", "Sec-Fetch-Site": site} for site in ("same-origin", "none", "")),
    *({"Origin": f"http://{host}", "Host": host.upper()} for host in ("localhost", "[::1]:8000")),
]  # fmt: skip


def test_without_a_token_a_page_of_another_site_is_refused_on_any_path(quiet: Daemon, tmp_path: Path) -> None:
    """What it sends to loopback looks like curl, but for its Origin, where it comes from, or the name it was asked for."""

    def sent(to: Daemon, method: str, path: str, headers: Mapping[str, str], body: Any = None) -> tuple[int, Any]:
        own = {name: value.format(own=f"127.0.0.1:{to.port}", port=to.port) for name, value in headers.items()}
        answer = to.request(method, path, body, own)
        return answer.status, answer.json.get("code") if answer.status >= 400 else None

    body = json.dumps({"messages": [mail()]}).encode()
    for headers in FOREIGN:
        form = {**headers, "Content-Type": "application/x-www-form-urlencoded"}
        assert sent(quiet, "POST", "/commands/add-messages", form, body) == (403, "foreign_origin"), headers
        for path in ("/messages", "/health", "/ready", "/metrics", "/", "/nowhere"):
            assert sent(quiet, "GET", path, headers) == (403, "foreign_origin"), (path, headers)
        assert sent(quiet, "OPTIONS", "/commands/activate", headers) == (403, "foreign_origin")
    for headers in OUR_OWN:
        assert sent(quiet, "GET", "/messages", headers)[0] == 200, headers
        assert sent(quiet, "GET", "/nowhere", headers)[0] == 404, headers

    assert (quiet.status()["pending"], quiet.status()["active"]) == (0, False)
    assert "request from another site" in quiet.log
    (tmp_path / "guarded").mkdir()
    with Daemon(tmp_path / "guarded", token="t0ken") as guarded:  # which no page of another site has
        for headers in FOREIGN:
            assert sent(guarded, "GET", "/messages", headers)[0] == 200, headers
            assert sent(guarded, "GET", "/messages", {**headers, "X-API-Token": "x"})[0] == 401, headers


def test_an_account_whose_certificate_is_a_pipe_stops_itself_alone(tmp_path: Path, smtp: SmtpServer) -> None:
    os.mkfifo(tmp_path / "pipe")
    with Daemon(tmp_path, smtp=smtp) as daemon:
        pipes = [f"pipe-{number}" for number in range(mailproxy.WORK_THREADS)]
        for id_ in pipes:
            account = {"id": id_, "host": smtp.host, "port": smtp.port, "start_tls": "required", "timeout": 1}
            assert daemon.post("/account", {**account, "client_cert": str(tmp_path / "pipe")}).status == 200

        daemon.submit(*[mail(id_, account_id=id_) for id_ in pipes])
        daemon.submit(mail("other"))

        daemon.wait_status("other", "sent")
        for id_ in pipes:
            assert "certificate files" in daemon.wait_status(id_, "deferred")["error"]


# -- secrets


class Parrot(socketserver.StreamRequestHandler):
    """A mail server that repeats the credentials it refuses, as they came and decoded."""

    def handle(self) -> None:
        self.wfile.write(b"220 parrot.test\r\n")
        replies = {b"EHLO": b"250-parrot.test\r\n250 AUTH PLAIN LOGIN XOAUTH2", b"QUIT": b"221 bye"}
        for line in self.rfile:
            words, decoded = line.split() or [b""], b""
            with contextlib.suppress(ValueError):
                decoded = base64.b64decode(words[-1]).replace(b"\0", b" ").replace(b"\x01", b" ")
            said = replies.get(words[0].upper(), b"535 5.7.8 Wrong: " + words[-1] + b" " + decoded)
            asks = line.upper().startswith(b"AUTH LOGIN ")
            self.wfile.write((b"334 UGFzc3dvcmQ6" if asks else said) + b"\r\n")


class Echo(socketserver.StreamRequestHandler):
    """A web server that gives access tokens at /good, and else repeats what it was sent with a 403."""

    def handle(self) -> None:
        head = b"".join(iter(self.rfile.readline, b"\r\n"))
        length = re.search(rb"(?i)content-length: (\d+)", head)
        status, answer = b"403 Forbidden", head + self.rfile.read(int(length[1]) if length else 0)
        if head.startswith(b"POST /good "):
            status, answer = b"200 OK", b'{"access_token": "s3cret-access", "expires_in": 60}'
        self.wfile.write(b"HTTP/1.0 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(answer), answer))


@contextlib.contextmanager
def serving(handler: type[socketserver.BaseRequestHandler]) -> Iterator[int]:
    """A server on threads of its own; yields its port."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True  # a browser may keep a connection on which it never asks
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


BY_VALUE = (
    "s3cret-default", "s3cret-added", "s3cret-refresh", "s3cret-sync-url", "s3cret-token-1", "s3cret-token-2",
    "s3cret-guess", "s3cret-reload", "s3cret-s3-key", "s3cret-url", "s3cret-access",
)  # fmt: skip
BY_REFERENCE = ("s3cret-env", "s3cret-file", "s3cret-client", "s3cret-webhook", "s3cret-sync")


def secrets_in(text: str) -> set[str]:
    """Those that are there, as they are or as logins encode them."""
    forms = {
        secret: (secret.encode(), *map(base64.b64encode, (secret.encode(), b"\0me\0" + secret.encode())))
        for secret in BY_VALUE + BY_REFERENCE
    }
    return {secret for secret, encoded in forms.items() if any(form.decode() in text for form in encoded)}


def secretive_config(folder: Path, smtp_port: int, http_port: int) -> dict[str, dict[str, object]]:
    """Secrets everywhere: by value, from the environment, from a file."""
    (folder / "secret").write_text("s3cret-file\n")
    (folder / "webhook").write_text("whsec_" + base64.b64encode(b"s3cret-webhook").decode() + "\n")
    oauth2 = {"auth": "xoauth2", "user": "me", "oauth2_client_id": "id", "host": "127.0.0.1", "port": smtp_port}
    refreshed = {**oauth2, "oauth2_client_secret": "env:CLIENT_SECRET", "oauth2_refresh_token": "s3cret-refresh"}
    plain = {"host": "127.0.0.1", "port": smtp_port, "user": "me"}
    sync = {"client_sync_user": "me", "client_sync_password": "env:SYNC_PASSWORD"}
    sync["client_sync_secret"] = f"file:{folder}/webhook"
    return {
        "server": {"api_token": "s3cret-token-1, s3cret-token-2"},
        "smtp": {**plain, "password": "s3cret-default", "auth": "plain"},
        "account:env": {**plain, "password": "env:PASSWORD", "auth": "login"},
        "account:file": {**plain, "password": f"file:{folder}/secret"},
        "account:refused": {**refreshed, "oauth2_token_url": f"http://127.0.0.1:{http_port}/bad"},
        "account:granted": {**refreshed, "oauth2_token_url": f"http://127.0.0.1:{http_port}/good"},
        "account:nowhere": {**plain, "password": "env:NOT_THERE"},
        "client": {"client_sync_url": f"http://127.0.0.1:{http_port}/sync", **sync},
        "attachments": {"allow_hosts": "127.0.0.1"},
        "s3": {"access_key_id": "AKIA", "secret_access_key": "s3cret-s3-key", "region": "eu-west-1"},
        "delivery": {"max_retries": 1, "retry_delays": 1},
        "logging": {"level": "debug", "delivery_activity": "true"},
    }


SECRET_ENVIRONMENT = {"PASSWORD": "s3cret-env", "CLIENT_SECRET": "s3cret-client", "SYNC_PASSWORD": "s3cret-sync"}


def provoke_failures(daemon: Daemon, smtp_port: int, http_port: int) -> None:
    """Everything that may fail with a secret in its hands."""
    added = {"id": "added", "host": "127.0.0.1", "port": smtp_port, "user": "me", "password": "s3cret-added"}
    assert daemon.post("/account", added).status == 200
    assert daemon.post("/account", {**added, "port": 0}).status == 400
    assert daemon.post("/account", json.dumps(added).encode()[:-1]).status == 400
    accounts = ("default", "added", "env", "file", "refused", "granted", "nowhere")
    daemon.submit(*[mail(account_id, account_id=account_id) for account_id in accounts])
    url = f"http://me:s3cret-url@127.0.0.1:{http_port}/file"
    s3 = {"bucket": "bucket", "key": "k", "endpoint": f"http://127.0.0.1:{http_port}"}
    sources: list[dict[str, object]] = [{"url": url}, {"url": url.replace(str(http_port), "1")}, {"s3": s3}]
    daemon.submit(*[mail(f"at-{n}", attachments=[{"filename": "f", **source}]) for n, source in enumerate(sources)])
    for headers in ({"X-API-Token": "s3cret-guess"}, {"X-API-Token": "", "Authorization": "Bearer s3cret-guess"}):
        assert daemon.get("/status", headers=headers).status == 401
    states = dict.fromkeys(accounts, "cooling")
    wait_until(lambda: {id_: state_of(daemon, id_) for id_ in accounts} == states, "the refusals")
    wait_until(lambda: daemon.log.count("report") > 1, "a refused report")
    daemon.config["account:broken"] = {"host": "h", "port": "0", "password": "s3cret-reload"}
    daemon.write_config()
    daemon.signal(signal.SIGHUP)
    daemon.wait_for_log("not reloaded")
    del daemon.config["account:broken"]
    daemon.write_config()


def test_no_secret_is_in_anything_that_is_written_or_answered(tmp_path: Path) -> None:
    with serving(Parrot) as smtp_port, serving(Echo) as http_port:
        config = secretive_config(tmp_path, smtp_port, http_port)
        with Daemon(tmp_path, config, environment=SECRET_ENVIRONMENT, within=["env"]) as daemon:
            daemon.token = "s3cret-token-2"
            provoke_failures(daemon, smtp_port, http_port)
            paths = ("/status", "/accounts", "/metrics", "/openapi.json", "/health", "/ready")
            shown = {path: daemon.get(path).content.decode() for path in paths}
            listed_ids = [record["id"] for record in daemon.get("/messages").json["messages"]]
            records = [daemon.get(f"/message/{id_}").json for id_ in listed_ids]
            for record in records:
                record["message"].pop("message")  # as the client itself wrote it
            shown["/messages"] = json.dumps(records)
            with contextlib.closing(sqlite3.connect(str(daemon.config["storage"]["db_path"]))) as db, db:
                (seq,) = db.execute("SELECT seq FROM messages WHERE id = 'file'").fetchone()
                db.execute("UPDATE attempts SET text = CAST('s3cret-added' AS BLOB) WHERE seq = ?", (seq,))
                db.execute("UPDATE messages SET payload = '{\"s3cret-added' WHERE id = 'file'")  # our own code raises
            assert daemon.get("/message/file").status == 500
            assert daemon.process
            shown["cmdline"] = Path(f"/proc/{daemon.process.pid}/cmdline").read_text()
            for options in ((), ("--connect",)):
                words = ("check", "--config", tmp_path / "config.ini", *options)
                checked = run_command(*words, folder=tmp_path, environment=SECRET_ENVIRONMENT)
                shown[f"check {options}"] = checked.stdout + checked.stderr
                assert "refused" in checked.stdout
        shown["log"] = daemon.log
        stored = b"".join(path.read_bytes() for path in tmp_path.glob("queue.db*")).decode("latin-1")

    for account_id in ("default", "added", "env", "file", "granted"):
        assert re.search(rf"account={account_id} .*Wrong: .*\*\*\*", shown["log"]), account_id
    assert "Traceback" in shown["log"]
    assert {place: secrets_in(text) for place, text in shown.items()} == {place: set() for place in shown}
    assert secrets_in(stored) & set(BY_REFERENCE) == set()
    assert "s3cret-added" in stored  # by value: in the 0600 file, as the README says


# -- TLS and the Unix socket


@contextlib.contextmanager
def listening_daemon(folder: Path, **server: object) -> Iterator[None]:
    """The real daemon, wherever it listens."""
    lines = ["[scheduler]", "active = false", "[smtp]", "host = h", "port = 25", "[server]"]
    lines += [f"{key} = {value}" for key, value in server.items()]
    (folder / "config.ini").write_text("\n".join(lines))
    with running("serve", cwd=folder) as daemon:
        assert any("mailproxy listens" in line for line in daemon.stderr or ())
        yield
        daemon.terminate()
        assert daemon.wait(20) == 0


def asked(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None, token: str = "") -> Any:
    content = None if body is None else json.dumps(body)
    connection.request(method, path, content, {"X-API-Token": token} if token else {})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_over_tls_the_api_is_the_same_and_without_it_there_is_no_answer(tmp_path: Path, ca: PrivateCA) -> None:
    certificate, port = ca.good(), free_port()
    files = {"tls_cert": certificate.cert, "tls_key": certificate.key}
    with listening_daemon(tmp_path, port=port, api_token="t0ken", **files):
        trusting = ssl.create_default_context(cafile=ca.ca_file)
        with contextlib.closing(http.client.HTTPSConnection("localhost", port, timeout=10, context=trusting)) as line:
            assert asked(line, "GET", "/health")[0] == 200
            assert asked(line, "GET", "/status")[0] == 401
            assert asked(line, "POST", "/commands/add-messages", {"messages": [mail()]}, "t0ken")[1]["queued"] == 1
            assert line.sock.version() in ("TLSv1.2", "TLSv1.3")
        with socket.create_connection(("127.0.0.1", port), 10) as plain:
            plain.sendall(HEALTH)
            assert b"HTTP/1.1" not in plain.recv(4096)
        with socket.create_connection(("127.0.0.1", port), 10) as stranger, pytest.raises(ssl.SSLCertVerificationError):
            ssl.create_default_context().wrap_socket(stranger, server_hostname="localhost")


def test_over_a_unix_socket_the_api_is_the_same_for_those_the_mode_lets_in(tmp_path: Path) -> None:
    path = tmp_path / "mailproxy.sock"
    with listening_daemon(tmp_path, unix_socket=path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with contextlib.closing(http.client.HTTPConnection("localhost", timeout=10)) as line:
            line.sock = socket.socket(socket.AF_UNIX)
            line.sock.connect(str(path))
            assert asked(line, "POST", "/commands/add-messages", {"messages": [mail()]})[1]["queued"] == 1
            assert asked(line, "GET", "/status")[1]["pending"] == 1
    assert not path.exists()


def test_any_local_user_may_submit_on_the_submit_socket_and_nothing_else() -> None:
    needs("root", "curl")

    def sent_by_nobody(path: str, *arguments: str) -> tuple[int, Any]:
        command = [
            "curl",
            "-sS",
            "-w",
            " %{http_code}",
            "--unix-socket",
            str(submit),
            f"http://localhost{path}",
            *arguments,
        ]
        run = subprocess.run(command, user="nobody", capture_output=True, text=True, timeout=30)
        content, _, status = run.stdout.rpartition(" ")
        return int(status), json.loads(content) if content else run.stderr

    with open_folder("mailproxy-submit-") as folder:
        submit, api = folder / "submit.sock", folder / "api.sock"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(submit))
        with listening_daemon(folder, unix_socket=api, api_token="t0ken", submit_socket=submit):
            assert (stat.S_IMODE(submit.stat().st_mode), stat.S_IMODE(api.stat().st_mode)) == (0o666, 0o660)
            submission = json.dumps({"messages": [mail("by-nobody"), mail("", "x")]})
            status, answer = sent_by_nobody("/commands/add-messages", "-d", submission)
            assert (status, answer["queued"], len(answer["rejected"])) == (200, 1, 1)
            assert sent_by_nobody("/commands/add-messages", "-d", "{")[0] == 400
            for path in ("/", "/health", "/status", "/messages", "/message/by-nobody", "/accounts", "/metrics"):
                assert sent_by_nobody(path)[0] == 404, path
            for path in ("run-now", "suspend", "delete-messages", "retry-messages", "../commands/activate"):
                assert sent_by_nobody(f"/commands/{path}", "-d", '{"ids": ["by-nobody"]}')[0] == 404, path
            other = ("--port", "0", "--set", f"server.submit_socket={submit}")
            with open_folder("mailproxy-second-") as elsewhere, running("serve", *other, cwd=elsewhere) as second:
                assert second.wait(20) == 2
                assert f"cannot listen on {submit}: another process listens there" in second.stderr.read()
            submit.rename(folder / "moved.sock")  # as one that takes its place would do
            with socket.socket(socket.AF_UNIX) as living:
                living.bind(str(submit))
                living.listen()
                assert sent_by_nobody("/status")[0] == 0
        assert (submit.exists(), api.exists()) == (True, False)


# ======================================================================
# THE MAIN JOB - hundreds of messages of mixed kinds through a real Postfix
# ======================================================================
#
# REST in, queue, SMTP over STARTTLS, a mailbox, reports back: every message
# arrives once for each recipient, as it was asked, and is reported once.

_MANY = 300  # each subject with each priority and each kind, and some more
_PER_BATCH = 50
_PRIORITIES = [0, 1, 2, 3, "immediate", "high", "medium", "low"]
_SUBJECTS = [
    "Invoice",
    "Ваш заказ готов",
    "請求書 🧾",
    "A subject of ASCII words that is longer than a line of seventy-eight characters may be, number",
    "Größenänderungsgenehmigungsverfahrensübersicht und mehr davon, damit es sich über Zeilen zieht:",
]
_TEXTS = [
    "Hello,\n\nthis is plain.\n",
    ".\n..\n.leading dots\n\n.\n",
    "Grüße aus Zürich, 日本語 and 🦆\n",
    "From here on: trailing blanks   \n\ttabs\t\n=3D is not an equals sign\n-- \nsigned\n",
    "one line of two thousand characters: " + "x" * 2_000 + "\n",
]


class Case(NamedTuple):
    """A message to submit, and what must come of it."""

    submission: dict[str, Any]
    recipients: list[str]
    check: Callable[[Delivered], None]


def cases() -> list[Case]:
    """Seven kinds in turn, every fiftieth with 1 MB attached instead, some of them scheduled."""
    kinds = [plain, html, both, with_file, several_recipients, raw, odd_text]
    made = [with_file(n, 1_000_000) if n % 50 == 7 else kinds[n % len(kinds)](n) for n in range(_MANY)]
    for case in made[::50]:
        case.submission["deferred_ts"] = int(time.time()) + 3
    return made


def base(n: int, **fields: Any) -> dict[str, Any]:
    """What all of them have: an id that shows in a header, a priority in either spelling, a UTF-8 subject."""
    return {
        "id": f"case/{n}", "from": "Zoë Müller <sender@origin.example>", "to": [f"c{n}@one.example"],
        "subject": f"{_SUBJECTS[n % len(_SUBJECTS)]} {n}", "priority": _PRIORITIES[n % len(_PRIORITIES)],
        "headers": {"X-Case": f"case/{n}"}, "batch_code": f"batch {n // _PER_BATCH}", **fields,
    }  # fmt: skip


def plain(n: int) -> Case:
    text = _TEXTS[n % len(_TEXTS)]
    return _case(base(n, body=text), lambda copy: _has_text(copy, "plain", text))


def html(n: int) -> Case:
    text = f"<p>Größe {n}</p>\n<pre>.\n</pre>\n"
    return _case(base(n, body=text, content_type="html"), lambda copy: _has_text(copy, "html", text))


def both(n: int) -> Case:
    text, rich = f"plain {n} ü\n", f"<b>rich {n} ü</b>\n"

    def check(copy: Delivered) -> None:
        assert copy.message.get_content_type() == "multipart/alternative"
        _has_text(copy, "plain", text)
        _has_text(copy, "html", rich)

    return _case(base(n, text=text, html=rich), check)


def odd_text(n: int) -> Case:
    """An empty subject over an empty body."""
    return _case(base(n, subject="", body=""), lambda copy: _has_text(copy, "plain", ""))


def with_file(n: int, size_bytes: int = 10_000) -> Case:
    filename, content, text = f"Überblick {n}.bin", random.Random(n).randbytes(size_bytes), f"See {n}\n"

    def check(copy: Delivered) -> None:
        [attached] = list(copy.message.iter_attachments())
        assert (attached.get_filename(), attached.get_content_type()) == (filename, "application/octet-stream")
        assert attached.get_payload(decode=True) == content
        _has_text(copy, "plain", text)

    attachments = [{"filename": filename, "content": base64.b64encode(content).decode()}]
    return _case(base(n, body=text, attachments=attachments), check)


def several_recipients(n: int) -> Case:
    """To, Cc and Bcc, one of them twice: one copy each, and nobody sees the Bcc."""
    people = {
        "to": [f"Ann <a{n}@one.example>", f"b{n}@two.example"],
        "cc": f"c{n}@one.example, Ärger <d{n}@three.example>",
        "bcc": [f"secret{n}@four.example", f"a{n}@one.example"],
    }

    def check(copy: Delivered) -> None:
        shown = [[one.addr_spec for one in copy.message[name].addresses] for name in ("To", "Cc")]
        assert shown == [[f"a{n}@one.example", f"b{n}@two.example"], [f"c{n}@one.example", f"d{n}@three.example"]]
        assert f"secret{n}@".encode() not in copy.content
        _has_text(copy, "plain", "to you all\n")

    everyone = [f"a{n}@one.example", f"b{n}@two.example", f"c{n}@one.example", f"d{n}@three.example"]
    return _case(base(n, body="to you all\n", **people), check, [*everyone, f"secret{n}@four.example"])


def raw(n: int) -> Case:
    """A message the client composed by itself: byte for byte, but for its Bcc."""
    head = f"Date: Mon, 1 Jun 2026 10:00:00 +0200\nMessage-ID: <raw-{n}@origin.example>\nX-Case: case/{n}\n"
    rest = f"From: sender@origin.example\nTo: c{n}@one.example\nSubject: raw\n  {n}\n\n.\n..x\nend  \n"
    given = f"{head}Bcc: secret@four.example,\n other@four.example\n{rest}".encode()

    def check(copy: Delivered) -> None:
        assert copy.content == (head + rest).encode()

    fields = {"from": "sender@origin.example", "to": f"c{n}@one.example", "raw": base64.b64encode(given).decode()}
    submission = {name: value for name, value in base(n, **fields).items() if name not in ("subject", "headers")}
    return Case(submission, [f"c{n}@one.example"], check)


def _case(submission: dict[str, Any], check: Callable[[Delivered], None], recipients: list[str] | None = None) -> Case:
    """A composed message: its own check, and what holds for all of them."""

    def check_all(copy: Delivered) -> None:
        message = copy.message
        assert message["Subject"] == submission["subject"]
        assert [str(address) for address in message["From"].addresses] == ["Zoë Müller <sender@origin.example>"]
        assert message["Date"]
        assert message["Message-ID"]
        check(copy)

    return Case(submission, recipients or submission["to"], check_all)


def _has_text(copy: Delivered, subtype: str, text: str) -> None:
    """The body of that kind is the text, whatever its line ends look like inside base64."""
    part = copy.message.get_body((subtype,))
    assert part
    assert part.get_content().replace("\r\n", "\n") in ({text} if text else {"", "\n"})


@pytest.mark.timeout(150)
def test_hundreds_of_messages_of_mixed_kinds_reach_their_mailboxes_once_as_asked_and_are_reported_once(
    tmp_path: Path, ca: PrivateCA, reports: ReportReceiver
) -> None:
    Postfix.needed()
    tls = {"start_tls": "required", "ca_file": ca.ca_file, "max_connections": 8}
    with (
        Postfix(certificate=ca.good()) as postfix,
        Daemon(tmp_path, {"smtp": tls}, smtp=postfix, reports=reports) as daemon,
    ):
        asked = {str(case.submission["id"]): case for case in cases()}
        submissions = [case.submission for case in asked.values()]
        for start in range(0, _MANY, _PER_BATCH):
            daemon.submit(*submissions[start : start + _PER_BATCH])

        reports.wait_for(lambda r: len(r.acknowledged) >= _MANY, 60)
        copies = postfix.wait_for(sum(len(case.recipients) for case in asked.values()))
        assert postfix.log.count(": client=") == _MANY  # transactions: no second copy is still under way
        assert (daemon.status()["pending"], daemon.status()["unreported"]) == (0, 0)

    arrived = Counter((copy.message["X-Case"], copy.recipient) for copy in copies)
    assert arrived == Counter((id_, recipient) for id_, case in asked.items() for recipient in case.recipients)
    for copy in copies:
        asked[copy.message["X-Case"]].check(copy)
        assert copy.trace["Return-Path"] == "<sender@origin.example>"
        assert "using TLS" in copy.trace["Received"]
        assert "Bcc" not in copy.message

    message_ids = {copy.message["X-Case"]: copy.message["Message-ID"].strip("<>") for copy in copies}
    assert Counter((entry["id"], entry["status"]) for entry in reports.entries) == Counter(
        (id_, "sent") for id_ in asked
    )
    for entry in reports.acknowledged:
        submission = asked[entry["id"]].submission
        assert (entry["error"], entry["attempts"], entry["account_id"]) == (None, 1, "default")
        assert entry["batch_code"] == submission["batch_code"]
        assert entry["message_id"].strip("<>") == message_ids[entry["id"]]
        assert entry["sent_ts"] >= submission.get("deferred_ts", 0)


def test_postfix_takes_mail_after_a_login_whose_password_is_not_ascii(
    tmp_path: Path, ca: PrivateCA, reports: ReportReceiver
) -> None:
    Postfix.needed(with_users=True)
    account = {"user": "relay", "password": "pässwörd 密", "use_tls": "true", "ca_file": ca.ca_file}
    with (
        Postfix(certificate=ca.good(), users={"relay": "pässwörd 密"}) as postfix,
        Daemon(tmp_path, {"smtp": account}, smtp=postfix, reports=reports) as daemon,
    ):
        case = plain(0)
        daemon.submit(case.submission)

        reports.wait_for_entry("case/0", "sent")
        [copy] = postfix.wait_for(1)
        case.check(copy)
        assert "sasl_username=relay" in postfix.log


# ======================================================================
# DEPLOY - the unit, the container, what Prometheus and Grafana are told
# ======================================================================

DEPLOY = PROGRAM.with_name("deploy")
ALERTS = DEPLOY / "alerts.yml"


# -- the unit, as far as it can be shown without systemd


def unit_lines(key: str) -> list[str]:
    """What mailproxy.service says of a key, line by line; nothing where it is not there."""
    lines = (DEPLOY / "mailproxy.service").read_text().splitlines()
    return [line.removeprefix(f"{key}=") for line in lines if line.startswith(f"{key}=")]


def test_systemd_finds_nothing_wrong_with_the_unit_and_it_gives_a_stop_time_enough(tmp_path: Path) -> None:
    (stop,) = unit_lines("TimeoutStopSec")
    (most,) = (row.default for row in mailproxy.SETTINGS_TABLE if row.key == "shutdown_timeout_seconds")
    assert int(stop.removesuffix("s")) >= float(most) + 15
    text = (DEPLOY / "mailproxy.service").read_text()
    (tmp_path / "config.ini").write_text(re.search(r"(?ms)<<'END'$(.*?)^#     END$", text)[1].replace("#     ", ""))
    settings = mailproxy.read_settings(str(tmp_path / "config.ini"), {}, {})
    assert settings.server.submit_socket.startswith("/run/mailproxy/")
    assert settings.sendmail.spool.startswith("/var/lib/mailproxy/")
    assert unit_lines("RuntimeDirectoryMode") == unit_lines("StateDirectoryMode") == ["0711"]

    needs("systemd-analyze")
    unit = tmp_path / "mailproxy.service"
    unit.write_text(text.replace("=/usr/bin/python3 ", f"={sys.executable} "))  # systemd looks for it
    security = ["security", "--offline=true", "--threshold=15", "--no-pager"]  # the exposure level is 1.5 at most
    for judge_it, is_silent in [(["verify", "--man=no", "--recursive-errors=yes"], True), (security, False)]:
        judged = subprocess.run(["systemd-analyze", *judge_it, unit], capture_output=True, text=True, timeout=30)
        assert (judged.returncode, judged.stderr) == (0, ""), judged.stdout
        assert (judged.stdout == "") == is_silent


SYSCALL_FILTER = '''\
"""Runs a command under a seccomp filter, by the rules of systemd.exec(5): filter.py SPECIFICATION COMMAND ..."""
import ctypes, errno, json, os, sys

specification = json.load(open(sys.argv[1]))
library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
library.seccomp_init.restype = ctypes.c_void_p
ALLOW, REFUSE, MASKED_EQUAL, EQUAL = 0x7FFF0000, 0x00050000, 7, 4
NAMESPACES, EXECUTE, SETID = 0x7E020080, 4, 0o6000


class Comparison(ctypes.Structure):
    _fields_ = [("argument", ctypes.c_uint), ("operator", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


def rule(action, name, *comparisons):
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number >= 0:  # else it is not on this machine
        array = (Comparison * len(comparisons))(*comparisons)
        failed = library.seccomp_rule_add_array(context, action, number, len(comparisons), array)
        assert failed == 0, (name, failed)


def none_of(argument, bits):
    return [[Comparison(argument, MASKED_EQUAL, bits, 0)]]


context = ctypes.c_void_p(library.seccomp_init(REFUSE | errno.EPERM))
special = {
    "socket": [[Comparison(0, EQUAL, family, 0)] for family in specification["families"]],
    "clone": none_of(0, NAMESPACES), "unshare": none_of(0, NAMESPACES), "setns": [],
    "mmap": [[Comparison(2, MASKED_EQUAL, 6, bits)] for bits in (0, 2, 4)],
    **dict.fromkeys(("mprotect", "pkey_mprotect"), none_of(2, EXECUTE)), "shmat": none_of(2, 0o100000),
    "personality": [[Comparison(0, EQUAL, 0xFFFFFFFF, 0)]],
    **dict.fromkeys(("chmod", "fchmod", "mkdir", "mknod"), none_of(1, SETID)),
    **dict.fromkeys(("fchmodat", "mkdirat", "mknodat"), none_of(2, SETID)),
}
rule(REFUSE | errno.ENOSYS, "clone3")
for name in set(specification["calls"]) - {"clone3"}:
    for comparisons in special.get(name, [[]]):
        rule(ALLOW, name, *comparisons)
assert library.seccomp_load(context) == 0
os.execv(sys.argv[2], sys.argv[2:])
'''

# The root is read-only, with nothing in it but the system, the program, the state and the credentials.
SANDBOX = """
set -eu
root=$1 given=$2; shift 2
mount -t tmpfs -o mode=0755 tmpfs "$root"
cd "$root"
mkdir -p usr proc dev etc opt/mailproxy run/notify var/lib/mailproxy tmp
chmod 1777 tmp
cp -a /bin /sbin /lib* .
mount --bind -o ro /usr usr
mount -t proc -o hidepid=invisible proc proc
for device in null zero random urandom; do
    : >dev/$device
    mount --bind /dev/$device dev/$device
done
for name in hosts nsswitch.conf resolv.conf ld.so.cache ssl python3 python3.11 python3.12 python3.13; do
    if [ -e /etc/$name ]; then cp -aL /etc/$name etc/; fi
done
cp -a "$given/etc-mailproxy" etc/mailproxy
cp -a "$given/credentials" run/credentials
cp "$given/mailproxy.pyz" opt/mailproxy/
cp "$given/filter.py" "$given/filter.json" opt/
mount --bind "$given/state" var/lib/mailproxy
mount --bind "$given/notify" run/notify
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -o remount,ro "$root"
exec chroot "$root" "$@"
"""
NOBODY = 61_184  # the first of systemd's dynamic users; no name, no home, no group
SPECIFIERS = {"%d": "/run/credentials/mailproxy.service", "%S": "/var/lib", "%t": "/run"}


class ConfinedDaemon(Daemon):
    """The daemon as the unit starts it: its ExecStart, its environment and credentials, and what it may do.

    A private root for ProtectSystem and its kin, setpriv for DynamicUser and NoNewPrivileges, libseccomp for
    SystemCallFilter, RestrictAddressFamilies, RestrictNamespaces, MemoryDenyWriteExecute and the like.
    """

    def __init__(self, folder: Path, config: dict[str, dict[str, object]], secrets: Mapping[str, str]) -> None:
        super().__init__(folder, config, token=secrets["api_token"])
        self.config["storage"]["db_path"] = "/var/lib/mailproxy/mailproxy.db"
        self.config["server"]["api_token"] = "file:/etc/mailproxy/api_token"
        for name in ("root", "notify", "state", "etc-mailproxy", "credentials/mailproxy.service"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / "state").chmod(0o700)
        os.chown(self.folder / "state", NOBODY, NOBODY)
        for line in unit_lines("LoadCredential"):
            name, path = line.split(":")
            assert Path(path).parent == Path("/etc/mailproxy")
            original = self.folder / "etc-mailproxy" / Path(path).name
            copy = self.folder / "credentials" / "mailproxy.service" / name
            for file in (original, copy):
                file.write_text(secrets[name] + "\n")
                file.chmod(0o400)
            os.chown(copy, NOBODY, NOBODY)
        self.told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.told.settimeout(30)
        self.told.bind(str(self.folder / "notify" / "socket"))
        (self.folder / "notify" / "socket").chmod(0o777)
        with zipfile.ZipFile(self.folder / "mailproxy.pyz", "w") as archive:
            archive.write(PROGRAM, "mailproxy.py")
            archive.writestr("__main__.py", "import sys, mailproxy\nsys.exit(mailproxy.main())\n")
            for package in (aiosmtplib, prometheus_client):
                sources = Path(package.__file__).parent
                for source in sources.rglob("*.py"):
                    archive.write(source, source.relative_to(sources.parent).as_posix())
        (self.folder / "filter.py").write_text(SYSCALL_FILTER)
        (families,) = unit_lines("RestrictAddressFamilies")
        calls: set[str] = set()
        for line in unit_lines("SystemCallFilter"):
            named = calls_of(line.removeprefix("~").split())
            calls = calls - named if line.startswith("~") else calls | named
        numbers = [int(getattr(socket, family)) for family in families.split()]
        (self.folder / "filter.json").write_text(json.dumps({"calls": sorted(calls), "families": numbers}))

    def start(self, timeout: float = 30) -> None:
        self.write_config()
        shutil.copy(self.folder / "config.ini", self.folder / "etc-mailproxy" / "config.ini")
        self._log_starts_at = 0
        (program,) = unit_lines("ExecStart")
        with self._log_file.open("ab") as log:
            self.process = subprocess.Popen(self.command(*program.split()), stdout=log, stderr=log)
        self.port = wait_until(self._port_in_log, "the daemon's address in its log", timeout)

    def wait_for_word(self, word: str) -> None:
        """Wait until systemd would have been told this."""
        while word not in self.told.recv(4096).decode().split("\n"):
            pass

    def command(self, *program: str) -> list[str]:
        """The program in the sandbox of the unit, with the environment that systemd sets and nothing else."""
        (limit,) = unit_lines("LimitNOFILE")
        given = [str(self.folder / "root"), str(self.folder)]
        said = unit_lines("Environment")
        for specifier, value in SPECIFIERS.items():
            said = [line.replace(specifier, value) for line in said]
        assert not any("%" in line for line in said)
        watched = ["NOTIFY_SOCKET=/run/notify/socket", "WATCHDOG_USEC=1000000", "PATH=/usr/bin:/bin", "LANG=C.UTF-8"]
        confined = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
        confined += ["--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
        return [
            *["unshare", "--mount", "--propagation=private", "sh", "-c", SANDBOX, "sh", *given],
            *["env", "-i", "--chdir=/var/lib/mailproxy", *said, *watched],
            *["prlimit", f"--nofile={limit}", "--core=0", *confined],
            *["/usr/bin/python3", "-I", "/opt/filter.py", "/opt/filter.json", *program],
        ]


def calls_of(names: list[str]) -> set[str]:
    """The system calls of these names, groups (@...) taken apart as this systemd knows them."""
    calls = {name for name in names if not name.startswith("@")}
    for group in set(names) - calls:
        asked = ["systemd-analyze", "syscall-filter", "--no-pager", group]
        listed = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout
        members = [line.strip() for line in listed.splitlines()[1:]]
        calls |= calls_of([member for member in members if member and not member.startswith("#")])
    return calls


PROBES = {  # what a program of the unit may do, and what not
    'open("/opt/mailproxy/new", "w")': "EROFS",
    'open("/etc/mailproxy/api_token")': "EACCES",
    'open("/run/credentials/mailproxy.service/api_token")': "allowed",
    'open("/var/lib/mailproxy/new", "w")': "allowed",
    "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)": "EPERM",
    "socket.socket(socket.AF_INET6)": "allowed",
    "os.setuid(0)": "EPERM",
    'os.chown("/var/lib/mailproxy/new", 0, 0)': "EPERM",
    'os.chmod("/var/lib/mailproxy/new", 0o4755)': "EPERM",
    "mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)": "EPERM",
    "mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE)": "allowed",
}
PROBE = """
import errno, json, mmap, os, socket, sys
outcomes = {}
for expression in sys.argv[1:]:
    try:
        eval(expression)
        outcomes[expression] = "allowed"
    except OSError as error:
        outcomes[expression] = errno.errorcode[error.errno]
print(json.dumps(outcomes))
"""


def test_the_daemon_runs_well_under_the_restrictions_of_its_unit(ca: PrivateCA, reports: ReportReceiver) -> None:
    needs("systemd-analyze", "unshare", "setpriv", "prlimit", "/usr/bin/python3")
    new_enough = ["/usr/bin/python3", "-c", "import sys; sys.exit(sys.version_info < (3, 11))"]
    for asked, what in [(["unshare", "--mount", "true"], "mount namespaces"), (new_enough, "Python 3.11 in /usr/bin")]:
        if os.geteuid() != 0 or subprocess.run(asked, capture_output=True, timeout=10).returncode:
            pytest.skip(f"needs root and {what}")
    with (
        open_folder("mailproxy-confined-") as folder,
        SmtpServer(certificate=ca.good(), accounts={"me": "s3cret"}) as smtp,
    ):
        account = {"host": "localhost", "port": smtp.port, "user": "me", "start_tls": "required"}
        account["ca_file"] = "/etc/mailproxy/ca.pem"
        config: dict[str, dict[str, object]] = {"smtp": account, "client": {"client_sync_url": reports.url}}
        config |= {"server": {"submit_socket": "/var/lib/mailproxy/submit"}}
        config |= {"sendmail": {"spool": "/var/lib/mailproxy/spool"}}
        daemon = ConfinedDaemon(folder, config, {"api_token": "t0ken", "smtp_password": "s3cret"})
        shutil.copy(ca.ca_file, folder / "etc-mailproxy" / "ca.pem")
        probe = daemon.command("/usr/bin/python3", "-I", "-c", PROBE, *PROBES)
        with contextlib.closing(daemon.told), daemon:
            daemon.wait_for_word("READY=1")
            daemon.wait_for_word("WATCHDOG=1")
            daemon.submit(mail("confined", body="x" * 300_000))
            modes = [(folder / "state" / name).stat().st_mode & 0o7777 for name in ("submit", "spool")]
            assert modes == [0o666, 0o1733]
            assert daemon.wait_status("confined", "sent")["error"] is None
            reports.wait_for_entry("confined", "sent")
            assert b"process_resident_memory_bytes" in daemon.get("/metrics").content
            daemon.signal(signal.SIGHUP)
            daemon.wait_for_log("configuration reloaded")
            daemon.wait_for_word("READY=1")
            daemon.signal(signal.SIGTERM)
            daemon.wait_for_word("STOPPING=1")
            assert daemon.wait_for_exit() == 0
            assert not re.search("ERROR|WARNING", daemon.log)
            queue = (folder / "state" / "mailproxy.db").stat()
            assert (queue.st_uid, queue.st_mode & 0o777) == (NOBODY, 0o600)

        probed = subprocess.run(probe, capture_output=True, text=True, timeout=20)  # whether they are in force
        assert probed.returncode == 0, probed.stderr
        assert json.loads(probed.stdout) == PROBES


# -- the container


def in_dockerfile(pattern: str) -> list[str]:
    """What a pattern finds in the Dockerfile, each instruction on one line."""
    return re.findall(pattern, (DEPLOY / "Dockerfile").read_text().replace("\\\n", " "), re.MULTILINE)


def image_environment(folder: Path) -> dict[str, str]:
    """The environment that the image sets, with a token, and the queue in a folder of the test."""
    (line,) = in_dockerfile(r"^ENV (.*)$")
    environment = dict(word.split("=", 1) for word in line.split())
    return environment | {"MAILPROXY_SERVER_API_TOKEN": "t0ken", "MAILPROXY_STORAGE_DB_PATH": str(folder / "queue.db")}


def service_links(service: str) -> dict[str, str]:
    """What Kubernetes tells every container of a namespace about a Service of it, by the environment."""
    name, protocols = service.upper().replace("-", "_"), {"HTTP": ("TCP", 8000), "DNS": ("UDP", 53)}
    links = {f"{name}_SERVICE_HOST": "10.0.0.1", f"{name}_SERVICE_PORT": "8000", f"{name}_PORT": "tcp://10.0.0.1:8000"}
    for port_name, (protocol, port) in protocols.items():
        address = f"{name}_PORT_{port}_{protocol}"
        links |= {f"{name}_SERVICE_PORT_{port_name}": str(port), address: f"{protocol.lower()}://10.0.0.1:{port}"}
        links |= {f"{address}_PROTO": protocol.lower(), f"{address}_PORT": str(port), f"{address}_ADDR": "10.0.0.1"}
    return links


def test_the_container_has_a_configuration_and_copies_files_that_are_there(tmp_path: Path) -> None:
    checked = run_command("check", folder=tmp_path, environment=image_environment(tmp_path))
    assert checked.returncode == 0, checked.stderr
    assert "matches no setting" not in checked.stdout + checked.stderr

    (copied,) = in_dockerfile(r"^COPY (?!--from)(.*) \./$")
    assert [name for name in copied.split() if not PROGRAM.with_name(name).exists()] == []
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().split()
    assert ignored == ["*", *(f"!{name}" for name in copied.split())]


@pytest.mark.parametrize("service", ["mailproxy", "mailproxy-server", "mailproxy-smtp"])
def test_the_daemon_starts_beside_a_kubernetes_service_of_its_name(tmp_path: Path, service: str) -> None:
    given = image_environment(tmp_path) | {"MAILPROXY_SMTP_HOST": "mail.example.com"} | service_links(service)
    settings = mailproxy.load_settings(os.devnull, given, {})
    assert (settings.server.port, settings.warnings) == (8000, ())
    assert settings.accounts == {"default": {"host": "mail.example.com"}}

    given |= {"MAILPROXY_SERVER_PORT": "8025", "MAILPROXY_SMTP_PORT": "587"}  # the pod's own words win over such links
    settings = mailproxy.load_settings(os.devnull, given, {})
    assert (settings.server.port, settings.accounts["default"]["port"]) == (8025, "587")


@pytest.mark.parametrize("listens", ["http", "https", "unix"])
def test_the_health_check_of_the_container_says_whether_the_daemon_is_ready_however_it_listens(
    tmp_path: Path, ca: PrivateCA, listens: str
) -> None:
    (check,) = in_dockerfile(r"^HEALTHCHECK .* CMD (\[.*\])$")
    program, *command = json.loads(check)
    assert [program] == json.loads(*in_dockerfile(r"^ENTRYPOINT (.*)$"))
    said = {"MAILPROXY_SERVER_PORT": str(free_port()), "MAILPROXY_CONFIG": str(tmp_path / "config.ini")}
    environment = {**_plain_environment(), **image_environment(tmp_path), **said, "http_proxy": "http://127.0.0.1:9"}
    server = {"http": "", "https": "tls_cert = {0.cert}\ntls_key = {0.key}", "unix": f"unix_socket = {tmp_path}/socket"}
    (tmp_path / "config.ini").write_text(f"[server]\n{server[listens]}\n".format(ca.good()))

    with running("serve", env=environment, cwd=tmp_path) as daemon:
        assert daemon.stderr
        assert listens in next(line for line in daemon.stderr if "mailproxy listens" in line)
        well = run_command(*command, environment=environment)
    ill = run_command(*command, environment=environment)

    assert (well.returncode, well.stderr) == (0, "")
    assert ill.returncode == 1
    assert "cannot reach" in ill.sentence


def test_status_ends_with_1_while_the_daemon_answers_but_is_not_ready(tmp_path: Path) -> None:
    storage = FaultyStorage(tmp_path)
    with Daemon(tmp_path, {"smtp": NOWHERE}, environment=storage.environment) as daemon, storage.fails("full"):
        assert submitted(daemon, letter("refused")).status == 503
        ended = run_command("status", "--url", f"http://127.0.0.1:{daemon.port}")
    assert ended.returncode == 1
    assert "delivery" in ended.stdout
    assert ended.sentence.startswith("mailproxy: ")


def test_compose_starts_the_image_beside_a_prometheus_and_a_grafana_that_know_of_it(tmp_path: Path) -> None:
    composed = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    services, secrets = composed["services"], composed["secrets"]
    ours, prometheus, grafana = (services[name] for name in ("mailproxy", "prometheus", "grafana"))
    contents = {name: yaml.safe_load(config["content"]) for name, config in composed["configs"].items()}
    placed = {
        config["target"]: contents[config["source"]] for one in services.values() for config in one.get("configs", ())
    }
    mounted = [volume.split(":") for one in services.values() for volume in one["volumes"]]
    files = {target: path.removeprefix("./") for path, target, *_ in mounted if path.startswith("./")}
    assert {path for path, *_ in mounted} == {*composed["volumes"], *(f"./{file}" for file in files.values())}
    assert [file for file in files.values() if not (DEPLOY / file).exists()] == [secrets["api_token"]["file"]]
    assert ours["secrets"] == list(secrets) == ["api_token", "smtp_password"]
    assert all(port.startswith("127.0.0.1:") for one in services.values() for port in one["ports"])
    assert (DEPLOY / ours["build"]["context"] / ours["build"]["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    assert [f"queue:{target}" for target in in_dockerfile("^VOLUME (.*)$")] == ours["volumes"]
    (stop,) = unit_lines("TimeoutStopSec")
    assert ours["stop_grace_period"] == stop

    given = image_environment(tmp_path)
    for name, value in ours["environment"].items():
        named = re.fullmatch(r"\$\{(SMTP_\w+):([?-])(.*)\}", str(value))
        given[name] = value if not named else named[3] if named[2] == "-" else "a.example"
    (tmp_path / "token").write_text("t0ken")
    given["MAILPROXY_SERVER_API_TOKEN"] = given["MAILPROXY_SERVER_API_TOKEN"].replace(
        "/run/secrets/api_", f"{tmp_path}/"
    )
    settings = mailproxy.load_settings(os.devnull, given, {})
    assert settings.warnings == ()
    assert settings.accounts["default"]["password"] == "file:/run/secrets/smtp_password"

    scraping = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    scraping["scrape_configs"][0]["static_configs"] = [{"targets": [f"mailproxy:{settings.server.port}"]}]
    del scraping["alerting"]
    assert placed["/etc/prometheus/prometheus.yml"] == scraping
    assert files["/etc/prometheus/alerts.yml"] == ALERTS.name
    assert files[scraping["scrape_configs"][0]["authorization"]["credentials_file"]] == secrets["api_token"]["file"]
    assert prometheus["ports"] == ["127.0.0.1:9090:9090"]
    (source,) = placed["/etc/grafana/provisioning/datasources/mailproxy.yml"]["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = placed["/etc/grafana/provisioning/dashboards/mailproxy.yml"]["providers"]
    assert files[f"{provider['options']['path']}/mailproxy.json"] == "grafana-dashboard.json"
    assert "admin" not in grafana["environment"]["GF_SECURITY_ADMIN_PASSWORD"]


def test_the_zipapp_turns_to_the_systems_python_where_its_callers_is_too_old(tmp_path: Path) -> None:
    needs("/usr/bin/python3")
    if os.path.realpath("/usr/bin/python3") == os.path.realpath(sys.executable):
        pytest.skip("the tests run by the system's Python")
    (main,) = re.findall(r"<<'MAIN'\n(.*?)^MAIN$", PROGRAM.with_name("build_zipapp.sh").read_text(), re.S | re.M)
    (tmp_path / "sendmail").write_text("import sys; print(sys.executable, sys.flags.isolated, sys.argv, input())")
    older = f"import sys; sys.version_info = (3, 9); sys.argv = ['sendmail', '-t']; exec({main!r})"

    ended = subprocess.run([sys.executable, "-c", older], input=b"mail", cwd=tmp_path, capture_output=True)

    assert ended.stdout == b"/usr/bin/python3 1 ['sendmail', '-t'] mail\n", ended.stderr


def test_the_demo_that_is_kept_ends_at_sigterm_also_where_nobody_can_press_ctrl_c(tmp_path: Path) -> None:
    told = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-u", STARTER, "demo", "--keep"]
    environment = {**_plain_environment(), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(told, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert any("It goes on until" in line for line in process.stdout)
        process.terminate()
        assert process.wait(10) == 0
    assert list(tmp_path.iterdir()) == []


# -- Prometheus and Grafana


def promtool(*arguments: object, standard_input: bytes = b"") -> None:
    """A check by promtool that must pass."""
    needs("promtool")
    command = [found("promtool"), *map(str, arguments)]
    checked = subprocess.run(command, input=standard_input, capture_output=True, timeout=30)
    assert checked.returncode == 0, (checked.stdout + checked.stderr).decode()


def scrape_configuration(folder: Path, port: int = 8000) -> Path:
    """deploy/prometheus.yml for a daemon whose token is "t0ken", but five times a second; its alerts beside it."""
    shutil.copy(ALERTS, folder)
    (folder / "token").write_text("t0ken")
    text = (DEPLOY / "prometheus.yml").read_text()
    text = text.replace("127.0.0.1:8000", f"127.0.0.1:{port}").replace(" 15s", " 200ms")
    (folder / "prometheus.yml").write_text(text.replace("/etc/prometheus/mailproxy_token", str(folder / "token")))
    return folder / "prometheus.yml"


def test_promtool_finds_nothing_wrong_and_each_alert_fires_when_it_should_and_is_silent_when_not(
    tmp_path: Path,
) -> None:
    tested = (DEPLOY / "alerts_test.yml").read_text()
    for alert in re.findall(r"- alert: (\w+)", ALERTS.read_text()):
        assert re.search(rf"alertname: {alert}\n", tested), f"{alert} has no test in which it fires"
        assert re.search(rf"alertname: {alert},.*exp_alerts: \[\]", tested), f"{alert} is never silent"

    promtool("test", "rules", DEPLOY / "alerts_test.yml")
    promtool("check", "rules", "--lint-fatal", ALERTS)
    promtool("check", "config", scrape_configuration(tmp_path))


def test_a_real_prometheus_scrapes_the_daemon_evaluates_the_alerts_and_fills_every_panel(
    tmp_path: Path, smtp: SmtpServer, reports: ReportReceiver
) -> None:
    panels = json.loads((DEPLOY / "grafana-dashboard.json").read_text())["panels"]
    written = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    shown = [expr.replace("$__rate_interval", "1m").replace("$instance", ".*") for expr in written]
    alerts = re.sub(r"^ *(#|summary:|description:).*$", "", ALERTS.read_text(), flags=re.MULTILINE)
    used = set(re.findall(r"\b(?:mailproxy|process)_[a-z_]+", re.sub(r'"[^"]*"', "", f"{alerts} {' '.join(shown)}")))

    with Daemon(tmp_path, {"smtp": {"limit_per_minute": 1}}, smtp=smtp, reports=reports, token="t0ken") as daemon:
        for name, status in [("perm", "error"), ("temp", "deferred"), ("ok", "sent"), ("limited", "deferred")]:
            daemon.submit(mail(name, to=f"{name}@example.com"))
            reports.wait_for_entry(name, status)
        assert daemon.post("/commands/add-messages", {"messages": [{"id": "bad"}]}).status == 400
        assert daemon.get("/status", headers={"X-API-Token": "wrong"}).status == 401
        exposition = daemon.get("/metrics").content
        promtool("check", "metrics", standard_input=exposition)
        assert len(used) > 20
        assert used - set(re.findall(r"^((?:mailproxy|process)_[a-z_]+)", exposition.decode(), re.MULTILINE)) == set()

        needs("prometheus")
        port = free_port()
        command = [str(found("prometheus")), f"--config.file={scrape_configuration(tmp_path, daemon.port)}"]
        command += [f"--storage.tsdb.path={tmp_path / 'tsdb'}", f"--web.listen-address=127.0.0.1:{port}"]

        def asked(path: str, **parameters: str) -> Any:
            """The data of an answer of its HTTP interface, or None while it does not answer."""
            with contextlib.suppress(OSError):
                answer = called(port, "GET", f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
                assert answer.status in (200, 503), answer.content
                return answer.json["data"] if answer.status == 200 else None

        def results(expression: str) -> Any:
            return (asked("query", query=expression) or {}).get("result")

        with (tmp_path / "prometheus.log").open("wb") as log:
            prometheus = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            seen = 'count_over_time(mailproxy_messages_sent_total{account="default"}[1m]) >= 2'
            wait_until(lambda: results(seen), "two scrapes")
            (target,) = asked("targets")["activeTargets"]
            (group,) = asked("rules")["groups"]
            empty_panels = [expr for expr in shown if not results(expr)]
        finally:
            prometheus.kill()
            prometheus.wait(10)

    assert (target["health"], target["lastError"]) == ("up", "")
    assert [rule["name"] for rule in group["rules"]] == re.findall(r"- alert: (\w+)", ALERTS.read_text())
    assert {(rule["health"], rule["state"]) for rule in group["rules"]} == {("ok", "inactive")}
    assert empty_panels == []


# ======================================================================
# EXAMPLES - the programs in examples/, run as their readers would run them
# ======================================================================

EXAMPLES = PROGRAM.with_name("examples")
SYNC_SECRET = "whsec_dGhpcyBpcyBhIHNlY3JldCBmb3IgYSB0cnk="  # the one in the head of application.py


@contextlib.contextmanager
def example_running(command: list[Any], words: str, folder: Path, environment: Mapping[str, str]) -> Iterator[Path]:
    """A program that says these words when it is there; yields its log."""
    log = folder / "program.log"
    with log.open("wb") as output:
        program = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)
    try:
        wait_until(lambda: words in log.read_text(), f"{words!r} in its log")
        yield log
    finally:
        program.terminate()
        program.wait(10)
        print(log.read_text(), file=sys.stderr)


# -- application.py


class ExampleApplication:
    """examples/application.py: its server runs within the block. The daemon is to run with `mailproxy_config`."""

    def __init__(self, folder: Path) -> None:
        self.port, mailproxy_port = free_port(), free_port()
        client = {"client_sync_url": f"http://127.0.0.1:{self.port}/proxy_sync", "client_sync_secret": SYNC_SECRET}
        self.mailproxy_config: dict[str, dict[str, object]] = {"server": {"port": mailproxy_port}, "client": client}
        self._folder = folder
        self._command = [sys.executable, str(EXAMPLES / "application.py")]
        own = {"MAILPROXY_URL": f"http://127.0.0.1:{mailproxy_port}", "MAILPROXY_TOKEN": "t0ken"}
        own |= {"MAILPROXY_SYNC_SECRET": SYNC_SECRET, "APPLICATION_PORT": str(self.port)}
        self._environment = {**_plain_environment(), "http_proxy": "http://127.0.0.1:9", **own}

    def serve(self) -> contextlib.AbstractContextManager[Path]:
        return example_running([*self._command, "serve"], "listening", self._folder, self._environment)

    def run(self, *arguments: str) -> str:
        """What one of its commands prints."""
        asked = {"cwd": self._folder, "env": self._environment, "stdout": subprocess.PIPE, "text": True}
        return str(subprocess.run([*self._command, *arguments], timeout=30, check=True, **asked).stdout.strip())

    def send(self, recipient: str) -> str:
        """The id of a mail it wrote for that recipient."""
        return self.run("send", recipient, "Your receipt", "Thank you!")

    def status(self, mail_id: str) -> str:
        """What its own table says of a mail."""
        return str(self._sql("SELECT status FROM mail WHERE id = ?", mail_id)[0][0])

    def set_status(self, mail_id: str, status: str) -> None:
        self._sql("UPDATE mail SET status = ? WHERE id = ?", status, mail_id)

    def _sql(self, statement: str, *values: str) -> list[Any]:
        with contextlib.closing(sqlite3.connect(self._folder / "application.db")) as db, db:
            return db.execute(statement, values).fetchall()

    def wait_for(self, mail_id: str, status: str) -> None:
        wait_until(lambda: self.status(mail_id) == status, f"its table to say {status}")


@pytest.fixture
def example(tmp_path: Path) -> ExampleApplication:
    (tmp_path / "application").mkdir()
    return ExampleApplication(tmp_path / "application")


def test_the_example_application_sends_mail_once_and_learns_what_became_of_it_also_after_mailproxy_was_down(
    example: ExampleApplication, tmp_path: Path, smtp: SmtpServer
) -> None:
    with example.serve():
        sent, waiting = example.send("ann@example.net"), example.send("bob@example.net")
        assert [example.status(mail_id) for mail_id in (sent, waiting)] == ["new", "new"]

        with Daemon(tmp_path, example.mailproxy_config, smtp=smtp, token="t0ken"):
            example.wait_for(sent, "sent")
            example.wait_for(waiting, "sent")
            failed, refused = example.send("perm@example.net"), example.send("no address")
            example.wait_for(failed, "error")
            example.wait_for(refused, "rejected")
            listed = dict(line.split("\t", 1) for line in example.run("list").splitlines())
            assert listed[sent].split("\t") == ["ann@example.net", "sent", ""]
            assert "550" in listed[failed]
            assert re.search(r"invalid to: .* \(invalid_field\)", listed[refused])
            assert smtp.received_by("ann@example.net")[0].message.get_content().strip() == "Thank you!"

            example.set_status(sent, "new")  # as if the answer had got lost, and no report had come yet
            example.wait_for(example.send("eve@example.net"), "sent")
            assert example.status(sent) == "submitted"

    assert sorted(received.recipients[0][:3] for received in smtp.received) == ["ann", "bob", "eve"]


def test_the_example_application_takes_a_report_once_and_none_that_is_not_signed_or_too_old(
    example: ExampleApplication,
) -> None:
    def signed(status: str, report_id: str, age_s: int = 0) -> tuple[dict[str, str], bytes]:
        """A call as the daemon makes it: headers and body."""
        entry = {"id": mail_id, "status": status, "error": None, "attempts": 1}
        body, timestamp = json.dumps({"delivery_report": [entry]}).encode(), int(time.time()) - age_s
        signature = mailproxy.webhook_signature(mailproxy.webhook_key(SYNC_SECRET), report_id, timestamp, body)
        named = {"webhook-id": report_id, "webhook-timestamp": str(timestamp), "webhook-signature": signature}
        return named, body

    def call(headers: Mapping[str, str], body: bytes) -> HttpAnswer:
        return called(example.port, "POST", "/proxy_sync", headers, body)

    with example.serve() as log:
        mail_id = example.send("ann@example.net")
        once = signed("deferred", "rep_0")
        for before, after in [("new", "deferred"), ("untouched", "untouched")]:
            example.set_status(mail_id, before)
            answer = call(*once)
            assert (answer.status, answer.json, example.status(mail_id)) == (200, {"ok": True, "queued": 0}, after)

        good, body = signed("sent", "rep_1")
        signature = good["webhook-signature"]
        for headers, content, status in [
            ({}, body, 401),
            *(
                ({**good, "webhook-signature": wrong}, body, 401)
                for wrong in ("", "v1," + "A" * 43 + "=", signature.removeprefix("v1,"), "v1,\xe9")
            ),
            ({**good, "webhook-id": "rep_2"}, body, 401),
            *(({**good, "webhook-timestamp": wrong}, body, 401) for wrong in ("1" * 5000, "now")),
            (good, body.replace(b"sent", b"gone"), 401),
            (*signed("sent", "rep_1", age_s=301), 401),
            (*signed("sent", "rep_1", age_s=-330), 401),
            (*signed("sent", "rep_3", age_s=270), 200),
            ({**good, "webhook-signature": f"v1,other v1a,unknown {signature}"}, body, 200),
        ]:
            example.set_status(mail_id, "new")
            assert call(headers, content).status == status, headers
            assert example.status(mail_id) == ("sent" if status == 200 else "new"), headers
        assert "Traceback" not in log.read_text()


# -- django_backend.py


class DjangoMail:
    """django.core.mail, asked as each version of Django wants it; 6.1 has its backends in the setting MAILERS."""

    def __init__(self) -> None:
        self.core = importlib.import_module("django.core.mail")
        self.has_mailers = hasattr(self.core, "mailers")
        self.Error = importlib.import_module("django_backend").MailproxyError

    def settings(self, backend: str, **options: object) -> contextlib.AbstractContextManager[None]:
        """Settings whose default backend is that one."""
        from django.test import override_settings

        if self.has_mailers:
            return override_settings(MAILERS={"default": {"BACKEND": backend, "OPTIONS": options}})  # type: ignore[no-any-return]
        ours = {f"MAILPROXY_{name.upper()}": value for name, value in options.items()}
        return override_settings(EMAIL_BACKEND=backend, **ours)  # type: ignore[no-any-return]

    def backend(self, backend: str = "django_backend.MailproxyBackend", **options: object) -> Any:
        if not self.has_mailers:
            return self.core.get_connection(backend, **options)
        with self.settings(backend, **options):
            return self.core.mailers["default"]

    def message(self, to: str = "ann@example.net") -> Any:
        return self.core.EmailMessage("Subject", "Body", "me@example.com", [to])

    def full_message(self) -> Any:
        """A message with everything in it that Django knows."""
        message = self.core.EmailMultiAlternatives(
            subject="Schöne Grüße", body="Der Text – mit 12 €.\n.\nFrom here\r\non\n", from_email="Jörg <joerg@example.com>",
            to=["Ann Smith <ann@example.net>", "bob@example.net"], cc=["carol@example.net"], bcc=["dave@example.net"],
            reply_to=["help@example.com"],
            headers={"X-Campaign": "spring", "Message-ID": "<1@example.com>", "Date": "Sat, 22 Nov 2025 21:00:00 +0000"},
        )  # fmt: skip
        message.attach_alternative('<p>Der Text <img src="cid:logo"></p>' + "<br>\n" * 300, "text/html")
        message.attach("rechnung-ü.pdf", b"%PDF \x00\xff" * 100, "application/pdf")
        message.attach("notes.txt", "Zeile eins\nZeile zwei €\n" + "Долго\n" * 50, "text/plain")
        message.attach("table.csv", "a;b\r\n1;2\r\n" + "x" * 1200, "text/csv")
        return message


@pytest.fixture
def django() -> Iterator[DjangoMail]:
    import django.conf

    if not django.conf.settings.configured:
        django.conf.settings.configure(DEFAULT_CHARSET="utf-8")
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield DjangoMail()
    finally:
        sys.path.remove(str(EXAMPLES))


def test_the_django_backend_sends_what_djangos_own_sends_to_the_byte(
    django: DjangoMail, tmp_path: Path, smtp: SmtpServer
) -> None:
    own = django.backend("django.core.mail.backends.smtp.EmailBackend", host=smtp.host, port=smtp.port)
    with Daemon(tmp_path, smtp=smtp) as daemon:
        ours = django.backend(url=f"http://127.0.0.1:{daemon.port}/")
        for number in (1, 3):
            message = django.full_message()
            if number == 3:  # a text that is base64, with its line ends in it
                message = django.message()
                message.extra_headers = {"Message-ID": "<2@example.com>", "Date": "Sat, 22 Nov 2025 21:00:00 +0000"}
                message.body = "é" * 1200 + "\nand\r\nmore\n.\n"
            assert own.send_messages([message]) == 1
            smtp.wait_for(number)
            assert ours.send_messages([message]) == 1
            smtp.wait_for(number + 1)

    for expected, came in zip(smtp.received[::2], smtp.received[1::2], strict=True):
        djangos, sent = [re.sub(rb"={15}\d+==", b"boundary", received.content) for received in (expected, came)]
        assert sent == djangos
        assert (came.sender, came.recipients) == (expected.sender, expected.recipients)
    assert "dave@example.net" in smtp.received[1].recipients
    assert b"dave" not in smtp.received[1].content


def test_the_django_backend_is_found_by_the_settings_and_tells_what_is_refused_unless_silent(
    django: DjangoMail, tmp_path: Path, smtp: SmtpServer
) -> None:
    config = {"account:shop": {"host": smtp.host, "port": smtp.port}}
    with Daemon(tmp_path, config, smtp=smtp, token="t0ken") as daemon:
        options = {"url": f"http://127.0.0.1:{daemon.port}/", "token": "t0ken"}
        with django.settings("django_backend.MailproxyBackend", account="shop", **options):
            assert django.core.send_mail("To the shop", "Body", "me@example.com", ["ann@example.net"]) == 1
            assert django.core.send_mail("Subject", "Body", "me@example.com", []) == 0
            assert django.message().send() == 1
        shop = smtp.wait_for(2)[0].message
        assert (shop["To"], shop["Subject"]) == ("ann@example.net", "To the shop")
        assert len(listed(daemon, "account_id=shop")) == 2

        good, bad = django.message(), django.message("ann@@example.net")
        bad.mailproxy_id = "bad"
        with pytest.raises(django.Error, match="bad: invalid to") as refused:
            django.backend(**options).send_messages([good, bad])
        assert [(id_, entry["code"]) for id_, entry in refused.value.refused.items()] == [("bad", "invalid_field")]
        silent = django.backend(fail_silently=True, **options)
        assert (silent.send_messages([good, bad]), silent.send_messages([bad])) == (1, 0)
        assert len(smtp.wait_for(4)) == 4
        options["url"] = f"http://127.0.0.1:{free_port()}"
        with pytest.raises(django.Error, match="cannot be reached"):
            django.backend(**options).send_messages([good])
        assert django.backend(fail_silently=True, **options).send_messages([good]) == 0


def test_a_django_message_keeps_its_id_until_mailproxy_has_answered(
    django: DjangoMail, reports: ReportReceiver
) -> None:
    message, backend = django.message(), django.backend(url=reports.url)
    accepted = Answer(body={"ok": True, "queued": 1, "rejected": []})
    rejected = [{"id": "order-1", "reason": "already sent", "code": "already_sent"}]
    reports.answers.extend([*[Answer(close=True), Answer(status=503)] * 2, *[accepted] * 3])
    reports.answers.append(Answer(400, {"ok": False, "error": "all messages rejected", "rejected": rejected}))
    reports.answers.append(Answer(body={"ok": True, "queued": 0, "rejected": [], "known": ["order-1"]}))
    reports.answers.append(Answer(401, {"ok": False, "error": "Unauthorized", "code": "unauthorized"}))
    with pytest.raises(django.Error, match="mailproxy cannot be reached: "):
        backend.send_messages([message])  # three tries
    assert backend.send_messages([message]) == 1  # two
    backend.send_messages([message])  # another mail, of the same content
    message.mailproxy_id = "order-1"
    for _ in range(3):  # what mailproxy has already is a success
        assert backend.send_messages([message]) == 1
    with pytest.raises(django.Error, match="Unauthorized \\(unauthorized\\)"):
        backend.send_messages([message])
    gc.collect()  # an answer that nobody closed would be a warning now

    ids = [json.loads(call.content)["messages"][0]["id"] for call in reports.calls]
    assert len(set(ids[:5])) == 1
    assert ids[5] not in ids[:5]
    assert ids[6:] == ["order-1"] * 4
    assert reports.calls[0].content == reports.calls[2].content


def test_a_thousand_django_messages_are_submitted_in_portions(django: DjangoMail, reports: ReportReceiver) -> None:
    reports.answers.extend([Answer(body={"ok": True, "queued": 1, "rejected": []})] * 3)
    assert django.backend(url=reports.url).send_messages([django.message() for _ in range(1001)]) == 1001
    assert [len(json.loads(call.content)["messages"]) for call in reports.calls] == [500, 500, 1]


# -- flask_app.py


def test_the_flask_example_sends_one_mail_an_order_and_hears_of_it(tmp_path: Path, smtp: SmtpServer) -> None:
    port = free_port()
    client = {"client_sync_url": f"http://127.0.0.1:{port}/proxy_sync", "client_sync_token": "choose-one"}
    command = [sys.executable, "-m", "flask", "--app", EXAMPLES / "flask_app.py", "run", "--port", str(port)]
    with Daemon(tmp_path, {"client": client}, smtp=smtp, token="t0ken") as daemon:
        environment = {**_plain_environment(), "MAILPROXY_URL": f"http://127.0.0.1:{daemon.port}"}
        environment |= {"MAILPROXY_TOKEN": "t0ken", "MAILPROXY_SYNC_TOKEN": "choose-one"}
        with example_running(command, "Running on", tmp_path, environment) as log:
            form = {"Content-Type": "application/x-www-form-urlencoded"}
            asked = (port, "POST", "/orders/7/confirmation", form, b"email=ann%40example.net")
            assert (called(*asked).status, len(smtp.wait_for(1))) == (200, 1)
            wait_until(lambda: "order-7-confirmation is sent" in log.read_text(), "the report")
            assert called(*asked).json == {"mail": "known"}
            refused = called(port, "POST", "/orders/8/confirmation", form, b"email=nobody")
            assert (refused.status, refused.json) == (502, {"mail": "refused", "code": "invalid_field"})
            forged = {"Content-Type": "application/json", "Authorization": "Bearer choose-two"}
            assert called(port, "POST", "/proxy_sync", forged, b'{"delivery_report": []}').status == 401

    assert len(smtp.received) == 1


# -- findings


def test_the_papers_tell_of_every_script_in_findings_and_of_no_other() -> None:
    papers = "".join(PROGRAM.with_name("docs").joinpath(name).read_text() for name in ("clients.md", "providers.md"))
    scripts = {path.name for path in PROGRAM.with_name("findings").glob("*.sh") if os.access(path, os.X_OK)}
    assert scripts == set(re.findall(r"`([a-z0-9-]+\.sh)`", papers))


# ======================================================================
# README - it and the pages of docs/: what they say is done, by one reader, in an empty folder
# ======================================================================
#
# An `sh` block is run as it stands; `console` blocks have commands behind `$ `, and below each what it answers. That
# must come true but for numbers in words, times, and what `...` stands for. A `python` block is run, the settings of an
# `ini` block are right for `check`, a message in a `json` block is taken, the lines of a `log` block are in the log. .ci/run runs the blocks marked `ci`, and those
# marked `by hand` take too long, or have a test of their own. What stands between `table` and `end` is printed from the program.

README = PROGRAM.with_name("README.md")
FIRST = ("api.md", "configuration.md")  # of docs/: what is typed there, others go on from
PAGES = {
    path.relative_to(README.parent).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        README,
        *sorted(README.with_name("docs").glob("*.md"), key=lambda path: (path.name not in FIRST, path)),
    ]
}
BLOCK = re.compile(r"^(<!-- (?:ci: \w+|by hand) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"(?<=<!-- table: )(\w+)( -->\n)(.*?)(?=<!-- end -->)", re.DOTALL)


def fields_table(fields: Mapping[str, mailproxy.Field]) -> str:
    """Fields of a JSON object that clients send, as Markdown."""
    lines = ["| field | type | meaning |", "|---|---|---|"]
    for name, (kind, meaning, required) in fields.items():
        types = re.sub(r"(\w+)\[\]", r"list of \1s", kind).replace(" | ", " or ")
        words = meaning.replace("<", "\\<")  # which would make a link of an address
        lines.append(f"| `{name}`{'*' if required else ''} | {types} | {words} |")
    needed = ["", "\\* must be there"] if any(field.required for field in fields.values()) else []
    return "\n".join([*lines, *needed]) + "\n"


def listing_table() -> str:
    """The query fields of GET /messages as Markdown."""
    rows = [f"| `{name}` | {words} | {kind.words} |" for name, (kind, words) in mailproxy.LISTING.items()]
    return "\n".join(["| field | meaning | value |", "|---|---|---|", *rows]) + "\n"


def commands_table() -> str:
    """The commands as Markdown."""
    rows = [f"| `{command.name}` | {command.meaning} |" for command in mailproxy.COMMANDS]
    return "\n".join(["| command | |", "|---|---|", *rows]) + "\n"


def metrics_table() -> str:
    """The metrics of the daemon as Markdown."""
    exposition = mailproxy.Metrics("").exposition().decode()
    found = re.findall(r"^# HELP (mailproxy_\w+) (.+)\n# TYPE \1 (\w+)$", exposition, re.MULTILINE)
    rows = [f"| `{name}` | {kind} | {words} |" for name, words, kind in found]
    return "\n".join(["| metric | type | meaning |", "|---|---|---|", *rows]) + "\n"


TABLES_OF_PAGES = {
    "commands": commands_table,
    "metrics": metrics_table,
    "settings": settings_table,
    "message": lambda: fields_table(mailproxy.MESSAGE_FIELDS),
    "attachment": lambda: fields_table(mailproxy.ATTACHMENT_FIELDS),
    "s3": lambda: fields_table(mailproxy.S3_FIELDS),
    "listing": listing_table,
}


def write_papers() -> None:
    """Print config.ini and the tables of the pages anew: python -c 'import test_mailproxy as t; t.write_papers()'."""
    README.with_name("config.ini").write_text(config_ini(), encoding="utf-8")
    for page, text in PAGES.items():
        printed = PRINTED.sub(lambda found: f"{found[1]}{found[2]}{TABLES_OF_PAGES[found[1]]()}", text)
        (README.parent / page).write_text(printed, encoding="utf-8")


def blocks(page: str, *kinds: str) -> list[tuple[str, str]]:
    """The code blocks of these kinds, each with its kind, but those that .ci/run or somebody runs by hand."""
    return [(kind, text) for mark, kind, text in BLOCK.findall(PAGES[page]) if kind in kinds and not mark]


def dialogue(block: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each up to its last quote, with what it answers."""
    for turn in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        lines = turn.splitlines(keepends=True)
        starts = ("".join(lines[:n]) for n in itertools.count(1))
        command = next(text for text in starts if text.count("'") % 2 == 0 and not text.endswith(("\\\n", "|\n")))
        yield command, turn.removeprefix(command)


def in_words(text: str) -> str:
    """A text without what differs from time to time."""
    text = re.sub(r"\d+ (s|min) ago", "1 s ago", text)  # on a busy machine
    return re.sub(r"[ \t]+", " ", re.sub(r"\d+(\.\d+)*", "N", text))


def comparable(value: Any, printed: Any) -> Any:
    """An answer without what differs from time to time, and without the fields that "..." in its print stands for."""
    if isinstance(value, dict) and isinstance(printed, dict):
        kept = value.keys() & printed.keys() if "..." in printed else value.keys()
        return {key: comparable(value[key], printed.get(key)) for key in kept - {"..."}}
    if isinstance(value, list) and isinstance(printed, list) and len(value) == len(printed):
        return [comparable(one, its_print) for one, its_print in zip(value, printed, strict=True)]
    if isinstance(value, str):
        return in_words(value)
    return "a time" if isinstance(value, int) and value > 1_000_000_000 else value


def parsed_print(text: str) -> Any:
    """An answer in JSON as a page prints it."""
    return json.loads(re.sub(r"(?<=[{ ])\.\.\.(?=})", '"...": 0', text))


class Reader:
    """Somebody who types what the pages say, in a folder with nothing in it but mailproxy.pyz."""

    def __init__(self, folder: Path, smtp: SmtpServer, ca: PrivateCA, reports: ReportReceiver) -> None:
        self.port, submission_port = free_port(), free_port()
        self._log = folder.parent / "log"
        self._places = {
            "smtp.example.com:587": f"localhost:{smtp.port}",
            '"port": 587': f'"port": {smtp.port}',
            "port = 587": f"port = {smtp.port}",
            "smtp.port=587": f"smtp.port={smtp.port}",
            "smtp.example.com": "localhost",
            "127.0.0.1:8000": f"127.0.0.1:{self.port}",
            "127.0.0.1:2525": f"127.0.0.1:{submission_port}",
            "/opt/mailproxy/": f"{folder}/",
            "/usr/sbin/": f"{folder}/",
            "/usr/bin/": f"{folder}/",
        }
        (folder / "mailproxy.pyz").write_text(f"#!/usr/bin/env python3\n{STARTER.read_text()}")
        (folder / "mailproxy.pyz").chmod(0o755)
        (folder / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
        (folder / "python3").chmod(0o755)
        own = {"PATH": f"{folder}:{os.environ['PATH']}", "MAILPROXY_SERVER_PORT": str(self.port)}
        own |= {"MAILPROXY_CLIENT_CLIENT_SYNC_URL": reports.url, "SSL_CERT_FILE": str(ca.ca_file)}
        own |= {"MAILPROXY_SUBMISSION_LISTEN": f"127.0.0.1:{submission_port}"}
        own |= {"SMTP_PASSWORD": "secret"}  # exported in one terminal, and the other too
        own |= {"PAUSES": json.dumps({"GATHER_S": 0.01, "REST_S": 0.01})}
        self._outside: dict[str, Any] = {
            "cwd": folder,
            "env": {**_plain_environment(), **own},
            "stdin": subprocess.DEVNULL,
        }

    def there(self, text: str) -> str:
        """What is printed, with the test's own servers in the place of those it names."""
        for place, here in self._places.items():
            text = text.replace(place, here)
        return text

    def type(self, commands: str, *, fails: bool = False) -> str:
        """What the commands answer."""
        heard = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "timeout": 40}
        ended = subprocess.run(self._shell(commands), **heard, **self._outside)
        assert (ended.returncode != 0) == fails, f"{commands}{ended.stdout}"
        return str(ended.stdout)

    def converse(self, block: str) -> None:
        """Type the commands of a console block; each must answer what is printed below it."""
        for command, below in dialogue(block):
            printed = self.there(below)
            answer = self.type(command, fails=printed.startswith("mailproxy: "))
            if printed.startswith("{"):
                said = parsed_print(printed)
                assert comparable(json.loads(answer), said) == comparable(said, said), command
            else:
                pattern = re.escape(in_words(printed)).replace(r"\.\.\.", ".*")
                assert re.fullmatch(pattern, in_words(answer), re.DOTALL), f"{command}{answer}"
            self.take_a_breath()

    def find_in_log(self, text: str) -> None:
        """The daemon has written such lines."""
        without_ids = re.compile(r"\brequest=\S+")
        log = in_words(without_ids.sub("", self._log.read_text()))
        for line in self.there(text).splitlines():
            assert in_words(without_ids.sub("", line)).removeprefix("...") in log, line

    def post(self, text: str, reports: ReportReceiver) -> None:
        """Messages as a page has them are taken, and reports have the fields that a page shows."""
        said = parsed_print(text)
        if "messages" in said:
            answer = called(self.port, "POST", "/commands/add-messages", {}, json.dumps(said)).json
            assert (answer["queued"], answer.keys()) == (len(said["messages"]), {"ok", "queued", "rejected"}), text
            ids = {"ids": [message["id"] for message in said["messages"]]}
            assert called(self.port, "POST", "/commands/delete-messages", {}, json.dumps(ids)).status == 200
        if "default" in said:  # an account as /status shows it
            assert said["default"].keys() <= called(self.port, "GET", "/status").json["accounts"]["default"].keys()
        if "delivery_report" in said:
            assert said["delivery_report"][0].keys() == reports.entries[0].keys()

    @contextlib.contextmanager
    def serving(self, commands: str) -> Iterator[None]:
        """Commands of which the last one is `serve`, in a terminal of their own."""
        with self._log.open("wb") as log:
            output = {"stdout": log, "stderr": log, "start_new_session": True}
            terminal = subprocess.Popen(self._shell(commands), **output, **self._outside)
        try:
            wait_until(lambda: "mailproxy listens" in self._log.read_text() or terminal.poll(), "the daemon")
            assert terminal.poll() is None, self._log.read_text()
            self._outside["cwd"] = self._log.with_name("mail")  # the other terminal is there, too
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(terminal.pid, signal.SIGTERM)
            terminal.wait(40)
            print(self._log.read_text(), file=sys.stderr)

    def take_a_breath(self) -> None:
        """Until the queue has come to rest, and is reported: nobody types as fast as a test."""

        def at_rest() -> bool:
            status = called(self.port, "GET", "/status").json
            waits = status["pending"] - status["deferred"] + status["in_delivery"] + status["unreported"]
            return bool(waits == 0)

        wait_until(at_rest, "the queue at rest")

    def _shell(self, commands: str) -> list[str]:
        return ["bash", "-euo", "pipefail", "-c", self.there(commands)]


def test_what_operations_says_of_several_machines_makes_a_database_nodes_and_a_copy_to_restore(
    tmp_path: Path, smtp: SmtpServer
) -> None:
    make, ini, copy = (text for mark, _, text in BLOCK.findall(PAGES["docs/operations.md"]) if "by hand" in mark)
    with PostgresServer() as server:
        server.run("DROP ROLE mailproxy")
        own = {"PGHOST": server.host, "PGPORT": str(server.port), "PGUSER": "postgres"}
        own["PATH"] = f"{server.programs()}:{os.environ['PATH']}"
        outside: dict[str, Any] = {"cwd": tmp_path, "env": {**_plain_environment(), **own}, "timeout": 60}
        type_ = functools.partial(subprocess.run, shell=True, check=True, **outside)
        (tmp_path / "token").write_text("sesame\n")
        places = {"db.example.net": f"{server.host}:{server.port}", "10.0.0.11": "127.0.0.1"}
        for place, here in {**places, "/etc/mailproxy/token": str(tmp_path / "token")}.items():
            assert place in ini
            ini = ini.replace(place, here)

        type_(make)
        (tmp_path / "node.ini").write_text(ini)
        checked = run_command("check", "--config", tmp_path / "node.ini")
        assert checked.returncode == 0, checked.stderr
        settings = mailproxy.read_settings(str(tmp_path / "node.ini"), {}, {})
        with Daemon(tmp_path, {"storage": settings.storage._asdict()}, smtp=smtp) as daemon:
            daemon.submit(letter("kept"), letter("later", deferred_ts=9_999_999_998))
            wait_sent(daemon, "kept")
            assert daemon.status()["node"] == "node-a"
            type_(copy)
        type_("createdb --owner mailproxy restored && pg_restore --dbname restored mailproxy.dump")

        restored = {"db_path": server.url("restored"), "node": "node-a"}
        with Daemon(tmp_path, {"storage": restored}, smtp=smtp) as daemon:
            assert [daemon.message(id_)["status"] for id_ in ("kept", "later")] == ["sent", "deferred"]
            answer = daemon.post("/commands/add-messages", {"messages": [letter("kept"), letter("new")]}).json
            assert (answer["queued"], answer["known"]) == (1, ["kept"])
            wait_sent(daemon, "new")
    assert subjects(smtp) == ["kept", "new"]


def test_the_commands_of_the_pages_do_what_they_say(tmp_path: Path, ca: PrivateCA, reports: ReportReceiver) -> None:
    needs("bash", "curl")
    folder = tmp_path / "empty"
    folder.mkdir()
    accounts = {"me@example.com": "secret"}
    kinds = ("sh", "console", "python", "json", "log")
    (_, start), *others = [block for page in PAGES for block in blocks(page, *kinds)]
    with SmtpServer(certificate=ca.good(), accounts=accounts, size_limit=35_000_000, pipelining=True) as smtp:
        reader = Reader(folder, smtp, ca, reports)
        with reader.serving(start):
            for kind, text in others:
                if kind == "sh":
                    reader.type(text)
                elif kind == "log":
                    reader.find_in_log(text)
                elif kind == "json":
                    reader.post(text, reports)
                elif kind == "python":
                    exec(reader.there(text), {"order": SimpleNamespace(id=7, email="eve@example.net")})
                else:
                    reader.converse(text)
                reader.take_a_breath()

    sent = Counter(recipient for mail in smtp.received for recipient in mail.recipients)
    assert sent == {"ann@example.net": 6, "bob@example.net": 1, "eve@example.net": 2}


def test_each_route_is_in_the_pages_by_a_line_of_curl_and_each_code_of_an_answer_by_its_name() -> None:
    lines = [command for page in PAGES for _, block in blocks(page, "console") for command, _ in dialogue(block)]

    routes = re.findall(r'\bRoute\("(\w+)", "([^"]+)", .*answer=', SOURCE)

    assert len(routes) > 15
    for method, path in routes:
        url = re.escape("http://127.0.0.1:8000" + path).replace(r"\{id\}", "[^/ ]+")
        by_curl = [line for line in lines if re.match(rf"curl .*{url}(['?]| |$)", line)]
        if method != "POST":
            by_curl = [line for line in by_curl if (" -X DELETE " in line) == (method == "DELETE")]
        assert by_curl, f"{method} {path}"
    for code in re.findall(r"'(\w+)'", "".join(kind.json for kind in mailproxy.WORDS.values())):
        assert f"`{code}`" in PAGES["docs/api.md"], code
    statuses: dict[int, str] = {}
    for status, codes in re.findall(r"^\| (\d{3}) \| ([^|]+) \|", PAGES["docs/api.md"], re.MULTILINE):
        statuses[int(status)] = statuses.get(int(status), "") + codes
    assert statuses.keys() == mailproxy.PROBLEMS.keys() - {429}  # which is never answered
    assert all(f"`{mailproxy.PROBLEMS[status]}`" in codes for status, codes in statuses.items())


def test_the_pages_mention_no_command_option_or_metric_that_is_not_there() -> None:
    pages = [text.replace("\\\n", "") for text in PAGES.values()]
    mentioned = [words for text in pages for words in re.findall(r"mailproxy\.pyz ([a-z][^`$\n|)<>]*)", text)]
    assert len(mentioned) > 8
    for words in mentioned:
        assert mailproxy.parsed(shlex.split(words.removesuffix('"')))  # behind it "$@"
    for script, words in {found for text in pages for found in re.findall(r"\b(bench/\w+\.py)([^`#\n]*)", text)}:
        its_source = (README.parent / script).read_text(encoding="utf-8")
        for option in re.findall(r"--\w+", words):
            assert f'"{option}"' in its_source, script
    named = {name for text in pages for name in re.findall(r"\bmailproxy_[a-z_]+\b", text)}
    assert named - {"mailproxy_token"} <= set(re.findall(r"\w+", metrics_table()))


@pytest.mark.parametrize("page", PAGES)
def test_the_settings_in_the_pages_are_right_as_they_stand(
    page: str, tmp_path: Path, here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in re.findall(r"\benv:(\w+)", PAGES[page]):
        monkeypatch.setenv(name, "secret")
    (tmp_path / "smtp_password").write_text("secret\n")
    presets = [line for line in PAGES[page].splitlines() if page == "docs/providers.md" and line.startswith("|")]
    in_tables = [re.findall(r"`([a-z_]+ = [^`]+)`", line) for line in presets]
    account = "[smtp]\nhost = smtp.example.com\nport = 25\n"

    in_blocks = [text for _, text in blocks(page, "ini")]
    for snippet in [*in_blocks, *(account + "\n".join(row) for row in in_tables if row)]:
        text = re.sub("/(run|etc)/mailproxy", str(tmp_path), snippet)  # which are not there
        (tmp_path / "config.ini").write_text(text, encoding="utf-8")
        checked = here("check", "--config", tmp_path / "config.ini", "--set", f"storage.db_path={tmp_path}/queue.db")
        assert (checked.returncode, checked.stderr) == (0, ""), snippet
        assert "mail goes out through" in checked.stdout, snippet


def heading_anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_page_about_providers_shows_the_log_line_as_it_is() -> None:
    assert f'cure="{mailproxy.QUOTA}"' in " ".join(PAGES["docs/providers.md"].split())
