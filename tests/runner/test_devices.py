"""A process may have several GPUs: each thread that launches something says on which, as none inherits it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core.plan import StepPlan
from engine.lora.copier import Copier, CudaPages, HostPages, Pacer
from engine.to_device import use_device
from tests.support.plan_driver import PlanDriver
from tests.support.tiny_model import make_base

SECOND = torch.device("cuda", 1)


@pytest.fixture
def set_devices(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[torch.device]]:
    """What each thread, by its number, was told to use."""
    told: dict[int, list[torch.device]] = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda d: told.setdefault(threading.get_ident(), []).append(d))
    return told


def test_whatever_thread_submits_launches_on_the_models_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_devices: dict[int, list[torch.device]]
) -> None:
    runner = PlanDriver(make_base("llama", tmp_path / "llama"), kernels="torch").runner
    assert set_devices == {}  # the CPU needs none
    seen: list[tuple[int, list[torch.device]]] = []

    def execute(plan: StepPlan) -> Any:
        seen.append((plan.plan_id, list(set_devices.get(threading.get_ident(), []))))
        return None, None, None

    monkeypatch.setattr(runner, "_execute", execute)
    runner.loaded = replace(runner.loaded, device=SECOND)
    for plan_id in (1, 2):
        with ThreadPoolExecutor(max_workers=1) as thread:
            thread.submit(runner.submit, StepPlan(plan_id=plan_id)).result(timeout=30)
    assert [(plan_id, devices[-1]) for plan_id, devices in seen] == [(1, SECOND), (2, SECOND)]
    assert threading.get_ident() not in set_devices


class OnTheSecond(HostPages):
    """Copies in host memory, by the rules of a GPU."""

    enter = CudaPages.enter
    _device = SECOND

    def __init__(self) -> None:
        super().__init__(torch.zeros(64, dtype=torch.uint8))
        self.threads: list[int] = []

    def begin(self, mark: Any) -> None:
        self.threads.append(threading.get_ident())


def test_the_thread_that_copies_adapters_uses_the_pages_device(set_devices: dict[int, list[torch.device]]) -> None:
    device = OnTheSecond()
    copier = Copier(device, Pacer(None))
    load: Any = type("Load", (), {"mark": None, "chunks": (), "cancelled": threading.Event()})()
    copier._thread.submit(copier._copy, load).result(timeout=30)
    copier.close()
    (thread,) = device.threads
    assert thread != threading.get_ident()
    assert set_devices == {thread: [SECOND]}


def test_the_cpu_is_no_device_to_set(set_devices: dict[int, list[torch.device]]) -> None:
    use_device(torch.device("cpu"))
    assert set_devices == {}
