"""Replicas that die, as several routers see them: one process, one event loop, a seed for every choice."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

from deployments.calls import RESERVED_CODE, Call, Fault, Refused, StreamItem
from deployments.losses import Meaning
from deployments.replica.alone import Door
from deployments.router.streams import ReplicaLost, answer
from deployments.router.suspects import Suspects
from engine.request import FinishReason, OutputDelta, SamplingParams

DEADLINE_S = 60.0
Kills = Callable[[Call, int], bool]
"""Whether a request ends its replica now: (its call, tokens that this life brought)."""


@dataclass
class FakeReplica:
    name: str
    door: Door = field(default_factory=Door)
    calls: list[Call] = field(default_factory=list)
    lost: Meaning | None = None  # why it is gone


class Fleet:
    """`num_replicas` are always there: one that is lost is replaced at once, under a new name."""

    def __init__(self, num_replicas: int, *, seed: int, kills: Kills = lambda call, life: False) -> None:
        self._rng = random.Random(seed)
        self._kills = kills
        self._num_started = 0
        self.replicas = [self._start() for _ in range(num_replicas)]
        self.deaths: list[tuple[str, ...]] = []  # the prompts that were there when a request ended a replica
        self.num_calls = 0

    def _start(self) -> FakeReplica:
        self._num_started += 1
        return FakeReplica(f"r{self._num_started}")

    def lose(self, replica: FakeReplica, lost: Meaning) -> None:
        if replica.lost is None:
            replica.lost = lost
            self.replicas[self.replicas.index(replica)] = self._start()

    def lose_one(self, lost: Meaning) -> None:
        """One that is busy, if any is."""
        self.lose(max(self.replicas, key=lambda replica: (len(replica.calls), self._rng.random())), lost)

    def _choose(self, call: Call) -> FakeReplica:
        def order(replica: FakeReplica) -> tuple[bool, float, float]:
            load = len(replica.calls) if call.alone_tokens else 0
            return (replica.name in call.avoid, load, self._rng.random())

        return min(self.replicas, key=order)

    async def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        self.num_calls += 1
        replica = self._choose(call)
        if not replica.door.admits(call, len(replica.calls)):
            yield StreamItem(replica=replica.name, fault=Fault(code=RESERVED_CODE, message="reserved"))
            return
        replica.calls.append(call)
        try:
            yield StreamItem(replica=replica.name)
            async for delta in self._deltas(replica, call):
                replica.door.produced(call, len(delta.token_ids))
                yield StreamItem(replica=replica.name, deltas=(delta,))
        finally:
            replica.calls.remove(call)
            replica.door.left(call)

    async def _deltas(self, replica: FakeReplica, call: Call) -> AsyncGenerator[OutputDelta]:
        """The prompt again, a character at a time."""
        text = [*bytes(call.prompt_token_ids)][len(call.resumed_output_token_ids) :]
        for life, token in enumerate(text):
            for _ in range(self._rng.randrange(3)):
                await asyncio.sleep(0)
            if replica.lost is None and self._kills(call, life):
                self.deaths.append(tuple(bytes(other.prompt_token_ids).decode() for other in replica.calls))
                self.lose(replica, Meaning.DIED)
            if replica.lost is not None:
                raise ReplicaLost(replica.name, meaning=replica.lost)
            last = life + 1 == len(text)
            yield OutputDelta(
                call.request_id, call.sample_index, (token,), chr(token), None, FinishReason.STOP if last else None
            )

    async def ping(self) -> None:
        """Always well."""

    async def stats(self) -> list[dict[str, object]]:
        return []


def call_of(text: str, **fields: object) -> Call:
    params = SamplingParams(max_tokens=None)
    return Call(**{"request_id": text, "prompt_token_ids": tuple(text.encode()), "params": params, "seed": 1} | fields)  # type: ignore[arg-type]


async def outcome(fleet: Fleet, suspects: Suspects, call: Call, max_resumes: int = 50) -> str:
    """The text, or the code of the refusal."""
    parts = []
    try:
        async for delta in answer(fleet, call, max_resumes=max_resumes, suspects=suspects):
            parts.append(delta.text)
    except Refused as error:
        return error.fault.code
    return "".join(parts)


async def outcomes(fleet: Fleet, routers: list[Suspects], texts: list[str], rng: random.Random) -> dict[str, str]:
    """Of all `texts`, each sent by one of the routers, a little apart."""

    async def one(text: str, suspects: Suspects) -> str:
        for _ in range(rng.randrange(30)):
            await asyncio.sleep(0)
        return await outcome(fleet, suspects, call_of(text))

    async with asyncio.timeout(DEADLINE_S):
        found = await asyncio.gather(*(one(text, rng.choice(routers)) for text in texts))
    return dict(zip(texts, found, strict=True))
