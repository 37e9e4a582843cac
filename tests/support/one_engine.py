"""The demo's base behind a router, in one process: a real engine in the place of the replicas."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from deployments.calls import Call, StreamItem
from deployments.router.prompts import Prompts
from deployments.settings.app import LimitSettings
from engine.aio.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import Request

MODEL = str(Path(__file__).parents[2] / "demo" / "base")


class OneEngine:
    """A backend of one engine in this process."""

    def __init__(self) -> None:
        settings: dict[str, Any] = {
            "kv_cache_bytes": 1 << 24,
            "adapter_bytes": 1 << 20,
            "num_threads": 1,
            "block_size": 16,
        }
        self.engine = AsyncEngine(Engine(EngineConfig(model=MODEL, dtype="float32", **settings)))
        self.prompts = Prompts.load(MODEL, None, LimitSettings())

    async def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        request = Request(
            request_id=call.request_id,
            prompt_token_ids=call.prompt_token_ids,
            params=call.params,
            seed=call.seed,
            sample_index=call.sample_index,
            cache_salt=call.cache_salt,
            numbers=call.numbers,
        )
        async for delta in self.engine.generate(request):
            yield StreamItem(replica="one", deltas=(delta,))

    async def ping(self) -> None: ...

    async def stats(self) -> list[dict[str, object]]:
        return []
