"""The output layer: its logits leave in float32, as they were summed.

Sixteen bits hold eight or eleven of a logit's bits: the most likely tokens of one row in ten come out equal, and the
lowest id wins. The products are those of 16-bit numbers all the same, so this costs no second copy of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.quant.linear import QuantLinear

_TILE_BYTES = 16 << 20  # of weights that are widened at once


class FloatHead(nn.Linear):
    """y = x W^T + bias in float32, from 16-bit x and W. Shapes: x [.., in] -> y float32 [.., out].

    The parameters are those of the layer in whose place it stands, so that tied weights stay tied.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._tile: Tensor | None = None  # [outputs, in]: taken once, fresh memory costs more than the product
        self._sums_in_float32 = linear.weight.device.type == "cuda"  # the only kind whose product can give them

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self._sums_in_float32 and rows.dtype is self.weight.dtype:
            y = torch.mm(rows, self.weight.t(), out_dtype=torch.float32)
        else:
            y = self._by_tiles(rows.float())
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _by_tiles(self, rows: Tensor) -> Tensor:
        step = min(self.out_features, max(1, _TILE_BYTES // (4 * self.in_features)))
        if self._tile is None:
            self._tile = rows.new_empty((step, self.in_features))
        y = rows.new_empty((rows.shape[0], self.out_features))
        for begin in range(0, self.out_features, step):
            some = self.weight[begin : begin + step]
            y[:, begin : begin + step] = functional.linear(rows, self._tile[: some.shape[0]].copy_(some))
        return y


def widen_head(model: nn.Module) -> None:
    """Let a 16-bit model's output layer give float32, unless it does already."""
    head = model.get_output_embeddings()
    if isinstance(head, QuantLinear):
        head.output_dtype = torch.float32
    elif type(head) is nn.Linear and head.weight.dtype in (torch.float16, torch.bfloat16):
        name = next(name for name, module in model.named_modules() if module is head)
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, FloatHead(head))
