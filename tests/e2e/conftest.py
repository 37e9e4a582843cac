"""One real server for all end-to-end tests: S3 from moto, demo adapters and bad ones from a folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.e2e.bad_adapters import write_bad_adapters
from tests.e2e.server import ROOT, Server

BUCKET = "chorus-e2e"
ADAPTERS = ROOT / "demo" / "adapters"
FALLBACK = {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}


class Bucket:
    """Adapters in S3."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        self._client.create_bucket(Bucket=BUCKET)

    def upload(self, name: str, folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            self._client.upload_file(str(path), BUCKET, f"{name}/{path.name}")


@pytest.fixture(scope="session")
def bucket() -> Iterator[Bucket]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield Bucket(f"http://{host}:{port}")
    server.stop()


@pytest.fixture(scope="session")
def server(bucket: Bucket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(ADAPTERS, folder, dirs_exist_ok=True)
    write_bad_adapters(ADAPTERS / "upper", folder)
    bucket.upload("remote", ADAPTERS / "upper")
    running = Server(folder, bucket.endpoint, BUCKET)
    try:
        running.start()
        yield running
    finally:
        running.remove()


def started(
    tmp_path_factory: pytest.TempPathFactory, bucket: Bucket, environment: dict[str, str], direct: bool = False
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(ADAPTERS, folder, dirs_exist_ok=True)
    server = Server(folder, bucket.endpoint, BUCKET, environment, direct)
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="session", params=[{}, FALLBACK], ids=["haproxy", "fallback"])
def either(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bucket: Bucket
) -> Iterator[Server]:
    """A server behind HAProxy, then one behind Serve's own proxy."""
    yield from started(tmp_path_factory, bucket, request.param)


@pytest.fixture
def last_either(either: Server) -> Server:
    """As `last_server`."""
    return either


@pytest.fixture
def last_server(server: Server) -> Server:
    """The server of all tests, for the one that ends it."""
    return server


@pytest.hookimpl(tryfirst=True)  # pytest then puts together what shares one server of `either`
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In whatever order the files are given: the server is ended behind all that ask it.

    The official clients may leave a connection that they closed to the collector, which comes in some later test.
    """
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning"))
    items.sort(key=lambda item: bool({"last_server", "last_either"} & set(getattr(item, "fixturenames", ()))))
