"""Requests and answers of the demo, for /docs. A test asks the requests and compares the answers' fields."""

from __future__ import annotations

from typing import Any

COUNT_REQUEST: dict[str, Any] = {
    "model": "upper",
    "messages": [{"role": "user", "content": "One base, many voices"}],
}
COUNT_ANSWER: dict[str, Any] = {"input_tokens": 23}
REQUEST: dict[str, Any] = {**COUNT_REQUEST, "max_tokens": 64, "temperature": 0}
ANSWER: dict[str, Any] = {
    "id": "msg_dcb72150387f4ed79775e8774280ec68",
    "type": "message",
    "role": "assistant",
    "model": "upper",
    "content": [{"type": "text", "text": "ONE BASE, MANY VOICES"}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {
        "input_tokens": 23,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 22,
    },
}
EVENTS = (
    "event: message_start\n"
    'data: {"type":"message_start","message":{"id":"msg_dcb7","type":"message","role":"assistant","model":"upper",'
    '"content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":23,"output_tokens":0}}}\n\n'
    "event: content_block_start\n"
    'data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}\n\n'
    "event: content_block_delta\n"
    'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"O"}}\n\n'
    "event: content_block_stop\n"
    'data: {"type":"content_block_stop","index":0}\n\n'
    "event: message_delta\n"
    'data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},'
    '"usage":{"output_tokens":22}}\n\n'
    "event: message_stop\n"
    'data: {"type":"message_stop"}\n\n'
)
