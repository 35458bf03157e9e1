"""Load generators, each run in a process of its own: HTTP posts, bare SMTP clients, a probe of the event loop.

They send bytes that were made beforehand and look at no more of an answer than they must, so that they
are far from being what limits the figures. The bare SMTP clients are the ceilings of delivery.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import itertools
import json
import os
import smtplib
import ssl
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

import rig

SENDER, RECIPIENT = "bench@sender.example", "someone@receiver.example"
TEXT = "\r\n".join("All work and no play makes for a dull message, said the postmaster....." for _ in range(14))

# -- what is sent


def message(key: str, **more: object) -> dict[str, object]:
    """A message of 1 kB of text for one recipient."""
    return {
        "id": key, "from": SENDER, "to": [RECIPIENT], "subject": f"Bench {key}", "body": TEXT, **more,
    }  # fmt: skip


def messages(prefix: str, count: int, **more: object) -> list[dict[str, object]]:
    return [message(f"{prefix}-{number}", **more) for number in range(count)]


def post_bytes(batch: list[dict[str, object]]) -> bytes:
    body = json.dumps({"messages": batch}).encode()
    head = (
        f"POST /commands/add-messages HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def mail_bytes() -> bytes:
    """The same message as the SMTP clients send it, made once."""
    return (
        f"From: {SENDER}\r\nTo: {RECIPIENT}\r\nSubject: Bench\r\nMessage-ID: <bench@sender.example>\r\n"
        f"Date: Thu, 01 Jan 2026 00:00:00 +0000\r\nMIME-Version: 1.0\r\n"
        f"Content-Type: text/plain; charset=utf-8\r\n\r\n{TEXT}\r\n"
    ).encode()


# -- posts


class Posted(NamedTuple):
    """What a run of posts gave."""

    began: float  # on the monotonic clock, which all processes share
    seconds: float
    latencies_s: list[float]  # sorted
    refused: int


class PostConnection(asyncio.Protocol):
    """Keeps one request on the way until there are no more."""

    def __init__(self, requests: Iterator[bytes], latencies_s: list[float]) -> None:
        self._requests, self._latencies_s = requests, latencies_s
        self._heard = b""
        self.refused = 0
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError("the daemon closed a connection with a request on the way"))

    def send_next(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self.done.set_result(None)
            self._transport.close()
            return
        self._sent_at = time.perf_counter()
        self._transport.write(request)

    def data_received(self, piece: bytes) -> None:
        self._heard += piece
        head, found, body = self._heard.partition(b"\r\n\r\n")
        if not found or len(body) < content_length(head):
            return
        self._latencies_s.append(time.perf_counter() - self._sent_at)
        if not head.startswith(b"HTTP/1.1 200") or b'"rejected": [{' in body:
            self.refused += 1
        self._heard = b""
        self.send_next()


def content_length(head: bytes) -> int:
    _, _, after = head.lower().partition(b"content-length:")
    return int(after.partition(b"\r\n")[0])


def run_posts(ports: list[int], prefix: str, count: int, connections: int, batch: int = 1) -> Posted:
    """Submit `count` messages, `batch` in a request, over so many kept connections, which go to the ports in turn."""
    all_messages = messages(prefix, count)
    requests = [post_bytes(all_messages[first : first + batch]) for first in range(0, count, batch)]
    return asyncio.run(_run_posts(ports, requests, connections))


async def _run_posts(ports: list[int], requests: list[bytes], connections: int) -> Posted:
    loop = asyncio.get_running_loop()
    left, latencies_s = iter(requests), []
    clients = [
        (await loop.create_connection(lambda: PostConnection(left, latencies_s), "127.0.0.1", port))[1]
        for _, port in zip(range(connections), itertools.cycle(ports), strict=False)
    ]
    began = time.monotonic()
    for client in clients:
        client.send_next()
    await asyncio.wait_for(asyncio.gather(*(client.done for client in clients)), 600)
    seconds = time.monotonic() - began
    return Posted(began, seconds, sorted(latencies_s), sum(client.refused for client in clients))


def _post_alone(port: int, body: bytes) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/commands/add-messages", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status == 200
    finally:
        connection.close()


def attached_body(key: str, size_bytes: int) -> bytes:
    """A submission of one message with one attachment of that size."""
    content = "QUFB" * (size_bytes // 3)
    return json.dumps({"messages": [message(key, attachments=[{"filename": "a.bin", "content": content}])]}).encode()


def post_attachments(port: int, prefix: str, count: int, size_bytes: int) -> int:
    return sum(_post_alone(port, attached_body(f"{prefix}-{number}", size_bytes)) for number in range(count))


def post_urls(port: int, prefix: str, count: int, file_port: int) -> int:
    """One batch of messages, each with an attachment behind a URL of its own."""
    batch = [
        message(f"{prefix}-{number}", attachments=[{"url": f"http://127.0.0.1:{file_port}/{prefix}-{number}"}])
        for number in range(count)
    ]
    return count if _post_alone(port, json.dumps({"messages": batch}).encode()) else 0


def post_large_batches(port: int, prefix: str, count: int, size_bytes: int) -> int:
    """Batches of 1,000 messages that are so large together."""
    filler = "x" * 70 + "\n"
    taken = 0
    for number in range(count):
        text = filler * (size_bytes // 1000 // len(filler))
        batch = [message(f"{prefix}-{number}-{place}") | {"body": text} for place in range(1000)]
        taken += _post_alone(port, json.dumps({"messages": batch}).encode())
    return taken


# -- bare SMTP clients


class Sent(NamedTuple):
    began: float
    seconds: float


async def _shared_out(count: int, clients: list[Callable[[], Awaitable[Any]]]) -> Sent:
    """Let the clients send `count` messages between them."""
    left = iter(range(count))

    async def work(send: Callable[[], Awaitable[Any]]) -> None:
        for _ in left:
            await send()

    began = time.monotonic()
    await asyncio.wait_for(asyncio.gather(*map(work, clients)), 600)
    return Sent(began, time.monotonic() - began)


def run_aiosmtplib(port: int, count: int, connections: int, login: bool = False) -> Sent:
    """aiosmtplib (the zipapp's own), kept connections, bytes made beforehand. Connecting counts with a login alone."""
    sys.path.insert(0, str(rig.ZIPAPP))
    import aiosmtplib

    content = mail_bytes()

    async def connected() -> aiosmtplib.SMTP:
        smtp = aiosmtplib.SMTP(hostname="127.0.0.1", port=port, use_tls=False, start_tls=False, timeout=60)
        await smtp.connect()
        if login:
            await smtp.login("bench", "secret")
        return smtp

    async def run() -> Sent:
        began = time.monotonic()
        clients = await asyncio.gather(*(connected() for _ in range(connections)))
        ready = time.monotonic()
        sent = await _shared_out(
            count, [lambda smtp=smtp: smtp.sendmail(SENDER, [RECIPIENT], content) for smtp in clients]
        )
        for smtp in clients:
            smtp.close()
        return Sent(began, sent.seconds + ready - began) if login else sent

    return asyncio.run(run())


class BareClient(asyncio.Protocol):
    """Writes a group of commands, waits for as many replies; knows no more of SMTP."""

    def __init__(self) -> None:
        self._heard = b""
        self._wanted = 1
        self._answered = asyncio.get_running_loop().create_future()  # the greeting

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, piece: bytes) -> None:
        self._heard += piece
        lines = self._heard.split(b"\r\n")
        self._heard = lines.pop()
        self._wanted -= sum(line[3:4] != b"-" for line in lines)
        if any(line[:1] not in b"23" for line in lines):
            self._answered.set_exception(RuntimeError(f"the sink said {lines}"))
        elif self._wanted <= 0 and not self._answered.done():
            self._answered.set_result(None)

    async def hear(self) -> None:
        await self._answered

    async def say(self, group: bytes, replies: int) -> None:
        self._wanted = replies
        self._answered = asyncio.get_running_loop().create_future()
        self.transport.write(group)
        await self._answered


