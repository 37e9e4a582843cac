"""Checks an adapter's files against a base model's sites, before a byte of weights is used.

What comes out is complete: every tensor of the file has its place, every targeted site has its pair, and every rank and
shape is what the configuration and the base say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapter_store.errors import AdapterRejected, AdapterTooLarge
from adapter_store.image.config_fields import REFUSED_WHEN_SET, shown
from adapter_store.image.peft_config import LoraSettings, ModuleLora, is_head, parse_config
from adapter_store.image.safetensors_header import TensorInfo, parse_header
from adapter_store.image.spec import Site, Spec
from adapter_store.image.tensor_names import PREFIX, SUFFIXES, Named, old_names, read_names

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

_BASE_COPY = ".base_layer.weight"
# A file may have more bytes than its image: float32 that is packed as int8 has four times as many.
UPLOAD_FACTOR = 4
MAX_BYTES_SETTING = "max_adapter_bytes"
_ENTRY_BYTES = 160  # of one tensor in a header, beside its name; safetensors writes about 90
_SPARE_HEADER_BYTES = 512 << 10  # for metadata, and for tensors of parts that text does not use
_SHOWN_TARGETS = 5
_SHOWN_NAME_CHARS = 200

Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one adapter may be at most; None means no limit."""

    max_rank: int | None = None
    max_bytes: int | None = None  # of the packed image; the weights file may have `UPLOAD_FACTOR` times as many


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
    """An adapter that may be packed; `pairs` ascend by site index, `notices` tell what of it has no effect."""

    settings: LoraSettings
    pairs: tuple[SitePair, ...]
    notices: tuple[str, ...] = ()

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
                f"its weights are a pickle ({PICKLE_FILE}), which can run code when it is opened; convert it where you "
                "trust it: safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
                f"'{WEIGHTS_FILE}')"
            )
        raise AdapterRejected(f"{WEIGHTS_FILE} is missing")
    if CONFIG_FILE not in names:
        raise AdapterRejected(
            f"{CONFIG_FILE} is missing; it tells rank and scaling, and PEFT writes it beside {WEIGHTS_FILE}"
        )


def check_upload(num_bytes: int, limits: Limits) -> None:
    """Whether a weights file of so many bytes is looked at. Raises: AdapterTooLarge."""
    if limits.max_bytes is not None and num_bytes > UPLOAD_FACTOR * limits.max_bytes:
        setting = (
            f"{MAX_BYTES_SETTING} ({limits.max_bytes}; a file may have {UPLOAD_FACTOR} times as many as its image)"
        )
        raise AdapterTooLarge(WEIGHTS_FILE, num_bytes, UPLOAD_FACTOR * limits.max_bytes, setting=setting)


def max_header_bytes(spec: Spec) -> int:
    """What a header of an adapter of this base can need: a pair and a copy of the base's weight for each site, in any
    spelling. What has more is not parsed."""
    return _SPARE_HEADER_BYTES + sum(4 * (len(name) + _ENTRY_BYTES) for name in spec.sites)


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
    check_upload(num_bytes, limits)
    settings = parse_config(files[CONFIG_FILE], limits.max_rank)
    named = read_names(parse_header(files[WEIGHTS_FILE], num_bytes, max_header_bytes(spec)), spec)
    carried = _carried(settings, named, spec)
    pairs = _pairs(carried, named.tensors, spec)
    used = {tensor.name for pair in pairs for tensor in (pair.a, pair.b)}
    carriers = {pair.site.name: pair.site for pair in pairs}
    for name, tensor in named.tensors.items():
        if tensor.name not in used and not _is_base_copy(name, tensor, carriers):
            raise AdapterRejected(_why_unused(name, tensor.name, spec))
    if not pairs:
        raise AdapterRejected(_why_empty(settings, named, spec))
    if settings.ensure_weight_tying and any(pair.site.kind == "embedding" or is_head(pair.site.name) for pair in pairs):
        raise AdapterRejected(f"ensure_weight_tying is set to True: {REFUSED_WHEN_SET['ensure_weight_tying']}")
    notices = (*settings.notices, *named.notices(), *_unmatched(settings, spec))
    return Inspected(settings=settings, pairs=tuple(pairs), notices=notices)


def _carried(settings: LoraSettings, named: Named, spec: Spec) -> dict[str, ModuleLora]:
    """What the configuration says of the base's sites. It may call them what the file's tensors do."""
    carried = settings.modules({site.name: site.kind for site in spec.sites.values()})
    aliases = {old: site for site in spec.sites.values() for old in old_names(site.name, named.renames)}
    if aliases:
        by_old = settings.modules({old: site.kind for old, site in aliases.items()})
        carried |= {aliases[old].name: said for old, said in by_old.items()}
    return carried


