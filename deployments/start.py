"""`python -m deployments.start CONFIG`: `serve run CONFIG` in the environment that settings/serve.env describes.

What depends on the machine or on the configuration is added here: HAProxy if there is one, its files in a folder and
its stand-in at a port of this server's own, how long it may drain, and, where the server listens on this machine only,
a Ray that does so too.
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import yaml

from deployments.haproxy import binary

SETTINGS = Path(__file__).parent / "settings" / "serve.env"
PROGRAM = "chorus-haproxy"  # in pyproject.toml; see `deployments.haproxy`
HARD_STOP_MARGIN_S = 30
_HOST = "0.0.0.0"  # Serve's own, where a configuration gives none
_DRAIN_S = 300  # `AppArgs.drain_s` where a configuration gives none
# What `deployments.haproxy` changes. Another Ray may write it otherwise, and would listen where it should not.
_EXPECTED = ("bind :{{ config.metrics_port }}", "bind *:{{ config.stats_port }}", "frontend http_frontend")


def settings(path: Path = SETTINGS) -> dict[str, str]:
    """The variables of serve.env."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def environment(config: Mapping[str, Any], folder: Path, given: Mapping[str, str]) -> tuple[dict[str, str], str | None]:
    """What to add to the environment `given`, and why HAProxy is not used (None: it is).

    `config` is a Serve configuration, `folder` one of this server's own.
    """
    wanted = settings()
    host = (config.get("http_options") or {}).get("host") or _HOST
    if is_loopback(host):
        # Ray's word for "one machine, at its loopback address"; it is the default where firewalls ask.
        wanted["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    is_unwanted = given.get("RAY_SERVE_ENABLE_HA_PROXY") == "0"
    reason = "RAY_SERVE_ENABLE_HA_PROXY is 0" if is_unwanted else why_not_haproxy() or why_not_at(host)
    if reason is None:
        wanted |= {
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(_program()),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(math.ceil(longest_drain_s(config)) + HARD_STOP_MARGIN_S),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics-log.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        }
    else:
        wanted = {name: value for name, value in wanted.items() if "HA_PROXY" not in name and "HAPROXY" not in name}
        wanted |= {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}
        return {k: v for k, v in wanted.items() if k not in given or "INGRESS" in k or "HA_PROXY" in k}, reason
    return {name: value for name, value in wanted.items() if name not in given}, reason


def free_port() -> int:
    """For the proxy that stands by for HAProxy. Ray's own choice is one number for all servers of a machine, which the
    kernel would let two servers share: each would answer some of the other's requests.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def longest_drain_s(config: Mapping[str, Any]) -> float:
    """Of any deployment of any application. What is no number Serve itself will refuse, by name."""
    drains: list[Any] = []
    for app in config.get("applications") or ():
        args = app.get("args")
        drains.append(args.get("drain_s", _DRAIN_S) if isinstance(args, Mapping) else _DRAIN_S)
        drains += [one.get("graceful_shutdown_timeout_s") for one in app.get("deployments") or ()]
    return max((float(one) for one in drains if isinstance(one, int | float)), default=_DRAIN_S)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def why_not_at(host: str) -> str | None:
    """Why HAProxy cannot be used where `host` is listened at. It asks the routers of its node at 127.0.0.1, and routers
    listen at `host`; and it takes no IPv6 where a host is `::`.
    """
    if host in ("127.0.0.1", "0.0.0.0"):
        return None
    return f"HAProxy needs http_options.host to be 127.0.0.1 (this machine only) or 0.0.0.0 (all addresses), not {host}"


def why_not_haproxy() -> str | None:
    """Why Serve's own proxy must do; None: HAProxy can be used."""
    if binary() is None:
        return "there is no HAProxy for this platform (ray[serve] brings one on Linux)"
    if not os.access(_program(), os.X_OK):
        return f"the program {PROGRAM} is not installed beside Python; install this project with pip"
    found = find_spec("ray")
    folders = found.submodule_search_locations if found is not None else None
    template = Path(next(iter(folders or ["."]))) / "serve" / "_private" / "haproxy_templates.py"
    text = template.read_text() if template.exists() else ""
    missing = [line for line in _EXPECTED if line not in text]
    if missing:
        return f"this Ray configures HAProxy in a way that is not known here ({missing[0]!r} is missing)"
    return None


def _program() -> Path:
    return Path(sys.executable).parent / PROGRAM


def main() -> None:
    """Runs until Ctrl-C, and exits as `serve run` does."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m deployments.start CONFIG [options of `serve run`]")
    path = Path(sys.argv[1])
    if not path.is_file():
        sys.exit(f"{path} is not a file: name a Serve configuration, as serve_config.yaml is one")
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict):
        sys.exit(f"{path} is not a Serve configuration: serve_config.yaml shows what one looks like")
    folder = Path(tempfile.mkdtemp(prefix="chorus-", dir="/tmp"))  # short: it holds sockets
    try:
        added, reason = environment(config, folder, os.environ)
        os.environ.update(added)
        if reason is not None:
            print(f"Serve's own proxy is used, at less speed: {reason}", file=sys.stderr)
        from ray.serve.scripts import cli  # Ray reads its settings when it is imported

        cli(["run", str(path), *sys.argv[2:]], prog_name="serve")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
