"""A queue file with a past: a million scheduled messages, 200,000 sent ones, 100,000 ready ones.

The daemon itself makes one message of each kind; SQL multiplies their rows, so that the file is what the
program of today would have written, whatever its schema. Building takes a minute or two, so it is kept in a
temporary folder (mailproxy-bench-cache) until the schema changes.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import load
from rig import BenchError, Companion, Daemon, Postgres
from sinks import Manner, serve_reports, serve_smtp

YEAR_S = 365 * 86_400
KEPT_FOR_EVER = {"delivery_report_retention_seconds": 10 * YEAR_S, "max_age_seconds": 10 * YEAR_S}


class Rows(NamedTuple):
    scheduled: int = 1_000_000
    sent: int = 200_000
    ready: int = 100_000

    def shown(self) -> str:
        return f"{self.scheduled:,} scheduled + {self.sent:,} sent + {self.ready:,} ready"


def sections(smtp_port: int, reports_port: int) -> dict[str, dict[str, object]]:
    """A daemon that keeps what it has, and delivers only when told to."""
    return {
        "smtp": {"host": "127.0.0.1", "port": smtp_port, "start_tls": "never", "max_connections": 16},
        "client": {"client_sync_url": f"http://127.0.0.1:{reports_port}/"},
        "delivery": KEPT_FOR_EVER,
        "scheduler": {"active": "false"},
        "attachments": {"allow_hosts": "127.0.0.1"},
    }


def prepared(rows: Rows, scratch: Path) -> Path:
    """A copy of the file in the scratch folder, made from the cache."""
    template = scratch / "template"
    templates = made_by_the_daemon(template)
    cache = Path(tempfile.gettempdir()) / "mailproxy-bench-cache"
    cache.mkdir(exist_ok=True)
    kept = cache / f"{'-'.join(map(str, rows))}-{fingerprint(templates)}.db"
    if not kept.exists():
        multiply(templates, rows)
        shutil.move(templates, kept)
    copy = scratch / "backlog.db"
    shutil.copyfile(kept, copy)
    return copy


def made_by_the_daemon(folder: Path, **storage: object) -> Path:
    """A queue file (or what `storage` says) with three messages: scheduled, sent and reported, ready."""
    with Companion(serve_smtp, Manner()) as sink, Companion(serve_reports) as receiver:
        with Daemon(folder, {**sections(sink.port, receiver.port), "storage": storage}) as daemon:
            daemon.submit([load.message("sent")])
            daemon.command("activate")
            daemon.wait_for_status(lambda status: status["pending"] == status["unreported"] == 0, 30)
            daemon.command("suspend")
            in_a_year = int(time.time()) + YEAR_S
            daemon.submit([load.message("scheduled", deferred_ts=in_a_year), load.message("ready")])
    return daemon.db


def fingerprint(db: Path) -> str:
    with contextlib.closing(sqlite3.connect(db)) as connection:
        schema = repr(connection.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall())
    return hashlib.sha256(schema.encode()).hexdigest()[:12]


def multiply(db: Path, rows: Rows) -> None:
    with contextlib.closing(sqlite3.connect(db, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = OFF")
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA cache_size = -500000")
        connection.execute("BEGIN")
        later = {"deferred_ts": "deferred_ts + n % 1000000", "expires_ts": "expires_ts + n % 1000000"}
        copy_message(connection, "scheduled", rows.scheduled, later)
        earlier = {"sent_ts": "sent_ts - n % 100000", "reported_ts": "reported_ts - n % 100000"}
        copy_message(connection, "sent", rows.sent, earlier)
        copy_attempts(connection)
        copy_message(connection, "ready", rows.ready, {})
        connection.execute(  # what searches look at, as of batches of a hundred
            "INSERT INTO sought SELECT max(seq), min(seq), created_at, "
            "group_concat((SELECT text FROM sought LIMIT 1), char(30)) FROM messages "
            "WHERE seq > (SELECT max(last_seq) FROM sought) GROUP BY seq / 100"
        )
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL")


def copy_message(db: sqlite3.Connection, key: str, times: int, changed: Mapping[str, str]) -> None:
    """Insert the row of that id so many times again; the schema's own triggers keep the counts."""
    changed = {"id": f"'{key}-' || n", "message_id": f"'<{key}-' || n || '@bench.example>'", **changed}
    columns = [row[1] for row in db.execute("PRAGMA table_info(messages)") if row[1] != "seq"]
    values = [changed.get(column, column) for column in columns]
    statement = (
        f"INSERT INTO messages ({', '.join(columns)}) "  # noqa: S608 - names out of the schema itself
        "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < :times) "
        f"SELECT {', '.join(values)} FROM numbers, messages WHERE id = :key"
    )
    db.execute(statement, {"times": times, "key": key})


