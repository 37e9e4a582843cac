"""A request's bytes become its body, in this order: size, encoding, shape, JSON, fields. Large ones beside the loop.

The counts of `json_shape` bound what the parser may make; so no call of it holds the interpreter lock for long.
"""

from __future__ import annotations

import asyncio
import email.message
import inspect
import json
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast, get_type_hints

from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from deployments.calls import Fault, Refused
from deployments.http import limits
from deployments.http.encoding import as_utf8, check_charset, coding_of, unpacked
from deployments.http.json_shape import Shape, shape_of
from deployments.http.validation import fault_of_validation
from deployments.http.wire import inert_names
from deployments.settings.app import LimitSettings

INLINE_BYTES = 8192  # a thread would cost more than reading it here
_EMPTY = "the body is empty; send a JSON object"
NUM_THREADS = 1  # large bodies wait for each other, everybody else for none

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def read_json(text: bytes, max_values: int) -> Any:
    """The value of a JSON text. Raises: Refused, naming what is wrong with it."""
    shape = shape_of(text)
    for number, limit, what in (
        (shape.depth, limits.MAX_DEPTH, "levels of lists and objects"),
        (shape.num_containers, limits.MAX_CONTAINERS, "lists and objects"),
        (shape.num_strings, limits.MAX_STRINGS, "strings"),
        (shape.num_values, max_values, "values"),
    ):
        if number > limit:
            raise _wrong(f"the body holds {number} {what}, the limit is {limit}; send less")
    try:
        value = from_json(text, allow_inf_nan=False)
    except ValueError as error:
        raise _wrong(*_reason(text, error)) from error
    if _num_pairs(value) != shape.num_pairs:
        raise _wrong(*_twice(text, shape))
    return value


def _wrong(message: str, param: str | None = None) -> Refused:
    return Refused(Fault(code="invalid_request", message=message, param=param))


def _num_pairs(value: Any) -> int:
    """Names of fields in all objects: fewer than colons in the text where an object names a field twice."""
    if isinstance(value, dict):
        return len(value) + sum(_num_pairs(item) for item in value.values())
    if isinstance(value, list) and not {dict, list}.isdisjoint(map(type, value)):
        return sum(_num_pairs(item) for item in value)
    return 0


def _twice(text: bytes, shape: Shape) -> tuple[str, str | None]:
    names: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: set[str] = set()
        names.extend(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        return {}

    json.loads(text, object_pairs_hook=note)
    name = names[0][:100] if names else None
    return f"{name!r} is given twice in one object; send it once", name


def _reason(text: bytes, error: ValueError) -> tuple[str, str | None]:
    """Of an invalid text. Half a surrogate pair is JSON for other readers, and stands in some field."""
    if "hex escape" in str(error):
        try:
            broken = next(_broken_texts(json.loads(text), ""), None)
        except ValueError:
            broken = None
        if broken is not None:
            where = broken.lstrip(".") or None
            return f"{where or 'the body'}: it is not valid Unicode, half a surrogate pair stands alone", where
    return f"the body is not valid JSON: {error}", None


def _broken_texts(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, str):
        if not value.isascii() and value != value.encode(errors="replace").decode():
            yield where
    elif isinstance(value, dict):
        for name, item in value.items():
            if list(_broken_texts(name, "")):
                yield where
            yield from _broken_texts(item, f"{where}.{name[:100]}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _broken_texts(item, f"{where}[{index}]")


def route_class(settings: LimitSettings) -> type[APIRoute]:
    """Routes whose bodies are read here; `request.state.inert` has the fields that are accepted without effect."""
    pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="bodies")
    max_values = settings.max_prompt_ids + limits.MAX_OTHER_VALUES

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handle = super().get_route_handler()
            if self.body_field is None:
                return handle
            kind: Any = self.body_field.field_info.annotation
            adapter: TypeAdapter[Any] = TypeAdapter(kind)
            takes_body_only = _takes_body_only(self)

            def parse(sent: bytes, coding: str) -> tuple[Any, tuple[str, ...]]:
                text = as_utf8(unpacked(sent, coding, settings.max_body_bytes))
                if not text:
                    raise _wrong(_EMPTY)
                value = read_json(text, max_values)
                try:
                    body = adapter.validate_python(value)
                except ValidationError as error:
                    raise Refused(fault_of_validation(error.errors(include_url=False), kind)) from None
                return body, inert_names(body)

            async def read(request: Request) -> Response:
                coding = coding_of(", ".join(request.headers.getlist("content-encoding")))
                sent = await _bytes_of(request)
                if len(sent) <= INLINE_BYTES and not coding:
                    body, inert = parse(sent, coding)
                else:
                    body, inert = await asyncio.get_running_loop().run_in_executor(pool, parse, sent, coding)
                request.state.inert = inert
                if takes_body_only and not request.scope["query_string"]:  # a query is judged on the long way
                    return cast(Response, await self.endpoint(body=body, request=request))
                return await handle(_Read(request, body))

            return read

    return BodyRoute


async def _bytes_of(request: Request) -> bytes:
    _check_type(request.headers.get("content-type"))
    try:
        sent = await request.body()
    except ClientDisconnect as error:
        raise HTTPException(400, "the client went away before its body had come") from error
    if not sent:
        raise _wrong(_EMPTY)
    return sent


def _check_type(content_type: str | None) -> None:
    """A browser asks a server before it sends a page's JSON elsewhere, and does not for other types."""
    header = email.message.Message()
    header["content-type"] = content_type or ""
    subtype = header.get_content_subtype()
    if header.get_content_maintype() != "application" or not (subtype == "json" or subtype.endswith("+json")):
        given = f"content-type {content_type[:100]!r}" if content_type else "no content-type"
        why = f"{given}: the body cannot be read; send JSON with 'content-type: application/json'"
        raise Refused(Fault(code="unsupported_media_type", message=why))
    check_charset(header.get_content_charset())


def _takes_body_only(route: APIRoute) -> bool:
    """Whether its function takes (body, request), depends on nothing and makes its own response.

    Then nothing is left to do for FastAPI, whose way to find that out for each request costs more than the reading.
    """
    asked = route.dependant
    others = (asked.dependencies, asked.path_params, asked.query_params, asked.header_params, asked.cookie_params)
    takes = set(inspect.signature(route.endpoint).parameters) == {"body", "request"}
    return takes and not any(others) and get_type_hints(route.endpoint).get("return") is Response


class _Read(Request):
    """A request whose body was read: FastAPI is given the body itself, which is what its field's check wants."""

    def __init__(self, request: Request, body: Any) -> None:
        super().__init__(request.scope, request.receive)
        self._read = body

    async def body(self) -> bytes:
        return b"read"

    async def json(self) -> Any:
        return self._read
