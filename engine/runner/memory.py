"""From bytes to blocks: how many blocks of KV cache there are room for, and how many of them adapters may take."""

from __future__ import annotations

import gc

import torch

from engine.config import MIB, EngineConfig
from engine.core.plan import RowOutput, SequenceSlice, StepPlan
from engine.errors import ConfigError
from engine.kv.storage import KVShape, KVStorage
from engine.kv.torch_attention import TorchAttention
from engine.model.attention import forward_logits
from engine.model.loader import LoadedModel
from engine.runner.inputs import InputBuilder

DEFAULT_CPU_BYTES = 256 * MIB
CUDA_SHARE = 0.92  # of the whole memory: the rest is for fragments, other libraries' workspaces and the sampler
_NULL_BLOCKS = 1  # block 0 is never handed out
_COPY_BLOCKS = 1  # one more than the sequences need, for a copy-on-write
_FP8_CAPABILITY = (9, 0)  # Hopper


def kv_shape(loaded: LoadedModel, config: EngineConfig) -> KVShape:
    """The shape of a block of `config`'s cache. Raises: ConfigError if the device has no such numbers."""
    quantization = None if config.kv_cache_dtype == "auto" else config.kv_cache_dtype
    if quantization == "fp8" and loaded.device.type == "cuda":
        capability = torch.cuda.get_device_capability(loaded.device)
        if capability < _FP8_CAPABILITY:
            raise ConfigError(
                f"kv_cache_dtype='fp8' needs a GPU of compute capability {_as_version(_FP8_CAPABILITY)} (Hopper) or "
                f"later, and this one has {_as_version(capability)}: use 'int8'"
            )
    return loaded.capabilities.kv_shape(config.block_size, loaded.dtype, quantization)


def _as_version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def num_kv_blocks(loaded: LoadedModel, config: EngineConfig) -> int:
    """Blocks for `config`, never more than max_num_seqs sequences of max_model_len tokens, and all adapters, can fill.

    Raises: ConfigError if that is not enough for one sequence of max_model_len tokens beside what adapters keep.
    """
    shape = kv_shape(loaded, config)
    budget = config.kv_cache_bytes
    if budget is None:
        budget = DEFAULT_CPU_BYTES if loaded.device.type == "cpu" else _free_cuda_bytes(loaded, config)
    per_sequence = -(-loaded.max_model_len // config.block_size)
    kept, adapters = config.adapter_pages(shape.block_bytes)
    kept = max(kept, min(1, adapters))  # one, or LoRA could be left out
    most = config.max_num_seqs * per_sequence + adapters + _NULL_BLOCKS + _COPY_BLOCKS
    least = per_sequence + kept + _NULL_BLOCKS
    num_blocks = min(budget // shape.block_bytes, most)
    if num_blocks < least:
        beside = f" and {kept} for adapters (min_adapter_bytes={config.min_adapter_bytes})" if kept else ""
        raise ConfigError(
            f"{budget} bytes of KV cache are {num_blocks} blocks of {shape.block_bytes} bytes; one sequence of "
            f"max_model_len={loaded.max_model_len} tokens needs {least}, with the null block{beside}: raise "
            f"kv_cache_bytes to at least {least * shape.block_bytes}, or lower max_model_len"
        )
    return num_blocks


def _free_cuda_bytes(loaded: LoadedModel, config: EngineConfig) -> int:
    """What is left for the cache, and adapters in its pages, beside weights and the largest step."""
    device = loaded.device
    step_bytes = profile_step_bytes(loaded, config)
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return max(0, int(free) - int(total * (1 - CUDA_SHARE)) - step_bytes)


def profile_step_bytes(loaded: LoadedModel, config: EngineConfig) -> int:
    """Peak bytes that the largest step needs beside weights and cache: measured, on CUDA, by running one."""
    device = loaded.device
    plan = _largest_step(loaded, config)
    num_blocks = 1 + max(block for s in plan.slices for block in s.block_table)
    storage = KVStorage(kv_shape(loaded, config), num_blocks, device)
    backend = TorchAttention(storage)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with torch.inference_mode():
        inputs = InputBuilder(config.block_size, device, lambda ref: torch.zeros((), dtype=torch.long)).build(plan)
        backend.plan(inputs.attention)
        logits = forward_logits(loaded.model, inputs.input_ids, inputs.positions, inputs.sampled_rows, backend)
        # The sampler works on a float32 copy of the logits and a few of its size.
        logits_bytes = 4 * 4 * logits.numel()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before + logits_bytes)


def _largest_step(loaded: LoadedModel, config: EngineConfig) -> StepPlan:
    """max_num_batched_tokens rows in as few sequences as max_model_len allows, all of max_num_seqs sampling."""
    block_size = config.block_size
    rows_left, row, block = config.max_num_batched_tokens, 0, 0
    slices: list[SequenceSlice] = []
    while rows_left > 0 and len(slices) < config.max_num_seqs:
        others = config.max_num_seqs - len(slices) - 1
        rows = max(1, min(loaded.max_model_len, rows_left - others))
        num_blocks = -(-rows // block_size)
        slices.append(
            SequenceSlice(
                seq_id=len(slices),
                row_start=row,
                token_ids=(0,) * rows,
                position=0,
                block_table=tuple(range(block, block + num_blocks)),
                lora_slot=0,
                output=RowOutput.SAMPLE,
                output_position=0,
            )
        )
        rows_left, row, block = rows_left - rows, row + rows, block + num_blocks
    return StepPlan(plan_id=0, slices=tuple(slices))
