"""Images of several adapters as one, made in this process: within its limits, off the event loop, one at a time.

Whoever asks chooses the weights, so that each request may want an image that nobody has: what they take of this
process's memory is bounded. The engine's own budget bounds those that it has; this bounds those that wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from engine.errors import AdapterTooLarge, QueueFull
from engine.image_spec import ImageSpec
from engine.lora.image import AdapterImage
from engine.lora.merging import Weighted, merged, merged_size

NUM_THREADS = 1  # copying is bound by memory, which the steps need too


class Merges:
    """`waiting_bytes`: of images that are being made, or are and the engine does not have, at most."""

    def __init__(
        self, spec: ImageSpec, *, max_rank: int = 512, max_bytes: int = 1 << 28, waiting_bytes: int = 1 << 28
    ) -> None:
        self._spec = spec
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._waiting_bytes = waiting_bytes
        self._making_bytes = 0
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="merges")

    async def made(self, key: str, parts: Sequence[Weighted], unloaded_bytes: int) -> AdapterImage:
        """`unloaded_bytes`: of images that were made before and the engine does not have.

        Raises: AdapterTooLarge; QueueFull when too many wait already.
        """
        rank, num_bytes = merged_size(parts, self._spec)
        remedy = "merge fewer adapters, or smaller ones"
        if rank > self._max_rank:
            told = f"the ranks of the merged adapters add up to {rank}, the limit is adapters.max_rank={self._max_rank}"
            raise AdapterTooLarge(f"{told}; {remedy}")
        if num_bytes > self._max_bytes:
            limit = f"the limit is adapters.max_adapter_bytes={self._max_bytes}"
            raise AdapterTooLarge(f"the merged adapters have {num_bytes} bytes, {limit}; {remedy}")
        waiting = self._making_bytes + unloaded_bytes
        if waiting and waiting + num_bytes > self._waiting_bytes:
            told = f"merged adapters of {waiting} bytes wait for room already, the limit is {self._waiting_bytes}"
            raise QueueFull(f"{told}; try again later")
        self._making_bytes += num_bytes
        try:
            run = asyncio.get_running_loop().run_in_executor
            return await run(self._pool, merged, key, parts, self._spec)
        finally:
            self._making_bytes -= num_bytes
