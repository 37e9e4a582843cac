"""What adapters cost: throughput of a closed batch as a share of the base model's, by how many adapters share it.

    python -m benchmarks.lora_cost --model MODEL --adapters FOLDER --requests 16 --counts 1,4,16

uniform    requests take the adapters in turn
zipf       an adapter's share falls with its rank (s = 1), as users' do
Each case is measured right after the base model, and divided by it. `--registered` gives the engine as many names as
that, of which the same few are used.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from benchmarks import workload
from engine import LLM, SamplingParams
from engine.lora.image import AdapterImage


def spread(names: list[str], count: int, num_requests: int, kind: str, seed: int) -> list[str]:
    """The adapter of each request, of the first `count`."""
    used = names[:count]
    if kind == "uniform":
        return [used[i % count] for i in range(num_requests)]
    weights = [1 / (rank + 1) for rank in range(count)]
    return random.Random(seed).choices(used, weights, k=num_requests)


def register(llm: LLM, names: list[str], wanted: int) -> None:
    """More names for the adapters there are, without more memory: what a name costs by itself."""
    images = llm._images
    for i in range(len(images), wanted):
        image = images[names[i % len(names)]]
        images[f"other-{i}"] = AdapterImage(f"other-{i}", image.manifest, image.data)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.set_defaults(cases="mixed_adapters", requests=16, prompt_tokens=64, new_tokens=64)
    parser.add_argument("--counts", default="1,4,16")
    parser.add_argument("--registered", type=int, default=0, help="names to register, at least those of the folder")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    folders, tokens = workload.adapter_folders(args), workload.prompts(args)
    llm = LLM(args.model, folders, dtype=args.dtype, max_num_seqs=args.requests, enable_prefix_caching=False)
    names = list(folders)
    register(llm, names, args.registered)
    params = SamplingParams(max_tokens=args.new_tokens, temperature=0.0, ignore_eos=True)

    def seconds(adapters: list[str] | None) -> float:
        start = time.perf_counter()
        llm.generate(tokens, params, adapters)
        return time.perf_counter() - start

    counts = [int(count) for count in args.counts.split(",") if int(count) <= len(names)]
    for count in counts:
        for kind in ("uniform", "zipf") if count > 1 else ("uniform",):
            adapters = spread(names, count, args.requests, kind, args.seed)
            seconds(adapters)  # warm-up: adapters resident
            pairs = [(seconds(None), seconds(adapters)) for _ in range(args.rounds)]
            figures = {
                "case": f"{count} adapters, {kind}",
                "adapters_in_batch": len(set(adapters)),
                "registered": len(llm.adapters),
                "tokens_per_s": round(args.requests * args.new_tokens / statistics.median(b for _, b in pairs), 1),
                "share_of_base": round(statistics.median(a / b for a, b in pairs), 3),
            }
            workload.print_figures(figures, args)


if __name__ == "__main__":
    main()
