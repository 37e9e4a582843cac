"""Every field of a request has a bound that is checked before any work: the message names value, limit and remedy."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.request import (
    MAX_LOGIT_BIAS,
    MAX_NAME_CHARS,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    Request,
    SamplingParams,
)
from engine.text.stop import StopMatcher

FITS: dict[str, dict[str, Any]] = {
    "stop strings": {"stop": [str(i) for i in range(MAX_STOP_STRINGS)]},
    "a long stop string": {"stop": "x" * MAX_STOP_CHARS},
    "stop tokens": {"stop_token_ids": range(MAX_STOP_TOKEN_IDS)},
    "biases": {"logit_bias": dict.fromkeys(range(MAX_LOGIT_BIAS), 1.0)},
}


def endless(item: Any, taken: list[int]) -> Iterator[Any]:
    while True:
        taken[0] += 1
        yield item


@pytest.mark.parametrize("name", FITS)
def test_what_is_at_its_limit_is_taken(name: str) -> None:
    SamplingParams(**FITS[name])


@pytest.mark.parametrize(
    ("field", "value", "numbers"),
    [
        ("stop", ["a"] * (MAX_STOP_STRINGS + 1), (MAX_STOP_STRINGS + 1, MAX_STOP_STRINGS)),
        ("stop", ["a"] * 1_000_000, (1_000_000, MAX_STOP_STRINGS)),
        ("stop", "x" * (MAX_STOP_CHARS + 1), (MAX_STOP_CHARS + 1, MAX_STOP_CHARS)),
        ("stop", ["a", "b" * 1_000_000], (1_000_000, MAX_STOP_CHARS)),
        ("stop_token_ids", range(MAX_STOP_TOKEN_IDS + 1), (MAX_STOP_TOKEN_IDS + 1, MAX_STOP_TOKEN_IDS)),
        ("stop_token_ids", [1] * 1_000_000, (1_000_000, MAX_STOP_TOKEN_IDS)),
        ("logit_bias", dict.fromkeys(range(128_256), 1.0), (128_256, MAX_LOGIT_BIAS)),
        ("logit_bias", dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 1.0), (MAX_LOGIT_BIAS + 1, MAX_LOGIT_BIAS)),
    ],
)
def test_what_is_over_its_limit_is_refused_with_the_value_the_limit_and_the_remedy(
    field: str, value: Any, numbers: tuple[int, int]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{field: value})
    assert caught.value.param == field
    assert all(str(number) in str(caught.value) for number in numbers)
    assert "send" in str(caught.value)


@pytest.mark.parametrize("field", ["request_id", "tenant", "cache_salt", "adapter"])
def test_names_of_a_request_have_a_longest(field: str) -> None:
    fine: dict[str, Any] = {"request_id": "r", "prompt_token_ids": (1,), "params": SamplingParams(), "seed": 0}
    Request(**{**fine, field: "x" * MAX_NAME_CHARS})
    with pytest.raises(InvalidRequest, match=f"{MAX_NAME_CHARS + 1} characters, the limit is {MAX_NAME_CHARS}"):
        Request(**{**fine, field: "x" * (MAX_NAME_CHARS + 1)})


@pytest.mark.parametrize(
    ("field", "item", "limit"), [("stop", "a", MAX_STOP_STRINGS), ("stop_token_ids", 1, MAX_STOP_TOKEN_IDS)]
)
def test_of_a_list_without_an_end_no_more_is_read_than_could_be_taken(field: str, item: Any, limit: int) -> None:
    taken = [0]
    with pytest.raises(InvalidRequest, match=f"more than {limit}"):
        SamplingParams(**{field: endless(item, taken)})
    assert taken == [limit + 1]


FIELDS = [field.name for field in fields(SamplingParams) if field.init and field.name != "max_tokens"]
WRONG: list[Any] = ["x" * 1_000_000, {str(i): i for i in range(10_000)}, ["y" * 1000] * 1000, 10**5000, b"z" * 100_000]


@pytest.mark.parametrize("value", WRONG, ids=["text", "mapping", "list", "number", "bytes"])
@pytest.mark.parametrize("field", FIELDS)
def test_no_message_grows_with_what_was_sent(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        SamplingParams(**{"max_tokens": 5, field: value})
    assert len(str(caught.value)) < 600


def test_stop_strings_that_never_begin_cost_no_memory() -> None:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    matchers = []
    for index in range(64):
        matchers.append(StopMatcher([f"{chr(0x4E00 + i)}{index}" + "a" * 1000 for i in range(MAX_STOP_STRINGS)]))
        assert matchers[-1].push("any text that begins none of them ") != ""
    per_matcher = (tracemalloc.get_traced_memory()[0] - before) / len(matchers)
    tracemalloc.stop()
    assert per_matcher < 16 * (1000 + 1000) + 16 * 1000, "the strings themselves, and little more"


def test_text_that_runs_along_all_stop_strings_keeps_what_they_need_and_drops_it_with_the_sample() -> None:
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    stops = [chr(0x4E00 + i) + "a" * (MAX_STOP_CHARS - 1) for i in range(MAX_STOP_STRINGS)]
    matcher = StopMatcher([*("a" * (MAX_STOP_CHARS - 2 - i) + "b" for i in range(8)), *stops[:8]])
    matcher.push("a" * 5000)
    held = tracemalloc.get_traced_memory()[0] - before
    assert held < 16 * MAX_STOP_CHARS * 24
    del matcher, stops
    assert tracemalloc.get_traced_memory()[0] - before < 4096
    tracemalloc.stop()
