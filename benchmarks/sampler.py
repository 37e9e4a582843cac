"""What choosing the tokens of a step costs, by kind of parameters.

python -m benchmarks.sampler --rows 64 --vocab 49152
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from benchmarks import workload
from engine.core.plan import SequenceStart
from engine.native.library import NativeLibrary, NativeUnavailable, load_library
from engine.request import SamplingParams
from engine.runner.inputs import SampledRow
from engine.runner.sampler import Sampler

CASES = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-k and top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "repetition penalty": {"temperature": 0.0, "repetition_penalty": 1.1},
    "5 logprobs": {"temperature": 0.0, "logprobs": 5},
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--dtype", default="bfloat16", help="of the logits")
    parser.add_argument("--steps", type=int, default=60)
    return parser.parse_args()


def compiled() -> NativeLibrary | None:
    try:
        library = load_library()
    except NativeUnavailable:
        return None
    library.set_threads(torch.get_num_threads())
    return library


def main() -> None:
    args = parse_args()
    logits = torch.randn(args.rows, args.vocab, generator=torch.Generator().manual_seed(0)).mul(3)
    logits, library = logits.to(getattr(torch, args.dtype)), compiled()
    for name, settings in CASES.items():
        sampler = Sampler(args.vocab, library=library)
        params = SamplingParams(**settings, max_tokens=args.steps)
        for seq_id in range(args.rows):
            sampler.start(SequenceStart(seq_id, tuple(range(64)), (), params, seed=seq_id, sample_index=0))
        seconds = []
        for step in range(args.steps):
            of_step = logits.clone()  # the sampler may write into it
            rows = tuple(SampledRow(row, row, step, 0) for row in range(args.rows))
            start = time.perf_counter()
            _ = sampler.sample(of_step, rows).samples
            seconds.append(time.perf_counter() - start)
        workload.print_figures({"case": name, "ms": round(statistics.median(seconds) * 1e3, 2)}, args)


if __name__ == "__main__":
    main()
