"""Each field of chats and completions has its effect: on what a replica is asked, or on what is told."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.calls import Call
from deployments.http.service.metrics import _COUNTERS, _GAUGES, exposition
from engine.pooling import PromptScores
from tests.serving.fakes import EOS, FakeBackend, Served, serve

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
HELLO = [{"role": "user", "content": "hello"}]


def post(served: Served, path: str = COMPLETIONS, **fields: Any) -> httpx.Response:
    body: dict[str, Any] = {"model": "demo", "prompt": "hello\n", **fields}
    if path == CHAT:
        body = {"model": "demo", "messages": HELLO, **fields}
    if path == GENERATE:
        body = {"inputs": "hello\n", "parameters": fields}
    return asyncio.run(served.client.post(path, json=body))


def told(path: str = COMPLETIONS, backend: FakeBackend | None = None, **fields: Any) -> dict[str, Any]:
    response = post(serve(backend), path, **fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


def asked(path: str = COMPLETIONS, **fields: Any) -> Call:
    served = serve()
    response = post(served, path, **fields)
    assert response.status_code == 200, response.text
    return served.backend.calls[-1]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_fields_of_sampling_reach_the_replica(path: str) -> None:
    call = asked(path, typical_p=0.5, allowed_token_ids=[65.0, EOS], no_stop_trim=True, priority=-3)
    assert (call.params.typical_p, call.params.allowed_token_ids) == (0.5, (65, EOS))
    assert call.params.include_stop_str_in_output
    assert (call.priority, asked(path).priority) == (-3, 0)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_bad_words_become_tokens_with_and_without_a_space_before_them(path: str) -> None:
    assert asked(path, bad_words=["no", " so"]).params.bad_words_token_ids == tuple(
        tuple(text.encode()) for text in ("no", " no", "so", " so")
    )


def test_equal_cache_keys_give_equal_hints_first_and_others_others() -> None:
    one, same, other = (
        asked(prompt_cache_key=key, prompt=text).prefix_hints for key, text in (("a", "x"), ("a", "y"), ("b", "x"))
    )
    assert len(one) == 1
    assert one == same != other
    assert asked(prompt="x").prefix_hints == ()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_an_adapter_may_be_named_behind_its_base_or_beside_it(path: str) -> None:
    for fields in (
        {"model": "alpha"},
        {"model": "demo:alpha"},
        {"lora_path": "alpha"},
        {"model": "demo:alpha", "lora_path": "alpha"},
    ):
        assert asked(path, **fields).adapter == "alpha"
    assert asked(path, model="demo").adapter is None
    assert post(serve(), path, model="other:alpha").status_code == 400
    assert told(path, model="demo:alpha")["model"] == "demo:alpha"


def test_special_tokens_and_truncation_are_the_caller_s() -> None:
    call = asked(truncate_prompt_tokens=3, prompt="abcdef\n")
    assert bytes(call.prompt_token_ids) == b"ef\n"
    assert asked(CHAT, truncate_prompt_tokens=2).prompt_token_ids == tuple(b"o\n")
    assert post(serve(), truncate_prompt_tokens=0).status_code == 400


def test_ids_of_requests_go_by_either_name() -> None:
    assert told(rid="mine-1")["id"].endswith("mine-1")
    assert told(CHAT, request_id="mine-2", rid="mine-2")["id"].endswith("mine-2")


def test_log_probabilities_may_name_tokens_by_their_ids() -> None:
    logprobs = told(logprobs=1, return_tokens_as_token_ids=True, max_tokens=1)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["token_id:104"]
    assert set(logprobs["top_logprobs"][0]) == {"token_id:104"}
    content = told(CHAT, logprobs=True, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]["content"]
    assert content[0]["token"] == "token_id:104"
    assert content[0]["bytes"] == [104]


def test_why_a_choice_stopped_is_told_whole_and_streamed() -> None:
    assert told()["choices"][0]["stop_reason"] is None
    response = post(serve(), stream=True)
    ends = [
        json.loads(line[6:])["choices"][0] for line in response.text.splitlines() if '"finish_reason":"stop"' in line
    ]
    assert [end["stop_reason"] for end in ends] == [None]


def test_the_likeliest_of_several_are_given() -> None:
    backend = FakeBackend(number_samples=True)
    whole = told(backend=backend, best_of=4, n=2)
    assert backend.calls[0].params.n == 4
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert whole["choices"][0]["logprobs"] is None
    assert whole["usage"]["completion_tokens"] == 4 * len("hello0\n")
    assert told(best_of=3, n=1, logprobs=0)["choices"][0]["logprobs"] is not None


def test_a_prompt_may_end_with_the_last_message_or_go_on_with_it() -> None:
    served = serve()
    answer = {"role": "assistant", "content": "I say"}
    assert post(served, CHAT, messages=[*HELLO, answer], continue_final_message=True).status_code == 200
    for fields, says in (
        ({"messages": HELLO, "continue_final_message": True}, "assistant"),
        ({"messages": [*HELLO, answer], "continue_final_message": True, "add_generation_prompt": True}, "contradicts"),
    ):
        response = post(serve(), CHAT, **fields)
        assert response.status_code == 400
        assert says in response.json()["error"]["message"]


# ---- what is said of the prompt


def test_an_echo_tells_the_log_probabilities_of_its_prompt() -> None:
    served = serve()
    choice = post(served, prompt="ab\n", echo=True, logprobs=2, max_tokens=2).json()["choices"][0]
    assert choice["text"] == "ab\nab"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "\n", "a", "b"]
    assert logprobs["token_logprobs"] == [None, -2.0, -2.0, -0.5, -0.5]
    assert logprobs["text_offset"] == [0, 1, 2, 3, 4]
    assert logprobs["top_logprobs"][:2] == [None, {"A": -1.0, "B": -2.0, "b": -2.0}]
    scores, generation = served.backend.calls
    assert scores.numbers == PromptScores(top=2)
    assert generation.prompt_token_ids == scores.prompt_token_ids


def test_an_echo_of_token_ids_without_tokens_behind_it_is_what_scoring_programs_ask() -> None:
    served = serve()
    body = post(served, prompt=[[97, 98], [99]], echo=True, logprobs=1, max_tokens=0).json()
    assert [choice["text"] for choice in body["choices"]] == ["ab", "c"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "length"]
    assert [choice["logprobs"]["token_logprobs"] for choice in body["choices"]] == [[None, -2.0], [None]]
    assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (3, 0)
    assert [call.numbers for call in served.backend.calls] == [PromptScores(top=1)], "of one token nothing is said"


def test_an_echo_streams_its_log_probabilities_first() -> None:
    response = post(serve(), prompt="ab\n", echo=True, logprobs=1, stream=True, max_tokens=1)
    chunks = [json.loads(line[6:])["choices"][0] for line in response.text.splitlines() if line.startswith("data: {")]
    assert (chunks[0]["text"], chunks[0]["logprobs"]["token_logprobs"]) == ("ab\n", [None, -2.0, -2.0])
    assert chunks[1]["logprobs"]["text_offset"] == [3]


def test_prompt_logprobs_are_told_as_vllm_tells_them() -> None:
    (_, second, _) = told(prompt="ab\n", prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert second == {
        "65": {"logprob": -1.0, "rank": 1, "decoded_token": "A"},
        "98": {"logprob": -2.0, "rank": 3, "decoded_token": "b"},
    }
    chat = told(CHAT, prompt_logprobs=0, max_tokens=0)
    assert chat["prompt_logprobs"][0] is None
    assert len(chat["prompt_logprobs"]) == len("hello\n")
    assert chat["choices"][0]["message"]["content"] == ""


def test_lorax_tells_them_as_its_prefill() -> None:
    details = told(GENERATE, decoder_input_details=True)["details"]
    assert details["prefill"][:2] == [
        {"id": 104, "text": "h", "logprob": None}, {"id": 101, "text": "e", "logprob": -2.0},
    ]  # fmt: skip
    body = {"inputs": "x\n", "parameters": {"decoder_input_details": True}}
    response = asyncio.run(serve().client.post("/generate_stream", json=body))
    assert response.status_code == 422
    assert "decoder_input_details" in response.json()["error"]


# ---- tokens and service


def _at(path: str, body: Any = None, served: Served | None = None) -> httpx.Response:
    client = (served or serve()).client
    return asyncio.run(client.get(path) if body is None else client.post(path, json=body))


def test_tokens_of_a_text_and_back() -> None:
    body = _at("/tokenize", {"prompt": "héy", "return_token_strs": True}).json()
    assert (body["tokens"], body["count"], body["max_model_len"]) == (list("héy".encode()), 4, None)
    assert len(body["token_strs"]) == 4
    assert _at("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": "héy"}
    assert _at("/tokenize", {"messages": HELLO}).json()["tokens"] == list(b"hello\n")
    assert _at("/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert _at("/tokenize", {"inputs": "ab"}).json()[1] == {"id": 98, "text": "b", "start": 1, "stop": 2}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "x", "model": "../x"}, "model"),
        ("/detokenize", {"tokens": [EOS + 1]}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_bad_tokens_are_refused_by_name(path: str, body: Any, param: str) -> None:
    response = _at(path, body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


def test_a_server_tells_what_it_is_and_how_busy() -> None:
    assert set(_at("/version").json()) == {"version"}
    assert _at("/load").json() == {"server_load": 0}
    assert (_at("/ping").status_code, _at("/ping", {}).status_code) == (200, 200)
    assert _at("/tokenizer_info").json()["chat_template"] == "lines"
    dead = serve(FakeBackend(alive=False))
    assert _at("/ping", served=dead).status_code == 503


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"model": "demo", "messages": HELLO}, "chat.completion"),
        ({"model": "demo", "prompt": "x\n"}, "text_completion"),
        ({"model": "demo", "input": "x"}, "list"),
        ({"model": "demo", "query": "x", "documents": ["y"]}, None),
    ],
)
def test_one_path_takes_every_body(body: Any, field: str | None) -> None:
    response = _at("/invocations", body)
    assert response.status_code == 200, response.text
    assert field is None or response.json()["object"] == field


def test_replicas_are_told_for_prometheus() -> None:
    told = {name: 0 for name, _ in (*_GAUGES.values(), *_COUNTERS.values())}
    engine = {**told, "running": 3, "num_blocks": 10, "free_blocks": 4, "total_generated_tokens": 7}
    said = [{"replica": "r1", "engine": engine, "resident": ["b", "a"]}, {"missing": "r2"}]
    families = {family.name: family for family in text_string_to_metric_families(exposition("demo", said).decode())}
    (running,) = families["vllm:num_requests_running"].samples
    assert (running.value, running.labels) == (3, {"model_name": "demo", "engine": "r1"})
    assert families["vllm:generation_tokens"].samples[0].value == 7
    assert families["vllm:kv_cache_usage_perc"].samples[0].value == pytest.approx(0.6)
    (adapters,) = families["vllm:lora_requests_info"].samples
    assert adapters.labels["running_lora_adapters"] == "a,b"
    response = _at("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
