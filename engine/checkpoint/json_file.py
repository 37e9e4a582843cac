"""A JSON file of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.errors import ConfigError


def read_object(path: Path) -> dict[str, Any]:
    """Raises: ConfigError when the file holds anything but one JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, not an object")
    return values
