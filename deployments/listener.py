"""The addresses that Serve listens on: who can reach its HTTP proxies decides who must show a key.

Serve starts its proxies once, for all applications, with the `http_options` of whoever started it; what this
application's file says of them may not be what holds. So the running Serve is asked.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import ray
from ray.serve import context

logger = logging.getLogger("ray.serve")

_EVERYWHERE = "[::]:0"  # where Serve would take calls between deployments


def listening_host() -> str | None:
    """As `http_options.host` has it; None: no Serve runs, or it has no HTTP proxy. Blocks for a moment."""
    client = context._get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.host


def take_calls_at_this_node_only() -> None:
    """Called in the constructor of a deployment: Serve opens the port of its calls after that.

    Serve takes calls between deployments at every address of the machine, and unpickles what comes. Those who call ask
    at the node's own address, which is a loopback address where Ray is told to stay on one machine.
    """
    replica: Any = importlib.import_module("ray.serve._private.replica")
    add_port: Any = getattr(replica, "add_port_to_grpc_server", None)
    if add_port is None:
        logger.warning("this Ray opens the port of calls between deployments in a way that is not known here")
        return
    if getattr(add_port, "is_narrow", False):
        return

    def add_port_here(server: Any, address: str) -> Any:
        if address == _EVERYWHERE:
            node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            address = f"[{node}]:0" if ":" in node else f"{node}:0"
        return add_port(server, address)

    add_port_here.is_narrow = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = add_port_here
