"""An engine without torch: after each letter its model says the next one, an adapter's model the one after that."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from engine.config import EngineConfig
from engine.core.plan import AdapterEvict, AdapterLoad, RowOutput, Sample, SequenceSlice, StepPlan, StepResult, TokenRef
from engine.engine import Engine, EngineParts
from engine.image_spec import ImageSpec
from engine.lora.image import AdapterImage, AdapterManifest
from engine.request import Request, SamplingParams
from engine.text.tokenizer import Tokenizer
from tests.support.tiny_model import EOS_ID, VOCAB_SIZE, make_tokenizer
from tests.support.waiting import happened

SPEC = ImageSpec(base_fingerprint="alphabet", dtype="float32", sites=())


@dataclass
class AlphabetRunner:
    """Implements `Runner`. Its switches make it fail, stall or be slow."""

    submit_errors: deque[Exception] = field(default_factory=deque)  # raised by the next submits, one each
    fails_with: Any = None  # plan -> exception or None, asked at each submit
    result_error: Exception | None = None
    poison: int | None = None  # a sequence whose last token is this one fails
    gate: threading.Event = field(default_factory=threading.Event)  # a step's result waits for it
    plans: list[StepPlan] = field(default_factory=list)
    images: dict[str, AdapterImage] = field(default_factory=dict)
    prepared: list[tuple[str, str]] = field(default_factory=list)  # (adapter, thread)
    num_most_in_flight: int = 0
    is_closed: bool = False

    def __post_init__(self) -> None:
        self.gate.set()
        self._slots: dict[int, str] = {}
        self._tokens: dict[TokenRef, int] = {}
        self._pending: set[int] = set()

    def prepare_adapter(self, image: AdapterImage) -> None:
        self.prepared.append((image.key, threading.current_thread().name))

    def add_adapter(self, image: AdapterImage) -> None:
        self.images[image.key] = image

    def remove_adapter(self, key: str) -> None:
        assert key not in self._slots.values(), f"{key} is resident"
        del self.images[key]

    def close(self) -> None:
        self.is_closed = True

    def submit(self, plan: StepPlan) -> _Pending:
        assert not self.is_closed
        if self.submit_errors:
            raise self.submit_errors.popleft()
        error = self.fails_with(plan) if self.fails_with else None
        if error is not None:
            raise error
        self.plans.append(plan)
        copied = []
        for op in plan.adapter_ops:
            if isinstance(op, AdapterLoad):
                assert op.adapter in self.images
                self._slots[op.lora_slot] = op.adapter
                copied.append(op.adapter)
            elif isinstance(op, AdapterEvict):
                self._slots.pop(op.lora_slot, None)
        samples = tuple(self._sample(plan, s) for s in plan.slices if s.output is RowOutput.SAMPLE)
        self._pending.add(plan.plan_id)
        self.num_most_in_flight = max(self.num_most_in_flight, len(self._pending))
        return _Pending(self, StepResult(plan.plan_id, samples, tuple(copied)))

    def _sample(self, plan: StepPlan, piece: SequenceSlice) -> Sample:
        last = piece.token_ids[-1]
        token = self._tokens[last] if isinstance(last, TokenRef) else last
        if token == self.poison:
            return Sample(piece.seq_id, (), error="the logits were not finite")
        token = ord("a") + (token - ord("a") + (2 if piece.lora_slot else 1)) % 26
        self._tokens[TokenRef(plan.plan_id, piece.row_end - 1)] = token
        return Sample(piece.seq_id, (token,))


@dataclass
class _Pending:
    runner: AlphabetRunner
    step: StepResult

    def result(self) -> StepResult:
        happened(self.runner.gate, "the test to open the gate of a step")
        self.runner._pending.discard(self.step.plan_id)
        if self.runner.result_error is not None:
            raise self.runner.result_error
        return self.step


@lru_cache
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer())


def make_parts(
    runner: AlphabetRunner, *, num_blocks: int = 65, max_model_len: int = 128, block_bytes: int = 0
) -> EngineParts:
    return EngineParts(
        runner=runner,
        tokenizer=tokenizer(),
        image_spec=SPEC,
        num_blocks=num_blocks,
        max_model_len=max_model_len,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS_ID,),
        cache_namespace="alphabet",
        block_bytes=block_bytes,
    )


def make_engine(runner: AlphabetRunner | None = None, **settings: Any) -> Engine:
    values: dict[str, Any] = {
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "max_queued_requests": 16,
        "adapter_bytes": 1024,
        "max_resident_adapters": 2,
        **settings,
    }
    sizes = {name: values.pop(name) for name in ("num_blocks", "max_model_len", "block_bytes") if name in values}
    parts = make_parts(runner or AlphabetRunner(), **sizes)
    return Engine(EngineConfig(model="alphabet", **values), parts=parts)


def make_request(request_id: str = "r", prompt: str = "a", adapter: str | None = None, **fields: Any) -> Request:
    own = {name: fields.pop(name) for name in ("resumed_output_token_ids", "sample_index") if name in fields}
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt.encode()),
        params=SamplingParams(**{"max_tokens": 8, "temperature": 0.0, **fields}),
        seed=0,
        adapter=adapter,
        **own,
    )


def make_image(key: str, num_bytes: int = 64) -> AdapterImage:
    manifest = AdapterManifest(spec_digest=SPEC.digest, dtype="float32", num_bytes=num_bytes, rank=1, entries=())
    return AdapterImage(key, manifest, bytes(num_bytes))


def run(engine: Engine, max_steps: int = 500) -> dict[tuple[str, int], str]:
    """Step until all is done; the text of each sample."""
    texts: dict[tuple[str, int], str] = {}
    for _ in range(max_steps):
        if not engine.has_work:
            return texts
        for update in engine.step():
            key = (update.request_id, update.sample_index)
            texts[key] = texts.get(key, "") + bytes(t for t in update.token_ids if t < 256).decode()
    raise AssertionError(f"the engine still has work after {max_steps} steps")
