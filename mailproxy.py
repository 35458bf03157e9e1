#!/usr/bin/env python3
"""mailproxy: a small daemon between an application and its SMTP servers.

The promise: a message that was answered with 200 is on disk, and leaves the queue only by a recorded outcome; an
outcome is reported until the application has acknowledged it. A crash at any instant costs, at worst, a second
delivery of the few messages that were on the wire. The life of a message:

    POST /commands/add-messages
          |              its time comes
          v    .------------------------------- deferred
        queued <                                    ^
          |  a transaction with the server          |  4xx, no connection, rate limit, schedule
          +--------------------+--------------------+
          v  250               v  5xx, too old
         sent                error
          +-----> reported <---+      POST client_sync_url
                     +--> purged

The rooms, from the top of this file to its end; each uses only those above it:

    VOCABULARY, ERRORS          the types that flow between the rooms
    SETTINGS                    config.ini, environment, command line
    SUBMISSION                  JSON -> Message, or the reason to reject it
    DISPOSITION                 what becomes of a message after an attempt
    RATE LIMITS                 sliding windows
    COMPOSITION                 Message -> RFC 5322 bytes
    THREADS AND CLOCK           the border to threads; wall clock and durations
    LOG AND METRICS             one event, one line; Prometheus
    QUEUE FILE, QUEUE           one SQLite file, group commit; every SQL statement
    POSTGRESQL                  the same queue in a database, for several daemons
    LEASES                      several machines: who has which lane
    OUTBOUND HTTP, ATTACHMENTS  HTTP requests with a deadline; URL, S3 -> bytes
    DELIVERY AGENT              one SMTP session, one transaction
    SUBMISSION BY SMTP          mail that comes in by SMTP: the listener, sendmail -bs
    HTTP SERVER                 a strict little HTTP/1.1 server
    CONSOLE                     the page for a browser
    DISPATCHER, REPORTER        the two loops: mail goes out, reports go out
    CONTROL PLANE               a handler for each route
    DAEMON                      builds and runs all that
    CLIENT, SENDING             a client of the HTTP interface; send and sendmail
    DEMO                        the whole thing on loopback, live
    COMMAND LINE                the commands

The words are those of the mail RFCs and of Postfix: envelope, transaction, reply, deferred, enhanced status code; a
*lane* is the way out of one account's mail, a *claim* a message taken out for delivery, a *disposition* what is
recorded of an attempt.
"""

from __future__ import annotations

import os
import signal

if __name__ == "__main__" and callable(signal.getsignal(signal.SIGINT)):  # Ctrl-C while it starts: no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import asyncio
import base64
import binascii
import codecs
import collections
import concurrent.futures
import contextlib
import email.message
import email.utils
import enum
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import http.client
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import mimetypes
import operator
import random
import re
import resource
import secrets
import select
import shutil
import socket
import sqlite3
import ssl
import stat
import sys
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import urllib.parse
import weakref
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence, Set
from contextvars import ContextVar
from dataclasses import InitVar, dataclass, field
from datetime import UTC, datetime
from email.errors import MessageError
from email.header import decode_header, make_header
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar, cast

if __name__ == "__main__" and not all(map(importlib.util.find_spec, ("aiosmtplib", "prometheus_client"))):
    remedy = "run `python3 -m pip install aiosmtplib prometheus-client`, or use mailproxy.pyz, which contains them"
    print(f"mailproxy: the packages aiosmtplib and prometheus-client are needed: {remedy}", file=sys.stderr)
    sys.exit(2)

import aiosmtplib

if TYPE_CHECKING:
    import argparse

__version__ = "0.1.0"

T = TypeVar("T")


# ======================================================================
# VOCABULARY - the few frozen types that flow between the rooms
# ======================================================================
#
# Nothing here does anything; every room may use all of it. Times are Unix
# seconds (UTC) unless a name says otherwise; sizes are bytes.


class Status(enum.StrEnum):
    """Where a message stands in its life: queued -> (deferred <->) -> sent | error."""

    QUEUED = "queued"  # ready: only waits for a connection
    DEFERRED = "deferred"  # its deferred_ts lies ahead
    SENT = "sent"  # a server took the responsibility: final
    ERROR = "error"  # given up: final


class Mailbox(NamedTuple):
    """A person or list as a header names it (RFC 5322 3.4)."""

    name: str  # display name, unquoted; "" when there is none
    address: str  # addr-spec, its domain in A-labels; the local part may be UTF-8


class Source(enum.StrEnum):
    """Where the bytes of an attachment come from."""

    CONTENT = "content"
    URL = "url"
    S3 = "s3"
    ENDPOINT = "endpoint"
    FILESYSTEM = "filesystem"


class S3Object(NamedTuple):
    """An object in a bucket; None means: as the configuration has it."""

    bucket: str
    key: str
    region: str | None = None
    endpoint: str | None = None
    version_id: str | None = None
    addressing: str | None = None


class Attachment(NamedTuple):
    """One attachment as it was asked for; its bytes may still have to be fetched, and name and type with them."""

    filename: str  # "" when the answer of the source is to name it
    source: Source
    location: str = ""  # the URL, storage path or file path; "" for CONTENT and S3
    content: bytes = b""  # decoded; of others than CONTENT only when it was fetched
    s3: S3Object | None = None
    content_type: str | None = None
    content_id: str | None = None  # without angle brackets
    inline: bool = False
    content_md5: str | None = None  # 32 lower-case hexadecimal digits


class Message(NamedTuple):
    """What a client asked to be sent, judged and normalised; independent of its row."""

    id: str
    account_id: str  # "default" for the account of [smtp]
    sender: Mailbox
    to: tuple[Mailbox, ...]
    cc: tuple[Mailbox, ...]
    bcc: tuple[Mailbox, ...]
    return_path: str  # the envelope sender
    message_id: str  # without angle brackets; "" when the composer is not to add one
    priority: int  # 0 (immediate) to 3 (low)
    deferred_ts: int | None
    expires_ts: int | None
    batch_code: str | None
    subject: str = ""
    text: str | None = None
    html: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    reply_to: tuple[Mailbox, ...] = ()
    attachments: tuple[Attachment, ...] = ()
    raw: bytes | None = None  # a complete RFC 5322 message instead of all that
    unknown: tuple[str, ...] = ()  # fields that mean nothing here

    @property
    def recipients(self) -> tuple[str, ...]:
        """The envelope recipients, each once, in the order of their first mention."""
        return tuple(dict.fromkeys([mailbox.address for mailbox in self.to + self.cc + self.bcc]))


class Envelope(NamedTuple):
    """What the server is told, whatever the headers say (RFC 5321 2.3.1)."""

    sender: str
    recipients: tuple[str, ...]


class Stage(enum.StrEnum):
    """Where in its delivery a message was when a reply came (or did not come)."""

    ATTACHMENT = "attachment"
    COMPOSITION = "composition"
    CONNECT = "connect"  # name look-up, TCP, greeting
    TLS = "tls"
    EHLO = "ehlo"
    AUTH = "auth"
    MAIL = "mail"
    RCPT = "rcpt"
    DATA = "data"  # the answer to the DATA command
    END_OF_DATA = "end-of-data"


class Cause(enum.StrEnum):
    """Who speaks in a reply: the server, or we because it did not."""

    SERVER = "server"
    TIMEOUT = "timeout"
    LOST = "lost"  # the connection ended
    LOCAL = "local"  # we decided without asking (SIZE, SMTPUTF8, an attachment ...)


class Reply(NamedTuple):
    """An answer of a server (RFC 5321 4.2), or ours in its place with a code of its kind."""

    stage: Stage
    code: int
    text: str  # without code and enhanced code, on one line
    enhanced_code: str | None = None  # "4.7.1" (RFC 3463)
    cause: Cause = Cause.SERVER
    retry_after_s: float | None = None  # the other side asked for this pause

    @property
    def accepted(self) -> bool:
        return 200 <= self.code < 300

    @property
    def transient(self) -> bool:
        return 400 <= self.code < 500

    @property
    def permanent(self) -> bool:
        return self.code >= 500

    @property
    def in_doubt(self) -> bool:
        """True when the message was handed over and the answer never came."""
        return self.stage is Stage.END_OF_DATA and self.cause in (Cause.TIMEOUT, Cause.LOST)

    @property
    def words(self) -> str:
        """The reply as a person reads it: code, enhanced code, text."""
        return " ".join(word for word in (str(self.code), self.enhanced_code, self.text) if word)


class AccountReply(NamedTuple):
    """A reply that an operator says is about the account, whatever its code."""

    code: int
    enhanced_code: str | None  # None: whatever it is
    words: str  # somewhere in the text, without regard to case; "" when the codes say it

    def __str__(self) -> str:
        return " ".join(word for word in (str(self.code), self.enhanced_code, self.words) if word)


@dataclass(frozen=True, slots=True)
class Secret:
    """A secret as the operator gave it: itself, `env:NAME` or `file:/path`. Never printed."""

    given: str = field(repr=False)


class RecipientOutcome(NamedTuple):
    """What became of one recipient: status is sent, error or deferred."""

    status: Status
    code: int
    text: str


class Attempt(NamedTuple):
    """One try to deliver a message: a transaction, or the failure to come to one."""

    started_at: float
    ended_at: float
    replies: dict[str, Reply]  # for each recipient tried; "" for all where none was reached
    connection: str = ""  # the name of the connection, "" when there was none
    reused: bool = False  # the connection had carried a transaction before

    @property
    def first_failure(self) -> Reply | None:
        return next((reply for reply in self.replies.values() if not 200 <= reply.code < 300), None)


class Claim(NamedTuple):
    """A message taken out for delivery: on the wire until its outcome is recorded."""

    seq: int  # its row, and its place in the order of acceptance
    id: str
    account_id: str
    priority: int
    message_id: str
    created_at: int
    ready_at: float  # since when it could have gone; from then its age counts
    attempts: int
    expires_ts: int | None  # given up when not delivered by then
    recipients: dict[str, RecipientOutcome] | None  # settled in earlier attempts
    parts: int  # attachments and raw content to put in
    size_bytes: int  # of payload and contents together
    payload: str | None  # JSON as stored; None when it is large and still to be read
    addressees: int = 1  # recipients of its envelope that are not settled
    served: bool = False  # a transaction of this very turn has reached a server
    slots: int = 1  # held of its account's limits, until it has used them
    by_recipient: bool = False  # those are slots of recipients


# --- URLs ---------------------------------------------------------------------


HOST_OF_URL = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*")
# What may stand unencoded in a request line; "%" because the caller's own encoding is kept.
PATH_CHARACTERS = "/%:@!$&'()*+,;=~-._"
QUERY_CHARACTERS = PATH_CHARACTERS + "?[]|^`{}\\"


class HttpTarget(NamedTuple):
    """A URL taken apart once; what is judged, signed and sent are the same pieces."""

    scheme: str  # http or https
    host: str  # lower case, A-labels, without the brackets of IPv6
    port: int
    path: str  # with the query, encoded
    authorization: str | None  # the header's value, from user:password@

    @property
    def netloc(self) -> str:
        """The Host header (RFC 9110 7.2)."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if (self.scheme, self.port) in (("http", 80), ("https", 443)) else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"

    def __str__(self) -> str:
        """The URL for people: no credentials, no query string, of bearable length."""
        shown = f"{self.scheme}://{self.netloc}{self.path.partition('?')[0]}"
        return shown if len(shown) <= 200 else f"{shown[:197]}..."


def http_target(url: str) -> HttpTarget:
    """An http or https URL, taken apart (RFC 3986). Raises ValueError, which does not quote it, when it is none."""
    try:
        parts = urllib.parse.urlsplit(url.strip(" "))
        host, port = parts.hostname or "", parts.port
        host = host if host.isascii() else a_labels(host).lower()
        unfit = parts.scheme not in ("http", "https") or port == 0 or not HOST_OF_URL.fullmatch(host)
        if unfit or re.search(r"[\x00-\x1f\x7f]", url):  # of these urlsplit drops some
            raise ValueError
        authorization = None
        if "@" in parts.netloc:
            user, password = (urllib.parse.unquote(given or "") for given in (parts.username, parts.password))
            authorization = basic_authorization(user, password)
        path = urllib.parse.quote(parts.path or "/", safe=PATH_CHARACTERS)
        query = urllib.parse.quote(f"?{parts.query}" if parts.query else "", safe=QUERY_CHARACTERS)
    except ValueError:  # no host, an impossible name or port, lone surrogates
        raise ValueError("not a valid http or https URL") from None
    return HttpTarget(parts.scheme, host, port or (443 if parts.scheme == "https" else 80), path + query, authorization)


# JSON as it is stored, answered and reported; built once, for json.dumps builds an encoder for each call.
as_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False).encode
read_json = json.JSONDecoder().raw_decode  # of what as_json wrote: (value, length)


def basic_authorization(user: str, password: str) -> str:
    """The value of an Authorization header (RFC 7617), in UTF-8."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode("ascii")


def a_labels(name: str) -> str:
    """The name of a host as DNS has it (RFC 5890), or ValueError."""
    if name.isascii():
        return name
    labels = re.split("[.\u3002\uff0e\uff61]", name)  # RFC 3490 3.1
    for i, label in enumerate(labels):
        if "ß" in label or "ς" in label:  # letters of their own since IDNA 2008; the codec still maps them away
            labels[i] = "xn--" + unicodedata.normalize("NFC", label.lower()).encode("punycode").decode()
        elif not label.isascii():
            labels[i] = label.encode("idna").decode()
    return ".".join(labels)


# ======================================================================
# ERRORS - mistakes of operators, callers and programmers
# ======================================================================
#
# What became of mail is a value (Reply, Disposition), never one of these.


class MailproxyError(Exception):
    """The root of the daemon's own exceptions; its text is one sentence for a person."""


class ConfigurationError(MailproxyError):
    """The operator's mistake: names the file, section and key, or the option, and says what to do."""


class Rejected(MailproxyError):
    """A submission that cannot be taken; the text is the reason, its first words fixed."""


class SecretUnavailable(MailproxyError):
    """A secret given by reference cannot be read now; the text names only the reference."""


class StorageUnavailable(MailproxyError):
    """The queue cannot be written or read; nothing of the write was kept, unless the text says that this is not known."""


# ======================================================================
# SETTINGS - one typed table of all settings, and the one reader of files and environment
# ======================================================================
#
# A setting is one line below: name, type, default, kind (what its value must be), meaning.
# That line validates, and refuses what is not known; config.ini and docs/configuration.md are
# printed from it, by the tests. An account is one more section, and its lines judge the JSON of
# POST /account, too. Command line over environment over file over default. The value of a secret
# leaves this room only through `reveal`.

LARGEST_INTEGER = 2**63 - 1
LONGEST_S = 100 * 365 * 86_400
LONGEST_ID = 255  # characters
REFERENCES = ("env:", "file:")  # what a secret begins with that is elsewhere
PRIORITIES = {"immediate": 0, "high": 1, "medium": 2, "low": 3}


class Kind(NamedTuple):
    """What a value must be: in words for a person, and as the function that reads it."""

    words: str  # "a whole number from 0 to 65535"
    parse: Callable[[str], Any]  # raises ValueError
    json: str = "string"  # its type in JSON, as openapi.json is made of it
    types: tuple[type, ...] = ()  # of JSON, that may stand instead of the same as a string
    secret: bool = False
    many: bool = False  # a list: may go on over several lines


def fit(value: T, fits: object) -> T:
    """The value; ValueError when it does not fit."""
    if not fits:
        raise ValueError
    return value


def judged(kind: Kind, value: object, field: str) -> Any:
    """A field of JSON, or the words of config.ini, as its kind reads it. Raises Rejected."""
    try:
        if kind.many and isinstance(value, list | tuple):
            return kind.parse(", ".join(map(str, value)))
        return kind.parse(fit(str(value), isinstance(value, str) or type(value) in kind.types))
    except ValueError:
        raise Rejected(f"invalid {field}: must be {kind.words}") from None


def require(fits: object, field: str, flaw: str) -> None:
    """Raises Rejected, with what is wrong with a field, unless it fits."""
    if not fits:
        raise Rejected(f"invalid {field}: {flaw}")


NOT_FOR_ONE_LINE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]|([\ud800-\udfff])")


def flaw_of_line(text: str) -> str | None:
    """Why a text cannot stand on one line of a header or an address; None when it can."""
    if text.isprintable() or not (found := NOT_FOR_ONE_LINE.search(text)):
        return None
    if found[1]:
        return "is not valid Unicode (a lone surrogate)"
    return f"must not have line breaks or control characters (U+{ord(found[0]):04X})"


def choice(known: Mapping[str, Any], words: str = "", json: str = "", types: tuple[type, ...] = ()) -> Kind:
    """One of these words, in whatever case: it stands for its value."""

    def parse(value: str) -> Any:
        return fit(known.get(value.strip().lower()), value.strip().lower() in known)

    return Kind(words or f"one of {', '.join(known)}", parse, json or " | ".join(map(repr, known)), types)


def word(*words: str, **others: str) -> Kind:
    """One of these words; the `others` mean one of them."""
    return choice({**dict(zip(words, words, strict=True)), **others})


def number(low: float, high: float, words: str, read: Callable[[str], float], json: str, *types: type) -> Kind:
    def parse(value: str) -> float:
        found = read(value)
        return fit(found, low <= found <= high and re.fullmatch(r"\s*[+-]?[0-9.]+\s*", value))

    most = "" if high in (LARGEST_INTEGER, LONGEST_S) else f" to {high:.0f}"
    return Kind(f"{words} from {low:g}{most}", parse, json, types)


def integer(low: int, high: int = LARGEST_INTEGER, words: str = "a whole number") -> Kind:
    return number(low, high, words, int, "integer", int)


def seconds(low: float, high: float = LONGEST_S) -> Kind:
    return number(low, high, "a number of seconds", lambda v: float(v) if "." in v else int(v), "number", int, float)


def many(words: str, read: Callable[[str], Any], json: str = "string", between: str = r"[,\s]", least: int = 1) -> Kind:
    """A list of what `read` takes, with commas or white space between, or a list of JSON."""

    def parse_all(value: str) -> tuple[object, ...]:
        items = tuple(read(item) for item in re.split(between, value) if item.strip())
        return fit(items, len(items) >= least)

    return Kind(f"a list of {words}", parse_all, f"string | {json}[]", many=True)


def _address(value: str, local_part: str = r"[^@\s<>]+") -> str:
    """An address, its domain in A-labels as those of messages are."""
    parts = re.fullmatch(rf"({local_part})@([^@\s<>]+)", value)
    return f"{parts[1]}@{a_labels(parts[2])}" if parts else fit(value, fits=False)


def _alias(value: str) -> str:
    """A bare local name, a colon, and the address that it stands for."""
    name, _, address = value.partition(":")
    return f"{fit(name.strip().lower(), len(name.split()) == 1 and '@' not in name)}: {_address(address.strip())}"


def _server(value: str) -> str:
    """The name of a host in A-labels, or an address; what has a colon in it is IPv6, never a port."""
    host = a_labels(value.strip())
    if ":" in host:
        host = host.removeprefix("[").removesuffix("]")
        ipaddress.IPv6Address(host)
    return fit(host, re.fullmatch(r"[A-Za-z0-9_.:%\-]{1,255}", host))


def _ehlo_name(value: str) -> str:
    """What EHLO may say (RFC 5321 4.1.3): the full name of a host, or an address as a literal in brackets."""
    name = a_labels(value.strip()).removesuffix(".")
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(re.sub(r"^\[(IPv6:)?(.+)\]$", r"\2", name, flags=re.IGNORECASE))
        return f"[IPv6:{address}]" if address.version == 6 else f"[{address}]"
    return fit(name, len(name) <= 255 and re.fullmatch(r"(?:(?!-)[A-Za-z0-9-]{1,63}(?<!-)(?:\.(?=.)|$))+", name))


def _account_reply(value: str) -> AccountReply:
    """A code, and an enhanced code of its class, words of the text, or both."""
    enhanced_code, words = r"(?:\s+(\2\.[0-9]{1,3}\.[0-9]{1,3}))?", r"(?:\s+(?![0-9]\.)(.*[^\W\d].*))?"
    if found := re.fullmatch(rf"(([45])[0-9]{{2}}){enhanced_code}{words}", TEXT.parse(value.strip())):
        return AccountReply(int(found[1]), found[3], found[4] or "")
    raise ValueError


def _host_or_network(value: str) -> str:
    """A host name in A-labels; what looks like an address or a network must be one."""
    value = value.removeprefix("[").removesuffix("]")
    if "/" in value or ":" in value or re.fullmatch(r"[0-9.]+", value):
        ipaddress.ip_network(value, strict=False)
    return fit(a_labels(value).rstrip("."), value.strip("."))


COUNT, BYTES, PERIOD = integer(1), integer(1, words="a whole number of bytes"), seconds(0.01)
TEXT = Kind("text on one line", lambda value: fit(value, not flaw_of_line(value)))
LABEL = Kind("1 to 255 characters on one line", lambda value: fit(TEXT.parse(value), 0 < len(value) <= LONGEST_ID))
TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
BOOLEAN = choice(TRUTH, "true or false (or yes, no, on, off, 1, 0)", "boolean", (bool, int))
PATH = TEXT._replace(words="a path")
QUEUE_PLACE = Kind(
    "a path, or the URL of a PostgreSQL database",
    lambda value: fit(TEXT.parse(value), "://" not in value or is_database(value)),
)
READABLE_FILE = PATH._replace(words="the path of a file that can be read")
ABSOLUTE_PATH = Kind("an absolute path", lambda value: fit(TEXT.parse(value), value.startswith("/")))
SOCKET_PATH = Kind("a path of at most 103 bytes", lambda value: fit(value, len(os.fsencode(value)) <= 103))  # of macOS
LISTENING = Kind(
    "an address and a port, such as 127.0.0.1:2525 or [::1]:2525",
    lambda value: fit(
        value, (at := re.fullmatch(r"(?:[^\s/:]+|\[[\da-f:.]+\]):(\d{1,5})", value)) and int(at[1]) < 65_536
    ),
)
HOST = Kind("the name or the address of a server, without a port", _server)
EHLO_NAME = Kind("a host name, or an address literal such as [192.0.2.1]", _ehlo_name)
REPLY = "codes from 400 to 599, each with an enhanced code, words of the text, or both: 554 5.7.0, 550 daily limit"
REPLIES = many(REPLY, _account_reply, between="[,\n]", least=0)
HTTP_URL = Kind("an http or https URL", lambda value: fit(value.strip(), http_target(value) and not value.split()[1:]))
URL = Kind(
    "an http:// or https:// URL without user and password in it",
    lambda value: fit(value, not http_target(value).authorization and re.fullmatch(r"[!-\[\]-~]+", value)),
)
SECRET = Kind(
    "a secret: itself, env:NAME or file:/path",
    lambda value: Secret(fit(TEXT.parse(value), value not in REFERENCES)),
    secret=True,
)
SECRETS = many("secrets, each itself, env:NAME or file:/path", SECRET.parse)._replace(secret=True)
DELAYS = many("whole seconds", integer(0, LONGEST_S).parse, "integer")
MAIL_ADDRESS = Kind("a mail address", _address)
ALIASES = many("pairs such as root: ops@example.com", _alias, between="[,\n]")
RECIPIENTS = many("mail addresses or @domains", lambda value: _address(value, r"[^@\s<>]*").lower())
HOSTS = many("host names, addresses or networks, not URLs", _host_or_network)
PRIORITY = choice(
    {**{str(number): number for number in PRIORITIES.values()}, **PRIORITIES},
    f"0 to 3, or {', '.join(PRIORITIES)}",
    " | ".join(["integer", *map(repr, PRIORITIES)]),
    (int,),
)

RETRY_DELAYS = (60, 300, 900, 3600, 7200)
NEEDED: Any = object()  # the default of what has none


def attribute_of(key: str) -> str:
    return "from_" if key == "from" else key  # which is a word of Python


class Setting(NamedTuple):
    """One row of the table."""

    section: str
    key: str
    default: Any
    kind: Kind
    meaning: str
    at_start: bool = False  # SIGHUP cannot change it
    else_of: str = ""  # of an account: the setting of [delivery] that stands in for it

    def of(self, settings: Settings) -> Any:
        return getattr(getattr(settings, self.section), attribute_of(self.key))


def row(default: T, kind: Kind, meaning: str, *, at_start: bool = False, else_of: str = "") -> T:
    """A setting, where its section is declared; `rows_of` puts its default in its place."""
    return cast(T, Setting("", "", default, kind, meaning, at_start, else_of))


fixed = functools.partial(row, at_start=True)  # what only a restart can change


class StorageSettings(NamedTuple):
    """Where the queue lives."""

    db_path: str = fixed(
        "",
        QUEUE_PLACE,
        "File of the queue (left out: mailproxy.db beside this file), or postgresql://USER@HOST/DATABASE.",
    )
    node: str | None = fixed(None, LABEL, "Name of this daemon among several machines. Left out: host name and pid.")


class ServerSettings(NamedTuple):
    """The HTTP side: where it listens, who may come in, how much it takes."""

    host: str = fixed("127.0.0.1", HOST, "Address to listen on. One that is not loopback requires api_token.")
    port: int = fixed(8000, integer(0, 65_535), "TCP port to listen on; 0: any free port.")
    unix_socket: str | None = fixed(None, SOCKET_PATH, "Listen on this Unix socket (mode 0660) instead of TCP.")
    submit_socket: str | None = fixed(None, SOCKET_PATH, "Unix socket (mode 0666): any local user may submit there.")
    api_token: tuple[Secret, ...] = row((), SECRETS, "Token that clients must send; several while it is changed.")
    tls_cert: str | None = fixed(None, READABLE_FILE, "Certificate chain (PEM) to speak HTTPS; needs tls_key.")
    tls_key: str | None = fixed(None, READABLE_FILE, "Private key (PEM) of tls_cert.")
    max_body_bytes: int = fixed(64 * 2**20, BYTES, "Largest request body.")
    max_batch: int = row(1000, COUNT, "Most messages of one submission.")
    max_connections: int = fixed(1000, COUNT, "Most connections at a time.")
    head_timeout_seconds: float = fixed(10, PERIOD, "Time for the head of a request.")
    idle_timeout_seconds: float = fixed(75, PERIOD, "How long a connection may be idle between requests.")
    body_timeout_seconds: float = fixed(60, PERIOD, "Time for the next piece of the body of a request.")


class ClientSettings(NamedTuple):
    """The upstream: who gets the delivery reports, and serves attachments by storage path."""

    client_sync_url: str | None = row(None, URL, "Delivery reports are POSTed to this URL. Left out: no reports.")
    client_attachment_url: str | None = row(None, URL, "Source of attachments with fetch_mode endpoint (POST).")
    client_sync_user: str | None = row(None, TEXT, "User of HTTP basic authentication.")
    client_sync_password: Secret | None = row(None, SECRET, "Password of HTTP basic authentication.")
    client_sync_token: Secret | None = row(None, SECRET, "Bearer token; takes precedence over user and password.")
    client_sync_secret: Secret | None = row(None, SECRET, "Signs reports (Standard Webhooks): base64, or whsec_base64.")
    sync_interval_seconds: float = row(300, seconds(0.05), "Call at least this often, even with nothing to report.")
    report_batch_size: int = row(1000, integer(1, 100_000), "Most entries of one report.")
    timeout_seconds: float = row(30, seconds(0.05, 3600), "Time for the whole call.")
    ca_file: str | None = row(None, READABLE_FILE, "CA certificates (PEM) to trust instead of the system's.")


class SubmissionSettings(NamedTuple):
    """Submission by SMTP, for programs that speak nothing else."""

    listen: str | None = fixed(None, LISTENING, "Address and port for submission, such as 127.0.0.1:2525.")
    tls_cert: str | None = fixed(None, READABLE_FILE, "Certificate chain (PEM) for STARTTLS; else that of [server].")
    tls_key: str | None = fixed(None, READABLE_FILE, "Private key (PEM) of tls_cert.")
    max_connections: int = fixed(100, integer(1, 10_000), "Most connections at a time.")


class SchedulerSettings(NamedTuple):
    """Whether mail goes out at all."""

    active: bool = fixed(True, BOOLEAN, "Deliver mail after the first start; later, suspend and activate decide.")


class SendmailSettings(NamedTuple):
    """What bare local names mean to sendmail(8), and where it keeps mail while the daemon is away."""

    domain: str | None = row(None, EHLO_NAME, "Domain of bare local names. Left out: /etc/mailname or the host's own.")
    from_: str | None = row(None, MAIL_ADDRESS, "Sender in place of a bare local name.")
    aliases: tuple[str, ...] = row((), ALIASES, "Recipients for bare local names: root: ops@example.com, ...")
    spool: str | None = row(None, ABSOLUTE_PATH, "Directory (mode 1733) of mail that waits for the daemon.")


class DeliverySettings(NamedTuple):
    """How mail goes out: pace, retries, retention, staging. Accounts may have their own."""

    send_interval_seconds: float = row(0.5, seconds(0.01, 3600), "Longest sleep of the dispatcher; new mail wakes it.")
    test_mode: bool = fixed(False, BOOLEAN, "Deliver and report only at run-now.")
    default_priority: int = row(2, PRIORITY, "Priority of messages that do not name one.")
    delivery_report_retention_seconds: int = row(604_800, integer(0), "How long final, reported messages are kept.")
    batch_size_per_account: int = row(50, integer(1, 100_000), "Most messages taken at a time for an account.")
    max_connections_per_account: int = row(5, integer(1, 1000), "Most connections to the server of an account.")
    max_concurrency: int = row(100, integer(1, 10_000), "Most SMTP transactions at a time, all accounts together.")
    retry_delays: tuple[int, ...] = row(RETRY_DELAYS, DELAYS, "Pauses before the retries; the last one repeats.")
    max_age_seconds: int = row(432_000, COUNT, "A message older than this becomes an error when an attempt fails.")
    max_retries: int = row(0, integer(0, 1_000_000), "Most attempts after the first; 0: until max_age_seconds.")
    id_retention_seconds: int = row(2_592_000, integer(0), "How long ids of sent, removed messages stay known.")
    shutdown_timeout_seconds: float = row(30, seconds(0, 86_400), "Time for transactions to finish at a stop.")
    hostname: str | None = row(None, EHLO_NAME, "Name in EHLO. Left out: the machine's full name, or its address.")
    chunking: bool = row(True, BOOLEAN, "Send small messages by BDAT, in one round trip, where CHUNKING is offered.")
    redirect_to: str | None = row(None, MAIL_ADDRESS, "Staging: all mail goes here, its recipients in X-Original-To.")
    allow_recipients: tuple[str, ...] = row((), RECIPIENTS, "Staging: only these may get mail. Empty: everybody.")


def nested(flat: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """The fields of an account and those of its oauth2, apart as in JSON; config.ini has oauth2_token_url and so on."""
    of_oauth2 = {key.removeprefix("oauth2_"): value for key, value in flat.items() if key.startswith("oauth2_")}
    return {key: value for key, value in flat.items() if not key.startswith("oauth2_")}, of_oauth2


class Account(NamedTuple):
    """An SMTP server to send through. [smtp] is the account of messages that name none."""

    id: str
    host: str = row(NEEDED, HOST, "Name or address of the SMTP server. Without it there is no such account.")
    port: int = row(NEEDED, integer(1, 65_535), "587 or 25 (STARTTLS), or 465 (TLS from the first byte).")
    user: str | None = row(None, TEXT, "Login name; without it there is no login.")
    password: Secret | None = row(None, SECRET, "Password; env:NAME or file:/path keeps it out of this file.")
    use_tls: bool | None = row(None, BOOLEAN, "true: TLS is required. Left out: as start_tls says; true on port 465.")
    implicit_tls: bool = row(False, BOOLEAN, "TLS from the first byte on any port.")
    start_tls: str = row("auto", word("auto", "required", "never"), "auto: STARTTLS when the server offers it.")
    verify_tls: bool = row(True, BOOLEAN, "Verify the server's certificate and name.")
    ca_file: str | None = row(None, PATH, "CA certificates (PEM) to trust instead of the system's.")
    client_cert: str | None = row(None, PATH, "Certificate (PEM) to show to the server.")
    client_key: str | None = row(None, PATH, "Private key (PEM) of client_cert.")
    auth: str = row("auto", word("auto", "plain", "login", "cram-md5", "xoauth2", "oauthbearer"), "How to log in.")
    oauth2_token_url: str | None = row(None, HTTP_URL, "Token endpoint of OAuth 2.0.")
    oauth2_client_id: str | None = row(None, TEXT, "Client id of OAuth 2.0.")
    oauth2_client_secret: Secret | None = row(None, SECRET, "Client secret of OAuth 2.0.")
    oauth2_refresh_token: Secret | None = row(None, SECRET, "Refresh token; without it: client credentials grant.")
    oauth2_scope: str | None = row(None, TEXT, "Scope of the access token.")
    ttl: float = row(300, seconds(0.001), "How long a connection may live.")
    max_connections: int = row(5, integer(1, 1000), "Most connections.", else_of="max_connections_per_account")
    max_messages_per_connection: int = row(100, COUNT, "Most messages over one connection.")
    max_recipients: int = row(100, COUNT, "Most recipients of one transaction; more are split over several.")
    timeout: float | None = row(None, seconds(0.001), "For each reply but the last (600). Left out: 60 to 300.")
    in_doubt: str = row("retry", word("retry", "error"), "What to do when the last reply never came.")
    limit_per_minute: int | None = row(None, integer(0), "Most messages in any 60 seconds; 0: no limit.")
    limit_per_hour: int | None = row(None, integer(0), "Most messages in any hour.")
    limit_per_day: int | None = row(None, integer(0), "Most messages in any day.")
    limit_behavior: str = row("defer", word("defer", "error", reject="error"), "Over a limit: wait, or fail.")
    limit_counts: str = row("messages", word("messages", "recipients"), "Whether limits count messages or recipients.")
    account_replies: tuple[AccountReply, ...] = row((), REPLIES, "Replies that concern the account, not one message.")
    hostname: str | None = row(None, EHLO_NAME, "Name in EHLO.", else_of="hostname")
    batch_size: int = row(50, COUNT, "Most messages taken at a time.", else_of="batch_size_per_account")
    retry_delays: tuple[int, ...] = row(RETRY_DELAYS, DELAYS, "Pauses before the retries.", else_of="retry_delays")
    max_age_seconds: int = row(432_000, COUNT, "Older mail ends when an attempt fails.", else_of="max_age_seconds")
    max_retries: int = row(0, integer(0), "Most attempts after the first.", else_of="max_retries")
    source: str = "http"  # or "config"; no setting

    @property
    def encryption(self) -> str:
        """A word of start_tls, or implicit: TLS from the first byte, as it is on port 465 when it must be certain."""
        certain = self.port == 465 if self.use_tls is None else self.use_tls
        if self.implicit_tls or (certain and self.port == 465):
            return "implicit"
        return "required" if certain else self.start_tls

    @property
    def oauth2(self) -> dict[str, Any]:
        """How to get an access token for XOAUTH2 (RFC 6749 4.4 and 6): what is given of it, by the names of JSON."""
        return {name: value for name, value in nested(self._asdict())[1].items() if value is not None}

    @property
    def limits(self) -> dict[str, int]:
        """Most messages in any 60 s, hour and day, as far as there is a limit."""
        limits = {"minute": self.limit_per_minute, "hour": self.limit_per_hour, "day": self.limit_per_day}
        return {window: most for window, most in limits.items() if most}


class AttachmentSettings(NamedTuple):
    """What fetching attachments may cost, and where they may come from."""

    timeout_seconds: float = row(60, seconds(0.05, 3600), "Time to fetch one attachment, redirects included.")
    max_attachment_bytes: int = row(25 * 2**20, BYTES, "Largest attachment.")
    max_message_bytes: int = row(35 * 2**20, BYTES, "Most bytes of all attachments of a message.")
    memory_budget_bytes: int = fixed(100 * 2**20, BYTES, "Memory for all messages that are being composed.")
    cache_bytes: int = fixed(25 * 2**20, integer(0), "Bytes of fetched files kept on disk for a burst; 0: none.")
    allow_hosts: tuple[str, ...] = row((), HOSTS, "Sources that are allowed although they are not public.")
    base_dir: str | None = row(None, PATH, "Directory of attachments with fetch_mode filesystem. Left out: refused.")


class S3Settings(NamedTuple):
    """Where attachments in S3 come from; the AWS_* variables stand in for what is left out."""

    access_key_id: Secret | None = row(None, SECRET, "Else AWS_ACCESS_KEY_ID.")
    secret_access_key: Secret | None = row(None, SECRET, "Else AWS_SECRET_ACCESS_KEY.")
    session_token: Secret | None = row(None, SECRET, "Else AWS_SESSION_TOKEN, when the key id comes from there too.")
    region: str | None = row(None, TEXT, "Else AWS_REGION or AWS_DEFAULT_REGION.")
    endpoint: str | None = row(None, URL, "Of a server that is not Amazon's. Else AWS_ENDPOINT_URL_S3.")
    addressing: str = row("auto", word("auto", "path", "virtual"), "Place of the bucket; auto: virtual on Amazon.")


class LoggingSettings(NamedTuple):
    """What is said on stderr, and how."""

    level: str = row("info", word("debug", "info", "warning", "error"), "Lowest level that is logged.")
    format: str = row("text", word("text", "json"), "json: every line is a JSON object.")
    delivery_activity: bool = row(False, BOOLEAN, "Log one line for each delivery.")


class Settings(NamedTuple):
    """All that was configured, judged; accounts are still the words of config.ini."""

    storage: StorageSettings
    server: ServerSettings
    client: ClientSettings
    scheduler: SchedulerSettings
    submission: SubmissionSettings
    sendmail: SendmailSettings
    delivery: DeliverySettings
    attachments: AttachmentSettings
    s3: S3Settings
    logging: LoggingSettings
    accounts: Mapping[str, Mapping[str, str]]  # account id -> key -> value as written
    source: str | None = None  # the file, if there was one
    warnings: tuple[str, ...] = ()  # for the log, once there is one
    origins: Mapping[tuple[str, str], str] = MappingProxyType({})  # of each that was given

    def __repr__(self) -> str:
        return f"<Settings of {self.source}>"  # the words of accounts may hold secrets


CLASSES: Mapping[str, type[Any]] = MappingProxyType({  # in the order in which they are printed
    "storage": StorageSettings, "server": ServerSettings, "client": ClientSettings, "scheduler": SchedulerSettings,
    "submission": SubmissionSettings, "sendmail": SendmailSettings, "smtp": Account, "delivery": DeliverySettings,
    "attachments": AttachmentSettings, "s3": S3Settings, "logging": LoggingSettings,
})  # fmt: skip


def rows_of(section: str, kind: Any) -> tuple[Setting, ...]:
    """The settings that a section was declared with; from now on their defaults are those of the class."""
    declared = kind._field_defaults
    defaults = (one.default if isinstance(one, Setting) else one for one in declared.values())
    kind.__new__.__defaults__ = tuple(default for default in defaults if default is not NEEDED)
    rows = {key.removesuffix("_"): one for key, one in declared.items() if isinstance(one, Setting)}
    return tuple(one._replace(section=section, key=key) for key, one in rows.items())


TABLE: Mapping[str, tuple[Setting, ...]] = {section: rows_of(section, kind) for section, kind in CLASSES.items()}
SECTIONS = tuple(section for section in CLASSES if section != "smtp")  # those that are there once
SETTINGS_TABLE = tuple(row for section in SECTIONS for row in TABLE[section])
ACCOUNT_TABLE = TABLE["smtp"]  # of [smtp] and each [account:ID]
ACCOUNT_ID = Setting("smtp", "id", NEEDED, LABEL, "The name by which messages choose the account.")


def as_written(value: object) -> str:
    """A default or a value as it would stand in config.ini; never a secret."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ", ".join(as_written(item) for item in value)
    if isinstance(value, Secret):
        return value.given if value.given.startswith(REFERENCES) else "(set)"
    return "" if value is None else str(value)


# --- reading: file, environment, command line ----------------------------

SYSTEM_CONFIG = "/etc/mailproxy/config.ini"
AWS_VARIABLES = {  # that stand in for what [s3] leaves out; the first one wins
    "AWS_ACCESS_KEY_ID": "access_key_id", "AWS_SECRET_ACCESS_KEY": "secret_access_key",
    "AWS_SESSION_TOKEN": "session_token", "AWS_ENDPOINT_URL_S3": "endpoint",
    "AWS_REGION": "region", "AWS_DEFAULT_REGION": "region",
}  # fmt: skip
ENVIRONMENT_OF_KUBERNETES = re.compile(r"MAILPROXY_(.+_)?(SERVICE_(HOST|PORT)|PORT(_\d+_(TCP|UDP|SCTP)|=\w+://))")


def nearest(name: str, known: Iterable[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _keys_of(origin: str, section: str) -> Mapping[str, Setting]:
    """The rows of a section by their keys. Raises ConfigurationError."""
    if section not in CLASSES and not section.startswith("account:"):
        known = nearest(section.lower(), [*CLASSES, "account:ID"])
        raise ConfigurationError(f"{origin}: [{section}]: unknown section{known}")
    if section == "account:default":
        raise ConfigurationError(f"{origin}: [account:default]: the default account is the section [smtp]")
    return {row.key: row for row in TABLE.get(section, ACCOUNT_TABLE)}


def _value(origin: str, section: str, key: str, text: str) -> Any:
    """What a text at this place means; of an account its words, once they are judged. Raises ConfigurationError."""
    rows, text, where = _keys_of(origin, section), text.strip(), f"{origin}: [{section}] {key}"
    if key not in rows:
        homes = [row.section for row in (*SETTINGS_TABLE, *ACCOUNT_TABLE) if row.key == key]
        hint = f"; it belongs in [{homes[0]}]" if homes else nearest(key, rows)
        raise ConfigurationError(f"{where}: unknown key{hint}")
    row = rows[key]
    if "\n" in text and not row.kind.many:
        raise ConfigurationError(f"{where}: continues on several lines; is the next line indented by mistake?")
    try:
        is_judged = text or not (row.default in (None, (), "") or row.section == "smtp")
        value = row.kind.parse(text) if is_judged else row.default
        return text if row.section == "smtp" else value
    except ValueError:
        quoted = text[:1] in ("'", '"')
        is_secret = row.kind.secret or re.search("://.*[@?]", text)  # a URL may hold a password, or a token
        shown = "the value" if is_secret else text[:100] if quoted else f'"{text[:100]}"'
        flaw = f"{shown} is not" if text else "is empty; it must be"
        raise ConfigurationError(f"{where}: {flaw} {row.kind.words}{'; remove the quotes' * quoted}") from None


def _in_file(path: str) -> Iterator[tuple[str, str, str, str]]:
    """Origin, section, key, text of each setting in config.ini. Blocking. Errors never quote a line: secrets."""
    import configparser

    parser = configparser.RawConfigParser(default_section="", empty_lines_in_values=False)
    try:
        with open(path, encoding="utf-8-sig") as file:
            parser.read_string(re.sub(r"(?m)^\[[ \t]*(account:)?[ \t]*(.+?)[ \t]*\]", r"[\1\2]", file.read()))
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not UTF-8 text; save it in that encoding") from error
    except (configparser.DuplicateSectionError, configparser.DuplicateOptionError) as error:
        where = f"[{error.section}] {getattr(error, 'option', '')}".rstrip()
        raise ConfigurationError(f"{path}: {where}: is given a second time in line {error.lineno}") from None
    except configparser.ParsingError as error:
        lines = ", ".join(str(line) for line, _ in getattr(error, "errors", [(vars(error).get("lineno"), "")]))
        early = isinstance(error, configparser.MissingSectionHeaderError)
        mistake = "stands before the first [section]" if early else "is not of the form key = value"
        raise ConfigurationError(f"{path}: line {lines} {mistake}") from None
    for section in parser.sections():
        _keys_of(path, section)
        if section.startswith("account:") and not parser.items(section):
            raise ConfigurationError(f"{path}: [{section}]: is empty; an account needs host and port")
        yield from ((path, section, key, text) for key, text in parser.items(section))


def read_settings(config: str | None, environ: Mapping[str, str], overrides: Mapping[str, str]) -> Settings:
    """All settings, each judged for itself: what a client of the daemon needs; `overrides` are the command line's,
    by "section.key". Blocking: reads a file. Raises ConfigurationError."""
    environ = {name: text for name, text in environ.items() if not ENVIRONMENT_OF_KUBERNETES.match(f"{name}={text}")}
    usual = (path for path in ("./config.ini", SYSTEM_CONFIG) if os.path.exists(path))
    path = config or environ.get("MAILPROXY_CONFIG") or next(usual, None)
    variables = {f"MAILPROXY_{row.section}_{row.key}".upper(): row for rows in TABLE.values() for row in rows}
    written = list(_in_file(path)) if path else []  # later ones win
    for name, row in variables.items():
        if environ.get(name):  # an empty one is none
            written.append((f"environment variable {name}", row.section, row.key, environ[name]))
    for name, text in overrides.items():
        section, _, key = name.rpartition(".")
        if not section:
            raise ConfigurationError(f"command line: {name}: write SECTION.KEY=VALUE, such as server.port=8000")
        written.append(("command line", section, key.lower(), text))
    values = {(section, key): _value(origin, section, key, text) for origin, section, key, text in written}
    origins = {(section, key): origin for origin, section, key, _ in written}
    own_key = values.get(("s3", "access_key_id"))
    for name, key in AWS_VARIABLES.items():  # a session token belongs to the key id it was issued with
        if environ.get(name) and not values.get(("s3", key)) and not (key == "session_token" and own_key):
            text, origins["s3", key] = environ[name], f"environment variable {name}"
            text = text if key in ("region", "endpoint") else f"env:{name}"
            values["s3", key] = _value(origins["s3", key], "s3", key, text)
    known = (*variables, "MAILPROXY_CONFIG", "MAILPROXY_URL", "MAILPROXY_TOKEN")
    warnings = [
        f"environment variable {name} matches no setting and is ignored{nearest(name, known)}"
        for name in sorted(environ)
        if name.startswith("MAILPROXY_") and name not in known
    ]
    for origin, section, key, text in written:
        given = environ.get(text.removeprefix("env:"), "") if text.startswith("env:") else text
        if given[1:] and given[0] == given[-1] and given[0] in "\"'":
            warnings.append(f"{origin}: [{section}] {key}: the quotes are a part of the value; are they meant to be?")
    sections: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    accounts: dict[str, dict[str, str]] = {}
    for (section, key), value in values.items():
        if section in SECTIONS:
            sections[section][attribute_of(key)] = value
        elif value:
            account_id = "default" if section == "smtp" else section.removeprefix("account:")
            accounts.setdefault(account_id, {})[key] = value
    if not sections["storage"].get("db_path"):
        folder = os.path.dirname(path) if path and os.path.isfile(path) else ""  # not of /dev/null
        beside, here = (os.path.abspath(os.path.join(one, "mailproxy.db")) for one in (folder, ""))
        is_here = os.path.exists(here) and not os.path.exists(beside)
        sections["storage"]["db_path"] = here if is_here else beside
        if is_here:
            warnings.append(f"the queue is {here}, not {beside}: move it there, or set db_path in [storage]")
    if "host" not in accounts.get("default", {"host": ""}):
        del accounts["default"]
        warnings.append("[smtp] has no host: there is no default account")
    each = {section: CLASSES[section](**given) for section, given in sections.items()}
    return Settings(**each, accounts=accounts, source=path, warnings=tuple(warnings), origins=origins)


# --- what settings mean together, and secrets ----------------------------


def _complaint(settings: Settings, section: str, key: str, problem: str) -> ConfigurationError:
    origin = settings.origins.get((section, key), settings.source or "configuration")
    return ConfigurationError(f"{origin}: [{section}] {key}: {problem}")


def is_loopback(host: str) -> bool:
    """True for an address that nobody outside this machine can reach."""
    with contextlib.suppress(ValueError):
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def check_listening(settings: Settings, tokens: tuple[str, ...]) -> None:
    """Without a token only this machine may come in (CONTRACT: authentication)."""
    server = settings.server
    if not tokens and not server.unix_socket and not is_loopback(server.host):
        remedy = "set api_token in [server] (or MAILPROXY_SERVER_API_TOKEN), or listen on 127.0.0.1"
        problem = f"{server.host} can be reached from outside, and no token is set: {remedy}"
        raise _complaint(settings, "server", "host", problem)
    submission = settings.submission
    host = (submission.listen or "localhost:0").rpartition(":")[0].strip("[]")
    if not is_loopback(host) and not (tokens and (submission.tls_cert or server.tls_cert)):
        problem = f"{host} can be reached from outside: set api_token in [server], and tls_cert and tls_key here"
        raise _complaint(settings, "submission", "listen", f"{problem}; or listen on 127.0.0.1")


def webhook_key(secret: str) -> bytes:
    """The key of a webhook secret: base64, with or without whsec_ before it (Standard Webhooks). Raises ValueError."""
    encoded = secret.removeprefix("whsec_")
    padding = "=" * (-len(encoded) % 4) if encoded != secret else ""  # without whsec_ it might be a plain word
    key = base64.b64decode(encoded + padding, validate=True)
    return fit(key, key)


def reveal(secret: Secret, environ: Mapping[str, str]) -> str:
    """The secret itself: as given, from the environment, or from a file without its last line end.
    Blocking: may read a file. Raises SecretUnavailable."""
    if not secret.given.startswith(REFERENCES):
        return secret.given
    kind, _, name = secret.given.partition(":")
    try:
        if kind == "env":
            text = environ.get(name, "")
        elif stat.S_ISREG(os.stat(name).st_mode):
            with open(name, encoding="utf-8-sig", newline="") as file:
                text = file.read().removesuffix("\n").removesuffix("\r")
        else:  # a pipe could block for ever
            raise SecretUnavailable(f"{secret.given} is not a regular file")
    except OSError as error:
        raise SecretUnavailable(f"{secret.given} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SecretUnavailable(f"{secret.given} is not UTF-8 text") from None
    if not text:
        raise SecretUnavailable(f"{secret.given} is {'not set' if kind == 'env' else 'empty'}")
    return text


def api_tokens(settings: Settings, environ: Mapping[str, str]) -> tuple[str, ...]:
    """Every API token, read now; none means that nobody is asked for one. Blocking. Raises ConfigurationError."""
    try:
        texts = [reveal(secret, environ).replace(",", " ") for secret in settings.server.api_token]
    except SecretUnavailable as error:
        raise _complaint(settings, "server", "api_token", str(error)) from None
    if not all(re.fullmatch(r"[\x21-\x7e\s]+", text) and text.strip() for text in texts):
        raise _complaint(settings, "server", "api_token", "a token must be ASCII without spaces")
    return tuple(dict.fromkeys(" ".join(texts).split()))


def load_settings(config: str | None, environ: Mapping[str, str], overrides: Mapping[str, str]) -> Settings:
    """All settings, judged together, too, as the daemon needs them. Blocking. Raises ConfigurationError."""
    settings = read_settings(config, environ, overrides)
    check_listening(settings, api_tokens(settings, environ))
    needs = {"tls_cert": "tls_key", "tls_key": "tls_cert", "client_sync_password": "client_sync_user"}
    for row in SETTINGS_TABLE:  # files and secrets that the clients of the daemon need not be able to read
        value, needed = row.of(settings), needs.get(row.key)
        complaint = functools.partial(_complaint, settings, row.section, row.key)
        if row.kind is READABLE_FILE and value and (os.path.isdir(value) or not os.access(value, os.R_OK)):
            raise complaint(f'"{value}" is not {row.kind.words}')
        if row.section == "client" and isinstance(value, Secret):  # fit for a header
            try:
                text = reveal(value, environ)
                if row.key == "client_sync_secret":
                    webhook_key(text)
            except SecretUnavailable as error:
                raise complaint(str(error)) from None
            except ValueError:
                remedy = "openssl rand -base64 32 makes one"
                raise complaint(f"must be base64, with or without whsec_ before it: {remedy}") from None
            if row.key == "client_sync_token" and not re.fullmatch(r"[\x21-\x7e]+", text):
                raise complaint("must be ASCII without spaces to go into a header")
        if value and needed and not getattr(getattr(settings, row.section), needed):
            raise complaint(f"requires {needed}")
        if row.key == "client_sync_user" and ":" in (value or ""):
            raise complaint("must not hold a colon (RFC 7617)")
    return settings


# --- names without a domain ----------------------------------------------

MAILNAME = "/etc/mailname"


def full_host_name() -> str:
    """The name of this host with its domain, "" where it has none that means something elsewhere. Blocking."""
    name = socket.gethostname()
    full_name = name if "." in name else socket.getfqdn(name)
    is_full = full_name.startswith(f"{name}.") or "." in name
    with contextlib.suppress(ValueError):
        return _ehlo_name(full_name) if is_full and "localhost" not in full_name.lower().split(".") else ""
    return ""


class LocalNames(NamedTuple):
    """What bare local names mean, such as root, as [sendmail] has it."""

    domain: str  # "" where this host has none
    host: str
    sender: str | None
    aliases: Mapping[str, list[str]]

    def sender_of(self, name: str) -> str:
        """The address of a sender: as it is, or completed."""
        return name if "@" in name else self.sender or f"{name}@{self.domain or self.host}"

    def recipients(self, name: str) -> list[str]:
        """The addresses that a recipient means; mail to a mere host name would become an error that nobody is told."""
        if "@" in name:
            return [name]
        remedy = f"set aliases ({name}: address) or domain in [sendmail]"
        require(self.domain or name.lower() in self.aliases, "to", f"this host has no domain: {remedy}")
        return self.aliases.get(name.lower()) or [f"{name}@{self.domain}"]


def local_names(sendmail: SendmailSettings) -> LocalNames:
    """Blocking: reads /etc/mailname, and may ask the name service."""
    aliases: dict[str, list[str]] = {}
    for name, _, address in (alias.partition(": ") for alias in sendmail.aliases):
        aliases.setdefault(name, []).append(address)
    domain = sendmail.domain
    if domain is None:
        with contextlib.suppress(OSError, ValueError), open(MAILNAME) as file:
            domain = _ehlo_name(file.readline(1000))
    return LocalNames(domain or full_host_name(), socket.gethostname(), sendmail.from_, aliases)


# --- accounts ------------------------------------------------------------


class Field(NamedTuple):
    """A field of a JSON object that clients send: what openapi.json says of it."""

    type: str  # "string", "integer", "string | string[]", "'auto' | 'never'", or a named schema
    words: str
    required: bool = False


SECRET_FIELDS = frozenset(row.key for row in ACCOUNT_TABLE if row.kind.secret)  # not shown to anybody
ACCOUNT_KEYS = frozenset(("id", "oauth2", *(row.key for row in ACCOUNT_TABLE)))
ACCOUNT_FIELDS, OAUTH2_FIELDS = nested({
    **{row.key: Field(row.kind.json, row.meaning, row.default is NEEDED) for row in (ACCOUNT_ID, *ACCOUNT_TABLE)},
    "oauth2": Field("OAuth2", "A refresh token (and client_secret, where asked for), or client_secret and scope."),
})  # fmt: skip


def parse_account(fields: Any, *, source: str = "http", defaults: DeliverySettings = DeliverySettings()) -> Account:
    """An account from JSON or the words of config.ini; null and empty mean left out. Raises Rejected."""
    require(isinstance(fields, dict), "account", "must be an object")
    inner = {} if fields.get("oauth2") in (None, "") else fields["oauth2"]
    require(isinstance(inner, dict), "oauth2", "must be an object")
    given = {**fields, **{f"oauth2_{key}": value for key, value in inner.items()}}
    values: dict[str, Any] = {"source": source}
    for row in (ACCOUNT_ID, *ACCOUNT_TABLE):
        value = given.get(row.key)
        if value is not None and value != "":
            values[row.key] = judged(row.kind, value, row.key.replace("oauth2_", "oauth2: "))
        elif row.default is NEEDED:
            raise Rejected(f"missing {row.key}")
        elif row.else_of:
            values[row.key] = getattr(defaults, row.else_of)
    account = Account(**values)
    if inner or account.oauth2:
        oauth2 = account.oauth2.keys()
        has_grant = "refresh_token" in oauth2 or oauth2 >= {"client_secret", "scope"}
        require(oauth2 >= {"token_url", "client_id"}, "oauth2", "needs token_url and client_id")
        require(has_grant, "oauth2", "needs refresh_token, or client_secret and scope")
    require(account.oauth2 or "oauth" not in account.auth, "auth", f"{account.auth} needs oauth2")
    require(account.client_cert or not account.client_key, "client_key", "requires client_cert")
    return account


def configured_accounts(settings: Settings) -> list[Account]:
    """The accounts of config.ini, judged. Raises ConfigurationError that names the section."""
    accounts = []
    for account_id, words in settings.accounts.items():
        try:
            given = {**words, "id": account_id}
            accounts.append(parse_account(given, source="config", defaults=settings.delivery))
        except Rejected as error:
            where = f"{settings.source or 'configuration'}: [{section_of(account_id)}]"
            raise ConfigurationError(f"{where}: {error}") from None
    return accounts


def left_open(settings: Settings, accounts: Iterable[Account], environ: Mapping[str, str]) -> Iterator[str]:
    """What will not work, although every setting is well written. Blocking: reads files of secrets."""
    secrets = [(f"[s3] {row.key}", row.of(settings)) for row in TABLE["s3"]]
    for account in accounts:
        secrets += [(f"account {account.id}, {row.key}", getattr(account, row.key)) for row in ACCOUNT_TABLE]
        if account.user and not account.password and not account.oauth2:
            yield f"account {account.id}: has a user but no password: set password, or remove user"
    for where, secret in secrets:
        try:
            if isinstance(secret, Secret):
                reveal(secret, environ)
        except SecretUnavailable as error:
            yield f"{where}: {error}"


def section_of(account_id: str) -> str:
    """Where an account stands in config.ini."""
    return "smtp" if account_id == "default" else f"account:{account_id}"


def account_fields(account: Account) -> dict[str, object]:
    """An account as it is shown: no secret is in it."""
    rows = [row.key for row in (ACCOUNT_ID, *ACCOUNT_TABLE) if not row.kind.secret]
    shown, oauth2 = nested({key: getattr(account, key) for key in rows})
    oauth2["token_url"] = without_password(account.oauth2_token_url or "")
    use_tls = account.port == 465 if account.use_tls is None else account.use_tls
    shown["account_replies"] = [str(reply) for reply in account.account_replies]
    return {**shown, "source": account.source, "use_tls": use_tls, "oauth2": oauth2 if account.oauth2 else None}


# --- what is in force, and what has changed ------------------------------


def is_database(db_path: str) -> bool:
    """Whether it is the URL of a database, or says where that is."""
    return db_path.startswith(("postgresql://", "postgres://", *REFERENCES))


def without_password(place: str) -> str:
    """A path, or a URL as people may see it: without its password, and its query, which may hold a token."""
    scheme, separator, rest = place.partition("://")
    bare, asks, _ = rest.partition("?")
    user, at, where = bare.rpartition("@")
    return f"{scheme}{separator}{user.partition(':')[0]}{at}{where}{asks and '?...'}"


def with_password(db_path: str, environ: Mapping[str, str]) -> str:
    """The same with what is in the environment or a file: all of it, or its password. Raises ConfigurationError."""
    url, password = "postgres(?:ql)?://", "(?:env|file)(?::|%3A).*"
    try:
        if db_path.startswith(REFERENCES):
            whole = reveal(Secret(db_path), environ)
            if not re.match(url, whole):
                raise SecretUnavailable(f"{db_path} is not the URL of a database")
            return whole
        if found := re.fullmatch(f"({url}[^:@/]*:)({password})(@[^@]*)", db_path):
            password = reveal(Secret(urllib.parse.unquote(found[2])), environ)
            return found[1] + urllib.parse.quote(password, safe="") + found[3]
    except SecretUnavailable as error:
        raise ConfigurationError(f"db_path: {error}") from None
    return db_path


def renewed(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """The new settings, but those that need a restart as they are in force; and those of them that differ."""
    kept = {name: {row.key: row.of(old) for row in TABLE[name] if row.at_start} for name in SECTIONS}
    fixed = new._replace(**{name: getattr(new, name)._replace(**values) for name, values in kept.items()})
    return fixed, [f"{row.section}.{row.key}" for row in SETTINGS_TABLE if row.of(new) != row.of(fixed)]


def describe(settings: Settings) -> Iterator[tuple[str, str, str, str]]:
    """What is in force: section, key, value, where it came from. No secret among it."""
    for row in SETTINGS_TABLE:
        value = as_written(row.of(settings))
        value = without_password(value) if row.kind in (QUEUE_PLACE, URL) else value
        yield row.section, row.key, value, settings.origins.get((row.section, row.key), "default")
    for account_id, words in settings.accounts.items():
        section = section_of(account_id)
        for key in (row.key for row in ACCOUNT_TABLE if row.key in words):
            value = as_written(Secret(words[key])) if key in SECRET_FIELDS else without_password(words[key])
            yield section, key, value, settings.origins[section, key]


# ======================================================================
# SUBMISSION - JSON -> Message, or the reason to reject it
# ======================================================================
#
# Each message is judged here by itself, once: what passes can be composed and sent, what does not is
# refused with a reason whose first words are fixed. Pure, and linear in the length of what it is given.
# Addresses are those of RFC 5322 3.4 within the lengths of RFC 5321 4.5.3.1.

ADDRESSES = "string | string[]"
MESSAGE_FIELDS: Mapping[str, Field] = {
    "id": Field("string", "The client's own key, unique; submitted again, it is the same message.", required=True),
    "account_id": Field("string", "The account to send through; left out: that of [smtp]."),
    "from": Field("string", "a@b or Name <a@b>.", required=True),
    "from_name": Field("string", "The name beside a bare address in from."),
    "to": Field(ADDRESSES, "Addresses in a list, or in one string with commas.", required=True),
    "cc": Field(ADDRESSES, "As to."),
    "bcc": Field(ADDRESSES, "Addresses, as in to; they are in no header."),
    "reply_to": Field(ADDRESSES, "As to."),
    "return_path": Field("string", "The envelope sender; left out: the address of from; <>: none."),
    "subject": Field("string", "May be empty, but must be given (not with raw)."),
    "body": Field("string", "The text, as content_type says. One of body, text, html, raw must be given."),
    "content_type": Field("'plain' | 'html'", "Of body; left out: plain."),
    "text": Field("string", "The plain text, beside html or without it."),
    "html": Field("string | boolean", "The HTML text; true beside body: that is HTML."),
    "headers": Field("object", "More headers by their names, each a string, a number or a list of them."),
    "message_id": Field("string", "Message-ID; left out: made up once."),
    "attachments": Field("Attachment[]", "Files, as they are or to be fetched."),
    "priority": Field(PRIORITY.json, "0 is immediate, 3 low; left out: default_priority."),
    "deferred_ts": Field("integer", "Not sent before this time (Unix seconds), which is also its Date."),
    "expires_ts": Field("integer", "Not sent after this time (Unix seconds)."),
    "raw": Field("string", "A complete RFC 5322 message in base64, instead of subject, texts, headers, attachments."),
    "batch_code": Field("string", "Any label; messages are found, suspended and activated by it."),
}
ATTACHMENT_FIELDS: Mapping[str, Field] = {
    "filename": Field("string", "Its name in the message."),
    "content": Field("string", "The file in base64."),
    "url": Field("string", "An http or https URL it is fetched from."),
    "s3": Field("S3Object", "An object it is fetched from."),
    "storage_path": Field("string", "As fetch_mode says: a path known to the upstream, a URL, base64, or a file."),
    "fetch_mode": Field("'endpoint' | 'http_url' | 'base64' | 'filesystem'", "Left out: it follows from storage_path."),
    "content_type": Field("string", "type/subtype; left out: by the answer of the source, or the name."),
    "content_id": Field("string", "What cid: in html refers to."),
    "inline": Field("boolean", "Shown in the text, not beside it."),
    "content_md5": Field("string", "The MD5 of the file in 32 hexadecimal digits; any other file is refused."),
}
S3_FIELDS: Mapping[str, Field] = {
    "bucket": Field("string", "The bucket.", required=True),
    "key": Field("string", "The key, of any characters.", required=True),
    "region": Field("string", "Left out: that of [s3]."),
    "endpoint": Field("string", "URL of a server; left out: that of [s3]."),
    "version_id": Field("string", "A version of the object."),
    "addressing": Field("'auto' | 'path' | 'virtual'", "Place of the bucket in the URL; left out: as [s3] says."),
}
BESIDE_RAW = (  # what means nothing where a raw message stands instead
    "from_name", "reply_to", "subject", "body", "content_type", "text", "html", "headers", "attachments",
)  # fmt: skip

RAW_CONTENT = -1  # where a raw message stands among the contents; attachments count from 0

LONGEST_ADDRESS = 254  # octets, RFC 5321 4.5.3.1.3 less the angle brackets
LONGEST_LOCAL_PART = 64  # octets, RFC 5321 4.5.3.1.1
LONGEST_SUBJECT = 10_000  # characters: of a longer one encoded words are not decoded
LATEST_TIME = 9_999_999_999  # Unix seconds: the year 2286; what is above it was meant in milliseconds
LONGEST_MESSAGE_ID = 900  # octets: a header line has 998 at most (RFC 5322 2.1.1)

# --- text and numbers -----------------------------------------------------


def line_of(value: object, field: str, *, most: int | None = None) -> str:
    """Text on one line, without control characters; with `most` it has 1 to so many characters."""
    if not isinstance(value, str):
        raise Rejected(f"invalid {field}: must be a string")
    if not value.isprintable() and (flaw := flaw_of_line(value)):
        raise Rejected(f"invalid {field}: {flaw}")
    if most is not None and not 1 <= len(value) <= most:
        raise Rejected(f"invalid {field}: must have 1 to {most} characters")
    return value


def _must_be_storable(value: object, field: str) -> None:
    """Refuses what could not be written as JSON again, in fields that are kept without being understood."""
    try:
        as_json(value).encode()
    except (ValueError, RecursionError):  # a lone surrogate, NaN, too many levels
        raise Rejected(f"invalid {field}: cannot be kept as JSON in UTF-8") from None


def _shown(text: str) -> str:
    """A piece of what was given, short enough for a reason."""
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


# --- addresses ------------------------------------------------------------

_ATEXT = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\-]"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9\-]{0,61}[A-Za-z0-9])?"
PLAIN_ADDRESS = rf"(?=[^@]{{1,64}}@){_ATEXT}+(?:\.{_ATEXT}+)*@{_LABEL}(?:\.{_LABEL})*"

_PLAIN_ADDRESS = re.compile(PLAIN_ADDRESS)
_COMMON_MAILBOX = re.compile(rf"(?:([\w .'&\-]*+)<)?({PLAIN_ADDRESS})(?(1)>)")  # spares most the general way
_DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_QUOTED = r'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_DOTTED = re.compile(r'\.*[^\x00- "(),.:;<>@\[\\\]\x7f][^\x00- "(),:;<>@\[\\\]\x7f]*')  # RFC 6532 3.2, or nearly
_QUOTED_STRING = re.compile(_QUOTED)
_MAILBOX = re.compile(
    rf"""(?: (?P<name> (?: {_QUOTED} | [^",<>:;\\] )*+ ) < (?P<angle> (?: {_QUOTED} | [^"<>] )*+ ) >
           | (?P<bare> (?: {_QUOTED} | \[[^\[\]\s]*+\] | [^\s",<>():;\\\[\]] )++ )
         ) \s*+ (?: \( (?P<comment> [^()]*+ ) \) \s*+ )?+ (?: , [\s,]*+ | \Z )""",
    re.VERBOSE,
)


def parse_mailboxes(value: object, field: str, *, exactly_one: bool = False) -> tuple[Mailbox, ...]:
    """The mailboxes of a list, or of a comma-separated string (RFC 5322 3.4, without groups)."""
    if value is None:
        return ()
    found: list[Mailbox] = []
    for text in value if isinstance(value, list) and not exactly_one else (value,):
        if not isinstance(text, str):
            wanted = "one address in a string" if exactly_one else "addresses, in a list or in one string"
            raise Rejected(f"invalid {field}: must be {wanted}")
        if (usual := _COMMON_MAILBOX.fullmatch(text)) and len(usual[2]) <= LONGEST_ADDRESS:
            found.append(Mailbox((usual[1] or "").strip(), usual[2]))
        else:
            found.extend(_mailboxes_of(line_of(text, field), field))
    if exactly_one and len(found) != 1:
        raise Rejected(f"invalid {field}: must be exactly one address")
    return tuple(found)


def _mailboxes_of(text: str, field: str) -> Iterator[Mailbox]:
    """The general way: display names with quotes, encoded words (RFC 2047) and commas in them, comments."""
    text, start = re.sub(r"^[\s,]+", "", text), 0
    while start < len(text):
        found = _MAILBOX.match(text, start)
        if found is None:
            raise Rejected(f"invalid {field}: {_shown(text[start:])} is not an address")
        start, comment = found.end(), (found["comment"] or "").strip()
        if found["bare"] is not None:
            yield Mailbox(comment, parse_addr_spec(found["bare"], field))
            continue
        name = found["name"].strip() or comment
        if '"' in name:
            name = _QUOTED_STRING.sub(lambda quoted: re.sub(r"\\(.)", r"\1", quoted[0][1:-1]), name)
        yield Mailbox(_decoded(name, field), parse_addr_spec(found["angle"], field))


def _decoded(text: str, field: str, *, longest: int = 500) -> str:
    """A header text as its reader would see it; what cannot be decoded, or is longer than that, stays as it is."""
    if "=?" not in text or len(text) > longest:
        return text
    try:
        decoded = str(make_header(decode_header(text)))
    except (ValueError, LookupError, MessageError):
        return text
    return line_of(decoded.replace("\t", " "), field).strip()


def parse_addr_spec(text: str, field: str) -> str:
    """A bare address, its domain in A-labels; the local part may be UTF-8 (RFC 6531), or for `addr_spec`."""
    address = text.strip()
    if _PLAIN_ADDRESS.fullmatch(address) and len(address) <= LONGEST_ADDRESS:
        return address
    local_part, at, domain = address.rpartition("@")
    shape = _QUOTED_STRING if local_part.startswith('"') else _DOTTED
    is_local_part = at and shape.fullmatch(local_part) and local_part.isprintable()
    require(is_local_part, field, f"{_shown(address)} is not an address")
    is_short = len(addr_spec(local_part + at).encode()) <= LONGEST_LOCAL_PART + 1
    require(is_short, field, f"the part before the @ has more than {LONGEST_LOCAL_PART} octets")
    try:
        fit(domain, len(domain) <= LONGEST_ADDRESS)  # what is longer takes long to encode
        if not domain.startswith("["):
            domain = fit(labels := a_labels(domain), _DOMAIN.fullmatch(labels))  # RFC 5890
        else:
            literal = fit(domain[1:-1], domain.endswith("]") and "%" not in domain)  # a scope could be any characters
            if literal[:5].lower() == "ipv6:":  # RFC 5321 4.1.3
                ipaddress.IPv6Address(literal[5:])
            else:
                ipaddress.IPv4Address(literal)
    except ValueError:
        raise Rejected(f"invalid {field}: {_shown(domain)} is not a domain or an address literal") from None
    address = f"{local_part}@{domain}"
    require(len(address.encode()) <= LONGEST_ADDRESS, field, f"an address has at most {LONGEST_ADDRESS} octets")
    return address


def addr_spec(address: str) -> str:
    """An address as mail has it: `a..b@`, `a.@` and `.a@`, which some providers gave out, in quotes (RFC 5321 4.1.2)."""
    if (".." in address or ".@" in address or address.startswith(".")) and not address.startswith('"'):
        local_part, _, domain = address.rpartition("@")
        return f'"{local_part}"@{domain}'
    return address


# --- header fields --------------------------------------------------------

_FIELD_NAME = re.compile(r"[!-9;-~]{1,76}")  # ftext, RFC 5322 3.6.8
_OURS = frozenset(("from", "to", "cc", "bcc", "mime-version", "return-path"))
_ONCE = frozenset(("subject", "date", "message-id", "reply-to", "sender", "in-reply-to", "references"))
_MEANS_A_FIELD = ("subject", "message-id", "reply-to")
_ID = "[!-;=?-~]"  # printable ASCII but angle brackets
_MESSAGE_ID = re.compile(rf"(<\s*)?((?=[^@]+@{_ID}){_ID}{{1,{LONGEST_MESSAGE_ID}}})(?(1)\s*>)")
_CONTENT_ID = re.compile(rf"{_ID}{{0,{LONGEST_ID}}}")


def _extra_headers(given: Any) -> tuple[tuple[tuple[str, str], ...], dict[str, str]]:
    """The headers of a submission; apart from them, by name, those that mean a field of the message."""
    require(isinstance(given, dict), "headers", "must be an object of names and values")
    others: list[tuple[str, str]] = []
    once: dict[str, str] = {}
    for name, values in given.items():
        lower = name.lower()
        require(_FIELD_NAME.fullmatch(name), "headers", f"{_shown(name)} is not the name of a header")
        require(lower not in _OURS and not lower.startswith("content-"), "headers", f"{name} cannot be given here")
        for value in values if isinstance(values, list) else [values]:
            if value is None:
                continue
            fits = isinstance(value, str) or (type(value) in (int, float) and abs(value) <= LARGEST_INTEGER)
            require(fits, "headers", f"{name} must be a string, a number or a list of them")
            text = line_of(str(value).replace("\t", " "), "headers").strip(" ")
            require(lower not in once, "headers", f"{lower} can be given only once")
            if lower in _ONCE:
                once[lower] = text
            if lower not in _MEANS_A_FIELD:
                others.append((name, text))
    try:
        if "date" in once:
            email.utils.parsedate_to_datetime(once["date"])
    except (ValueError, TypeError, OverflowError):
        raise Rejected("invalid headers: Date is not a date (RFC 5322 3.3)") from None
    return tuple(others), once


def _message_id(value: object, field: str) -> str:
    """A Message-ID without its angle brackets (RFC 5322 3.6.4, but for its finer points)."""
    if found := _MESSAGE_ID.fullmatch(line_of(value, field).strip()):
        return found[2]
    raise Rejected(f"invalid {field}: a Message-ID looks like <left@right>, in ASCII and without spaces")


# --- base64 and raw messages ----------------------------------------------

BASE64_PIECE = 262_144  # characters decoded at a time
_BARE_BASE64 = (bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v")  # for bytes.translate()
_BASE64_END = frozenset("= \t\r\n\f\v")


def decode_base64(text: str) -> bytes:
    """Base64 (RFC 4648 4 and 5) with or without padding and white space; anything else is a ValueError.
    Piece by piece: this runs in a thread, and no single step is to keep the event loop waiting."""
    end = len(text)
    while end and text[end - 1] in _BASE64_END:
        end -= 1
    decoded = io.BytesIO()  # its getvalue() is no copy
    rest = b""  # of a group of four
    for start in range(0, end, BASE64_PIECE):
        bare = rest + text[start : min(start + BASE64_PIECE, end)].encode("ascii").translate(*_BARE_BASE64)
        if b"=" in bare:
            raise ValueError("padding before the end")
        whole = len(bare) // 4 * 4
        decoded.write(binascii.a2b_base64(bare[:whole], strict_mode=True))
        rest = bare[whole:]
    decoded.write(binascii.a2b_base64(rest + b"=" * (-len(rest) % 4), strict_mode=True))
    return decoded.getvalue()


def _decoded_content(value: Any, field: str) -> bytes:
    with contextlib.suppress(ValueError):
        return decode_base64(fit(value, isinstance(value, str)))
    raise Rejected(f"invalid {field}: is not base64")


_NOT_FOLDED = re.compile(rb"\r\n(?![ \t])")
HEADER_FIELD = re.compile(rb"[!-9;-~]+[ \t]*:")


def with_crlf(text: bytes) -> bytes:
    """The same text with every line end CRLF, bare CR, bare LF and CR CR LF included (RFC 5321 2.3.8)."""
    if b"\r" in text:
        if text.count(b"\r") == text.count(b"\n") == text.count(b"\r\n"):
            return text
        text = text.replace(b"\r\r\n", b"\n").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return text.replace(b"\n", b"\r\n")


def split_raw(raw: bytes) -> tuple[list[bytes], bytes]:
    """The header fields of a complete message, folded as they are, and its body."""
    header, _, body = with_crlf(raw).partition(b"\r\n\r\n")
    return _NOT_FOLDED.split(header.removesuffix(b"\r\n")), body


def field_name(field: bytes) -> bytes:
    """The name of a header field, in small letters."""
    return field.partition(b":")[0].rstrip(b" \t").lower()


def subject_of_raw(raw: bytes) -> str:
    """The subject of a complete message as its reader sees it, on one line; "" when there is none."""
    found = next((field for field in split_raw(raw)[0] if field_name(field) == b"subject"), b"")
    folded = found.partition(b":")[2].decode("utf-8", "replace")
    text = NOT_FOR_ONE_LINE.sub(" ", re.sub("[\r\n]+", "", folded)).strip()
    with contextlib.suppress(Rejected):
        return _decoded(text, "subject", longest=LONGEST_SUBJECT)
    return text


def _raw_message(given: object) -> tuple[bytes, str | None]:
    """A complete message that may be sent, and its own Message-ID ("" when it has a strange one)."""
    content = given if isinstance(given, bytes) else _decoded_content(given, "raw")
    require(b"\0" not in content, "raw", "must not have NUL characters")
    fields, _ = split_raw(content)
    require(all(map(HEADER_FIELD.match, fields)), "raw", "does not begin with the header of a message (RFC 5322)")
    own = next((field for field in fields if field[:1] in b"Mm" and field_name(field) == b"message-id"), None)
    if own is None:
        return content, None
    first, *_ = own.partition(b":")[2].decode("utf-8", "replace").split() or [""]
    found = _MESSAGE_ID.fullmatch(first)
    return content, found[2] if found else ""


# --- attachments ----------------------------------------------------------

_SOURCES = ("content", "url", "s3", "storage_path")
_TOKEN = r"[A-Za-z0-9!#$%&'*+.^_`{|}~\-]+"  # RFC 2045 5.1
_VALUE = rf'(?:{_TOKEN}|"(?:[ !#-\[\]-~]|\\[ -~])*+")'
CONTENT_TYPE = re.compile(rf"({_TOKEN}/{_TOKEN})((?: *; *{_TOKEN}={_VALUE})*) *;?")  # all of it printable ASCII
_FETCH_MODES = {
    "endpoint": Source.ENDPOINT, "http_url": Source.URL, "base64": Source.CONTENT, "filesystem": Source.FILESYSTEM,
}  # fmt: skip


def _attachments(value: Any, contents: Mapping[int, bytes] | None) -> tuple[Attachment, ...]:
    """The attachments of a message; `contents` are those that were taken out for keeping."""
    require(isinstance(value, list), "attachments", "must be a list")
    found = []
    for index, given in enumerate(value):
        field = f"attachments: attachment {index + 1}"
        require(isinstance(given, dict), field, "must be an object")
        if unknown := {key: value for key, value in given.items() if key not in ATTACHMENT_FIELDS}:
            _must_be_storable(unknown, "attachments")
        if contents is not None and not any(given.get(source) is not None for source in _SOURCES):
            source: dict[str, Any] = {"source": Source.CONTENT, "content": contents.get(index, b"")}
        else:
            source = _source(given, field)
        content_type = _text(given, "content_type", field).strip()
        content_id = _text(given, "content_id", field).strip().removeprefix("<").removesuffix(">")
        content_md5 = _text(given, "content_md5", field).strip()
        inline, filename = given.get("inline"), _text(given, "filename", field)
        type_found = CONTENT_TYPE.fullmatch(content_type) if len(content_type) <= 255 else None
        require(type_found or not content_type, field, "content_type must be like application/pdf")
        require(_CONTENT_ID.fullmatch(content_id), field, "content_id must be ASCII without spaces and angle brackets")
        require(re.fullmatch("([0-9a-fA-F]{32})?", content_md5), field, "content_md5 must be 32 hexadecimal digits")
        require(inline is None or isinstance(inline, bool), field, "inline must be true or false")
        media_type = type_found[1].lower() + type_found[2] if type_found else None
        source |= {"content_type": media_type, "content_id": content_id or None, "inline": bool(inline)}
        found.append(Attachment(filename, content_md5=content_md5.lower() or None, **source))
    return tuple(found)


def stored_attachments(payload: str) -> tuple[Attachment, ...]:
    """The attachments of a stored payload; those that came with their content are without it."""
    return _attachments(json.loads(payload).get("attachments") or [], {})


def _source(given: Mapping[str, Any], field: str) -> dict[str, Any]:
    """Where the bytes of an attachment are, in the fields of Attachment that say so."""
    named = [source for source in _SOURCES if given.get(source) is not None]
    require(len(named) < 2, field, f"names more than one source: {' and '.join(named)}")
    require(named, field, "has no source: content, url, s3 or storage_path")
    value, place, mode = given[named[0]], f"{field}: {named[0]}", _text(given, "fetch_mode", field)
    require(given.get("filename") or named != ["content"], field, "has no filename")
    if named == ["s3"]:
        return {"source": Source.S3, "s3": _s3_object(value, field)}
    if named != ["storage_path"]:
        source = Source(named[0])
    elif not isinstance(value, str) or not value:
        raise Rejected(f"invalid {place} must be a string, and not empty")
    else:
        start = value[:8].lower()
        usual = {"base64:": "base64", "http://": "http_url", "https://": "http_url", "/": "filesystem"}
        mode = mode or next((mode for prefix, mode in usual.items() if start.startswith(prefix)), "endpoint")
        require(mode in _FETCH_MODES, field, "fetch_mode must be endpoint, http_url, base64 or filesystem")
        source = _FETCH_MODES[mode]
        value = value[7:] if mode == "base64" and start.startswith("base64:") else value
    if source is Source.CONTENT:
        return {"source": source, "content": _decoded_content(value, place)}
    location = judged(HTTP_URL, value, place) if source is Source.URL else line_of(value, place)
    return {"source": source, "location": location}


def _s3_object(given: Any, field: str) -> S3Object:
    require(isinstance(given, dict), field, "s3 must be an object")
    _must_be_storable(given, "attachments")
    texts: dict[str, Any] = {key: _text(given, key, field) or None for key in S3_FIELDS if key != "key"}
    require(texts["bucket"] and isinstance(given.get("key"), str) and given["key"], field, "s3 needs bucket and key")
    is_known = texts["addressing"] in (None, "path", "virtual", "auto")
    require(is_known, field, "addressing must be path, virtual or auto")
    if texts["endpoint"]:
        texts["endpoint"] = judged(HTTP_URL, texts["endpoint"], f"{field}: endpoint")
    return S3Object(key=given["key"], **texts)


def _text(given: Mapping[str, object], key: str, field: str) -> str:
    """A text on one line, "" when there is none."""
    return "" if given.get(key) is None else line_of(given[key], f"{field}: {key}")


# --- messages -------------------------------------------------------------


def parse_message(
    fields: object,
    *,
    default_priority: int = 2,
    contents: Mapping[int, bytes] | None = None,
    message_id: str | None = None,
    new_id: Callable[[], str] = lambda: f"{random.getrandbits(128):032x}",  # nobody needs to be unable to guess it
) -> Message:
    """A submission judged and normalised, or Rejected with the reason. Its expires_ts may have passed.

    Read back from the queue, a payload comes with the `contents` that stored_form took out of it, and the
    `message_id` it was given at first.
    """
    if not isinstance(fields, dict):
        raise Rejected("invalid message: must be an object")
    get = fields.get
    client_id, account_id, batch_code, own_id = get("id"), get("account_id"), get("batch_code"), get("message_id")
    priority, deferred_ts, expires_ts = get("priority"), get("deferred_ts"), get("expires_ts")
    if client_id is None or client_id == "":
        raise Rejected("missing id")
    client_id = line_of(client_id, "id", most=LONGEST_ID)
    envelope = _envelope_of(fields)
    content, id_in_content = _content_of(fields, contents)
    own_id = None if own_id is None else _message_id(own_id, "message_id")
    for known_id in (id_in_content, message_id):  # whoever has the last word comes last
        own_id = own_id if known_id is None else known_id
    for name, when in () if contents is not None else (("deferred_ts", deferred_ts), ("expires_ts", expires_ts)):
        if when is not None and not (type(when) is int and 0 <= when <= LATEST_TIME):
            raise Rejected(f"invalid {name}: must be a time in whole Unix seconds, not milliseconds")
    return Message(  # by the order of its fields: naming them takes twice the time
        client_id,
        "default" if account_id is None else line_of(account_id, "account_id", most=LONGEST_ID),
        *envelope,
        f"{new_id()}@{envelope[0].address.rpartition('@')[2]}" if own_id is None else own_id,
        default_priority if priority is None else judged(PRIORITY, priority, "priority"),
        deferred_ts,
        expires_ts,
        None if batch_code is None else line_of(batch_code, "batch_code"),
        *content,
    )


Mailboxes: TypeAlias = tuple[Mailbox, ...]


def _envelope_of(fields: Mapping[str, Any]) -> tuple[Mailbox, Mailboxes, Mailboxes, Mailboxes, str]:
    """The fields of Message from sender to return_path."""
    given, name, return_path = fields.get("from"), fields.get("from_name"), fields.get("return_path")
    if given is None or (isinstance(given, str) and not given.strip()):
        raise Rejected("missing from")
    (sender,) = parse_mailboxes(given, "from", exactly_one=True)
    if name is not None:
        name = line_of(name, "from_name").strip()
        sender = Mailbox(sender.name or name, sender.address)
    if return_path is None or return_path == "":
        return_path = sender.address
    elif return_path == "<>":  # the null one, of mail that must not bounce (RFC 5321 4.5.5)
        return_path = ""
    else:
        return_path = parse_mailboxes(return_path, "return_path", exactly_one=True)[0].address
    to = parse_mailboxes(fields.get("to"), "to")
    if not to:
        raise Rejected("missing to")
    cc, bcc = parse_mailboxes(fields.get("cc"), "cc"), parse_mailboxes(fields.get("bcc"), "bcc")
    if cc or bcc or len(to) > 1:  # one mentioned again, its domain in other capitals, has its first spelling
        spellings: dict[tuple[str, str], str] = {}

        def alike(mailbox: Mailbox) -> Mailbox:
            local_part, _, domain = mailbox.address.rpartition("@")
            return Mailbox(mailbox.name, spellings.setdefault((local_part, domain.lower()), mailbox.address))

        to, cc, bcc = (tuple(map(alike, group)) for group in (to, cc, bcc))
    return sender, to, cc, bcc, return_path


def _content_of(fields: Mapping[str, Any], contents: Mapping[int, bytes] | None) -> tuple[tuple[Any, ...], str | None]:
    """The fields of Message from subject to unknown, and the Message-ID in them."""
    get = fields.get
    raw, raw_id = (contents or {}).get(RAW_CONTENT), None
    if raw is None and get("raw") is not None:
        raw, raw_id = _raw_message(get("raw"))
    if raw is not None:
        return ("", None, None, (), (), (), raw, _unknown_fields(fields, MESSAGE_FIELDS.keys() - BESIDE_RAW)), raw_id
    subject, given, attachments, reply_to = get("subject"), get("headers"), get("attachments"), get("reply_to")
    if subject is None:
        raise Rejected("missing subject")
    subject = line_of(subject if contents is None else subject.replace("\t", " "), "subject")  # once, tabs were taken
    text, html = _bodies_of(fields)
    reply_to = () if reply_to is None else parse_mailboxes(reply_to, "reply_to")
    headers, special = ((), {}) if given is None else _extra_headers(given)
    if "subject" in special:
        subject = _decoded(special["subject"], "headers")
    if "reply-to" in special:
        reply_to = parse_mailboxes(special["reply-to"], "headers") or reply_to
    own_id = _message_id(special["message-id"], "headers") if "message-id" in special else None
    attachments = () if attachments is None else _attachments(attachments, contents)
    unknown = () if fields.keys() <= MESSAGE_FIELDS.keys() else _unknown_fields(fields, MESSAGE_FIELDS.keys())
    return (subject, text, html, headers, reply_to, attachments, None, unknown), own_id


def _bodies_of(fields: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The text and the html of a message; at least one of them is there."""
    body, text, html, kind = fields.get("body"), fields.get("text"), fields.get("html"), fields.get("content_type")
    if isinstance(kind, str):
        kind = kind.strip().lower().removeprefix("text/")
    if isinstance(html, bool):
        kind, html = ("html" if html else kind), None
    if kind not in (None, "plain", "html"):
        raise Rejected("invalid content_type: must be plain or html")
    if body is not None and (html if kind == "html" else text) is not None:
        raise Rejected("invalid body: is given twice, as body and as " + ("html" if kind == "html" else "text"))
    if body is not None:
        text, html = (text, body) if kind == "html" else (body, html)
    if text is None and html is None:
        raise Rejected("missing body")
    for value, name in ((text, "text"), (html, "html")):
        if value is None:
            continue
        field = "body" if value is body else name
        if not isinstance(value, str):
            raise Rejected(f"invalid {field}: must be a string")
        if "\0" in value:
            raise Rejected(f"invalid {field}: must not have NUL characters")
        try:
            _ = value.isascii() or value.encode()
        except UnicodeEncodeError:
            raise Rejected(f"invalid {field}: is not valid Unicode (a lone surrogate)") from None
    return text, html


def _unknown_fields(fields: Mapping[str, object], known: Set[str]) -> tuple[str, ...]:
    """The fields that mean nothing in this message; they are kept, so they must be fit for that."""
    unknown = [name for name in fields if name not in known]
    for name in unknown:
        _must_be_storable({name: fields[name]}, name if name.isprintable() else repr(name))
    return tuple(name for name in unknown if fields[name] is not None)


# --- payloads -------------------------------------------------------------


def stored_form(fields: Mapping[str, Any], message: Message) -> tuple[str, dict[int, bytes]]:
    """The payload as the queue keeps it: JSON without what is null; and the contents taken out of it, by position:
    those of `message`, which was made of these fields."""
    contents: dict[int, bytes] = {}
    if message.raw is not None:
        contents[RAW_CONTENT] = message.raw
        fields = {key: value for key, value in fields.items() if key not in ("raw", "attachments")}
    elif message.attachments:
        kept = list(fields["attachments"])
        for i, attachment in enumerate(message.attachments):
            if attachment.source is Source.CONTENT:
                contents[i] = attachment.content
                as_path = {} if kept[i].get("storage_path") is None else {"fetch_mode": "base64"}
                bare = {key: value for key, value in kept[i].items() if key not in ("content", "storage_path")}
                kept[i] = bare | as_path
        fields = {**fields, "attachments": kept}
    if None in fields.values():
        fields = {key: value for key, value in fields.items() if value is not None}
    return as_json(fields), contents


def restored_fields(payload: Mapping[str, Any], contents: Mapping[int, bytes]) -> dict[str, object]:
    """The payload as it was submitted: the contents put back into it as base64."""
    fields = dict(payload)
    if RAW_CONTENT in contents:
        fields["raw"] = base64.b64encode(contents[RAW_CONTENT]).decode()
    elif contents:
        fields["attachments"] = kept = list(payload.get("attachments", ()))
        for i, content in contents.items():
            encoded = base64.b64encode(content).decode()
            if kept[i].get("fetch_mode") == "base64":
                kept[i] = {**kept[i], "storage_path": f"base64:{encoded}"}  # never empty, which would be no path
            else:
                kept[i] = {**kept[i], "content": encoded}
    return fields


def content_of(payload: str, contents: Mapping[int, bytes], priority: int) -> Message | None:
    """What a payload in its stored form says, for a comparison: a Message-ID that was made up is no difference.
    None: it cannot be understood any more."""
    try:
        fields = json.loads(payload)
        message = parse_message(fields, contents=contents, default_priority=priority, new_id=lambda: "")
    except (Rejected, ValueError):
        return None
    headers = sorted(((name.lower(), text) for name, text in message.headers), key=lambda header: header[0])
    raw = None if message.raw is None else with_crlf(message.raw)
    return message._replace(headers=tuple(headers), raw=raw, unknown=())


# ======================================================================
# DISPOSITION - what a reply is about; what becomes of a message, and of its lane, after an attempt
# ======================================================================
#
# Pure: the clock and the dice are arguments. A reply goes in for each recipient that was still to be served; out
# comes what is recorded. The codes are those of RFC 5321 4.2, the enhanced ones of RFC 3463. They mislead: a used-up
# quota may be a 550, and the end of a session a 451. So first comes what a reply is about.

# "login": a person must look, because the server does not want the account's mail.
DEFERRAL_REASONS = ("schedule", "retry", "in_doubt", "attachment", "connection", "login", "limit")


# ----- what a reply is about


class About(enum.StrEnum):
    """Whose trouble a refusal is."""

    ACCOUNT = "account"  # no mail of the account passes until somebody has done something, or a day is over
    SESSION = "session"  # the same mail passes over another connection, or a little later
    MESSAGE = "message"  # or one of its recipients: as the code says


class Verdict(NamedTuple):
    about: About
    cure: str = ""  # what a person can do about the account
    pause_s: float | None = None  # what the text asks for


CHECK_LOGIN = "check user, password and auth of the account"
CHECK_RELAY = "the server does not relay for this account: check host, port and user"
QUOTA = "the sending limit of the provider is used up: wait, or set limit_per_hour or limit_per_day below it"
BLOCKED = "the provider has blocked sending: look into its console, or ask its support"
CHECK_NAME = "the server does not accept the name or the address of this machine: set hostname, or ask its operator"
SAME_TO_ALL = "one message after the other is refused in the same words: ask the provider, or set account_replies"


class AccountRow(NamedTuple):
    """Replies that are about the account; all are regular expressions but the stages, and the cure."""

    stages: str  # first letters: connect, tls, ehlo, auth, mail, rcpt, data (and the end of it); "": any
    codes: str  # code, or code and enhanced code
    words: str  # anywhere in the text
    cure: str


# Microsoft 365: learn.microsoft.com, "Email non-delivery report and SMTP errors in Exchange Online", "Message storage
# and concurrent connection throttling for SMTP Authenticated Submission". Google: knowledge.workspace.google.com,
# "Gmail SMTP errors and codes" and "SMTP relay service error messages". docs/providers.md has more.
ACCOUNT_ROWS = (
    AccountRow("", "53[058]|526", "", CHECK_LOGIN),  # RFC 4954 6; Alibaba Cloud (534: Courier, header too large)
    AccountRow("cea", r"4\d\d", "too many (login attempts|auth failures)|too much fail", CHECK_LOGIN),  # Google, Oracle
    AccountRow(  # SendGrid, SMTP2GO, Orange: no login was made
        "mrd", "55[0134]",
        "unauthenticated senders|(authentication (is )?|authentification )requi(red|se)|please authenticate"
        "|authenticate (first|before)", CHECK_LOGIN,
    ),
    AccountRow(  # Microsoft 365
        "", r"5\d\d 5\.7\.(30|139)", "basic authentication|SmtpClientAuthentication|client submission", CHECK_LOGIN
    ),
    AccountRow(  # Postfix, Exchange, Mailgun, chasquid; only while nothing was accepted (see about)
        "r", r"[45][05]\d",
        "relay access denied|relaying denied|unable to relay|relay(ing)? (is )?not (allowed|permitted)", CHECK_RELAY,
    ),
    AccountRow(  # Google
        "mrd", r"550 5\.7\.[01]", "mail (relay|sending) denied|invalid credentials for relay", BLOCKED
    ),
    AccountRow(  # Microsoft 365: of the mailbox
        "", r"5\d\d 5\.(1\.90|2\.[02])",
        r"submission ?quota|daily limit for message recipients|STOREDRV\.Submission.{0,60}QuotaExceeded", QUOTA,
    ),
    AccountRow("", r"550 5\.7\.23[23]", "tenant", QUOTA),  # Microsoft 365
    AccountRow(  # Microsoft 365, Zoho
        "", r"55\d 5\.(1\.8|4\.6|7\.(5\d\d|6[0-4]\d|70[58]|750))",
        "bad outbound sender|outgoing blocked|unusual sending activity|spam abuse|banned send|permitted limits"
        "|tenant has exceeded|traffic not accepted|blocked from sending", BLOCKED,
    ),
    AccountRow("", r"4\d\d 4\.7\.([56]\d\d|8[5-9]\d)", "access denied, please try again", BLOCKED),  # Microsoft 365
    AccountRow("mrd", r"(421|550) [45]\.7\.(0|1|28)", "unusual rate of (unsolicited )?mail", BLOCKED),  # Google
    AccountRow(  # Amazon SES, Brevo, Mailgun
        "mrd", r"421|450|502|55\d",
        r"sending paused|not authorized to perform.{0,3}ses:|SMTP account is not (yet )?activated"
        r"|^(\S+ )?Domain \S+ is not allowed to send", BLOCKED,
    ),
    AccountRow(  # Google, iCloud
        "mrd", r"550 5\.(4\.5|7\.1)",
        "daily .{0,60}(sending|relay).{0,60}(limit|quota).{0,60} exceeded|exceeded your daily sending limit", QUOTA,
    ),
    AccountRow(
        "", r"4[2345]\d|55\d",
        "maximum credits exceeded|exceeded your messaging limits|over message quota"  # SendGrid, qmail, AuthSMTP
        "|throttling failure: daily message quota|ratelimit exceeded for mailbox"  # Amazon SES, Mail.ru
        "|too frequently sending|(sender|domain|ip|connection) frequency limited"  # Alibaba, QQ
        r"|\b(MI:(SFQ|STC)|RP:(QRC|RCL|TRC)|WM:BL[IU]|IB(504|607|11[0-3]))\b"  # NetEase, GoDaddy
        "|mail send limit exceeded|exceeded the max (emails|defers and failures) per hour"  # IONOS, cPanel
        "|number of allowed outgoing messages|message count exceeded"  # Plesk, Shellrent
        "|number (messages|recipients) per hour exceeded|max rcpt to daily limit"  # postfwd, Register.it
        r"|\b(daily|hourly|monthly) (message|sending|email|relay)? ?(limit|quota) (has been )?(exceeded|reached)"
        r"|\b(messages?|sending|outgoing) quota (exceeded|reached)|your daily relay quota"  # RedmaoMail, GoDaddy
        r"|err=(\w*limit_reached|plan_expired|usr_disabled)", QUOTA,  # Qboxmail; above: Emailit, Webcentral
    ),
    AccountRow(  # Postfix (at RCPT: smtpd_delay_reject), Exim, Google; DNS lists; Aruba
        "cemr", r"[45]\d\d",
        "helo command rejected|(helo|ehlo) argument|access denied, bad helo|client host rejected"
        r"|client host \[?\S+\]? blocked|cannot find your (reverse )?hostname|your ip.{0,40}(blocked|blacklist)"
        "|sospetto abuso", CHECK_NAME,
    ),
    AccountRow(  # only before RCPT, where it is about us
        "am", r"55\d", r"\b(account|mailbox|user)\b.{0,30}(suspended|disabled|blocked|terminated|locked)", BLOCKED
    ),
)  # fmt: skip
# A text that speaks of the recipient, or of greylisting, is about nothing else.
OF_THE_RECIPIENT = (
    r"(?i)recipient('s)? (has|is|mailbox|daily|hourly|per)\b|for this recipient|user you are trying"
    r"|mailbox (is )?full(?!; STOREDRV\.Submission)|over ?quota|greylist|STOREDRV\.Deliver"
)
# Words for an unknown recipient that come without an enhanced code.
UNKNOWN_RECIPIENT = (
    r"(?i)\b(no such|unknown|invalid|valid|no) (user|recipient|mailbox|address|person|local part|destination)|unrout"
    r"|\b(user|recipient|mailbox|address|account|host)\b.{0,60}(unknown|not found|exist|valid|inactive|disabled)"
    r"|mailbox.{0,60}available|recipient address rejected: (access denied|domain)|verif|our customer"
)
# Postfix, Exchange, GoDaddy, NetEase, Huawei, SparkPost, Emailit, Google, Stalwart, IONOS, msndr: whatever the code
OF_THE_SESSION = (
    r"(?i)too many messages in this connection|messages per session|IB510|MI:DMC|RP:DRC|submission rate"
    r"|too (much mail|many recipients) from|(sender thread|concurrent connections?) limit|number of sessions exceeds"
    r"|too many (AUTH commands|new TLS sessions|sessions|connections)|sending rate exceeded|per second limit"
    r"|peak smtp relay limit|rate limit (exceeded|reached)|try again in \d+ seconds"
)
NAMED_PAUSE = r"(?i)(?:again|wait|retry)\D{0,20}?0*([1-9]\d{0,3}) ?(s|m)"
LONGEST_NAMED_PAUSE_S = 3600.0
BEFORE_MAIL = (Stage.CONNECT, Stage.TLS, Stage.EHLO, Stage.AUTH)


def about(reply: Reply, account: Account, *, relays: bool) -> Verdict:
    """Whose trouble a refusal is. Before MAIL it is not about a message, whatever it says.

    `relays`: the account has had mail accepted; then "relaying denied" is about the recipient.
    """
    told, code = reply.cause is Cause.SERVER, f"{reply.code} {reply.enhanced_code or ''} "
    stage = "d" if reply.stage is Stage.END_OF_DATA else reply.stage[0]
    found = re.search(NAMED_PAUSE, reply.text) if told else None
    pause_s = min(float(found[1]) * (60 if found[2] in "mM" else 1), LONGEST_NAMED_PAUSE_S) if found else None
    for code_, enhanced_code, words in account.account_replies if told else ():
        if code_ == reply.code and enhanced_code in (None, reply.enhanced_code) and words.lower() in reply.text.lower():
            return Verdict(About.ACCOUNT, BLOCKED, pause_s)
    if told and not re.search(OF_THE_RECIPIENT, reply.text):
        for one in ACCOUNT_ROWS:
            matches = stage in (one.stages or stage) and re.match(f"({one.codes}) ", code)
            if matches and re.search(f"(?i){one.words}", reply.text) and not (relays and one.cure == CHECK_RELAY):
                return Verdict(About.ACCOUNT, one.cure, pause_s)
        busy = reply.code in (421, 432) or re.match(r"... [45]\.(3\.2|4\.5) ", code)
        not_now = stage == "m" and reply.transient and not re.match(r"... 4\.[126]\.", code)
        if busy or not_now or re.search(OF_THE_SESSION, reply.text):
            return Verdict(About.SESSION, pause_s=pause_s)
    if reply.stage is Stage.AUTH and (reply.permanent or reply.cause is Cause.LOCAL):
        return Verdict(About.ACCOUNT, CHECK_LOGIN)
    return Verdict(About.SESSION if reply.stage in BEFORE_MAIL else About.MESSAGE)


def signature(reply: Reply) -> tuple[object, ...] | None:
    """What is the same in a refusal that is said to one message after the other; None: it says nothing about the next.

    That is a refusal at MAIL or the end of data, or one for good at RCPT that is not about the recipient.
    """
    code = reply.enhanced_code or ""
    unknown = re.match(r"5\.[12]\.", code) or re.search(UNKNOWN_RECIPIENT, reply.text)
    of_the_recipient = reply.stage is Stage.RCPT and (reply.transient or unknown)
    if of_the_recipient or reply.cause is not Cause.SERVER or re.search(OF_THE_RECIPIENT, reply.text):
        return None
    text = re.sub(r'<[^<>]*>|"[^"]*"|\S*[\d@]\S*', "", reply.text)  # without what differs from one to the next
    return reply.stage, reply.code, code, " ".join(text.split())


# ----- what becomes of the message


class LaneSignal(enum.StrEnum):
    """What an attempt tells about the account's server, not about the message."""

    NONE = "none"  # nothing: the server was not asked, or the connection broke
    UP = "up"  # it works with us
    FEWER = "fewer"  # one connection less will do
    COOL = "cool"  # it does not work: try it again later
    ACCOUNT = "account"  # it does not want the account's mail: a person must look


class Disposition(NamedTuple):
    """What to record of an attempt. QUEUED means: go on at once with the recipients left."""

    status: Status
    lane: LaneSignal
    counted: bool  # one more transaction tried
    slot_used: bool  # a server has (or may have) the message: it counts for the rate limits
    error: str | None = None
    deferred_ts: int | None = None  # None with DEFERRED: until the lane's next try
    recipients: dict[str, RecipientOutcome] | None = None  # every recipient tried so far
    reason: str = ""  # of a deferral: one of DEFERRAL_REASONS
    verdict: Verdict = Verdict(About.MESSAGE)  # the session is not used again unless it is about the message


SENT_TO_ALL = Disposition(Status.SENT, LaneSignal.UP, counted=True, slot_used=True)
IN_DOUBT = "in doubt: "  # begins the text of what has no answer after its end
UNTRIED = RecipientOutcome(Status.DEFERRED, 451, "not tried yet")  # while others of the message have an outcome
TOO_MANY_RECIPIENTS = r"452 |... [45]\.5\.3$|552 $"  # RFC 5321 4.5.3.1.10: old servers say 552


def spoken(reply: Reply) -> str:
    """A reply as an error text: the server's words with their codes, or only ours."""
    text = reply.words if reply.cause is Cause.SERVER else reply.text
    return f"{IN_DOUBT}{text}" if reply.in_doubt else text


def settle(
    claim: Claim,
    attempt: Attempt,
    account: Account,
    now: float,
    jitter: float,
    untried: Sequence[str] = (),
    *,
    relays: bool = True,
    others: bool = False,
    by_code: bool = False,
) -> Disposition:
    """What becomes of a message after this attempt, whatever happened in it.

    The `untried` recipients are left for another transaction, to follow at once. Where some recipients
    have an outcome, all have one: whatever ends the message then, nobody is missing in it. `others`: the
    account has other sessions. `by_code`: what is said of the session is meant for the message.
    """
    replies, failure = attempt.replies, attempt.first_failure
    if failure is None and replies and not (untried or claim.recipients):  # as nearly all mail goes
        return SENT_TO_ALL
    retry_at = _retry_at(claim, account, now, jitter)
    if failure is not None and failure.stage in (Stage.ATTACHMENT, Stage.COMPOSITION):
        incomplete = untouched(claim)._replace(counted=True, error=spoken(failure))
        if failure.permanent or retry_at is None:
            return given_up(incomplete, spoken(failure))
        retry_at = max(retry_at, math.ceil(now + (failure.retry_after_s or 0)))
        return incomplete._replace(status=Status.DEFERRED, deferred_ts=retry_at, reason="attachment")
    relays = relays or any(reply.accepted for reply in replies.values())
    refusals = {one: reply for one, reply in replies.items() if not reply.accepted}
    verdicts = {reply: about(reply, account, relays=relays) for reply in set(refusals.values())}
    said = {one: verdicts[reply] for one, reply in refusals.items()}
    if by_code:
        said = {one: Verdict(About.MESSAGE) if it.about is About.SESSION else it for one, it in said.items()}
    verdict = min(said.values(), key=lambda it: list(About).index(it.about), default=Verdict(About.MESSAGE))
    lost = [one for one in said if replies[one].cause is Cause.LOST and not replies[one].in_doubt]
    unheard = {one for one, it in said.items() if it.about is not About.MESSAGE or one in lost}
    if nobody := 0 < len(unheard) == len(replies):
        if verdict.about is not About.ACCOUNT and (attempt.reused or (others and verdict.about is About.SESSION)):
            lane = LaneSignal.NONE if attempt.reused else LaneSignal.FEWER
            return untouched(claim)._replace(lane=lane, verdict=verdict)
        if verdict.about is About.MESSAGE:  # lost by a new connection: that counts
            unheard = set()
    settled = _settle_recipients(claim, attempt, account, retry_at, [*unheard, *untried])
    if verdict.about is About.ACCOUNT or (nobody and verdict.about is About.SESSION):
        blamed = next(replies[one] for one, it in said.items() if it is verdict)
        if nobody and ("" in replies or not claim.recipients):
            return held(claim, blamed, verdict)
        return held(claim, blamed, verdict)._replace(recipients=settled.recipients, slot_used=settled.slot_used)
    return settled._replace(verdict=verdict)


def untouched(claim: Claim) -> Disposition:
    """Nothing has become of the message: it is as ready as before."""
    return Disposition(Status.QUEUED, LaneSignal.NONE, counted=False, slot_used=False, recipients=claim.recipients)


def held(claim: Claim, reply: Reply, verdict: Verdict) -> Disposition:
    """Nothing has become of the message, and it waits for the lane's next try."""
    refused = verdict.about is About.ACCOUNT
    lane, reason = (LaneSignal.ACCOUNT, "login") if refused else (LaneSignal.COOL, "connection")
    waits = untouched(claim)._replace(status=Status.DEFERRED, lane=lane, reason=reason)
    return waits._replace(error=spoken(reply), verdict=verdict)


def given_up(disposition: Disposition, why: str) -> Disposition:
    """The same for good: sent when a server has it for any of its recipients, else an error.

    Recipients who still waited have an error too; the text of one who was not tried is `why`. What is in doubt stays
    so in the error.
    """
    outcomes = dict(disposition.recipients or {})
    for address, outcome in outcomes.items():
        if outcome.status is Status.DEFERRED:
            text = why if outcome == UNTRIED else outcome.text
            outcomes[address] = RecipientOutcome(Status.ERROR, outcome.code, text)
    refused = [outcome.text for outcome in outcomes.values() if outcome.status is Status.ERROR]
    in_doubt = next((text for text in refused if text.startswith(IN_DOUBT)), "")
    status, error = Status.ERROR, cast(str | None, why)
    if in_doubt and IN_DOUBT not in why:
        error = f"{why}; last: {in_doubt}"
    if len(refused) < len(outcomes):
        what = f"refused or {in_doubt}" if in_doubt else f"refused: {refused[0]}" if refused else ""
        status, error = Status.SENT, f"{len(refused)} of {len(outcomes)} recipients {what}" if refused else None
    recipients = outcomes if refused else None
    return disposition._replace(status=status, error=error, deferred_ts=None, recipients=recipients, reason="")


def _settle_recipients(
    claim: Claim, attempt: Attempt, account: Account, retry_at: int | None, left: list[str]
) -> Disposition:
    """Each recipient has a reply of its own but those `left` for another transaction; the message is done when every
    one is final. Who was refused for now, while others were accepted, is asked once more at once."""
    replies = attempt.replies
    accepted = any(reply.accepted for reply in replies.values())
    in_doubt = any(reply.in_doubt for reply in replies.values())
    lane = LaneSignal.UP if any(reply.cause is Cause.SERVER for reply in replies.values()) else LaneSignal.NONE
    outcomes = dict(claim.recipients or {})
    for address, reply in replies.items():
        too_many = re.match(TOO_MANY_RECIPIENTS, f"{reply.code} {reply.enhanced_code or ''}")
        again = accepted and reply.stage is Stage.RCPT and (reply.transient or too_many)
        if too_many if again else address in left:
            left.append(address)
            continue
        left += [address] if again else []
        for_good = account.in_doubt == "error" if reply.in_doubt else reply.permanent
        status = Status.ERROR if for_good else Status.DEFERRED
        outcomes[address] = RecipientOutcome(Status.SENT if reply.accepted else status, reply.code, spoken(reply))
    for address in left:
        outcomes.setdefault(address, UNTRIED)
    disposition = Disposition(Status.QUEUED, lane, counted=False, slot_used=accepted or in_doubt, recipients=outcomes)
    if left:
        return disposition
    disposition = disposition._replace(counted=True)
    refused = [outcome for outcome in outcomes.values() if outcome.status is not Status.SENT]
    refused.sort(key=lambda outcome: (not outcome.text.startswith(IN_DOUBT), outcome.status is Status.ERROR))
    if retry_at is not None and any(outcome.status is Status.DEFERRED for outcome in refused):
        reason = "in_doubt" if in_doubt else "retry"
        return disposition._replace(status=Status.DEFERRED, error=refused[0].text, deferred_ts=retry_at, reason=reason)
    return given_up(disposition, refused[0].text if refused else "")


def _retry_at(claim: Claim, account: Account, now: float, jitter: float) -> int | None:
    """When the schedule, its last pause repeated, has the next attempt, spread by a fifth either way; None: there is
    none, since the message is too old or was tried too often. `jitter` lies between -1 and 1."""
    attempts, delays = claim.attempts + 1, account.retry_delays
    if 0 < account.max_retries < attempts or now - claim.ready_at >= account.max_age_seconds:
        return None
    return math.ceil(now + delays[min(attempts, len(delays)) - 1] * (1 + 0.2 * jitter))


# ======================================================================
# RATE LIMITS - how many messages an account may still send, and when
# ======================================================================
#
# Sliding windows, counted in buckets: a bucket holds what was sent up to its end,
# and leaves a window only when that end lies a whole window back. So no 60 s, hour
# or day ever sees more than its limit, and a message waits at most one grain longer
# than it had to. Pure; `now` is any clock that does not run backwards for long.


class _Window:
    """The messages counted in the last `length_s` seconds."""

    def __init__(self, length_s: int, grain_s: int) -> None:
        self._length_s, self._grain_s = length_s, grain_s
        self._buckets: deque[tuple[int, int]] = deque()  # (end, messages), in order of their ends
        self._counted = 0

    def add(self, moment: float, n: int) -> None:
        if self._buckets and moment <= self._buckets[-1][0]:  # the same bucket, or a clock that went back
            end, before = self._buckets[-1]
            self._buckets[-1] = end, before + n
        else:
            self.counted(moment)
            self._buckets.append((self._end_of_grain(moment), n))
        self._counted += n

    def counted(self, now: float) -> int:
        while self._buckets and self._buckets[0][0] + self._length_s <= now:
            self._counted -= self._buckets.popleft()[1]
        return self._counted

    def opens_at(self, now: float, held: int, limit: int, n: int) -> float:
        """When there is room for n more beside those counted and held."""
        too_many = self.counted(now) + held - limit + n
        if too_many <= 0:
            return now
        for end, n in self._buckets:
            too_many -= n
            if too_many <= 0:
                return end + self._length_s
        return self._end_of_grain(now) + self._length_s

    def _end_of_grain(self, moment: float) -> int:
        return math.ceil(moment / self._grain_s) * self._grain_s


class SendWindows:
    """How many messages (or recipients: whatever is counted) one account may still send, and when the next may go.

    A message is held before its transaction and afterwards either counted or given back;
    held ones take room, so that no number of connections exceeds a limit. `counted` is what
    was sent before: (until, n) are n messages, the last of them not later than `until`.
    All windows are kept, limited or not: `limits` that come later find their history.
    """

    def __init__(self, limits: Mapping[str, int], counted: Iterable[tuple[float, int]] = ()) -> None:
        self.held = 0  # messages whose transactions are in progress
        self.limits = limits  # by the names of windows, such as {"minute": 30}
        self.recount(counted)

    def recount(self, counted: Iterable[tuple[float, int]]) -> None:
        """Begin again with what was sent before; what is held stays held."""
        self._windows = {"minute": _Window(60, 1), "hour": _Window(3_600, 60), "day": _Window(86_400, 60)}
        for until, n in sorted(counted):
            self.held += n
            self.count(until, n)

    def left(self, now: float) -> dict[str, int]:
        """What is left of each limit there is, by the name of its window."""
        used = {name: self._windows[name].counted(now) + self.held for name in self.limits}
        return {name: max(0, limit - used[name]) for name, limit in self.limits.items()}

    def room(self, now: float) -> int:
        """The number of messages that may start now."""
        return min(self.left(now).values(), default=sys.maxsize)

    def opens_at(self, now: float, n: int = 1) -> float:
        """The earliest moment with room for n, as far as is known: held messages as if sent now."""
        moments = (self._windows[name].opens_at(now, self.held, limit, n) for name, limit in self.limits.items())
        return max(moments, default=now)

    def give_back(self, n: int = 1) -> None:
        """These held messages were not sent."""
        if n > self.held:
            raise ValueError(f"{n} messages given back, but {self.held} held")
        self.held -= n

    def count(self, now: float, n: int = 1) -> None:
        """These held messages were sent, not later than now."""
        self.give_back(n)
        for window in self._windows.values() if n else ():
            window.add(now, n)


# ======================================================================
# COMPOSITION - message and fetched parts -> RFC 5322 bytes
# ======================================================================
#
# What SUBMISSION accepted is composed without an exception, into the same bytes on every attempt. The bytes
# are written directly: the email package of the standard library takes forty times as long for them (it is
# what the tests read them with). Everything but a UTF-8 local part of an address (RFC 6532) is ASCII, in lines
# that any server takes: header texts as encoded words (RFC 2047), file names by RFC 2231, bodies by RFC 2045.
# Dot-stuffing belongs to the transport.

LONGEST_LINE = 990  # octets without CRLF; RFC 5322 2.1.1 allows 998, but sendmail and Haraka break lines after 990
SHORT_LINE = 78  # octets that a header line should not exceed; 76 with encoded words (RFC 2047 2)
LONGEST_WORD = 900  # octets of a header's word that still fits a line beside the field's name
BASE64_BLOCK = 57 * 1000  # octets encoded at a time; 57 make a line of 76 characters
TEXT_BLOCK = 65_536  # octets of a text encoded at a time, and the rest of the last line
DATE_FORMAT = "%a, %d %b %Y %H:%M:%S +0000"  # RFC 5322 3.3; in English, as the daemon sets no locale


class Entity(NamedTuple):
    """A MIME entity (RFC 2045 2.4): its header lines, and its body in pieces, to be taken once.

    Large bodies are encoded piece by piece, as they are taken: no second copy is in memory, and
    no single step in a thread keeps the event loop waiting for long.
    """

    header: list[str]
    body: Iterable[bytes]


def compose(message: Message, parts: Sequence[Attachment], *, date: float) -> bytes:
    """The message as it goes onto the wire, with CRLF line ends; its Date is `date` (Unix seconds), or a later time
    that it was scheduled for."""
    date = max(date, message.deferred_ts or 0)
    if message.raw is not None:
        return _completed(message, message.raw, date)
    entity = _message_body(message, parts)
    header = "\r\n".join([*_message_header(message, date), *entity.header])
    base64_octets = sum(len(part.content) for part in parts) * 11 // 8  # rather more
    composed = io.BytesIO(bytes(base64_octets))  # to grow is to copy; its getvalue() is no copy
    composed.write(f"{header}\r\n\r\n".encode())
    composed.writelines(entity.body)
    composed.truncate()
    return composed.getvalue()


# Most mail: from one mailbox to another, with plain words on short lines. What is given can stand as it is.
_USUAL_FIELDS = MESSAGE_FIELDS.keys() - {*BESIDE_RAW, "cc", "bcc", "return_path", "raw"} | {"subject", "body", "text"}
_UNQUOTED_MAILBOX = re.compile(rf"((?:[\w'&\-]+ )+<)?({PLAIN_ADDRESS})(?(1)>)", re.ASCII)
_USUAL_LENGTH = 66  # characters of a mailbox or subject


def compose_usual(fields: Mapping[str, Any], message_id: str, date: float) -> tuple[str, str, bytes] | None:
    """Sender, recipient, and what compose() makes of a stored payload, in a third of the time; None: it has more than
    most have."""
    sender, to, subject = fields["from"], fields["to"], fields.get("subject")
    to = to[0] if len(to) == 1 else ""
    if not (message_id and subject and fields.keys() <= _USUAL_FIELDS):
        return None
    from_, to_ = _UNQUOTED_MAILBOX.fullmatch(sender), _UNQUOTED_MAILBOX.fullmatch(to)
    are_short = max(len(sender), len(to), len(subject)) <= _USUAL_LENGTH
    if not (from_ and to_ and are_short and _SHORT_TEXT.fullmatch(subject) and "=?" not in subject):
        return None
    date = max(date, fields.get("deferred_ts", 0))
    header, body = _text_entity(fields.get("body", fields.get("text")), "plain")
    lines = (
        f"From: {sender}", f"To: {to}", f"Subject: {subject}", _date_header(date), f"Message-ID: <{message_id}>",
        "MIME-Version: 1.0", *header, "\r\n",
    )  # fmt: skip
    return from_[2], to_[2], b"".join(["\r\n".join(lines).encode(), *body])


def _completed(message: Message, raw: bytes, date: float) -> bytes:
    """A complete message without its Bcc, with what it lacks at the end of its header."""
    fields, body = split_raw(raw)
    kept = [field for field in fields if field_name(field) not in (b"bcc", b"resent-bcc")]
    names = {field_name(field) for field in kept}
    added = [_extra_header(name, value) for name, value in message.headers]
    if b"date" not in names:
        added.append(_date_header(date))
    if b"message-id" not in names and message.message_id:
        added.append(f"Message-ID: <{message.message_id}>")
    return b"\r\n".join([*kept, *(line.encode() for line in added), b"", body])


def has_utf8_header(content: bytes) -> bool:
    """True when the header of a composed message is not ASCII, but UTF-8 (RFC 6532)."""
    header = content[: content.find(b"\r\n\r\n")]
    return not header.isascii() and "\ufffd" not in header.decode("utf-8", "replace")


def redirect(message: Message, address: str) -> Message:
    """The same message to that address only, its recipients told in X-Original-To."""
    headers = (*message.headers, ("X-Original-To", ", ".join(map(addr_spec, message.recipients))))
    return message._replace(to=(Mailbox("", address),), cc=(), bcc=(), headers=headers)


# --- header ---------------------------------------------------------------

_SHORT_TEXT = re.compile(r"[!-~]+(?: [!-~]+)*")
_NEEDS_ENCODING = re.compile(rf"[^ -~]+|=\?|  |\A | \Z|(?<![!-~])[!-~]{{{LONGEST_WORD}}}")
_WORD = re.compile(" +[^ ]+")
_PHRASE = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\-]+(?: [A-Za-z0-9!#$%&'*+/=?^_`{|}~\-]+)*")
_PIECES_OF_NAME = re.compile(r"\S(?:.{0,58}\S)?(?= |\Z)|\S+")  # whole words, of 60 characters together


def _message_header(message: Message, date: float) -> Iterator[str]:
    """The header lines of the message itself; its extra headers replace what would be generated."""
    groups = {"From": (message.sender,), "To": message.to, "Cc": message.cc, "Reply-To": message.reply_to}
    for name, mailboxes in groups.items():
        if mailboxes:
            yield _address_header(name, mailboxes)
    yield _text_header("Subject", message.subject)
    if not any(name.lower() == "date" for name, _ in message.headers):
        yield _date_header(date)
    if message.message_id:
        yield f"Message-ID: <{message.message_id}>"
    yield "MIME-Version: 1.0"
    for name, value in message.headers:
        yield _extra_header(name, value)


@functools.lru_cache(maxsize=64)  # many messages come in a second
def _date_header(date: float) -> str:
    return time.strftime(f"Date: {DATE_FORMAT}", time.gmtime(date))


def _extra_header(name: str, value: str) -> str:
    """A header of the client's: what is ASCII is the client's to get right, and only folded."""
    words = _WORD.findall(f" {value}")
    if value.isascii() and max(map(len, words), default=0) < LONGEST_WORD:
        return _folded(name, words)
    return _text_header(name, value)


def _text_header(name: str, text: str) -> str:
    """A header of free text; what is not plain ASCII, from its first to its last word, is encoded."""
    if len(name) + 2 + len(text) <= SHORT_LINE and _SHORT_TEXT.fullmatch(text) and "=?" not in text:
        return f"{name}: {text}"
    start = end = len(text)
    strange = [found.span() for found in _NEEDS_ENCODING.finditer(text)]
    if strange:
        start = text.rfind(" ", 0, strange[0][0]) + 1
        last = max(stop for _, stop in strange)
        end = text.find(" ", last) if " " in text[last:] else len(text)
    encoded = _encoded_words(text[start:end], beside=len(name) + 1)
    return _folded(name, [*_WORD.findall(f" {text[:start]}"), *encoded, *_WORD.findall(text[end:])])


def _address_header(name: str, mailboxes: Sequence[Mailbox]) -> str:
    """A header of mailboxes; it may be folded before each address, and within a name between encoded words or
    quoted-strings (within one of these readers do not look for a fold)."""
    words: list[str] = []
    for display_name, address in mailboxes:
        if words:
            words[-1] += ","
        address = addr_spec(address)
        if not display_name:
            words.append(f" {address}")
        elif len(display_name) > LONGEST_WORD // 2 or not _SHORT_TEXT.fullmatch(display_name) or "=?" in display_name:
            words += [*_encoded_words(display_name, beside=len("Reply-To:")), f" <{address}>"]
        elif len(display_name) <= 60 and _PHRASE.fullmatch(display_name):
            words += [f" {display_name}", f" <{address}>"]
        else:
            quoted = display_name.replace("\\", r"\\").replace('"', r"\"")
            words += [*(f' "{piece}"' for piece in _PIECES_OF_NAME.findall(quoted)), f" <{address}>"]
    return _folded(name, words)


def _encoded_words(text: str, *, beside: int) -> Iterator[str]:
    """The text as encoded words (RFC 2047), cut at a space where that will do, and never within a character.

    45 octets take 72 characters (75 at most, RFC 2047 2); the first word leaves room for so many beside it. Some
    readers decode what several words hold as one text: only the last of them may end with the padding of base64.
    """
    octets = text.encode()
    start, room = 0, max(9, min(45, (SHORT_LINE - 2 - len(" =?utf-8?b??=") - beside) // 4 * 3))
    while start < len(octets):
        cuts = [cut for cut in range(start + room, start, -3) if cut < len(octets) and octets[cut] & 0xC0 != 0x80]
        at_space = [cut for cut in cuts if b" " in octets[cut - 1 : cut + 1]]
        encoding, end = "b", len(octets) if len(octets) - start <= room else [*at_space, *cuts, 0][0]
        if end:
            encoded = binascii.b2a_base64(octets[start:end], newline=False).decode()
        else:  # all the cuts are in the middle of characters: one character less, and they are not
            encoding, end = "q", next(at for at in range(start + 1, start + 5) if octets[at] & 0xC0 != 0x80)
            encoded = "".join(f"={octet:02X}" for octet in octets[start:end])
        yield f" =?utf-8?{encoding}?{encoded}?="
        start, room = end, 45


def _folded(name: str, words: Sequence[str]) -> str:
    """A header line, folded before words that make it too long; each word begins with its space.

    The first word stays beside the name: some readers take the fold for a part of the text.
    """
    first, *others = words or [""]
    lines = [f"{name}:{first}"]
    for word in others:
        if len(lines[-1]) + len(word) > SHORT_LINE - 2:
            lines.append(word)
        else:
            lines[-1] += word
    return "\r\n".join(lines)


# --- body -----------------------------------------------------------------


def _message_body(message: Message, parts: Sequence[Attachment]) -> Entity:
    """text and html are alternatives, inline parts belong to the html, attachments come after both."""
    texts = [_text_entity(message.text, "plain")] if message.text is not None else []
    if message.html is not None:
        texts.append(_text_entity(message.html, "html"))
    if len(texts) == 1 and not parts:
        return texts[0]
    # The boundary stands in no part, as it is made from all that is not encoded: the same one on every attempt.
    digest = hashlib.blake2b(message.message_id.encode(), digest_size=12)
    for text in (message.text, message.html):
        digest.update(f"{text}\0".encode())
    for part in parts:
        if _content_type_of(part)[1] == "message/rfc822":
            digest.update(part.content)
    boundary = digest.hexdigest()
    related = [_attached(part) for part in parts if part.inline and message.html is not None]
    attached = [_attached(part) for part in parts if not part.inline or message.html is None]
    if related:
        texts[-1] = _multipart("related", [texts[-1], *related], boundary)
    body = _multipart("alternative", texts, boundary) if len(texts) > 1 else texts[0]
    return _multipart("mixed", [body, *attached], boundary) if attached else body


def _multipart(subtype: str, entities: Sequence[Entity], boundary: str) -> Entity:
    """Entities in one (RFC 2046 5.1), the levels told apart by their initial in the boundary."""
    line = f"=_{subtype[0]}{boundary}"
    header = [f'Content-Type: multipart/{subtype}; boundary="{line}"']
    if subtype == "related":  # RFC 2387 3.1
        header = ['Content-Type: multipart/related; type="text/html";', f' boundary="{line}"']
    pieces: list[Iterable[bytes]] = []
    for entity in entities:
        pieces += ["\r\n".join((f"--{line}", *entity.header, "\r\n")).encode()], entity.body, [b"\r\n"]
    return Entity(header, itertools.chain(*pieces, [f"--{line}--\r\n".encode()]))


# b2a_qp counts a blank at the end of a line as one octet, and writes three.
_BLANK_BEYOND_76 = re.compile(rb"=(?=(?:20|09)\r)(?<=[^\n]{75})")


def _text_entity(text: str, subtype: str) -> Entity:
    """Text in complete lines, in the plainest encoding that brings it over unchanged."""
    octets = with_crlf(text.encode())
    octets += b"" if octets.endswith(b"\r\n") else b"\r\n"
    to_quote = 0 if octets.isascii() else len(octets) - len(octets.translate(None, bytes(range(0x80, 0x100))))
    encoding, body = "7bit", cast(Iterable[bytes], (octets,))
    if to_quote * 6 >= len(octets):  # each grows threefold: below a sixth that is less than base64's third
        encoding, body = "base64", _base64_lines(octets)
    elif to_quote or not has_short_lines(octets):
        encoding, pieces = "quoted-printable", _complete_lines(octets)
        body = (_BLANK_BEYOND_76.sub(b"=\r\n=", binascii.b2a_qp(lines)) for lines in pieces)
    header = [f'Content-Type: text/{subtype}; charset="utf-8"', f"Content-Transfer-Encoding: {encoding}"]
    return Entity(header, body)


def has_short_lines(octets: bytes) -> bool:
    """True when no line is longer than every server takes; lines end with CRLF."""
    pieces = _complete_lines(octets) if len(octets) > LONGEST_LINE else ()
    return all(max(map(len, lines.split(b"\r\n"))) <= LONGEST_LINE for lines in pieces)


def _complete_lines(octets: bytes) -> Iterator[bytes]:
    """The same in pieces of complete lines; lines end with CRLF."""
    start = 0
    while start < len(octets):
        end = octets.find(b"\r\n", start + TEXT_BLOCK) + 2
        end = end if end > 1 else len(octets)
        yield octets[start:end]
        start = end


def _base64_lines(octets: bytes) -> Iterator[bytes]:
    """Base64 in lines of 76 characters (RFC 2045 6.8), every piece a number of complete lines."""
    for start in range(0, len(octets), BASE64_BLOCK):
        encoded = binascii.b2a_base64(octets[start : start + BASE64_BLOCK], newline=False)
        lines = [encoded[at : at + 76] for at in range(0, len(encoded), 76)]
        yield b"\r\n".join(lines) + b"\r\n"


# --- attachments ----------------------------------------------------------

_NOT_IN_FILE_NAMES = re.compile(r"[/\\\x00-\x1f\x7f-\x9f]")
_PLAIN_FILE_NAME = re.compile(rf"(?!.*=\?)[ !#-\[\]-~]{{1,{LONGEST_WORD}}}")
_HAS_NAME = re.compile(r";\s*name\*?(?:0\*?)?=", re.IGNORECASE)


def _attached(part: Attachment) -> Entity:
    """An attachment in base64; only a message stays as it is, and must not be encoded (RFC 2046 5.2.1)."""
    content_type, media_type = _content_type_of(part)
    encoding, body = "base64", cast(Iterable[bytes], _base64_lines(part.content))
    octets = with_crlf(part.content) if media_type == "message/rfc822" else b""
    if HEADER_FIELD.match(octets) and octets.isascii() and b"\0" not in octets and has_short_lines(octets):
        content_type, encoding, body = media_type, "7bit", [octets]
    elif media_type.startswith(("message/", "multipart/")):
        content_type = "application/octet-stream"
    disposition = "inline" if part.inline else "attachment"
    file_name, name = _file_name(part.filename)
    header = [
        f"Content-Type: {content_type}{'' if _HAS_NAME.search(content_type) else name}",
        f"Content-Transfer-Encoding: {encoding}",
        f"Content-Disposition: {disposition};\r\n {file_name}",
    ]
    if part.content_id:
        header.append(f"Content-ID: <{part.content_id}>")
    return Entity(header, body)


def _content_type_of(part: Attachment) -> tuple[str, str]:
    """What the client says, else what the source said (which may be anything); and its type/subtype only."""
    content_type = part.content_type or ""
    if not (CONTENT_TYPE.fullmatch(content_type) and len(content_type) < 500):
        content_type = "application/octet-stream"
    return content_type, content_type.partition(";")[0].strip().lower()


def _file_name(name: str) -> tuple[str, str]:
    """The filename parameter, without path separators, by RFC 2231 where it must be; then also a name in encoded words,
    which is for readers older than that."""
    safe = _NOT_IN_FILE_NAMES.sub("_", name).strip() or "attachment"
    if _PLAIN_FILE_NAME.fullmatch(safe):
        return f'filename="{safe}"', ""  # never folded itself: some readers keep the line end
    for_old_readers = ';\r\n name="{}"'.format("\r\n".join(_encoded_words(safe, beside=len("name="))).lstrip())
    encoded = urllib.parse.quote(safe, safe="", errors="replace")
    if len(encoded) <= 600:  # in one piece, as all readers know it
        return f"filename*=utf-8''{encoded}", for_old_readers
    pieces = re.findall(r"(?:%..|[^%]){1,60}", encoded)
    pieces[0] = f"utf-8''{pieces[0]}"
    return ";\r\n ".join(f"filename*{i}*={piece}" for i, piece in enumerate(pieces)), for_old_readers


# ======================================================================
# THREADS AND CLOCK - the one border to threads; the wall clock and durations
# ======================================================================
#
# Whatever blocks crosses into a thread here and nowhere else. A daemon has two pools: one for
# what waits for others (the network, files that may lie on a server), large, because a call that
# hangs keeps its thread; one for computing. Beside them there are only the threads of QUEUE FILE.
# A call may be done before it is awaited: then awaiting it does not let others run. Threads that
# fetch, slots and memory are given out among the lanes by Shares.


USUAL_SWITCH_S = 0.005  # after so long a thread hands the interpreter over: often is dear
COMPUTING_SWITCH_S = 0.001
KEPT_SHARE = 4  # one in so many slots, or bytes, is kept for lanes that have none


@dataclass(eq=False, repr=False)
class InThread:
    """Awaits a blocking call that runs in a thread of the pool (None: asyncio's own), which it keeps until it ends,
    even when the waiter is gone. While a call computes, threads change so often that the event loop gets its turn."""

    pool: concurrent.futures.Executor | None = None
    computes: bool = False
    running: int = 0

    def __call__(self, call: Callable[[], T], /) -> Awaitable[T]:
        future = asyncio.get_running_loop().run_in_executor(self.pool, call)
        if self.computes:
            self.running += 1
            sys.setswitchinterval(COMPUTING_SWITCH_S)
            future.add_done_callback(self._done)
        return future

    def _done(self, _: asyncio.Future[Any]) -> None:
        self.running -= 1
        if not self.running:
            sys.setswitchinterval(USUAL_SWITCH_S)


@dataclass(eq=False, repr=False)
class Shares:
    """So many slots, or bytes, for all lanes together, given out in the order of asking.

    A lane that has some leaves a part of all to lanes that have none, which may overtake it: so no
    account holds up another. It belongs to one event loop.
    """

    total: int
    small: int = 0  # a lane that has none gets so much at once, come what may
    alone: bool = False  # there is only one lane: nothing is kept for others
    used: int = 0
    of: dict[object, int] = field(default_factory=dict)  # what each lane has
    waiting: dict[asyncio.Future[None], tuple[object, int]] = field(default_factory=dict)

    async def take(self, lane: object, amount: int) -> int:
        """Wait until the lane may have so much more, and return it: all but what is kept for others, at most."""
        amount = min(amount, self.total - self.total // KEPT_SHARE)
        if not self.waiting and self.fits(lane, amount):
            return amount
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting[granted] = lane, amount
        self.grant()
        try:
            await granted
        except asyncio.CancelledError:
            if self.waiting.pop(granted, None) is None:
                self.give_back(lane, amount)
            raise
        return amount

    def give_back(self, lane: object, amount: int) -> None:
        self.used -= amount
        if left := self.of.pop(lane, 0) - amount:
            self.of[lane] = left
        if self.waiting:
            self.grant()

    def grant(self) -> None:
        """Serve those who wait; within a lane nobody is overtaken."""
        passed_over = set()
        for granted, (lane, amount) in list(self.waiting.items()):
            if self.used >= self.total and not self.small:
                return
            if granted.done():  # its task was cancelled, and takes it out
                continue
            if lane in passed_over or not self.fits(lane, amount):
                passed_over.add(lane)
            else:
                del self.waiting[granted]
                granted.set_result(None)

    def fits(self, lane: object, amount: int) -> bool:
        """Give the lane so much if it may have it now."""
        has = self.of.get(lane, 0)
        kept = self.total // KEPT_SHARE if has and not self.alone else 0
        if fits := self.used + amount + kept <= self.total or amount <= (0 if has else self.small):
            self.used, self.of[lane] = self.used + amount, has + amount
        return fits


class Clock:
    """The wall clock for what people see, the monotonic one for durations; both in seconds.

    wall() runs steadily from one follow() to the next: so a step of the clock (somebody set it, a virtual
    machine slept) is seen at one moment, at which all times that the daemon wrote by it can be moved along.
    """

    def __init__(self, wall: Callable[[], float], monotonic: Callable[[], float]) -> None:
        self.monotonic = monotonic
        self.started_at = wall()  # moved along when the clock is set
        self._true_wall = wall
        self._offset = self.started_at - monotonic()

    def wall(self) -> float:
        return self._offset + self.monotonic()

    def follow(self) -> int:
        """Go by the wall clock as it is now; return by how many seconds it was set, mostly 0."""
        step = self._true_wall() - self.wall()
        if abs(step) > 5:  # it was set; by less, it is being corrected
            return self.move(round(step))
        self._offset += step
        return 0

    def move(self, step_s: int) -> int:
        self._offset += step_s
        self.started_at += step_s
        return step_s


# ======================================================================
# LOG AND METRICS - one event, one line; the instruments on a registry of the daemon's own
# ======================================================================
#
# Only loops and doors log. A line is a sentence and fields; nothing that a peer sends can
# forge a second line. Labels of metrics come from short lists only: accounts that exist,
# routes of the table, outcomes named here. Never a message id, an address, a secret.

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)

LOG_TIME = "%Y-%m-%dT%H:%M:%SZ"  # UTC
JOURNAL_PRIORITIES = ((logging.ERROR, "<3>"), (logging.WARNING, "<4>"), (logging.INFO, "<6>"), (logging.NOTSET, "<7>"))


def event(
    log: logging.Logger, level: int, sentence: str, /, *, exc_info: BaseException | None = None, **fields: object
) -> None:
    """Log that something happened: one sentence, and what it concerns as fields (message=, account=,
    connection= ...). Fields that are None are left out, fractions rounded; `exc_info` adds a traceback."""
    if log.isEnabledFor(level):
        fields.setdefault("request", request_id.get())
        known = {name: round(v, 3) if isinstance(v, float) else v for name, v in fields.items() if v is not None}
        log.log(level, sentence, exc_info=exc_info, extra={"fields": known})


def _escaped(text: str) -> str:
    """The text on one line, whatever is in it: control characters and the like as Python writes them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text_line(record: logging.LogRecord, fields: Mapping[str, object], trace: str, *, journal: bool) -> str:
    """For people: time, level, sentence, key=value; a traceback follows indented.

    For journald, which knows the time itself, with a priority instead of time and level (sd-daemon(3)).
    """
    if journal:
        opening = indent = next(prefix for level, prefix in JOURNAL_PRIORITIES if record.levelno >= level)
    else:
        now = time.strftime(LOG_TIME, time.gmtime(record.created))
        opening, indent = f"{now} {record.levelname} ", ""
    line = opening + _escaped(record.getMessage())
    for name, value in fields.items():
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if name == "until" and isinstance(value, int):
            text = time.strftime(LOG_TIME, time.gmtime(value))
        if not text or not text.isprintable() or any(c in text for c in ' "=\\'):
            quoted = text.replace("\\", "\\\\").replace('"', '\\"')
            text = f'"{_escaped(quoted)}"'
        line += f" {name}={text}"
    return "\n".join([line, *(f"{indent}    {_escaped(below)}" for below in trace.split("\n") if below)])


def _json_line(record: logging.LogRecord, fields: Mapping[str, object], trace: str) -> str:
    """For programs: one JSON object a line, a traceback as one of its members."""
    time_ms = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    line: dict[str, object] = {"time": time_ms, "level": record.levelname.lower(), "event": record.getMessage()}
    line = {**line, **fields, **line, **({"traceback": trace} if trace else {})}
    return json.dumps(line, default=str)


class LineWriter(logging.Handler):
    """Writes each line at once to a file descriptor; blocking. Lines for one that is broken or closed are lost."""

    def __init__(self, descriptor: int, line_of: Callable[[logging.LogRecord, Mapping[str, object], str], str]) -> None:
        super().__init__()
        self._descriptor, self._line_of = descriptor, line_of

    def emit(self, record: logging.LogRecord) -> None:
        foreign = {} if record.name == "mailproxy" else {"logger": record.name}
        try:
            error = record.exc_info[1] if record.exc_info else None
            trace = "" if error is None else "".join(traceback.format_exception(error))
            line = self._line_of(record, getattr(record, "fields", None) or foreign, trace.rstrip())
            left = f"{line}\n".encode("utf-8", "backslashreplace")
            while left:
                left = left[os.write(self._descriptor, left) :]
        except Exception:  # a log that fails must not stop the mail
            return


def stderr_is_journal(environ: Mapping[str, str], descriptor: int = 2) -> bool:
    """True when stderr goes straight to journald (systemd.exec(5), JOURNAL_STREAM)."""
    with contextlib.suppress(OSError):
        found = os.fstat(descriptor)
        return environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"
    return False


def configure_logging(level: str, line_format: str, *, journal: bool = False, descriptor: int = 2) -> None:
    """Send every line of the process to stderr: ours, those of libraries (from WARNING on), warnings,
    and errors that nobody caught. May be called again when the settings change."""
    line_of = _json_line if line_format == "json" else functools.partial(_text_line, journal=journal)
    writer = LineWriter(descriptor, line_of)
    root, ours = logging.getLogger(), logging.getLogger("mailproxy")
    root.handlers = [kept for kept in root.handlers if not isinstance(kept, LineWriter)] + [writer]
    ours.setLevel(level.upper())
    root.setLevel(max(logging.WARNING, ours.level))  # the debug lines of libraries may hold credentials
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: log_uncaught(error, logging.CRITICAL)
    threading.excepthook = lambda failed: log_uncaught(failed.exc_value, thread=getattr(failed.thread, "name", None))
    sys.unraisablehook = lambda failed: log_uncaught(failed.exc_value)


def log_uncaught(error: BaseException | None, level: int = logging.ERROR, thread: str | None = None) -> None:
    """What nobody caught: in the main thread, which ends by it (critical), in another, or as an object is cleared up."""
    sentence = "stopped by an unexpected error" if level == logging.CRITICAL else "unexpected error"
    event(logging.getLogger("mailproxy"), level, sentence, exc_info=error, thread=thread)


# --- metrics -------------------------------------------------------------

REPORT_OUTCOMES = ("acknowledged", "refused", "timeout", "unreachable")

REQUESTS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
COMMITS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5, 10)
TRANSACTIONS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 600)
WAITS_S = (0.05, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14_400, 43_200, 86_400, 432_000)


class Recent:
    """What happened in each of the last 90 times 10 seconds, in memory only."""

    NAMES = ("accepted", "sent", "deferred", "failed")
    STEP_S, STEPS = 10, 90

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self.counts: dict[int, dict[str, int]] = {}

    def count(self, name: str, number: int = 1) -> None:
        step = int(self._wall() // self.STEP_S)
        if step not in self.counts:
            self.counts = {old: n for old, n in self.counts.items() if step - self.STEPS < old < step}
            self.counts[step] = dict.fromkeys(self.NAMES, 0)
        self.counts[step][name] += number

    def columns(self, others: Iterable[Mapping[str, Mapping[str, int]]] = ()) -> list[dict[str, int]]:
        """Oldest first; `ts` is the beginning of each. The last one is going on. The counts of other nodes, as JSON has
        them, are added."""
        last, columns = int(self._wall() // self.STEP_S), list[dict[str, int]]()
        for step in range(last - self.STEPS + 1, last + 1):
            counted = [self.counts.get(step, {}), *[other.get(str(step), {}) for other in others]]
            sums = {name: sum(one.get(name, 0) for one in counted) for name in self.NAMES}
            columns.append({"ts": step * self.STEP_S, **sums})
        return columns


class Metrics:
    """The instruments of one daemon, named as its metrics. Counting costs a microsecond or two and waits
    for nothing; an account is counted under `label(account_id)`. Gauges are set when somebody looks."""

    def __init__(self, version: str, wall: Callable[[], float] = time.time, node: str | None = None) -> None:
        import platform

        import prometheus_client  # loaded by the daemon only: it takes a tenth of a start

        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call] # they would double the answer
        self.accounts, self.recent = set[str](), Recent(wall)  # the first: that have series
        registry = prometheus_client.CollectorRegistry()
        # Everything as Prometheus' text format. Blocking: some 15 ms for each 1,000 series.
        self.exposition = functools.partial(prometheus_client.generate_latest, registry)
        counter = functools.partial(prometheus_client.Counter, namespace="mailproxy", registry=registry)
        gauge = functools.partial(prometheus_client.Gauge, namespace="mailproxy", registry=registry)
        timer = functools.partial(prometheus_client.Histogram, namespace="mailproxy", registry=registry)
        account, by_source, of_node = ["account"], ["source", "outcome"], ["node"] if node else []
        by_reason, by_outcome = ["account", "reason"], ["account", "outcome"]
        self.messages_accepted = counter("messages_accepted", "Messages accepted from clients.", account)
        self.messages_rejected = counter("messages_rejected", "Messages refused at submission.")
        self.messages_sent = counter("messages_sent", "Messages accepted by a server.", account)
        self.messages_failed = counter("messages_failed", "Messages given up.", account)
        self.messages_partly_refused = counter(
            "messages_partly_refused", "Messages sent to some recipients only.", account
        )
        self.messages_deferred = counter("messages_deferred", "Deferrals of messages, by reason.", by_reason)
        self.rate_limited = counter("rate_limited", "Times a message reached a limit of its account.", account)
        self.queue_wait_seconds = timer("queue_wait_seconds", "Time from ready to sent.", account, buckets=WAITS_S)
        self.smtp_connects = counter("smtp_connects", "Connection attempts, by outcome.", by_outcome)
        self.smtp_transaction_seconds = timer(
            "smtp_transaction_seconds", "Duration of SMTP transactions.", account, buckets=TRANSACTIONS_S
        )
        self.attachment_fetches = counter("attachment_fetches", "Attachments asked for, by outcome.", by_source)
        self.report_requests = counter("report_requests", "Calls of the upstream, by outcome.", ["outcome"])
        # By their labels, and kept: to look a series up takes longer than to count in it.
        requests = counter("http_requests", "HTTP requests answered.", ["route", "method", "code"])
        durations = timer("http_request_seconds", "Time to answer an HTTP request.", ["route"], buckets=REQUESTS_S)
        self.http_requests = functools.cache(requests.labels)
        self.http_request_seconds = functools.cache(durations.labels)
        self.accepted = functools.cache(self.messages_accepted.labels)
        self.sent = functools.cache(self.messages_sent.labels)
        self.waited = functools.cache(self.queue_wait_seconds.labels)
        self.transacted = functools.cache(self.smtp_transaction_seconds.labels)
        self.auth_failures = counter("auth_failures", "HTTP requests with a missing or wrong token.")
        self.storage_commit_seconds = timer("storage_commit_seconds", "Duration of commits.", buckets=COMMITS_S)
        self.storage_commit_failures = counter("storage_commit_failures", "Commits that the storage refused.")

        self.messages_pending = gauge("messages_pending", "Undelivered messages, deferred and on the wire included.")
        self.messages_in_delivery = gauge("messages_in_delivery", "Messages on the wire.")
        self.oldest_pending_seconds = gauge("oldest_pending_seconds", "Age of the oldest undelivered message.")
        self.reports_unacknowledged = gauge("reports_unacknowledged", "States that the upstream has not acknowledged.")
        self.scheduler_active = gauge("scheduler_active", "1 while mail goes out, 0 while suspended.")
        up = "1 when mail goes out, 0 when the account's server refuses us."
        self.account_up = gauge("account_up", up, account + of_node)
        self.smtp_connections = gauge("smtp_connections", "Open SMTP connections.", ["account", "state", *of_node])
        for outcome in REPORT_OUTCOMES:
            self.report_requests.labels(outcome)
        for source, outcome in itertools.product(Source, ("fetched", "cached", "deferred", "failed")):
            self.attachment_fetches.labels(source, outcome)
        prometheus_client.ProcessCollector(registry=registry)
        build = prometheus_client.Info("build", "Version of mailproxy.", namespace="mailproxy", registry=registry)
        about = {"version": version, "python": platform.python_version(), "sqlite": sqlite3.sqlite_version}
        build.info(about | dict.fromkeys(of_node, str(node)))

    def know(self, account_id: str) -> None:
        """Begin the counters of an account at 0, before the first event; not its histograms, which are many series."""
        self.accounts.add(account_id)
        for counter in (
            self.messages_accepted, self.messages_sent, self.messages_failed, self.messages_partly_refused,
            self.rate_limited,
        ):  # fmt: skip
            counter.labels(account_id)
        for reason in DEFERRAL_REASONS:
            self.messages_deferred.labels(account_id, reason)
        for outcome in ("ok", "failed", "login_refused"):
            self.smtp_connects.labels(account_id, outcome)

    def forget(self, account_id: str) -> None:
        """End the series of an account that is gone."""
        self.accounts.discard(account_id)
        for series in (self.accepted, self.sent, self.waited, self.transacted):
            series.cache_clear()
        for instrument in (
            self.messages_accepted, self.messages_sent, self.messages_failed, self.messages_partly_refused,
            self.messages_deferred, self.rate_limited, self.queue_wait_seconds, self.smtp_connects,
            self.smtp_transaction_seconds, self.account_up, self.smtp_connections,
        ):  # fmt: skip
            instrument.remove_by_labels({"account": account_id})

    def count_ended(self, label: str, disposition: Disposition) -> None:
        """A message is final: sent, to some of its recipients at least, or failed."""
        is_sent = disposition.status is not Status.ERROR
        (self.sent if is_sent else self.messages_failed.labels)(label).inc()
        self.recent.count("sent" if is_sent else "failed")
        if is_sent and disposition.error is not None:
            self.messages_partly_refused.labels(label).inc()

    def label(self, account_id: str) -> str:
        """The label of an account; one for all that do not exist (any more)."""
        return account_id if account_id in self.accounts else "unknown"


# ======================================================================
# QUEUE FILE - one SQLite file, one writer, group commit; knows no mail
# ======================================================================
#
# One thread owns the only writing connection. Whatever waits when it is free is
# written in one transaction, each of several pieces of work inside a savepoint of its own,
# and answered after the COMMIT: one fsync (journal_mode WAL, synchronous FULL)
# pays for many callers. Callers who want the same kind of work share one piece.
# A second thread owns a read-only connection, so that no listing holds up a
# submission.

BUSY_TIMEOUT_MS = 3000  # another process holds the write lock: refuse after this
CHECKPOINT_PAGES = 4000  # of the WAL (16 MB): then it is copied into the file, which takes some milliseconds
MOST_GATHERED = 64  # pieces of work that wait: then they are written
PATIENT_TURNS = 8  # of the loop that may bring nothing, while fewer wait than were written the last time
MISTAKES = (sqlite3.IntegrityError, sqlite3.ProgrammingError, sqlite3.InterfaceError, sqlite3.DataError)


class _Wish(NamedTuple):
    """What one caller wants written, and where the caller waits for the answer."""

    work: Callable[[sqlite3.Connection, list[Any]], Sequence[Any]]
    item: Any
    answer: asyncio.Future[Any]


class Database(Protocol):
    """A connection as pieces of work see it: sqlite3's, or one that behaves so."""

    def execute(self, sql: str, parameters: Any = ..., /) -> Any: ...
    def executemany(self, sql: str, parameters: Any, /) -> Any: ...


class QueueFile:
    """The file. `schema` makes a new one; `migrations`, which may use the SQL `functions` of one argument, bring one of
    version 1, 2, ..., whose indexes and triggers are dropped before, to the same, the newest version."""

    errors: tuple[type[Exception], ...] = (sqlite3.Error,)
    mistakes: tuple[type[Exception], ...] = MISTAKES  # of those: what is wrong with the work, not with the storage
    sends_late = False  # what a piece of work asks last is not sent before its end
    instance = ""  # the daemon's name among several

    def __init__(
        self,
        path: str,
        schema: str,
        migrations: Sequence[str] = (),
        functions: Sequence[Callable[[Any], str | None]] = (),
        *,
        observe_commit: Callable[[float], None],
        observe_refusal: Callable[[], None] = lambda: None,
    ) -> None:
        self.path = os.path.realpath(path)
        self.folder = os.path.dirname(self.path)  # there is room for drafts
        self.refuses = False  # a commit failed; cleared by the next that has something to write and succeeds
        self.last_seq = self.last_report = 0  # the numbers given last, for whoever writes
        self.meanwhile: Callable[[], object] = lambda: None  # what the loop's thread can do while the disk writes
        self.changes = -1  # that other daemons may have made; on_change reads them
        self.on_change: Callable[[Any], None] = lambda db: None
        self._schema, self._migrations, self._functions = schema, migrations, functions
        self._observe_commit, self._observe_refusal = observe_commit, observe_refusal
        self._open = False
        self._undo = contextlib.ExitStack()  # what open() did
        self._writer = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="queue-writer")
        self._reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="queue-reader")
        self._writing: Any = None
        self._reading: Any = None
        self._loop: asyncio.AbstractEventLoop | None = None  # kept: asking which one runs is a system call
        self._waiting: list[_Wish] = []
        self._gathered = 0  # so many were written the last time
        self._at_work: Sequence[_Wish] = ()  # what the writer has and has not answered

    # -- opening and closing

    def open(self) -> None:
        """Lock, create or migrate the file. Blocking. Raises ConfigurationError."""
        if sqlite3.sqlite_version_info < (3, 35):  # the first that knows RETURNING
            version = sqlite3.sqlite_version
            raise ConfigurationError(f"SQLite {version} is too old: run mailproxy with a Python that has 3.35 or newer")
        sqlite3.register_adapter(list, as_json)  # for IN (SELECT value FROM json_each(:values))
        if not os.path.isdir(self.folder):
            raise ConfigurationError(f"the folder {self.folder} of db_path does not exist; create it first")
        if os.path.exists(self.path) and not os.path.isfile(self.path):  # nobody else could use a device any more
            raise ConfigurationError(f"{self.path} is not a regular file; choose another db_path")
        try:
            with contextlib.ExitStack() as undo:
                self._lock(undo)
                self._create_private()
                undo.callback(self._close_writing)
                self._writing = self._connection(writes=True)
                self._migrate()
                self._undo, self._open = undo.pop_all(), True
        except (OSError, sqlite3.Error) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigurationError(f"the queue {self.path} cannot be opened: {why}") from error

    def _lock(self, undo: contextlib.ExitStack) -> None:
        """Keep other daemons off the queue; the lock file beside it holds the pid."""
        lock = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        undo.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise ConfigurationError(
                f"the queue {self.path} is in use by the mailproxy with pid {holder}; "
                "stop that one first or choose another db_path"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)

    def _create_private(self) -> None:
        """Readable by the owner only; SQLite gives its siblings the same mode."""
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        for name in (self.path, self.path + "-wal", self.path + "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.chmod(name, 0o600)
        names = os.stat(self.path).st_nlink
        if names > 1:  # under each it would have another lock, and another WAL
            raise ConfigurationError(f"the queue {self.path} has {names} names (hard links); remove all but one")

    def _migrate(self) -> None:
        """Bring the schema up to date; that and the version number are one commit."""
        connection, newest = self._writing, len(self._migrations) + 1
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > newest:
            raise ConfigurationError(
                f"the queue {self.path} was written by a newer mailproxy (schema {version}, this one knows "
                f"{newest}); start that one, or restore a backup"
            )
        if not version and connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise ConfigurationError(f"{self.path} is a database of another program; choose another db_path")
        if version < newest:
            script = self._migrations[version - 1] if version else self._schema
            for function in self._functions:
                connection.create_function(function.__name__, 1, function)
            made = "SELECT type, name FROM sqlite_master WHERE type IN ('index', 'trigger') AND sql IS NOT NULL"
            drops = "".join([f'DROP {kind} "{name}"; ' for kind, name in connection.execute(made)])
            step = f"BEGIN IMMEDIATE; {drops}{script}; PRAGMA user_version = {newest}; COMMIT"
            connection.executescript(f"PRAGMA temp_store = FILE; {step}; PRAGMA temp_store = MEMORY")  # it may be large

    async def close(self) -> None:
        """Finish what was asked, then close both connections and let go of the lock. The writing one comes last: only
        that can bring the WAL home into the file, which is whole by itself then."""
        self._open = False
        while unanswered := [wish.answer for wish in (*self._at_work, *self._waiting)]:
            await asyncio.wait(unanswered)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._reader, self._close_reading)
        await loop.run_in_executor(self._writer, self._undo.close)
        self._writer.shutdown()
        self._reader.shutdown()

    # -- writing

    async def write(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run the work in the writer's thread; return its result once it is on disk. Raises StorageUnavailable when
        the file cannot be written (nothing of the work was kept), or what the work raised (only that was undone)."""
        return await self.write_together(lambda db, _: [work(db)], None)

    def write_together(
        self, work: Callable[[sqlite3.Connection, list[Any]], Sequence[T]], item: object
    ) -> asyncio.Future[T]:
        """Like write, for work that is done for many callers in one go: an item and a result for each.
        Should it raise, it is done again for each item by itself."""
        if not self._open:
            raise StorageUnavailable("the queue is closed")
        loop = self._loop = self._loop or asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._hand_over)  # with all that is asked in this turn of the loop
        self._waiting.append(_Wish(work, item, answer))
        return answer

    def _hand_over(self, seen: int = 0, patience: int = 0) -> None:
        """Give the writer all that waits, once some turns of the loop brought nothing more; while it is at work more
        gathers, for its next commit. Who asked together the last time is waited for somewhat longer."""
        waiting = len(self._waiting)
        if self._at_work or not waiting:
            return
        if waiting < MOST_GATHERED and (waiting > seen or patience):
            patience = patience - 1 if waiting == seen else 1 if waiting >= self._gathered else PATIENT_TURNS
            self._waiting[0].answer.get_loop().call_soon(self._hand_over, waiting, patience)
        else:
            self._at_work, self._waiting, self._gathered = self._waiting, [], waiting
            self._writer.submit(self._commit, self._at_work)

    def _commit(self, group: Sequence[_Wish], at_once: bool = False) -> None:
        """Write a group, and answer each of it after the COMMIT. The writer's thread."""
        started = time.monotonic()
        answers = list[tuple[_Wish, Any]]()
        try:
            connection = self._writing = self._writing or self._connection(writes=True)
            changes = connection.total_changes
            connection.execute("BEGIN IMMEDIATE")
            more = self._waiting.copy()  # others may have written until now
            self._at_work = group = [*group, *more]
            del self._waiting[: len(more)]
            together: dict[object, list[_Wish]] = {}
            for wish in group:
                together.setdefault(wish.work, []).append(wish)
            pieces = list(together.values())
            for number, piece in enumerate(pieces):
                if number:  # before the first there is nothing to keep
                    connection.execute("SAVEPOINT piece")
                try:
                    results = piece[0].work(connection, [wish.item for wish in piece])
                    if self.sends_late and (at_once or len(pieces) > 1):
                        connection.send()
                    answers += list(zip(piece, results, strict=True))
                except Exception as error:
                    if isinstance(error, self.errors) and not isinstance(error, self.mistakes):
                        raise
                    for undo in ("ROLLBACK TO piece",) if number else ("ROLLBACK", "BEGIN IMMEDIATE"):
                        connection.execute(undo)
                    if len(piece) > 1:
                        pieces += [[wish] for wish in piece]  # which come last in this very loop
                    else:
                        answers.append((piece[0], error))
                if number:
                    connection.execute("RELEASE piece")
            if len(group) > 1:  # for one caller it takes more than it brings
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    group[0].answer.get_loop().call_soon_threadsafe(self.meanwhile)
            connection.execute("COMMIT")
        except Exception as error:
            self._close_writing()
            if isinstance(error, self.mistakes) and not at_once:  # of the one piece, that went out with the COMMIT
                return self._commit(group, at_once=True)
            self.refuses = True
            self._observe_refusal()
            why = f"the queue cannot be written: {self.why(error)}"
            why = str(error) if isinstance(error, StorageUnavailable) else why
            answers = [(wish, StorageUnavailable(why)) for wish in group]
        else:
            self.refuses = self.refuses and connection.total_changes == changes
            self._observe_commit(time.monotonic() - started)
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            group[0].answer.get_loop().call_soon_threadsafe(self._answer, answers)

    def _answer(self, answers: Iterable[tuple[_Wish, Any]]) -> None:
        """Hand each caller its result, unless it gave up waiting, and the writer what waits meanwhile."""
        self._at_work = ()
        self._hand_over()
        for wish, result in answers:
            if wish.answer.cancelled():
                continue
            if isinstance(result, Exception):
                wish.answer.set_exception(result)
            else:
                wish.answer.set_result(result)

    def _connection(self, *, writes: bool) -> Any:
        """The one that writes, or reads; a new one after a failure, too: what is on disk was uncertain then."""
        if writes:
            return self.connect()
        connection = sqlite3.connect(f"file:{urllib.parse.quote(self.path)}?mode=ro", uri=True, isolation_level=None)
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        return connection

    def connect(self) -> Any:
        """A new connection that may write."""
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        connection.execute(f"PRAGMA busy_timeout = {BUSY_TIMEOUT_MS}")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA fullfsync = ON")  # macOS, where fsync leaves it in the drive
        connection.execute("PRAGMA journal_size_limit = 16777216")
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        connection.execute("PRAGMA temp_store = MEMORY")
        return connection

    def _close_writing(self) -> None:
        connection, self._writing = self._writing, None
        if connection is not None:
            with contextlib.suppress(*self.errors):
                connection.close()

    # -- reading

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run the work on the read-only connection, in its own thread. Raises StorageUnavailable when it cannot."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._read, work)

    def _read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            self._reading = self._reading or self._connection(writes=False)
            return work(self._reading)
        except self.errors as error:
            self._close_reading()
            raise StorageUnavailable(f"the queue cannot be read: {self.why(error)}") from error

    @staticmethod
    def why(error: BaseException) -> str:
        return str(error)

    def _close_reading(self) -> None:
        connection, self._reading = self._reading, None
        if connection is not None:
            with contextlib.suppress(*self.errors):
                connection.close()


# ======================================================================
# QUEUE - every SQL statement of the program; no message is lost in here
# ======================================================================
#
# A row is pending while both sent_ts and error_ts are NULL. A pending row is
# ready when its deferred_ts is NULL, and waits when it is not. Every statement
# that changes a row names the state it leaves. Hot statements are index seeks
# with a LIMIT; counts are kept (tallies), never counted. What many callers ask
# for at once, submissions and outcomes, is written in one go for all of them; these
# statements say OR IGNORE or OR FAIL, which spares SQLite a journal for each row: should
# one fail, the savepoint around it undoes it.

SCHEMA = """
CREATE TABLE messages (
    seq          INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order of acceptance, never given twice
    id           TEXT NOT NULL UNIQUE,               -- the client's key
    account_id   TEXT NOT NULL,
    priority     INTEGER NOT NULL,                   -- 0 immediate .. 3 low
    created_at   INTEGER NOT NULL,                   -- accepted
    updated_at   INTEGER NOT NULL,
    deferred_ts  INTEGER,                            -- not before; NULL: ready
    sent_ts      INTEGER,                            -- a server took the responsibility
    error_ts     INTEGER,                            -- given up
    error        TEXT,                               -- why, in the server's words
    reported_ts  INTEGER,                            -- the upstream acknowledged the latest state
    report_order INTEGER,                            -- place among the states not acknowledged
    attempts     INTEGER NOT NULL DEFAULT 0,         -- transactions tried
    turn         INTEGER NOT NULL DEFAULT 0,         -- 1: comes back for a retry; 2 more: its batch is suspended
    deferral     TEXT,                               -- schedule, retry, in_doubt, connection, login, limit
    ready_at     REAL NOT NULL,                      -- since when it could have gone; from then its age counts
    expires_ts   INTEGER,                            -- given up when not delivered by then
    batch_code   TEXT,
    message_id   TEXT NOT NULL,
    recipients   TEXT,                               -- JSON {address: [status, code, text]}
    parts        INTEGER NOT NULL,                   -- attachments and raw content to put in
    addressees   INTEGER NOT NULL DEFAULT 1,         -- recipients of the envelope
    subject      TEXT,                               -- where the payload does not tell it: of a raw message
    size_bytes   INTEGER NOT NULL,                   -- payload and contents together
    payload      TEXT NOT NULL                       -- as submitted, JSON, without the contents
);
CREATE INDEX messages_ready ON messages (account_id, turn, priority, seq)
    WHERE sent_ts IS NULL AND error_ts IS NULL AND deferred_ts IS NULL;
CREATE INDEX messages_waiting ON messages (deferred_ts)
    WHERE sent_ts IS NULL AND error_ts IS NULL AND deferred_ts IS NOT NULL;
CREATE INDEX messages_held_back ON messages (account_id, deferral)
    WHERE deferred_ts IS NOT NULL AND deferral IN ('limit', 'connection', 'login');
CREATE INDEX messages_pending ON messages (seq) WHERE sent_ts IS NULL AND error_ts IS NULL;
CREATE INDEX messages_by_age ON messages (account_id, ready_at) WHERE sent_ts IS NULL AND error_ts IS NULL
    AND (deferred_ts IS NULL OR deferral IN ('limit', 'connection', 'login')) AND turn < 2;
CREATE INDEX messages_expiring ON messages (expires_ts)
    WHERE sent_ts IS NULL AND error_ts IS NULL AND expires_ts IS NOT NULL;
CREATE INDEX messages_refused ON messages (seq)
    WHERE error IS NOT NULL AND (sent_ts IS NOT NULL OR error_ts IS NOT NULL);
CREATE INDEX messages_unreported ON messages (report_order) WHERE report_order IS NOT NULL;
CREATE INDEX messages_reported ON messages (reported_ts)
    WHERE report_order IS NULL AND (sent_ts IS NOT NULL OR error_ts IS NOT NULL);
CREATE INDEX messages_unreported_final ON messages (coalesce(sent_ts, error_ts))
    WHERE report_order IS NOT NULL AND (sent_ts IS NOT NULL OR error_ts IS NOT NULL);
CREATE TRIGGER tally_update AFTER UPDATE OF deferred_ts, sent_ts, error_ts, report_order ON messages BEGIN
    UPDATE tallies SET
        ready = ready + (new.sent_ts IS NULL AND new.error_ts IS NULL AND new.deferred_ts IS NULL)
            - (old.sent_ts IS NULL AND old.error_ts IS NULL AND old.deferred_ts IS NULL),
        waiting = waiting + (new.sent_ts IS NULL AND new.error_ts IS NULL AND new.deferred_ts IS NOT NULL)
            - (old.sent_ts IS NULL AND old.error_ts IS NULL AND old.deferred_ts IS NOT NULL),
        unreported = unreported + (new.report_order IS NOT NULL) - (old.report_order IS NOT NULL)
    WHERE account_id = new.account_id;
END;
CREATE TRIGGER tally_delete AFTER DELETE ON messages BEGIN
    UPDATE tallies SET
        ready = ready - (old.sent_ts IS NULL AND old.error_ts IS NULL AND old.deferred_ts IS NULL),
        waiting = waiting - (old.sent_ts IS NULL AND old.error_ts IS NULL AND old.deferred_ts IS NOT NULL),
        unreported = unreported - (old.report_order IS NOT NULL)
    WHERE account_id = old.account_id;
END;
CREATE TRIGGER remember_sent AFTER DELETE ON messages
    WHEN old.sent_ts IS NOT NULL OR old.recipients LIKE '%["sent"%' BEGIN
    INSERT INTO sent_ids VALUES (old.id, coalesce(old.sent_ts, old.updated_at))
        ON CONFLICT (id) DO UPDATE SET sent_ts = excluded.sent_ts;
END;
CREATE TABLE sought (                                -- what searches look at: of rows that were stored together,
    last_seq INTEGER PRIMARY KEY, first_seq INTEGER NOT NULL, created_at INTEGER NOT NULL,
    text TEXT NOT NULL                               -- sought() of each, with a record separator between
);
CREATE TRIGGER forget_message AFTER DELETE ON messages BEGIN
    DELETE FROM contents WHERE seq = old.seq;
    DELETE FROM attempts WHERE seq = old.seq;
    DELETE FROM sought WHERE last_seq = (SELECT min(last_seq) FROM sought WHERE last_seq >= old.seq)
        AND NOT EXISTS (SELECT 1 FROM messages WHERE seq BETWEEN first_seq AND last_seq);
END;
CREATE TABLE suspended_batches (batch_code TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE failures (n INTEGER NOT NULL);          -- rows that were given up
INSERT INTO failures VALUES (0);
CREATE TRIGGER count_failures AFTER UPDATE OF error_ts ON messages
    WHEN (new.error_ts IS NULL) <> (old.error_ts IS NULL) BEGIN
    UPDATE failures SET n = n + CASE WHEN new.error_ts IS NULL THEN -1 ELSE 1 END;
END;
CREATE TRIGGER forget_failure AFTER DELETE ON messages WHEN old.error_ts IS NOT NULL BEGIN
    UPDATE failures SET n = n - 1;
END;
CREATE TABLE sends (                                 -- n messages sent in a minute, the last not after until_ts
    account_id TEXT NOT NULL, minute INTEGER NOT NULL, until_ts INTEGER NOT NULL, n INTEGER NOT NULL,
    PRIMARY KEY (account_id, minute)
) WITHOUT ROWID;
CREATE INDEX sends_by_minute ON sends (minute);
CREATE TABLE tallies (                               -- counts of rows; new ones are added as they are inserted
    account_id TEXT PRIMARY KEY, ready INTEGER NOT NULL, waiting INTEGER NOT NULL, unreported INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE contents (                              -- inline attachments; -1 is a raw message
    seq INTEGER NOT NULL, position INTEGER NOT NULL, content BLOB NOT NULL, PRIMARY KEY (seq, position)
);
CREATE TABLE attempts (                              -- the timeline of a message
    seq INTEGER NOT NULL, number INTEGER NOT NULL,
    started_at REAL NOT NULL, ended_at REAL NOT NULL, outcome TEXT NOT NULL,
    stage TEXT, code INTEGER, enhanced_code TEXT, text TEXT, recipients TEXT, connection TEXT,
    PRIMARY KEY (seq, number)
) WITHOUT ROWID;
CREATE TRIGGER forget_old_attempts AFTER INSERT ON attempts WHEN new.number > 100 BEGIN
    DELETE FROM attempts WHERE seq = new.seq AND number <= new.number - 100;
END;
-- Of messages that were sent, to some at least, and are gone.
CREATE TABLE sent_ids (id TEXT PRIMARY KEY, sent_ts INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX sent_ids_by_age ON sent_ids (sent_ts);
CREATE TABLE accounts (id TEXT PRIMARY KEY, definition TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE suspensions (account_id TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE switches (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""

# What brings a file of version 1, 2, ... to the newest one: the rows of tables that have changed are copied.
COPY_MESSAGES = f"""
ALTER TABLE messages RENAME TO messages_old;
{SCHEMA.replace("CREATE TABLE", "CREATE TABLE IF NOT EXISTS")}
INSERT INTO messages SELECT seq, id, account_id, priority, created_at, updated_at, deferred_ts, sent_ts, error_ts, error,
    reported_ts, report_order, attempts, turn, deferral, ready_at, expires_ts, batch_code, message_id, recipients, parts,
    1, NULL, size_bytes, payload FROM messages_old ORDER BY seq;
UPDATE messages SET subject = subject_of_raw(content) FROM contents WHERE contents.seq = messages.seq AND position = -1;
INSERT INTO sought
    SELECT seq, seq, created_at, sought_of_payload(payload) || casefold(coalesce(subject, '')) FROM messages;
UPDATE failures SET n = (SELECT count(*) FROM messages WHERE error_ts IS NOT NULL);
DELETE FROM sqlite_sequence WHERE name = 'messages';
"""  # noqa: S608 - constants only
MIGRATIONS = (
    f"""
ALTER TABLE sends RENAME TO sends_old;
{COPY_MESSAGES}
INSERT INTO sqlite_sequence SELECT 'messages', coalesce(max(seq), 0) FROM
    (SELECT seq FROM last_gone UNION ALL SELECT max(seq) FROM messages);
INSERT INTO sends SELECT account_id, until_ts / 60, max(until_ts), sum(n) FROM sends_old GROUP BY 1, 2;
DROP TABLE messages_old; DROP TABLE sends_old; DROP TABLE last_gone; DROP TABLE holds;
""",  # noqa: S608 - constants only
    f"""
{COPY_MESSAGES}
INSERT INTO sqlite_sequence SELECT 'messages', seq FROM sqlite_sequence WHERE name = 'messages_old';
DROP TABLE messages_old;
""",  # noqa: S608 - constants only
)

KNOWN = "known"  # the same submission is there already, or was sent and is gone
UNDECIDED, STORE = "undecided", "store"
SMALL_PAYLOAD_BYTES = 65_536  # larger ones are read under the memory budget
HELD_BACK = ("limit", "connection", "login")  # deferrals that end when the account can be used again
CHUNK = 500  # rows of one commit in work that may touch many
STRETCH = 5_000  # rows looked at in one go by what must pass over others
SOUGHT_TOGETHER = 100  # messages whose texts for searches are stored in one row
NEXT_SOUGHT = "\x1e"
LOOK = 1_250  # messages looked at in one go by a listing, which ends its piece of work
READING_S = 0.0002  # after so long, for others to have their turn,
PAUSE_S = 0.001  # when nothing was found
PAGE_BYTES = 1_048_576  # of payloads in one page of a listing

Outcomes: TypeAlias = dict[str, RecipientOutcome]  # by address
# The one place that says what the status of a row is.
STATUS_OF_ROW = (
    "CASE WHEN sent_ts IS NOT NULL THEN 'sent' WHEN error_ts IS NOT NULL THEN 'error' "
    "WHEN deferred_ts > :now THEN 'deferred' ELSE 'queued' END"
)
CLAIM_COLUMNS = (
    "seq, id, account_id, priority, message_id, created_at, ready_at, attempts, expires_ts, recipients, parts, "
    "size_bytes, CASE WHEN size_bytes <= :small THEN payload END, addressees"
)
RECORD_COLUMNS = (
    f"seq, id, account_id, priority, {STATUS_OF_ROW} AS status, created_at, updated_at, deferred_ts, sent_ts, "
    "error_ts, error, reported_ts, batch_code, attempts, message_id, recipients, subject, size_bytes, payload"
)
RECORD_OF_ID = f"SELECT {RECORD_COLUMNS} FROM messages WHERE id = :id"  # noqa: S608 - constants only
# What a listing may go along, in the order of acceptance; or what a search found.
ALL = "NOT INDEXED WHERE"
PENDING = "INDEXED BY messages_pending WHERE sent_ts IS NULL AND error_ts IS NULL AND"
REFUSED = "INDEXED BY messages_refused WHERE error IS NOT NULL AND (sent_ts IS NOT NULL OR error_ts IS NOT NULL) AND"
NEXT_PENDING = f"SELECT min(seq) FROM messages {PENDING} seq > :after"  # noqa: S608 - constants only
FOUND = "WHERE seq IN (SELECT value FROM json_each(:seqs)) AND"
CHOSEN = (
    "seq BETWEEN :first AND :last AND created_at BETWEEN :since AND :until "
    "AND (NOT :active_only OR (sent_ts IS NULL AND error_ts IS NULL)) "
    "AND (NOT :refused OR (recipients IS NOT NULL AND error IS NOT NULL AND coalesce(sent_ts, error_ts) IS NOT NULL)) "
    "AND (:account_id IS NULL OR account_id = :account_id) AND (:batch_code IS NULL OR batch_code = :batch_code) "
    f"AND (:status IS NULL OR {STATUS_OF_ROW} = :status) ORDER BY seq"
)
SEARCH = (
    "SELECT first_seq, text FROM sought WHERE last_seq BETWEEN :first AND :last + :together AND first_seq <= :last "
    "AND created_at BETWEEN :since AND :until AND instr(text, :to) > 0 AND instr(text, :subject) > 0 ORDER BY last_seq"
)
READY = (
    "account_id = :account AND turn = :turn AND sent_ts IS NULL AND error_ts IS NULL AND deferred_ts IS NULL "
    "AND seq NOT IN (SELECT value FROM json_each(:on_wire)) ORDER BY priority, seq LIMIT :most"
)
STATE_COLUMNS = (
    "report_order, id, account_id, priority, sent_ts, error_ts, error, deferred_ts, attempts, message_id, batch_code, "
    "recipients, CASE WHEN sent_ts IS NOT NULL THEN 'sent' WHEN error_ts IS NOT NULL THEN 'error' ELSE 'deferred' END"
)
STATE_FIELDS = (*STATE_COLUMNS.split(", ")[:-1], "status")
# What the end of a turn makes of a pending message.
SETTLE = (
    "UPDATE OR FAIL messages SET sent_ts = :sent, error_ts = :failed, error = :error, updated_at = :now, "
    "deferred_ts = :deferred, deferral = :deferral, attempts = attempts + :counted, "
    "turn = turn | :counted, "  # a damaged column of recipients is not lost by a deferral
    "recipients = CASE WHEN :deferred IS NULL THEN :recipients ELSE coalesce(:recipients, recipients) END, "
    "reported_ts = CASE WHEN :place IS NULL THEN reported_ts END, report_order = coalesce(:place, report_order) "
    "WHERE seq = :seq AND sent_ts IS NULL AND error_ts IS NULL"
)
# The same for those sent to all, as nearly all are; :places is JSON {seq: place in the order of reports}.
SETTLE_SENT = (
    "UPDATE OR FAIL messages SET sent_ts = :now, error = NULL, updated_at = :now, deferred_ts = NULL, deferral = NULL, "
    "attempts = attempts + 1, turn = 1, recipients = NULL, reported_ts = NULL, report_order = CAST(json_each.value AS BIGINT) "
    "FROM json_each(:places) "
    "WHERE seq = CAST(json_each.key AS BIGINT) AND sent_ts IS NULL AND error_ts IS NULL"
)
# One statement for so many rows: between two of them other threads of Python may want to run, which costs more.
INSERT_ATTEMPTS = [
    "INSERT OR FAIL INTO attempts VALUES "  # noqa: S608 - constants only
    + ", ".join(["(?, (SELECT coalesce(max(number), 0) + 1 FROM attempts WHERE seq = ?)" + ", ?" * 9 + ")"] * rows)
    for rows in range(17)
]
UNTYPED_ROW = f"({', '.join('?' * 18)})"  # in the first, what may be NULL says that it is a number
TYPED_ROW = f"({', '.join('?' * 6)}, CAST(? AS BIGINT), {', '.join('?' * 3)}, CAST(? AS BIGINT), {', '.join('?' * 7)})"
# So many new messages by one statement, which takes a third less than one for each.
INSERT_ROWS = {
    n: "INSERT OR IGNORE INTO messages (seq, id, account_id, priority, created_at, updated_at, deferred_ts, "  # noqa: S608
    "deferral, ready_at, turn, expires_ts, batch_code, message_id, parts, addressees, subject, payload, size_bytes) "
    f"SELECT * FROM (VALUES {', '.join([TYPED_ROW, *[UNTYPED_ROW] * (n - 1)])}) AS new "
    "WHERE NOT EXISTS (SELECT 1 FROM sent_ids WHERE id = column2)"
    for n in (32, 16, 8, 4, 2, 1)
}
LET_GO = (
    "UPDATE messages SET deferred_ts = NULL, deferral = NULL, report_order = NULL "
    "WHERE account_id = :id AND deferral IN ('limit', 'connection', 'login') AND deferred_ts IS NOT NULL "
    "AND sent_ts IS NULL AND error_ts IS NULL"
)
# 2 suspends messages of a batch, 0 lets them go.
SUSPEND = (
    "UPDATE messages SET turn = turn & 1 | :suspended WHERE seq IN "
    "(SELECT seq FROM messages INDEXED BY messages_pending WHERE seq BETWEEN :first AND :last AND sent_ts IS NULL AND error_ts IS NULL AND batch_code = :batch_code "
    "AND turn & 2 <> :suspended ORDER BY seq LIMIT :most) RETURNING seq"
)
# Of several daemons: that the account's lane is this one's, and that no other has suspended it, or set it to something
# that is not known here; and what it has on the wire.
LEASED = (
    "EXISTS (SELECT 1 FROM leases WHERE account_id = :account AND instance = :instance) "
    "AND NOT EXISTS (SELECT 1 FROM suspensions WHERE account_id = :account) "
    "AND NOT EXISTS (SELECT 1 FROM switches WHERE name = 'active' AND value = 0 "
    "OR name = 'renew ' || :account AND value > :renewed)"
)
CLAIM = (
    "INSERT INTO claims SELECT seq, :instance FROM unnest(:seqs) AS seq "
    "ON CONFLICT (seq) DO UPDATE SET instance = excluded.instance"
)
CLAIMED = "SELECT seq FROM claims WHERE seq IN (SELECT value FROM json_each(:seqs)) AND instance = :instance"
CLAIMED_BY_OTHERS = CLAIMED.replace("instance =", "instance <>")
SETTLED = "DELETE FROM claims WHERE seq IN (SELECT value FROM json_each(:seqs)) AND instance = :instance"
UNCLAIM = "DELETE FROM claims WHERE instance = :instance AND seq NOT IN (SELECT value FROM json_each(:on_wire))"
LET_DUE_GO = (
    "UPDATE messages SET deferred_ts = NULL, deferral = NULL, report_order = NULL WHERE seq IN "
    "(SELECT seq FROM messages WHERE sent_ts IS NULL AND error_ts IS NULL "
    "AND deferred_ts IS NOT NULL AND deferred_ts <= :now ORDER BY deferred_ts LIMIT :most) RETURNING account_id"
)
ENDED = "seq, id, account_id, recipients, deferred_ts IS NOT NULL"  # and the reason for which _end() ends it
EXPIRED = (
    f"SELECT {ENDED}, 'expired: expires_ts has passed' || coalesce('; last: ' || error, '') FROM messages "  # noqa: S608
    "WHERE sent_ts IS NULL AND error_ts IS NULL AND expires_ts IS NOT NULL AND expires_ts <= :now "
    "ORDER BY expires_ts LIMIT :most"
)
# When something is due or expires next; text, in a damaged row, is larger than any number.
NEXT_TS = (
    "SELECT min(ts) FROM (SELECT min(deferred_ts) AS ts FROM messages WHERE sent_ts IS NULL "
    "AND error_ts IS NULL AND deferred_ts IS NOT NULL AND deferred_ts <= :largest "
    "UNION ALL SELECT min(expires_ts) FROM messages WHERE sent_ts IS NULL AND error_ts IS NULL "
    "AND expires_ts IS NOT NULL AND (expires_ts > :now OR :more) AND expires_ts <= :largest) AS times"
)
# An account's mail that is ready, or waits for its server or its limit, and could have gone before that moment.
AGED = (
    f"SELECT {ENDED}, 'expired: max_age_seconds reached; last: ' || :last FROM messages "  # noqa: S608
    "WHERE account_id = :account AND ready_at <= :before AND sent_ts IS NULL AND error_ts IS NULL "
    "AND (deferred_ts IS NULL OR deferral IN ('limit', 'connection', 'login')) AND turn < 2 ORDER BY ready_at LIMIT :most"
)
# A failed message gets a new life.
QUEUE_ANEW = (
    "UPDATE messages SET error_ts = NULL, error = NULL, attempts = 0, reported_ts = NULL, "
    "turn = CASE WHEN batch_code IN (SELECT value FROM json_each(:suspended)) THEN 2 ELSE 0 END, "
    "report_order = NULL, ready_at = :ready_at, updated_at = :now, deferred_ts = :deferred, deferral = :deferral, "
    "expires_ts = :expires, recipients = :recipients WHERE seq = :seq AND error_ts IS NOT NULL"
)
# The numbers given last, in a file.
NUMBERS_OF_FILE = (
    "SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'messages'), 0), "
    "coalesce((SELECT max(report_order) FROM messages WHERE report_order IS NOT NULL), 0)"
)
ONE_MORE = (
    "INSERT INTO switches VALUES (:name, 1) ON CONFLICT (name) DO UPDATE SET value = switches.value + 1 RETURNING value"
)


class Submission(NamedTuple):
    """A judged message as the queue stores it; _insert goes by the order of its fields."""

    id: str
    account_id: str
    priority: int
    deferred_ts: int | None
    expires_ts: int | None
    batch_code: str | None
    message_id: str
    parts: int
    addressees: int
    subject: str | None
    payload: str
    contents: Mapping[int, bytes]
    sought: str
    flaw: str | None = None  # why it cannot be stored; but it may be known
    once: bool = False  # what is in doubt is not sent again


Compared: TypeAlias = tuple[Submission, int | None, bool]  # the row of its id, and whether that says the same
States: TypeAlias = dict[int, dict[str, object]]  # that the upstream has not acknowledged, by their place in the order


class Outcome(NamedTuple):
    """One claimed message and what to record of it."""

    claim: Claim
    attempt: Attempt
    disposition: Disposition
    sent: int  # slots of the rate limits that it has used


class Order(NamedTuple):
    """What a lane asks for: so many ready messages of an account."""

    account_id: str
    most: int
    retried_first: bool  # whose turn it is within a priority
    passed_over: frozenset[int] = frozenset()  # but none of these
    renewed: int = 0  # how often the account was set or activated, as far as is known here


class Tally(NamedTuple):
    ready: int
    waiting: int
    unreported: int


class Standing(NamedTuple):
    """What outlives the lane of an account."""

    sends: Sequence[tuple[int, int]]  # counted for its limits: (until, n)
    suspended: bool
    held_back: bool  # some of its mail waits for its limits


class Known(NamedTuple):
    """What was set over HTTP, on whichever node."""

    definitions: dict[str, str]  # of the accounts that were added
    switches: dict[str, int]  # commands of all nodes, too: how often they were given
    suspended: dict[str, int]  # accounts
    batches: dict[str, int]  # that are suspended


class Record(NamedTuple):
    """A message as it stands, for people: its row and the submitted payload."""

    seq: int
    fields: dict[str, object]
    payload: dict[str, object]
    size_bytes: int


class Queue:
    """The messages, accounts and counts of the daemon; the file is the truth."""

    def __init__(self, file: QueueFile, *, now: Callable[[], float]) -> None:
        self.file = file
        file.on_change = self._read_batches
        self._now = now
        self._on_wire: dict[int, Claim] = {}  # changed in the writer's thread; in the loop's only to take claims out
        self.suspended_batches: set[str] = set()
        self._aged: dict[str, tuple[float, str]] = {}  # by account: what give_up_aged is asked for
        self._reported = 0  # the highest place acknowledged: what an index still has before it is dead
        self.next_ts: float = 0  # no row is due, or to be given up, before that; 0: look
        self.new_ids = 0  # accepted so far, by ids that were not there

    @property
    def in_delivery(self) -> int:
        return len(self._on_wire)

    async def load(self) -> None:
        """Take up the counters where the last run left them. Raises StorageUnavailable unless the file can be written."""

        def work(db: Database) -> object:
            if isinstance(db, sqlite3.Connection):
                self.file.last_seq, self.file.last_report = db.execute(NUMBERS_OF_FILE).fetchone()
            self._read_batches(db)
            return db.execute("SELECT 1 FROM switches WHERE name = 'moved'").fetchone()

        if await self.file.write(work):
            raise ConfigurationError(f"the queue {self.file.path} was moved by `mailproxy import`; start the other one")
        await self.answers()
        self._reported = 0
        for batch_code in self.suspended_batches:  # the last run may have ended amid this
            await self._mark_batch(batch_code, 2)

    def _read_batches(self, db: Database) -> None:
        self.suspended_batches = {row[0] for row in db.execute("SELECT batch_code FROM suspended_batches")}

    async def _do(self, *statements: str, **values: object) -> int:
        """Run statements as one piece of work; return the number of rows that the last one changed."""
        return await self.file.write(lambda db: [db.execute(sql, values) for sql in statements][-1].rowcount)

    async def _ask(self, sql: str, **values: object) -> list[dict[str, Any]]:
        """Read rows, each as {column: value}."""
        return await self.file.read(lambda db: list(_named(db.execute(sql, values))))

    # -- submission

    async def accept(self, submissions: Sequence[Submission]) -> list[str | None]:
        """Store each submission or say why not: None is stored, KNOWN changes nothing; both are on disk.

        What came again is compared on the reading connection, and decided in the writer's thread if its row is
        still the same then.
        """
        verdicts = list(await self.file.write_together(self._insert, submissions))
        self.new_ids += verdicts.count(None)
        while True:
            times = [ts for one in submissions for ts in one[3:5] if ts]  # deferred_ts, expires_ts
            self.next_ts = min([self.next_ts, *times])
            if UNDECIDED not in verdicts:
                return verdicts
            left = [n for n, verdict in enumerate(verdicts) if verdict == UNDECIDED]
            compared: list[Compared] = []
            for start in range(0, len(left), 20):  # the reading connection has others to serve
                some = [submissions[n] for n in left[start : start + 20]]
                compared += await self.file.read(functools.partial(_compared, some))
            for n, verdict in zip(left, await self.file.write_together(self._decide_all, compared), strict=True):
                verdicts[n] = verdict

    def _decide_all(self, db: Database, batches: Sequence[Sequence[Compared]]) -> list[list[str | None]]:
        """The verdicts on submissions that were compared with a row (None: there was none), from what is there now;
        those that replace others are stored in one go."""
        new: list[Submission] = []
        ids = [one.id for batch in batches for one, _, _ in batch]
        sent = db.execute("SELECT id FROM sent_ids WHERE id IN (SELECT value FROM json_each(:ids))", {"ids": ids})
        found, gone = _rows_of(db, ids), {row[0] for row in sent}
        on_wire = self._on_the_wire(db, [seq for batch in batches for _, seq, _ in batch if seq is not None])

        def verdict(submission: Submission, seq: int | None, is_same: bool) -> str | None:
            none = None, submission.id in gone, False, "", None
            seq_now, is_sent, has_failed, _, recipients = found.get(submission.id, none)
            if seq_now != seq:
                return UNDECIDED
            if (is_same and not has_failed) or (is_sent and seq is None):
                return KNOWN
            if submission.flaw is not None:
                return submission.flaw
            if is_same and seq is not None:
                self._queue_anew(db, seq, _recipients_of(recipients) or {}, submission)
                return None
            if is_sent or '["sent"' in (recipients or ""):
                return "already sent"
            if seq in on_wire and not has_failed:
                return "in delivery"
            db.execute("DELETE FROM messages WHERE seq = :seq AND sent_ts IS NULL", {"seq": seq})
            new.append(submission)
            return STORE

        decided = [[verdict(*one) for one in batch] for batch in batches]
        (stored,) = map(iter, self._insert(db, [new]))
        return [[next(stored) if one == STORE else one for one in batch] for batch in decided]

    def _queue_anew(self, db: Database, seq: int, outcomes: Outcomes, by: Submission | None = None) -> Outcomes | None:
        """Give a failed message a new life; return its recipients, of whom those served stay so, and with `once`
        those in doubt. When nobody is left it ends again."""
        now, (deferred_ts, expires_ts, once) = self._now(), (*by[3:5], by.once) if by else (None, None, False)
        done = {
            address: outcome for address, outcome in outcomes.items()
            if outcome.status is Status.SENT or (once and outcome.text.startswith(IN_DOUBT))
        }  # fmt: skip
        recipients = {address: done.get(address, UNTRIED) for address in outcomes} if done else None
        waits = deferred_ts if deferred_ts is not None and deferred_ts > now else None
        values = {
            "seq": seq, "now": int(now), "ready_at": waits or now, "deferred": waits, "expires": expires_ts,
            "deferral": "schedule" if waits else None, "recipients": as_json(recipients) if recipients else None,
            "suspended": list(self.suspended_batches),
        }  # fmt: skip
        db.execute(QUEUE_ANEW, values)
        if recipients == done:
            self._give_up(db, seq, next(iter(done.values())).text, recipients)
        return recipients

    def _insert(self, db: Database, batches: Sequence[Sequence[Submission]]) -> list[list[str | None]]:
        """Store the submissions of several callers. Most ids were never seen before: those that were stay undecided."""
        submissions = [one for batch in batches for one in batch if one.flaw is None]
        now, first = self._now(), self.file.last_seq + 1
        at = int(now)
        self.file.last_seq += len(submissions)
        rows, most_at_once, inserted, done = [], 32, list[Any](), 0
        for seq, s in enumerate(submissions, first):
            waits = s.deferred_ts is not None and s.deferred_ts > now
            schedule = (s.deferred_ts, "schedule", s.deferred_ts) if waits else (None, None, now)
            size_bytes = len(s.payload) + (sum(map(len, s.contents.values())) if s.contents else 0)
            turn = 2 if s.batch_code in self.suspended_batches else 0
            rows.append((seq, *s[:3], at, at, *schedule, turn, *s[4:11], size_bytes))
            if size_bytes > SMALL_PAYLOAD_BYTES:  # a statement keeps what was bound to it last
                most_at_once = 1
        while done < len(rows):
            n = min(most_at_once, 1 << (len(rows) - done).bit_length() - 1)
            inserted.append(db.execute(INSERT_ROWS[n], list(itertools.chain.from_iterable(rows[done : done + n]))))
            done += n
        stored = [True] * len(rows)
        if sum(cursor.rowcount for cursor in inserted) < len(rows):
            there = {row[0] for row in db.execute("SELECT seq FROM messages WHERE seq >= :first", {"first": first})}
            stored = [row[0] in there for row in rows]
        new = list(itertools.compress(zip(rows, submissions, strict=True), stored))
        for (account_id, waits), n in collections.Counter((s.account_id, row[6] is not None) for row, s in new).items():
            db.execute(
                "INSERT INTO tallies VALUES (:account, :ready, :waiting, 0) ON CONFLICT (account_id) DO UPDATE SET "
                "ready = tallies.ready + excluded.ready, waiting = tallies.waiting + excluded.waiting",
                {"account": account_id, "ready": 0 if waits else n, "waiting": n if waits else 0},
            )
        contents = [(row[0], *content) for row, s in new if s.contents for content in s.contents.items()]
        if contents:
            db.executemany("INSERT INTO contents VALUES (?, ?, ?)", contents)
        for start in range(0, len(rows), SOUGHT_TOGETHER):
            some = slice(start, start + SOUGHT_TOGETHER)
            if any(stored[some]):
                texts = [s.sought for s in submissions[some]]
                values = [first + start + len(texts) - 1, first + start, at, NEXT_SOUGHT.join(texts)]
                db.execute("INSERT INTO sought VALUES (?, ?, ?, ?)", values)
        told = iter(stored)
        return [[None if one.flaw is None and next(told) else UNDECIDED for one in batch] for batch in batches]

    # -- delivery

    def _on_the_wire(self, db: Database, seqs: list[int]) -> Set[int]:
        """What is on the wire here, and of these rows those that another daemon has there."""
        if not self.file.instance:
            return self._on_wire.keys()
        found = db.execute(CLAIMED_BY_OTHERS, {"seqs": seqs, "instance": self.file.instance})
        return self._on_wire.keys() | {row[0] for row in found}

    async def claim(self, orders: Sequence[Order]) -> list[list[Claim]]:
        """Take out ready messages for each order, best first; they are on the wire from now on. There are none for a
        lane that another daemon has."""
        taken: list[list[Claim]] = []

        def work(db: Database, _: object) -> list[None]:
            instance, on_wire = self.file.instance, list(self._on_wire.values())  # the loop may take some out meanwhile
            which, asked = f"WHERE {LEASED} AND {READY}" if instance else f"WHERE {READY}", []
            for order in orders:  # all are asked for before the first is read
                left_out = [one.seq for one in on_wire if one.account_id == order.account_id] + list(order.passed_over)
                values = {"account": order.account_id, "most": order.most, "on_wire": left_out, "instance": instance}
                values |= {"small": SMALL_PAYLOAD_BYTES, "renewed": order.renewed}
                asked.append([_rows(db, CLAIM_COLUMNS, which, values | {"turn": turn}) for turn in (0, 1)])
            for order, both in zip(orders, asked, strict=True):
                taken.append(_best(order, both))
                self._on_wire.update((claim.seq, claim) for claim in taken[-1])
            if instance and any(taken):
                db.execute(CLAIM, {"seqs": [one.seq for claims in taken for one in claims], "instance": instance})
            return [None]

        answer = self.file.write_together(work, None)
        try:
            await asyncio.shield(answer)
        except BaseException:  # also when the caller was cancelled: then as soon as they are taken out
            answer.add_done_callback(lambda _: self.release(itertools.chain.from_iterable(taken)))
            raise
        return taken

    def release(self, claims: Iterable[Claim]) -> None:
        """Put claims back untouched: they were never on the wire."""
        for claim in claims:
            self._on_wire.pop(claim.seq, None)
            self.next_ts = min(self.next_ts, claim.expires_ts or math.inf)
        if self.file.instance:
            with contextlib.suppress(StorageUnavailable):
                self.file.write_together(self._unclaim, None).add_done_callback(lambda told: told.exception())

    def _unclaim(self, db: Database, released: Sequence[Any]) -> Sequence[Any]:
        """Delete the claims of this daemon that it does not know of."""
        db.execute(UNCLAIM, {"instance": self.file.instance, "on_wire": list(self._on_wire)})
        return released

    async def record(self, outcome: Outcome) -> None:
        """Write what became of a claim; unless it goes on, it is off the wire then."""
        await self.file.write_together(self._record_all, outcome)
        claim, disposition = outcome.claim, outcome.disposition
        if disposition.status is not Status.QUEUED:
            self._on_wire.pop(claim.seq, None)
        self.next_ts = min(self.next_ts, disposition.deferred_ts or math.inf, claim.expires_ts or math.inf)

    def _record_all(self, db: Database, outcomes: Sequence[Outcome]) -> Sequence[None]:
        told: list[None] = [None] * len(outcomes)
        outcomes = self._still_ours(db, outcomes) if self.file.instance else outcomes
        places: dict[int, int] = {}
        for claim, _, disposition, _ in outcomes:
            if disposition.status is Status.SENT and disposition.error is None and disposition.recipients is None:
                self.file.last_report = places[claim.seq] = self.file.last_report + 1
            else:
                db.execute(SETTLE, self._settled(claim.seq, disposition))
        if places:
            db.execute(SETTLE_SENT, {"now": int(self._now()), "places": as_json(places)})
        tried = [_timeline_entry(outcome) for outcome in outcomes if outcome.attempt.replies]
        for some in (tried[start : start + 16] for start in range(0, len(tried), 16)):
            db.execute(INSERT_ATTEMPTS[len(some)], list(itertools.chain.from_iterable(some)))
        sends = collections.Counter[str]()
        for one in outcomes:
            sends[one.claim.account_id] += one.sent
        for account_id, n in (+sends).items():
            db.execute(
                "INSERT INTO sends VALUES (:account, :until / 60, :until, :n) ON CONFLICT (account_id, minute) "
                "DO UPDATE SET until_ts = excluded.until_ts, n = sends.n + excluded.n",
                {"account": account_id, "until": int(self._now()) + 1, "n": n},
            )
        return told

    def _still_ours(self, db: Database, outcomes: Sequence[Outcome]) -> Sequence[Outcome]:
        """Those to be recorded: what was sent is in any case, another outcome only while the claim stands, which ends
        with it unless the turn goes on. Another daemon may have taken the lane over meanwhile."""
        seqs = [one.claim.seq for one in outcomes if one.disposition.status is not Status.SENT]
        ended = [one.claim.seq for one in outcomes if one.disposition.status is not Status.QUEUED]
        instance = self.file.instance
        claimed = db.execute(CLAIMED, {"seqs": seqs, "instance": instance}) if seqs else ()
        db.execute(SETTLED, {"seqs": ended, "instance": instance})
        ours = {row[0] for row in claimed}
        return [one for one in outcomes if one.disposition.status is Status.SENT or one.claim.seq in ours]

    def _settled(self, seq: int, disposition: Disposition) -> dict[str, object]:
        """The values for SETTLE; all but a turn that goes on have the next place in the order of reports."""
        status, now, place = disposition.status, int(self._now()), None
        if status is not Status.QUEUED:
            self.file.last_report = place = self.file.last_report + 1
        return {
            "seq": seq, "now": now, "place": place,
            "sent": now if status is Status.SENT else None, "failed": now if status is Status.ERROR else None,
            "error": disposition.error, "deferred": disposition.deferred_ts, "deferral": disposition.reason or None,
            "recipients": as_json(disposition.recipients) if disposition.recipients else None,
            "counted": int(disposition.counted),
        }  # fmt: skip

    async def catch_up(self) -> tuple[set[str], list[tuple[str, str, Disposition]]]:
        """Make the rows ready whose time has come, and end the pending ones that have expired or are too old; return
        the accounts that got mail, and (id, account, how) of each message that ended."""
        values = {"now": int(self._now()), "largest": LARGEST_INTEGER, "most": CHUNK}
        aged, self._aged = self._aged, {}

        def work(db: Database) -> tuple[set[str], list[tuple[str, str, Disposition]], float]:
            released = db.execute(LET_DUE_GO, values).fetchall()
            most = CHUNK + len(self._on_wire)
            rows = db.execute(EXPIRED, values | {"most": most}).fetchall()
            for account_id, (before, last) in list(aged.items()):
                asked = {"account": account_id, "before": before, "last": last, "most": max(0, most - len(rows))}
                rows += db.execute(AGED, asked).fetchall()
                if len(rows) < most:
                    del aged[account_id]
            ended = self._end(db, rows)
            (next_ts,) = db.execute(NEXT_TS, values | {"more": len(ended) >= CHUNK}).fetchone()
            return {row[0] for row in released}, ended, next_ts or math.inf

        self.next_ts, next_ts = math.inf, 0.0  # what changes meanwhile lowers it again
        try:
            accounts, ended, next_ts = await self.file.write(work)
        finally:
            self._aged = aged | self._aged
            self.next_ts = min(self.next_ts, 0 if self._aged else next_ts)
        return accounts, ended

    def give_up_aged(self, account_id: str, before: float, last: str) -> None:
        """The account's server cannot be used, as its `last` words say: have the next turns end what could have
        gone before that moment, but for what is on the wire."""
        self._aged[account_id] = before, last
        self.next_ts = 0

    def _end(self, db: Database, rows: Sequence[Any]) -> list[tuple[str, str, Disposition]]:
        """End these pending messages (rows of ENDED), but for what is on the wire: what waits is not, even if the loop
        has not been told yet that its outcome is on disk. Return (id, account, how) of each that ended."""
        on_wire, ended = self._on_the_wire(db, [row[0] for row in rows]), dict[int, tuple[str, str, Disposition]]()
        for seq, id_, account_id, recipients, waits, why in rows:
            if seq not in ended and (waits or seq not in on_wire):
                ended[seq] = id_, account_id, self._give_up(db, seq, why, _recipients_of(recipients))
        return list(ended.values())

    def _give_up(self, db: Database, seq: int, why: str, recipients: Outcomes | None) -> Disposition:
        """End a pending message: as sent when a server has it for some of its recipients."""
        waits = Disposition(Status.DEFERRED, LaneSignal.NONE, counted=False, slot_used=False, recipients=recipients)
        ended = given_up(waits, why)
        db.execute(SETTLE, self._settled(seq, ended))
        return ended

    async def let_go(self, account_ids: Iterable[str], deferrals: Sequence[str] = HELD_BACK) -> set[str]:
        """Make messages ready that wait for one of these reasons; return which of the accounts got mail."""
        rows = [{"id": id_, "deferrals": list(deferrals)} for id_ in account_ids]
        sql = f"{LET_GO} AND deferral IN (SELECT value FROM json_each(:deferrals)) RETURNING account_id"  # noqa: S608
        return await self.file.write(lambda db: {row[0] for one in rows for row in db.execute(sql, one).fetchall()})

    async def move_times(self, step_s: int, since: int) -> None:
        """The wall clock was set by so much: move what the daemon itself put off, the counts of sends, and
        the ages of its mail, so that nothing comes earlier or later for it.

        What an earlier run put off, before `since`, may be right by the new clock (a machine that
        boots without knowing the time): it is moved only to where it comes earlier.
        """
        values = {"step": step_s, "minutes": round(step_s / 60), "latest": LARGEST_INTEGER, "since": since}
        await self._do(
            "UPDATE messages SET deferred_ts = deferred_ts + :step WHERE sent_ts IS NULL AND error_ts IS NULL "
            "AND deferred_ts IS NOT NULL AND deferral <> 'schedule' AND deferred_ts + :step < :latest "
            "AND (updated_at >= :since OR :step < 0)",
            "UPDATE messages SET ready_at = ready_at + :step WHERE sent_ts IS NULL AND error_ts IS NULL "
            "AND ready_at >= :since AND coalesce(deferral, '') <> 'schedule'",
            "UPDATE sends SET until_ts = until_ts + :step, minute = -(minute + :minutes)",  # no two are ever
            "UPDATE sends SET minute = -minute",  # the same on the way
            **values,
        )
        self.next_ts = 0

    async def payload(self, seq: int) -> str:
        """The payload of a claimed message that was too large to come with its claim."""
        (row,) = await self._ask("SELECT payload FROM messages WHERE seq = :seq", seq=seq)
        return str(row["payload"])

    async def contents(self, seq: int) -> dict[int, bytes]:
        """The inline contents of a message by position (RAW_CONTENT: the raw message)."""
        rows = await self._ask("SELECT position, content FROM contents WHERE seq = :seq", seq=seq)
        return {row["position"]: row["content"] for row in rows}

    # -- reports

    async def unreported(self, most: int) -> States:
        """The oldest states the upstream has not acknowledged, in the order they came about."""
        which = "WHERE report_order > :after ORDER BY report_order LIMIT :most"
        values = {"after": self._reported, "most": most}
        rows = await self.file.read(lambda db: list(_rows(db, STATE_COLUMNS, which, values)))
        self._reported = self._reported if rows else 0  # a database that was restored gives places anew
        states = [dict(zip(STATE_FIELDS, row, strict=True)) for row in rows]
        return {row.pop("report_order"): _with_recipients(row) for row in states}

    async def acknowledge(self, places: Iterable[int]) -> int:
        """Stamp the states the upstream has taken, unless they changed meanwhile; return their number."""
        stamp = (
            "UPDATE messages SET reported_ts = :now, report_order = NULL "
            "WHERE report_order IN (SELECT value FROM json_each(:places))"
        )
        stamped = await self._do(stamp, now=int(self._now()), places=list(places))
        self._reported = max([self._reported, *places])
        return stamped

    # -- what operators and clients ask for

    async def delete(self, ids: Sequence[str]) -> tuple[int, list[str], list[str]]:
        """Remove messages; return how many, the ids not found, and those on the wire (kept)."""

        def work(db: Database) -> tuple[int, list[str], list[str]]:
            found = _rows_of(db, ids)
            taken = self._on_the_wire(db, [row[0] for row in found.values()])
            on_wire = [id_ for id_ in ids if id_ in found and found[id_][0] in taken]
            gone = [row[0] for row in found.values() if row[0] not in taken]
            db.execute("DELETE FROM messages WHERE seq IN (SELECT value FROM json_each(:gone))", {"gone": gone})
            return len(gone), [id_ for id_ in ids if id_ not in found], on_wire

        return await self.file.write(work)

    async def retry(self, ids: Sequence[str], accounts: Set[str]) -> tuple[int, list[str], list[str], list[str]]:
        """Queue failed messages anew; recipients that are served stay served. Return how many, the ids not found,
        those not failed, and those that have failed again, for their account is none of these."""

        def work(db: Database) -> tuple[int, list[str], list[str], list[str]]:
            found, not_failed, of_no_account = _rows_of(db, ids), [], []
            for id_, (seq, _, is_failed, account_id, recipients) in found.items():
                if not is_failed:
                    not_failed.append(id_)
                    continue
                outcomes = self._queue_anew(db, seq, _recipients_of(recipients) or {})
                if account_id not in accounts:
                    self._give_up(db, seq, "account not found", outcomes)
                    of_no_account.append(id_)
            queued = len(found) - len(not_failed) - len(of_no_account)
            return queued, [id_ for id_ in ids if id_ not in found], not_failed, of_no_account

        self.next_ts = 0
        return await self.file.write(work)

    async def purge(self, older_than_s: float, *, unreported_too: bool) -> int:
        """Remove some final messages reported (or, with no upstream, final) longer ago; 0: none is left."""
        values = {"before": int(self._now() - older_than_s), "unreported_too": unreported_too, "most": CHUNK}
        return await self._do(
            "DELETE FROM messages WHERE seq IN (SELECT seq FROM messages WHERE report_order IS NULL "
            "AND (sent_ts IS NOT NULL OR error_ts IS NOT NULL) AND reported_ts <= :before "
            "UNION ALL SELECT seq FROM messages WHERE :unreported_too AND report_order IS NOT NULL "
            "AND (sent_ts IS NOT NULL OR error_ts IS NOT NULL) AND coalesce(sent_ts, error_ts) <= :before LIMIT :most)",
            **values,
        )

    async def forget(self, id_retention_s: float) -> int:
        """Forget the counts of sends that no window sees any more, and some ids of purged messages whose time
        is over; 0: none is left."""
        now = self._now()
        values = {"oldest": int(now) // 60 - 24 * 60 - 1, "before": int(now - id_retention_s), "most": CHUNK}
        return await self._do(
            "DELETE FROM sends WHERE minute < :oldest",
            "DELETE FROM sent_ids WHERE id IN (SELECT id FROM sent_ids WHERE sent_ts <= :before LIMIT :most)",
            **values,
        )

    async def look_up(self, id_: str) -> tuple[Record, list[dict[str, object]]] | None:
        """A message and the timeline of its attempts, or None."""
        found = await self._ask(RECORD_OF_ID, id=id_, now=self._now())
        if not found:
            return None
        record = _record(found[0])
        attempts = await self._ask(
            "SELECT CAST(started_at AS INTEGER) AS started_at, CAST(ended_at AS INTEGER) AS ended_at, outcome, stage, "
            "code, enhanced_code, text, recipients, connection FROM attempts WHERE seq = :seq ORDER BY number",
            seq=record.seq,
        )
        return record, [_with_recipients(row) for row in attempts]

    async def as_claim(self, id_: str) -> Claim | None:
        """A message as claim() hands it out, but without its payload, and not taken out; or None."""
        rows = await self._ask(f"SELECT {CLAIM_COLUMNS} FROM messages WHERE id = :id", id=id_, small=0)  # noqa: S608
        return _claim_of(list(rows[0].values())) if rows else None

    async def page(
        self, after: int | None, most: int, *, order: str = "asc", active_only: bool = False, **only: Any
    ) -> tuple[list[Record], int | None]:
        """Up to `most` records in the order of acceptance after a seq (None: from the start), or with "desc" newest
        first before it, and the seq to go on from (None: end); `only` has the status, account_id, batch_code wanted, a
        recipient `to`, a part of the `subject`, `since`, `until`, `refused`.

        A page ends after some milliseconds, so it may be short, or empty, before the end.
        """
        newest_first = order == "desc"
        if after is None:
            after = LARGEST_INTEGER if newest_first else 0
        anything = dict.fromkeys(("status", "account_id", "batch_code"))
        values = {**anything, "since": 0, "until": LARGEST_INTEGER, "refused": False, **only}
        values |= {"active_only": active_only, "now": self._now(), "together": SOUGHT_TOGETHER}
        to = values["to"] = f"\n{only['to'].casefold()}\n" if "to" in only else ""
        subject = values["subject"] = only.get("subject", "").casefold()
        there = ALL
        if values["refused"] or values["status"] == Status.ERROR:
            there = REFUSED
        elif active_only or values["status"] in (Status.QUEUED, Status.DEFERRED):
            there = PENDING
        searches = to or subject or (there is ALL and only.keys() & {"since", "until"})
        first_of, beyond, order = ("max", "<", "DESC") if newest_first else ("min", ">", "ASC")
        next_seq = f"SELECT {first_of}(seq) FROM messages {there} seq {beyond} :after"  # noqa: S608 - constants only
        which = f"{FOUND if searches else there} {CHOSEN} {order} LIMIT :most"
        chosen = f"SELECT {RECORD_COLUMNS} FROM messages {which}"  # noqa: S608 - constants only

        def work(db: Database) -> tuple[list[Record], int | None]:
            records, size_bytes, at, ends_at = list[Record](), 0, after, time.monotonic() + READING_S
            while at == after or time.monotonic() < ends_at:
                first = db.execute(next_seq, {"after": at}).fetchone()[0]
                if first is None:
                    return records, None
                at = first + (1 - LOOK if newest_first else LOOK - 1)
                values.update(first=min(first, at), last=max(first, at), most=most - len(records))
                if searches:
                    found = [
                        first_seq + n
                        for first_seq, text in db.execute(SEARCH, values)
                        for n, one in enumerate(text.split(NEXT_SOUGHT))
                        if to in one and subject in one.partition("\t")[2]
                    ]
                    if not found:
                        continue
                    values["seqs"] = found
                for row in _named(db.execute(chosen, values)):
                    size_bytes += len(row["payload"])
                    records.append(_record(row))
                    if len(records) == most or size_bytes > PAGE_BYTES:
                        return records, records[-1].seq
            return records, at

        return await self.file.read(work)

    async def tallies(self) -> tuple[dict[str, Tally], int | None, int]:
        """The counts of each account that ever had a message; when the oldest undelivered one was accepted; how many
        were given up and are in the table."""
        rows = await self._ask("SELECT account_id, ready, waiting, unreported FROM tallies")
        (found,) = await self._ask(  # where nothing is pending, an index may hold many dead entries
            "SELECT n, CASE WHEN EXISTS (SELECT 1 FROM tallies WHERE ready > 0 OR waiting > 0) THEN (SELECT created_at "
            "FROM messages WHERE sent_ts IS NULL AND error_ts IS NULL ORDER BY seq LIMIT 1) END AS oldest FROM failures"
        )
        return {row.pop("account_id"): Tally(**row) for row in rows}, found["oldest"], found["n"]

    async def answers(self) -> None:
        """Raise StorageUnavailable unless the file can be written now: it is tried."""
        if self.file.refuses:
            self.release(())
        await self.count("answers")  # a value that changes: SQLite writes nothing where nothing does

    # -- accounts and switches

    async def accounts(self) -> dict[str, str]:
        """The definitions of the accounts that were added over HTTP."""
        return {row["id"]: row["definition"] for row in await self._ask("SELECT id, definition FROM accounts")}

    async def known(self) -> Known:
        """What was set over HTTP, on whichever node."""
        asked = "name, value FROM switches", "account_id, 1 FROM suspensions", "batch_code, 1 FROM suspended_batches"
        tables = await self.file.read(lambda db: [dict(db.execute(f"SELECT {one}").fetchall()) for one in asked])
        return Known(await self.accounts(), *tables)

    async def put_account(self, account_id: str, definition: str) -> None:
        """Store an account; its mail that was held back under an older definition is ready."""
        await self._do(
            "INSERT INTO accounts VALUES (:id, :definition) "
            "ON CONFLICT (id) DO UPDATE SET definition = excluded.definition",
            LET_GO, id=account_id, definition=definition,
        )  # fmt: skip

    async def delete_account(self, account_id: str) -> None:
        """Remove the account's definition and suspension; its messages are failed by fail_orphans."""
        gone = "DELETE FROM accounts WHERE id = :id", "DELETE FROM suspensions WHERE account_id = :id"
        await self._do(*gone, id=account_id)

    async def fail_orphans(self, account_id: str, why: str) -> list[Disposition]:
        """End a deleted account's undelivered messages, some in each commit; return how each did."""
        ended, after = list[Disposition](), cast(int | None, 0)
        pending = f"SELECT {ENDED}, :why FROM messages {PENDING} seq > :after ORDER BY seq LIMIT :most"  # noqa: S608

        def work(db: Database) -> tuple[list[Disposition], int | None]:
            rows = db.execute(pending, {"after": after, "why": why, "most": STRETCH}).fetchall()
            some = self._end(db, [row for row in rows if row[2] == account_id])
            return [how for *_, how in some], rows[-1][0] if len(rows) == STRETCH else None

        while after is not None:
            some, after = await self.file.write(work)
            ended += some
        return ended

    async def suspend(self, account_id: str) -> None:
        await self._do("INSERT INTO suspensions VALUES (:id) ON CONFLICT DO NOTHING", id=account_id)

    async def activate(self, account_id: str) -> None:
        """End the suspension of an account; its mail that was held back is ready."""
        await self._do("DELETE FROM suspensions WHERE account_id = :id", LET_GO, id=account_id)

    async def suspend_batch(self, batch_code: str) -> bool:
        """Keep a batch, and what is submitted to it later, from being claimed; True when some of it is claimed now."""
        await self._do("INSERT INTO suspended_batches VALUES (:code) ON CONFLICT DO NOTHING", code=batch_code)
        self.suspended_batches.add(batch_code)  # before the rows are looked at: those to come are marked
        return await self._mark_batch(batch_code, 2)

    async def activate_batch(self, batch_code: str) -> None:
        """End the suspension of a batch; should it be broken off, a restart begins with the batch suspended."""
        self.suspended_batches.discard(batch_code)
        since = {"first": self.file.last_seq, "last": LARGEST_INTEGER, "most": LARGEST_INTEGER}
        await self._mark_batch(batch_code, 0)
        ended = "DELETE FROM suspended_batches WHERE batch_code = :batch_code"
        await self._do(ended, SUSPEND, batch_code=batch_code, suspended=0, **since)  # other nodes' mail that came since
        self.suspended_batches.discard(batch_code)  # which may have been read again meanwhile

    async def _mark_batch(self, batch_code: str, suspended: int) -> bool:
        """Have the pending messages of a batch in the part of the index that claims look at (0), or in the other (2);
        True when some are on the wire. Each commit changes few rows: nobody waits for it for long."""
        values = {"batch_code": batch_code, "suspended": suspended, "most": CHUNK}
        after, on_wire = cast(int | None, 0), False

        def work(db: Database) -> tuple[list[int], int | None]:
            first = db.execute(NEXT_PENDING, {"after": after}).fetchone()[0]
            if first is None:
                return [], None
            last = first + STRETCH - 1
            changed = [row[0] for row in db.execute(SUSPEND, {**values, "first": first, "last": last}).fetchall()]
            return changed, max(changed) if len(changed) == CHUNK else last

        while after is not None:
            changed, after = await self.file.write(work)
            on_wire = on_wire or not self._on_wire.keys().isdisjoint(changed)
        return on_wire

    async def count(self, command: str) -> int:
        """Let other nodes see that there was a command; return how many there were."""
        return int(await self.file.write(lambda db: db.execute(ONE_MORE, {"name": command}).fetchone()[0]))

    async def set_switch(self, name: str, value: bool) -> None:
        switched = "INSERT INTO switches VALUES (:name, :value) ON CONFLICT (name) DO UPDATE SET value = excluded.value"
        await self._do(switched, name=name, value=int(value))

    async def standing(self, account_id: str) -> Standing:
        """What the last run, or an earlier account of this id, left behind for a lane."""
        sends = await self._ask("SELECT until_ts, n FROM sends WHERE account_id = :id ORDER BY minute", id=account_id)
        (found,) = await self._ask(
            "SELECT EXISTS (SELECT 1 FROM suspensions WHERE account_id = :id) AS suspended, "
            "EXISTS (SELECT 1 FROM messages WHERE account_id = :id AND deferral = 'limit' "
            "AND deferral IN ('limit', 'connection', 'login') AND deferred_ts IS NOT NULL) AS held_back",
            id=account_id,
        )
        counted = [(row["until_ts"], row["n"]) for row in sends]
        return Standing(counted, bool(found["suspended"]), bool(found["held_back"]))


def _compared(submissions: Sequence[Submission], db: Database) -> list[Compared]:
    """Submissions beside the rows that have their ids."""
    compared, row_of_id = [], "SELECT seq, payload, priority FROM messages WHERE id = :id"
    parts_of_id = "SELECT position, content FROM contents WHERE seq = (SELECT seq FROM messages WHERE id = :id)"
    asked = [[db.execute(sql, {"id": one.id}) for sql in (row_of_id, parts_of_id)] for one in submissions]
    for one, (row, parts) in zip(submissions, asked, strict=True):
        seq, payload, priority = row.fetchone() or (None, "", 0)
        given, stored = (one.payload, one.contents, one.priority), (payload, dict(parts.fetchall()), priority)
        is_same = given == stored or ((meaning := content_of(*given)) is not None and meaning == content_of(*stored))
        compared.append((one, seq, is_same))
    return compared


def _rows_of(db: Database, ids: Sequence[str]) -> dict[str, Sequence[Any]]:
    """The seq of each id that is there, whether it was sent and has failed, its account and recipients."""
    rows = db.execute(
        "SELECT id, seq, sent_ts IS NOT NULL, error_ts IS NOT NULL, account_id, recipients FROM messages "
        "WHERE id IN (SELECT value FROM json_each(:ids))",
        {"ids": list(ids)},
    )
    found = {row[0]: row[1:] for row in rows}
    return {id_: found[id_] for id_ in ids if id_ in found}  # in this order; SQLite ends what was asked at a NUL


def sought(recipients: Iterable[str], subject: str) -> str:
    """What a search looks at, its case folded: a line for each recipient, and the subject after a tab."""
    return "\n".join(("", *recipients, f"\t{subject}")).casefold()


def sought_of_payload(payload: str) -> str:
    """The same of a stored payload; "" when it cannot be read."""
    with contextlib.suppress(ValueError, AttributeError, Rejected):
        fields = json.loads(payload)
        mailboxes = (mailbox for name in ("to", "cc", "bcc") for mailbox in parse_mailboxes(fields.get(name), name))
        return sought((mailbox.address for mailbox in mailboxes), str(fields.get("subject", "")))
    return ""


USED_BY_MIGRATIONS = (sought_of_payload, subject_of_raw, str.casefold)


def _named(rows: Any) -> Iterator[dict[str, Any]]:
    """The rows of a cursor, each as {column: value}."""
    names = [column[0] for column in rows.description]
    return (dict(zip(names, row, strict=True)) for row in rows)


def _rows(db: Database, columns: str, which: str, values: Mapping[str, object]) -> Iterable[Sequence[Any]]:
    """All these rows at once, as one JSON text: for each by itself the threads would hand the interpreter over."""
    if isinstance(db, sqlite3.Connection):
        with contextlib.suppress(sqlite3.OperationalError, ValueError):  # a damaged one, that is no JSON
            lines = f"SELECT json_array({columns}) AS line FROM messages {which}"  # noqa: S608 - constants only
            (text,) = db.execute(f"SELECT coalesce(group_concat(line), '') FROM ({lines})", values).fetchone()  # noqa: S608
            return cast(list[Sequence[Any]], read_json(f"[{text}]")[0])
    return cast(Iterable[Sequence[Any]], db.execute(f"SELECT {columns} FROM messages {which}", values))  # noqa: S608


def _best(order: Order, both: Sequence[Iterable[Any]]) -> list[Claim]:
    """The best of what is ready: by priority, and within one new and retried mail in turn."""
    ranked: list[tuple[int, int, bool, Claim]] = []
    for turn, rows in enumerate(both):
        places = collections.Counter[int]()
        for claim in map(_claim_of, rows):
            ranked.append((claim.priority, places[claim.priority], bool(turn) != order.retried_first, claim))
            places[claim.priority] += 1
    ranked.sort(key=lambda entry: entry[:3])
    return [claim for *_, claim in ranked[: order.most]]


def _claim_of(row: Sequence[Any]) -> Claim:
    """A claim of a row; a damaged one has no payload, and so fails by itself when it is composed: what was sent,
    and to whom, must not be guessed."""
    recipients = _recipients_of(row[9])
    numbers = (row[3], *row[5:8], row[8] or 0, *row[10:12], row[13])
    if (recipients is None) != (row[9] is None) or not {int, float}.issuperset(map(type, numbers)):
        return Claim(row[0], row[1], row[2], 0, "", 0, 0.0, 0, None, None, 0, 0, "")
    left = row[13]
    if recipients:  # at least one is left, whatever an earlier program counted
        left = max(1, left - sum(outcome.status is not Status.DEFERRED for outcome in recipients.values()))
    return Claim._make((*row[:9], recipients, *row[10:13], left, False, 1, False))


def _recipients_of(column: str | None) -> Outcomes | None:
    """What became of each recipient; None when nothing is known, or the column is damaged."""
    if column is None:
        return None
    try:
        return {
            address: RecipientOutcome(Status(status), code, text)
            for address, (status, code, text) in json.loads(column).items()
        }
    except (ValueError, TypeError, AttributeError):
        return None


def _with_recipients(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its column of recipients as people see it: the code stands beside the text, not in it."""
    outcomes, shown = _recipients_of(row["recipients"]), {}
    for address, outcome in (outcomes or {}).items():
        code = rf"^({IN_DOUBT})?{outcome.code}(?: [245]\.\d+\.\d+)?(?: |$)"
        shown[address] = {**outcome._asdict(), "text": re.sub(code, r"\1", str(outcome.text))}
    row["recipients"] = shown or outcomes
    return row


def _record(row: dict[str, Any]) -> Record:
    """A record; without the payload that was submitted when it cannot be read any more."""
    seq, size_bytes, column, subject = (row.pop(name) for name in ("seq", "size_bytes", "payload", "subject"))
    try:
        payload = json.loads(column)
    except ValueError:
        payload = None
    payload = payload if isinstance(payload, dict) else {}
    row["subject"] = payload.get("subject") if subject is None else subject
    return Record(seq, _with_recipients(row), payload, size_bytes)


def _timeline_entry(outcome: Outcome) -> tuple[object, ...]:
    """An attempt as a row of attempts, its number left to be found.

    It shows the reply that made the attempt end so: where some recipients were refused, not always the first refusal.
    """
    claim, attempt, disposition, _ = outcome
    replies, sent = attempt.replies.values(), disposition.status is Status.SENT
    made_it_so = (reply for reply in replies if (reply.accepted if sent else spoken(reply) == disposition.error))
    telling = next(made_it_so, None) or attempt.first_failure or next(iter(replies))
    recipients = {
        address: ("sent" if reply.accepted else "deferred" if reply.transient else "error", reply.code, reply.text)
        for address, reply in attempt.replies.items()
        if address
    }
    when = (claim.seq, claim.seq, attempt.started_at, attempt.ended_at)
    said = (telling.stage, telling.code, telling.enhanced_code, telling.text)
    return (*when, disposition.status, *said, as_json(recipients) if recipients else None, attempt.connection or None)


# ======================================================================
# POSTGRESQL - the same queue in a database that several daemons share
# ======================================================================
#
# A connection behaves as one of sqlite3 does, for the same statements, translated where
# the two languages differ. A statement is sent when somebody looks at its result, or when
# its piece of work ends, with all that wait by then: one round trip. Everything goes by the
# simple query protocol, and nothing outlives its transaction, so poolers may stand in between.
# Whoever writes locks the one row of `counters` from BEGIN to COMMIT: there is one writer at
# a time in all daemons, numbers are given in the order of commits, and nothing deadlocks.

ANSWER_S = 10.0  # so long the database may be silent; then the connection is given up
CONNECT_S = 5
LONG_CONTENT_BYTES = 65_536  # sent as it is; shorter ones as a part of the statement
SCHEMA_LOCK = 0x6D61696C  # of those who start together: one makes the tables
BEGIN = (
    "BEGIN ISOLATION LEVEL READ COMMITTED",
    "SELECT set_config('lock_timeout', '5s', true), set_config('statement_timeout', '30s', true), "
    "set_config('idle_in_transaction_session_timeout', '5s', true), set_config('synchronous_commit', 'off', true)",
    "SELECT last_seq, last_report, changes FROM counters FOR UPDATE",
)
# What waits for the disk is a transaction of its own, while others may write again. It has what was written before it,
# so that nothing is answered, or goes on the wire, that is not on the disk.
END = (
    "COMMIT",
    BEGIN[0],
    "SELECT CASE WHEN current_setting('synchronous_commit') IN ('off', 'local') "
    "THEN set_config('synchronous_commit', 'on', true) END",
    "UPDATE commits SET at = now() WHERE writer = '{}'",
    "COMMIT",
)
# Where SQLite says the one, PostgreSQL says the other.
DIALECT = (
    (r"%", "%%"),
    (r"\bNOT IN \(SELECT value FROM json_each\(:(\w+)\)\)", r"<> ALL (%(\1)s)"),
    (r"\bIN \(SELECT value FROM json_each\(:(\w+)\)\)", r"= ANY (%(\1)s)"),
    (r"\bjson_each\(:(\w+)\)", r"json_each_text(%(\1)s) AS json_each"),
    (r"\b(?:NOT INDEXED|INDEXED BY \w+|OR FAIL) ", ""),
    (r"(WHERE id = column2\))$", r"\1 ORDER BY column1"),  # a hashed anti join has no order
    (r"^INSERT OR IGNORE (.*)", r"INSERT \1 ON CONFLICT DO NOTHING"),
    (r"\(SELECT coalesce\(max.*? WHERE seq = \?\)", "next_attempt(?)"),  # which is planned once
    (r"\binstr\(", "strpos("),
    (r"CAST\((\w+) AS INTEGER\)", r"CAST(trunc(\1) AS BIGINT)"),
    (r":(\w+)", r"%(\1)s"),
    (r"\?", "%s"),
)
DIALECT_OF_SCHEMA = (
    (r"CREATE TRIGGER tally_.*?\nEND;\n", ""),
    (r"WHEN ([^;]*?) BEGIN", r"WHEN (\1) BEGIN"),
    (
        r"CREATE TRIGGER (\w+) (AFTER [\w ]+ ON \w+)(.*?) BEGIN\n(.*?)\nEND;\n",
        r"CREATE FUNCTION \1() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN\n\4\n    RETURN NULL;\nEND $$;\n"
        r"CREATE TRIGGER \1 \2 FOR EACH ROW\3 EXECUTE FUNCTION \1();\n",
    ),
    (r"INTEGER PRIMARY KEY AUTOINCREMENT", "BIGINT PRIMARY KEY"),
    (r"\bINTEGER\b", "BIGINT"),
    (r"\bTEXT\b", 'TEXT COLLATE "C"'),
    (r"\bREAL\b", "DOUBLE PRECISION"),
    (r"\bBLOB\b", "BYTEA"),
    (r" WITHOUT ROWID", ""),
)
# The tallies of SCHEMA, kept once for all rows of a statement; and what only several daemons need.
KEEP_TALLIES = """CREATE FUNCTION tally_{event}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    UPDATE tallies SET ready = tallies.ready + more.ready, waiting = tallies.waiting + more.waiting,
        unreported = tallies.unreported + more.unreported
    FROM (
        SELECT account_id,
            coalesce(sum(n) FILTER (WHERE sent_ts IS NULL AND error_ts IS NULL AND deferred_ts IS NULL), 0) AS ready,
            coalesce(sum(n) FILTER (WHERE sent_ts IS NULL AND error_ts IS NULL AND deferred_ts IS NOT NULL), 0) AS waiting,
            coalesce(sum(n) FILTER (WHERE report_order IS NOT NULL), 0) AS unreported
        FROM (SELECT -1 AS n, * FROM gone {there}) AS changed GROUP BY account_id
    ) AS more
    WHERE tallies.account_id = more.account_id AND (more.ready <> 0 OR more.waiting <> 0 OR more.unreported <> 0);
    RETURN NULL;
END $$;
CREATE TRIGGER tally_{event} AFTER {event} ON messages REFERENCING OLD TABLE AS gone {new}
    EXECUTE FUNCTION tally_{event}();"""
POSTGRES_SCHEMA = f"""
CREATE TABLE counters (last_seq BIGINT NOT NULL, last_report BIGINT NOT NULL, changes BIGINT NOT NULL);
INSERT INTO counters VALUES (0, 0, 0);               -- changes: of what daemons keep in memory
CREATE TABLE nodes (                                 -- the daemons; until_ts by the clock of the database
    node TEXT PRIMARY KEY, instance TEXT NOT NULL UNIQUE, until_ts TIMESTAMP WITH TIME ZONE NOT NULL,
    accounts TEXT NOT NULL, shown TEXT NOT NULL
);
CREATE TABLE leases (account_id TEXT PRIMARY KEY, instance TEXT NOT NULL);  -- '': the reporter; left by its node
CREATE TABLE claims (seq BIGINT PRIMARY KEY, instance TEXT NOT NULL);  -- what is on the wire
CREATE TABLE commits (                               -- the number of each writer's last one
    writer TEXT PRIMARY KEY, number BIGINT NOT NULL, at TIMESTAMP WITH TIME ZONE NOT NULL
);
INSERT INTO switches VALUES ('schema', {{version}});
ALTER TABLE messages SET (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);
CREATE FUNCTION count_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    UPDATE counters SET changes = changes + 1;
    RETURN NULL;
END $$;
CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON accounts EXECUTE FUNCTION count_change();
CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON suspensions EXECUTE FUNCTION count_change();
CREATE TRIGGER changed AFTER INSERT OR UPDATE OR DELETE ON suspended_batches EXECUTE FUNCTION count_change();
CREATE TRIGGER changed AFTER INSERT OR UPDATE ON switches
    FOR EACH ROW WHEN (new.name <> 'answers') EXECUTE FUNCTION count_change();
{KEEP_TALLIES.format(event="UPDATE", there="UNION ALL SELECT 1, * FROM there", new="NEW TABLE AS there")}
{KEEP_TALLIES.format(event="DELETE", there="", new="")}
CREATE FUNCTION next_attempt(BIGINT) RETURNS BIGINT LANGUAGE plpgsql AS $$ BEGIN
    RETURN (SELECT coalesce(max(number), 0) + 1 FROM attempts WHERE seq = $1);
END $$;
"""  # noqa: S608 - constants only


@functools.cache
def translated(sql: str, dialect: Sequence[tuple[str, str]] = DIALECT) -> str:
    """A statement for PostgreSQL, as a template for the % of Python."""
    for ours, theirs in dialect:
        sql = re.sub(ours, theirs, sql, flags=re.DOTALL)
    return sql


def literal(value: Any) -> str:
    """A value as a part of a statement. PostgreSQL knows \\ and ' in E'' only doubled, whatever its settings are."""
    kind = type(value)
    if value is None or kind is int or kind is float or kind is bool:
        return "NULL" if value is None else str(value)
    if kind is bytes:
        return f"decode('{value.hex()}', 'hex')"
    if kind is list:
        of = "TEXT" if any(isinstance(one, str) for one in value) else "BIGINT"
        return f"CAST(ARRAY[{', '.join(map(literal, value))}] AS {of}[])" if value else "'{}'"
    text = value.replace("\\", "\\\\").replace("'", "''")
    return f"E'{text}'"


class LateCursor:
    """The cursor of a statement, which is sent when somebody looks at it."""

    rows: Iterator[Any]
    rowcount: int
    description: Sequence[tuple[str]]

    def __init__(self, send: Callable[[], None]) -> None:
        self._send = send

    def __getattr__(self, name: str) -> Any:
        self._send()  # which sets what is not there yet
        return object.__getattribute__(self, name)

    def __iter__(self) -> Iterator[Any]:
        return self.rows

    def fetchone(self) -> Any:
        return next(self.rows, None)

    def fetchall(self) -> list[Any]:
        return list(self.rows)


class PostgresConnection:
    """A session that connects by itself, and again; it behaves as a connection of sqlite3."""

    def __init__(self, file: PostgresFile, *, writes: bool) -> None:
        self._file, self._writes = file, writes
        self._session: Any = None
        self._cursor: Any = None
        self._waiting: list[tuple[str, LateCursor]] = []
        self._numbers = 0, 0
        self._writer = secrets.token_hex(8)
        self.total_changes = 0  # transactions committed

    def execute(self, sql: str, parameters: Any = (), /) -> LateCursor:
        if sql == "BEGIN IMMEDIATE":
            return self._begin()
        if sql == "COMMIT":
            return self._commit()
        if sql.startswith("ROLLBACK"):  # what did not go out needs no undoing
            self._waiting = [one for one in self._waiting if one[0].endswith(" piece")]
        if isinstance(parameters, Mapping):
            values: Any = {name: literal(value) for name, value in parameters.items()}
        else:
            values = tuple(map(literal, parameters))
        return self._add(translated(sql) % values)

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]], /) -> None:
        for row in rows:
            if isinstance(row[-1], bytes) and len(row[-1]) > LONG_CONTENT_BYTES:
                self.send()
                with self._file.deadline(self._session, ANSWER_S):
                    self._session.execute(translated(sql), row)
            else:
                self.execute(sql, row)

    def _add(self, *statements: str) -> LateCursor:
        """Have statements wait; the answer to the last one."""
        self._waiting += [(sql, LateCursor(self.send)) for sql in statements]
        return self._waiting[-1][1]

    def send(self) -> None:
        """Send what waits, and give each its answer. What begins something goes once more, over a new session, when
        the one that was there turns out to be lost."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        text = ";\n".join(sql for sql, _ in waiting).replace("\0", "\N{REPLACEMENT CHARACTER}")
        may_repeat = self._session is not None and (not self._writes or waiting[0][0] == BEGIN[0])
        try:
            cursor = self._run(text.encode(errors="replace"))
        except self._file.errors:
            if self._session is not None or not may_repeat:
                raise
            cursor = self._run(text.encode(errors="replace"))
        for _, answer in waiting:
            columns, answer.rowcount = cursor.pgresult.nfields, cursor.rowcount
            answer.description = [(cursor.pgresult.fname(n).decode(),) for n in range(columns)]
            answer.rows = iter(cursor.fetchall() if columns else ())
            cursor.nextset()

    def _run(self, text: bytes) -> Any:
        if self._session is None:
            self._session = self._file.connect()
            self._cursor = self._session.cursor()
        session = self._session
        try:
            with self._file.deadline(session, ANSWER_S):
                return self._cursor.execute(text)
        finally:
            if session.closed:
                self._session = None

    def _begin(self) -> LateCursor:
        """Begin a transaction: until its end the only one, of all daemons, that writes."""
        file, answer = self._file, self._add(*BEGIN)
        file.last_seq, file.last_report, changes = answer.fetchone()
        self._numbers = file.last_seq, file.last_report
        if changes != file.changes:
            file.check_version(self)
            file.changes = changes
            file.on_change(self)
        return answer

    def _commit(self) -> LateCursor:
        number, numbers = self.total_changes + 1, (self._file.last_seq, self._file.last_report)
        if numbers != self._numbers:
            self._add(f"UPDATE counters SET last_seq = {numbers[0]}, last_report = {numbers[1]}")  # noqa: S608
        self._add(
            f"INSERT INTO commits VALUES ('{self._writer}', {number}, now()) "  # noqa: S608 - nothing from outside
            "ON CONFLICT (writer) DO UPDATE SET number = excluded.number, at = excluded.at"
        )
        answer = self._end()
        try:
            self.send()
        except self._file.errors:
            if self._session is not None or not self._was_committed(number):
                raise
        self.total_changes = number
        return answer

    def _end(self) -> LateCursor:
        return self._add(*(sql.format(self._writer) for sql in END))

    def _was_committed(self, number: int) -> bool:
        """What became of a transaction whose end was not answered: the lock is free once it has ended. Raises
        StorageUnavailable when that cannot be found out."""
        until = time.monotonic() + 2 * CONNECT_S
        last = f"SELECT number FROM commits WHERE writer = '{self._writer}'"  # noqa: S608 - nothing from outside
        while True:
            try:
                answer = self._add(*BEGIN, last)
                self._end()
                return bool(answer.fetchone() == (number,))
            except self._file.errors:
                if time.monotonic() > until:
                    raise StorageUnavailable(
                        "the database went away while it wrote: whether this was accepted is not known; "
                        "submit it again with the same ids"
                    ) from None
                self.close()
                time.sleep(0.2)

    def close(self) -> None:
        session, self._session, self._waiting = self._session, None, []
        if session is not None:
            session.close()


class PostgresFile(QueueFile):
    """The database, in the place of the file. `path` is its URL; what people see of it has no password."""

    sends_late = True

    def __init__(self, path: str, *schema: Any, **observers: Any) -> None:
        super().__init__(path, *schema, **observers)
        try:
            import psycopg
            import psycopg.conninfo
        except ImportError as error:
            raise ConfigurationError(
                f"a queue in PostgreSQL needs psycopg 3 ({error}): install the package python3-psycopg, or "
                f"psycopg[binary] by pip, for {sys.executable}"
            ) from None
        self._psycopg, self.errors = psycopg, (psycopg.Error,)
        self.mistakes = (psycopg.IntegrityError, psycopg.DataError)
        self.path, self.folder = without_password(path), tempfile.gettempdir()
        try:
            self._where: dict[str, Any] = {
                "connect_timeout": CONNECT_S, "application_name": "mailproxy", **psycopg.conninfo.conninfo_to_dict(path),
            }  # fmt: skip
        except psycopg.Error:
            raise ConfigurationError(f"db_path is not the URL of a database: {self.path}") from None
        self._deadlines: dict[Any, float] = {}
        self._deadlines_lock = threading.Lock()
        self._ended = threading.Event()

    def open(self) -> None:
        """Make the tables in an empty database, or see that they are of this version. Blocking. Raises
        ConfigurationError, or StorageUnavailable while the database is away."""
        self._undo.close()  # what a try before this one has begun
        self._ended.clear()
        self._undo.callback(self._ended.set)
        threading.Thread(target=self._watch, name="queue-deadlines", daemon=True).start()
        self.examine(make=True)
        self._undo.callback(self._close_writing)
        self._open = True

    def examine(self, *, make: bool = False) -> None:
        """Raise what open() would; the tables of an empty database are made for good only if they shall be."""
        try:
            with self.connect() as session, self.deadline(session, ANSWER_S):
                self._make_tables(session, for_good=make)
        except self._psycopg.Error as error:
            told = str(error)
            if re.search(AWAY, told) or not (error.sqlstate or re.search(WRONG, told)):
                raise StorageUnavailable(f"the database {self.path} cannot be reached: {self.why(error)}") from None
            raise ConfigurationError(f"the database {self.path} cannot be used: {self.why(error)}") from None

    def _make_tables(self, session: Any, *, for_good: bool) -> None:
        settings = "server_encoding", "transaction_read_only"
        encoding, read_only = (session.execute(f"SHOW {name}").fetchone()[0] for name in settings)
        for is_wrong, why in (
            (session.info.server_version < 140_000, "is older than PostgreSQL 14, which the queue needs"),
            (encoding != "UTF8", f"is encoded in {encoding}; create one in UTF8"),
            (read_only == "on", "is read-only, as a standby is; name the primary"),
        ):
            if is_wrong:
                raise ConfigurationError(f"the database {self.path} {why}")
        with session.transaction(force_rollback=not for_good):
            session.execute(BEGIN[1])
            session.execute(f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK})")
            if session.execute("SELECT to_regclass('switches')").fetchone() == (None,):
                schema = translated(self._schema, DIALECT_OF_SCHEMA)
                session.execute(f"{schema}; {POSTGRES_SCHEMA.format(version=len(self._migrations) + 1)}")
            session.execute("DELETE FROM commits WHERE at < now() - interval '1 day'")
            self.check_version(session)

    def check_version(self, db: Any) -> None:
        """Raise ConfigurationError unless the tables are of this version."""
        newest, found = len(self._migrations) + 1, db.execute("SELECT value FROM switches WHERE name = 'schema'")
        (version,) = found.fetchone() or (0,)
        if version != newest:
            raise ConfigurationError(
                f"the database {self.path} was written by {'an older' if version < newest else 'a newer'} mailproxy "
                f"(schema {version}, this one knows {newest}); start that one"
            )

    def connect(self) -> Any:
        """A new session. Blocking, for some seconds at most. Raises psycopg.Error."""
        return self._psycopg.connect(**self._where, autocommit=True, prepare_threshold=None, client_encoding="utf8")

    @contextlib.contextmanager
    def deadline(self, session: Any, seconds: float) -> Iterator[None]:
        """Give the session up should this take longer: a proxy, or a dead network, may swallow what is sent."""
        self._deadlines[session] = time.monotonic() + seconds
        try:
            yield
        finally:
            with self._deadlines_lock:  # afterwards it may be closed, and its descriptor be another's
                del self._deadlines[session]

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            with self._deadlines_lock, contextlib.suppress(OSError, RuntimeError, *self.errors):
                for session, until in self._deadlines.items():
                    if until < time.monotonic():
                        with socket.socket(fileno=os.dup(session.fileno())) as one:
                            one.shutdown(socket.SHUT_RDWR)

    def _connection(self, *, writes: bool) -> Any:
        return PostgresConnection(self, writes=writes)

    @staticmethod
    def why(error: BaseException) -> str:
        """An error of psycopg in one line, without what it shows of rows."""
        told = getattr(getattr(error, "diag", None), "message_primary", None) or str(error)
        told = told.partition("Multiple connection attempts")[0]  # of several hosts: the last one
        return " ".join(line.strip() for line in told.splitlines() if line[:1] != "\t").rstrip(".")  # a tab: a hint


# What waiting does not mend, unless a server or a pooler says that it does.
WRONG = r"FATAL|no password supplied|SSL|certificate|service file|invalid \w+ (?:number|value)|could not match"
AWAY = (
    "starting up|shutting down|not yet acc|recovery|too many|slots|cannot connect|(?<!connect)_timeout|_retry|closed the|"
    "due to|because of"
)
TABLES = re.findall(r"^CREATE TABLE (\w+)", SCHEMA, re.MULTILINE)
OWN_SWITCHES = "('schema', 'answers', 'run_now', 'moved')"  # those that are not moved with a queue


def move(source: QueueFile, target: QueueFile) -> int:
    """Copy a queue into an empty one, and mark it, so that nobody sends its mail again; return the number of messages.
    Both are open, and one of them is a database. Blocking. Raises ConfigurationError when it must not be."""
    with contextlib.closing(source.connect()) as there, contextlib.closing(target.connect()) as here:
        inward = isinstance(target, PostgresFile)
        database, path = (here, target.path) if inward else (there, source.path)
        for session in (there, here):
            session.execute("BEGIN")
        database.execute("LOCK TABLE nodes, counters IN ACCESS EXCLUSIVE MODE")  # a file is locked while it is open
        if node := database.execute("SELECT node FROM nodes WHERE until_ts > clock_timestamp()").fetchone():
            raise ConfigurationError(f"the database {path} is in use by the node {node[0]}; stop it first")
        if database.execute("SELECT 1 FROM claims").fetchone():
            what = "holds mail that was on the wire when a node died; start one there, and stop it again"
            raise ConfigurationError(f"the database {path} {what}")
        if there.execute("SELECT 1 FROM switches WHERE name = 'moved' AND value = 2").fetchone():
            raise ConfigurationError(f"the queue {source.path} was moved before; start the other one")
        for table in TABLES:
            which = f"WHERE name NOT IN {OWN_SWITCHES}" if table == "switches" else ""
            is_filled = f"SELECT 1 FROM {table} LIMIT 1"  # noqa: S608 - constants only
            if table not in ("switches", "failures") and here.execute(is_filled).fetchone():
                raise ConfigurationError(f"the queue {target.path} is not empty; only an empty one takes another in")
            here.execute(f"DELETE FROM {table} {which}")  # noqa: S608 - constants only
            rows = (there if inward else there.cursor(name=table)).execute(f"SELECT * FROM {table} {which} ORDER BY 1")  # noqa: S608
            if not inward:
                marks = ", ".join("?" * len(rows.description))
                here.executemany(f"INSERT INTO {table} VALUES ({marks})", rows)  # noqa: S608 - constants only
                continue
            with here.cursor().copy(f"COPY {table} FROM STDIN") as copy:
                for row in rows:
                    copy.write_row([one.replace("\0", "\ufffd") if isinstance(one, str) else one for one in row])
        if inward:
            numbers = there.execute(NUMBERS_OF_FILE).fetchone()
            here.execute("UPDATE counters SET last_seq = %s, last_report = %s", numbers)
        else:
            here.execute("DELETE FROM sqlite_sequence WHERE name = 'messages'")
            last_seq = there.execute("SELECT last_seq FROM counters").fetchone()
            here.execute("INSERT INTO sqlite_sequence VALUES ('messages', ?)", last_seq)
        (messages,) = here.execute("SELECT count(*) FROM messages").fetchone()
        there.execute("INSERT INTO switches VALUES ('moved', 1) ON CONFLICT DO NOTHING")
        there.execute("COMMIT")  # first: should the other fail it can be done again, and nothing is sent twice
        here.execute("COMMIT")
        there.execute("UPDATE switches SET value = 2 WHERE name = 'moved'")
    return int(messages)


def queue_file(db_path: str, environ: Mapping[str, str], **observers: Callable[..., None]) -> QueueFile:
    """The file or the database, which is not open yet. Raises ConfigurationError."""
    kind = PostgresFile if is_database(db_path) else QueueFile
    return kind(with_password(db_path, environ), SCHEMA, MIGRATIONS, USED_BY_MIGRATIONS, **observers)


# ======================================================================
# LEASES - several machines: which lanes are run here, and which elsewhere
# ======================================================================
#
# Only with a queue in PostgreSQL. Each daemon has a row in `nodes`, which lasts LEASE_S by the clock of the database
# and is renewed by a thread of its own; the lanes that it has taken (rows of `leases`; the reporter is one more) last
# as long as that row. Who finds a row that has run out buries the node: its row, leases and claims go in one commit.
# So a lease that is there is valid, and a node that can renew its row has lost nothing. The node counts its own time
# from before a renewal was sent, on a clock that runs on while the process is stopped, and begins no transaction when
# that is over. All there is to know stands in tables and is looked at; a NOTIFY only says that a look is worth while.

REPORTER = ""  # its lane; those of accounts are called as they are
LEASE_S = 15.0  # how long a node lasts that does not renew its row
RENEWALS = 5  # in that time
DRIFT_SHARE = 2 / 15  # of it, for clocks that do not run alike
LOOK_PAUSE_S = 0.1  # between two looks, or two notifications, at least
RENEW = (
    "UPDATE nodes SET until_ts = clock_timestamp() + make_interval(secs => %s), accounts = %s, shown = %s "
    "WHERE instance = %s"
)
LOOK_AT_TABLES = (
    "SELECT changes, least((SELECT min(deferred_ts) FROM messages WHERE sent_ts IS NULL AND error_ts IS NULL "
    "AND deferred_ts IS NOT NULL), (SELECT min(expires_ts) FROM messages WHERE sent_ts IS NULL AND error_ts IS NULL "
    "AND expires_ts IS NOT NULL), CAST('infinity' AS double precision)), "
    "EXISTS (SELECT 1 FROM tallies WHERE unreported > 0), "
    "EXISTS (SELECT 1 FROM nodes WHERE until_ts <= clock_timestamp()), "
    "ARRAY(SELECT account_id FROM tallies WHERE ready > 0 UNION SELECT account_id FROM leases WHERE instance = ''), "
    "ARRAY(SELECT account_id FROM leases WHERE instance NOT IN (%(mine)s, '')), "
    "(SELECT json_object_agg(node, CAST(accounts AS json)) FROM nodes WHERE instance <> %(mine)s) FROM counters"
)
ENTER = (
    "INSERT INTO nodes VALUES (:node, :mine, clock_timestamp() + make_interval(secs => :lease_s), :accounts, '{}') "
    "ON CONFLICT (node) DO NOTHING"
)
# Remove nodes, and all that they had: what was on the wire there may have been sent, or not.
BURY = (
    "WITH dead AS (DELETE FROM nodes WHERE until_ts <= clock_timestamp() OR instance = :gone RETURNING *), "
    "free AS (UPDATE leases SET instance = '' WHERE instance IN (SELECT instance FROM dead)), "
    "wire AS (DELETE FROM claims WHERE instance IN (SELECT instance FROM dead)) SELECT node FROM dead"
)
# Leave lanes to the other nodes. Where there are none, whoever starts first would take them all: then they are nobody's.
GIVE_UP = (
    "WITH others AS (SELECT 1 FROM nodes WHERE instance <> :mine), "
    "free AS (UPDATE leases SET instance = '' WHERE account_id = ANY(:ids) AND instance = :mine "
    "AND EXISTS (SELECT 1 FROM others)) "
    "DELETE FROM leases WHERE account_id = ANY(:ids) AND instance = :mine AND NOT EXISTS (SELECT 1 FROM others)"
)
# A lane that nobody has, and that has mail (the reporter is always wanted) or was left by its node; or that is ours by a
# commit whose answer was lost.
TAKE = (
    "INSERT INTO leases SELECT id, :mine FROM unnest(CAST(:ids AS text[])) AS id "
    "WHERE EXISTS (SELECT 1 FROM nodes WHERE instance = :mine) "
    "AND (id = '' OR EXISTS (SELECT 1 FROM tallies WHERE account_id = id AND ready > 0) "
    "OR EXISTS (SELECT 1 FROM leases WHERE account_id = id)) "
    "ON CONFLICT (account_id) DO UPDATE SET instance = excluded.instance WHERE leases.instance IN (excluded.instance, '') "
    "RETURNING account_id"
)


def uptime() -> float:
    """Seconds, also those for which the process, or the machine, was stopped."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def digests_of(accounts: Iterable[Account]) -> str:
    """Tell whether two nodes have the same accounts (JSON); so short that they do not tell the passwords."""
    alike = [account._replace(hostname=None) for account in accounts]  # which is a node's own
    given = {account.id: repr([getattr(value, "given", value) for value in account]) for account in alike}
    return as_json({id_: hashlib.sha256(said.encode()).hexdigest()[:4] for id_, said in given.items()})


class Look(NamedTuple):
    """What the tables say to all nodes."""

    changes: int = -1  # goes up with each change of accounts, suspensions and switches
    due_ts: float = math.inf  # no row is due, or to be given up, before that
    unreported: bool = False
    dead: bool = False  # a node is to be buried
    waiting: Sequence[str] = ()  # accounts with ready mail, and lanes that were left by their node
    elsewhere: Sequence[str] = ()  # lanes that other nodes have
    accounts: Mapping[str, Mapping[str, str]] | None = None  # digests_of those of config.ini, by node


class Leases:
    """The row of this node, and the lanes that it has; without a `node` there is only this one, and it has all.
    It belongs to the event loop, but for what `_keep` does."""

    accounts = _shown = "{}"  # digests_of those of config.ini; what is shown, as JSON
    elsewhere: Sequence[str] = ()  # lanes that other nodes have
    _last = Look()
    _told = _look_now = _leaving = False
    _well_since = _unseen_since = math.inf  # renewals come in time; a look waits for the event loop; times of uptime()

    def __init__(self, file: Any = None, node: str | None = None, look_s: Any = None, log: Any = None) -> None:
        self.file, self.node, self._look_s, self._log = cast(PostgresFile, file), node, look_s, log
        self.shown: Callable[[], Mapping[str, object]] = dict  # the states of the lanes here; REPORTER: Recent.counts
        self.buried = node is not None  # there is no row (any more), and so no lane
        self._until = -math.inf  # nothing begins after that
        self._held: set[str] = set()
        self._seen, self._beat_s = asyncio.Event(), LEASE_S / RENEWALS
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)

    def has(self, lane: str) -> bool:
        """True when the lane of this account (REPORTER: of the reports) is run here."""
        return self.node is None or lane in self._held

    def lasts(self) -> bool:
        """True while a transaction may begin."""
        return self.node is None or uptime() < self._until

    async def _write(self, sql: str, **values: object) -> list[Any]:
        values["mine"] = self.file.instance
        return await self.file.write(lambda db: db.execute(sql, values).fetchall())

    async def enter(self) -> None:
        """Begin, or begin anew, with no lanes. A row of this name is waited for: it may be that of a process that is
        gone. Raises ConfigurationError when it is renewed meanwhile, StorageUnavailable."""
        if self.node is None:
            return
        mine = secrets.token_hex(8)
        values = {"node": self.node, "mine": mine, "lease_s": LEASE_S, "accounts": self.accounts, "gone": ""}

        def work(db: Any) -> Any:
            db.execute(BURY, values)
            db.execute(ENTER, values)
            return db.execute("SELECT until_ts FROM nodes WHERE node = :node AND instance <> :mine", values).fetchone()

        self._held.clear()
        began, before = uptime(), None
        while (found := await self.file.write(work)) is not None:
            if before not in (None, found):
                raise ConfigurationError(f"the node {self.node} runs already: give each daemon a `node` of its own")
            before = found
            await asyncio.sleep(self._beat_s / 2)
            began = uptime()
        self.file.instance, self.buried = mine, False
        self._until, self._unseen_since = began + LEASE_S * (1 - DRIFT_SHARE), math.inf
        if self._keeper.ident is None:
            self._loop, (self._bell, self._ear) = asyncio.get_running_loop(), socket.socketpair()
            self._bell.setblocking(False)
            self._keeper.start()
        self.ring(look=True)

    async def take(self, lanes: Iterable[str]) -> set[str]:
        """Take the lanes that nobody has, and that have mail or were left, but for a share of the other nodes; return
        which. The others are told to look; what they do not take is asked for again."""
        asked = set(lanes)
        wanted = list(asked.difference(self.elsewhere))
        wanted = wanted[: 1 + len(wanted) // (1 + len(self._last.accounts or ()))]
        taken = {row[0] for row in await self._write(TAKE, ids=wanted)} if wanted else set()
        self._held |= taken
        if taken != asked:
            self.ring(tell=True)
        return taken

    async def give_up(self, lanes: Iterable[str]) -> None:
        """Let others have these lanes, of which nothing is on the wire."""
        if held := self._held.intersection(lanes):
            self._held -= held
            with contextlib.suppress(StorageUnavailable):
                await self._write(GIVE_UP, ids=list(held))
            self.ring(tell=True)

    async def leave(self) -> None:
        """Give up all that is left, and end."""
        if self._keeper.ident is None:
            return
        with contextlib.suppress(StorageUnavailable):
            await self._write(BURY, gone=self.file.instance)
        self._leaving, self._until = True, -math.inf
        self.ring(tell=True)
        await self._loop.run_in_executor(None, self._keeper.join, self._beat_s)

    async def everywhere(self) -> tuple[dict[str, dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
        """What GET /status shows of several machines: of each lane who has it, and how it is there; of them all; and what
        happened at the others of late."""

        def work(db: Any) -> tuple[dict[str, dict[str, Any]], dict[str, Any], list[dict[str, Any]]]:
            leases = db.execute("SELECT account_id, node FROM leases JOIN nodes USING (instance)")
            nodes, (on_wire,) = db.execute("SELECT node, shown FROM nodes"), db.execute("SELECT count(*) FROM claims")
            shown = {node: json.loads(said) for node, said in nodes} | {self.node: {}}  # what is known better
            lanes = {id_: {**shown.get(node, {}).get(id_, {}), "node": node} for id_, node in leases}
            reporter = lanes.get(REPORTER, {}).get("node")
            of_all = {"node": self.node, "reporter": reporter, "in_delivery": on_wire[0]}
            return lanes, of_all, [said.get(REPORTER, {}) for said in shown.values()]

        return await self.file.read(work) if self.node else ({}, {}, [])

    async def look(self) -> Look:
        """What the next look shows. Nodes whose time is over are removed: what they had is free."""
        await self._seen.wait()
        self._seen.clear()
        if self._last.dead:
            with contextlib.suppress(StorageUnavailable):
                for (node,) in await self._write(BURY, gone=""):
                    event(self._log, logging.INFO, "a node is gone: others take its lanes over", node=node)
            self.ring(look=True)
        return self._last

    def differing(self) -> set[tuple[str, str]]:
        """Accounts of config.ini (the first) that another node (the second) has otherwise, or not at all."""
        mine, others = json.loads(self.accounts).items(), (self._last.accounts or {}).items()
        return {(id_, node) for node, said in others for id_, _ in mine ^ said.items()}

    def ring(self, *, tell: bool = False, look: bool = False) -> None:
        """Have the other nodes look (there is mail for their lanes, a lane is free, something has changed); or look."""
        self._told, self._look_now = self._told or tell, self._look_now or look
        with contextlib.suppress(OSError):
            self._bell.send(b"!")

    def _see(self, look: Look) -> None:
        self._last, self.elsewhere, self._unseen_since = look, look.elsewhere, math.inf
        self._shown = as_json(self.shown())
        self._seen.set()

    # -- the keeper's thread

    def _keep(self) -> None:
        """Renew the row, look and notify the others, until this node leaves."""
        session: Any = None
        failures, renewed_at, looked_at, told_at = 0, -math.inf, -math.inf, -math.inf
        while not self._leaving or self._told:
            now, pause_s = uptime(), min(self._look_s(), self._beat_s)
            try:
                if session is None:
                    session = self.file.connect()
                    session.execute("LISTEN mailproxy")
                with self.file.deadline(session, LEASE_S / 3):
                    if now >= renewed_at + self._beat_s:
                        if now >= renewed_at + 2 * self._beat_s:
                            self._well_since = now
                        self._renew(session, now)
                        renewed_at = now
                    if self._told and (self._leaving or now >= told_at + LOOK_PAUSE_S):
                        self._told, told_at = False, now
                        session.execute("SELECT pg_notify('mailproxy', %s)", [self.node])
                    if now >= looked_at + (LOOK_PAUSE_S if self._look_now else min(self._look_s(), self._beat_s)):
                        self._look_now, looked_at = False, now
                        self._look(session, now)
                if self._look_now or self._told:
                    pause_s = LOOK_PAUSE_S
                failures = 0
            except Exception as error:  # the row runs out, unless the next try is better
                failures += 1
                if failures == 2:  # one may be of a session that somebody ended
                    why = self.file.why(error)
                    event(self._log, logging.WARNING, "the lease cannot be renewed", node=self.node, error=why)
                with contextlib.suppress(Exception):
                    session.close()
                session = None
                if self._leaving:
                    return
            waiting = select.poll()
            waiting.register(self._ear, select.POLLIN)
            if session is not None and not self._look_now:
                waiting.register(session.fileno(), select.POLLIN)
            for descriptor, _ in waiting.poll(0 if self._leaving else math.ceil(pause_s * 1000)):
                if descriptor == self._ear.fileno():
                    self._ear.recv(4096)
                else:
                    self._look_now = True  # which reads what came
        for one in (session, self._bell, self._ear):
            one.close()

    def _renew(self, session: Any, now: float) -> None:
        """Renew the row, unless the event loop hangs, or the tables are of another version: then others are to take the
        lanes. Raises ConfigurationError, psycopg.Error."""
        if self.buried or self._leaving or now - self._unseen_since > 2 * self._beat_s:
            return
        self.file.check_version(session)
        if session.execute(RENEW, [LEASE_S, self.accounts, self._shown, self.file.instance]).rowcount:
            self._until = now + LEASE_S * (1 - DRIFT_SHARE)
        else:
            self._until, self.buried = -math.inf, True

    def _look(self, session: Any, now: float) -> None:
        look = Look(*session.execute(LOOK_AT_TABLES, {"mine": self.file.instance}).fetchone())
        if now - self._well_since <= self._beat_s:  # the database was away: the others come back, too
            look = look._replace(dead=False)
        self._unseen_since = min(self._unseen_since, now)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._see, look)


# ======================================================================
# OUTBOUND HTTP - one request with a deadline, a size limit and an address policy
# ======================================================================
#
# Everything here blocks and belongs into a thread. A request ends at its deadline whatever the
# other side does: then its socket is shut. Only the look-up of a name knows no end; who awaits the
# thread sets one. With an AddressPolicy not one packet goes to an address that was not judged: the
# name is resolved once, and the socket connects to the number that came out of it.

Address: TypeAlias = "tuple[socket.AddressFamily, Any]"  # as socket.connect() takes it
Resolver: TypeAlias = "Callable[[str, int], Sequence[Address]]"
Trust: TypeAlias = "Callable[[], ssl.SSLContext]"  # whoever asks often makes one context and keeps it

BODY_PIECE_BYTES = 65_536  # read at a time from a body
LONGEST_HEAD_LINE, MOST_HEAD_LINES = 65_537, 102  # read of a head, so that http.client refuses what has more
PROBLEM_BYTES = 262_144  # read at most of a body that is not of a success
UNDONE_CODINGS = ("gzip", "x-gzip", "deflate")
# The content codings that are registered (RFC 9110 16.6); what else servers put there is none, and the bytes are plain.
CODINGS = (*UNDONE_CODINGS, "br", "zstd", "compress", "x-compress", "dcb", "dcz", "aes128gcm", "exi", "pack200-gzip")

# What is not on the public Internet (RFC 6890 and its registry), spelled out because
# ipaddress.is_global differs between releases of Python and counts multicast as public.
# 100.64: behind a carrier's NAT, metadata of some clouds; 168.63.129.16: public by its number, services of Azure; 169.254:
# link-local, metadata of most clouds; 192.88.99: 6to4 relays; from 224 on: multicast, reserved, broadcast. From 2001::/23
# on: protocol assignments (with Teredo), documentation, 6to4 (may hold any IPv4 address), documentation.
NOT_PUBLIC = """0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 168.63.129.16/32 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24
    192.0.2.0/24 192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4
    2001::/23 2001:db8::/32 2002::/16 3fff::/20"""
NOT_PUBLIC_NETWORKS = [ipaddress.ip_network(network) for network in NOT_PUBLIC.split()]
PUBLIC_6 = ipaddress.IPv6Network("2000::/3")  # all that was ever given out (RFC 4291 2.4)
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # a translator connects by IPv4 (RFC 6052)


class HttpFailure(MailproxyError):
    """No complete answer came; the text says why, without credentials or query strings."""

    def __init__(self, reason: str, *, transient: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.transient = transient


class UnreadableBody(HttpFailure):
    """A success whose body cannot be decompressed, or is too large."""


class TooLarge(UnreadableBody):
    """The body is larger than it may be."""

    def __init__(self, what: object, max_bytes: int) -> None:
        super().__init__(f"{what} is larger than the {max_bytes} bytes allowed", transient=False)


class HttpAnswer(NamedTuple):
    """A complete answer of any status. Of one that is no success the body may be cut short."""

    status: int
    headers: Mapping[str, str]  # names in lower case, repeated ones joined by commas
    body: bytes  # its content encoding undone; empty when it went into a file
    url: str  # as requested
    encoded_md5: str = ""  # of the body as it came, where a content encoding was undone


def asked_at(url: str, base: HttpTarget | None = None) -> HttpTarget:
    """The target of a URL, or HttpFailure when it is none; with a base that of its Location header. A password in the
    URL stays with the server it was meant for."""
    try:
        target = http_target(urllib.parse.urljoin(base.url, url) if base else url)
    except ValueError:
        leads = f"{base} redirects to what is " if base else ""
        raise HttpFailure(f"{leads}not a valid http or https URL", transient=False) from None
    if base and target[:3] == base[:3] and target.authorization is None:  # scheme, host and port
        return target._replace(authorization=base.authorization)
    return target


# --- which addresses may be reached ------------------------------------------


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """True for an address on the public Internet; IPv4 inside IPv6 is judged as what it is."""
    if isinstance(address, ipaddress.IPv6Address) and (address.ipv4_mapped or address in NAT64):
        address = ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    given_out = address.version == 4 or address in PUBLIC_6
    return given_out and not any(address in network for network in NOT_PUBLIC_NETWORKS)


class AddressPolicy:
    """Lets through what is public, and what the operator named: hosts, addresses, networks."""

    def __init__(self, allow_hosts: Sequence[str]) -> None:
        self._names = {allowed.lower() for allowed in allow_hosts}
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        for allowed in allow_hosts:
            with contextlib.suppress(ValueError):  # a name
                self._networks.append(ipaddress.ip_network(allowed, strict=False))

    def permitted(self, host: str, addresses: Sequence[Address]) -> Sequence[Address]:
        """Those of the host's addresses that are allowed. Raises HttpFailure when it has others only."""
        allowed = []
        for address in addresses:
            number = ipaddress.ip_address(address[1][0].partition("%")[0])
            number = getattr(number, "ipv4_mapped", None) or number  # the kernel connects by IPv4 (RFC 4291 2.5.5.2)
            named = host.lower().rstrip(".") in self._names or any(number in network for network in self._networks)
            if named or is_public(number):
                allowed.append(address)
        if addresses and not allowed:
            reason = f"{host} ({addresses[0][1][0]}) is not public, and [attachments] allow_hosts does not name it"
            raise HttpFailure(reason, transient=False)
        return allowed


def resolve_name(host: str, port: int) -> Sequence[Address]:
    """Every address of a name, in the order the system prefers. Blocks without a deadline."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [(family, address) for family, _, _, _, address in found]


# --- the connection ----------------------------------------------------------


class HttpDeadline:
    """The instant at which a request ends, with all its redirects: a timer shuts the socket it uses then."""

    def __init__(self, timeout_s: float) -> None:
        self.at = time.monotonic() + timeout_s
        self.socket: socket.socket | None = None
        self._timer = threading.Timer(timeout_s, self._shut)
        self._timer.daemon = True
        self._timer.start()

    def left_s(self) -> float:
        """Raises TimeoutError when nothing is left."""
        if (left := self.at - time.monotonic()) <= 0:
            raise TimeoutError
        return left

    def end(self) -> None:
        self._timer.cancel()
        if self.socket is not None:
            self.socket.close()

    def _shut(self) -> None:
        if self.socket is not None:
            with contextlib.suppress(OSError):  # not by the method of TLS sockets, which would read on without TLS
                socket.socket.shutdown(self.socket, socket.SHUT_RDWR)


class WholeAnswer(http.client.HTTPResponse):
    """An answer with a whole head, where http.client takes one that breaks off for a short one, and a line that is no
    field for its end; informational answers before it are read over (RFC 9110 15.2), where http.client takes them for
    the answer. What does not say in one way how long the body is, is refused (RFC 9112 6.3): its bytes would be wrong."""

    def begin(self, **limits: Any) -> None:
        file, head = self.fp, [b"HTTP/1.1 100"]
        while re.match(rb"HTTP/1\.. 1\d\d", head[0]):
            head = [file.readline(LONGEST_HEAD_LINE)]
            while head[-1].strip() and head[-1].endswith(b"\n") and len(head) < MOST_HEAD_LINES:
                head.append(file.readline(LONGEST_HEAD_LINE))
            if head[-1].strip() or not head[-1].endswith(b"\n"):  # a head ends with an empty line
                raise http.client.IncompleteRead(head[-1])
        unfolded = re.sub(rb"\r?\n[ \t]+|\r(?!\n)", b" ", b"".join(head[1:-1]))
        fields = [re.fullmatch(rb"([!-9;-~]+)[ \t]*:(.*)", line) for line in unfolded.splitlines()]
        tidy = [b"%b: %b\r\n" % (field[1], field[2].strip()) for field in fields if field]
        self.fp = cast(io.BufferedReader, io.BytesIO(b"".join((head[0], *tidy, b"\r\n"))))
        super().begin(**limits)
        self.fp = file
        coding = ", ".join(self.headers.get_all("Transfer-Encoding", ["identity"])).lower()
        lengths = set(re.findall(r"[^\s,]+", ", ".join(self.headers.get_all("Content-Length", []))))
        if not re.fullmatch(r"identity|chunked(, chunked)*", coding):
            raise http.client.UnknownTransferEncoding
        if len(lengths) > 1 or not all(re.fullmatch("[0-9]{1,18}", length) for length in lengths):
            raise http.client.HTTPException
        if self.length is None and lengths and not self.chunked:  # it was said several times
            self.length = int(lengths.pop())


def connected(target: HttpTarget, deadline: HttpDeadline, resolve: Resolver, trust: Trust) -> socket.socket:
    """A socket to an address that `resolve` has judged, with TLS for https; the deadline keeps it, and closes it."""
    addresses, failure = resolve(target.host, target.port), OSError("the name has no address")
    for tried, (family, address) in enumerate(addresses):
        deadline.socket = plain = socket.socket(family, socket.SOCK_STREAM)
        try:
            plain.settimeout(deadline.left_s() / (len(addresses) - tried))
            plain.connect(address)
            break
        except OSError as error:
            plain.close()
            failure = error
    else:
        raise failure
    if plain.family != socket.AF_UNIX:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    plain.settimeout(deadline.left_s())
    if target.scheme == "http":
        return plain
    secured = trust().wrap_socket(plain, server_hostname=target.host, do_handshake_on_connect=False)
    deadline.socket = secured
    secured.do_handshake()
    return secured


def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Trust in the system's authorities, or only in those of `ca_file`. Reads files: takes a while."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        reason = f"cannot read the certificates in {ca_file}: {error.strerror}"
        raise HttpFailure(reason, transient=True) from error


# --- the request -------------------------------------------------------------


def http_request(
    method: str,
    url: str,
    *,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_s: float,
    max_bytes: int,
    redirects: int = 0,
    trust: Trust = lambda: tls_context(None),
    policy: AddressPolicy | None = None,
    resolve: Resolver = resolve_name,
    into: BinaryIO | None = None,
    is_gzip_file: Callable[[Mapping[str, str]], bool] = lambda headers: False,
) -> HttpAnswer:
    """One request, one answer of whatever status. Blocks up to `timeout_s`, if the name is found in time. Of a GET
    without headers some `redirects` are followed, each judged anew. The body of a success goes `into` a file when there
    is one, as it came where its headers say `is_gzip_file`. Proxies of the environment are not used."""
    target = asked_at(url)
    deadline = HttpDeadline(timeout_s)
    try:
        judged = resolve if policy is None else lambda host, port: policy.permitted(host, resolve(host, port))
        for _ in range(redirects + 1):
            sent = {"Host": target.netloc, "User-Agent": "mailproxy", "Connection": "close"}
            if target.authorization is not None:
                sent["Authorization"] = target.authorization
            sent |= {name.title(): value for name, value in (headers or {}).items()}
            try:
                with contextlib.closing(http.client.HTTPConnection(target.host, target.port)) as connection:
                    connection.response_class = WholeAnswer
                    connection.sock = connected(target, deadline, judged, trust)
                    with contextlib.suppress(BrokenPipeError):  # the body is too large: the answer says so
                        connection.request(method, target.path, body, sent)
                    with connection.getresponse() as response:
                        answer = _read_answer(response, target, max_bytes, into, is_gzip_file)
                deadline.left_s()  # a body without a length may have ended there
            except (OSError, http.client.HTTPException, ValueError, zlib.error) as error:
                failure = _http_failure(error, target, timeout_s, is_over=time.monotonic() >= deadline.at)
                raise failure from None if isinstance(error, ValueError) else error
            if not redirects or answer.status not in (301, 302, 303, 307, 308) or "location" not in answer.headers:
                return answer
            location = answer.headers["location"].encode("latin-1", "replace")  # as http.client reads headers
            target = asked_at(location.decode("utf-8", "replace"), target)
    finally:
        deadline.end()
    raise HttpFailure(f"more than {redirects} redirects, the last one to {target}", transient=False)


def _http_failure(error: Exception, target: HttpTarget, timeout_s: float, *, is_over: bool) -> HttpFailure:
    """What went wrong, in a sentence; only a request that cannot even be written is lasting."""
    error = TimeoutError() if is_over else error
    place = f"{target.scheme}://{target.netloc}"
    match error:
        case TimeoutError():
            reason = f"{place} gave no complete answer within {timeout_s:g} s"
        case socket.gaierror():
            reason = f"the name {target.host} cannot be resolved: {error.strerror}"
        case ssl.SSLCertVerificationError():
            reason = f"the certificate of {place} is not trusted: {error.verify_message}"
        case ssl.SSLError():
            reason = f"no TLS with {place}: {error.reason or 'the connection ended'}"
        case http.client.InvalidURL() | UnicodeError():
            return HttpFailure("not a valid http or https URL", transient=False)
        case http.client.HTTPException():  # the text may quote the answer
            reason = f"{place} gave no complete HTTP answer ({type(error).__name__})"
        case zlib.error():
            return UnreadableBody(f"{place} answered with a body that cannot be decompressed", transient=True)
        case OSError():
            reason = f"no connection to {place}: {error.strerror or error}"
        case _:  # a header value http.client refuses; its text quotes the value, perhaps a token
            return HttpFailure(f"a header for {place} cannot be sent", transient=False)
    return HttpFailure(reason, transient=True)


def client_credentials(client: ClientSettings, reveal: Callable[[Secret], str]) -> dict[str, str]:
    """The header that tells the upstream who we are. Blocking: may read secrets from files."""
    if client.client_sync_token is not None:
        return {"Authorization": f"Bearer {reveal(client.client_sync_token)}"}
    if client.client_sync_user:
        password = reveal(client.client_sync_password) if client.client_sync_password else ""
        return {"Authorization": basic_authorization(client.client_sync_user, password)}
    return {}


# --- reading within a limit --------------------------------------------------


def _read_answer(
    response: http.client.HTTPResponse,
    target: HttpTarget,
    max_bytes: int,
    into: BinaryIO | None,
    is_gzip_file: Callable[[Mapping[str, str]], bool],
) -> HttpAnswer:
    headers = {name.lower(): ", ".join(response.headers.get_all(name, [])) for name in response.headers}
    if not 200 <= response.status < 300:
        return HttpAnswer(response.status, headers, response.read(PROBLEM_BYTES), target.url)
    if (response.length or 0) > max_bytes:
        raise TooLarge(target, max_bytes)
    words = re.split(r"[\s,]+", headers.get("content-encoding", "").lower())
    codings = [word for word in words if word in CODINGS]
    if len(codings) > 1 or (codings and codings[0] not in UNDONE_CODINGS):
        reason = f"the answer has the content encoding {', '.join(codings)!r}, which was not requested"
        raise UnreadableBody(reason, transient=False)
    pieces, encoded_md5 = iter(lambda: response.read(BODY_PIECE_BYTES), b""), hashlib.md5(usedforsecurity=False)
    is_encoded = bool(codings) and not is_gzip_file(headers)
    if is_encoded:
        pieces = _inflated(pieces, encoded_md5.update)
    memory = io.BytesIO()  # its getvalue() is no copy
    write_within(max_bytes, pieces, into or memory, target)
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    md5 = encoded_md5.hexdigest() if is_encoded else ""
    return HttpAnswer(response.status, headers, memory.getvalue(), target.url, md5)


def _inflated(pieces: Iterable[bytes], note: Callable[[bytes], None]) -> Iterator[bytes]:
    """Undo gzip or deflate (RFC 9110 8.4.1), which some servers use though nobody asked; `note` what came."""
    inflate = None  # gzip may be several members in a row (RFC 1952 2.2)
    for piece in pieces:
        note(piece)
        while piece:
            if inflate is None or inflate.eof:
                inflate = zlib.decompressobj(47)  # with the header of either
            yield inflate.decompress(piece, BODY_PIECE_BYTES)
            piece = inflate.unconsumed_tail or inflate.unused_data
    while inflate is not None and not inflate.eof:  # what it still holds back because of the size of a piece
        rest = inflate.decompress(b"", BODY_PIECE_BYTES)
        if not rest and not inflate.eof:
            raise http.client.IncompleteRead(b"")
        yield rest


def write_within(max_bytes: int, pieces: Iterable[bytes], file: BinaryIO, what: object) -> None:
    """Write the pieces of a body into a file. Raises TooLarge beyond the limit, HttpFailure when the disk is full."""
    size_bytes = 0
    for piece in pieces:
        size_bytes += len(piece)
        if size_bytes > max_bytes:
            raise TooLarge(what, max_bytes)
        try:
            file.write(piece)
        except OSError as error:
            raise HttpFailure(f"{what} cannot be stored: {error.strerror}", transient=True) from error


# ======================================================================
# ATTACHMENTS - content, URL, S3, storage -> bytes, or a Reply: later, or never
# ======================================================================
#
# An attachment is never left out silently: whatever hinders it becomes a Reply of
# the stage `attachment`, 4xx when it may pass, 5xx when it will not. What is fetched
# goes into files without names, once for all messages of a burst; memory is taken
# when all of a message is there, so a slow server keeps none from others. S3: signature
# version 4 ("Authenticating Requests: Using the Authorization Header" in Amazon's S3 API reference).

FETCHES = 192  # at a time, each a thread; shared among the lanes
FETCHES_PER_HOST = 4  # at a time: a slow server holds up its own messages, not the pool of threads
KEPT_FILES = 100  # at most: each is a file descriptor
KEEP_S = 30.0  # at most, how long what was fetched serves other messages
MAX_NAME_CHARACTERS = 200
LASTING_FILE_ERRORS = (
    errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO,
)  # fmt: skip

GENERIC_TYPES = ("", "application/octet-stream", "binary/octet-stream", "application/x-download")
MEDIA_TYPE = re.compile(r"\s*([A-Za-z0-9!#$&^_.+-]+/[A-Za-z0-9!#$&^_.+-]+)\s*(?:;.*)?", re.DOTALL)
# Control characters, surrogates, line and paragraph ends, and what turns the direction of a text around
_NOT_IN_NAMES = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u2028-\u202e\u2066-\u2069]")

S3_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
S3_BUCKET_IN_HOST = re.compile(r"[a-z0-9][a-z0-9-]{1,61}[a-z0-9]")  # one label: fits a wildcard certificate
S3_REGION = re.compile(r"[A-Za-z0-9-]{1,64}")
S3_ERROR = re.compile(rb"<(Code|Message|Region)>([^<]*)</")
EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()


def failed_fetch(reason: str, code: int, retry_after_s: float | None = None) -> Reply:
    """The local reply for an attachment that cannot be fetched: 4xx now, 5xx ever."""
    text = f"Attachment fetch failed: {' '.join(reason.split())}"
    return Reply(Stage.ATTACHMENT, code, text, cause=Cause.LOCAL, retry_after_s=retry_after_s)


@dataclass(eq=False, repr=False)
class Fetched:
    """What a source gave: bytes in a file without a name, which goes when nobody needs it any more."""

    file: BinaryIO
    size_bytes: int
    filename: str  # as the source has it, and likewise
    content_type: str  # "" when it does not say
    keep_s: float  # how long it may serve other messages


# --- names and types ---------------------------------------------------------


def safe_filename(name: str) -> str:
    """A name no mail program can take for a path, a header line or something else than it is."""
    name = _NOT_IN_NAMES.sub("", re.sub(r"[/\\]", "_", name)).strip().rstrip(". ")
    stem, dot, extension = name.rpartition(".")
    if len(name) > MAX_NAME_CHARACTERS and dot and len(extension) <= 20:
        return f"{stem[: MAX_NAME_CHARACTERS - len(extension) - 1]}.{extension}"
    return name[:MAX_NAME_CHARACTERS] or "attachment"


def disposition_filename(header: str) -> str:
    """The file name in a Content-Disposition header (RFC 6266), "" when there is none."""
    message = email.message.Message()
    message["Content-Disposition"] = header
    given: list[tuple[str, Any]] = []
    with contextlib.suppress(TypeError):  # email's mistake where filename*0 stands beside filename*
        given += message.get_params([], "Content-Disposition")
    for name, value in reversed(given):  # one with an encoding of its own (RFC 8187) stands last
        if name.lower() != "filename":
            continue
        with contextlib.suppress(LookupError, ValueError):
            if isinstance(value, tuple):  # encoding, language, octets
                value = value[2].encode("latin-1").decode(value[0] or "us-ascii")
            else:
                with contextlib.suppress(UnicodeError):  # raw UTF-8, which http.client read as Latin-1
                    value = value.encode("latin-1").decode("utf-8")
            return re.split(r"[/\\]", value)[-1]
    return ""


def media_type(header: str | None) -> str:
    """The type/subtype of a Content-Type header in lower case, "" when it has none."""
    found = MEDIA_TYPE.fullmatch(header or "")
    return found[1].lower() if found else ""


def guessed_type(filename: str) -> str:
    """The media type that the extension of a name stands for, "" when nobody knows it."""
    guess, encoding = mimetypes.guess_type(f"/{filename}")  # with the slash it is no data: URL
    if encoding is None:
        return guess or ""
    return "application/gzip" if encoding == "gzip" else "application/octet-stream"


def is_gzip_file(attachment: Attachment, headers: Mapping[str, str]) -> bool:
    """True when its name or type says that an attachment is gzip by itself, not only on its way."""
    location = attachment.s3.key if attachment.s3 else attachment.location.partition("?")[0]
    name = attachment.filename or disposition_filename(headers.get("content-disposition", "")) or location
    types = media_type(attachment.content_type), media_type(headers.get("content-type")), guessed_type(name)
    return any(word in type_ for type_ in types for word in ("gzip", "tgz", "compressed-tar"))


def complete(attachment: Attachment, content: bytes, filename: str, told: str) -> Attachment:
    """With its bytes, their name and type: the message's word first, then what the source told, then a guess."""
    filename = safe_filename(attachment.filename or filename)
    # Web frameworks call any bytes text/html when nobody says what they are.
    is_generic = told in GENERIC_TYPES or (told == "text/html" and attachment.source is Source.ENDPOINT)
    type_ = attachment.content_type or ("" if is_generic else told) or guessed_type(filename) or told
    return attachment._replace(filename=filename, content_type=type_ or GENERIC_TYPES[1], content=content)


def retry_after_s(header: str, now: float) -> float | None:
    """The pause a Retry-After header asks for, at most an hour: seconds or a date (RFC 9110 10.2.3, 5.6.7)."""
    header = header.strip()
    try:
        if re.fullmatch("[0-9]+", header):
            asked_s = float(header)
        else:
            moment = email.utils.parsedate_to_datetime(header)
            asked_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - now
        return min(max(asked_s, 0.0), LONGEST_NAMED_PAUSE_S)
    except (ValueError, OverflowError):
        return None


# --- S3 ----------------------------------------------------------------------


def sign_s3(
    method: str,
    target: HttpTarget,
    headers: Mapping[str, str],
    payload_sha256: str,
    keys: tuple[str, str, str | None],
    region: str,
    now: float,
) -> dict[str, str]:
    """`headers` and those that sign a request to S3 (version 4) at this time; `keys` are key id, secret, session token.
    The path of the target is signed as it is sent: every segment encoded once, nothing normalised."""
    stamp = datetime.fromtimestamp(now, UTC).strftime("%Y%m%dT%H%M%SZ")
    sent = {name.lower(): value for name, value in headers.items()}
    sent |= {"host": target.netloc, "x-amz-content-sha256": payload_sha256, "x-amz-date": stamp}
    key_id, secret, token = keys
    if token:
        sent["x-amz-security-token"] = token
    path, _, query = target.path.partition("?")
    parameters = sorted(one if "=" in one else f"{one}=" for one in query.split("&") if one)
    lines = [f"{name}:{' '.join(sent[name].split())}" for name in sorted(sent)]
    signed = ";".join(sorted(sent))
    canonical = "\n".join((method, path, "&".join(parameters), *lines, "", signed, payload_sha256))
    scope = f"{stamp[:8]}/{region}/s3/aws4_request"
    to_sign = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()))
    key = f"AWS4{secret}".encode()
    for element in scope.split("/"):
        key = hmac.digest(key, element.encode(), "sha256")
    signature = hmac.digest(key, to_sign.encode(), "sha256").hex()
    credential = f"Credential={key_id}/{scope}"
    sent["authorization"] = f"AWS4-HMAC-SHA256 {credential}, SignedHeaders={signed}, Signature={signature}"
    return sent


def s3_target(wanted: S3Object, settings: S3Settings, region: str) -> HttpTarget:
    """Where an object is asked for: path style or virtual-host style, on Amazon or elsewhere."""
    if not S3_BUCKET.fullmatch(wanted.bucket) or not S3_REGION.fullmatch(region):
        raise HttpFailure("the name of the S3 bucket or region is not valid", transient=False)
    amazon = f"https://s3.{region}.amazonaws.com" + (".cn" if region.startswith("cn-") else "")
    endpoint = asked_at(wanted.endpoint or settings.endpoint or amazon)
    prefix = endpoint.path.partition("?")[0].rstrip("/")
    key = urllib.parse.quote(wanted.key, safe="/")
    if wanted.version_id:
        key += f"?versionId={urllib.parse.quote(wanted.version_id, safe='')}"
    addressing = wanted.addressing or settings.addressing
    if addressing == "auto":
        on_amazon = endpoint.host.endswith((".amazonaws.com", ".amazonaws.com.cn"))
        addressing = "virtual" if on_amazon and S3_BUCKET_IN_HOST.fullmatch(wanted.bucket) else "path"
    if addressing == "virtual":
        return endpoint._replace(host=f"{wanted.bucket}.{endpoint.host}".lower(), path=f"{prefix}/{key}")
    return endpoint._replace(path=f"{prefix}/{wanted.bucket}/{key}")


# --- files -------------------------------------------------------------------


def copy_file_below(base_dir: str, path: str, max_bytes: int, into: BinaryIO) -> None:
    """Copy a regular file below `base_dir`, wherever links and dots lead. Blocks. Links are resolved first, and the
    result is opened step by step without following any: what changes in between is an error, not a way out."""
    base = os.path.realpath(base_dir)
    resolved = os.path.realpath(os.path.join(base, path))
    inside = resolved.removeprefix(base.rstrip("/") + "/")
    if inside == resolved:
        raise HttpFailure(f"{path[:200]!r} is not below [attachments] base_dir", transient=False)
    try:
        copy_regular_file(base, inside.split("/"), max_bytes, into)
    except OSError as error:
        transient = error.errno not in LASTING_FILE_ERRORS or error.filename == base
        raise HttpFailure(f"{path[:200]!r}: {error.strerror}", transient=transient) from error


def copy_regular_file(base: str, steps: Sequence[str], max_bytes: int, into: BinaryIO) -> None:
    with contextlib.ExitStack() as opened:
        folder = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
        opened.callback(os.close, folder)
        for step in steps[:-1]:
            folder = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            opened.callback(os.close, folder)
        # O_NONBLOCK: a FIFO nobody writes to must not hold the thread
        descriptor = os.open(steps[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        opened.callback(os.close, descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise HttpFailure(f"{steps[-1]!r} is not a regular file", transient=False)
        write_within(max_bytes, iter(lambda: os.read(descriptor, 262_144), b""), into, repr(steps[-1]))


# --- the fetcher -------------------------------------------------------------


@dataclass(eq=False, repr=False)
class AttachmentFetcher:
    """Gets the bytes of attachments, each once in a burst, into files without names in `folder`: a slow server holds no
    memory. A secret that cannot be read defers the message."""

    settings: AttachmentSettings
    client: ClientSettings
    s3: S3Settings
    reveal: Callable[[Secret], str]
    folder: str
    in_thread: InThread
    observe: Callable[[Source, str], None]
    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    resolve: Resolver = resolve_name

    def __post_init__(self) -> None:
        self._policy = AddressPolicy(self.settings.allow_hosts)
        self._trust = functools.cache(functools.partial(tls_context, None))
        self._client_trust = functools.cache(functools.partial(tls_context, self.client.ca_file))
        # Under way, or done and of use until then (monotonic); what was used last stands last.
        self._fetches: dict[object, tuple[asyncio.Task[Fetched | Reply], float]] = {}
        most = self.settings.max_message_bytes
        self._too_large = failed_fetch(f"the attachments together are larger than the {most} bytes allowed", 552)
        self._hosts: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()
        self._places = Shares(FETCHES)

    async def fetch_all(
        self, attachments: Sequence[Attachment], lane: object = None
    ) -> tuple[Fetched | None, ...] | Reply:
        """What the attachments refer to, None for one that came with its content; or why it cannot be fetched."""
        fetched: list[Fetched | None] = []
        left = self.settings.max_message_bytes
        for attachment in attachments:
            one = await self.fetch(attachment, lane) if attachment.source is not Source.CONTENT else None
            if isinstance(one, Reply):
                return one
            fetched.append(one)
            left -= one.size_bytes if one else 0
            if left < 0:
                return self._too_large
        return tuple(fetched)

    def parts(
        self, attachments: Sequence[Attachment], fetched: Sequence[Fetched | None]
    ) -> tuple[Attachment, ...] | Reply:
        """All parts of one message, or why there are none. Blocks; the caller has reserved the memory."""
        parts: list[Attachment] = []
        left = self.settings.max_message_bytes
        for attachment, one in zip(attachments, fetched, strict=True):
            content, told = attachment.content, ("", "")
            if one is not None:  # its file may be read by several threads at a time
                content, told = os.pread(one.file.fileno(), one.size_bytes, 0), (one.filename, one.content_type)
            if len(content) > self.settings.max_attachment_bytes:
                return failed_fetch(f"it is larger than the {self.settings.max_attachment_bytes} bytes allowed", 552)
            parts.append(complete(attachment, content, *told))
            left -= len(content)
            if left < 0:
                return self._too_large
            md5 = attachment.content_md5 if one is None else None
            if md5 and (refusal := md5_refusal(md5, io.BytesIO(content))):
                return refusal
        return tuple(parts)

    async def fetch(self, attachment: Attachment, lane: object = None) -> Fetched | Reply:
        """One attachment that is elsewhere, or why it cannot be fetched. A fetch that is under way is joined."""
        where = (attachment.source, attachment.location, attachment.s3)
        key = (*where, attachment.content_md5, is_gzip_file(attachment, {}))
        task, until = self._fetches.pop(key, (None, 0.0))
        fetched, outcome = None, "cached"
        if task is not None and until > self.monotonic():
            self._fetches[key] = task, until
            fetched = await asyncio.shield(task)
        if fetched is None or (isinstance(fetched, Fetched) and not fetched.keep_s):
            outcome, task = "fetched", asyncio.create_task(self._fetch_when_free(attachment, lane), name="attachment")
            self._fetches[key] = task, math.inf
            task.add_done_callback(functools.partial(self._keep, key))
            fetched = await asyncio.shield(task)
        if isinstance(fetched, Reply):
            outcome = "deferred" if fetched.transient else "failed"
        self.observe(attachment.source, outcome)
        return fetched

    def _keep(self, key: object, task: asyncio.Task[Fetched | Reply]) -> None:
        """A fetch has ended: keep for others what may be, and no more than there is room for."""
        now = self.monotonic()
        fetched = None if task.cancelled() or task.exception() else task.result()
        if self._fetches.get(key, (None,))[0] is task:
            keep_s = fetched.keep_s if isinstance(fetched, Fetched) else 0.0
            self._fetches[key] = task, now + keep_s
        kept, size_bytes = 0, 0
        for other, (done, until) in reversed(list(self._fetches.items())):
            if until == math.inf:
                continue
            if until > now:
                kept, size_bytes = kept + 1, size_bytes + cast(Fetched, done.result()).size_bytes
            if until <= now or kept > KEPT_FILES or size_bytes > self.settings.cache_bytes:
                del self._fetches[other]

    async def _fetch_when_free(self, attachment: Attachment, lane: object) -> Fetched | Reply:
        url = attachment.s3.endpoint if attachment.s3 else attachment.location
        try:
            host = http_target(url or "").netloc
        except ValueError:  # the configuration knows where, or the fetch itself will say it
            host = attachment.source.value
        free = self._hosts.setdefault(host, asyncio.Semaphore(FETCHES_PER_HOST))
        timeout_s = self.settings.timeout_seconds
        try:
            async with asyncio.timeout(timeout_s), contextlib.AsyncExitStack() as unless_called:
                await unless_called.enter_async_context(free)
                await self._places.take(lane, 1)
                unless_called.pop_all()
        except TimeoutError:
            return failed_fetch(f"{host} is still busy with other attachments", 451)
        call = asyncio.ensure_future(self.in_thread(functools.partial(self._fetch_blocking, attachment)))
        call.add_done_callback(lambda _: self._places.give_back(lane, 1))
        call.add_done_callback(lambda _: free.release())  # a call that hangs keeps its places
        # It ends itself in time, but for the look-up of a name and a file server that hangs.
        await asyncio.wait([call], timeout=timeout_s + 1)
        return call.result() if call.done() else failed_fetch(f"no answer from {host} within {timeout_s:g} s", 451)

    def _fetch_blocking(self, attachment: Attachment) -> Fetched | Reply:
        location, words = attachment.location, ""
        what: object = ""
        try:
            with contextlib.ExitStack() as unless_fetched:
                file = cast(BinaryIO, unless_fetched.enter_context(tempfile.TemporaryFile(dir=self.folder)))
                ask = functools.partial(
                    http_request,
                    timeout_s=self.settings.timeout_seconds,
                    max_bytes=self.settings.max_attachment_bytes,
                    resolve=self.resolve,
                    into=file,
                    is_gzip_file=functools.partial(is_gzip_file, attachment),
                )
                if attachment.source is Source.URL:
                    answer = ask("GET", location, redirects=5, policy=self._policy, trust=self._trust)
                    what = asked_at(answer.url)
                    location = urllib.parse.urlsplit(answer.url).path
                elif attachment.source is Source.ENDPOINT:
                    if self.client.client_attachment_url is None:
                        raise HttpFailure("[client] client_attachment_url is not configured", transient=False)
                    headers = {**client_credentials(self.client, self.reveal), "Content-Type": "application/json"}
                    body = as_json({"storage_path": location}).encode()
                    url = self.client.client_attachment_url
                    answer = ask("POST", url, body=body, headers=headers, trust=self._client_trust)
                    what = f"the attachment endpoint for {location[:200]!r}"
                elif attachment.s3 is not None:
                    location = attachment.s3.key
                    answer, words = self._from_s3(attachment.s3, ask)
                    what = f"s3://{attachment.s3.bucket}/{location[:200]}"
                else:
                    if self.settings.base_dir is None:
                        raise HttpFailure("[attachments] base_dir is not configured", transient=False)
                    copy_file_below(self.settings.base_dir, location, self.settings.max_attachment_bytes, file)
                    answer = HttpAnswer(200, {}, b"", "")
                name = re.split(r"[/\\]", location)[-1]
                name = urllib.parse.unquote(name) if attachment.source is Source.URL else name
                fetched = self._judged(attachment, file, answer, f"{what} answered {answer.status} {words}", name)
                if isinstance(fetched, Fetched):
                    unless_fetched.pop_all()
                    weakref.finalize(fetched, file.close)
                return fetched
        except HttpFailure as failure:
            lasting = 552 if isinstance(failure, TooLarge) else 554
            return failed_fetch(failure.reason, 451 if failure.transient else lasting)
        except SecretUnavailable as failure:
            return failed_fetch(str(failure), 451)
        except OSError as error:
            return failed_fetch(f"it cannot be stored: {error.strerror}", 451)

    def _from_s3(self, wanted: S3Object, http: Callable[..., HttpAnswer]) -> tuple[HttpAnswer, str]:
        """S3's answer and, where that is an error, its words; they hold no credentials."""
        s3 = self.s3
        if not s3.access_key_id or not s3.secret_access_key:
            raise HttpFailure("no S3 credentials: set access_key_id and secret_access_key in [s3]", transient=False)
        token = self.reveal(s3.session_token) if s3.session_token else None
        keys = self.reveal(s3.access_key_id), self.reveal(s3.secret_access_key), token
        policy = self._policy if wanted.endpoint else None

        import html  # rarely needed, and takes its time

        regions = [wanted.region or s3.region or "us-east-1"]
        for region in regions:  # the second, where there is one, is named by the first answer
            target = s3_target(wanted, s3, region)
            headers = sign_s3("GET", target, {}, EMPTY_SHA256, keys, region, self.now())
            answer = http("GET", target.url, headers=headers, policy=policy, trust=self._trust)
            found = S3_ERROR.findall(answer.body)
            error = {name.decode(): html.unescape(text.decode("utf-8", "replace")) for name, text in found}
            right = answer.headers.get("x-amz-bucket-region") or error.get("Region", "")
            is_wrong = answer.status in (301, 307, 400) and S3_REGION.fullmatch(right) and right != region
            regions += [right] if is_wrong and len(regions) == 1 else []
        words = ": ".join(error[name] for name in ("Code", "Message") if error.get(name))
        # The longest first: one may be part of another.
        for secret in sorted(filter(None, keys), key=len, reverse=True):
            words = words.replace(secret, "...")
        clock_is_wrong = error.get("Code") in ("RequestTimeTooSkewed", "RequestExpired")
        return answer, words[:300] + ("; check the clock of this machine" if clock_is_wrong else "")

    def _judged(
        self, attachment: Attachment, file: BinaryIO, answer: HttpAnswer, refusal: str, name: str
    ) -> Fetched | Reply:
        """What a good answer gave; of the others 408, 429 and 5xx may pass, everything else lasts."""
        headers = answer.headers
        if answer.status in (408, 429) or answer.status >= 500:
            return failed_fetch(refusal, 451, retry_after_s(headers.get("retry-after", ""), self.now()))
        if answer.status not in (200, 203):
            return failed_fetch(refusal, 550 if answer.status in (404, 410) else 554)
        md5, other_md5 = attachment.content_md5, answer.encoded_md5
        if md5 and "gzip" in headers.get("content-encoding", "").lower() and not other_md5:
            other_md5 = undone_md5(file, self.settings.max_attachment_bytes)
        if md5 and (mismatch := md5_refusal(md5, file, other_md5)):
            return mismatch
        if "content-disposition" in headers:
            name = disposition_filename(headers["content-disposition"]) or name
        file.flush()
        size_bytes, content_type = os.fstat(file.fileno()).st_size, media_type(headers.get("content-type"))
        control = headers.get("cache-control", "").lower()  # RFC 9111 5.2.2
        age = re.search(r"\bmax-age\s*=\s*\"?([0-9]{1,9})", control)
        keep_s = min(KEEP_S, float(age[1])) if age else KEEP_S
        if attachment.source is Source.FILESYSTEM or re.search(r"\bno-(store|cache)\b", control):
            keep_s = 0.0
        return Fetched(file, size_bytes, name, content_type, keep_s)


def undone_md5(file: BinaryIO, max_bytes: int) -> str:
    """The MD5 of what a file is once its gzip is undone, "" when that is too large or cannot be. Blocks."""
    file.seek(0)
    digest, pieces = hashlib.md5(usedforsecurity=False), iter(lambda: file.read(BODY_PIECE_BYTES), b"")
    with contextlib.suppress(zlib.error, http.client.IncompleteRead, TooLarge):
        into = types.SimpleNamespace(write=digest.update)
        write_within(max_bytes, _inflated(pieces, lambda piece: None), cast(BinaryIO, into), file)
        return digest.hexdigest()
    return ""


def md5_refusal(announced: str, file: BinaryIO, other_md5: str = "") -> Reply | None:
    """Why the content is not the one that was announced, before or after its content encoding was undone. Blocks."""
    file.seek(0)
    digest = hashlib.file_digest(cast(io.BytesIO, file), lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if announced.lower() in (digest, other_md5):
        return None
    return failed_fetch(f"its MD5 is {digest}, not {announced} as announced", 554)


# ======================================================================
# DELIVERY AGENT - one SMTP session; one transaction -> a reply for each recipient
# ======================================================================
#
# The only room that knows aiosmtplib: it connects, turns to TLS and logs in with it, then takes the connection
# over for the transactions, which use PIPELINING and CHUNKING where they are offered (RFC 5321, 2920, 3030; the
# reader of aiosmtplib loses the second reply of a packet). Its invariant: whatever a server does, mail gets replies,
# never an exception; and a connection that did one thing out of order is not believed again.

CONNECT_TIMEOUT_S = 60.0  # to connect, and for each reply up to the login
REPLY_TIMEOUT_S = 300.0  # to MAIL and RCPT (RFC 5321 4.5.3.2)
DATA_TIMEOUT_S = 120.0  # to DATA; for each piece of a content
QUIT_TIMEOUT_S = 5.0
LONGEST_REPLY_BYTES = 65_536
CONTENT_PIECE_BYTES = 65_536  # of a content, between two looks at the server and at everybody else
FRESH_S = 1.0  # no content goes unasked when the latest word of the server is older: the connection may be dead

_CODE = re.compile(r"(?:(\d{3})|#?([245]\.\d{1,3}\.\d{1,3}))(?:[\s:-]+|$)")  # enhanced: RFC 3463
_REPLY_LINE = re.compile(rb"([2-5]\d\d)(?:([ -])(.*))?", re.DOTALL)
_LIMIT = re.compile(r"(?i)(?<!\S)(MAILMAX|RCPTMAX|RCPTDOMAINMAX)=([1-9][0-9]{0,5})(?!\S)")  # RFC 9422 3
_UNSPEAKABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
_NO_BDAT = re.compile(r"50[0-4]\b|5\d\d 5\.5\.[124]\b")  # the command, not the content, is refused
_CLOSED = (Cause.LOST, "connection closed by the server")

# What a person does about a certificate that is not accepted, by the number that OpenSSL gives the reason.
_CERTIFICATE_CURES = {
    18: "; name a copy of it (in PEM) as ca_file, or set verify_tls = false",
    **dict.fromkeys((2, 19, 20, 21), "; name the certificate of its authority as ca_file (a file in PEM)"),
    **dict.fromkeys((62, 64), "; set host to a name that is in it"),
}
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")  # by the version of OpenSSL


# ----- replies


def one_line(text: str) -> str:
    """A text of the other side as one line of printable characters, at most 1,000."""
    if not text.isprintable():
        text = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(text.split())[:1_000]


def server_reply(stage: Stage, code: int, lines: Iterable[str]) -> Reply:
    """The server's own words, in which no line begins with a code: some say it twice, some on each line. The
    enhanced code is believed when its class fits (RFC 2034 4)."""
    enhanced_code, texts = None, []
    for line in (line[:1_000].strip() for line in lines):
        while (found := _CODE.match(line)) and (found[1] or found[2][0]) in (str(code), str(code)[0]):
            enhanced_code = enhanced_code or found[2]
            line = line[found.end() :]
        texts.append(line)
    return Reply(stage, code, one_line(" ".join(texts)), enhanced_code)


def unfitting_reply(stage: Stage, answer: str) -> Reply:
    """What we say when the server said something that is no answer at this place."""
    return Reply(stage, 451, one_line(f"the answer does not fit: {answer}"), "4.5.0", Cause.LOCAL)


def local_reply(stage: Stage, text: str, cause: Cause = Cause.LOCAL) -> Reply:
    """Our word in place of the server's: for now it does not work."""
    codes = {Stage.CONNECT: (451, "4.4.1"), Stage.TLS: (454, "4.7.5"), Stage.AUTH: (451, "4.7.0")}
    code, enhanced_code = codes.get(stage, (451, "4.4.2"))
    return Reply(stage, code, one_line(text), enhanced_code, cause)


def _reply_of_failure(stage: Stage, failure: Exception, account: Account) -> Reply:
    """A reply for what aiosmtplib, ssl or the network raised while a session was opened, with the cure if we know."""
    implicit = account.encryption == "implicit"
    if isinstance(failure, aiosmtplib.SMTPResponseException):
        if 400 <= failure.code < 600:
            return server_reply(stage, failure.code, failure.message.split("\n"))
        return unfitting_reply(stage, f"{failure.code} {failure.message}".removeprefix("-1 "))
    if stage is Stage.CONNECT and implicit and not isinstance(failure.__cause__, aiosmtplib.SMTPException):
        stage = Stage.TLS  # the server has not greeted yet
    while isinstance(failure.__cause__, OSError):
        failure = failure.__cause__
    if isinstance(failure, ssl.SSLCertVerificationError):
        cure = _CERTIFICATE_CURES.get(failure.verify_code, "")
        return local_reply(Stage.TLS, f"the server's certificate is not accepted: {failure.verify_message}{cure}")
    if isinstance(failure, ssl.SSLError):
        text = f"no TLS with the server: {failure.reason or failure}"
        if implicit and failure.reason in _NO_TLS:
            text += "; this port begins in clear: set implicit_tls = false (start_tls encrypts then), or the port of TLS, mostly 465"
        return local_reply(Stage.TLS, text)
    if isinstance(failure, (TimeoutError, ConnectionAbortedError)):  # the latter: a handshake took too long
        silent = "" if implicit or stage is not Stage.CONNECT else "; if TLS is expected here, set implicit_tls = true"
        return local_reply(stage, f"no answer in time{silent}", Cause.TIMEOUT)
    if isinstance(failure, ConnectionError):
        reason = f": {failure.strerror}" if failure.strerror else ""
        return local_reply(stage, f"connection lost{reason}", Cause.LOST)
    return local_reply(stage, str(failure))


# ----- the session


def data_pieces(content: bytes) -> Iterator[tuple[bytes, bool]]:
    """A content, whose line ends are CRLF, as DATA carries it: dots at line starts doubled, the end marked by a line
    with only a dot (RFC 5321 4.5.2). In pieces cut at line ends where there are any, with True beside the last one."""
    start, last = 0, False
    while not last:
        end = start + CONTENT_PIECE_BYTES
        last = end >= len(content)
        if not last:
            end = content.rfind(b"\n", start, end) + 1 or end
        piece = content[start:end].replace(b"\n.", b"\n..")
        if piece.startswith(b".") and (start == 0 or content[start - 1] == 10):  # a line feed
            piece = b"." + piece
        if last:
            piece += b".\r\n" if not piece or piece.endswith(b"\n") else b"\r\n.\r\n"
        yield piece, last
        start = end


class Answer(NamedTuple):
    """One reply as it came: its code and the lines of its text."""

    code: int
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join((str(self.code), *self.lines))


def _reply_line(line: bytes) -> tuple[bool, Answer] | None:
    """A line of a reply: whether more follow, and the reply that it would be by itself (RFC 5321 4.2.1)."""
    found = _REPLY_LINE.fullmatch(line.rstrip(b"\r"))
    return found and (found[2] == b"-", Answer(int(found[1]), ((found[3] or b"").decode("utf-8", "replace"),)))


_usual_reply_line = functools.lru_cache(maxsize=64)(_reply_line)  # to most commands a server always says the same


class Offers(NamedTuple):
    """What the server says it can do, and what the connection is."""

    size_bytes: int | None  # the largest content; None: not said
    pipelining: bool
    smtputf8: bool
    eight_bit_mime: bool
    auth: tuple[str, ...]
    tls: str | None  # "TLSv1.3"; None: in clear
    chunking: bool = False
    mailmax: int | None = None  # messages of a session, recipients and domains of a transaction (RFC 9422)
    rcptmax: int | None = None
    rcptdomainmax: int | None = None


class _Command(NamedTuple):
    """A command of a transaction, and whom its refusal concerns: one recipient, or all."""

    line: bytes
    stage: Stage
    recipient: str | None = None


_RSET = _Command(b"RSET\r\n", Stage.MAIL)
_DATA = _Command(b"DATA\r\n", Stage.DATA)


class Session(asyncio.Protocol):
    """An open connection to an account's server, logged in: one transaction at a time, a deadline for each answer."""

    def __init__(
        self,
        transport: asyncio.Transport,
        name: str,
        offers: Offers,
        timeout_s: float | None,
        end_of_data_timeout_s: float,
    ) -> None:
        self.name, self.offers = name, offers
        self.transactions = 0  # begun so far
        self.opened_at = time.monotonic()
        self.broken: tuple[Cause, str] | None = None  # why nothing that it still says is believed
        self._timeout_s, self._end_of_data_timeout_s = timeout_s, end_of_data_timeout_s  # the first: of other replies
        self.bdat: bool | None = None  # the server knows it; False: gets it wrong
        self._clean, self._chunked = True, False  # no transaction is open at the server; the latest was by BDAT
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._unread = b""  # an unfinished line
        self._lines, self._reply_bytes = list[Answer](), 0  # of an unfinished reply
        self._answers: list[Answer] = []
        self._expected = self._positive = 0  # the latter: of those
        self._then = b""  # a content that goes when all commands are granted
        self._heard_at, self._unsent = self._loop.time(), False  # when it broke, not all had been sent
        self._patience_s, self._deadline = 0.0, 0.0  # for the next answer
        self._watchdog: asyncio.TimerHandle | None = None
        self._paused = False
        self._waiter: asyncio.Future[None] | None = None
        transport.set_write_buffer_limits(high=CONTENT_PIECE_BYTES)
        transport.set_protocol(self)

    @property
    def usable(self) -> bool:
        """False after a timeout, a 421, an answer that does not fit, and when the connection is gone."""
        return self.broken is None

    async def transact(
        self, envelope: Envelope, content: bytes, *, smtputf8: bool, careful: bool = False, chunking: bool = False
    ) -> dict[str, Reply]:
        """Offer one message to the server: a reply for each recipient, whatever happens. What was answered before
        a connection ended is kept. A careful one says DATA only after the replies to RCPT, and not for nobody. With
        `chunking` a small content goes by BDAT where that will do; no reply: the server does not know it."""
        addresses = " ".join((envelope.sender, *envelope.recipients))
        smtputf8 = smtputf8 or not addresses.isascii()
        refusal = None
        if (most := self.offers.size_bytes) is not None and len(content) > most:
            refusal = 552, f"message of {len(content)} bytes; the server takes {most} at most", "5.3.4"
        elif smtputf8 and not self.offers.smtputf8:
            refusal = 550, "the message needs SMTPUTF8, which the server does not offer", "5.6.7"
        elif not addresses.isprintable() and _UNSPEAKABLE.search(addresses):
            refusal = 501, "an address with control characters", "5.1.3"
        if refusal is not None:
            return dict.fromkeys(envelope.recipients, Reply(Stage.MAIL, *refusal, Cause.LOCAL))
        if self.broken is not None:  # while it was idle
            return dict.fromkeys(envelope.recipients, local_reply(Stage.MAIL, self.broken[1], Cause.LOST))
        mail = f"MAIL FROM:<{addr_spec(envelope.sender)}>"
        if most is not None:
            mail += f" SIZE={len(content)}"
        if not content.isascii():
            if self.offers.eight_bit_mime:  # without the offer it goes as it is
                mail += " BODY=8BITMIME"
            smtputf8 = smtputf8 or (self.offers.smtputf8 and has_utf8_header(content))
        if smtputf8:
            mail += " SMTPUTF8"
        recipients = [_Command(f"RCPT TO:<{addr_spec(a)}>\r\n".encode(), Stage.RCPT, a) for a in envelope.recipients]
        commands = [_Command(f"{mail}\r\n".encode(), Stage.MAIL), *recipients, _DATA]
        self.transactions += 1
        chunking = chunking and self.offers.chunking and self.offers.pipelining and not careful and self._clean
        chunking = chunking and time.monotonic() - self._heard_at <= FRESH_S
        chunk = content if not chunking or not content or content.endswith(b"\n") else content + b"\r\n"  # RFC 3030
        self._chunked = chunking and len(chunk) <= min(CONTENT_PIECE_BYTES, most or math.inf)
        if self._chunked:
            commands[-1] = _Command(b"BDAT %d LAST\r\n%b" % (len(chunk), chunk), Stage.END_OF_DATA)
        elif not self._clean:
            commands.insert(0, _RSET)
        try:
            return await self._transact(envelope.recipients, content, commands, careful)
        except BaseException:
            self._break_off(Cause.LOST, "aborted")
            raise

    async def probe(self, sender: str) -> Reply:
        """What the server says to mail from this sender; none follows."""
        command = _Command(f"MAIL FROM:<{addr_spec(sender)}>\r\n".encode(), Stage.MAIL)
        answers = await self._ask(command.line, 1, self._timeout_s or REPLY_TIMEOUT_S)
        reply = self._reply_to(command, answers[0]) if answers else self._unanswered(Stage.MAIL)
        if reply.accepted:
            await self._ask(_RSET.line, 1, self._timeout_s or REPLY_TIMEOUT_S)
        return reply

    async def quit(self) -> None:
        """Say goodbye and close politely (close_notify under TLS), each within a few seconds."""
        await self._ask(b"QUIT\r\n", 1, QUIT_TIMEOUT_S)
        if self.broken is None:
            self._transport.close()  # of a closed one no more can be asked, not even abort() (Python 3.11, TLS)
            await self._ask(b"", 1, QUIT_TIMEOUT_S)
        self._break_off(Cause.LOST, "closed")

    async def _transact(
        self, recipients: Sequence[str], content: bytes, commands: list[_Command], careful: bool
    ) -> dict[str, Reply]:
        """The commands in one packet where the server offers PIPELINING, else one by one as long as they can
        lead to a content; then the content, for all who were not refused by themselves. With BDAT it is in the packet."""
        self._clean, chunked = False, self._chunked
        refusals: dict[str, Reply] = {}  # of single recipients
        verdict: Reply | None = None  # the reply for all others
        taken = go_ahead = False  # a recipient; the last command, so that the content may go, or has gone
        small = b"" if chunked or len(content) > CONTENT_PIECE_BYTES else next(data_pieces(content))[0]
        packets = [commands[:-1], commands[-1:]] if careful else [commands]
        for packet in packets if self.offers.pipelining else [[command] for command in commands]:
            if verdict is not None or (packet == [_DATA] and not taken):
                break
            patience_s = self._timeout_s or (DATA_TIMEOUT_S if packet == [_DATA] else REPLY_TIMEOUT_S)
            then = small if packet[-1] is _DATA else b""
            answers = await self._ask(b"".join([one.line for one in packet]), len(packet), patience_s, then=then)
            went = then != self._then
            if self._positive == len(commands) and (went or chunked) and self.broken is None:  # as nearly all goes
                self._clean, self.bdat = True, chunked or self.bdat
                return dict.fromkeys(recipients, server_reply(Stage.END_OF_DATA, *answers[-1]))
            for command, answer in zip(packet, answers, strict=False):
                granted = answer.code == 354 if command is _DATA else 200 <= answer.code < 300
                if granted:
                    taken, go_ahead = taken or command.recipient is not None, command is commands[-1]
                elif verdict is None or answer.code < 400:
                    reply = self._reply_to(command, answer)
                    if command.recipient is None or reply.code == 421 or reply.cause is not Cause.SERVER:
                        verdict = verdict or reply
                    else:
                        refusals[command.recipient] = reply
            if verdict is None and len(answers) < len(packet):
                stage = packet[len(answers)].stage
                if chunked:  # in doubt, unless the server closed without a reply (they come in order), or not all went
                    self.bdat = bool(self.bdat)  # it may be BDAT that ended the connection
                    unheard = self._unsent or (self.broken == _CLOSED and not answers)
                    stage = (Stage.DATA if answers else Stage.MAIL) if unheard else Stage.END_OF_DATA
                verdict = self._unanswered(stage)
        left = len(refusals) < len(recipients)
        if left and chunked and (verdict is None or verdict.stage is Stage.END_OF_DATA):
            if verdict is not None and _NO_BDAT.match(verdict.words):
                self._break_off(Cause.LOCAL, f"the answer does not fit: {answers[-1]}")
                return {}
            if self.broken is not None and self.broken[0] is Cause.LOCAL:  # who knows what was said to the content
                verdict = self._unanswered(Stage.END_OF_DATA)
        if left and verdict is None:
            done = answers[-1:] if chunked else answers[len(packet) :] if went else None
            verdict = await self._send_content(content, done)
            self._clean = verdict.accepted
            self.bdat = chunked or self.bdat
        elif go_ahead and (chunked or taken):  # for nobody, or without a sender
            self._break_off(Cause.LOCAL, f"the answer does not fit: {answers[-1]}")
        elif go_ahead:  # for nobody: an empty content ends it (RFC 2920 3.1)
            await self._ask(b".\r\n", 1, self._timeout_s or REPLY_TIMEOUT_S)
        return {one: refusals.get(one) or cast(Reply, verdict) for one in recipients}

    async def _send_content(self, content: bytes, answers: list[Answer] | None) -> Reply:
        """The server's reply to the content, which is in doubt once its end is written; `answers` to one that has
        gone."""
        stage = Stage.DATA if answers is None else Stage.END_OF_DATA
        for piece, last in data_pieces(content) if answers is None else ():
            if answers or self.broken is not None:
                break
            stage = Stage.END_OF_DATA if last else Stage.DATA
            patience_s = self._end_of_data_timeout_s if last else self._timeout_s or DATA_TIMEOUT_S
            answers = await self._ask(piece, 1, patience_s, more=not last)
        if not answers:
            return self._unanswered(stage)
        if stage is Stage.DATA:
            self._break_off(Cause.LOST, "the server did not wait for the end of the content")
        return self._reply_to(_Command(b"", stage), answers[0])

    def _reply_to(self, command: _Command, answer: Answer) -> Reply:
        """What an answer says; after one that does not fit the command nothing is believed."""
        if 300 <= answer.code < 400 or (answer.code < 400 and command.stage is Stage.DATA):
            self._break_off(Cause.LOCAL, f"the answer does not fit: {answer}")
            in_doubt = self._chunked or command.stage is Stage.END_OF_DATA
            return self._unanswered(Stage.END_OF_DATA) if in_doubt else unfitting_reply(command.stage, str(answer))
        if command is _RSET and answer.code != 421:
            self._break_off(Cause.LOST, f"RSET was refused: {answer}")
            return self._unanswered(Stage.MAIL)
        return server_reply(command.stage, *answer)

    def _unanswered(self, stage: Stage) -> Reply:
        """The reply in place of one that did not come. After the final dot the mail is in doubt,
        also when something came that was no answer."""
        cause, text = self.broken or (Cause.LOST, "connection lost")
        if stage is Stage.END_OF_DATA and cause is Cause.LOCAL:
            cause = Cause.LOST
        return local_reply(stage, text, cause)

    async def _ask(
        self, commands: bytes, answers: int, timeout_s: float, *, more: bool = False, then: bytes = b""
    ) -> list[Answer]:
        """Write, and wait for so many answers, each within the timeout; fewer when the wire broke.

        With `more` to follow, wait only until there is room for it, or an answer has come early. A content that is to
        come `then` goes, and has its answer, when the commands before it were all granted.
        """
        self._answers, self._expected, self._positive, self._then = [], answers, 0, then
        self._patience_s, self._deadline = timeout_s, time.monotonic() + timeout_s
        if self._watchdog is None or self._watchdog.when() > self._deadline:
            self._watch()
        if self.broken is None:
            self._transport.write(commands)
        if more:
            await asyncio.sleep(0)  # a server that takes it all at once must not keep the loop from others
        while self._expected and self.broken is None and (self._paused or not more):
            self._waiter = self._loop.create_future()
            await self._waiter
        return self._answers

    def _break_off(self, cause: Cause, text: str) -> None:
        """End the connection at once, if it has not ended."""
        if self.broken is not None:
            return
        self.broken, self._unsent = (cause, text), self._transport.get_write_buffer_size() > 0
        if self._chunked and cause is not Cause.LOST:
            self.bdat = False
        if self._watchdog is not None:
            self._watchdog.cancel()
        self._transport.abort()
        self._wake()

    # Called by the event loop:

    def data_received(self, data: bytes) -> None:
        """Read lines; the last one of a reply has no hyphen behind its code (RFC 5321 4.2.1)."""
        *lines, self._unread = (self._unread + data).split(b"\n")
        self._heard_at = time.monotonic()
        for line in lines:
            found = _usual_reply_line(line) if len(line) < 100 else _reply_line(line)
            self._reply_bytes += len(line)
            if found is None or (self._lines and self._lines[0].code != found[1].code):
                return self._break_off(Cause.LOCAL, f"malformed reply: {line[:200].decode('utf-8', 'replace')}")
            if self._reply_bytes > LONGEST_REPLY_BYTES:
                break
            more, answer = found
            if more or self._lines:
                self._lines.append(answer)
                if more:
                    continue
                answer = Answer(answer.code, tuple([one.lines[0] for one in self._lines]))
            self._lines, self._reply_bytes = [], 0
            if asked_for := self._expected > 0:
                self._answers.append(answer)
                self._expected -= 1
                self._positive += 200 <= answer.code < 300
                if self._chunked and self._expected == 1:  # the one to the content
                    self._patience_s = self._end_of_data_timeout_s
                self._deadline = self._heard_at + self._patience_s
            if answer.code == 421:  # nothing follows, asked for or not (RFC 5321 3.8)
                return self._break_off(Cause.LOST, f"the server ended the session: {answer}")
            if not asked_for:
                return self._break_off(Cause.LOCAL, f"an unexpected reply: {answer}")
        wanted = self._then and not (self._expected or self._unread) and self._answers[-1].code == 354
        if self._reply_bytes + len(self._unread) > LONGEST_REPLY_BYTES:
            self._break_off(Cause.LOCAL, "an endless reply")
        elif wanted and self._positive == len(self._answers) - 1:
            self._transport.write(self._then)
            self._then, self._expected, self._patience_s = b"", 1, self._end_of_data_timeout_s
            self._deadline = self._heard_at + self._patience_s
        elif not self._expected:
            self._wake()
        return None

    def eof_received(self) -> None:
        self._break_off(*_CLOSED)

    def connection_lost(self, exc: Exception | None) -> None:
        self._break_off(*((Cause.LOST, f"connection lost: {exc}") if exc else _CLOSED))

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._wake()

    def _watch(self) -> None:
        """Break off when the time of an answer is over. One timer for a whole session, which is set again when it
        comes too early: one for each answer would cost a twentieth of a transaction."""
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        if self._expected and self._loop.time() >= self._deadline:
            self._break_off(Cause.TIMEOUT, f"no answer within {self._patience_s:g} s")
        elif self._expected and self.broken is None:
            self._watchdog = self._loop.call_at(self._deadline, self._watch)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


# ----- opening a session: aiosmtplib's part


def _scrubbed(reply: Reply, secret: str) -> Reply:
    """The reply of a server that may have repeated a password or token, in base64 or not, without it."""
    start = secret[:16]  # what follows may be cut off

    def hidden(word: re.Match[str]) -> str:
        with contextlib.suppress(ValueError):
            if start.encode() in base64.b64decode(word[0] + "=="):
                return "***"
        return word[0]

    text = re.sub(r"[A-Za-z0-9+/]+=*", hidden, reply.text)
    return reply._replace(text=re.sub(re.escape(start) + r"\S*", "***", text))


class NoSession(Exception):
    """Ends the opening of a session; its argument is the reply that says why."""


async def _say_hello(smtp: aiosmtplib.SMTP, greeting: str) -> None:
    """EHLO, or HELO to a server that does not know it (RFC 5321 3.2); who knows neither may be one of LMTP."""
    try:
        await smtp.ehlo()
    except aiosmtplib.SMTPHeloError as refusal:
        if refusal.code < 500:
            raise
        try:
            await smtp.helo()
        except aiosmtplib.SMTPHeloError as last:
            lmtp = re.search("(?i)lmtp|lhlo", f"{greeting} {refusal.message} {last.message}") is not None
            if not lmtp and last.code in (500, 502):
                with contextlib.suppress(aiosmtplib.SMTPException):
                    lmtp = (await smtp.execute_command(b"LHLO", str(smtp.local_hostname).encode())).code == 250
            hint = " (this port speaks LMTP: set host and port to where the server speaks SMTP)" if lmtp else ""
            raise aiosmtplib.SMTPHeloError(last.code, last.message + hint) from None


def _offers_of(smtp: aiosmtplib.SMTP, auth: Iterable[str]) -> Offers:
    extensions, encryption = smtp.esmtp_extensions, smtp.get_transport_info("ssl_object")
    size = extensions.get("size", "")
    limits: dict[str, Any] = {name.lower(): int(most) for name, most in _LIMIT.findall(extensions.get("limits", ""))}
    return Offers(
        size_bytes=int(size) or None if re.fullmatch("[0-9]{1,20}", size) else None,  # RFC 1870 4
        pipelining=smtp.supports_extension("pipelining"),
        smtputf8=smtp.supports_extension("smtputf8"),
        eight_bit_mime=smtp.supports_extension("8bitmime"),
        auth=tuple(auth),
        tls=encryption.version() if encryption is not None else None,
        chunking=smtp.supports_extension("chunking"),
        **limits,
    )


async def _log_in(smtp: aiosmtplib.SMTP, account: Account, secret: str) -> None:
    """One login with one method (RFC 4954): a refused password is not tried again another way.

    The method is the one asked for, or the best that both know: in clear one that hides the password comes first.
    """
    in_clear = smtp.get_transport_info("sslcontext") is None
    wanted = ["cram-md5", "plain", "login"] if in_clear else ["plain", "login", "cram-md5"]
    if account.oauth2_token_url:
        wanted = ["oauthbearer"] if account.auth == "oauthbearer" else ["xoauth2", "oauthbearer"]
    elif account.auth != "auto":
        wanted = [account.auth]
    offered = smtp.server_auth_methods
    method = next((method for method in wanted if method in offered), None)
    if method is None:
        names = f"only AUTH {', '.join(offered).upper()}" if offered else "no AUTH"
        more = "; it may after STARTTLS: set start_tls = auto" if smtp.supports_extension("starttls") else ""
        raise aiosmtplib.SMTPException(f"the server offers {names}; the account wants to log in ({account.auth}){more}")
    user = str(account.user)
    plain, bearer = f"\0{user}\0{secret}", f"auth=Bearer {secret}\x01\x01"
    name, place = user.replace("=", "=3D").replace(",", "=2C"), f"host={account.host}\x01port={account.port}"
    initial, *answers = {
        "plain": (plain, plain),  # RFC 4616
        "login": (user, secret),
        "cram-md5": ("", user),
        "xoauth2": (f"user={user}\x01{bearer}", ""),  # a refusal is a challenge that says why
        "oauthbearer": (f"n,a={name},\x01{place}\x01{bearer}", "\x01"),  # RFC 7628, the same
    }[method]
    command = (b"AUTH", method.upper().encode())
    response = await smtp.execute_command(*command, *filter(None, [base64.b64encode(initial.encode())]))
    if method == "login" and response.code // 10 == 50 and not response.message.startswith("5.7."):
        response = await smtp.execute_command(*command)  # it wants the name on a line of its own
        answers.insert(0, user)
    explanation = ""
    while response.code == 334 and answers:
        challenge, answer = b"", answers.pop(0)
        with contextlib.suppress(ValueError, TypeError, LookupError, RecursionError):
            challenge = base64.b64decode(response.message)
            explanation = f"(status {json.loads(challenge)['status']})"
        if method == "cram-md5":  # RFC 2195
            answer += f" {hmac.new(secret.encode(), challenge, 'md5').hexdigest()}"
        response = await smtp.execute_command(base64.b64encode(answer.encode()))
    if response.code != 235:
        other = next((name for name in ("plain", "login") if name in offered), None)
        if method == "cram-md5" and other and response.code >= 500:
            explanation = f"(to CRAM-MD5: if the password is right, auth = {other} would help)"
        raise aiosmtplib.SMTPAuthenticationError(response.code, f"{response.message} {explanation}")


def client_tls_context(account: Account) -> ssl.SSLContext:
    """How the account's connections are encrypted: `ca_file` stands in place of the system's
    authorities; without verification any certificate will do. Blocking: reads files."""
    context = ssl.create_default_context(cafile=account.ca_file)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if account.ca_file:  # of Python 3.13 on defaults; private authorities rarely follow RFC 5280 to the letter
        context.verify_flags = (context.verify_flags | ssl.VERIFY_X509_PARTIAL_CHAIN) & ~ssl.VERIFY_X509_STRICT
    if not account.verify_tls:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if account.client_cert:
        context.load_cert_chain(account.client_cert, account.client_key, password="")  # never ask a terminal
    return context


# ----- the agent


@dataclass(slots=True)
class _Grant:
    """What is known of one account's access; of the present settings only."""

    oauth2: dict[str, Any]
    expires_at: float = -math.inf  # of the token that the latest fetch gave
    refresh_token: str | None = field(default=None, repr=False)  # the latest one, when it is rotated
    fetch: asyncio.Future[str | Reply] | None = None  # the latest, maybe still going on


@dataclass(kw_only=True, slots=True, eq=False)
class DeliveryAgent:
    """Opens sessions for all accounts; fetches access tokens, and renews them before they expire (RFC 6749 4.4, 6).

    `hostname` is our name in EHLO where an account has none; "": the address of the connection (RFC 5321 4.1.1.1).
    `post_form` blocks; it raises MailproxyError, OSError or ValueError when there is no answer.
    """

    hostname: str
    reveal: Callable[[Secret], str]
    in_thread: InThread
    post_form: Callable[[str, Mapping[str, str], float], tuple[int, bytes]]  # URL, fields, timeout in s: status, body
    monotonic: Callable[[], float] = time.monotonic
    end_of_data_timeout_s: float = 600.0  # RFC 5321 4.5.3.2.6
    accounts: dict[str, Account] = field(default_factory=dict)  # the latest definition of each
    contexts: dict[tuple[object, ...], asyncio.Future[ssl.SSLContext]] = field(default_factory=dict)  # may be cleared
    grants: dict[str, _Grant] = field(default_factory=dict)  # by account, whose connections share a token and a fetch

    async def open_session(
        self,
        account: Account,
        *,
        name: str,
        connected: Callable[[], object] = lambda: None,
        may_log_in: Callable[[], Awaitable[object]] = lambda: asyncio.sleep(0),
        renewed: bool = False,
    ) -> Session | Reply:
        """Connect and log in, or the reply that says why not; a refused access token is renewed once.

        `connected` is called once there is a connection, `may_log_in` is awaited before each login. TLS is what the
        account says: a STARTTLS that fails is never followed by mail in clear (RFC 3207).
        """
        encryption, stage = account.encryption, Stage.CONNECT
        session = smtp = secret = None
        try:
            secret = await self._secret(account) if account.user else None
            smtp = await self._connect(account)
            connected()
            greeting = (await smtp.connect()).message
            stage = Stage.EHLO
            await _say_hello(smtp, greeting)
            offered = smtp.supports_extension("starttls")
            if encryption == "required" or (encryption == "auto" and offered):
                stage = Stage.TLS
                if not offered:
                    raise aiosmtplib.SMTPException("the account requires TLS, but the server does not offer STARTTLS")
                await smtp.starttls()
                stage = Stage.EHLO
                await _say_hello(smtp, greeting)
            methods = smtp.server_auth_methods
            if secret is not None:
                stage = Stage.AUTH
                await may_log_in()
                secret = await self._secret(account) if account.oauth2_token_url else secret  # there may be a newer one
                await _log_in(smtp, account, secret)
                stage = Stage.EHLO  # once more: some servers offer more to who has logged in
                hello = await smtp.execute_command(b"EHLO", str(smtp.local_hostname).encode())
                if hello.code == 250:
                    smtp.last_ehlo_response = hello
            transport = cast(asyncio.Transport, smtp.transport)  # of which aiosmtplib hears no more
            session = Session(transport, name, _offers_of(smtp, methods), account.timeout, self.end_of_data_timeout_s)
            return session
        except NoSession as failure:
            return cast(Reply, failure.args[0])
        except (aiosmtplib.SMTPException, OSError, ValueError) as failure:
            reply = _reply_of_failure(stage, failure, account)
        finally:
            if session is None and smtp is not None and smtp.transport is not None:
                cast(asyncio.Transport, smtp.transport).abort()
        reply = _scrubbed(reply, secret) if secret and stage is Stage.AUTH else reply
        if account.oauth2_token_url and secret and reply.stage is Stage.AUTH and reply.permanent and not renewed:
            self.invalidate(account, secret)
            return await self.open_session(account, name=name, connected=connected, may_log_in=may_log_in, renewed=True)
        return reply

    async def _connect(self, account: Account) -> aiosmtplib.SMTP:
        """Look the host up and try its addresses in turn, all within one timeout: each gets its
        share of what is left, so that a dead first address does not use it up. Raises NoSession."""
        context = await self._tls_context(account)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (account.timeout or CONNECT_TIMEOUT_S)
        failures, addresses = list[str](), cast(Sequence[Address], ())
        try:
            async with asyncio.timeout_at(deadline):
                addresses = await self.in_thread(functools.partial(resolve_name, account.host, account.port))
        except TimeoutError:
            failures = [f"no answer to the look-up of {account.host}"]
        except (OSError, UnicodeError) as failure:
            failures = [f"look-up of {account.host} failed: {getattr(failure, 'strerror', None) or failure}"]
        for tried, (family, address) in enumerate(addresses):
            try:
                with contextlib.ExitStack() as unless_connected:
                    sock = unless_connected.enter_context(socket.socket(family, socket.SOCK_STREAM))
                    sock.setblocking(False)
                    async with asyncio.timeout((deadline - loop.time()) / (len(addresses) - tried)):
                        await loop.sock_connect(sock, address)
                    own = str(sock.getsockname()[0]).partition("%")[0]
                    unless_connected.pop_all()
                    return aiosmtplib.SMTP(
                        hostname=account.host.removesuffix("."),
                        sock=sock,
                        local_hostname=account.hostname or self.hostname or f"[{'IPv6:' if ':' in own else ''}{own}]",
                        timeout=account.timeout or CONNECT_TIMEOUT_S,
                        use_tls=account.encryption == "implicit",
                        start_tls=False,
                        tls_context=context,
                    )
            except OSError as failure:  # TimeoutError is one
                reason = os.strerror(failure.errno) if failure.errno else "no answer in time"
                failures.append(f"{account.host}[{address[0]}]:{account.port}: {reason}")
        raise NoSession(local_reply(Stage.CONNECT, "; ".join(failures)))

    async def _secret(self, account: Account) -> str:
        """The account's password, or its access token, before the server is bothered. Raises NoSession."""
        if account.oauth2_token_url:
            token = await self.token(account)
            if isinstance(token, Reply):
                raise NoSession(token)
            return token
        if account.password is None:
            return ""
        try:
            async with asyncio.timeout(account.timeout or CONNECT_TIMEOUT_S):
                return await self.in_thread(functools.partial(self.reveal, account.password))
        except (TimeoutError, SecretUnavailable) as failure:
            raise NoSession(local_reply(Stage.AUTH, str(failure) or "the password cannot be read in time")) from None

    async def token(self, account: Account) -> str | Reply:
        """A token that is still good for a while. Who asks during a fetch gets what comes of it: a fetch
        is a task, so it does not begin before all who ask at the same time have asked."""
        oauth2, grant = account.oauth2, self.grants.get(account.id)
        if grant is None or grant.oauth2 != oauth2:
            grant = self.grants[account.id] = _Grant(oauth2)
        if grant.fetch is None or (grant.fetch.done() and self.monotonic() >= grant.expires_at):
            grant.fetch = asyncio.ensure_future(self._fetch_token(grant, account.timeout or CONNECT_TIMEOUT_S))
        return await asyncio.shield(grant.fetch)

    def invalidate(self, account: Account, token: str) -> None:
        """The server refused this token: the next one asked for is fetched anew."""
        grant = self.grants[account.id]
        if grant.fetch is not None and grant.fetch.done() and grant.fetch.result() == token:
            grant.expires_at = -math.inf

    async def _fetch_token(self, grant: _Grant, timeout_s: float) -> str | Reply:
        def post() -> tuple[int, bytes]:  # blocking: may read secrets from files
            fields = grant.oauth2 | ({"refresh_token": grant.refresh_token} if grant.refresh_token else {})
            fields = {name: self.reveal(it) if isinstance(it, Secret) else it for name, it in fields.items()}
            fields["grant_type"] = "refresh_token" if "refresh_token" in fields else "client_credentials"
            return self.post_form(fields.pop("token_url"), fields, timeout_s)

        try:
            async with asyncio.timeout(timeout_s):
                status, body = await self.in_thread(post)
        except SecretUnavailable as failure:
            return local_reply(Stage.AUTH, str(failure))
        except TimeoutError:
            return local_reply(Stage.AUTH, "no answer from the token endpoint in time", Cause.TIMEOUT)
        except (MailproxyError, OSError, ValueError) as failure:
            return local_reply(Stage.AUTH, f"token endpoint: {failure}", Cause.LOST)
        answer: dict[str, Any] = {}
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            answer = {**json.loads(body)}
        token = answer.get("access_token")
        if status != 200 or not isinstance(token, str) or not token.isprintable() or not token:
            error = answer.get("error")  # not its description, which may repeat what we sent
            text = one_line(f"token endpoint: {status} {error if isinstance(error, str) else ''}")[:200]
            if 400 <= status < 500 and status not in (408, 429):
                return Reply(Stage.AUTH, 535, text, "5.7.8", Cause.LOCAL)
            return Reply(Stage.AUTH, 454, text, "4.7.0")
        life_s = 3_600.0  # when the endpoint does not say
        with contextlib.suppress(LookupError, TypeError, ValueError, OverflowError):  # some send the number as a string
            life_s = min(max(0.0, float(answer["expires_in"])), 86_400.0)
        grant.expires_at = self.monotonic() + life_s - min(60.0, life_s / 2)
        if isinstance(answer.get("refresh_token"), str):
            grant.refresh_token = answer["refresh_token"]
        return token

    async def _tls_context(self, account: Account) -> ssl.SSLContext | None:
        """The TLS context of the account's files: shared and kept, because it takes 20 ms and 900 kB; made anew
        for an account that was replaced. None: the account wants no TLS. Raises NoSession."""
        if account.encryption == "never":
            return None
        made_of = (account.verify_tls, account.ca_file, account.client_cert, account.client_key)
        if self.accounts.setdefault(account.id, account) is not account:
            self.accounts[account.id] = account
            self.contexts.pop(made_of, None)
        if made_of not in self.contexts:
            making = self.in_thread(functools.partial(client_tls_context, account))
            self.contexts[made_of] = asyncio.ensure_future(making)
        try:
            async with asyncio.timeout(account.timeout or CONNECT_TIMEOUT_S):
                return await asyncio.shield(self.contexts[made_of])
        except TimeoutError:
            reply = local_reply(Stage.TLS, "the certificate files cannot be read in time", Cause.TIMEOUT)
        except (OSError, ValueError) as failure:  # ssl.SSLError is an OSError
            self.contexts.pop(made_of, None)
            reply = local_reply(Stage.TLS, f"the account's certificate files cannot be used: {failure}")
        raise NoSession(reply)


# ======================================================================
# SUBMISSION BY SMTP - one submission session over a pair of streams
# ======================================================================
#
# A strict little SMTP server (RFC 5321, RFC 6409) for mail on its way out: the listener, `sendmail -bs` and the mail
# server of the demo share it. Its invariant: 250 to the end of data is said when the mail is on disk. Only CRLF . CRLF
# ends a mail, and one with a bare CR or LF in it is refused, so that nobody can hide a second one in it. All is bounded.

READ_BYTES = 65_536
CRLF = b"\r\n"
COMMAND_BYTES, AUTH_BYTES = 4_096, 12_288  # RFC 4954 4
SMTP_RECIPIENTS, SMTP_ERRORS, SMTP_IDLE_S = 1_000, 20, 300.0  # of a mail; of a connection since its last mail
SMTP_MEMORY_BYTES = 64 * 2**20  # for all mails that are coming in; larger ones are in files meanwhile
CLOSE_S = 5.0
TURNED_AWAY = 100  # clients over the limit that are told so at one time; more are cut off without a word

MAIL_PARAMETERS = re.compile("(?i)(?: +(?:SIZE=([0-9]{1,20})|BODY=(?:7BIT|8BITMIME)|SMTPUTF8|AUTH=[^ ]*))*")
_SMTP_PATH = re.compile(rf" *(?:<(?:@[^<>:]*:)?((?:{_QUOTED}|[^<>\"])*+)>|([^<> ]+))((?: +[^ ]+)*) *")
_SUBMISSION_FIELD = re.compile(rb"(?im)^X-Mailproxy-(Account|Priority|Id)[ \t]*:((?:[^\r]|\r\n[ \t])*)\r\n")


class Listener:
    """A server with a bounded number of clients, each served by what `client` makes; a `busy` one is waited for."""

    client: ClassVar[Callable[..., Any]]  # made of the listener, the streams, the peer, and whether it is one too many
    most_clients: int

    def __post_init__(self) -> None:
        self.stopping = False
        self.tls: ssl.SSLContext | None = None
        self._listeners: list[asyncio.Server] = []
        self._unix_sockets: dict[str, int] = {}  # and their inodes
        self._connections: dict[asyncio.Task[None], Any] = {}

    async def start_tcp(self, host: str, port: int, tls: ssl.SSLContext | None) -> tuple[tuple[str, int], ...]:
        """Listens on every address of `host`, with TLS when there is a context; returns (address, port)."""
        self.tls, listener = tls, await asyncio.start_server(self._connected, host or None, port, backlog=32)
        self._keep(listener)
        return tuple(listening.getsockname()[:2] for listening in listener.sockets)

    async def start_unix(self, path: str, mode: int = 0o660) -> None:
        """Listens on a Unix socket of this mode. OSError when a living process does, or a file is in the way."""
        with socket.socket(socket.AF_UNIX) as probe:  # asyncio removes any socket that it finds
            probe.settimeout(1)
            with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
                probe.connect(path)
                raise OSError(errno.EADDRINUSE, "another process listens there", path)
        listener = await asyncio.start_unix_server(self._connected, path, backlog=32, start_serving=False)
        os.chmod(path, mode)  # before anybody can connect
        await listener.start_serving()
        self._keep(listener)
        self._unix_sockets[path] = os.stat(path).st_ino

    def _keep(self, listener: asyncio.Server) -> None:
        """What asyncio calls backlog is also how many it accepts in one step; the kernel may let more of them wait."""
        self._listeners.append(listener)
        for listening in listener.sockets:
            with listening.dup() as same:
                same.listen(self.most_clients)

    async def stop(self, grace_s: float) -> None:
        """Stops listening, serves the busy ones within `grace_s`, then cuts what is left."""
        self.stopping = True
        for path, inode in self._unix_sockets.items():
            with contextlib.suppress(OSError):
                if os.stat(path).st_ino == inode:  # else somebody else listens there now
                    os.unlink(path)
        for listener in self._listeners:
            listener.close()
        for task, client in self._connections.items():
            if not client.busy:
                task.cancel()
        for patience_s in (grace_s, CLOSE_S):
            if self._connections:
                await asyncio.wait(list(self._connections), timeout=patience_s)
            for task in self._connections:
                task.cancel()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Begin with a client. One over the limit is told so; when there are far too many, the connection is closed."""
        taken = len(self._connections)
        if self.stopping or taken >= self.most_clients + TURNED_AWAY:
            writer.transport.abort()
            return
        peername = writer.get_extra_info("peername")
        peer = str(peername[0]) if isinstance(peername, tuple) else "unix"
        client = self.client(self, reader, writer, peer, taken >= self.most_clients)
        task = asyncio.create_task(client.run(), name=f"client {taken}")
        self._connections[task] = client
        task.add_done_callback(self._connections.pop)


@dataclass(slots=True, eq=False, repr=False)
class Served:
    """One client of a Listener."""

    server: Any
    reader: Any  # asyncio's streams, or StandardStreams
    writer: Any
    peer: str = ""  # the client's address, or "unix"
    turned_away: bool = False  # it is one too many
    _last: bool = False  # the connection ends after the present command or request
    _unread: bool = True  # the client may still be sending
    _buffer: bytes = b""  # received and not yet understood
    _timer: Any = None
    _idle_at: float = math.inf  # when it will have been idle for too long, on the monotonic clock

    serve: ClassVar[Callable[[Any], Awaitable[None]]]  # answers the client until it leaves, or has to

    def watch(self, patience_s: float, end: Callable[[], object]) -> None:
        """End it when it is idle for too long. A timer for each request or command would take a fifth of its time."""
        left_s = self._idle_at - time.monotonic()
        if left_s > 0:
            self._timer = asyncio.get_running_loop().call_later(min(left_s, patience_s), self.watch, patience_s, end)
        else:
            end()

    async def run(self) -> None:
        """Serve the client, and let it read the last answer: to close while it still sends would destroy that."""
        try:
            with contextlib.suppress(EOFError, OSError):  # it is gone, or there is no TLS that we know
                await self.serve()
                async with asyncio.timeout(CLOSE_S):
                    if self._unread:
                        if self.writer.can_write_eof():  # not by TLS
                            self.writer.write_eof()
                        while await self.reader.read(READ_BYTES):
                            pass
                    self.writer.close()
                    await self.writer.wait_closed()
        finally:
            self._timer.cancel()
            self.writer.transport.abort()


def demand(holds: object, reply: str) -> None:
    """Raises Rejected with the reply to a command that cannot be followed."""
    if not holds:
        raise Rejected(reply)


class SmtpMail(NamedTuple):
    """What one transaction brought."""

    sender: str  # "" is the null sender
    recipients: Sequence[str]
    content: bytes  # its lines end with CRLF, its dots are unstuffed
    login: str = ""

    def submission(self, accounts: Mapping[str, object], host: str) -> dict[str, Any]:
        """The submission that is meant, its `raw` in bytes. With a Message-ID the same id comes again."""
        end, raw = self.content.find(b"\r\n\r\n"), self.content
        header = raw[: end + 2] if end >= 0 else raw
        found = {name.lower(): value.replace(b"\r\n", b"") for name, value in _SUBMISSION_FIELD.findall(header)}
        given = {name.decode(): value.decode("utf-8", "replace").strip() for name, value in found.items()}
        if found:
            raw = _SUBMISSION_FIELD.sub(b"", header) + raw[len(header) :]
        account = given.get("account") or (self.login if self.login in accounts else None)
        digest = hashlib.blake2b("\0".join([account or "", self.sender, *self.recipients]).encode(), digest_size=16)
        has_id = re.search(rb"(?im)^Message-ID[ \t]*:", header)
        digest.update(self.content if has_id else random.randbytes(16))
        id_, sender = given.get("id") or f"smtp-{digest.hexdigest()}", self.sender or f"MAILER-DAEMON@{host}"
        null = None if self.sender else "<>"
        fields = {"id": id_, "from": sender, "return_path": null, "to": list(self.recipients)}
        return {**fields, "account_id": account, "priority": given.get("priority") or None, "raw": raw}


def reply_to_submission(id_: str, reason: object) -> str:
    """The reply to the end of data: the mail was taken, or the reason why not."""
    if reason is None:
        return f"250 2.0.0 Ok: queued as {id_}"
    return f"{'451 4.3.0' if reason == 'in delivery' else '554 5.6.0'} {_escaped(str(reason))[:400]}"


@dataclass(slots=True, eq=False, repr=False)
class SmtpSession(Served):
    """One client, its commands answered one after another; replies gather until it is waited for (RFC 2920 3.2)."""

    server: SmtpServer
    busy: bool = False  # a mail is coming in, or being stored
    _replies: list[str] = field(default_factory=list)
    _errors: int = 0
    _encrypted: bool = False
    _login: str | None = None
    _sender: str | None = None
    _recipients: list[str] = field(default_factory=list)

    async def serve(self) -> None:
        """Answer the client until it leaves, or has to. The errors of the connection come through."""
        self._last, greeting = self.turned_away, f"220 {self.server.names.host} ESMTP"
        self._replies += ["421 4.3.2 Too many connections" if self._last else greeting]
        self._idle_at = time.monotonic() + SMTP_IDLE_S
        self.watch(SMTP_IDLE_S, cast(asyncio.Task[Any], asyncio.current_task()).cancel)
        with contextlib.suppress(asyncio.CancelledError):
            while not (self._last or self.server.stopping):
                try:
                    reply = await self._answer(await self._line())
                except Rejected as refusal:
                    reply = _escaped(str(refusal))[:400]
                    if not reply[0].isdigit():  # it is about an address
                        reply = f"501 5.1.{7 if self._sender is None else 3} {reply}"
                self._idle_at = time.monotonic() + SMTP_IDLE_S
                self._errors += reply.startswith("5") and not self.busy
                if self._errors >= SMTP_ERRORS:
                    self._last, reply = True, "421 4.7.0 Too many errors"
                self._replies += [reply] if reply else []
                self.busy = False
        is_idle = time.monotonic() >= self._idle_at
        farewell = "421 4.4.2 Idle for too long" if is_idle else "421 4.3.2 Shutting down, try again later"
        self._replies += [] if self._last else [farewell]
        async with asyncio.timeout(CLOSE_S):
            await self._flush()

    async def _flush(self) -> None:
        """Send the replies that have gathered."""
        if self._replies:
            self.writer.write("".join([f"{reply}\r\n" for reply in self._replies]).encode("utf-8", "replace"))
            self._replies.clear()
            await self.writer.drain()

    async def _receive(self) -> bytes:
        """What the client sends next; EOFError when it has left."""
        await self._flush()
        received: bytes = await self.reader.read(READ_BYTES)
        if not received:
            raise EOFError
        return received

    async def _line(self, *, of_auth: bool = False) -> str:
        """A command, or a line of the dialogue of AUTH, without its CRLF."""
        too_long = False
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > AUTH_BYTES:
                too_long, self._buffer = True, self._buffer[-1:]
            self._buffer += await self._receive()
        line, self._buffer = self._buffer[: end + 1], self._buffer[end + 1 :]
        if not (of_auth or line[:1].isalpha() or line[:1].isspace()) or b" HTTP/" in line:
            self._last = True  # a page in a browser, TLS, or anything else in which somebody hides commands
        most = AUTH_BYTES if of_auth or line[:5].upper() == b"AUTH " else COMMAND_BYTES
        demand(not too_long and len(line) <= most, "500 5.5.2 The line is too long")
        text = line[:-2].decode("utf-8", "replace")
        is_one = line.endswith(b"\r\n") and text.isprintable() and "\ufffd" not in text
        demand(is_one, "500 5.5.2 A command is a line of UTF-8 that ends with CRLF")
        return text

    async def _content(self, file: tempfile.SpooledTemporaryFile[bytes], in_memory: int) -> tuple[int, str]:
        """Read a mail into the file, to its end, after a CRLF of our own: so each of its lines follows one. Return its
        size, and the reply to one that cannot be taken."""
        left, size, refusal, most = CRLF + self._buffer, -len(CRLF), "", self.server.most_bytes()
        while True:
            end = left.find(b"\r\n.\r\n") + len(CRLF)
            cut = end if end > 1 else left.find(b"\r", max(len(left) - 4, 0))  # where the end may have begun
            piece, left = (left[:cut], left[cut:]) if cut >= 0 else (left, b"")
            if not piece.count(b"\r") == piece.count(b"\n") == piece.count(CRLF):
                refusal = refusal or "554 5.6.0 The message contains a bare CR or LF (RFC 5321 2.3.8)"
            piece = piece.replace(b"\r\n.", CRLF)
            size += len(piece)
            if size > most:
                refusal = refusal or f"552 5.3.4 A message may have at most {most} octets"
            try:
                if not refusal and size <= in_memory:
                    file.write(piece)
                elif not refusal:
                    await self.server.in_thread(functools.partial(file.write, piece))
            except OSError as error:
                refusal = f"452 4.3.1 The message cannot be stored: {error.strerror}"
            if end > 1:
                self._buffer = left[3:]
                return size, refusal
            left += await self._receive()
            self._idle_at = time.monotonic() + SMTP_IDLE_S

    async def _answer(self, line: str) -> str:
        """The reply to a command; "" when it was sent already."""
        server = self.server
        verb, _, argument = line.partition(" ")
        match verb.upper():
            case "MAIL":
                demand(self._sender is None, "503 5.5.1 A sender is already given; send RSET to start again")
                demand(self._encrypted or not server.tls_first, "530 5.7.0 Send STARTTLS first")
                demand(self._login is not None or not server.login_first(), "530 5.7.0 Log in with an API token first")
                sender, parameters = self._path(argument, "FROM:")
                known, most = MAIL_PARAMETERS.fullmatch(parameters), server.most_bytes()
                demand(known, "555 5.5.4 Unknown parameter")
                demand(known and int(known[1] or 0) <= most, f"552 5.3.4 A message may have at most {most} octets")
                self._sender = sender and parse_addr_spec(server.names.sender_of(sender), "from")
                return "250 2.1.0 Ok"
            case "RCPT":
                demand(self._sender is not None, "503 5.5.1 Send MAIL first")
                recipient, parameters = self._path(argument, "TO:")
                demand(not parameters, "555 5.5.4 Unknown parameter")
                addresses = [parse_addr_spec(one, "to") for one in server.names.recipients(recipient or "@")]
                demand(len(self._recipients + addresses) <= SMTP_RECIPIENTS, "452 4.5.3 Too many recipients")
                refusal = server.refusal(recipient)
                self._recipients += addresses if not refusal else []
                return refusal or "250 2.1.5 Ok"
            case "DATA":
                demand(self._sender is not None, "503 5.5.1 Send MAIL first")
                demand(self._recipients, "554 5.5.1 No valid recipients")
                return await self._data()
            case "EHLO" | "HELO" | "RSET" as begins:
                self._sender, self._recipients = None, []
                words = [server.names.host, "PIPELINING", f"SIZE {server.most_bytes()}", "8BITMIME", "SMTPUTF8"]
                words += ["STARTTLS"] if server.tls and not self._encrypted else []
                words += ["AUTH PLAIN LOGIN"] if self._encrypted or not server.tls_first else []
                words = {"EHLO": [*words, "ENHANCEDSTATUSCODES"], "HELO": words[:1]}.get(begins, ["2.0.0 Ok"])
                return "\r\n".join([*(f"250-{word}" for word in words[:-1]), f"250 {words[-1]}"])
            case "AUTH":
                demand(self._login is None and self._sender is None, "503 5.5.1 AUTH is not possible now")
                demand(self._encrypted or not server.tls_first, "538 5.7.11 Send STARTTLS first")
                return await self._auth(*argument.partition(" ")[::2])
            case "STARTTLS":
                demand(server.tls and not self._encrypted, "503 5.5.1 STARTTLS is not offered now")
                with contextlib.suppress(TimeoutError):  # what came before the handshake is dropped (RFC 3207 6)
                    async with asyncio.timeout(0):
                        while not self.writer.transport.pause_reading() and await self.reader.read(READ_BYTES):
                            pass
                self._replies.append("220 2.0.0 Go ahead")
                await self._flush()
                await self.writer.start_tls(server.tls, ssl_handshake_timeout=30)
                self._buffer, self._login, self._sender, self._recipients, self._encrypted = b"", None, None, [], True
                return ""
            case "NOOP":
                return "250 2.0.0 Ok"
            case "VRFY":
                return "252 2.0.0 Cannot verify the address; send a message to try it"
            case "QUIT":
                self._last = True
                return "221 2.0.0 Bye"
        return "500 5.5.2 Unknown command"

    def _path(self, argument: str, keyword: str) -> tuple[str, str]:
        """The address of MAIL or RCPT without a source route, and the parameters (RFC 5321 4.1.2)."""
        found = _SMTP_PATH.fullmatch(argument, len(keyword)) if argument[: len(keyword)].upper() == keyword else None
        if not found:
            raise Rejected(f"501 5.5.4 Write {keyword}<address>")
        return found[1] or found[2] or "", found[3]

    async def _data(self) -> str:
        server, sender, recipients = self.server, self._sender or "", self._recipients
        self.busy, self._sender, self._recipients = True, None, []
        self._replies.append("354 End with a dot on a line of its own")
        in_memory = SMTP_MEMORY_BYTES // server.most_clients
        try:
            with tempfile.SpooledTemporaryFile(in_memory, dir=server.folder) as file:
                size, reply = await self._content(file, in_memory)
                self._idle_at = math.inf
                await self._flush()
                if not reply:
                    file.seek(len(CRLF))
                    async with server.one_large if size > in_memory else contextlib.nullcontext():
                        content = file.read() if size <= in_memory else await server.in_thread(file.read)
                        reply = await server.take(SmtpMail(sender, recipients, content, self._login or ""))
        except MailproxyError as error:
            code = "452 4.3.1" if isinstance(error, StorageUnavailable) else "451 4.3.0"
            reply = f"{code} {_escaped(str(error))[:400]}"
        self._errors *= not reply.startswith("2")
        return reply

    async def _auth(self, mechanism: str, told: str) -> str:
        """PLAIN (RFC 4616) and LOGIN; what the client answers first may be told with the command (RFC 4954 4)."""
        words: list[str] = []
        for challenge in {"PLAIN": [""], "LOGIN": ["Username:", "Password:"]}.get(mechanism.upper(), []):
            if not told:
                self._replies.append(f"334 {base64.b64encode(challenge.encode()).decode()}")
                told = await self._line(of_auth=True)
            demand(told != "*", "501 5.7.0 Cancelled")
            try:
                words += base64.b64decode(told.removeprefix("="), validate=True).decode().split("\0")[-2:]
            except ValueError:
                raise Rejected("501 5.5.2 This is not base64 of UTF-8") from None
            told = ""
        demand(len(words) == 2, "504 5.5.4 Log in by PLAIN or LOGIN, with a name and a password")
        demand(self.server.may_log_in(words[1], self.peer), "535 5.7.8 The password must be an API token")
        self._login = words[0]
        return "235 2.7.0 Ok"


@dataclass(eq=False, repr=False)
class SmtpServer(Listener):
    """What the sessions of a listener share."""

    take: Callable[[SmtpMail], Awaitable[str]]  # the reply to the end of data; MailproxyError: not now
    names: LocalNames
    most_bytes: Callable[[], int] = lambda: AttachmentSettings().max_message_bytes  # of a mail
    in_thread: InThread = field(default_factory=InThread)
    folder: str | None = None  # where large mails lie while they come in, without names; None: the system's
    most_clients: int = 100
    tls_first: bool = False  # before a login and a mail
    may_log_in: Callable[[str, str], bool] = lambda password, peer: True
    login_first: Callable[[], bool] = lambda: False
    refusal: Callable[[str], str | None] = lambda recipient: None  # the reply that refuses it
    one_large: asyncio.Lock = field(default_factory=asyncio.Lock)  # in memory
    client = SmtpSession


class StandardStreams:
    """Standard input and output in the place of asyncio's streams; LF line ends become CRLF. Blocking."""

    async def read(self, most: int) -> bytes:
        received = os.read(0, most)
        received += os.read(0, 1) if received.endswith(b"\r") else b""
        return received.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")

    def write(self, content: bytes) -> None:
        while content:
            content = content[os.write(1, content) :]

    async def drain(self) -> None:
        """All is written."""


def speak_smtp(submit: Callable[[dict[str, Any]], str | None], names: LocalNames, most_bytes: int) -> None:
    """`sendmail -bs`: one session on standard input and output. Blocking, as `submit` is: it returns None, or why the
    submission was refused, and raises MailproxyError when nobody can take it now."""

    async def take(mail: SmtpMail) -> str:
        fields = mail.submission({}, names.host)
        fields["raw"] = base64.b64encode(fields["raw"]).decode()
        return reply_to_submission(fields["id"], submit(fields))

    streams = StandardStreams()
    session = SmtpSession(SmtpServer(take, names, lambda: most_bytes), streams, streams)
    with contextlib.suppress(EOFError, OSError):
        asyncio.run(session.serve())


# ======================================================================
# HTTP SERVER - bytes in, requests; answers out, bytes; knows no mail
# ======================================================================
#
# A small, strict HTTP/1.1 server (RFC 9110, RFC 9112) on asyncio's streams, for this API only. Its
# invariant: a connection goes on to a next request only when every byte of the one before is accounted
# for; at the least doubt it answers and closes. So nobody can hide a request inside another one.
# Everything a client may send is bounded, in bytes and in time.

HTTP_TOKEN = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 5.6.2
REQUEST_LINE = re.compile(rf"({HTTP_TOKEN}) ([!-~]+) HTTP/([0-9]\.[0-9])")
FIELD_LINES = re.compile(rf"{HTTP_TOKEN}:[\t -~\x80-\xff]*(?:\r\n{HTTP_TOKEN}:[\t -~\x80-\xff]*)*")
HOPELESS_HEAD = re.compile(rb"(?<!\r)\n|\r(?=[^\n])|[\0-\x08\x0b\x0c\x0e-\x1f\x7f]")
HOST_FIELD = re.compile(r"[A-Za-z0-9._~!$&'()*+;=%:\[\]-]*")
REQUEST_ID_LINE = re.compile(rb"(?im)^x-request-id:[ \t]*([!-~]{1,128})[ \t]*\r?$")
ABSOLUTE_FORM = re.compile(r"https?://[^/?#]+", re.IGNORECASE)
BAD_ESCAPE = re.compile(r"%(?:00|(?![0-9A-Fa-f]{2}))")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:[ \t]*;[\t -~\x80-\xff]*)?")
HALF_A_PAIR = re.compile("[\ud800-\udfff]")
# One word, an address, or a domain that nobody can register (RFC 6761, RFC 8375, and .internal)
NOBODYS_NAME = re.compile(
    r"([^.]*|[0-9.]+|\[.*\]|(.*\.)?(localhost|local|internal|home\.arpa|test|invalid|example(\.(com|net|org))?)\.?)(:[0-9]*)?",
    re.IGNORECASE,
)

KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
NO_HEADERS: Mapping[str, str] = MappingProxyType({})
JSON_TYPES = frozenset({"", "application/json", "application/x-www-form-urlencoded"})  # the last: curl's

HTTP_HEAD_BYTES = 32_768
HTTP_HEADERS = 100
JSON_AT_ONCE_BYTES = 262_144  # a larger body is parsed outside the event loop
LONG_STRING_BYTES = 8_192  # a longer string of a large body is read separately
STEP_BYTES = 262_144  # of a long string or body, read in one step
JSON_DEPTH = 64
JSON_VALUES = 2_000_000  # strings, lists, objects of a body: an empty list takes thirty times the memory of its bytes
TURNED_AWAY_S = 2.0  # for the request of one client too many


PROBLEMS: Mapping[int, str] = {  # the code of a failure for programs, where no other is given
    400: "bad_request", 401: "unauthorized", 403: "foreign_origin", 404: "not_found", 405: "method_not_allowed",
    408: "timeout", 409: "conflict", 413: "too_large", 415: "unsupported_media_type", 429: "busy",
    431: "headers_too_large", 500: "internal", 501: "bad_request", 502: "attachment_unavailable",
    503: "storage_unavailable", 505: "version_not_supported",
}  # fmt: skip


class HttpError(MailproxyError):
    """An answer that says no: status, one sentence, further headers and members of its JSON (`code`: a fixed word)."""

    def __init__(self, status: int, error: str, headers: Mapping[str, str] = NO_HEADERS, **extra: Any) -> None:
        super().__init__(error)
        self.status, self.error, self.headers, self.extra = status, error, headers, {"code": PROBLEMS[status], **extra}

    def response(self) -> Response:
        """The one place where a failure becomes JSON."""
        content = {"ok": False, "error": self.error, **self.extra}
        return json_response(content, self.status)._replace(headers=self.headers)


def ensure(holds: object, status: int, error: str, **extra: Any) -> None:
    """Raises HttpError unless it holds; for sentences that cost nothing to write."""
    if not holds:
        raise HttpError(status, error, **extra)


class ClientGone(EOFError):
    """The connection is over: nobody is there to be answered."""


@dataclass(slots=True, eq=False, repr=False)
class Request:
    """A request, as far as it is understood; header values are Latin-1, so that no byte is lost."""

    method: str  # as sent when it is one of KNOWN_METHODS, else "other"
    path: str  # as sent, without the query
    route: str  # the pattern of its route, or "unmatched"
    parameters: dict[str, str]  # the id in the path, decoded
    query: dict[str, list[str]]  # decoded
    headers: dict[str, str]  # names in lower case; repeated ones joined by ", "
    body: bytes
    id: str
    peer: str  # the client's address, or "unix"
    in_thread: InThread
    version: str = "1.1"

    async def json_object(self, judged: str | None = None) -> dict[str, object]:
        """The body as a JSON object; no body is an empty object. HttpError 400 or 415 otherwise. Whether the texts of
        the field `judged` are Unicode is left to whoever asks."""
        body = self.body.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if not body:
            return {}
        declared = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if declared not in JSON_TYPES and not declared.endswith("+json"):
            raise HttpError(415, f"the body must be application/json, not {declared[:80]}")
        encoding = self.headers.get("content-encoding", "identity").strip().lower()
        if encoding != "identity":
            raise HttpError(415, f"Content-Encoding {encoding[:80]} is not supported; send the body as it is")
        if len(body) <= JSON_AT_ONCE_BYTES:
            return parse_json_object(body, judged)
        return await self.in_thread(lambda: parse_large_json_object(body, judged))

    def read_head(self, head: bytes) -> str:
        """Fill in what a head says, and return the target; HttpError for one that is not strictly right (RFC 9112)."""
        self.id = request_id_in(head)
        line, _, fields = head.decode("latin-1").removeprefix("\r\n").partition("\r\n")
        parts = REQUEST_LINE.fullmatch(line)
        if not parts:
            raise HttpError(400, "the request line is not valid HTTP/1.1")
        method, target, self.version = parts.groups()
        if self.version not in ("1.1", "1.0"):
            raise HttpError(505, f"HTTP/{self.version} is not supported; use HTTP/1.1")
        if method in KNOWN_METHODS:
            self.method = method
        ensure(not fields or FIELD_LINES.fullmatch(fields), 400, "a header line is malformed")
        lines = fields.split("\r\n") if fields else []
        if len(lines) > HTTP_HEADERS:
            raise HttpError(431, f"more than {HTTP_HEADERS} headers")
        headers = self.headers
        for line in lines:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip(" \t")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        host = headers.get("host")
        ensure(host is not None or self.version == "1.0", 400, "the Host header is missing")
        ensure(not host or HOST_FIELD.fullmatch(host), 400, "the Host header is malformed")
        return target


class Response(NamedTuple):
    """An answer: bytes, or a generator of pieces, none of them empty, that are sent as the client takes them."""

    status: int = 200
    body: bytes | AsyncGenerator[bytes, None] = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = NO_HEADERS


def json_response(content: Mapping[str, object], status: int = 200) -> Response:
    """An answer in JSON, a line. Half a surrogate pair, which UTF-8 has no bytes for, becomes its JSON escape."""
    return Response(status, f"{as_json(content)}\n".encode("utf-8", "backslashreplace"))


# ---------------------------------------------------------------------- JSON bodies


def parse_json_object(body: bytes, judged: str | None = None) -> dict[str, object]:
    """Strict JSON (RFC 8259) of one object, or HttpError 400 that says where and why not. Blocking."""
    try:
        content = STRICT_JSON.decode(body.decode())
    except RecursionError:
        raise HttpError(400, f"the JSON is nested deeper than {JSON_DEPTH} levels", code="bad_json") from None
    except ValueError as error:  # says where; after a semicolon, what a programmer of Python could do
        raise HttpError(400, f"the body is not JSON: {str(error).partition(';')[0]}", code="bad_json") from None
    if not isinstance(content, dict):
        raise HttpError(400, "the body is not a JSON object", code="bad_json")
    if len(body) > JSON_AT_ONCE_BYTES or body.count(b"{") + body.count(b"[") > JSON_DEPTH:
        level: list[Any] = [content]  # code which walks through deeper nesting might run out of stack
        for _ in range(JSON_DEPTH):
            members = (outer.values() if isinstance(outer, dict) else outer for outer in level)
            level = [inner for inner in itertools.chain.from_iterable(members) if isinstance(inner, dict | list)]
        ensure(not level, 400, f"the JSON is nested deeper than {JSON_DEPTH} levels", code="bad_json")
    for name, value in content.items():
        if name != judged and (half := HALF_A_PAIR.search(as_json({name: value}))):
            raise HttpError(400, f"{name} contains half a surrogate pair (\\u{ord(half[0]):04x})", code="bad_json")
    return content


def parse_large_json_object(body: bytes, judged: str | None = None) -> dict[str, object]:
    """The same of a large body; 413 for one of too many values. Blocking, in steps that let the event loop run."""
    values = body.count(b"[") + body.count(b"{") + body.count(b'"') / 2
    if values > JSON_VALUES and values - body.count(b'\\"') / 2 > JSON_VALUES:  # less the quotes within texts
        raise HttpError(413, f"the JSON has more than {JSON_VALUES} values")
    cut: dict[str, str] = {}
    with contextlib.suppress(HttpError, ValueError):
        content = parse_json_object(without_long_strings(body, cut), judged)
        put_back(content, cut)
        if not cut:  # none of them was the name of a field
            return content
    return parse_json_object(body, judged)  # finds the words for what is wrong


def without_long_strings(body: bytes, cut: dict[str, str]) -> bytes:
    """The JSON with a mark nobody can guess in the place of each long string, which `cut` has by its mark. Only strings
    without a backslash, as base64 is: they end at the next quote. ValueError when one is no string."""
    nonce = secrets.token_hex(16)
    kept: list[bytes] = []
    done, quote = 0, body.find(b'"')
    while quote >= 0:
        near = body.rfind(b'"', quote + 1, quote + LONG_STRING_BYTES)
        end = near if near >= 0 else body.find(b'"', quote + 1)
        if end - quote > LONG_STRING_BYTES and body[quote - 1 : quote] != b"\\" and body.find(b"\\", quote, end) < 0:
            pieces, decoder = list[str](), codecs.getincrementaldecoder("utf-8")()
            for start in range(quote + 1, end, STEP_BYTES):
                stop = min(start + STEP_BYTES, end)
                pieces.append(decoder.decode(body[start:stop], stop == end))
                STRICT_JSON.decode(f'"{pieces[-1]}"')  # refuses control characters
            mark = f"{nonce}{len(cut)}"
            cut[mark] = "".join(pieces)
            kept += body[done : quote + 1], mark.encode()
            done = end
        quote = end
    kept.append(body[done:])
    return b"".join(kept)


def put_back(container: Any, cut: dict[str, str]) -> None:
    """Move the values that were cut out to where their marks stand."""
    for place, value in container.items() if isinstance(container, dict) else enumerate(container):
        if isinstance(value, str):
            container[place] = cut.pop(value, value)
        elif isinstance(value, dict | list):
            put_back(value, cut)


def unique_fields(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """An object of which no field was given twice: which one should count?"""
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    twice = collections.Counter(name for name, _ in pairs).most_common(1)[0][0]
    raise HttpError(400, f"the JSON has the field {twice[:80]!r} twice in one object", code="bad_json")


def finite_number(text: str) -> float | int:
    """A number with a fraction or an exponent; 5.0 is the whole number it is in JSON Schema, too."""
    number = float(text)
    if number.is_integer() and abs(number) <= 2**53:  # a float has it exactly
        return int(number)
    if math.isfinite(number):
        return number
    raise HttpError(400, f"the JSON has a number out of range ({text[:20]})", code="bad_json")


STRICT_JSON = json.JSONDecoder(
    object_pairs_hook=unique_fields,
    parse_int=lambda text: int(text),  # calls, between which the event loop gets the interpreter
    parse_float=finite_number,
    parse_constant=finite_number,  # NaN, Infinity
)


# ---------------------------------------------------------------------- the head of a request


class Route(NamedTuple):
    """One row of the API: who answers which method at which path."""

    method: str
    pattern: str  # "/account/{id}/suspend": any segment that is not empty, always the second
    handler: Callable[[Request], Awaitable[Response]]
    public: bool = False  # needs no token
    answer: str = "object"  # this and what follows is what openapi.json says of it; not read here
    body: str = ""
    query: Mapping[str, tuple[Kind, str]] = MappingProxyType({})
    refusals: Sequence[int] = ()


def request_id_in(head: bytes) -> str:
    """The client's own id of a request, understood or not, else a new one."""
    line = REQUEST_ID_LINE.search(head) if b"x-request-id:" in head.lower() else None
    return line[1].decode() if line else f"{random.getrandbits(64):016x}"  # names a request, protects nothing


def parse_target(target: str) -> tuple[str, tuple[str, ...], dict[str, list[str]]]:
    """The path as sent, its decoded segments, and the query, of a target (RFC 9112 3.2.1, 3.2.2)."""
    if origin := ABSOLUTE_FORM.match(target):
        target = "/" + target[origin.end() :].removeprefix("/")
    ensure(target.startswith("/") and "#" not in target, 400, "the request target is not a path")
    path, _, query = target.partition("?")
    for part in (path, *query.split("&")) if "%" in target else ():
        try:
            fit(urllib.parse.unquote(part, errors="strict"), not BAD_ESCAPE.search(part))
        except ValueError:
            what, code = f"{part.partition('=')[0][:80]}: must be", "bad_field"
            what, code = ("the path is not", "bad_request") if part is path else (what, code)
            raise HttpError(400, f"{what} percent-encoded UTF-8 without NUL", code=code) from None
    segments = tuple(map(urllib.parse.unquote, path.split("/")) if "%" in path else path.split("/"))
    return path, segments, urllib.parse.parse_qs(query, keep_blank_values=True) if query else {}


@dataclass(slots=True, eq=False, repr=False)
class ServedConnection(Served):
    """One client, its requests answered one after another."""

    server: HttpServer

    @property
    def busy(self) -> bool:
        return self._idle_at == math.inf

    async def serve(self) -> None:
        """Answer one request after another until the connection ends."""
        limits = self.server.limits
        patience_s = TURNED_AWAY_S if self.turned_away else limits.idle_timeout_seconds
        self._idle_at = time.monotonic() + patience_s
        self.watch(patience_s, self.writer.transport.abort)
        if self.server.tls:
            await self.writer.start_tls(self.server.tls, ssl_handshake_timeout=limits.head_timeout_seconds)
        # A write counts as done when all of it has left for the kernel: nothing unread outlives its deadline.
        self.writer.transport.set_write_buffer_limits(high=1, low=0)
        while not self._last:
            if self._buffer:
                await asyncio.sleep(0)  # requests in a row must not keep the loop from everybody else
            elif not self.server.stopping:
                self._idle_at = time.monotonic() + patience_s
                self._buffer = await self.reader.read(READ_BYTES)
                self._idle_at = math.inf
            if not self._buffer:
                break
            await self._exchange()
        self._unread = self._unread or bool(self._buffer)

    async def _exchange(self) -> None:
        """One request and its answer, whatever the request is."""
        began_at, opening = time.monotonic(), b""
        self._last = self._unread = True
        request = Request("other", "", "unmatched", {}, {}, {}, b"", "", self.peer, self.server.in_thread)
        try:
            if self.turned_away:
                raise HttpError(503, "too many connections", code="busy", headers={"Retry-After": "1"})
            response = await self._response_to(request, began_at + self.server.limits.head_timeout_seconds)
            if not isinstance(response.body, bytes):  # what fails up to here can still be told by a status
                opening = await anext(response.body, b"")
        except HttpError as error:
            response = error.response()
        except Rejected as error:
            response = HttpError(400, str(error), code="bad_field").response()
        except StorageUnavailable as error:
            response = HttpError(503, str(error), headers={"Retry-After": "1"}).response()
        except ClientGone:
            raise
        except Exception as error:
            self.server.log_failure(request, error)
            response = HttpError(500, "internal error: the log has more under this X-Request-Id").response()
        request.id = request.id or request_id_in(self._buffer)
        try:
            await self._send(request, response, opening)
        finally:
            self.server.observe(request, response.status, time.monotonic() - began_at)

    async def _response_to(self, request: Request, head_until: float) -> Response:
        """Read a request step by step, as far as it is welcome, and have it answered."""
        target = request.read_head(await self._read_head(head_until))
        announced, coding = request.headers.get("content-length"), request.headers.get("transfer-encoding")
        length: int | None = 0  # None: chunked; whatever two readers might take in two ways is refused (RFC 9112 6.3)
        if coding is not None:
            is_alone = announced is None and request.version == "1.1"
            ensure(is_alone, 400, "Transfer-Encoding cannot be combined with Content-Length or HTTP/1.0")
            ensure(coding.lower() == "chunked", 501, "the only Transfer-Encoding that is supported is chunked")
            length = None
        elif announced is not None:
            ensure(announced.isascii() and announced.isdigit(), 400, "Content-Length must be one number")
            length = int(announced) if len(announced) <= 18 else 10**18
        options = request.headers.get("connection", "").lower()
        goes_on = "close" not in options and (request.version == "1.1" or "keep-alive" in options)
        request.path, segments, request.query = parse_target(target)
        body_is_here = length is not None and length <= len(self._buffer)
        if body_is_here:
            request.body, self._buffer = self._buffer[:length], self._buffer[length:]
            self._unread, self._last = False, not goes_on
        bodiless = request.method in ("GET", "HEAD", "DELETE")  # a body that comes with them is read and dropped
        route = self.server.route(request, segments)
        if length is not None and length > self.server.limits.max_body_bytes:
            raise HttpError(413, f"the body is larger than {self.server.limits.max_body_bytes} bytes")
        if not body_is_here:
            if request.version == "1.1" and "expect" in request.headers and not self._buffer:
                await self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.body = await self._read_body(length, kept=not bodiless)
            self._unread, self._last = False, not goes_on
        if bodiless:
            request.body = b""
        request_id.set(request.id)
        return await route.handler(request)

    async def _receive(self, timeout_s: float) -> None:
        """Add what the client sends next to the buffer. HttpError 408 when it is late, 400 when there is no more."""
        try:
            async with asyncio.timeout(timeout_s):
                received = await self.reader.read(READ_BYTES)
        except TimeoutError:
            raise HttpError(408, "the request did not arrive in time") from None
        except OSError:
            raise ClientGone from None
        ensure(received, 400, "the request ended before it was complete")
        self._buffer += received

    async def _read_head(self, until: float) -> bytes:
        """Request line and headers, without the empty line that ends them; `until` is on the loop's clock."""
        seen = 0
        while (end := self._buffer.find(b"\r\n\r\n", max(0, seen - 3))) < 0:
            if HOPELESS_HEAD.search(self._buffer, max(0, seen - 1)):
                raise HttpError(400, "the head of the request contains an invalid character")
            seen = len(self._buffer)
            if seen > HTTP_HEAD_BYTES:
                break
            await self._receive(until - time.monotonic())
        if not 0 <= end <= HTTP_HEAD_BYTES:
            raise HttpError(431, f"the head of the request is larger than {HTTP_HEAD_BYTES} bytes")
        head, self._buffer = self._buffer[:end], self._buffer[end + 4 :]
        return head

    async def _read_body(self, length: int | None, *, kept: bool) -> bytes:
        """A body of this length, or in chunks when it is None (RFC 9112 7.1); b"" unless it is to be kept."""
        body = io.BytesIO(bytes(length or 0)) if kept else None  # to grow is to copy; its getvalue() is no copy
        size, left, most = 0, length or 0, self.server.limits.max_body_bytes
        while length is None or left:
            if not left:
                size_field = CHUNK_SIZE.fullmatch(await self._line())
                if not size_field:
                    raise HttpError(400, "the size of a chunk is malformed")
                left = int(size_field[1], 16)
                if not left:
                    break
                size += left
                ensure(size <= most, 413, f"the body is larger than {most} bytes")
            if not self._buffer:
                await self._receive(self.server.limits.body_timeout_seconds)
            piece, self._buffer = self._buffer[:left], self._buffer[left:]
            left -= len(piece)
            if body:
                body.write(piece)
            if length is None and not left:
                ensure(not await self._line(), 400, "a chunk is longer than its size")
        trailers = 0
        while length is None and (line := await self._line()):
            trailers += 1
            ensure(FIELD_LINES.fullmatch(line.decode("latin-1")), 400, "a trailer is malformed")
            ensure(trailers < HTTP_HEADERS, 431, "there are too many trailers")
        return body.getvalue() if body else b""

    async def _line(self) -> bytes:
        """A line without its CRLF; 400 for a line end that is not CRLF, or a line that does not end."""
        while (end := self._buffer.find(b"\n")) < 0:
            ensure(len(self._buffer) <= HTTP_HEAD_BYTES, 400, "a line of the chunked body is too long")
            await self._receive(self.server.limits.body_timeout_seconds)
        line, self._buffer = self._buffer[: end + 1], self._buffer[end + 1 :]
        ensure(line.endswith(b"\r\n"), 400, "a line of the chunked body does not end with CRLF")
        return line[:-2]

    async def _send(self, request: Request, response: Response, opening: bytes) -> None:
        """The whole answer; a body of unknown length in chunks, or in HTTP/1.0 up to the end of the connection."""
        chunked, wanted = request.version == "1.1", request.method != "HEAD"
        self._last = self._last or self.server.stopping or not (chunked or isinstance(response.body, bytes))
        if isinstance(response.body, bytes):
            framing = f"Content-Length: {len(response.body)}\r\n"
        else:
            framing = "Transfer-Encoding: chunked\r\n" if chunked else ""
        if self._last:
            framing += "Connection: close\r\n"
        elif not chunked:
            framing += "Connection: keep-alive\r\n"
        more = "".join([f"{name}: {value}\r\n" for name, value in response.headers.items()])
        content = (
            f"HTTP/1.1 {response.status} {http.client.responses.get(response.status, '')}\r\n"
            f"Content-Type: {response.content_type}\r\n"
            f"X-Request-Id: {request.id}\r\n"
            "Cache-Control: no-store\r\n"
            "X-Content-Type-Options: nosniff\r\n"
            f"{more}{framing}\r\n"
        ).encode("latin-1")
        if isinstance(response.body, bytes):
            await self._write(content + response.body if wanted else content)
            return
        try:
            piece = opening if wanted else b""
            while piece:
                await self._write(content + (b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece))
                content, piece = b"", await anext(response.body, b"")
            await self._write(content + (b"0\r\n\r\n" if chunked and wanted else b""))
        except ClientGone:
            raise
        except Exception as error:  # too late for a status: the missing end tells the client
            self.server.log_failure(request, error)
            raise ClientGone from None
        finally:
            await response.body.aclose()

    async def _write(self, content: bytes) -> None:
        """Returns when the kernel has all of it; ClientGone when the client does not take it in time."""
        transport = self.writer.transport
        if transport.is_closing():
            raise ClientGone
        self.writer.write(content)
        while unsent := transport.get_write_buffer_size():
            try:
                async with asyncio.timeout(self.server.limits.body_timeout_seconds):
                    await self.writer.drain()
                return
            except OSError as error:  # TimeoutError is one: some progress is enough
                if not isinstance(error, TimeoutError) or transport.get_write_buffer_size() >= unsent:
                    raise ClientGone from None


@dataclass(eq=False, repr=False)
class HttpServer(Listener):
    """Listens, and has each request answered by the row of the route table it belongs to."""

    routes: InitVar[Sequence[Route]]
    admit: Callable[[Request, bool], object]  # raises the HttpError for a stranger; may be told: a public row
    log_failure: Callable[[Request, Exception], None]  # what a handler raised; the client gets a bare 500
    limits: ServerSettings = field(default_factory=ServerSettings)
    observe: Callable[[Request, int, float], None] = lambda *_: None  # learns of every answer: request, status, seconds
    in_thread: InThread = field(default_factory=InThread)
    client = ServedConnection

    def __post_init__(self, routes: Sequence[Route]) -> None:
        super().__post_init__()
        self.most_clients = self.limits.max_connections
        self._rows: dict[tuple[str | None, ...], dict[str, Route]] = {}  # by the path, None for an id; by the method
        for route in routes:
            path = tuple(None if segment == "{id}" else segment for segment in route.pattern.split("/"))
            self._rows.setdefault(path, {})[route.method] = route

    def route(self, request: Request, segments: tuple[str, ...]) -> Route:
        """The row for a request; a stranger is refused before 404 and 405, and so learns nothing."""
        methods = self._rows.get(segments, {})
        if not methods and any(segments[2:3]):
            request.parameters = {"id": segments[2]}
            methods = self._rows.get((*segments[:2], None, *segments[3:]), {})
        route = methods.get("GET" if request.method == "HEAD" else request.method)
        if methods:
            request.route = next(iter(methods.values())).pattern
        self.admit(request, route is not None and route.public)
        ensure(methods, 404, "no such path; see /openapi.json")
        if route is None:
            listed = ", ".join(sorted({*methods, "HEAD"} if "GET" in methods else methods))
            raise HttpError(405, f"this path allows only {listed}", headers={"Allow": listed})
        return route


# ======================================================================
# CONSOLE - the page that shows and steers the queue in a browser
# ======================================================================
#
# One constant, without data and without anything from elsewhere; the page asks the HTTP interface as every
# client does. Its invariant: what comes from outside is written as text, never as HTML.

CONSOLE = r"""<!doctype html>
<html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>mailproxy</title>
<style>
:root { color-scheme: light dark; --page: #f4f5f7; --panel: #fff; --text: #1a1d21; --quiet: #545c66; --line: #d3d8de;
--link: #0b51c5; --good: #14682f; --warn: #855000; --bad: #b3261e; } @media (prefers-color-scheme: dark) { :root {
--page: #14171a; --panel: #1e2226; --text: #e8eaed; --quiet: #aab2bb; --line: #3b4148; --link: #8ab4f8; --good: #7ddc9b;
--warn: #f2b766; --bad: #ff9d94; } } * { box-sizing: border-box; } [hidden] { display: none !important; } body { margin:
0; background: var(--page); color: var(--text); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
header, main { max-width: 1400px; margin: auto; padding: .75rem 1rem; } header { display: flex; flex-wrap: wrap; gap:
.5rem 1.25rem; align-items: center; } h1, h2, h3, p, dl, dd, ul, ol { margin: 0; padding: 0; list-style: none; } h1 {
font-size: 1.25rem; } h2 { font-size: 1.05rem; } h3 { font-size: .95rem; margin-top: 1rem; } #delivery { margin-right:
auto; } section, #login { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: 1rem; }
#all, .pair { display: grid; gap: 1rem; grid-template-columns: minmax(0, 1fr); } button, input, select { font: inherit;
color: inherit; background: var(--panel); border: 1px solid var(--quiet); border-radius: 6px; padding: .3rem .7rem;
min-height: 2.25rem; max-width: 100%; } button { cursor: pointer; } button:disabled { cursor: default; color:
var(--quiet); border-style: dashed; } a { color: var(--link); } :focus-visible { outline: 3px solid var(--link);
outline-offset: 2px; } h2:focus-visible { outline: none; } label { display: grid; gap: .15rem; color: var(--quiet);
font-size: .85rem; } label > * { color: var(--text); font-size: .95rem; width: 100%; } .row { display: flex; flex-wrap:
wrap; gap: .5rem; align-items: end; margin: .6rem 0; } #counts { display: grid; grid-template-columns: repeat(auto-fit,
minmax(8rem, 1fr)); gap: .5rem; } dt::first-letter { text-transform: uppercase; } dt, .quiet, time { color:
var(--quiet); } #counts dd { font-size: 1.6rem; } #counts dd.quiet { font-size: .9rem; } figure { margin: 0; display:
grid; grid-template-columns: 6.5rem minmax(0, 1fr); gap: 0 .5rem; } figcaption { grid-column: 1 / 3; margin: .2rem 0
.5rem; } svg { width: 100%; height: 128px; } #totals li { height: 32px; padding-top: 10px; line-height: 22px; }
.accepted { fill: var(--link); } .sent { fill: var(--good); } .deferred { fill: var(--warn); } .failed { fill:
var(--bad); } #accounts li, #messages li { display: grid; gap: .1rem .8rem; padding: .5rem 0; border-top: 1px solid
var(--line); } #accounts li { grid-template-columns: minmax(6rem, 1fr) 7rem minmax(0, 3fr) auto; align-items: center; }
#messages li { grid-template-columns: 6rem minmax(0, 3fr) minmax(0, 2fr) minmax(0, 1fr) 8rem; } #messages .why,
#messages .id { grid-column: 2 / 6; font-size: .88rem; } #messages .id { grid-column: 2 / 3; } li[aria-current=true] {
background: var(--page); } [data-state=sent], [data-state=up] { color: var(--good); } [data-state=error],
[data-state=cooling] { color: var(--bad); } [data-state=deferred], [data-state=limited], [data-state=probing],
[data-state=suspended] { color: var(--warn); } #fields { display: grid; grid-template-columns: max-content minmax(0,
1fr); gap: .1rem .8rem; margin-top: .5rem; } pre { white-space: pre-wrap; max-height: 24rem; overflow: auto; margin:
.3rem 0; padding: .6rem; background: var(--page); } #said { position: fixed; inset: auto 0 0 0; background: var(--text);
color: var(--page); padding: .6rem 1rem; z-index: 1; } #said:empty { display: none; } dialog { background: var(--panel);
color: var(--text); border: 1px solid var(--quiet); border-radius: 8px; max-width: 30rem; } dialog::backdrop {
background: rgb(0 0 0 / .5); } @media (min-width: 1100px) { .pair:has(#detail:not([hidden])) { grid-template-columns:
3fr 2fr; align-items: start; } } @media (max-width: 700px) { #accounts li, #messages li { grid-template-columns:
minmax(0, 1fr) auto; } #messages .why, #messages .id, #accounts .reason, #messages .subject, #accounts .row {
grid-column: 1 / 3; } }
</style>
<header> <h1>mailproxy</h1><p id="delivery">Asking the daemon ...</p> <div id="steer" hidden><button id="run">Run
  now</button> <button id="suspend">Suspend</button> <button id="activate">Activate</button></div> <p id="said"
  role="status"></p> </header>
<main> <form id="login" hidden><label>Token <input id="token" type="password" autocomplete="off" required></label> <p
  class="row"><button>Open</button> <span class="quiet">The api_token of [server]. It is kept until this tab is
  closed.</span> </p></form> <div id="all" hidden>
<section aria-labelledby="h-queue"><h2 id="h-queue">Queue</h2> <dl id="counts"><div><dt>Waiting</dt><dd
  id="waiting"></dd><dd class="quiet" id="oldest"></dd></div> <div><dt>of these deferred</dt><dd
  id="deferred"></dd></div><div><dt>On the wire</dt><dd id="in_delivery"></dd></div> <div><dt>Failed</dt><dd
  id="failed"></dd></div></dl> </section>
<section aria-labelledby="h-recent"><h2 id="h-recent">Last 15 minutes</h2> <figure><figcaption
  id="chart-text"></figcaption><ul id="totals"><li></li><li></li><li></li><li></li></ul> <svg id="chart" role="img"
  aria-labelledby="chart-text" viewBox="0 0 90 128" preserveAspectRatio="none"><path class="accepted"/><path
  class="sent"/><path class="deferred"/><path class="failed"/></svg></figure> </section>
<section aria-labelledby="h-accounts"><h2 id="h-accounts" tabindex="-1">Accounts</h2> <p id="no-account" hidden>No
  account yet: add one by POST /account, or as [smtp] in config.ini.</p> <ul id="accounts"></ul> </section> <div
  class="pair">
<section aria-labelledby="h-messages"><h2 id="h-messages" tabindex="-1">Messages</h2> <form id="search"
  class="row"><label>Recipient <input name="to" autocomplete="off"></label> <label>Subject <input name="subject"
  maxlength="1000" autocomplete="off"></label> <label>Account <select name="account_id"><option
  value="">any</option></select></label> <label>State <select name="status"><option
  value="">any</option><option>queued</option><option>deferred</option>
  <option>sent</option><option>error</option></select></label> <label>Since <input name="since"
  type="datetime-local"></label> <label>Until <input name="until" type="datetime-local"></label>
  <button>Search</button> <button type="reset">Clear</button></form> <p id="empty" hidden></p> <ul id="messages"></ul>
  <p class="row"><button id="newer" disabled>Newer</button> <button id="older" disabled>Older</button></p> </section>
<section id="detail" aria-labelledby="h-detail" hidden><h2 id="h-detail" tabindex="-1"></h2> <p class="row"><button
  id="retry">Retry</button> <button id="delete">Delete</button> <button id="close">Close</button></p> <dl
  id="fields"></dl> <h3>Attempts</h3><ol id="attempts"></ol> <h3>Content</h3><div id="content"></div> <button
  id="source">Show as it goes on the wire</button><pre id="eml" tabindex="0" aria-label="Source" hidden></pre>
  </section> </div> </div> </main>
<dialog id="ask" aria-labelledby="question"><p id="question"></p> <p class="row"><button id="no"
  autofocus>Cancel</button> <button id="yes">Delete</button></p></dialog> <template id="account-row"><li><strong
  class="id"></strong><span class="state"></span><span class="reason"></span> <span class="row"></span></li></template>
  <template id="message-row"><li><span class="state"></span><a class="subject"></a><span class="to"></span> <span
  class="account quiet"></span><time></time><span class="id quiet"></span><span class="why"></span></li></template>
<script>
"use strict";
const $ = id => document.getElementById(id), addresses = list => [].concat(list ?? []).join(", ");
const NAMES = ["accepted", "sent", "deferred", "failed"], ROWS = 25, POLL_MS = 2000, SOURCE_MOST = 200000;
const CLOCK = new Intl.DateTimeFormat(undefined, {timeStyle: "medium"});
const DAY = new Intl.DateTimeFormat(undefined, {dateStyle: "medium", timeStyle: "short"});
const EXACT = new Intl.DateTimeFormat(undefined, {dateStyle: "full", timeStyle: "long"});
let token = sessionStorage.getItem("token") || "", asked = 0, listed = 0, seen = "", opened = "", shown = "", quiet = 0;
let wanted = [], pages = [""], next = null;  // what is searched for; the cursors up to the page shown, and of the next
// Whatever comes from outside is written as text, and only where it differs: the keyboard keeps its place.
function put(node, text) { if (node.textContent !== text) node.textContent = text; }
function make(tag, text = "", attributes = {}) {
  const node = document.createElement(tag); put(node, text);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}
function told(error) { if (error.message) say(error.message); }
function say(text) { put($("said"), text); clearTimeout(quiet); quiet = setTimeout(() => put($("said"), ""), 8000); }
function when(ts, node = make("time")) {
  const at = new Date(ts * 1000);
  put(node, (at.toDateString() === new Date().toDateString() ? CLOCK : DAY).format(at));
  [node.dateTime, node.title] = [at.toISOString(), EXACT.format(at)]; return node;
}
function span(seconds) {
  const [n, unit] = [[86400, "days"], [3600, "h"], [60, "min"], [-1, "s"]].find(([n]) => n < 0 || seconds >= 2 * n);
  return `${Math.round(seconds / Math.abs(n))} ${unit}`;
}
async function ask(path, body) {
  const headers = {...(token && {"X-API-Token": token}), ...(body && {"Content-Type": "application/json"})};
  const options = {method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), credentials: "omit"};
  const answer = await fetch(path, options).catch(() => { throw new Error("The daemon does not answer."); });
  if (answer.status === 401) {
    if (token) say("This token is not one of the daemon's.");
    token = ""; sessionStorage.removeItem("token");
    $("all").hidden = $("steer").hidden = !($("login").hidden = false); $("token").focus();
    put($("delivery"), "The daemon asks for its token"); throw new Error("");
  }
  if (answer.ok && path.endsWith("/eml")) return answer;
  const fields = await answer.json();
  if (!fields.ok) throw new Error(fields.error);
  return fields;
}
async function act(path, body, said) {
  await ask(path, body).then(answer => say(said(answer))).catch(told); seen = ""; await look();
}
// Make the rows of a list those of `entries`, [key, value] each; what stays is patched in place.
function patch(list, template, entries, fill) {
  const rows = new Map([...list.children].map(row => [row.dataset.key, row]));
  const keys = new Set(entries.map(([key]) => key));
  for (const [key, row] of rows) if (!keys.has(key)) {
    const had = row.contains(document.activeElement), beside = row.nextElementSibling || row.previousElementSibling;
    row.remove(); if (had) (beside?.querySelector("a, button") || list.parentNode.querySelector("h2")).focus();
  }
  let at = list.firstElementChild;
  for (const [key, value] of entries) {
    const row = rows.get(key) || $(template).content.firstElementChild.cloneNode(true); row.dataset.key = key;
    if (row === at) at = at.nextElementSibling; else list.insertBefore(row, at);
    fill(name => row.querySelector(name), key, value, row);
  }
}
function fillAccount(part, id, account) {
  put(part(".id"), id); put(part(".state"), account.state); part(".state").dataset.state = account.state;
  const until = account.until && `next try in ${span(Math.max(0, account.until - Date.now() / 1000))}`;
  const node = account.node && `on node ${account.node}`;
  put(part(".reason"), [account.reason, until, `${account.pending} waiting`, node].filter(Boolean).join(" · "));
  part(".reason").title = account.until ? EXACT.format(new Date(account.until * 1000)) : "";
  if (!part("button")) for (const what of ["Suspend", "Activate"]) {
    const button = make("button", `${what} ${id}`), path = `account/${encodeURIComponent(id)}/${what.toLowerCase()}`;
    button.onclick = () => act(path, {}, () => `${id}: ${what === "Suspend" ? "suspended" : "activated"}`);
    part(".row").append(button, " ");
  }
}
function fillMessage(part, id, message, row) {
  put(part(".state"), message.status); part(".state").dataset.state = message.status;
  put(part(".subject"), message.subject || "(no subject)"); part(".subject").href = "#" + encodeURIComponent(id);
  put(part(".to"), addresses(message.message.to)); put(part(".account"), message.account_id); put(part(".id"), id);
  put(part(".why"), message.error || ""); when(message.created_at, part("time"));
  row.setAttribute("aria-current", id === opened);
}
function draw(recent) {
  const total = name => recent.reduce((sum, column) => sum + column[name], 0);
  const most = Math.max(1, ...recent.flatMap(column => NAMES.map(name => column[name])));
  const totals = NAMES.map(name => `${total(name).toLocaleString()} ${name}`);
  const peak = NAMES.some(total) ? `; at most ${most.toLocaleString()} in 10 s` : ": nothing happened";
  put($("chart-text"), totals.join(", ") + peak + ".");
  NAMES.forEach((name, i) => {
    put($("totals").children[i], totals[i]); const height = column => column[name] && 1 + 27 * column[name] / most;
    const bars = recent.map((column, x) => column[name] && `M${x} ${32 * i + 32}h.8v-${height(column)}h-.8z`);
    $("chart").children[i].setAttribute("d", `M0 ${32 * i + 31.5}h90v.5h-90z` + bars.filter(Boolean).join(""));
  });
}
function showStatus(status) {
  $("login").hidden = true; $("all").hidden = $("steer").hidden = false;
  const delivery = status.active ? "Delivery is on" : "Delivery is suspended: Activate lets mail out again";
  put($("delivery"), status.node ? `${delivery} · node ${status.node}` : delivery);
  for (const name of ["deferred", "in_delivery", "failed"]) put($(name), status[name].toLocaleString());
  const waiting = status.pending - status.in_delivery, oldest = status.oldest_pending_ts;
  put($("waiting"), waiting.toLocaleString());
  document.title = waiting ? `mailproxy (${waiting} waiting)` : "mailproxy";
  $("oldest").replaceChildren(...(oldest ? ["since ", when(oldest), ` (${span(Date.now() / 1000 - oldest)})`] : []));
  draw(status.recent); const ids = Object.keys(status.accounts), choice = $("search").account_id;
  patch($("accounts"), "account-row", Object.entries(status.accounts), fillAccount);
  $("no-account").hidden = ids.length > 0;
  for (const id of ids) if (![...choice.options].some(option => option.value === id)) choice.add(new Option(id, id));
}
async function list() {
  const mine = ++asked, began = performance.now(); let found = [], after = pages.at(-1);
  do {  // a long search answers in parts
    const query = new URLSearchParams([...wanted, ["order", "desc"], ["limit", ROWS - found.length]]);
    if (after) query.set("after", after);
    const answer = await ask(`messages?${query}`);
    if (mine !== asked) return;  // another search has begun
    [found, after] = [[...found, ...answer.messages], answer.next];
  } while (after && found.length < ROWS);
  next = after; listed = performance.now() + 10 * (performance.now() - began);  // not again before that
  patch($("messages"), "message-row", found.map(message => [message.id, message]), fillMessage);
  $("empty").hidden = found.length > 0;
  const none = "No message yet: submit one by POST /commands/add-messages, or with the command send.";
  put($("empty"), wanted.length ? "No message is like that: change the search, or clear it." : none);
  if (document.activeElement === $("older") && !next || document.activeElement === $("newer") && pages.length === 1)
    $("h-messages").focus();
  [$("older").disabled, $("newer").disabled] = [!next, pages.length === 1];
}
async function show() {
  const {message, attempts} = await ask(`message/${encodeURIComponent(opened)}`);
  if (message.id !== opened || shown === (shown = JSON.stringify([message, attempts]))) return;
  const given = message.message, fields = [["State", message.status], ["Error", message.error], ["From", given.from]];
  for (const name of ["to", "cc", "bcc", "reply_to", "return_path"])
    fields.push([name.replace("_", " "), addresses(given[name])]);
  const {created_at, deferred_ts, sent_ts, error_ts, reported_ts} = message;
  const times = {accepted: created_at, due: deferred_ts, sent: sent_ts, failed: error_ts, reported: reported_ts};
  for (const [label, ts] of Object.entries(times)) fields.push([label, ts && when(ts)]);
  fields.push(["account", message.account_id], ["batch", message.batch_code], ["Message-ID", message.message_id]);
  fields.push(["attached", addresses((given.attachments || []).map(one => one.filename))]);
  for (const [who, one] of Object.entries(message.recipients || {}))
    fields.push(["recipient", `${who}: ${one.status}, ${one.code} ${one.text}`]);
  $("fields").replaceChildren(...fields.filter(([, value]) => value).flatMap(([label, value]) => {
    const there = make("dd"); there.append(value); return [make("dt", label), there];
  }));
  put($("h-detail"), `${message.subject || "(no subject)"} (${opened})`);
  $("retry").disabled = message.status !== "error";
  $("attempts").replaceChildren(...attempts.map(one => {
    const row = make("li"), words = [one.outcome, one.stage, one.code, one.enhanced_code, one.text].filter(Boolean);
    row.append(when(one.started_at), ` ${words.join(" ")} (${span(one.ended_at - one.started_at)})`); return row;
  }));
  if (!attempts.length) $("attempts").append(make("li", "None yet: it waits for its turn."));
  const html = given.html === true || given.content_type === "html" ? "HTML, as source" : "Text";
  const parts = [[html, given.body], ["Text", given.text], ["HTML, as source", given.html]];
  $("content").replaceChildren(...parts.filter(([, text]) => typeof text === "string").flatMap(([label, text]) =>
    [make("p", label, {class: "quiet"}), make("pre", text, {tabindex: 0, "aria-label": label, role: "region"})]));
  if (!$("content").children.length) $("content").append(make("p", "It was submitted as a complete message."));
}
async function source() {
  const text = await (await ask(`message/${encodeURIComponent(opened)}/eml`)).text();
  put($("eml"), text.length > SOURCE_MOST ? `${text.slice(0, SOURCE_MOST)}\n... and more` : text);
  $("eml").hidden = false; $("eml").focus();
}
async function open_(id) {
  const before = opened; [opened, shown] = [id, ""]; $("eml").hidden = $("detail").hidden = true;
  for (const row of $("messages").children) row.setAttribute("aria-current", row.dataset.key === id);
  if (!id) {
    const row = [...$("messages").children].find(row => row.dataset.key === before);
    return (row?.querySelector("a") || $("h-messages")).focus();
  }
  await show().then(() => { $("detail").hidden = false; $("h-detail").focus(); }).catch(told);
}
function fromHash() {
  let id = ""; try { id = decodeURIComponent(location.hash.slice(1)); } catch { location.hash = ""; }
  if (id !== opened) open_(id);
}
// What changes is asked for; lists only when something happened, and never back to back.
let looking = false, timer = 0, typed = 0;
async function look() {
  if (looking) return;
  looking = true; clearTimeout(timer);
  try {
    const status = await ask("status"), first = $("all").hidden; showStatus(status);
    const {pending, deferred, in_delivery, failed, unreported, recent} = status;
    const now = JSON.stringify([pending, deferred, in_delivery, failed, unreported, recent.slice(-2)]);
    if (now !== seen && (performance.now() > listed || !seen)) {
      seen = now; await list(); if (first) fromHash(); else if (opened) await show().catch(told);
    }
  } catch (error) { if (error.message) put($("delivery"), error.message); }
  looking = false; if (!document.hidden && $("login").hidden) timer = setTimeout(look, POLL_MS);
}
function turn(to) { pages = to; list().catch(told); }
function search() {
  const before = wanted, given = [...new FormData($("search"))].filter(([, value]) => value.trim()); pages = [""];
  wanted = given.map(([name, value]) => [name, /since|until/.test(name) ? Math.floor(new Date(value) / 1000) : value]);
  list().catch(error => { wanted = before; told(error); });
}
$("login").onsubmit = event => {
  event.preventDefault(); token = $("token").value.replace(/[^!-~]/g, ""); sessionStorage.setItem("token", token);
  $("token").value = ""; look();
};
$("search").onsubmit = event => { event.preventDefault(); search(); };
$("search").oninput = () => {  // half an address is not searched for
  clearTimeout(typed); typed = setTimeout(() => /^$|@./.test($("search").to.value) && search(), 400);
};
$("search").onreset = () => setTimeout(search);
$("older").onclick = () => turn([...pages, next]);
$("newer").onclick = () => turn(pages.slice(0, -1));
$("run").onclick = () => act("commands/run-now", {}, () => "Delivery and reports were woken");
$("suspend").onclick = () => act("commands/suspend", {}, () => "Delivery is suspended");
$("activate").onclick = () => act("commands/activate", {}, () => "Delivery is on");
$("retry").onclick = () => act("commands/retry-messages", {ids: [opened]}, done =>
  done.queued ? `${opened} is queued anew` : `${opened} was not queued: it has not failed, or its account is gone`);
$("delete").onclick = () => {
  put($("question"), `Delete the message ${opened}? It cannot be restored, and is not reported any more.`);
  $("ask").showModal();
};
$("no").onclick = () => $("ask").close();
$("yes").onclick = () => {
  $("ask").close(); const id = opened;
  act("commands/delete-messages", {ids: [id]}, done => {
    if (done.in_delivery.length) return `${id} is on the wire right now, and was not deleted`;
    location.hash = ""; return `${id} is deleted`;
  });
};
$("close").onclick = () => { location.hash = ""; };
$("source").onclick = () => source().catch(told);
$("detail").onkeydown = event => { if (event.key === "Escape") location.hash = ""; };
addEventListener("hashchange", fromHash);
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
look();
</script>
"""


def console_answer() -> Response:
    """The page, under a policy (Content Security Policy 3) that admits only its own style and script."""
    hashes = {}
    for tag in ("script", "style"):
        text = CONSOLE.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        hashes[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return Response(200, CONSOLE.encode(), "text/html; charset=utf-8", headers)


# ======================================================================
# DISPATCHER - the first coroutine: due mail goes out
# ======================================================================
#
# A lane for each account: its connections, its state, its rate windows. What happens to
# a lane (new mail, a finished transaction, a time that comes) marks it for the next turn;
# the turn claims a few messages for each marked lane, and the others cost it nothing. A
# lane opens one connection first, and the others when that one may log in: so a server that
# is away costs one connection, and a refused password one login. No lane waits for another.
# After RFC 5321 4.5.4 and Postfix's qmgr.

COOLING_S = (5, 15, 60, 300)  # pauses of a lane whose server does not work
ACCOUNT_COOLING_S = (60, 300, 900, 3600)  # ... or does not want the account's mail
SAME_REFUSALS = 3  # so many messages refused in the same words are not about the messages
OWN_REFUSALS = 3  # so often refused for its session, while others passed, a message is meant itself
GROWTH_PAUSE_S = 10  # no further connection after one was refused
AHEAD_S = 0.02  # claims are taken ahead for as much work as this,
AHEAD_ONE_S = 0.2  # and one for each connection when a transaction is shorter
PREPARED_AT_ONCE = 50  # messages of a lane that are being fetched: those behind wait for no slow server
COMPOSED_INLINE_BYTES = 32_768  # larger messages are composed in a thread
BUILD_FACTOR = 3  # bytes a message takes while it is built, for each of its attachments: it, base64, message
SMALL_PART = 200  # the first message of a lane does not wait for so small a part of the memory
STORAGE_PAUSE_S = 1.0  # between two tries while the queue file refuses


@dataclass(eq=False, repr=False)
class Loop:
    """What turns until it is told to stop, and rests between two turns: until it is rung (also while it turned),
    or for as long as the turn says, in seconds. While the storage refuses, its work waits."""

    work: ClassVar[str]  # what the log calls it
    queue: Queue
    clock: Clock
    in_thread: InThread
    metrics: Metrics
    log: logging.Logger
    leases: Leases = field(default_factory=Leases, kw_only=True)  # of several machines one runs a lane, or reports

    def __post_init__(self) -> None:
        self.turned_at = self.clock.monotonic()
        self._rung = asyncio.Event()
        self._stopping = self._waits_for_storage = False

    def ring(self) -> None:
        self._rung.set()

    def stop(self) -> None:
        self._stopping = True
        self.ring()

    async def run(self) -> None:
        """Turn until told to stop, or cancelled; anything unexpected ends the daemon."""
        while not self._stopping:
            self.turned_at = self.clock.monotonic()
            try:
                pause_s = await self.turn()
                if self._waits_for_storage:
                    event(self.log, logging.INFO, f"{self.work} goes on: the storage works again")
                self._waits_for_storage = False
            except StorageUnavailable as error:
                if not self._waits_for_storage:
                    event(self.log, logging.ERROR, f"{self.work} waits for the storage", error=str(error))
                self._waits_for_storage, pause_s = True, STORAGE_PAUSE_S
            await asyncio.sleep(0)  # a loop that never rests must not keep the others from running
            if not self._rung.is_set() and pause_s > 0:
                timer = asyncio.get_running_loop().call_later(pause_s, self.ring)
                try:
                    await self._rung.wait()
                finally:
                    timer.cancel()
            self._rung.clear()

    async def turn(self) -> float:
        """Do what is to be done now; return for how long nothing will be."""
        raise NotImplementedError


# ----- lanes


class LaneState(enum.StrEnum):
    """What a lane may do now."""

    UP = "up"  # deliver
    PROBING = "probing"  # it has cooled: one connection finds out whether its server works again
    COOLING = "cooling"  # leave the server alone
    LIMITED = "limited"  # finish what was claimed
    SUSPENDED = "suspended"  # nothing: by hand, or because the account is gone


RESTING = (LaneState.COOLING, LaneState.SUSPENDED)
IN_TROUBLE = (LaneState.COOLING, LaneState.PROBING)


class Composed(NamedTuple):
    """A message ready for the wire."""

    content: bytes
    envelope: Envelope
    smtputf8: bool
    memory_bytes: int = 0  # its share of the memory


@dataclass(eq=False, repr=False)
class Turn:
    """What the transactions of one message, one after the other, have shown so far."""

    tried: frozenset[str] = frozenset()  # recipients that had their word, for now or for good
    refused: frozenset[str] = frozenset()  # those refused for now: asked again while others are accepted
    most: float = math.inf  # recipients that the server takes in one transaction
    careful: bool = False  # it hangs up after too many errors

    def served(self, left: Sequence[str], account: Account, offers: Offers) -> tuple[str, ...]:
        """The recipients of the next transaction."""
        most = min(account.max_recipients, self.most, offers.rcptmax or math.inf)
        domains = {one: one.rpartition("@")[2].lower() for one in left} if offers.rcptdomainmax else {}
        allowed = set(list(dict.fromkeys(domains.values()))[: offers.rcptdomainmax])
        return tuple([one for one in left if not domains or domains[one] in allowed][: int(min(most, len(left)))])

    def learn(self, replies: Mapping[str, Reply], before: Outcomes, after: Outcomes, accepted: int) -> None:
        """A transaction is over, and the message goes on at once with who is left."""
        heard = {one for one in replies if after.get(one) is not before.get(one) and after[one] != UNTRIED}
        waits = {one for one in replies if one in after and after[one].status is Status.DEFERRED}
        self.refused |= heard & waits
        if not accepted:
            self.tried |= self.refused
        if accepted and waits:
            self.most = accepted
        elif 0 < len(heard) < len(replies):
            self.most, self.careful = len(heard), True


@dataclass(eq=False, repr=False)
class Lane:
    """The mail of one account on its way out."""

    account: Account
    windows: SendWindows
    clock: Clock
    state: LaneState = LaneState.UP
    until: float = math.inf  # monotonic, as all times in here: when it has cooled, or its limit ends
    reason: str | None = None  # of the latest cooling
    failures: int = 0  # cooling periods in a row
    generation: int = 0  # failures of what began in an earlier one tell nothing
    believes: int = 0  # nor does success of what began in an earlier one than this
    deleted: bool = False  # the account is gone, and its mail ends with it
    mine: bool = True  # False: another node has it, or nobody
    has_mail: bool = True  # until a claim finds less than it asked for
    retried_first: bool = False
    ready: deque[tuple[Claim, Composed | None]] = field(default_factory=deque)  # None: composed on the way
    preparing: int = 0  # messages whose parts are being fetched or put together
    busy: int = 0  # connections at work, those being opened included
    opened: int = 0  # connections ever opened, for their names
    sessions: dict[Session, int] = field(default_factory=dict)  # those open, and the generation that opened them
    idle: list[Session] = field(default_factory=list)  # those of them that nobody uses
    first_is_in: asyncio.Event | None = None  # while one that is connected logs in before others, as no session is open
    recallable: set[asyncio.Task[Any]] = field(default_factory=set)  # work that ends when the lane is called back
    timer: asyncio.TimerHandle | None = None  # for when it has cooled, its limit ends, or an idle session is too old
    seconds_each: float = 0.1  # a transaction, smoothed
    bdat: bool | None = None  # its server knows it; False: gets it wrong
    accepted: int = 0  # transactions, since it began
    aside: dict[int, float] = field(default_factory=dict)  # messages a new session was refused with: wall-clock time
    meant: collections.Counter[int] = field(default_factory=collections.Counter)  # how often others passed then
    refusal: object = None  # what the latest messages were told,
    refused: set[int] = field(default_factory=set)  # and which these are
    grows_at: float = -math.inf

    def __post_init__(self) -> None:
        self.since = int(self.clock.wall())
        self.limit = self.account.max_connections  # connections allowed now

    def connections_free(self, now: float, most: int) -> int:
        """Connections that may go to work now, of `most` in all; fewer than 0 when there are too many."""
        if self.state is LaneState.PROBING or not (self.sessions or self.first_is_in):
            return 1 - self.busy
        if self.limit < self.account.max_connections and now >= self.grows_at:
            self.limit, self.grows_at = self.limit + 1, now + GROWTH_PAUSE_S
        return min(self.limit, most) - self.busy

    def wants(self, now: float, most: int) -> int:
        """Messages to claim now: one for each free connection, and a little work ahead."""
        if not self.has_mail or self.state not in (LaneState.UP, LaneState.PROBING):
            return 0
        free = max(0, self.connections_free(now, most))
        if self.state is LaneState.PROBING:
            return max(0, free - len(self.ready) - self.preparing)
        ahead = int(len(self.sessions) * AHEAD_S / self.seconds_each)
        if self.seconds_each < AHEAD_ONE_S:  # a claim takes a hundredth of that
            ahead = max(ahead, len(self.sessions))
        if len(self.ready) * 2 > free + ahead or self.preparing >= PREPARED_AT_ONCE:
            return 0
        return max(0, min(free + ahead - len(self.ready), self.account.batch_size))

    def keeps(self, session: Session, now: float) -> bool:
        """True when the session may carry one more transaction."""
        return (
            session.usable
            and self.sessions[session] == self.generation
            and now - session.opened_at < self.account.ttl
            and session.transactions < (session.offers.mailmax or math.inf)
            and session.transactions < self.account.max_messages_per_connection
        )

    # -- what it learns

    def become(self, state: LaneState, until: float = math.inf) -> None:
        if state is not self.state and not (state in IN_TROUBLE and self.state in IN_TROUBLE):
            self.since = int(self.clock.wall())
        self.state, self.until = state, until

    def works(self, generation: int) -> bool:
        """The server did its part in something begun in that generation; True when that is news."""
        if not self.failures or generation < self.believes:
            return False
        self.failures = 0
        if self.state in IN_TROUBLE:
            self.become(LaneState.UP)
        return True

    def others_pass(self, seq: int, began_at: float) -> None:
        """A message was accepted while others wait aside: those refused before that began are meant themselves.
        One of them has its turn now."""
        self.aside.pop(seq, None)
        shown = [one for one, refused_at in self.aside.items() if refused_at < began_at]
        self.meant.update(shown)
        self.aside.update(dict.fromkeys(shown, math.inf))
        if next_one := next((one for one, refused_at in self.aside.items() if refused_at == math.inf), None):
            del self.aside[next_one]

    def hears_the_same(self, refusal: object, seq: int) -> bool:
        """A message was refused; True when so many were before it, in the same words and with nothing accepted."""
        self.refused = {seq} | (self.refused if refusal == self.refusal else set())
        self.refusal = refusal
        return len(self.refused) >= SAME_REFUSALS

    def cool(self, signal: LaneSignal, reason: str, jitter: float, asked_s: float | None = None) -> None:
        """Leave the server alone for a while, longer each time or as it asked; then one connection finds out.

        Where the account was refused it does not count that sessions of before still work.
        """
        schedule_s = ACCOUNT_COOLING_S if signal is LaneSignal.ACCOUNT else COOLING_S
        pause_s = schedule_s[min(self.failures, len(schedule_s) - 1)] * (1 + 0.2 * jitter)
        if asked_s is not None:
            pause_s = asked_s * (1.1 + 0.1 * jitter)
        self.become(LaneState.COOLING, self.clock.monotonic() + pause_s)
        self.failures += 1
        self.reason = reason
        self.generation += 1
        if len(self.aside) > 1:  # one after the other was refused: none of them was meant
            self.aside = dict.fromkeys(self.aside, math.inf)
        if signal is LaneSignal.ACCOUNT:
            self.believes = self.generation

    def end_pause(self) -> None:
        """It has cooled, or its limit has ended, or somebody says so."""
        self.become(LaneState.PROBING if self.failures else LaneState.UP)
        self.has_mail = True

    # -- what it says

    def next_try_ts(self) -> int:
        """The wall-clock second after the lane's next try: others go first."""
        pause_s = self.until - self.clock.monotonic() if self.state is LaneState.COOLING else 0
        return math.floor(self.clock.wall() + max(0.0, pause_s)) + 1

    def status(self) -> dict[str, object]:
        """As GET /status shows it; times are wall-clock seconds."""
        reason, until = self.reason if self.state in IN_TROUBLE else None, None
        if self.state is LaneState.SUSPENDED:
            reason = "suspended by hand"
        elif self.state is LaneState.COOLING:
            until = self.next_try_ts()
        elif self.state is LaneState.LIMITED:
            reason, until = "rate limit reached", math.ceil(self.clock.wall() + self.until - self.clock.monotonic())
        connections, left = sum(one.usable for one in self.sessions), self.windows.left(self.clock.monotonic())
        shown = {"state": self.state, "reason": reason, "since": self.since, "until": until, "connections": connections}
        return {**shown, **({"limits_left": left} if left else {})}


@dataclass(eq=False, repr=False)
class Dispatcher(Loop):
    """Delivers due mail through the lanes; the only one who claims."""

    work = "delivery"
    settings: DeliverySettings  # replaced when the configuration is read again
    fetcher: AttachmentFetcher  # replaced, too
    jitter: Callable[[], float]
    open_session: Callable[..., Coroutine[Any, Any, Session | Reply]]
    memory: Shares  # bytes, for messages while they are put together
    reports_due: Callable[[], None]
    active: bool = True
    log_deliveries: bool = False
    lanes: dict[str, Lane] = field(default_factory=dict)
    switches: Mapping[str, int] = field(default_factory=dict)  # of the queue, as far as they are known here

    def __post_init__(self) -> None:
        super().__post_init__()
        self._marked: dict[Lane, None] = {}  # lanes for the next turn to look at, in this order
        self._slots = Shares(self.settings.max_concurrency)  # a transaction each
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked = False  # run-now in test_mode: turn until nothing is left to do
        self._recovered = set[str]()  # accounts whose mail that waits for their server's next try is ready
        self._held_windows: dict[str, SendWindows] = {}  # of accounts that went with mail on the wire
        self._at_work: set[Lane] = set()  # lanes with busy connections

    @property
    def busy(self) -> bool:
        """True while something is being delivered, or is about to be (test_mode: until the pass is over)."""
        return self._asked or bool(self._tasks)

    # -- what others tell it

    def wake(self, account_ids: Iterable[str] = ()) -> None:
        """There is new ready mail, for these accounts."""
        for account_id in account_ids:
            if lane := self.lanes.get(account_id):
                lane.has_mail = True
                self._mark(lane)
        self.ring()

    def run_now(self) -> None:
        """End all cooling and look at once; in test_mode the one way to get mail out."""
        self._asked = self.settings.test_mode
        self._recovered.update(self.lanes)
        for lane in self.lanes.values():
            if lane.state is LaneState.COOLING:
                lane.end_pause()
            self._mark(lane)

    def add_lane(self, account: Account, standing: Standing) -> None:
        """Begin to deliver for a new account, which may have had another life before."""
        now, wall = self.clock.monotonic(), self.clock.wall()
        counted = [(min(now + until - wall, now), n) for until, n in standing.sends]
        windows = self._held_windows.pop(account.id, None) or SendWindows(account.limits, counted)
        windows.limits = account.limits
        if self.leases.node:
            windows.recount(counted)  # another one may have sent meanwhile
        lane = self.lanes[account.id] = Lane(account, windows, self.clock)
        lane.mine = self.leases.has(account.id)
        if standing.suspended:
            lane.become(LaneState.SUSPENDED)
        elif standing.held_back and not windows.room(now):
            lane.become(LaneState.LIMITED, windows.opens_at(now))
        self.metrics.know(account.id)
        self._recovered.add(account.id)
        self._mark(lane)

    def replace_account(self, account: Account) -> None:
        """Deliver by the new definition; connections in use finish their message, all others end."""
        lane = self.lanes[account.id]
        lane.account, lane.windows.limits = account, account.limits
        self.switch_lane(account.id, active=lane.state is not LaneState.SUSPENDED)

    def switch_lane(self, account_id: str, *, active: bool) -> None:
        """Try the account's server now, or deliver nothing more for the account; what is on the wire finishes, and what
        was known of the server is forgotten."""
        lane = self.lanes[account_id]
        self._recall(lane)
        lane.failures, lane.believes, lane.limit = 0, lane.generation, lane.account.max_connections
        lane.accepted, lane.refused, lane.bdat = 0, set(), None
        lane.become(LaneState.UP if active else LaneState.SUSPENDED)
        self.wake([account_id])

    def remove_lane(self, account_id: str) -> Lane:
        """Stop delivering for an account that is gone; messages on the wire finish, for good or ill.

        The mail of one that stood in config.ini stays (it may come back), that of others ends.
        """
        lane = self.lanes.pop(account_id)
        self.metrics.forget(account_id)
        lane.deleted = lane.account.source != "config"
        lane.become(LaneState.SUSPENDED)
        self._let_others(lane)
        return lane

    def _let_others(self, lane: Lane) -> None:
        """Deliver nothing more in this lane; what is on the wire finishes, and counts for who has it then."""
        lane.mine = False
        self._recall(lane)
        if lane.state is not LaneState.SUSPENDED:
            lane.become(LaneState.UP)
        if lane.windows.held:
            self._held_windows[lane.account.id] = lane.windows

    def switch(self, *, active: bool) -> None:
        """Deliver, or begin nothing more."""
        if active is not self.active:
            self.active = active
            self.recall()

    def recall(self) -> None:
        """Call back what is not on the wire yet; what may go all the same is claimed anew."""
        for lane in self.lanes.values():
            self._recall(lane)
        self.wake(self.lanes)

    def _mark(self, lane: Lane) -> None:
        """Have the next turn look at the lane, or at the one that has taken its place."""
        self._marked[self.lanes.get(lane.account.id, lane)] = None
        self.ring()

    def _recall(self, lane: Lane) -> None:
        """Call back what is not on the wire yet, and close the connections nobody uses."""
        lane.generation += 1
        for work in lane.recallable:
            work.cancel()
        self._call_off(lane, list(lane.ready))
        self._part_with(lane, *lane.idle)

    def _call_off(self, lane: Lane, waiting: Iterable[tuple[Claim, Composed | None]]) -> None:
        """Put back messages that wait for a connection."""
        for claim, composed in waiting:
            lane.ready.remove((claim, composed))
            if composed is not None:
                self.memory.give_back(lane, composed.memory_bytes)
            self._spawn(self._release(lane, claim))

    # -- the loop

    async def turn(self) -> float:
        if not self.leases.lasts():  # nothing may begin; when it is buried, others have the lanes by now
            for lane in self.lanes.values():
                (self._let_others if self.leases.buried else self._recall)(lane)
            if not self.leases.buried:
                return self.settings.send_interval_seconds
            await self.leases.enter()
        self._slots.total = self.settings.max_concurrency
        self._slots.alone = self.memory.alone = len(self.lanes) == 1
        self._slots.grant()  # there may be more of them now
        await self._follow_clock()
        if self.settings.test_mode and not self._asked:
            return self.settings.send_interval_seconds
        if self.queue.file.refuses:
            await self.queue.answers()
        if recovered := frozenset(self._recovered):
            self.wake(await self.queue.let_go(recovered.difference(self.leases.elsewhere), ("connection", "login")))
            self._recovered -= recovered
        now = self.clock.wall()
        if self.queue.next_ts <= now:
            for lane in self.lanes.values():
                self._call_off(lane, [one for one in lane.ready if (one[0].expires_ts or math.inf) <= now])
            account_ids, ended = await self.queue.catch_up()
            self.wake(account_ids)
            for id_, account_id, how in ended:
                self.metrics.count_ended(self.metrics.label(account_id), how)
                what = "message given up" if how.status is Status.ERROR else "message sent to some"
                event(self.log, logging.WARNING, what, message=id_, account=account_id, error=how.error)
                self.reports_due()
        if self.active:
            await self._look_after_lanes()
        until_due_s = self.queue.next_ts - self.clock.wall()
        if self.settings.test_mode and until_due_s > 0 and not (self._tasks or (self.active and self._marked)):
            self._asked = False
            self.reports_due()
        return max(0.0, min(self.settings.send_interval_seconds, until_due_s))

    async def _follow_clock(self) -> None:
        """When somebody set the wall clock, what the daemon itself put off keeps its pauses.

        Times that clients gave are meant by the new clock. Nothing may come between following the
        clock and handing the change to the writer: what is written after it goes by the new one.
        """
        since, step_s = int(self.clock.started_at), self.clock.follow()
        if not step_s or self.leases.node:  # other machines have clocks of their own
            return
        try:
            await self.queue.move_times(step_s, since)
        except StorageUnavailable:
            self.clock.move(-step_s)  # the next turn sees it again
            raise
        event(self.log, logging.WARNING, "the wall clock was set", seconds=step_s)

    async def _look_after_lanes(self) -> None:
        """Put waiting mail of the marked lanes on free connections, and claim more where it can be taken."""
        marked, self._marked = self._marked, {}
        orders, others = dict[Lane, Order](), list[Lane]()
        try:
            for lane in marked:
                if not lane.mine:
                    if lane.has_mail and lane.state is not LaneState.SUSPENDED:
                        others.append(lane)
                    continue
                now = self.clock.monotonic()
                if lane.until <= now:
                    if lane.state is LaneState.LIMITED:  # those that waited keep their place
                        await self.queue.let_go([lane.account.id], ("limit",))
                    lane.end_pause()
                self._part_with(lane, *[session for session in lane.idle if not lane.keeps(session, now)])
                self._start_work(lane)
                wants = lane.wants(now, self.settings.max_concurrency)
                room = lane.windows.room(now) if wants else 0
                if room or (wants and not lane.windows.held):  # what is on the wire may yet give its slot back
                    most = min(wants, room) or lane.account.batch_size  # those are held back
                    id_, aside = lane.account.id, frozenset(lane.aside)
                    renewed = self.switches.get(f"renew {id_}", 0)
                    orders[lane] = Order(id_, most, lane.retried_first, aside, renewed)
                    lane.has_mail = False  # a wake during the claim sets it again
                due_at = min([lane.until, *(session.opened_at + lane.account.ttl for session in lane.idle)])
                if due_at < math.inf:
                    if lane.timer is not None:
                        lane.timer.cancel()
                    lane.timer = asyncio.get_running_loop().call_at(due_at, self._mark, lane)
            if others:
                await self._take_lanes(others)
            if orders:
                await self._claim(orders)
        except StorageUnavailable:
            for lane in (*orders, *others):
                lane.has_mail = True
            self._marked = {**marked, **self._marked}
            raise

    async def _take_lanes(self, others: Sequence[Lane]) -> None:
        """Take the lanes of these accounts, which have mail, unless another node has them."""
        for lane in others:
            lane.has_mail = False
        for account_id in await self.leases.take([lane.account.id for lane in others]):
            standing = await self.queue.standing(account_id)
            found = self.lanes.get(account_id)
            if found is not None and not found.mine:  # it may have gone, or come anew, meanwhile
                self.add_lane(found.account, standing)

    async def _claim(self, orders: Mapping[Lane, Order]) -> None:
        """Take the lanes' next messages out of the queue: small ones are ready, others are put together first."""
        found, again = await self.queue.claim(list(orders.values())), dict[Lane, Order]()
        for (lane, order), claims in zip(orders.items(), found, strict=True):
            if order.passed_over and not claims:  # there is nothing else: they have their turn, too
                again[lane] = order._replace(passed_over=frozenset())
                continue
            lane.has_mail = lane.has_mail or len(claims) == order.most
            lane.retried_first ^= bool(len(claims) % 2)
            for claim in self._fitting(lane, claims):
                if claim.payload is not None and not claim.parts and claim.size_bytes <= COMPOSED_INLINE_BYTES:
                    lane.ready.append((claim, None))
                else:
                    lane.preparing += 1
                    self._spawn(self._prepare(lane, claim))
                    self._mark(lane)  # it takes no connection yet: another may come
            self._start_work(lane)
        if again:
            await self._claim(again)

    def _fitting(self, lane: Lane, claims: Sequence[Claim]) -> list[Claim]:
        """Those of the claims that the limits of the account have room for, held from now on. When the first of them
        does not fit, and nothing on the wire may yet give its slots back, all are held back; else the rest returns."""
        windows, account, fitting = lane.windows, lane.account, list[Claim]()
        room, waits = windows.room(self.clock.monotonic()), windows.held > 0
        most = min(account.limits.values(), default=sys.maxsize) if account.limit_behavior == "defer" else sys.maxsize
        for place, claim in enumerate(claims):
            needed = 1
            if account.limit_counts == "recipients":  # a message to more than may ever go at once goes in parts
                needed = claim.addressees if claim.addressees <= most else max(1, min(most, room))
                claim = claim._replace(slots=needed, by_recipient=True)
            if needed > room:
                if fitting or waits:
                    self.queue.release(claims[place:])
                    lane.has_mail = True
                else:
                    self._hold_back(lane, claims, needed)
                    windows.held += len(claims)
                break
            room, windows.held = room - needed, windows.held + needed
            fitting.append(claim)
        return fitting

    def _hold_back(self, lane: Lane, claims: Sequence[Claim], needed: int) -> None:
        """The rate limit leaves less than is needed: these messages wait until the window opens, or fail."""
        account_id, now, wall = lane.account.id, self.clock.monotonic(), self.clock.wall()
        left = lane.windows.left(now)
        what = " recipients" if lane.account.limit_counts == "recipients" else ""
        reached = [f"{lane.account.limits[name]}{what} per {name}" for name in left if left[name] < needed]
        why = "rate limit reached: " + ", ".join(reached)
        opens_at, fails = lane.windows.opens_at(now, needed), lane.account.limit_behavior == "error"
        if not fails and lane.state not in RESTING:
            lane.become(LaneState.LIMITED, opens_at)
        self.metrics.rate_limited.labels(account_id).inc(len(claims))
        until_ts = None if fails else math.ceil(wall + opens_at - now)
        for claim in claims:
            waits = untouched(claim)._replace(status=Status.DEFERRED, error=why, deferred_ts=until_ts, reason="limit")
            ended = given_up(waits, why) if fails else waits
            self._spawn(self._conclude(lane, claim, Attempt(wall, wall, {}), ended))

    # -- from claim to connection

    def _may_go(self, lane: Lane) -> bool:
        """False at the end, while no outcome could be recorded, and for a lane that rests."""
        may = self.active and lane.mine and not (self._stopping or self.queue.file.refuses)
        return may and lane.state not in RESTING

    def _start_work(self, lane: Lane) -> None:
        """Put free connections to work; what may not go any more goes back."""
        if lane.ready and not self._may_go(lane):
            self._recall(lane)
        free = lane.connections_free(self.clock.monotonic(), self.settings.max_concurrency)
        for _ in range(min(len(lane.ready), free)):
            lane.busy += 1
            self._at_work.add(lane)
            self._spawn(self._work(lane))

    async def _prepare(self, lane: Lane, claim: Claim) -> None:
        """Fetch and compose a message beside the lane; no connection waits for it."""
        started_at, generation = self.clock.wall(), lane.generation
        try:
            prepared = await self._unless_recalled(lane, claim.expires_ts, self.put_together(lane, claim))
            if isinstance(prepared, Reply):
                attempt = Attempt(started_at, self.clock.wall(), {"": prepared})
                await self._settle(lane, claim, attempt, generation)
            elif prepared is not None:
                lane.ready.append((claim, prepared))
                self._start_work(lane)
            else:
                await self._release(lane, claim)
        except StorageUnavailable:
            await asyncio.sleep(STORAGE_PAUSE_S)
            await self._release(lane, claim)
        except Exception as error:
            await self._fail_internally(lane, claim, error)
        finally:
            lane.preparing -= 1
            self._mark(lane)

    async def put_together(self, lane: object, claim: Claim) -> Composed | Reply:
        """A message put together in a thread, as large ones and those with parts are; the lane has memory for it then.

        What it refers to is fetched first: a slow server keeps no memory from other messages.
        """
        fetched: Sequence[Fetched | None] = ()
        if claim.parts:
            taken_bytes = await self.memory.take(lane, 0 if claim.payload else claim.size_bytes)
            try:
                payload = claim.payload or await self.queue.payload(claim.seq)
                attachments = await self.in_thread(lambda: stored_attachments(payload))
            finally:
                self.memory.give_back(lane, taken_bytes)
            found = await self.fetcher.fetch_all(attachments, lane)
            if isinstance(found, Reply):
                return found
            fetched = found
        size_bytes = claim.size_bytes + sum(one.size_bytes for one in fetched if one is not None)
        taken_bytes, kept_bytes = await self.memory.take(lane, size_bytes * BUILD_FACTOR), 0
        try:
            payload = claim.payload or await self.queue.payload(claim.seq)
            contents = await self.queue.contents(claim.seq) if claim.parts else {}
            composed = await self.in_thread(lambda: self.compose(claim, payload, contents, fetched))
            if isinstance(composed, Reply):
                return composed
            kept_bytes = min(taken_bytes, len(composed.content))
            return composed._replace(memory_bytes=kept_bytes)
        finally:
            self.memory.give_back(lane, taken_bytes - kept_bytes)

    def compose(
        self, claim: Claim, payload: str, contents: Mapping[int, bytes] | None = None, fetched: Sequence[Any] = ()
    ) -> Composed | Reply:
        """The message with its contents and what was fetched, by the rules of the house; or the reply that says
        what of it cannot be fetched. Blocks where there are parts."""
        message_id, redirect_to = claim.message_id.strip("<>"), self.settings.redirect_to
        fields = read_json(payload)[0]
        if not claim.parts and redirect_to is None and (usual := compose_usual(fields, message_id, claim.created_at)):
            return Composed(usual[2], Envelope(usual[0], usual[1:2]), False)
        message = parse_message(fields, contents=contents or {}, message_id=message_id)
        parts = self.fetcher.parts(message.attachments, fetched) if message.attachments else ()
        if isinstance(parts, Reply):
            return parts
        if redirect_to is not None:
            message = redirect(message, redirect_to)
        content = compose(message, parts, date=claim.created_at)
        smtputf8 = message.raw is None and not content.isascii()
        return Composed(content, Envelope(message.return_path, message.recipients), smtputf8)

    def compose_ahead(self) -> None:
        """Compose what the connections at work will take next; for now most of them wait for the disk."""
        for lane in self._at_work:
            for place in range(min(len(lane.ready), lane.busy)):
                claim, composed = lane.ready[place]
                with contextlib.suppress(Exception):  # it is tried again, and told of, when its turn has come
                    if composed is None and isinstance(made := self.compose(claim, claim.payload or ""), Composed):
                        lane.ready[place] = claim, made

    async def _unless_recalled(self, lane: Lane, expires_ts: int | None, work: Coroutine[Any, Any, T]) -> T | None:
        """What the work gives, or None when the lane was called back, or its message has expired, meanwhile."""
        task = asyncio.get_running_loop().create_task(work)
        lane.recallable.add(task)
        try:
            await asyncio.wait([task], timeout=None if expires_ts is None else expires_ts - self.clock.wall())
        finally:
            lane.recallable.discard(task)
            task.cancel()
        if not task.done():
            await asyncio.wait([task])
        return None if task.cancelled() else task.result()

    async def _release(self, lane: Lane, claim: Claim) -> None:
        """Put a claim back untouched, and its slot of the limits; with a deleted account it ends."""
        if lane.deleted or claim.served:
            now = self.clock.wall()
            await self._conclude(lane, claim, Attempt(now, now, {}), untouched(claim))
            return
        lane.windows.give_back(claim.slots)
        self.queue.release([claim])  # at once: the account may be deleted during any wait
        self.wake([claim.account_id])

    # -- one connection at work

    async def _work(self, lane: Lane) -> None:
        """Deliver the lane's messages one by one until none is left, or this is one connection too many."""
        most = self.settings.max_concurrency
        try:
            while lane.ready and self._may_go(lane) and lane.connections_free(self.clock.monotonic(), most) >= 0:
                claim, composed = lane.ready.popleft()
                if len(lane.ready) <= lane.busy:
                    self._mark(lane)
                await self._deliver(lane, claim, composed)
        finally:
            lane.busy -= 1
            if not lane.busy:
                self._at_work.discard(lane)
            self._mark(lane)

    def _part_with(self, lane: Lane, *sessions: Session) -> None:
        lane.idle = [session for session in lane.idle if session not in sessions] if sessions else lane.idle
        for session in sessions:
            if lane.sessions.pop(session) == lane.generation and session.bdat is False and lane.bdat is not False:
                lane.bdat, why = False, session.broken and session.broken[1]
                event(self.log, logging.WARNING, "no CHUNKING with this server", account=lane.account.id, error=why)
            if session.usable:
                self._spawn(session.quit())

    async def _deliver(self, lane: Lane, claim: Claim, composed: Composed | None) -> None:
        """Bring one message to its disposition, or put it back; it may take several transactions, of which none begins
        in a lane that was called back."""
        turn, generation, transacting = Turn(), lane.generation, False
        try:  # a message without parts has nothing that cannot be fetched
            composed = composed or cast(Composed, self.compose(claim, claim.payload or ""))
            if claim.recipients:  # redirect_to may have come or gone: nothing waits for those it has no more
                known, waits = composed.envelope.recipients, Status.DEFERRED
                kept = {a: outcome for a, outcome in claim.recipients.items() if a in known or outcome.status != waits}
                claim = claim._replace(recipients=kept or None)
            transacting = True
            while (goes_on := await self._transact(lane, claim, composed, turn)) is not None:
                claim = goes_on
                if generation != lane.generation:
                    await self._release(lane, claim)
                    break
        except Exception as error:
            await self._fail_internally(lane, claim, error, in_doubt=transacting)
        finally:
            if composed and composed.memory_bytes:
                self.memory.give_back(lane, composed.memory_bytes)

    async def _transact(self, lane: Lane, claim: Claim, composed: Composed, turn: Turn) -> Claim | None:
        """One transaction; the claim as it goes on at once with the recipients that are left, None: it is over."""
        generation, started_at = lane.generation, self.clock.wall()
        if (claim.by_recipient and not claim.slots) or (claim.expires_ts or math.inf) <= started_at:
            await self._release(lane, claim)
            return None
        before = claim.recipients or {}
        left: Sequence[str] = composed.envelope.recipients
        if before or turn.tried:
            final = {address for address, outcome in before.items() if outcome.status is not Status.DEFERRED}
            left = [a for a in left if a not in turn.tried and a not in final]
        replies: dict[str, Reply] = {}
        if (allowed := self.settings.allow_recipients) and not self.settings.redirect_to:  # addresses, and @domains
            refusal = Reply(Stage.RCPT, 550, "recipient not allowed here", "5.7.1", Cause.LOCAL)
            named = {address: {address.lower(), "@" + address.lower().rpartition("@")[2]} for address in left}
            replies = {address: refusal for address in left if named[address].isdisjoint(allowed)}
        name, reused = "", False
        if left and not replies:
            session = await self._session(lane, claim.expires_ts)
            if isinstance(session, Reply):
                if generation == lane.generation or lane.state is LaneState.COOLING:
                    replies, left = {"": session}, []
            elif session is not None:
                name, reused = session.name, session.transactions > 0
                served = turn.served(left, lane.account, session.offers) if len(left) > 1 else (left[0],)
                served = served[: claim.slots] if claim.by_recipient else served
                envelope = Envelope(composed.envelope.sender, served)
                if not session.offers.eight_bit_mime and not composed.content.isascii():
                    what = "8-bit content goes as it is to a server without 8BITMIME"
                    event(self.log, logging.WARNING, what, account=lane.account.id, message=claim.id)
                replies = await self._converse(lane, claim, session, envelope, composed, turn)
            if not replies:  # it has not had its turn, or is to have it by DATA
                await self._release(lane, claim)
                return None
        accepted = sum(reply.accepted for reply in replies.values())
        if not accepted:
            turn.tried |= turn.refused
        attempt = Attempt(started_at, self.clock.wall(), replies, name, reused)
        untried = [a for a in left if a not in replies and a not in turn.tried]
        goes_on = await self._settle(lane, claim, attempt, generation, untried)
        if goes_on is not None:
            turn.learn(replies, before, goes_on.recipients or {}, accepted)
        return goes_on

    async def _session(self, lane: Lane, expires_ts: int | None) -> Session | Reply | None:
        """An idle session of the lane, or a new one; a reply says why there is none. None: called back, or expired.

        While no session is open, one connection goes first: the others may connect once its server answers, and log in
        once it is in. Where it ends otherwise, another one goes first.
        """
        while lane.idle:
            if lane.keeps(idle := lane.idle.pop(), self.clock.monotonic()):
                return idle
            self._part_with(lane, idle)
        generation, goes_first = lane.generation, False

        def connected() -> None:
            nonlocal goes_first
            if not (goes_first or lane.sessions or lane.first_is_in):
                goes_first, lane.first_is_in = True, asyncio.Event()
                self._mark(lane)

        async def may_log_in() -> None:
            nonlocal goes_first
            while generation == lane.generation and not (goes_first or lane.sessions):
                if lane.first_is_in:
                    await lane.first_is_in.wait()
                else:
                    goes_first, lane.first_is_in = True, asyncio.Event()
            if generation != lane.generation:  # called back, which wait_for of Python 3.11 may have swallowed
                raise asyncio.CancelledError

        lane.opened += 1
        opening = self.open_session(
            lane.account, name=f"{lane.account.id}-{lane.opened}", connected=connected, may_log_in=may_log_in
        )
        try:
            session = await self._unless_recalled(lane, expires_ts, opening)
            if session is not None and not isinstance(session, Reply):
                lane.sessions[session] = generation
                self._mark(lane)  # it may have more connections now
        except Exception as error:
            what = "internal error while connecting"
            event(self.log, logging.ERROR, what, account=lane.account.id, exc_info=error)
            session = Reply(Stage.CONNECT, 451, f"internal error ({type(error).__name__})", "4.3.0", Cause.LOCAL)
        finally:
            if goes_first and lane.first_is_in:
                lane.first_is_in.set()
                lane.first_is_in = None
        if session is not None:
            outcome = "ok"
            if isinstance(session, Reply):
                refused = about(session, lane.account, relays=False).about is About.ACCOUNT
                outcome = "login_refused" if refused else "failed"
            self.metrics.smtp_connects.labels(self.metrics.label(lane.account.id), outcome).inc()
        return session

    async def _converse(
        self, lane: Lane, claim: Claim, session: Session, envelope: Envelope, composed: Composed, turn: Turn
    ) -> dict[str, Reply]:
        """One SMTP transaction in its slot: a reply for each recipient, or none when the lane was called back or the
        message has expired before, or the server does not know BDAT. The session is idle then, or gone."""
        has_slot = not self._slots.waiting and self._slots.fits(lane, 1)
        has_slot = has_slot or bool(await self._unless_recalled(lane, claim.expires_ts, self._slots.take(lane, 1)))
        begun = self.clock.monotonic()
        try:
            if not has_slot or lane.sessions[session] != lane.generation or not self.leases.lasts():
                return {}
            chunking = not claim.attempts and self.settings.chunking and lane.bdat is not False
            session.bdat, content, utf8 = session.bdat or lane.bdat, composed.content, composed.smtputf8
            return await session.transact(envelope, content, smtputf8=utf8, careful=turn.careful, chunking=chunking)
        finally:
            if has_slot:
                self._slots.give_back(lane, 1)
            now = self.clock.monotonic()
            lane.bdat = True if session.bdat and lane.bdat is None else lane.bdat
            lane.seconds_each += (max(now - begun, 0.0005) - lane.seconds_each) / 4
            self.metrics.transacted(self.metrics.label(lane.account.id)).observe(now - begun)
            if lane.keeps(session, now) and self._may_go(lane):
                lane.idle.append(session)
            else:
                self._part_with(lane, session)

    # -- what became of it

    async def _settle(
        self, lane: Lane, claim: Claim, attempt: Attempt, generation: int, untried: Sequence[str] = ()
    ) -> Claim | None:
        """Judge the attempt, tell the lane, record it; the claim where the message goes on at once."""
        if attempt.first_failure is None:
            disposition = settle(claim, attempt, lane.account, attempt.ended_at, 0, untried)
        else:
            disposition = self._judge(lane, claim, attempt, generation, untried)
        if disposition.slot_used:
            lane.accepted, lane.refused = lane.accepted + 1, set()
            if lane.aside:
                lane.others_pass(claim.seq, attempt.started_at)
                self.wake([claim.account_id])
        if disposition.verdict.about is not About.MESSAGE:
            self._part_with(lane, *[session for session in lane.idle if session.name == attempt.connection])
        if disposition.lane is LaneSignal.UP:
            if lane.failures and len(lane.refused) < SAME_REFUSALS and lane.works(generation):
                self._recovered.add(lane.account.id)
                self.ring()
        elif disposition.lane is LaneSignal.FEWER:
            await self._release(lane, claim)
            return None
        elif disposition.lane is not LaneSignal.NONE and generation == lane.generation:
            self._cool(lane, disposition)
        if disposition.status is not Status.QUEUED:
            await self._conclude(lane, claim, attempt, disposition)
            return None
        left, served = claim.slots - await self._record(lane, claim, attempt, disposition), disposition.slot_used
        return claim._replace(recipients=disposition.recipients, served=claim.served or served, slots=left)

    def _judge(
        self, lane: Lane, claim: Claim, attempt: Attempt, generation: int, untried: Sequence[str]
    ) -> Disposition:
        """What becomes of the message, in the light of what the lane has seen with others."""
        current, failure = generation == lane.generation, cast(Reply, attempt.first_failure)
        others = lane.first_is_in or {one.name for one in lane.sessions if one.usable} - {attempt.connection}
        judged = functools.partial(settle, claim, attempt, lane.account, self.clock.wall(), self.jitter(), untried)
        disposition = judged(relays=lane.accepted > 0, others=current and bool(others))
        if disposition.slot_used:
            return disposition
        if disposition.lane is LaneSignal.FEWER and claim.seq not in lane.meant:
            lane.limit, lane.grows_at = max(1, lane.busy - 1), self.clock.monotonic() + GROWTH_PAUSE_S
        if disposition.lane in (LaneSignal.FEWER, LaneSignal.COOL) and failure.stage not in BEFORE_MAIL:
            if lane.meant[claim.seq] >= OWN_REFUSALS - 1 and failure.transient:
                return judged(by_code=True)
            if lane.accepted and not lane.failures and set(lane.aside.values()) <= {math.inf}:
                disposition = judged(others=True)  # the next message shows whose trouble it is
            lane.aside[claim.seq] = attempt.ended_at
        if disposition.verdict.cure == CHECK_RELAY:  # perhaps only for this one's domain: another is the probe
            lane.aside[claim.seq] = math.inf
        said = signature(failure) if disposition.verdict.about is About.MESSAGE else None
        if said is None or not lane.hears_the_same(said, claim.seq):
            return disposition
        if not current:  # it began before the lane cooled
            disposition = held(claim, failure, disposition.verdict)
        return disposition._replace(lane=LaneSignal.COOL, verdict=Verdict(About.ACCOUNT, SAME_TO_ALL))

    def _cool(self, lane: Lane, disposition: Disposition) -> None:
        """Leave the server alone; what is not on the wire comes back."""
        verdict, what = disposition.verdict, "account cooling down"
        lane.cool(disposition.lane, disposition.error or "", self.jitter(), verdict.pause_s)
        if verdict.about is About.ACCOUNT:
            what = "an account cannot log in" if verdict.cure == CHECK_LOGIN else "an account is refused"
        level = logging.ERROR if verdict.about is About.ACCOUNT else logging.WARNING
        error, cure = disposition.error, verdict.cure or None
        event(self.log, level, what, account=lane.account.id, until=lane.next_try_ts(), error=error, cure=cure)
        self.queue.give_up_aged(lane.account.id, self.clock.wall() - lane.account.max_age_seconds, error or "")
        self._recall(lane)
        self._mark(lane)

    async def _conclude(self, lane: Lane, claim: Claim, attempt: Attempt, disposition: Disposition) -> None:
        """Record how the turn of a message ended; its slot, and its place on the wire, are free."""
        if disposition.status in (Status.SENT, Status.ERROR):
            lane.meant.pop(claim.seq, None)
        if lane.deleted and disposition.status in (Status.QUEUED, Status.DEFERRED):
            disposition = given_up(disposition, "account deleted")
        elif disposition.status is Status.DEFERRED and disposition.deferred_ts is None:
            disposition = disposition._replace(deferred_ts=lane.next_try_ts())
        used = await self._record(lane, claim, attempt, disposition)
        self._tell(claim, attempt, disposition)
        if used < claim.slots:
            lane.windows.give_back(claim.slots - used)
            self._mark(lane)
        if disposition.status is Status.QUEUED:
            self.queue.release([claim])
            self.wake([claim.account_id])
        if disposition.reason == "limit" and lane.state is LaneState.UP:  # the account was replaced meanwhile
            lane.become(LaneState.LIMITED, self.clock.monotonic())

    async def _record(self, lane: Lane, claim: Claim, attempt: Attempt, disposition: Disposition) -> int:
        """Write the outcome, however long the storage refuses: it must not be forgotten. The slots that it has used of
        the account's limits are counted, and returned."""
        used = claim.slots * disposition.slot_used
        if claim.by_recipient and attempt.replies:
            used = sum(reply.accepted or reply.in_doubt for reply in attempt.replies.values())
        for tries in itertools.count():
            try:
                await self.queue.record(Outcome(claim, attempt, disposition, sent=used))
                break
            except StorageUnavailable as error:
                if tries == 0:
                    self._say(claim, "an outcome waits for the storage", logging.ERROR, error=str(error))
                await asyncio.sleep(STORAGE_PAUSE_S)
        lane.windows.count(self.clock.monotonic(), used)
        if disposition.status is not Status.QUEUED:
            self.reports_due()
        return used

    async def _fail_internally(self, lane: Lane, claim: Claim, error: Exception, *, in_doubt: bool = False) -> None:
        """Our own code failed with this message: it ends, and no other; in doubt when it may have been sent."""
        self._say(claim, "internal error in a delivery", logging.ERROR, exc_info=error)
        what = "in doubt: internal error" if in_doubt else "internal error: the message could not be composed"
        why, now = f"{what} ({type(error).__name__})", self.clock.wall()
        replies = {} if in_doubt else {"": Reply(Stage.COMPOSITION, 554, why, "5.6.0", Cause.LOCAL)}
        ended = given_up(untouched(claim)._replace(counted=True, slot_used=in_doubt), why)
        await self._conclude(lane, claim, Attempt(now, now, replies), ended)

    def _tell(self, claim: Claim, attempt: Attempt, disposition: Disposition) -> None:
        """Count and log how the turn of a message ended."""
        label, connection = self.metrics.label(claim.account_id), attempt.connection or None
        status, error, until = disposition.status, disposition.error, disposition.deferred_ts
        if status is Status.DEFERRED:
            self.metrics.messages_deferred.labels(label, disposition.reason).inc()
            self.metrics.recent.count("deferred")
            self._say(claim, "message deferred", connection=connection, until=until, error=error)
        elif status is not Status.QUEUED:
            self.metrics.count_ended(label, disposition)
            if status is Status.SENT:
                self.metrics.waited(label).observe(max(0.0, attempt.ended_at - claim.ready_at))
            if error is not None:
                what = "message failed" if status is Status.ERROR else "message sent to some"
                self._say(claim, what, logging.WARNING, connection=connection, error=error)
            elif self.log_deliveries:
                self._say(claim, "message sent", connection=connection, recipients=len(attempt.replies))

    def _say(self, claim: Claim, what: str, level: int = logging.INFO, **fields: Any) -> None:
        event(self.log, level, what, message=claim.id, account=claim.account_id, **fields)

    # -- the end

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.ring()
        if not task.cancelled() and (error := task.exception()) is not None:
            event(self.log, logging.ERROR, "a delivery task failed", exc_info=error)

    async def drain(self) -> None:
        """Claim nothing more, have run() return, and wait until nothing is on the wire; each lane goes to another node
        as soon as nothing of it is."""
        self.stop()
        self.recall()
        while True:
            await self.leases.give_up(id_ for id_, lane in self.lanes.items() if not lane.windows.held)
            if not self._tasks:
                return
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    def cut(self) -> None:
        """End what is still on the wire; those messages stay in the queue."""
        for task in self._tasks:
            task.cancel()


# ======================================================================
# REPORTER - the second coroutine: due reports go out
# ======================================================================
#
# The twin of the dispatcher. States go to the upstream in the order they came
# about, and stay unreported until it says 2xx. One call at a time; while it runs
# nothing is locked, so the upstream may submit from inside it.

GATHER_S = 0.1  # so long the first new state waits, for a burst to share a call
REST_S = 0.3  # so long after a call that took all there was, for a steady stream of results to share calls
REPORT_PAUSES_S = (1, 5, 30, 60, 300)  # after calls that failed
EAGER_PAUSES_S = (0, 0, 1, 2, 5, 15, 60)  # before calls the upstream asks for, while they bring nothing
ANSWER_BYTES = 1_048_576  # of an acknowledgement; a larger one is not looked into
REPORTER_SLEEP_S = 5.0  # at most, so that it can be seen to turn


class Acknowledgement(NamedTuple):
    """What the upstream said to a call."""

    outcome: str  # one of REPORT_OUTCOMES
    problem: str | None  # why it counts as a failure; None: acknowledged
    queued: int = 0
    next_sync_after: float | None = None  # wall-clock seconds
    remarks: Mapping[str, str] = MappingProxyType({})  # for the log: field and value
    retry_after_s: float | None = None  # the pause it asked for


def webhook_signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """The webhook-signature header (Standard Webhooks 1.0.0)."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()


def parse_acknowledgement(status: int, body: bytes) -> Acknowledgement:
    """What an answer to a report means; of its JSON only the few known fields are looked at."""
    answer, remarks = dict[str, Any](), dict[str, str]()
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        answer = {**json.loads(body)}
        said = {name: answer[name] for name in ("error", "not_found") if answer.get(name)}
        remarks = {name: json.dumps(value, ensure_ascii=False)[:500] for name, value in said.items()}
    if not 200 <= status < 300:
        return Acknowledgement("refused", f"the upstream answered {status}", remarks=remarks)
    if answer.get("ok") is False:
        return Acknowledgement("refused", "the upstream answered ok: false", remarks=remarks)
    numbers = {name: one for name, one in answer.items() if type(one) in (int, float) and abs(one) <= LATEST_TIME}
    queued, after = max(numbers.get("queued", 0), 0), numbers.get("next_sync_after")
    return Acknowledgement("acknowledged", None, int(queued), after, remarks)


@dataclass(eq=False, repr=False)
class Reporter(Loop):
    """Reports every state once it is on disk, until the upstream has acknowledged it."""

    work = "reporting"
    client: ClientSettings  # this and the next are replaced when the configuration is read again
    delivery: DeliverySettings
    call: Callable[[str, bytes], Awaitable[HttpAnswer]]  # an id, the same however often it is tried, and the body
    dispatching: Callable[[], bool]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pass_is_open = False  # test_mode: from run-now until all that came of it is reported
        self._next_at: float | None = -math.inf  # the next call; monotonic. None: when the interval is over
        self._called_at = self._not_before = -math.inf  # the latter: next_sync_after
        self._rests_until = -math.inf
        self._failures = 0
        self._eager_calls = 0  # calls the upstream asked for, in a row, that brought nothing
        self._ids_seen = 0
        self._tried_up_to = 0  # report_order of the last state of a batch that failed
        self._empty_id = ""  # of an empty report that failed
        self._most = LARGEST_INTEGER  # entries of a report; fewer once the upstream said that one was too large
        self._acknowledged: Set[int] = frozenset()  # places of states, and not on disk yet
        self._house_kept_at, self._purged = -math.inf, 0

    # -- what others tell it

    def run_now(self) -> None:
        """Call the upstream at once, whatever it said and however often it failed.

        From inside a call it means one more call, but not one after another without end.
        """
        self._pass_is_open = True
        self._not_before = self._next_at = -math.inf
        self.ring()

    # -- the loop

    async def turn(self) -> float:
        if self.delivery.test_mode and not self._pass_is_open:
            return REPORTER_SLEEP_S
        if not (self.leases.has(REPORTER) or await self.leases.take([REPORTER])):
            return REPORTER_SLEEP_S
        house_is_kept = await self._keep_house()
        pause_s = await self._report() if self.client.client_sync_url is not None else REPORTER_SLEEP_S
        if pause_s > 0 and not self.dispatching():
            self._pass_is_open = False
        return min(pause_s, REPORTER_SLEEP_S) if house_is_kept else 0.0

    # -- one report

    async def _report(self) -> float:
        """Make the call that is due, or return for how long none will be."""
        await self._stamp()
        by_interval = max(self._called_at + self.client.sync_interval_seconds, self._not_before)
        wait_s = (by_interval if self._next_at is None else self._next_at) - self.clock.monotonic()
        if wait_s > 0 and self._failures:
            return wait_s
        states = await self._due_states()
        if wait_s > 0 and not states:
            return wait_s
        if not self.leases.lasts():
            return STORAGE_PAUSE_S
        self._next_at = None  # run-now may set it meanwhile
        answer = await self._answer_to(states)
        self.metrics.report_requests.labels(answer.outcome).inc()
        for name, remark in answer.remarks.items():
            event(self.log, logging.WARNING, "the upstream remarks on a report", field=name, remark=remark)
        self._plan_next_call(answer, states)
        await self._stamp()
        return 0.0

    async def _due_states(self) -> States:
        """The next states to report: those of a failed call again, else a burst as a whole."""
        most = min(self.client.report_batch_size, self._most)
        states = await self.queue.unreported(most)
        again = {place: entry for place, entry in states.items() if place <= self._tried_up_to}
        if again or not 0 < len(states) < most:
            return again or states
        await asyncio.sleep(max(GATHER_S, self._rests_until - self.clock.monotonic()))
        return await self.queue.unreported(most)

    async def _answer_to(self, states: States) -> Acknowledgement:
        """One call; an empty report keeps its id until it is acknowledged."""
        empty_id = self._empty_id = self._empty_id or "rep_" + secrets.token_hex(16)

        def written() -> tuple[str, bytes]:  # some 10 microseconds a state
            body = as_json({"delivery_report": list(states.values())}).encode()
            places = repr(list(states)).encode()
            return "rep_" + hashlib.sha256(places + body).hexdigest()[:32] if states else empty_id, body

        report_id, body = await self.in_thread(written)
        began = self.clock.monotonic()
        try:
            answer = await self.call(report_id, body)
        except HttpFailure as failure:
            late = self.clock.monotonic() - began >= self.client.timeout_seconds
            return Acknowledgement("timeout" if late else "unreachable", str(failure))
        except SecretUnavailable as failure:
            return Acknowledgement("other", str(failure))
        if answer.status == 413:
            self._most = max(1, len(states) // 2)
        asked = answer.headers.get("retry-after", "") if answer.status in (429, 503) else ""
        pause_s = retry_after_s(asked, self.clock.wall())
        return parse_acknowledgement(answer.status, answer.body)._replace(retry_after_s=pause_s)

    async def _stamp(self) -> None:
        """Note what the upstream has taken; tried again before any further call if it cannot be written."""
        if self._acknowledged:
            await self.queue.acknowledge(self._acknowledged)
            self._acknowledged = frozenset()

    def _plan_next_call(self, answer: Acknowledgement, states: States) -> None:
        """When to call again: after a pause when this call failed, soon when the upstream has more to submit."""
        now, asked = self.clock.monotonic(), self._next_at is not None
        if answer.problem is not None:
            pause_s: float = REPORT_PAUSES_S[min(self._failures, len(REPORT_PAUSES_S) - 1)]
            if answer.retry_after_s is not None:
                pause_s = max(answer.retry_after_s, REPORT_PAUSES_S[0])
            pause_s = min(pause_s, self._eager_pause_s()) if asked else pause_s
            self._failures += 1
            self._tried_up_to = max(states, default=0)
            self._next_at = now + pause_s
            what, entries, error = "report not acknowledged", len(states), answer.problem
            event(self.log, logging.WARNING, what, entries=entries, error=error, next_try_in_seconds=pause_s)
            return
        event(self.log, logging.DEBUG, "report acknowledged", entries=len(states))
        if self._failures:
            event(self.log, logging.INFO, "the upstream takes reports again")
        self._acknowledged = states.keys()
        self._rests_until = now + REST_S if 0 < len(states) < self.client.report_batch_size else -math.inf
        self._failures, self._tried_up_to, self._empty_id = 0, 0, ""
        if answer.next_sync_after is not None:
            self._not_before = now + answer.next_sync_after - self.clock.wall()
        self._called_at = now
        if asked or answer.queued:
            self._next_at = max(now + self._eager_pause_s(), -math.inf if asked else self._not_before)
        else:
            self._eager_calls = 0

    def _eager_pause_s(self) -> float:
        """How soon to call when the upstream asks for it: later and later while that brings nothing."""
        self._eager_calls = 0 if self.queue.new_ids > self._ids_seen else self._eager_calls + 1
        self._ids_seen = self.queue.new_ids
        return EAGER_PAUSES_S[min(self._eager_calls, len(EAGER_PAUSES_S) - 1)]

    # -- housekeeping

    async def _keep_house(self) -> bool:
        """Purge some of what is final and was reported long ago; False when there is more."""
        now = self.clock.monotonic()
        retention_s, ids_s = self.delivery.delivery_report_retention_seconds, self.delivery.id_retention_seconds
        if now < self._house_kept_at + min(30.0, max(1.0, ids_s)):
            return True
        purged = await self.queue.purge(retention_s, unreported_too=self.client.client_sync_url is None)
        self._purged += purged
        if purged or await self.queue.forget(ids_s):
            return False
        if self._purged:
            event(self.log, logging.INFO, "final messages purged", messages=self._purged)
        self._house_kept_at, self._purged = now, 0
        return True


# ======================================================================
# CONTROL PLANE - one short handler a route: what clients and operators ask for
# ======================================================================
#
# Handlers translate between HTTP and the queue; they decide nothing about mail.
# What wakes, suspends or renews the loops comes in as the dispatcher and the
# reporter themselves. A 200 to a submission is answered after the commit.

MAX_IDS = 100_000  # of one command that names messages
LOOP_PATIENCE_S = 10.0  # by which a loop, or the storage, may be late
LISTING_LIMIT = 10_000
LONGEST_PIECE = 1_000  # characters of what is searched for
LISTING_PATIENCE_S = 0.7  # a listing with a limit that finds nothing ends then: the client may go on from there
ALL_REJECTED = "all messages rejected"
NO_MESSAGE = "there is no message with this id"
NO_ACCOUNT = "there is no account with this id"
NOT_FOUND = "account not found"
NO_DEFAULT = "missing account configuration"
TWICE = "duplicate id in this batch"
REJECTIONS: Mapping[str, str] = {  # the code of a reason that is about no field alone
    NOT_FOUND: "unknown_account", NO_DEFAULT: "no_account", TWICE: "duplicate_id",
    "already sent": "already_sent", "in delivery": "in_delivery",
}  # fmt: skip


def stored_accounts(
    definitions: Mapping[str, str], defaults: DeliverySettings, complain: Callable[[str], object]
) -> list[Account]:
    """The accounts that were added over HTTP; one that an earlier version took and this one does not is left out."""
    accounts = []
    for account_id, definition in definitions.items():
        try:
            accounts.append(parse_account(json.loads(definition), defaults=defaults))
        except Rejected as error:
            complain(f"account {account_id} of the queue is left out; replace it by POST /account: {error}")
    return accounts


QueryFields = Mapping[str, tuple[Kind, str]]  # what a value must be, and what it is for

ADDRESSEE = Kind("a mail address", lambda value: parse_mailboxes(value, "to", exactly_one=True)[0].address)
PIECE = Kind(
    f"1 to {LONGEST_PIECE} characters on one line",
    lambda value: fit(TEXT.parse(value), 1 <= len(value) <= LONGEST_PIECE),
)
MOMENT = integer(0, 9_999_999_999, "a time in whole Unix seconds")
STATUS = word(*(status.value for status in Status))
BATCH: QueryFields = {"batch_code": (PIECE, "Only this batch, and what is submitted to it later.")}
CONTENT: QueryFields = {"content": (BOOLEAN, "With the contents of inline attachments, and raw messages.")}
LISTING: QueryFields = {
    "active_only": (BOOLEAN, "Only messages that are not final."),
    "status": (STATUS, "Only messages of this status."),
    "account_id": (TEXT, "Only messages of this account."),
    "batch_code": (TEXT, "Only messages with this label."),
    "to": (ADDRESSEE, "Only messages to this recipient, in to, cc, bcc or the envelope of a raw message."),
    "subject": (PIECE, "Only messages with this in their subject, without regard to case."),
    "since": (MOMENT, "Only messages accepted then or later."),
    "until": (MOMENT, "Only messages accepted then or before."),
    "refused": (BOOLEAN, "Only messages of which some or all recipients were refused for good."),
    "order": (word("asc", "desc"), "desc: newest first."),
    "limit": (integer(1, LISTING_LIMIT), f"At most this many, 1 to {LISTING_LIMIT}; left out: all."),
    "after": (integer(0)._replace(json="string"), "Continue there: the `next` of an earlier answer."),
    **CONTENT,
}


def asked(query: Mapping[str, Sequence[str]], fields: QueryFields) -> dict[str, Any]:
    """The values of the fields that a query has; HttpError 400 names one that is bad. Others are ignored."""
    values = {}
    for name in fields.keys() & query.keys():
        kind, (given, *more) = fields[name][0], query[name]
        try:
            values[name] = fit(kind.parse(given), not more)
        except (ValueError, Rejected):
            wanted = "given only once" if more else kind.words
            raise HttpError(400, f"{name}: must be {wanted}", code="bad_field") from None
    return values


# ---------------------------------------------------------------------- openapi.json
#
# Made of the route table and the tables of fields; what is answered stands here, in the same notation
# of types: "string | integer[] | null", "'auto' | 'never'", Record[] (a named schema), integer{} (an object
# whose members are integers, by their names), time (Unix seconds); a name with ? need not be there.

ANSWERS: Mapping[str, str] = {
    "Done": "ok: boolean",
    "Problem": "ok: boolean, error: string, code: ProblemCode, detail?: string | object, rejected?: Rejection[]",
    "Health": "ok: boolean, status: string",
    "Status": (
        "ok: boolean, active: boolean, version: string, pending: integer, deferred: integer, in_delivery: integer, "
        "failed: integer, unreported: integer, oldest_pending_ts: time | null, suspended_batches: string[], "
        "accounts: AccountStatus{}, recent: TenSeconds[], node?: string, reporter?: string | null"
    ),
    "TenSeconds": "ts: time, accepted: integer, sent: integer, deferred: integer, failed: integer",
    "AccountStatus": (
        "state: 'up' | 'probing' | 'cooling' | 'limited' | 'suspended' | 'account not found', reason: string | null, "
        "since: time | null, until: time | null, connections: integer, pending: integer, limits_left?: integer{}, "
        "node?: string | null"
    ),
    "Submitted": "ok: boolean, queued: integer, rejected: Rejection[], known?: string[], warnings?: Warning[]",
    "Rejection": "id: string | null, reason: string, code: RejectionCode, field?: string",
    "Warning": "id: string, unknown: string[]",
    "Switched": "ok: boolean, active: boolean",
    "Removed": "ok: boolean, removed: integer, not_found: string[], in_delivery: string[]",
    "CleanedUp": "ok: boolean, removed: integer",
    "Retried": "ok: boolean, queued: integer, not_found: string[], not_failed: string[], account_not_found?: string[]",
    "Messages": "ok: boolean, messages: MessageRecord[], next: string | null",
    "MessageHistory": "ok: boolean, message: MessageRecord, attempts: Attempt[]",
    "MessageRecord": (
        f"id: string, account_id: string, priority: integer, status: {STATUS.json}, created_at: time, "
        "updated_at: time, deferred_ts: time | null, sent_ts: time | null, error_ts: time | null, "
        "error: string | null, reported_ts: time | null, batch_code: string | null, attempts: integer, "
        "message_id: string | null, recipients: RecipientOutcome{} | null, subject: string | null, message: object"
    ),
    "RecipientOutcome": "status: 'sent' | 'error' | 'deferred', code: integer, text: string",
    "Attempt": (
        "started_at: time, ended_at: time, outcome: string, stage: string | null, code: integer | null, "
        "enhanced_code: string | null, text: string | null, recipients: RecipientOutcome{} | null, "
        "connection: string | null"
    ),
    "Accounts": "ok: boolean, accounts: ShownAccount[]",
    "AccountSet": "ok: boolean, warnings?: Warning[]",
    "AccountRemoved": "ok: boolean, failed: integer",
}
WORDS: Mapping[str, Kind] = {
    "ProblemCode": word(*dict.fromkeys(("bad_json", "bad_field", "all_rejected", "busy", *PROBLEMS.values()))),
    "RejectionCode": word("missing_field", "invalid_field", *REJECTIONS.values()),
}
GIVEN: Mapping[str, Mapping[str, Field]] = {
    "Batch": {
        "messages": Field("Message[]", "Each is judged by itself.", required=True),
        "default_priority": Field(PRIORITY.json, "Priority of messages that do not name one."),
    },
    "Message": MESSAGE_FIELDS,
    "Attachment": ATTACHMENT_FIELDS,
    "S3Object": S3_FIELDS,
    "MessageIds": {"ids": Field("string[]", f"At most {MAX_IDS} ids.", required=True)},
    "WhichBatch": {"batch_code": Field("string", BATCH["batch_code"][1])},
    "Age": {"older_than_seconds": Field("integer", "Left out: the configured retention.")},
    "Account": ACCOUNT_FIELDS,
    "OAuth2": OAUTH2_FIELDS,
}


def json_schema(type_: str) -> dict[str, object]:
    """The JSON Schema (2020-12) of a type."""
    names = type_.split(" | ")
    words = [name.strip("'") for name in names if name.startswith("'")]
    schemas: list[dict[str, object]] = [{"type": "string", "enum": words}] if words else []
    for name in names:
        if name.endswith("[]"):
            schemas.append({"type": "array", "items": json_schema(name[:-2])})
        elif name.endswith("{}"):
            schemas.append({"type": "object", "additionalProperties": json_schema(name[:-2])})
        elif name[0].isupper():
            schemas.append({"$ref": f"#/components/schemas/{name}"})
        elif name == "time":
            schemas.append({"type": "integer", "description": "Unix seconds, UTC"})
        elif not name.startswith("'"):
            schemas.append({"type": name})
    if len(schemas) == 1:
        return schemas[0]
    if all(schema.keys() == {"type"} for schema in schemas):
        return {"type": [schema["type"] for schema in schemas]}
    return {"anyOf": schemas}


def named_schemas() -> dict[str, object]:
    """What the operations refer to: bodies, answers, and what is in them."""
    shown = {key: one._replace(required=False) for key, one in ACCOUNT_FIELDS.items() if key not in SECRET_FIELDS}
    shown["source"] = Field("'http' | 'config'", "Where it was defined.")
    schemas: dict[str, object] = {name: json_schema(kind.json) for name, kind in WORDS.items()}
    told: dict[str, Mapping[str, Field]] = {}
    for name, answer in ANSWERS.items():
        members = (member.split(": ") for member in answer.split(", "))
        told[name] = {key.rstrip("?"): Field(type_, "", not key.endswith("?")) for key, type_ in members}
    for name, fields in {**GIVEN, "ShownAccount": shown, **told}.items():
        properties = {}
        for key, (type_, words, is_required) in fields.items():  # null means left out, everywhere
            schema = json_schema(type_ if is_required or name in told else f"{type_} | null")
            properties[key] = {**schema, **({"description": words} if words else {})}
        required = [key for key, one in fields.items() if one.required]
        schemas[name] = {"type": "object", "properties": properties, "required": required}
    return schemas


def answered_as(type_: str, *content_types: str) -> dict[str, object]:
    """A body of this type."""
    return {"content": {one: {"schema": json_schema(type_)} for one in content_types or ("application/json",)}}


def operation_of(row: Route) -> dict[str, object]:
    """The Operation Object of OpenAPI 3.1 of a row of the route table. A body named with ? may be left out."""
    parameters: list[dict[str, object]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall("{(.+?)}", row.pattern)
    ]
    statuses = {400, 403, 408, 413, 431, 503, *row.refusals}
    statuses |= {status for status, may_be in ((401, not row.public), (404, parameters), (415, row.body)) if may_be}
    for name, (kind, words) in row.query.items():
        parameters.append({"name": name, "in": "query", "description": words, "schema": json_schema(kind.json)})
    content = answered_as(row.answer)
    if "/" in row.answer:  # the second is for generators that know no other
        content = answered_as("string", row.answer, *([] if "text/" in row.answer else ["application/octet-stream"]))
    responses = {"200": {"description": "done", **content}}
    for status in sorted(statuses):
        responses[str(status)] = {"description": http.client.responses[status], **answered_as("Problem")}
    operation: dict[str, object] = {
        "operationId": row.handler.__name__,
        "summary": (row.handler.__doc__ or "").partition("\n")[0].rstrip("."),
        "parameters": parameters,
        "responses": responses,
    }
    if row.body:
        operation["requestBody"] = {"required": not row.body.endswith("?"), **answered_as(row.body.rstrip("?"))}
    if row.public:
        operation["security"] = []
    return operation


# A batch: what to store, the entries of `rejected`, and by id the fields that mean nothing.
Judged = tuple[list[Submission], list[dict[str, object]], dict[str, Sequence[str]]]


@dataclass(slots=True, eq=False, repr=False)
class ControlPlane:
    """The handlers of the route table: their names and docstrings are those of openapi.json. Accounts change one at a
    time, on disk before it is in force: what the storage refuses has changed nothing."""

    queue: Queue
    clock: Clock
    in_thread: InThread
    metrics: Metrics
    log: logging.Logger
    leases: Leases
    dispatcher: Dispatcher
    reporter: Reporter
    settings: Callable[[], Settings]
    waits: str = ""  # why it has not begun: the database has not answered since the start
    _configured: Sequence[Account] = ()
    _known: Known | None = None  # what the lanes go by
    _wrote_at: float = -math.inf  # for a look whether the storage answers
    _one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    def routes(self) -> tuple[Route, ...]:
        return (
            Route("GET", "/", self.show_console, public=True, answer="text/html"),
            Route("GET", "/health", self.check_health, public=True, answer="Health"),
            Route("GET", "/ready", self.check_ready, public=True, answer="Done"),
            Route("GET", "/status", self.get_status, answer="Status"),
            Route("GET", "/metrics", self.get_metrics, answer="text/plain"),
            Route("GET", "/openapi.json", self.get_openapi, answer="object"),
            Route("POST", "/commands/add-messages", self.submit_messages, answer="Submitted", body="Batch"),
            Route("POST", "/commands/run-now", self.run_now, answer="Done"),
            Route("POST", "/commands/suspend", self.suspend, answer="Switched", body="WhichBatch?", query=BATCH),
            Route("POST", "/commands/activate", self.activate, answer="Switched", body="WhichBatch?", query=BATCH),
            Route("POST", "/commands/delete-messages", self.delete_messages, answer="Removed", body="MessageIds"),
            Route("POST", "/commands/cleanup-messages", self.cleanup_messages, answer="CleanedUp", body="Age?"),
            Route("POST", "/commands/retry-messages", self.retry_messages, answer="Retried", body="MessageIds"),
            Route("GET", "/messages", self.list_messages, answer="Messages", query=LISTING),
            Route("GET", "/message/{id}", self.get_message, answer="MessageHistory", query=CONTENT),
            Route("GET", "/message/{id}/eml", self.get_eml, answer="message/rfc822", refusals=[502]),
            Route("GET", "/accounts", self.list_accounts, answer="Accounts"),
            Route("POST", "/account", self.put_account, answer="AccountSet", body="Account", refusals=[409]),
            Route("DELETE", "/account/{id}", self.delete_account, answer="AccountRemoved", refusals=[409]),
            Route("POST", "/account/{id}/suspend", self.suspend_account, answer="Switched"),
            Route("POST", "/account/{id}/activate", self.activate_account, answer="Switched"),
        )

    async def show_console(self, request: Request) -> Response:
        """Show the console, a page for a browser."""
        return console_answer()

    async def check_health(self, request: Request) -> Response:
        """Check liveness; touches no storage."""
        return json_response({"ok": True, "status": "ok"})

    async def check_ready(self, request: Request) -> Response:
        """Check readiness: the storage answers, both loops run."""
        ensure(not self.waits, 503, self.waits)
        if problem := self.stalled_loop():
            raise HttpError(503, problem, code="internal")
        # Anybody may ask, so it is tried once a second at most.
        if self.queue.file.refuses or self.clock.monotonic() >= self._wrote_at + 1:
            try:
                async with asyncio.timeout(LOOP_PATIENCE_S):
                    await self.queue.answers()
                self._wrote_at = self.clock.monotonic()
            except TimeoutError:
                raise HttpError(503, "the queue does not answer") from None
        ensure(not self.leases.buried, 503, "the lease of this node is over")
        return json_response({"ok": True})

    def stalled_loop(self) -> str | None:
        """Which loop does not turn, in a sentence, or None."""
        now, settings = self.clock.monotonic(), self.settings()
        if now - self.dispatcher.turned_at > settings.delivery.send_interval_seconds + LOOP_PATIENCE_S:
            return "the dispatch loop is stalled"
        if now - self.reporter.turned_at > settings.client.timeout_seconds + REPORTER_SLEEP_S + LOOP_PATIENCE_S:
            return "the report loop is stalled"
        return None

    async def get_status(self, request: Request) -> Response:
        """Show what waits, and the state of each account."""
        tallies, oldest_ts, failed = await self.queue.tallies()
        pending = collections.Counter({id_: tally.ready + tally.waiting for id_, tally in tallies.items()})
        shown, of_all, recent = await self.leases.everywhere()
        nobody, lanes = {"node": None} if of_all else {}, self.dispatcher.lanes.items()
        accounts = {id_: {**lane.status(), "pending": pending[id_], **shown.get(id_, nobody)} for id_, lane in lanes}
        for id_, waiting in pending.items():
            if waiting and id_ not in accounts:  # for its account to come back
                gone = {"state": NOT_FOUND, "reason": NOT_FOUND, "since": None, "until": None}
                accounts[id_] = {**gone, "connections": 0, "pending": waiting}
        status = {
            "ok": True,
            "active": self.dispatcher.active,
            "version": __version__,
            "pending": sum(pending.values()),
            "deferred": sum(tally.waiting for tally in tallies.values()),
            "in_delivery": self.queue.in_delivery,
            "failed": failed,
            "unreported": sum(tally.unreported for tally in tallies.values()),
            "oldest_pending_ts": oldest_ts,
            "suspended_batches": sorted(self.queue.suspended_batches),
            "accounts": accounts,
            "recent": self.metrics.recent.columns(recent),
        }
        return json_response({**status, **of_all})

    async def get_metrics(self, request: Request) -> Response:
        """Show metrics for Prometheus."""
        tallies, oldest, _ = await self.queue.tallies()
        metrics, (_, of_all, _) = self.metrics, await self.leases.everywhere()
        metrics.messages_pending.set(sum(tally.ready + tally.waiting for tally in tallies.values()))
        metrics.messages_in_delivery.set(of_all.get("in_delivery", self.queue.in_delivery))
        metrics.oldest_pending_seconds.set(0 if oldest is None else max(0.0, self.clock.wall() - oldest))
        metrics.reports_unacknowledged.set(sum(tally.unreported for tally in tallies.values()))
        metrics.scheduler_active.set(self.dispatcher.active)
        node = [self.leases.node] if self.leases.node else []
        for gauge in (metrics.account_up, metrics.smtp_connections):
            gauge.clear()  # other nodes may have some of the lanes by now
        for account_id, lane in self.dispatcher.lanes.items():
            if lane.mine:
                metrics.account_up.labels(account_id, *node).set(lane.state not in IN_TROUBLE)
                metrics.smtp_connections.labels(account_id, "busy", *node).set(lane.busy)
                metrics.smtp_connections.labels(account_id, "idle", *node).set(max(0, len(lane.sessions) - lane.busy))
        return Response(200, await self.in_thread(metrics.exposition), "text/plain; version=0.0.4; charset=utf-8")

    async def get_openapi(self, request: Request) -> Response:
        """Describe the HTTP interface (this document)."""
        paths: dict[str, dict[str, object]] = {}
        for row in self.routes():
            paths.setdefault(row.pattern, {})[row.method.lower()] = operation_of(row)
        description = (
            "Mail is submitted as JSON, queued, delivered by SMTP and reported. Null means left out. "
            "HEAD works where GET does. Every answer has an X-Request-Id, which is in the log lines of its request."
        )
        schemes = {
            "ApiToken": {"type": "apiKey", "in": "header", "name": "X-API-Token"},
            "Bearer": {"type": "http", "scheme": "bearer"},
        }
        info = {"title": "mailproxy", "version": __version__, "description": description}
        components = {"schemas": named_schemas(), "securitySchemes": schemes}
        document = {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}
        return json_response({**document, "security": [{name: []} for name in schemes]})

    async def submit_messages(self, request: Request) -> Response:
        """Submit messages; each is judged by itself, and what is accepted is on disk."""
        fields, settings = await request.json_object(judged="messages"), self.settings()
        messages, priority = fields.get("messages"), fields.get("default_priority")
        if not isinstance(messages, list):
            raise HttpError(400, "messages: must be a list of messages", code="bad_field")
        if len(messages) > (most := settings.server.max_batch):
            raise HttpError(413, f"messages: at most {most} in one batch, not {len(messages)}")
        default = settings.delivery.default_priority
        default = default if priority is None else judged(PRIORITY, priority, "default_priority")
        if len(request.body) <= JSON_AT_ONCE_BYTES:
            good, rejected, unknown = self._judge(messages, default)
        else:
            request.body = b""
            good, rejected, unknown = await self.in_thread(functools.partial(self._judge, messages, default))
        del fields, messages  # they may be large
        queued, known = await self.store(good, rejected)
        if not (rejected or known or unknown):
            return Response(200, b'{"ok": true, "queued": %d, "rejected": []}\n' % queued)  # the usual one
        if rejected and not (queued or known):
            detail = {"error": ALL_REJECTED, "rejected": rejected}
            raise HttpError(400, ALL_REJECTED, code="all_rejected", rejected=rejected, detail=detail)
        answer = {"ok": True, "queued": queued, "rejected": rejected, **({"known": known} if known else {})}
        refused = {entry["id"] for entry in rejected if entry["reason"] != TWICE} if unknown else ()
        warnings = [{"id": id_, "unknown": names} for id_, names in unknown.items() if id_ not in refused]
        return json_response({**answer, **({"warnings": warnings} if warnings else {})})

    async def store(self, judged: Sequence[Submission], rejected: list[dict[str, object]]) -> tuple[int, list[str]]:
        """Store what was judged, and tell everybody; return how many are queued, and the ids that are known."""
        lanes = self.dispatcher.lanes  # an account may be gone meanwhile
        judged = [one if one.account_id in lanes or one.flaw else one._replace(flaw=NOT_FOUND) for one in judged]
        if missing := {one.account_id for one in judged if one.flaw == NOT_FOUND}:
            await self._look_for(missing)
            for number, one in enumerate(judged):
                if one.flaw == NOT_FOUND and (account := self._account(one.account_id)):
                    judged[number] = one._replace(flaw=None, once=account.in_doubt == "error")
        accepted, known = [], []
        for one, verdict in zip(judged, await self.queue.accept(judged) if judged else (), strict=True):
            if verdict is None:
                accepted.append(one)
            elif verdict == KNOWN:
                known.append(one.id)
            else:
                rejected.append(rejection(one.id, verdict))
        if any(one.once for one in accepted):  # one that failed may have ended again
            self.reporter.ring()
        by_account = collections.Counter([one.account_id for one in accepted])
        for account_id, number in by_account.items():
            self.metrics.accepted(self.metrics.label(account_id)).inc(number)
            self.metrics.recent.count("accepted", number)
        if by_account:
            self.dispatcher.wake(by_account)
        level = logging.INFO if self.dispatcher.log_deliveries else logging.DEBUG
        if self.log.isEnabledFor(level):
            for one in accepted:
                event(self.log, level, "message accepted", message=one.id, account=one.account_id)
            for id_ in known:
                event(self.log, level, "message known", message=id_)
        for entry in rejected:
            self.metrics.messages_rejected.inc()
            event(self.log, logging.WARNING, "message rejected", message=entry["id"], reason=entry["reason"])
        return len(accepted), known

    async def submit_mail(self, mail: SmtpMail, host: str) -> str:
        """Submit what came by SMTP; the reply to its end of data, said when it is on disk."""

        def judged_mail() -> tuple[str, Judged]:
            fields = mail.submission(self.dispatcher.lanes, host)
            return fields["id"], self._judge([fields], self.settings().delivery.default_priority)

        is_small = len(mail.content) <= JSON_AT_ONCE_BYTES
        id_, (good, rejected, _) = judged_mail() if is_small else await self.in_thread(judged_mail)
        await self.store(good, rejected)
        return reply_to_submission(id_, rejected[0]["reason"] if rejected else None)

    def _judge(self, messages: Sequence[object], default_priority: int) -> Judged:
        """Each message as it is to be stored, or the reason why not; of an id only the first can be taken."""
        now = self.clock.wall()
        good: list[Submission] = []
        rejected: list[dict[str, object]] = []
        unknown: dict[str, Sequence[str]] = {}
        seen = set[object]()
        for given in messages:
            id_ = given.get("id") if isinstance(given, dict) else None
            try:
                if isinstance(id_, str) and id_ in seen:
                    raise Rejected(TWICE)
                message = parse_message(given, default_priority=default_priority)
                good.append(submission_of(given, message, self._account(message.account_id), now))
                if message.unknown:
                    unknown[message.id] = message.unknown
            except Rejected as error:
                rejected.append(rejection(id_, str(error)))
                id_ = rejected[-1]["id"]
            except Exception as error:  # a bug of ours must not spoil the batch
                event(self.log, logging.ERROR, "internal error in a submission", message=id_, exc_info=error)
                rejected.append(rejection(id_, "invalid message: it could not be understood"))
            seen.add(id_)
        return good, rejected, unknown

    async def run_now(self, request: Request) -> Response:
        """Deliver and report at once."""
        await request.json_object()  # no field is known, but a bad body is told
        self.reporter.run_now()
        self.dispatcher.run_now()
        if self.leases.node:
            async with self._one_at_a_time:
                await self._tell_nodes("run_now")
        return json_response({"ok": True})

    async def suspend(self, request: Request) -> Response:
        """Suspend delivery, or that of a batch, also over a restart; submission and reporting go on."""
        return await self._switch(request, active=False)

    async def activate(self, request: Request) -> Response:
        """Resume delivery, or that of a batch."""
        return await self._switch(request, active=True)

    async def suspend_account(self, request: Request) -> Response:
        """Suspend delivery through an account, also over a restart."""
        return await self._switch(request, active=False)

    async def activate_account(self, request: Request) -> Response:
        """Resume delivery through an account, at once."""
        return await self._switch(request, active=True)

    async def _switch(self, request: Request, *, active: bool) -> Response:
        """A batch is named in the query or in the body, an account in the path."""
        fields, account_id = await request.json_object(), request.parameters.get("id")
        named, batch_code, dispatcher = [*request.query.get("batch_code", ())], None, self.dispatcher
        if (given := fields.get("batch_code")) is not None:
            named.append(given if isinstance(given, str) else "")
        if named and account_id is None:
            batch_code = asked({"batch_code": named}, BATCH)["batch_code"]
        if account_id is not None:
            await self._look_for({account_id})
        async with self._one_at_a_time:
            if batch_code is not None:
                if active:
                    await self.queue.activate_batch(batch_code)
                    dispatcher.wake(dispatcher.lanes)
                elif await self.queue.suspend_batch(batch_code):
                    dispatcher.recall()
            elif account_id is not None:
                ensure(self._account(account_id), 404, NO_ACCOUNT)
                await (self.queue.activate if active else self.queue.suspend)(account_id)
                dispatcher.switch_lane(account_id, active=active)
            else:
                await self.queue.set_switch("active", active)
                dispatcher.switch(active=active)
            await self._tell_nodes(f"renew {account_id}" if account_id and active else "")
        what = "delivery activated" if active else "delivery suspended"
        event(self.log, logging.INFO, what, account=account_id, batch=batch_code)
        return json_response({"ok": True, "active": active})

    async def delete_messages(self, request: Request) -> Response:
        """Remove messages, but for those on the wire."""
        removed, not_found, on_wire = await self.queue.delete(ids_of(await request.json_object()))
        event(self.log, logging.INFO, "messages deleted", messages=removed)
        return json_response({"ok": True, "removed": removed, "not_found": not_found, "in_delivery": on_wire})

    async def retry_messages(self, request: Request) -> Response:
        """Queue failed messages again."""
        ids = ids_of(await request.json_object())
        await self._look_for()
        queued, not_found, not_failed, of_no_account = await self.queue.retry(ids, self.dispatcher.lanes.keys())
        self.dispatcher.wake(self.dispatcher.lanes)
        self.reporter.ring()
        event(self.log, logging.INFO, "failed messages queued again", messages=queued)
        answer = {"ok": True, "queued": queued, "not_found": not_found, "not_failed": not_failed}
        return json_response(answer | ({"account_not_found": of_no_account} if of_no_account else {}))

    async def cleanup_messages(self, request: Request) -> Response:
        """Remove final messages that were reported (without an upstream: final) longer ago than that."""
        age_s = (await request.json_object()).get("older_than_seconds")
        if age_s is None:
            age_s = self.settings().delivery.delivery_report_retention_seconds
        if type(age_s) is not int or not 0 <= age_s < 2**53:
            raise HttpError(400, "older_than_seconds: must be a whole number of seconds, 0 or more", code="bad_field")
        removed = 0
        nobody_asks = self.reporter.client.client_sync_url is None
        while some := await self.queue.purge(age_s, unreported_too=nobody_asks):
            removed += some
        event(self.log, logging.INFO, "messages cleaned up", messages=removed)
        return json_response({"ok": True, "removed": removed})

    async def list_messages(self, request: Request) -> Response:
        """List messages in order of acceptance."""
        return Response(200, self._listing(**asked(request.query, LISTING)))

    async def _listing(
        self, *, after: int | None = None, limit: float = math.inf, content: bool = False, **chosen: Any
    ) -> AsyncGenerator[bytes, None]:
        """The answer piece by piece: one page of rows in memory, however many there are."""
        before, shown, last = b'{"ok": true, "messages": [', 0, 0
        ends_at = math.inf if limit == math.inf else self.clock.monotonic() + LISTING_PATIENCE_S
        while True:
            most = 1 if content else int(min(200, limit - shown + 1))  # one more shows whether it goes on
            records, after = await self.queue.page(after, most, **chosen)
            for record in records:
                if shown == limit:
                    yield b'], "next": "%d"}\n' % last
                    return
                yield before + await self._shown(record, content)
                before, shown, last = b",\n", shown + 1, record.seq
            if after is None or (not records and self.clock.monotonic() >= ends_at):
                break
            if not records:
                await asyncio.sleep(PAUSE_S)  # most of the time is for others
        yield (b"" if shown else before) + b'], "next": %b}\n' % (b"null" if after is None else b'"%d"' % after)

    async def _shown(self, record: Record, with_contents: bool) -> bytes:
        """A message as JSON, with its contents as it was submitted; a large one is put together in a thread."""
        contents = await self.queue.contents(record.seq) if with_contents else {}

        def shown() -> bytes:
            message = restored_fields(record.payload, contents)
            return as_json({**record.fields, "message": message}).encode()

        return shown() if record.size_bytes <= JSON_AT_ONCE_BYTES else await self.in_thread(shown)

    async def get_message(self, request: Request) -> Response:
        """Show a message and the timeline of its attempts."""
        with_contents = asked(request.query, CONTENT).get("content", False)
        found = await self.queue.look_up(request.parameters["id"])
        if found is None:
            raise HttpError(404, NO_MESSAGE)
        record, attempts = found
        shown = await self._shown(record, with_contents)
        return Response(200, b'{"ok": true, "message": %b, "attempts": %b}\n' % (shown, as_json(attempts).encode()))

    async def get_eml(self, request: Request) -> Response:
        """Show a message as it goes on the wire; what has to be fetched is fetched now."""
        claim = await self.queue.as_claim(request.parameters["id"])
        if claim is None:
            raise HttpError(404, NO_MESSAGE)
        return Response(200, self._eml(claim), "message/rfc822")

    async def _eml(self, claim: Claim) -> AsyncGenerator[bytes, None]:
        """The pieces of a message; its share of the memory is given back when the client has them."""
        composed = await self.dispatcher.put_together(self, claim)
        if isinstance(composed, Reply):
            raise HttpError(502, spoken(composed), code="attachment_unavailable")
        try:
            for start in range(0, len(composed.content), JSON_AT_ONCE_BYTES):
                yield composed.content[start : start + JSON_AT_ONCE_BYTES]
        finally:
            self.dispatcher.memory.give_back(self, composed.memory_bytes)

    async def list_accounts(self, request: Request) -> Response:
        """List accounts, without their secrets."""
        with contextlib.suppress(StorageUnavailable):
            await self._look_for()
        accounts = [account_fields(lane.account) for lane in self.dispatcher.lanes.values()]
        return json_response({"ok": True, "accounts": accounts})

    async def put_account(self, request: Request) -> Response:
        """Add or replace an account."""
        fields = await request.json_object()
        account = parse_account(fields, defaults=self.settings().delivery)
        definition = {key: fields[key] for key in sorted(ACCOUNT_KEYS) if fields.get(key) is not None}
        async with self._one_at_a_time:
            self._refuse_configured(account.id)
            standing = await self.queue.standing(account.id)
            await self.queue.put_account(account.id, as_json(definition))
            if account.id in self.dispatcher.lanes:
                self.dispatcher.replace_account(account)
            else:
                self.dispatcher.add_lane(account, standing)
            await self._tell_nodes(f"renew {account.id}", {account.id: as_json(definition)})
        event(self.log, logging.INFO, "account set", account=account.id)
        unknown = [key for key, value in fields.items() if key not in ACCOUNT_KEYS and value is not None]
        warnings = {"warnings": [{"id": account.id, "unknown": unknown}]} if unknown else {}
        return json_response({"ok": True, **warnings})

    async def delete_account(self, request: Request) -> Response:
        """Remove an account; its undelivered messages become errors."""
        # Should the storage refuse in between, the account is gone and the same call again ends the rest of them.
        account_id = request.parameters["id"]
        await self._look_for({account_id})
        async with self._one_at_a_time:
            self._refuse_configured(account_id)
            known = account_id in self.dispatcher.lanes
            if known:
                await self.queue.delete_account(account_id)
                self.dispatcher.remove_lane(account_id)
                await self._tell_nodes("", {account_id: ""})
            ended = await self._fail_orphans(account_id)
        ensure(known or ended, 404, NO_ACCOUNT)
        failed = sum(how.status is Status.ERROR for how in ended)
        event(self.log, logging.INFO, "account deleted", account=account_id, failed=failed)
        return json_response({"ok": True, "failed": failed})

    async def _fail_orphans(self, account_id: str) -> list[Disposition]:
        """End the undelivered messages of a deleted account."""
        ended = await self.queue.fail_orphans(account_id, "account deleted")
        for how in ended:
            self.metrics.count_ended(self.metrics.label(account_id), how)
        self.reporter.ring()
        return ended

    async def take_over(self, configured: Sequence[Account] | None = None) -> None:
        """Go by what config.ini says, and by what the queue does, which other nodes may have changed. The accounts of
        config.ini, where they were read again, win over those of HTTP; mail of one that is gone stays."""
        async with self._one_at_a_time:
            dispatcher = self.dispatcher
            said = await self.queue.known()
            known = self._known or said._replace(definitions={})
            if configured is not None:  # then all are looked at
                self._configured, self.leases.accounts = configured, digests_of(configured)
                self._known = known = known._replace(definitions={})
            new = {id_: one for id_, one in said.definitions.items() if one != known.definitions.get(id_)}
            stored = stored_accounts(new, self.settings().delivery, functools.partial(event, self.log, logging.ERROR))
            wanted = {account.id: account for account in (*stored, *self._configured)}
            for account_id in dispatcher.lanes.keys() - wanted.keys() - said.definitions.keys():
                if dispatcher.remove_lane(account_id).deleted:  # through another node, and mail was accepted since
                    await self._fail_orphans(account_id)
            for account in wanted.values():
                if account.id not in dispatcher.lanes:
                    dispatcher.add_lane(account, await self.queue.standing(account.id))
                elif account != self._account(account.id):
                    await self.queue.let_go([account.id])
                    dispatcher.replace_account(account)
            commands = {name for name, number in said.switches.items() if number > known.switches.get(name, 0)}
            for id_, lane in dispatcher.lanes.items():
                if (lane.state is LaneState.SUSPENDED) is not (id_ in said.suspended) or f"renew {id_}" in commands:
                    dispatcher.switch_lane(id_, active=id_ not in said.suspended)
            if said.batches != known.batches:
                dispatcher.recall()
            dispatcher.switch(active=bool(said.switches.get("active", dispatcher.active)))
            if "run_now" in commands:
                self.reporter.run_now()
                dispatcher.run_now()
            self._known, dispatcher.switches = said, said.switches  # now that all is taken over

    async def follow(self) -> None:
        """Several machines: do what each look at the tables shows."""
        leases, told, changes = self.leases, set[tuple[str, str]](), -1
        while True:
            look = await leases.look()  # who put a row off goes first, if it is still there
            self.queue.next_ts = min(self.queue.next_ts, look.due_ts + 1)
            self.dispatcher.wake(set(look.waiting).difference(look.elsewhere))
            if look.unreported or REPORTER not in look.elsewhere:
                self.reporter.ring()
            for account_id, node in sorted(leases.differing() - told):
                what = "an account of config.ini differs from that of another node"
                event(self.log, logging.WARNING, what, account=account_id, node=node)
            told = leases.differing()
            if look.changes != changes:
                with contextlib.suppress(StorageUnavailable):  # the next look is soon
                    await self.take_over()
                    changes = look.changes

    async def _tell_nodes(self, command: str = "", definitions: Mapping[str, str] = MappingProxyType({})) -> None:
        """Have other nodes take over what was changed, and do the same: run_now, or try the server of an account now.
        Definitions of accounts are what they are here by now."""
        if self.leases.node and self._known:
            self._known.definitions.update(definitions)
            if command:
                self._known.switches[command] = await self.queue.count(command)
            self.leases.ring(tell=True)

    def _account(self, account_id: str) -> Account | None:
        lane = self.dispatcher.lanes.get(account_id)
        return lane.account if lane else None

    async def _look_for(self, account_ids: set[str] | None = None) -> None:
        """Several machines: those that are not known here (None: any) may have been added through another node just now."""
        if self.leases.node and (account_ids is None or not account_ids <= self.dispatcher.lanes.keys()):
            await self.take_over()

    def _refuse_configured(self, account_id: str) -> None:
        account = self._account(account_id)
        if account is not None and account.source == "config":
            section = section_of(account_id)
            raise HttpError(409, f"this account comes from config.ini, section [{section}]; change it there")


def rejection(id_: str | None, reason: str) -> dict[str, object]:
    """An entry of `rejected`: for programs, a code beside the reason, and the field that is meant. An id that is no
    usable one is not shown."""
    if code := REJECTIONS.get(reason):
        field = {TWICE: "id", NOT_FOUND: "account_id"}.get(reason)
    else:
        kind, _, name = reason.partition(":")[0].partition(" ")
        code, field, id_ = f"{kind}_field", None if name == "message" else name, None if name == "id" else id_
    return {"id": id_, "reason": reason, "code": code, **({"field": field} if field else {})}


def submission_of(fields: Any, message: Message, account: Account | None, now: float) -> Submission:
    """A judged message as the queue stores it; one that is too late, or whose account is not there, may be known."""
    flaw = None
    if message.expires_ts is not None and message.expires_ts <= now:
        flaw = "invalid expires_ts: lies in the past"
    elif account is None:
        flaw = NO_DEFAULT if message.account_id == "default" else NOT_FOUND
    payload, contents = stored_form(fields, message)
    recipients = message.recipients
    subject = message.subject if message.raw is None else subject_of_raw(message.raw)
    bare, settled = fields.get("message_id"), message.message_id  # shown as the client wrote it, else in brackets
    as_given = not settled or (isinstance(bare, str) and bare.strip() == settled)
    return Submission(
        id=message.id,
        account_id=message.account_id,
        priority=message.priority,
        deferred_ts=message.deferred_ts,
        expires_ts=message.expires_ts,
        batch_code=message.batch_code,
        message_id=settled if as_given else f"<{settled}>",
        parts=len(message.attachments) + (message.raw is not None),
        addressees=len(recipients),
        sought=sought(recipients, subject),
        subject=subject if message.raw is not None or subject != fields["subject"] else None,
        payload=payload,
        contents=contents,
        flaw=flaw,
        once=account is not None and account.in_doubt == "error",
    )


def ids_of(fields: Mapping[str, object]) -> list[str]:
    """The messages that a command names, each once."""
    ids = fields.get("ids")
    if not isinstance(ids, list) or not all(isinstance(id_, str) for id_ in ids):
        raise HttpError(400, "ids: must be a list of message ids", code="bad_field")
    ensure(len(ids) <= MAX_IDS, 413, f"ids: at most {MAX_IDS} in one call")
    return list(dict.fromkeys(ids))


# ======================================================================
# DAEMON - builds the rooms, starts the loops, drains and stops them
# ======================================================================
#
# The composition root: the one place that knows all rooms. A loop that dies takes the daemon down with it, loudly,
# because nobody would notice a daemon that answers and delivers nothing.

WORK_THREADS = 4
OTHER_CALLS = 64  # that wait for the network: reports, look-ups of names, tokens
OPEN_FILES = 65_536  # wanted; what the machine allows counts
HTTP_SHARE = 4  # one in so many of them, at most
SPOOL_PAUSE_S = 2.0  # between two looks into it
SPOOL_FILES = 1000  # files of one look


class SystemdNotifier:
    """Tells systemd how we are (sd_notify(3)); silent when nobody listens."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        usec = environ.get("WATCHDOG_USEC", "")
        mine = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        # A quarter of the time there is: one word that is skipped does not end a healthy daemon.
        self.watchdog_interval_s = int(usec) / 4_000_000 if usec.isdecimal() and mine else None

    def tell(self, state: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(1)
            sender.sendto(state.encode(), self._address)


def spooled_files(spool: str) -> list[str]:
    """The oldest files in the spool; a dot begins the name of what is not whole, or set aside. Blocking: OSError."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(spool)
        os.chmod(spool, 0o1733)  # whatever the umask
    with os.scandir(spool) as entries:
        return sorted(itertools.islice((entry.path for entry in entries if entry.name[0] != "."), SPOOL_FILES))


def spooled_content(path: str, most_bytes: int) -> bytes:
    """A file of a directory that all may write to: links are not followed. Blocking. Raises OSError, Rejected."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1 or about.st_size > most_bytes:
            raise Rejected(f"is not a regular file with one name and at most {most_bytes} bytes (max_body_bytes)")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(most_bytes)
    finally:
        os.close(descriptor)


def post_form(url: str, fields: Mapping[str, str], timeout_s: float) -> tuple[int, bytes]:
    """POST a form to a token endpoint (RFC 6749 3.2); redirects are not followed. Blocking."""
    headers = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
    body = urllib.parse.urlencode(fields).encode()
    answer = http_request("POST", url, body=body, headers=headers, timeout_s=timeout_s, max_bytes=ANSWER_BYTES)
    return answer.status, answer.body


async def delivery_agent(environ: Mapping[str, str], in_thread: InThread) -> DeliveryAgent:
    """Who opens SMTP sessions; `in_thread` is for calls that wait for the network."""
    hostname = ""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2):
            hostname = await in_thread(full_host_name)
    revealed = functools.partial(reveal, environ=environ)
    return DeliveryAgent(hostname=hostname, reveal=revealed, in_thread=in_thread, post_form=post_form)


class Daemon:
    """One mailproxy: a queue file, its loops, its HTTP side."""

    def __init__(
        self, settings: Settings, environ: Mapping[str, str], *, reload: Callable[[], Settings] | None = None
    ) -> None:
        self.settings = settings
        self._environ = environ
        self._reveal = functools.partial(reveal, environ=environ)
        self._reload = reload
        self._log = logging.getLogger("mailproxy")
        self._clock = Clock(time.time, time.monotonic)
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._asked_to_renew = asyncio.Event()
        self._systemd = SystemdNotifier(environ)
        node = settings.storage.node or f"{socket.gethostname()}-{os.getpid()}"
        self._node = node if is_database(settings.storage.db_path) else None
        self._metrics = Metrics(__version__, self._clock.wall, self._node)
        self._pools = [  # a look-up or a file server that hangs keeps a thread, and must hold up nobody else
            concurrent.futures.ThreadPoolExecutor(FETCHES + OTHER_CALLS, "network"),
            concurrent.futures.ThreadPoolExecutor(WORK_THREADS, "work"),
        ]
        self._network, self._work = InThread(self._pools[0]), InThread(self._pools[1], computes=True)
        self._tokens: tuple[bytes, ...] = ()
        took, refused = self._metrics.storage_commit_seconds.observe, self._metrics.storage_commit_failures.inc
        file = queue_file(settings.storage.db_path, environ, observe_commit=took, observe_refusal=refused)
        self._queue = Queue(file, now=self._clock.wall)

    # -- the life of it

    async def run(self, *, started: Callable[[str], None] = lambda url: None, signals: bool = True) -> int:
        """Serve until stop() or a signal; return the exit status. Raises ConfigurationError when it cannot start."""
        self._tokens = tuple(token.encode() for token in api_tokens(self.settings, self._environ))
        loop = asyncio.get_running_loop()
        loop.set_default_executor(self._pools[0])  # asyncio looks up names there
        if signals:
            loop.add_signal_handler(signal.SIGTERM, self.stop)
            loop.add_signal_handler(signal.SIGINT, self.stop)
            loop.add_signal_handler(signal.SIGHUP, self._asked_to_renew.set)
        try:
            await self._build()
            await self._begin()
            status = await self._serve(await self._listen(), started)
        finally:
            await self._queue.file.close()
            loop.set_default_executor(concurrent.futures.ThreadPoolExecutor())  # the loop waits for this one at its end
            for pool in self._pools:
                pool.shutdown(wait=False, cancel_futures=True)
        event(self._log, logging.INFO, "stopped", status=status)
        return status

    def stop(self) -> None:
        """Finish what is on the wire and end; asked a second time: end at once."""
        if self._stopping.is_set():
            self._hurry.set()
        self._stopping.set()

    async def _begin(self) -> None:
        """Open the queue, and take up what was left in it, unless its database is away: then it is to be tried again."""
        configured, waited = configured_accounts(self.settings), self._control.waits
        try:
            await self._network(self._queue.file.open)
            await self._queue.load()
            await self._control.take_over(configured)
            await self._leases.enter()
            self._control.waits = ""
        except StorageUnavailable as error:
            if self._node is None:
                raise ConfigurationError(str(error)) from None
            self._control.waits = str(error)
            if not waited:
                event(self._log, logging.WARNING, "the database is waited for", error=str(error))

    async def _build(self) -> None:
        settings, queue = self.settings, self._queue
        self._leases = Leases(queue.file, self._node, lambda: self.settings.delivery.send_interval_seconds, self._log)
        memory_bytes = settings.attachments.memory_budget_bytes
        self._agent = await delivery_agent(self._environ, self._network)
        common = (queue, self._clock, self._work, self._metrics, self._log)
        self._reporter = Reporter(
            *common, settings.client, settings.delivery, self._call_upstream, lambda: self._dispatcher.busy,
            leases=self._leases,
        )  # fmt: skip
        self._dispatcher = Dispatcher(
            *common,
            settings.delivery,
            self._fetcher(),
            jitter=lambda: random.uniform(-1, 1),
            open_session=self._agent.open_session,
            memory=Shares(memory_bytes, small=memory_bytes // SMALL_PART),
            reports_due=self._reporter.ring,
            active=settings.scheduler.active,
            log_deliveries=settings.logging.delivery_activity,
            leases=self._leases,
        )
        queue.file.meanwhile = self._dispatcher.compose_ahead
        self._control = ControlPlane(*common, self._leases, self._dispatcher, self._reporter, lambda: self.settings)
        lanes, recent = self._dispatcher.lanes, self._metrics.recent
        self._leases.shown = lambda: {
            **{id_: lane.status() for id_, lane in lanes.items() if lane.mine}, REPORTER: recent.counts,
        }  # fmt: skip

    async def _listen(self) -> str:
        """Open the HTTP side; return where it is, as a URL."""
        server, routes = self.settings.server, self._control.routes()
        limits = server._replace(max_connections=self._most_clients())
        http_server = functools.partial(
            HttpServer, observe=self._observe_request, in_thread=self._work, log_failure=self._log_failure
        )
        self._http = http_server(routes, limits=limits, admit=self._admit)
        submission = [row for row in routes if row.pattern == "/commands/add-messages"]
        fewer = limits._replace(max_connections=math.ceil(limits.max_connections / 10))
        self._local = http_server(submission, limits=fewer, admit=lambda request, is_public: None)
        place = server.unix_socket or f"{server.host}:{server.port}"
        try:
            if server.unix_socket is not None:
                await self._http.start_unix(server.unix_socket)
                where = f"unix:{place}"
            else:
                context = server_tls_context(server)
                (host, port), *_ = await self._http.start_tcp(server.host, server.port, context)
                where = f"{'https' if context else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"
            if server.submit_socket is not None:
                place = server.submit_socket
                await self._local.start_unix(place, 0o666)
                event(self._log, logging.INFO, "any local user may submit", at=f"unix:{place}")
            place = self.settings.submission.listen or ""
            await self._listen_for_smtp(place)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {place}: {error.strerror or error}; choose another address or port"
            ) from error
        return where

    async def _listen_for_smtp(self, place: str) -> None:
        """Open the submission server, where one is wanted."""
        settings, submission = self.settings, self.settings.submission
        host, port = place.rpartition(":")[0].strip("[]"), place.rpartition(":")[2]
        names = await self._network(lambda: local_names(settings.sendmail))
        self._smtp = SmtpServer(
            take=functools.partial(self._control.submit_mail, host=names.host),
            names=names,
            most_bytes=lambda: self.settings.attachments.max_message_bytes,
            in_thread=self._work,
            folder=self._queue.file.folder,
            most_clients=submission.max_connections,
            tls_first=not is_loopback(host),
            may_log_in=self._may_log_in,
            login_first=lambda: bool(self._tokens),
        )
        if place:
            tls = server_tls_context(submission if submission.tls_cert else settings.server)
            (_, own_port), *_ = await self._smtp.start_tcp(host, int(port), tls)
            event(self._log, logging.INFO, "submission by SMTP listens", at=f"{place.rpartition(':')[0]}:{own_port}")

    def _most_clients(self) -> int:
        """How many HTTP connections there may be: clients must not take the files that delivery needs."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        allowed = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        if soft != resource.RLIM_INFINITY and soft < allowed:
            try:
                resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            except (OSError, ValueError):  # a sandbox forbids it
                allowed = soft
        wanted = self.settings.server.max_connections
        most = min(wanted, allowed // HTTP_SHARE)
        if most < wanted:
            what = "low limit of open files: fewer HTTP connections"
            event(self._log, logging.WARNING, what, files=allowed, most=most)
        return most

    async def _serve(self, where: str, started: Callable[[str], None]) -> int:
        pid, node = os.getpid(), self._node
        event(self._log, logging.INFO, "mailproxy listens", at=where, version=__version__, pid=pid, node=node)
        watchdog = asyncio.create_task(self._feed_watchdog(), name="watchdog")
        while self._control.waits and not self._stopping.is_set():
            self._systemd.tell("READY=1")
            await self._ends(asyncio.create_task(self._stopping.wait()), STORAGE_PAUSE_S)
            await self._begin()
        if self._control.waits:  # there is nothing to finish
            self._dispatcher.stop()
            self._reporter.stop()
        runs = {"follower": self._control.follow, "dispatcher": self._dispatcher.run, "reporter": self._reporter.run}
        follower, *loops = [asyncio.create_task(run(), name=name) for name, run in runs.items()]
        beside = [follower, asyncio.create_task(self._renew()), asyncio.create_task(self._take_spool())]
        asked = asyncio.create_task(self._stopping.wait(), name="stop")
        settings, accounts = self.settings, [lane.account for lane in self._dispatcher.lanes.values()]
        left = await self._work(lambda: list(left_open(settings, accounts, self._environ)))
        for warning in (*settings.warnings, *left):
            event(self._log, logging.WARNING, warning)
        self._systemd.tell("READY=1")
        started(where)
        ended, _ = await asyncio.wait({follower, *loops, asked}, return_when=asyncio.FIRST_COMPLETED)
        self._systemd.tell("STOPPING=1")
        failure = None
        for task in ended - {asked}:
            failure = None if task.cancelled() else task.exception()
            by_us = self._stopping.is_set() and not failure
            if not by_us and not isinstance(failure, ConfigurationError):  # another node took the name meanwhile
                event(self._log, logging.CRITICAL, "a loop ended", loop=task.get_name(), exc_info=failure)
        status = 0 if self._stopping.is_set() else 1
        asked.cancel()
        for task in beside:
            task.cancel()
        await self._drain(loops)
        watchdog.cancel()
        if isinstance(failure, ConfigurationError):
            raise failure
        return status

    async def _drain(self, loops: Sequence[asyncio.Task[None]]) -> None:
        """Answer the requests in progress, finish the transactions on the wire, then the loops."""
        timeout_s = self.settings.delivery.shutdown_timeout_seconds
        event(self._log, logging.INFO, "stopping", on_the_wire=self._queue.in_delivery, timeout_seconds=timeout_s)
        drained = asyncio.create_task(self._dispatcher.drain())
        closing = asyncio.gather(*(one.stop(max(timeout_s, 5)) for one in (self._http, self._local, self._smtp)))
        if not await self._ends(drained, timeout_s):
            event(self._log, logging.WARNING, "deliveries were cut off", on_the_wire=self._queue.in_delivery)
        self._dispatcher.cut()
        await drained
        self._reporter.stop()
        await self._ends(asyncio.create_task(asyncio.wait(loops)), 5)  # a report may be under way
        await self._ends(closing, None)  # it has a deadline of its own
        ends: list[asyncio.Future[Any]] = [closing, *loops]
        for task in ends:
            task.cancel()
        await asyncio.gather(*ends, return_exceptions=True)
        await self._leases.leave()

    async def _ends(self, task: asyncio.Future[Any], within_s: float | None) -> bool:
        """Wait for a task, but not when the daemon is told a second time to stop; True when it has ended."""
        hurried = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({task, hurried}, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
        hurried.cancel()
        return task.done()

    # -- the spool of sendmail

    async def _take_spool(self) -> None:
        """Submit what sendmail could not, and remove it: cut off in between, it is known by its id the next time."""
        while True:
            spool, most_bytes = self.settings.sendmail.spool or "", self.settings.server.max_body_bytes
            failures: list[OSError] = []
            try:
                for path in await self._work(functools.partial(spooled_files, spool)) if spool else ():
                    try:
                        await self._take_file(path, most_bytes)
                    except FileNotFoundError:
                        pass  # who left it has taken it back
                    except OSError as error:  # it can be neither removed nor renamed; the others are taken
                        failures.append(error)
                if failures:
                    raise failures[0]
                await asyncio.sleep(SPOOL_PAUSE_S)
            except (OSError, StorageUnavailable) as error:
                event(self._log, logging.ERROR, "the spool cannot be used", spool=spool, error=str(error))
                await asyncio.sleep(10 * SPOOL_PAUSE_S)

    async def _take_file(self, path: str, most_bytes: int) -> None:
        try:
            body = await self._work(lambda: spooled_content(path, most_bytes))
            request = Request("POST", path, "spool", {}, {}, {}, body, "spool", "spool", self._work)
            await self._control.submit_messages(request)
            os.unlink(path)
        except (StorageUnavailable, FileNotFoundError):
            raise
        except Exception as error:  # whatever somebody put there must not stop the others
            if isinstance(error, OSError) and error.errno not in LASTING_FILE_ERRORS:
                raise  # not its fault: out of descriptors or memory, for now
            rejected = error.extra.get("rejected") if isinstance(error, HttpError) else None
            reason = rejected[0]["reason"] if rejected else str(error)
            aside = f"{os.path.dirname(path)}/.refused-{secrets.token_hex(8)}"
            os.rename(path, aside)
            event(self._log, logging.ERROR, "a file of the spool was set aside", file=path, now=aside, reason=reason)

    async def _feed_watchdog(self) -> None:
        """Tell systemd that we live, as long as both loops turn."""
        while (interval_s := self._systemd.watchdog_interval_s) is not None:
            if self._control.waits or self._control.stalled_loop() is None:
                self._systemd.tell("WATCHDOG=1")
            await asyncio.sleep(interval_s)

    # -- reading the configuration again

    async def _renew(self) -> None:
        """Read the configuration again whenever that is asked for; a mistake in it changes nothing."""
        while self._reload is not None:
            await self._asked_to_renew.wait()
            self._asked_to_renew.clear()
            self._systemd.tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
            try:
                settings, fixed, tokens, accounts = await self._work(self._read_again)
                self.settings = settings
                self._tokens = tuple(token.encode() for token in tokens)
                journal = stderr_is_journal(self._environ)
                configure_logging(settings.logging.level, settings.logging.format, journal=journal)
                self._dispatcher.settings = settings.delivery
                self._dispatcher.log_deliveries = settings.logging.delivery_activity
                is_other_upstream = settings.client != self._reporter.client
                self._reporter.client, self._reporter.delivery = settings.client, settings.delivery
                self._reporter.ring()
                self._dispatcher.fetcher = self._fetcher()
                self._agent.contexts.clear()  # certificates may have changed
                await self._control.take_over(accounts)
                if not settings.delivery.test_mode:  # the file of a secret may be mended, or a certificate
                    self._dispatcher.run_now()
                    if is_other_upstream:
                        self._reporter.run_now()
                self._smtp.names = await self._network(lambda: local_names(self.settings.sendmail))
                event(self._log, logging.INFO, "configuration reloaded", needs_restart=", ".join(fixed) or None)
            except ConfigurationError as error:
                event(self._log, logging.ERROR, "configuration not reloaded", error=str(error))
            except StorageUnavailable as error:
                event(self._log, logging.ERROR, "accounts not reloaded", error=str(error))
            self._systemd.tell("READY=1")

    def _read_again(self) -> tuple[Settings, list[str], Sequence[str], list[Account]]:
        """The configuration as it is now, but for what stays until a restart (named); tokens, accounts. Blocking."""
        assert self._reload is not None
        settings, fixed = renewed(self.settings, self._reload())
        tokens = api_tokens(settings, self._environ)
        check_listening(settings, tokens)
        return settings, fixed, tokens, configured_accounts(settings)

    # -- what the rooms are handed

    def _fetcher(self) -> AttachmentFetcher:
        return AttachmentFetcher(
            self.settings.attachments,
            self.settings.client,
            self.settings.s3,
            reveal=self._reveal,
            folder=self._queue.file.folder,
            in_thread=self._network,
            observe=lambda source, outcome: self._metrics.attachment_fetches.labels(source, outcome).inc(),
        )

    async def _call_upstream(self, report_id: str, body: bytes) -> HttpAnswer:
        timeout_s = self.settings.client.timeout_seconds
        try:
            async with asyncio.timeout(timeout_s + 1):  # which cuts the look-up of a name; all else cuts itself
                return await self._network(lambda: self._post_report(report_id, body))
        except TimeoutError:
            raise HttpFailure(f"no answer from the upstream within {timeout_s:g} s", transient=True) from None

    def _post_report(self, report_id: str, body: bytes) -> HttpAnswer:
        """One proxy_sync call. Blocking: may read secrets from files, too."""
        client = self.settings.client
        url = client.client_sync_url or ""
        headers = {"Content-Type": "application/json", **client_credentials(client, self._reveal)}
        if client.client_sync_secret is not None:
            try:
                key = webhook_key(self._reveal(client.client_sync_secret))
            except ValueError:
                raise SecretUnavailable("client_sync_secret is not base64 any more") from None
            timestamp = int(self._clock.wall())
            headers |= {"webhook-id": report_id, "webhook-timestamp": str(timestamp)}
            headers["webhook-signature"] = webhook_signature(key, report_id, timestamp, body)
        try:
            post = functools.partial(http_request, "POST", url, body=body, headers=headers)
            trust = functools.partial(tls_context, client.ca_file)
            return post(timeout_s=client.timeout_seconds, max_bytes=ANSWER_BYTES, trust=trust)
        except UnreadableBody:  # a success counts, whatever it says
            return HttpAnswer(200, {}, b"", url)

    def _admit(self, request: Request, is_public: bool) -> None:
        """Raises HttpError 401 without one of the tokens, which are compared in constant time. Where none is configured,
        403 for what a page of another site may have a browser send to the loopback address of its reader: its Origin
        (RFC 6454 7) is not ours, Sec-Fetch-Site says so, or it asks by a name that anybody can let point here (DNS
        rebinding). Over a Unix socket a proxy has names and TLS of its own."""
        headers, over_unix = request.headers, request.peer == "unix"
        if not self._tokens:
            host, origin = headers.get("host", ""), headers.get("origin")
            schemes = ("https",) if self.settings.server.tls_cert else ("http", "https")[: 1 + over_unix]
            own = origin is None or origin.lower() in [f"{scheme}://{host.lower()}" for scheme in schemes]
            is_nobodys = over_unix or NOBODYS_NAME.fullmatch(host)
            if not (own and is_nobodys) or headers.get("sec-fetch-site", "").lower() in ("cross-site", "same-site"):
                words = "the request may come from a page of another site: use 127.0.0.1, or set api_token in [server]"
                raise HttpError(403, words)
        elif not is_public:
            scheme, _, bearer = headers.get("authorization", "").partition(" ")
            given = [headers.get("x-api-token", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
            matches = [hmac.compare_digest(word.encode("latin-1"), token) for word in given for token in self._tokens]
            if not any(matches):  # all of them were compared
                words = "Invalid or missing API token"
                raise HttpError(401, words, headers={"WWW-Authenticate": "Bearer"}, detail=words)
        if self._control.waits and not is_public:
            raise StorageUnavailable(self._control.waits)

    def _may_log_in(self, password: str, peer: str) -> bool:
        """True for one of the tokens, by SMTP; for any password while none is configured."""
        matches = [hmac.compare_digest(password.encode(), token) for token in self._tokens]
        if matches and not any(matches):
            self._metrics.auth_failures.inc()
            event(self._log, logging.WARNING, "SMTP login without a valid token", peer=peer)
        return any(matches) or not matches

    def _observe_request(self, request: Request, status: int, seconds: float) -> None:
        self._metrics.http_requests(request.route, request.method, status).inc()
        self._metrics.http_request_seconds(request.route).observe(seconds)
        if status in (401, 403):
            self._metrics.auth_failures.inc()
            what = "request without a valid token" if status == 401 else "request from another site"
            event(self._log, logging.WARNING, what, peer=request.peer, request=request.id)
        if self._log.isEnabledFor(logging.DEBUG):
            about: dict[str, Any] = {"method": request.method, "path": request.path[:200], "peer": request.peer}
            about |= {"request": request.id, "status": status, "seconds": seconds}
            event(self._log, logging.DEBUG, "request answered", **about)

    def _log_failure(self, request: Request, failure: Exception) -> None:
        about = {"method": request.method, "route": request.route, "request": request.id}
        event(self._log, logging.ERROR, "internal error in a request", exc_info=failure, **about)


def server_tls_context(server: ServerSettings | SubmissionSettings) -> ssl.SSLContext | None:
    """TLS for what listens, when it is configured. Blocking: reads files."""
    if server.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(server.tls_cert, server.tls_key)
    except (OSError, ssl.SSLError) as error:
        section = "server" if isinstance(server, ServerSettings) else "submission"
        raise ConfigurationError(f"[{section}] tls_cert and tls_key cannot be used: {error}") from error
    return context


# ======================================================================
# CLIENT - a client of the daemon's HTTP interface, and words for people
# ======================================================================
#
# What the commands below share; all of it blocks. A Client asks one daemon and tells a refusal from its absence.
# Tables fit the terminal; nothing that came from outside reaches it unescaped.

CLIENT_PATIENCE_S = 120.0  # for a request to the daemon
CLOCK = "%Y-%m-%d %H:%M:%S"


class CommandFailed(MailproxyError):
    """A command could not do what it was asked to; the text says why, `status` is that of sysexits.h."""

    def __init__(self, sentence: str, status: int = os.EX_TEMPFAIL, http_status: int = 0) -> None:
        super().__init__(sentence)
        self.status, self.http_status = status, http_status


class Client(NamedTuple):
    """One daemon: where it is, and how to be let in. It is asked over one connection a request."""

    url: str  # http://HOST:PORT, https://... or unix:/path
    token: str | None = None
    certificate: str | None = None  # the daemon's own, from its config.ini

    def ask(
        self, method: str, path: str, fields: Mapping[str, object] | None = None, *, shown: bool = False
    ) -> dict[str, Any]:
        """The fields of the answer to one request, which is printed as it came when it is to be `shown`. Raises
        CommandFailed when it is a refusal, but for one that names single messages, or when no daemon answers."""
        status, content = self.fetch(method, path, fields)
        answered: Any = None
        with contextlib.suppress(ValueError):
            answered = json.loads(content)
        if not isinstance(answered, dict) or "ok" not in answered:
            raise CommandFailed(f"{self.url} answers (HTTP {status}), but not as mailproxy does")
        if shown and status != 413:  # then smaller batches may be submitted
            print(content.decode("utf-8", "backslashreplace").rstrip("\n"))
        if status == 401:
            raise CommandFailed("the daemon requires a valid token: set MAILPROXY_TOKEN", os.EX_NOPERM)
        if not answered["ok"] and "rejected" not in answered:
            may_pass = status >= 500 or status in (408, 429)
            reason = str(answered.get("error", f"HTTP {status}"))
            raise CommandFailed(reason, os.EX_TEMPFAIL if may_pass else os.EX_UNAVAILABLE, status)
        return answered

    def fetch(self, method: str, path: str, fields: Mapping[str, object] | None = None) -> tuple[int, bytes]:
        """The same, for the status and the bytes of the answer, whatever they are."""
        daemon, headers, body, resolve = daemon_target(self.url), {}, None, resolve_name
        if fields is not None:
            headers, body = {"Content-Type": "application/json"}, json.dumps(fields).encode()
        if self.token is not None:
            headers["X-API-Token"] = self.token
        place, prefix = f"{daemon.scheme}://{daemon.netloc}", daemon.path.rstrip("/")
        if daemon.scheme == "unix":
            place, prefix, resolve = "http://localhost", "", lambda host, port: [(socket.AF_UNIX, daemon.path)]
        ask = functools.partial(http_request, method, place + prefix + path, body=body, headers=headers)
        try:
            answer = ask(timeout_s=CLIENT_PATIENCE_S, max_bytes=sys.maxsize, trust=self._trust, resolve=resolve)
        except HttpFailure as failure:
            absent = isinstance(failure.__cause__, ConnectionRefusedError | FileNotFoundError)
            hint = "; start it with `mailproxy serve`, or name it by --url or MAILPROXY_URL" if absent else ""
            reason = failure.reason.replace("no connection to ", "cannot reach ").replace(place, self.url)
            raise CommandFailed(f"{reason}{hint}") from None
        return answer.status, answer.body

    def _trust(self) -> ssl.SSLContext:
        """TLS is verified by name, or against the very certificate that config.ini names."""
        context = tls_context(self.certificate)
        if self.certificate is not None:
            context.check_hostname = False  # a loopback address is in no certificate; this one is known by itself
            context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
            context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # with it, Python 3.13 would refuse many self-signed ones
        return context


def daemon_target(url: str) -> HttpTarget:
    """A daemon's URL, taken apart; the path of a Unix socket is the path of scheme unix. Raises ConfigurationError."""
    if url.startswith("unix:/"):
        return HttpTarget("unix", "localhost", 80, url.removeprefix("unix:"), None)
    try:
        return http_target(url)
    except ValueError:
        shown = f'"{url}" is not the URL of a daemon'
        raise ConfigurationError(f"{shown}: http://HOST:PORT, https://HOST:PORT or unix:/path") from None


def find_daemon(
    environ: Mapping[str, str], url: str | None = None, token: str | None = None, config: str | None = None
) -> Client:
    """The daemon a command means: by options, environment, config.ini. Blocking. Raises ConfigurationError."""
    url = (url or environ.get("MAILPROXY_URL", "")).rstrip("/")
    token = token or environ.get("MAILPROXY_TOKEN") or None
    if token:
        try:
            token = reveal(Secret(token), environ)
        except SecretUnavailable as error:
            raise ConfigurationError(f"the token cannot be read: {error}") from None
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise ConfigurationError("the token must be ASCII without spaces")
    if url and token:
        return Client(url, token)
    try:
        settings = read_settings(config, environ, {})
        its_token = token or next(iter(api_tokens(settings, environ)), None)
    except ConfigurationError:
        if not url or config:
            raise
        return Client(url)
    server = settings.server
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
    own_url = f"{'https' if server.tls_cert else 'http'}://{f'[{host}]' if ':' in host else host}:{server.port}"
    if server.unix_socket is not None:
        own_url = f"unix:{os.path.abspath(server.unix_socket)}"
    elif server.port == 0 and not url:
        raise ConfigurationError("[server] port is 0 (any free port): give the URL of the daemon with --url")
    if url in ("", own_url):
        return Client(own_url, its_token, server.tls_cert)
    here = is_loopback(daemon_target(url).host)
    return Client(url, its_token if here else None)  # the token of config.ini is for no other machine


# --- what people read ----------------------------------------------------


def text_width(text: str) -> int:
    """How many columns of a terminal a text takes: two for each wide character, none for what combines."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def cut(text: str, width: int, *, middle: bool = False) -> str:
    """The text without its end, or without its middle, where it is wider than this."""
    if text_width(text) <= width:
        return text
    head, tail = text[:width], text[-(width // 2) :] if middle and width > 1 else ""
    while text_width(head) + text_width(tail) >= width:
        head, tail = (head, tail[1:]) if text_width(head) < text_width(tail) else (head[:-1], tail)
    return f"{head}…{tail}"


def table(
    header: Sequence[str], rows: Iterable[Sequence[object]], kinds: Sequence[str] = (), *, whole: bool = False
) -> list[str]:
    """Lines of aligned columns, in the colours of their kinds. Where they are too wide for the terminal, the last column
    stands below each row when it is to be read `whole`; then long ids and addresses lose their middle and texts their
    end, the widest first; then the last column its end; then the lines."""
    width, below = output_width(), [""]
    cells = [[_escaped("" if cell is None else str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(map(text_width, column)) for column in zip(*cells, strict=True)]
    if whole and sum(widths) + 2 * (len(widths) - 1) > width:
        below = ["" if row is cells[0] else row[-1] for row in cells]
        cells, widths = [row[:-1] for row in cells], widths[:-1]
    for least, last_least in ((16, widths[-1]), (16, 60), (8, 60), (8, 8)):
        floors = [*[least] * (len(widths) - 1), last_least]
        while sum(widths) + 2 * (len(widths) - 1) > width and any(map(operator.gt, widths, floors)):
            above = [columns if columns > floor else 0 for columns, floor in zip(widths, floors, strict=True)]
            widths[above.index(max(above))] -= 1
    lines = []
    for row, kind, rest in itertools.zip_longest(cells, ("", *kinds), below, fillvalue=""):
        names = [i < len(row) - 1 and ("@" in cell or " " not in cell) for i, cell in enumerate(row)]
        fitted = [cut(cell, columns, middle=name) for cell, columns, name in zip(row, widths, names, strict=True)]
        padded = [cell + " " * (columns - text_width(cell)) for cell, columns in zip(fitted, widths, strict=True)]
        lines.append(paint(cut("  ".join(padded).rstrip(), width), kind))
        lines += [paint(f"    {rest}", kind)] if rest else []
    return lines


def facts(*pairs: tuple[str, object]) -> list[str]:
    """A line for each name and value, but where there is nothing to say."""
    shown = [(name, _escaped(str(value))) for name, value in pairs if value not in (None, "")]
    left = max(len(name) for name, _ in shown)
    return [f"{name:<{left}}  {value}" for name, value in shown]


def paint(text: str, kind: str) -> str:
    """Green, yellow or red in a terminal, by the first letter of a reply or a status; NO_COLOR (no-color.org): none."""
    colour = {"2": "32", "s": "32", "4": "33", "d": "33", "5": "31", "e": "31"}.get(kind[:1])
    plain = not on_terminal() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if colour is None or plain else f"\x1b[{colour}m{text}\x1b[0m"


def on_terminal() -> bool:
    return isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.isatty()


def output_width() -> int:
    """The columns of the terminal; what goes into a pipe or a file is never cut."""
    return shutil.get_terminal_size((1_000_000, 24)).columns


def size_in_words(size_bytes: int) -> str:
    """A size in the unit a person would choose: 40 B, 12.5 kB, 3.5 MB."""
    units = (("GB", 10**9), ("MB", 10**6), ("kB", 1000))
    return next((f"{size_bytes / n:.1f} {unit}" for unit, n in units if size_bytes >= n), f"{size_bytes} B")


def relative(ts: float | None, now: float) -> str:
    """How long ago, or how far ahead, in the unit a person would choose (40 s, 12 min, 3 h, 5 d); "" for never."""
    if ts is None:
        return ""
    span_s, units = abs(now - ts), (("d", 86_400), ("h", 3600), ("min", 60))
    words = next((f"{span_s // n:.0f} {unit}" for unit, n in units if span_s >= 2 * n), f"{span_s:.0f} s")
    return f"{words} ago" if ts <= now else f"in {words}"


def local_time(ts: float | None, now: float) -> str:
    """A time of the local clock, and how far away it is; "" for never."""
    return "" if ts is None else f"{time.strftime(CLOCK, time.localtime(ts))} ({relative(ts, now)})"


def joined(between: str, *words: object) -> str:
    """What there is of these words."""
    return between.join(str(word) for word in words if word)


def reply_in_words(attempt: Mapping[str, Any]) -> str:
    """What the server said in the end."""
    return joined(" ", attempt["code"], attempt["enhanced_code"], attempt["text"])


def counted(number: int, noun: str) -> str:
    """1 message, 2 messages."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def complain(sentence: object) -> None:
    """One sentence on stderr."""
    print(f"mailproxy: {_escaped(str(sentence))}", file=sys.stderr)


# ======================================================================
# SENDING - what `send` and `sendmail` submit
# ======================================================================
#
# Submission for people and for programs that know sendmail(8). Its invariant: what an earlier run brought through
# is not sent again where the caller gave an id, or a CSV. A message that is complete goes in as `raw`: the daemon
# takes its Bcc out, and adds Date and Message-ID.

BATCH_MESSAGES = 200  # of one submission
THROUGH_BEFORE = (KNOWN, "already sent", "in delivery")  # what the daemon says of rows from an earlier run
NOT_THE_CONTENT = ("account_id", "priority", "deferred_ts", "expires_ts", "batch_code")
COLUMNS = MESSAGE_FIELDS.keys() - {"raw"}


def submit(client: Client, messages: Sequence[Mapping[str, object]], *, show: bool) -> dict[str | None, str]:
    """Submit messages; return by id why they were refused, or KNOWN. Raises CommandFailed when none was judged."""
    try:
        fields = client.ask("POST", "/commands/add-messages", {"messages": messages}, shown=show)
    except CommandFailed as failure:
        if failure.http_status != 413 or len(messages) < 2:
            raise
        half = len(messages) // 2
        return submit(client, messages[:half], show=show) | submit(client, messages[half:], show=show)
    reasons = {entry["id"]: entry["reason"] for entry in fields["rejected"]}
    return reasons | dict.fromkeys(fields.get("known", ()), KNOWN)


def send(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Submit what the options describe, an .eml file, or the rows of a CSV file."""
    if args.csv and (args.file or args.id):
        raise ConfigurationError("--csv cannot be combined with an .eml file or --id; put ids into a column")
    if args.file and (args.attach or (args.subject, args.body, args.html) != (None, None, None)):
        raise ConfigurationError("an .eml file is sent as it is: leave out --subject, --body, --html and --attach")
    given: dict[str, Any] = {name: value for name, value in vars(args).items() if name in COLUMNS and value is not None}
    if args.body == "-":
        given["body"] = sys.stdin.read()
    if args.attach:
        given["attachments"] = [_attached_file(path) for path in args.attach]
    if not (given.keys() - {"id"} or args.csv or args.file):
        raise ConfigurationError("nothing to send: give --from, --to, --subject and --body, an .eml file, or --csv")
    client = find_daemon(environ, args.url, args.token, args.config)
    if args.csv:
        return send_csv(client, args.csv, given, show_answers=args.json)
    id_ = args.id or f"send-{secrets.token_hex(8)}"
    fields: dict[str, Any] = {}
    if args.file:  # a complete message, and the envelope that its headers name
        draft = Draft.of(_file_content(args.file))
        sender, recipients = draft.envelope(strictly=given.keys().isdisjoint(("to", "cc", "bcc")))
        fields = {"raw": draft.in_base64(), "from": sender, "to": recipients}
    refusal = "; ".join(submit(client, [{**fields, **given, "id": id_}], show=args.json).values())
    if refusal not in ("", KNOWN):
        raise CommandFailed(f"the message was refused: {refusal}")
    if not args.json:
        print(f"{id_}: {refusal or 'queued'}")
    return 0


def _attached_file(path: str) -> dict[str, str]:
    return {"filename": os.path.basename(path), "content": base64.b64encode(_file_content(path)).decode()}


def _file_content(path: str) -> bytes:
    """The content of a file; - is standard input. Blocking. Raises CommandFailed."""
    try:
        with open(path if path != "-" else 0, "rb", closefd=path != "-") as file:
            return file.read()
    except (OSError, ValueError) as error:
        raise CommandFailed(f"{path} cannot be read: {getattr(error, 'strerror', error)}") from None


def send_csv(client: Client, path: str, common: Mapping[str, Any], *, show_answers: bool) -> int:
    """Submit the rows of a CSV file; 1 when some were refused. Raises ConfigurationError, CommandFailed."""
    rows = csv_rows(path, known_anyway=common)
    bar = on_terminal() and not show_answers
    clear = "\r\x1b[K" if bar else ""
    lines: dict[str, int] = {}  # of the file, by id of the message
    batch: list[dict[str, Any]] = []
    refusals: list[str] = []
    size_bytes = through = before = refused = 0
    try:
        for number, (line, row) in enumerate(rows, 1):
            try:
                batch.append(csv_message(row, common, known=lines))
                lines[batch[-1]["id"]] = line
                size_bytes += len(json.dumps(batch[-1]))
            except (Rejected, CommandFailed) as error:
                refusals.append(f"{path} line {line}: {error}")
            if len(batch) < BATCH_MESSAGES and size_bytes < 8_388_608 and number < len(rows):
                continue
            for id_, reason in (submit(client, batch, show=show_answers) if batch else {}).items():
                if reason in THROUGH_BEFORE:
                    before += 1
                else:
                    refusals.append(f"{path} line {lines.get(id_ or '', '?')}, {id_}: {reason}")
            print(clear, end="", flush=True)
            for refusal in refusals:
                complain(refusal)
            through, refused = through + len(batch), refused + len(refusals)
            batch, refusals, size_bytes = [], [], 0
            if bar:
                print(f"\r[{'#' * (number * 40 // len(rows)):<40}] {number} of {len(rows)}", end="", flush=True)
            elif not show_answers:
                print(f"{number} of {len(rows)}", flush=True)
    except (CommandFailed, KeyboardInterrupt) as stop:
        hint = f"{through} of {len(rows)} are through; run it again, and nothing is sent twice"
        if isinstance(stop, CommandFailed):
            raise CommandFailed(f"{stop}; {hint}") from None
        complain(f"interrupted; {hint}")
        raise
    finally:
        print(clear, end="", flush=True)
    if not show_answers:
        numbers = f"{len(rows) - before - refused} queued, {before} known, {refused} refused"
        print(f"{counted(len(rows), 'message')}: {numbers}")
    return 1 if refused else 0


def csv_rows(path: str, *, known_anyway: Mapping[str, object]) -> list[tuple[int, dict[str | None, Any]]]:
    """The rows of a CSV file that are not empty, by column, each with its line. Blocking. Raises ConfigurationError,
    CommandFailed."""
    import csv

    try:
        text = _file_content(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise CommandFailed(f"{path} is not UTF-8 text: save it in that encoding") from None
    head = text.partition("\n")[0]
    csv.field_size_limit(67_108_864)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    try:
        columns = reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        while columns and not columns[-1]:
            columns.pop()
        for name in columns:
            if name not in COLUMNS:
                known = sorted(COLUMNS)
                hint = f"{nearest(name, known)}; columns are fields of a message: {', '.join(known)}"
                raise ConfigurationError(f'{path}: unknown column "{name}"{hint}.')
            if columns.count(name) > 1:
                raise ConfigurationError(f"{path}: the column {name} is given twice")
        for name in ("from", "to", "subject"):
            if name not in columns and name not in known_anyway:
                raise ConfigurationError(f"{path}: the column {name} is missing; add it, or give --{name} for all rows")
        return [(reader.line_num, row) for row in reader if any("".join(cell or ()).strip() for cell in row.values())]
    except csv.Error as error:
        raise CommandFailed(f"{path} line {reader.reader.line_num} is not CSV: {error}") from None


def csv_message(row: dict[str | None, Any], common: Mapping[str, Any], known: Mapping[str, int]) -> dict[str, Any]:
    """The message that a row means; an empty cell is left out, but for an empty subject. Attachments are names of files
    with commas between, or JSON. An id that is made up is the same in the next run. Raises Rejected, CommandFailed."""
    if any(row.pop(None, ())):
        raise Rejected("more cells than columns")
    fields: dict[Any, Any] = {name: cell for name, cell in row.items() if cell or (name == "subject" and cell == "")}
    for name in ("deferred_ts", "expires_ts"):
        if fields.get(name, "").isdecimal():
            fields[name] = int(fields[name])
    files = fields.get("attachments", "").strip()
    if files and not files.startswith("["):
        fields["attachments"] = [_attached_file(path.strip()) for path in files.split(",")]
    for name in ("attachments", "headers"):
        if isinstance(fields.get(name), str):
            try:
                fields[name] = json.loads(fields[name])
            except ValueError:
                raise Rejected(f"invalid {name}: is not JSON") from None
    attachments = [*common.get("attachments", ()), *fields.get("attachments", ())]
    message = {**common, **fields, **({"attachments": attachments} if attachments else {})}
    if "id" in message:
        id_ = line_of(message["id"], "id", most=LONGEST_ID)
        if id_ in known:
            raise Rejected(f"duplicate id in this file: {id_}")
    else:
        content = {name: value for name, value in message.items() if name not in NOT_THE_CONTENT}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]
        ids = itertools.chain([f"csv-{digest}"], (f"csv-{digest}-{n}" for n in itertools.count(2)))
        id_ = next(id_ for id_ in ids if id_ not in known)
    return {**message, "id": id_}


# --- header fields of addresses, and drafts ------------------------------

_TOKEN_OF_ADDRESSES = re.compile(
    rb'[ \t\r\n]++|(?P<comment>\()|(?P<q>"[^"\\]*+(?:\\.[^"\\]*+)*+")|(?P<d>\[[^\[\]\\]*+\])|(?P<special>[.,:;<>@])'
    rb'|(?P<a>[^\x00- "(),.:;<>@\[\\\]\x7f]++)',
    re.DOTALL,
)
_OF_COMMENT = re.compile(rb"[^()\\]*+(?:\\.[^()\\]*+)*+([()])", re.DOTALL)  # up to where one begins or ends
_LOCAL, _AT_DOMAIN = r"\.*+[aq](?:\.++[aq])*+\.*+", r"@(?:a(?:\.a)*+|d)"
_OF_ADDRESS_LIST = re.compile(  # of words (a, q), domain literals (d), specials: a comma, a group's name or end, a mailbox
    rf",|[aq][aq.]*+:|;(?=,|\Z)|(?:(?:({_LOCAL}{_AT_DOMAIN})|[aq][aqd.]*+)?<(?:@[ad.@,]*+:)?((?:{_LOCAL}(?:{_AT_DOMAIN})?)?)>"
    rf"|({_LOCAL}(?:{_AT_DOMAIN})?))(?=[,;]|\Z)"
)
_DRAFT = re.compile(  # a byte order mark or From line of mbox, what looks like a header, a blank line or none, the body
    rb"(?:\xef\xbb\xbf(?=[!-9;-~]+[ \t]*:)|>?From [^\n]*\n)?"
    rb"((?:[!-9;-~]+[ \t]*:[^\n]*(?:\n|\Z)(?:[ \t][^\n]*(?:\n|\Z))*)*)(?:\r\n)?(.*)",
    re.DOTALL,
)
OF_RECIPIENTS = (b"to", b"cc", b"bcc", b"resent-to", b"resent-cc", b"resent-bcc")
OF_SENDERS = (b"from", b"sender", b"resent-from", b"resent-sender")


def read_addresses(text: bytes) -> list[tuple[str, slice]] | None:
    """The addresses in a header field of mailboxes and groups (RFC 5322 3.4, 4.4), and where their local parts stand;
    "" for <>. None where it cannot be read whole. Linear, whatever it is given."""
    tokens, at = [], 0
    while at < len(text):
        token = _TOKEN_OF_ADDRESSES.match(text, at)
        depth = 1 if token and token.lastgroup == "comment" else 0
        while token and depth:
            token = _OF_COMMENT.match(text, token.end())
            depth += 1 if token and token[1] == b"(" else -1
        if token is None:
            return None
        if token.lastgroup:
            tokens.append(token)
        at = token.end()
    kinds = "".join(token[0].decode() if token.lastgroup == "special" else str(token.lastgroup) for token in tokens)
    found, at, groups = [], 0, 0
    while at < len(kinds):
        element = _OF_ADDRESS_LIST.match(kinds, at)
        groups += {":": 1, ";": -1}.get(element[0][-1], 0) if element else 0
        if element is None or groups not in (0, 1):
            return None
        if element.lastindex:
            first, end = element.span(element.lastindex)
            local_end = kinds.find("@", first, end) if "@" in element[element.lastindex] else end
            spans = element.span(1), (first, end)
            name, address = (b"".join(token[0] for token in tokens[slice(*span)]) for span in spans)
            if element[1] and name != address:  # an address may stand as its own name, though not quoted
                return None
            local_part = slice(tokens[first].start(), tokens[local_end - 1].end())
            found.append((address.replace(b"\r\n", b"").decode("utf-8", "surrogateescape"), local_part))
        at = element.end()
    return None if groups else found


class Draft(NamedTuple):
    """A message as somebody wrote it: its header may lack something, or be missing altogether."""

    header: list[bytes]  # fields, folded as they are
    body: bytes

    @classmethod
    def of(cls, content: bytes) -> Draft:
        """The header is what looks like one; the body begins at a blank line, or where it ends. NUL bytes go."""
        found = _DRAFT.fullmatch(with_crlf(content.replace(b"\0", b"")))
        assert found
        return cls(split_raw(found[1])[0] if found[1] else [], found[2])

    def in_base64(self) -> str:
        return base64.b64encode(b"\r\n".join([*self.header, b"", self.body])).decode()

    def envelope(self, *, strictly: bool) -> tuple[str | None, list[str]]:
        """Sender and recipients: those of the newest resent block, which stands before older ones (RFC 5322 3.6.6),
        else the header's. "" is the null sender; None: nobody who can be read. Raises CommandFailed, when it is strict,
        for a field of recipients that cannot be read whole."""
        block: dict[bytes, bytes] = {}
        for line in self.header:
            name = field_name(line)
            if name in block or (block.keys() & set(OF_RECIPIENTS) and not name.startswith(b"resent-")):
                break
            if name.startswith(b"resent-"):
                block[name] = line
        resent = [line for name, line in block.items() if name in OF_RECIPIENTS]
        recipients: dict[str, None] = {}
        for line in resent or [line for line in self.header if field_name(line) in OF_RECIPIENTS[:3]]:
            read = read_addresses(line.partition(b":")[2])
            if read is None and strictly:
                shown = line[:200].decode("utf-8", "replace")
                raise CommandFailed(f"the addresses of this header field cannot be read: {shown}", os.EX_DATAERR)
            recipients |= dict.fromkeys(address for address, _ in read or () if address)
        authors = [block.get(b"resent-sender", b""), block.get(b"resent-from", b"")]
        for line in authors if block else (line for line in self.header if field_name(line) == b"from"):
            read = read_addresses(line.partition(b":")[2])
            if read and read[0][0].isprintable():
                return read[0][0], list(recipients)
        return None, list(recipients)

    def completed(self, names: LocalNames, author: Mailbox) -> Draft:
        """The same with a From, if it has none, and with bare local names made addresses where they stand."""
        header = [] if b"from" in map(field_name, self.header) else [_address_header("From", (author,)).encode()]
        for line in self.header:
            of_sender, start = field_name(line) in OF_SENDERS, line.index(b":") + 1
            known = of_sender or field_name(line) in (*OF_RECIPIENTS, b"reply-to")
            pieces, end = [], 0
            for name, place in (read_addresses(line[start:]) if known else None) or ():
                if name and "@" not in name:
                    full = names.sender_of(name) if of_sender else f"{name}@{names.domain or names.host}"
                    pieces += [line[end : start + place.start], full.encode("utf-8", "surrogateescape")]
                    end = start + place.stop
            header.append(b"".join([*pieces, line[end:]]))
        return Draft(header, self.body)


# --- sendmail ------------------------------------------------------------

# As getopt(3) has them: the letters that have a value, and every other character.
_SENDMAIL_OPTIONS = "".join(c + ":" * (c in "ABCDFLMNOPRVXbefhopr") for c in map(chr, range(33, 127)) if c not in "-:")


class SendmailCall(NamedTuple):
    """What one call of sendmail asks for."""

    recipients: tuple[str, ...]
    sender: str | None  # "" is the null sender
    full_name: str
    recipients_in_header: bool
    dot_ends: bool
    mode: str = "m"  # m: take a message; s: speak SMTP; p: list the queue; i, q: nothing


def sendmail_call(words: Sequence[str]) -> SendmailCall:
    """The options of sendmail(8), in any order; those that mean nothing here pass. Raises CommandFailed."""
    import getopt

    end = words.index("--") if "--" in words else len(words)
    short = [word[:2] if word[:2] in ("-d", "-q") else word for word in words[:end] if word[:2] != "--"]
    try:
        found, recipients = getopt.gnu_getopt([*short, *words[end:]], _SENDMAIL_OPTIONS)
    except getopt.GetoptError as error:
        raise CommandFailed(str(error), os.EX_USAGE) from None
    options = {f"o{value}" if name == "-o" else name[1:]: value for name, value in found}
    mode, wants_none = options.get("b", "m"), not recipients and "t" not in options
    if mode == "m" and wants_none:
        mode = "q" if "q" in options else ""
    if mode not in tuple("mspiq"):
        refused = f"-b{mode} is not supported" if mode else "no recipient: name one on the command line, or use -t"
        raise CommandFailed(refused, os.EX_USAGE)
    sender = options.get("f", options.get("r"))
    if sender is not None:  # it may stand in angle brackets or beside a name
        read = read_addresses(os.fsencode(sender))
        sender = sender.strip() if read is None else "".join(address for address, _ in read[:1])
    dot_ends = not options.keys() & {"i", "oi"}
    return SendmailCall(tuple(recipients), sender, options.get("F", ""), "t" in options, dot_ends, mode)


def sendmail_fields(call: SendmailCall, content: bytes, login: str, names: LocalNames) -> dict[str, object]:
    """The submission that a call of sendmail means: raw, its header complete. Raises CommandFailed, Rejected."""
    draft, recipients = Draft.of(content), []
    for word in call.recipients:
        read = read_addresses(os.fsencode(word))
        if not read:
            raise CommandFailed(f"not a mail address: {word[:200]}", os.EX_NOUSER)
        recipients += [address for address, _ in read]
    named, in_header = draft.envelope(strictly=call.recipients_in_header and not recipients)
    recipients += in_header if call.recipients_in_header else []
    if not recipients:
        raise CommandFailed("no recipient in the header of the message", os.EX_USAGE)
    to = [address for name in recipients for address in names.recipients(name)]
    sender = call.sender if call.sender is not None else login if named is None else named
    author = Mailbox("".join(filter(str.isprintable, call.full_name)), names.sender_of(call.sender or login))
    raw, from_ = draft.completed(names, author).in_base64(), names.sender_of(sender or named or login)
    fields: dict[str, object] = {"id": f"sendmail-{secrets.token_hex(8)}", "from": from_, "to": to, "raw": raw}
    return fields if sender else {**fields, "return_path": "<>"}


def login_name() -> str:
    """Who runs this process."""
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return "nobody"


def submit_or_keep(settings: Settings, environ: Mapping[str, str], fields: Mapping[str, object]) -> str | None:
    """Hand a message over (by submit_socket where there is one: not everybody may read the token), or keep it for the
    daemon; the reason where it is refused. Blocking. Raises ConfigurationError, CommandFailed."""
    local, spool = settings.server.submit_socket, settings.sendmail.spool
    try:
        by_socket = local and not environ.get("MAILPROXY_URL")
        client = Client(f"unix:{local}") if by_socket else find_daemon(environ, config=settings.source)
        return next(iter(set(submit(client, [fields], show=False).values()) - {KNOWN}), None)
    except MailproxyError as error:
        if spool is None or (isinstance(error, CommandFailed) and error.status != os.EX_TEMPFAIL):
            raise
    try:
        content = json.dumps({"messages": [fields]}).encode()
        if len(content) > settings.server.max_body_bytes:
            raise CommandFailed("the message is larger than max_body_bytes of [server]", os.EX_UNAVAILABLE)
        with contextlib.ExitStack() as undo, tempfile.NamedTemporaryFile(prefix=".", dir=spool, delete=False) as file:
            undo.callback(os.unlink, file.name)  # half a file would keep a full disk full
            os.fchmod(file.fileno(), 0o644)  # the daemon is another user; nobody else can list the spool
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            os.rename(file.name, f"{spool}/{time.time_ns():020}-{secrets.token_hex(8)}")
            undo.pop_all()
            os.fsync(file.fileno())  # of its new name, too: the spool cannot be opened
        return None
    except OSError as error:
        raise CommandFailed(f"no daemon answers, and the spool {spool} cannot be written: {error.strerror}") from None


# ======================================================================
# DEMO - the whole thing on loopback, with nothing configured
# ======================================================================
#
# An application, the daemon and a mail server in one process, over real sockets; what
# passes between them is shown as it happens. Nothing leaves the machine, or stays on it.

DEMO_OUTCOMES = {"plain": "sent", "picture": "sent", "refused": "error", "greylisted": "sent", "scheduled": "sent"}
DEMO_PICTURE = (  # PNG, 32 by 32 green pixels
    "iVBORw0KGgoAAAANSUhEUgAAACAAAAAgAQMAAABJtOi3AAAAA1BMVEUgoFBaW5YnAAAADElEQVR42mNgGNwAAACgAAGO+7G0AAAAAElFTkSuQmCC"
)
DEMO_TITLE = """\
mailproxy {version}: five messages go in by REST, out by SMTP, and come back as reports.
It all happens on this machine; a temporary folder holds the queue and goes away with it.

  plain       some text
  picture     html with a picture inside
  refused     to a mailbox that does not exist
  greylisted  to a server that says "later" at the first try
  scheduled   not before 3 seconds from now

  app        POSTs messages, takes reports at    {reports}
  mailproxy  the daemon, queue on disk           {daemon}
  smtp       a small mail server                 {smtp}
  console    the queue in a browser              {daemon}/{keep}
"""


class Demo:
    """The whole thing in one process: application, daemon and mail server, over real sockets."""

    def __init__(self, folder: str, *, patience_s: float = 15.0, keep: bool = False) -> None:
        self._folder, self._keep, self._patience_s = folder, keep, patience_s
        self._lines: asyncio.Queue[str] = asyncio.Queue()  # what passed, and is not shown yet
        self._outcomes: dict[str, str] = {}  # as reported
        self._taken = 0  # mails that the mail server took
        self._refusals = {"refused": "550 5.1.1 No such mailbox here", "greylisted": "450 4.7.1 Come back later"}
        self._started_at = time.monotonic()

    async def run(self) -> int:
        """Show it. Raises CommandFailed when something did not come as it should, or in time."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._start(stack)
                    await self._submit()
                    while self._lines.qsize() or self._outcomes.keys() != DEMO_OUTCOMES.keys():
                        print(await self._lines.get(), flush=True)
                    await self._sum_up()
            except TimeoutError:
                missing = ", ".join(id_ for id_ in DEMO_OUTCOMES if id_ not in self._outcomes)
                sentence = f"the demo failed: no final report of {missing} within {self._patience_s:g} s"
                raise CommandFailed(sentence) from None
            while self._keep:
                print(await self._lines.get(), flush=True)
        return 0

    def _tell(self, who: str, whom: str, about: str, what: str) -> None:
        """Something passed, about a message or its recipient; it is shown later, in order."""
        at_s, id_ = time.monotonic() - self._started_at, f"{about.partition('@')[0]:<12}" if about else ""
        words = paint(what, what.removeprefix("report: "))
        self._lines.put_nowait(f"{at_s:6.2f}s  {who:<9} -> {whom:<9}  {id_}{words}")

    # -- the part of the mail server

    def _reply_to_recipient(self, recipient: str) -> str | None:
        """refused@ has no mailbox here, greylisted@ is told to come back the first time."""
        reply = self._refusals.pop(recipient.partition("@")[0], None)  # what is refused does not come back
        if reply:
            self._tell("mailproxy", "smtp", recipient, f"RCPT TO:<{recipient}>")
            self._tell("smtp", "mailproxy", recipient, reply)
        return reply

    async def _take(self, mail: SmtpMail) -> str:
        """The reply to a whole mail, which is shown and not kept."""
        self._taken += 1
        reply = f"250 2.0.0 Ok: taken as number {self._taken}"
        message = email.message_from_bytes(mail.content)
        subject = make_header(decode_header(message.get("Subject", "")))
        parts = [joined(" ", p.get_content_type(), p["Content-ID"]) for p in message.walk() if not p.is_multipart()]
        words = f'"{subject}", {size_in_words(len(mail.content))}: {" + ".join(parts)}'
        self._tell("mailproxy", "smtp", mail.recipients[0], words)
        self._tell("smtp", "mailproxy", mail.recipients[0], reply)
        return reply

    async def _start(self, stack: contextlib.AsyncExitStack) -> None:
        """Mail server, application and daemon, stopped again in the other order."""
        server = SmtpServer(self._take, LocalNames("", "smtp.demo.example", None, {}), refusal=self._reply_to_recipient)
        (_, smtp_port), *_ = await server.start_tcp("127.0.0.1", 0, None)
        stack.push_async_callback(server.stop, 1)
        app = HttpServer(
            [Route("POST", "/reports", self._take_report, public=True)],
            admit=lambda request, is_public: ensure(is_public, 401, "only reports are taken here"),
            log_failure=lambda request, failure: complain(f"the receiver of reports failed: {failure!r}"),
        )
        (host, port), *_ = await app.start_tcp("127.0.0.1", 0, None)
        stack.push_async_callback(app.stop, 1)
        reports = f"http://{host}:{port}/reports"
        configured = {
            "storage.db_path": f"{self._folder}/mailproxy.db",
            "server.port": "0",
            "smtp.host": "127.0.0.1",
            "smtp.port": str(smtp_port),
            "client.client_sync_url": reports,
            "delivery.retry_delays": "1",
        }
        listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        daemon = Daemon(load_settings(os.devnull, {}, configured), {})
        serving = asyncio.create_task(daemon.run(started=listening.set_result, signals=False))
        stack.push_async_callback(asyncio.wait, [serving])
        stack.callback(daemon.stop)
        either: set[asyncio.Future[Any]] = {serving, listening}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            raise CommandFailed(f"the daemon did not start (status {await serving})")
        self._client = Client(listening.result())
        words = {"smtp": f"127.0.0.1:{smtp_port}", "keep": "" if self._keep else "  (demo --keep lets it run)"}
        print(DEMO_TITLE.format(version=__version__, reports=reports, daemon=self._client.url, **words), flush=True)
        self._started_at = time.monotonic()

    # -- the part of the application

    async def _submit(self) -> None:
        """Five messages, named after what will happen to them."""
        picture = {"filename": "picture.png", "content": DEMO_PICTURE, "content_id": "picture", "inline": True}
        look = {"html": '<p>Look: <img src="cid:picture" alt="a green square"></p>', "attachments": [picture]}
        scheduled = {"body": "Not a second too early.\n", "deferred_ts": math.ceil(time.time()) + 2}
        own: dict[str, dict[str, object]] = {
            "plain": {"subject": "Your receipt", "body": "Thank you!\n.\nThe line above is a dot.\n"},
            "picture": {"subject": "Grüße mit Bild", **look},
            "refused": {"subject": "Anybody there?", "body": "No."},
            "greylisted": {"subject": "Patience", "body": "It took two tries to bring this.\n"},
            "scheduled": {"subject": "On time", **scheduled},
        }
        common = {"from": "mailproxy <demo@app.example>"}
        messages = [{"id": id_, "to": f"{id_}@demo.example", **common, **fields} for id_, fields in own.items()]
        self._tell("app", "mailproxy", "", f"POST /commands/add-messages: {len(messages)} messages")
        await asyncio.to_thread(self._client.ask, "POST", "/commands/add-messages", {"messages": messages})
        self._tell("mailproxy", "app", "", '200 "queued": 5, that is: safe on disk')

    async def _take_report(self, request: Request) -> Response:
        """The application's end of proxy_sync."""
        report: dict[str, Any] = await request.json_object()
        for entry in report["delivery_report"]:
            words = joined(": ", "report", entry["status"], entry["error"])
            if entry["status"] == Status.DEFERRED:
                words = f"report: deferred, due {relative(entry['deferred_ts'], time.time())}"
            else:
                self._outcomes[entry["id"]] = entry["status"]
            self._tell("mailproxy", "app", entry["id"], words)
        return json_response({"ok": True})

    async def _sum_up(self) -> None:
        """The table at the end. Raises CommandFailed when it is not the expected one."""
        rows = []
        for id_ in DEMO_OUTCOMES:
            story = await asyncio.to_thread(self._client.ask, "GET", f"/message/{id_}")
            reply = reply_in_words(story["attempts"][-1])
            rows.append((id_, story["message"]["status"], story["message"]["attempts"], reply))
        columns = ("MESSAGE", "STATUS", "ATTEMPTS", "WHAT THE SERVER SAID")
        print("\n".join(["", *table(columns, rows, [status for _, status, _, _ in rows])]))
        if self._outcomes != DEMO_OUTCOMES or self._taken != 4:
            raise CommandFailed(f"the demo failed: {self._outcomes}, and {self._taken} mails arrived, not 4")
        taken_s = time.monotonic() - self._started_at
        print(f"\nall delivered and reported: 4 sent, 1 refused by its server, in {taken_s:.1f} s")
        print("With a server of your own: serve --help, and README.md")
        if self._keep:
            print(f"It goes on until Ctrl-C; the queue in a browser: {self._client.url}/", flush=True)


def demo(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Five messages through a daemon of their own."""
    configure_logging("error", "text")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background program has it ignored
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # tidies up just as well
    with tempfile.TemporaryDirectory(prefix="mailproxy-demo-") as folder:
        with contextlib.suppress(*([KeyboardInterrupt] if args.keep else [])):
            return asyncio.run(Demo(folder, keep=args.keep).run())
    return 0


# ======================================================================
# COMMAND LINE - the commands, and the table that argparse, help, docs and tests are made of
# ======================================================================
#
# One row of COMMANDS for each command. Exit status: 0 done, 1 failed, 2 usage or configuration (sendmail has those
# of sysexits); what went wrong is one sentence on stderr, never a traceback. serve, demo, check and backup stand on
# their own; all other commands speak HTTP to a running daemon, as anybody could.

Words: TypeAlias = "Callable[[dict[str, Any]], list[str]] | str"  # for an answer of the daemon

FOLLOWED_MESSAGES = 500  # the newest ones, which `messages --follow` watches
WHAT_MAY_CHANGE = ("created_at", "status", "attempts", "deferred_ts", "error")  # of a followed message

# --- the commands that talk to a daemon ----------------------------------


def _status_in_words(status: dict[str, Any]) -> list[str]:
    now = time.time()
    oldest = relative(status["oldest_pending_ts"], now)
    lines = facts(
        ("delivery", "active" if status["active"] else "suspended; `mailproxy activate` resumes it"),
        ("pending", joined(", the oldest accepted ", str(status["pending"]), oldest)),
        *((name.replace("_", " "), status[name]) for name in ("deferred", "in_delivery", "failed", "unreported")),
        ("suspended batches", ", ".join(status.get("suspended_batches", ()))),
        *((name, status.get(name)) for name in ("version", "node", "reporter")),
    )
    columns, accounts = ("PENDING", "CONNECTIONS", *(["NODE"] if "node" in status else [])), []
    for id_, account in status["accounts"].items():
        again = account["until"] and f"again {relative(account['until'], now)}"
        why = joined(", ", account["reason"], again)
        accounts.append((id_, account["state"], *(account.get(name.lower()) for name in columns), why))
    if not accounts:
        return [*lines, "", "There is no account yet: set [smtp] in config.ini, or use POST /account."]
    return [*lines, "", *table(("ACCOUNT", "STATE", *columns, "REASON"), accounts, whole=True)]


def _accounts_in_words(answer: dict[str, Any]) -> list[str]:
    rows = []
    for account in answer["accounts"]:
        what_tells = ("id", "host", "port", "use_tls", "implicit_tls", "start_tls")
        encryption = Account(**{name: account[name] for name in what_tells}).encryption
        tls = encryption if encryption == "implicit" else f"starttls {encryption}"
        numbers = ((account[f"limit_per_{unit}"], unit) for unit in ("minute", "hour", "day"))
        limits = " ".join(f"{number}/{unit}" for number, unit in numbers if number)
        source = "config.ini" if account["source"] == "config" else account["source"]
        server = f"{account['host']}:{account['port']}"
        rows.append((account["id"], server, account["user"], tls, account["max_connections"], limits, source))
    return table(("ID", "SERVER", "USER", "TLS", "CONNECTIONS", "LIMITS", "FROM"), rows) if rows else ["no accounts"]


def _as_list(given: object) -> list[str]:
    """Recipients as they were submitted: in one string with commas, or a list of such; those in quotes part nothing."""
    text = ",".join(map(str, given if isinstance(given, list) else [given or ""]))
    return [found.strip() for found in re.findall(r'(?:"(?:\\.|[^"\\])*+"|[^,])++', text) if found.strip()]


def _message_in_words(answer: dict[str, Any]) -> list[str]:
    """One message: its facts, and the timeline of its attempts."""
    record, payload, now = answer["message"], answer["message"]["message"], time.time()
    outcomes: Mapping[str, Any] = record.get("recipients") or {}
    lines = facts(
        ("id", record["id"]),
        ("status", record["status"]),
        ("account", record["account_id"]),
        ("from", payload.get("from")),
        *((key, ", ".join(_as_list(payload.get(key)))) for key in ("to", "cc", "bcc")),
        ("subject", record["subject"]),
        ("message-id", record["message_id"]),
        ("batch", record["batch_code"]),
        ("priority", record["priority"]),
        ("accepted", local_time(record["created_at"], now)),
        ("due", local_time(record["deferred_ts"], now) if record["status"] == Status.DEFERRED else None),
        ("sent", local_time(record["sent_ts"], now)),
        ("given up", local_time(record["error_ts"], now)),
        ("reported", local_time(record["reported_ts"], now)),
        ("error", record["error"]),
        *((f"  {to}", f"{one['status']}: {one['code']} {one['text']}") for to, one in outcomes.items()),
    )
    rows = []
    for number, attempt in enumerate(answer["attempts"], 1):
        began = time.strftime(CLOCK, time.localtime(attempt["started_at"]))
        took = f"{attempt['ended_at'] - attempt['started_at']:.2f} s"
        rows.append((number, began, took, attempt["outcome"], attempt["stage"], reply_in_words(attempt)))
    columns = ("ATTEMPT", "WHEN", "TOOK", "OUTCOME", "STAGE", "REPLY")
    return [*lines, "", *(table(columns, rows, whole=True) if rows else ["No attempt yet."])]


def _messages_in_words(answer: dict[str, Any]) -> list[str]:
    rows: list[Sequence[Any]] = [("ID", "STATUS", "ACCOUNT", "TO", "SUBJECT", "ATTEMPTS", "ACCEPTED", "REMARK")]
    rows += [_message_row(record, time.time()) for record in answer["messages"]]
    shown = [output_width() >= least for least in (0, 0, 100, 48, 0, 100, 72, 0)]  # else the reason needs their place
    rows = [list(itertools.compress(row, shown)) for row in rows]
    return table(rows[0], rows[1:], [row[1] for row in rows[1:]]) if rows[1:] else ["no messages"]


def _message_row(record: Mapping[str, Any], now: float) -> tuple[Any, ...]:
    """A message in a list. The remark is what a person asks next: when it goes on, and why it did not."""
    id_, status, payload = record["id"], record["status"], record["message"]
    recipients = [address for key in ("to", "cc", "bcc") for address in _as_list(payload.get(key))]
    to = f"{recipients[0]} +{len(recipients) - 1}" if len(recipients) > 1 else "".join(recipients)
    subject, accepted = record["subject"], relative(record["created_at"], now)
    due = f"due {relative(record['deferred_ts'], now)}" if status == Status.DEFERRED else ""
    remark = joined(": ", due, record["error"])
    return (id_, status, record["account_id"], to, subject, record["attempts"], accepted, remark)


def _follow(client: Client, args: argparse.Namespace, filters: Mapping[str, object]) -> NoReturn:
    """The newest messages, then what is new or has changed, until Ctrl-C; a daemon that is away is waited for."""
    known: dict[str, object] | None = None  # how the messages were at the last look
    away = False
    while True:
        try:
            records = _newest(client, filters, known or {})
            states: dict[str, object] = {r["id"]: [r[key] for key in WHAT_MAY_CHANGE] for r in records}
            news = records[-args.limit :]
            if known is not None:
                news = [record for record in records if known.get(record["id"]) != states[record["id"]]]
            for record in news:
                id_, status, account, to, subject, _, _, remark = _message_row(record, time.time())
                words = joined("  ", f"{id_:<24}", account, to, f'"{subject}"', remark)
                line = cut(f"{time.strftime('%H:%M:%S')}  {status:<8}  {_escaped(words)}", output_width())
                print(json.dumps(record, ensure_ascii=False) if args.json else paint(line, status), flush=True)
            known, away = states, False
        except CommandFailed as error:
            if known is None or error.status != os.EX_TEMPFAIL:
                raise
            if not away:
                complain(error)
            away = True
        time.sleep(1)


def _newest(client: Client, filters: Mapping[str, object], known: Mapping[str, object]) -> list[Any]:
    """The newest messages, oldest first; many more of them where all are new."""
    for most in (FOLLOWED_MESSAGES, LISTING_LIMIT):
        records = client.ask("GET", _with_query("/messages", {**filters, "order": "desc", "limit": most}))["messages"]
        if not known or any(record["id"] in known for record in records):
            break
    return cast("list[Any]", records[::-1])


def _with_query(path: str, query: Mapping[str, object]) -> str:
    return f"{path}?{urllib.parse.urlencode(query, errors='surrogateescape')}" if query else path


def ask_daemon(request: str, words: Words, args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Ask the daemon once and show its answer. 1 when it left messages as they are: they are named, by why."""
    client = find_daemon(environ, args.url, args.token, args.config)
    given = (getattr(args, name, None) or "" for name in ("id", "account"))
    id_, account = (urllib.parse.quote(one, safe="", errors="surrogateescape") for one in given)
    method, path = request.format(id=id_, place=f"account/{account}" if account else "commands").split(" ")
    if "last" in args and args.last:
        args.order, args.limit = "desc", args.last
    filters = {name: value for name, value in vars(args).items() if name in LISTING and value is not None}
    if account and "batch_code" in filters:
        raise ConfigurationError("--account and --batch do not go together: suspend one, then the other")
    if "eml" in args and args.eml:
        path += "/eml"
        status, content = client.fetch(method, path)
        if status == 200:
            sys.stdout.buffer.write(content)
            return 0
    if "follow" in args and args.follow:
        _follow(client, args, {name: value for name, value in filters.items() if name != "after"})
    ids = {"ids": args.ids} if "ids" in args else None
    fields = client.ask(method, _with_query(path, filters), ids, shown=args.json)
    if not args.json:
        while fields.get("next") and len(fields["messages"]) < args.limit:  # a search may take more than one answer
            more = {"after": fields["next"], "limit": args.limit - len(fields["messages"])}
            page = client.ask("GET", _with_query(path, {**filters, **more}))
            fields = {**page, "messages": fields["messages"] + page["messages"]}
        whose = f" of account {args.account}" if account else ""
        whose = f" of batch {filters['batch_code']}" if "batch_code" in filters else whose
        messages = counted(fields.get("queued", fields.get("removed", 0)), "message")
        print(words.format(whose=whose, messages=messages) if isinstance(words, str) else "\n".join(words(fields)))
        if fields.get("next"):
            order = "--order desc " if filters.get("order") == "desc" else ""
            print(f"There are more; {order}--after {fields['next']} shows them.", file=sys.stderr)
    if path == "/status":
        client.ask("GET", "/ready")
    reasons = {"not_found": "not found", "not_failed": "not failed", "in_delivery": "in delivery"}
    left_out = [f"{why}: {', '.join(fields[key])}" for key, why in reasons.items() if "ids" in args and fields.get(key)]
    if left_out:
        complain("; ".join(left_out))
    return 1 if left_out else 0


# --- sendmail ------------------------------------------------------------

AS_CALLED = {"sendmail": ("sendmail",), "mailq": ("sendmail", "-bp"), "newaliases": ("sendmail", "-bi")}


def sendmail(words: Sequence[str], environ: Mapping[str, str]) -> int:
    """What sendmail(8) is called for; the exit status is one of sysexits.h."""
    try:
        os.getcwd()
    except OSError:  # a deployment has removed the folder that the caller stands in
        os.chdir("/")
    try:
        call, usual = sendmail_call(words), SYSTEM_CONFIG if os.path.exists(SYSTEM_CONFIG) else os.devnull
        config = environ.get("MAILPROXY_CONFIG") or usual  # never that of the caller's directory
        if call.mode in ("m", "s"):
            os.set_blocking(0, True)  # else a pause of the caller would be the end of the message
        if call.mode == "m":
            settings = read_settings(config, environ, {})
            with open(0, "rb", closefd=False) as stdin:  # up to its end, or to a line with only a dot
                lines = itertools.takewhile(lambda line: not call.dot_ends or line.rstrip(b"\r\n") != b".", stdin)
                content = b"".join(lines)
            fields = sendmail_fields(call, content, login_name(), local_names(settings.sendmail))
            if reason := submit_or_keep(settings, environ, fields):
                status = os.EX_NOUSER if reason.startswith(("invalid to", "missing to")) else os.EX_DATAERR
                status = os.EX_CONFIG if reason.startswith(("account not found", "missing account")) else status
                raise CommandFailed(f"the message was refused: {reason}", status)
        elif call.mode == "s":
            settings = read_settings(config, environ, {})
            keep = functools.partial(submit_or_keep, settings, environ)
            speak_smtp(keep, local_names(settings.sendmail), settings.attachments.max_message_bytes)
        elif call.mode == "p":
            client = find_daemon(environ, config=config)
            queue = client.ask("GET", f"/messages?active_only=1&limit={LISTING_LIMIT}")
            print("\n".join(_messages_in_words(queue) if queue["messages"] else ["Mail queue is empty"]))
        return os.EX_OK
    except MailproxyError as error:
        complain(error)
        unconfigured = isinstance(error, ConfigurationError | Rejected)
        return os.EX_CONFIG if unconfigured else getattr(error, "status", os.EX_TEMPFAIL)
    except OSError as error:
        complain(error.strerror or error)
        return os.EX_IOERR


# --- serve and check -----------------------------------------------------


def _overrides(args: argparse.Namespace) -> dict[str, str]:
    """The settings that stand on the command line, by "section.key"."""
    overrides = {}
    for assignment in getattr(args, "set", ()):
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigurationError(f"--set {name}: write SECTION.KEY=VALUE, such as server.port=8000")
        overrides[name.strip()] = text
    return overrides | {name: text for name, text in vars(args).items() if "." in name and text is not None}


def share_one_heap() -> None:
    """Let all threads take memory from one heap: else each that ever held an attachment keeps one, mostly empty."""
    with contextlib.suppress(ImportError, OSError, AttributeError):  # without libffi, or without glibc
        import ctypes

        ctypes.CDLL(None).mallopt(-8, 1)  # M_ARENA_MAX of mallopt(3)


def serve(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """The daemon, until a signal."""
    settings = load_settings(args.config, environ, _overrides(args))
    reload = functools.partial(load_settings, settings.source, environ, _overrides(args))  # the same file, if any
    configure_logging(settings.logging.level, settings.logging.format, journal=stderr_is_journal(environ))
    share_one_heap()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    try:
        status = asyncio.run(Daemon(settings, environ, reload=reload).run())
    except MailproxyError:
        raise
    except Exception as error:  # the log is where a daemon tells of its own mistakes
        log_uncaught(error, logging.CRITICAL)
        status = 1
    logging.shutdown()
    with contextlib.suppress(OSError, ValueError):
        print(end="", flush=True)
    os._exit(status)  # without waiting for calls that hang in threads


def check(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """What serve would start with; or what is wrong, and 2."""
    settings = load_settings(args.config, environ, _overrides(args))
    accounts = configured_accounts(settings)
    rows = [(f"{section}.{key}", value, origin) for section, key, value, origin in describe(settings)]
    print(f"configuration: {settings.source or 'no file; only defaults, environment and command line'}\n")
    print("\n".join(table(("SETTING", "VALUE", "FROM"), rows)))
    for warning in settings.warnings:
        complain(f"warning: {warning}")
    problems = [*_start_problems(settings, environ), *left_open(settings, accounts, environ)]
    for problem in problems:
        complain(problem)
    failed = args.connect and not asyncio.run(show_servers(settings, accounts, environ))
    named = ", ".join(f"{account.id} ({account.host}:{account.port})" for account in accounts)
    way = f"mail goes out through {named}" if named else "there is no account yet: set [smtp], or POST /account"
    if problems or failed:
        print("\nThe settings are not usable yet.")
    else:
        print(f"\n{'See the warnings above; the' if settings.warnings else 'The'} settings are right: {way}.")
    return 2 if problems else int(failed)


def _start_problems(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    """What would stop the start."""
    try:
        file = queue_file(settings.storage.db_path, environ, observe_commit=lambda seconds: None)
        if isinstance(file, PostgresFile):
            file.examine()
    except (ConfigurationError, StorageUnavailable) as error:
        yield str(error)
    for row in SETTINGS_TABLE:
        path = str(row.of(settings) or "") if row.kind in (SOCKET_PATH, QUEUE_PLACE) else ""
        folder = os.path.dirname(os.path.abspath(path)) if path and not is_database(path) else ""
        if folder and not os.path.isdir(folder):
            yield f"[{row.section}] {row.key}: the folder {folder} does not exist; create it"
        elif folder and not os.access(folder, os.W_OK | os.X_OK):
            yield f"[{row.section}] {row.key}: the folder {folder} cannot be written by this user"
        elif folder and row.kind is QUEUE_PLACE and os.path.exists(path) and not os.path.isfile(path):
            yield f"[{row.section}] {row.key}: {path} is not a regular file"
    for section in (settings.server, settings.submission):
        try:
            server_tls_context(section)
        except ConfigurationError as error:
            yield str(error)


# --- check --connect: what the servers say -------------------------------

CONNECT_PATIENCE_S = 25.0  # for the connection, and for each reply


def own_address(account: Account) -> str:
    """A sender that the server may know: the login name, or a name at the server's domain; "" (RFC 5321 4.5.5)."""
    user, host = account.user or "", account.host.rstrip(".")
    if user.isascii() and re.fullmatch(r"[^@\s<>]+@[^@\s<>]+", user):
        return user
    domain = host.partition(".")[2] if host.count(".") > 1 else host
    local_part = user if re.fullmatch(r"[A-Za-z0-9_+-]+", user) else "postmaster"
    return "" if ":" in host or "." not in host or host[-1].isdigit() else f"{local_part}@{domain}"


async def show_servers(settings: Settings, configured: Sequence[Account], environ: Mapping[str, str]) -> bool:
    """Ask the server of each account, those in the queue file too, to take mail, all at once; show what it offers, and
    say what to do where it refuses. True: all do."""
    accounts, db_path = {account.id: account for account in configured}, settings.storage.db_path
    if is_database(db_path) or await asyncio.to_thread(os.path.exists, db_path):  # and those that were added over HTTP
        file = queue_file(db_path, environ, observe_commit=lambda seconds: None)
        try:
            with contextlib.suppress(StorageUnavailable):  # as was said above
                stored = stored_accounts(await Queue(file, now=time.time).accounts(), settings.delivery, complain)
                accounts = {account.id: account for account in stored} | accounts
        finally:
            await file.close()
    agent = await delivery_agent(environ, InThread())
    tried = await asyncio.gather(*(_try_server(agent, account) for account in accounts.values()))
    rows, kinds = [row for row, _ in tried], ["sent" if cure is None else "error" for _, cure in tried]
    columns = ("ACCOUNT", "SERVER", "TLS", "AUTH", "SIZE", "SMTPUTF8", "PIPELINING", "RESULT")
    print("\n".join(["", *table(columns, rows, kinds, whole=True)] if rows else ["There is no account to log into."]))
    for row, cure in tried:
        if cure is not None:
            complain(f"no mail can leave through {row[0]}{cure and f': {cure}'}")
    return "error" not in kinds


async def _try_server(agent: DeliveryAgent, account: Account) -> tuple[tuple[object, ...], str | None]:
    """A row with what the server of an account offers, and when it refuses mail what to do, or ""."""
    sender, shown = own_address(account), cast(tuple[object, ...], ("",) * 5)
    account = account._replace(timeout=min(account.timeout or CONNECT_PATIENCE_S, CONNECT_PATIENCE_S))
    session = await agent.open_session(account, name="check")
    if isinstance(session, Session):
        offers, reply = session.offers, await session.probe(sender)
        await session.quit()
        size = size_in_words(offers.size_bytes) if offers.size_bytes else "any"
        utf8, pipelining = ("yes" if offered else "no" for offered in (offers.smtputf8, offers.pipelining))
        shown = (offers.tls or "none", " ".join(offers.auth).upper() or "none", size, utf8, pipelining)
    else:
        reply = session
    there = f"logged in as {account.user}" if account.user else "connected"
    result = f"{there}, takes mail from <{sender}>"
    verdict = None if reply.accepted else about(reply, account, relays=False)
    if verdict and verdict.about is About.MESSAGE and sender != account.user:  # it is only a guess
        result, verdict = f"{there}, not mail from <{sender}>: {reply.words}", None
    elif verdict:
        asked = f" (to mail from <{sender}>)" if reply.stage is Stage.MAIL else ""
        result = f"{reply.stage}: {reply.words}{asked}"
    return (account.id, f"{account.host}:{account.port}", *shown, result), verdict and verdict.cure


# --- backup and import ---------------------------------------------------


def backup(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """A copy of the queue as it is at one instant, readable by the owner only."""
    queue, target = read_settings(args.config, environ, _overrides(args)).storage.db_path, args.file
    if is_database(queue):
        raise ConfigurationError(f"the queue is in PostgreSQL ({without_password(queue)}): back it up with pg_dump")
    if not os.path.isfile(queue):
        raise CommandFailed(f"there is no queue at {queue}: name it with --db, or its config.ini with --config")
    if os.path.isdir(target):
        raise CommandFailed(f"{target} is a folder: name a file in it")
    if os.path.exists(f"{target}-wal") or (os.path.exists(target) and os.path.samefile(target, queue)):
        raise CommandFailed(f"{target} is a queue in use, not a backup: choose another name")
    if os.path.lexists(target) and not args.force:
        raise CommandFailed(f"{target} exists already: --force replaces it")
    folder = os.path.dirname(os.path.abspath(target))
    try:
        with tempfile.TemporaryDirectory(prefix=".backup-", dir=folder) as own_folder:  # mode 0700
            draft = f"{own_folder}/copy"
            os.close(os.open(draft, os.O_CREAT, 0o600))
            with (
                contextlib.closing(sqlite3.connect(f"file:{urllib.parse.quote(queue)}?mode=ro", uri=True)) as source,
                contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as copy,
            ):
                source.backup(copy)  # in one step, so that a busy writer cannot make it start again and again
                copy.execute("PRAGMA journal_mode = DELETE")  # one file, no siblings
                (verdict,) = copy.execute("PRAGMA quick_check").fetchone()
                if verdict != "ok":
                    raise CommandFailed(f"the copy of {queue} is damaged: {verdict}")
                (messages,) = copy.execute("SELECT count(*) FROM messages").fetchone()
            os.replace(draft, target)
        for path in (target, folder):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    except OSError as error:
        raise CommandFailed(f"{target} cannot be written: {error.strerror}") from None
    except sqlite3.Error as error:
        raise CommandFailed(f"{queue} cannot be copied: {error}") from None
    print(f"{target}: {counted(messages, 'message')}, {size_in_words(os.path.getsize(target))}, checked")
    return 0


def import_queue(args: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Move a queue from a file into the database that is configured, or from a database into a new file."""
    places = args.file, read_settings(args.config, environ, _overrides(args)).storage.db_path
    if is_database(places[0]) == is_database(places[1]):
        raise ConfigurationError("one of the two must be a file and the other a database: see db_path, or --db")
    if not (is_database(places[0]) or os.path.isfile(places[0])):
        raise CommandFailed(f"there is no queue at {places[0]}")
    source, target = files = [queue_file(place, environ, observe_commit=lambda seconds: None) for place in places]
    with contextlib.ExitStack() as stack:
        for file in files:
            file.open()
            stack.callback(lambda one: asyncio.run(one.close()), file)
        try:
            messages = move(source, target)
        except (*source.errors, *target.errors) as error:
            why = PostgresFile.why(error)
            raise CommandFailed(f"{source.path} was not moved to {target.path}: {why}") from None
    print(f"{counted(messages, 'message')} moved from {source.path} to {target.path}")
    return 0


# --- the table of commands, and main -------------------------------------


Option: TypeAlias = "tuple[tuple[str, ...], Mapping[str, Any]]"  # what add_argument of argparse takes


def option(*names: str, **how: Any) -> Option:
    return names, how


def _moment(text: str) -> int:
    """So long ago (90s, 30min, 1h, 2d, 1w), a date and time of the local clock, or Unix seconds."""
    units = {"s": 1, "min": 60, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
    with contextlib.suppress(ValueError, OverflowError):
        if found := re.fullmatch(rf"([0-9]+) ?({'|'.join(units)})", text):
            return max(0, int(time.time()) - int(found[1]) * units[found[2]])
        return int(text) if text.isdecimal() else int(datetime.fromisoformat(text).timestamp())
    raise ConfigurationError(f'"{text}" is not a time: write 30min, 1h, 2d, 1w, 2026-01-31, "2026-01-31 14:00"')


def _listing_limit(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= LISTING_LIMIT:
        raise ConfigurationError(f"N must be a number from 1 to {LISTING_LIMIT}; see mailproxy messages --help")
    return int(text)


CONFIG = option("--config", metavar="FILE", help="left out: MAILPROXY_CONFIG, ./config.ini, /etc/mailproxy/config.ini")
DB = option("--db", dest="storage.db_path", metavar="FILE", help="file or URL of the queue")
SERVING = (
    CONFIG,
    option("--host", dest="server.host", metavar="HOST", help="address to listen on"),
    option("--port", dest="server.port", metavar="PORT", help="TCP port to listen on"),
    DB,
    option("--set", metavar="SECTION.KEY=VALUE", action="append", default=[], help="any setting; may be repeated"),
)
CONNECT = option("--connect", action="store_true", help="ask each account's server to take mail; show what it offers")
ASKING = (
    option("--url", help="http(s)://HOST:PORT or unix:/path; left out: MAILPROXY_URL, or as config.ini says"),
    option("--token", help="API token; MAILPROXY_TOKEN, env:NAME or file:/path hides it from other users"),
    CONFIG,
    option("--json", action="store_true", help="print the daemon's answer as JSON"),
)
WITH_CONTENT = option(
    "--content", action="store_const", const="true", help="with --json: with attachments and raw messages"
)
FILTERS = (
    option("--active-only", "--active", action="store_const", const="true", help="only messages that are not final"),
    option("--status", choices=[str(status) for status in Status], help="only messages of this status"),
    option("--account-id", "--account", metavar="ID", help="only messages of this account"),
    option("--batch-code", "--batch", metavar="CODE", help="only messages with this batch_code"),
    option("--to", metavar="ADDRESS", help="only messages to this recipient, in to, cc or bcc"),
    option("--subject", metavar="TEXT", help="only messages with this text in the subject, in any case"),
    option("--since", type=_moment, metavar="TIME", help="accepted since then: 30min, 1h, 2d, 1w ago, or a date"),
    option("--until", type=_moment, metavar="TIME", help="accepted until then"),
    option("--refused", action="store_const", const="true", help="only messages with recipients that were refused"),
    option("--order", choices=["asc", "desc"], help="desc: newest first"),
    option("--last", type=_listing_limit, metavar="N", help="the newest N messages, newest first"),
    option("--limit", type=_listing_limit, default=50, metavar="N", help="at most N messages (%(default)s)"),
    option("--after", metavar="CURSOR", help="continue where an earlier list ended"),
    WITH_CONTENT,
    option("--follow", action="store_true", help="show new messages and changes as they come, until Ctrl-C"),
)
SENDING = (
    option("file", metavar="FILE.eml", nargs="?", help="a complete message (-: standard input)"),
    option("--csv", metavar="FILE", help="many messages (-: standard input): one in each row, columns named as fields"),
    option("--from", metavar="ADDRESS", help='a@b, or "Name <a@b>"'),
    option("--to", metavar="ADDRESS", action="append", help="recipients, with commas between; may be repeated"),
    option("--cc", metavar="ADDRESS", action="append", help="likewise"),
    option("--bcc", metavar="ADDRESS", action="append", help="likewise; they are in no header"),
    option("--subject", help="may be empty"),
    option("--body", metavar="TEXT", help="the text; -: from standard input"),
    option("--html", metavar="HTML", nargs="?", const=True, help="HTML beside the text; no value: --body is HTML"),
    option("--attach", metavar="FILE", action="append", default=[], help="a file to attach; may be repeated"),
    option("--account", dest="account_id", metavar="ID", help="the account to send through; left out: that of [smtp]"),
    option("--priority", help="0 to 3, or immediate, high, medium, low"),
    option("--id", help="key of the message: submitted again, it is sent only once"),
)
AS_SENDMAIL = (
    option("recipients", metavar="ADDRESS", nargs="*", help="recipients; a bare name is a user of this host"),
    option("-t", action="store_true", help="take recipients from the headers To, Cc and Bcc, too"),
    option("-i", action="store_true", help="a line with only a dot does not end the message; so does -oi"),
    option("-f", metavar="ADDRESS", help="envelope sender; left out: the address in From, or login@host"),
    option("-F", metavar="NAME", help="full name for the header From, if there is none"),
    option("-b", metavar="MODE", help="s: speak SMTP; p: list the queue (mailq); i: do nothing (newaliases)"),
)
BACKING_UP = (
    option("file", metavar="FILE", help="file to write the copy to"),
    option("--force", action="store_true", help="replace FILE if it exists"),
    CONFIG,
    DB,
)
IMPORTING = (option("file", metavar="FILE", help="the file, or the URL of the database, to move from"), CONFIG, DB)
WHAT_RESTS = (
    option("--account", metavar="ID", help="only this account; left out: all delivery"),
    option("--batch-code", "--batch", metavar="CODE", help="only this batch, and what is submitted to it later"),
)
ID = (
    option("id", metavar="ID", help="id of the message"),
    option("--eml", action="store_true", help="the message as it goes on the wire"),
    WITH_CONTENT,
)
IDS = (option("ids", metavar="ID", nargs="+", help="id of a message"),)
SUSPENDED = "delivery{whose} is suspended; submission and reports go on"


class Command(NamedTuple):
    """One command: its name, what runs it, its options, and what it is for."""

    name: str
    run: Callable[[Any, Mapping[str, str]], int]
    options: tuple[Option, ...]
    meaning: str


def asks(name: str, request: str, words: Words, options: tuple[Option, ...], meaning: str) -> Command:
    """A command that asks the running daemon."""
    return Command(name, functools.partial(ask_daemon, request, words), (*options, *ASKING), meaning)


KEEPING = option("--keep", action="store_true", help="keep it running, for a look in a browser")
COMMANDS = (
    Command("serve", serve, SERVING, "run the daemon"),
    Command("demo", demo, (KEEPING,), "show everything at work on this machine, without configuration"),
    Command("check", check, (CONNECT, *SERVING), "check the configuration and show what is in force"),
    Command("send", send, (*SENDING, *ASKING), "submit a message, an .eml file, or the rows of a CSV file"),
    Command("sendmail", sendmail, AS_SENDMAIL, "submit a message from standard input, as sendmail(8) does"),
    Command("backup", backup, BACKING_UP, "copy the queue to a file while the daemon runs"),
    Command("import", import_queue, IMPORTING, "move a queue from SQLite to PostgreSQL, or back"),
    asks("status", "GET /status", _status_in_words, (), "show the state of the daemon and its accounts"),
    asks("messages", "GET /messages", _messages_in_words, FILTERS, "list messages, in order of acceptance"),
    asks("message", "GET /message/{id}", _message_in_words, ID, "show one message and every attempt to deliver it"),
    asks("accounts", "GET /accounts", _accounts_in_words, (), "list the accounts"),
    asks("run-now", "POST /commands/run-now", "delivery and reporting begin now", (), "deliver and report at once"),
    asks("suspend", "POST /{place}/suspend", SUSPENDED, WHAT_RESTS, "stop delivery; submission and reports go on"),
    asks("activate", "POST /{place}/activate", "delivery{whose} is active", WHAT_RESTS, "resume delivery"),
    asks("retry", "POST /commands/retry-messages", "{messages} queued again", IDS, "queue failed messages again"),
    asks(
        "delete", "POST /commands/delete-messages", "{messages} removed", IDS, "remove messages, whatever their state"
    ),
)

EXAMPLES = """\
mailproxy serve --config /etc/mailproxy/config.ini
mailproxy check --connect
mailproxy send --from shop@example.com --to jane@example.com --subject Hi --body "Thank you!"
mailproxy send --from a@x.example --to b@x.example --subject May --attach may.pdf --body - < text
mailproxy send newsletter.eml --to jane@example.com --id newsletter-7-jane
mailproxy send --csv people.csv --from shop@example.com --subject News --body - < news.txt
mailproxy sendmail -t -i < message
mailproxy backup /var/backups/mailproxy.db
mailproxy import mailproxy.db --config /etc/mailproxy/config.ini
mailproxy status --json | jq .pending
mailproxy messages --status error
mailproxy messages --to ann@example.net --since 1d
mailproxy messages --follow
mailproxy messages --status error --json | jq -r '.messages[].id' | xargs mailproxy retry
mailproxy message invoice-4711
mailproxy message invoice-4711 --eml > invoice.eml
mailproxy suspend --account billing
mailproxy activate --account billing
mailproxy retry invoice-4711 invoice-4712
mailproxy delete invoice-4711"""

OVERVIEW = """usage: mailproxy COMMAND [OPTION ...]

A small daemon between an application and its SMTP servers.

commands:
{commands}

for a start:
  mailproxy demo                        five messages, from REST to report, on this machine
  mailproxy serve --set smtp.host=mail.example.com --set smtp.port=587
  mailproxy help COMMAND                the options of a command, with examples
  ln -s /opt/mailproxy/mailproxy.pyz /usr/sbin/sendmail

exit status: 0 done, 1 failed, 2 usage or configuration"""


def parsed(words: Sequence[str]) -> tuple[Command, argparse.Namespace]:
    """The command that the words mean, and its options. Exits with 0 after its help, with 2 for a mistake."""
    import argparse

    command = next((command for command in COMMANDS if command.name == words[0]), None)
    if command is None:
        near = nearest(words[0], [command.name for command in COMMANDS])
        raise ConfigurationError(f'unknown command "{words[0]}"{near}; see mailproxy help')

    known = [name for names, _ in command.options for name in names]

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            unknown = re.match("unrecognized arguments: (--[^ =]+)", message)
            near = nearest(unknown[1], known) if unknown else ""
            complain(f"{message}{near}; see {self.prog} --help")
            sys.exit(2)

    examples = [line for line in EXAMPLES.splitlines() if line.split()[1] == command.name]
    parser = Parser(
        prog=f"mailproxy {command.name}",
        description=f"{command.meaning[0].upper()}{command.meaning[1:]}.",
        epilog="\n  ".join(("examples:", *(examples or [f"mailproxy {command.name}"]))),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for names, how in command.options:
        parser.add_argument(*names, **how)
    return command, parser.parse_args(words[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of these words, or of those that the program was called with, its failure made a sentence; return
    its exit status."""
    try:
        if argv is None and callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")  # a subject need not fit the terminal's characters
        words = [*AS_CALLED.get(os.path.basename(sys.argv[0]), ()), *sys.argv[1:]] if argv is None else argv
        status = 0 if words else 2
        match words:
            case [] | ["-h" | "--help" | "help"]:
                commands = "\n".join(f"    {command.name:<10} {command.meaning}" for command in COMMANDS)
                print(OVERVIEW.format(commands=commands), file=sys.stdout if words else sys.stderr)
            case ["--version"]:
                print(f"mailproxy {__version__}")
            case ["sendmail", *options] if options not in (["-h"], ["--help"]):  # they are not argparse's
                status = sendmail(options, os.environ)
            case ["help", name, *_]:
                parsed([name, "--help"])
            case _:
                command, args = parsed(words)
                status = command.run(args, os.environ)
        print(end="", flush=True)
        return status
    except KeyboardInterrupt:
        return 130  # as a shell has it: 128 and SIGINT
    except OSError as error:  # of stdout: what is still in its buffer goes nowhere, without a complaint at exit
        with contextlib.suppress(OSError, ValueError, AttributeError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141  # 128 and SIGPIPE
        complain(error.strerror or error)
        return 1
    except Exception as error:
        complain(error if isinstance(error, MailproxyError) else f"internal error: {type(error).__name__}: {error}")
        return 2 if isinstance(error, ConfigurationError) else 1
    finally:
        if argv is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was to be done is done


if __name__ == "__main__":
    sys.exit(main())
