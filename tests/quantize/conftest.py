from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.quantize.__main__ import main
from tests.support.tiny_model import make_base

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "while", "seven", "wizards", "boil", "tea"]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Tiny checkpoints by architecture, made once."""

    def make(arch: str, **overrides: object) -> Path:
        name = "-".join([arch, *(f"{key}-{value}" for key, value in sorted(overrides.items()))])
        return make_base(arch, tmp_path_factory.getbasetemp() / "bases" / name, **{**SIZES, **overrides})

    return make


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty lines of some 200 bytes; the model's tokens are bytes."""
    path = tmp_path_factory.mktemp("text") / "calibration.jsonl"
    draw = random.Random(0)
    lines = (json.dumps({"text": " ".join(draw.choices(WORDS, k=40))}) for _ in range(20))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The program in this process: its exit status, and what it told."""

    def call(*arguments: object) -> tuple[int, str]:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as left:
            status = int(left.code or 0)
        captured = capsys.readouterr()
        return status, captured.err if status else captured.out

    return call
