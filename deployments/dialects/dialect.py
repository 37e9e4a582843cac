"""Which readers a model's answers need: named in the settings, or found from its chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.dialects import deepseek
from deployments.dialects.calls import HermesReader, LlamaReader
from deployments.dialects.deepseek import DeepSeekReader
from deployments.dialects.events import Begin, Event, Reader, Text
from deployments.dialects.harmony import HarmonyReader
from deployments.dialects.mistral import MistralReader
from deployments.dialects.pythonic import LiquidReader, PythonicReader
from deployments.dialects.think import ThinkReader, is_open
from deployments.dialects.xml import QwenCoderReader

Tools = Mapping[str, Any]  # the schema of each one's parameters, by its name
HARMONY, THINK = "gpt_oss", "think"


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How a family writes calls."""

    read: Callable[[Tools], Reader]
    markers: tuple[str, ...]  # some are special tokens, which the text would leave out
    signs: tuple[str, ...]  # what all of is in the template of a model that writes so


# In the order in which templates are looked at: the more particular form first.
TOOL_FORMS: dict[str, ToolForm] = {
    HARMONY: ToolForm(
        lambda tools: HarmonyReader(),
        ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"),
        ("<|channel|>", "<|message|>"),
    ),
    "mistral": ToolForm(
        lambda tools: MistralReader(), ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), ("[TOOL_CALLS]",)
    ),
    "qwen3_coder": ToolForm(QwenCoderReader, ("<tool_call>", "</tool_call>"), ("<function=", "<parameter=")),
    "deepseek": ToolForm(lambda tools: DeepSeekReader(), deepseek.MARKERS, (deepseek.CALLS,)),
    "hermes": ToolForm(lambda tools: HermesReader(), ("<tool_call>", "</tool_call>"), ("<tool_call>", '"arguments":')),
    "lfm2": ToolForm(
        lambda tools: LiquidReader(), ("<|tool_call_start|>", "<|tool_call_end|>"), ("<|tool_list_start|>",)
    ),
    "pythonic": ToolForm(
        lambda tools: PythonicReader(), ("<|python_start|>", "<|python_end|>"), ("func_name1(params_name1=",)
    ),
    "llama3_json": ToolForm(
        lambda tools: LlamaReader(), ("<|python_tag|>",), ('"parameters"', "ipython")
    ),
}  # fmt: skip
AUTO, NONE = "auto", "none"
TOOL_PARSERS = (AUTO, NONE, *TOOL_FORMS)
REASONING_PARSERS = (AUTO, NONE, THINK, HARMONY)
_NINE = re.compile(r"length\s*!=\s*9")


@dataclass(frozen=True, slots=True)
class Dialect:
    """Of one model. None: its answers are text as they are."""

    tools: str | None = None  # a name of TOOL_FORMS
    reasoning: str | None = None  # THINK or HARMONY
    takes_tools: bool = False  # its template writes what tools there are
    short_ids: bool = False  # its template takes ids of nine letters and digits alone

    @property
    def markers(self) -> tuple[str, ...]:
        """What must be seen in the text, special token or not."""
        of_tools = TOOL_FORMS[self.tools].markers if self.tools is not None else ()
        of_reasoning = {None: (), THINK: ("<think>", "</think>"), HARMONY: TOOL_FORMS[HARMONY].markers}
        return (*of_tools, *of_reasoning[self.reasoning])


PLAIN = Dialect()


def find_dialect(template: str, tools: str = AUTO, reasoning: str = AUTO) -> Dialect:
    """Of a model with this chat template. `tools`, `reasoning`: what the settings say."""
    found = tools
    if tools == AUTO:
        names = (name for name, form in TOOL_FORMS.items() if all(sign in template for sign in form.signs))
        found = next(names, NONE)
    thinks = reasoning
    if reasoning == AUTO:
        thinks = HARMONY if found == HARMONY else THINK if "<think>" in template or "</think>" in template else NONE
    return Dialect(
        tools=None if found == NONE else found,
        reasoning=None if thinks == NONE else thinks,
        takes_tools=re.search(r"\btools\b", template) is not None,
        short_ids=_NINE.search(template) is not None,
    )


class AnswerReader(Reader):
    """Reasoning first, then calls, in what is left of the text."""

    def __init__(self, reasoning: Reader | None, calls: Reader | None, hidden: Sequence[str] = ()) -> None:
        """`hidden`: special tokens that are in the text for the readers' sake alone, and part of nothing."""
        super().__init__()
        self._readers = [reader for reader in (reasoning, calls) if reader is not None]
        self._hidden = re.compile("|".join(map(re.escape, sorted(hidden, key=len, reverse=True)))) if hidden else None

    def _read(self, *, final: bool) -> Iterator[Event]:
        events: list[Event] = [Text(self._take(len(self._held)))]
        for reader in self._readers:
            events = [
                told for event in events for told in (reader.push(event.text) if type(event) is Text else [event])
            ]
            events += reader.finish() if final else []
        for event in events:
            if type(event) is Text and self._hidden is not None:
                event = Text(self._hidden.sub("", event.text))
            if type(event) is Begin or event.text:  # type: ignore[union-attr]
                yield event


def answer_reader(
    dialect: Dialect, prompt_end: str, tools: Tools | None, hidden: Sequence[str] = (), *, separates: bool = True
) -> AnswerReader | None:
    """For one answer behind a prompt that ends so. `tools`: None: no calls are looked for; `separates`: reasoning is.

    None: the answer is text as it is.
    """
    reasoning: Reader | None = None
    calls = TOOL_FORMS[dialect.tools].read(tools) if dialect.tools is not None and tools is not None else None
    if dialect.reasoning == HARMONY and (separates or calls is not None):
        return AnswerReader(HarmonyReader(), None, hidden)
    if dialect.reasoning == THINK and separates:
        reasoning = ThinkReader(is_open=is_open(prompt_end))
    return None if reasoning is None and calls is None else AnswerReader(reasoning, calls, hidden)
