"""Vectors over HTTP, as OpenAI's client asks for them; scores and rankings that are made of them. Over fakes."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import openai
import pytest

from deployments.calls import Call, Fault, StreamItem
from deployments.http.vectors import replies
from deployments.router import vectors
from deployments.router.vectors import Answered, Vectors
from engine.pooling import Pool, Pooling, PoolingDefaults
from tests.serving.fakes import FakeBackend, Served, counted, serve


def post(path: str, body: dict[str, Any], served: Served | None = None) -> Any:
    return asyncio.run((served or serve()).client.post(path, json=body))


def ask(served: Served, call: Callable[[openai.AsyncOpenAI], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        client = openai.AsyncOpenAI(base_url="http://h/v1", api_key="x" * 20, http_client=served.client, max_retries=0)
        return await call(client)

    return asyncio.run(run())


def refusal(path: str, body: dict[str, Any], served: Served | None = None) -> tuple[int, str | None, str]:
    response = post(path, body, served)
    error = response.json()["error"]
    return response.status_code, error["param"], error["message"]


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
@pytest.mark.parametrize("model", ["demo", "alpha"])
def test_the_official_client_reads_vectors_in_both_encodings(encoding: str | None, model: str) -> None:
    """It asks for base64 when it is told nothing."""
    served = serve()
    fields: dict[str, Any] = {} if encoding is None else {"encoding_format": encoding}
    reply = ask(served, lambda client: client.embeddings.create(model=model, input=["One base", "voices"], **fields))
    assert [item.index for item in reply.data] == [0, 1]
    assert (reply.model, reply.usage.prompt_tokens, reply.usage.total_tokens) == (model, 14, 14)
    for item, call in zip(reply.data, sorted(served.backend.calls, key=lambda c: c.request_id), strict=True):
        vector = item.embedding
        if encoding == "base64":  # asked for by name, it is given as it came
            vector = struct.unpack("<8f", base64.b64decode(vector))
        assert vector == pytest.approx(counted(call), abs=1e-6)
        assert call.adapter == (None if model == "demo" else model)


@pytest.mark.parametrize("given", ["abc", ["abc"], [97, 98, 99], [[97, 98, 99]]], ids=str)
def test_a_text_and_its_tokens_have_the_same_vector(given: Any) -> None:
    body = post("/v1/embeddings", {"model": "demo", "input": given}).json()
    assert body["data"] == post("/v1/embeddings", {"model": "demo", "input": "abc"}).json()["data"]
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


def test_many_inputs_keep_their_order_and_only_so_many_run_at_a_time() -> None:
    most = 0

    def numbers(call: Any) -> list[float]:
        nonlocal most
        most = max(most, served.backend.open_streams)
        return [float(len(call.prompt_token_ids))]

    served = serve(FakeBackend(numbers=numbers, pause_s=0.001))
    texts = ["x" * (1 + i % 7) for i in range(200)]
    data = post("/v1/embeddings", {"model": "demo", "input": texts}, served).json()["data"]
    assert [item["embedding"] for item in data] == [[float(len(text))] for text in texts]
    assert 1 < most <= 32
    assert served.backend.open_streams == 0


def test_what_the_model_says_of_pooling_is_asked_and_a_request_may_say_otherwise() -> None:
    served = serve(pooling=PoolingDefaults(pool=Pool.MEAN, normalize=True, is_matryoshka=True))
    post("/v1/embeddings", {"model": "demo", "input": "x", "dimensions": 3, "normalize": False}, served)
    post("/embed", {"inputs": "x"}, served)
    asked = [call.numbers for call in served.backend.calls]
    assert asked == [Pooling(pool=Pool.MEAN, normalize=False, dimensions=3), Pooling(pool=Pool.MEAN)]


def test_one_that_fails_fails_the_request_and_leaves_nothing_running() -> None:
    served = serve(FakeBackend(fault=Fault(code="context_length_exceeded", message="the prompt has 9 tokens")))
    status, _, message = refusal("/v1/embeddings", {"model": "demo", "input": ["x"] * 99}, served)
    assert (status, message) == (400, "the prompt has 9 tokens")
    assert served.backend.open_streams == 0


FULL = Fault(code="queue_full", message="4 requests wait and max_queued_requests is 4; try again later")


class Queue(FakeBackend):
    """A replica whose queue has room for so many, of which others take a part for a while."""

    room = 4
    taken = 0  # by others
    most = 0
    turned_away = 0

    async def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        if self.open_streams + self.taken >= self.room:
            self.turned_away += 1
            self.taken -= self.taken > 0 and self.turned_away % 3 == 0
            yield StreamItem(replica="replica-1", fault=FULL)
            return
        self.most = max(self.most, self.open_streams + 1)
        async for item in super().stream(call):
            yield item


def test_a_request_for_more_than_a_queue_holds_takes_what_room_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "FULL_PAUSE_S", 0.0)
    queue = Queue(pause_s=0.001)
    texts = ["x" * (1 + i % 7) for i in range(150)]
    data = post("/v1/embeddings", {"model": "demo", "input": texts, "normalize": False}, serve(queue)).json()["data"]
    assert [sum(item["embedding"]) for item in data] == [len(text) for text in texts]
    assert queue.turned_away > 0
    assert queue.most == queue.room


def test_a_request_that_finds_no_room_at_all_is_told_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "FULL_PAUSE_S", 0.0)
    queue = Queue()
    queue.taken = 4000
    status, _, message = refusal("/v1/embeddings", {"model": "demo", "input": ["x"] * 5}, serve(queue))
    assert (status, message) == (429, FULL.message)
    assert queue.turned_away < 20


@pytest.mark.parametrize(("num_others", "status"), [(10, 200), (4000, 429)])
def test_a_queue_that_others_fill_on_the_way_is_waited_for_and_not_for_ever(
    num_others: int, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "FULL_PAUSE_S", 0.0)

    def fill(call: Call) -> list[float]:
        queue.taken = num_others
        return [1.0]

    queue = Queue(numbers=fill)
    queue.room = 1
    response = post("/v1/embeddings", {"model": "demo", "input": ["x"] * 3}, serve(queue))
    assert response.status_code == status, response.text


def test_a_lost_replica_is_not_noticed() -> None:
    served = serve(FakeBackend(deaths=[0]))
    assert post("/v1/embeddings", {"model": "demo", "input": "x"}, served).status_code == 200
    assert len(served.backend.calls) == 2


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"dimensions": 5}, "dimensions", "5: this model was not trained for vectors that are cut"),
        ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input": []}, "input", "the list is empty"),
        ({"input": ""}, "input", "the prompt has no tokens"),
        ({"input": ["x", 5]}, "input", "a list of"),
        ({"input": [[999]]}, "input", "token id 999 is outside"),
        ({"normalise": True}, "normalise", "did you mean 'normalize'"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "send shorter ones"),
        ({"adapter_source": "local"}, "adapter_source", "model 'demo' is the base"),
        ({"model": "no such"}, None, ""),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict[str, Any], param: str | None, message: str) -> None:
    status, named, said = refusal("/v1/embeddings", {"model": "demo", "input": "x", **fields})
    assert status in (400, 404)
    assert message in said
    assert named == param or param is None


def test_a_model_without_vectors_says_why() -> None:
    served = serve(pooling=PoolingDefaults(refusal="its modules.json has the step 'Dense', which is not served"))
    for path, body in (
        ("/v1/embeddings", {"model": "demo", "input": "x"}),
        ("/v1/score", {"text_1": "x", "text_2": "y"}),
        ("/rerank", {"query": "x", "documents": ["y"]}),
    ):
        status, param, message = refusal(path, body, served)
        assert (status, param) == (400, "model")
        assert "the step 'Dense'" in message


def test_fields_without_effect_are_named() -> None:
    body = {"model": "demo", "input": "x", "prompt_cache_key": "k", "user": "u", "safety_identifier": "s"}
    response = post("/v1/embeddings", body | {"encoding_format": None, "priority": 0})
    assert response.headers["x-chorus-inert"] == "prompt_cache_key, priority, user"


def cosine(a: str, b: str) -> float:
    va, vb = ([sum(i % 8 == kind for i in text.encode()) for kind in range(8)] for text in (a, b))
    return sum(x * y for x, y in zip(va, vb, strict=True)) / math.sqrt(sum(x * x for x in va) * sum(y * y for y in vb))


@pytest.mark.parametrize(
    ("fields", "pairs"),
    [
        ({"text_1": "abc", "text_2": "abd"}, [("abc", "abd")]),
        ({"text_1": "abc", "text_2": ["abc", "xyz"]}, [("abc", "abc"), ("abc", "xyz")]),
        ({"text_1": ["a", "b"], "text_2": ["aab", "b"]}, [("a", "aab"), ("b", "b")]),
        ({"queries": "abc", "documents": ["abc", "xyz"]}, [("abc", "abc"), ("abc", "xyz")]),
        ({"queries": ["a", "b"], "items": ["aab", "b"]}, [("a", "aab"), ("b", "b")]),
    ],
)
@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_are_cosines_of_pairs(path: str, fields: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    data = post(path, fields).json()["data"]
    assert [(item["index"], item["object"]) for item in data] == [(i, "score") for i in range(len(pairs))]
    assert [item["score"] for item in data] == pytest.approx([cosine(*pair) for pair in pairs], abs=1e-6)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "text_1", "given are none; send text_1 and text_2, or queries and documents"),
        ({"text_1": "a"}, "text_1", "given are text_1"),
        ({"text_1": "a", "documents": "b"}, "text_1", "given are text_1, documents"),
        ({"text_1": ["a", "b"], "text_2": ["c", "d", "e"]}, "text_2", "3 texts, and text_1 has 2; send one there"),
        ({"text_1": ["a", 5], "text_2": "c"}, "text_1", "[1] is 5, not a text"),
    ],
)
def test_scores_of_what_are_no_pairs_are_refused(fields: dict[str, Any], param: str, message: str) -> None:
    status, named, said = refusal("/v1/score", fields)
    assert (status, named) == (400, param)
    assert message in said


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_the_likest_document_comes_first(path: str) -> None:
    documents = ["hhh", {"text": "abc"}, "abd"]
    body = post(path, {"model": "alpha", "query": "abc", "documents": documents, "top_n": 2}).json()
    assert [result["index"] for result in body["results"]] == [1, 2]
    assert [result["document"]["text"] for result in body["results"]] == ["abc", "abd"]
    scores = [result["relevance_score"] for result in body["results"]]
    assert scores == pytest.approx([1.0, cosine("abc", "abd")], abs=1e-6)
    bare = post(path, {"query": "abc", "documents": ["hhh", "abc"], "return_documents": False, "top_n": 0}).json()
    assert [list(result) for result in bare["results"]] == [["index", "relevance_score"]] * 2


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"documents": []}, "documents", "is neither a text nor a list"),
        ({"documents": "abc"}, "documents", "is not a list of documents"),
        ({"documents": [{"text": "a", "title": "b"}]}, "documents", 'has the field "title"'),
        ({"documents": [{}]}, "documents", "[0] is null, not a text"),
        ({"top_n": -1}, "top_n", "greater than or equal to 0"),
        ({"rank_fields": ["a"]}, "rank_fields", "send texts"),
    ],
)
def test_rankings_of_what_are_no_documents_are_refused(fields: dict[str, Any], param: str, message: str) -> None:
    status, named, said = refusal("/v2/rerank", {"query": "a", "documents": ["b"], **fields})
    assert (status, named) == (400, param)
    assert message in said


def test_pooling_gives_the_same_vector_in_the_form_of_vllm() -> None:
    body = post("/pooling", {"model": "demo", "input": "abc", "task": "embed"}).json()
    expected = post("/v1/embeddings", {"model": "demo", "input": "abc"}).json()["data"][0]["embedding"]
    assert body["data"] == [{"object": "pooling", "index": 0, "data": expected}]
    assert refusal("/pooling", {"model": "demo", "input": "abc", "task": "classify"})[1] == "task"


def test_lorax_embed_is_for_the_base_an_adapter_or_a_merge() -> None:
    served = serve()
    plain = post("/embed", {"inputs": "abc"}, served).json()
    named = post("/embed", {"inputs": "abc", "parameters": {"adapter_id": "alpha"}}, served).json()
    merge = {"ids": ["alpha", "beta"], "weights": [0.5, 0.5]}
    merged = post("/embed", {"inputs": "abc", "parameters": {"merged_adapters": merge}}, served).json()
    expected = post("/v1/embeddings", {"model": "demo", "input": "abc"}).json()["data"][0]["embedding"]
    assert plain == {"embeddings": pytest.approx(expected)}
    assert named["embeddings"] == merged["embeddings"] == pytest.approx(expected[::-1])
    assert [part.name for part in served.backend.calls[-1].parts] == ["alpha", "beta"]
    response = post("/embed", {"inputs": "abc", "parameters": {"temperature": 1}}, served)
    assert response.status_code == 422
    assert "temperature" in response.json()["error"]


def test_a_long_list_is_written_with_room_for_others_and_to_the_last_bit() -> None:
    vector = [(-1.0) ** i * 2.0**-i * (1 + 2.0**-23 * i) for i in range(100)] + [0.1, 3e38, 1e-38, 0.0] * 5000
    exact = struct.unpack(f"<{len(vector)}f", struct.pack(f"<{len(vector)}f", *vector))
    served = serve(FakeBackend(numbers=lambda call: vector))
    turns = 0

    async def run() -> Any:
        async def beat() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        answers = tuple(Answered(struct.pack(f"<{len(vector)}f", *vector), 1, 0) for _ in range(6))
        beating = asyncio.ensure_future(beat())
        await asyncio.sleep(0)
        before = turns
        body = await replies.listed({"id": "x"}, Vectors(request_id="r", answers=answers), None, "embedding")
        beating.cancel()
        return json.loads(body), turns - before

    body, num_turns = asyncio.run(run())
    assert num_turns >= 3
    for item in body["data"]:
        assert struct.pack(f"<{len(vector)}f", *item["embedding"]) == struct.pack(f"<{len(vector)}f", *exact)
    data = post("/v1/embeddings", {"model": "demo", "input": ["x"], "encoding_format": "base64"}, served).json()["data"]
    assert base64.b64decode(data[0]["embedding"]) == struct.pack(f"<{len(vector)}f", *vector)


def test_a_vector_of_zeros_is_like_nothing() -> None:
    served = serve(FakeBackend(numbers=lambda call: [0.0, 0.0] if len(call.prompt_token_ids) == 1 else [3.0, 4.0]))
    data = post("/score", {"text_1": "ab", "text_2": ["c", "de"]}, served).json()["data"]
    assert [item["score"] for item in data] == [0.0, 1.0]
