"""A bucket as a source, against S3 servers: exact names, consistent reads, and errors that say what is wrong.

moto runs by default; `-m ceph` and `-m rclone` (`make test-s3`) run the same against real servers.
"""

import asyncio
from contextlib import nullcontext

import moto.settings
import pytest
from urllib3.exceptions import InsecureRequestWarning

from adapter_store.records import StoreConfig
from adapter_store.sources.base import RangeRead, SourceChanged, SourceConfig
from adapter_store.sources.opening import open_source
from adapter_store.store import AdapterStore
from adapter_store.tiers.blobs import MemoryBlobs
from tests.support import s3_servers
from tests.support.ceph import ceph
from tests.support.certificates import self_signed
from tests.support.fake_sources import small_adapter, small_spec
from tests.support.source_calls import all_names, read_all, read_range, refused, run

SERVERS = [
    "moto-http",
    "moto-https",
    pytest.param("ceph-http", marks=pytest.mark.ceph),
    pytest.param("ceph-https", marks=pytest.mark.ceph),
    pytest.param("rclone-http", marks=pytest.mark.rclone),
]


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    return self_signed(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="session")
def ceph_servers(tmp_path_factory, certificate):
    with ceph(tmp_path_factory.mktemp("ceph"), certificate) as (http, https):
        yield {"http": http, "https": https}


@pytest.fixture(scope="module")
def moto_servers(certificate):
    with s3_servers.moto() as http, s3_servers.moto(certificate) as https:
        yield {"http": http, "https": https}


@pytest.fixture(params=SERVERS)
def server(request, tmp_path):
    kind, scheme = request.param.split("-")
    if kind == "rclone":  # a new one for each test: it starts at once, and many deletions in a row were seen to hang it
        with s3_servers.rclone(tmp_path / "buckets") as started:
            yield started
    else:
        yield request.getfixturevalue(f"{kind}_servers")[scheme]


@pytest.fixture
def client(server):
    made = server.client
    made.create_bucket(Bucket="adapters")
    yield made
    if server.kind != "rclone":
        for page in made.get_paginator("list_objects_v2").paginate(Bucket="adapters"):
            for entry in page.get("Contents", ()):
                made.delete_object(Bucket="adapters", Key=entry["Key"])
        made.delete_bucket(Bucket="adapters")


def config(server, uri="s3://adapters/team", **more):
    known = {
        "access_key_id": server.access_key,
        "secret_access_key": server.secret_key,
        "verify_tls": server.ca_bundle or True,
        "max_attempts": 1,
        "connect_timeout_s": 2.0,
        "addressing_style": "path",
    }
    return SourceConfig(uri=uri, endpoint_url=server.endpoint, **{**known, **more})


def upload(client, name, files=None, prefix="team/", **more):
    for file, content in (files or small_adapter()).items():
        client.put_object(Bucket="adapters", Key=f"{prefix}{name}/{file}", Body=content, **more)


def test_an_adapter_is_read_whole(server, client):
    upload(client, "a")
    source = open_source(config(server))

    async def main():
        listing = await source.stat("a")
        assert listing.names == ("adapter_config.json", "adapter_model.safetensors")
        return await read_all(source, "a", listing)

    assert run(source, main) == [small_adapter()]


def test_any_range_of_a_file_can_be_read(server, client):
    content = bytes(range(256)) * 4096  # 1 MiB
    upload(client, "a", {"adapter_model.safetensors": content})
    source = open_source(config(server))

    async def main():
        (file,) = (await source.stat("a")).files
        for start, end in [(0, 1), (255, 257), (1, len(content)), (len(content) - 1, len(content))]:
            assert await read_range(source, "a", file, start, end) == content[start:end]

    run(source, main)


def test_a_read_that_broke_goes_on_behind_its_last_byte(server, client):
    content = bytes(range(256))
    upload(client, "a", {"adapter_model.safetensors": content})
    source = open_source(config(server))

    async def main():
        (file,) = (await source.stat("a")).files
        target = bytearray(200)
        part = RangeRead(50, memoryview(target))
        part.write(content[50:90])
        await source.read("a", file, part)
        assert bytes(target) == content[50:250]

    run(source, main)


def test_a_digest_in_the_metadata_is_told(server, client):
    """rclone says `Sha256` where the others say `sha256`."""
    upload(client, "a", Metadata={"sha256": "AB" * 32})
    upload(client, "b", Metadata={"sha256": "another notation"})
    source = open_source(config(server))

    async def main(name):
        (file, _) = (await source.stat(name)).files
        part = RangeRead(0, memoryview(bytearray(file.num_bytes)))
        await source.read(name, file, part)
        return part.sha256

    assert run(source, lambda: main("a"), lambda: main("b")) == ["ab" * 32, None]


def test_a_name_never_sees_a_longer_one(server, client):
    upload(client, "x/10")
    upload(client, "x/1/sub")
    source = open_source(config(server))
    missing, there = run(source, lambda: source.stat("x/1"), lambda: source.stat("x/10"))
    assert missing is None
    assert there is not None


def test_a_missing_region_is_no_missing_adapter(server, client, monkeypatch):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    upload(client, "a")
    source = open_source(config(server))
    assert run(source, lambda: source.stat("a"))[0] is not None


