"""Sites: their names are PEFT's, their order is frozen, and swapping them in changes nothing by itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from engine.config import EngineConfig
from engine.core.plan import LoraSegment
from engine.lora.batch import LoraBatch
from engine.lora.linear import LoraEmbedding, LoraLinear
from engine.model.loader import LoadedModel, load_model
from engine.model.surgery import install_lora
from tests.support.tiny_model import ARCHITECTURES, make_adapter, make_base


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def load(bases: Path, arch: str) -> LoadedModel:
    return load_model(EngineConfig(model=str(make_base(arch, bases / arch))))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sites_are_exactly_what_peft_adapts(arch: str, bases: Path) -> None:
    """PEFT's `all-linear` leaves out the output layer, which is a site too, as is the input embedding.

    For mixtures of experts, where PEFT also adapts bare parameters, what it can adapt of the attention.
    """
    loaded = load(bases, arch)
    adapter = make_adapter(bases / arch, bases / f"{arch}-adapter", seed=1)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as weights:
        shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
    prefix = "base_model.model."
    adapted = {key.removeprefix(prefix).rsplit(".lora_", 1)[0] for key in shapes}
    by_name = {site.name: site for site in loaded.sites}
    outside = {site.name for site in loaded.sites if site.layer is None}
    experts = arch in ("mixtral", "qwen3_moe", "gpt_oss")
    assert adapted == {name for name in by_name if name not in outside and not (experts and ".mlp." in name)}
    assert {by_name[name].kind for name in outside} == {"embedding", "linear"}
    for name in adapted:
        assert shapes[f"{prefix}{name}.lora_A.weight"][1] == by_name[name].in_features
        assert shapes[f"{prefix}{name}.lora_B.weight"][0] == by_name[name].out_features


def test_sites_that_read_one_input_form_a_fusion_group(bases: Path) -> None:
    groups: dict[str | None, list[str]] = {}
    for site in load(bases, "qwen2").sites:
        groups.setdefault(site.fusion_group, []).append(site.name)
    assert groups["model.layers.1.self_attn.q_proj+k_proj+v_proj"] == [
        f"model.layers.1.self_attn.{x}_proj" for x in "qkv"
    ]
    assert groups["model.layers.2.mlp.gate_proj+up_proj"] == [f"model.layers.2.mlp.{x}_proj" for x in ("gate", "up")]
    assert {name.rpartition(".")[2] for name in groups[None]} == {"embed_tokens", "o_proj", "down_proj", "lm_head"}


def test_sites_know_their_layer_and_their_shard_axis(bases: Path) -> None:
    sites = {site.name: site for site in load(bases, "llama").sites}
    assert [site.index for site in sites.values()] == list(range(len(sites)))
    assert sites["model.layers.2.mlp.down_proj"].layer == 2
    assert sites["lm_head"].layer is None
    assert {sites[f"model.layers.0.self_attn.{x}_proj"].shard_axis for x in "qkv"} == {"out"}
    assert sites["model.layers.0.self_attn.o_proj"].shard_axis == "in"
    assert {site.shard_axis for site in load(bases, "phi3").sites if "qkv" in site.name} == {None}


def test_experts_and_routers_are_no_sites(bases: Path) -> None:
    for arch in ("mixtral", "qwen3_moe", "gpt_oss"):
        assert not [s.name for s in load(bases, arch).sites if "expert" in s.name or "router" in s.name]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3"])
def test_installing_lora_layers_changes_no_number_and_no_attribute(arch: str, bases: Path) -> None:
    loaded = load(bases, arch)
    loaded.model.config._attn_implementation = "eager"
    ids = torch.arange(5)[None]
    before = loaded.model(input_ids=ids).logits
    weight = loaded.model.get_input_embeddings().weight
    install_lora(loaded.model, loaded.sites, LoraBatch())
    assert torch.equal(loaded.model(input_ids=ids).logits, before)
    assert loaded.model.get_input_embeddings().weight is weight
    swapped = [m for m in loaded.model.modules() if isinstance(m, LoraLinear | LoraEmbedding)]
    assert [m.site for m in swapped] == list(loaded.sites)


def test_only_the_output_layer_goes_by_the_sampled_rows(bases: Path) -> None:
    loaded = load(bases, "qwen2")
    install_lora(loaded.model, loaded.sites, LoraBatch())
    assert [m.site.name for m in loaded.model.modules() if isinstance(m, LoraLinear) and m.sampled] == ["lm_head"]


def test_a_segment_of_a_slot_without_adapter_is_an_error() -> None:
    with pytest.raises(ValueError, match="not bound"):
        LoraBatch().set((LoraSegment(0, 1, 3),))


def test_the_fingerprint_is_that_of_the_content_not_of_the_place(bases: Path, tmp_path: Path) -> None:
    base = make_base("llama", bases / "llama")
    fingerprint = load(bases, "llama").fingerprint
    copy = Path(shutil.copytree(base, tmp_path / "elsewhere"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "0", "_name_or_path": "x"}))
    assert load_model(EngineConfig(model=str(copy))).fingerprint == fingerprint
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert load_model(EngineConfig(model=str(copy))).fingerprint != fingerprint
    other = make_base("llama", tmp_path / "other weights", seed=5)
    assert load_model(EngineConfig(model=str(other))).fingerprint != fingerprint


def test_all_files_together_say_what_ends_a_text(bases: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(make_base("llama", bases / "llama"), tmp_path / "base"))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 9]}))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    assert load_model(EngineConfig(model=str(base))).eos_token_ids == (3, 7, 9, 258)  # 258: the tokenizer's <eos>


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_has_the_dtype_that_was_asked_for(dtype: str, bases: Path) -> None:
    base = make_base("qwen2", bases / "qwen2")
    loaded = load_model(EngineConfig(model=str(base), dtype=dtype, device="cpu"))
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)} == {loaded.dtype}
    assert loaded.image_spec().dtype == dtype
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight  # tied stays tied
