"""Every collector of the relay, built once, with every label value present from the start."""

import platform
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.metrics import MetricWrapperBase

from relay import __version__
from relay.errors import KafkaLost, Rejected
from relay.event import EVENT_TYPES, UNKNOWN_TYPE, DeadLetterReason

HTTP_CODES = ("200", "400", "401", "404", "405", "413", "500", "503")
REJECT_REASONS = (
    "bad_token",
    "bad_json",
    "too_large",
    "spool_full",
    "spool_error",
    "kafka_unavailable",
    "draining",
    "client_disconnected",
)
PUBLISH_ERRORS = ("unreachable", "timeout", "denied", "topic_missing", "no_leader", "fenced", "refused", "other")
#: From an answer out of memory to the sender's patience.
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_LONG_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)


class Metrics:
    """The collectors; names and labels are API."""

    def __init__(self, registry: CollectorRegistry | None = None, types: Iterable[str] = EVENT_TYPES) -> None:
        """On *registry*, or for nobody to see; *types* are the names of the known types of event."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # A second series for each of these tells nobody anything.
        self.registry = registry or CollectorRegistry()
        self._types = (*types, UNKNOWN_TYPE)
        self._children: dict[tuple[Counter, tuple[str, ...]], Counter] = {}
        self.http_requests = self._counter("http_requests", "Requests to the webhook port, by status", "code")
        self.events_accepted = self._counter("events_accepted", "Events made durable", "workspace", "type")
        self.events_rejected = self._counter("events_rejected", "Deliveries not accepted", "reason")
        self.events_duplicate = self._counter("events_duplicate", "Retries of accepted deliveries", "workspace")
        self.events_published = self._counter("events_published", "Events committed in Kafka", "topic")
        self.events_dead_lettered = self._counter(
            "events_dead_lettered", "Events committed to the dead-letter topic", "reason"
        )
        self.events_invalid = self._counter(
            "events_invalid", "Invalid events published with RELAY_SCHEMA_VALIDATION=report", "type"
        )
        self.test_deliveries = self._counter("test_deliveries", "Presses of Rocket.Chat's test button")
        self.token_matches = self._counter(
            "token_matches", "Deliveries by the token they showed: its place among the valid ones", "workspace", "slot"
        )
        self.accept_duration = self._histogram("accept_duration", "Request received to answer ready", _SECONDS)
        self.spool_commit_duration = self._histogram("spool_commit_duration", "One fsynced transaction", _SECONDS)
        self.publish_duration = self._histogram("publish_duration", "One Kafka transaction", _SECONDS)
        self.end_to_end_duration = self._histogram(
            "end_to_end_duration", "Event accepted to committed in Kafka", _LONG_SECONDS
        )
        self.spool_events = self._gauge("spool_events", "Events in the spool that are not yet on Kafka")
        self.spool_bytes = self._gauge("spool_bytes", "Bytes of the spool file in use")
        self.spool_capacity_bytes = self._gauge("spool_capacity_bytes", "RELAY_SPOOL_MAX_BYTES")
        self.spool_oldest_event_age = self._gauge(
            "spool_oldest_event_age_seconds", "Age of the oldest event that is not yet on Kafka"
        )
        self.spool_dead_events = self._gauge("spool_dead_events", "Events in the spool that the broker refused")
        self.kafka_connected = self._gauge("kafka_connected", "Whether a producer works (1) or not (0)")
        self.registry_connected = self._gauge(
            "registry_connected", "Whether the schema ids are known (1) or not (0); 0 without a registry"
        )
        self.publish_errors = self._counter("publish_errors", "Failed publish cycles and producer starts", "error")
        self.producer_restarts = self._counter(
            "producer_restarts", "Producers that had started and were lost to an error"
        )
        self._gauge("build_info", "Always 1", "version", "python").labels(__version__, platform.python_version()).set(1)

        _present(self.http_requests, HTTP_CODES)
        _present(self.events_rejected, REJECT_REASONS)
        _present(self.events_dead_lettered, DeadLetterReason)
        _present(self.events_invalid, types)
        _present(self.publish_errors, PUBLISH_ERRORS)

    def add_workspace(self, workspace: str, slots: int) -> None:
        """Makes the label values of *workspace*, with this many valid tokens, present."""
        for type_name in self._types:
            self.events_accepted.labels(workspace, type_name)
        self.events_duplicate.labels(workspace)
        for slot in range(slots):
            self.token_matches.labels(workspace, str(slot + 1))

    def add_topics(self, topics: Iterable[str]) -> None:
        """Makes the label values of *topics* present."""
        _present(self.events_published, topics)

    def count(self, counter: Counter, *labels: str) -> None:
        """Adds one to *counter*, which looks its labels up at four times the price."""
        child = self._children.get((counter, labels))
        if child is None:
            child = self._children[counter, labels] = counter.labels(*labels)
        child.inc()

    def reject(self, error: Rejected) -> None:
        """Counts a delivery that was not accepted."""
        self.events_rejected.labels(error.reason).inc()

    def publish_failed(self, error: KafkaLost) -> None:
        """Counts a failed cycle or producer start."""
        self.publish_errors.labels(error.label).inc()

    def _counter(self, name: str, documentation: str, *labels: str) -> Counter:
        return Counter(f"relay_{name}", documentation, labels, registry=self.registry)

    def _gauge(self, name: str, documentation: str, *labels: str) -> Gauge:
        return Gauge(f"relay_{name}", documentation, labels, registry=self.registry)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"relay_{name}_seconds", documentation, buckets=buckets, registry=self.registry)


def _present(metric: MetricWrapperBase, values: Iterable[str]) -> None:
    for value in values:
        metric.labels(value)
