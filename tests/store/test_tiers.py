"""Host, disk, source: an image is looked for in this order, over restarts, and while one of them is out of order."""

import errno
import json
import zlib

import pytest

from adapter_store.errors import AdapterRejected, SourceUnavailable, StoreConfigInvalid
from adapter_store.image.packing import pack
from adapter_store.names.catalog import NameKey
from adapter_store.records import AdapterState
from adapter_store.tiers import objects
from tests.support.disk_world import files_of, in_world, right
from tests.support.fake_sources import FakeSource, small_adapter, small_spec
from tests.support.store_world import IMAGE_BYTES, SPEC, World


async def restarted_long_after(world):
    """With nothing wanted any more, so that nothing comes back to the host by itself; and with the disk looked through,
    which goes on while the first calls are answered."""
    await world.settle()
    world.clock.now += 10 * world.config.traffic_half_life_s
    await world.restart()
    await world.settle()


@in_world
async def test_after_a_restart_an_adapter_comes_from_disk(world):
    before = await right(world)
    await restarted_long_after(world)
    assert (await world.store.resolve("a")).state is AdapterState.DISK
    assert (await right(world)).version == before.version
    assert world.source.fetches == ["a"]
    assert (await world.store.status()).disk_hits == 1


@in_world
async def test_notices_of_an_adapter_that_lies_on_disk_are_told_over_restarts(world):
    """As many kinds as an adapter can have, and as many letters."""
    odd = {
        "target": {"target_modules": ["q_proj", "v_proj", "zzz"]},
        "task": {"task_type": "SEQ_CLS"},
        "both": {"target_modules": ["q_proj", "v_proj", "é🙂"], "task_type": "TOKEN_CLS"},
        "long": {"target_modules": ["q_proj", "v_proj", *(f"x{i}" * 30 for i in range(40))]},
        "none": {},
    }
    told = {}
    for name, fields in odd.items():
        world.source.adapters[name] = small_adapter(seed=len(told), **fields)
        lease = await world.acquire(name)
        told[name] = tuple(lease.manifest.get("notices", ()))
        await world.store.release(lease.version, "me")
    assert [bool(told[name]) for name in odd] == [True] * 4 + [False]
    for _ in range(2):
        await restarted_long_after(world)
        for name, notices in told.items():
            record = await world.store.resolve(name)
            assert (record.state, record.notices) == (AdapterState.DISK, notices), name
    assert (await world.acquire("target")).manifest["notices"] == list(told["target"])


@in_world
async def test_an_image_that_an_earlier_program_wrote_is_found_without_its_notices(world):
    world.source.adapters["a"] = small_adapter(seed=1, task_type="SEQ_CLS")
    lease = await right(world)
    await world.settle()
    plain = zlib.compress(json.dumps(dict(lease.manifest)).encode())
    await world.store._tiers.index.database.write("UPDATE images SET manifest = ?", [(plain,)])
    await restarted_long_after(world)
    record = await world.store.resolve("a")
    assert (record.state, record.notices) == (AdapterState.DISK, ())
    await right(world)
    assert world.source.fetches == ["a"]
    assert (await world.store.resolve("a")).notices == tuple(lease.manifest["notices"])


@in_world
async def test_an_image_of_codes_lies_beside_that_of_numbers_and_outlives_a_restart_as_it_does(world):
    """Both of one version; each is found by the spec that it was packed for."""
    spec = small_spec("int8")
    digest = await world.store.register_spec(spec)
    numbers, codes = await right(world), await world.store.acquire("a", digest, "me")
    assert (numbers.version, numbers.manifest["dtype"]) == (codes.version, "float32")
    await world.restart()
    await world.store.register_spec(spec)
    world.source.down = "no route to host"
    await right(world)
    lease = await world.store.acquire("a", digest, "me")
    assert lease.manifest == codes.manifest
    assert world.bytes_of(lease).tobytes() == pack(small_adapter(seed=1), spec).data.tobytes()
    assert (await world.store.status()).disk_hits == 2


