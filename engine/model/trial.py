"""The rows by which a faster layer is judged: near and far positions, usual, massive and vanishing values.

What a layer does to some rows says nothing of those it was not shown. Position-dependent factors begin at lengths that
the configuration names; real models have values thousands of times the others at their first token, beside which
every other error looks small; an eps shows only in rows that are nearly zero, a clamp only in large ones. All of it is
compared in float32, element by element: sixteen bits would forgive an error of a hundredth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from engine.kv.backend import AttentionBackend, AttentionInputs
from engine.kv.storage import KVShape, KVStorage
from engine.quant.linear import QuantLinear

_NEAR, _ALIGNED, _SMALL = 12, 6, 3  # rows of each kind
_MASSIVE, _LARGE = 3000.0, 100.0  # times the usual size of a row
_SIZES = (1e-3, 1e-6)  # of small rows: near the root of an eps, and so that they are near it after one more product
_MOST = 2e4  # float16 ends at 65,504
_SOME_OUTPUTS = 512  # of a weight, among which the largest is looked for


@dataclass(frozen=True, slots=True)
class Trial:
    """Rows of some sequences: near positions, far ones, small rows of each size. Shapes: positions [T] int64."""

    inputs: AttentionInputs
    positions: Tensor
    num_far: int

    @property
    def massive_rows(self) -> tuple[int, ...]:
        return (0, _NEAR // 2, _NEAR + _ALIGNED + self.num_far // 2)

    @property
    def aligned_rows(self) -> range:
        return range(_NEAR, _NEAR + _ALIGNED)

    @property
    def small_rows(self) -> range:
        return range(len(self.positions) - _SMALL * len(_SIZES), len(self.positions))

    @property
    def natural_rows(self) -> list[int]:
        """Those that keep the values that the model itself has there."""
        changed = {*self.massive_rows, *self.aligned_rows, *self.small_rows}
        return [row for row in range(len(self.positions)) if row not in changed]


@dataclass(frozen=True, slots=True)
class Bench:
    """Where layers are tried. `run` is a forward of the model over `own`, with the trial's rows."""

    trial: Trial
    own: AttentionBackend  # over a cache of the model's dtype
    exact: AttentionBackend  # over one of float32
    run: Callable[[], Any]


def make_bench(
    hf_config: Any,
    max_model_len: int,
    shape: KVShape,
    device: torch.device,
    make_backend: Callable[[KVStorage], AttentionBackend],
    forward: Callable[[Tensor, AttentionBackend], Any],
) -> Bench:
    """Caches of their own, not quantized, whose rounding would blur what a layer has wrong.

    `forward(positions, backend)`: of the model.
    """
    far = telling_positions(hf_config, max_model_len)
    trial, num_blocks = _lay_out(far, shape.block_size, max_model_len, device)
    shapes = [replace(shape, quantization=None), replace(shape, quantization=None, dtype=torch.float32)]
    own, exact = (make_backend(KVStorage(shape, num_blocks, device)) for shape in shapes)

    def run() -> None:
        own.plan(trial.inputs)
        forward(trial.positions, own)

    return Bench(trial, own, exact, run)


