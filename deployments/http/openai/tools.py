"""Fields about tools and reasoning, and what they mean to a model that speaks a certain dialect."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from deployments.dialects.dialect import PLAIN, AnswerReader, Dialect, answer_reader
from deployments.dialects.forced import ArgumentsReader, ListReader, schema_of_arguments, schema_of_calls
from deployments.http.limits import MAX_LABEL_CHARS, MAX_TOOL_NAME_CHARS, MAX_TOOLS
from deployments.http.wire import Body, kind_of, shown, unsupported
from engine.errors import InvalidRequest
from engine.grammar.spec import GrammarSpec

ToolName = Annotated[str, Field(min_length=1, max_length=MAX_TOOL_NAME_CHARS, pattern=r"^[A-Za-z0-9_.:-]+$")]


def _is_function(value: Any) -> Any:
    kind = kind_of(value)
    if kind is not None and kind != "function":
        raise unsupported(f"{shown(kind)} tools; describe a function")
    return value


class Function(Body):
    """What a tool is called, what it is for, and what it takes."""

    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None  # a JSON Schema; None: it takes nothing
    strict: bool | None = None  # arguments follow the schema: they do where a call is required


class Tool(Body):
    """One of `tools`."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The function of a `tool_choice`."""

    name: ToolName


class NamedTool(Body):
    """`tool_choice`: this one."""

    type: Literal["function"]
    function: NamedFunction


class ToolFields(Body):
    """As a part of a chat."""

    tools: (
        Annotated[list[Annotated[Tool, BeforeValidator(_is_function)]], Field(max_length=MAX_TOOLS, fail_fast=True)]
        | None
    ) = None
    tool_choice: Literal["none", "auto", "required"] | Annotated[NamedTool, BeforeValidator(_is_function)] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the chat template
    reasoning_effort: Annotated[str, Field(max_length=MAX_LABEL_CHARS)] | None = None
    documents: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = None  # for templates that write them
    include_reasoning: bool | None = None  # false: it is left out
    separate_reasoning: bool | None = None  # SGLang's; false: it stays in the text
    stream_reasoning: bool | None = None  # SGLang's; false: it comes at once, when it has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """How the answers to one chat are read."""

    dialect: Dialect = PLAIN
    schemas: dict[str, Any] | None = None  # of the parameters of each tool that may be called; None: none may
    forced: str | None = None  # "": calls of any, as a list; else the tool that is called
    separates: bool = True
    tells_reasoning: bool = True
    streams_reasoning: bool = True
    hidden: tuple[str, ...] = ()  # special tokens that are in the text for the reader alone

    @property
    def needs_prompt(self) -> bool:
        """Whether how an answer is read depends on its prompt."""
        return self.dialect.reasoning is not None and self.forced is None

    def reader(self, prompt_end: str) -> AnswerReader | None:
        """Of one answer behind a prompt that ends so; None: it is text as it is."""
        if self.forced is not None:
            return AnswerReader(None, ArgumentsReader(self.forced) if self.forced else ListReader())
        return answer_reader(self.dialect, prompt_end, self.schemas, self.hidden, separates=self.separates)


def reading_of(body: ToolFields, dialect: Dialect, special: frozenset[str]) -> Reading:
    """`special`: what the model's special tokens are called. Raises: InvalidRequest naming the field."""
    schemas = _callable(body, dialect)
    forced = None
    if isinstance(body.tool_choice, NamedTool):
        forced = body.tool_choice.function.name
    elif body.tool_choice == "required":
        forced = ""
    reading = Reading(
        dialect=dialect,
        schemas=schemas,
        forced=forced,
        separates=body.separate_reasoning is not False,
        tells_reasoning=body.include_reasoning is not False,
        streams_reasoning=body.stream_reasoning is not False,
    )
    markers = set(dialect.markers) & special
    needs_them = forced is None and reading.reader("") is not None and markers
    return reading if not needs_them else Reading(**{**_fields(reading), "hidden": tuple(sorted(special - markers))})


