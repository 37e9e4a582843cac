"""What the CPU kernels read of LoRA: a table of slots per site, and the step's rows in chunks of one adapter each."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor

from engine.core.plan import LoraSegment
from engine.image_spec import LinearSite
from engine.lora.chunks import check_rows, cut_chunks
from engine.lora.storage import SiteWeights
from engine.native.library import MAX_CHUNK_ROWS, NativeLibrary, check
from engine.native.structs import ELEMENTS, LoraChunk, LoraWeights, Member


class Chunks:
    """Rows that use LoRA, at most MAX_CHUNK_ROWS of one slot at a time. `end`: no row at or behind it uses any."""

    __slots__ = ("_array", "address", "count", "end")

    def __init__(self, segments: tuple[LoraSegment, ...] = ()) -> None:
        found = cut_chunks(segments, MAX_CHUNK_ROWS)
        self._array = (LoraChunk * len(found))(*(LoraChunk(*chunk) for chunk in found))
        self.address = ctypes.addressof(self._array) if found else None
        self.count = len(found)
        self.end = segments[-1].row_end if segments else 0

    def check_rows(self, num_rows: int) -> None:
        """Raises: ValueError if a layer was given fewer rows than the segments name."""
        check_rows(self.end, num_rows)


class NativeLora:
    """The slot tables of one model. `num_slots` counts from 1; slot 0, the base model, stays empty."""

    def __init__(self, library: NativeLibrary, num_slots: int) -> None:
        self.library = library
        self.rows = Chunks()
        self.sampled_rows = Chunks()
        self._table = LoraWeights * (num_slots + 1)
        self._tables: dict[int, ctypes.Array[LoraWeights]] = {}

    def table_address(self, site: int) -> int:
        """Where the weights of one site lie, slot by slot: it stays there."""
        return ctypes.addressof(self._site(site))

    def bind(self, slot: int, weights: Iterable[SiteWeights]) -> None:
        """The caller keeps the tensors until `unbind`."""
        for w in weights:
            assert w.a.is_contiguous()
            assert w.b.is_contiguous()
            self._site(w.site)[slot] = LoraWeights(
                a=w.a.data_ptr(),
                b=w.b.data_ptr(),
                rank=w.b.shape[0],
                scaling=w.scaling,
                type=ELEMENTS[w.b.dtype],
                scales=None if w.scales is None else w.scales.data_ptr(),
            )

    def unbind(self, slot: int, sites: Iterable[int]) -> None:
        for site in sites:
            self._site(site)[slot] = LoraWeights()

    def set(self, segments: tuple[LoraSegment, ...], sampled_segments: tuple[LoraSegment, ...]) -> None:
        self.rows = Chunks(segments)
        self.sampled_rows = Chunks(sampled_segments)

    def addition(self, site: LinearSite, *, sampled: bool) -> NativeAddition:
        return NativeAddition(self, site.index, site.out_features, sampled=sampled)

    def _site(self, site: int) -> ctypes.Array[LoraWeights]:
        if site not in self._tables:
            self._tables[site] = self._table()
        return self._tables[site]


class NativeAddition:
    """LoraAddition in float32."""

    def __init__(self, lora: NativeLora, site: int, out_features: int, *, sampled: bool) -> None:
        self._lora = lora
        self._sampled = sampled
        self._member = Member(out_features=out_features, lora=lora.table_address(site))

    def add(self, y: Tensor, x: Tensor) -> bool:
        if x.dtype is not torch.float32 or y.dtype is not torch.float32 or not y.is_contiguous():
            return False
        chunks = self._lora.sampled_rows if self._sampled else self._lora.rows
        in_features = x.shape[-1]
        num_rows = x.numel() // in_features
        chunks.check_rows(num_rows)
        if not chunks.count:
            return True
        x = x.contiguous()
        self._member.y = y.data_ptr()
        status = self._lora.library.add_lora(
            x.data_ptr(), num_rows, in_features, ctypes.byref(self._member), 1, chunks.address, chunks.count
        )
        check(status, "LoRA")
        return True
