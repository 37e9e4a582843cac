"""Serve's request router for the replicas: reads what they report and asks `placement.rank`.

Serve pickles this module by value into every process that holds a handle, so it imports little. What it knows is
advisory: each router has its own copy, at most a poll period old, and a wrong choice costs time, never an answer.
"""

from __future__ import annotations

import time
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.calls import Call
from deployments.router.placement import Heard, ReplicaView, Weights, rank


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
        silent = self._heard.silent(time.monotonic())
        views = [self._view(replica, silent) for replica in candidate_replicas]
        call = pending_request.args[0] if pending_request.args else None
        if isinstance(call, Call):
            avoid = frozenset(call.avoid)
            # One that must be served alone had better meet a replica that has nothing to finish first.
            adapter, hints = (None, ()) if call.alone_tokens else (call.adapter, call.prefix_hints)
            order = rank(views, adapter, hints, avoid=avoid, weights=self._weights)
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

    def on_new_queue_len_info(self, replica_id: ReplicaID, num_ongoing_requests: int) -> None:
        """Called by Serve when a replica took a call."""
        self._heard.queue(replica_id.unique_id, time.monotonic())
        super().on_new_queue_len_info(replica_id, num_ongoing_requests)

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Called by Serve when it sends a call."""
        self._heard.queue(replica_id.unique_id, time.monotonic())
        super().on_send_request(replica_id)

    def _view(self, replica: RunningReplica, silent: frozenset[str]) -> ReplicaView:
        name = replica.replica_id.unique_id
        stats: dict[str, Any] = replica.routing_stats or {}
        # What this router sent since the last report. Older than that, the report knows better; ten quiet seconds, and
        # it is forgotten.
        queued = self.replica_queue_len_cache.get(replica.replica_id) if self._heard.believes_queue(name) else None
        return ReplicaView(
            replica_id=name,
            is_silent=name in silent,
            load=int(stats.get("load", 0)) if queued is None else queued,
            capacity=int(stats.get("capacity", 1)),
            resident=frozenset(stats.get("resident", ())),
            host=frozenset(stats.get("host", ())),
            prefixes=frozenset(stats.get("prefixes", ())),
        )
