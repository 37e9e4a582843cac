"""Every kind of bad adapter is refused with its reason, before a byte of its weights is used."""

import dataclasses
import json
import struct
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.numpy import save

from adapter_store.errors import AdapterRejected
from adapter_store.image.config_fields import HARMLESS, HONOURED, REFUSED_WHEN_SET
from adapter_store.image.packing import pack
from adapter_store.image.peft_config import parse_config
from adapter_store.image.safetensors_header import parse_header
from tests.support.fake_sources import adapter_files, small_adapter, small_config, small_spec, small_tensors

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


def refusal(files):
    with pytest.raises(AdapterRejected) as caught:
        pack(files, small_spec())
    return caught.value.reason


def with_weights(content):
    return {**small_adapter(), WEIGHTS: content}


def with_header(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return with_weights(struct.pack("<Q", len(text)) + text + body)


def changed(tensors=None, **config):
    base = small_tensors()
    for name, value in (tensors or {}).items():
        if value is None:
            del base[name]
        else:
            base[name] = value
    return adapter_files(base, small_config(**config))


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype=dtype)


F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

BROKEN_FILES = {
    "truncated in the tensors": (with_weights(small_adapter()[WEIGHTS][:-7]), "truncated"),
    "truncated in the header": (with_weights(small_adapter()[WEIGHTS][:60]), "truncated"),
    "truncated in the length": (with_weights(b"\x08\x00\x00"), "truncated"),
    "bytes after the tensors": (with_weights(small_adapter()[WEIGHTS] + b"more"), "no tensor names"),
    "a zip as torch saves it": (with_weights(b"PK\x03\x04" + bytes(100)), "zip"),
    "a pickle under the right name": (with_weights(b"\x80\x02}q\x00." + bytes(100)), "pickle"),
    "a gguf": (with_weights(b"GGUF" + bytes(100)), "GGUF"),
    "wrong magic": (with_weights(struct.pack("<Q", 4) + b"xxxx"), "does not begin with"),
    "a header of 10 GB": (with_weights(struct.pack("<Q", 10 << 30) + b"{" * 20), "10737418240"),
    "a header that is no JSON": (with_header(b"{nonsense"), "not JSON"),
    "a header that is a list": (with_header(b"[]"), "does not begin"),
    "a header nested deeply": (with_header(b'{"a":' * 100_000), "nested too deeply"),
    "a key twice": (with_header(b'{"a":1,"a":2}'), "'a' twice"),
    "metadata of no strings": (with_header({"__metadata__": {"a": 1}}), "__metadata__"),
    "an entry with more": (with_header({"t": {**F32, "extra": 1}}, bytes(4)), "just dtype"),
    "an integer tensor": (with_header({"t": {**F32, "dtype": "I64"}}, bytes(4)), "'I64'"),
    "a float64 tensor": (with_header({"t": {**F32, "dtype": "F64"}}, bytes(4)), "'F64'"),
    "a negative shape": (with_header({"t": {**F32, "shape": [-1]}}, bytes(4)), "not a shape"),
    "a shape of truths": (with_header({"t": {**F32, "shape": [True]}}, bytes(4)), "not a shape"),
    "an endless shape": (with_header({"t": {**F32, "shape": [1] * 9}}, bytes(4)), "not a shape"),
    "offsets backwards": (with_header({"t": {**F32, "data_offsets": [4, 0]}}, bytes(4)), "span -4"),
    "offsets of another size": (with_header({"t": {**F32, "shape": [2]}}, bytes(4)), "needs 8"),
    "a product beyond 64 bits": (with_header({"t": {**F32, "shape": [2**62, 2**62]}}, bytes(4)), "needs"),
    "overlapping tensors": (with_header({"t": F32, "u": F32}, bytes(4)), "overlap"),
    "a gap": (with_header({"t": {**F32, "data_offsets": [4, 8]}}, bytes(8)), "gap"),
    "only a pickle": ({CONFIG: small_adapter()[CONFIG], "adapter_model.bin": b"\x80"}, "pickle"),
    "no weights": ({CONFIG: small_adapter()[CONFIG]}, f"{WEIGHTS} is missing"),
    "no configuration": ({WEIGHTS: small_adapter()[WEIGHTS]}, f"{CONFIG} is missing"),
    "added vocabulary": ({**small_adapter(), "new_embeddings.safetensors": b""}, "new_embeddings"),
    "shards": ({**small_adapter(), "adapter_model.safetensors.index.json": b""}, "sharded"),
    "no tensors at all": (with_header(b"{}"), "missing"),
    "an empty configuration": ({**small_adapter(), CONFIG: b""}, "not JSON"),
    "a huge configuration": ({**small_adapter(), CONFIG: b" " * (2 << 20)}, "limit"),
    "a NaN in the configuration": ({**small_adapter(), CONFIG: b'{"lora_alpha": NaN}'}, "NaN"),
    "a configuration that is a list": ({**small_adapter(), CONFIG: b"[1]"}, "list"),
    "a configuration of wrong bytes": ({**small_adapter(), CONFIG: b"\xff\xfe{"}, "not JSON"),
}

