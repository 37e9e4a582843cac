"""Every wait in the tests ends, and says what it waited for: tests/support/waiting.py has them."""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.waiting import DEADLINE_S, ended, happened, patience, until, until_async, within

ROOT = Path(__file__).parents[1]
WAITING = ROOT / "tests/support/waiting.py"
SOURCES = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != WAITING]
RUNS = {"run", "call", "check_call", "check_output"}  # of subprocess
WITHOUT_LIMIT = {"wait", "join", "communicate"}  # methods that wait for ever unless they are told how long
BOUND = {"within"}  # has the deadline of what it is given


def called(node: ast.AST) -> str:
    """'a.b(...)' -> 'a.b'; '' of anything else."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def is_bare(call: ast.Call) -> bool:
    """Whether the call waits and nothing in it says how long."""
    if "timeout" in {keyword.arg for keyword in call.keywords}:
        return False
    name = called(call)
    owner, _, method = name.rpartition(".")
    if owner == "subprocess":
        return method in RUNS
    if name in ("asyncio.wait", "os.waitpid"):
        return name == "asyncio.wait" or "WNOHANG" not in ast.unparse(call)
    return bool(owner) and method in WITHOUT_LIMIT and not call.args


def own_nodes(loop: ast.While) -> Iterator[ast.AST]:
    """What a turn of the loop does itself: not what functions inside it would."""
    todo: list[ast.AST] = [*loop.body]
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)


def is_waiting(loop: ast.While) -> bool:
    """Whether the loop sleeps until something is so. One that never ends by itself waits for nothing."""
    nodes = list(own_nodes(loop))
    is_endless = isinstance(loop.test, ast.Constant) and not any(isinstance(n, ast.Break | ast.Return) for n in nodes)
    sleeps = any(called(node).rpartition(".")[2] in ("sleep", "wait") for node in nodes)
    polls = all(isinstance(n, ast.Pass) for n in loop.body)  # without a sleep: a busy wait
    return not is_endless and (sleeps or polls)


def findings(code: str) -> list[str]:
    """'line: what waits there without a deadline'."""
    tree = ast.parse(code)
    bounded = {
        id(argument) for node in ast.walk(tree) if called(node) in BOUND for argument in getattr(node, "args", [])[:1]
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in bounded and is_bare(node):
            found.append((node.lineno, called(node)))
        elif isinstance(node, ast.While) and is_waiting(node):
            found.append((node.lineno, f"while {ast.unparse(node.test)}"))
    return [f"{line}: {what}" for line, what in sorted(found)]


def test_no_wait_of_a_test_is_without_a_deadline() -> None:
    found = [f"{path.relative_to(ROOT)}:{finding}" for path in SOURCES for finding in findings(path.read_text())]
    assert found == [], f"use tests/support/waiting.py: {found}"


def test_no_example_of_hypothesis_is_timed() -> None:
    assert settings().deadline is None
    timed = re.compile(r"\bdeadline=(?!None\b)\w+\)")
    assert [str(path) for path in SOURCES if "hypothesis" in (text := path.read_text()) and timed.search(text)] == []


@pytest.mark.parametrize(
    "code",
    [
        "event.wait()",
        "async def f():\n    await asyncio.Event().wait()",
        "async def f():\n    await self.gate.wait()",
        "thread.join()",
        "process.wait()",
        "process.communicate()",
        "process.communicate(input=b'x')",
        "barrier.wait()",
        "async def f():\n    await asyncio.wait(tasks)",
        "os.waitpid(child, 0)",
        "subprocess.run(['make'], check=True)",
        "subprocess.check_output(['make'])",
        "while not done():\n    time.sleep(0.1)",
        "while not done():\n    pass",
        "while True:\n    if done():\n        break\n    time.sleep(0.1)",
        "async def f():\n    async with timeout(20):\n        while not done():\n            await asyncio.sleep(0)",
        "while not storage.copied():\n    storage.wait(1.0)",
    ],
)
def test_a_wait_without_a_deadline_would_be_found(code: str) -> None:
    assert len(findings(code)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "event.wait(5)",
        "', '.join(names)",
        "thread.join(timeout=5)",
        "process.communicate(timeout=30)",
        "subprocess.run(['make'], timeout=60)",
        "async def f():\n    await within(gate.wait(), 'the gate')",
        "async def f():\n    await within(asyncio.wait(tasks), 'the tasks')",
        "async def beat():\n    while True:\n        await asyncio.sleep(1)",
        "while queue:\n    queue.pop()",
        "for _ in patience('it'):\n    time.sleep(0.1)",
    ],
)
def test_what_ends_by_itself_is_left_alone(code: str) -> None:
    assert findings(code) == []


# ---- the waits themselves


def test_a_wait_that_is_over_tells_what_it_waited_for_and_how_long() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, args=(DEADLINE_S,))
    thread.start()
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        for wait in (
            lambda: until(lambda: False, "the moon", 0.01),
            lambda: until(lambda: False, lambda: "the moon", 0.01),
            lambda: asyncio.run(until_async(lambda: False, "the moon", 0.01)),
            lambda: asyncio.run(within(asyncio.sleep(60), "the moon", 0.01)),
            lambda: happened(threading.Event(), "the moon", 0.01),
            lambda: ended(thread, "the moon", 0.01),
            lambda: ended(process, "the moon", 0.01),
            lambda: [None for _ in patience("the moon", 0.01)],
        ):
            with pytest.raises(TimeoutError, match=r"^waited 0\.01 s for the moon$"):
                wait()
    finally:
        stop.set()
        process.kill()
        ended(process, "the process that was killed")
        ended(thread, "the thread that was told to stop")


def test_a_wait_returns_what_it_found_and_leaves_errors_as_they_are() -> None:
    async def fail() -> None:
        raise TimeoutError("of its own")

    turns = iter([0, 0, 7])
    assert until(lambda: next(turns), "a number") == 7
    turns = iter([0, 0, 7])
    assert asyncio.run(until_async(lambda: next(turns), "a number")) == 7
    with pytest.raises(TimeoutError, match="of its own"):
        asyncio.run(within(fail(), "nothing"))
    with pytest.raises(TimeoutError, match="of its own"):
        asyncio.run(until_async(fail, "nothing"))


# ---- a test that hangs

HANGING = """
import asyncio, threading, time
import pytest

def test_locks(): threading.Event().wait()
def test_loops():
    asyncio.run(asyncio.Event().wait())
def test_spins():
    while True: pass

@pytest.fixture
def slow(): time.sleep(600)
def test_setup(slow): pass

@pytest.fixture
def lasting():
    yield
    time.sleep(600)
def test_teardown(lasting): pass

def test_good(): pass
"""


def test_a_test_that_hangs_fails_alone_and_tells_where(tmp_path: Path) -> None:
    (tmp_path / "test_hanging.py").write_text(HANGING)
    (tmp_path / "pytest.ini").write_text("[pytest]\nfaulthandler_timeout = 2\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.item_deadline", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(tmp_path), "-c", str(tmp_path / "pytest.ini"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert "3 failed, 2 passed, 2 errors" in done.stdout, done.stdout + done.stderr
    for name in ("locks", "loops", "spins", "setup"):
        assert f"TimeoutError: test_hanging.py::test_{name} was still running after 1.6 s" in done.stdout
    assert "TimeoutError: test_hanging.py::test_teardown was still running after 0.2 s" in done.stdout
    assert "while True: pass" in done.stdout, "the stack shows where"
