"""From a source to an image: with the digests that are known, in threads that give way, with faults told as whose."""

import asyncio
import hashlib
import os
import sys
import threading
import time

import numpy as np
import pytest

import adapter_store.fetch.fetcher
from adapter_store.errors import AdapterRejected, AdapterTooLarge, SourceUnavailable
from adapter_store.fetch.fetcher import Fetcher
from adapter_store.fetch.pacing import Pacer
from adapter_store.fetch.transfer import NUM_FAR, NUM_NEAR
from adapter_store.image.packing import pack, pack_checked
from adapter_store.image.spec import read_spec
from adapter_store.names.asking import ask
from adapter_store.names.catalog import NameKey, Version
from adapter_store.records import StoreConfig, version_digest
from adapter_store.sources.base import SourceChanged, SourceFile, SourceListing
from tests.support.fake_sources import adapter_files, small_adapter, small_config, small_spec, small_tensors
from tests.support.scripted_source import Fault, ScriptedSource
from tests.support.waiting import for_ever

SPEC = small_spec()
WEIGHTS = "adapter_model.safetensors"
OTHER = "0" * 64


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def version_of(source, listing=None):
    listing = listing or source.listing()
    return Version(version_digest(source.name, "a", listing.etags), NameKey(source.name, "a"), listing)


def fetch(source, expected=None, listing=None, **config):
    async def main():
        fetcher = Fetcher(StoreConfig(retry_base_s=0.001, **config), time.monotonic)
        try:
            return await fetcher.fetch(version_of(source, listing), source, read_spec(SPEC), expected)
        finally:
            fetcher.close()

    return asyncio.run(main())


class Remembering(ScriptedSource):
    """Remembers digests that it computed, as the source of local folders does."""

    distrusted = ()

    def distrust(self, name):
        self.distrusted = (*self.distrusted, name)


def test_a_fetch_gives_the_image_and_the_digests_to_expect_the_next_time():
    files = small_adapter()
    fetched = fetch(ScriptedSource(files, etag="no digest"))
    assert np.array_equal(fetched.packed.data, pack(files, SPEC).data)
    assert fetched.sha256 == {name: sha256(content) for name, content in files.items()}
    again = ScriptedSource(files, etag="no digest")
    fetch(again, fetched.sha256)
    assert again.num_bytes == sum(map(len, files.values()))  # read once, as the digests confirm it


def test_content_that_differs_from_the_registered_digest_is_refused_with_both():
    files = small_adapter()
    with pytest.raises(AdapterRejected) as caught:
        fetch(ScriptedSource(files), {WEIGHTS: OTHER})
    for told in ("adapter 'a'", WEIGHTS, OTHER, sha256(files[WEIGHTS])):
        assert told in str(caught.value)


def test_content_that_differs_from_what_its_source_says_is_unavailable_and_the_source_is_told():
    source = Remembering(small_adapter(), sha256=OTHER)
    with pytest.raises(SourceUnavailable, match=r"adapter 'a'.*sha256.*upload it again"):
        fetch(source)
    assert source.distrusted == ("a",)


def test_a_file_that_was_replaced_while_its_digest_was_remembered_is_another_version():
    source = Remembering(small_adapter(seed=1), listed_sha256=True)
    before = source.listing()
    source.files = small_adapter(seed=2)  # of the same sizes
    with pytest.raises(SourceChanged):
        fetch(source, listing=before)
    assert source.distrusted == ("a",)


def listing_with(source, changed, **changes):
    files = [{"name": f.name, "etag": f.etag, "num_bytes": f.num_bytes} for f in source.listing().files]
    return SourceListing(files=tuple(SourceFile(**(f | (changes if f["name"] == changed else {}))) for f in files))


@pytest.mark.parametrize(
    "damage", [{"name": "adapter_confih.json"}, {"num_bytes": 1 << 40}, {"num_bytes": 20}], ids=lambda d: str(d)
)
def test_a_damaged_listing_is_not_told_as_the_adapters_fault(damage):
    source = ScriptedSource(small_adapter())
    with pytest.raises(SourceChanged):
        fetch(source, listing=listing_with(source, "adapter_config.json", **damage))


def test_an_adapter_that_is_too_large_is_told_by_its_listing_alone():
    source = ScriptedSource(small_adapter())
    with pytest.raises(AdapterTooLarge, match="adapter 'a'"):
        fetch(source, max_adapter_bytes=100)
    assert source.reads == []


