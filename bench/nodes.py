"""chaos.py --postgres: three daemons on one PostgreSQL, each with a line to it that can be cut.

In each round a node is killed and started again, stopped (SIGSTOP) and continued, cut off from the database, or
stopped in order and started; or the database is restarted, fast or immediately. Some of it lasts longer than a
lease. The next round begins while this one may still last, with a node that has no trouble yet.
"""

from __future__ import annotations

import bisect
import contextlib
import random
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

import chaos
import rig
from chaos import Client, Delivery, Plan, Verdict
from rig import Companion, Daemon, Postgres
from sinks import CLOSES, HOLDS, PASSES, SWALLOWS, Manner, serve_cut, serve_reports, serve_smtp

NAMES = ("node-a", "node-b", "node-c")
LANES = {"many": 5, "few": 2, "ordered": 1, "limited": 3}  # account: connections
CONNECTIONS = sum(LANES.values())
LIMIT_PER_MINUTE = 120  # of the account limited
LONGER_THAN_A_LEASE_S = 18.0
RECORDED_S = 3.0  # so long after its delivery a message may not be recorded yet, on a busy machine
MANNER = Manner(message_s=0.05, chunking=True, refuses=True)  # so that mail waits, claimed, in whoever is stopped


class Trouble(NamedTuple):
    """What was done to a node (None: to all, as it was the database)."""

    what: str
    node: str | None
    began_ns: int
    ended_ns: int

    def explains(self, delivery: Delivery) -> bool:
        """Whether the delivery may not have been recorded because of it."""
        concerned = self.node in (None, delivery.node) and self.what != "orderly restart"
        return concerned and self.began_ns - RECORDED_S * 1e9 <= delivery.at_ns <= self.ended_ns + 1e9


class Node:
    """A daemon and its line to the database."""

    def __init__(self, name: str, database: Postgres, folder: Path, program: Path | None, ports: Sequence[int]) -> None:
        self.name = name
        self.line = Companion(serve_cut, database.port)
        self.daemon = Daemon(folder / name, sections(name, database.url("chaos", self.line.port), *ports), program)
        self.busy: Future[Trouble] | None = None  # the trouble it is in

    def end(self) -> None:
        with contextlib.suppress(rig.BenchError):
            self.daemon.stop()
        self.line.kill()


def sections(name: str, url: str, smtp_port: int, reports_port: int) -> dict[str, dict[str, object]]:
    server = {"host": "127.0.0.1", "port": smtp_port, "start_tls": "never"}
    return {
        "storage": {"db_path": url, "node": name},
        "smtp": {"host": "127.0.0.1", "port": 9},  # the default account, which nobody uses
        **{f"account:{lane}": {**server, "max_connections": most} for lane, most in LANES.items() if lane != "limited"},
        "account:limited": {
            **server, "max_connections": LANES["limited"], "limit_per_minute": LIMIT_PER_MINUTE,
        },
        "client": {"client_sync_url": f"http://127.0.0.1:{reports_port}/", "timeout_seconds": 2},
        "delivery": {"retry_delays": "1, 2", "delivery_report_retention_seconds": 20, "hostname": f"{name}.test"},
        "logging": {"level": "warning"},
    }  # fmt: skip


# -- the troubles


