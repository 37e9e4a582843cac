"""What PEFT can write into an adapter of linear layers and embeddings, we compute as PEFT does."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, SamplingParams
from tests.equality.conftest import Zoo
from tests.equality.oracle import Text, assert_greedy

PARAMS = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)

# name -> arguments of PEFT's LoraConfig
FEATURES: dict[str, dict[str, Any]] = {
    **{f"rank {rank}": {"rank": rank} for rank in (1, 4, 8, 16, 64)},
    "rsLoRA": {"rank": 16, "use_rslora": True},
    "rank_pattern and alpha_pattern": {
        "rank": 4,
        "rank_pattern": {"q_proj": 1, r"layers\.2\.self_attn\.v_proj": 16},
        "alpha_pattern": {"q_proj": 3, "down_proj": 32},
    },
    "modules by suffix": {"target_modules": ["q_proj", "down_proj"]},
    "modules by regular expression": {"target_modules": r".*layers\.[02]\..*(k|v|up)_proj"},
    "all linear modules": {"target_modules": "all-linear"},
    "some layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1]},
    "lm_head": {"target_modules": ["lm_head"]},
    "embed_tokens": {"target_modules": ["embed_tokens"]},
    "embed_tokens and lm_head": {"target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "excluded modules": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "k_proj"]},
}
# Modules of GPT-2 are Conv1D (weights transposed, q, k and v in one); its embeddings have other names.
GPT2_FEATURES: dict[str, dict[str, Any]] = {
    "rank 4": {"rank": 4},
    "rsLoRA": {"rank": 16, "use_rslora": True},
    "rank_pattern and alpha_pattern": {"rank": 4, "rank_pattern": {"c_attn": 8}, "alpha_pattern": {"c_fc": 16}},
    "modules by suffix": {"target_modules": ["c_attn"]},
    "embeddings": {"target_modules": ["wte", "c_proj"]},
}
GEMMA3_FEATURES = ("rank 4", "all linear modules", "lm_head", "embed_tokens", "embed_tokens and lm_head")
# base (with tied embeddings or not) -> its features
BASES: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "llama": ("llama", {}, FEATURES),
    "llama tied": ("llama", {"tie_word_embeddings": True}, FEATURES),
    "gemma3": ("gemma3", {}, {name: FEATURES[name] for name in GEMMA3_FEATURES}),  # tied; scales its embeddings
    "gpt2": ("gpt2", {}, GPT2_FEATURES),
}
CASES = [(base, feature) for base, (_, _, features) in BASES.items() for feature in features]


class Bench:
    """One base with the adapters of all its features."""

    def __init__(self, zoo: Zoo, name: str) -> None:
        arch, overrides, features = BASES[name]
        self.base = zoo.base(arch, **overrides)
        self.adapters: dict[str, Path] = {
            feature: zoo.adapter(self.base, feature.replace(" ", "_"), seed, **arguments)
            for seed, (feature, arguments) in enumerate(features.items(), start=1)
        }
        self.llm = LLM(self.base, self.adapters, max_num_seqs=32, num_threads=1)
        self._base_texts: dict[tuple[int, ...], tuple[int, ...]] = {}

    def base_text(self, prompt: list[int]) -> tuple[int, ...]:
        key = tuple(prompt)
        if key not in self._base_texts:
            self._base_texts[key] = self.llm.generate([prompt], PARAMS)[0].token_ids
        return self._base_texts[key]


@pytest.fixture(scope="module")
def bench_of(zoo: Zoo) -> Any:
    return lru_cache(lambda name: Bench(zoo, name))


@pytest.mark.parametrize(("base", "feature"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_an_adapter_says_what_peft_says(base: str, feature: str, bench_of: Any, prompts: list[list[int]]) -> None:
    bench = bench_of(base)
    chosen = [prompts[2], prompts[4]]
    outputs = bench.llm.generate(chosen, PARAMS, feature)
    assert_greedy(bench.base, bench.adapters[feature], [Text(o.prompt_token_ids, o.token_ids) for o in outputs])
    assert [o.token_ids for o in outputs] != [bench.base_text(prompt) for prompt in chosen], "it changed nothing"


@pytest.mark.parametrize("base", list(BASES))
def test_all_kinds_of_adapters_mix_in_one_batch(base: str, bench_of: Any, prompts: list[list[int]]) -> None:
    """Ranks from 1 to 64, adapters of few and of many modules, and the base, in every step."""
    bench = bench_of(base)
    names = [None, *bench.adapters]
    mixed = [prompts[i % 5] for i in range(len(names))]
    outputs = bench.llm.generate(mixed, PARAMS, names)
    for output in outputs:
        folder = bench.adapters[output.adapter] if output.adapter else None
        assert_greedy(bench.base, folder, [Text(output.prompt_token_ids, output.token_ids)])


def test_a_feature_that_is_not_implemented_is_refused_by_name(zoo: Zoo) -> None:
    base = zoo.base("llama")
    adapter = zoo.adapter(base, "dora", 1, use_dora=True)
    with pytest.raises(Exception, match="use_dora"):
        LLM(base, {"dora": adapter}, num_threads=1)
