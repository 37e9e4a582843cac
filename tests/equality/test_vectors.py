"""Pooled vectors are made of transformers' hidden states, and log-probabilities are those of its logits."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from engine import LLM, AsyncEngine, Engine, EngineConfig, FinishReason, Request, SamplingParams
from engine.checkpoint.pooling import pooling_defaults
from engine.errors import ConfigError, InvalidRequest, PromptTooLong
from engine.pooling import NextToken, Pool, Pooling, PoolingDefaults, as_floats
from engine.request import OutputDelta
from tests.equality.conftest import Zoo
from tests.equality.oracle import Text, assert_greedy, block_bytes
from tests.support.tiny_model import reference_model

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral")
ASKED = (7, 200, 0, 258, 31)
SETTINGS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks of 8, pages of 4, plain kernels": {"max_num_batched_tokens": 8, "block_size": 4, "kernels": "torch"},
    "two plans in flight, adapters in pages": {
        "pipeline_depth": 2, "max_num_batched_tokens": 24, "adapter_memory": "pages", "block_size": 4,
    },
}  # fmt: skip


@torch.no_grad()
def hidden_and_logits(base: Path, adapter: Path | None, prompt: list[int]) -> tuple[Tensor, Tensor]:
    """[T, H] after the final norm, [V] of the last token: each prompt alone, without cache."""
    output = reference_model(base, adapter)(input_ids=torch.tensor([prompt]), output_hidden_states=True)
    return output.hidden_states[-1][0], output.logits[0, -1]


def pooled(hidden: Tensor, pool: Pool, *, normalize: bool) -> Tensor:
    vector = {Pool.LAST: hidden[-1], Pool.CLS: hidden[0], Pool.MEAN: hidden.mean(dim=0)}[pool]
    return functional.normalize(vector, dim=0) if normalize else vector


def largest_difference(embedding: tuple[float, ...], expected: Tensor) -> float:
    """As a share of the largest number, where that is above 1."""
    assert len(embedding) == len(expected)
    return float((torch.tensor(embedding) - expected).abs().max() / expected.abs().max().clamp(min=1))


def assert_alike(logprobs: tuple[float, ...], logits: Tensor) -> None:
    """Of ASKED. Logits reach twenty here, of which float32 holds five digits behind the point."""
    expected = logits.log_softmax(-1)[list(ASKED)]
    assert torch.tensor(logprobs).exp().tolist() == pytest.approx(expected.exp().tolist(), abs=1e-5)
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def names_for(prompts: list[list[int]], adapters: dict[str, Path]) -> list[str | None]:
    names = [None, *adapters]
    return [names[i % len(names)] for i in range(len(prompts))]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_vectors_are_those_of_transformers_however_the_rows_are_cut(
    arch: str, setting: str, zoo: Zoo, prompts: list[list[int]]
) -> None:
    base = zoo.base(arch)
    check(base, zoo.three_adapters(base), prompts, SETTINGS[setting])


@pytest.mark.parametrize("arch", ARCHITECTURES[1:])
def test_vectors_are_those_of_transformers_for_many_architectures(
    arch: str, zoo: Zoo, prompts: list[list[int]]
) -> None:
    base = zoo.base(arch)
    check(base, zoo.three_adapters(base), prompts, {"max_num_batched_tokens": 40})


def check(base: Path, adapters: dict[str, Path], prompts: list[list[int]], settings: dict[str, Any]) -> None:
    llm = LLM(base, adapters, max_num_seqs=8, num_threads=1, **settings)
    names = names_for(prompts, adapters)
    expected = [
        hidden_and_logits(base, adapters[name] if name else None, prompt)
        for name, prompt in zip(names, prompts, strict=True)
    ]
    for pool in Pool:
        for normalize in (True, False):
            outputs = llm.embed(prompts, names, pool=pool, normalize=normalize)
            for output, (hidden, _) in zip(outputs, expected, strict=True):
                right = pooled(hidden, pool, normalize=normalize)
                assert largest_difference(output.embedding, right) < 1e-5, (pool, len(output.prompt_token_ids))
    found = llm.next_token_logprobs(prompts, ASKED, names)
    for logprobs, (_, logits) in zip(found, expected, strict=True):
        assert_alike(logprobs, logits)


def test_texts_and_vectors_in_one_batch_are_what_they_are_alone(zoo: Zoo, prompts: list[list[int]]) -> None:
    """Rows that sample, rows that pool and rows that give logits, of the base and of adapters, in the same steps."""
    base = zoo.base("llama")
    adapters = zoo.three_adapters(base)
    llm = LLM(base, adapters, max_num_seqs=24, max_num_batched_tokens=48, num_threads=1)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)
    names = names_for(prompts, adapters)
    jobs = [llm._job(prompt, params, name) for prompt, name in zip(prompts, names, strict=True)]
    one = SamplingParams(max_tokens=1)
    pooling = llm._pooling.pooling(pool=Pool.MEAN)
    vectors = [llm._job(prompt, one, name, pooling) for prompt, name in zip(prompts, names, strict=True)]
    scores = [llm._job(p, one, name, NextToken(token_ids=ASKED)) for p, name in zip(prompts, names, strict=True)]
    mixed = [job for group in zip(jobs, vectors, scores, strict=True) for job in group]
    metrics = llm._run(mixed, use_tqdm=False)
    for name in dict.fromkeys(names):
        outputs = [job.output(metrics[job.request.request_id]) for job in jobs if job.adapter == name]
        texts = [Text(output.prompt_token_ids, output.token_ids) for output in outputs]
        assert_greedy(base, adapters[name] if name else None, texts)
    for name, prompt, vector, score in zip(names, prompts, vectors, scores, strict=True):
        hidden, logits = hidden_and_logits(base, adapters[name] if name else None, prompt)
        assert largest_difference(vector.vector()[0], pooled(hidden, Pool.MEAN, normalize=True)) < 1e-5
        assert_alike(score.vector()[0], logits)


def test_adapters_of_the_output_layer_count_for_log_probabilities(zoo: Zoo, prompts: list[list[int]]) -> None:
    """Beside rows that sample, with other adapters and with none."""
    base = zoo.base("llama")
    adapters = {
        name: zoo.adapter(base, name, seed, rank=4, target_modules=["lm_head", "q_proj"])
        for name, seed in (("head1", 21), ("head2", 22))
    }
    llm = LLM(base, adapters, max_num_seqs=24, max_num_batched_tokens=48, num_threads=1)
    names = names_for(prompts, adapters)
    params, asked = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True), NextToken(token_ids=ASKED)
    pairs = [
        (llm._job(prompt, params, name), llm._job(prompt, params, name, asked))
        for prompt, name in zip(prompts, names, strict=True)
    ]
    llm._run([job for pair in pairs for job in pair], use_tqdm=False)
    for prompt, name, (_, score) in zip(prompts, names, pairs, strict=True):
        assert_alike(score.vector()[0], hidden_and_logits(base, adapters[name] if name else None, prompt)[1])


def test_preempted_sequences_and_cached_prefixes_change_no_vector(zoo: Zoo) -> None:
    """A mean needs the rows that a cached prefix would spare; the last token does not."""
    base = zoo.base("llama")
    rng = random.Random(3)
    shared = [rng.randrange(256) for _ in range(32)]
    long = [shared + [rng.randrange(256) for _ in range(28)] for _ in range(8)]
    blocks = 24 * block_bytes(base, 4)
    llm = LLM(base, max_num_seqs=8, block_size=4, max_model_len=92, kv_cache_bytes=blocks, num_threads=1)
    llm.generate([prompt[:30] for prompt in long], SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
    assert llm.stats().total_preemptions > 0
    for pool in (Pool.MEAN, Pool.LAST):
        before = llm.stats().total_prefix_hit_tokens
        outputs = [llm.embed(prompt, pool=pool)[0] for prompt in long]
        assert (llm.stats().total_prefix_hit_tokens > before) == (pool is Pool.LAST)
        for prompt, output in zip(long, outputs, strict=True):
            expected = pooled(hidden_and_logits(base, None, prompt)[0], pool, normalize=True)
            assert largest_difference(output.embedding, expected) < 1e-5


def test_a_prompt_may_fill_the_whole_context_and_no_more(zoo: Zoo) -> None:
    llm = LLM(zoo.base("llama"), max_model_len=32, num_threads=1)
    (output,) = llm.embed(list(range(32)))
    assert output.error is None
    assert len(output.embedding) == 32
    with pytest.raises(PromptTooLong, match="shorten the prompt to 32"):
        llm.embed(list(range(33)))


def test_wrong_asks_are_refused_by_name(zoo: Zoo) -> None:
    llm = LLM(zoo.base("llama"), num_threads=1)
    with pytest.raises(InvalidRequest, match="dimensions: 8: this model was not trained"):
        llm.embed("abc", dimensions=8)
    with pytest.raises(InvalidRequest, match="token_ids: token id 259 is outside the vocabulary"):
        llm.next_token_logprobs("abc", [259])
    with pytest.raises(InvalidRequest, match="token_ids: 0 token ids"):
        llm.next_token_logprobs("abc", [])
    with pytest.raises(InvalidRequest, match="pool: 'max' is none of the ways"):
        llm.embed("abc", pool="max")  # type: ignore[arg-type]


def test_event_loops_get_the_vector_in_one_delta_and_a_first_answer_is_counted(zoo: Zoo) -> None:
    base = zoo.base("llama")
    prompt = (5, 6, 7, 8, 9)
    engine = AsyncEngine(Engine(EngineConfig(model=str(base), num_threads=1)))
    request = Request(
        request_id="r", prompt_token_ids=prompt, params=SamplingParams(max_tokens=1), seed=0, numbers=Pooling()
    )

    async def ask() -> list[OutputDelta]:
        async with asyncio.timeout(60):
            return [delta async for delta in engine.generate(request)]

    try:
        deltas = asyncio.run(ask())
        assert engine.stats().total_ttft_s > 0
    finally:
        engine.close()
    (delta,) = deltas
    assert (delta.token_ids, delta.text, delta.finish_reason) == ((), "", FinishReason.STOP)
    assert delta.vector is not None
    expected = pooled(hidden_and_logits(base, None, list(prompt))[0], Pool.LAST, normalize=True)
    assert largest_difference(as_floats(delta.vector), expected) < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": SamplingParams(n=2)}, "n: 2 samples, but a request for numbers has one answer"),
        ({"resumed_output_token_ids": (1,)}, "resumed_output_token_ids: a request for numbers has no output"),
        ({"params": SamplingParams(prompt_lookup_num_tokens=2)}, "prompt_lookup_num_tokens: a request for numbers has"),
        ({"numbers": "mean"}, "numbers: 'mean' is neither a Pooling, a NextToken nor PromptScores"),
    ],
)
def test_a_request_for_numbers_that_contradicts_itself_is_refused(changes: dict[str, Any], message: str) -> None:
    fields = {"request_id": "r", "prompt_token_ids": (1,), "params": SamplingParams(), "seed": 0, "numbers": Pooling()}
    with pytest.raises(InvalidRequest, match=message):
        Request(**{**fields, **changes})


MODULES = [("0", "sentence_transformers.models.Transformer"), ("1_Pooling", "sentence_transformers.models.Pooling")]
NORMALIZE = ("2_Normalize", "sentence_transformers.models.Normalize")


def write_modules(folder: Path, modules: list[tuple[str, str]], **pooling: bool) -> Path:
    folder.mkdir(parents=True)
    (folder / "modules.json").write_text(json.dumps([{"path": path, "type": kind} for path, kind in modules]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **pooling}))
    return folder


def test_the_folder_says_how_its_states_are_pooled(tmp_path: Path) -> None:
    mean = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    assert pooling_defaults(tmp_path) == PoolingDefaults(Pool.LAST, normalize=True)
    plain = write_modules(tmp_path / "plain", MODULES, **mean)
    assert pooling_defaults(plain) == PoolingDefaults(Pool.MEAN, normalize=False)
    last = write_modules(tmp_path / "last", [*MODULES, NORMALIZE], pooling_mode_lasttoken=True)
    (last / "config.json").write_text(json.dumps({"is_matryoshka": True, "matryoshka_dimensions": [8, 16]}))
    defaults = pooling_defaults(last)
    assert defaults == PoolingDefaults(Pool.LAST, True, True, (8, 16))
    assert defaults.pooling(8) == Pooling(dimensions=8)
    with pytest.raises(InvalidRequest, match="dimensions: 9 is none of this model's: 8, 16"):
        defaults.pooling(9)


def test_a_folder_that_asks_for_what_is_not_served_is_refused_by_its_name(tmp_path: Path) -> None:
    none = write_modules(tmp_path / "none", MODULES)
    weighted = write_modules(tmp_path / "weighted", MODULES, pooling_mode_weightedmean_tokens=True)
    dense = write_modules(tmp_path / "dense", [MODULES[0], ("2_Dense", "sentence_transformers.models.Dense")])
    for folder, why in (
        (none, "its pooling is none"),
        (weighted, "its pooling is pooling_mode_weightedmean_tokens, and served is one of"),
        (dense, "the step 'Dense', which is not served"),
    ):
        with pytest.raises(InvalidRequest, match=f"model: no vectors are made of this model: .*{why}"):
            pooling_defaults(folder).pooling()
    (none / "modules.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        pooling_defaults(none)


def test_vectors_of_fewer_dimensions_are_cut_before_they_are_normalised(zoo: Zoo, tmp_path: Path) -> None:
    folder = tmp_path / "matryoshka"
    shutil.copytree(zoo.base("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"is_matryoshka": True}))
    llm = LLM(folder, num_threads=1)
    (output,) = llm.embed([1, 2, 3], dimensions=8)
    expected = functional.normalize(hidden_and_logits(zoo.base("llama"), None, [1, 2, 3])[0][-1][:8], dim=0)
    assert largest_difference(output.embedding, expected) < 1e-5
    with pytest.raises(InvalidRequest, match="dimensions: 33, but the model's vectors have 32"):
        llm.embed([1, 2, 3], dimensions=33)
