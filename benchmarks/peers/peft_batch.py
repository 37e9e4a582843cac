"""transformers' generate with PEFT's mixed-adapter batch on the closed batch of `benchmarks.throughput`.

.venv/bin/python -m benchmarks.peers.peft_batch --model MODEL --adapters FOLDER --cases mixed_adapters
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks import workload


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_grad_enabled(False)
    dtype: Any = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, local_files_only=True).eval()
    for i, (name, folder) in enumerate(workload.adapter_folders(args).items()):
        if i == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name).eval()
        else:
            model.load_adapter(folder, adapter_name=name)
    todo, ids = workload.cases(args), torch.tensor(workload.prompts(args))
    settings = GenerationConfig(
        max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, do_sample=False, pad_token_id=0
    )

    def measure(name: str) -> workload.Figures:
        names = [adapter or "__base__" for adapter in todo[name]]
        mixed = {"adapter_names": names} if isinstance(model, PeftModel) else {}
        start = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, **mixed)
        return {"output_tokens_per_s": args.requests * args.new_tokens / (time.perf_counter() - start)}

    workload.run_rounds(args, list(todo), measure)


if __name__ == "__main__":
    main()