@in_world
async def test_after_a_restart_known_adapters_are_served_while_the_source_is_down(world):
    before = await right(world)
    await world.restart()
    world.source.down = "no route to host"
    world.clock.now += 1000
    lease = await right(world)
    assert (lease.version, lease.name) == (before.version, "a")
    with pytest.raises(SourceUnavailable, match="no route"):
        await world.acquire("b")
    world.clock.now += 1000
    await right(world)
    assert len([r for r in world.log.records if "known versions" in r.message]) == 1


@in_world
async def test_a_name_looked_up_shortly_before_a_restart_is_not_looked_up_again(world):
    await right(world)
    asked = len(world.source.stats)
    await world.restart()
    world.clock.now += 5
    await right(world)
    assert len(world.source.stats) == asked
    world.clock.now += 5
    await right(world)
    assert len(world.source.stats) == asked + 1


@in_world
async def test_a_clock_that_was_set_back_does_not_keep_an_old_version(world):
    old = await right(world)
    await world.settle()
    world.source.adapters["a"] = small_adapter(seed=9)
    world.clock.now -= 500
    await world.restart()
    assert (await right(world, seed=9)).version != old.version


@in_world
async def test_what_fell_out_of_host_memory_comes_back_from_disk_without_its_source(world):
    lease = await right(world)
    await world.settle()
    await world.store.release(lease.version, "me")
    for number in range(12):
        world.source.adapters[f"n{number}"] = small_adapter(seed=number)
        other = await world.acquire(f"n{number}")
        await world.store.release(other.version, "me")
        await world.settle()
    assert lease.image not in world.blobs.arrays
    world.source.fetches.clear()
    await right(world)
    assert world.source.fetches == []


@in_world
async def test_two_adapters_with_the_same_weights_share_a_file(world):
    world.source.adapters["twin"] = small_adapter(seed=1, lora_alpha=64)
    await right(world)
    twin = await right(world, "twin")
    await world.settle()
    assert len(files_of(world)) == 1
    status = await world.store.status()
    assert (status.num_disk_images, status.disk_used_bytes) == (2, IMAGE_BYTES)
    await world.restart()
    again = await right(world, "twin")
    assert again.manifest == twin.manifest != (await right(world)).manifest


@in_world
async def test_files_that_nobody_knows_are_deleted_after_a_restart(world):
    await right(world)
    await world.settle()
    (known,) = files_of(world)
    (known.parent / ("0" * 62)).write_bytes(b"left over")
    known.with_name(known.name + ".part").write_bytes(b"half")
    await world.restart()
    await world.settle()
    assert files_of(world) == [known]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_cannot_be_written_costs_no_answer_and_is_tried_again(code, tmp_path, monkeypatch, caplog):
    @in_world
    async def scenario(world):
        real = objects.write_file

        def fail(path, data):
            path.write_bytes(bytes(data[:3]))
            raise OSError(code, "no")

        monkeypatch.setattr(objects, "write_file", fail)
        for name, seed in (("a", 1), ("b", 2)):
            await right(world, name, seed)
            await world.settle()
        assert (await world.store.status()).degraded == ("disk",)
        assert files_of(world) == []
        assert len([record for record in caplog.records if "does not work" in record.message]) == 1
        monkeypatch.setattr(objects, "write_file", real)
        world.clock.now += 30
        world.source.adapters["c"] = small_adapter(seed=3)
        await right(world, "c", 3)
        await world.settle()
        assert (await world.store.status()).degraded == ()
        assert len(files_of(world)) == 1

    scenario(tmp_path, monkeypatch, caplog)


@in_world
async def test_a_disk_that_cannot_be_read_costs_no_answer(world):
    await right(world)
    await world.restart()
    world.monkeypatch.setattr(objects.ObjectFiles, "read", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "no")))
    await right(world)
    assert world.source.fetches == ["a", "a"]
    assert (await world.store.status()).degraded == ("disk",)


