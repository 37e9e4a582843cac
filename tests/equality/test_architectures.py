"""Greedy float32 text of the whole engine is that of transformers and PEFT, for every architecture and setting."""

from __future__ import annotations

import itertools
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest
from allpairspy import AllPairs

from engine import LLM, SamplingParams
from tests.equality.conftest import Zoo
from tests.equality.oracle import Text, assert_greedy, block_bytes
from tests.support.tiny_model import reference_generate

ARCHITECTURES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "mixtral", "qwen3_moe",
)  # fmt: skip
NUM_TOKENS = 48
MAX_MODEL_LEN = 112  # the longest prompt and its output
FEW_BLOCKS = {4: 56, 16: 15}  # of block size 4 and 16: not enough for all eight sequences

PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)


@dataclass(frozen=True)
class Setting:
    arch: str
    lora: bool
    block_size: int
    chunked: bool
    prefix_hits: bool
    preemption: bool
    torch_kernels: bool  # also where compiled ones could be used

    def __str__(self) -> str:
        names = ("lora", "chunked", "prefix_hits", "preemption", "torch_kernels")
        flags = [name for name in names if getattr(self, name)]
        return "-".join([self.arch, f"P{self.block_size}", *flags])


_LEVELS: list[list[Any]] = [list(ARCHITECTURES), [False, True], [4, 16], *[[True, False]] * 4]
PAIRWISE = [Setting(*levels) for levels in AllPairs(_LEVELS)]
ALL = [Setting(*levels) for levels in itertools.product(*_LEVELS)]


def settings_of(setting: Setting, base: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "max_num_seqs": 8,
        "max_model_len": MAX_MODEL_LEN,
        "block_size": setting.block_size,
        "max_num_batched_tokens": 16 if setting.chunked else 128,
        "enable_chunked_prefill": setting.chunked,
        "enable_prefix_caching": setting.prefix_hits,
        "num_threads": 1,
        "kernels": "torch" if setting.torch_kernels else "auto",
    }
    if setting.preemption:
        per_sequence = -(-MAX_MODEL_LEN // setting.block_size)
        num_blocks = max(FEW_BLOCKS[setting.block_size], per_sequence + 1)  # with the null block
        settings["kv_cache_bytes"] = num_blocks * block_bytes(base, setting.block_size)
    return settings


def check(setting: Setting, zoo: Zoo, prompts: list[list[int]]) -> None:
    base = zoo.base(setting.arch)
    adapters: dict[str, Path] = zoo.three_adapters(base) if setting.lora else {}
    names = [None, *adapters] if setting.lora else [None]
    names = [names[i % len(names)] for i in range(len(prompts))]
    llm = LLM(base, adapters, **settings_of(setting, base))
    if setting.prefix_hits:
        # The cache learns the longer prompts, of each adapter; then they come again.
        llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True), names)
    outputs = llm.generate(prompts, PARAMS, names)
    stats = llm.stats()
    assert (stats.total_prefix_hit_tokens > 0) == setting.prefix_hits
    if setting.arch != "mistral":  # where every layer has a window a sequence keeps little: test_windows preempts those
        assert (stats.total_preemptions > 0) == setting.preemption
    assert [len(output.token_ids) for output in outputs] == [NUM_TOKENS] * len(prompts)
    for name in dict.fromkeys(names):
        texts = [Text(o.prompt_token_ids, o.token_ids) for o in outputs if o.adapter == name]
        assert_greedy(base, adapters[name] if name else None, texts)


@pytest.mark.parametrize("setting", PAIRWISE, ids=str)
def test_text_is_transformers_text_for_each_pair_of_settings(
    setting: Setting, zoo: Zoo, prompts: list[list[int]]
) -> None:
    check(setting, zoo, prompts)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [s for s in ALL if s not in PAIRWISE], ids=str)
def test_text_is_transformers_text_for_all_settings(setting: Setting, zoo: Zoo, prompts: list[list[int]]) -> None:
    check(setting, zoo, prompts)


def test_the_pairwise_settings_cover_every_pair() -> None:
    def pairs(settings: list[Setting]) -> set[tuple[Any, ...]]:
        rows = [astuple(setting) for setting in settings]
        return {(i, j, row[i], row[j]) for row in rows for i, j in itertools.combinations(range(len(row)), 2)}

    assert pairs(PAIRWISE) == pairs(ALL)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_text_with_its_end_is_what_generate_returns(arch: str, zoo: Zoo, prompts: list[list[int]]) -> None:
    """Against `generate` itself, with its cache and its end-of-sequence rule: no teacher forcing."""
    base = zoo.base(arch)
    adapter = zoo.three_adapters(base)["r4"]
    llm = LLM(base, {"r4": adapter}, max_num_seqs=8, num_threads=1)
    outputs = llm.generate([prompts[2]] * 2, SamplingParams(max_tokens=24, temperature=0.0), [None, "r4"])
    for output, folder in zip(outputs, [None, adapter], strict=True):
        token_ids, leads = reference_generate(base, folder, prompts[2], 24)
        assert min(leads) > 1e-4, "choose another prompt: this one is not decided clearly"
        assert list(output.token_ids) == token_ids
