"""The attention oracle: one row, one head at a time in spirit; plain softmax in float32, no shortcut."""

from __future__ import annotations

import torch

from engine.kv.backend import AttentionInputs, LayerCall
from engine.kv.storage import KVStorage


class ReferenceAttention:
    """Semantics of AttentionBackend, written to be read. Always gathers from the cache, also what it just wrote.

    out[t, h] = sum_j softmax_j(cap(scaling * q[t, h] . k[j, h // G])) * v[j, h // G]
    over the positions j of t's own sequence with p - window < j <= p, where p is t's position and G = Hq / Hk;
    cap(x) = softcap * tanh(x / softcap); a sink adds exp(sink[h]) to the denominator.
    """

    def __init__(self, storage: KVStorage) -> None:
        self.storage = storage
        self._inputs: AttentionInputs | None = None

    def plan(self, inputs: AttentionInputs) -> None:
        self._inputs = inputs

    def run(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: LayerCall) -> torch.Tensor:
        inputs = self._inputs
        assert inputs is not None, "run before plan"
        self.storage.write(layer.index, k, v, inputs.slot_mapping)
        out = torch.empty_like(q)
        for s, context in enumerate(inputs.context_lengths):
            start, end = inputs.query_starts[s], inputs.query_starts[s + 1]
            keys, values = self.storage.gather(layer.index, inputs.block_tables[s])  # [n * P, Hk, D]
            # What lies behind the window of all rows may be gone, and another's be there: 0 * NaN is NaN.
            first = 0 if layer.sliding_window is None else max(0, context - (end - start) - layer.sliding_window + 1)
            positions = torch.arange(context - (end - start) - first, context - first, device=q.device)
            keys, values = keys[first:context], values[first:context]
            out[start:end] = attend(q[start:end], keys, values, positions, layer).to(q.dtype)
        return out


def attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, layer: LayerCall
) -> torch.Tensor:
    """Attention of some rows over one sequence, in float32.

    Shapes: q [t, Hq, D]; keys, values [c, Hk, D]; positions [t] in the numbering of the keys, 0 .. c - 1; returns
    [t, Hq, D].
    """
    groups = q.shape[1] // keys.shape[1]
    keys = keys.float().repeat_interleave(groups, dim=1)  # [c, Hq, D]
    values = values.float().repeat_interleave(groups, dim=1)
    scores = torch.einsum("thd,chd->htc", q.float(), keys) * layer.scaling  # [Hq, t, c]
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    columns = torch.arange(keys.shape[0], device=q.device)
    visible = columns[None, :] <= positions[:, None]
    if layer.sliding_window is not None:
        visible &= columns[None, :] > positions[:, None] - layer.sliding_window
    scores = scores.masked_fill(~visible, float("-inf"))
    if layer.sinks is not None:
        sinks = layer.sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.einsum("htc,chd->thd", weights, values)
