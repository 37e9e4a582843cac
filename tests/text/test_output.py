"""What a caller reads of a sample: its text, cut at stop strings, and exactly one terminal delta."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.sequence import SequenceUpdate
from engine.output import OutputProcessor, merge
from engine.request import FinishReason, OutputDelta, OutputError, Request, SamplingParams, TokenLogprobs
from engine.text.tokenizer import Tokenizer
from tests.support.tiny_model import EOS_ID, make_tokenizer


@lru_cache
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer())


def request(resumed: bytes = b"", n: int = 1, **params: Any) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=(1,),
        params=SamplingParams(max_tokens=200, n=n, **params),
        seed=0,
        resumed_output_token_ids=tuple(resumed),
    )


def update(text: bytes | tuple[int, ...] = b"", finish: FinishReason | None = None, **fields: Any) -> SequenceUpdate:
    return SequenceUpdate("r", fields.pop("sample_index", 0), tuple(text), finish_reason=finish, **fields)


def run(req: Request, updates: list[SequenceUpdate]) -> tuple[list[OutputDelta], OutputProcessor]:
    processor = OutputProcessor(tokenizer())
    deltas = [processor.open(req), *[processor.process(item) for item in updates]]
    return [delta for delta in deltas if delta is not None], processor


def text_of(deltas: list[OutputDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def ids_of(deltas: list[OutputDelta]) -> bytes:
    return bytes(token_id for delta in deltas for token_id in delta.token_ids)


def test_text_and_tokens_are_delivered_as_they_come() -> None:
    deltas, processor = run(request(), [update(b"he"), update(b"llo"), update(b"!", FinishReason.LENGTH)])
    assert [delta.text for delta in deltas] == ["he", "llo", "!"]
    assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.LENGTH]
    assert processor.take_finishes() == ()


def test_a_stop_string_ends_the_sample_at_once_and_asks_the_scheduler_to_finish_it() -> None:
    deltas, processor = run(request(stop=("lo w",)), [update(b"hello"), update(b" world, and more")])
    assert (text_of(deltas), ids_of(deltas)) == ("hel", b"hello w")
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, "lo w")
    assert processor.take_finishes() == (("r", 0),)
    assert processor.take_finishes() == ()


@pytest.mark.parametrize("last", [FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT])
def test_what_comes_after_a_stop_string_is_not_delivered(last: FinishReason) -> None:
    deltas, _ = run(request(stop=("lo",)), [update(b"hello"), update(b" world"), update(b"", last)])
    assert (text_of(deltas), ids_of(deltas)) == ("hel", b"hello")
    assert [delta.finish_reason for delta in deltas] == [FinishReason.STOP]


def test_a_stop_string_in_the_scheduler_s_last_update_needs_no_finish() -> None:
    deltas, processor = run(request(stop=("lo",)), [update(b"hello", FinishReason.LENGTH)])
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, "lo")
    assert processor.take_finishes() == ()


def test_text_held_back_for_a_stop_string_is_delivered_at_the_end() -> None:
    deltas, _ = run(request(stop=("hello",)), [update(b"hel"), update(b"p hel", FinishReason.LENGTH)])
    assert [delta.text for delta in deltas] == ["", "help hel"]


def test_a_stop_string_is_shown_when_asked_for() -> None:
    deltas, _ = run(request(stop=("lo",), include_stop_str_in_output=True), [update(b"hello world")])
    assert text_of(deltas) == "hello"


def test_stop_strings_neither_begin_nor_end_in_the_text_of_the_first_min_tokens_tokens() -> None:
    deltas, _ = run(request(stop=("ab",), min_tokens=3), [update(b"abab"), update(b"xab"), update(b"c")])
    assert text_of(deltas) == "ababx"


@pytest.mark.parametrize(("include", "shown"), [(False, "hell"), (True, "hello")])
def test_the_text_of_a_stop_token_is_shown_only_when_asked_for(include: bool, shown: str) -> None:
    params = {"stop_token_ids": (ord("o"),), "include_stop_str_in_output": include}
    deltas, _ = run(request(**params), [update(b"hell"), update(b"o", FinishReason.STOP, stop_reason=ord("o"))])
    assert (text_of(deltas), ids_of(deltas)) == (shown, b"hello")
    assert deltas[-1].stop_reason == ord("o")


def test_an_end_of_sequence_token_is_delivered_without_text() -> None:
    deltas, _ = run(request(), [update(b"hi"), update((EOS_ID,), FinishReason.STOP)])
    assert text_of(deltas) == "hi"
    assert deltas[-1].token_ids == (EOS_ID,)


def test_incomplete_characters_wait_for_their_end() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    deltas, _ = run(request(), [update(first), update(second), update(first, FinishReason.LENGTH)])
    assert [delta.text for delta in deltas] == ["", "é", "�"]


def test_logprobs_are_one_per_delivered_token() -> None:
    logprobs = tuple(TokenLogprobs(token_id, -1.0) for token_id in b"hello")
    deltas, _ = run(request(stop=("el",), logprobs=0), [update(b"hello", logprobs=logprobs)])
    assert deltas[0].logprobs == logprobs[:3]


def test_errors_and_cached_tokens_reach_the_caller() -> None:
    error = OutputError("request_failed", "logits were not finite")
    deltas, _ = run(request(), [update(b"a", FinishReason.ERROR, error=error, num_cached_tokens=7)])
    assert (deltas[0].finish_reason, deltas[0].error, deltas[0].num_cached_tokens) == (FinishReason.ERROR, error, 7)


def test_samples_of_one_request_have_texts_of_their_own() -> None:
    updates = [update(b"a", sample_index=0), update(b"xEND", sample_index=1), update(b"b", sample_index=0)]
    deltas, processor = run(request(n=2, stop=("END",)), updates)
    assert [(delta.sample_index, delta.text) for delta in deltas] == [(0, "a"), (1, "x"), (0, "b")]
    assert processor.take_finishes() == (("r", 1),)


def test_updates_of_a_dropped_request_are_not_delivered() -> None:
    processor = OutputProcessor(tokenizer())
    processor.open(request(n=2))
    processor.drop(request(n=2))
    assert processor.process(update(b"late", sample_index=1)) is None


def test_an_output_resumed_behind_its_stop_string_ends_at_once() -> None:
    deltas, processor = run(request(resumed=b"hello END", stop=("END",)), [update(b"more")])
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("", FinishReason.STOP)]
    assert processor.take_finishes() == (("r", 0),)


@settings(max_examples=200, deadline=None)
@given(
    data=st.lists(st.sampled_from("abé".encode()), min_size=1, max_size=24).map(bytes),
    cut=st.integers(0, 24),
    stop=st.lists(st.text("abé", min_size=1, max_size=3), max_size=2),
    min_tokens=st.integers(0, 6),
)
def test_a_resumed_output_goes_on_exactly_where_it_was_cut(
    data: bytes, cut: int, stop: list[str], min_tokens: int
) -> None:
    """Two replicas, the first of which died after `cut` tokens, deliver what one would have."""
    params = {"stop": tuple(stop), "min_tokens": min_tokens}

    def updates(tokens: bytes) -> list[SequenceUpdate]:
        return [*[update(bytes([token])) for token in tokens], update(b"", FinishReason.LENGTH)]

    whole, _ = run(request(**params), updates(data))
    first, _ = run(request(**params), updates(data)[: min(cut, len(data))])
    if first and first[-1].finish_reason is not None:
        assert first == whole
        return
    rest, _ = run(request(resumed=ids_of(first), **params), updates(data[len(ids_of(first)) :]))
    assert text_of(first) + text_of(rest) == text_of(whole)
    assert ids_of(first) + ids_of(rest) == ids_of(whole)
    assert rest[-1].finish_reason == whole[-1].finish_reason
    assert rest[-1].stop_reason == whole[-1].stop_reason


def test_merged_deltas_hold_everything_once() -> None:
    logprobs = tuple(TokenLogprobs(token_id, -0.5) for token_id in b"hello")
    parts = [
        update(b"he", logprobs=logprobs[:2]),
        update(b"llo", FinishReason.LENGTH, logprobs=logprobs[2:], num_cached_tokens=4),
    ]
    deltas, _ = run(request(logprobs=0), parts)
    merged = merge(deltas)
    assert (merged.text, bytes(merged.token_ids), merged.logprobs) == ("hello", b"hello", logprobs)
    assert (merged.finish_reason, merged.num_cached_tokens) == (FinishReason.LENGTH, 4)
