"""A running server answers with vectors and probabilities: those of transformers and PEFT."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
import torch

from demo.checkpoint import load_adapter, load_base, load_tokenizer
from tests.e2e.server import KEY, Server

pytestmark = [
    pytest.mark.ray,
    # peft asks transformers in words that transformers has replaced.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
TEXTS = [f"line {i} of many voices\n" * (1 + i % 5) for i in range(80)]


def client_of(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120.0)


@torch.no_grad()
def last_states(name: str, texts: list[str]) -> list[torch.Tensor]:
    model: Any = load_base() if name == "demo" else load_adapter(name)
    tokenizer = load_tokenizer()
    rows = [model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True) for text in texts]
    return [torch.nn.functional.normalize(row.hidden_states[-1][0, -1], dim=0) for row in rows]


def test_vectors_of_many_texts_are_those_of_transformers_and_peft(server: Server) -> None:
    """As the client asks by itself: base64, which it turns into numbers."""

    async def ask() -> dict[str, Any]:
        async with client_of(server) as client:
            names = ("demo", "upper", "rot13")
            replies = await asyncio.gather(*(client.embeddings.create(model=name, input=TEXTS) for name in names))
            return dict(zip(names, replies, strict=True))

    for name, reply in asyncio.run(ask()).items():
        assert [item.index for item in reply.data] == list(range(len(TEXTS)))
        for item, expected in zip(reply.data[:10], last_states(name, TEXTS[:10]), strict=True):
            assert item.embedding == pytest.approx(expected.tolist(), abs=1e-5)


def test_one_call_asks_several_adapters_and_reads_the_text_once_for_each(server: Server) -> None:
    text = "a long text about many voices, and one base. " * 20
    names: Any = ["demo", "upper", "reverse"]
    questions: Any = [{"type": "predicate", "name": f"q{i}", "instructions": f"Number {i} holds."} for i in range(8)]

    async def ask() -> tuple[Any, list[Any]]:
        async with client_of(server) as client:
            together = await client.decisions.create(model=names, input=text, questions=questions)
            alone = [await client.decisions.create(model=name, input=text, questions=questions) for name in names]
            return together, alone

    together, alone = asyncio.run(ask())
    for body, one in zip(together.data, alone, strict=True):
        assert [answer["name"] for answer in body["answers"]] == [question["name"] for question in questions]
        found = [answer["probability"] for answer in body["answers"]]
        assert found == pytest.approx([answer.probability for answer in one.answers], abs=1e-5)
        assert all(0 < probability < 1 for probability in found)
    usage = together.usage
    assert usage.input_tokens_details.cached_tokens > 0.8 * usage.input_tokens
