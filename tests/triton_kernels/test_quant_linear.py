"""Products with quantized weights, against what `dequantize` says in float64."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.config import EngineConfig
from engine.model import triton_quant
from engine.model.loader import LoadedModel, load_model
from engine.model.triton_quant import QuantProduct, can_run, has_scaled_mm, join
from engine.quant.linear import QuantLinear
from engine.quant.weight import QuantizedWeight
from engine.triton_kernels.quant_layout import PackedWeight, pack_weight
from engine.triton_kernels.quant_rows import round_rows
from tests.runner.test_runner import image_of
from tests.support.plan_driver import PlanDriver
from tests.support.quantized_weights import quantize_layers, random_weight
from tests.support.tiny_model import make_adapter, make_base
from tests.support.triton_device import DEVICE

# Of the largest result. Weights are whole numbers or, nf4 in 16 bits, rounded once; then the result is. Triton's
# interpreter cuts what it should round to bfloat16.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
KINDS = ("int4", "nf4", "int8", "fp8")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def weight_of(kind: str, *sizes: Any, seed: int = 0, **options: Any) -> QuantizedWeight:
    torch.manual_seed(seed)
    return random_weight(kind, *sizes, **options).to(DEVICE)


def expected_of(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.dequantize().double().T
    return y if bias is None else y + bias.double()


def assert_close(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    limit = TOLERANCE[found.dtype] if tolerance is None else tolerance
    assert (found.double() - expected).abs().max() <= limit * expected.abs().max()


# Groups that fit a tile, that one must fill up, and a single one; inputs that do not fill the last tile.
@pytest.mark.parametrize(("sizes", "dtype"), [
    ((20, 72, 24), torch.float32), ((33, 192, 64), torch.float16), ((18, 90), torch.bfloat16),
])  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_dequantized_weight(kind: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    has_zeros = kind in ("int4", "int8")
    weight = weight_of(kind, *sizes, zeros=has_zeros, order=dtype is not torch.float16)
    bias = draw(sizes[0], dtype=dtype, seed=1)
    product = QuantProduct(weight, bias, dtype)
    for rows in (1, 17):
        x = draw(rows, sizes[1], dtype=dtype, seed=rows)
        assert_close(product(x), expected_of(x, weight, bias))


@pytest.mark.parametrize("rows", [2, 9, 16, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_number_of_rows(rows: int, dtype: torch.dtype) -> None:
    weight = weight_of("int4", 9, 256, 128)
    x = draw(rows, 256, dtype=dtype)
    assert_close(QuantProduct(weight, None, dtype)(x), expected_of(x, weight))


@pytest.mark.parametrize("rows", [1, 17])
def test_many_columns_are_summed_in_splits(rows: int) -> None:
    """Five blocks of columns: two splits, not of one length, and slices that go beyond the last."""
    weight, bias = weight_of("int4", 6, 1280, 64, zeros=True), draw(6, seed=1)
    x = draw(rows, 1280)
    assert_close(QuantProduct(weight, bias, torch.float32)(x), expected_of(x, weight, bias))


@pytest.mark.parametrize("rows", [5, 20])
def test_a_row_alone_in_its_class_has_the_same_bits(rows: int) -> None:
    product = QuantProduct(weight_of("int4", 8, 256, 64, zeros=True), None, torch.float16)
    x = draw(rows, 256, dtype=torch.float16)
    others = draw(rows, 256, dtype=torch.float16, seed=1)
    others[2] = x[2]
    assert torch.equal(product(x)[2], product(others)[2])


def test_rows_of_a_wider_tensor_and_none_at_all_are_taken() -> None:
    weight = weight_of("int8", 7, 40)
    product, wide = QuantProduct(weight, None, torch.float32), draw(3, 100)
    assert_close(product(wide[:, 20:60]), expected_of(wide[:, 20:60], weight))
    assert product(wide[:0, 20:60]).shape == (0, 7)


@pytest.mark.parametrize("rows", [3, 18])
def test_int8_by_int8_is_summed_in_whole_numbers(rows: int) -> None:
    weight = weight_of("int8", 12, 200, activations="int8")
    x = draw(rows, 200)
    row_scales = x.abs().amax(dim=1, keepdim=True) / 127
    sums = (x / row_scales).round().long() @ weight.codes.long().T
    expected = sums.double() * row_scales.double() * weight.scales[:, 0].double()
    assert_close(QuantProduct(weight, None, torch.float32)(x), expected, tolerance=5e-7)  # three roundings


@pytest.mark.parametrize(("kind", "activations", "options"), [
    ("int4", "int8", {"zeros": True, "order": True}), ("int8", "int8", {"zeros": True}), ("fp8", "fp8", {}),
])  # fmt: skip
def test_rounded_inputs_are_those_of_plain_torch(kind: str, activations: Any, options: dict[str, Any]) -> None:
    weight = weight_of(kind, 12, 64, 32, activations=activations, **options)
    x = draw(4, 64, dtype=torch.float16)
    codes, row_scales = round_rows(x, activations, torch.float32)
    expected = expected_of(codes.double() * row_scales.double()[:, None], weight)
    assert_close(QuantProduct(weight, None, torch.float16)(x), expected)


def test_fp8_by_fp8_is_torchs_product_where_there_is_one() -> None:
    if not has_scaled_mm(DEVICE, torch.bfloat16):
        pytest.skip("torch multiplies no fp8 on this device")
    weight, bias = weight_of("fp8", 48, 64, activations="fp8"), draw(48, dtype=torch.bfloat16, seed=1)
    product = QuantProduct(weight, bias, torch.bfloat16)
    assert product._packed is None
    x = draw(5, 64, dtype=torch.bfloat16)
    codes, row_scales = round_rows(x, "fp8", torch.float32)
    assert_close(product(x), expected_of(codes.double() * row_scales.double()[:, None], weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_of_rows_is_torchs_to_the_bit(dtype: torch.dtype) -> None:
    """With numbers from the smallest steps to the largest, and a row of zeros."""
    x = (draw(5, 300) * torch.logspace(-6, 2, 300, device=DEVICE)).to(dtype)
    x[3] = 0
    largest = x.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    for kind, scale in (("int8", largest / 127), ("fp8", largest / 448)):
        codes, row_scales = round_rows(x, kind, torch.float32)  # type: ignore[arg-type]
        scaled = x.float() / scale
        expected = scaled.round() if kind == "int8" else scaled.to(torch.float8_e4m3fn).float()
        assert torch.equal(row_scales, scale[:, 0])
        assert torch.equal(codes, expected)


@pytest.mark.parametrize("activations", ["int8", "fp8"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_a_row_that_holds_no_number_stays_visible_where_codes_have_none_for_it(activations: Any, broken: float) -> None:
    """Codes of int8 have no NaN: without one in the scale the row would look sound. Other rows are as they were."""
    product = QuantProduct(weight_of(activations, 8, 32, activations=activations), None, torch.float16)
    x = draw(3, 32, dtype=torch.float16)
    good = product(x)
    x[1, 3] = broken
    found = product(x)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], good[::2])


def test_weights_that_differ_in_what_a_product_must_know_are_not_joined() -> None:
    weight = weight_of("int4", 6, 64, 32, zeros=True)
    plain = weight_of("int4", 4, 64, 32, seed=1)
    joined = join([weight, plain])
    assert joined is not None
    assert torch.equal(joined.dequantize(), torch.cat([weight.dequantize(), plain.dequantize()]))
    for other in (
        weight_of("int4", 4, 64, 64), weight_of("nf4", 4, 64, 32), weight_of("int4", 4, 64, 32, order=True),
        weight_of("int4", 4, 64, 32, activations="int8"),
    ):  # fmt: skip
        assert join([weight, other]) is None


def test_zeros_and_codes_that_16_bits_cannot_hold_are_left_to_plain_torch() -> None:
    weight = weight_of("int4", 4, 64, 32, zeros=True)
    assert can_run(weight)
    assert weight.zeros is not None
    weight.zeros[0, 0] = 101
    assert not can_run(weight)
    with pytest.raises(ValueError, match="a zero of 101 is more than 100, the most for int4"):
        pack_weight("int4", weight.codes, weight.scales, weight.zeros)
    fp8 = weight_of("fp8", 4, 64)
    assert can_run(fp8)
    fp8.codes.view(torch.uint8)[1, 1] = 0xFF
    assert not can_run(fp8)


def test_codes_go_layer_by_layer_when_the_kernels_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one layer is repacked, those before it are gone: a model never lies in memory twice."""
    model = nn.Sequential(*(QuantLinear(weight_of("int8", 8, 32, seed=i)) for i in range(3)))
    codes = [weakref.ref(layer.quantized.codes) for layer in model]
    alive: list[int] = []

    def counting(*args: Any) -> PackedWeight:
        alive.append(sum(code() is not None for code in codes))
        return pack_weight(*args)

    monkeypatch.setattr(triton_quant, "pack_weight", counting)
    assert triton_quant.swap_quant_linears(model, torch.float32) == 3
    assert alive == [3, 2, 1]
    assert not any(code() for code in codes)