def test_an_image_that_would_be_too_large_is_told_by_the_header_alone():
    halves = {name: tensor.astype(np.float16) for name, tensor in small_tensors(rank=64).items()}
    source = ScriptedSource(adapter_files(halves, small_config(rank=64)), chunk_bytes=100)
    num_bytes = len(source.files[WEIGHTS])
    with pytest.raises(AdapterTooLarge, match="adapter 'a': its image"):
        fetch(source, max_adapter_bytes=num_bytes, part_bytes=100)
    assert source.num_bytes < num_bytes / 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness of threads")
def test_packing_gives_way_to_everybody_else(monkeypatch):
    seen = []

    def spy(*arguments):
        seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return pack_checked(*arguments)

    monkeypatch.setattr(adapter_store.fetch.fetcher, "pack_checked", spy)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    fetch(ScriptedSource(small_adapter()), niceness=19)
    assert seen == [19]
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_every_byte_that_is_read_counts_for_the_rate(monkeypatch):
    paced = []
    monkeypatch.setattr(Pacer, "wait", lambda self, num_bytes, stopped: paced.append(num_bytes))
    source = ScriptedSource(small_adapter(), [None, Fault("flip", 600)], chunk_bytes=100)
    fetch(source, part_bytes=500)
    assert sum(paced) == source.num_bytes > sum(map(len, source.files.values()))


def test_a_source_that_hangs_keeps_nobody_from_another():
    hanging = ScriptedSource(small_adapter(), [Fault("hang")] * 100, name="hanging")
    healthy = ScriptedSource(small_adapter())

    async def main():
        fetcher = Fetcher(StoreConfig(max_parallel_fetches=2), time.monotonic)
        spec = read_spec(SPEC)
        stuck = [asyncio.create_task(fetcher.fetch(version_of(hanging), hanging, spec)) for _ in range(5)]
        await asyncio.sleep(0)
        fetched = await fetcher.fetch(version_of(healthy), healthy, spec)
        assert not any(task.done() for task in stuck)
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
        fetcher.close()
        return fetched

    assert np.array_equal(asyncio.run(main()).packed.data, pack(healthy.files, SPEC).data)
    assert hanging.most_running <= 4  # the header and the configuration of two


@pytest.mark.parametrize(("kind", "most"), [("local", NUM_NEAR), ("http", NUM_FAR)])
def test_more_adapters_are_fetched_at_a_time_from_a_source_that_is_far_away(kind, most):
    source = ScriptedSource(small_adapter(), [Fault("hang")] * 100)
    source.kind = kind
    begun = []

    async def main():
        fetcher = Fetcher(StoreConfig(), time.monotonic)
        real = fetcher._download
        fetcher._download = lambda *call: begun.append(call) or real(*call)
        tasks = [asyncio.create_task(fetcher.fetch(version_of(source), source, read_spec(SPEC))) for _ in range(40)]
        for _ in range(20):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        fetcher.close()

    asyncio.run(main())
    assert len(begun) == most


def test_an_answer_that_breaks_its_sources_parser_is_a_source_out_of_order():
    class Parsing(ScriptedSource):
        async def read(self, name, file, part):
            raise ValueError("Invalid timestamp")

    with pytest.raises(SourceUnavailable, match=r"adapter 'a'.*cannot be read \(ValueError: Invalid timestamp\)"):
        fetch(Parsing(small_adapter()), fetch_retries=1)


class Unlisted(ScriptedSource):
    """Cannot be asked what it has."""

    error = None

    async def stat(self, name):
        if self.error is None:
            await for_ever()
        raise self.error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SourceUnavailable("scripted", "no route to host"), "no route to host"),
        (KeyError("ETag"), r"its answer cannot be read \(KeyError: 'ETag'\)"),
        (None, "no answer within stat_timeout_s=0.05"),
    ],
)
def test_a_source_that_cannot_be_asked_is_told_with_the_adapter(error, told):
    source = Unlisted(small_adapter(use_dora=True))
    source.error = error
    with pytest.raises(SourceUnavailable, match=rf"adapter 'a': {told}"):
        asyncio.run(ask(source, "a", 0.05))
    with pytest.raises(SourceUnavailable, match=rf"adapter 'a': {told}"):
        fetch(source, stat_timeout_s=0.05)  # it would be refused, if the listing could be made sure of


def test_a_source_that_goes_down_after_the_last_byte_takes_nothing_from_what_was_read():
    source = Unlisted(small_adapter())
    source.error = SourceUnavailable("scripted", "no route to host")
    assert np.array_equal(fetch(source).packed.data, pack(source.files, SPEC).data)
