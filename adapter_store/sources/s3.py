"""Adapters in a bucket: `s3://bucket/prefix/<adapter name>/adapter_config.json`, any S3-compatible server.

boto3 is synchronous, so each call runs in this source's own threads.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from adapter_store.errors import AdapterNameInvalid, SourceUnavailable
from adapter_store.inspect import CONFIG_FILE, KNOWN_FILES, WEIGHTS_FILE
from adapter_store.records import check_name
from adapter_store.sources.base import (
    RangeRead,
    SourceChanged,
    SourceConfig,
    SourceFile,
    SourceKind,
    SourceListing,
    SourcePage,
)

DEFAULT_REGION = "us-east-1"  # without any region boto3 fails before it asks, which looks like a missing adapter
_PAGE_KEYS = 1000
_PAGES_PER_CALL = 20  # bounds one `list` call over a bucket with few adapters and many other objects
_READ_CHUNK_BYTES = 1 << 20
_REMEDIES = {
    "NoSuchBucket": "the bucket does not exist",
    "AccessDenied": "access is denied; check the credentials and the bucket's policy",
    "403": "access is denied; check the credentials and the bucket's policy",
    "InvalidAccessKeyId": "the access key is unknown",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the session token has expired",
    "PermanentRedirect": "the bucket is in another region; set region",
    "AuthorizationHeaderMalformed": "the bucket is in another region; set region",
}


class S3Source:
    """One prefix of one bucket."""

    kind: SourceKind = "s3"

    def __init__(self, bucket: str, prefix: str, config: SourceConfig) -> None:
        self.name = config.label
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._client = _client(config)
        self._pool = ThreadPoolExecutor(max_workers=config.max_connections, thread_name_prefix="adapters-s3")

    async def stat(self, name: str) -> SourceListing | None:
        """See `Source.stat`. One listing of exactly `<prefix>/<name>/`: `x/1` never sees `x/10`."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._stat, name)

    async def list(self, cursor: str | None, limit: int) -> SourcePage:
        """See `Source.list`. The cursor is the last key that was looked at."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._list, cursor, limit)

    async def read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        """See `Source.read`. Asks for the range, and only if the file's ETag is the listed one."""
        await asyncio.get_running_loop().run_in_executor(self._pool, self._read, name, file, part)

    async def close(self) -> None:
        """See `Source.close`."""
        self._pool.shutdown(wait=False)
        self._client.close()

    def _stat(self, name: str) -> SourceListing | None:
        folder = f"{self._prefix}{check_name(name)}/"
        wanted = {folder + file: file for file in KNOWN_FILES}
        files: list[SourceFile] = []
        token: dict[str, str] = {}
        while True:
            page = self._call("list_objects_v2", Bucket=self._bucket, Prefix=folder, Delimiter="/", **token)
            for entry in page.get("Contents", ()):
                if entry["Key"] in wanted:
                    files.append(
                        SourceFile(name=wanted[entry["Key"]], etag=entry["ETag"], num_bytes=int(entry["Size"]))
                    )
            if not page.get("IsTruncated"):
                break
            token = {"ContinuationToken": page["NextContinuationToken"]}
        if not {file.name for file in files} & {CONFIG_FILE, WEIGHTS_FILE}:
            return None
        return SourceListing(files=tuple(sorted(files, key=lambda file: file.name)))

    def _read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        if not part.num_missing:
            return
        key = f"{self._prefix}{check_name(name)}/{file.name}"
        first = part.start + part.num_received
        try:
            answer = self._client.get_object(
                Bucket=self._bucket, Key=key, IfMatch=file.etag, Range=f"bytes={first}-{part.end - 1}"
            )
            with answer["Body"] as body:
                # Some servers ignore If-Match; the ETag they send with the body is checked too.
                if answer.get("ETag") != file.etag or answer.get("ContentLength") != part.num_missing:
                    raise SourceChanged(key)
                while chunk := body.read(_READ_CHUNK_BYTES):
                    part.write(chunk)
        except ClientError as error:
            if _status(error) in (404, 412, 416):
                raise SourceChanged(key) from error
            self._refuse(error)
        except (BotoCoreError, HTTPError, OSError) as error:
            self._refuse(error)
        if part.num_missing:
            raise SourceUnavailable(
                self.name, f"{key!r} ended after {part.num_received} of {part.end - part.start} bytes"
            )

    def _list(self, cursor: str | None, limit: int) -> SourcePage:
        names: list[str] = []
        last = cursor
        for _ in range(_PAGES_PER_CALL):
            after = {"StartAfter": last} if last else {}
            page = self._call("list_objects_v2", Bucket=self._bucket, Prefix=self._prefix, MaxKeys=_PAGE_KEYS, **after)
            for entry in page.get("Contents", ()):
                last = str(entry["Key"])
                name = self._adapter_of(last)
                if name is not None:
                    names.append(name)
                    if len(names) == limit:
                        return SourcePage(names=tuple(names), next_cursor=last)
            if not page.get("IsTruncated"):
                return SourcePage(names=tuple(names), next_cursor=None)
        return SourcePage(names=tuple(names), next_cursor=last)

    def _adapter_of(self, key: str) -> str | None:
        if not key.endswith(f"/{CONFIG_FILE}"):
            return None
        try:
            return check_name(key[len(self._prefix) : -len(CONFIG_FILE) - 1])
        except AdapterNameInvalid:
            return None  # it could not be asked for

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(self._client, operation)(**arguments)
            return answer
        except (BotoCoreError, ClientError, HTTPError, OSError) as error:
            self._refuse(error)

    def _refuse(self, error: Exception) -> NoReturn:
        if isinstance(error, ClientError):
            code = str(error.response.get("Error", {}).get("Code", "unknown"))
            reason = f"{_REMEDIES.get(code, error.response.get('Error', {}).get('Message', 'no message'))} ({code})"
        else:
            reason = f"{type(error).__name__}: {error}"
        raise SourceUnavailable(self.name, reason) from error


def _client(config: SourceConfig) -> Any:
    session = boto3.session.Session(
        aws_access_key_id=config.access_key_id,
        aws_secret_access_key=config.secret_access_key,
        aws_session_token=config.session_token,
    )
    return session.client(
        "s3",
        endpoint_url=config.endpoint_url,
        region_name=config.region or session.region_name or DEFAULT_REGION,
        config=Config(
            connect_timeout=config.connect_timeout_s,
            read_timeout=config.read_timeout_s,
            retries={"mode": "standard", "total_max_attempts": config.max_attempts},
            max_pool_connections=config.max_connections,
            s3={"addressing_style": config.addressing_style},
            signature_version="s3v4",
            # Servers that are not AWS often lack the newer checksums; the safetensors layout, the sizes and the ETags
            # are checked here instead.
            request_checksum_calculation="when_required",
            response_checksum_validation=config.response_checksums,
        ),
    )


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
