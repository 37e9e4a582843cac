"""What the scheduler tells of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """A snapshot between two steps. The last seven count since the start."""

    waiting: int  # sequences
    running: int  # sequences
    in_flight: int  # plans
    max_wait_ns: int  # how long the sequence that waits longest has waited, in the time of `StepEvents`
    free_blocks: int
    num_blocks: int  # without the null block
    cached_blocks: int  # findable by their prefix, in use or free
    resident_adapters: tuple[str, ...]  # of least worth first
    resident_bytes: int  # with those being copied
    pinned_adapters: tuple[str, ...]  # by a caller
    adapter_pages: int  # blocks that adapters hold
    adapter_loads: int
    adapter_evictions: int
    preemptions: int
    prefix_hit_tokens: int
    prefix_lookup_tokens: int
    guessed_tokens: int  # rows spent on guesses
    guessed_right_tokens: int
