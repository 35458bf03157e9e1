"""A long run against SMTP servers that misbehave: does delivery ever do the wrong thing?

    python3 bench/misbehave.py [--minutes 30] [--seed 1] [--rate 8] [--only MANNER,...] [--log FILE]

Each account has a server with a manner of its own (MANNERS). Some throw dice at every step: 4xx and 5xx to the
greeting, EHLO, AUTH, MAIL, RCPT, DATA and the end of data, some recipients refused and others not, 421 anywhere,
connections dropped anywhere (after the data with the message kept and without), replies that never come, come
late or byte by byte, refused connections, idle connections closed. Others go by rules, as providers do: too many
connections, so many messages a session, a rate, a quota, a block, greylisting, a tarpit. One behaves.

The servers write down what they took from whom and what they said. When the time is over it is checked that

  - every message is final, or waits for a reason that its server (or the dice) did give it;
  - then the servers behave, and all must become final: nothing is lost;
  - a message is `sent` when one of its recipients was taken, `error` when none was, and each of its recipients
    has the outcome its server gave it; nobody has an error but by a 5xx about him or his message (never one about
    the account or the session), and no attempt is counted for what was about neither;
  - no recipient was sent to again after a server had taken the message for him, but where that was in doubt
    (its answer never left the server whole);
  - no mail came later than the manner of its own server explains, and no account cooled whose server never
    gave a reason.

The same seed throws the same dice for the same connections. Prints figures; the last line is JSON; exit status
1 with the offenders listed when something was wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import random
import re
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import load
import rig
from rig import Daemon
from sinks import header

TIMEOUT_S = 2  # of the accounts whose servers throw dice: for each reply but the last
GOOD = "good"  # what dice may bring, and the manner of the server that behaves
LATE_S = 5.0  # for mail to a server that gives no reason for it
OPERATOR_PAUSE_S = 10.0  # between run-now calls, which end cooling: else most of the time nothing would happen
SETTLE_S = 900.0
HANG_S = 650.0  # longer than the 600 s that the reply to the end of data is given
SHOWN_OFFENDERS = 20
CROWDS, CROWD = 1 / 12, 12  # so many of the submissions are crowds, of so many messages on the average
SAME_AT_MOST = 15  # may fail by the same words, the account's in truth, before a lane that cools tries no more of them

# What the dice may bring at a step, with weights; all else is good behaviour.
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


# -- manners: how providers behave


class Rule(NamedTuple):
    """What a server says at a step, instead of yes, when something holds."""

    step: str  # as in MISDEEDS; "any" is before every command
    replies: tuple[str, ...]  # one of them; "" says nothing and ends the connection, as a 421 does, said or not
    when: Callable[[Conversation, str], bool]  # the string is the recipient's address, at RCPT
    about: str = "session"  # or account, or message: the only one that may end mail, and costs attempts
    takes: bool = False  # the message is taken all the same


class Manner(NamedTuple):
    """How a server behaves, and what its account's mail must bear for that."""

    rules: tuple[Rule, ...] = ()  # the first that holds speaks
    account: Mapping[str, object] = {}  # settings
    to: str = "r"  # kinds of recipients; "gone" are refused for ever, "odious" spoil their message
    recipients: tuple[int, ...] = (1, 1, 1, 2, 5)  # of a message
    takes_s: float = 0.0  # for each message
    tarpit_s: float = 0.0  # before a refusal, doubled with each since a message was taken, up to TARPIT_S
    late_s: float = LATE_S  # so long may mail wait that nobody refuses
    cools: bool = False  # there are reasons to leave the server alone for a while
    dice: bool = False
    login: bool = False
    pipelining: bool = True
    limits: str = ""  # announced (RFC 9422)


TARPIT_S = 20.0
SPELL_S = (10.0, 40.0)  # a server with spells is willing for so long, then unwilling, and so on


def above(most: int) -> Callable[[Conversation, str], bool]:
    """On connections beside so many older ones."""
    return lambda talk, _: talk.server.open.index(talk) >= most


def busy(most: int) -> Callable[[Conversation, str], bool]:
    """While it works on so many messages."""
    return lambda talk, _: talk.server.at_work >= most


def after(messages: int) -> Callable[[Conversation, str], bool]:
    """On a connection that has carried so many messages."""
    return lambda talk, _: talk.messages >= messages


