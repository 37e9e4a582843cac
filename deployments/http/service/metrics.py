"""What replicas say of themselves, for Prometheus: vLLM's names where gateways and load tools read them.

`vllm:lora_requests_info` names what is *loaded and ready* as running, as the gateway API's protocol means it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

MAX_NAMES = 64  # adapters that one series names
_GAUGES = {
    "vllm:num_requests_running": ("running", "Sequences that a replica computes."),
    "vllm:num_requests_waiting": ("waiting", "Sequences that wait for a replica."),
    "chorus:resident_adapters_bytes": ("resident_adapter_bytes", "Bytes of adapters on a replica's device."),
}
_COUNTERS = {
    "vllm:generation_tokens": ("total_generated_tokens", "Tokens generated."),
    "vllm:request_success": ("total_requests", "Requests that ended, however they did."),
    "vllm:num_preemptions": ("total_preemptions", "Sequences that gave their blocks back and began anew."),
    "vllm:prefix_cache_hits": ("total_prefix_hit_tokens", "Prompt tokens found in the prefix cache."),
    "vllm:prefix_cache_queries": ("total_prefix_lookup_tokens", "Prompt tokens looked up in the prefix cache."),
    "chorus:adapter_loads": ("total_adapter_loads", "Adapters copied to a device."),
    "chorus:adapter_evictions": ("total_adapter_evictions", "Adapters evicted from a device."),
}
_LABELS = ("model_name", "engine")


def exposition(model_id: str, said: Iterable[Mapping[str, Any]]) -> bytes:
    """`said`: of each replica, as GET /stats has it. One that says nothing has no series."""
    registry = CollectorRegistry()
    registry.register(_Collected(model_id, [part for part in said if isinstance(part.get("engine"), Mapping)]))
    return generate_latest(registry)


class _Collected:
    """One answer, as prometheus_client takes it."""

    def __init__(self, model_id: str, replicas: list[Mapping[str, Any]]) -> None:
        self._model_id = model_id
        self._replicas = replicas

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        for name, (field, told) in _GAUGES.items():
            yield self._filled(GaugeMetricFamily(name, told, labels=_LABELS), field)
        for name, (field, told) in _COUNTERS.items():
            yield self._filled(CounterMetricFamily(name, told, labels=_LABELS), field)
        usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", labels=_LABELS)
        adapters = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters ready on a device; the value is when.",
            labels=(*_LABELS, "max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        for part in self._replicas:
            engine, labels = part["engine"], self._labels(part)
            total = max(1, engine["num_blocks"])
            usage.add_metric(labels, 1 - engine["free_blocks"] / total)
            names = sorted(set(part.get("resident", ())))[:MAX_NAMES]
            adapters.add_metric([*labels, str(len(names)), ",".join(names), ""], time.time())
        yield usage
        yield adapters

    def _filled(self, family: Any, field: str) -> Metric:
        for part in self._replicas:
            family.add_metric(self._labels(part), part["engine"][field])
        metric: Metric = family
        return metric

    def _labels(self, part: Mapping[str, Any]) -> list[str]:
        return [self._model_id, str(part.get("replica", ""))]
