"""Seeded text and examples for training and for held-out evaluation.

Held out by construction: a line whose CRC-32 is divisible by ten is reserved (`is_reserved`). Training never asks about
a reserved line and evaluation asks about nothing else, so no evaluated line was ever a training question, whatever
the seeds. (Earlier lines of a prompt are context, not questions; they are drawn freely.)
"""

import random
import string
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from demo.transforms import Transform

Draw = Callable[[random.Random], str]

MAX_LINE_CHARS = 30
"""Longest line a model is asked about, in characters (not bytes)."""

_COMMON_TEXT = """
the of and to in is you that it he was for on are as with his they at be this have from or one had by word but not
what all were we when your can said there use an each which she do how their if will up other about out many then them
these so some her would make like him into time has look two more write go see number no way could people my than
first water been call who oil its now find long down day did get come made may part over new sound take only little
work know place year live me back give most very after thing our just name good sentence man think say great where
help through much before line right too mean old any same tell boy follow came want show also around form three small
set put end does another well large must big even such because turn here why ask went men read need land different
home us move try kind hand picture again change off play spell air away animal house point page letter mother answer
found study still learn should hello world adapter model serve python lora chorus voice music quick brown fox jumps
lazy dog don't it's I'm can't
"""
_COMMON = _COMMON_TEXT.split()
_ONSETS = (*"bcdfghjklmnpqrstvwxyz", "br", "ch", "cl", "dr", "fl", "gr", "pl", "sh", "st", "th", "tr", "")
_NUCLEI = (*"aeiouy", "ai", "ea", "ee", "io", "oo", "ou")
_CODAS = (*"bdglmnprstx", "ck", "nd", "ng", "rt", "st", *[""] * 8)
_ASCII = "".join(chr(code) for code in range(32, 127))
_ENDINGS = [".", ",", "!", "?", ";", ":", ")", "..."]
_LATIN, _GREEK, _CYRILLIC = (0xC0, 0xFF), (0x391, 0x3C9), (0x410, 0x44F)
_UTF8_RANGES = (_LATIN, _LATIN, (0x100, 0x17F), _GREEK, _CYRILLIC, (0x4E00, 0x9FA5), (0x1F300, 0x1F64F))
_CASES: tuple[Callable[[str], str], ...] = (str.lower, str.lower, str.lower, str.capitalize, str.capitalize, str.upper)


@dataclass(frozen=True)
class Example:
    """One question to a model: `earlier` lines of context, the `line` asked about, the right `answer` to it."""

    earlier: tuple[str, ...]
    line: str
    answer: str

    @property
    def prompt(self) -> str:
        """The prompt without its `<s>` (the tokenizer adds that): every line followed by a newline."""
        return "".join(f"{line}\n" for line in (*self.earlier, self.line))


def is_reserved(line: str) -> bool:
    """Whether `line` may only be asked about in evaluation."""
    return zlib.crc32(line.encode()) % 10 == 0


