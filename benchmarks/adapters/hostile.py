"""What a hostile adapter costs whoever is beside it: the longest time in which nobody else had a turn, and memory.

Each case is checked and packed in a thread of a fresh process, as the store does it, while another thread ticks. The
longest gap between two ticks is the freeze; a run without any adapter says what the machine itself does to a ticking
thread. Memory is what the process and those that it starts came to, beyond what they had before.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from adapter_store.errors import StoreError
from adapter_store.image import patterns
from adapter_store.image.inspect import Limits
from adapter_store.image.packing import pack
from benchmarks import workload
from tests.support.fake_sources import small_adapter, small_spec
from tests.support.hostile_adapters import cases
from tests.support.hostile_bombs import bombs
from tests.support.hostile_files import Case

TICK_S = 0.001
SEED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--drawn", type=int, default=220, help="cases drawn from the generator, beside the worst ones")
    parser.add_argument("--rounds", type=int, default=3, help="of each case; the least disturbed one counts")
    parser.add_argument("--cases", default="", help="only those with this in their names")


def run(args: argparse.Namespace) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"from benchmarks.adapters import hostile; hostile.tell({args.drawn}, {args.rounds})"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        figures = json.loads(line)
        if args.cases in figures["case"]:
            workload.print_figures(figures, args)


def tell(drawn: int, rounds: int) -> None:
    """Prints one line for each of the worst cases, and one for the worst of all that are drawn."""
    spec = small_spec()
    pack(small_adapter(), spec)  # what is imported late is imported now
    print(json.dumps({"case": "nothing", **least([measure(lambda: time.sleep(0.2)) for _ in range(rounds)])}))
    for case in bombs():
        print(json.dumps({"case": case.kind, **least([look_at(case) for _ in range(rounds)])}), flush=True)
    kinds: dict[str, list[workload.Figures]] = {}
    for case in cases(drawn, SEED):
        kinds.setdefault(case.kind, []).append(least([look_at(case) for _ in range(rounds)]))
    for kind, measured in sorted(kinds.items()):
        worst = {key: max(figures[key] for figures in measured) for key in measured[0]}
        print(json.dumps({"case": f"drawn: {kind}", "adapters": len(measured), **worst}), flush=True)


def look_at(case: Case) -> workload.Figures:
    """Checks and packs one adapter; what comes of it does not matter here."""

    def check() -> None:
        patterns._matched.cache_clear()
        with contextlib.suppress(StoreError):
            pack(case.files, small_spec(), Limits(max_rank=512, max_bytes=1 << 28))

    return measure(check)


def measure(work: Callable[[], None]) -> workload.Figures:
    """Runs `work` in a thread beside one that ticks."""
    gc.collect()
    resident = reset_peak()
    is_over, freezes, children = threading.Event(), [0.0], [0]

    def tick() -> None:
        last = time.perf_counter()
        while not is_over.is_set():
            time.sleep(TICK_S)
            now = time.perf_counter()
            freezes.append(now - last - TICK_S)
            last = now

    def look_at_children() -> None:
        while not is_over.wait(2 * TICK_S):
            children.extend(peak_of_children(working.native_id))

    working = threading.Thread(target=work)
    others = [threading.Thread(target=tick), threading.Thread(target=look_at_children)]
    for thread in others:
        thread.start()
    begin_s = time.perf_counter()
    working.start()
    working.join()
    seconds = time.perf_counter() - begin_s
    is_over.set()
    for thread in others:
        thread.join()
    return {
        "freeze_ms": max(freezes) * 1e3,
        "seconds": seconds,
        "memory_mib": (peak_bytes() - resident) / (1 << 20),
        "child_mib": max(children) / (1 << 20),
    }


def least(rounds: list[workload.Figures]) -> workload.Figures:
    """Of times the least, as what else runs on the machine only adds; of memory the most, as what was used before is
    used again."""
    best = {key: max if key.endswith("_mib") else min for key in rounds[0]}
    return {key: round(best[key](figures[key] for figures in rounds), 3) for key in rounds[0]}


def reset_peak() -> int:
    """Bytes in memory now; the peak counts from here on. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most bytes in memory since `reset_peak`."""
    return status_bytes("VmHWM")


def peak_of_children(thread: int | None) -> Iterator[int]:
    """Bytes that processes started by a thread of this one came to, as far as they still run."""
    try:
        children = Path(f"/proc/self/task/{thread}/children").read_text().split()
        for child in children:
            # Until it runs its program, it is still what started it.
            if b"match_names" in Path(f"/proc/{child}/cmdline").read_bytes():
                yield status_bytes("VmHWM", child)
    except OSError:
        return  # it has just ended


def status_bytes(name: str, process: str = "self") -> int:
    """A line of a process's /proc/PID/status."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:")), 0)
