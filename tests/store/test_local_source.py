"""A folder as a source: only what is inside it, and a version for each content."""

import os

import pytest

from adapter_store.errors import AdapterNameInvalid, SourceUnavailable
from adapter_store.sources.base import SourceChanged, distrust
from adapter_store.sources.local import LocalSource
from tests.support.fake_sources import small_adapter
from tests.support.source_calls import all_names, look_while_reads_wait, read_files, run


def upload(folder, files=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (files or small_adapter()).items():
        (folder / name).write_bytes(content)


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

    assert run(source, *(lambda n=n: all_names(source, n) for n in (1, 2, 3, 100))) == [names] * 4


def rewrite_unnoticed(path):
    """Same size, same inode, the old time put back."""
    before = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_rewritten_behind_an_unchanged_time_is_served_once_somebody_noticed(root):
    """Only its content tells, and whoever reads it looks at that."""
    source = LocalSource(root)
    path = root / "a" / "adapter_model.safetensors"

    async def main():
        listing = await source.stat("a")
        rewrite_unnoticed(path)
        assert await source.stat("a") == listing  # remembered, and wrong
        distrust(source, "a")
        assert (await source.stat("a")).etags != listing.etags

    run(source, main)


def test_a_read_whose_content_is_not_the_listed_one_is_noticed(root):
    source = LocalSource(root)
    path = root / "a" / "adapter_model.safetensors"

    async def main():
        listing = await source.stat("a")
        rewrite_unnoticed(path)
        with pytest.raises(SourceChanged):
            await read_files(source, "a", listing)
        assert (await source.stat("a")).etags != listing.etags

    run(source, main)


def test_a_lookup_waits_for_no_read(root):
    source = LocalSource(root)
    (listing,) = run(source, lambda: look_while_reads_wait(source, "a", 40))
    assert listing is not None


def test_the_digests_that_are_remembered_are_bounded(root, monkeypatch):
    monkeypatch.setattr("adapter_store.sources.local.MAX_DIGESTS", 10)
    for number in range(20):
        upload(root / f"n{number}", {"adapter_config.json": b"%d" % number})
    source = LocalSource(root)
    seen = run(source, *(lambda n=n: source.stat(f"n{n}") for n in [*range(20), *range(20)]))
    assert len(source._digests) <= 10
    assert seen[:20] == seen[20:]


def test_of_the_digests_those_that_are_used_stay(root, monkeypatch):
    """Whoever is asked for all the time is not hashed anew because many others came by once."""
    monkeypatch.setattr("adapter_store.sources.local.MAX_DIGESTS", 10)
    for number in range(40):
        upload(root / f"n{number}", {"adapter_config.json": b"%d" % number})
    source = LocalSource(root)
    used = root / "n0" / "adapter_config.json"

    async def look():
        for number in range(1, 40):
            await source.stat("n0")
            assert used in source._digests
            first = source._digests[used][1]
            await source.stat(f"n{number}")
            assert source._digests.get(used, (None, None))[1] is first, (
                f"it was forgotten, or hashed again, at {number}"
            )

    run(source, look)
