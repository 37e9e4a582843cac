"""A source of as many adapters as wanted that keeps none of them: each is made from its number when it is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adapter_store.sources.base import RangeRead, SourceChanged, SourceFile, SourceKind, SourceListing, SourcePage
from tests.support.fake_sources import Files, adapter_files

DIGITS = 7


def name_of(number: int) -> str:
    """The names sort as their numbers do."""
    return f"adapter-{number:0{DIGITS}d}"


def number_of(name: str) -> int | None:
    """The number of an adapter's name; None for any other name."""
    number = name.removeprefix("adapter-")
    return int(number) if number.isdecimal() and name == name_of(int(number)) else None


class NumberedSource:
    """`count` adapters for the linear layers of `spec` (an `ImageSpec.to_dict()`), of `ranks` in turn.

    Random weights, large enough that each adapter says something else. `on_read(num_bytes)` is called with each read
    of an adapter's weights; `reads` counts those reads by name.
    """

    kind: SourceKind = "local"

    def __init__(
        self,
        spec: Mapping[str, Any],
        count: int,
        ranks: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8),
        *,
        on_read: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        self.name = "numbered"
        self.reads: Counter[str] = Counter()
        self._sites = [site for site in spec["sites"] if site["kind"] == "linear" and ".layers." in site["name"]]
        self._count = count
        self._ranks = tuple(ranks)
        self._on_read = on_read
        self._sizes: dict[int, list[tuple[str, int]]] = {}  # by rank: files of equal shapes have equal sizes
        self._last: tuple[int, Files] = (-1, {})  # the files of one adapter are read one after another

    def rank_of(self, number: int) -> int:
        return self._ranks[number % len(self._ranks)]

    def files(self, number: int) -> Files:
        """The adapter as PEFT would save it. The same bytes for the same number."""
        rank, draw = self.rank_of(number), np.random.default_rng(number)
        tensors = {}
        for site in self._sites:
            a = draw.standard_normal((rank, site["in_features"]), dtype=np.float32)
            b = draw.standard_normal((site["out_features"], rank), dtype=np.float32)
            prefix = f"base_model.model.{site['name']}"
            tensors[f"{prefix}.lora_A.weight"] = a * np.float32(0.5 / site["in_features"] ** 0.5)
            tensors[f"{prefix}.lora_B.weight"] = b * np.float32(1 / rank**0.5)
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": rank,
            "target_modules": sorted({site["name"].rpartition(".")[2] for site in self._sites}),
        }
        return adapter_files(tensors, config)

    async def stat(self, name: str) -> SourceListing | None:
        number = number_of(name)
        if number is None or number >= self._count:
            return None
        rank = self.rank_of(number)
        if rank not in self._sizes:
            self._sizes[rank] = [(file, len(content)) for file, content in sorted(self.files(number).items())]
        files = [SourceFile(name=file, etag=str(number), num_bytes=size) for file, size in self._sizes[rank]]
        return SourceListing(files=tuple(files))

    async def list(self, cursor: str | None, limit: int) -> SourcePage:
        start = int(cursor or 0)
        end = min(start + limit, self._count)
        names = tuple(name_of(number) for number in range(start, end))
        return SourcePage(names=names, next_cursor=str(end) if end < self._count else None)

    async def read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        number = number_of(name)
        if number is None or number >= self._count:
            raise SourceChanged(name)
        if self._last[0] != number:
            self._last = (number, self.files(number))
        content = self._last[1][file.name]
        if file.name.endswith(".safetensors"):
            self.reads[name] += 1
            self._on_read(part.num_missing)
        part.write(content[part.start + part.num_received : part.end])

    async def close(self) -> None:
        """Nothing is open."""
