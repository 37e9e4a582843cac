"""What is no call stays text, nothing is lost, and no cut of the text changes what is read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.dialects.calls import HermesReader, LlamaReader
from deployments.dialects.deepseek import MARKERS, DeepSeekReader
from deployments.dialects.dialect import TOOL_FORMS, AnswerReader, Dialect, answer_reader, find_dialect
from deployments.dialects.events import Arguments, Begin, Event, Reader, Reasoning, Text
from deployments.dialects.forced import ArgumentsReader, ListReader, moved, schema_of_calls
from deployments.dialects.harmony import HarmonyReader
from deployments.dialects.mistral import MistralReader
from deployments.dialects.pythonic import LiquidReader, PythonicReader
from deployments.dialects.think import ThinkReader
from deployments.dialects.xml import QwenCoderReader
from tests.dialects.conversations import SCHEMAS, calls_of, read

CALL = '{"name": "f", "arguments": {"a": "</tool_call> }", "b": [1, {}]}}'
GIVEN = ("f", {"a": "</tool_call> }", "b": [1, {}]})
MAKERS: dict[str, Callable[[], Reader]] = {
    "hermes": HermesReader,
    "llama": LlamaReader,
    "mistral": MistralReader,
    "deepseek": DeepSeekReader,
    "pythonic": PythonicReader,
    "lfm2": LiquidReader,
    "qwen coder": lambda: QwenCoderReader(SCHEMAS),
    "harmony": HarmonyReader,
    "think": lambda: ThinkReader(is_open=False),
    "open think": lambda: ThinkReader(is_open=True),
    "think, then hermes": lambda: AnswerReader(ThinkReader(is_open=False), HermesReader()),
    "list": ListReader,
    "arguments": lambda: ArgumentsReader("f"),
}
READ: list[tuple[str, str, list[tuple[str, Any]], str]] = [  # reader, text, calls, the text that is left
    ("hermes", f"So:\n<tool_call>\n{CALL}\n</tool_call>", [GIVEN], "So:"),
    ("hermes", f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>\n", [GIVEN, GIVEN], ""),
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call> more', [("f", {"a": 1})], "more"),
    ("hermes", '<tool_call>{"name": "f"}</tool_call>', [("f", {})], ""),
    ("hermes", f"<tool_call>{CALL}", [GIVEN], ""),
    ("hermes", "<tool_call>not json</tool_call> and", [], "<tool_call>not json</tool_call> and"),
    ("hermes", "<tool_call>[1]</tool_call>", [], "<tool_call>[1]</tool_call>"),
    ("hermes", "a < b <tool", [], "a < b <tool"),
    ("hermes", "text with space at its end  \n", [], "text with space at its end  \n"),
    ("llama", '{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}',
     [("f", {"a": 1}), ("g", {})], ""),
    ("llama", '<|python_tag|>{"type": "function", "name": "f", "parameters": {"a": 1}}', [("f", {"a": 1})], ""),
    ("llama", '{"parameters": {}, "name": "f"}', [], '{"parameters": {}, "name": "f"}'),
    ("llama", '{"answer": 42}', [], '{"answer": 42}'),
    ("llama", "Hello {name}", [], "Hello {name}"),
    ("llama", "<|python_tag|>print(1)", [], "<|python_tag|>print(1)"),
    ("mistral", 'Ok.[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]', [("f", {"a": 1})], "Ok."),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}[TOOL_CALLS]g{}', [("f", {"a": 1}), ("g", {})], ""),
    ("mistral", "[TOOL_CALLS] what is this", [], "[TOOL_CALLS] what is this"),
    ("mistral", "[TOOL_CALLS][1, 2]", [], "[TOOL_CALLS][1, 2]"),
    ("deepseek", f'{MARKERS[0]}{MARKERS[2]}f{MARKERS[3]}{{"a": 1}}{MARKERS[4]}{MARKERS[1]}', [("f", {"a": 1})], ""),
    ("deepseek", f"{MARKERS[0]}nothing{MARKERS[1]}", [], f"{MARKERS[0]}nothing{MARKERS[1]}"),
    ("pythonic", "[f(a=1, b=\"x]\", c=[true, None, {'k': -2.5}]), mod.g()]",
     [("f", {"a": 1, "b": "x]", "c": [True, None, {"k": -2.5}]}), ("mod.g", {})], ""),
    ("pythonic", "<|python_start|>[f(a=1)]<|python_end|>", [("f", {"a": 1})], ""),
    ("pythonic", "[1, 2, 3] are numbers", [], "[1, 2, 3] are numbers"),
    ("pythonic", "[f(__import__('os'))]", [], "[f(__import__('os'))]"),
    ("pythonic", "[" * 3000, [], "[" * 3000),
    ("lfm2", "<|tool_call_start|>[f(a=1)]<|tool_call_end|>Done.", [("f", {"a": 1})], "Done."),
    ("lfm2", '<|tool_call_start|>[{"name": "f", "arguments": {}}]<|tool_call_end|>', [("f", {})], ""),
    ("qwen coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nA\nB\n</parameter>\n<parameter=days>\n3\n"
     "</parameter>\n<parameter=exact>\nTrue\n</parameter>\n<parameter=odd>\n1\n</parameter>\n</function>\n</tool_call>",
     [("get_weather", {"city": "A\nB", "days": 3, "exact": True, "odd": "1"})], ""),
    ("qwen coder", "<tool_call>none</tool_call>", [], "<tool_call>none</tool_call>"),
    ("harmony", "<|channel|>final<|message|>Hi<|return|>", [], "Hi"),
    ("harmony", "<|channel|>commentary<|message|>Wait.<|end|><|start|>assistant<|channel|>commentary to=functions.f "
     '<|constrain|>json<|message|>{"a": 1}<|call|>', [("f", {"a": 1})], "Wait."),
    ("harmony", ' to=functions.f<|channel|>commentary json<|message|>{"a": 1}', [("f", {"a": 1})], ""),
    ("harmony", "no message at all", [], "no message at all"),
    ("list", '[{"name": "f", "parameters": {"a": "]}"}}, {"name": "g", "parameters": {}}]',
     [("f", {"a": "]}"}), ("g", {})], ""),
    ("arguments", '{"a": 1}', [("f", {"a": 1})], ""),
]  # fmt: skip


def _text(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


@pytest.mark.parametrize(("name", "text", "calls", "left"), READ, ids=lambda value: str(value)[:50])
def test_calls_are_read_and_the_rest_is_text(name: str, text: str, calls: list[Any], left: str) -> None:
    whole = read(MAKERS[name](), text)
    assert calls_of(whole) == calls
    assert _text(whole) == left
    for seed in range(20):
        assert read(MAKERS[name](), text, random.Random(seed)) == whole
    assert read(MAKERS[name](), text, _Ones()) == whole


class _Ones(random.Random):
    def choice(self, seq: Any) -> Any:
        return 1


_PIECES = [
    "<tool_call>", "</tool_call>", CALL, "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "f", '{"a": 1}', "[", "]",
    "{", "}", "<function=f>", "<parameter=a>", "</parameter>", "</function>", "<|channel|>", "analysis", "final",
    "<|message|>", "<|end|>", "<|start|>", " to=functions.f", '"', "\\", "\n", " ", "text", ";",
    "<|python_tag|>", "f(a=1)", *MARKERS,
]  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
@given(pieces=st.lists(st.sampled_from(_PIECES), max_size=12), seed=st.integers(0, 1000))
def test_no_cut_changes_what_is_read(name: str, pieces: list[str], seed: int) -> None:
    text = "".join(pieces)
    assert read(MAKERS[name](), text, random.Random(seed)) == read(MAKERS[name](), text)


@given(text=st.text(alphabet="ab<>{}[]\"'\n \\", max_size=40))
def test_an_answer_without_markers_is_text_to_the_letter(text: str) -> None:
    for name in ("hermes", "mistral", "deepseek", "lfm2", "qwen coder", "think"):
        assert _text(read(MAKERS[name](), text)) == text


@pytest.mark.parametrize(
    ("is_open", "text", "reasoning", "answer"),
    [
        (False, "<think>\nso it is\n</think>\n\nYes.", "so it is", "Yes."),
        (True, "so it is\n</think>\n\nYes.", "so it is", "Yes."),
        (True, "cut off", "cut off", ""),
        (False, "<think>\n\n</think>\n\nYes.", "", "Yes."),
        (False, "Yes. <think>no</think>", "", "Yes. <think>no</think>"),
        (False, "a < b", "", "a < b"),
        (True, "</think>Yes.", "", "Yes."),
    ],
)
def test_reasoning_is_apart_from_the_answer(is_open: bool, text: str, reasoning: str, answer: str) -> None:
    whole = read(ThinkReader(is_open=is_open), text)
    assert "".join(event.text for event in whole if isinstance(event, Reasoning)) == reasoning
    assert _text(whole) == answer


def test_harmony_has_its_reasoning_in_a_channel() -> None:
    text = "<|channel|>analysis<|message|>think<|end|><|start|>assistant<|channel|>final<|message|>say"
    assert read(HarmonyReader(), text) == [Reasoning("think"), Text("say")]


def test_special_tokens_that_are_shown_for_the_reader_alone_are_part_of_nothing() -> None:
    reader = answer_reader(Dialect(tools="mistral"), "", SCHEMAS, ("</s>", "<s>", "</s>x"))
    assert reader is not None
    told = [*reader.push("<s>Hi"), *reader.push("</s>"), *reader.push("[TOOL_CALLS]f{}"), *reader.finish()]
    assert told == [Text("Hi"), Begin("f"), Arguments("{}")]


def test_settings_name_a_form_or_none() -> None:
    template = '{{ tools }} <tool_call> "arguments": <think>'
    assert find_dialect(template) == Dialect(tools="hermes", reasoning="think", takes_tools=True)
    assert find_dialect(template, "none", "none") == Dialect(takes_tools=True)
    assert find_dialect("", "mistral", "think") == Dialect(tools="mistral", reasoning="think")
    assert set(TOOL_FORMS) >= {"hermes", "llama3_json", "pythonic", "mistral", "qwen3_coder", "gpt_oss"}


def test_the_schema_of_required_calls_keeps_each_tool_s_own_references() -> None:
    node = {
        "type": "object",
        "properties": {"next": {"$ref": "#"}, "of": {"$ref": "#/$defs/leaf"}},
        "$defs": {"leaf": {"type": "integer"}},
    }
    schema = schema_of_calls({"tree": node, "none": None}, several=False)
    good = [{"name": "tree", "parameters": {"next": {"next": {}, "of": 3}}}]
    jsonschema.validate(good, schema, jsonschema.Draft202012Validator)
    wrong: list[Any] = [[], good * 2, [{"name": "other", "parameters": {}}], [{"name": "none", "parameters": {"a": 1}}]]
    wrong.append([{"name": "tree", "parameters": {"next": {"of": "x"}}}])
    for bad in wrong:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema, jsonschema.Draft202012Validator)
    assert moved({"const": {"$ref": 3}}, "#/x") == {"const": {"$ref": 3}}
    assert json.loads(json.dumps(schema)) == schema
