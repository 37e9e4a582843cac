"""The model's tokenizer: text to token ids and back, from a local folder, usable from many threads at once.

Encoding goes to the Rust tokenizer behind the transformers one: that object is immutable after load, where the Python
wrapper changes truncation and padding on every call. Of its methods only those for batches release the interpreter
lock, so a long text is a batch of one: a megabyte takes most of a second, in which nothing else could run.
transformers (which imports torch) is imported at load, not when this module is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, InvalidRequest
from engine.text.clean_up import clean_up_spaces
from engine.text.content import roles_in_parts, with_content

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer
    from transformers import PreTrainedTokenizerBase

LONG_CHARS = 2048  # shorter texts are encoded within a millisecond or two


class Tokenizer:
    """Encodes prompts and decodes outputs. All methods may be called from any thread."""

    def __init__(self, hf_tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises: ConfigError when the tokenizer has no Rust backend."""
        backend: RustTokenizer | None = getattr(hf_tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"the tokenizer {type(hf_tokenizer).__name__} has no fast (Rust) backend; "
                "save the model's tokenizer as tokenizer.json into its folder"
            )
        backend.no_truncation()
        backend.no_padding()
        self._hf = hf_tokenizer
        self.backend = backend
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.cleans_up_spaces = _cleans_up_spaces(hf_tokenizer)

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Raises: ConfigError when the folder holds no tokenizer that can be loaded without running foreign code."""
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"tokenizer folder {str(folder)!r} does not exist; give a local folder")
        from transformers import AutoTokenizer

        try:
            hf_tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the Rust side raises bare exceptions
            raise ConfigError(f"no tokenizer could be loaded from folder {str(folder)!r}: {error}") from error
        return cls(hf_tokenizer)

    @property
    def eos_token_id(self) -> int | None:
        token_id = self._hf.eos_token_id
        return token_id if isinstance(token_id, int) else None

    def info(self) -> dict[str, Any]:
        """What it is, the special tokens that have a role, and the chat template."""
        roles = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {role: getattr(self._hf, role, None) for role in roles}
        told = {role: None if token is None else str(token) for role, token in tokens.items()}
        template = self.chat_template or None
        return {"tokenizer_class": type(self._hf).__name__, **told, "chat_template": template}

    @property
    def has_chat_template(self) -> bool:
        return bool(self._hf.chat_template)

    @property
    def chat_template(self) -> str:
        """The program that writes conversations; "" when there is none."""
        template = self._hf.chat_template
        return template or "" if not isinstance(template, dict) else str(self._hf.get_chat_template())

    @cached_property
    def _roles_in_parts(self) -> frozenset[str]:
        return roles_in_parts(self.chat_template, lambda messages: self._render(messages, True, {}))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises: InvalidRequest if `text` is not Unicode: half of a surrogate pair stands for no character."""
        try:
            if len(text) > LONG_CHARS:
                (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            else:
                encoding = self.backend.encode(text, add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
        except TypeError as error:
            raise InvalidRequest("prompt", f"it is not text that can be encoded: {error}") from error
        return ids

    def pieces(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, str, int, int]]:
        """Of each token its id, the vocabulary's word for it, and where in `text` it begins and ends, in characters.

        Raises: InvalidRequest as `encode`.
        """
        try:
            (encoding,) = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)
        except TypeError as error:
            raise InvalidRequest("prompt", f"it is not text that can be encoded: {error}") from error
        return [
            (i, token, *span) for i, token, span in zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
        ]

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True, clean_up: bool = True) -> str:
        """The text of the tokens, as transformers reads them: with the clean-up of spaces that some tokenizers ask for,
        unless `clean_up` is False.
        """
        text: str = self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return clean_up_spaces(text) if clean_up and self.cleans_up_spaces else text

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it; None when there is none (models pad their vocabulary)."""
        token: str | None = self.backend.id_to_token(token_id) if token_id >= 0 else None
        return token

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **template_args: Any
    ) -> str:
        """The prompt text of a conversation. `template_args` go to the template (`tools`, or variables of its own).

        A content may be a string or a list of text parts: the template gets what it can write.
        Raises: InvalidRequest when the model has no template, its template refuses the messages, or a part is no text.
        """
        if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
            raise InvalidRequest("messages", "a conversation is a list of mappings, each with a role and a content")
        if not self.has_chat_template:
            raise InvalidRequest(
                "messages",
                "this model has no chat template, so it cannot take messages; ask for a plain completion of a prompt, "
                "or put a chat_template.jinja into the model's folder",
            )
        from jinja2 import TemplateError

        taken = with_content(messages, self._roles_in_parts)
        try:
            return self._render(taken, add_generation_prompt, template_args)
        except (TemplateError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            # Templates are programs: what they raise on messages they do not expect is not theirs to choose.
            roles = [str(message.get("role")) for message in messages]
            raise InvalidRequest("messages", f"the model's chat template refuses the roles {roles}: {error}") from error

    def _render(self, messages: list[dict[str, Any]], generation: bool, template_args: Mapping[str, Any]) -> str:
        return str(
            self._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation, **template_args)
        )

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **template_args: Any) -> list[int]:
        """Token ids of a conversation, ready to be continued; arguments and errors as in `render_chat`."""
        # The template writes the special tokens itself.
        return self.encode(self.render_chat(messages, **template_args), add_special_tokens=False)


def _cleans_up_spaces(hf_tokenizer: PreTrainedTokenizerBase) -> bool:
    """transformers does not do it for BPE unless it is told twice: it would take spaces out of the text."""
    if not getattr(hf_tokenizer, "clean_up_tokenization_spaces", False):
        return False
    is_bpe = type(hf_tokenizer.backend_tokenizer.model).__name__ == "BPE"
    told_twice = getattr(hf_tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return not is_bpe or bool(told_twice)
