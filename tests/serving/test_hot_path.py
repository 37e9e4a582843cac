"""The short ways of a token and of a request give what the long ways give, and do no more than they must."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from deployments.asks import Chat
from deployments.calls import Call, StreamItem
from deployments.http import json_shape
from deployments.http.collect import Usage
from deployments.http.openai import replies
from deployments.http.openai.logprobs import LogprobWriter
from deployments.http.openai.sse import ChunkWriter, event
from deployments.http.reading import _takes_body_only
from deployments.router import prompts as router_prompts
from deployments.router.streams import all_primed, merge
from engine.request import FinishReason, OutputDelta, TokenLogprobs
from tests.serving.fakes import FakeBackend, make_prompts, serve

DEADLINE_S = 20.0
PROMPTS = make_prompts()

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12) | st.sampled_from(
    ["", "text", '"text"', "\\", "\u2028", "\x00", "\x7f", "</script>", "\U0001f600", 'a"b\n', '","text":"text"']
)
heads = st.builds(
    replies.Head,
    kind=st.sampled_from(["chat", "completion"]),
    request_id=texts,
    created=st.integers(0, 2**40),
    model=texts,
    include_usage=st.booleans(),
    continuous_usage=st.booleans(),
    token_ids=st.booleans(),
)
deltas = st.builds(
    OutputDelta,
    st.just("id"),
    st.just(0),
    token_ids=st.lists(st.integers(0, 255), max_size=3).map(tuple),
    text=texts,
    logprobs=st.none() | st.just((TokenLogprobs(65, -0.5, ((65, -0.5),)),)),
    finish_reason=st.none() | st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
    num_cached_tokens=st.integers(0, 9),
)


@settings(max_examples=150, deadline=None)
@given(heads, st.integers(0, 7), st.lists(deltas, max_size=4))
def test_an_event_from_a_template_has_the_bytes_of_one_made_anew(
    head: replies.Head, choice: int, many: list[OutputDelta]
):
    usage = Usage(prompt_tokens=3)
    short, anew = (LogprobWriter(PROMPTS, (65,)) for _ in range(2))
    writer = ChunkWriter(head, choice, short, usage)
    for delta in many:
        usage.add(0, delta)
        told = writer.write(delta)
        whole = b"".join(map(event, replies.delta_chunks(head, choice, delta, anew, usage)))
        assert told == whole


values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=100, deadline=None)
@given(values, st.booleans(), st.booleans())
def test_a_small_text_is_counted_as_a_large_one(value: Any, is_ascii: bool, is_spaced: bool):
    text = json.dumps(value, ensure_ascii=is_ascii, indent=2 if is_spaced else None).encode()
    assert json_shape._of_small(text) == json_shape._of_large(text)


@pytest.mark.parametrize("text", [b'"', b'"\\', b'"' + b'\\"' * 2000, b'"\\"' * 1300, b"[" * 4000, b"]" * 4000, b"\\"])
def test_a_small_text_that_is_no_json_is_looked_at_once(text: bytes):
    """Every quote is in a match: a search that begins at one never fails, to begin anew at the next."""
    assert b'"' not in json_shape._STRING.sub(b"", text)
    json_shape.shape_of(text)


class Counted(FakeBackend):
    """Notes how many tasks there are whenever it gives an item."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks: list[int] = []

    async def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        async for item in super().stream(call):
            self.tasks.append(len(asyncio.all_tasks()))
            yield item


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream", "/"])
def test_a_request_has_one_task_and_a_stream_one_more(path: str, stream: bool):
    """However many tokens come. Starlette, FastAPI and `merge` would have three."""

    async def run() -> list[int]:
        backend = Counted()
        served = serve(backend)
        body: dict[str, Any] = {"inputs": "hello", "stream": stream} if path == "/" else {"inputs": "hello"}
        if path.startswith("/v1"):
            body = {"model": "demo", "prompt": "hello", "stream": stream}
            if "chat" in path:
                body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        async with asyncio.timeout(DEADLINE_S):
            answer = await served.client.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return backend.tasks

    tasks = asyncio.run(run())
    is_stream = path == "/generate_stream" or (stream and path != "/generate")
    assert len(tasks) > 3
    assert max(tasks) <= (2 if is_stream else 1), tasks


def test_one_stream_is_merged_and_primed_without_a_task():
    async def numbers() -> AsyncGenerator[int]:
        for number in range(3):
            await asyncio.sleep(0)
            assert len(asyncio.all_tasks()) == 1
            yield number

    async def run() -> list[tuple[int, int]]:
        return [item async for item in merge(await all_primed([numbers()]))]

    assert asyncio.run(run()) == [(0, 0), (0, 1), (0, 2)]


def test_functions_that_depend_on_more_than_a_body_go_the_long_way():
    """Above all those that ask who may change what is served."""
    app = serve().app
    short = {
        route.path: _takes_body_only(route)
        for wrapper in app.routes
        for route in getattr(wrapper, "original_router", app).routes
        if getattr(route, "body_field", None) is not None
    }
    assert {path for path, is_short in short.items() if is_short} >= {
        "/v1/chat/completions",
        "/v1/completions",
        "/generate",
    }
    long = {path for path, is_short in short.items() if not is_short}
    assert long == {path for path in short if path.startswith("/adapters")}
    assert any(path.startswith("/adapters") for path in short)


@pytest.mark.parametrize(
    ("num_chars", "num_messages", "is_inline"),
    [(5, 1, True), (1024, 1, True), (1025, 1, False), (5, 8, True), (5, 9, False), (200, 8, False)],
)
def test_short_prompts_wait_for_no_thread(num_chars: int, num_messages: int, is_inline: bool):
    role = {"role": "u"}
    chat = Chat(tuple(role | {"content": "x" * (num_chars - 1)} for _ in range(num_messages)))
    small = router_prompts._is_small
    assert small(chat) is is_inline
    if num_messages == 1:
        assert small("x" * num_chars) is small((7,) * num_chars) is is_inline
    assert not small(Chat((role | {"content": [{"type": "text", "text": "x" * 9999}]},)))
    assert not small(Chat((role | {"content": "x", "reasoning": "x" * 9999},)))
