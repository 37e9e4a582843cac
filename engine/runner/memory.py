"""What a loaded model needs and the machine has, measured: the numbers from which engine/sizing plans."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import torch

from engine.checkpoint.fingerprint import weight_files
from engine.checkpoint.folder import build_skeleton, read_config
from engine.config import AUTO, EngineConfig, SizedConfig
from engine.core.plan import RowOutput, SequenceSlice, StepPlan
from engine.errors import ConfigError
from engine.kv.storage import KVShape, KVStorage
from engine.kv.torch_attention import TorchAttention
from engine.model.attention import forward_hidden
from engine.model.loader import LoadedModel
from engine.native.library import SUPPORTED_DTYPES, NativeUnavailable, load_library
from engine.runner.inputs import InputBuilder
from engine.runner.sampler_memory import HISTORY_BYTES, ONCE_BYTES, sampled_row_bytes
from engine.sizing.machine import HostMemory, read_host_memory, read_process_bytes
from engine.sizing.plan import plan_sizes
from engine.sizing.room import ALONE, GIB, MIB, Needs, Neighbours, Room, Sizes, human

GPU_FRACTION = 0.9
CONTAINER_FRACTION = 0.9
MACHINE_FRACTION = 0.5  # others live there too
PROCESS_BYTES = 512 * MIB  # torch, transformers and an interpreter: 410 MiB before, and what they load later
_CONTEXT_BYTES = 600 * MIB  # of CUDA, where a GPU is shared and it cannot be measured
_GPU_FIXED_BYTES = 256 * MIB  # LoRA tables and scratch, trial runs, fragments
_GRAPH_BYTES = GIB  # workspaces of libraries, one for each stream that graphs are recorded on
_FP8_CAPABILITY = (9, 0)  # Hopper
# Of a row, alive at once in a layer as transformers writes it: vectors of the hidden size, and of the widest layer's.
_HIDDEN_COPIES, _WIDEST_COPIES = 8, 4
_ATTENTION_TILE_BYTES = 128 * 4  # of scores and weights, for each thread and token of the longest context
_LOGIT_BYTES = 4  # some models give them in float32, whatever they compute in
_QUANTIZED_BYTES = {"int8": 1.0, "int8-dynamic": 1.0, "fp8": 1.0, "int4": 0.5, "nf4": 0.5}


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


def host_room(config: EngineConfig, neighbours: Neighbours = ALONE, host: HostMemory | None = None) -> Room:
    """What an engine on the CPU may use. To be read before it is loaded: what it holds then is not free any more."""
    process = max(PROCESS_BYTES, read_process_bytes() + 64 * MIB)
    store = neighbours.store_bytes
    if config.memory_bytes != AUTO:
        return Room(
            total_bytes=config.memory_bytes, base_bytes=process, source="memory_bytes was set", store_bytes=store
        )
    host = host or read_host_memory()
    fraction = config.memory_fraction
    if fraction == AUTO:
        fraction = CONTAINER_FRACTION if host.is_container else MACHINE_FRACTION
    source = f"{fraction:g} of {host.name}, {human(host.total_bytes)}"
    if neighbours.reserved_bytes:
        source += f", less {human(neighbours.reserved_bytes)} for Ray, the routers and the adapter store"
    if neighbours.num_engines > 1:
        source += f", shared by {neighbours.num_engines} replicas"
    share = max(0, int(fraction * host.total_bytes) - neighbours.reserved_bytes) // neighbours.num_engines
    free = host.available_bytes + read_process_bytes()
    if free < share:
        share, source = free, f"{human(free)} of {host.name}, {human(host.total_bytes)}, are free"
    return Room(total_bytes=share, base_bytes=process, source=source, store_bytes=store)


def check_weights_fit(config: EngineConfig, room: Room) -> None:
    """Before any is read. Raises: ConfigError if they are sure to be too large for `room`."""
    folder = Path(config.model)
    left = room.total_bytes - room.base_bytes
    if config.kv_cache_bytes != AUTO or sum(path.stat().st_size for path in weight_files(folder)) < left:
        return
    hf_config, stored = read_config(folder)
    if stored is not None:
        return  # by their files alone nobody can say what codes come to
    per_element = _QUANTIZED_BYTES.get(config.quantization or "", 4.0 if config.dtype == "float32" else 2.0)
    least = int(per_element * sum(p.numel() for p in build_skeleton(hf_config).parameters()))
    if least > left:
        raise ConfigError(
            f"the weights of {folder} take at least {human(least)} and the process {human(room.base_bytes)}, and there "
            f"are {human(room.total_bytes)} ({room.source}): give it more (memory_bytes, memory_fraction, fewer "
            "replicas on a node), or make the weights smaller (quantization='int8' or 'int4')"
        )


def size_engine(
    loaded: LoadedModel, config: EngineConfig, room: Room, neighbours: Neighbours = ALONE
) -> tuple[SizedConfig, Sizes]:
    """`config` with every size a number. `room` is the CPU's, and counts there alone.

    Raises: ConfigError if something cannot fit, naming what would.
    """
    needs = model_needs(loaded, config)
    if loaded.device.type != "cuda":
        return plan_sizes(config, needs, room)
    room = _gpu_room(loaded, config, neighbours, needs.weight_bytes)
    sized, _ = plan_sizes(config, needs, room)
    # The step that was chosen is run, and what it takes counts in the place of what was estimated.
    measured = profile_step_bytes(loaded, sized)
    needs = replace(needs, row_bytes=0, fixed_bytes=needs.fixed_bytes + measured)
    chosen = replace(config, max_num_seqs=sized.max_num_seqs, max_num_batched_tokens=sized.max_num_batched_tokens)
    return plan_sizes(chosen, needs, room)


def model_needs(loaded: LoadedModel, config: EngineConfig) -> Needs:
    """What the model costs, of which the forward's part is an estimate."""
    vocab_size, item = loaded.capabilities.vocab_size, int(loaded.dtype.itemsize)
    sites = [site for site in loaded.sites if site.layer is not None] or list(loaded.sites)
    hidden = max((min(site.in_features, site.out_features) for site in sites), default=1)
    widest = max((max(site.in_features, site.out_features) for site in sites), default=1)
    row_bytes = item * (_HIDDEN_COPIES * hidden + _WIDEST_COPIES * widest) + 8 * hidden
    spec_item = 1 if config.adapter_dtype == "int8" else item
    shape = kv_shape(loaded, config)
    needs = Needs(
        weight_bytes=weight_bytes(loaded),
        context_tokens=loaded.max_model_len,
        block_size=config.block_size,
        block_bytes=shape.block_bytes,
        window_tokens=loaded.capabilities.window_tokens,
        rank_bytes=spec_item * sum(site.in_features + site.out_features for site in loaded.sites),
        row_bytes=row_bytes,
        sampled_row_bytes=sampled_row_bytes(vocab_size, _LOGIT_BYTES),
        sequence_bytes=HISTORY_BYTES * vocab_size,
        fixed_bytes=ONCE_BYTES * vocab_size,
        sequence_token_bytes=2 * 8 // config.block_size + 1,  # block tables, int64, of this step and the next
    )
    if loaded.device.type == "cuda":
        graphs = _GRAPH_BYTES if config.cuda_graphs else 0
        # Graphs keep what one decode step needs, and the logits of all.
        kept = row_bytes + _LOGIT_BYTES * vocab_size if config.cuda_graphs else 0
        return replace(
            needs,
            fixed_bytes=needs.fixed_bytes + _GPU_FIXED_BYTES + graphs,
            sampled_row_bytes=needs.sampled_row_bytes + kept,
        )
    if _has_native(loaded, config):
        threads = config.num_threads or torch.get_num_threads()
        return replace(needs, context_token_bytes=threads * _ATTENTION_TILE_BYTES)
    heads = max(layer.num_q_heads for layer in loaded.capabilities.layers)
    copies = 2 * (item + 4) * (shape.num_kv_heads + heads) * shape.head_dim  # keys and values, gathered and widened
    return replace(needs, context_token_bytes=copies, row_token_bytes=1 + item)  # what a row sees, as flags and numbers


