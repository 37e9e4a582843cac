"""How much RAM this process may have: the machine's, or its container's if that has less. A guess off Linux.

A container is a control group (cgroup) with a limit. Groups are nested, and each one's limit counts: v2 has memory.max,
beyond which processes are killed, and memory.high, beyond which they are slowed down; v1 has memory.limit_in_bytes.
Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_UNKNOWN_BYTES = 4 << 30  # what is taken for a machine's RAM where nobody tells it
_LIMITS = ("memory.max", "memory.high", "memory.limit_in_bytes")
_USAGES = ("memory.current", "memory.usage_in_bytes")
_RECLAIMABLE = ("inactive_file", "total_inactive_file")  # of memory.stat: files that were read once, first to go


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Of the moment when it was read."""

    total_bytes: int  # the machine's RAM, or the smallest limit of a group around this process
    available_bytes: int  # of it, what nobody uses now
    is_container: bool  # whether it is a group's limit

    @property
    def name(self) -> str:
        return "the container's memory" if self.is_container else "the machine's memory"


def read_host_memory(root: Path = Path("/")) -> HostMemory:
    """`root`: the file system that /proc and the control groups are read from."""
    total, available = _machine(root)
    found = HostMemory(total, available, is_container=False)
    for group in _groups(root):
        for name in _LIMITS:
            limit = _number(group / name)
            # Without a limit v2 says "max", and v1 the largest number of pages.
            if limit is None or limit >= total:
                continue
            is_less = limit < found.total_bytes
            found = HostMemory(
                min(limit, found.total_bytes),
                min(max(0, limit - _used(group)), found.available_bytes),
                found.is_container or is_less,
            )
    return found


def read_process_bytes(root: Path = Path("/")) -> int:
    """Resident memory of this process, with what it shares with others; 0: unknown."""
    try:
        pages = int((root / "proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _machine(root: Path) -> tuple[int, int]:
    fields = _fields(root / "proc/meminfo")
    total = fields.get("MemTotal:", 0) * 1024
    if total:
        return total, min(total, fields.get("MemAvailable:", fields.get("MemFree:", 0)) * 1024)
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        total = _UNKNOWN_BYTES
    return total, total


def _groups(root: Path) -> Iterator[Path]:
    """The folders of the groups around this process, innermost first, in each hierarchy that limits memory."""
    mounts = list(_mounts(root))
    for line in _lines(root / "proc/self/cgroup"):
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        for is_v2, group_root, mount in mounts:
            if is_v2 != (not controllers):
                continue
            folder = _below(path, group_root, root / mount.lstrip("/"))
            top = root / mount.lstrip("/")
            while True:
                yield folder
                if folder == top:
                    break
                folder = folder.parent


def _below(path: str, group_root: str, top: Path) -> Path:
    """The folder of group `path` in a mount of group `group_root` at `top`; the mount itself, where that lies outside.

    A container often sees its own group alone, under the name that the group has outside.
    """
    for start in (group_root, "/"):
        try:
            folder = top / PurePosixPath(path).relative_to(start)
        except ValueError:
            continue
        if ".." not in folder.parts and folder.is_dir():
            return folder
    return top


def _mounts(root: Path) -> Iterator[tuple[bool, str, str]]:
    """Whether it is v2, the group at its root, and where it is mounted, of each hierarchy that limits memory."""
    for line in _lines(root / "proc/self/mountinfo"):
        left, separator, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if not separator or len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2" or (kind[0] == "cgroup" and "memory" in kind[2].split(",")):
            yield kind[0] == "cgroup2", fields[3], fields[4]


def _used(group: Path) -> int:
    """Bytes of a group that would not be given back at once."""
    usage = next((n for n in map(_number, (group / name for name in _USAGES)) if n is not None), 0)
    stat = _fields(group / "memory.stat")
    return max(0, usage - next((stat[name] for name in reversed(_RECLAIMABLE) if name in stat), 0))


def _fields(path: Path) -> dict[str, int]:
    found = {}
    for line in _lines(path):
        name, *numbers = line.split()
        if numbers and numbers[0].isdigit():
            found[name] = int(numbers[0])
    return found


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].strip().isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError:
        return []
