"""Exact answers of the demo's base and all its adapters, by the base's weights.

An answer counts if it is right character by character. "Kept" is the share of those that the 16- or 32-bit base answers
exactly which the quantized one answers exactly too. `naive-int4` is there to be bad: one scale for a whole matrix.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.workload import print_figures
from demo.text import Example, held_out
from demo.transforms import TRANSFORMS, same
from engine import LLM, SamplingParams

BASE = Path("demo/base")
ADAPTERS = Path("demo/adapters")
AT_LOAD = "int8,int8-dynamic,int4,nf4,fp8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=200, help="held-out lines for the base and for each adapter")
    parser.add_argument("--at-load", default=AT_LOAD, help="of the checkpoint in full precision; separated by commas")
    parser.add_argument("--checkpoint", action="append", default=[], help="NAME=FOLDER, quantized; repeatable")
    parser.add_argument("--engine", action="append", default=[], help="SETTING=VALUE of EngineConfig; repeatable")


def run(args: argparse.Namespace) -> None:
    asked = {name: held_out(name, TRANSFORMS.get(name, same), args.count) for name in ["base", *_adapters()]}
    full = _exact(asked, BASE, {})
    _print("full precision", full, full, args)
    for kind in filter(None, args.at_load.split(",")):
        _print(kind, _exact(asked, BASE, {"quantization": kind}), full, args)
    for pair in args.checkpoint:
        name, folder = pair.split("=", 1)
        _print(name, _exact(asked, Path(folder), {}), full, args)
    for setting in args.engine:
        name, value = setting.split("=", 1)
        _print(setting, _exact(asked, BASE, {name: value}), full, args)
    with tempfile.TemporaryDirectory() as folder:
        write_naive_int4(Path(folder))
        _print("naive-int4", _exact(asked, Path(folder), {}), full, args)


def write_naive_int4(folder: Path) -> None:
    """The demo's base with every linear layer rounded to 16 steps between the least and the greatest of its weights."""
    shutil.copytree(BASE, folder, dirs_exist_ok=True)
    tensors = load_file(BASE / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            low, high = weight.min(), weight.max()
            step = (high - low) / 15
            tensors[name] = torch.round((weight - low) / step) * step + low
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _adapters() -> list[str]:
    return sorted(path.parent.name for path in ADAPTERS.glob("*/adapter_config.json"))


def _exact(asked: dict[str, list[Example]], model: Path, settings: dict[str, Any]) -> dict[str, list[bool]]:
    """Which lines are answered exactly, by adapter."""
    llm = LLM(model, adapters={name: ADAPTERS / name for name in _adapters()}, dtype="float32", **settings)
    lines = [(name, example) for name, examples in asked.items() for example in examples]
    outputs = llm.generate(
        [example.prompt for _, example in lines],
        SamplingParams(max_tokens=128, temperature=0),
        adapters=[None if name == "base" else name for name, _ in lines],
    )
    found: dict[str, list[bool]] = {name: [] for name in asked}
    for (name, example), output in zip(lines, outputs, strict=True):
        found[name].append(output.finish_reason == "stop" and output.text == example.answer)
    return found


def _print(case: str, exact: dict[str, list[bool]], full: dict[str, list[bool]], args: argparse.Namespace) -> None:
    kept = {
        name: sum(a and b for a, b in zip(right, full[name], strict=True)) / max(1, sum(full[name]))
        for name, right in exact.items()
    }
    num_full = sum(map(sum, full.values()))
    num_kept = sum(a and b for name in exact for a, b in zip(exact[name], full[name], strict=True))
    print_figures(
        {
            "case": case,
            "exact": sum(map(sum, exact.values())),
            "of": sum(map(len, exact.values())),
            "kept": round(num_kept / num_full, 4),
            "kept_by_adapter": {name: round(share, 3) for name, share in kept.items()},
        },
        args,
    )
