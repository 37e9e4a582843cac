"""What the folder of a checkpoint says of itself, before any weight is read. Never a hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.checkpoint.rope import max_rope_tokens
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelNotSupported
from engine.model_folder import locate

# What helps where no setting does.
REMEDY = ". Serve a model of a family that docs/architectures.md lists as served"
OTHERWISE = "; else serve one of a family that docs/architectures.md lists as served"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def check_folder(folder: Path) -> Path:
    """The folder of the checkpoint that is meant. Raises: ConfigError if there is none."""
    return locate(str(folder))


def read_config(folder: Path) -> tuple[Any, dict[str, Any] | None]:
    """The model's config, and what it says of quantization, which is no longer in it.

    Raises: ModelNotSupported if there is no model of that kind, or none that could be served.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file fails wherever transformers first trips over it
        raise ModelNotSupported(f"transformers cannot read {folder / 'config.json'}: {error}") from error
    kind = f"{type(config).__name__} (model_type {config.model_type!r})"
    if config.is_encoder_decoder:
        raise ModelNotSupported(f"{kind} is an encoder-decoder (cross attention), and only decoders are served{REMEDY}")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ModelNotSupported(f"{kind} has no causal language model in transformers{REMEDY}")
    _refuse_recurrent(config)
    return config, _take_quantization_config(config, folder)


def _take_quantization_config(config: Any, folder: Path) -> dict[str, Any] | None:
    """Without it transformers builds the plain model. A part's (of a model that also sees) counts too."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config.get_text_config()
    for part in (config, text):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    places = [raw, *(value for value in raw.values() if isinstance(value, dict) and value.get("model_type"))]
    found = [place[key] for place in places for key in ("quantization_config", "compression_config") if place.get(key)]
    if found and not isinstance(found[0], dict):
        raise ModelNotSupported(f"{folder / 'config.json'}: quantization_config={found[0]!r} is no set of keys")
    return found[0] if found else None


def _refuse_recurrent(config: Any) -> None:
    """Before any weight is read: a class that says itself that it keeps a state of its own between tokens."""
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    if not getattr(model_class, "_is_stateful", False):
        return
    model = build_skeleton(config)
    # Nearly every such mixer convolves over a few tokens before its recurrence; the others go by their names.
    culprit = next((n for n, m in model.named_modules() if any(isinstance(c, nn.Conv1d) for c in m.children())), None)
    culprit = culprit or next((n for n, m in model.named_modules() if "recurrent" in type(m).__name__.lower()), None)
    where = f"{culprit} ({type(model.get_submodule(culprit)).__name__})" if culprit else model_class.__name__
    raise ModelNotSupported(f"{where} keeps a recurrent state of its own, and only attention layers are served{REMEDY}")


def build_skeleton(config: Any) -> Any:
    """The model without memory for its weights (on the meta device).

    Raises: ModelNotSupported if config.json has values of which none can be made.
    """
    model_class, config = causal_class(config)
    try:
        with torch.device("meta"):
            return model_class(config)
    except Exception as error:  # whatever the first layer raises that cannot use its sizes or names
        told = f"{type(error).__name__}: {error}"
        raise ModelNotSupported(f"transformers cannot make a {model_class.__name__} by config.json: {told}") from error


def causal_class(config: Any) -> tuple[Any, Any]:
    """The class that transformers' Auto class picks, and the config it gives it: of a model in parts, the text's."""
    model_class = AutoModelForCausalLM._model_mapping[type(config)]
    if model_class.config_class == config.sub_configs.get("text_config"):
        config = config.get_text_config()
    return model_class, config


def resolve_max_model_len(hf_config: Any, wanted: int | None) -> int:
    """Tokens of prompt and output. Raises: ConfigError if the model was made for fewer, or does not say."""
    limit = max_rope_tokens(hf_config.get_text_config())
    if limit is None or limit < 1:  # XLNet says -1
        if wanted is None:
            raise ConfigError("the model's config has no max_position_embeddings; set max_model_len")
        return wanted
    if wanted is not None and wanted > limit:
        raise ConfigError(f"max_model_len={wanted} is more than the {limit} tokens that the model can place; lower it")
    return int(wanted or limit)


def resolve_dtype(config: EngineConfig, hf_config: Any, *, is_quantized: bool) -> torch.dtype:
    """What the model computes in, and its layers that are not quantized are kept in.

    auto is what the checkpoint says; but quantized checkpoints, which say float16 for the GPUs they were made on,
    become bfloat16 on the CPU, whose kernels compute in float32 and bfloat16. Codes and scales stay what they are.
    """
    if config.dtype != "auto":
        return _DTYPES[config.dtype]
    dtype = hf_config.get_text_config().dtype or hf_config.dtype or torch.float32
    if dtype not in DTYPE_NAMES:
        raise ModelNotSupported(f"the checkpoint's dtype is {dtype}; set dtype to one of {sorted(_DTYPES)}")
    if is_quantized and dtype is torch.float16 and config.device == "cpu":
        return torch.bfloat16
    return dtype
