"""What the offline benchmarks share, ours and the peers': prompts, cases, rounds, JSON lines. Standard library only."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance

Case = list[str | None]  # one adapter name (or None) per request
Figures = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The workload: a closed batch of prompts of one length, each continued by the same number of tokens."""
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--adapters", type=Path, default=Path("demo/adapters"), help="folder of PEFT adapters")
    parser.add_argument("--num-adapters", type=int, help="use the first so many of them; default: all")
    parser.add_argument("--cases", default="base,one_adapter,mixed_adapters")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--on-request", action="store_true", help="one round for each line on stdin, until it ends")


def adapter_folders(args: argparse.Namespace) -> dict[str, str]:
    """Name -> folder, in the order of the names."""
    wanted = [case for case in args.cases.split(",") if case != "base"]
    if not wanted:
        return {}
    folders = sorted(path.parent for path in args.adapters.glob("*/adapter_config.json"))
    return {folder.name: str(folder) for folder in folders[: args.num_adapters]}


def cases(args: argparse.Namespace) -> dict[str, Case]:
    """The adapter of each request, by case."""
    names = list(adapter_folders(args))
    every: dict[str, Case] = {"base": [None] * args.requests}
    if names:
        every["one_adapter"] = [names[0]] * args.requests
        every["mixed_adapters"] = [names[i % len(names)] for i in range(args.requests)]
    return {name: every[name] for name in args.cases.split(",")}


def prompts(args: argparse.Namespace) -> list[list[int]]:
    vocab = int(json.loads((Path(args.model) / "config.json").read_text())["vocab_size"])
    rng = random.Random(args.seed)
    return [[rng.randrange(10, vocab) for _ in range(args.prompt_tokens)] for _ in range(args.requests)]


def run_rounds(args: argparse.Namespace, names: Sequence[str], measure: Callable[[str], Figures]) -> None:
    """Measure every case in turn (A B C A B C ...), and print each round as asked, or the medians of all rounds."""
    if args.on_request:
        print(json.dumps({"ready": True}), flush=True)
        for _ in sys.stdin:
            print(json.dumps({name: measure(name) for name in names}), flush=True)
        return
    rounds = [{name: measure(name) for name in names} for _ in range(args.rounds)]
    for name in names:
        print_figures({"case": name, **spread([r[name] for r in rounds])}, args)


def spread(rounds: Sequence[Figures]) -> dict[str, Any]:
    """Median of each figure, with the lowest and highest."""
    return {
        key: {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}
        for key in rounds[0]
        if (values := [r[key] for r in rounds])
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds, of seconds."""
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [*values] * 99
    return {f"p{p}_ms": round(cuts[p - 1] * 1e3, 2) for p in (50, 90, 99)}


def print_figures(figures: dict[str, Any], args: argparse.Namespace) -> None:
    """One JSON line: figures, configuration and provenance."""
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    print(json.dumps({**figures, "config": config, "provenance": provenance()}), flush=True)
