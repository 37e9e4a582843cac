"""What one engine may use: a share of a machine or of a container, and never what others hold already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from deployments.replica.neighbours import RAY_BYTES, ROUTER_BYTES, plan_neighbours
from deployments.settings.app import AppArgs
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.llm import LLM
from engine.request import SamplingParams
from engine.runner import memory
from engine.runner.memory import PROCESS_BYTES, check_weights_fit, host_room
from engine.sizing.machine import HostMemory
from engine.sizing.plan import plan_sizes
from engine.sizing.room import ALONE, GIB, MIB, Neighbours, Room
from tests.support.model_shapes import needs_of
from tests.support.tiny_model import make_base


@pytest.fixture(autouse=True)
def _a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this one holds by now is the other tests'."""
    monkeypatch.setattr(memory, "read_process_bytes", lambda: 300 * MIB)


def host(total_gib: float, free_gib: float | None = None, *, is_container: bool = True) -> HostMemory:
    free = total_gib if free_gib is None else free_gib
    return HostMemory(int(total_gib * GIB), int(free * GIB), is_container)


def room(found: HostMemory, neighbours: Neighbours = ALONE, **settings: Any) -> Room:
    return host_room(EngineConfig(model="m", **settings), neighbours, found)


def test_a_container_is_used_up_to_a_tenth_and_a_machine_to_half() -> None:
    assert room(host(4)).total_bytes == int(0.9 * 4 * GIB)
    assert room(host(64, is_container=False)).total_bytes == 32 * GIB
    assert room(host(64, is_container=False), memory_fraction=0.75).total_bytes == 48 * GIB
    assert "0.75 of the machine's memory, 64.0 GiB" in room(host(64, is_container=False), memory_fraction=0.75).source


def test_what_others_hold_is_not_shared_out() -> None:
    found = room(host(16, 2))
    assert 2 * GIB <= found.total_bytes < 3 * GIB  # and what this process holds itself
    assert "2." in found.source
    assert "free" in found.source


def test_a_number_that_was_given_counts_as_it_is() -> None:
    found = room(host(4, 1), Neighbours(num_engines=3, reserved_bytes=GIB), memory_bytes=5 * GIB)
    assert (found.total_bytes, found.source) == (5 * GIB, "memory_bytes was set")


def test_replicas_share_what_the_store_and_ray_leave() -> None:
    neighbours = Neighbours(num_engines=2, reserved_bytes=2 * GIB, store_bytes=7)
    found = room(host(16), neighbours)
    assert found.total_bytes == (int(0.9 * 16 * GIB) - 2 * GIB) // 2
    assert found.store_bytes == 7
    assert "shared by 2 replicas" in found.source
    assert room(host(1), neighbours).total_bytes == 0
    assert found.base_bytes >= PROCESS_BYTES


def args(tmp_path: Path, **changes: Any) -> AppArgs:
    return AppArgs.model_validate({"model": str(tmp_path)} | changes)


@pytest.mark.parametrize(
    ("changes", "cpus", "num_engines"),
    [
        ({}, 8.0, 1),
        ({"num_replicas": 4}, 8.0, 4),
        ({"num_replicas": 4, "replica_num_cpus": 4.0}, 8.0, 2),
        ({"num_replicas": 4, "replica_num_cpus": 16.0}, 8.0, 1),  # it runs here all the same
        ({"num_replicas": 2, "replica_num_cpus": 0.5}, 2.0, 2),
        ({"num_replicas": 3, "replica_num_cpus": 0.0}, 2.0, 3),
        ({"num_replicas": 3}, None, 3),
        ({"num_replicas": 4, "replica_num_gpus": 1.0, "engine": {"device": "cuda"}}, 8.0, 1),
        ({"num_replicas": 4, "replica_num_gpus": 0.25, "engine": {"device": "cuda"}}, 8.0, 4),
        ({"num_replicas": 2, "replica_num_gpus": 0.25, "engine": {"device": "cuda"}}, 8.0, 2),
        ({"num_replicas": 8, "replica_num_gpus": 0.5, "engine": {"device": "cuda"}}, 8.0, 2),
        ({"num_replicas": 2, "replica_num_gpus": 2.0, "engine": {"device": "cuda"}}, 8.0, 1),
    ],
)
def test_as_many_replicas_share_a_node_as_ray_may_put_there(
    tmp_path: Path, changes: dict[str, Any], cpus: float | None, num_engines: int
) -> None:
    resources = {} if cpus is None else {"CPU": cpus}
    assert plan_neighbours(args(tmp_path, **changes), resources).num_engines == num_engines