def copy_attempts(db: sqlite3.Connection) -> None:
    """Each copy of the sent message has its attempt, as the original has."""
    columns = [row[1] for row in db.execute("PRAGMA table_info(attempts)")]
    if "seq" not in columns:
        raise BenchError("the table of attempts is not what it was: copy_attempts() must learn the new schema")
    values = ["copy.seq" if column == "seq" else f"attempts.{column}" for column in columns]
    db.execute(
        f"INSERT INTO attempts ({', '.join(columns)}) SELECT {', '.join(values)} "  # noqa: S608 - as above
        "FROM messages AS original JOIN attempts ON attempts.seq = original.seq "
        "JOIN messages AS copy ON copy.id GLOB 'sent-*' WHERE original.id = 'sent'"
    )


# -- the same in PostgreSQL

COUNT_ANEW = """
    UPDATE counters SET last_seq = (SELECT max(seq) FROM messages);
    UPDATE tallies SET (ready, waiting) = (
        SELECT count(*) FILTER (WHERE deferred_ts IS NULL), count(deferred_ts) FROM messages
        WHERE messages.account_id = tallies.account_id AND sent_ts IS NULL AND error_ts IS NULL
    );
    INSERT INTO sought SELECT max(seq), min(seq), min(created_at),
            string_agg((SELECT text FROM sought ORDER BY last_seq LIMIT 1), chr(30))
        FROM messages WHERE seq > (SELECT max(last_seq) FROM sought) GROUP BY seq / 100;
"""


def made_in(database: Postgres, rows: Rows, scratch: Path) -> str:
    """A database with the same rows; its name."""
    name = database.new_database()
    made_by_the_daemon(scratch, db_path=database.url(name))
    statements = [
        multiplied(database, name, "scheduled", rows.scheduled, {
            "deferred_ts": "deferred_ts + n % 1000000", "expires_ts": "expires_ts + n % 1000000",
        }),
        multiplied(database, name, "sent", rows.sent, {
            "sent_ts": "sent_ts - n % 100000", "reported_ts": "reported_ts - n % 100000",
        }),
        multiplied(database, name, "attempts", rows.sent, {}),
        multiplied(database, name, "ready", rows.ready, {}),
    ]  # fmt: skip
    for statement in (*statements, *COUNT_ANEW.split(";")[:-1], "VACUUM ANALYZE", "CHECKPOINT"):
        database.rows(name, statement)
    return name


def multiplied(database: Postgres, name: str, key: str, times: int, changed: Mapping[str, str]) -> str:
    """The statement that inserts the row of that id so many times again (or the attempt of each copy of `sent`)."""
    table = key if key == "attempts" else "messages"
    which = "SELECT column_name FROM information_schema.columns WHERE table_name = '{}' ORDER BY ordinal_position"
    columns = [column for (column,) in database.rows(name, which.format(table))]
    if table == "attempts":
        values = ["copy.seq" if column == "seq" else f"attempts.{column}" for column in columns]
        return (
            f"INSERT INTO attempts ({', '.join(columns)}) SELECT {', '.join(values)} "  # noqa: S608 - names of columns
            "FROM messages AS original JOIN attempts ON attempts.seq = original.seq "
            "JOIN messages AS copy ON copy.id LIKE 'sent-%' WHERE original.id = 'sent'"
        )
    changed = {
        "seq": "(SELECT max(seq) FROM messages) + n", "id": f"'{key}-' || n",
        "message_id": f"'<{key}-' || n || '@bench.example>'", **changed,
    }  # fmt: skip
    return (
        f"INSERT INTO messages ({', '.join(columns)}) SELECT {', '.join(changed.get(c, c) for c in columns)} "  # noqa: S608
        f"FROM messages, generate_series(1, {times}) AS n WHERE id = '{key}'"
    )
