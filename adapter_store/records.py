"""What passes between the store and its callers: plain, frozen, picklable values. Standard library only."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from adapter_store.errors import AdapterNameInvalid, StoreConfigInvalid

MAX_NAME_CHARS = 200
NUM_BUCKETS = 256
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_name(name: str) -> str:
    """Returns `name` when it is an adapter name: `[A-Za-z0-9][A-Za-z0-9._-]*` parts, joined by single slashes.

    Raises: AdapterNameInvalid. Checked before a name becomes part of any path or key.
    """
    if not isinstance(name, str):
        raise AdapterNameInvalid(str(name), "a name is a string")
    if not name or len(name) > MAX_NAME_CHARS:
        raise AdapterNameInvalid(name, f"it has {len(name)} characters, a name has 1 to {MAX_NAME_CHARS}")
    for part in name.split("/"):
        if ".." in part:
            raise AdapterNameInvalid(name, "'..' is not allowed")
        if not _SEGMENT.fullmatch(part):
            raise AdapterNameInvalid(
                name,
                f"the part {part!r} must begin with a letter or digit and hold only letters, digits, '.', '_', '-'",
            )
    return name


def bucket_of(name: str) -> int:
    """One of `NUM_BUCKETS` that `name` belongs to, for good."""
    return hashlib.blake2b(name.encode(), digest_size=1).digest()[0]


def shard_of(name: str, num_shards: int) -> int:
    """Which of a store's shards has `name`. Whole buckets belong to a shard."""
    return bucket_of(name) % num_shards


def version_digest(source: str, name: str, etags: Iterable[tuple[str, str]]) -> str:
    """The version of an adapter: sha256 (hex) over its source, its name and the sorted (file name, ETag) pairs."""
    hasher = hashlib.sha256()
    for part in (source, name, *(text for pair in sorted(etags) for text in pair)):
        encoded = part.encode()
        hasher.update(len(encoded).to_bytes(8, "little") + encoded)  # lengths, so that no two lists hash alike
    return hasher.hexdigest()


class AdapterState(StrEnum):
    """Where an image is, as the store sees it."""

    COLD = "cold"  # only in its source
    DISK = "disk"  # packed, on disk: what a cold image is called that the disk tier has
    FETCHING = "fetching"  # being read, checked and packed
    HOST = "host"  # packed, in host memory
    FAILED = "failed"  # refused or unreachable, remembered for a while


