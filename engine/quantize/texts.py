"""Calibration and held-out text: a file of JSON lines becomes windows of tokens, all of one length.

No line is dropped for its length: the lines' tokens are laid end to end and cut. What the last cut leaves over, fewer
tokens than there are windows, is the only loss.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engine.errors import ConfigError

WINDOW_TOKENS = 512
_HELD_OUT_SHARE = 10  # one line in so many, at the end of the calibration text
_KEYS = "text, messages, or prompt and completion"


@dataclass(frozen=True, slots=True)
class Line:
    """`is_rendered`: a chat template has written the special tokens itself."""

    text: str
    is_rendered: bool = False


@dataclass(frozen=True, slots=True)
class Texts:
    """Windows of token ids, int64 [windows, tokens]; None: not given. `held_out_from` names the file they are of."""

    calibration: Tensor | None = None
    held_out: Tensor | None = None
    held_out_from: str | None = None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Raises: ConfigError if there is none that loads without running foreign code."""
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust side raises bare exceptions
        raise ConfigError(f"no tokenizer could be loaded from {str(folder)!r}: {error}") from error


def read_texts(
    calibration: Path | None,
    held_out: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    max_samples: int,
    max_tokens: int = WINDOW_TOKENS,
) -> Texts:
    """Both texts as windows, at most `max_samples` of each, of at most `max_tokens`. Without a file of its own the
    held-out text is the last tenth of the calibration text's lines, which are then not calibrated with.

    Raises: ConfigError naming file, line and key; also if a text is too short to say anything.
    """
    lines = [] if calibration is None else read_lines(calibration, tokenizer)
    room = (tokenizer, max_samples, max_tokens)
    if held_out is not None:
        own = _windows(read_lines(held_out, tokenizer), held_out, *room)
        return Texts(None if calibration is None else _windows(lines, calibration, *room), own, held_out.name)
    if calibration is None:
        return Texts()
    if len(lines) < 2:
        raise ConfigError(
            f"{calibration} has one line of text: nothing is left to measure with; add lines or give --held-out FILE"
        )
    num_held_out = max(1, len(lines) // _HELD_OUT_SHARE)
    return Texts(
        _windows(lines[:-num_held_out], calibration, *room),
        _windows(lines[-num_held_out:], calibration, *room),
        f"the last {num_held_out} of {len(lines)} lines of {calibration.name}",
    )


def read_lines(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Line]:
    """The text of every line, conversations rendered; empty lines of the file and empty texts are skipped.

    Raises: ConfigError naming the line, and the key where one is at fault.
    """
    try:
        # Not splitlines: JSON strings may hold other characters that end a line.
        written = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error}); give a text file of JSON lines") from error
    read = (_read(line, f"{path}, line {n}", tokenizer) for n, line in enumerate(written, 1) if line.strip())
    lines = [line for line in read if line.text]
    if not lines:
        raise ConfigError(f"{path} holds no text; give JSON lines with {_KEYS}")
    return lines


def _read(line: str, where: str, tokenizer: PreTrainedTokenizerBase) -> Line:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is a {type(value).__name__}; a line is an object with {_KEYS}")
    if "messages" in value:
        return Line(_rendered(value["messages"], where, tokenizer), is_rendered=True)
    if "text" in value:
        return Line(_string(value, "text", where))
    if "prompt" in value:
        return Line(_string(value, "prompt", where) + _string(value, "completion", where))
    raise ConfigError(f"{where} has the keys {sorted(value)}; it needs {_KEYS}")


def _string(value: dict[str, Any], key: str, where: str) -> str:
    if not isinstance(value.get(key), str):
        raise ConfigError(f"{where}: {key!r} must be a string, not {value.get(key)!r}")
    return str(value[key])


def _rendered(messages: Any, where: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ConfigError(f"{where}: 'messages' must be a list of objects with a role and a content")
    if not tokenizer.chat_template:
        raise ConfigError(f"{where}: 'messages' need a chat template, and the model has none; give 'text' instead")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # templates are programs: what they raise is not theirs to choose
        raise ConfigError(f"{where}: the chat template refuses 'messages': {error}") from error


def _windows(
    lines: list[Line], path: Path | None, tokenizer: PreTrainedTokenizerBase, max_samples: int, max_tokens: int
) -> Tensor:
    tokens: list[int] = []
    for line in lines:
        if len(tokens) >= max_samples * max_tokens:
            break
        tokens += tokenizer.encode(line.text, add_special_tokens=not line.is_rendered)
    del tokens[max_samples * max_tokens :]
    if len(tokens) < 2:
        raise ConfigError(f"{path} has {len(tokens)} tokens; give at least 2, one to predict the other")
    num_windows = -(-len(tokens) // max_tokens)
    length = len(tokens) // num_windows
    return torch.tensor(tokens[: num_windows * length]).view(num_windows, length)
