"""The proof that nothing is lost: mailproxy is killed again and again while clients submit.

    python3 bench/chaos.py [--rounds 100] [--seed 1] [--smtp] [--reports] [--clients 4] [--program FILE] [--postgres]

Clients submit without pause, the same again where no answer came, and now and then what was answered long ago.
In each round the daemon is killed with SIGKILL at a random moment (also while it starts), SQLite checks a copy
of the file, and it is started again. The SMTP server offers PIPELINING, and in every second round CHUNKING
(RFC 3030), by which a message is one write. With --smtp it is killed and started again now and then as well;
with --reports the receiver of the reports is at times down, slow, answers 500 or not at all, or dies with its
answer half out. At the end all is mended and must settle. Then:

  - no submission was refused: what is submitted again is known;
  - every id that got a 200 was delivered at least once (or, where the server refused it for ever, never), and
    reported at least once in its final state, in a report that was acknowledged;
  - a message was delivered a second time only across a kill, at each kill no more of them than there were
    connections (one transaction on the wire of each), and always with the same Message-ID;
  - PRAGMA integrity_check said ok after every round.

With --postgres the daemons are three, on one database (nodes.py).

The same seed gives the same moments and troubles, as far as the machine keeps time. Prints the counts; the
last line is JSON, {"ok": ..., ...}. Exit status 1 when something was wrong, with the offenders listed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import load
import rig
from rig import Companion, Daemon
from sinks import DIES, HANGS, NO_CHUNKING, REFUSES, SLOW, TAKES, Manner, serve_reports, serve_smtp

CONNECTIONS = 8
SMTP_MANNER = Manner(message_s=0.003, chunking=True, refuses=True)
SETTLE_S = 600.0
SHOWN_OFFENDERS = 20


class Plan(NamedTuple):
    """What is done to the daemon, and for how long."""

    rounds: int = 100
    seed: int = 1
    clients: int = 4
    smtp: bool = False
    reports: bool = False
    program: str | None = None  # the zipapp
    postgres: bool = False  # three daemons on one database


class Delivery(NamedTuple):
    """The SMTP server took a message (whether or not its answer was heard)."""

    at_ns: int
    message_id: str
    command: str  # DATA or BDAT
    node: str  # the client's name in EHLO, up to its first dot
    mail_ns: int  # when its transaction began


class Evidence(NamedTuple):
    """All that was seen from outside."""

    accepted: set[str]  # got a 200
    deliveries: Mapping[str, Sequence[Delivery]]
    reported: Mapping[str, Counter[str]]  # acknowledged entries by their status
    refusals: Sequence[str]  # answers other than "all of it is accepted, or known"
    kills_ns: Sequence[int]  # of the daemon (before it starts again) and of the SMTP server, in order
    damage: Sequence[str]  # what integrity_check said other than ok
    exit_status: int | None


class Verdict(NamedTuple):
    """What is to be said of the evidence."""

    counts: dict[str, Any]
    offenders: dict[str, list[str]]  # what is wrong: whose ids


# -- the clients


def expected_status(key: str) -> str:
    """What must become of a message, which its id says."""
    return "error" if key.startswith("gone") else "sent"


class Client(threading.Thread):
    """Submits one small batch after another, and again what it has no answer to; knows which ids got a 200."""

    def __init__(self, number: int, seed: int, port: int, enough: threading.Event, pause_s: float = 0.0) -> None:
        super().__init__(name=f"client-{number}", daemon=True)
        self.accepted: set[str] = set()
        self.refusals: list[str] = []
        self.unanswered = self.known = self.put_off = 0
        self.longest_s = 0.0  # until an answer came, or none
        self._number, self._port, self._enough, self._pause_s = number, port, enough, pause_s
        self._dice = random.Random(f"{seed}/client/{number}")
        self._sequence = 0
        self._open: list[dict[str, object]] = []  # submitted, not answered yet
        self._answered: deque[list[dict[str, object]]] = deque(maxlen=200)

    def run(self) -> None:
        while not self._enough.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self.next_port(), timeout=30)
            try:
                for _ in range(self._dice.choice((1, 5, 100))):
                    if self._enough.wait(self._pause_s):
                        break
                    self._submit(connection)
            except (OSError, http.client.HTTPException):
                self.unanswered += 1
                time.sleep(0.02)  # the daemon is dead just now
            finally:
                connection.close()

    def next_port(self) -> int:
        return self._port

    def next_lane(self) -> str:
        return "default"

    def _submit(self, connection: http.client.HTTPConnection) -> None:
        batch = self._open = self._open or self._next_batch()
        body = json.dumps({"messages": batch}).encode()
        began = time.monotonic()
        try:
            connection.request("POST", "/commands/add-messages", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            told = json.loads(answer.read())
        finally:
            self.longest_s = max(self.longest_s, time.monotonic() - began)
        if answer.status == 200 and not told["rejected"]:
            self.accepted.update(str(message["id"]) for message in batch)
            self.known += len(told.get("known", ()))
            self._answered.append(batch)
        elif answer.status == 503 and self._pause_s:
            self.put_off += 1
            time.sleep(0.1)
            raise http.client.HTTPException("the same again, elsewhere")
        else:
            self.refusals.append(f"{answer.status} {told}")
        self._open = []

    def _next_batch(self) -> list[dict[str, object]]:
        if self._answered and self._dice.random() < 0.1:
            return self._dice.choice(self._answered)
        return [self._next_message() for _ in range(self._dice.choice((1, 1, 1, 2, 5)))]

    def _next_message(self) -> dict[str, object]:
        """Most go through; some are refused for ever, some for a while."""
        self._sequence += 1
        fate = self._dice.choices(("sent", "gone", "later"), (90, 5, 5))[0]
        lane = self.next_lane()
        key = f"{fate}-{lane}-{self._number}-{self._sequence}"
        recipient = f"{fate}-{self._sequence}@receiver.example"
        message = load.message(key, headers={"X-Bench-Id": key}) | {"to": [recipient]}
        return message if lane == "default" else message | {"account_id": lane}


# -- the troubles


class Troubles(threading.Thread):
    """Breaks the SMTP server and the receiver of reports, and mends them, until told to stop."""

    def __init__(self, plan: Plan, sink: Companion, receiver: Companion) -> None:
        super().__init__(name="troubles", daemon=True)
        self.kills_ns: list[int] = []  # of the SMTP server
        self.said: Counter[str] = Counter()
        self._plan, self._sink, self._receiver = plan, sink, receiver
        self._dice = random.Random(f"{plan.seed}/troubles")
        self._enough = threading.Event()

    def run(self) -> None:
        troubles = [self._smtp_trouble] * self._plan.smtp + [self._report_trouble] * self._plan.reports
        while troubles and not self._enough.wait(self._dice.uniform(0.3, 1.5)):
            self._dice.choice(troubles)()

    def end(self) -> None:
        """Stop; everything outside works again."""
        self._enough.set()
        self.join(60)
        self._receiver.numbers[Companion.MODE] = TAKES

    def _smtp_trouble(self) -> None:
        self.said["SMTP server killed"] += 1
        self._sink.kill()
        self.kills_ns.append(time.monotonic_ns())
        time.sleep(self._dice.uniform(0.0, 0.5))
        self._sink.start()

    def _report_trouble(self) -> None:
        name, mode = self._dice.choice(
            (
                ("takes", TAKES),
                ("slow", SLOW),
                ("500", REFUSES),
                ("dies while answering", DIES),
                ("never answers", HANGS),
                ("down", None),
            )
        )
        self.said[f"receiver of reports: {name}"] += 1
        if mode is not None:
            self._receiver.numbers[Companion.MODE] = mode
            return
        self._receiver.kill()
        time.sleep(self._dice.uniform(0.0, 1.0))
        self._receiver.start()


# -- the run


def sections(smtp_port: int, reports_port: int) -> dict[str, dict[str, object]]:
    return {
        "smtp": {
            "host": "127.0.0.1", "port": smtp_port, "start_tls": "never", "max_connections": CONNECTIONS,
        },
        "client": {"client_sync_url": f"http://127.0.0.1:{reports_port}/", "timeout_seconds": 2},
        "delivery": {"retry_delays": "1, 2", "delivery_report_retention_seconds": 20},
        "logging": {"level": "warning"},
    }  # fmt: skip


def new_daemon(plan: Plan, folder: Path, sink: Companion, receiver: Companion) -> Daemon:
    program = Path(plan.program).absolute() if plan.program else None
    return Daemon(folder / "daemon", sections(sink.port, receiver.port), program)


def run(plan: Plan, folder: Path, tell: Callable[[str], None] = print) -> Verdict:
    """The whole of it, in that folder. Blocking."""
    mail_log, report_log = folder / "mail.log", folder / "reports.log"
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(Companion(serve_smtp, SMTP_MANNER, str(mail_log)))
        receiver = stack.enter_context(Companion(serve_reports, str(report_log)))
        daemon = stack.enter_context(new_daemon(plan, folder, sink, receiver))
        enough = threading.Event()
        stack.callback(enough.set)
        clients = [Client(number, plan.seed, daemon.port, enough) for number in range(plan.clients)]
        troubles = Troubles(plan, sink, receiver)
        for thread in (*clients, troubles):
            thread.start()
        kills_ns, damage = kill_again_and_again(plan, daemon, sink, folder, tell)
        enough.set()
        for client in clients:
            client.join(60)
        troubles.end()
        tell(f"troubles: {dict(troubles.said)}; now all has to settle")
        exit_status = settled(daemon)
        if (said := rig.integrity(daemon.db, folder)) != "ok":
            damage.append(f"at the end: {said}")
    return judged(
        Evidence(
            set().union(*(client.accepted for client in clients)),
            read_deliveries(mail_log),
            read_reports(report_log),
            [refusal for client in clients for refusal in client.refusals],
            sorted([*kills_ns, *troubles.kills_ns]),
            damage,
            exit_status,
        ),
        sum(client.unanswered for client in clients),
        sum(client.known for client in clients),
    )


def kill_again_and_again(
    plan: Plan, daemon: Daemon, sink: Companion, folder: Path, tell: Callable[[str], None]
) -> tuple[list[int], list[str]]:
    """The rounds; returns when the kills were, and what integrity_check found."""
    dice = random.Random(f"{plan.seed}/kills")
    kills_ns: list[int] = []
    damage: list[str] = []
    for number in range(1, plan.rounds + 1):
        time.sleep(dice.uniform(0.05, 1.0))
        daemon.kill()
        if (said := rig.integrity(daemon.db, folder)) != "ok":
            damage.append(f"round {number}: {said}")
        sink.numbers[Companion.MODE] = NO_CHUNKING * (number % 2)
        kills_ns.append(time.monotonic_ns())  # by now the SMTP server has read what the dead one sent
        daemon.launch()
        if dice.random() < 0.8:  # else the next kill may come while it starts
            daemon.wait_until_serving()
        if number % 10 == 0:
            tell(f"round {number}: the file has {daemon.db.stat().st_size / rig.MIB:.0f} MiB")
    daemon.wait_until_serving()
    return kills_ns, damage


def settled(daemon: Daemon) -> int | None:
    """Wait until everything is delivered and acknowledged, and stop the daemon; its exit status."""
    deadline = time.monotonic() + SETTLE_S
    while time.monotonic() < deadline:
        daemon.command("run-now")  # ends pauses and cooling that the troubles left behind
        with contextlib.suppress(rig.BenchError):
            daemon.wait_for_status(lambda status: status["pending"] == status["unreported"] == 0, 1)
            break
    return daemon.stop()


def read_deliveries(log: Path) -> dict[str, list[Delivery]]:
    deliveries: dict[str, list[Delivery]] = defaultdict(list)
    for line in lines_of(log):
        at_ns, key, message_id, command, name, mail_ns = line.split()
        delivery = Delivery(int(at_ns), message_id, command, name.partition(".")[0], int(mail_ns))
        deliveries[key].append(delivery)
    return deliveries


def read_reports(log: Path) -> dict[str, Counter[str]]:
    reported: dict[str, Counter[str]] = defaultdict(Counter)
    for line in lines_of(log):
        key, status = line.split()
        reported[key][status] += 1
    return reported


def lines_of(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


# -- the verdict


def judged_alike(
    accepted: set[str],
    deliveries: Mapping[str, Sequence[Delivery]],
    reported: Mapping[str, Counter[str]],
    refusals: Sequence[str],
) -> Verdict:
    """What is to be said whatever was killed."""
    to_send = {key for key in accepted if expected_status(key) == "sent"}
    offenders = {
        "nothing accepted": [] if accepted else ["no submission got a 200"],
        "refused": list(refusals),
        "accepted but never delivered": sorted(to_send - deliveries.keys()),
        "delivered although refused": sorted(key for key in deliveries if key.startswith("gone")),
        "never reported in its final state": sorted(
            key for key in accepted if not reported.get(key, Counter())[expected_status(key)]
        ),
        "reported in a wrong final state": sorted(
            key for key, said in reported.items() if said["sent" if expected_status(key) == "error" else "error"]
        ),
        "delivered again under another Message-ID": sorted(
            key for key, taken in deliveries.items() if len({delivery.message_id for delivery in taken}) > 1
        ),
    }
    counts = {
        "accepted": len(accepted),
        "delivered": len(deliveries),
        "delivered by BDAT": sum(any(taken.command == "BDAT" for taken in each) for each in deliveries.values()),
        "delivered without an answered submission": len(deliveries.keys() - accepted),
        "doubled": sum(len(taken) - 1 for taken in deliveries.values()),
        "report entries": sum(said.total() for said in reported.values()),
    }
    return Verdict(counts, offenders)


def judged(evidence: Evidence, unanswered: int, known: int) -> Verdict:
    alike = judged_alike(evidence.accepted, evidence.deliveries, evidence.reported, evidence.refusals)
    at_kills, unexplained = doubled_at_kills(evidence.deliveries, evidence.kills_ns)
    offenders = {
        **alike.offenders,
        "delivered twice without a kill between": unexplained,
        "kills that doubled more than was on the wire": [
            f"kill {number}: {len(keys)}" for number, keys in at_kills.items() if len(keys) > CONNECTIONS
        ],
        "damage": list(evidence.damage),
        "stopping": [] if evidence.exit_status == 0 else [f"exit status {evidence.exit_status}"],
    }
    counts = {
        **alike.counts,
        "most doubled at one kill": max(map(len, at_kills.values()), default=0),
        "kills": len(evidence.kills_ns),
        "submissions without an answer": unanswered,
        "submitted again, and known": known,
    }
    return Verdict(counts, {what: keys for what, keys in offenders.items() if keys})


def doubled_at_kills(
    deliveries: Mapping[str, Sequence[Delivery]], kills_ns: Sequence[int]
) -> tuple[dict[int, list[str]], list[str]]:
    """Which messages each kill made go out again; and those that went out again with no kill between."""
    at_kills: dict[int, list[str]] = defaultdict(list)
    unexplained = []
    for key, taken in deliveries.items():
        for earlier, later in pairwise(taken):
            between = next((n for n, at in enumerate(kills_ns, 1) if earlier.at_ns <= at <= later.at_ns), None)
            if between is None:
                unexplained.append(key)
            else:
                at_kills[between].append(key)
    return at_kills, unexplained


def told(verdict: Verdict) -> list[str]:
    """The verdict for people."""
    lines = [
        f"{what}: {count:,}" if isinstance(count, int) else f"{what}: {count}" for what, count in verdict.counts.items()
    ]
    for what, keys in verdict.offenders.items():
        lines.append(f"WRONG, {what}: {len(keys)}: {', '.join(keys[:SHOWN_OFFENDERS])}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100, help="how often the daemon is killed (100)")
    parser.add_argument("--seed", type=int, default=1, help="of the moments and the troubles (1)")
    parser.add_argument("--clients", type=int, default=4, help="that submit at the same time (4)")
    parser.add_argument("--smtp", action="store_true", help="kill the SMTP server as well")
    parser.add_argument("--reports", action="store_true", help="trouble the receiver of the reports as well")
    parser.add_argument("--postgres", action="store_true", help="three daemons on one database, as nodes.py says")
    parser.add_argument("--program", help="what to run instead of the zipapp: mailproxy.py, say")
    plan = Plan(**vars(parser.parse_args()))
    rig.end_cleanly_when_told()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mailproxy-chaos-") as folder:
        import nodes  # which knows this file

        to_run = nodes.run if plan.postgres else run
        verdict = to_run(plan, Path(folder), tell=lambda line: print(line, file=sys.stderr, flush=True))
    print("\n".join(told(verdict)))
    summary = {"ok": not verdict.offenders, "seconds": round(time.monotonic() - began), **plan._asdict()}
    offenders = {what: keys[:SHOWN_OFFENDERS] for what, keys in verdict.offenders.items()}
    print(json.dumps(summary | {"counts": verdict.counts, "offenders": offenders}))
    return 1 if verdict.offenders else 0


if __name__ == "__main__":
    sys.exit(main())
