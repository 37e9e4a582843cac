"""Requests that end the process of the replica that serves them, told from those that were only there.

What one router knows: which requests were on a replica when it died. Deaths that somebody ordered do not count. A
request that was there at `SUSPECT_DEATHS` deaths is a suspect: suspects resume one at a time, each on a replica that
serves nothing else meanwhile. One that is alone at yet another death is refused, and remembered by what it asks for.
So a request costs three replicas at most, also when its caller sends it again, and one that was only there loses time.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace

from deployments.calls import Call, Fault, Refused

SUSPECT_DEATHS = 2
REMEMBERED_S = 3600.0  # a request that ended replicas is refused, and a suspect stays one
MAX_REMEMBERED = 10_000  # requests; the ones that were seen longest ago are forgotten first
SPARE_TOKENS = 64  # beyond twice those of its last life, until a suspect need not be alone any more
TURN_S = 60.0  # that a suspect is alone at most: others wait
HUNG_S = 30.0  # without an item; Serve waits longer before it stops a replica
MAX_DEATHS = 1024  # that are remembered, for streams that hear of them late


def fingerprint(call: Call) -> str:
    """What `call` asks for: equal for all its samples and continuations, and when it is sent again."""
    params = replace(call.params, n=1)
    asked = repr((len(call.prompt_token_ids), params, call.adapter, call.adapter_source, call.numbers)).encode()
    return hashlib.blake2b(asked + array("q", call.prompt_token_ids).tobytes(), digest_size=16).hexdigest()


@dataclass(slots=True, eq=False)
class Run:
    """One call on its way to or on one replica."""

    fingerprint: str
    is_alone: bool = False  # a replica that takes it serves nothing beside it
    replica: str = ""  # "": nothing was heard of it yet
    num_tokens: int = 0  # that this run has brought
    heard_s: float = 0.0  # when, by the clock


@dataclass(slots=True)
class Asked:
    """What was asked for, and how its answer ended."""

    fingerprint: str
    is_well: bool = False


@dataclass(slots=True)
class _Record:
    """What is held against one request."""

    deaths: int = 0
    last_life_tokens: int = 0  # that its last run brought before the replica died
    is_refused: bool = False
    until_s: float = 0.0


class Suspects:
    """Lives on one event loop."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._on: dict[str, set[Run]] = {}  # by replica
        self._deaths: dict[str, set[str]] = {}  # the fingerprints that were there
        self._named: dict[str, str] = {}  # the replica of a death
        self._num_asked: Counter[str] = Counter()  # answers under way, by fingerprint
        self._numbers = itertools.count()
        self._turn = asyncio.Lock()
        self._holder: Run | None = None  # of the turn
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def asked(self, call: Call) -> Iterator[Asked]:
        """While `call` is answered, or a part of it. What ends well is held responsible for nothing.

        That is the whole of a request: of its samples, one may end replicas and the others not.
        """
        key = fingerprint(call)
        asked = Asked(key)
        self._num_asked[key] += 1
        try:
            yield asked
        finally:
            self._num_asked[key] -= 1
            if not self._num_asked[key]:
                del self._num_asked[key]
                record = self._records.get(key)
                if asked.is_well and record is not None and not record.is_refused:
                    del self._records[key]

    @asynccontextmanager
    async def run(self, call: Call, key: str | None = None) -> AsyncIterator[tuple[Run, Call]]:
        """The run of `call`, and the call as it is to be sent. A suspect waits here for its turn.

        `key`: its fingerprint, if that is known already.

        Raises: Refused (`request_ends_replicas`).
        """
        key = key or fingerprint(call)
        run = Run(key, heard_s=self._clock())
        self._check(key)
        if self._is_suspect(key):
            await self._turn.acquire()
            self._holder = run
        try:
            self._check(key)  # it may have been found out while it waited
            if self._holder is run and self._is_suspect(key):
                run.is_alone = True
                self._timer = asyncio.get_running_loop().call_later(TURN_S, self._let_others_in, run)
                call = replace(call, alone_tokens=self._alone_tokens(key))
            else:
                self._give_turn_back(run)
            yield run, call
        finally:
            self._give_turn_back(run)
            self._leave(run)

    def heard_from(self, run: Run, replica: str) -> None:
        """An item of the call of `run` came, from `replica`."""
        run.heard_s = self._clock()
        if run.replica != replica:
            self._leave(run)
            run.replica = replica
            self._on.setdefault(replica, set()).add(run)

    def hung(self, run: Run) -> bool:
        """Whether nothing of this router's calls moved on the replica of `run` for long.

        Serve stops a replica that does not answer: that looks like an order, and is not.
        """
        heard_s: float = max(other.heard_s for other in (run, *self._on.get(run.replica, ())))
        return self._clock() - heard_s >= HUNG_S

    def brought(self, run: Run, num_tokens: int) -> None:
        """`run` has produced so many more tokens: a suspect that outlives its last life lets others in."""
        run.num_tokens += num_tokens
        if self._holder is run and run.num_tokens >= self._alone_tokens(run.fingerprint):
            self._let_others_in(run)

    def died(self, run: Run, death: str) -> None:
        """The replica of `run` died, and nobody ordered it. `death` tells deaths apart where the replica is not known.

        All that this router had there were present, whenever they hear of it.
        """
        name = run.replica or death or f"#{next(self._numbers)}"
        if run.replica and death:
            self._named[death] = run.replica
        seen = self._deaths.setdefault(name, set())
        for other in (run, *self._on.get(run.replica, ())):
            self._count(other, seen)
        if len(self._deaths) > MAX_DEATHS:
            del self._deaths[next(iter(self._deaths))]
        if len(self._named) > MAX_DEATHS:
            del self._named[next(iter(self._named))]

    def judge(self, run: Run, death: str) -> None:
        """To be called once all that were there can have heard. Raises: Refused (`request_ends_replicas`)."""
        there = set().union(*(self._deaths.get(name, ()) for name in (run.replica, self._named.get(death, ""), death)))
        record = self._records.get(run.fingerprint)
        if record is not None and record.deaths > SUSPECT_DEATHS and there <= {run.fingerprint}:
            record.is_refused = True
        self._check(run.fingerprint)

    def _count(self, run: Run, there: set[str]) -> None:
        if run.fingerprint in there:
            return
        there.add(run.fingerprint)
        record = self._records.setdefault(run.fingerprint, _Record())
        record.deaths += 1
        record.last_life_tokens = run.num_tokens
        record.until_s = self._clock() + REMEMBERED_S
        self._records.move_to_end(run.fingerprint)
        if len(self._records) > MAX_REMEMBERED:
            self._records.popitem(last=False)

    def _alone_tokens(self, key: str) -> int:
        record = self._records.get(key)
        return SPARE_TOKENS + 2 * (record.last_life_tokens if record else 0)

    def _is_suspect(self, key: str) -> bool:
        record = self._records.get(key)
        return record is not None and record.deaths >= SUSPECT_DEATHS

    def _check(self, key: str) -> None:
        record = self._records.get(key)
        if record is not None and self._clock() >= record.until_s:
            del self._records[key]
        elif record is not None and record.is_refused:
            raise Refused(Fault(code="request_ends_replicas", message=_message(record.deaths)))

    def _let_others_in(self, run: Run) -> None:
        run.is_alone = False
        self._give_turn_back(run)

    def _give_turn_back(self, run: Run) -> None:
        if self._holder is run:
            self._holder = None
            self._turn.release()
            if self._timer is not None:
                self._timer.cancel()

    def _leave(self, run: Run) -> None:
        there = self._on.get(run.replica)
        if there is not None:
            there.discard(run)
            if not there:
                del self._on[run.replica]


def _message(deaths: int) -> str:
    return (
        f"the server's process ended {deaths} times while it worked on this request, the last time on nothing else; "
        f"it is not tried again for {REMEMBERED_S:g} s: change the prompt, the parameters or the adapter, "
        "and tell who runs this server"
    )
