"""Every token is a function of the request alone: not of who else runs, of memory, of pipelines or of a move.

The engine is asked for real: a tiny model, real adapters. Sampled texts are compared with each other, token for token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import LLM, Engine, EngineConfig, FinishReason, Request, SamplingParams
from engine.core.plan import AdapterLoad, StepPlan
from engine.errors import PromptTooLong
from engine.llm import GenerationOutput
from engine.lora.image import AdapterImage
from engine.output import OutputProcessor, merge
from engine.request import OutputDelta
from engine.runner.runner import TorchRunner
from tests.equality.conftest import Zoo
from tests.equality.oracle import Text, assert_greedy, block_bytes

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
# Every kind of state that a sampler keeps.
SAMPLED = SamplingParams(
    max_tokens=24,
    temperature=0.9,
    top_k=50,
    top_p=0.95,
    min_p=0.01,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={65: 2.0},
    min_tokens=4,
    logprobs=2,
    typical_p=0.95,
    bad_words_token_ids=((70,), *((a, b) for a in range(60, 72) for b in range(0, 250, 13)), (65, 65, 65)),
)


@pytest.fixture
def base(zoo: Zoo) -> Path:
    return zoo.base("llama")


@pytest.fixture
def adapters(zoo: Zoo, base: Path) -> dict[str, Path]:
    return zoo.three_adapters(base)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """Every plan that a runner executes."""
    seen: list[StepPlan] = []
    submit = TorchRunner.submit

    def record(self: TorchRunner, plan: StepPlan) -> Any:
        seen.append(plan)
        return submit(self, plan)

    monkeypatch.setattr(TorchRunner, "submit", record)
    return seen


def make_llm(base: Path, adapters: dict[str, Path] | None = None, **settings: Any) -> LLM:
    return LLM(base, adapters, **{"max_num_seqs": 8, "block_size": 4, "num_threads": 1, **settings})


def make_engine(base: Path, **settings: Any) -> Engine:
    return Engine(
        EngineConfig(**{"model": str(base), "max_num_seqs": 8, "block_size": 4, "num_threads": 1, **settings})
    )


def request(prompt: Sequence[int], params: SamplingParams = SAMPLED, request_id: str = "r", **fields: Any) -> Request:
    return Request(request_id=request_id, prompt_token_ids=tuple(prompt), params=params, **{"seed": 11, **fields})


def run(engine: Engine, requests: Iterable[Request], images: Iterable[AdapterImage] = ()) -> dict[Any, OutputDelta]:
    """(request id, sample index) -> everything that sample said."""
    by_key = {image.key: image for image in images}
    processor = OutputProcessor(engine.tokenizer)
    deltas: dict[Any, list[OutputDelta]] = {}
    for item in requests:
        engine.add_request(item, by_key.get(item.adapter or ""))
        processor.open(item)
    while engine.has_work:
        for update in engine.step():
            delta = processor.process(update)
            if delta is not None:
                deltas.setdefault((delta.request_id, delta.sample_index), []).append(delta)
        for key in processor.take_finishes():
            engine.finish(*key, FinishReason.STOP)
    return {key: merge(parts) for key, parts in deltas.items()}


def essence(outputs: Sequence[GenerationOutput]) -> list[Any]:
    return [(output.token_ids, output.text, output.finish_reason) for output in outputs]


# ---- who else runs, and how it is scheduled

_as_usual: list[Any] = []  # what the prompts yield with the usual settings, once asked


def test_a_sampled_text_is_the_same_alone_and_in_a_batch(
    base: Path, adapters: dict[str, Path], prompts: list[list[int]]
) -> None:
    llm = make_llm(base, adapters)
    names = [None, *adapters, None, *adapters]
    params = [replace(SAMPLED, seed=i) for i in range(len(prompts))]
    together = llm.generate(prompts, params, names)
    assert len({output.token_ids for output in together}) == len(prompts)
    for i in (0, 3, 6):
        alone = make_llm(base, adapters).generate([prompts[i]], params[i], names[i])
        assert essence(alone) == essence([together[i]])


@pytest.mark.parametrize(
    "settings",
    [
        {"pipeline_depth": 2},
        {"pipeline_depth": 3, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 8},
        {"max_num_seqs": 2},
        {"block_size": 16},
        {"kv_cache_bytes": 48, "max_model_len": 96, "pipeline_depth": 2},  # blocks
    ],
    ids=str,
)
def test_sampled_texts_do_not_depend_on_scheduling(
    settings: dict[str, Any], base: Path, adapters: dict[str, Path], prompts: list[list[int]]
) -> None:
    params = [replace(SAMPLED, seed=i, max_tokens=32) for i in range(len(prompts))]
    names = [None, *adapters, None, *adapters]
    if not _as_usual:
        _as_usual.extend(essence(make_llm(base, adapters).generate(prompts, params, names)))
    if "kv_cache_bytes" in settings:
        settings = {**settings, "kv_cache_bytes": settings["kv_cache_bytes"] * block_bytes(base, 4)}
    llm = make_llm(base, adapters, **settings)
    assert essence(llm.generate(prompts, params, names)) == _as_usual
    assert (llm.stats().total_preemptions > 0) == ("kv_cache_bytes" in settings)


def test_pipelined_greedy_text_is_the_oracle_s(base: Path, adapters: dict[str, Path], prompts: list[list[int]]) -> None:
    llm = make_llm(base, adapters, pipeline_depth=2, max_num_batched_tokens=16)
    names = [None, *adapters] * 2
    outputs = llm.generate(prompts, GREEDY, names)
    for output in outputs:
        folder = adapters[output.adapter] if output.adapter else None
        assert_greedy(base, folder, [Text(output.prompt_token_ids, output.token_ids)])


@pytest.mark.parametrize("pipeline_depth", [1, 2])
def test_adapters_that_are_evicted_and_loaded_again_say_the_same(
    pipeline_depth: int, zoo: Zoo, base: Path, prompts: list[list[int]], plans: list[StepPlan]
) -> None:
    adapters = {name: zoo.adapter(base, name, seed, rank=4) for seed, name in enumerate("abc", start=40)}
    settings = {"max_num_seqs": 2, "max_resident_adapters": 8, "pipeline_depth": pipeline_depth}
    probe = make_llm(base, adapters, **settings)
    probe.generate([prompts[1]], GREEDY, "a")
    one_adapter_bytes = probe.stats().resident_adapter_bytes
    plans.clear()
    llm = make_llm(base, adapters, adapter_bytes=one_adapter_bytes, **settings)
    names = ["a", "b", "c", "a", "b", "c", None, "a"]
    outputs = llm.generate(prompts, GREEDY, names)
    # Those that wait for one adapter run together, so that each is loaded once; a second round needs them again.
    outputs += llm.generate(prompts, GREEDY, names)
    assert llm.stats().resident_adapter_bytes == one_adapter_bytes
    loads = [op.adapter for plan in plans for op in plan.adapter_ops if isinstance(op, AdapterLoad)]
    assert len(set(loads)) == 3
    assert len(loads) > 3
    for output in outputs:
        folder = adapters[output.adapter] if output.adapter else None
        assert_greedy(base, folder, [Text(output.prompt_token_ids, output.token_ids)])


# ---- samples and moves


def test_samples_of_one_request_are_those_of_single_requests(base: Path, prompts: list[list[int]]) -> None:
    engine = make_engine(base)
    together = run(engine, [request(prompts[4], replace(SAMPLED, n=3), "all")])
    singles = run(engine, [request(prompts[4], SAMPLED, f"{i}", sample_index=i) for i in range(3)])
    for i in range(3):
        one, same = together["all", i], singles[f"{i}", i]
        assert (one.token_ids, one.text, one.finish_reason) == (same.token_ids, same.text, same.finish_reason)
    assert len({together["all", i].token_ids for i in range(3)}) == 3


@pytest.mark.parametrize("cut", [1, 5, 17])
@pytest.mark.parametrize("kind", ["greedy", "sampled", "stop string"])
def test_a_request_that_moves_to_another_engine_goes_on_as_if_it_had_stayed(
    kind: str, cut: int, base: Path, prompts: list[list[int]]
) -> None:
    params = {"greedy": GREEDY, "sampled": SAMPLED, "stop string": SAMPLED}[kind]
    here = make_engine(base)
    if kind == "stop string":
        # Of the characters around the 18th token, so that it spans the cut at 17.
        text = run(here, [request(prompts[5], params)])["r", 0]
        start = len(here.tokenizer.decode(text.token_ids[:16]))
        stop = text.text[start : start + 3]
        params = replace(params, stop=(stop,))
    whole = run(here, [request(prompts[5], params)])["r", 0]
    assert (whole.stop_reason is not None) == (kind == "stop string")
    cut_ids = whole.token_ids[:cut]
    assert len(cut_ids) < len(whole.token_ids)
    first = OutputProcessor(here.tokenizer)
    shown = replay(first, request(prompts[5], params), cut_ids)
    there = make_engine(base, block_size=16)
    rest = run(there, [request(prompts[5], params, resumed_output_token_ids=cut_ids)])["r", 0]
    assert cut_ids + rest.token_ids == whole.token_ids
    assert shown + rest.text == whole.text
    assert (rest.finish_reason, rest.stop_reason) == (whole.finish_reason, whole.stop_reason)
    assert params.logprobs is None or [item.token_id for item in rest.logprobs or ()] == list(rest.token_ids)


def replay(processor: OutputProcessor, item: Request, token_ids: Sequence[int]) -> str:
    """The text that had been shown when a request was cut behind `token_ids`."""
    from engine.core.sequence import SequenceUpdate

    processor.open(item)
    updates = [SequenceUpdate(item.request_id, item.sample_index, (token_id,)) for token_id in token_ids]
    return "".join(delta.text for update in updates if (delta := processor.process(update)) is not None)


# ---- endings


def test_an_abort_frees_the_blocks_within_a_step(base: Path, prompts: list[list[int]]) -> None:
    engine = make_engine(base, enable_prefix_caching=False)
    free_blocks = engine.stats().free_blocks
    engine.add_request(request(prompts[7], replace(GREEDY, n=2, max_tokens=100), "gone"))
    for _ in range(4):
        engine.step()
    assert engine.stats().free_blocks < free_blocks
    engine.abort("gone")
    ends = [(update.sample_index, update.finish_reason) for update in engine.step()]
    assert ends == [(0, FinishReason.ABORT), (1, FinishReason.ABORT)]
    assert engine.stats().free_blocks == free_blocks
    assert not engine.has_work


def test_a_request_that_can_never_fit_fails_alone(base: Path, prompts: list[list[int]]) -> None:
    engine = make_engine(base, max_model_len=64)
    engine.add_request(request(prompts[3], GREEDY, "fits"))
    with pytest.raises(PromptTooLong, match="64"):
        engine.add_request(request([1] * 64, GREEDY, "never"))
    deltas = run(engine, [])
    assert deltas == {}  # nobody opened it for output, but it ran:
    assert dict(engine.take_ended())["fits"].num_output_tokens == 24


def test_a_prompt_and_its_output_may_fill_the_whole_context(base: Path, prompts: list[list[int]]) -> None:
    outputs = make_llm(base, max_model_len=64).generate([prompts[7]], replace(GREEDY, max_tokens=None))
    assert (len(outputs[0].token_ids), outputs[0].finish_reason) == (64 - len(prompts[7]), FinishReason.LENGTH)
    assert_greedy(base, None, [Text(outputs[0].prompt_token_ids, outputs[0].token_ids)])
