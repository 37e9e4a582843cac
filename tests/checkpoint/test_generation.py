"""What a checkpoint's generation_config.json says of sampling is taken as the default, by whoever serves it."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from engine.checkpoint.generation import FIELDS, read_sampling_defaults, sampling_defaults
from engine.errors import ConfigError
from engine.llm import LLM
from engine.request import SamplingParams
from tests.serving.fakes import serve

DEMO = Path(__file__).parents[2] / "demo" / "base"
QWEN = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05, "do_sample": True}


def _folder(tmp_path: Path, config: Any) -> Path:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "generation_config.json").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (QWEN, {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}),
        ({"temperature": 0.6, "top_p": 0.9, "do_sample": True, "max_length": 4096}, {"temperature": 0.6, "top_p": 0.9}),
        ({"temperature": 0, "eos_token_id": [1, 2]}, {"temperature": 0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 64.0, "min_p": 0.05}, {"top_k": 64, "min_p": 0.05}),
        ({"temperature": None, "top_p": None, "top_k": None}, {}),
        ({"max_new_tokens": 128, "do_sample": False}, {}),
        ({}, {}),
    ],
)
def test_what_the_file_says_of_sampling_is_taken(tmp_path: Path, config: dict[str, Any], values: dict[str, Any]):
    assert read_sampling_defaults(_folder(tmp_path, config)).values == values


def test_the_values_are_those_that_transformers_reads(tmp_path: Path):
    GenerationConfig(**QWEN).save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path)
    values = read_sampling_defaults(tmp_path).values
    assert values == {name: value for name in FIELDS if (value := getattr(read, name)) is not None}


def test_a_folder_without_the_file_gives_nothing(tmp_path: Path):
    assert read_sampling_defaults(tmp_path).values == {}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": 101}, "temperature=101"),
        ({"temperature": True}, "temperature=True"),
        ('{"temperature": NaN}', "temperature=nan"),
        ({"top_p": -0.5}, "top_p=-0.5"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": [0.9]}, r"top_p=\[0.9\]"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"top_k": -2}, "top_k=-2"),
        ('{"top_k": Infinity}', "top_k=inf"),
        ({"min_p": 2}, "min_p=2"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ('{"repetition_penalty": 1e999}', "repetition_penalty=inf"),
        ("{", "not JSON"),
        ("[]", "holds a list"),
    ],
)
def test_a_value_that_cannot_be_meant_stops_the_start_by_name(tmp_path: Path, config: Any, named: str):
    with pytest.raises(ConfigError, match=named) as caught:
        read_sampling_defaults(_folder(tmp_path, config))
    assert "generation_config.json" in str(caught.value)


def test_the_start_tells_in_one_line_what_is_taken_and_what_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = _folder(tmp_path, {**QWEN, "typical_p": 0.9, "no_repeat_ngram_size": 3, "epsilon_cutoff": 0.0})
    log = logging.getLogger("of-a-start")
    with caplog.at_level(logging.INFO, "of-a-start"):
        assert sampling_defaults(folder, "auto", log)["top_k"] == 20
        assert sampling_defaults(folder, "none", log) == {}
    taken, none = caplog.messages
    assert "temperature=0.7, top_k=20, top_p=0.8, repetition_penalty=1.05" in taken
    assert taken.endswith("not served: typical_p=0.9, no_repeat_ngram_size=3")
    assert "generation_config: none" in none
    with pytest.raises(ConfigError, match="neither 'auto' nor 'none'"):
        sampling_defaults(folder, "always", log)  # type: ignore[arg-type]


def _params(path: str, **fields: Any) -> SamplingParams:
    served = serve(defaults={"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05})
    if path == "/generate":
        body: dict[str, Any] = {"inputs": "hi\n", "parameters": fields}
    elif "chat" in path:
        body = {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **fields}
    else:
        body = {"model": "alpha", "prompt": "hi\n", **fields}
    response = asyncio.run(served.client.post(path, json=body))
    assert response.status_code == 200, response.text
    return served.backend.calls[0].params


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0.7, 0.8, 20, 1.05)),
        ({"temperature": 1}, (1.0, 0.8, 20, 1.05)),
        ({"temperature": 0}, (0.0, 0.8, 20, 1.05)),
        ({"top_p": 1.0, "top_k": -1}, (0.7, 1.0, 0, 1.05)),
        ({"top_k": 0}, (0.7, 0.8, 0, 1.05)),
        ({"repetition_penalty": 1.0, "temperature": None}, (0.7, 0.8, 20, 1.0)),
    ],
)
def test_a_request_gets_the_models_defaults_where_it_gives_none(path: str, fields: dict[str, Any], expected: Any):
    params = _params(path, **fields)
    assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0.0, 1.05)),  # greedy, as in LoRAX
        ({"temperature": 1.0}, (0.0, 1.05)),
        ({"do_sample": True}, (0.7, 1.05)),
        ({"do_sample": True, "temperature": 1.0}, (1.0, 1.05)),
        ({"top_k": 5}, (0.7, 1.05)),
        ({"temperature": 0.3, "repetition_penalty": 1.2}, (0.3, 1.2)),
        ({"temperature": 0.0, "do_sample": True}, (0.0, 1.05)),
    ],
)
def test_lorax_samples_when_it_is_told_to_and_then_as_the_model_says(fields: dict[str, Any], expected: Any):
    params = _params("/generate", **fields)
    assert (params.temperature, params.repetition_penalty) == expected
    assert params.top_k == fields.get("top_k", 20)


def test_a_penalty_of_the_model_is_named_where_it_excludes_what_was_asked_for():
    served = serve(defaults={"repetition_penalty": 1.05})
    body: dict[str, Any] = {"model": "demo", "prompt": "hi\n", "prompt_lookup_num_tokens": 3}
    refused = asyncio.run(served.client.post("/v1/completions", json=body))
    assert refused.status_code == 400
    assert "generation_config.json says repetition_penalty=1.05" in refused.json()["error"]["message"]
    assert asyncio.run(served.client.post("/v1/completions", json=body | {"repetition_penalty": 1})).status_code == 200


def test_models_tell_the_defaults_of_the_base():
    served = serve(defaults={"temperature": 0.7})
    for path in ("/v1/models/demo", "/v1/models"):
        body = asyncio.run(served.client.get(path)).json()
        assert (body["data"][0] if "data" in body else body)["default_sampling_params"] == {"temperature": 0.7}


def test_an_llm_takes_them_too_and_can_be_told_not_to(tmp_path: Path):
    folder = shutil.copytree(DEMO, tmp_path / "model")
    settings: dict[str, Any] = {"kv_cache_bytes": 1 << 23, "adapter_bytes": 1 << 20, "num_threads": 1}
    plain = LLM(folder, **settings)
    assert plain.default_sampling_params() == SamplingParams(), "the demo's file says nothing of sampling"
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "repetition_penalty": 1.3}))
    llm = LLM(folder, **settings)
    assert llm.default_sampling_params(max_tokens=9) == SamplingParams(
        temperature=0.0, repetition_penalty=1.3, max_tokens=9
    )
    told = plain.generate("One base\n", SamplingParams(temperature=0.0, repetition_penalty=1.3))
    assert llm.generate("One base\n")[0].token_ids == told[0].token_ids
    assert LLM(folder, generation_config="none", **settings).default_sampling_params() == SamplingParams()
    (folder / "generation_config.json").write_text(json.dumps({"top_p": 7}))
    with pytest.raises(ConfigError, match="top_p=7"):
        LLM(folder, **settings)
