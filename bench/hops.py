"""How many functions of mailproxy.py one request enters: what a newcomer has to read to follow it.

    python3 bench/hops.py [--list] [--budget]

Runs a daemon in this process, with a server of mail and one of files on 127.0.0.1, and counts the distinct
functions of the file that are entered (sys.setprofile, in every thread) by

    post        one POST of one message, from its connection to the commit
    delivery    one message, from its claim to its recorded outcome, over a new connection
    kept        the same over a connection that has carried mail before
    attachment  what a file to be fetched from a URL adds to that, from the claim to the transaction

Lambdas and comprehensions belong to the function they stand in and do not count, nor does what an idle daemon
enters. --list prints the functions in the order in which they are entered first. --budget ends with status 1 when
a count, or the number of lines of the file, is over its budget.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import http.server
import json
import sqlite3
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PROGRAM = Path(__file__).resolve().parent.parent / "mailproxy.py"
sys.path.insert(0, str(PROGRAM.parent))

from rig import wait_until  # noqa: E402
from sinks import Manner, SmtpSession  # noqa: E402

import mailproxy  # noqa: E402

# Where a path begins (this function counts) and ends (this one does not); what is below a loop that only
# happens to turn meanwhile is left out.
CONNECTED, COMMITTED = "Listener._connected", "Metrics.label"
CLAIMED, TRANSACTION, RECORDED = "_claim_of", "Session.transact", "SendWindows.count"
DISPATCHER, REPORTER = "Dispatcher.run", "Reporter.run"
BUDGET = {"post": 40, "delivery": 85, "attachment": 65}
LINES_BUDGET = 12_300


class Recorder:
    """Notes each function of the file that is entered while it is on, and in which order."""

    def __init__(self) -> None:
        self._on = False
        self._left_out: tuple[str, ...] = ()
        self._entered: list[str] = []

    def profile(self, frame: FrameType, what: str, _: object) -> None:
        if self._on and what == "call" and is_ours(frame.f_code) and not self._belongs_elsewhere(frame):
            self._entered.append(frame.f_code.co_qualname)

    def _belongs_elsewhere(self, frame: FrameType | None) -> bool:
        """True below a loop that is not looked at."""
        while frame is not None:
            if frame.f_code.co_qualname in self._left_out:
                return True
            frame = frame.f_back
        return False

    @contextlib.contextmanager
    def on(self, *left_out: str) -> Iterator[list[str]]:
        """All that is entered meanwhile, each function as often as it is."""
        self._entered, self._left_out, self._on = [], left_out, True
        try:
            yield self._entered
        finally:
            self._on = False


def between(entered: list[str], first: str, end: str) -> list[str]:
    """The distinct functions from the first on, until the one that ends the path."""
    begin = entered.index(first)
    return list(dict.fromkeys(entered[begin : entered.index(end, begin)]))


def is_ours(code: CodeType) -> bool:
    return code.co_filename == mailproxy.__file__ and not code.co_name.startswith("<")


class Files(http.server.BaseHTTPRequestHandler):
    """Serves the same small file at every path."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 1000)

    def log_message(self, *_: object) -> None:
        pass


