"""Where the bytes of resident adapters are: borrowed from shared memory (CPU) or copied into pages of the KV cache.

Both hand out `SiteWeights`: tensors that look into that memory.
"""

from __future__ import annotations

import itertools
from concurrent.futures import wait
from typing import NamedTuple, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from engine.errors import AdapterError
from engine.lora.copier import Copier, Load
from engine.lora.image import ITEM_BYTES, AdapterImage, touch_pages
from engine.lora.pages import lay_out

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


class SiteWeights(NamedTuple):
    """The LoRA weights of one site. Shapes: linear a [R, in], embedding a [vocabulary, R]; b [R, out].

    Of int8 codes `scales` [2, R], float32, say what one counts in: scales[0] in a, scales[1] in b.
    """

    site: int
    a: Tensor
    b: Tensor
    scaling: float
    scales: Tensor | None = None


class AdapterStorage(Protocol):
    """Bytes of resident adapters. Called from the step thread only.

    Only `wait` blocks on a copy, and `evict` on one that is given up; `num_waits` counts how often they did.
    """

    num_waits: int

    def prepare(self, image: AdapterImage) -> None:
        """What can be done for a load before its step. From any thread, before `image` is handed to the engine."""

    def load(self, image: AdapterImage, pages: tuple[int, ...]) -> tuple[SiteWeights, ...]:
        """Start making `image` resident in `pages`. Its weights may be read once `copied` has reported the key."""

    def copied(self) -> tuple[str, ...]:
        """Keys that became readable since the last call, in the order in which they were loaded."""

    def wait(self, timeout_s: float) -> None:
        """Until the oldest copy under way has ended (or failed), at most `timeout_s`; not at all when there is none."""

    def evict(self, key: str) -> None:
        """Forget a resident adapter: its pages may be written. Nothing in flight reads it.

        Raises: KeyError if it is not resident.
        """

    def close(self) -> None:
        """Give up the copies under way and end the thread that makes them. The storage is of no use afterwards."""


class BorrowedStorage:
    """CPU: weights are views into the image's own memory, so a load copies nothing."""

    num_waits = 0

    def __init__(self) -> None:
        self._resident: dict[str, AdapterImage] = {}
        self._fresh: list[str] = []

    def prepare(self, image: AdapterImage) -> None:
        """Takes the page faults, and makes the views: a millisecond for hundreds of sites."""
        touch_pages(image)
        image.weights = _borrowed_views(image)

    def load(self, image: AdapterImage, pages: tuple[int, ...] = ()) -> tuple[SiteWeights, ...]:
        """`pages` has none."""
        assert not pages, f"adapter {image.key!r} is to be borrowed, not copied to pages {pages}"
        _check_new(image.key, self._resident)
        self._resident[image.key] = image
        self._fresh.append(image.key)
        if image.weights is None:
            image.weights = _borrowed_views(image)
        return cast("tuple[SiteWeights, ...]", image.weights)

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

    def close(self) -> None:
        """There is no thread."""


class PagedStorage:
    """Adapters in pages of the KV cache's buffer, copied there beside the steps.

    Invariant: pages are given back to sequences only when no copy into them is under way.
    """

    def __init__(self, buffer: Tensor, page_bytes: int, copier: Copier) -> None:
        self._buffer = buffer  # uint8, of all pages
        self._page_bytes = page_bytes
        self._copier = copier
        self._resident: dict[str, AdapterImage] = {}
        self._copying: dict[str, Load] = {}
        self.num_waits = 0

    def prepare(self, image: AdapterImage) -> None:
        """Nothing: the copying thread takes the page faults."""

    def load(self, image: AdapterImage, pages: tuple[int, ...]) -> tuple[SiteWeights, ...]:
        _check_new(image.key, self._resident)
        layout = lay_out(image.manifest, self._page_bytes)
        if len(pages) != sum(layout.runs):
            raise AdapterError(f"adapter {image.key!r} needs runs of {layout.runs} pages, the plan gives {pages}")
        self._copying[image.key] = self._copier.start(image, layout, pages)
        self._resident[image.key] = image
        starts = [page * self._page_bytes for page in layout.first_pages(pages)]
        offsets = [tuple(starts[run] + offset for run, offset in places) for places in layout.tensors]
        return _views(self._buffer, image, offsets)

    def copied(self) -> tuple[str, ...]:
        """Raises: whatever a copy raised (a device error is fatal to the engine)."""
        # One thread copies in order; a later copy may end while this looks at an earlier one.
        done = tuple(itertools.takewhile(lambda key: self._copying[key].future.done(), self._copying))
        for key in done:
            self._copying.pop(key).future.result()
        return done

    def wait(self, timeout_s: float) -> None:
        oldest = next(iter(self._copying.values()), None)
        if oldest is not None and not oldest.future.done():
            self.num_waits += 1
            wait((oldest.future,), timeout_s)

    def evict(self, key: str) -> None:
        del self._resident[key]
        load = self._copying.pop(key, None)
        if load is not None:
            self.num_waits += self._copier.cancel(load)

    def close(self) -> None:
        for load in self._copying.values():
            load.cancelled.set()
        self._copier.close()


def _check_new(key: str, resident: dict[str, AdapterImage]) -> None:
    if key in resident:
        raise ValueError(f"adapter {key!r} is resident already: evict it before it is loaded again")


def _borrowed_views(image: AdapterImage) -> tuple[SiteWeights, ...]:
    """As in the image, every tensor starts at its manifest's offset."""
    item_bytes = ITEM_BYTES[image.manifest.dtype]
    offsets = [tuple(offset for offset, _ in e.extents(item_bytes)) for e in image.manifest.entries]
    return _views(_borrow(image.data), image, offsets)


def _views(flat: Tensor, image: AdapterImage, offsets: list[tuple[int, ...]]) -> tuple[SiteWeights, ...]:
    """`flat`: uint8, of all bytes. `offsets`: of each entry's tensors, in its bytes."""
    item_bytes = ITEM_BYTES[image.manifest.dtype]
    typed = flat.view(_DTYPES[image.manifest.dtype])
    floats = flat.view(torch.float32) if image.manifest.dtype == "int8" else typed

    def view(offset: int, shape: tuple[int, int]) -> Tensor:
        return typed.as_strided(shape, (shape[1], 1), offset // item_bytes)

    return tuple(
        SiteWeights(
            e.site,
            view(a, e.a_shape),
            view(b, e.b_shape),
            e.scaling,
            *(floats.as_strided((2, e.rank), (e.rank, 1), offset // 4) for offset in scales),
        )
        for e, (a, b, *scales) in zip(image.manifest.entries, offsets, strict=True)
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
