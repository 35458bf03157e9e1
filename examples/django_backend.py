"""A Django e-mail backend: send_mail() and EmailMessage.send() go into mailproxy's durable queue.

Needs Django (5.2 and 6.0 were tried) and nothing else. Put this file on the Python path; in settings.py:

    EMAIL_BACKEND = "django_backend.MailproxyBackend"
    MAILPROXY_URL = "http://127.0.0.1:8000"     # the default
    MAILPROXY_TOKEN = "..."                     # when mailproxy has an api_token
    MAILPROXY_ACCOUNT = "shop"                  # when not the default account

Messages are handed over exactly as Django's own SMTP backend would send them (attachments,
alternatives, inline parts, headers, Reply-To), and the envelope names all recipients, Bcc included.
When send() returns, the mail is on disk.

Each message has an id at mailproxy, and the same id is never sent twice. A call that fails may be
repeated with the same message object: the id stays until mailproxy has answered. To choose it
yourself, so that an order is confirmed once whatever happens, and to find it in delivery reports:

    message = EmailMessage(...)
    message.mailproxy_id = f"order-{order.pk}-confirmation"
"""

from __future__ import annotations

import base64
import http.client
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from django.conf import settings
from django.core.mail import EmailMessage
from django.core.mail.backends.base import BaseEmailBackend

TIMEOUT_S = 10
TRIES = 3  # of one submission whose answer does not come
PAUSE_S = 0.2
BATCH = 500  # most messages of one submission; mailproxy takes 1,000
BATCH_BYTES = 32 * 1024 * 1024  # ... and its most bytes, a single large message apart; mailproxy takes 64 MiB
ALREADY_THERE = ("already_sent", "in_delivery")  # with other bytes: Django writes a message anew for each sending


class MailproxyError(OSError):
    """Some messages were not accepted. An OSError, as what the SMTP backend raises is one."""


class MailproxyBackend(BaseEmailBackend):
    """Hands messages to mailproxy, which delivers them."""

    def send_messages(self, email_messages: Sequence[EmailMessage]) -> int:
        """Submit the messages; return how many were accepted.

        Raises MailproxyError for the others, unless told to fail silently.
        """
        accepted, problems = 0, []
        for batch in batches([message for message in email_messages if message.recipients()]):
            try:
                refused = submit([submission for _, submission in batch])
            except MailproxyError as error:
                problems.append(str(error))
                continue
            accepted += len(batch) - len(refused)
            problems += [f"{message_id}: {reason}" for message_id, reason in refused.items()]
            forget_ids([message for message, _ in batch])
        if problems and not self.fail_silently:
            raise MailproxyError("; ".join(problems))
        return accepted


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
    submission = {
        "id": id_of(message),
        "from": message.from_email,
        "to": message.recipients(),
        "raw": base64.b64encode(message.message().as_bytes()).decode(),
    }
    if account := getattr(settings, "MAILPROXY_ACCOUNT", None):
        submission["account_id"] = account
    return submission


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


def submit(messages: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Submit until there is an answer; return why messages were refused, by id. Raises MailproxyError."""
    body = json.dumps({"messages": messages}).encode()
    for remaining in reversed(range(TRIES)):
        try:
            answer = post(body)
            break
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not remaining:
                raise MailproxyError(f"mailproxy cannot be reached: {error}") from None
            time.sleep(PAUSE_S)
    if "rejected" not in answer:
        raise MailproxyError(f"mailproxy takes nothing: {answer.get('error')}")
    return {entry["id"]: entry["reason"] for entry in answer["rejected"] if entry["code"] not in ALREADY_THERE}


def post(body: bytes) -> dict[str, Any]:
    """mailproxy's answer. Raises OSError where asking again may help: there was none, or 5xx."""
    url = getattr(settings, "MAILPROXY_URL", "http://127.0.0.1:8000").rstrip("/")
    headers = {"Content-Type": "application/json", "X-API-Token": getattr(settings, "MAILPROXY_TOKEN", "")}
    request = urllib.request.Request(f"{url}/commands/add-messages", body, headers)
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever http_proxy says
    try:
        with straight.open(request, timeout=TIMEOUT_S) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        with error:
            if error.code >= 500:
                raise
            return dict(json.load(error))
