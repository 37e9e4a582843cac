"""One small Ray per test session, for all tests that are marked `ray`: import `ray_session` where it is used."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator

import pytest

OBJECT_STORE_BYTES = 200 << 20
NAMESPACE = "chorus-test"


def start_ray(object_store_bytes: int = OBJECT_STORE_BYTES) -> bool:
    """Starts Ray unless it runs already in this process; whether it was started here."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return False
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=object_store_bytes,
        namespace=NAMESPACE,
        log_to_driver=False,
    )
    return True


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray, running; ended with the session by whoever started it."""
    started = start_ray()
    yield
    if started:
        stop_ray()


def stop_ray() -> None:
    """Ends Ray. It terminates its processes without waiting for them, of which Python warns when they are collected."""
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        ray.shutdown()
        gc.collect()
