"""Checkpoints as AutoAWQ, gptqmodel, bitsandbytes and torchao write them: python quantizers.py FOLDER NAME...

Runs in .venv-quantizers, apart from everything else of the project. FOLDER/bases has the models to quantize.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer than two cores it refuses to start
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # gptqmodel compiles its 8-bit layers, which takes longer than all else

import torch
from expected import save_expected
from transformers import AutoModelForCausalLM, AutoTokenizer, AwqConfig, BitsAndBytesConfig, TorchAoConfig

# Of under 64 tokens each: AutoAWQ leaves out longer ones.
LINES = ["".join(chr(97 + (i * j * 7 + i) % 26) for j in range(60)) for i in range(1, 33)]


def autoawq(base: Path, out: Path, **config: Any) -> Any:
    from awq import AutoAWQForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoAWQForCausalLM.from_pretrained(str(base), device_map="cpu", use_cache=False)
    config = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM", **config}
    model.quantize(tokenizer, quant_config=config, calib_data=LINES, max_calib_seq_len=64, n_parallel_calib_samples=8)
    model.save_quantized(str(out))
    return AutoModelForCausalLM.from_pretrained(
        out, device_map="cpu", dtype=torch.float32, quantization_config=AwqConfig(backend="torch_awq")
    )


def gptqmodel(base: Path, out: Path, **config: Any) -> Any:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(base), QuantizeConfig(group_size=32, offload_to_disk=False, **config))
    # Its first choice to write AWQ asks for CUDA, and those to read round inputs.
    awq = config.get("quant_method") == "awq"
    model.quantize(LINES, batch_size=4, backend=BACKEND.AWQ_TORCH if awq else BACKEND.AUTO)
    model.save(str(out))
    kernel = BACKEND.AWQ_TORCH if awq else BACKEND.GPTQ_TORCH
    return GPTQModel.load(str(out), device="cpu", backend=kernel, dtype=torch.float16).model  # float32 it refuses


def at_load(base: Path, out: Path, config: Any) -> Any:
    """Saved before the first forward, after which bitsandbytes 0.50 on a CPU saves something else."""
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    model.save_pretrained(out)
    return AutoModelForCausalLM.from_pretrained(out, device_map="cpu", dtype=torch.float32)


def bitsandbytes(base: Path, out: Path, **config: Any) -> Any:
    return at_load(base, out, BitsAndBytesConfig(**config))


def torchao(base: Path, out: Path, kind: str) -> Any:
    import torchao.quantization

    return at_load(base, out, TorchAoConfig(getattr(torchao.quantization, kind)()))


EIGHT_BITS = {r"+:.*\.down_proj": {"bits": 8, "group_size": 64}, r"-:.*\.layers\.1\..*\.k_proj": {}}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FILES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "autoawq-llama": (autoawq, "llama", {}),
    "autoawq-qwen2": (autoawq, "qwen2", {"q_group_size": 16}),
    "gptqmodel-awq-llama": (gptqmodel, "llama", {"bits": 4, "quant_method": "awq", "format": "gemm"}),
    "gptqmodel-llama-ordered": (gptqmodel, "llama", {"bits": 4, "desc_act": True}),
    "gptqmodel-qwen2-asymmetric": (gptqmodel, "qwen2", {"bits": 4, "sym": False}),
    "gptqmodel-mistral-8": (gptqmodel, "mistral", {"bits": 8, "format": "gptq_v2", "desc_act": True}),
    "gptqmodel-mixtral": (gptqmodel, "mixtral", {"bits": 4}),
    "gptqmodel-llama-rules": (gptqmodel, "llama", {"bits": 4, "lm_head": True, "dynamic": EIGHT_BITS}),
    "bitsandbytes-llama-nf4": (bitsandbytes, "llama", {**NF4, "bnb_4bit_use_double_quant": True}),
    "bitsandbytes-qwen2-nf4": (bitsandbytes, "qwen2", NF4),
    "bitsandbytes-mistral-int8": (bitsandbytes, "mistral", {"load_in_8bit": True}),
    "torchao-llama-int8": (torchao, "llama", {"kind": "Int8WeightOnlyConfig"}),
    "torchao-qwen2-int8-dynamic": (torchao, "qwen2", {"kind": "Int8DynamicActivationInt8WeightConfig"}),
    "torchao-mistral-fp8": (torchao, "mistral", {"kind": "Float8WeightOnlyConfig"}),
}


def main(folder: Path, names: list[str]) -> None:
    for name in names:
        write, arch, how = FILES[name]
        model = write(folder / "bases" / arch, folder / name, **how)
        save_expected(folder / name, model.eval())


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(FILES))
