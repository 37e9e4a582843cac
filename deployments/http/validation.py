"""Pydantic's findings as one `Fault` that names the field."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from deployments.calls import Fault
from deployments.http.wire import Body, shown

_FIELD = re.compile(r"[a-z][a-z0-9_]*")
_UNION_BRANCHES = frozenset({"str", "int", "float", "bool", "list", "dict", "constrained"})
_MAX_NAME = 100  # characters of an unknown field's
_SAYS_ITSELF = frozenset({"missing", "value_error", "wrong_value", "unsupported_parameter"})
# In place of pydantic's own words, which name our classes, round large limits, or tell no remedy.
_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "missing": "it is missing; send it",
        "model_type": "Input should be an object",
        "model_attributes_type": "Input should be an object",
        "dict_type": "Input should be an object",
        "int_parsing": "Input should be a whole number",
        "too_short": "List should have at least {min_length} item(s)",
        "too_long": "List should have at most {max_length} item(s)",
        "less_than": "Input should be less than {lt:.0f}",
        "string_pattern_mismatch": "Input should match the pattern {pattern}",
    }
)
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
        message = f"the body cannot be read: {_words(first)}{_given(first)}"
        return Fault(code="invalid_request", message=message)
    top = re.split(r"[.\[]", param)[0]
    messages = [_words(error) for error in errors if (_param(error["loc"]) or "").startswith(top)]
    message = " / ".join(dict.fromkeys(messages)) + _given(first)
    code = "unsupported_parameter" if kind == "unsupported_parameter" else "invalid_request"
    return Fault(code=code, message=f"{param}: {message}", param=param)


def _words(error: Mapping[str, Any]) -> str:
    text = _WORDS.get(error["type"])
    return str(error["msg"]) if text is None else text.format_map(error.get("ctx", {}))


def _unknown(loc: Sequence[str | int], model: type[Any] | None) -> Fault:
    name = cut(str(loc[-1]))
    outer = _param(loc[:-1])
    nearest = model.nearest(name) if outer is None and isinstance(model, type) and issubclass(model, Body) else None
    param = name if outer is None else f"{outer}.{name}"
    remedy = f"did you mean {nearest!r}?" if nearest else "leave it out"
    return Fault(code="unknown_parameter", message=f"unknown field {param!r}; {remedy}", param=param)


def cut(name: str) -> str:
    """What a caller calls a field, or asks for, may be of any length."""
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
    for part in (part if isinstance(part, int) else cut(part) for part in parts):
        if isinstance(part, int):
            text += f"[{part}]"
        elif _FIELD.fullmatch(part) and part not in _UNION_BRANCHES:
            text += f".{part}" if text else part
        elif part not in _UNION_BRANCHES and "[" not in part:
            text += f"[{part!r}]"  # a key of a mapping
    return None if text in ("", "body") else text
