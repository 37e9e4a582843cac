"""Conversations with calls of tools, and what a model's own chat template says that it writes for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from deployments.dialects.dialect import Dialect, answer_reader, find_dialect
from deployments.dialects.events import Arguments, Begin, Event, Reader, Reasoning, Text
from engine.text.tokenizer import Tokenizer
from tests.support.tiny_model import make_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "<|call|>", "<|return|>")  # noqa: RUF001
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "where"},
                    "days": {"type": "integer", "description": "how many"},
                    "exact": {"type": "boolean", "description": "or about"},
                    "ratio": {"type": "number", "description": "a share"},
                    "names": {"type": "array", "items": {"type": "string"}, "description": "of whom"},
                    "more": {"type": "object", "description": "the rest"},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "write-file",
            "description": "Writes.",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string", "description": "where"},
                    "text": {"type": "string", "description": "what"},
                },
                "required": ["path", "text"],
            },
        },
    },
]  # fmt: skip
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
_TEXTS = (
    "Rome",
    "São Paulo",
    'say "hi"',
    "a\nb",
    "{x}",
    "it's",
    "back\\slash",
    "日本",
    "<b>",
    "1",
    "true",
    "x = {'a': [1, 2]}",
)


def tokenizer_of(template: str, special: tuple[str, ...] = ()) -> Tokenizer:
    fast: PreTrainedTokenizerFast = make_tokenizer()
    fast.add_special_tokens({"additional_special_tokens": list(special)})
    fast.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return Tokenizer(fast)


def dialect_of(template: str) -> Dialect:
    return find_dialect((TEMPLATES / f"{template}.jinja").read_text())


def reader_of(template: str, prompt: str) -> Reader:
    reader = answer_reader(dialect_of(template), prompt, SCHEMAS)
    assert reader is not None
    return reader


def random_calls(rng: random.Random, most: int = 3) -> list[dict[str, Any]]:
    calls = []
    for _ in range(rng.randint(1, most)):
        if rng.random() < 0.5:
            name, given = "write-file", {"path": rng.choice(_TEXTS), "text": rng.choice(_TEXTS)}
        else:
            name, given = "get_weather", _weather(rng)
        calls.append(
            {"id": f"{rng.randrange(10**9):09d}", "type": "function", "function": {"name": name, "arguments": given}}
        )
    return calls


def _weather(rng: random.Random) -> dict[str, Any]:
    given: dict[str, Any] = {
        "city": rng.choice(_TEXTS),
        "days": rng.randint(-3, 99),
        "exact": rng.random() < 0.5,
        "ratio": rng.choice([0.5, -2.25, 1e-3]),
        "names": rng.sample(_TEXTS, rng.randint(0, 3)),
        "more": {"deep": {"list": [1, None, rng.choice(_TEXTS)]}},
    }
    return {"city": given["city"], **{k: v for k, v in given.items() if rng.random() < 0.6}}


def written(tokenizer: Tokenizer, calls: list[dict[str, Any]], **said: Any) -> tuple[str, str]:
    """The prompt, and what the model writes behind it to make these calls: as its template writes an earlier answer."""
    asked = [{"role": "user", "content": "what now?"}]
    answer = {"role": "assistant", "content": "", **said, "tool_calls": calls}
    result = {"role": "tool", "content": "ok", "tool_call_id": "0" * 9}
    prompt = tokenizer.render_chat(asked, tools=TOOLS)
    whole = tokenizer.render_chat([*asked, answer, result], tools=TOOLS)
    common = next(prompt[:n] for n in range(len(prompt), 0, -1) if whole.startswith(prompt[:n]))
    if common != prompt:
        common = common[
            : max(common.rfind("\n"), common.rfind(">")) + 1
        ]  # the template opened the reasoning, which this answer has none of
    text = whole[len(common) :]
    return common, text[: min(at for end in ENDS if (at := text.find(end)) >= 0)]


def read(reader: Reader, text: str, rng: random.Random | None = None) -> list[Event]:
    """All events, the text cut at random, with pieces of one kind put together."""
    events: list[Event] = []
    while text:
        size = len(text) if rng is None else rng.choice((1, 1, 2, 3, 7, 20))
        events += reader.push(text[:size])
        text = text[size:]
    return together([*events, *reader.finish()])


def together(events: list[Event]) -> list[Event]:
    whole: list[Event] = []
    for event in events:
        last = whole[-1] if whole else None
        if isinstance(event, Text | Reasoning | Arguments) and type(last) is type(event):
            whole[-1] = type(event)(last.text + event.text)  # type: ignore[union-attr]
        else:
            whole.append(event)
    return whole


def calls_of(events: list[Event]) -> list[tuple[str, Any]]:
    calls: list[tuple[str, Any]] = []
    for event in events:
        if isinstance(event, Begin):
            calls.append((event.name, None))
        elif isinstance(event, Arguments):
            calls[-1] = (calls[-1][0], json.loads(event.text))
    return calls
