"""What PEFT would apply to a decoder is applied, and what has no effect is told: nobody is refused for habits."""

import os

import pytest
from safetensors.numpy import save

from adapter_store.errors import AdapterRejected, AdapterTooLarge
from adapter_store.image.inspect import Limits
from adapter_store.image.packing import pack, pack_folder
from adapter_store.records import check_name
from adapter_store.sources.base import SourceConfig
from adapter_store.sources.local import LocalSource
from adapter_store.sources.opening import open_source
from tests.support.fake_sources import adapter_files, site, small_adapter, small_config, small_spec, small_tensors
from tests.support.source_calls import all_names, run
from tests.support.store_world import in_loop

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def multimodal_spec():
    """`small_spec`, its decoder where models that also see have it, beside a tower and a projector."""
    plain = small_spec()
    sites = [row | {"name": row["name"].replace("model.", "model.language_model.", 1)} for row in plain["sites"]]
    sites.append(site(len(sites), "lm_head", 8, 16))
    return plain | {"sites": sites, "unused": ["model.vision_tower", "model.multi_modal_projector"]}


def notices(packed):
    return " | ".join(packed.manifest.get("notices", ()))


def renamed(old, new):
    return {name.replace(old, new, 1): value for name, value in small_tensors().items()}


@pytest.mark.parametrize(
    "more",
    [
        ["query_key_value"],
        ["k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        ["lm_head"],
        ["embed_tokens", "wte"],
        ["W_pack"],
        ["model.layers.7.self_attn.q_proj"],
        ["attn.q_proj"],
        ["Q_PROJ"],
        ["proj"],
        [".q_proj"],
        ["x" * 3000],
        [f"m{i}" for i in range(300)],
        ["*"],
        ["(?:a*)*b"],
    ],
)
def test_targets_that_the_base_lacks_are_passed_over_as_in_peft_and_told(more):
    packed = pack(small_adapter(target_modules=["q_proj", *more, "v_proj"]), small_spec())
    assert packed.data.tobytes() == pack(small_adapter(), small_spec()).data.tobytes()
    assert notices(packed).startswith(f"target_modules names {more[0][:20]!r}"[:-1])
    assert len(notices(packed)) < 600


NEUTRAL = {
    "modules_to_save": [[], None],
    "trainable_token_indices": [[], None, {}],
    "layer_replication": [None, []],
    "use_dora": [False, None],
    "use_qalora": [False],
    "lora_bias": [False],
    "ensure_weight_tying": [True, False],
    "megatron_config": [None, {}],
    "alora_invocation_tokens": [None],
    "target_parameters": [None, []],
    "use_bdlora": [None],
    "arrow_config": [None, {"top_k": None, "use_gks": False, "task_adapter_names": []}],
    "eva_config": [{"rho": 2.0, "tau": 0.99}],
    "corda_config": [{"corda_method": "ipm"}],
    "loftq_config": [{"loftq_bits": 4}],
    "lora_ga_config": [{"direction": "ArB2r"}],
    "runtime_config": [{"ephemeral_gpu_offload": True}],
    "lora_dropout": [0.5],
    "fan_in_fan_out": [True],
    "inference_mode": [False],
    "init_lora_weights": ["gaussian", "Orthogonal", None, False],
    "exclude_modules": [None, [], "", ["lm_head"], "(?!.*proj).*"],
    "layers_pattern": [None, [], ""],
    "layers_to_transform": [None, []],
    "rank_pattern": [None, {}, {"k_proj": 99}],
    "alpha_pattern": [None, {}],
    "use_rslora": [None],
    "qalora_group_size": [32],
    "bias": ["all", "lora_only", None],
    "task_type": ["SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", None],
    "auto_mapping": [{"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama"}],
    "merge_weights": [True],
    "enable_lora": [None],
    "unsloth_fixed": [True],
    "torch_dtype": ["bfloat16"],
    "use_next_years_method": [None, False, 0, "", [], {}, "none", {"a": None, "b": [False]}],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in NEUTRAL.items() for value in values])
