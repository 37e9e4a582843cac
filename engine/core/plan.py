"""A step as a value: the whole device step in order, and what came of it. Frozen, picklable, standard library only.

The runner executes a plan strictly in this order:
  1. `ends`         forget the state kept for these sequences
  2. `adapter_ops`  evict and load adapters (LoRA slots)
  3. `block_copies` copy-on-write copies of KV blocks
  4. `starts`       remember prompt, outputs so far and parameters of sequences that join
  5. `slices`       one forward over all rows; a sample from the last row of each slice that asks for one. With guesses,
                    a sample for each of them and one more: those count as long as the guess before them was right.
                    Slices of requests for numbers sample nothing: their rows' hidden states, or logits of the last
                    row, become a vector

Workers of a tensor-parallel group see plans and nothing else. What there is one of per sequence and step is a named
tuple, which is made in a quarter of the time of a frozen dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from engine.pooling import Numbers
from engine.request import SamplingParams, TokenLogprobs

NO_LORA = 0  # LoRA slot 0 is the base model


class RowOutput(Enum):
    """What the last row of a slice puts out, and with guesses the rows before each of them too."""

    NONE = "none"
    SAMPLE = "sample"
    LOGITS = "logits"  # as log-probabilities of some tokens: the answer to a request for them
    PART = "part"  # of a pooled vector: these rows count, and more follow
    POOLED = "pooled"  # the vector of these rows and of the parts before

    @property
    def is_vector(self) -> bool:
        """Whether the slice is answered by a vector, and so its request."""
        return self is RowOutput.LOGITS or self is RowOutput.POOLED


@dataclass(frozen=True, slots=True)
class TokenRef:
    """An input token that is not known on the host yet: the sample of row `row` of plan `plan_id`, still in flight."""

    plan_id: int
    row: int


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """Copy all layers of KV block `src` to block `dst` (copy-on-write)."""

    src: int
    dst: int


@dataclass(frozen=True, slots=True)
class AdapterLoad:
    """Start copying the host image of `adapter` to the device and bind it to `lora_slot`.

    No slice names the slot until the copy has been reported by `StepResult.copied`. With adapters in pages of the KV
    cache: `pages` are blocks that no sequence has, the runs of its layout one behind the other.
    """

    adapter: str
    lora_slot: int
    pages: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AdapterEvict:
    """Unbind `adapter` from `lora_slot`. No plan in flight names the slot; its pages may be written from here on."""

    adapter: str
    lora_slot: int


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """What the sampler must know of a sequence that joins (or joins again after preemption)."""

    seq_id: int
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]  # already produced: counted by penalties
    params: SamplingParams
    seed: int
    sample_index: int
    numbers: Numbers | None = None  # it is answered by a vector, and samples nothing


class SequenceSlice(NamedTuple):
    """The rows of one sequence in one step: tokens at positions position .. position + len(tokens) - 1.

    KV slot of the token at position p: block_table[p // P] * P + p % P; the table covers every position read.
    """

    seq_id: int
    row_start: int  # first row of this slice in the flattened batch
    token_ids: tuple[int | TokenRef, ...]
    position: int  # of the first token; all earlier positions have their KV already
    block_table: tuple[int, ...]
    lora_slot: int
    output: RowOutput
    output_position: int  # index in the output of the first token that would be sampled: keys the random number
    num_guesses: int = 0  # so many of the last tokens are guesses, each to be checked against the row before it
    rope_tokens: int = 0  # rotary frequencies are those of a text of so many tokens, or up to the row if that is more

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def row_end(self) -> int:
        return self.row_start + len(self.token_ids)

    @property
    def num_sure_rows(self) -> int:
        """Rows of tokens that are known to be right."""
        return len(self.token_ids) - self.num_guesses


@dataclass(frozen=True, slots=True)
class LoraSegment:
    """Rows row_start .. row_end - 1 use the adapter in `slot`. Rows of no segment are the base model's."""

    row_start: int
    row_end: int
    slot: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One device step."""

    plan_id: int  # ascending by one, also past a plan that was abandoned
    slices: tuple[SequenceSlice, ...] = ()
    lora_segments: tuple[LoraSegment, ...] = ()  # ascending, disjoint, neighbours of one slot merged
    starts: tuple[SequenceStart, ...] = ()
    ends: tuple[int, ...] = ()  # seq ids
    adapter_ops: tuple[AdapterLoad | AdapterEvict, ...] = ()
    block_copies: tuple[BlockCopy, ...] = ()

    @property
    def num_rows(self) -> int:
        return self.slices[-1].row_end if self.slices else 0


class Sample(NamedTuple):
    """What one sampling slice produced: the guesses that were right and the token after them, at least one token."""

    seq_id: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    error: str | None = None  # this sequence alone failed (e.g. logits were not finite)
    is_over: bool = False  # its grammar lets nothing follow these tokens
    forced_token_ids: tuple[int, ...] = ()  # how the text goes on that its grammar leaves no choice about


class Vector(NamedTuple):
    """What a slice that is answered by a vector produced: float32, little-endian."""

    seq_id: int
    data: bytes
    error: str | None = None  # this sequence alone failed (e.g. hidden states were not finite)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a plan produced: `samples` in the order of its sampling slices, `vectors` of the slices answered so."""

    plan_id: int
    samples: tuple[Sample, ...] = ()
    copied: tuple[str, ...] = ()  # adapters whose copy event has fired since the last result
    waited_for_copy: bool = False  # the step thread stood still until an adapter's copy had ended, or for a while
    vectors: tuple[Vector, ...] = ()


@dataclass(frozen=True, slots=True)
class StepEvents:
    """What happened outside since the last schedule: the scheduler has no clock of its own."""

    time_ns: int = 0
    aborts: tuple[str, ...] = ()  # request ids whose caller went away
    copied: tuple[str, ...] = ()  # adapters whose copy event fired outside any StepResult
