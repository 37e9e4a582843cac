"""A bucket as a source, against an HTTP server: exact names, consistent reads, and errors that say what is wrong."""

import asyncio
import socket
import socketserver
import threading
from contextlib import contextmanager

import boto3
import moto.settings
import pytest
from moto.server import ThreadedMotoServer

from adapter_store.blobs import MemoryBlobs
from adapter_store.errors import SourceUnavailable
from adapter_store.records import StoreConfig
from adapter_store.sources.base import SourceChanged, SourceConfig, SourceFile, SourceListing
from adapter_store.sources.opening import open_source
from adapter_store.store import AdapterStore
from tests.support.fake_sources import small_adapter, small_spec
from tests.support.read_files import read_files


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def client(endpoint):
    made = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="k", aws_secret_access_key="s"
    )
    made.create_bucket(Bucket="adapters")
    yield made
    for page in made.get_paginator("list_objects_v2").paginate(Bucket="adapters"):
        for entry in page.get("Contents", ()):
            made.delete_object(Bucket="adapters", Key=entry["Key"])
    made.delete_bucket(Bucket="adapters")
    made.close()


def config(endpoint, uri="s3://adapters/team", **more):
    defaults = {"access_key_id": "k", "secret_access_key": "s", "max_attempts": 1, "connect_timeout_s": 2.0}
    return SourceConfig(uri=uri, endpoint_url=endpoint, **{**defaults, "addressing_style": "path", **more})


def upload(client, name, files=None, prefix="team/"):
    for file, content in (files or small_adapter()).items():
        client.put_object(Bucket="adapters", Key=f"{prefix}{name}/{file}", Body=content)


def run(source, *calls):
    async def main():
        try:
            return [await call() for call in calls]
        finally:
            await source.close()

    return asyncio.run(main())


async def refused(call):
    with pytest.raises(SourceUnavailable) as caught:
        await call()
    return caught.value.reason


def test_an_adapter_is_read_whole(endpoint, client):
    upload(client, "a")
    source = open_source(config(endpoint))

    async def main():
        listing = await source.stat("a")
        assert listing.names == ("adapter_config.json", "adapter_model.safetensors")
        return await read_files(source, "a", listing)

    assert run(source, main) == [small_adapter()]


def test_a_name_never_sees_a_longer_one(endpoint, client):
    upload(client, "x/10")
    upload(client, "x/1/sub")
    source = open_source(config(endpoint))
    missing, there = run(source, lambda: source.stat("x/1"), lambda: source.stat("x/10"))
    assert missing is None
    assert there is not None


def test_a_missing_region_is_no_missing_adapter(endpoint, client, monkeypatch):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    upload(client, "a")
    source = open_source(config(endpoint))
    assert run(source, lambda: source.stat("a"))[0] is not None


def test_a_bucket_without_a_prefix_is_a_source_too(endpoint, client):
    upload(client, "a", prefix="")
    client.put_object(Bucket="adapters", Key="adapter_config.json", Body=b"{}")
    source = open_source(config(endpoint, uri="s3://adapters"))
    page, found = run(source, lambda: source.list(None, 10), lambda: source.stat("a"))
    assert page.names == ("a",)
    assert found is not None


def test_an_object_that_is_replaced_after_it_was_listed_is_not_handed_out(endpoint, client):
    upload(client, "a")
    source = open_source(config(endpoint))

    async def main(change):
        listing = await source.stat("a")
        change()
        with pytest.raises(SourceChanged):
            await read_files(source, "a", listing)

    key = {"Bucket": "adapters", "Key": "team/a/adapter_model.safetensors"}
    run(
        source,
        lambda: main(lambda: upload(client, "a", small_adapter(seed=5))),
        lambda: main(lambda: client.delete_object(**key)),
    )


