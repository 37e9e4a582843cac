"""Where packed images lie: the store holds handles, a BlobStore turns arrays into handles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class BlobStore(Protocol):
    """Keeps arrays; a handle keeps its array until `drop`, or until the place that holds it is lost."""

    async def put(self, data: NDArray[np.uint8]) -> Any:
        """Keeps `data` and returns its handle."""

    async def has(self, handle: Any) -> bool:
        """Whether the array behind `handle` can still be had."""

    def drop(self, handle: Any) -> None:
        """Lets the array go."""


class MemoryBlobs:
    """The array is its own handle: for one process, without Ray. It is made read-only, as a shared one would be."""

    async def put(self, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        data.setflags(write=False)
        return data

    async def has(self, handle: Any) -> bool:
        return True

    def drop(self, handle: Any) -> None:
        """Nothing to do: the last holder of the array frees it."""


@dataclass(frozen=True, slots=True)
class FileImage:
    """A handle: an image in a file of this node. Whoever has mapped it keeps its bytes when the file is deleted."""

    path: str


def map_image(handle: FileImage) -> NDArray[np.uint8]:
    """The bytes of `handle`, mapped, not read. Raises: FileNotFoundError when the store has let it go, or died."""
    return np.memmap(handle.path, dtype=np.uint8, mode="r")
