"""A web server as a source: any that can tell one upload from the next, and nobody but that one."""

import threading

import httpx
import pytest

from adapter_store.errors import AdapterRejected
from adapter_store.sources.base import RangeRead, ReadCancelled, SourceChanged, SourceConfig, SourceFile
from adapter_store.sources.opening import open_source
from adapter_store.sources.redirects import may_follow
from tests.support.answering import answering
from tests.support.certificates import self_signed
from tests.support.fake_sources import small_adapter
from tests.support.source_calls import read_all, read_range, refused, run
from tests.support.web_server import Answer, Site, web_server

BOTH = ("adapter_config.json", "adapter_model.safetensors")


def open_at(server, **more):
    known = {"max_attempts": 1, "connect_timeout_s": 2.0, "read_timeout_s": 5.0}
    return open_source(SourceConfig(uri=f"{server.address}/team", **{**known, **more}))


def site(name="a", files=None, **more):
    return Site({f"/team/{name}/{file}": body for file, body in (files or small_adapter()).items()}, **more)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"ranges": False},
        {"get": True, "conditions": False},
        {"etag": 'W/"{}"'},
        {"etag": None},
        {"modified": None},
    ],
)
def test_an_adapter_is_read_whole_from_any_server_with_validators(settings):
    with web_server(site(**settings)) as server:
        source = open_at(server)
        listing, files = run(source, lambda: source.stat("a"), lambda: read_all(source, "a"))
    assert listing.names == BOTH
    assert files == small_adapter()


def test_the_size_comes_from_head_where_get_does_not_tell_it():
    with web_server(site(chunked=True)) as server:
        source = open_at(server)
        listing, files = run(source, lambda: source.stat("a"), lambda: read_all(source, "a"))
    assert {file.name: file.num_bytes for file in listing.files} == {n: len(b) for n, b in files.items()}
    assert files == small_adapter()


def test_head_is_asked_where_get_is_not_allowed():
    with web_server(site(get=False)) as server:
        source = open_at(server)
        assert run(source, lambda: source.stat("a"))[0].names == BOTH


def test_a_file_that_is_refused_later_is_seen():
    """A web server does not list its files, so each that would change what the adapter means is asked for."""
    with web_server(site(files={**small_adapter(), "new_embeddings.safetensors": b"x"})) as server:
        source = open_at(server)
        assert "new_embeddings.safetensors" in run(source, lambda: source.stat("a"))[0].names


def test_an_adapter_that_is_not_there_is_not_there():
    with web_server(site()) as server:
        source = open_at(server)
        assert run(source, lambda: source.stat("b"), lambda: source.list(None, 10))[0] is None
        assert len(server.asked) == 2


@pytest.mark.parametrize("settings", [{}, {"conditions": False}, {"etag": None}, {"etag": None, "conditions": False}])
def test_a_file_that_is_replaced_after_it_was_listed_is_not_handed_out(settings):
    content = site(**settings)

    async def main():
        listing = await source.stat("a")
        content.files = site(files=small_adapter(seed=5)).files
        content.modified += 1
        with pytest.raises(SourceChanged):
            await read_all(source, "a", listing)
        assert (await source.stat("a")).etags != listing.etags
        assert await read_all(source, "a") == small_adapter(seed=5)

    with web_server(content) as server:
        source = open_at(server)
        run(source, main)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(200, {}, b"x"), "neither a strong ETag nor Last-Modified"),
        (Answer(200, {"ETag": 'W/"e"'}, b"x"), "neither a strong ETag nor Last-Modified"),
        (Answer(200, {"ETag": '"e"', "Transfer-Encoding": "chunked"}, b"x"), "no known size"),
        (Answer(200, {"ETag": '"e"', "Content-Encoding": "gzip"}, b"x"), "is compressed"),
        (Answer(206, {"ETag": '"e"', "Content-Range": "x"}, b"x"), "is no range of bytes"),
        (Answer(403), "check token"),
        (Answer(500), "answered 500"),
        (Answer(503), "answered 503"),
    ],
)
def test_a_server_that_cannot_be_used_is_told_with_a_remedy(answer, reason):
    with web_server(lambda _: answer) as server:
        source = open_at(server)
        assert reason in run(source, lambda: refused(lambda: source.stat("a")))[0]


