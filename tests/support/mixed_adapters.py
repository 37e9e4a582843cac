"""One model with several adapters at once, against the same weights in transformers with PEFT."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from engine import LLM, SamplingParams
from tests.equality.oracle import Text, assert_greedy
from tests.support.tiny_model import make_adapter

RANKS = (2, 4, 8, 16)


def check_served(served: Path, dense: Path, adapters: dict[str, Path], **settings: Any) -> None:
    """Five sequences of one step, four with an adapter each, as one prompt after another meets them."""
    draw = random.Random(11)
    prompts = [[draw.randrange(256) for _ in range(length)] for length in (3, 17, 9, 30, 12) for _ in range(2)]
    names = [None, *adapters] * 2
    llm = LLM(served, adapters, dtype="float32", num_threads=1, max_num_seqs=16, block_size=4, **settings)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True), names)
    for name in dict.fromkeys(names):
        texts = [Text(o.prompt_token_ids, o.token_ids) for o in outputs if o.adapter == name]
        assert_greedy(dense, adapters[name] if name else None, texts)


def make_adapters(base: Path, folder: Path, **how: Any) -> dict[str, Path]:
    """Four of different ranks."""
    return {f"r{rank}": make_adapter(base, folder / f"r{rank}", seed=rank, rank=rank, **how) for rank in RANKS}
