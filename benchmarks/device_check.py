"""What a GPU machine shows in eight minutes: right first, then fast. Needs neither Ray nor anything installed by us.

    python -m benchmarks.device_check                 # everything, at most 480 s
    python -m benchmarks.device_check --parts kernels,steps --seconds 240 --logs FOLDER
    python -m benchmarks.device_check --device cpu    # a rehearsal without a GPU: Triton's interpreter, a tiny shape

Each part is a process of its own with a share of the time. What it prints is shown as it comes; a part that fails or
runs out of time is told and the next one begins. The last lines are JSON, a line for each part. Exit code 1 when one
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Another version's deprecations are no failures there, and its plug-ins may print what we do not read.
PYTEST = ("-m", "pytest", "-q", "-W", "ignore", "-o", "minversion=0", "-p", "no:cacheprovider", "--tb=short")
# What a part prints is shown up to here; its log is whole.
MAX_SHOWN_LINES = 400


@dataclass(frozen=True, slots=True)
class Part:
    """One process: `python` with these arguments, ended after `seconds`."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    promises: str  # what it shows when it ends well


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    ended: str  # "passed", "failed", "out of time", "no time left"
    seconds: float
    exit_code: int | None
    counts: dict[str, int]  # of tests, by pytest's own words
    figures: list[Any]  # the JSON lines it printed


def parts(device: str) -> tuple[Part, ...]:
    """In the order in which they are worth having."""
    many = ("-n", "6") if device == "cuda" and find_spec("xdist") else ()  # compiling is what takes the time
    tests = (*PYTEST, *many)
    shape = ("--shape", "llama8b") if device == "cuda" else ("--shape", "tiny", "--device", "cpu")
    step = ("-m", "benchmarks.device_step", *shape)
    if device == "cuda":
        step = (*step, "--batches", "1,32,256", "--contexts", "2048", "--rounds", "3", "--steps", "20")
    else:
        step = (*step, "--batches", "1,4", "--contexts", "32", "--rounds", "1", "--steps", "2", "--adapters", "3")
        step = (*step, "--dtype", "float32", "--product-size", "64", "--copy-mib", "1", "--kernels", "torch")
        step = (*step, "--prefill-sequences", "1", "--prefill-tokens", "32")
    # The interpreter takes minutes for what a GPU does at once: a rehearsal tries a few tests of each kind.
    models, kernels = (("-m", "not slow"), ("-m", "", "-k", "not compile"))
    if device == "cpu":
        models = ("-m", "not slow", "-k", "test_text_is and mistral")
        kernels = ("-m", "", "-k", "rms_norm or inputs_wider or write_kv or a_site_alone")
    found = (
        Part("machine", ("-c", _MACHINE), 30, "what is measured on"),
        Part(
            "models",
            (*tests, *models, "tests/triton_kernels/test_engine.py"),
            110,
            "tiny models, base and adapters, say what transformers and PEFT say, recorded steps too",
        ),
        Part(
            "kernels",
            (*tests, *kernels, "tests/triton_kernels", "tests/kv/test_attention.py"),
            120,
            "each kernel agrees with its reference",
        ),
        Part("steps", step, 130, "decode steps and prefill of a large shape, beside the floors of the device"),
    )
    if device == "cpu":
        return found
    # By name, as collecting all of them would import what this machine lacks.
    gpu_tests = tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("*/test_*_gpu.py")))
    return (*found, Part("copies", (*tests, "-m", "gpu", *gpu_tests), 60, "copies beside the step; the sampler"))


_MACHINE = """
import json, shutil, subprocess
from benchmarks.provenance import provenance
found = provenance()
try:
    import triton
    found["triton"] = triton.__version__
except ImportError:
    found["triton"] = None
if shutil.which("nvidia-smi"):
    query = "name,driver_version,memory.total,memory.used,clocks.max.sm,power.limit,mig.mode.current"
    asked = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True)
    found["nvidia_smi"] = asked.stdout.splitlines()
print(json.dumps(found))
"""


def run_part(part: Part, seconds: float, logs: Path | None) -> Outcome:
    """Runs it for at most `seconds`; what it printed until then counts."""
    begin, lines, late = time.monotonic(), list[str](), threading.Event()
    log = (logs / f"{part.name}.log").open("w") if logs is not None else None
    search_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        [sys.executable, *part.arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": search_path, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its own processes end with it
    ) as process:

        def end() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(seconds, end)
        timer.start()
        for line in process.stdout or ():
            lines.append(line.rstrip("\n"))
            if log is not None:
                log.write(line)
                log.flush()
            if len(lines) <= MAX_SHOWN_LINES:
                print(f"  {part.name:8} {time.monotonic() - begin:6.1f}  {shown(lines[-1])}", flush=True)
        code = process.wait()
        timer.cancel()
        timer.join()
        _kill(process)  # what it left behind
    if log is not None:
        log.close()
    ended = "out of time" if late.is_set() else "passed" if code == 0 else "failed"
    return Outcome(part.name, ended, round(time.monotonic() - begin, 1), code, counts(lines), figures(lines))


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def shown(line: str) -> str:
    """A figure without what is the same in all of its part; the log has it."""
    if not (line.startswith("{") and (found := figures([line]))):
        return line
    return json.dumps({key: value for key, value in found[0].items() if key not in ("config", "provenance")})


def counts(lines: Sequence[str]) -> dict[str, int]:
    """Of pytest's last line, `3 failed, 7 passed in 1.2s`."""
    for line in reversed(lines):
        found = re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed|xpassed)", line)
        if found and re.search(r"\bin [\d.]+s", line):
            return {word: int(number) for number, word in found}
    return {}


def figures(lines: Sequence[str]) -> list[Any]:
    """Those lines that are a JSON object."""
    found = []
    for line in lines:
        if line.startswith("{"):
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def run_all(chosen: Sequence[Part], seconds: float, logs: Path | None = None) -> Iterator[Outcome]:
    """Each part in turn, while there is time for it: its own share, and no more than is left."""
    deadline = time.monotonic() + seconds
    for part in chosen:
        left = deadline - time.monotonic()
        if left <= 1:
            yield Outcome(part.name, "no time left", 0.0, None, {}, [])
            continue
        print(f"{part.name}: {part.promises} (at most {min(part.seconds, left):.0f} s)", flush=True)
        yield run_part(part, min(part.seconds, left), logs)


def parse_args(names: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(names), help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--seconds", type=float, default=470.0, help="of all together")
    parser.add_argument("--logs", type=Path, help="a folder for what each part printed, whole")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    unknown = set(args.parts.split(",")) - set(names)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; the parts are {', '.join(names)}")
    return args


def main() -> int:
    names = [part.name for part in parts("cuda")]
    args = parse_args(names)
    if args.logs is not None:
        args.logs.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in parts(args.device) if part.name in args.parts.split(",")]
    outcomes = list(run_all(chosen, args.seconds, args.logs))
    print("summary", flush=True)
    for outcome in outcomes:
        row = {"part": outcome.name, "ended": outcome.ended, "seconds": outcome.seconds, **outcome.counts}
        print(json.dumps(row), flush=True)
    return 0 if all(outcome.ended == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
