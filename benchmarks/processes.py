"""CPU time of a server's processes, by what they are for. Linux, on the server's own machine."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

_TICKS = os.sysconf("SC_CLK_TCK")
# By what a title begins with, in this order; the rest of Ray is "ray". A peer's processes have its name.
_KINDS = (
    ("haproxy", "haproxy"),
    ("ray::Router", "router"),
    ("ray::Replica", "replica"),
    ("ray::AdapterStore", "store"),
    ("ray::Proxy", "serve"),
    ("ray::HAProxy", "serve"),
    ("ray::ServeController", "serve"),
)
_OF_A_SERVER = ("python", "ray", "gcs_server", "haproxy", "VLLM", "vllm")  # what a server's processes are called
ENGINE_THREADS = ("chorus-engine", "chorus-output")


class _Process(NamedTuple):
    pid: int
    parent: int
    name: str
    title: str


def server_cpu_s(url: str) -> dict[str, float]:
    """CPU seconds of all processes of the server that listens at `url`, user and system, by kind; the engine's threads
    apart from the rest of its process ("replica"). Empty when it runs elsewhere.
    """
    processes = {process.pid: process for process in map(_process, _pids()) if process is not None}
    first = _listener(urlsplit(url).port or 80, processes)
    if first is None:
        return {}
    while (parent := processes.get(first.parent)) is not None and parent.name.startswith(_OF_A_SERVER):
        first = parent
    children: dict[int, list[int]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process.pid)
    spent: Counter[str] = Counter()
    left = [first.pid]
    while left:
        pid = left.pop()
        left += children.get(pid, ())
        kind = _kind(processes[pid].title)
        if kind == "replica":
            engine_s = _threads_s(pid)
            spent["engine"] += engine_s
            spent[kind] += _cpu_s(Path(f"/proc/{pid}")) - engine_s
        else:
            spent[kind] += _cpu_s(Path(f"/proc/{pid}"))
    return dict(spent)


def _kind(title: str) -> str:
    if title.startswith("ray::ServeReplica:"):
        title = f"ray::{title.rpartition(':')[2]}"
    for beginning, kind in _KINDS:
        if title.startswith(beginning) or title.split(" ")[0].endswith(f"/{beginning}"):
            return kind
    return "peer" if "vllm" in title.lower() else "ray"


def _threads_s(pid: int) -> float:
    seconds = 0.0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        try:
            if (thread / "comm").read_text().strip() in ENGINE_THREADS:
                seconds += _cpu_s(thread)
        except OSError:  # it has ended
            continue
    return seconds


def _cpu_s(folder: Path) -> float:
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _process(pid: int) -> _Process | None:
    try:
        before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return None
    return _Process(pid, int(after.split()[1]), before.partition("(")[2], title)


def _listener(port: int, processes: dict[int, _Process]) -> _Process | None:
    """The process that listens on `port`: of several that share the socket, the first that was started."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                sockets.add(f"socket:[{fields[9]}]")
    for pid in sorted(processes):
        try:
            if any(os.readlink(file) in sockets for file in Path(f"/proc/{pid}/fd").iterdir()):
                return processes[pid]
        except OSError:
            continue
    return None
