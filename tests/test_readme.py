"""What the documents say is so: commands run, targets, links and files exist.

Fences marked `curl` and `client` need a server: tests/e2e/test_readme_commands.py runs those.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import (
    DOCUMENTS,
    MARKS,
    ROOT,
    Fence,
    expected_output,
    fences,
    linked_paths,
    make_targets,
    marked,
    named_sources,
)

README = ROOT / "README.md"
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@pytest.mark.parametrize("fence", marked("offline"), ids=str)
def test_a_python_example_runs_as_it_stands(fence: Fence) -> None:
    done = subprocess.run(
        [sys.executable, "-c", fence.code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    expected = expected_output(fence)
    assert expected is None or done.stdout.strip() == expected.strip()


def test_the_readme_shows_an_example_that_needs_no_server_and_one_that_does() -> None:
    marks = [fence.mark for fence in fences(README)]
    assert "offline" in marks
    assert "curl" in marks


@documents
def test_every_command_is_marked_with_how_it_is_tested(document: Path) -> None:
    """An unmarked block of shell or Python would be a promise that nobody checks. `none` must say why."""
    for fence in fences(document):
        assert fence.mark in (*MARKS, None), f"{fence}: unknown mark {fence.mark!r}; the marks are {MARKS}"
        assert fence.mark != "none" or fence.reason, f"{fence}: `none` needs a reason: <!-- test: none: why -->"
        if fence.language in ("bash", "sh", "python"):
            assert fence.mark, f"{fence}: put <!-- test: ... --> on the line above"


@documents
def test_every_link_and_every_named_source_exists(document: Path) -> None:
    missing = [path for path in linked_paths(document) if not (document.parent / path).exists()]
    here = (ROOT, document.parent)
    missing += [path for path in named_sources(document) if not any((folder / path).exists() for folder in here)]
    assert missing == []


@documents
def test_every_make_target_that_is_named_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(make_targets(document)) <= targets


def test_make_help_lists_every_target() -> None:
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony
    assert set(re.findall(r"^  make ([a-z0-9-]+)", shown.stdout, re.MULTILINE)) == set(phony[1].split())
