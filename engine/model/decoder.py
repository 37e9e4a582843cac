"""Decoder layers of the Llama kind (Llama, Mistral, Qwen 2 and 3, ...), found in a model and swapped for faster ones.

transformers runs such a layer as some fifty operations; on small batches their launching takes longer than their
arithmetic. A layer is recognised by its parts and accepted by its numbers: the model runs once as it came, and a
compiled layer must give the output of its original on the original's input. One that does not stays as it is.
Quantized layers that round their inputs do not while they are tried: two sums that differ in their last bit are rounded
to two steps, an eighth apart in FP8, and so much must not be forgiven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from engine.image_spec import LinearSite
from engine.kv.backend import AttentionBackend, AttentionInputs, LayerCall
from engine.model.attention import inner_model
from engine.model.watch import Use
from engine.quant.linear import QuantLinear

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_LINEARS = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {
    "input_norm": "input_layernorm",
    "post_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
_TRIAL_TOKENS = 20
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2**-8, torch.bfloat16: 2**-5}
_FIXED_POINT = 2**-12  # inputs of integer codes may be multiplied as 16-bit numbers


@dataclass(slots=True)
class _Observed:
    """What one layer was given and gave in the trial run."""

    name: str
    hidden: Tensor
    arguments: Mapping[str, Any]
    output: Any
    call: LayerCall | None  # of its attention
    num_heads: int  # query heads


class Norm(NamedTuple):
    weight: Tensor
    eps: float


@dataclass(slots=True)
class LayerParts:
    """A layer of the Llama kind, taken apart, by the keys of _LINEARS and _NORMS."""

    call: LayerCall  # of its attention
    num_heads: int  # query heads
    rotary_dims: int  # of a head
    dtype: torch.dtype  # of all weights and of the hidden states
    linears: dict[str, nn.Linear | QuantLinear]
    sites: dict[str, int]  # of the linears
    norms: dict[str, Norm]  # those there are


class CompiledLayer(Protocol):
    @property
    def shape(self) -> tuple[int, ...]:
        """Neighbours can be run together if this is the same."""
        ...


Compiled = TypeVar("Compiled", bound=CompiledLayer)


class ComputedBefore(nn.Module):
    """In the place of a layer that the run of layers before it has computed: the others keep their names."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def swap_decoder(
    model: nn.Module,
    sites: tuple[LinearSite, ...],
    backend: AttentionBackend,
    run: Callable[[AttentionInputs], Any],
    *,
    compile_one: Callable[[LayerParts], Compiled | None],
    make_run: Callable[[list[Compiled], Tensor], nn.Module],
    uses: Mapping[str, Use] | None = None,
) -> set[int]:
    """Swap runs of layers for one module each. Returns: the indices of the sites they hold.

    `run(inputs)` is a forward of the model over `backend`, whose blocks 1 and 2 it may write. `make_run` makes the
    module of neighbours, given hidden states as an example; it is called as a layer is, and has the last one's output.
    `uses`: what the model reads of a layer (how its attention is masked, say) is still there afterwards.
    """
    layers = getattr(inner_model(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return set()
    prefix = next(name for name, module in model.named_modules() if module is layers)
    inputs = _trial_inputs(backend)
    with inputs_kept(layers):
        seen = _observe(prefix, layers, backend, lambda: run(inputs))
    site_of = {site.name: site.index for site in sites}
    accepted: list[Compiled | None] = []
    done: set[int] = set()
    labels = [_labels(layer, None if uses is None else uses.get(f"{prefix}.{i}")) for i, layer in enumerate(layers)]
    for i, observed in enumerate(seen):
        parts = _take_apart(observed, layers[i], site_of)
        if parts is None or labels[i] is None:
            accepted.append(None)
            continue
        with inputs_kept(layers[i]) as num_rounded:
            one = compile_one(parts)
            if one is not None and not _agrees(make_run([one], observed.hidden), observed, backend, inputs, parts):
                one = None
        if one is not None and num_rounded:
            del one  # before its weights are packed again, with their rounding
            one = compile_one(parts)
        accepted.append(one)
        if one is None:
            continue
        done |= set(parts.sites.values())
        del parts
        layers[i] = ComputedBefore()  # its own weights go before the next one's are packed
    for first, members in _runs(seen, accepted):
        layers[first] = make_run(members, seen[first].hidden)
    for layer, one, known in zip(layers, accepted, labels, strict=False):
        if one is not None:
            vars(layer).update(known or {})
    return done


def _labels(layer: nn.Module, use: Use | None) -> dict[str, Any] | None:
    """What the model reads of a layer, if it is plain data that something in the layer's place can have too."""
    values = {} if use is None else {name: getattr(layer, name) for name in use.reads}
    return values if all(isinstance(value, str | int | float | None) for value in values.values()) else None


def _runs(seen: list[_Observed], accepted: list[Compiled | None]) -> Iterator[tuple[int, list[Compiled]]]:
    """Neighbours that were accepted and are rotated alike: the index of the first, and all of them."""
    run: list[Compiled] = []
    for i, one in enumerate(accepted):
        if one is None:
            continue
        run.append(one)
        following = accepted[i + 1] if i + 1 < len(accepted) else None
        if following is None or not _rotated_alike(seen[i], seen[i + 1]) or following.shape != one.shape:
            yield i + 1 - len(run), run
            run = []


def num_trial_blocks(block_size: int) -> int:
    """Blocks of the cache that a trial run needs, the null block included."""
    return 1 + -(-_TRIAL_TOKENS // block_size)


def _trial_inputs(backend: AttentionBackend) -> AttentionInputs:
    """One sequence of _TRIAL_TOKENS rows, in blocks 1, 2, ..."""
    size, device = backend.storage.shape.block_size, backend.storage.data.device
    return AttentionInputs(
        slot_mapping=torch.arange(size, size + _TRIAL_TOKENS, device=device),
        block_tables=torch.arange(1, num_trial_blocks(size), device=device)[None],
        query_starts=(0, _TRIAL_TOKENS),
        context_lengths=(_TRIAL_TOKENS,),
    )


def _observe(prefix: str, layers: nn.ModuleList, backend: AttentionBackend, run: Callable[[], Any]) -> list[_Observed]:
    seen: list[_Observed] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
            seen.append(_Observed(f"{prefix}.{len(seen)}", hidden, kwargs, output, *calls[-1]))
        called.append(module)

    calls: list[tuple[LayerCall | None, int]] = [(None, 0)]
    called: list[nn.Module] = []
    original = backend.run

    def recording(q: Tensor, k: Tensor, v: Tensor, layer: LayerCall) -> Tensor:
        calls.append((layer, q.shape[1]))
        return original(q, k, v, layer)

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    backend.run = recording  # type: ignore[method-assign]
    try:
        run()
    finally:
        del backend.run
        for hook in hooks:
            hook.remove()
    return (
        seen if called == list(layers) and len(seen) == len(called) else []
    )  # one that is called twice, or not, is nothing for the kernel


def _rotated_alike(a: _Observed, b: _Observed) -> bool:
    return a.arguments["position_embeddings"] is b.arguments["position_embeddings"]


def _take_apart(observed: _Observed, module: nn.Module, site_of: Mapping[str, int]) -> LayerParts | None:
    """None: it has other parts, or uses them otherwise, than a layer of the Llama kind."""
    call = observed.call
    if {name for name, _ in module.named_children()} != _PARTS or call is None:
        return None
    if call.softcap is not None or call.sinks is not None or not _is_rotation(observed):
        return None
    known = {*_LINEARS.values(), *_NORMS.values()}
    leaves = {name for name, part in module.named_modules() if _holds_weights(part)}
    linears = {key: _get(module, name) for key, name in _LINEARS.items()}
    norms = {key: _norm(norm) for key, name in _NORMS.items() if (norm := _get(module, name)) is not None}
    if any(norm is None for norm in norms.values()):
        return None
    if getattr(linears["k"], "out_features", 0) != getattr(linears["v"], "out_features", 0):
        return None  # values are narrower than keys
    if leaves - known or not all(type(linear) in (nn.Linear, QuantLinear) for linear in linears.values()):
        return None
    sites = {key: site_of.get(f"{observed.name}.{name}", -1) for key, name in _LINEARS.items()}
    if "input_norm" not in norms or "post_norm" not in norms or min(sites.values()) < 0:
        return None
    dtype = observed.hidden.dtype
    if any(p.dtype is not dtype for p in module.parameters()):
        return None
    rotary_dims = observed.arguments["position_embeddings"][0].shape[-1]
    named = {key: norm for key, norm in norms.items() if norm is not None}
    return LayerParts(call, observed.num_heads, rotary_dims, dtype, linears, sites, named)


def _is_rotation(observed: _Observed) -> bool:
    """Whether the layer was given a cosine and a sine: others are given complex numbers, or nothing."""
    given = observed.arguments.get("position_embeddings")
    return isinstance(given, tuple | list) and len(given) == 2 and all(isinstance(x, Tensor) for x in given)


def _holds_weights(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear) or next(module.parameters(recurse=False), None) is not None


def _norm(norm: nn.Module) -> Norm | None:
    """None: it has no weight per feature (OLMo's and NanoChat's have none)."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1:
        return None
    return Norm(weight, float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)) or 0.0))


def _get(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        module = getattr(module, part, None)
        if module is None:
            return None
    return module


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


def _agrees(
    compiled: nn.Module, observed: _Observed, backend: AttentionBackend, inputs: AttentionInputs, parts: LayerParts
) -> bool:
    expected, dtype = observed.output, observed.hidden.dtype
    if not isinstance(expected, Tensor) or backend.storage.shape.dtype is not dtype:
        return False
    backend.plan(inputs)
    cos, sin = observed.arguments["position_embeddings"]
    got = compiled(observed.hidden, position_embeddings=(cos, sin), attention_backend=backend)
    change = (expected - observed.hidden).float()  # what the layer adds: beside the whole stream an error looks small
    error = (got - expected).float().abs().max()
    weights = [linear.quantized for linear in parts.linears.values() if isinstance(linear, QuantLinear)]
    fixed = any(weight.kind in ("int4", "int8") for weight in weights)
    tolerance = max(_TOLERANCE[dtype], _FIXED_POINT if fixed else 0.0)
    limit = tolerance * change.abs().max() + torch.finfo(dtype).eps * 2 * expected.abs().max()
    return bool(error <= limit)
