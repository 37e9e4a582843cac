"""Checks an adapter's files against a base model's sites, before a byte of weights is used.

What comes out is complete: every tensor of the file has its place, every targeted site has its pair, and every rank and
shape is what the configuration and the base say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapter_store.errors import AdapterRejected, AdapterTooLarge
from adapter_store.image.peft_config import OUTPUT_HEADS, LoraSettings, parse_config
from adapter_store.image.safetensors_header import TensorInfo, parse_header
from adapter_store.image.spec import Site, Spec

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
# Seen beside or instead of the two, they mean something that is not served.
PICKLE_FILE = "adapter_model.bin"
REFUSED_FILES = {
    "new_embeddings.safetensors": "vocabulary added by an adapter is not served; resize the base instead",
    "new_embeddings.bin": "vocabulary added by an adapter is not served; resize the base instead",
    "adapter_model.safetensors.index.json": "sharded adapters are not served; save it as one file",
}
KNOWN_FILES = (*ADAPTER_FILES, PICKLE_FILE, *REFUSED_FILES)

_PREFIX = "base_model.model."
_SUFFIXES = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}
_BASE_COPY = ".base_layer.weight"

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one adapter may be at most; None means no limit."""

    max_rank: int | None = None
    max_bytes: int | None = None  # of the weights file, and of the packed image


@dataclass(frozen=True, slots=True, kw_only=True)
class SitePair:
    """The two tensors of one site.

    Shapes: linear a [rank, in], b [out, rank]; embedding a [rank, vocabulary], b [out, rank].
    """

    site: Site
    rank: int
    scaling: float
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspected:
    """An adapter that may be packed; `pairs` ascend by site index."""

    settings: LoraSettings
    pairs: tuple[SitePair, ...]

    @property
    def rank(self) -> int:
        """The highest rank of all its pairs."""
        return max(pair.rank for pair in self.pairs)


def check_file_names(names: tuple[str, ...]) -> None:
    """Refuses, from the names alone, what is not a safetensors LoRA adapter.

    Raises: AdapterRejected.
    """
    for name in names:
        if name in REFUSED_FILES:
            raise AdapterRejected(f"it holds {name}: {REFUSED_FILES[name]}")
    if WEIGHTS_FILE not in names:
        if PICKLE_FILE in names:
            raise AdapterRejected(
                f"its weights are a pickle ({PICKLE_FILE}), which can run code when it is opened; "
                f"save it as {WEIGHTS_FILE} (safe_serialization=True)"
            )
        raise AdapterRejected(f"{WEIGHTS_FILE} is missing")
    if CONFIG_FILE not in names:
        raise AdapterRejected(f"{CONFIG_FILE} is missing")


def inspect(
    files: Mapping[str, Buffer], spec: Spec, limits: Limits | None = None, weights_bytes: int | None = None
) -> Inspected:
    """Checks `files` (name -> content) against `spec`.

    Of the weights the header is enough, if `weights_bytes` says how many bytes the whole file has.
    Raises: AdapterRejected with the first thing that is wrong; AdapterTooLarge.
    """
    limits = limits or Limits()
    check_file_names(tuple(files))
    num_bytes = len(files[WEIGHTS_FILE]) if weights_bytes is None else weights_bytes
    if limits.max_bytes is not None and num_bytes > limits.max_bytes:
        raise AdapterTooLarge(WEIGHTS_FILE, num_bytes, limits.max_bytes)
    settings = parse_config(files[CONFIG_FILE], limits.max_rank)
    tensors = parse_header(files[WEIGHTS_FILE], num_bytes)
    names = list(spec.sites)
    unmatched = settings.unmatched_targets(names)
    if unmatched:
        raise AdapterRejected(
            f"target_modules names {unmatched[0]!r}, which is no module of the base that can carry LoRA"
        )
    pairs = _pairs(settings, tensors, spec)
    used = {tensor.name for pair in pairs for tensor in (pair.a, pair.b)}
    carriers = {pair.site.name: pair.site for pair in pairs}
    for name, tensor in tensors.items():
        if name not in used and not _is_base_copy(tensor, carriers):
            raise AdapterRejected(_why_unused(name, spec, settings))
    if not pairs:
        raise AdapterRejected("it has no LoRA tensors, so it would answer like the base")
    return Inspected(settings=settings, pairs=tuple(pairs))


def _pairs(settings: LoraSettings, tensors: dict[str, TensorInfo], spec: Spec) -> list[SitePair]:
    pairs = []
    for site in sorted(spec.sites.values(), key=lambda site: site.index):
        if not settings.targets(site.name, site.kind):
            continue
        names = tuple(_PREFIX + site.name + suffix for suffix in _SUFFIXES[site.kind])
        for name in names:
            if name not in tensors:
                raise AdapterRejected(f"tensor {name!r} is missing, though target_modules targets {site.name!r}")
        pairs.append(_pair(settings, site, tensors[names[0]], tensors[names[1]]))
    return pairs


def _pair(settings: LoraSettings, site: Site, a: TensorInfo, b: TensorInfo) -> SitePair:
    rank = settings.rank_of(site.name)
    for tensor, expected in ((a, (rank, site.in_features)), (b, (site.out_features, rank))):
        if 0 in tensor.shape:
            raise AdapterRejected(f"tensor {tensor.name!r} has shape {tensor.shape}: rank 0 is no adapter")
        if tensor.shape != expected:
            raise AdapterRejected(
                f"tensor {tensor.name!r} has shape {tensor.shape}; rank {rank} in the configuration and the base's "
                f"{site.in_features} -> {site.out_features} ask for {expected}"
            )
    return SitePair(site=site, rank=rank, scaling=settings.scaling_of(site.name), a=a, b=b)


def _is_base_copy(tensor: TensorInfo, carriers: dict[str, Site]) -> bool:
    """Whether it is the frozen embedding or head that PEFT writes beside its LoRA when it targets one.

    PEFT never trains that copy, so leaving it out changes nothing; one of another shape tells of a resized vocabulary
    and is refused like any tensor that has no place.
    """
    if not tensor.name.startswith(_PREFIX) or not tensor.name.endswith(_BASE_COPY):
        return False
    site = carriers.get(tensor.name[len(_PREFIX) : -len(_BASE_COPY)])
    if site is None:
        return False
    if site.kind == "embedding":
        return tensor.shape == (site.in_features, site.out_features)
    return site.name.rsplit(".", 1)[-1] in OUTPUT_HEADS and tensor.shape == (site.out_features, site.in_features)


def _why_unused(name: str, spec: Spec, settings: LoraSettings) -> str:
    told = f"tensor {name!r} has no place"
    module = name.removeprefix(_PREFIX)
    if module == name:
        return f"{told}: names of LoRA tensors begin with {_PREFIX!r}"
    if module.endswith(_BASE_COPY):
        return f"{told}: it is not a copy of the base's embedding or head (was the vocabulary resized?)"
    for kind, suffixes in _SUFFIXES.items():
        for suffix in suffixes:
            if module.endswith(suffix):
                site = spec.sites.get(module[: -len(suffix)])
                if site is None:
                    return f"{told}: the base has no module {module[: -len(suffix)]!r} that can carry LoRA"
                if site.kind != kind:
                    return f"{told}: {site.name!r} of the base is of kind {site.kind!r}"
                return f"{told}: the configuration does not target {site.name!r}"
    return f"{told}: it is neither lora_A nor lora_B of a module; save the adapter with PEFT's save_pretrained"
