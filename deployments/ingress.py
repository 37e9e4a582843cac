"""The Router deployment: the HTTP API in front of the replicas, and what of it a replica alone has too."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from deployments.dialects.dialect import find_dialect
from deployments.http.api import create_api
from deployments.http.auth import ApiKeys
from deployments.kept.actor import SharedAnswers
from deployments.kept.actor import connector as kept_connector
from deployments.kept.answers import Answers, Kept, OwnAnswers
from deployments.listener import listening_host, take_calls_at_this_node_only
from deployments.router.gateway import Gateway
from deployments.router.prompts import Prompts
from deployments.router.replicas import ServeBackend
from deployments.router.streams import Backend
from deployments.settings.app import AppArgs
from deployments.store.actor import connectors, current_app
from deployments.store.client import StoreClient
from engine.checkpoint.generation import sampling_defaults
from engine.checkpoint.pooling import pooling_defaults

logger = logging.getLogger("ray.serve")


async def front(args: AppArgs, backend: Backend) -> FastAPI:
    """What answers HTTP for `backend`: keys, prompts, the adapter store, and the API made of them.

    Raises: ConfigError; ValueError when keys or other secrets are missing, or needed where it listens.
    """
    host = await asyncio.to_thread(listening_host)
    keys = ApiKeys.from_env(args.api_keys_env, args.admin_keys_env, host=host, is_open=args.open)
    tokenizer = args.engine_config().tokenizer
    prompts = await asyncio.to_thread(Prompts.load, args.model, tokenizer, args.limits)
    shards = connectors(args.adapters, f"{args.model_id} {args.model}", current_app())
    store = StoreClient(shards, wait_s=args.adapters.store_wait_s)
    await store.start()
    gateway = Gateway(
        backend=backend,
        adapters=store,
        prompts=prompts,
        model_id=args.model_id,
        sources=args.adapters.source_kinds,
        device=args.engine_config().device,
        allowed=args.adapters.allowed,
        max_resumes=0 if args.direct else args.max_resumes,  # the only replica that it knows is its own process
        defaults=sampling_defaults(args.model, args.generation_config, logger),
        kept=_kept(args),
        dialect=find_dialect(prompts.chat_template, args.tool_parser, args.reasoning_parser),
        pooling=pooling_defaults(args.model),
    )
    return create_api(gateway, keys, args.limits, args.cors)


def _kept(args: AppArgs) -> Kept:
    """A replica that answers HTTP itself shares with no other."""
    bounds = (args.responses.max_bytes, args.responses.max_bytes_per_key, args.responses.max_age_s)
    if args.direct:
        return OwnAnswers(Answers(*bounds))
    name = f"kept-responses.{current_app() or ''}.{'.'.join(map(str, bounds))}"
    return SharedAnswers(kept_connector(name, args.adapters.namespace, *bounds))


@serve.ingress()
class Router:
    """Authenticates, checks, tokenises, places and frames. Created by Serve; see `deployments.app`."""

    async def __init__(self, args: AppArgs, replicas: DeploymentHandle[Any]) -> None:  # type: ignore[misc]
        """Raises: as `front`."""
        take_calls_at_this_node_only()
        self._backend = ServeBackend(replicas, wait_s=args.replica_wait_s)
        self._backend.start()
        self._api = await front(args, self._backend)

    async def __del__(self) -> None:
        """Called by Serve after it has drained this router."""
        if (backend := getattr(self, "_backend", None)) is not None:
            await backend.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve after the constructor."""
        return self._api
