"""A GrammarSpec in llguidance's own language: JSON text that lists grammars.

llguidance (https://github.com/guidance-ai/llguidance, MIT) reads JSON Schema, regular expressions and Lark.
"""

from __future__ import annotations

import json

from engine.grammar import tags
from engine.grammar.spec import MAX_CHOICES, GrammarSpec


def source(spec: GrammarSpec) -> str:
    """Raises: ValueError, RecursionError for what cannot be read."""
    from llguidance import LLMatcher

    match spec.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=tags.JSON_OPTIONS)
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(_schema(spec.text), overrides=tags.JSON_OPTIONS)
        case "regex":
            return LLMatcher.grammar_from_regex(spec.text)
        case "choice":
            return LLMatcher.grammar_from_lark(f"start: {_choices(spec.text)}")
        case "grammar":
            return LLMatcher.grammar_from_lark(_lark(spec.text))
        case "structural_tag":
            return LLMatcher.grammar_from_lark(tags.lark(json.loads(spec.text)))


def _schema(text: str) -> str:
    schema = json.loads(text)
    if not isinstance(schema, dict | bool):
        raise ValueError("a JSON Schema is an object, or true")
    if schema is False:
        raise ValueError("no answer follows the schema false")
    if schema is True:
        return "{}"
    if "x-guidance" in schema:
        raise ValueError("'x-guidance' is not a keyword of JSON Schema; leave it out")
    return text


def _choices(text: str) -> str:
    choices = json.loads(text)
    if not (isinstance(choices, list) and choices and all(isinstance(each, str) and each for each in choices)):
        raise ValueError("it is not a list of at least one text, each of at least one character")
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"{len(choices)} texts, the limit is {MAX_CHOICES}; send fewer")
    return " | ".join(map(tags.literal, choices))


def _lark(text: str) -> str:
    from llguidance.gbnf_to_lark import any_to_lark

    if not text.strip():
        raise ValueError("it is empty")
    try:
        return str(any_to_lark(text))
    except RecursionError:
        raise
    except Exception as error:  # its parser raises bare exceptions
        raise ValueError(str(error)) from error
