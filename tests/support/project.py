"""The files of this project."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def project_files() -> list[Path]:
    """What git has or would take: a file that is ignored is nobody's concern."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    if listed.returncode:  # not a checkout: an unpacked archive holds nothing else
        return [path for path in ROOT.rglob("*") if path.is_file() and not any(p[0] == "." for p in path.parts)]
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
