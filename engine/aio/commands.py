"""What callers ask of the engine thread: each command is applied between two steps."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from engine.engine import Engine
from engine.errors import EngineDead, EngineError
from engine.request import FinishReason, Request

if TYPE_CHECKING:
    from engine.core.sequence import SequenceUpdate
    from engine.lora.image import AdapterImage

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Turn:
    """What one turn of the engine thread hands to the output thread."""

    opened: list[Request] = field(default_factory=list)
    refused: list[tuple[str, EngineError]] = field(default_factory=list)
    updates: tuple[SequenceUpdate, ...] = ()
    answered: list[str] = field(default_factory=list)  # adapter versions: one for each image that was handed over
    adapter_changes: tuple[tuple[str, bool], ...] = ()  # see `Engine.adapter_changes`

    def __bool__(self) -> bool:
        return bool(self.opened or self.refused or self.updates or self.answered or self.adapter_changes)


class Command(Protocol):
    def apply(self, engine: Engine, turn: Turn) -> None:
        """Raises: EngineDead. Whatever else goes wrong is told to whoever asked."""
        ...


@dataclass(frozen=True, slots=True)
class Add:
    request: Request
    image: AdapterImage | None

    def apply(self, engine: Engine, turn: Turn) -> None:
        try:
            engine.add_request(self.request, self.image)
        except EngineDead:
            raise
        except EngineError as error:
            turn.refused.append((self.request.request_id, error))
        else:
            turn.opened.append(self.request)
        if self.image is not None:
            turn.answered.append(self.image.key)


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str

    def apply(self, engine: Engine, turn: Turn) -> None:
        engine.abort(self.request_id)


@dataclass(frozen=True, slots=True)
class Finish:
    request_id: str
    sample_index: int

    def apply(self, engine: Engine, turn: Turn) -> None:
        engine.finish(self.request_id, self.sample_index, FinishReason.STOP)


@dataclass(frozen=True, slots=True)
class Preload:
    image: AdapterImage

    def apply(self, engine: Engine, turn: Turn) -> None:
        try:
            engine.preload(self.image)
        except EngineDead:
            raise
        except EngineError as error:  # who asked hears that the engine does not hold it
            logger.warning("adapter %s is not preloaded: %s", self.image.key, error)
        turn.answered.append(self.image.key)


@dataclass(frozen=True, slots=True)
class Pin:
    key: str
    answer: Future[None]

    def apply(self, engine: Engine, turn: Turn) -> None:
        try:
            engine.pin_adapter(self.key)
        except EngineError as error:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(None)


@dataclass(frozen=True, slots=True)
class Unpin:
    key: str

    def apply(self, engine: Engine, turn: Turn) -> None:
        engine.unpin_adapter(self.key)
