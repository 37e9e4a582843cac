"""A hub of model repositories and the CDN it redirects to, as far as reading adapters goes.

Answers are made after what huggingface_hub's client reads of the hub's REST API; no real hub was asked:
`/api/models/<repo>/revision/<revision>?blobs=true`, `/<repo>/resolve/<commit>/<file>`, and the `X-Error-Code` headers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from urllib.parse import unquote

from tests.support.web_server import Answer, Ask, Site, WebServer, web_server

TOKEN = "hf_right"


@dataclass
class FakeHub:
    """Commits by repository, the last one is `main`. A gated repository wants a token whose account was let in."""

    commits: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    busy: bool = False
    hub: WebServer = field(default_factory=lambda: WebServer(""))
    cdn: WebServer = field(default_factory=lambda: WebServer(""))

    def push(self, repo: str, files: dict[str, bytes]) -> str:
        """A new commit; returns its name."""
        self.commits.setdefault(repo, []).append(files)
        return self._commit(repo, len(self.commits[repo]) - 1)

    def _commit(self, repo: str, index: int) -> str:
        return sha1(f"{repo} {index}".encode()).hexdigest()

    def _files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        for index, files in enumerate(self.commits[repo]):
            commit = self._commit(repo, index)
            if revision == commit or (revision == "main" and index == len(self.commits[repo]) - 1):
                return commit, files
        return None

    def __call__(self, ask: Ask) -> Answer:
        authorization = ask.headers.get("authorization")
        if self.busy:
            return Answer(429)
        if authorization not in (None, f"Bearer {TOKEN}"):
            return Answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        is_api = ask.path.startswith("/api/models/")
        repo, _, rest = (
            ask.path.removeprefix("/api/models/").lstrip("/").partition("/revision/" if is_api else "/resolve/")
        )
        if repo not in self.commits:
            if authorization is None:
                return Answer(401, {"X-Error-Message": "Invalid username or password."})
            return Answer(404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        if repo in self.gated:
            return Answer(401 if authorization is None else 403, {"X-Error-Code": "GatedRepo"})
        revision, _, file = (rest, "", "") if is_api else rest.partition("/")
        found = self._files(repo, unquote(revision))
        if found is None:
            return Answer(404, {"X-Error-Code": "RevisionNotFound"})
        return self._describe(repo, *found, ask) if is_api else self._resolve(repo, *found, file, ask)

    def _describe(self, repo: str, commit: str, files: dict[str, bytes], ask: Ask) -> Answer:
        siblings = []
        for name, body in files.items():
            entry = {"rfilename": name}
            if "blobs=true" in ask.query:
                entry |= {"size": len(body), "blobId": sha1(body).hexdigest()}
                if name.endswith(".safetensors"):
                    entry["lfs"] = {"sha256": sha256(body).hexdigest(), "size": len(body), "pointerSize": 130}
            siblings.append(entry)
        return Answer(200, {}, json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())

    def _resolve(self, repo: str, commit: str, files: dict[str, bytes], name: str, ask: Ask) -> Answer:
        if name not in files:
            return Answer(404, {"X-Error-Code": "EntryNotFound"})
        if name.endswith(".safetensors"):
            location = f"{self.cdn.address}/blobs/{sha256(files[name]).hexdigest()}?signature=s"
            return Answer(302, {"Location": location, "X-Repo-Commit": commit})
        return Site({ask.path: files[name]}, modified=None)(ask)

    def serve_blob(self, ask: Ask) -> Answer:
        """The CDN: refuses whoever brings two kinds of credentials, as signed URLs do."""
        if "authorization" in ask.headers:
            return Answer(400)
        blobs = {
            f"/blobs/{sha256(body).hexdigest()}": body
            for commits in self.commits.values()
            for files in commits
            for body in files.values()
        }
        return Site(blobs)(ask)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """A hub and its CDN on two ports of 127.0.0.1."""
    made = FakeHub()
    with web_server(made) as hub, web_server(made.serve_blob) as cdn:
        made.hub, made.cdn = hub, cdn
        yield made