class Troubles:
    """What is done to the nodes and the database; each leaves things as they were."""

    def __init__(self, database: Postgres, dice: random.Random) -> None:
        self._database, self._dice = database, dice
        self._database_lock = threading.Lock()

    def round(self, nodes: Sequence[Node]) -> tuple[Node | None, Callable[[], Trouble]]:
        """A node that has no trouble (None: the database), and what is to be done to it; the dice are thrown."""
        free = [node for node in nodes if node.busy is None or node.busy.done()]
        if not free or self._dice.random() < 0.15:
            how, away_s = self._dice.choice((signal.SIGINT, signal.SIGQUIT)), self._dice.choice((0.0, 0.5, 3.0))
            return None, lambda: self._restart_database(how, away_s)
        node, throw = self._dice.choice(free), self._dice.random()
        long = self._dice.random() < 0.3
        last_s = LONGER_THAN_A_LEASE_S + self._dice.uniform(0, 4) if long else self._dice.uniform(0.1, 3)
        if throw < 0.35:
            return node, lambda: self._kill(node, last_s)
        if throw < 0.6:
            return node, lambda: self._stop(node, last_s)
        if throw < 0.7:
            return node, lambda: self._restart(node)
        mode = self._dice.choice((CLOSES, HOLDS, SWALLOWS))
        return node, lambda: self._cut(node, mode, last_s)

    def _restart_database(self, how: signal.Signals, away_s: float) -> Trouble:
        with self._database_lock:
            began = time.monotonic_ns()
            self._database.stop(how)
            time.sleep(away_s)
            self._database.start()
            return self._over(f"database stopped by {how.name}", None, began)

    def _kill(self, node: Node, last_s: float) -> Trouble:
        began = time.monotonic_ns()
        node.daemon.kill()
        ended = time.monotonic_ns()
        time.sleep(last_s)
        node.daemon.launch()
        node.daemon.wait_until_serving()
        return Trouble(f"kill{self._long(last_s)}", node.name, began, ended)

    def _stop(self, node: Node, last_s: float) -> Trouble:
        began = time.monotonic_ns()
        node.daemon.signal(signal.SIGSTOP)
        time.sleep(last_s)
        node.daemon.signal(signal.SIGCONT)
        return self._over(f"SIGSTOP{self._long(last_s)}", node.name, began)

    def _restart(self, node: Node) -> Trouble:
        began = time.monotonic_ns()
        if (status := node.daemon.stop()) != 0:
            raise rig.BenchError(f"{node.name} stopped with status {status}:\n{node.daemon.log_tail()}")
        node.daemon.start()
        return self._over("orderly restart", node.name, began)

    def _cut(self, node: Node, mode: int, last_s: float) -> Trouble:
        began = time.monotonic_ns()
        node.line.numbers[Companion.MODE] = mode
        time.sleep(last_s)
        node.line.numbers[Companion.MODE] = PASSES
        name = {CLOSES: "cut", HOLDS: "cut that holds", SWALLOWS: "cut that swallows"}[mode]
        return self._over(f"{name}{self._long(last_s)}", node.name, began)

    @staticmethod
    def _long(last_s: float) -> str:
        return ", longer than a lease" if last_s >= LONGER_THAN_A_LEASE_S else ""

    @staticmethod
    def _over(what: str, node: str | None, began_ns: int) -> Trouble:
        return Trouble(what, node, began_ns, time.monotonic_ns())


# -- the run


def run(plan: Plan, folder: Path, tell: Callable[[str], None] = print) -> Verdict:
    """The whole of it, in that folder. Blocking."""
    mail_log, report_log = folder / "mail.log", folder / "reports.log"
    program = Path(plan.program).absolute() if plan.program else None
    with contextlib.ExitStack() as stack:
        database = stack.enter_context(Postgres(folder))
        database.rows("postgres", "CREATE DATABASE chaos")
        sink = stack.enter_context(Companion(serve_smtp, MANNER, str(mail_log)))
        receiver = stack.enter_context(Companion(serve_reports, str(report_log)))
        nodes = []
        for name in NAMES:
            nodes.append(node := Node(name, database, folder, program, (sink.port, receiver.port)))
            stack.callback(node.end)
            node.daemon.launch()  # all at once: they race for CREATE TABLE
        for node in nodes:
            node.daemon.wait_until_serving()
        enough = threading.Event()
        stack.callback(enough.set)
        clients = [NodesClient(number, plan.seed, nodes, enough) for number in range(3 * plan.clients)]
        for client in clients:
            client.start()
        troubles = trouble_again_and_again(plan, nodes, database, tell)
        enough.set()
        for client in clients:
            client.join(60)
        tell(f"troubles: {dict(Counter(trouble.what for trouble in troubles))}; now all has to settle")
        left, exit_statuses = settled(nodes, database)
    deliveries = chaos.read_deliveries(mail_log)
    verdict = chaos.judged_alike(
        set().union(*(client.accepted for client in clients)),
        deliveries,
        chaos.read_reports(report_log),
        [refusal for client in clients for refusal in client.refusals],
    )
    order = [line.removesuffix(" sent") for line in chaos.lines_of(report_log) if line.endswith(" sent")]
    offenders = {**verdict.offenders, **judged(deliveries, order, troubles), "left in the database": left}
    offenders["stopping"] = [str(status) for status in exit_statuses if status != 0]
    counts = {
        **verdict.counts,
        "delivered by each node": dict(Counter(each.node for taken in deliveries.values() for each in taken)),
        "lanes changed hands": sum(changes_of_hands(deliveries).values()),
        "submissions without an answer": sum(client.unanswered for client in clients),
        "submissions that got a 503": sum(client.put_off for client in clients),
        "submitted again, and known": sum(client.known for client in clients),
        "longest wait for an answer, s": round(max(client.longest_s for client in clients), 1),
        "troubles": dict(Counter(trouble.what for trouble in troubles)),
    }
    return Verdict(counts, {what: keys for what, keys in offenders.items() if keys})


