"""From a machine's room and a model's needs to the sizes of an engine: a pure function of numbers.

What is given stays as it is; the rest is chosen around it, in this order:
  1. rows of a step: the device's usual number, halved while they would take more than a quarter of what weights leave
  2. adapters' least: an eighth of what weights and steps leave
  3. the context: the model's, or as much of it as one sequence has blocks for beside 1 and 2
  4. sequences: the device's usual number, halved until each has room for TYPICAL_TOKENS
  5. the KV cache: what is left, and no more than 4 sequences of 3 tokens could fill
  6. adapters: in pages of the cache up to half of them, beside one sequence of 3; elsewhere what 5 leaves
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import AUTO, CEILINGS, EngineConfig, SizedConfig, live_blocks
from engine.errors import ConfigError
from engine.sizing.room import Needs, Room, Sizes, human

TYPICAL_TOKENS = 512  # of one sequence: more sequences than the cache holds of these would only wait
LEAST_CONTEXT = 512  # no context that was not asked for is shorter, unless the model's is
LEAST_ROWS = 256
LEAST_SEQS = {"cpu": 8, "cuda": 32}  # for which there is room before a context counts as fitting
LEAST_RANK = 16  # an adapter of so many ranks on every layer always finds room, unless somebody said how much there is
_NULL_BLOCKS = 1  # block 0 is never handed out
_COPY_BLOCKS = 1  # one more than the sequences need, for a copy-on-write
_STEP_SHARE = 4  # a step may take this part of what weights leave
_ADAPTER_SHARE = 8
_ROUND_TOKENS = 256  # contexts cut to fit: replicas that find a little more or less free should agree


def plan_sizes(config: EngineConfig, needs: Needs, room: Room) -> tuple[SizedConfig, Sizes]:
    """`config` with every size a number, and the account of it.

    Raises: ConfigError when that cannot be, naming the largest context or step that could, and the remedies.
    """
    return _Plan(config, needs, room).make()


@dataclass(frozen=True, slots=True)
class _Plan:
    config: EngineConfig
    needs: Needs
    room: Room

    def make(self) -> tuple[SizedConfig, Sizes]:
        config, needs = self.config, self.needs
        if self._base <= 0 and config.kv_cache_bytes == AUTO:
            raise ConfigError(self._weights_are_too_large())
        rows = self._rows()
        seqs = self._least_seqs(rows)
        context = self._context(seqs, rows)
        seqs = self._seqs(seqs, rows, context)
        per_sequence = self._blocks_of(context, rows)
        available = self._kv_bytes(seqs, rows, context) // needs.block_bytes
        adapter_bytes = self._adapter_bytes(seqs, rows, context)
        pages = config.resolved(adapter_bytes=adapter_bytes).adapter_pages(needs.block_bytes)[1]
        num_blocks = min(available, seqs * per_sequence + pages + _NULL_BLOCKS + _COPY_BLOCKS)
        kv_bytes = num_blocks * needs.block_bytes
        if adapter_bytes and config.adapter_bytes == AUTO and self._is_beside:
            left = self._left(seqs, rows, context) - kv_bytes
            adapter_bytes = max(adapter_bytes, min(left, self._most_adapter_bytes))
        slots = min(self._ceiling("max_resident_adapters"), max(1, adapter_bytes // max(1, needs.rank_bytes)))
        sized = config.resolved(
            max_model_len=context,
            max_num_seqs=seqs,
            max_num_batched_tokens=rows,
            kv_cache_bytes=kv_bytes,
            adapter_bytes=adapter_bytes,
            max_resident_adapters=slots,
        )
        return sized, self._account(sized, num_blocks)

    # ---- bytes

    @property
    def _base(self) -> int:
        """What weights leave."""
        return self.room.total_bytes - self.room.base_bytes - self.needs.weight_bytes

    def _left(self, seqs: int, rows: int, context: int) -> int:
        """What weights and the largest step leave, for cache and adapters."""
        return self._base - self.needs.step_bytes(seqs, rows, context)

    def _kv_bytes(self, seqs: int, rows: int, context: int) -> int:
        """What the cache may have, with the adapters in its pages."""
        if self.config.kv_cache_bytes != AUTO:
            return self.config.kv_cache_bytes
        beside = 0 if self.config.has_adapter_pages() else self._least_adapter_bytes(rows)
        return max(0, self._left(seqs, rows, context) - beside)

    @property
    def _is_beside(self) -> bool:
        """Whether adapters lie in this process, beside the cache."""
        return not self.config.has_adapter_pages() and self.room.store_bytes is None

    @property
    def _most_adapter_bytes(self) -> int:
        most = self._ceiling("adapter_bytes")
        store = self.room.store_bytes
        return max(self.config.min_adapter_bytes, most if store is None else min(most, store))

    def _least_adapter_bytes(self, rows: int) -> int:
        """What is kept for adapters, whatever sequences want: in pages of the cache, or beside it."""
        config = self.config
        if not config.has_lora():
            return 0
        in_pages = config.has_adapter_pages()
        if not in_pages and not self._is_beside:
            return 0
        if config.adapter_bytes != AUTO:
            return config.min_adapter_bytes if in_pages else config.adapter_bytes
        left = self._left(self._given("max_num_seqs", 1), rows, 0)
        if config.kv_cache_bytes != AUTO:
            left = config.kv_cache_bytes if in_pages else left - config.kv_cache_bytes
        share = max(LEAST_RANK * self.needs.rank_bytes, left // _ADAPTER_SHARE)
        return max(config.min_adapter_bytes, min(share, self._most_adapter_bytes))

    def _kept_pages(self, rows: int) -> int:
        """Pages of the cache that one sequence cannot count on; one at least, or LoRA could be left out."""
        config = self.config
        if not config.has_adapter_pages():
            return 0
        # What was given comes first: only where nobody said how long or how much, adapters have a share of it.
        if config.adapter_bytes != AUTO or config.max_model_len != AUTO or config.kv_cache_bytes != AUTO:
            kept, most = config.resolved().adapter_pages(self.needs.block_bytes)
            return max(kept, min(1, most))
        return max(1, -(-self._least_adapter_bytes(rows) // self.needs.block_bytes))

    def _adapter_bytes(self, seqs: int, rows: int, context: int) -> int:
        if self.config.adapter_bytes != AUTO:
            return self.config.adapter_bytes
        if not self.config.has_lora():
            return 0
        if not self.config.has_adapter_pages():
            least = self._least_adapter_bytes(rows)
            return least if self.room.store_bytes is None else self.room.store_bytes
        blocks = self._kv_bytes(seqs, rows, context) // self.needs.block_bytes
        beside_one = blocks - self._blocks_of(context, rows) - _NULL_BLOCKS
        pages = max(self._kept_pages(rows), min(blocks // 2, beside_one))
        return max(self.config.min_adapter_bytes, min(pages * self.needs.block_bytes, self._most_adapter_bytes))

    # ---- choices

    def _given(self, name: str, otherwise: int) -> int:
        value = getattr(self.config, name)
        return otherwise if value == AUTO else int(value)

    def _ceiling(self, name: str) -> int:
        return CEILINGS[self.config.device][name]

    def _blocks_of(self, context: int, rows: int) -> int:
        """Blocks that one sequence of `context` tokens ever holds at a time, where a step has so many rows."""
        rows_in_flight = rows * self.config.plans_in_flight()
        return live_blocks(context, self.needs.block_size, self.needs.window_tokens, rows_in_flight)

    def _fits(self, seqs: int, rows: int, context: int) -> bool:
        """Whether one sequence of `context` tokens has room in the cache, beside what adapters keep."""
        blocks = self._kv_bytes(seqs, rows, context) // self.needs.block_bytes
        return blocks >= self._blocks_of(context, rows) + self._kept_pages(rows) + _NULL_BLOCKS

    def _rows(self) -> int:
        least_seqs = self._given("max_num_seqs", 1)
        rows = self._given("max_num_batched_tokens", max(self._ceiling("max_num_batched_tokens"), least_seqs))
        if self.config.max_num_batched_tokens == AUTO:
            while rows // 2 >= max(LEAST_ROWS, least_seqs) and self._is_large_step(least_seqs, rows):
                rows //= 2
        return rows

    def _is_large_step(self, seqs: int, rows: int) -> bool:
        """By what rows take of it: the rest would stay."""
        context = self._least_context
        of_rows = self.needs.step_bytes(seqs, rows, context) - self.needs.step_bytes(seqs, 0, context)
        return of_rows > self._base // _STEP_SHARE

    @property
    def _least_context(self) -> int:
        return min(self._given("max_model_len", LEAST_CONTEXT), self.needs.context_tokens)

    def _least_seqs(self, rows: int) -> int:
        if self.config.max_num_seqs != AUTO:
            return self.config.max_num_seqs
        few = min(LEAST_SEQS[self.config.device], rows)
        return few if self._fits(few, rows, self._least_context) else 1

    def _context(self, seqs: int, rows: int) -> int:
        wanted = self._given("max_model_len", self.needs.context_tokens)
        if self._fits(seqs, rows, wanted):
            return wanted
        fitting = self._longest(seqs, rows, wanted)
        if self.config.max_model_len != AUTO or fitting < self._least_context:
            raise ConfigError(self._context_is_too_long(seqs, rows, wanted, fitting))
        return max(self._least_context, fitting // _ROUND_TOKENS * _ROUND_TOKENS)

    def _longest(self, seqs: int, rows: int, below: int) -> int:
        """The longest context in whole blocks that fits; 0: none."""
        low, high = 0, -(-below // self.needs.block_size)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(seqs, rows, middle * self.needs.block_size) else (low, middle)
        return low * self.needs.block_size

    def _seqs(self, least: int, rows: int, context: int) -> int:
        if self.config.max_num_seqs != AUTO:
            return self.config.max_num_seqs
        seqs = min(self._ceiling("max_num_seqs"), rows)
        while seqs > least and not (self._fits(seqs, rows, context) and self._feeds(seqs, rows, context)):
            seqs = max(least, seqs // 2)
        return seqs

    def _feeds(self, seqs: int, rows: int, context: int) -> bool:
        if self.config.kv_cache_bytes != AUTO:
            return True  # fewer sequences would leave no more for it, and short ones may all find room
        blocks = self._kv_bytes(seqs, rows, context) // self.needs.block_bytes - _NULL_BLOCKS - self._kept_pages(rows)
        return blocks >= seqs * self._blocks_of(min(context, TYPICAL_TOKENS), rows)

    # ---- words

    def _account(self, sized: SizedConfig, num_blocks: int) -> Sizes:
        needs, config = self.needs, self.config
        why = [self.room.source]
        if config.max_model_len == AUTO and sized.max_model_len < needs.context_tokens:
            why.append(f"max_model_len is what fits of the model's {needs.context_tokens} tokens")
        step = needs.step_bytes(sized.max_num_seqs, sized.max_num_batched_tokens, sized.max_model_len)
        kv_bytes = num_blocks * needs.block_bytes
        if kv_bytes + step > self._base:
            why.append("what was asked for takes more than that")
        return Sizes(
            max_model_len=sized.max_model_len,
            max_num_seqs=sized.max_num_seqs,
            max_num_batched_tokens=sized.max_num_batched_tokens,
            kv_cache_bytes=kv_bytes,
            num_blocks=num_blocks,
            adapter_bytes=sized.adapter_bytes,
            max_resident_adapters=sized.max_resident_adapters,
            memory_bytes=self.room.total_bytes,
            weight_bytes=needs.weight_bytes,
            base_bytes=self.room.base_bytes,
            step_bytes=step,
            why="; ".join(why),
        )

    def _weights_are_too_large(self) -> str:
        room, least = self.room, self.room.base_bytes + self.needs.weight_bytes
        return (
            f"the model's weights take {human(self.needs.weight_bytes)} and the process {human(room.base_bytes)}, and "
            f"there are {human(room.total_bytes)} ({room.source}): give it more than {human(least)} (memory_bytes, "
            "memory_fraction, fewer replicas on a node), or make the weights smaller (quantization='int8' or 'int4')"
        )

    def _context_is_too_long(self, seqs: int, rows: int, wanted: int, fitting: int) -> str:
        needs, config = self.needs, self.config
        least = self._blocks_of(wanted, rows) + self._kept_pages(rows) + _NULL_BLOCKS
        kept = self._kept_pages(rows)
        beside = f" and {kept} for adapters (min_adapter_bytes={config.min_adapter_bytes})" if kept else ""
        shorter = f"lower max_model_len to at most {fitting}" if fitting else "lower max_model_len"
        if config.kv_cache_bytes != AUTO:
            return (
                f"{config.kv_cache_bytes} bytes of KV cache are {config.kv_cache_bytes // needs.block_bytes} blocks of "
                f"{needs.block_bytes} bytes; one sequence of max_model_len={wanted} tokens needs {least}, with the "
                f"null block{beside}: raise kv_cache_bytes to at least {least * needs.block_bytes}, or {shorter}"
            )
        step = needs.step_bytes(seqs, rows, wanted)
        there = self._kv_bytes(seqs, rows, wanted)
        return (
            f"one sequence of max_model_len={wanted} tokens needs {human(least * needs.block_bytes)} of KV cache, and "
            f"{human(there)} of {human(self.room.total_bytes)} ({self.room.source}) are left beside "
            f"weights ({human(needs.weight_bytes)}), process ({human(self.room.base_bytes)}) and steps of "
            f"max_num_batched_tokens={rows} and max_num_seqs={seqs} ({human(step)}): {shorter}"
            f"{self._smaller_step(seqs, rows)}, give it more memory (memory_bytes, memory_fraction, fewer replicas on "
            "a node), or halve what is kept (kv_cache_dtype='int8', quantization='int8')"
        )

    def _smaller_step(self, seqs: int, rows: int) -> str:
        """The settings that were given and make steps large, and what they could be."""
        context = self._least_context
        remedies = []
        if self.config.max_num_batched_tokens != AUTO:
            lower = rows
            while lower > seqs and not self._fits(seqs, lower, context):
                lower = max(seqs, lower // 2)
            if lower < rows and self._fits(seqs, lower, context):
                remedies.append(f", or lower max_num_batched_tokens to {lower}")
        if self.config.max_num_seqs != AUTO:
            lower = seqs
            while lower > 1 and not self._fits(lower, rows, context):
                lower //= 2
            if lower < seqs and self._fits(lower, rows, context):
                remedies.append(f", or lower max_num_seqs to {lower}")
        return "".join(remedies)
