"""A run that was killed goes on where it was, and ends with the bytes of one that was not."""

from __future__ import annotations

import fcntl
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.quantize import rounded

ROOT = Path(__file__).parents[2]


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_run_goes_on_and_gives_the_bytes_of_an_undisturbed_one(
    base: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    """Killed twice, at random moments of its life; the second time while it goes on."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    arguments = [base("llama"), whole, out, "--method", "int4", "--held-out", text, "--max-samples", 1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_quantize", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["whole"] == 0, done.stderr
    assert told["statuses"] == [-signal.SIGKILL, -signal.SIGKILL, 0], f"{told} {done.stderr}"
    assert told["was_there"] == [False, False, False]
    assert bytes_in(out) == bytes_in(whole), told
    assert not list(tmp_path.glob("*unfinished*"))


class Interrupted(Exception):
    pass


@pytest.fixture
def half_done(
    base: Callable[..., Path], run: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A copy of a model and the OUT of a run over it that ended in its second layer."""
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    for path in base("llama").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    pack, calls = rounded.pack, []

    def fail_later(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) > 7:
            raise Interrupted
        return pack(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(rounded, "pack", fail_later)
        with pytest.raises(Interrupted):
            run(model, out, "--method", "int8")
    assert len(calls) == 8
    return model, out


def test_layers_that_are_done_are_not_done_again(
    half_done: tuple[Path, Path], run: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = half_done
    done = {path: path.stat().st_ino for path in out.with_name("out.unfinished").glob("*.safetensors")}
    assert len(done) == 1
    assert run(model, out, "--method", "int8", "--resume")[0] == 0
    assert {path.stat().st_ino for path in out.glob("*.safetensors")} >= set(done.values())


def test_other_arguments_do_not_go_on_with_unfinished_work(
    half_done: tuple[Path, Path], run: Callable[..., tuple[int, str]]
) -> None:
    model, out = half_done
    status, told = run(model, out, "--method", "int4")
    assert status == 2
    assert "1 of 3 parts of other work: method was 'int8' and is 'int4'" in told
    assert "--no-resume" in told
    assert run(model, out, "--method", "int4", "--no-resume")[0] == 0


def test_a_changed_model_does_not_go_on_with_unfinished_work(
    half_done: tuple[Path, Path], run: Callable[..., tuple[int, str]]
) -> None:
    model, out = half_done
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    status, told = run(model, out, "--method", "int8")
    assert status == 2
    assert "model was" in told


def test_two_processes_do_not_work_in_one_folder(
    half_done: tuple[Path, Path], run: Callable[..., tuple[int, str]]
) -> None:
    model, out = half_done
    with out.with_name("out.unfinished").joinpath("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, told = run(model, out, "--method", "int8")
    assert status == 2
    assert "another process" in told
    assert run(model, out, "--method", "int8")[0] == 0
