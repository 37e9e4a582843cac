"""A download: in parts, refused early, gone on with where it broke, and never longer than its time."""

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_store.errors import AdapterRejected, SourceUnavailable
from adapter_store.fetch.parts import is_overload, split
from adapter_store.fetch.transfer import Downloader
from adapter_store.image.packing import plan_image
from adapter_store.image.spec import read_spec
from adapter_store.records import StoreConfig
from adapter_store.sources.base import ReadCancelled
from tests.support.fake_sources import FakeClock, small_adapter, small_config, small_spec
from tests.support.scripted_source import Fault, ScriptedSource
from tests.support.waiting import happened

SPEC = read_spec(small_spec())
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RESET = Fault("reset")


def checker(source):
    def check_header(files):
        plan_image(files, SPEC, None, len(source.files[WEIGHTS]))

    return check_header


def download(source, name="a", *, real_time=False, expected=None, **config):
    clock = FakeClock()
    timing = {} if real_time else {"clock": clock, "sleep": clock.sleep, "jitter": lambda: 1.0}
    downloader = Downloader(StoreConfig(**config), **timing)
    return asyncio.run(downloader.download(source, name, source.listing(), checker(source), expected))


def refusal(source, error=SourceUnavailable, **config):
    with pytest.raises(error) as caught:
        download(source, **config)
    return str(caught.value)


# Parts


@given(st.integers(0, 500), st.integers(0, 500), st.integers(1, 70))
def test_parts_cover_a_range_once_and_end_at_multiples_of_their_size(start, more, part_bytes):
    parts = split(start, start + more, part_bytes)
    assert [byte for begin, end in parts for byte in range(begin, end)] == list(range(start, start + more))
    assert all(0 < end - begin <= part_bytes for begin, end in parts)
    assert all(end % part_bytes == 0 for _, end in parts[:-1])


def test_an_adapter_arrives_whole_in_parts_of_which_so_many_run_at_a_time():
    source = ScriptedSource(small_adapter(), chunk_bytes=50)
    got = download(source, part_bytes=100, max_parallel_parts=3)
    assert got.files == source.files
    assert source.most_running == 3
    asked = [(file, first) for file, first, _ in source.reads]
    assert sorted(asked) == [
        (file, first) for file, content in sorted(source.files.items()) for first in range(0, len(content), 100)
    ]


# Refusing early