def telling_positions(hf_config: Any, max_model_len: int) -> list[int]:
    """Where a layer may begin to do something else: beside every length that the config names, whatever it is called,
    at powers of two, and at the end. Ascending, beyond the first rows."""
    named = set(_whole_numbers(hf_config.to_dict()))
    positions = {number + i for number in named for i in (-1, 0)} | {1 << i for i in range(max_model_len.bit_length())}
    positions |= {max_model_len // 2, max_model_len - 2, max_model_len - 1}
    return sorted(position for position in positions if _NEAR <= position < max_model_len)


def _whole_numbers(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        for member in value.values():
            yield from _whole_numbers(member)
    elif (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer()):
        yield int(value)


def _lay_out(far: list[int], size: int, max_model_len: int, device: torch.device) -> tuple[Trial, int]:
    """The trial, and how many blocks of the cache it takes, the null block included."""
    near = [min(i, max_model_len - 1) for i in range(_NEAR + _ALIGNED)]
    sequences = [near, far or [max_model_len - 1], *(near[:_SMALL] for _ in _SIZES)]
    slots, tables, starts, next_block = [], [], [0], 1
    for rows in sequences:
        num_blocks = -(-len(rows) // size)
        slots += [next_block * size + i for i in range(len(rows))]
        tables.append(list(range(next_block, next_block + num_blocks)))
        starts.append(starts[-1] + len(rows))
        next_block += num_blocks
    longest = max(map(len, tables))
    inputs = AttentionInputs(
        slot_mapping=torch.tensor(slots, device=device),
        block_tables=torch.tensor([table + [0] * (longest - len(table)) for table in tables], device=device),
        query_starts=tuple(starts),
        context_lengths=tuple(map(len, sequences)),
    )
    positions = torch.tensor([position for rows in sequences for position in rows], device=device)
    return Trial(inputs, positions, len(sequences[1])), next_block


def craft(hidden: Tensor, trial: Trial, directions: list[Tensor]) -> Tensor:
    """Rows to try a layer on, from what the model itself gave it. Shapes: hidden [1, T, H]; returns float32 [1, T, H].

    Massive: one channel thousands of times the others. Aligned: along `directions` [H], so that a weight's output is as
    large as it can become. Small: where an eps counts. All are numbers of hidden's dtype.
    """
    rows = hidden[0].float().clone()
    width = rows.shape[1]
    size = float(rows[trial.natural_rows].square().mean(dim=1).sqrt().median().clamp(min=1e-3, max=_MOST / _MASSIVE))
    for i, row in enumerate(trial.massive_rows):
        rows[row, (7 * i + 5) % width] = (-1) ** i * min(_MASSIVE * size, _MOST)
    for row, direction in zip(trial.aligned_rows, directions, strict=False):
        scale = float(direction.square().mean().sqrt().clamp(min=1e-12))
        rows[row] = direction * min(_LARGE * size, _MOST / 8) / scale
    small = rows[trial.small_rows]
    scales = small.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
    rows[trial.small_rows] = (
        small / scales * torch.tensor(_SIZES, device=rows.device).repeat_interleave(_SMALL)[:, None]
    )
    return rows.clamp(-_MOST, _MOST).to(hidden.dtype).float()[None]


def largest_output(linear: nn.Module, norm_weight: Tensor) -> Tensor:
    """The direction in which a norm's input gives a linear layer's largest output. Shapes: norm_weight, result [H]."""
    rows = weight_of(linear, _SOME_OUTPUTS) * norm_weight.float()
    return rows[int(rows.square().sum(dim=1).argmax())]


def weight_of(linear: nn.Module, num_outputs: int | None = None) -> Tensor:
    """In float32 [out, in], or its first outputs."""
    if isinstance(linear, QuantLinear):
        return linear.quantized.dequantize(0, num_outputs)
    weight: Tensor = linear.weight
    return weight[:num_outputs].float()


def magnitude(linear: nn.Module, x: Tensor, *, fixed_point: bool) -> Tensor:
    """What the terms of a product add up to without their signs: rounding errors are a share of it.

    An input's own error is a share of the others' size as much as of its own; of the largest one's, where inputs are
    multiplied as fixed-point numbers. Shapes: x [.., in]; returns [.., out].
    """
    x = x.float()
    others = x.abs().amax(dim=-1, keepdim=True) if fixed_point else x.square().mean(dim=-1, keepdim=True).sqrt()
    total = functional.linear(x.abs() + others, weight_of(linear).abs())
    bias = getattr(linear, "bias", None)
    return total if bias is None else total + bias.float().abs()


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """Inside, all floating-point parameters and buffers of a module are float32 copies."""
    kept: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for part in module.modules():
            for tensors in (part._parameters, part._buffers):
                for name, tensor in tensors.items():
                    if tensor is None or not tensor.is_floating_point() or tensor.dtype is torch.float32:
                        continue
                    kept.append((tensors, name, tensor))
                    wide = tensor.detach().float()
                    is_parameter = tensors is part._parameters
                    tensors[name] = nn.Parameter(wide, requires_grad=False) if is_parameter else wide
        yield
    finally:
        for tensors, name, tensor in kept:
            tensors[name] = tensor


@contextmanager
def muted(linear: nn.Linear | QuantLinear) -> Iterator[None]:
    """Inside, a linear layer gives zeros."""
    parameters = dict(linear._parameters)
    quantized = getattr(linear, "quantized", None)
    try:
        for name, tensor in parameters.items():
            if tensor is not None:
                linear._parameters[name] = nn.Parameter(torch.zeros_like(tensor), requires_grad=False)
        if isinstance(linear, QuantLinear):
            linear.quantized = replace(linear.quantized, scales=torch.zeros_like(linear.quantized.scales))
        yield
    finally:
        linear._parameters.update(parameters)
        if isinstance(linear, QuantLinear):
            assert quantized is not None
            linear.quantized = quantized


def rows_of_all_sizes(width: int, device: torch.device | str = "cpu", *, most: float = _MOST) -> Tensor:
    """Rows from vanishing to large, and one with a massive channel. Shapes: returns float32 [1, N, width]."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 30.0, 1e3, 1.0])
    rows = torch.randn((len(scales), width), generator=generator) * scales[:, None]
    rows[-1, width // 2] = 4 * _MASSIVE
    return rows.clamp(-most, most).to(device)[None]


def is_rms_norm(norm: nn.Module, weight: Tensor, eps: float, offset: float = 0.0) -> bool:
    """Whether a module, its parameters in float32, is x / sqrt(mean(x^2) + eps) * (offset + weight), for all sizes."""
    x = rows_of_all_sizes(weight.shape[0], weight.device)
    expected = norm(x)
    wide = x.double()
    got = wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt() * (offset + weight.double())
    if not isinstance(expected, Tensor) or expected.shape != got.shape or expected.dtype is not x.dtype:
        return False
    return bool(((got - expected).abs() <= 2**-18 * got.abs()).all())


def in_float32(value: Any) -> Any:
    """The same with all floating-point tensors in it widened."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(in_float32(item) for item in value)
    return {key: in_float32(item) for key, item in value.items()} if isinstance(value, dict) else value


@contextmanager
def inputs_kept(module: nn.Module) -> Iterator[int]:
    """Inside, no quantized layer of the module rounds its inputs. Gives: how many would."""
    layers = [part for part in module.modules() if isinstance(part, QuantLinear) and part.quantized.activations]
    weights = [layer.quantized for layer in layers]
    for layer, weight in zip(layers, weights, strict=True):
        layer.quantized = replace(weight, activations=None)
    try:
        yield len(layers)
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.quantized = weight
