"""A model that knows nothing of tools, told that it must call one: every answer is a call that follows its schema."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema
import pytest

from deployments.dialects.events import Begin
from deployments.dialects.forced import ListReader, schema_of_arguments, schema_of_calls
from engine import LLM, FinishReason, SamplingParams
from engine.grammar.spec import GrammarSpec
from tests.dialects.conversations import calls_of, read
from tests.support.schemas import Schema, random_schema
from tests.support.tiny_model import make_base

NUM_REQUESTS = 24


def _parameters(rng: random.Random) -> Schema:
    """An object's schema, with definitions of its own."""
    fields = {f"field{i}": random_schema(rng, 1) for i in range(rng.randint(1, 3))}
    fields = {name: schema for name, schema in fields.items() if "$defs" not in schema}
    return {
        "type": "object",
        "properties": {**fields, "leaf": {"$ref": "#/$defs/leaf"}},
        "required": [*fields, "leaf"],
        "additionalProperties": False,
        "$defs": {"leaf": {"type": "integer", "minimum": 0, "maximum": 99}},
    }


@pytest.mark.parametrize("several", [True, False])
def test_every_answer_is_a_call_of_one_of_the_tools(several: bool, tmp_path: Path) -> None:
    base = make_base("llama", tmp_path / "base", max_position_embeddings=1024)
    llm = LLM(base, max_num_seqs=NUM_REQUESTS, num_threads=1, max_model_len=1024)
    rngs = [random.Random(seed) for seed in range(NUM_REQUESTS)]
    tools = [{"first_tool": _parameters(rng), "second": _parameters(rng), "third.tool": None} for rng in rngs]
    specs = [GrammarSpec("json_schema", json.dumps(schema_of_calls(t, several=several)), "tools") for t in tools]
    params = [
        SamplingParams(max_tokens=900, temperature=float(i % 2), seed=i, grammar=spec, logit_bias={ord(","): -30.0})
        for i, spec in enumerate(specs)
    ]
    for offered, output in zip(tools, llm.generate([[65 + i] for i in range(NUM_REQUESTS)], params), strict=True):
        assert output.finish_reason is FinishReason.STOP, output.text
        events = read(ListReader(), output.text)
        calls = calls_of(events)
        assert len(calls) == sum(isinstance(event, Begin) for event in events) >= 1
        assert several or len(calls) == 1
        for name, arguments in calls:
            jsonschema.validate(arguments, schema_of_arguments(offered[name]), jsonschema.Draft202012Validator)
