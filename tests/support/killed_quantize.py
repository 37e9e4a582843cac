"""A program: `python -m engine.quantize` killed at random moments of its life, and started again.

    python -m tests.support.killed_quantize WHOLE OUT ARGUMENTS

makes WHOLE undisturbed, and OUT in three processes: two are killed by SIGKILL, the third ends. A moment is one at which
the program asks for its data to be on disk: every state of the folder that can outlive a process lies between two.
Prints one line of JSON. The processes are forks of this one, which has imported everything and computed nothing.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

from engine.quantize.__main__ import main
from engine.quantize.source import open_source
from tests.support.waiting import until


def run(arguments: list[str], fatal: int | None = None) -> tuple[int, int]:
    """In a process of its own, killed at its `fatal`-th moment. Returns: its exit status, or less than 0 the signal;
    and how many moments it had if it was not killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        _, ended = until(lambda: done if (done := os.waitpid(child, os.WNOHANG))[0] else None, "a run to end", 120)
        status = os.waitstatus_to_exitcode(ended)
        with os.fdopen(reading) as pipe:
            return status, int(pipe.read() or 0)
    calls = 0
    fsync = os.fsync

    def counting_fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = counting_fsync
    sys.stdout = sys.stderr
    status = main(arguments)
    os.write(writing, str(calls).encode())
    os._exit(status)


def run_all(model: str, whole: str, out: str, arguments: list[str]) -> dict[str, object]:
    open_source(Path(model))  # imports what every fork would import anew
    status, moments = run([model, whole, *arguments])
    first = random.randint(1, moments - 2)
    # What remains has fewer moments than the whole; one in its first half is sure to come.
    second = random.randint(1, max(1, (moments - first) // 2))
    was_there, statuses = [], []
    for fatal in (first, second, None):
        was_there.append(os.path.exists(out))
        statuses.append(run([model, out, *arguments], fatal)[0])
    return {"whole": status, "moments": [first, second, moments], "statuses": statuses, "was_there": was_there}


if __name__ == "__main__":
    print(json.dumps(run_all(*sys.argv[1:4], sys.argv[4:])))
