"""A running server under load: time to the first token, time between tokens, and throughput, as clients see them.

    make serve                                                    # in one terminal
    python -m benchmarks.serving --models demo,upper,rot13 --rates 2,8,32

Requests arrive at random (Poisson), so that some meet a busy server; `inf` sends all at once. Every request streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from dataclasses import dataclass, field

import httpx

from benchmarks import workload


@dataclass
class Seen:
    """One request as its client saw it. Seconds."""

    sent_s: float
    times_s: list[float] = field(default_factory=list)  # of the events that brought text
    error: str | None = None


async def ask(client: httpx.AsyncClient, model: str, prompt: str, max_tokens: int) -> Seen:
    seen = Seen(time.perf_counter())
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
    }
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                seen.error = f"{response.status_code}: {(await response.aread())[:200]!r}"
                return seen
            async for line in response.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:]).get("choices", [{}])[0].get("text"):
                    seen.times_s.append(time.perf_counter())
    except httpx.HTTPError as error:
        seen.error = repr(error)
    return seen


async def load(args: argparse.Namespace, rate: float) -> tuple[list[Seen], float]:
    """All requests of one rate, and the seconds from the first sent to the last answered."""
    rng = random.Random(args.seed)
    models = args.models.split(",")
    timeout = httpx.Timeout(600.0)
    async with httpx.AsyncClient(
        base_url=args.url, timeout=timeout, limits=httpx.Limits(max_connections=None)
    ) as client:
        start = time.perf_counter()
        tasks = []
        for i in range(args.requests):
            prompt = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ", k=args.prompt_characters)) + "\n"
            tasks.append(asyncio.create_task(ask(client, models[i % len(models)], prompt, args.new_tokens)))
            if rate != float("inf"):
                await asyncio.sleep(rng.expovariate(rate))
        seen = await asyncio.gather(*tasks)
        return list(seen), time.perf_counter() - start


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--models", default="demo", help="base and adapters, asked in turn")
    parser.add_argument("--rates", default="1,4,inf", help="requests per second")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-characters", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    asyncio.run(load(argparse.Namespace(**{**vars(args), "requests": min(8, args.requests)}), float("inf")))  # warm-up
    for rate in (float(rate) for rate in args.rates.split(",")):
        seen, seconds = asyncio.run(load(args, rate))
        good = [s for s in seen if s.error is None and s.times_s]
        if not good:
            raise SystemExit(f"no request was answered; the first error: {seen[0].error}")
        gaps = [b - a for s in good for a, b in zip(s.times_s, s.times_s[1:], strict=False)]
        figures = {
            "case": f"{rate:g} requests/s",
            "answered": len(good),
            "failed": len(seen) - len(good),
            "requests_per_s": round(len(good) / seconds, 2),
            "tokens_per_s": round(len(good) * args.new_tokens / seconds, 1),
            "ttft": workload.percentiles([s.times_s[0] - s.sent_s for s in good]),
            "itl": workload.percentiles(gaps or [0.0]),
        }
        workload.print_figures(figures, args)


if __name__ == "__main__":
    main()
