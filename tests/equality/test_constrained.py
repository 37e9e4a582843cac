"""An answer under a grammar is a function of its request, as every other: of no neighbour, plan, guess or move.

Tiny models, real adapters; constrained rows beside free ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine import FinishReason, SamplingParams
from engine.grammar.spec import GrammarSpec
from engine.output import OutputProcessor
from tests.equality.conftest import Zoo
from tests.equality.oracle import block_bytes
from tests.equality.test_invariance import essence, make_engine, make_llm, replay, request, run

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "colours": {"type": "array", "items": {"enum": ["red", "blue"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "colours"],
    "additionalProperties": False,
}
GRAMMARS = [
    GrammarSpec("json_schema", json.dumps(SCHEMA)),
    GrammarSpec("regex", "[a-f]{3,9}(-[0-9]{4}){1,2}"),
    GrammarSpec("choice", '["yes, of course", "no", "yes, but not today"]'),
    None,
]
EOS = 258
PLAIN = SamplingParams(max_tokens=80, temperature=0.9, top_k=50, top_p=0.95, min_tokens=3, logprobs=1)
# What of the sampler's state changes with every token.
CHANGING = replace(PLAIN, presence_penalty=0.5, repetition_penalty=1.1, bad_words_token_ids=((97, 98), (120,)))


@pytest.fixture
def base(zoo: Zoo) -> Path:
    return zoo.base("llama")


@pytest.fixture
def adapters(zoo: Zoo, base: Path) -> dict[str, Path]:
    return zoo.three_adapters(base)


def _params(count: int, like: SamplingParams = PLAIN, **changes: Any) -> list[SamplingParams]:
    return [
        replace(like, seed=i, temperature=0.0 if i % 3 == 2 else 0.9, grammar=GRAMMARS[i % len(GRAMMARS)], **changes)
        for i in range(count)
    ]


_as_usual: dict[str, list[Any]] = {}


@pytest.mark.parametrize("kind", ["plain", "changing"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pipeline_depth": 3, "enable_prefix_caching": False},
        {"max_num_batched_tokens": 8},
        {"max_num_seqs": 2},
        {"kv_cache_bytes": 48, "max_model_len": 144, "pipeline_depth": 2},  # blocks
    ],
    ids=str,
)
def test_constrained_texts_do_not_depend_on_scheduling(
    settings: dict[str, Any], kind: str, base: Path, adapters: dict[str, Path], prompts: list[list[int]]
) -> None:
    params = _params(len(prompts), CHANGING if kind == "changing" else PLAIN)
    names = [None, *adapters, None, *adapters]
    if kind not in _as_usual:
        alone = [
            make_llm(base, adapters).generate([p], q, n)[0] for p, q, n in zip(prompts, params, names, strict=True)
        ]
        _as_usual[kind] = essence(alone)
    scarce = "kv_cache_bytes" in settings
    if scarce:
        settings = {**settings, "kv_cache_bytes": settings["kv_cache_bytes"] * block_bytes(base, 4)}
    llm = make_llm(base, adapters, **settings)
    outputs = llm.generate(prompts, params, names)
    assert essence(outputs) == _as_usual[kind]
    assert (llm.stats().total_preemptions > 0) == scarce
    for output, asked in zip(outputs, params, strict=True):
        assert output.error is None
        if asked.grammar is not None:
            assert output.finish_reason is FinishReason.STOP
            assert len(output.logprobs or ()) == len(output.token_ids)


def test_what_is_forced_is_guessed_and_guessing_changes_nothing(
    base: Path, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    params = _params(len(prompts))
    llm = make_llm(base)
    guessed = llm.generate(prompts, params)
    assert llm.stats().total_guessed_right_tokens > 20
    num_wrong = llm.stats().total_guessed_tokens - llm.stats().total_guessed_right_tokens
    assert num_wrong <= len(prompts), (
        "what is forced comes; the guess that ends an answer has nothing behind it to count"
    )
    both = make_llm(base).generate(prompts, [replace(p, prompt_lookup_num_tokens=5) for p in params])
    monkeypatch.setattr("engine.grammar.matcher.MAX_FORCED", 0)
    llm = make_llm(base)
    plain = llm.generate(prompts, params)
    assert llm.stats().total_guessed_tokens == 0
    assert essence(guessed) == essence(plain) == essence(both)


def test_samples_of_one_constrained_request_are_those_of_single_requests(base: Path, prompts: list[list[int]]) -> None:
    engine = make_engine(base)
    params = replace(PLAIN, grammar=GRAMMARS[1])
    together = run(engine, [request(prompts[4], replace(params, n=3), "all")])
    singles = run(engine, [request(prompts[4], params, f"{i}", sample_index=i) for i in range(3)])
    said = {together["all", i].text for i in range(3)}
    assert said == {singles[f"{i}", i].text for i in range(3)}
    assert len(said) == 3


@pytest.mark.parametrize("grammar", GRAMMARS[:3], ids=lambda spec: spec.kind)
@pytest.mark.parametrize("like", [PLAIN, CHANGING], ids=["plain", "changing"])
def test_a_constrained_answer_goes_on_elsewhere_from_every_token(
    grammar: GrammarSpec, like: SamplingParams, base: Path, prompts: list[list[int]]
) -> None:
    params = replace(like, grammar=grammar)
    here, there = make_engine(base), make_engine(base, block_size=16)
    whole = run(here, [request(prompts[5], params)])["r", 0]
    assert whole.finish_reason is FinishReason.STOP
    cuts = range(1, len(whole.token_ids) + 1)
    shown = {
        cut: replay(OutputProcessor(here.tokenizer), request(prompts[5], params), whole.token_ids[:cut]) for cut in cuts
    }
    moved = [request(prompts[5], params, f"{cut}", resumed_output_token_ids=whole.token_ids[:cut]) for cut in cuts]
    rest = run(there, moved)
    for cut in cuts:
        after = rest[f"{cut}", 0]
        assert whole.token_ids[:cut] + after.token_ids == whole.token_ids, cut
        assert shown[cut] + after.text == whole.text, cut
        assert after.finish_reason is FinishReason.STOP, cut


def _ends(base: Path, prompt: Sequence[int], **fields: Any) -> Any:
    return make_llm(base).generate([list(prompt)], SamplingParams(**{"max_tokens": 40, "seed": 1, **fields}))[0]


def test_where_a_grammar_ends_the_answer_ends(base: Path, prompts: list[list[int]]) -> None:
    choice = GrammarSpec("choice", '["yes, of course", "no", "yes, but not today"]')
    longest = {"max_tokens": len("yes, but not today"), "logit_bias": {ord("b"): 50.0}}
    for fields in ({}, {"ignore_eos": True}, {"min_tokens": 30}, {"logit_bias": {EOS: -100.0}}, longest):
        output = _ends(base, prompts[0], grammar=choice, **fields)
        assert output.text in json.loads(choice.text), fields
        assert output.finish_reason is FinishReason.STOP
    # Its text may end here or go on: an end-of-sequence token says which, and min_tokens asks for more.
    more = _ends(base, prompts[0], grammar=GrammarSpec("regex", "[ab]*"), min_tokens=12, temperature=1.0)
    assert len(more.text) >= 12
    assert set(more.text) <= {"a", "b"}
    cut = _ends(base, prompts[0], grammar=GrammarSpec("regex", "[ab]{60}"))
    assert (cut.finish_reason, len(cut.token_ids)) == (FinishReason.LENGTH, 40)


def test_where_nothing_is_left_the_request_alone_fails_by_name(base: Path, prompts: list[list[int]]) -> None:
    choice = GRAMMARS[2]
    dead = [
        {"allowed_token_ids": (65, 66)},
        {"bad_words_token_ids": ((ord("y"),), (ord("n"),))},
        {"bad_words_token_ids": ((ord("y"),), (ord("n"), ord("o")))},
    ]
    params = [SamplingParams(max_tokens=20, seed=1, grammar=choice, **fields) for fields in dead]
    params.append(SamplingParams(max_tokens=20, seed=1, grammar=choice))
    *failed, fine = make_llm(base).generate(prompts[: len(params)], params)
    for output in failed:
        assert output.finish_reason is FinishReason.ERROR
        assert output.error is not None
        assert "grammar lets no token follow" in output.error.message
    assert fine.finish_reason is FinishReason.STOP
    assert (failed[0].text, failed[2].text) == ("", "n")


def test_a_grammar_that_becomes_too_complex_fails_its_request_alone(base: Path, prompts: list[list[int]]) -> None:
    hostile = GrammarSpec("regex", ".*" * 500)
    params = [SamplingParams(max_tokens=30, seed=1, grammar=spec) for spec in (hostile, GRAMMARS[2])]
    bad, good = make_llm(base).generate(prompts[:2], params)
    assert bad.error is not None
    assert "too complex" in bad.error.message
    assert good.finish_reason is FinishReason.STOP
