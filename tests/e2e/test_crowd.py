"""Many streams at once, through the deaths of what carries them: no token is lost or said twice, nobody waits for a
reader that does not read, and memory has its bounds.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.e2e.server import ROOT, Server, free_port
from tests.support.waiting import until_async, within

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DEADLINE_S = 500.0
NUM_SEQS = 64  # in each of two replicas
MIB = 1 << 20


class CrowdServer(Server):
    """The demo, without keys, with two routers and room for a thousand requests."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = Path(tempfile.mkdtemp(prefix="chorus-", dir="/tmp"))
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["http_options"]["port"] = self.port
        args = config["applications"][0]["args"]
        args |= {"num_routers": 2, "drain_s": 400.0}
        args["engine"] |= {"max_num_seqs": NUM_SEQS, "max_queued_requests": 1024, "kv_cache_bytes": 320 * MIB}
        self._config = self.folder / "config.yaml"
        self._config.write_text(yaml.safe_dump(config))
        self.log = self.folder / "log.txt"
        self.client = httpx.Client(base_url=self.url, timeout=60.0, trust_env=False)

    def rss_bytes(self) -> int:
        """Memory of routers and replicas."""
        return sum(_rss_bytes(pid) for pid in self.processes("ServeReplica:chorus:"))


def _rss_bytes(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # it has just ended
        return 0


@pytest.fixture(scope="module")
def server() -> Iterator[CrowdServer]:
    running = CrowdServer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        try:
            running.start()
            yield running
        finally:
            running.remove()


@dataclass
class Told:
    """What a client has heard of one stream."""

    texts: dict[int, str] = field(default_factory=dict)  # by choice
    num_events: int = 0
    is_whole: bool = False
    usage: int | None = None  # tokens, as the server counts them
    broke: str | None = None  # how its connection ended, if it did not end well

    @property
    def text(self) -> str:
        """Of a request for one choice."""
        return self.texts.get(0, "")


async def read(server: Server, told: Told, prompt: str, **fields: Any) -> Told:
    """One stream, to its end."""
    reader, writer = await _asked(server, prompt, **fields)
    try:
        await _listen(reader, told)
    except (OSError, asyncio.IncompleteReadError) as error:
        told.broke = repr(error)
    finally:
        writer.close()
    return told


async def _asked(
    server: Server, prompt: str, sock: socket.socket | None = None, **fields: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    body = {"model": "demo", "prompt": prompt, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}, **fields}  # fmt: skip
    content = json.dumps(body).encode()
    if sock is None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    else:
        reader, writer = await asyncio.open_connection(sock=sock, limit=1024)
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    await writer.drain()
    return reader, writer


async def _listen(reader: asyncio.StreamReader, told: Told) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    if b" 200 " not in head.splitlines()[0]:
        raise OSError(f"answered {head!r}")
    rest = b""
    while num_bytes := int(await reader.readline() or b"0", 16):  # of a chunk, which may end within an event
        rest += (await reader.readexactly(num_bytes + 2))[:-2]
        *lines, rest = rest.split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                _take(json.loads(line[6:]), told)
            elif line.startswith(b"data: [DONE]"):
                told.is_whole = True


def _take(body: dict[str, Any], told: Told) -> None:
    assert "error" not in body, body
    told.num_events += 1
    for choice in body["choices"]:
        told.texts[choice["index"]] = told.texts.get(choice["index"], "") + choice["text"]
    told.usage = body["usage"]["completion_tokens"] if body.get("usage") else told.usage


async def expected_of(server: Server, prompts: list[str], max_tokens: int) -> dict[str, str]:
    """What each prompt is answered when nothing happens."""
    tolds = await asyncio.gather(*(read(server, Told(), prompt, max_tokens=max_tokens) for prompt in prompts))
    assert all(told.is_whole and told.usage == max_tokens for told in tolds)
    return {prompt: told.text for prompt, told in zip(prompts, tolds, strict=True)}


def run(server: Server, work: Callable[[], Any]) -> Any:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    server.wait_until(lambda: len(server.stats()["replicas"]) == 2, "two replicas", 120.0)
    return asyncio.run(asyncio.wait_for(work(), DEADLINE_S))


def test_a_thousand_streams_at_once_are_all_right_within_bounded_memory(server: CrowdServer) -> None:
    prompts = [f"stream {number} of the crowd\n" for number in range(20)]

    async def main() -> tuple[list[Told], dict[str, str], int, int]:
        expected = await expected_of(server, prompts, 48)
        before = peak = server.rss_bytes()
        streams = [asyncio.ensure_future(read(server, Told(), prompts[n % 20], max_tokens=48)) for n in range(1000)]

        async def all_done() -> bool:
            nonlocal peak
            peak = max(peak, await asyncio.to_thread(server.rss_bytes))
            return all(stream.done() for stream in streams)

        await until_async(all_done, "a thousand streams", 300.0, poll_s=0.2)
        return [stream.result() for stream in streams], expected, before, peak

    tolds, expected, before, peak = run(server, main)
    assert [told.broke for told in tolds if told.broke] == []
    wrong = [n for n, told in enumerate(tolds) if not told.is_whole or told.text != expected[prompts[n % 20]]]
    assert wrong == []
    print(f"1,000 streams: {(peak - before) / MIB:.0f} MiB more in routers and replicas")
    assert peak - before < 512 * MIB


def test_readers_that_stop_reading_hold_nobody_up_and_hear_all_when_they_go_on(server: CrowdServer) -> None:
    """Each of them is owed more than the kernel keeps for it on its way."""
    num_still, num_choices, num_tokens = 4, 16, 1500

    async def main() -> None:
        prompts = [f"still {number}\n" for number in range(num_still)]
        expected = await expected_of(server, prompts, num_tokens)
        small = await expected_of(server, ["quick\n"], 48)
        before, still = server.rss_bytes(), []
        for prompt in prompts:
            sock = socket.create_connection(("127.0.0.1", server.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            still.append((await _asked(server, prompt, sock, max_tokens=num_tokens, n=num_choices, logprobs=5), sock))
        others = [read(server, Told(), "quick\n", max_tokens=48) for _ in range(200)]
        for told in await within(asyncio.gather(*others), "the streams beside those that are not read", 120.0):
            assert (told.is_whole, told.text) == (True, small["quick\n"])
        await until_async(lambda: server.in_engines() == 0, "the engines to be done with what nobody reads", 120.0)
        more = server.rss_bytes() - before
        print(f"{num_still * num_choices} choices of {num_tokens} tokens that nobody reads: {more / MIB:.0f} MiB more")
        assert more < 384 * MIB  # what nobody reads, as the router keeps it
        tolds = [Told() for _ in still]
        for _, sock in still:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, MIB)
        listening = (_listen(reader, told) for ((reader, _), _), told in zip(still, tolds, strict=True))
        try:
            await within(asyncio.gather(*listening), "all of what was not read", 240.0)
        finally:
            for (_, writer), _ in still:
                writer.close()
        for prompt, told in zip(prompts, tolds, strict=True):
            assert (told.is_whole, told.usage) == (True, num_choices * num_tokens)
            assert set(told.texts.values()) == {expected[prompt]}

    run(server, main)


def test_five_hundred_interrupted_streams_lose_and_repeat_no_token(server: CrowdServer) -> None:
    """Replicas are killed, and in some rounds a router: what that one carried is right as far as it goes."""
    num_tokens = 320
    prompts = [f"interrupted {number}\n" for number in range(2 * NUM_SEQS)]

    async def one_round(expected: dict[str, str], with_router: bool) -> tuple[int, int]:
        tolds = [Told() for _ in prompts]
        streams = [
            asyncio.ensure_future(read(server, told, prompt, max_tokens=num_tokens))
            for told, prompt in zip(tolds, prompts, strict=True)
        ]
        await until_async(lambda: all(told.num_events >= 2 for told in tolds), "every stream to have begun", 120.0)
        stats = await asyncio.to_thread(server.stats)
        victim = max(stats["replicas"], key=lambda replica: int(replica["in_hand"]))
        os.kill(victim["pid"], signal.SIGKILL)
        num_resumed, num_broken = int(victim["in_hand"]), 0
        if with_router:
            os.kill(next(iter(server.processes("ServeReplica:chorus:Router"))), signal.SIGKILL)
        await asyncio.gather(*streams)
        for prompt, told in zip(prompts, tolds, strict=True):
            whole = expected[prompt]
            if told.is_whole:
                assert (told.text, told.usage) == (whole, num_tokens)
            else:
                assert with_router, f"{prompt!r} broke off: {told.broke}"
                assert whole.startswith(told.text)
                num_broken += 1
        return num_resumed, num_broken

    async def main() -> tuple[int, int]:
        expected = await expected_of(server, prompts, num_tokens)
        num_resumed = num_broken = rounds = 0
        while num_resumed < 500:
            rounds += 1
            resumed, broken = await one_round(expected, with_router=rounds % 4 == 0)
            num_resumed, num_broken = num_resumed + resumed, num_broken + broken
            await asyncio.to_thread(
                server.wait_until, lambda: len(server.stats()["replicas"]) == 2, "two replicas again", 120.0
            )
            await asyncio.to_thread(
                server.wait_until,
                lambda: len(server.processes("ServeReplica:chorus:Router")) == 2,
                "two routers again",
                120.0,
            )
        return num_resumed, num_broken

    num_resumed, num_broken = run(server, main)
    print(f"{num_resumed} streams went on elsewhere, {num_broken} broke off with a router: no token lost or repeated")


def test_a_drain_of_more_than_45_seconds_ends_every_stream_whole(server: CrowdServer) -> None:
    """A router that is replaced says that it is there for as long as it has streams to read."""
    num_tokens, num_streams, long_s = 1800, 160, 45.0
    title = "ServeReplica:chorus:"

    async def main() -> float:
        tolds = [Told() for _ in range(num_streams)]
        streams = [
            asyncio.ensure_future(read(server, told, f"long {number}\n", max_tokens=num_tokens))
            for number, told in enumerate(tolds)
        ]
        await until_async(lambda: sum(told.num_events > 1 for told in tolds) >= NUM_SEQS, "streams to run", 120.0)
        old = set(server.processes(title))
        began_s = asyncio.get_running_loop().time()
        await asyncio.to_thread(server.deploy, max_resumes=3)
        await asyncio.gather(*streams)
        lasted_s = asyncio.get_running_loop().time() - began_s
        assert [told for told in tolds if not told.is_whole or told.usage != num_tokens] == []
        await asyncio.to_thread(
            server.wait_until,
            lambda: not old & set(server.processes(title)) and len(server.processes(title)) == 4,
            "the old routers and replicas to be gone",
            180.0,
        )
        return lasted_s

    lasted_s = run(server, main)
    assert lasted_s > long_s, f"the drain lasted {lasted_s:.0f} s only: this machine needs more streams"
