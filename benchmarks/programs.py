"""A command line for a folder of programs: each module has a docstring, `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module


def run_one(package: str, description: str | None, names: Sequence[str]) -> None:
    """Run the program that the command line names, with its arguments."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="program", required=True)
    for name in names:
        program = import_module(f"{package}.{name}")
        one_line = (program.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=one_line, description=program.__doc__)
        program.add_arguments(command)
        command.set_defaults(run=program.run)
    args = parser.parse_args()
    run = args.run
    del args.run
    run(args)
