"""Which tokens may come next, token by token, against another reader of regular expressions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import regex

from engine.errors import InvalidRequest
from engine.grammar.compiler import Grammars
from engine.grammar.spec import GrammarSpec
from engine.text.tokenizer import Tokenizer
from tests.text import tokenizers_for_tests as zoo

TOKENIZERS: list[Callable[[], Tokenizer]] = [zoo.byte_level, zoo.byte_fallback]
PATTERNS = [
    ("[a-z]+ing", "sing"),
    (r"\d{3}-\d{4}", "555-0123"),
    ("(yes|no|maybe)", "maybe"),
    ("a*b?c{2,4}", "aabccc"),
    (r"(\w+ ){1,3}\w+", "the cat sat"),
    ("[^x]*x", "abc x"),
]
EOS = 0


def _allowed(grammars: Grammars, spec: GrammarSpec, taken: list[int], guesses: tuple[int, ...] = ()) -> list[set[int]]:
    matcher = grammars.compiled(spec).matcher(taken)
    bits = np.zeros((1 + len(guesses), (grammars.vocab_size + 7) // 8), dtype=np.uint8)
    matcher.fill(bits, guesses)
    return [set(np.unpackbits(row, bitorder="little").nonzero()[0].tolist()) for row in bits]


@pytest.mark.parametrize("make", TOKENIZERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize(("pattern", "text"), PATTERNS)
def test_a_token_may_come_if_some_text_goes_on_so(make: Callable[[], Tokenizer], pattern: str, text: str) -> None:
    tokenizer = make()
    grammars = Grammars(tokenizer, tokenizer.vocab_size + 9, [EOS])
    spec, reader = GrammarSpec("regex", pattern), regex.compile(pattern)
    added = set(tokenizer.backend.get_added_tokens_decoder())
    written = {i: _text(tokenizer, i) for i in range(tokenizer.vocab_size) if i not in added}
    taken: list[int] = []
    said = ""
    for character in text:
        (allowed,) = _allowed(grammars, spec, taken)
        forced = grammars.compiled(spec).matcher(taken).forced()
        if forced:  # of the tokens that write the only text, those are told that the tokenizer would take
            assert allowed == {forced[0]}
        for token_id, piece in () if forced else written.items():
            if piece:
                fits = reader.fullmatch(said + piece, partial=True) is not None
                assert (token_id in allowed) == fits, (said, piece)
        assert (EOS in allowed) == (reader.fullmatch(said) is not None)
        assert max(allowed) < tokenizer.vocab_size, "padding is never chosen"
        token_id = next(i for i, piece in written.items() if piece == character)
        taken.append(token_id)
        said += character
    assert _allowed(grammars, spec, taken)[0] >= {EOS}


def _text(tokenizer: Tokenizer, token_id: int) -> str | None:
    """What a token says by itself; None if that is no whole character."""
    word = tokenizer.id_to_token(token_id) or ""
    if word.startswith("<0x"):
        byte = int(word[3:-1], 16)
        return chr(byte) if byte < 128 else None
    if "▁" in word:
        return word.replace("▁", " ")
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    return None if "\ufffd" in text or not text.isascii() else text


def test_rows_behind_guesses_are_those_of_the_tokens_taken() -> None:
    tokenizer = zoo.byte_level()
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [EOS])
    spec = GrammarSpec("regex", "(ab)+c")
    ids = tuple(tokenizer.encode("ababc", add_special_tokens=False))
    singles = [_allowed(grammars, spec, list(ids[:n]))[0] for n in range(len(ids))]
    assert _allowed(grammars, spec, [], ids[:-1]) == singles
    other = next(i for i in range(tokenizer.vocab_size) if i not in singles[1])
    wrong = (ids[0], other, ids[1])
    rows = _allowed(grammars, spec, [], wrong)
    assert rows[:2] == singles[:2]
    assert rows[2:] == [set(), set()], "rows behind a guess that does not fit stay as they were"


def test_a_grammar_is_compiled_once_and_a_refusal_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = zoo.byte_level()
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [EOS])
    num_compiled = 0
    compile_one = grammars._compile

    def count(*args: object) -> object:
        nonlocal num_compiled
        num_compiled += 1
        return compile_one(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(grammars, "_compile", count)
    good, bad = GrammarSpec("regex", "a+"), GrammarSpec("regex", "(a", field="here")
    assert grammars.find(good) is None
    first = grammars.compiled(good)
    assert grammars.compiled(GrammarSpec("regex", "a+", field="elsewhere")) is first is grammars.find(good)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="here: this regex cannot be followed"):
            grammars.compiled(bad)
    assert num_compiled == 2


def test_a_grammar_in_use_is_not_forgotten_and_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.grammar.compiler.MAX_KEPT", 4)
    tokenizer = zoo.byte_level()
    grammars = Grammars(tokenizer, tokenizer.vocab_size, [EOS])
    specs = [GrammarSpec("regex", "a" * n) for n in range(1, 9)]
    used = grammars.compiled(specs[0])
    for spec in specs[1:]:
        grammars.compiled(spec)
    assert grammars.find(specs[0]) is used
    assert grammars.find(specs[1]) is None
    assert grammars.find(specs[-1]) is not None
