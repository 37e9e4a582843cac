"""What somebody points at as the base model becomes the folder of its checkpoint, or one message that says what to do.

People give snapshots of the hub's cache, the folder above them, clones without their large files, the output of a
training run, names of the hub. Only names and a few first bytes are looked at; nothing is downloaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from engine.errors import ConfigError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_POINTER = b"version https://git-lfs.github.com/spec/v1"
_MAX_POINTER_BYTES = 1024
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SHARD = re.compile(r"-\d+-of-(\d+)\.safetensors$")
_INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = {
    "*.gguf": "a GGUF file",
    "pytorch_model*.bin": "pickled weights",
    "consolidated*.pth": "pickled weights in Meta's own format",
    "consolidated*.safetensors": "weights under Mistral's own names",
    "tf_model.h5": "TensorFlow weights",
    "*.msgpack": "Flax weights",
    "*.onnx": "an ONNX graph",
}
_SAVE = (
    "load it once with transformers' AutoModelForCausalLM.from_pretrained and save it with save_pretrained, which "
    "writes safetensors"
)
_ORIGINAL = (
    "give the folder of the same model in transformers' format (on the hub it is the repository itself, not its "
    "`original` folder)"
)


def locate(given: str) -> Path:
    """The folder with config.json and safetensors that `given` means, a path on this machine.

    Raises: ConfigError naming what is there instead, and the remedy.
    """
    folder = find(given)
    listed = sorted(folder.iterdir())
    _refuse_stubs(given, listed)
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(_why_adapter(given, folder))
    if not (folder / "config.json").is_file():
        raise ConfigError(_why_no_config(given, folder))
    _check_weights(given, folder)
    return folder


def find(given: str) -> Path:
    """The folder alone, whatever is in it. Raises: ConfigError if it is not there."""
    path = Path(given).expanduser()
    if not path.is_dir():
        raise ConfigError(_why_no_folder(given, path))
    return _snapshot(given, path)


def _why_no_folder(given: str, path: Path) -> str:
    if path.is_file():
        told = "the folder that it is in" if path.suffix in (".safetensors", ".json") else "a folder with safetensors"
        what = next((what for pattern, what in _OTHER_FORMATS.items() if path.match(pattern)), "a file")
        return f"model={given!r} is {what}, not a folder; models are read from folders: give {told}"
    if path.is_symlink():
        return f"model={given!r} is a link to {str(path.readlink())!r}, which is not there; mend the link"
    if _HUB_NAME.fullmatch(given):
        cached = Path("~/.cache/huggingface/hub").expanduser() / f"models--{given.replace('/', '--')}"
        where = f" It is in the hub's cache: give {str(cached)!r}." if cached.is_dir() else ""
        return (
            f"model={given!r} is not a folder. If it is a name of the hub: models are read from disk only; run "
            f"`hf download {given} --local-dir FOLDER` and give that folder.{where}"
        )
    return (
        f"model={given!r} is not a folder with a config.json: there is no folder of that name, seen from "
        f"{str(Path.cwd())!r}; give its path"
    )


def _snapshot(given: str, path: Path) -> Path:
    """Of the folder that the hub's cache keeps of a model: the snapshot that `main` names, or the only one."""
    snapshots = path / "snapshots"
    if (path / "config.json").exists() or not snapshots.is_dir():
        return path
    main = path / "refs" / "main"
    if main.is_file():
        named = snapshots / main.read_text(encoding="utf-8").strip()
        if named.is_dir():
            return named
    found = sorted(child for child in snapshots.iterdir() if child.is_dir())
    if len(found) != 1:
        names = ", ".join(child.name for child in found) or "none"
        raise ConfigError(
            f"model={given!r} is a cache folder of the hub with {len(found)} snapshots ({names}), and refs/main names "
            "none of them; give the path of one, or download the model again"
        )
    return found[0]


