"""A quantization_config key by key: each is honoured, known to change nothing, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from engine.errors import ModelNotSupported

# How a file was made, or how its maker's own kernels are to run: what it means is the same without them.
MAKING = (
    "act_group_aware", "amp", "autoround_version", "batch_size", "block_name_to_quantize", "cache_block_outputs",
    "damp_auto_increment", "damp_percent", "dataset", "disable_exllama", "do_fuse", "enable_minmax_tuning",
    "enable_norm_bias_tuning", "enable_quanted_input", "exllama_config", "fuse_max_seq_len",
    "gradient_accumulate_steps", "iters", "low_gpu_mem_usage", "lr", "max_input_length", "meta", "minmax_lr",
    "model_file_base_name", "model_name_or_path", "model_seqlen", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "modules_to_fuse", "nsamples", "pad_token_id", "provider", "scale_dtype", "seqlen",
    "static_groups", "tokenizer", "true_sequential", "use_cuda_fp16", "use_exllama",
)  # fmt: skip


class Fields:
    """The keys of one mapping of a config. `end` refuses what nobody took.

    `where` is how messages call the mapping, "quantization_config.config_groups.group_0.weights" say.
    """

    def __init__(self, values: Any, where: str = "quantization_config") -> None:
        if not isinstance(values, Mapping):
            raise ModelNotSupported(f"{where}={values!r} is not a mapping")
        self.where = where
        self._values = dict(values)

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, `default` where it is missing or null."""
        value = self._values.pop(key, None)
        return default if value is None else value

    def choice(self, key: str, allowed: Collection[Any], default: Any = None) -> Any:
        """The one of `allowed` that the value is, strings in any case. Raises: ModelNotSupported if there is none."""
        value = self.take(key, default)
        for other in allowed:
            if type(value) is type(other) and (value == other or str(value).lower() == str(other).lower()):
                return other
        self.refuse(key, value, f"served: {', '.join(map(repr, allowed))}")

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.choice(key, (False, True), default))

    def size(self, key: str, default: Any = None) -> int:
        """A positive number, or -1 for "all of them"."""
        value = self.take(key, default)
        if type(value) is not int or (value <= 0 and value != -1):
            self.refuse(key, value, "served: a positive number, or -1")
        return int(value)

    def strings(self, key: str) -> tuple[str, ...]:
        value = self.take(key, [])
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            self.refuse(key, value, "expected: a list of strings")
        return tuple(value)

    def part(self, key: str) -> Fields | None:
        """A nested mapping; None where it is missing, null or empty."""
        value = self.take(key)
        return None if value is None or value == {} else Fields(value, f"{self.where}.{key}")

    def take_all(self) -> dict[str, Any]:
        """Every key that is left, in the order of the file."""
        values, self._values = self._values, {}
        return values

    def pass_over(self, *keys: str) -> None:
        """Keys that say how a file was made or how its maker's kernels run; what it means is the same without them."""
        for key in keys:
            self._values.pop(key, None)

    def end(self) -> None:
        """Raises: ModelNotSupported for the first key left that asks for something."""
        for key, value in self._values.items():
            if value not in (None, [], {}):
                self.refuse(key, value, "this key is not known, and may change what the weights mean")

    def refuse(self, key: str, value: Any, why: str) -> NoReturn:
        raise ModelNotSupported(f"{self.where}: {key}={value!r} is not supported ({why})")


def is_skipped(module: str, patterns: Iterable[str]) -> bool:
    """Whether a list of modules left in 16 bits names this one: by its start, as a regular expression, or by its end.

    Source: transformers.quantizers.quantizers_utils.should_convert_module.
    """
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    return any(re.match(f"(?:{pattern}){boundary}", module) or module.endswith(pattern) for pattern in patterns)


def check_patterns(fields: Fields, key: str, patterns: Iterable[str]) -> None:
    """Raises: ModelNotSupported for a pattern that is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            fields.refuse(key, pattern, f"no regular expression: {error}")


def refuse_module(module: str, why: str) -> NoReturn:
    raise ModelNotSupported(f"{module}: {why}")