def faster(messages: int, seconds: float) -> Callable[[Conversation, str], bool]:
    """When so many messages were taken within so many seconds."""
    return lambda talk, _: sum(at > time.monotonic() - seconds for at in talk.server.taken_at) >= messages


def errors(most: int) -> Callable[[Conversation, str], bool]:
    """On a connection with so many refusals since a message was taken."""
    return lambda talk, _: talk.errors >= most


def kind(of: str) -> Callable[[Conversation, str], bool]:
    """For recipients of a kind; after RCPT when one was taken."""
    return lambda talk, recipient: any(one.startswith(of) for one in ([recipient] if recipient else talk.recipients))


def beside(most: int) -> Callable[[Conversation, str], bool]:
    """For recipients beside so many others of the transaction that were taken."""
    return lambda talk, _: len(talk.recipients) >= most


def every_second(talk: Conversation, _recipient: str) -> bool:
    return talk.asked % 2 == 0


def new(seconds: float) -> Callable[[Conversation, str], bool]:
    """For a recipient who was first asked for less than so long ago."""
    return lambda talk, one: time.monotonic() - talk.server.first_asked.setdefault(one, time.monotonic()) < seconds


def sometimes(share: float) -> Callable[[Conversation, str], bool]:
    return lambda talk, _: talk.dice.random() < share


def at_first(talk: Conversation, _recipient: str) -> bool:
    """Until its first spell begins."""
    return talk.server.spell() == 0


def in_turn(about: str, *refusals: tuple[str, str]) -> tuple[Rule, ...]:
    """One of these refusals in each spell."""

    def of_this_spell(place: int) -> Callable[[Conversation, str], bool]:
        return lambda talk, _: talk.server.spell() % 2 == 1 and talk.server.spell() // 2 % len(refusals) == place

    return tuple(Rule(step, (reply,), of_this_spell(place), about) for place, (step, reply) in enumerate(refusals))


# As large providers say it; see docs/providers.md.
SESSION_ENDS = (
    "421 too many messages in this connection", "451 4.3.0 try another connection", "452 4.3.1 try later",
    "550 This message has exceeded the max number of messages per session. IB510", "",
)  # fmt: skip
RATES = (
    "450 4.7.1 Error: too much mail from 127.0.0.1", "451 4.4.5 Rate limit exceeded, try again later",
    "451 4.7.1 Rate limit exceeded. Try again in 4 seconds",
)  # fmt: skip
QUOTAS = in_turn(
    "account",
    ("end", "550 5.4.5 Daily user sending limit exceeded."),
    ("end", "554 5.2.0 STOREDRV.Submission.Exception:SubmissionQuotaExceededException; Failed to process message"),
    ("end", "454 Throttling failure: Daily message quota exceeded."),
    ("rcpt", "550 Domain receiver.example has exceeded the max emails per hour (100/100 (100%)) allowed."),
    ("mail", "452 4.5.3 Daily message limit exceeded"),
    ("end", "550 5.7.233 Your message can't be sent because your tenant exceeded its daily limit for sending"),
)
BLOCKS = in_turn(
    "account",
    ("end", "550 5.4.6 Unusual sending activity detected. Please try after sometime"),
    ("end", "554 5.1.8 Email Outgoing Blocked"),
    ("mail", "550 5.1.8 Access denied, bad outbound sender"),
    ("end", "554 Message rejected: Sending paused for this account."),
    ("connect", "554 This IP has been temporarily blocked. IB111"),
    ("rcpt", "554 5.7.1 Service unavailable; Client host [127.0.0.1] blocked using zen.example"),
    ("end", "502 5.7.0 Your SMTP account is not yet activated."),
)
LOGINS = in_turn(
    "account",
    ("mail", "530 5.7.57 Client not authenticated to send mail."),
    ("mail", "530 5.7.0 Must issue a STARTTLS command first."),
    ("auth", "535 5.7.8 Error: authentication failed"),
    ("mail", "550 Unauthenticated senders not allowed"),
    ("rcpt", "504 5.5.2 <localhost>: Helo command rejected: need fully-qualified hostname"),
    ("auth", "454 4.7.0 Too many login attempts, please try again later."),
    ("rcpt", "550 5.7.1 Invalid credentials for relay [127.0.0.1]."),
)
UNHEARD_OF = in_turn("sameness", ("end", "550 Administrative prohibition"), ("rcpt", "571 not today, my friend"))
UNKNOWN = Rule("rcpt", ("550 5.1.1 User unknown",), kind("gone"), "message")
IN_DOUBT = Rule("end", ("",), sometimes(0.1), "message", takes=True)