def _refuse_stubs(given: str, listed: list[Path]) -> None:
    """Files that stand for others which were never fetched."""
    for file in listed:
        if file.is_symlink() and not file.exists():
            raise ConfigError(
                f"model={given!r}: {file.name} is a link to a file that is not there ({str(file.readlink())!r}); "
                "download the model again, or copy it with the files that its links point to"
            )
        if file.suffix in (".safetensors", ".json", ".model", ".bin") and is_pointer(file):
            raise ConfigError(
                f"model={given!r}: {file.name} is a Git LFS pointer, not the file itself; run `git lfs install` and "
                "`git lfs pull` in the folder, or download the file"
            )


def is_pointer(file: Path) -> bool:
    """Whether a file is what a clone has in the place of a large file."""
    if not file.is_file() or file.stat().st_size > _MAX_POINTER_BYTES:
        return False
    with file.open("rb") as opened:
        return opened.read(len(_POINTER)) == _POINTER


def _why_adapter(given: str, folder: Path) -> str:
    base = _read(folder / "adapter_config.json").get("base_model_name_or_path")
    named = f" (it names {base!r})" if isinstance(base, str) and base else ""
    return (
        f"model={given!r} is an adapter (it has an adapter_config.json), not a model; give its base model{named} as "
        "model, and the adapter by its own name"
    )


def _why_no_config(given: str, folder: Path) -> str:
    runs = [child for child in folder.iterdir() if _CHECKPOINT.fullmatch(child.name) and child.is_dir()]
    if runs:
        last = max(runs, key=lambda child: int(child.name.rpartition("-")[2]))
        return (
            f"model={given!r} is the output of a training run: it has no config.json, but {len(runs)} checkpoints; "
            f"give one of them, the last is {str(Path(given) / last.name)!r}"
        )
    for pattern, what in _OTHER_FORMATS.items():
        if found := sorted(folder.glob(pattern)):
            remedy = _ORIGINAL if "own" in what else "give the folder of the same model in safetensors"
            return f"model={given!r} has no config.json, but {what} ({found[0].name}), which is not read; {remedy}"
    inside = sorted(child.parent.name for child in folder.glob("*/config.json"))
    if inside:
        there = ", ".join(repr(str(Path(given) / name)) for name in inside[:3])
        return f"model={given!r} is not a folder with a config.json, but has such folders inside: give {there}"
    if (folder / "params.json").is_file():
        return f"model={given!r} has a params.json and no config.json: Meta's or Mistral's own format; {_ORIGINAL}"
    return (
        f"model={given!r} is not a folder with a config.json; give the folder of a transformers checkpoint: "
        "config.json, *.safetensors, tokenizer.json"
    )


def _check_weights(given: str, folder: Path) -> None:
    """The files that will be read: model.safetensors, or the shards that an index names."""
    if (folder / "model.safetensors").is_file():
        return
    index = folder / _INDEX
    if index.is_file():
        named = _read(index).get("weight_map")
        shards = sorted(set(map(str, named.values()))) if isinstance(named, dict) else []
        if not shards:
            raise ConfigError(
                f"model={given!r}: {_INDEX} has no weight_map that names files, and there is no model.safetensors; "
                "copy the index anew"
            )
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"model={given!r} lacks {missing[0]}, one of the {len(shards)} files that {_INDEX} names "
                f"({len(missing)} are missing); download it, or finish the copy"
            )
        return
    raise ConfigError(_why_no_weights(given, folder))


def _why_no_weights(given: str, folder: Path) -> str:
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    shards = [name for name in found if _SHARD.search(name)]
    if shards:
        return (
            f"model={given!r} has {shards[0]}, but no {_INDEX} that says what is in which file; copy it too, or {_SAVE}"
        )
    for pattern, what in _OTHER_FORMATS.items():
        if others := sorted(folder.glob(pattern)):
            remedy = _SAVE if what == "pickled weights" else _ORIGINAL if "own" in what else "give it in safetensors"
            return f"model={given!r} has no *.safetensors, but {what} ({others[0].name}), which is not read; {remedy}"
    if found:
        return (
            f"model={given!r} has neither model.safetensors nor {_INDEX}, but {found[0]}; rename the file if it is the "
            f"model's, or {_SAVE}"
        )
    return (
        f"model={given!r} has a config.json, but no *.safetensors; other weight formats are not read: download the "
        "weights into the folder"
    )


def _read(path: Path) -> dict[str, Any]:
    """What is no JSON object is told by whoever needs more of it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
