"""Logits leave in float32: of nearly equal ones the larger wins, whatever the 16-bit types would make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from adapter_store.image.packing import pack_folder
from engine.config import EngineConfig
from engine.lora.image import AdapterImage, AdapterManifest
from engine.model.loader import LoadedModel, load_model
from engine.quant.weight import QuantizedWeight
from engine.runner.inputs import SampledRow
from tests.support.native import native_or_skip
from tests.support.plan_driver import PlanDriver
from tests.support.quantized_weights import quantize_layers, random_weight
from tests.support.tiny_model import ARCHITECTURES, VOCAB_SIZE, make_adapter, make_base

NUM_TEXTS, NUM_TOKENS = 10, 24
GAP = 1e-5
SCALING = 2.0  # of make_adapter's adapters


def image_of(loaded: LoadedModel, folder: Path) -> AdapterImage:
    spec = loaded.image_spec()
    packed = pack_folder(folder, spec.to_dict())
    return AdapterImage("on the head", AdapterManifest.from_dict(packed.manifest, spec), packed.data)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, VOCAB_SIZE - 3, (NUM_TEXTS, 6), generator=generator).tolist()


def load(base: Path, dtype: str, kind: str | None = None) -> LoadedModel:
    """With a head whose tokens come in pairs that differ by less than a 16-bit logit can show."""
    loaded = load_model(EngineConfig(model=str(base), dtype=dtype, num_threads=1))
    model: Any = loaded.model
    head = model.get_output_embeddings()
    with torch.no_grad():
        rows = head.weight[: VOCAB_SIZE // 2 * 2].view(-1, 2, head.in_features)
        rows[:, 0] = rows[:, 1]
        rows[:, 0, :3] *= 1.01  # of 16-bit numbers the next or the one after it
    if kind is not None:
        torch.manual_seed(0)

        def make(name: str, linear: nn.Linear) -> QuantizedWeight | None:
            return random_weight(kind, linear.out_features, linear.in_features, 16) if linear is head else None

        assert quantize_layers(loaded.model, make) == 1
    return loaded


def watch_head(driver: PlanDriver) -> list[torch.Tensor]:
    """The hidden states that the output layer is given, step by step."""
    model: Any = driver.loaded.model
    seen: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    return seen


def run(loaded: LoadedModel, dtype: str, kernels: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Hidden states [N, H], logits [N, V] and tokens of greedy texts, in the order of the steps."""
    driver = PlanDriver(loaded, dtype=dtype, kernels=kernels)
    seen = watch_head(driver)
    logits: list[torch.Tensor] = []
    tokens: list[int] = []
    sample = driver.runner._sampler.sample

    def noting(step: torch.Tensor, rows: tuple[SampledRow, ...]) -> Any:
        logits.append(step.clone())
        sampled = sample(step, rows)
        tokens.extend(sampled.token_ids.tolist())
        return sampled

    driver.runner._sampler.sample = noting  # type: ignore[method-assign]
    for text in texts():
        driver.add(text)
    driver.run(NUM_TOKENS, (64,))
    return torch.cat([states.reshape(-1, states.shape[-1]) for states in seen]), torch.cat(logits), tokens


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen2"])
@pytest.mark.parametrize(("kernels", "dtype"), [("torch", "bfloat16"), ("torch", "float16"), ("native", "bfloat16")])
def test_the_greedy_token_is_that_of_a_float64_product(kernels: str, dtype: str, arch: str, bases: Path) -> None:
    if kernels == "native":
        native_or_skip()
    loaded = load(make_base(arch, bases / f"{arch}-untied", tie_word_embeddings=False), dtype)
    weight = loaded.model.get_output_embeddings().weight.detach().double()
    hidden, logits, tokens = run(loaded, dtype, kernels)
    assert logits.dtype is torch.float32
    exact = functional.linear(hidden.double(), weight)
    assert len(exact) == len(tokens) >= 200
    top = exact.topk(2)
    clear = (top.values[:, 0] - top.values[:, 1]) > GAP
    assert int(clear.sum()) >= 150
    wrong = [i for i, token in enumerate(tokens) if clear[i] and token != int(top.indices[i, 0])]
    assert wrong == []
    rounded = exact.to(getattr(torch, dtype)).float()
    assert int((rounded.argmax(dim=1) != exact.argmax(dim=1)).sum()) >= 5  # else the test shows nothing


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("kind", ["int4", "int8", "nf4", "fp8"])
def test_a_quantized_head_gives_float32_too(kind: str, kernels: str, bases: Path) -> None:
    if kernels == "native":
        native_or_skip()
    loaded = load(make_base("llama", bases / "llama"), "bfloat16", kind)
    weight = loaded.model.get_output_embeddings().quantized.dequantize().double()
    hidden, logits, _ = run(loaded, "bfloat16", kernels)
    exact = functional.linear(hidden.double(), weight)
    limit = 2**-11 if kernels == "native" and kind.startswith("int") else 2**-18  # fixed-point inputs
    terms = functional.linear(hidden.double().abs().amax(dim=1, keepdim=True).expand_as(hidden), weight.abs())
    assert logits.dtype is torch.float32
    assert bool(((logits - exact).abs() <= limit * terms).all())


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_an_adapter_on_the_head_adds_to_float32(kernels: str, bases: Path) -> None:
    """Its product is one of 16-bit numbers, whose sum no step rounds."""
    if kernels == "native":
        native_or_skip()
    base = make_base("llama", bases / "llama")
    adapter = make_adapter(base, bases / "on-the-head", seed=3, target_modules=["lm_head"])
    loaded = load(base, "bfloat16")
    weight = loaded.model.get_output_embeddings().weight.detach().double()
    driver = PlanDriver(loaded, dtype="bfloat16", kernels=kernels)
    driver.load_adapter(image_of(loaded, adapter), 1)
    seen = watch_head(driver)
    driver.add(texts()[0], lora_slot=1)
    driver.run(1, (64,))
    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.lm_head.lora_{name}.weight"].bfloat16().double() for name in "AB")
    low = seen[0].reshape(1, -1).double() @ a.t()
    exact = functional.linear(seen[0].reshape(1, -1).double(), weight)[0] + SCALING * (low @ b.t())[0]
    rounding = SCALING * 2**-8 * (low.abs() @ b.abs().t())[0]  # PEFT rounds the narrow product
    assert bool(((driver.logits[0][0] - exact).abs() <= rounding + 1e-5).all())
    assert driver.logits[0][0].dtype is torch.float32
    assert not torch.equal(driver.logits[0][0], driver.logits[0][0].bfloat16().float())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_logits_of_every_family_are_in_float32(arch: str, bases: Path) -> None:
    """Scales and soft caps come after the output layer: what they are given, they give."""
    driver = PlanDriver(make_base(arch, bases / arch), dtype="bfloat16")
    driver.add(texts()[0])
    driver.run(1, (64,))
    logits = driver.logits[0][0]
    assert logits.dtype is torch.float32
    assert int((logits != logits.bfloat16().float()).sum()) > VOCAB_SIZE // 2
