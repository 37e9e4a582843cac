"""What Ray makes HAProxy listen on, and what of it is left. The installed Ray writes the configurations."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deployments.haproxy import INNER, Unexpected, binary, closed
from tests.support.waiting import ended, until

WRITE = """
    import os, sys
    from ray.serve._private import haproxy
    from ray.serve._private.common import RequestProtocol
    from ray.serve.config import HTTPOptions, gRPCOptions
    host, folder, apps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    cfg = haproxy.HAProxyConfig(http_options=HTTPOptions(host=host, port=8123), error_file_path=folder + "/500.http")
    server = haproxy.ServerConfig(name="router", host="127.0.0.1", port=30000)
    backend = haproxy.BackendConfig(name="chorus", path_prefix="/", app_name="chorus", servers=[server])
    path = folder + "/haproxy.cfg"
    api = haproxy.HAProxyApi(cfg=cfg, backend_configs={"chorus": backend} if apps else {}, config_file_path=path)
    api._generate_config_file_internal()
    print(open(path).read())
"""


def written(host: str, folder: Path, num_applications: int) -> str:
    """By Ray, in a process of its own: it reads its settings when it is imported."""
    command = [sys.executable, "-c", textwrap.dedent(WRITE), host, str(folder), str(num_applications)]
    environment = os.environ | {"RAY_SERVE_ENABLE_HA_PROXY": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written("127.0.0.1", tmp_path_factory.mktemp("haproxy"), 1)


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written("0.0.0.0", tmp_path_factory.mktemp("haproxy"), 1)


@pytest.fixture(scope="module")
def starting(tmp_path_factory: pytest.TempPathFactory) -> str:
    return written("127.0.0.1", tmp_path_factory.mktemp("haproxy"), 0)


def binds(config: str) -> list[str]:
    return re.findall(r"^\s*bind\s+(\S+)", config, re.MULTILINE)


def test_ray_itself_would_listen_everywhere(loopback: str) -> None:
    """Else there is nothing to change any more, and this part can go."""
    assert len([bind for bind in binds(loopback) if bind.startswith((":", "*:"))]) == len(INNER)


@pytest.mark.parametrize("name", ["loopback", "everywhere", "starting"])
def test_only_the_front_door_is_open_to_the_network(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    text = closed(request.getfixturevalue(name), tmp_path)
    front = "*:8123" if name == "everywhere" else "127.0.0.1:8123"
    assert sorted(binds(text)) == sorted([front, *(f"unix@{tmp_path}/{socket}" for socket in INNER.values())])
    assert "mode 666" not in text


def test_an_application_that_is_not_there_yet_is_told_as_503_with_retry_after(starting: str, tmp_path: Path) -> None:
    lines = [line for line in closed(starting, tmp_path).splitlines() if "http-request return status" in line]
    assert [line for line in lines if " 503 " in line and line.endswith("hdr Retry-After 1")]
    assert not [line for line in lines if " 404 " in line]


def test_a_path_of_nobody_stays_404_where_there_is_an_application(loopback: str, tmp_path: Path) -> None:
    assert "http-request return status 404" in closed(loopback, tmp_path)


def test_what_a_router_that_is_away_leaves_is_told_as_503(loopback: str, tmp_path: Path) -> None:
    files = re.findall(r"errorfile (\d+) (\S+)", closed(loopback, tmp_path))
    assert files == [(code, f"{tmp_path}/503.http") for code in ("502", "503", "504")]


@pytest.mark.parametrize("name", ["loopback", "everywhere", "starting"])
def test_haproxy_takes_the_configuration(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Through the program itself, as Ray calls it."""
    if binary() is None:
        pytest.skip("no HAProxy on this platform")
    path = tmp_path / "haproxy.cfg"
    path.write_text(request.getfixturevalue(name))
    command = [sys.executable, "-m", "deployments.haproxy", "-c", "-f", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


UNKNOWN = [
    ("frontend prometheus", "frontend numbers"),
    ("listen stats", "listen pages"),
    ("frontend http_frontend", "frontend door"),
    ("bind *:8404", "bind *:8404\nfrontend another\n  bind 10.0.0.7:99"),
]


@pytest.mark.parametrize(("known", "unknown"), UNKNOWN)
def test_a_configuration_of_another_ray_is_refused_rather_than_opened(
    known: str, unknown: str, loopback: str, tmp_path: Path
) -> None:
    assert known in loopback
    with pytest.raises(Unexpected):
        closed(loopback.replace(known, unknown), tmp_path)


PARENT = """
    import subprocess, sys, time
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\\n"
    print(child.pid, flush=True)
    time.sleep(600)
"""
CHILD = """
import signal, time
from deployments.haproxy import stop_with_parent
signal.signal(signal.SIGUSR1, lambda *_: open({told!r}, "w").close())
{stop}
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux only")
def test_the_death_of_a_manager_tells_its_haproxy_to_stop(tmp_path: Path) -> None:
    """SIGUSR1 is HAProxy's word for: no new connections, and go when the last is done."""
    for stop in ("", "stop_with_parent()"):
        told = tmp_path / f"told-{len(stop)}"
        child = CHILD.format(told=str(told), stop=stop)
        parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PARENT), child], stdout=subprocess.PIPE)
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        try:
            parent.kill()
            ended(parent, "the parent to die")
            if stop:
                until(told.exists, "the child to be told")
            assert told.exists() is bool(stop)
        finally:
            parent.stdout.close()
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["loopback", "everywhere", "starting"])
def test_whoever_is_told_that_nobody_can_answer_is_told_when_to_ask_again(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Serve's own paths /-/healthz and /-/routes too: load balancers ask them."""
    lines = [
        line for line in closed(request.getfixturevalue(name), tmp_path).splitlines() if " return status 503" in line
    ]
    assert lines
    assert [line for line in lines if line.count("hdr Retry-After 1") != 1] == []
