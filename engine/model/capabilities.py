"""What a loaded model offers, and the refusal, by the name of the layer, of what cannot be served.

The judgement rests on what a probing forward did (`probe.py`), not on a list of architectures: a decoder is served if
every layer's attention went through the registry, causally or in a window, and nothing else mixes the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from engine.checkpoint.folder import OTHERWISE, REMEDY
from engine.errors import ModelNotSupported
from engine.kv.rows import KVQuantization
from engine.kv.storage import KVShape
from engine.model.probe import NUM_ROWS, RECORDER, SAMPLED_ROWS, AttentionCall, MaskFunction, Trace
from engine.model.watch import where_it_failed

# Arguments of an attention call that the backend honours, and those that say nothing it must know.
_HONOURED = frozenset({"scaling", "sliding_window", "softcap", "s_aux"})
_HARMLESS = frozenset(
    {"dropout", "is_causal", "position_ids", "cache_position", "position_embeddings", "logits_to_keep"}
)


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention layer, as it called the registry."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None
    softcap: float | None
    has_sinks: bool


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What the engine must know of a model. All layers have the same KV heads and head size."""

    layers: tuple[AttentionLayer, ...]
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # columns of the logits

    @property
    def window_tokens(self) -> int | None:
        """How far back the layer with the widest window lets a token see, itself included; None: one has none."""
        windows = [layer.sliding_window for layer in self.layers]
        return None if None in windows else max(window for window in windows if window is not None)

    def kv_shape(self, block_size: int, dtype: torch.dtype, quantization: KVQuantization | None = None) -> KVShape:
        return KVShape(len(self.layers), block_size, self.num_kv_heads, self.head_dim, dtype, quantization)


def judge(model: nn.Module, trace: Trace, max_model_len: int) -> Capabilities:
    """Raises: ModelNotSupported naming the first layer or module that cannot be served, and why."""
    names = {id(module): name for name, module in model.named_modules()}
    calls = _one_call_per_layer(model, trace, names)
    if not calls:
        raise ModelNotSupported(
            f"{type(model).__name__} has no attention layer: num_hidden_layers is less than 1{REMEDY}"
        )
    layers = tuple(_judge_call(call, names[id(call.module)], max_model_len) for call in calls)
    for layer in layers[1:]:
        if (layer.num_kv_heads, layer.head_dim) != (layers[0].num_kv_heads, layers[0].head_dim):
            raise ModelNotSupported(
                f"{layer.name} has {layer.num_kv_heads} KV heads of size {layer.head_dim}, {layers[0].name} has "
                f"{layers[0].num_kv_heads} of {layers[0].head_dim}: layers of different KV shapes are not "
                f"supported{REMEDY}"
            )
    if not trace.finite:
        raise ModelNotSupported(
            f"{type(model).__name__}: a probing forward in {next(model.parameters()).dtype} gave logits that are not "
            "finite; load it with a wider dtype (bfloat16 or float32)"
        )
    if trace.spread is not None:
        name, module = trace.spread
        raise ModelNotSupported(
            f"{name} ({type(module).__name__}) carries one token's values to another outside attention: such a state "
            f"is not kept between steps{REMEDY}"
        )
    if trace.misplaced is not None:
        module, how = trace.misplaced
        where = type(model).__name__ if module is None else f"{names[id(module)]} ({type(module).__name__})"
        raise ModelNotSupported(f"{where} {how}: rows of several texts cannot be computed together{REMEDY}")
    if trace.logits_shape[:2] != (1, len(SAMPLED_ROWS)):
        raise ModelNotSupported(
            f"{type(model).__name__}.forward does not keep to logits_to_keep: {len(SAMPLED_ROWS)} rows asked for, "
            f"logits of shape {trace.logits_shape} given{REMEDY}"
        )
    return Capabilities(layers, layers[0].num_kv_heads, layers[0].head_dim, trace.logits_shape[-1])


def why_own_attention(model: nn.Module) -> str:
    """The refusal of a model whose attention cannot be replaced."""
    culprit = _first_attention(model) or type(model).__name__
    return (
        f"{culprit} computes attention by itself, not through transformers' attention interface, so that its keys and "
        f"values cannot be kept between requests{REMEDY}"
    )


def why_it_failed(model: nn.Module, error: Exception) -> str:
    """The refusal of a model that raises `error` in a forward of a few tokens."""
    if isinstance(error, TypeError) and RECORDER in str(error):  # it hands nothing on to its attention
        return why_own_attention(model)
    told = str(error) or type(error).__name__
    return f"{where_it_failed(model, error)} fails on {NUM_ROWS} tokens: {told}{REMEDY}"


def _first_attention(model: nn.Module) -> str | None:
    """Name and class of the first module that is an attention layer by its name, the whole of it."""
    for name, module in model.named_modules():
        words = f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        if name and any(word in words for word in ("attn", "attention")) and list(module.children()):
            return f"{name} ({type(module).__name__})"
    return None


def _one_call_per_layer(model: nn.Module, trace: Trace, names: dict[int, str]) -> list[AttentionCall]:
    num_layers = model.config.get_text_config().num_hidden_layers
    by_layer: dict[int | None, list[AttentionCall]] = {}
    for call in trace.attention:
        by_layer.setdefault(call.layer, []).append(call)
    for layer in range(num_layers):
        if layer not in by_layer:
            raise ModelNotSupported(
                f"{_layer_module(model, layer)} does not compute attention through transformers' attention interface: "
                "its state (recurrent, convolutional, or keys and values of its own) cannot be kept in the paged KV "
                f"cache{REMEDY}"
            )
    for index, calls in by_layer.items():
        name = names[id(calls[0].module)]
        if index not in range(num_layers):
            raise ModelNotSupported(f"{name} has layer_idx {index}, outside the model's {num_layers} layers{REMEDY}")
        if len(calls) != 1:
            raise ModelNotSupported(
                f"{name} computed attention {len(calls)} times in one forward; once is supported{REMEDY}"
            )
    return [by_layer[layer][0] for layer in range(num_layers)]


