"""A stop string may spell special tokens, which have no text: the sample stops there, and no name of one is shown."""

from __future__ import annotations

from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from engine.core.sequence import SequenceUpdate
from engine.output import OutputProcessor, merge
from engine.request import FinishReason, OutputDelta, Request, SamplingParams
from engine.text.stop import StopMatcher
from engine.text.tokenizer import Tokenizer
from tests.text.tokenizers_for_tests import byte_fallback, byte_level, word_piece

END, EOT, SYS = "<|im_end|>", "<|eot|>", "[SYS]"
HIDDEN = ("<x>", "<xy>", "ab")  # of the property test: names that overlap with text and with each other


@lru_cache
def tokenizer_of(kind: str) -> Tokenizer:
    made = {"byte_level": byte_level, "llama2": byte_fallback, "word_piece": word_piece}[kind]()
    fast: PreTrainedTokenizerFast = made._hf
    fast.add_special_tokens({"additional_special_tokens": [END, EOT, SYS]})
    fast.add_tokens([AddedToken("<|plain|>", normalized=False)])
    return Tokenizer(fast)


def ids_of(kind: str, *parts: str) -> tuple[int, ...]:
    """Special tokens by name, any other part as it is encoded."""
    tokenizer = tokenizer_of(kind)
    names = (END, EOT, SYS, "<s>", "</s>", "<pad>")
    return tuple(
        i
        for part in parts
        for i in (
            [tokenizer.backend.token_to_id(part)] if part in names else tokenizer.encode(part, add_special_tokens=False)
        )
    )


def run(
    kind: str,
    token_ids: tuple[int, ...],
    stop: tuple[str, ...],
    last: FinishReason = FinishReason.LENGTH,
    **params: bool | int,
) -> tuple[list[OutputDelta], OutputProcessor]:
    request = Request(
        request_id="r",
        prompt_token_ids=ids_of(kind, "<s>"),
        params=SamplingParams(max_tokens=99, stop=stop, **params),  # type: ignore[arg-type]
        seed=0,
    )
    processor = OutputProcessor(tokenizer_of(kind))
    processor.open(request)
    updates = [SequenceUpdate("r", 0, (i,)) for i in token_ids[:-1]]
    updates.append(SequenceUpdate("r", 0, token_ids[-1:], None, last))
    return [delta for delta in map(processor.process, updates) if delta is not None], processor


CASES = {  # what is produced, the stop strings, the text, the one that ended it
    "one special token": (("a b", END, "c"), (END,), "a b", END),
    "at once": ((END, "c"), (END,), "", END),
    "after a line break": (("a\n", END, "c"), ("\n" + END,), "a", "\n" + END),
    "after a word": (("hi\nUser:", EOT, "c"), ("User:" + EOT,), "hi\n", "User:" + EOT),
    "before a word": (("a", EOT, "User: b"), (EOT + "User",), "a", EOT + "User"),
    "between words": (("a b", SYS, "c d"), ("b" + SYS + "c",), "a ", "b" + SYS + "c"),
    "two in a row": (("a", EOT, END, "c"), (EOT + END,), "a", EOT + END),
    "the second of two": (("a", EOT, END, "c"), (END,), "a", END),
    "three, with text": (("a", END, "\n", "<s>", "b", EOT, "c"), (END + "\n<s>b" + EOT,), "a", END + "\n<s>b" + EOT),
    "the end of a sequence": (("a", "</s>", "b"), ("</s>",), "a", "</s>"),
    "padding": (("a", "<pad>", "b"), ("<pad>",), "a", "<pad>"),
    "an added token that is not special": (("a", "<|plain|>", "b"), ("<|plain|>",), "a", "<|plain|>"),
    "special and added": (("a", "<|plain|>", END, "b"), ("<|plain|>" + END,), "a", "<|plain|>" + END),
    "written out by the model": (("a <", "|im_end", "|> b"), (END,), "a ", END),
    "the first of two stop strings": (("a", EOT, "b", END), (END, EOT), "a", EOT),
    "the longer of two": (("a\n", END), (END, "\n" + END), "a", "\n" + END),
    "around a hidden token": (("a", END, "b c"), ("ab",), "", "ab"),
    "another special token": (("a", EOT, "b"), (END,), "ab", None),
    "a part of its name": (("a", END, "b"), ("im_end",), "ab", None),
    "the end of its name": (("a", END, "b"), ("|>b", "|>"), "ab", None),
    "the beginning of its name": (("a", END, "b"), ("a<|im",), "ab", None),
    "only the line break": (("a\n", EOT, "b"), ("\n" + END,), "a\nb", None),
}


