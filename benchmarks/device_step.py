"""Steps of a large model on one device against what its memory and its arithmetic units allow.

    python -m benchmarks.device_step --shape llama8b --batches 1,32,256 --contexts 512,2048 --adapters 600
    python -m benchmarks.device_step --shape llama8b --batches 1,256 --quantization int4

Weights and adapters are random and made on the device. Plans go to the runner directly, so that contexts of any length
need no prefill; two are in flight, as in an engine on a GPU. A decode step of B rows with N different adapters takes at
least

    max(2 p B / P, W / BW) + KV / BW + N a / BW

where p are the parameters a token meets, W their bytes (where they are quantized, of codes and scales), KV the bytes
of the keys and values read, a those of an adapter; the rates P (products) and BW (copies) are measured in the same run.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from benchmarks import workload
from benchmarks.make_model import SHAPES
from engine.checkpoint.placing import finish, replace_linear
from engine.config import EngineConfig, Quantization
from engine.core.draft import lora_segments
from engine.core.plan import RowOutput, SequenceSlice, SequenceStart, StepPlan, TokenRef
from engine.lora.storage import SiteWeights
from engine.model.attention import ATTENTION_NAME
from engine.model.capabilities import judge
from engine.model.loader import LoadedModel
from engine.model.probe import probe
from engine.model.surgery import find_sites
from engine.quant.linear import QuantLinear
from engine.quant.rounding import round_weight
from engine.request import SamplingParams
from engine.runner.runner import PendingTorchStep, TorchRunner

GREEDY = SamplingParams(max_tokens=None, temperature=0.0, ignore_eos=True)
WARM_UP_STEPS = 4


@dataclass(frozen=True)
class Rates:
    """Of the device."""

    flop_per_s: float
    bytes_per_s: float

    @staticmethod
    def measure(device: torch.device, dtype: torch.dtype, size: int, num_bytes: int) -> Rates:
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        product_s = fastest(lambda: a @ b, device)
        copy_s = fastest(lambda: target.copy_(source), device)
        return Rates(2 * size**3 / product_s, 2 * num_bytes / copy_s)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fastest(run: Callable[[], object], device: torch.device, rounds: int = 10) -> float:
    """Seconds."""
    seconds = []
    for _ in range(rounds):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def random_model(
    shape: str, device: torch.device, dtype: torch.dtype, max_model_len: int, rounding: Rounding | None = None
) -> LoadedModel:
    config_class, sizes = SHAPES[shape]
    config = config_class(**sizes)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION_NAME)
    model = model.to(device).eval().requires_grad_(False)
    if rounding is not None:
        rounding.apply(model)
    trace = probe(model)
    return LoadedModel(
        model=model,
        hf_config=config,
        sites=find_sites(model, trace),
        capabilities=judge(model, trace, max_model_len),
        fingerprint="random",
        dtype=dtype,
        device=device,
        eos_token_ids=(),
        max_model_len=max_model_len,
    )


@dataclass(frozen=True)
class Rounding:
    """As the engine's settings of these names."""

    method: Quantization
    lm_head: bool

    def apply(self, model: Any) -> None:
        head = model.get_output_embeddings()
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and (self.lm_head or module is not head):
                replace_linear(model, name, round_weight(module.weight, self.method))
        finish(model)


def count_weights(model: Any) -> tuple[int, int, int]:
    """Parameters that a token meets, how many of them are the head's, and the bytes of all."""
    numbers, num_bytes, of_head = 0, 0, 0
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, QuantLinear):
            size, size_bytes = module.in_features * module.out_features, module.quantized.num_bytes
        elif module is head or not isinstance(module, nn.Embedding):
            own = list(module.parameters(recurse=False))
            size, size_bytes = sum(p.numel() for p in own), sum(p.numel() * p.element_size() for p in own)
        else:
            continue
        numbers, num_bytes = numbers + size, num_bytes + size_bytes
        of_head += size if module is head else 0
    return numbers, of_head, num_bytes


