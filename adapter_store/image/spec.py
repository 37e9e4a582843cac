"""An image spec as the store sees it: plain data, checked once, its digest computed as `engine.image_spec` does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from adapter_store.errors import SpecInvalid

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


@dataclass(frozen=True, slots=True)
class Site:
    """One module of the base that can carry LoRA."""

    index: int
    name: str
    in_features: int  # of an embedding: the vocabulary
    out_features: int
    kind: str


@dataclass(frozen=True, slots=True)
class Spec:
    """A checked spec: `sites` by module name, `digest` as the key of its images."""

    digest: str
    dtype: str
    sites: dict[str, Site]
    unused: tuple[str, ...] = ()  # modules of the base through which no text passes, a vision tower for example


def spec_digest(spec: Mapping[str, Any]) -> str:
    """sha256 (hex) of the canonical JSON of the spec; equals `engine.image_spec.ImageSpec.digest`."""
    return hashlib.sha256(json.dumps(spec, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_spec(spec: Mapping[str, Any]) -> Spec:
    """Checks a spec given as plain data.

    Raises: SpecInvalid, naming the value that cannot be packed for.
    """
    try:
        digest = spec_digest(dict(spec))
        dtype, tp_degree, rows = spec["dtype"], spec.get("tp_degree", 1), spec["sites"]
        unused = tuple(spec.get("unused", ()))
        sites = [
            Site(row["index"], row["name"], row["in_features"], row["out_features"], row.get("kind", "linear"))
            for row in rows
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise SpecInvalid(f"it lacks or garbles a field ({type(error).__name__}: {error})") from error
    if dtype not in DTYPE_BYTES:
        raise SpecInvalid(f"dtype is {dtype!r}, not one of {', '.join(DTYPE_BYTES)}")
    if tp_degree != 1:
        raise SpecInvalid(f"tp_degree is {tp_degree!r}; images are packed for a tensor-parallel degree of 1 only")
    for site in sites:
        sizes_fit = all(type(size) is int and size > 0 for size in (site.in_features, site.out_features))
        if not sizes_fit or type(site.index) is not int or site.index < 0:
            raise SpecInvalid(f"site {site.name!r} has impossible sizes or index")
        if site.kind not in ("linear", "embedding"):
            raise SpecInvalid(f"site {site.name!r} has kind {site.kind!r}, not 'linear' or 'embedding'")
    by_name = {site.name: site for site in sites}
    if not sites or len(by_name) != len(sites) or len({site.index for site in sites}) != len(sites):
        raise SpecInvalid("its sites are empty, or a name or index occurs twice")
    if not all(isinstance(part, str) and part for part in unused) or not _are_apart(unused, by_name):
        raise SpecInvalid(f"unused={unused!r} must be names of modules without sites")
    return Spec(digest=digest, dtype=dtype, sites=by_name, unused=unused)


def _are_apart(unused: tuple[str, ...], sites: Mapping[str, Site]) -> bool:
    """Whether no site is, or is in, a module that is said to be unused."""
    return not any(name == part or name.startswith(f"{part}.") for part in unused for name in sites)
