"""What the sampler takes at its peak, in bytes for each logit of a step. tests/runner/test_sampler_memory.py counts.

Filters hold a row's tokens sorted, their weights and running sums in float64, and both again in the order of token ids;
log-probabilities are sorted too, with the workspace of a GPU's sort.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

Use = Literal["greedy", "temperature", "filters", "penalties", "logprobs"]
_BYTES: dict[Use, int] = {"greedy": 8, "temperature": 9, "filters": 46, "penalties": 29, "logprobs": 42}
_COPY_BYTES = 4  # float32
_ROW_BYTES = 16 << 10  # of tensors that are no longer for a larger vocabulary

EVERY_USE: frozenset[Use] = frozenset(_BYTES)
HISTORY_BYTES = 5  # for each token of the vocabulary and sequence with penalties, as long as it runs
# For each token of the vocabulary, however many rows: token ids, ranks, what a broken row becomes; and what two rows
# with typical_p (`choice.TYPICAL_ROWS`) take beyond their share.
ONCE_BYTES = 20 + 100


def sampled_row_bytes(
    vocab_size: int, logit_bytes: int, uses: Collection[Use] = EVERY_USE, *, mixed: bool = True
) -> int:
    """Of one row, its logits of `logit_bytes` each included. `mixed`: other rows of the step are used otherwise."""
    per_logit = logit_bytes + max(_BYTES[use] for use in uses)
    if set(uses) == {"greedy"} and logit_bytes == _COPY_BYTES:
        per_logit -= _COPY_BYTES - 1  # they are looked at as they are
    if "logprobs" in uses and "penalties" in uses:
        per_logit += _COPY_BYTES  # logits as the model gave them
    if mixed:
        per_logit += _COPY_BYTES  # rows of one kind, taken out
    return vocab_size * per_logit + _ROW_BYTES
