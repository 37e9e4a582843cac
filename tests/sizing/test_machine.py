"""What a process may have of a machine, read from the files of kernels and container engines as they really look."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.sizing.machine import read_host_memory, read_process_bytes

GIB = 1 << 30
UNLIMITED_V1 = "9223372036854771712"
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:   12582912 kB\n"
V2_MOUNT = "29 23 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "33 25 0:29 {root} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"
V2, V1 = V2_MOUNT.format(root="/"), V1_MOUNT.format(root="/")
V1_OTHER = "34 25 0:30 / /sys/fs/cgroup/cpu rw,nosuid - cgroup cgroup rw,cpu\n"


def machine(root: Path, groups: str, mounts: str, files: dict[str, str], meminfo: str = MEMINFO) -> Path:
    for path, text in {
        "proc/meminfo": meminfo,
        "proc/self/cgroup": groups,
        "proc/self/mountinfo": mounts,
        **{f"sys/fs/cgroup/{path}": text for path, text in files.items()},
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


def stat(inactive: int, *, v1: bool = False) -> str:
    return f"anon 5\ninactive_file {inactive}\n" + (f"total_inactive_file {inactive}\n" if v1 else "")


CASES = {
    # name: (groups, mounts, files, total GiB, available GiB, is a container)
    "a laptop without groups": ("", "", {}, 16, 12, False),
    "v2 without limits": ("0::/user.slice\n", V2, {"user.slice/memory.max": "max\n"}, 16, 12, False),
    "v2 in its own namespace": (
        "0::/\n", V2,
        {"memory.max": f"{4 * GIB}\n", "memory.current": f"{2 * GIB}\n", "memory.stat": stat(GIB)}, 4, 3, True,
    ),
    "v2 high below max": (
        "0::/pod\n", V2,
        {"pod/memory.max": f"{8 * GIB}", "pod/memory.high": f"{3 * GIB}", "pod/memory.current": f"{GIB}"}, 3, 2, True,
    ),
    "v2 a parent is smaller": (
        "0::/kube/pod/box\n", V2,
        {"kube/pod/box/memory.max": "max", "kube/pod/memory.max": f"{6 * GIB}", "kube/memory.max": f"{9 * GIB}"},
        6, 6, True,
    ),
    "v2 a full parent leaves less than its child": (
        "0::/kube/box\n", V2,
        {"kube/box/memory.max": f"{4 * GIB}", "kube/memory.max": f"{9 * GIB}", "kube/memory.current": f"{8 * GIB}"},
        4, 1, True,
    ),
    "v2 mounted below the group's name outside": (
        "0::/docker/abc\n", V2_MOUNT.format(root="/docker/abc"), {"memory.max": f"{2 * GIB}"}, 2, 2, True,
    ),
    "v2 a name that is not there": ("0::/../../other\n", V2, {"memory.max": f"{2 * GIB}"}, 2, 2, True),
    "v2 more than the machine": ("0::/\n", V2, {"memory.max": f"{64 * GIB}"}, 16, 12, False),
    "v1 without a limit": (
        "4:memory:/box\n3:cpu:/box\n", V1_OTHER + V1,
        {"memory/box/memory.limit_in_bytes": UNLIMITED_V1}, 16, 12, False,
    ),
    "v1 nested": (
        "4:memory:/docker/abc\n", V1,
        {
            "memory/docker/abc/memory.limit_in_bytes": UNLIMITED_V1,
            "memory/docker/memory.limit_in_bytes": f"{5 * GIB}",
            "memory/docker/memory.usage_in_bytes": f"{3 * GIB}",
            "memory/docker/memory.stat": stat(2 * GIB, v1=True),
        },
        5, 4, True,
    ),
    "v1 in a container that keeps the host's names": (
        "4:memory:/docker/abc\n", V1_MOUNT.format(root="/docker/abc"), {"memory/memory.limit_in_bytes": f"{GIB}"},
        1, 1, True,
    ),
    "both, of which v1 limits memory": (
        "4:memory:/a\n0::/\n", V1 + "30 23 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
        {"memory/a/memory.limit_in_bytes": f"{7 * GIB}"}, 7, 7, True,
    ),
    "controllers side by side": (
        "4:cpu,memory:/a\n", "33 25 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,cpu,memory\n",
        {"memory/a/memory.limit_in_bytes": f"{2 * GIB}"}, 2, 2, True,
    ),
    "files that nobody can read": ("what\n\n0::\n", "no mounts\n", {"memory.max": "lots"}, 16, 12, False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_smallest_limit_around_a_process_counts(tmp_path: Path, name: str) -> None:
    groups, mounts, files, total, available, is_container = CASES[name]
    found = read_host_memory(machine(tmp_path, groups, mounts, files))
    assert (found.total_bytes / GIB, found.available_bytes / GIB) == (total, available)
    assert found.is_container is is_container
    assert ("container" in found.name) is is_container


def test_a_system_without_these_files_is_a_guess_and_no_error(tmp_path: Path) -> None:
    found = read_host_memory(tmp_path)
    assert 0 < found.available_bytes <= found.total_bytes
    assert not found.is_container
    assert read_process_bytes(tmp_path) == 0


def test_this_machine_and_this_process_are_read() -> None:
    found = read_host_memory()
    assert 0 < found.available_bytes <= found.total_bytes
    assert 1 << 20 < read_process_bytes() < found.total_bytes
