"""Prompt and text together read as the tokenizer decodes all tokens at once; transformers is the oracle."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engine.core.sequence import SequenceUpdate
from engine.output import OutputProcessor, merge
from engine.request import FinishReason, OutputDelta, Request, SamplingParams
from engine.text.detokenizer import CONTEXT_TOKENS, MAX_WINDOW_TOKENS, DetokenizerFactory
from engine.text.tokenizer import Tokenizer
from tests.text.tokenizers_for_tests import KINDS, SPECIAL

BYTE = re.compile(r"<0x(..)>")


@lru_cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind]()


@lru_cache
def factory_of(kind: str) -> DetokenizerFactory:
    return DetokenizerFactory(tokenizer_of(kind))


def continued(kind: str, prompt: Sequence[int], output: Sequence[int], *, skip: bool = True) -> str:
    detokenizer = factory_of(kind).new(prompt, skip_special_tokens=skip)
    return "".join(map(detokenizer.push, output)) + detokenizer.finish()


def decoded(kind: str, token_ids: Sequence[int], *, skip: bool = True) -> str:
    """The oracle."""
    tokenizer = tokenizer_of(kind)
    return str(tokenizer._hf.decode(list(token_ids), skip_special_tokens=skip))


def byte_runs(kind: str, token_ids: Sequence[int], skip: bool) -> Iterator[bytes]:
    """Of byte-fallback tokens; without text a token ends no run."""
    tokenizer, run = tokenizer_of(kind), bytearray()
    if kind.startswith("byte_level"):
        return
    for token_id in token_ids:
        token = tokenizer.id_to_token(token_id)
        if token is None or (skip and token in SPECIAL):
            continue
        match = BYTE.fullmatch(token)
        if match:
            run.append(int(match[1], 16))
        else:
            yield bytes(run)
            run.clear()
    yield bytes(run)


def is_shown_too_early(run: bytes) -> bool:
    """Broken as a whole, with a valid character in front: it was shown before that was known."""
    try:
        run.decode()
    except UnicodeDecodeError as error:
        return error.start > 0
    return False


def some_tokens(kind: str, data: st.DataObject, max_size: int) -> list[int]:
    """Any ids, some that the tokenizer does not know, and characters spelled in bytes where there are such tokens."""
    tokenizer = tokenizer_of(kind)
    any_id = st.integers(0, tokenizer.vocab_size + 3).map(lambda i: [i])
    pieces = [any_id, st.sampled_from(SPECIAL).map(lambda token: [tokenizer.backend.token_to_id(token)])]
    if tokenizer.backend.token_to_id("<0xE4>") is not None:
        words = [i for i in range(tokenizer.vocab_size) if not BYTE.fullmatch(tokenizer.id_to_token(i) or "")]
        spelled = [*"aé你🙂 \n".encode(), *b" \xff"]
        ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        pieces += [st.sampled_from(words).map(lambda i: [i]), st.sampled_from(spelled).map(lambda b: [ids[b]])]
        pieces.append(st.sampled_from("é你🙂 ").map(lambda c: [ids[b] for b in c.encode()]))
    return [i for piece in data.draw(st.lists(st.one_of(pieces), max_size=max_size)) for i in piece]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_prompt_and_text_are_what_all_tokens_say(kind: str, data: st.DataObject, skip: bool) -> None:
    prompt, output = some_tokens(kind, data, 6), some_tokens(kind, data, 24)
    before, whole = decoded(kind, prompt, skip=skip), decoded(kind, [*prompt, *output], skip=skip)
    assume(whole.startswith(before))
    assume(not any(map(is_shown_too_early, byte_runs(kind, [*prompt, *output], skip))))
    assert continued(kind, prompt, output, skip=skip) == whole[len(before) :]


def request(prompt: Sequence[int], n: int = 1, resumed: Sequence[int] = (), **params: object) -> Request:
    return Request(
        request_id="r",
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=100, n=n, **params),  # type: ignore[arg-type]
        seed=0,
        resumed_output_token_ids=tuple(resumed),
    )


def deltas(kind: str, asked: Request, steps: Sequence[Sequence[int]]) -> list[OutputDelta]:
    """What callers get of sample 0 when each step brings some tokens."""
    processor = OutputProcessor(tokenizer_of(kind))
    assert processor.open(asked) is None
    updates = [SequenceUpdate("r", 0, tuple(ids)) for ids in steps]
    found = [processor.process(update) for update in (*updates, SequenceUpdate("r", 0, (), None, FinishReason.LENGTH))]
    return [delta for delta in found if delta is not None]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_however_the_text_is_streamed_merged_or_resumed_it_is_the_same(
    kind: str, data: st.DataObject, skip: bool
) -> None:
    prompt, output = some_tokens(kind, data, 4) or [1], some_tokens(kind, data, 12)
    whole = continued(kind, prompt, output, skip=skip)
    one_by_one = deltas(kind, request(prompt, skip_special_tokens=skip), [[i] for i in output])
    assert "".join(delta.text for delta in one_by_one) == merge(one_by_one).text == whole
    cut = data.draw(st.integers(0, len(output)))
    assert merge(deltas(kind, request(prompt, skip_special_tokens=skip), [output[:cut], output[cut:]])).text == whole
    rest = deltas(kind, request(prompt, resumed=output[:cut], skip_special_tokens=skip), [output[cut:]])
    shown = "".join(delta.text for delta in one_by_one[:cut])
    assert shown + merge(rest).text == whole


def test_every_sample_of_a_prompt_begins_behind_it() -> None:
    tokenizer = tokenizer_of("llama2")
    prompt, word = tokenizer.encode("a"), tokenizer.backend.token_to_id("▁wor")
    processor = OutputProcessor(tokenizer)
    processor.open(request(prompt, n=3))
    found = [processor.process(SequenceUpdate("r", index, (word,))) for index in range(3)]
    assert [delta.text for delta in found if delta is not None] == [" wor"] * 3


@pytest.mark.parametrize(
    ("kind", "prompt", "text"),
    [
        ("llama2", ["▁he", "llo"], " wor"),  # a word behind a word keeps its space
        ("llama2", ["▁"], " wor"),
        ("llama2", ["<s>"], "wor"),  # the first of all loses it, as the decoder wants
        ("llama2", ["<s>", "▁a", "</s>"], " wor"),
        ("llama2", ["<0x0A>"], " wor"),
        ("llama2", [], "wor"),
        ("gemma", ["▁he", "llo"], " wor"),
        ("gemma", [], " wor"),
        ("metaspace_with_bytes", ["a"], " wor"),
        ("metaspace_with_bytes", ["<s>"], "wor"),
        ("two_stripped", ["▁▁", "▁▁", "a"], " wor"),
    ],
)
def test_the_first_word_of_a_continuation_keeps_the_space_it_was_given(kind: str, prompt: list[str], text: str) -> None:
    backend = tokenizer_of(kind).backend
    assert continued(kind, [backend.token_to_id(token) for token in prompt], [backend.token_to_id("▁wor")]) == text


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_stripped", "llama2", "gemma", "metaspace_with_bytes"])
@pytest.mark.parametrize("character", ["é", "你", "🙂"])
def test_a_character_that_the_prompt_begins_is_shown_when_the_output_completes_it(kind: str, character: str) -> None:
    ids = [byte_token(kind, byte) for byte in character.encode()]
    a = tokenizer_of(kind).backend.token_to_id("a")
    for cut in range(1, len(ids)):
        assert continued(kind, [a, *ids[:cut]], [*ids[cut:], a]) == character + "a"
        assert continued(kind, [a, *ids[:cut]], [a]) == "a", "that it was never completed is the prompt's to show"
        assert continued(kind, [a, *ids[:cut]], []) == ""


def byte_token(kind: str, byte: int) -> int:
    tokenizer, factory = tokenizer_of(kind), factory_of(kind)
    is_that = factory.bytes_of if kind.startswith("byte_level") else lambda i: bytes((factory.byte_of(i) or 0,))
    return next(i for i in range(tokenizer.vocab_size) if is_that(i) == bytes((byte,)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_costs_the_same_however_long_prompt_and_text_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(kind)
    factory = DetokenizerFactory(tokenizer)
    sizes: list[int] = []
    decode = Tokenizer.decode

    def counted(self: Tokenizer, token_ids: list[int], **how: bool) -> str:
        sizes.append(len(token_ids))
        return decode(self, token_ids, **how)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    ids = [i % tokenizer.vocab_size for i in range(0, 5000, 7)]
    detokenizer = factory.new(ids * 20)
    assert sum(sizes) <= 2 * 32, "a prompt costs its last tokens"
    for token_id in ids:
        sizes.clear()
        detokenizer.push(token_id)
        assert sum(sizes) <= MAX_WINDOW_TOKENS + CONTEXT_TOKENS
