"""The kernels are compiled for a GPU that is not there: the interpreter takes what the compiler refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PRODUCTS = {"_few_rows", "_many_rows", "_sum_columns", "_sum_splits"}
KERNELS = {
    "_attend", "_combine", "_rms_norm", "_silu_mul", "_rope_and_cache", "_write_kv", "_shrink", "_expand",
    "_round_rows", *PRODUCTS,
}  # fmt: skip
SHARED_BYTES = 227 << 10  # that a program may have on Hopper


def compiled_by(cache: Path, *arguments: str) -> set[str]:
    """The names of the kernels that were compiled; each fits a program."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "tests/support/compile_kernels.py", *arguments],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert max(one["shared"] for one in compiled) <= SHARED_BYTES
    return {one["kernel"] for one in compiled}


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_every_kernel_compiles_for_hopper(dtype: str, tmp_path: Path) -> None:
    """Shapes of an 8B model, one-row and many-row tiles, with and without window, cap and sinks."""
    assert compiled_by(tmp_path, dtype) == KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_products_with_every_kind_of_quantized_weight_compile_for_hopper(dtype: str, tmp_path: Path) -> None:
    magic = {"_sum_columns"} if dtype != "float32" else set()
    assert compiled_by(tmp_path, dtype, "products") == {"_few_rows", "_many_rows", "_sum_splits"} | magic
