"""From settings to the adapter store's actor: found, or created if nobody has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapter_store.actor import get_or_create_store
from adapter_store.records import StoreConfig
from adapter_store.sources.base import SourceConfig
from deployments.settings import AdapterSettings, FileSource, Source


def store_config(settings: AdapterSettings) -> StoreConfig:
    """The store's settings. It looks at its sources within half of `refresh_s`; replicas ask it in the other half."""
    return StoreConfig(
        host_bytes=settings.host_bytes,
        max_adapter_bytes=settings.max_adapter_bytes,
        max_rank=settings.max_rank,
        lease_ttl_s=settings.lease_ttl_s,
        refresh_s=settings.refresh_s / 2,
    )


def source_config(source: Source) -> SourceConfig:
    """The source as the store opens it."""
    if isinstance(source, FileSource):
        return SourceConfig(uri=Path(source.path).as_uri(), name=source.name)
    return SourceConfig(
        uri=f"s3://{source.bucket}/{source.prefix}",
        name=source.name,
        endpoint_url=source.endpoint_url,
        region=source.region,
        addressing_style=source.addressing_style,
    )


def connect(settings: AdapterSettings) -> Any:
    """A handle of the store's actor, which lives in Ray namespace `settings.namespace`. Blocks for a moment."""
    sources = tuple(source_config(source) for source in settings.sources)
    return get_or_create_store(sources, store_config(settings), namespace=settings.namespace, name=settings.store_name)
