"""The servers that mailproxy talks to in these scripts: an SMTP sink, a receiver of reports, a delaying proxy.

Each `serve_...` is run by rig.Companion in a process of its own and lives until it is killed. They are
as simple as they can be, so that what is measured is the daemon. None of them keeps mail.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
import ssl
import time
from collections.abc import Callable, MutableSequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from rig import Companion

Numbers = MutableSequence[int]

# -- an SMTP server


class Manner(NamedTuple):
    """How long the sink lets its client wait, and what it offers."""

    greeting_s: float = 0.0
    auth_s: float = 0.0
    message_s: float = 0.0  # from the end of the content to its answer
    pipelining: bool = True
    chunking: bool = False
    certificate: str | None = None  # file of it and its key (PEM): STARTTLS is offered
    refuses: bool = False  # recipients gone...@ are refused for ever, later...@ the first time


NO_CHUNKING = 1  # numbers[MODE] of the SMTP server: connections made from now on are not offered it
Keep = Callable[
    [bytes, bytes, bytes, int], None
]  # a content, the command it came by, the client's EHLO name, when MAIL was


class SmtpSession(asyncio.Protocol):
    """One connection of the sink: takes what comes, in order, also when it comes pipelined, and answers each piece
    that it reads by one write. Each chunk is taken for the last one."""

    def __init__(self, manner: Manner, keep: Keep, put_off: set[bytes], context: ssl.SSLContext | None = None) -> None:
        self._manner, self._keep, self._put_off, self._context = manner, keep, put_off, context
        self._heard, self._replies = bytearray(), bytearray()
        self._content_by, self._chunk_bytes = b"", 0  # what comes is content: by DATA, BDAT
        self._pausing = False
        self._recipients = 0
        self._client, self._mail_ns = b"?", 0  # its name in EHLO

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._say(b"220 sink.test ESMTP\r\n", self._manner.greeting_s)
        self._go_on()

    def data_received(self, piece: bytes) -> None:
        self._heard += piece
        self._go_on()

    def _say(self, reply: bytes, after_s: float = 0.0) -> None:
        if not after_s:
            self._replies += reply
            return
        self._pausing = True
        asyncio.get_running_loop().call_later(after_s, self._say_at_last, reply)

    def _say_at_last(self, reply: bytes) -> None:
        self._pausing = False
        self._say(reply)
        self._go_on()

    def _go_on(self) -> None:
        """Take what is there, up to where the client has to wait."""
        at = 0
        while not self._pausing and (end := self._taken(at)):
            at = end
        del self._heard[:at]
        if self._replies:
            self._transport.write(bytes(self._replies))
            self._replies.clear()

    def _taken(self, at: int) -> int:
        """Take the command or content that begins there; return where it ends, 0 when that has not come yet."""
        if self._content_by == b"BDAT":
            end = after = at + self._chunk_bytes
            if end > len(self._heard):
                return 0
        else:
            end = self._heard.find(b"\r\n.\r\n" if self._content_by else b"\r\n", at)
            if end < 0:
                return 0
            end, after = (end + 2, end + 5) if self._content_by else (end, end + 2)
        taken = bytes(self._heard[at:end])
        if not self._content_by:
            self._obey(taken)
        elif self._recipients:
            self._keep(taken, self._content_by, self._client, self._mail_ns)
            self._content_by = b""
            self._say(b"250 2.0.0 taken\r\n", self._manner.message_s)
        else:  # a chunk that came too soon
            self._content_by = b""
            self._say(b"554 5.5.1 no valid recipients\r\n")
        return after

    def _obey(self, line: bytes) -> None:
        verb = line[:4].upper()
        if verb == b"EHLO":
            self._client = line[5:].strip() or b"?"
        if verb == b"BDAT":
            self._content_by, self._chunk_bytes = verb, int(line.split()[1])
        elif verb == b"RCPT":
            self._say(self._verdict(line))
        elif verb == b"AUTH":
            self._say(b"235 2.7.0 welcome\r\n", self._manner.auth_s)
        elif verb == b"STAR" and self._context:
            self._pausing = True
            self._turning = asyncio.get_running_loop().create_task(self._turn_to_tls(self._context))
        else:
            self._say(self._answer(verb))

    async def _turn_to_tls(self, context: ssl.SSLContext) -> None:
        self._transport.write(b"220 2.0.0 go on\r\n")
        loop = asyncio.get_running_loop()
        secured = await loop.start_tls(self._transport, self, context, server_side=True)
        assert secured is not None
        self._transport, self._context, self._pausing = secured, None, False
        self._go_on()

    def _answer(self, verb: bytes) -> bytes:
        if verb == b"EHLO":
            offers = {
                b"PIPELINING": self._manner.pipelining, b"CHUNKING": self._manner.chunking,
                b"STARTTLS": self._context, b"AUTH PLAIN LOGIN": self._manner.auth_s,
            }  # fmt: skip
            lines = (b"250-%b\r\n" % offer for offer, made in offers.items() if made)
            return b"250-sink.test\r\n" + b"".join(lines) + b"250-8BITMIME\r\n250 SMTPUTF8\r\n"
        if verb == b"MAIL":
            self._recipients, self._mail_ns = 0, time.monotonic_ns()
        if verb == b"DATA":
            self._content_by = verb if self._recipients else b""
            return b"354 go on\r\n" if self._recipients else b"554 5.5.1 no valid recipients\r\n"
        return b"221 2.0.0 bye\r\n" if verb == b"QUIT" else b"250 2.0.0 ok\r\n"

    def _verdict(self, line: bytes) -> bytes:
        if self._manner.refuses and b"<gone" in line:
            return b"550 5.1.1 gone for ever\r\n"
        if self._manner.refuses and b"<later" in line and line not in self._put_off:
            self._put_off.add(line)
            return b"450 4.2.1 later, please\r\n"
        self._recipients += 1
        return b"250 2.1.5 ok\r\n"


def serve_smtp(numbers: Numbers, manner: Manner, log_path: str | None = None) -> None:
    """Count the messages; with a log, write a line for each: when, X-Bench-Id, Message-ID, DATA or BDAT, the client's
    name in EHLO, when its MAIL came."""
    log = -1 if log_path is None else os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    context = None
    if manner.certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(manner.certificate)

    def keep(content: bytes, command: bytes, client: bytes, mail_ns: int) -> None:
        if log >= 0:
            os.write(log, _log_line(content, command, client, mail_ns))
        numbers[Companion.LAST_NS] = time.monotonic_ns()
        numbers[Companion.COUNT] += 1

    def session() -> SmtpSession:
        chunking = manner.chunking and numbers[Companion.MODE] != NO_CHUNKING
        return SmtpSession(manner._replace(chunking=chunking), keep, put_off, context)

    put_off: set[bytes] = set()
    _serve(numbers, session)


def _log_line(content: bytes, command: bytes, client: bytes, mail_ns: int) -> bytes:
    """One write, so that a kill leaves a whole line or none."""
    key, message_id = header(content, b"X-Bench-Id"), header(content, b"Message-ID")
    return b"%d %s %s %s %s %d\n" % (time.monotonic_ns(), key, message_id, command, client, mail_ns)


def header(content: bytes, name: bytes) -> bytes:
    found = re.search(rb"^" + name + rb":\s*(\S+)", content, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else b"?"


def _serve(numbers: Numbers, session: Callable[[], asyncio.Protocol]) -> None:
    """Listen on the port asked for (its negative is in the numbers; 0: any) until killed."""

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(session, "127.0.0.1", -numbers[Companion.PORT], backlog=1000)
        numbers[Companion.PORT] = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    asyncio.run(run())


# -- a receiver of delivery reports

TAKES, REFUSES, SLOW, DIES, HANGS = range(5)  # numbers[MODE]; DIES: closes before its answer is out
SLOW_S = 1.5


class HttpSession(asyncio.Protocol):
    """Requests with a Content-Length, in order; what it answers is the subclass's business."""

    def __init__(self) -> None:
        self._heard = bytearray()
        self._wanted = 0  # size of head and body, once known

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, piece: bytes) -> None:
        self._heard += piece
        while self._has_request():
            body = bytes(self._heard[self._head : self._wanted])
            del self._heard[: self._wanted]
            self._wanted = 0
            self.asked(body)

    def _has_request(self) -> bool:
        """True when a whole one is there; asked anew for each piece, so the head is read once."""
        if not self._wanted and (end := self._heard.find(b"\r\n\r\n")) >= 0:
            length = re.search(rb"\r\ncontent-length: *(\d+)", self._heard[:end], re.IGNORECASE)
            self._head = end + 4
            self._wanted = self._head + (int(length[1]) if length else 0)
        return 0 < self._wanted <= len(self._heard)

    def answer(self, status: bytes, content: bytes) -> None:
        head = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        self._transport.write(head % (status, len(content)) + content)

    def asked(self, body: bytes) -> None:
        raise NotImplementedError


