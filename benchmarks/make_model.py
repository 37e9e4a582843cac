"""Write a model of a real shape with random weights, and PEFT adapters for it: enough to measure speed, offline.

python -m benchmarks.make_model OUT --shape smol135 --adapters 16 --rank 16
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    # SmolLM-135M
    "smol135": (
        LlamaConfig,
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 4096, "tie_word_embeddings": True},
    ),
    # Qwen2.5-0.5B
    "qwen05": (
        Qwen2Config,
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
         "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 4096, "tie_word_embeddings": True},
    ),
    # Llama 3.1 8B
    "llama8b": (
        LlamaConfig,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
         "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "tiny": (
        LlamaConfig,
        {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 2048},
    ),
}  # fmt: skip
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def write_tokenizer(folder: Path) -> None:
    """Byte level, without merges: the benchmarks speak in token ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_adapter(folder: Path, base: Path, shapes: dict[str, tuple[int, int]], rank: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (out_features, in_features) in shapes.items():
        a = torch.randn(rank, in_features, generator=generator) / in_features**0.5
        b = torch.randn(out_features, rank, generator=generator) * 0.02
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.bfloat16()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": list(TARGETS),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write_awq(folder: Path, model: Any, group_size: int = 128) -> None:
    """The model with random codes in AutoAWQ's GEMM layout in the place of its layers' weights."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        layer = name.removesuffix(".weight")
        if layer.rpartition(".")[2] not in TARGETS:
            tensors[name] = tensor.half().clone()
            continue
        out_features, in_features = tensor.shape
        groups = in_features // group_size
        for suffix, rows in (("qweight", in_features), ("qzeros", groups)):
            size = (rows, out_features // 8)
            tensors[f"{layer}.{suffix}"] = torch.randint(-(2**31), 2**31, size, generator=generator, dtype=torch.int32)
        scales = torch.rand((groups, out_features), generator=generator) * 0.2 / in_features**0.5
        tensors[f"{layer}.scales"] = scales.half()
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "awq", "bits": 4, "group_size": group_size, "version": "gemm", "zero_point": True}
    config = model.config.to_dict() | {"dtype": "float16", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="smol135")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--awq", action="store_true", help="also OUT/awq: the same shape with random 4-bit codes")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    config_class, shape = SHAPES[args.shape]
    config = config_class(**shape, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    base = args.out / "base"
    model.save_pretrained(base)
    write_tokenizer(base)
    if args.awq:
        write_awq(args.out / "awq", model)
    shapes = {n: tuple(m.weight.shape) for n, m in model.named_modules() if n.rpartition(".")[2] in TARGETS}
    for i in range(args.adapters):
        write_adapter(args.out / "adapters" / f"adapter-{i:04d}", base, shapes, args.rank, seed=i)
    print(f"{base}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters; {args.adapters} adapters")


if __name__ == "__main__":
    main()
