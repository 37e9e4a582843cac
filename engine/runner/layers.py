"""Which kernels a loaded model runs on, and the swap of its layers that this takes."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.checkpoint.free_memory import FreeMemory
from engine.config import EngineConfig, SizedConfig
from engine.errors import ConfigError
from engine.kv.backend import AttentionBackend
from engine.kv.native_attention import NativeAttention
from engine.kv.storage import KVStorage
from engine.kv.torch_attention import TorchAttention
from engine.lora.batch import LoraBatch
from engine.lora.native_lora import NativeLora
from engine.model.attention import forward_hidden
from engine.model.fused import fuse
from engine.model.head import widen_head
from engine.model.loader import LoadedModel
from engine.model.native_decoder import compile_decoder
from engine.model.packed import pack_experts, pack_linears
from engine.model.surgery import install_lora
from engine.model.trial import Bench, make_bench
from engine.native.library import SUPPORTED_DTYPES, NativeLibrary, NativeUnavailable, load_library

if TYPE_CHECKING:  # Triton is loaded where it is used: it takes a second, and CPU builds of torch lack it
    from engine.kv.triton_attention import TritonAttention
    from engine.lora.triton_lora import TritonLora

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PreparedLayers:
    """What the runner tells of each step."""

    backend: AttentionBackend
    batch: LoraBatch
    library: NativeLibrary | None = None  # compiled CPU kernels
    triton: tuple[TritonAttention, TritonLora | None] | None = None  # the same backend, and the batch's kernels


def prepare_layers(loaded: LoadedModel, config: SizedConfig, storage: KVStorage) -> PreparedLayers:
    """Give the model's layers LoRA, and kernels where there are any.

    Raises: ConfigError if `kernels` asks for some that cannot be used.
    """
    library = native_library(loaded, config)
    if library is None:
        widen_head(loaded.model)
    if library is not None:
        prepared, done = _native(loaded, config, storage, library)
    elif _use_triton(loaded, config):
        prepared, done = _triton(loaded, config, storage)
    else:
        prepared, done = PreparedLayers(TorchAttention(storage), LoraBatch()), set()
    if config.has_lora():
        left = tuple(site for site in loaded.sites if site.index not in done)
        install_lora(loaded.model, left, prepared.batch, loaded.uses)
    FreeMemory().give_back()  # of layers that kernels have laid out anew
    return prepared


def _native(
    loaded: LoadedModel, config: SizedConfig, storage: KVStorage, library: NativeLibrary
) -> tuple[PreparedLayers, set[int]]:
    """Swap what has a compiled twin: whole runs of decoder layers, then what is left, part by part."""
    model, sites = loaded.model, loaded.sites
    lora = NativeLora(library, config.max_resident_adapters) if config.has_lora() else None
    backend = NativeAttention(library, storage)
    with torch.inference_mode():
        bench = _bench(loaded, storage, lambda trial: NativeAttention(library, trial))
        done = compile_decoder(model, sites, library, lora, bench, loaded.uses)
        fuse(model, library, loaded.dtype, loaded.uses)
        left = [site for site in sites if site.index not in done]
        done |= pack_linears(model, left, library, lora, loaded.dtype, loaded.uses)
        pack_experts(model, library, loaded.dtype)
    widen_head(model)  # one that is not packed
    return PreparedLayers(backend, LoraBatch(lora), library=library), done


def _triton(loaded: LoadedModel, config: SizedConfig, storage: KVStorage) -> tuple[PreparedLayers, set[int]]:
    from engine.kv.triton_attention import TritonAttention
    from engine.lora.triton_lora import TritonLora
    from engine.model.triton_decoder import fuse_decoder
    from engine.model.triton_quant import swap_quant_linears

    lora, backend = None, TritonAttention(storage)
    if config.has_lora():
        lora = TritonLora(
            len(loaded.sites),
            config.max_resident_adapters,
            loaded.dtype,
            loaded.device,
            are_codes=config.adapter_dtype == "int8",
        )
    with torch.inference_mode():
        done = fuse_decoder(loaded.model, loaded.sites, lora, _bench(loaded, storage, TritonAttention), loaded.uses)
        swap_quant_linears(loaded.model, loaded.dtype, loaded.uses)
    return PreparedLayers(backend, LoraBatch(lora), triton=(backend, lora)), done


def _bench(loaded: LoadedModel, storage: KVStorage, make_backend: Callable[[KVStorage], AttentionBackend]) -> Bench:
    def forward(positions: torch.Tensor, backend: AttentionBackend) -> None:
        ids = torch.arange(len(positions), device=loaded.device) * 7 + 3
        forward_hidden(loaded.model, ids % loaded.capabilities.vocab_size, positions, backend)

    return make_bench(loaded.hf_config, loaded.max_model_len, storage.shape, loaded.device, make_backend, forward)


def native_library(loaded: LoadedModel, config: EngineConfig) -> NativeLibrary | None:
    """The compiled kernels, if the model and the machine can use them and `kernels` lets them.

    Raises: ConfigError if it asks for them and they cannot be used.
    """
    if config.kernels not in ("auto", "native") or (loaded.device.type != "cpu" and config.kernels == "auto"):
        return None
    try:
        if loaded.device.type != "cpu":
            raise NativeUnavailable(f"they run on the CPU, the model on {loaded.device.type}")
        if loaded.dtype not in SUPPORTED_DTYPES:
            raise NativeUnavailable(f"they compute in float32 and bfloat16, the model in {loaded.dtype}")
        library = load_library()
    except NativeUnavailable as error:
        if config.kernels == "native":
            raise ConfigError(f"kernels='native' cannot be had: {error}; use 'auto' or 'torch'") from error
        logger.info("the compiled CPU kernels are not used: %s", error)
        return None
    library.set_threads(torch.get_num_threads())
    return library


def _use_triton(loaded: LoadedModel, config: EngineConfig) -> bool:
    """Raises: ConfigError if `kernels` asks for Triton and it cannot be used."""
    if config.kernels not in ("auto", "triton") or (loaded.device.type == "cpu" and config.kernels == "auto"):
        return False
    missing = _what_triton_lacks(loaded.device)
    if missing and config.kernels == "triton":
        raise ConfigError(f"kernels='triton' cannot be had: {missing}; use 'auto' or 'torch'")
    if missing:
        logger.warning("the Triton kernels are not used: %s", missing)
    return not missing


def _what_triton_lacks(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    from triton import knobs

    if device.type == "cpu" and not knobs.runtime.interpret:
        return "they run on a GPU (on the CPU only in Triton's interpreter, with TRITON_INTERPRET=1)"
    return None
