"""Text to token ids in a thread pool, with the limits of one request; and tokens back to text for log-probabilities."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from deployments.asks import Ask, Chat, Prompt
from deployments.calls import Fault, Refused
from deployments.settings.app import LimitSettings
from engine.errors import ConfigError, InvalidRequest
from engine.request import SamplingParams
from engine.text.detokenizer import Detokenizer, DetokenizerFactory
from engine.text.tokenizer import Tokenizer

NUM_THREADS = 2
INLINE_CHARS = 1024  # a thread would cost more than a prompt of this length
INLINE_MESSAGES = 8
MAX_ENDINGS = 4  # tokens that a tokenizer writes behind a text


class Prompts:
    """Tokenises for a router. The Rust tokenizer releases the interpreter lock, so the event loop goes on."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, limits: LimitSettings) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._limits = limits
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenizer")
        self._pieces = DetokenizerFactory(tokenizer)

    @classmethod
    def load(cls, model: str, tokenizer: str | None, limits: LimitSettings) -> Prompts:
        """Raises: ConfigError when the folder has no tokenizer or no vocabulary size."""
        return cls(Tokenizer.load(tokenizer or model), _vocab_size(model), limits)

    async def encode(self, ask: Ask) -> list[tuple[int, ...]]:
        """Token ids of each prompt. Raises: InvalidRequest naming the field; Refused when there is too much."""
        limit = self._limits.max_prompts if ask.numbers is None else self._limits.max_inputs
        if len(ask.prompts) > limit:
            raise InvalidRequest(ask.prompt_param, f"{len(ask.prompts)} prompts, the limit is {limit}; send fewer")
        if ask.numbers is None and len(ask.prompts) * ask.params.n > self._limits.max_samples:
            raise InvalidRequest(
                "n",
                f"{len(ask.prompts)} prompts times n={ask.params.n} is over the limit of {self._limits.max_samples}",
            )
        num_ids = sum(len(prompt) for prompt in ask.prompts if isinstance(prompt, tuple))
        if num_ids > self._limits.max_prompt_ids:
            message = f"{num_ids} token ids, the limit is {self._limits.max_prompt_ids}; send fewer"
            raise Refused(
                Fault(code="prompt_too_large", message=f"{ask.prompt_param}: {message}", param=ask.prompt_param)
            )
        self.check_ids("logit_bias", ask.params.logit_bias)
        if len(ask.prompts) == 1 and _is_small(ask.prompts[0]):
            return [self._encode_one(ask.prompts[0], ask)]
        run = asyncio.get_running_loop().run_in_executor
        return await asyncio.gather(*(run(self._pool, self._encode_one, prompt, ask) for prompt in ask.prompts))

    async def pieces(self, text: str, add_special_tokens: bool, param: str) -> list[tuple[int, str, int, int]]:
        """Of each token of `text` its id, its word, its beginning and its end in characters.

        Raises: InvalidRequest naming `param`; Refused when it is too long.
        """
        self._check_size(len(text.encode(errors="replace")), param)
        text = _valid(text, param)
        if _is_small(text):
            return self._tokenizer.pieces(text, add_special_tokens)
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._pool, self._tokenizer.pieces, text, add_special_tokens)

    async def around(self, chat: Chat, gap: str, param: str) -> tuple[str, str]:
        """What the chat template writes before and behind `gap`, which some message of `chat` holds.

        Raises: InvalidRequest naming `param`; Refused when it is too long.
        """
        self._check_size(_num_bytes(chat), param)
        run = asyncio.get_running_loop().run_in_executor
        rendered = await run(self._pool, self._tokenizer.render_chat, chat.messages)
        before, *after = rendered.split(gap)
        if len(after) != 1:
            raise InvalidRequest(param, "the model's chat template does not write what a user says as it was said once")
        return before, after[0]

    @property
    def has_chat_template(self) -> bool:
        return self._tokenizer.has_chat_template

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    async def forked(
        self, before: str, pieces: Sequence[str], param: str, *, add_special_tokens: bool
    ) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        """Tokens of the beginning of a prompt, and of pieces of text that may stand anywhere behind it.

        Each is tokenised once, and by itself. Raises: InvalidRequest naming `param`; Refused when it is too long.
        """
        self._check_size(len(before.encode(errors="replace")), param)
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._pool, self._fork, _valid(before, param), pieces, add_special_tokens)

    def _fork(
        self, before: str, pieces: Sequence[str], add_special_tokens: bool
    ) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
        encode = self._tokenizer.encode
        plain = encode(before, False)
        whole = encode(before, True) if add_special_tokens else plain
        for _ in range(MAX_ENDINGS):  # what is written behind a whole text is not behind this one
            if whole[len(whole) - len(plain) :] == plain:
                break
            whole = whole[:-1]
        else:
            whole = plain
        line = encode("\n", False)
        found = []
        for piece in pieces:
            behind = encode("\n" + piece, False)  # some tokenizers write a space before the first word of any text
            is_behind = behind[: len(line)] == line
            found.append(tuple(behind[len(line) :] if is_behind else encode(piece, False)))
        return tuple(whole), found

    def _encode_one(self, prompt: Prompt, ask: Ask) -> tuple[int, ...]:
        """In a thread of the pool if it is long, as is all that grows with the prompt."""
        param = ask.prompt_param
        ids: Sequence[int]
        if isinstance(prompt, tuple):
            self.check_ids(param, prompt)
            ids = prompt
        elif isinstance(prompt, Chat):
            self._check_size(_num_bytes(prompt), param)
            special = bool(ask.add_special_tokens)
            text = self._tokenizer.render_chat(prompt.messages, **prompt.args)
            ids = self._tokenizer.encode(text, add_special_tokens=special)
        else:
            self._check_size(len(prompt.encode(errors="replace")), param)
            ids = self._tokenizer.encode(_valid(prompt, param), ask.add_special_tokens is not False)
        if not ids:
            raise InvalidRequest(param, "the prompt has no tokens; send at least one")
        return tuple(ids[-ask.truncate :] if ask.truncate else ids)

    def check_ids(self, param: str, token_ids: Collection[int]) -> None:
        """Raises: InvalidRequest naming `param` for one that the model does not have."""
        for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequest(param, f"token id {_shown(token_id)} is outside [0, {self._vocab_size})")

    def _check_size(self, num_bytes: int, param: str) -> None:
        limit = self._limits.max_prompt_bytes
        if num_bytes > limit:
            message = f"{param} has {num_bytes} bytes, the limit is {limit}; send a shorter one"
            raise Refused(Fault(code="prompt_too_large", message=message, param=param))

    def params_of(self, ask: Ask) -> SamplingParams:
        """The parameters of `ask`, with its bad words as tokens: each as a text begins with it, and behind a space.

        Raises: InvalidRequest naming a field.
        """
        if not ask.bad_words:
            return ask.params
        words: list[tuple[int, ...]] = []
        for word in ask.bad_words:
            for text in (word.lstrip(), f" {word.lstrip()}"):
                ids = tuple(self._tokenizer.encode(_valid(text, "bad_words"), add_special_tokens=False))
                words += [ids] if ids else []
        try:
            return replace(ask.params, bad_words_token_ids=tuple(words))
        except InvalidRequest as error:
            raise InvalidRequest(error.param.removesuffix("_token_ids"), error.message) from error

    @property
    def chat_template(self) -> str:
        """The program that writes conversations; "" when there is none."""
        return self._tokenizer.chat_template

    @cached_property
    def special_names(self) -> frozenset[str]:
        """What special tokens are called in a text that shows them."""
        names = (self._tokenizer.id_to_token(token_id) for token_id in self._pieces.special_ids)
        return frozenset(name for name in names if name)

    def names(self, token_ids: Sequence[int]) -> list[str | None]:
        """The vocabulary's words for tokens."""
        return [self._tokenizer.id_to_token(token_id) for token_id in token_ids]

    def tokenizer_info(self) -> dict[str, Any]:
        """As transformers' tokenizer_config.json says it."""
        return self._tokenizer.info()

    def template_names(self, *fields: str) -> bool:
        """Whether the chat template names one of `fields` of a message: what it does not name, it does not write."""
        return any(re.search(rf"\b{field}\b", self._tokenizer.chat_template) for field in fields)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, prompt: Sequence[int]) -> Detokenizer:
        """Text of one sequence behind its prompt, token by token."""
        return self._pieces.new(prompt)

    def last_with_text(self, prompt: Sequence[int]) -> int | None:
        """The token of a prompt that the first of its output is read behind."""
        context = self._pieces.context_of(prompt)
        return context[-1] if context else None

    def is_special(self, token_id: int) -> bool:
        return token_id in self._pieces.special_ids

    def token_bytes(self, previous: int | None, token_id: int) -> bytes:
        """What `token_id` adds to the text after `previous`; a special token is its name."""
        if self.is_special(token_id):
            return (self._tokenizer.id_to_token(token_id) or "").encode()
        if self._tokenizer.id_to_token(token_id) is None:
            return b""
        return self._pieces.piece(previous, token_id)


