"""What a source is, and how one is described. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol

SourceKind = Literal["local", "s3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of an adapter: its name in the adapter's folder, what identifies its content, and its size."""

    name: str
    etag: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceListing:
    """The files of an adapter that matter to serving, as they were at one moment, sorted by name."""

    files: tuple[SourceFile, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The file names."""
        return tuple(file.name for file in self.files)

    @property
    def etags(self) -> tuple[tuple[str, str], ...]:
        """(name, ETag) of every file: what a version is a digest of."""
        return tuple((file.name, file.etag) for file in self.files)

    @property
    def num_bytes(self) -> int:
        """The bytes of all files."""
        return sum(file.num_bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcePage:
    """Adapter names in the source's order; `next_cursor` None means the end. A page may be short, even empty."""

    names: tuple[str, ...]
    next_cursor: str | None


class SourceChanged(Exception):
    """A file is no longer the one that was listed: list again and start over. It never leaves the store."""


class Source(Protocol):
    """A place with adapters. `name` identifies it in records, versions and settings.

    All methods raise SourceUnavailable when the place does not answer or refuses.
    """

    name: str
    kind: SourceKind

    async def stat(self, name: str) -> SourceListing | None:
        """The files of adapter `name` as they are now; None when it is not there."""

    async def list(self, cursor: str | None, limit: int) -> SourcePage:
        """At most `limit` adapter names after `cursor`."""

    async def fetch(self, name: str, listing: SourceListing) -> dict[str, bytes]:
        """The content of exactly the files of `listing`. Raises SourceChanged when one is another by now."""

    async def close(self) -> None:
        """Ends what the source keeps open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """How to open a source: `uri` is `file:///folder` or `s3://bucket/prefix`. Plain data: it travels to the actor.

    Credentials left out come from the usual chain (environment, profile, instance role): better than in settings.
    """

    uri: str
    name: str = ""  # default: the uri
    endpoint_url: str | None = None
    region: str | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    access_key_id: str | None = None
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 20.0
    max_attempts: int = 3
    max_connections: int = 16
    # "when_supported" also checks the bodies of servers that send checksums; some servers send wrong ones.
    response_checksums: Literal["when_required", "when_supported"] = "when_required"

    @property
    def label(self) -> str:
        """The name the source goes by."""
        return self.name or self.uri
