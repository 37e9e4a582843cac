"""GPTQ, decoder layer by decoder layer: the solver of one matrix is gptqmodel's, what runs it is here.

gptqmodel's own loop over a model keeps no checkpoint; ours is done with a layer when its file is written, and needs of
the layers before it only what their files say. Layers of one input (q, k, v) are solved together, those behind them
see what they became; the next decoder layer sees what the whole one became.

Source: GPTQ, arXiv 2210.17323; desc_act is its --act-order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from engine.errors import ConfigError, ModelNotSupported
from engine.quant.formats import read_scheme
from engine.quant.weight import QuantizedWeight, pack_nibbles
from engine.quantize.layouts import pack_gptq
from engine.quantize.options import Options
from engine.quantize.source import Linear, Source
from engine.quantize.work import Work


def configuration(options: Options, group_size: int) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": options.bits,
        "group_size": group_size,
        "desc_act": options.desc_act,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
    }


def check(source: Source) -> None:
    """Raises: ModelNotSupported naming the first layer that this method cannot do; ConfigError without gptqmodel."""
    for layer in source.layers.values():
        if layer.place.expert is not None:
            raise ModelNotSupported(f"{layer.name}: experts are not calibrated; use int4, nf4, int8 or fp8")
        if layer.in_features % 8 or layer.out_features % 8:
            raise ModelNotSupported(
                f"{layer.name} is [{layer.out_features}, {layer.in_features}]; GPTQ's files hold multiples of 8"
            )
    _library()


def _library() -> tuple[Any, Any]:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer its pools do not start
    try:
        from gptqmodel.quantization import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ
    except ImportError as error:
        raise ConfigError(f"method='gptq' needs gptqmodel ({error}); pip install 'chorus-serve[quantize]'") from error
    return QuantizeConfig, GPTQ


@torch.no_grad()
def run(source: Source, options: Options, group_size: int, windows: Tensor, work: Work) -> None:
    """Write every unit that is not done yet. Shapes: windows [windows, tokens]."""
    model = AutoModelForCausalLM.from_pretrained(
        source.folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).to(options.device)  # fmt: skip
    name, layers = decoder_layers(model.eval())
    hidden, arguments = _first_inputs(model, layers, windows.to(options.device))
    units = list(source.units().values())
    for unit, layer in enumerate(tqdm(layers, desc="gptq", unit="layer")):
        linears = {
            child: source.layers[f"{name}.{unit}.{child}"]
            for child, module in layer.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.{unit}.{child}" in source.layers
        }
        if unit in work.done:
            _read_layer(layer, linears, load_file(work.shard(unit)), configuration(options, group_size))
        else:
            tensors = _solve_layer(layer, linears, hidden, arguments[unit], options, group_size)
            kept = {name: source.tensor(name) for name in units[unit]}
            for linear in linears.values():
                del kept[linear.stored_as]
            work.finish_unit(unit, tensors | kept)
        if unit + 1 < len(layers):
            hidden = [_output(layer, rows, arguments[unit]) for rows in hidden]
    rest = len(layers)
    if rest < len(units) and rest not in work.done:
        work.finish_unit(rest, {name: source.tensor(name) for name in units[rest]})


def _read_layer(
    layer: nn.Module, linears: dict[str, Linear], tensors: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """Give a layer the weights that its shard means."""
    scheme = read_scheme(config, {})
    for child, linear in linears.items():
        own = {suffix: tensors[f"{linear.name}.{suffix}"] for suffix in ("qweight", "qzeros", "scales", "g_idx")}
        weight = scheme.read(linear.name, linear.in_features, linear.out_features, own)
        layer.get_submodule(child).weight.copy_(weight.dequantize())


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the layers. Raises: ModelNotSupported if the model has no such list."""
    number = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return name, module
    raise ModelNotSupported(f"{type(model).__name__} has no list of {number} decoder layers")


