"""The judge of whole-engine tests: transformers (and PEFT), asked what it would have said at every position.

A greedy text equals `generate` token for token exactly if each token is the oracle's argmax after the tokens before
it, so one batched forward judges a whole text. A token that is not the argmax is forgiven only in a near-tie (the
oracle's lead is below NEAR_TIE and the token is within it); the comparison then goes on behind that token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from tests.support.tiny_model import PAD_ID, reference_model

NEAR_TIE = 1e-4  # logits
MAX_NEAR_TIES = 0.005  # share of tokens

tally: Counter[str] = Counter()  # printed at the end of the run


@dataclass(frozen=True)
class Text:
    """What the engine made of a prompt."""

    prompt: tuple[int, ...]
    output: tuple[int, ...]


def assert_greedy(base: Path, adapter: Path | None, texts: Sequence[Text]) -> None:
    """Every output is what the oracle says, greedily, and there is one: a request that failed has none."""
    assert all(text.output for text in texts), "a text is empty"
    fresh = [text for text in dict.fromkeys(texts) if (base, adapter, text) not in _verdicts]
    for text, wrong in zip(fresh, _judge(base, adapter, fresh), strict=True):
        _verdicts[base, adapter, text] = wrong
    num_tokens = sum(len(text.output) for text in texts)
    num_ties = 0
    for text in texts:
        for position, token, expected, lead, behind in _verdicts[base, adapter, text]:
            assert max(lead, behind) < NEAR_TIE, (
                f"{base.name} with {adapter and adapter.name}, prompt of {len(text.prompt)} tokens, output position "
                f"{position}: {token} instead of {expected}, whose lead is {lead:.2g} and over that token {behind:.2g}"
            )
            num_ties += 1
    tally.update(tokens=num_tokens, near_ties=num_ties)
    assert num_ties <= max(1, MAX_NEAR_TIES * num_tokens)


Wrong = tuple[int, int, int, float, float]  # position, token, expected, the oracle's lead, its lead over the token
_verdicts: dict[tuple[Path, Path | None, Text], tuple[Wrong, ...]] = {}


@torch.no_grad()
def _judge(base: Path, adapter: Path | None, texts: Sequence[Text]) -> list[tuple[Wrong, ...]]:
    if not texts:
        return []
    # Padding on the right: no real token sees it.
    longest = max(len(text.prompt) + len(text.output) for text in texts)
    rows = [[*text.prompt, *text.output] for text in texts]
    ids = torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logits = reference_model(base, adapter)(input_ids=ids, attention_mask=mask).logits
    return [_wrong_tokens(text, logits[i, len(text.prompt) - 1 :]) for i, text in enumerate(texts)]


def _wrong_tokens(text: Text, logits: torch.Tensor) -> tuple[Wrong, ...]:
    """`logits` begin with those that chose the first output token."""
    output = torch.tensor(text.output)
    logits = logits[: len(text.output)]
    best, expected = logits.topk(2).values, logits.argmax(-1)
    behind = best[:, 0] - logits.gather(1, output[:, None])[:, 0]
    return tuple(
        (i, int(output[i]), int(expected[i]), float(best[i, 0] - best[i, 1]), float(behind[i]))
        for i in (output != expected).nonzero()[:, 0].tolist()
    )


@lru_cache(maxsize=64)
def block_bytes(base: Path, block_size: int) -> int:
    """Bytes of one KV block of a float32 model."""
    from engine.config import EngineConfig
    from engine.model.loader import load_model

    loaded = load_model(EngineConfig(model=str(base), dtype="float32"))
    return loaded.capabilities.kv_shape(block_size, loaded.dtype).block_bytes
