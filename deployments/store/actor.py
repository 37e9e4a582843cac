"""From settings to the adapter store's actor: found, or created if nobody has."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray import serve
from ray.serve.exceptions import RayServeException

from adapter_store.actor import get_or_create_store
from adapter_store.names.sealing import from_environment
from adapter_store.records import StoreConfig
from adapter_store.sources.base import SourceConfig
from deployments.settings.app import GIB, AdapterSettings
from deployments.settings.sources import FileSource, HttpSource, S3Source, Source


def store_config(settings: AdapterSettings, shard: int = 0) -> StoreConfig:
    """The store's settings, or a shard's, which has its part of all budgets.

    It looks at its sources within half of `refresh_s`; replicas ask it in the other half.
    """
    shards, rate = settings.shards, settings.fetch_bytes_per_s
    return StoreConfig(
        shard=shard,
        num_shards=shards,
        host_bytes=settings.host_bytes_in(16 * GIB) // shards,
        max_adapter_bytes=settings.max_adapter_bytes,
        max_rank=settings.max_rank,
        lease_ttl_s=settings.lease_ttl_s,
        refresh_s=settings.refresh_s / 2,
        max_parallel_fetches=settings.parallel_fetches,
        fetch_bytes_per_s=None if rate is None else max(1, rate // shards),
        niceness=settings.niceness,
        disk_path=settings.disk_path,
        disk_bytes=max(1, settings.disk_bytes // shards),
        traffic_half_life_s=settings.traffic_half_life_s,
        url_key_env=settings.url_key_env,
    )


def source_config(source: Source, environment: Mapping[str, str] = os.environ) -> SourceConfig:
    """The source as the store opens it, with its secrets.

    Raises: ValueError naming a variable that should hold one and does not.
    """

    def secret(setting: str) -> str | None:
        variable = getattr(source, setting)
        if variable is None:
            return None
        if not environment.get(variable):
            raise ValueError(
                f"source {source.name!r}: {setting} names {variable!r}, but that environment variable is not set here; "
                "set it on every node, or leave the setting out"
            )
        return environment[variable]

    settings = ("token_env", "access_key_id_env", "secret_access_key_env", "session_token_env")
    named = ((setting.removesuffix("_env"), getattr(source, setting, None)) for setting in settings)
    secrets_env = tuple((secret, variable) for secret, variable in named if variable is not None)
    if isinstance(source, FileSource):
        return SourceConfig(uri=Path(source.path).as_uri(), name=source.name)
    if isinstance(source, HttpSource):
        token = secret("token_env")
        return SourceConfig(
            uri=source.base_url,
            name=source.name,
            token=token,
            verify_tls=source.verify_tls,
            redirect_hosts=source.redirect_hosts,
            secrets_env=secrets_env,
        )
    if isinstance(source, S3Source):
        return SourceConfig(
            uri=f"s3://{source.bucket}/{source.prefix}",
            name=source.name,
            endpoint_url=source.endpoint_url,
            region=source.region,
            addressing_style=source.addressing_style,
            request_checksums=source.request_checksums,
            response_checksums=source.response_checksums,
            requester_pays=source.requester_pays,
            verify_tls=source.verify_tls,
            access_key_id=secret("access_key_id_env"),
            secret_access_key=secret("secret_access_key_env"),
            session_token=secret("session_token_env"),
            secrets_env=secrets_env,
        )
    return SourceConfig(
        uri=f"hub://{urlsplit(source.endpoint).netloc}",
        name=source.name,
        endpoint_url=source.endpoint,
        token=secret("token_env"),
        verify_tls=source.verify_tls,
        revision=source.revision,
        repos=source.repos,
        redirect_hosts=source.redirect_hosts,
        secrets_env=secrets_env,
    )


def connectors(settings: AdapterSettings, base: str = "", app: str | None = None) -> tuple[Callable[[], Any], ...]:
    """Each gives a handle of one of the store's actors, the leading shard's first: they live in Ray namespace
    `settings.namespace`. Blocks for a moment.

    `base` is the base model that is served, `app` the application. The first handle makes its store that of the
    application; later ones follow the application, which may have been replaced meanwhile.
    Secrets are read now, so that a missing one is told at start. Raises: ValueError; StoreConfigInvalid.
    """
    sources = tuple(source_config(source) for source in settings.sources)
    from_environment(settings.url_key_env, os.environ)
    shards = [store_config(settings, shard) for shard in range(settings.shards)]
    return tuple(_connector(settings, sources, config, base, app) for config in shards)


def _connector(
    settings: AdapterSettings, sources: tuple[SourceConfig, ...], config: StoreConfig, base: str, app: str | None
) -> Callable[[], Any]:
    is_first = True

    def connect() -> Any:
        nonlocal is_first
        handle = get_or_create_store(
            sources,
            config,
            namespace=settings.namespace,
            name=settings.store_name,
            base=base,
            app=app,
            takes_over=is_first,
        )
        is_first = False
        return handle

    return connect


def current_app() -> str | None:
    """The Serve application that this process works for; None outside of Serve."""
    try:
        return str(serve.get_replica_context().app_name)
    except RayServeException:
        return None
