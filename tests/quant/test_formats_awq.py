"""AWQ files mean what AutoAWQ's description of them says, word by word."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import ModelNotSupported
from engine.quant.formats import read_scheme
from tests.support.quantized_layer import (
    MODULE,
    assert_decodes_to,
    field,
    misfits,
    random_scales,
    random_words,
    read_layer,
)

CONFIG = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 16,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": None,
}
OUT, IN = 24, 48
NIBBLE_OF_OUTPUT = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}  # of the eight that share a word


def _layer(groups: int, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    return {
        "qweight": random_words(1, IN, OUT // 8),
        "qzeros": random_words(2, groups, OUT // 8),
        "scales": random_scales(3, groups, OUT, dtype=dtype),
    }


def _expected(layer: dict[str, Tensor], group_size: int) -> list[list[float]]:
    words, zeros, scales = (layer[suffix].tolist() for suffix in ("qweight", "qzeros", "scales"))

    def value(n: int, k: int) -> float:
        g, nibble = k // group_size, NIBBLE_OF_OUTPUT[n % 8]
        return scales[g][n] * (field(words[k][n // 8], nibble, 4) - field(zeros[g][n // 8], nibble, 4))

    return [[value(n, k) for k in range(IN)] for n in range(OUT)]


@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("group_size", [8, 16, 48, -1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_weight_is_its_scale_times_code_less_zero(zero_point: bool, group_size: int, dtype: torch.dtype) -> None:
    size = IN if group_size == -1 else group_size
    layer = _layer(IN // size, dtype)
    scheme = read_scheme({**CONFIG, "group_size": group_size, "zero_point": zero_point}, {})
    assert_decodes_to(read_layer(scheme, layer, OUT, IN), _expected(layer, size))


def test_zero_points_in_the_middle_are_not_stored() -> None:
    layer = {**_layer(3), "qzeros": torch.full((3, OUT // 8), 0x88888888 - 2**32, dtype=torch.int32)}
    weight = read_layer(read_scheme(CONFIG, {}), layer, OUT, IN)
    assert weight.zeros is None
    assert_decodes_to(weight, _expected(layer, 16))


def test_layers_that_the_config_or_the_files_leave_in_16_bits_are_left() -> None:
    scheme = read_scheme({**CONFIG, "modules_to_not_convert": ["gate", "model.layers.1"]}, {})
    held = {"qweight", "qzeros", "scales"}
    assert scheme.is_quantized(MODULE, held)
    assert scheme.is_quantized("model.layers.0.mlp.gate_proj", held)
    assert scheme.is_quantized("model.layers.10.mlp.up_proj", held)
    assert not scheme.is_quantized("model.layers.0.block_sparse_moe.gate", held)
    assert not scheme.is_quantized("model.layers.1.mlp.up_proj", held)
    assert not scheme.is_quantized("lm_head", {"weight"})
    assert scheme.is_quantized(MODULE, {"qweight"})  # half a layer: the loader asks for the other half


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(suffix: str) -> None:
    layer, scheme = _layer(3), read_scheme(CONFIG, {})
    assert misfits(scheme, {k: t for k, t in layer.items() if k != suffix}, OUT, IN) == [suffix]
    assert misfits(scheme, {**layer, suffix: layer[suffix][1:]}, OUT, IN) == [suffix]
    assert misfits(scheme, {**layer, suffix: layer[suffix].to(torch.int64)}, OUT, IN) == [suffix]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits=8"),
        ({"bits": None}, "bits=None"),
        ({"bits": True}, "bits=True"),
        ({"version": "gemv"}, "version='gemv'"),
        ({"version": "marlin"}, "version='marlin'"),
        ({"version": "exllama"}, "version='exllama'"),
        ({"format": "gemv_fast"}, "format='gemv_fast'"),
        ({"backend": "llm-awq"}, "backend='llm-awq'"),
        ({"group_size": 0}, "group_size=0"),
        ({"group_size": "128"}, "group_size='128'"),
        ({"rotation": "hadamard"}, "rotation='hadamard'"),
        ({"modules_to_not_convert": "gate"}, "modules_to_not_convert='gate'"),
        ({"modules_to_not_convert": ["("]}, r"modules_to_not_convert='\('"),
        ({"dynamic": {"-:.*": {}}}, "dynamic="),
    ],
)
def test_a_config_that_is_not_served_is_refused_by_key_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelNotSupported, match=message):
        read_scheme({**CONFIG, **changes}, {})


def test_sizes_that_the_format_cannot_hold_are_refused_by_layer() -> None:
    scheme = read_scheme(CONFIG, {})
    with pytest.raises(ModelNotSupported, match=rf"{MODULE}.*40 inputs.*group_size=16"):
        scheme.tensors(MODULE, 40, OUT, ())
    with pytest.raises(ModelNotSupported, match=f"{MODULE}.*by eights.*20"):
        scheme.tensors(MODULE, IN, 20, ())
