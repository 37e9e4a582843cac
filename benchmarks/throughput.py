"""Offline throughput of a closed batch: the base model alone, one adapter for all, and all adapters mixed.

    python -m benchmarks.throughput --model demo/base --adapters demo/adapters --requests 64 --new-tokens 48

Prints one JSON line per case: output tokens per second, end to end and of decoding alone (after the last first token).
"""

from __future__ import annotations

import argparse
import json
import time

from benchmarks import workload
from engine import LLM, SamplingParams


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--engine", type=json.loads, default={}, help="more of EngineConfig's settings, as JSON")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    todo, tokens = workload.cases(args), workload.prompts(args)
    llm = LLM(
        args.model,
        adapters=workload.adapter_folders(args),
        device=args.device,
        dtype=args.dtype,
        kernels=args.kernels,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=max(1024, args.max_num_seqs),
        enable_prefix_caching=False,
        **args.engine,
    )

    def measure(name: str, new_tokens: int = args.new_tokens) -> workload.Figures:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        outputs = llm.generate(tokens, params, adapters=todo[name])
        seconds = time.perf_counter() - start
        decode_s = seconds - max(output.metrics.ttft_s for output in outputs)
        return {
            "output_tokens_per_s": args.requests * new_tokens / seconds,
            "decode_tokens_per_s": args.requests * (new_tokens - 1) / decode_s,
        }

    for name in todo:
        measure(name, new_tokens=2)  # warm-up: memory, threads, adapters resident
    workload.run_rounds(args, list(todo), measure)


if __name__ == "__main__":
    main()
