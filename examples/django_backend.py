"""A Django e-mail backend: send_mail() and EmailMessage.send() go into mailproxy's durable queue.

Needs Django (5.2, 6.0 and 6.1 were tried) and nothing else. Put this file on the Python path; in settings.py of Django 6.1:

    MAILERS = {
        "default": {
            "BACKEND": "django_backend.MailproxyBackend",
            "OPTIONS": {
                "url": "http://127.0.0.1:8000",     # the default
                "token": "...",                     # when mailproxy has an api_token
                "account": "shop",                  # when not the default account
            },
        },
    }

and of an older one, or of 6.1 without MAILERS:

    EMAIL_BACKEND = "django_backend.MailproxyBackend"
    MAILPROXY_URL = "http://127.0.0.1:8000"
    MAILPROXY_TOKEN = "..."
    MAILPROXY_ACCOUNT = "shop"

Messages are handed over exactly as Django's own SMTP backend would send them (attachments,
alternatives, inline parts, headers, Reply-To), and the envelope names all recipients, Bcc included.
When send() returns, the mail is on disk.

Each message has an id at mailproxy, and the same id is never sent twice. A call that fails may be
repeated with the same message object: the id stays until mailproxy has answered. To choose it
yourself, so that an order is confirmed once whatever happens, and to find it in delivery reports:

    message = EmailMessage(...)
    message.mailproxy_id = f"order-{order.pk}-confirmation"

What is refused is a MailproxyError; its `refused` says why, by id:

    except MailproxyError as error:
        for message_id, entry in error.refused.items():
            logger.error("%s: %s", message_id, entry["reason"])     # for people; entry["code"] is for programs
"""

from __future__ import annotations

import base64
import email.policy
import http.client
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import django
from django.conf import settings
from django.core.mail import EmailMessage
from django.core.mail.backends.base import BaseEmailBackend

TIMEOUT_S = 10
TRIES = 3  # of one submission whose answer does not come
PAUSE_S = 0.2
BATCH = 500  # most messages of one submission; mailproxy takes 1,000
BATCH_BYTES = 32 * 1024 * 1024  # ... and its most bytes, a single large message apart; mailproxy takes 64 MiB
# Who submits a message again is told that it is `known`. Django writes it anew for each sending (Date, boundaries): then it is
# another message with the same id, and these codes of a refusal say that the first one is on its way.
ALREADY_THERE = ("already_sent", "in_delivery")


class MailproxyError(OSError):
    """Some messages were not accepted: `refused` has those that never will be as they are, each with `reason` and `code`.

    An OSError, as what the SMTP backend raises is one.
    """

    def __init__(self, sentence: str, refused: dict[str, dict[str, Any]] | None = None) -> None:
        super().__init__(sentence)
        self.refused = refused or {}


class MailproxyBackend(BaseEmailBackend):
    """Hands messages to mailproxy, which delivers them."""

    def __init__(
        self,
        fail_silently: bool = False,
        *,
        url: str | None = None,
        token: str | None = None,
        account: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.fail_silently = fail_silently
        self.url = url or getattr(settings, "MAILPROXY_URL", "http://127.0.0.1:8000")
        self.token = token or getattr(settings, "MAILPROXY_TOKEN", "")
        self.account = account or getattr(settings, "MAILPROXY_ACCOUNT", None)

    def send_messages(self, email_messages: Sequence[EmailMessage]) -> int:
        """Submit the messages; return how many were accepted.

        Raises MailproxyError for the others, unless told to fail silently.
        """
        accepted, problems, refused = 0, [], {}
        common = {"account_id": self.account} if self.account else {}
        for batch in batches([message for message in email_messages if message.recipients()]):
            try:
                refused_here = self.submit([common | submission for _, submission in batch])
            except MailproxyError as error:
                problems.append(str(error))
                continue
            accepted += len(batch) - len(refused_here)
            problems += [f"{message_id}: {entry['reason']}" for message_id, entry in refused_here.items()]
            refused |= refused_here
            forget_ids([message for message, _ in batch])
        if problems and not self.fail_silently:
            raise MailproxyError("; ".join(problems), refused)
        return accepted

    def submit(self, messages: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Submit until there is an answer; return the refusals, by id. Raises MailproxyError."""
        body = json.dumps({"messages": messages}).encode()
        for remaining in reversed(range(TRIES)):
            try:
                answer = self.post(body)
                break
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not remaining:
                    raise MailproxyError(f"mailproxy cannot be reached: {error}") from None
                time.sleep(PAUSE_S)
        if "rejected" not in answer:
            raise MailproxyError(f"mailproxy takes nothing: {answer.get('error')} ({answer.get('code')})")
        return {entry["id"]: entry for entry in answer["rejected"] if entry["code"] not in ALREADY_THERE}

    def post(self, body: bytes) -> dict[str, Any]:
        """mailproxy's answer. Raises OSError where asking again may help: there was none, or 5xx."""
        headers = {"Content-Type": "application/json", "X-API-Token": self.token}
        request = urllib.request.Request(f"{self.url.rstrip('/')}/commands/add-messages", body, headers)
        straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
        try:
            with straight.open(request, timeout=TIMEOUT_S) as answer:
                return dict(json.load(answer))
        except urllib.error.HTTPError as error:
            with error:  # it holds the connection
                status, content = error.code, error.read()
        if status >= 500:
            raise OSError(f"HTTP {status}")
        return dict(json.loads(content))


def batches(messages: Sequence[EmailMessage]) -> Iterator[list[tuple[EmailMessage, dict[str, Any]]]]:
    """The messages beside what is submitted of them, in portions that mailproxy takes."""
    batch: list[tuple[EmailMessage, dict[str, Any]]] = []
    size_bytes = 0
    for message in messages:
        submission = submission_of(message)
        size_bytes += len(submission["raw"])
        if batch and (len(batch) == BATCH or size_bytes > BATCH_BYTES):
            yield batch
            batch, size_bytes = [], len(submission["raw"])
        batch.append((message, submission))
    if batch:
        yield batch


def submission_of(message: EmailMessage) -> dict[str, Any]:
    """The message as it is on the wire, with its envelope."""
    raw = base64.b64encode(as_on_the_wire(message)).decode()
    return {"id": id_of(message), "from": message.from_email, "to": message.recipients(), "raw": raw}


def as_on_the_wire(message: EmailMessage) -> bytes:
    """The bytes that Django's own SMTP backend sends: Django 6 writes line ends inside of encoded texts by the policy."""
    if django.VERSION < (6, 0):
        return bytes(message.message().as_bytes(linesep="\r\n"))
    return bytes(message.message(policy=email.policy.SMTP).as_bytes())


def id_of(message: EmailMessage) -> str:
    """The id the application gave the message, or one of ours that stays with it until it is submitted."""
    if chosen := getattr(message, "mailproxy_id", None):
        return str(chosen)
    if not hasattr(message, "_mailproxy_own_id"):
        message._mailproxy_own_id = f"django-{uuid.uuid4()}"
    return str(message._mailproxy_own_id)


def forget_ids(messages: Sequence[EmailMessage]) -> None:
    """Sent once more on purpose, the same object is another mail."""
    for message in messages:
        vars(message).pop("_mailproxy_own_id", None)
