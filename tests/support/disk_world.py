"""A World with a disk tier."""

import asyncio

import numpy as np

from adapter_store.image.packing import pack
from tests.support.fake_sources import small_adapter
from tests.support.store_world import SPEC, World


async def play(world, test):
    """Runs an async test; at its end the store's parts must agree."""
    await world.store.register_spec(SPEC)
    await test(world)
    await world.settle()
    world.store.check_invariants()
    await world.store.close()


def in_world(test):
    """Runs an async test with a World whose disk tier is in `tmp_path`; at its end the store's parts must agree."""

    def run(tmp_path, monkeypatch, caplog):
        async def main():
            world = World(disk_path=str(tmp_path / "disk"), refresh_s=10.0)
            world.monkeypatch, world.folder, world.log = monkeypatch, tmp_path / "disk", caplog
            await play(world, test)

        asyncio.run(main())

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    return run


def files_of(world):
    return sorted(path for path in (world.folder / "objects").rglob("*") if path.is_file())


async def right(world, name="a", seed=1, **more):
    """Acquires, and compares what is served with the packed true files."""
    lease = await world.acquire(name, **more)
    assert np.array_equal(world.bytes_of(lease), pack(small_adapter(seed=seed), SPEC).data)
    return lease
