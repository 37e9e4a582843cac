"""Adapters in eight bits beside adapters in the model's dtype: what they cost in quality, and save in bytes and time.

    python -m benchmarks.quantized.adapter_dtypes --parts images,answers,kernels

images     bytes of each demo adapter's image, and the relative error of its LoRA part on random inputs, against float64
answers    exact answers of each demo adapter on held-out lines (as demo/evaluate.py counts them), by the engine
kernels    one LoRA site in the compiled CPU kernel, int8 against bfloat16: medians of interleaved pairs
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from adapter_store.image.packing import PackedImage, pack_folder
from benchmarks import workload
from demo.text import held_out
from demo.transforms import TRANSFORMS
from engine import LLM, EngineConfig, SamplingParams
from engine.engine import Engine
from engine.image_spec import ImageSpec
from engine.lora.image import AdapterImage, AdapterManifest
from engine.lora.storage import BorrowedStorage, SiteWeights
from engine.native.library import NativeLibrary, load_library
from engine.native.structs import ELEMENTS, LoraChunk, LoraWeights, Member

DTYPES = ("auto", "int8")
# Sites of a model of 0.5 B parameters: in, out.
SITES = {"q, o": (896, 896), "gate, up": (896, 4864), "down": (4864, 896)}
NUM_CYCLED = 48 << 20  # weights of adapters that are cycled through: more than caches hold
NUM_INPUTS = 256


def images(args: argparse.Namespace) -> None:
    specs = [Engine(EngineConfig(model=args.model, dtype=dtype)).image_spec for dtype in ("float32", "bfloat16")]
    codes = Engine(EngineConfig(model=args.model, dtype="bfloat16", adapter_dtype="int8")).image_spec
    for name, folder in workload.adapter_folders(args).items():
        exact = _weights(pack_folder(folder, specs[0].to_dict()), specs[0])
        figures: dict[str, object] = {"case": f"image of {name}"}
        for spec in (specs[1], codes):
            packed = pack_folder(folder, spec.to_dict())
            errors = [_error(w, one) for w, one in zip(exact, _weights(packed, spec), strict=True)]
            figures[spec.dtype] = {
                "bytes": packed.num_bytes,
                "mean_error": round(statistics.mean(errors), 5),
                "max_error": round(max(errors), 5),
            }
        workload.print_figures(figures, args)


def _weights(packed: PackedImage, spec: ImageSpec) -> tuple[SiteWeights, ...]:
    manifest = AdapterManifest.from_dict(packed.manifest, spec)
    return BorrowedStorage().load(AdapterImage("one", manifest, packed.data))


def _error(exact: SiteWeights, rounded: SiteWeights) -> float:
    """Of the low-rank product of a linear site: root mean square, relative to the exact product's."""
    x = torch.randn(NUM_INPUTS, exact.a.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = rounded.a.double(), rounded.b.double()
    if rounded.scales is not None:
        a, b = a * rounded.scales[0].double()[:, None], b * rounded.scales[1].double()[:, None]
    expected = x @ exact.a.double().T @ exact.b.double()
    return float((x @ a.T @ b - expected).norm() / expected.norm())


def answers(args: argparse.Namespace) -> None:
    folders = workload.adapter_folders(args)
    for dtype in args.dtypes.split(","):
        right: dict[str, dict[str, int]] = {name: {} for name in folders}
        for adapter_dtype in DTYPES:
            llm = LLM(args.model, folders, dtype=dtype, adapter_dtype=adapter_dtype)
            for name in folders:
                asked = held_out(name, TRANSFORMS[name], args.count, 0)
                given = llm.generate(
                    [one.prompt for one in asked], SamplingParams(max_tokens=128, temperature=0.0), name
                )
                right[name][adapter_dtype] = sum(
                    output.text == one.answer and output.finish_reason == "stop"
                    for output, one in zip(given, asked, strict=True)
                )
        totals = {adapter_dtype: sum(by[adapter_dtype] for by in right.values()) for adapter_dtype in DTYPES}
        workload.print_figures({"case": f"answers in {dtype}", "asked": args.count, **right, "all": totals}, args)


class Site:
    """One site with an adapter of its own for each row, or one for all rows, in copies that fill the memory given."""

    def __init__(
        self, memory: dict[str, Tensor], widths: tuple[int, int], rows: int, rank: int, *, shared: bool
    ) -> None:
        self._rows, self._widths, self._rank = rows, widths, rank
        self._num_adapters = 1 if shared else rows
        self.num_copies = max(1, memory["int8"].numel() // (rank * sum(widths) * self._num_adapters))
        self._x, self._y = torch.randn(rows, widths[0]), torch.zeros(rows, widths[1])
        self._scales = torch.full((2, rank), 0.01)
        self._tables = {
            kind: [self._table(flat, copy) for copy in range(self.num_copies)] for kind, flat in memory.items()
        }
        chunks = [LoraChunk(0, rows, 1)] if shared else [LoraChunk(row, 1, row + 1) for row in range(rows)]
        self._chunks = (LoraChunk * len(chunks))(*chunks)

    def _table(self, flat: Tensor, copy: int) -> ctypes.Array[LoraWeights]:
        table = (LoraWeights * (self._num_adapters + 1))()
        scales = self._scales.data_ptr() if flat.dtype is torch.int8 else None
        for slot in range(1, self._num_adapters + 1):
            begin = (copy * self._num_adapters + slot - 1) * self._rank * sum(self._widths)
            a = flat.data_ptr() + begin * flat.itemsize
            b = a + self._rank * self._widths[0] * flat.itemsize
            table[slot] = LoraWeights(a, b, self._rank, 1e-3, ELEMENTS[flat.dtype], scales)
        return table

    def seconds(self, library: NativeLibrary, kind: str) -> float:
        """Of a call, on average over all copies."""
        member = Member(out_features=self._widths[1], y=self._y.data_ptr())
        begin = time.perf_counter()
        for table in self._tables[kind]:
            member.lora = ctypes.addressof(table)
            library.add_lora(
                self._x.data_ptr(),
                self._rows,
                self._widths[0],
                ctypes.byref(member),
                1,
                self._chunks,
                len(self._chunks),
            )
        return (time.perf_counter() - begin) / self.num_copies


def kernels(args: argparse.Namespace) -> None:
    library = load_library()
    library.set_threads(args.threads)
    codes = torch.randint(-127, 128, (NUM_CYCLED,), dtype=torch.int8)
    memory = {"bfloat16": codes.bfloat16(), "int8": codes}
    for rows, shared in ((1, False), (16, False), (16, True)):
        for rank, (name, widths) in _cases(args):
            site = Site(memory, widths, rows, rank, shared=shared)
            pairs = [(site.seconds(library, "bfloat16"), site.seconds(library, "int8")) for _ in range(args.rounds)]
            figures = {
                "case": f"{name}, rank {rank}, {rows} rows of {'one adapter' if shared else 'an adapter each'}",
                "bfloat16_us": round(statistics.median(one for one, _ in pairs) * 1e6, 1),
                "int8_us": round(statistics.median(one for _, one in pairs) * 1e6, 1),
                "speedup": round(statistics.median(one / other for one, other in pairs), 2),
            }
            workload.print_figures(figures, args)


def _cases(args: argparse.Namespace) -> Iterator[tuple[int, tuple[str, tuple[int, int]]]]:
    return ((int(rank), site) for rank in args.ranks.split(",") for site in SITES.items())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="images,answers,kernels")
    parser.add_argument("--model", default="demo/base")
    parser.add_argument("--adapters", type=Path, default=Path("demo/adapters"), help="folder of PEFT adapters")
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of the model, for the answers")
    parser.add_argument("--count", type=int, default=200, help="held-out lines per adapter")
    parser.add_argument("--ranks", default="8,16,64", help="of the kernels' adapters")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.set_defaults(cases="mixed_adapters", num_adapters=None)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    parts = {"images": images, "answers": answers, "kernels": kernels}
    for part in args.parts.split(","):
        parts[part](args)


if __name__ == "__main__":
    main()
