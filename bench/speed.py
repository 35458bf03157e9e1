"""How fast mailproxy is, beside what the machine can do at the same moment.

    python3 bench/speed.py [--rounds N] [--quick] [--write docs/speed.md] [ROW ...]

Starts its own daemon from mailproxy.pyz (built when missing), its own servers on 127.0.0.1, and prints one
markdown table. With --quick the counts are a tenth: that shows that all works, the figures mean little. With --write
each row's table takes the place of the one that the page has for it.

The machines this runs on drift by a factor of two within a minute. So ours and its ceiling take turns (A B A B),
the figure is the median of the rounds, the spread the least and the most, the ratio the median of the rounds' own
ratios; "loop" is the time of a fixed piece of work around each run, by which two tables can be compared.

Rows:
    post        posts, one message of 1 kB each, answered after the fsync: 1 connection, 32, 32 while delivering.
                Ceiling: a bare asyncio server that parses the JSON and commits the row, and does nothing else
    batch       the same with 1,000 messages in a post
    submission  mail by SMTP with PIPELINING, 16 connections and one; beside the same mail over HTTP (raw), one a post, and
                beside what Postfix's smtp-source brings into Postfix's smtpd, which fsyncs too
    deliver     from the first post (batches of 1,000) to the last message at the sink, reports going out meanwhile;
                and from a backlog. 16 connections. To a sink with PIPELINING (smtp-sink of Debian's postfix package where
                there is one), and to one with CHUNKING too (ours, in Python: it costs less processor time for a message).
                Ceilings, on the same sink: aiosmtplib with kept connections and ready bytes; a bare asyncio client that
                uses what is offered
    provider    a burst of 100 to a server that takes 300 ms to connect, 200 ms to log in, 100 ms for a message,
                cold, 16 connections; beside aiosmtplib, and smtplib one by one (all 100 of them, once)
    request     what the caller waits: a post to us, or smtplib to that server
    million     a queue file with 1,000,000 scheduled, 200,000 sent and 100,000 ready messages beside an empty one; a search
                through all of them, and posts beside searches
    memory      resident memory: idle, and the peak while 40 messages with 10 MB attached go through, submitted in base64
                and fetched from 40 URLs
    loop        the longest answer time of GET /health, asked every 5 ms, while 25 MB messages are composed and 60 MB
                batches posted; beside a bare server probed at the same instants, which shows what is the machine's part
    start       from the start of the process to the first answer; `--version` of the zipapp; beside a bare Python
    accounts    1,000 accounts beside one: processor time of an idle turn of the dispatcher, and the time from a post to the
                arrival of its message, in turn through all of them
    latency     deliveries per second and connection at 50 ms of round trip: with PIPELINING and CHUNKING, in clear and by
                STARTTLS, with PIPELINING only, with neither. Ceiling: a bare asyncio client that uses what is offered
    postgres    the queue in PostgreSQL (as it comes: every commit is on its disk), beside SQLite on the same disk: posts, deliveries
                from a backlog; and a database with 1,000,000 scheduled, 200,000 sent and 100,000 ready messages beside an
                empty one
    nodes       two daemons on one database, beside one: posts, and deliveries of eight accounts from a backlog
    beside      with --beside OTHER.pyz: this build and another one in turns: start, memory, posts (also while delivering),
                batches, and the rows deliver, provider and latency; the ratio is ours to theirs, of the processor time too
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import backlog
import load
import rig
import servers
from rig import Companion, Daemon, Elsewhere, PostfixSink, Postgres, Spread
from sinks import (
    REFUSES,
    TAKES,
    Manner,
    serve_bare_http,
    serve_bare_queue,
    serve_delayed,
    serve_files,
    serve_reports,
    serve_smtp,
)

IDLE_TURN_S = 0.01  # so often the dispatcher looks, in the row about accounts
PROVIDER = Manner(greeting_s=0.3, auth_s=0.2, message_s=0.1)
CONNECTIONS = 16
SINKS = {  # what a fast server offers: how a bare client uses it
    "PIPELINING": load.PIPELINED,
    "PIPELINING and CHUNKING": load.CHUNKED,
}
HEADER = ("what", "ours", "spread", "ceiling", "ratio", "goal", "CPU s per 1,000", "loop ms")


class Line(NamedTuple):
    """One line of the table, as text."""

    what: str
    ours: str
    spread: str = ""
    ceiling: str = ""
    ratio: str = ""
    goal: str = ""
    cpu: str = ""
    loop: str = ""


class Taken(NamedTuple):
    """What one run gave: a figure, and the daemon's processor time for 1,000 messages."""

    figure: float
    cpu_s: float = 0.0
    p50_s: float = 0.0
    p99_s: float = 0.0
    meanwhile: float = 0.0  # deliveries a second, during posts


