"""Bodies and answers, as /openapi.json shows them."""

from __future__ import annotations

from typing import Any

TOKENIZE_REQUEST: dict[str, Any] = {"prompt": "One base"}
TOKENIZE_ANSWER: dict[str, Any] = {"count": 2, "max_model_len": 4096, "tokens": [79, 110], "token_strs": None}
DETOKENIZE_REQUEST: dict[str, Any] = {"tokens": [79, 110]}
DETOKENIZE_ANSWER: dict[str, Any] = {"prompt": "On"}
