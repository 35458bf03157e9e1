"""A long run against SMTP servers that misbehave at random: does delivery ever do the wrong thing?

    python3 bench/misbehave.py [--minutes 30] [--seed 1] [--rate 8]

Messages to one to five recipients go out through six accounts whose servers (one with a login) throw dice at
every step: 4xx and 5xx to the greeting, EHLO, AUTH, MAIL, RCPT, DATA and the end of data, some recipients refused
and others not, 421 anywhere, connections dropped anywhere (after the data with the message kept and without),
replies that never come, come late or byte by byte, refused connections, idle connections closed. A seventh
account's server behaves: its mail must not wait for the others'.

The servers write down what they took from whom and what they said. When the time is over it is checked that

  - every message is final, or waits for a reason that its server (or the dice) did give it;
  - then the servers behave, and all must become final: nothing is lost;
  - a message is `sent` when one of its recipients was taken, `error` when none was, and each of its recipients
    has the outcome its server gave it;
  - no recipient was sent to again after a server had taken the message for him, but where that was in doubt
    (its answer never left the server whole).

The same seed throws the same dice for the same connections. Prints figures; the last line is JSON; exit status
1 with the offenders listed when something was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import load
import rig
from rig import Daemon
from sinks import header

TIMEOUT_S = 2  # of the accounts: for each reply but the last
BAD_ACCOUNTS = tuple(f"bad{number}" for number in range(6))
GOOD_ACCOUNT = "good"
OPERATOR_PAUSE_S = 10.0  # between run-now calls, which end cooling: else most of the time nothing would happen
SETTLE_S = 900.0
HANG_S = 650.0  # longer than the 600 s that the reply to the end of data is given
SHOWN_OFFENDERS = 20

# What the dice may bring at a step, with weights; all else is good behaviour.
GOOD = "good"
MISDEEDS: dict[str, dict[str, float]] = {
    "connect": {GOOD: 90, "421": 2, "554": 1, "451": 1, "drop": 3, "hang": 1, "trickle": 2},
    "ehlo": {GOOD: 95, "421": 1, "550": 1, "drop": 2, "trickle": 1},
    "auth": {GOOD: 93, "535": 2, "454": 2, "421": 1, "drop": 2},
    "mail": {GOOD: 92, "451": 2, "550": 1, "421": 1, "drop": 2, "hang": 1, "trickle": 1},
    "rcpt": {GOOD: 86, "450": 5, "550": 4, "452": 2, "421": 1, "drop": 1, "hang": 1},
    "data": {GOOD: 92, "451": 2, "554": 1, "421": 1, "drop": 2, "hang": 1, "trickle": 1},
    "content": {GOOD: 97, "drop": 3},  # while the message is being sent
    "end": {
        GOOD: 82, "451": 3, "554": 2, "421": 2, "drop": 2, "keep and drop": 3, "late": 3, "trickle": 1.95, "hang": 0.05,
    },
    "idle": {GOOD: 70, "close": 30},  # after a message
}  # fmt: skip


class Taking(NamedTuple):
    """A server took a message for a recipient."""

    message_id: str
    in_doubt: bool  # its answer did not leave the server whole


class Truth:
    """What really happened, as the servers know it."""

    def __init__(self) -> None:
        self.takings: dict[tuple[str, str], list[Taking]] = defaultdict(list)  # by key and recipient
        self.refused: dict[tuple[str, str], set[int]] = defaultdict(set)  # codes said to a recipient
        self.said: dict[str, set[str]] = defaultdict(set)  # misdeeds that met a message, by its key
        self.misdeeds: Counter[str] = Counter()
        self.connections = 0

    def takes(self, key: str, recipients: Iterable[str], content: bytes, in_doubt: bool) -> None:
        message_id = header(content, b"Message-ID").decode()
        for recipient in recipients:
            self.takings[key, recipient].append(Taking(message_id, in_doubt))


class Hangup(Exception):
    """The server ends the connection, one way or another."""


class Conversation:
    """One connection to a misbehaving server."""

    def __init__(
        self, server: Server, dice: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._server, self._dice, self._reader, self._writer = server, dice, reader, writer
        self._truth = server.truth
        self._key = ""  # of the message whose envelope is being given
        self._recipients: list[str] = []

    async def hold(self) -> None:
        with contextlib.suppress(Hangup, OSError, asyncio.IncompleteReadError):
            await self._step("connect", "220 misbehaving.test ESMTP")
            while True:
                line = await self._line()
                await self._obey(line[:4].upper(), line)
        self._writer.close()

    async def _line(self) -> str:
        async with asyncio.timeout(700):
            return (await self._reader.readuntil(b"\r\n")).decode("utf-8", "replace").rstrip()

    async def _obey(self, verb: str, line: str) -> None:
        if verb == "EHLO":
            await self._step("ehlo", self._offers())
        elif verb == "AUTH":
            await self._log_in(line)
        elif verb == "MAIL":
            self._recipients = []
            found = re.search(r"<([^@>]*)@", line)
            self._key = found[1] if found else ""
            await self._step("mail", "250 2.1.0 ok")
        elif verb == "RCPT":
            await self._recipient(line)
        elif verb == "DATA":
            await self._content()
        elif verb == "QUIT":
            await self._say("221 2.0.0 bye")
            raise Hangup
        else:
            await self._say("250 2.0.0 ok")

    def _offers(self) -> str:
        offers = ["misbehaving.test", "8BITMIME", "SIZE 50000000", "ENHANCEDSTATUSCODES"]
        offers += ["PIPELINING"] * self._server.pipelining + ["AUTH PLAIN LOGIN"] * self._server.login
        return "\r\n".join(f"250{' ' if offer is offers[-1] else '-'}{offer}" for offer in offers)

    async def _log_in(self, line: str) -> None:
        if len(line.split()) < 3:  # LOGIN, or PLAIN without its answer
            for _ in range(2 if "LOGIN" in line.upper() else 1):
                await self._say("334 ")
                await self._line()
        await self._step("auth", "235 2.7.0 welcome")

    async def _recipient(self, line: str) -> None:
        found = re.search(r"<([^>]*)>", line)
        recipient = found[1] if found else ""
        code = await self._step("rcpt", "250 2.1.5 ok", recipient)
        if code == 250:
            self._recipients.append(recipient)

    async def _content(self) -> None:
        if not self._recipients:
            await self._say("554 5.5.1 no valid recipients")
            return
        if await self._step("data", "354 go on") != 354:
            return
        if self._throw("content") == "drop":
            await self._reader.read(200)
            raise Hangup
        async with asyncio.timeout(60):
            content = await self._reader.readuntil(b"\r\n.\r\n")
        await self._end_of_data(content)
        if self._throw("idle") == "close":
            await asyncio.sleep(self._dice.uniform(0, 0.5))
            raise Hangup

    async def _end_of_data(self, content: bytes) -> None:
        deed = self._throw("end")
        takes = lambda in_doubt: self._truth.takes(self._key, self._recipients, content, in_doubt)  # noqa: E731
        if deed in ("drop", "keep and drop"):
            if deed == "keep and drop":
                takes(in_doubt=True)
            raise Hangup
        if deed == "hang":
            takes(in_doubt=True)
            await self._wait(HANG_S)
        if deed == "late":
            await self._wait(self._dice.uniform(TIMEOUT_S, 10 * TIMEOUT_S))  # it has 600 s
        if deed in (GOOD, "late", "trickle"):
            await self._take(takes, deed)
        else:
            self._refuse_recipients(int(deed))
            await self._refuse("end", deed)

    async def _take(self, takes: Callable[[bool], None], deed: str) -> None:
        """In doubt unless the whole answer could be said."""
        try:
            await (self._trickle if deed == "trickle" else self._say)("250 2.0.0 taken")
        except (OSError, Hangup):
            takes(True)
            raise
        takes(False)

    def _refuse_recipients(self, code: int) -> None:
        for recipient in self._recipients:
            self._truth.refused[self._key, recipient].add(code)

    # -- the dice

    def _throw(self, step: str) -> str:
        deeds = MISDEEDS[step]
        deed = self._dice.choices(tuple(deeds), tuple(deeds.values()))[0]
        if self._server.behaves() or (deed == "hang" and step == "end" and not self._server.may_hang()):
            return GOOD
        if deed != GOOD:
            self._truth.misdeeds[f"{step}: {deed}"] += 1
            self._truth.said[self._key].add(f"{step}: {deed}")
        return deed

    async def _step(self, step: str, good_reply: str, recipient: str = "") -> int:
        """Answer a command as the dice fall; the code that was said."""
        deed = self._throw(step)
        if deed == "drop":
            raise Hangup
        if deed == "hang":
            await self._wait(3 * TIMEOUT_S)
            raise Hangup
        if deed == GOOD:
            await self._say(good_reply)
        elif deed == "trickle":
            await self._trickle(good_reply)
        else:
            if recipient:
                self._truth.refused[self._key, recipient].add(int(deed))
            elif step in ("mail", "data"):
                self._truth.refused[self._key, "*"].add(int(deed))
            await self._refuse(step, deed)
            return int(deed)
        return int(good_reply[:3])

    async def _refuse(self, step: str, code: str) -> None:
        text = "too many recipients" if code == "452" else f"the dice say so at {step}"
        await self._say(f"{code} {code[0]}.{'5.3' if code == '452' else '7.0'} {text}")
        if code == "421" or step == "connect":
            raise Hangup

    async def _say(self, reply: str) -> None:
        self._writer.write(reply.encode() + b"\r\n")
        await self._writer.drain()
        if self._writer.transport.is_closing():
            raise Hangup

    async def _trickle(self, reply: str) -> None:
        """Byte by byte; half of the time for longer than a reply may take."""
        pause_s = self._dice.choice((0.2, 2.0)) * TIMEOUT_S / (len(reply) + 2)
        for byte in reply.encode() + b"\r\n":
            self._writer.write(bytes((byte,)))
            await self._writer.drain()
            await self._wait(pause_s)

    async def _wait(self, seconds: float) -> None:
        """Say nothing for so long; find out when the client has gone."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.5))
            if self._reader.at_eof() or self._writer.transport.is_closing():
                raise Hangup


