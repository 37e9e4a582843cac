"""Random tiny checkpoints of many architectures, random PEFT adapters for them, and transformers' own answers.

Weights are drawn larger than a model's usual initialisation, so that the argmax varies from token to token and its
lead over the runner-up is far above rounding. All in float32, on the CPU, a few hundred kilobytes each.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

NUM_BYTES = 256
PAD_ID, BOS_ID, EOS_ID = 256, 257, 258
VOCAB_SIZE = 259
MAX_MODEL_LEN = 256

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_LEN,
    "tie_word_embeddings": False,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}

# name -> (transformers model type, what differs from _COMMON)
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 2,
            "attn_logit_softcapping": 6.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 8,
            "sliding_window": 5,
            "num_hidden_layers": 4,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("phi3", {"num_key_value_heads": 4}),
    "gpt2": (
        "gpt2",
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": MAX_MODEL_LEN, "tie_word_embeddings": True},
    ),
    "gpt_neox": ("gpt_neox", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 8, "sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 4},
    ),
}
_NOT_FOR_GPT2 = ("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")

_MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")

ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)


def make_config(arch: str, **overrides: Any) -> Any:
    """The tiny transformers config of an architecture of ARCHITECTURES."""
    model_type, differences = _CONFIGS[arch]
    values = {**_COMMON, **differences, **overrides}
    if model_type == "gpt2":
        for name in (*_NOT_FOR_GPT2, "num_key_value_heads", "intermediate_size"):
            values.pop(name, None)
    return AutoConfig.for_model(model_type, **values)


def make_base(arch: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a random tiny checkpoint with a byte-level tokenizer to `folder` and return it. Reuses what is there."""
    if (folder / "config.json").exists():
        return folder
    config = make_config(arch, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    _randomize(model, seed)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: token id = byte value; 256 pad, 257 bos, 258 eos."""
    vocab = {char: byte for byte, char in _byte_characters().items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    fast.add_special_tokens({"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"})
    return fast


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte. Source: openai/gpt-2 encoder.py, bytes_to_unicode."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(NUM_BYTES) if byte not in printable]
    return {b: chr(b) for b in printable} | {b: chr(NUM_BYTES + i) for i, b in enumerate(others)}


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed * 1000 + 17)
    embedding = model.get_input_embeddings().weight
    transposed = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}
    for name, parameter in model.named_parameters():  # a tied weight comes once
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter is embedding:
            # Small next to what the layers add: with tied weights the model would else repeat its input.
            parameter.copy_(noise * (0.25 / float(getattr(model.get_input_embeddings(), "embed_scale", 1.0)) ** 0.5))
        elif parameter.dim() == 1 and "post_" in name and "gemma" in model.config.model_type:
            parameter.copy_(2.0 + noise)  # Gemma norms what a layer adds, by 1 + weight
        elif parameter.dim() == 1:
            parameter.add_(0.2 * noise)
        else:
            fan_in = parameter.shape[0] if id(parameter) in transposed else parameter.shape[-1]
            parameter.copy_(noise * 2.0 / math.sqrt(fan_in))


def make_adapter(
    base: Path,
    folder: Path,
    *,
    seed: int,
    rank: int = 4,
    alpha: int = 8,
    target_modules: str | Sequence[str] = "all-linear",
    **peft_kwargs: Any,
) -> Path:
    """Write a random LoRA adapter, as PEFT saves it, that changes what the base says. Reuses what is there."""
    if (folder / "adapter_config.json").exists():
        return folder
    from peft import LoraConfig, get_peft_model

    config = AutoConfig.from_pretrained(base, local_files_only=True)
    if target_modules == "all-linear" and config.model_type in _MIXTURES:
        # PEFT would put LoRA on the experts' and routers' bare parameters, which are no modules and no sites.
        target_modules = ("q_proj", "k_proj", "v_proj", "o_proj")
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM", **peft_kwargs)
    with _quiet_peft():
        model = get_peft_model(_fresh_model(base), lora)
    generator = torch.Generator().manual_seed(seed * 1000 + 29)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                # Half of the base's size per layer, whatever the rank: far from a rounding error.
                noise = torch.randn(parameter.shape, generator=generator)
                size = 1.0 / math.sqrt(rank) if "_B" in name else 0.5 / math.sqrt(parameter.shape[-1])
                parameter.copy_(noise * size)
    with _quiet_peft():
        model.save_pretrained(folder)
    return folder


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5.23 by a deprecated name, and warns of tied weights and of Conv1D's layout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _fresh_model(base: Path) -> PreTrainedModel:
    # Eager: the SDPA path of some versions leaves out Gemma 2's soft cap.
    return AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    ).eval()


@lru_cache(maxsize=64)
def reference_model(base: Path, adapter: Path | None = None) -> Any:
    """transformers' model (with PEFT's adapter), one per process. Never change it."""
    model = _fresh_model(base)
    if adapter is None:
        return model
    from peft import PeftModel

    with _quiet_peft():
        return PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def reference_generate(
    base: Path,
    adapter: Path | None,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    ignore_eos: bool = False,
) -> tuple[list[int], list[float]]:
    """Greedy text of transformers (and PEFT): token ids, and the lead of each over the second best logit.

    An end-of-sequence token ends the text and is its last token, unless `ignore_eos`.
    """
    output = reference_model(base, adapter).generate(
        input_ids=torch.tensor([list(prompt_ids)]),
        attention_mask=torch.ones(1, len(prompt_ids), dtype=torch.long),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None if ignore_eos else EOS_ID,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.cat(output.logits).topk(2).values
    return output.sequences[0, len(prompt_ids) :].tolist(), (top[:, 0] - top[:, 1]).tolist()


@torch.no_grad()
def reference_logits(base: Path, adapter: Path | None, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits after every token. Shapes: [len(token_ids), V]."""
    return reference_model(base, adapter)(input_ids=torch.tensor([list(token_ids)])).logits[0]
