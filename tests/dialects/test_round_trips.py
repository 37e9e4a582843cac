"""The calls that a family's own template writes are the calls that are read, however the text is cut."""

from __future__ import annotations

import random

import pytest

from deployments.dialects.events import Text
from tests.dialects.conversations import (
    calls_of,
    dialect_of,
    random_calls,
    read,
    reader_of,
    tokenizer_of,
    written,
)

NUM_CONVERSATIONS = 60
# Template -> the form found in it, and the most calls that it writes in one answer.
FAMILIES = {
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": ("hermes", 3),
    "Qwen-Qwen2.5-7B-Instruct": ("hermes", 3),
    "Qwen-Qwen3-0.6B": ("hermes", 3),
    "Qwen-QwQ-32B": ("hermes", 3),
    "Qwen3-Coder": ("qwen3_coder", 3),
    "Qwen3.5-4B": ("qwen3_coder", 3),
    "meta-llama-Llama-3.1-8B-Instruct": ("llama3_json", 1),
    "meta-llama-Llama-3.3-70B-Instruct": ("llama3_json", 1),
    "mistralai-Mistral-Nemo-Instruct-2407": ("mistral", 3),
    "Mistral-Small-3.2-24B-Instruct-2506": ("mistral", 3),
    "openai-gpt-oss-120b": ("gpt_oss", 1),
    "deepseek-ai-DeepSeek-V3.1": ("deepseek", 3),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("deepseek", 3),
}


@pytest.mark.parametrize("template", FAMILIES)
def test_calls_come_back_as_they_were(template: str) -> None:
    form, most = FAMILIES[template]
    assert dialect_of(template).tools == form
    tokenizer = tokenizer_of(template)
    for seed in range(NUM_CONVERSATIONS):
        rng = random.Random(seed)
        calls = random_calls(rng, most)
        prompt, text = written(tokenizer, calls)
        wanted = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
        whole = read(reader_of(template, prompt), text)
        assert calls_of(whole) == wanted, text
        assert not [event for event in whole if isinstance(event, Text)], text
        for _ in range(3):
            assert read(reader_of(template, prompt), text, rng) == whole, text
