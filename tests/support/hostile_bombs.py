"""The worst of each kind of hostile adapter, at the largest size that is looked at, and at one just beyond it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from adapter_store.image.inspect import max_header_bytes
from adapter_store.image.peft_config import MAX_CONFIG_BYTES
from adapter_store.image.spec import read_spec
from tests.support.fake_sources import Files, small_config, small_spec
from tests.support.hostile_files import Case, files_of, with_header


def bombs() -> Iterator[Case]:
    """All of them."""
    yield from _pattern_bombs()
    yield from _config_bombs()
    yield from _header_bombs()


def _pattern_bombs() -> Iterator[Case]:
    for depth in (20, 26, 400):
        nested = "(?:" * depth + "a" + "){1,99}" * depth
        yield Case(f"target_modules of {depth} nested repeats", files_of(small_config(target_modules=nested)))
    endless = "(.*)*" * 12 + "x"
    classes = "(?i)" + "[\\U00000000-\\U0010ffff]" * 170
    for name, pattern in {
        "backtracks for ever": endless,
        "classes of all characters": classes,
        "alternatives in each other": "(?:a|" * 800 + "b" + ")" * 800,
        "copies of groups": "((a{1,60000}){1,60000})" * 170,
        "as long as is allowed": "(a|b)?" * 682,
        "too long": "a?" * 100_000,
        "look behind": "(?<=(?:a|b)(?:c|d))" * 200 + ".*",
    }.items():
        yield Case(f"target_modules {name}", files_of(small_config(target_modules=pattern)))
        yield Case(f"rank_pattern {name}", files_of(small_config(rank_pattern={pattern: 2})))
    many = {f"({index}|x)+": 2 for index in range(6000)}
    yield Case("rank_pattern of many patterns", files_of(small_config(rank_pattern=many)))
    dots = {"".join("." if (index >> bit) & 1 else "a" for bit in range(26)): 2 for index in range(24_000)}
    yield Case("rank_pattern of names with dots everywhere", files_of(small_config(alpha_pattern=dots)))
    yield Case(
        "layers_pattern of many",
        files_of(small_config(layers_to_transform=[0], layers_pattern=[f"l{index}" for index in range(60_000)])),
    )


def _config_bombs() -> Iterator[Case]:
    def filled(unit: str, before: str = "", after: str = "", field: str = "auto_mapping") -> Files:
        plain = json.dumps(small_config())[:-1]
        head, tail = f'{plain}, "{field}": {before}', f"{after}}}"
        count = (MAX_CONFIG_BYTES - len(head) - len(tail)) // len(unit)
        return files_of((head + (unit * count)[:-1] + tail).encode())

    yield Case("configuration of empty lists", filled("[],", "[", "]"))
    yield Case("configuration of empty objects", filled("{},", "[", "]"))
    yield Case("configuration of small objects", filled('{"":0},', "[", "]"))
    yield Case("configuration of numbers", filled("0,", "[", "]"))
    yield Case("configuration of long numbers", filled("9" * 4299 + ",", "[", "]"))
    yield Case("configuration of floats", filled("1e-300,", "[", "]"))
    yield Case("configuration of escapes", filled("\\u0041", '"', 'a"'))
    yield Case("configuration of quotes", filled('\\"', '"', 'a"'))
    yield Case("configuration of brackets", filled("[", "", "", "auto_mapping"))
    yield Case("configuration of pairs of brackets", filled("[]", "", ""))
    yield Case("targets without number", filled('"a",', "[", "]", "exclude_modules"))
    yield Case("layers without number", filled("7,", "[", "]", "layers_to_transform"))
    yield Case("an unknown field of a megabyte", filled("a", '"', 'a"', "unknown"))
    yield Case("a configuration too large", files_of(b" " * (MAX_CONFIG_BYTES + 1)))


def _header_bombs() -> Iterator[Case]:
    limit = max_header_bytes(read_spec(small_spec())) - 16

    def filled(unit: Callable[[int], bytes], size: int = limit) -> Files:
        parts, length = [b"{"], 2
        for index in range(size):
            part = unit(index)
            if length + len(part) + 1 > size:
                break
            parts += [part, b","]
            length += len(part) + 1
        parts[-1] = b"}"
        return files_of(weights=with_header(b"".join(parts)))

    good = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    yield Case("header of empty entries", filled(lambda i: b'"%x":[]' % i))
    yield Case("header of empty tensors", filled(lambda i: good % i))
    yield Case("header of one key", filled(lambda i: b'"a":[]'))
    tower = b'"base_model.model.vision_tower.%d.lora_A.weight":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    yield Case("header of tensors of towers", filled(lambda i: tower % i))
    yield Case("header of metadata", filled(lambda i: b'"__metadata__%d":{"a":"b"}' % i))
    yield Case("header of 16 MiB", filled(lambda i: b'"%x":[]' % i, 16 << 20))
    yield Case("header of 16 MiB of tensors", filled(lambda i: good % i, 16 << 20))
