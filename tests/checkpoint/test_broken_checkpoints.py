"""A model folder that is broken is refused with the file's name, whatever the libraries make of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.engine import load_parts
from engine.errors import EngineError
from engine.model.loader import load_model
from engine.text.tokenizer import Tokenizer
from tests.support.tiny_model import make_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base("llama", tmp_path / "base")


def changed(**values: object) -> Callable[[bytes], bytes]:
    return lambda before: json.dumps(json.loads(before) | values).encode()


@pytest.mark.parametrize(
    ("file_name", "change", "message"),
    [
        ("config.json", lambda _: b"{", r"config\.json"),
        ("config.json", lambda _: b"[]", r"config\.json"),
        ("config.json", lambda _: b"\xff\xfe\x00", r"config\.json"),
        ("config.json", changed(num_hidden_layers="three"), "num_hidden_layers"),
        ("config.json", changed(num_hidden_layers=0), "attention layer"),
        ("config.json", changed(hidden_size=64), "base"),
        ("model.safetensors", lambda before: before[: len(before) // 2], "base"),
        ("model.safetensors", lambda _: b"", "base"),
        ("model.safetensors", lambda _: bytes(100), "base"),
        ("generation_config.json", lambda _: b"{", r"generation_config\.json"),
        ("generation_config.json", lambda _: b"[]", r"generation_config\.json"),
        ("generation_config.json", lambda _: b'{"eos_token_id": "x"}', r"generation_config\.json"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # the libraries' own words about a broken file
def test_a_broken_file_of_a_model_is_an_error_that_names_it(
    base: Path, file_name: str, change: Callable[[bytes], bytes], message: str
) -> None:
    path = base / file_name
    path.write_bytes(change(path.read_bytes() if path.exists() else b"{}"))
    with pytest.raises(EngineError, match=message):
        load_model(EngineConfig(model=str(base), num_threads=1))


@pytest.mark.parametrize(
    "content", ["{", "{}", "[]", '{"version": "1.0", "added_tokens": [], "model": {"type": "no"}}']
)
def test_a_broken_tokenizer_is_an_error_that_names_its_folder(base: Path, content: str) -> None:
    (base / "tokenizer.json").write_text(content)
    with pytest.raises(EngineError, match="base"):
        Tokenizer.load(base)


def test_a_missing_model_is_not_called_a_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^model="):
        load_parts(EngineConfig(model=str(tmp_path / "nowhere")))
