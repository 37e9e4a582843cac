"""The environment that a server starts in."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ray.serve.schema import ServeDeploySchema

from deployments import start
from deployments.start import environment, is_loopback, settings

HAPROXY_FILES = ("CONFIG_FILE_LOC", "SOCKET_PATH", "METRICS_SOCKET_PATH", "SERVER_STATE_BASE", "SERVER_STATE_FILE")


def config(host: str = "127.0.0.1", *drains: float) -> dict[str, object]:
    return {"http_options": {"host": host}, "applications": [{"args": {"drain_s": drain}} for drain in drains]}


@pytest.fixture
def haproxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "why_not_haproxy", lambda: None)


@pytest.mark.usefixtures("haproxy")
def test_every_file_of_haproxy_lies_in_a_folder_of_this_server(tmp_path: Path) -> None:
    added, reason = environment(config(), tmp_path, {})
    assert reason is None
    assert all(Path(added[f"RAY_SERVE_HAPROXY_{name}"]).is_relative_to(tmp_path) for name in HAPROXY_FILES)


@pytest.mark.usefixtures("haproxy")
@pytest.mark.parametrize(("drains", "least_s"), [((), 300), ((10.0,), 10), ((10.0, 900.0), 900), ((0.5, 60.0), 60)])
def test_a_replaced_haproxy_outlives_the_longest_drain(drains: tuple[float, ...], least_s: int, tmp_path: Path) -> None:
    added, _ = environment(config("127.0.0.1", *drains), tmp_path, {})
    assert int(added["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) > least_s


@pytest.mark.usefixtures("haproxy")
def test_two_servers_of_a_machine_share_no_port_of_the_proxy_that_stands_by(tmp_path: Path) -> None:
    """Ray's proxies let each other share one, so that neither would notice."""
    name = "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"
    ports = set()
    with contextlib.ExitStack() as stack:
        for _ in range(10):
            port = int(environment(config(), tmp_path, {})[0][name])
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
            ports.add(port)
    assert len(ports) == 10
    assert name not in environment(config(), tmp_path, {name: "8600"})[0]


DRAINS = [
    ({"applications": None}, 300),
    ({"applications": [{"args": {"drain_s": 5}}, {}]}, 300),
    ({"applications": [{"args": {"drain_s": 5}, "deployments": [{"name": "Router"}]}]}, 5),
    (
        {
            "applications": [
                {"args": {"drain_s": 5}, "deployments": [{"name": "R", "graceful_shutdown_timeout_s": 600}]}
            ]
        },
        600,
    ),
    ({"applications": [{"args": {"drain_s": "long"}}]}, 300),
    ({"applications": [{"args": None}, {"args": {"drain_s": 10}}]}, 300),
]


@pytest.mark.usefixtures("haproxy")
@pytest.mark.parametrize(("given", "longest_s"), DRAINS)
def test_the_longest_drain_is_that_of_any_deployment(
    given: dict[str, object], longest_s: float, tmp_path: Path
) -> None:
    assert start.longest_drain_s(given) == longest_s
    assert int(environment(given, tmp_path, {})[0]["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"]) == longest_s + 30


@pytest.mark.usefixtures("haproxy")
def test_what_is_set_already_wins(tmp_path: Path) -> None:
    given = {"RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "7", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
    assert not set(given) & set(environment(config(), tmp_path, given)[0])


@pytest.mark.parametrize("given", [{"RAY_SERVE_ENABLE_HA_PROXY": "0"}, {}])
def test_without_haproxy_nothing_of_it_is_set_and_routers_open_no_port(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(start, "why_not_haproxy", lambda: "it is not there")
    added, reason = environment(config(), tmp_path, given)
    assert reason
    assert added["RAY_SERVE_ENABLE_HA_PROXY"] == added["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"
    assert not [name for name in added if "HAPROXY" in name]
    assert added["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"


HOSTS = [("127.0.0.1", True), ("127.8.9.1", True), ("localhost", True), ("::1", True), ("[::1]", True)]
HOSTS += [("0.0.0.0", False), ("::", False), ("10.0.0.4", False), ("chorus.example", False)]


@pytest.mark.parametrize(("host", "is_local"), HOSTS)
def test_ray_stays_on_this_machine_where_the_server_does(host: str, is_local: bool, tmp_path: Path) -> None:
    assert is_loopback(host) is is_local
    assert ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in environment(config(host), tmp_path, {})[0]) is is_local


@pytest.mark.usefixtures("haproxy")
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_haproxy_is_used_where_it_reaches_the_routers(host: str, tmp_path: Path) -> None:
    added, reason = environment(config(host), tmp_path, {})
    assert reason is None
    assert added["RAY_SERVE_ENABLE_HA_PROXY"] == "1"


OTHER_HOSTS = ["localhost", "127.8.9.1", "::1", "[::1]", "::", "10.0.0.4", "192.168.1.7", "chorus.example", "fe80::1"]


@pytest.mark.usefixtures("haproxy")
@pytest.mark.parametrize("host", OTHER_HOSTS)
@pytest.mark.parametrize("given", [{}, {"RAY_SERVE_ENABLE_HA_PROXY": "1"}])
def test_where_it_would_not_serve_s_own_proxy_is_used(host: str, given: dict[str, str], tmp_path: Path) -> None:
    """Ray's HAProxy asks at 127.0.0.1, the routers listen at the host that is given."""
    added, reason = environment(config(host), tmp_path, given)
    assert reason is not None
    assert host in reason
    assert added["RAY_SERVE_ENABLE_HA_PROXY"] == added["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"


@pytest.mark.usefixtures("haproxy")
@pytest.mark.parametrize("options", [{}, {"http_options": None}, {"http_options": {"port": 8123}}])
def test_a_configuration_without_a_host_is_one_that_listens_everywhere(
    options: dict[str, object], tmp_path: Path
) -> None:
    """So Serve takes it: its words, not `serve run`'s on the command line."""
    host = ServeDeploySchema.model_validate({"applications": [], **{k: v for k, v in options.items() if v}})
    assert host.http_options.host == "0.0.0.0"
    added, reason = environment(options, tmp_path, {})
    assert reason is None
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in added


def test_each_line_of_the_settings_is_a_variable_of_ray() -> None:
    assert settings()
    assert all(name.startswith("RAY_") and value for name, value in settings().items())


def test_another_ray_is_served_by_its_own_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "binary", lambda: "/bin/true")
    monkeypatch.setattr(start, "_program", lambda: Path("/bin/true"))
    monkeypatch.setattr(start, "_EXPECTED", ("what no Ray writes",))
    assert "what no Ray writes" in str(start.why_not_haproxy())


BAD = [([], "usage"), (["--help-me"], "usage"), (["nowhere.yaml"], "not a file"), (["list.yaml"], "not a Serve")]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_a_wrong_call_ends_in_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    arguments = [str(tmp_path / a) if a.endswith(".yaml") else a for a in arguments]
    command = [sys.executable, "-m", "deployments.start", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
