"""What /docs tells of failures: read off the table that makes the answers, so that the two cannot differ."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from deployments.calls import Fault
from deployments.errors import ANSWERS, Answer

JSON = "application/json"
EVENTS = "text/event-stream"
EXAMPLE_MESSAGE = "names the value, the limit and the remedy"

Responses = dict[int | str, dict[str, Any]]


def failures(status_of: Callable[[Answer], int], body: Callable[[Fault], dict[str, Any]]) -> Responses:
    """For OpenAPI: each status with the codes that are told by it and a body. `status_of` chooses the API's column."""
    codes: defaultdict[int, list[str]] = defaultdict(list)
    for code, answer in ANSWERS.items():
        codes[status_of(answer)].append(code)
    return {
        status: {
            "description": " · ".join(names),
            "content": {JSON: {"example": body(Fault(code=names[0], message=EXAMPLE_MESSAGE))}},
        }
        for status, names in sorted(codes.items())
    }


def answers(whole: Any, event: str | None = None) -> Responses:
    """For OpenAPI: the 200 of a route, as one object or (with `event`) as server-sent events."""
    content: dict[str, Any] = {} if whole is None else {JSON: {"example": whole}}
    if event is not None:
        content[EVENTS] = {"example": event}
    return {200: {"description": "The answer", "content": content}}
