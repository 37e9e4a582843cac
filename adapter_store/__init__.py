"""The adapter store: finds adapters, checks them, packs them into images and holds those in host memory.

Exports are lazy, so that `adapter_store.image.packing` (which offline use needs) imports neither boto3 nor ray.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "AdapterStore": "adapter_store.store",
    "AdapterPage": "adapter_store.records",
    "AdapterRecord": "adapter_store.records",
    "AdapterState": "adapter_store.records",
    "FileImage": "adapter_store.tiers.blobs",
    "Lease": "adapter_store.records",
    "MemoryBlobs": "adapter_store.tiers.blobs",
    "PackedImage": "adapter_store.image.packing",
    "Registration": "adapter_store.records",
    "SourceConfig": "adapter_store.sources.base",
    "StoreConfig": "adapter_store.records",
    "StoreError": "adapter_store.errors",
    "StoreStatus": "adapter_store.records",
    "map_image": "adapter_store.tiers.blobs",
    "pack": "adapter_store.image.packing",
    "pack_folder": "adapter_store.image.packing",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