def _fields(reading: Reading) -> dict[str, Any]:
    return {name: getattr(reading, name) for name in Reading.__slots__}


def _callable(body: ToolFields, dialect: Dialect) -> dict[str, Any] | None:
    choice, tools = body.tool_choice, body.tools or ()
    if not tools:
        if choice not in (None, "none"):
            raise InvalidRequest("tool_choice", "there are no tools; send tools too, or leave it out")
        return None
    schemas = {tool.function.name: tool.function.parameters for tool in tools}
    if len(schemas) < len(tools):
        raise InvalidRequest("tools", "two tools have one name; give each a name of its own")
    if isinstance(choice, NamedTool) and choice.function.name not in schemas:
        raise InvalidRequest("tool_choice", f"{choice.function.name!r} is none of the tools: {', '.join(schemas)}")
    if choice == "none":
        return None
    if not dialect.takes_tools:
        says = "the model's chat template does not write tools; send tool_choice 'none', or serve a model that has them"
        raise InvalidRequest("tools", says)
    if dialect.tools is None and choice in (None, "auto"):
        says = "how this model writes calls is not known; name it in the setting tool_parser, or require a call"
        raise InvalidRequest("tools", says)
    return schemas


def forced_grammar(body: ToolFields, reading: Reading) -> GrammarSpec | None:
    """What an answer must be whose calls are required. Raises: InvalidRequest."""
    if reading.forced is None or reading.schemas is None:
        return None
    if reading.forced:
        schema = schema_of_arguments(reading.schemas[reading.forced])
    else:
        schema = schema_of_calls(reading.schemas, several=body.parallel_tool_calls is not False)
    return GrammarSpec("json_schema", json.dumps(schema, ensure_ascii=False), "tools")


_RESERVED = frozenset(
    {
        "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
        "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs", "bos_token", "eos_token", "raise_exception", "strftime_now",
    }
)  # fmt: skip


def template_args(body: ToolFields, template: str, reading: Reading) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the chat template gets beside the messages, and fields that say nothing to this one.

    Raises: InvalidRequest naming the field.
    """
    args: dict[str, Any] = {}
    inert: list[str] = []
    for name, value in (body.chat_template_kwargs or {}).items():
        if name in _RESERVED:
            raise InvalidRequest("chat_template_kwargs", f"{name!r} is not the caller's to set; leave it out")
        if _names(template, name):
            args[name] = value
        else:
            inert.append(f"chat_template_kwargs.{name}" if re.fullmatch(r"\w{1,64}", name) else "chat_template_kwargs")
    if body.documents:
        if not _names(template, "documents"):
            raise InvalidRequest("documents", "the model's chat template writes none; write them into a message")
        args["documents"] = body.documents
    if body.reasoning_effort is not None and not _effort(body.reasoning_effort, template, args):
        inert.append("reasoning_effort")
    if reading.schemas is not None:
        args["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    elif body.parallel_tool_calls is not None:
        inert.append("parallel_tool_calls")
    if reading.dialect.reasoning is None:
        told = ("include_reasoning", "separate_reasoning", "stream_reasoning")
        inert += [name for name in told if getattr(body, name) is not None]
    if body.tools == []:
        inert.append("tools")
    return args, tuple(inert)


def _effort(effort: str, template: str, args: dict[str, Any]) -> bool:
    """Returns: whether it says anything to this template. Raises: InvalidRequest."""
    if _names(template, "reasoning_effort"):
        args.setdefault("reasoning_effort", effort)
        return True
    switch = next((name for name in ("enable_thinking", "thinking") if _names(template, name)), None)
    if switch is not None:
        args.setdefault(switch, effort != "none")
        return True
    if effort != "none":
        raise InvalidRequest("reasoning_effort", f"{effort!r}: the model's chat template takes none; leave it out")
    return False


def _names(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None