class Bench:
    """The settings of this run, its folder, and what the rows need again and again."""

    def __init__(self, rounds: int, quick: bool, folder: Path, elsewhere: Elsewhere, other: Path | None = None) -> None:
        self.rounds, self.quick, self.folder, self.elsewhere, self.other = rounds, quick, folder, elsewhere, other
        self._labels = iter(range(10**9))

    def of(self, count: int) -> int:
        """So many, or a tenth of it with --quick."""
        return max(1, count // 10) if self.quick else count

    def label(self) -> str:
        """A name that no message or folder had before."""
        return f"run{next(self._labels)}"

    @cached_property
    def certificate(self) -> str:
        """The file of a certificate for 127.0.0.1, signed by itself, and its key."""
        return str(rig.self_signed(self.folder / "server.pem"))

    def daemon(self, smtp_port: int, reports_port: int, program: Path | None = None, **smtp: object) -> Daemon:
        """A daemon on an empty file, not yet started; it delivers when told to."""
        sections = backlog.sections(smtp_port, reports_port)
        sections["smtp"].update(smtp)
        return Daemon(self.folder / self.label(), sections, program)

    def node(self, database: Postgres, name: str, smtp_port: int, reports_port: int) -> Daemon:
        """A daemon on a database, not yet started."""
        sections = backlog.sections(smtp_port, reports_port)
        return Daemon(self.folder / self.label(), {**sections, "storage": {"db_path": database.url(name)}})

    def posts(self, port: int, count: int, connections: int, batch: int = 1) -> load.Posted:
        posted = self.elsewhere.run(load.run_posts, [port], self.label(), count, connections, batch)
        if posted.refused:
            raise rig.BenchError(f"{posted.refused} posts were refused")
        return posted


@contextlib.contextmanager
def costed(daemon: Daemon, count: int, costs: list[float]) -> Iterable[None]:
    """Note what the daemon's processor time for 1,000 messages was."""
    before = daemon.cpu_s()
    yield
    costs.append((daemon.cpu_s() - before) * 1000 / count)


def fast_sink(offered: str = "PIPELINING") -> contextlib.AbstractContextManager[Any]:
    """smtp-sink where it is installed and CHUNKING, which it does not know, is not wanted; else our own in Python."""
    program, chunking = find_smtp_sink(), "CHUNKING" in offered
    return PostfixSink(program) if program and not chunking else Companion(serve_smtp, Manner(chunking=chunking))


def find_smtp_sink() -> str | None:
    return shutil.which("smtp-sink") or shutil.which("smtp-sink", path="/usr/sbin:/usr/local/sbin")


def is_quiet(status: dict[str, Any]) -> bool:
    return status["pending"] == 0 and status["unreported"] == 0


def settle(daemon: Daemon) -> None:
    """Wait until all is delivered and reported, so that the next run starts from rest."""
    daemon.command("run-now")
    daemon.wait_for_status(is_quiet, 300)


def compared(what: str, unit: str, ours: Sequence[Taken], ceiling: Sequence[float], loop: Spread, **more: str) -> Line:
    """A line about a rate and its ceiling."""
    spread = Spread.of(taken.figure for taken in ours)
    ratio = statistics.median(taken.figure / bare for taken, bare in zip(ours, ceiling, strict=True))
    cpu = statistics.median(taken.cpu_s for taken in ours)
    line = Line(
        what,
        f"{rig.rounded(spread.median)}{unit}",
        spread.shown(),
        f"{rig.rounded(statistics.median(ceiling))}{unit}",
        f"{ratio:.2f}",
        cpu=f"{cpu:.2f}" if cpu else "",
        loop=shown_loop(loop),
    )
    return line._replace(**more)


def shown_loop(loop: Spread) -> str:
    return f"{rig.rounded(loop.median)} ({loop.shown()})"


# -- posts


def measured_posts(bench: Bench, daemon: Daemon, count: int, connections: int, batch: int = 1) -> Taken:
    costs: list[float] = []
    with costed(daemon, count, costs):
        posted = bench.posts(daemon.port, count, connections, batch)
    return taken_of(posted, count, costs[0])


def taken_of(posted: load.Posted, count: int, cpu_s: float, meanwhile: float = 0.0) -> Taken:
    p50, p99 = (rig.percentile(posted.latencies_s, share) for share in (0.5, 0.99))
    return Taken(count / posted.seconds, cpu_s, p50, p99, meanwhile)


def measured_posts_under_delivery(bench: Bench, daemon: Daemon, sink: Any, count: int) -> Taken:
    """Posts while a backlog is delivered and reported: it is there before and after."""
    bench.posts(daemon.port, count, 1, 1000)
    daemon.command("activate")
    before = sink.count
    sink.wait_for(before + 100)
    before, cpu_before = sink.count, daemon.cpu_s()
    posted = bench.posts(daemon.port, count, 32)
    delivered, cpu_s = sink.count - before, daemon.cpu_s() - cpu_before
    settle(daemon)
    daemon.command("suspend")
    return taken_of(posted, count, cpu_s * 1000 / count, delivered / posted.seconds)


def post_rows(bench: Bench) -> Iterable[Line]:
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(fast_sink())
        receiver = stack.enter_context(Companion(serve_reports))
        bare = stack.enter_context(Companion(serve_bare_queue, str(bench.folder / "bare.db")))
        with bench.daemon(sink.port, receiver.port) as daemon:
            yield from resting_post_lines(bench, daemon, bare)
        with bench.daemon(sink.port, receiver.port) as daemon:
            yield delivering_post_line(bench, daemon, bare, sink)


def resting_post_lines(bench: Bench, daemon: Daemon, bare: Companion) -> Iterable[Line]:
    measured_posts(bench, daemon, bench.of(2000), 32)  # warm
    for count, connections, goal in ((bench.of(2000), 1, "0.75; p50 1 ms"), (bench.of(10_000), 32, "0.45")):
        ours = partial(measured_posts, bench, daemon, count, connections)
        theirs = partial(bare_rate, bench, bare, count, connections)
        results, loop = rig.interleaved(bench.rounds, {"ours": ours, "bare": theirs})
        yield post_line(f"posts, connections: {connections}", results["ours"], results["bare"], loop, goal)


def delivering_post_line(bench: Bench, daemon: Daemon, bare: Companion, sink: Any) -> Line:
    count = bench.of(5000)
    ours = partial(measured_posts_under_delivery, bench, daemon, sink, count)
    results, loop = rig.interleaved(bench.rounds, {"ours": ours, "bare": partial(bare_rate, bench, bare, count, 32)})
    what = "posts, connections: 32, while delivering"
    return post_line(what, results["ours"], results["bare"], loop, "0.25; p99 15 ms")


def bare_rate(bench: Bench, bare: Companion, count: int, connections: int) -> float:
    return count / bench.posts(bare.port, count, connections).seconds


def post_line(what: str, ours: Sequence[Taken], bare: Sequence[float], loop: Spread, goal: str) -> Line:
    line = compared(what, "/s", ours, bare, loop, goal=goal)
    p50, p99 = (statistics.median(getattr(taken, name) for taken in ours) * 1e3 for name in ("p50_s", "p99_s"))
    meanwhile = statistics.median(taken.meanwhile for taken in ours)
    delivered = f", {rig.rounded(meanwhile)} delivered/s meanwhile" if meanwhile else ""
    ceiling = f"{line.ceiling} bare server that commits a row"
    return line._replace(ceiling=ceiling, ours=f"{line.ours}; p50 {p50:.2f} ms, p99 {p99:.2f} ms{delivered}")


def batch_rows(bench: Bench) -> Iterable[Line]:
    count = bench.of(50) * 1000
    with fast_sink() as sink, Companion(serve_reports) as receiver, bench.daemon(sink.port, receiver.port) as daemon:
        with Companion(serve_bare_queue, str(bench.folder / "bare-batch.db")) as bare:
            measured_posts(bench, daemon, 1000, 1, 1000)
            results, loop = rig.interleaved(bench.rounds, {
                "ours": lambda: measured_posts(bench, daemon, count, 1, 1000),
                "bare": lambda: count / bench.posts(bare.port, count, 1, 1000).seconds,
            })  # fmt: skip
    line = compared("batches of 1,000, 1 connection", " msg/s", results["ours"], results["bare"], loop, goal="0.45")
    yield line._replace(ceiling=f"{line.ceiling} bare server")


def submission_rows(bench: Bench) -> Iterable[Line]:
    count, port = bench.of(4000), rig.free_port()
    sections = {"submission": {"listen": f"127.0.0.1:{port}"}, "scheduler": {"active": "false"}}
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(Daemon(bench.folder / bench.label(), backlog.sections(9, 9) | sections))

        def submitted(run: Callable[..., load.Posted], to: int, connections: int) -> Taken:
            some = count if connections > 1 else count // 4
            costs: list[float] = []
            with costed(daemon, some, costs):
                posted = bench.elsewhere.run(run, to, bench.label(), some, connections)
            return taken_of(posted, some, costs[0])

        runs: dict[str, Callable[[], Any]] = {
            f"{name} {connections}": partial(submitted, run, to, connections)
            for connections in (CONNECTIONS, 1)
            for name, run, to in (("smtp", load.run_submissions, port), ("http", load.run_raw_posts, daemon.port))
        }
        if (source := shutil.which("smtp-source", path="/usr/sbin:/usr/bin")) and os.getuid() == 0:
            runs["postfix"] = stack.enter_context(fed_postfix(bench, source, bench.of(1000)))
        results, loop = rig.interleaved(bench.rounds, runs)
    for connections in (CONNECTIONS, 1):
        smtp, http = results[f"smtp {connections}"], results[f"http {connections}"]
        line = post_line(
            f"mail by SMTP, connections: {connections}", smtp, [taken.figure for taken in http], loop, "0.8"
        )
        p50_ms = statistics.median(taken.p50_s for taken in http) * 1e3
        yield line._replace(
            ceiling=f"{rig.rounded(statistics.median(t.figure for t in http))}/s by HTTP; p50 {p50_ms:.2f} ms"
        )
    if "postfix" in runs:
        line = compared("mail by SMTP, beside Postfix", "/s", results[f"smtp {CONNECTIONS}"], results["postfix"], loop)
        yield line._replace(goal="5 times", ceiling=f"{line.ceiling} smtp-source to Postfix's smtpd")


@contextlib.contextmanager
def fed_postfix(bench: Bench, source: str, count: int) -> Iterator[Callable[[], float]]:
    """Mails a second that smtp-source brings into a Postfix that keeps them in its queue."""
    folder = bench.folder / bench.label()
    bench.folder.chmod(0o755)
    postfix = servers.Postfix(folder, more="defer_transports = keep\n")
    postfix.start(folder)
    options = ["-d", "-s", CONNECTIONS, "-m", count, "-l", 1000, "-f", load.SENDER, "-t", load.RECIPIENT]

    def fed() -> float:
        began = time.monotonic()
        subprocess.run([source, *map(str, options), f"127.0.0.1:{postfix.port}"], check=True, timeout=300)
        return count / (time.monotonic() - began)

    try:
        fed()
        yield fed
    finally:
        postfix.stop()


# -- deliveries


def measured_way(bench: Bench, daemon: Daemon, sink: Any, count: int) -> Taken:
    """From the first post to the last message at the sink."""
    costs: list[float] = []
    before = sink.count
    with costed(daemon, count, costs):
        posting = bench.elsewhere.begin(load.run_posts, [daemon.port], bench.label(), count, 1, 1000)
        ended = sink.wait_for(before + count)
        posted = posting.result(60)
        settle(daemon)
    return Taken(count / (ended - posted.began), costs[0])


def measured_backlog(bench: Bench, daemon: Daemon, sink: Any, count: int) -> Taken:
    """From activate to the last message at the sink, all of them submitted before."""
    daemon.command("suspend")
    bench.posts(daemon.port, count, 1, 1000)
    costs: list[float] = []
    before, began = sink.count, time.monotonic()
    with costed(daemon, count, costs):
        daemon.command("activate")
        ended = sink.wait_for(before + count)
        settle(daemon)
    return Taken(count / (ended - began), costs[0])


def deliver_rows(bench: Bench) -> Iterable[Line]:
    for offered in SINKS:
        with (
            fast_sink(offered) as sink,
            Companion(serve_reports) as receiver,
            bench.daemon(sink.port, receiver.port) as daemon,
        ):
            daemon.command("activate")
            measured_way(bench, daemon, sink, 1000)
            yield from deliver_lines(bench, daemon, sink, offered)


def deliver_lines(bench: Bench, daemon: Daemon, sink: Any, offered: str) -> Iterable[Line]:
    count = max(1000, bench.of(5000))

    def bare(run: Callable[..., load.Sent], *more: object) -> float:
        return count / bench.elsewhere.run(run, sink.port, count, CONNECTIONS, *more).seconds

    results, loop = rig.interleaved(bench.rounds, {
        "way": lambda: measured_way(bench, daemon, sink, count),
        "aiosmtplib": lambda: bare(load.run_aiosmtplib),
        "backlog": lambda: measured_backlog(bench, daemon, sink, count),
        "bare": lambda: bare(load.run_bare_smtp, SINKS[offered]),
    })  # fmt: skip
    for name, what, goal in (("way", "from the first post on", "0.8"), ("backlog", "from a backlog", "1.0")):
        what = f"delivered and reported, {what}, {offered}"
        line = compared(what, " msg/s", results[name], results["aiosmtplib"], loop, goal=goal)
        yield line._replace(ceiling=f"{line.ceiling} aiosmtplib with ready bytes")
        line = compared("the same", " msg/s", results[name], results["bare"], loop)
        yield line._replace(ours="", spread="", cpu="", ceiling=f"{line.ceiling} bare client, {SINKS[offered]}")


def measured_burst(bench: Bench, daemon: Daemon, sink: Companion) -> Taken:
    """A burst of 100, all connections still to be made."""
    daemon.stop()
    daemon.start()
    daemon.command("activate")
    before = sink.count
    posted = bench.posts(daemon.port, 100, 1, 100)
    seconds = sink.wait_for(before + 100) + PROVIDER.message_s - posted.began
    settle(daemon)
    return Taken(seconds)


def provider_rows(bench: Bench) -> Iterable[Line]:
    alone = bench.of(100)
    login = {"user": "bench", "password": "secret"}
    with Companion(serve_smtp, PROVIDER) as sink, Companion(serve_reports) as receiver:
        with bench.daemon(sink.port, receiver.port, **login) as daemon:
            results, loop = rig.interleaved(bench.rounds, {
                "ours": lambda: measured_burst(bench, daemon, sink),
                "aiosmtplib": lambda: bench.elsewhere.run(load.run_aiosmtplib, sink.port, 100, 16, True).seconds,
            })  # fmt: skip
            one_by_one = sum(bench.elsewhere.run(load.run_smtplib, sink.port, alone))
    line = compared("burst of 100, provider-like server", " s", results["ours"], results["aiosmtplib"], loop)
    yield line._replace(goal="1.5 s", ceiling=f"{line.ceiling} aiosmtplib")
    ours = Spread.of(taken.figure for taken in results["ours"]).median
    if alone == 100:
        yield Line(
            "beside smtplib, one by one", f"{one_by_one / ours:.0f} times faster", "smtplib measured once, all 100",
            f"{one_by_one:.1f} s", goal="40 times", loop=shown_loop(loop),
        )  # fmt: skip
    else:
        yield Line(f"smtplib one by one, {alone} messages, not 100", "", "measured once", f"{one_by_one:.1f} s")


def request_rows(bench: Bench) -> Iterable[Line]:
    direct_count = max(3, bench.of(10))
    with Companion(serve_smtp, PROVIDER) as sink, Companion(serve_reports) as receiver:
        with bench.daemon(sink.port, receiver.port) as daemon:
            bench.posts(daemon.port, 200, 1)
            results, loop = rig.interleaved(bench.rounds, {
                "ours": lambda: Taken(rig.percentile(bench.posts(daemon.port, 500, 1).latencies_s, 0.5)),
                "direct": lambda: statistics.median(bench.elsewhere.run(load.run_smtplib, sink.port, direct_count)),
            })  # fmt: skip
    ours = Spread.of(taken.figure * 1e3 for taken in results["ours"])
    times = statistics.median(d / o.figure for d, o in zip(results["direct"], results["ours"], strict=True))
    yield Line(
        "a request beside direct SMTP (p50)", f"{ours.median:.2f} ms", ours.shown(),
        f"{statistics.median(results['direct']) * 1e3:.0f} ms", f"{times:.0f} times faster", "500 times",
        loop=shown_loop(loop),
    )  # fmt: skip


# -- a large file


class Large(NamedTuple):
    """One of two daemons on the same sink and receiver, one with an empty file, one with a past."""

    bench: Bench
    daemon: Daemon
    sink: Any
    receiver: Companion
    has_backlog: bool

    def post_rate(self, count: int) -> Taken:
        return measured_posts(self.bench, self.daemon, count, 32)

    def delivery_rate(self, count: int) -> Taken:
        """Out of the backlog, or of as many messages submitted just before; reports have to wait."""
        if not self.has_backlog:
            self.bench.posts(self.daemon.port, count, 1, 1000)
        self.receiver.numbers[Companion.MODE] = REFUSES
        before, began = self.sink.count, time.monotonic()
        self.daemon.command("activate")
        ended = self.sink.wait_for(before + count)
        self.daemon.command("suspend")
        self.daemon.wait_for_status(lambda status: status["in_delivery"] == 0, 60)
        return Taken(count / (ended - began))

    def search_s(self) -> float:
        """The longest search: it looks at all rows and finds none."""
        began = time.monotonic()
        answer = self.daemon.ask("GET", "/messages?to=nobody@receiver.example&limit=100")
        if answer.get("messages") != []:
            raise rig.BenchError(f"a search found what is not there: {str(answer)[:500]}")
        return time.monotonic() - began

    @contextlib.contextmanager
    def searching(self) -> Iterator[None]:
        """One search after the other, meanwhile."""
        enough = threading.Event()

        def search() -> None:
            while not enough.is_set():
                self.search_s()

        with ThreadPoolExecutor(1) as thread:
            searches = thread.submit(search)
            try:
                yield
            finally:
                enough.set()
            searches.result()

    def post_p99_s(self, count: int) -> float:
        return measured_posts(self.bench, self.daemon, count, 1).p99_s

    def report_rate(self) -> Taken:
        """What the deliveries left to be reported, from run-now to the last entry."""
        waiting = self.daemon.status()["unreported"]
        self.receiver.numbers[Companion.MODE] = TAKES
        before, began = self.receiver.count, time.monotonic()
        self.daemon.command("run-now")
        ended = self.receiver.wait_for(before + waiting)
        self.daemon.wait_for_status(lambda status: status["unreported"] == 0, 60)
        return Taken(waiting / (ended - began))


def million_rows(bench: Bench) -> Iterable[Line]:
    rows = backlog.Rows(*map(bench.of, backlog.Rows()))
    old = backlog.prepared(rows, bench.folder)
    with fast_sink() as sink, Companion(serve_reports) as receiver, contextlib.ExitStack() as stack:
        empty = bench.daemon(sink.port, receiver.port)
        full = bench.daemon(sink.port, receiver.port)
        shutil.move(old, full.db)
        starts = {"ours": lambda: Taken(restarted(full)), "empty": lambda: restarted(empty)}
        results, loop = rig.interleaved(bench.rounds, starts)
        line = compared(f"start, {rows.shown()}", " s", results["ours"], results["empty"], loop)
        yield line._replace(ceiling=f"{line.ceiling} empty file")
        for daemon in (empty, full):
            stack.enter_context(daemon)
        yield from large_lines(
            bench,
            Large(bench, full, sink, receiver, has_backlog=True),
            Large(bench, empty, sink, receiver, has_backlog=False),
        )
        yield from search_lines(bench, Large(bench, full, sink, receiver, has_backlog=True))
        yield Line(
            "memory, that file, after these runs", f"{full.rss_mib():.0f} MiB", "",
            f"{empty.rss_mib():.0f} MiB empty file", goal="45 MiB",
        )  # fmt: skip


def restarted(daemon: Daemon) -> float:
    seconds = daemon.start()
    daemon.stop()
    return seconds


def large_lines(bench: Bench, full: Large, empty: Large, which_full: str = "that file") -> Iterable[Line]:
    posts, deliveries = bench.of(5000), bench.of(20) * 100
    for large in (full, empty):
        large.post_rate(posts // 5)
    for what, unit, measures in (
        ("posts, 32 connections", "/s", {"post": lambda large: large.post_rate(posts)}),
        ("", "", {"deliver": lambda large: large.delivery_rate(deliveries), "report": Large.report_rate}),
    ):
        results, loop = rig.interleaved(bench.rounds, {
            f"{name} {kind}": lambda m=measure, w=which: m(w)
            for kind, which in (("full", full), ("empty", empty))
            for name, measure in measures.items()
        })  # fmt: skip
        for name in measures:
            title = what or {"deliver": "deliveries", "report": "reports"}[name]
            bare = [taken.figure for taken in results[f"{name} empty"]]
            line = compared(
                f"{title}, {which_full}", unit or "/s", results[f"{name} full"], bare, loop, goal="ratio 0.9"
            )
            yield line._replace(ceiling=f"{line.ceiling} empty")


def search_lines(bench: Bench, large: Large) -> Iterable[Line]:
    def p99_beside_searches() -> Taken:
        with large.searching():
            return Taken(large.post_p99_s(count))

    count = bench.of(2000)
    searches = Spread.of(large.search_s() for _ in range(5))
    what = "search for a recipient, first page, nobody found, that file"
    yield Line(what, f"{rig.rounded(searches.median)} s", searches.shown(), goal="1 s")
    results, loop = rig.interleaved(
        bench.rounds, {"ours": p99_beside_searches, "bare": lambda: large.post_p99_s(count)}
    )
    what = "p99 of posts, 1 connection, beside such searches"
    line = compared(what, " s", results["ours"], results["bare"], loop, goal="ratio 1.5")
    yield line._replace(ceiling=f"{line.ceiling} without")


# -- memory, the event loop, start


def memory_rows(bench: Bench) -> Iterable[Line]:
    count, size = bench.of(40), 10 * rig.MIB
    with (
        fast_sink() as sink,
        Companion(serve_reports) as receiver,
        Companion(serve_files, size) as files,
        bench.daemon(sink.port, receiver.port) as daemon,
    ):
        daemon.command("activate")
        time.sleep(2)
        yield Line("memory, idle", f"{daemon.rss_mib():.0f} MiB", goal="34 MiB")
        for what, post, source in (
            ("attached", load.post_attachments, size),
            ("behind URLs", load.post_urls, files.port),
        ):
            daemon.forget_peak()
            before = sink.count
            taken = bench.elsewhere.run(post, daemon.port, bench.label(), count, source)
            sink.wait_for(before + count)
            settle(daemon)
            yield Line(
                f"memory, {taken} messages with 10 MB {what}", f"{daemon.peak_rss_mib():.0f} MiB at most",
                f"{daemon.rss_mib():.0f} MiB afterwards", goal="200 MiB",
            )  # fmt: skip
        print(f"{files.count} requests for the files", file=sys.stderr)


def probed(bench: Bench, ports: list[int], work: Callable[[], None]) -> list[list[float]]:
    """The delays of a probe of each port while the work is done."""
    stop_file = bench.folder / bench.label()
    with Elsewhere() as prober:
        probing = prober.begin(load.run_probes, ports, str(stop_file))
        time.sleep(0.3)
        try:
            work()
        finally:
            stop_file.touch()
        return probing.result(60)


def loop_rows(bench: Bench) -> Iterable[Line]:
    large, batches = max(2, bench.of(8)), max(1, bench.of(4))
    with fast_sink() as sink, Companion(serve_reports) as receiver, Companion(serve_bare_http) as bare:
        with bench.daemon(sink.port, receiver.port) as daemon:

            def compose() -> None:
                daemon.command("activate")
                before = sink.count
                bench.elsewhere.run(load.post_attachments, daemon.port, bench.label(), large, 25 * 1024 * 1024)
                sink.wait_for(before + large)
                settle(daemon)

            def submit() -> None:
                daemon.command("suspend")
                bench.elsewhere.run(load.post_large_batches, daemon.port, bench.label(), batches, 60 * 1000 * 1000)

            for what, work, goal in (
                (f"{large} messages of 25 MB submitted and composed", compose, "50 ms"),
                (f"{batches} batches of 60 MB submitted", submit, "100 ms"),
            ):
                ours, theirs = probed(bench, [daemon.port, bare.port], work)
                yield probe_line(what, ours, theirs)._replace(goal=goal)


def probe_line(what: str, ours: Sequence[float], bare: Sequence[float]) -> Line:
    p99 = rig.percentile(ours, 0.99) * 1e3
    return Line(
        f"event loop: longest answer, {what}", f"{ours[-1] * 1e3:.0f} ms", f"p99 {p99:.1f} ms of {len(ours):,} probes",
        f"{bare[-1] * 1e3:.0f} ms bare server",
    )  # fmt: skip


def start_rows(bench: Bench) -> Iterable[Line]:
    def run_of(*command: object) -> float:
        began = time.monotonic()
        subprocess.run(
            [sys.executable, *map(str, command)], check=True, env=rig.own_environment(), stdout=subprocess.DEVNULL
        )
        return time.monotonic() - began

    def fresh() -> Taken:
        return Taken(restarted(bench.daemon(25, 9)))

    pyz = rig.built_zipapp()
    results, loop = rig.interleaved(3 * bench.rounds, {
        "version": lambda: Taken(run_of(pyz, "--version")),
        "serving": fresh,
        "python": lambda: run_of("-c", "pass"),
    })  # fmt: skip
    for name, what, goal in (
        ("serving", "start, empty file", "0.3 s"),
        ("version", "--version of the zipapp", "0.2 s"),
    ):
        line = compared(what, " s", results[name], results["python"], loop, goal=goal)
        yield line._replace(ceiling=f"{line.ceiling} bare Python", ratio="")


# -- many accounts


def idle_turn_ms(daemon: Daemon) -> Taken:
    """Processor time of a daemon that has nothing to do, for each turn that its dispatcher is due."""
    before, seconds = daemon.cpu_s(), 5.0
    time.sleep(seconds)
    return Taken((daemon.cpu_s() - before) * 1e3 / (seconds / IDLE_TURN_S))


def arrival_ms(daemon: Daemon, sink: Any, accounts: int, count: int) -> Taken:
    """The median from the start of a post to the arrival of its message, one after the other."""
    times = []
    for number in range(count):
        message = {"id": f"{time.monotonic_ns()}", "from": "a@example.com", "to": "b@example.com", "subject": "",
                   "body": "x" * 1000, "account_id": f"a{number % accounts}"}  # fmt: skip
        before, began = sink.count, time.monotonic()
        daemon.submit([message])
        times.append((sink.wait_for(before + 1) - began) * 1e3)
    return Taken(statistics.median(times))


def accounts_rows(bench: Bench) -> Iterable[Line]:
    many, count = bench.of(1000), bench.of(200)
    with Companion(serve_smtp, Manner()) as sink, Companion(serve_reports) as receiver, contextlib.ExitStack() as stack:
        daemons = {}
        for accounts in (many, 1):
            sections = backlog.sections(sink.port, receiver.port)
            sections["delivery"] = {**sections.get("delivery", {}), "send_interval_seconds": IDLE_TURN_S}
            daemon = daemons[accounts] = stack.enter_context(Daemon(bench.folder / bench.label(), sections))
            for number in range(accounts):
                daemon.ask("POST", "/account", {"id": f"a{number}", "host": "127.0.0.1", "port": sink.port})
            daemon.command("activate")
        for what, unit, goal, measure in (
            ("an idle turn", " ms", "ratio 2", lambda n: idle_turn_ms(daemons[n])),
            ("post to arrival (p50)", " ms", "ratio 1.3", lambda n: arrival_ms(daemons[n], sink, n, count)),
        ):
            results, loop = rig.interleaved(bench.rounds, {"many": partial(measure, many), "one": partial(measure, 1)})
            one = [taken.figure for taken in results["one"]]
            line = compared(f"{what}, {many} accounts", unit, results["many"], one, loop, goal=goal)
            yield line._replace(ceiling=f"{line.ceiling} one account")


# -- a long line


class Far(NamedTuple):
    """A server at 50 ms of round trip, and how it is spoken to."""

    sink: Companion
    port: int
    smtp: dict[str, object]  # of the daemon
    count: int  # of messages that are some seconds' work for it
    bare: Callable[[], float]  # by a bare client: how many a second and connection

    def rate(self, bench: Bench, daemon: Daemon, count: int = 0) -> Taken:
        """Deliveries a second and connection out of a backlog."""
        taken = measured_backlog(bench, daemon, self.sink, count or self.count)
        return taken._replace(figure=taken.figure / FAR_CONNECTIONS)


FAR_CONNECTIONS = 4
FAR_SERVERS = {  # what they offer: how a bare client uses it
    "PIPELINING and CHUNKING": load.CHUNKED,
    "PIPELINING and CHUNKING, by STARTTLS": load.CHUNKED,
    "PIPELINING": load.PIPELINED,
    "neither PIPELINING nor CHUNKING": load.COMMANDS,
}


@contextlib.contextmanager
def far_server(bench: Bench, offered: str) -> Iterator[Far]:
    way = FAR_SERVERS[offered]
    certificate = bench.certificate if "STARTTLS" in offered else None
    smtp: dict[str, object] = {"max_connections": FAR_CONNECTIONS, "max_messages_per_connection": 100_000}
    if certificate:
        smtp |= {"start_tls": "required", "ca_file": certificate}
    count = max(80, bench.of({load.CHUNKED: 400, load.PIPELINED: 200, load.COMMANDS: 100}[way]))
    manner = Manner(pipelining=way != load.COMMANDS, chunking=way == load.CHUNKED, certificate=certificate)
    with Companion(serve_smtp, manner) as sink, Companion(serve_delayed, sink.port, 0.05) as line:

        def bare() -> float:
            run = (load.run_bare_smtp, line.port, count, FAR_CONNECTIONS, way, certificate)
            return count / bench.elsewhere.run(*run).seconds / FAR_CONNECTIONS

        yield Far(sink, line.port, smtp, count, bare)


def latency_rows(bench: Bench) -> Iterable[Line]:
    for offered in FAR_SERVERS:
        with (
            far_server(bench, offered) as far,
            Companion(serve_reports) as receiver,
            bench.daemon(far.port, receiver.port, **far.smtp) as daemon,
        ):
            far.rate(bench, daemon, 40)  # all connections are there
            results, loop = rig.interleaved(bench.rounds, {
                "ours": partial(far.rate, bench, daemon),
                "bare": far.bare,
            })  # fmt: skip
        what = f"50 ms round trip, one connection, {offered}"
        line = compared(what, " msg/s", results["ours"], results["bare"], loop)
        yield line._replace(ceiling=f"{line.ceiling} bare client, {FAR_SERVERS[offered]}")


# -- two builds


class Pair(NamedTuple):
    """This build and another one, each with a file of its own, on the same sink and receiver."""

    bench: Bench
    daemons: dict[str, Daemon]

    def line(self, what: str, unit: str, measure: Callable[[Daemon], Taken]) -> Line:
        """Both in turns; what they cost is compared, too."""
        runs = {name: partial(measure, daemon) for name, daemon in self.daemons.items()}
        results, loop = rig.interleaved(self.bench.rounds, runs)
        ours, theirs = results["ours"], results["other"]
        line = compared(what, unit, ours, [taken.figure for taken in theirs], loop)
        if not ours[0].cpu_s:
            return line
        cost = statistics.median(o.cpu_s / t.cpu_s for o, t in zip(ours, theirs, strict=True))
        return line._replace(cpu=f"{line.cpu}; {cost:.2f} of the other's")


@contextlib.contextmanager
def both_builds(bench: Bench, smtp_port: int, **smtp: object) -> Iterator[Pair]:
    with Companion(serve_reports) as receiver, contextlib.ExitStack() as stack:
        builds = {"ours": None, "other": bench.other}
        yield Pair(bench, {
            name: stack.enter_context(bench.daemon(smtp_port, receiver.port, program, **smtp))
            for name, program in builds.items()
        })  # fmt: skip


def beside_rows(bench: Bench) -> Iterable[Line]:
    if bench.other is None:
        return
    for offered in SINKS:
        with fast_sink(offered) as sink, both_builds(bench, sink.port) as pair:
            if offered == "PIPELINING":
                yield from beside_posts(bench, pair, sink)
            yield from beside_deliveries(bench, pair, sink, offered)
    login = {"user": "bench", "password": "secret"}
    with Companion(serve_smtp, PROVIDER) as sink, both_builds(bench, sink.port, **login) as pair:
        yield pair.line("burst of 100, provider-like server", " s", partial(measured_burst, bench, sink=sink))
    for offered in FAR_SERVERS:
        with far_server(bench, offered) as far, both_builds(bench, far.port, **far.smtp) as pair:
            for daemon in pair.daemons.values():
                far.rate(bench, daemon, 40)
            what = f"50 ms round trip, one connection, {offered}"
            line = pair.line(what, " msg/s", partial(far.rate, bench))
            yield line._replace(goal="1.9" if "CHUNKING" in offered and "nor" not in offered else "1.0")


def beside_posts(bench: Bench, pair: Pair, sink: Any) -> Iterable[Line]:
    def restarted_again(daemon: Daemon) -> Taken:
        daemon.stop()
        return Taken(daemon.start())

    yield pair.line("start, empty file", " s", restarted_again)
    yield pair.line("memory, idle", " MiB", lambda daemon: Taken(daemon.rss_mib()))
    for daemon in pair.daemons.values():
        measured_posts(bench, daemon, bench.of(2000), 32)
    for connections, batch, count in ((1, 1, 2000), (32, 1, 10_000), (1, 1000, 50_000)):
        measure = partial(
            measured_posts, bench, count=max(batch, bench.of(count)), connections=connections, batch=batch
        )
        what = f"batches of {batch}" if batch > 1 else f"posts, connections: {connections}"
        yield pair.line(what, " msg/s", lambda daemon, measure=measure: measure(daemon))
        if batch == 1 and connections == 1:
            yield pair.line(f"{what}: p50", " s", lambda daemon, measure=measure: Taken(measure(daemon).p50_s))
    for daemon in pair.daemons.values():
        daemon.command("activate")
        settle(daemon)
        daemon.command("suspend")
    under_delivery = partial(measured_posts_under_delivery, bench, sink=sink, count=bench.of(5000))
    yield pair.line("posts, connections: 32, while delivering", "/s", under_delivery)


def beside_deliveries(bench: Bench, pair: Pair, sink: Any, offered: str) -> Iterable[Line]:
    for daemon in pair.daemons.values():
        daemon.command("activate")
        measured_way(bench, daemon, sink, 1000)
    for what, way in (("from the first post on", measured_way), ("from a backlog", measured_backlog)):
        measure = partial(way, bench, sink=sink, count=max(1000, bench.of(5000)))
        line = pair.line(f"delivered and reported, {what}, {offered}", " msg/s", measure)
        yield line._replace(goal="CPU 0.67")
    yield pair.line("memory, afterwards", " MiB", lambda daemon: Taken(daemon.rss_mib()))


# -- PostgreSQL


def postgres_rows(bench: Bench) -> Iterable[Line]:
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(Postgres(bench.folder))
        sink, receiver = stack.enter_context(fast_sink()), stack.enter_context(Companion(serve_reports))
        in_file = stack.enter_context(bench.daemon(sink.port, receiver.port))
        empty = stack.enter_context(bench.node(database, database.new_database(), sink.port, receiver.port))
        for daemon in (in_file, empty):
            measured_posts(bench, daemon, bench.of(2000), 32)  # warm
            measured_backlog(bench, daemon, sink, 1000)
        posts, deliveries = partial(measured_posts, bench), partial(measured_backlog, bench, sink=sink)
        for what, unit, goal, measure in (
            ("posts, connections: 1", "/s", "", partial(posts, count=bench.of(1000), connections=1)),
            ("posts, connections: 32", "/s", "0.35", partial(posts, count=bench.of(10_000), connections=32)),
            ("batches of 1,000", " msg/s", "", partial(posts, count=bench.of(20) * 1000, connections=1, batch=1000)),
            ("from a backlog", " msg/s", "0.4", partial(deliveries, count=max(1000, bench.of(5000)))),
        ):
            runs = {"ours": partial(measure, daemon=empty), "SQLite": partial(measure, daemon=in_file)}
            results, loop = rig.interleaved(bench.rounds, runs)
            beside = [taken.figure for taken in results["SQLite"]]
            line = compared(f"PostgreSQL, {what}", unit, results["ours"], beside, loop, goal=goal)
            yield line._replace(ceiling=f"{line.ceiling} SQLite")
        rows = backlog.Rows(*map(bench.of, backlog.Rows()))
        name = backlog.made_in(database, rows, bench.folder / bench.label())
        full = stack.enter_context(bench.node(database, name, sink.port, receiver.port))
        settle(empty)
        yield from large_lines(
            bench,
            Large(bench, full, sink, receiver, has_backlog=True),
            Large(bench, empty, sink, receiver, has_backlog=False),
            f"PostgreSQL, {rows.shown()}",
        )


def nodes_rows(bench: Bench) -> Iterable[Line]:
    accounts, count = [f"a{number}" for number in range(8)], max(1000, bench.of(5000))
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(Postgres(bench.folder))
        sink, receiver = stack.enter_context(fast_sink()), stack.enter_context(Companion(serve_reports))
        kinds: dict[str, list[Daemon]] = {}
        for kind, size in (("ours", 2), ("one", 1)):
            name = database.new_database()
            kinds[kind] = [
                stack.enter_context(bench.node(database, name, sink.port, receiver.port)) for _ in range(size)
            ]
            for account in accounts:
                server = {"host": "127.0.0.1", "port": sink.port, "max_connections": 4}
                kinds[kind][0].ask("POST", "/account", {"id": account, **server})

        def posted(nodes: Sequence[Daemon]) -> Taken:
            count = bench.of(10_000)
            ports = [node.port for node in nodes]
            taken = bench.elsewhere.run(load.run_posts, ports, bench.label(), count, 32, 1)
            return taken_of(taken, count, 0.0)

        def delivered(nodes: Sequence[Daemon]) -> Taken:
            nodes[0].command("suspend")
            for node in nodes:
                node.wait_for_status(lambda status: not status["active"], 30)
            for account in accounts:
                nodes[-1].submit(load.messages(bench.label(), count // len(accounts), account_id=account))
            before, began, cpu_before = sink.count, time.monotonic(), sum(node.cpu_s() for node in nodes)
            nodes[0].command("activate")
            ended = sink.wait_for(before + count)
            for node in nodes:
                settle(node)
            return Taken(count / (ended - began), (sum(node.cpu_s() for node in nodes) - cpu_before) * 1000 / count)

        for what, unit, goal, measure in (
            ("posts, 32 connections in turns to both", "/s", "1.0", posted),
            ("from a backlog of eight accounts", " msg/s", "1.0", delivered),
        ):
            for nodes in kinds.values():
                measure(nodes)  # warm
            runs = {kind: partial(measure, nodes) for kind, nodes in kinds.items()}
            results, loop = rig.interleaved(bench.rounds, runs)
            beside = [taken.figure for taken in results["one"]]
            line = compared(f"two nodes, {what}", unit, results["ours"], beside, loop, goal=goal)
            yield line._replace(ceiling=f"{line.ceiling} one node")


# -- the command


ROWS: dict[str, Callable[[Bench], Iterable[Line]]] = {
    "post": post_rows,
    "batch": batch_rows,
    "submission": submission_rows,
    "deliver": deliver_rows,
    "provider": provider_rows,
    "request": request_rows,
    "million": million_rows,
    "memory": memory_rows,
    "loop": loop_rows,
    "start": start_rows,
    "accounts": accounts_rows,
    "latency": latency_rows,
    "postgres": postgres_rows,
    "nodes": nodes_rows,
    "beside": beside_rows,
}


def measured(bench: Bench, names: Sequence[str], page: Path | None) -> tuple[list[Line], bool]:
    """All the lines, in the page too as soon as a row has its; False when one could not be measured."""
    lines, complete = [], True
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            of_row = []
            for line in ROWS[name](bench):
                of_row.append(line)
                print(" | ".join(filter(None, line)), file=sys.stderr, flush=True)
            lines += of_row
            if page is not None:
                page.write_text(
                    with_table(page.read_text(), name, f"{table_of_page(of_row)}\n\n{circumstances(bench)}")
                )
        except (rig.BenchError, OSError) as error:
            complete = False
            print(f"{name}: {error!r}", file=sys.stderr)
    return lines, complete


def table_of_page(lines: Iterable[Line]) -> str:
    """What a reader of the page looks for: the figures without the goals."""
    header = ("what", "measured", "spread", "beside, in the same run", "ratio", "CPU s for 1,000")
    return rig.markdown_table(header, [(*line[:5], line.cpu) for line in lines])


def with_table(page: str, row: str, table: str) -> str:
    """The page with this between the markers of the row, instead of what is there."""
    before, begin, rest = page.partition(f"<!-- bench: {row} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        raise rig.BenchError(f"the page has no markers for {row}")
    return f"{before}{begin}{table}\n{end}{after}"


def circumstances(bench: Bench) -> str:
    postgres = f" PostgreSQL {version}." if (version := rig.postgres_version()) else ""
    sink = "smtp-sink of Postfix" if find_smtp_sink() else "our own in Python, as smtp-sink is not installed"
    quick = " Quick run: the figures mean little." if bench.quick else ""
    return f"{rig.machine()}. Rounds: {bench.rounds}. Fast sink without CHUNKING: {sink}.{postgres}{quick}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], epilog=f"rows: {', '.join(ROWS)}")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="which rows; all when none is named")
    parser.add_argument("--rounds", type=int, default=3, help="how often ours and its ceiling take turns (3)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the counts")
    parser.add_argument("--beside", metavar="PYZ", type=Path, help="a zipapp of another build, for the row beside")
    parser.add_argument("--write", metavar="PAGE", type=Path, help="put the tables into this page: docs/speed.md")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"unknown row {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    rig.end_cleanly_when_told()
    rig.built_zipapp()
    with tempfile.TemporaryDirectory(prefix="mailproxy-bench-") as folder, Elsewhere() as elsewhere:
        bench = Bench(options.rounds, options.quick, Path(folder), elsewhere, options.beside)
        lines, complete = measured(bench, options.rows or tuple(ROWS), options.write)
    print(rig.markdown_table(HEADER, lines))
    print(f"\n{circumstances(bench)}")
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
