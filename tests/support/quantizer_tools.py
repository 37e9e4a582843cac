"""Other people's tools, run on tiny models in environments of their own; and what they wrote, made ready to load.

`python -m tests.support.quantizer_tools` writes tests/quant/files anew.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from engine.quant.formats import read_scheme
from tests.support.tiny_model import make_base, make_tokenizer

ROOT = Path(__file__).parents[2]
SCRIPTS = {".venv-quantizers": "quantizers.py", ".venv-llmcompressor": "compressors.py"}
FILES = ROOT / "tests" / "quant" / "files"
KEPT = ("config.json", "model.safetensors", "expected.safetensors")
# AutoAWQ asks for outputs in multiples of 64, gptqmodel for 32, of lm_head too.
SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "head_dim": 32,
    "vocab_size": 288,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "mistral": {},
    "mixtral": {"num_hidden_layers": 1},
}
_TIMEOUT_S = 600
_EXPERT_PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def write_bases(folder: Path) -> None:
    for arch, differences in ARCHITECTURES.items():
        make_base(arch, folder / "bases" / arch, **{**SIZES, **differences})


def run_tool(environment: str, folder: Path, *names: str) -> None:
    """Write checkpoints below `folder`, those named or all that the environment's tools can. Output goes to a file."""
    script = ROOT / "tests" / "quant" / "tools" / SCRIPTS[environment]
    log = folder / f"{environment}.log"
    with log.open("w") as output:
        done = subprocess.run(
            [ROOT / environment / "bin" / "python", script, folder, *names],
            cwd=folder,  # where some leave logs
            stdout=output,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        )
    assert done.returncode == 0, log.read_text()[-3000:]


def with_tokenizer(written: Path, folder: Path) -> Path:
    """A copy of a checkpoint that the engine can serve."""
    folder.mkdir(parents=True)
    for name in KEPT[:2]:
        shutil.copy(written / name, folder / name)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_dense(quantized: Path, folder: Path) -> Path:
    """The same model in float32, each quantized weight replaced by what its codes mean."""
    config = json.loads((quantized / "config.json").read_text())
    with safe_open(quantized / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        scheme = read_scheme(config.pop("quantization_config"), file.metadata() or {})
    held: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        # bitsandbytes' have several parts behind the name of the layer, the first of which is "weight".
        module = name.partition(".weight.")[0] if ".weight." in name else name.rpartition(".")[0]
        held.setdefault(module, {})[name.removeprefix(f"{module}.")] = tensor
    dense = {}
    for module, parts in held.items():
        if _is_kept(module) or not scheme.is_quantized(module, parts.keys()):
            dense |= {f"{module}.{suffix}": tensor.float() for suffix, tensor in parts.items()}
            continue
        weight = scheme.read(module, *_sizes(config, module), parts)
        dense[f"{module}.weight"] = weight.dequantize()
        dense |= {f"{module}.bias": parts["bias"].float()} if "bias" in parts else {}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    save_file(
        {_plain_name(name): t.contiguous() for name, t in dense.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    make_tokenizer().save_pretrained(folder)
    return folder


def _is_kept(module: str) -> bool:
    """What is no linear layer, which is all that a scheme is asked about."""
    return module.endswith(("norm", "embed_tokens", ".gate"))


def _sizes(config: dict[str, Any], module: str) -> tuple[int, int]:
    """in_features and out_features of a layer."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    sizes = {"q_proj": (hidden, heads), "o_proj": (heads, hidden), "lm_head": (hidden, config["vocab_size"])}
    sizes |= dict.fromkeys(("k_proj", "v_proj"), (hidden, kv_heads))
    sizes |= dict.fromkeys(("gate_proj", "up_proj", "w1", "w3"), (hidden, inner))
    sizes |= dict.fromkeys(("down_proj", "w2"), (inner, hidden))
    return sizes[module.rpartition(".")[2]]


def _plain_name(name: str) -> str:
    """Experts as Mixtral's checkpoints call them, whichever of transformers' names for them a tool took."""
    if ".experts." not in name and not name.endswith("mlp.gate.weight"):
        return name
    for part, plain in _EXPERT_PARTS.items():
        name = name.replace(f".{part}.", f".{plain}.")
    return name.replace(".mlp.", ".block_sparse_moe.")


def main() -> None:
    """Write every file anew, and keep what a test reads."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_bases(folder)
        for environment in SCRIPTS:
            run_tool(environment, folder)
        for written in sorted(folder.glob("*/expected.safetensors")):
            shutil.rmtree(FILES / written.parent.name, ignore_errors=True)
            (FILES / written.parent.name).mkdir(parents=True)
            for kept in KEPT:
                shutil.copy(written.parent / kept, FILES / written.parent.name / kept)


if __name__ == "__main__":
    main()
