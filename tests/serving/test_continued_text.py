"""Log-probabilities and LoRAX tokens name the texts of tokens as they read behind the prompt."""

from __future__ import annotations

import pytest

from deployments.http.lorax.replies import TokenWriter
from deployments.http.openai.logprobs import LogprobWriter
from deployments.router.prompts import Prompts
from deployments.settings.app import LimitSettings
from engine.request import TokenLogprobs
from tests.text.tokenizers_for_tests import byte_fallback


@pytest.mark.parametrize(
    ("prompt", "first"),
    [(["▁he", "llo"], " wor"), (["<s>"], "wor"), (["▁a", "</s>"], " wor"), (["<0x0A>"], " wor"), (["▁"], " wor")],
)
def test_tokens_have_the_texts_that_make_up_the_text(prompt: list[str], first: str) -> None:
    tokenizer = byte_fallback()
    prompts = Prompts(tokenizer, tokenizer.vocab_size, LimitSettings())
    ids = [tokenizer.backend.token_to_id(token) for token in prompt]
    output = [tokenizer.backend.token_to_id(token) for token in ("▁wor", "ld", "</s>", "▁a")]
    items = [TokenLogprobs(token_id, -1.0, ((token_id, -1.0),)) for token_id in output]
    bodies = TokenWriter(prompts, ids, alternatives=True).tokens(items)
    texts = [first, "ld", "</s>", " a"]
    assert [body["text"] for body in bodies] == texts
    assert [body["alternative_tokens"][0]["text"] for body in bodies] == texts
    assert LogprobWriter(prompts, ids).completion(items)["tokens"] == texts
    assert [entry["token"] for entry in LogprobWriter(prompts, ids).chat(items)["content"]] == texts
