"""A program: matches the patterns of one adapter against module names, in a process that may use only so much.

Python's `re` holds the interpreter while it compiles and backtracks, and no limit from inside stops it; a process can
be stopped. `patterns.py` runs this file, as `python match_names.py CPU_SECONDS MEMORY_BYTES`: a question as JSON on
standard input, its answer as JSON on standard output. Standard library only, as it is started without site-packages.
"""

from __future__ import annotations

import json
import re
import sys


def limit(cpu_s: float, memory_bytes: int) -> None:
    """Beyond the one the system kills this process, beyond the other allocations fail.

    Where a system has no such limits, the time that the caller waits is the only one.
    """
    try:
        import resource
        import signal

        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    except (ImportError, AttributeError, ValueError, OSError):
        pass


def answer(how: str, patterns: list[str], names: list[str]) -> list[int]:
    """For each name the position of the first pattern that matches it, for "layer" the number that it finds; else -1.

    Source: peft.utils.other.get_pattern_key ("suffix") and peft.tuners.tuners_utils.check_target_module_exists (0.21).
    """
    if how == "whole":
        tries = [re.compile(pattern).fullmatch for pattern in patterns]
    elif how == "suffix":
        tries = [re.compile(rf"(.*\.)?({pattern})$").match for pattern in patterns]
    else:
        tries = [re.compile(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.").match for pattern in patterns]
    found = []
    for name in names:
        matches = ((position, match) for position, attempt in enumerate(tries) if (match := attempt(name)) is not None)
        position, first = next(matches, (-1, None))
        found.append(int(first["idx"]) if how == "layer" and first is not None else position)
    return found


def main() -> None:
    """Answers one question; with why, when a pattern is no regular expression."""
    limit(float(sys.argv[1]), int(sys.argv[2]))
    asked = json.load(sys.stdin)
    reply: dict[str, object]
    try:
        reply = {"answer": answer(asked["how"], asked["patterns"], asked["names"])}
    except (re.error, RecursionError, OverflowError, IndexError) as error:
        reply = {"error": str(error)[:200]}
    json.dump(reply, sys.stdout)


if __name__ == "__main__":
    main()
