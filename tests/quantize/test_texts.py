"""Text to calibrate and to measure with: three kinds of lines, cut and not dropped, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.errors import ConfigError
from engine.quantize.texts import read_lines, read_texts
from tests.support.tiny_model import make_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_a_line_is_a_text_a_conversation_or_a_prompt_with_its_completion(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    path = tmp_path / "f"
    rows = ({"text": "a\u2028c"}, {"messages": messages}, {"prompt": "2+2=", "completion": "4"}, {"text": ""})
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert [line.text for line in read_lines(path, tokenizer)] == ["a\u2028c", "<user>hi<assistant>yes", "2+2=4"]
    texts = read_texts(None, path, tokenizer, max_samples=1)
    assert texts.held_out is not None
    assert bytes(texts.held_out.flatten().tolist()) == "a\u2028c<user>hi<assistant>yes2+2=4".encode()


def test_lines_longer_than_a_window_are_cut_and_none_is_lost(tmp_path: Path) -> None:
    lines = ["a" * 700, "b" * 3, "c" * 90, "d" * 200]
    path = write(tmp_path / "f", *({"text": line} for line in lines))
    held_out = write(tmp_path / "h", {"text": "e" * 100})
    texts = read_texts(path, held_out, make_tokenizer(), max_samples=100, max_tokens=64)
    assert texts.calibration is not None
    num_windows, length = texts.calibration.shape
    assert length <= 64
    written = "".join(lines).encode()
    read = bytes(texts.calibration.flatten().tolist())
    assert read == written[: len(read)]
    assert len(written) - len(read) < num_windows


def test_a_tail_of_the_calibration_text_is_held_out_and_not_calibrated_with(tmp_path: Path) -> None:
    path = write(tmp_path / "f", *({"text": chr(65 + i) * 10} for i in range(20)))
    texts = read_texts(path, None, make_tokenizer(), max_samples=100)
    assert texts.calibration is not None
    assert texts.held_out is not None
    assert set(texts.held_out.flatten().tolist()) == {ord("S"), ord("T")}
    assert set(texts.calibration.flatten().tolist()) == set(range(65, 65 + 18))
    assert texts.held_out_from == "the last 2 of 20 lines of f"


def test_no_more_windows_than_asked_for_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "f", *({"text": "x" * 1000} for _ in range(4)))
    texts = read_texts(path, path, make_tokenizer(), max_samples=3, max_tokens=100)
    assert texts.calibration is not None
    assert texts.calibration.shape == (3, 100)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{oops", "line 2 is not JSON"),
        ('["a"]', "line 2 is a list"),
        ({"body": "x"}, "line 2 has the keys ['body']; it needs text, messages, or prompt and completion"),
        ({"text": 3}, "line 2: 'text' must be a string, not 3"),
        ({"prompt": "x"}, "line 2: 'completion' must be a string, not None"),
        ({"messages": "hi"}, "line 2: 'messages' must be a list"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 2: 'messages' need a chat template"),
    ],
)
def test_a_wrong_line_is_told_by_number_and_key(line: object, told: str, tmp_path: Path) -> None:
    path = write(tmp_path / "f", {"text": "fine"}, line)
    with pytest.raises(ConfigError) as raised:
        read_lines(path, make_tokenizer())
    assert told in str(raised.value)


@pytest.mark.parametrize("lines", [[], [{"text": ""}], [{"text": "one line only"}]])
def test_a_file_without_enough_text_is_refused_with_what_to_give(lines: list[object], tmp_path: Path) -> None:
    path = write(tmp_path / "f", *lines)
    with pytest.raises(ConfigError, match=r"give|add"):
        read_texts(path, None, make_tokenizer(), max_samples=4)
