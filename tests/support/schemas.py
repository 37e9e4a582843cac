"""JSON Schemas at random, such that every answer that follows one ends: lengths, items and numbers are bounded."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]
WORDS = ("a", "id", "name", "a b", 'quo"te', "back\\slash", "slash/", "ü", "日本", "{", "0", "x-y", "")
PATTERNS = ("^[a-c]{2,5}$", "^\\d{3}-\\d{2}$", "^(yes|no)$", "^[A-Z][a-z]{0,4}$", "^#[0-9a-f]{6}$")
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email")


def random_schema(rng: random.Random, depth: int = 3) -> Schema:
    """A schema that has an answer."""
    leaves = (_string, _integer, _number, _enum, _const, lambda rng: {"type": "boolean"}, lambda rng: {"type": "null"})
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(leaves)(rng)
    kind = rng.randrange(6)
    if kind < 3:
        return _object(rng, depth)
    if kind == 3:
        return _array(rng, depth)
    if kind == 4:
        return {"anyOf": [_inner(rng, depth) for _ in range(rng.randint(1, 3))]}
    return {"$defs": {"part": _inner(rng, depth)}, **_array_of({"$ref": "#/$defs/part"}, rng)}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(0, 4))
    return {
        "type": "object",
        "properties": {name: _inner(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
        **({"title": "T", "description": "what it is"} if rng.random() < 0.2 else {}),
    }


def _inner(rng: random.Random, depth: int) -> Schema:
    """Definitions are looked up from the root, so they stay there."""
    schema = random_schema(rng, depth - 1)
    return _inner(rng, depth) if "$defs" in str(schema) else schema


def _array(rng: random.Random, depth: int) -> Schema:
    if rng.random() < 0.2:
        items = [_inner(rng, depth) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
    return _array_of(_inner(rng, depth), rng)


def _array_of(items: Schema, rng: random.Random) -> Schema:
    least = rng.randint(0, 2)
    return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randint(0, 2)}


def _string(rng: random.Random) -> Schema:
    kind = rng.randrange(4)
    if kind == 0:
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == 1:
        return {"type": "string", "format": rng.choice(FORMATS), "maxLength": 64}
    least = rng.randint(0, 3)
    return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 12)}


def _integer(rng: random.Random) -> Schema:
    least = rng.randint(-500, 500)
    return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 5000)}


def _number(rng: random.Random) -> Schema:
    least = round(rng.uniform(-50, 50), 2)
    return {"type": "number", "minimum": least, "maximum": least + rng.randint(1, 100)}


def _enum(rng: random.Random) -> Schema:
    values = [*WORDS[:6], 3, -1, 2.5, True, None, [1, "x"], {"k": 1}]
    return {"enum": rng.sample(values, rng.randint(1, 5))}


def _const(rng: random.Random) -> Schema:
    return {"const": rng.choice([*WORDS, 7, False, None])}
