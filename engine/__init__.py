"""Chorus engine: continuous-batching multi-LoRA inference, usable without Ray.

    from engine import LLM, SamplingParams
    llm = LLM("demo/base", adapters={"upper": "demo/adapters/upper"})
    llm.generate(["hello\\n"], SamplingParams(max_tokens=32, temperature=0), adapters=["upper"])

Names are exported lazily, so that importing `engine.request` or `engine.core` never imports torch.

Shape letters, used in every docstring and tensor comment of this package:
T tokens of this step, S sequences, B blocks, P block size (tokens), L layers, Hq/Hk query/key heads,
D head_dim, R rank, A adapters, V vocabulary.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.aio.async_engine import AsyncEngine
    from engine.config import EngineConfig
    from engine.engine import Engine
    from engine.llm import LLM
    from engine.request import FinishReason, Request, SamplingParams

_HOME = {
    "LLM": "engine.llm",
    "AsyncEngine": "engine.aio.async_engine",
    "Engine": "engine.engine",
    "EngineConfig": "engine.config",
    "FinishReason": "engine.request",
    "Request": "engine.request",
    "SamplingParams": "engine.request",
}

__all__ = ["LLM", "AsyncEngine", "Engine", "EngineConfig", "FinishReason", "Request", "SamplingParams"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
