"""What a step costs the host beside the model: scheduling, input building, commit and output handling.

    python -m benchmarks.overhead --sequences 64

The forward pass is left out: a runner builds the inputs of each plan, plans the attention, and answers at once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import workload
from engine.config import EngineConfig
from engine.core.plan import RowOutput, Sample, StepPlan, StepResult
from engine.engine import Engine, EngineParts
from engine.image_spec import ImageSpec
from engine.kv.native_attention import NativeAttention
from engine.kv.storage import KVShape, KVStorage
from engine.lora.batch import LoraBatch
from engine.native.library import NativeUnavailable, load_library
from engine.output import OutputProcessor
from engine.request import Request, SamplingParams
from engine.runner.inputs import InputBuilder
from engine.text.tokenizer import Tokenizer

BLOCK_SIZE = 16


class NoModel:
    """A runner that does all that the host does for a step, and no arithmetic."""

    def __init__(self, num_blocks: int) -> None:
        storage = KVStorage(KVShape(1, BLOCK_SIZE, 1, 16, torch.float32), num_blocks)
        try:
            self._attention: NativeAttention | None = NativeAttention(load_library(), storage)
        except NativeUnavailable:
            self._attention = None
        self._batch = LoraBatch()
        self._inputs = InputBuilder(BLOCK_SIZE, torch.device("cpu"), lambda ref: torch.zeros(()))

    def submit(self, plan: StepPlan) -> Any:
        inputs = self._inputs.build(plan)
        self._batch.set(inputs.segments, inputs.sampled_segments)
        if self._attention is not None:
            self._attention.plan(inputs.attention)
            self._attention.rows(1)
        samples = tuple(Sample(s.seq_id, (97 + s.position % 26,)) for s in plan.slices if s.output is RowOutput.SAMPLE)
        return Done(StepResult(plan_id=plan.plan_id, samples=samples))


class Done:
    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/base", help="for its tokenizer")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    max_len = args.prompt_tokens + args.steps + 64
    num_blocks = 2 + args.sequences * (-(-max_len // BLOCK_SIZE))
    tokenizer = Tokenizer.load(args.model)
    runner: Any = NoModel(num_blocks)
    config = EngineConfig(
        model=str(Path(args.model)), max_num_seqs=args.sequences, max_num_batched_tokens=8192, block_size=BLOCK_SIZE
    )
    parts = EngineParts(
        runner=runner,
        tokenizer=tokenizer,
        image_spec=ImageSpec(base_fingerprint="none", dtype="float32", sites=()),
        num_blocks=num_blocks,
        max_model_len=max_len,
        vocab_size=256,
        eos_token_ids=(),
        cache_namespace="none",
    )
    engine, processor = Engine(config, parts=parts), OutputProcessor(tokenizer)
    for i in range(args.sequences):
        params = SamplingParams(max_tokens=args.steps, temperature=0.0, ignore_eos=True)
        prompt = tuple(40 + (i + k) % 80 for k in range(args.prompt_tokens))
        request = Request(request_id=str(i), prompt_token_ids=prompt, params=params, seed=0)
        engine.add_request(request)
        processor.open(request)
    seconds = []
    while engine.has_work:
        start = time.perf_counter()
        for update in engine.step():
            processor.process(update)
        seconds.append(time.perf_counter() - start)
    steps = sorted(seconds[10 : args.steps - 10])
    figures = {
        "step_ms": round(statistics.median(steps) * 1e3, 3),
        "p90_ms": round(steps[len(steps) * 9 // 10] * 1e3, 3),
    }
    workload.print_figures({"case": f"{args.sequences} sequences", **figures}, args)


if __name__ == "__main__":
    main()
