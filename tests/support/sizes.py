"""An engine's sizes on a machine that has enough."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.model.loader import LoadedModel
from engine.runner.memory import size_engine
from engine.sizing.room import MIB, Room

AMPLE = Room(total_bytes=1024 * MIB, base_bytes=0, source="a test")


def num_kv_blocks(loaded: LoadedModel, config: EngineConfig) -> int:
    return size_engine(loaded, config, AMPLE)[1].num_blocks
