"""Explicit rows of the catalog: found first, served from where they point, refused by name when they never could be."""

import asyncio
import hashlib

import numpy as np
import pytest

from adapter_store.errors import AdapterNotFound, AdapterRejected, RegistrationInvalid, SourceUnavailable
from adapter_store.image.packing import pack
from adapter_store.names.index import Index
from adapter_store.names.registered import CatalogSource, check_rows
from adapter_store.records import Registration
from adapter_store.sources.base import SourceFile, SourceListing
from adapter_store.tiers.host import LOOK_S
from tests.support.fake_sources import FakeSource, small_adapter
from tests.support.store_world import SPEC, World, in_loop, turns

FILES = ("adapter_config.json", "adapter_model.safetensors")
GOOD = "0" * 64


class WebSource(FakeSource):
    """Reads adapters by the paths of their URLs."""

    kind = "http"

    def __init__(self, name="web"):
        super().__init__({}, name)
        self.bodies = {}  # path -> content
        self.read_urls = []

    def check_url(self, url):
        if not url.startswith("https://host:8443/"):
            raise AdapterRejected(f"{url} is not at https://host:8443")

    async def stat_urls(self, urls):
        self.stats.append(urls)
        bodies = {file: self.bodies[url.partition("?")[0]] for file, url in urls.items()}
        files = [
            SourceFile(name=file, etag=hashlib.md5(body).hexdigest(), num_bytes=len(body), location=urls[file])
            for file, body in sorted(bodies.items())
        ]
        return SourceListing(files=tuple(files))

    async def read(self, name, file, part):
        self.read_urls.append(file.location)
        part.write(self.bodies[file.location.partition("?")[0]][part.start : part.end])

    def urls_of(self, folder, query=""):
        return tuple((file, f"https://host:8443/{folder}/{file}{query}") for file in FILES)

    def upload(self, folder, seed):
        for (_, url), body in zip(self.urls_of(folder), small_adapter(seed=seed).values(), strict=True):
            self.bodies[url] = body


async def right(world, name, seed):
    lease = await world.acquire(name)
    assert np.array_equal(world.bytes_of(lease), pack(small_adapter(seed=seed), SPEC).data)
    assert lease.name == name
    return lease


def with_web(test):
    async def main():
        web = WebSource()
        world = World(FakeSource({"a": small_adapter(seed=1), "b": small_adapter(seed=2)}), web)
        await world.store.register_spec(SPEC)
        await test(world, web)
        world.store.check_invariants()
        await world.store.close()

    def run():
        asyncio.run(main())

    return run


@in_loop()
async def test_a_registered_name_stands_for_the_adapter_it_points_to_and_comes_before_the_sources(world):
    await right(world, "a", 1)
    with pytest.raises(AdapterNotFound):
        await world.acquire("x")
    await world.store.register(
        (
            Registration(name="x", source="fake", location="b"),
            Registration(name="a", source="fake", location="b"),
            Registration(name="b", source="fake"),
        )
    )
    assert (await right(world, "x", 2)).source == "catalog"
    await right(world, "a", 2)
    await right(world, "b", 2)
    assert (await world.store.status()).num_registered == 3
    assert (await world.acquire("a", source="fake")).source == "fake"


@in_loop()
async def test_a_registered_name_without_its_adapter_never_stands_for_another_one_of_that_name(world):
    await right(world, "a", 1)
    await world.store.register((Registration(name="a", source="fake", location="missing"),))
    for _ in range(2):
        with pytest.raises(AdapterNotFound, match="catalog"):
            await world.acquire("a")
    assert world.source.stats.count("missing") == 1
    world.source.adapters["missing"] = small_adapter(seed=5)
    world.clock.now += world.store.config.missing_ttl_s
    await right(world, "a", 5)
    await world.store.unregister(("a",))
    await right(world, "a", 1)


@in_loop()
async def test_what_is_registered_while_the_source_is_down_never_stands_for_what_it_replaced(world):
    await right(world, "a", 1)
    await world.store.register((Registration(name="r", source="fake", location="a"),))
    await right(world, "r", 1)
    world.source.down = "no route to host"
    rows = [Registration(name=name, source="fake", location="b") for name in ("a", "r")]
    await world.store.register(tuple(rows))
    for name in ("a", "r"):
        with pytest.raises(SourceUnavailable):
            await world.acquire(name)
    world.source.down = None
    for name in ("a", "r"):
        await right(world, name, 2)
    world.source.down = "no route to host"
    await world.store.register(tuple(rows))
    for name in ("a", "r"):
        await right(world, name, 2)