WRONG_TENSORS = {
    "rank 0 in the file": (changed({f"{Q0}.lora_A.weight": zeros(0, 8)}), "rank 0"),
    "rank 0 in the configuration": (changed(rank=0), "at least 1"),
    "another rank than configured": (changed({f"{Q0}.lora_A.weight": zeros(3, 8)}), "(3, 8)"),
    "a shape that is not the base's": (changed({f"{Q0}.lora_A.weight": zeros(2, 16)}), "(2, 16)"),
    "an output that is not the base's": (changed({f"{Q0}.lora_B.weight": zeros(9, 2)}), "(9, 2)"),
    "a matrix the wrong way round": (changed({f"{Q0}.lora_A.weight": zeros(8, 2)}), "(8, 2)"),
    "three dimensions": (changed({f"{Q0}.lora_A.weight": zeros(2, 8, 1)}), "(2, 8, 1)"),
    "no B": (changed({f"{Q0}.lora_B.weight": None}), f"{Q0}.lora_B.weight"),
    "no A": (changed({f"{Q0}.lora_A.weight": None}), f"{Q0}.lora_A.weight"),
    "a targeted module without tensors": (
        changed({f"{Q0}.lora_A.weight": None, f"{Q0}.lora_B.weight": None}),
        f"{Q0}.lora_A.weight",
    ),
    "an extra tensor": (changed({"base_model.model.extra": zeros(1)}), "base_model.model.extra"),
    "a tensor of no prefix": (changed({"model.q.lora_A.weight": zeros(2, 8)}), "begin with"),
    "a module the base lacks": (
        changed({"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": zeros(2, 8)}),
        "layers.9",
    ),
    "a DoRA magnitude": (changed({f"{Q0}.lora_magnitude_vector": zeros(8)}), "lora_magnitude_vector"),
    "a bias of B": (changed({f"{Q0}.lora_B.bias": zeros(8)}), "lora_B.bias"),
    "an adapter's name in the key": (changed({f"{Q0}.lora_A.default.weight": zeros(2, 8)}), "default"),
    "a whole base weight": (changed({f"{Q0}.base_layer.weight": zeros(8, 8)}), "base_layer"),
    "an embedding's tensor for a linear module": (changed({f"{Q0}.lora_embedding_A": zeros(2, 8)}), "kind 'linear'"),
    "a tensor of a module that is not targeted": (changed(target_modules=["q_proj"]), "does not target"),
    "only targets that the base lacks": (
        adapter_files({}, small_config(target_modules=["zzz_proj"])),
        "'zzz_proj'",
    ),
    "tensors of other layers than configured": (changed(layers_to_transform=[0]), "does not target"),
    "an excluded module with tensors": (changed(exclude_modules=["v_proj"]), "does not target"),
    "a rank pattern that is not the file's": (changed(rank_pattern={"q_proj": 4}), "rank 4"),
}

