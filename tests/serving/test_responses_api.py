"""The Responses API over fake replicas, through OpenAI's own client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response

from deployments.calls import Fault, Refused
from deployments.http.auth import ApiKeys
from deployments.http.openai.parts import End, Piece
from deployments.http.responses_api import items, replies, translate
from deployments.http.responses_api.routes import _ITEMS
from deployments.http.responses_api.schema import ResponsesRequest
from deployments.kept.answers import Answers, OwnAnswers
from tests.serving.fakes import KEY, URL, FakeBackend, Served, serve

PATH = "/v1/responses"


def _ask(served: Served, ask: Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, Any]], key: str = "none") -> Any:
    client = openai.AsyncOpenAI(api_key=key, base_url=f"{URL}/v1", http_client=served.client, max_retries=0)
    return asyncio.run(ask(client))


def _post(body: Any, served: Served | None = None, **options: Any) -> httpx.Response:
    return asyncio.run((served or serve()).client.post(PATH, json=body, **options))


def test_an_input_is_answered():
    response = _ask(serve(), lambda c: c.responses.create(model="demo", input="hello"))
    assert (response.output_text, response.status, response.object) == ("hello", "completed", "response")
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (6, 6, 12)
    assert response.id.startswith("resp_")


def test_a_stream_gives_what_the_whole_gives():
    served = serve()

    async def streamed(client: openai.AsyncOpenAI) -> Any:
        async with client.responses.stream(model="alpha", input="hello", instructions="be brief") as stream:
            events = [event async for event in stream]
            return events, await stream.get_final_response()

    events, final = _ask(served, streamed)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "HELLO"
    assert (events[0].type, events[1].type, events[-1].type) == (
        "response.created",
        "response.in_progress",
        "response.completed",
    )
    assert (final.output_text, final.instructions) == ("HELLO", "be brief")
    assert served.backend.open_streams == 0


def test_a_response_goes_on_from_one_that_was_kept():
    served = serve()

    async def talk(client: openai.AsyncOpenAI) -> Any:
        first = await client.responses.create(model="demo", input="one", instructions="not again")
        second = await client.responses.create(model="demo", input="two", previous_response_id=first.id)
        third = await client.responses.create(model="demo", input="three", previous_response_id=second.id)
        found = await client.responses.retrieve(second.id)
        page = await client.responses.input_items.list(third.id, order="asc", limit=2)
        rest = await client.responses.input_items.list(third.id, order="asc", after=page.last_id)
        await client.responses.delete(first.id)
        return first, second, third, found, page, rest

    first, second, third, found, page, rest = _ask(served, talk)
    texts = [bytes(call.prompt_token_ids).decode() for call in served.backend.calls]
    assert texts == ["not again\none\n", "one\none\ntwo\n", "one\none\ntwo\ntwo\nthree\n"]
    assert (found.id, found.output_text) == (second.id, "two")
    assert (third.previous_response_id, len(page.data), page.has_more, len(rest.data)) == (second.id, 2, True, 3)
    with pytest.raises(openai.NotFoundError):
        _ask(served, lambda c: c.responses.retrieve(first.id))
    again = _ask(served, lambda c: c.responses.create(model="demo", input="x", previous_response_id=third.id))
    assert again.status == "completed", "what was read from a response that is deleted was kept with its successors"


def test_a_key_cannot_tell_anothers_response_from_none():
    served = serve(keys=ApiKeys((KEY, KEY + "2")))
    kept = _ask(served, lambda c: c.responses.create(model="demo", input="secret"), KEY)
    messages = []
    for name in (kept.id, kept.id[:-1] + ("0" if kept.id[-1] != "0" else "1")):
        for ask in (
            lambda c, name=name: c.responses.retrieve(name),
            lambda c, name=name: c.responses.delete(name),
            lambda c, name=name: c.responses.create(model="demo", input="x", previous_response_id=name),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                _ask(served, ask, KEY + "2")
            messages.append(caught.value.body["message"].replace(name, ""))  # type: ignore[index]
    assert messages[:3] == messages[3:]
    assert _ask(served, lambda c: c.responses.retrieve(kept.id), KEY).output_text == "secret"


def test_what_is_not_to_be_kept_is_not():
    served = serve()
    response = _ask(served, lambda c: c.responses.create(model="demo", input="hello", store=False))
    assert response.store is False
    with pytest.raises(openai.NotFoundError):
        _ask(served, lambda c: c.responses.retrieve(response.id))


class _Away:
    """Kept answers that cannot be reached."""

    async def put(self, tenant: str, name: str, data: bytes) -> bool:
        raise Refused(Fault(code="kept_unavailable", message="away"))

    async def get(self, tenant: str, name: str) -> bytes | None:
        raise Refused(Fault(code="kept_unavailable", message="away"))

    async def delete(self, tenant: str, name: str) -> bool:
        raise Refused(Fault(code="kept_unavailable", message="away"))


@pytest.mark.parametrize("kept", [_Away(), OwnAnswers(Answers(10, 10, 60.0))], ids=["away", "too small"])
def test_an_answer_that_cannot_be_kept_is_given_and_says_so(kept):
    served = serve(kept=kept)
    assert _ask(served, lambda c: c.responses.create(model="demo", input="hello")).store is False


def test_kept_answers_that_are_away_are_told():
    response = _post({"model": "demo", "input": "x", "previous_response_id": "resp_1"}, serve(kept=_Away()))
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")


FIELDS = [
    ({"temperature": 0.5}, lambda c: c.params.temperature, 0.5),
    ({"top_p": 0.5}, lambda c: c.params.top_p, 0.5),
    ({"top_k": 7}, lambda c: c.params.top_k, 7),
    ({"min_p": 0.25}, lambda c: c.params.min_p, 0.25),
    ({"max_output_tokens": 5}, lambda c: c.params.max_tokens, 5),
    ({"stop": ["x"]}, lambda c: c.params.stop, ("x",)),
    ({"seed": 11}, lambda c: c.seed, 11),
    ({"top_logprobs": 3}, lambda c: c.params.logprobs, 3),
    ({"include": ["message.output_text.logprobs"]}, lambda c: c.params.logprobs, 0),
    ({"user": "u"}, lambda c: c.tenant, "u"),
    ({"safety_identifier": "s"}, lambda c: c.tenant, "s"),
    ({"cache_salt": "salt"}, lambda c: "salt" in c.cache_salt, True),
    ({"model": "alpha", "adapter_source": "s3"}, lambda c: (c.adapter, c.adapter_source), ("alpha", "s3")),
]


@pytest.mark.parametrize(("fields", "read", "wanted"), FIELDS, ids=[str(list(row[0])) for row in FIELDS])
def test_fields_reach_the_call(fields, read, wanted):
    served = serve()
    response = _post({"model": "demo", "input": "hello", **fields}, served)
    assert response.status_code == 200, response.text
    assert read(served.backend.calls[0]) == wanted


def test_fields_are_told_back():
    told = {"metadata": {"a": "b"}, "user": "u", "parallel_tool_calls": False, "max_output_tokens": 3}
    body = _post({"model": "demo", "input": "hello", **told}).json()
    assert {name: body[name] for name in told} == told
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"


def test_items_become_messages_of_a_chat():
    told = [
        {"role": "developer", "content": "brief"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": "{}", "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "time", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "rain"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "noon"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "rain", "annotations": []}]},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    calls = [
        {"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}}
        for id_, name in (("c1", "weather"), ("c2", "time"))
    ]
    assert items.as_messages(_ITEMS.validate_python(told)) == [
        {"role": "developer", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": calls,
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "noon"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "rain"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    ]  # fmt: skip


TOOL = {"type": "function", "name": "weather", "description": "now", "parameters": {"type": "object"}, "strict": True}


def test_tools_and_formats_become_those_of_a_chat():
    schema = {"type": "object", "properties": {}}
    body = ResponsesRequest.model_validate(
        {
            "model": "m",
            "input": "x",
            "tools": [TOOL],
            "tool_choice": {"type": "function", "name": "weather"},
            "parallel_tool_calls": False,
            "text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
            "reasoning": {"effort": "low"},
        }
    )
    fields = translate.chat_fields(body, [])
    function = {name: TOOL[name] for name in ("name", "description", "parameters", "strict")}
    assert fields["tools"] == [{"type": "function", "function": function}]
    assert fields["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert (fields["parallel_tool_calls"], fields["reasoning_effort"]) == (False, "low")
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    assert fields["response_format"] == wanted


PIECES = [
    Piece("reasoning", "h"),
    Piece("reasoning", "m"),
    Piece("text", "let ", logprobs=({"token": "let ", "logprob": -1.0, "bytes": [], "top_logprobs": []},)),
    Piece("text", "me"),
    Piece("call", "", 0, "c0", "weather"),
    Piece("call", '{"city":', 0),
    Piece("call", '"Bern"}', 0),
    Piece("call", "{}", 1, "c1", "time"),
    End("tool_calls", None),
]
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13, "prompt_tokens_details": {"cached_tokens": 5}}


def _head(**fields: Any) -> replies.Head:
    body = ResponsesRequest.model_validate({"model": "m", "input": "x", **fields})
    return replies.Head(body, "1", 7, 1.0, 1.0)


def test_items_follow_each_other_in_a_stream():
    events = replies.Events(_head(tools=[TOOL]))
    told = [*events.start(), *(event for piece in PIECES for event in events.take(piece))]
    told += events.finish(events.response(USAGE))
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    final = Response.model_validate(told[-1]["response"])
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    assert final.output_text == "let me"
    done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert done == told[-1]["response"]["output"]
    assert [event["output_index"] for event in told if event["type"] == "response.output_item.added"] == [0, 1, 2, 3]
    gathered = {
        kind: "".join(e["delta"] for e in told if e["type"] == f"response.{kind}.delta")
        for kind in ("reasoning_text", "output_text", "function_call_arguments")
    }
    assert gathered == {
        "reasoning_text": "hm",
        "output_text": "let me",
        "function_call_arguments": '{"city":"Bern"}{}',
    }
    assert done[1]["content"][0]["logprobs"][0]["token"] == "let "
    assert final.usage is not None
    assert final.usage.input_tokens_details.cached_tokens == 5


REFUSED = [
    ({"background": True}, "background"),
    ({"conversation": "c"}, "conversation"),
    ({"truncation": "auto"}, "truncation"),
    ({"tools": [{"type": "web_search"}]}, "tools[0]"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content[0]"),
    ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"include": ["everything"]}, "include[0]"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"max_tokens": 4}, "max_tokens"),
    ({"top_logprobs": 99}, "top_logprobs"),
]


@pytest.mark.parametrize(("fields", "named"), REFUSED, ids=[str(row[0])[:40] for row in REFUSED])
def test_what_is_not_served_is_refused_by_name(fields, named):
    response = _post({"model": "demo", "input": "hello", **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == named


def test_neutral_fields_are_named():
    response = _post(
        {"model": "demo", "input": "x", "include": ["reasoning.encrypted_content"], "truncation": "disabled"}
    )
    assert response.status_code == 200
    assert set(response.headers["x-chorus-inert"].split(", ")) == {"include", "truncation"}


def test_a_failure_in_a_stream_ends_the_response():
    broken = FakeBackend(fault=Fault(code="request_failed", message="broken"), fault_after=2)

    async def streamed(client: openai.AsyncOpenAI) -> Any:
        stream = await client.responses.create(model="demo", input="hello", stream=True)
        return [event async for event in stream]

    events = _ask(serve(broken), streamed)
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert (events[-2].message, events[-1].response.error.message) == ("broken", "broken")
    assert broken.open_streams == 0
