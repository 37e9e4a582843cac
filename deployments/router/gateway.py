"""One request's way through a router: allow-list, prefetch, tokenise, place, first item. No HTTP in here."""

from __future__ import annotations

import logging
import secrets
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from adapter_store.errors import AdapterNameInvalid
from adapter_store.records import AdapterPage, AdapterRecord, Registration, StoreStatus, check_name
from deployments.asks import Ask
from deployments.calls import Call, Fault, Refused, merge_name, prefix_hints
from deployments.dialects.dialect import PLAIN, Dialect
from deployments.kept.answers import Answers, Kept, OwnAnswers
from deployments.router.prompts import Prompts
from deployments.router.streams import Backend, Primed, all_primed, answer
from deployments.router.suspects import Suspects
from deployments.router.vectors import Answered, Vectors, at_once, vector_of
from deployments.settings.app import is_allowed
from engine.errors import InvalidRequest
from engine.pooling import PoolingDefaults
from engine.request import OutputDelta

logger = logging.getLogger("ray.serve")

FIRST_CURSOR = "0:"  # of the store's listing
MAX_CALLS = 32  # of one request for numbers at the same time: a queue has room for others too
MAX_STORE_PAGES = 8  # that one page of ours is made of: sources may give short ones


class Adapters(Protocol):
    """The adapter store, as a router uses it."""

    def expect(self, name: str, source: str | None) -> None:
        """A request for `name` is on its way; returns at once."""
        ...

    async def resolve(self, name: str, source: str | None = None) -> AdapterRecord: ...

    async def refresh(self, name: str, source: str | None = None) -> AdapterRecord: ...

    async def prefetch(self, name: str, source: str | None = None) -> None: ...

    async def pin(self, name: str, source: str | None = None) -> AdapterRecord: ...

    async def unpin(self, name: str, source: str | None = None) -> AdapterRecord: ...

    async def register(self, rows: tuple[Registration, ...]) -> None: ...

    async def unregister(self, names: tuple[str, ...]) -> tuple[str, ...]: ...

    async def list_adapters(self, cursor: str | None, limit: int) -> AdapterPage: ...

    async def status(self) -> StoreStatus: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A request that a replica has begun to answer: one stream per prompt."""

    request_id: str  # as its answer says it: the caller's, if it gave one
    seeds: tuple[int, ...]  # of each prompt
    prompts: tuple[tuple[int, ...], ...]
    streams: Sequence[Primed[OutputDelta]]
    sent_s: float  # when it was checked and tokenised, on the monotonic clock
    first_s: float  # when each prompt had its first tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """What the routes of all APIs share."""

    backend: Backend
    adapters: Adapters
    prompts: Prompts
    model_id: str
    sources: Mapping[str, str] = field(default_factory=dict)  # names that adapter_source may say, and their kinds
    device: str = "cpu"  # of the replicas
    allowed: tuple[str, ...] | None = None  # shell patterns of adapter names
    max_resumes: int = 8
    suspects: Suspects = field(default_factory=Suspects)
    kept: Kept = field(
        default_factory=lambda: OwnAnswers(Answers(1 << 20, 1 << 20, 60.0))
    )  # answers that clients refer to
    pooling: PoolingDefaults = field(default_factory=PoolingDefaults)
    defaults: Mapping[str, float] = field(default_factory=dict)  # of sampling, where a request gives none
    dialect: Dialect = PLAIN  # how the model writes reasoning and calls of tools

    async def max_model_len(self) -> int | None:
        """Tokens of prompt and answer, as the replica that says it first has it; None: none says it now."""
        for said in await self.backend.stats():
            engine: Any = said.get("engine")
            if isinstance(engine, dict) and engine.get("sizes"):
                return int(engine["sizes"]["max_model_len"])
        return None

    def check_adapter(self, name: str, param: str) -> None:
        """Raises: InvalidRequest for the base's id, which means no adapter in any request; Refused for what is no name
        (`adapter_name_invalid`), or is not on the allow-list (`model_not_found`)."""
        try:
            check_name(name)
        except AdapterNameInvalid as error:
            raise Refused(Fault(code=error.code, message=str(error), param=param)) from error
        if name == self.model_id:
            raise InvalidRequest(param, f"{name!r} is the base model; an adapter needs another name")
        if not is_allowed(name, self.allowed):
            raise Refused(Fault(code="model_not_found", message=f"adapter {name!r} is not served here", param=param))

    def serves(self, name: str) -> bool:
        """Whether a request can ask for the adapter `name`: what `check_adapter` lets pass."""
        try:
            self.check_adapter(name, "name")
        except (InvalidRequest, Refused):
            return False
        return True

    def check_source(self, source: str | None, param: str) -> None:
        """Raises: InvalidRequest when there is no source of that name."""
        if source is not None and source not in self.sources:
            known = ", ".join(self.sources) or "none"
            raise InvalidRequest(param, f"{source!r} is not configured; known: {known}")

    def _expect(self, ask: Ask) -> None:
        """Checks the adapters of `ask`, and tells the store of each. Raises: as `check_adapter`, `check_source`."""
        named = [(part.name, part.source) for part in ask.parts]
        if ask.adapter is not None:
            named.append((ask.adapter, ask.adapter_source))
        for name, source in named:
            self.check_adapter(name, ask.model_param)
            self.check_source(source, "adapter_source")
        for name, source in dict.fromkeys(named):
            self.adapters.expect(name, source)

    async def list_adapters(self, after: str | None, limit: int) -> AdapterPage:
        """Those of at most `limit` names behind `after` that requests can ask for: a page may be short, even empty.

        However many names there are, and however few of them are allowed, a page costs no more than a page.
        """
        cursor: str | None = after or FIRST_CURSOR
        found: list[AdapterRecord] = []
        away: dict[str, None] = {}
        num_seen = 0
        for _ in range(MAX_STORE_PAGES):
            if cursor is None or num_seen >= limit:
                break
            page = await self.adapters.list_adapters(cursor, limit - num_seen)
            num_seen += len(page.records)
            away |= dict.fromkeys(page.unavailable)
            found += [record for record in page.records if self.serves(record.name)]
            cursor = page.next_cursor
        return AdapterPage(records=tuple(found), next_cursor=cursor, unavailable=tuple(away))

    def _calls(self, ask: Ask, prompts: Sequence[tuple[int, ...]], tenant: str, request_id: str) -> list[Call]:
        """One for each of `prompts`."""
        # A seed that was given makes each prompt's answer what it would be if it were sent alone. One that is drawn is
        # drawn for each: a sample depends on nothing but its seed, its index and its position.
        given = ask.params.seed
        # Between keys nothing is shared, not even the time that a cached prefix saves.
        salt = f"{tenant}/{ask.cache_salt}" if tenant or ask.cache_salt else ""
        adapter = merge_name(ask.parts) if ask.parts else ask.adapter
        params = self.prompts.params_of(ask)
        return [
            Call(
                request_id=request_id if len(prompts) == 1 else f"{request_id}-{index}",
                prompt_token_ids=ids,
                params=params,
                seed=secrets.randbits(63) if given is None else given,
                adapter=adapter,
                adapter_source=ask.adapter_source,
                parts=ask.parts,
                tenant=tenant or ask.user,
                cache_salt=salt,
                prefix_hints=prefix_hints(adapter, salt, ids, ask.cache_key),
                priority=ask.priority,
                numbers=ask.numbers,
            )
            for index, ids in enumerate(prompts)
        ]

    async def open(self, ask: Ask, tenant: str) -> Opened:
        """Starts all prompts of `ask`; returns when each has its first tokens.

        Raises: Refused, or an error of the engine's or the store's tree. Then nothing of the request runs on.
        """
        request_id = self.admit(ask, tenant)
        prompts = await self.prompts.encode(ask)
        sent_s = time.monotonic()
        calls = self._calls(ask, prompts, tenant, request_id)
        streams = await all_primed(
            [answer(self.backend, call, max_resumes=self.max_resumes, suspects=self.suspects) for call in calls]
        )
        return Opened(
            request_id=ask.request_id or request_id,
            seeds=tuple(call.seed for call in calls),
            prompts=tuple(prompts),
            streams=streams,
            sent_s=sent_s,
            first_s=time.monotonic(),
        )

    async def vectors(self, ask: Ask, tenant: str) -> Vectors:
        """The answers to all prompts of an `ask` for numbers, in their order. Raises: as `open`."""
        request_id = self.admit(ask, tenant)
        prompts = await self.prompts.encode(ask)
        found = await self.vectors_of([(ask, ids) for ids in prompts], tenant, request_id)
        return Vectors(request_id=ask.request_id or request_id, answers=tuple(found))

    async def vectors_of(
        self, asked: Sequence[tuple[Ask, tuple[int, ...]]], tenant: str, request_id: str
    ) -> list[Answered]:
        """As `vectors`, of asks that were admitted, each with a prompt that is tokens already. `request_id`: of these
        calls and no others that may run."""
        jobs = [
            partial(self._vector, ask, ids, tenant, f"{request_id}-{index}") for index, (ask, ids) in enumerate(asked)
        ]
        return await at_once(jobs, MAX_CALLS)

    async def _vector(self, ask: Ask, ids: tuple[int, ...], tenant: str, request_id: str) -> Answered:
        # Made when its turn comes: hints cost a little, and other streams go on between two calls.
        (call,) = self._calls(ask, [ids], tenant, request_id)
        return await vector_of(self.backend, call, self.max_resumes, self.suspects)

    def admit(self, ask: Ask, tenant: str) -> str:
        """An id for `ask`, whose adapters may be asked for; the store is told that they are. Raises: as `open`."""
        self._expect(ask)
        # Of our own making whatever the caller's is: two running requests never have one id.
        request_id = uuid.uuid4().hex
        told_id = ask.request_id or request_id
        names = ", ".join(f"{part.weight:g} {part.name}" for part in ask.parts) or ask.adapter
        asked = (request_id, told_id, tenant, ask.user, names)
        logger.info("request %s id=%r tenant=%r user=%r adapter=%r", *asked)
        return request_id
