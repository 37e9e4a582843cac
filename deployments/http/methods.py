"""What all routes share: HEAD and OPTIONS, the methods of a path, and query parameters that no route has."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from fastapi import Request, Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.calls import Fault, Refused
from deployments.http.responses import inert_header
from deployments.http.validation import cut
from deployments.http.wire import INERT_HEADER

_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_INERT = frozenset({"api-version"})  # as clients of Azure's OpenAI send with every request: there is one version


class HeadAsGet:
    """Middleware. HEAD is answered as GET is, without the body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: Message) -> None:
            if message["type"] != "http.response.body":
                await send(message)
            elif not message.get("more_body", False):
                await send({"type": "http.response.body", "body": b""})

        await self._app({**scope, "method": "GET"}, receive, send_head)


def allowed_methods(routes: Iterable[BaseRoute], scope: Scope) -> str:
    """The header Allow of the path in `scope`. All its routes count: Starlette tells those of the first one."""
    routes = list(routes)
    found = [
        method
        for method in _METHODS
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    ]
    if "GET" in found:
        found.insert(1, "HEAD")
    return ", ".join([*found, "OPTIONS"])


async def check_query(request: Request, response: Response) -> None:
    """A dependency of every route. Raises: Refused for a query parameter that the route has not, or that comes twice.

    At /health, which probes ask with whatever keeps caches away, all are without effect and named so.
    """
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    given = [name for name, _ in request.query_params.multi_items()]
    inert = [name for name in dict.fromkeys(given) if name in _INERT or request.url.path == "/health"]
    for name in given:
        if name not in known and name not in inert:
            near = next(iter(difflib.get_close_matches(name[:40], known, n=1)), None)
            remedy = f"did you mean {near!r}?" if near else "leave it out; fields of requests stand in the body"
            message = f"unknown query parameter {cut(name)!r}; {remedy}"
            raise Refused(Fault(code="unknown_parameter", message=message, param=cut(name)))
        if name in known and given.count(name) > 1:
            message = f"the query parameter {name!r} is given {given.count(name)} times; send it once"
            raise Refused(Fault(code="invalid_request", message=message, param=name))
    told = [cut(name) for name in inert if name.isascii() and name.isprintable()]
    if told:
        request.state.inert = (*getattr(request.state, "inert", ()), *told)
        response.headers[INERT_HEADER] = inert_header(told)[INERT_HEADER]
