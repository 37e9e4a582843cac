"""The address that Serve's HTTP proxies listen on: who can reach it decides who must show a key.

Serve starts its proxies once, for all applications, with the `http_options` of whoever started it; what this
application's file says of them may not be what holds. So the running Serve is asked.
"""

from __future__ import annotations

from ray.serve import context


def listening_host() -> str | None:
    """As `http_options.host` has it; None: no Serve runs, or it has no HTTP proxy. Blocks for a moment."""
    client = context._get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.host
