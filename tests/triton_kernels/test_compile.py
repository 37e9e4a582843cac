"""The kernels are compiled for a GPU that is not there: the interpreter takes what the compiler refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = {"_attend", "_combine", "_rms_norm", "_silu_mul", "_rope_and_cache", "_write_kv", "_shrink", "_expand"}
SHARED_BYTES = 227 << 10  # that a program may have on Hopper


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_every_kernel_compiles_for_hopper(dtype: str, tmp_path: Path) -> None:
    """Shapes of an 8B model, one-row and many-row tiles, with and without window, cap and sinks."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "tests/support/compile_kernels.py", dtype],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert {one["kernel"] for one in compiled} == KERNELS
    assert max(one["shared"] for one in compiled) <= SHARED_BYTES