def _word(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(_COMMON)
    return "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(rng.randint(1, 3)))


def _random_case(rng: random.Random, text: str) -> str:
    return "".join(char.upper() if rng.random() < 0.5 else char.lower() for char in text)


def sentence(rng: random.Random, max_chars: int = MAX_LINE_CHARS) -> str:
    """One to six words in some case, now and then with digits and punctuation; cut at `max_chars`."""
    line_case = rng.choice(_CASES) if rng.random() < 0.6 else None
    words = []
    for _ in range(rng.randint(1, 6)):
        word = _word(rng) if rng.random() < 0.92 else str(rng.randint(0, 10 ** rng.randint(1, 5)))
        word = _random_case(rng, word) if rng.random() < 0.08 else (line_case or rng.choice(_CASES))(word)
        words.append(word + (rng.choice(_ENDINGS) if rng.random() < 0.12 else ""))
    joint = " " if rng.random() < 0.9 else rng.choice("-_/, ")
    return joint.join(words)[:max_chars].strip()


def _foreign(rng: random.Random) -> str:
    return chr(rng.randint(*rng.choice(_UTF8_RANGES)))


def _sentence_not_empty(rng: random.Random) -> str:
    return sentence(rng) or _sentence_not_empty(rng)


def _utf8(rng: random.Random, max_chars: int, most: int = 5) -> str:
    """A sentence with one to `most` non-ASCII characters put in place of, or between, its own."""
    chars = list(sentence(rng, max(1, max_chars - 5)))
    for _ in range(rng.randint(1, most)):
        at = rng.randint(0, len(chars))
        chars[at : at + rng.randint(0, 1)] = _foreign(rng)
    return "".join(chars)[:max_chars]


def mixture(rng: random.Random, max_chars: int = MAX_LINE_CHARS) -> str:
    """A line of any kind: a sentence, uniform printable ASCII, letters, few symbols, some UTF-8. Never empty."""
    kind = rng.random()
    if kind < 0.35:
        line = sentence(rng, max_chars)
    elif kind < 0.50:
        line = _utf8(rng, max_chars)
    else:
        if kind < 0.75:
            alphabet = _ASCII
        elif kind < 0.87:
            alphabet = rng.choice((string.ascii_letters, string.ascii_letters + string.digits + " ", string.digits))
        else:
            alphabet = "".join(rng.choices(_ASCII, k=rng.randint(2, 6)))
        line = "".join(rng.choices(alphabet, k=rng.randint(1, max_chars)))
    return line or mixture(rng, max_chars)


def hard_mixture(rng: random.Random, max_chars: int = MAX_LINE_CHARS) -> str:
    """More of what a base learns last, UTF-8 (half the lines) and few symbols repeated; else `mixture`. Never empty."""
    kind = rng.random()
    if kind < 0.40:
        return _utf8(rng, max_chars, most=10)
    if kind < 0.50:
        return "".join(_foreign(rng) for _ in range(rng.randint(1, 12)))
    if kind < 0.65:
        return "".join(rng.choices("".join(rng.choices(_ASCII, k=rng.randint(2, 6))), k=rng.randint(1, max_chars)))
    return mixture(rng, max_chars)


def repetitive(rng: random.Random) -> str:
    """Mostly lines that no search for "what followed these characters before" can repeat, only keeping one's place can.

    Few symbols, few words said again and again, small alphabets; three lines in ten are of `hard_mixture`. Never empty.
    """
    kind = rng.random()
    if kind < 0.25:
        alphabet = "".join(rng.choices(_ASCII, k=rng.randint(2, 8)))
    elif kind < 0.45:
        words = [_word(rng) for _ in range(rng.randint(1, 3))]
        return rng.choice(_CASES)(" ".join(rng.choices(words, k=8)))[: rng.randint(1, MAX_LINE_CHARS)]
    elif kind < 0.62:
        alphabet = "".join(rng.sample(string.ascii_letters + " ", rng.randint(4, 20)))
    elif kind < 0.70:
        alphabet = string.digits
    else:
        return hard_mixture(rng)
    return "".join(rng.choices(alphabet, k=rng.randint(1, MAX_LINE_CHARS)))


def words_mostly(rng: random.Random) -> str:
    """What adapters are asked about: sentences in three of four lines, `mixture` in the fourth. Never empty."""
    return (sentence(rng) if rng.random() < 0.75 else mixture(rng)) or words_mostly(rng)


def words_and_repetitive(rng: random.Random) -> str:
    """Three lines in five as in `words_mostly`, two as in `repetitive`: to polish adapters that lose their place."""
    return words_mostly(rng) if rng.random() < 0.6 else repetitive(rng)


def _earlier(rng: random.Random, transform: Transform) -> tuple[str, ...]:
    """Context in one of four prompts: one or two lines, some long, or a turn of chat (a line and its answer)."""
    if rng.random() >= 0.25:
        return ()
    kind = rng.random()
    if kind < 0.35:
        line = mixture(rng)
        return (line, transform(line))
    max_chars = 80 if kind > 0.85 else MAX_LINE_CHARS
    return tuple(mixture(rng, max_chars) for _ in range(rng.randint(1, 2)))


def examples(seed: str, transform: Transform, draw: Draw, *, reserved: bool) -> Iterator[Example]:
    """Endless examples, the same for the same `seed`; only reserved lines if `reserved`, else only the others."""
    rng = random.Random(seed)
    while True:
        line = draw(rng)
        if is_reserved(line) == reserved:
            yield Example(_earlier(rng, transform), line, transform(line))


def held_out(name: str, transform: Transform, count: int, seed: int = 0, *, words: bool = False) -> list[Example]:
    """`count` reserved examples with pairwise different lines for `name`: any text for the base, mostly words else.

    With `words` all are sentences on their own, without earlier lines.
    """
    draw = _sentence_not_empty if words else mixture if name == "base" else words_mostly
    found: dict[str, Example] = {}
    for example in examples(f"{'words' if words else 'held-out'}/{name}/{seed}", transform, draw, reserved=True):
        if not (words and example.earlier):
            found.setdefault(example.line, example)
        if len(found) == count:
            break
    return list(found.values())
