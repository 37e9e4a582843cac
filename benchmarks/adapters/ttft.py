"""Time to the first token, by where the adapter was when it was asked for.

    host                in the store's host memory; this process had mapped its pages before
    host_first_mapped   the same, but every page faults once
    disk                in the store's disk tier, packed
    folder, bucket      in its source: a folder of this machine, S3 (moto, in a process of its own)

Each sample is a pair: a request that finds its adapter in that place, and right after it one that finds it in its slot.
What the place costs is the difference. In one process, or (--ray) with the store in an actor as in production.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

from adapter_store.records import StoreConfig, StoreStatus
from adapter_store.sources.base import SourceConfig
from benchmarks import workload
from benchmarks.adapters import PLACES
from benchmarks.adapters.bucket import bucket
from benchmarks.adapters.stores import SharedBlobs, Station, local_station, ray_station, running_ray, write_adapters
from engine.config import EngineConfig
from engine.engine import Engine

SHARED_MEMORY = "/dev/shm"
MAX_MAPPED_BYTES = 1 << 30  # of the images that are mapped for the first time
OBJECT_STORE_BYTES = 3 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--places", default=",".join(PLACES))
    parser.add_argument("--samples", type=int, default=30)
    parser.add_argument("--prompt-tokens", type=int, default=4, help="few: the rest of the step is noise here")
    parser.add_argument("--threads", type=int, default=1, help="of the engine")
    parser.add_argument("--ray", action="store_true", help="the store in an actor of its own process")


def run(args: argparse.Namespace) -> None:
    config = EngineConfig(model=args.model, dtype=args.dtype, num_threads=args.threads, max_resident_adapters=1)
    with ExitStack() as stack:
        if args.ray:
            stack.enter_context(running_ray(OBJECT_STORE_BYTES))
        for place in args.places.split(","):
            if place == "disk" and "disk_hits" not in {field.name for field in fields(StoreStatus)}:
                continue  # this store has no disk tier
            asyncio.run(Place(args, Engine(config), place).measure())


class Place:
    """One engine with one slot: an adapter that is asked for after another is not resident."""

    def __init__(self, args: argparse.Namespace, engine: Engine, place: str) -> None:
        self._args, self._engine, self._place = args, engine, place

    async def measure(self) -> None:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            names = [f"{self._place}-{i}" for i in range(self._args.samples)]
            image_bytes = write_adapters(folder / "adapters", self._engine, self._args.rank, names)
            source = SourceConfig(uri=(folder / "adapters").as_uri(), name="folder")
            names = names[: MAX_MAPPED_BYTES // image_bytes]
            if self._place != "host_first_mapped":
                names = names[:3]  # in the engine's slot, leased; on the host, if two fit there; the next
            if self._place == "bucket":
                source = stack.enter_context(bucket(folder / "adapters", names))
            config = self._config(image_bytes, folder)
            if self._args.ray:
                station = ray_station(self._engine, source, config)
            else:
                shared = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=SHARED_MEMORY)))
                station = local_station(
                    self._engine, source, config, SharedBlobs(shared, keep_maps=self._place == "host")
                )
            async with station as opened:
                pairs = await self._pairs(opened, names)
        self._print(pairs, image_bytes)

    def _config(self, image_bytes: int, folder: Path) -> StoreConfig:
        if self._place in ("host", "host_first_mapped"):
            return StoreConfig(host_bytes=MAX_MAPPED_BYTES + 4 * image_bytes)
        room = image_bytes * 5 // 2  # a third image never fits
        disk_path = str(folder / "store") if self._place == "disk" else None
        return StoreConfig(host_bytes=room, max_adapter_bytes=room, disk_path=disk_path, refresh_s=3600.0)

    async def _pairs(self, station: Station, names: list[str]) -> list[tuple[float, float]]:
        """(cold, resident) seconds to the first token."""
        if self._place == "host_first_mapped":
            for name in names:
                await station.bring(name)
            todo = names
        else:
            todo = [names[i % len(names)] for i in range(self._args.samples + len(names))]
        await station.first_token_s(None, self._args.prompt_tokens)
        before: StoreStatus = await station.call("status")
        pairs = []
        for name in todo:
            cold_s = await station.first_token_s(name, self._args.prompt_tokens)
            pairs.append((cold_s, await station.first_token_s(name, self._args.prompt_tokens)))
            await station.parts.settled()
        self._check(before, await station.call("status"), len(todo), len(names))
        return pairs if self._place == "host_first_mapped" else pairs[len(names) :]  # without the first round

    def _check(self, before: StoreStatus, after: StoreStatus, num_samples: int, num_names: int) -> None:
        """Whether the adapters came from where the figures say."""
        fetched = after.fetches - before.fetches
        expected = {"host": num_names, "host_first_mapped": 0, "disk": num_names}.get(self._place, num_samples)
        if fetched != expected:
            raise SystemExit(
                f"{self._place}: {fetched} of {num_samples} adapters came from their source, not {expected}"
            )

    def _print(self, pairs: list[tuple[float, float]], image_bytes: int) -> None:
        cold, resident = zip(*pairs, strict=True)
        added = workload.percentiles([a - b for a, b in pairs])
        figures: dict[str, Any] = {
            "case": f"{self._place}, rank {self._args.rank}",
            "place": self._place,
            "image_mb": round(image_bytes / 1e6, 1),
            "samples": len(pairs),
            "cold": workload.percentiles(cold),
            "resident": workload.percentiles(resident),
            "added": added,
            "ratio": round(statistics.median(a / b for a, b in pairs), 2),
        }
        workload.print_figures(figures, self._args)
