"""Which tokens end a text: all that the checkpoint's generation config, config and tokenizer config name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def eos_token_ids(folder: Path, tokenizer_folder: Path) -> tuple[int, ...]:
    """Ids, ascending. Each file may give an int, a list or nothing; the tokenizer config gives the token's text."""
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        config = _read(folder / name)
        ids.update(_as_ids(config.get("eos_token_id")))
        if isinstance(config.get("text_config"), dict):
            ids.update(_as_ids(config["text_config"].get("eos_token_id")))
    token = _read(tokenizer_folder / "tokenizer_config.json").get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None:
        ids.update(_look_up(text, tokenizer_folder))
    return tuple(sorted(ids))


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list) else [int(value)]


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
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
