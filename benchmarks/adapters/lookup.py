"""What a registered name costs: starting with so many of them, finding one, and memory.

Names are registered once, in a process that ends; then stores are opened over what it left on disk, each in a process
of its own, by turns few names and many, and the medians of the rounds are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from adapter_store.records import Registration, StoreConfig
from adapter_store.store import AdapterStore
from adapter_store.tiers.blobs import MemoryBlobs
from benchmarks import workload
from tests.support.fake_sources import small_spec
from tests.support.numbered_source import NumberedSource, name_of

ROWS = 10_000  # of one call
DIGEST = "0" * 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--names", default="1000,1000000")
    parser.add_argument("--lookups", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)


def run(args: argparse.Namespace) -> None:
    if not hasattr(AdapterStore, "register"):
        raise SystemExit("this store registers no names: every name is looked up in its sources")
    counts = [int(count) for count in args.names.split(",")]
    rounds: dict[int, list[workload.Figures]] = {count: [] for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        registered = {count: in_a_process("register", f"{folder}/{count}", count) for count in counts}
        for _ in range(args.rounds):
            for count in counts:
                rounds[count].append(in_a_process("look", f"{folder}/{count}", count, args.lookups))
        for count in counts:
            disk_mib = sum(f.stat().st_size for f in Path(folder, str(count)).rglob("*") if f.is_file()) / (1 << 20)
            figures = {"register_s": round(registered[count]["register_s"], 2), "disk_mib": round(disk_mib, 1)}
            figures |= workload.spread(rounds[count])
            ratios = {
                f"{key}_ratio": round(statistics.median(r[key] for r in rounds[count]) / median, 2)
                for key in rounds[count][0]
                if (median := statistics.median(r[key] for r in rounds[counts[0]]))
            }
            workload.print_figures({"case": f"{count} names", "names": count, **figures, **ratios}, args)


def in_a_process(function: str, *arguments: object) -> workload.Figures:
    """What a function of this module prints, called in a fresh interpreter."""
    program = f"from benchmarks.adapters import lookup; lookup.tell(lookup.{function}(*{arguments!r}))"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    figures: workload.Figures = json.loads(done.stdout)
    return figures


def tell(figures: Coroutine[Any, Any, workload.Figures]) -> None:
    print(json.dumps(asyncio.run(figures)))


def opened(folder: str, count: int) -> AdapterStore:
    config = StoreConfig(disk_path=folder, max_adapter_bytes=1 << 20)
    return AdapterStore([NumberedSource(small_spec(), count)], MemoryBlobs(), config)


async def register(folder: str, count: int) -> workload.Figures:
    """Registers `count` names. Each stands for the adapter of the next number."""
    Path(folder).mkdir(parents=True)
    store, start_s = opened(folder, count), time.perf_counter()
    for first in range(0, count, ROWS):
        numbers = range(first, min(first + ROWS, count))
        rows = [
            Registration(
                name=f"tenant/{name_of(i)}",
                source="numbered",
                location=name_of(i),
                sha256=(("adapter_model.safetensors", DIGEST),),
            )
            for i in numbers
        ]
        await store.register(tuple(rows))
    await store.close()
    return {"register_s": time.perf_counter() - start_s}


async def look(folder: str, count: int, num_lookups: int) -> workload.Figures:
    """Opens the store and finds names that were never asked for before."""
    start_s = time.perf_counter()
    store = opened(folder, count)
    await store.resolve(f"tenant/{name_of(0)}")
    start_ms = (time.perf_counter() - start_s) * 1e3
    rng, seconds = random.Random(1), []
    for number in rng.sample(range(1, count), min(num_lookups, count - 1)):
        name = f"tenant/{name_of(number)}"
        begin_s = time.perf_counter()
        await store.resolve(name)
        seconds.append(time.perf_counter() - begin_s)
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    await store.close()
    return {
        "start_ms": start_ms,
        "lookup_us": statistics.median(seconds) * 1e6,
        "rss_mib": resident_pages * 4096 / (1 << 20),
    }