class Server:
    """A server on a port; stops listening now and then, so that connections are refused."""

    def __init__(
        self, name: str, truth: Truth, behaves: Callable[[], bool], may_hang: Callable[[], bool], *,
        seed: int, login: bool, pipelining: bool,
    ) -> None:  # fmt: skip
        self.name, self.truth, self.behaves, self.may_hang = name, truth, behaves, may_hang
        self.login, self.pipelining = login, pipelining
        self.port = 0
        self._seed = seed
        self._connections = 0
        self._dice = random.Random(f"{seed}/{name}/listening")
        self._conversations: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._meet, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        self.truth.connections += 1
        dice = random.Random(f"{self._seed}/{self.name}/{self._connections}")
        try:
            await Conversation(self, dice, reader, writer).hold()
        except TimeoutError:
            writer.transport.abort()

    async def refuse_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(self._dice.uniform(20, 60))
            if self.behaves():
                continue
            self.truth.misdeeds["connect: refused"] += 1
            self._server.close()
            await asyncio.sleep(self._dice.uniform(0.5, 4))
            await self.listen()


# -- the run


class Run:
    """The submitter, the operator, and what they know."""

    def __init__(self, minutes: float, seed: int, rate: float) -> None:
        self.ends_at = time.monotonic() + minutes * 60
        self.truth, self.good_truth = Truth(), Truth()
        self.accepted: dict[str, list[str]] = {}  # recipients by key
        self._seed, self._rate = seed, rate
        self._dice = random.Random(f"{seed}/submissions")
        self._behaves = False

    def server(self, name: str, *, good: bool = False, login: bool = False, pipelining: bool = True) -> Server:
        return Server(
            name,
            self.good_truth if good else self.truth,
            lambda: good or self._behaves,
            lambda: time.monotonic() + HANG_S < self.ends_at,
            seed=self._seed, login=login, pipelining=pipelining,
        )  # fmt: skip

    def behave(self) -> None:
        self._behaves = True

    def next_message(self, number: int) -> dict[str, object]:
        """Its return path carries its key, so that the servers know from MAIL on which it is."""
        good = number % 10 == 0
        key = f"{'good' if good else 'bad'}-{number}"
        recipients = [f"r{place}-{key}@receiver.example" for place in range(self._dice.choice((1, 1, 1, 2, 5)))]
        account = GOOD_ACCOUNT if good else self._dice.choice(BAD_ACCOUNTS)
        self.accepted[key] = recipients
        more = {"account_id": account, "return_path": f"{key}@sender.example"}
        return load.message(key, **more) | {"to": recipients}

    async def submit(self, daemon: Daemon) -> None:
        number = 0
        while time.monotonic() < self.ends_at:
            await asyncio.to_thread(daemon.submit, [self.next_message(number)])
            number += 1
            await asyncio.sleep(self._dice.expovariate(self._rate))

    async def operate(self, daemon: Daemon) -> None:
        """Somebody presses run-now from time to time."""
        while True:
            await asyncio.sleep(OPERATOR_PAUSE_S)
            await asyncio.to_thread(daemon.command, "run-now")

    def settle(self, daemon: Daemon) -> None:
        """Now that the servers behave: wait until every message is final. Blocking."""
        with contextlib.suppress(rig.BenchError):  # what is not final then is named by the verdict
            daemon.wait_for_status(lambda status: status["pending"] == 0, SETTLE_S)


