"""Whatever happens in whatever order: budgets hold, leases are kept, and what is served are the true files' bytes."""

import asyncio
import errno
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapter_store.errors import AdapterNotFound, AdapterRejected, PinRefused, SourceUnavailable, StoreFull
from adapter_store.image.packing import pack
from adapter_store.records import Registration
from adapter_store.tiers import objects
from tests.support.fake_sources import small_adapter
from tests.support.store_world import IMAGE_BYTES, SPEC, World, turns

NAMES = ("a", "b", "c", "d")
ROWS = ("r", "a")  # registered names: one of its own, one that hides a name of the source
OWNERS = ("x", "y")
HOST_BYTES, DISK_BYTES = 3 * IMAGE_BYTES, 3 * IMAGE_BYTES
TTL_S = 30.0
IMAGES = {seed: pack(small_adapter(seed=seed), SPEC).data for seed in range(6)}
BROKEN = -1


class StoreMachine(RuleBasedStateMachine):
    """The model: what each name's files are, where registered names point, who leases which version."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="store-machine-"))
        self.no_sync = mock.patch.object(objects.os, "fsync")  # nobody pulls the plug here
        self.no_sync.start()
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self.begin())
        self.seeds = {}  # name -> seed of its files
        self.rows = {}  # registered name -> location
        self.leases = {}  # (version, owner) -> [image, seed, when it expires]
        self.seed_of = {}  # version -> seed
        self.pins = set()
        self.history = {name: set() for name in (*NAMES, "r")}  # the seeds that a name ever stood for

    @initialize()
    def upload_all(self):
        for seed, name in enumerate(NAMES):
            self.upload(name, seed)

    async def begin(self):
        self.world = World(
            host_bytes=HOST_BYTES,
            max_adapter_bytes=HOST_BYTES,
            disk_path=str(self.folder),
            disk_bytes=DISK_BYTES,
            refresh_s=0.0,
            missing_ttl_s=0.001,
            unavailable_ttl_s=0.001,
            failure_ttl_s=0.001,
            fetch_retries=1,
            lease_ttl_s=TTL_S,
        )
        self.world.source.adapters.clear()
        await self.world.store.register_spec(SPEC)

    def run(self, work):
        self.world.clock.now += 0.01  # no failure is remembered from one step to the next
        return self.loop.run_until_complete(work)

    def teardown(self):
        self.run(self.world.settle())
        self.run(self.world.store.close())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.no_sync.stop()
        shutil.rmtree(self.folder)

    def location(self, name):
        return self.rows.get(name, name)

    def true_seed(self, name):
        return self.seeds.get(self.location(name))

    def leased_bytes(self):
        return IMAGE_BYTES * len({image for image, _, _ in self.leases.values()})

    def expire(self):
        self.leases = {key: entry for key, entry in self.leases.items() if entry[2] > self.world.clock.now}

    @rule(name=st.sampled_from(NAMES), seed=st.sampled_from((BROKEN, *IMAGES)))
    def upload(self, name, seed):
        self.seeds[name] = seed
        self.world.source.adapters[name] = small_adapter(use_dora=True) if seed == BROKEN else small_adapter(seed=seed)

    @precondition(lambda self: self.seeds)
    @rule(data=st.data())
    def delete(self, data):
        name = data.draw(st.sampled_from(sorted(self.seeds)))
        del self.seeds[name], self.world.source.adapters[name]

    @rule(name=st.sampled_from((*NAMES, "r")), owner=st.sampled_from(OWNERS))
    def acquire(self, name, owner):
        self.run(self._acquire(name, owner))

    @rule(names=st.permutations(NAMES), owner=st.sampled_from(OWNERS), releases=st.booleans())
    def acquire_all(self, names, owner, releases):
        for name in names:
            self.run(self._acquire(name, owner))
            if releases:
                for version in {version for version, holder in self.leases if holder == owner}:
                    self.run(self.world.store.release(version, owner))
                    del self.leases[(version, owner)]
        self.run(self.world.settle())

    async def _acquire(self, name, owner):
        seed, is_down = self.true_seed(name), self.world.source.down is not None
        self.expire()
        try:
            lease = await self.world.acquire(name, owner)
        except AdapterNotFound:
            assert seed is None or is_down, "an adapter that is there was not found"
        except AdapterRejected:
            assert seed == BROKEN or is_down
        except SourceUnavailable:
            assert is_down
        except StoreFull:
            assert self.leased_bytes() + IMAGE_BYTES * min(len(self.pins), 1) + IMAGE_BYTES > HOST_BYTES
        else:
            assert lease.name == name
            served = self.world.bytes_of(lease)
            if not is_down:
                assert np.array_equal(served, IMAGES[seed]), "what is served are not the files of that name"
                self.seed_of[lease.version] = seed
            elif lease.version not in self.seed_of:  # it was fetched, but never leased while its source was up
                known = [seed for seed in self.history[name] if np.array_equal(served, IMAGES[seed])]
                assert known, "what is served was never that name's"
                self.seed_of[lease.version] = known[0]
            assert np.array_equal(served, IMAGES[self.seed_of[lease.version]]), "a version has changed its bytes"
            self.leases[(lease.version, owner)] = [lease.image, self.seed_of[lease.version], 0.0]
            self.renewed(lease.version, owner)

    def renewed(self, version, owner):
        self.leases[(version, owner)][2] = self.world.clock.now + TTL_S

    @rule(which=st.integers(0, 7), releases=st.booleans())
    def release_or_renew(self, which, releases):
        if not self.leases:  # what is leased may depend on how fast the disk was: nothing is drawn from it
            return
        version, owner = sorted(self.leases)[which % len(self.leases)]
        if releases:
            self.run(self.world.store.release(version, owner))
            del self.leases[(version, owner)]
        else:
            self.world.clock.now += 0.01
            self.expire()
            gone = self.loop.run_until_complete(self.world.store.heartbeat(owner, (version,)))
            assert (gone == ()) == ((version, owner) in self.leases)
            if not gone:
                self.renewed(version, owner)

    @rule(name=st.sampled_from(NAMES), aborted_after=st.integers(0, 30))
    def abort(self, name, aborted_after):
        async def scenario():
            task = asyncio.create_task(self.world.acquire(name, "aborted"))
            await turns(aborted_after)
            task.cancel()
            for lease in await asyncio.gather(task, return_exceptions=True):
                if not isinstance(lease, BaseException):
                    await self.world.store.release(lease.version, "aborted")
            await self.world.settle()

        self.run(scenario())

    @rule(name=st.sampled_from(NAMES))
    def expect(self, name):
        self.run(self.world.store.expect(name))
        self.run(self.world.settle())

    @rule(is_down=st.sampled_from((True, False, False, False)))
    def source_goes_or_comes(self, is_down):
        self.world.source.down = "no route to host" if is_down else None

    @rule(name=st.sampled_from(ROWS), location=st.sampled_from((*NAMES, None)))
    def register(self, name, location):
        if location is None:
            gone = self.run(self.world.store.unregister((name,)))
            assert gone == ((name,) if name in self.rows else ())
            self.rows.pop(name, None)
        else:
            self.run(self.world.store.register((Registration(name=name, source="fake", location=location),)))
            self.rows[name] = location

    @rule(name=st.sampled_from(NAMES), is_pinned=st.booleans())
    def pin(self, name, is_pinned):
        try:
            if is_pinned:
                record = self.run(self.world.store.pin(name))
                self.pins.add((record.source, name))
            else:
                self.run(self.world.store.unpin(name))
                self.pins = {key for key in self.pins if key[1] != name}
        except (AdapterNotFound, AdapterRejected, SourceUnavailable, PinRefused, StoreFull):
            pass
        self.expire()

    @rule(seconds=st.sampled_from((1.0, TTL_S)))
    def wait(self, seconds):
        self.world.clock.now += seconds

    @rule()
    def restart(self):
        self.run(self.world.restart())
        self.leases.clear()

    @rule(position=st.integers(0, IMAGE_BYTES - 1), restarts=st.booleans())
    def corrupt_the_disk(self, position, restarts):
        self.run(self.world.settle())
        for path in sorted((self.folder / "objects").glob("*/*")):
            content = bytearray(path.read_bytes())
            content[position] ^= 0x40
            path.write_bytes(content)
        if restarts:
            self.restart()

    @rule(name=st.sampled_from(NAMES), owner=st.sampled_from(OWNERS))
    def load_while_the_disk_is_full(self, name, owner):
        with mock.patch.object(objects, "write_file", side_effect=OSError(errno.ENOSPC, "No space left on device")):
            self.run(self._acquire(name, owner))
            self.run(self.world.settle())

    @invariant()
    def all_agree(self):
        for name, seeds in self.history.items():
            seeds |= {self.true_seed(name)} - {None, BROKEN}
        self.world.store.check_invariants()
        status = self.run(self.world.store.status())
        self.expire()
        assert status.host_used_bytes <= HOST_BYTES
        assert status.disk_used_bytes <= DISK_BYTES
        on_disk = sum(path.stat().st_size for path in (self.folder / "objects").glob("*/*") if not path.suffix)
        assert on_disk <= DISK_BYTES
        assert status.num_leases == len(self.leases), "a lease leaked or was lost"
        for image, seed, _ in self.leases.values():
            assert np.array_equal(self.world.blobs.arrays[image], IMAGES[seed]), "a leased image was dropped"
        assert status.num_registered == len(self.rows)
        assert status.num_pinned == len(self.pins)


StoreMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestStore = StoreMachine.TestCase
