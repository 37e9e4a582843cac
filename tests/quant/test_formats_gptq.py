"""GPTQ files mean what GPTQ's description of them says, word by word."""

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
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 16,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
    "meta": {"quantizer": ["gptqmodel:7.6.0"], "damp_percent": 0.05},
}
OUT, IN = 40, 48


def _layer(bits: int, groups: int, g_idx: Tensor | None = None) -> dict[str, Tensor]:
    per_word = 32 // bits
    layer = {
        "qweight": random_words(1, IN // per_word, OUT),
        "qzeros": random_words(2, groups, OUT // per_word),
        "scales": random_scales(3, groups, OUT),
    }
    return layer if g_idx is None else {**layer, "g_idx": g_idx.to(torch.int32)}


def _expected(layer: dict[str, Tensor], bits: int, g_idx: Tensor, minus_one: bool) -> list[list[float]]:
    per_word, ones = 32 // bits, sum(1 << shift for shift in range(0, 32, bits))
    words, zeros, scales = (layer[suffix].tolist() for suffix in ("qweight", "qzeros", "scales"))
    group_of = g_idx.tolist()

    def value(n: int, k: int) -> float:
        g = group_of[k]
        zero = field(zeros[g][n // per_word] + (ones if minus_one else 0), n % per_word, bits)
        return scales[g][n] * (field(words[k // per_word][n], k % per_word, bits) - zero)

    return [[value(n, k) for k in range(IN)] for n in range(OUT)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [8, 16, 48, -1])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
def test_every_weight_is_its_scale_times_code_less_zero(bits: int, group_size: int, layout: str, sym: bool) -> None:
    size = IN if group_size == -1 else group_size
    layer = _layer(bits, IN // size)
    config = {**CONFIG, "bits": bits, "group_size": group_size, "checkpoint_format": layout, "sym": sym}
    expected = _expected(layer, bits, torch.arange(IN) // size, minus_one=layout == "gptq")
    assert_decodes_to(read_layer(read_scheme(config, {}), layer, OUT, IN), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_inputs_in_any_order_find_their_group(bits: int) -> None:
    permutation = torch.randperm(IN, generator=torch.Generator().manual_seed(5))
    g_idx = (torch.arange(IN) // 16)[permutation]
    layer = _layer(bits, 3, g_idx)
    weight = read_layer(read_scheme({**CONFIG, "bits": bits, "desc_act": True}, {}), layer, OUT, IN)
    assert weight.order is not None
    assert_decodes_to(weight, _expected(layer, bits, g_idx, minus_one=True))


def test_groups_in_another_order_but_whole_need_only_that_order() -> None:
    g_idx = torch.tensor([2, 0, 1]).repeat_interleave(16)
    layer = _layer(4, 3, g_idx)
    weight = read_layer(read_scheme(CONFIG, {}), layer, OUT, IN)
    assert_decodes_to(weight, _expected(layer, 4, g_idx, minus_one=True))


def test_an_order_that_changes_nothing_costs_nothing() -> None:
    g_idx = torch.arange(IN) // 16
    layer = _layer(4, 3, g_idx)
    weight = read_layer(read_scheme({**CONFIG, "desc_act": True}, {}), layer, OUT, IN)
    assert weight.order is None
    assert_decodes_to(weight, _expected(layer, 4, g_idx, minus_one=True))


def test_an_order_that_the_files_do_not_tell_is_missed() -> None:
    rules = {"lm_head": {"desc_act": False}, "more": {"group_size": -1}}
    scheme = read_scheme({**CONFIG, "desc_act": True, "dynamic": rules}, {})
    assert misfits(scheme, _layer(4, 3), OUT, IN) == ["g_idx"]
    assert misfits(scheme, _layer(4, 3), OUT, IN, "lm_head") == []
    assert misfits(scheme, _layer(4, 1), OUT, IN, "more") == []  # one group has no order


def test_a_last_group_that_is_shorter_is_read() -> None:
    layer = _layer(4, 2)
    weight = read_layer(read_scheme({**CONFIG, "group_size": 32}, {}), layer, OUT, IN)
    assert_decodes_to(weight, _expected(layer, 4, torch.arange(IN) // 32, minus_one=True))


@pytest.mark.parametrize(
    ("g_idx", "message"),
    [
        (torch.arange(IN) // 12, "beyond the 3"),
        (torch.arange(IN) // 16 - 1, "beyond the 3"),
        (torch.arange(IN).clamp(max=31) // 15, "divisor 3"),
    ],
)
def test_groups_that_cannot_be_are_refused_by_the_name_of_the_tensor(g_idx: Tensor, message: str) -> None:
    scheme = read_scheme(CONFIG, {})
    with pytest.raises(ModelNotSupported, match=f"{MODULE}.g_idx.*{message}"):
        scheme.read(MODULE, IN, OUT, _layer(4, 3, g_idx))


def test_zero_points_that_older_writers_spilt_are_refused_and_others_read() -> None:
    scheme = read_scheme({**CONFIG, "sym": False, "meta": None}, {})
    layer = {**_layer(4, 3), "qzeros": torch.full((3, OUT // 8), 0x0E3D5A17, dtype=torch.int32)}
    expected = _expected(layer, 4, torch.arange(IN) // 16, minus_one=True)
    assert_decodes_to(read_layer(scheme, layer, OUT, IN), expected)
    layer["qzeros"][1, 2] = -1
    with pytest.raises(ModelNotSupported, match=f"{MODULE}.qzeros"):
        scheme.read(MODULE, IN, OUT, layer)


def test_rules_for_single_layers_are_kept() -> None:
    dynamic: dict[str, Any] = {
        r"-:.*\.down_proj": {},
        r"+:model\.layers\.0\..*up_proj": {"bits": 8, "group_size": 8},
        "lm_head": {"group_size": 48, "mse": 2.4},
    }
    scheme = read_scheme({**CONFIG, "dynamic": dynamic}, {})
    held = {"qweight", "qzeros", "scales"}
    assert not scheme.is_quantized("model.layers.0.mlp.down_proj", held)
    assert_decodes_to(
        read_layer(scheme, _layer(8, 6), OUT, IN, "model.layers.0.mlp.up_proj"),
        _expected(_layer(8, 6), 8, torch.arange(IN) // 8, minus_one=True),
    )
    assert misfits(scheme, _layer(4, 3), OUT, IN, "model.layers.1.mlp.up_proj") == []
    assert misfits(scheme, _layer(4, 1), OUT, IN, "lm_head") == []
    assert misfits(scheme, _layer(4, 1), OUT, IN, "lm_head.more") == ["qzeros", "scales"]


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales", "g_idx"])
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(suffix: str) -> None:
    layer, scheme = _layer(4, 3, torch.arange(IN) // 16), read_scheme(CONFIG, {})
    rest = {k: t for k, t in layer.items() if k != suffix}
    assert misfits(scheme, rest, OUT, IN) == ([] if suffix == "g_idx" else [suffix])
    assert misfits(scheme, {**layer, suffix: layer[suffix][1:]}, OUT, IN) == [suffix]
    assert misfits(scheme, {**layer, suffix: layer[suffix].to(torch.float64)}, OUT, IN) == [suffix]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 2}, "bits=2"),
        ({"bits": 3}, "bits=3"),
        ({"bits": "gguf:q4"}, "bits='gguf:q4'"),
        ({"group_size": None}, "group_size=None"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"format": "bitblas"}, "format='bitblas'"),
        ({"checkpoint_format": "gptq_v2", "format": "gptq"}, "format='gptq'"),
        ({"is_marlin_format": True}, "is_marlin_format=True"),
        ({"pack_dtype": "int16"}, "pack_dtype='int16'"),
        ({"data_type": "fp"}, "data_type='fp'"),
        ({"rotation": "hadamard"}, "rotation='hadamard'"),
        ({"activation": {"bits": 8}}, "activation="),
        ({"dynamic": {"lm_head": {"bits": 3}}}, "dynamic.lm_head: bits=3"),
        ({"dynamic": {"lm_head": {"adapter": {"rank": 8}}}}, "dynamic.lm_head: adapter="),
        ({"dynamic": {"(": {}}}, "no regular expression"),
    ],
)
def test_a_config_that_is_not_served_is_refused_by_key_and_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelNotSupported, match=message):
        read_scheme({**CONFIG, **changes}, {})
