"""The runner with adapters in pages of the KV cache: how many pages there are, which it refuses, and failed loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM
from engine.config import EngineConfig
from engine.core.plan import AdapterEvict, AdapterLoad
from engine.errors import ConfigError
from engine.kv.storage import KVShape, KVStorage
from engine.lora.pages import lay_out
from engine.lora.storage import PagedStorage
from engine.model.loader import load_model
from engine.runner.protocol import StepNotLaunched
from engine.runner.runner import _adapter_storage
from tests.runner.test_runner import PROMPT, image_of
from tests.support.plan_driver import PlanDriver
from tests.support.sizes import num_kv_blocks
from tests.support.tiny_model import make_adapter, make_base, reference_generate
from tests.support.waiting import until

PER_SEQUENCE = 16  # blocks of 16 tokens, for the 256 that the tiny models were made for


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base("llama", tmp_path_factory.mktemp("bases") / "llama")


def test_a_shared_cache_has_blocks_for_sequences_and_all_adapters_and_no_more(base: Path) -> None:
    loaded = load_model(EngineConfig(model=str(base)))
    page = loaded.capabilities.kv_shape(16, loaded.dtype).block_bytes

    def blocks(**settings: Any) -> int:
        return num_kv_blocks(loaded, EngineConfig(model=str(base), adapter_memory="pages", **settings))

    assert blocks(kv_cache_bytes=40 * page, adapter_bytes=100 * page) == 40
    sequences = num_kv_blocks(loaded, EngineConfig(model=str(base), max_num_seqs=2))
    assert blocks(max_num_seqs=2, adapter_bytes=7 * page + 1) == sequences + 7
    assert blocks(max_num_seqs=2, adapter_bytes=0) == sequences


def test_a_shared_cache_without_a_page_for_adapters_is_refused(base: Path) -> None:
    """Else an engine would start that refuses each adapter."""
    loaded = load_model(EngineConfig(model=str(base)))
    page = loaded.capabilities.kv_shape(16, loaded.dtype).block_bytes
    for floor, least in ((0, PER_SEQUENCE + 2), (3 * page - 1, PER_SEQUENCE + 4)):
        config = {"adapter_memory": "pages", "min_adapter_bytes": floor}
        enough = EngineConfig(model=str(base), kv_cache_bytes=least * page, **config)
        assert num_kv_blocks(loaded, enough) == least
        small = EngineConfig(model=str(base), kv_cache_bytes=least * page - 1, **config)
        with pytest.raises(ConfigError, match=rf"needs {least}, .* raise kv_cache_bytes to at least {least * page}"):
            num_kv_blocks(loaded, small)


def test_a_floor_as_high_as_the_ceiling_is_a_fixed_share(base: Path) -> None:
    """Of whole pages, whatever the size of a page."""
    loaded = load_model(EngineConfig(model=str(base)))
    page = loaded.capabilities.kv_shape(16, loaded.dtype).block_bytes
    share = 5 * page + page // 2
    llm = LLM(base, adapter_memory="pages", adapter_bytes=share, min_adapter_bytes=share, num_threads=1)
    assert (llm._engine.limits.min_adapter_pages, llm._engine.limits.max_adapter_pages) == (5, 5)


@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_pages_in_which_tensors_would_not_be_aligned_are_refused(block_size: int) -> None:
    config = EngineConfig(model="", adapter_memory="pages", block_size=block_size)
    kv = KVStorage(KVShape(1, block_size, 1, 3, torch.bfloat16), 4)  # 12 bytes a token
    with pytest.raises(ConfigError, match=rf"KV blocks of {12 * block_size} bytes, .* multiple of 64: raise"):
        _adapter_storage(config, kv)


def test_pages_of_whole_lines_are_taken() -> None:
    config = EngineConfig(model="", adapter_memory="pages", block_size=16)
    storage = _adapter_storage(config, KVStorage(KVShape(1, 16, 1, 3, torch.bfloat16), 4))
    assert isinstance(storage, PagedStorage)


class FailsOnce:
    """Kernels that run out of memory when the first adapter is bound."""

    def __init__(self) -> None:
        self.num_binds = 0

    def bind(self, slot: int, weights: object) -> None:
        self.num_binds += 1
        if self.num_binds == 1:
            raise torch.OutOfMemoryError("no room")

    def unbind(self, slot: int, sites: object) -> None: ...

    def set(self, segments: object, sampled_segments: object) -> None: ...


def test_a_load_that_runs_out_of_memory_is_evicted_and_loaded_again(base: Path, tmp_path: Path) -> None:
    driver = PlanDriver(base, kernels="torch", adapter_memory="pages")
    folder = make_adapter(base, tmp_path / "a", seed=1)
    image = image_of(driver.loaded, folder, "a")
    runs = lay_out(image.manifest, driver.runner._storage.shape.block_bytes).runs
    driver.free = list(range(100, 200))
    driver.runner._batch.kernels = FailsOnce()  # type: ignore[assignment]
    driver.runner.add_adapter(image)
    with pytest.raises(StepNotLaunched):
        driver.submit_ops(AdapterLoad("a", 1, tuple(range(1, 1 + sum(runs)))))
    second = tuple(range(50, 50 + sum(runs)))
    copied = driver.submit_ops(AdapterEvict("a", 1), AdapterLoad("a", 1, second)).copied
    copied = copied or until(lambda: driver.submit_ops().copied, "the adapter to be copied")
    assert copied == ("a",)
    driver.add(PROMPT, lora_slot=1)
    driver.run(4, (50,))
    assert driver.sequences[0].outputs == reference_generate(base, folder, PROMPT, 4, ignore_eos=True)[0]