WRONG_CONFIG = {
    "another method": ({"peft_type": "IA3"}, "peft_type"),
    "no method": ({"peft_type": None}, "peft_type"),
    "no targets": ({"target_modules": None}, "target_modules"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules"),
    "a broken pattern": ({"target_modules": "("}, "regular expression"),
    "an endless pattern": ({"target_modules": "a" * 5000}, "characters"),
    "layers with a pattern of targets": ({"target_modules": ".*", "layers_to_transform": [0]}, "layers_to_transform"),
    "layers that are words": ({"layers_to_transform": ["a"]}, "layers_to_transform"),
    "a layer pattern alone": ({"layers_pattern": "layers"}, "layers_pattern"),
    "a rank that is a word": ({"r": "8"}, "r is '8'"),
    "a rank that is a fraction": ({"r": 2.5}, "r is 2.5"),
    "an alpha that is a word": ({"lora_alpha": "x"}, "lora_alpha"),
    "an alpha beyond all": ({"lora_alpha": 10**400}, "lora_alpha"),
    "a rank pattern that is a list": ({"rank_pattern": [1]}, "rank_pattern"),
    "a rank pattern of rank 0": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']"),
    "an alpha pattern of words": ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern['q_proj']"),
    "rank stabilization by a word": ({"use_rslora": "yes"}, "use_rslora"),
    "biases of another kind": ({"bias": "some"}, "bias"),
    "a task nobody knows": ({"task_type": "SEQ_BRAND_NEW"}, "task_type"),
    "a classifier with its head": ({"task_type": "SEQ_CLS", "modules_to_save": ["score"]}, "modules_to_save"),
    "an init that changes the base": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    "an init nobody knows": ({"init_lora_weights": "brand_new"}, "init_lora_weights"),
    "a field nobody knows": ({"use_brand_new_thing": True}, "use_brand_new_thing"),
}


@pytest.mark.parametrize("case", sorted(BROKEN_FILES))
def test_a_broken_file_is_refused_with_its_reason(case):
    files, told = BROKEN_FILES[case]
    assert told in refusal(files)


@pytest.mark.parametrize("case", sorted(WRONG_TENSORS))
def test_tensors_that_do_not_fit_are_refused_with_their_reason(case):
    files, told = WRONG_TENSORS[case]
    assert told in refusal(files)


@pytest.mark.parametrize("case", sorted(WRONG_CONFIG))
def test_a_configuration_that_cannot_be_honoured_is_refused_by_field(case):
    change, told = WRONG_CONFIG[case]
    assert told in refusal(adapter_files(small_tensors(), {**small_config(), **change}))


@pytest.mark.parametrize("field", sorted(set(REFUSED_WHEN_SET) - {"ensure_weight_tying"}))
def test_a_feature_that_is_not_implemented_is_refused_by_name(field):
    assert refusal(changed(**{field: {"on": 1}})).startswith(f"{field} is set")


def test_every_field_of_the_installed_peft_is_honoured_harmless_or_refused():
    tables = [HONOURED, set(HARMLESS), set(REFUSED_WHEN_SET)]
    assert sum(map(len, tables)) == len(set().union(*tables)), "a field is in two tables"
    assert {field.name for field in dataclasses.fields(LoraConfig)} == set().union(*tables)


def test_the_defaults_of_peft_are_accepted(tmp_path):
    LoraConfig(r=2, target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    files = {**small_adapter(), CONFIG: (tmp_path / CONFIG).read_bytes()}
    assert pack(files, small_spec()).manifest["entries"][0]["scaling"] == 4.0  # PEFT's default alpha of 8


def test_harmless_fields_change_nothing():
    values = dict.fromkeys(HARMLESS, "something")
    assert (
        pack(small_adapter(**values), small_spec()).data.tobytes() == pack(small_adapter(), small_spec()).data.tobytes()
    )


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_init_that_leaves_the_base_alone_is_accepted(init):
    pack(small_adapter(init_lora_weights=init), small_spec())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_adapters_of_any_float_type_are_served(dtype):
    tensors = {name: value.astype(dtype) for name, value in small_tensors().items()}
    assert pack(adapter_files(tensors, small_config()), small_spec()).rank == 2


def test_a_pattern_of_the_configuration_is_matched_as_peft_matches_it():
    settings = parse_config(json.dumps({**small_config(), "rank_pattern": {"layers.1.self_attn.q_proj": 7}}).encode())
    names = ("model.layers.1.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "xlayers.1.self_attn.q_proj")
    assert [lora.rank for lora in settings.modules(dict.fromkeys(names, "linear")).values()] == [7, 2, 2]


def test_the_header_of_a_good_file_names_every_tensor_in_its_place():
    tensors = small_tensors()
    content = save(tensors)
    for name, info in parse_header(content).items():
        assert np.array_equal(
            np.frombuffer(content[info.start : info.end], np.float32).reshape(info.shape), tensors[name]
        )


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_change_of_bytes_ever_raises_anything_but_a_refusal(data):
    files = small_adapter()
    name = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(content) - 1, 700)))
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 3)) * data.draw(st.integers(0, len(content)))
    files[name] = bytes(content[: len(content) - min(cut, len(content))])
    with suppress(AdapterRejected):
        assert np.isfinite(pack(files, small_spec()).data.view(np.float32)).all()
