"""Whose tensor it is: the names in an adapter's file, read as names of the base's modules.

A file may have been written by another version of transformers, where the same module had another name; or be a state
dict as PEFT holds it, with the adapter's own name in each key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from adapter_store.errors import AdapterRejected
from adapter_store.image.safetensors_header import TensorInfo
from adapter_store.image.spec import Spec

PREFIX = "base_model.model."
SUFFIXES = {
    "linear": (".lora_A.weight", ".lora_B.weight"),
    "embedding": (".lora_embedding_A", ".lora_embedding_B"),
}
_PARTS = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|base_layer|lora_\w+|bias|weight)(?=\.|\Z)")
_ADAPTER = re.compile(r"\.(lora_A|lora_B)\.([^.]+)\.weight|\.(lora_embedding_A|lora_embedding_B)\.([^.]+)")
# Models that also see or hear keep their decoder below `model.language_model` since transformers 4.52, and had it
# elsewhere before, each family in its place (transformers.conversion_mapping). Where a text model was made of one, it
# is below `model`. From the start of a name: what it was, what it is.
RENAMED = (
    ("language_model.model.", "model.language_model."),
    ("model.language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("model.language_model.lm_head", "lm_head"),
    ("language_model.", "model.language_model."),
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("model.", "model.language_model."),
    ("model.", "language_model.model."),
    ("model.language_model.", "language_model.model."),
    ("", "model."),
)


@dataclass(slots=True)
class Named:
    """The tensors of a file by the names that the base's modules give them, and what was done for that."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)  # part of the base that text does not use -> its tensors
    adapters: set[str] = field(default_factory=set)  # names of adapters in the keys
    renames: dict[str, str] = field(default_factory=dict)  # beginnings of names, as the file has them -> as the base

    def notices(self) -> Iterator[str]:
        """One sentence for each thing that was done."""
        for part, number in self.left_out.items():
            yield f"{number} tensors of {part!r} are left out: text does not pass through it"
        if self.adapters:
            yield f"the name of the adapter in its tensors' names ({', '.join(map(repr, self.adapters))}) is left out"
        for old, new in self.renames.items():
            yield f"names that begin with {old!r} are read as {new!r}, as the base's modules are called now"


def read_names(tensors: Mapping[str, TensorInfo], spec: Spec) -> Named:
    """Raises: AdapterRejected when two tensors are the same one of the base, or the file holds several adapters."""
    named = Named()
    for name, tensor in tensors.items():
        module, rest = _split(name)
        if module is None:
            named.tensors[name] = tensor
            continue
        rest, adapter = _without_adapter(rest)
        if adapter is not None:
            named.adapters.add(adapter)
        found, rename = _in_base(module, spec)
        if rename is not None:
            named.renames[rename[0]] = rename[1]
        part = _unused_part(found, spec)
        if part is not None:
            named.left_out[part] = named.left_out.get(part, 0) + 1
            continue
        key = PREFIX + found + rest
        if key in named.tensors:
            raise AdapterRejected(f"tensors {named.tensors[key].name!r} and {name!r} are the same one of the base")
        named.tensors[key] = tensor
    if len(named.adapters) > 1:
        raise AdapterRejected(
            f"it holds several adapters ({', '.join(sorted(map(repr, named.adapters))[:3])}); save each in a folder of "
            "its own"
        )
    return named


def old_names(name: str, renames: Mapping[str, str]) -> Iterable[str]:
    """What the file may call the base's module `name`."""
    return (old + name[len(new) :] for old, new in renames.items() if name.startswith(new))


def _split(name: str) -> tuple[str | None, str]:
    """The module and what follows it; None: the name is no LoRA tensor's."""
    if not name.startswith(PREFIX):
        return None, name
    found = _PARTS.search(name, len(PREFIX))
    return (None, name) if found is None else (name[len(PREFIX) : found.start()], name[found.start() :])


def _without_adapter(rest: str) -> tuple[str, str | None]:
    found = _ADAPTER.fullmatch(rest)
    if found is None:
        return rest, None
    linear, of_linear, embedding, of_embedding = found.groups()
    return (f".{linear}.weight", of_linear) if linear else (f".{embedding}", of_embedding)


def _in_base(module: str, spec: Spec) -> tuple[str, tuple[str, str] | None]:
    """What the base calls `module`, and the beginning that had to be changed for it."""
    if module in spec.sites or _unused_part(module, spec) is not None:
        return module, None
    for old, new in RENAMED:
        if module.startswith(old):
            renamed = new + module[len(old) :]
            if renamed in spec.sites or _unused_part(renamed, spec) is not None:
                return renamed, (old, new)
    return module, None


def _unused_part(module: str, spec: Spec) -> str | None:
    return next((part for part in spec.unused if module == part or module.startswith(f"{part}.")), None)
