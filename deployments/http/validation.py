"""Pydantic's findings as one `Fault` that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deployments.calls import Fault
from deployments.http.wire import Body, shown

_FIELD = re.compile(r"[a-z][a-z0-9_]*")
_UNION_BRANCHES = frozenset({"str", "int", "float", "bool", "list", "dict", "constrained"})
_MAX_NAME = 100  # characters of an unknown field's
_SAYS_ITSELF = frozenset({"missing", "value_error", "wrong_value", "unsupported_parameter"})
_WRAPPERS = frozenset({"body", "query", "path", "header", "parameters"})


def fault_of_validation(errors: Sequence[Mapping[str, Any]], model: type[Any] | None = None) -> Fault:
    """The first finding; the findings of the other branches of its union, if it has any, are told with it.

    `model`: what was read, for a hint at the field that an unknown one may have been meant to be.
    """
    first = errors[0]
    kind = first["type"]
    if kind == "extra_forbidden":
        return _unknown(first["loc"], model)
    param = _param(first["loc"])
    if param is None:
        return Fault(code="invalid_request", message=f"the body cannot be read as a JSON object: {first['msg']}")
    top = re.split(r"[.\[]", param)[0]
    messages = [str(error["msg"]) for error in errors if (_param(error["loc"]) or "").startswith(top)]
    message = " / ".join(dict.fromkeys(messages)) + _given(first)
    code = "unsupported_parameter" if kind == "unsupported_parameter" else "invalid_request"
    return Fault(code=code, message=f"{param}: {message}", param=param)


def _unknown(loc: Sequence[str | int], model: type[Any] | None) -> Fault:
    name = _cut(str(loc[-1]))
    outer = _param(loc[:-1])
    nearest = model.nearest(name) if outer is None and isinstance(model, type) and issubclass(model, Body) else None
    param = name if outer is None else f"{outer}.{name}"
    remedy = f"did you mean {nearest!r}?" if nearest else "leave it out"
    return Fault(code="unknown_parameter", message=f"unknown field {param!r}; {remedy}", param=param)


def _cut(name: str) -> str:
    """What a caller calls a field may be of any length."""
    return name if len(name) <= _MAX_NAME else name[:_MAX_NAME] + "…"


def _given(error: Mapping[str, Any]) -> str:
    """What was sent instead. Our own checks say it themselves; of a missing field there is nothing to tell."""
    return "" if error["type"] in _SAYS_ITSELF or "input" not in error else f", not {shown(error['input'])}"


def _param(loc: Sequence[str | int]) -> str | None:
    """`("body", "messages", 0, "content", "str")` as `messages[0].content`; None for the body itself."""
    parts = list(loc)
    while parts and parts[0] in _WRAPPERS and len(parts) > 1:
        parts.pop(0)
    text = ""
    for part in (part if isinstance(part, int) else _cut(part) for part in parts):
        if isinstance(part, int):
            text += f"[{part}]"
        elif _FIELD.fullmatch(part) and part not in _UNION_BRANCHES:
            text += f".{part}" if text else part
        elif part not in _UNION_BRANCHES and "[" not in part:
            text += f"[{part!r}]"  # a key of a mapping
    return None if text in ("", "body") else text
