"""The formats of quantized checkpoints, one file each, chosen by `quantization_config["quant_method"]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from engine.errors import ModelNotSupported
from engine.quant.formats.awq import read_awq
from engine.quant.formats.bitsandbytes import read_bitsandbytes
from engine.quant.formats.compressed_tensors import read_compressed_tensors
from engine.quant.formats.gptq import read_gptq
from engine.quant.formats.torchao import read_torchao
from engine.quant.scheme import Scheme

_Reader = Callable[[Mapping[str, Any], Mapping[str, str]], Scheme]
_READERS: dict[str, _Reader] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "compressed-tensors": read_compressed_tensors,
    "bitsandbytes": read_bitsandbytes,
    "torchao": read_torchao,
}


def read_scheme(config: Mapping[str, Any], metadata: Mapping[str, str]) -> Scheme:
    """The scheme of a checkpoint.

    `config` is what config.json has under "quantization_config" (some files: "compression_config"), `metadata` the
    `__metadata__` of the safetensors headers of all shards, merged: torchao says there what its tensors are.
    Raises: ModelNotSupported naming the key and its value that we do not serve, and what is served.
    """
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in _READERS:
        served = ", ".join(sorted(_READERS))
        raise ModelNotSupported(f"quantization_config: quant_method={method!r} is not supported; served are {served}")
    return _READERS[method](config, metadata)
