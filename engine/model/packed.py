"""Linear layers with packed weights: layers that read the same tensor are computed by one call, LoRA included."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.image_spec import LinearSite
from engine.lora.native_lora import NativeLora
from engine.model.surgery import sees_sampled_rows
from engine.model.watch import Use, may_replace
from engine.native.library import MAX_ZERO, SUPPORTED_DTYPES, NativeLibrary, check
from engine.native.structs import Member, Quantization
from engine.quant.experts import QuantExpert
from engine.quant.linear import QuantLinear
from engine.quant.weight import QuantizedWeight

# As code_kind and input_rounding in engine/native/src/linear.h.
_KINDS = {"int4": 0, "int8": 1, "nf4": 2, "fp8": 3}
_ATTRIBUTES = ("in_features", "out_features")  # that a packed layer still has
_INPUTS = {None: 0, "int8": 1, "fp8": 2}


def can_pack(linear: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the kernels can compute a layer, in a model whose activations have this dtype."""
    if dtype not in SUPPORTED_DTYPES:
        return False
    if type(linear) is nn.Linear:
        return linear.weight.dtype is dtype
    if type(linear) is not QuantLinear or (linear.bias is not None and linear.bias.dtype is not dtype):
        return False
    weight = linear.quantized
    if weight.kind in ("nf4", "fp8"):
        return weight.zeros is None and not weight.has_nan
    return weight.zeros is None or int(weight.zeros.abs().max()) <= MAX_ZERO


class Packer:
    """Packs layers that may be members of one call: those whose inputs have the same order share one tensor of it."""

    def __init__(self, library: NativeLibrary) -> None:
        self._library = library
        self._orders: list[Tensor] = []

    def pack(self, linear: nn.Module, table: int | None) -> tuple[Member, list[Any]]:
        """The layer for the kernel, and what must live as long. `table`: where its LoRA weights lie."""
        assert isinstance(linear, nn.Linear | QuantLinear)
        member, keep = Member(out_features=linear.out_features, lora=table), []
        if isinstance(linear, QuantLinear):
            how, order = self._quantization(linear.quantized)
            weight = linear.quantized
            packed = self._library.pack_quantized(weight.codes, weight.scales, weight.zeros, how)
            member.quantization = ctypes.addressof(how)
            keep += [how, order]
        else:
            packed = self._library.pack(linear.weight)
        member.weight = packed.data_ptr()
        if linear.bias is not None:
            bias = linear.bias.detach().contiguous()
            member.bias = bias.data_ptr()
            keep.append(bias)
        return member, [*keep, packed]

    def _quantization(self, weight: QuantizedWeight) -> tuple[Quantization, Tensor | None]:
        order = None if weight.order is None else self._shared(weight.order.to(torch.int32))
        how = Quantization(
            order=None if order is None else order.data_ptr(),
            group_size=weight.group_size,
            kind=_KINDS[weight.kind],
            inputs=_INPUTS[weight.activations],
            has_zeros=weight.zeros is not None,
        )
        return how, order

    def _shared(self, order: Tensor) -> Tensor:
        for known in self._orders:
            if torch.equal(known, order):
                return known
        self._orders.append(order.contiguous())
        return self._orders[-1]


