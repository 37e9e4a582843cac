"""Adapters made by hand, a source that does what a test tells it, and a clock that stands still until it is moved."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import numpy as np
from safetensors.numpy import save

from adapter_store.errors import SourceUnavailable
from adapter_store.sources.base import RangeRead, SourceChanged, SourceFile, SourceKind, SourceListing, SourcePage
from adapter_store.tiers.blobs import BlobsFull
from tests.support.waiting import within

Files = dict[str, bytes]


def site(index: int, name: str, in_features: int, out_features: int, kind: str = "linear") -> dict[str, Any]:
    """A site as `LinearSite` writes it."""
    return {
        "index": index,
        "name": name,
        "in_features": in_features,
        "out_features": out_features,
        "kind": kind,
        "layer": None,
        "fusion_group": None,
        "shard_axis": None,
    }


def small_spec(dtype: str = "float32") -> dict[str, Any]:
    """A base of two layers with q_proj and v_proj, 8 -> 8 and 8 -> 4."""
    names = [f"model.layers.{layer}.self_attn.{proj}_proj" for layer in range(2) for proj in "qv"]
    sites = [site(index, name, 8, 8 if name.endswith("q_proj") else 4) for index, name in enumerate(names)]
    return {"base_fingerprint": "small", "dtype": dtype, "sites": sites, "tp_degree": 1}


def small_tensors(rank: int = 2, seed: int = 0) -> dict[str, Any]:
    """Random LoRA tensors for all sites of `small_spec`."""
    draw = np.random.default_rng(seed)
    tensors = {}
    for row in small_spec()["sites"]:
        prefix = f"base_model.model.{row['name']}"
        tensors[f"{prefix}.lora_A.weight"] = draw.standard_normal((rank, row["in_features"])).astype(np.float32)
        tensors[f"{prefix}.lora_B.weight"] = draw.standard_normal((row["out_features"], rank)).astype(np.float32)
    return tensors


def small_config(rank: int = 2, **more: Any) -> dict[str, Any]:
    """The adapter_config.json that goes with `small_tensors`."""
    return {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"], **more}


def small_adapter(rank: int = 2, seed: int = 0, **config: Any) -> Files:
    """A good adapter for `small_spec`, as files."""
    return adapter_files(small_tensors(rank, seed), small_config(rank, **config))


def adapter_files(tensors: dict[str, Any], config: dict[str, Any]) -> Files:
    """Tensors and a configuration as PEFT saves them."""
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


class FakeClock:
    """Seconds that pass only when told. `sleep` passes them at once, and remembers."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class FakeSource:
    """Adapters in a dict. Change `adapters` to upload; set `down` to a reason to be unreachable."""

    kind: SourceKind = "local"

    def __init__(self, adapters: dict[str, Files] | None = None, name: str = "fake") -> None:
        self.name = name
        self.adapters = adapters or {}
        self.down: str | None = None
        self.failing_fetches = 0  # so many fetches fail before one works
        self.gate: asyncio.Event | None = None  # fetches wait for it
        self.on_fetch: Any = None  # called in the middle of a fetch
        self.on_fetched: Any = None  # called when all files were read
        self.stats: list[str] = []
        self.fetches: list[str] = []
        self.closed = False

    async def stat(self, name: str) -> SourceListing | None:
        self.stats.append(name)
        await asyncio.sleep(0)
        if self.down:
            raise SourceUnavailable(self.name, self.down)
        files = self.adapters.get(name)
        if files is None:
            return None
        return SourceListing(
            files=tuple(
                SourceFile(name=file, etag=hashlib.md5(body).hexdigest(), num_bytes=len(body))
                for file, body in sorted(files.items())
            )
        )

    async def list(self, cursor: str | None, limit: int) -> SourcePage:
        if self.down:
            raise SourceUnavailable(self.name, self.down)
        names = [name for name in sorted(self.adapters) if cursor is None or name > cursor]
        page = tuple(names[:limit])
        return SourcePage(names=page, next_cursor=page[-1] if len(names) > limit else None)

    async def read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        if file.name.endswith(".safetensors"):
            self.fetches.append(name)
            if self.gate is not None:
                await within(self.gate.wait(), f"the test to open the gate for {name}")
            await asyncio.sleep(0)
            if self.on_fetch is not None:
                self.on_fetch()
        if self.down or (self.failing_fetches and file.name.endswith(".safetensors")):
            self.failing_fetches -= bool(self.failing_fetches)
            raise SourceUnavailable(self.name, self.down or "connection reset")
        content = self.adapters.get(name, {}).get(file.name, b"")
        if hashlib.md5(content).hexdigest() != file.etag:
            raise SourceChanged(name)
        part.write(content[part.start + part.num_received : part.end])
        if file.name.endswith(".safetensors") and self.on_fetched is not None:
            self.on_fetched()

    async def close(self) -> None:
        self.closed = True


class FakeBlobs:
    """Handles are numbers; `lost` handles are gone."""

    node = ""

    def __init__(self) -> None:
        self.arrays: dict[int, Any] = {}
        self.lost: set[int] = set()
        self.num_looks = 0
        self.max_bytes: int | None = None  # as many as shared memory has
        self._next = 0

    async def put(self, data: Any) -> int:
        await asyncio.sleep(0)
        if self.max_bytes is not None and sum(map(len, self.arrays.values())) + len(data) > self.max_bytes:
            raise BlobsFull("shared memory is full")
        self._next += 1
        self.arrays[self._next] = data
        return self._next

    async def has(self, handle: int) -> bool:
        self.num_looks += 1
        await asyncio.sleep(0)
        return handle not in self.lost

    async def view(self, handle: int) -> Any:
        await asyncio.sleep(0)
        return self.arrays.get(handle)

    def drop(self, handle: int) -> None:
        del self.arrays[handle]
