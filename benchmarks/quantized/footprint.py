"""Resident memory of a process that holds the model in 16 bits and in fewer, and its peak while it loads.

Each case is a process of its own. Counted are its anonymous memory and, where the checkpoint's file is mapped, the
tensors that the model still reads there: the file's other pages are the system's to take back.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.workload import print_figures

_MIB = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--kinds", default="int8,int8-dynamic,int4,nf4", help="quantization at load")
    parser.add_argument("--checkpoint", action="append", default=[], help="NAME=FOLDER, quantized; repeatable")
    parser.add_argument("--inside", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    if args.inside:
        print(json.dumps(_measure(json.loads(args.inside))))
        return
    model = {"model": args.model}
    cases: dict[str, dict[str, Any]] = {"16 bits": model}
    cases |= {kind: {**model, "quantization": kind} for kind in filter(None, args.kinds.split(","))}
    cases |= {name: {"model": folder} for name, folder in (pair.split("=", 1) for pair in args.checkpoint)}
    rows = {name: _in_a_process(settings) for name, settings in cases.items()}
    for name, row in rows.items():
        saved = {"saved_mib": round(rows["16 bits"]["resident_mib"] - row["resident_mib"], 1)}
        print_figures({"case": name, **row, **saved}, args)


def _in_a_process(settings: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.quantized", "footprint", "--inside", json.dumps(settings)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(next(line for line in printed.splitlines() if line.startswith("{"))))


def _measure(settings: dict[str, Any]) -> dict[str, float]:
    from engine import LLM, SamplingParams

    before = _anonymous_mib()
    with _peak() as peak:
        llm = LLM(**settings, kv_cache_bytes=64 * _MIB, max_model_len=512, max_num_seqs=4)
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2, temperature=0, ignore_eos=True))
    stats, mapped = llm.stats(), _mapped_mib()
    return {
        "before_mib": before,
        "resident_mib": round(_anonymous_mib() + mapped, 1),
        "of_it_mapped_mib": mapped,
        "peak_anonymous_mib": max(peak),
        "quantized_mib": round(stats.quantized_bytes / _MIB, 1),
        "as_16_bits_mib": round(stats.quantized_16bit_bytes / _MIB, 1),
    }


@contextmanager
def _peak() -> Iterator[list[float]]:
    """What was seen every 5 ms meanwhile."""
    seen, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(_anonymous_mib())
            time.sleep(0.005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _mapped_mib() -> float:
    """Of tensors that lie in a mapped checkpoint."""
    import torch

    files = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    mapped = [[int(end, 16) for end in row[0].split("-")] for row in files if row[-1].endswith(".safetensors")]
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
            storage = found.untyped_storage()
            if any(begin <= storage.data_ptr() < end for begin, end in mapped):
                storages[storage.data_ptr()] = found.numel() * found.element_size()
    return round(sum(storages.values()) / _MIB, 1)


def _anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024, 1)
