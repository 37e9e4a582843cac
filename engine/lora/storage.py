"""Where the bytes of resident adapters are: borrowed from shared memory (CPU) or copied to the device.

Both hand out `SiteWeights`: tensors that look into one flat buffer at the manifest's offsets.
"""

from __future__ import annotations

import itertools
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from engine.lora.image import ITEM_BYTES, AdapterImage

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class SiteWeights(NamedTuple):
    """The LoRA weights of one site. Shapes: linear a [R, in], embedding a [vocabulary, R]; b [R, out]."""

    site: int
    a: Tensor
    b: Tensor
    scaling: float


class AdapterStorage(Protocol):
    """Bytes of resident adapters. Called from the step thread only; only `wait` blocks on a copy."""

    def load(self, image: AdapterImage) -> tuple[SiteWeights, ...]:
        """Start making `image` resident. Its weights may be read once `copied` has reported the key."""

    def copied(self) -> tuple[str, ...]:
        """Keys that became readable since the last call, in the order in which they were loaded."""

    def wait(self, timeout_s: float) -> None:
        """Until the oldest copy under way has ended (or failed), at most `timeout_s`; not at all when there is none."""

    def evict(self, key: str) -> None:
        """Forget a resident adapter. Nothing in flight reads it. Raises: KeyError if it is not resident."""


class BorrowedStorage:
    """CPU: weights are views into the image's own memory, so a load copies nothing.

    `engine.lora.image.prepare` has touched the pages before, off the step thread.
    """

    def __init__(self) -> None:
        self._resident: dict[str, AdapterImage] = {}
        self._fresh: list[str] = []

    def load(self, image: AdapterImage) -> tuple[SiteWeights, ...]:
        _check_new(image.key, self._resident)
        self._resident[image.key] = image
        self._fresh.append(image.key)
        return _views(_borrow(image.data), image)

    def copied(self) -> tuple[str, ...]:
        fresh = tuple(self._fresh)
        self._fresh.clear()
        return fresh

    def wait(self, timeout_s: float) -> None:
        """Nothing is ever under way."""

    def evict(self, key: str) -> None:
        del self._resident[key]
        if key in self._fresh:
            self._fresh.remove(key)


class DeviceStorage:
    """One copy of the whole flat buffer per adapter, made beside the step: by a thread, on a stream of its own.

    A copy out of pageable (shared) memory keeps its caller waiting however it is asked for; the thread is what waits.
    The buffer is allocated on the step thread's stream, whose allocator pool it returns to at eviction.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._copier = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-copy")
        self._buffers: dict[str, Tensor] = {}
        self._copying: dict[str, Future[None]] = {}

    def load(self, image: AdapterImage) -> tuple[SiteWeights, ...]:
        _check_new(image.key, self._buffers)
        buffer = torch.empty(image.num_bytes, dtype=torch.uint8, device=self._device)
        allocated = None
        if self._stream is not None:
            # The memory may have belonged to kernels still queued on the step's stream: the copy comes after them.
            allocated = torch.cuda.current_stream(self._device).record_event()
        self._buffers[image.key] = buffer
        self._copying[image.key] = self._copier.submit(self._copy, image, buffer, allocated)
        return _views(buffer, image)

    def copied(self) -> tuple[str, ...]:
        """Raises: whatever a copy raised (a device error is fatal to the engine)."""
        # One thread copies in order; a later copy may end while this looks at an earlier one.
        done = tuple(itertools.takewhile(lambda key: self._copying[key].done(), self._copying))
        for key in done:
            self._copying.pop(key).result()
        return done

    def wait(self, timeout_s: float) -> None:
        if self._copying:
            wait((next(iter(self._copying.values())),), timeout_s)

    def evict(self, key: str) -> None:
        del self._buffers[key]  # a copy still under way keeps the buffer alive until it has ended
        self._copying.pop(key, None)

    def close(self) -> None:
        """End the copying thread; copies that have not begun are dropped."""
        self._copier.shutdown(wait=True, cancel_futures=True)

    def _copy(self, image: AdapterImage, buffer: Tensor, allocated: torch.cuda.Event | None) -> None:
        with torch.inference_mode():  # thread-local: the buffer may be an inference tensor
            if self._stream is None or allocated is None:
                buffer.copy_(_borrow(image.data))
                return
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(allocated)
                buffer.copy_(_borrow(image.data), non_blocking=True)
                self._stream.record_event().synchronize()


def _check_new(key: str, resident: dict[str, AdapterImage] | dict[str, Tensor]) -> None:
    if key in resident:
        raise ValueError(f"adapter {key!r} is resident already: evict it before it is loaded again")


def _views(flat: Tensor, image: AdapterImage) -> tuple[SiteWeights, ...]:
    manifest = image.manifest
    item_bytes = ITEM_BYTES[manifest.dtype]
    typed = flat.view(_DTYPES[manifest.dtype])

    def view(offset: int, shape: tuple[int, int]) -> Tensor:
        return typed.as_strided(shape, (shape[1], 1), offset // item_bytes)

    return tuple(
        SiteWeights(e.site, view(e.a_offset, e.a_shape), view(e.b_offset, e.b_shape), e.scaling)
        for e in manifest.entries
    )


class _Readable:
    """Presents read-only memory to torch, which warns about every non-writable array it is given. Nobody writes."""

    def __init__(self, owner: np.ndarray) -> None:
        self.owner = owner  # kept alive by the array, and so by every tensor that looks into it
        self.__array_interface__ = {
            "version": 3,
            "shape": owner.shape,
            "typestr": "|u1",
            "data": (owner.ctypes.data, False),
        }


def _borrow(data: np.ndarray) -> Tensor:
    """A uint8 tensor that looks into `data` without a copy. It must not be written."""
    return torch.from_numpy(np.asarray(_Readable(data)))
