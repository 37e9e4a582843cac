"""Decoder layers of the Llama kind (Llama, Mistral, Qwen 2 and 3, ...), found in a model and swapped for faster ones.

transformers runs such a layer as some fifty operations; on small batches their launching takes longer than their
arithmetic. A layer is recognised by its parts and accepted by its numbers: the model runs once as it came, and a
compiled layer must give the output of its original on rows made for the purpose (`trial.py`), in float32 and in the
model's dtype. One that does not stays as it is.
Quantized layers that round their inputs do not while they are tried: two sums that differ in their last bit are rounded
to two steps, an eighth apart in FP8, and so much must not be forgiven.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from engine.image_spec import LinearSite
from engine.kv.backend import AttentionBackend, LayerCall
from engine.model.attention import inner_model
from engine.model.llama_layer import NORMS, LayerParts, Observed, part_of, rotated_alike, take_apart
from engine.model.trial import (
    Bench,
    craft,
    in_float32,
    inputs_kept,
    is_rms_norm,
    largest_output,
    magnitude,
    muted,
    widened,
)
from engine.model.watch import Use
from engine.quant.linear import QuantLinear

# Shares of what a product's terms add up to: float32 rounds at 2^-24, and sums and softmax make some of that.
_EXACT = 2**-15
_FIXED_POINT = 2**-11  # inputs of integer codes may be multiplied as 16-bit numbers, in each of four products
_OWN = {torch.float32: _EXACT, torch.float16: 2**-6, torch.bfloat16: 2**-4}


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


class Maker(Protocol[Compiled]):
    """What makes compiled layers. `with_lora`: that adapters can be bound to; else the base alone."""

    def compile(self, parts: LayerParts, *, with_lora: bool) -> Compiled | None:
        """None: it cannot compute this layer."""
        ...

    def join(self, members: list[Compiled], hidden: Tensor, *, with_lora: bool) -> nn.Module:
        """One module for neighbours, called as a layer is, with the last one's output. `hidden`: states, an example."""
        ...


