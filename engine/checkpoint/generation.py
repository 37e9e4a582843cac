"""How a checkpoint wants its tokens chosen: what its generation_config.json says of sampling.

Taken as the defaults of requests, as other servers do. What the file says of lengths (`max_new_tokens`) and whether
`generate` of transformers samples without being asked (`do_sample`) is no part of it: requests say both themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from logging import Logger
from pathlib import Path
from typing import Literal

from engine.checkpoint.json_file import read_object
from engine.errors import ConfigError, InvalidRequest
from engine.request import SamplingParams

GenerationConfig = Literal["auto", "none"]
FILE_NAME = "generation_config.json"
FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What is taken, by the names of `SamplingParams`."""
_REFUSED = {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, "no_repeat_ngram_size": 0}
"""Fields that change what tokens are chosen, which we do not have, and the values at which they change nothing."""


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """`values`: fields of `SamplingParams`. `unused`: what the file says beside them that is not served."""

    path: str
    values: dict[str, float] = field(default_factory=dict)
    unused: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a log."""
        taken = ", ".join(f"{name}={value:g}" for name, value in self.values.items())
        text = f"sampling defaults of {self.path}: {taken or 'none'}"
        return text + (f"; not served: {', '.join(self.unused)}" if self.unused else "")


def sampling_defaults(folder: str | Path, choice: GenerationConfig, log: Logger) -> dict[str, float]:
    """The defaults of sampling that a server or an `LLM` takes, told in one line of `log`.

    Raises: ConfigError naming a value that is none.
    """
    if choice not in ("auto", "none"):
        raise ConfigError(f"generation_config={choice!r} is neither 'auto' nor 'none'")
    found = (
        read_sampling_defaults(folder) if choice == "auto" else SamplingDefaults("no file (generation_config: none)")
    )
    log.info("%s", found)
    return found.values


def read_sampling_defaults(folder: str | Path) -> SamplingDefaults:
    """What the checkpoint in `folder` gives; nothing when it has no such file.

    Raises: ConfigError naming a value that is none.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return SamplingDefaults(str(path))
    config = read_object(path)
    values = {name: _number(path, name, config[name]) for name in FIELDS if config.get(name) is not None}
    if "top_k" in values:
        values["top_k"] = _whole(path, values["top_k"])
    try:
        SamplingParams(**values)  # type: ignore[arg-type]  # numbers, whatever they mean
    except InvalidRequest as error:
        raise _wrong(path, error.param, config[error.param], error.message) from error
    unused = tuple(
        f"{name}={config[name]!r}" for name, neutral in _REFUSED.items() if config.get(name) not in (None, neutral)
    )
    return SamplingDefaults(str(path), values, unused)


def _number(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(path, name, value, "it is not a number")
    return value


def _whole(path: Path, top_k: float) -> int:
    if isinstance(top_k, float) and not top_k.is_integer():
        raise _wrong(path, "top_k", top_k, "it is not a whole number")
    return 0 if top_k == -1 else int(top_k)  # -1 is written for all, too


def _wrong(path: Path, name: str, value: object, why: str) -> ConfigError:
    return ConfigError(f"{path}: {name}={value!r}: {why}; correct it, or set generation_config: none")
