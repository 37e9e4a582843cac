"""Files and functions stay short enough to be read in one go, and no file knows the machine it was written on."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.project import ROOT, project_files

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
# A kernel is one long function by nature: files and folders named so are exempt.
KERNEL = re.compile(r"(^|[_/])kernels?\.py$|^engine/\w+_kernels/")
# Put together so that this file does not match itself.
HOME = re.compile(r"(?<![\w.~-])/(?:" + "|".join(("ho" + "me", "ro" + "ot", "wo" + "rk", "Us" + "ers")) + r")/[\w.]")


FILES = project_files()
SOURCES = [path for path in FILES if path.suffix == ".py"]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_file_is_longer_than_350_lines(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in SOURCES}
    totals: Counter[str] = Counter()
    for path, count in lines.items():
        totals[path.parts[0] if len(path.parts) > 1 else "."] += count
    with capsys.disabled():
        print("\nlines of Python: " + ", ".join(f"{name} {total}" for name, total in sorted(totals.items())))
    assert {path: n for path, n in lines.items() if n > MAX_FILE_LINES and not KERNEL.search(path.as_posix())} == {}


def test_no_function_is_longer_than_60_lines() -> None:
    too_long = [
        f"{path.relative_to(ROOT)}:{f.lineno} {f.name}: {length} lines"
        for path in SOURCES
        if not KERNEL.search(path.relative_to(ROOT).as_posix())
        for f in functions(path)
        if (length := (f.end_lineno or f.lineno) - f.lineno + 1) > MAX_FUNCTION_LINES
    ]
    assert too_long == []


def test_test_folders_shadow_no_package() -> None:
    """An `__init__.py` under tests, or a test folder named like a package of ours, makes `import` ambiguous."""
    assert [path for path in FILES if path.name == "__init__.py" and "tests" in path.relative_to(ROOT).parts] == []
    packages = {path.parent.name for path in FILES if path.name == "__init__.py" and path.parent.parent == ROOT}
    folders = {path.relative_to(ROOT).parts[1] for path in FILES if path.relative_to(ROOT).parts[0] == "tests"}
    assert packages & folders <= {"demo"}  # without an __init__.py it cannot hide `demo`, and it tests just that


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for path in FILES:
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # weights and pictures
        found += [f"{path.relative_to(ROOT)}:{n}" for n, line in enumerate(text.splitlines(), 1) if HOME.search(line)]
    assert found == []


@pytest.mark.parametrize("text", ["/ho" + "me/me/x", '"/wo' + 'rk/main"', "see /ro" + "ot/.cache"])
def test_a_path_of_one_machine_would_be_found(text: str) -> None:
    assert HOME.search(text)


@pytest.mark.parametrize("text", ["tests/work/x", "https://host/home/x", "the root/base of it", "~/work/x"])
def test_other_paths_are_left_alone(text: str) -> None:
    assert not HOME.search(text)