class NodesClient(Client):
    """Goes to any node, and to another with the same messages when it got no answer, or a 503."""

    def __init__(self, number: int, seed: int, nodes: Sequence[Node], enough: threading.Event) -> None:
        super().__init__(number, seed, nodes[0].daemon.port, enough, pause_s=0.15)
        self._nodes = nodes

    def next_port(self) -> int:
        return self._dice.choice(self._nodes).daemon.port

    def next_lane(self) -> str:
        return self._dice.choices(("many", "few", "ordered", "limited"), self._weights())[0]

    def _weights(self) -> tuple[int, ...]:
        """The limited lane gets a little more than it may send, in bursts."""
        in_burst = time.monotonic() % 15 < 1.5
        return (60, 20, 17, 20 if in_burst else 1)


def trouble_again_and_again(
    plan: Plan, nodes: Sequence[Node], database: Postgres, tell: Callable[[str], None]
) -> list[Trouble]:
    dice = random.Random(f"{plan.seed}/nodes")
    makes = Troubles(database, dice)
    begun: list[Future[Trouble]] = []
    with ThreadPoolExecutor(2 * len(nodes)) as pool:
        for number in range(1, plan.rounds + 1):
            time.sleep(dice.uniform(0.5, 4.0))
            while sum(not future.done() for future in begun) > 2:
                time.sleep(0.1)
            node, act = makes.round(nodes)
            begun.append(pool.submit(act))
            if node:
                node.busy = begun[-1]
            if number % 10 == 0:
                tell(f"round {number}: {', '.join(future.result().what for future in begun[-10:] if future.done())}")
    return sorted((future.result() for future in begun), key=lambda trouble: trouble.began_ns)


def settled(nodes: Sequence[Node], database: Postgres) -> tuple[list[str], list[int | None]]:
    """Wait until all is delivered and acknowledged, and stop the nodes; what is wrong in the database, exit statuses."""
    deadline = time.monotonic() + chaos.SETTLE_S
    while time.monotonic() < deadline:
        nodes[0].daemon.command("run-now")
        with contextlib.suppress(rig.BenchError):
            nodes[-1].daemon.wait_for_status(lambda said: said.get("pending") == said.get("unreported") == 0, 2)
            break
    exit_statuses = [node.daemon.stop() for node in nodes]
    left = []
    for what, count in (
        ("claims", "SELECT count(*) FROM claims"),
        ("leases", "SELECT count(*) FROM leases WHERE instance <> ''"),
        ("nodes", "SELECT count(*) FROM nodes"),
        ("pending", "SELECT count(*) FROM messages WHERE sent_ts IS NULL AND error_ts IS NULL"),
        ("unreported", "SELECT count(*) FROM messages WHERE report_order IS NOT NULL"),
    ):
        if number := database.rows("chaos", count)[0][0]:
            left.append(f"{number} rows: {what}")
    return left, exit_statuses


# -- the verdict


def lane_of(key: str) -> str:
    return key.split("-")[1]


def judged(
    deliveries: Mapping[str, Sequence[Delivery]], reported: Sequence[str], troubles: Sequence[Trouble]
) -> dict[str, list[str]]:
    """What is wrong with the deliveries of several nodes: whose ids."""
    doubled: dict[Trouble, list[str]] = defaultdict(list)
    unexplained = []
    for key, taken in deliveries.items():
        for earlier, _ in pairwise(taken):
            if trouble := next((trouble for trouble in troubles if trouble.explains(earlier)), None):
                doubled[trouble].append(key)
            else:
                unexplained.append(key)
    return {
        "delivered twice without a trouble between": unexplained,
        "troubles that doubled more than was on the wire": [
            f"{trouble.what} of {trouble.node}: {len(keys)}"
            for trouble, keys in doubled.items()
            if len(keys) > CONNECTIONS
        ],
        "beyond the limit": beyond_the_limit(deliveries, troubles),
        "out of order": out_of_order(deliveries, troubles),
        "sent by two nodes at a time": sent_by_two(deliveries, troubles),
        "reported out of order": reported_out_of_order(deliveries, reported, troubles),
    }


