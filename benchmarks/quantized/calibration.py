"""Text to calibrate the demo's base with: what it and its adapters read and write, nothing of it held out."""

from __future__ import annotations

import argparse
import itertools
import json

from demo.text import examples, words_mostly
from demo.transforms import TRANSFORMS, same


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lines", type=int, default=512)


def run(args: argparse.Namespace) -> None:
    tasks = {"base": same, **TRANSFORMS}
    drawn = [examples(f"calibration/{name}", task, words_mostly, reserved=False) for name, task in tasks.items()]
    for example in itertools.islice(itertools.chain.from_iterable(zip(*drawn, strict=True)), args.lines):
        print(json.dumps({"text": example.prompt + example.answer}, ensure_ascii=False))
