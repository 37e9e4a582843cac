"""Before a body is read: who asks, and how much they send. Pure ASGI, so that streams pass untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ray.exceptions import TaskCancelledError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.calls import Fault, Refused
from deployments.http.auth import ApiKeys, Caller

OPEN_PATHS = frozenset({"/health", "/startup", "/docs", "/openapi.json", "/docs/oauth2-redirect"})
DOCS_FILES = "/docs/files"  # what the page at /docs loads: open too


class InFlight:
    """How many requests a router has not answered to their end."""

    def __init__(self) -> None:
        self.count = 0


class Gate:
    """Middleware. Sets `request.state.caller`."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: ApiKeys,
        max_body_bytes: int,
        refuse: Callable[[str, Fault], Response],
        in_flight: InFlight | None = None,
    ) -> None:
        self._in_flight = in_flight or InFlight()
        self._app = app
        self._keys = keys
        self._max_body_bytes = max_body_bytes
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            is_open = scope["path"] in OPEN_PATHS or scope["path"].startswith(DOCS_FILES + "/")
            caller = Caller("", False) if is_open else self._keys.caller(_credentials(headers))
            self._check_length(headers.get(b"content-length"))
        except Refused as error:
            await self._refuse(scope["path"], error.fault)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        self._in_flight.count += 1
        try:
            await self._app(scope, self._bounded(receive), send)
        finally:
            self._in_flight.count -= 1

    def _check_length(self, content_length: bytes | None) -> None:
        if content_length is not None and content_length.isdigit() and int(content_length) > self._max_body_bytes:
            message = f"the body has {int(content_length)} bytes, the limit is {self._max_body_bytes}; send less"
            raise Refused(Fault(code="body_too_large", message=message))

    def _bounded(self, receive: Receive) -> Receive:
        """A body without a declared length is counted as it comes."""
        seen = 0

        async def receive_bounded() -> Message:
            nonlocal seen
            try:
                message = await receive()
            except TaskCancelledError:
                # Serve's proxy stopped reading from a client that has gone.
                return {"type": "http.disconnect"}
            seen += len(message.get("body", b""))
            if seen > self._max_body_bytes:
                raise HTTPException(413, f"the body has more than the limit of {self._max_body_bytes} bytes; send less")
            return message

        return receive_bounded


def _credentials(headers: Mapping[bytes, bytes]) -> str | None:
    """What `Authorization` would say; Anthropic's clients send the key alone, under another name."""
    header = headers.get(b"authorization")
    if header is None and (key := headers.get(b"x-api-key")) is not None:
        header = b"Bearer " + key
    return None if header is None else header.decode("latin-1")
