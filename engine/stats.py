"""What the engine tells of itself: frozen ints and seconds. Turning them into metrics is the caller's business."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from engine.sizing.room import Sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """One moment of an engine. `total_` fields only grow: differences of two snapshots are rates."""

    waiting: int  # sequences that hold no blocks
    running: int
    free_blocks: int  # includes blocks that only the prefix cache holds
    num_blocks: int
    sizes: Sizes | None  # what was given and chosen at start, and why; None: the engine was not sized
    quantized_bytes: int  # of layers that are quantized, codes and scales; 0: none are
    quantized_16bit_bytes: int  # of the same layers, were they in 16 bits
    cached_blocks: int  # findable by their prefix, in use or free
    max_wait_s: float  # of the sequence that waits longest
    resident_adapters: tuple[str, ...]  # keys of the versions in LoRA slots, of least worth first
    resident_adapter_bytes: int
    pinned_adapters: tuple[str, ...]  # by `pin_adapter`
    adapter_pages: int  # blocks of the KV cache that adapters hold; neither free nor sequences'
    total_adapter_loads: int
    total_adapter_evictions: int
    total_load_waits: int  # steps with rows that waited for a copy: none, but after a step that was abandoned
    total_idle_load_waits: int  # steps without rows that did, so as not to spin
    total_preemptions: int
    total_prefix_hit_tokens: int
    total_prefix_lookup_tokens: int
    total_guessed_tokens: int  # rows spent on guesses of prompt lookup
    total_guessed_right_tokens: int  # of them, those that saved a step's row
    total_steps: int
    total_abandoned_steps: int  # failed on the host, before launch
    total_generated_tokens: int
    total_requests: int  # that ended, however they did
    total_queue_s: float  # summed over those requests: the metrics of each are RequestMetrics
    total_ttft_s: float
    total_decode_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Where the time of one request went. A phase that was not reached took 0 s."""

    queue_s: float  # from arrival to the first step that computed something of it
    ttft_s: float  # from arrival to the first token of its first sample
    decode_s: float  # from the first token to the last of all samples
    num_prompt_tokens: int
    num_output_tokens: int  # of all samples; with those computed before a stop string was noticed
    num_cached_tokens: int  # of the prompt, taken from the prefix cache


class RequestClock:
    """When things happened to one request, on the monotonic clock."""

    def __init__(self, num_samples: int, num_prompt_tokens: int, arrival_s: float) -> None:
        self.num_samples_left = num_samples
        self._num_prompt_tokens = num_prompt_tokens
        self._num_output_tokens = 0
        self._num_cached_tokens = 0
        self._arrival_s = arrival_s
        self._start_s: float | None = None
        self._first_token_s: float | None = None
        self._last_token_s: float | None = None

    def started(self, now_s: float) -> None:
        if self._start_s is None:
            self._start_s = now_s

    def gained(
        self, num_tokens: int, num_cached_tokens: int, *, answered: bool = True, ended: bool, now_s: float
    ) -> bool:
        """One sample gained tokens or a vector (it is `answered`), or ended, or both. Whether it is the first."""
        is_first = answered and self._first_token_s is None
        if answered:
            self._first_token_s = self._first_token_s or now_s
            self._last_token_s = now_s
            self._num_output_tokens += num_tokens
        if num_cached_tokens > self._num_cached_tokens:
            self._num_cached_tokens = num_cached_tokens
        self.num_samples_left -= ended
        return is_first

    @property
    def queue_s(self) -> float:
        return (self._start_s or self._arrival_s) - self._arrival_s

    def metrics(self) -> RequestMetrics:
        return RequestMetrics(
            queue_s=self.queue_s,
            ttft_s=(self._first_token_s or self._arrival_s) - self._arrival_s,
            decode_s=(self._last_token_s or 0.0) - (self._first_token_s or 0.0),
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            num_cached_tokens=self._num_cached_tokens,
        )


@dataclass(slots=True)
class Totals:
    """Sums since the engine was made; the fields of EngineStats with `total_` before their names."""

    steps: int = 0
    abandoned_steps: int = 0
    load_waits: int = 0
    idle_load_waits: int = 0
    generated_tokens: int = 0
    requests: int = 0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0

    def as_fields(self) -> dict[str, Any]:
        return {f"total_{field.name}": getattr(self, field.name) for field in dataclasses.fields(self)}

    def add(self, metrics: RequestMetrics) -> None:
        self.requests += 1
        self.queue_s += metrics.queue_s
        self.ttft_s += metrics.ttft_s
        self.decode_s += metrics.decode_s