def test_the_store_and_the_routers_are_counted(tmp_path: Path) -> None:
    adapters = {"host_bytes": 600 * MIB, "max_adapter_bytes": 100 * MIB}
    found = plan_neighbours(args(tmp_path, num_routers=3, num_replicas=2, adapters=adapters), {"CPU": 8.0})
    assert found.reserved_bytes == RAY_BYTES + 3 * ROUTER_BYTES + 600 * MIB
    # Both replicas full, the store still has room for the largest adapter.
    assert found.store_bytes == 250 * MIB
    many = plan_neighbours(args(tmp_path, num_replicas=20, adapters=adapters), {"CPU": 8.0})
    assert many.store_bytes == 100 * MIB  # and a replica for one of them


@pytest.mark.parametrize(("shape", "context"), [("135m", 8192), ("0.5b", 8192)])
def test_a_server_of_four_gigabytes_needs_a_model_and_sources_alone(tmp_path: Path, shape: str, context: int) -> None:
    plain = args(tmp_path).on_a_machine_of(4 * 10**9)
    neighbours = plan_neighbours(plain, {"CPU": 2.0})
    found = room(HostMemory(4 * 10**9, 34 * 10**8, is_container=True), neighbours)
    config, sizes = plan_sizes(plain.engine_config(), needs_of(shape), found)
    assert sizes.max_model_len >= context
    assert sizes.max_num_seqs >= 8
    assert config.adapter_bytes == plain.store_bytes_of_a_replica == plain.host_bytes == 256 * MIB
    all_of_it = sizes.kv_cache_bytes + sizes.weight_bytes + sizes.base_bytes + sizes.step_bytes
    assert all_of_it + neighbours.reserved_bytes <= 0.9 * 4e9


@pytest.mark.parametrize(
    ("given", "memory_gib", "mib"), [("auto", 64, 1024), ("auto", 8, 512), ("auto", 1, 256), (300 * MIB, 64, 300)]
)
def test_the_stores_memory_goes_by_the_machine_unless_it_was_given(
    tmp_path: Path, given: int | str, memory_gib: int, mib: int
) -> None:
    found = args(tmp_path, adapters={"host_bytes": given}).on_a_machine_of(memory_gib * GIB)
    assert found.host_bytes == found.adapters.host_bytes == mib * MIB


def test_weights_that_cannot_fit_are_refused_before_any_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base("llama", tmp_path / "base")
    monkeypatch.setattr("engine.model.loader.load_model", lambda config: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=r"the weights of .* take at least .* \(memory_bytes was set\): give it more"):
        LLM(base, memory_bytes=PROCESS_BYTES)


def test_a_checkpoint_with_more_in_its_files_than_the_model_takes_is_read(tmp_path: Path) -> None:
    """Those of models that also see hold a vision tower, which no text model loads."""
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    save_file({"vision": torch.zeros(1 << 20)}, tmp_path / "model.safetensors")
    check_weights_fit(EngineConfig(model=str(tmp_path)), Room(total_bytes=MIB, base_bytes=0, source="a test"))


def test_an_engine_tells_its_sizes_and_takes_memory_only_for_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = make_base("llama", tmp_path / "base")
    monkeypatch.setattr(memory, "read_host_memory", lambda: host(4))
    caplog.set_level("INFO", logger="engine")
    before = memory.read_process_bytes()
    llm = LLM(
        base,
        kernels="torch",
        num_threads=1,
        kv_cache_bytes=8 * GIB,
        max_num_seqs=1 << 14,
        max_num_batched_tokens=1 << 14,
    )
    sizes = llm.stats().sizes
    assert sizes is not None
    assert sizes.kv_cache_bytes > GIB
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=4))
    assert memory.read_process_bytes() - before < GIB // 2
    assert str(sizes) in caplog.text
    assert "0.9 of the container's memory, 4.0 GiB" in sizes.why
