"""Two programs side by side on one machine: a round of ours, a round of the peer's, and so on; the ratio of each pair.

    python -m benchmarks.compare --pairs 5 \\
        --ours ".venv/bin/python -m benchmarks.throughput --cases base ..." \\
        --peer ".venv-vllm/bin/python -m benchmarks.peers.vllm_batch --cases base ..."

Both are started once, with `--on-request` added, and are idle while the other works. A machine that is shared changes
its speed from minute to minute: the ratio of neighbours says more than the ratio of two medians.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from types import TracebackType
from typing import Any

from benchmarks.provenance import provenance


class Program:
    """A benchmark that waits to be asked for a round."""

    def __init__(self, command: str) -> None:
        self.command = command
        self._process = subprocess.Popen(
            [*shlex.split(command), "--on-request"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])},
        )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def wait_until_ready(self) -> None:
        self._read()

    def round(self) -> dict[str, dict[str, float]]:
        """Figures by case."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        """The next JSON line; a program may print other lines between."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise SystemExit(f"it ended with code {self._process.wait()} before it answered: {self.command}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", required=True, help="command")
    parser.add_argument("--peer", required=True, help="command; its cases are compared with ours of the same name")
    parser.add_argument("--title", default="", help="what is compared, for the drawing")
    parser.add_argument("--figure", default="output_tokens_per_s")
    parser.add_argument("--pairs", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    pairs: list[tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]] = []
    with Program(args.ours) as ours, Program(args.peer) as peer:
        ours.wait_until_ready()
        peer.wait_until_ready()
        for i in range(args.pairs):
            pairs.append((ours.round(), peer.round()))
            print(f"pair {i + 1} of {args.pairs}", file=sys.stderr, flush=True)
    for case in (case for case in pairs[0][0] if case in pairs[0][1]):
        a, b = ([side[case][args.figure] for side in sides] for sides in zip(*pairs, strict=True))
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        figures = {
            "title": args.title or case,
            "case": case,
            "figure": args.figure,
            "ours": [round(x, 1) for x in a],
            "peer": [round(x, 1) for x in b],
            "ratios": [round(x, 2) for x in ratios],
            "median_ratio": round(statistics.median(ratios), 2),
        }
        print(json.dumps({**figures, "commands": [args.ours, args.peer], "provenance": provenance()}))


if __name__ == "__main__":
    main()
