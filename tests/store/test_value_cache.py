"""What is worth least goes first, what is held on to never does, and the budget is never exceeded."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapter_store.errors import StoreFull
from adapter_store.tiers.value_cache import MAX_USES, ValueCache

BUDGET = 12
KEYS = "abcdefgh"


def filled(*entries, budget=3, pinned=()):
    """Entries are (key, bytes, cost)."""
    cache = ValueCache(budget, lambda key: key in pinned)
    for key, num_bytes, cost_s in entries:
        cache.add(key, num_bytes, cost_s)
    return cache


def test_of_equals_the_least_recently_used_goes_first():
    cache = filled(("a", 1, 1.0), ("b", 1, 1.0), ("c", 1, 1.0))
    cache.touch("b")
    assert cache.add("d", 1, 1.0) == ("a",)
    assert cache.add("e", 1, 1.0) == ("c",)


def test_what_was_used_more_often_stays():
    cache = filled(("a", 1, 1.0), ("b", 1, 1.0), ("c", 1, 1.0))
    for _ in range(3):
        cache.touch("a")
    cache.touch("b")
    assert cache.add("d", 2, 1.0) == ("c", "b")


def test_what_is_slow_to_load_again_stays_and_a_large_one_that_is_not_goes():
    cache = filled(("slow", 1, 9.0), ("large", 2, 1.0))
    assert cache.add("d", 1, 1.0) == ("large",)
    cache = filled(("fast", 1, 1.0), ("b", 1, 2.0), ("c", 1, 2.0))
    cache.recost("fast", 9.0)
    assert cache.add("d", 1, 1.0) == ("b",)


def test_a_former_favourite_goes_in_the_end():
    cache = filled(("old", 1, 1.0))
    for _ in range(10 * MAX_USES):
        cache.touch("old")
    cache.add("x", 1, 1.0)
    for number in range(4 * MAX_USES):
        cache.add(number, 1, 1.0)
    assert "old" not in cache


def test_a_full_cache_changes_nothing_when_it_refuses():
    cache = filled(("a", 2, 1.0), ("b", 1, 1.0), pinned="a")
    with pytest.raises(StoreFull) as caught:
        cache.add("c", 2, 1.0)
    assert (caught.value.num_bytes, caught.value.budget_bytes) == (2, 3)
    assert set(cache.keys()) == {"a", "b"}
    cache.check_invariants()
    assert cache.add("c", 1, 1.0) == ("b",)


def test_a_key_cannot_be_held_twice():
    cache = filled(("a", 1, 1.0))
    with pytest.raises(ValueError, match="already"):
        cache.add("a", 1, 1.0)


def test_what_is_outdated_does_not_pile_up():
    cache = filled(("a", 1, 1.0), ("b", 1, 1.0))
    for _ in range(10_000):
        cache.touch("a")
    cache.check_invariants()


class ValueCacheMachine(RuleBasedStateMachine):
    """The model keeps what each entry is worth in a dict and looks through all of it."""

    def __init__(self):
        super().__init__()
        self.pinned = set()
        self.cache = ValueCache(BUDGET, self.pinned.__contains__)
        self.entries = {}  # key -> [bytes, cost, uses, worth, turn]
        self.inflation = 0.0
        self.turn = 0

    def rate(self, key):
        entry = self.entries[key]
        self.turn += 1
        entry[3:] = [self.inflation + entry[2] * entry[1] / max(1, entry[0]), self.turn]

    def order(self):
        return sorted(self.entries, key=lambda key: self.entries[key][3:])

    def plan(self, num_bytes):
        """(victims, pinned ones that are come across), or None when there is no room."""
        used = sum(entry[0] for entry in self.entries.values())
        victims, passed = [], []
        for key in self.order():
            if used + num_bytes <= BUDGET:
                break
            if key in self.pinned:
                passed.append(key)
            else:
                victims.append(key)
                used -= self.entries[key][0]
        return (victims, passed) if used + num_bytes <= BUDGET else None

    @rule(key=st.sampled_from(KEYS), num_bytes=st.integers(0, 8), cost=st.sampled_from((0.0, 0.5, 1.0, 8.0)))
    def add(self, key, num_bytes, cost):
        if key in self.entries:
            return
        planned = self.plan(num_bytes)
        if planned is None:
            with pytest.raises(StoreFull):
                self.cache.add(key, num_bytes, cost)
            return
        victims, passed = planned
        assert self.cache.add(key, num_bytes, cost) == tuple(victims)
        for victim in victims:
            self.inflation = self.entries.pop(victim)[3]
        for other in passed:
            self.rate(other)
        self.entries[key] = [num_bytes, cost, 1, 0.0, 0]
        self.rate(key)

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), times=st.sampled_from((1, 2, MAX_USES)))
    def touch(self, data, times):
        key = data.draw(st.sampled_from(sorted(self.entries)))
        for _ in range(times):
            self.cache.touch(key)
            self.entries[key][2] = min(MAX_USES, self.entries[key][2] + 1)
            self.rate(key)

    @precondition(lambda self: self.entries)
    @rule(data=st.data(), cost=st.sampled_from((0.0, 2.0)))
    def recost(self, data, cost):
        key = data.draw(st.sampled_from(sorted(self.entries)))
        self.cache.recost(key, cost)
        self.entries[key][1] = cost
        self.rate(key)

    @precondition(lambda self: self.entries)
    @rule(data=st.data())
    def drop(self, data):
        key = data.draw(st.sampled_from(sorted(self.entries)))
        self.cache.drop(key)
        del self.entries[key]

    @rule(key=st.sampled_from(KEYS))
    def pin_or_unpin(self, key):
        self.pinned ^= {key}

    @invariant()
    def all_agree(self):
        self.cache.check_invariants()
        assert self.cache.keys() == tuple(self.order())
        assert self.cache.pinned_bytes == sum(e[0] for key, e in self.entries.items() if key in self.pinned)
        for key, entry in self.entries.items():
            assert (self.cache.size_of(key), self.cache.uses_of(key)) == (entry[0], entry[2])


ValueCacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestValueCache = ValueCacheMachine.TestCase
