"""What the worst bodies cost a router: how long its event loop stands still, and the memory that one takes.

    python -m benchmarks.bodies --rounds 3

The HTTP application in this process, over replicas that answer at once and a tokenizer that makes a token of each byte.
A coroutine and a thread tick while a body is read; the longest time between two ticks is what a stream would have
waited. `idle` is the same without a request: what is beyond it, the body has cost. A case is the median of its rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks import workload
from tests.serving.fakes import FakeBackend, Served, serve

COMPLETIONS, CHAT, ADAPTERS = "/v1/completions", "/v1/chat/completions", "/adapters"
TICK_S = 0.001
IDLE_S = 1.0


def cases() -> dict[str, tuple[str, str] | None]:
    """Name -> path and body. Of each kind the largest that is taken, and one that is refused."""

    def completion(prompt: str) -> tuple[str, str]:
        return COMPLETIONS, f'{{"model":"demo","max_tokens":1,"prompt":{prompt}}}'

    def chat(content: Any, count: int) -> tuple[str, str]:
        messages = [{"role": "user", "content": content}] * count
        return CHAT, json.dumps({"model": "demo", "max_tokens": 1, "messages": messages})

    rows = [{"name": f"a{i}", "source": "local", "location": "alpha"} for i in range(1000)]
    biases = {str(i % 250): 1 for i in range(250)}
    return {
        "idle": None,
        "small": completion('"hi"'),
        "262,144 token ids": completion("[" + "7," * (2**18 - 1) + "7]"),
        "262,144 token ids as floats": completion("[" + "7.0," * (2**18 - 1) + "7.0]"),
        "2,000,000 token ids": completion("[" + "7," * 1_999_999 + "7]"),
        "a megabyte of text": completion(json.dumps("hello world\n" * 80_000)),
        "4 MB of escapes": completion('"' + "\\n" * 2_000_000 + '"'),
        "4 MB of halves of surrogate pairs": completion('"' + "\\ud800" * 690_000 + '"'),
        "2,048 messages": chat("a" * 400, 2048),
        "80,000 messages": chat("a", 80_000),
        "1,024 messages of 4 parts": chat([{"type": "text", "text": "a"}] * 4, 1024),
        "a prompt given twice": completion('"a","prompt":[' + "1," * 262_000 + "1]"),
        "30,000 unknown fields": completion('"a",' + ",".join(f'"k{i}":1' for i in range(30_000))),
        "1,300,000 objects": completion("[" + "{}," * 1_300_000 + "1]"),
        "4 MB of brackets": completion("[" * 4_000_000),
        "250 biases": (
            COMPLETIONS,
            json.dumps({"model": "demo", "prompt": "a", "max_tokens": 1, "logit_bias": biases}),
        ),
        "1,000 registrations": (ADAPTERS, json.dumps(rows)),
    }


class Ticks:
    """The longest gap between two ticks of a thread."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        last = time.perf_counter()
        while not self._stop.wait(TICK_S):
            now = time.perf_counter()
            self.longest_s, last = max(self.longest_s, now - last), now

    def __enter__(self) -> Ticks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


async def one(served: Served, case: tuple[str, str] | None) -> dict[str, float]:
    """One request, with what ticked meanwhile."""
    longest_s, done = 0.0, False

    async def tick() -> None:
        nonlocal longest_s
        last = time.perf_counter()
        while not done:
            await asyncio.sleep(TICK_S)
            now = time.perf_counter()
            longest_s, last = max(longest_s, now - last), now

    ticking = asyncio.ensure_future(tick())
    await asyncio.sleep(10 * TICK_S)
    longest_s, status, before = 0.0, 0, _memory(reset=True)
    with Ticks() as thread:
        start = time.perf_counter()
        if case is None:
            await asyncio.sleep(IDLE_S)
        else:
            path, text = case
            headers = {"content-type": "application/json"}
            status = (await served.client.post(path, content=text.encode(), headers=headers)).status_code
        seconds = time.perf_counter() - start
        await asyncio.sleep(2 * TICK_S)
    done = True
    await ticking
    return {
        "status": status,
        "loop_ms": longest_s * 1e3,
        "thread_ms": thread.longest_s * 1e3,
        "seconds": seconds,
        "taken_mb": (_memory() - before) / 1e6,
    }


def _memory(*, reset: bool = False) -> int:
    """Bytes resident at most since the last reset; 0 where the system does not tell."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


async def run(args: argparse.Namespace) -> None:
    served = serve(FakeBackend(reply=lambda call: "x"))
    for name, case in cases().items():
        if args.cases and name not in args.cases.split(";"):
            continue
        rounds = [await one(served, case) for _ in range(args.rounds)]
        figures = {key: round(statistics.median(row[key] for row in rounds), 3) for key in rounds[0]}
        size = 0 if case is None else len(case[1].encode())
        workload.print_figures({"case": name, "body_mb": round(size / 1e6, 2), **figures}, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default="", help="names, separated by semicolons; all without it")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    asyncio.run(run(args))


if __name__ == "__main__":
    main()
