"""The index is opened, never loaded; what is written is found again; what is broken is set aside."""

import asyncio
import sqlite3
import tracemalloc
from pathlib import Path

import pytest

from adapter_store.names.catalog import ImageKey, NameKey
from adapter_store.names.database import BATCH_ROWS, IndexUnavailable
from adapter_store.names.images import ImageRow
from adapter_store.names.index import Index, Known
from adapter_store.records import Registration
from adapter_store.sources.base import SourceFile, SourceListing
from tests.support.store_world import DIGEST, SPEC, World


def rows(number, start=0):
    names = [f"team{n % 97}/adapter-{n:07}" for n in range(start, number)]
    return [Registration(name=name, source="fake", location="a") for name in names]


def traced(index):
    """Every SQL statement that is run from now on."""
    statements = []
    for connection in {index.database._reader, index.database._writer}:
        connection.set_trace_callback(statements.append)
    return statements


def with_index(test):
    """Runs an async test twice: with an index in memory, and in a file."""

    def run(place, tmp_path):
        async def main():
            index = Index(tmp_path / "index.sqlite" if place == "file" else None)
            try:
                await test(index)
            finally:
                index.database.close()

        asyncio.run(main())

    run.__name__ = test.__name__
    return pytest.mark.parametrize("place", ["memory", "file"])(run)


@with_index
async def test_a_row_is_found_as_it_was_written(index):
    row = Registration(name="x", source="s", location="y", urls=(("f", "https://h/é"),), sha256=(("f", "0" * 64),))
    await index.register([row])
    assert await index.registered("x") == row
    assert await index.registered("y") is None


@with_index
async def test_rows_are_counted_as_they_come_and_go(index):
    await index.register(rows(10))
    await index.register(rows(12, start=5))
    assert await index.num_registered() == 12
    assert len(await index.unregister([row.name for row in rows(20, start=8)])) == 4
    assert await index.num_registered() == 8


@with_index
async def test_a_listing_by_pages_has_every_name_once_and_in_order(index):
    await index.register(rows(50))
    seen, after = [], None
    while page := await index.list_registered(after, 7):
        seen += page
        after = page[-1]
    assert seen == sorted(row.name for row in rows(50))


@with_index
async def test_versions_images_traffic_and_pins_are_found_again(index):
    key, image = NameKey("s", "n"), ImageKey("v", "d")
    listing = SourceListing(files=(SourceFile(name="f", etag="e", num_bytes=3, location="l"),), origin="o")
    known = Known("v", listing, {"f": "1"}, 12.5)
    await index.remember(key, known)
    assert await index.known(key) == known
    await index.checked([(key, 20.0)])
    assert (await index.known(key)).checked_at == 20.0
    await index.forget([key])
    assert await index.known(key) is None
    row = ImageRow(key=image, object="0" * 64, num_bytes=5, rank=2, cost_s=0.5, uses=1)
    await index.add_image(row, {"entries": [1]})
    await index.used([(image, 7)])
    found, manifest = await index.image(image)
    assert (found.uses, manifest) == (7, {"entries": [1]})
    assert [row.key for _, row in await index.images(0, 10)] == [image]
    await index.drop_images([image])
    assert await index.image(image) is None
    await index.set_traffic([(key, 2.0, 5.0), (NameKey("s", "old"), 1.0, 1.0)], before=3.0)
    assert await index.traffic(10) == ((key, 2.0, 5.0),)
    await index.set_pin(key, True)
    await index.set_pin(key, True)
    assert await index.pins() == (key,)
    await index.set_pin(key, False)
    assert await index.pins() == ()


LOOK_UPS = {
    "registered": lambda index: index.registered("x"),
    "num_registered": lambda index: index.num_registered(),
    "known": lambda index: index.known(NameKey("s", "n")),
    "image": lambda index: index.image(ImageKey("v", "d")),
    "page": lambda index: index.list_registered("x", 10),
    "stock": lambda index: index.images(0, 10),
}


@pytest.mark.parametrize("look_up", LOOK_UPS.values(), ids=LOOK_UPS)
def test_a_look_up_is_one_statement_by_primary_key(look_up):
    async def main():
        index = Index(None)
        statements = traced(index)
        await look_up(index)
        selects = [statement for statement in statements if statement.startswith("SELECT")]
        assert len(selects) == 1
        plan = index.database._reader.execute(f"EXPLAIN QUERY PLAN {selects[0]}").fetchall()
        index.database.close()
        return [row[3] for row in plan]

    (step,) = asyncio.run(main())
    assert step.startswith("SEARCH")
    assert "PRIMARY KEY" in step or "sqlite_autoindex" in step


