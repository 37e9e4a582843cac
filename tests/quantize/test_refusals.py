"""What cannot be done is told in a sentence with exit status 2, and leaves nothing that looks like a checkpoint."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.quantize import work

Run = Callable[..., tuple[int, str]]


def refused(run: Run, told: str, *arguments: object) -> None:
    out = Path(str(arguments[1]))
    before = sorted(out.iterdir()) if out.is_dir() else None
    status, error = run(*arguments)
    assert status == 2
    assert told in error
    assert (sorted(out.iterdir()) if out.is_dir() else None) == before


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--method", "int3"], "invalid choice: 'int3' (choose from"),
        (["--method", "awq"], "needs text to calibrate with; give --calibration FILE.jsonl"),
        (["--method", "int8", "--group-size", "32"], "--group-size belongs to awq, gptq, int4"),
        (["--method", "int4", "--bits", "8"], "--bits belongs to gptq"),
        (["--method", "int8", "--desc-act"], "leave --desc-act out"),
        (["--method", "int4", "--group-size", "48"], "does not divide the 128 inputs of model.layers.0.mlp.down_proj"),
        (["--method", "int4", "--group-size", "0"], "must be at least 1"),
        (["--method", "int8", "--max-samples", "0"], "max_samples=0"),
        (["--method", "int8", "--calibration", "nowhere.jsonl"], "is not a file"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    arguments: list[str], told: str, base: Callable[..., Path], run: Run, tmp_path: Path
) -> None:
    refused(run, told, base("llama"), tmp_path / "out", *arguments)


def test_a_missing_folder_is_refused(run: Run, tmp_path: Path) -> None:
    refused(run, "is not a folder with a config.json", tmp_path / "model", tmp_path / "out", "--method", "int8")


def test_an_adapter_is_refused(run: Run, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "config.json"):
        (tmp_path / name).write_text("{}")
    refused(run, "give its base model", tmp_path, tmp_path / "out", "--method", "int8")


def test_a_model_that_is_quantized_is_refused(base: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    assert run(base("llama"), tmp_path / "first", "--method", "int8")[0] == 0
    refused(run, "is quantized already (compressed-tensors)", tmp_path / "first", tmp_path / "out", "--method", "int4")


def test_a_folder_that_holds_something_is_not_written_to(base: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    refused(run, "is not empty", base("llama"), out, "--method", "int8")
    (out / "mine").unlink()
    assert run(base("llama"), out, "--method", "int8")[0] == 0


def test_a_mount_point_is_refused_before_work_begins(base: Callable[..., Path], run: Run) -> None:
    """The finished folder takes its name by a rename, which a mount point does not allow."""
    status, error = run(base("llama"), "/proc", "--method", "int8")
    assert status == 2
    assert "give a folder below it" in error


def test_a_tokenizer_of_another_model_is_told_before_work_begins(
    base: Callable[..., Path], run: Run, text: Path, tmp_path: Path
) -> None:
    model = base("llama", vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # its tokenizer's are bytes
    refused(run, "the model has 64", model, tmp_path / "out", "--method", "int8", "--held-out", text)
    assert not (tmp_path / "out.unfinished").exists()


def test_a_state_that_cannot_be_read_is_told(base: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    (tmp_path / "out.unfinished").mkdir()
    for state in ('{"identity": null, "done": {}}', '{"identity": {}, "done": []}', "{"):
        (tmp_path / "out.unfinished" / "state.json").write_text(state)
        refused(run, "start over with --no-resume", base("llama"), tmp_path / "out", "--method", "int8")
    assert run(base("llama"), tmp_path / "out", "--method", "int8", "--no-resume")[0] == 0


def test_layers_that_no_group_size_divides_are_named(base: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    model = base("llama", intermediate_size=72)
    told = "does not divide the 72 inputs of model.layers.0.mlp.down_proj"
    for method in ("int4", "nf4"):
        refused(run, told, model, tmp_path / "out", "--method", method)
    assert run(model, tmp_path / "out", "--method", "int4", "--group-size", 8)[0] == 0


def test_conv1d_is_refused_by_name(base: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    model = base("gpt2")
    refused(run, "transformer.h.0.attn.c_attn is a Conv1D", model, tmp_path / "out", "--method", "int8")


def test_a_truncated_file_is_refused(base: Callable[..., Path], run: Run, tmp_path: Path) -> None:
    model = shutil.copytree(base("llama"), tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(run, "model.safetensors is cut off", model, tmp_path / "out", "--method", "int8")


def test_a_disk_without_room_is_told_before_work_begins(
    base: Callable[..., Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(work.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    refused(run, "1 MiB free and about", base("llama"), tmp_path / "out", "--method", "int8")


def test_a_disk_that_fills_up_leaves_no_checkpoint_and_the_work_goes_on_later(
    base: Callable[..., Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, written = work.save_file, []

    def full(tensors: object, path: Path, metadata: object) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(work, "save_file", full)
    refused(run, "no space is left", base("llama"), tmp_path / "out", "--method", "int8")
    assert len(json.loads((tmp_path / "out.unfinished" / "state.json").read_text())["done"]) == 1
    assert run(base("llama"), tmp_path / "out", "--method", "int8")[0] == 0
    assert len(written) == 4  # three shards, one of them tried twice


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_experts_are_not_calibrated(
    method: str, base: Callable[..., Path], run: Run, text: Path, tmp_path: Path
) -> None:
    model = base("mixtral")
    told = "block_sparse_moe.experts.0.w1: experts are not calibrated"
    refused(run, told, model, tmp_path / "out", "--method", method, "--calibration", text)


@pytest.mark.parametrize(("method", "library"), [("awq", "autoawq"), ("gptq", "gptqmodel")])
def test_a_method_whose_library_is_not_installed_says_what_to_install(
    method: str, library: str, base: Callable[..., Path], run: Run, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "awq" if method == "awq" else "gptqmodel.quantization", None)
    arguments = ("--method", method, "--calibration", text, "--max-samples", 1)
    model = base("llama", num_key_value_heads=4)  # autoawq wants 64 outputs
    refused(run, f"needs {library}", model, tmp_path / "out", *arguments)
