"""Counts the bytes of tensors that are alive while something runs, on any device: also on "meta", which has none."""

from __future__ import annotations

import weakref
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory:
    """Within it every storage that an operation makes counts from its making to its end."""

    def __init__(self, *, workspaces: dict[str, int] | None = None) -> None:
        """`workspaces`: by operation, bytes for each element of its first argument that a device takes meanwhile."""
        self.now_bytes = 0
        self.peak_bytes = 0
        self._alive: set[int] = set()
        self._mode = _Counter(self, workspaces or {})

    def note(self, tensor: torch.Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in known or storage.nbytes() == 0:
            return
        self._alive.add(key)
        self.now_bytes += storage.nbytes()
        weakref.finalize(storage, self._ended, key, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.now_bytes)

    def during(self, num_bytes: int) -> None:
        self.peak_bytes = max(self.peak_bytes, self.now_bytes + num_bytes)

    def _ended(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self.now_bytes -= num_bytes

    def __enter__(self) -> Self:
        self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mode.__exit__(kind, error, trace)


class _Counter(TorchDispatchMode):
    def __init__(self, peak: PeakMemory, workspaces: dict[str, int]) -> None:
        super().__init__()
        self._peak, self._workspaces = peak, workspaces

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {tensor.untyped_storage()._cdata for tensor in before}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._peak.note(leaf, known)
        extra = self._workspaces.get(func.overloadpacket.__name__, 0)
        if extra and before:
            self._peak.during(extra * before[0].numel())
        return out
