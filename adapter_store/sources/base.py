"""What a source is, and how one is described. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

from adapter_store.errors import StoreConfigInvalid

SourceKind = Literal["local", "s3", "http", "hub", "catalog"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of an adapter: its name in the adapter's folder, what identifies its content, and its size."""

    name: str
    etag: str
    num_bytes: int
    sha256: str | None = None  # hex digest of the content, where the source tells it
    # Where its source reads it, if the adapter's name and the file's do not say it. It may let whoever has it in.
    location: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceListing:
    """The files of an adapter that matter to serving, as they were at one moment, sorted by name."""

    files: tuple[SourceFile, ...]
    origin: str = ""  # where they come from, if the adapter's name does not say it

    @property
    def names(self) -> tuple[str, ...]:
        """The file names."""
        return tuple(file.name for file in self.files)

    @property
    def etags(self) -> tuple[tuple[str, str], ...]:
        """(name, ETag) of every file, and the origin if there is one: what a version is a digest of."""
        origin = (("", self.origin),) if self.origin else ()
        return (*origin, *((file.name, file.etag) for file in self.files))

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


class ReadCancelled(Exception):
    """Nobody waits for this read any more. Raised in the source's thread; it never leaves the store."""


class RangeRead:
    """A range of a file on its way into memory: bytes `start` .. `start + len(target) - 1`.

    The source writes what arrives, in order, from any one thread; whoever waits sees `num_received` at any time, so
    that a broken read goes on behind its last byte.
    """

    def __init__(self, start: int, target: memoryview, pace: Callable[[int], None] | None = None) -> None:
        self.start = start
        self.num_received = 0
        self.sha256: str | None = None  # of the whole file, if the answer tells it
        self._target = target
        self._pace = pace
        self._is_cancelled = False

    @property
    def end(self) -> int:
        """Behind the last byte."""
        return self.start + len(self._target)

    @property
    def num_missing(self) -> int:
        """Bytes that have not been written yet."""
        return len(self._target) - self.num_received

    def write(self, chunk: bytes | memoryview) -> None:
        """The next bytes of the range. Blocks where the rate is limited.

        Raises: ReadCancelled; SourceChanged when more bytes come than the range has.
        """
        if self._is_cancelled:
            raise ReadCancelled
        if len(chunk) > self.num_missing:
            raise SourceChanged(f"{len(chunk) - self.num_missing} bytes more than were listed")
        self._target[self.num_received : self.num_received + len(chunk)] = chunk
        self.num_received += len(chunk)
        if self._pace is not None:
            self._pace(len(chunk))

    def cancel(self) -> None:
        """The next write raises ReadCancelled. Callable from any thread."""
        self._is_cancelled = True


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

    async def read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        """Writes a range of exactly the listed `file` to `part`.

        Raises SourceChanged when it is another by now. On SourceUnavailable what `part` has received is right, as far
        as the source's transport can tell.
        """

    async def close(self) -> None:
        """Ends what the source keeps open."""


@runtime_checkable
class Remembers(Protocol):
    """A source that remembers digests it computed."""

    def distrust(self, name: str) -> None:
        """Forgets what it remembers of the files of adapter `name`."""


def distrust(source: Source, name: str) -> None:
    """To be called when the content of adapter `name` was not what its digests say: they are computed again."""
    if isinstance(source, Remembers):
        source.distrust(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceConfig:
    """How to open a source. Plain data: it travels to the actor. `uri` is one of

        file:///folder        s3://bucket/prefix        https://host/prefix (or http)        hub://endpoint-host

    A hub is asked over https, or at `endpoint_url`. A bucket's credentials left out come from the usual chain
    (environment, profile, instance role): better than in settings. Secrets are the fields that its repr leaves out.
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
    max_attempts: int = 2  # of one request, before its body comes; whoever reads goes on after a broken body
    max_connections: int = 16  # that read; lookups have a few of their own
    # s3: "when_supported" also checks the bodies of servers that send checksums; some servers send wrong ones.
    request_checksums: Literal["when_required", "when_supported"] = "when_required"
    response_checksums: Literal["when_required", "when_supported"] = "when_required"
    requester_pays: bool = False  # s3
    verify_tls: bool | str = True  # False: any certificate; a path: a bundle of authorities
    token: str | None = field(default=None, repr=False)  # hub and https: sent as a bearer token
    # hub and https: where redirects may lead beside the source's own host, as host or host:port, shell patterns.
    redirect_hosts: tuple[str, ...] = ()
    revision: str = "main"  # hub: branch, tag or commit
    repos: tuple[str, ...] | None = None  # hub: shell patterns of the repositories that may be asked for; None: all
    # (field, environment variable) of each secret, for who opens the source elsewhere: see `without_secrets`.
    secrets_env: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """The name the source goes by."""
        return self.name or self.uri

    def without_secrets(self) -> SourceConfig:
        """Itself as it may be shown: secrets are named by the variables that hold them.

        Raises: StoreConfigInvalid when one is given by value only.
        """
        named = {name for name, _ in self.secrets_env}
        for secret in fields(self):
            if not secret.repr and getattr(self, secret.name) is not None and secret.name not in named:
                raise StoreConfigInvalid(
                    secret.name,
                    f"source {self.label!r} has it by value; what an actor is started with is kept readable by Ray: "
                    "name the environment variable that holds it in secrets_env",
                )
        nothing: dict[str, Any] = {secret.name: None for secret in fields(self) if not secret.repr}
        return replace(self, **nothing)

    def with_secrets(self, environment: Mapping[str, str]) -> SourceConfig:
        """Itself with what the named variables hold. Raises: StoreConfigInvalid naming a variable that is not set."""
        for secret, variable in self.secrets_env:
            if not environment.get(variable):
                raise StoreConfigInvalid(
                    secret, f"source {self.label!r}: the environment variable {variable!r} is not set on this node"
                )
        held: dict[str, Any] = {secret: environment[variable] for secret, variable in self.secrets_env}
        return replace(self, **held)