class Bench:
    """A runner, plans for it, and random adapters in its slots."""

    def __init__(self, args: argparse.Namespace, batches: list[int], contexts: list[int]) -> None:
        self.device, self.dtype = torch.device(args.device), getattr(torch, args.dtype)
        max_len = max(*contexts, args.prefill_tokens) + args.steps * 2 + 2 * WARM_UP_STEPS
        rounding = Rounding(args.quantization, args.quantize_lm_head) if args.quantization else None
        loaded = random_model(args.shape, self.device, self.dtype, max_len, rounding)
        self.num_parameters, self.num_head_parameters, self.weight_bytes = count_weights(loaded.model)
        self.blocks_per_sequence = -(-max_len // args.block_size)
        self.config = EngineConfig(
            model="random",
            device=args.device,
            dtype=args.dtype,
            block_size=args.block_size,
            max_num_seqs=max(batches),
            max_num_batched_tokens=max(max(batches), args.prefill_sequences * args.prefill_tokens),
            max_resident_adapters=args.adapters,
            kernels=args.kernels,
        ).resolved()
        num_blocks = max(max(batches), args.prefill_sequences) * self.blocks_per_sequence + 1
        self.token_bytes = loaded.capabilities.kv_shape(1, self.dtype).block_bytes
        self.sites = [site for site in loaded.sites if site.layer is not None]
        self.adapter_bytes = 2 * args.rank * sum(site.in_features + site.out_features for site in self.sites)
        self.runner = TorchRunner(loaded, self.config, num_blocks)
        self._next_plan, self._next_seq = 0, 0
        self._ended: tuple[int, ...] = ()  # sequences of the last run
        self._adapters = [self._bind(slot, args.rank) for slot in range(1, args.adapters + 1)]

    def _bind(self, slot: int, rank: int) -> Tensor:
        flat = torch.randn(self.adapter_bytes // 2, device=self.device).mul_(0.01).to(self.dtype)
        weights, at = [], 0
        for site in self.sites:
            sizes = (rank * site.in_features, rank * site.out_features)
            a, b = flat[at : at + sum(sizes)].split(sizes)
            weights.append(SiteWeights(site.index, a.view(rank, -1), b.view(rank, -1), 1.0))
            at += sum(sizes)
        self.runner._batch.bind(slot, weights)
        return flat

    def decode_s(self, slots: list[int], context: int, steps: int) -> float:
        """Seconds of a step with a row for each slot (0: the base), each after `context` tokens."""
        plans = self._decode_plans(sorted(slots), context, WARM_UP_STEPS + steps)
        return self._run(plans, steps)

    def prefill_s(self, sequences: int, tokens: int) -> float:
        plans = (self._plan([0] * sequences, 0, (7,) * tokens, starts=True, ends=True) for _ in range(2))
        return self._run(plans, 1)

    def _run(self, plans: Iterator[StepPlan], steps: int) -> float:
        """Seconds of each of the last `steps` plans, two in flight."""
        in_flight: deque[PendingTorchStep] = deque()
        ends: list[float] = []
        for plan in plans:
            in_flight.append(self.runner.submit(plan))
            if len(in_flight) == self.config.plans_in_flight():
                in_flight.popleft().result()
                ends.append(time.perf_counter())
        for pending in in_flight:
            pending.result()
            ends.append(time.perf_counter())
        return (ends[-1] - ends[-1 - steps]) / steps

    def _decode_plans(self, slots: list[int], context: int, count: int) -> Iterator[StepPlan]:
        for step in range(count):
            row_token = [(TokenRef(self._next_plan - 1, row) if step else 7,) for row in range(len(slots))]
            yield self._plan(slots, context - 1 + step, row_token, starts=not step, ends=step == count - 1)

    def _plan(
        self,
        slots: list[int],
        position: int,
        tokens: tuple[int, ...] | list[tuple[int | TokenRef, ...]],
        *,
        starts: bool,
        ends: bool,
    ) -> StepPlan:
        """A slice for each slot, with the same tokens or each with its own."""
        rows = tokens if isinstance(tokens, list) else [tokens] * len(slots)
        slices: list[SequenceSlice] = []
        for i, (slot, ids) in enumerate(zip(slots, rows, strict=True)):
            first_block = 1 + i * self.blocks_per_sequence
            table = tuple(range(first_block, first_block + self.blocks_per_sequence))
            row = slices[-1].row_end if slices else 0
            slices.append(SequenceSlice(self._next_seq + i, row, ids, position, table, slot, RowOutput.SAMPLE, 0))
        starting = tuple(SequenceStart(s.seq_id, (7,), (), GREEDY, 0, 0) for s in slices) if starts else ()
        plan = StepPlan(
            plan_id=self._next_plan,
            slices=tuple(slices),
            lora_segments=lora_segments(slices),
            starts=starting,
            ends=self._ended,
        )
        self._next_plan, self._ended = self._next_plan + 1, ()
        if ends:
            self._ended = tuple(range(self._next_seq, self._next_seq + len(slots)))
            self._next_seq += len(slots)
        return plan


def adapter_cases(num_adapters: int, batch: int) -> dict[str, list[int]]:
    """The slot of each row."""
    if not num_adapters:
        return {}
    shares = [1 / slot for slot in range(1, num_adapters + 1)]
    zipf = random.Random(0).choices(range(1, num_adapters + 1), shares, k=batch)
    return {
        "one adapter": [1] * batch,
        f"{num_adapters} adapters, zipf": zipf,
        "all different": [1 + row % num_adapters for row in range(batch)],
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--quantization", choices=get_args(Quantization), help="None: weights stay in --dtype")
    parser.add_argument("--quantize-lm-head", action="store_true")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--batches", default="1,32,256")
    parser.add_argument("--contexts", default="512,2048")
    parser.add_argument("--adapters", type=int, default=600)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill-sequences", type=int, default=8)
    parser.add_argument("--prefill-tokens", type=int, default=2048)
    parser.add_argument("--product-size", type=int, default=8192, help="of the square matrices that tell the rate")
    parser.add_argument("--copy-mib", type=int, default=4096)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    batches, contexts = ([int(n) for n in text.split(",")] for text in (args.batches, args.contexts))
    with torch.inference_mode():
        rates = Rates.measure(
            torch.device(args.device), getattr(torch, args.dtype), args.product_size, args.copy_mib << 20
        )
        bench = Bench(args, batches, contexts)
    workload.print_figures(
        {
            "case": "rates",
            "tflop_per_s": round(rates.flop_per_s / 1e12, 2),
            "gb_per_s": round(rates.bytes_per_s / 1e9, 1),
        },
        args,
    )
    for batch in batches:
        for context in contexts:
            for row in decode_rows(bench, rates, args, batch, context):
                workload.print_figures(row, args)
    seconds = min(bench.prefill_s(args.prefill_sequences, args.prefill_tokens) for _ in range(args.rounds))
    layer_parameters = bench.num_parameters - bench.num_head_parameters
    flop = 2 * args.prefill_sequences * (layer_parameters * args.prefill_tokens + bench.num_head_parameters)
    workload.print_figures(
        {
            "case": f"prefill of {args.prefill_sequences} x {args.prefill_tokens}",
            "ms": round(seconds * 1e3, 3),
            "of_product_rate": round(flop / seconds / rates.flop_per_s, 3),
        },
        args,
    )


def decode_rows(
    bench: Bench, rates: Rates, args: argparse.Namespace, batch: int, context: int
) -> Iterator[dict[str, object]]:
    """The base against its floor; then each kind of adapters, a round of the base before each of its rounds."""
    weights_s = max(2 * bench.num_parameters * batch / rates.flop_per_s, bench.weight_bytes / rates.bytes_per_s)
    floor_s = weights_s + batch * context * bench.token_bytes / rates.bytes_per_s
    base_s = [bench.decode_s([0] * batch, context, args.steps) for _ in range(args.rounds)]
    where = f"decode {batch} x {context}"
    median_s = statistics.median(base_s)
    yield {
        "case": f"{where}, base",
        "ms": round(median_s * 1e3, 3),
        "floor_ms": round(floor_s * 1e3, 3),
        "of_floor": round(floor_s / median_s, 3),
        "tokens_per_s": round(batch / median_s, 1),
    }
    for name, slots in adapter_cases(args.adapters, batch).items():
        pairs = [
            (bench.decode_s([0] * batch, context, args.steps), bench.decode_s(slots, context, args.steps))
            for _ in range(args.rounds)
        ]
        lora_s = statistics.median(b for _, b in pairs)
        lora_floor_s = floor_s + len(set(slots)) * bench.adapter_bytes / rates.bytes_per_s
        yield {
            "case": f"{where}, {name}",
            "distinct": len(set(slots)),
            "ms": round(lora_s * 1e3, 3),
            "times_floor": round(lora_s / lora_floor_s, 3),
            "share_of_base": round(statistics.median(a / b for a, b in pairs), 3),
        }


if __name__ == "__main__":
    main()
