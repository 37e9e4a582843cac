"""When the content of a file is believed. docs/decisions/0012-how-an-adapter-is-believed.md says why so.

Pure: looks at bytes and at what is said of them, and reads nothing.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from adapter_store.sources.base import SourceFile

MIB = 1 << 20
# The part sizes that uploaders use by default, the commonest first: AWS's tools, rclone, mc, s3cmd, Hadoop, s5cmd.
PART_MIB = (8, 5, 16, 64, 15, 10, 50, 100, 128, 32, 25, 20, 256, 512, 1024)
_MD5 = re.compile(r'"?([0-9a-f]{32})"?', re.IGNORECASE)
_MULTIPART = re.compile(r'"?([0-9a-f]{32})-([1-9][0-9]{0,4})"?', re.IGNORECASE)

Buffer = bytes | memoryview
Belief = Literal["confirmed", "doubtful", "contradicted"]


class DigestMismatch(Exception):
    """Two reads agree on a content that its digest contradicts. `is_own`: the digest is ours, not the source's.

    It never leaves the store.
    """

    def __init__(self, message: str, *, is_own: bool) -> None:
        super().__init__(message)
        self.is_own = is_own


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one look at a file's content gave.

    "confirmed": a digest matches. "contradicted": the best digest is a sha256 and does not match. "doubtful": nothing
    tells, or an ETag that may be no digest at all does not match; two equal reads are then enough.
    """

    sha256: str
    belief: Belief
    digest: str = ""  # the one that decided
    is_own: bool = False
    has_digest_etag: bool = False  # the ETag has the form of a digest


class Hasher:
    """The digests of a file, taken as its bytes come. `update` is slow, and releases the interpreter lock."""

    def __init__(self, file: SourceFile, expected: str | None = None) -> None:
        self._sha256 = hashlib.sha256()
        needs_md5 = expected is None and file.sha256 is None and _MD5.fullmatch(file.etag) is not None
        self._md5 = _md5() if needs_md5 else None

    def update(self, content: Buffer) -> None:
        """The next bytes."""
        self._sha256.update(content)
        if self._md5 is not None:
            self._md5.update(content)

    @property
    def sha256(self) -> str:
        """Of all bytes so far, in hex."""
        return self._sha256.hexdigest()

    @property
    def md5(self) -> str | None:
        """Of all bytes so far, in hex; None where nothing asks for it."""
        return None if self._md5 is None else self._md5.hexdigest()


def examine(
    content: Buffer,
    file: SourceFile,
    expected: str | None = None,
    told: str | None = None,
    hasher: Hasher | None = None,
) -> Finding:
    """Compares `content` with the best digest there is; slow, unless `hasher` has seen it already.

    Best first: `expected`, this project's own; the listing's; `told`, which came with the answer; the ETag, as far as
    it looks like one that S3 computes.
    """
    if hasher is None:
        hasher = Hasher(file, expected)
        hasher.update(content)
    sha256 = hasher.sha256
    for digest in (expected, file.sha256, told):
        if digest is not None:
            belief: Belief = "confirmed" if digest.lower() == sha256 else "contradicted"
            return Finding(sha256=sha256, belief=belief, digest=digest.lower(), is_own=digest is expected)
    is_etag = _matches_etag(content, file.etag, hasher.md5)
    return Finding(
        sha256=sha256,
        belief="confirmed" if is_etag else "doubtful",
        digest=file.etag,
        has_digest_etag=is_etag is not None,
    )


def mismatch(file: SourceFile, finding: Finding) -> DigestMismatch:
    """Tells a contradiction, with both digests."""
    if finding.is_own:
        said = f"{finding.digest} is registered for it, or was seen under the same ETag before"
        remedy = (
            "upload the right file; if it is right, refresh the adapter, or register the new digest if there is one"
        )
    else:
        said = f"its source says {finding.digest}"
        remedy = "upload it again, with the right digest"
    return DigestMismatch(
        f"the content of {file.name} has sha256 {finding.sha256} in two equal reads, but {said}; {remedy}",
        is_own=finding.is_own,
    )


def _matches_etag(content: Buffer, etag: str, md5: str | None) -> bool | None:
    """Whether the ETag is the digest of `content` that S3 computes; None when it has not the form of one."""
    if simple := _MD5.fullmatch(etag):
        return md5 == simple[1].lower()
    if multipart := _MULTIPART.fullmatch(etag):
        num_parts = int(multipart[2])
        sizes = part_sizes(len(content), num_parts)
        return any(multipart_digest(content, size) == multipart[1].lower() for size in sizes)
    return None


def part_sizes(num_bytes: int, num_parts: int) -> Iterator[int]:
    """The part sizes with which uploaders may have made `num_parts` of `num_bytes`, the likeliest first."""
    if num_parts == 1:
        yield max(1, num_bytes)  # whatever it was, all went into one
        return
    smallest = -(-num_bytes // num_parts)
    tries = [mib * MIB for mib in PART_MIB] + [-(-smallest // MIB) * MIB, smallest]
    seen: set[int] = set()
    for size in tries:
        if size and size not in seen and -(-num_bytes // size) == num_parts:
            seen.add(size)
            yield size


def multipart_digest(content: Buffer, part_bytes: int) -> str:
    """The MD5 of the MD5s of the parts: S3's ETag of a multipart upload, without the number behind it."""
    view = memoryview(content)
    starts = range(0, max(1, len(view)), part_bytes)
    return _md5(b"".join(_md5(view[start : start + part_bytes]).digest() for start in starts)).hexdigest()


def _md5(content: Buffer = b"") -> hashlib._Hash:
    return hashlib.md5(content, usedforsecurity=False)  # as S3 does; allowed where policy forbids MD5 as protection


class EtagMemory:
    """Which sources have ETags that look like digests and are none (encrypted by a key service; some servers).

    Each file's ETag is tried all the same: a match costs one pass over the bytes, a second read costs the transfer.
    What is remembered is that a mismatch there is no sign of damage. Bounded: the least recently seen source goes.
    """

    def __init__(self, max_sources: int = 256) -> None:
        self._max_sources = max_sources
        self._sources: OrderedDict[str, None] = OrderedDict()

    def learn(self, source: str) -> bool:
        """Two equal reads contradicted an ETag of `source`. Returns whether that is news."""
        is_news = source not in self._sources
        self._sources[source] = None
        self._sources.move_to_end(source)
        if len(self._sources) > self._max_sources:
            self._sources.popitem(last=False)
        return is_news

    def __contains__(self, source: str) -> bool:
        return source in self._sources

    def __len__(self) -> int:
        return len(self._sources)
