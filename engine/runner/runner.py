"""The one that executes plans with torch: in order, on one device."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

from engine.config import EngineConfig, SizedConfig
from engine.core.plan import NO_LORA, AdapterEvict, AdapterLoad, LoraSegment, Sample, StepPlan, StepResult, TokenRef
from engine.errors import AdapterError, ConfigError
from engine.grammar.compiler import Grammars
from engine.kv.storage import KVStorage
from engine.lora.copier import Copier, CudaPages, HostPages, Pacer
from engine.lora.image import ALIGNMENT_BYTES, AdapterImage
from engine.lora.storage import AdapterStorage, BorrowedStorage, PagedStorage
from engine.model.attention import forward_both, forward_hidden, forward_logits, head_of
from engine.model.loader import LoadedModel
from engine.model.rope import install_row_lengths
from engine.runner.guesses import check_guesses
from engine.runner.inputs import InputBuilder, StepInputs
from engine.runner.layers import PreparedLayers, prepare_layers
from engine.runner.memory import kv_shape
from engine.runner.protocol import StepNotLaunched
from engine.runner.rehearsal import rehearse
from engine.runner.sampler import SampledStep, Sampler
from engine.runner.vectors import Head, Vectors, VectorStep
from engine.to_device import upload, use_device

if TYPE_CHECKING:  # it loads Triton
    from engine.runner.graphs import DecodeGraphs

COPY_WAIT_S = 0.005
"""How long a step without rows waits for an adapter, so that the step thread does not spin until the copy is there."""


class PendingTorchStep:
    """A step whose kernels are queued (on the CPU: done). `num_waits`: for copies of adapters, before this step."""

    def __init__(
        self,
        plan: StepPlan,
        sampler: Sampler,
        sampled: SampledStep | None,
        vectors: VectorStep | None,
        adapters: AdapterStorage,
        num_waits: int,
    ) -> None:
        self._plan = plan
        self._sampler = sampler
        self._sampled = sampled
        self._vectors = vectors
        self._adapters = adapters
        self._has_waited = adapters.num_waits > num_waits

    def result(self) -> StepResult:
        vectors = () if self._vectors is None else self._vectors.vectors
        samples: tuple[Sample, ...] = ()
        if self._sampled is not None:
            samples = self._sampler.took(check_guesses(self._plan.slices, self._sampled.samples))
        num_waits = self._adapters.num_waits
        if not self._plan.slices:
            self._adapters.wait(COPY_WAIT_S)
        has_waited = self._has_waited or self._adapters.num_waits > num_waits
        return StepResult(self._plan.plan_id, samples, self._adapters.copied(), has_waited, vectors)


class TorchRunner:
    """Runner over a loaded model, which it takes over: its linear layers become LoRA layers.

    Not thread-safe: one thread submits. `add_adapter` and `remove_adapter` belong to the same thread.
    """

    def __init__(
        self, loaded: LoadedModel, config: SizedConfig, num_blocks: int, grammars: Grammars | None = None
    ) -> None:
        """`grammars`: None if no request is ever constrained."""
        if config.num_threads is not None and loaded.device.type == "cpu":
            torch.set_num_threads(config.num_threads)
        use_device(loaded.device)
        self.loaded = loaded
        self.num_blocks = num_blocks
        self._storage = KVStorage(kv_shape(loaded, config), num_blocks, loaded.device)
        self._lengths = None if loaded.length_rule is None else install_row_lengths(loaded.model)
        layers = prepare_layers(loaded, config, self._storage)
        swapped = layers.library is not None or layers.triton is not None
        rehearse(loaded, layers, self._storage, num_blocks, swapped=swapped)
        self._backend, self._batch = layers.backend, layers.batch
        with_lengths = self._lengths is not None
        self._inputs = InputBuilder(config.block_size, loaded.device, self._resolve, with_lengths=with_lengths)
        self._vectors = Vectors()
        vocab_size, eos_token_ids = loaded.capabilities.vocab_size, loaded.eos_token_ids
        self._sampler = Sampler(vocab_size, loaded.device, eos_token_ids, layers.library, grammars)
        self._graphs = _decode_graphs(loaded, config, layers)
        self._images: dict[str, AdapterImage] = {}
        self._slots: dict[str, int] = {}  # resident adapter -> LoRA slot
        self._adapters = _adapter_storage(config, self._storage)
        # Sampled tokens of the last plans, on the device: plan id -> (row -> index, tokens [N]).
        self._sampled: OrderedDict[int, tuple[dict[int, int], torch.Tensor]] = OrderedDict()
        self._max_plans_kept = config.plans_in_flight() + 1
        self._last_plan_id = -1

    def prepare_adapter(self, image: AdapterImage) -> None:
        """Callable from any thread, unlike the rest."""
        self._adapters.prepare(image)

    def add_adapter(self, image: AdapterImage) -> None:
        """Adding a key again replaces its image, unless it is resident: a key names one version."""
        if image.key not in self._slots:
            self._images[image.key] = image

    def remove_adapter(self, key: str) -> None:
        """Raises: AdapterError if the adapter is resident."""
        if key in self._slots:
            raise AdapterError(f"adapter {key!r} is resident in slot {self._slots[key]}; evict it before removing it")
        self._images.pop(key, None)

    def close(self) -> None:
        """End the thread that copies adapters, if there is one. Nothing is submitted afterwards."""
        self._adapters.close()

    def submit(self, plan: StepPlan) -> PendingTorchStep:
        """Execute a plan after all earlier ones.

        Raises: StepNotLaunched when memory runs out. KV slots of the plan's own rows may have been written and its
        adapter operations and ends done by then: a later plan computes the rows again, and may repeat the others.
        Anything else is fatal.
        """
        if plan.plan_id <= self._last_plan_id:
            raise ValueError(f"plan {plan.plan_id} comes after plan {self._last_plan_id}")
        num_waits = self._adapters.num_waits
        use_device(self.loaded.device)  # the thread that submits need not be the one that loaded the model
        try:
            with torch.inference_mode():
                inputs, sampled, vectors = self._execute(plan)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            raise StepNotLaunched(
                f"out of memory with {plan.num_rows} rows; lower max_num_batched_tokens or kv_cache_bytes: {error}"
            ) from error
        self._last_plan_id = plan.plan_id
        if inputs is not None and sampled is not None:
            rows = {sample.row: i for i, sample in enumerate(inputs.samples)}
            self._sampled[plan.plan_id] = (rows, sampled.token_ids)
        while self._sampled and next(iter(self._sampled)) <= plan.plan_id - self._max_plans_kept:
            self._sampled.popitem(last=False)
        return PendingTorchStep(plan, self._sampler, sampled, vectors, self._adapters, num_waits)

    def _execute(self, plan: StepPlan) -> tuple[StepInputs | None, SampledStep | None, VectorStep | None]:
        for seq_id in plan.ends:
            self._sampler.end(seq_id)
            self._vectors.end(seq_id)
        for op in plan.adapter_ops:
            self._apply(op)
        self._storage.copy_blocks([c.src for c in plan.block_copies], [c.dst for c in plan.block_copies])
        for start in plan.starts:
            (self._sampler if start.numbers is None else self._vectors).start(start)
        if not plan.slices:
            return None, None, None
        inputs = self._inputs.build(plan)
        self._batch.set(inputs.segments, inputs.sampled_segments)
        model = self.loaded.model
        gives_vectors = inputs.pools or bool(inputs.scored)
        is_recorded = self._graphs is not None and self._graphs.fits(inputs) and not self._batch.needs_python
        is_recorded = is_recorded and not gives_vectors
        if self._lengths is not None:  # of recorded rows, which are the last of their texts, those up to themselves
            self._lengths.tokens = None if is_recorded else inputs.lengths
        if self._graphs is not None and is_recorded:
            return inputs, self._sampler.sample(self._graphs.logits(inputs), inputs.samples), None
        self._backend.plan(inputs.attention)
        if gives_vectors:
            return inputs, *self._with_vectors(plan, inputs)
        if not inputs.samples:
            forward_hidden(model, inputs.input_ids, inputs.positions, self._backend)
            return inputs, None, None
        logits = forward_logits(model, inputs.input_ids, inputs.positions, inputs.sampled_rows, self._backend)
        return inputs, self._sampler.sample(logits, inputs.samples), None

    def _with_vectors(self, plan: StepPlan, inputs: StepInputs) -> tuple[SampledStep | None, VectorStep]:
        if not self._vectors.scores_prompts(plan.slices):
            return self._take_vectors(plan, inputs, None)
        with head_of(self.loaded.model, self._backend) as head:

            def logits(rows: torch.Tensor, lora_slot: int) -> torch.Tensor:
                """With the output layer's own LoRA."""
                segments = () if lora_slot == NO_LORA else (LoraSegment(0, len(rows), lora_slot),)
                self._batch.set(inputs.segments, segments)
                return head(rows)

            return self._take_vectors(plan, inputs, logits)

    def _take_vectors(
        self, plan: StepPlan, inputs: StepInputs, head: Head | None
    ) -> tuple[SampledStep | None, VectorStep]:
        model, rows = self.loaded.model, (inputs.input_ids, inputs.positions)
        if not (inputs.samples or inputs.scored):
            return None, self._vectors.take(plan.slices, forward_hidden(model, *rows, self._backend), None, head)
        hidden, logits = forward_both(model, *rows, inputs.sampled_rows, self._backend)
        scored = None
        if inputs.scored:
            is_scored = set(inputs.scored)
            others = [i for i in range(logits.shape[0]) if i not in is_scored]
            scored = logits[upload(inputs.scored, logits.device)]
            logits = logits[upload(others, logits.device)]
        vectors = self._vectors.take(plan.slices, hidden, scored, head)  # before the sampler overwrites logits
        return self._sampler.sample(logits, inputs.samples) if inputs.samples else None, vectors

    def _apply(self, op: AdapterLoad | AdapterEvict) -> None:
        """Raises: AdapterError if the plan and this runner disagree on what is resident."""
        if isinstance(op, AdapterEvict):
            # Repeated after a plan that was abandoned: done already, or never begun.
            if self._slots.get(op.adapter) == op.lora_slot:
                del self._slots[op.adapter]
                self._batch.unbind(op.lora_slot)
                self._adapters.evict(op.adapter)
            return
        image = self._images.get(op.adapter)
        if image is None:
            raise AdapterError(f"plan loads adapter {op.adapter!r}, whose image was never added")
        weights = self._adapters.load(image, op.pages)
        # Noted before memory can run out in `bind`: the next plan's eviction must find what this one began.
        self._slots[op.adapter] = op.lora_slot
        self._batch.bind(op.lora_slot, weights)

    def _resolve(self, ref: TokenRef) -> torch.Tensor:
        rows, tokens = self._sampled[ref.plan_id]
        return tokens[rows[ref.row]]


