"""A real server for the tests: `python -m deployments.start` in a session of its own, its processes, and its end."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import yaml

from tests.support.waiting import ended, until

ROOT = Path(__file__).parents[2]
KEY = "e2e-key-0123456789abcdef"
ADMIN_KEY = "e2e-admin-key-0123456789abcdef"
START_S = 240.0
STOP_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """What `make serve` starts, of serve_config.yaml, changed only in ports, sources and limits."""

    _environment: Mapping[str, str] = MappingProxyType({})
    _num_told = 2  # replicas that one answer of /stats tells of

    def __init__(
        self,
        adapters: Path,
        s3_endpoint: str,
        bucket: str,
        environment: Mapping[str, str] = MappingProxyType({}),
        direct: bool = False,
    ) -> None:
        self._environment = environment
        self._num_told = 1 if direct else 2
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = Path(tempfile.mkdtemp(prefix="chorus-", dir="/tmp"))  # Ray's socket paths must be short
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
        config["http_options"]["port"] = self.port
        args = config["applications"][0]["args"]
        args |= {"api_keys_env": "CHORUS_E2E_KEYS", "admin_keys_env": "CHORUS_E2E_ADMIN_KEYS"}
        args["direct"] = direct
        args["engine"] |= {"max_num_seqs": 16, "max_queued_requests": 24}
        args["adapters"] |= {
            "refresh_s": 2.0,
            "disk_path": str(self.folder / "cache"),
            "sources": [
                {"kind": "file", "path": str(adapters)},
                {"kind": "s3", "bucket": bucket, "endpoint_url": s3_endpoint, "addressing_style": "path"},
            ],
        }
        self._config = self.folder / "config.yaml"
        self._config.write_text(yaml.safe_dump(config))
        self.log = self.folder / "log.txt"
        self.client = httpx.Client(
            base_url=self.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60.0, trust_env=False
        )

    @property
    def is_behind_haproxy(self) -> bool:
        return self._environment.get("RAY_SERVE_ENABLE_HA_PROXY") != "0"

    def start(self) -> None:
        self.first_answers: list[tuple[int, str | None]] = []  # status and Retry-After of /health until it was 200
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {
            "RAY_AUTH_MODE": "disabled",
            "RAY_TMPDIR": str(self.folder),
            "CHORUS_E2E_KEYS": f"{KEY},another-key-0123456789",
            "CHORUS_E2E_ADMIN_KEYS": ADMIN_KEY,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            **self._environment,
        }
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [str(ROOT / ".venv/bin/python"), "-m", "deployments.start", str(self._config)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.wait_until(self.is_healthy, "the server's health", START_S)
        self.wait_until(lambda: len(self.stats()["replicas"]) == self._num_told, "the replicas", START_S)

    def is_healthy(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"serve run ended with {self._process.returncode}:\n{self.log.read_text()[-4000:]}")
        try:
            response = self.client.get("/health")
        except httpx.TransportError:
            return False
        self.first_answers.append((response.status_code, response.headers.get("retry-after")))
        return response.status_code == 200

    def wait_until(self, condition: Any, what: str, limit_s: float) -> float:
        """Seconds until `condition()` held. Raises: TimeoutError with `what` and the end of the log."""
        began = time.monotonic()
        until(condition, lambda: f"{what}; the server's log ends:\n{self.log.read_text()[-4000:]}", limit_s, poll_s=0.1)
        return time.monotonic() - began

    def stats(self) -> dict[str, Any]:
        response = self.client.get("/stats")
        body: dict[str, Any] = response.json() if response.status_code == 200 else {"replicas": []}
        return body

    def in_engines(self) -> int:
        """Sequences that the engines hold, waiting or running."""
        return sum(r["engine"]["waiting"] + r["engine"]["running"] for r in self.stats()["replicas"])

    def processes(self, title: str = "") -> dict[int, str]:
        """Living processes of the server's session whose command line holds `title`."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue  # it ended meanwhile
            if int(fields[3]) == self._process.pid and fields[0] != "Z" and title in command:
                found[int(entry.name)] = command
        return found

    def stop(self) -> int:
        """Ctrl-C. Returns the exit code."""
        self.client.close()
        self._process.send_signal(signal.SIGINT)
        return ended(self._process, "serve run to end after Ctrl-C", STOP_S)

    def deploy(self, **args: Any) -> None:
        """The configuration with `args` of the application changed, as `serve deploy` brings it in."""
        config = yaml.safe_load(self._config.read_text())
        config["applications"][0]["args"] |= args
        self._config.write_text(yaml.safe_dump(config))
        found = re.search(r"dashboard at \S*?(http://127\.0\.0\.1:\d+)", self.log.read_text())
        assert found is not None, "the log does not name the dashboard"
        command = [str(ROOT / ".venv/bin/serve"), "deploy", str(self._config), "--address", found[1]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=STOP_S, check=False)
        assert done.returncode == 0, done.stderr

    def kill(self) -> None:
        """`serve run` alone, as if it had crashed."""
        self.client.close()
        self._process.kill()
        ended(self._process, "serve run to end after a kill", STOP_S)

    def remove(self) -> None:
        """Whatever a failed test left behind."""
        self.client.close()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        ended(self._process, "serve run to end after a kill", STOP_S)
        shutil.rmtree(self.folder, ignore_errors=True)
