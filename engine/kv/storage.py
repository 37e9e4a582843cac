"""The KV cache's bytes: block-major, so that a block is one contiguous page with all layers of P tokens."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.upload import upload

_HUGE_PAGE_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class KVShape:
    """The shape of one block."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: all layers, keys and values."""
        elements = self.num_layers * 2 * self.block_size * self.num_kv_heads * self.head_dim
        return elements * int(self.dtype.itemsize)


class KVStorage:
    """Keys and values of `num_blocks` blocks. Slot s is token s % P of block s // P."""

    def __init__(self, shape: KVShape, num_blocks: int, device: torch.device | str = "cpu") -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        sizes = (num_blocks, shape.num_layers, 2, shape.block_size, shape.num_kv_heads, shape.head_dim)
        self.data = _zeros(sizes, shape.dtype, torch.device(device))  # [B, L, 2, P, Hk, D]

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.shape.block_bytes

    @property
    def pages(self) -> torch.Tensor:
        """All blocks as bytes, uint8 [num_bytes]: block b starts at byte b * block_bytes."""
        return self.data.view(-1).view(torch.uint8)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor) -> None:
        """Put rows into their slots. Shapes: k, v [T, Hk, D]; slot_mapping [T]."""
        blocks = slot_mapping // self.shape.block_size
        offsets = slot_mapping % self.shape.block_size
        pages = self.data[:, layer]  # [B, 2, P, Hk, D]
        pages[blocks, 0, offsets] = k.to(self.data.dtype)
        pages[blocks, 1, offsets] = v.to(self.data.dtype)

    def gather(
        self, layer: int, block_tables: torch.Tensor, out: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the keys and values of whole blocks, in table order; into `out` if given.

        Shapes: block_tables [..., n]; out [blocks in the tables, P * Hk * D]; returns k, v [..., n * P, Hk, D].
        """
        shape = (*block_tables.shape[:-1], -1, self.shape.num_kv_heads, self.shape.head_dim)
        # Rows of a matrix are copied whole; indexing the six axes would copy element by element, four times slower.
        pages = self.data.view(self.num_blocks * self.shape.num_layers * 2, -1)
        rows = (block_tables.reshape(-1) * self.shape.num_layers + layer) * 2
        if out is None:
            return pages.index_select(0, rows).view(shape), pages.index_select(0, rows + 1).view(shape)
        keys, values = (
            torch.index_select(pages, 0, rows, out=out[0]),
            torch.index_select(pages, 0, rows + 1, out=out[1]),
        )
        return keys.view(shape), values.view(shape)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks, all layers at once: sources[i] to targets[i].

        All sources are read before any target is written.
        """
        if not sources:
            return
        device = self.data.device
        self.data[upload(targets, device)] = self.data[upload(sources, device)]


def _zeros(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeroed, not empty: on the CPU this touches every page now, instead of in the middle of a step.

    There in huge pages where the system has them: blocks lie anywhere, and finding them by pages of 4 KiB took a fifth
    of the time of attention.
    """
    num_bytes = math.prod(sizes) * dtype.itemsize
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE") or num_bytes < _HUGE_PAGE_BYTES:
        return torch.zeros(sizes, dtype=dtype, device=device)
    memory = mmap.mmap(-1, num_bytes)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(sizes).zero_()
