"""Quantized linear layers on the Triton kernels, in the place of those in plain torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from engine.model.watch import Use, may_replace
from engine.quant.linear import QuantLinear
from engine.quant.weight import NF4_VALUES, QuantizedWeight
from engine.triton_kernels.quant_layout import MOST_ZERO, PackedWeight, pack_weight
from engine.triton_kernels.quant_linear import quant_linear
from engine.triton_kernels.quant_rows import round_rows

_SCALED_MM_ALIGNMENT = 16  # of both sides of a weight
_SCALED_MM_SINCE = (8, 9)  # compute capability


class QuantProduct:
    """y = x W^T + bias, for a weight that `can_run`. It keeps codes in its own layout, and nothing else of the weight.

    Inputs that the weight wants rounded are rounded by a kernel, each row by a scale of its own. Both sides in fp8 go
    to torch's product where the device has one, all else to `quant_linear`.
    """

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, dtype: torch.dtype, output_dtype: torch.dtype | None = None
    ) -> None:
        """`dtype`: of the inputs and the bias, and of the outputs where `output_dtype` is None."""
        self._output_dtype = output_dtype
        self._bias = None if bias is None else bias.detach()
        self._activations = weight.activations
        self._fp8: tuple[Tensor, Tensor] | None = None  # codes [in, out], scales [1, out]
        self._packed: PackedWeight | None = None
        if output_dtype is None and _suits_scaled_mm(weight) and has_scaled_mm(weight.codes.device, dtype):
            self._fp8 = weight.codes.contiguous().t(), weight.scales.t().contiguous()
            return
        table = torch.tensor(NF4_VALUES, dtype=dtype, device=weight.codes.device) if weight.kind == "nf4" else None
        self._packed = pack_weight(weight.kind, weight.codes, weight.scales, weight.zeros, weight.order, table)

    def __call__(self, x: Tensor) -> Tensor:
        """Shapes: [T, in] -> [T, out]."""
        if self._fp8 is not None:
            rows, row_scales = round_rows(x, "fp8", torch.float8_e4m3fn)
            return _scaled_mm(rows, row_scales, *self._fp8, self._bias)
        assert self._packed is not None
        if self._activations is None:
            return quant_linear(x, self._packed, self._bias, dtype=self._output_dtype)
        # Either type holds such numbers exactly.
        rows, row_scales = round_rows(x, self._activations, torch.int8 if self._takes_int8() else x.dtype)
        return quant_linear(rows, self._packed, self._bias, row_scales, dtype=self._output_dtype or x.dtype)

    def _takes_int8(self) -> bool:
        return self._activations == "int8" and self._packed is not None and self._packed.takes_int8


class TritonQuantLinear(nn.Module):
    """Shapes: x [.., in] -> y [.., out], in the dtype that the layer gave."""

    def __init__(self, linear: QuantLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._product = QuantProduct(linear.quantized, linear.bias, dtype, linear.output_dtype)
        self._description = linear.extra_repr()

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return self._description


def can_run(weight: QuantizedWeight) -> bool:
    """Whether the kernels compute with every code and zero of a weight."""
    if weight.has_nan:
        return False
    return weight.zeros is None or int(weight.zeros.abs().max()) <= MOST_ZERO[weight.kind]


def join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """Weights of one input as one, their outputs side by side; None: they differ in what a product must know."""
    first = weights[0]
    for other in weights[1:]:
        if (other.kind, other.group_size, other.activations) != (first.kind, first.group_size, first.activations):
            return None
        if (other.order is None) is not (first.order is None):
            return None
        if other.order is not None and not torch.equal(other.order, first.order):
            return None
    zeros = None
    if any(weight.zeros is not None for weight in weights):
        zeros = torch.cat([torch.zeros_like(w.scales, dtype=torch.int16) if w.zeros is None else w.zeros
                           for w in weights])  # fmt: skip
    codes, scales = torch.cat([w.codes for w in weights]), torch.cat([w.scales for w in weights])
    return replace(first, codes=codes, scales=scales, zeros=zeros)


def swap_quant_linears(model: nn.Module, dtype: torch.dtype, uses: Mapping[str, Use] | None = None) -> int:
    """Give every quantized layer that is left the kernels; its own codes go. Returns: how many layers.

    `uses`: layers whose weights the model looks at keep them.
    """
    num_swapped = 0
    # By name: a list of the layers would keep the codes of all until the last one is repacked.
    for name in [name for name, module in model.named_modules() if type(module) is QuantLinear]:
        linear = model.get_submodule(name)
        if can_run(linear.quantized) and may_replace(uses, name, "in_features", "out_features"):
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, TritonQuantLinear(linear, dtype))
            num_swapped += 1
    return num_swapped


def _suits_scaled_mm(weight: QuantizedWeight) -> bool:
    if weight.kind != "fp8" or weight.activations != "fp8" or weight.order is not None or weight.zeros is not None:
        return False
    sizes = (weight.in_features, weight.out_features)
    return weight.scales.shape[1] == 1 and all(size % _SCALED_MM_ALIGNMENT == 0 for size in sizes)


@lru_cache(maxsize=8)
def has_scaled_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies fp8 with a scale for each row of both sides here: decided by what it answers."""
    if dtype is not torch.bfloat16:  # no other type comes out
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _SCALED_MM_SINCE:
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).to(device) for shape in ((3, 32), (48, 32), (48,)))
    rows, codes = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    row_scales, scales = x[:, 0].abs() + 0.5, weight[:, :1].abs().t() + 0.5
    expected = (rows.float() * row_scales[:, None]) @ (codes.float() * scales.t()).t() + bias
    try:
        found = _scaled_mm(rows, row_scales, codes.t(), scales.contiguous(), bias.to(dtype))
    except (RuntimeError, NotImplementedError):
        return False
    return bool((found.float() - expected).abs().max() <= 2**-6 * expected.abs().max())


def _scaled_mm(rows: Tensor, row_scales: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    return torch._scaled_mm(
        rows, codes, scale_a=row_scales[:, None], scale_b=scales, bias=bias, out_dtype=torch.bfloat16
    )