def sections(servers: Mapping[str, Server]) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {
        "delivery": {"retry_delays": "1, 3, 10", "max_age_seconds": 86_400},
        "logging": {"level": "warning"},
    }
    for account, server in servers.items():
        found[f"account:{account}"] = {
            "host": "127.0.0.1", "port": server.port, "start_tls": "never", "timeout": TIMEOUT_S, "max_connections": 4,
            **({"user": "bench", "password": "secret"} if server.login else {}),
        }  # fmt: skip
    return found


async def whole_run(run: Run, folder: Path, tell: Callable[[str], None]) -> tuple[list[Any], list[Any], int | None]:
    """The records when the time was over, those at the end, and the daemon's exit status."""
    kinds = (
        run.server("plain"), run.server("login", login=True), run.server("slow", pipelining=False),
        good := run.server("good", good=True),
    )  # fmt: skip
    for server in kinds:
        await server.listen()
    servers = {account: kinds[place % 3] for place, account in enumerate(BAD_ACCOUNTS)} | {GOOD_ACCOUNT: good}
    daemon = Daemon(folder, sections(servers))
    await asyncio.to_thread(daemon.start)
    try:
        beside = [asyncio.create_task(server.refuse_now_and_then()) for server in kinds[:3]]
        beside += [asyncio.create_task(run.operate(daemon)), asyncio.create_task(progress(run, daemon, tell))]
        await run.submit(daemon)
        records = await asyncio.to_thread(all_records, daemon)
        run.behave()
        tell("time is over; the servers behave from now on")
        await asyncio.to_thread(run.settle, daemon)
        await ended(beside)
        return records, await asyncio.to_thread(all_records, daemon), await asyncio.to_thread(daemon.stop)
    finally:
        await asyncio.to_thread(daemon.stop)


