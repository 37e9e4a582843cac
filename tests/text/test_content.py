"""A content that is a list of text parts gives the prompt of its text as a string, whatever the chat template does.

The oracle is transformers' own rendering of that template, with the content in the form that the template reads.
"""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import InvalidRequest
from engine.text.content import takes_apart
from engine.text.tokenizer import Tokenizer
from tests.text.tokenizers_for_tests import byte_level

LOOP = "{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"

# Templates of the shapes that instruct checkpoints carry, written anew.
OF_STRINGS = {
    "llama 2": "{% if messages[0].role == 'system' %}{% set system = '<<' + messages[0]['content'] + '>>' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if loop.first %}{{ system }}{% endif %}[{{ m.role }}] {{ m['content'].strip() }}\n"
    "{% endfor %}",
    "deepseek": "{% set ns = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.system = m['content'] %}{% endif %}{% endfor %}{{ ns.system }}{% for m in messages %}"
    "{% if m['role'] != 'system' %}|{{ m['role'] }}|{{ m['content'] }}{% endif %}{% endfor %}",
    "thinking": "{% for m in messages %}{% set c = m.content %}{% if '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}{{ m.role }}:{{ c }}\n{% endfor %}",
    "lines": "{% for m in messages %}{% for line in m.content.split('\\n') %}{{ line }};{% endfor %}{% endfor %}",
    "json": "{% for m in messages %}{{ m.role }}={{ m.content | tojson }}\n{% endfor %}",
    "length": "{% for m in messages %}{{ m.role }}({{ m.content | length }}){{ m.content }}{% endfor %}",
    "concatenation": "{% for m in messages %}{{ m.role ~ ': ' ~ m.get('content') ~ '\n' }}{% endfor %}",
    "refuses systems": "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.role + m.content }}{% endfor %}",
}
OF_BOTH = {
    "llama 3.2 vision": "{% for message in messages %}<{{ message.role }}>{% if message.content is string %}"
    "{{ message.content }}{% else %}" + LOOP + "{% endif %}{% endfor %}",
    "gemma 3": "{% if messages[0]['role'] == 'system' %}{% if messages[0]['content'] is string %}"
    "{% set first = messages[0]['content'] + '\n' %}{% else %}"
    "{% set first = messages[0]['content'][0]['text'] + '\n' %}{% endif %}{% set rest = messages[1:] %}{% else %}"
    "{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}[{{ message.role }}]{{ first if loop.first else '' }}"
    "{% if message.content is string %}{{ message.content | trim }}{% elif message.content is iterable %}"
    + LOOP
    + "{% endif %}\n{% endfor %}",
    "macro": "{% macro shown(content) %}{% if content is string %}{{ content }}{% else %}{% for item in content %}"
    "{{ item.text }}|{% endfor %}{% endif %}{% endmacro %}{% for m in messages %}{{ m.role }}: {{ shown(m.content) }}\n"
    "{% endfor %}",
    "strings inside": "{% for message in messages %}{{ message.role }}:{% if message.content is not string %}"
    + LOOP
    + "{% else %}{{ message['content'] }}{% endif %}\n{% endfor %}",
}
OF_PARTS = {
    "smolvlm": "{% for message in messages %}{{ message.role }}:" + LOOP + "\n{% endfor %}",
    "llava": "{% for m in messages %}{{ m.role }}:{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}"
    "<image>{% endfor %}{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] }}{% endfor %}"
    "\n{% endfor %}",
    "generation": "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endgeneration %}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}\n{% endfor %}",
    "map": "{% for m in messages %}{{ m.role }}: {{ m.content | map(attribute='text') | join('') }}\n{% endfor %}",
    "alias": "{% for m in messages %}{% set c = m['content'] %}{% set d = c[0:] %}{{ m.role }}:"
    "{% for p in d %}{{ p['text'] }}{% endfor %}\n{% endfor %}",
    "macro over parts": "{% macro all(parts) %}{% for p in parts %}{{ p.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ m.role }}: {{ all(parts=m.content) }}\n{% endfor %}",
    "namespace": "{% set ns = namespace(c=none) %}{% for m in messages %}{% set ns.c = m.content %}{{ m.role }}:"
    "{% for p in ns.c %}{{ p.text }}{% endfor %}\n{% endfor %}",
}  # fmt: skip
MIXED = (
    "{% for message in messages %}{% if message.role == 'user' %}U:" + LOOP + "{% else %}"
    "{{ message.role }}:{{ message.content + '.' }}{% endif %}\n{% endfor %}"
)
ALL = {**OF_STRINGS, **OF_BOTH, **OF_PARTS, "mixed": MIXED}
CONVERSATIONS = {
    "system": [("system", "Be brief."), ("user", " Hi there "), ("assistant", "Hello"), ("user", "2 + 2?")],
    "user": [("user", "Hi\nthere"), ("assistant", "{{ x }} héllo"), ("user", "bye")],
}


def _with(template: str) -> Tokenizer:
    tokenizer = byte_level()
    tokenizer._hf.chat_template = template
    return tokenizer


def _oracle(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> str:
    return tokenizer._hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", ALL)
def test_parts_and_strings_give_the_prompt_of_the_form_that_the_template_reads(name: str, conversation: str) -> None:
    if (name, conversation) == ("refuses systems", "system"):
        return
    tokenizer = _with(ALL[name])
    said = CONVERSATIONS[conversation]

    def content(role: str, text: str) -> Any:
        in_parts = name in OF_PARTS or (name == "mixed" and role == "user")
        return [{"type": "text", "text": text}] if in_parts else text

    right = _oracle(tokenizer, [{"role": role, "content": content(role, text)} for role, text in said])
    for word in ("there", "bye" if conversation == "user" else "Be brief."):
        assert word in right
    as_strings = [{"role": role, "content": text} for role, text in said]
    as_parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said]
    cut = [
        {"role": role, "content": [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}]}
        for role, text in said
    ]
    assert tokenizer.render_chat(as_strings) == right
    assert tokenizer.render_chat(as_parts) == right
    assert tokenizer.render_chat(cut) == right


@pytest.mark.parametrize("name", ALL)
def test_a_template_that_goes_through_parts_is_known_by_its_program(name: str) -> None:
    assert takes_apart(ALL[name]) == (name not in OF_STRINGS)


def test_a_developer_is_written_as_a_system_is() -> None:
    tokenizer = _with(MIXED)
    messages = [{"role": "developer", "content": [{"type": "text", "text": "x"}]}, {"role": "user", "content": "y"}]
    assert tokenizer.render_chat(messages) == "developer:x.U:y"  # line breaks after blocks are dropped


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "data:"}},
        {"type": "input_audio", "input_audio": {}},
        {"type": "file", "file": {}},
        {"type": "video_url"},
        {"type": "text"},
        {"type": "text", "text": None},
        {"type": ["text"]},
        {"text": "x"},
        None,
        7,
    ],
)
@pytest.mark.parametrize("template", [OF_STRINGS["json"], OF_PARTS["smolvlm"]])
def test_a_part_that_is_no_text_is_refused_and_named(part: Any, template: str) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "see"}, part]}]
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.content\[1\]") as caught:
        _with(template).render_chat(messages)
    assert caught.value.param == "messages"
