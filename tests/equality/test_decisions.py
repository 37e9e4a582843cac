"""Decisions through the API over real engines: probabilities are PEFT's, and a text is read once for all questions."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import Tensor

from deployments.calls import Call, StreamItem
from deployments.http.api import create_api
from deployments.http.auth import ApiKeys
from deployments.router.gateway import Gateway
from deployments.router.prompts import Prompts
from deployments.settings.app import LimitSettings
from engine import LLM, AsyncEngine, EngineConfig
from engine.core.plan import StepPlan
from engine.engine import Engine
from engine.lora.image import AdapterImage
from engine.request import Request
from engine.runner.runner import TorchRunner
from tests.equality.conftest import Zoo
from tests.serving.fakes import FakeAdapters
from tests.support.tiny_model import reference_model

BLOCK = 16
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@dataclass
class EngineBackend:
    """One engine as a router's backend, with its adapters' images by name."""

    engine: AsyncEngine
    images: dict[str, AdapterImage]
    calls: list[Call] = field(default_factory=list)

    async def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        self.calls.append(call)
        image = None if call.adapter is None else self.images[call.adapter]
        request = Request(
            request_id=call.request_id,
            prompt_token_ids=call.prompt_token_ids,
            params=call.params,
            seed=call.seed,
            adapter=None if image is None else image.key,
            cache_salt=call.cache_salt,
            numbers=call.numbers,
        )
        async for delta in self.engine.generate(request, image):
            yield StreamItem(replica="one", deltas=(delta,))

    async def ping(self) -> None:
        self.engine.check()

    async def stats(self) -> list[dict[str, object]]:
        return []


@contextmanager
def served(base: Path, adapters: dict[str, Path], *, chat: bool) -> Iterator[tuple[EngineBackend, httpx.AsyncClient]]:
    llm = LLM(base, adapters, num_threads=1)  # packs the adapters
    config = EngineConfig(
        model=str(base), num_threads=1, block_size=BLOCK, max_num_batched_tokens=512, kv_cache_bytes=64 << 20
    )
    engine = AsyncEngine(Engine(config))
    backend = EngineBackend(engine, dict(llm._images))
    prompts = Prompts.load(str(base), None, LimitSettings())
    if chat:
        prompts._tokenizer._hf.chat_template = TEMPLATE
    gateway = Gateway(backend=backend, adapters=FakeAdapters(names=tuple(adapters)), prompts=prompts, model_id="demo")
    app = create_api(gateway, ApiKeys(is_local=True), LimitSettings())
    try:
        yield backend, httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://h")
    finally:
        engine.close()


def post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> Any:
    async def run() -> Any:
        async with asyncio.timeout(120):
            response = await client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    return asyncio.run(run())


@torch.no_grad()
def log_likelihood(base: Path, adapter: Path | None, prompt: str, answer: str) -> float:
    """Of an answer's bytes behind a prompt, in one forward of transformers, with PEFT's adapter."""
    ids = [*prompt.encode(), *answer.encode()]
    logits: Tensor = reference_model(base, adapter)(input_ids=torch.tensor([ids])).logits[0]
    logprobs = logits.log_softmax(-1)
    start = len(prompt.encode())
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(start, len(ids)))


def shares(base: Path, adapter: Path | None, prompt: str, answers: list[str]) -> list[float]:
    sums = [log_likelihood(base, adapter, prompt, answer) for answer in answers]
    weights = [math.exp(value - max(sums)) for value in sums]
    return [weight / sum(weights) for weight in weights]


CHOICE = {"type": "choice", "instructions": "Which?", "choices": [{"value": "red"}, {"value": "rest"}, {"value": "b"}]}
SCORE = {"type": "score", "instructions": "How?", "levels": [{"label": "low"}, {"label": "mid"}, {"label": "high"}]}
PREDICATE = {"type": "predicate", "instructions": "It is so."}


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "plain"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_probabilities_are_those_of_peft(arch: str, chat: bool, zoo: Zoo) -> None:
    base = zoo.base(arch, max_position_embeddings=512)
    adapters = {"r2": zoo.adapter(base, "r2", 2, rank=2), "r8": zoo.adapter(base, "r8", 8, rank=8)}
    models = ["demo", *adapters]
    text = "A red fox rests, and so on: it is a text of more than a few blocks of the cache."
    with served(base, adapters, chat=chat) as (_, client):
        body = {"model": models, "input": text, "questions": [PREDICATE, CHOICE, SCORE]}
        data = post(client, "/v1/decisions", body)["data"]
    before, after, lead = (f"<user>{text}\n\n", "<assistant>", "") if chat else (f"{text}\n\n", "\nAnswer:", " ")
    predicate = f"{before}It is so.\nIs this true of the text above? Answer yes or no.{after}"
    choice = f"{before}Which?\nChoices:\n- red\n- rest\n- b\nAnswer with one of the choices.{after}"
    score = f"{before}How?\nLevels, the lowest first:\n- low\n- mid\n- high\nAnswer with one of the levels.{after}"
    for name, decided in zip(models, data, strict=True):
        truth, chosen, level = decided["answers"]
        adapter = adapters.get(name)
        yes, _ = shares(base, adapter, predicate, [lead + "yes", lead + "no"])
        assert truth["probability"] == pytest.approx(yes, abs=1e-5)
        expected = shares(base, adapter, choice, [lead + "red", lead + "rest", lead + "b"])
        assert [each["probability"] for each in chosen["probabilities"]] == pytest.approx(expected, abs=1e-5)
        low, mid, high = shares(base, adapter, score, [lead + "low", lead + "mid", lead + "high"])
        assert [each["probability"] for each in level["probabilities"]] == pytest.approx([low, mid, high], abs=1e-5)
        assert level["score"] == pytest.approx(mid + 2 * high, abs=2e-5)
    assert data[0]["answers"] != data[1]["answers"]


@pytest.mark.parametrize("models", [["demo"], ["r2"], ["demo", "r2"]], ids=str)
def test_twenty_questions_about_a_text_of_two_thousand_tokens_read_it_once_for_each_model(
    models: list[str], zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in rows that the device computed."""
    base = zoo.base("llama", max_position_embeddings=4096)
    adapters = {"r2": zoo.adapter(base, "r2", 2, rank=2)}
    rng = random.Random(5)
    text = "".join(chr(97 + rng.randrange(26)) for _ in range(2000))
    questions = [{"type": "predicate", "instructions": f"Number {i} holds."} for i in range(20)]
    rows = 0
    submit = TorchRunner.submit

    def counting(self: TorchRunner, plan: StepPlan) -> Any:
        nonlocal rows
        rows += plan.num_rows
        return submit(self, plan)

    with served(base, adapters, chat=True) as (backend, client):
        monkeypatch.setattr(TorchRunner, "submit", counting)
        body = post(client, "/v1/decisions", {"model": models, "input": text, "questions": questions})
    places = 4  # of yes and no in a tokenizer of bytes: before them, and behind "y", "ye" and "n"
    assert len(backend.calls) == 20 * places * len(models)
    behind = max(len(call.prompt_token_ids) for call in backend.calls) - 2000
    assert rows >= 2000 * len(models)
    # Of a cached prefix whole blocks are spared: the last one of the text is read again with each question.
    # And what is behind a question's first place reads the last block of the question again.
    assert rows <= len(models) * (2000 + 20 * (behind + BLOCK) + 20 * (places - 1) * (BLOCK + places))
    usage = body["usage"]
    assert usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"] == rows
    assert all(len(decided["answers"]) == 20 for decided in body["data"])


def test_embeddings_through_the_api_are_those_of_the_engine(zoo: Zoo) -> None:
    base = zoo.base("llama")
    adapters = {"r2": zoo.adapter(base, "r2", 2, rank=2)}
    llm = LLM(base, adapters, num_threads=1)
    with served(base, adapters, chat=False) as (_, client):
        for model, name in (("demo", None), ("r2", "r2")):
            data = post(client, "/v1/embeddings", {"model": model, "input": ["abc", "a longer text"]})["data"]
            expected = llm.embed(["abc", "a longer text"], name)
            for item, output in zip(data, expected, strict=True):
                assert item["embedding"] == pytest.approx(output.embedding, abs=1e-6)
