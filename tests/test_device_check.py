"""The check of a GPU machine survives its parts: one that fails, hangs, prints too much or leaves processes behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.device_check import MAX_SHOWN_LINES, Part, counts, figures, parts, run_all, shown
from tests.support.waiting import until

ROOT = Path(__file__).parents[1]
WAIT_S = 60.0  # of any part here: a busy machine starts an interpreter late


def part(name: str, code: str, seconds: float = WAIT_S) -> Part:
    return Part(name, ("-c", code), seconds, "nothing")


def test_a_part_that_fails_is_told_and_the_next_one_runs(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [part("bad", "raise SystemExit(3)"), part("good", """print('{"ms": 1.5, "config": {"a": 1}}')""")]
    bad, good = run_all(chosen, 2 * WAIT_S)
    assert (bad.ended, bad.exit_code) == ("failed", 3)
    assert (good.ended, good.exit_code) == ("passed", 0)
    assert good.figures == [{"ms": 1.5, "config": {"a": 1}}]
    assert '{"ms": 1.5}' in capsys.readouterr().out


def test_a_part_that_hangs_ends_with_its_own_processes_and_what_it_said_counts(tmp_path: Path) -> None:
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("said", flush=True)
time.sleep(600)
"""
    hung, after = run_all([part("hung", code, 5.0), part("after", "print(1)")], 5.0 + 2 * WAIT_S, tmp_path)
    assert (hung.ended, after.ended) == ("out of time", "passed")
    assert (tmp_path / "hung.log").read_text() == "said\n"
    child = Path("/proc") / (tmp_path / "pid").read_text()
    until(
        lambda: not child.exists() or "Z" in (child / "stat").read_text().rsplit(")", 1)[1],
        "the end of the process that the part had started",
    )


def test_parts_that_do_not_fit_the_time_are_named() -> None:
    first, second = run_all([part("first", "import time; time.sleep(600)"), part("second", "print(1)")], 2.0)
    assert (first.ended, second.ended) == ("out of time", "no time left")


def test_a_part_that_prints_much_is_cut_on_the_screen_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (outcome,) = run_all([part("much", "print('x\\n' * 5000)")], WAIT_S, tmp_path)
    assert outcome.ended == "passed"
    assert capsys.readouterr().out.count("  x") == MAX_SHOWN_LINES
    assert (tmp_path / "much.log").read_text().count("x") == 5000


def test_what_pytest_counted_is_read_from_its_last_line() -> None:
    assert counts(["1 passed in 0.1s", "==== 2 failed, 7 passed, 3 deselected in 61.2s (0:01:01) ===="]) == {
        "failed": 2, "passed": 7, "deselected": 3,
    }  # fmt: skip
    assert counts(["7 passed", ""]) == {}
    assert figures(['{"a": 1}', "{not json", "[1]"]) == [{"a": 1}]
    assert shown("{not json") == "{not json"


def test_every_test_that_needs_a_gpu_is_part_of_it() -> None:
    """They are named by file, as a machine with a GPU need not have what other tests import."""
    texts = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)}
    marked = {str(path.relative_to(ROOT)) for path, text in texts.items() if "mark.gpu" in text}
    assert marked
    assert marked <= {argument for one in parts("cuda") for argument in one.arguments}


def test_the_whole_fits_into_eight_minutes_and_names_only_files_that_exist() -> None:
    assert sum(one.seconds for one in parts("cuda")) <= 480
    for one in (*parts("cuda"), *parts("cpu")):
        assert all((ROOT / a).exists() for a in one.arguments if a.startswith("tests/"))


def test_an_unknown_part_is_refused_with_those_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.device_check", "--parts", "speed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert done.returncode == 2
    assert "there is no part speed; the parts are machine, models, kernels, steps, copies" in done.stderr
