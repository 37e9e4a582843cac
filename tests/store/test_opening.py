"""From a description to a source: what is configured is opened, what is wrong is named, and no secret shows."""

import os
import sys
import threading

import pytest

from adapter_store.errors import StoreConfigInvalid
from adapter_store.sources.base import RangeRead, SourceConfig, SourceFile
from adapter_store.sources.opening import open_source
from adapter_store.sources.threads import nice_pool
from tests.support.source_calls import run
from tests.support.web_server import Answer, web_server


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("file:///adapters", "local"),
        ("s3://bucket/prefix", "s3"),
        ("http://127.0.0.1:1/prefix", "http"),
        ("https://host.example", "http"),
        ("hub://huggingface.co", "hub"),
    ],
)
def test_a_source_is_opened_by_its_uri_and_asked_nothing(uri, kind):
    source = open_source(SourceConfig(uri=uri))
    assert (source.kind, source.name) == (kind, uri)
    assert open_source(SourceConfig(uri=uri, name="mine")).name == "mine"
    run(source)


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://x/y", "s3://", "file://other-host/x", "/plain/path", "hub://host/path", "hub://", "https://",
        "https://user:secret@host/x", "https://host/x?token=secret", "http://host/x#y",
    ],
)  # fmt: skip
def test_a_uri_that_names_no_source_is_refused_with_the_forms_there_are(uri):
    with pytest.raises(StoreConfigInvalid, match=r"neither file:///folder, s3://bucket/prefix, https://.* nor hub://"):
        open_source(SourceConfig(uri=uri))


@pytest.mark.parametrize(
    ("uri", "field", "value"),
    [
        ("file:///x", "token", "t"),
        ("s3://b", "token", "t"),
        ("s3://b", "repos", ("a/*",)),
        ("https://host", "requester_pays", True),
        ("https://host", "endpoint_url", "https://other"),
        ("hub://host", "secret_access_key", "s"),
    ],
)
def test_a_field_that_a_source_would_not_heed_is_refused_by_name(uri, field, value):
    with pytest.raises(StoreConfigInvalid, match=f"{field}: a source at"):
        open_source(SourceConfig(uri=uri, **{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("endpoint_url", "127.0.0.1:9000"), ("endpoint_url", "ftp://x"), ("endpoint_url", "https://me:secret@x"),
     ("token", "secret\n"), ("token", "")],
)  # fmt: skip
def test_a_value_that_can_never_work_is_told_at_start(field, value):
    with pytest.raises(StoreConfigInvalid, match=field) as caught:
        open_source(SourceConfig(uri="hub://host", **{field: value}))
    assert field != "token" or "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://b", "https://host", "hub://host"])
def test_a_bundle_of_certificates_that_is_not_there_is_told_at_start(uri, tmp_path):
    with pytest.raises(StoreConfigInvalid, match="is no file"):
        open_source(SourceConfig(uri=uri, verify_tls=str(tmp_path / "none.pem")))


@pytest.mark.parametrize("uri", ["https://host", "hub://host"])
def test_a_bundle_that_holds_no_certificates_is_told_at_start(uri, tmp_path):
    bundle = tmp_path / "empty.pem"
    bundle.write_text("nothing")
    with pytest.raises(StoreConfigInvalid, match="is no bundle"):
        open_source(SourceConfig(uri=uri, verify_tls=str(bundle)))


def test_secrets_do_not_show_when_a_source_is_printed():
    secrets = dict.fromkeys(("secret_access_key", "session_token", "token"), "hidden")
    assert "hidden" not in repr(SourceConfig(uri="s3://b", access_key_id="key", **secrets))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness of threads")
def test_threads_that_download_are_nicer_than_those_that_serve():
    def niceness():
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    mine = niceness()
    wanted = min(19, mine + 3)
    with nice_pool(1, "test", wanted) as pool, nice_pool(1, "test", 0) as plain:
        assert pool.submit(niceness).result() == wanted
        assert plain.submit(niceness).result() == mine  # and never less nice than the process
    assert niceness() == mine


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness of threads")
@pytest.mark.parametrize("kind", ["file", "s3", "http", "hub"])
def test_every_source_downloads_with_the_niceness_it_was_opened_with(kind, tmp_path):
    wanted = min(19, os.getpriority(os.PRIO_PROCESS, 0) + 3)
    seen = []
    part = RangeRead(
        0,
        memoryview(bytearray(1)),
        pace=lambda _: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())),
    )
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_bytes(b"x")
    file = SourceFile(name="adapter_config.json", etag='"e"', num_bytes=1)
    with web_server(lambda _: Answer(200, {"ETag": '"e"'}, b"x")) as server:
        keys = {"access_key_id": "k", "secret_access_key": "s", "addressing_style": "path"}
        config = {
            "file": SourceConfig(uri=tmp_path.as_uri()),
            "s3": SourceConfig(uri="s3://bucket", endpoint_url=server.address, **keys),
            "http": SourceConfig(uri=server.address),
            "hub": SourceConfig(uri="hub://huggingface.co", endpoint_url=server.address),
        }[kind]
        source = open_source(config, wanted)
        run(source, lambda: source.read("a", file, part))
    assert seen == [wanted]
