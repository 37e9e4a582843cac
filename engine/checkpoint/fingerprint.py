"""A digest that changes when the base model does, and only then: the same folder has the same one on every machine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from engine.config import EngineConfig
from engine.image_spec import LinearSite

_SAMPLE_BYTES = 1 << 16
# Written by whoever saved the checkpoint, without a say in what the model computes.
_INCIDENTAL = frozenset({"_name_or_path", "transformers_version", "_attn_implementation"})


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def base_fingerprint(folder: Path, sites: tuple[LinearSite, ...]) -> str:
    """sha256 (hex) over config.json's values, the sites, and name, size and samples of every weight file.

    Samples (start, middle and end of a file) tell two fine-tunes of one architecture apart without reading all bytes.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    digest.update(_canonical({key: value for key, value in config.items() if key not in _INCIDENTAL}))
    digest.update(_canonical([asdict(site) for site in sites]))
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(_canonical([path.name, size]))
        with path.open("rb") as file:
            for offset in (0, max(0, size // 2 - _SAMPLE_BYTES // 2), max(0, size - _SAMPLE_BYTES)):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def rounding_name(config: EngineConfig) -> str:
    """What the settings do to the weights of a checkpoint at load; empty if nothing."""
    if config.quantization is None:
        return ""
    extras = (("lm_head", config.quantize_lm_head), ("embeddings", config.quantize_embeddings))
    return "+".join([config.quantization, *(name for name, is_set in extras if is_set)])


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode() + b"\n"
