"""The KV cache's bytes: block-major, so that a block is one contiguous page with all layers of P tokens.

A page, section by section, a section being the keys or the values of one layer:

    as the model has them    elements [P, Hk, D]
    quantized                codes [P, Hk, D] of a byte, scales [Hk, P] float32, up to a multiple of 64 bytes

What belongs to a block lies in its page, so blocks are copied, shared and given to adapters whole, whatever is in them.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.kv.rows import CODE_DTYPES, KVQuantization, dequantize_rows, quantize_rows
from engine.to_device import upload

_HUGE_PAGE_BYTES = 2 << 20
_SCALE_BYTES = 4
_ALIGNMENT_BYTES = 64  # of quantized sections: a cache line, and what adapters in pages need


@dataclass(frozen=True, slots=True)
class KVShape:
    """The shape of one block."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype  # of the model: what attention is given and gives
    quantization: KVQuantization | None = None  # None: keys and values lie there in `dtype`

    @property
    def row_elements(self) -> int:
        """Elements of a section."""
        return self.block_size * self.num_kv_heads * self.head_dim

    @property
    def scales_offset(self) -> int:
        """Bytes from the start of a quantized section to its scales."""
        return -(-self.row_elements // _SCALE_BYTES) * _SCALE_BYTES

    @property
    def section_bytes(self) -> int:
        """Bytes of one layer's keys, or values, in one block."""
        if self.quantization is None:
            return self.row_elements * int(self.dtype.itemsize)
        used = self.scales_offset + self.block_size * self.num_kv_heads * _SCALE_BYTES
        return -(-used // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: all layers, keys and values."""
        return self.num_layers * 2 * self.section_bytes

    @property
    def scheme(self) -> str:
        """A name of what the cache's bytes mean."""
        return self.quantization or str(self.dtype).removeprefix("torch.")


class KVStorage:
    """Keys and values of `num_blocks` blocks. Slot s is token s % P of block s // P."""

    def __init__(self, shape: KVShape, num_blocks: int, device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.pages = _zeros(num_blocks * shape.block_bytes, torch.device(device))
        """All blocks as bytes, uint8 [num_bytes]: block b starts at byte b * block_bytes."""
        sizes = (num_blocks, shape.num_layers, 2, shape.block_size, shape.num_kv_heads, shape.head_dim)
        self.scales: Tensor | None = None  # [B, L, 2, Hk, P] of a quantized cache
        if shape.quantization is None:
            self.data = self.pages.view(shape.dtype).view(sizes)  # [B, L, 2, P, Hk, D], codes of a quantized cache
            return
        codes = self.pages.view(CODE_DTYPES[shape.quantization])
        self.data = codes.as_strided(sizes, (*self._section_strides(1), sizes[4] * sizes[5], sizes[5], 1))
        self.scales = self.pages.view(torch.float32).as_strided(
            (*sizes[:3], sizes[4], sizes[3]),
            (*self._section_strides(_SCALE_BYTES), sizes[3], 1),
            shape.scales_offset // _SCALE_BYTES,
        )

    def _section_strides(self, item_bytes: int) -> tuple[int, int, int]:
        section = self.shape.section_bytes // item_bytes
        return 2 * self.shape.num_layers * section, 2 * section, section

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.shape.block_bytes

    def write(self, layer: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Put rows into their slots. Shapes: k, v [T, Hk, D]; slot_mapping [T]."""
        blocks = slot_mapping // self.shape.block_size
        offsets = slot_mapping % self.shape.block_size
        pages = self.data[:, layer]  # [B, 2, P, Hk, D]
        if self.shape.quantization is not None:
            pages = pages.view(torch.uint8)  # torch cannot index float8
        for part, rows in enumerate((k, v)):
            if self.shape.quantization is None or self.scales is None:
                pages[blocks, part, offsets] = rows.to(self.data.dtype)
                continue
            codes, scales = quantize_rows(rows, self.shape.quantization)
            pages[blocks, part, offsets] = codes.view(torch.uint8)
            self.scales[blocks, layer, part, :, offsets] = scales

    def gather(self, layer: int, block_tables: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the keys and values of whole blocks, in table order: of a quantized cache, in float32.

        Shapes: block_tables [..., n]; returns k, v [..., n * P, Hk, D].
        """
        shape = (*block_tables.shape[:-1], -1, self.shape.num_kv_heads, self.shape.head_dim)
        keys, values = self.gather_sections(layer, block_tables)
        if self.shape.quantization is None:
            return keys.view(shape), values.view(shape)
        return self.widen(keys).view(shape), self.widen(values).view(shape)

    @property
    def section_dtype(self) -> torch.dtype:
        """Of what `gather_sections` copies: elements, or the bytes of codes and scales."""
        return self.shape.dtype if self.shape.quantization is None else torch.uint8

    @property
    def section_items(self) -> int:
        return self.shape.section_bytes // self.section_dtype.itemsize

    def gather_sections(
        self, layer: int, block_tables: Tensor, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Copies of sections as they lie in the cache, in table order; in `out` if given.

        Shapes: out [blocks in the tables, section_items] of section_dtype; returns two such.
        """
        # Rows of a matrix are copied whole; indexing the six axes would copy element by element, four times slower.
        sections = self.pages.view(self.section_dtype).view(-1, self.section_items)
        rows = (block_tables.reshape(-1) * self.shape.num_layers + layer) * 2
        if out is None:
            return sections.index_select(0, rows), sections.index_select(0, rows + 1)
        return (
            torch.index_select(sections, 0, rows, out=out[0]),
            torch.index_select(sections, 0, rows + 1, out=out[1]),
        )

    def widen(self, sections: Tensor, out: Tensor | None = None) -> Tensor:
        """Gathered sections in float32. Shapes: [n, section_items]; out, and what is returned, [n, P * Hk * D]."""
        shape = self.shape
        out = torch.empty((len(sections), shape.row_elements), device=sections.device) if out is None else out
        if shape.quantization is None:
            return out.copy_(sections)
        codes = sections[:, : shape.row_elements].view(CODE_DTYPES[shape.quantization])
        scales = sections[:, shape.scales_offset :].view(torch.float32)[:, : shape.block_size * shape.num_kv_heads]
        scales = scales.view(-1, shape.num_kv_heads, shape.block_size).transpose(1, 2)  # [n, P, Hk]
        sizes = (len(sections), shape.block_size, shape.num_kv_heads, shape.head_dim)
        dequantize_rows(codes.unflatten(1, sizes[1:]), scales, out.view(sizes))
        return out

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks, all layers at once: sources[i] to targets[i].

        All sources are read before any target is written.
        """
        if not sources:
            return
        pages, device = self.pages.view(self.num_blocks, -1), self.pages.device
        pages[upload(targets, device)] = pages[upload(sources, device)]


def _zeros(num_bytes: int, device: torch.device) -> Tensor:
    """Zeros. On the CPU they take memory when a block is first written: a cache is sized for the busiest hour, and may
    never see it.

    In huge pages where the system has them: blocks lie anywhere, and finding them by pages of 4 KiB took a fifth of the
    time of attention. Private, because shared mappings get none unless the machine is told to.
    """
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or num_bytes < _HUGE_PAGE_BYTES:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
