"""One short forward of the loaded model that writes down what it does, instead of trusting its configuration.

Recorded: every call of the attention registry (which layer, which shapes, which arguments, under which mask), every
linear layer's input and row count, how far a poisoned row spreads, and what is done with each module from outside of
it. `capabilities.py` judges; `surgery.py` takes from it which modules are sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.pytorch_utils import Conv1D

from engine.model.watch import Use, watch
from engine.quant.linear import QuantLinear

PROBE_NAME = "chorus_probe"
RECORDER = "chorus_recorder"  # the keyword by which the recorder travels
NUM_ROWS = 13  # unlikely to be the number of rows that an expert gets
SAMPLED_ROWS = (2, 5, NUM_ROWS - 1)
POISONED_ROW = 6

MaskFunction = Callable[..., Any]  # (batch, head, query position, key position) -> visible


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """One call of the attention function."""

    module: nn.Module
    layer: int | None
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    num_keys: int
    kwargs: dict[str, Any]  # without those that are None
    mask: MaskFunction | torch.Tensor | None
    rotated: tuple[torch.Tensor, torch.Tensor] | None = None  # queries and keys, [1, heads, rows, D]


@dataclass(slots=True)
class Trace:
    """What one forward did."""

    attention: list[AttentionCall] = field(default_factory=list)
    inputs: dict[str, list[torch.Tensor]] = field(default_factory=dict)  # site candidate -> input of each call
    spread: tuple[str, nn.Module] | None = None  # first module through which one row reached another
    logits_shape: tuple[int, ...] = ()
    finite: bool = False  # of all logits, unpoisoned
    misplaced: tuple[nn.Module | None, str] | None = None  # first attention that goes by other positions, and by which
    uses: dict[str, Use] = field(default_factory=dict)  # by name, of every module below the root


class _Recorder:
    """Travels through the forward as a keyword argument, like the backend does in service."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.masks: dict[int, tuple[torch.Tensor, MaskFunction]] = {}  # id -> the tensor, kept alive, and its rule

    def attend(
        self,
        module: nn.Module,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        rule: MaskFunction | torch.Tensor | None = mask
        if mask is not None and id(mask) in self.masks:
            rule = self.masks[id(mask)][1]
        self.trace.attention.append(
            AttentionCall(
                module=module,
                layer=getattr(module, "layer_idx", None),
                num_q_heads=q.shape[1],
                num_kv_heads=k.shape[1],
                head_dim=k.shape[3],
                value_dim=v.shape[3],
                num_keys=k.shape[2],
                kwargs={name: value for name, value in kwargs.items() if value is not None},
                mask=rule,
                rotated=(q.clone(), k.clone()),
            )
        )
        # Each row attends to itself alone: in this forward no row can reach another, unless the model sees to it.
        return v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)[:, :, : q.shape[2]].transpose(1, 2).contiguous()


def _probe_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    chorus_recorder: _Recorder,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    return chorus_recorder.attend(module, query, key, value, attention_mask, kwargs), None


def _probe_mask(*, mask_function: MaskFunction, config: Any, device: torch.device, **_: Any) -> torch.Tensor:
    """Returns a token of the mask: the rule is asked later, at positions far beyond the probe's few rows."""
    recorder: _Recorder = config._chorus_recorder
    token = torch.zeros((1, 1, NUM_ROWS, NUM_ROWS), device=device)
    recorder.masks[id(token)] = (token, mask_function)
    return token


AttentionInterface.register(PROBE_NAME, _probe_attention)
AttentionMaskInterface.register(PROBE_NAME, _probe_mask)


def probe(model: nn.Module) -> Trace:
    """Run the model on 13 rows, again with one poisoned row, with other positions and under watch: what was seen.

    Raises: whatever the model raises; the caller turns it into a refusal.
    """
    trace = Trace()
    with torch.inference_mode():
        with _recording(model, trace) as recorder, _hooks(_input_hooks(model, trace)):
            logits = _forward(model, recorder)
        trace.logits_shape = tuple(logits.shape)
        trace.finite = bool(torch.isfinite(logits).all())
        if trace.finite:
            with _recording(model, Trace()) as recorder, _hooks(_poison_hooks(model, trace)):
                _forward(model, recorder)
            trace.misplaced = _find_misplaced(model, trace, logits)
        with _recording(model, Trace()) as recorder:
            trace.uses = watch(model, lambda: _forward(model, recorder))
    return trace


