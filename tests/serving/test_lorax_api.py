"""The LoRAX API over fake replicas."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from adapter_store.errors import AdapterNameInvalid
from adapter_store.records import check_name
from deployments.calls import Fault, Part, merge_name
from deployments.http.auth import ApiKeys
from deployments.http.lorax.translate import source_of
from engine.errors import InvalidRequest
from tests.serving.fakes import KEY, FakeBackend, Served, serve


def _post(path: str, inputs: str = "hello\n", served: Served | None = None, **parameters: Any) -> httpx.Response:
    body: dict[str, Any] = {"inputs": inputs, "parameters": parameters}
    if path == "/stream":
        path, body["stream"] = "/", True
    return asyncio.run((served or serve()).client.post(path, json=body))


def _events(response: httpx.Response) -> list[Any]:
    assert response.status_code == 200, response.text
    return [json.loads(line.removeprefix("data:")) for line in response.text.split("\n\n") if line]


def test_generate_answers_with_text_and_details():
    body = _post("/generate", details=True, return_k_alternatives=2).json()
    assert body["generated_text"] == "hello"
    details = body["details"]
    assert details["finish_reason"] == "eos_token"
    assert (details["prompt_tokens"], details["generated_tokens"], details["seed"]) == (6, 6, None)
    first, *_, last = details["tokens"]
    assert (first["id"], first["text"], first["special"]) == (104, "h", False)
    assert [other["id"] for other in first["alternative_tokens"]] == [104, 90]
    assert (last["text"], last["special"]) == ("</s>", True)


def test_the_root_path_answers_in_a_list():
    assert _post("/").json() == [{"generated_text": "hello", "details": None}]


@pytest.mark.parametrize("path", ["/generate_stream", "/stream"])
def test_a_stream_has_one_event_per_token_and_the_last_has_all(path: str):
    events = _events(_post(path, served=serve(FakeBackend(per_item=4)), details=True))
    assert "".join(event["token"]["text"] for event in events if not event["token"]["special"]) == "hello"
    assert len(events) == 6
    assert all(event["generated_text"] is None and event["details"] is None for event in events[:-1])
    assert events[-1]["generated_text"] == "hello"
    assert events[-1]["details"]["generated_tokens"] == 6


def test_a_character_of_many_bytes_belongs_to_its_last_token():
    events = _events(_post("/generate_stream", "é\n", serve(FakeBackend(per_item=2))))
    assert [event["token"]["text"] for event in events] == ["", "é", "</s>"]


def test_an_adapter_is_named_by_adapter_id_and_empty_means_the_base():
    served = serve()
    assert (
        _post("/generate", served=served, adapter_id="alpha", adapter_source="local").json()["generated_text"]
        == "HELLO"
    )
    assert _post("/generate", served=served, adapter_id="").json()["generated_text"] == "hello"
    assert [call.adapter for call in served.backend.calls] == ["alpha", None]
    assert served.backend.calls[0].adapter_source == "local"


@pytest.mark.parametrize(
    ("parameters", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 1.0}, 0.0),
        ({"temperature": 0.5}, 0.5),
        ({"temperature": 0.0, "do_sample": True}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.5}, 1.0),
        ({"top_p": 1.0}, 0.0),
        ({"typical_p": 0.5}, 1.0),
        ({"typical_p": 1.0}, 0.0),
    ],
)
def test_sampling_is_on_when_lorax_would_sample(parameters: dict[str, Any], temperature: float):
    served = serve()
    body = _post("/generate", served=served, details=True, **parameters).json()
    assert served.backend.calls[0].params.temperature == temperature
    assert (body["details"]["seed"] is not None) == (temperature > 0)


def test_all_honoured_parameters_reach_the_engine():
    served = serve()
    response = _post(
        "/generate",
        served=served,
        max_new_tokens=3,
        stop=["x", "y"],
        seed=9,
        do_sample=True,
        top_k=4,
        top_p=0.9,
        typical_p=0.8,
        temperature=0.7,
        repetition_penalty=1.1,
        frequency_penalty=0.2,
        presence_penalty=0.1,
        ignore_eos_token=True,
        truncate=3,
        return_full_text=True,
    )
    assert response.json()["generated_text"] == "hello\nlo"[:9]
    (call,) = served.backend.calls
    params = call.params
    assert call.prompt_token_ids == tuple(b"lo\n")
    assert params.typical_p == 0.8
    assert (params.max_tokens, params.stop, params.seed, params.top_k, params.top_p) == (3, ("x", "y"), 9, 4, 0.9)
    assert (params.repetition_penalty, params.frequency_penalty, params.presence_penalty) == (1.1, 0.2, 0.1)
    assert (params.temperature, params.ignore_eos, params.include_stop_str_in_output) == (0.7, True, True)


def test_without_max_new_tokens_the_context_is_the_limit():
    served = serve()
    _post("/generate", served=served)
    assert served.backend.calls[0].params.max_tokens is None


def test_best_of_keeps_one_and_tells_of_the_others():
    served = serve(FakeBackend(number_samples=True))
    details = _post("/generate", served=served, best_of=3, do_sample=True, details=True).json()["details"]
    assert len(details["best_of_sequences"]) == 2
    assert served.backend.calls[0].params.n == 3


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"api_token": "x"}, "api_token"),
        ({"typical_p": 0}, "typical_p"),
        ({"typical_p": 1.5}, "typical_p"),
        ({"watermark": True}, "watermark"),
        ({"adapter_id": "alpha", "adapter_source": "pbase"}, "Predibase"),
        ({"merged_adapters": {"ids": [], "weights": []}}, "merged_adapters"),
        ({"merged_adapters": {"ids": ["a", "b"], "weights": [1]}}, "1 weights for 2 ids"),
        ({"merged_adapters": {"ids": ["a"]}}, "weights"),
        ({"merged_adapters": {"ids": ["a"] * 17, "weights": [1] * 17}}, "16"),
        ({"merged_adapters": {"ids": ["a"], "weights": [1e7]}}, "10000000.0"),
        ({"merged_adapters": {"ids": ["../a"], "weights": [1]}}, "../a"),
        ({"merged_adapters": {"ids": ["demo"], "weights": [1]}}, "base model"),
        ({"merged_adapters": {"ids": ["a"], "weights": [1]}, "adapter_id": "b"}, "send one of the two"),
        *(
            ({"merged_adapters": {"ids": ["a"], "weights": [1], "merge_strategy": strategy}}, strategy)
            for strategy in ("ties", "dare_linear", "dare_ties", "average")
        ),
        ({"merged_adapters": {"ids": ["a"], "weights": [1], "density": 1.5}}, "density"),
        ({"merged_adapters": {"ids": ["a"], "weights": [1], "majority_sign_method": "most"}}, "majority_sign_method"),
        ({"response_format": {"type": "regex", "schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.schema"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema"),
        ({"adapter_id": "alpha", "adapter_source": "hub"}, "adapter_source"),
        ({"adapter_id": "../x"}, "../x"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"stop": [""]}, "stop"),
        ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "best_of"),
        ({"return_k_alternatives": 21}, "return_k_alternatives"),
        ({"max_tokens": 4}, "max_tokens"),
        ({"temprature": 4}, "temprature"),
    ],
)
def test_a_bad_parameter_is_refused_with_422_by_name(parameters: dict[str, Any], named: str):
    response = _post("/generate", **parameters)
    assert response.status_code == 422, response.text
    assert response.json()["error_type"] == "validation"
    assert named in response.json()["error"]


def test_best_of_cannot_be_streamed_and_empty_inputs_are_refused():
    assert _post("/generate_stream", best_of=2, do_sample=True).status_code == 422
    response = _post("/generate", "")
    assert response.status_code == 422
    assert "inputs" in response.json()["error"]


def test_everything_lorax_clients_send_by_default_is_taken():
    body = {
        "inputs": "hello\n",
        "stream": False,
        "parameters": {
            **dict.fromkeys(
                ["adapter_id", "adapter_source", "merged_adapters", "api_token", "max_new_tokens", "repetition_penalty"]
            ),
            **dict.fromkeys(["seed", "temperature", "top_k", "top_p", "truncate", "typical_p", "best_of"]),
            **dict.fromkeys(["return_k_alternatives", "response_format"]),
            **dict.fromkeys(["do_sample", "ignore_eos_token", "return_full_text", "watermark"], False),
            "stop": [],
            "details": True,
            "decoder_input_details": False,
        },
    }
    assert asyncio.run(serve().client.post("/", json=body)).json()[0]["generated_text"] == "hello"


@pytest.mark.parametrize(
    ("code", "status", "error_type"),
    [
        ("queue_full", 429, "overloaded"),
        ("adapter_not_found", 424, "generation"),
        ("adapter_rejected", 424, "generation"),
        ("context_length_exceeded", 422, "validation"),
        ("request_failed", 500, "incomplete_generation"),
        ("store_unavailable", 503, "generation"),
    ],
)
@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/", "/stream"])
def test_errors_have_lorax_statuses_and_shape(code: str, status: int, error_type: str, path: str):
    response = _post(path, served=serve(FakeBackend(fault=Fault(code=code, message="because"))))
    assert response.status_code == status
    assert response.json() == {"error": "because", "error_type": error_type}


def test_a_failure_in_the_stream_is_an_error_event():
    served = serve(FakeBackend(fault=Fault(code="request_failed", message="broke"), fault_after=2))
    *_, last = _events(_post("/generate_stream", served=served))
    assert last == {"error": "broke", "error_type": "incomplete_generation"}


def test_keys_are_asked_for_in_lorax_shape():
    response = _post("/generate", served=serve(keys=ApiKeys((KEY,))))
    assert (response.status_code, response.json()["error_type"]) == (401, "authentication")


def test_a_merge_is_asked_for_part_by_part_and_the_store_hears_of_each():
    served = serve(allowed=("a*", "b*"))
    merged = {"ids": ["alpha", "beta", "alpha"], "weights": [0.25, -2, 1], "density": 0.5}
    response = _post("/generate", served=served, merged_adapters=merged, adapter_source="local")
    assert response.json()["generated_text"] == "HELLO"
    assert (response.headers["x-adapter-id"], response.headers["x-adapter-source"]) == ("alpha,beta,alpha", "local")
    assert response.headers["x-chorus-inert"] == "density"
    (call,) = served.backend.calls
    assert [(part.name, part.source, part.weight) for part in call.parts] == [
        ("alpha", "local", 0.25),
        ("beta", "local", -2),
        ("alpha", "local", 1),
    ]
    assert call.adapter is not None
    with pytest.raises(AdapterNameInvalid):  # no adapter can be called as the merge goes
        check_name(call.adapter)
    assert served.adapters.expected == [("alpha", "local"), ("beta", "local")]


def test_each_part_of_a_merge_is_on_the_list_of_what_may_be_asked_for():
    merged = {"ids": ["alpha", "gamma"], "weights": [1, 1]}
    response = _post("/generate", served=serve(allowed=("a*",)), merged_adapters=merged)
    assert response.status_code == 424
    assert "'gamma' is not served" in response.json()["error"]


def test_merges_go_by_names_that_tell_parts_order_weights_and_sources_apart():
    a, b = Part(name="a"), Part(name="b")
    sets = [(a,), (a, b), (b, a), (a, replace(b, weight=2.0)), (a, replace(b, source="s3")), (a, b, b)]
    assert len({merge_name(parts) for parts in sets}) == len(sets)
    assert merge_name((a, b)) == merge_name((Part(name="a", weight=1), Part(name="b")))


@pytest.mark.parametrize(
    ("kinds", "asked", "wanted"),
    [
        ({"local": "file"}, "local", "local"),
        ({"mine": "file"}, "local", "mine"),
        ({"weights": "s3"}, "s3", "weights"),
        ({"s3": "file", "b": "s3"}, "s3", "s3"),  # a name goes before a kind
        ({"h": "hub", "w": "http"}, "hub", "h"),
        ({"a": "s3", "b": "s3"}, "s3", "'a' or 'b'"),
        ({"a": "file"}, "s3", None),
    ],
)
def test_a_source_is_found_by_its_name_or_by_loraxs_word_for_its_kind(
    kinds: dict[str, str], asked: str, wanted: str | None
):
    if wanted in kinds:
        assert source_of(asked, kinds) == wanted
    elif wanted is None:
        assert source_of(asked, kinds) == asked  # the gateway refuses it
    else:
        with pytest.raises(InvalidRequest, match=wanted):
            source_of(asked, kinds)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ("hello", "hello\n"),
        ("[1, 2", "[1, 2\n"),
        ("[1, 2]", "[1, 2]\n"),
        ('[{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]', "one\ntwo\n"),
        (' [{"role": "user", "content": [{"type": "text", "text": "one"}]}]', "one\n"),
    ],
)
def test_the_chat_template_is_applied_to_what_a_user_says_or_to_a_conversation(inputs: str, said: str):
    served = serve()
    assert _post("/generate", inputs, served, apply_chat_template=True).status_code == 200
    assert bytes(served.backend.calls[0].prompt_token_ids).decode() == said
    plain = serve()
    _post("/generate", inputs, plain, apply_chat_template=False)
    assert bytes(plain.backend.calls[0].prompt_token_ids).decode() == inputs


def test_a_conversation_that_cannot_be_read_is_refused_by_its_message():
    response = _post("/generate", '[{"role": "nobody", "content": "x"}]', apply_chat_template=True)
    assert response.status_code == 422
    assert "messages[0.role]" in response.json()["error"]


def test_a_token_for_a_source_is_refused_and_nowhere_repeated(caplog: pytest.LogCaptureFixture):
    caplog.set_level("DEBUG")
    response = _post("/generate", api_token="hf_secret_of_somebody", adapter_id="alpha")
    assert response.status_code == 422
    assert "hf_secret" not in response.text + caplog.text
    assert _post("/generate", api_token="", adapter_id="alpha").status_code == 200
