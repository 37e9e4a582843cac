"""The tokenizer loads from a folder, encodes from many threads and refuses what it cannot do, by name."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.errors import ConfigError, InvalidRequest
from engine.text.tokenizer import LONG_CHARS, Tokenizer
from tests.support.tiny_model import make_tokenizer
from tests.support.waiting import ended, happened
from tests.text.tokenizers_for_tests import byte_fallback, byte_level, metaspace, word_piece

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + m.role) }}{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}{% if shout is defined %}!{% endif %}"
)


@pytest.fixture
def with_template() -> Tokenizer:
    hf_tokenizer = make_tokenizer()
    hf_tokenizer.chat_template = TEMPLATE
    return Tokenizer(hf_tokenizer)


def test_a_saved_tokenizer_is_loaded_from_its_folder(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("hé") == [104, 195, 169]
    assert tokenizer.decode([104, 195, 169, 258]) == "hé"
    assert tokenizer.eos_token_id == 258


def test_a_missing_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such-folder"):
        Tokenizer.load(tmp_path / "no-such-folder")


def test_a_folder_without_a_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=tmp_path.name):
        Tokenizer.load(tmp_path)


def test_special_tokens_are_added_only_when_asked_for() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = metaspace()
    bos = tokenizer.backend.token_to_id("<s>")
    tokenizer.backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    assert tokenizer.encode("fox")[0] == bos
    assert tokenizer.encode("fox")[1:] == tokenizer.encode("fox", add_special_tokens=False)


def test_many_threads_encode_at_once_and_get_what_one_thread_gets() -> None:
    tokenizer = byte_level()
    prompts = [f"prompt {i} with 你好 {'x' * i}" for i in range(60)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, prompts)) == [tokenizer.encode(prompt) for prompt in prompts]


def test_messages_become_the_ids_of_the_rendered_template(with_template: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hi"}]
    assert with_template.decode(with_template.apply_chat_template(messages)) == "user: hi\nassistant:"
    assert with_template.render_chat(messages, add_generation_prompt=False, shout=True) == "user: hi\n!"


def test_roles_the_template_refuses_are_named(with_template: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match=r"messages: .*\['wizard'\].*unknown role wizard"):
        with_template.apply_chat_template([{"role": "wizard", "content": "hi"}])


@pytest.mark.parametrize("messages", [[], [{"content": "no role"}], [{"role": 3, "content": "a number"}]])
def test_messages_the_template_fails_on_are_an_invalid_request(with_template: Tokenizer, messages: list[dict]) -> None:
    with pytest.raises(InvalidRequest, match="messages: "):
        with_template.apply_chat_template(messages)


def test_a_model_without_a_template_says_how_to_get_one() -> None:
    with pytest.raises(InvalidRequest, match=r"chat_template\.jinja"):
        byte_level().apply_chat_template([{"role": "user", "content": "hi"}])


def test_importing_the_tokenizer_module_does_not_import_torch() -> None:
    code = "import sys, engine.text.tokenizer, engine.text.stop, engine.output; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("make", [byte_level, metaspace, byte_fallback, word_piece])
@pytest.mark.parametrize(
    "text", ["The quick brown fox. ", "héllo wörld, 你好 🙂 ", "a b  c   d\n\te", "</s><plain added>", "x"]
)
def test_a_long_text_has_the_ids_that_one_call_gives(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = make()
    long = text * (LONG_CHARS // len(text) + 2)
    for special in (True, False):
        assert tokenizer.encode(long, special) == tokenizer.backend.encode(long, add_special_tokens=special).ids


def test_a_long_text_that_is_no_unicode_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="prompt: it is not text"):
        byte_level().encode("x" * LONG_CHARS + "\ud800")


def test_other_threads_run_while_a_long_text_is_encoded() -> None:
    """Counted, not timed: a thread that counts gets through many rounds while the call goes on."""
    tokenizer = byte_level()
    rounds, done = 0, threading.Event()

    def encode() -> None:
        tokenizer.encode("hello world " * 20_000)
        done.set()

    thread = threading.Thread(target=encode)
    began = threading.Event()

    def count() -> None:
        nonlocal rounds
        began.set()
        for _ in range(1000):
            rounds += 1
            if done.wait(0.0001):
                break

    counter = threading.Thread(target=count)
    counter.start()
    happened(began, "the start of the counting thread")
    thread.start()
    for worker in (thread, counter):
        ended(worker, "the end of encoding, and of counting")
    assert rounds > 20
