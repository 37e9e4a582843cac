"""How `make serve` ends. A stand-in takes the server's place: it ends cleanly, after a moment, when it gets SIGINT."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.waiting import until

ROOT = Path(__file__).parents[1]

# SIGINT: what Serve does (clean up, exit 0). SIGTERM: dies of it. It writes its pid when it is ready to be told.
SERVER = """
import os, pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(0.2)
    sys.exit(0)
signal.signal(signal.SIGINT, stop)
pathlib.Path("pid.part").write_text(str(os.getpid()))
pathlib.Path("pid.part").rename("pid")
while True:
    signal.pause()
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A folder whose Makefile has the recipe of `make serve` with the stand-in for the server."""
    recipe = "@exec .ci/foreground $(BIN)/python -m deployments.start serve_config.yaml"
    assert recipe in (ROOT / "Makefile").read_text()
    (tmp_path / "server.py").write_text(SERVER)
    command = recipe.replace("$(BIN)/python -m deployments.start serve_config.yaml", f"{sys.executable} server.py")
    (tmp_path / "Makefile").write_text("serve:\n\t" + command.replace(".ci", str(ROOT / ".ci")) + "\n")
    yield tmp_path
    pid = tmp_path / "pid"
    if pid.exists() and is_alive(int(pid.read_text())):
        os.kill(int(pid.read_text()), signal.SIGKILL)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def started(project: Path) -> int:
    until((project / "pid").exists, "the start of the server")
    return int((project / "pid").read_text())


def test_ctrl_c_at_a_terminal_ends_make_serve_with_exit_0_and_leaves_no_process(project: Path) -> None:
    make, terminal = pty.fork()
    if make == 0:
        os.chdir(project)
        os.execvp("make", ["make", "-s", "serve"])
    server = started(project)
    until(lambda: os.tcgetpgrp(terminal) == server, "the server becoming the terminal's foreground job")
    os.write(terminal, b"\x03")
    _, status = until(lambda: ended if (ended := os.waitpid(make, os.WNOHANG))[0] else None, "the end of make")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert not is_alive(server)


# Not SIGINT to make alone: make passes SIGTERM on, but counts on the terminal to send SIGINT to the whole group.
@pytest.mark.parametrize(
    ("number", "kill"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.killpg), (signal.SIGTERM, os.kill)]
)
def test_a_signal_to_make_reaches_the_server(
    project: Path, number: signal.Signals, kill: Callable[[int, int], None]
) -> None:
    with subprocess.Popen(["make", "-s", "serve"], cwd=project, process_group=0, stderr=subprocess.PIPE) as make:
        server = started(project)
        kill(make.pid, number)
        make.communicate(timeout=30)
    until(lambda: not is_alive(server), "the end of the server")
