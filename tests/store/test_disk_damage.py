"""What has changed on the disk is never served, and never a reason to answer wrongly or not at all."""

import asyncio

import pytest

from adapter_store.image.packing import pack
from adapter_store.names.catalog import ImageKey
from tests.support.disk_world import files_of, in_world, right
from tests.support.fake_sources import small_adapter
from tests.support.store_world import DIGEST, SPEC


@in_world
async def test_an_image_that_was_changed_on_disk_is_never_served(world):
    await right(world)
    await world.settle()
    (path,) = files_of(world)
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    await world.restart()
    await right(world)
    assert world.source.fetches == ["a", "a"]
    await world.restart()
    await right(world)
    assert world.source.fetches == ["a", "a"], "it was written again"


@in_world
async def test_a_file_that_was_cut_short_or_is_gone_is_a_miss(world):
    for harm in (lambda path: path.write_bytes(path.read_bytes()[:-1]), lambda path: path.unlink()):
        world.source.fetches.clear()
        await right(world)
        await world.settle()
        for path in files_of(world):
            harm(path)
        await world.restart()
        await right(world)
        assert world.source.fetches[-1:] == ["a"]


@pytest.mark.parametrize("harm", ["listing = '[]'", "listing = 'x'", "sha256 = '7'"])
def test_a_name_whose_row_is_broken_is_asked_of_its_source(harm, tmp_path, monkeypatch, caplog):
    harmed("UPDATE versions SET " + harm, 0, tmp_path, monkeypatch, caplog)


@pytest.mark.parametrize("harm", ["manifest = x'00'", "manifest = 7", "num_bytes = 1 << 60", "num_bytes = 1"])
def test_an_image_whose_row_is_broken_is_a_miss_and_written_anew(harm, tmp_path, monkeypatch, caplog):
    harmed("UPDATE images SET " + harm, 1, tmp_path, monkeypatch, caplog)


def harmed(statement, num_broken, tmp_path, monkeypatch, caplog):
    """Bits that turn on the disk are no reason to answer wrongly, or not at all."""

    @in_world
    async def scenario(world):
        await right(world)
        await world.settle()
        await world.store._tiers.index.database.write(statement, [()])
        await world.restart()
        await right(world)
        assert len(world.source.fetches) == 1 + num_broken
        await world.restart()
        await right(world)
        assert len(world.source.fetches) == 1 + num_broken

    scenario(tmp_path, monkeypatch, caplog)


@in_world
async def test_an_object_that_a_read_gives_up_while_it_is_written_again_is_not_counted_as_there(world):
    lease = await right(world)
    await world.settle()
    disk, key = world.store._tiers.disk, ImageKey(lease.version, DIGEST)
    row = disk.row(key)
    await disk._forget(row.object, key)
    write = disk._files.write

    def slow(digest, data):
        write(digest, data)
        asyncio.run_coroutine_threadsafe(disk._forget(digest, key), loop).result()

    loop = asyncio.get_running_loop()
    world.monkeypatch.setattr(disk._files, "write", slow)
    await disk.put(key, pack(small_adapter(seed=1), SPEC).data, lease.manifest, lease.rank, 1.0)
    world.store.check_invariants()
    assert disk.row(key) is None
    await disk.flush()
