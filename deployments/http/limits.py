"""How much one request may hold: one table for all bodies, parameters and headers, and how docs/limits.md tells it.

The wire models take their numbers from here, a test walks the rows and goes one beyond each, another compares the page.
Whatever costs more than its bytes has a limit that is looked at before the work: what is only counted in a body
(`json_shape`) before the body is parsed, a field before its items are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adapter_store.records import MAX_NAME_CHARS
from deployments.calls import MAX_MERGED
from engine.grammar.spec import MAX_CHOICES, MAX_GRAMMAR_BYTES
from engine.request import (
    MAX_ALLOWED_TOKEN_IDS,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)

# Of any body, counted before it is parsed.
MAX_DEPTH = 32
MAX_CONTAINERS = 16_384
MAX_STRINGS = 32_768
MAX_OTHER_VALUES = 32_768  # beside the token ids of prompts

MAX_MESSAGES = 2_048
MAX_PARTS = 256
MAX_LABEL_CHARS = 200  # name, user, safety_identifier, cache_salt
MAX_MODEL_CHARS = 400  # the base's id or an adapter's name
MAX_REQUEST_ID_CHARS = 128
MAX_HINT_CHARS = 400  # prompt_cache_key
MAX_BAD_WORDS = 128  # each in two forms
MAX_BAD_WORD_CHARS = 60
MAX_TOOLS = 256
MAX_TOOL_NAME_CHARS = 128
MAX_TOOL_CALLS = 256  # of one message
MAX_SOURCE_CHARS = 64
MAX_ROWS = 1_000
MAX_LOCATION_CHARS = 1_000
MAX_URL_CHARS = 4_000
MAX_FILES = 16  # of one adapter: `urls`, `sha256`
MAX_CURSOR_CHARS = 400
MAX_PAGE = 1_000
MAX_QUESTIONS = 400  # of a request for decisions, as OpenAI has it
MAX_VALUES = 255
MAX_LEVELS = 10
MAX_ANSWER_CHARS = 400
MAX_MODELS = 64
MAX_BRANCHES = 8_192

BODY, OPENAI, CHAT, COMPLETIONS = "every body", "chat and completions", "chat", "completions"
LORAX, ADAPTERS, QUERY = "LoRAX", "adapters", "query and path"
VECTORS, DECISIONS = "vectors, scores and rankings", "decisions"
TOKENS = "tokens"
MAX_TOKEN_IDS = 2**18  # of /detokenize


@dataclass(frozen=True, slots=True)
class Limit:
    """One row. `setting`: the one of `limits` in serve_config.yaml that changes it; its default is `most`."""

    where: str
    field: str
    what: str
    most: int
    setting: str | None = None


LIMITS: tuple[Limit, ...] = (
    Limit(BODY, "", "bytes", 4 * 2**20, "max_body_bytes"),
    Limit(BODY, "", "levels of lists and objects", MAX_DEPTH),
    Limit(BODY, "", "lists and objects", MAX_CONTAINERS),
    Limit(BODY, "", "strings, names of fields among them", MAX_STRINGS),
    Limit(BODY, "", f"values, beside `max_prompt_ids`: {MAX_OTHER_VALUES:,} more", 2**18, "max_prompt_ids"),
    Limit(CHAT, "messages", "messages", MAX_MESSAGES),
    Limit(CHAT, "messages", "bytes of text", 2**20, "max_prompt_bytes"),
    Limit(CHAT, "messages[].content", "parts", MAX_PARTS),
    Limit(CHAT, "messages[].name", "characters", MAX_LABEL_CHARS),
    Limit(CHAT, "messages[].tool_calls", "calls", MAX_TOOL_CALLS),
    Limit(CHAT, "messages[].tool_calls[].id", "characters", MAX_LABEL_CHARS),
    Limit(CHAT, "messages[].tool_call_id", "characters", MAX_LABEL_CHARS),
    Limit(CHAT, "tools", "tools", MAX_TOOLS),
    Limit(CHAT, "tools[].function.name", "characters", MAX_TOOL_NAME_CHARS),
    Limit(CHAT, "reasoning_effort", "characters", MAX_LABEL_CHARS),
    Limit(CHAT, "top_logprobs", "tokens", MAX_LOGPROBS),
    Limit(COMPLETIONS, "prompt", "prompts", 64, "max_prompts"),
    Limit(COMPLETIONS, "prompt", "bytes of text in one prompt", 2**20, "max_prompt_bytes"),
    Limit(COMPLETIONS, "prompt", "token ids in all prompts", 2**18, "max_prompt_ids"),
    Limit(COMPLETIONS, "logprobs", "tokens", MAX_LOGPROBS),
    Limit(OPENAI, "model", "characters", MAX_MODEL_CHARS),
    Limit(OPENAI, "n", "samples of a prompt", MAX_N),
    Limit(OPENAI, "n", "samples: prompts times n", 128, "max_samples"),
    Limit(OPENAI, "stop", "strings", MAX_STOP_STRINGS),
    Limit(OPENAI, "stop", "characters of one", MAX_STOP_CHARS),
    Limit(OPENAI, "stop_token_ids", "token ids", MAX_STOP_TOKEN_IDS),
    Limit(OPENAI, "prompt_logprobs", "tokens", MAX_LOGPROBS),
    Limit(OPENAI, "allowed_token_ids", "token ids", MAX_ALLOWED_TOKEN_IDS),
    Limit(OPENAI, "bad_words", "words", MAX_BAD_WORDS),
    Limit(OPENAI, "bad_words", "characters of one", MAX_BAD_WORD_CHARS),
    Limit(OPENAI, "logit_bias", "tokens", MAX_LOGIT_BIAS),
    Limit(OPENAI, "response_format", "bytes of a schema", MAX_GRAMMAR_BYTES),
    Limit(OPENAI, "structured_outputs", "bytes of a schema, grammar or expression", MAX_GRAMMAR_BYTES),
    Limit(OPENAI, "structured_outputs.choice", "texts", MAX_CHOICES),
    Limit(OPENAI, "user", "characters", MAX_LABEL_CHARS),
    Limit(OPENAI, "safety_identifier", "characters", MAX_LABEL_CHARS),
    Limit(OPENAI, "cache_salt", "characters", MAX_LABEL_CHARS),
    Limit(OPENAI, "prompt_cache_key", "characters", MAX_HINT_CHARS),
    Limit(OPENAI, "request_id", "characters", MAX_REQUEST_ID_CHARS),
    Limit(OPENAI, "rid", "characters", MAX_REQUEST_ID_CHARS),
    Limit(OPENAI, "adapter_source", "characters", MAX_SOURCE_CHARS),
    Limit(VECTORS, "input", "texts or lists of token ids", 2_048, "max_inputs"),
    Limit(VECTORS, "input", "bytes of one text", 2**20, "max_prompt_bytes"),
    Limit(VECTORS, "input", "token ids in all lists", 2**18, "max_prompt_ids"),
    Limit(VECTORS, "documents", "texts, the query among them", 2_048, "max_inputs"),
    Limit(VECTORS, "text_2", "texts, those of `text_1` among them", 2_048, "max_inputs"),
    Limit(VECTORS, "model", "characters", MAX_MODEL_CHARS),
    Limit(VECTORS, "user", "characters", MAX_LABEL_CHARS),
    Limit(VECTORS, "safety_identifier", "characters", MAX_LABEL_CHARS),
    Limit(VECTORS, "cache_salt", "characters", MAX_LABEL_CHARS),
    Limit(VECTORS, "prompt_cache_key", "characters", MAX_HINT_CHARS),
    Limit(VECTORS, "adapter_source", "characters", MAX_SOURCE_CHARS),
    Limit(DECISIONS, "model", "names", MAX_MODELS),
    Limit(DECISIONS, "model", "characters of a name", MAX_MODEL_CHARS),
    Limit(DECISIONS, "input", "bytes of text", 2**20, "max_prompt_bytes"),
    Limit(DECISIONS, "input", "messages, calls and outputs", MAX_MESSAGES),
    Limit(DECISIONS, "questions", "questions", MAX_QUESTIONS),
    Limit(DECISIONS, "questions", "prompts: models, questions, places where answers part", MAX_BRANCHES),
    Limit(DECISIONS, "choices", "values", MAX_VALUES),
    Limit(DECISIONS, "value", "characters", MAX_ANSWER_CHARS),
    Limit(DECISIONS, "levels", "levels", MAX_LEVELS),
    Limit(DECISIONS, "label", "characters", MAX_ANSWER_CHARS),
    Limit(DECISIONS, "name", "characters", MAX_LABEL_CHARS),
    Limit(DECISIONS, "instructions", "parts", MAX_PARTS),
    Limit(DECISIONS, "safety_identifier", "characters", MAX_LABEL_CHARS),
    Limit(DECISIONS, "cache_salt", "characters", MAX_LABEL_CHARS),
    Limit(DECISIONS, "prompt_cache_key", "characters", MAX_HINT_CHARS),
    Limit(DECISIONS, "adapter_source", "characters", MAX_SOURCE_CHARS),
    Limit(LORAX, "inputs", "bytes of text", 2**20, "max_prompt_bytes"),
    Limit(LORAX, "adapter_id", "characters", MAX_MODEL_CHARS),
    Limit(LORAX, "adapter_source", "characters", MAX_SOURCE_CHARS),
    Limit(LORAX, "merged_adapters.ids", "adapters merged for one request", MAX_MERGED),
    Limit(LORAX, "response_format", "bytes of a schema", MAX_GRAMMAR_BYTES),
    Limit(LORAX, "stop", "strings", MAX_STOP_STRINGS),
    Limit(LORAX, "stop", "characters of one", MAX_STOP_CHARS),
    Limit(LORAX, "best_of", "samples", MAX_N),
    Limit(LORAX, "return_k_alternatives", "tokens", MAX_LOGPROBS),
    Limit(TOKENS, "tokens", "token ids", MAX_TOKEN_IDS),
    Limit(ADAPTERS, "", "adapters registered at once", MAX_ROWS),
    Limit(ADAPTERS, "name", "characters", MAX_NAME_CHARS),
    Limit(ADAPTERS, "source", "characters", MAX_SOURCE_CHARS),
    Limit(ADAPTERS, "location", "characters", MAX_LOCATION_CHARS),
    Limit(ADAPTERS, "urls", "files", MAX_FILES),
    Limit(ADAPTERS, "urls", "characters of an address", MAX_URL_CHARS),
    Limit(ADAPTERS, "urls", "characters of a file's name", MAX_NAME_CHARS),
    Limit(ADAPTERS, "sha256", "files", MAX_FILES),
    Limit(ADAPTERS, "sha256", "characters of a file's name", MAX_NAME_CHARS),
    Limit(QUERY, "after", "characters", MAX_CURSOR_CHARS),
    Limit(QUERY, "limit", "models or adapters on a page", MAX_PAGE),
    Limit(QUERY, "name", "characters of a name in the path", MAX_NAME_CHARS),
)


def page(limits: Iterable[Limit] = LIMITS) -> str:
    """docs/limits.md."""
    rows = "\n".join(
        f"| {limit.where} | {f'`{limit.field}`' if limit.field else ''} | {limit.what} | {limit.most:,} | "
        f"{f'`{limit.setting}`' if limit.setting else ''} |"
        for limit in limits
    )
    return f"{_HEAD}\n| In | Field | What | At most | Setting |\n|---|---|---|---|---|\n{rows}\n"


_HEAD = """# Limits of one request

`deployments/http/limits.py` holds this table and writes this page. What is beyond a limit is refused by name, with the
value and the limit, before the work that the limit is there to bound: the size of a body while it is read, its shape
before it is parsed, a field before its items are looked at. Bodies of more than a few kilobytes are read beside the
event loop, so that none of them holds up other people's streams; `benchmarks/bodies.py` measures it. A name that an
object has twice, a number too large for JSON's readers, `NaN` and half a surrogate pair are refused too. The length of
the request line and of all headers together is bounded by Serve's HTTP server.

Where a row names a setting, `limits` in `serve_config.yaml` changes the number, and the one here is its default.
"""
