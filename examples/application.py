"""An application that sends mail through mailproxy so that none is lost and none is sent twice.

Needs Python 3.11 and nothing else. The pattern:

1. The mail is written into the application's own table, in the transaction of what it is about.
   Nothing else has to work at that moment: not mailproxy, not the network.
2. It is submitted at once where possible. Its key in the table is its id at mailproxy, so submitting
   it again after an answer that got lost does no harm.
3. mailproxy calls `/proxy_sync` with what became of it, and at least every few minutes with nothing;
   what could not be submitted before is submitted from inside that call.

Try it with a mailproxy on this machine whose config.ini says:

    [client]
    client_sync_url = http://127.0.0.1:8080/proxy_sync
    client_sync_secret = whsec_dGhpcyBpcyBhIHNlY3JldCBmb3IgYSB0cnk=

    export MAILPROXY_SYNC_SECRET=whsec_dGhpcyBpcyBhIHNlY3JldCBmb3IgYSB0cnk=
    python3 application.py serve &
    python3 application.py send ann@example.net 'Your receipt' 'Thank you!'
    python3 application.py list

Also read from the environment: MAILPROXY_URL, MAILPROXY_TOKEN, APPLICATION_DB, APPLICATION_PORT,
APPLICATION_FROM.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hmac
import http.client
import http.server
import json
import os
import re
import sqlite3
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from email.message import Message
from typing import Any

URL = os.environ.get("MAILPROXY_URL", "http://127.0.0.1:8000")
TOKEN = os.environ.get("MAILPROXY_TOKEN", "")
SYNC_SECRET = os.environ.get("MAILPROXY_SYNC_SECRET", "")
DB = os.environ.get("APPLICATION_DB", "application.db")
PORT = int(os.environ.get("APPLICATION_PORT", "8080"))
FROM = os.environ.get("APPLICATION_FROM", "Shop <shop@example.com>")

TIMEOUT_S = 10
BATCH = 500  # messages of one submission; mailproxy takes 1,000
SYNC_BODY_BYTES = 16 * 1024 * 1024
TOLERANCE_S = 300  # a signature that is older, or comes from the future, is not taken

SCHEMA = """
CREATE TABLE IF NOT EXISTS mail (
    id TEXT PRIMARY KEY,
    recipient TEXT NOT NULL,
    subject TEXT NOT NULL,
    body TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'new',  -- new, submitted, rejected; then as reported: deferred, sent, error
    error TEXT,
    attempts INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS mail_new ON mail (status) WHERE status = 'new';
CREATE TABLE IF NOT EXISTS reports_taken (id TEXT PRIMARY KEY, taken_at INTEGER NOT NULL);
"""


@contextlib.contextmanager
def database() -> Iterator[sqlite3.Connection]:
    """The application's own database; what is done in the block is done as a whole or not at all."""
    with contextlib.closing(sqlite3.connect(DB, timeout=TIMEOUT_S)) as db:
        db.row_factory = sqlite3.Row
        db.executescript(SCHEMA)
        with db:
            yield db


# -- sending


def write_mail(db: sqlite3.Connection, recipient: str, subject: str, body: str) -> str:
    """Note a mail in our own table; call it in the transaction of the order it confirms."""
    mail_id = str(uuid.uuid4())
    mail = (mail_id, recipient, subject, body)
    db.execute("INSERT INTO mail (id, recipient, subject, body) VALUES (?, ?, ?, ?)", mail)
    return mail_id


def submit_new_mail() -> int:
    """Hand mailproxy what it does not have yet; return how many messages it took.

    Raises OSError when it cannot be reached or takes nothing now: the mail stays new.
    """
    taken = 0
    while batch := new_mail():
        answer = post("/commands/add-messages", {"messages": [message(mail) for mail in batch]})
        refused = {entry["id"]: f"{entry['reason']} ({entry['code']})" for entry in answer["rejected"]}
        if answer.get("known"):  # an earlier answer got lost; nothing is sent twice
            print(f"mailproxy had it already: {', '.join(answer['known'])}", file=sys.stderr)
        note_submission([mail["id"] for mail in batch], refused)
        taken += len(batch) - len(refused)
    return taken


def new_mail() -> list[sqlite3.Row]:
    with database() as db:
        return db.execute("SELECT * FROM mail WHERE status = 'new' LIMIT ?", (BATCH,)).fetchall()


def message(mail: sqlite3.Row) -> dict[str, Any]:
    """A mail of our table as mailproxy wants it."""
    return {"id": mail["id"], "from": FROM, "to": [mail["recipient"]], "subject": mail["subject"], "body": mail["body"]}


def note_submission(ids: list[str], refused: Mapping[str, str]) -> None:
    """Mark what was submitted. A report that came in the meantime knows better and stays."""
    with database() as db:
        for mail_id in ids:
            status = "rejected" if mail_id in refused else "submitted"
            state = (status, refused.get(mail_id), mail_id)
            db.execute("UPDATE mail SET status = ?, error = ? WHERE id = ? AND status = 'new'", state)


def post(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """What mailproxy answers. Raises OSError when it did not do it."""
    headers = {"Content-Type": "application/json", "X-API-Token": TOKEN}
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), headers)
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
    try:
        with straight.open(request, timeout=TIMEOUT_S) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        with error:
            answered = error.read()
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"mailproxy does not speak to us: {error}") from None
    with contextlib.suppress(ValueError):
        refusal = json.loads(answered)
        if refusal["code"] == "all_rejected":  # each message was judged, and none was good
            return dict(refusal)
    raise OSError(f"mailproxy refuses: {answered.decode(errors='replace')[:500]}")


