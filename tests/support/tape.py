"""A CUDA graph without CUDA: every torch operation and Triton launch is recorded, and repeated on the same memory.

As in a CUDA graph, Python does not run again at a replay: numbers, shapes and tensors are those of the recording, and
reading a value on the host is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.replays: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value was read on the host while a step was recorded")
        kwargs = kwargs or {}
        output = func(*args, **kwargs)

        def replay() -> None:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(output), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.replays.append(replay)
        return output


def record(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A Recorder, for kernels that Triton interprets."""
    tape = _Tape()
    launch = GridExecutor.__call__

    def recorded(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        with torch.utils._python_dispatch._disable_current_modes():
            launch(self, *args, **kwargs)
        tape.replays.append(lambda: launch(self, *args, **kwargs))

    GridExecutor.__call__ = recorded
    try:
        with tape:
            output = step()
    finally:
        GridExecutor.__call__ = launch

    def replay() -> torch.Tensor:
        for repeat in tape.replays:
            repeat()
        return output

    return replay
