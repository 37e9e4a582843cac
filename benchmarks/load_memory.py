"""Memory that loading a model takes at its peak and keeps, in a process of its own, on Linux.

python -m benchmarks.load_memory --model MODEL --quantization int4

What counts is resident memory, private or mapped from files, above that of the same process before: its libraries are
loaded, and the demo's base was once. The peak is the kernel's own (VmHWM), not sampled.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import workload

ROOT = Path(__file__).parents[1]
PROGRAM = """
import json, re, sys
from pathlib import Path
from engine.config import EngineConfig
from engine.model.footprint import measure
from engine.model.loader import load_model

def resident(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

settings = json.loads(sys.argv[1])
warm = dict(settings) if settings["quantization"] else {"quantization": "int8"}
load_model(EngineConfig(**warm | {"model": "demo/base"}))
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
model = load_model(EngineConfig(**settings)).model
parts = list(model.parameters()) + list(model.buffers())
footprint = measure(model)
print(json.dumps({
    "peak_bytes": resident("VmHWM") - before,
    "after_bytes": resident("VmRSS") - before,
    "kept_bytes": sum(t.numel() * t.element_size() for t in parts) + (footprint.num_bytes if footprint else 0),
}))
"""


def measure(model: Path, **settings: Any) -> dict[str, int]:
    """kept_bytes: what the model's tensors have; largest_shard_bytes: of the checkpoint's files."""
    settings = {"quantization": None, **settings, "model": str(model.resolve())}
    command = [sys.executable, "-c", PROGRAM, json.dumps(settings)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    files = [path.stat().st_size for path in model.glob("*.safetensors")]
    return {**figures, "checkpoint_bytes": sum(files), "largest_shard_bytes": max(files)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("demo/base"))
    parser.add_argument("--quantization")
    parser.add_argument("--lm-head", action="store_true")
    parser.add_argument("--embeddings", action="store_true")
    args = parser.parse_args()
    figures = measure(
        args.model,
        quantization=args.quantization,
        quantize_lm_head=args.lm_head,
        quantize_embeddings=args.embeddings,
    )
    workload.print_figures({"case": "load_memory", **figures}, args)


if __name__ == "__main__":
    main()
