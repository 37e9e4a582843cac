"""Images in pages: where tensors lie, how they are copied there, and how fast."""

from __future__ import annotations

import itertools
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.lora.copier import Copier, HostPages, Pacer
from engine.lora.pages import MAX_GAP_BYTES, cut_chunks, lay_out
from engine.lora.storage import PagedStorage
from tests.support.lora_images import linear_sites, pack, random_weights, spec_of
from tests.support.waiting import until

PAGE = 128

widths = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(widths=widths, rank=st.integers(1, 5), staging=st.sampled_from((64, 100, 1000)), data=st.data())
def test_every_tensor_lies_whole_in_neighbouring_pages_and_arrives_there(
    widths: list[tuple[int, int]], rank: int, staging: int, data: st.DataObject
) -> None:
    sites = linear_sites(*widths)
    weights = random_weights(sites, rank, seed=1)
    image = pack("k", spec_of(sites), weights)
    layout = lay_out(image.manifest, PAGE)
    assert list(layout.runs) == sorted(layout.runs, reverse=True)
    num_pages = sum(layout.runs)
    # Runs in any order, side by side or with gaps between them; what lies in between must not be touched.
    order = data.draw(st.permutations(range(len(layout.runs))))
    starts, page = {}, 1
    for run in order:
        starts[run] = page
        page += layout.runs[run] + data.draw(st.integers(0, 1))
    pages = tuple(starts[run] + i for run, length in enumerate(layout.runs) for i in range(length))
    assert len(pages) == num_pages
    buffer = torch.full(((page + 1) * PAGE,), 7, dtype=torch.uint8)
    storage = PagedStorage(buffer, PAGE, Copier(HostPages(buffer, staging), Pacer(None)))
    loaded = storage.load(image, pages)
    until(storage.copied, "the adapter to be copied")
    storage.close()
    for one in loaded:
        a, b, _ = weights[one.site]
        np.testing.assert_array_equal(one.a.numpy(), a)
        np.testing.assert_array_equal(one.b.numpy(), b)
        assert one.a.data_ptr() % 64 == buffer.data_ptr() % 64
    untouched = set(range(page + 1)) - set(pages)
    assert all(bool((buffer[p * PAGE : (p + 1) * PAGE] == 7).all()) for p in untouched)


def test_chunks_are_no_larger_than_the_staging_buffer_and_cover_each_byte_once() -> None:
    sites = linear_sites((50, 9), (3, 3))
    image = pack("k", spec_of(sites), random_weights(sites, 3, seed=2))
    layout = lay_out(image.manifest, PAGE)
    chunks = cut_chunks(layout, tuple(range(sum(layout.runs))), 100)
    assert all(0 < chunk.num_bytes <= 100 for chunk in chunks)
    sources = sorted((piece.src, piece.src + piece.num_bytes) for chunk in chunks for piece in chunk.pieces)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(sources))
    num_bytes = sum(
        4 * e.rank * (sites[e.site].in_features + sites[e.site].out_features) for e in image.manifest.entries
    )
    assert sum(end - start for start, end in sources) == num_bytes


def test_runs_that_are_neighbours_are_copied_as_one() -> None:
    sites = linear_sites(*[(30, 20)] * 4)
    image = pack("k", spec_of(sites), random_weights(sites, 1, seed=2))
    layout = lay_out(image.manifest, PAGE)
    assert set(layout.runs) == {1}
    num_pages = len(layout.runs)
    (chunk,) = cut_chunks(layout, tuple(range(5, 5 + num_pages)), 1 << 20)
    assert (chunk.dst, len(chunk.pieces)) == (5 * PAGE, 8)
    assert chunk.num_bytes <= num_pages * PAGE
    apart = (*range(5, 5 + num_pages - 1), 50)
    assert [chunk.dst for chunk in cut_chunks(layout, apart, 1 << 20)] == [5 * PAGE, 50 * PAGE]
    backwards = tuple(range(5 + num_pages, 5, -1))
    assert len(cut_chunks(layout, backwards, 1 << 20)) == num_pages


def test_a_wide_gap_between_neighbours_is_not_copied() -> None:
    sites = linear_sites((30_000, 30_000))
    image = pack("k", spec_of(sites), random_weights(sites, 1, seed=2))
    layout = lay_out(image.manifest, 4 * 30_000 + MAX_GAP_BYTES + 32)
    assert layout.runs == (1, 1)
    assert sum(chunk.num_bytes for chunk in cut_chunks(layout, (1, 2), 1 << 20)) == 2 * 4 * 30_000