MANNERS: dict[str, Manner] = {
    GOOD: Manner(),
    "dice0": Manner(dice=True, cools=True, late_s=math.inf),
    "dice1": Manner(dice=True, cools=True, late_s=math.inf, login=True),
    "dice2": Manner(dice=True, cools=True, late_s=math.inf, pipelining=False),
    "connections-greeting": Manner(
        (Rule("connect", ("421 4.7.0 Too many concurrent SMTP connections",), above(2)),), takes_s=0.1,
    ),
    "connections-mail": Manner(
        (Rule("mail", ("432 4.3.2 Concurrent connections limit exceeded",), above(1)),), takes_s=0.1,
    ),
    "connections-end": Manner(
        (Rule("end", ("432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded",), busy(3)),), takes_s=0.3,
    ),
    "session-of-10": Manner((Rule("mail", SESSION_ENDS, after(10)),)),
    "session-of-1": Manner((Rule("mail", SESSION_ENDS, after(1)),), pipelining=False),
    "rate-mail": Manner((Rule("mail", RATES, faster(10, 10)),), late_s=120, cools=True),
    "rate-end": Manner(
        (Rule("end", ("454 Throttling failure: Maximum sending rate exceeded.",), faster(5, 2)),), late_s=60, cools=True,
    ),
    "quota": Manner(QUOTAS, late_s=120, cools=True),
    "blocked": Manner(BLOCKS, late_s=120, cools=True),
    "login": Manner(LOGINS, late_s=120, cools=True, login=True),
    "relay": Manner(
        (Rule("rcpt", ("554 5.7.1 <someone@receiver.example>: Relay access denied",), at_first, "account"),),
        late_s=120, cools=True,
    ),
    "relay-for-some": Manner(
        (Rule("rcpt", ("550 5.7.54 SMTP; Unable to relay recipient in non-accepted domain",), kind("gone"), "message"),),
        to="r r r gone", late_s=30, cools=True,
    ),
    "words-of-its-own": Manner(
        in_turn("account", ("end", "554 5.7.0 domani"), ("mail", "554 5.7.0 domani"), ("rcpt", "550 troppi messaggi")),
        {"account_replies": "554 5.7.0, 550 troppi"}, late_s=120, cools=True,
    ),
    "sameness": Manner(UNHEARD_OF, late_s=120, cools=True),
    "greylist": Manner(
        (Rule("rcpt", ("450 4.2.0 Recipient address rejected: Greylisted",), new(2.5), "message"),), late_s=20,
    ),
    "every-second": Manner(
        (Rule("rcpt", ("451 4.3.0 Temporary lookup failure",), every_second, "message"),), recipients=(1, 2, 5, 20),
    ),
    "one-recipient": Manner(
        (Rule("rcpt", ("451 4.3.0 Multiple destination domains per transaction is unsupported.",), beside(1), "message"),),
    ),
    "recipients-of-8": Manner(
        (Rule("rcpt", ("452 4.5.3 Error: too many recipients", "452 too many"), beside(8)),),
        {"max_recipients": 150}, recipients=(1, 5, 8, 9, 20, 60),
    ),
    "limits": Manner(  # all for the session: none may be met
        (Rule("mail", ("550 MAILMAX is 10",), after(10)), Rule("rcpt", ("550 RCPTMAX is 8",), beside(8))),
        {"max_recipients": 150}, recipients=(1, 5, 8, 9, 20), limits="MAILMAX=10 RCPTMAX=8",
    ),
    "errors-hang-up": Manner((Rule("any", ("",), errors(3)), UNKNOWN), to="r gone"),
    "errors-421": Manner(
        (Rule("any", ("421 4.7.0 Error: too many errors",), errors(20)), UNKNOWN._replace(replies=("550 Unrouteable address",))),
        to="r gone gone gone", recipients=(1, 2, 5, 30, 60),
    ),
    "tarpit": Manner((UNKNOWN,), {"timeout": 60}, to="r gone", recipients=(1, 2, 3), tarpit_s=0.1, late_s=120),
    "content-421": Manner(
        (Rule("end", ("421 4.7.0 the nature of the content or the links within",), kind("odious"), "message"),),
        to="r r r r r r r odious", recipients=(1,), late_s=30, cools=True,
    ),
    "in-doubt": Manner((IN_DOUBT,), late_s=20),
    "provider": Manner(
        (Rule("mail", ("432 4.3.2 Concurrent connections limit exceeded",), above(3)),
         Rule("mail", ("421 4.4.2 Message submission rate for this client has exceeded the configured limit",), faster(20, 10)),
         Rule("rcpt", ("452 4.5.3 Too many recipients",), beside(10)), Rule("mail", SESSION_ENDS[:2], after(15)),
         *QUOTAS, UNKNOWN, IN_DOUBT._replace(when=sometimes(0.02))),
        to="r r r gone", recipients=(1, 1, 2, 15), takes_s=0.05, late_s=180, cools=True,
    ),
}  # fmt: skip