@in_world
async def test_an_index_that_is_no_database_is_set_aside_and_everything_is_found_again(world):
    await right(world)
    await world.settle()
    await world.store.close()
    (world.folder / "index.sqlite").write_bytes(b"not a database, by far" * 500)
    for path in world.folder.glob("index.sqlite-*"):
        path.unlink()
    world.begin()
    await world.store.register_spec(SPEC)
    await right(world)
    assert world.source.fetches == ["a", "a"]
    assert len(list(world.folder.glob("index.sqlite.broken-*"))) == 1
    assert len([record for record in world.log.records if "register and pin again" in record.getMessage()]) == 1
    await world.restart()
    await right(world)
    assert world.source.fetches == ["a", "a"]


@in_world
async def test_a_second_store_goes_without_the_folder_until_the_first_has_left_it(world):
    await right(world)
    await world.settle()
    other = World(world.source, disk_path=str(world.folder))
    await other.store.register_spec(SPEC)
    await right(other)
    await other.settle()
    assert (await other.store.status()).degraded == ("disk",)
    assert len([record for record in world.log.records if "in use by process" in record.getMessage()]) == 1
    await world.store.close()
    await other.store._tiers.keep_house()
    await other.settle()
    status = await other.store.status()
    assert (status.degraded, status.num_disk_images) == ((), 1)
    await other.store.close()
    world.begin()


def test_a_path_that_cannot_be_a_folder_is_refused_at_start(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreConfigInvalid, match="disk_path"):
        World(disk_path=str(tmp_path / "file"))


def test_no_source_may_be_called_catalog():
    with pytest.raises(StoreConfigInvalid, match="'catalog'"):
        World(FakeSource({}, "catalog"))


@in_world
async def test_the_disk_tier_stays_within_its_bytes_and_keeps_what_is_leased(world):
    await world.store.close()
    world.config = type(world.config)(
        host_bytes=10 * IMAGE_BYTES,
        max_adapter_bytes=5000,
        disk_path=str(world.folder),
        disk_bytes=2 * IMAGE_BYTES,
    )
    world.begin()
    await world.store.register_spec(SPEC)
    await right(world)
    for seed in range(5):
        world.source.adapters[f"n{seed}"] = small_adapter(seed=10 + seed)
        lease = await right(world, f"n{seed}", 10 + seed)
        await world.settle()
        await world.store.release(lease.version, "me")
    assert sum(path.stat().st_size for path in files_of(world)) <= 2 * IMAGE_BYTES
    assert (await world.store.resolve("a")).state is AdapterState.HOST
    await restarted_long_after(world)
    assert (await world.store.resolve("a")).state is AdapterState.DISK


@in_world
async def test_a_digest_that_was_remembered_wrongly_refuses_the_right_file_until_it_is_refreshed(world):
    lease = await right(world)
    await world.settle()
    key = NameKey(lease.source, lease.name)
    known = await world.store._tiers.index.known(key)
    wrong = known._replace(sha256=dict.fromkeys(known.sha256, "0" * 64))
    await world.store._tiers.index.remember(key, wrong)
    for file in files_of(world):
        file.unlink()
    await world.restart()
    for _ in range(2):
        with pytest.raises(AdapterRejected, match="refresh the adapter"):
            await world.acquire()
        world.clock.now += world.config.failure_ttl_s
    await world.store.refresh("a")
    await right(world)
    await world.settle()
    assert await world.store._tiers.index.known(key) == known._replace(checked_at=world.clock.now)


@in_world
async def test_a_disk_that_is_full_at_start_still_gives_its_lock(world):
    await world.store.close()

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    world.monkeypatch.setattr(objects.os, "write", full)
    lock = objects.FolderLock(world.folder / "lock")
    assert lock.try_acquire()
    assert not objects.FolderLock(world.folder / "lock").try_acquire()
    lock.release()
    world.monkeypatch.undo()
    world.begin()
    await world.store.register_spec(SPEC)