class ReportSession(HttpSession):
    """Counts the entries it acknowledged; with a log, writes a line for each: its id and status."""

    def __init__(self, numbers: Numbers, log: int) -> None:
        super().__init__()
        self._numbers, self._log = numbers, log

    def asked(self, body: bytes) -> None:
        mode = self._numbers[Companion.MODE]
        if mode == REFUSES:
            self.answer(b"500 Internal Server Error", b'{"ok": false}')
        elif mode == DIES:
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Le")
            self._transport.close()
        elif mode == SLOW:
            asyncio.get_running_loop().call_later(SLOW_S, self._take, body)
        elif mode != HANGS:
            self._take(body)

    def _take(self, body: bytes) -> None:
        entries = json.loads(body)["delivery_report"]
        if self._log >= 0:
            os.write(self._log, "".join(f"{entry['id']} {entry['status']}\n" for entry in entries).encode())
        if entries:
            self._numbers[Companion.LAST_NS] = time.monotonic_ns()
        self._numbers[Companion.COUNT] += len(entries)
        self.answer(b"200 OK", b'{"ok": true}')


def serve_reports(numbers: Numbers, log_path: str | None = None) -> None:
    log = -1 if log_path is None else os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    _serve(numbers, lambda: ReportSession(numbers, log))


# -- the ceiling of submissions: the least that a durable HTTP queue in Python must do


