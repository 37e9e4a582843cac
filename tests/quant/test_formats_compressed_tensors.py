"""compressed-tensors files mean what its compressors say, word by word, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import ModelNotSupported
from engine.quant.formats import read_scheme
from engine.quant.scheme import Scheme
from tests.support.quantized_layer import (
    MODULE,
    assert_decodes_to,
    field,
    misfits,
    random_scales,
    random_words,
    read_layer,
)

OUT, IN = 21, 48  # outputs fill no whole word of zero points


def _config(layout: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "sparsity_config": {},
        "transform_config": {},
        "global_compression_ratio": None,
        "version": "0.19.0",
        **more,
    }


def _weights(bits: int, *, group_size: int | None = None, **more: Any) -> dict[str, Any]:
    strategy = "channel" if group_size is None else "group"
    common = {"num_bits": bits, "type": "int", "symmetric": True, "dynamic": False, "observer": "minmax"}
    return {**common, "strategy": strategy, "group_size": group_size, **more}


TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token", "observer": None}


def _packed(bits: int, groups: int, *, zeros: bool) -> dict[str, Tensor]:
    per_word = 32 // bits
    layer = {
        "weight_packed": random_words(1, OUT, -(-IN // per_word)),
        "weight_scale": random_scales(2, OUT, groups, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([OUT, IN]),
    }
    return {**layer, "weight_zero_point": random_words(3, -(-OUT // per_word), groups)} if zeros else layer


def _expected(layer: dict[str, Tensor], bits: int, group_of: Tensor) -> list[list[float]]:
    per_word, half = 32 // bits, 2 ** (bits - 1)
    words, scales, groups = layer["weight_packed"].tolist(), layer["weight_scale"].tolist(), group_of.tolist()
    zeros = layer["weight_zero_point"].tolist() if "weight_zero_point" in layer else None

    def value(n: int, k: int) -> float:
        g = groups[k]
        zero = 0 if zeros is None else field(zeros[n // per_word][g], n % per_word, bits) - half
        return scales[n][g] * (field(words[n][k // per_word], k % per_word, bits) - half - zero)

    return [[value(n, k) for k in range(IN)] for n in range(OUT)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [8, 16, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_weights_are_scale_times_code_less_zero(bits: int, group_size: int | None, symmetric: bool) -> None:
    size = group_size or IN
    layer = _packed(bits, IN // size, zeros=not symmetric)
    scheme = read_scheme(_config("pack-quantized", _weights(bits, group_size=group_size, symmetric=symmetric)), {})
    assert_decodes_to(read_layer(scheme, layer, OUT, IN), _expected(layer, bits, torch.arange(IN) // size))


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_in_any_order_find_their_group(bits: int) -> None:
    group_of = (torch.arange(IN) // 16)[torch.randperm(IN, generator=torch.Generator().manual_seed(4))]
    layer = {**_packed(bits, 3, zeros=True), "weight_g_idx": group_of}
    weights = _weights(bits, group_size=16, symmetric=False, actorder="group")
    weight = read_layer(read_scheme(_config("pack-quantized", weights), {}), layer, OUT, IN)
    assert weight.order is not None
    assert_decodes_to(weight, _expected(layer, bits, group_of))


def test_a_last_word_that_is_not_full_is_read() -> None:
    layer = {
        **_packed(4, 1, zeros=False),
        "weight_packed": random_words(1, OUT, 6),
        "weight_shape": torch.tensor([OUT, 42]),
    }
    weight = read_layer(read_scheme(_config("pack-quantized", _weights(4)), {}), layer, OUT, 42)
    expected = [
        [
            float(layer["weight_scale"][n, 0]) * (field(int(layer["weight_packed"][n, k // 8]), k % 8, 4) - 8)
            for k in range(42)
        ]
        for n in range(OUT)
    ]
    assert_decodes_to(weight, expected)


def test_a_shape_that_is_not_the_models_is_refused() -> None:
    layer = {**_packed(4, 3, zeros=False), "weight_shape": torch.tensor([IN, OUT])}
    with pytest.raises(ModelNotSupported, match=f"{MODULE}.weight_shape"):
        read_scheme(_config("pack-quantized", _weights(4, group_size=16)), {}).read(MODULE, IN, OUT, layer)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_int8_weights_are_kept_and_inputs_rounded_if_the_config_says_so(symmetric: bool, dynamic: bool) -> None:
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(-128, 128, (OUT, IN), generator=generator, dtype=torch.int8)
    zeros = torch.randint(-128, 128, (OUT, 1), generator=generator, dtype=torch.int8)
    layer = {"weight": codes, "weight_scale": random_scales(2, OUT, 1)}
    layer |= {} if symmetric else {"weight_zero_point": zeros}
    config = _config("int-quantized", _weights(8, symmetric=symmetric), TOKENS if dynamic else None)
    weight = read_layer(read_scheme(config, {}), layer, OUT, IN)
    assert weight.activations == ("int8" if dynamic else None)
    assert_decodes_to(
        weight,
        [
            [
                float(layer["weight_scale"][n, 0]) * (int(codes[n, k]) - (0 if symmetric else int(zeros[n, 0])))
                for k in range(IN)
            ]
            for n in range(OUT)
        ],
    )


@pytest.mark.parametrize(
    ("strategy", "block", "shape"),
    [
        ("channel", (1, IN), (OUT, 1)),
        ("channel", (1, IN), (OUT,)),
        ("tensor", (OUT, IN), (1,)),
        ("block", (8, 16), (3, 3)),
    ],
)
def test_float8_weights_are_kept_with_scales_per_channel_tensor_or_block(
    strategy: str, block: tuple[int, int], shape: tuple[int, ...]
) -> None:
    codes = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(7)).to(torch.float8_e4m3fn)
    layer = {"weight": codes, "weight_scale": random_scales(2, *shape)}
    weights = _weights(8, type="float", strategy=strategy)
    if strategy == "block":
        weights["block_structure"] = list(block)
    config = _config("float-quantized", weights, {**TOKENS, "type": "float"})
    weight = read_layer(read_scheme(config, {}), layer, OUT, IN)
    assert weight.activations == "fp8"
    scales = layer["weight_scale"].double().view(-(-OUT // block[0]), -1)
    values = codes.double()
    assert_decodes_to(
        weight,
        [[float(scales[n // block[0], k // block[1]] * values[n, k]) for k in range(IN)] for n in range(OUT)],
    )


def _mixed() -> Scheme:
    config = _config("mixed-precision", {})
    config["config_groups"] = {
        "others": {
            "format": "pack-quantized",
            "targets": ["Linear"],
            "weights": _weights(4, group_size=16),
        },
        "attention": {
            "format": "int-quantized",
            "targets": ["re:.*self_attn\\.[qk]_proj", "model.layers.1.mlp.up_proj"],
            "weights": _weights(8),
            "input_activations": TOKENS,
        },
    }
    config["ignore"] = ["lm_head", "re:.*mlp\\.gate$", "model.layers.0.mlp.down_proj"]
    return read_scheme(config, {})


def test_a_layer_belongs_to_the_group_that_names_it_most_closely_and_ignored_ones_to_none() -> None:
    scheme, eight, four = _mixed(), {"weight", "weight_scale"}, {"weight_packed", "weight_scale", "weight_shape"}

    def asked(module: str) -> set[str]:
        specs = scheme.tensors(module, IN, OUT, ())
        return {suffix for suffix, spec in specs.items() if not spec.optional}

    assert asked("model.layers.0.mlp.up_proj") == four
    assert asked("model.layers.1.mlp.up_proj") == eight
    assert asked("model.layers.0.self_attn.k_proj") == eight
    assert asked("model.layers.0.self_attn.v_proj") == four
    for module in ("lm_head", "model.layers.0.mlp.gate", "model.layers.0.mlp.down_proj"):
        assert not scheme.is_quantized(module, {"weight"})
    assert scheme.is_quantized("model.layers.0.mlp.gate_proj", {"weight"})  # so its missing codes are noticed
    assert not scheme.is_quantized("model.layers.0.mlp.gate_proj", ())  # shares another's weight


def test_a_group_may_be_the_name_of_a_preset() -> None:
    config = _config("pack-quantized", {})
    config["config_groups"] = {"W4A16_ASYM": ["re:.*up_proj"]}
    scheme = read_scheme(config, {})
    assert scheme.tensors(MODULE, 256, OUT, ())["weight_scale"].shapes == ((OUT, 2),)
    assert not scheme.is_quantized("model.layers.0.mlp.down_proj", {"weight"})


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "weight_shape", "weight_zero_point"])
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(suffix: str) -> None:
    layer = _packed(4, 3, zeros=True)
    scheme = read_scheme(_config("pack-quantized", _weights(4, group_size=16, symmetric=False)), {})
    assert misfits(scheme, {k: t for k, t in layer.items() if k != suffix}, OUT, IN) == [suffix]
    assert misfits(scheme, {**layer, suffix: layer[suffix][1:]}, OUT, IN) == [suffix]
    assert misfits(scheme, {**layer, suffix: layer[suffix].double()}, OUT, IN) == [suffix]


@pytest.mark.parametrize("zeros", [torch.zeros(3, 3, dtype=torch.int8), torch.zeros(OUT, 3, dtype=torch.int32)])
def test_zero_points_of_one_packing_in_the_type_of_the_other_are_refused(zeros: Tensor) -> None:
    scheme = read_scheme(_config("pack-quantized", _weights(4, group_size=16, symmetric=False)), {})
    with pytest.raises(ModelNotSupported, match=f"{MODULE}.weight_zero_point"):
        scheme.read(MODULE, IN, OUT, {**_packed(4, 3, zeros=False), "weight_zero_point": zeros})


_GROUP = _weights(4, group_size=16)
_FP8 = _weights(8, type="float")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_config("marlin-24", _GROUP), "format='marlin-24'"),
        (_config("nvfp4-pack-quantized", _GROUP), "format='nvfp4-pack-quantized'"),
        (_config("dense", _GROUP), "format='dense'"),
        (_config("pack-quantized", _weights(2, group_size=16)), "weights: num_bits=2"),
        (_config("pack-quantized", _weights(4, group_size=16, type="float")), "weights: type='float'"),
        (_config("pack-quantized", _weights(4, group_size=16, dynamic=True)), "weights: dynamic=True"),
        (_config("pack-quantized", _GROUP, TOKENS), "weights: num_bits=4.*input_activations in int8"),
        (_config("int-quantized", _weights(8), {**TOKENS, "dynamic": False}), "input_activations: dynamic=False"),
        (_config("int-quantized", _weights(8), {**TOKENS, "symmetric": False}), "input_activations: symmetric=False"),
        (_config("float-quantized", _FP8, {**TOKENS, "type": "float", "strategy": "tensor"}), "strategy='tensor'"),
        (_config("float-quantized", _FP8, TOKENS), "input_activations in int8"),
        (_config("float-quantized", {**_FP8, "symmetric": False}), "symmetric=False"),
        (
            _config("int-quantized", {**_weights(8), "strategy": "tensor_group", "group_size": 16}),
            "strategy='tensor_group'",
        ),
        (_config("int-quantized", {**_weights(8), "scale_dtype": "torch.uint8"}), "scale_dtype='torch.uint8'"),
        (_config("int-quantized", {**_weights(8), "codebook": 3}), "weights: codebook=3"),
        (_config("int-quantized", _weights(8), quantization_status="calibration"), "quantization_status='calibration'"),
        (_config("int-quantized", _weights(8), kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme="),
        (_config("int-quantized", _weights(8), transform_config={"config_groups": {}}), "transform_config="),
        (
            _config("int-quantized", _weights(8), sparsity_config={"format": "sparse-24"}),
            "sparsity_config: format='sparse-24'",
        ),
        (_config("int-quantized", _weights(8), config_groups={"W2A16": ["Linear"]}), "W2A16="),
        (_config("int-quantized", _weights(8), config_groups={}), "config_groups=None"),
        (_config("int-quantized", _weights(8), ignore=["re:("]), "no regular expression"),
        (_config("int-quantized", _weights(8), something_new=True), "something_new=True"),
    ],
)
def test_a_config_that_is_not_served_is_refused_by_key_and_value(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelNotSupported, match=message):
        read_scheme(config, {})


def test_targets_that_are_no_linear_layers_are_refused() -> None:
    config = _config("int-quantized", _weights(8))
    config["config_groups"]["group_0"]["targets"] = ["Embedding"]
    with pytest.raises(ModelNotSupported, match="targets='Embedding'"):
        read_scheme(config, {})
    config["config_groups"]["group_0"] |= {"targets": ["Linear"], "output_activations": TOKENS}
    with pytest.raises(ModelNotSupported, match="output_activations="):
        read_scheme(config, {})