def test_a_field_that_changes_nothing_for_a_decoder_refuses_nothing(field, value):
    packed = pack(small_adapter(**{field: value}), small_spec())
    assert packed.data.tobytes() == pack(small_adapter(), small_spec()).data.tobytes()
    assert [entry["scaling"] for entry in packed.manifest["entries"]] == [2.0] * 4


@pytest.mark.parametrize("name", ["default", "my_adapter", "0", "policy-1"])
def test_a_state_dict_as_peft_holds_it_is_read_with_the_adapter_s_name_left_out(name):
    tensors = {key.replace(".weight", f".{name}.weight"): value for key, value in small_tensors().items()}
    packed = pack(adapter_files(tensors, small_config()), small_spec())
    assert packed.data.tobytes() == pack(small_adapter(), small_spec()).data.tobytes()
    assert repr(name) in notices(packed)


def test_two_adapters_in_one_file_are_refused_by_their_names():
    tensors = {key.replace(".weight", ".one.weight"): value for key, value in small_tensors().items()}
    tensors |= {key.replace(".weight", ".two.weight"): value for key, value in small_tensors().items()}
    with pytest.raises(AdapterRejected, match=r"same one of the base|several adapters \('one', 'two'\)"):
        pack(adapter_files(tensors, small_config()), small_spec())


@pytest.mark.parametrize(
    "old",
    [
        "model.language_model.layers",
        "language_model.model.layers",
        "language_model.layers",
        "model.language_model.model.layers",
        "model.layers",
    ],
)
def test_names_of_any_version_of_transformers_are_read_as_the_base_calls_its_modules(old):
    tensors = renamed("model.layers", old)
    packed = pack(adapter_files(tensors, small_config()), multimodal_spec())
    assert packed.data.tobytes() == pack(small_adapter(), small_spec()).data.tobytes()
    assert ("read as" in notices(packed)) == (old != "model.language_model.layers")


@pytest.mark.parametrize(
    "pattern",
    [
        r"^language_model.*\.(q_proj|v_proj)$",
        r"language_model\.model\.layers\.\d+\.self_attn\.(q|v)_proj",
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|k_proj|v_proj).*?)|(?:\bmodel\.layers.*)",
        r"model\.language_model\..*(q|v)_proj",
        r".*\.(q|v)_proj",
    ],
)
def test_patterns_may_mean_modules_by_the_names_that_the_file_has(pattern):
    tensors = renamed("model.layers", "language_model.model.layers")
    packed = pack(adapter_files(tensors, small_config(target_modules=pattern)), multimodal_spec())
    assert packed.data.tobytes() == pack(small_adapter(), small_spec()).data.tobytes()


