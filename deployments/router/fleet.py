"""`Fleet`: what this router knows of the replicas, and where a call should go.

It is advisory: each router has its own, a moment old, and a wrong choice costs time, never an answer. All calls are
made on one loop. News and choices cost the same whatever is resident and however many replicas there are, but for a few
vector operations over one number a replica.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from deployments.calls import Call
from deployments.reports import HEARTBEAT_S, VRAM, BadReport, follows, name_digest, unpack
from deployments.router.known import Holders, Index, Known
from deployments.router.placement import Demand, Weights, digest, draws, homes, least, num_homes, prefix_share, tie

SILENT_S = 3 * HEARTBEAT_S
FEW = 8  # so many replicas are all looked at
MAX_HOMES = 6  # of a key with more, as many are drawn
NUM_DRAWN = 2
NUM_DRAWN_WITHOUT_KEY = 6
NUM_HOLDERS = 4
NUM_TAIL = 4  # the least loaded, for when all that were chosen refuse
TAIL_S = 0.01  # they are looked for no more often, nor less often than for each `TAIL_CALLS` calls
TAIL_CALLS = 16
MAX_PLACED = 24
_MAX_STRANGERS = 64
_MAX_CACHED = 4096

Rank = tuple[bool, bool, int, float, int, str]  # avoided, silent, in the tail, -score, a tie's order, id


@dataclass(slots=True, kw_only=True)
class _Ask:
    """What a call needs, as digests. `at_home`: slots of homes of its key that are looked at."""

    key: int | None
    adapter: int | None
    hints: Sequence[int]
    seed: int
    avoid: Sequence[str]
    is_alone: bool
    now_s: float
    silent_s: float  # who was last heard before is silent
    num_homes: int = 0
    at_home: Sequence[int] = ()


class Fleet:
    """See the module. `now_s` is any clock that does not go back."""

    def __init__(self, *, weights: Weights | None = None, now_s: Callable[[], float] = time.monotonic) -> None:
        self._weights = weights or Weights()
        self._now_s = now_s
        self._members: list[Known] = []  # in the order of their ids
        self._by_id: dict[str, Known] = {}
        self._strangers: OrderedDict[str, Known] = OrderedDict()  # they reported before Serve named them
        self._index = Index()
        self._salts = np.zeros(0, np.uint64)
        self._shares = np.zeros(0, np.float64)  # load over capacity; infinite for the lost
        self._total_load = 0
        self._total_capacity = 0
        self._heard_s = float("-inf")  # of any
        self._demand = Demand()
        self._least: list[Known] = []
        self._tail_left = 0
        self._tail_at_s = float("-inf")
        self._homes: OrderedDict[int, tuple[int, ...]] = OrderedDict()

    @property
    def members(self) -> tuple[str, ...]:
        """Ids of the replicas that calls go to."""
        return tuple(known.replica_id for known in self._members)

    def on_members(self, replica_ids: Iterable[str]) -> None:
        """These are the replicas that Serve sends to now."""
        wanted = set(replica_ids)
        if wanted == self._by_id.keys():
            return
        now_s = self._now_s()
        for replica_id in self._by_id.keys() - wanted:
            known = self._by_id.pop(replica_id)
            self._index.forget(known)
        for replica_id in sorted(wanted - self._by_id.keys()):
            known = self._stranger_of(replica_id)
            del self._strangers[replica_id]
            known.heard_s = now_s  # it has time to report
            self._by_id[replica_id] = known
            self._index_all(known)
        self._members = [self._by_id[replica_id] for replica_id in sorted(self._by_id)]
        for slot, known in enumerate(self._members):
            known.slot = slot
        self._salts = np.array([known.salt for known in self._members], np.uint64)
        self._shares = np.array([np.inf if known.is_lost else known.share for known in self._members], np.float64)
        self._tail_left = 0
        self._total_load = sum(known.load for known in self._members)
        self._total_capacity = sum(known.capacity for known in self._members)
        self._homes.clear()

    def on_report(self, replica_id: str, data: bytes) -> bool:
        """False: something was missed or cannot be read, and a full report is needed."""
        known = self._by_id.get(replica_id)
        try:
            report = unpack(data)
        except BadReport:
            return False
        if known is None and not report.is_full and replica_id not in self._strangers:
            return True  # of one that Serve has taken off: it is not sent to, whatever it has
        if known is None:
            known = self._stranger_of(replica_id)
        if not report.is_full and not follows(report, known.epoch, known.number):
            return False
        known.epoch, known.number = report.epoch, report.number
        if known.slot >= 0:
            self._index.take(known, report)
        else:
            Index().take(known, report)  # what it holds is put into the index when it becomes a member
        self._loaded(known, report.load, report.capacity)
        return True

    def on_load(self, replica_id: str, load: int, capacity: int | None = None) -> None:
        """`replica_id` said what it has in hand, with a frame or a reply."""
        if (known := self._by_id.get(replica_id)) is not None:
            self._loaded(known, load, known.capacity if capacity is None else capacity)

    def on_lost(self, replica_id: str) -> None:
        """The connection to `replica_id` broke: it comes after the others until something is heard from it."""
        self._strangers.pop(replica_id, None)
        if (known := self._by_id.get(replica_id)) is not None:
            self._index.forget(known)
            known.epoch = known.number = -1
            known.is_lost = True
            self._count(known)

    def sent(self, replica_id: str) -> None:
        """This router sends a call there. It counts until a newer load is told."""
        self._moved(replica_id, 1)

    def ended(self, replica_id: str) -> None:
        """A call that was sent there is over, however."""
        self._moved(replica_id, -1)

    def place(self, call: Call) -> tuple[str, ...]:
        """Replica ids, best first; few of many. Those of `call.avoid` come last, before them the silent ones."""
        if not self._members:
            return ()
        ask = self._ask(call)
        order = self._order(ask, self._candidates(ask))
        if order[0][0] or order[0][1]:  # of those that were looked at none is well: look at all
            order = self._order(ask, self._members)
        return tuple(rank[-1] for rank in order[:MAX_PLACED])

    def _ask(self, call: Call) -> _Ask:
        now_s = self._now_s()
        # One that must be served alone had better meet a replica that has nothing to finish first.
        is_alone = call.alone_tokens > 0
        adapter = None if is_alone or call.adapter is None else name_digest(call.adapter)
        hints = () if is_alone else call.prefix_hints
        key = adapter if adapter is not None else hints[0] if hints else None
        ask = _Ask(
            key=key,
            adapter=adapter,
            hints=hints,
            seed=digest(f"{call.request_id} {call.sample_index} {len(call.avoid)}"),
            avoid=call.avoid,
            is_alone=is_alone,
            now_s=now_s,
            silent_s=now_s - SILENT_S if self._heard_s >= now_s - SILENT_S else float("-inf"),
        )
        share = self._demand.asked(key, now_s)
        if key is not None:
            size = len(self._members)
            demand, capacity = share * (self._total_load + 1), self._total_capacity / size
            ask.num_homes = min(
                size, num_homes(self._demand.homes_of(key), demand, capacity, share, size, self._weights)
            )
            self._demand.set_homes(key, ask.num_homes)
            every = self._homes_of(key, ask.num_homes)
            if ask.num_homes <= MAX_HOMES:
                ask.at_home = every[: ask.num_homes]
            else:
                ask.at_home = [every[place] for place in draws(ask.seed ^ key, ask.num_homes, MAX_HOMES)]
        return ask

    def _homes_of(self, key: int, count: int) -> tuple[int, ...]:
        """At least the key's first `count` homes: when it grows, twice as many are looked for as are needed."""
        cached = self._homes.get(key, ())
        if len(cached) < count:
            enough = 1 if count == 1 else min(len(self._members), 2 * max(count, MAX_HOMES))
            cached = self._homes[key] = homes(key, self._salts, enough)
            if len(self._homes) > _MAX_CACHED:
                self._homes.popitem(last=False)
        return cached

    def _candidates(self, ask: _Ask) -> list[Known]:
        """Replicas to look at."""
        size = len(self._members)
        if size <= FEW:
            return self._members
        if ask.key is None:
            slots = least(self._shares, NUM_TAIL) if ask.is_alone else draws(ask.seed, size, NUM_DRAWN_WITHOUT_KEY)
            return [self._members[slot] for slot in slots]
        chosen = [self._members[slot] for slot in (*ask.at_home, *draws(ask.seed, size, NUM_DRAWN))]
        if ask.adapter is not None:
            chosen += _few(self._index.names.get(ask.adapter), ask.seed)
        for hint in reversed(ask.hints):  # the longest that anybody has
            if hint in self._index.hints:
                chosen += _few(self._index.hints[hint], ask.seed)
                break
        return chosen

    def _order(self, ask: _Ask, candidates: Iterable[Known]) -> list[Rank]:
        """Of many members the least loaded come behind the candidates: no call is stuck while one of them is free."""
        weights, adapter, hints, avoid = self._weights, ask.adapter, ask.hints, ask.avoid
        is_hot = ask.num_homes > 1
        index, key = (self._index.hints, hints[0] if hints else -1) if adapter is None else (self._index.names, adapter)
        holders = index.get(key)
        # A key in demand is awaited at its homes, held there or not: else none but the first would ever get it.
        num_holders = len(holders.members) if holders is not None else 0
        is_awaited = is_hot and num_holders < ask.num_homes
        awaited = weights.vram if adapter is not None else weights.prefix
        steps = weights.load_steps if ask.num_homes == 1 else 0
        among_equals = ask.key if ask.num_homes == 1 and ask.key is not None else ask.seed
        home = ask.at_home[0] if ask.num_homes == 1 else -1
        silent_s = ask.silent_s
        ranks: dict[int, Rank] = {}
        for known in candidates:
            slot, name, load = known.slot, known.replica_id, known.share
            if slot in ranks:
                continue
            score = weights.prefix * prefix_share(hints, known.hints) if hints else 0.0
            if adapter is not None and (tier := known.names.get(adapter)) is not None:
                score += weights.vram if tier == VRAM else weights.host
            if is_awaited and slot in ask.at_home:
                score = max(score, awaited)
            if slot == home and (not num_holders or (adapter is not None and adapter in known.names)):
                score += weights.home
            score -= int(load * steps) / steps if steps else load
            order = -1 if slot == home else tie(among_equals, known.salt)
            ranks[slot] = (name in avoid, known.is_lost or known.heard_s < silent_s, 0, -score, order, name)
        for known in self._tail(ask.now_s) if len(self._members) > FEW else ():
            if known.slot not in ranks:
                name, is_silent = known.replica_id, known.is_lost or known.heard_s < silent_s
                ranks[known.slot] = (name in avoid, is_silent, 1, known.share, 0, name)
        return sorted(ranks.values())

    def _tail(self, now_s: float) -> list[Known]:
        """The least loaded of all."""
        self._tail_left -= 1
        if self._tail_left < 0 or now_s - self._tail_at_s > TAIL_S:
            self._least = [self._members[slot] for slot in least(self._shares, NUM_TAIL)]
            self._tail_left, self._tail_at_s = TAIL_CALLS, now_s
        return self._least

    def _loaded(self, known: Known, load: int, capacity: int) -> None:
        now_s = self._now_s()
        known.heard_s = self._heard_s = now_s
        known.is_lost = False
        before, capacity_before = known.load, known.capacity
        known.reported, known.unreported, known.capacity = load, 0, max(1, capacity)
        if known.slot < 0:
            known.share = known.load / known.capacity
        else:
            self._total_capacity += known.capacity - capacity_before
            self._total_load += known.load - before
            self._count(known)

    def _moved(self, replica_id: str, by: int) -> None:
        known = self._by_id.get(replica_id)
        if known is None or known.own + by < 0:  # it was sent before this replica left and came again
            return
        before = known.load
        known.own += by
        known.unreported += by
        self._total_load += known.load - before
        self._count(known)

    def _count(self, known: Known) -> None:
        known.share = known.load / known.capacity
        self._shares[known.slot] = np.inf if known.is_lost else known.share

    def _index_all(self, known: Known) -> None:
        for name in known.names:
            self._index.names.setdefault(name, Holders()).add(known)
        for hint in known.hints:
            self._index.hints.setdefault(hint, Holders()).add(known)

    def _stranger_of(self, replica_id: str) -> Known:
        known = self._strangers.get(replica_id)
        if known is None:
            known = self._strangers[replica_id] = _stranger(replica_id, self._now_s())
            if len(self._strangers) > _MAX_STRANGERS:
                self._strangers.popitem(last=False)
        return known


def _stranger(replica_id: str, now_s: float) -> Known:
    return Known(replica_id=replica_id, salt=digest(replica_id), heard_s=now_s)


def _few(holders: Holders | None, seed: int) -> list[Known]:
    """The least loaded of some that are drawn."""
    if holders is None or len(holders.members) <= NUM_HOLDERS:
        return [] if holders is None else holders.members
    drawn = [holders.members[place] for place in draws(~seed & ((1 << 64) - 1), len(holders.members), NUM_HOLDERS + 2)]
    drawn.sort(key=attrgetter("share"))
    return drawn[:NUM_HOLDERS]
