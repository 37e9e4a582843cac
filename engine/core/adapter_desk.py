"""AdapterDesk: what callers want of adapters between two steps, and what the next plan must do for it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from engine.core.adapter_slots import AdapterOp, AdapterSlots, AdapterState
from engine.core.plan import AdapterLoad
from engine.core.prefix_cache import PrefixCache
from engine.errors import AdapterError


class AdapterDesk:
    """Adds, removes, preloads and pins adapters.

    Invariant: `ops` are in the order in which the slots changed, so that the next plan can begin with them.
    """

    def __init__(self, slots: AdapterSlots, cache: PrefixCache) -> None:
        self._slots = slots
        self._cache = cache
        self._preloading: set[str] = set()
        self._wanted: dict[str, bool] = {}  # undone adapters that the caller asked for, and whether it pinned them
        self.ops: list[AdapterOp] = []  # for the next plan; one may come twice

    def remove(self, key: str, named: Iterable[str]) -> bool:
        """Forget an adapter that plans in flight do not name. Returns: whether it is forgotten, or never was known.

        One that is only resident is evicted by the next plan. The prefixes that it has computed go first from now on.
        """
        if key not in self._slots:
            return True
        if key in self.droppable(named):
            self._slots.remove(key)
            self._cache.forget_adapter(key)
            return True
        if self._slots.is_unused(key):
            self.ops.append(self._slots.evict(key))
        return False

    def droppable(self, named: Iterable[str]) -> tuple[str, ...]:
        """Adapters that no sequence uses, that are not resident, and that no plan (`named`, or the next) names."""
        busy = {*named, *(op.adapter for op in self.ops)}
        return tuple(key for key in self._slots.idle() if key not in busy)

    def preload(self, key: str, headroom: int) -> bool:
        """Bring an adapter to a free slot. Returns: whether there was room; nobody is evicted for it."""
        if self._slots.state(key) is not AdapterState.HOST:
            return True
        if self._slots.num_slots == 0:
            return False
        ops = self._slots.load(key, headroom=headroom, may_evict=False)
        self.ops.extend(ops)
        if ops:
            self._preloading.add(key)
        return bool(ops)

    def undo(self, ops: Iterable[AdapterOp]) -> None:
        """The plan with these was abandoned: newest plan first, then `load_again`.

        What the next plan was to begin with came after it, and is undone before it: it may use what this one freed.
        """
        to_come, self.ops = self.ops, []
        for op in reversed((*ops, *to_come)):
            is_there = isinstance(op, AdapterLoad) and op.adapter in self._slots
            is_kept = op.adapter in self._slots.kept()
            if is_there and (op.adapter in self._preloading or is_kept):
                self._wanted[op.adapter] = is_kept
            eviction = self._slots.undo(op)
            if not (op in to_come and isinstance(op, AdapterLoad)):  # else the runner was never told of it
                self.ops.append(eviction)

    def load_again(self) -> None:
        """What the caller had preloaded or pinned, and an abandoned plan has not loaded.

        In other pages than before a pin may leave too little for others: then it is gone.
        """
        wanted, self._wanted = self._wanted, {}
        for key, is_kept in wanted.items():
            if self.preload(key, 0) and is_kept:
                with suppress(AdapterError):
                    self._slots.keep(key)

    def has_work(self) -> bool:
        return bool(self.ops) or self.is_preloading()

    def is_preloading(self) -> bool:
        """Whether a copy is under way that a caller has asked for, and so somebody must ask whether it has ended."""
        copying = (key for key in self._preloading if key in self._slots)
        self._preloading = {key for key in copying if self._slots.state(key) is AdapterState.COPYING}
        return bool(self._preloading)
