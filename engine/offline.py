"""What goes into offline use and what comes out: prompts as they were given, jobs under way, outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.errors import InvalidRequest, RequestFailed
from engine.output import merge
from engine.pooling import as_floats
from engine.request import FinishReason, OutputDelta, OutputError, Request, TokenLogprobs

if TYPE_CHECKING:
    from engine.lora.image import AdapterImage
    from engine.stats import RequestMetrics

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleOutput:
    """One sample of a prompt."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: OutputError | None = None  # set exactly when finish_reason is ERROR


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOutput:
    """What became of one prompt. The short properties speak of the first sample."""

    prompt: str | None  # None: it was given as token ids
    prompt_token_ids: tuple[int, ...]
    adapter: str | None  # name
    samples: tuple[SampleOutput, ...]
    metrics: RequestMetrics

    @property
    def text(self) -> str:
        return self.samples[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.samples[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.samples[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprobs, ...] | None:
        return self.samples[0].logprobs

    @property
    def error(self) -> OutputError | None:
        return self.samples[0].error


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingOutput:
    """The vector of one prompt."""

    prompt: str | None  # None: it was given as token ids
    prompt_token_ids: tuple[int, ...]
    adapter: str | None  # name
    embedding: tuple[float, ...]  # empty if it failed
    error: OutputError | None = None
    metrics: RequestMetrics


@dataclass(slots=True)
class Job:
    """One prompt under way: its request, and the deltas of each sample so far."""

    request: Request
    prompt: str | None
    adapter: str | None
    image: AdapterImage | None
    deltas: dict[int, list[OutputDelta]] = field(default_factory=dict)
    num_ended: int = 0

    @property
    def done(self) -> bool:
        return self.num_ended == self.request.params.n

    def add(self, delta: OutputDelta) -> None:
        self.deltas.setdefault(delta.sample_index, []).append(delta)
        self.num_ended += delta.finish_reason is not None

    def raw_vector(self) -> bytes:
        """Of a job that is answered by numbers. Raises: RequestFailed."""
        (delta,) = self.deltas[self.request.sample_index]
        if delta.error is not None:
            raise RequestFailed(delta.error.message)
        return delta.vector or b""

    def vector(self) -> tuple[tuple[float, ...], OutputError | None]:
        """Of a job that is answered by numbers."""
        (delta,) = self.deltas[self.request.sample_index]
        return as_floats(delta.vector or b""), delta.error

    def output(self, metrics: RequestMetrics) -> GenerationOutput:
        return GenerationOutput(
            prompt=self.prompt,
            prompt_token_ids=self.request.prompt_token_ids,
            adapter=self.adapter,
            samples=tuple(_sample(merge(self.deltas[index])) for index in sorted(self.deltas)),
            metrics=metrics,
        )


def _sample(delta: OutputDelta) -> SampleOutput:
    assert delta.finish_reason is not None, "a job is read out only when each sample has its terminal delta"
    return SampleOutput(
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=delta.finish_reason,
        stop_reason=delta.stop_reason,
        logprobs=delta.logprobs,
        error=delta.error,
    )


def listed(prompts: Any) -> list[Prompt]:
    """One prompt or several, as a list. Raises: InvalidRequest for what is neither text nor a list."""
    if isinstance(prompts, str) or (_is_list(prompts) and len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]
    for prompt in prompts if _is_list(prompts) else [prompts]:
        if not isinstance(prompt, str) and not _is_list(prompt):
            raise InvalidRequest(
                "prompts", f"a prompt is a text or a list of token ids, and {prompt!r} is a {type(prompt).__name__}"
            )
    return list(prompts)


def per_prompt(param: str, value: Any, num_prompts: int, kind: Any) -> list[Any]:
    """`value` for every prompt, whether it was one for all or a list. Raises: InvalidRequest naming `param`."""
    values = [value] * num_prompts if isinstance(value, kind) else list(value) if _is_list(value) else [value]
    for item in values:
        if not isinstance(item, kind):
            raise InvalidRequest(param, f"{item!r} is a {type(item).__name__}")
    if len(values) != num_prompts:
        raise InvalidRequest(param, f"{len(values)} values for {num_prompts} prompts; give one for all or one for each")
    return values


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
