"""Running an AsyncEngine over the alphabet, and reading its streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from engine.aio.async_engine import AsyncEngine
from engine.aio.owners import AdapterNews
from engine.request import OutputDelta
from tests.engine_api.alphabet import AlphabetRunner, make_engine
from tests.support.waiting import within


class Owner:
    """Writes down what an engine tells of images: offers, changes and answers, as they come."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.is_over = threading.Event()

    def offered(self, key: str) -> None:
        self.events.append(("offered", key))

    def told(self, news: AdapterNews) -> None:
        self.events += [("held" if is_held else "dropped", key) for key, is_held in news.changes]
        self.events += [("answered", key) for key in news.answered]
        if news.is_over:
            self.is_over.set()

    @property
    def dropped(self) -> list[str]:
        return [key for what, key in self.events if what == "dropped"]


@contextmanager
def running(runner: AlphabetRunner | None = None, **settings: Any) -> Iterator[AsyncEngine]:
    runner = runner or AlphabetRunner()
    callbacks = {name: settings.pop(name) for name in ("image_owner", "on_death") if name in settings}
    engine = AsyncEngine(make_engine(runner, **settings), **callbacks)
    try:
        yield engine
    finally:
        runner.gate.set()
        engine.close()


def wait_for(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(within(main, f"the end of {main.__qualname__}"))


async def collect(stream: AsyncIterator[OutputDelta]) -> list[OutputDelta]:
    return [delta async for delta in stream]


async def text_of(stream: AsyncIterator[OutputDelta]) -> str:
    return "".join(delta.text for delta in await collect(stream))
