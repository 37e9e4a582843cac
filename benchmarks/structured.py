"""What a grammar costs: tokens a second with all requests constrained beside none, and the first token's time.

python -m benchmarks.structured --model MODEL --requests 16 --tokens 64

Rounds of both in turns. Constrained answers are JSON that goes on as long as asked for; what their schema forces is
guessed, and counts as tokens. The first token is that of one request, its schema compiled before, or new.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

from benchmarks import workload
from engine import LLM, SamplingParams
from engine.grammar.spec import GrammarSpec

SCHEMA: dict[str, Any] = {
    "type": "array",
    "minItems": 100_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-guesses", action="store_true", help="guess nothing of what a schema forces")
    return parser.parse_args()


def spec(title: str) -> GrammarSpec:
    """Of another title, another grammar."""
    return GrammarSpec("json_schema", json.dumps({"title": title, **SCHEMA}))


def tokens_per_s(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> float:
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    return sum(len(output.token_ids) for output in outputs) / (time.perf_counter() - start)


def first_token_ms(llm: LLM, prompt: list[int], grammar: GrammarSpec | None) -> float:
    start = time.perf_counter()
    llm.generate([prompt], SamplingParams(max_tokens=1, seed=1, grammar=grammar))
    return (time.perf_counter() - start) * 1e3


def main() -> None:
    args = parse_args()
    if args.no_guesses:
        from engine.grammar import matcher

        matcher.MAX_FORCED = 0
    llm = LLM(args.model, max_num_seqs=args.requests, max_model_len=512, enable_prefix_caching=False)
    prompts = [[65 + (i + j) % 26 for j in range(32)] for i in range(args.requests)]
    settings = {"max_tokens": args.tokens, "ignore_eos": True, "temperature": 1.0}
    free = [SamplingParams(**settings, seed=i) for i in range(args.requests)]
    bound = [SamplingParams(**settings, seed=i, grammar=spec("same")) for i in range(args.requests)]
    rates: dict[str, list[float]] = {"free": [], "constrained": []}
    for number in range(args.rounds + 1):  # the first warms up
        for name, params in (("free", free), ("constrained", bound)):
            rate = tokens_per_s(llm, prompts, params)
            rates[name] += [rate] if number else []
    firsts: dict[str, list[float]] = {"free": [], "cached schema": [], "new schema": []}
    for number in range(4 * args.rounds):
        firsts["free"].append(first_token_ms(llm, prompts[0], None))
        firsts["cached schema"].append(first_token_ms(llm, prompts[0], spec("same")))
        firsts["new schema"].append(first_token_ms(llm, prompts[0], spec(f"new {number}")))
    stats = llm.stats()
    figures: dict[str, Any] = {
        f"{name}_tokens_per_s": round(statistics.median(told), 1) for name, told in rates.items()
    }
    ratios = [bound / free for bound, free in zip(rates["constrained"], rates["free"], strict=True)]
    figures["ratio"] = round(statistics.median(ratios), 3)
    figures |= {f"first_token_ms, {name}": round(statistics.median(told), 2) for name, told in firsts.items()}
    figures["guessed_right"] = f"{stats.total_guessed_right_tokens} of {stats.total_guessed_tokens}"
    workload.print_figures(figures, args)


if __name__ == "__main__":
    main()
