"""AdapterSlots: which adapter sits in which LoRA slot.

HOST ──load()──► COPYING ──copied()──► RESIDENT          evict(), or undo() of an abandoned plan: back to HOST
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from engine.core.plan import AdapterEvict, AdapterLoad
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
    state: AdapterState = AdapterState.HOST
    slot: int | None = None  # while COPYING or RESIDENT
    pins: int = 0  # sequences that claimed it, run with it, or are named with it by a plan in flight
    users: int = 0  # sequences that are not over yet
    last_used: int = 0

    def move_to(self, state: AdapterState) -> None:
        if state not in ADAPTER_TRANSITIONS[self.state]:
            raise AssertionError(f"adapter {self.key}: {self.state.value} -> {state.value} is not a transition")
        self.state = state


class AdapterSlots:
    """LoRA slots 1 .. num_slots and a byte budget; slot 0 is the base model and never given away.

    Invariants:
      - an adapter has a slot if and only if it is COPYING or RESIDENT; a slot has at most one adapter
      - bytes of the adapters with a slot <= budget_bytes; an adapter costs its true size
      - a pinned adapter has a slot and is never evicted; neither is one that is being copied
    """

    def __init__(self, num_slots: int, budget_bytes: int) -> None:
        self.num_slots = num_slots
        self.budget_bytes = budget_bytes
        self.used_bytes = 0
        self._adapters: dict[str, _Adapter] = {}
        self._placed: dict[int, _Adapter] = {}  # by slot
        self._free_slots = list(range(1, num_slots + 1))  # a heap
        self._idle: dict[str, None] = {}  # HOST and without users
        self._clock = 0  # counts uses

    def __contains__(self, key: str) -> bool:
        return key in self._adapters

    def add(self, key: str, num_bytes: int) -> None:
        """Its host image is there. Adding it again changes nothing. Raises: AdapterError if its size changed."""
        known = self._adapters.get(key)
        if known is None:
            self._adapters[key] = _Adapter(key, num_bytes)
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
        """Resident, and no sequence is going to need it."""
        adapter = self._adapters[key]
        return adapter.state is AdapterState.RESIDENT and not adapter.users

    def num_bytes(self, key: str) -> int:
        return self._adapters[key].num_bytes

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
        """Least recently used first."""
        placed = sorted(self._placed.values(), key=lambda adapter: adapter.last_used)
        return tuple(adapter.key for adapter in placed if adapter.state is AdapterState.RESIDENT)

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
        self._touch(adapter)

    def unpin(self, key: str) -> None:
        adapter = self._adapters[key]
        adapter.pins -= 1
        assert adapter.pins >= 0, f"adapter {key} is unpinned more often than it was pinned"
        self._touch(adapter)

    def load(self, key: str) -> tuple[AdapterOp, ...]:
        """Start the copy of a HOST adapter, evicting the least recently used that nobody has pinned.

        Returns: what the plan must do, in order; empty if there is no room (and then nothing has changed).
        """
        adapter = self._adapters[key]
        victims = self._victims(adapter.num_bytes)
        if victims is None:
            return ()
        evictions = tuple(self.evict(victim.key) for victim in victims)
        adapter.move_to(AdapterState.COPYING)
        adapter.slot = heapq.heappop(self._free_slots)
        self._placed[adapter.slot] = adapter
        self.used_bytes += adapter.num_bytes
        self._idle.pop(key, None)
        self._touch(adapter)
        return (*evictions, AdapterLoad(key, adapter.slot))

    def evict(self, key: str) -> AdapterEvict:
        """Take the slot of a RESIDENT adapter that nobody has pinned."""
        adapter = self._adapters[key]
        assert adapter.state is AdapterState.RESIDENT, f"adapter {key} is not resident"
        assert not adapter.pins, f"adapter {key} is in use"
        return AdapterEvict(key, self._displace(adapter))

    def copied(self, key: str) -> None:
        """Its copy event has fired. Events of copies that were given up are ignored."""
        adapter = self._adapters.get(key)
        if adapter is not None and adapter.state is AdapterState.COPYING:
            adapter.move_to(AdapterState.RESIDENT)

    def undo(self, op: AdapterOp) -> AdapterEvict:
        """The plan with `op` was abandoned, perhaps after the device had begun it: the adapter is on the host.

        Call it for the newest op first, with no pin left. Returns: what the next plan must do to make that true.
        """
        adapter = self._adapters.get(op.adapter)
        if isinstance(op, AdapterLoad) and adapter is not None and adapter.slot == op.lora_slot:
            assert not adapter.pins, f"adapter {op.adapter} is pinned"
            self._displace(adapter)
        return AdapterEvict(op.adapter, op.lora_slot)

    def _displace(self, adapter: _Adapter) -> int:
        slot = adapter.slot
        assert slot is not None
        adapter.move_to(AdapterState.HOST)
        adapter.slot = None
        del self._placed[slot]
        heapq.heappush(self._free_slots, slot)
        self.used_bytes -= adapter.num_bytes
        self._note_idle(adapter)
        return slot

    def _victims(self, num_bytes: int) -> list[_Adapter] | None:
        """Whom to evict for `num_bytes` and a slot: the fewest of the least recently used. None: not possible."""
        victims: list[_Adapter] = []
        bytes_over = self.used_bytes + num_bytes - self.budget_bytes
        no_slot = not self._free_slots
        if bytes_over <= 0 and not no_slot:
            return victims
        for adapter in sorted(self._evictable(), key=lambda adapter: adapter.last_used):
            victims.append(adapter)
            bytes_over -= adapter.num_bytes
            if bytes_over <= 0:
                return victims
        return None

    def _evictable(self) -> Iterator[_Adapter]:
        return (a for a in self._placed.values() if not a.pins and a.state is AdapterState.RESIDENT)

    def room_makers(self, num_bytes: int) -> frozenset[str]:
        """Adapters that make room for `num_bytes` and a slot once nobody pins them: least pinned, then least used."""
        bytes_over = self.used_bytes + num_bytes - self.budget_bytes
        chosen: list[str] = []
        for adapter in sorted(self._placed.values(), key=lambda adapter: (adapter.pins, adapter.last_used)):
            if bytes_over <= 0 and (chosen or self._free_slots):
                break
            chosen.append(adapter.key)
            bytes_over -= adapter.num_bytes
        return frozenset(chosen)

    def _touch(self, adapter: _Adapter) -> None:
        self._clock += 1
        adapter.last_used = self._clock

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
            idle = adapter.state is AdapterState.HOST and not adapter.users
            assert idle == (adapter.key in self._idle), adapter
        assert self.used_bytes == sum(adapter.num_bytes for adapter in self._placed.values())
        assert self.used_bytes <= self.budget_bytes
