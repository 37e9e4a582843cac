"""What a plan of sizes starts from, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes that one engine may use in all, and those that are gone before it chooses anything but its weights."""

    total_bytes: int
    base_bytes: int  # on the CPU the process itself, on a GPU its context
    source: str  # where total_bytes comes from: for messages
    store_bytes: int | None = None  # adapters lie in a store's memory, counted there, this engine's so many; None: here


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbours:
    """Who else lives on the machine, as it was planned: replicas that start together cannot see each other's memory."""

    num_engines: int = 1  # that share the RAM, or the GPU, this one included
    reserved_bytes: int = 0  # of RAM, for what is no engine
    store_bytes: int | None = None  # see Room


ALONE = Neighbours()


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a model costs, each number in bytes per what its name says. A row is a token that a step computes."""

    weight_bytes: int
    context_tokens: int  # the longest that the model was made for
    block_size: int  # tokens
    block_bytes: int  # of the KV cache
    window_tokens: int | None = None  # no layer sees further back; None: some layer does
    rank_bytes: int  # one rank of an adapter on every site
    row_bytes: int  # of the forward
    sampled_row_bytes: int  # logits, and the sampler at its peak
    sequence_bytes: int = 0  # of each running sequence, in tables that double when they grow
    fixed_bytes: int = 0
    context_token_bytes: int = 0  # for each token of max_model_len
    row_token_bytes: int = 0  # for each row and token of max_model_len
    sequence_token_bytes: int = 0  # for each running sequence and token of max_model_len

    def step_bytes(self, seqs: int, rows: int, context: int) -> int:
        """Beside weights and cache, at the peak of the largest step."""
        tables = 1 << (seqs - 1).bit_length()
        return (
            self.fixed_bytes
            + rows * (self.row_bytes + context * self.row_token_bytes)
            + seqs * (self.sampled_row_bytes + context * self.sequence_token_bytes)
            + tables * self.sequence_bytes
            + context * self.context_token_bytes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What an engine was given or has chosen, and what it counted on. `str()` is the line that is logged at start."""

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_bytes: int  # of the blocks that there are
    num_blocks: int  # with the null block
    adapter_bytes: int
    max_resident_adapters: int
    memory_bytes: int  # that all of it was to fit into
    weight_bytes: int
    base_bytes: int
    step_bytes: int
    why: str  # what was chosen for want of room, and where memory_bytes comes from

    def __str__(self) -> str:
        kv = f"KV cache {human(self.kv_cache_bytes)} in {self.num_blocks} blocks"
        adapters = f"adapters up to {human(self.adapter_bytes)} in {self.max_resident_adapters} slots"
        taken = f"weights {human(self.weight_bytes)}, steps {human(self.step_bytes)}, process {human(self.base_bytes)}"
        return (
            f"max_model_len {self.max_model_len} tokens, max_num_seqs {self.max_num_seqs}, "
            f"max_num_batched_tokens {self.max_num_batched_tokens}, {kv}, {adapters}; beside {taken}, "
            f"within {human(self.memory_bytes)}: {self.why}"
        )


def human(num_bytes: int) -> str:
    """As people read sizes: 1.5 GiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes} bytes"
