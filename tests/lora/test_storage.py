"""Storages: the same weights whether borrowed or copied, and a life cycle without surprises."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

from engine.errors import AdapterError
from engine.image_spec import ImageSpec, LinearSite
from engine.lora.copier import Copier, HostPages, Pacer
from engine.lora.image import AdapterImage, AdapterManifest
from engine.lora.pages import lay_out
from engine.lora.storage import AdapterStorage, BorrowedStorage, PagedStorage, SiteWeights
from tests.support.golden_image import BFLOAT16, FLOAT32, GOLDEN, INT8, GoldenImage
from tests.support.lora_images import linear_sites, pack, random_weights, spec_of
from tests.support.waiting import patience

PAGE_BYTES = 256


def paged_storage(num_pages: int = 200, staging_bytes: int = 96) -> PagedStorage:
    """With staging buffers so small that a load takes several."""
    buffer = torch.zeros(num_pages * PAGE_BYTES, dtype=torch.uint8)
    return PagedStorage(buffer, PAGE_BYTES, Copier(HostPages(buffer, staging_bytes), Pacer(None)))


@pytest.fixture(params=["borrowed", "pages"])
def storage(request: pytest.FixtureRequest) -> Iterator[AdapterStorage]:
    if request.param == "borrowed":
        yield BorrowedStorage()
    else:
        paged = paged_storage()
        yield paged
        paged.close()


def load(storage: AdapterStorage, image: AdapterImage, number: int = 0) -> tuple[SiteWeights, ...]:
    """In pages of its own, as load `number` of a test."""
    if isinstance(storage, BorrowedStorage):
        return storage.load(image)
    num_pages = sum(lay_out(image.manifest, PAGE_BYTES).runs)
    return storage.load(image, tuple(range(1 + number * num_pages, 1 + (number + 1) * num_pages)))


def image_of(golden: GoldenImage, key: str = "golden") -> AdapterImage:
    spec = ImageSpec(**{**golden.spec, "sites": tuple(LinearSite(**site) for site in golden.spec["sites"])})
    return AdapterImage(key, AdapterManifest.from_dict(golden.manifest, spec), golden.data)


def peft_tensors(golden: GoldenImage) -> Iterator[tuple[int, str, torch.Tensor]]:
    """Site, "lora_A" or the like, and the tensor as PEFT has it."""
    for peft_name, (shape, values) in golden.tensors.items():
        module, _, which = peft_name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        index = next(s["index"] for s in golden.spec["sites"] if s["name"] == module)
        yield index, which, torch.tensor(values, dtype=torch.float32).reshape(shape)


def wait_copied(storage: AdapterStorage, number: int = 1) -> tuple[str, ...]:
    """Poll as the runner does, once per step."""
    seen: tuple[str, ...] = ()
    for _ in patience(f"{number} adapters to be copied"):
        seen += storage.copied()
        if len(seen) >= number:
            break
    return seen


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_golden_tensors_are_those_of_the_peft_files(storage: AdapterStorage, name: str) -> None:
    golden = GOLDEN[name]
    weights = {w.site: w for w in load(storage, image_of(golden))}
    wait_copied(storage)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    for site, which, expected in peft_tensors(golden):
        found = weights[site].a if which.endswith("A") else weights[site].b
        torch.testing.assert_close(
            found, expected.to(dtype) if which == "lora_A" else expected.to(dtype).t(), rtol=0, atol=0
        )
    assert {w.site: w.scaling for w in weights.values()} == {
        e["site"]: e["scaling"] for e in golden.manifest["entries"]
    }


def test_golden_codes_are_half_a_step_from_the_peft_files_at_most(storage: AdapterStorage) -> None:
    weights = {w.site: w for w in load(storage, image_of(INT8))}
    wait_copied(storage)
    for site, which, expected in peft_tensors(INT8):
        w, is_a = weights[site], which.endswith("A")
        assert w.scales is not None
        codes, steps = (w.a, w.scales[0]) if is_a else (w.b, w.scales[1])
        by_rank = codes.t() if which == "lora_embedding_A" else codes  # [R, ...]
        wanted = expected if is_a else expected.t()
        assert by_rank.dtype == torch.int8
        nearest = by_rank.double() * steps.double()[:, None]
        assert ((nearest - wanted.double()).abs() <= 0.5 * steps.double()[:, None] + 1e-36).all()


def test_borrowed_weights_are_the_images_own_memory() -> None:
    image = image_of(FLOAT32)
    first = BorrowedStorage().load(image)[0]
    assert first.a.data_ptr() == image.data.ctypes.data
    assert first.b.data_ptr() == image.data.ctypes.data + 64


def test_borrowed_weights_keep_the_memory_alive_after_eviction() -> None:
    class Buffer(bytearray):  # owns its memory and can be watched
        pass

    data = Buffer(FLOAT32.data)
    watch = weakref.ref(data)
    manifest = image_of(FLOAT32).manifest
    storage = BorrowedStorage()
    weights = storage.load(AdapterImage("k", manifest, data))
    storage.evict("k")
    del data
    gc.collect()
    assert watch() is not None
    assert weights[0].a[0].tolist() == [1.0, 6.0]
    del weights
    gc.collect()
    assert watch() is None


def test_weights_in_pages_are_a_copy() -> None:
    data = bytearray(FLOAT32.data)
    storage = paged_storage()
    weights = load(storage, AdapterImage("k", image_of(FLOAT32).manifest, data))
    wait_copied(storage)
    data[:] = bytes(len(data))
    assert weights[0].a[0].tolist() == [1.0, 6.0]
    storage.close()


def test_pages_that_are_not_those_of_the_layout_are_refused() -> None:
    storage = paged_storage()
    with pytest.raises(AdapterError, match="'golden' needs runs of"):
        storage.load(image_of(FLOAT32), ())
    storage.close()


def test_every_load_is_reported_copied_once_and_in_order(storage: AdapterStorage) -> None:
    keys = tuple(f"adapter-{i}" for i in range(20))
    for number, key in enumerate(keys):
        load(storage, image_of(FLOAT32, key), number)
    assert wait_copied(storage, len(keys)) == keys
    assert storage.copied() == ()


def test_evicted_adapter_is_not_reported_and_may_be_loaded_again(storage: AdapterStorage) -> None:
    load(storage, image_of(FLOAT32, "k"))
    storage.evict("k")
    assert storage.copied() == ()
    again = load(storage, image_of(BFLOAT16, "k"))
    assert wait_copied(storage) == ("k",)
    assert again[0].b.dtype == torch.bfloat16


def test_loading_twice_or_evicting_what_is_not_there_is_an_error(storage: AdapterStorage) -> None:
    load(storage, image_of(FLOAT32, "k"))
    with pytest.raises(ValueError, match="'k' is resident already"):
        load(storage, image_of(FLOAT32, "k"))
    storage.evict("k")
    with pytest.raises(KeyError):
        storage.evict("k")


def test_waiting_ends_with_the_oldest_copy_and_is_nothing_without_one(storage: AdapterStorage) -> None:
    storage.wait(60.0)
    load(storage, image_of(FLOAT32, "k"))
    storage.wait(60.0)
    assert storage.copied() == ("k",)
    storage.wait(60.0)


def test_failed_copy_is_raised_by_the_step_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(HostPages, "put", broken)
    storage = paged_storage()
    load(storage, image_of(FLOAT32))
    with pytest.raises(RuntimeError, match="device lost"):
        wait_copied(storage)
    storage.close()


def test_weights_loaded_inside_inference_mode_are_right(storage: AdapterStorage) -> None:
    sites = linear_sites((5, 3))
    weights = random_weights(sites, rank=2, seed=1)
    with torch.inference_mode():
        (loaded,) = load(storage, pack("k", spec_of(sites), weights))
        wait_copied(storage)
    torch.testing.assert_close(loaded.a, torch.from_numpy(weights[0][0]), rtol=0, atol=0)
