"""Attention over a quantized cache as its definition says it: rows rounded one by one in numpy, sums in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.kv.backend import AttentionInputs, LayerCall

# Every number of e4m3 that is not negative: 3 bits behind the point, exponents -6 .. 8, and NaN instead of 480.
_E4M3 = np.array([m * 2.0**-9 for m in range(8)] + [(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8)])
E4M3 = _E4M3[_E4M3 <= 448]
LARGEST = {"int8": 127.0, "fp8": 448.0}


def round_row(row: np.ndarray, quantization: str) -> np.ndarray:
    """What the cache makes of one finite row [D] of float32, in float64."""
    largest = np.abs(row).max()
    if largest == 0:
        return np.zeros(row.shape)
    scale = np.float32(largest) / np.float32(LARGEST[quantization])
    ratios = (row / scale).astype(np.float32).astype(np.float64)
    if quantization == "int8":
        return np.rint(ratios) * np.float64(scale)
    # Of two neighbours at one distance the one with an even code, which is its place in the table.
    distance = np.abs(np.abs(ratios)[:, None] - E4M3)
    nearest = distance.argmin(axis=1)
    following = np.minimum(nearest + 1, len(E4M3) - 1)
    tie = distance[np.arange(len(row)), following] == distance[np.arange(len(row)), nearest]
    codes = np.where(tie & (nearest % 2 == 1), following, nearest)
    return np.copysign(E4M3[codes], ratios) * np.float64(scale)


def round_rows(x: Tensor, quantization: str) -> Tensor:
    """Shapes: [..., D], any element type; returns [..., D] float64."""
    rows = x.float().reshape(-1, x.shape[-1]).cpu().numpy()
    return torch.from_numpy(np.stack([round_row(row, quantization) for row in rows])).view(x.shape)


def attend64(q: Tensor, keys: Tensor, values: Tensor, first_position: int, layer: LayerCall) -> Tensor:
    """Rows of one sequence, one by one. Shapes: q [t, Hq, D]; keys, values [c, Hk, D] float64; returns [t, Hq, D]."""
    out = torch.empty(q.shape, dtype=torch.float64)
    group = q.shape[1] // keys.shape[1]
    for row, position in enumerate(range(first_position, first_position + len(q))):
        oldest = 0 if layer.sliding_window is None else max(0, position - layer.sliding_window + 1)
        for head in range(q.shape[1]):
            seen = slice(oldest, position + 1)
            scores = keys[seen, head // group] @ q[row, head].double().cpu() * layer.scaling
            if layer.softcap is not None:
                scores = layer.softcap * (scores / layer.softcap).tanh()
            weights = (scores - scores.max()).exp()
            total = weights.sum()
            if layer.sinks is not None:
                total = total + (layer.sinks[head].double().cpu() - scores.max()).exp()
            out[row, head] = (weights / total) @ values[seen, head // group]
    return out


def slots_before(step: AttentionInputs, block_size: int) -> Tensor:
    """Of all that the sequences of `step` had computed before, sequence by sequence."""
    slots = []
    for s, context in enumerate(step.context_lengths):
        table = step.block_tables[s].tolist()
        before = context - (step.query_starts[s + 1] - step.query_starts[s])
        slots += [table[p // block_size] * block_size + p % block_size for p in range(before)]
    return torch.tensor(slots, device=step.slot_mapping.device)
