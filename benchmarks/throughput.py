"""Offline throughput of a closed batch: the base model alone, one adapter for all, and all adapters mixed.

    python -m benchmarks.throughput --model demo/base --adapters demo/adapters --requests 64 --new-tokens 48

Prints one JSON line per case. The cases run in turn, `--repeat` times (A B C A B C ...), and the median is quoted, so
that a change of the machine's speed touches all of them alike.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.provenance import provenance
from engine import LLM, SamplingParams

Case = list[str | None]  # one adapter name (or None) per request


def cases(names: list[str], num_requests: int) -> dict[str, Case]:
    """The adapter of each request, by case."""
    result: dict[str, Case] = {"base": [None] * num_requests}
    if names:
        result["one_adapter"] = [names[0]] * num_requests
        result["mixed_adapters"] = [names[i % len(names)] for i in range(num_requests)]
    return result


def prompts(num_requests: int, num_tokens: int, vocab: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, vocab) for _ in range(num_tokens)] for _ in range(num_requests)]


def vocab_size(model: str) -> int:
    return int(json.loads((Path(model) / "config.json").read_text())["vocab_size"])


def measure(llm: LLM, tokens: list[list[int]], adapters: Case, new_tokens: int) -> float:
    """Seconds from the first prompt handed over to the last token."""
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    llm.generate(tokens, params, adapters=adapters)
    return time.perf_counter() - start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--adapters", type=Path, default=Path("demo/adapters"), help="folder of PEFT adapters")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    folders = {path.name: str(path) for path in sorted(args.adapters.iterdir()) if path.is_dir()}
    llm = LLM(args.model, adapters=folders, device=args.device, dtype=args.dtype, max_num_seqs=args.max_num_seqs,
              enable_prefix_caching=False)  # fmt: skip
    tokens = prompts(args.requests, args.prompt_tokens, vocab_size(args.model), args.seed)
    todo = cases(list(folders), args.requests)
    seconds: dict[str, list[float]] = {name: [] for name in todo}
    for adapters in todo.values():
        measure(llm, tokens, adapters, new_tokens=2)  # warm-up: memory, thread pools, adapters resident
    for _ in tqdm(range(args.repeat), desc="rounds"):
        for name, adapters in todo.items():
            seconds[name].append(measure(llm, tokens, adapters, args.new_tokens))
    config = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    for name, runs in seconds.items():
        rates = [args.requests * args.new_tokens / s for s in runs]
        figures = {"case": name, "output_tokens_per_s": round(statistics.median(rates), 1),
                   "min": round(min(rates), 1), "max": round(max(rates), 1)}  # fmt: skip
        print(json.dumps({**figures, "config": config, "provenance": provenance()}))


if __name__ == "__main__":
    main()
