"""Several prompts in one request are several requests: none shares its random numbers with another by accident.

A real engine answers, in the place of the replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deployments.http.api import create_api
from deployments.http.auth import ApiKeys
from deployments.router.gateway import Gateway
from deployments.settings.app import LimitSettings
from tests.serving.fakes import FakeAdapters, serve
from tests.support.one_engine import OneEngine

WAIT_S = 60
# Nearly any token: two samples are equal only if their random numbers are.
SAMPLING = {"temperature": 50.0, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}
Ids = tuple[int, ...]


@pytest.fixture(scope="module")
def backend() -> Iterator[OneEngine]:
    backend = OneEngine()
    yield backend
    backend.engine.close()


def _samples(backend: OneEngine, *bodies: dict[str, Any]) -> list[list[Ids]]:
    """Of each body, the tokens of its choices."""

    async def ask() -> list[list[Ids]]:
        gateway = Gateway(backend=backend, adapters=FakeAdapters(), prompts=backend.prompts, model_id="demo")
        transport = httpx.ASGITransport(app=create_api(gateway, ApiKeys(), LimitSettings()))
        found = []
        async with httpx.AsyncClient(transport=transport, base_url="http://chorus", timeout=WAIT_S) as client:
            for body in bodies:
                whole = {"model": "demo", **SAMPLING, **body}
                async with asyncio.timeout(WAIT_S):
                    response = await client.post("/v1/completions", json=whole)
                assert response.status_code == 200, response.text
                found.append([tuple(choice["token_ids"]) for choice in response.json()["choices"]])
        return found

    return asyncio.run(ask())


@pytest.mark.parametrize("prompts", [["zzqx"] * 4, [[122, 122, 113]] * 4, ["a", "b", "a", "b"]])
def test_prompts_without_a_seed_draw_one_each(backend: OneEngine, prompts: list[Any]):
    (samples,) = _samples(backend, {"prompt": prompts})
    assert len(set(samples)) == 4


def test_samples_of_equal_prompts_without_a_seed_all_differ(backend: OneEngine):
    (samples,) = _samples(backend, {"prompt": ["zzqx"] * 3, "n": 3})
    assert len(set(samples)) == 9


@pytest.mark.parametrize("seed", [0, 7, -1, 2**64 - 1])
def test_a_prompt_of_a_list_is_answered_as_if_sent_alone_with_that_seed(backend: OneEngine, seed: int):
    prompts = ["zzqx", "abc", "zzqx"]
    together, *alone = _samples(
        backend,
        {"prompt": prompts, "n": 2, "seed": seed},
        *({"prompt": prompt, "n": 2, "seed": seed} for prompt in prompts),
    )
    assert together == [ids for samples in alone for ids in samples]
    assert together[0] != together[1], "samples of one prompt share no random numbers"
    assert together[:2] == together[4:], "equal prompts with one seed are one request, sent twice"


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("num_prompts", [1, 2, 5])
def test_every_call_of_a_request_has_an_id_and_a_drawn_seed_of_its_own(num_prompts: int, n: int):
    served = serve()
    body = {"model": "demo", "prompt": ["a"] * num_prompts, "n": n}
    assert asyncio.run(served.client.post("/v1/completions", json=body)).status_code == 200
    for values in ({call.seed for call in served.backend.calls}, {call.request_id for call in served.backend.calls}):
        assert len(values) == num_prompts
