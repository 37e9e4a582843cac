"""Numbers on their way to a device and back, in copies that the host does not wait for."""

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


class HostCopy:
    """A tensor on its way to the host. `wait` waits for this copy and not for what was launched after it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.current_stream(tensor.device).record_event()

    def wait(self) -> torch.Tensor:
        if self._event is not None:
            self._event.synchronize()
        return self._tensor
