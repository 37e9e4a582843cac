"""How a token is chosen from a row of logits: pure functions of tensors, each row by itself.

A row's filters keep a set of tokens:
  top_k   the k most likely; of equal logits the lower token id comes first
  top_p   the smallest set of most likely tokens that holds top_p of what top_k left; ties as above
  min_p   tokens at least min_p times as likely as the most likely one
  typical_p  of what these left, the tokens whose information (minus the log of their probability) is nearest to its
          expectation, nearest first until they hold typical_p; those as near as the last one stay too
          (Meister et al., "Locally typical sampling", arXiv 2202.00666, as transformers reads it)
Without typical_p the most likely token always stays. The kept tokens, in order of token id, then share (0, 1) in
proportion to their probabilities, and the row's uniform number falls on one of them (inverse CDF). Token order, not
rank, because two tokens that are almost equally likely would swap ranks with the last bit of a logit, and shares must
not jump.

Logits are float32. Without filters, probabilities are float32, summed over blocks of 64 tokens (on a CPU
by a compiled kernel, if there is one), and the blocks' sums are added up in float64. Filters work on a shortlist of the
most likely tokens, in float64 throughout. The path a row takes depends on that row alone, so the other rows of a batch
change no bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.native.library import NativeLibrary
from engine.runner import shortlist
from engine.runner.shortlist import Shortlist

BLOCK = 64  # tokens summed up by one maximum or one sum
_NUCLEUS = 256  # shortlist that is tried first when only top_p says how long it must be
TYPICAL_ROWS = 2
_MARGIN = 1e-3  # slack of bounds that may let in too many tokens but never too few


@dataclass(frozen=True, slots=True)
class Filters:
    """Parameters of K rows. Shapes: each [K]."""

    temperature: Tensor  # float32, > 0
    top_k: Tensor  # int64; 0: all
    top_p: Tensor  # float64
    min_p: Tensor  # float64
    typical_p: Tensor  # float64; 1: all
    typical: Tensor | None  # indices of the rows with typical_p; None: none has it
    nucleus: Tensor | None  # indices of the rows with top_p alone; None: all rows are

    def take(self, rows: Tensor) -> Filters:
        mass = self.typical_p[rows]
        typical = None if self.typical is None else (mass < 1.0).nonzero()[:, 0]
        return Filters(
            self.temperature[rows], self.top_k[rows], self.top_p[rows], self.min_p[rows], mass, typical, None
        )


def block_max(logits: Tensor) -> Tensor:
    """Largest logit of each block of 64 tokens. Shapes: [K, V] -> [K, ceil(V / 64)]."""
    return _per_block(logits, lambda x: x.amax(-1))


def argmax(logits: Tensor, blocks: Tensor) -> Tensor:
    """The most likely token, the lowest id among equals. Shapes: [K, V], [K, ceil(V / 64)] -> [K]."""
    block = blocks.argmax(-1)
    return block * BLOCK + logits.gather(1, _ids_of(block, logits.shape[1])).argmax(-1)


def choose(
    logits: Tensor, blocks: Tensor, u: Tensor, temperature: Tensor, library: NativeLibrary | None = None
) -> Tensor:
    """Choose by temperature alone. Shapes: [K, V], [K, ceil(V / 64)], [K], [K] -> [K]."""
    top = blocks.amax(-1)
    sums = _block_weights(logits, top, temperature, library)
    upto = shortlist.running_sum(sums)
    target = _below(u * upto[:, -1], upto[:, -1])
    block = _first_beyond(sums, upto, target)
    # Within the block: what is left of the target, kept inside the block however the two sums are rounded.
    target = target - (upto - sums).gather(1, block[:, None])[:, 0]
    ids = _ids_of(block, logits.shape[1])
    inside = _weights(logits.gather(1, ids), top, temperature).double()
    inside.masked_fill_(block[:, None] * BLOCK + torch.arange(BLOCK, device=ids.device) >= logits.shape[1], 0.0)
    upto = shortlist.running_sum(inside)
    return ids.gather(1, _first_beyond(inside, upto, _below(target, upto[:, -1]))[:, None])[:, 0]


def choose_filtered(
    logits: Tensor, blocks: Tensor, u: Tensor, filters: Filters, library: NativeLibrary | None = None
) -> Tensor:
    """Choose with top_k, top_p or min_p. Shapes: [K, V], [K, ceil(V / 64)], [K] -> [K]."""
    total = _nucleus_total(logits, blocks, filters, library)
    if not shortlist.pays(logits):
        return _choose_from(shortlist.everything(logits), u, filters, total)[0]
    bound = _min_p_bound(blocks, filters)
    likely = _kth_block(blocks, torch.where(filters.top_k > 0, filters.top_k, _NUCLEUS))
    likely.masked_fill_((filters.top_k == 0) & (filters.top_p == 1.0), -math.inf)  # min_p alone says it all
    token_ids, fits = _choose_from(shortlist.above(logits, torch.maximum(likely, bound)), u, filters, total)
    fits |= bound >= likely
    if not bool(fits.all()):
        rest = (~fits).nonzero()[:, 0]
        filters, total, logits = filters.take(rest), total[rest], logits[rest]
        bound = torch.maximum(bound[rest], _nucleus_bound(blocks[rest], filters, total, logits.shape[1]))
        token_ids[rest] = _choose_from(shortlist.above(logits, bound), u[rest], filters, total)[0]
    return token_ids


def top_logprobs(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k most likely tokens, best first, of equals the lower id first.

    Shapes: [K, V] -> ids [K, k], log-probabilities [K, k] and the log of the normaliser [K], float64.
    """
    blocks = block_max(logits)
    top = blocks.amax(-1)
    normaliser = top.double() + _total_weight(logits, blocks, torch.ones_like(top)).log()
    if k == 0:
        none = logits.new_empty((logits.shape[0], 0))
        return none.long(), none.double(), normaliser
    if shortlist.pays(logits) and k <= blocks.shape[1]:
        best = shortlist.above(logits, _kth_block(blocks, torch.full_like(top, k, dtype=torch.int64)))
    else:
        best = shortlist.everything(logits)
    values, order = best.values.sort(dim=-1, descending=True, stable=True)
    return best.token_ids.gather(1, order[:, :k]), values[:, :k].double() - normaliser[:, None], normaliser


