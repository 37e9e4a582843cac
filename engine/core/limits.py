"""What the scheduler may use: every limit of one engine, resolved to integers."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import check_step_limits, live_blocks
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of one scheduler; `max_` values are inclusive. Raises: ConfigError naming the value and the remedy."""

    num_blocks: int  # of the KV cache, with the null block 0, which no sequence ever gets
    block_size: int  # P, tokens of one block
    max_num_seqs: int  # sequences the runner keeps state for
    max_num_batched_tokens: int  # rows of one plan
    max_model_len: int  # tokens of prompt and output together
    max_queued_requests: int  # requests of which no sequence has run yet
    adapter_bytes: int  # of all resident adapters
    max_resident_adapters: int  # LoRA slots 1 .. max_resident_adapters
    max_adapter_pages: int | None = None  # blocks that adapters may hold together; None: they live elsewhere
    adapters_load_at_once: bool = False  # a plan's own rows may use what it loads: nothing is copied
    min_adapter_pages: int = 0  # blocks that no sequence gets
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    pipeline_depth: int  # plans in flight
    eos_token_ids: tuple[int, ...]
    long_from: int | None = None  # texts of more tokens have other rotary frequencies; None: all have the same
    recomputes_long: bool = False  # a text that grows beyond is computed again; else what is computed stays
    window_tokens: int | None = None  # no layer lets a token see further back, itself included; None: some layer does
    cache_namespace: str  # base revision, KV scheme, adapters' element type: KV is never shared between two of them

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_model_len", "max_queued_requests", "pipeline_depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_blocks < 2:
            raise ConfigError(
                f"num_blocks={self.num_blocks} must be at least 2, as block 0 is never used; raise kv_cache_bytes"
            )
        if self.window_tokens is not None and self.window_tokens < 1:
            raise ConfigError(f"window_tokens={self.window_tokens} must be at least 1, or None where no window is")
        check_step_limits(self)
        if self.max_adapter_pages is not None:
            self._check_pages(self.max_adapter_pages)

    def _check_pages(self, max_pages: int) -> None:
        if not 0 <= self.min_adapter_pages <= max_pages:
            raise ConfigError(
                f"min_adapter_bytes are {self.min_adapter_pages} pages of the KV cache and adapters may hold "
                f"{max_pages}: lower it, or raise adapter_bytes and kv_cache_bytes"
            )
        if self.num_blocks - 1 - max_pages < 1:
            raise ConfigError(
                f"adapters may hold {max_pages} pages of the KV cache, which has {self.num_blocks - 1}: none would be "
                "left for sequences; lower adapter_bytes or raise kv_cache_bytes"
            )

    @property
    def max_live_blocks(self) -> int:
        """Blocks that one sequence ever holds at a time: those of all its tokens, or those that a window reaches from
        the first row in flight to the last.
        """
        rows = self.pipeline_depth * self.max_num_batched_tokens
        return live_blocks(self.max_model_len, self.block_size, self.window_tokens, rows)

    @property
    def max_kv_tokens(self) -> int:
        """Tokens of the longest sequence that the KV cache has room for when it is alone, beside as many adapters as
        there may be.
        """
        num_blocks = self.num_blocks - 1 - (self.max_adapter_pages or 0)
        if self.window_tokens is not None and num_blocks >= self.max_live_blocks:
            return max(self.max_model_len, num_blocks * self.block_size)
        return num_blocks * self.block_size

    @property
    def max_sequence_tokens(self) -> int:
        """Longest sequence: the model's context, or all of the KV cache that adapters leave and one token, which is
        never computed.

        A sequence ends by LENGTH here, so that one that runs alone never runs out of blocks, and so that where it
        ends does not depend on what else runs.
        """
        return min(self.max_model_len, self.max_kv_tokens + 1)
