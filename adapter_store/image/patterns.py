"""Which modules the patterns of a configuration mean: as PEFT matches them, whatever a stranger wrote.

Most patterns are plain names, and are looked up. Real regular expressions are matched by Python's `re`, as PEFT does,
but in a process of their own with a limit of time and memory (`match_names.py`): one pattern can take years to match,
or gigabytes to compile. Adapters of one trainer have the same patterns, so answers are remembered.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

from adapter_store.errors import AdapterRejected

MAX_PATTERN_CHARS = 4096  # of one pattern
MAX_PATTERNS_CHARS = 64 << 10  # of all that are matched for one adapter
MAX_STEPS = 500_000  # of looking up plain names; an honest adapter needs some thousand
CPU_S = 0.5  # of the process, for all patterns of one adapter; honest ones need milliseconds
MEMORY_BYTES = 48 << 20  # of it, at most
_WAIT_S = 60.0  # for it, on a machine that is busy with other things
_PROGRAM = Path(__file__).with_name("match_names.py")
_PLAIN = re.compile(r"\^?[A-Za-z0-9_.-]+")  # of such a regular expression only the dots mean more than themselves
_WORD = re.compile(r"[A-Za-z0-9_]+")
_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")
_REMEDY = "name the modules in a list"

How = Literal["whole", "suffix", "layer"]


class Question(NamedTuple):
    """Patterns of one field of a configuration, asked of all names. `how`:

    "whole": the whole name matches.  "suffix": the end of the name behind a dot, or all of it (PEFT's get_pattern_key).
    "layer": the number behind the pattern in the name (PEFT's layers_pattern).
    """

    field: str
    how: How
    patterns: tuple[str, ...]


def first_matches(question: Question, names: tuple[str, ...]) -> tuple[int, ...]:
    """For each name the position of the first pattern that matches it, or -1; of "layer", the number it finds.

    Raises: AdapterRejected, naming the field, for what is no regular expression and for what takes too long.
    """
    field, how, patterns = question
    if how == "suffix":
        plain = {position: key for position, key in enumerate(patterns) if _PLAIN.fullmatch(key)}
        rest = [position for position in range(len(patterns)) if position not in plain]
        found = _plain_suffixes(field, plain, names)
        if rest:
            others = _ask(Question(field, how, tuple(patterns[position] for position in rest)), names)
            found = [_lesser(a, rest[b] if b >= 0 else -1) for a, b in zip(found, others, strict=True)]
        return tuple(found)
    if how == "layer" and all(_WORD.fullmatch(pattern) for pattern in patterns) and len(patterns) <= 64:
        compiled = [re.compile(rf"(?:^|.*?\.){pattern}\.(\d+)\.") for pattern in patterns]
        return tuple(_number(match.match(name) for match in compiled) for name in names)
    return _ask(question, names)


def first_numbers(names: Iterable[str]) -> tuple[int, ...]:
    """The layer of each name where no pattern says what a layer is called: the first dotted number, or -1."""
    return tuple(_number([_FIRST_NUMBER.match(name)]) for name in names)


def suffixes(name: str) -> list[str]:
    """`name`, and what stands behind each of its dots: what an entry of a list may be to mean it."""
    return [name, *(name[place + 1 :] for place, char in enumerate(name) if char == ".")]


def _number(matches: Iterable[re.Match[str] | None]) -> int:
    return next((int(match[1]) for match in matches if match is not None), -1)


def _lesser(a: int, b: int) -> int:
    return max(a, b) if min(a, b) < 0 else min(a, b)


def _plain_suffixes(field: str, keys: dict[int, str], names: Sequence[str]) -> list[int]:
    """As the regular expression `(.*\\.)?(key)$` of each key, by look-up: keys whose dots stand in the same places are
    one table, and a name is made to look like them by writing dots there."""
    tables: dict[tuple[bool, int, tuple[int, ...]], dict[str, int]] = {}
    for position, key in keys.items():
        text = key.removeprefix("^")
        dots = tuple(place for place, char in enumerate(text) if char == ".")
        tables.setdefault((key != text, len(text), dots), {}).setdefault(text, position)
    by_length: dict[int, list[tuple[bool, tuple[int, ...], dict[str, int]]]] = {}
    for (is_anchored, length, dots), table in tables.items():
        by_length.setdefault(length, []).append((is_anchored, dots, table))
    found, steps = [], 0
    for name in names:
        best = -1
        for suffix in suffixes(name):
            candidates = by_length.get(len(suffix), ())
            steps += len(candidates)
            if steps > MAX_STEPS:
                raise AdapterRejected(f"{field} has {len(keys)} keys of too many kinds to compare; {_REMEDY}")
            for is_anchored, dots, table in candidates:
                if not is_anchored or suffix == name:
                    best = _lesser(best, table.get(_dotted(suffix, dots), -1))
        found.append(best)
    return found


def _dotted(text: str, places: tuple[int, ...]) -> str:
    chars = list(text)
    for place in places:
        chars[place] = "."
    return "".join(chars)


def _ask(question: Question, names: tuple[str, ...]) -> tuple[int, ...]:
    total = 0
    for pattern in question.patterns:
        total += len(pattern) + 1
        if len(pattern) > MAX_PATTERN_CHARS:
            raise AdapterRejected(
                f"{question.field}: a pattern has {len(pattern)} characters, the limit is {MAX_PATTERN_CHARS}; "
                f"{_REMEDY}"
            )
        if total > MAX_PATTERNS_CHARS:
            raise AdapterRejected(
                f"{question.field}: its patterns have more than {MAX_PATTERNS_CHARS} characters; {_REMEDY}"
            )
    return _matched(question, names)


@lru_cache(maxsize=64)  # what is refused is not kept: it raises
def _matched(question: Question, names: tuple[str, ...]) -> tuple[int, ...]:
    field = question.field
    shown = repr(question.patterns[0][:80])
    asked = json.dumps({"how": question.how, "patterns": question.patterns, "names": names}).encode()
    command = [sys.executable, "-I", "-S", str(_PROGRAM), str(CPU_S), str(MEMORY_BYTES)]
    try:
        done = subprocess.run(
            command, input=asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_WAIT_S, process_group=0
        )
    except OSError as error:
        raise AdapterRejected(
            f"{field}: {shown} cannot be matched, as no process can be started ({error}); {_REMEDY}"
        ) from error
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode != 0:
        raise AdapterRejected(
            f"{field}: matching {shown} takes more than {CPU_S:g} s or {MEMORY_BYTES >> 20} MiB; {_REMEDY}"
        )
    reply = json.loads(done.stdout)
    if "error" in reply:
        raise AdapterRejected(f"{field}: {shown} is not a regular expression: {reply['error']}")
    return tuple(reply["answer"])
