"""What running streams notice of adapters being loaded: time between tokens, with and without a load under way.

Streams decode, each with an adapter of its own, while further adapters, cold each time, are asked for one after another
with pauses between. The store is an actor in its own process, as in production. Each step of the engine is timed in its
thread; the time between two steps is what every stream waits for its next token. A step is

    undisturbed     no load was under way between the end of the step before and its own
    overlapping     one was: from the request for the cold adapter until its own step has begun
    own             it computed the row of a cold adapter's own request: that request's work, nobody's disturbance, and
                    so in neither of the other two (`p99_ratio_with_own` counts it as overlapping all the same). It
                    also fills the adapter's slot

`waited` counts steps in which a stream got no token although it had not ended.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_store.records import StoreConfig
from adapter_store.sources.base import SourceConfig
from benchmarks import workload
from benchmarks.adapters.stores import Station, ray_station, running_ray, write_adapters
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import SamplingParams

STREAM, COLD = "stream", "cold"
WARM_UP = "warm-up"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--cold-adapters", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500, help="overlapping steps to see, at least")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--fetch-mb-per-s", type=float, help="limit of the store's downloads; default: none")
    parser.add_argument("--kv-mib", type=int, default=1024)


@dataclass
class Step:
    """One step of the engine; seconds of the monotonic clock."""

    begin_s: float
    end_s: float
    num_streams: int  # that got a token
    cold: tuple[str, ...]  # requests for cold adapters that got theirs


@dataclass
class Log:
    """Written by the engine's thread (steps) and the loop's (asked); read when both are done."""

    steps: list[Step] = field(default_factory=list)
    asked_s: dict[str, float] = field(default_factory=dict)  # by request of a cold adapter

    def watch(self, engine: Engine) -> None:
        step = engine.step

        def watched() -> Any:
            begin_s = time.monotonic()
            updates = step()
            ids = [update.request_id.partition("#")[0] for update in updates if update.token_ids]
            cold = tuple(request_id for request_id in ids if request_id.startswith(COLD))
            self.steps.append(Step(begin_s, time.monotonic(), len(ids) - len(cold), cold))
            return updates

        engine.step = watched  # type: ignore[method-assign]

    def loads(self) -> list[tuple[float, float]]:
        """(begin, end) of each load. It ends with the begin of the step that computed its row."""
        return [(self.asked_s[request_id], step.begin_s) for step in self.steps for request_id in step.cold]


def run(args: argparse.Namespace) -> None:
    engine = Engine(
        EngineConfig(
            model=args.model,
            dtype=args.dtype,
            num_threads=args.threads,
            max_num_seqs=2 * args.streams,
            max_resident_adapters=args.streams + 2,
            kv_cache_bytes=args.kv_mib << 20,
            enable_prefix_caching=False,
        )
    )
    log = Log()
    log.watch(engine)
    with tempfile.TemporaryDirectory() as folder:
        streams = [f"{STREAM}-{i}" for i in range(args.streams)]
        cold = [f"{COLD}-{i}" for i in range(args.cold_adapters)]
        image_bytes = write_adapters(Path(folder), engine, args.rank, [*streams, *cold, WARM_UP])
        room = image_bytes * (args.streams + 8)  # a cold adapter is gone before its turn comes again
        limit = None if args.fetch_mb_per_s is None else int(args.fetch_mb_per_s * 1e6)
        config = StoreConfig(
            host_bytes=room, max_adapter_bytes=4 * image_bytes, fetch_bytes_per_s=limit, refresh_s=3600.0
        )
        source = SourceConfig(uri=Path(folder).as_uri(), name="folder")
        with running_ray(2 * room + (256 << 20)):
            status = asyncio.run(measure(args, engine, source, config, log))
    print_figures(args, log, image_bytes, status)


async def measure(args: argparse.Namespace, engine: Engine, source: SourceConfig, config: StoreConfig, log: Log) -> Any:
    """Streams all the time, and loads until enough steps overlapped one. Returns: the store's status at the end."""
    async with ray_station(engine, source, config) as station:
        max_tokens = engine.limits.max_model_len - args.prompt_tokens
        tasks = [asyncio.create_task(stream(args, station, i, max_tokens)) for i in range(args.streams)]
        while not log.steps or log.steps[-1].num_streams < args.streams:
            await asyncio.sleep(0.01)
        await load(station, log, WARM_UP, WARM_UP)
        await pause(log, 10)
        log.steps.clear()
        overlapping = number = 0
        while number < args.cold_adapters or overlapping < args.steps:
            begin = len(log.steps)
            await load(station, log, f"{COLD}-{number}", f"{COLD}-{number % args.cold_adapters}")
            number += 1
            overlapped = max(0, len(log.steps) - begin - 1)  # the last is its own
            overlapping += overlapped
            await pause(log, max(2, overlapped))
            if any(task.done() for task in tasks):
                raise SystemExit(f"the streams ended after {number} loads and {overlapping} steps beside one")
        status = await station.call("status")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return status


async def stream(args: argparse.Namespace, station: Station, i: int, max_tokens: int) -> None:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    prompt = tuple(range(10 + i, 10 + i + args.prompt_tokens))
    async with aclosing(station.parts.generate(f"{STREAM}-{i}", f"{STREAM}-{i}", prompt, params)) as deltas:
        async for _ in deltas:
            pass


async def load(station: Station, log: Log, request_id: str, name: str) -> None:
    """Asks for one token of a cold adapter."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    log.asked_s[request_id] = time.monotonic()
    async with aclosing(station.parts.generate(request_id, name, (10,), params)) as deltas:
        async for _ in deltas:
            pass


async def pause(log: Log, num_steps: int) -> None:
    until = len(log.steps) + num_steps
    while len(log.steps) < until:
        await asyncio.sleep(0.005)


def print_figures(args: argparse.Namespace, log: Log, image_bytes: int, status: Any) -> None:
    loads = log.loads()
    by_kind: dict[str, list[float]] = {"undisturbed": [], "overlapping": [], "own": []}
    waited = 0
    for before, step in zip(log.steps, log.steps[1:], strict=False):
        overlaps = any(begin_s < step.end_s and end_s > before.end_s for begin_s, end_s in loads)
        kind = "own" if step.cold else "overlapping" if overlaps else "undisturbed"
        by_kind[kind].append(step.end_s - before.end_s)
        waited += step.num_streams < args.streams
    itl = {kind: workload.percentiles(values) for kind, values in by_kind.items() if values}
    with_own = workload.percentiles(by_kind["overlapping"] + by_kind["own"])
    still = itl["undisturbed"]
    figures = {
        "case": "interference",
        "image_mb": round(image_bytes / 1e6, 1),
        "loads": len(loads),
        "fetches": status.fetches,
        "load": workload.percentiles([end_s - begin_s for begin_s, end_s in loads]),
        "steps": {kind: len(values) for kind, values in by_kind.items()},
        "itl": itl,
        "p50_ratio": round(itl["overlapping"]["p50_ms"] / still["p50_ms"], 3),
        "p99_ratio": round(itl["overlapping"]["p99_ms"] / still["p99_ms"], 3),
        "p99_ratio_with_own": round(with_own["p99_ms"] / still["p99_ms"], 3),
        "waited": waited,
    }
    workload.print_figures(figures, args)
