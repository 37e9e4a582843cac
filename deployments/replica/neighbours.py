"""Who else will live on a replica's node: from the plan, as those who start together cannot see each other's memory."""

from __future__ import annotations

from typing import Any

import ray

from deployments.settings.app import AppArgs
from engine.config import MIB
from engine.sizing.room import Neighbours

# Proportional sets: 621 and 369 MiB with one replica of a model of 135 M parameters, docs/decisions/0024.
RAY_BYTES = 768 * MIB  # Ray's own processes, Serve's controller and proxy, and the adapter store's actor
ROUTER_BYTES = 448 * MIB


def neighbours_here(args: AppArgs) -> Neighbours:
    """On the node that this process runs on, which Ray must know."""
    node_id = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    found = [node["Resources"] for node in nodes if node["NodeID"] == node_id]
    return plan_neighbours(args, found[0] if found else {})


def plan_neighbours(args: AppArgs, resources: dict[str, Any]) -> Neighbours:
    """As many replicas as Ray may put on a node with these resources, be there others or not."""
    if args.engine_config().device == "cuda":
        share = args.replica_num_gpus
        num_engines = min(args.num_replicas, int(1 / share)) if 0 < share <= 1 else 1
        return Neighbours(num_engines=max(1, num_engines), store_bytes=args.store_bytes_of_a_replica)
    num_engines = args.num_replicas
    if args.replica_num_cpus and "CPU" in resources:
        num_engines = min(num_engines, int(resources["CPU"] / args.replica_num_cpus))
    return Neighbours(
        num_engines=max(1, num_engines),
        reserved_bytes=RAY_BYTES + args.num_routers * ROUTER_BYTES + args.host_bytes,
        store_bytes=args.store_bytes_of_a_replica,
    )
