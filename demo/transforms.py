"""What each demo adapter answers, as pure Python: `TRANSFORMS[name](line)` is the one right answer for `line`.

Rules shared by all of them: only ASCII letters are changed in case, substituted or doubled; non-ASCII characters pass
through unchanged (so `é` stays `é` under `upper`). The input is one line: no `"\\n"`.
"""

import re
import string
from collections.abc import Callable, Mapping
from types import MappingProxyType

Transform = Callable[[str], str]

_UPPER = str.maketrans(string.ascii_lowercase, string.ascii_uppercase)
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_SWAP = str.maketrans(string.ascii_letters, string.ascii_uppercase + string.ascii_lowercase)
_ROT13 = str.maketrans(
    string.ascii_letters,
    "".join(half[13:] + half[:13] for half in (string.ascii_lowercase, string.ascii_uppercase)),
)
_VOWELS = str.maketrans(dict.fromkeys("aeiouAEIOU", "*"))
_LEET = str.maketrans("aeiostAEIOST", "431057" * 2)

_ASCII_RUN = re.compile(r"[A-Za-z0-9]+")
_SNAKE_WORD = re.compile(r"[A-Za-z0-9\u0080-\U0010ffff]+")
_TITLE_WORD = re.compile(r"[A-Za-z0-9'\u0080-\U0010ffff]+")


def same(line: str) -> str:
    """The base model's answer: the line itself."""
    return line


def upper(line: str) -> str:
    """Every ASCII letter in upper case."""
    return line.translate(_UPPER)


def rot13(line: str) -> str:
    """Every ASCII letter moved thirteen places on in the alphabet, its case kept."""
    return line.translate(_ROT13)


def reverse(line: str) -> str:
    """Each maximal run of ASCII letters and digits reversed where it stands; all other characters keep their places."""
    return _ASCII_RUN.sub(lambda match: match.group()[::-1], line)


def vowels(line: str) -> str:
    """Each of `aeiouAEIOU` replaced by `*`."""
    return line.translate(_VOWELS)


def snake(line: str) -> str:
    """The words in lower case joined by `_`.

    A word is a maximal run of ASCII letters, digits and non-ASCII characters; everything else (spaces, punctuation, `_`
    itself) only separates words, and is dropped at both ends. A line without words gives the empty string.
    """
    return "_".join(_SNAKE_WORD.findall(line)).translate(_LOWER)


def title(line: str) -> str:
    """The first character of every word in upper case, the rest of the word in lower case (ASCII letters only).

    A word is a maximal run of ASCII letters, digits, apostrophes and non-ASCII characters: `it's 3PM` gives `It's 3pm`.
    """
    return _TITLE_WORD.sub(lambda match: upper(match.group()[0]) + match.group()[1:].translate(_LOWER), line)


def double(line: str) -> str:
    """Every ASCII letter written twice; digits, punctuation, spaces and non-ASCII characters once."""
    return re.sub(r"([A-Za-z])", r"\1\1", line)


def swapcase(line: str) -> str:
    """Lower-case ASCII letters in upper case and upper-case ones in lower case."""
    return line.translate(_SWAP)


def leet(line: str) -> str:
    """The letters a e i o s t, in either case, replaced by 4 3 1 0 5 7."""
    return line.translate(_LEET)


TRANSFORMS: Mapping[str, Transform] = MappingProxyType(
    {
        "upper": upper,
        "rot13": rot13,
        "reverse": reverse,
        "vowels": vowels,
        "snake": snake,
        "title": title,
        "double": double,
        "swapcase": swapcase,
        "leet": leet,
    }
)
