"""From a folder with a transformers checkpoint to a model that has been probed and judged. Never from a hub."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from engine.checkpoint.eos import eos_token_ids
from engine.checkpoint.fingerprint import base_fingerprint, rounding_name
from engine.checkpoint.folder import (
    DTYPE_NAMES,
    build_skeleton,
    causal_class,
    check_folder,
    read_config,
    resolve_dtype,
    resolve_max_model_len,
)
from engine.checkpoint.footprint import Footprint, measure
from engine.checkpoint.free_memory import FreeMemory
from engine.checkpoint.hook import Swap, SwapConfig
from engine.checkpoint.names import CheckpointNames
from engine.checkpoint.rope import LengthRule, length_rule
from engine.checkpoint.rounded import RoundedQuantization
from engine.checkpoint.stored import StoredQuantization, check_plain_tensors, plan_layers
from engine.checkpoint.weight_files import WeightFiles
from engine.config import AUTO, AdapterDType, EngineConfig
from engine.errors import ConfigError, ModelNotSupported
from engine.image_spec import ImageSpec, LinearSite
from engine.model.attention import ATTENTION_NAME, keep_window
from engine.model.capabilities import Capabilities, judge, why_it_failed, why_own_attention
from engine.model.probe import probe
from engine.model.surgery import find_sites, find_unused
from engine.model.watch import Use
from engine.quant.formats import read_scheme

logger = logging.getLogger(__name__)


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
    length_rule: LengthRule | None = None  # None: frequencies are the same for texts of all lengths
    footprint: Footprint | None = None  # None: no layer is quantized
    unused: tuple[str, ...] = ()  # modules through which no text passes
    uses: Mapping[str, Use] | None = None  # by name, what the model does with its modules; None: not looked at
    rounding: str = ""  # what the settings did to the weights; "": they are the checkpoint's

    @property
    def hidden_size(self) -> int:
        """Numbers of one hidden state."""
        return int(self.hf_config.get_text_config().hidden_size)

    @property
    def cache_namespace(self) -> str:
        """Two models with one have the same KV values. Their adapters' images are the same without it: images depend
        on a model's sites and dtype, which rounding does not change."""
        return f"{self.fingerprint}:{self.rounding}" if self.rounding else self.fingerprint

    def image_spec(self, adapter_dtype: AdapterDType = "auto") -> ImageSpec:
        """How adapters must be packed for this model."""
        dtype: Any = DTYPE_NAMES[self.dtype] if adapter_dtype == "auto" else adapter_dtype
        return ImageSpec(base_fingerprint=self.fingerprint, dtype=dtype, sites=self.sites, unused=self.unused)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    folder: Path
    hf_config: Any
    quantization: dict[str, Any] | None  # of config.json


def load_model(config: EngineConfig) -> LoadedModel:
    """Load, probe and judge the model in `config.model`.

    Raises: ConfigError (folder, device, dtype or length cannot work), ModelNotSupported (names what is missing).
    """
    folder = check_folder(Path(config.model))
    device = _check_device(config.device)
    hf_config, stored = read_config(folder)
    checkpoint = _Checkpoint(folder, hf_config, stored)
    _refuse_quantizing_twice(checkpoint, config)
    wanted = None if config.max_model_len == AUTO else config.max_model_len
    max_model_len = resolve_max_model_len(hf_config, wanted)
    dtype = resolve_dtype(config, hf_config, is_quantized=stored is not None)
    eos = eos_token_ids(folder, Path(config.tokenizer or folder))
    model = _read_weights(checkpoint, config, dtype, device)
    footprint = measure(model)
    if footprint is not None:
        logger.info("%s: %s", folder.name, footprint)
    try:
        trace = probe(model)
    except Exception as error:
        raise ModelNotSupported(why_it_failed(model, error)) from error
    FreeMemory().give_back()  # of that forward, whose layers have no kernels yet
    capabilities = judge(model, trace, max_model_len)
    for layer in capabilities.layers:
        keep_window(model.get_submodule(layer.name), layer.sliding_window)
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
        length_rule=length_rule(hf_config.get_text_config(), max_model_len),
        footprint=footprint,
        unused=find_unused(model, trace, sites),
        uses=trace.uses,
        rounding=rounding_name(config),
    )


def _check_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda', but torch finds no CUDA device; use device='cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def _read_weights(checkpoint: _Checkpoint, config: EngineConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """transformers builds the model on the meta device and streams the shards into it, one tensor at a time."""
    straight_to_device = device.type != "cpu" and importlib.util.find_spec("accelerate") is not None
    folder = checkpoint.folder
    load, source = _source(checkpoint, config, dtype, device)
    try:
        with _progress_on_terminals_only():
            model, report = load(
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation=ATTENTION_NAME,
                output_loading_info=True,
                **source,
                **({"device_map": {"": device}} if straight_to_device else {}),
            )
    except (ValueError, OSError, KeyError, RuntimeError, SafetensorError) as error:
        if ATTENTION_NAME in str(error):  # it looks for its attention in a list of its own
            raise ModelNotSupported(why_own_attention(build_skeleton(checkpoint.hf_config))) from error
        raise ModelNotSupported(f"transformers cannot load {folder}: {error}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers would go on with random numbers in their place.
        raise ModelNotSupported(
            f"{folder} lacks the weights of {len(missing)} parameters, first {missing[0]}: config.json asks for more "
            "than the files hold; copy the checkpoint anew, or mend the field of config.json that says how many"
        )
    return model.eval().requires_grad_(False).to(device)


def _source(
    checkpoint: _Checkpoint, config: EngineConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The `from_pretrained` that reads the weights, and its arguments that say from where.

    From the folder itself; or, where layers are quantized, from tensors that are read when they are asked for and
    leave nothing mapped behind.
    """
    if config.quantization is None and checkpoint.quantization is None:
        load = AutoModelForCausalLM.from_pretrained
        return load, {"pretrained_model_name_or_path": checkpoint.folder, "config": checkpoint.hf_config}
    model_class, hf_config = causal_class(checkpoint.hf_config)
    source = {"pretrained_model_name_or_path": None, "config": hf_config}
    files = WeightFiles(checkpoint.folder)
    if checkpoint.quantization is not None:
        scheme = read_scheme(checkpoint.quantization, files.metadata)
        layers, others = plan_layers(build_skeleton(checkpoint.hf_config), files, scheme)
        swap: Swap = StoredQuantization(layers, scheme, device)
    else:
        assert config.quantization is not None
        others, skeleton = files.tensors, build_skeleton(checkpoint.hf_config)
        # What a quantizer takes, transformers itself does not compare with the model.
        check_plain_tensors(CheckpointNames(skeleton), others, skeleton)
        swap = RoundedQuantization(
            config.quantization,
            lm_head=config.quantize_lm_head,
            embeddings=config.quantize_embeddings,
            dtype=dtype,
            device=device,
        )
    return model_class.from_pretrained, source | {"state_dict": others, "quantization_config": SwapConfig(swap)}


def _refuse_quantizing_twice(checkpoint: _Checkpoint, config: EngineConfig) -> None:
    if checkpoint.quantization is not None and config.quantization is not None:
        method = checkpoint.quantization.get("quant_method")
        raise ConfigError(
            f"quantization={config.quantization!r} is for 16-bit checkpoints, and {checkpoint.folder} is quantized "
            f"({method!r}) already; leave the setting away, or give the original"
        )


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