@in_loop()
async def test_registering_again_moves_the_name_at_once_and_twice_the_same_is_as_once(world):
    for _ in range(2):
        await world.store.register((Registration(name="x", source="fake", location="a"),))
    first = await right(world, "x", 1)
    await world.store.register((Registration(name="x", source="fake", location="b"),))
    second = await right(world, "x", 2)
    assert first.version != second.version
    assert (await world.store.status()).num_registered == 1


@in_loop()
async def test_an_unregistered_name_is_not_found_from_then_on_and_running_leases_keep_their_version(world):
    await world.store.register((Registration(name="x", source="fake", location="a"),))
    lease = await right(world, "x", 1)
    assert await world.store.unregister(("x", "never")) == ("x",)
    with pytest.raises(AdapterNotFound):
        await world.acquire("x")
    assert await world.store.heartbeat("me", (lease.version,)) == ()
    assert (await world.acquire("x", version=lease.version)).image == lease.image
    await world.store.release(lease.version, "me")
    assert lease.image not in world.blobs.arrays
    assert await world.store.unregister(("x",)) == ()


@in_loop()
async def test_a_name_that_is_unregistered_while_its_source_is_asked_does_not_come_back(world):
    await world.store.register((Registration(name="x", source="fake", location="a"),))
    asking = asyncio.create_task(world.acquire("x"))
    await turns(3)
    await world.store.unregister(("x",))
    await asyncio.gather(asking, return_exceptions=True)
    with pytest.raises(AdapterNotFound):
        await world.acquire("x")


@in_loop(refresh_s=0)
async def test_a_registered_adapter_that_is_uploaded_again_is_another_version(world):
    await world.store.register((Registration(name="x", source="fake", location="a"),))
    await right(world, "x", 1)
    world.source.adapters["a"] = small_adapter(seed=9)
    await right(world, "x", 9)


@in_loop()
async def test_files_that_are_not_what_their_row_says_are_refused(world):
    true = tuple((file, hashlib.sha256(body).hexdigest()) for file, body in small_adapter(seed=1).items())
    await world.store.register(
        (
            Registration(name="x", source="fake", location="a", sha256=true),
            Registration(name="y", source="fake", location="a", sha256=((FILES[1], GOOD),)),
        )
    )
    await right(world, "x", 1)
    with pytest.raises(AdapterRejected, match="sha256") as caught:
        await world.acquire("y")
    assert caught.value.name == "y"


@in_loop()
async def test_a_listing_begins_with_registered_names(world):
    rows = tuple(Registration(name=f"r{number}", source="fake", location="a") for number in range(5))
    await world.store.register(rows)
    names, cursor = [], None
    while True:
        page = await world.store.list_adapters(cursor, 2)
        assert len(page.records) <= 2
        names += [record.name for record in page.records]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert names == ["r0", "r1", "r2", "r3", "r4", "a", "b"]


@with_web
async def test_an_adapter_registered_by_urls_is_read_from_them(world, web):
    web.upload("elsewhere", 5)
    await world.store.register((Registration(name="x", source="web", urls=web.urls_of("elsewhere")),))
    await right(world, "x", 5)


@with_web
async def test_a_new_signature_of_the_same_url_is_used_and_is_no_new_version(world, web):
    web.upload("f", 5)
    versions = set()
    for number in range(2):
        query = f"?X-Amz-Signature={number}&X-Amz-Date={number}&part=1"
        await world.store.register((Registration(name="x", source="web", urls=web.urls_of("f", query)),))
        versions.add((await right(world, "x", 5)).version)
        for image in list(world.blobs.arrays):
            world.blobs.lost.add(image)
        world.clock.now += LOOK_S
    assert len(versions) == 1
    await right(world, "x", 5)
    assert all("Signature=1" in url for url in web.read_urls[-2:])
    other = Registration(name="x", source="web", urls=web.urls_of("f", "?X-Amz-Signature=1&part=2"))
    await world.store.register((other,))
    assert (await right(world, "x", 5)).version not in versions


