"""awq and gptq with the libraries they come from, in an environment of their own; and what these libraries read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.quantize.measure import load_quantized
from engine.quantize.source import open_source
from engine.quantize.stored import Stored

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-quantizers" / "bin" / "python"
TOOLS = ROOT / "tests" / "quant" / "tools"

SAVE_EXPECTED = """
import pathlib, sys
import torch, transformers
import expected
folder = pathlib.Path(sys.argv[1])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
expected.save_expected(folder, model)
"""

pytestmark = pytest.mark.quantizers


def in_environment(*arguments: object, folder: Path) -> str:
    done = subprocess.run(
        [str(PYTHON), *map(str, arguments)],
        cwd=folder,  # gptqmodel leaves a folder of logs where it runs
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{TOOLS}", "TORCHDYNAMO_DISABLE": "1"},  # else it compiles for minutes
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("arch", "arguments", "largest_error"),
    [
        # Shares of the largest logit: the libraries compute in float16, and take scales in it.
        ("qwen2", ["--method", "awq"], 0.06),
        ("llama", ["--method", "gptq", "--desc-act", "--group-size", "32"], 0.06),
        ("qwen2", ["--method", "gptq", "--bits", "8"], 0.03),
    ],
)
def test_awq_and_gptq_survive_being_killed_and_load_with_their_libraries(
    arch: str, arguments: list[str], largest_error: float, base: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    model = base(arch, num_key_value_heads=4)  # autoawq wants 64 outputs
    whole, out = tmp_path / "whole", tmp_path / "out"
    told = in_environment(
        "-m", "tests.support.killed_quantize", model, whole, out, *arguments, "--calibration", text,
        "--max-samples", 2, folder=tmp_path
    )  # fmt: skip
    told = json.loads(told.splitlines()[-1])
    assert told["whole"] == 0
    assert told["statuses"] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}

    report = json.loads((out / "quantization_report.json").read_text())
    assert len(report["layers"]) == 2 * 7
    # Inputs are text that repeats itself, so outputs lose less than weights; 4 bits lose some 0.1 of a normal weight.
    assert all(0 < errors["output_error"] < 0.15 for errors in report["layers"].values())
    assert all(0 < errors["weight_error"] < 0.2 for errors in report["layers"].values())

    in_environment("-c", SAVE_EXPECTED, out, folder=tmp_path)
    expected = load_file(out / "expected.safetensors")
    config = json.loads((out / "config.json").read_text())
    ours = load_quantized(open_source(model), Stored(out, config["quantization_config"]), config, "cpu")
    with torch.no_grad():
        logits = ours(expected["token_ids"][None]).logits[0]
    largest = float((logits - expected["logits"]).abs().max() / logits.abs().max())
    assert largest < largest_error, largest
