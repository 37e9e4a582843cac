"""From a description to an open source. The S3 client is imported when one is opened."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from adapter_store.errors import StoreConfigInvalid
from adapter_store.sources.base import Source, SourceConfig
from adapter_store.sources.local import LocalSource


def open_source(config: SourceConfig, niceness: int = 0) -> Source:
    """Opens the source that `config` describes; its threads get `niceness`. Nothing is asked of it yet.

    Raises: StoreConfigInvalid for a uri that is neither `file://` nor `s3://`.
    """
    parts = urlsplit(config.uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return LocalSource(unquote(parts.path), config.label, niceness)
    if parts.scheme == "s3" and parts.netloc:
        from adapter_store.sources.s3 import S3Source  # boto3 is slow to import and not always wanted

        return S3Source(parts.netloc, parts.path.strip("/"), config, niceness)
    raise StoreConfigInvalid("sources", f"{config.uri!r} is neither file:///folder nor s3://bucket/prefix")
