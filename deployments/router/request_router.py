"""Serve's request router for the replicas: sends a call where it is aimed, and tells who runs. The choice is `Fleet`'s.

Serve pickles this module by value into every process that holds a handle, so it imports little.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.router import members


class AdapterRequestRouter(RequestRouter):
    """Tries the replicas of a call's aim in their order: the keyword `aim`, or `aim` of its first argument.

    An aim is a tuple of replica ids. Those that Serve does not know any more are skipped; where none is left, or
    nothing is aimed, any replica is asked, by least load as Serve knows it.
    """

    def initialize_state(self, **_: Any) -> None:
        """Called by Serve."""
        self._by_name: dict[str, RunningReplica] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of one replica each, best first: Serve tries them in this order and backs off when all are full."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        running = self.curr_replicas
        known = (self._by_name.get(name) for name in _aim(pending_request))
        aimed = [replica for replica in known if replica is not None and replica.replica_id in running]
        for replica in aimed:
            # Without an entry of the last ten seconds Serve asks the replica for the length of its queue first, a round
            # trip before each call to one that was quiet. The engine's own queue says no, by name, long before Serve's.
            self.replica_queue_len_cache.update(replica.replica_id, 0)
        return [[replica] for replica in aimed] or [candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas come and go."""
        self._by_name = {replica.replica_id.unique_id: replica for replica in replicas}
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a call finds that a replica is dead, before its controller says so."""
        super().on_replica_actor_died(replica_id)
        self._publish()

    def _publish(self) -> None:
        members.publish(str(self._deployment_id), [replica_id.unique_id for replica_id in self.curr_replicas])


def _aim(pending_request: PendingRequest) -> tuple[str, ...]:
    aim = pending_request.kwargs.get("aim")
    if aim is None and pending_request.args:
        aim = getattr(pending_request.args[0], "aim", None)
    return tuple(aim or ())
