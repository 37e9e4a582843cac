"""torchao files mean what their headers say of each weight."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import ModelNotSupported
from engine.quant.formats import read_scheme
from tests.support.quantized_layer import MODULE, assert_decodes_to, misfits, random_scales, read_layer

OUT, IN = 12, 48
ROWS = {"granularity": {"_type": "PerRow", "_data": {"dim": -1}}}
INT8_ROWS = {**ROWS, "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"}, "reduce_range": False}
FP8_ROWS = {
    **ROWS,
    "float8_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"},
    "hp_value_lb": None,
    "hp_value_ub": None,
    "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
    "mm_config": {"_type": "Float8MMConfig", "_data": {"emulate": False}},
}


def _config(kind: str = "Int8WeightOnlyConfig", **more: Any) -> dict[str, Any]:
    made_by = {"_type": kind, "_version": 2, "_data": {"set_inductor_config": True}}
    return {
        "quant_method": "torchao",
        "quant_type": {"default": made_by},
        "modules_to_not_convert": None,
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
        **more,
    }


def _header(kind: str, block: list[int], names: tuple[str, ...], kwargs: dict[str, Any] | None, **more: Any) -> str:
    described = None
    if kwargs is not None:
        described = {"_type": f"QuantizeTensorTo{kind.removesuffix('Tensor')}Kwargs", "_data": kwargs}
    dtype = {"_type": "torch.dtype", "_data": "bfloat16"}
    data = {"block_size": block, "act_quant_kwargs": described, "dtype": dtype, **more}
    return json.dumps({"_type": kind, "_data": data, "_tensor_data_names": list(names)})


def _metadata(text: str, name: str = f"{MODULE}.weight") -> dict[str, str]:
    return {"format": "pt", "tensor_names": "[]", "model.norm.weight": '{"_type": "Tensor"}', name: text}


def _int8(block: tuple[int, int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (OUT // block[0], IN // block[1])
    return {
        "_weight_qdata": torch.randint(-128, 128, (OUT, IN), generator=generator, dtype=torch.int8),
        "_weight_scale": random_scales(2, *shape, dtype=torch.float32),
        "_weight_zero_point": torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8),
    }


def _expected(layer: dict[str, Tensor], block: tuple[int, int]) -> list[list[float]]:
    codes, scales = layer["_weight_qdata"].double().tolist(), layer["_weight_scale"].tolist()
    zeros = layer.get("_weight_zero_point", torch.zeros_like(layer["_weight_scale"])).tolist()

    def value(n: int, k: int) -> float:
        g, h = n // block[0], k // block[1]
        return scales[g][h] * (codes[n][k] - zeros[g][h])

    return [[value(n, k) for k in range(IN)] for n in range(OUT)]


@pytest.mark.parametrize("block", [(1, IN), (1, 16), (OUT, IN), (4, 16)])
@pytest.mark.parametrize("kwargs", [None, INT8_ROWS])
def test_int8_weights_have_scales_per_row_group_tensor_or_block(
    block: tuple[int, int], kwargs: dict[str, Any] | None
) -> None:
    layer = _int8(block)
    header = _header("Int8Tensor", list(block), ("zero_point", "qdata", "scale"), kwargs, reduce_range=False)
    weight = read_layer(read_scheme(_config(), _metadata(header)), layer, OUT, IN)
    assert weight.activations == (None if kwargs is None else "int8")
    assert_decodes_to(weight, _expected(layer, block))


@pytest.mark.parametrize("kwargs", [None, FP8_ROWS])
def test_float8_weights_are_kept(kwargs: dict[str, Any] | None) -> None:
    codes = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3)).to(torch.float8_e4m3fn)
    layer = {"_weight_qdata": codes, "_weight_scale": random_scales(4, OUT, 1, dtype=torch.float32)}
    header = _header("Float8Tensor", [1, IN], ("qdata", "scale"), kwargs, mm_config=None, kernel_preference={"x": 1})
    weight = read_layer(read_scheme(_config("Float8WeightOnlyConfig"), _metadata(header)), layer, OUT, IN)
    assert weight.activations == (None if kwargs is None else "fp8")
    assert_decodes_to(weight, _expected(layer, (1, IN)))


def test_layers_are_quantized_where_the_header_says_so() -> None:
    header = _header("Int8Tensor", [1, IN], ("qdata", "scale"), None)
    scheme = read_scheme(_config(), _metadata(header))
    assert scheme.is_quantized(MODULE, ())
    assert not scheme.is_quantized("lm_head", {"weight"})
    assert scheme.is_quantized("lm_head", {"_weight_qdata"})
    with pytest.raises(ModelNotSupported, match=r"lm_head\._weight_qdata.*headers"):
        scheme.tensors("lm_head", IN, OUT, {"_weight_qdata"})
    with pytest.raises(ModelNotSupported, match=f"{MODULE}.*do not divide"):
        scheme.tensors(MODULE, 40, OUT, ())


@pytest.mark.parametrize("suffix", ["_weight_qdata", "_weight_scale", "_weight_zero_point"])
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(suffix: str) -> None:
    layer = _int8((1, 16))
    scheme = read_scheme(_config(), _metadata(_header("Int8Tensor", [1, 16], ("zero_point", "qdata", "scale"), None)))
    assert misfits(scheme, {k: t for k, t in layer.items() if k != suffix}, OUT, IN) == [suffix]
    assert misfits(scheme, {**layer, suffix: layer[suffix][1:]}, OUT, IN) == [suffix]
    assert misfits(scheme, {**layer, suffix: layer[suffix].double()}, OUT, IN) == [suffix]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (_header("Int4Tensor", [1, 32], ("qdata", "scale"), None), "_type='Int4Tensor'"),
        (_header("Int8Tensor", [1, 8, 8], ("qdata", "scale"), None), r"block_size=\[1, 8, 8\]"),
        (_header("Int8Tensor", [1, IN], ("qdata", "scale", "act_pre_scale"), None), "act_pre_scale"),
        (_header("Int8Tensor", [1, IN], ("qdata",), None), "its tensors are"),
        (_header("Int8Tensor", [1, IN], ("qdata", "scale"), None, act_scale=1), "act_scale=1"),
        (_header("Int8Tensor", [1, IN], ("qdata", "scale"), {**INT8_ROWS, "reduce_range": True}), "reduce_range=True"),
        (
            _header("Int8Tensor", [1, IN], ("qdata", "scale"), {**INT8_ROWS, "mapping_type": {"_data": "ASYMMETRIC"}}),
            "mapping_type=.*ASYMMETRIC",
        ),
        (
            _header("Float8Tensor", [1, IN], ("qdata", "scale"), {**FP8_ROWS, "granularity": {"_type": "PerTensor"}}),
            "granularity: _type='PerTensor'",
        ),
        (_header("Float8Tensor", [1, IN], ("qdata", "scale"), {**FP8_ROWS, "hp_value_ub": 3.0}), "hp_value_ub=3.0"),
        (
            _header(
                "Float8Tensor", [1, IN], ("qdata", "scale"), {**FP8_ROWS, "float8_dtype": {"_data": "float8_e5m2"}}
            ),
            "float8_dtype=.*e5m2",
        ),
    ],
)
def test_a_weight_that_is_not_served_is_refused_by_name(header: str, message: str) -> None:
    with pytest.raises(ModelNotSupported, match=f"{MODULE}.weight.*{message}"):
        read_scheme(_config(), _metadata(header))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_config("Int4WeightOnlyConfig"), "_type='Int4WeightOnlyConfig'"),
        (_config(include_input_output_embeddings=True), "include_input_output_embeddings=True"),
        (_config(quant_type="int8_weight_only"), "quant_type='int8_weight_only' is not a mapping"),
        (_config(quant_type=None), "quant_type=None"),
        (_config(layout="plain"), "layout='plain'"),
    ],
)
def test_a_config_that_is_not_served_is_refused_by_key_and_value(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelNotSupported, match=message):
        read_scheme(config, _metadata(_header("Int8Tensor", [1, IN], ("qdata", "scale"), None)))


def test_weights_that_are_no_linear_layers_or_not_described_are_refused() -> None:
    header = _header("Int8Tensor", [1, IN], ("qdata", "scale"), None)
    with pytest.raises(ModelNotSupported, match=r"experts\.gate_up_proj"):
        read_scheme(_config(), _metadata(header, "model.layers.0.mlp.experts.gate_up_proj"))
    with pytest.raises(ModelNotSupported, match="no header"):
        read_scheme(_config(), {"format": "pt"})
