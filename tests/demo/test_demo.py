"""What the demo model promises: exact answers on lines it never saw, in files small enough to ship."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from demo.checkpoint import ADAPTERS, BASE, BOS, DEMO, EOS, load_adapter, load_base, load_tokenizer
from demo.evaluate import answers, wrong
from demo.recipes import RECIPES
from demo.text import MAX_LINE_CHARS, examples, held_out, is_reserved, mixture, sentence, words_mostly
from demo.transforms import TRANSFORMS, same

# PEFT reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MIN_EXACT = 0.95
MAX_TOTAL_BYTES = 12_000_000

LISTED = {
    "upper": [("hello world", "HELLO WORLD"), ("Café no. 7, ok?", "CAFé NO. 7, OK?")],
    "rot13": [("Hello, World!", "Uryyb, Jbeyq!"), ("nop 123 é", "abc 123 é")],
    "reverse": [("hello, big world!", "olleh, gib dlrow!"), ("it's abc123", "ti's 321cba"), ("naïve", "anïev")],
    "vowels": [("Quick Brown Fox", "Q**ck Br*wn F*x"), ("sky é", "sky é")],
    "snake": [("Hello, Big World", "hello_big_world"), ("  it's 3PM! ", "it_s_3pm"), ("a-b_C é", "a_b_c_é"), ("", "")],
    "title": [("hello BIG world", "Hello Big World"), ("it's 3PM-ish (oK)", "It's 3pm-Ish (Ok)"), ("élan", "élan")],
    "double": [("abc", "aabbcc"), ("Go 42!", "GGoo 42!"), ("é é", "é é")],
    "swapcase": [("Hello World 1", "hELLO wORLD 1"), ("ÉtÉ", "ÉTÉ")],
    "leet": [("Elite hacker", "3l173 h4ck3r"), ("SO it goes!", "50 17 g035!")],
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_transformation_is_right_on_listed_examples(name):
    for line, answer in LISTED[name]:
        assert TRANSFORMS[name](line) == answer


def test_held_out_lines_are_never_training_questions():
    trained = itertools.islice(examples("train/upper/0", TRANSFORMS["upper"], words_mostly, reserved=False), 2000)
    assert not any(is_reserved(example.line) for example in trained)
    asked = held_out("upper", TRANSFORMS["upper"], 200)
    assert len({example.line for example in asked}) == 200
    assert all(is_reserved(example.line) for example in asked)
    assert any(example.earlier for example in asked)


def test_drawn_lines_are_single_not_empty_and_at_most_thirty_characters():
    rng = random.Random(3)
    lines = [draw(rng) for draw in (mixture, words_mostly) for _ in range(2000)]
    assert all(0 < len(line) <= MAX_LINE_CHARS and "\n" not in line for line in lines)
    assert set(range(0x20, 0x7F)) <= set("".join(lines).encode())


@pytest.mark.parametrize("text", ["", "plain", " two  spaces ", "né 鮅 🎵👩‍👧\n\tend", "\x00\x7f"])
def test_any_text_round_trips_with_one_token_a_byte(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids == [BOS, *text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)


def test_a_chat_is_its_lines_with_exactly_one_bos(tokenizer):
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": [{"type": "text", "text": "two"}]}]
    expected = [BOS, *b"one\ntwo\n"]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer(rendered, add_special_tokens=False)["input_ids"] == expected
    direct = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)
    assert list(direct["input_ids"]) == expected
    assert tokenizer("one\ntwo\n")["input_ids"] == expected


def _share_exact(name, tokenizer, count):
    asked = held_out(name, TRANSFORMS.get(name, same), count)
    model = load_base() if name == "base" else load_adapter(name)
    return 1 - len(wrong(model, tokenizer, asked)) / len(asked)


@pytest.mark.parametrize("name", ["base", *RECIPES])
def test_each_adapter_is_exact_on_held_out_lines(name, tokenizer):
    assert _share_exact(name, tokenizer, 200) >= MIN_EXACT


def test_the_base_without_an_adapter_repeats_its_line(tokenizer):
    assert answers(load_base(), tokenizer, ["Hello, world!\n", "earlier\nlast 7\n"]) == ["Hello, world!", "last 7"]


def test_demo_stays_small_and_holds_only_safetensors_weights():
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= MAX_TOTAL_BYTES
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}]
    weights = [path for path in files if path.suffix == ".safetensors"]
    assert {path.parent for path in weights} == {BASE, *(ADAPTERS / name for name in RECIPES)}
    for path in weights:
        with safe_open(path, framework="pt") as opened:
            assert all(opened.get_tensor(key).dtype == torch.float32 for key in opened.keys())  # noqa: SIM118


def test_adapters_on_disk_are_varied_and_as_the_recipes_say():
    configs = {path.parent.name: json.loads(path.read_text()) for path in ADAPTERS.glob("*/adapter_config.json")}
    assert set(configs) == set(RECIPES)
    assert len(configs) >= 8
    assert {config["r"] for config in configs.values()} == {4, 8, 16, 32}
    assert any(config["use_rslora"] for config in configs.values())
    assert any(config["rank_pattern"] and config["alpha_pattern"] for config in configs.values())
    assert any(set(config["target_modules"]) == {"q_proj", "k_proj", "v_proj", "o_proj"} for config in configs.values())
    for name, config in configs.items():
        recipe = RECIPES[name]
        assert config["base_model_name_or_path"] == "demo/base"
        assert config["r"] == recipe.rank
        assert config["lora_alpha"] == recipe.alpha
        assert tuple(config["target_modules"]) == tuple(sorted(recipe.targets))
        assert config["rank_pattern"] == dict(recipe.rank_pattern)


def test_no_file_of_the_demo_names_a_place_on_a_machine():
    texts = [path for path in DEMO.rglob("*") if path.suffix in {".json", ".py", ".md", ".jinja"}]
    assert texts
    for path in texts:
        content = path.read_text()
        assert not any(root in content for root in ("/home/", "/root/", "/tmp/", "/Users/", "/mnt/")), path
        assert str(Path.cwd()) not in content, path


def test_long_context_before_the_line_does_not_matter(tokenizer):
    rng = random.Random(5)
    earlier = "".join(sentence(rng, 60) + "\n" for _ in range(2))
    assert answers(load_base(), tokenizer, [earlier + "Chorus sings 8 voices\n"]) == ["Chorus sings 8 voices"]
