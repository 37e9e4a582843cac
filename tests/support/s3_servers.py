"""S3 servers on this machine: moto in this process, Ceph's radosgw and rclone as processes of their own.

Each binds to 127.0.0.1 and a free port, is known by its process id, and is gone when its context ends.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.support.certificates import Certificate
from tests.support.waiting import ended, until


@dataclass(kw_only=True)
class S3Server:
    """How to reach one, and what it is known not to do."""

    kind: str
    endpoint: str
    access_key: str = "k"
    secret_key: str = "s"
    ca_bundle: str | None = None
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # moto only: method, url, headers

    @cached_property
    def client(self) -> Any:
        """A client to upload with, that trusts the server. Checksums only where required: rgw 16 and rclone refuse
        the streamed ones that boto3 sends over HTTPS by default."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            verify=self.ca_bundle,
            config=Config(
                s3={"addressing_style": "path"},
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )


class _Quiet(WSGIRequestHandler):
    def log_request(self, *_: object) -> None:
        pass


@contextmanager
def moto(certificate: Certificate | None = None) -> Iterator[S3Server]:
    """In a thread of this process: quick, and its settings can be changed. All of them share one set of buckets."""
    app = DomainDispatcherApplication(create_backend_app)
    requests: list[tuple[str, str, dict[str, str]]] = []

    def counting(environ: dict[str, Any], start_response: Any) -> Any:
        headers = {key[5:].lower().replace("_", "-"): value for key, value in environ.items() if key[:5] == "HTTP_"}
        requests.append((environ["REQUEST_METHOD"], f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}", headers))
        return app(environ, start_response)

    context = None if certificate is None else (str(certificate.bundle), str(certificate.key))
    server = make_server("127.0.0.1", 0, counting, threaded=True, request_handler=_Quiet, ssl_context=context)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    scheme, bundle = ("http", None) if certificate is None else ("https", str(certificate.bundle))
    try:
        yield S3Server(kind="moto", endpoint=f"{scheme}://127.0.0.1:{server.port}", ca_bundle=bundle, requests=requests)
    finally:
        server.shutdown()
        ended(thread, "moto's server")
        server.server_close()


@contextmanager
def rclone(folder: Path) -> Iterator[S3Server]:
    """`rclone serve s3` over `folder`: the binary that CHORUS_RCLONE names, or the one in PATH."""
    binary = os.environ.get("CHORUS_RCLONE") or shutil.which("rclone")
    if binary is None:
        raise FileNotFoundError("rclone: not in PATH; install it (`make test-s3` does) or name it in CHORUS_RCLONE")
    folder.mkdir(exist_ok=True)
    (port,) = free_ports(1)
    command = [binary, "serve", "s3", "--auth-key", "key,secret", "--addr", f"127.0.0.1:{port}", str(folder)]
    command += ["--config", os.devnull]
    with process(command, folder.parent / "rclone.log"):
        until(lambda: answers(port), "an answer of rclone")
        yield S3Server(kind="rclone", endpoint=f"http://127.0.0.1:{port}", access_key="key", secret_key="secret")


@contextmanager
def process(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is gone afterwards: asked first, then made to."""
    with log.open("ab") as output:
        started = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()  # radosgw was seen to take longer
            ended(started, f"{command[0]} to end after a kill")


def free_ports(count: int) -> list[int]:
    """Ports nobody had a moment ago, all different."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def answers(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