# Of what the catalog keeps. DISK is none of them: the disk tier says what it has, and may lose it at any time.
TRANSITIONS: dict[AdapterState, frozenset[AdapterState]] = {
    AdapterState.COLD: frozenset({AdapterState.FETCHING}),
    AdapterState.FETCHING: frozenset({AdapterState.HOST, AdapterState.FAILED, AdapterState.COLD}),
    AdapterState.HOST: frozenset({AdapterState.COLD}),
    AdapterState.FAILED: frozenset({AdapterState.FETCHING, AdapterState.COLD}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """What is known of one adapter. `version`, `rank` and `num_bytes` are None until they are known."""

    name: str
    source: str
    version: str | None
    state: AdapterState = AdapterState.COLD
    rank: int | None = None
    num_bytes: int | None = None
    reason: str | None = None  # why it is FAILED
    notices: tuple[str, ...] = ()  # what of it has no effect here, known once it was packed
    is_pinned: bool = False
    requests: float = 0.0  # those of late count more: each counts half after `traffic_half_life_s`


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A held image. It stays until `release`, or until `ttl_s` pass without a heartbeat of its owner."""

    name: str
    version: str
    source: str
    owner: str
    spec_digest: str
    manifest: dict[str, Any]
    image: Any  # the BlobStore's handle: an array, an ObjectRef of one, or a FileImage
    num_bytes: int
    rank: int
    ttl_s: float
    number: int = 0  # rises with each lease: an end that was meant for an earlier one does not end a later one


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterPage:
    """One page of a listing; `next_cursor` None means the end. What `unavailable` sources have is left out."""

    records: tuple[AdapterRecord, ...]
    next_cursor: str | None
    unavailable: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """An explicit row of the catalog: `name` stands for the adapter at `location` in the source named `source`.

    `location` is a name in that source ("" for the adapter's own; of a hub also `repository@revision`). `urls` gives
    instead, for an http source, a (file name, URL) pair for each file: presigned ones, for example. `sha256` pairs
    (file name, hex digest) are what its files must be.
    """

    name: str
    source: str
    location: str = ""
    urls: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # they may let whoever has them in
    sha256: tuple[tuple[str, str], ...] = ()
    has_lost_urls: bool = False  # it had URLs, which were in memory only


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatus:
    """Counters and sizes, for metrics and the console."""

    host_bytes: int
    host_used_bytes: int
    host_leased_bytes: int
    num_images: int
    num_leases: int
    num_fetching: int
    num_failed: int
    num_specs: int
    sources: tuple[str, ...]
    hits: int
    misses: int
    fetches: int
    fetched_bytes: int
    evictions: int
    rejections: int
    uptime_s: float
    disk_bytes: int
    disk_used_bytes: int
    num_disk_images: int
    disk_hits: int
    disk_evictions: int
    num_registered: int
    num_pinned: int
    degraded: tuple[str, ...]  # the tiers that are out of order now: "disk", "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreConfig:
    """The store's settings. Sizes are inclusive limits in bytes, times are seconds."""

    host_bytes: int = 1 << 30  # budget of all packed images; keep it below Ray's object store
    max_adapter_bytes: int = 256 << 20  # of one adapter's packed image; its weights file may have four times as many
    max_rank: int = 512
    lease_ttl_s: float = 30.0
    refresh_s: float = 10.0  # a re-uploaded adapter is seen within this
    missing_ttl_s: float = 1.0  # a name that no source has is asked for again after this
    failure_ttl_s: float = 30.0  # a refused adapter is looked at again after this
    unavailable_ttl_s: float = 2.0  # a source that was down is asked again after this
    stat_timeout_s: float = 5.0
    fetch_timeout_s: float = 120.0  # of one adapter, all retries included
    fetch_retries: int = 3  # of one part, in a row and without a byte gained, after the first try
    retry_base_s: float = 0.2
    max_parallel_fetches: int | None = None  # adapters from each source; None: 4 of a folder, 16 of what is far away
    part_bytes: int = 8 << 20  # of one ranged read
    max_parallel_parts: int = 8  # of one adapter
    fetch_bytes_per_s: int | None = None  # of all downloads together; None: as fast as they go
    niceness: int = 10  # of the threads that download, check and pack: 0 (like everybody) to 19 (only when idle)
    disk_path: str | None = None  # folder of the disk tier and of the index; None: neither survives a restart
    disk_bytes: int = 8 << 30  # budget of the disk tier
    traffic_half_life_s: float = 600.0  # a request counts half after this
    shard: int = 0  # this store is that one of `num_shards`; 0 leads: it writes down what is registered and pinned
    num_shards: int = 1  # that the names are spread over
    url_key_env: str | None = None  # variable with the key under which registered URLs are kept; None: in memory only

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.default is None and (value is None or item.name in ("disk_path", "url_key_env")):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise StoreConfigInvalid(item.name, f"{value!r} is not a number")
            minimum = 0 if item.name in ("fetch_retries", "retry_base_s", "refresh_s", "niceness", "shard") else None
            if (minimum is None and not value > 0) or (minimum is not None and not value >= minimum):
                raise StoreConfigInvalid(item.name, f"{value!r} must be {'at least 0' if minimum == 0 else 'positive'}")
        if not self.shard < self.num_shards <= NUM_BUCKETS:
            raise StoreConfigInvalid("shard", f"{self.shard} of {self.num_shards}: at most {NUM_BUCKETS}, from 0")
        if self.max_adapter_bytes > self.host_bytes:
            raise StoreConfigInvalid(
                "max_adapter_bytes",
                f"{self.max_adapter_bytes} is more than host_bytes ({self.host_bytes}); no such adapter could be held",
            )

    def has(self, name: str) -> bool:
        """Whether `name` belongs to this shard."""
        return self.num_shards == 1 or shard_of(name, self.num_shards) == self.shard
