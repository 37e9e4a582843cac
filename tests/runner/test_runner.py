"""The runner: what a step's result depends on, adapters, references to samples in flight, and failures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from adapter_store.image.packing import pack_folder
from engine.config import EngineConfig
from engine.core.plan import AdapterEvict, AdapterLoad, BlockCopy, StepPlan, TokenRef
from engine.errors import AdapterError, ConfigError
from engine.lora.image import AdapterImage, AdapterManifest
from engine.model.loader import LoadedModel, load_model
from engine.runner.protocol import StepNotLaunched
from tests.runner.test_runner_architectures import MAX_LOGIT_DIFFERENCE, check_against_reference
from tests.support.plan_driver import PlanDriver
from tests.support.sizes import AMPLE, num_kv_blocks
from tests.support.tiny_model import make_adapter, make_base, reference_generate

PROMPT = b"An odd number of tokens"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def image_of(loaded: LoadedModel, folder: Path, key: str) -> AdapterImage:
    spec = loaded.image_spec()
    packed = pack_folder(folder, spec.to_dict())
    return AdapterImage(key, AdapterManifest.from_dict(packed.manifest, spec), packed.data)


EVERYWHERE = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head", "embed_tokens"],
    "gemma3": ["q_proj", "v_proj", "down_proj", "embed_tokens", "lm_head"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "wte", "lm_head"],
    "qwen3_moe": "all-linear",
}


@pytest.mark.parametrize("arch", EVERYWHERE)
def test_adapters_side_by_side_say_what_peft_says(arch: str, bases: Path) -> None:
    """Two adapters of different rank and the base in one batch, in chunks, embeddings and output layer included."""
    base = make_base(arch, bases / arch)
    adapters = [
        make_adapter(base, bases / f"{arch}-{rank}", seed=rank, rank=rank, target_modules=EVERYWHERE[arch])
        for rank in (2, 5)
    ]
    driver = PlanDriver(base)
    for slot, adapter in enumerate(adapters, start=1):
        driver.load_adapter(image_of(driver.loaded, adapter, f"adapter-{slot}"), slot)
    prompts = [PROMPT, PROMPT, PROMPT, PROMPT[:5], PROMPT[3:]]
    slots = [1, 0, 2, 2, 1]
    for prompt, slot in zip(prompts, slots, strict=True):
        driver.add(prompt, lora_slot=slot)
    driver.run(8, (4, 9, 1))
    for sequence in driver.sequences:
        adapter = adapters[sequence.lora_slot - 1] if sequence.lora_slot else None
        difference = check_against_reference(base, adapter, sequence, driver.logits[sequence.seq_id])
        assert difference <= MAX_LOGIT_DIFFERENCE
    texts = {tuple(s.outputs) for s in driver.sequences[:3]}
    assert len(texts) == 3  # the adapters do change the text


def test_an_evicted_slot_serves_its_next_adapter(bases: Path) -> None:
    base = make_base("llama", bases / "llama")
    folders = [make_adapter(base, bases / f"evict-{seed}", seed=seed) for seed in (1, 2)]
    driver = PlanDriver(base)
    images = [image_of(driver.loaded, folder, f"a{i}") for i, folder in enumerate(folders)]
    driver.load_adapter(images[0], 1)
    driver.add(PROMPT, lora_slot=1)
    driver.run(3, (50,))
    driver.runner.add_adapter(images[1])
    assert driver.submit_ops(AdapterEvict("a0", 1), AdapterLoad("a1", 1)).copied == ("a1",)
    driver.add(PROMPT, lora_slot=1)
    driver.run(6, (50,))
    assert driver.sequences[1].outputs == reference_generate(base, folders[1], PROMPT, 6, ignore_eos=True)[0]


def test_an_eviction_repeated_after_an_abandoned_plan_changes_nothing(bases: Path) -> None:
    base = make_base("llama", bases / "llama")
    driver = PlanDriver(base)
    image = image_of(driver.loaded, make_adapter(base, bases / "evict-1", seed=1), "a")
    driver.load_adapter(image, 3)
    driver.submit_ops(AdapterEvict("a", 3))
    driver.submit_ops(AdapterEvict("a", 3), AdapterLoad("a", 1))
    driver.submit_ops(AdapterEvict("a", 3))  # it is in slot 1 now
    with pytest.raises(AdapterError, match="resident in slot 1"):
        driver.runner.remove_adapter("a")
    driver.submit_ops(AdapterEvict("a", 1))
    driver.runner.remove_adapter("a")
    with pytest.raises(AdapterError, match="never added"):
        driver.submit_ops(AdapterLoad("a", 1))


def test_a_token_in_flight_feeds_the_next_plan(bases: Path) -> None:
    """With plans submitted before the results of earlier ones are read."""
    base = make_base("qwen2", bases / "qwen2")
    driver = PlanDriver(base, pipeline_depth=2)
    sequence, other = driver.add(PROMPT), driver.add(PROMPT[:4])
    pending = [driver.runner.submit(driver.make_plan([(other, 4), (sequence, len(PROMPT))]))]
    rows = {other.seq_id: 3, sequence.seq_id: 3 + len(PROMPT)}
    sequence.num_computed, other.num_computed = len(PROMPT), 4
    for _ in range(5):
        for s in (sequence, other):
            s.outputs.append(-1)  # its place; the value is on the device
        refs = {seq_id: TokenRef(driver.plan_id, row) for seq_id, row in rows.items()}
        pending.append(driver.runner.submit(driver.make_plan([(sequence, 1), (other, 1)], refs)))
        rows = {sequence.seq_id: 0, other.seq_id: 1}
        sequence.num_computed += 1
        other.num_computed += 1
    results = [{s.seq_id: s.token_ids[0] for s in p.result().samples} for p in pending]
    for s in (sequence, other):
        expected = reference_generate(base, None, s.prompt, 6, ignore_eos=True)[0]
        assert [result[s.seq_id] for result in results] == expected


def test_a_copied_block_carries_the_sequence_on(bases: Path) -> None:
    base = make_base("mistral", bases / "mistral")
    driver = PlanDriver(base)
    first = driver.add(PROMPT)
    driver.run(1, (50,))
    copy = driver.add(PROMPT)
    copy.blocks = [driver.free.pop() for _ in first.blocks]
    copy.outputs, copy.num_computed = list(first.outputs), first.num_computed
    plan = driver.make_plan([(copy, 1)])
    copies = tuple(BlockCopy(src, dst) for src, dst in zip(first.blocks, copy.blocks, strict=True))
    sample = driver.runner.submit(dataclasses.replace(plan, block_copies=copies)).result().samples[0]
    assert sample.token_ids[0] == reference_generate(base, None, PROMPT, 2, ignore_eos=True)[0][1]


def test_running_out_of_memory_is_reported_and_the_rows_can_be_run_again(bases: Path, monkeypatch) -> None:
    base = make_base("llama", bases / "llama")
    driver = PlanDriver(base)
    sequence = driver.add(PROMPT)
    plan = driver.make_plan([(sequence, len(PROMPT))])
    with monkeypatch.context() as patch:

        def fail(*_args: object) -> None:
            raise torch.OutOfMemoryError("no room")

        patch.setattr("engine.runner.runner.forward_logits", fail)
        with pytest.raises(StepNotLaunched, match="out of memory with 23 rows"):
            driver.runner.submit(plan)
    again = dataclasses.replace(plan, plan_id=plan.plan_id + 1)
    expected = reference_generate(base, None, PROMPT, 1, ignore_eos=True)[0]
    assert list(driver.runner.submit(again).result().samples[0].token_ids) == expected


def test_any_other_failure_is_not_taken_for_want_of_memory(bases: Path, monkeypatch) -> None:
    driver = PlanDriver(make_base("llama", bases / "llama"))
    plan = driver.make_plan([(driver.add(PROMPT), 5)])

    def fail(*_args: object) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr("engine.runner.runner.forward_hidden", fail)
    with pytest.raises(RuntimeError, match="illegal instruction"):
        driver.runner.submit(plan)


def test_plans_run_in_order_only(bases: Path) -> None:
    driver = PlanDriver(make_base("llama", bases / "llama"))
    driver.runner.submit(StepPlan(plan_id=5))
    with pytest.raises(ValueError, match="plan 5 comes after plan 5"):
        driver.runner.submit(StepPlan(plan_id=5))


def test_the_cache_has_the_blocks_that_its_bytes_buy(bases: Path) -> None:
    base = make_base("llama", bases / "llama")
    loaded = load_model(EngineConfig(model=str(base)))
    block_bytes = 3 * 2 * 16 * 2 * 8 * 4  # layers, k and v, block size, KV heads, head size, float32
    config = EngineConfig(model=str(base), kv_cache_bytes=20 * block_bytes + 5)
    assert num_kv_blocks(loaded, config) == 20
    small = EngineConfig(model=str(base), kv_cache_bytes=16 * block_bytes)
    wanted = f"needs 17, with the null block: raise kv_cache_bytes to at least {17 * block_bytes}"
    with pytest.raises(ConfigError, match=wanted):
        num_kv_blocks(loaded, small)
    # What there is is far more than 2 sequences of 256 tokens could ever fill.
    needed = num_kv_blocks(loaded, EngineConfig(model=str(base), max_num_seqs=2))
    assert 2 * 16 <= needed < AMPLE.total_bytes // block_bytes


def test_without_room_for_adapters_no_layer_is_swapped(bases: Path) -> None:
    driver = PlanDriver(make_base("llama", bases / "llama"), max_resident_adapters=0, kernels="torch")
    driver.add(PROMPT)
    driver.run(2, (50,))
    assert type(driver.loaded.model.lm_head) is torch.nn.Linear


def test_bfloat16_stays_close_to_float32(bases: Path) -> None:
    base = make_base("llama", bases / "llama")
    drivers = [PlanDriver(base, dtype=dtype) for dtype in ("float32", "bfloat16")]
    for driver in drivers:
        driver.add(PROMPT)
        driver.run(1, (7,))
    wide, narrow = (driver.logits[0][0].float() for driver in drivers)
    assert (wide - narrow).abs().max() < 0.05 * wide.abs().max() + 0.1
