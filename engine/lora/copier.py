"""Copies adapters to the device beside the steps: by one thread, in chunks, no faster than it may.

    image ──gather──► staging buffer 0 or 1 (pinned) ──copy, on a stream of its own──► pages

The thread waits, nobody else does: a chunk is gathered into one staging buffer while the other one is being copied.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.lora.image import AdapterImage
from engine.lora.pages import Chunk, PageLayout, cut_chunks
from engine.to_device import use_device

STAGING_BYTES = 4 << 20
NUM_STAGING = 2


class HostToDevice(Protocol):
    """What copying asks of a device. `mark` is called by the step thread, all else by the copying one."""

    staging: tuple[npt.NDArray[np.uint8], ...]  # of equal size

    def enter(self) -> None:
        """The calling thread is the one that copies, and has copied nothing yet."""
        ...

    def mark(self) -> Any:
        """Everything that the step thread has given to the device until now."""
        ...

    def begin(self, mark: Any) -> None:
        """The copies that follow come after what `mark` stands for."""
        ...

    def put(self, index: int, num_bytes: int, dst: int) -> None:
        """Start the copy of the first bytes of a staging buffer to offset `dst` of the pages."""
        ...

    def wait_staging(self, index: int) -> None:
        """Until nothing is copied out of a staging buffer any more."""
        ...

    def finish(self) -> None:
        """Until all copies have ended. Raises: whatever went wrong with one."""
        ...


class HostPages:
    """On the CPU: the pages are memory like any other, and a copy is over when it has been called."""

    def __init__(self, pages: Tensor, staging_bytes: int = STAGING_BYTES) -> None:
        self._pages = pages  # uint8 [num_bytes]
        self.staging = tuple(np.empty(staging_bytes, dtype=np.uint8) for _ in range(NUM_STAGING))

    def enter(self) -> None: ...

    def mark(self) -> None:
        """Whatever the step thread does is done when it returns."""

    def begin(self, mark: Any) -> None: ...

    def put(self, index: int, num_bytes: int, dst: int) -> None:
        with torch.inference_mode():  # thread-local: the pages may be an inference tensor
            self._pages[dst : dst + num_bytes].copy_(torch.from_numpy(self.staging[index][:num_bytes]))

    def wait_staging(self, index: int) -> None: ...

    def finish(self) -> None: ...


class CudaPages:
    """On a GPU: pinned staging buffers, and a stream that only copies."""

    def __init__(self, pages: Tensor, staging_bytes: int = STAGING_BYTES) -> None:
        self._pages = pages  # uint8 [num_bytes]
        self._device = pages.device
        self._stream = torch.cuda.Stream(self._device)
        self._pinned = [torch.empty(staging_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(NUM_STAGING)]
        self.staging = tuple(tensor.numpy() for tensor in self._pinned)
        # Blocking: who waits for them sleeps, and leaves its core to the step thread. Not recorded yet: over.
        self._copied = [torch.cuda.Event(blocking=True) for _ in range(NUM_STAGING)]
        self._finished = torch.cuda.Event(blocking=True)

    def enter(self) -> None:
        use_device(self._device)

    def mark(self) -> torch.cuda.Event:
        # The pages may have belonged to kernels still queued on the step's stream: the copy comes after them.
        return torch.cuda.current_stream(self._device).record_event()

    def begin(self, mark: torch.cuda.Event) -> None:
        self._stream.wait_event(mark)

    def put(self, index: int, num_bytes: int, dst: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._pages[dst : dst + num_bytes].copy_(self._pinned[index][:num_bytes], non_blocking=True)
        self._copied[index].record(self._stream)

    def wait_staging(self, index: int) -> None:
        self._copied[index].synchronize()

    def finish(self) -> None:
        self._finished.record(self._stream)
        self._finished.synchronize()


class Pacer:
    """Spreads bytes over time: after a chunk, the next one waits until the first would be over at this rate."""

    def __init__(self, bytes_per_s: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_per_s = bytes_per_s  # None: as fast as they go
        self._clock = clock
        self._next_s = 0.0

    def wait(self, num_bytes: int, cancelled: threading.Event) -> None:
        """Until so many bytes may be copied, or the load is given up: a step may wait for that."""
        if self._bytes_per_s is None:
            return
        now_s = self._clock()
        if now_s < self._next_s and cancelled.wait(self._next_s - now_s):
            return
        self._next_s = max(now_s, self._next_s) + num_bytes / self._bytes_per_s


class Load:
    """A load under way."""

    def __init__(self, image: AdapterImage, chunks: list[Chunk], mark: Any) -> None:
        self.image = image
        self.chunks = chunks
        self.mark = mark
        self.cancelled = threading.Event()
        self.future: Future[None]


class Copier:
    """The copying thread: loads one after the other, in the order in which they were started."""

    def __init__(self, device: HostToDevice, pacer: Pacer) -> None:
        self._device = device
        self._pacer = pacer
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-copy", initializer=device.enter)

    def start(self, image: AdapterImage, layout: PageLayout, pages: tuple[int, ...]) -> Load:
        """Copy an image to its pages. Waits for nothing."""
        load = Load(image, cut_chunks(layout, pages, self._device.staging[0].size), self._device.mark())
        load.future = self._thread.submit(self._copy, load)
        return load

    def cancel(self, load: Load) -> bool:
        """Give a load up and wait until nothing is written any more. Returns: whether that took waiting."""
        load.cancelled.set()
        if load.future.cancel() or load.future.done():
            return False
        load.future.exception()
        return True

    def close(self) -> None:
        """End the thread; loads that have not begun are dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _copy(self, load: Load) -> None:
        device = self._device
        device.begin(load.mark)
        for number, chunk in enumerate(load.chunks):
            self._pacer.wait(chunk.num_bytes, load.cancelled)
            if load.cancelled.is_set():
                break
            index = number % NUM_STAGING
            device.wait_staging(index)
            staging = device.staging[index]
            for src, dst, num_bytes in chunk.pieces:
                staging[dst : dst + num_bytes] = load.image.data[src : src + num_bytes]
            device.put(index, chunk.num_bytes, chunk.dst)
        device.finish()
