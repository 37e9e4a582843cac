"""What the store's actor is started with: the settings, and secrets that no setting, log or name shows."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from adapter_store import actor
from adapter_store.errors import StoreConfigInvalid
from adapter_store.records import StoreConfig
from adapter_store.sources.base import SourceConfig
from deployments.settings.app import AdapterSettings
from deployments.store.actor import connectors, source_config, store_config

SECRETS = {"KEY_ID": "AKIDEXAMPLE", "SECRET": "s3cr3t-value", "SESSION": "s3ssion-value", "TOKEN": "t0ken-value"}
SOURCES: list[dict[str, Any]] = [
    {
        "kind": "s3", "bucket": "mine", "prefix": "prod", "endpoint_url": "https://s3.local", "region": "eu-1",
        "addressing_style": "path", "request_checksums": "when_supported", "response_checksums": "when_supported",
        "requester_pays": True, "verify_tls": "/etc/ca.pem", "access_key_id_env": "KEY_ID",
        "secret_access_key_env": "SECRET", "session_token_env": "SESSION",
    },
    {"kind": "http", "base_url": "https://files.local/adapters", "verify_tls": False, "token_env": "TOKEN",
     "redirect_hosts": ["cdn.local"]},
    {"kind": "hub", "endpoint": "https://hub.local", "revision": "v2", "repos": ["me/*"], "token_env": "TOKEN",
     "redirect_hosts": ["*.hub.local"]},
    {"kind": "file", "path": "/adapters"},
]  # fmt: skip


def _settings(**fields: Any) -> AdapterSettings:
    return AdapterSettings.model_validate({"sources": SOURCES} | fields)


def test_every_source_reaches_the_store_as_it_was_set():
    s3, http, hub, folder = (source_config(source, SECRETS) for source in _settings().sources)
    assert (s3.uri, s3.name, s3.endpoint_url, s3.region) == ("s3://mine/prod", "s3", "https://s3.local", "eu-1")
    assert (s3.addressing_style, s3.request_checksums, s3.response_checksums) == ("path", *("when_supported",) * 2)
    assert (s3.requester_pays, s3.verify_tls) == (True, "/etc/ca.pem")
    assert (s3.access_key_id, s3.secret_access_key, s3.session_token) == (
        "AKIDEXAMPLE",
        "s3cr3t-value",
        "s3ssion-value",
    )
    assert (http.uri, http.name, http.token) == ("https://files.local/adapters", "http", "t0ken-value")
    assert (hub.uri, hub.endpoint_url, hub.token) == ("hub://hub.local", "https://hub.local", "t0ken-value")
    assert (hub.revision, hub.repos) == ("v2", ("me/*",))
    assert (http.redirect_hosts, hub.redirect_hosts) == (("cdn.local",), ("*.hub.local",))
    assert (http.verify_tls, hub.verify_tls) == (False, True)
    assert (folder.uri, folder.name) == ("file:///adapters", "local")


def test_credentials_that_are_not_named_are_left_to_the_usual_chain():
    (source,) = _settings(sources=[{"kind": "s3", "bucket": "mine"}]).sources
    config = source_config(source, SECRETS)
    assert (config.access_key_id, config.secret_access_key, config.session_token) == (None, None, None)


@pytest.mark.parametrize("missing", ["KEY_ID", "SECRET", "SESSION", "TOKEN"])
@pytest.mark.parametrize("value", [None, ""])
def test_a_missing_secret_is_named_at_start(missing: str, value: str | None, monkeypatch: pytest.MonkeyPatch):
    for name, secret in SECRETS.items():
        monkeypatch.setenv(name, secret)
    if value is None:
        monkeypatch.delenv(missing)
    else:
        monkeypatch.setenv(missing, value)
    with pytest.raises(ValueError, match=f"'{missing}'") as caught:
        connectors(_settings())
    assert not any(secret in str(caught.value) for secret in SECRETS.values())


def test_secrets_are_in_no_repr_and_no_log(caplog: pytest.LogCaptureFixture):
    settings = _settings()
    with caplog.at_level(logging.DEBUG):
        shown = repr([source_config(source, SECRETS) for source in settings.sources]) + repr(settings) + caplog.text
    for name in ("SECRET", "SESSION", "TOKEN"):
        assert SECRETS[name] not in shown


def test_the_tiers_of_the_store_are_as_they_were_set():
    fields: dict[str, Any] = {
        "host_bytes": 1000, "max_adapter_bytes": 100, "disk_path": "/cache", "disk_bytes": 2000, "niceness": 19,
        "fetch_bytes_per_s": 5, "parallel_fetches": 7, "traffic_half_life_s": 60.0, "max_rank": 8, "lease_ttl_s": 9.0,
    }  # fmt: skip
    config = store_config(_settings(**fields, refresh_s=4.0))
    assert config.max_parallel_fetches == fields.pop("parallel_fetches")
    assert {name: getattr(config, name) for name in fields} == fields
    assert config.refresh_s == 2.0


def test_a_store_that_could_hold_no_adapter_is_refused_at_start():
    with pytest.raises(StoreConfigInvalid):
        connectors(_settings(sources=[], host_bytes=10))


def test_a_secret_is_in_the_name_of_the_store_only_behind_a_slow_digest(monkeypatch: pytest.MonkeyPatch):
    """Whoever may list the actors of a cluster must not be able to try secrets by the billion."""
    hashed: list[bytes] = []
    slow: list[Any] = []
    real_sha256, real_slow = hashlib.sha256, hashlib.pbkdf2_hmac
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(data) or real_sha256(data))
    monkeypatch.setattr(hashlib, "pbkdf2_hmac", lambda *call: slow.append(call) or real_slow(*call))
    names = set()
    for secret in (
        {"secret_access_key": "hunter1"},
        {"session_token": "hunter1"},
        {"token": "hunter1"},
        {"token": "hunter2"},
    ):
        source = SourceConfig(uri="s3://bucket", name="s3", **secret)  # type: ignore[arg-type]
        names.add(actor.store_name((source,), StoreConfig()))
        assert actor.store_name((source,), StoreConfig()) in names
    assert len(names) == len(slow) == 4
    assert all(rounds >= 600_000 and b"hunter" not in salt for _, _, salt, rounds in slow)
    actor.store_name((SourceConfig(uri="s3://bucket", name="s3"),), StoreConfig())
    assert len(slow) == 4, "without secrets nobody waits"
    assert hashed
    assert all(b"hunter" not in data for data in hashed)


@pytest.mark.parametrize("is_broken", [False, True])
def test_a_store_that_leaves_answers_nobody_from_its_remains_and_always_goes(is_broken, tmp_path, monkeypatch):
    """A call that comes while it closes ends with the process, which sends the caller to the next store."""

    async def main():
        killed = asyncio.Event()
        monkeypatch.setattr(
            actor.ray, "get_runtime_context", lambda: SimpleNamespace(current_actor=None, get_node_id=lambda: "")
        )
        monkeypatch.setattr(actor.ray, "kill", lambda *_, **__: killed.set())
        leaving = actor.AdapterStoreActor((SourceConfig(uri=tmp_path.as_uri(), name="local"),), StoreConfig())
        await leaving.status()
        leaving._watch.cancel()
        close = leaving._store.close

        async def closing():
            await close()
            if is_broken:
                raise OSError("unforeseen")

        leaving._store.close = closing
        task = asyncio.create_task(leaving.leave())
        await asyncio.sleep(0)
        late = asyncio.create_task(leaving.resolve("a"))
        await task
        assert killed.is_set()
        assert not late.done()
        late.cancel()

    asyncio.run(main())