# -- servers


class Taking(NamedTuple):
    """A server took a message for a recipient."""

    message_id: str
    in_doubt: bool  # its answer did not leave the server whole
    at: float  # monotonic


class Truth:
    """What really happened, as the servers know it."""

    def __init__(self) -> None:
        self.takings: dict[tuple[str, str], list[Taking]] = defaultdict(list)  # by key and recipient
        self.refused: dict[tuple[str, str], set[int]] = defaultdict(set)  # codes said to a recipient
        self.said: dict[str, set[str]] = defaultdict(set)  # misdeeds that met a message, by its key
        self.bad_luck: Counter[str] = Counter()  # replies, and answers that never came, about a message; by its key
        self.other_refusals: Counter[str] = Counter()  # those that it met and that were not about it
        self.misdeeds: Counter[str] = Counter()

    def refuses(self, server: str, reply: str, rule: Rule, key: str, recipients: Iterable[str]) -> None:
        """A server went by a rule of its own."""
        deed = f"{rule.step}: {reply[:3]}"
        self.misdeeds[f"{server}, {rule.step}: {reply or 'no answer'}"] += 1
        self.said[key].add(deed)
        if rule.about in ("message", "sameness"):
            self.bad_luck[key] += 1
            for recipient in recipients if reply else ():
                self.refused[key, recipient].add(int(reply[:3]))
        else:
            self.other_refusals[key] += 1
            self.said[server].add(deed)

    def takes(self, key: str, recipients: Iterable[str], content: bytes, in_doubt: bool) -> None:
        message_id = header(content, b"Message-ID").decode()
        for recipient in recipients:
            self.takings[key, recipient].append(Taking(message_id, in_doubt, time.monotonic()))


class Hangup(Exception):
    """The server ends the connection, one way or another."""


