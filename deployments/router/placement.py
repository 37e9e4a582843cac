"""Which replicas should serve a request: pure functions, the same in every router.

Few replicas are looked at for a request, whatever their number: the homes of its key (an adapter, or how a prompt
begins) by rendezvous hashing, some that hold its adapter, and two that are drawn. Of these
score = residency (VRAM > host > cold) + share of the prompt's prefix that is cached - load. A key has as many homes as
its demand fills, so that every router sends a cold adapter to the same replica and a hot one to the same set.
Sources: Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998 (rendezvous hashing);
Mitzenmacher, "The power of two choices in randomized load balancing", 2001; Steele et al., "Fast splittable
pseudorandom number generators", 2014 (the mixing function).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MAX_KEYS = 4096
_MIN_REST = 1 << 32  # what is left of a drawn number is worth another draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What each advantage is worth, in units of a full replica's load.

    With `vram` 0.5 a holder keeps its adapter until it is half a batch busier than another replica. `load_steps` is how
    finely load counts for a key with one home: differences below a step are noise and leave the choice to residency
    and the hash. A key gets another home for each `fill` of a replica's capacity that it has in flight. To be the only
    home of a key, which it holds or nobody does, is worth `home`: else noise in loads would scatter the key.
    """

    vram: float = 0.5
    host: float = 0.25
    prefix: float = 0.25
    home: float = 0.2
    load_steps: int = 8
    fill: float = 0.125


def digest(text: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def mixed(number: int) -> int:
    """A 64-bit number that looks drawn, of any 64-bit number."""
    number = (number + _GOLDEN) & _MASK
    number = ((number ^ (number >> 30)) * _MIX_1) & _MASK
    number = ((number ^ (number >> 27)) * _MIX_2) & _MASK
    return number ^ (number >> 31)


def ranks(key: int, salts: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Rendezvous: what `mixed(key ^ salt)` is for each replica's salt; the highest is the key's first home.

    Shapes: salts [N] -> [N].
    """
    number = (salts ^ np.uint64(key)) + np.uint64(_GOLDEN)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(_MIX_1)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(_MIX_2)
    ranked: npt.NDArray[np.uint64] = number ^ (number >> np.uint64(31))
    return ranked


def homes(key: int, salts: npt.NDArray[np.uint64], count: int) -> tuple[int, ...]:
    """Positions in `salts` of the key's first `count` homes, first home first."""
    ranked = ranks(key, salts)
    if count == 1:
        return (int(ranked.argmax()),)
    if count < len(ranked):
        few = np.argpartition(ranked, len(ranked) - count)[len(ranked) - count :]
        return tuple(few[np.argsort(ranked[few])[::-1]].tolist())
    return tuple(np.argsort(ranked)[::-1].tolist())


def least(shares: npt.NDArray[np.float64], count: int) -> tuple[int, ...]:
    """Positions of the `count` lowest of `shares`, in no order."""
    if count >= len(shares):
        return tuple(range(len(shares)))
    return tuple(np.argpartition(shares, count)[:count].tolist())


def draws(seed: int, size: int, count: int) -> list[int]:
    """`count` positions below `size`, at most 2^24, of `seed` alone; one may come twice."""
    drawn: list[int] = []
    rest = 0
    while len(drawn) < count:
        if rest < _MIN_REST:
            rest = seed = mixed(seed)
        rest, place = divmod(rest, size)
        drawn.append(place)
    return drawn


def tie(key: int, salt: int) -> int:
    """An order among equals that differs from key to key: cheaper than `mixed`, and good enough for this."""
    return ((key ^ salt) * _MIX_1) & _MASK


def prefix_share(hints: Sequence[int], held: set[int]) -> float:
    """Share of the hints, shortest prefix first, that a replica has seen without a gap."""
    matched = 0
    for hint in hints:
        if hint not in held:
            break
        matched += 1
    return matched / len(hints) if hints else 0.0


def num_homes(now: int, demand: float, capacity: float, share: float, size: int, weights: Weights) -> int:
    """How many homes a key should have that has `now` and on average `demand` sequences in flight in the whole fleet.

    As many as its demand fills; and its `share` of all requests in the `size` replicas, if that gives each two
    sequences: a key that is all there is needs no room left for others. It grows at once, and shrinks when half of them
    would do: a demand that wavers must not move adapters about.
    """
    fills = max(demand / max(2.0, weights.fill * capacity), min(share * size, demand / 2))
    if fills > now:
        return math.ceil(fills)
    return max(1, math.ceil(fills)) if 2 * fills < now - 1 else now


class Demand:
    """How much each key is asked for: counts that halve every `half_life_s`, of the latest `_MAX_KEYS` keys.

    Routers that see like mixtures of the traffic find like shares for a key, and each knows the fleet's load.
    """

    def __init__(self, *, half_life_s: float = 4.0) -> None:
        self._half_life_s = half_life_s
        self._keys: OrderedDict[int, tuple[float, float, int]] = OrderedDict()  # count, when, homes
        self._total = 0.0
        self._total_at_s = 0.0

    def asked(self, key: int | None, now_s: float) -> float:
        """One more request, of `key` or of none. Returns the key's share of all requests lately, at the least.

        That is two standard deviations below what was counted: a few requests prove no demand.
        """
        self._total = self._total * self._decay(now_s - self._total_at_s) + 1.0
        self._total_at_s = now_s
        if key is None:
            return 0.0
        count, at_s, num = self._keys.pop(key, (0.0, now_s, 1))
        count = count * self._decay(now_s - at_s) + 1.0
        self._keys[key] = (count, now_s, num)
        if len(self._keys) > _MAX_KEYS:
            self._keys.popitem(last=False)
        return max(0.0, count - 2 * math.sqrt(count)) / self._total

    def homes_of(self, key: int) -> int:
        """How many homes the key had when it was last placed."""
        return self._keys[key][2] if key in self._keys else 1

    def set_homes(self, key: int, num: int) -> None:
        """The key was placed among so many."""
        if key in self._keys:
            count, at_s, _ = self._keys[key]
            self._keys[key] = (count, at_s, num)

    def _decay(self, elapsed_s: float) -> float:
        return math.exp2(-max(0.0, elapsed_s) / self._half_life_s)