def test_a_bucket_without_a_prefix_is_a_source_too(server, client):
    upload(client, "a", prefix="")
    client.put_object(Bucket="adapters", Key="adapter_config.json", Body=b"{}")
    source = open_source(config(server, uri="s3://adapters"))
    page, found = run(source, lambda: source.list(None, 10), lambda: source.stat("a"))
    assert page.names == ("a",)
    assert found is not None


def test_an_object_that_is_replaced_after_it_was_listed_is_not_handed_out(server, client):
    """rclone ignores If-Match; the ETag of its answer tells."""
    upload(client, "a")
    source = open_source(config(server))

    async def main(change):
        listing = await source.stat("a")
        change()
        with pytest.raises(SourceChanged):
            await read_all(source, "a", listing)

    key = {"Bucket": "adapters", "Key": "team/a/adapter_model.safetensors"}
    run(
        source,
        lambda: main(lambda: upload(client, "a", small_adapter(seed=5))),
        lambda: main(lambda: client.delete_object(**key)),
    )


def test_a_listing_pages_lazily_and_ignores_what_is_no_adapter(server, client):
    for number in range(5):
        upload(client, f"n{number}")
    client.put_object(Bucket="adapters", Key="team/notes.txt", Body=b"")
    client.put_object(Bucket="adapters", Key="team/.bad name/adapter_config.json", Body=b"{}")
    client.put_object(Bucket="adapters", Key="teammate/n9/adapter_config.json", Body=b"{}")
    source = open_source(config(server))
    assert run(source, lambda: all_names(source, 2)) == [[f"n{number}" for number in range(5)]]


def test_a_bucket_that_does_not_exist_is_told(server, client):
    source = open_source(config(server, uri="s3://no-such-bucket/x"))
    stat, listed = run(
        source, lambda: refused(lambda: source.stat("a")), lambda: refused(lambda: source.list(None, 10))
    )
    assert "bucket does not exist" in stat
    assert "NoSuchBucket" in listed


def test_wrong_credentials_are_told_and_not_a_missing_adapter(server, client, monkeypatch):
    upload(client, "a")
    source = open_source(config(server, access_key_id="nobody"))
    if server.kind == "moto":
        monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    (reason,) = run(source, lambda: refused(lambda: source.stat("a")))
    monkeypatch.undo()
    assert "the access key is unknown" in reason


def test_each_source_has_credentials_of_its_own(server, client, monkeypatch):
    """A wrong secret of one leaves the other alone, and so do those of the environment."""
    upload(client, "a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-somebody-else")
    right, wrong = open_source(config(server)), open_source(config(server, secret_access_key="wrong"))
    assert run(right, lambda: right.stat("a"))[0] is not None
    if server.kind == "moto":  # checks no secrets, only whether it knows the key
        run(wrong)
    else:
        assert "the secret key is wrong" in run(wrong, lambda: refused(lambda: wrong.stat("a")))[0]


def test_no_credentials_at_all_are_told(server, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    source = open_source(config(server, access_key_id=None, secret_access_key=None))
    (reason,) = run(source, lambda: refused(lambda: source.stat("a")))
    assert "NoCredentialsError" in reason


def test_a_certificate_that_nobody_vouches_for_is_refused_unless_told_otherwise(server, client):
    upload(client, "a")
    trusting = open_source(config(server, verify_tls=False))
    # urllib3 warns of each request whose certificate it did not look at.
    with pytest.warns(InsecureRequestWarning) if server.ca_bundle else nullcontext():
        assert run(trusting, lambda: trusting.stat("a"))[0] is not None
    if server.ca_bundle:
        source = open_source(config(server, verify_tls=True))
        assert "SSLError" in run(source, lambda: refused(lambda: source.stat("a")))[0]


@pytest.mark.parametrize("checksums", ["when_required", "when_supported"])
def test_checksums_that_a_server_sends_are_checked_when_asked_for(server, client, checksums):
    """rclone answers a range with the checksum of the whole object: it can only be used without.

    rgw 16 keeps no checksums, and over HTTPS refuses an upload with one.
    """
    more = {} if server.kind == "ceph" else {"ChecksumAlgorithm": "CRC32"}
    upload(client, "a", {"adapter_model.safetensors": b"0123456789"}, **more)
    source = open_source(config(server, response_checksums=checksums, request_checksums=checksums))

    async def main():
        (file,) = (await source.stat("a")).files
        if server.kind == "rclone" and checksums == "when_supported":
            with pytest.raises(SourceChanged, match="set response_checksums to when_required"):
                await read_range(source, "a", file, 2, 8)
        else:
            assert await read_range(source, "a", file, 2, 8) == b"234567"

    run(source, main)


def test_the_store_serves_from_a_bucket_and_sees_a_new_upload(server, client):
    upload(client, "a")

    async def main():
        store = AdapterStore([open_source(config(server))], MemoryBlobs(), StoreConfig(refresh_s=0))
        digest = await store.register_spec(small_spec())
        first = await store.acquire("a", digest, "me")
        upload(client, "a", small_adapter(seed=8))
        second = await store.acquire("a", digest, "me")
        assert first.version != second.version
        assert (await store.list_adapters()).records[0].version == second.version
        await store.close()

    asyncio.run(main())
