"""Hostile adapter_config.json files, each kind with sizes of its own. See `hostile_adapters.py`."""

from __future__ import annotations

import json
import random

from tests.support.fake_sources import Files, small_config
from tests.support.hostile_files import ODD_TEXTS, files_of, odd_value

ODD_LITERALS = (
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1e999",
    "9" * 5000,
    "0x10",
    "01",
    "+1",
    "1_0",
    "1.",
    ".5",
    "tru",
    "'a'",
)
NUMBER_FIELDS = ("r", "lora_alpha", "lora_dropout", "qalora_group_size", "layers_to_transform")
NAME_FIELDS = ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "target_parameters")
MAP_FIELDS = ("rank_pattern", "alpha_pattern", "loftq_config", "eva_config", "auto_mapping", "runtime_config")
TEXT_FIELDS = (
    "peft_type",
    "task_type",
    "bias",
    "init_lora_weights",
    "base_model_name_or_path",
    "revision",
    "megatron_core",
)
FLAG_FIELDS = (
    "use_rslora",
    "use_dora",
    "use_qalora",
    "lora_bias",
    "fan_in_fan_out",
    "inference_mode",
    "ensure_weight_tying",
)
UNKNOWN_FIELDS = ("use_next_year", "x" * 3000, "\x1b[2J", "\ud800", "r ", "R")
ATOMS = (
    "a",
    ".",
    ".*",
    "(?:q|v)",
    "[a-z]",
    "\\w",
    "\\d+",
    "layers",
    "q_proj",
    "(?=q)",
    "(?<=a)",
    "\\1",
    "(?i)",
    "(.*)",
    "(a*)*",
    "é",
)
REPEATS = ("*", "+", "?", "{1,99}", "{0,1000}", "{60000}", "{1,}", "*?", "++", "{,5}", "{99999999999}")


def odd_field(draw: random.Random) -> Files:
    """One field, or a few, with what it should not be."""
    config = small_config()
    for _ in range(draw.randint(1, 3)):
        name = draw.choice(NUMBER_FIELDS + NAME_FIELDS + MAP_FIELDS + TEXT_FIELDS + FLAG_FIELDS + UNKNOWN_FIELDS)
        config[name] = odd_value(draw)
    return files_of(config)


def literals(draw: random.Random) -> Files:
    """Numbers and words that are no JSON, or that only few parsers take."""
    field = draw.choice(NUMBER_FIELDS)
    plain = json.dumps(small_config())[:-1]
    return files_of(f'{plain}, "{field}": {draw.choice(ODD_LITERALS)}}}'.encode())


def _pattern(draw: random.Random) -> str:
    text = ""
    for _ in range(draw.randint(1, 6)):
        piece = draw.choice(ATOMS) + draw.choice(("", "", *REPEATS))
        text = draw.choice((text + piece, f"(?:{text}{piece}){draw.choice(REPEATS)}", f"{text}|{piece}", piece + text))
    return text


def patterns(draw: random.Random) -> Files:
    """Regular expressions wherever one may stand."""
    field = draw.choice(("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"))
    if field in ("rank_pattern", "alpha_pattern"):
        return files_of(
            small_config(**{field: {_pattern(draw): draw.randint(1, 3) for _ in range(draw.randint(1, 5))}})
        )
    more = {"layers_to_transform": [0, 1]} if field == "layers_pattern" else {}
    return files_of(small_config(**{field: _pattern(draw)}, **more))


def plain_keys(draw: random.Random) -> Files:
    """Names, many of them, in lists and as keys."""
    names = [
        "q_proj",
        "v_proj",
        "self_attn.q_proj",
        "layers.1.self_attn.v_proj",
        "layers_1_self_attn_v_proj",
        "^q_proj",
        "x",
    ]
    keys = [draw.choice(names) + draw.choice(("", "", str(i))) for i in range(draw.choice((1, 3, 50, 2000)))]
    if draw.random() < 0.5:
        return files_of(small_config(**{draw.choice(("rank_pattern", "alpha_pattern")): dict.fromkeys(keys, 2)}))
    return files_of(small_config(**{draw.choice(("target_modules", "exclude_modules")): [*keys, "v_proj"]}))


def layers(draw: random.Random) -> Files:
    """Numbers of layers, and what layers are called."""
    layers = draw.choice(([0], [1], 0, [0, 1], [-1], [10**30], list(range(5000)), [True], [], "0", [0.0]))
    return files_of(
        small_config(layers_to_transform=layers, layers_pattern=draw.choice((None, "layers", ["h", "layers"], [])))
    )


def damaged_json(draw: random.Random) -> Files:
    """Bytes of a configuration changed, cut, or in another encoding."""
    text = json.dumps(small_config(note=draw.choice(ODD_TEXTS)))
    how = draw.randint(0, 5)
    if how == 0:
        return files_of(text.encode()[: draw.randint(0, len(text))])
    if how == 1:
        changed = bytearray(text.encode())
        for _ in range(draw.randint(1, 5)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        return files_of(bytes(changed))
    if how == 2:
        return files_of(text.encode(draw.choice(("utf-16", "utf-32", "utf-8-sig", "utf-16-le"))))
    if how == 3:
        return files_of(b'{"r": 2, "r": 3}' if draw.random() < 0.5 else text[:-1].encode() + b', "r": 2}')
    if how == 4:
        depth = draw.choice((2, 31, 32, 33, 64, 500, 5000))
        opening, closing = draw.choice((("[", "]"), ('{"a":', "}"), ("[[", "]")))
        return files_of(f'{text[:-1]}, "auto_mapping": {opening * depth}1{closing * depth}}}'.encode())
    return files_of(
        draw.choice((b"", b"null", b"[]", b'""', b"{}", b"{" * 40, b'"' * 999, b"\\" * 999, b'{"\\', b"\xff" * 9))
    )
