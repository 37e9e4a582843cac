"""Requests and answers of the demo, for /docs. A test asks the requests and compares the answers' fields."""

from __future__ import annotations

from typing import Any

_USAGE = {
    "prompt_tokens": 23,
    "completion_tokens": 22,
    "total_tokens": 45,
    "prompt_tokens_details": {"cached_tokens": 0},
}

CHAT_REQUEST: dict[str, Any] = {
    "model": "upper",
    "messages": [{"role": "user", "content": "One base, many voices"}],
    "max_tokens": 64,
    "temperature": 0,
}
CHAT_ANSWER: dict[str, Any] = {
    "id": "chatcmpl-dcb72150387f4ed79775e8774280ec68",
    "object": "chat.completion",
    "created": 1795231722,
    "model": "upper",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": None,
            "message": {"role": "assistant", "content": "ONE BASE, MANY VOICES", "refusal": None},
            "stop_reason": None,
        }
    ],
    "usage": _USAGE,
}
CHAT_EVENTS = (
    'data: {"id":"chatcmpl-dcb7","object":"chat.completion.chunk","created":1795231722,"model":"upper","choices":'
    '[{"index":0,"delta":{"content":"ONE"},"logprobs":null,"finish_reason":null}]}\n\ndata: [DONE]\n\n'
)

COMPLETION_REQUEST: dict[str, Any] = {
    "model": "upper",
    "prompt": "One base, many voices\n",
    "max_tokens": 64,
    "temperature": 0,
}
COMPLETION_ANSWER: dict[str, Any] = {
    "id": "cmpl-3b3edaeacb024fd0bf4c9629ba49e237",
    "object": "text_completion",
    "created": 1795231722,
    "model": "upper",
    "choices": [
        {"index": 0, "finish_reason": "stop", "logprobs": None, "text": "ONE BASE, MANY VOICES", "stop_reason": None}
    ],
    "usage": _USAGE,
}
COMPLETION_EVENTS = (
    'data: {"id":"cmpl-3b3e","object":"text_completion","created":1795231722,"model":"upper","choices":'
    '[{"index":0,"text":"ONE","logprobs":null,"finish_reason":null}]}\n\ndata: [DONE]\n\n'
)
