"""Which tokens end a text: all that the checkpoint's generation config, config and tokenizer config name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.checkpoint.json_file import read_object
from engine.errors import ConfigError


def eos_token_ids(folder: Path, tokenizer_folder: Path) -> tuple[int, ...]:
    """Ids, ascending. Each file may give an int, a list or nothing; the tokenizer config gives the token's text.

    Raises: ConfigError naming the file that cannot be read.
    """
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        config = _read(folder / name)
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                ids.update(_as_ids(part.get("eos_token_id"), folder / name))
    token = _read(tokenizer_folder / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None:
        ids.update(_look_up(text, tokenizer_folder))
    return tuple(sorted(ids))


def _as_ids(value: Any, path: Path) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if type(i) is not int:
            raise ConfigError(f"{path}: eos_token_id={value!r} is neither a token id nor a list of them")
    return ids


def _look_up(text: str, folder: Path) -> list[int]:
    """The id of a special token, as the tokenizer's files give it."""
    added = _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {})
    ids = [int(key) for key, entry in added.items() if entry.get("content") == text]
    tokenizer = _read(folder / "tokenizer.json")
    ids += [entry["id"] for entry in tokenizer.get("added_tokens", []) if entry.get("content") == text]
    vocab = tokenizer.get("model", {}).get("vocab")
    if not ids and isinstance(vocab, dict) and text in vocab:
        ids.append(vocab[text])
    return ids


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
