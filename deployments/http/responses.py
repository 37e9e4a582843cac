"""A streaming response that frees its sequences however it ends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from deployments.http.wire import INERT_HEADER
from deployments.router.gateway import Opened

logger = logging.getLogger("ray.serve")


def inert_header(names: Iterable[str]) -> dict[str, str]:
    """The header that names the fields of a request which were accepted without effect; none if there are none."""
    told = ", ".join(names)
    return {INERT_HEADER: told} if told else {}


@asynccontextmanager
async def closing(opened: Opened) -> AsyncIterator[None]:
    """Closes the streams of `opened` at the end; what had not finished is aborted."""
    try:
        yield
    finally:
        for stream in opened.streams:
            await stream.aclose()


class EventResponse(StreamingResponse):
    """Server-sent events of `opened`; when the client goes away its sequences are aborted."""

    def __init__(
        self, events: AsyncGenerator[bytes], opened: Opened, extra_headers: Mapping[str, str] | None = None
    ) -> None:
        # Proxies must pass events on as they come.
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(extra_headers or {})}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._opened = opened

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with closing(self._opened):
            try:
                # One task beside this one, where Starlette's own way has two and a group around them.
                async with asyncio.timeout(None) as until_gone:
                    watcher = asyncio.ensure_future(_ends_when_gone(receive, until_gone))
                    try:
                        await self.stream_response(send)
                    finally:
                        watcher.cancel()
            except OSError as error:  # of a send to nobody; a TimeoutError is one
                if not until_gone.expired():
                    raise ClientDisconnect from error
            finally:
                # A send that fails leaves the generator suspended: it must not wait for the garbage collector.
                await self._events.aclose()


async def _ends_when_gone(receive: Receive, until_gone: asyncio.Timeout) -> None:
    """Behind a request's body nothing comes but the word that its client is gone, or a failure that means it."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception as error:
        logger.info("a client is taken to be gone: %s: %s", type(error).__name__, error)
    until_gone.reschedule(asyncio.get_running_loop().time())
