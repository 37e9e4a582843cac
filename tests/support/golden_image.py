"""Golden adapter images: PEFT files and the exact image they must become.

Both sides of the seam test against these: the store's packer must produce `manifest` and `data` from `files`, the
engine's reader must find the tensors in `data`. Nothing here uses code of either side: every offset is written down
and every byte comes from `struct` or from hex.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GoldenImage:
    """One adapter as PEFT writes it, and as an image."""

    spec: dict[str, Any]  # engine.image_spec.ImageSpec as plain data
    spec_digest: str
    config: dict[str, Any]  # adapter_config.json
    tensors: dict[str, tuple[tuple[int, ...], tuple[float, ...]]]  # name -> shape, float32 values row by row
    manifest: dict[str, Any]
    data: bytes

    @property
    def files(self) -> dict[str, bytes]:
        """The adapter folder as PEFT saves it: {file name: bytes}."""
        return {
            "adapter_config.json": json.dumps(self.config).encode(),
            "adapter_model.safetensors": _safetensors(self.tensors),
        }


def _safetensors(tensors: dict[str, tuple[tuple[int, ...], tuple[float, ...]]]) -> bytes:
    """Source: the safetensors format: u64 header length, JSON header, data (offsets count from its start)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name in sorted(tensors):
        shape, values = tensors[name]
        raw = struct.pack(f"<{len(values)}f", *values)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def _site(index: int, name: str, in_features: int, out_features: int, **more: Any) -> dict[str, Any]:
    site = {"kind": "linear", "layer": None, "fusion_group": None, "shard_axis": None}
    return {"index": index, "name": name, "in_features": in_features, "out_features": out_features, **site, **more}


def _floats(offset: int, *values: float) -> tuple[int, bytes]:
    return offset, struct.pack(f"<{len(values)}f", *values)


def _codes(offset: int, *values: int) -> tuple[int, bytes]:
    return offset, struct.pack(f"<{len(values)}b", *values)


def _buffer(num_bytes: int, *parts: tuple[int, bytes]) -> bytes:
    data = bytearray(num_bytes)
    for offset, raw in parts:
        data[offset : offset + len(raw)] = raw
    return bytes(data)


