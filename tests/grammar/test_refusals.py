"""What cannot be followed is refused by name, fast, and what can be is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.grammar.compiler import NO_GRAMMARS, Grammars
from engine.grammar.spec import MAX_CHOICES, MAX_GRAMMAR_BYTES, GrammarSpec, Kind
from engine.request import SamplingParams
from engine.text.tokenizer import Tokenizer
from tests.support.tiny_model import make_tokenizer
from tests.text import tokenizers_for_tests as zoo

TOKENIZER = Tokenizer(make_tokenizer())
EOS = 258
GRAMMARS = Grammars(TOKENIZER, TOKENIZER.vocab_size, [EOS])


def _nested(levels: int) -> str:
    return '{"items":' * levels + "true" + "}" * levels


def _tag(**fields: Any) -> str:
    return json.dumps({"format": fields})


REFUSED: list[tuple[Kind, str, str]] = [
    ("json_schema", "[1]", "an object"),
    ("json_schema", "{", "line 1 column 2"),
    ("json_schema", '{"type": "object", "not": {}}', "not"),
    ("json_schema", '{"uniqueItems": true, "type": "array"}', "uniqueItems"),
    ("json_schema", '{"type": "strin"}', "strin"),
    ("json_schema", '{"type": "integer", "minimum": 5, "maximum": 1}', "minimum"),
    ("json_schema", '{"$ref": "http://elsewhere/x"}', "elsewhere"),
    ("json_schema", '{"type": "string", "pattern": "^(?=a)b"}', "look-around|regex"),
    ("json_schema", '{"x-guidance": {"lenient": true}, "not": {}}', "x-guidance"),
    ("json_schema", _nested(3000), "deep"),
    ("json_schema", "false", "false"),
    ("regex", "(a", "regex"),
    ("regex", r"(a)\1", "regex"),
    ("regex", r"\bx", "lookaround"),
    ("choice", "[]", "at least one"),
    ("choice", '["a", ""]', "at least one"),
    ("choice", json.dumps(["a"] * (MAX_CHOICES + 1)), str(MAX_CHOICES)),
    ("grammar", "", "empty"),
    ("grammar", "start: missing", "missing"),
    ("grammar", "root ::= missing", "missing"),
    ("structural_tag", "{}", "structures"),
    ("structural_tag", _tag(type="dance"), "dance"),
    ("structural_tag", _tag(type="triggered_tags", triggers=["<f"], tags=[]), "tags"),
    ("structural_tag", '{"structures": [{"begin": "<f>", "end": ""}], "triggers": ["<g"]}', "<g"),
    ("structural_tag", '{"structures": [{"end": ""}], "triggers": ["<g"]}', "begin"),
    ("structural_tag", _tag(type="grammar", grammar="start: x"), "inside"),
]
TAG = {
    "type": "tag",
    "begin": "<f>",
    "content": {"type": "json_schema", "json_schema": {"type": "integer"}},
    "end": "</f>",
}
FOLLOWED: list[tuple[Kind, str, list[str], list[str]]] = [
    ("json_object", "", ['{"a": [1, {"b": null}]}', "{}"], ["[1]", '{"a":  1}', "1"]),
    ("json_schema", "true", ["[1]", "null"], ["nul"]),
    ("regex", "a/b\n", ["a/b\n"], ["a/b"]),
    ("choice", '["a b", "a \\"c\\"", "ü/"]', ["a b", 'a "c"', "ü/"], ["a", "ab"]),
    ("grammar", 'root ::= "x" | "[" root "]"', ["x", "[[x]]"], ["[x"]),
    ("grammar", 'start: "x" | "[" start "]"', ["x", "[[x]]"], ["[x"]),
    (
        "structural_tag",
        '{"structures": [{"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"}], "triggers": ["<f"]}',
        ["any text", "so <f>12</f> and", "<f>1</f><f>2</f>"],
        ["<f>x</f>", "<fx", "<f>1"],
    ),
    ("structural_tag", _tag(type="triggered_tags", triggers=["<"], tags=[TAG], at_least_one=True),
     ["so <f>12</f>"], ["any text"]),
    ("structural_tag", _tag(type="triggered_tags", triggers=["<"], tags=[TAG], stop_after_first=True),
     ["so <f>12</f>", "none"], ["<f>1</f> more"]),
    ("structural_tag", _tag(type="tags_with_separator", tags=[TAG], separator=", ", at_least_one=True),
     ["<f>1</f>", "<f>1</f>, <f>2</f>"], ["", "<f>1</f><f>2</f>"]),
    (
        "structural_tag",
        _tag(
            type="sequence",
            elements=[
                {"type": "const_string", "value": "a/"},
                {"type": "regex", "pattern": r"[0-9]/\d"},
                {"type": "or", "elements": [TAG, {"type": "json_schema", "json_schema": {"type": "null"}}]},
            ],
        ),
        ["a/1/2null", "a/1/2<f>3</f>"],
        ["a/1/2", "a/x/2null"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text", "says"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_followed_is_refused_by_name(kind: Kind, text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        GRAMMARS.compiled(GrammarSpec(kind, text, "some_field"))
    assert caught.value.param == "some_field"
    assert len(str(caught.value)) < 500
    for word in ("llguidance", "LLMatcher", "lexer"):
        assert word not in str(caught.value)


@pytest.mark.parametrize(("kind", "text", "right", "wrong"), FOLLOWED, ids=lambda value: str(value)[:40])
def test_a_grammar_takes_what_it_says(kind: Kind, text: str, right: list[str], wrong: list[str]) -> None:
    compiled = GRAMMARS.compiled(GrammarSpec(kind, text))

    def takes(answer: str) -> bool:
        ids = TOKENIZER.encode(answer, add_special_tokens=False)
        matcher = compiled.matcher()
        return matcher.take(ids) == len(ids) and (matcher.is_over or matcher.take([EOS]) == 1)

    assert all(map(takes, right))
    assert not any(map(takes, wrong))


def test_a_text_that_is_too_long_or_of_no_kind_never_reaches_an_engine() -> None:
    with pytest.raises(InvalidRequest, match=str(MAX_GRAMMAR_BYTES)):
        GrammarSpec("regex", "ü" * (MAX_GRAMMAR_BYTES // 2 + 1))
    with pytest.raises(InvalidRequest, match="dance"):
        GrammarSpec("dance")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="GrammarSpec"):
        SamplingParams(grammar="a+")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="regex"):
        NO_GRAMMARS.compiled(GrammarSpec("regex", "a", "regex"))


def test_a_tokenizer_without_bytes_is_refused_by_name() -> None:
    tokenizer = zoo.word_piece()
    with pytest.raises(InvalidRequest, match="tokenizer"):
        Grammars(tokenizer, tokenizer.vocab_size, [0]).compiled(GrammarSpec("regex", "a"))