def _is_small(prompt: Prompt) -> bool:
    """Whether it costs the event loop less than to wait for a thread."""
    if isinstance(prompt, Chat):
        texts = [text for message in prompt.messages[: INLINE_MESSAGES + 1] for text in message.values()]
        if prompt.args or len(prompt.messages) > INLINE_MESSAGES or not all(isinstance(text, str) for text in texts):
            return False
        return sum(map(len, texts)) <= INLINE_CHARS
    return len(prompt) <= INLINE_CHARS


def _shown(token_id: int) -> str:
    """Python refuses to write out the largest numbers that JSON can carry."""
    return str(token_id) if token_id.bit_length() < 64 else f"of {token_id.bit_length()} bits"


def _valid(text: str, param: str) -> str:
    """JSON can carry half a surrogate pair, which no encoding of text has."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(param, f"it is not valid Unicode at character {error.start}") from error
    return text


def _num_bytes(chat: Chat) -> int:
    """Of the texts as JSON: a little more than the template writes of them."""
    written = [*chat.messages, chat.args] if chat.args else chat.messages
    return sum(len(json.dumps(told, ensure_ascii=False).encode(errors="replace")) for told in written)


def _vocab_size(model: str) -> int:
    path = Path(model) / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    if not isinstance(size, int):
        raise ConfigError(f"{str(path)!r} names no vocab_size; give a folder with a transformers checkpoint")
    return size
