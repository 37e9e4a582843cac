"""Requests and answers of the demo, for /docs. A test asks the requests and compares the answers' fields."""

from __future__ import annotations

from typing import Any

REQUEST: dict[str, Any] = {
    "model": "upper",
    "input": "One base, many voices",
    "max_output_tokens": 64,
    "temperature": 0,
    "store": False,
}
ANSWER: dict[str, Any] = {
    "id": "resp_dcb72150387f4ed79775e8774280ec68",
    "object": "response",
    "created_at": 1795231722,
    "status": "completed",
    "completed_at": 1795231722,
    "background": False,
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": 64,
    "metadata": {},
    "model": "upper",
    "output": [
        {
            "id": "msg_dcb72150387f4ed79775e8774280ec68_0",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "ONE BASE, MANY VOICES", "annotations": [], "logprobs": []}],
        }
    ],
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "reasoning": {"effort": None, "summary": None},
    "store": False,
    "temperature": 0.0,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "top_p": 1.0,
    "truncation": "disabled",
    "usage": {
        "input_tokens": 23,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 22,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 45,
    },
    "user": None,
}
EVENTS = (
    "event: response.created\n"
    'data: {"type":"response.created","sequence_number":0,"response":{"id":"resp_dcb7","status":"in_progress"}}\n\n'
    "event: response.output_text.delta\n"
    'data: {"type":"response.output_text.delta","sequence_number":4,"item_id":"msg_dcb7_0","output_index":0,'
    '"content_index":0,"delta":"O","logprobs":[]}\n\n'
    "event: response.completed\n"
    'data: {"type":"response.completed","sequence_number":9,"response":{"id":"resp_dcb7","status":"completed"}}\n\n'
)