def _config(**own: Any) -> dict[str, Any]:
    """adapter_config.json with what all have, and what is an adapter's own."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "golden-base",
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **own,
    }


_SITES = [
    _site(0, "model.embed_tokens", 5, 4, kind="embedding"),
    _site(1, "model.layers.0.self_attn.q_proj", 4, 6, layer=0, fusion_group="layers.0.qkv", shard_axis="out"),
    _site(2, "model.layers.0.mlp.up_proj", 4, 3, layer=0, shard_axis="out"),  # the adapter has nothing for it
    _site(3, "model.layers.0.mlp.down_proj", 3, 4, layer=0, shard_axis="in"),
    _site(4, "lm_head", 4, 5),
]

# Rank 2 with alpha 4, but down_proj has rank 3 and alpha 5 of its own; an embedding and the head are adapted too.
FLOAT32 = GoldenImage(
    spec={"base_fingerprint": "golden-base", "dtype": "float32", "sites": _SITES, "tp_degree": 1},
    spec_digest="3278877e5fa0caa8aaa7ff5cfe8bab4f63b539699a510f607fa63226b8f588a6",
    config=_config(
        r=2,
        lora_alpha=4,
        rank_pattern={"down_proj": 3},
        alpha_pattern={"down_proj": 5},
        target_modules=["embed_tokens", "q_proj", "down_proj", "lm_head"],
        use_rslora=False,
    ),
    tensors={
        "base_model.model.model.embed_tokens.lora_embedding_A": ((2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)),
        "base_model.model.model.embed_tokens.lora_embedding_B": ((4, 2), (11, 12, 13, 14, 15, 16, 17, 18)),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ((2, 4), (21, 22, 23, 24, 25, 26, 27, 28)),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (
            (6, 2),
            (31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42),
        ),
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": ((3, 3), (51, 52, 53, 54, 55, 56, 57, 58, 59)),
        "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight": (
            (4, 3),
            (61, 62, 63, 64, 65, 66, 67, 68, 69, 70, 71, 72),
        ),
        "base_model.model.lm_head.lora_A.weight": ((2, 4), (0.5, -0.5, 0.25, -0.25, 0.125, -0.125, 1e-3, -1e-3)),
        "base_model.model.lm_head.lora_B.weight": ((5, 2), (81, 82, 83, 84, 85, 86, 87, 88, 89, 90)),
    },
    manifest={
        "format": 1,
        "spec": "3278877e5fa0caa8aaa7ff5cfe8bab4f63b539699a510f607fa63226b8f588a6",
        "dtype": "float32",
        "num_bytes": 512,
        "rank": 3,
        "entries": [
            {"site": 0, "rank": 2, "scaling": 2.0, "a_offset": 0, "b_offset": 64},
            {"site": 1, "rank": 2, "scaling": 2.0, "a_offset": 128, "b_offset": 192},
            {"site": 3, "rank": 3, "scaling": 5 / 3, "a_offset": 256, "b_offset": 320},
            {"site": 4, "rank": 2, "scaling": 2.0, "a_offset": 384, "b_offset": 448},
        ],
    },
    data=_buffer(
        512,
        _floats(0, 1, 6, 2, 7, 3, 8, 4, 9, 5, 10),  # embed_tokens a [5, 2]: transposed
        _floats(64, 11, 13, 15, 17, 12, 14, 16, 18),  # b [2, 4]: transposed
        _floats(128, 21, 22, 23, 24, 25, 26, 27, 28),  # q_proj a [2, 4]: as PEFT has it
        _floats(192, 31, 33, 35, 37, 39, 41, 32, 34, 36, 38, 40, 42),  # b [2, 6]: transposed
        _floats(256, 51, 52, 53, 54, 55, 56, 57, 58, 59),  # down_proj a [3, 3]
        _floats(320, 61, 64, 67, 70, 62, 65, 68, 71, 63, 66, 69, 72),  # b [3, 4]
        _floats(384, 0.5, -0.5, 0.25, -0.25, 0.125, -0.125, 1e-3, -1e-3),  # lm_head a [2, 4]
        _floats(448, 81, 83, 85, 87, 89, 82, 84, 86, 88, 90),  # b [2, 5]
    ),
)

# Ties and near-ties of both signs; zeros, a subnormal, a tie's neighbour, the very large and the very small.
_AWKWARD = (
    *(1.0, 1.00390625, 1.01171875, 1.005, -1.0, -1.00390625, -1.01171875, -1.005),
    *(0.0, -0.0, 2.0**-130, 0.1, 3.0, 256.5, 1e30, -1e-30),
)

# rsLoRA (scaling = alpha / sqrt(r)) into bfloat16: rounding to nearest, ties to even, signs and a subnormal kept.
BFLOAT16 = GoldenImage(
    spec={"base_fingerprint": "golden-base", "dtype": "bfloat16", "sites": _SITES, "tp_degree": 1},
    spec_digest="eae1312054e8fb7d58980016174f1ac139e5da98c95d00459f678d9decb450d5",
    config=_config(
        r=4,
        lora_alpha=6,
        rank_pattern={},
        alpha_pattern={},
        target_modules=["up_proj"],
        use_rslora=True,
    ),
    tensors={
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": (
            (4, 4),
            _AWKWARD,
        ),
        "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": (
            (3, 4),
            (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0),
        ),
    },
    manifest={
        "format": 1,
        "spec": "eae1312054e8fb7d58980016174f1ac139e5da98c95d00459f678d9decb450d5",
        "dtype": "bfloat16",
        "num_bytes": 128,
        "rank": 4,
        "entries": [{"site": 2, "rank": 4, "scaling": 3.0, "a_offset": 0, "b_offset": 64}],
    },
    data=_buffer(
        128,
        (0, bytes.fromhex("803f 803f 823f 813f 80bf 80bf 82bf 81bf 0000 0080 0800 cd3d 4040 8043 4a71 a28d")),
        (64, bytes.fromhex("803f a040 1041 0040 c040 2041 4040 e040 3041 8040 0041 4041")),  # [4, 3]: transposed
    ),
)

# Codes of -127 .. 127: ties to even, a rank of zeros, one too small for a scale, and steps that are no powers of two.
INT8 = GoldenImage(
    spec={"base_fingerprint": "golden-base", "dtype": "int8", "sites": _SITES, "tp_degree": 1},
    spec_digest="ec8e8e650926a1241149fda5065b3399e3ab5dbdcc5b999e7edb55a48abe99b4",
    config=_config(
        r=2,
        lora_alpha=3,
        rank_pattern={},
        alpha_pattern={},
        target_modules=["embed_tokens", "down_proj"],
        use_rslora=False,
    ),
    tensors={
        "base_model.model.model.embed_tokens.lora_embedding_A": (
            (2, 5),
            (127.0, -127.0, 63.5, 0.5, -1.5, 0.0, 0.0, 0.0, 0.0, 0.0),
        ),
        "base_model.model.model.embed_tokens.lora_embedding_B": ((4, 2), (254.0, 1.0, -2.0, 0.3, 1.0, 0.25, 3.0, -1.0)),
        "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight": ((2, 3), (12.7, -6.0, 0.1, -254.0, 2.0, 4.0)),
        "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight": (
            (4, 2),
            (127.0, 1e-37, 0.0, 0.0, 0.0, 0.0, -127.0, -1e-37),
        ),
    },
    manifest={
        "format": 2,
        "spec": "ec8e8e650926a1241149fda5065b3399e3ab5dbdcc5b999e7edb55a48abe99b4",
        "dtype": "int8",
        "num_bytes": 384,
        "rank": 2,
        "entries": [
            {"site": 0, "rank": 2, "scaling": 1.5, "a_offset": 0, "b_offset": 64, "scales_offset": 128},
            {"site": 3, "rank": 2, "scaling": 1.5, "a_offset": 192, "b_offset": 256, "scales_offset": 320},
        ],
    },
    data=_buffer(
        384,
        _codes(0, 127, 0, -127, 0, 64, 0, 0, 0, -2, 0),  # embed_tokens a [5, 2]: transposed; its second rank is zeros
        _codes(64, 127, -1, 0, 2, 127, 38, 32, -127),  # b [2, 4]: transposed
        (128, bytes.fromhex("0000803f 00000000 00000040 0402013c")),  # of a 1 and 0, of b 2 and 1/127
        _codes(192, 127, -60, 1, -127, 1, 2),  # down_proj a [2, 3]
        _codes(256, 127, 0, 0, -127),  # b [2, 4]; its second rank would have a subnormal scale
        (320, bytes.fromhex("cdcccc3d 00000040 0000803f 00000000")),  # of a 0.1 and 2, of b 1 and 0
    ),
)

GOLDEN = {"float32": FLOAT32, "bfloat16": BFLOAT16, "int8": INT8}