class Conversation:
    """One connection to a misbehaving server."""

    def __init__(
        self, server: Server, dice: random.Random, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.server, self.dice, self._reader, self._writer = server, dice, reader, writer
        self._truth = server.truth
        self._key = ""  # of the message whose envelope is being given
        self._has_sender = False
        self.recipients: list[str] = []  # those taken
        self.asked = 0  # recipients offered
        self.messages = 0  # taken on this connection
        self.errors = 0  # refusals since the last one

    async def hold(self) -> None:
        with contextlib.suppress(Hangup, OSError, asyncio.IncompleteReadError):
            await self._step("connect", "220 misbehaving.test ESMTP")
            while True:
                line = await self._line()
                if (rule := self._rule("any")) is not None:
                    await self._go_by(rule)
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
            self.recipients, self.asked = [], 0
            found = re.search(r"<([^@>]*)@", line)
            self._key = found[1] if found else ""
            self._has_sender = await self._step("mail", "250 2.1.0 ok") == 250
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
        offers += ["PIPELINING"] * self.server.manner.pipelining
        offers += ["AUTH PLAIN LOGIN"] * self.server.manner.login
        offers += [f"LIMITS {self.server.manner.limits}"] * bool(self.server.manner.limits)
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
        self.asked += 1
        if not self._has_sender and not self.server.manner.dice:  # servers that throw dice do not mind
            await self._say("503 5.5.1 Error: need MAIL command")
            return
        code = await self._step("rcpt", "250 2.1.5 ok", recipient)
        if code == 250:
            self.recipients.append(recipient)

    async def _content(self) -> None:
        if not self.recipients:
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
            await asyncio.sleep(self.dice.uniform(0, 0.5))
            raise Hangup

    async def _end_of_data(self, content: bytes) -> None:
        takes = lambda in_doubt: self._truth.takes(self._key, self.recipients, content, in_doubt)  # noqa: E731
        if (rule := self._rule("end")) is not None:
            if rule.takes:
                takes(True)
            await self._go_by(rule, self.recipients)
            return
        self.server.at_work += 1
        try:
            await self._wait(self.server.manner.takes_s)
        finally:
            self.server.at_work -= 1
        deed = self._throw("end")
        if deed in ("drop", "keep and drop"):
            if deed == "keep and drop":
                takes(in_doubt=True)
            raise Hangup
        if deed == "hang":
            takes(in_doubt=True)
            await self._wait(HANG_S)
        if deed == "late":
            await self._wait(self.dice.uniform(TIMEOUT_S, 10 * TIMEOUT_S))  # it has 600 s
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
        self.messages, self.errors = self.messages + 1, 0
        self.server.taken_at.append(time.monotonic())

    def _refuse_recipients(self, code: int) -> None:
        for recipient in self.recipients:
            self._truth.refused[self._key, recipient].add(code)

    # -- the rules

    def _rule(self, step: str, recipient: str = "") -> Rule | None:
        rules = () if self.server.behaves() else self.server.manner.rules
        return next((rule for rule in rules if rule.step == step and rule.when(self, recipient)), None)

    async def _go_by(self, rule: Rule, recipients: Iterable[str] = ()) -> int:
        """The code that was said."""
        reply = self.dice.choice(rule.replies)
        self._truth.refuses(self.server.name, reply, rule, self._key, recipients)
        if not reply:
            raise Hangup
        await self._wait(min(TARPIT_S, self.server.manner.tarpit_s * 2**self.errors))
        self.errors += 1
        await self._say(reply)
        if reply.startswith("421") or rule.step == "connect":
            raise Hangup
        return int(reply[:3])

    # -- the dice

    def _throw(self, step: str) -> str:
        if not self.server.manner.dice:
            return GOOD
        deeds = MISDEEDS[step]
        deed = self.dice.choices(tuple(deeds), tuple(deeds.values()))[0]
        if self.server.behaves() or (deed == "hang" and step == "end" and not self.server.may_hang()):
            return GOOD
        if deed != GOOD:
            self._truth.misdeeds[f"{step}: {deed}"] += 1
            self._truth.said[self._key].add(f"{step}: {deed}")
        return deed

    async def _step(self, step: str, good_reply: str, recipient: str = "") -> int:
        """Answer a command by the rules, then as the dice fall; the code that was said."""
        if (rule := self._rule(step, recipient)) is not None:
            return await self._go_by(rule, [recipient or "*"])
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
        pause_s = self.dice.choice((0.2, 2.0)) * TIMEOUT_S / (len(reply) + 2)
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
    """A server on a port, with a manner; one with dice stops listening now and then: connections are refused."""

    def __init__(
        self, name: str, manner: Manner, truth: Truth, behaves: Callable[[], bool], may_hang: Callable[[], bool], seed: int
    ) -> None:  # fmt: skip
        self.name, self.manner, self.truth, self.behaves, self.may_hang = name, manner, truth, behaves, may_hang
        self.port = 0
        self.open: list[Conversation] = []  # the oldest first
        self.connections = 0  # ever
        self.at_work = 0  # messages that it looks at
        self.taken_at: deque[float] = deque(maxlen=100)
        self.first_asked: dict[str, float] = {}  # by recipient
        self._seed = seed
        self._dice = random.Random(f"{seed}/{name}/listening")
        self._spells = random.Random(f"{seed}/{name}/spells")
        self._mind_changes_at = [time.monotonic()]

    async def listen(self) -> None:
        self._server = await asyncio.start_server(self._meet, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        dice = random.Random(f"{self._seed}/{self.name}/{self.connections}")
        self.open.append(talk := Conversation(self, dice, reader, writer))
        try:
            await talk.hold()
        except TimeoutError:
            writer.transport.abort()
        finally:
            self.open.remove(talk)

    def spell(self) -> int:
        """How often it has changed its mind: it is unwilling while that is odd."""
        while self._mind_changes_at[-1] <= time.monotonic():
            self._mind_changes_at.append(self._mind_changes_at[-1] + self._spells.uniform(*SPELL_S))
        return len(self._mind_changes_at) - 2

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


class Submitted(NamedTuple):
    """A message that the daemon has accepted."""

    account: str
    recipients: list[str]
    at: float  # monotonic, before it was submitted


class Run:
    """The submitter, the operator, and what they know."""

    def __init__(self, minutes: float, seed: int, rate: float, manners: Mapping[str, Manner]) -> None:
        self.ends_at = time.monotonic() + minutes * 60
        self.truth = Truth()
        self.manners = manners
        self.accepted: dict[str, Submitted] = {}  # by key
        self.cooled: dict[str, Counter[str]] = defaultdict(Counter)  # reasons seen, by account
        self._rate = rate
        self._dice = random.Random(f"{seed}/submissions")
        self._numbers = itertools.count()
        self._behaves = False
        may_hang = lambda: time.monotonic() + HANG_S < self.ends_at  # noqa: E731
        self.servers = {
            name: Server(name, manner, self.truth, lambda: self._behaves, may_hang, seed)
            for name, manner in manners.items()
        }

    def behave(self) -> None:
        self._behaves = True

    def next_messages(self) -> list[dict[str, object]]:
        """One for the server that behaves or for one with dice, or a crowd of them for one with rules."""
        with_rules = [name for name, manner in self.manners.items() if manner.rules]
        others = [name for name in self.manners if name not in with_rules]
        if with_rules and self._dice.random() < CROWDS:
            account = self._dice.choice(with_rules)
            return [self._message(account) for _ in range(self._dice.randint(1, 2 * CROWD))]
        return [self._message(GOOD if self._dice.random() < 0.2 else self._dice.choice(others))]

    def _message(self, account: str) -> dict[str, object]:
        """Its return path carries its key, so that the servers know from MAIL on which it is."""
        key = f"{account}-{next(self._numbers)}"
        manner, dice = self.manners[account], self._dice
        kinds = [dice.choice(manner.to.split()) for _ in range(dice.choice(manner.recipients))]
        recipients = [f"{kind}{place}-{key}@receiver.example" for place, kind in enumerate(kinds)]
        self.accepted[key] = Submitted(account, recipients, time.monotonic())
        return load.message(key, account_id=account, return_path=f"{key}@sender.example") | {"to": recipients}

    async def submit(self, daemon: Daemon) -> None:
        while time.monotonic() < self.ends_at:
            messages = self.next_messages()
            await asyncio.to_thread(daemon.submit, messages)
            await asyncio.sleep(len(messages) * self._dice.expovariate(self._rate))

    async def operate(self, daemon: Daemon) -> None:
        """Somebody presses run-now from time to time."""
        while True:
            await asyncio.sleep(OPERATOR_PAUSE_S)
            await asyncio.to_thread(daemon.command, "run-now")

    async def watch(self, daemon: Daemon) -> None:
        """See which accounts are left alone, and why."""
        while True:
            await asyncio.sleep(0.5)
            for name, account in (await asyncio.to_thread(daemon.status))["accounts"].items():
                if account["state"] in ("cooling", "probing"):
                    self.cooled[name][str(account["reason"])] += 1

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
            "host": "127.0.0.1", "port": server.port, "start_tls": "never", "max_connections": 4,
            **({"timeout": TIMEOUT_S} if server.manner.dice else {}),
            **({"user": "bench", "password": "secret"} if server.manner.login else {}),
            **server.manner.account,
        }  # fmt: skip
    return found


async def whole_run(run: Run, folder: Path, tell: Callable[[str], None]) -> tuple[list[Any], list[Any], int | None]:
    """The records when the time was over, those at the end, and the daemon's exit status."""
    for server in run.servers.values():
        await server.listen()
    daemon = Daemon(folder, sections(run.servers))
    await asyncio.to_thread(daemon.start)
    try:
        beside = [
            asyncio.create_task(server.refuse_now_and_then()) for server in run.servers.values() if server.manner.dice
        ]
        beside += [asyncio.create_task(work(daemon)) for work in (run.operate, run.watch)]
        beside.append(asyncio.create_task(progress(run, daemon, tell)))
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
            f"{len(run.accepted):,} submitted, {status['pending']} pending, "
            f"{sum(server.connections for server in run.servers.values()):,} connections, "
            f"{run.truth.misdeeds.total():,} misdeeds"
        )


