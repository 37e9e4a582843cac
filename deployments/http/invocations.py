"""SageMaker's one path for everything: POST /invocations goes where its body says."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATH = "/invocations"
# The first field that is named in the first bytes decides: of these no body of another API has one.
_BY_FIELD = (
    (b'"messages"', "/v1/chat/completions"),
    (b'"prompt"', "/v1/completions"),
    (b'"query"', "/v1/rerank"),
    (b'"text_1"', "/v1/score"),
    (b'"questions"', "/v1/decisions"),
    (b'"inputs"', "/"),
    (b'"input"', "/v1/embeddings"),
)
_LOOKED_AT = 65_536  # bytes, in which a body names its fields; what is packed is taken for a chat


class Invocations:
    """Middleware, around the gate: a body is bounded there, and read once."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        seen: list[Message] = []
        start = b""
        while len(start) < _LOOKED_AT:
            message = await receive()
            seen.append(message)
            start += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = next((path for field, path in _BY_FIELD if field in start), "/v1/chat/completions")
        again = iter(seen)

        async def replayed() -> Message:
            return next(again, None) or await receive()

        await self._app({**scope, "path": path, "raw_path": path.encode()}, replayed, send)
