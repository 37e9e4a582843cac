"""Kept answers behind Ray: shared, begun when needed, empty after a death."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine
from typing import Any

import pytest
import ray

from deployments.kept.actor import SharedAnswers, connector
from tests.support.ray_session import ray_session as ray_session
from tests.support.waiting import until_async

NAMESPACE = "kept-answers"


pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def _run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 120.0))


def test_all_routers_share_one_and_the_death_of_one_empties_nothing():
    name = f"kept-{secrets.token_hex(4)}"
    connect = connector(name, NAMESPACE, 1000, 500, 600.0)

    async def run() -> None:
        one, other = SharedAnswers(connect), SharedAnswers(connect)
        assert await one.put("a", "1", b"x")
        assert not await one.put("a", "2", b"x" * 501)
        del one
        assert await other.get("a", "1") == b"x"
        assert await other.get("b", "1") is None
        assert await other.delete("a", "1")
        assert await other.get("a", "1") is None
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)

    _run(run())


def test_one_that_died_comes_back_empty_and_one_that_is_idle_leaves():
    name = f"kept-{secrets.token_hex(4)}"
    connect = connector(name, NAMESPACE, 1000, 500, 3.0)

    def is_gone() -> bool:
        try:
            ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            return True
        return False

    async def run() -> None:
        kept = SharedAnswers(connect)
        await kept.put("a", "1", b"x")
        ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=False)

        async def is_empty() -> bool:
            return await kept.get("a", "1") is None

        await until_async(is_empty, "the killed actor comes back empty")
        await until_async(is_gone, "the idle actor leaves", 60.0)
        assert await kept.put("a", "2", b"y"), "the next call begins one"
        assert await kept.get("a", "2") == b"y"

    _run(run())
    ray.kill(ray.get_actor(name, namespace=NAMESPACE), no_restart=True)