def all_records(daemon: Daemon) -> list[dict[str, Any]]:
    return daemon.ask("GET", "/messages", timeout_s=300)["messages"]


# -- the verdict


def judged(
    run: Run, halfway: Iterable[Mapping[str, Any]], records: Iterable[Mapping[str, Any]]
) -> dict[str, list[str]]:
    """What is wrong: whose ids."""
    truth = run.truth
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
            key for key, record in by_key.items() if record["status"] == "sent" and not taken_for(key, run)
        ],
        "an error but taken": [
            key for key, record in by_key.items() if record["status"] == "error" and surely_taken_for(key, run)
        ],
        "an error for what was not about it": [
            f"{key} ({record['error']})" for key, record in by_key.items() if not fails_truly(record, run)
        ],
        "a recipient's outcome is not what his server said": [
            key for key, record in by_key.items() if record["status"] == "sent" and not tells_truth(record, run)
        ],
        "attempts counted for what was not about it": [
            f"{key} ({record['attempts']}; {truth.bad_luck[key]} about it, {truth.other_refusals[key]} not)"
            for key, record in by_key.items()
            # what one message gets three times while others pass is taken for its own
            if record["attempts"] > 1 + truth.bad_luck[key] + truth.other_refusals[key] // 3
            and not run.manners[record["account_id"]].dice
        ],
        "sent again although taken": [
            f"{key} to {recipient}" for (key, recipient), taken in truth.takings.items()
            if any(not taking.in_doubt for taking in taken[:-1])
        ],
        "sent again under another Message-ID": [
            key for (key, _), taken in truth.takings.items() if len({taking.message_id for taking in taken}) > 1
        ],
        "late": [
            f"{key} ({max(waits):.1f} s)" for key, one in run.accepted.items()
            if (waits := waits_s(key, run)) and max(waits) > run.manners[one.account].late_s
        ],
        "cooled for no reason": [
            f"{account} ({reason}: {times / 2:g} s)" for account, reasons in run.cooled.items()
            for reason, times in reasons.items() if not run.manners[account].cools
        ],
        "failed beyond the rule of sameness": [
            f"{account}: {failed} in {server.spell() // 2} spells" for account, server in run.servers.items()
            if (failed := sum(record["account_id"] == account and record["status"] == "error" for record in by_key.values()))
            > SAME_AT_MOST * (1 + server.spell() // 2) and server.manner.to == "r" and not server.manner.dice
        ],
    }  # fmt: skip
    return {what: sorted(keys) for what, keys in offenders.items() if keys}


