"""What is wrong with a request is said when it is made, by the name of the field: it never reaches a running engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import engine.engine
from engine import LLM, EngineConfig, Request, SamplingParams
from engine.aio.async_engine import AsyncEngine
from engine.errors import ConfigError, EngineError, InvalidRequest, RequestError
from tests.engine_api.alphabet import AlphabetRunner, make_parts, make_request
from tests.engine_api.async_help import collect, running, text_of, wait_for

HUGE = 10**400  # no float is that large


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("max_tokens", value) for value in (0, -1, 1.5, "4", True, float("nan"))),
        *(("min_tokens", value) for value in (None, -1, 0.5, 17)),
        *(("n", value) for value in (None, 0, 1.5, 129, HUGE)),
        *(("top_k", value) for value in (None, -2, 2.5, 2**31, 10**30)),
        *(("logprobs", value) for value in (-1, 1.5, 21)),
        *(("seed", value) for value in (-1, 1.5, 2**64, HUGE)),
        *(("temperature", value) for value in (None, -0.1, float("nan"), float("inf"), "0", HUGE)),
        *(("top_p", value) for value in (None, -0.1, 1.1, "1")),
        *(("min_p", value) for value in (None, -0.1, 1.1)),
        *(("typical_p", value) for value in (None, 0, -0.1, 1.1, "1", float("nan"))),
        *(("allowed_token_ids", value) for value in ((), 5, "65", ["a"], [1.5], [True], [2**63], range(65_537))),
        *(
            ("bad_words_token_ids", value)
            for value in (None, 5, "ab", [5], ["a"], [[]], [[1.5]], [[1]] * 257, [[1] * 65])
        ),
        *(("repetition_penalty", value) for value in (None, 0, 1e300, HUGE)),
        *(("presence_penalty", value) for value in (None, 2.1, float("nan"))),
        *(("frequency_penalty", value) for value in (None, -2.1)),
        *(("stop", value) for value in (None, 5, [""], [None], b"ab", ["x"] * 17)),
        *(("stop_token_ids", value) for value in (None, 5, "65", ["a"], [1.5], [True])),
        *(("logit_bias", value) for value in (None, [1], {"x": 1}, {1.7: 1}, {1: "a"}, {1: float("nan")}, {1: HUGE})),
        *(("ignore_eos", value) for value in (None, "yes", 1)),
        *(("include_stop_str_in_output", value) for value in (None, 3)),
    ],
)
def test_a_parameter_that_cannot_be_honoured_is_refused_by_its_name(param: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=f"^{param}: ") as caught:
        SamplingParams(**{param: value})
    assert caught.value.param == param


def test_integers_without_a_limit_may_be_as_large_as_they_like() -> None:
    params = SamplingParams(max_tokens=HUGE, min_tokens=HUGE, seed=2**64 - 1, top_k=2**31 - 1)
    assert params.max_tokens == HUGE


@pytest.mark.parametrize(
    ("param", "value"),
    [
        *(("prompt_token_ids", value) for value in (None, "abc", 5, ("a",), (1.5,), (True,), (None,))),
        ("resumed_output_token_ids", (0.0,)),
        ("params", None),
        *(("seed", value) for value in (None, -1, 1.5, 2**64)),
        *(("sample_index", value) for value in (None, -1, 1.5, 2**32)),
        ("request_id", 7),
        *(("adapter", value) for value in (["unhashable"], 5, "")),
        ("tenant", None),
        ("cache_salt", ["unhashable"]),
    ],
)
def test_a_request_that_no_engine_could_read_is_refused_by_its_field(param: str, value: Any) -> None:
    fields = {"request_id": "r", "prompt_token_ids": (97,), "params": SamplingParams(), "seed": 0}
    with pytest.raises(InvalidRequest, match=f"^{param}: "):
        Request(**{**fields, param: value})


def test_token_ids_may_come_as_a_list() -> None:
    request = Request(request_id="r", prompt_token_ids=[97, 98], params=SamplingParams(), seed=0)  # type: ignore[arg-type]
    assert request.prompt_token_ids == (97, 98)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""},
        {"prompt": "a" * 1000},
        {"adapter": "unknown"},
        {"stop_token_ids": (10**30,)},
        {"logit_bias": {-1: 1.0}},
        {"allowed_token_ids": (97, 10**6)},
        {"bad_words_token_ids": ((97, 10**6),)},
        {"n": 2, "resumed_output_token_ids": (98,)},
    ],
)
def test_a_refused_request_leaves_the_streams_of_others_alone(fields: dict[str, Any]) -> None:
    async def main(engine: AsyncEngine) -> None:
        with pytest.raises(EngineError) as caught:
            await collect(engine.generate(make_request(**fields)))
        assert caught.value.code in ("invalid_request", "context_length_exceeded", "adapter_error")
        assert await text_of(engine.generate(make_request())) == "bcdefghi"
        assert engine.is_alive

    with running() as engine:
        wait_for(main(engine))


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr(engine.engine, "load_parts", lambda config, neighbours: make_parts(AlphabetRunner()))
    return LLM("alphabet", max_num_seqs=4, block_size=4, max_queued_requests=2)


@pytest.mark.parametrize(
    ("param", "arguments"),
    [
        *(
            ("prompts", {"prompts": value})
            for value in (None, 5, {"a": 1}, b"ab", [None], [5.0], [b"ab"], np.array([97, 98]))
        ),
        ("prompt", {"prompts": "half a pair: \ud800"}),
        ("prompt_token_ids", {"prompts": [[]]}),
        ("prompt_token_ids", {"prompts": [["a", None]]}),
        ("prompt_token_ids", {"prompts": [[97.5]]}),
        ("prompt_token_ids", {"prompts": [[True]]}),
        ("prompt_token_ids", {"prompts": [[-1]]}),
        ("params", {"prompts": ["a"], "params": []}),
        *(("params", {"prompts": ["a"], "params": value}) for value in (0, 5, {"n": 1})),
        ("adapters", {"prompts": ["a"], "adapters": []}),
        *(("adapters", {"prompts": ["a"], "adapters": value}) for value in (5, [5])),
    ],
)
def test_bad_arguments_of_generate_are_named(llm: LLM, param: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        llm.generate(**arguments)
    assert caught.value.param == param
    assert llm.generate("a", SamplingParams(max_tokens=2, temperature=0.0))[0].text == "bc"


@pytest.mark.parametrize("messages", [None, "hi", [], [5], ["hi"], {"role": "user"}])
def test_messages_that_are_no_conversation_are_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError):
        llm.chat(messages)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("block_size", value) for value in (None, 0, "16", 16.5, True)),
        *(("max_num_seqs", value) for value in (None, True, -1, "Auto")),
        *(("max_num_batched_tokens", value) for value in (None, "64")),
        *(("kv_cache_bytes", value) for value in (None, 0, "4GiB")),
        *(("memory_bytes", value) for value in (None, 0, 1.5)),
        *(("memory_fraction", value) for value in (None, 0, 1.1, "half", float("nan"), True)),
        *(("min_adapter_bytes", value) for value in (None, -1, 0.5, 1)),  # 1: adapters take no pages here
        *(("adapter_dtype", value) for value in (None, 8, "bfloat16")),
        *(("adapter_memory", value) for value in (None, 1, "vram")),
        *(("adapter_copy_bytes_per_s", value) for value in (0, -1, 0.5)),
        *(("adapter_bytes", value) for value in (None, -1, 0.5)),
        *(("max_resident_adapters", value) for value in (None, -1, 1.5)),
        *(("max_model_len", value) for value in (0, 12.0)),
        *(("step_timeout_s", value) for value in (None, 0, "a", float("nan"))),
        *(("enable_prefix_caching", value) for value in (None, "no")),
        *(("enable_chunked_prefill", value) for value in (None, 1)),
        *(("num_threads", value) for value in (0, "2")),
        *(("device", value) for value in (None, "tpu")),
        *(("dtype", value) for value in (None, "int8")),
        *(("quantization", value) for value in (4, True, "int3")),
        *(("quantize_lm_head", value) for value in (None, 1, True)),  # True: without `quantization`
        *(("quantize_embeddings", value) for value in (None, "int8", True)),
        ("tokenizer", 5),
        ("model", 5),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        EngineConfig(**{"model": "folder", name: value}).validate()
