"""Linear layers with packed weights: layers that read the same tensor are computed by one call, LoRA included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.lora.native_cpu import NativeLora
from engine.native.library import SUPPORTED_DTYPES, NativeLibrary, check
from engine.native.structs import Member
from engine.site import LinearSite


class PackedGroup:
    """Several linear layers of one input. The first that is called computes all; the others take what waits for them.

    What waits belongs to one tensor object: a layer that is called with another computes anew, so that a model which
    does not do what it did when it was probed is slower, not wrong.
    """

    def __init__(
        self, library: NativeLibrary, linears: Sequence[nn.Linear], lora: NativeLora | None, sites: Sequence[LinearSite]
    ) -> None:
        self._library = library
        self._lora = lora
        self._in_features = linears[0].in_features
        self.dtype = linears[0].weight.dtype
        self._weights = [library.pack(linear.weight) for linear in linears]
        self._biases = [None if linear.bias is None else linear.bias.detach().contiguous() for linear in linears]
        self._widths = [linear.out_features for linear in linears]
        self._members = (Member * len(linears))(
            *(
                Member(
                    weight=weight.data_ptr(),
                    bias=None if bias is None else bias.data_ptr(),
                    out_features=width,
                    lora=None if lora is None else lora.table_address(site.index),
                )
                for weight, bias, width, site in zip(self._weights, self._biases, self._widths, sites, strict=True)
            )
        )
        self._x: Tensor | None = None
        self._waiting: dict[int, Tensor] = {}

    def run(self, index: int, x: Tensor, *, sampled: bool) -> Tensor:
        """The output of layer `index`. Shapes: x [..., in] in the weights' dtype; returns [..., out]."""
        if x is not self._x or index not in self._waiting:
            self._compute(x, sampled)
        y = self._waiting.pop(index)
        if not self._waiting:
            self._x = None
        return y

    def _compute(self, x: Tensor, sampled: bool) -> None:
        rows = x.contiguous()
        num_rows = rows.numel() // self._in_features
        outputs = [torch.empty((*x.shape[:-1], width), dtype=self.dtype) for width in self._widths]
        for member, y in zip(self._members, outputs, strict=True):
            member.y = y.data_ptr()
        address, count = None, 0
        if self._lora is not None:
            chunks = self._lora.sampled_rows if sampled else self._lora.rows
            chunks.check_rows(num_rows)
            address, count = chunks.address, chunks.count
        is_bf16 = self.dtype is torch.bfloat16
        status = self._library.linear(
            rows.data_ptr(), num_rows, self._in_features, self._members, len(outputs), address, count, is_bf16
        )
        check(status, f"linear layers of {num_rows} rows")
        self._x, self._waiting = x, dict(enumerate(outputs))


class PackedLinear(nn.Module):
    """y = x W^T + bias, plus LoRA where the group has it. One layer of a group."""

    def __init__(self, linear: nn.Linear, group: PackedGroup, index: int, *, sampled: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._group = group
        self._index = index
        self._sampled = sampled

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not self._group.dtype:
            return self._group.run(self._index, x.to(self._group.dtype), sampled=self._sampled).to(x.dtype)
        return self._group.run(self._index, x, sampled=self._sampled)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def pack_linears(
    model: nn.Module, sites: Sequence[LinearSite], library: NativeLibrary, lora: NativeLora | None
) -> set[int]:
    """Put packed layers in the place of the nn.Linear sites. Returns: the indices of those sites.

    Their own weights go, unless something else (a tied embedding) has them too.
    """
    head = model.get_output_embeddings()
    groups: dict[str, list[LinearSite]] = {}
    for site in sites:
        module = model.get_submodule(site.name)
        if type(module) is nn.Linear and module.weight.dtype in SUPPORTED_DTYPES:
            groups.setdefault(site.fusion_group or site.name, []).append(site)
    for members in groups.values():
        linears = [model.get_submodule(site.name) for site in members]
        group = PackedGroup(library, linears, lora, members)
        for index, (site, linear) in enumerate(zip(members, linears, strict=True)):
            parent_name, _, child = site.name.rpartition(".")
            packed = PackedLinear(linear, group, index, sampled=linear is head)
            setattr(model.get_submodule(parent_name), child, packed)
    return {site.index for members in groups.values() for site in members}