def taken_for(key: str, run: Run) -> set[str]:
    return {recipient for recipient in run.accepted[key].recipients if run.truth.takings.get((key, recipient))}


def surely_taken_for(key: str, run: Run) -> set[str]:
    return {
        recipient
        for recipient in taken_for(key, run)
        if any(not taking.in_doubt for taking in run.truth.takings[key, recipient])
    }


def refused_for_good(key: str, recipient: str, truth: Truth) -> bool:
    """A server said a 5xx about him, or about the whole message."""
    said = truth.refused.get((key, "*"), set()) | truth.refused.get((key, recipient), set())
    return any(code >= 500 for code in said)


def fails_truly(record: Mapping[str, Any], run: Run) -> bool:
    """Everybody who has an error was refused for good; all of them, where the message has one."""
    key = record["id"]
    failed = run.accepted[key].recipients if record["status"] == "error" else []
    if record["recipients"]:
        failed = [address for address, outcome in record["recipients"].items() if outcome["status"] == "error"]
    return all(refused_for_good(key, recipient, run.truth) for recipient in failed)


def tells_truth(record: Mapping[str, Any], run: Run) -> bool:
    """Whom the record calls sent was taken for; nobody else was taken for certain."""
    key, everybody = record["id"], run.accepted[record["id"]].recipients
    outcomes = record["recipients"] or {recipient: {"status": "sent"} for recipient in everybody}
    sent = {recipient for recipient, outcome in outcomes.items() if outcome["status"] == "sent"}
    others = set(everybody) - sent
    return sent <= taken_for(key, run) and not others & surely_taken_for(key, run)


def waits_truly(record: Mapping[str, Any], truth: Truth) -> bool:
    """Final; or on its way; or deferred with a reason that fits something that was done to it or to its account."""
    if record["status"] in ("sent", "error", "queued"):
        return True
    error = record["error"] or ""
    codes = {int(code) for code in re.findall(r"\b([45]\d\d)\b", error)}
    if not record["deferred_ts"] or not error:
        return False
    met = truth.said.get(record["id"], set()) | truth.said.get(record["account_id"], set())
    of_connections = {deed for deed in truth.misdeeds if deed.startswith(("connect", "ehlo", "auth"))}
    steps_codes = {int(deed.rpartition(" ")[2]) for deed in met | of_connections if deed[-3:].isdigit()}
    return codes <= steps_codes if codes else bool(met | of_connections)


