"""A quantized weight is what its formula says, whatever kind of codes it has."""

from __future__ import annotations

import pytest
import torch

from engine.quant.linear import QuantLinear, round_activations
from engine.quant.weight import NF4_VALUES, Kind, QuantizedWeight, pack_nibbles

OUT, IN, GROUP = 5, 24, 8


def _random(kind: Kind, *, zeros: bool, order: bool) -> tuple[QuantizedWeight, torch.Tensor]:
    """A weight, and what it means in float64, element by element."""
    g = torch.Generator().manual_seed(3)
    scales = torch.rand((OUT, IN // GROUP), generator=g) + 0.1
    zero = torch.randint(-8, 8, scales.shape, generator=g, dtype=torch.int16) if zeros else None
    permutation = torch.randperm(IN, generator=g) if order else None
    raw = torch.randint(0, 16, (OUT, IN), generator=g, dtype=torch.uint8)
    if kind == "int8":
        codes = values = torch.randint(-128, 128, (OUT, IN), generator=g, dtype=torch.int8)
    elif kind == "fp8":
        codes = values = torch.randn((OUT, IN), generator=g).to(torch.float8_e4m3fn)
    else:
        codes = pack_nibbles(raw)
        values = raw.double() - 8 if kind == "int4" else torch.tensor(NF4_VALUES).double()[raw.long()]
    expected = torch.zeros((OUT, IN), dtype=torch.float64)
    for n in range(OUT):
        for k in range(IN):
            value = values[n, k].double() - (0 if zero is None else zero[n, k // GROUP].double())
            expected[n, k if permutation is None else permutation[k]] = scales[n, k // GROUP].double() * value
    return QuantizedWeight(kind=kind, codes=codes, scales=scales, zeros=zero, order=permutation), expected


@pytest.mark.parametrize("kind", ["int4", "int8", "nf4", "fp8"])
@pytest.mark.parametrize(("zeros", "order"), [(False, False), (True, False), (False, True), (True, True)])
def test_its_rows_are_scales_times_codes(kind: Kind, zeros: bool, order: bool) -> None:
    weight, expected = _random(kind, zeros=zeros, order=order)
    torch.testing.assert_close(weight.dequantize().double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weight.dequantize(2, 4).double(), expected[2:4], rtol=1e-6, atol=1e-6)
    assert (weight.out_features, weight.in_features, weight.group_size) == (OUT, IN, GROUP)


@pytest.mark.parametrize("kind", ["int4", "int8", "nf4", "fp8"])
def test_a_layer_multiplies_by_them(kind: Kind) -> None:
    weight, expected = _random(kind, zeros=kind == "int4", order=True)
    bias, x = torch.randn(OUT), torch.randn(2, 3, IN)
    torch.testing.assert_close(
        QuantLinear(weight, bias)(x), (x.double() @ expected.T + bias.double()).float(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("kind", "steps"), [("int8", 1 / 127), ("fp8", 2**-3)])
def test_rounded_inputs_differ_by_half_a_step_of_their_own_row(kind: str, steps: float) -> None:
    x = torch.randn(4, 64) * torch.tensor([1e-3, 1.0, 50.0, 0.0])[:, None]
    difference = (round_activations(x, kind) - x).abs().amax(dim=-1)
    assert (difference <= 0.51 * steps * x.abs().amax(dim=-1)).all()
    assert (difference[:3] > 0).all()
