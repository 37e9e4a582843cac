"""What becomes of one family of causal language models: served as transformers and PEFT say, or refused, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.transformers_weight_conversion import _MODEL_TO_CONVERSION_PATTERN, _MOE_TARGET_MODULE_MAPPING
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from engine import LLM, SamplingParams
from engine.errors import EngineError
from engine.model.watch import is_derived_linear
from tests.support.tiny_architectures import tiny_config
from tests.support.tiny_model import _quiet_peft, _randomize, make_tokenizer

NUM_TOKENS = 12
NEAR_TIE = 1e-4
MAX_LEN = 96
PROMPTS = tuple([(7 * i + 31 * n) % 251 for i in range(n)] for n in (3, 17, 41))


@dataclass(frozen=True)
class Outcome:
    refused: str = ""  # the message; "": served
    differs: str = ""
    num_texts: int = 0
    num_adapted: int = 0  # layers with LoRA
    near_ties: int = 0


def make_family(family: str, folder: Path) -> Path:
    """A random checkpoint of a family, and a LoRA adapter of its linear layers in `folder/lora`."""
    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32).eval()
    _randomize(model, 0)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_lora(base: Path) -> tuple[Path, Any, int]:
    """A random adapter of all linear layers: its folder, PEFT's model of it, and of how many layers.

    The model is the one that was saved: PEFT does not find all keys of what it saves again, where it takes those of
    shared experts for experts'.
    """
    from peft import LoraConfig, get_peft_model

    names = linear_layers(base)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM")
    with _quiet_peft():
        model = get_peft_model(reference(base), lora).eval()
    generator = torch.Generator().manual_seed(29)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (0.5 if "_B" in name else 0.5 / math.sqrt(parameter.shape[-1])))
        with _quiet_peft():
            model.save_pretrained(base / "lora")
    return base / "lora", model, len(names)


def reference(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()


@torch.no_grad()
def linear_layers(base: Path) -> list[str]:
    """What PEFT's all-linear would target, of what text goes through: no layers of single experts, no output layer,
    none that only looks like a linear layer (PEFT fails on those)."""
    model = reference(base)
    called: set[str] = set()
    # PEFT takes names of the experts' former layers for those of the fused ones, wherever they are.
    taken = _MOE_TARGET_MODULE_MAPPING.get(_MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type), {})
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        is_one = isinstance(module, nn.Linear | Conv1D) and not is_derived_linear(module)
        if is_one and module is not head and ".experts." not in name:
            module.register_forward_hook(lambda *_, name=name: called.add(name) and None)
    model(input_ids=torch.arange(12)[None], use_cache=False)
    return sorted(name for name in called if name.rpartition(".")[2] not in taken)


def outcome(base: Path, kernels: str) -> Outcome:
    settings: dict[str, Any] = {
        "dtype": "float32", "num_threads": 1, "kv_cache_bytes": 1 << 23, "max_num_batched_tokens": 24,
        "max_num_seqs": 8, "max_model_len": MAX_LEN, "adapter_bytes": 1 << 22, "block_size": 4, "kernels": kernels,
    }  # fmt: skip
    try:
        llm = LLM(base, **settings)
    except EngineError as error:
        return Outcome(refused=f"{type(error).__name__}: {error}")
    adapter, adapted, num_adapted = make_lora(base)
    llm.add_adapter("lora", adapter)
    prompts = [*PROMPTS, *PROMPTS]
    names = [None] * len(PROMPTS) + ["lora"] * len(PROMPTS)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    outputs = llm.generate(prompts, params, names)
    ties = 0
    models = {None: reference(base), "lora": adapted}
    for output in outputs:
        wrong, near = _judge(models[output.adapter], output.prompt_token_ids, output.token_ids)
        if wrong:
            return Outcome(differs=f"{output.adapter or 'base'}, prompt of {len(output.prompt_token_ids)}: {wrong}")
        ties += near
    texts = {output.token_ids for output in outputs}
    assert len({token for text in texts for token in text}) > 3 < len(texts), f"the texts say too little: {texts}"
    return Outcome(num_texts=len(outputs), num_adapted=num_adapted, near_ties=ties)


@torch.no_grad()
def _judge(model: Any, prompt: tuple[int, ...], output: tuple[int, ...]) -> tuple[str, int]:
    if len(output) != NUM_TOKENS:
        return f"{len(output)} tokens", 0
    logits = model(input_ids=torch.tensor([[*prompt, *output]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    ties = 0
    for position, token in enumerate(output):
        best = logits[position].topk(2).values
        expected = int(logits[position].argmax())
        behind = float(best[0] - logits[position, token])
        if token != expected and behind >= NEAR_TIE:
            return f"token {position} is {token} instead of {expected}, {behind:.3g} behind", 0
        ties += token != expected
    return "", ties
