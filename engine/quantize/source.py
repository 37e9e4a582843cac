"""The checkpoint that is to be quantized: which of its tensors are weights of linear layers, and where they are."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from engine.errors import ConfigError, ModelNotSupported

HEAD, EMBEDDING = "lm_head", "embed_tokens"
_NUMBER = re.compile(r"\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer as the checkpoint names it; `stored_as` is the tensor that holds its weight."""

    name: str
    out_features: int
    in_features: int
    dtype: torch.dtype
    stored_as: str


@dataclass(frozen=True, slots=True)
class Source:
    """A 16-bit checkpoint in a folder. `layers`: every linear layer that may be quantized, by name, those of experts
    one by one; `kept`: the other matrices that a layer multiplies with (head, routers)."""

    folder: Path
    config: Any  # transformers' configuration
    files: dict[str, Path]  # by tensor
    nbytes: dict[str, int]  # by tensor
    layers: dict[str, Linear]
    kept: tuple[str, ...]
    _open: dict[Path, Any] = field(default_factory=dict, repr=False)

    def tensor(self, name: str) -> Tensor:
        path = self.files[name]
        if path not in self._open:
            self._open.clear()  # one mapping at a time: pages of the others can go
            self._open[path] = safe_open(path, "pt")
        return self._open[path].get_tensor(name)

    def units(self) -> dict[int | None, list[str]]:
        """Tensors by decoder layer, in its order; None, last: those of no layer."""
        units: dict[int | None, list[str]] = {}
        for name in self.files:
            number = _NUMBER.search(name)
            units.setdefault(None if number is None else int(number[1]), []).append(name)
        return {key: sorted(units[key]) for key in sorted(units, key=lambda k: (k is None, k))}

    def digest(self) -> str:
        """Of everything that the result depends on: the configuration and the bytes of the weights."""
        total = hashlib.sha256((self.folder / "config.json").read_bytes())
        for path in sorted(set(self.files.values())):
            with path.open("rb") as file:
                total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()


def open_source(folder: Path, *, lm_head: bool = False) -> Source:
    """Raises: ConfigError (no folder, no checkpoint, an adapter, a broken file), ModelNotSupported (quantized already,
    no causal language model, no linear layer)."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ConfigError(f"{str(folder)!r} is an adapter; give its base model, adapters are served on top of it")
        raise ConfigError(f"{str(folder)!r} is not a folder with a config.json; models are read from disk only")
    config = _read_config(folder)
    headers = dict(_headers(folder))
    files = {name: path for path, header in headers.items() for name in header}
    described = {name: about for header in headers.values() for name, about in header.items()}
    nbytes = {name: about["data_offsets"][1] - about["data_offsets"][0] for name, about in described.items()}
    with torch.device("meta"):
        model = AutoModelForCausalLM._model_mapping[type(config)](config)
    layers = {layer.name: layer for layer in _linear_layers(model, described, lm_head)}
    if not layers:
        raise ModelNotSupported(f"{str(folder)!r} has no linear layer that could be quantized")
    return Source(folder, config, files, nbytes, layers, _kept(model, described, layers))


def _read_config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file fails wherever transformers first trips over it
        raise ModelNotSupported(f"transformers cannot read {folder / 'config.json'}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        method = json.loads((folder / "config.json").read_text())["quantization_config"].get("quant_method")
        raise ModelNotSupported(f"{str(folder)!r} is quantized already ({method}); give the 16-bit original")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelNotSupported(f"{type(config).__name__} has no causal language model in transformers")
    return config


def _headers(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    paths = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        paths = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if not paths:
        raise ConfigError(f"{str(folder)!r} has no *.safetensors; other weight formats are not read")
    for path in paths:
        try:
            with safe_open(path, "pt"):  # checks the header against the file's length
                pass
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path} cannot be read: {error}; fetch it again") from error
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        yield path, header


def _linear_layers(model: nn.Module, described: dict[str, Any], lm_head: bool) -> Iterator[Linear]:
    """Of the model as transformers builds it, and of its experts, which it keeps in modules of their own."""
    modules = dict(model.named_modules())
    conv = next((name for name, module in modules.items() if isinstance(module, Conv1D)), None)
    if conv is not None:
        raise ModelNotSupported(
            f"{conv} is a Conv1D, which formats of quantized checkpoints do not know; quantize it at load instead"
        )
    head = model.get_output_embeddings()
    for name, about in described.items():
        module = name.removesuffix(".weight")
        if module == name or len(about["shape"]) != 2:
            continue
        is_linear = isinstance(modules.get(module), nn.Linear) and (modules[module] is not head or lm_head)
        if is_linear or _EXPERT.search(name):
            yield _linear(module, name, about)
    if lm_head and f"{HEAD}.weight" not in described:
        stored = next((name for name in described if name.endswith(f"{EMBEDDING}.weight")), None)
        if stored is None or modules.get(HEAD) is not head or not model.config.tie_word_embeddings:
            raise ModelNotSupported(
                f"the head of {type(model).__name__} is not a {HEAD} tied to {EMBEDDING}; leave --lm-head out"
            )
        yield _linear(HEAD, stored, described[stored])


def _linear(module: str, stored_as: str, about: dict[str, Any]) -> Linear:
    if about["dtype"] not in _DTYPES:
        raise ModelNotSupported(f"{stored_as} is stored as {about['dtype']}; give a checkpoint in 16 or 32 bits")
    out_features, in_features = about["shape"]
    return Linear(module, out_features, in_features, _DTYPES[about["dtype"]], stored_as)


def _kept(model: nn.Module, described: dict[str, Any], layers: dict[str, Linear]) -> tuple[str, ...]:
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    names = {name for name, module in modules.items() if module is head}
    names |= {n.removesuffix(".weight") for n, about in described.items() if len(about["shape"]) == 2}
    return tuple(sorted(n for n in names - set(layers) if not isinstance(modules.get(n), nn.Embedding)))
