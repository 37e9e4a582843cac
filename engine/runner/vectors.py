"""Requests that are answered by numbers: hidden states become pooled vectors, logits log-probabilities of some tokens.

Sums are kept in float64 for a sequence whose prompt is computed in several steps, so that where it is cut is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.core.plan import RowOutput, SequenceSlice, SequenceStart, Vector
from engine.pooling import NextToken, Numbers, Pool, Pooling, PromptScores
from engine.to_device import HostCopy, upload

Head = Callable[[Tensor, int], Tensor]  # hidden states [n, H] of rows that use one LoRA slot -> logits [n, V]
HEAD_ROWS = 64  # whose logits are there at once
_NOT_FINITE = "the model's output for this sequence was not finite (NaN or infinity)"


@dataclass(slots=True)
class _State:
    numbers: Numbers
    num_tokens: int
    prompt: tuple[int, ...] = ()  # of PromptScores
    kept: Tensor | None = None  # float64 [H]: the sum so far, or the first row
    scores: list[Tensor] = field(default_factory=list)  # float32 [n, width]: of rows so far


class VectorStep:
    """What the vector slices of one step produced, on its way to the host."""

    def __init__(self, seq_ids: tuple[int, ...], vectors: list[Tensor]) -> None:
        """Shapes: vectors float32 [n], one for each of seq_ids, of any lengths."""
        self._seq_ids = seq_ids
        self._lengths = [len(vector) for vector in vectors]
        self._copy = HostCopy(torch.cat(vectors)) if vectors else None

    @property
    def vectors(self) -> tuple[Vector, ...]:
        """In the order of the slices. Waits for the device, but not for steps launched after this one."""
        if self._copy is None:
            return ()
        parts = self._copy.wait().split_with_sizes(self._lengths)
        return tuple(_vector(seq_id, part) for seq_id, part in zip(self._seq_ids, parts, strict=True))


def _vector(seq_id: int, values: Tensor) -> Vector:
    if not bool(values.isfinite().all()):
        return Vector(seq_id, b"", _NOT_FINITE)
    return Vector(seq_id, values.numpy().astype("<f4").tobytes())


class Vectors:
    """Keeps what sequences under way need. Used by the step thread alone."""

    def __init__(self) -> None:
        self._sequences: dict[int, _State] = {}

    def start(self, start: SequenceStart) -> None:
        """Remember a sequence that is answered by numbers; one that is known already starts anew."""
        assert start.numbers is not None, "a sequence that samples is not this one's"
        self._sequences[start.seq_id] = _State(start.numbers, len(start.prompt_token_ids), start.prompt_token_ids)

    def end(self, seq_id: int) -> None:
        """Forget a sequence; one that is not known is forgotten already."""
        self._sequences.pop(seq_id, None)

    def scores_prompts(self, slices: tuple[SequenceSlice, ...]) -> bool:
        """Whether any of these slices needs the model's head."""
        return any(
            (state := self._sequences.get(piece.seq_id)) is not None and isinstance(state.numbers, PromptScores)
            for piece in slices
        )

    def take(
        self, slices: tuple[SequenceSlice, ...], hidden: Tensor | None, logits: Tensor | None, head: Head | None = None
    ) -> VectorStep:
        """Shapes: hidden [T, H], the rows of the whole step (None: no slice pools); logits [N, V], a row for each
        slice that puts out logits (None: none does). They may be overwritten afterwards. `head`: hidden states of rows
        that use one LoRA slot to logits; None: no slice scores its prompt.
        """
        seq_ids: list[int] = []
        vectors: list[Tensor] = []
        num_scored = 0
        for piece in slices:
            if piece.output not in (RowOutput.LOGITS, RowOutput.PART, RowOutput.POOLED):
                continue
            state = self._sequences[piece.seq_id]
            if isinstance(state.numbers, NextToken):
                assert logits is not None, "the step has logits of such rows"
                vector = _next_token(logits[num_scored], state.numbers)
                num_scored += 1
            else:
                assert hidden is not None, "the step has hidden states"
                vector = self._rows(state, piece, hidden, head)
                if vector is None:
                    continue
            seq_ids.append(piece.seq_id)
            vectors.append(vector)
        return VectorStep(tuple(seq_ids), vectors)

    def _rows(self, state: _State, piece: SequenceSlice, hidden: Tensor, head: Head | None) -> Tensor | None:
        """Takes in the rows of a slice. Returns: the vector, if they were the last."""
        is_last = piece.output is not RowOutput.PART
        if isinstance(state.numbers, PromptScores):
            assert head is not None, "the step has the model's head"
            _score(state, state.numbers, piece, hidden, head)
            return _scored(state, hidden.device) if is_last else None
        assert isinstance(state.numbers, Pooling)
        _pool(state, state.numbers, piece, hidden)
        return _pooled(state, state.numbers) if is_last else None


def _score(state: _State, asked: PromptScores, piece: SequenceSlice, hidden: Tensor, head: Head) -> None:
    """Each row says something of the token behind it; the last of the prompt, of none."""
    if piece.position == 0:
        state.scores = []
    targets = state.prompt[piece.position + 1 : piece.position + piece.num_rows + 1]
    for start in range(0, len(targets), HEAD_ROWS):
        some = upload(list(targets[start : start + HEAD_ROWS]), hidden.device)[:, None]
        first = piece.row_start + start
        logits = head(hidden[first : first + len(some)], piece.lora_slot).float()
        chosen = logits.gather(1, some)
        rank = (logits > chosen).sum(dim=1, keepdim=True) + 1
        normaliser = logits.double().logsumexp(dim=1, keepdim=True)
        top, ids = logits.topk(min(asked.top, logits.shape[1]), dim=1)
        parts = (chosen.double() - normaliser, rank, ids, top.double() - normaliser)
        state.scores.append(torch.cat([part.float() for part in parts], dim=1))


def _scored(state: _State, device: torch.device) -> Tensor:
    """float32 [(tokens - 1) * width]."""
    scores, state.scores = state.scores, []
    return torch.cat(scores).flatten() if scores else torch.zeros(0, device=device)


def _pool(state: _State, pooling: Pooling, piece: SequenceSlice, hidden: Tensor) -> None:
    rows = hidden[piece.row_start : piece.row_end]
    if pooling.pool is Pool.MEAN:
        total = rows.sum(dim=0, dtype=torch.float64)
        state.kept = total if state.kept is None or piece.position == 0 else state.kept + total
    elif pooling.pool is Pool.CLS:
        if piece.position == 0:
            state.kept = rows[0].double()
    else:
        state.kept = rows[-1].double()


def _pooled(state: _State, pooling: Pooling) -> Tensor:
    """float32 [hidden], or [dimensions]."""
    vector = state.kept
    assert vector is not None, "the first row was computed"
    state.kept = None
    if pooling.pool is Pool.MEAN:
        vector = vector / state.num_tokens
    if pooling.dimensions is not None:
        vector = vector[: pooling.dimensions]
    if pooling.normalize:
        vector = vector / vector.norm().clamp(min=1e-12)
    return vector.float()


def _next_token(logits: Tensor, asked: NextToken) -> Tensor:
    """[V] -> float32, one for each token asked for."""
    ids = upload(list(asked.token_ids), logits.device)
    values = logits.double()
    return (values[ids] - values.logsumexp(dim=0)).float()