class BareQueue:
    """Rows into SQLite (WAL, synchronous FULL), one commit for all that wait: nothing else."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1)
        self._waiting: list[tuple[BareSession, list[dict[str, object]]]] = []
        self._connection = self._thread.submit(self._open).result()
        self._writing = False

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE queue (seq INTEGER PRIMARY KEY, id TEXT UNIQUE, payload TEXT)")
        return connection

    def take(self, session: BareSession, messages: list[dict[str, object]]) -> None:
        self._waiting.append((session, messages))
        if not self._writing:
            self._write()

    def _write(self) -> None:
        self._writing = True
        group, self._waiting = self._waiting, []
        written = asyncio.get_running_loop().run_in_executor(self._thread, self._commit, group)
        written.add_done_callback(lambda _: self._written(group))

    def _commit(self, group: list[tuple[BareSession, list[dict[str, object]]]]) -> None:
        rows = [(message["id"], json.dumps(message)) for _, messages in group for message in messages]
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.executemany("INSERT INTO queue (id, payload) VALUES (?, ?)", rows)
        self._connection.execute("COMMIT")

    def _written(self, group: list[tuple[BareSession, list[dict[str, object]]]]) -> None:
        for session, _ in group:
            session.answer(b"200 OK", b'{"ok": true, "queued": 1, "rejected": []}')
        self._writing = False
        if self._waiting:
            self._write()


class BareSession(HttpSession):
    def __init__(self, queue: BareQueue | None) -> None:
        super().__init__()
        self._queue = queue

    def asked(self, body: bytes) -> None:
        if self._queue is None or not body:
            self.answer(b"200 OK", b'{"ok": true}')
        else:
            self._queue.take(self, json.loads(body)["messages"])


def serve_bare_queue(numbers: Numbers, path: str) -> None:
    """Parse, insert, fsync, answer: no check, no schema, no index but the id's."""
    queue = BareQueue(path)
    _serve(numbers, lambda: BareSession(queue))


def serve_bare_http(numbers: Numbers) -> None:
    """Answer every request at once: what the machine's own scheduling costs a probe."""
    _serve(numbers, lambda: BareSession(None))


class FileSession(HttpSession):
    """Answers with the same bytes whatever it is asked for, and counts."""

    def __init__(self, numbers: Numbers, content: bytes) -> None:
        super().__init__()
        self._numbers, self._content = numbers, content

    def asked(self, body: bytes) -> None:
        self._numbers[Companion.COUNT] += 1
        self.answer(b"200 OK", self._content)


def serve_files(numbers: Numbers, size_bytes: int) -> None:
    """Attachments to fetch, all of one size."""
    content = bytes(size_bytes)
    _serve(numbers, lambda: FileSession(numbers, content))


# -- a line as long as one wants


