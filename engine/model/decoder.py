"""Decoder layers of the Llama kind (Llama, Mistral, Qwen 2 and 3, ...) in one call of a compiled kernel.

transformers runs such a layer as some fifty operations; on small batches their launching takes longer than their
arithmetic. A layer is recognised by its parts and accepted by its numbers: the model runs once as it came, and a
compiled layer must give the output of its original on the original's input. One that does not stays as it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from engine.kv.backend import AttentionInputs, LayerCall
from engine.kv.native_cpu import NativeAttention
from engine.lora.native_cpu import NativeLora
from engine.native.library import SUPPORTED_DTYPES, NativeLibrary, check
from engine.native.structs import Decoder, DecoderLayer, Member
from engine.site import LinearSite

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
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-5}


@dataclass(slots=True)
class Observed:
    """What one layer was given and gave in the trial run."""

    name: str
    hidden: Tensor
    arguments: Mapping[str, Any]
    output: Any
    call: LayerCall | None  # of its attention
    num_heads: int  # query heads


@dataclass(slots=True)
class _Compiled:
    """A layer as the kernel reads it, and what must live as long."""

    layer: DecoderLayer
    shape: tuple[int, int]  # query heads, intermediate
    sites: list[int]
    tensors: list[Tensor] = field(default_factory=list)


class NativeDecoder(nn.Module):
    """A run of layers. Shapes: hidden_states [1, T, hidden]; position_embeddings cos and sin [1, T, rotary dims]."""

    def __init__(
        self, library: NativeLibrary, compiled: list[_Compiled], lora: NativeLora | None, hidden_states: Tensor
    ) -> None:
        """`hidden_states`: an example, for its width and dtype."""
        super().__init__()
        self._library = library
        self._lora = lora
        self._dtype = hidden_states.dtype
        self._compiled = compiled
        self._layers = (DecoderLayer * len(compiled))(*(c.layer for c in compiled))
        self._decoder = Decoder(
            layers=ctypes.addressof(self._layers),
            num_layers=len(compiled),
            hidden=hidden_states.shape[-1],
            intermediate=compiled[0].shape[1],
            num_heads=compiled[0].shape[0],
            is_bf16=self._dtype is torch.bfloat16,
        )

    def forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor],
        attention_backend: NativeAttention,
        **__: Any,
    ) -> Tensor:
        hidden = hidden_states.contiguous()
        cos, sin = (x.to(self._dtype).contiguous() for x in position_embeddings)
        output = torch.empty_like(hidden)
        rows = attention_backend.rows(self._decoder.num_heads)
        self._decoder.rotary_dims = cos.shape[-1]
        address, count = None, 0
        if self._lora is not None:
            self._lora.rows.check_rows(rows.num_rows)
            address, count = self._lora.rows.address, self._lora.rows.count
        status = self._library.decoder(
            ctypes.byref(self._decoder),
            hidden.data_ptr(),
            output.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            ctypes.byref(attention_backend.cache),
            ctypes.byref(rows),
            address,
            count,
        )
        check(status, f"{rows.num_rows} rows of the decoder")
        return output

    def extra_repr(self) -> str:
        return f"layers={len(self._compiled)}"


class ComputedBefore(nn.Module):
    """In the place of a layer that the NativeDecoder before it has computed: the others keep their names."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def compile_decoder(
    model: nn.Module,
    sites: tuple[LinearSite, ...],
    library: NativeLibrary,
    lora: NativeLora | None,
    backend: NativeAttention,
    run: Callable[[AttentionInputs], Any],
) -> set[int]:
    """Swap the layers that the kernel can compute. Returns: the indices of the sites they hold.

    `run(inputs)` is a forward of the model over `backend`, whose blocks 1 and 2 it may write.
    """
    inner = getattr(model, model.base_model_prefix, None)
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return set()
    prefix = next(name for name, module in model.named_modules() if module is layers)
    inputs = _trial_inputs(backend)
    seen = _observe(prefix, layers, backend, lambda: run(inputs))
    site_of = {site.name: site.index for site in sites}
    accepted: list[_Compiled | None] = []
    for i, observed in enumerate(seen):
        one = _compile(observed, layers[i], site_of, library, lora)
        accepted.append(one if one is not None and _agrees(one, observed, library, backend, inputs) else None)
        if accepted[-1] is not None:
            layers[i] = ComputedBefore()  # its own weights go before the next one's are packed
    for first, members in _runs(seen, accepted):
        layers[first] = NativeDecoder(library, members, lora, seen[first].hidden)
    return {site for one in accepted if one is not None for site in one.sites}


def _runs(seen: list[Observed], accepted: list[_Compiled | None]) -> Iterator[tuple[int, list[_Compiled]]]:
    """Neighbours that were accepted and are rotated alike: the index of the first, and all of them."""
    run: list[_Compiled] = []
    for i, one in enumerate(accepted):
        if one is None:
            continue
        run.append(one)
        following = accepted[i + 1] if i + 1 < len(accepted) else None
        if following is None or not _rotated_alike(seen[i], seen[i + 1]) or following.shape != one.shape:
            yield i + 1 - len(run), run
            run = []