def large_adapter(num_bytes, rank=2):
    """Files whose header promises `num_bytes` of weights, which are zeros."""
    names = [f"base_model.model.{name}.lora_{side}.weight" for name in SPEC.sites for side in "AB"]
    each = num_bytes // len(names) // 4
    entries = {
        name: {"dtype": "F32", "shape": [each], "data_offsets": [4 * each * index, 4 * each * (index + 1)]}
        for index, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(4 * each * len(names))
    return {CONFIG: json.dumps(small_config(rank)).encode(), WEIGHTS: weights}


def test_a_large_adapter_that_is_refused_costs_less_than_two_parts():
    source = ScriptedSource(large_adapter(64 << 20), etag="no digest")
    message = refusal(source, AdapterRejected)
    assert "lora_A.weight' has shape" in message
    assert source.num_bytes < 2 * StoreConfig().part_bytes


def test_nothing_of_the_body_is_asked_for_before_the_configuration_was_accepted():
    files = small_adapter(use_dora=True)
    source = ScriptedSource(files, chunk_bytes=10)
    assert "use_dora" in refusal(source, AdapterRejected, part_bytes=100)
    header_bytes = 8 + int.from_bytes(files[WEIGHTS][:8], "little")
    assert max(first for file, first, _ in source.reads if file == WEIGHTS) < header_bytes + 100


@pytest.mark.parametrize("at", [0, 3, 6, 7, 8, 20, 200])
@pytest.mark.parametrize("etag", [None, "no digest"])
def test_a_header_damaged_on_the_way_does_not_refuse_the_adapter(at, etag):
    files = small_adapter()
    # Of the two first reads one is the configuration's, the other the header's.
    for script in ([Fault("flip", at)], [None, Fault("flip", at)]):
        assert download(ScriptedSource(files, script, etag=etag), part_bytes=2000).files == files


def test_a_damaged_header_costs_its_own_bytes_again_and_not_the_body():
    files = small_adapter(rank=16)
    source = ScriptedSource(files, [None, Fault("flip", 20)])  # the first read is the configuration's
    assert download(source, part_bytes=500).files == files
    header_bytes = 8 + int.from_bytes(files[WEIGHTS][:8], "little")
    assert source.num_bytes == sum(map(len, files.values())) + header_bytes + 500  # the damaged part a third time


# Breaking


def test_a_broken_part_goes_on_behind_its_last_byte():
    source = ScriptedSource(small_adapter(), [None, Fault("reset", 70), Fault("short", 20)], chunk_bytes=10)
    download(source, part_bytes=100_000)
    weights = [(first, written) for file, first, written in source.reads if file == WEIGHTS]
    assert weights == [(0, 70), (70, 20), (90, len(source.files[WEIGHTS]) - 90)]


def test_a_part_that_gains_bytes_with_every_try_is_never_given_up():
    source = ScriptedSource(small_adapter(), [None, *repeat(Fault("reset", 1), 50)], chunk_bytes=10)
    assert download(source, part_bytes=100_000, fetch_retries=1, retry_base_s=0.01).files == source.files


def test_a_part_that_gains_nothing_is_given_up_after_its_retries_and_tells_where():
    files = small_adapter()
    source = ScriptedSource(files, [None, Fault("reset", 40), *repeat(RESET, 10)], chunk_bytes=10)
    message = refusal(source, part_bytes=100_000, fetch_retries=2)
    assert len(source.reads) == 1 + 1 + 3
    for told in ("'scripted'", "adapter 'a'", f"{WEIGHTS}, byte 40 of {len(files[WEIGHTS])}", "connection reset"):
        assert told in message


def test_pauses_grow_and_restart_after_progress():
    clock = FakeClock()
    script = [None, RESET, RESET, Fault("reset", 10), RESET, RESET]
    source = ScriptedSource(small_adapter(), script, chunk_bytes=10)
    config = StoreConfig(retry_base_s=0.2, part_bytes=100_000)
    downloader = Downloader(config, clock, clock.sleep, lambda: 0.5)
    asyncio.run(downloader.download(source, "a", source.listing(), checker(source)))
    assert clock.slept == [0.1, 0.2, 0.1, 0.1, 0.2]


def test_no_try_begins_after_the_time_is_over():
    source = ScriptedSource(small_adapter(), repeat(RESET), chunk_bytes=10)
    message = refusal(source, part_bytes=100_000, fetch_retries=100, retry_base_s=1.0, fetch_timeout_s=10.0)
    assert "fetch_timeout_s=10" in message


def test_a_source_that_hangs_ends_with_the_time_and_tells_how_far_it_came():
    source = ScriptedSource(small_adapter(), [None, Fault("hang", 30)], chunk_bytes=10)
    message = refusal(source, part_bytes=100_000, fetch_timeout_s=0.05)
    for told in ("fetch_timeout_s=0.05", "adapter 'a'", f"30 of {len(source.files[WEIGHTS])} bytes of {WEIGHTS}"):
        assert told in message
    assert source.num_running == 0


class ThreadedSource(ScriptedSource):
    """Reads in a thread of its own, which waits for `go_on` before each byte after the first `free` bytes."""

    go_on = threading.Event()
    ended = None

    async def read(self, name, file, part):
        with_gate = file.name == WEIGHTS
        pool = ThreadPoolExecutor(1)
        try:
            await asyncio.get_running_loop().run_in_executor(pool, self._read, file, part, with_gate)
        finally:
            pool.shutdown(wait=False)

    def _read(self, file, part, with_gate):
        try:
            for byte in self.files[file.name][part.start + part.num_received : part.end]:
                if with_gate and part.num_received >= 30:
                    happened(self.go_on, "the test to let the read go on")
                part.write(bytes([byte]))
        except ReadCancelled:
            self.ended.set()
            raise


def test_a_read_that_hangs_in_a_thread_is_not_waited_for_and_ends_with_its_next_byte():
    source = ThreadedSource(small_adapter())
    source.go_on, source.ended = threading.Event(), threading.Event()
    refusal(source, part_bytes=100_000, fetch_timeout_s=0.1, real_time=True)  # returns while the thread hangs
    assert not source.ended.is_set()
    source.go_on.set()
    happened(source.ended, "the end of the read")


def test_a_server_that_drips_ends_with_the_time():
    class Dripping(ScriptedSource):
        async def read(self, name, file, part):
            for byte in self.files[file.name][part.start + part.num_received : part.end]:
                part.write(bytes([byte]))
                await asyncio.sleep(0.005)

    message = refusal(Dripping(small_adapter()), fetch_timeout_s=0.05, real_time=True)
    assert "fetch_timeout_s=0.05" in message


# Overload


@pytest.mark.parametrize(
    ("reason", "is_one"),
    [
        ("Please reduce your request rate (SlowDown)", True),
        ("Service Unavailable (503)", True),
        ("HTTP 429 Too Many Requests", True),
        ("Rate exceeded (ThrottlingException)", True),
        ("the bucket does not exist (NoSuchBucket)", False),
        ("ended after 5031 of 8000 bytes", False),
    ],
)
def test_overload_is_told_from_other_failures(reason, is_one):
    assert is_overload(SourceUnavailable("s", reason)) == is_one


def test_a_source_that_is_overloaded_is_read_with_fewer_parts_at_once_by_all_downloads():
    clock = FakeClock()
    config = StoreConfig(part_bytes=200, max_parallel_parts=8, max_parallel_fetches=4, fetch_retries=9)
    downloader = Downloader(config, clock, clock.sleep, lambda: 1.0)
    overloaded = ScriptedSource(small_adapter(), repeat(Fault("overload"), 8), chunk_bytes=50)
    healthy = ScriptedSource(small_adapter(), chunk_bytes=50, name="healthy")

    async def two_at_once(source):
        source.most_running = 0
        one = (source, "a", source.listing(), checker(source))
        await asyncio.gather(downloader.download(*one), downloader.download(*one))
        return source.most_running

    async def main():
        await downloader.download(overloaded, "a", overloaded.listing(), checker(overloaded))
        return await two_at_once(overloaded), await two_at_once(healthy)

    of_overloaded, of_healthy = asyncio.run(main())
    assert of_healthy > 8 >= of_overloaded
