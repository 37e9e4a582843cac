"""What a bucket's source asks, and what it makes of answers: ranges, changes, errors. No real server needed."""

import asyncio
import socket
import threading

import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends

from adapter_store.sources.base import RangeRead, ReadCancelled, SourceChanged, SourceConfig, SourceFile
from adapter_store.sources.opening import open_source
from tests.support import s3_servers
from tests.support.answering import answering
from tests.support.fake_sources import small_adapter
from tests.support.source_calls import look_while_reads_wait, read_range, refused, run
from tests.support.web_server import Answer, web_server

FILE = SourceFile(name="adapter_config.json", etag='"e"', num_bytes=10)


def config(endpoint, **more):
    known = {"access_key_id": "k", "secret_access_key": "s", "max_attempts": 1, "connect_timeout_s": 2.0}
    return SourceConfig(uri="s3://many/team", endpoint_url=endpoint, **{**known, "addressing_style": "path", **more})


@pytest.fixture(scope="module")
def server():
    """moto with a bucket of 3,000 objects that were not uploaded one by one."""
    with s3_servers.moto() as started:
        started.client.create_bucket(Bucket="many")
        backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
        for number in range(3000):
            backend.put_object("many", f"team/n{number}/adapter_config.json", b"{}")
        for file, content in small_adapter().items():
            backend.put_object("many", f"team/a/{file}", content)
            backend.put_object("many", f"{file}", content)
            backend.put_object("many", f"team/crowd/{file}", content)
        for number in range(1001):  # more than fit into one answer
            backend.put_object("many", f"team/crowd/{number}/adapter_config.json", b"{}")
        yield started
        backend.buckets.pop("many")


def test_opening_and_a_lookup_cost_the_same_however_many_objects_there_are(server):
    """Nothing at start; one request for a name; one more a file where adapters lie below it by the thousand."""
    server.requests.clear()
    source = open_source(config(server.endpoint))
    counts = [len(server.requests)]

    async def main():
        for name in ("a", "missing", "n17", "crowd", "n"):
            server.requests.clear()
            listing = await source.stat(name)
            counts.append((name, listing and listing.names, len(server.requests)))

    run(source, main)
    both = ("adapter_config.json", "adapter_model.safetensors")
    assert counts == [0, ("a", both, 1), ("missing", None, 1), ("n17", both[:1], 1), ("crowd", both, 7), ("n", None, 1)]


def test_a_page_of_a_listing_is_one_request(server):
    source = open_source(config(server.endpoint))
    server.requests.clear()
    (page,) = run(source, lambda: source.list("team/n", 20))
    assert len(page.names) == 20
    assert len(server.requests) == 1


def test_a_requester_that_pays_says_so_in_every_request(server):
    async def main(source):
        server.requests.clear()
        listing = await source.stat("a")
        await source.list(None, 1)
        await read_range(source, "a", listing.files[0])
        return [headers.get("x-amz-request-payer") for _, _, headers in server.requests]

    for pays, said in ((True, "requester"), (False, None)):
        source = open_source(config(server.endpoint, requester_pays=pays))
        assert run(source, lambda source=source: main(source)) == [[said] * 3]


def test_a_session_token_goes_with_its_keys(server):
    source = open_source(config(server.endpoint, session_token="of-a-role"))
    server.requests.clear()
    run(source, lambda: source.stat("a"))
    assert [headers.get("x-amz-security-token") for _, _, headers in server.requests] == ["of-a-role"]


def test_a_request_is_tried_as_often_as_configured_and_no_more():
    with web_server(lambda _: Answer(503)) as busy:
        source = open_source(config(busy.address, max_attempts=2))
        assert "503" in run(source, lambda: refused(lambda: source.stat("a")))[0]
    assert len(busy.asked) == 2


@pytest.mark.parametrize(("style", "host"), [("path", "s3.invalid:9/many"), ("virtual", "many.s3.invalid:9/")])
def test_a_bucket_is_addressed_as_configured(style, host):
    source = open_source(config("http://s3.invalid:9", addressing_style=style))
    (reason,) = run(source, lambda: refused(lambda: source.stat("a")))
    assert f"http://{host}" in reason


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


def head(status, length, *more):
    return "\r\n".join((f"HTTP/1.1 {status}", 'ETag: "e"', f"Content-Length: {length}", *more, "\r\n")).encode()


@pytest.mark.parametrize(
    "answer",
    [
        head("206 Partial Content", 4, "Content-Range: bytes 3-6/10") + b"3456",
        head("200 OK", 4, "Content-Range: bytes 3-6/10") + b"3456",  # rclone
        head("200 OK", 10) + b"0123456789",  # knows no ranges
        head("206 Partial Content", 4, "Content-Range: bytes 3-6/*") + b"3456",
    ],
)
def test_every_way_to_answer_a_range_gives_that_range(answer):
    with answering(answer) as address:
        source = open_source(config(address))
        assert run(source, lambda: read_range(source, "a", FILE, 3, 7)) == [b"3456"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (head("206 Partial Content", 4, "Content-Range: bytes 3-6/10") + b"34", "ended after 2 of 4 bytes"),
        (head("206 Partial Content", 4, "Content-Range: bytes 4-7/10") + b"4567", "asked for bytes=3-6"),
        (head("206 Partial Content", 5, "Content-Range: bytes 3-6/10") + b"34567", "asked for bytes=3-6"),
        (head("206 Partial Content", 4, "Content-Range: lines 3-6/10") + b"3456", "is no range of bytes"),
        (head("200 OK", 10) + b"01234", "ended after 2 of 4 bytes"),
        (head("503 Slow Down", 0), "503"),
    ],
)
def test_an_answer_that_is_not_the_range_is_refused(answer, reason):
    with answering(answer) as address:
        source = open_source(config(address))
        assert reason in run(source, lambda: refused(lambda: read_range(source, "a", FILE, 3, 7)))[0]


@pytest.mark.parametrize(
    "answer",
    [
        head("206 Partial Content", 4, "Content-Range: bytes 3-6/10").replace(b'"e"', b'"other"') + b"3456",
        head("206 Partial Content", 4, "Content-Range: bytes 3-6/11") + b"3456",
        head("200 OK", 9) + b"012345678",
        head("412 Precondition Failed", 0),
        head("404 Not Found", 0),
        head("416 Range Not Satisfiable", 0),
    ],
)
def test_a_file_that_is_another_by_now_is_never_handed_out(answer):
    async def main():
        with pytest.raises(SourceChanged):
            await read_range(source, "a", FILE, 3, 7)

    with answering(answer) as address:
        source = open_source(config(address))
        run(source, main)


def test_a_cancelled_read_lets_go_of_its_connection():
    size = 1 << 40
    hung_up = threading.Event()

    async def main():
        part = RangeRead(0, memoryview(bytearray(8 << 20)), pace=lambda _: part.cancel())
        file = SourceFile(name="adapter_config.json", etag='"e"', num_bytes=size)
        with pytest.raises(ReadCancelled) as held:  # so that no garbage collection closes it
            await source.read("a", file, part)
        assert await asyncio.to_thread(hung_up.wait, 20)
        assert held.value.__traceback__ is not None

    with answering(head("200 OK", size), endless=hung_up) as address:
        source = open_source(config(address))
        run(source, main)


def test_a_lookup_waits_for_no_read(server):
    """However many reads of the same bucket hang or are slowed down to a rate."""
    source = open_source(config(server.endpoint))
    (listing,) = run(source, lambda: look_while_reads_wait(source, "a", 40))
    assert listing is not None
