"""Thousands of adapters through caches that hold a few of them: every answer right, every budget kept, nothing leaked.

The adapters are made from their numbers when they are fetched. What was measured is printed (`pytest -s`).
"""

from __future__ import annotations

import asyncio
import faulthandler
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest

from adapter_store.image.packing import pack
from adapter_store.records import StoreConfig, StoreStatus
from adapter_store.store import AdapterStore
from adapter_store.tiers.blobs import MemoryBlobs
from engine.config import EngineConfig
from engine.engine import Engine
from engine.request import FinishReason, SamplingParams
from tests.equality.oracle import Text, assert_greedy
from tests.support.numbered_source import NumberedSource, name_of
from tests.support.replica_parts import LocalStore, ReplicaParts
from tests.support.tiny_model import reference_model

BASE = Path(__file__).parents[2] / "demo" / "base"
LEASE_TTL_S = 30.0
MAX_RSS_GROWTH = 1.03


@dataclass(frozen=True)
class Scale:
    """How much is asked of how many adapters. `engine_adapters`, `host_adapters`, ...: so many of mean size fit."""

    adapters: int
    requests: int
    clients: int
    engine_adapters: int
    host_adapters: int
    disk_adapters: int
    judged: float  # share of the answers that transformers and PEFT are asked about


@dataclass
class Seen:
    """What happened."""

    texts: dict[int, list[Text]] = field(default_factory=dict)  # of the judged answers, by adapter
    answered: Counter[str] = field(default_factory=Counter)  # by finish reason
    steps: int = 0
    rss_bytes: list[int] = field(default_factory=list)
    most_bytes: Counter[str] = field(default_factory=Counter)  # by tier


