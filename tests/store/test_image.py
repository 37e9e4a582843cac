"""What an adapter becomes: exactly the bytes of the golden images, and exactly what PEFT would compute."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adapter_store.errors import AdapterRejected, AdapterTooLarge, SpecInvalid
from adapter_store.image.inspect import Limits
from adapter_store.image.packing import pack, pack_folder
from adapter_store.image.rounding import convert, quantize_rows
from adapter_store.image.spec import spec_digest
from engine.image_spec import ImageSpec, LinearSite
from tests.support.fake_sources import adapter_files, site, small_adapter, small_config, small_spec, small_tensors
from tests.support.golden_image import GOLDEN

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def read(packed, row, entry):
    """a and b of one entry as float32, in the shapes of the contract; codes are left to `steps`."""
    dtype = TORCH[packed.manifest["dtype"]]
    embedding = row["kind"] == "embedding"
    shapes = {
        "a": (row["in_features"], entry["rank"]) if embedding else (entry["rank"], row["in_features"]),
        "b": (entry["rank"], row["out_features"]),
    }
    tensors = {}
    for which, shape in shapes.items():
        offset = entry[f"{which}_offset"]
        assert offset % 64 == 0
        count = shape[0] * shape[1]
        flat = torch.frombuffer(bytearray(packed.data[offset:].tobytes()), dtype=dtype, count=count)
        tensors[which] = flat.reshape(shape).float()
    return tensors["a"], tensors["b"]


def steps(packed, row, entry):
    """What a code of a and of b counts in, [1, rank] or [rank, 1] as the ranks lie."""
    assert entry["scales_offset"] % 64 == 0
    raw = bytearray(packed.data[entry["scales_offset"] :].tobytes())
    of_a, of_b = torch.frombuffer(raw, dtype=torch.float32, count=2 * entry["rank"]).reshape(2, -1, 1)
    return (of_a.T if row["kind"] == "embedding" else of_a), of_b


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_packing_gives_the_golden_image_to_the_byte(name):
    golden = GOLDEN[name]
    packed = pack(golden.files, golden.spec)
    assert packed.manifest == golden.manifest
    assert packed.data.tobytes() == golden.data
    assert spec_digest(golden.spec) == golden.spec_digest
    assert (packed.rank, packed.num_bytes) == (golden.manifest["rank"], len(golden.data))
    assert packed.config == golden.config


def test_a_spec_has_the_digest_that_the_engine_gives_it():
    spec = ImageSpec(
        base_fingerprint="é",
        dtype="float16",
        sites=(LinearSite(index=0, name="a", in_features=2, out_features=3, layer=1),),
    )
    assert spec_digest(spec.to_dict()) == spec.digest


def test_packing_needs_neither_boto3_nor_ray_nor_torch():
    code = "import sys, adapter_store.image.packing; print([m for m in ('boto3', 'ray', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def sites_of(model):
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            if "wpe" not in name:
                rows.append(site(len(rows), name, module.num_embeddings, module.embedding_dim, "embedding"))
        elif isinstance(module, torch.nn.Linear):
            rows.append(site(len(rows), name, module.in_features, module.out_features))
        elif type(module).__name__ == "Conv1D":
            rows.append(site(len(rows), name, *module.weight.shape))
    return rows


def tiny_llama():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=32,
        )
    )


def tiny_gpt2():
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32, n_positions=16, bos_token_id=0, eos_token_id=1)
    )


PEFT_CASES = {
    "plain": (tiny_llama, {"target_modules": ["q_proj", "v_proj"]}),
    "all_linear": (tiny_llama, {"target_modules": "all-linear"}),
    "rank_stabilized": (tiny_llama, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True, "lora_alpha": 5}),
    "rank_and_alpha_patterns": (
        tiny_llama,
        {
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3, r"^model\.layers\.\d+\.mlp\.up_proj": 6, "k_proj": 1},
            "alpha_pattern": {"q_proj": 7, r"layers\.[02]\.mlp\.up_proj": 9, "^v_proj": 99},
        },
    ),
    "some_layers": (tiny_llama, {"target_modules": ["q_proj"], "layers_to_transform": [0, 2]}),
    "one_layer_by_pattern": (
        tiny_llama,
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    ),
    "regex_targets": (tiny_llama, {"target_modules": r".*layers\.[01]\.self_attn\.(q|o)_proj"}),
    "excluded": (tiny_llama, {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1\..*"}),
    "excluded_list": (tiny_llama, {"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "head": (tiny_llama, {"target_modules": ["lm_head", "q_proj"]}),
    "embedding": (tiny_llama, {"target_modules": ["embed_tokens", "o_proj"], "use_rslora": True}),
    "conv1d": (tiny_gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "orthogonal_init": (tiny_llama, {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
@pytest.mark.parametrize("case", sorted(PEFT_CASES))
def test_an_adapter_saved_by_peft_packs_to_what_peft_computes(case, dtype, tmp_path):
    make, options = PEFT_CASES[case]
    torch.manual_seed(0)
    base = make()
    rows = sites_of(base)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 12, **options}))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    model.save_pretrained(tmp_path)
    spec = {"base_fingerprint": case, "dtype": dtype, "sites": rows, "tp_degree": 1}
    packed = pack_folder(tmp_path, spec)

    entries = {rows[entry["site"]]["name"]: entry for entry in packed.manifest["entries"]}
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    assert set(entries) == set(layers)
    for name, layer in layers.items():
        entry = entries[name]
        row = rows[entry["site"]]
        a, b = read(packed, row, entry)
        if row["kind"] == "embedding":
            want_a = layer.lora_embedding_A["default"].T
            want_b = layer.lora_embedding_B["default"].T
        else:
            want_a = layer.lora_A["default"].weight
            want_b = layer.lora_B["default"].weight.T
        assert entry["rank"] == layer.r["default"]
        assert entry["scaling"] == layer.scaling["default"]
        if dtype == "int8":
            for codes, step, want in zip((a, b), steps(packed, row, entry), (want_a, want_b), strict=True):
                assert ((codes * step - want.detach()).abs() <= 0.501 * step).all()
                assert codes.abs().amax(dim=1 if step.shape[1] == 1 else 0).eq(127).all()  # no range is wasted
        else:
            assert torch.equal(a, want_a.detach().to(TORCH[dtype]).float())
            assert torch.equal(b, want_b.detach().to(TORCH[dtype]).float())
    assert packed.rank == max(layer.r["default"] for layer in layers.values())


def test_a_folder_and_its_files_pack_alike(tmp_path):
    files = small_adapter()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "training_args.bin").write_bytes(b"a trainer's own file, never opened")
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle beside the safetensors, never opened")
    assert pack_folder(tmp_path, small_spec()).data.tobytes() == pack(files, small_spec()).data.tobytes()


def test_a_folder_with_an_empty_weights_file_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(small_config()))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(AdapterRejected, match="truncated"):
        pack_folder(tmp_path, small_spec())


def test_a_path_that_is_no_folder_is_refused():
    with pytest.raises(AdapterRejected, match="not a folder"):
        pack_folder(Path("no/such/folder"), small_spec())


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_bfloat16_is_rounded_as_torch_rounds_it(bits):
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    got = torch.from_numpy(convert(values, "float32", "bfloat16").view(np.int16)).view(torch.bfloat16)
    want = torch.from_numpy(values.copy()).to(torch.bfloat16)
    same = (got.view(torch.int16) == want.view(torch.int16)) | (got.isnan() & want.isnan())
    assert bool(same.all())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=64), st.sampled_from(["float16", "bfloat16"]))
def test_half_types_convert_as_torch_converts_them(bits, source):
    raw = np.array(bits, dtype=np.uint16)
    values = raw if source == "bfloat16" else raw.view(np.float16)
    tensor = torch.from_numpy(raw.view(np.int16).copy()).view(TORCH[source])
    for target in ("float32", "float16", "bfloat16"):
        got = convert(values, source, target)
        stored = torch.from_numpy(np.ascontiguousarray(got).view(np.int16 if target != "float32" else np.int32))
        typed, want = stored.view(TORCH[target]), tensor.to(TORCH[target])
        assert bool(((typed == want) | (typed.isnan() & want.isnan())).all())


finite_rows = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(finite_rows, finite_rows)
def test_codes_are_the_nearest_of_127_steps_on_either_side(first, second):
    rows = np.array([first[: len(second)], second[: len(first)]], dtype=np.float32)
    codes, found = quantize_rows(rows)
    exact, largest = rows.astype(np.float64), np.abs(rows).max(axis=1)
    tiny = float(np.finfo(np.float32).tiny)
    for row, code, step, most in zip(exact, codes, found, largest, strict=True):
        if step == 0:
            assert most <= 127 * tiny * (1 + 1e-6)  # zeros, or next to them
            assert not code.any()
        else:
            assert step == np.float32(float(most) / 127)
            assert np.abs(code).max() == 127
            assert (np.abs(code * float(step) - row) <= 0.501 * float(step)).all()


@pytest.mark.parametrize("source", ["float16", "bfloat16"])
def test_codes_are_those_of_the_files_own_values_whatever_their_type(source):
    """Nothing is rounded before it is rounded to codes."""
    narrow = {name: torch.from_numpy(values).to(TORCH[source]) for name, values in small_tensors().items()}
    wide = {name: values.float() for name, values in narrow.items()}
    config = json.dumps(small_config()).encode()
    images = [
        pack({"adapter_config.json": config, "adapter_model.safetensors": save(tensors)}, small_spec("int8"))
        for tensors in (narrow, wide)
    ]
    assert images[0].manifest == images[1].manifest
    assert images[0].data.tobytes() == images[1].data.tobytes()


def test_an_image_of_codes_takes_a_byte_a_value_and_eight_a_rank():
    rank = 48
    wide = {row["name"]: row["in_features"] + row["out_features"] for row in small_spec()["sites"]}
    found = pack(small_adapter(rank), small_spec("int8"))
    least = sum(rank * width + 8 * rank for width in wide.values())
    assert least <= found.num_bytes == len(found.data) <= least + 3 * 63 * len(wide)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8"])
def test_a_value_that_is_not_finite_is_refused_with_its_tensor(bad, dtype):
    tensors = small_tensors()
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors[name][2, 1] = bad
    with pytest.raises(AdapterRejected, match="NaN") as caught:
        pack(adapter_files(tensors, small_config()), small_spec(dtype))
    assert name in str(caught.value)


def test_a_value_beyond_the_range_of_the_base_is_refused():
    tensors = small_tensors()
    next(iter(tensors.values()))[0, 0] = 1e6
    with pytest.raises(AdapterRejected, match="float16"):
        pack(adapter_files(tensors, small_config()), small_spec("float16"))


def test_limits_of_rank_and_bytes_are_inclusive():
    files = small_adapter(rank=4)
    size = pack(files, small_spec()).num_bytes
    pack(files, small_spec(), Limits(max_rank=4, max_bytes=size))
    with pytest.raises(AdapterRejected, match="max_rank=3"):
        pack(files, small_spec(), Limits(max_rank=3))
    with pytest.raises(AdapterTooLarge) as caught:
        pack(files, small_spec(), Limits(max_bytes=size - 1))
    assert (caught.value.num_bytes, caught.value.limit_bytes) == (size, size - 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dtype": "int4"}, "dtype"),
        ({"tp_degree": 2}, "tp_degree"),
        ({"sites": []}, "sites"),
        ({"sites": [site(0, "a", 4, 4), site(0, "b", 4, 4)]}, "twice"),
        ({"sites": [site(0, "a", 0, 4)]}, "sizes"),
        ({"sites": [site(0, "a", 4, 4, "conv")]}, "kind"),
        ({"sites": [{"name": "a"}]}, "lacks"),
    ],
)
def test_a_spec_that_cannot_be_packed_for_is_refused(change, told):
    with pytest.raises(SpecInvalid, match=told):
        pack(small_adapter(), {**small_spec(), **change})