ENVELOPE = [f"MAIL FROM:<{SENDER}>\r\n".encode(), f"RCPT TO:<{RECIPIENT}>\r\n".encode()]
COMMANDS, PIPELINED, CHUNKED = "a command at a time", "pipelined", "chunked"


def groups_of(way: str) -> list[tuple[bytes, int]]:
    """One transaction: what is written at once (RFC 2920, RFC 3030), and how many replies that has."""
    content, data = mail_bytes(), b"DATA\r\n"
    if way == CHUNKED:
        return [(b"%b%bBDAT %d LAST\r\n%b" % (*ENVELOPE, len(content), content), 3)]
    commands = [(command, 1) for command in (*ENVELOPE, data)]
    return [*([(b"".join(ENVELOPE) + data, 3)] if way == PIPELINED else commands), (content + b".\r\n", 1)]


def run_bare_smtp(port: int, count: int, connections: int, way: str, ca_file: str | None = None) -> Sent:
    """A bare asyncio client with kept connections; with a CA file it says STARTTLS."""
    groups = groups_of(way)

    async def connected() -> BareClient:
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(BareClient, "127.0.0.1", port)
        await client.hear()
        await client.say(b"EHLO bench.example\r\n", 1)
        if ca_file:
            await client.say(b"STARTTLS\r\n", 1)
            context = ssl.create_default_context(cafile=ca_file)
            secured = await loop.start_tls(client.transport, client, context, server_hostname="127.0.0.1")
            assert secured is not None
            client.transport = secured
            await client.say(b"EHLO bench.example\r\n", 1)
        return client

    async def send(client: BareClient) -> None:
        for group, replies in groups:
            await client.say(group, replies)

    async def run() -> Sent:
        clients = await asyncio.gather(*(connected() for _ in range(connections)))
        sent = await _shared_out(count, [lambda client=client: send(client) for client in clients])
        for client in clients:
            client.transport.close()
        return sent

    return asyncio.run(run())


