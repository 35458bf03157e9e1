"""Coverage-guided fuzzing (atheris) of what reads bytes from strangers. Linux, with atheris installed.

    python3 bench/fuzz.py http        # the HTTP parser: a stream of bytes on one connection
    python3 bench/fuzz.py smtp        # submission by SMTP: a stream of bytes on one connection
    python3 bench/fuzz.py addresses   # parse_mailboxes
    python3 bench/fuzz.py submission  # JSON, parse_message, the stored form, composition
    python3 bench/fuzz.py account     # JSON, parse_account

    [--seconds 1200] [--seed 1] [--corpus FOLDER, kept and gone on from] [--input FILE: try this one alone]

More than crashes is looked for:

  http        a stream gives requests and answers, each answer a well-formed one of its own, 2xx or 4xx (501, 505);
              the same stream in small pieces gives the same requests, as far as it is read; a request written
              down plainly is read as the same one; and h11, where it is installed and takes the stream, sees
              the same requests in it (two readers who differ are what smuggling is made of);
  smtp        a stream gives well-formed replies and mails; the same stream in small pieces gives the same ones; the
              content of each mail stands in the stream, between DATA and a dot, with no line end but CRLF;
  addresses   text gives mailboxes or a reason; an address that was accepted is one printable line, local@domain,
              and reads as itself; a header made of the mailboxes reads as the same mailboxes;
  submission  a body gives a message, a reason of fixed first words, or a 4xx; what was accepted can be kept as
              JSON, composes into the same bytes after it was kept, and has each header once, no line too long;
  account     a body gives an account or a reason; its public form has no secret, its whole form reads as the same.

Goes on after a finding. Prints how many inputs were tried, how many accepted, and each finding with the file of
its input; the last line is JSON; exit status 1 when something was found. Findings belong into the tests, input
and all.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import email
import json
import random
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import rig

try:
    import h11  # type: ignore[import-not-found]
except ImportError:
    h11 = None

sys.path.insert(0, str(rig.PROJECT))
NOW = 1_700_000_000.0
LONGEST_INPUT = 6000
STUCK_S = 20  # one input may take so long
TELL_EVERY = 1000  # executions
HEAD_BYTES, HEADERS, BODY_BYTES = 1000, 12, 2000  # limits, small, so that they are met


class Wrong(Exception):
    """An invariant does not hold."""


def must(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


def byte_mutation(content: bytes, most: int) -> bytes:
    """What the fuzzer would do of itself."""
    import atheris

    return bytes(atheris.Mutate(content, most))


# -- the HTTP parser


class Pieces:
    """What a connection reads from: pieces that are there at once, then the end."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._left = pieces[::-1]

    async def read(self, most: int) -> bytes:
        if not self._left:
            return b""
        piece = self._left.pop()
        if len(piece) > most:
            self._left.append(piece[most:])
        return piece[:most]


class Written:
    """What a connection writes to, and its transport: a client that takes everything at once."""

    def __init__(self) -> None:
        self.content = b""
        self.transport = self

    def write(self, content: bytes) -> None:
        self.content += content

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def can_write_eof(self) -> bool:
        return True

    def get_extra_info(self, _name: str) -> tuple[str, int]:
        return "192.0.2.1", 1

    def nothing(self, *_args: object, **_options: object) -> None:
        pass

    async def nothing_to_wait_for(self) -> None:
        pass

    set_write_buffer_limits = write_eof = close = abort = nothing
    drain = wait_closed = nothing_to_wait_for


