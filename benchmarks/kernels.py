"""Each compiled kernel against its floor on this machine: bytes over bandwidth, or operations over the peak rate.

    python -m benchmarks.kernels

Both limits are measured first, by the same threads: a large copy, and a product large enough to hide everything else.
Weights are cycled through copies that together exceed the caches, as in a model.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks import workload
from engine.kv.backend import AttentionInputs, LayerCall
from engine.kv.native_attention import NativeAttention
from engine.kv.rows import KVQuantization
from engine.kv.storage import KVShape, KVStorage
from engine.native.library import NativeLibrary, load_library
from engine.native.structs import ELEMENTS, LoraChunk, LoraWeights, Member

COPIES_BYTES = 192 << 20  # of weights that are cycled through
SHAPES = {"q/k/v": (576, (576, 192, 192)), "o": (576, (576,)), "gate/up": (576, (1536, 1536)), "down": (1536, (576,))}


def median_s(work: Callable[[int], None], rounds: int, calls: int) -> float:
    """Median seconds of a call; `work(i)` may take other memory for every i."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for i in range(calls):
            work(i)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


class Linear:
    """One fused group of packed layers, in as many copies as exceed the caches."""

    def __init__(
        self, library: NativeLibrary, in_features: int, widths: tuple[int, ...], rows: int, rank: int = 0
    ) -> None:
        self._library, self._rows, self._in = library, rows, in_features
        self.weight_bytes = 2 * in_features * sum(widths)
        self.lora_bytes = 2 * rank * sum(in_features + width for width in widths) * rows if rank else 0
        self.operations = 2 * rows * in_features * sum(widths)
        self._x = torch.randn(rows, in_features).bfloat16()
        self._outputs = [torch.empty(rows, width, dtype=torch.bfloat16) for width in widths]
        self.num_copies = max(1, COPIES_BYTES // (self.weight_bytes + self.lora_bytes))
        self._keep: list[torch.Tensor] = []
        self._members = [self._copy(widths, rank) for _ in range(self.num_copies)]
        self._chunks = (LoraChunk * rows)(*(LoraChunk(row, 1, row + 1) for row in range(rows)))

    def _copy(self, widths: tuple[int, ...], rank: int) -> ctypes.Array[Member]:
        members = (Member * len(widths))()
        for member, width, y in zip(members, widths, self._outputs, strict=True):
            weight = self._library.pack(torch.randn(width, self._in).bfloat16())
            self._keep.append(weight)
            member.weight, member.out_features, member.y = weight.data_ptr(), width, y.data_ptr()
            if rank:
                member.lora = ctypes.addressof(self._adapters(rank, width))
        return members

    def _adapters(self, rank: int, width: int) -> ctypes.Array[LoraWeights]:
        table = (LoraWeights * (self._rows + 1))()
        for slot in range(1, self._rows + 1):
            a, b = torch.randn(rank, self._in).bfloat16(), torch.randn(rank, width).bfloat16()
            self._keep += [a, b]
            table[slot] = LoraWeights(a.data_ptr(), b.data_ptr(), rank, 1.0, ELEMENTS[a.dtype])
        self._keep.append(table)  # type: ignore[arg-type]
        return table

    def __call__(self, i: int) -> None:
        members = self._members[i % self.num_copies]
        chunks = (ctypes.addressof(self._chunks), len(self._chunks)) if self.lora_bytes else (None, 0)
        self._library.linear(self._x.data_ptr(), self._rows, self._in, members, len(members), *chunks, 1, 1)


class Attention:
    """Decode of some sequences over the cache of several layers of a bfloat16 model."""

    def __init__(
        self, library: NativeLibrary, sequences: int, context: int, quantization: KVQuantization | None = None
    ) -> None:
        size, heads, kv_heads, dims, self.num_layers = 16, 9, 3, 64, 30
        num_blocks = -(-context // size)
        shape = KVShape(self.num_layers, size, kv_heads, dims, torch.bfloat16, quantization)
        storage = KVStorage(shape, 1 + sequences * num_blocks)
        slots = torch.arange(storage.num_blocks * size)
        for layer in range(self.num_layers):
            storage.write(layer, *torch.randn(2, len(slots), kv_heads, dims), slots)
        self._backend = NativeAttention(library, storage)
        tables = torch.arange(1, 1 + sequences * num_blocks).view(sequences, num_blocks)
        self._inputs = AttentionInputs(
            slot_mapping=tables[:, -1] * size + (context - 1) % size,
            block_tables=tables,
            query_starts=tuple(range(sequences + 1)),
            context_lengths=(context,) * sequences,
        )
        self._backend.plan(self._inputs)
        self._q = torch.randn(sequences, heads, dims).bfloat16()
        self._kv = torch.randn(sequences, kv_heads, dims).bfloat16()
        self.num_bytes = sequences * num_blocks * shape.block_bytes // self.num_layers

    def __call__(self, i: int) -> None:
        self._backend.run(self._q, self._kv, self._kv, LayerCall(index=i % self.num_layers, scaling=0.125))


def limits(library: NativeLibrary) -> tuple[float, float]:
    """Bytes read a second, and operations a second."""
    source, target = torch.zeros(64 << 20), torch.zeros(64 << 20)
    copy_s = median_s(lambda _: target.copy_(source), rounds=5, calls=1)
    large = Linear(library, 1024, (4096,), rows=768)
    return 2 * source.nbytes / copy_s, large.operations / median_s(large, rounds=5, calls=1)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,16,64")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    library = load_library()
    library.set_threads(torch.get_num_threads())
    bandwidth, rate = limits(library)
    workload.print_figures({"case": "limits", "GB_per_s": bandwidth / 1e9, "GFLOP_per_s": rate / 1e9}, args)

    def report(case: str, seconds: float, floor_s: float) -> None:
        figures = {"us": round(seconds * 1e6, 1), "floor_us": round(floor_s * 1e6, 1)}
        workload.print_figures({"case": case, **figures, "of_floor": round(floor_s / seconds, 2)}, args)

    for rows in (int(rows) for rows in args.rows.split(",")):
        for name, (in_features, widths) in SHAPES.items():
            linear = Linear(library, in_features, widths, rows)
            floor_s = max(linear.weight_bytes / bandwidth, linear.operations / rate)
            report(f"linear {name}, {rows} rows", median_s(linear, args.rounds, linear.num_copies), floor_s)
        plain, lora = (Linear(library, 576, (1536, 1536), rows, rank=rank) for rank in (0, 16))
        extra = median_s(lora, args.rounds, lora.num_copies) - median_s(plain, args.rounds, plain.num_copies)
        report(f"rank 16 of {rows} adapters, gate/up", extra, lora.lora_bytes / bandwidth)
    kinds_of_cache: tuple[KVQuantization | None, ...] = (None, "int8")
    for sequences, context in ((1, 1024), (1, 2048), (1, 8192), (16, 128), (16, 1024)):
        kinds = [Attention(library, sequences, context, kind) for kind in kinds_of_cache]
        rounds = [[median_s(kind, 1, kind.num_layers) for kind in kinds] for _ in range(args.rounds)]  # in turns
        ratio = statistics.median(plain / int8 for plain, int8 in rounds)
        for i, name in enumerate(("", f", int8 ({ratio:.2f} times as fast)")):
            case = f"decode attention, {sequences} x {context} tokens{name}"
            report(case, statistics.median(times[i] for times in rounds), kinds[i].num_bytes / bandwidth)


if __name__ == "__main__":
    main()
