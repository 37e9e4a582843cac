"""Sequence: the progress of one sample of a request.

WAITING ──► RUNNING ──► FINISHED          any state but FINISHED may end: abort, stop string, error
             │   ▲
             ▼   │
           PREEMPTED                      its blocks were needed; it computes its tokens again later
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from engine.core.lookup import PromptLookup
from engine.core.plan import SequenceStart, TokenRef
from engine.request import FinishReason, OutputError, Request, TokenLogprobs

Namespace = tuple[str, str, str | None]  # (base revision and KV scheme, tenant's salt, adapter key)


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


TRANSITIONS: dict[SequenceState, frozenset[SequenceState]] = {
    SequenceState.WAITING: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.RUNNING: frozenset({SequenceState.PREEMPTED, SequenceState.FINISHED}),
    SequenceState.PREEMPTED: frozenset({SequenceState.RUNNING, SequenceState.FINISHED}),
    SequenceState.FINISHED: frozenset(),
}


class SequenceUpdate(NamedTuple):
    """What one sequence gained. Exactly one update of each sequence has `finish_reason` set: its last."""

    request_id: str
    sample_index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None  # the stop token id that ended it
    error: OutputError | None = None
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    queue_s: float = 0.0  # set by the engine, which has a clock
    vector: bytes | None = None  # of a request for numbers


@dataclass(frozen=True, slots=True)
class Ending:
    """Why the last token ends a sequence."""

    reason: FinishReason
    stop_token_id: int | None = None


class Sequence:
    """One sample of a request. `seq_id` ascends in order of arrival and is never used again.

    Tokens: prompt, then outputs, then `num_pending` samples that are still in flight.
    Invariants:
      - committed <= computed <= num_tokens (until it ends): computed counts what any plan has scheduled, committed
        what has come back
      - a sequence that waits holds no block, unless a plan in flight still names it
      - block_table covers all computed tokens; its first `num_dropped_blocks` are the null block, in the place of
        blocks that no token to come can see
    """

    __slots__ = (
        "block_table",
        "cache_parent",
        "forced",
        "has_pin",
        "is_started",
        "last_sample",
        "long_from",
        "lookup",
        "lora_slot",
        "max_tokens_total",
        "namespace",
        "num_cached_tokens",
        "num_committed_tokens",
        "num_computed_tokens",
        "num_dropped_blocks",
        "num_in_flight",
        "num_pending",
        "num_published_blocks",
        "outputs",
        "overtaken",
        "place",
        "prompt",
        "recomputes_long",
        "request",
        "rope_tokens",
        "sample_index",
        "seq_id",
        "siblings",
        "state",
        "table",
        "tenant",
        "token_cost",
        "waiting_since_ns",
        "was_admitted",
    )

    def __init__(
        self,
        seq_id: int,
        request: Request,
        sample_index: int,
        *,
        max_tokens_total: int,
        cache_namespace: str,
        long_from: int | None = None,
        recomputes_long: bool = False,
    ) -> None:
        self.seq_id = seq_id
        self.request = request
        self.sample_index = sample_index
        self.place = (request.priority, seq_id)  # in its tenant's queue: the lowest is first
        self.max_tokens_total = max_tokens_total  # with this many tokens it ends by LENGTH
        self.tenant = request.tenant or request.adapter or "base"
        self.namespace: Namespace = (cache_namespace, request.cache_salt, request.adapter)
        self.long_from, self.recomputes_long = long_from, recomputes_long
        self.rope_tokens = 0  # its rows' rotary frequencies are those of a text of so many tokens; 0: of a short one
        self.siblings: tuple[Sequence, ...] = ()  # all samples of the request, this one included
        self.token_cost = 0  # what one prompt token costs the tenant, in units of fairness.py
        self.state = SequenceState.WAITING
        self.prompt = request.prompt_token_ids
        self.outputs = list(request.resumed_output_token_ids)
        num_guesses = request.params.prompt_lookup_num_tokens
        self.lookup = PromptLookup(num_guesses) if num_guesses else None
        self.forced: tuple[int, ...] = ()  # what its grammar lets follow the known tokens, if that is one text
        self.num_cached_tokens = 0
        self.was_admitted = False
        self.waiting_since_ns = 0  # in the time of StepEvents
        self.overtaken = 0  # admissions that passed it while no LoRA slot could be had for it
        self.has_pin = False  # on its adapter: from the claim until the last plan that names it retires
        self.is_started = False  # the runner keeps state for it
        self.lora_slot = 0
        self.num_in_flight = 0  # plans that name it
        self.block_table: list[int] = []
        self.table: tuple[int, ...] | None = None  # block_table as plans carry it; None: changed since
        self.rewind()

    def rewind(self) -> None:
        """Nothing is computed. Its blocks must have been given back, and no plan in flight may name it."""
        self.num_computed_tokens = 0
        self.num_committed_tokens = 0
        self.num_pending = 0
        self.last_sample: TokenRef | None = None
        self.num_published_blocks = 0
        self.num_dropped_blocks = 0
        if self.long_from is not None:
            self._choose_frequencies(self.long_from)
        self.cache_parent: int | Namespace = self.namespace

    def _choose_frequencies(self, long_from: int) -> None:
        """By its length now, or by its prompt's: by nothing that the other sequences of a step can change."""
        length = self.num_known_tokens if self.recomputes_long else len(self.prompt)
        self.rope_tokens = 0 if length <= long_from else long_from + 1 if self.recomputes_long else length
        base = self.namespace[0].partition("/rope")[0]
        mark = f"/rope{self.rope_tokens}" if self.rope_tokens else ""
        self.namespace = (base + mark, *self.namespace[1:])

    @property
    def is_outgrown(self) -> bool:
        """Its next row belongs to a longer text than what is computed was rotated for."""
        if self.long_from is None or not self.recomputes_long or self.rope_tokens:
            return False
        return self.num_tokens > self.long_from

    def move_to(self, state: SequenceState) -> None:
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"sequence {self.seq_id}: {self.state.value} -> {state.value} is not a transition")
        self.state = state

    def drop_pending(self, num_samples: int) -> None:
        """So many samples in flight less."""
        self.num_pending -= num_samples
        if not self.num_pending:
            self.last_sample = None

    @property
    def num_known_tokens(self) -> int:
        return len(self.prompt) + len(self.outputs)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.outputs) + self.num_pending

    @property
    def num_to_compute(self) -> int:
        """Rows it wants next. None once the samples in flight are certain to end it by LENGTH, or while the next guess
        or what its grammar says of the next token waits for them.
        """
        if self.num_pending and self.waits_for_samples:
            return 0
        num_tokens = len(self.prompt) + len(self.outputs) + self.num_pending
        return num_tokens - self.num_computed_tokens if num_tokens < self.max_tokens_total else 0

    @property
    def has_prompt_computed(self) -> bool:
        """Its prompt's KV is there for every later plan."""
        return self.state is SequenceState.RUNNING and self.num_computed_tokens >= len(self.prompt)

    def tokens_between(self, start: int, end: int) -> tuple[int, ...]:
        """Known tokens at positions start .. end - 1."""
        prompt_len = len(self.prompt)
        if end <= prompt_len:
            return self.prompt[start:end]
        if start >= prompt_len:
            return tuple(self.outputs[start - prompt_len : end - prompt_len])
        return self.prompt[start:] + tuple(self.outputs[: end - prompt_len])

    def next_inputs(self, num_rows: int) -> tuple[int | TokenRef, ...]:
        """The next tokens to compute: the sample in flight by reference, or known ones."""
        if self.last_sample is not None:
            return (self.last_sample,)
        start = self.num_computed_tokens
        return self.tokens_between(start, start + num_rows)

    @property
    def waits_for_samples(self) -> bool:
        """Its next row cannot be planned before the host knows all its tokens."""
        return self.lookup is not None or self.request.params.grammar is not None

    @property
    def has_changing_choices(self) -> bool:
        """Penalties or bad words of several tokens: the sampler takes one row of it at a time."""
        return self.request.params.has_penalties or self.request.params.has_bad_phrases

    @property
    def may_guess(self) -> bool:
        return bool(self.forced) or self.lookup is not None

    def read_for_guesses(self, max_tokens: int) -> None:
        """Take a piece of its tokens into the index that guesses are looked up in."""
        if self.lookup is not None:
            self.lookup.read(self.prompt, self.outputs, max_tokens)

    def guess(self, max_tokens: int) -> tuple[int, ...]:
        """What may follow the known tokens: at most `max_tokens`, and not so many that it could pass its LENGTH.

        What a grammar forces is guessed too: only the model says in which tokens it writes that text.
        """
        room = self.max_tokens_total - self.num_known_tokens - 1
        if self.long_from is not None and self.recomputes_long and not self.rope_tokens:
            room = min(room, self.long_from - self.num_known_tokens)
        num_tokens = max(0, min(max_tokens, room))
        if self.forced:
            return self.forced[:num_tokens]
        return () if self.lookup is None else self.lookup.guess(self.prompt, self.outputs, num_tokens)

    def learn(self, num_guessed: int, num_right: int) -> None:
        """What became of its guesses."""
        if self.lookup is not None and not self.forced:
            self.lookup.learn(num_guessed, num_right)

    def gain(self, token_ids: tuple[int, ...], eos_token_ids: tuple[int, ...]) -> tuple[int, Ending | None]:
        """Append tokens up to the first that ends it. Returns: how many, and the ending."""
        for count, token_id in enumerate(token_ids, start=1):
            self.outputs.append(token_id)
            ending = self.ending(eos_token_ids)
            if ending is not None:
                return count, ending
        return len(token_ids), None

    def ending(self, eos_token_ids: tuple[int, ...]) -> Ending | None:
        """Whether the last output ends it. The sampler bans these ids at output positions below min_tokens."""
        params = self.request.params
        if len(self.outputs) > params.min_tokens:
            token = self.outputs[-1]
            if token in params.stop_token_ids:
                return Ending(FinishReason.STOP, token)
            if token in eos_token_ids and not params.ignore_eos:
                return Ending(FinishReason.STOP)
        if len(self.prompt) + len(self.outputs) >= self.max_tokens_total:
            return Ending(FinishReason.LENGTH)
        return None

    def start(self) -> SequenceStart:
        """What the runner must know before the first slice."""
        return SequenceStart(
            seq_id=self.seq_id,
            prompt_token_ids=self.prompt,
            output_token_ids=tuple(self.outputs),
            params=self.request.params,
            seed=self.request.seed,
            sample_index=self.sample_index,
            numbers=self.request.numbers,
        )

    def update(
        self,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] | None = None,
        ending: Ending | None = None,
        error: OutputError | None = None,
        vector: bytes | None = None,
    ) -> SequenceUpdate:
        return SequenceUpdate(
            self.request.request_id,
            self.sample_index,
            token_ids,
            logprobs,
            ending.reason if ending else None,
            ending.stop_token_id if ending else None,
            error,
            self.num_cached_tokens,
            vector=vector,
        )

    def check_invariants(self, block_size: int) -> None:
        assert 0 <= self.num_committed_tokens <= self.num_computed_tokens, self
        assert self.num_computed_tokens <= self.num_tokens or self.state is SequenceState.FINISHED, self
        assert self.num_pending <= self.num_in_flight or self.waits_for_samples, self
        assert not self.num_pending or self.num_in_flight, self
        assert self.num_computed_tokens <= len(self.block_table) * block_size, self
        if self.state is not SequenceState.RUNNING and not self.num_in_flight:
            held = (self.block_table, self.is_started, self.num_computed_tokens, self.num_pending)
            assert not any(held), self

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.state.value}, tokens={len(self.prompt)}+{len(self.outputs)}"
            f"+{self.num_pending}, computed={self.num_computed_tokens}, in_flight={self.num_in_flight})"
        )
