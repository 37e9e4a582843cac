"""A device without tensors that knows whether the KV it reads is the right one. Standard library only.

Each KV slot holds a digest of (the digest in the slot before it *as read through the block table*, the token, the
adapter bound to the LoRA slot at that moment), as real KV depends on its whole prefix. A sampled token is a hash of all
slots the sequence reads, its parameters, and the outputs the sampler remembers of it. So a wrong block, a block that
was reused too early, a wrong adapter or a lost token changes the text; `expected_tokens` is what it should be.
Where the config has a window, a slot depends on those in its window, a token on the last window of them, and nothing
further back is read: a window kept too short or a block dropped too early changes the text as well.

Adapters in pages lie in the same slots: a load writes them when it begins and again when it ends, and an adapter whose
pages hold something else when it is used is another adapter.

A plan that breaks a rule is refused with an AssertionError that names the plan.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from engine.core.block_pool import NULL_BLOCK
from engine.core.limits import SchedulerConfig
from engine.core.plan import (
    NO_LORA,
    AdapterEvict,
    AdapterLoad,
    RowOutput,
    Sample,
    SequenceSlice,
    SequenceStart,
    StepPlan,
    StepResult,
    TokenRef,
    Vector,
)
from tests.support.hash_model import PLAIN, Habits, adapter_digest, choose_token, next_digest, vector_of
from tests.support.plan_rules import check_rows

_ADAPTER = -1  # who wrote a page


class HostImage(Protocol):
    """What this device needs to know of an adapter's image."""

    @property
    def key(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def runs(self) -> tuple[int, ...]: ...


@dataclass
class _SamplerState:
    start: SequenceStart
    outputs: list[int]
    rows: list[int] = field(default_factory=list)  # that have come for a pooled vector


Came = tuple[tuple[Sample, ...], tuple[Vector, ...]]


class FinishedStep:
    """A plan whose result can be had."""

    def __init__(self, runner: KVCheckingRunner, plan: StepPlan, came: Came) -> None:
        self._runner = runner
        self._plan = plan
        self._samples, self._vectors = came

    def result(self) -> StepResult:
        oldest = self._runner.in_flight.popleft()
        assert oldest is self._plan, f"result of plan {self._plan.plan_id} taken before that of plan {oldest.plan_id}"
        return StepResult(self._plan.plan_id, self._samples, self._runner.copied(), vectors=self._vectors)


class KVCheckingRunner:
    """Runner of plans for one scheduler. A copy of an adapter is done `copy_steps` plans after the one that loads it.

    A plan is in flight from `submit` until its result is taken: what it names must not be reused before that.
    `error_seeds`: sequences with one of these seeds fail at their second output token.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        copy_steps: int = 0,
        habits: Habits = PLAIN,
        error_seeds: Collection[int] = (),
    ) -> None:
        self.config = config
        self.copy_steps = copy_steps
        self.habits = habits
        self.error_seeds = frozenset(error_seeds)
        self.images: dict[str, HostImage] = {}
        self.pinned: set[str] = set()  # what a caller has pinned: it must not be evicted
        self._homes: dict[str, tuple[int, ...]] = {}  # bound adapter -> its pages
        self.bound: dict[int, str] = {}  # LoRA slot -> adapter
        self.in_flight: deque[StepPlan] = deque()
        self.sequences: dict[int, _SamplerState] = {}
        self.num_steps = 0
        self._copying: dict[str, int] = {}  # adapter -> step in which its copy is done
        self._fresh: list[str] = []  # copied, and not reported yet
        self._kv: dict[int, int] = {}
        self._writer: dict[int, int] = {}  # block -> sequence that wrote it last
        self._sampled: dict[TokenRef, int] = {}
        self._last_plan_id = 0
        self._repeated_ends: set[int] = set()
        self._repeated_evictions: set[AdapterEvict] = set()

    # --- the protocol ----------------------------------------------------------------------------------------------

    def add_adapter(self, image: HostImage) -> None:
        self.images[image.key] = image

    def remove_adapter(self, key: str) -> None:
        assert key not in self.bound.values(), f"adapter {key} is removed while it is resident"
        del self.images[key]

    def submit(self, plan: StepPlan) -> FinishedStep:
        assert plan.plan_id > self._last_plan_id, f"plan {plan.plan_id} after plan {self._last_plan_id}"
        self._last_plan_id = plan.plan_id
        self.num_steps += 1
        try:
            self._bookkeeping(plan)
            self._check_floor(plan)
            check_rows(plan, self.config)
            came = self._forward(plan)
        except (AssertionError, KeyError) as error:
            raise AssertionError(f"{error!r} in {plan}") from error
        self.in_flight.append(plan)
        self._repeated_ends.clear()
        self._repeated_evictions.clear()
        return FinishedStep(self, plan, came)

    def abandon(self, plans: list[StepPlan]) -> None:
        """The host gave these up, oldest first, submitted or not: the next plan may repeat what they did."""
        for plan in plans:
            if plan in self.in_flight:
                self.in_flight.remove(plan)
            self._repeated_ends.update(plan.ends, (start.seq_id for start in plan.starts))
            self._repeated_evictions.update(AdapterEvict(op.adapter, op.lora_slot) for op in plan.adapter_ops)

    def copied(self) -> tuple[str, ...]:
        fresh, self._fresh = tuple(self._fresh), []
        return fresh

    # --- steps 1 to 4 of a plan ------------------------------------------------------------------------------------

    def _bookkeeping(self, plan: StepPlan) -> None:
        for seq_id in plan.ends:
            assert not any(seq_id == s.seq_id for p in self.in_flight for s in p.slices), f"{seq_id} ends in flight"
            if self.sequences.pop(seq_id, None) is None:
                assert seq_id in self._repeated_ends, f"sequence {seq_id} ends and never started"
        for index, op in enumerate(plan.adapter_ops):
            comes_back = any(later.adapter == op.adapter for later in plan.adapter_ops[index + 1 :])
            if isinstance(op, AdapterEvict) and op not in self._repeated_evictions and not comes_back:
                assert op.adapter not in self.pinned, f"adapter {op.adapter} is evicted though it is pinned"
            self._apply(op)
        for key in [key for key, step in self._copying.items() if step <= self.num_steps]:
            del self._copying[key]
            self._write_pages(key)
            self._fresh.append(key)
        self._copy_blocks(plan)
        for start in plan.starts:
            known = self.sequences.get(start.seq_id)
            assert known is None or start.seq_id in self._repeated_ends, f"sequence {start.seq_id} starts twice"
            self.sequences[start.seq_id] = _SamplerState(start, list(start.output_token_ids))
        assert len(self.sequences) <= self.config.max_num_seqs, f"{len(self.sequences)} sequences are started"

    def _apply(self, op: AdapterLoad | AdapterEvict) -> None:
        named = any(op.lora_slot == s.lora_slot for p in self.in_flight for s in p.slices)
        assert not named, f"slot {op.lora_slot} changes while a plan in flight names it"
        if isinstance(op, AdapterEvict):
            if self.bound.get(op.lora_slot) != op.adapter:
                assert op in self._repeated_evictions, f"{op}, but the slot holds {self.bound.get(op.lora_slot)}"
                return
            del self.bound[op.lora_slot]
            del self._homes[op.adapter]
            self._copying.pop(op.adapter, None)
            self._fresh = [key for key in self._fresh if key != op.adapter]
            return
        assert 1 <= op.lora_slot <= self.config.max_resident_adapters, op
        assert op.lora_slot not in self.bound, f"{op}, but the slot holds {self.bound[op.lora_slot]}"
        assert op.adapter not in self.bound.values(), f"{op}, but it is resident"
        self.bound[op.lora_slot] = op.adapter
        num_steps = 0 if self.config.adapters_load_at_once else self.copy_steps
        self._copying[op.adapter] = self.num_steps + num_steps
        self._homes[op.adapter] = op.pages
        if self.config.max_adapter_pages is None:
            num_bytes = sum(self.images[adapter].num_bytes for adapter in self.bound.values())
            assert num_bytes <= self.config.adapter_bytes, f"{num_bytes} bytes are resident"
            assert not op.pages, op
        else:
            self._check_pages(op)
            self._write_pages(op.adapter)

    def _check_pages(self, op: AdapterLoad) -> None:
        pages = iter(op.pages)
        for length in self.images[op.adapter].runs:
            run = [next(pages) for _ in range(length)]
            assert run == list(range(run[0], run[0] + length)), f"{run} are no neighbours"
        assert next(pages, None) is None, f"{op} has more pages than it needs"
        held = [page for home in self._homes.values() for page in home]
        assert len(set(held)) == len(held), f"{op} takes pages of another adapter"
        assert len(held) <= (self.config.max_adapter_pages or 0), f"adapters hold {len(held)} pages"
        self._check_writable(set(op.pages), owner=None)

    def _write_pages(self, adapter: str) -> None:
        self._kv.update(self._content(adapter))
        self._writer.update(dict.fromkeys(self._homes[adapter], _ADAPTER))

    def _content(self, adapter: str) -> dict[int, int]:
        """What the slots of its pages must hold."""
        size = self.config.block_size
        return {
            page * size + offset: hash((adapter, index, offset))
            for index, page in enumerate(self._homes[adapter])
            for offset in range(size)
        }

    def _check_floor(self, plan: StepPlan) -> None:
        """What adapters hold, and what is kept for them, is not given to sequences."""
        named = {block for piece in plan.slices for block in piece.block_table} - {NULL_BLOCK}
        for_adapters = max(self.config.min_adapter_pages, sum(len(home) for home in self._homes.values()))
        num_blocks = self.config.num_blocks - 1 - for_adapters
        assert len(named) <= num_blocks, f"sequences have {len(named)} blocks and may have {num_blocks}"

    def _copy_blocks(self, plan: StepPlan) -> None:
        size = self.config.block_size
        targets = [copy.dst for copy in plan.block_copies]
        assert len(set(targets)) == len(targets), "a block is the target of two copies"
        assert not set(targets) & {copy.src for copy in plan.block_copies}, "a block is source and target"
        for copy in plan.block_copies:
            self._check_writable({copy.dst}, owner=None)
            for offset in range(size):
                if copy.src * size + offset in self._kv:
                    self._kv[copy.dst * size + offset] = self._kv[copy.src * size + offset]

    def _check_writable(self, blocks: set[int], owner: int | None) -> None:
        """No plan in flight reads these blocks, but for slices of their owner."""
        assert 0 not in blocks, "the null block is written"
        for plan in self.in_flight:
            for copy in plan.block_copies:
                is_reused = copy.src in blocks and self._writer.get(copy.src) != owner
                assert not is_reused, f"block {copy.src} is handed out while plan {plan.plan_id} copies it"
            for piece in plan.slices:
                if piece.seq_id != owner:
                    num_read = -(-(piece.position + piece.num_rows) // self.config.block_size)
                    first = self._first_read(piece) // self.config.block_size
                    shared = blocks.intersection(piece.block_table[first:num_read])
                    assert not shared, f"blocks {shared} are written while plan {plan.plan_id} reads them"

    # --- step 5: rows ----------------------------------------------------------------------------------------------

    def _forward(self, plan: StepPlan) -> Came:
        written: set[int] = set()
        tokens_of: list[tuple[int, ...]] = []
        for piece in plan.slices:  # all slices look at the KV as it was before this forward, but for their own rows
            assert piece.seq_id in self.sequences, f"sequence {piece.seq_id} has not started"
            tokens = tuple(self._sampled[t] if isinstance(t, TokenRef) else t for t in piece.token_ids)
            tokens_of.append(tokens)
            written |= self._check_slots(piece, written)
        before = dict(self._kv)
        samples, vectors = [], []
        for piece, tokens in zip(plan.slices, tokens_of, strict=True):
            digests = self._attend(piece, tokens, before)
            if piece.output is RowOutput.SAMPLE:
                samples.append(self._sample(plan.plan_id, piece, tokens, digests))
            elif piece.output is not RowOutput.NONE:
                vectors += self._numbers(piece, digests[-piece.num_rows :])
        return tuple(samples), tuple(vectors)

    def _numbers(self, piece: SequenceSlice, digests: list[int]) -> list[Vector]:
        state = self.sequences[piece.seq_id]
        numbers = state.start.numbers  # `digests` are of the rows of the slice
        assert numbers is not None, f"sequence {piece.seq_id} samples, and is asked for a vector"
        if numbers.needs_all_rows:
            assert len(state.rows) == piece.position, f"{piece.position} rows should have come, {len(state.rows)} have"
            state.rows += digests
        if piece.output is RowOutput.PART:
            return []
        assert piece.position + piece.num_rows == len(state.start.prompt_token_ids), "a vector of half a prompt"
        return [Vector(piece.seq_id, vector_of(state.rows or digests[-1:]))]

    def _check_slots(self, piece: SequenceSlice, written: set[int]) -> set[int]:
        size = self.config.block_size
        end = piece.position + piece.num_rows
        assert end < self.config.max_model_len + 1, f"sequence {piece.seq_id} has {end} tokens"
        slots = {piece.block_table[p // size] * size + p % size for p in range(piece.position, end)}
        assert len(slots) == piece.num_rows, "a slice writes a slot twice"
        assert not slots & written, f"slots {slots & written} are written twice"
        self._check_writable({slot // size for slot in slots}, owner=piece.seq_id)
        return slots

    def _first_read(self, piece: SequenceSlice) -> int:
        """The first position that a row of a slice sees."""
        window = self.config.window_tokens
        return 0 if window is None else max(0, piece.position - window + 1)

    def _attend(self, piece: SequenceSlice, tokens: tuple[int, ...], before: dict[int, int]) -> list[int]:
        """Write the slice's slots. Returns: what the slots from the first it sees up to its last token hold, as read
        through the table.
        """
        size, table = self.config.block_size, piece.block_table
        adapter = None
        if piece.lora_slot != NO_LORA:
            adapter = self.bound[piece.lora_slot]
            assert adapter not in self._copying, f"adapter {adapter} is used before its copy is done"
        key = adapter_digest(adapter)
        if adapter is not None:
            key += sum(before.get(slot) != held for slot, held in self._content(adapter).items())
        digests = [before[table[p // size] * size + p % size] for p in range(self._first_read(piece), piece.position)]
        for position, token in enumerate(tokens, piece.position):
            digests.append(next_digest(digests, token, key, self.config.window_tokens))
            self._kv[table[position // size] * size + position % size] = digests[-1]
            self._writer[table[position // size]] = piece.seq_id
        return digests

    def _sample(self, plan_id: int, piece: SequenceSlice, tokens: tuple[int, ...], digests: list[int]) -> Sample:
        """A token after the last that is sure, and one after each guess as long as the guesses are right."""
        state = self.sequences[piece.seq_id]
        start, outputs = state.start, state.outputs
        assert piece.output_position == len(outputs), f"output {piece.output_position}, {len(outputs)} are remembered"
        num_sure = len(digests) - piece.num_guesses
        chosen: list[int] = []
        for i in range(1 + piece.num_guesses):
            fails = start.seed in self.error_seeds and len(outputs) >= 1
            if fails and i:
                break  # the guess before it counts; the error comes when its turn does
            end, window = num_sure + i, self.config.window_tokens
            read = digests[:end] if window is None else digests[max(0, end - window) : end]
            min_tokens = start.params.min_tokens
            token = choose_token(
                read, start.prompt_token_ids, start.seed, start.sample_index, outputs, min_tokens, self.habits
            )
            outputs.append(token)
            if not piece.num_guesses:
                self._sampled[TokenRef(plan_id, piece.row_end - 1)] = token
            if fails:
                return Sample(piece.seq_id, (), error="the logits are not finite")
            chosen.append(token)
            if i == piece.num_guesses or tokens[piece.num_sure_rows + i] != token:
                break
        return Sample(piece.seq_id, tuple(chosen))
