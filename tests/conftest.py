"""What every test run shares: few threads, nothing from outside, fast folders first, an end for a test that hangs, and
seconds by folder at the end."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.item_deadline import pytest_runtest_call, pytest_runtest_setup, pytest_runtest_teardown

__all__ = ["pytest_runtest_call", "pytest_runtest_setup", "pytest_runtest_teardown"]  # hooks: pytest finds them here

# Hypothesis fails an example that takes longer than 200 ms, which on a busy machine any example may.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# Before anything imports torch, Ray or boto3: they read these once.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1" if os.environ.get(name) == "1" else "2"
os.environ |= {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy machine starts a proxy late
    # No test may find real credentials, nor go looking for a cloud's metadata service.
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's kernels are tried on the CPU
for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "RAY_ADDRESS"):
    os.environ.pop(name, None)

# (folders, seconds on two cores), in the order in which they run. Reported, not asserted: a test that asserts the time
# fails on a busy machine.
BUDGETS: tuple[tuple[tuple[str, ...], int], ...] = (
    (("core",), 60),
    (("store",), 120),
    (("checkpoint", "model", "runner", "lora", "quant", "quantize", "kv", "native"), 90),
    (("triton_kernels",), 120),
    (("text", "engine_api"), 20),
    (("sizing",), 10),
    (("manifests", "."), 50),
    (("equality",), 80),
    (("demo",), 60),
    (("serving",), 110),
    (("conformance", "dialects", "grammar"), 40),
    (("soak",), 15),
    (("e2e",), 120),
)
_RANK = {folder: rank for rank, (folders, _) in enumerate(BUDGETS) for folder in folders}
_seconds: defaultdict[str, float] = defaultdict(float)


def folder_of(nodeid: str) -> str:
    """'tests/core/test_x.py::test_y' -> 'core'; a file directly under tests -> '.'."""
    parts = Path(nodeid.split("::", 1)[0]).parts
    return parts[1] if len(parts) > 2 else "."


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _RANK.get(folder_of(item.nodeid), len(BUDGETS) - 1))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[folder_of(report.nodeid)] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    groups = [*BUDGETS, *(((folder,), 0) for folder in _seconds if folder not in _RANK)]
    rows = [(folders, sum(_seconds.get(f, 0.0) for f in folders), budget) for folders, budget in groups]
    terminalreporter.section("seconds per folder, against the budget on two cores")
    for folders, seconds, budget in rows:
        if any(folder in _seconds for folder in folders):
            over = "   over" if budget and seconds > budget else ""
            terminalreporter.write_line(f"{' + '.join(folders):35} {seconds:6.1f} of {budget or '?':>4}{over}")
    terminalreporter.write_line(f"{'all':35} {sum(_seconds.values()):6.1f} of {sum(b for _, b in BUDGETS):>4}")
