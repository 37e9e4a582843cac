"""Structural tags: text in which parts between tags follow a schema each. To Lark, as llguidance reads it.

Two forms, as vLLM and SGLang take them. The older one:

    {"structures": [{"begin": "<f>", "schema": {...}, "end": "</f>"}, ...], "triggers": ["<f"]}

is any text, in which a trigger begins one of the structures that begin so. The newer one (xgrammar's) is {"format": F}:

    const_string value · json_schema json_schema · regex pattern · grammar grammar (Lark) · any_text
    sequence elements · or elements · tag begin, content, end
    triggered_tags triggers, tags, at_least_one, stop_after_first
    tags_with_separator tags, separator, at_least_one, stop_after_first

Nothing else is read; what is not known is refused by its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Between the parts of a JSON text there is at most one space, as in Outlines: where more is allowed, a model that has
# begun to write spaces goes on with them until max_tokens.
JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": " "}
MAX_TAGS = 256
_TEXT = r"/(.|\n)*/"
_SLASH = re.compile(r"(?<!\\)/")


def literal(text: str) -> str:
    """Lark's literal of a text that is not empty."""
    return json.dumps(text, ensure_ascii=False)


def lark(asked: Any) -> str:
    """Raises: ValueError naming what is wrong."""
    if not isinstance(asked, dict):
        raise ValueError("a structural tag is an object")
    if "format" in asked:
        return _Writer().whole(asked["format"])
    tags = [
        {"type": "tag", "begin": each["begin"], "end": each["end"], "content": _content(each.get("schema", True))}
        for each in _objects(asked.get("structures"), "structures", ("begin", "end"))
    ]
    return _Writer().whole({"type": "triggered_tags", "triggers": asked.get("triggers"), "tags": tags})


def _content(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": schema}


def _objects(value: Any, name: str, fields: Iterable[str] = ()) -> list[dict[str, Any]]:
    if not (isinstance(value, list) and value and all(isinstance(each, dict) for each in value)):
        raise ValueError(f"{name} is not a list of at least one object")
    if len(value) > MAX_TAGS:
        raise ValueError(f"{len(value)} {name}, the limit is {MAX_TAGS}; send fewer")
    for each in value:
        for field in fields:
            _string(each, field)
    return value


def _string(value: dict[str, Any], field: str) -> str:
    text = value.get(field)
    if not isinstance(text, str):
        raise ValueError(f"{field!r} is missing, or not a text")
    return text


def _flag(value: dict[str, Any], field: str) -> bool:
    flag = value.get(field, False)
    if not isinstance(flag, bool):
        raise ValueError(f"{field!r} is neither true nor false")
    return flag


class _Writer:
    """Rules of one grammar. Each format becomes an expression, which may name rules written before it."""

    def __init__(self) -> None:
        self._rules: list[str] = []
        self._formats: dict[str, Callable[[dict[str, Any]], str]] = {
            "const_string": lambda f: literal(_string(f, "value")) if _string(f, "value") else '""',
            "json_schema": self._json,
            "regex": lambda f: self._terminal(_regex(_string(f, "pattern"))),
            "grammar": self._nested,
            "any_text": lambda f: self._terminal(_TEXT),
            "sequence": lambda f: " ".join(map(self._rule, _objects(f.get("elements"), "elements"))),
            "or": lambda f: " | ".join(map(self._rule, _objects(f.get("elements"), "elements"))),
            "tag": self._tag,
            "triggered_tags": self._triggered,
            "tags_with_separator": self._separated,
        }

    def whole(self, asked: Any) -> str:
        start = self._expression(asked)
        return "\n".join(["%llguidance {}", f"start: {start}", *self._rules])

    def _expression(self, asked: Any) -> str:
        if not isinstance(asked, dict):
            raise ValueError("a format is an object with a type")
        write = self._formats.get(_string(asked, "type"))
        if write is None:
            raise ValueError(f"the format {asked['type']!r} is not known; known are {', '.join(self._formats)}")
        return write(asked)

    def _rule(self, asked: Any) -> str:
        return self._named(self._expression(asked))

    def _named(self, expression: str, mark: str = "") -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{mark}: {expression}")
        return name

    def _terminal(self, expression: str) -> str:
        name = f"T{len(self._rules)}"
        self._rules.append(f"{name}: {expression}")
        return name

    def _json(self, asked: dict[str, Any]) -> str:
        schema = asked.get("json_schema", True)
        if not isinstance(schema, dict | bool):
            raise ValueError("a JSON Schema is an object, or true")
        if schema is False:
            raise ValueError("no answer follows the schema false")
        told = {**({} if schema is True else schema), "x-guidance": JSON_OPTIONS}
        return f"%json {json.dumps(told, ensure_ascii=False)}"

    def _nested(self, asked: dict[str, Any]) -> str:
        raise ValueError("a grammar inside a structural tag is not followed; send a json_schema or a regex")

    def _tag(self, asked: dict[str, Any]) -> str:
        begin, end = _string(asked, "begin"), _string(asked, "end")
        return self._body(begin, asked.get("content"), end)

    def _body(self, begin: str, content: Any, end: str) -> str:
        parts = [literal(begin) if begin else "", self._rule(content), literal(end) if end else ""]
        return " ".join(part for part in parts if part)

    def _tags(self, asked: dict[str, Any]) -> list[dict[str, Any]]:
        return _objects(asked.get("tags"), "tags", ("begin", "end"))

    def _triggered(self, asked: dict[str, Any]) -> str:
        triggers = asked.get("triggers")
        if not (isinstance(triggers, list) and triggers and all(isinstance(each, str) and each for each in triggers)):
            raise ValueError("triggers is not a list of at least one text")
        if len(triggers) > MAX_TAGS:
            raise ValueError(f"{len(triggers)} triggers, the limit is {MAX_TAGS}; send fewer")
        tags = self._tags(asked)
        options: list[str] = []
        for trigger in triggers:
            bodies = [
                self._body(tag["begin"][len(trigger) :], tag.get("content"), tag["end"])
                for tag in tags
                if tag["begin"].startswith(trigger)
            ]
            if not bodies:
                raise ValueError(f"no tag begins with the trigger {trigger!r}")
            body = self._named(" | ".join(self._named(each) for each in bodies))
            head = self._named(f"{_TEXT} {literal(trigger)}", "[lazy]")
            options.append(self._named(f"{head} {body}"))
        for tag in tags:
            if not any(tag["begin"].startswith(trigger) for trigger in triggers):
                raise ValueError(f"no trigger begins the tag {tag['begin']!r}")
        one = self._named(" | ".join(options))
        if _flag(asked, "stop_after_first"):
            return one if _flag(asked, "at_least_one") else f"{one} | {self._terminal(_TEXT)}"
        return f"{one}{'+' if _flag(asked, 'at_least_one') else '*'} {self._terminal(_TEXT)}"

    def _separated(self, asked: dict[str, Any]) -> str:
        separator = _string(asked, "separator")
        one = self._named(" | ".join(map(self._rule, self._tags(asked))))
        more = self._named(f"{literal(separator)} {one}" if separator else one)
        several = one if _flag(asked, "stop_after_first") else f"{one} {more}*"
        return several if _flag(asked, "at_least_one") else f"({several})?"


def _regex(pattern: str) -> str:
    """Lark's literal of a regular expression: a slash that is not escaped would end it."""
    if not pattern:
        return '""'
    escaped = _SLASH.sub(r"\\/", pattern).replace("\n", r"\n")
    return f"/{escaped}/"