def cost_of_start_and_request(folder, number):
    """(statements of start and one request, bytes that Python keeps of them) with so many registered rows."""

    async def main():
        filling = Index(folder / "index.sqlite")
        await filling.register(rows(number))
        filling.database.close()
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        world = World(disk_path=str(folder))
        statements = traced(world.store._tiers.index)
        await world.store.register_spec(SPEC)
        await world.store.acquire(rows(1)[0].name, DIGEST, "me")
        kept = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        await world.settle()
        assert (await world.store.status()).num_registered == number
        await world.store.close()
        return sorted(statement.split(" VALUES")[0][:60] for statement in statements if "BEGIN" not in statement), kept

    return asyncio.run(main())


def test_start_and_a_request_cost_the_same_however_many_names_are_registered(tmp_path):
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    few, few_bytes = cost_of_start_and_request(tmp_path / "few", 10)
    many, many_bytes = cost_of_start_and_request(tmp_path / "many", 50_000)
    selects = [[statement for statement in all_of if statement.startswith("SELECT")] for all_of in (few, many)]
    assert selects[0] == selects[1]
    assert many_bytes < few_bytes + 1_000_000, "20 bytes a row would show"


def test_a_look_up_waits_for_no_more_than_a_batch_of_a_bulk_registration():
    async def main():
        index = Index(None)  # with one thread for both: the hardest case
        await index.register(rows(1))
        order = []
        bulk = asyncio.create_task(index.register(rows(5 * BATCH_ROWS)))
        bulk.add_done_callback(lambda _: order.append("bulk"))
        await asyncio.sleep(0)
        assert await index.registered(rows(1)[0].name) is not None
        order.append("look-up")
        await bulk
        index.database.close()
        return order

    assert asyncio.run(main()) == ["look-up", "bulk"]


@pytest.mark.parametrize("harm", ["schema", "noise", "page"])
def test_an_index_that_cannot_be_used_is_kept_aside_and_a_new_one_begun(harm, tmp_path, caplog):
    path = tmp_path / "index.sqlite"

    async def main():
        index = Index(path)
        await index.register(rows(2_000))
        index.database.close()
        if harm == "schema":
            connection = sqlite3.connect(path)
            connection.execute("PRAGMA user_version = 99")
            connection.close()
        else:
            content = bytearray(path.read_bytes())
            start = 0 if harm == "noise" else 8192
            content[start : len(content) - start] = b"\xff" * (len(content) - 2 * start)
            path.write_bytes(content)
        index = Index(path)
        if harm == "page":  # found when the page is read
            with pytest.raises(IndexUnavailable):
                await asyncio.gather(*(index.registered(row.name) for row in rows(2_000)))
        assert await index.num_registered() == 0
        await index.register(rows(3))
        assert await index.num_registered() == 3
        index.database.close()

    asyncio.run(main())
    assert len([path for path in tmp_path.glob("*.broken-*") if path.name[-1].isdigit()]) == 1
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1


def test_a_broken_index_that_another_store_has_open_is_left_alone(tmp_path):
    path = tmp_path / "index.sqlite"
    path.write_bytes(b"noise" * 1000)

    async def main():
        index = Index(path, may_replace=False)
        assert not index.database.is_writable
        with pytest.raises(IndexUnavailable):
            await index.register(rows(1))
        assert await index.database.reopen(may_replace=True)
        await index.register(rows(1))
        index.database.close()

    asyncio.run(main())


def test_while_the_index_cannot_be_written_registered_names_are_still_known(tmp_path, monkeypatch, caplog):
    path = tmp_path / "index.sqlite"

    async def main():
        index = Index(path)
        await index.register(rows(3))
        index.database.close()
        real = sqlite3.connect

        def connect(name, **options):
            if "immutable" not in name and ":memory:" not in name:
                raise sqlite3.OperationalError("attempt to write a readonly database")
            return real(name, **options)

        monkeypatch.setattr(sqlite3, "connect", connect)
        index = Index(path)
        assert await index.registered(rows(1)[0].name) is not None
        with pytest.raises(IndexUnavailable):
            await index.unregister(["x"])
        num_files = len(list(Path("/proc/self/fd").iterdir()))
        for _ in range(20):
            assert not await index.database.reopen(may_replace=True)
        assert len(list(Path("/proc/self/fd").iterdir())) == num_files
        assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
        assert await index.registered(rows(1)[0].name) is not None
        monkeypatch.undo()
        assert await index.database.reopen(may_replace=True)
        await index.register(rows(4))
        assert await index.num_registered() == 4
        index.database.close()

    asyncio.run(main())