def _first_inputs(
    model: nn.Module, layers: nn.ModuleList, windows: Tensor
) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """What the first layer is given for each window, and what each layer is given beside it: the same for all windows,
    which are of one length (masks and rotations depend on nothing else)."""
    arguments: list[dict[str, Any]] = [{} for _ in layers]
    hidden: list[Tensor] = []

    def note(index: int, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        arguments[index] = {key: value for key, value in kwargs.items() if key != "past_key_values"}
        if index == 0:
            hidden.append(args[0])

    handles = [
        layer.register_forward_pre_hook(lambda _, a, k, i=index: note(i, a, k), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    model(windows[:1], use_cache=False)
    for handle in handles[1:]:
        handle.remove()

    class Enough(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Enough

    handles = [handles[0], layers[0].register_forward_pre_hook(stop)]
    for index in range(1, len(windows)):
        try:
            model(windows[index : index + 1], use_cache=False)
        except Enough:
            continue
    for handle in handles:
        handle.remove()
    return hidden, arguments


def _output(layer: nn.Module, rows: Tensor, arguments: dict[str, Any]) -> Tensor:
    out = layer(rows, **arguments)
    return out[0] if isinstance(out, tuple) else out


def _solve_layer(
    layer: nn.Module,
    linears: dict[str, Linear],
    hidden: list[Tensor],
    arguments: dict[str, Any],
    options: Options,
    group_size: int,
) -> dict[str, Tensor]:
    """The tensors of a decoder layer's linear layers. Afterwards their weights are what those tensors mean."""
    tensors: dict[str, Tensor] = {}
    for group in _by_input(layer, linears, hidden[0], arguments):
        solvers = {child: _solver(layer.get_submodule(child), options, group_size) for child in group}
        with _listening(layer, solvers):
            for rows in hidden:
                _output(layer, rows, arguments)
        for child, solver in solvers.items():
            weight = _solved(solver, options, group_size)
            layer.get_submodule(child).weight.copy_(weight.dequantize())
            packed = pack_gptq(weight.to(torch.device("cpu")), options.bits)
            tensors |= {f"{linears[child].name}.{suffix}": tensor for suffix, tensor in packed.items()}
    return tensors


def _by_input(layer: nn.Module, linears: dict[str, Linear], rows: Tensor, arguments: dict[str, Any]) -> list[list[str]]:
    """The linear layers in the order in which they are called, those that are given the same tensor together."""
    groups: dict[int, list[str]] = {}
    seen: list[Tensor] = []  # kept, so that ids are unique

    def note(child: str, x: Tensor) -> None:
        seen.append(x)
        groups.setdefault(id(x), []).append(child)

    handles = [
        layer.get_submodule(child).register_forward_pre_hook(lambda _, args, child=child: note(child, args[0]))
        for child in linears
    ]
    _output(layer, rows, arguments)
    for handle in handles:
        handle.remove()
    return list(groups.values())


@contextmanager
def _listening(layer: nn.Module, solvers: dict[str, Any]) -> Iterator[None]:
    handles = [
        layer.get_submodule(child).register_forward_hook(lambda _, args, y, s=solver: s.add_batch(args[0], y))
        for child, solver in solvers.items()
    ]
    yield
    for handle in handles:
        handle.remove()


def _solver(module: nn.Module, options: Options, group_size: int) -> Any:
    config_class, solver_class = _library()
    config = config_class(
        bits=options.bits,
        group_size=group_size,
        desc_act=options.desc_act,
        act_group_aware=not options.desc_act,
        sym=True,
        offload_to_disk=False,
    )
    solver = solver_class(module, config)
    solver.quantizer.configure(perchannel=True)
    return solver


def _solved(solver: Any, options: Options, group_size: int) -> QuantizedWeight:
    """The solver's answer in our words, scales as float16: what is stored is what is gone on with."""
    weight, scales, zeros, g_idx = solver.quantize()[:4]
    solver.free()
    group_of = g_idx.long().to(weight.device)
    half = 1 << (options.bits - 1)
    codes = torch.round(weight.float() / scales[:, group_of]) + zeros[:, group_of]
    codes = codes.clamp(0, 2 * half - 1)
    order = torch.argsort(group_of, stable=True)
    is_ordered = torch.equal(order, torch.arange(len(order), device=order.device))
    codes = codes[:, order]
    stored = pack_nibbles(codes.to(torch.uint8)) if options.bits == 4 else (codes - half).to(torch.int8)
    return QuantizedWeight(
        kind="int4" if options.bits == 4 else "int8",
        codes=stored,
        scales=scales.half().float(),
        zeros=None if bool((zeros == half).all()) else (zeros - half).to(torch.int16),
        order=None if is_ordered else order,
    )
