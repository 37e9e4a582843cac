"""Streamed text is the text: nothing lost, nothing repeated, no half characters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from engine.text.detokenizer import DetokenizerFactory
from engine.text.tokenizer import Tokenizer
from tests.text import tokenizers_for_tests as kinds

KINDS = {
    "byte_level": kinds.byte_level,
    "metaspace": kinds.metaspace,
    "llama2": kinds.byte_fallback,
    "gemma": lambda: kinds.byte_fallback(strip=False),
    "word_piece": kinds.word_piece,
}
EXACT_FOR_ANY_IDS = ["byte_level", "metaspace", "word_piece"]


@lru_cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind]()


@lru_cache
def factory_of(kind: str) -> DetokenizerFactory:
    return DetokenizerFactory(tokenizer_of(kind))


def deltas(kind: str, token_ids: Sequence[int]) -> list[str]:
    detokenizer = factory_of(kind).new()
    return [*[detokenizer.push(token_id) for token_id in token_ids], detokenizer.finish()]


@pytest.mark.parametrize("kind", EXACT_FOR_ANY_IDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_deltas_of_any_ids_add_up_to_the_decoded_text(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    # A few ids beyond the vocabulary: models pad theirs, and a random model samples such ids.
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    assert "".join(deltas(kind, token_ids)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("kind", ["llama2", "gemma"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_deltas_of_byte_fallback_tokens_that_spell_text_add_up_to_the_decoded_text(
    kind: str, data: st.DataObject
) -> None:
    tokenizer = tokenizer_of(kind)
    backend = tokenizer.backend

    def spelled(character: str) -> list[int]:
        return [backend.token_to_id(f"<0x{byte:02X}>") for byte in character.encode()]

    others = [i for i in range(tokenizer.vocab_size) if not (tokenizer.id_to_token(i) or "").startswith("<0x")]
    piece = st.one_of(st.sampled_from(others).map(lambda i: [i]), st.sampled_from("aé你🙂 \n\x00").map(spelled))
    token_ids = [i for ids in data.draw(st.lists(piece, max_size=30)) for i in ids]
    assert "".join(deltas(kind, token_ids)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet=st.sampled_from("héllo 你🙂\nabc world"), max_size=40))
def test_an_encoded_text_streams_as_it_decodes(kind: str, text: str) -> None:
    token_ids = tokenizer_of(kind).encode(text)
    assert "".join(deltas(kind, token_ids)) == tokenizer_of(kind).decode(token_ids)


@pytest.mark.parametrize("kind", ["byte_level", "llama2"])
def test_a_character_spread_over_tokens_appears_once_it_is_complete(kind: str) -> None:
    backend = tokenizer_of(kind).backend
    as_characters = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("🙂")[0][0]
    names = as_characters if kind == "byte_level" else ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>"]
    token_ids = [backend.token_to_id(name) for name in names]
    assert deltas(kind, token_ids) == ["", "", "", "🙂", ""]


def test_a_sequence_that_is_never_completed_becomes_a_replacement_character_at_the_end() -> None:
    first_byte = tokenizer_of("byte_level").backend.token_to_id("ð")
    assert deltas("byte_level", [first_byte]) == ["", "�"]


def test_valid_characters_of_a_broken_byte_run_are_kept() -> None:
    ids = [tokenizer_of("gemma").backend.token_to_id(f"<0x{byte:02X}>") for byte in [*"é".encode(), 0xFF]]
    assert "".join(deltas("gemma", ids)) == "é�"


def test_special_tokens_have_no_text_but_other_added_tokens_do() -> None:
    tokenizer = tokenizer_of("byte_level")
    ids = tokenizer.encode("<s>ab<plain added>c</s>")
    assert "".join(deltas("byte_level", ids)) == "ab<plain added>c"
