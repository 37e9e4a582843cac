"""Files named by the sha256 of their content, under one folder: written whole or not at all, checked when read.

Blocking; the caller has threads for it. All raise OSError: a full disk, no permission, a broken device.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT_BYTES = 64
_PART = ".part"


class ObjectBroken(Exception):
    """A file's content is not what its name says."""


class ObjectFiles:
    """`<folder>/ab/cdef...`. A file that is being written ends in `.part` and is renamed when it is on the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, digest: str) -> Path:
        """Where the object lies, or would."""
        return self.folder / digest[:2] / digest[2:]

    def write(self, digest: str, data: NDArray[np.uint8]) -> None:
        """Puts `data` there as object `digest`; what is left of a failed try is deleted."""
        path = self.path(digest)
        part = path.with_name(path.name + _PART)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(part, data)
            part.rename(path)
            _sync_folder(path.parent)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def read(self, digest: str, num_bytes: int) -> NDArray[np.uint8]:
        """The object, aligned as a packed image is. Raises: ObjectBroken; FileNotFoundError."""
        with self.path(digest).open("rb", buffering=0) as file:
            found_bytes = os.fstat(file.fileno()).st_size
            if found_bytes != num_bytes:
                raise ObjectBroken(f"{digest} has {found_bytes} bytes instead of {num_bytes}")
            raw = np.empty(num_bytes + _ALIGNMENT_BYTES, dtype=np.uint8)
            skip = -raw.ctypes.data % _ALIGNMENT_BYTES
            data = raw[skip : skip + num_bytes]
            num_read = 0
            while num_read < num_bytes and (more := file.readinto(data.data[num_read:])):
                num_read += more
        found = hashlib.sha256(data.data).hexdigest()
        if num_read < num_bytes or found != digest:
            raise ObjectBroken(f"{digest} has the content of {found}")
        return data

    def has(self, digest: str, num_bytes: int) -> bool:
        """Whether there is a file of that size; its content is looked at when it is read."""
        try:
            return self.path(digest).stat().st_size == num_bytes
        except FileNotFoundError:
            return False

    def delete(self, digest: str) -> None:
        """Frees the object's bytes, if it is there."""
        self.path(digest).unlink(missing_ok=True)

    def sweep(self, is_wanted: Callable[[str], bool]) -> int:
        """Deletes every file that is not wanted, and what was being written when a process died; how many."""
        num_deleted = 0
        for path in self._files():
            if not is_wanted(path.parent.name + path.name):
                path.unlink(missing_ok=True)
                num_deleted += 1
        return num_deleted

    def _files(self) -> Iterator[Path]:
        if self.folder.is_dir():
            for folder in self.folder.iterdir():
                yield from folder.iterdir() if folder.is_dir() else ()


class FolderLock:
    """One process at a time has it; the system takes it back when that process ends, however it ends.

    `owner` is what the processes that may follow each other have in common; "" is anybody.
    """

    def __init__(self, path: Path, owner: str = "") -> None:
        self.path, self._owner = path, owner
        self._file: int | None = None

    @property
    def is_held(self) -> bool:
        """Whether it is ours."""
        return self._file is not None

    def try_acquire(self) -> bool:
        """Whether it is ours now."""
        if self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return False
            except BaseException:
                os.close(file)
                raise
            self._file = file
            with contextlib.suppress(OSError):  # a full disk: it is ours all the same
                os.ftruncate(file, 0)
                os.write(file, f"{os.getpid()}\n{self._owner}\n".encode())
        return True

    def holder(self) -> str:
        """Who has it, as that one wrote it down."""
        pid, owner = self._written()
        return f"process {pid or '?'}" + (f" of {owner}" if owner else "")

    @property
    def is_anothers(self) -> bool:
        """Whether somebody has it who is known to be of another owner."""
        owner = "" if self.is_held else self._written()[1]
        return bool(owner and self._owner) and owner != self._owner

    def _written(self) -> tuple[str, str]:
        try:
            pid, _, owner = self.path.read_text().partition("\n")
        except OSError:
            return "", ""
        return pid.strip(), owner.strip()

    def release(self) -> None:
        """Gives it back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def write_file(path: Path, data: NDArray[np.uint8]) -> None:
    """Writes `data` to a new file and waits until it is on the disk."""
    with path.open("wb", buffering=0) as file:
        left = data.data
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
