"""What a replica tells each router of itself: how it is written and read. Flat, versioned, standard library only.

A report is full, or says what changed since the one before it, whose number is one less. Names travel as 64-bit
digests: two names with one digest share what is known of them, which costs time, never an answer.

Little-endian: version u8, kind u8 (1: full), epoch u64, number u32, load u32, capacity u32, then four counts u32
(names, lost names, hints, lost hints), their digests u64 each in this order, and for each name a tier u8.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache

VERSION = 1
_HEADER = struct.Struct("<BBQIIIIIII")
HEADER_BYTES = _HEADER.size
_FULL = 1
_MAX_INT = 0xFFFFFFFF

HOST, VRAM = 1, 2
"""Where a replica has an adapter: in its host memory; in the memory of its device. The higher, the nearer."""

PERIOD_S = 1.0
"""What changed is told once in so long, all together."""

HEARTBEAT_S = 2.0
"""A replica of which nothing else is new reports so often: silence for long tells of a replica that hangs."""


class BadReport(ValueError):
    """Bytes that are no report of this version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """`epoch`: drawn by who writes; numbers of different epochs do not follow each other."""

    epoch: int
    number: int
    load: int  # requests in hand
    capacity: int  # sequences it can run at once
    is_full: bool = False
    names: tuple[tuple[int, int], ...] = ()  # digest of a name, `HOST` or `VRAM`
    lost_names: tuple[int, ...] = ()
    hints: tuple[int, ...] = ()  # of prompts that came more than once lately
    lost_hints: tuple[int, ...] = ()


@lru_cache(maxsize=1 << 16)
def name_digest(name: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def pack(report: Report) -> bytes:
    """Raises: struct.error when a digest is not an unsigned 64-bit number."""
    names, counts = report.names, (report.names, report.lost_names, report.hints, report.lost_hints)
    digests = [digest for digest, _ in names]
    words = [*digests, *report.lost_names, *report.hints, *report.lost_hints]
    head = _HEADER.pack(
        VERSION,
        _FULL if report.is_full else 0,
        report.epoch,
        report.number & _MAX_INT,
        min(max(0, report.load), _MAX_INT),
        min(max(0, report.capacity), _MAX_INT),
        *map(len, counts),
    )
    return head + struct.pack(f"<{len(words)}Q", *words) + bytes(tier for _, tier in names)


def unpack(data: bytes) -> Report:
    """Raises: BadReport."""
    if len(data) < HEADER_BYTES:
        raise BadReport(f"a report of {len(data)} bytes; its header alone has {HEADER_BYTES}")
    version, kind, epoch, number, load, capacity, *counts = _HEADER.unpack_from(data)
    if version != VERSION or kind > _FULL:
        raise BadReport(f"a report of version {version} and kind {kind}; this side reads version {VERSION}")
    num_words = sum(counts)
    if len(data) != HEADER_BYTES + 8 * num_words + counts[0]:
        raise BadReport(f"a report of {len(data)} bytes that announces {counts} entries")
    words = struct.unpack_from(f"<{num_words}Q", data, HEADER_BYTES)
    ends = [sum(counts[: i + 1]) for i in range(4)]
    tiers = data[HEADER_BYTES + 8 * num_words :]
    if any(not HOST <= tier <= VRAM for tier in tiers):
        raise BadReport(f"a report with a tier that is none of {HOST} and {VRAM}")
    return Report(
        epoch=epoch,
        number=number,
        load=load,
        capacity=capacity,
        is_full=kind == _FULL,
        names=tuple(zip(words[: ends[0]], tiers, strict=True)),
        lost_names=words[ends[0] : ends[1]],
        hints=words[ends[1] : ends[2]],
        lost_hints=words[ends[2] :],
    )


def follows(report: Report, epoch: int, number: int) -> bool:
    """Whether `report` says what changed since report `number` of `epoch`."""
    return report.epoch == epoch and report.number == (number + 1) & _MAX_INT
