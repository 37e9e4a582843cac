"""Adapters on their way from a bucket to the engine: what a cold one costs, and whom.

    python -m benchmarks.adapters ttft --model MODEL --rank 16          first token, by where the adapter was
    python -m benchmarks.adapters interference --model MODEL            what others notice of adapters being loaded
    python -m benchmarks.adapters traffic                               hit rates, beside plain LRU
    python -m benchmarks.adapters lookup --names 1000,1000000           what a registered name costs
    python -m benchmarks.adapters singleflight                          how often one adapter is read for many requests

Each prints JSON lines: figures, configuration, hardware, versions and commit.
"""

from __future__ import annotations

import argparse
from importlib import import_module

PROGRAMS = ("ttft", "interference", "traffic", "lookup", "singleflight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="program", required=True)
    for name in PROGRAMS:
        program = import_module(f"benchmarks.adapters.{name}")
        one_line = program.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=one_line, description=program.__doc__)
        program.add_arguments(command)
        command.set_defaults(run=program.run)
    args = parser.parse_args()
    run = args.run
    del args.run
    run(args)


if __name__ == "__main__":
    main()
