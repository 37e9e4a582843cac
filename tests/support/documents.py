"""Reads the project's Markdown: its code fences, the mark above each that says how to test it, the paths it names.

A mark is a comment on the line above a fence: `<!-- test: offline -->`. CONTRIBUTING.md lists the marks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "k8s/**/*.md", "demo/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
MARKS = ("offline", "output", "curl", "client", "none")

_FENCE = re.compile(
    r"(?:^<!-- test: (?P<mark>\w+)(?:: (?P<reason>[^>]+?))? -->\n+)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
_SOURCE = re.compile(r"(?<![\w./<{*-])((?:[\w.-]+/)+[\w.-]+\.(?:py|md|yaml|toml|sh))\b")
_MAKE = re.compile(r"(?:^|[`\s])make ([a-z][a-z0-9-]*)(?=[`\s]|$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Fence:
    """One code block. `line` is where its code begins, counted from 1."""

    document: Path
    line: int
    language: str
    mark: str | None
    reason: str | None
    code: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def fences(document: Path) -> list[Fence]:
    text = document.read_text()
    return [
        Fence(document, text.count("\n", 0, m.start("code")) + 1, m["language"], m["mark"], m["reason"], m["code"])
        for m in _FENCE.finditer(text)
    ]


def marked(mark: str) -> list[Fence]:
    """The fences of all documents that carry `mark`, in order."""
    return [fence for document in DOCUMENTS for fence in fences(document) if fence.mark == mark]


def expected_output(fence: Fence) -> str | None:
    """The code of the fence that follows, if it is marked `output`."""
    following = [other for other in fences(fence.document) if other.line > fence.line][:1]
    return following[0].code if following and following[0].mark == "output" else None


def linked_paths(document: Path) -> list[str]:
    """Targets of relative links: relative to the document."""
    return _LINK.findall(document.read_text())


def named_sources(document: Path) -> list[str]:
    """Source files named with their folder, anywhere in the text: relative to the root or to the document."""
    text = re.sub(r"\]\([^)]*\)", "]", document.read_text())
    return _SOURCE.findall(text)


def make_targets(document: Path) -> list[str]:
    """Targets of `make` named in code, inline or fenced."""
    text = document.read_text()
    code = "\n".join([fence.code for fence in fences(document)] + re.findall(r"`[^`\n]+`", text))
    return _MAKE.findall(code)
