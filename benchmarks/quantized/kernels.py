"""The compiled kernels with quantized weights beside bfloat16 ones: layers of a 0.5B model, for some numbers of rows.

    python -m benchmarks.quantized.kernels
    python -m benchmarks.quantized.kernels --kinds int4,torch-int4 --layers down --rows 1,16

Each figure is the median of interleaved pairs: one pass over all copies of a layer in either kind, again and again.
Copies together exceed the caches, as in a model. `torch-*` are torch's own kernels for such weights.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import workload
from engine.model.packed import Packer
from engine.native.library import NativeLibrary, load_library
from engine.native.structs import Member
from engine.quant.linear import QuantLinear
from engine.quant.weight import Kind, QuantizedWeight

COPIES_BYTES = 128 << 20  # of bfloat16 weights that are cycled through
LAYERS = {
    "q/k/v": (896, (896, 128, 128)),
    "o": (896, (896,)),
    "gate/up": (896, (4864, 4864)),
    "down": (4864, (896,)),
    "lm_head": (896, (151936,)),
}
GROUP = 128
KINDS = ("int4", "int4-zeros", "int8", "int8-dynamic", "nf4", "fp8", "torch-int4", "torch-int8")
Work = Callable[[int], None]


def quantized(name: str, out_features: int, in_features: int) -> QuantizedWeight:
    """Random codes: what a product costs does not depend on them."""
    kind: Any = name.partition("-")[0]
    groups = in_features // {"int4": GROUP, "nf4": 64}.get(kind, in_features)
    return QuantizedWeight(
        kind=kind,
        codes=_codes(kind, out_features, in_features),
        scales=torch.rand(out_features, groups) / 1000 + 0.001,
        zeros=torch.randint(-8, 8, (out_features, groups), dtype=torch.int16) if name == "int4-zeros" else None,
        activations="int8" if name == "int8-dynamic" else None,
    )


def _codes(kind: Kind, out_features: int, in_features: int) -> Tensor:
    if kind in ("int4", "nf4"):
        return torch.randint(0, 256, (out_features, in_features // 2), dtype=torch.uint8)
    codes = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    return codes if kind == "int8" else codes.float().to(torch.float8_e4m3fn)


def our_layers(library: NativeLibrary, name: str, in_features: int, widths: tuple[int, ...], x: Tensor) -> Work:
    """One call for all layers of an input, in as many copies as exceed the caches."""
    rows, calls = x.shape[0], []
    outputs = [torch.empty(rows, width, dtype=torch.bfloat16) for width in widths]
    keep: list[Any] = [outputs]
    for _ in range(num_copies(in_features, widths)):
        packer = Packer(library)
        packed = [packer.pack(_layer(name, in_features, width), None) for width in widths]
        members = (Member * len(widths))(*(member for member, _ in packed))
        for member, y in zip(members, outputs, strict=True):
            member.y = y.data_ptr()
        calls.append(members)
        keep.append(packed)

    def work(i: int, _: Any = keep) -> None:
        library.linear(x.data_ptr(), rows, in_features, calls[i % len(calls)], len(widths), None, 0, 1, 1)

    return work


def _layer(name: str, in_features: int, width: int) -> nn.Module:
    if name == "bf16":
        return nn.Linear(in_features, width, bias=False, dtype=torch.bfloat16)
    return QuantLinear(quantized(name, width, in_features))


def torch_layers(name: str, in_features: int, widths: tuple[int, ...], x: Tensor) -> Work:
    copies = [
        [_torch_weight(name, in_features, width) for width in widths] for _ in range(num_copies(in_features, widths))
    ]

    def work(i: int) -> None:
        for weight, scales in copies[i % len(copies)]:
            if name == "torch-int4":
                torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, GROUP, scales)
            else:
                torch.ops.aten._weight_int8pack_mm(x, weight, scales)

    return work


def _torch_weight(name: str, in_features: int, width: int) -> tuple[Tensor, Tensor]:
    if name == "torch-int8":
        return _codes("int8", width, in_features), torch.rand(width, dtype=torch.bfloat16)
    codes = torch.randint(0, 16, (width, in_features), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    return packed, torch.rand(in_features // GROUP, width, 2, dtype=torch.bfloat16)


def num_copies(in_features: int, widths: tuple[int, ...]) -> int:
    return max(1, COPIES_BYTES // (2 * in_features * sum(widths)))


def compare(plain: Work, other: Work, calls: int, pairs: int) -> dict[str, float]:
    """Medians of a call's microseconds, and of the pairs' ratios."""
    times: list[tuple[float, float]] = []
    for _ in range(pairs + 1):  # the first pair warms up
        marks = [time.perf_counter()]
        for work in (plain, other):
            for i in range(calls):
                work(i)
            marks.append(time.perf_counter())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    plain_s, other_s = (statistics.median(column) / calls for column in zip(*times[1:], strict=True))
    ratio = statistics.median(a / b for a, b in times[1:])
    return {"bf16_us": round(plain_s * 1e6, 1), "us": round(other_s * 1e6, 1), "speedup": round(ratio, 2)}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--layers", default=",".join(LAYERS))
    parser.add_argument("--rows", default="1,4,16,64,256")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    library = load_library()
    library.set_threads(args.threads)
    torch.set_num_threads(args.threads)
    for layer in args.layers.split(","):
        in_features, widths = LAYERS[layer]
        for rows in (int(rows) for rows in args.rows.split(",")):
            x = torch.randn(rows, in_features).bfloat16()
            plain = our_layers(library, "bf16", in_features, widths, x)
            for kind in args.kinds.split(","):
                if kind.startswith("torch-"):
                    other = torch_layers(kind, in_features, widths, x)
                else:
                    other = our_layers(library, kind, in_features, widths, x)
                figures = compare(plain, other, num_copies(in_features, widths), args.pairs)
                workload.print_figures({"layer": layer, "rows": rows, "kind": kind, **figures}, args)


if __name__ == "__main__":
    main()
