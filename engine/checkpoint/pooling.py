"""How a checkpoint wants its hidden states pooled: what sentence-transformers writes beside the weights.

Without its files: the last token's, as of any decoder. Vectors are normalised, as vLLM normalises them, unless
`modules.json` lists the steps and normalising is none of them.
Standard library only: routers read it too.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, InvalidRequest
from engine.pooling import Pool, Pooling

_MODES = {
    "pooling_mode_lasttoken": Pool.LAST,
    "pooling_mode_mean_tokens": Pool.MEAN,
    "pooling_mode_cls_token": Pool.CLS,
}


@dataclass(frozen=True, slots=True)
class PoolingDefaults:
    """What a request for a vector means that says nothing, and what it may say."""

    pool: Pool = Pool.LAST
    normalize: bool = True
    # Whether the first numbers of a vector are a vector of fewer dimensions (arXiv 2205.13147), and of which numbers.
    is_matryoshka: bool = False
    matryoshka_dimensions: tuple[int, ...] = ()  # empty: any

    def pooling(
        self, dimensions: int | None = None, pool: Pool | None = None, normalize: bool | None = None
    ) -> Pooling:
        """Raises: InvalidRequest (`dimensions`) if this model's vectors must not be cut so."""
        if dimensions is not None:
            if not self.is_matryoshka:
                raise InvalidRequest(
                    "dimensions", f"{dimensions}: this model was not trained for vectors that are cut; leave it out"
                )
            if self.matryoshka_dimensions and dimensions not in self.matryoshka_dimensions:
                known = ", ".join(map(str, self.matryoshka_dimensions))
                raise InvalidRequest("dimensions", f"{dimensions} is none of this model's: {known}")
        return Pooling(
            pool=self.pool if pool is None else pool,
            normalize=self.normalize if normalize is None else normalize,
            dimensions=dimensions,
        )


def pooling_defaults(folder: str | os.PathLike[str]) -> PoolingDefaults:
    """Raises: ConfigError when a file cannot be read, or asks for a pooling that is not served."""
    folder = Path(folder)
    config = _read(folder / "config.json") or {}
    dimensions = tuple(i for i in config.get("matryoshka_dimensions") or () if isinstance(i, int))
    is_matryoshka = bool(config.get("is_matryoshka") or dimensions)
    modules = _read(folder / "modules.json")
    if modules is None:
        return PoolingDefaults(is_matryoshka=is_matryoshka, matryoshka_dimensions=dimensions)
    steps = [module for module in modules if isinstance(module, dict)]
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in steps]
    pool = Pool.LAST
    for kind, module in zip(kinds, steps, strict=True):
        if kind == "Pooling":
            pool = _pool(folder / str(module.get("path", "")) / "config.json")
        elif kind not in ("Transformer", "Normalize"):
            raise ConfigError(f"{str(folder / 'modules.json')!r} asks for the step {kind!r}, which is not served")
    return PoolingDefaults(pool, "Normalize" in kinds, is_matryoshka, dimensions)


def _pool(path: Path) -> Pool:
    config = _read(path) or {}
    asked = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    if len(asked) == 1 and asked[0] in _MODES:
        return _MODES[asked[0]]
    known = ", ".join(_MODES)
    raise ConfigError(f"{str(path)!r} asks for {', '.join(asked) or 'no pooling'}; served is one of {known}")


def _read(path: Path) -> Any:
    """None: there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