def _judge_call(call: AttentionCall, name: str, max_model_len: int) -> AttentionLayer:
    where = f"{name} ({type(call.module).__name__})"
    if call.num_keys != NUM_ROWS:
        raise ModelNotSupported(
            f"{where} attends to {call.num_keys} keys of {NUM_ROWS} tokens: cross attention?{REMEDY}"
        )
    if call.head_dim < call.value_dim:
        raise ModelNotSupported(
            f"{where} has keys of size {call.head_dim} and values of size {call.value_dim}: values wider than keys are "
            f"not supported{REMEDY}"
        )
    if call.num_q_heads % call.num_kv_heads:
        raise ModelNotSupported(
            f"{where}: {call.num_q_heads} heads cannot share {call.num_kv_heads} KV heads evenly{REMEDY}"
        )
    for argument, value in call.kwargs.items():
        if argument in _HONOURED or argument in _HARMLESS or value is False:
            continue
        raise ModelNotSupported(f"{where} passes {argument!r} to attention, which is not supported{REMEDY}")
    if call.kwargs.get("is_causal", getattr(call.module, "is_causal", True)) is False:
        raise ModelNotSupported(
            f"{where} is not causal: it looks at tokens that come later. If the model was trained as a decoder, "
            f"set is_decoder to true in its config.json{OTHERWISE}"
        )
    window = call.kwargs.get("sliding_window")
    if window is None and call.mask is not None and not isinstance(call.mask, torch.Tensor):
        window = _window_of_mask(call.mask, max_model_len)
    _judge_mask(call, where, window, max_model_len)
    return AttentionLayer(
        name=name,
        num_q_heads=call.num_q_heads,
        num_kv_heads=call.num_kv_heads,
        head_dim=call.head_dim,
        sliding_window=window,
        softcap=call.kwargs.get("softcap"),
        has_sinks="s_aux" in call.kwargs,
    )


def _window_of_mask(mask: MaskFunction, max_model_len: int) -> int | None:
    """The window of a mask that is one: some models (PhiMoE) tell it to the mask alone, not to their attention."""
    last, zero = max_model_len - 1, torch.zeros((), dtype=torch.long)
    try:
        seen = int(torch.as_tensor(mask(zero, zero, torch.tensor([[last]]), torch.arange(last + 1)[None])).sum())
        return seen if 0 < seen <= last and _first_disagreement(mask, seen, max_model_len) is None else None
    except (IndexError, RuntimeError, TypeError):
        return None


def _judge_mask(call: AttentionCall, where: str, window: int | None, max_model_len: int) -> None:
    """Compare the mask the model asked for with the one the backend will apply, at positions up to the longest."""
    if call.mask is None:
        return
    if isinstance(call.mask, torch.Tensor):
        raise ModelNotSupported(
            f"{where} builds an attention mask of its own; only causal and window masks are served{REMEDY}"
        )
    try:
        found = _first_disagreement(call.mask, window, max_model_len)
    except (IndexError, RuntimeError, TypeError) as error:
        raise ModelNotSupported(
            f"{where}: its attention mask depends on more than positions ({error}){REMEDY}"
        ) from error
    if found is not None:
        kind = "causal" if window is None else f"causal with a window of {window}"
        raise ModelNotSupported(
            f"{where}: its attention mask is not {kind} (position {found[0]} looking at {found[1]}); other masks are "
            f"not supported{REMEDY}"
        )


def _first_disagreement(mask: MaskFunction, window: int | None, max_model_len: int) -> tuple[int, int] | None:
    """A query and a key position of which the mask does not say what a causal one says, with this window."""
    positions = torch.tensor(_telling_positions(window, max_model_len))
    q, kv = positions[:, None], positions[None, :]
    expected = kv <= q
    if window is not None:
        expected &= kv > q - window
    zero = torch.zeros((), dtype=torch.long)
    asked: Any = mask(zero, zero, q, kv)
    differs = torch.as_tensor(asked).expand(expected.shape) != expected
    if not bool(differs.any()):
        return None
    row, column = (int(i) for i in differs.nonzero()[0])
    return int(positions[row]), int(positions[column])


def _telling_positions(window: int | None, max_model_len: int) -> list[int]:
    """Small positions, powers of two and their neighbours, and those around the window."""
    around = [1 << i for i in range(max_model_len.bit_length() + 1)]
    if window is not None:
        around += [window, 2 * window, 3 * window]
    positions = {*range(NUM_ROWS), *(center + i for center in around for i in (-1, 0, 1)), max_model_len - 1}
    return sorted(p for p in positions if 0 <= p < max_model_len)


def _layer_module(model: nn.Module, layer: int) -> str:
    """Name and class of the part of a layer that should have called attention: its mixer, else the layer."""
    num_layers = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            for child_name, child in module[layer].named_children():
                if any(word in f"{child_name} {type(child).__name__}".lower() for word in _MIXERS):
                    return f"{name}.{layer}.{child_name} ({type(child).__name__})"
            return f"{name}.{layer} ({type(module[layer]).__name__})"
    return f"layer {layer} of {type(model).__name__}"


_MIXERS = ("attn", "attention", "mamba", "mixer", "ssm", "recurrent", "conv", "rwkv", "delta")
