"""What the model says of a prompt's own tokens, as the OpenAI endpoints tell it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from deployments.asks import Ask
from deployments.router.gateway import Gateway
from deployments.router.prompts import Prompts
from engine.pooling import PromptScores, PromptToken, prompt_tokens
from engine.request import SamplingParams

_NO_SAMPLES = SamplingParams(max_tokens=1)


@dataclass(frozen=True, slots=True)
class Scored:
    """The prompts of a request as token ids, and what is said of each token but the first of each."""

    ids: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[PromptToken, ...], ...]


async def score_prompts(gateway: Gateway, ask: Ask, tenant: str, top: int) -> Scored:
    """Raises: as `Gateway.open`."""
    request_id = gateway.admit(ask, tenant)
    ids = await gateway.prompts.encode(ask)
    asked = PromptScores(top=top)
    numbers = replace(ask, params=_NO_SAMPLES, numbers=asked, bad_words=())
    long = [one for one in ids if len(one) > 1]
    answers = iter(await gateway.vectors_of([(numbers, one) for one in long], tenant, request_id))
    tokens = [prompt_tokens(next(answers).vector, asked, one) if len(one) > 1 else () for one in ids]
    return Scored(tuple(ids), tuple(tokens))


def as_tokens(ask: Ask, ids: Sequence[tuple[int, ...]]) -> Ask:
    """`ask` for prompts that are tokens already."""
    return replace(ask, prompts=tuple(ids), truncate=None)


def prompt_logprobs(prompts: Prompts, tokens: Sequence[PromptToken], top: int) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: of the first token null, of others what might have stood there, by token id."""
    told: list[dict[str, Any] | None] = [None]
    for one in tokens:
        entries: dict[str, Any] = {}
        for rank, (token_id, logprob) in enumerate(one.top[:top], start=1):
            entries[str(token_id)] = _entry(prompts, token_id, logprob, rank)
        entries.setdefault(str(one.token_id), _entry(prompts, one.token_id, one.logprob, one.rank))
        told.append(entries)
    return told


def _entry(prompts: Prompts, token_id: int, logprob: float, rank: int) -> dict[str, Any]:
    text = prompts.token_bytes(None, token_id).decode(errors="replace")
    return {"logprob": logprob, "rank": rank, "decoded_token": text}