def swap_decoder(
    model: nn.Module,
    sites: tuple[LinearSite, ...],
    bench: Bench,
    maker: Maker[Any],
    uses: Mapping[str, Use] | None = None,
) -> set[int]:
    """Swap runs of layers for one module each. Returns: the indices of the sites they hold.

    `uses`: what the model reads of a layer (how its attention is masked, say) is still there afterwards.
    """
    layers = getattr(inner_model(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return set()
    prefix = next(name for name, module in model.named_modules() if module is layers)
    with inputs_kept(layers):
        seen = _observe(prefix, layers, bench)
    site_of = {site.name: site.index for site in sites}
    accepted: list[Any] = []
    done: set[int] = set()
    labels = [_labels(layer, None if uses is None else uses.get(f"{prefix}.{i}")) for i, layer in enumerate(layers)]
    for i, observed in enumerate(seen):
        one, held = None, set[int]()
        if labels[i] is not None:
            one, held = _try_layer(observed, layers[i], site_of, bench, maker)
        accepted.append(one)
        if one is None:
            continue
        done |= held
        layers[i] = ComputedBefore()  # its own weights go before the next one's are packed
    for first, members in _runs(seen, accepted):
        layers[first] = maker.join(members, seen[first].hidden, with_lora=True)
    for layer, one, known in zip(layers, accepted, labels, strict=False):
        if one is not None:
            vars(layer).update(known or {})
    return done


def _labels(layer: nn.Module, use: Use | None) -> dict[str, Any] | None:
    """What the model reads of a layer, if it is plain data that something in the layer's place can have too."""
    values = {} if use is None else {name: getattr(layer, name) for name in use.reads}
    return values if all(isinstance(value, str | int | float | None) for value in values.values()) else None


def _try_layer(
    observed: Observed, layer: nn.Module, site_of: Mapping[str, int], bench: Bench, maker: Maker[Any]
) -> tuple[Any, set[int]]:
    """The compiled layer, and the sites it holds; None: there is none that does what the layer does."""
    parts = take_apart(observed, layer, site_of)
    if parts is None:
        return None, set()
    with inputs_kept(layer) as num_rounded:
        expected = _try_exactly(observed, layer, site_of, bench, maker)
        if expected is None:
            return None, set()
        one = maker.compile(parts, with_lora=True)
        if one is None:
            return None, set()
        hidden = expected.hidden.to(parts.dtype)
        arguments = observed.arguments
        got = _run(maker.join([one], hidden, with_lora=True), hidden, arguments, bench.own, bench)
        if not expected.agrees(got, max(_OWN[parts.dtype], expected.tolerance)):
            return None, set()
    if num_rounded:
        del one  # before its weights are packed again, with their rounding
        one = maker.compile(parts, with_lora=True)
    return one, set(parts.sites.values())


@dataclass(slots=True)
class _Expected:
    """What a layer gives in float32, and how far off a right one may be."""

    hidden: Tensor
    output: Tensor
    terms: Tensor  # what the terms of the sums that end in the output add up to without signs, [1, T, H]
    tolerance: float  # as a share of `terms`

    def agrees(self, got: Tensor, tolerance: float) -> bool:
        """Element by element; but not those that the dtype cannot hold on the way."""
        limits = torch.finfo(got.dtype)
        rounding = 4 * limits.eps * (self.hidden.abs() + self.output.abs())
        held = self.terms.amax(dim=-1, keepdim=True) <= limits.max / 64
        within = (got.float() - self.output).abs() <= tolerance * self.terms + rounding
        return bool((within | ~held).all())


def _try_exactly(
    observed: Observed, layer: nn.Module, site_of: Mapping[str, int], bench: Bench, maker: Maker[Any]
) -> _Expected | None:
    """Everything in float32, the compiled layer too; None: it does not do what the layer does."""
    arguments = in_float32(observed.arguments)
    with widened(layer):
        wide = replace(observed, hidden=observed.hidden.float(), output=observed.output.float())
        parts = take_apart(wide, layer, site_of)
        if parts is None or not _norms_are_known(layer, parts):
            return None
        hidden = craft(observed.hidden, bench.trial, _directions(parts))
        if any(parts.linears[key].bias is not None for key in ("q", "k", "v", "o")):
            with muted(parts.linears["o"]):  # beside biases nothing that the second norm is given would be small
                if _twin_agrees(layer, parts, hidden, arguments, bench, maker) is None:
                    return None
        return _twin_agrees(layer, parts, hidden, arguments, bench, maker)


def _twin_agrees(
    layer: nn.Module, parts: LayerParts, hidden: Tensor, arguments: Mapping[str, Any], bench: Bench, maker: Maker[Any]
) -> _Expected | None:
    expected = _expect(layer, parts, hidden, arguments, bench)
    twin = None if expected is None else maker.compile(parts, with_lora=False)
    if expected is None or twin is None:
        return None
    got = _run(maker.join([twin], hidden, with_lora=False), hidden, arguments, bench.exact, bench)
    return expected if expected.agrees(got, expected.tolerance) else None


def _expect(
    layer: nn.Module, parts: LayerParts, hidden: Tensor, arguments: Mapping[str, Any], bench: Bench
) -> _Expected | None:
    """None: the layer does not use its parts as one of the Llama kind does."""
    ends: dict[str, list[Tensor]] = {"o": [], "down": []}
    hooks = [parts.linears[key].register_forward_pre_hook(_keep_input(into)) for key, into in ends.items()]
    try:
        output = _run(layer, hidden, arguments, bench.exact, bench)
    finally:
        for hook in hooks:
            hook.remove()
    if any(len(inputs) != 1 for inputs in ends.values()) or not bool(output.isfinite().all()):
        return None
    weights = [linear.quantized for linear in parts.linears.values() if isinstance(linear, QuantLinear)]
    fixed = any(weight.kind in ("int4", "int8") for weight in weights)
    of_o, of_down = (magnitude(parts.linears[key], ends[key][0], fixed_point=fixed) for key in ends)
    terms = of_o.view_as(output) + of_down.view_as(output)
    return _Expected(hidden, output, terms, _FIXED_POINT if fixed else _EXACT)


def _keep_input(into: list[Tensor]) -> Callable[..., None]:
    return lambda _module, args: into.append(args[0])


def _run(
    layer: nn.Module, hidden: Tensor, arguments: Mapping[str, Any], backend: AttentionBackend, bench: Bench
) -> Tensor:
    backend.plan(bench.trial.inputs)
    output: Tensor = layer(hidden, **{**arguments, "attention_backend": backend})
    return output


def _norms_are_known(layer: nn.Module, parts: LayerParts) -> bool:
    """Whether each norm is what the kernels compute: an eps counts in rows that a whole layer may never see."""
    modules = {key: part_of(layer, NORMS[key]) for key in parts.norms}
    return all(
        module is not None and is_rms_norm(module, parts.norms[key].weight, parts.norms[key].eps)
        for key, module in modules.items()
    )


def _directions(parts: LayerParts) -> list[Tensor]:
    """Rows for the largest outputs: of attention's products by one norm, of the MLP's by the other."""
    largest = [largest_output(parts.linears[key], parts.norms["input_norm"].weight) for key in ("q", "k", "v")]
    gate, up = (largest_output(parts.linears[key], parts.norms["post_norm"].weight) for key in ("gate", "up"))
    return [*largest, gate, -gate, up]


def _runs(seen: list[Observed], accepted: list[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Neighbours that were accepted and are rotated alike: the index of the first, and all of them."""
    run: list[Any] = []
    for i, one in enumerate(accepted):
        if one is None:
            continue
        run.append(one)
        following = accepted[i + 1] if i + 1 < len(accepted) else None
        if following is None or not rotated_alike(seen[i], seen[i + 1]) or following.shape != one.shape:
            yield i + 1 - len(run), run
            run = []


def _observe(prefix: str, layers: nn.ModuleList, bench: Bench) -> list[Observed]:
    seen: list[Observed] = []
    backend = bench.own

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, Tensor):
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
        bench.run()
    finally:
        del backend.run
        for hook in hooks:
            hook.remove()
    # One that is called twice, or not, is nothing for the kernel.
    return seen if called == list(layers) and len(seen) == len(called) else []