def waits_s(key: str, run: Run) -> list[float]:
    """How long those recipients waited whom nobody refused for good; so far, where it was not over in time."""
    one, waits = run.accepted[key], []
    if any(recipient.startswith("odious") for recipient in one.recipients):
        return []
    for recipient in one.recipients:
        taken = run.truth.takings.get((key, recipient), ())
        if taken or not refused_for_good(key, recipient, run.truth):
            waits.append((taken[0].at if taken else run.ends_at) - one.at)
    return waits


def table(run: Run, records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What became of each account's mail."""
    rows: dict[str, dict[str, Any]] = {}
    for account, server in run.servers.items():
        own = [record for record in records if record["account_id"] == account]
        waits = sorted(wait for record in own if (wait := max(waits_s(record["id"], run), default=None)) is not None)
        prefix = f"{account}, "
        rows[account] = {
            "messages": len(own),
            "recipients": sum(len(run.accepted[record["id"]].recipients) for record in own),
            "sent": sum(record["status"] == "sent" for record in own),
            "error": sum(record["status"] == "error" for record in own),
            "attempts": sum(record["attempts"] for record in own),
            "connections": server.connections,
            "refusals": sum(count for deed, count in run.truth.misdeeds.items() if deed.startswith(prefix)),
            "cool_s": sum(run.cooled[account].values()) / 2,
            "median_wait_s": round(rig.percentile(waits, 0.5), 2) if waits else None,
            "longest_wait_s": round(waits[-1], 2) if waits else None,
        }
    return rows


def figures(run: Run, records: list[dict[str, Any]]) -> dict[str, Any]:
    in_doubt = sum(taking.in_doubt for taken in run.truth.takings.values() for taking in taken)
    again = sum(len(taken) - 1 for taken in run.truth.takings.values())
    return {
        "messages": len(run.accepted),
        "recipients": sum(len(one.recipients) for one in run.accepted.values()),
        "connections": sum(server.connections for server in run.servers.values()),
        "misdeeds": run.truth.misdeeds.total(),
        "taken in doubt": in_doubt,
        "taken again after that": again,
        "attempts": sum(record["attempts"] for record in records),
        **Counter(record["status"] for record in records),
    }


def report(run: Run, halfway: list[Any], records: list[Any], exit_status: int | None) -> bool:
    """Print it all; True when nothing was wrong."""
    offenders = judged(run, halfway, records)
    if exit_status != 0:
        offenders["stopping"] = [f"exit status {exit_status}"]
    counts, accounts = figures(run, records), table(run, records)
    waiting = Counter(record["status"] for record in halfway)
    print(f"when the time was over: {dict(waiting)}")
    for deed, count in sorted(run.truth.misdeeds.items()):
        print(f"  {deed}: {count:,}")
    for what, count in counts.items():
        print(f"{what}: {count}")
    print(rig.markdown_table(
        ("account", *accounts[GOOD]), [(name, *map(str, row.values())) for name, row in accounts.items()]
    ))  # fmt: skip
    for what, keys in offenders.items():
        print(f"WRONG, {what}: {len(keys)}: {', '.join(keys[:SHOWN_OFFENDERS])}")
    shown = {what: keys[:SHOWN_OFFENDERS] for what, keys in offenders.items()}
    print(json.dumps({"ok": not offenders, "counts": counts, "accounts": accounts, "offenders": shown}))
    return not offenders


async def measured(options: argparse.Namespace, folder: Path) -> bool:
    manners = MANNERS
    if options.only:
        manners = {name: MANNERS[name] for name in (GOOD, *options.only.split(","))}
    run = Run(options.minutes, options.seed, options.rate, manners)
    tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    halfway, records, exit_status = await whole_run(run, folder, tell)
    return report(run, halfway, records, exit_status)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0, help="of misbehaviour (30)")
    parser.add_argument("--seed", type=int, default=1, help="of the dice (1)")
    parser.add_argument("--rate", type=float, default=8.0, help="messages a second (8)")
    parser.add_argument("--only", default="", help="servers of these manners (beside the one that behaves)")
    parser.add_argument("--keep", type=Path, help="leave the daemon's queue and log in this folder, a new one")
    options = parser.parse_args()
    rig.end_cleanly_when_told()
    rig.built_zipapp()
    with tempfile.TemporaryDirectory(prefix="mailproxy-misbehave-") as folder:
        return 0 if asyncio.run(measured(options, options.keep or Path(folder))) else 1


if __name__ == "__main__":
    sys.exit(main())
