"""When a file is believed: by the best digest there is, or by two equal reads. Never is it wrong."""

import asyncio
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_store.errors import SourceUnavailable
from adapter_store.fetch.transfer import Downloader
from adapter_store.fetch.verify import MIB, DigestMismatch, EtagMemory, examine, multipart_digest, part_sizes
from adapter_store.records import StoreConfig
from adapter_store.sources.base import SourceFile
from tests.support.fake_sources import FakeClock
from tests.support.scripted_source import Fault, ScriptedSource

FILE = "adapter_config.json"
CONTENT = bytes(range(256)) * 4
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()
OTHER = "0" * 64


def download(source, expected=None, **config):
    clock = FakeClock()
    config = {"part_bytes": 100, "fetch_retries": 3, **config}
    downloader = Downloader(StoreConfig(**config), clock, clock.sleep, lambda: 1.0)
    return asyncio.run(downloader.download(source, "a", source.listing(), None, expected))


def num_times_read(source):
    return source.num_bytes / len(CONTENT)


# The ladder


@pytest.mark.parametrize(
    "known",
    [
        {"expected": {FILE: SHA256.upper()}, "etag": "?"},
        {"listed_sha256": True, "etag": "?"},
        {"sha256": SHA256, "etag": "?"},
        {"etag": f'"{MD5}"'},
        {"etag": MD5.upper()},
        {"etag": f'"{multipart_digest(CONTENT, len(CONTENT))}-1"'},
        {"expected": {FILE: SHA256}, "listed_sha256": False, "sha256": OTHER},  # our own is asked before others
    ],
)
def test_a_file_that_any_digest_confirms_is_read_once(known):
    expected = known.pop("expected", None)
    source = ScriptedSource({FILE: CONTENT}, **known)
    got = download(source, expected)
    assert got.files == source.files
    assert got.sha256 == {FILE: SHA256}
    assert num_times_read(source) == 1


@pytest.mark.parametrize("etag", ["", '"1-2-3"', 'W/"' + MD5 + '"', "0" * 32, f'"{"0" * 32}-3"', f"{MD5}-0"])
def test_a_file_that_nothing_confirms_is_read_twice(etag):
    source = ScriptedSource({FILE: CONTENT}, etag=etag)
    assert download(source).files == source.files
    assert num_times_read(source) == 2


def test_only_the_file_in_doubt_is_read_again():
    source = ScriptedSource({FILE: CONTENT, "other": CONTENT})
    download(source, part_bytes=10_000)
    assert len(source.reads) == 2
    source = ScriptedSource({FILE: CONTENT, "other": CONTENT}, [Fault("flip", 7)])
    assert download(source, part_bytes=10_000).files == source.files
    assert [file for file, _, _ in source.reads[2:]] == [source.reads[0][0]] * 2  # again, and once more to decide


def test_of_a_damaged_file_only_the_parts_that_differ_are_read_a_third_time():
    source = ScriptedSource({FILE: CONTENT}, [None, None, Fault("flip", 7)])
    assert download(source, part_bytes=100).files == source.files
    assert source.num_bytes == 2 * len(CONTENT) + 100


@pytest.mark.parametrize(("known", "is_own"), [({"expected": {FILE: OTHER}}, True), ({"sha256": OTHER}, False)])
def test_a_digest_that_two_equal_reads_contradict_is_told_with_both(known, is_own):
    expected = known.pop("expected", None)
    with pytest.raises(DigestMismatch) as caught:
        download(ScriptedSource({FILE: CONTENT}, **known), expected)
    assert caught.value.is_own == is_own
    assert SHA256 in str(caught.value)
    assert OTHER in str(caught.value)


def test_reads_of_which_no_two_agree_are_given_up_and_say_which_bytes():
    flips = [Fault("flip", at) for at in range(10)]
    with pytest.raises(SourceUnavailable, match=r"adapter 'a': .*, bytes 0 to 1023: no two of 5 reads"):
        download(ScriptedSource({FILE: CONTENT}, flips, etag="?"), part_bytes=2000)


def test_a_source_whose_etags_are_no_digests_is_told_once(caplog):
    source = ScriptedSource({FILE: CONTENT}, etag="0" * 32)
    clock = FakeClock()
    downloader = Downloader(StoreConfig(), clock, clock.sleep, lambda: 1.0)
    for _ in range(3):
        asyncio.run(downloader.download(source, "a", source.listing(), None))
    assert caplog.text.count("is no digest of its content") == 1


FAULTS = st.one_of(
    st.none(), st.builds(Fault, st.sampled_from(["reset", "short", "flip", "overload"]), st.integers(0, 1000))
)


@given(
    script=st.lists(FAULTS, max_size=25),
    etag=st.sampled_from([None, "?", "0" * 32]),
    sha256=st.sampled_from([None, SHA256]),
    expected=st.sampled_from([None, {FILE: SHA256}]),
    part_bytes=st.sampled_from([300, 600, 2000]),
)
def test_whatever_reads_break_or_lie_the_content_is_right_or_unavailable(script, etag, sha256, expected, part_bytes):
    source = ScriptedSource({FILE: CONTENT}, script, etag=etag, sha256=sha256, chunk_bytes=64)
    try:
        got = download(source, expected, part_bytes=part_bytes)
    except SourceUnavailable as error:
        told = str(error)
    else:
        told = "adapter 'a' arrived"
        assert got.files == source.files
        assert got.sha256 == {FILE: SHA256}
    assert "adapter 'a'" in told


# ETags


@given(st.integers(1, 400), st.sampled_from([5, 8, 10, 15, 16, 50, 64, 100, 128]), st.integers(-MIB + 1, 0))
def test_the_usual_part_sizes_are_found_by_the_number_of_parts(mib, part_mib, less):
    num_bytes = mib * MIB + less
    num_parts = -(-num_bytes // (part_mib * MIB))
    sizes = list(part_sizes(num_bytes, num_parts))
    assert num_parts == 1 or part_mib * MIB in sizes
    assert len(sizes) == len(set(sizes))
    assert all(-(-num_bytes // size) == num_parts for size in sizes)


@given(st.integers(1, 1 << 40), st.integers(1, 10_000))
def test_a_part_size_is_only_tried_where_it_gives_that_number_of_parts(num_bytes, num_parts):
    assert all(-(-num_bytes // size) == num_parts for size in part_sizes(num_bytes, num_parts))


def test_a_multipart_etag_is_the_digest_of_the_parts_digests():
    content = bytes(12 * MIB)
    parts = (content[: 8 * MIB], content[8 * MIB :])
    etag = hashlib.md5(b"".join(hashlib.md5(part).digest() for part in parts)).hexdigest() + "-2"
    file = SourceFile(name=FILE, etag=f'"{etag}"', num_bytes=len(content))
    assert examine(content, file).belief == "confirmed"
    assert examine(bytes([1]) + content[1:], file).belief == "doubtful"


def test_an_empty_file_is_confirmed_by_its_etag():
    for etag in (hashlib.md5(b"").hexdigest(), multipart_digest(b"", 1) + "-1"):
        assert examine(b"", SourceFile(name=FILE, etag=etag, num_bytes=0)).belief == "confirmed"


def test_what_is_remembered_of_sources_is_bounded():
    memory = EtagMemory(max_sources=3)
    assert [memory.learn(source) for source in "abca"] == [True, True, True, False]
    memory.learn("d")
    assert [source in memory for source in "abcd"] == [True, False, True, True]
    assert len(memory) == 3
