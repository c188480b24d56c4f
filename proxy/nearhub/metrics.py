"""Every counter, gauge and histogram, named and explained here and nowhere else. Bumped where the event happens."""

from __future__ import annotations

from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


@dataclass(frozen=True, slots=True)
class Metrics:
    """One set per process, handed down from app.py."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    requests: Counter = field(init=False)
    _by_answer: dict[tuple[str, str], Counter] = field(init=False, default_factory=dict)
    upstream_bytes: Counter = field(init=False)
    upstream_requests: Counter = field(init=False)
    fills: Counter = field(init=False)
    fills_active: Gauge = field(init=False)
    readers_active: Gauge = field(init=False)
    mismatches: Counter = field(init=False)
    alarms: Counter = field(init=False)
    evicted_blobs: Counter = field(init=False)
    evicted_bytes: Counter = field(init=False)
    streamed_through: Counter = field(init=False)
    git_fetches: Counter = field(init=False)
    upstream_contacts: Counter = field(init=False)
    offline: Gauge = field(init=False)
    git_sessions: Gauge = field(init=False)
    cache_bytes: Gauge = field(init=False)
    cache_limit: Gauge = field(init=False)
    audit_lost: Counter = field(init=False)
    connections: Gauge = field(init=False)
    connections_refused: Counter = field(init=False)

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
        put("evicted_blobs", counter("evicted_blobs", "Blobs that left to make room."))
        put("evicted_bytes", counter("evicted_bytes", "Bytes on disk that they had."))
        put("streamed_through", counter("streamed_through", "Responses that stored nothing, by why.", "detail"))
        put("git_fetches", counter("git_fetches", "Times that upstream was asked for a repo's git objects, by how.", "outcome"))
        contacts = "Attempts to reach a host outside: DNS questions, connections, runs of git."
        put("upstream_contacts", counter("upstream_contacts", contacts, "kind"))
        put("offline", Gauge("nearhub_offline", "1 while this mirror is offline.", registry=self.registry))
        put("git_sessions", Gauge("nearhub_git_sessions", "Clones and fetches being answered.", registry=self.registry))
        put("cache_bytes", Gauge("nearhub_cache_bytes", "Bytes of blobs on disk.", registry=self.registry))
        put("cache_limit", Gauge("nearhub_cache_limit_bytes", "Their limit; 0: only the disk's.", registry=self.registry))
        put("audit_lost", counter("audit_lost", "Answers that the audit could not keep."))
        put("connections", Gauge("nearhub_connections", "Open connections of clients.", registry=self.registry))
        put("connections_refused", counter("connections_refused", "Connections refused or cut: limits, slow heads.", "why"))
        put("fills_active", Gauge("nearhub_fills_active", "Fills under way.", registry=self.registry))
        put("readers_active", Gauge("nearhub_readers_active", "Responses reading a blob.", registry=self.registry))

    def count_request(self, status: str, cache: str) -> None:
        """As requests.labels(…).inc(), which looks the labels up anew each time."""
        child = self._by_answer.get((status, cache))
        if child is None:
            child = self._by_answer[status, cache] = self.requests.labels(status, cache)
        child.inc()

    def text(self) -> bytes:
        """Prometheus text exposition."""
        return generate_latest(self.registry)
