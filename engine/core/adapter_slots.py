"""AdapterSlots: which adapter sits in which LoRA slot.

HOST ──load()──► COPYING ──copied()──► RESIDENT          evict(), or undo() of an abandoned plan: back to HOST
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter

from engine.core.adapter_room import AdapterRoom
from engine.core.plan import AdapterEvict, AdapterLoad
from engine.core.worth import WorthClock
from engine.errors import AdapterError

AdapterOp = AdapterLoad | AdapterEvict


class AdapterState(Enum):
    HOST = "host"
    COPYING = "copying"
    RESIDENT = "resident"


ADAPTER_TRANSITIONS: dict[AdapterState, frozenset[AdapterState]] = {
    AdapterState.HOST: frozenset({AdapterState.COPYING}),
    AdapterState.COPYING: frozenset({AdapterState.RESIDENT, AdapterState.HOST}),
    AdapterState.RESIDENT: frozenset({AdapterState.HOST}),
}


@dataclass(slots=True)
class _Adapter:
    key: str
    num_bytes: int
    runs: tuple[int, ...]  # neighbouring pages it needs, if adapters live in pages
    size: int  # in the units of the room
    state: AdapterState = AdapterState.HOST
    slot: int | None = None  # while COPYING or RESIDENT
    pages: tuple[int, ...] = ()  # the runs, one behind the other
    pins: int = 0  # sequences that claimed it, run with it, or are named with it by a plan in flight; and the caller's
    is_kept: bool = False  # the caller has pinned it
    users: int = 0  # sequences that are not over yet
    uses: int = 0  # since it was loaded
    worth: int = 0
    last_used: int = 0

    def move_to(self, state: AdapterState) -> None:
        if state not in ADAPTER_TRANSITIONS[self.state]:
            raise AssertionError(f"adapter {self.key}: {self.state.value} -> {state.value} is not a transition")
        self.state = state

    @property
    def may_go(self) -> bool:
        return self.state is AdapterState.RESIDENT and not self.pins


_by_worth = attrgetter("worth", "last_used")


class AdapterSlots:
    """LoRA slots 1 .. num_slots and the room of their adapters; slot 0 is the base model and never given away.

    Who is evicted is decided by worth (`worth.py`); of equals, the least recently used goes first.
    Invariants:
      - an adapter has a slot, and its pages, if and only if it is COPYING or RESIDENT; a slot has at most one adapter
      - the adapters with a slot are within the room's budget; an adapter costs its true size
      - a pinned adapter has a slot and is never evicted; neither is one that is being copied
    """

    def __init__(self, num_slots: int, room: AdapterRoom, *, loads_at_once: bool = False) -> None:
        """`loads_at_once`: nothing is copied, so rows of the very plan that loads an adapter may use it."""
        self.num_slots = num_slots
        self._loads_at_once = loads_at_once
        self.room = room
        self.used_bytes = 0
        self.num_loads = self.num_evictions = 0
        self._adapters: dict[str, _Adapter] = {}
        self._placed: dict[int, _Adapter] = {}  # by slot
        self._free_slots = list(range(1, num_slots + 1))  # a heap
        self._idle: dict[str, None] = {}  # HOST and without users
        self._worth = WorthClock()
        self._clock = 0  # counts uses

    def __contains__(self, key: str) -> bool:
        return key in self._adapters

    def add(self, key: str, num_bytes: int, runs: tuple[int, ...] = ()) -> None:
        """Its host image is there. Adding it again changes nothing. Raises: AdapterError if its size changed."""
        known = self._adapters.get(key)
        if known is None:
            self._adapters[key] = _Adapter(key, num_bytes, runs, self.room.size(num_bytes, runs))
            self._idle[key] = None
        elif known.num_bytes != num_bytes:
            raise AdapterError(
                f"adapter {key!r} has {num_bytes} bytes now and had {known.num_bytes}: "
                "a key names one version; give another version another key"
            )

    def remove(self, key: str) -> None:
        """Forget an idle adapter."""
        del self._idle[key]
        del self._adapters[key]

    def idle(self) -> Iterator[str]:
        return iter(self._idle)

    def is_unused(self, key: str) -> bool:
        """Resident, nobody has pinned it, and no sequence is going to need it."""
        adapter = self._adapters[key]
        return adapter.may_go and not adapter.users

    def num_bytes(self, key: str) -> int:
        return self._adapters[key].num_bytes

    def size(self, key: str) -> int:
        """In the units of the room."""
        return self._adapters[key].size

    def state(self, key: str) -> AdapterState:
        return self._adapters[key].state

    def slot(self, key: str) -> int:
        slot = self._adapters[key].slot
        assert slot is not None, f"adapter {key} has no slot"
        return slot

    def num_pins(self, key: str) -> int:
        return self._adapters[key].pins

    @property
    def is_copying(self) -> bool:
        return any(adapter.state is AdapterState.COPYING for adapter in self._placed.values())

    def resident(self) -> tuple[str, ...]:
        """Of least worth first."""
        placed = sorted(self._placed.values(), key=_by_worth)
        return tuple(adapter.key for adapter in placed if adapter.state is AdapterState.RESIDENT)

    def kept(self) -> tuple[str, ...]:
        """Those that the caller has pinned, by slot."""
        return tuple(self._placed[slot].key for slot in sorted(self._placed) if self._placed[slot].is_kept)

    def pages(self) -> Iterator[int]:
        """Of all adapters with a slot."""
        return (page for adapter in self._placed.values() for page in adapter.pages)

    def add_user(self, key: str) -> None:
        self._adapters[key].users += 1
        self._idle.pop(key, None)

    def drop_user(self, key: str) -> None:
        adapter = self._adapters[key]
        adapter.users -= 1
        assert adapter.users >= 0, f"adapter {key} has fewer users than were added"
        self._note_idle(adapter)

    def pin(self, key: str) -> None:
        adapter = self._adapters[key]
        assert adapter.slot is not None, f"adapter {key} has no slot to be pinned in"
        adapter.pins += 1
        adapter.uses += 1
        self._touch(adapter)

    def unpin(self, key: str) -> None:
        adapter = self._adapters[key]
        adapter.pins -= 1
        assert adapter.pins >= 0, f"adapter {key} is unpinned more often than it was pinned"
        self._touch(adapter)

    def keep(self, key: str) -> None:
        """The caller pins an adapter that has a slot. Again changes nothing.

        Raises: AdapterError if it has none, or if beside all so pinned one as large as any known would find no room.
        """
        adapter = self._adapters.get(key)
        if adapter is None or adapter.slot is None:
            raise AdapterError(f"adapter {key!r} cannot be pinned: it is not resident; preload it, or use it once")
        if adapter.is_kept:
            return
        adapter.is_kept = True
        num_kept = len(self.kept())
        refused = [other for other in self._adapters.values() if not self._fits_beside_kept(other, None)]
        if refused or num_kept >= self.num_slots:
            adapter.is_kept = False
            largest = max(self._adapters.values(), key=lambda other: other.size)
            raise AdapterError(
                f"adapter {key!r} cannot be pinned: with it, {num_kept} adapters are pinned, and in {self.num_slots} "
                f"slots and {self.room.budget} {self.room.unit} one of {largest.size} {self.room.unit} would find no "
                "room beside them; unpin another, or raise adapter_bytes or max_resident_adapters"
            )
        adapter.pins += 1

    def stop_keeping(self, key: str) -> None:
        """The caller's pin goes. Nothing happens if there is none."""
        adapter = self._adapters.get(key)
        if adapter is not None and adapter.is_kept:
            adapter.is_kept = False
            adapter.pins -= 1

    def could_fit(self, key: str) -> bool:
        """Whether an adapter finds room beside those that the caller has pinned, once nothing else is in the way."""
        adapter = self._adapters[key]
        return adapter.is_kept or self._fits_beside_kept(adapter, adapter)

    def _fits_beside_kept(self, adapter: _Adapter, but: _Adapter | None) -> bool:
        kept = [other for other in self._placed.values() if other.is_kept and other is not but]
        pages = (page for other in kept for page in other.pages)
        return self.room.could_fit(adapter.size, adapter.runs, pages, sum(other.size for other in kept))

    def load(self, key: str, *, headroom: int = 0, may_evict: bool = True) -> tuple[AdapterOp, ...]:
        """Start the copy of a HOST adapter, evicting those of least worth that nobody has pinned.

        Of room that is shared with sequences it leaves them `headroom` blocks to grow into.
        Returns: what the plan must do, in order; empty if there is no room (and then nothing has changed).
        """
        adapter = self._adapters[key]
        victims = self._victims(adapter, headroom, may_evict)
        if victims is None:
            return ()
        evictions = tuple(self.evict(victim.key) for victim in victims)
        adapter.move_to(AdapterState.COPYING)
        adapter.slot = heapq.heappop(self._free_slots)
        adapter.pages = self.room.take(adapter.size, adapter.runs)
        self._placed[adapter.slot] = adapter
        self.used_bytes += adapter.num_bytes
        self.num_loads += 1
        self._idle.pop(key, None)
        self._touch(adapter)
        if self._loads_at_once:
            adapter.move_to(AdapterState.RESIDENT)
        return (*evictions, AdapterLoad(key, adapter.slot, adapter.pages))

    def yield_pages(self, num_pages: int) -> tuple[AdapterOp, ...]:
        """Evict adapters of least worth for so many pages that sequences need, down to what adapters keep.

        Returns: what the plan must do; empty if that is not possible (and then nothing has changed).
        """
        spare, missing = self.room.num_to_spare(), num_pages
        victims: list[_Adapter] = []
        for adapter in sorted(self._evictable(), key=_by_worth):
            if missing <= 0:
                break
            if 0 < adapter.size <= spare:
                victims.append(adapter)
                spare -= adapter.size
                missing -= adapter.size
        return tuple(self.evict(victim.key) for victim in victims) if missing <= 0 else ()

    def evict(self, key: str) -> AdapterEvict:
        """Take the slot of a RESIDENT adapter that nobody has pinned."""
        adapter = self._adapters[key]
        assert adapter.state is AdapterState.RESIDENT, f"adapter {key} is not resident"
        assert not adapter.pins, f"adapter {key} is in use"
        self.num_evictions += 1
        self._worth.note_eviction(adapter.worth)
        return AdapterEvict(key, self._displace(adapter))

    def copied(self, key: str) -> None:
        """Its copy event has fired. Events of copies that were given up are ignored."""
        adapter = self._adapters.get(key)
        if adapter is not None and adapter.state is AdapterState.COPYING:
            adapter.move_to(AdapterState.RESIDENT)

    def undo(self, op: AdapterOp) -> AdapterEvict:
        """The plan with `op` was abandoned, perhaps after the device had begun it: the adapter is on the host.

        Call it for the newest op first, with no pin left but the caller's, which goes. Returns: what the next plan must
        do to make that true.
        """
        adapter = self._adapters.get(op.adapter)
        if isinstance(op, AdapterLoad) and adapter is not None and adapter.slot == op.lora_slot:
            self.stop_keeping(op.adapter)
            assert not adapter.pins, f"adapter {op.adapter} is pinned"
            self._displace(adapter)
        return AdapterEvict(op.adapter, op.lora_slot)

    def _displace(self, adapter: _Adapter) -> int:
        slot = adapter.slot
        assert slot is not None
        adapter.move_to(AdapterState.HOST)
        self.room.give_back(adapter.size, adapter.pages)
        adapter.slot, adapter.pages, adapter.uses, adapter.worth = None, (), 0, 0
        del self._placed[slot]
        heapq.heappush(self._free_slots, slot)
        self.used_bytes -= adapter.num_bytes
        self._note_idle(adapter)
        return slot

    def _victims(self, adapter: _Adapter, headroom: int, may_evict: bool) -> list[_Adapter] | None:
        """Whom to evict for `adapter`: the fewest of the least worth. None: not possible."""
        candidates = sorted(self._evictable(), key=_by_worth) if may_evict else []
        if not self._has_room(adapter, candidates, headroom):
            return None
        for count in range(len(candidates)):
            if self._has_room(adapter, candidates[:count], headroom):
                return candidates[:count]
        return candidates

    def _has_room(self, adapter: _Adapter, victims: list[_Adapter], headroom: int) -> bool:
        """For its bytes and a slot, once the victims are gone."""
        if not (self._free_slots or victims):
            return False
        freed = sum(victim.size for victim in victims)
        pages = (page for victim in victims for page in victim.pages)
        return self.room.fits(adapter.size, adapter.runs, pages, freed, headroom)

    def _evictable(self) -> Iterator[_Adapter]:
        return (adapter for adapter in self._placed.values() if adapter.may_go)

    def room_makers(self, key: str) -> frozenset[str]:
        """Adapters that make room for another once no sequence pins them: least pinned, then of least worth."""
        over = self.room.used + self._adapters[key].size - self.room.budget
        chosen: list[str] = []
        candidates = [adapter for adapter in self._placed.values() if not adapter.is_kept]
        for adapter in sorted(candidates, key=lambda adapter: (adapter.pins, *_by_worth(adapter))):
            if over <= 0 and (chosen or self._free_slots):
                break
            chosen.append(adapter.key)
            over -= adapter.size
        return frozenset(chosen)

    def _touch(self, adapter: _Adapter) -> None:
        self._clock += 1
        adapter.last_used = self._clock
        adapter.worth = self._worth.worth(adapter.uses, adapter.num_bytes)

    def _note_idle(self, adapter: _Adapter) -> None:
        if not adapter.users and adapter.state is AdapterState.HOST:
            self._idle[adapter.key] = None

    def check_invariants(self) -> None:
        assert 0 not in self._placed
        assert sorted([*self._placed, *self._free_slots]) == list(range(1, self.num_slots + 1))
        for slot, adapter in self._placed.items():
            assert adapter.slot == slot
            assert self._adapters[adapter.key] is adapter
        for adapter in self._adapters.values():
            assert (adapter.slot is None) == (adapter.state is AdapterState.HOST), adapter
            assert not adapter.pins or adapter.slot is not None, adapter
            assert adapter.pins or not adapter.is_kept, adapter
            assert not adapter.pages or adapter.slot is not None, adapter
            idle = adapter.state is AdapterState.HOST and not adapter.users
            assert idle == (adapter.key in self._idle), adapter
        assert self.used_bytes == sum(adapter.num_bytes for adapter in self._placed.values())
        assert self.room.used == sum(adapter.size for adapter in self._placed.values()) <= self.room.budget
