"""From a description to an open source. The clients of buckets and servers are imported when one is opened.

The configured sources are all that is ever asked: nothing in a request or a registration adds a place to them.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from adapter_store.errors import StoreConfigInvalid
from adapter_store.sources.base import Source, SourceConfig
from adapter_store.sources.local import LocalSource

_TOKEN = re.compile(r"[!-~]+")  # else the client would show it in an error about its header
_ALL = ("uri", "name", "secrets_env")
_WEB = (
    *_ALL,
    "connect_timeout_s",
    "read_timeout_s",
    "max_attempts",
    "max_connections",
    "verify_tls",
    "token",
    "redirect_hosts",
)
_S3 = (
    "endpoint_url", "region", "addressing_style", "access_key_id", "secret_access_key", "session_token",
    "connect_timeout_s", "read_timeout_s", "max_attempts", "max_connections", "request_checksums", "response_checksums",
    "requester_pays", "verify_tls",
)  # fmt: skip
# What each kind of source heeds; another field that is set was meant for something, and is refused.
_HEEDED: dict[str, tuple[str, ...]] = {
    "file": _ALL,
    "s3": (*_ALL, *_S3),
    "http": _WEB,
    "https": _WEB,
    "hub": (*_WEB, "endpoint_url", "revision", "repos"),
}


def open_source(config: SourceConfig, niceness: int = 0) -> Source:
    """Opens the source that `config` describes; its threads get `niceness`. Nothing is asked of it yet.

    Raises: StoreConfigInvalid for a uri that is none of the forms in `SourceConfig`, for a field that its kind of
    source does not heed, and for values that can never work.
    """
    parts = urlsplit(config.uri)
    _check_fields(config, parts.scheme)
    _check_values(config)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return LocalSource(unquote(parts.path), config.label, niceness)
    if parts.scheme == "s3" and parts.netloc:
        from adapter_store.sources.s3 import S3Source  # boto3 is slow to import and not always wanted

        return S3Source(parts.netloc, parts.path.strip("/"), config, niceness)
    if parts.scheme in ("http", "https") and _is_host(parts):
        from adapter_store.sources.http import HttpSource

        return HttpSource(config, niceness)
    if parts.scheme == "hub" and _is_host(parts) and parts.path in ("", "/"):
        from adapter_store.sources.hub import HubSource

        return HubSource(config.endpoint_url or f"https://{parts.netloc}", config, niceness)
    raise StoreConfigInvalid(
        "sources",
        f"{config.uri!r} is neither file:///folder, s3://bucket/prefix, https://host/prefix nor hub://host "
        "(no user, password or query in it)",
    )


def _check_fields(config: SourceConfig, scheme: str) -> None:
    heeded = _HEEDED.get(scheme)
    if heeded is None:
        return  # told with the forms a uri may have
    for field in fields(config):
        if field.name not in heeded and getattr(config, field.name) != field.default:
            raise StoreConfigInvalid(
                field.name, f"a source at {config.uri!r} does not heed it; leave it out (heeded: {', '.join(heeded)})"
            )


def _check_values(config: SourceConfig) -> None:
    if isinstance(config.verify_tls, str) and not Path(config.verify_tls).is_file():
        raise StoreConfigInvalid("verify_tls", f"{config.verify_tls!r} is no file; name a bundle of certificates")
    if config.endpoint_url is not None:
        endpoint = urlsplit(config.endpoint_url)
        if endpoint.scheme not in ("http", "https") or not _is_host(endpoint):
            raise StoreConfigInvalid("endpoint_url", f"{config.endpoint_url!r} is no http:// or https:// address")
    if config.token is not None and not _TOKEN.fullmatch(config.token):
        raise StoreConfigInvalid("token", "it has characters that no token has; is there a line end behind it?")


def _is_host(parts: SplitResult) -> bool:
    return bool(parts.hostname) and "@" not in parts.netloc and not parts.query and not parts.fragment
