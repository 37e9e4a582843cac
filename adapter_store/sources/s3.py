"""Adapters in a bucket: `s3://bucket/prefix/<adapter name>/adapter_config.json`, any S3-compatible server.

boto3 is synchronous, so each call runs in this source's own threads. Its transfer manager is not used (a range into a
buffer needs none), so `preferred_transfer_client`, which could make that one drop a custom endpoint, does not apply.
"""

from __future__ import annotations

from typing import Any, NoReturn

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, FlexibleChecksumError, IncompleteReadError
from urllib3.exceptions import HTTPError

from adapter_store.errors import AdapterNameInvalid, SourceUnavailable
from adapter_store.image.inspect import CONFIG_FILE, KNOWN_FILES, WEIGHTS_FILE
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
from adapter_store.sources.ranges import WrongRange, digest_or_none, num_bytes_to_skip, range_header
from adapter_store.sources.threads import MAX_LOOKUPS, SourceThreads

DEFAULT_REGION = "us-east-1"  # without any region boto3 fails before it asks, which looks like a missing adapter
_PAGE_KEYS = 1000
_PAGES_PER_CALL = 20  # bounds one `list` call over a bucket with few adapters and many other objects
_READ_CHUNK_BYTES = 1 << 20
_CHECKSUM_REMEDY = "if the server sends wrong ones, set response_checksums to when_required"
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
    """One prefix of one bucket. A version is the ETags of its objects.

    A bucket is never listed but by `list`, a page at a time: opening asks nothing, a lookup a fixed number of requests.
    """

    kind: SourceKind = "s3"

    def __init__(self, bucket: str, prefix: str, config: SourceConfig, niceness: int = 0) -> None:
        self.name = config.label
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._common = {"Bucket": bucket} | ({"RequestPayer": "requester"} if config.requester_pays else {})
        self._client = _client(config)
        self._threads = SourceThreads(config.max_connections, "adapters-s3", niceness)

    async def stat(self, name: str) -> SourceListing | None:
        """See `Source.stat`. One request for exactly `<prefix>/<name>/`: `x/1` never sees `x/10`.

        Where that folder holds more than fits into one answer, one more for each file that matters.
        """
        return await self._threads.look(self._stat, name)

    async def list(self, cursor: str | None, limit: int) -> SourcePage:
        """See `Source.list`. The cursor is the last key that was looked at."""
        return await self._threads.look(self._list, cursor, limit)

    async def read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        """See `Source.read`. Asks for the range, and only if the file's ETag is the listed one.

        `part.sha256` is what the object's metadata says under `sha256`.
        """
        await self._threads.read(self._read, name, file, part)

    async def close(self) -> None:
        """See `Source.close`."""
        self._threads.close()
        self._client.close()

    def _stat(self, name: str) -> SourceListing | None:
        folder = f"{self._prefix}{check_name(name)}/"
        wanted = {folder + file: file for file in KNOWN_FILES}
        page = self._page(Prefix=folder, Delimiter="/")
        entries = page.get("Contents", [])
        if page.get("IsTruncated"):  # beside its files lie a thousand others, or adapters below it
            # A key is the first of those that begin with it.
            entries = [entry for key in wanted for entry in self._page(Prefix=key, MaxKeys=1).get("Contents", ())]
        files = {
            entry["Key"]: SourceFile(
                name=wanted[entry["Key"]], etag=_quoted(entry["ETag"]), num_bytes=int(entry["Size"])
            )
            for entry in entries
            if entry["Key"] in wanted
        }
        if not {file.name for file in files.values()} & {CONFIG_FILE, WEIGHTS_FILE}:
            return None
        return SourceListing(files=tuple(sorted(files.values(), key=lambda file: file.name)))

    def _read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        if not part.num_missing:
            return
        key = f"{self._prefix}{check_name(name)}/{file.name}"
        try:
            answer = self._client.get_object(**self._common, Key=key, IfMatch=file.etag, Range=range_header(part))
            body = answer["Body"]
            try:
                self._receive(key, file, part, answer)
            finally:
                body.close()  # of a body that was not read to its end this closes the connection
        except ClientError as error:
            if _status(error) in (404, 412, 416):
                raise SourceChanged(key) from error
            self._refuse(error)
        except FlexibleChecksumError as error:
            # What has been received is wrong, somewhere: no place to go on from.
            raise SourceChanged(f"{key}: {error}; {_CHECKSUM_REMEDY}") from error
        except WrongRange as error:
            raise SourceUnavailable(self.name, str(error)) from error
        except IncompleteReadError:
            pass  # told below
        except (BotoCoreError, HTTPError, OSError) as error:
            self._refuse(error)
        if part.num_missing:
            raise SourceUnavailable(
                self.name, f"{key!r} ended after {part.num_received} of {part.end - part.start} bytes"
            )

    def _receive(self, key: str, file: SourceFile, part: RangeRead, answer: dict[str, Any]) -> None:
        if _quoted(answer.get("ETag", "")) != file.etag:  # some servers ignore If-Match
            raise SourceChanged(key)
        skip = num_bytes_to_skip(file, part, answer.get("ContentRange"), answer.get("ContentLength"))
        metadata = {field.lower(): value for field, value in answer.get("Metadata", {}).items()}  # rclone: Sha256
        part.sha256 = digest_or_none(metadata.get("sha256"))
        body = answer["Body"]  # read itself, not its raw stream: it checks the server's checksum, if asked to
        while skip and (chunk := body.read(min(skip, _READ_CHUNK_BYTES))):
            skip -= len(chunk)
        while part.num_missing and (chunk := body.read(min(part.num_missing, _READ_CHUNK_BYTES))):
            part.write(chunk)
        if answer.get("ContentRange") is not None and not part.num_missing:
            body.read(1)  # meets the end: gives the connection back, and compares the checksum

    def _list(self, cursor: str | None, limit: int) -> SourcePage:
        names: list[str] = []
        last = cursor
        for _ in range(_PAGES_PER_CALL):
            after = {"StartAfter": last} if last else {}
            page = self._page(Prefix=self._prefix, MaxKeys=_PAGE_KEYS, **after)
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

    def _page(self, **arguments: Any) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = self._client.list_objects_v2(**self._common, **arguments)
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
        verify=None if config.verify_tls is True else config.verify_tls,  # None: boto3's own bundle, or AWS_CA_BUNDLE
        config=Config(
            connect_timeout=config.connect_timeout_s,
            read_timeout=config.read_timeout_s,
            # Few: boto3 never retries a body, so whoever reads has to anyway, and its tries multiply with these.
            retries={"mode": "standard", "total_max_attempts": config.max_attempts},
            max_pool_connections=config.max_connections + MAX_LOOKUPS,
            s3={"addressing_style": config.addressing_style},
            signature_version="s3v4",
            # Servers that are not AWS often lack the newer checksums, or answer a range with the whole object's.
            request_checksum_calculation=config.request_checksums,
            response_checksum_validation=config.response_checksums,
        ),
    )


def _quoted(etag: str) -> str:
    """rclone lists ETags without the quotes that it sends with the object."""
    return etag if etag.startswith('"') else f'"{etag}"'


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