# -- learning what became of it


def take_report(webhook_id: str, entries: list[Mapping[str, Any]]) -> None:
    """Take over what became of our mail, once: the same report again changes nothing."""
    with database() as db:
        now = int(time.time())
        noted = db.execute("INSERT OR IGNORE INTO reports_taken VALUES (?, ?)", (webhook_id, now))
        if noted.rowcount == 0:
            return
        for entry in entries:
            state = (entry["status"], entry["error"], entry["attempts"], entry["id"])
            db.execute("UPDATE mail SET status = ?, error = ?, attempts = ? WHERE id = ? AND status != 'sent'", state)
        db.execute("DELETE FROM reports_taken WHERE taken_at < ?", (now - 30 * 86400,))


def is_signed(headers: Message, body: bytes, now: float) -> bool:
    """Whether the call comes from who has the secret, and now (Standard Webhooks 1.0.0)."""
    webhook_id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    if not re.fullmatch("[0-9]{1,12}", timestamp) or abs(now - int(timestamp)) > TOLERANCE_S:
        return False
    signed = f"{webhook_id}.{timestamp}.".encode() + body
    ours = b"v1," + base64.b64encode(hmac.digest(key_of(SYNC_SECRET), signed, "sha256"))
    given = headers.get("webhook-signature", "").encode().split()  # several while a secret is changed
    matches = [hmac.compare_digest(ours, signature) for signature in given]
    return any(matches)


def key_of(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix("whsec_"), validate=True)


class Application(http.server.BaseHTTPRequestHandler):
    """The door mailproxy comes in by: POST /proxy_sync."""

    timeout = TIMEOUT_S

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/proxy_sync":
            return self.answer(404, {"ok": False, "error": "no such page"})
        if not length.isdecimal() or int(length) > SYNC_BODY_BYTES:
            return self.answer(413, {"ok": False, "error": "too large, or of no known length"})
        body = self.rfile.read(int(length))
        if not is_signed(self.headers, body, time.time()):
            return self.answer(401, {"ok": False, "error": "the signature is missing, wrong or too old"})

        take_report(self.headers["webhook-id"], json.loads(body)["delivery_report"])
        return self.answer(200, {"ok": True, "queued": submit_if_possible()})

    def answer(self, status: int, body: Mapping[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def submit_if_possible() -> int:
    """Submit what is new; what cannot be submitted now waits for the next call of mailproxy."""
    try:
        return submit_new_mail()
    except OSError as error:
        print(f"mail waits in our table: {error}", file=sys.stderr)
        return 0


# -- the commands


def serve() -> None:
    if not SYNC_SECRET:
        sys.exit("MAILPROXY_SYNC_SECRET is not set: anybody could tell us what became of our mail.")
    submit_if_possible()
    with http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Application) as server:
        print(f"listening on http://127.0.0.1:{server.server_port}/proxy_sync", flush=True)
        server.serve_forever()


def send(recipient: str, subject: str, body: str) -> None:
    with database() as db:
        # Here the order would be written, in the same transaction.
        mail_id = write_mail(db, recipient, subject, body)
    if submit_if_possible():
        run_now()
    print(mail_id)


def run_now() -> None:
    """Have mailproxy deliver and report at once. Nothing depends on it: it would do so by itself."""
    with contextlib.suppress(OSError):
        post("/commands/run-now", {})


def show() -> None:
    with database() as db:
        for mail in db.execute("SELECT * FROM mail ORDER BY rowid"):
            print(mail["id"], mail["recipient"], mail["status"], mail["error"] or "", sep="\t")


def main() -> None:
    parser = argparse.ArgumentParser(description="A small application that sends mail through mailproxy.")
    commands = parser.add_subparsers(required=True)
    commands.add_parser("serve", help="take delivery reports").set_defaults(run=serve)
    commands.add_parser("list", help="show what became of all mail").set_defaults(run=show)
    sending = commands.add_parser("send", help="send one mail")
    for name in ("recipient", "subject", "body"):
        sending.add_argument(name)
    sending.set_defaults(run=send)
    given = vars(parser.parse_args())
    given.pop("run")(**given)


if __name__ == "__main__":
    main()
