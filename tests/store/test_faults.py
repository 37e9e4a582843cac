"""Thousands of damaged answers of a bucket: no wrong byte is served, no request outlives its time, no other notices."""

import asyncio
import hashlib
import random
import re
import subprocess
import sys
from collections import Counter

import boto3
import numpy as np
import pytest

from adapter_store.errors import AdapterNotFound, SourceUnavailable
from adapter_store.image.packing import pack
from adapter_store.image.spec import spec_digest
from adapter_store.records import StoreConfig
from adapter_store.sources.base import SourceConfig
from adapter_store.sources.opening import open_source
from adapter_store.store import AdapterStore
from adapter_store.tiers.blobs import MemoryBlobs
from tests.support.fake_sources import small_adapter, small_spec
from tests.support.fault_proxy import Fault, FaultProxy, Schedule
from tests.support.waiting import ended, patience

SPEC = small_spec()
DIGEST = spec_digest(SPEC)
BUCKET = "adapters"
NAME = re.compile(r"(?:damaged|healthy)-\d+")
UPLOADS = ("whole", "one-part", "two-parts", "two-parts-with-sha256")
WEIGHTS = {"flip": 4, "reset": 3, "close": 3, "refuse": 2, "latency": 1, "rate": 1, "hang": 0.3}
NUM_AT_ONCE = 8
READ_TIMEOUT_S = 1.0  # more than a healthy answer takes on a busy machine
FETCH_TIMEOUT_S = 5.0
STAT_TIMEOUT_S = 3.0
# A look at the source, the download, and a look whether it is still the same; for what a busy machine adds, and for a
# second turn after a version that changed under the first, there is an allowance.
DEADLINE_S = STAT_TIMEOUT_S + FETCH_TIMEOUT_S + STAT_TIMEOUT_S
ALLOWANCE_S = 5.0
SCHEDULE_S = 1800.0  # of all fetches of one schedule