def test_a_server_that_is_busy_for_a_moment_is_asked_again():
    content, busy = site(), [503, 502]

    def answer(ask):
        return Answer(busy.pop()) if busy and ask.path.endswith("adapter_config.json") else content(ask)

    with web_server(answer) as server:
        source = open_at(server, max_attempts=3)
        assert run(source, lambda: source.stat("a"))[0].names == BOTH


def test_the_token_goes_to_the_source_and_not_where_it_redirects_to():
    elsewhere = site()

    def redirect(ask):
        return Answer(302, {"Location": f"{other.address}{ask.path}"})

    with web_server(elsewhere) as other, web_server(redirect) as server:
        source = open_at(server, token="secret", redirect_hosts=(other.address.removeprefix("http://"),))
        assert run(source, lambda: read_all(source, "a")) == [small_adapter()]
    assert {ask.headers.get("authorization") for ask in server.asked} == {"Bearer secret"}
    assert {ask.headers.get("authorization") for ask in other.asked} == {None}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_redirect_to_another_port_or_host_is_not_followed(host):
    with web_server(site()) as other:
        target = other.address.replace("127.0.0.1", host)
        with web_server(lambda ask: Answer(302, {"Location": target + ask.path})) as server:
            source = open_at(server)
            assert "only the same host is followed" in run(source, lambda: refused(lambda: source.stat("a")))[0]
    assert other.asked == []


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://169.254.169.254/",
        "http://[fd00:ec2::254]/",
        "http://[::1]:6379/",
        "http://2852039166/",
        "http://10.0.0.1/",
        "https://example.org/a",
        "https://evil.files.example/",
        "https://files.example.evil/",
        "https://user:word@files.example/",
        "http://files.example/",
        "https://files.example:8443/",
        "ftp://files.example/",
        "file:///etc/passwd",
        "gopher://files.example/",
        "//other.example/a",
    ],
)
def test_no_redirect_leads_elsewhere(target):
    here = httpx.URL("https://files.example/team/a")
    assert not may_follow(here, here.join(target))
    assert not may_follow(here, here.join(target), ("*.cdn.example", "cdn.example:*"))


@pytest.mark.parametrize(
    ("here", "target", "hosts"),
    [
        ("https://files.example/a", "/b", ()),
        ("https://files.example/a", "https://files.example:443/b", ()),
        ("http://files.example/a", "https://files.example/b", ()),
        ("https://files.example/a", "https://x.cdn.example/b?signature=s", ("*.cdn.example",)),
        ("https://files.example/a", "https://cdn.example:8443/b", ("cdn.example:8443",)),
        ("http://10.0.0.1:9000/a", "http://10.0.0.2:9000/b", ("10.0.0.2:9000",)),
        ("http://[::1]:9000/a", "http://[::2]:9000/b", ("[::2]:9000",)),
    ],
)
def test_a_redirect_on_the_own_host_or_to_one_that_is_named_is_followed(here, target, hosts):
    url = httpx.URL(here)
    assert may_follow(url, url.join(target), hosts)


def test_an_address_is_never_meant_by_a_pattern():
    here = httpx.URL("https://files.example/a")
    assert not may_follow(here, httpx.URL("https://169.254.169.254/"), ("*", "169.*", "*:*"))


def test_a_circle_of_redirects_ends():
    with web_server(lambda ask: Answer(302, {"Location": ask.path})) as server:
        source = open_at(server)
        assert "redirects more than 5 times" in run(source, lambda: refused(lambda: source.stat("a")))[0]


def test_a_certificate_that_nobody_vouches_for_is_refused_unless_told_otherwise(tmp_path):
    certificate = self_signed(tmp_path)
    with web_server(site(), certificate) as server:
        for verify in (str(certificate.bundle), False):
            source = open_at(server, verify_tls=verify)
            assert run(source, lambda source=source: read_all(source, "a")) == [small_adapter()]
        source = open_at(server)
        assert "CERTIFICATE_VERIFY_FAILED" in run(source, lambda: refused(lambda: source.stat("a")))[0]


def test_a_redirect_from_tls_to_plain_http_is_not_followed(tmp_path):
    certificate = self_signed(tmp_path)

    def redirect(ask):
        return Answer(302, {"Location": plain.address + ask.path})

    with web_server(site()) as plain, web_server(redirect, certificate) as server:
        source = open_at(server, verify_tls=str(certificate.bundle))
        assert "never from https to http" in run(source, lambda: refused(lambda: source.stat("a")))[0]
    assert plain.asked == []


