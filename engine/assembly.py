"""What an engine is made of, and the limits that follow from it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from engine.config import EngineConfig, SizedConfig, live_blocks
from engine.core.limits import SchedulerConfig
from engine.gc_pause import garbage_collection_paused
from engine.grammar.compiler import NO_GRAMMARS, Grammars, NoGrammars
from engine.model_folder import locate
from engine.runner.protocol import Runner
from engine.sizing.room import ALONE, Neighbours, Sizes
from engine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from engine.checkpoint.rope import LengthRule
    from engine.image_spec import ImageSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What an engine is made of, once the model is loaded."""

    runner: Runner
    tokenizer: Tokenizer
    image_spec: ImageSpec
    grammars: Grammars | NoGrammars = NO_GRAMMARS
    num_blocks: int  # of the KV cache
    max_model_len: int  # tokens of prompt and output
    vocab_size: int  # columns of the logits: ids beyond it are refused
    hidden_size: int = 0  # numbers of a pooled vector; 0: not known
    eos_token_ids: tuple[int, ...]
    cache_namespace: str  # base revision, KV scheme and element type of adapters
    window_tokens: int | None = None  # no layer sees further back; None: some layer does
    length_rule: LengthRule | None = None  # None: rotary frequencies are the same for texts of all lengths
    quantized_bytes: int = 0  # of weights; see EngineStats
    quantized_16bit_bytes: int = 0
    block_bytes: int = 0  # of the KV cache: the pages of adapters that lie in it; 0: none do
    sized: SizedConfig | None = None  # None: what the settings leave open is as large as it ever is
    sizes: Sizes | None = None  # None: nobody planned any
    dtype: str = ""  # what the base computes in; "": not known

    def sized_config(self, config: EngineConfig) -> SizedConfig:
        if self.sized is not None:
            return self.sized
        return config.resolved(max_model_len=self.max_model_len, kv_cache_bytes=self.num_blocks * self.block_bytes)


def load_parts(config: EngineConfig, neighbours: Neighbours = ALONE) -> EngineParts:
    """Load the model and size what depends on it. Imports torch. Raises: ConfigError, ModelNotSupported."""
    with garbage_collection_paused():
        return _load_parts(config, neighbours)


def _load_parts(config: EngineConfig, neighbours: Neighbours) -> EngineParts:
    from engine.model.loader import load_model
    from engine.runner.memory import check_weights_fit, host_room, kv_shape, size_engine
    from engine.runner.runner import TorchRunner

    config = replace(config, model=str(locate(config.model)))
    tokenizer = Tokenizer.load(config.tokenizer or config.model)
    room = host_room(config, neighbours)
    if config.device == "cpu":
        check_weights_fit(config, room)
    loaded = load_model(config)
    sized, sizes = size_engine(loaded, config, room, neighbours)
    logger.info("%s: %s", Path(config.model).name, sizes)
    loaded = replace(loaded, max_model_len=sized.max_model_len)
    num_blocks, shape = sizes.num_blocks, kv_shape(loaded, config)
    spec = loaded.image_spec(config.adapter_dtype)
    grammars = Grammars(tokenizer, loaded.capabilities.vocab_size, loaded.eos_token_ids)
    return EngineParts(
        runner=TorchRunner(loaded, sized, num_blocks, grammars),
        tokenizer=tokenizer,
        grammars=grammars,
        image_spec=spec,
        num_blocks=num_blocks,
        max_model_len=loaded.max_model_len,
        vocab_size=loaded.capabilities.vocab_size,
        hidden_size=loaded.hidden_size,
        eos_token_ids=loaded.eos_token_ids,
        window_tokens=loaded.capabilities.window_tokens,
        length_rule=loaded.length_rule,
        cache_namespace=f"{loaded.cache_namespace}/{shape.scheme}/{spec.dtype}",
        quantized_bytes=loaded.footprint.num_bytes if loaded.footprint else 0,
        quantized_16bit_bytes=loaded.footprint.num_bytes_16bit if loaded.footprint else 0,
        block_bytes=shape.block_bytes,
        sized=sized,
        sizes=sizes,
        dtype=str(loaded.dtype).removeprefix("torch."),
    )


def limits_of(config: SizedConfig, parts: EngineParts) -> SchedulerConfig:
    """Raises: ConfigError for limits that exclude each other."""
    max_pages, min_pages = None, 0
    if config.has_adapter_pages():
        # What adapters never get is room for one sequence of any length.
        rows = config.plans_in_flight() * config.max_num_batched_tokens
        per_sequence = live_blocks(parts.max_model_len, config.block_size, parts.window_tokens, rows)
        num_left = parts.num_blocks - 1 - per_sequence
        min_pages, max_pages = config.adapter_pages(parts.block_bytes)
        max_pages = min(max_pages, max(0, num_left))
    return SchedulerConfig(
        num_blocks=parts.num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=parts.max_model_len,
        max_queued_requests=config.max_queued_requests,
        adapter_bytes=config.adapter_bytes,
        max_adapter_pages=max_pages,
        min_adapter_pages=min_pages,
        adapters_load_at_once=not config.has_adapter_pages(),
        max_resident_adapters=config.max_resident_adapters,
        enable_prefix_caching=config.enable_prefix_caching,
        enable_chunked_prefill=config.enable_chunked_prefill,
        pipeline_depth=config.plans_in_flight(),
        eos_token_ids=parts.eos_token_ids,
        long_from=None if parts.length_rule is None else parts.length_rule.original_tokens,
        window_tokens=parts.window_tokens,
        recomputes_long=parts.length_rule is not None and parts.length_rule.is_one_switch,
        cache_namespace=parts.cache_namespace,
    )
