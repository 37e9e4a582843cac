"""Scaled rotary embeddings: the length they were made for, and transformers' logits far out and on both sides of it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine import LLM, SamplingParams
from engine.checkpoint.folder import resolve_max_model_len
from engine.errors import ConfigError
from tests.equality.oracle import block_bytes
from tests.support.native import native_or_skip
from tests.support.tiny_model import make_base

ORIGINAL = 64
FACTOR = 4.0
NUM_TOKENS = 6
PROMPTS = (20, 62, 64, 65, 200)  # tokens: within, growing beyond, just there, beyond


def scaled(kind: str, dims: int = 8) -> dict[str, Any]:
    """Parameters of one kind, for rotary dimensions of so many numbers."""
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0}
    if kind == "longrope":
        half = range(dims // 2)
        rope |= {"short_factor": [1.0 + 0.05 * i for i in half], "long_factor": [1.5 + i for i in half]}
        return rope | {"original_max_position_embeddings": ORIGINAL}
    rope["factor"] = FACTOR
    if kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = ORIGINAL
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return rope


# (architecture, what config.json says beside the tiny model's own values)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama linear": ("llama", {"rope_parameters": scaled("linear"), "max_position_embeddings": ORIGINAL}),
    "llama dynamic": ("llama", {"rope_parameters": scaled("dynamic"), "max_position_embeddings": ORIGINAL}),
    "llama yarn": ("llama", {"rope_parameters": scaled("yarn"), "max_position_embeddings": ORIGINAL}),
    "llama llama3": ("llama", {"rope_parameters": scaled("llama3")}),
    "llama longrope": ("llama", {"rope_parameters": scaled("longrope")}),
    "llama proportional": (
        "llama",
        {
            "rope_parameters": {**scaled("proportional"), "partial_rotary_factor": 0.5},
            "max_position_embeddings": ORIGINAL,
        },
    ),
    "mistral yarn": ("mistral", {"rope_parameters": scaled("yarn"), "max_position_embeddings": 80}),
    "mistral longrope": ("mistral", {"rope_parameters": scaled("longrope", 16), "sliding_window": None}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": scaled("yarn"), "max_position_embeddings": ORIGINAL}),
    "qwen2 dynamic": ("qwen2", {"rope_parameters": scaled("dynamic"), "max_position_embeddings": ORIGINAL}),
    "qwen3 yarn": ("qwen3", {"rope_parameters": scaled("yarn", 12), "max_position_embeddings": 80}),
    "qwen3 linear": ("qwen3", {"rope_parameters": scaled("linear", 12), "max_position_embeddings": ORIGINAL}),
    "phi3 longrope": ("phi3", {"rope_parameters": scaled("longrope"), "original_max_position_embeddings": ORIGINAL}),
    "gemma2 linear": ("gemma2", {"rope_parameters": scaled("linear"), "max_position_embeddings": ORIGINAL}),
    "gemma3 a type of layer each": (
        "gemma3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {**scaled("linear"), "rope_theta": 1000000.0},
            }
        },
    ),
    "gemma3 dynamic in some layers": (
        "gemma3",
        {
            "max_position_embeddings": ORIGINAL,
            "rope_parameters": {"sliding_attention": scaled("linear"), "full_attention": scaled("dynamic")},
        },
    ),
    "gpt_neox linear in part": (
        "gpt_neox",
        {"rope_parameters": {**scaled("linear"), "partial_rotary_factor": 0.5}, "max_position_embeddings": ORIGINAL},
    ),
    "gpt_neox dynamic in part": (
        "gpt_neox",
        {"rope_parameters": {**scaled("dynamic"), "partial_rotary_factor": 1.0}, "max_position_embeddings": ORIGINAL},
    ),
    "mixtral llama3": ("mixtral", {"rope_parameters": scaled("llama3")}),
    "gpt_oss yarn": ("gpt_oss", {"rope_parameters": {**scaled("yarn"), "truncate": False}}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rope")


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in PROMPTS]


@torch.no_grad()
def reference(base: Path, prompt: list[int], outputs: list[int], kind: str) -> torch.Tensor:
    """transformers' logits [N, V] for each of the outputs.

    Of the text up to there in one forward; with frequencies that change at every token, as it generates: with a cache.
    A model of its own each time: it remembers how long the longest text was.
    """
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    text = prompt + outputs
    if kind == "dynamic":
        past = model(torch.tensor([prompt]), use_cache=True)
        rows = [past.logits[0, -1]]
        for token in outputs[:-1]:
            past = model(torch.tensor([[token]]), past_key_values=past.past_key_values, use_cache=True)
            rows.append(past.logits[0, -1])
        return torch.stack(rows)
    if kind == "longrope":
        return torch.stack([model(torch.tensor([text[: len(prompt) + i]])).logits[0, -1] for i in range(len(outputs))])
    return model(torch.tensor([text])).logits[0, len(prompt) - 1 : -1]


OFTEN = (("llama longrope", "native"), ("llama dynamic", "native"), ("qwen3 yarn", "native"))


@pytest.mark.parametrize(
    ("family", "kernels"),
    [
        pytest.param(
            family, kernels, marks=() if kernels == "torch" or (family, kernels) in OFTEN else pytest.mark.slow
        )
        for family in FAMILIES
        for kernels in ("torch", "native")
    ],
)
def test_logits_far_out_are_those_of_transformers(family: str, kernels: str, bases: Path) -> None:
    if kernels == "native":
        native_or_skip()
    arch, values = FAMILIES[family]
    base = make_base(arch, bases / family.replace(" ", "-"), **values)
    llm = LLM(
        base,
        kernels=kernels,
        dtype="float32",
        kv_cache_bytes=8 << 20,
        block_size=4,
        max_num_batched_tokens=48,
        max_num_seqs=4,
    )
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True, logprobs=5)
    kind = "dynamic" if "dynamic" in family else "longrope" if "longrope" in family else ""
    for _ in range(2 if kind else 1):  # the second time with what the prefix cache has
        for output in llm.generate(prompts(), params):
            expected = torch.log_softmax(reference(base, output.prompt_token_ids, output.token_ids, kind), dim=-1)
            assert output.logprobs is not None
            for row, found in zip(expected, output.logprobs, strict=True):
                worst = max(abs(float(row[token]) - value) for token, value in found.top)
                assert worst < 2e-3, f"{len(output.prompt_token_ids)} tokens: off by {worst}"


HALF_HEAD = 48
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"type": "longrope", "short_factor": [1.0] * HALF_HEAD, "long_factor": [2.0] * HALF_HEAD}
# (tokens, model type, max_position_embeddings, rope_scaling, what else config.json says)
PUBLISHED: dict[str, tuple[int, str, int, dict[str, Any] | None, dict[str, Any]]] = {
    "Qwen2.5 with yarn": (131072, "qwen2", 32768, {"type": "yarn", **YARN}, {}),
    "Qwen3 with yarn": (131072, "qwen3", 40960, {"rope_type": "yarn", **YARN}, {}),
    "Qwen3 as it is": (40960, "qwen3", 40960, None, {}),
    "Llama 2, four times": (16384, "llama", 4096, {"type": "linear", "factor": 4.0}, {}),
    "Llama 2, dynamic": (8192, "llama", 4096, {"type": "dynamic", "factor": 2.0}, {}),
    "Llama 3.1": (131072, "llama", 131072, {**LLAMA3, "factor": 8.0, "original_max_position_embeddings": 8192}, {}),
    "Llama 3.2": (131072, "llama", 131072, {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, {}),
    "Phi 3 mini 128k": (
        131072,
        "phi3",
        131072,
        LONGROPE,
        {"original_max_position_embeddings": 4096, "hidden_size": 3072, "num_attention_heads": 32},
    ),
    "Phi 3 mini 4k": (4096, "phi3", 4096, None, {}),
    "gpt-oss": (
        131072,
        "gpt_oss",
        131072,
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096},
        {},
    ),
    "Gemma 3": (
        131072,
        "gemma3_text",
        131072,
        {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
        {},
    ),
    "Mistral 7B": (32768, "mistral", 32768, None, {}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_longest_text_is_what_the_published_configuration_means(name: str) -> None:
    expected, model_type, positions, scaling, values = PUBLISHED[name]
    rope = {} if scaling is None else {"rope_scaling": copy.deepcopy(scaling)}  # which transformers fills in
    config = AutoConfig.for_model(model_type, max_position_embeddings=positions, **rope, **values)
    assert resolve_max_model_len(config, None) == expected
    assert resolve_max_model_len(config, expected) == expected
    with pytest.raises(ConfigError, match=f"max_model_len={expected + 1} is more than the {expected} tokens"):
        resolve_max_model_len(config, expected + 1)


def test_a_text_that_outgrows_its_frequencies_is_the_same_however_it_is_computed(bases: Path) -> None:
    """Guesses, samples side by side, a cache too small for all: none of it decides which frequencies a row has."""
    base = make_base("llama", bases / "llama-longrope", **FAMILIES["llama longrope"][1])
    common: dict[str, Any] = {"dtype": "float32", "block_size": 4, "num_threads": 1}
    texts: list[list[tuple[int, ...]]] = []
    preempted: list[int] = []
    for settings, guesses in (
        ({"kv_cache_bytes": 8 << 20, "max_num_seqs": 1}, 0),
        ({"kv_cache_bytes": 8 << 20}, 3),
        ({"kv_cache_bytes": 8 << 20, "max_num_batched_tokens": 16, "max_num_seqs": 8}, 0),
        ({"kv_cache_bytes": 45 * block_bytes(base, 4), "max_model_len": 128, "max_num_seqs": 4}, 2),
    ):
        llm = LLM(base, **common, **settings)
        params = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, prompt_lookup_num_tokens=guesses)
        texts.append([output.token_ids for output in llm.generate([text[:62] for text in prompts()[1:]], params)])
        preempted.append(llm.stats().total_preemptions)
    assert texts[1:] == texts[:1] * 3
    assert preempted[:3] == [4, 4, 4]  # each text once, where it passes the original length
    assert preempted[3] >= 4
