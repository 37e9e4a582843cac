"""Whole models on the Triton kernels: greedy text is that of transformers and PEFT, recorded steps or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine import LLM, SamplingParams
from engine.errors import ConfigError
from engine.kv.triton_attention import TritonAttention
from engine.lora.triton_lora import TritonLora
from engine.runner.graphs import DecodeGraphs, buckets
from engine.runner.runner import TorchRunner
from tests.equality.oracle import Text, assert_greedy
from tests.support import tape
from tests.support.rounded_adapter import round_adapter
from tests.support.tiny_model import make_adapter, make_base
from tests.support.triton_device import DEVICE

FUSED = ("mistral", "qwen3", "llama", "qwen2")
OTHERS = ("gemma2", "gpt2", "phi3")
MORE = ("llama", "mistral", "qwen2", "gpt2", "phi3")  # slow: one fused and one other stay in every run
PROMPTS = [[7], [40, 41, 42, 43, 44], list(range(60, 79)), [9, 8, 7]]
SETTINGS: dict[str, Any] = {
    "device": DEVICE.type, "kernels": "triton", "dtype": "float32", "block_size": 4, "max_num_seqs": 4,
    "max_num_batched_tokens": 32, "max_model_len": 40, "max_resident_adapters": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def adapters_of(base: Path, ranks: tuple[int, ...], **kwargs: Any) -> dict[str, Path]:
    return {
        f"r{rank}": make_adapter(base, base.parent / f"{base.name}.r{rank}", seed=rank, rank=rank, **kwargs)
        for rank in ranks
    }


def runner_of(llm: LLM) -> TorchRunner:
    runner = llm._engine._runner
    assert isinstance(runner, TorchRunner)
    return runner


def check(llm: LLM, base: Path, adapters: dict[str, Path], num_tokens: int) -> None:
    names = [None, *adapters]
    names = [names[i % len(names)] for i in range(len(PROMPTS))]
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params, names)
    for name in dict.fromkeys(names):
        texts = [Text(o.prompt_token_ids, o.token_ids) for o in outputs if o.adapter == name]
        assert_greedy(base, adapters[name] if name else None, texts)


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=pytest.mark.slow) if arch in MORE else arch for arch in (*FUSED, *OTHERS)]
)
def test_text_is_transformers_text(arch: str, bases: Path) -> None:
    base = make_base(arch, bases / arch, num_hidden_layers=2)
    adapters = adapters_of(base, (2, 4, 8), target_modules="all-linear")
    llm = LLM(base, adapters, **SETTINGS)
    kinds = [type(module).__name__ for module in runner_of(llm).loaded.model.modules()]
    assert ("TritonDecoder" in kinds) == (arch in FUSED)
    check(llm, base, adapters, 3)


@pytest.mark.parametrize(("block_size", "adapter_dtype"), [(1, "auto"), (16, "int8")])
def test_adapters_in_pages_of_the_kv_cache_say_what_peft_says(block_size: int, adapter_dtype: str, bases: Path) -> None:
    """With tensors larger than a page, and with pages that hold several; of codes, with the same codes in PEFT."""
    base = make_base("llama", bases / "one-layer-in-pages", num_hidden_layers=1)
    adapters = adapters_of(base, (2, 8), target_modules="all-linear")
    settings = {**SETTINGS, "adapter_memory": "pages", "block_size": block_size, "adapter_dtype": adapter_dtype}
    llm = LLM(base, adapters, **settings)
    if adapter_dtype == "int8":
        adapters = {name: round_adapter(folder, base.parent / f"{name}.rounded") for name, folder in adapters.items()}
    check(llm, base, adapters, 3)
    assert llm.stats().adapter_pages > 0
    assert llm.stats().total_load_waits == 0


def recorded(llm: LLM) -> DecodeGraphs:
    """Give an engine recorded decode steps, where there is no GPU to record them."""
    runner = runner_of(llm)
    if runner._graphs is None:
        backend, lora = runner._backend, runner._batch.kernels
        assert isinstance(backend, TritonAttention)
        assert isinstance(lora, TritonLora)
        runner._graphs = DecodeGraphs(runner.loaded, backend, lora, 4, 10, tape.record)
        with torch.inference_mode():
            assert runner._graphs.record_all()
    return runner._graphs


def test_recorded_steps_give_the_same_text_for_adapters_that_came_later(bases: Path) -> None:
    """Recorded before any adapter was there; one is of a larger rank than the recordings have scratch for."""
    base = make_base("llama", bases / "one-layer", num_hidden_layers=1)
    adapters = adapters_of(base, (3, 70), target_modules="all-linear")
    llm = LLM(base, adapters, **SETTINGS)
    graphs = recorded(llm)
    assert {rows for rows, _ in graphs._replays} == {1, 2, 4}
    calls: list[int] = []
    logits = graphs.logits
    graphs.logits = lambda inputs: calls.append(len(inputs.samples)) or logits(inputs)  # type: ignore[method-assign]
    check(llm, base, adapters, 5)
    assert 4 in calls  # all four decoded by one recorded step


def test_recorded_steps_over_a_quantized_cache_give_the_text_of_plain_torch(bases: Path) -> None:
    base = make_base("llama", bases / "one-layer", num_hidden_layers=1)
    adapters = adapters_of(base, (3,), target_modules="all-linear")
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    texts = []
    for kernels in ("triton", "torch"):
        llm = LLM(base, adapters, **{**SETTINGS, "kernels": kernels, "kv_cache_dtype": "int8"})
        if kernels == "triton":
            recorded(llm)
        outputs = llm.generate(PROMPTS, params, [None, "r3", None, "r3"])
        texts.append([output.token_ids for output in outputs])
    assert texts[0] == texts[1]


def test_steps_with_lora_on_the_embedding_are_not_replayed(bases: Path) -> None:
    base = make_base("llama", bases / "one-layer", num_hidden_layers=1)
    adapters = adapters_of(base, (2,), target_modules=["embed_tokens", "q_proj"])
    llm = LLM(base, adapters, **SETTINGS)
    graphs = recorded(llm)
    graphs.logits = pytest.fail  # type: ignore[method-assign]
    prompts = [[7, 8], [9]]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True), ["r2", "r2"])
    assert_greedy(base, adapters["r2"], [Text(o.prompt_token_ids, o.token_ids) for o in outputs])


def test_a_model_that_cannot_be_recorded_runs_without(bases: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = make_base("llama", bases / "one-layer", num_hidden_layers=1)
    runner = runner_of(LLM(base, **SETTINGS))

    def refuse(step: object) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = DecodeGraphs(runner.loaded, runner._backend, None, 4, 10, refuse)  # type: ignore[arg-type]
    assert not graphs.record_all()
    assert "decode steps run without CUDA graphs: recording one failed: operation not permitted" in caplog.text


def test_buckets_end_with_the_most_rows_there_can_be() -> None:
    assert buckets(1) == (1,)
    assert buckets(6) == (1, 2, 4, 6)
    assert buckets(100) == (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100)


@pytest.mark.skipif(DEVICE.type == "cuda", reason="about machines without a GPU")
def test_without_a_gpu_the_kernels_are_refused_with_the_remedy(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base("llama", bases / "one-layer", num_hidden_layers=1)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        ConfigError, match=r"kernels='triton' cannot be had: they run on a GPU .* use 'auto' or 'torch'"
    ):
        LLM(base, kernels="triton")
