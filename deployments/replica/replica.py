"""The Replica deployment: one engine, the adapter images it needs, and answers in frames for the routers that ask."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

from ray import serve

from adapter_store.errors import StoreError
from deployments import frames
from deployments.calls import (
    RESERVED_CODE,
    STOPPED_CODE,
    Aim,
    Call,
    Fault,
    Receipt,
    Refused,
    StreamItem,
    Submission,
)
from deployments.errors import fault_of
from deployments.listener import take_calls_at_this_node_only
from deployments.replica.alone import Door
from deployments.replica.held import Held, HeldAdapters
from deployments.replica.merges import Merges
from deployments.replica.neighbours import neighbours_here
from deployments.replica.reporter import Reporter
from deployments.replica.subscribers import Run, Subscribers
from deployments.replica.warm import Warmer
from deployments.settings.app import AppArgs
from deployments.store.actor import connectors, current_app
from deployments.store.client import StoreClient
from engine.aio.async_engine import AsyncEngine
from engine.engine import Engine
from engine.errors import EngineDead, EngineError
from engine.request import OutputDelta, Request

logger = logging.getLogger("ray.serve")

LAST_WORDS_S = 0.5
SWEEP_S = 1.0
EXIT_CODE = 70  # EX_SOFTWARE


class Replica:
    """Runs requests that routers send. Created by Serve; see `deployments.app`."""

    async def __init__(self, args: AppArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        """Raises: ConfigError, ModelNotSupported; ValueError when a secret is missing; Refused without a store."""
        take_calls_at_this_node_only()
        self._id = serve.get_replica_context().replica_id.unique_id
        config = args.engine_config()
        engine = await asyncio.to_thread(Engine, config, neighbours=await asyncio.to_thread(neighbours_here, args))
        logger.info("sizes of this replica: %s", engine.stats().sizes)
        spec = engine.image_spec
        self._lease_ttl_s = args.adapters.lease_ttl_s
        self._store = StoreClient(
            connectors(args.adapters, f"{args.model_id} {args.model}", current_app()),
            wait_s=args.adapters.store_wait_s,
            owner=self._id,
            spec=spec.to_dict(),
            digest=spec.digest,
        )
        await self._store.start()
        # The store looks at its sources half as often as it may, this replica asks the store as often again.
        merges = Merges(
            spec,
            max_rank=args.adapters.max_rank,
            max_bytes=args.adapters.max_adapter_bytes,
            waiting_bytes=max(args.adapters.max_adapter_bytes, engine.config.adapter_bytes),
        )
        self._adapters = HeldAdapters(self._store, spec, refresh_s=args.adapters.refresh_s / 2, merges=merges)
        self._engine = AsyncEngine(engine, image_owner=self._adapters, on_death=_exit_soon)
        self._engine.start()
        self._in_hand = 0
        self._model = {
            "dtype": engine.dtype,
            "block_size": engine.config.block_size,
            "max_queued_requests": engine.config.max_queued_requests,
        }
        self._door = Door()
        self._subscribers = Subscribers(self._id, self._observe)
        self._is_stopping = False
        self._reporter = Reporter(capacity=engine.config.max_num_seqs, names=self._adapter_names)
        self._warmer = Warmer(
            self._adapters,
            self._engine,
            self._store,
            pinned=args.adapters.pinned,
            budget_bytes=args.warm_bytes(engine.config.adapter_bytes),
            refresh_s=args.adapters.refresh_s,
        )
        self._tasks = [asyncio.ensure_future(work) for work in (self._beat(), self._warmer.run(), self._sweep())]

    async def subscribe(self, aim: Aim, router: str, reading: int) -> AsyncGenerator[bytes]:
        """Frames of all answers to `router`, for as long as it reads. The first is empty: it says that they come.

        `reading`: the router's own number, from 1, for this subscription. Closing the generator aborts what `router`
        asked for within a step.
        """
        subscriber = self._subscribers.opened(router, reading)
        self._reporter.forget(router)
        try:
            yield frames.write(self._in_hand, (), self._report(router))
            while self._subscribers.is_here(subscriber):
                yield await subscriber.frame(lambda: self._in_hand, lambda: self._report(router))
        finally:
            self._subscribers.closed(subscriber)
            self._reporter.forget(router)

    async def submit(self, submission: Submission) -> Receipt:
        """Begins to answer into the frames of the router that asks, or says why not. The same one again is no news."""
        call, subscriber = submission.call, self._subscribers.of(submission.router)
        if submission.number not in subscriber.runs:
            if (fault := self._turned_away(call)) is not None:
                return Receipt(self._id, self._in_hand, fault)
            run = subscriber.runs[submission.number] = Run(submission, subscriber)
            self._in_hand += 1
            self._reporter.remember(call.prefix_hints)
            run.task = asyncio.ensure_future(self._serve(run))
            run.task.add_done_callback(lambda _: self._ended(call))  # also of one that is cancelled before it begins
        return Receipt(self._id, self._in_hand, reading=subscriber.reading)

    async def cancel(self, aim: Aim, router: str, numbers: tuple[int, ...], *, is_report_missed: bool = False) -> None:
        """`router` is there, and wants no more of the calls with these numbers."""
        if is_report_missed:
            self._reporter.forget(router)
        self._subscribers.heard(router, numbers)

    async def stream(self, call: Call) -> AsyncGenerator[StreamItem]:
        """Items of `call` for somebody in this process. The first, which is empty, says that it is accepted; a failure
        is the last. Closing the generator aborts the request within a step."""
        if (fault := self._turned_away(call)) is not None:
            yield StreamItem(replica=self._id, fault=fault)
            return
        self._in_hand += 1
        self._reporter.remember(call.prefix_hints)
        version = None
        try:
            yield StreamItem(replica=self._id)
            async with self._image_of(call) as held:
                version = held.pin if held else None
                request = _request(call, held.version if held else None)
                stream = self._engine.generate(request, held.image if held else None)
                async with aclosing(cast("AsyncGenerator[OutputDelta]", stream)) as deltas:
                    async for delta in deltas:
                        self._door.produced(call, len(delta.token_ids))
                        yield StreamItem(replica=self._id, adapter_version=version, deltas=(delta,))
        except Exception as error:
            yield StreamItem(replica=self._id, adapter_version=version, fault=self._told(call, error))
        finally:
            self._ended(call)

    def _told(self, call: Call, error: Exception) -> Fault:
        """`error` as the caller hears it; what nobody expected is logged."""
        if not isinstance(error, EngineError | StoreError | Refused):
            logger.exception("request %s failed", call.request_id)
        return self._fault_of(error)

    async def _serve(self, run: Run) -> None:
        """From the image that `run` needs to its end, however it comes."""
        call = run.submission.call
        try:
            async with self._image_of(call) as held:
                run.item_version = held.pin if held else None
                request = _request(call, held.version if held else None)
                run.stream = await self._engine.open(request, held.image if held else None, run.wake)
                try:
                    await run.ended
                finally:
                    self._engine.leave(run.stream, abort=run.num_unfinished > 0)
        except Exception as error:
            run.fail(self._told(call, error))
        finally:
            run.end()

    def _ended(self, call: Call) -> None:
        self._in_hand -= 1
        self._door.left(call)

    def _observe(self, run: Run, deltas: list[OutputDelta]) -> None:
        """Called with what `run` has gained, before its router is told."""
        for delta in deltas:
            self._door.produced(run.submission.call, len(delta.token_ids))

    def _turned_away(self, call: Call) -> Fault | None:
        """Why `call` cannot begin here. Asked before anything is done for it: it has no part in what happens then."""
        try:
            self._engine.check()
        except EngineDead as error:
            return Fault(code=STOPPED_CODE, message=str(error))
        if not self._door.admits(call, self._in_hand):
            return Fault(
                code=RESERVED_CODE, message="a request is served alone after replicas were lost; try again later"
            )
        return None

    def _fault_of(self, error: Exception) -> Fault:
        fault = fault_of(error)
        is_ordered = isinstance(error, EngineDead) and self._is_stopping
        return dataclasses.replace(fault, code=STOPPED_CODE) if is_ordered else fault

    @asynccontextmanager
    async def _image_of(self, call: Call) -> AsyncIterator[Held | None]:
        if call.adapter is None:
            yield None
            return
        named = (call.adapter, call.adapter_source, call.adapter_version, call.parts)
        async with self._adapters.borrowed(*named) as held:
            yield held

    def _report(self, router: str) -> bytes:
        self._reporter.load(self._in_hand)
        return self._reporter.due(router)

    def _adapter_names(self) -> tuple[list[str], list[str]]:
        return self._adapters.names_of(self._engine.stats().resident_adapters), self._adapters.names

    async def ping(self) -> None:
        """Raises: EngineDead."""
        self._engine.check()

    async def check_health(self) -> None:
        """Called by Serve. Raises: EngineDead, and Serve replaces this replica."""
        self._engine.check()

    async def stats(self) -> dict[str, Any]:
        """For GET /stats."""
        stats = self._engine.stats()
        return {
            "replica": self._id,
            "pid": os.getpid(),
            "in_hand": self._in_hand,
            "resident": self._adapters.names_of(stats.resident_adapters),
            "host": self._adapters.names,
            "pinned": self._warmer.pinned,
            "model": self._model,
            "engine": dataclasses.asdict(stats),
        }

    async def _beat(self) -> None:
        """Keeps the leases of this replica alive. A missed beat costs nothing: there is time for two more."""
        while True:
            try:
                await self._adapters.beat()
            except Exception as error:  # whatever it is: without beats the leases would run out
                logger.warning("no heartbeat to the adapter store: %s: %s", type(error).__name__, error)
            await asyncio.sleep(self._lease_ttl_s / 3)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._subscribers.sweep()

    async def __del__(self) -> None:
        """Called by Serve after it has drained this replica."""
        tasks = getattr(self, "_tasks", None)
        if tasks is not None:
            for task in tasks:
                task.cancel()
            self._is_stopping = True
            await asyncio.to_thread(self._engine.close)


def _request(call: Call, version: str | None) -> Request:
    return Request(
        request_id=call.request_id,
        prompt_token_ids=call.prompt_token_ids,
        params=call.params,
        seed=call.seed,
        adapter=version,
        tenant=call.tenant,
        cache_salt=call.cache_salt,
        priority=call.priority,
        sample_index=call.sample_index,
        resumed_output_token_ids=call.resumed_output_token_ids,
        numbers=call.numbers,
    )


def _exit_soon(reason: str) -> None:
    """A dead engine cannot be revived: the process goes, after its streams have been told, and Serve starts another."""
    logger.critical("this replica exits, its engine is dead: %s", reason)
    timer = threading.Timer(LAST_WORDS_S, os._exit, (EXIT_CODE,))
    timer.daemon = True
    timer.start()
