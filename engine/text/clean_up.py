"""The clean-up of spaces that some tokenizers ask for (`clean_up_tokenization_spaces`), on a growing text.

transformers replaces " ." by "." and the like in a finished text. Here text passes as soon as nothing that follows can
change how it is cleaned.
"""

from __future__ import annotations

from itertools import takewhile

# In this order, each over the whole text. Source: `PreTrainedTokenizerBase.clean_up_tokenization` of transformers.
_REPLACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
_WITHIN = frozenset(" 'nvr")  # characters that are not the last of what is replaced
_SPAN = 6  # of what is replaced with the spaces that an earlier replacement took out of it, at most
MAX_CONTEXT_CHARS = 32  # more are not held back either: no text of a language needs them


def clean_up_spaces(text: str) -> str:
    """The text as the tokenizer cleans it up."""
    for found in _REPLACED:
        text = text.replace(found, found.strip())
    return text


class SpaceCleaner:
    """`clean_up_spaces` of the text behind a prompt, in deltas."""

    __slots__ = ("_of_prompt", "_tail")

    def __init__(self, prompt: str = "") -> None:
        """`prompt`: its end is enough."""
        self._tail = prompt[_certain(prompt) :]
        self._of_prompt = clean_up_spaces(self._tail)  # the part of the tail that the prompt shows

    def push(self, text: str) -> str:
        self._tail += text
        end = _certain(self._tail)
        certain, self._tail = self._tail[:end], self._tail[end:]
        return self._shown(certain)

    def finish(self) -> str:
        """What was held back, when no more text follows."""
        certain, self._tail = self._tail, ""
        return self._shown(certain)

    def _shown(self, certain: str) -> str:
        cleaned = clean_up_spaces(certain)
        if not self._of_prompt:
            return cleaned
        pairs = zip(cleaned, self._of_prompt, strict=False)
        num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._of_prompt = self._of_prompt[num_shared:] if num_shared == len(cleaned) else ""
        return cleaned[num_shared:]


def _certain(text: str) -> int:
    """So many of its first characters read the same whatever follows."""
    for end in range(len(text), max(0, len(text) - MAX_CONTEXT_CHARS), -1):
        if text[end - 1] not in _WITHIN or " " not in text[max(0, end - _SPAN) : end]:
            return end
    return max(0, len(text) - MAX_CONTEXT_CHARS)
