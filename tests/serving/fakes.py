"""Stand-ins for the replicas, the adapter store and the tokenizer: the API in one process, without Ray or torch."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
from fastapi import FastAPI
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers

from adapter_store.errors import AdapterNotFound, PinRefused, RegistrationInvalid
from adapter_store.records import AdapterPage, AdapterRecord, Registration, StoreStatus
from deployments.calls import Call, Fault, Refused, StreamItem
from deployments.dialects.dialect import PLAIN, Dialect
from deployments.http.api import create_api
from deployments.http.auth import ApiKeys
from deployments.kept.answers import Answers, Kept, OwnAnswers
from deployments.losses import Meaning
from deployments.router.gateway import Gateway
from deployments.router.prompts import Prompts
from deployments.router.streams import ReplicaLost
from deployments.settings.app import LimitSettings
from engine.pooling import NextToken, Pooling, PoolingDefaults, PromptScores
from engine.request import FinishReason, OutputDelta, TokenLogprobs
from engine.text.tokenizer import Tokenizer

EOS = 256
VOCAB_SIZE = 257
KEY = "a-key-of-sixteen-or-more"
URL = "http://127.0.0.1:8000"
ADMIN_KEY = "an-admin-key-of-sixteen-or-more"


class _HfTokenizer:
    """What `engine.text.tokenizer.Tokenizer` uses of a transformers tokenizer: bytes, `</s>`, a chat template."""

    eos_token_id = EOS
    chat_template = "lines"

    def __init__(self) -> None:
        kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        symbols = {byte: chr(byte) for byte in kept}
        symbols |= {byte: chr(0x100 + i) for i, byte in enumerate(b for b in range(256) if b not in symbols)}
        core = RustTokenizer(models.BPE(vocab={symbols[b]: b for b in range(256)}, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        core.add_special_tokens(["</s>"])
        self.backend_tokenizer = core

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
        return "".join(f"{message['content']}\n" for message in messages)


def make_prompts(limits: LimitSettings | None = None) -> Prompts:
    return Prompts(Tokenizer(_HfTokenizer()), VOCAB_SIZE, limits or LimitSettings())  # type: ignore[arg-type]


Reply = Callable[[Call], str]
Numbers = Callable[[Call], Sequence[float]]


def counted(call: Call) -> list[float]:
    """A vector of how often each of eight kinds of bytes occurs, turned round for an adapter; cut as asked for. Of a
    request for log-probabilities: the same for all tokens."""
    if isinstance(call.numbers, PromptScores):  # "A" is the likeliest everywhere, then "B"
        top = call.numbers.top
        return [
            number
            for _ in call.prompt_token_ids[1:]
            for number in (-2.0, 3.0, *range(65, 65 + top), *range(-1, -1 - top, -1))
        ]
    if isinstance(call.numbers, NextToken):
        return [-1.5] * len(call.numbers.token_ids)
    assert isinstance(call.numbers, Pooling)
    counts = [sum(i % 8 == kind for i in call.prompt_token_ids) for kind in range(8)]
    counts = (counts[::-1] if call.adapter else counts)[: call.numbers.dimensions]
    length = sum(count * count for count in counts) ** 0.5 if call.numbers.normalize else 1.0
    return [count / length for count in counts]


def last_line(call: Call) -> str:
    """Repeats the last line of the prompt, in upper case when an adapter was asked for."""
    line = bytes(i for i in call.prompt_token_ids if i < EOS).decode().rstrip("\n").rsplit("\n", 1)[-1]
    return line.upper() if call.adapter else line


@dataclass
class FakeBackend:
    """Answers like a replica, `per_item` tokens at a time; `deaths` kills it after so many tokens, once each.

    `lost` is what Ray tells of these deaths.
    """

    reply: Reply = last_line
    numbers: Numbers = counted  # of requests for vectors
    per_item: int = 1
    deaths: list[int] = field(default_factory=list)
    lost: Meaning = Meaning.DIED
    fault: Fault | None = None
    fault_after: int = 0
    pause_s: float = 0.0
    version: str = "v1"
    queue_s: float = 0.0
    number_samples: bool = False  # write its index behind each sample
    calls: list[Call] = field(default_factory=list)
    open_streams: int = 0
    alive: bool = True

    async def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        self.calls.append(call)
        name = f"replica-{len(self.calls)}"
        die_after = self.deaths.pop(0) if self.deaths else None
        self.open_streams += 1
        try:
            if call.numbers is not None and self.fault is None and die_after is None:
                await asyncio.sleep(self.pause_s)
                yield StreamItem(replica=name, deltas=(self._vector(call),))
                return
            sent = 0
            for deltas in self._deltas(call):
                await asyncio.sleep(self.pause_s)
                if die_after is not None and sent >= die_after:
                    raise ReplicaLost(name, meaning=self.lost)
                if self.fault is not None and sent >= self.fault_after:
                    yield StreamItem(replica=name, fault=self.fault)
                    return
                sent += sum(len(delta.token_ids) for delta in deltas)
                version = call.adapter_version or (self.version if call.adapter else None)
                yield StreamItem(replica=name, adapter_version=version, deltas=deltas)
            if die_after is not None:
                raise ReplicaLost(name, meaning=self.lost)
        finally:
            self.open_streams -= 1

    def _vector(self, call: Call) -> OutputDelta:
        data = array("f", self.numbers(call)).tobytes()
        return OutputDelta(call.request_id, call.sample_index, finish_reason=FinishReason.STOP, vector=data)

    def _deltas(self, call: Call) -> list[tuple[OutputDelta, ...]]:
        """Of all samples, step by step."""
        samples = range(call.sample_index, call.sample_index + call.params.n)
        outputs = {index: self._output(call, index) for index in samples}
        steps: list[tuple[OutputDelta, ...]] = []
        for at in range(0, max(len(ids) for ids, _ in outputs.values()), self.per_item):
            steps.append(
                tuple(
                    self._delta(call, index, ids[at : at + self.per_item], at + self.per_item >= len(ids), reason)
                    for index, (ids, reason) in outputs.items()
                    if at < len(ids)
                )
            )
        steps[0] = (steps[0][0]._replace(queue_s=self.queue_s), *steps[0][1:])
        return steps

    def _output(self, call: Call, index: int) -> tuple[list[int], FinishReason]:
        text = self.reply(call) + (str(index) if self.number_samples else "")
        ids = [*text.encode(), EOS]
        limit = call.params.max_tokens
        reason = FinishReason.STOP
        if limit is not None and limit < len(ids):
            ids, reason = ids[:limit], FinishReason.LENGTH
        return ids[len(call.resumed_output_token_ids) :], reason

    def _delta(self, call: Call, index: int, ids: list[int], last: bool, reason: FinishReason) -> OutputDelta:
        k = call.params.logprobs
        logprobs = None if k is None else tuple(TokenLogprobs(i, -0.5, ((i, -0.5), (90, -2.0))[:k]) for i in ids)
        return OutputDelta(
            request_id=call.request_id,
            sample_index=index,
            token_ids=tuple(ids),
            text=bytes(i for i in ids if i != EOS).decode(),
            logprobs=logprobs,
            finish_reason=reason if last else None,
        )

    async def ping(self) -> None:
        if not self.alive:
            raise Refused(Fault(code="engine_dead", message="no replica answered"))

    async def stats(self) -> list[dict[str, object]]:
        return [{"replica": "replica-1"}]


@dataclass
class FakeAdapters:
    """A store with some names; `calls` are those that change something."""

    names: Sequence[str] = ("alpha", "beta", "gamma")
    expected: list[tuple[str, str | None]] = field(default_factory=list)
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    registered: dict[str, Registration] = field(default_factory=dict)
    pages: list[int] = field(default_factory=list)  # the sizes asked for

    def expect(self, name: str, source: str | None) -> None:
        self.expected.append((name, source))

    async def resolve(self, name: str, source: str | None = None) -> AdapterRecord:
        if name not in self.names and name not in self.registered:
            raise AdapterNotFound(name, ("local",))
        return AdapterRecord(name=name, source="local", version="v1")

    async def refresh(self, name: str, source: str | None = None) -> AdapterRecord:
        self.calls.append(("refresh", name, source))
        return await self.resolve(name, source)

    async def prefetch(self, name: str, source: str | None = None) -> None:
        self.calls.append(("prefetch", name, source))

    async def pin(self, name: str, source: str | None = None) -> AdapterRecord:
        if name == "gamma":
            raise PinRefused(name, 2, 1, 2)
        self.calls.append(("pin", name, source))
        return replace(await self.resolve(name, source), is_pinned=True)

    async def unpin(self, name: str, source: str | None = None) -> AdapterRecord:
        self.calls.append(("unpin", name, source))
        return await self.resolve(name, source)

    async def register(self, rows: tuple[Registration, ...]) -> None:
        if any(row.location == "nowhere" for row in rows):
            raise RegistrationInvalid(rows[0].name, "no such place")
        self.registered |= {row.name: row for row in rows}

    async def unregister(self, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if self.registered.pop(name, None) is not None)

    async def list_adapters(self, cursor: str | None, limit: int) -> AdapterPage:
        self.pages.append(limit)
        inner = (cursor or "0:").partition(":")[2]
        rest = [name for name in sorted({*self.names, *self.registered}) if name > inner]
        records = tuple(AdapterRecord(name=name, source="local", version=None) for name in rest[:limit])
        return AdapterPage(records=records, next_cursor=f"0:{rest[limit - 1]}" if len(rest) > limit else None)

    async def status(self) -> StoreStatus:
        values: dict[str, Any] = dict.fromkeys(StoreStatus.__dataclass_fields__, 0)
        return StoreStatus(**values | {"sources": ("local",)})


class EverybodysAnswers:
    """Kept answers of which everyone has one of each name."""

    async def put(self, tenant: str, name: str, data: bytes) -> bool:
        return True

    async def get(self, tenant: str, name: str) -> bytes | None:
        return json.dumps({"response": {"id": name, "output": []}, "input": []}).encode()

    async def delete(self, tenant: str, name: str) -> bool:
        return True


@dataclass
class Served:
    """The application over fakes, and a client of it."""

    backend: FakeBackend
    adapters: FakeAdapters
    app: FastAPI
    client: httpx.AsyncClient


def serve(
    backend: FakeBackend | None = None,
    *,
    keys: ApiKeys | None = None,
    limits: LimitSettings | None = None,
    allowed: tuple[str, ...] | None = None,
    max_resumes: int = 8,
    cors: tuple[str, ...] | None = None,
    defaults: dict[str, float] | None = None,
    kept: Kept | None = None,
    prompts: Prompts | None = None,
    dialect: Dialect = PLAIN,
    pooling: PoolingDefaults | None = None,
) -> Served:
    backend = backend or FakeBackend()
    adapters = FakeAdapters()
    limits = limits or LimitSettings()
    gateway = Gateway(
        backend=backend,
        adapters=adapters,
        prompts=prompts or make_prompts(limits),
        dialect=dialect,
        model_id="demo",
        sources={"local": "file", "s3": "s3"},
        allowed=allowed,
        max_resumes=max_resumes,
        defaults=defaults or {},
        kept=kept or OwnAnswers(Answers(1 << 20, 1 << 19, 60.0)),
        pooling=pooling or PoolingDefaults(),
    )
    app = create_api(gateway, keys or ApiKeys(is_local=True), limits, cors)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return Served(backend, adapters, app, httpx.AsyncClient(transport=transport, base_url=URL))