@pytest.mark.parametrize("name", CASES)
def test_a_stop_string_may_spell_special_tokens(name: str) -> None:
    produced, stop, text, reason = CASES[name]
    token_ids = ids_of("byte_level", *produced)
    deltas, processor = run("byte_level", token_ids, stop)
    whole = merge(deltas)
    assert (whole.text, whole.stop_reason) == (text, reason)
    assert whole.finish_reason is (FinishReason.LENGTH if reason is None else FinishReason.STOP)
    assert all(text.startswith("".join(delta.text for delta in deltas[:k])) for k in range(len(deltas)))
    ended_early = reason is not None and len(whole.token_ids) < len(token_ids)
    assert processor.take_finishes() == ((("r", 0),) if ended_early else ())
    together, _ = run("byte_level", token_ids, stop, include_stop_str_in_output=True)
    assert merge(together).text == text + (reason or "")


@pytest.mark.parametrize("kind", ["llama2", "word_piece"])
def test_other_kinds_of_tokenizers_stop_there_too(kind: str) -> None:
    deltas, _ = run(kind, ids_of(kind, "hello", EOT, END, "world"), (EOT + END,))
    assert merge(deltas).text == "hello"
    assert merge(deltas).stop_reason == EOT + END


def test_what_could_begin_such_a_stop_string_is_held_back_and_released() -> None:
    stop = ("\n" + END + "b",)
    deltas, _ = run("byte_level", ids_of("byte_level", "a\n", END, "c\n", END, "b"), stop)
    shown = ["".join(delta.text for delta in deltas[:count]) for count in range(1, len(deltas) + 1)]
    assert set(shown) == {"a", "a\nc"}, "a line break alone may begin the stop string"
    assert shown[-1] == "a\nc"


def test_a_stop_string_that_ends_with_the_end_of_sequence_is_cut_from_the_text() -> None:
    token_ids = ids_of("byte_level", "a\n", "</s>")
    deltas, _ = run("byte_level", token_ids, ("\n</s>",), FinishReason.STOP)
    assert (merge(deltas).text, merge(deltas).stop_reason) == ("a", "\n</s>")
    deltas, _ = run("byte_level", token_ids, ("x</s>",), FinishReason.STOP)
    assert (merge(deltas).text, merge(deltas).stop_reason) == ("a\n", None)


def test_special_tokens_of_the_first_min_tokens_tokens_stop_nothing() -> None:
    token_ids = ids_of("byte_level", END, "a", END, "b")
    deltas, _ = run("byte_level", token_ids, (END,), min_tokens=1)
    assert (merge(deltas).text, merge(deltas).stop_reason) == ("a", END)


def test_names_are_shown_and_found_when_special_tokens_are_part_of_the_text() -> None:
    token_ids = ids_of("byte_level", "a", EOT, "b", END, "c")
    deltas, _ = run("byte_level", token_ids, (END,), skip_special_tokens=False)
    assert (merge(deltas).text, merge(deltas).stop_reason) == ("a" + EOT + "b", END)
    deltas, _ = run("byte_level", token_ids, ("t|>b",), skip_special_tokens=False)
    assert merge(deltas).text == "a<|eo"


Piece = tuple[str, bool]  # text, and whether it is a hidden token's


def searched(pieces: list[Piece], stops: list[str]) -> tuple[str, str | None]:
    """The text before the match that is complete first, by looking at every end; of equals, the longest."""
    shown = written = ""
    begins: set[int] = set()  # places in `written` where a match may begin
    for text, is_hidden in pieces:
        steps = [text] if is_hidden else list(text)
        for step in steps:
            begins.add(len(written))
            written += step
            shown += "" if is_hidden else step
            for stop in sorted(stops, key=len, reverse=True):
                if not is_hidden and shown.endswith(stop):
                    return shown[: -len(stop)], stop
                spells = any(name in stop for name in HIDDEN)
                if spells and written.endswith(stop) and len(written) - len(stop) in begins:
                    return shown_part(pieces, len(written) - len(stop)), stop
    return shown, None


def shown_part(pieces: list[Piece], end: int) -> str:
    """Of the first `end` written characters, those that are shown."""
    found, place = "", 0
    for text, is_hidden in pieces:
        if not is_hidden:
            found += text[: max(0, end - place)]
        place += len(text)
    return found


pieces = st.lists(
    st.one_of(
        st.text("<xy>ab", min_size=1, max_size=3).map(lambda text: (text, False)),
        st.sampled_from(HIDDEN).map(lambda name: (name, True)),
    ),
    max_size=12,
)
stop_strings = st.lists(
    st.lists(st.sampled_from([*HIDDEN, *"<xy>ab"]), min_size=1, max_size=3).map("".join), min_size=1, max_size=3
)


@settings(max_examples=600, deadline=None)
@given(pieces=pieces, stops=stop_strings)
def test_matches_are_those_of_a_search_of_all_places(pieces: list[Piece], stops: list[str]) -> None:
    matcher = StopMatcher(stops, special_texts=HIDDEN)
    shown = ""
    for text, is_hidden in pieces:
        shown += matcher.push_hidden(text) if is_hidden else matcher.push(text)
    expected, matched = searched(pieces, stops)
    assert expected.startswith(shown), "more was shown than is certain"
    assert (shown + matcher.finish(), matcher.matched) == (expected, matched)