def _find_misplaced(model: nn.Module, trace: Trace, logits: torch.Tensor) -> tuple[nn.Module | None, str] | None:
    """Whether a row depends on its position id alone, and positions count from 0 as the model counts by itself.

    Steps hold rows of several sequences: a model that numbers rows as they lie would place most of them wrongly.
    """
    with _recording(model, counted := Trace()) as recorder:
        try:
            own = _forward(model, recorder, positions=None)
        except Exception:  # it cannot do without
            own, counted = logits, trace
    if (found := _first_difference(zip(trace.attention, counted.attention, strict=False), logits, own)) is not None:
        return found[0], "counts positions otherwise than 0, 1, 2, ..."
    half = NUM_ROWS // 2
    rows = tuple(i % half for i in range(NUM_ROWS))
    with _recording(model, repeated := Trace()) as recorder:
        twice = _forward(model, recorder, rows=rows, positions=rows, sampled=(2, 2 + half))

    def halves(call: AttentionCall) -> tuple[AttentionCall, AttentionCall]:
        assert call.rotated is not None
        first, second = (
            replace(call, rotated=(call.rotated[0][:, :, part], call.rotated[1][:, :, part]))
            for part in (slice(0, half), slice(half, 2 * half))
        )
        return first, second

    found = _first_difference(map(halves, repeated.attention), twice[:, :1], twice[:, 1:2])
    return None if found is None else (found[0], "places rows by where they lie in a batch, not by their position ids")


def _first_difference(
    calls: Iterable[tuple[AttentionCall, AttentionCall]], logits: torch.Tensor, others: torch.Tensor
) -> tuple[nn.Module | None] | None:
    for one, other in calls:
        assert one.rotated is not None
        assert other.rotated is not None
        if not all(_alike(x, y) for x, y in zip(one.rotated, other.rotated, strict=True)):
            return (one.module,)
    return None if _alike(logits, others) else (None,)


def _alike(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x.shape != y.shape:
        return False
    tolerance = 1e-3 if x.dtype is torch.float32 else 2**-4
    return bool((x.float() - y.float()).abs().max() <= tolerance * x.float().abs().max())


_IN_ORDER = tuple(range(NUM_ROWS))


def _forward(
    model: nn.Module,
    recorder: _Recorder,
    *,
    rows: tuple[int, ...] = _IN_ORDER,
    positions: tuple[int, ...] | None = _IN_ORDER,
    sampled: tuple[int, ...] = SAMPLED_ROWS,
) -> torch.Tensor:
    """Logits of the `sampled` of the tokens `rows`. `positions` None: as the model counts by itself."""
    device = next(model.parameters()).device
    ids = torch.tensor(rows, device=device) % model.config.get_text_config().vocab_size
    output = model(
        input_ids=ids[None],
        **({} if positions is None else {"position_ids": torch.tensor(positions, device=device)[None]}),
        use_cache=False,
        logits_to_keep=torch.tensor(sampled, device=device),
        **{RECORDER: recorder},
    )
    return output.logits


@contextmanager
def _recording(model: nn.Module, trace: Trace) -> Iterator[_Recorder]:
    """Switch the model to the probe's functions for one forward."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = model.config._attn_implementation
    recorder = _Recorder(trace)
    model.config._attn_implementation = PROBE_NAME
    for config in configs:
        # The mask function is given the config and nothing else of ours.
        config._chorus_recorder = recorder
    try:
        yield recorder
    finally:
        model.config._attn_implementation = before
        for config in configs:
            del config._chorus_recorder


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_hooks(model: nn.Module, trace: Trace) -> list[Any]:
    def record(name: str) -> Callable[..., None]:
        return lambda _module, args: trace.inputs.setdefault(name, []).append(args[0])

    return [
        module.register_forward_pre_hook(record(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | QuantLinear | nn.Embedding)
    ]


def _poison_hooks(model: nn.Module, trace: Trace) -> list[Any]:
    """NaN in one row of the input embeddings; watch for NaN in any other row of any module's output."""

    def poison(_module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, POISONED_ROW] = float("nan")
        return output

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, _args: Any, output: Any) -> None:
            if trace.spread is None and _reaches_other_rows(output):
                trace.spread = (name, module)

        return look

    embeddings = model.get_input_embeddings()
    handles = [embeddings.register_forward_hook(poison)]
    handles += [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n and m is not embeddings]
    return handles


def _reaches_other_rows(output: Any) -> bool:
    if isinstance(output, tuple | list):
        return any(_reaches_other_rows(item) for item in output)
    if not isinstance(output, torch.Tensor) or not output.is_floating_point():
        return False
    if output.dim() < 2 or output.shape[0] != 1 or output.shape[1] != NUM_ROWS:
        return False  # not laid out by rows: an inner view, a router's choice, the sampled rows
    bad = ~torch.isfinite(output).flatten(2).all(-1)[0]
    bad[POISONED_ROW] = False
    return bool(bad.any())
