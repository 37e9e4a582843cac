"""Memory that loading a model takes at its peak and keeps, in a process of its own, on Linux.

What counts is resident memory, private or mapped from files, above that of the same process before: its libraries are
loaded, and the demo's base was once. The peak is the kernel's own (VmHWM), not sampled.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, re, sys
from pathlib import Path
from engine.config import EngineConfig
from engine.checkpoint.footprint import measure
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
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=200)
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    files = [path.stat().st_size for path in model.glob("*.safetensors")]
    return {**figures, "checkpoint_bytes": sum(files), "largest_shard_bytes": max(files)}
