"""From a folder with a transformers checkpoint to a model that has been probed and judged. Never from a hub."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from engine.config import AdapterDType, EngineConfig
from engine.errors import ConfigError, ModelNotSupported
from engine.model.attention import ATTENTION_NAME
from engine.model.capabilities import Capabilities, judge
from engine.model.eos import eos_token_ids
from engine.model.fingerprint import base_fingerprint, weight_files
from engine.model.probe import probe
from engine.model.surgery import find_sites
from engine.site import ImageSpec, LinearSite

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready for the runner, and what was found out about it."""

    model: nn.Module
    hf_config: Any
    sites: tuple[LinearSite, ...]
    capabilities: Capabilities
    fingerprint: str
    dtype: torch.dtype
    device: torch.device
    eos_token_ids: tuple[int, ...]
    max_model_len: int  # tokens

    def image_spec(self, adapter_dtype: AdapterDType = "auto") -> ImageSpec:
        """How adapters must be packed for this model."""
        dtype: Any = _DTYPE_NAMES[self.dtype] if adapter_dtype == "auto" else adapter_dtype
        return ImageSpec(base_fingerprint=self.fingerprint, dtype=dtype, sites=self.sites)


def load_model(config: EngineConfig) -> LoadedModel:
    """Load, probe and judge the model in `config.model`.

    Raises: ConfigError (folder, device, dtype or length cannot work), ModelNotSupported (names what is missing).
    """
    folder = check_folder(Path(config.model))
    device = _check_device(config.device)
    hf_config = _read_config(folder)
    max_model_len = resolve_max_model_len(hf_config, config.max_model_len)
    dtype = _resolve_dtype(config.dtype, hf_config)
    eos = eos_token_ids(folder, Path(config.tokenizer or folder))
    model = _read_weights(folder, hf_config, dtype, device)
    try:
        trace = probe(model)
    except Exception as error:
        raise ModelNotSupported(f"{type(model).__name__}: a probing forward failed: {error}") from error
    capabilities = judge(model, trace, max_model_len)
    sites = find_sites(model, trace)
    return LoadedModel(
        model=model,
        hf_config=hf_config,
        sites=sites,
        capabilities=capabilities,
        fingerprint=base_fingerprint(folder, sites),
        dtype=dtype,
        device=device,
        eos_token_ids=eos,
        max_model_len=max_model_len,
    )


def check_folder(folder: Path) -> Path:
    """Raises: ConfigError if this cannot be the folder of a checkpoint."""
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model={str(folder)!r} is not a folder with a config.json; models are read from disk only")
    if (folder / "adapter_config.json").exists():
        raise ConfigError(f"model={str(folder)!r} is an adapter (it has an adapter_config.json); give its base model")
    if not weight_files(folder):
        raise ConfigError(f"model={str(folder)!r} has no *.safetensors; other weight formats are not read")
    return folder


def _check_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch finds no CUDA device; use device='cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def _read_config(folder: Path) -> Any:
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file fails wherever transformers first trips over it
        raise ModelNotSupported(f"transformers cannot read {folder / 'config.json'}: {error}") from error
    kind = f"{type(config).__name__} (model_type {config.model_type!r})"
    if config.is_encoder_decoder:
        raise ModelNotSupported(f"{kind} is an encoder-decoder (cross attention); only decoders are served")
    if getattr(config, "quantization_config", None) is not None:
        method = json.loads((folder / "config.json").read_text())["quantization_config"].get("quant_method")
        raise ModelNotSupported(f"{kind}: checkpoints quantized with {method!r} are not supported; give the original")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelNotSupported(f"{kind} has no causal language model in transformers")
    _refuse_recurrent(config)
    return config


def _refuse_recurrent(config: Any) -> None:
    """Before any weight is read: a class that says itself that it keeps a state of its own between tokens."""
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    if not getattr(model_class, "_is_stateful", False):
        return
    with torch.device("meta"):
        model = model_class(config)
    # Nearly every such mixer convolves over a few tokens before its recurrence; the others go by their names.
    culprit = next((n for n, m in model.named_modules() if any(isinstance(c, nn.Conv1d) for c in m.children())), None)
    culprit = culprit or next((n for n, m in model.named_modules() if "recurrent" in type(m).__name__.lower()), None)
    where = f"{culprit} ({type(model.get_submodule(culprit)).__name__})" if culprit else model_class.__name__
    raise ModelNotSupported(f"{where} keeps a recurrent state of its own: only attention layers are served")


def resolve_max_model_len(hf_config: Any, wanted: int | None) -> int:
    """Tokens of prompt and output. Raises: ConfigError if the model was made for fewer, or does not say."""
    text = hf_config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    for rope in _rope_parameters(text):
        # These frequencies depend on the longest sequence of a batch. Below this length they do not.
        if rope.get("rope_type") in ("longrope", "dynamic"):
            original = rope.get("original_max_position_embeddings")
            limit = min((length for length in (limit, original) if length), default=None)
    if limit is None:
        if wanted is None:
            raise ConfigError("the model's config has no max_position_embeddings; set max_model_len")
        return wanted
    if wanted is not None and wanted > limit:
        raise ConfigError(f"max_model_len={wanted} is more than the {limit} tokens that the model can place; lower it")
    return int(wanted or limit)


def _rope_parameters(text_config: Any) -> list[dict[str, Any]]:
    """The model's rope parameters: one set, or one per layer type."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _resolve_dtype(name: str, hf_config: Any) -> torch.dtype:
    if name != "auto":
        return _DTYPES[name]
    dtype = hf_config.get_text_config().dtype or hf_config.dtype or torch.float32
    if dtype not in _DTYPE_NAMES:
        raise ModelNotSupported(f"the checkpoint's dtype is {dtype}; set dtype to one of {sorted(_DTYPES)}")
    return dtype


def _read_weights(folder: Path, hf_config: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """transformers builds the model on the meta device and streams the shards into it, one tensor at a time."""
    straight_to_device = device.type != "cpu" and importlib.util.find_spec("accelerate") is not None
    try:
        with _progress_on_terminals_only():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=hf_config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation=ATTENTION_NAME,
                output_loading_info=True,
                **({"device_map": {"": device}} if straight_to_device else {}),
            )
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelNotSupported(f"transformers cannot load {folder}: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would go on with random numbers in their place.
        raise ModelNotSupported(f"{folder} lacks the weights of {len(missing)} parameters, first {missing[0]}")
    return model.eval().requires_grad_(False).to(device)


@contextmanager
def _progress_on_terminals_only() -> Iterator[None]:
    """transformers draws a bar while it loads, which fills the logs of a server."""
    if sys.stderr.isatty() or not hf_logging.is_progress_bar_enabled():
        yield
        return
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.enable_progress_bar()
