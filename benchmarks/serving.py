"""A running server under load, as its clients see it and as its processes pay for it; peers in turns.

    make serve                                                                    # in one terminal
    python -m benchmarks.serving --cases closed:64:stream,closed:64:whole,closed:16:one,closed:1:stream
    python -m benchmarks.serving --cases poisson:32:stream --models demo,upper    # 32 requests a second
    python -m benchmarks.serving --peer http://127.0.0.1:8001                     # any OpenAI-compatible server

A case is `closed:N:SHAPE` (N clients, each asks again when it was answered) or `poisson:RATE:SHAPE` (requests arrive at
random, so that some meet a busy server). SHAPE is `stream`, `whole`, or `one` (streamed, one token). Every round asks
each server once per case, in turns; printed are medians of the rounds, and with a peer the ratio of neighbours. CPU
times are those of the server's processes (`benchmarks.processes`), on this machine only; the client's are not in them.
Source of the client's loop: none of httpx's, whose own CPU would be the measure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from benchmarks import workload
from benchmarks.processes import server_cpu_s

CASES = "closed:64:stream,closed:64:whole,closed:16:one,closed:1:stream"


@dataclass
class Seen:
    """One request as its client saw it. Seconds."""

    sent_s: float
    times_s: list[float] = field(default_factory=list)  # of the reads that brought events
    ended_s: float = 0.0
    num_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Case:
    """What one line measures."""

    name: str
    is_closed: bool
    number: float  # clients, or requests a second
    shape: str

    @property
    def is_streamed(self) -> bool:
        return self.shape != "whole"


def read_case(text: str) -> Case:
    """Raises: SystemExit."""
    kind, _, rest = text.partition(":")
    number, _, shape = rest.partition(":")
    try:
        if kind in ("closed", "poisson") and shape in ("stream", "whole", "one") and float(number) > 0:
            return Case(text, kind == "closed", float(number), shape)
    except ValueError:
        pass
    raise SystemExit(f"{text!r} is no case; closed:64:stream and poisson:8:whole are some")


async def ask(url: str, body: dict[str, Any], num_tokens: int) -> Seen:
    """One request on a connection of its own."""
    parts = urlsplit(url)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    seen = Seen(time.perf_counter())
    received = b""
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(head.encode() + content)
        while chunk := await reader.read(65536):
            received += chunk
            if b"data: " in chunk or not body["stream"]:
                seen.times_s.append(time.perf_counter())
        writer.close()
    except OSError as error:
        seen.error = repr(error)
    seen.ended_s = time.perf_counter()
    seen.num_tokens = num_tokens
    told = f'"completion_tokens":{num_tokens}'.encode()
    if seen.error is None and told not in received.replace(b'": ', b'":'):
        seen.error = f"no {num_tokens} tokens in {received[:300]!r}"
    return seen


async def load(url: str, case: Case, args: argparse.Namespace) -> tuple[list[Seen], float]:
    """All requests of one case, and the seconds from the first sent to the last answered."""
    rng = random.Random(args.seed)
    num_requests = args.requests or round(max(32.0, args.seconds_of_requests * case.number))
    questions = _questions(case, args, rng)
    seen: list[Seen] = []
    start = time.perf_counter()

    async def client(numbers: Iterator[int]) -> None:
        for _ in numbers:
            body = next(questions)
            seen.append(await ask(url, body, body["max_tokens"]))

    if case.is_closed:
        numbers = iter(range(num_requests))
        await asyncio.gather(*(client(numbers) for _ in range(int(case.number))))
    else:
        tasks = []
        for _ in range(num_requests):
            tasks.append(asyncio.create_task(client(iter((0,)))))
            await asyncio.sleep(rng.expovariate(case.number))
        await asyncio.gather(*tasks)
    return seen, time.perf_counter() - start


def _questions(case: Case, args: argparse.Namespace, rng: random.Random) -> Iterator[dict[str, Any]]:
    models = args.models.split(",")
    number = 0
    while True:
        prompt = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=args.prompt_characters)) + "\n"
        body: dict[str, Any] = {
            "model": models[number % len(models)],
            "prompt": prompt,
            "max_tokens": 1 if case.shape == "one" else args.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": case.is_streamed,
        }
        if case.is_streamed:
            body["stream_options"] = {"include_usage": True}
        yield body
        number += 1


def measure(url: str, case: Case, args: argparse.Namespace) -> dict[str, float]:
    """Figures of one case. Raises: SystemExit when a request was not answered."""
    before = server_cpu_s(url)
    seen, seconds = asyncio.run(load(url, case, args))
    after = server_cpu_s(url)
    if failed := [one.error for one in seen if one.error is not None]:
        raise SystemExit(f"{url}, {case.name}: {len(failed)} of {len(seen)} requests failed; the first: {failed[0]}")
    num_tokens = sum(one.num_tokens for one in seen)
    figures = {"requests_per_s": len(seen) / seconds, "tokens_per_s": num_tokens / seconds}
    firsts = workload.percentiles([one.times_s[0] - one.sent_s for one in seen])
    figures |= {f"first_{key}": value for key, value in firsts.items()}
    if case.shape == "stream":
        gaps = [b - a for one in seen for a, b in zip(one.times_s, one.times_s[1:], strict=False)]
        figures |= {f"gap_{key}": value for key, value in workload.percentiles(gaps or [0.0]).items()}
    spent = {kind: after[kind] - before.get(kind, 0.0) for kind in after}
    for kind, cpu_s in sorted(spent.items()):
        figures[f"cpu_us_per_token_{kind}"] = 1e6 * cpu_s / num_tokens
        figures[f"cpu_ms_per_request_{kind}"] = 1e3 * cpu_s / len(seen)
    if "engine" in spent:
        outside_s = sum(spent.values()) - spent["engine"]
        figures["cpu_us_per_token_outside_engine"] = 1e6 * outside_s / num_tokens
        figures["cpu_ms_per_request_outside_engine"] = 1e3 * outside_s / len(seen)
    return figures


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--peer", help="address of another server, asked in turns with this one")
    parser.add_argument("--peer-name", default="peer", help="as it is called in the output")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--models", default="demo", help="base and adapters, asked in turn")
    parser.add_argument("--requests", type=int, help="of one round; default: by --seconds-of-requests")
    parser.add_argument("--seconds-of-requests", type=float, default=4.0, help="requests of a round: this times N")
    parser.add_argument("--prompt-characters", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    cases = [read_case(text) for text in args.cases.split(",")]
    servers = {"chorus": args.url} | ({args.peer_name: args.peer} if args.peer else {})
    for url in servers.values():  # warm-up
        for case in cases[:1]:
            measure(url, case, argparse.Namespace(**{**vars(args), "requests": 16}))
    rounds = []
    for _ in range(args.rounds):
        args.seed += 1  # no prompt twice: nothing is found in a prefix cache
        rounds.append({(name, case): measure(url, case, args) for case in cases for name, url in servers.items()})
    for case in cases:
        for name in servers:
            row: dict[str, Any] = {"case": case.name, "server": name}
            workload.print_figures(row | workload.spread([figures[name, case] for figures in rounds]), args)
        if args.peer:
            measures = ("tokens_per_s", "requests_per_s", "first_p50_ms")
            pairs = {key: [f["chorus", case][key] / f[args.peer_name, case][key] for f in rounds] for key in measures}
            ratios = {key: round(statistics.median(values), 3) for key, values in pairs.items()}
            workload.print_figures({"case": case.name, "peer": args.peer_name, "ratios": ratios}, args)


if __name__ == "__main__":
    main()
