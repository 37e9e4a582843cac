"""Storages: the same weights whether borrowed or copied, and a life cycle without surprises."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch

from engine.lora.image import AdapterImage, AdapterManifest
from engine.lora.storage import AdapterStorage, BorrowedStorage, DeviceStorage
from engine.site import ImageSpec, LinearSite
from tests.support.golden_image import BFLOAT16, FLOAT32, GOLDEN, GoldenImage
from tests.support.lora_images import linear_sites, pack, random_weights, spec_of


@pytest.fixture(params=["borrowed", "device"])
def storage(request: pytest.FixtureRequest) -> Iterator[AdapterStorage]:
    if request.param == "borrowed":
        yield BorrowedStorage()
    else:
        device = DeviceStorage("cpu")
        yield device
        device.close()


def image_of(golden: GoldenImage, key: str = "golden") -> AdapterImage:
    spec = ImageSpec(**{**golden.spec, "sites": tuple(LinearSite(**site) for site in golden.spec["sites"])})
    return AdapterImage(key, AdapterManifest.from_dict(golden.manifest, spec), golden.data)


def wait_copied(storage: AdapterStorage, number: int = 1) -> tuple[str, ...]:
    """Poll as the runner does, once per step."""
    seen: tuple[str, ...] = ()
    while len(seen) < number:
        seen += storage.copied()
    return seen


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_tensors_are_those_of_the_peft_files(storage: AdapterStorage, name: str) -> None:
    golden = GOLDEN[name]
    weights = {w.site: w for w in storage.load(image_of(golden))}
    wait_copied(storage)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    for peft_name, (shape, values) in golden.tensors.items():
        expected = torch.tensor(values, dtype=torch.float32).reshape(shape).to(dtype)
        module, _, which = peft_name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        index = next(s["index"] for s in golden.spec["sites"] if s["name"] == module)
        found = weights[index].a if which.endswith("A") else weights[index].b
        torch.testing.assert_close(found, expected if which == "lora_A" else expected.t(), rtol=0, atol=0)
    assert {w.site: w.scaling for w in weights.values()} == {
        e["site"]: e["scaling"] for e in golden.manifest["entries"]
    }


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


def test_device_weights_are_a_copy() -> None:
    data = bytearray(FLOAT32.data)
    storage = DeviceStorage("cpu")
    weights = storage.load(AdapterImage("k", image_of(FLOAT32).manifest, data))
    wait_copied(storage)
    data[:] = bytes(len(data))
    assert weights[0].a[0].tolist() == [1.0, 6.0]
    storage.close()


def test_every_load_is_reported_copied_once_and_in_order(storage: AdapterStorage) -> None:
    keys = tuple(f"adapter-{i}" for i in range(20))
    for key in keys:
        storage.load(image_of(FLOAT32, key))
    assert wait_copied(storage, len(keys)) == keys
    assert storage.copied() == ()


def test_evicted_adapter_is_not_reported_and_may_be_loaded_again(storage: AdapterStorage) -> None:
    storage.load(image_of(FLOAT32, "k"))
    storage.evict("k")
    assert storage.copied() == ()
    again = storage.load(image_of(BFLOAT16, "k"))
    assert wait_copied(storage) == ("k",)
    assert again[0].b.dtype == torch.bfloat16


def test_loading_twice_or_evicting_what_is_not_there_is_an_error(storage: AdapterStorage) -> None:
    storage.load(image_of(FLOAT32, "k"))
    with pytest.raises(ValueError, match="'k' is resident already"):
        storage.load(image_of(FLOAT32, "k"))
    storage.evict("k")
    with pytest.raises(KeyError):
        storage.evict("k")


def test_waiting_ends_with_the_oldest_copy_and_is_nothing_without_one(storage: AdapterStorage) -> None:
    storage.wait(60.0)
    storage.load(image_of(FLOAT32, "k"))
    storage.wait(60.0)
    assert storage.copied() == ("k",)
    storage.wait(60.0)


def test_failed_copy_is_raised_by_the_step_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("device lost")

    monkeypatch.setattr(DeviceStorage, "_copy", broken)
    storage = DeviceStorage("cpu")
    storage.load(image_of(FLOAT32))
    with pytest.raises(RuntimeError, match="device lost"):
        wait_copied(storage)
    storage.close()


@pytest.mark.parametrize("make", [BorrowedStorage, lambda: DeviceStorage("cpu")])
def test_weights_loaded_inside_inference_mode_are_right(make: Callable[[], AdapterStorage]) -> None:
    sites = linear_sites((5, 3))
    weights = random_weights(sites, rank=2, seed=1)
    storage = make()
    with torch.inference_mode():
        (loaded,) = storage.load(pack("k", spec_of(sites), weights))
        wait_copied(storage)
    torch.testing.assert_close(loaded.a, torch.from_numpy(weights[0][0]), rtol=0, atol=0)
