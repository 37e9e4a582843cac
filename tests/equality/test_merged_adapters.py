"""Merged adapters say what the base says with their products added to its weights, in one batch with others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from engine import LLM, SamplingParams
from engine.lora.merging import merge_key, merged
from tests.equality.conftest import Zoo
from tests.equality.oracle import Text, assert_greedy
from tests.support.tiny_model import reference_model

FEATURES: dict[str, dict[str, Any]] = {  # ranks, scalings and sites of all kinds
    "r1": {"rank": 1},
    "r8 rank-stabilized": {"rank": 8, "use_rslora": True},
    "patterns": {"rank": 4, "rank_pattern": {"q_proj": 3, "down_proj": 17}, "alpha_pattern": {"q_proj": 3}},
    "embedding and head": {"rank": 5, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "attention": {"rank": 6, "target_modules": ["q_proj", "o_proj"]},
}
MERGES: dict[str, dict[str, float]] = {
    "two": {"r1": 0.5, "r8 rank-stabilized": 0.5},
    "uneven": {"r1": 1.25, "patterns": -0.5, "attention": 0.3},
    "all": {"r1": 0.4, "r8 rank-stabilized": 0.1, "patterns": 0.3, "embedding and head": 0.7, "attention": -0.2},
    "one, less of it": {"patterns": 0.6},
    "none": {"r1": 0.0, "patterns": 0.0},
}
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=0)


def added(base: Path, adapters: dict[str, Path], weights: dict[str, float], target: Path) -> Path:
    """A checkpoint like `base` with W + sum of weight * scaling * B A, in plain torch on what PEFT reads."""
    if target.exists():
        return target
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in weights.items():
            of_peft: Any = reference_model(base, adapters[name])
            for module_name, module in of_peft.base_model.model.named_modules():
                if isinstance(module, LoraLayer):
                    delta = module.get_delta_weight("default")
                    model.get_submodule(module_name).weight += weight * delta
    model.save_pretrained(target)
    for file in base.glob("tokenizer*"):
        (target / file.name).write_bytes(file.read_bytes())
    return target


def add_merge(llm: LLM, name: str, weights: dict[str, float]) -> None:
    images = llm._images
    key = merge_key((images[part].key, weight) for part, weight in weights.items())
    parts = [(images[part], weight) for part, weight in weights.items()]
    images[name] = merged(key, parts, llm._engine.image_spec)


@pytest.mark.parametrize(
    "settings",
    [{}, {"kernels": "torch"}, {"adapter_memory": "pages", "block_size": 4, "pipeline_depth": 2}],
    ids=str,
)
def test_merges_parts_and_the_base_in_one_batch_say_what_the_weights_say(
    settings: dict[str, Any], zoo: Zoo, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = zoo.base("llama")
    adapters = {
        name: zoo.adapter(base, f"merged_{name.replace(' ', '_')}", seed, **arguments)
        for seed, (name, arguments) in enumerate(FEATURES.items(), start=80)
    }
    llm = LLM(base, adapters, num_threads=1, max_num_seqs=8, max_resident_adapters=6, **settings)
    for name, weights in MERGES.items():
        add_merge(llm, name, weights)
    names = [*MERGES, None, "r1", "embedding and head"] * 2
    outputs = llm.generate([prompts[i % 6] for i in range(len(names))], GREEDY, names)
    for output in outputs:
        text = Text(output.prompt_token_ids, output.token_ids)
        if output.adapter not in MERGES:
            assert_greedy(base, adapters[output.adapter] if output.adapter else None, [text])
            continue
        target = base.with_name(f"{base.name}-merged-{output.adapter.replace(' ', '_')}")
        dense = added(base, adapters, MERGES[output.adapter], target)
        assert_greedy(dense, None, [text])
        assert_logprobs(dense, text, [item.logprob for item in output.logprobs or ()])


@torch.no_grad()
def assert_logprobs(dense: Path, text: Text, found: list[float]) -> None:
    ids = torch.tensor([[*text.prompt, *text.output]])
    logits = reference_model(dense, None)(input_ids=ids).logits[0, len(text.prompt) - 1 : -1]
    expected = logits.double().log_softmax(-1).gather(1, torch.tensor(text.output)[:, None])[:, 0]
    assert torch.tensor(found, dtype=torch.float64).sub(expected).abs().max() < 2e-4


@pytest.mark.parametrize("arch", ["gpt2", "gemma3"])
def test_merges_of_other_architectures_say_what_the_weights_say(arch: str, zoo: Zoo, prompts: list[list[int]]) -> None:
    """Conv1D, whose weights are stored the other way round; tied embeddings and norms of another kind."""
    base = zoo.base(arch)
    adapters = {
        name: zoo.adapter(base, f"merged_{name}", seed, rank=seed - 88) for seed, name in ((90, "a"), (95, "b"))
    }
    llm = LLM(base, adapters, num_threads=1, max_num_seqs=8)
    weights = {"a": 0.75, "b": -0.4}
    add_merge(llm, "both", weights)
    outputs = llm.generate(prompts[:4], GREEDY, "both")
    dense = added(base, adapters, weights, base.with_name(f"{base.name}-merged"))
    assert_greedy(dense, None, [Text(output.prompt_token_ids, output.token_ids) for output in outputs])
