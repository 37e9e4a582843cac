"""Every answer under a schema parses and follows it, whatever the model would rather say."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest

from engine import LLM, FinishReason, SamplingParams
from engine.grammar.spec import GrammarSpec
from tests.support.schemas import Schema, random_schema
from tests.support.tiny_model import make_base

SEEDS_BY_DEFAULT, SEEDS_IN_ALL = 60, 1100


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = make_base("llama", tmp_path_factory.mktemp("model") / "base", max_position_embeddings=2048)
    return LLM(folder, max_num_seqs=32, num_threads=1, max_model_len=1024)


def _spec(schema: Schema) -> GrammarSpec:
    return GrammarSpec("json_schema", json.dumps(schema))


def _check(llm: LLM, seeds: range) -> None:
    schemas = [random_schema(random.Random(seed)) for seed in seeds for _ in range(2)]
    params = [
        SamplingParams(max_tokens=1000, temperature=float(i % 2), seed=i, grammar=_spec(schema))
        for i, schema in enumerate(schemas)
    ]
    outputs = llm.generate([[257, 65 + i % 26] for i in range(len(schemas))], params)
    for schema, output in zip(schemas, outputs, strict=True):
        assert output.error is None, (schema, output.error)
        assert output.finish_reason is FinishReason.STOP, (schema, output.text)
        jsonschema.validate(json.loads(output.text), schema, jsonschema.Draft202012Validator)


def test_answers_follow_schemas_greedy_and_sampled(llm: LLM) -> None:
    _check(llm, range(SEEDS_BY_DEFAULT))
    stats = llm.stats()
    assert stats.total_guessed_right_tokens > 0, "what a schema forces is guessed"


@pytest.mark.slow
def test_answers_follow_a_thousand_schemas(llm: LLM) -> None:
    _check(llm, range(SEEDS_BY_DEFAULT, SEEDS_IN_ALL))
