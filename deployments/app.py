"""`build`: from settings to a Serve application. The only place that binds deployments.

Start: `serve run serve_config.yaml`. A `deployments:` entry there overrides what is set here, by deployment name.
"""

# No `from __future__ import annotations` here: Serve reads the real annotation of `build` to validate its arguments.
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from deployments.direct import DirectReplica
from deployments.http.auth import check_closed
from deployments.ingress import Router
from deployments.listener import listening_host
from deployments.replica.replica import Replica
from deployments.settings.app import AppArgs
from engine.sizing.machine import read_host_memory

HEALTH_PERIOD_S = 2.0
HEALTH_TIMEOUT_S = 60.0  # longer than the longest step with the interpreter lock held
MAX_ONGOING = 4096  # the engine's own queue says no, by name, long before


def build(args: AppArgs) -> Application:
    """The application: `Router` (ingress) in front of `Replica`s, or `direct`, replicas that are ingresses.

    Raises: ValueError when the Serve that runs listens where others reach it, and nothing says who may ask.
    """
    if ray.is_initialized() and (host := listening_host()) is not None:
        check_closed(args.api_keys_env, host, is_open=args.open)  # a router looks again; here it is told at once
    args = args.on_a_machine_of(read_host_memory().total_bytes)
    settings: dict[str, Any] = {} if args.direct else {"request_router_config": _by_adapter()}
    replica = serve.deployment(
        name="Replica",
        num_replicas=args.num_replicas,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=-1,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=args.drain_s,
        ray_actor_options={"num_cpus": args.replica_num_cpus, "num_gpus": args.replica_num_gpus},
        **settings,
    )(DirectReplica if args.direct else Replica)
    if args.direct:
        return replica.bind(args)
    router = serve.deployment(
        name="Router",
        num_replicas=args.num_routers,
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=args.drain_s,
        ray_actor_options={"num_cpus": args.router_num_cpus},
    )(Router)
    return router.bind(args, replica.bind(args))


def _by_adapter() -> RequestRouterConfig:
    return RequestRouterConfig.model_validate(
        {"request_router_class": "deployments.router.request_router:AdapterRequestRouter"}
    )
