"""Calls as Qwen 3 Coder writes them: a function and its parameters as elements, their values as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from deployments.dialects.calls import MarkedReader
from deployments.dialects.events import Arguments, Begin, Event

_FUNCTION = re.compile(r"\s*<function=([^>\n]+)>(.*?)(?:</function>\s*|\s*)\Z", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None, "null": None}


class QwenCoderReader(MarkedReader):
    """`<tool_call><function=f><parameter=a>1</parameter></function></tool_call>`, typed by the tool's schema."""

    opening, closing = "<tool_call>", "</tool_call>"

    def __init__(self, tools: Mapping[str, Any]) -> None:
        """`tools`: the schema of each one's parameters, by its name."""
        super().__init__()
        self._tools = tools

    def _calls(self, body: str) -> list[Event] | None:
        function = _FUNCTION.match(body)
        if function is None:
            return None
        name = function[1].strip()
        schema = self._tools.get(name)
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        types: Mapping[str, Any] = properties if isinstance(properties, Mapping) else {}
        arguments = {key.strip(): _typed(text, types.get(key.strip())) for key, text in _PARAMETER.findall(function[2])}
        return [Begin(name), Arguments(json.dumps(arguments, ensure_ascii=False))]


def _typed(text: str, schema: Any) -> Any:
    """A value of the type that its schema says; a text where it says none, or the value is none of that type."""
    told = schema.get("type") if isinstance(schema, Mapping) else None
    types = [told] if isinstance(told, str) else told if isinstance(told, list) else []
    if not types and isinstance(schema, Mapping) and isinstance(branches := schema.get("anyOf"), list):
        types = [branch.get("type") for branch in branches if isinstance(branch, Mapping)]
    if not types or types == ["string"]:
        return text
    word = text.strip().lower()
    if word in _WORDS and _is(_WORDS[word], types):
        return _WORDS[word]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if _is(value, types) else text


def _is(value: Any, types: list[Any]) -> bool:
    kinds: dict[str, tuple[type, ...]] = {
        "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
        "object": (dict,), "array": (list,),
    }  # fmt: skip
    return any(
        isinstance(value, kinds.get(kind, ())) and (kind == "boolean" or not isinstance(value, bool)) for kind in types
    )
