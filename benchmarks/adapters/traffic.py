"""Hit rates of the store's tiers under skewed traffic and scans, beside plain LRU on the same trace.

The real store over a source that is simulated: small adapters made from their numbers, of four sizes, and a clock that
moves by what a read would take (a round trip, and bytes over bandwidth). So the figures are the same on every machine.

    zipf 0.8, zipf 1.0   the n-th most popular adapter is asked for n^-s as often as the first
    scan                 zipf 1.0, and between any two requests one of a sweep through all adapters, which come once
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from adapter_store.image.packing import pack
from adapter_store.records import StoreConfig
from adapter_store.store import AdapterStore
from adapter_store.tiers.blobs import MemoryBlobs
from benchmarks import workload
from tests.support.fake_sources import FakeClock, small_spec
from tests.support.numbered_source import NumberedSource, name_of

RANKS = (8, 16, 32, 64)
REQUEST_S = 0.01  # between two requests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--traffics", default="zipf 0.8,zipf 1.0,scan")
    parser.add_argument("--adapters", type=int, default=5000)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--host-adapters", type=int, default=256, help="so many of mean size fit on the host")
    parser.add_argument("--disk-adapters", type=int, default=1024, help="and on disk")
    parser.add_argument("--round-trip-ms", type=float, default=30.0, help="of the simulated source")
    parser.add_argument("--mb-per-s", type=float, default=100.0)
    parser.add_argument("--full-size-mb", type=float, default=10.0, help="what an adapter of mean size stands for")
    parser.add_argument("--seed", type=int, default=0)


def trace(name: str, args: argparse.Namespace) -> Iterator[int]:
    """The adapter of each request. Popularity and size have nothing to do with each other."""
    rng = random.Random(args.seed)
    by_popularity = list(range(args.adapters))
    rng.shuffle(by_popularity)
    s = 1.0 if name == "scan" else float(name.removeprefix("zipf "))
    weights = [1 / (position + 1) ** s for position in range(args.adapters)]
    popular = rng.choices(by_popularity, weights, k=args.requests)
    for i, number in enumerate(popular):
        yield (i // 2) % args.adapters if name == "scan" and i % 2 else number


class Lru:
    """Two tiers, each plain LRU; what is read from the source goes to both."""

    def __init__(self, host_bytes: int, disk_bytes: int) -> None:
        self._tiers = [(host_bytes, OrderedDict[int, int]()), (disk_bytes, OrderedDict[int, int]())]
        self.hits = [0, 0]
        self.misses = 0
        self.evictions = 0

    def ask(self, number: int, num_bytes: int) -> bool:
        """Whether it had to be read from the source."""
        found = next((i for i, (_, tier) in enumerate(self._tiers) if number in tier), None)
        if found is None:
            self.misses += 1
        else:
            self.hits[found] += 1
        for i, (budget, tier) in enumerate(self._tiers):
            if found == 0 and i:
                break  # the disk is not asked
            tier[number] = num_bytes
            tier.move_to_end(number)
            while sum(tier.values()) > budget:
                tier.popitem(last=False)
                self.evictions += i == 0
        return found is None


class Simulation:
    """One trace through the store."""

    def __init__(self, args: argparse.Namespace, traffic: str) -> None:
        self._args, self._traffic = args, traffic
        self._clock = FakeClock()
        self._source = NumberedSource(small_spec(), args.adapters, RANKS, on_read=self._on_read)
        self._sizes = [pack(self._source.files(i), small_spec()).num_bytes for i in range(len(RANKS))]
        self._mean_bytes = statistics.mean(self._sizes)

    def _on_read(self, num_bytes: int) -> None:
        self._clock.now += self._seconds(num_bytes)

    def _seconds(self, num_bytes: int) -> float:
        scale = self._args.full_size_mb / self._mean_bytes
        return float(self._args.round_trip_ms / 1e3 + num_bytes * scale / self._args.mb_per_s)

    async def run(self) -> dict[str, Any]:
        args = self._args
        host_bytes = int(self._mean_bytes * args.host_adapters)
        disk_bytes = int(self._mean_bytes * args.disk_adapters)
        lru, read_s, lru_read_s = Lru(host_bytes, disk_bytes), 0.0, 0.0
        with tempfile.TemporaryDirectory() as folder:
            config = StoreConfig(
                host_bytes=host_bytes,
                max_adapter_bytes=host_bytes,
                disk_path=folder,
                disk_bytes=disk_bytes,
                refresh_s=1e9,
            )
            store = AdapterStore([self._source], MemoryBlobs(), config, clock=self._clock, sleep=self._clock.sleep)
            digest = await store.register_spec(small_spec())
            found = Counter[str]()
            for number in trace(self._traffic, args):
                name = name_of(number)
                reads_before, before = self._source.reads[name], await store.status()
                lease = await store.acquire(name, digest, "replica")
                place = "disk"
                if self._source.reads[name] > reads_before:  # in one part or in several
                    place, read_s = "source", read_s + self._seconds(lease.num_bytes)
                elif (await store.status()).hits > before.hits:  # what the store moves on its own is nobody's hit
                    place = "host"
                found[place] += 1
                await store.release(lease.version, "replica")
                self._clock.now += REQUEST_S
                if lru.ask(number, lease.num_bytes):
                    lru_read_s += self._seconds(lease.num_bytes)
            status = asdict(await store.status())
            await store.close()
        share = 1 / args.requests
        return {
            "case": self._traffic,
            "host_hit_rate": round(found["host"] * share, 4),
            "disk_hit_rate": round(found["disk"] * share, 4),
            "source_rate": round(found["source"] * share, 4),
            "host_evictions": status["evictions"],
            "read_s": round(read_s, 1),
            "lru_host_hit_rate": round(lru.hits[0] * share, 4),
            "lru_disk_hit_rate": round(lru.hits[1] * share, 4),
            "lru_source_rate": round(lru.misses * share, 4),
            "lru_host_evictions": lru.evictions,
            "lru_read_s": round(lru_read_s, 1),
        }


def run(args: argparse.Namespace) -> None:
    for traffic in args.traffics.split(","):
        workload.print_figures(asyncio.run(Simulation(args, traffic).run()), args)
