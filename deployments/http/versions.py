"""The release that runs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    try:
        return version("chorus-serve")
    except PackageNotFoundError:  # run from a folder that was copied, not installed
        return "unknown"
