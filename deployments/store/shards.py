"""What several shards of the adapter store say, as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from adapter_store.records import AdapterRecord, StoreStatus

# The leader counts all that is registered; all shards have the sources and are told the specs.
_OF_THE_LEADER = {"num_registered", "sources"}


def merged_status(statuses: Sequence[StoreStatus]) -> StoreStatus:
    """Sums; of `num_specs` the most, of `uptime_s` the least, `degraded` if one is. The first is the leader's."""
    first = statuses[0]
    if len(statuses) == 1:
        return first
    changed: dict[str, object] = {
        "num_specs": max(status.num_specs for status in statuses),
        "uptime_s": min(status.uptime_s for status in statuses),
        "degraded": tuple(dict.fromkeys(tier for status in statuses for tier in status.degraded)),
    }
    for field in fields(StoreStatus):
        if field.name not in changed and field.name not in _OF_THE_LEADER:
            changed[field.name] = sum(getattr(status, field.name) for status in statuses)
    return replace(first, **changed)  # type: ignore[arg-type]


def merged_warm_set(sets: Sequence[tuple[AdapterRecord, ...]], budget_bytes: int) -> tuple[AdapterRecord, ...]:
    """Pinned ones, then by requests: as many as fit into `budget_bytes`."""
    if len(sets) == 1:
        return sets[0]
    chosen = []
    for record in sorted(
        (record for records in sets for record in records), key=lambda record: (not record.is_pinned, -record.requests)
    ):
        if (record.num_bytes or 0) <= budget_bytes:
            budget_bytes -= record.num_bytes or 0
            chosen.append(record)
    return tuple(chosen)
