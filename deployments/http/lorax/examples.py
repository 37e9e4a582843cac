"""Requests and answers of the demo, for /docs. A test asks the requests and compares the answers' fields."""

from __future__ import annotations

from typing import Any

REQUEST: dict[str, Any] = {
    "inputs": "One base, many voices\n",
    "parameters": {"adapter_id": "upper", "max_new_tokens": 64},
}
ANSWER: dict[str, Any] = {"generated_text": "ONE BASE, MANY VOICES", "details": None}
EVENTS = (
    'data:{"token":{"id":79,"text":"O","logprob":-0.01,"special":false,"skipped":false},'
    '"generated_text":null,"details":null}\n\n'
)
EMBED_REQUEST: dict[str, Any] = {"inputs": "One base", "parameters": {"adapter_id": "upper"}}
EMBED_ANSWER: dict[str, Any] = {"embeddings": [0.0123, -0.0456]}
CLASSIFY_REQUEST: dict[str, Any] = {"inputs": "One base"}
CLASSIFY_BATCH_REQUEST: dict[str, Any] = {"inputs": ["One base", "many voices"]}
