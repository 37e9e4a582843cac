"""The files of the demo model: its tokenizer and config as made by `demo.train`, and how to load base and adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

DEMO = Path(__file__).parent
BASE = DEMO / "base"
ADAPTERS = DEMO / "adapters"

BOS, EOS, PAD, UNK = 256, 257, 258, 259
"""Ids after the 256 bytes; the id of a byte is its value. `<unk>` never occurs: it makes the count a multiple of 4."""

_SPECIAL = {"<s>": BOS, "</s>": EOS, "<pad>": PAD, "<unk>": UNK}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
)
"""Each message is its content and a newline, whatever its role; a generation prompt adds nothing. Writes the `<s>`."""


def _byte_symbols() -> list[str]:
    """The character that ByteLevel writes for each byte 0..255 (GPT-2's table)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = {byte: 0x100 + index for index, byte in enumerate(b for b in range(256) if b not in set(kept))}
    return [chr(moved.get(byte, byte)) for byte in range(256)]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: any UTF-8 text round-trips, one token a byte, `<s>` put in front."""
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())} | _SPECIAL
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_config() -> LlamaConfig:
    """0.82 M parameters: 4 layers of 128, 4 query heads over 2 KV heads, embeddings tied."""
    return LlamaConfig(
        vocab_size=256 + len(_SPECIAL),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def load_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer in `demo/base`."""
    return AutoTokenizer.from_pretrained(BASE)


def load_base() -> PreTrainedModel:
    """The base in float32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def load_adapter(name: str) -> PeftModel:
    """A fresh base under the adapter `name`, in evaluation mode."""
    return PeftModel.from_pretrained(load_base(), str(ADAPTERS / name)).eval()


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads(path.read_text())
    edit(config)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_base(model: PreTrainedModel, folder: Path = BASE) -> None:
    """Writes weights, configs and tokenizer to `folder`."""
    model.generation_config.update(max_new_tokens=128, do_sample=False)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    _edit_json(folder / "generation_config.json", lambda config: config.pop("_from_model_config", None))
    _edit_json(folder / "tokenizer_config.json", lambda it: it.update(tokenizer_class="PreTrainedTokenizerFast"))


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes PEFT's two files to `folder`; lists in the config are sorted and no path of this machine is left in it."""
    model.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)
    _edit_json(
        folder / "adapter_config.json",
        lambda config: config.update(
            base_model_name_or_path="demo/base", target_modules=sorted(config["target_modules"])
        ),
    )
