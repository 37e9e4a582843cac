"""Names move at once, leased versions stay, failures pass: whatever the order of events."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapter_store.errors import AdapterRejected, StoreFull
from adapter_store.names.catalog import Catalog, ImageKey, NameKey
from adapter_store.records import TRANSITIONS, AdapterState
from adapter_store.sources.base import SourceFile, SourceListing
from adapter_store.tiers.value_cache import ValueCache

A, B = NameKey("s", "a"), NameKey("s", "b")
SPECS = ("spec0", "spec1")
OWNERS = ("owner0", "owner1")
BUDGET = 10
TTL = 5


def listing(etag):
    return SourceListing(files=(SourceFile(name="w", etag=etag, num_bytes=1),))


def on_host(catalog, key=A, etag="1", spec="spec0"):
    image = ImageKey(catalog.observe(key, listing(etag), 0.0), spec)
    catalog.start_fetch(image)
    catalog.fetched(image)
    return image


def test_a_name_moves_to_a_new_version_and_back_to_the_same_one():
    catalog = Catalog()
    first = catalog.observe(A, listing("1"), 0.0)
    second = catalog.observe(A, listing("2"), 1.0)
    assert catalog.current(A) == second != first
    assert catalog.version(first) is None
    assert catalog.observe(A, listing("1"), 2.0) == first
    assert catalog.checked_at(A) == 2.0


def test_a_leased_version_outlives_its_name_and_goes_with_its_last_lease():
    catalog = Catalog()
    old = on_host(catalog)
    catalog.lease(old, "x", 10.0)
    catalog.lease(old, "y", 10.0)
    catalog.observe(A, listing("2"), 1.0)
    assert catalog.unwanted(old.version) == ()
    with pytest.raises(ValueError, match="leased"):
        catalog.evict(old)
    assert catalog.release(old.version, "x") == ()
    assert catalog.release(old.version, "y") == (old,)
    catalog.evict(old)
    assert catalog.version(old.version) is None


def test_a_lease_ends_with_its_time_unless_it_is_renewed():
    catalog = Catalog()
    image = on_host(catalog)
    catalog.lease(image, "x", 10.0)
    catalog.lease(image, "y", 10.0)
    assert catalog.renew(image.version, "x", 20.0)
    catalog.expire(10.0)
    assert catalog.num_leases == 1
    assert not catalog.renew(image.version, "y", 30.0)
    catalog.expire(20.0)
    assert not catalog.is_leased(image)


def test_a_failure_is_remembered_with_its_reason_until_its_time():
    catalog = Catalog()
    image = ImageKey(catalog.observe(A, listing("1"), 0.0), "spec0")
    catalog.start_fetch(image)
    catalog.fetch_failed(image, AdapterRejected("rank 0"), retry_at=30.0)
    assert catalog.failure(image, 29.9).reason == "rank 0"
    assert catalog.failure(image, 30.0) is None
    catalog.start_fetch(image)
    assert catalog.state(image) is AdapterState.FETCHING


def test_names_that_are_not_there_are_forgotten_before_they_fill_the_memory():
    catalog = Catalog(max_missing=10)
    catalog.observe(A, listing("1"), 0.0)
    for number in range(1000):
        catalog.observe(NameKey("s", f"missing{number}"), None, 0.0)
        catalog.check_invariants()
    assert sum(catalog.checked_at(NameKey("s", f"missing{n}")) is not None for n in range(1000)) <= 10
    assert catalog.current(A) is not None


@pytest.mark.parametrize("state", list(TRANSITIONS))
def test_only_the_transitions_of_the_table_are_possible(state):
    moves = {
        AdapterState.FETCHING: Catalog.start_fetch,
        AdapterState.HOST: Catalog.fetched,
        AdapterState.FAILED: lambda catalog, image: catalog.fetch_failed(image, AdapterRejected("no"), 1.0),
        AdapterState.COLD: Catalog.fetch_dropped,
    }
    for target, move in moves.items():
        catalog = Catalog()
        image = ImageKey(catalog.observe(A, listing("1"), 0.0), "spec0")
        if state is not AdapterState.COLD:
            catalog.start_fetch(image)
        if state in (AdapterState.HOST, AdapterState.FAILED):
            moves[state](catalog, image)
        if target in TRANSITIONS[state]:
            move(catalog, image)
            assert catalog.state(image) is target
        else:
            with pytest.raises(ValueError, match="no transition"):
                move(catalog, image)
            assert catalog.state(image) is state
        catalog.check_invariants()


class StoreMachine(RuleBasedStateMachine):
    """Catalog and ValueCache together, as the store uses them, against a model of dicts."""

    def __init__(self):
        super().__init__()
        self.catalog = Catalog(max_missing=3)
        self.cache = ValueCache(BUDGET, self.catalog.is_leased)
        self.now = 0
        self.leases = {}  # (image, owner) -> expires
        self.sizes = {}  # image -> bytes
        self.names = {}

    def forget(self, images):
        for image in images:
            self.cache.drop(image)
            self.catalog.evict(image)
            assert not any(held == image for held, _ in self.leases), "a leased image was dropped"
            del self.sizes[image]

    @initialize(etag=st.sampled_from("12"))
    def begin(self, etag):
        self.names[A] = self.catalog.observe(A, listing(etag), self.now)

    @rule(key=st.sampled_from((A, B)), etag=st.sampled_from(("1", "2", "3", None)))
    def observe(self, key, etag):
        before = self.names.get(key)
        self.names[key] = self.catalog.observe(key, None if etag is None else listing(etag), self.now)
        if before is not None:
            self.forget(self.catalog.unwanted(before))

    @rule(key=st.sampled_from((A, B)), spec=st.sampled_from(SPECS), size=st.integers(1, 6), ok=st.booleans())
    def fetch(self, key, spec, size, ok):
        if self.names.get(key) is None:
            return
        image = ImageKey(self.names[key], spec)
        if self.catalog.state(image) in (AdapterState.HOST, AdapterState.FETCHING):
            return
        self.catalog.start_fetch(image)
        if not ok:
            self.catalog.fetch_failed(image, AdapterRejected("no"), self.now + TTL)
            return
        held = {image for image, _ in self.leases}
        fits = sum(self.sizes[image] for image in held) + size <= BUDGET
        try:
            victims = self.cache.add(image, size, 1.0)
        except StoreFull:
            assert not fits, "there was room"
            self.catalog.fetch_dropped(image)
            return
        assert fits
        for victim in victims:
            self.catalog.evict(victim)
            assert victim not in held
            del self.sizes[victim]
        self.catalog.fetched(image)
        self.sizes[image] = size

    @precondition(lambda self: self.sizes)
    @rule(data=st.data(), owner=st.sampled_from(OWNERS))
    def lease(self, data, owner):
        image = data.draw(st.sampled_from(sorted(self.sizes)))
        self.catalog.lease(image, owner, self.now + TTL)
        self.cache.touch(image)
        self.leases[(image, owner)] = self.now + TTL

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def renew_or_release(self, data):
        image, owner = data.draw(st.sampled_from(sorted(self.leases)))
        if data.draw(st.booleans()):
            assert self.catalog.renew(image.version, owner, self.now + TTL)
            for held, holder in self.leases:
                if held.version == image.version and holder == owner:
                    self.leases[(held, holder)] = self.now + TTL
        else:
            unwanted = self.catalog.release(image.version, owner)
            self.leases = {
                key: at for key, at in self.leases.items() if key[1] != owner or key[0].version != image.version
            }
            self.forget(unwanted)

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def lose(self, data):
        image = data.draw(st.sampled_from(sorted(self.sizes)))
        self.cache.drop(image)
        self.catalog.lose(image)
        del self.sizes[image]
        self.leases = {key: at for key, at in self.leases.items() if key[0] != image}

    @rule(seconds=st.integers(1, TTL))
    def wait(self, seconds):
        self.now += seconds
        unwanted = self.catalog.expire(self.now)
        self.leases = {key: at for key, at in self.leases.items() if at > self.now}
        self.forget(unwanted)

    @invariant()
    def all_agree(self):
        self.catalog.check_invariants()
        self.cache.check_invariants()
        assert set(self.cache.keys()) == set(self.sizes)
        assert self.cache.used_bytes == sum(self.sizes.values())
        assert self.catalog.num_leases == len(self.leases)
        for image in self.sizes:
            assert self.catalog.state(image) is AdapterState.HOST
        for image, _ in self.leases:
            assert self.catalog.version(image.version) is not None, "a leased version was forgotten"
        for key, version in self.names.items():
            assert version is None or self.catalog.current(key) == version


StoreMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
TestCatalogAndCacheTogether = StoreMachine.TestCase
