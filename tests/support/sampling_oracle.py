"""The sampler's meaning, one row at a time, in float64 and plain Python: slow and obvious."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from engine.request import SamplingParams

_MASK = 0xFFFFFFFF


def philox(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 on Python integers (Salmon et al., SC 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, sample_index: int, output_position: int) -> float:
    words = philox((output_position, sample_index, 0, 0), (seed & _MASK, seed >> 32))
    return (((words[0] << 20) | (words[1] >> 12)) + 0.5) / 2**52


@dataclass(frozen=True)
class Row:
    """Everything the token of one row depends on."""

    logits: Sequence[float]
    params: SamplingParams
    seed: int = 0
    sample_index: int = 0
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()
    eos: tuple[int, ...] = ()


def token(row: Row) -> tuple[int, float]:
    """The token, and how far (in probability) the draw was from another one: below 1e-6 rounding may decide."""
    logits = changed(row)
    if row.params.greedy:
        best = max(logits)
        rest = [x for i, x in enumerate(logits) if i != logits.index(best)]
        return logits.index(best), best - max(rest, default=-math.inf)
    kept, slack = keep(logits, row.params)
    u = uniform(row.seed, row.sample_index, len(row.output))
    total = math.fsum(kept.values())
    upto = 0.0
    for token_id in sorted(kept):
        upto += kept[token_id] / total
        if upto > u:
            return token_id, min(slack, upto - u, u - (upto - kept[token_id] / total))
    raise AssertionError("shares add up to less than u")


def changed(row: Row) -> list[float]:
    """Logits after bias, penalties and bans."""
    p = row.params
    logits = [float(x) for x in row.logits]
    for i, bias in p.logit_bias.items():
        logits[i] += bias
    for i in set(row.prompt) | set(row.output):
        logits[i] = logits[i] * p.repetition_penalty if logits[i] < 0 else logits[i] / p.repetition_penalty
    for i, count in Counter(row.output).items():
        logits[i] -= p.presence_penalty + p.frequency_penalty * count
    if p.allowed_token_ids is not None:
        logits = [x if i in p.allowed_token_ids else -math.inf for i, x in enumerate(logits)]
    for word in p.bad_words_token_ids:
        if len(word) == 1:
            logits[word[0]] = -math.inf
    if len(row.output) < p.min_tokens:
        logits = _banned(logits, {*p.stop_token_ids, *(() if p.ignore_eos else row.eos)})
    ends = {word[-1] for word in p.bad_words_token_ids if len(word) > 1 and row.output[1 - len(word) :] == word[:-1]}
    return _banned(logits, ends)


def _banned(logits: list[float], token_ids: set[int]) -> list[float]:
    """Without these; but a token must come."""
    left = [-math.inf if i in token_ids else x for i, x in enumerate(logits)]
    return logits if max(left) == -math.inf else left


def keep(logits: list[float], p: SamplingParams) -> tuple[dict[int, float], float]:
    """Weights of the tokens that the filters keep, and the smallest distance of a token from a filter's edge."""
    best = max(logits)
    ranked = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: p.top_k or None]
    weights = {i: math.exp((logits[i] - best) / p.temperature) for i in ranked}
    total = math.fsum(weights.values())
    kept: dict[int, float] = {}
    slack, upto = math.inf, 0.0
    for i in ranked:
        if p.top_p < 1.0:
            slack = min(slack, abs(upto / total - p.top_p))
            if upto >= p.top_p * total and kept:
                break
        upto += weights[i]
        slack = min(slack, abs(weights[i] - p.min_p) if p.min_p else math.inf)
        if weights[i] >= p.min_p:
            kept[i] = weights[i]
    return (kept, slack) if p.typical_p == 1.0 else _typical(kept, p.typical_p, slack)


def _typical(kept: dict[int, float], mass: float, slack: float) -> tuple[dict[int, float], float]:
    total = math.fsum(kept.values())
    shares = {i: weight / total for i, weight in kept.items() if weight > 0.0}
    entropy = math.fsum(-share * math.log(share) for share in shares.values())
    distances = {i: abs(-math.log(share) - entropy) for i, share in shares.items()}
    upto, edge = 0.0, math.inf
    for i in sorted(distances, key=lambda i: distances[i]):
        upto += shares[i]
        slack = min(slack, abs(upto - mass))
        if upto >= mass:
            edge = distances[i]
            break
    gaps = [abs(distance - edge) for distance in distances.values() if distance != edge]
    return {i: kept[i] for i in shares if distances[i] <= edge}, min(slack, *gaps, math.inf)
