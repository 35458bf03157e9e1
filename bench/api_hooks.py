"""What bench/api.py has schemathesis do besides: a good message, each time a new one, in every batch that fits the schema.

The generator knows no mail address, so each message it makes up is rejected; and a batch of which no message can be
taken is refused as a whole.
"""

from __future__ import annotations

import itertools
from typing import Any

import schemathesis
from schemathesis import GenerationMode

NUMBERS = itertools.count(1)
MESSAGE = {"from": "a@example.com", "to": ["ok@example.com"], "subject": "é", "text": "x"}


@schemathesis.hook
def before_call(_context: Any, case: Any, _options: Any) -> None:
    if case.operation.path != "/commands/add-messages" or case.meta.generation.mode is GenerationMode.NEGATIVE:
        return
    body = case.body
    if isinstance(body, dict) and isinstance(messages := body.get("messages"), list):
        case.body = {**body, "messages": [*messages, {"id": f"order-{next(NUMBERS)}", **MESSAGE}]}
