"""Which kernels a loaded model runs on, and the swap of its layers that this takes."""

from __future__ import annotations

import logging

import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.kv.backend import AttentionBackend, AttentionInputs
from engine.kv.native_cpu import NativeAttention
from engine.kv.storage import KVStorage
from engine.kv.torch_cpu import TorchAttention
from engine.lora.batch import LoraBatch
from engine.lora.native_cpu import NativeLora
from engine.model.attention import forward_hidden
from engine.model.decoder import compile_decoder
from engine.model.fused import fuse
from engine.model.loader import LoadedModel
from engine.model.packed import pack_linears
from engine.model.surgery import install_lora
from engine.native.library import SUPPORTED_DTYPES, NativeLibrary, NativeUnavailable, load_library

logger = logging.getLogger(__name__)


def prepare_layers(
    loaded: LoadedModel, config: EngineConfig, storage: KVStorage, library: NativeLibrary | None
) -> tuple[AttentionBackend, LoraBatch]:
    """Give the model's layers LoRA, and compiled kernels where there are any."""
    has_lora = config.adapter_bytes > 0 and config.max_resident_adapters > 0
    if library is None:
        batch = LoraBatch()
        if has_lora:
            install_lora(loaded.model, loaded.sites, batch)
        return TorchAttention(storage), batch
    lora = NativeLora(library, config.max_resident_adapters) if has_lora else None
    batch, backend = LoraBatch(lora), NativeAttention(library, storage)
    with torch.inference_mode():
        done = _compile_layers(loaded, library, lora, backend)
    if has_lora:
        install_lora(loaded.model, tuple(site for site in loaded.sites if site.index not in done), batch)
    return backend, batch


def _compile_layers(
    loaded: LoadedModel, library: NativeLibrary, lora: NativeLora | None, backend: NativeAttention
) -> set[int]:
    """Swap what has a compiled twin: whole runs of decoder layers, then what is left, part by part."""
    model, sites = loaded.model, loaded.sites

    def run(inputs: AttentionInputs) -> None:
        backend.plan(inputs)
        positions = torch.arange(inputs.query_starts[-1])
        forward_hidden(model, (positions * 7 + 3) % loaded.capabilities.vocab_size, positions, backend)

    done = compile_decoder(model, sites, library, lora, backend, run)
    fuse(model, library)
    return done | pack_linears(model, [site for site in sites if site.index not in done], library, lora)


def native_library(loaded: LoadedModel, config: EngineConfig) -> NativeLibrary | None:
    """The compiled kernels, if the model and the machine can use them and `cpu_kernels` lets them.

    Raises: ConfigError if it asks for them and they cannot be used.
    """
    if loaded.device.type != "cpu" or config.cpu_kernels == "torch":
        return None
    try:
        if loaded.dtype not in SUPPORTED_DTYPES:
            raise NativeUnavailable(f"they compute in float32 and bfloat16, the model in {loaded.dtype}")
        library = load_library()
    except NativeUnavailable as error:
        if config.cpu_kernels == "native":
            raise ConfigError(f"cpu_kernels='native' cannot be had: {error}; use 'auto' or 'torch'") from error
        logger.info("the compiled CPU kernels are not used: %s", error)
        return None
    library.set_threads(torch.get_num_threads())
    return library
