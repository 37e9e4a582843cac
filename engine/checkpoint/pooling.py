"""How a checkpoint wants its hidden states pooled: what sentence-transformers writes beside the weights.

Without its files: the last token's, as of any decoder. Vectors are normalised, as vLLM normalises them, unless
`modules.json` lists the steps and normalising is none of them.
Standard library only: routers read it too.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from engine.errors import ConfigError
from engine.pooling import Pool, PoolingDefaults

_MODES = {
    "pooling_mode_lasttoken": Pool.LAST,
    "pooling_mode_mean_tokens": Pool.MEAN,
    "pooling_mode_cls_token": Pool.CLS,
}


def pooling_defaults(folder: str | os.PathLike[str]) -> PoolingDefaults:
    """Raises: ConfigError when a file cannot be read."""
    folder = Path(folder)
    config = _read(folder / "config.json") or {}
    dimensions = tuple(i for i in config.get("matryoshka_dimensions") or () if isinstance(i, int))
    is_matryoshka = bool(config.get("is_matryoshka") or dimensions)
    modules = _read(folder / "modules.json")
    if modules is None:
        return PoolingDefaults(is_matryoshka=is_matryoshka, matryoshka_dimensions=dimensions)
    steps = [module for module in modules if isinstance(module, dict)]
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in steps]
    pool, refusal = Pool.LAST, ""
    for kind, module in zip(kinds, steps, strict=True):
        if kind == "Pooling":
            asked = _asked(folder / str(module.get("path", "")) / "config.json")
            if len(asked) == 1 and asked[0] in _MODES:
                pool = _MODES[asked[0]]
            else:
                known = ", ".join(_MODES)
                refusal = f"its pooling is {', '.join(asked) or 'none'}, and served is one of {known}"
        elif kind not in ("Transformer", "Normalize"):
            refusal = f"its modules.json has the step {kind!r}, which is not served"
    return PoolingDefaults(pool, "Normalize" in kinds, is_matryoshka, dimensions, refusal)


def _asked(path: Path) -> list[str]:
    config = _read(path) or {}
    return [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]


def _read(path: Path) -> Any:
    """None: there is no such file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error}") from error
