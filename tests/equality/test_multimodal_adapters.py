"""A base that also sees, served for text: its adapters answer as with PEFT, whatever they have for its tower."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.model.loader import load_model
from tests.support.tiny_model import make_tokenizer

# transformers warns of a name that PEFT 0.21 uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
PROMPT = tuple(range(40, 60))
TEXT = {
    "vocab_size": 260, "max_position_embeddings": 256, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
TARGETS: dict[str, Any] = {
    "names that the tower has too": ["q_proj", "v_proj"],
    "all linear layers": "all-linear",
    "a pattern of the decoder": r".*language_model.*\.(q_proj|o_proj|down_proj)",
    "names of other families beside": ["q_proj", "gate_proj", "query_key_value", "W_pack"],
}


def build() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**TEXT).to_dict(),
        vision_config=SiglipVisionConfig(**VISION).to_dict(),
        mm_tokens_per_image=4,
        image_token_index=259,
    )
    return Gemma3ForConditionalGeneration(config).float().eval()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma3")
    build().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(base: Path) -> LLM:
    return LLM(
        str(base), dtype="float32", num_threads=1, kv_cache_bytes=1 << 22, max_num_batched_tokens=128,
        adapter_bytes=1 << 22,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any], tuple[Path, tuple[int, ...]]]:
    """An adapter of these targets with random weights, and what PEFT answers with it; each made once."""
    made: dict[str, tuple[Path, tuple[int, ...]]] = {}

    def make(targets: Any) -> tuple[Path, tuple[int, ...]]:
        key = json.dumps(targets)
        if key not in made:
            model = get_peft_model(
                build(), LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets)
            )
            torch.manual_seed(1)
            ids = list(PROMPT)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.copy_(torch.randn_like(parameter) * 0.2)
                for _ in range(8):
                    ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            folder = tmp_path_factory.mktemp("adapter")
            model.save_pretrained(folder)
            made[key] = folder, tuple(ids[len(PROMPT) :])
        return made[key]

    return make


def answer(llm: LLM, name: str | None = None) -> tuple[int, ...]:
    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    return llm.generate(PROMPT, params, adapters=name)[0].token_ids


@pytest.mark.parametrize("case", sorted(TARGETS))
def test_an_adapter_of_a_multimodal_base_answers_as_with_peft(case, llm, trained):
    folder, expected = trained(TARGETS[case])
    llm.add_adapter(case, str(folder))
    assert answer(llm, case) == expected != answer(llm)


RENAMED: dict[str, Callable[[str], str]] = {
    "before transformers 4.52": lambda name: (
        name.replace("model.model.language_model.", "model.language_model.model.")
        .replace("model.model.vision_tower", "model.vision_tower")
        .replace("model.model.multi_modal", "model.multi_modal")
    ),
    "of the text model alone": lambda name: name.replace("model.model.language_model.", "model.model."),
    "as PEFT holds them": lambda name: name.replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("case", sorted(RENAMED))
def test_names_of_another_version_are_the_same_adapter(case, llm, trained, tmp_path):
    folder, expected = trained(TARGETS["names that the tower has too"])
    shutil.copy(folder / "adapter_config.json", tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {RENAMED[case](name): tensor for name, tensor in tensors.items()}
    assert set(changed) != set(tensors)
    save_file(changed, tmp_path / "adapter_model.safetensors")
    llm.add_adapter(case, str(tmp_path))
    assert answer(llm, case) == expected


def test_the_parts_that_text_does_not_use_are_known_and_no_part_of_the_decoder_is_one(base):
    model = load_model(EngineConfig(model=str(base), dtype="float32"))
    assert model.unused == ("model.vision_tower",)  # the projector has no layer that could carry LoRA
    assert model.image_spec().to_dict()["unused"] == model.unused


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral", "qwen3_moe", "gemma3"])
def test_a_model_of_text_has_no_part_that_text_does_not_use(arch, zoo):
    """So its images are keyed as ever."""
    model = load_model(EngineConfig(model=str(zoo.base(arch)), dtype="float32"))
    assert model.unused == ()
    assert "unused" not in model.image_spec().to_dict()