class Conversation:
    """One connection of the real server with a client that sends these pieces and then no more."""

    def __init__(self, mailproxy: Any, pieces: list[bytes]) -> None:
        self.admitted: list[Any] = []
        self.served: list[tuple[str, str, dict[str, str], dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        self.methods: list[str] = []
        self._mailproxy = mailproxy
        routes = [
            mailproxy.Route("POST", "/echo", self.echo),
            mailproxy.Route("GET", "/query", self.echo),
            mailproxy.Route("GET", "/message/{id}", self.echo),
            mailproxy.Route("DELETE", "/account/{id}", self.echo),
        ]
        self.server = mailproxy.HttpServer(
            routes,
            limits=mailproxy.ServerSettings(max_body_bytes=BODY_BYTES),
            admit=self.admit,
            observe=self.observe,
            in_thread=self.in_thread,
            log_failure=self.log_failure,
        )
        self.writer = Written()
        self._pieces = Pieces(pieces)

    async def run(self) -> Conversation:
        connection = self._mailproxy.ServedConnection(self.server, self._pieces, self.writer, "192.0.2.1")
        await connection.run()
        return self

    def admit(self, request: Any, _is_public: bool) -> None:
        self.admitted.append(request)
        self._mailproxy.ensure(request.headers.get("x-api-token") != "wrong", 401, "the token is wrong")

    async def echo(self, request: Any) -> Any:
        self.served.append((request.method, request.path, request.query, request.headers, request.body))
        content = await request.json_object()
        return self._mailproxy.json_response({"ok": True, "got": content, "at": request.parameters})

    def observe(self, request: Any, status: int, _seconds: float) -> None:
        self.methods.append(request.method)
        self.statuses.append(status)

    async def in_thread(self, work: Callable[[], Any]) -> Any:
        return work()

    def log_failure(self, _request: Any, error: Exception) -> None:
        raise error

    def refuse_malformed_answers(self) -> None:
        """Every request has one answer: a head, and a body as long as it says."""
        rest = self.writer.content
        for method, status in zip(self.methods, self.statuses, strict=True):
            rest = rest.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
            head, _, rest = rest.partition(b"\r\n\r\n")
            first, *fields = head.split(b"\r\n")
            must(re.fullmatch(rb"HTTP/1\.1 %d [ -~]+" % status, first), f"status line {first!r}")
            must(all(re.fullmatch(rb"[A-Za-z-]+: [ -~]*", line) for line in fields), f"answer's head {head!r}")
            must(status == 200 or 400 <= status < 500 or status in (501, 505), f"status {status}")
            length = next(int(line[16:]) for line in fields if line.startswith(b"Content-Length: "))
            if method == "HEAD":
                continue
            must(len(rest) >= length, "a body is shorter than its length")
            must(json.loads(rest[:length])["ok"] is (status == 200), "an answer's ok")
            rest = rest[length:]
        must(rest in (b"", b"HTTP/1.1 100 Continue\r\n\r\n"), f"after the last answer: {rest[:50]!r}")


def in_pieces(stream: bytes) -> list[bytes]:
    size = 1 + len(stream) // 150
    return [stream[start : start + size] for start in range(0, len(stream), size)]


def plainly(method: str, target: str, headers: dict[str, str], body: bytes) -> bytes:
    """A request as a proxy would write it anew."""
    framing = ("content-length", "transfer-encoding", "connection", "expect")
    lines = [f"{name}: {value}" for name, value in headers.items() if name not in framing]
    head = "\r\n".join([f"{method} {target} HTTP/1.1", *lines, f"Content-Length: {len(body)}"])
    return head.encode("latin-1") + b"\r\n\r\n" + body


def seen_by_h11(stream: bytes) -> Iterator[tuple[str, str, bytes | None]]:
    """Method, path and body (None: not all there) of the requests in a stream, as far as h11 likes it."""
    peer = h11.Connection(h11.SERVER, max_incomplete_event_size=100_000)
    peer.receive_data(stream)
    while isinstance(request := peer.next_event(), h11.Request):
        method, target = request.method.decode(), request.target.decode()
        body = b""
        while isinstance(event := peer.next_event(), h11.Data):
            body += bytes(event.data)
        complete = isinstance(event, h11.EndOfMessage)
        path = re.sub("^(?i:https?)://[^/?#]+", "", target).partition("?")[0] or "/"
        yield method, path, body if complete else None
        if not complete or peer.their_state is not h11.DONE:
            return
        peer.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
        peer.send(h11.EndOfMessage())
        if peer.our_state is not h11.DONE:
            return
        peer.start_next_cycle()


def compare_with_h11(stream: bytes, told: Conversation) -> None:
    theirs: list[tuple[str, str, bytes | None]] = []
    with contextlib.suppress(h11.RemoteProtocolError):
        theirs.extend(seen_by_h11(stream))
    for request, (method, path, body) in zip(told.admitted, theirs, strict=False):
        must(request.method in (method, "other"), f"h11 sees {method}, we see {request.method}")
        must(request.path == path or not request.path, f"h11 sees {path!r}, we see {request.path!r}")
        if request.body and body is not None:
            must(request.body == body, f"h11 sees the body {body!r}, we see {request.body!r}")


class HttpTarget:
    """The parser of requests and the connection around it."""

    words = (
        "GET ", "POST ", "HEAD ", "DELETE ", " HTTP/1.1\r\n", " HTTP/1.0\r\n", "\r\n\r\n", "Host: x\r\n",
        "Content-Length: 2\r\n", "Transfer-Encoding: chunked\r\n", "Connection: close\r\n", "keep-alive",
        "Expect: 100-continue\r\n", "Content-Type: application/json\r\n", "X-Request-Id: abc\r\n", "0\r\n\r\n",
        "5\r\n", ";a=b", "/echo", "/query?", "/message/", "%2f", "%00", "%2e%2e", "http://x", "{}", '{"a":1}',
        "X-API-Token: wrong\r\n", "\r\n ", "identity", "gzip", "+json", ", ", "Content-Encoding: ", "\\ud800",
    )  # fmt: skip
    seeds = (
        b"GET /query?a=b&c=%20 HTTP/1.1\r\nHost: x\r\n\r\n",
        b'POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\n{"a":1}GET /message/a%2Fb HTTP/1.1\r\nHost: x\r\n\r\n',
        b"POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\n{}\r\n0\r\nA: b\r\n\r\nHEAD /query HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
        b"GET http://x/query HTTP/1.0\r\nConnection: keep-alive\r\nX-Request-Id: abc\r\n\r\nDELETE /account/x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: x\r\nX-API-Token: wrong\r\n\r\n" * 3,
        b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3000\r\n\r\n" + b"x" * 3000,
        b'POST /echo HTTP/1.1\r\nHost: x\r\nContent-Type: a/b+json; c\r\nContent-Length: 22\r\n\r\n{"a":[1e5,"\\ud83d\\n"]}',
    )

    def __init__(self, mailproxy: Any) -> None:
        self._mailproxy = mailproxy
        mailproxy.HTTP_HEAD_BYTES, mailproxy.HTTP_HEADERS = HEAD_BYTES, HEADERS
        self._loop = asyncio.new_event_loop()

    def talk(self, pieces: list[bytes]) -> Conversation:
        told = self._loop.run_until_complete(Conversation(self._mailproxy, pieces).run())
        told.refuse_malformed_answers()
        return told

    def attempt(self, stream: bytes) -> str:
        whole, slow = self.talk([stream]), self.talk(in_pieces(stream))
        short, long = sorted((whole.served, slow.served), key=len)
        must(long[: len(short)] == short, "in pieces other requests are seen")
        if len(short) < len(long):
            last = (whole if whole.served is short else slow).statuses[-1]
            must(last >= 400, "in pieces fewer requests are seen, and none was refused")
        for request in whole.served:
            self.refuse_other_reading(request)
        if h11 is not None:
            compare_with_h11(stream, whole)
        return "requests" if whole.served else "refused"

    def refuse_other_reading(self, request: tuple[str, str, dict[str, str], dict[str, str], bytes]) -> None:
        method, path, query, headers, body = request
        if query or "\udcff" in path or len(headers) >= HEADERS:
            return
        again = self.talk([plainly(method, path, {"host": "x", **headers}, body)])
        size = sum(len(name) + len(value) + 4 for name, value in headers.items()) + len(path)
        if size > HEAD_BYTES - 100:
            return
        must(len(again.served) == 1, f"written down plainly it is refused: {again.writer.content!r}")
        must(again.served[0][0:2] == (method, path), "written down plainly it is for something else")
        must(again.served[0][4] == body, "written down plainly it has another body")


# -- submission by SMTP


class SmtpTarget:
    """A session, with a server that takes every mail."""

    words = (
        "EHLO x\r\n", "HELO x\r\n", "MAIL FROM:<a@b.c>", "RCPT TO:<d@e.f>\r\n", "DATA\r\n", "\r\n.\r\n", ".\r\n", "..", "RSET\r\n",
        "QUIT\r\n", "NOOP\r\n", "AUTH PLAIN ", "AUTH LOGIN ", "AGEAYg==", "STARTTLS\r\n", " SIZE=5", " BODY=8BITMIME", " SMTPUTF8",
        "VRFY x\r\n", "<>", "<@x:a@b.c>", '<"a b"@c>', "Subject: x\r\n", "X-Mailproxy-Id: y\r\n", "\r", "\n", "\r\r\n", "\n.\n", "root",
    )  # fmt: skip
    seeds = (
        b"EHLO x\r\nMAIL FROM:<a@b.c> SIZE=5\r\nRCPT TO:<d@e.f>\r\nDATA\r\nSubject: x\r\n\r\n..\r\n.\r\nQUIT\r\n",
        b"AUTH LOGIN\r\nYQ==\r\nYg==\r\nMAIL FROM:<>\r\nRCPT TO:<root>\r\nRCPT TO:<x>\r\nDATA\r\n.\r\nRSET\r\nNOOP\r\n",
        b"MAIL FROM:<a@b.c>\r\nRCPT TO:<d@e.f>\r\nDATA\r\na\n.\r\nb\r.\r\n.\nc\r\n.\r\nMAIL FROM:<e@f.g>\r\nRCPT TO:<h@i.j>\r\nDATA\r\nx\r\n.\r\n",
        b"AUTH PLAIN AGEAYg==\r\nNOOP "
        + b"x" * 4096
        + b"\r\nMAIL FROM:<a@b.c>\r\nRCPT TO:<d@e.f>\r\nDATA\r\n"
        + b"x" * 2000
        + b"\r\n.\r\n",
    )

    def __init__(self, mailproxy: Any) -> None:
        self._mailproxy = mailproxy
        self._loop = asyncio.new_event_loop()

    def talk(self, pieces: list[bytes]) -> tuple[bytes, list[Any]]:
        mails: list[Any] = []

        async def take(mail: Any) -> str:
            mails.append(mail)
            fields = mail.submission({}, "host")
            with contextlib.suppress(self._mailproxy.Rejected):
                self._mailproxy.parse_message(fields)
            return str(self._mailproxy.reply_to_submission("x", None))

        async def said() -> bytes:
            names = self._mailproxy.LocalNames("local.test", "host", None, {})
            server = self._mailproxy.SmtpServer(take, names, most_bytes=lambda: 1000)
            written = Written()
            await self._mailproxy.SmtpSession(server, Pieces(pieces), written).run()
            return written.content

        return self._loop.run_until_complete(said()), mails

    def attempt(self, stream: bytes) -> str:
        replies, mails = self.talk([stream])
        again, same = (
            self.talk(in_pieces(stream)),
            partial(re.sub, rb"552 5.3.4 .*|554 5.6.0 .*", b"(too large, or a bare CR)"),
        )
        must((same(replies), mails) == (same(again[0]), again[1]), "in pieces there are other replies or mails")
        must(re.fullmatch(rb"(?:[2-5]\d\d[ -][^\r\n\0]*\r\n)+", replies), f"replies {replies!r}")
        for mail in mails:
            lines = mail.content.count(b"\r\n")
            must(mail.content.count(b"\r") == lines == mail.content.count(b"\n"), "a line end that is none")
            wire = re.sub(rb"(?m)^\.", b"..", mail.content) + b".\r\n"
            must(
                re.search(rb"(?i)DATA\r\n" + re.escape(wire), stream) or b"\r\n." in stream, "a mail that was not sent"
            )
            must(mail.recipients and len(mail.content) <= 1000, "a mail beyond its limits")
        return "mails" if mails else "none"


# -- addresses


class AddressTarget:
    """Mailboxes in a string."""

    words = ("@", "<", ">", '"', '\\"', "\\\\", "(", ")", ",", ", ", ".", "[", "]", "[IPv6:", "[127.0.0.1]", "=?utf-8?q?",
             "=?utf-8?b?", "?=", "xn--", "ü", "ß", "。", "example.com", "a@b", "ok@example.com", " ", "\r\n", "=0d=0a", "\u2028")  # fmt: skip
    seeds = tuple(
        text.encode()
        for text in (
            "ok@example.com",
            "a@b, Some Name <c@d.example>",
            '"Quoted, \\"Name\\"" <e@f.example>',
            "g@h.example (comment)",
            '"local part"@example.com',
            "x@[127.0.0.1]",
            "x@[IPv6:::1]",
            "Jürgen <jürgen@bücher.example>",
            "=?utf-8?q?J=C3=BCrgen?= <j@example.com>",
            "=?utf-8?b?SsO8cmdlbg==?= <j@straße.example>",
            ", ,a@b;",
        )
    )

    def __init__(self, mailproxy: Any) -> None:
        self._mailproxy = mailproxy

    def mutate(self, content: bytes, most: int, seed: int) -> bytes:
        """Text stays text half of the time, with a word in it that means something to addresses."""
        dice = random.Random(seed)
        if dice.random() < 0.5:
            return byte_mutation(content, most)
        text = content.decode("utf-8", "replace")
        start, end = sorted((dice.randrange(len(text) + 1), dice.randrange(len(text) + 1)))
        pieces = [text[:start], dice.choice(self.words), text[dice.choice((start, end)) :]]
        if dice.random() < 0.2:
            pieces += [", ", dice.choice(self.seeds).decode()]
        if dice.random() < 0.2:
            pieces[1] = chr(
                dice.choice((dice.randrange(0x100), dice.randrange(0xD800), dice.randrange(0xE000, 0x11000)))
            )
        return "".join(pieces).encode()[:most]

    def attempt(self, content: bytes) -> str:
        text = content.decode("utf-8", "surrogateescape")
        try:
            mailboxes = self._mailproxy.parse_mailboxes(text, "to")
        except self._mailproxy.Rejected as reason:
            must(str(reason).startswith("invalid to: "), f"reason {reason}")
            str(reason).encode()
            return "refused"
        for mailbox in mailboxes:
            refuse_odd_address(self._mailproxy, mailbox.address)
        refuse_other_header(self._mailproxy, mailboxes)
        return "accepted" if mailboxes else "empty"


def refuse_odd_address(mailproxy: Any, address: str) -> None:
    local_part, at, domain = address.rpartition("@")
    must(at and local_part, f"{address!r} is not local@domain")
    must(address.isprintable(), f"{address!r} is not printable")
    must(re.fullmatch(r"[A-Za-z0-9.-]+|\[[0-9A-Fa-fIPVipv.:]+\]", domain), f"{domain!r} is not a domain")
    must(len(address.encode()) <= 254 and len(local_part.encode()) <= 64, f"{address!r} is too long")
    quoted = local_part.startswith('"') and local_part.endswith('"')
    must(quoted or not re.search(r'[\s<>()\[\],;:"\\@]', local_part), f"{address!r} has specials")
    must(mailproxy.parse_addr_spec(address, "to") == address, f"{address!r} reads differently")
    must(mailproxy.parse_mailboxes(address, "to") == (mailproxy.Mailbox("", address),), f"{address!r} in a list")


def refuse_other_header(mailproxy: Any, mailboxes: Any) -> None:
    """The header made of mailboxes says the same of them."""
    if not mailboxes:
        return
    header = mailproxy._address_header("Reply-To", mailboxes)
    lines = header.split("\r\n")
    must(not any("\r" in line or "\n" in line or "\0" in line for line in lines), f"line break in {header!r}")
    must(max(len(line.encode()) for line in lines) <= 998, "a line is too long")
    must(all(line.startswith(" ") and line.strip() for line in lines[1:]), f"bad fold in {header!r}")
    unfolded = "".join(lines).partition(":")[2].strip()
    again = mailproxy.parse_mailboxes(unfolded, "to")
    written = [mailproxy.addr_spec(one.address) for one in mailboxes]
    must([mailproxy.addr_spec(one.address) for one in again] == written, f"{unfolded!r}: {again}")
    for one, other in zip(again, mailboxes, strict=True):
        if sum(map(len, mailproxy._encoded_words(other.name, beside=9))) < 500:  # longer ones are not decoded
            must(plain_name(one.name) == plain_name(other.name), f"{other.name!r} comes back as {one.name!r}")


def plain_name(name: str) -> str:
    return " ".join(name.split())


# -- submissions and accounts


def json_or_none(mailproxy: Any, body: bytes) -> Any:
    """The object of a body, or None when it is refused as it should be; read in pieces it is the same."""
    in_pieces = answer_in_pieces(mailproxy, body)
    try:
        content = mailproxy.parse_json_object(body)
        must(in_pieces == content, f"in pieces it is {in_pieces!r}")
        return content
    except mailproxy.HttpError as error:
        must(in_pieces == error.error, f"in pieces it is {in_pieces!r}")
        must(error.status == 400, f"status {error.status}")
        must(json.loads(error.response().body)["ok"] is False, "an answer that says no")
        return None


def answer_in_pieces(mailproxy: Any, body: bytes) -> Any:
    """What reading a body as a large one gives, every string of some length in pieces: an object, or a sentence."""
    mailproxy.LONG_STRING_BYTES, mailproxy.STEP_BYTES = 5, 3
    try:
        return mailproxy.parse_large_json_object(body)
    except mailproxy.HttpError as error:
        return error.error


def refuse_odd_reason(mailproxy: Any, reason: Exception) -> None:
    must(re.match("(missing|invalid) [a-z]", str(reason)), f"reason {reason}")
    mailproxy.json_response({"ok": False, "reason": str(reason)})


class JsonTarget:
    """Bodies of JSON, changed as JSON half of the time."""

    words = (
        '"id"', '"from"', '"to"', '"cc"', '"bcc"', '"reply_to"', '"return_path"', '"subject"', '"body"', '"text"',
        '"html"', '"content_type"', '"headers"', '"message_id"', '"attachments"', '"filename"', '"content"', '"url"',
        '"s3"', '"storage_path"', '"fetch_mode"', '"inline"', '"content_id"', '"raw"', '"priority"', '"deferred_ts"',
        "null", "true", "\\ud800", "\\r\\n", "\\u0000", "1e308", "NaN", "[[", "]]", "@example.com", "=?utf-8?q?",
    )  # fmt: skip
    values = (
        None, True, False, 0, -1, 2**63, 1e300, "", " ", "a@b", "x" * 1100, "é" * 80, "\r\nBcc: a@b", "\0", "\ud800", "<a@b>",
        "=?utf-8?q?=0D=0AX:_y?=", [], {}, ["a@b"], "plain", "html", "message/rfc822", "multipart/mixed; boundary=x", "QQ==",
        "base64:QQ==", "http://a/b", "/etc/passwd", "\u2028", "\u200b", "=?", '"', "\\", "\ufeff", "x \t y", "a/b\\c", "env:HOME",
    )  # fmt: skip

    def mutate(self, body: bytes, most: int, seed: int) -> bytes:
        dice = random.Random(seed)
        mutated = None
        if dice.random() < 0.85:
            with contextlib.suppress(ValueError, RecursionError):
                mutated = json.dumps(self._changed(json.loads(body), dice), ensure_ascii=False)
        if mutated is None:
            return byte_mutation(body, most)
        return mutated.encode("utf-8", "backslashreplace")[:most]

    def _changed(self, value: Any, dice: random.Random) -> Any:
        """The same with one thing in it changed."""
        if isinstance(value, dict) and value and dice.random() < 0.9:
            name = dice.choice(list(value))
            other = {**value, name: self._changed(value[name], dice)}
            if dice.random() < 0.1:
                del other[name]
            if dice.random() < 0.2:
                other[dice.choice(self.words).strip('"')] = dice.choice(self.values)
            return other
        if isinstance(value, list) and value and dice.random() < 0.9:
            place = dice.randrange(len(value))
            return [*value[:place], self._changed(value[place], dice), *value[place + dice.randrange(2) :]]
        if isinstance(value, str) and dice.random() < 0.6:
            start, end = sorted((dice.randrange(len(value) + 1), dice.randrange(len(value) + 1)))
            word = dice.choice(
                [other for other in self.values if isinstance(other, str)] + ["", chr(dice.randrange(0x3000))]
            )
            return value[:start] + word + value[dice.choice((start, end)) :]
        return dice.choice(self.values)


class SubmissionTarget(JsonTarget):
    """One message: from the body of a request to the wire, by way of the queue."""

    seeds = tuple(
        json.dumps({"id": "x", "from": "Me <me@example.com>", "to": ["a@b.example", "C <c@d.example>"], **more}).encode()
        for more in (
            {"subject": "hello", "body": "text"},
            {"subject": "é", "text": "a\nb", "html": "<p>ü</p>", "cc": "x@y", "bcc": ["z@y"], "reply_to": "r@s"},
            {"subject": "", "body": "<b>", "content_type": "html", "headers": {"X-A": ["b", 1], "Reply-To": "q@r"}},
            {"subject": "s", "body": "b", "message_id": "<l@r>", "priority": "high", "deferred_ts": 1, "batch_code": "b"},
            {"subject": "s", "html": "h", "attachments": [
                {"filename": "a.txt", "content": "QQ=="}, {"filename": "é.png", "content": "QUI=", "content_id": "c", "inline": True}]},
            {"subject": "s", "body": "b", "attachments": [
                {"filename": "m.eml", "content": "QTogYg0KDQpj", "content_type": "message/rfc822"}, {"storage_path": "base64:QQ==", "filename": "f"}]},
            {"subject": "s", "body": "b", "attachments": [{"filename": "u", "url": "https://a.example/b"},
                {"filename": "k", "s3": {"bucket": "b", "key": "k", "region": "r"}}, {"filename": "p", "storage_path": "v:x/y"}]},
            {"raw": base64.b64encode(b"Subject: x\r\nBcc: y@z\r\nMessage-ID: <a@b>\r\n\r\nbody\n.\r\n").decode()},
            {"raw": "U3ViamVjdDogeA==", "subject": "ignored", "colour": {"a": [1]}},
        )
    )  # fmt: skip

    def __init__(self, mailproxy: Any) -> None:
        self._mailproxy = mailproxy

    def attempt(self, body: bytes) -> str:
        fields = json_or_none(self._mailproxy, body)
        if fields is None:
            return "no JSON"
        try:
            message = self._mailproxy.parse_message(fields, new_id=lambda: "new")
        except self._mailproxy.Rejected as reason:
            refuse_odd_reason(self._mailproxy, reason)
            return "refused"
        self.refuse_other_when_kept(fields, message)
        return "accepted"

    def refuse_other_when_kept(self, fields: Any, message: Any) -> None:
        mailproxy = self._mailproxy
        kept, contents = mailproxy.stored_form(fields, message)
        kept.encode()
        again = mailproxy.parse_message(json.loads(kept), contents=contents, message_id=message.message_id)
        given = mailproxy.restored_fields(json.loads(kept), contents)
        mailproxy.json_response({"message": given})
        resubmitted = mailproxy.parse_message(given, new_id=lambda: "new")
        content = self.composed(message)
        must(content == self.composed(again), "composed after it was kept it is another message")
        must(message.recipients == again.recipients, "after it was kept it has other recipients")
        must(resubmitted.recipients == message.recipients, "submitted again it has other recipients")
        must(content == self.composed(resubmitted), "submitted again it is another message")
        for address in (*message.recipients, *filter(None, [message.return_path])):
            refuse_odd_address(mailproxy, address)
        self.refuse_odd_content(message, content)

    def composed(self, message: Any) -> bytes:
        parts = [
            attachment._replace(
                content_type=attachment.content_type or "text/plain", content=attachment.content or b"fetched"
            )
            for attachment in message.attachments
        ]
        return self._mailproxy.compose(message, parts, date=NOW)

    def refuse_odd_content(self, message: Any, content: bytes) -> None:
        bare = content.replace(b"\r\n", b"")
        must(b"\r" not in bare and b"\n" not in bare, "a bare CR or LF")
        must(b"\0" not in content, "a NUL")
        read = email.message_from_bytes(content)
        must(not read.get_all("Bcc"), "the Bcc is shown")
        if message.raw is not None:
            return
        must(max(map(len, content.split(b"\r\n"))) <= 998, "a line is too long")
        must(not read.defects, f"defects {read.defects}")
        counts = Counter(name.lower() for name in read)
        for name in ("from", "to", "subject", "date", "message-id", "mime-version", "content-type"):
            must(counts[name] == 1, f"{counts[name]} times {name}")
        allowed = {"from", "to", "cc", "reply-to", "subject", "date", "message-id", "mime-version", "content-type",
                   "content-transfer-encoding", *(name.lower() for name, _ in message.headers)}  # fmt: skip
        must(set(counts) <= allowed, f"headers nobody asked for: {set(counts) - allowed}")
        leaves = [part for part in read.walk() if not part.is_multipart()]
        texts = (message.text is not None) + (message.html is not None)
        if not any(part.get_content_type() == "message/rfc822" for part in read.walk()):
            must(len(leaves) == texts + len(message.attachments), "parts were lost or made up")


class AccountTarget(JsonTarget):
    """The definition of an account."""

    words = (
        '"id"', '"host"', '"port"', '"user"', '"password"', '"use_tls"', '"implicit_tls"', '"start_tls"', '"auth"',
        '"oauth2"', '"token_url"', '"client_id"', '"client_secret"', '"refresh_token"', '"scope"', '"ttl"', '"timeout"',
        '"limit_per_minute"', '"retry_delays"', '"max_age_seconds"', '"ca_file"', "xoauth2", "required", "465",
        '"account_replies"', '"hostname"', "550 5.4.5", "554 daily limit", "oauthbearer", "[192.0.2.1]", ":25",
    )  # fmt: skip
    seeds = tuple(
        json.dumps({"id": "x", "host": "mail.example.com", "port": 587, **more}).encode()
        for more in (
            {},
            {"user": "u", "password": "s3cret", "use_tls": True, "ttl": 1.5, "retry_delays": [1, 2]},
            {"port": "465", "auth": "xoauth2", "oauth2": {
                "token_url": "https://a/b", "client_id": "c", "client_secret": "s3cret", "scope": "s"}},
            {"start_tls": "required", "limit_per_minute": 5, "limit_behavior": "error", "retry_delays": "1,2"},
            {"oauth2_token_url": "https://a/b", "oauth2_client_id": "c", "oauth2_refresh_token": "s3cret"},
            {"account_replies": ["554 5.7.0", "550 Daily Limit", "421"], "hostname": "mail.example.com", "timeout": None},
            {"account_replies": "554, 550 5.4.5 quota", "hostname": "[192.0.2.1]", "limit_behavior": "reject"},
        )
    )  # fmt: skip

    def __init__(self, mailproxy: Any) -> None:
        self._mailproxy = mailproxy

    def attempt(self, body: bytes) -> str:
        fields = json_or_none(self._mailproxy, body)
        if fields is None:
            return "no JSON"
        try:
            account = self._mailproxy.parse_account(fields)
        except self._mailproxy.Rejected as reason:
            refuse_odd_reason(self._mailproxy, reason)
            return "refused"
        public = self._mailproxy.account_fields(account)
        kept = {key: fields[key] for key in self._mailproxy.ACCOUNT_KEYS & fields.keys() if fields[key] is not None}
        whole = json.dumps(kept)
        must(not {"password", "client_secret", "refresh_token"} & {*public, *(public["oauth2"] or ())}, "a secret")
        must(self._mailproxy.parse_account(json.loads(whole)) == account, "kept and read again it is another")
        self._mailproxy.json_response(public)
        return "accepted"


TARGETS: dict[str, Any] = {
    "http": HttpTarget,
    "smtp": SmtpTarget,
    "addresses": AddressTarget,
    "submission": SubmissionTarget,
    "account": AccountTarget,
}

# -- the fuzzer, in a process of its own: it ends by itself without coming back


class Findings:
    """What was found, one of each kind, written down as it is found."""

    def __init__(self, folder: Path) -> None:
        self.counts: Counter[str] = Counter()
        self._folder = folder
        self._kinds: Counter[str] = Counter()

    def add(self, error: BaseException, content: bytes) -> None:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        line = traceback.extract_tb(error.__traceback__)[-2].lineno if isinstance(error, Wrong) else frame.lineno
        kind = f"{type(error).__name__} at {line}"
        self._kinds[kind] += 1
        if self._kinds[kind] > 3:
            return
        name = f"finding-{len(self._kinds)}-{self._kinds[kind]}"
        (self._folder / name).write_bytes(content)
        (self._folder / f"{name}.txt").write_text(
            f"{type(error).__name__}: {error}"[:600].encode("utf-8", "backslashreplace").decode()
            + "\n\n"
            + "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace").decode()
        )

    def tell(self) -> None:
        (self._folder / "counts.json").write_text(json.dumps(self.counts))


def fuzz(target_name: str, folder: Path, seconds: int, seed: int, corpus: Path) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["mailproxy"]):
        import mailproxy
    target = TARGETS[target_name](mailproxy)
    findings = Findings(folder)
    (folder / "words").write_text("\n".join(f'"{libfuzzer_escaped(word)}"' for word in target.words))
    seeds = folder / "seeds"
    seeds.mkdir()
    for number, content in enumerate(target.seeds):
        (seeds / str(number)).write_bytes(content)

    def one(content: bytes) -> None:
        try:
            findings.counts[target.attempt(content)] += 1
        except Exception as error:
            findings.counts["wrong"] += 1
            findings.add(error, content)
        if sum(findings.counts.values()) % TELL_EVERY == 0:
            findings.tell()

    options = {"custom_mutator": target.mutate} if hasattr(target, "mutate") else {}
    atheris.Setup(
        [sys.argv[0], f"-max_total_time={seconds}", f"-seed={seed}", f"-max_len={LONGEST_INPUT}", f"-timeout={STUCK_S}",
         f"-dict={folder / 'words'}", f"-artifact_prefix={folder}/stuck-", "-print_final_stats=1", "-rss_limit_mb=1500", str(corpus), str(seeds)],
        one, **options,
    )  # fmt: skip
    atheris.Fuzz()


