"""A message's content: a string, or a list of text parts. Which of the two a chat template takes, and how it gets it.

OpenAI's API allows both, and they mean the same. Most templates put a string together with others, some take a list
apart, some do either. So a list is written as one string (its texts one after another, as templates that read parts
write them) wherever the template writes strings, and a string as a list of one part where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidRequest

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that are text, and the field that holds it."""

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[list[dict[str, Any]]], str]

_ROLES = ("system", "user", "assistant")
_TRIED = (("system", "user", "assistant", "user"), ("user", "assistant", "user"), ("user",))
_OF_A_LIST = frozenset({"map", "select", "selectattr", "reject", "rejectattr", "groupby"})  # filters
_NO_CONTENT = frozenset({"length", "count", "join", "tojson"})  # filters that give something else
_MAX_PASSES = 16  # through the assignments of a template: names of names of names


def with_content(messages: Messages, in_parts: frozenset[str]) -> list[dict[str, Any]]:
    """`messages` with each content as the template takes it: a list for the roles of `in_parts`, else a string.

    Raises: InvalidRequest naming a part that is not text.
    """
    taken = []
    for index, message in enumerate(messages):
        message = dict(message)
        content = message.get("content")
        if isinstance(content, list | tuple):
            texts = [_text(part, f"messages[{index}].content[{at}]") for at, part in enumerate(content)]
            message["content"] = _parts(texts) if _is_in(message, in_parts) else "".join(texts)
        elif isinstance(content, str) and _is_in(message, in_parts):
            message["content"] = _parts([content])
        taken.append(message)
    return taken


def roles_in_parts(template: str, render: Render) -> frozenset[str]:
    """The roles whose content `template` writes only when it is a list of parts. `render`: messages to the prompt.

    A template whose program never takes a content apart has none. Of others it is found by writing a conversation.
    """
    if not takes_apart(template):
        return frozenset()
    for roles in _TRIED:
        distinct = sorted(set(roles), key=_ROLES.index)
        for size in range(len(distinct) + 1):
            for in_parts in combinations(distinct, size):
                if _shows_all(render, roles, frozenset(in_parts)):
                    return frozenset(in_parts)
    return frozenset()


def takes_apart(template: str) -> bool:
    """Whether `template` goes through a message's content part by part, as its program says."""
    try:
        tree = _Parsing().parse(template)
    except TemplateSyntaxError:
        return False  # rendering will say so
    names = _names(tree)
    return (
        any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))
        or any(f.name in _OF_A_LIST and _is_content(f.node, names) for f in tree.find_all(nodes.Filter))
        or any(_is_first_part(item, names) for item in tree.find_all(nodes.Getitem))
    )


def _shows_all(render: Render, roles: Sequence[str], in_parts: frozenset[str]) -> bool:
    marks = [f"mark{index}of{role}" for index, role in enumerate(roles)]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    try:
        text = render(with_content(messages, in_parts))
    except Exception:  # a template is a program: it may raise what it likes at what it does not expect
        return False
    return all(mark in text for mark in marks)


def _is_in(message: Mapping[str, Any], in_parts: frozenset[str]) -> bool:
    role = message.get("role")
    return ("system" if role == "developer" else role if role in _ROLES else "user") in in_parts


def _parts(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = None
    if isinstance(part, Mapping) and isinstance(kind, str) and kind in TEXT_PARTS:
        text = part.get(TEXT_PARTS[kind])
    if not isinstance(text, str):
        shown = repr(kind) if isinstance(kind, str) else f"a {type(part).__name__}"
        raise InvalidRequest("messages", f"{where} ({shown}) is not a part of text; this model reads text only")
    return text


class _Generation(Extension):
    """`{% generation %}`, by which transformers' templates mark what an assistant said."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Parsing(ImmutableSandboxedEnvironment):
    """As transformers reads a template."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])


def _names(tree: nodes.Template) -> set[str]:
    """Variables, macros' parameters and namespaces' fields (`ns.field`) that may hold a message's content."""
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    names: set[str] = set()
    for _ in range(_MAX_PASSES):
        found = set(_assigned(tree, names)) | set(_passed(tree, macros, names))
        if found <= names:
            break
        names |= found
    return names


def _assigned(tree: nodes.Template, names: set[str]) -> Iterator[str]:
    for assign in tree.find_all(nodes.Assign):
        if _is_content(assign.node, names):
            yield from _target(assign.target)
    for block in tree.find_all(nodes.With):
        for target, value in zip(block.targets, block.values, strict=True):
            if _is_content(value, names):
                yield from _target(target)


def _target(target: nodes.Node) -> Iterator[str]:
    if isinstance(target, nodes.Name):
        yield target.name
    elif isinstance(target, nodes.NSRef):
        yield f"{target.name}.{target.attr}"


def _passed(tree: nodes.Template, macros: Mapping[str, nodes.Macro], names: set[str]) -> Iterator[str]:
    for call in tree.find_all(nodes.Call):
        macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is None:
            continue
        for parameter, value in zip(macro.args, call.args, strict=False):
            if _is_content(value, names):
                yield parameter.name
        for keyword in call.kwargs:
            if _is_content(keyword.value, names):
                yield keyword.key


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        of_namespace = isinstance(node.node, nodes.Name) and f"{node.node.name}.{node.attr}" in names
        return node.attr == "content" or of_namespace
    if isinstance(node, nodes.Getitem):
        return _is_const(node.arg, "content") or (isinstance(node.arg, nodes.Slice) and _is_content(node.node, names))
    if isinstance(node, nodes.Call):
        getter = isinstance(node.node, nodes.Getattr) and node.node.attr == "get"
        return getter and bool(node.args) and _is_const(node.args[0], "content")
    if isinstance(node, nodes.Filter):
        return node.name not in _NO_CONTENT | _OF_A_LIST and _is_content(node.node, names)
    if isinstance(node, nodes.CondExpr):
        return _is_content(node.expr1, names) or _is_content(node.expr2, names)
    if isinstance(node, nodes.And | nodes.Or):
        return _is_content(node.left, names) or _is_content(node.right, names)
    return False


def _is_first_part(node: nodes.Getitem, names: set[str]) -> bool:
    is_number = isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, int)
    return is_number and _is_content(node.node, names)


def _is_const(node: nodes.Node, value: str) -> bool:
    return isinstance(node, nodes.Const) and node.value == value
