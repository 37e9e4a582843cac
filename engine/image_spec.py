"""A site is a place of the base model that can carry LoRA; an ImageSpec says how adapters must be packed for it.

Plain data, standard library only: `deployments` hands `ImageSpec.to_dict()` to the adapter store, which packs images
by it; `engine.lora` reads them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

SiteKind = Literal["linear", "embedding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSite:
    """One module that can carry LoRA: y = W x + scaling * B (A x)."""

    index: int  # position in the model's frozen, ordered list of sites
    name: str  # qualified module name, as PEFT writes it after `base_model.model.`
    in_features: int  # of an embedding: the vocabulary
    out_features: int
    kind: SiteKind = "linear"
    layer: int | None = None  # decoder layer, None outside the layers (lm_head, embeddings)
    fusion_group: str | None = None  # sites of one group read the same input: q/k/v, gate/up
    shard_axis: Literal["in", "out"] | None = None  # how tensor parallelism would cut it


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How an adapter image must look for one base model: its sites, element type and tensor-parallel degree.

    The element type is that of the image, not of what the base computes in: "int8" serves a base of any.
    """

    base_fingerprint: str  # digest of the base's architecture and sites; changes when the base does
    dtype: Literal["float32", "float16", "bfloat16", "int8"]
    sites: tuple[LinearSite, ...]
    tp_degree: int = 1
    # Modules through which no text passes, a vision tower for example: what an adapter has for them is left out.
    unused: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Without `unused` where there is none: of such a base, images made before there was that field stay good."""
        plain = asdict(self)
        if not self.unused:
            del plain["unused"]
        return plain

    @cached_property  # milliseconds for hundreds of sites, and each adapter that is read asks for it
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of `to_dict()`: images are keyed by (adapter version, this)."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()