def _weights(logits: Tensor, top: Tensor, temperature: Tensor) -> Tensor:
    """Probabilities relative to the most likely token's, float32. Shapes: [K, M], [K], [K] -> [K, M]."""
    return (logits - top[:, None]).div_(temperature[:, None]).exp_()


def _block_weights(logits: Tensor, top: Tensor, temperature: Tensor, library: NativeLibrary | None) -> Tensor:
    """Sum of `_weights` over each block of 64 tokens, float64. Shapes: [K, V], [K], [K] -> [K, ceil(V / 64)]."""
    if library is None:
        return _per_block(_weights(logits, top, temperature), lambda x: x.sum(-1)).double()
    logits, top, temperature = logits.contiguous(), top.contiguous(), temperature.contiguous()
    num_rows, num_columns = logits.shape
    sums = torch.empty((num_rows, -(-num_columns // BLOCK)), dtype=torch.float32)
    library.block_weights(
        logits.data_ptr(), top.data_ptr(), temperature.data_ptr(), sums.data_ptr(), num_rows, num_columns
    )
    return sums.double()


def _total_weight(logits: Tensor, blocks: Tensor, temperature: Tensor, library: NativeLibrary | None = None) -> Tensor:
    """Sum of `_weights`, float64 [K]."""
    return _block_weights(logits, blocks.amax(-1), temperature, library).sum(-1)


def _nucleus_total(logits: Tensor, blocks: Tensor, filters: Filters, library: NativeLibrary | None) -> Tensor:
    """`_total_weight` of the rows with top_p alone, 1 for the others: where there is top_k, the shortlist holds it."""
    rows = filters.nucleus
    if rows is None:
        return _total_weight(logits, blocks, filters.temperature, library)
    total = torch.ones_like(filters.top_p)
    if len(rows):
        total[rows] = _total_weight(logits[rows], blocks[rows], filters.temperature[rows], library)
    return total


def _choose_from(best: Shortlist, u: Tensor, filters: Filters, total: Tensor) -> tuple[Tensor, Tensor]:
    """Choose from a shortlist, and say of which rows it holds all that top_k and top_p keep.

    Shapes: M tokens, u and total [K] -> token ids [K], fits [K] bool.
    """
    kept, fits = _kept(best, filters, total)
    top = best.values.amax(-1, keepdim=True).double()
    shares = shortlist.exp((best.values.double() - top) / filters.temperature[:, None].double())
    shares.masked_fill_(~kept | (shares < filters.min_p[:, None]), 0.0)
    # A few rows at a time: it takes more memory than all else, and is rare.
    for rows in () if filters.typical is None else filters.typical.split(TYPICAL_ROWS):
        few = shares[rows]
        shares[rows] = few.masked_fill(~_typical(few, filters.typical_p[rows]), 0.0)
    upto_id = shortlist.running_sum(shares)
    place = _first_beyond(shares, upto_id, _below(u * upto_id[:, -1], upto_id[:, -1]))
    return best.token_ids.gather(1, place[:, None])[:, 0], fits


def _kept(best: Shortlist, filters: Filters, total: Tensor) -> tuple[Tensor, Tensor]:
    """What top_k and top_p keep of a shortlist, [K, M] bool, and of which rows it holds all of that, [K] bool."""
    ranked = shortlist.sort_falling(best.values)
    temperature = filters.temperature[:, None].double()
    top = ranked[:, :1].double()
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    num_ranks = torch.where(filters.top_k > 0, torch.minimum(filters.top_k, best.lengths), best.lengths)
    weights = shortlist.exp((ranked.double() - top) / temperature)
    weights.masked_fill_(rank >= num_ranks[:, None], 0.0)
    upto = shortlist.running_sum(weights)
    total = torch.where(filters.top_k > 0, upto[:, -1], total)
    limit = torch.where(filters.top_p < 1.0, filters.top_p * total, math.inf)
    num_kept = ((upto - weights < limit[:, None]) & (rank < num_ranks[:, None])).sum(-1).clamp(min=1)
    # Back in token order: all above the last kept value are kept, and of those equal to it the first few.
    edge = ranked.gather(1, num_kept[:, None] - 1)
    tied = best.values == edge
    num_tied = num_kept - (ranked > edge).sum(-1)
    kept = (best.values > edge) | (tied & (shortlist.running_sum(tied) <= num_tied[:, None]))
    return kept, torch.where(filters.top_k > 0, best.lengths >= filters.top_k, upto[:, -1] >= limit)


def _typical(shares: Tensor, mass: Tensor) -> Tensor:
    """Which tokens typical_p keeps of what the other filters left. Shapes: [K, M], [K] -> [K, M] bool."""
    probabilities = shares / shortlist.running_sum(shares)[:, -1:]
    information = -probabilities.log()
    of_each = torch.where(probabilities > 0, probabilities * information, 0.0)
    distance = (information - shortlist.running_sum(of_each)[:, -1:]).abs()  # infinite for tokens that are out
    nearest, order = shortlist.sort_rising(distance)
    upto = shortlist.running_sum(probabilities.gather(1, order))
    last = (upto < mass[:, None]).sum(-1).clamp(max=shares.shape[1] - 1)
    return distance <= nearest.gather(1, last[:, None])


def _first_beyond(shares: Tensor, upto: Tensor, target: Tensor) -> Tensor:
    """Index of the first positive share at whose end the running sum exceeds the target. [K, M] twice, [K] -> [K]."""
    beyond = (upto > target[:, None]) & (shares > 0)
    # A parallel running sum (CUDA) may end a last bit below its own maximum: then the largest share is taken.
    return torch.where(beyond.any(-1), beyond.to(torch.uint8).argmax(-1), shares.argmax(-1))


def _below(target: Tensor, total: Tensor) -> Tensor:
    """The target, at most the largest number below the total: u < 1, but u * total may round up to it."""
    return torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))


def _kth_block(blocks: Tensor, k: Tensor) -> Tensor:
    """The k-th largest block maximum: at least k tokens, and so the k most likely ones, are not below it. [K]."""
    k = k.clamp(max=blocks.shape[1])
    return blocks.topk(int(k.max()), dim=-1).values.gather(1, k[:, None] - 1)[:, 0]


def _min_p_bound(blocks: Tensor, filters: Filters) -> Tensor:
    """A logit below which every token fails min_p; -inf for rows without, and for rows with top_k: what top_p counts
    there is every token that top_k left. float32 [K]."""
    bound = _logit_of(filters.min_p.log(), blocks, filters)
    return bound.masked_fill_((filters.min_p == 0.0) | (filters.top_k > 0), -math.inf)


def _nucleus_bound(blocks: Tensor, filters: Filters, total: Tensor, vocab_size: int) -> Tensor:
    """A logit below which no token of the nucleus lies: tokens lighter than (1 - top_p) * total / V, all together,
    weigh less than what top_p leaves out. -inf for rows with top_k or whose bound would drown in rounding. [K]."""
    left_out = 1.0 - filters.top_p
    bound = _logit_of((left_out * total / vocab_size).log(), blocks, filters)
    return bound.masked_fill_((filters.top_k > 0) | (left_out < _MARGIN), -math.inf)


def _logit_of(log_weight: Tensor, blocks: Tensor, filters: Filters) -> Tensor:
    """The logit of a weight relative to the most likely token, with a margin for rounding, float32 [K]."""
    top = blocks.amax(-1).double()
    return (top + filters.temperature.double() * (log_weight - _MARGIN) - 1e-6 * top.abs()).float()


def _ids_of(block: Tensor, vocab_size: int) -> Tensor:
    """Token ids of a block, the last block filled up with the last token. [K] -> [K, 64]."""
    ids = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
    return ids.clamp_(max=vocab_size - 1)


def _per_block(x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce each block of 64 columns, the last one may be shorter. [K, V] -> [K, ceil(V / 64)]."""
    whole = x.shape[1] - x.shape[1] % BLOCK
    parts = []
    if whole:
        parts.append(reduce(x[:, :whole].unflatten(1, (-1, BLOCK))))
    if whole < x.shape[1]:
        parts.append(reduce(x[:, None, whole:]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
