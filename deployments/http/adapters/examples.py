"""Requests and answers of the demo, for /docs. A test asks the requests and compares the answers' fields."""

from __future__ import annotations

from typing import Any

NAMED: dict[str, Any] = {"name": "upper"}
REGISTER: dict[str, Any] = {"name": "shout", "source": "local", "location": "upper"}
REGISTERED: dict[str, Any] = {"registered": 1}
UNREGISTERED: dict[str, Any] = {"unregistered": ["shout"]}
RECORD: dict[str, Any] = {
    "name": "upper",
    "source": "local",
    "version": "5f1c0a7c4c2e8a0e7f0f3a3f0d8f6f7f6f8a7b0c9d2e4f6a8b1c3d5e7f9a0b2c",
    "state": "host",
    "rank": 8,
    "num_bytes": 327680,
    "pinned": False,
    "requests": 12.5,
    "reason": None,
    "notices": [],
}
LISTING: dict[str, Any] = {"adapters": [RECORD], "next": None, "unavailable": []}
