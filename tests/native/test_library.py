"""Which kernels an engine uses, what it says when there are none, and threads that share them."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import LLM, SamplingParams
from engine.errors import ConfigError
from engine.native import library as native
from engine.native.library import NativeLibrary, NativeUnavailable
from tests.native.test_linear import exactly, make_group
from tests.support.native import deviation, native_or_skip
from tests.support.tiny_model import make_base
from tests.support.waiting import ended


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base("llama", tmp_path / "llama")


def _no_library() -> NativeLibrary:
    raise NativeUnavailable("the processor has no AVX-512")


def test_without_kernels_auto_works_in_torch_and_says_why(
    base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=8)
    expected = LLM(base, num_threads=1, kernels="torch").generate("abc", greedy)[0].token_ids
    monkeypatch.setattr("engine.runner.layers.load_library", _no_library)
    with caplog.at_level(logging.INFO, logger="engine"):
        llm = LLM(base, num_threads=1)
    assert "the compiled CPU kernels are not used: the processor has no AVX-512" in caplog.text
    assert llm.generate("abc", greedy)[0].token_ids == expected


def test_kernels_that_are_asked_for_and_cannot_be_had_are_an_error(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.runner.layers.load_library", _no_library)
    with pytest.raises(ConfigError, match="kernels='native' cannot be had: the processor has no AVX-512; use 'auto'"):
        LLM(base, kernels="native")


def test_a_dtype_without_kernels_is_named(base: Path) -> None:
    with pytest.raises(ConfigError, match=r"they compute in float32 and bfloat16, the model in torch[.]float16"):
        LLM(base, dtype="float16", kernels="native")


def test_a_library_that_is_not_built_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native_or_skip()
    monkeypatch.setattr(native, "__file__", str(tmp_path / "library.py"))
    with pytest.raises(NativeUnavailable, match="not compiled; install a C compiler"):
        native.load_library.__wrapped__()


def test_a_library_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NativeUnavailable, match="cannot be loaded"):
        NativeLibrary(tmp_path / "nothing.so")


def test_several_threads_may_call_at_once() -> None:
    """One gets the workers, the others do their work alone: two engines of one process."""
    linear = nn.Linear(300, 400)
    layers = [make_group([linear])[0] for _ in range(4)]
    x = torch.randn(50, 300)
    expected = exactly(linear, x)
    worst: list[float] = []

    def call(layer: nn.Module) -> None:
        with torch.inference_mode():
            worst.append(max(deviation(layer(x), expected) for _ in range(50)))

    threads = [threading.Thread(target=call, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        ended(thread, "a layer's calls in a thread of their own")
    assert len(worst) == 4
    assert max(worst) <= 1e-5
