"""The classic effects of LLM serving, each shown on this engine by switching one thing off.

    python -m benchmarks.lessons --model demo/base --adapters demo/adapters

kv_cache     every token computes the whole text again, against one row a token
batch        1, 2, 4, ... 64 sequences side by side
continuous   32 requests at batch 8, every eighth asks for 100 tokens and the others for 10: static batches that run to
             their longest each, against seats that are filled as they come free
lora         one adapter at a time, against all adapters in one batch
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import workload
from engine import LLM, SamplingParams

NUM_REQUESTS, SEATS, FEW, MANY = 32, 8, 10, 100


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


class Lessons:
    """One engine, with caching of prefixes off so that rounds are alike."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._prompts = workload.prompts(args)
        self._names = list(workload.adapter_folders(args))
        self._llms: dict[int, LLM] = {}

    def llm(self, max_num_seqs: int) -> LLM:
        if max_num_seqs not in self._llms:
            args = self._args
            self._llms[max_num_seqs] = LLM(
                args.model,
                workload.adapter_folders(args),
                dtype=args.dtype,
                max_num_seqs=max_num_seqs,
                enable_prefix_caching=False,
            )
        return self._llms[max_num_seqs]

    def steps_and_seconds(self, llm: LLM, work: Callable[[], Any]) -> tuple[int, float]:
        before, start = llm.stats().total_steps, time.perf_counter()
        work()
        return llm.stats().total_steps - before, time.perf_counter() - start

    def kv_cache(self) -> dict[str, float]:
        llm, prompt, count = self.llm(1), self._prompts[0], self._args.new_tokens
        _, cached_s = self.steps_and_seconds(llm, lambda: llm.generate([prompt], params(count)))

        def again_and_again() -> None:
            tokens = list(prompt)
            for _ in range(count):
                tokens += llm.generate([tokens], params(1))[0].token_ids

        _, uncached_s = self.steps_and_seconds(llm, again_and_again)
        return {"without_s": uncached_s, "with_s": cached_s, "ratio": uncached_s / cached_s}

    def batch(self) -> dict[str, float]:
        llm, count = self.llm(64), self._args.new_tokens
        rates = {}
        for size in (1, 2, 4, 8, 16, 32, 64):
            prompts = [self._prompts[i % len(self._prompts)] for i in range(size)]
            _, seconds = self.steps_and_seconds(llm, lambda prompts=prompts: llm.generate(prompts, params(count)))
            rates[f"batch_{size}_tokens_per_s"] = size * count / seconds
        return rates

    def continuous(self) -> dict[str, float]:
        llm = self.llm(SEATS)
        lengths = [MANY if i % SEATS == SEATS - 1 else FEW for i in range(NUM_REQUESTS)]
        prompts = [self._prompts[i % len(self._prompts)] for i in range(NUM_REQUESTS)]

        def static() -> None:
            for i in range(0, NUM_REQUESTS, SEATS):
                llm.generate(prompts[i : i + SEATS], params(max(lengths[i : i + SEATS])))

        def continuous(order: Sequence[int]) -> None:
            llm.generate([prompts[i] for i in order], [params(lengths[i]) for i in order])

        longest_first = sorted(range(NUM_REQUESTS), key=lambda i: -lengths[i])
        static_steps, static_s = self.steps_and_seconds(llm, static)
        steps, seconds = self.steps_and_seconds(llm, lambda: continuous(range(NUM_REQUESTS)))
        sorted_steps, sorted_s = self.steps_and_seconds(llm, lambda: continuous(longest_first))
        return {
            "static_steps": static_steps,
            "continuous_steps": steps,
            "longest_first_steps": sorted_steps,
            "ratio": static_s / seconds,
            "longest_first_ratio": static_s / sorted_s,
        }

    def lora(self) -> dict[str, float]:
        llm, count, names = self.llm(64), self._args.new_tokens, self._names
        prompts = [self._prompts[i % len(self._prompts)] for i in range(len(names))]

        def one_by_one() -> None:
            for name, prompt in zip(names, prompts, strict=True):
                llm.generate([prompt], params(count), [name])

        _, loop_s = self.steps_and_seconds(llm, one_by_one)
        _, batched_s = self.steps_and_seconds(llm, lambda: llm.generate(prompts, params(count), names))
        return {"one_by_one_s": loop_s, "batched_s": batched_s, "ratio": loop_s / batched_s}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.set_defaults(cases="mixed_adapters", rounds=3)
    parser.add_argument("--lessons", default="kv_cache,batch,continuous,lora")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    lessons = Lessons(args)
    for name in args.lessons.split(","):
        measure = getattr(lessons, name)
        measure()  # warm-up
        rounds = [measure() for _ in range(args.rounds)]
        medians = {key: round(statistics.median(r[key] for r in rounds), 3) for key in rounds[0]}
        workload.print_figures({"lesson": name, **medians}, args)


if __name__ == "__main__":
    main()
