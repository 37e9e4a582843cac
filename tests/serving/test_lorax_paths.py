"""LoRAX's paths beside generation: health, start-up, facts, tokens, refusals; and the headers of every answer."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from deployments.calls import Fault
from deployments.http.auth import ApiKeys
from tests.serving.fakes import KEY, FakeBackend, Served, serve


def _ask(method: str, path: str, served: Served | None = None, **more: Any) -> httpx.Response:
    return asyncio.run((served or serve()).client.request(method, path, **more))


def _generate(path: str = "/generate", served: Served | None = None, **parameters: Any) -> httpx.Response:
    return _ask("POST", path, served, json={"inputs": "hello\n", "parameters": parameters})


@pytest.mark.parametrize("path", ["/", "/startup"])
def test_health_is_200_with_a_replica_and_503_without_in_lorax_shape(path: str):
    assert _ask("GET", path).status_code == 200
    response = _ask("GET", path, serve(FakeBackend(alive=False)))
    assert response.status_code == 503
    assert response.json()["error_type"] == "incomplete_generation"


def test_startup_generates_one_token_and_never_again():
    served = serve()

    async def probes() -> list[int]:
        return [(await served.client.get("/startup")).status_code for _ in range(3)]

    assert asyncio.run(probes()) == [200, 200, 200]
    (call,) = served.backend.calls
    assert (call.params.max_tokens, call.adapter) == (1, None)


def test_startup_tries_again_after_a_failure_and_tells_it():
    served = serve(FakeBackend(fault=Fault(code="store_unavailable", message="gone")))

    async def probes() -> list[int]:
        first = (await served.client.get("/startup")).status_code
        served.backend.fault = None
        return [first, (await served.client.get("/startup")).status_code]

    assert asyncio.run(probes()) == [503, 200]


def test_probes_need_no_key_and_facts_do():
    served = serve(keys=ApiKeys((KEY,)))
    assert _ask("GET", "/startup", served).status_code == 200
    for path in ("/info", "/"):
        response = _ask("GET", path, served)
        assert (response.status_code, response.json()["error_type"]) == (401, "authentication"), path


def test_info_tells_what_lorax_tells():
    served = serve()

    async def stats() -> list[dict[str, object]]:
        sizes = {"max_model_len": 128, "num_blocks": 10}
        model = {"dtype": "bfloat16", "block_size": 16, "max_queued_requests": 7}
        return [{"replica": "a", "missing": "asleep"}, {"replica": "b", "model": model, "engine": {"sizes": sizes}}]

    served.backend.stats = stats  # type: ignore[method-assign]
    told = _ask("GET", "/info", served).json()
    wanted = {
        "model_id": "demo",
        "model_dtype": "torch.bfloat16",
        "model_device_type": "cpu",
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": 7,
        "max_input_length": 127,
        "max_total_tokens": 128,
        "max_batch_total_tokens": 160,
        "adapter_sources": {"local": "file", "s3": "s3"},
    }
    assert {name: told[name] for name in wanted} == wanted
    lorax = {"max_best_of", "max_stop_sequences", "waiting_served_ratio", "max_waiting_tokens", "validation_workers"}
    assert lorax | {"version", "sha", "docker_label", "request_logger_url", "model_sha"} <= set(told)


def test_tokens_say_where_they_stand_in_characters():
    assert _ask("POST", "/tokenize", json={"inputs": "aé"}).json() == [
        {"id": 97, "text": "a", "start": 0, "stop": 1},
        {"id": 0xC3, "text": "Ã", "start": 1, "stop": 2},
        {"id": 0xA9, "text": "©", "start": 1, "stop": 2},
    ]
    assert "inputs" in _ask("POST", "/tokenize", json={"inputs": ""}).text


@pytest.mark.parametrize(("path", "inputs"), [("/classify", "x"), ("/classify_batch", ["x"])])
def test_token_classification_is_refused_by_name(path: str, inputs: Any):
    response = _ask("POST", path, json={"inputs": inputs})
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert path in response.json()["error"]


NUMBERS = (
    "x-compute-time", "x-total-time", "x-validation-time", "x-queue-time", "x-inference-time", "x-time-per-token",
    "x-time-to-first-token", "x-time-per-output-token",
)  # fmt: skip


@pytest.mark.parametrize("path", ["/generate", "/"])
def test_a_whole_answer_has_the_headers_of_lorax(path: str):
    headers = _generate(path, serve(FakeBackend(queue_s=1.5, pause_s=0.01)), adapter_id="alpha").headers
    counts = {"prompt": "6", "generated": "6", "total": "12", "skipped": "0"}
    assert {name: headers[f"x-{name}-tokens"] for name in counts} == counts
    assert (headers["x-compute-type"], headers["x-compute-characters"], headers["x-model-id"]) == ("cpu", "6", "demo")
    assert (headers["x-adapter-id"], headers["x-queue-time"]) == ("alpha", "1500")
    assert "x-adapter-source" not in headers
    assert headers["x-request-id"]
    times = {name: int(headers[name]) for name in NUMBERS}  # whole milliseconds
    assert times["x-total-time"] >= 60  # six pauses of the fake, each at least as long as it says
    assert times["x-time-to-first-token"] <= times["x-total-time"]


def test_a_stream_has_the_headers_that_are_known_when_it_begins():
    headers = _generate("/generate_stream", adapter_id="beta", adapter_source="local").headers
    assert (headers["x-adapter-id"], headers["x-adapter-source"]) == ("beta", "local")
    assert (headers["x-prompt-tokens"], headers["x-compute-characters"]) == ("6", "6")
    assert (headers["x-accel-buffering"], headers["x-model-id"]) == ("no", "demo")
    assert "x-adapter-id" not in _generate("/generate_stream").headers


def test_a_source_without_an_adapter_is_named_as_without_effect():
    headers = _generate(adapter_source="local").headers
    assert headers["x-chorus-inert"] == "adapter_source"
    assert "x-chorus-inert" not in _generate(adapter_id="alpha", adapter_source="local").headers
