"""What the wire models of all APIs share.

Each field is honoured, or accepted where it asks for nothing that is not done anyway (and then named in the answer's
header `x-chorus-inert`), or refused by name. null means that a field was left out, of a field that is unknown too.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

INERT_HEADER = "x-chorus-inert"


class Body(BaseModel):
    """A JSON object of a request: unknown fields and wrong types are refused, never ignored or converted."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _as_sent(cls, value: Any) -> Any:
        """Without nulls, as clients write that dump whole models; and with one unknown field at most, to be told."""
        if not isinstance(value, dict):
            return value
        known = _by_wire_name(cls)
        kept = {name: item for name, item in value.items() if name in known and _says_something(known[name], item)}
        unknown = next((name for name, item in value.items() if name not in known and item is not None), None)
        return kept if unknown is None else {**kept, unknown: value[unknown]}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """What may be left out may be null too, and is told so."""
        told = handler(schema)
        whole = handler.resolve_ref_schema(told)
        required = whole.get("required", ())
        fields = whole.get("properties", {})
        whole["properties"] = {k: v if k in required else _or_null(v) for k, v in fields.items()}
        return told

    @classmethod
    def nearest(cls, name: str) -> str | None:
        """The field that `name` may have been meant to be."""
        return next(iter(difflib.get_close_matches(name[:40], _by_wire_name(cls), n=1)), None)


def _or_null(field: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema `field`, null among what it allows."""
    null = {"type": "null"}
    kinds = [*field.get("anyOf", ()), *field.get("oneOf", ())]
    takes_all = not field.keys() & {"type", "anyOf", "oneOf", "allOf", "enum", "const", "$ref"}
    if takes_all or null in kinds or None in field.get("enum", ()) or field.get("type") == "null":
        return field
    around: dict[str, Any] = {name: field[name] for name in ("title", "description", "default") if name in field}
    return {"anyOf": [{name: item for name, item in field.items() if name not in around}, null], **around}


@cache
def _by_wire_name(kind: type[Body]) -> Mapping[str, Any]:
    """Fields by what they are called in JSON."""
    return {field.alias or name: field for name, field in kind.model_fields.items()}


def _says_something(field: Any, item: object) -> bool:
    return item is not None or field.is_required()


@dataclass(frozen=True, slots=True)
class _Refused:
    reason: str
    neutral: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.neutral], "description": f"Not supported: {self.reason}."}

    def _check(self, value: object) -> object:
        if value is None or any(_is_same(value, other) for other in self.neutral):
            return value
        raise unsupported(self.reason)


def refused(reason: str, *neutral: object) -> _Refused:
    """Marks a field that is not served: only null and the `neutral` values, which ask for nothing, pass."""
    return _Refused(reason, neutral)


def _is_same(value: object, other: object) -> bool:
    """JSON has one kind of numbers, and true is none of them."""
    if isinstance(value, bool) or isinstance(other, bool):
        return value is other
    numbers = isinstance(value, int | float) and isinstance(other, int | float)
    return (numbers or type(value) is type(other)) and value == other


@dataclass(frozen=True, slots=True)
class _Inert:
    reason: str

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "description": f"Accepted, without effect: {self.reason}."}


def inert(reason: str) -> _Inert:
    """Marks a field that is accepted at any value of its type and changes nothing."""
    return _Inert(reason)


def inert_names(body: Any) -> tuple[str, ...]:
    """Fields of `body` and of the objects in it that were accepted without effect: each name once, in order."""
    return tuple(dict.fromkeys(_inert_names(body)))


def _inert_names(value: Any) -> Iterator[str]:
    if isinstance(value, list | tuple):
        for item in value if value and isinstance(value[0], Body) else ():
            yield from _inert_names(item)
    elif isinstance(value, Body):
        marked = _marked(type(value))
        for name in type(value).model_fields:
            if name not in value.model_fields_set:
                continue
            item = getattr(value, name)
            if name in marked:
                if item is not None:
                    yield name
            else:
                yield from _inert_names(item)


@cache
def _marked(kind: type[Body]) -> frozenset[str]:
    return frozenset(
        name
        for name, field in kind.model_fields.items()
        if any(isinstance(mark, _Refused | _Inert) for mark in field.metadata)
    )


def wrong(message: str) -> PydanticCustomError:
    """For validators: a value that is refused with `message`, which tells the value and what is wanted."""
    return PydanticCustomError("wrong_value", "{message}", {"message": message})


def unsupported(what: str) -> PydanticCustomError:
    """For validators: a value of a kind that is not served."""
    return PydanticCustomError("unsupported_parameter", "{reason}", {"reason": f"not supported: {what}"})


def kind_of(value: Any) -> str | None:
    """The `type` of an object, read or not yet; None where it has none, or one that is no string."""
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return kind if isinstance(kind, str) else None


def whole(value: Any) -> Any:
    """JSON has one kind of numbers: 16.0 is 16."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(whole)]


def whole_numbers(values: list[Any], what: str) -> tuple[int, ...]:
    """`values` as ints, whole floats among them. The types of a list are looked at in one pass, outside of loops."""
    kinds = set(map(type, values))
    if kinds <= {int}:
        return tuple(values)
    if kinds <= {int, float}:
        values = [whole(value) for value in values]
    for index, value in enumerate(values):
        if type(value) is not int:
            raise wrong(f"[{index}] is {shown(value)}, not {what}")
    return tuple(values)


_MAX_SHOWN = 60  # characters
_MAX_ITEMS = 8


def shown(value: Any) -> str:
    """`value` as JSON, cut to what anybody would read. Costs the same for the largest."""
    text = json.dumps(_cut(value, 3), ensure_ascii=False, default=repr)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def _cut(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return value[: _MAX_SHOWN + 1]
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        items = list(zip(range(_MAX_ITEMS), value.items(), strict=False)) if depth else ()
        return {_cut(str(key), 0): _cut(item, depth - 1) for _, (key, item) in items}
    if isinstance(value, list | tuple):
        return [_cut(item, depth - 1) for item in value[:_MAX_ITEMS]] if depth else []
    return value
