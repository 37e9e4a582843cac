"""Deltas put together: what non-streaming replies, usage and final events are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from deployments.router.gateway import Opened
from deployments.router.streams import merge
from engine.request import FinishReason, OutputDelta, TokenLogprobs


@dataclass(slots=True)
class Sample:
    """One sample so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0

    def add(self, delta: OutputDelta) -> None:
        self.text += delta.text
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs or ())
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)

    @property
    def mean_logprob(self) -> float:
        """Mean log-probability of the chosen tokens; needs them to have been asked for."""
        return sum(item.logprob for item in self.logprobs) / max(1, len(self.logprobs))


@dataclass(slots=True)
class Usage:
    """Tokens counted for one HTTP request."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # prompt index -> tokens
    queue_s: float = 0.0  # the longest that a prompt waited for its first step

    def add(self, prompt: int, delta: OutputDelta) -> None:
        self.queue_s = max(self.queue_s, delta.queue_s)
        self.completion_tokens += len(delta.token_ids)
        self.cached[prompt] = max(self.cached.get(prompt, 0), delta.num_cached_tokens)

    @property
    def cached_tokens(self) -> int:
        return sum(self.cached.values())


def usage_of(opened: Opened) -> Usage:
    """Usage before the first delta."""
    return Usage(sum(len(ids) for ids in opened.prompts))


async def collect(
    opened: Opened, read: Callable[[OutputDelta], object] | None = None
) -> tuple[list[dict[int, Sample]], Usage]:
    """Waits for all samples: for each prompt its samples by index, and what they cost. `read` sees each delta first.

    Raises: Refused.
    """
    samples: list[dict[int, Sample]] = [{} for _ in opened.prompts]
    usage = usage_of(opened)
    async for prompt, delta in merge(opened.streams):
        if read is not None:
            read(delta)
        samples[prompt].setdefault(delta.sample_index, Sample()).add(delta)
        usage.add(prompt, delta)
    return samples, usage


def likeliest(samples: Mapping[int, Sample], count: int, *, with_logprobs: bool) -> dict[int, Sample]:
    """The `count` samples whose tokens are the likeliest on average, the best first."""
    best = sorted(samples.values(), key=lambda sample: -sample.mean_logprob)[:count]
    for sample in best if not with_logprobs else ():
        sample.logprobs = []
    return dict(enumerate(best))