def test_a_listing_pages_lazily_and_ignores_what_is_no_adapter(endpoint, client):
    for number in range(5):
        upload(client, f"n{number}")
    client.put_object(Bucket="adapters", Key="team/notes.txt", Body=b"")
    client.put_object(Bucket="adapters", Key="team/.bad name/adapter_config.json", Body=b"{}")
    client.put_object(Bucket="adapters", Key="teammate/n9/adapter_config.json", Body=b"{}")
    source = open_source(config(endpoint))

    async def main():
        seen, cursor = [], None
        while True:
            page = await source.list(cursor, 2)
            assert len(page.names) <= 2
            seen += page.names
            cursor = page.next_cursor
            if cursor is None:
                return seen

    assert run(source, main) == [[f"n{number}" for number in range(5)]]


def test_a_bucket_that_does_not_exist_is_told(endpoint, client):
    source = open_source(config(endpoint, uri="s3://no-such-bucket/x"))
    stat, listed = run(
        source, lambda: refused(lambda: source.stat("a")), lambda: refused(lambda: source.list(None, 10))
    )
    assert "bucket does not exist" in stat
    assert "NoSuchBucket" in listed


def test_wrong_credentials_are_told_and_not_a_missing_adapter(endpoint, client, monkeypatch):
    upload(client, "a")
    source = open_source(config(endpoint))
    monkeypatch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
    (reason,) = run(source, lambda: refused(lambda: source.stat("a")))
    monkeypatch.undo()
    assert "InvalidAccessKeyId" in reason


def test_an_endpoint_that_is_down_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, never listening: every connection is refused
        source = open_source(config(f"http://127.0.0.1:{taken.getsockname()[1]}"))
        (reason,) = run(source, lambda: refused(lambda: source.stat("a")))
    assert "EndpointConnectionError" in reason


def test_an_endpoint_that_never_answers_is_given_up():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        source = open_source(config(f"http://127.0.0.1:{silent.getsockname()[1]}", read_timeout_s=0.2))
        (reason,) = run(source, lambda: refused(lambda: source.stat("a")))
    assert "ReadTimeoutError" in reason


def test_no_credentials_at_all_are_told(endpoint, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    source = open_source(config(endpoint, access_key_id=None, secret_access_key=None))
    (reason,) = run(source, lambda: refused(lambda: source.stat("a")))
    assert "NoCredentialsError" in reason


@contextmanager
def answering(answer):
    """The address of a server that answers every connection with the same bytes and hangs up."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            while self.rfile.readline() not in (b"\r\n", b""):
                pass
            self.wfile.write(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 10\r\n\r\n12345', "ended after 5 of 10 bytes"),
        (b'HTTP/1.1 200 OK\r\nETag: "other"\r\nContent-Length: 10\r\n\r\n1234567890', None),
        (b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 9\r\n\r\n123456789', None),
        (b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n", None),
        (b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\n\r\n", "503"),
    ],
)
def test_a_body_that_is_not_what_was_listed_is_never_handed_out(answer, error):
    listing = SourceListing(files=(SourceFile(name="adapter_config.json", etag='"e"', num_bytes=10),))

    with answering(answer) as address:
        source = open_source(config(address))

        async def main():
            if error is None:
                with pytest.raises(SourceChanged):
                    await read_files(source, "a", listing)
            else:
                assert error in await refused(lambda: read_files(source, "a", listing))

        run(source, main)


def test_the_store_serves_from_a_bucket_and_sees_a_new_upload(endpoint, client):
    upload(client, "a")

    async def main():
        store = AdapterStore([open_source(config(endpoint))], MemoryBlobs(), StoreConfig(refresh_s=0))
        digest = await store.register_spec(small_spec())
        first = await store.acquire("a", digest, "me")
        upload(client, "a", small_adapter(seed=8))
        second = await store.acquire("a", digest, "me")
        assert first.version != second.version
        assert (await store.list_adapters()).records[0].version == second.version
        await store.close()

    asyncio.run(main())
