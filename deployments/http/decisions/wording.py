"""How a question is put to a model: the text first, so that all questions share it, then the question. Pure.

With a chat template the question is the end of what the user says, and the answer is the assistant's; without one the
answer stands behind "Answer:" in a plain text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deployments.http.decisions.schema import (
    CallItem,
    ChoiceQuestion,
    CustomCallItem,
    JsonPart,
    MessageItem,
    OutputItem,
    PredicateQuestion,
    RefusalPart,
    ScoreQuestion,
    TextPart,
)
from engine.errors import InvalidRequest

BREAK = "\n\n"  # between the text and a question
TRUTHS = ("yes", "no")


@dataclass(frozen=True, slots=True)
class Wording:
    """A question as it is asked, and the texts of its answers in their order."""

    text: str
    answers: tuple[str, ...]


def worded(question: PredicateQuestion | ChoiceQuestion | ScoreQuestion, param: str) -> Wording:
    """Raises: InvalidRequest naming `param` when two answers are the same."""
    asked = written(question.instructions).strip()
    if isinstance(question, PredicateQuestion):
        return Wording(f"{asked}\nIs this true of the text above? Answer yes or no.", TRUTHS)
    if isinstance(question, ChoiceQuestion):
        answers = _choices([choice.value for choice in question.choices])
        told = [(answer, choice.description) for answer, choice in zip(answers, question.choices, strict=True)]
        lines, ending = _listed(told), "Answer with one of the choices."
        text = f"{asked}\nChoices:\n{lines}\n{ending}"
    else:
        answers = tuple(level.label.strip() for level in question.levels)
        lines = _listed([(level.label.strip(), level.description) for level in question.levels])
        text = f"{asked}\nLevels, the lowest first:\n{lines}\nAnswer with one of the levels."
    if len(set(answers)) < len(answers):
        twice = next(answer for answer in answers if answers.count(answer) > 1)
        raise InvalidRequest(param, f"the answer {twice!r} is given twice; send it once")
    if not all(answers):
        raise InvalidRequest(param, "an answer is nothing but spaces; send some text")
    return Wording(text, answers)


def _choices(values: Sequence[str | bool]) -> tuple[str, ...]:
    """Truth values are words; a text that is written like one of them stands in quotes."""
    words = {("true" if value else "false") for value in values if isinstance(value, bool)}
    texts = []
    for value in values:
        text = ("true" if value else "false") if isinstance(value, bool) else value.strip()
        texts.append(json.dumps(text) if isinstance(value, str) and text in words else text)
    return tuple(texts)


def _listed(told: Sequence[tuple[str, str | None]]) -> str:
    return "\n".join(f"- {answer}: {about.strip()}" if about else f"- {answer}" for answer, about in told)


def written(content: str | Sequence[TextPart | JsonPart | RefusalPart]) -> str:
    """Parts one behind the other, data as compact JSON."""
    if isinstance(content, str):
        return content
    return "\n".join(_written(part) for part in content)


def _written(part: TextPart | JsonPart | RefusalPart) -> str:
    if isinstance(part, JsonPart):
        return json.dumps(part.data, ensure_ascii=False, separators=(",", ":"))
    return part.refusal if isinstance(part, RefusalPart) else part.text


Items = Sequence[MessageItem | CallItem | CustomCallItem | OutputItem]


def messages_of(given: str | Items, gap: str) -> tuple[dict[str, Any], ...]:
    """A conversation that ends with what the user says, and that with `gap`, where questions are put.

    Neighbours of one role are one message: many templates want the roles to take turns.

    Raises: InvalidRequest (`input`) for an output whose call is missing.
    """
    said: list[tuple[str, str]] = [("user", given)] if isinstance(given, str) else list(map(_said, _matched(given)))
    said.append(("user", gap))
    merged: list[dict[str, Any]] = []
    for role, text in said:
        if merged and merged[-1]["role"] == role:
            merged[-1]["content"] += BREAK + text
        else:
            merged.append({"role": role, "content": text})
    return tuple(merged)


def plain_text(given: str | Items) -> str:
    """The same for a model that has no chat template. Raises: InvalidRequest (`input`), as `messages_of`."""
    if isinstance(given, str):
        return given
    said = [_said(item) for item in _matched(given)]
    return said[0][1] if len(said) == 1 else BREAK.join(f"{role}: {text}" for role, text in said)


Named = tuple[MessageItem | CallItem | CustomCallItem | OutputItem, str]


def _matched(items: Items) -> list[Named]:
    """Each with the name of the tool that it is of. Raises: InvalidRequest."""
    names: dict[str, str] = {}
    matched: list[Named] = []
    for index, item in enumerate(items):
        if isinstance(item, CallItem | CustomCallItem):
            names[item.call_id] = f"{item.namespace}.{item.name}" if item.namespace else item.name
        elif isinstance(item, OutputItem) and item.call_id not in names:
            raise InvalidRequest(f"input[{index}].call_id", f"{item.call_id!r} is that of no call before it")
        matched.append((item, "" if isinstance(item, MessageItem) else names[item.call_id]))
    return matched


def _said(named: Named) -> tuple[str, str]:
    """Who says it, and what. Calls and what they gave are told in words, whatever a template knows of tools."""
    item, name = named
    if isinstance(item, MessageItem):
        return "system" if item.role == "developer" else item.role, written(item.content)
    if isinstance(item, OutputItem):
        return "user", f"[result of {name}] {written(item.output)}"
    return "assistant", f"[call of {name}] {item.arguments if isinstance(item, CallItem) else item.input}"
