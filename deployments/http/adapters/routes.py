"""Routes of the adapters API. Answers have the shapes of our own; failures are told as on /v1."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.routing import APIRoute

from adapter_store.records import AdapterRecord, check_name
from deployments.calls import Fault, Refused
from deployments.http.adapters import examples
from deployments.http.adapters.schema import NamedRequest, RegisterRequest
from deployments.http.auth import Caller
from deployments.http.documented import answers, failures
from deployments.http.limits import MAX_CURSOR_CHARS, MAX_PAGE
from deployments.http.openai.replies import error_body
from deployments.http.origin import check_is_json, check_is_local
from deployments.http.validation import cut
from deployments.router.gateway import Gateway

DEFAULT_PAGE = 100


async def _check_may_change(request: Request) -> None:
    caller: Caller = request.state.caller
    if not caller.may_change:
        what = f"{request.method} {cut(request.url.path)} changes what is served"
        remedy = "send a key of the environment variable that the server's setting admin_keys_env names"
        raise Refused(Fault(code="admin_key_required", message=f"{what}; {remedy}"))
    if not caller.has_admin_key:
        check_is_local(request.headers)
    if request.method == "POST":
        check_is_json(request.headers)


ADMIN = [Depends(_check_may_change)]
"""Of every route that changes what is served, or makes the server fetch something."""


def routes(gateway: Gateway, route_class: type[APIRoute]) -> APIRouter:
    """/adapters and what is below it. `route_class`: see `deployments.http.reading`."""
    told = failures(lambda answer: answer.status, error_body)
    router = APIRouter(prefix="/adapters", tags=["Adapters"], responses=told, route_class=route_class)

    @router.get("", responses=answers(examples.LISTING))
    async def adapters(
        after: Annotated[str | None, Query(max_length=MAX_CURSOR_CHARS, pattern=r"^\d+:")] = None,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = DEFAULT_PAGE,
    ) -> dict[str, Any]:
        """The adapters, a page at a time: give what a page says as `next` as the next one's `after`, until it is null.

        A page may be short. `unavailable` names sources that are away: what they have is left out. `requests` counts
        those of late, `num_bytes` and `rank` are known once it was packed.
        """
        page = await gateway.list_adapters(after, limit)
        adapters = [_told(record) for record in page.records]
        return {"adapters": adapters, "next": page.next_cursor, "unavailable": list(page.unavailable)}

    @router.post("", responses=answers(examples.REGISTERED), dependencies=ADMIN)
    async def register(body: RegisterRequest) -> dict[str, Any]:
        """Register one adapter or a list of up to 1000: all of them or none. A known name is replaced.

        `source` is a configured one and `location` a name in it (the adapter's own when left out; on the hub also
        `repository@revision`). `urls` gives the files' own addresses instead, for a source of kind http. The files
        must have the digests of `sha256`, if given. What is registered hides what sources have under the same name.
        """
        rows = body.rows
        first: dict[str, int] = {}
        for index, row in enumerate(rows):
            at = f"[{index}]." if isinstance(body.root, list) else ""
            if first.setdefault(row.name, index) != index:
                twice = f"{at}name: {cut(row.name)!r} is [{first[row.name]}].name too; send each name once"
                raise Refused(Fault(code="invalid_request", message=twice, param=f"{at}name"))
            gateway.check_adapter(row.name, f"{at}name")
            gateway.check_source(row.source, f"{at}source")
        await gateway.adapters.register(tuple(row.registration() for row in rows))
        return {"registered": len(rows)}

    @router.delete("/{name:path}", responses=answers(examples.UNREGISTERED), dependencies=ADMIN)
    async def unregister(name: str) -> dict[str, Any]:
        """Take back what was registered. Running requests end as they began, new ones hear of it within `refresh_s`."""
        check_name(name)  # nothing else: what may no longer be registered can still be taken back
        gone = await gateway.adapters.unregister((name,))
        if not gone:
            message = f"adapter {name!r} is not registered; what sources have is taken back there"
            raise Refused(Fault(code="model_not_found", message=message, param="name"))
        return {"unregistered": list(gone)}

    _add_actions(router, gateway)
    return router


def _add_actions(router: APIRouter, gateway: Gateway) -> None:
    store = gateway.adapters
    record = answers(examples.RECORD)

    @router.post("/refresh", responses=record, dependencies=ADMIN)
    async def refresh(body: NamedRequest) -> dict[str, Any]:
        """Look into its source now, whatever is remembered; a refused adapter may be tried again."""
        _check(gateway, body)
        return _told(await store.refresh(body.name, body.source))

    @router.post("/prefetch", responses=record, dependencies=ADMIN)
    async def prefetch(body: NamedRequest) -> dict[str, Any]:
        """Begin to bring an adapter to host memory, and answer at once."""
        _check(gateway, body)
        await store.prefetch(body.name, body.source)
        return _told(await store.resolve(body.name, body.source))

    @router.post("/pin", responses=record, dependencies=ADMIN)
    async def pin(body: NamedRequest) -> dict[str, Any]:
        """Keep an adapter on disk and in host memory, over restarts too. Devices: the setting `adapters.pinned`."""
        _check(gateway, body)
        return _told(await store.pin(body.name, body.source))

    @router.post("/unpin", responses=record, dependencies=ADMIN)
    async def unpin(body: NamedRequest) -> dict[str, Any]:
        """Let an adapter go when its room is needed."""
        _check(gateway, body)
        return _told(await store.unpin(body.name, body.source))


def _check(gateway: Gateway, body: NamedRequest) -> None:
    gateway.check_adapter(body.name, "name")
    gateway.check_source(body.source, "source")


def _told(record: AdapterRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "source": record.source,
        "version": record.version,
        "state": str(record.state),
        "rank": record.rank,
        "num_bytes": record.num_bytes,
        "pinned": record.is_pinned,
        "requests": round(record.requests, 2),
        "reason": record.reason,
        "notices": list(record.notices),
    }
