"""What the system's tools show of the engine's threads."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from engine.aio.threads import named


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep names of threads elsewhere")
def test_a_thread_is_shown_by_its_name() -> None:
    seen: list[str] = []

    def look() -> None:
        seen.append(Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text().strip())

    thread = threading.Thread(target=named, args=("chorus-a-long-name", look))
    thread.start()
    thread.join(20)
    assert seen == ["chorus-a-long-n"]