class DelayedHalf(asyncio.Protocol):
    """One direction's source: what it hears is said on the other side `delay_s` later, in order."""

    def __init__(self, delay_s: float, other: DelayedHalf | None = None) -> None:
        self._delay_s = delay_s
        self._other = other
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, piece: bytes) -> None:
        if self._other is not None:
            asyncio.get_running_loop().call_later(self._delay_s, self._other.say, piece)

    def connection_lost(self, _: Exception | None) -> None:
        if self._other is not None:
            asyncio.get_running_loop().call_later(self._delay_s, self._other.close)

    def say(self, piece: bytes) -> None:
        if self._transport is not None:
            self._transport.write(piece)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class DelayedFront(DelayedHalf):
    """The client's side: opens the way to the server as soon as a client is there."""

    def __init__(self, delay_s: float, port: int) -> None:
        super().__init__(delay_s)
        self._port = port

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._other = DelayedHalf(self._delay_s, self)
        loop = asyncio.get_running_loop()
        other = self._other
        self._opening = loop.create_task(loop.create_connection(lambda: other, "127.0.0.1", self._port))


def serve_delayed(numbers: Numbers, port: int, round_trip_s: float) -> None:
    """Everything to and from the port, half a round trip later (the handshake of TCP itself is not delayed)."""
    _serve(numbers, lambda: DelayedFront(round_trip_s / 2, port))


# -- a line that is cut

PASSES, CLOSES, HOLDS, SWALLOWS = range(4)  # numbers[MODE]; HOLDS: what is said comes late, SWALLOWS: it never does


class CutHalf(asyncio.Protocol):
    """One end of a connection through the line: what it hears is said at the other end."""

    def __init__(self, line: CutLine, other: CutHalf | None = None) -> None:
        self._line, self.other = line, other
        self.transport: asyncio.Transport | None = None
        self._unsaid = bytearray()  # until there is a transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._line.ends.add(self)
        self._line.treat(self)
        transport.write(bytes(self._unsaid))

    def data_received(self, piece: bytes) -> None:
        if self._line.mode == SWALLOWS:
            self._line.robbed.add(self)
        elif self.other is not None and self.other.transport is not None:
            self.other.transport.write(piece)
        elif self.other is not None:
            self.other._unsaid += piece

    def connection_lost(self, _: Exception | None) -> None:
        self._line.ends.discard(self)
        self._line.robbed.discard(self)
        if self.other is not None and self.other.transport is not None and self._line.mode in (PASSES, CLOSES):
            self.other.transport.close()


class CutFront(CutHalf):
    """The client's end: opens the way to the server as soon as the line lets it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.other = CutHalf(self._line, self)
        self._opening = asyncio.get_running_loop().create_task(self._open(self.other))

    async def _open(self, other: CutHalf) -> None:
        await self._line.passing.wait()
        try:
            await asyncio.get_running_loop().create_connection(lambda: other, "127.0.0.1", self._line.port)
        except OSError:
            assert self.transport is not None
            self.transport.abort()


class CutLine:
    """All connections through the line, and how it treats them now."""

    def __init__(self, numbers: Numbers, port: int) -> None:
        self._numbers, self.port = numbers, port
        self.mode = PASSES
        self.passing = asyncio.Event()
        self.passing.set()
        self.ends: set[CutHalf] = set()
        self.robbed: set[CutHalf] = set()  # something they said was swallowed

    async def follow(self) -> None:
        """Do as the numbers say, from the moment they say it."""
        while True:
            if self.mode != self._numbers[Companion.MODE]:
                self.mode = self._numbers[Companion.MODE]
                (self.passing.set if self.mode == PASSES else self.passing.clear)()
                for end in list(self.ends):
                    self.treat(end)
            await asyncio.sleep(0.005)

    def treat(self, end: CutHalf) -> None:
        assert end.transport is not None
        if self.mode == CLOSES or end in self.robbed or end.other in self.robbed:
            end.transport.abort()
        elif self.mode == HOLDS:
            end.transport.pause_reading()
        else:
            end.transport.resume_reading()


def serve_cut(numbers: Numbers, port: int) -> None:
    """Everything to and from the port, as long as numbers[MODE] says PASSES."""

    async def run() -> None:
        line = CutLine(numbers, port)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: CutFront(line), "127.0.0.1", -numbers[Companion.PORT], backlog=1000)
        numbers[Companion.PORT] = server.sockets[0].getsockname()[1]
        await line.follow()

    asyncio.run(run())
