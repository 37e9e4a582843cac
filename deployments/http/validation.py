"""Pydantic's findings as one `Fault` that names the field."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.calls import Fault

_FIELD = re.compile(r"[a-z][a-z0-9_]*")
_UNION_BRANCHES = frozenset({"str", "int", "float", "bool", "list", "dict", "constrained"})
_MAX_SHOWN = 60  # characters of a wrong value
_WRAPPERS = frozenset({"body", "query", "path", "header", "parameters"})


def fault_of_validation(errors: Sequence[Mapping[str, Any]]) -> Fault:
    """The first finding; the findings of the other branches of its union, if it has any, are told with it."""
    first = errors[0]
    kind = first["type"]
    if kind == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return Fault(code="invalid_request", message=f"the body is not valid JSON: {reason}")
    param = _param(first["loc"])
    if param is None:
        return Fault(code="invalid_request", message=f"the body cannot be read as a JSON object: {first['msg']}")
    if kind == "extra_forbidden":
        return Fault(code="unknown_parameter", message=f"unknown field {param!r}; leave it out", param=param)
    top = re.split(r"[.\[]", param)[0]
    messages = [str(error["msg"]) for error in errors if (_param(error["loc"]) or "").startswith(top)]
    message = " / ".join(dict.fromkeys(messages)) + _given(first)
    code = "unsupported_parameter" if kind == "unsupported_parameter" else "invalid_request"
    return Fault(code=code, message=f"{param}: {message}", param=param)


def _given(error: Mapping[str, Any]) -> str:
    """What was sent instead. Our own checks say it themselves; of a missing field there is nothing to tell."""
    if error["type"] in ("missing", "value_error", "unsupported_parameter") or "input" not in error:
        return ""
    text = json.dumps(error["input"], ensure_ascii=False, default=repr)
    return f", not {text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + '…'}"


def _param(loc: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "content", "str")` as `messages[0].content`; None for the body itself."""
    parts = list(loc)
    while parts and parts[0] in _WRAPPERS and len(parts) > 1:
        parts.pop(0)
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif _FIELD.fullmatch(part) and part not in _UNION_BRANCHES:
            text += f".{part}" if text else part
        elif part not in _UNION_BRANCHES and "[" not in part:
            text += f"[{part!r}]"  # a key of a mapping
    return None if text in ("", "body") else text