def in_lane(deliveries: Mapping[str, Sequence[Delivery]], lane: str) -> list[tuple[Delivery, str]]:
    """Its deliveries as they came."""
    return sorted((each, key) for key, taken in deliveries.items() if lane_of(key) == lane for each in taken)


def beyond_the_limit(deliveries: Mapping[str, Sequence[Delivery]], troubles: Sequence[Trouble]) -> list[str]:
    """Minutes with more than the limit and what was on the wire at the troubles of that minute (and of the one before)."""
    times = [each.at_ns for each, _ in in_lane(deliveries, "limited")]
    wrong = []
    for number, began in enumerate(times):
        ended = began + int(59.5e9)
        count = bisect.bisect_left(times, ended) - number
        lost = sum(trouble.began_ns < ended and trouble.ended_ns > began - 60e9 for trouble in troubles)
        if count > LIMIT_PER_MINUTE + lost * LANES["limited"]:
            wrong.append(f"{count} in the minute from {began / 1e9:.1f} with {lost} troubles")
    return wrong


def runs_of(
    deliveries: Mapping[str, Sequence[Delivery]], lane: str, troubles: Sequence[Trouble]
) -> Iterator[list[tuple[Delivery, str]]]:
    """The lane's deliveries, parted where another node has it, or a trouble of the node begins or ends."""

    def part(sent: tuple[Delivery, str]) -> tuple[str, int]:
        delivery, _ = sent
        concerned = [trouble for trouble in troubles if trouble.node in (None, delivery.node)]
        return delivery.node, sum(
            (each.began_ns < delivery.at_ns) + (each.ended_ns < delivery.at_ns) for each in concerned
        )

    for _, run in groupby(in_lane(deliveries, lane), part):
        yield list(run)


def out_of_order(deliveries: Mapping[str, Sequence[Delivery]], troubles: Sequence[Trouble]) -> list[str]:
    """Of the lane with one connection: a client's messages, each accepted before the next was submitted."""
    wrong = []
    for run in runs_of(deliveries, "ordered", troubles):
        last: dict[str, tuple[int, str]] = {}
        for delivery, key in run:
            fate, _, client, number = key.split("-")
            if fate != "sent" or delivery != deliveries[key][0]:
                continue
            if (before := last.get(client)) and before[0] > int(number):
                wrong.append(f"{key} after {before[1]}")
            last[client] = (int(number), key)
    return wrong


def sent_by_two(deliveries: Mapping[str, Sequence[Delivery]], troubles: Sequence[Trouble]) -> list[str]:
    """Messages begun by one node between two of another one that had no trouble meanwhile, and so kept the lane."""
    wrong = []
    for lane in LANES:
        begun = sorted((each.mail_ns, each.node, key) for each, key in in_lane(deliveries, lane))
        runs = [list(run) for _, run in groupby(begun, key=lambda each: each[1])]
        for before, run, after in zip(runs, runs[1:], runs[2:], strict=False):
            keeper, since, until = before[-1][1], before[-1][0], after[0][0]
            troubled = any(
                trouble.node in (None, keeper) and trouble.began_ns < until and trouble.ended_ns > since - 20e9
                for trouble in troubles
            )
            if after[0][1] == keeper and not troubled:
                wrong.append(f"{run[0][2]} by {run[0][1]} while {keeper} had the lane")
    return wrong


def reported_out_of_order(
    deliveries: Mapping[str, Sequence[Delivery]], reported: Sequence[str], troubles: Sequence[Trouble]
) -> list[str]:
    """Of the lane with one connection: messages that were sent once, and recorded at once, are reported as they were sent."""
    first: dict[str, int] = {}
    for number, key in enumerate(reported):
        first.setdefault(key, number)
    once = [
        key
        for delivery, key in in_lane(deliveries, "ordered")
        if len(deliveries[key]) == 1 and key in first and not any(trouble.explains(delivery) for trouble in troubles)
    ]
    return [f"{later} before {earlier}" for earlier, later in pairwise(once) if first[earlier] > first[later]]


def changes_of_hands(deliveries: Mapping[str, Sequence[Delivery]]) -> dict[str, int]:
    return {
        lane: sum(one.node != other.node for (one, _), (other, _) in pairwise(in_lane(deliveries, lane)))
        for lane in LANES
    }