def serve_mail() -> int:
    """An SMTP sink in a thread of its own; its port."""
    ready: list[int] = []

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: SmtpSession(Manner(), lambda *_: None, set()), "127.0.0.1", 0)
        ready.append(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
    wait_until(lambda: bool(ready), 10, lambda: "an SMTP sink")
    return ready[0]


def serve_files() -> int:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


class Visit:
    """The client's side of the daemon, and what it entered for it."""

    def __init__(self, url: str, db: Path, recorder: Recorder) -> None:
        self._address, self._db, self._recorder = urllib.parse.urlsplit(url).netloc, db, recorder

    def post(self, **message: Any) -> None:
        """Head and body each on their own, as most clients write them: it enters more than what comes in one piece."""
        fields = {"from": "a@example.com", "to": ["b@example.net"], "subject": "Hello", "body": "x" * 1000}
        body = json.dumps({"messages": [fields | message]}).encode()
        connection = http.client.HTTPConnection(self._address, timeout=30)
        with contextlib.closing(connection):
            connection.putrequest("POST", "/commands/add-messages")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders()
            time.sleep(0.1)
            connection.send(body)
            assert json.load(connection.getresponse())["queued"] == 1

    def posting(self, id_: str) -> list[str]:
        with self._recorder.on(DISPATCHER, REPORTER) as entered:
            self.post(id=id_, deferred_ts=int(time.time()) + 3600)
        return between(entered, CONNECTED, COMMITTED)

    def delivering(self, id_: str, end: str, **message: Any) -> list[str]:
        self.post(id=id_, deferred_ts=int(time.time()) + 2, **message)
        time.sleep(0.5)
        with self._recorder.on(REPORTER) as entered:
            wait_until(lambda: self._is_sent(id_), 30, lambda: f"{id_} delivered")
            time.sleep(0.2)
        return between(entered, CLAIMED, end)

    def _is_sent(self, id_: str) -> bool:
        with contextlib.closing(sqlite3.connect(self._db)) as db:
            row = db.execute("SELECT sent_ts, error FROM messages WHERE id = ?", [id_]).fetchone()
        assert row[1] is None, row[1]
        return row[0] is not None

    def idling(self) -> list[str]:
        time.sleep(0.5)
        with self._recorder.on() as entered:
            time.sleep(2)
        return entered

    def all(self, files_url: str) -> dict[str, list[str]]:
        """The first post and the first message are for what is done only once."""
        self.posting("first")
        time.sleep(2)
        paths = {"post": self.posting("second")}
        idle = set(self.idling())
        paths["delivery"] = self.delivering("third", RECORDED)
        paths["kept"] = self.delivering("fourth", RECORDED)
        unusual = {"cc": ["c@example.net"]}
        plain = self.delivering("fifth", TRANSACTION, **unusual)
        files = [{"filename": "a.txt", "url": files_url}]
        fetched = self.delivering("sixth", TRANSACTION, **unusual, attachments=files)
        paths["attachment"] = [name for name in fetched if name not in plain]
        return {path: [name for name in entered if name not in idle] for path, entered in paths.items()}


def measured() -> dict[str, list[str]]:
    recorder = Recorder()
    threading.setprofile(recorder.profile)
    with tempfile.TemporaryDirectory(prefix="mailproxy-hops-") as folder:
        db = Path(folder, "queue.db")
        settings = mailproxy.load_settings(None, {}, {
            "storage.db_path": str(db), "server.port": "0", "logging.level": "error",
            "smtp.host": "127.0.0.1", "smtp.port": str(serve_mail()), "attachments.allow_hosts": "127.0.0.1",
        })  # fmt: skip
        files_url = f"http://127.0.0.1:{serve_files()}/a.txt"
        return asyncio.run(visited(settings, lambda url: Visit(url, db, recorder).all(files_url), recorder))


async def visited(settings: Any, visit: Callable[[str], Any], recorder: Recorder) -> Any:
    """What a visit to a running daemon gives."""
    loop = asyncio.get_running_loop()
    where: asyncio.Future[str] = loop.create_future()
    daemon = mailproxy.Daemon(settings, {})
    sys.setprofile(recorder.profile)
    running = asyncio.create_task(daemon.run(started=where.set_result, signals=False))
    try:
        return await loop.run_in_executor(None, visit, await where)
    finally:
        daemon.stop()
        await running
        sys.setprofile(None)


def main() -> int:
    parser = argparse.ArgumentParser(description="How many functions of mailproxy.py one request enters.")
    parser.add_argument("--list", action="store_true", help="print the functions, too")
    parser.add_argument("--budget", action="store_true", help="status 1 when something is over its budget")
    options = parser.parse_args()
    found = measured()
    counts = {name: (len(entered), BUDGET.get(name)) for name, entered in found.items()}
    counts["lines"] = (PROGRAM.read_text().count("\n"), LINES_BUDGET)
    for name, (number, budget) in counts.items():
        print(f"{name:12}{number:7}" + (f"   budget {budget}" if budget else ""))
        for entered in found.get(name, []) if options.list else []:
            print(f"    {entered}")
    over = any(budget and number > budget for number, budget in counts.values())
    return int(options.budget and over)


if __name__ == "__main__":
    sys.exit(main())