@pytest.mark.parametrize(
    "module",
    [
        "model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj",
        "vision_tower.vision_model.encoder.layers.0.self_attn.v_proj",
        "model.multi_modal_projector.linear_1",
        "multi_modal_projector.linear_2",
        "model.vision_tower.q_proj",
    ],
)
def test_tensors_of_what_text_does_not_pass_through_are_left_out_and_told(module):
    tensors = renamed("model.layers", "model.language_model.layers")
    rank_and_sizes = small_tensors()[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"]
    tensors |= {f"{PREFIX}{module}.lora_{part}.weight": rank_and_sizes for part in "AB"}
    packed = pack(adapter_files(tensors, small_config()), multimodal_spec())
    assert packed.data.tobytes() == pack(small_adapter(), small_spec()).data.tobytes()
    assert "2 tensors of 'model." in notices(packed)


def test_an_adapter_of_a_tower_alone_is_refused_by_that():
    value = small_tensors()[f"{PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight"]
    tensors = {f"{PREFIX}model.vision_tower.fc1.lora_{part}.weight": value for part in "AB"}
    with pytest.raises(AdapterRejected, match=r"belong to 'model.vision_tower'"):
        pack(adapter_files(tensors, small_config(target_modules=["fc1"])), multimodal_spec())


def test_what_no_module_of_the_base_is_stays_refused():
    for module in ("model.audio_tower.q_proj", "model.vision_towers.q_proj", "model.layers.9.self_attn.q_proj"):
        tensors = small_tensors() | {f"{PREFIX}{module}.lora_A.weight": next(iter(small_tensors().values()))}
        with pytest.raises(AdapterRejected, match="has no place"):
            pack(adapter_files(tensors, small_config()), multimodal_spec())


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1), ("float16", 2), ("bfloat16", 2), ("int8", 4)])
def test_the_limit_of_bytes_is_of_what_is_packed_and_its_setting_is_named(dtype, share):
    axes = [0, 1] * 4  # of the rank, in A and in B
    tensors = {name: value.repeat(64, axis) for (name, value), axis in zip(small_tensors().items(), axes, strict=True)}
    files = adapter_files(tensors, small_config(rank=128))
    num_bytes = pack(files, small_spec(dtype)).num_bytes
    assert num_bytes < len(files[WEIGHTS]) / share * 2
    limit = num_bytes - 1
    if 4 * limit < len(files[WEIGHTS]):
        return  # then the file itself is too large: the next test
    pack(files, small_spec(dtype), Limits(max_bytes=num_bytes))
    with pytest.raises(AdapterTooLarge, match=rf"its image in {dtype} has {num_bytes} bytes.*raise max_adapter_bytes"):
        pack(files, small_spec(dtype), Limits(max_bytes=limit))


def test_an_upload_beyond_four_times_the_limit_is_not_looked_at():
    files = small_adapter()
    with pytest.raises(AdapterTooLarge, match=r"adapter_model.safetensors has .* raise max_adapter_bytes \(100; "):
        pack(files, small_spec(), Limits(max_bytes=100))


def beside(name):
    """A good weights file with one tensor more."""
    return {WEIGHTS: save(small_tensors() | {PREFIX + name: small_tensors().popitem()[1]})}


