"""Fields that say what an answer must look like, and the one GrammarSpec that they amount to."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from deployments.http.wire import Body, inert, refused
from engine.errors import InvalidRequest
from engine.grammar.spec import MAX_CHOICES, GrammarSpec

Schema = dict[str, Any] | bool
_GUIDED = "guided_* fields gave way to structured_outputs, which has"


class NamedSchema(Body):
    """`json_schema` of a response_format. An answer follows the schema whatever `strict` says."""

    name: Annotated[str | None, inert("an answer does not name its schema")] = None
    description: Annotated[str | None, inert("the model reads messages alone; tell it there")] = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: NamedSchema | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None  # of a json_object, as some clients send it
    structures: list[Any] | None = None
    triggers: list[Any] | None = None
    format: dict[str, Any] | None = None


class StructuredOutputs(Body):
    """`structured_outputs`, as vLLM has it: exactly one of the first six."""

    json_: Annotated[Schema | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)
        ]
        | None
    ) = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: dict[str, Any] | str | None = None
    disable_fallback: Annotated[bool | None, inert("there is one way to follow a grammar")] = None
    disable_any_whitespace: Annotated[bool | None, inert("there is one space at most between values")] = None
    disable_additional_properties: Annotated[Any, refused("say additionalProperties in the schema", False)] = None
    whitespace_pattern: Annotated[Any, refused("there is one space at most between values")] = None


class Formats(Body):
    """The fields, as a part of a body."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    # SGLang's.
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | Schema | None = None
    # What structured_outputs replaced.
    guided_json: Annotated[Any, refused(f"{_GUIDED} json")] = None
    guided_regex: Annotated[Any, refused(f"{_GUIDED} regex")] = None
    guided_choice: Annotated[Any, refused(f"{_GUIDED} choice")] = None
    guided_grammar: Annotated[Any, refused(f"{_GUIDED} grammar")] = None
    guided_decoding_backend: Annotated[Any, refused(f"{_GUIDED} no choice of a backend")] = None
    guided_whitespace_pattern: Annotated[Any, refused(f"{_GUIDED} no such field")] = None


def grammar_of(body: Formats) -> GrammarSpec | None:
    """What the answer must be. Raises: InvalidRequest naming the field."""
    found = [spec for spec in (_response_format(body.response_format), _structured(body.structured_outputs)) if spec]
    if body.regex is not None:
        found.append(GrammarSpec("regex", body.regex, "regex"))
    if body.ebnf is not None:
        found.append(GrammarSpec("grammar", body.ebnf, "ebnf"))
    if body.json_schema is not None:
        found.append(GrammarSpec("json_schema", as_text(body.json_schema), "json_schema"))
    if len(found) > 1:
        raise InvalidRequest(found[1].field, f"the answer has its form from {found[0].field} already; send one of them")
    return found[0] if found else None


def as_text(schema: Schema | str) -> str:
    """A schema as JSON text: its properties in their order, which is that of the answer."""
    return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)


def json_spec(schema: Schema | str | None, field: str) -> GrammarSpec:
    """Of a schema; None: any object."""
    if schema is None:
        return GrammarSpec("json_object", "", field)
    return GrammarSpec("json_schema", as_text(schema), field)


def _response_format(asked: ResponseFormat | None) -> GrammarSpec | None:
    field = "response_format"
    if asked is None:
        return None
    _check_parts(asked)
    match asked.type:
        case "text":
            return None
        case "json_object":
            return json_spec(asked.schema_, field)
        case "json_schema":
            schema = asked.json_schema.schema_ if asked.json_schema is not None else asked.schema_
            if schema is None:
                raise InvalidRequest(f"{field}.json_schema", "it has no schema; send {'schema': {...}} in it")
            return json_spec(schema, field)
        case "structural_tag":
            if asked.format is None and asked.structures is None:
                raise InvalidRequest(field, "a structural_tag has a format, or structures and triggers; send one")
            parts = {"format": asked.format, "structures": asked.structures, "triggers": asked.triggers}
            told = {name: part for name, part in parts.items() if part is not None}
            return GrammarSpec("structural_tag", json.dumps(told, ensure_ascii=False), field)


_PARTS = {
    "text": (), "json_object": ("schema",), "json_schema": ("json_schema", "schema"),
    "structural_tag": ("structures", "triggers", "format"),
}  # fmt: skip


def _check_parts(asked: ResponseFormat) -> None:
    """Nothing that it says may be for another type."""
    parts = {"json_schema": asked.json_schema, "schema": asked.schema_, "structures": asked.structures}
    parts |= {"triggers": asked.triggers, "format": asked.format}
    for name, part in parts.items():
        if part is not None and name not in _PARTS[asked.type]:
            raise InvalidRequest(f"response_format.{name}", f"it is no part of type {asked.type!r}; leave it out")


def _structured(asked: StructuredOutputs | None) -> GrammarSpec | None:
    field = "structured_outputs"
    if asked is None:
        return None
    tag = asked.structural_tag
    specs = {
        "json": asked.json_ is not None and GrammarSpec("json_schema", as_text(asked.json_), field),
        "regex": asked.regex is not None and GrammarSpec("regex", asked.regex, field),
        "choice": asked.choice is not None and GrammarSpec("choice", json.dumps(asked.choice), field),
        "grammar": asked.grammar is not None and GrammarSpec("grammar", asked.grammar, field),
        "json_object": asked.json_object is True and GrammarSpec("json_object", "", field),
        "structural_tag": tag is not None and GrammarSpec(
            "structural_tag", tag if isinstance(tag, str) else json.dumps(tag, ensure_ascii=False), field
        ),
    }  # fmt: skip
    given = [spec for spec in specs.values() if spec]
    if len(given) != 1:
        named = [name for name, spec in specs.items() if spec]
        told = f"it has {' and '.join(named)}" if named else "it says nothing"
        raise InvalidRequest(field, f"{told}; send exactly one of {', '.join(specs)}")
    return given[0]
