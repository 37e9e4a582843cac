"""What the Triton kernels read of LoRA: where each slot's weights lie, in tables on the device, and a step's chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.core.plan import LoraSegment
from engine.image_spec import LinearSite
from engine.lora.chunks import check_rows, cut_chunks
from engine.lora.storage import SiteWeights
from engine.to_device import to_device, upload
from engine.triton_kernels.lora import CHUNK_ROWS, LoraGroup, LoraTables, add_lora

_FIRST_MAX_RANK = 64  # scratch is made for this rank, and for a larger one when it comes


@dataclass(frozen=True, slots=True)
class DeviceChunks:
    """Rows that use LoRA: [N, 3] first row, rows, slot. `end`: no row at or behind it uses any."""

    table: Tensor | None
    end: int = 0

    @staticmethod
    def of(segments: tuple[LoraSegment, ...], device: torch.device) -> DeviceChunks:
        if not segments:
            return DeviceChunks(None)
        numbers = [number for chunk in cut_chunks(segments, CHUNK_ROWS) for number in chunk]
        return DeviceChunks(upload(numbers, device, torch.int32).view(-1, 3), segments[-1].row_end)


class TritonLora:
    """LoraKernels of one model. `num_slots` counts from 1; slot 0, the base model, stays empty."""

    def __init__(
        self, num_sites: int, num_slots: int, dtype: torch.dtype, device: torch.device, *, are_codes: bool = False
    ) -> None:
        """`dtype`: of the activations, and of the adapters if these are not int8 codes."""
        self.device = device
        self.dtype = dtype
        self.is_fixed = False
        self.rows = DeviceChunks(None)
        self.sampled_rows = DeviceChunks(None)
        self.max_rank = _FIRST_MAX_RANK  # of all adapters seen so far
        self._num_sites = num_sites
        self._tables = LoraTables.empty(num_sites, num_slots + 1, device, are_codes=are_codes)

    def bind(self, slot: int, weights: Iterable[SiteWeights]) -> None:
        """The caller keeps the tensors until `unbind`."""
        pointers, ranks, scalings = [0] * (3 * self._num_sites), [0] * self._num_sites, [0.0] * self._num_sites
        for w in weights:
            assert w.a.is_contiguous()
            assert w.b.is_contiguous()
            assert (w.scales is not None) == self._tables.are_codes
            pointers[3 * w.site : 3 * w.site + 2] = w.a.data_ptr(), w.b.data_ptr()
            if w.scales is not None:
                pointers[3 * w.site + 2] = w.scales.data_ptr()
            ranks[w.site], scalings[w.site] = w.b.shape[0], w.scaling
        self.max_rank = max(self.max_rank, *ranks)
        self._tables.pointers[:, slot] = upload(pointers, self.device).view(-1, 3)
        self._tables.ranks[:, slot] = upload(ranks, self.device, torch.int32)
        self._tables.scalings[:, slot] = to_device(torch.tensor(scalings), self.device)

    def unbind(self, slot: int, sites: Iterable[int]) -> None:
        self._tables.ranks[:, slot] = 0

    def set(self, segments: tuple[LoraSegment, ...], sampled_segments: tuple[LoraSegment, ...]) -> None:
        self.is_fixed = False
        self.rows = DeviceChunks.of(segments, self.device)
        self.sampled_rows = DeviceChunks.of(sampled_segments, self.device)

    def set_fixed(self, table: Tensor | None) -> None:
        """Chunks of a step whose rows are all sampled, in a tensor that stays where it is: a CUDA graph."""
        self.is_fixed = True
        self.rows = self.sampled_rows = DeviceChunks(table)

    def group(self, sites: list[int], widths: list[int], in_features: int) -> LoraGroup:
        """Sites of one input, whose outputs lie side by side, to be given to `add`."""
        return LoraGroup.of(sites, widths, in_features, self.device)

    def addition(self, site: LinearSite, *, sampled: bool) -> TritonAddition:
        return TritonAddition(self, site, sampled=sampled)

    def add(self, y: Tensor, x: Tensor, group: LoraGroup, *, sampled: bool = False) -> None:
        """Shapes: x [T, in], y [T, all members' out]. Raises: ValueError if segments reach beyond the rows."""
        chunks = self.sampled_rows if sampled else self.rows
        check_rows(chunks.end, x.shape[0])
        if chunks.table is not None:
            add_lora(y, x, chunks.table, group, self._tables, self.max_rank)


class TritonAddition:
    """LoraAddition to outputs in the dtype of the activations or, as the head's are, in float32."""

    def __init__(self, lora: TritonLora, site: LinearSite, *, sampled: bool) -> None:
        self._lora = lora
        self._sampled = sampled
        self._group = lora.group([site.index], [site.out_features], site.in_features)

    def add(self, y: Tensor, x: Tensor) -> bool:
        if x.dtype is not self._lora.dtype or y.dtype not in (x.dtype, torch.float32) or not y.is_contiguous():
            if self._lora.is_fixed:
                # A recorded step replays kernels only: what Python would do here would be done once.
                raise RuntimeError(f"LoRA of {x.dtype} rows on {y.dtype} outputs cannot be recorded")
            return False
        rows = x.reshape(-1, x.shape[-1])
        self._lora.add(y.view(-1, y.shape[-1]), rows, self._group, sampled=self._sampled)
        return True
