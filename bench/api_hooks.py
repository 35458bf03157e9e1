"""What bench/api.py has schemathesis do besides: batches with a message in them, each message a new one.

The generator finds no mail address that fits the schema, so the batches it makes up are empty or wrong; and what
was sent under an id is rightly refused the second time.
"""

from __future__ import annotations

import itertools
from typing import Any

import schemathesis

NUMBERS = itertools.count(1)
MESSAGE = {"id": "order-1", "from": "a@example.com", "to": ["ok@example.com"], "subject": "é", "text": "x"}


@schemathesis.hook
def before_call(_context: Any, case: Any, _options: Any) -> None:
    """Fills empty batches, and numbers the example of the schema."""
    body = case.body
    if case.operation.path != "/commands/add-messages" or not isinstance(body, dict):
        return
    if isinstance(messages := body.get("messages"), list):
        case.body = {**body, "messages": [numbered(message) for message in messages or [MESSAGE]]}


def numbered(message: Any) -> Any:
    if isinstance(message, dict) and message.get("id") == "order-1":
        return {**message, "id": f"order-{next(NUMBERS)}"}
    return message
