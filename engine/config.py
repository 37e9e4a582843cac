"""Every setting of the engine, each default once. `None` means: resolved at load from the model and the machine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Protocol, get_args

from engine.errors import ConfigError

MIB = 1 << 20

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
    max_model_len: int | None = None  # tokens of prompt and output; None: what the model was made for
    block_size: int = 16  # P, tokens of KV cache in one block
    kv_cache_bytes: int | None = None  # with adapters in its pages; None: 256 MiB on the CPU, what a GPU has left
    kv_cache_dtype: KVCacheDType = "auto"  # auto: the model's; a scale per token and head with int8, fp8 (Hopper on)
    max_num_seqs: int = 64  # running sequences
    max_num_batched_tokens: int = 1024  # rows of one step
    max_queued_requests: int = 1024  # waiting requests; one more is refused with QueueFull
    adapter_bytes: int = 512 * MIB  # resident adapters at most, true rank, as packed
    min_adapter_bytes: int = 0  # of the KV cache's pages: so much of them no sequence gets
    adapter_dtype: AdapterDType = "auto"  # of packed adapters: the model's, or codes of half its bytes and less exact
    adapter_memory: AdapterMemory = "auto"  # borrowed from shared memory, or KV pages; auto: on the CPU, on a GPU
    adapter_copy_bytes_per_s: int | None = None  # into pages, beside the steps; None: as fast as the bus
    max_resident_adapters: int = 256  # LoRA slots, without the base
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
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        check_step_limits(self)
        if self.min_adapter_bytes < 0:
            raise ConfigError(f"min_adapter_bytes={self.min_adapter_bytes} must not be negative")
        if not self.step_timeout_s > 0:
            raise ConfigError(f"step_timeout_s={self.step_timeout_s} must be more than 0")
        self._check_choices()
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
        if self.min_adapter_bytes > self.adapter_bytes:
            raise ConfigError(
                f"min_adapter_bytes={self.min_adapter_bytes} is more than adapter_bytes={self.adapter_bytes}: lower "
                "the first or raise the second"
            )

    def has_adapter_pages(self) -> bool:
        """Whether adapters lie in pages of the KV cache, and share its bytes with sequences."""
        memory = self.adapter_memory
        has_lora = self.adapter_bytes > 0 and self.max_resident_adapters > 0
        return has_lora and (memory == "pages" or (memory == "auto" and self.device != "cpu"))

    def adapter_pages(self, page_bytes: int) -> tuple[int, int]:
        """Floor and ceiling of adapters in pages of the KV cache, if they lie there: at least and at most so many.

        Equal settings are equal numbers: what the floor has of a page counts whole only below the ceiling.
        """
        if not self.has_adapter_pages():
            return 0, 0
        most = self.adapter_bytes // page_bytes
        return min(-(-self.min_adapter_bytes // page_bytes), most), most

    def plans_in_flight(self) -> int:
        """pipeline_depth, resolved: on a GPU the host plans a step while the one before it runs."""
        return self.pipeline_depth or (1 if self.device == "cpu" else 2)

    def _check_types(self) -> None:
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            kind, description = _KINDS.get(setting.name, (int, "a whole number"))
            # bool is an int to Python, and nobody means max_num_seqs=True.
            fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
            if not fits and not (value is None and setting.default is None):
                raise ConfigError(f"{setting.name}={value!r} must be {description}")

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(cls))


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
}
_POSITIVE = (
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
