"""Sizes of real models on real machines, from their shapes alone: no weight exists here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest

from engine.config import EngineConfig, SizedConfig
from engine.errors import ConfigError
from engine.runner.memory import PROCESS_BYTES
from engine.sizing.plan import LEAST_CONTEXT, plan_sizes
from engine.sizing.room import GIB, MIB, Needs, Room, Sizes, human
from tests.support.model_shapes import needs_of


def plan(needs: Needs, total_bytes: int, **settings: Any) -> tuple[SizedConfig, Sizes]:
    gpu = settings.get("device") == "cuda"
    room = Room(total_bytes=total_bytes, base_bytes=600 * MIB if gpu else PROCESS_BYTES, source="a test")
    config = EngineConfig(model="m", **settings)
    config.validate()
    return plan_sizes(config, needs, room)


def taken(sizes: Sizes, config: SizedConfig, needs: Needs) -> int:
    beside = 0 if config.has_adapter_pages() else sizes.adapter_bytes
    return sizes.weight_bytes + sizes.base_bytes + sizes.step_bytes + sizes.kv_cache_bytes + beside


@dataclass(frozen=True)
class Machine:
    shape: str
    total_gb: float
    context: tuple[int, int]  # at least, at most
    seqs: tuple[int, int]
    bits: int = 16
    device: str = "cpu"


MACHINES = [
    Machine("135m", 0.9 * 4, (8192, 8192), (32, 64)),
    Machine("135m", 0.9 * 2, (8192, 8192), (8, 64)),
    Machine("135m", 0.5 * 16, (8192, 8192), (64, 64)),
    Machine("0.5b", 0.9 * 4, (32768, 32768), (8, 64)),
    Machine("0.5b", 0.5 * 16, (32768, 32768), (64, 64)),
    Machine("8b", 0.9 * 80, (131072, 131072), (128, 256), device="cuda"),
    Machine("8b", 0.9 * 141, (131072, 131072), (256, 256), device="cuda"),
    Machine("8b", 0.9 * 24, (4096, 40000), (8, 64), device="cuda"),
    Machine("8b", 0.9 * 24, (65536, 131072), (8, 128), bits=4, device="cuda"),
    Machine("7b-32k", 0.9 * 24, (16384, 32768), (8, 64), device="cuda"),
    Machine("70b", 0.9 * 80, (65536, 131072), (16, 128), bits=4, device="cuda"),
    Machine("70b", 0.9 * 141, (131072, 131072), (128, 256), bits=4, device="cuda"),
]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: f"{m.shape}-{m.bits}bit-{m.total_gb:g}GB")
def test_a_model_gets_sizes_that_fit_and_use_what_there_is(machine: Machine) -> None:
    needs = needs_of(machine.shape, bits=machine.bits, gpu=machine.device == "cuda")
    total = int(machine.total_gb * 1e9)
    config, sizes = plan(needs, total, device=machine.device)
    assert machine.context[0] <= sizes.max_model_len <= machine.context[1]
    assert machine.seqs[0] <= sizes.max_num_seqs <= machine.seqs[1]
    assert 256 <= sizes.max_num_batched_tokens <= 2048
    assert 1 <= sizes.max_resident_adapters <= 256
    assert taken(sizes, config, needs) <= total
    # At least two adapters of rank 16 on every layer, and no adapter takes what a sequence was promised.
    assert sizes.adapter_bytes >= 2 * 16 * needs.rank_bytes
    pages = config.adapter_pages(needs.block_bytes)[1]
    assert sizes.num_blocks - pages - 1 >= sizes.max_model_len // 16
    # Nothing is left over that sequences could fill.
    is_full = sizes.num_blocks >= sizes.max_num_seqs * (sizes.max_model_len // 16)
    assert is_full or taken(sizes, config, needs) > 0.97 * total
    assert ("what fits" in sizes.why) == (sizes.max_model_len < needs.context_tokens)


GIVEN = [
    {"max_model_len": 2048},
    {"max_num_seqs": 3},
    {"max_num_seqs": 100},
    {"max_num_batched_tokens": 128},
    {"max_num_batched_tokens": 5},
    {"kv_cache_bytes": 300 * MIB},
    {"kv_cache_bytes": 64 * GIB},
    {"adapter_bytes": 0},
    {"adapter_bytes": 100 * MIB},
    {"max_resident_adapters": 0},
    {"max_resident_adapters": 7},
    {"adapter_memory": "pages", "min_adapter_bytes": 64 * MIB},
    {"adapter_memory": "pages", "adapter_bytes": 64 * MIB, "max_model_len": 4096, "max_num_seqs": 2},
    {"device": "cuda", "min_adapter_bytes": 512 * MIB},
]


@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_what_is_given_stays_and_the_rest_is_chosen_around_it(given: dict[str, Any]) -> None:
    needs, total = needs_of("135m"), int(3.6e9)
    config, sizes = plan(needs, total, **given)
    for name, value in given.items():
        assert getattr(config, name) == value
    config.validate()
    if "kv_cache_bytes" in given:
        assert sizes.kv_cache_bytes <= given["kv_cache_bytes"]
        assert ("more than" in sizes.why) == (given["kv_cache_bytes"] > total)
    else:
        assert taken(sizes, config, needs) <= total
    assert sizes.max_num_seqs <= sizes.max_num_batched_tokens
    assert sizes.adapter_bytes >= config.min_adapter_bytes
    assert (sizes.adapter_bytes == 0) == (given.get("adapter_bytes") == 0 or given.get("max_resident_adapters") == 0)


def test_a_larger_setting_leaves_less_for_the_others() -> None:
    needs = needs_of("8b", gpu=True)
    total = int(0.9 * 24e9)
    free = plan(needs, total, device="cuda")[1]
    many = plan(needs, total, device="cuda", max_num_seqs=128)[1]
    adapters = plan(needs, total, device="cuda", min_adapter_bytes=2 * GIB)[1]
    narrow = plan(replace(needs, block_bytes=needs.block_bytes // 2), total, device="cuda")[1]
    assert many.max_model_len < free.max_model_len
    assert adapters.max_model_len < free.max_model_len
    assert 1.5 * free.max_model_len < narrow.max_model_len  # a cache of half the bytes


REFUSED = [
    # shape, bits, bytes, settings, what is said
    ("8b", 16, 16e9, {"device": "cuda"}, ["weights take 15.0 GiB", "quantization='int8'", "memory_bytes"]),
    ("135m", 16, 0.6e9, {}, ["weights take", "process 512.0 MiB", "memory_fraction"]),
    ("8b", 16, 21.6e9, {"device": "cuda", "max_model_len": 131072}, ["max_model_len=131072", "lower max_model_len to"]),
    ("0.5b", 16, 2.5e9, {"max_model_len": 32768, "max_num_seqs": 64}, ["max_model_len=32768", "at most"]),
    ("0.5b", 16, 2.5e9, {"max_num_seqs": 512}, ["lower max_num_seqs to", "kv_cache_dtype='int8'"]),
    ("135m", 16, 3.6e9, {"max_num_batched_tokens": 1 << 18}, ["lower max_num_batched_tokens to"]),
    ("135m", 16, 3.6e9, {"kv_cache_bytes": 8 * MIB}, ["8388608 bytes of KV cache", "raise kv_cache_bytes to at least"]),
    ("135m", 16, 3.6e9, {"kv_cache_bytes": 90 * MIB, "max_model_len": 8192}, ["needs 513", "at most 4080"]),
]


@pytest.mark.parametrize(("shape", "bits", "total", "settings", "told"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_fit_says_what_would(
    shape: str, bits: int, total: float, settings: dict[str, Any], told: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(needs_of(shape, bits=bits), int(total), **settings)
    for words in told:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "total", "setting", "settings"),
    [
        ("8b", 21.6e9, "max_model_len", {"device": "cuda", "max_model_len": 131072}),
        ("135m", 1.1e9, "max_model_len", {"max_model_len": 8192, "max_num_seqs": 64}),
        ("135m", 3.6e9, "max_model_len", {"max_model_len": 8192, "kv_cache_bytes": 90 * MIB}),
        ("0.5b", 2.5e9, "max_num_seqs", {"max_num_seqs": 512}),
        ("135m", 3.6e9, "max_num_batched_tokens", {"max_num_batched_tokens": 1 << 18}),
    ],
)
def test_the_number_that_a_refusal_names_is_taken_and_the_next_is_not(
    shape: str, total: float, setting: str, settings: dict[str, Any]
) -> None:
    needs = needs_of(shape)
    with pytest.raises(ConfigError) as caught:
        plan(needs, int(total), **settings)
    told = str(caught.value).split(f"lower {setting} to ")[1]
    number = int(told.removeprefix("at most ").split(",")[0].split(" ")[0])
    assert 0 < number < settings[setting]
    assert getattr(plan(needs, int(total), **settings | {setting: number})[1], setting) == number
    if setting == "max_model_len":
        with pytest.raises(ConfigError):
            plan(needs, int(total), **settings | {setting: number + 16})


def test_adapters_in_a_stores_memory_cost_the_engine_nothing() -> None:
    needs = needs_of("135m")
    config = EngineConfig(model="m")
    room = Room(total_bytes=int(2e9), base_bytes=PROCESS_BYTES, source="a test")
    _, own = plan_sizes(config, needs, room)
    _, stored = plan_sizes(config, needs, replace(room, store_bytes=300 * MIB))
    assert stored.adapter_bytes == 300 * MIB
    assert stored.kv_cache_bytes > own.kv_cache_bytes


def test_a_short_context_is_never_cut() -> None:
    needs = replace(needs_of("135m"), context_tokens=LEAST_CONTEXT)
    with pytest.raises(ConfigError, match=f"max_model_len={LEAST_CONTEXT}"):
        plan(needs, int(3.6e9), kv_cache_bytes=31 * needs.block_bytes)
    assert plan(needs, int(3.6e9), kv_cache_bytes=33 * needs.block_bytes)[1].max_model_len == LEAST_CONTEXT


def test_the_account_is_one_line_that_people_can_read() -> None:
    line = str(plan(needs_of("8b", gpu=True), int(0.9 * 24e9), device="cuda")[1])
    assert "\n" not in line
    for part in ("max_model_len", "max_num_seqs", "KV cache", "GiB", "adapters", "weights 15.0 GiB", "a test"):
        assert part in line
    assert [human(n) for n in (5, 1536, 3 * MIB, int(1.26 * GIB))] == ["5 bytes", "1.5 KiB", "3.0 MiB", "1.3 GiB"]
