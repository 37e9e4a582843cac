"""What a quantized KV cache costs in quality: exact answers of the demo's adapters, and logits beside the model's own.

    python -m benchmarks.quantized.kv_quality --count 200

Logits are those of the base on held-out prompts with their answers, read back from the cache at every position:
largest difference, KL divergence of the next token, and how often the likeliest token is another one.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks import workload
from demo.checkpoint import ADAPTERS
from demo.recipes import RECIPES
from demo.text import Example, held_out
from demo.transforms import TRANSFORMS, same
from engine import LLM, EngineConfig, SamplingParams
from engine.kv.backend import AttentionInputs
from engine.kv.storage import KVStorage
from engine.kv.torch_attention import TorchAttention
from engine.model.attention import forward_logits
from engine.model.loader import LoadedModel, load_model
from engine.runner.memory import kv_shape
from engine.text.tokenizer import Tokenizer

PARAMS = SamplingParams(max_tokens=128, temperature=0.0)


def settings_of(kv_cache_dtype: str) -> dict[str, Any]:
    """On a CPU torch alone has fp8."""
    return {"kv_cache_dtype": kv_cache_dtype, "kernels": "torch" if kv_cache_dtype == "fp8" else "auto"}


def examples(name: str, count: int, args: argparse.Namespace) -> list[Example]:
    return held_out(name, TRANSFORMS.get(name, same), count, args.seed)


def exact_answers(kv_cache_dtype: str, args: argparse.Namespace) -> dict[str, int]:
    """Of the base and of every adapter, in one batch."""
    adapters = {name: str(ADAPTERS / name) for name in RECIPES}
    llm = LLM(args.model, adapters, dtype=args.dtype, **settings_of(kv_cache_dtype))
    asked = [(name, example) for name in ("base", *adapters) for example in examples(name, args.count, args)]
    names = [None if name == "base" else name for name, _ in asked]
    outputs = llm.generate([example.prompt for _, example in asked], PARAMS, names)
    exact = dict.fromkeys(("base", *adapters), 0)
    for (name, example), output in zip(asked, outputs, strict=True):
        exact[name] += output.finish_reason == "stop" and output.text == example.answer
    return exact


@torch.inference_mode()
def logits(loaded: LoadedModel, config: EngineConfig, token_ids: list[int]) -> Tensor:
    """Of every position of one text. Returns: [T, V]."""
    num_rows = len(token_ids)
    num_blocks = -(-num_rows // config.block_size)
    backend = TorchAttention(KVStorage(kv_shape(loaded, config), num_blocks))
    rows = torch.arange(num_rows)
    # A row a step, as in decoding: no row is compared by what it was before it went through the cache.
    parts = []
    for row in range(num_rows):
        backend.plan(AttentionInputs(rows[row : row + 1], torch.arange(num_blocks)[None], (0, 1), (row + 1,)))
        ids = torch.tensor(token_ids[row : row + 1])
        parts.append(forward_logits(loaded.model, ids, rows[row : row + 1], rows[:1], backend))
    return torch.cat(parts).float()


def logit_errors(kv_cache_dtype: str, args: argparse.Namespace) -> dict[str, float]:
    tokenizer = Tokenizer.load(args.model)
    loaded = load_model(EngineConfig(model=args.model, dtype=args.dtype))
    plain, quantized = (
        EngineConfig(model=args.model, dtype=args.dtype, **settings_of(kind)) for kind in ("auto", kv_cache_dtype)
    )
    texts = [tokenizer.encode(example.prompt + example.answer) for example in examples("base", args.texts, args)]
    pairs = [(logits(loaded, plain, ids), logits(loaded, quantized, ids)) for ids in texts]
    expected, found = (torch.cat(part) for part in zip(*pairs, strict=True))
    truth = expected.log_softmax(-1)
    kl = (truth.exp() * (truth - found.log_softmax(-1))).sum(-1)
    return {
        "tokens": len(expected),
        "largest_logit_difference": (expected - found).abs().max().item(),
        "largest_logit": expected.abs().max().item(),
        "mean_kl": kl.mean().item(),
        "largest_kl": kl.max().item(),
        "other_likeliest": (expected.argmax(-1) != found.argmax(-1)).double().mean().item(),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kinds", default="auto,int8,fp8", help="of kv_cache_dtype")
    parser.add_argument("--count", type=int, default=200, help="held-out lines per adapter; 0: logits alone")
    parser.add_argument("--texts", type=int, default=20, help="prompts with their answers whose logits are compared")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    for kind in args.kinds.split(","):
        if args.count:
            workload.print_figures({"case": f"exact, {kind}", **exact_answers(kind, args)}, args)
        if kind != "auto":
            workload.print_figures({"case": f"logits, {kind}", **logit_errors(kind, args)}, args)


if __name__ == "__main__":
    main()