def _unmatched(settings: LoraSettings, spec: Spec) -> tuple[str, ...]:
    """Tells of targets that are no module of the base, beside others that are: PEFT passes over them."""
    unmatched = settings.unmatched_targets(list(spec.sites))
    if not unmatched:
        return ()
    more = f" and {len(unmatched) - _SHOWN_TARGETS} more" if len(unmatched) > _SHOWN_TARGETS else ""
    listed = ", ".join(map(shown, unmatched[:_SHOWN_TARGETS]))
    return (f"target_modules names {listed}{more}, which is no module of the base that can carry LoRA",)


def _why_empty(settings: LoraSettings, named: Named, spec: Spec) -> str:
    if named.left_out:
        return f"all its tensors belong to {', '.join(map(repr, named.left_out))}, through which no text passes"
    unmatched = settings.unmatched_targets(list(spec.sites))
    if unmatched:
        return f"target_modules names {shown(unmatched[0])}, which is no module of the base that can carry LoRA"
    return "it has no LoRA tensors, so it would answer like the base"


def _pairs(carried: dict[str, ModuleLora], tensors: dict[str, TensorInfo], spec: Spec) -> list[SitePair]:
    pairs = []
    for site in sorted(spec.sites.values(), key=lambda site: site.index):
        if site.name not in carried:
            continue
        names = tuple(PREFIX + site.name + suffix for suffix in SUFFIXES[site.kind])
        for name in names:
            if name not in tensors:
                raise AdapterRejected(f"tensor {name!r} is missing, though target_modules targets {site.name!r}")
        pairs.append(_pair(carried[site.name], site, tensors[names[0]], tensors[names[1]]))
    return pairs


def _pair(said: ModuleLora, site: Site, a: TensorInfo, b: TensorInfo) -> SitePair:
    rank = said.rank
    for tensor, expected in ((a, (rank, site.in_features)), (b, (site.out_features, rank))):
        if 0 in tensor.shape:
            raise AdapterRejected(f"tensor {tensor.name!r} has shape {tensor.shape}: rank 0 is no adapter")
        if tensor.shape != expected:
            raise AdapterRejected(
                f"tensor {tensor.name!r} has shape {tensor.shape}; rank {rank} in the configuration and the base's "
                f"{site.in_features} -> {site.out_features} ask for {expected}"
            )
    return SitePair(site=site, rank=rank, scaling=said.scaling, a=a, b=b)


def _is_base_copy(name: str, tensor: TensorInfo, carriers: dict[str, Site]) -> bool:
    """Whether it is the frozen embedding or head that PEFT writes beside its LoRA when it targets one.

    PEFT never trains that copy, so leaving it out changes nothing; one of another shape tells of a resized vocabulary
    and is refused like any tensor that has no place.
    """
    if not name.startswith(PREFIX) or not name.endswith(_BASE_COPY):
        return False
    site = carriers.get(name[len(PREFIX) : -len(_BASE_COPY)])
    if site is None:
        return False
    if site.kind == "embedding":
        return tensor.shape == (site.in_features, site.out_features)
    return is_head(site.name) and tensor.shape == (site.out_features, site.in_features)


def _why_unused(name: str, in_file: str, spec: Spec) -> str:
    told = f"tensor {shown_name(in_file)} has no place"
    module = name.removeprefix(PREFIX)
    if module == name:
        return f"{told}: names of LoRA tensors begin with {PREFIX!r}, as PEFT's save_pretrained writes them"
    if module.endswith(_BASE_COPY):
        return f"{told}: it is not a copy of the base's embedding or head (was the vocabulary resized?)"
    if module.endswith(".bias"):
        return f"{told}: trained biases are not implemented; train with bias='none' and lora_bias=False"
    if module.endswith(".lora_magnitude_vector") or ".lora_magnitude_vector." in module:
        return f"{told}: DoRA is not implemented; train with use_dora=False"
    for kind, suffixes in SUFFIXES.items():
        for suffix in suffixes:
            if module.endswith(suffix):
                site = spec.sites.get(module[: -len(suffix)])
                if site is None:
                    return f"{told}: the base has no module {shown_name(module[: -len(suffix)])} that can carry LoRA"
                if site.kind != kind:
                    return f"{told}: {site.name!r} of the base is of kind {site.kind!r}"
                return f"{told}: the configuration does not target {site.name!r}"
    if ".modules_to_save." in module or ".original_module." in module:
        return f"{told}: full copies of base modules are not served; train LoRA on those modules instead"
    return f"{told}: it is neither lora_A nor lora_B of a module"


def shown_name(name: str) -> str:
    """A tensor's name in a message."""
    return repr(name if len(name) <= _SHOWN_NAME_CHARS else f"{name[:_SHOWN_NAME_CHARS]}...")