def test_a_paced_copy_keeps_to_its_rate_and_an_idle_time_earns_no_burst() -> None:
    now, slept = [100.0], []

    class Waits(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            slept.append(timeout)
            now[0] += timeout or 0.0
            return False

    pacer, waits = Pacer(1000, clock=lambda: now[0]), Waits()
    for _ in range(4):
        pacer.wait(500, waits)
    assert slept == [0.5, 0.5, 0.5]
    now[0] += 60.0
    pacer.wait(500, waits)
    pacer.wait(500, waits)
    assert slept[3:] == [0.5]


def test_a_paced_copy_that_is_given_up_ends_without_its_pace() -> None:
    """At a byte a second its next chunk would come in a minute, and a step may wait for its end."""
    buffer = torch.zeros(100 * PAGE, dtype=torch.uint8)
    storage = PagedStorage(buffer, PAGE, Copier(HostPages(buffer, 64), Pacer(1)))
    image = image_of("k")
    storage.load(image, tuple(range(1, 1 + sum(lay_out(image.manifest, PAGE).runs))))
    load = storage._copying["k"]
    storage.evict("k")
    assert load.future.done()
    storage.load(image, tuple(range(1, 1 + sum(lay_out(image.manifest, PAGE).runs))))
    load = storage._copying["k"]
    storage.close()
    assert load.future.done()


class Recorder(HostPages):
    """A device that says in which order it was asked, and whose copies wait for a gate."""

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__(buffer, 64)
        self.gate, self.begun = threading.Event(), threading.Event()
        self.calls: list[tuple[str, int]] = []
        self.marks = 0

    def mark(self) -> int:  # type: ignore[override]
        self.marks += 1
        return self.marks

    def begin(self, mark: int) -> None:
        self.calls.append(("begin", mark))

    def put(self, index: int, num_bytes: int, dst: int) -> None:
        self.calls.append(("put", index))
        self.begun.set()
        assert self.gate.wait(60)
        super().put(index, num_bytes, dst)

    def wait_staging(self, index: int) -> None:
        self.calls.append(("wait", index))

    def finish(self) -> None:
        self.calls.append(("finish", 0))


def recording_storage() -> tuple[PagedStorage, Recorder]:
    buffer = torch.zeros(100 * PAGE, dtype=torch.uint8)
    device = Recorder(buffer)
    return PagedStorage(buffer, PAGE, Copier(device, Pacer(None))), device


def image_of(key: str) -> object:
    sites = linear_sites((30, 20))
    return pack(key, spec_of(sites), random_weights(sites, 1, seed=3))


def test_a_staging_buffer_is_filled_again_only_when_its_copy_has_ended() -> None:
    storage, device = recording_storage()
    image = image_of("k")
    device.gate.set()
    storage.load(image, tuple(range(1, 1 + sum(lay_out(image.manifest, PAGE).runs))))
    until(storage.copied, "the adapter to be copied")
    num_chunks = sum(call == "put" for call, _ in device.calls)
    assert num_chunks >= 3
    expected = [pair for i in range(num_chunks) for pair in (("wait", i % 2), ("put", i % 2))]
    assert device.calls == [("begin", 1), *expected, ("finish", 0)]
    storage.close()


def test_a_copy_that_is_given_up_has_ended_when_its_pages_are_free() -> None:
    storage, device = recording_storage()
    first, second = image_of("first"), image_of("second")
    num_pages = sum(lay_out(first.manifest, PAGE).runs)
    storage.load(first, tuple(range(1, 1 + num_pages)))
    storage.load(second, tuple(range(20, 20 + num_pages)))
    assert device.begun.wait(60)
    storage.evict("second")  # has not begun: nothing to wait for
    assert storage.num_waits == 0
    threading.Timer(0.2, device.gate.set).start()
    storage.evict("first")
    assert device.gate.is_set()  # evict stood still until the copy was let go
    assert device.calls[-1] == ("finish", 0)
    assert sum(call == "put" for call, _ in device.calls) == 1  # and it was cut short
    assert storage.num_waits == 1
    assert storage.copied() == ()
    before = bytes(storage._buffer.numpy())
    time.sleep(0.05)
    assert bytes(storage._buffer.numpy()) == before
    storage.close()


@pytest.mark.parametrize("page_bytes", [64, 4096])
def test_an_adapter_without_tensors_needs_no_page(page_bytes: int) -> None:
    image = pack("k", spec_of(linear_sites((3, 3))), {})
    assert lay_out(image.manifest, page_bytes).runs == ()
