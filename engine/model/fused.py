"""Small modules that transformers computes in many passes, swapped for one call each.

A swap is proposed by the module's shape and decided by its numbers: what does not give the original's output stays as
it is, in float32 on rows of all sizes (`trial.py`), and in the model's dtype. Rounding differs: the kernels round once,
transformers after every operation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from engine.model.trial import inputs_kept, is_rms_norm, largest_output, magnitude, rows_of_all_sizes, widened
from engine.model.watch import Use, may_replace
from engine.native.library import SUPPORTED_DTYPES, NativeLibrary
from engine.quant.linear import QuantLinear

# Shares of an element of a norm; of what the terms of an MLP's last product add up to.
_NORM = {torch.float32: 2**-18, torch.bfloat16: 2**-7}
_MLP = {torch.float32: 2**-16, torch.bfloat16: 2**-5}


class NativeRMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * (offset + weight), over the last axis (arXiv 1910.07467)."""

    def __init__(
        self, library: NativeLibrary, original: nn.Module, weight: nn.Parameter, eps: float, offset: float
    ) -> None:
        super().__init__()
        self._original = (original,)  # for another dtype than the weight's; a tuple, so that it is no second owner
        self.weight = weight
        self.eps, self.offset = eps, offset
        self._library = library
        self._is_bf16 = int(weight.dtype is torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype is not self.weight.dtype:
            return self._original[0](x)
        x = x.contiguous()
        y = torch.empty_like(x)
        columns = self.weight.shape[0]
        self._library.rms_norm(
            x.data_ptr(),
            self.weight.data_ptr(),
            y.data_ptr(),
            x.numel() // columns,
            columns,
            self.eps,
            self.offset,
            self._is_bf16,
        )
        return y


class NativeGatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, library: NativeLibrary, mlp: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self._library = library

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x).contiguous(), self.up_proj(x).contiguous()
        hidden = torch.empty_like(gate)
        is_bf16 = int(gate.dtype is torch.bfloat16)
        self._library.silu_mul(gate.data_ptr(), up.data_ptr(), hidden.data_ptr(), gate.numel(), is_bf16)
        return self.down_proj(hidden)


def fuse(model: nn.Module, library: NativeLibrary, dtype: torch.dtype, uses: Mapping[str, Use] | None = None) -> int:
    """Swap every module that has a twin here. Returns: how many. Before LoRA layers are put around the linear ones.

    `dtype`: of the activations. `uses`: what the model reads of a module, its twin must have.
    """
    num_swapped = 0
    for name, module in list(model.named_modules()):
        twin = None
        if may_replace(uses, name, "weight", "eps"):
            twin = _norm_twin(module, library)
        if twin is None and may_replace(uses, name, "gate_proj", "up_proj", "down_proj"):
            twin = _mlp_twin(module, library, dtype)
        if twin is not None:
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, twin)
            num_swapped += 1
    return num_swapped


def _norm_twin(module: nn.Module, library: NativeLibrary) -> nn.Module | None:
    if not type(module).__name__.endswith("RMSNorm"):
        return None
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, nn.Parameter) or not eps:
        return None
    if weight.ndim != 1 or weight.dtype not in SUPPORTED_DTYPES:
        return None
    for offset in (0.0, 1.0):
        twin = NativeRMSNorm(library, module, weight, float(eps), offset)
        try:
            if _is_norm(module, twin):
                return twin
        except Exception:  # it wants other arguments: then it is something else
            return None
    return None


def _is_norm(norm: nn.Module, twin: NativeRMSNorm) -> bool:
    with widened(norm):
        if not is_rms_norm(norm, norm.weight, twin.eps, twin.offset):
            return False
    x = rows_of_all_sizes(twin.weight.shape[0]).to(twin.weight.dtype)
    expected, got = norm(x), twin(x)
    return got.dtype is expected.dtype and _within(got, expected, _NORM[x.dtype] * expected.abs())


def _mlp_twin(module: nn.Module, library: NativeLibrary, dtype: torch.dtype) -> nn.Module | None:
    parts = [getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    if not all(type(part) in (nn.Linear, QuantLinear) for part in parts) or len(list(module.children())) > 4:
        return None
    if dtype not in SUPPORTED_DTYPES or any(p.dtype is not dtype for p in module.parameters()):
        return None
    twin = NativeGatedMLP(library, module)
    with inputs_kept(module), widened(module):
        rows = _mlp_rows(module).to(dtype).float()
        if not _is_mlp(module, twin, rows, _MLP[torch.float32]):
            return None
    with inputs_kept(module):
        return twin if _is_mlp(module, twin, rows.to(dtype), _MLP[dtype]) else None


def _mlp_rows(mlp: nn.Module) -> Tensor:
    """Of all sizes, and those that give the largest outputs: where a clamp would show."""
    linears = (mlp.gate_proj, mlp.up_proj)
    width = linears[0].in_features
    ones = torch.ones(width)
    largest = torch.stack([sign * largest_output(linear, ones) for linear in linears for sign in (1, -1)])
    scale = largest.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)
    return torch.cat([rows_of_all_sizes(width), (10 * largest / scale)[None]], dim=1)


@torch.inference_mode()
def _is_mlp(mlp: nn.Module, twin: NativeGatedMLP, x: Tensor, share: float) -> bool:
    inputs: list[Tensor] = []
    hook = twin.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        expected, got = mlp(x), twin(x)
    except Exception:  # it wants other arguments, or does not work by itself: then it is something else
        return False
    finally:
        hook.remove()
    if not isinstance(expected, Tensor) or got.dtype is not expected.dtype or got.shape != expected.shape:
        return False
    return _within(got, expected, share * magnitude(twin.down_proj, inputs[-1], fixed_point=False))


def _within(got: Tensor, expected: Tensor, limits: Tensor) -> bool:
    """Element by element; two steps of the dtype are always forgiven."""
    steps = 2 * torch.finfo(expected.dtype).eps * expected.float().abs()
    return bool(((got.float() - expected.float()).abs() <= limits.float() + steps).all())
