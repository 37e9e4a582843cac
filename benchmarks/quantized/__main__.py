"""Quantized base models: what they keep of a trained model's answers, and the memory they take.

    python -m benchmarks.quantized calibration > FILE.jsonl         text to calibrate the demo's base with
    python -m benchmarks.quantized quality --checkpoint awq=FOLDER  exact answers of the demo and all its adapters
    python -m benchmarks.quantized footprint --model MODEL          bytes of a process, while it loads and afterwards

Each prints JSON lines: figures, configuration, hardware, versions and commit. Speed is `benchmarks.compare` of two runs
of `benchmarks.throughput`, one with `--engine '{"quantization": "int4"}'`.
"""

from __future__ import annotations

import argparse
from importlib import import_module

PROGRAMS = ("calibration", "quality", "footprint")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="program", required=True)
    for name in PROGRAMS:
        program = import_module(f"benchmarks.quantized.{name}")
        command = commands.add_parser(name, help=program.__doc__.splitlines()[0], description=program.__doc__)
        program.add_arguments(command)
        command.set_defaults(run=program.run)
    args = parser.parse_args()
    run = args.run
    del args.run
    run(args)


if __name__ == "__main__":
    main()
