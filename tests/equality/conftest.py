"""Tiny models and adapters, one folder of them per run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.equality.oracle import tally
from tests.support.one_thread import one_thread as one_thread
from tests.support.tiny_model import make_adapter, make_base

# Fused experts are parameters, not modules: adapters of these models are of their attention.
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_TARGETS: dict[str, str | list[str]] = {"mixtral": _ATTENTION, "qwen3_moe": _ATTENTION}

PROMPT_LENGTHS = (1, 3, 7, 16, 17, 30, 33, 60)


class Zoo:
    """Makes what a test asks for, once."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def base(self, arch: str, **overrides: Any) -> Path:
        name = "-".join([arch, *[f"{key}={value}" for key, value in overrides.items()]])
        return make_base(arch, self._root / name, **overrides)

    def adapter(self, base: Path, name: str, seed: int, **kwargs: Any) -> Path:
        arch = base.name.split("-")[0]
        kwargs.setdefault("target_modules", _TARGETS.get(arch, "all-linear"))
        return make_adapter(base, self._root / f"{base.name}.{name}", seed=seed, **kwargs)

    def three_adapters(self, base: Path) -> dict[str, Path]:
        """Of different ranks."""
        return {f"r{rank}": self.adapter(base, f"r{rank}", rank, rank=rank) for rank in (2, 4, 8)}


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Of mixed lengths; each longer than 16 begins with the same 16 tokens."""
    rng = random.Random(7)
    shared = [rng.randrange(256) for _ in range(16)]
    return [
        (shared if length > 16 else []) + [rng.randrange(256) for _ in range(length - 16 * (length > 16))]
        for length in PROMPT_LENGTHS
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if tally["tokens"]:
        terminalreporter.write_line(
            f"whole engine against transformers: {tally['tokens']} tokens, {tally['near_ties']} near-ties forgiven"
        )
