"""The Router deployment: the HTTP API in front of the replicas."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from deployments.calls import Call, Fault, Refused, StreamItem
from deployments.http.api import create_api
from deployments.http.auth import ApiKeys
from deployments.router.gateway import Gateway
from deployments.router.prompts import Prompts
from deployments.router.streams import ReplicaLost
from deployments.settings.app import AppArgs
from deployments.store.actor import connector, current_app
from deployments.store.client import StoreClient

logger = logging.getLogger("ray.serve")

PING_TIMEOUT_S = 2.0
STATS_TIMEOUT_S = 5.0


class ServeBackend:
    """The replicas behind a deployment handle. Ray's exceptions end here."""

    def __init__(self, handle: DeploymentHandle[Any], *, wait_s: float) -> None:
        """`wait_s`: how long a call may wait for a replica to take it; Serve itself would wait for ever."""
        self._handle = handle
        self._wait_s = wait_s
        self._streaming = handle.options(stream=True)

    async def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        """See `deployments.router.streams.Backend`."""
        # In a context of its own: calls made within one HTTP request would share its internal id, by which Serve tells
        # waiting calls apart, and all but the first would wait for ever.
        response: Any = contextvars.Context().run(self._streaming.generate.remote, call)
        try:
            yield await self._accepted(response)
            async for item in response:
                yield item
        except RayActorError as error:
            raise ReplicaLost(f"{type(error).__name__} in request {call.request_id}") from error
        except BackPressureError as error:
            raise Refused(Fault(code="queue_full", message="all replicas are full; try again later")) from error
        finally:
            response.cancel()  # aborts what still runs; nothing to a finished call

    async def _accepted(self, response: Any) -> StreamItem:
        """The first item, which a replica sends before it does anything else."""
        try:
            async with asyncio.timeout(self._wait_s):
                item: StreamItem = await anext(response)
                return item
        except StopAsyncIteration as error:
            raise ReplicaLost("the stream ended before it began") from error
        except TimeoutError as error:
            message = f"no replica took the request within {self._wait_s:g} s; try again later"
            raise Refused(Fault(code="no_replica", message=message)) from error

    async def ping(self) -> None:
        """Raises: Refused when no replica answers in time."""
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await self._handle.ping.remote()
        except Exception as error:
            message = f"no replica answered within {PING_TIMEOUT_S:g} s ({type(error).__name__})"
            raise Refused(Fault(code="engine_dead", message=message)) from error

    async def stats(self) -> list[dict[str, object]]:
        """What each replica says; one that does not answer in time is left out."""
        response = await asyncio.to_thread(self._handle.broadcast, "stats")
        return list(await asyncio.wait_for(response.results_async(), STATS_TIMEOUT_S))


@serve.ingress()
class Router:
    """Authenticates, checks, tokenises, places and frames. Created by Serve; see `deployments.app`."""

    async def __init__(self, args: AppArgs, replicas: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        """Raises: ConfigError; ValueError when keys or other secrets are missing."""
        self._keys = ApiKeys.from_env(args.api_keys_env, args.admin_keys_env)
        self._limits = args.limits
        tokenizer = args.engine_config().tokenizer
        prompts = await asyncio.to_thread(Prompts.load, args.model, tokenizer, args.limits)
        connect = connector(args.adapters, f"{args.model_id} {args.model}", current_app())
        store = StoreClient(connect, wait_s=args.adapters.store_wait_s)
        await store.start()
        self._gateway = Gateway(
            backend=ServeBackend(replicas, wait_s=args.replica_wait_s),
            adapters=store,
            prompts=prompts,
            model_id=args.model_id,
            sources=args.adapters.source_names,
            allowed=args.adapters.allowed,
            max_resumes=args.max_resumes,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return create_api(self._gateway, self._keys, self._limits)
