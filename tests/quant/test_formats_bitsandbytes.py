"""bitsandbytes files mean what its own functions make of them, value by value."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.errors import ModelNotSupported
from engine.quant.formats import read_scheme
from tests.support.quantized_layer import MODULE, assert_decodes_to, misfits, random_scales, read_layer

NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": False,
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_compute_dtype": "bfloat16",
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
}
INT8 = {**NF4, "load_in_4bit": False, "load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}
STATE = "weight.quant_state.bitsandbytes__nf4"
OUT, IN = 12, 96  # blocks of 64 begin in one row and end in the next
# Table 3 of arXiv 2305.14314, to the digits of bitsandbytes' own constants.
VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def _json(**values: Any) -> Tensor:
    return torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)


def _state(size: int, **more: Any) -> Tensor:
    return _json(quant_type="nf4", blocksize=size, dtype="bfloat16", shape=[OUT, IN], **more)


def _layer(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "weight": torch.randint(0, 256, (OUT * IN // 2, 1), generator=generator, dtype=torch.uint8),
        "weight.absmax": random_scales(2, -(-OUT * IN // size), dtype=torch.float32),
        "weight.quant_map": torch.tensor(VALUES),
        STATE: _state(size),
    }


def _expected(layer: dict[str, Tensor], size: int, absmax: Tensor) -> list[list[float]]:
    codes, scales = layer["weight"].flatten().tolist(), absmax.tolist()

    def value(i: int) -> float:
        return VALUES[codes[i // 2] % 16 if i % 2 else codes[i // 2] // 16] * scales[i // size]

    return [[value(n * IN + k) for k in range(IN)] for n in range(OUT)]


@pytest.mark.parametrize("size", [32, 64, 128, 4096])
def test_nf4_is_a_value_of_the_table_times_the_scale_of_its_block(size: int) -> None:
    layer = _layer(size)
    weight = read_layer(read_scheme(NF4, {}), layer, OUT, IN)
    assert_decodes_to(weight, _expected(layer, size, layer["weight.absmax"]))


@pytest.mark.parametrize("size", [64, 32])
def test_scales_that_are_rounded_themselves_are_restored_first(size: int) -> None:
    layer = _layer(size)
    blocks = -(-OUT * IN // size)
    absmax = torch.randint(0, 256, (blocks,), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    table, nested = torch.linspace(-1, 1, 256), random_scales(4, -(-blocks // 16), dtype=torch.float32)
    layer |= {
        "weight.absmax": absmax,
        "weight.nested_absmax": nested,
        "weight.nested_quant_map": table,
        STATE: _state(size, nested_blocksize=16, nested_dtype="float32", nested_offset=2.5),
    }
    weight = read_layer(read_scheme({**NF4, "bnb_4bit_use_double_quant": True}, {}), layer, OUT, IN)
    restored = torch.stack([table[int(code)] * nested[i // 16] + 2.5 for i, code in enumerate(absmax)])
    assert_decodes_to(weight, _expected(layer, size, restored))


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_bytes_may_be_stored_as_another_type(storage: str) -> None:
    layer = _layer(64)
    expected = _expected(layer, 64, layer["weight.absmax"])
    layer["weight"] = layer["weight"].view(-1).view(getattr(torch, storage))[:, None]
    weight = read_layer(read_scheme({**NF4, "bnb_4bit_quant_storage": storage}, {}), layer, OUT, IN)
    assert_decodes_to(weight, expected)


def test_int8_is_a_row_of_codes_times_its_largest_value_over_127() -> None:
    codes = torch.randint(-127, 128, (OUT, IN), generator=torch.Generator().manual_seed(5), dtype=torch.int8)
    layer = {"weight": codes, "SCB": random_scales(6, OUT, dtype=torch.float32)}
    layer["weight_format"] = torch.tensor(0, dtype=torch.uint8)
    weight = read_layer(read_scheme(INT8, {}), layer, OUT, IN)
    expected = [[float(layer["SCB"][n]) / 127 * int(codes[n, k]) for k in range(IN)] for n in range(OUT)]
    assert_decodes_to(weight, expected)
    layer["weight_format"] += 1
    with pytest.raises(ModelNotSupported, match=f"{MODULE}.weight_format"):
        read_scheme(INT8, {}).read(MODULE, IN, OUT, layer)


def test_layers_that_the_config_or_the_files_leave_in_16_bits_are_left() -> None:
    four = read_scheme({**NF4, "llm_int8_skip_modules": ["lm_head", "gate"]}, {})
    eight = read_scheme({**INT8, "llm_int8_skip_modules": ["lm_head", "gate"]}, {})
    for scheme, held in ((four, {"weight", "weight.absmax", STATE}), (eight, {"weight", "SCB"})):
        assert scheme.is_quantized(MODULE, held)
        assert scheme.is_quantized("model.layers.0.mlp.gate_proj", held)
        assert not scheme.is_quantized("model.layers.0.mlp.gate", held)
        assert not scheme.is_quantized("lm_head", held)
        assert not scheme.is_quantized("model.embed_tokens", {"weight"})


@pytest.mark.parametrize("suffix", ["weight", "weight.absmax", "weight.quant_map", STATE])
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(suffix: str) -> None:
    layer, scheme = _layer(64), read_scheme(NF4, {})
    assert misfits(scheme, {k: t for k, t in layer.items() if k != suffix}, OUT, IN) == [suffix]
    assert misfits(scheme, {**layer, suffix: layer[suffix][None, None]}, OUT, IN) == [suffix]
    assert misfits(scheme, {**layer, suffix: layer[suffix].double()}, OUT, IN) == [suffix]
    int8 = {"weight": torch.zeros(OUT, IN, dtype=torch.int8), "SCB": torch.ones(OUT)}
    assert misfits(read_scheme(INT8, {}), {**int8, "SCB": torch.ones(OUT, 1)}, OUT, IN) == ["SCB"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({STATE: _json(quant_type="fp4")}, f"{MODULE}.{STATE}: quant_type='fp4'"),
        ({STATE: torch.tensor([123], dtype=torch.uint8)}, f"{MODULE}.{STATE}: it is no JSON"),
        ({STATE: _state(32)}, f"{MODULE}.weight.absmax: 18 scales for blocks of 32"),
        ({STATE: _state(48)}, "blocksize=48"),
        ({STATE: _json(quant_type="nf4", blocksize=64, shape=[IN, OUT])}, f"{MODULE}.{STATE}: its shape"),
        ({STATE: _state(64, nested_offset=0.1)}, "nested_offset=0.1"),
        ({"weight.quant_map": torch.linspace(-1, 1, 16)}, f"{MODULE}.weight.quant_map"),
    ],
)
def test_contents_that_are_not_served_are_refused_by_the_name_of_the_tensor(
    changes: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ModelNotSupported, match=message):
        read_scheme(NF4, {}).read(MODULE, IN, OUT, {**_layer(64), **changes})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**NF4, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type='fp4'"),
        ({**NF4, "load_in_8bit": True}, "load_in_4bit=True .*load_in_8bit=True"),
        ({**INT8, "load_in_8bit": False}, "load_in_4bit=False"),
        ({**INT8, "llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight=True"),
        ({**NF4, "bnb_4bit_quant_storage": "int4"}, "bnb_4bit_quant_storage='int4'"),
        ({**NF4, "bnb_4bit_blocksize": 128}, "bnb_4bit_blocksize=128"),
    ],
)
def test_a_config_that_is_not_served_is_refused_by_key_and_value(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelNotSupported, match=message):
        read_scheme(config, {})
