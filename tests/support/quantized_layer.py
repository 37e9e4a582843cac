"""A layer of a quantized checkpoint as a loader meets it, headers first, then the tensors; and random words for one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from engine.quant.scheme import Scheme
from engine.quant.weight import QuantizedWeight

MODULE = "model.layers.0.mlp.up_proj"


def read_layer(
    scheme: Scheme, tensors: Mapping[str, Tensor], out_features: int, in_features: int, module: str = MODULE
) -> QuantizedWeight:
    """What a scheme makes of a layer's tensors, which must be those it asks for, no more and no less."""
    assert scheme.is_quantized(module, tensors.keys())
    assert misfits(scheme, tensors, out_features, in_features, module) == []
    weight = scheme.read(module, in_features, out_features, tensors)
    assert (weight.out_features, weight.in_features) == (out_features, in_features)
    assert weight.scales.dtype == torch.float32
    assert all(t.is_contiguous() for t in (weight.codes, weight.scales, weight.zeros, weight.order) if t is not None)
    return weight


def misfits(
    scheme: Scheme, tensors: Mapping[str, Tensor], out_features: int, in_features: int, module: str = MODULE
) -> list[str]:
    """The suffixes of tensors that are missing, not asked for, or of another shape or type than the scheme says."""
    specs = scheme.tensors(module, in_features, out_features, tensors.keys())
    wrong = [suffix for suffix, spec in specs.items() if suffix not in tensors and not spec.optional]
    for suffix, tensor in tensors.items():
        spec = specs.get(suffix)
        if spec is None or tensor.dtype not in spec.dtypes or not spec.fits_shape(tuple(tensor.shape)):
            wrong.append(suffix)
    return sorted(wrong)


def assert_decodes_to(weight: QuantizedWeight, expected: Iterable[Iterable[float]]) -> None:
    """Codes, zeros and scales are kept exactly: what is left is the rounding of one product in float32."""
    wanted = torch.tensor([list(row) for row in expected], dtype=torch.float64)
    torch.testing.assert_close(weight.dequantize().double(), wanted, rtol=2e-7, atol=0)


def random_words(seed: int, *shape: int) -> Tensor:
    """int32, every bit random."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def random_scales(seed: int, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) + 0.1).to(dtype)


def field(word: int, index: int, bits: int) -> int:
    """The number in bits index * bits and up of a 32-bit word, in Python's integers."""
    return ((word % 2**32) >> (index * bits)) % 2**bits