def mail_with_id(number: int, prefix: str) -> bytes:
    """A mail that never came before."""
    return mail_bytes().replace(b"<bench@", f"<{prefix}-{number}@".encode())


def run_submissions(port: int, prefix: str, count: int, connections: int) -> Posted:
    """Submit mail over so many kept connections: MAIL, RCPT, DATA in one write, then the content."""
    return asyncio.run(_run_submissions(port, [mail_with_id(number, prefix) for number in range(count)], connections))


async def _run_submissions(port: int, mails: list[bytes], connections: int) -> Posted:
    left, latencies_s = iter(mails), []

    async def work(client: BareClient) -> None:
        for mail in left:
            began = time.perf_counter()
            await client.say(b"".join(ENVELOPE) + b"DATA\r\n", 3)
            await client.say(mail + b".\r\n", 1)
            latencies_s.append(time.perf_counter() - began)
        client.transport.close()

    loop = asyncio.get_running_loop()
    clients = [(await loop.create_connection(BareClient, "127.0.0.1", port))[1] for _ in range(connections)]
    for client in clients:
        await client.hear()
        await client.say(b"EHLO bench.example\r\n", 1)
    began = time.monotonic()
    await asyncio.wait_for(asyncio.gather(*map(work, clients)), 600)
    return Posted(began, time.monotonic() - began, sorted(latencies_s), 0)


def run_raw_posts(port: int, prefix: str, count: int, connections: int) -> Posted:
    """The same mails over HTTP, one a post."""
    envelope: dict[str, object] = {"from": SENDER, "to": [RECIPIENT]}
    raws = [base64.b64encode(mail_with_id(number, prefix)).decode() for number in range(count)]
    requests = [post_bytes([{"id": f"{prefix}-{n}", **envelope, "raw": raw}]) for n, raw in enumerate(raws)]
    return asyncio.run(_run_posts([port], requests, connections))


def run_smtplib(port: int, count: int) -> list[float]:
    """What a program without a relay does for each message: connect, log in, send, quit. Seconds of each."""
    took = []
    for _ in range(count):
        began = time.monotonic()
        with smtplib.SMTP("127.0.0.1", port, timeout=60) as smtp:
            smtp.login("bench", "secret")
            smtp.sendmail(SENDER, [RECIPIENT], mail_bytes())
        took.append(time.monotonic() - began)
    return took


# -- a probe of the event loop


class Probe(asyncio.Protocol):
    """GET /health every few milliseconds on the dot, however late the answers are."""

    REQUEST = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"

    def __init__(self) -> None:
        self._asked_at: list[float] = []
        self._answered = 0
        self._last: asyncio.Future[None] | None = None
        self.delays_s: list[float] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def ask(self) -> None:
        self._asked_at.append(time.monotonic())
        self._transport.write(self.REQUEST)

    def data_received(self, piece: bytes) -> None:
        now = time.monotonic()
        for _ in range(piece.count(b"HTTP/1.1 200")):
            self.delays_s.append(now - self._asked_at[self._answered])
            self._answered += 1
        if self._last is not None and self._answered == len(self._asked_at):
            self._last.set_result(None)

    async def answered(self) -> None:
        """Return when all that was asked is answered."""
        self._last = asyncio.get_running_loop().create_future()
        if self._answered < len(self._asked_at):
            await self._last


def run_probes(ports: list[int], stop_file: str, pause_s: float = 0.005) -> list[list[float]]:
    """Probe all the ports at the same instants until there is such a file; the delays of each, sorted."""
    return asyncio.run(_run_probes(ports, lambda: os.path.exists(stop_file), pause_s))


async def _run_probes(ports: list[int], stopped: Callable[[], bool], pause_s: float) -> list[list[float]]:
    loop = asyncio.get_running_loop()
    probes = [(await loop.create_connection(Probe, "127.0.0.1", port))[1] for port in ports]
    while not stopped():
        for probe in probes:
            probe.ask()
        await asyncio.sleep(pause_s)
    await asyncio.wait_for(asyncio.gather(*(probe.answered() for probe in probes)), 30)
    return [sorted(probe.delays_s) for probe in probes]