def load_quantized(base: Path, kind: str, skip: str) -> LoadedModel:
    """The base with random codes in every linear layer but those whose names contain `skip`."""
    loaded = load_model(EngineConfig(model=str(base), device=DEVICE.type, dtype="float32", num_threads=1))
    torch.manual_seed(0)

    def make(name: str, linear: nn.Linear) -> QuantizedWeight | None:
        if skip in name:
            return None
        return random_weight(kind, linear.out_features, linear.in_features, 16, zeros=kind == "int4").to(DEVICE)

    assert quantize_layers(loaded.model, make)
    return loaded


@pytest.mark.parametrize(
    ("arch", "kind", "skip"),
    [
        ("qwen2", "int4", "k_proj"),  # q, k and v are no longer one product
        pytest.param("llama", "int8", "lm_head", marks=pytest.mark.slow),
        pytest.param("mixtral", "nf4", "gate", marks=pytest.mark.slow),
    ],
)
def test_the_logits_of_quantized_models_and_adapters_are_those_of_plain_torch(
    arch: str, kind: str, skip: str, tmp_path: Path
) -> None:
    base = make_base(arch, tmp_path / arch, num_hidden_layers=1, tie_word_embeddings=False)
    adapter = make_adapter(base, tmp_path / "r3", seed=3, rank=3)
    logits = []
    for kernels in ("torch", "triton"):
        driver = PlanDriver(load_quantized(base, kind, skip), kernels=kernels, dtype="float32", device=DEVICE.type)
        names = {type(module).__name__ for module in driver.loaded.model.modules()}
        assert ("QuantLinear" in names) == (kernels == "torch")
        assert ("TritonDecoder" in names) == (kernels == "triton" and arch != "mixtral")
        assert ("TritonQuantLinear" in names) == (kernels == "triton" and skip != "lm_head")
        driver.load_adapter(image_of(driver.loaded, adapter, "r3"), 1)
        driver.add([7, 8, 9], lora_slot=1)
        driver.add([40])
        driver.run(1, (3, 1))
        logits.append(torch.cat([*driver.logits[0], *driver.logits[1]]))
    assert (logits[0] - logits[1]).abs().max() <= 1e-4 * logits[0].std()
