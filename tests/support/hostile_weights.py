"""Hostile weights files, each kind with sizes of its own. See `hostile_adapters.py`."""

from __future__ import annotations

import json
import random
import struct

import numpy as np
from safetensors.numpy import save

from tests.support.fake_sources import Files, small_config, small_tensors
from tests.support.hostile_files import ODD_TEXTS, files_of, odd_value, with_header

DTYPES = (
    "F32",
    "F16",
    "BF16",
    "F64",
    "I8",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F4",
    "",
    "f32",
    32,
    None,
    ["F32"],
    "F32" * 2000,
)


def wrong_tensors(draw: random.Random) -> Files:
    """Shapes, ranks, numbers and tensors beside those that are meant."""
    tensors = small_tensors()
    names = sorted(tensors)
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(names)
        shape = [draw.choice((0, 1, 2, 4, 8, 3)) for _ in range(draw.randint(0, 4))]
        what = draw.randint(0, 5)
        if what == 0:
            tensors[name] = np.zeros(shape, np.float32)
        elif what == 1:
            tensors.pop(name, None)
        elif what == 2:
            value = tensors.get(name, np.ones((2, 8), np.float32)).copy()
            if value.size:
                value.flat[draw.randrange(value.size)] = draw.choice((np.nan, np.inf, -np.inf, 3e38, 1e-45, -0.0))
            tensors[name] = value
        elif what == 3:
            tensors[name] = np.ones((2, 8), draw.choice((np.float16, np.float64, np.int8, np.int64, np.bool_)))
        elif what == 4 and name in tensors:
            tensors[name] = np.ascontiguousarray(tensors[name].T)
        else:
            tensors[_odd_tensor_name(draw, name)] = np.ones((2, 8), np.float32)
    return files_of(small_config(r=draw.choice((2, 2, 2, 1, 512))), tensors=tensors)


def _odd_tensor_name(draw: random.Random, name: str) -> str:
    text = draw.choice([odd for odd in ODD_TEXTS if odd.isprintable()])
    module = name.removeprefix("base_model.model.")
    return draw.choice(
        (
            name + text, text + name, module,
            name.replace(".lora_A", ".lora_A.default").replace(".lora_B", ".lora_B.other"),
            name.replace("model.layers", "language_model.model.layers"), name.replace("layers.0", "layers.99"),
            name.replace(".weight", ".bias"), name.replace("lora_A", "lora_magnitude_vector"),
            name.replace(".lora_A", ".base_layer").replace(".lora_B", ".base_layer"), f"base_model.model.{name}",
            name.replace("self_attn", "experts.3"), "base_model.model.vision_tower.q_proj.lora_A.weight",
        )
    )  # fmt: skip


def renamed_all(draw: random.Random) -> Files:
    """All names changed alike: as another version of a program would write them, or as none would."""
    old, new = draw.choice(
        (
            (".lora_A", ".lora_A.default"), (".lora_B", ".lora_B.mine"), ("model.layers", "old.layers"),
            ("model.layers", "language_model.model.layers"), ("base_model.model.", ""),
            ("base_model.model.", "module.base_model.model."), ("model.layers", "layers"),
            ("model.layers", "transformer.h"), (".weight", ""), ("lora_", "LORA_"),
        )
    )  # fmt: skip
    tensors = {name.replace(old, new): value for name, value in small_tensors().items()}
    if new == ".lora_A.default" and draw.random() < 0.7:
        tensors = {name.replace(".lora_B", ".lora_B.default"): value for name, value in tensors.items()}
    return files_of(tensors=tensors)


def odd_header(draw: random.Random) -> Files:
    """A good header with one entry that is not."""
    content = save(small_tensors())
    end = 8 + int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8:end]), content[end:]
    name = draw.choice(sorted(header))
    entry = header[name]
    big = draw.choice((0, -1, 1, 2**31, 2**62, 2**63, 2**64, 10**30, 1.0, True, None, "8"))
    what = draw.randint(0, 8)
    if what == 0:
        entry["dtype"] = draw.choice(DTYPES)
    elif what == 1:
        entry["shape"] = draw.choice(([big], [big, big], [2, 8, 1], [], [2**62, 0], [1] * 9, [[2]], "28", {}, [8, 2]))
    elif what == 2:
        entry["data_offsets"][draw.randint(0, 1)] = big
    elif what == 3:
        other = header[draw.choice(sorted(header))]
        entry["data_offsets"] = draw.choice(
            (list(other["data_offsets"]), [0, 0], [], [0], [8, 0], [0, 1, 2], "0,64", None)
        )
    elif what == 4:
        entry[draw.choice(ODD_TEXTS)] = 1
    elif what == 5:
        header[draw.choice(ODD_TEXTS)] = odd_value(draw)
    elif what == 6:
        header["__metadata__"] = draw.choice(
            ({"a": 1}, [], "x", {"format": "pt"}, {"k" * 5000: "v" * 5000}, None, {"a": None})
        )
    elif what == 7:
        header[name] = draw.choice(([], None, 1, "x", {}, [entry], {"dtype": "F32"}))
    else:
        body = draw.choice((body[:-1], body + b"\0", b"", body * 2, body[4:]))
    return files_of(weights=with_header(json.dumps(header).encode(), body))


def damaged_weights(draw: random.Random) -> Files:
    """Bytes of a weights file changed, cut or foreign."""
    content = bytearray(save(small_tensors()))
    how = draw.randint(0, 3)
    if how == 0:
        return files_of(weights=bytes(content[: draw.randint(0, len(content))]))
    if how == 1:
        for _ in range(draw.randint(1, 5)):
            content[draw.randint(0, min(len(content) - 1, 900))] = draw.randrange(256)
        return files_of(weights=bytes(content))
    if how == 2:
        length = draw.choice((0, 1, 2, 7, 1 << 20, 16 << 20, (16 << 20) + 1, 1 << 40, 2**64 - 1))
        return files_of(weights=struct.pack("<Q", length) + bytes(content[8:]))
    foreign = (
        b"PK\x03\x04",
        b"\x80\x02}q",
        b"GGUF",
        b"\x89HDF",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<html>",
        b"{}",
    )
    return files_of(weights=draw.choice(foreign) + draw.choice((b"", bytes(100), b"oid sha256:0\nsize 12\n")))


def deep_header(draw: random.Random) -> Files:
    """Nested, or of many entries, as far as is looked at."""
    depth = draw.choice((2, 31, 33, 500, 5000))
    count = draw.choice((1, 10, 1000))
    text = draw.choice(
        (
            b'{"a":' * depth + b"1" + b"}" * depth,
            b'{"a":' + b"[" * depth + b"]" * depth + b"}",
            b"{" + b",".join(b'"%d":[]' % i for i in range(count)) + b"}",
            b'{"a":[' + b",".join([b"0"] * count) + b"]}",
            b'{"' + b"a" * (10 * count) + b'":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(count)) + b"}",
            b'{"a\\u0000":1,"a\\ud800":2}',
            b'{"\xff\xfe":1}',
        )
    )
    return files_of(weights=with_header(text, bytes(4)))