def _trial_inputs(backend: NativeAttention) -> AttentionInputs:
    """One sequence of _TRIAL_TOKENS rows, in blocks 1, 2, ..."""
    size = backend.storage.shape.block_size
    num_blocks = -(-_TRIAL_TOKENS // size)
    return AttentionInputs(
        slot_mapping=torch.arange(size, size + _TRIAL_TOKENS),
        block_tables=torch.arange(1, 1 + num_blocks)[None],
        cu_seqlens=torch.tensor([0, _TRIAL_TOKENS], dtype=torch.int32),
        context_lens=torch.tensor([_TRIAL_TOKENS], dtype=torch.int32),
        query_starts=(0, _TRIAL_TOKENS),
        context_lengths=(_TRIAL_TOKENS,),
    )


def _observe(prefix: str, layers: nn.ModuleList, backend: NativeAttention, run: Callable[[], Any]) -> list[Observed]:
    seen: list[Observed] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(Observed(f"{prefix}.{len(seen)}", hidden, kwargs, output, *calls[-1]))
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
    return seen if called == list(layers) else []  # one that is called twice, or not, is nothing for the kernel


def _rotated_alike(a: Observed, b: Observed) -> bool:
    return a.arguments["position_embeddings"] is b.arguments["position_embeddings"]


def _compile(
    observed: Observed,
    module: nn.Module,
    site_of: Mapping[str, int],
    library: NativeLibrary,
    lora: NativeLora | None,
) -> _Compiled | None:
    """The layer for the kernel, or None if it has other parts than the kernel knows."""
    call = observed.call
    if {name for name, _ in module.named_children()} != _PARTS or call is None:
        return None
    if call.softcap is not None or call.sinks is not None or "position_embeddings" not in observed.arguments:
        return None
    known = {*_LINEARS.values(), *_NORMS.values()}
    leaves = {name for name, part in module.named_modules() if next(part.parameters(recurse=False), None) is not None}
    linears = {key: _get(module, name) for key, name in _LINEARS.items()}
    norms = {key: _get(module, name) for key, name in _NORMS.items()}
    if leaves - known or not all(type(linear) is nn.Linear for linear in linears.values()):
        return None
    if norms["input_norm"] is None or norms["post_norm"] is None:
        return None
    if any(f"{observed.name}.{name}" not in site_of for name in _LINEARS.values()):
        return None
    dtype = observed.hidden.dtype
    if dtype not in SUPPORTED_DTYPES or any(p.dtype is not dtype for p in module.parameters()):
        return None
    return _fill(observed, call, linears, norms, site_of, library, lora)


def _fill(
    observed: Observed,
    call: LayerCall,
    linears: Mapping[str, Any],
    norms: Mapping[str, Any],
    site_of: Mapping[str, int],
    library: NativeLibrary,
    lora: NativeLora | None,
) -> _Compiled | None:
    q_width, hidden, intermediate = linears["q"].out_features, linears["q"].in_features, linears["gate"].out_features
    if hidden % 2 or q_width % 2 or intermediate % 2:
        return None
    layer = DecoderLayer(index=call.index, window=call.sliding_window or 0, scaling=call.scaling)
    one = _Compiled(layer, (observed.num_heads, intermediate), [])
    for key, linear in linears.items():
        site = site_of[f"{observed.name}.{_LINEARS[key]}"]
        weight, bias = library.pack(linear.weight), linear.bias
        table = None if lora is None else lora.table_address(site)
        address = None if bias is None else bias.data_ptr()
        setattr(layer, key, Member(weight.data_ptr(), address, linear.out_features, None, table))
        one.tensors += [weight] if bias is None else [weight, bias]
        one.sites.append(site)
    for key, norm in norms.items():
        if norm is not None:
            setattr(layer, key, norm.weight.data_ptr())
            one.tensors.append(norm.weight)
            eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 0.0)) or 0.0)
            setattr(layer, "head_norm_eps" if key in ("q_norm", "k_norm") else "norm_eps", eps)
    return one


def _get(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        module = getattr(module, part, None)
        if module is None:
            return None
    return module


def _agrees(
    one: _Compiled, observed: Observed, library: NativeLibrary, backend: NativeAttention, inputs: AttentionInputs
) -> bool:
    expected, dtype = observed.output, observed.hidden.dtype
    if not isinstance(expected, Tensor) or backend.storage.shape.dtype is not dtype:
        return False
    backend.plan(inputs)
    decoder = NativeDecoder(library, [one], None, observed.hidden)
    cos, sin = observed.arguments["position_embeddings"]
    got = decoder(observed.hidden, position_embeddings=(cos, sin), attention_backend=backend)
    change = (expected - observed.hidden).float()  # what the layer adds: beside the whole stream an error looks small
    error = (got - expected).float().abs().max()
    limit = _TOLERANCE[dtype] * change.abs().max() + torch.finfo(dtype).eps * 2 * expected.abs().max()
    return bool(error <= limit)
