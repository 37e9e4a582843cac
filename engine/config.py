"""Every setting of the engine, each default once. `None` means: resolved at load from the model and the machine.

So does "auto" where a size may be given: engine/sizing and docs/sizing.md say how.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Protocol, get_args

from engine.errors import ConfigError

MIB = 1 << 20

Auto = Literal["auto"]
AUTO: Auto = "auto"
Device = Literal["cpu", "cuda"]
DType = Literal["auto", "float32", "float16", "bfloat16"]
AdapterMemory = Literal["auto", "borrowed", "pages"]
AdapterDType = Literal["auto", "int8"]
Kernels = Literal["auto", "native", "triton", "torch"]
Quantization = Literal["int8", "int8-dynamic", "int4", "nf4", "fp8"]
KVCacheDType = Literal["auto", "int8", "fp8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine. `max_` limits are inclusive. `validate()` raises ConfigError."""

    model: str  # folder with a transformers checkpoint
    tokenizer: str | None = None  # folder; None: the model's
    device: Device = "cpu"
    dtype: DType = "auto"  # auto: what the checkpoint says; bfloat16 for a quantized one in float16 on the CPU
    quantization: Quantization | None = None  # linear layers of a 16-bit checkpoint are rounded to it at load
    quantize_lm_head: bool = False  # the output layer too
    quantize_embeddings: bool = False  # the input embeddings too, to int8
    memory_bytes: int | Auto = AUTO  # of RAM, or of a GPU's memory, for weights, cache and steps together
    memory_fraction: float | Auto = AUTO  # of what there is; auto: 0.9 of a GPU or a container, half of a whole machine
    max_model_len: int | Auto = AUTO  # tokens of prompt and output; auto: what the model was made for, if it fits
    block_size: int = 16  # P, tokens of KV cache in one block
    kv_cache_bytes: int | Auto = AUTO  # with adapters in its pages; auto: what the rest leaves and sequences can fill
    kv_cache_dtype: KVCacheDType = "auto"  # auto: the model's; a scale per token and head with int8, fp8 (Hopper on)
    max_num_seqs: int | Auto = AUTO  # running sequences; auto: at most 64 on the CPU, 256 on a GPU
    max_num_batched_tokens: int | Auto = AUTO  # rows of one step; auto: at most 1024 on the CPU, 2048 on a GPU
    max_queued_requests: int = 1024  # waiting requests; one more is refused with QueueFull
    adapter_bytes: int | Auto = AUTO  # resident adapters at most, true rank, as packed; auto: a share of the cache
    min_adapter_bytes: int = 0  # of the KV cache's pages: so much of them no sequence gets
    adapter_dtype: AdapterDType = "auto"  # of packed adapters: the model's, or codes of half its bytes and less exact
    adapter_memory: AdapterMemory = "auto"  # borrowed from shared memory, or KV pages; auto: on the CPU, on a GPU
    adapter_copy_bytes_per_s: int | None = None  # into pages, beside the steps; None: as fast as the bus
    max_resident_adapters: int | Auto = AUTO  # LoRA slots, without the base; auto: by adapter_bytes, at most 256
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True  # off: a prompt is computed in one step or waits for a free one
    pipeline_depth: int | None = None  # plans in flight; None: 1 on the CPU, 2 on a GPU
    num_threads: int | None = None  # of torch on the CPU; None: as torch finds the machine
    kernels: Kernels = "auto"  # native (AVX-512), triton (CUDA): those or an error; auto: those if they can be used
    cuda_graphs: bool = True  # decode steps are recorded at start-up and replayed
    step_timeout_s: float = 300.0  # a longer step is taken for a hanging device and ends the engine

    def validate(self) -> None:
        """Raises: ConfigError naming the setting, its value, the limit and the remedy."""
        self._check_types()
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value != AUTO and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        if self.memory_fraction != AUTO and not 0 < self.memory_fraction <= 1:
            raise ConfigError(f"memory_fraction={self.memory_fraction} must be more than 0 and at most 1")
        if self.min_adapter_bytes < 0:
            raise ConfigError(f"min_adapter_bytes={self.min_adapter_bytes} must not be negative")
        if not self.step_timeout_s > 0:
            raise ConfigError(f"step_timeout_s={self.step_timeout_s} must be more than 0")
        self._check_choices()
        check_step_limits(self.resolved())
        self._check_quantization()
        self._check_kv_cache_dtype()
        self._check_adapter_memory()

    def _check_choices(self) -> None:
        for name, kind in _CHOICES.items():
            value, choices = getattr(self, name), get_args(kind)
            if value is not None and value not in choices:
                raise ConfigError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")

    def _check_quantization(self) -> None:
        for name in ("quantize_lm_head", "quantize_embeddings"):
            if getattr(self, name) and self.quantization is None:
                raise ConfigError(f"{name}=True means nothing without `quantization`: set both, or leave it at False")

    def _check_kv_cache_dtype(self) -> None:
        # Where somebody asks for them by name, torch and Triton's interpreter do on a CPU what a GPU would.
        if self.kv_cache_dtype == "fp8" and self.device == "cpu" and self.kernels not in ("torch", "triton"):
            raise ConfigError(
                "kv_cache_dtype='fp8' needs a GPU, and this is device='cpu': use 'int8' (or, to try what a GPU would "
                "do, slowly, kernels='torch')"
            )

    def _check_adapter_memory(self) -> None:
        if self.adapter_memory == "borrowed" and self.device != "cpu":
            raise ConfigError(
                "adapter_memory='borrowed' needs device='cpu': a GPU does not read the memory that images are in; "
                "use 'pages'"
            )
        if self.min_adapter_bytes and not self.has_adapter_pages():
            raise ConfigError(
                f"min_adapter_bytes={self.min_adapter_bytes} means nothing where adapters take no pages of the KV "
                "cache: set adapter_memory='pages' and adapter_bytes, or leave it at 0"
            )
        if self.adapter_bytes != AUTO and self.min_adapter_bytes > self.adapter_bytes:
            raise ConfigError(
                f"min_adapter_bytes={self.min_adapter_bytes} is more than adapter_bytes={self.adapter_bytes}: lower "
                "the first or raise the second"
            )

    def has_adapter_pages(self) -> bool:
        """Whether adapters lie in pages of the KV cache, and share its bytes with sequences."""
        memory = self.adapter_memory
        return self.has_lora() and (memory == "pages" or (memory == "auto" and self.device != "cpu"))

    def has_lora(self) -> bool:
        """Whether adapters may be loaded at all."""
        return all(size == AUTO or size > 0 for size in (self.adapter_bytes, self.max_resident_adapters))

    def plans_in_flight(self) -> int:
        """pipeline_depth, resolved: on a GPU the host plans a step while the one before it runs."""
        return self.pipeline_depth or (1 if self.device == "cpu" else 2)

    def resolved(self, **sizes: int) -> SizedConfig:
        """With `sizes`, and of other sizes left to "auto" the most that is ever chosen beside those that are given."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        most = dict.fromkeys(SIZES, 0) | CEILINGS[self.device]
        rows, seqs = self.max_num_batched_tokens, self.max_num_seqs
        if rows == AUTO and seqs != AUTO:
            most["max_num_batched_tokens"] = max(seqs, most["max_num_batched_tokens"])
        if rows != AUTO:
            most["max_num_seqs"] = min(rows, most["max_num_seqs"])
        most["adapter_bytes"] = max(self.min_adapter_bytes, most["adapter_bytes"])
        return SizedConfig(**fields | {name: (most | sizes)[name] for name in SIZES if fields[name] == AUTO})

    def _check_types(self) -> None:
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            if value == AUTO and setting.default == AUTO and isinstance(value, str):
                continue
            kind, description = _KINDS.get(setting.name, (int, "a whole number"))
            description += " or 'auto'" if setting.default == AUTO and kind is not str else ""
            # bool is an int to Python, and nobody means max_num_seqs=True.
            fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if not fits and not (value is None and setting.default is None):
                raise ConfigError(f"{setting.name}={value!r} must be {description}")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(cls))


@dataclass(frozen=True, slots=True, kw_only=True)
class SizedConfig(EngineConfig):
    """An EngineConfig whose sizes are all numbers: what was given, and what was chosen for the rest."""

    max_model_len: int
    kv_cache_bytes: int
    max_num_seqs: int
    max_num_batched_tokens: int
    adapter_bytes: int
    max_resident_adapters: int

    def adapter_pages(self, page_bytes: int) -> tuple[int, int]:
        """Floor and ceiling of adapters in pages of the KV cache, if they lie there: at least and at most so many.

        Equal settings are equal numbers: what the floor has of a page counts whole only below the ceiling.
        """
        if not self.has_adapter_pages():
            return 0, 0
        most = self.adapter_bytes // page_bytes
        return min(-(-self.min_adapter_bytes // page_bytes), most), most


SIZES = (
    "max_model_len",
    "kv_cache_bytes",
    "max_num_seqs",
    "max_num_batched_tokens",
    "adapter_bytes",
    "max_resident_adapters",
)
"""Settings that SizedConfig has as numbers."""
CEILINGS: dict[str, dict[str, int]] = {
    "cpu": {
        "max_num_seqs": 64,
        "max_num_batched_tokens": 1024,
        "max_resident_adapters": 256,
        "adapter_bytes": 512 * MIB,
    },
    "cuda": {
        "max_num_seqs": 256,
        "max_num_batched_tokens": 2048,
        "max_resident_adapters": 256,
        "adapter_bytes": 64 << 30,
    },
}
"""The most that "auto" ever chooses, by device."""

_CHOICES: dict[str, Any] = {
    "device": Device,
    "dtype": DType,
    "quantization": Quantization,
    "kv_cache_dtype": KVCacheDType,
    "adapter_dtype": AdapterDType,
    "adapter_memory": AdapterMemory,
    "kernels": Kernels,
}


def _either(kind: Any) -> str:
    """'a', 'b' or 'c'."""
    *others, last = map(repr, get_args(kind))
    return f"{', '.join(others)} or {last}"


# Those that are no whole number.
_KINDS: dict[str, tuple[type | UnionType, str]] = {
    **{name: (str, _either(kind)) for name, kind in _CHOICES.items()},
    "model": (str, "the path of a folder"),
    "tokenizer": (str, "the path of a folder"),
    "quantize_lm_head": (bool, "True or False"),
    "quantize_embeddings": (bool, "True or False"),
    "cuda_graphs": (bool, "True or False"),
    "enable_prefix_caching": (bool, "True or False"),
    "enable_chunked_prefill": (bool, "True or False"),
    "step_timeout_s": (int | float, "a number of seconds"),
    "memory_fraction": (int | float, "a number"),
}
_POSITIVE = (
    "memory_bytes",
    "max_model_len",
    "block_size",
    "kv_cache_bytes",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_queued_requests",
    "pipeline_depth",
    "num_threads",
    "adapter_copy_bytes_per_s",
)


class StepLimits(Protocol):
    """What a step may hold, of an engine's configuration as of its scheduler's."""

    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def adapter_bytes(self) -> int: ...
    @property
    def max_resident_adapters(self) -> int: ...


def check_step_limits(limits: StepLimits) -> None:
    """Raises: ConfigError for limits that exclude each other. Before a model is loaded, and again by the scheduler."""
    if min(limits.adapter_bytes, limits.max_resident_adapters) < 0:
        raise ConfigError(
            f"adapter_bytes={limits.adapter_bytes} and max_resident_adapters={limits.max_resident_adapters} "
            "must not be negative; 0 turns LoRA off"
        )
    if limits.max_num_batched_tokens < limits.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens={limits.max_num_batched_tokens} is less than max_num_seqs={limits.max_num_seqs}: "
            "a step must be able to decode every running sequence; raise the first or lower the second"
        )


def live_blocks(num_tokens: int, block_size: int, window_tokens: int | None, rows_in_flight: int) -> int:
    """Blocks that a sequence of so many tokens holds at most at a time.

    Where every layer has a window, a block goes when no row in flight or to come sees it. What is left are the rows in
    flight and what the first of them sees, which need not begin with a block.
    """
    num_blocks = -(-num_tokens // block_size)
    if window_tokens is None:
        return num_blocks
    return min(num_blocks, -(-(window_tokens - 1 + rows_in_flight) // block_size) + 1)
