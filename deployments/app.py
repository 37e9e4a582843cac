"""`build`: from settings to a Serve application. The only place that binds deployments.

Start: `serve run serve_config.yaml`. A `deployments:` entry there overrides what is set here, by deployment name.
"""

# No `from __future__ import annotations` here: Serve reads the real annotation of `build` to validate its arguments.
import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

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
    """The application: `Router` (ingress) in front of `Replica`s.

    Raises: ValueError when the Serve that runs listens where others reach it, and nothing says who may ask.
    """
    if ray.is_initialized() and (host := listening_host()) is not None:
        check_closed(args.api_keys_env, host, is_open=args.open)  # a router looks again; here it is told at once
    args = args.on_a_machine_of(read_host_memory().total_bytes)
    replica = serve.deployment(
        name="Replica",
        num_replicas=args.num_replicas,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=-1,
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=args.drain_s,
        ray_actor_options={"num_cpus": args.replica_num_cpus, "num_gpus": args.replica_num_gpus},
        request_router_config=RequestRouterConfig.model_validate(
            {"request_router_class": "deployments.router.request_router:AdapterRequestRouter"}
        ),
    )(Replica)
    router = serve.deployment(
        name="Router",
        num_replicas=args.num_routers,
        max_ongoing_requests=MAX_ONGOING,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=args.drain_s,
        ray_actor_options={"num_cpus": args.router_num_cpus},
    )(Router)
    return router.bind(args, replica.bind(args))
