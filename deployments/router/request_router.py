"""Serve's request router for the replicas: sends a call where it is aimed, and tells who runs. The choice is `Fleet`'s.

Serve pickles this module by value into every process that holds a handle, so it imports little, and keeps nothing that
others of the process must see: that is in `deployments.router.members`.
"""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from deployments.calls import Aim, Batch
from deployments.router import members

MAX_LEAVING = 64  # replicas without new calls that are remembered: their streams may run on for long


class AdapterRequestRouter(RequestRouter):
    """Tries the replicas that a batch is aimed at in their order; what is for one replica goes there or nowhere.

    One that Serve has taken off still serves its streams: what is for it alone reaches it, so that it is told who is
    there and who has left. New calls do not.

    Replicas that Serve does not know any more are skipped; where none is left, or nothing is aimed, any is asked, by
    least load as Serve knows it.
    """

    def initialize_state(self, **_: Any) -> None:
        """Called by Serve."""
        self._by_name: dict[str, RunningReplica] = {}
        self._leaving: dict[str, RunningReplica] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of one replica each, best first: Serve tries them in this order and backs off when all are full."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True
        asked = pending_request.args[0] if pending_request.args else None
        if isinstance(asked, Aim):
            leaving = self._leaving.get(asked.replica)
            return [[leaving]] if leaving is not None else [[each] for each in self._running((asked.replica,))]
        aimed = self._running(asked.aim) if isinstance(asked, Batch) else []
        return [[replica] for replica in aimed] or [candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve when replicas come and go."""
        running = {replica.replica_id.unique_id: replica for replica in replicas}
        known = self._leaving | self._by_name
        leaving = [name for name in known if name not in running][-MAX_LEAVING:]
        self._by_name, self._leaving = running, {name: known[name] for name in leaving}
        super().update_replicas(replicas)
        self._publish()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a call finds that a replica is dead, before its controller says so."""
        super().on_replica_actor_died(replica_id)
        self._by_name.pop(replica_id.unique_id, None)
        self._leaving.pop(replica_id.unique_id, None)
        self._publish()

    async def _select_from_candidate_replicas(
        self, candidates: list[RunningReplica], backoff_index: int
    ) -> RunningReplica | None:
        """Called by Serve, which knows none that it has taken off."""
        if self._leaving and candidates[0].replica_id.unique_id in self._leaving:
            return candidates[0]
        return await super()._select_from_candidate_replicas(candidates, backoff_index)

    def _running(self, names: tuple[str, ...]) -> list[RunningReplica]:
        """Those of `names` that run, with a queue that Serve takes for empty.

        Without a length of the last ten seconds Serve asks a replica for it, a round trip before each call to one that
        was quiet. The engine's own queue says no, by name, long before Serve's is full.
        """
        found = [self._by_name[name] for name in names if name in self._by_name]
        running = [replica for replica in found if replica.replica_id in self.curr_replicas]
        for replica in running:
            self.replica_queue_len_cache.update(replica.replica_id, 0)
        return running

    def _publish(self) -> None:
        members.publish(str(self._deployment_id), [replica_id.unique_id for replica_id in self.curr_replicas])
