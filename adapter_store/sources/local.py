"""Adapters in the folders under one root folder."""

from __future__ import annotations

import hashlib
import os
import stat as stat_module
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from adapter_store.errors import AdapterNameInvalid, SourceUnavailable
from adapter_store.image.inspect import CONFIG_FILE, KNOWN_FILES, WEIGHTS_FILE
from adapter_store.records import check_name
from adapter_store.sources.base import (
    RangeRead,
    SourceChanged,
    SourceFile,
    SourceKind,
    SourceListing,
    SourcePage,
)
from adapter_store.sources.threads import SourceThreads

MAX_DIGESTS = 100_000  # with more, the half that was used longest ago is forgotten, and taken again when needed
_MAX_LOOKUPS = 8  # each may have a file to hash, which keeps a core busy
_READ_CHUNK_BYTES = 1 << 20
_Identity = tuple[int, int, int]  # mtime_ns, size, inode


class LocalSource:
    """`root/<adapter name>/adapter_config.json` and the weights beside it.

    An ETag is the sha256 of the content, remembered by (mtime_ns, size, inode): a file that is copied, touched or
    restored keeps its version. A file rewritten in place with its old time set back looks the same; whoever finds that
    its content is another calls `distrust`. Links that lead out of the root are as if they were not
    there, but for those of a cache of huggingface_hub to its blobs.
    """

    kind: SourceKind = "local"

    def __init__(self, root: str | Path, name: str = "", niceness: int = 0) -> None:
        self.root = Path(os.path.realpath(root))
        self._inner = (self.root, *_blobs_of(self.root))
        self.name = name or f"file://{self.root}"
        self._digests: dict[Path, tuple[_Identity, str]] = {}  # the latest used last
        self._lock = threading.Lock()  # of the digests
        self._threads = SourceThreads(4, "adapters-local", niceness, _MAX_LOOKUPS)

    async def stat(self, name: str) -> SourceListing | None:
        """See `Source.stat`."""
        return await self._threads.look(self._stat, name)

    async def list(self, cursor: str | None, limit: int) -> SourcePage:
        """See `Source.list`. The order is by the parts of the names."""
        return await self._threads.look(self._list, cursor, limit)

    async def read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        """See `Source.read`."""
        await self._threads.read(self._read, name, file, part)

    def distrust(self, name: str) -> None:
        """See `Remembers.distrust`."""
        folder = self.root / check_name(name)
        with self._lock:
            for file_name in KNOWN_FILES:
                self._digests.pop(folder / file_name, None)

    async def close(self) -> None:
        """See `Source.close`."""
        self._threads.close()

    def _stat(self, name: str) -> SourceListing | None:
        folder = self._folder(name)
        if folder is None:
            return None
        files = []
        for file_name in KNOWN_FILES:
            path = folder / file_name
            try:
                if not path.is_file() or not self._inside(path):
                    continue
                etag, num_bytes = self._digest(path)
            except FileNotFoundError:
                continue  # it went away between two looks
            except OSError as error:
                raise self._unavailable(error) from error
            files.append(SourceFile(name=file_name, etag=etag, num_bytes=num_bytes, sha256=etag))
        known = {file.name for file in files}
        if not known & {CONFIG_FILE, WEIGHTS_FILE}:
            return None
        return SourceListing(files=tuple(sorted(files, key=lambda file: file.name)))

    def _read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        folder = self._folder(name)
        if folder is None:
            raise SourceChanged(name)
        path = folder / file.name
        try:
            if not self._inside(path):
                raise SourceChanged(name)
            with path.open("rb") as opened:
                if os.fstat(opened.fileno()).st_size != file.num_bytes:
                    raise SourceChanged(name)
                opened.seek(part.start + part.num_received)
                while part.num_missing:
                    chunk = opened.read(min(part.num_missing, _READ_CHUNK_BYTES))
                    if not chunk:
                        raise SourceChanged(name)
                    part.write(chunk)
        except FileNotFoundError as error:
            raise SourceChanged(name) from error
        except OSError as error:
            raise self._unavailable(error) from error

    def _folder(self, name: str) -> Path | None:
        folder = self.root / check_name(name)
        if not self.root.is_dir():
            raise SourceUnavailable(self.name, f"{str(self.root)!r} is not a folder")
        return folder if folder.is_dir() and self._inside(folder) else None

    def _inside(self, path: Path) -> bool:
        real = Path(os.path.realpath(path))
        return any(real.is_relative_to(folder) for folder in self._inner)

    def _digest(self, path: Path) -> tuple[str, int]:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat_module.S_ISREG(status.st_mode):
                raise FileNotFoundError(path)
            identity = (status.st_mtime_ns, status.st_size, status.st_ino)
            known = self._digests.get(path)
            if known is not None and known[0] == identity:
                self._remember(path, *known)  # the latest used last
                return known[1], status.st_size
            hasher, num_bytes = hashlib.sha256(), 0
            while chunk := file.read(_READ_CHUNK_BYTES):
                hasher.update(chunk)
                num_bytes += len(chunk)
            after = os.fstat(file.fileno())
        digest = hasher.hexdigest()
        if num_bytes == status.st_size and after.st_mtime_ns == status.st_mtime_ns:
            self._remember(path, identity, digest)  # a file that is being written is hashed again next time
        return digest, num_bytes

    def _remember(self, path: Path, identity: _Identity, digest: str) -> None:
        with self._lock:
            self._digests.pop(path, None)
            self._digests[path] = (identity, digest)
            if len(self._digests) > MAX_DIGESTS:
                for oldest in list(islice(self._digests, MAX_DIGESTS // 2)):
                    del self._digests[oldest]

    def _list(self, cursor: str | None, limit: int) -> SourcePage:
        after = tuple(cursor.split("/")) if cursor else ()
        if not self.root.is_dir():
            raise SourceUnavailable(self.name, f"{str(self.root)!r} is not a folder")
        names: list[str] = []
        try:
            for name in self._walk(self.root, (), after):
                names.append(name)
                if len(names) == limit:
                    return SourcePage(names=tuple(names), next_cursor=name)
        except OSError as error:
            raise self._unavailable(error) from error
        return SourcePage(names=tuple(names), next_cursor=None)

    def _walk(self, folder: Path, parts: tuple[str, ...], after: tuple[str, ...]) -> Iterator[str]:
        """Adapter names under `folder` whose parts sort after `after`, each folder before what is in it."""
        try:
            entries = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        except (PermissionError, FileNotFoundError):
            if folder == self.root:
                raise
            return  # lost+found of a volume, or gone since: what is in it could not be asked for either
        for entry in entries:
            here = (*parts, entry)
            if here < after[: len(here)]:
                continue  # everything below sorts before the cursor
            path = folder / entry
            try:
                name = check_name("/".join(here))
            except AdapterNameInvalid:
                continue  # it could not be asked for
            if path.is_symlink() and not self._inside(path):
                continue
            config = path / CONFIG_FILE
            if here > after and config.is_file() and self._inside(config):
                yield name
            if not path.is_symlink():  # a link could lead into a circle
                yield from self._walk(path, here, after)

    def _unavailable(self, error: OSError) -> SourceUnavailable:
        return SourceUnavailable(self.name, f"{type(error).__name__}: {error.strerror or error}")


def _blobs_of(root: Path) -> tuple[Path, ...]:
    """Where a root in a cache of huggingface_hub has its files: `models--a--b/snapshots/<commit>` has links to them."""
    for folder in (root, *root.parents):
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return (folder.parent / "blobs",)
    return ()
