"""Events that are put together from bytes are those that the whole chunk would give."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.http.collect import Usage
from deployments.http.lorax import sse as lorax_sse
from deployments.http.openai import replies
from deployments.http.openai.logprobs import LogprobWriter
from deployments.http.openai.sse import _PLACE, ChunkWriter, event
from engine.request import FinishReason, OutputDelta, TokenLogprobs

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.just(_PLACE) | st.just(f'"{_PLACE}"')
CHOSEN = st.builds(TokenLogprobs, st.integers(0, 9), st.floats(-9, 0), st.just(((1, -1.0),)))
DELTAS = st.builds(
    OutputDelta,
    st.just("q"),
    st.just(0),
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    TEXTS,
    st.none() | st.lists(CHOSEN, max_size=2).map(tuple),
    st.none() | st.sampled_from(FinishReason),
)
HEADS = st.builds(
    replies.Head,
    kind=st.sampled_from(["chat", "completion"]),
    request_id=TEXTS,
    created=st.integers(0, 9),
    model=TEXTS,
    include_usage=st.booleans(),
    continuous_usage=st.booleans(),
    token_ids=st.booleans(),
)


@settings(deadline=None, max_examples=300)
@given(head=HEADS, choice=st.integers(0, 300), deltas=st.lists(DELTAS, max_size=4))
def test_every_delta_gives_the_bytes_of_its_chunks(head: replies.Head, choice: int, deltas: list[OutputDelta]) -> None:
    usage = Usage(3)
    writer = ChunkWriter(head, choice, _NoLogprobs(), usage)
    for delta in deltas:
        usage.add(0, delta)
        chunks = replies.delta_chunks(head, choice, delta, _NoLogprobs(), usage)
        assert writer.write(delta) == b"".join(map(event, chunks))
        for line in writer.write(delta).splitlines():
            assert not line or json.loads(line.removeprefix(b"data: "))["choices"][0]["index"] == choice


class _NoLogprobs(LogprobWriter):
    """Writes what it is given: what tokens read as is another test's matter."""

    def __init__(self) -> None:
        pass

    def chat(self, items: Any) -> dict[str, Any]:
        return {"content": [item.token_id for item in items]}

    def completion(self, items: Any) -> dict[str, Any]:
        return {"tokens": [item.token_id for item in items]}


TOKENS = st.builds(
    lambda token_id, text, logprob, special, top: {
        "id": token_id, "text": text, "logprob": logprob, "special": special, "skipped": False,
        **({} if top is None else {"alternative_tokens": top}),
    },
    st.integers(0, 1 << 20),
    TEXTS,
    st.floats(-1e4, 0) | st.sampled_from([float("-inf"), -0.0, -1e-320]),
    st.booleans(),
    st.none() | st.just([{"id": 1, "text": "a", "logprob": -1.0}]),
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(token=TOKENS)
def test_every_token_of_a_lorax_stream_is_the_bytes_of_its_body(token: dict[str, Any]) -> None:
    body = {"token": token, "generated_text": None, "details": None}
    assert lorax_sse.token_event(token) == lorax_sse.event(body)
