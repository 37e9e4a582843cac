"""Compiled decoder layers: which models get them, and that nothing but the speed changes."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.model.loader import LoadedModel, load_model
from engine.quant.linear import QuantLinear
from engine.quant.weight import QuantizedWeight
from tests.equality.oracle import block_bytes
from tests.support.native import native_or_skip
from tests.support.plan_driver import PlanDriver
from tests.support.quantized_weights import quantize_layers, random_weight
from tests.support.tiny_model import make_adapter, make_base

PROMPT = list(range(40, 75))
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    native_or_skip()
    return tmp_path_factory.mktemp("bases")


def layers_of(driver: PlanDriver) -> list[str]:
    model: Any = driver.loaded.model
    return [type(layer).__name__ for layer in getattr(model, model.base_model_prefix).layers]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_logits_of_llamas_kin_are_those_of_their_own_layers(arch: str, dtype: str, bases: Path) -> None:
    base = make_base(arch, bases / arch)
    logits = []
    for kernels in ("torch", "native"):
        driver = PlanDriver(base, dtype=dtype, kernels=kernels)
        assert (layers_of(driver)[0] == "NativeDecoder") == (kernels == "native")
        assert (set(layers_of(driver)[1:]) == {"ComputedBefore"}) == (kernels == "native")
        driver.add(PROMPT)
        driver.add(PROMPT[::-1])
        driver.run(8 if dtype == "float32" else 1, (9, 4))  # greedy texts in bfloat16 soon differ
        logits.append(torch.stack([row for rows in driver.logits.values() for row in rows]).float())
    spread = logits[0].std()
    assert (logits[0] - logits[1]).abs().max() <= {"float32": 1e-4, "bfloat16": 0.15}[dtype] * spread


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "phi3", "mixtral"])
def test_layers_of_another_kind_stay_as_they_are(arch: str, bases: Path) -> None:
    driver = PlanDriver(make_base(arch, bases / arch), kernels="native")
    assert "NativeDecoder" not in layers_of(driver)


def test_a_layer_that_adds_up_otherwise_stays_and_its_neighbours_are_compiled(
    bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Granite looks like Llama from outside, but scales what it adds to the residual stream."""
    base = make_base("llama", bases / "llama5", num_hidden_layers=5)
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward

    def scaled(self: nn.Module, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = forward(self, hidden_states, *args, **kwargs)
        third = self.self_attn.layer_idx == 2
        return hidden_states + 0.5 * (output - hidden_states) if third else output

    monkeypatch.setattr(LlamaDecoderLayer, "forward", scaled)
    drivers = [PlanDriver(base, kernels=kernels) for kernels in ("torch", "native")]
    assert layers_of(drivers[1]) == [
        "NativeDecoder",
        "ComputedBefore",
        "LlamaDecoderLayer",
        "NativeDecoder",
        "ComputedBefore",
    ]
    for driver in drivers:
        driver.add(PROMPT)
        driver.run(1, (7,))
    assert torch.allclose(drivers[0].logits[0][0], drivers[1].logits[0][0], atol=1e-4)


def test_the_original_weights_are_gone(bases: Path) -> None:
    driver = PlanDriver(make_base("llama", bases / "llama"), kernels="native")
    left = [name for name, _ in driver.loaded.model.named_parameters()]
    assert left == ["model.embed_tokens.base.weight", "model.norm.weight"]


def test_bfloat16_text_is_the_same_in_any_batch_and_any_cut(bases: Path) -> None:
    """No sum depends on what else is in the step, so that text is a function of the request in bfloat16 too."""
    base = make_base("llama", bases / "llama")
    adapters = {name: make_adapter(base, bases / name, seed=rank, rank=rank) for name, rank in (("r4", 4), ("r9", 9))}
    prompts = [PROMPT[i:] + PROMPT[:i] for i in range(6)]
    names = [None, "r4", "r9", None, "r4", "r9"]
    settings: dict[str, Any] = {"dtype": "bfloat16", "kernels": "native", "block_size": 4, "num_threads": 2}
    few = 1 + 2 * -(-(len(PROMPT) + GREEDY.max_tokens) // 4)
    texts = []
    for more in (
        {"max_num_seqs": 6},
        {"max_num_seqs": 1},
        {"max_num_seqs": 6, "max_num_batched_tokens": 7},
        {"max_num_seqs": 4, "max_model_len": 64, "kv_cache_bytes": few * block_bytes(base, 4) // 2},
    ):
        llm = LLM(base, adapters, **settings, **more)
        texts.append([output.token_ids for output in llm.generate(prompts, GREEDY, names)])
    assert texts[1:] == texts[:1] * 3


# ---- quantized weights

# Inputs are fixed-point numbers (2^-16 of the largest, in each of 21 products one after the other), or, where sums
# before differ in their last bit, may be rounded to the next step: 1 / 127 of the largest, in FP8 an eighth of itself.
QUANTIZED = {"int4": 1e-3, "int8": 1e-3, "nf4": 2e-5, "fp8": 2e-5, "int8-dynamic": 2e-2, "fp8-dynamic": 0.05}


def load_quantized(base: Path, name: str, dtype: str, skip: str = "-") -> LoadedModel:
    """The base with random codes in every linear layer but those whose names contain `skip`."""
    kind, _, dynamic = name.partition("-")

    def make(layer: str, linear: nn.Linear) -> QuantizedWeight | None:
        if skip in layer:
            return None
        activations = {"int8": "int8", "fp8": "fp8"}[kind] if dynamic else None
        order, zeros = kind == "int4", kind in ("int4", "int8")
        return random_weight(
            kind, linear.out_features, linear.in_features, 16, zeros=zeros, order=order, activations=activations
        )

    loaded = load_model(EngineConfig(model=str(base), dtype=dtype, num_threads=1))
    torch.manual_seed(0)
    assert quantize_layers(loaded.model, make)
    return loaded


def codes_of(loaded: LoadedModel) -> list[weakref.ref[torch.Tensor]]:
    return [weakref.ref(m.quantized.codes) for m in loaded.model.modules() if isinstance(m, QuantLinear)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_layers_are_compiled_and_their_logits_are_those_of_plain_torch(
    name: str, dtype: str, bases: Path
) -> None:
    base = make_base("qwen2", bases / "untied", tie_word_embeddings=False)  # has biases
    logits = []
    for kernels in ("torch", "native"):
        loaded = load_quantized(base, name, dtype)
        codes = codes_of(loaded)
        driver = PlanDriver(loaded, kernels=kernels, dtype=dtype)
        assert (set(layers_of(driver)) == {"NativeDecoder", "ComputedBefore"}) == (kernels == "native")
        assert {ref() is None for ref in codes} == {kernels == "native"}  # the head's too
        driver.add(PROMPT)
        driver.add(PROMPT[::-1])
        driver.run(1, (9, 4))
        logits.append(torch.stack([row for rows in driver.logits.values() for row in rows]).float())
    limit = {"float32": 0.0, "bfloat16": 0.15}[dtype] + QUANTIZED[name]
    assert (logits[0] - logits[1]).abs().max() <= limit * logits[0].std()


def test_a_layer_may_leave_some_of_its_weights_in_16_bits(bases: Path) -> None:
    base = make_base("llama", bases / "llama")
    logits = []
    for kernels in ("torch", "native"):
        driver = PlanDriver(load_quantized(base, "int4", "float32", skip="k_proj"), kernels=kernels)
        assert (layers_of(driver)[0] == "NativeDecoder") == (kernels == "native")
        driver.add(PROMPT)
        driver.run(4, (9,))
        logits.append(torch.stack(driver.logits[0]))
    assert (logits[0] - logits[1]).abs().max() <= QUANTIZED["int4"] * logits[0].std()


@pytest.mark.parametrize("arch", ["phi3", "gemma2"])
def test_quantized_layers_of_other_kinds_are_packed_one_by_one(arch: str, bases: Path) -> None:
    base = make_base(arch, bases / f"{arch}-quantized")
    logits = []
    for kernels in ("torch", "native"):
        driver = PlanDriver(load_quantized(base, "int8-dynamic", "float32", skip="lm_head"), kernels=kernels)
        if kernels == "native":
            left = [type(m).__name__ for m in driver.loaded.model.modules()]
            assert "QuantLinear" not in left
            assert "PackedLinear" in left
        driver.add(PROMPT)
        driver.run(1, (9,))
        logits.append(torch.stack(driver.logits[0]))
    assert (logits[0] - logits[1]).abs().max() <= QUANTIZED["int8-dynamic"] * logits[0].std()
