"""Adapters in the repositories of a Hugging Face hub: the adapter `organisation/repository`, at a revision.

One REST call of the hub's own API, and its download URLs. `huggingface_hub` is not used for them: it reads its offline
switch from the environment when it is imported (HF_HUB_OFFLINE, often set where models must not be fetched) and then
refuses every endpoint, it has no reads of ranges, and it shares one client with everything else in the process.
"""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import quote

import httpx

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
from adapter_store.sources.ranges import digest_or_none
from adapter_store.sources.threads import SourceThreads
from adapter_store.sources.web import WebClient, shown

_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_BAD_TOKEN = "invalid credentials"


class HubSource:
    """One hub. A version is a commit: a name that says none means the configured revision, which may move.

    Only repositories that match `repos` are asked for; another is not there, and the hub never hears of it.
    """

    kind: SourceKind = "hub"

    def __init__(self, endpoint: str, config: SourceConfig, niceness: int = 0) -> None:
        self.name = config.label
        self._endpoint = endpoint.rstrip("/")
        self._config = config
        self._web = WebClient(self.name, self._endpoint, config)
        self._threads = SourceThreads(config.max_connections, "adapters-hub", niceness)

    async def stat(self, name: str) -> SourceListing | None:
        """See `Source.stat`. `name` is `organisation/repository` or `organisation/repository@revision`. One request."""
        return await self._threads.look(self._stat, name)

    async def list(self, cursor: str | None, limit: int) -> SourcePage:
        """The plain names in `repos`; without them an empty page: a hub has more than anybody could page through."""
        plain = sorted(repo for repo in self._config.repos or () if _is_repo(repo))
        names = [repo for repo in plain if cursor is None or repo > cursor][: limit + 1]
        page = tuple(names[:limit])
        return SourcePage(names=page, next_cursor=page[-1] if len(names) > limit else None)

    async def read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        """See `Source.read`. Reads at the listed commit, which never changes."""
        await self._threads.read(self._read, name, file, part)

    async def close(self) -> None:
        """See `Source.close`."""
        self._threads.close()
        self._web.close()

    def _stat(self, name: str) -> SourceListing | None:
        repo, _, revision = name.partition("@")
        check_name(repo)
        revision = revision if "@" in name else self._config.revision
        if not _REVISION.fullmatch(revision) or ".." in revision:
            raise AdapterNameInvalid(name, f"{revision!r} is no branch, tag or commit")
        if repo.count("/") != 1 or not self._may_ask(repo):
            return None
        url = httpx.URL(f"{self._endpoint}/api/models/{repo}/revision/{quote(revision, safe='')}?blobs=true")
        status, headers, body = self._web.reply(url, {})
        if status != 200:
            self._check_missing(url, status, headers, body)
            return None
        try:
            return _listing(repo, json.loads(body))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceUnavailable(
                self.name, f"{shown(url)} is no answer of a hub ({type(error).__name__}: {error}); check the endpoint"
            ) from error

    def _may_ask(self, repo: str) -> bool:
        allowed = self._config.repos
        return allowed is None or any(fnmatchcase(repo, pattern) for pattern in allowed)

    def _check_missing(self, url: httpx.URL, status: int, headers: httpx.Headers, body: bytes) -> None:
        """Raises: SourceUnavailable, unless the hub says that there is no such repository or revision."""
        code = headers.get("X-Error-Code", "")
        message = headers.get("X-Error-Message") or body[:200].decode(errors="replace")
        if code in ("RepoNotFound", "RevisionNotFound") or status == 404:
            return
        if code == "GatedRepo":
            remedy = "the repository is gated: let the token's account accept its conditions on the hub"
        elif status == 401 and _BAD_TOKEN in message.lower():
            remedy = "the hub does not know the token; make a new one"
        elif status == 401:
            return  # what a hub answers to strangers for what is not there, and for what is private
        elif status == 429:
            remedy = "too many requests; a token has a higher limit"
        else:
            remedy = "check token and revision" if status == 403 else "try again"
        raise SourceUnavailable(self.name, f"{shown(url)} answered {status} ({code or message}); {remedy}")

    def _read(self, name: str, file: SourceFile, part: RangeRead) -> None:
        url = httpx.URL(f"{self._endpoint}/{file.location}")

        def check(response: httpx.Response) -> None:
            if response.status_code in (401, 403):
                self._check_missing(url, response.status_code, response.headers, b"")
                raise SourceChanged(name)  # there it was, and is no more

        self._web.read(url, {}, file, part, check)


def _is_repo(name: str) -> bool:
    """Whether it can be asked for, which a pattern cannot."""
    try:
        return check_name(name).count("/") == 1
    except AdapterNameInvalid:
        return False


def _listing(repo: str, info: dict[str, Any]) -> SourceListing | None:
    """Of the hub's description of a repository: `sha` is the commit, `siblings` the files.

    The commit is part of every ETag, so that a version is one commit. Blobs stand beside it, for whoever reads logs.
    """
    commit = str(info["sha"])
    if not _COMMIT.fullmatch(commit):
        raise ValueError(f"{commit[:80]!r} is no commit")
    files = []
    for entry in info["siblings"]:
        if entry["rfilename"] not in KNOWN_FILES:
            continue
        lfs = entry.get("lfs") or {}
        files.append(
            SourceFile(
                name=entry["rfilename"],
                etag=f"{commit}/{lfs.get('sha256') or entry.get('blobId', '')}",
                num_bytes=int(lfs["size"] if "size" in lfs else entry["size"]),
                sha256=digest_or_none(lfs.get("sha256")),
                location=f"{repo}/resolve/{commit}/{entry['rfilename']}",
            )
        )
    if not {file.name for file in files} & {CONFIG_FILE, WEIGHTS_FILE}:
        return None
    return SourceListing(files=tuple(sorted(files, key=lambda file: file.name)))
