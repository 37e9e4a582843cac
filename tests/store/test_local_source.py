"""A folder as a source: only what is inside it, and a version for each content."""

import asyncio
import os

import pytest

from adapter_store.errors import AdapterNameInvalid, SourceUnavailable, StoreConfigInvalid
from adapter_store.sources.base import SourceChanged, SourceConfig
from adapter_store.sources.local import LocalSource
from adapter_store.sources.opening import open_source
from tests.support.fake_sources import small_adapter
from tests.support.read_files import read_files


def upload(folder, files=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files or small_adapter()).items():
        (folder / name).write_bytes(content)


def run(source, *calls):
    """Awaits the calls one after the other and returns their results."""

    async def main():
        try:
            return [await call() for call in calls]
        finally:
            await source.close()

    return asyncio.run(main())


@pytest.fixture
def root(tmp_path):
    folder = tmp_path / "adapters"
    upload(folder / "a")
    return folder


def test_an_adapter_is_the_files_in_its_folder(root):
    (root / "a" / "README.md").write_text("not an adapter's file")
    source = LocalSource(root)
    (files,) = run(source, lambda: fetched(source, "a"))
    assert files == small_adapter()


async def fetched(source, name):
    return await read_files(source, name, await source.stat(name))


def test_what_is_not_there_is_not_there(root):
    (root / "empty").mkdir()
    (root / "file").write_text("")
    source = LocalSource(root)
    assert run(source, *(lambda n=n: source.stat(n) for n in ("b", "empty", "file", "a/x"))) == [None] * 4


def test_an_etag_follows_the_content_and_not_the_time(root):
    source = LocalSource(root)
    path = root / "a" / "adapter_config.json"
    content = path.read_bytes()

    async def main():
        first = await source.stat("a")
        os.utime(path, ns=(1, 1))
        touched = await source.stat("a")
        path.write_bytes(content + b" ")
        os.utime(path, ns=(1, 1))  # the same time: the size tells
        grown = await source.stat("a")
        path.write_bytes(content)
        return first, touched, grown, await source.stat("a")

    first, touched, grown, back = run(source, main)[0]
    assert first.etags == touched.etags == back.etags != grown.etags


def test_a_file_that_changes_after_it_was_listed_is_not_handed_out(root):
    source = LocalSource(root)

    async def main(change):
        listing = await source.stat("a")
        change()
        with pytest.raises(SourceChanged):
            await read_files(source, "a", listing)

    weights = root / "a" / "adapter_model.safetensors"
    run(
        source,
        lambda: main(lambda: weights.write_bytes(weights.read_bytes()[::-1])),
        lambda: main(lambda: weights.write_bytes(weights.read_bytes() + b"x")),
        lambda: main(weights.unlink),
    )


def test_no_name_and_no_link_leads_out_of_the_root(root, tmp_path):
    upload(tmp_path / "secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "half").mkdir()
    (root / "half" / "adapter_config.json").symlink_to(tmp_path / "secret" / "adapter_config.json")
    (root / "inside").symlink_to(root / "a")
    source = LocalSource(root)

    async def traversal():
        with pytest.raises(AdapterNameInvalid):
            await source.stat("../secret")

    link, half, inside, _ = run(
        source, lambda: source.stat("link"), lambda: source.stat("half"), lambda: source.stat("inside"), traversal
    )
    assert link is None
    assert half is None
    assert inside is not None


def test_a_root_that_is_away_is_unavailable_and_not_empty(tmp_path):
    source = LocalSource(tmp_path / "unmounted")

    async def main(call):
        with pytest.raises(SourceUnavailable, match="not a folder"):
            await call()

    run(source, lambda: main(lambda: source.stat("a")), lambda: main(lambda: source.list(None, 10)))


def test_a_listing_pages_through_nested_names_without_gap_or_repetition(root):
    names = sorted(["a", "a/sub", "b", "team/x", "team/x.y", "team/x/1", "team/x/10", "z"], key=lambda n: n.split("/"))
    for name in names:
        upload(root / name)
    (root / ".hidden").mkdir()
    upload(root / ".hidden" / "x")
    (root / "loop").symlink_to(root)
    source = LocalSource(root)

    async def main(limit):
        seen, cursor = [], None
        while True:
            page = await source.list(cursor, limit)
            assert len(page.names) <= limit
            seen += page.names
            cursor = page.next_cursor
            if cursor is None:
                return seen

    assert run(source, *(lambda n=n: main(n) for n in (1, 2, 3, 100))) == [names] * 4


def test_a_source_is_opened_by_its_uri(root):
    source = open_source(SourceConfig(uri=root.as_uri()))
    assert run(source, lambda: source.stat("a"))[0] is not None
    assert source.name == root.as_uri()
    for uri in ("ftp://x/y", "s3://", "file://other-host/x", "/plain/path"):
        with pytest.raises(StoreConfigInvalid, match="neither"):
            open_source(SourceConfig(uri=uri))


def test_secrets_do_not_show_when_a_source_is_printed():
    config = SourceConfig(uri="s3://b", access_key_id="key", secret_access_key="hidden", session_token="hidden")
    assert "hidden" not in repr(config)