TOLD = {
    "a pointer of Git LFS": (
        {WEIGHTS: b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4\n"},
        "git lfs pull",
    ),
    "a pickle": ({WEIGHTS: None, "adapter_model.bin": b"\x80"}, "safetensors.torch.save_file"),
    "no configuration": ({CONFIG: None}, "PEFT writes it beside"),
    "a model's configuration": ({CONFIG: b'{"model_type": "llama"}'}, "whole model"),
    "a bias": (beside("model.layers.0.self_attn.q_proj.bias"), "bias='none'"),
    "a magnitude of DoRA": (beside("model.layers.0.self_attn.q_proj.lora_magnitude_vector"), "use_dora=False"),
    "a copy of a module": (beside("score.modules_to_save.weight"), "full copies"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(TOLD))
def test_a_refusal_tells_what_to_do(case):
    change, told = TOLD[case]
    files = {name: content for name, content in {**small_adapter(), **change}.items() if content is not None}
    with pytest.raises(AdapterRejected) as caught:
        pack(files, small_spec())
    assert told in caught.value.reason
    assert "save_pretrained" not in caught.value.reason


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_that_is_no_adapter_is_told_with_the_one_to_give(tmp_path):
    run_folder = write(tmp_path / "run", {"trainer_state.json": b"{}"})
    for step in (500, 1000, 90):
        write(run_folder / f"checkpoint-{step}", small_adapter())
    model = write(tmp_path / "model", {"config.json": b"{}", "model.safetensors": b""})
    empty = write(tmp_path / "empty", {})
    for folder, told in ((run_folder, "checkpoint-1000"), (model, "whole model"), (empty, "save_pretrained")):
        with pytest.raises(AdapterRejected) as caught:
            pack_folder(folder, small_spec())
        assert told in caught.value.reason


ODD_NAMES = (
    "a b", "a=b", "a@main", "ä", ".hidden", "a..b", "-a", "_a", "a+b", "a:b", "a,b", "a%20b", "名", "A", "a.",
    "x" * 201, "~", "lost+found", ".DS_Store",
    "a'b", "good", "good-1", "Good.2", "1", "deep", "a\\b", "a\nb", "a#b", "a?b", "CON",
)  # fmt: skip


def test_every_name_that_a_folder_lists_can_be_asked_for(tmp_path):
    root = tmp_path / "adapters"
    for name in ODD_NAMES:
        write(root / name, small_adapter())
        write(root / "nested" / name / "x", small_adapter())
    write(tmp_path / "outside", small_adapter())
    write(root / "led-out", {})
    (root / "led-out" / CONFIG).symlink_to(tmp_path / "outside" / CONFIG)
    (root / "link").symlink_to(root / "good")
    write(root / "config-is-a-folder" / CONFIG, {})
    os.mkfifo(write(root / "a-pipe", {}) / CONFIG)
    source = LocalSource(root)

    async def ask_for_all():
        names = await all_names(source, 7)
        return {name: await source.stat(name) for name in names}

    (found,) = run(source, ask_for_all)
    assert {"good", "good-1", "Good.2", "1", "A", "CON", "link", "nested/good/x"} <= set(found)
    assert [name for name, listing in found.items() if listing is None or CONFIG not in listing.names] == []
    assert all(check_name(name) == name for name in found)


def test_a_folder_that_may_not_be_read_takes_no_other_from_the_listing(tmp_path, monkeypatch):
    for name in ("a", "locked/x", "z"):
        write(tmp_path / name, small_adapter())
    scandir = os.scandir

    def guarded(folder):
        if str(folder).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", guarded)
    source = LocalSource(tmp_path)
    assert run(source, lambda: all_names(source, 10))[0] == ["a", "z"]


def test_every_name_that_a_bucket_lists_can_be_asked_for():
    source = open_source(SourceConfig(uri="s3://bucket/team", region="r", access_key_id="k", secret_access_key="s"))
    keys = [f"team/{name}/{CONFIG}" for name in (*ODD_NAMES, "a//b", "", "/", "a/../b", "x/y/z")]
    names = [name for key in keys if (name := source._adapter_of(key)) is not None]
    assert {"good", "x/y/z", "A"} <= set(names)
    assert all(f"team/{check_name(name)}/{CONFIG}" in keys for name in names)
    run(source)


def test_every_name_that_a_hub_lists_can_be_asked_for():
    repos = ("a/b", "a", "a/b/c", "a/*", "a/b@v1", "a b/c", "../x", "a/[b]", "A/b.c", "")
    source = open_source(SourceConfig(uri="hub://hub.local", repos=repos))
    assert run(source, lambda: all_names(source, 2))[0] == ["A/b.c", "a/b"]


@pytest.mark.parametrize("root", ["models--team--upper/snapshots", "models--team--upper/snapshots/abc", "."])
def test_a_cache_of_huggingface_hub_is_a_folder_of_adapters(tmp_path, root):
    """Its files are links to blobs beside the snapshots."""
    repo = tmp_path / "models--team--upper"
    blobs = write(repo / "blobs", {f"{number}": content for number, content in enumerate(small_adapter().values())})
    snapshot = write(repo / "snapshots" / "abc" / "adapter", {})
    for number, name in enumerate(small_adapter()):
        (snapshot / name).symlink_to(os.path.relpath(blobs / f"{number}", snapshot))
    source = LocalSource(tmp_path / root)

    async def look():
        return {name: (await source.stat(name)).names for name in await all_names(source, 10)}

    (found,) = run(source, look)
    assert list(found.values()) == [(CONFIG, WEIGHTS)]


@in_loop()
async def test_notices_are_told_with_the_adapter(world):
    world.source.adapters["a"] = small_adapter(target_modules=["q_proj", "v_proj", "zzz"])
    lease = await world.acquire("a")
    record = await world.store.resolve("a")
    assert record.notices == tuple(lease.manifest["notices"])
    assert "'zzz'" in record.notices[0]
    assert (await world.store.list_adapters()).records[0].notices == record.notices
