"""Bodies of POST /v1/decisions. Each field is honoured or refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Discriminator, Field, PlainValidator, Tag, WithJsonSchema

from deployments.http import limits
from deployments.http.decisions import examples
from deployments.http.openai.messages import Label
from deployments.http.wire import Body, inert, kind_of, refused, shown, unsupported, wrong

_CACHED = "equal prefixes are found by their tokens"
Text = Annotated[str, Field(min_length=1)]
Identifier = Annotated[str, Field(min_length=1, max_length=limits.MAX_LABEL_CHARS)]
Id = Annotated[str | None, inert("items are told apart by their places")]
Status = Annotated[Any, inert("an item of the input is what it says")]
_PARTS = {"input_text": "text", "output_text": "text", "input_json": "json", "refusal": "refusal"}
_ITEMS = {
    "message": "message",
    "function_call": "call",
    "custom_tool_call": "custom call",
    "function_call_output": "output",
    "custom_tool_call_output": "output",
}
_QUESTIONS = ("predicate", "choice", "score")


class TextPart(Body):
    """A piece of text."""

    type: Literal["input_text", "output_text"]
    text: str
    prompt_cache_breakpoint: Annotated[Any, inert(_CACHED)] = None


class JsonPart(Body):
    """Data, which is written as JSON."""

    type: Literal["input_json"]
    data: dict[str, Any] | Annotated[list[dict[str, Any]], Field(fail_fast=True)]


class RefusalPart(Body):
    """What an assistant said instead."""

    type: Literal["refusal"]
    refusal: str


def _is_part(value: Any) -> Any:
    kind = kind_of(value)
    if kind is not None and kind not in _PARTS:
        raise unsupported(f"{shown(kind)} parts; send text")
    return value


Part = Annotated[
    Annotated[TextPart, Tag("[text]")] | Annotated[JsonPart, Tag("[json]")] | Annotated[RefusalPart, Tag("[refusal]")],
    Discriminator(lambda value: f"[{_PARTS.get(kind_of(value) or 'input_text', 'text')}]"),
    BeforeValidator(_is_part),
]
Content = Annotated[
    Annotated[str, Tag("[str]")]
    | Annotated[Annotated[list[Part], Field(min_length=1, max_length=limits.MAX_PARTS, fail_fast=True)], Tag("[list]")],
    Discriminator(lambda value: "[list]" if isinstance(value, list) else "[str]"),
]


class MessageItem(Body):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: Annotated[Any, inert("an item of the input is what it says")] = None


class CallItem(Body):
    """A call of a function, as it was made."""

    type: Literal["function_call"]
    call_id: Identifier
    name: Identifier
    arguments: str
    namespace: Label = None
    id: Id = None
    status: Status = None


class CustomCallItem(Body):
    """A call of a tool that takes text."""

    type: Literal["custom_tool_call"]
    call_id: Identifier
    name: Identifier
    input: str
    namespace: Label = None
    id: Id = None
    status: Status = None


class OutputItem(Body):
    """What a call gave."""

    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: Identifier
    output: Content
    id: Id = None
    status: Status = None


def _is_item(value: Any) -> Any:
    kind = kind_of(value)
    if kind is not None and kind not in _ITEMS:
        raise unsupported(f"items of type {shown(kind)}; send {', '.join(_ITEMS)}")
    return value


Item = Annotated[
    Annotated[MessageItem, Tag("[message]")]
    | Annotated[CallItem, Tag("[call]")]
    | Annotated[CustomCallItem, Tag("[custom call]")]
    | Annotated[OutputItem, Tag("[output]")],
    Discriminator(lambda value: f"[{_ITEMS.get(kind_of(value) or 'message', 'message')}]"),
    BeforeValidator(_is_item),
]
Input = Annotated[
    Annotated[Text, Tag("[str]")]
    | Annotated[
        Annotated[list[Item], Field(min_length=1, max_length=limits.MAX_MESSAGES, fail_fast=True)], Tag("[list]")
    ],
    Discriminator(lambda value: "[list]" if isinstance(value, list) else "[str]"),
]


class PredicateQuestion(Body):
    """How likely it is that a statement about the input is true."""

    type: Literal["predicate"]
    instructions: Content
    name: Label = None


class Choice(Body):
    """One of the values to choose from. A text and a truth value that are written alike are two."""

    value: Annotated[str, Field(min_length=1, max_length=limits.MAX_ANSWER_CHARS)] | bool
    description: str | None = None


class ChoiceQuestion(Body):
    """Which of several values it is."""

    type: Literal["choice"]
    instructions: Content
    choices: Annotated[list[Choice], Field(min_length=2, max_length=limits.MAX_VALUES, fail_fast=True)]
    name: Label = None


class Level(Body):
    """One step of a scale."""

    label: Annotated[str, Field(min_length=1, max_length=limits.MAX_ANSWER_CHARS)]
    description: str | None = None


class ScoreQuestion(Body):
    """Where on a scale it stands: the first level is 0, the next 1."""

    type: Literal["score"]
    instructions: Content
    levels: Annotated[list[Level], Field(min_length=2, max_length=limits.MAX_LEVELS, fail_fast=True)]
    name: Label = None


def _is_question(value: Any) -> Any:
    kind = kind_of(value)
    if kind is not None and kind not in _QUESTIONS:
        raise unsupported(f"questions of type {shown(kind)}; send {', '.join(_QUESTIONS)}")
    return value


Question = Annotated[
    Annotated[PredicateQuestion, Tag("[predicate]")]
    | Annotated[ChoiceQuestion, Tag("[choice]")]
    | Annotated[ScoreQuestion, Tag("[score]")],
    Discriminator(lambda value: f"[{kind_of(value) if kind_of(value) in _QUESTIONS else 'predicate'}]"),
    BeforeValidator(_is_question),
]


def _models(value: Any) -> tuple[str, ...] | str:
    """One name, or a list of names."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        raise wrong(f"{shown(value)} is neither a name nor a list of names")
    if len(names) > limits.MAX_MODELS:
        raise wrong(f"{len(names)} names, the limit is {limits.MAX_MODELS}; send fewer")
    for name in names:
        if not isinstance(name, str) or not name:
            raise wrong(f"{shown(name)} is not a name")
        if len(name) > limits.MAX_MODEL_CHARS:
            raise wrong(f"a name of {len(name)} characters, the limit is {limits.MAX_MODEL_CHARS}")
    if len(set(names)) < len(names):
        raise wrong("a name is given twice; send it once")
    return value if isinstance(value, str) else tuple(names)


_MODELS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


class DecisionRequest(Body):
    """Body of POST /v1/decisions."""

    model_config = ConfigDict(json_schema_extra={"example": examples.REQUEST})

    model: Annotated[str | tuple[str, ...], PlainValidator(_models), WithJsonSchema(_MODELS)]
    input: Input
    questions: Annotated[list[Question], Field(min_length=1, max_length=limits.MAX_QUESTIONS, fail_fast=True)]
    safety_identifier: Label = None
    prompt_cache_key: Annotated[Annotated[str, Field(max_length=limits.MAX_HINT_CHARS)] | None, inert(_CACHED)] = None
    prompt_cache_options: Annotated[dict[str, Any] | None, inert("prefixes are kept while there is room")] = None
    # Extensions.
    adapter_source: Annotated[str, Field(max_length=limits.MAX_SOURCE_CHARS)] | None = None
    cache_salt: Label = None
    # Chats' and completions': nothing is drawn and nothing is written here.
    temperature: Annotated[Any, refused("drawn answers; probabilities are those of the model", 0, 1)] = None
    stream: Annotated[Any, refused("streams; the answers come at once", False)] = None
    store: Annotated[Any, refused("nothing is stored; leave it out or send false", False)] = None
