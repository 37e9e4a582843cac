"""Shared memory that is full: images are served from files, and nobody is told with every one of them."""

import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from adapter_store.errors import AdapterNotFound
from adapter_store.image.packing import pack
from adapter_store.tiers.blobs import FileImage, ImageFiles, map_image
from tests.support.disk_world import in_world, right
from tests.support.fake_sources import small_adapter
from tests.support.store_world import IMAGE_BYTES, SPEC


@in_world
async def test_with_shared_memory_full_of_leased_images_the_next_one_is_served_from_a_file(world):
    world.blobs.max_bytes = IMAGE_BYTES
    first = await right(world)
    second = await right(world, "b", 2)
    assert isinstance(second.image, FileImage)
    assert np.array_equal(world.bytes_of(first), pack(small_adapter(seed=1), SPEC).data)
    assert (await world.store.status()).degraded == ("host",)
    mapped = world.bytes_of(second)
    await world.store.release(second.version, "me")
    del world.source.adapters["b"]
    world.clock.now += 20
    with pytest.raises(AdapterNotFound):
        await world.acquire("b")
    assert (await world.store.status()).degraded == ()
    with pytest.raises(FileNotFoundError):
        world.bytes_of(second)
    assert np.array_equal(mapped, pack(small_adapter(seed=2), SPEC).data), "who has mapped it keeps it"


@in_world
async def test_with_shared_memory_full_images_that_nobody_leases_make_room(world):
    world.blobs.max_bytes = 2 * IMAGE_BYTES
    for seed in range(4):
        world.source.adapters[f"n{seed}"] = small_adapter(seed=seed)
        lease = await right(world, f"n{seed}", seed)
        await world.settle()
        assert not isinstance(lease.image, FileImage)
        await world.store.release(lease.version, "me")
    assert (await world.store.status()).degraded == ()


def test_images_that_are_written_to_files_at_once_each_have_their_own(tmp_path, monkeypatch):
    files = ImageFiles(tmp_path)
    images = [np.full(1000, number, np.uint8) for number in range(16)]
    start = threading.Barrier(len(images))
    make = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **options: time.sleep(0.05) or make(**options))

    def put(image):
        start.wait(60)
        return files.put(image)

    with ThreadPoolExecutor(len(images)) as pool:
        handles = list(pool.map(put, images))
    assert all(np.array_equal(map_image(handle), image) for handle, image in zip(handles, images, strict=True))
    assert len(list(tmp_path.iterdir())) == 1
    files.close()
    assert list(tmp_path.iterdir()) == []


@in_world
async def test_image_files_of_a_store_that_was_killed_are_deleted_by_the_next(world):
    world.blobs.max_bytes = 0
    lease = await right(world)
    assert isinstance(lease.image, FileImage)
    await world.settle()
    world.store._tiers._files.close = lambda: None  # it dies before it gets there
    await world.restart()
    assert not Path(lease.image.path).exists()
    await right(world)


@in_world
async def test_shared_memory_that_is_full_is_told_once_and_not_with_every_image(world):
    world.blobs.max_bytes = 0
    world.source.adapters.update({f"n{seed}": small_adapter(seed=seed) for seed in range(6)})

    def told():
        return [record for record in world.log.records if "shared memory is full of" in record.getMessage()]

    for seed in range(5):
        await right(world, f"n{seed}", seed)
    assert len(told()) == 1
    world.clock.now += 60
    await right(world, "n5", 5)
    assert len(told()) == 2
