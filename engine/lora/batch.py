"""What the LoRA layers of one model share: which weights are bound to which slot, and which rows use which slot."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from engine.core.plan import NO_LORA, LoraSegment
from engine.image_spec import LinearSite
from engine.lora.chunks import check_rows
from engine.lora.storage import SiteWeights


class LoraAddition(Protocol):
    """LoRA of one linear site by a kernel."""

    def add(self, y: Tensor, x: Tensor) -> bool:
        """y += scaling * (x a^T) b for the step's rows, in place. False: it cannot, and has done nothing.

        Shapes: x [..., in], y [..., out]. Raises: ValueError if there are fewer rows than the segments name.
        """
        ...


class LoraKernels(Protocol):
    """What kernels keep of LoRA: told of everything that LoraBatch is told."""

    def bind(self, slot: int, weights: Iterable[SiteWeights]) -> None: ...
    def unbind(self, slot: int, sites: Iterable[int]) -> None: ...
    def set(self, segments: tuple[LoraSegment, ...], sampled_segments: tuple[LoraSegment, ...]) -> None: ...
    def addition(self, site: LinearSite, *, sampled: bool) -> LoraAddition: ...


class BoundWeights:
    """The LoRA weights of one site in one slot, as the layers multiply with them."""

    __slots__ = ("a", "a_t", "b", "dtype", "scales", "scaling")

    def __init__(self, weights: SiteWeights) -> None:
        self.a = weights.a
        self.a_t = weights.a.t()
        self.b = weights.b
        self.scaling = weights.scaling
        # Of int8 codes: [R] of a and of b, which both scale the low-rank vector.
        self.scales = None if weights.scales is None else weights.scales.unbind(0)
        self.dtype = weights.b.dtype if weights.scales is None else torch.float32  # products are made in


class SegmentedRows:
    """A step's rows cut into runs of one slot each, so that a layer cuts a tensor with one call.

    `active` is false if no row uses LoRA.
    """

    __slots__ = ("_cuts", "_end", "_num_rows", "_sizes", "_slots", "active")

    def __init__(self, segments: tuple[LoraSegment, ...] = ()) -> None:
        sizes: list[int] = []
        slots: list[int] = []
        end = 0
        for segment in segments:
            if segment.row_start < end or segment.row_end <= segment.row_start:
                raise ValueError(f"{segment} is empty or begins before row {end}: segments ascend and are disjoint")
            if segment.row_start > end:
                sizes.append(segment.row_start - end)
                slots.append(NO_LORA)
            sizes.append(segment.row_end - segment.row_start)
            slots.append(segment.slot)
            end = segment.row_end
        self.active = bool(segments)
        self._sizes, self._slots, self._end = sizes, slots, end
        self._num_rows = -1
        self._cuts: tuple[list[int], list[int]] = (sizes, slots)

    def cuts(self, num_rows: int) -> tuple[list[int], list[int]]:
        """Sizes of the runs and the slot of each (0: base model), covering exactly `num_rows` rows."""
        if num_rows != self._num_rows:
            check_rows(self._end, num_rows)
            rest = num_rows - self._end
            self._cuts = ([*self._sizes, rest], [*self._slots, NO_LORA]) if rest else (self._sizes, self._slots)
            self._num_rows = num_rows
        return self._cuts


class LoraBatch:
    """One object per model: the slot table (changes when adapters come and go) and this step's segments.

    The runner calls `bind` / `unbind` for adapter operations and `set` before each forward. `kernels` are told the
    same, for layers that compute with them.
    """

    def __init__(self, kernels: LoraKernels | None = None) -> None:
        self.kernels = kernels
        self.rows = SegmentedRows()  # layers that see all rows of the step
        self.sampled_rows = SegmentedRows()  # layers that see only the rows that are sampled (lm_head)
        self._sites: dict[int, dict[int, BoundWeights]] = {}
        self._bound: dict[int, dict[int, SiteWeights]] = {}  # slot -> its weights by site
        self._sites_in_python: set[int] = set()
        self.needs_python = False  # this step has LoRA that no kernel computes, so it cannot be replayed

    def site_weights(self, site: int) -> dict[int, BoundWeights]:
        """slot -> weights of one site: a live table, which layers keep."""
        if site not in self._sites:
            self._sites[site] = {slot: BoundWeights(w[site]) for slot, w in self._bound.items() if site in w}
        return self._sites[site]

    def compute_in_python(self, site: int) -> None:
        """The layer of this site knows no kernel."""
        self._sites_in_python.add(site)

    def bind(self, slot: int, weights: Iterable[SiteWeights]) -> None:
        """Put an adapter's weights into a free slot. Raises: ValueError if the slot is 0 or taken.

        When the kernels run out of memory the slot is bound, for `unbind` to clear.
        """
        if slot <= NO_LORA or slot in self._bound:
            raise ValueError(f"LoRA slot {slot} cannot be bound: slots are 1 and up, and one adapter has each")
        weights = tuple(weights)
        for w in weights:
            if (table := self._sites.get(w.site)) is not None:  # else no layer reads it: kernels do
                table[slot] = BoundWeights(w)
        self._bound[slot] = {w.site: w for w in weights}
        if self.kernels is not None:
            self.kernels.bind(slot, weights)

    def unbind(self, slot: int) -> None:
        """Raises: KeyError if the slot is not bound."""
        sites = tuple(self._bound.pop(slot))
        if self.kernels is not None:
            self.kernels.unbind(slot, sites)
        for site in sites:
            if (table := self._sites.get(site)) is not None:
                del table[slot]

    def set(self, segments: tuple[LoraSegment, ...], sampled_segments: tuple[LoraSegment, ...] = ()) -> None:
        """Say which rows of this step use which slot.

        `segments` cut the step's rows, `sampled_segments` the rows that are sampled, numbered from 0. Both ascend
        and are disjoint; rows in none are the base model's. Raises: ValueError if a slot is not bound.
        """
        for segment in (*segments, *sampled_segments):
            if segment.slot not in self._bound:
                raise ValueError(f"{segment} names a LoRA slot that is not bound")
        self.needs_python = bool(self._sites_in_python) and any(
            not self._sites_in_python.isdisjoint(self._bound[segment.slot]) for segment in segments
        )
        self.rows = SegmentedRows(segments)
        self.sampled_rows = SegmentedRows(sampled_segments)
        if self.kernels is not None:
            self.kernels.set(segments, sampled_segments)


def add_lora(out: Tensor, x: Tensor, weights: BoundWeights) -> None:
    """out += scaling * (x a^T) b, in place. Shapes: out [n, out_features], x [n, in_features].

    In PEFT's order, result + B(A(x)) * scaling, and in the adapter's dtype (codes: in float32); products are summed in
    float32 or better by the matrix kernels, and the scaled sum is rounded once when it is added.
    """
    low = x.to(weights.dtype).mm(weights.a_t.to(weights.dtype))
    add_expanded(out, low, weights, weights.scaling)


def add_expanded(out: Tensor, low: Tensor, weights: BoundWeights, scaling: float) -> None:
    """out += scaling * low b, in place. Shapes: out [n, out_features], low [n, R]; of codes, not scaled yet."""
    b = weights.b
    if weights.scales is not None:
        of_a, of_b = weights.scales
        low, b = low * of_a * of_b, b.to(weights.dtype)
    if out.dtype == b.dtype:
        out.addmm_(low, b, alpha=scaling)
    elif out.dtype is torch.float32:  # logits: what the product sums is not rounded on the way
        out.addmm_(low.float(), b.float(), alpha=scaling)
    else:
        out.add_(low.mm(b), alpha=scaling)
