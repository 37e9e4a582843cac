"""Numbers on their way to a device, in copies that the host does not wait for."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch


def use_device(device: torch.device) -> None:
    """From now on kernels of the calling thread are launched on `device`. Each thread begins with the first GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def upload(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A tensor [n] of int64 or int32."""
    # torch reads a list number by number, some with a dozen calls each; an array is read as it is.
    packed = array("q" if dtype is torch.int64 else "i", numbers)
    return to_device(torch.frombuffer(packed, dtype=dtype) if packed else torch.empty(0, dtype=dtype), device)


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Later work of the device's current stream sees it. On the CPU: the tensor itself."""
    # Pinned memory lets the copy overlap with the device's work instead of waiting for it.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
