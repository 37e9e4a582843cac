"""Grammars: each grammar is compiled once, off the step, and kept while it is used or was used lately."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from engine.errors import InvalidRequest
from engine.grammar.matcher import Matcher, brief
from engine.grammar.spec import GrammarSpec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

    from engine.text.tokenizer import Tokenizer

MAX_KEPT = 256  # compiled grammars beyond those of requests under way
MAX_KEPT_BYTES = 2**23  # of their texts
_Key = tuple[str, str]


class CompiledGrammar:
    """A grammar that requests share. `matcher` may be called from any thread."""

    def __init__(self, key: _Key, state: LLMatcher, mask_bytes: int) -> None:
        self.key = key
        self._state = state
        self._mask_bytes = mask_bytes

    def matcher(self, token_ids: Sequence[int] = ()) -> Matcher:
        """Of an answer that begins with these tokens."""
        matcher = Matcher(self._state.deep_copy(), self._mask_bytes)
        matcher.take(token_ids)
        return matcher


class Grammars:
    """The grammars of one model. All methods may be called from any thread.

    One is compiled at a time: the library gives up the interpreter's lock meanwhile, and a queue of strangers' grammars
    takes no more than one core. What could not be compiled is remembered as long as what could.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._lock = threading.Lock()  # of what follows
        self._kept: OrderedDict[_Key, CompiledGrammar | str] = OrderedDict()  # a text: why it cannot be followed
        self._kept_bytes = 0
        self._used: WeakValueDictionary[_Key, CompiledGrammar] = WeakValueDictionary()
        self._compiling = threading.Lock()
        self._vocabulary: LLTokenizer | None = None

    def find(self, spec: GrammarSpec) -> CompiledGrammar | None:
        """It, if it is compiled. Raises: InvalidRequest if it was tried before."""
        key = (spec.kind, spec.text)
        with self._lock:
            found = self._used.get(key) or self._kept.get(key)
            if key in self._kept:
                self._kept.move_to_end(key)
        if isinstance(found, str):
            raise _refusal(spec, found)
        return found

    def compiled(self, spec: GrammarSpec) -> CompiledGrammar:
        """It, compiled now if need be: up to about a second. Raises: InvalidRequest naming the field it came in."""
        if (found := self.find(spec)) is not None:
            return found
        with self._compiling:
            if (found := self.find(spec)) is not None:
                return found
            key = (spec.kind, spec.text)
            made = self._compile(key, spec)
            self._keep(key, made)
        if isinstance(made, str):
            raise _refusal(spec, made)
        return made

    def _keep(self, key: _Key, made: CompiledGrammar | str) -> None:
        with self._lock:
            if isinstance(made, CompiledGrammar):
                self._used[key] = made
            self._kept[key] = made
            self._kept_bytes += len(key[1])
            while len(self._kept) > MAX_KEPT or (self._kept_bytes > MAX_KEPT_BYTES and len(self._kept) > 1):
                (_, text), _ = self._kept.popitem(last=False)
                self._kept_bytes -= len(text)

    def _compile(self, key: _Key, spec: GrammarSpec) -> CompiledGrammar | str:
        try:
            from llguidance import LLMatcher

            from engine.grammar.source import source
        except ImportError:
            return "this server lacks the package 'llguidance', which follows grammars; install it"
        try:
            vocabulary = self._known_vocabulary()
            state = LLMatcher(vocabulary, source(spec), log_level=0, limits=_limits())
        except RecursionError:
            return "it is nested too deeply; flatten it"
        except ValueError as error:
            return brief(str(error))
        if state.is_error():
            return brief(state.get_error())
        return CompiledGrammar(key, state, (self.vocab_size + 7) // 8)

    def _known_vocabulary(self) -> LLTokenizer:
        """What each token says, once for all grammars: a second for the largest. Raises: ValueError."""
        if self._vocabulary is None:
            from llguidance import LLTokenizer

            text = self._tokenizer.backend.to_str()
            try:
                self._vocabulary = LLTokenizer(text, n_vocab=self.vocab_size, eos_token=self._eos_token_ids or None)
            except Exception as error:  # the Rust side raises bare exceptions
                raise ValueError(f"the tokenizer of this model has no bytes for its tokens ({error})") from error
        return self._vocabulary


class NoGrammars:
    """Of an engine that follows none."""

    def compiled(self, spec: GrammarSpec) -> CompiledGrammar:
        """Raises: InvalidRequest."""
        raise InvalidRequest(spec.field, "this engine follows no grammars; leave it out")


NO_GRAMMARS = NoGrammars()


def _limits() -> LLParserLimits:
    """Bounds of one grammar: about 0.4 s to compile, a few milliseconds for a token (docs/decisions/0037)."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=500_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        verbose_errors=False,
    )


def _refusal(spec: GrammarSpec, reason: str) -> InvalidRequest:
    return InvalidRequest(spec.field, f"this {spec.kind} cannot be followed: {reason}")
