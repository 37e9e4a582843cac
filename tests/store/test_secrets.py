"""Secrets are readable nowhere: not in files, names, representations, errors, logs, nor in what an actor is given."""

from __future__ import annotations

import asyncio
import json
import logging
import pickle
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from adapter_store.errors import StoreConfigInvalid
from adapter_store.names.catalog import NameKey
from adapter_store.names.index import FILE_NAME, Index, Known
from adapter_store.names.mirror import Mirror
from adapter_store.names.sealing import Sealer, from_environment, is_secret
from adapter_store.records import Registration
from adapter_store.sources.base import SourceConfig, SourceFile, SourceListing

CANARY = "canary-4f1d"
URLS = tuple(
    (file, f"https://files.example/{file}?X-Amz-Signature={CANARY}")
    for file in ("adapter_config.json", "adapter_model.safetensors")
)
ROW = Registration(name="signed", source="web", urls=URLS)
LISTING = SourceListing(
    files=tuple(SourceFile(name=file, etag="e", num_bytes=1, location=json.dumps(["web", "a", u])) for file, u in URLS)
)
SECRETS = ("secret_access_key", "session_token", "token")


def files_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


class Shelf:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    async def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    async def put(self, key: str, value: bytes) -> None:
        self.values[key] = value


async def _write(index: Index, shelf: Shelf) -> None:
    await index.register([ROW, Registration(name="plain", source="local", location="a")])
    await index.remember(NameKey("catalog", "signed"), Known("v", LISTING, {}, 0.0))
    mirror = Mirror(index, shelf)
    await mirror.begin()
    await mirror.changed(["signed", "plain"])
    assert not mirror.is_behind


@pytest.mark.parametrize("has_key", [False, True])
def test_signed_urls_are_in_no_file_and_work_as_long_as_they_are_known(has_key: bool, tmp_path: Path) -> None:
    sealer = Sealer(Fernet.generate_key().decode() if has_key else None)

    async def main() -> None:
        index, shelf = Index(tmp_path / FILE_NAME, sealer=sealer), Shelf()
        await _write(index, shelf)
        row = await index.registered("signed")
        assert row is not None
        assert row.urls == URLS
        assert CANARY.encode() not in files_of(tmp_path), "the log of the file is read, too"
        index.database.close()
        assert CANARY.encode() not in files_of(tmp_path)
        again = Index(tmp_path / FILE_NAME, sealer=sealer)
        row = await again.registered("signed")
        assert row is not None
        assert (row.urls, row.has_lost_urls) == ((URLS, False) if has_key else ((), True))
        assert (await again.known(NameKey("catalog", "signed")) is not None) is has_key
        again.database.close()
        elsewhere = Index(None, sealer=sealer)
        await Mirror(elsewhere, shelf).begin()
        row = await elsewhere.registered("signed")
        assert row is not None
        assert row.has_lost_urls is not has_key
        assert await elsewhere.num_registered() == 2
        elsewhere.database.close()

    asyncio.run(main())


def test_what_is_mirrored_holds_no_secret() -> None:
    import zlib

    async def main() -> None:
        shelf = Shelf()
        await _write(index := Index(None), shelf)
        values = [zlib.decompress(value) for key, value in shelf.values.items() if key != "number"]
        assert any(b"signed" in value for value in values)
        assert not any(CANARY.encode() in value for value in values)
        index.database.close()

    asyncio.run(main())


def test_urls_under_another_key_count_as_lost(tmp_path: Path) -> None:
    async def main() -> None:
        index = Index(tmp_path / FILE_NAME, sealer=Sealer(Fernet.generate_key().decode()))
        await index.register([ROW])
        index.database.close()
        other = Index(tmp_path / FILE_NAME, sealer=Sealer(Fernet.generate_key().decode()))
        row = await other.registered("signed")
        assert row is not None
        assert row.has_lost_urls
        other.database.close()

    asyncio.run(main())


def test_what_an_earlier_program_wrote_readable_is_so_no_longer(tmp_path: Path) -> None:
    async def main() -> None:
        index = Index(tmp_path / FILE_NAME)
        await index.register([ROW])
        index.database.close()
        raw = sqlite3.connect(tmp_path / FILE_NAME)
        raw.execute("UPDATE registered SET urls = ?", (json.dumps(URLS),))
        raw.commit()
        raw.close()
        assert CANARY.encode() in files_of(tmp_path)
        index = Index(tmp_path / FILE_NAME, sealer=Sealer(Fernet.generate_key().decode()))
        await index.reseal()
        row = await index.registered("signed")
        assert row is not None
        assert row.urls == URLS
        index.database.close()
        assert CANARY.encode() not in files_of(tmp_path)

    asyncio.run(main())


@pytest.mark.parametrize("secret", SECRETS)
def test_what_an_actor_is_given_names_a_secret_and_holds_none(secret: str) -> None:
    fields: dict[str, Any] = {secret: CANARY, "secrets_env": ((secret, "MY_VARIABLE"),)}
    source = SourceConfig(uri="s3://bucket", name="mine", **fields)
    shown = source.without_secrets()
    assert CANARY not in repr(source) + repr(shown)
    assert CANARY.encode() not in pickle.dumps(shown)
    assert getattr(shown.with_secrets({"MY_VARIABLE": CANARY}), secret) == CANARY
    with pytest.raises(StoreConfigInvalid, match="MY_VARIABLE"):
        shown.with_secrets({})


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_by_value_is_refused_without_being_shown(secret: str) -> None:
    fields: dict[str, Any] = {secret: CANARY}
    with pytest.raises(StoreConfigInvalid) as caught:
        SourceConfig(uri="s3://bucket", name="mine", **fields).without_secrets()
    assert CANARY not in str(caught.value)


def test_signed_urls_are_in_no_representation_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("test").info("%r %s %r", ROW, ROW, LISTING)
    assert CANARY not in caplog.text


def test_a_key_that_is_none_is_refused_without_being_shown() -> None:
    with pytest.raises(StoreConfigInvalid) as caught:
        from_environment("URL_KEY", {"URL_KEY": CANARY})
    assert CANARY not in str(caught.value)
    with pytest.raises(StoreConfigInvalid, match="URL_KEY"):
        from_environment("URL_KEY", {})


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("https://h/a?sig=x", True),
        ("https://user:pw@h/a", True),
        ("https://h/a", False),
        ("team/a", False),
        ("what?", False),
        ("", False),
    ],
)
def test_a_url_with_a_query_or_a_user_counts_as_secret(text: str, secret: bool) -> None:
    assert is_secret(text) is secret