class Soak:
    """One engine, one store, many clients."""

    def __init__(self, scale: Scale, folder: Path, seed: int = 0) -> None:
        self._rng = random.Random(seed)
        self._passed_s = 0.0  # added to the store's clock
        self.scale, self.seen = scale, Seen()
        spec = Engine(EngineConfig(model=str(BASE), dtype="float32")).image_spec
        self.source = NumberedSource(spec.to_dict(), scale.adapters)
        mean_bytes = statistics.mean(pack(self.source.files(i), spec.to_dict()).num_bytes for i in range(8))
        self.engine = Engine(
            EngineConfig(
                model=str(BASE),
                dtype="float32",
                adapter_bytes=int(mean_bytes * scale.engine_adapters),
                max_num_seqs=scale.clients,
                max_num_batched_tokens=256,
                kv_cache_bytes=8 << 20,
            )
        )
        self._watch_steps()
        host_bytes = int(mean_bytes * scale.host_adapters)
        config = StoreConfig(
            host_bytes=host_bytes,
            max_adapter_bytes=host_bytes,
            disk_path=str(folder / "store"),
            disk_bytes=int(mean_bytes * scale.disk_adapters),
            lease_ttl_s=LEASE_TTL_S,
        )
        self.store = AdapterStore([self.source], MemoryBlobs(), config, clock=lambda: time.monotonic() + self._passed_s)

    def _watch_steps(self) -> None:
        """After every step: the scheduler's parts agree, and the adapters in the slots are within their budget."""
        step, budget = self.engine.step, self.engine.config.adapter_bytes

        def watched() -> Any:
            updates = step()
            self.engine._scheduler.check_invariants()
            used = self.engine.stats().resident_adapter_bytes
            assert used <= budget, f"{used} bytes of adapters are resident, the budget is {budget}"
            self.seen.steps += 1
            self.seen.most_bytes["engine"] = max(self.seen.most_bytes["engine"], used)
            return updates

        self.engine.step = watched  # type: ignore[method-assign]

    async def run(self) -> StoreStatus:
        """All requests; at the end no lease is left. Returns: the store's counters."""
        digest = await self.store.register_spec(self.engine.image_spec.to_dict())
        parts = ReplicaParts(self.engine, LocalStore(self.store, digest), lease_ttl_s=LEASE_TTL_S)
        try:
            todo = iter(list(enumerate(self._zipf(self.scale.requests))))
            clients = [asyncio.create_task(self._client(parts, todo)) for _ in range(self.scale.clients)]
            await asyncio.gather(*clients)
            status = await self._check_leases(parts)
        finally:
            await parts.close()
        self._passed_s += LEASE_TTL_S + 1  # no heartbeat any more
        assert (await self.store.status()).num_leases == 0
        self.store.check_invariants()
        await self.store.close()
        return status

    def _zipf(self, count: int, s: float = 0.8) -> list[int]:
        weights = [1 / (rank + 1) ** s for rank in range(self.scale.adapters)]
        return self._rng.choices(range(self.scale.adapters), weights, k=count)

    async def _client(self, parts: ReplicaParts, todo: Any) -> None:
        for i, number in todo:
            rng = random.Random(i)
            prompt = (*(rng.randrange(32, 127) for _ in range(rng.randint(1, 24))), 10)
            params = SamplingParams(max_tokens=rng.randint(1, 16), temperature=0.0, ignore_eos=rng.random() < 0.5)
            output, reason = await self._answer(parts, f"r{i}", number, prompt, params)
            assert reason in (FinishReason.LENGTH, FinishReason.STOP), f"request {i} ended with {reason}"
            self.seen.answered[reason.value] += 1
            if rng.random() < self.scale.judged:
                self.seen.texts.setdefault(number, []).append(Text(prompt, output))
            await self._look_at_the_store(sum(self.seen.answered.values()))

    async def _answer(
        self, parts: ReplicaParts, request_id: str, number: int, prompt: tuple[int, ...], params: SamplingParams
    ) -> tuple[tuple[int, ...], FinishReason | None]:
        output: list[int] = []
        reason = None
        async with aclosing(parts.generate(request_id, name_of(number), prompt, params)) as deltas:
            async for delta in deltas:
                output += delta.token_ids
                reason = delta.finish_reason
        return tuple(output), reason

    async def _look_at_the_store(self, num_answered: int) -> None:
        status = asdict(await self.store.status())
        for tier in ("host", "disk"):
            if f"{tier}_bytes" in status:
                used = status[f"{tier}_used_bytes"]
                assert used <= status[f"{tier}_bytes"], (
                    f"{used} bytes are used of {tier}_bytes={status[f'{tier}_bytes']}"
                )
                self.seen.most_bytes[tier] = max(self.seen.most_bytes[tier], used)
        if num_answered % max(1, self.scale.requests // 100) == 0:
            self.store.check_invariants()
            self.seen.rss_bytes.append(rss_bytes())

    async def _check_leases(self, parts: ReplicaParts) -> StoreStatus:
        """What is leased is what the idle engine has in its slots, and nothing else."""
        await parts.settled()
        status = await self.store.status()
        assert sorted(parts.held.versions) == sorted(self.engine.stats().resident_adapters)
        assert status.num_leases == len(parts.held.versions)
        return status

    def judge(self, folder: Path) -> None:
        """The kept answers are what transformers and PEFT say, greedily."""
        for number, texts in self.seen.texts.items():
            adapter = folder / name_of(number)
            adapter.mkdir()
            for file, content in self.source.files(number).items():
                (adapter / file).write_bytes(content)
            assert_greedy(BASE, adapter, texts)
            shutil.rmtree(adapter)
        reference_model.cache_clear()


def rss_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def growth(samples: list[int]) -> float:
    """The most that was used after the first third of the run, by what was used at that third."""
    third = len(samples) // 3
    return max(samples[third:]) / samples[third]


def soak(scale: Scale, folder: Path, capsys: pytest.CaptureFixture[str]) -> Soak:
    """Runs, judges and prints."""
    run, start_s = Soak(scale, folder), time.perf_counter()
    status = asyncio.run(run.run())
    ran_s = time.perf_counter() - start_s
    run.judge(folder)
    judged_s = time.perf_counter() - start_s - ran_s
    seen = run.seen
    assert sum(seen.answered.values()) == scale.requests
    counters = ("hits", "misses", "fetches", "evictions", "disk_hits", "disk_evictions")
    rss_mib = [value >> 20 for value in seen.rss_bytes[:: max(1, len(seen.rss_bytes) // 10)]]
    lines = (
        f"{scale.requests} requests for {scale.adapters} adapters: {ran_s:.1f} s, {scale.requests / ran_s:.0f}/s, "
        f"{seen.steps} steps, answers {dict(seen.answered)}",
        f"{sum(map(len, seen.texts.values()))} answers of {len(seen.texts)} adapters judged in {judged_s:.1f} s",
        f"store: { {key: value for key, value in asdict(status).items() if key in counters} }",
        f"most bytes used: {dict(seen.most_bytes)}",
        f"RSS in MiB: {rss_mib}, after the first third at most {growth(seen.rss_bytes) - 1:+.2%}",
    )
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    return run


def test_sixty_adapters_share_slots_for_twelve_and_every_answer_is_theirs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = soak(Scale(60, 200, 8, engine_adapters=12, host_adapters=24, disk_adapters=36, judged=0.1), tmp_path, capsys)
    with pytest.raises(AssertionError, match="instead of"):  # the base alone would have answered otherwise
        assert_greedy(BASE, None, [text for texts in run.seen.texts.values() for text in texts])
    assert max(run.source.reads.values()) > 1, "no adapter had to come back: the caches are too large to show anything"


@pytest.mark.slow
def test_five_thousand_adapters_pass_through_a_few_slots_for_ten_thousand_requests(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Longer than any other test may take, on a busy machine.
    faulthandler.dump_traceback_later(3600, exit=True, file=sys.__stderr__)
    scale = Scale(5000, 10_000, 32, engine_adapters=32, host_adapters=128, disk_adapters=512, judged=0.05)
    run = soak(scale, tmp_path, capsys)
    assert growth(run.seen.rss_bytes) <= MAX_RSS_GROWTH