def weight_bytes(loaded: LoadedModel) -> int:
    """Of parameters, buffers and codes; what is tied counts once."""
    model = loaded.model
    storages = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    plain = sum(t.numel() * t.element_size() for t in storages.values())
    return plain + (loaded.footprint.num_bytes if loaded.footprint else 0)


def _has_native(loaded: LoadedModel, config: EngineConfig) -> bool:
    if config.kernels not in ("auto", "native") or loaded.dtype not in SUPPORTED_DTYPES:
        return False
    try:
        load_library()
    except NativeUnavailable:
        return False
    return True


def _gpu_room(loaded: LoadedModel, config: EngineConfig, neighbours: Neighbours, weights: int) -> Room:
    device = loaded.device
    gc.collect()
    torch.cuda.empty_cache()
    free, total = (int(number) for number in torch.cuda.mem_get_info(device))
    is_shared = neighbours.num_engines > 1 or config.memory_bytes != AUTO
    own = int(torch.cuda.memory_reserved(device)) + _CONTEXT_BYTES if is_shared else total - free
    fraction = GPU_FRACTION if config.memory_fraction == AUTO else config.memory_fraction
    share = int(fraction * total) // neighbours.num_engines
    source = f"{fraction:g} of the GPU's memory, {human(total)}"
    if neighbours.num_engines > 1:
        source += f", shared by {neighbours.num_engines} replicas"
    if config.memory_bytes != AUTO:
        share, source = config.memory_bytes, "memory_bytes was set"
    if free + own < share:
        share, source = free + own, f"{human(free)} of the GPU's memory, {human(total)}, are free"
    base = max(0, own - weights)
    return Room(total_bytes=share, base_bytes=base, source=source, store_bytes=neighbours.store_bytes)


def profile_step_bytes(loaded: LoadedModel, config: SizedConfig) -> int:
    """Peak bytes of the largest step's forward beside weights and cache: measured, on CUDA, by running one."""
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
        forward_hidden(loaded.model, inputs.input_ids, inputs.positions, backend)
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def _largest_step(loaded: LoadedModel, config: SizedConfig) -> StepPlan:
    """max_num_batched_tokens rows in as few sequences as max_model_len allows, all of max_num_seqs sampling."""
    block_size = config.block_size
    rows_left, row, block = config.max_num_batched_tokens, 0, 0
    slices: list[SequenceSlice] = []
    while rows_left > 0 and len(slices) < config.max_num_seqs:
        others = config.max_num_seqs - len(slices) - 1
        rows = max(1, min(config.max_model_len, rows_left - others))
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
