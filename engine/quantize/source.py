"""The checkpoint that is to be quantized: which of its tensors are weights of linear layers, and where they belong."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from engine.checkpoint.folder import build_skeleton, check_folder, read_config
from engine.checkpoint.names import CheckpointNames, Place, is_router
from engine.checkpoint.weight_files import StoredTensor, WeightFiles
from engine.errors import ModelNotSupported

HEAD, EMBEDDING = "lm_head", "embed_tokens"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer as the checkpoint names it; an expert's matrix is one. `stored_as`: the tensor of its weight."""

    name: str
    place: Place
    dtype: torch.dtype
    stored_as: str

    @property
    def out_features(self) -> int:
        return self.place.out_features

    @property
    def in_features(self) -> int:
        return self.place.in_features


@dataclass(frozen=True, slots=True)
class Source:
    """A 16-bit checkpoint in a folder. `layers`: every linear layer that may be quantized, by name; `kept`: the other
    matrices that a layer multiplies with (head, routers)."""

    folder: Path
    config: Any  # transformers' configuration
    files: dict[str, StoredTensor]  # by name of the tensor
    layers: dict[str, Linear]
    kept: tuple[str, ...]

    def tensor(self, name: str) -> Tensor:
        return self.files[name].read()

    def units(self) -> dict[int | None, list[str]]:
        """Tensors by decoder layer, in its order; None, last: those of no layer."""
        units: dict[int | None, list[str]] = {}
        for name in self.files:
            number = next((int(part) for part in name.split(".") if part.isdigit()), None)
            units.setdefault(number, []).append(name)
        return {key: sorted(units[key]) for key in sorted(units, key=lambda k: (k is None, k))}

    def digest(self) -> str:
        """Of everything that the result depends on: the configuration and the bytes of the weights."""
        total = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted({tensor.path for tensor in self.files.values()}):
            with path.open("rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()


def open_source(folder: Path, *, lm_head: bool = False) -> Source:
    """Raises: ConfigError (no folder, no checkpoint, an adapter), ModelNotSupported (a broken file, quantized already,
    no causal language model, no linear layer)."""
    config, quantization = read_config(check_folder(folder))
    if quantization is not None:
        method = quantization.get("quant_method")
        raise ModelNotSupported(f"{str(folder)!r} is quantized already ({method}); give the 16-bit original")
    files = WeightFiles(folder).tensors
    skeleton = build_skeleton(config)
    layers = {layer.name: layer for layer in _linear_layers(skeleton, files, lm_head)}
    if not layers:
        raise ModelNotSupported(f"{str(folder)!r} has no linear layer that could be quantized")
    return Source(folder, config, files, layers, _kept(skeleton, files, layers))


def _linear_layers(skeleton: Any, files: dict[str, StoredTensor], lm_head: bool) -> Iterator[Linear]:
    conv = next((name for name, module in skeleton.named_modules() if isinstance(module, Conv1D)), None)
    if conv is not None:
        raise ModelNotSupported(
            f"{conv} is a Conv1D, which formats of quantized checkpoints do not know; quantize it at load instead"
        )
    names, head = CheckpointNames(skeleton), skeleton.get_output_embeddings()
    for name, stored in files.items():
        layer = name.removesuffix(".weight")
        place = names.place(layer) if layer != name else None
        if place is None or is_router(place.module):
            continue
        if lm_head or skeleton.get_submodule(place.module) is not head:
            yield _linear(layer, place, stored)
    if lm_head and f"{HEAD}.weight" not in files:
        embedding = next((tensor for name, tensor in files.items() if name.endswith(f"{EMBEDDING}.weight")), None)
        is_tied = skeleton.config.get_text_config().tie_word_embeddings
        has_name = dict(skeleton.named_modules()).get(HEAD) is head
        if embedding is None or not is_tied or not has_name:
            raise ModelNotSupported(
                f"the head of {type(skeleton).__name__} is not a {HEAD} tied to {EMBEDDING}; leave --lm-head out"
            )
        yield _linear(HEAD, Place(HEAD, head.in_features, head.out_features), embedding)


def _linear(layer: str, place: Place, stored: StoredTensor) -> Linear:
    if stored.dtype not in _DTYPES:
        raise ModelNotSupported(f"{stored.name} is stored in {stored.dtype}; give a checkpoint in 16 or 32 bits")
    if stored.shape != (place.out_features, place.in_features):
        wanted = [place.out_features, place.in_features]
        raise ModelNotSupported(f"{stored.name} has the shape {list(stored.shape)}, config.json means {wanted}")
    return Linear(layer, place, stored.dtype, stored.name)


def _kept(skeleton: Any, files: dict[str, StoredTensor], layers: dict[str, Linear]) -> tuple[str, ...]:
    modules, head = dict(skeleton.named_modules()), skeleton.get_output_embeddings()
    names = {name for name, module in modules.items() if module is head}
    names |= {name.removesuffix(".weight") for name, stored in files.items() if len(stored.shape) == 2}
    return tuple(sorted(n for n in names - set(layers) if not isinstance(modules.get(n), nn.Embedding)))
