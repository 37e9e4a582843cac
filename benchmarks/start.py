"""Seconds from a fresh interpreter to the first token, in a process of its own each round.

python -m benchmarks.start --model MODEL --rounds 5
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from benchmarks import workload

PROGRAM = """
import json, time
start = time.perf_counter()
from engine import LLM, SamplingParams
llm = LLM({model!r}, dtype={dtype!r})
loaded = time.perf_counter()
llm.generate([[5] * {prompt_tokens}], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
print(json.dumps({{"loaded_s": loaded - start, "first_token_s": time.perf_counter() - start}}))
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    program = PROGRAM.format(model=args.model, dtype=args.dtype, prompt_tokens=args.prompt_tokens)
    rounds = []
    for _ in range(args.rounds):
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
        rounds.append(json.loads(done.stdout.splitlines()[-1]))
    workload.print_figures({"case": "start", **workload.spread(rounds)}, args)


if __name__ == "__main__":
    main()
