"""A TCP proxy before an HTTP server that damages the answers as a schedule says. A connection has one answer."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from tests.support.waiting import ended, happened, within

Kind = Literal["none", "refuse", "latency", "rate", "reset", "close", "hang", "flip"]
_CONNECTION = re.compile(rb"\r\nconnection:[^\r]*", re.IGNORECASE)
_RANGE = re.compile(rb"\r\nrange:([^\r]*)", re.IGNORECASE)
_HEADER_BYTES = 1 << 16
OPEN_S = 600.0  # of a proxy at most


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What happens to one answer.

    "refuse": the connection is reset before there is an answer. "latency": the answer comes `seconds` late. "rate": 1
    KiB of its body every `seconds`. The others happen at byte `at` of the body, modulo its length: "reset" (RST),
    "close" (FIN, so that the body is too short), "hang" (nothing more comes), "flip" (one bit of that byte).
    """

    kind: Kind = "none"
    at: int = 0
    seconds: float = 0.0


class Schedule:
    """Seeded: which fault the next connection has. `share` of them have one; `weights` tells of the kinds."""

    def __init__(self, seed: int, share: float, weights: dict[Kind, float], longest: int, seconds: float) -> None:
        self._random = random.Random(seed)
        self._share = share
        self._kinds, self._weights = list(weights), list(weights.values())
        self._longest = longest
        self._seconds = seconds

    def __call__(self) -> Fault:
        if self._random.random() >= self._share:
            return Fault()
        (kind,) = self._random.choices(self._kinds, self._weights)
        return Fault(kind=kind, at=self._random.randrange(self._longest), seconds=self._seconds)


class FaultProxy:
    """`with FaultProxy(port, choose) as proxy:` proxies to 127.0.0.1:`port`, in a thread of its own.

    `choose` is given the request's target ("/bucket/key?query") and gives the fault.
    """

    def __init__(self, port: int, choose: Callable[[str], Fault]) -> None:
        self.applied: Counter[str] = Counter()  # kinds
        self._flipped: set[tuple[object, ...]] = set()
        self._upstream_port = port
        self._choose = choose
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="fault-proxy")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over: asyncio.Event | None = None
        self._port = 0

    @property
    def address(self) -> str:
        """To be used instead of the server's."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        happened(self._ready, "the start of the proxy")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop is not None
        assert self._over is not None
        self._loop.call_soon_threadsafe(self._over.set)
        ended(self._thread, "the end of the proxy")

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        connections: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._connection(reader, writer))
            connections.add(task)
            task.add_done_callback(connections.discard)

        server = await asyncio.start_server(accept, "127.0.0.1", 0, limit=_HEADER_BYTES)
        self._port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await within(self._over.wait(), "the test to end", OPEN_S)
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            try:
                request = await reader.readuntil(b"\r\n\r\n")
                target = request.split(b" ", 2)[1].decode()
                fault = self._choose(target)
                if fault.kind != "none":
                    self.applied[fault.kind] += 1
                if fault.kind == "refuse":
                    _reset(writer)
                else:
                    await self._answer(request, fault, reader, writer)
            finally:
                writer.close()

    async def _answer(
        self, request: bytes, fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        upstream, to_upstream = await asyncio.open_connection("127.0.0.1", self._upstream_port, limit=_HEADER_BYTES)
        try:
            to_upstream.write(_CONNECTION.sub(b"", request[:-2]) + b"Connection: close\r\n\r\n")
            head = await upstream.readuntil(b"\r\n\r\n")
            body = await upstream.read()
        finally:
            to_upstream.close()
        if fault.kind == "latency":
            await asyncio.sleep(fault.seconds)
        writer.write(head)
        at = fault.at % max(1, len(body))
        if fault.kind == "flip" and body:
            body = self._flip(request, body, at)
        elif fault.kind == "rate":
            for start in range(0, len(body), 1024):
                writer.write(body[start : start + 1024])
                await asyncio.sleep(fault.seconds)
            body = b""
        elif fault.kind in ("reset", "close", "hang"):
            body = body[:at]
        writer.write(body)
        await writer.drain()
        if fault.kind == "reset":
            _reset(writer)
        elif fault.kind == "hang":
            await reader.read()  # until the client gives up

    def _flip(self, request: bytes, body: bytes, at: int) -> bytes:
        """Damages `body` as no earlier answer to the same question was: damage that is twice the same has no cure."""
        found = _RANGE.search(request)
        question = (request.split(b" ", 2)[1], found and found[1])
        bit = 8 * at + at % 8
        while (*question, bit) in self._flipped:
            bit = (bit + 1) % (8 * len(body))
        self._flipped.add((*question, bit))
        damaged = bytearray(body)
        damaged[bit // 8] ^= 1 << bit % 8
        return bytes(damaged)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Closes with RST instead of FIN."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
