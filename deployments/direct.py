"""A replica that answers HTTP itself: for those who have one on each node, behind a gateway of their own.

The API, the keys and the limits are a router's; what is missing is what a router has several replicas for: requests are
not placed by adapter or prefix, and a stream ends with its replica.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fastapi import FastAPI
from ray import serve

from deployments.calls import Call, StreamItem
from deployments.ingress import front
from deployments.replica.replica import Replica
from deployments.settings.app import AppArgs


class OwnReplica:
    """The replica of this process as a router's `Backend` (see there): nothing goes over a wire."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        return self._replica.stream(call)

    async def ping(self) -> None:
        await self._replica.ping()

    async def stats(self) -> list[dict[str, object]]:
        return [await self._replica.stats()]


@serve.ingress()
class DirectReplica(Replica):
    """Created by Serve; see `deployments.app`."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        """Raises: as a Replica and as `front`."""
        await super().__init__(args)
        self._api = await front(args, OwnReplica(self))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return self._api
