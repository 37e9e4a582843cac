"""Models whose checkpoint is quantized: every layer is checked by the headers alone, then read one by one."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.checkpoint.free_memory import FreeMemory
from engine.checkpoint.names import CheckpointNames, ExpertPart, Place
from engine.checkpoint.placing import replace_experts, replace_linear
from engine.checkpoint.weight_files import StoredTensor, WeightFiles
from engine.errors import ModelNotSupported
from engine.quant.experts import ExpertWeights
from engine.quant.scheme import Scheme, TensorSpec
from engine.quant.weight import QuantizedWeight

# Names that quantizers give to what they store. Elsewhere than in a quantized layer they are a mistake.
_QUANTIZERS_OWN = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_(packed|scale\w*|shape|zero_point|g_idx|format)|weight\.\w+|_weight_\w+)(\.|$)"
)


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A quantized layer of the checkpoint."""

    name: str  # as in the checkpoint
    place: Place
    tensors: Mapping[str, StoredTensor]  # by suffix, without the bias
    stray_bias: StoredTensor | None  # of a layer that has none in the model: some tools write zeros


class StoredQuantization:
    """The `Swap` of a quantized checkpoint."""

    def __init__(self, layers: list[StoredLayer], scheme: Scheme, device: torch.device) -> None:
        self._layers = layers
        self._scheme = scheme
        self._device = device

    def before(self, model: nn.Module, memory: FreeMemory) -> None:
        """Read the quantized layers, in the order of the files, and put them into the model."""
        experts: dict[str, dict[tuple[int, ExpertPart], QuantizedWeight]] = defaultdict(dict)
        for layer in self._layers:
            place = layer.place
            weight = self._read(layer)
            memory.read(sum(tensor.num_bytes for tensor in layer.tensors.values()))
            if place.part is None or place.expert is None:
                replace_linear(model, place.module, weight)
            else:
                experts[place.module][place.expert, place.part] = weight
        for name, parts in experts.items():
            indices = sorted({expert for expert, _ in parts})
            weights = [ExpertWeights(parts[i, "gate"], parts[i, "up"], parts[i, "down"]) for i in indices]
            replace_experts(model, name, weights)

    def bytes_of(self, parameter: str) -> float | None:
        return None

    def take(self, model: nn.Module, parameter: str, value: Tensor) -> set[str]:
        raise AssertionError(f"{parameter}: nothing was asked for")

    def _read(self, layer: StoredLayer) -> QuantizedWeight:
        bias = layer.stray_bias
        if bias is not None and bool(bias.read().any()):
            raise ModelNotSupported(f"{bias.name} ({bias.path}) is not zero, and the model has no bias there")
        tensors = {suffix: stored.read() for suffix, stored in layer.tensors.items()}
        weight = self._scheme.read(layer.name, layer.place.in_features, layer.place.out_features, tensors)
        return weight.to(self._device)


def plan_layers(
    skeleton: nn.Module, files: WeightFiles, scheme: Scheme
) -> tuple[list[StoredLayer], dict[str, StoredTensor]]:
    """The quantized layers in the order of the files, and by their names the tensors that transformers shall load.

    By headers alone. Raises: ModelNotSupported naming the tensor and its file, or the layer.
    """
    names = CheckpointNames(skeleton)
    grouped, others = _by_layer(files, names)
    layers: list[StoredLayer] = []
    for name, place, tensors in grouped:
        bias = tensors.pop("bias", None)
        if bias is not None and place.part is None and f"{place.module}.bias" in names.parameters:
            others[bias.name], bias = bias, None
        if scheme.is_quantized(name, tensors.keys()):
            wanted = scheme.tensors(name, place.in_features, place.out_features, tensors.keys())
            _check_tensors(name, tensors, wanted, scheme)
            layers.append(StoredLayer(name, place, tensors, stray_bias=bias))
        else:
            others[tensors["weight"].name] = _check_plain(name, tensors, scheme)
    if not layers:
        raise ModelNotSupported(
            f"config.json has a quantization_config of {scheme.name!r}, and the files hold no layer that is quantized "
            "so: give the quantized files, or take it out of config.json"
        )
    check_plain_tensors(names, others, skeleton)
    _check_complete(names, layers, others, skeleton)
    layers.sort(key=lambda layer: min((str(t.path), t.offset) for t in layer.tensors.values()))
    return layers, others


def _by_layer(
    files: WeightFiles, names: CheckpointNames
) -> tuple[list[tuple[str, Place, dict[str, StoredTensor]]], dict[str, StoredTensor]]:
    """Linear layers with their tensors by suffix, and all other tensors by name."""
    layers: dict[str, dict[str, StoredTensor]] = {}
    others: dict[str, StoredTensor] = {}
    for key, tensor in files.tensors.items():
        layer = next((prefix for prefix in _prefixes(key) if names.place(prefix) is not None), None)
        if layer is None:
            others[key] = tensor
        else:
            layers.setdefault(layer, {})[key[len(layer) + 1 :]] = tensor
    return [(name, place, layers[name]) for name in layers if (place := names.place(name)) is not None], others


