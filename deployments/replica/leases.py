"""What a replica wants of the adapter store."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Protocol

from adapter_store.records import AdapterRecord, Lease


class Store(Protocol):
    """The adapter store, as a replica uses it. Every method waits for a restarting store, then raises Refused."""

    async def resolve(self, name: str, source: str | None = None, *, wait_s: float | None = None) -> AdapterRecord: ...

    async def lease(self, name: str, source: str | None, version: str | None) -> tuple[Lease, object]:
        """The lease and the bytes of the image (a view of shared memory)."""
        ...

    async def lease_again(self, lease: Lease) -> Lease:
        """The image of a lease that was lost, leased anew; its bytes are not asked for."""
        ...

    def release(self, lease: Lease) -> Coroutine[Any, Any, None]: ...

    async def heartbeat(self, leases: tuple[Lease, ...]) -> tuple[str, ...]:
        """Keeps `leases`; returns the versions that there are none on any more."""
        ...
