"""Adapters as a stranger might send them: files that are broken, huge, deep, odd, or made to keep a program busy.

Each kind draws its own sizes, from a good adapter of `small_spec`. The largest of each kind are in `hostile_bombs.py`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tests.support import hostile_configs, hostile_weights
from tests.support.fake_sources import Files
from tests.support.hostile_files import Case

_KINDS: dict[str, Callable[[random.Random], Files]] = {
    "odd field": hostile_configs.odd_field,
    "literals": hostile_configs.literals,
    "patterns": hostile_configs.patterns,
    "plain keys": hostile_configs.plain_keys,
    "layers": hostile_configs.layers,
    "damaged json": hostile_configs.damaged_json,
    "wrong tensors": hostile_weights.wrong_tensors,
    "renamed": hostile_weights.renamed_all,
    "odd header": hostile_weights.odd_header,
    "damaged weights": hostile_weights.damaged_weights,
    "deep header": hostile_weights.deep_header,
}
KINDS = tuple(sorted(_KINDS))


def cases(number: int, seed: int) -> Iterator[Case]:
    """So many of them, by turns of all kinds."""
    draw = random.Random(seed)
    for index in range(number):
        kind = KINDS[index % len(KINDS)]
        yield Case(kind, _KINDS[kind](draw))