def libfuzzer_escaped(word: str) -> str:
    return "".join(chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}" for byte in word.encode())


# -- what is printed


def run(target: str, seconds: int, seed: int, corpus: Path, folder: Path) -> int:
    command = [sys.executable, __file__, target, "--seconds", str(seconds), "--seed", str(seed),
               "--corpus", str(corpus), "--inside", str(folder)]  # fmt: skip
    with (folder / "log").open("wb") as log:
        status = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=seconds + 300, check=False
        ).returncode
    words = (folder / "log").read_text("utf-8", "replace")
    tried = re.search(r"stat::number_of_executed_units: *(\d+)", words)
    covered = re.findall(r"cov: (\d+)", words)
    found = sorted(path for path in folder.iterdir() if re.match(r"finding-\d+-\d+$|stuck-", path.name))
    for path in found:
        told = folder / f"{path.name}.txt"
        print(f"{path}: {told.read_text().splitlines()[0] if told.exists() else 'took too long, or too much memory'}")
    if status and not found:
        print(f"the fuzzer ended with {status}:\n{words[-3000:]}")
    counts = json.loads((folder / "counts.json").read_text()) if (folder / "counts.json").exists() else {}
    print(json.dumps({
        "target": target, "seconds": seconds, "seed": seed, "executions": int(tried[1]) if tried else None,
        "edges_covered": int(covered[-1]) if covered else None, "outcomes": counts, "found": len(found),
        "h11": target == "http" and h11 is not None,
    }))  # fmt: skip
    return 1 if found or status else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--corpus", type=Path, help="inputs to begin with; interesting new ones are added")
    parser.add_argument("--input", type=Path, help="try the content of this file, and nothing else")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.input:
        import mailproxy

        print(TARGETS[options.target](mailproxy).attempt(options.input.read_bytes()))
        return 0
    if options.inside:
        fuzz(options.target, options.inside, options.seconds, options.seed, options.corpus)
    folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{options.target}-"))
    corpus = options.corpus or folder / "corpus"
    corpus.mkdir(exist_ok=True)
    return run(options.target, options.seconds, options.seed, corpus, folder)


if __name__ == "__main__":
    sys.exit(main())