@with_web
async def test_a_refusal_by_the_source_of_the_urls_names_the_registered_adapter(world, web):
    web.upload("f", 5)
    await world.store.register((Registration(name="x", source="web", urls=web.urls_of("f")),))

    async def refuse(urls):
        raise AdapterRejected("not at my host")

    web.stat_urls = refuse
    with pytest.raises(AdapterRejected, match="'x' was refused: not at my host"):
        await world.acquire("x")


WEB = WebSource()
OTHER = WEB.urls_of("f")
BAD_ROWS = [
    (Registration(name="../x", source="fake"), "'..' is not allowed"),
    (Registration(name="x" * 201, source="fake"), "201 characters"),
    (Registration(name="x", source="nowhere"), "no source is named 'nowhere'; configured: fake, web"),
    (Registration(name="x", source="catalog"), "no source is named 'catalog'"),
    (Registration(name="x", source="fake", location="../b"), "location"),
    (Registration(name="x", source="fake", location="b" * 500), "400 characters"),
    (Registration(name="x", source="fake", sha256=((FILES[0], "abc"),)), "64 lower-case"),
    (Registration(name="x", source="fake", sha256=(("other.bin", GOOD),)), "other.bin"),
    (Registration(name="x", source="fake", urls=OTHER), "only an http source"),
    (Registration(name="x", source="web", urls=OTHER, location="b"), "one of them"),
    (Registration(name="x", source="web", urls=OTHER[:1]), "one for each of"),
    (
        Registration(name="x", source="web", urls=(OTHER[0], (FILES[1], "https://evil:8443/f"))),
        "is not at https://host",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_row_that_can_never_be_served_is_refused_by_name_and_nothing_is_written(row, reason):
    async def main():
        world = World(FakeSource({"a": small_adapter()}), WebSource())
        good = Registration(name="good", source="fake", location="a")
        with pytest.raises(RegistrationInvalid, match=reason) as caught:
            await world.store.register((good, row, good))
        assert caught.value.name == row.name
        assert (await world.store.status()).num_registered == 0
        await world.store.close()

    asyncio.run(main())


def test_more_rows_than_a_call_may_have_are_refused():
    with pytest.raises(RegistrationInvalid, match="100000"):
        check_rows([Registration(name="x", source="s")] * 100_001, {"s": FakeSource()})


def test_a_row_of_a_source_that_is_no_longer_configured_is_told_by_both_names(tmp_path):
    async def main():
        first = World(FakeSource({"a": small_adapter()}, "gone"), disk_path=str(tmp_path))
        await first.store.register((Registration(name="x", source="gone", location="a"),))
        await first.store.close()
        world = World(disk_path=str(tmp_path))
        await world.store.register_spec(SPEC)
        with pytest.raises(SourceUnavailable, match="'x' is registered in 'gone'"):
            await world.acquire("x")
        await world.acquire("a")
        await world.store.close()

    asyncio.run(main())


def test_registered_names_survive_a_change_of_the_settings_and_a_second_store(tmp_path):
    async def main():
        first = World(disk_path=str(tmp_path), host_bytes=100_000)
        await first.store.register((Registration(name="x", source="fake", location="b"),))
        second = World(disk_path=str(tmp_path), host_bytes=50_000)
        await second.store.register_spec(SPEC)
        await right(second, "x", 2)
        assert await second.store.unregister(("x",)) == ("x",)
        assert (await first.store.status()).num_registered == 0
        await first.store.close()
        await second.store.close()

    asyncio.run(main())


def test_a_source_is_told_when_its_digests_are_not_to_be_trusted():
    class Remembering(FakeSource):
        def __init__(self):
            super().__init__({"a": small_adapter()})
            self.distrusted = []

        def distrust(self, name):
            self.distrusted.append(name)

    async def main():
        index, source = Index(None), Remembering()
        catalog = CatalogSource(index, [source])
        await index.register([Registration(name="x", source="fake", location="a")])
        assert await catalog.stat("x") is not None
        catalog.distrust("x")
        catalog.distrust("unknown")
        assert source.distrusted == ["a"]
        index.database.close()

    asyncio.run(main())