def test_registered_urls_are_read_where_they_lead_and_without_the_token():
    """As signed ones are: the signature in the query is all the right they need, and must not show in an error."""
    content = Site({f"/signed/{number}": body for number, body in enumerate(small_adapter().values())})

    def answer(ask):
        return content(ask) if ask.query == "signature=s3cret" and ask.method == "GET" else Answer(403)

    with web_server(answer) as server:
        source = open_at(server, token="t")
        urls = {
            file: f"{server.address}/signed/{number}?signature=s3cret" for number, file in enumerate(small_adapter())
        }
        expired = {file: url.replace("s3cret", "expired") for file, url in urls.items()}

        async def main():
            listing = await source.stat_urls(urls)
            assert listing.names == BOTH
            assert await read_all(source, "any", listing) == small_adapter()
            assert await source.stat_urls({BOTH[0]: urls[BOTH[0]].replace("signed/0", "signed/9")}) is None
            return await refused(lambda: source.stat_urls(expired))

        reason = run(source, main)[0]
    assert "register a new one" in reason
    assert "expired" not in reason.replace("have expired", "")
    assert {ask.headers.get("authorization") for ask in server.asked} == {None}


@pytest.mark.parametrize(
    ("file", "url", "reason"),
    [
        ("adapter_config.json", "http://169.254.169.254/latest", "the only place that source"),
        ("adapter_config.json", "https://{host}/x", "the only place that source"),
        ("adapter_config.json", "http://{host}0/x", "the only place that source"),
        ("adapter_config.json", "http://{host}@evil/x", "the only place that source"),
        ("adapter_config.json", "http://me@{host}/x", "the only place that source"),
        ("adapter_config.json", "file:///etc/passwd", "the only place that source"),
        ("adapter_config.json", "http://{host}:x", "is no URL"),
        ("passwd", "http://{host}/x", "is no file of an adapter"),
    ],
)
def test_no_url_makes_the_store_ask_anybody_else(file, url, reason):
    async def main():
        with pytest.raises(AdapterRejected, match=reason):
            await source.stat_urls({file: url.format(host=server.address.removeprefix("http://"))})

    with web_server(site()) as server:
        source = open_at(server)
        run(source, main)
    assert server.asked == []


def test_a_read_that_broke_has_what_came_before():
    file = SourceFile(name="adapter_config.json", etag='"e"', num_bytes=10)
    part = RangeRead(2, memoryview(bytearray(6)))
    begun = b'HTTP/1.1 206 Partial\r\nETag: "e"\r\nContent-Range: bytes 2-7/10\r\nContent-Length: 6\r\n\r\n234'
    with answering(begun) as address:
        source = open_source(SourceConfig(uri=address, max_attempts=1))
        assert "RemoteProtocolError" in run(source, lambda: refused(lambda: source.read("a", file, part)))[0]
    assert part.num_received == 3


def test_a_cancelled_read_lets_go_of_its_connection():
    hung_up = threading.Event()
    part = RangeRead(0, memoryview(bytearray(8 << 20)), pace=lambda _: part.cancel())

    async def main():
        with pytest.raises(ReadCancelled):
            await source.read("a", SourceFile(name="adapter_config.json", etag='"e"', num_bytes=1 << 40), part)

    endless = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: %d\r\n\r\n' % (1 << 40)
    with answering(endless, endless=hung_up) as address:
        source = open_source(SourceConfig(uri=address))
        run(source, main)
        assert hung_up.wait(20)


def test_a_part_of_a_file_is_only_asked_for_as_a_range():
    with web_server(site(files={"adapter_model.safetensors": bytes(range(256))})) as server:
        source = open_at(server)

        async def main():
            (file,) = (await source.stat("a")).files
            return await read_range(source, "a", file, 10, 20)

        assert run(source, main) == [bytes(range(10, 20))]
    assert server.asked[-1].headers["range"] == "bytes=10-19"


def test_questions_and_reads_one_after_another_take_no_connections_anew():
    with web_server(site()) as server:
        source = open_at(server)

        async def main():
            for _ in range(5):
                await source.stat("a")
                await read_all(source, "a")
                assert await source.stat("nobody") is None

        run(source, main)
    assert len(server.asked) >= 50
    assert len({ask.client_port for ask in server.asked}) <= 4, "as many as are asked at once"