class PackedGroup:
    """Several linear layers of one input. The first that is called computes all; the others take what waits for them.

    What waits belongs to one tensor object: a layer that is called with another computes anew, so that a model which
    does not do what it did when it was probed is slower, not wrong.
    """

    def __init__(
        self,
        library: NativeLibrary,
        linears: Sequence[nn.Linear | QuantLinear],
        lora: NativeLora | None,
        sites: Sequence[LinearSite],
        dtype: torch.dtype,
        *,
        is_head: bool = False,
    ) -> None:
        """`dtype`: of inputs, outputs and all that is not quantized; the head's outputs stay in float32. `sites`: of
        the layers, where there is LoRA."""
        self._library = library
        self._lora = lora
        self._in_features = linears[0].in_features
        self.dtype = dtype
        self.output_dtype = torch.float32 if is_head else dtype
        self._widths = [linear.out_features for linear in linears]
        packer = Packer(library)
        tables = [None] * len(linears) if lora is None else [lora.table_address(site.index) for site in sites]
        packed = [packer.pack(linear, table) for linear, table in zip(linears, tables, strict=True)]
        self._members = (Member * len(linears))(*(member for member, _ in packed))
        self._keep = [keep for _, keep in packed]
        self._x: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def run(self, index: int, x: Tensor, *, sampled: bool) -> Tensor:
        """The output of layer `index`, of `output_dtype`. Shapes: x [..., in] of the group's; returns [..., out]."""
        if x is not self._x or index not in self._waiting:
            self._compute(x, sampled)
        y = self._waiting.pop(index)
        if not self._waiting:
            self._x = None
        return y

    def _compute(self, x: Tensor, sampled: bool) -> None:
        rows = x.contiguous()
        num_rows = rows.numel() // self._in_features
        outputs = [torch.empty((*x.shape[:-1], width), dtype=self.output_dtype) for width in self._widths]
        for member, y in zip(self._members, outputs, strict=True):
            member.y = y.data_ptr()
        address, count = None, 0
        if self._lora is not None:
            chunks = self._lora.sampled_rows if sampled else self._lora.rows
            chunks.check_rows(num_rows)
            address, count = chunks.address, chunks.count
        status = self._library.linear(
            rows.data_ptr(),
            num_rows,
            self._in_features,
            self._members,
            len(outputs),
            address,
            count,
            self.dtype is torch.bfloat16,
            self.output_dtype is torch.bfloat16,
        )
        check(status, f"linear layers of {num_rows} rows")
        self._x, self._waiting = x, dict(enumerate(outputs))


class PackedLinear(nn.Module):
    """y = x W^T + bias, plus LoRA where the group has it. One layer of a group."""

    def __init__(self, linear: nn.Linear | QuantLinear, group: PackedGroup, index: int, *, sampled: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._group = group
        self._index = index
        self._sampled = sampled

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not self._group.dtype:
            y = self._group.run(self._index, x.to(self._group.dtype), sampled=self._sampled)
            return y if self._sampled else y.to(x.dtype)
        return self._group.run(self._index, x, sampled=self._sampled)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def pack_linears(
    model: nn.Module,
    sites: Sequence[LinearSite],
    library: NativeLibrary,
    lora: NativeLora | None,
    dtype: torch.dtype,
    uses: Mapping[str, Use] | None = None,
) -> set[int]:
    """Put packed layers in the place of the linear sites that the kernels can compute. Returns: the indices of those.

    `dtype`: of the activations. `uses`: layers whose weights the model looks at keep them. The others' own weights go,
    unless something else (a tied embedding) has them too.
    """
    head, groups = model.get_output_embeddings(), dict[str, list[LinearSite]]()
    for site in sites:
        if can_pack(model.get_submodule(site.name), dtype) and may_replace(uses, site.name, *_ATTRIBUTES):
            groups.setdefault(site.fusion_group or site.name, []).append(site)
    for members in groups.values():
        linears: list[Any] = [model.get_submodule(site.name) for site in members]
        sampled = [sees_sampled_rows(model, site.name, uses) for site in members]
        group = PackedGroup(library, linears, lora, members, dtype, is_head=linears[0] is head)
        for index, (site, linear) in enumerate(zip(members, linears, strict=True)):
            parent_name, _, child = site.name.rpartition(".")
            packed = PackedLinear(linear, group, index, sampled=sampled[index])
            setattr(model.get_submodule(parent_name), child, packed)
    return {site.index for members in groups.values() for site in members}


def pack_experts(model: nn.Module, library: NativeLibrary, dtype: torch.dtype) -> int:
    """Give quantized experts, whose layers are no sites, the kernels; their codes go. Returns: how many layers."""
    num_packed = 0
    for name in [name for name, module in model.named_modules() if isinstance(module, QuantExpert)]:
        expert = model.get_submodule(name)
        for members in (("gate_proj", "up_proj"), ("down_proj",)):
            linears = [getattr(expert, member) for member in members]
            if all(can_pack(linear, dtype) for linear in linears):
                group = PackedGroup(library, linears, None, (), dtype)
                for index, (member, linear) in enumerate(zip(members, linears, strict=True)):
                    setattr(expert, member, PackedLinear(linear, group, index, sampled=False))
                num_packed += len(members)
    return num_packed
