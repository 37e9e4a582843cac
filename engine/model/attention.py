"""The bridge to transformers' attention registry: a model's attention layers call the backend given to the forward.

The backend travels as a forward keyword argument: two models in one process never meet. Only an attention function
is registered, no mask function: transformers then builds no mask at all (`_preprocess_mask_arguments` returns early
for a name it has no mask function for), which also spares a search for packed sequences that would wait for the
device in every step. `probe.py` proves at load that what the mask would say is what the backend computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from engine.kv.backend import AttentionBackend, LayerCall

ATTENTION_NAME = "chorus_paged"


_WINDOW = "window_of_its_mask"


def keep_window(module: nn.Module, window: int | None) -> None:
    """Remember the window of an attention layer that tells it to its mask and not to its attention function."""
    if window is not None:
        vars(module)[_WINDOW] = window


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    attention_backend: AttentionBackend,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """What a transformers attention layer calls in place of eager or SDPA attention.

    The keyword arguments that end in `_` were all seen, and judged harmless, by the probe at load.
    Shapes: query [1, Hq, T, D]; key [1, Hk, T, D]; value [1, Hk, T, Dv], Dv <= D; returns [1, T, Hq, Dv].
    """
    layer = LayerCall(
        index=module.layer_idx,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        sliding_window=sliding_window or vars(module).get(_WINDOW),
        softcap=softcap,
        sinks=s_aux,
    )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    num_missing = k.shape[-1] - v.shape[-1]
    if num_missing == 0:
        return attention_backend.run(q, k, v, layer)[None], None
    # Latent attention (DeepSeek): keys have parts for positions beside, and in the cache values are as wide as keys.
    out = attention_backend.run(q, k, functional.pad(v, (0, num_missing)), layer)
    return out[..., :-num_missing].contiguous()[None], None


AttentionInterface.register(ATTENTION_NAME, paged_attention)


def forward_hidden(
    model: nn.Module, input_ids: torch.Tensor, positions: torch.Tensor, backend: AttentionBackend
) -> torch.Tensor:
    """Run the layers alone, for a step that samples nothing. Shapes: input_ids, positions [T]; returns [T, hidden]."""
    inner: Callable[..., Any] = inner_model(model)
    output = inner(input_ids=input_ids[None], position_ids=positions[None], use_cache=False, attention_backend=backend)
    return output.last_hidden_state[0]


def inner_model(model: Any) -> nn.Module:
    """The model without its output layer. Its name is not always the one that `base_model_prefix` says (Llama 4)."""
    inner = getattr(model, model.base_model_prefix, None)
    if isinstance(inner, nn.Module):
        return inner
    embeddings = model.get_input_embeddings()
    return next(child for child in model.children() if any(module is embeddings for module in child.modules()))


def forward_both(
    model: nn.Module,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    sampled_rows: torch.Tensor,
    backend: AttentionBackend,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `forward_logits`, with what `forward_hidden` gives. Shapes: returns [T, hidden], [N, V]."""
    seen: list[torch.Tensor] = []
    # What is between the two (a scale, a cap of the logits) is each model's own.
    hook = inner_model(model).register_forward_hook(lambda _module, _args, output: seen.append(output[0]))
    try:
        logits = forward_logits(model, input_ids, positions, sampled_rows, backend)
    finally:
        hook.remove()
    return seen[-1][0], logits


@contextmanager
def head_of(model: nn.Module, backend: AttentionBackend) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """The model's own way from hidden states (after the final norm) to logits, once a forward has run inside the block.

    The function takes rows [n, hidden] and gives [n, V]: the model runs with these in the place of what its layers
    would give, so that whatever it does with its logits (a scale, a cap) is done.
    """
    inner: Any = inner_model(model)
    seen: list[Any] = []
    hook = inner.register_forward_hook(lambda _module, _args, output: seen.append(output) if not seen else None)

    def head(rows: torch.Tensor) -> torch.Tensor:
        given = copy(seen[0])
        given.last_hidden_state = rows[None]
        some = torch.zeros(1, len(rows), dtype=torch.int64, device=rows.device)
        usual = inner.forward
        inner.forward = lambda *_args, **_kwargs: given
        try:
            told = {"use_cache": False, "logits_to_keep": 0, "attention_backend": backend}
            output = model(input_ids=some, position_ids=some, **told)
        finally:
            inner.forward = usual
        return output.logits[0]

    try:
        yield head
    finally:
        hook.remove()


def forward_logits(
    model: nn.Module,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    sampled_rows: torch.Tensor,
    backend: AttentionBackend,
) -> torch.Tensor:
    """One flattened batch through the model; logits of some rows.

    Shapes: input_ids, positions [T]; sampled_rows [N] int64; returns [N, V].
    """
    output = model(
        input_ids=input_ids[None],
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=sampled_rows,
        attention_backend=backend,
    )
    return output.logits[0]
