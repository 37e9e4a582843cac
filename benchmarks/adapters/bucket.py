"""A bucket for measurements: moto in a process of its own, on a free port of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from adapter_store.sources.base import SourceConfig

NAME = "adapters"
SECRET_VARIABLE = "CHORUS_BENCHMARK_BUCKET_SECRET"
_SERVE = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.WARNING)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until whoever started it is gone
server.stop()
"""


@contextmanager
def bucket(folder: Path, names: Sequence[str]) -> Iterator[SourceConfig]:
    """Serves these adapters of `folder` as a bucket; the source that reads them."""
    process = subprocess.Popen([sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        config = SourceConfig(
            uri=f"s3://{NAME}",
            name="bucket",
            endpoint_url=endpoint,
            region="us-east-1",
            addressing_style="path",
            access_key_id="key",
            secret_access_key=os.environ.setdefault(SECRET_VARIABLE, "secret"),
            secrets_env=(("secret_access_key", SECRET_VARIABLE),),  # the store may be an actor, and reads it itself
        )
        _upload(folder, names, config)
        yield config
    finally:
        process.stdin.close()
        process.wait(timeout=60)


def _upload(folder: Path, names: Sequence[str], config: SourceConfig) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=config.endpoint_url,
        region_name=config.region,
        aws_access_key_id=config.access_key_id,
        aws_secret_access_key=config.secret_access_key,
    )
    client.create_bucket(Bucket=NAME)
    for name in names:
        for file in (folder / name).iterdir():
            client.put_object(Bucket=NAME, Key=f"{name}/{file.name}", Body=file.read_bytes())
    client.close()