def _prefixes(key: str) -> Iterator[str]:
    """a.b, a of a.b.c."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def _check_tensors(
    name: str, tensors: Mapping[str, StoredTensor], wanted: Mapping[str, TensorSpec], scheme: Scheme
) -> None:
    path = next(iter(tensors.values())).path
    for suffix, spec in wanted.items():
        if suffix not in tensors and not spec.optional:
            raise ModelNotSupported(f"{name}.{suffix} is missing ({path}): {scheme.name} needs it to read {name}")
    for suffix, tensor in tensors.items():
        where = f"{tensor.name} ({tensor.path})"
        if suffix not in wanted:
            raise ModelNotSupported(
                f"{where} is no tensor of a layer in {scheme.name}, whose tensors are {', '.join(sorted(wanted))}: "
                "a file of two methods, or of another one than its quantization_config says"
            )
        spec = wanted[suffix]
        if tensor.dtype not in spec.dtypes:
            dtypes = " or ".join(str(dtype).removeprefix("torch.") for dtype in spec.dtypes)
            raise ModelNotSupported(f"{where} is stored in {str(tensor.dtype).removeprefix('torch.')}, not in {dtypes}")
        if not spec.fits_shape(tensor.shape):
            shapes = " or ".join(str(list(shape)).replace("None", "any") for shape in spec.shapes)
            raise ModelNotSupported(
                f"{where} has the shape {list(tensor.shape)}; the model and its quantization_config need {shapes}"
            )


def _check_plain(name: str, tensors: Mapping[str, StoredTensor], scheme: Scheme) -> StoredTensor:
    """The weight of a layer that is not quantized."""
    wrong = [tensor for suffix, tensor in tensors.items() if suffix != "weight"]
    if "weight" not in tensors or wrong:
        where = f"{wrong[0].name} ({wrong[0].path})" if wrong else f"{name}.weight is missing"
        raise ModelNotSupported(
            f"{where}: quantization_config ({scheme.name}) does not quantize {name}, so that it "
            "must have a weight and perhaps a bias; the file is of another method"
        )
    return tensors["weight"]


def check_plain_tensors(names: CheckpointNames, others: Mapping[str, StoredTensor], skeleton: Any) -> None:
    """What transformers is to load is in floats of 16 bits or more, of the model's shapes, and of no quantized layer.

    Raises: ModelNotSupported naming the tensor and its file.
    """
    ignored = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_unexpected or ()]
    for key, tensor in others.items():
        where = f"{key} ({tensor.path})"
        known = [target for target in names.targets(key) if target in names.parameters]
        if not known:
            if _QUANTIZERS_OWN.search(key) and not any(pattern.search(key) for pattern in ignored):
                layer = next((prefix for prefix in _prefixes(key) if prefix in names.reasons), None)
                reason = f": {names.reasons[layer]}" if layer else ", in which no layer of that name can be quantized"
                raise ModelNotSupported(f"{where} belongs to no quantized layer of the model{reason}")
            continue
        expected = names.parameters[known[0]]
        if expected.is_floating_point() and not (tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1):
            raise ModelNotSupported(
                f"{where} is stored in {str(tensor.dtype).removeprefix('torch.')}, but config.json does not say that "
                "it is quantized"
            )
        shape: tuple[int, ...] = tuple(expected.shape)
        if names.is_converted(key):  # one of the matrices of experts, whose shapes are known, or anything else
            place = names.place(key.removesuffix(".weight"))
            shape = tensor.shape if place is None else (place.out_features, place.in_features)
        if tensor.shape != shape:
            raise ModelNotSupported(f"{where} has the shape {list(tensor.shape)}; {known[0]} needs {list(shape)}")


def _check_complete(names: CheckpointNames, layers: list[StoredLayer], others: Collection[str], skeleton: Any) -> None:
    """Every parameter is in the files, quantized or not, and no experts are half quantized."""
    found = {target for key in others for target in names.targets(key)}
    experts: dict[str, set[tuple[int | None, str]]] = defaultdict(set)
    for layer in layers:
        if layer.place.part is None:
            found.add(f"{layer.place.module}.weight")
        else:
            experts[layer.place.module].add((layer.place.expert, layer.place.part))
    for module, parts in experts.items():
        count = len(names.parameters[f"{module}.down_proj"])
        wanted = {(index, part) for index in range(count) for part in ("gate", "up", "down")}
        plain = f"{module}.gate_up_proj" in found or f"{module}.down_proj" in found
        if plain or parts != wanted:
            what = "16-bit weights too" if plain else f"{len(parts)} of {len(wanted)} matrices"
            raise ModelNotSupported(f"{module}: the files hold quantized experts, but {what}; all or none must be")
        found |= {f"{module}.gate_up_proj", f"{module}.down_proj"}
    ignored = [re.compile(pattern) for pattern in skeleton._keys_to_ignore_on_load_missing or ()]
    tied = skeleton.all_tied_weights_keys
    for name in names.parameters:
        if name not in found and name not in tied and not any(pattern.search(name) for pattern in ignored):
            raise ModelNotSupported(f"{name} is missing: the files hold no tensor of it")
