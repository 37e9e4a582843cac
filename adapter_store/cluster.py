"""What a Ray cluster keeps for the store: images in its object store, and a few small values on its head node."""

from __future__ import annotations

import asyncio

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayError
from ray.experimental import internal_kv

from adapter_store.tiers.blobs import BlobsFull

_LOOK_TIMEOUT_S = 2.0
_NAMESPACE = b"chorus"


class RayBlobs:
    """Images in Ray's object store. This process owns them: they die with it, which consumers treat as a miss."""

    def __init__(self, node: str = "") -> None:
        self.node = node  # of this process

    async def put(self, data: NDArray[np.uint8]) -> ray.ObjectRef[NDArray[np.uint8]]:
        """Copies `data` into shared memory, in a thread: the first touch of fresh pages takes a while."""
        try:
            return await asyncio.to_thread(ray.put, data)
        except (ObjectStoreFullError, OutOfDiskError) as error:
            raise BlobsFull(
                f"Ray's object store has no room for {data.nbytes} bytes: {type(error).__name__}"
            ) from error

    async def has(self, handle: ray.ObjectRef[NDArray[np.uint8]]) -> bool:
        """A get on the own node maps the pages, it copies nothing; what was spilled is brought back."""
        try:
            await asyncio.wait_for(asyncio.wrap_future(handle.future()), _LOOK_TIMEOUT_S)
        except (TimeoutError, GetTimeoutError):
            return True  # on its way back from disk
        except RayError:
            return False
        return True

    async def view(self, handle: ray.ObjectRef[NDArray[np.uint8]]) -> NDArray[np.uint8] | None:
        """A view of the shared memory."""
        try:
            return await asyncio.wait_for(asyncio.wrap_future(handle.future()), _LOOK_TIMEOUT_S)
        except (TimeoutError, GetTimeoutError, RayError):
            return None

    def drop(self, handle: ray.ObjectRef[NDArray[np.uint8]]) -> None:
        """Nothing to do: Ray frees the object with its last reference."""


class RayShelf:
    """Small values by name, in the head node's key-value store: they are there for every node, as long as the cluster.

    All raise OSError when the head node does not answer.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix

    async def get(self, key: str) -> bytes | None:
        """The value; None: there is none."""
        return await asyncio.to_thread(get_value, f"{self._prefix}/{key}")

    async def put(self, key: str, value: bytes) -> None:
        """Writes a value, over the one that was there."""
        await asyncio.to_thread(put_value, f"{self._prefix}/{key}", value)


def get_value(key: str) -> bytes | None:
    """Blocking. Raises: OSError."""
    try:
        value: bytes | None = internal_kv._internal_kv_get(key.encode(), namespace=_NAMESPACE)
    except (RayError, RuntimeError) as error:
        raise OSError(f"the Ray head node cannot be asked: {error}") from error
    return value


def put_value(key: str, value: bytes) -> None:
    """Blocking. Raises: OSError."""
    try:
        internal_kv._internal_kv_put(key.encode(), value, overwrite=True, namespace=_NAMESPACE)
    except (RayError, RuntimeError) as error:
        raise OSError(f"the Ray head node cannot be written to: {error}") from error
