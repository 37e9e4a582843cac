"""What rounding at load means, once more: in float64, from the formulas, and transformers' models with such weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

# QLoRA's table, as bitsandbytes prints it.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# Of float8 e4m3 without infinities: 4 bits of exponent (bias 7), 3 of mantissa, the last code is no number.
_FP8 = [m / 8 * 2**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1]


def dequantized(weight: Tensor, method: str) -> Tensor:
    """What a weight [out, in] is after it was rounded. Returns: float64."""
    w = weight.double()
    if method in ("int8", "int8-dynamic"):
        return round_int8(w)
    if method == "fp8":
        return round_fp8(w)
    size = next(size for size in ((128, 64, 32) if method == "int4" else (64, 32)) if w.shape[1] % size == 0)
    groups = w.view(w.shape[0], -1, size)
    return (_int4(groups) if method == "int4" else _nf4(groups)).view(w.shape)


def round_int8(rows: Tensor) -> Tensor:
    scale = rows.abs().amax(-1, keepdim=True) / 127
    return torch.round(rows / scale) * scale


def round_fp8(rows: Tensor) -> Tensor:
    scale = rows.abs().amax(-1, keepdim=True) / 448
    return _nearest(rows / scale, [-value for value in reversed(_FP8)] + _FP8[1:]) * scale


def _nf4(groups: Tensor) -> Tensor:
    scale = groups.abs().amax(-1, keepdim=True)
    return _nearest(groups / scale, list(_NF4)) * scale


def _int4(groups: Tensor) -> Tensor:
    """A scale that gives the extreme weight the code -8, or one that cuts it off there: which is nearer in all."""
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    tries = [(groups / (extreme / -n)).round().clamp(-8, 7) * (extreme / -n) for n in (8, 9)]
    errors = [((value - groups) ** 2).sum(-1, keepdim=True) for value in tries]
    return torch.where(errors[1] < errors[0], tries[1], tries[0])


def _nearest(values: Tensor, table: list[float]) -> Tensor:
    known = torch.tensor(table, dtype=torch.float64)
    return known[torch.searchsorted((known[1:] + known[:-1]) / 2, values.contiguous())]


def rounded_model(base: Path, method: str, *, lm_head: bool = False, embeddings: bool = False) -> Any:
    """transformers' model in float32, its layers' weights and inputs rounded as the settings say."""
    config = AutoConfig.from_pretrained(base, local_files_only=True)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    config.tie_word_embeddings = False  # a head has codes of its own
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    model.load_state_dict(plain.state_dict())
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear | Conv1D) and (lm_head or module is not model.get_output_embeddings()):
            _round_layer(module, method)
        elif name.endswith(".experts"):
            _round_experts(module, method)
    if embeddings:
        table = model.get_input_embeddings().weight.data
        table.copy_(round_int8(table.double()))
    return model


def _round_layer(module: nn.Linear | Conv1D, method: str) -> None:
    weight = module.weight.data
    rounded = dequantized(weight.t() if isinstance(module, Conv1D) else weight, method)
    weight.copy_(rounded.t() if isinstance(module, Conv1D) else rounded)
    inputs = input_rounding(method)
    if inputs is not None:
        module.register_forward_pre_hook(lambda _, args: (inputs(args[0].double()).float(),))


def input_rounding(method: str) -> Callable[[Tensor], Tensor] | None:
    return {"int8-dynamic": round_int8, "fp8": round_fp8}.get(method)


def _round_experts(module: Any, method: str) -> None:
    for matrices in (module.gate_up_proj.data, module.down_proj.data):
        for matrix in matrices:
            matrix.copy_(dequantized(matrix, method))
    inputs = input_rounding(method)
    if inputs is not None:
        module.forward = lambda *args: _experts(module, inputs, *args)


def _experts(module: Any, inputs: Callable[[Tensor], Tensor], x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """One row and one of its experts at a time."""
    y = torch.zeros_like(x, dtype=torch.float64)
    for row in range(x.shape[0]):
        for expert, share in zip(chosen[row].tolist(), weights[row], strict=True):
            gate, up = (module.gate_up_proj[expert].double() @ inputs(x[row].double())).chunk(2)
            y[row] += share.double() * (module.down_proj[expert].double() @ inputs(module.act_fn(gate) * up))
    return y.float()
