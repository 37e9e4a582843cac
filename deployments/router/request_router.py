"""Serve's request router for the replicas: reads what they report and asks `placement.rank`.

Serve pickles this module by value into every process that holds a handle, so it imports little. What it knows is
advisory: each router has its own copy, at most a poll period old, and a wrong choice costs time, never an answer.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.calls import Aim, Submission
from deployments.router.placement import Heard, ReplicaView, Weights, rank

if TYPE_CHECKING:
    from deployments.router.loads import Load


class AdapterRequestRouter(RequestRouter):
    """Ranks replicas by adapter residency, cached prefix and load. `request_router_kwargs` are those of `Weights`."""

    def initialize_state(self, **weights: float) -> None:
        """Called by Serve with `request_router_kwargs`."""
        self._weights = Weights(**weights)  # type: ignore[arg-type]
        self._heard = Heard()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of one replica each, best first: Serve tries them in this order and backs off when all are full."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        asked = pending_request.args[0] if pending_request.args else None
        if isinstance(asked, Aim):
            return [[replica] for replica in candidate_replicas if replica.replica_id.unique_id == asked.replica]
        from deployments.router.loads import LOADS  # by name, and not as a copy: see above

        silent = self._heard.silent(time.monotonic())
        views = [self._view(replica, silent, LOADS.get(replica.replica_id.unique_id)) for replica in candidate_replicas]
        if isinstance(asked, Submission):
            call = asked.call
            avoid = frozenset(call.avoid)
            # One that must be served alone had better meet a replica that has nothing to finish first.
            adapter, hints = (None, ()) if call.alone_tokens else (call.adapter, call.prefix_hints)
            order = rank(views, adapter, hints, avoid=avoid, weights=self._weights)
            LOADS.sent(order[0], next(view.load for view in views if view.replica_id == order[0]))
        else:
            order = rank(views, None, weights=self._weights)
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[by_id[replica_id]] for replica_id in order]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve with every news of the replicas, their reports among them."""
        now_s = time.monotonic()
        for replica in replicas:
            self._heard.report(replica.replica_id.unique_id, (replica.routing_stats or {}).get("report"), now_s)
        self._heard.keep([replica.replica_id.unique_id for replica in replicas])
        super().update_replicas(replicas)

    def _view(self, replica: RunningReplica, silent: frozenset[str], own: Load | None) -> ReplicaView:
        """`own`: what this process learnt of its load by itself. Older than the report, the report knows better."""
        name = replica.replica_id.unique_id
        stats: dict[str, Any] = replica.routing_stats or {}
        if own is not None:
            self._heard.queue(name, own.at_s)
        is_younger = own is not None and self._heard.believes_queue(name)
        return ReplicaView(
            replica_id=name,
            is_silent=name in silent,
            load=own.num_calls if own is not None and is_younger else int(stats.get("load", 0)),
            capacity=int(stats.get("capacity", 1)),
            resident=frozenset(stats.get("resident", ())),
            host=frozenset(stats.get("host", ())),
            prefixes=frozenset(stats.get("prefixes", ())),
        )
