"""Where packed images lie: the store holds handles, a BlobStore turns arrays into handles.

When its place is full, an image goes into a file instead (`ImageFiles`), so that it can be served all the same.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

_FOLDER_PREFIX = "adapter-images-"


class BlobsFull(Exception):
    """There is no room for another array now. It never leaves the store."""


class BlobStore(Protocol):
    """Keeps arrays; a handle keeps its array until `drop`, or until the place that holds it is lost.

    `node` is the machine of this process, "" when there is only one.
    """

    node: str

    async def put(self, data: NDArray[np.uint8]) -> Any:
        """Keeps `data` and returns its handle. Raises: BlobsFull."""

    async def has(self, handle: Any) -> bool:
        """Whether the array behind `handle` can still be had."""

    async def view(self, handle: Any) -> NDArray[np.uint8] | None:
        """The array behind `handle`, without a copy; None when it cannot be had now."""

    def drop(self, handle: Any) -> None:
        """Lets the array go."""


class MemoryBlobs:
    """The array is its own handle: for one process, without Ray. It is made read-only, as a shared one would be."""

    node = ""

    async def put(self, data: NDArray[np.uint8]) -> NDArray[np.uint8]:
        data.setflags(write=False)
        return data

    async def has(self, handle: Any) -> bool:
        return True

    async def view(self, handle: Any) -> NDArray[np.uint8] | None:
        array: NDArray[np.uint8] = handle
        return array

    def drop(self, handle: Any) -> None:
        """Nothing to do: the last holder of the array frees it."""


@dataclass(frozen=True, slots=True)
class FileImage:
    """A handle: an image in a file of one node. Whoever has mapped it keeps its bytes when the file is deleted."""

    path: str
    node: str = ""  # that the file is on; "": all who see the handle are there


def map_image(handle: FileImage) -> NDArray[np.uint8]:
    """The bytes of `handle`, mapped, not read. Raises: FileNotFoundError when the store has let it go, or died."""
    return np.memmap(handle.path, dtype=np.uint8, mode="r")


def read_part(handle: FileImage, start: int, num_bytes: int) -> bytes:
    """A part of an image. Raises: OSError; FileNotFoundError as `map_image`."""
    with open(handle.path, "rb", buffering=0) as file:
        file.seek(start)
        return file.read(num_bytes)


class ImageFiles:
    """Images in files of a folder of their own, below `parent` (None: the system's for temporary files).

    Blocking, in any thread. The folder is made with the first file and deleted by `close`.
    """

    def __init__(self, parent: Path | None, node: str = "") -> None:
        self._parent, self._node = parent, node
        self._folder: Path | None = None
        self._lock = threading.Lock()

    def put(self, data: NDArray[np.uint8]) -> FileImage:
        """Writes `data`. Raises: OSError."""
        with self._lock:
            if self._folder is None or not self._folder.is_dir():
                self._folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=self._parent))
        file, path = tempfile.mkstemp(dir=self._folder)
        try:
            with open(file, "wb") as opened:
                data.tofile(opened)
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise
        return FileImage(path, self._node)

    def sweep(self) -> None:
        """Deletes what processes that were killed have left below `parent`.

        What another store has there goes with it: that one finds its images lost, and loads them again.
        """
        if self._parent is not None:
            for folder in self._parent.glob(f"{_FOLDER_PREFIX}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def drop(self, handle: FileImage) -> None:
        """Deletes the file."""
        Path(handle.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Deletes all of it."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
