"""The numbers of a report against a computation that shares nothing with the program but the files it wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.support.decoded_files import decode, tensors_in


def weights_in(out: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """The decoded weight of every linear layer but the head, float64."""
    after, config = tensors_in(out), json.loads((out / "config.json").read_text())["quantization_config"]
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    return {name: torch.from_numpy(decode(after, name, config)) for name in names}


def rounding_rows(_: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
    """Every token's input as 127 steps of its largest value on either side."""
    step = inputs[0].abs().amax(-1, keepdim=True) / 127
    return (torch.round(inputs[0] / step) * step,)


def window_logs(model: PreTrainedModel, windows: list[list[int]]) -> list[Tensor]:
    with torch.no_grad():
        return [torch.log_softmax(model(torch.tensor([ids])).logits[0, :-1], -1) for ids in windows]


@pytest.mark.parametrize("method", ["int4", "int8-dynamic"])
def test_perplexity_kl_and_errors_are_those_of_an_own_computation_in_float64(
    method: str, base: Callable[..., Path], run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    """The program computes in float32: its figures may differ by some 1e-5 of their size."""
    ids = torch.randint(0, 128, (2, 100), generator=torch.Generator().manual_seed(3)).tolist()
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"text": "".join(map(chr, row))}) for row in ids))
    folder, out = base("llama"), tmp_path / "out"
    assert run(folder, out, "--method", method, "--calibration", file, "--held-out", file)[0] == 0
    report = json.loads((out / "quantization_report.json").read_text())

    window = [[token for row in ids for token in row]]  # 200 tokens are less than a window
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    exact = window_logs(original, window)[0]
    inputs: dict[str, Tensor] = {}
    for name, module in original.named_modules():
        module.register_forward_hook(lambda _, args, y, n=name: inputs.update({n: args[0]}) if args else None)
    window_logs(original, window)
    quantized = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, weight in weights_in(out, original).items():
        layer = quantized.get_submodule(name)
        before = layer.weight.data.clone()
        layer.weight.data = weight
        if method == "int8-dynamic":
            layer.register_forward_pre_hook(rounding_rows)
        with torch.no_grad():
            y = inputs[name] @ before.T
            output_error = (layer(inputs[name]) - y).norm() / y.norm()
        assert report["layers"][name]["weight_error"] == pytest.approx(
            float((weight - before).norm() / before.norm()), 1e-4
        )
        # Rounding of inputs may fall to the other side in float32.
        assert report["layers"][name]["output_error"] == pytest.approx(float(output_error), rel=1e-2)
    approximate = window_logs(quantized, window)[0]
    told, targets = report["held_out"], torch.tensor(window[0][1:])[:, None]
    assert told["num_tokens"] == len(targets)
    tolerance = 1e-4 if method == "int4" else 2e-2
    assert told["original_perplexity"] == pytest.approx(math.exp(-float(exact.gather(1, targets).mean())), rel=1e-4)
    assert told["quantized_perplexity"] == pytest.approx(
        math.exp(-float(approximate.gather(1, targets).mean())), rel=tolerance
    )
    kl = float((exact.exp() * (exact - approximate)).sum(-1).mean())
    assert told["kl"] == pytest.approx(kl, rel=10 * tolerance)


def test_bytes_are_those_of_the_files(
    base: Callable[..., Path], run: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    folder, out = base("mixtral"), tmp_path / "out"
    status, told = run(folder, out, "--method", "int4")
    assert status == 0
    report = json.loads((out / "quantization_report.json").read_text())
    before, after = tensors_in(folder), tensors_in(out)
    size = {kind: sum(t.nbytes for t in tensors.values()) for kind, tensors in (("b", before), ("a", after))}
    assert (report["bytes"]["model_before"], report["bytes"]["model_after"]) == (size["b"], size["a"])
    packed = [name for name in after if ".weight_" in name]
    elements = sum(
        t.numel() for n, t in before.items() if n.endswith(("_proj.weight", "w1.weight", "w2.weight", "w3.weight"))
    )
    assert report["bytes"]["layers_after"] == sum(after[name].nbytes for name in packed)
    assert report["bytes"]["layers_before"] == 4 * elements
    assert report["bytes"]["layers_in_16_bits"] == 2 * elements
    assert report["kept"] == ["lm_head", *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(2))]
    assert "no text was given to measure with" in told
    assert len(report["layers"]) == 2 * (4 + 3 * 4)


def test_a_table_shows_what_the_report_says(
    base: Callable[..., Path], run: Callable[..., tuple[int, str]], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _, told = run(base("mixtral"), out, "--method", "fp8", "--calibration", text, "--max-samples", 2)
    report: dict[str, Any] = json.loads((out / "quantization_report.json").read_text())
    held_out = report["held_out"]
    assert f"{held_out['original_perplexity']:.4f} -> {held_out['quantized_perplexity']:.4f}" in told
    assert f"{held_out['kl']:.6f} nats" in told
    assert f"{held_out['num_tokens']} tokens of the last 2 of 20 lines of calibration.jsonl" in told
    worst = max(report["layers"], key=lambda name: max(report["layers"][name].values()))
    assert f"\n{worst} " in told
    # Experts are one module in transformers: their outputs are compared together.
    assert 0 < report["layers"]["model.layers.0.mlp.experts"]["output_error"] < 0.1
    assert np.isfinite(list(held_out.values())[1:]).all()
