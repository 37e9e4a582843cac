"""Compiled layers with quantized weights against float64: any shape, any mixture of weights, any number of rows."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from engine.image_spec import LinearSite
from engine.lora.batch import LoraBatch
from engine.lora.native_lora import NativeLora
from engine.lora.reference_lora import lora_linear
from engine.model.packed import PackedGroup, PackedLinear, can_pack, pack_experts, pack_linears
from engine.quant.experts import ExpertWeights, QuantExperts
from engine.quant.linear import QuantLinear
from engine.quant.weight import QuantizedWeight
from tests.native.test_linear import MIXTURES, NAMES, TOLERANCE, bind
from tests.support.lora_images import cut, linear_sites
from tests.support.native import deviation, native_or_skip
from tests.support.quantized_weights import random_weight

ROWS = [1, 3, 12, 13, 40]
# (out, in, group): outputs that fill no panel, groups that fill no block, groups of several blocks.
SHAPES = [(70, 96, 32), (9, 50, 25), (33, 256, 128), (5, 40, 40), (64, 896, 128), (31, 400, 200), (40, 1300, 1300)]
KINDS = ["int4", "int8", "nf4", "fp8"]
EXPERT = [(96, 64, 32), (96, 64, 32), (64, 96, 32)]  # gate, up, down


@pytest.fixture(autouse=True)
def _as_in_a_step() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def make_layers(
    linears: list[nn.Linear | QuantLinear], dtype: torch.dtype, lora: NativeLora | None = None
) -> list[PackedLinear]:
    sites = linear_sites(*((linear.in_features, linear.out_features) for linear in linears))
    assert all(can_pack(linear, dtype) for linear in linears)
    group = PackedGroup(native_or_skip(), linears, lora, sites, dtype)
    return [PackedLinear(linear, group, i, sampled=False) for i, linear in enumerate(linears)]


def layer_of(weight: QuantizedWeight, dtype: torch.dtype) -> tuple[PackedLinear, Tensor]:
    """The layer, and its bias in float64."""
    bias = torch.randn(weight.out_features, dtype=dtype)
    return make_layers([QuantLinear(weight, bias)], dtype)[0], bias.double()


def fixed_point_error(x: Tensor, weight: Tensor) -> Tensor:
    """An input is off by half a unit at most, a unit is 1 / 32639 of a block's largest input. Shape: [rows, out]."""
    return x.double().abs().amax(-1, keepdim=True) / (2 * 32639) * weight.double().abs().sum(-1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=NAMES.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_rows_equals_the_product_with_the_dequantized_weight(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    for order in (False, True):
        for zeros in (False, True) if kind in ("int4", "int8") else (False,):
            weight = random_weight(kind, *shape, zeros=zeros, order=order)
            layer, bias = layer_of(weight, dtype)
            dequantized = weight.dequantize().double()
            x = torch.randn(max(ROWS), shape[1]).to(dtype)
            expected = x.double() @ dequantized.T + bias
            limit = (TOLERANCE[dtype] * expected.abs().max()).expand_as(expected)
            if kind in ("int4", "int8"):
                limit = limit + fixed_point_error(x, dequantized)
            for rows in ROWS:
                y = layer(x[-rows:])
                assert y.dtype == dtype
                assert ((y - expected[-rows:]).abs() <= limit[-rows:]).all(), f"{rows} rows, {zeros=}, {order=}"


def integer_product(weight: QuantizedWeight, steps: Tensor) -> Tensor:
    """The sum over each run of codes times steps, which float64 holds exactly, then the scales. Shape: [rows, out]."""
    codes = weight.codes.double()
    if weight.kind == "int4":
        codes = torch.stack([weight.codes % 16, weight.codes // 16], dim=-1).flatten(1).double() - 8
    groups = codes.unflatten(1, (-1, weight.group_size))
    if weight.zeros is not None:
        groups = groups - weight.zeros[:, :, None]
    if weight.order is not None:
        steps = steps[:, weight.order]
    sums = torch.einsum("rgk,ngk->rng", steps.double().unflatten(1, (-1, weight.group_size)), groups)
    return (sums * weight.scales.double()).sum(-1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=NAMES.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_inputs_rounded_to_int8_are_multiplied_exactly(
    kind: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    for more in (False, True):
        weight = random_weight(kind, *shape, zeros=more, order=more, activations="int8")
        layer, bias = layer_of(weight, dtype)
        x = torch.randn(max(ROWS), shape[1]).to(dtype)
        step = x.float().abs().amax(-1, keepdim=True) / 127
        expected = integer_product(weight, torch.round(x.float() / step)) * step.double() + bias
        for rows in ROWS:
            found = layer(x[-rows:])
            assert deviation(found, expected[-rows:]) <= {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_rounded_to_fp8_are_those_of_torch(kind: str) -> None:
    weight = random_weight(kind, 70, 256, 64, activations="fp8")
    layer, bias = layer_of(weight, torch.float32)
    x = torch.randn(40, 256) * torch.logspace(-4, 0, 256)  # some below the smallest normal number
    step = x.abs().amax(-1, keepdim=True) / 448
    rounded = (x / step).to(torch.float8_e4m3fn).double() * step
    expected = rounded @ weight.dequantize().double().T + bias
    assert ((layer(x) - expected).abs() <= fixed_point_error(x, weight.dequantize()) + 1e-6).all()


def test_a_row_of_zeros_and_one_of_very_small_numbers_are_not_divided_by_zero() -> None:
    for kind in KINDS:
        for activations in (None, "int8", "fp8"):
            layer, bias = layer_of(random_weight(kind, 33, 64, activations=activations), torch.float32)
            x = torch.zeros(2, 64)
            x[1, 3] = 1e-30
            assert torch.allclose(layer(x).double(), bias.expand(2, -1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=NAMES.get)
def test_layers_of_any_kinds_are_computed_together(dtype: torch.dtype) -> None:
    """Some read x as it is, others rounded or in an order of their own: each reads its own."""
    order = torch.randperm(128)
    weights = [
        random_weight("int4", 96, 128, 32),
        replace(random_weight("int4", 33, 128, 64), order=order),
        replace(random_weight("int8", 32, 128, 64), order=order.clone()),
        random_weight("int8", 40, 128, order=True),
        random_weight("int8", 64, 128, activations="int8"),
        random_weight("nf4", 5, 128, 64),
        random_weight("fp8", 50, 128, activations="fp8"),
    ]
    linears: list[nn.Linear | QuantLinear] = [QuantLinear(weight) for weight in weights]
    linears.insert(3, nn.Linear(128, 100, dtype=dtype))
    linears.append(nn.Linear(128, 3, dtype=dtype))
    layers = make_layers(linears, dtype)
    for rows in (1, 7, 50):
        x = torch.randn(1, rows, 128).to(dtype)
        for linear, layer in zip(linears, layers, strict=True):
            y = layer(x)
            assert y.shape == (1, rows, linear.out_features)
            assert deviation(y, linear.double()(x.double())) <= {torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]


@pytest.mark.parametrize("activations", [None, "int8", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_in_any_batch(kind: str, activations: str | None) -> None:
    (layer, _) = layer_of(random_weight(kind, 100, 640, 160, activations=activations), torch.float32)
    x = torch.randn(101, 640)
    everything = layer(x)
    for start, end in ((0, 1), (3, 5), (3, 16), (57, 101), (99, 101)):
        assert torch.equal(layer(x[start:end].clone()), everything[start:end])


@pytest.mark.parametrize("activations", [None, "int8", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_stay_in_their_row(kind: str, activations: str | None) -> None:
    (layer, _) = layer_of(random_weight(kind, 40, 200, activations=activations), torch.bfloat16)
    x = torch.randn(3, 200).bfloat16()
    good = layer(x.clone())
    x[1, 150], x[2, 7] = float("nan"), float("inf")
    y = layer(x)
    assert torch.equal(y[0], good[0])
    assert not y[1:].isfinite().any()


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_processors_without_byte_instructions_give_the_same_bits(kind: str) -> None:
    library = native_or_skip()
    if not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has none")
    for activations in (None, "int8"):
        layer, _ = layer_of(random_weight(kind, 70, 256, 64, zeros=True, activations=activations), torch.float32)
        x = torch.randn(13, 256)
        expected = layer(x)
        library.use_byte_instructions(0)
        try:
            found = [layer(x[:rows].clone()) for rows in (1, 6, 13)]
        finally:
            library.use_byte_instructions(1)
        assert all(torch.equal(y, expected[: len(y)]) for y in found)


def test_the_largest_codes_and_inputs_overflow_nothing() -> None:
    """Sums are 32 bits wide: the bound that is argued in the kernel, reached."""
    for activations in (None, "int8"):
        for sign in (1, -1):
            weight = QuantizedWeight(
                kind="int8",
                codes=torch.full((32, 2048), 127 if sign > 0 else -128, dtype=torch.int8),
                scales=torch.ones(32, 1),
                zeros=torch.full((32, 1), -255 * sign, dtype=torch.int16),
                activations=activations,  # type: ignore[arg-type]
            )
            layer, bias = layer_of(weight, torch.float32)
            x = torch.ones(7, 2048)
            assert deviation(layer(x), x.double() @ weight.dequantize().double().T + bias) <= 1e-6


# ---- LoRA and models


@pytest.mark.parametrize("dtype", TOLERANCE, ids=NAMES.get)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_read_inputs_that_nobody_rounded(kind: str, dtype: torch.dtype) -> None:
    lora = NativeLora(native_or_skip(), num_slots=4)
    batch, segments = LoraBatch(lora), cut(*MIXTURES["base rows at both ends"])
    linears: list[nn.Linear | QuantLinear] = [
        QuantLinear(random_weight(kind, width, 96, 48, order=True, activations="int8")) for width in (140, 37)
    ]
    layers = make_layers(linears, dtype, lora)
    slots = bind(batch, linear_sites((96, 140), (96, 37)), dtype, ranks={1: 1, 2: 3, 3: 8, 4: 65})
    batch.set(segments)
    x = torch.randn(segments[-1].row_end + 2, 96).to(dtype)
    for site, (linear, layer) in enumerate(zip(linears, layers, strict=True)):
        expected = lora_linear(linear(x.float()).double(), x.double(), segments, slots[site])
        assert deviation(layer(x), expected) <= 2 * TOLERANCE[dtype]


def test_codes_are_gone_once_they_are_packed() -> None:
    linears = [QuantLinear(random_weight(kind, 64, 64, 32)) for kind in KINDS]
    codes = [weakref.ref(linear.quantized.codes) for linear in linears]
    model = nn.ModuleDict({f"{i}": linear for i, linear in enumerate(linears)})
    model.get_output_embeddings = lambda: model["3"]  # type: ignore[assignment]
    sites = [
        LinearSite(
            index=i, name=f"{i}", in_features=64, out_features=64, layer=0, fusion_group="all" if i < 3 else None
        )
        for i in range(4)
    ]
    del linears
    assert pack_linears(model, sites, native_or_skip(), None, torch.bfloat16) == {0, 1, 2, 3}
    assert all(type(layer) is PackedLinear for layer in model.values())
    assert [ref() for ref in codes] == [None] * 4


def test_what_the_kernels_cannot_compute_is_left_to_torch() -> None:
    far = random_weight("int4", 8, 32, zeros=True)
    far = replace(far, zeros=torch.full_like(far.scales, 256, dtype=torch.int16))
    nan = random_weight("fp8", 8, 32)
    nan.codes[3, 7] = float("nan")
    moved = replace(random_weight("nf4", 8, 32), zeros=torch.ones(8, 1, dtype=torch.int16))
    for weight in (far, nan, moved):
        assert not can_pack(QuantLinear(weight), torch.float32)
    good = random_weight("int4", 8, 32)
    assert can_pack(QuantLinear(good), torch.float32)
    assert not can_pack(QuantLinear(good), torch.float16)
    assert not can_pack(QuantLinear(good, torch.zeros(8)), torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_get_the_kernels_and_their_codes_go(kind: str) -> None:
    weights = [ExpertWeights(*(random_weight(kind, *shape) for shape in EXPERT)) for _ in range(3)]
    codes = [weakref.ref(expert.gate.codes) for expert in weights]
    experts = QuantExperts(weights, nn.functional.silu)
    del weights
    x, chosen = torch.randn(7, 64), torch.tensor([[0, 2]] * 4 + [[2, 3]] * 3)  # 3 is no expert
    shares = torch.rand(chosen.shape)
    expected = experts(x, chosen, shares)
    assert pack_experts(experts, native_or_skip(), torch.float32) == 9
    assert deviation(experts(x, chosen, shares), expected) < 1e-3
    assert all(code() is None for code in codes)