async def ended(tasks: Iterable[asyncio.Task[None]]) -> None:
    """End them; one that had failed before lets us know."""
    for task in tasks:
        if task.done():
            task.result()
        task.cancel()


async def progress(run: Run, daemon: Daemon, tell: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(60)
        status = await asyncio.to_thread(daemon.status)
        tell(
            f"{len(run.accepted):,} submitted, {status['pending']} pending, {run.truth.connections:,} connections, "
            f"{run.truth.misdeeds.total():,} misdeeds"
        )


def all_records(daemon: Daemon) -> list[dict[str, Any]]:
    return daemon.ask("GET", "/messages", timeout_s=300)["messages"]


# -- the verdict


def judged(
    run: Run, halfway: Iterable[Mapping[str, Any]], records: Iterable[Mapping[str, Any]]
) -> dict[str, list[str]]:
    """What is wrong: whose ids."""
    truth = Truth()
    for one in (run.truth, run.good_truth):
        truth.takings.update(one.takings)
        truth.refused.update(one.refused)
        truth.said.update(one.said)
        truth.misdeeds.update(one.misdeeds)
    by_key = {record["id"]: record for record in records}
    offenders = {
        "lost": [key for key in run.accepted if key not in by_key],
        "not final at the end": [key for key, record in by_key.items() if record["status"] not in ("sent", "error")],
        "waited for no true reason": [
            f"{record['id']} ({record['error']}; met {sorted(truth.said.get(record['id'], ()))})"
            for record in halfway
            if not waits_truly(record, truth)
        ],
        "sent but taken for nobody": [
            key for key, record in by_key.items() if record["status"] == "sent" and not taken_for(key, run, truth)
        ],
        "an error but taken": [
            key for key, record in by_key.items() if record["status"] == "error" and surely_taken_for(key, run, truth)
        ],
        "an error though never refused for good": [
            key for key, record in by_key.items() if record["status"] == "error" and not was_refused(key, run, truth)
        ],
        "a recipient's outcome is not what his server said": [
            key for key, record in by_key.items() if record["status"] == "sent" and not tells_truth(record, run, truth)
        ],
        "sent again although taken": [
            f"{key} to {recipient}" for (key, recipient), taken in truth.takings.items()
            if any(not taking.in_doubt for taking in taken[:-1])
        ],
        "sent again under another Message-ID": [
            key for (key, _), taken in truth.takings.items() if len({taking.message_id for taking in taken}) > 1
        ],
    }  # fmt: skip
    return {what: sorted(keys) for what, keys in offenders.items() if keys}


def taken_for(key: str, run: Run, truth: Truth) -> set[str]:
    return {recipient for recipient in run.accepted[key] if truth.takings.get((key, recipient))}


def surely_taken_for(key: str, run: Run, truth: Truth) -> set[str]:
    return {
        recipient
        for recipient in taken_for(key, run, truth)
        if any(not taking.in_doubt for taking in truth.takings[key, recipient])
    }


def was_refused(key: str, run: Run, truth: Truth) -> bool:
    """A server said 5xx to it at some step."""
    said = set(truth.refused.get((key, "*"), set()))
    for recipient in run.accepted[key]:
        said |= truth.refused.get((key, recipient), set())
    return any(code >= 500 for code in said)


def tells_truth(record: Mapping[str, Any], run: Run, truth: Truth) -> bool:
    """Whom the record calls sent was taken for; whom it calls failed was refused for good, and not taken for certain."""
    key = record["id"]
    outcomes = record["recipients"] or {recipient: {"status": "sent"} for recipient in run.accepted[key]}
    sent = {recipient for recipient, outcome in outcomes.items() if outcome["status"] == "sent"}
    others = set(run.accepted[key]) - sent
    return sent <= taken_for(key, run, truth) and not others & surely_taken_for(key, run, truth)


def waits_truly(record: Mapping[str, Any], truth: Truth) -> bool:
    """Final; or on its way; or deferred with a reason that fits something that was done to it or to its account."""
    if record["status"] in ("sent", "error", "queued"):
        return True
    error = record["error"] or ""
    codes = {int(code) for code in re.findall(r"\b([45]\d\d)\b", error)}
    if not record["deferred_ts"] or not error:
        return False
    met = truth.said.get(record["id"], set())
    of_connections = {deed for deed in truth.misdeeds if deed.startswith(("connect", "ehlo", "auth"))}
    steps_codes = {int(deed.rpartition(" ")[2]) for deed in met | of_connections if deed[-3:].isdigit()}
    return codes <= steps_codes if codes else bool(met | of_connections)


def figures(run: Run, records: list[dict[str, Any]]) -> dict[str, Any]:
    in_doubt = sum(taking.in_doubt for taken in run.truth.takings.values() for taking in taken)
    again = sum(len(taken) - 1 for taken in run.truth.takings.values())
    waits = sorted(
        record["sent_ts"] - record["created_at"]
        for record in records
        if record["account_id"] == GOOD_ACCOUNT and record["sent_ts"]
    )
    return {
        "messages": len(run.accepted),
        "recipients": sum(map(len, run.accepted.values())),
        "connections": run.truth.connections,
        "misdeeds": run.truth.misdeeds.total(),
        "taken in doubt": in_doubt,
        "taken again after that": again,
        "attempts": sum(record["attempts"] for record in records),
        **Counter(record["status"] for record in records),
        "longest wait of the good account, s": waits[-1] if waits else None,
    }


def report(run: Run, halfway: list[Any], records: list[Any], exit_status: int | None) -> bool:
    """Print it all; True when nothing was wrong."""
    offenders = judged(run, halfway, records)
    if exit_status != 0:
        offenders["stopping"] = [f"exit status {exit_status}"]
    counts = figures(run, records)
    waiting = Counter(record["status"] for record in halfway)
    print(f"when the time was over: {dict(waiting)}")
    for deed, count in sorted(run.truth.misdeeds.items()):
        print(f"  {deed}: {count:,}")
    for what, count in counts.items():
        print(f"{what}: {count}")
    for what, keys in offenders.items():
        print(f"WRONG, {what}: {len(keys)}: {', '.join(keys[:SHOWN_OFFENDERS])}")
    shown = {what: keys[:SHOWN_OFFENDERS] for what, keys in offenders.items()}
    print(json.dumps({"ok": not offenders, "counts": counts, "offenders": shown}))
    return not offenders


async def measured(options: argparse.Namespace, folder: Path) -> bool:
    run = Run(options.minutes, options.seed, options.rate)
    tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    halfway, records, exit_status = await whole_run(run, folder, tell)
    return report(run, halfway, records, exit_status)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of misbehaviour (30)")
    parser.add_argument("--seed", type=int, default=1, help="of the dice (1)")
    parser.add_argument("--rate", type=float, default=8.0, help="messages a second (8)")
    options = parser.parse_args()
    rig.end_cleanly_when_told()
    rig.built_zipapp()
    with tempfile.TemporaryDirectory(prefix="mailproxy-misbehave-") as folder:
        return 0 if asyncio.run(measured(options, Path(folder))) else 1


if __name__ == "__main__":
    sys.exit(main())
