"""A quantized checkpoint with something wrong is refused by its headers: the tensor is named, and no weight is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.checkpoint.weight_files import StoredTensor
from engine.config import EngineConfig
from engine.errors import ConfigError, ModelNotSupported
from engine.model.loader import load_model
from tests.support.quantized_files import CONFIG, make_twins
from tests.support.tiny_model import make_base

LAYER = "model.layers.0.mlp.up_proj"
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w2"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bases")
    for arch in ("llama", "mixtral"):
        make_base(arch, root / arch, num_hidden_layers=1, hidden_size=64, intermediate_size=96)
    return root


@pytest.fixture
def nothing_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(tensor: StoredTensor) -> Tensor:
        raise AssertionError(f"{tensor.name} was read")

    monkeypatch.setattr(StoredTensor, "read", read)


def refused(folder: Path, message: str, **settings: Any) -> None:
    # A file that is not there is the folder's fault, one that is damaged the checkpoint's.
    with pytest.raises((ModelNotSupported, ConfigError), match=message):
        load_model(EngineConfig(model=str(folder), **settings))


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop(f"{LAYER}.scales"), rf"{LAYER}\.scales is missing"),
        (drop(f"{LAYER}.qweight"), rf"{LAYER}\.qweight is missing"),
        (put(f"{LAYER}.scales", torch.ones(1, 96).half()), rf"{LAYER}\.scales .*shape \[1, 96\].*\[2, 96\]"),
        (put(f"{LAYER}.qweight", torch.ones(8, 88).int()), rf"{LAYER}\.qweight .*shape \[8, 88\]"),
        (put(f"{LAYER}.qweight", torch.ones(8, 96)), rf"{LAYER}\.qweight .*float32, not in int32"),
        (put(f"{LAYER}.weight", torch.ones(96, 64)), rf"{LAYER}\.weight .*two methods"),
        (put(f"{LAYER}.SCB", torch.ones(96)), rf"{LAYER}\.SCB .*two methods"),
        (put("lm_head.weight_packed", torch.ones(259, 8).int()), r"lm_head\.weight_packed "),
        (put("model.embed_tokens.qweight", torch.ones(8, 8).int()), r"embed_tokens\.qweight .*no quantized layer"),
        (put("model.layers.7.mlp.up_proj.qzeros", torch.ones(2).int()), r"model\.layers\.7\.mlp\.up_proj\.qzeros "),
        (put("lm_head.weight", torch.ones(259, 64).to(torch.int8)), r"lm_head\.weight .*int8"),
        (put("model.norm.weight", torch.ones(65)), r"model\.norm\.weight .*\[65\].*\[64\]"),
        (drop("model.norm.weight"), r"model\.norm\.weight is missing"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("nothing_read")
def test_a_wrong_tensor_is_named(
    bases: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    refused(make_twins(bases / "llama", tmp_path, change=change).quantized, message)


def lose(layer: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for suffix in ("qweight", "qzeros", "scales"):
            del tensors[f"{layer}.{suffix}"]

    return change


def unquantize_expert(tensors: dict[str, Tensor]) -> None:
    lose(EXPERT)(tensors)
    tensors[f"{EXPERT}.weight"] = torch.ones(64, 96)


@pytest.mark.parametrize(
    ("arch", "change", "message"),
    [
        ("llama", lose(LAYER), rf"{LAYER}\.weight is missing"),
        ("mixtral", drop(f"{EXPERT}.qzeros"), rf"{EXPERT}\.qzeros is missing"),
        ("mixtral", unquantize_expert, r"model\.layers\.0\.mlp\.experts: .*16-bit weights too"),
        ("mixtral", lose(EXPERT), r"model\.layers\.0\.mlp\.experts: .*11 of 12 matrices"),
    ],
)
@pytest.mark.usefixtures("nothing_read")
def test_a_layer_that_is_not_whole_is_named(
    bases: Path, tmp_path: Path, arch: str, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    refused(make_twins(bases / arch, tmp_path, change=change).quantized, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantization_config": CONFIG | {"group_size": 16}}, r"\.(scales|qzeros) .*shape \[3, .*\[6, "),
        ({"quantization_config": CONFIG | {"bits": 3}}, r"bits.*3"),
        ({"quantization_config": CONFIG | {"quant_method": "hqq"}}, r"quant_method='hqq'"),
        ({"quantization_config": "gptq"}, r"config\.json"),
        ({"intermediate_size": 64}, r"\.(qweight|qzeros|scales) .*shape"),
        ({"hidden_act": "nope"}, r"cannot make a LlamaForCausalLM .*nope"),
        ({"num_hidden_layers": 2}, r"model\.layers\.1\.\S+ is missing"),
    ],
)
@pytest.mark.usefixtures("nothing_read")
def test_a_config_that_the_files_do_not_fit_is_refused(
    bases: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = make_twins(bases / "llama", tmp_path).quantized
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    refused(folder, message)


def cut(folder: Path) -> str:
    file = folder / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return r"model-2\.safetensors is cut off: model\.\S+ ends at"


def cut_header(folder: Path) -> str:
    file = folder / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return r"model-2\.safetensors \(100 bytes\)"


def empty(folder: Path) -> str:
    (folder / "model-2.safetensors").write_bytes(b"")
    return r"model-2\.safetensors \(0 bytes\)"


def lose_file(folder: Path) -> str:
    (folder / "model-2.safetensors").unlink()
    return r"lacks model-2\.safetensors"


def break_index(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text("[]")
    return r"model\.safetensors\.index\.json"


def name_no_file(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": 5}}')
    return r"lacks 5, one of the 1 files"


def repeat_file(folder: Path) -> str:
    shutil.copy(folder / "model-1.safetensors", folder / "model-2.safetensors")
    return r"is in \S+model-1\.safetensors and in \S+model-2\.safetensors"


def rewrite_header(folder: Path, pattern: bytes, replacement: bytes) -> None:
    file = folder / "model-1.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = re.sub(pattern, replacement, raw[8 : 8 + size], count=1)
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])


def unknown_dtype(folder: Path) -> str:
    rewrite_header(folder, rb'"dtype":"F16"', b'"dtype":"F4"')
    return r"scales in \S+model-1\.safetensors is stored as F4"


def wrong_size(folder: Path) -> str:
    rewrite_header(folder, rb'"shape":\[8,', b'"shape":[9,')
    return r"qweight in \S+model-1\.safetensors: \d+ bytes are not I32 \[9, "


def no_header(folder: Path) -> str:
    rewrite_header(folder, rb"^\{", b"[")
    return r"model-1\.safetensors has a header"


@pytest.mark.parametrize(
    "damage",
    [cut, cut_header, empty, lose_file, break_index, name_no_file, repeat_file, unknown_dtype, wrong_size, no_header],
)
@pytest.mark.usefixtures("nothing_read")
def test_a_damaged_file_is_named(bases: Path, tmp_path: Path, damage: Callable[[Path], str]) -> None:
    folder = make_twins(bases / "llama", tmp_path).quantized
    refused(folder, damage(folder))


@pytest.mark.usefixtures("nothing_read")
def test_a_damaged_file_is_found_before_rounding_begins(bases: Path, tmp_path: Path) -> None:
    folder = make_twins(bases / "llama", tmp_path).dense
    refused(folder, cut(folder), quantization="int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(f"{LAYER}.weight", torch.ones(88, 64)), rf"{LAYER}\.weight .*\[88, 64\].*\[96, 64\]"),
        (put(f"{LAYER}.weight", torch.ones(96, 64).to(torch.int8)), rf"{LAYER}\.weight .*int8"),
        (put(f"{LAYER}.qweight", torch.ones(8, 96).int()), rf"{LAYER}\.qweight "),
    ],
)
@pytest.mark.usefixtures("nothing_read")
def test_a_wrong_tensor_is_named_before_rounding_begins(
    bases: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    folder = make_twins(bases / "llama", tmp_path).dense
    (folder / "model.safetensors.index.json").unlink()
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, message, quantization="int8")


@pytest.mark.usefixtures("nothing_read")
def test_an_expert_of_another_shape_is_named_before_rounding_begins(bases: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases / "mixtral", tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    refused(folder, r"experts\.\d\.w\d\.weight .*shape \[\d+, \d+\]", quantization="int8")