def _adapter_storage(config: EngineConfig, kv: KVStorage) -> AdapterStorage:
    """Raises: ConfigError if adapters cannot lie in the pages of this cache."""
    if not config.has_adapter_pages():
        return BorrowedStorage()
    if kv.shape.block_bytes % ALIGNMENT_BYTES:
        raise ConfigError(
            f"block_size={config.block_size} makes KV blocks of {kv.shape.block_bytes} bytes, and adapters can only "
            f"lie in pages of a multiple of {ALIGNMENT_BYTES}: raise block_size, or set adapter_memory='borrowed' (on "
            "the CPU)"
        )
    device = HostPages(kv.pages) if kv.data.device.type == "cpu" else CudaPages(kv.pages)
    return PagedStorage(kv.pages, kv.shape.block_bytes, Copier(device, Pacer(config.adapter_copy_bytes_per_s)))


def _decode_graphs(loaded: LoadedModel, config: SizedConfig, layers: PreparedLayers) -> DecodeGraphs | None:
    """None: steps are launched kernel by kernel."""
    if layers.triton is None or not config.cuda_graphs or loaded.device.type != "cuda":
        return None
    from engine.runner.graphs import CudaRecorder, DecodeGraphs

    backend, lora = layers.triton
    max_blocks = -(-loaded.max_model_len // config.block_size)
    graphs = DecodeGraphs(loaded, backend, lora, config.max_num_seqs, max_blocks, CudaRecorder())
    with torch.inference_mode():
        return graphs if graphs.record_all() else None


def _is_out_of_memory(error: RuntimeError) -> bool:
    """CUDA has a class for it; the CPU allocator has a sentence."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
