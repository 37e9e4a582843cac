"""What hostile adapters are made of: a good one, to be changed, and odd values to put into it."""

from __future__ import annotations

import json
import random
import struct
from typing import Any, NamedTuple

from safetensors.numpy import save

from tests.support.fake_sources import Files, small_config, small_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ODD_TEXTS = (
    "", " ", "\x00", "\n", "\x1b[31m", "a" * 5000, "\xe9", "\u540d\u524d", "\u202e", "\ufeff", "\ud800", "..", "/",
    "a.b", "${x}", "%s", "{}", "q_proj\n", "Q_PROJ", "\U0001f600", "base_model.model.", "__proto__", "None", "nan",
)  # fmt: skip
ODD_NUMBERS = (
    0, -1, 1, 2, 2.0, 0.5, True, False, None, 10**18, -(10**18), 10**400, 1e308, -1e308, 1e-320, "2", [2], 512,
)  # fmt: skip


class Case(NamedTuple):
    """Files, and what was done to them."""

    kind: str
    files: Files


def files_of(config: Any = None, weights: bytes | None = None, tensors: dict[str, Any] | None = None) -> Files:
    """A good adapter but for what is given."""
    if not isinstance(config, bytes):
        config = json.dumps(small_config() if config is None else config).encode()
    return {
        CONFIG: config,
        WEIGHTS: save(small_tensors() if tensors is None else tensors) if weights is None else weights,
    }


def with_header(text: bytes, body: bytes = b"") -> bytes:
    """A weights file with this header."""
    return struct.pack("<Q", len(text)) + text + body


def odd_value(draw: random.Random, depth: int = 0) -> Any:
    """Something that JSON can say, small but odd."""
    kind = draw.randint(0, 4 if depth < 3 else 2)
    if kind == 0:
        return draw.choice(ODD_TEXTS)
    if kind <= 2:
        return draw.choice(ODD_NUMBERS)
    if kind == 3:
        return [odd_value(draw, depth + 1) for _ in range(draw.randint(0, 4))]
    return {draw.choice(ODD_TEXTS): odd_value(draw, depth + 1) for _ in range(draw.randint(0, 4))}
