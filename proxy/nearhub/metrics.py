"""Every counter, gauge and histogram, named and explained here and nowhere else. Bumped where the event happens."""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


@dataclass(frozen=True, slots=True)
class Metrics:
    """One set per process, handed down from app.py."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: Counter = field(init=False)
    upstream_bytes: Counter = field(init=False)
    upstream_requests: Counter = field(init=False)
    fills: Counter = field(init=False)
    fills_active: Gauge = field(init=False)
    readers_active: Gauge = field(init=False)
    mismatches: Counter = field(init=False)
    alarms: Counter = field(init=False)

    def __post_init__(self) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"nearhub_{name}", text, labels, registry=self.registry)

        def put(name: str, metric: object) -> None:
            object.__setattr__(self, name, metric)

        put("requests", counter("requests", "Answers sent, by status and Cache-Status word.", "status", "cache"))
        put("upstream_bytes", counter("upstream_bytes", "Body bytes received from upstreams.", "kind"))
        put("upstream_requests", counter("upstream_requests", "Requests sent to upstreams.", "kind"))
        put("fills", counter("fills", "Fills ended, by how.", "outcome"))
        put("mismatches", counter("mismatches", "Blobs that failed verification and went to quarantine."))
        put("alarms", counter("alarms", "A commit's content named differently than before (P11)."))
        put("fills_active", Gauge("nearhub_fills_active", "Fills under way.", registry=self.registry))
        put("readers_active", Gauge("nearhub_readers_active", "Responses reading a blob.", registry=self.registry))

    def text(self) -> bytes:
        """Prometheus text exposition."""
        return generate_latest(self.registry)