# In a process of its own: it has a core of its own then. It ends with its input, whatever becomes of this process.
MOTO = """
import sys
import moto.s3.models
from moto.server import ThreadedMotoServer
moto.s3.models.S3_UPLOAD_PART_MIN_SIZE = 1
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture
def port():
    with subprocess.Popen(
        [sys.executable, "-c", MOTO],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a line for each request
    ) as server:
        yield int(server.stdout.readline())
        server.stdin.close()
        ended(server, "moto's process")


def upload(port, adapters):
    """Each in one of four ways: with the MD5 as ETag, with ETags of uploads in parts, and with a sha256 beside."""
    endpoint = f"http://127.0.0.1:{port}"
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=endpoint, **keys)
    client.create_bucket(Bucket=BUCKET)
    for index, (name, files) in enumerate(adapters.items()):
        for file, content in files.items():
            where = {"Bucket": BUCKET, "Key": f"{name}/{file}"}
            how = UPLOADS[index % len(UPLOADS)]
            if how == "whole":
                client.put_object(**where, Body=content)
                continue
            more = {"Metadata": {"sha256": hashlib.sha256(content).hexdigest()}} if "sha256" in how else {}
            in_parts = {**where, "UploadId": client.create_multipart_upload(**where, **more)["UploadId"]}
            middle = len(content) // 2 if "two" in how else len(content)
            parts = []
            for number, body in enumerate(filter(None, (content[:middle], content[middle:])), 1):
                etag = client.upload_part(**in_parts, PartNumber=number, Body=body)["ETag"]
                parts.append({"PartNumber": number, "ETag": etag})
            client.complete_multipart_upload(**in_parts, MultipartUpload={"Parts": parts})
    client.close()


class Outcomes:
    """Acquires adapters and compares what it gets with the truth."""

    def __init__(self, store, adapters):
        self.store = store
        self.images = {name: pack(files, SPEC).data for name, files in adapters.items()}
        self.num_served = 0
        self.failures = []
        self.unexpected = []

    async def ask(self, name, source):
        try:
            async with asyncio.timeout(DEADLINE_S + ALLOWANCE_S):
                lease = await self.store.acquire(name, DIGEST, "me", source=source)
        except TimeoutError:
            self.unexpected.append((name, "beyond its deadline"))
        except (SourceUnavailable, AdapterNotFound) as error:
            self.failures.append(str(error))
            if f"adapter {name!r}" not in str(error):
                self.unexpected.append((name, "which adapter it is, is not told", error))
        except Exception as error:
            self.unexpected.append((name, repr(error)))
        else:
            self.num_served += 1
            if not np.array_equal(lease.image, self.images[name]):
                self.unexpected.append((name, "wrong bytes"))
            await self.store.release(lease.version, "me")


def s3(name, address):
    return open_source(
        SourceConfig(
            uri=f"s3://{BUCKET}", name=name, endpoint_url=address, addressing_style="path", max_attempts=1,
            access_key_id="k", secret_access_key="s", read_timeout_s=READ_TIMEOUT_S, connect_timeout_s=2.0,
            max_connections=32,
        )
    )  # fmt: skip


async def run_schedule(port, schedule, num_faulty, adapters):
    """Fetches until `num_faulty` fetches have met a fault. Returns how those, and the healthy, went, and the faults."""
    met = Counter()  # faults, by adapter

    def choose(target):
        name = NAME.search(target)[0]
        fault = Fault() if name.startswith("healthy") else schedule()
        met[name] += fault.kind != "none"
        return fault

    config = StoreConfig(
        host_bytes=2 * NUM_AT_ONCE * pack(small_adapter(), SPEC).num_bytes,
        max_adapter_bytes=5000, part_bytes=800, max_parallel_parts=4, max_parallel_fetches=2 * NUM_AT_ONCE,
        fetch_timeout_s=FETCH_TIMEOUT_S, stat_timeout_s=STAT_TIMEOUT_S, retry_base_s=0.01, refresh_s=2.0,
        missing_ttl_s=0.01, unavailable_ttl_s=0.01,
    )  # fmt: skip
    with FaultProxy(port, choose) as proxy:
        sources = [s3("faulty", proxy.address), s3("direct", f"http://127.0.0.1:{port}")]
        store = AdapterStore(sources, MemoryBlobs(), config)
        await store.register_spec(SPEC)
        damaged, healthy = Outcomes(store, adapters), Outcomes(store, adapters)
        names = [name for name in adapters if name.startswith("damaged")]
        asked, num_met = set(), 0

        async def be_damaged(draw):
            nonlocal num_met
            for _ in patience(f"{num_faulty} fetches that met a fault", SCHEDULE_S):
                if num_met >= num_faulty:
                    break
                name = draw.choice([name for name in names if name not in asked])
                asked.add(name)
                before = met[name]
                await damaged.ask(name, "faulty")
                asked.discard(name)
                num_met += met[name] > before
                store.check_invariants()

        async def be_healthy(mine):
            for _ in patience(f"{num_faulty} fetches that met a fault", SCHEDULE_S):
                if num_met >= num_faulty:
                    break
                for name in mine:
                    for source in ("faulty", "direct"):  # beside the damaged ones, and in a source of their own
                        await healthy.ask(name, source)
                        await asyncio.sleep(0.05)

        everybody = [be_damaged(random.Random(number)) for number in range(NUM_AT_ONCE)]
        await asyncio.gather(*everybody, be_healthy([name for name in adapters if name not in names]))
        await store.close()
    return damaged, healthy, proxy.applied


def try_schedule(port, seed, num_faulty):
    adapters = {f"damaged-{seed}": small_adapter(seed=seed) for seed in range(40)}
    adapters |= {f"healthy-{seed}": small_adapter(seed=100 + seed) for seed in range(8)}
    upload(port, adapters)
    schedule = Schedule(seed, share=0.3, weights=WEIGHTS, longest=10_000, seconds=0.02)
    damaged, healthy, applied = asyncio.run(run_schedule(port, schedule, num_faulty, adapters))
    print(
        f"damaged: {damaged.num_served} served, {len(damaged.failures)} failed; healthy: {healthy.num_served} served; "
        f"faults: {dict(applied)}"
    )
    assert damaged.unexpected == []
    assert healthy.unexpected == []
    assert healthy.failures == []
    assert healthy.num_served > 0
    assert set(applied) == set(WEIGHTS)
    assert damaged.num_served > len(damaged.failures)


def test_200_fetches_that_meet_faults_serve_no_wrong_byte_and_harm_nobody_else(port):
    try_schedule(port, seed=1, num_faulty=200)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 7))
def test_thousands_of_fetches_that_meet_faults_serve_no_wrong_byte_and_harm_nobody_else(port, seed):
    try_schedule(port, seed, num_faulty=2000)
