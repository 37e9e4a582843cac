"""A first step before the first request: what would end the engine then, ends its start, with the layer's name."""

from __future__ import annotations

import torch

from engine.errors import ModelNotSupported
from engine.kv.backend import AttentionInputs
from engine.kv.storage import KVStorage
from engine.model.attention import forward_hidden, forward_logits
from engine.model.loader import LoadedModel
from engine.model.watch import where_it_failed
from engine.runner.layers import PreparedLayers

_TOKENS = 12


def rehearse(
    loaded: LoadedModel, layers: PreparedLayers, storage: KVStorage, num_blocks: int, *, swapped: bool
) -> None:
    """Run a prompt, a part of one that samples nothing, and a token behind it. Blocks 1, 2, ... may be written.

    `swapped`: layers run on kernels of our own, and could run without.
    Raises: ModelNotSupported naming the layer that fails.
    """
    size = storage.shape.block_size
    num_tokens = min(_TOKENS, loaded.max_model_len, (num_blocks - 1) * size)
    first = max(1, num_tokens - 1)
    layers.batch.set((), ())
    try:
        with torch.inference_mode():
            _forward(loaded, layers, size, 0, first, sample=False)
            _forward(loaded, layers, size, 0, first, sample=True)
            if first < num_tokens:
                _forward(loaded, layers, size, first, num_tokens, sample=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a layer raises that is given what it does not expect
        where = where_it_failed(loaded.model, error)
        remedy = "; set kernels='torch' to serve it without compiled kernels" if swapped else ""
        raise ModelNotSupported(f"{where} fails in a first step: {error}{remedy}") from error


def _forward(
    loaded: LoadedModel, layers: PreparedLayers, block_size: int, begin: int, end: int, *, sample: bool
) -> None:
    device = loaded.device
    positions = torch.arange(begin, end, device=device)
    ids = (positions * 7 + 3) % loaded.capabilities.vocab_size
    layers.backend.plan(
        AttentionInputs(
            slot_mapping=positions + block_size,
            block_tables=torch.arange(1, 1 - (-end // block_size), device=device)[None],
            query_starts=(0, end - begin),
            context_lengths=(end,),
        )
    )
    if sample:
        forward_logits(loaded.model, ids, positions, torch.tensor([end - begin - 1], device=device), layers.backend)
    else:
        forward_hidden(loaded.model, ids, positions, layers.backend)
