"""Prints what pyproject.toml says the server needs, one requirement a line, for the image's layer of dependencies."""

import tomllib
from pathlib import Path

print("\n".join(tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]))
