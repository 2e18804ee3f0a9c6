import platform
from typing import TypeVar

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from relay import __version__, errors
from relay.errors import KafkaLost, Rejected
from relay.event import EVENT_TYPES, DeadLetterReason
from relay.metrics import Metrics

TYPES = [*EVENT_TYPES, "unknown"]

# Section 8 of the contract: name -> kind, and every label set that is there from the start.
CONTRACT: dict[str, tuple[str, list[dict[str, str]]]] = {
    "relay_http_requests": (
        "counter",
        [{"code": code} for code in ("200", "400", "401", "404", "405", "413", "500", "503")],
    ),
    "relay_events_accepted": ("counter", [{"workspace": "acme", "type": name} for name in TYPES]),
    "relay_events_rejected": (
        "counter",
        [
            {"reason": reason}
            for reason in (
                "bad_token",
                "bad_json",
                "too_large",
                "spool_full",
                "spool_error",
                "kafka_unavailable",
                "draining",
                "client_disconnected",
            )
        ],
    ),
    "relay_events_duplicate": ("counter", [{"workspace": "acme"}]),
    "relay_events_published": ("counter", [{"topic": "events"}, {"topic": "dead"}]),
    "relay_events_dead_lettered": (
        "counter",
        [{"reason": reason} for reason in ("unknown_type", "schema", "no_key", "rejected_by_kafka")],
    ),
    "relay_events_invalid": ("counter", [{"type": name} for name in EVENT_TYPES]),
    "relay_test_deliveries": ("counter", [{}]),
    "relay_token_matches": ("counter", [{"workspace": "acme", "slot": "1"}, {"workspace": "acme", "slot": "2"}]),
    "relay_accept_duration_seconds": ("histogram", [{}]),
    "relay_spool_commit_duration_seconds": ("histogram", [{}]),
    "relay_publish_duration_seconds": ("histogram", [{}]),
    "relay_end_to_end_duration_seconds": ("histogram", [{}]),
    "relay_spool_events": ("gauge", [{}]),
    "relay_spool_bytes": ("gauge", [{}]),
    "relay_spool_capacity_bytes": ("gauge", [{}]),
    "relay_spool_oldest_event_age_seconds": ("gauge", [{}]),
    "relay_spool_dead_events": ("gauge", [{}]),
    "relay_kafka_connected": ("gauge", [{}]),
    "relay_registry_connected": ("gauge", [{}]),
    "relay_publish_errors": (
        "counter",
        [
            {"error": error}
            for error in (
                "unreachable",
                "timeout",
                "denied",
                "topic_missing",
                "no_leader",
                "fenced",
                "refused",
                "other",
            )
        ],
    ),
    "relay_producer_restarts": ("counter", [{}]),
    "relay_build_info": ("gauge", [{"version": __version__, "python": platform.python_version()}]),
}


Kind = TypeVar("Kind", bound=errors.RelayError)


def subclasses(kind: type[Kind]) -> list[type[Kind]]:
    return [kind, *(below for direct in kind.__subclasses__() for below in subclasses(direct))]


@pytest.fixture
def of_acme(metrics: Metrics) -> Metrics:
    metrics.add_workspace("acme", 2)
    metrics.add_topics(["events", "dead"])
    return metrics


def families(metrics: Metrics) -> dict[str, tuple[str, list[tuple[dict[str, str], float]]]]:
    text = generate_latest(metrics.registry).decode()
    return {
        family.name: (
            family.type,
            [
                ({name: value for name, value in sample.labels.items() if name != "le"}, sample.value)
                for sample in family.samples
            ],
        )
        for family in text_string_to_metric_families(text)
    }


@pytest.mark.parametrize("name", CONTRACT)
def test_a_metric_of_the_contract_is_there_from_the_start(of_acme: Metrics, name: str) -> None:
    kind, label_sets = CONTRACT[name]
    found_kind, samples = families(of_acme)[name]
    assert found_kind == kind
    found = [labels for labels, _ in samples]
    if kind == "histogram":
        found = [{}] if all(not labels for labels in found) else found
    assert sorted(map(str, map(sorted, (labels.items() for labels in found)))) == sorted(
        map(str, map(sorted, (labels.items() for labels in label_sets)))
    )
    if name != "relay_build_info":
        assert {value for _, value in samples} == {0.0}


def test_a_type_that_a_schema_adds_is_there_from_the_start() -> None:
    metrics = Metrics(CollectorRegistry(), [*EVENT_TYPES, "Survey"])
    metrics.add_workspace("acme", 1)
    assert ({"workspace": "acme", "type": "Survey"}, 0.0) in families(metrics)["relay_events_accepted"][1]
    assert ({"type": "Survey"}, 0.0) in families(metrics)["relay_events_invalid"][1]


def test_there_is_no_metric_beyond_the_contract(of_acme: Metrics) -> None:
    assert set(families(of_acme)) == set(CONTRACT)


def test_the_build_is_told(metrics: Metrics) -> None:
    assert families(metrics)["relay_build_info"][1][0][1] == 1.0


@pytest.mark.parametrize(
    "kind",
    [kind for kind in subclasses(Rejected) if kind not in {Rejected, errors.Unavailable}],
    ids=lambda kind: kind.__name__,
)
def test_every_rejection_is_counted_under_a_reason_of_the_contract(metrics: Metrics, kind: type[Rejected]) -> None:
    metrics.reject(kind())
    assert [labels for labels, value in families(metrics)["relay_events_rejected"][1] if value] == [
        {"reason": kind.reason}
    ]
    assert {"reason": kind.reason} in CONTRACT["relay_events_rejected"][1]


@pytest.mark.parametrize("kind", subclasses(KafkaLost), ids=lambda kind: kind.__name__)
def test_every_loss_of_kafka_is_counted_under_a_known_error(metrics: Metrics, kind: type[KafkaLost]) -> None:
    metrics.publish_failed(kind())
    assert [labels for labels, value in families(metrics)["relay_publish_errors"][1] if value] == [
        {"error": kind.label}
    ]
    assert {"error": kind.label} in CONTRACT["relay_publish_errors"][1]


def test_no_label_value_comes_up_later_than_at_the_start(of_acme: Metrics) -> None:
    before = families(of_acme)
    for name in TYPES:
        of_acme.events_accepted.labels("acme", name).inc()
    for reason in DeadLetterReason:
        of_acme.events_dead_lettered.labels(reason).inc()
    after = families(of_acme)
    assert {name: len(samples) for name, (_, samples) in before.items()} == {
        name: len(samples) for name, (_, samples) in after.items()
    }


def test_telling_a_workspace_again_resets_nothing(of_acme: Metrics) -> None:
    of_acme.events_accepted.labels("acme", "Message").inc()
    of_acme.token_matches.labels("acme", "1").inc()
    of_acme.add_workspace("acme", 3)
    found = families(of_acme)
    assert ({"workspace": "acme", "type": "Message"}, 1.0) in found["relay_events_accepted"][1]
    assert ({"workspace": "acme", "slot": "1"}, 1.0) in found["relay_token_matches"][1]
    assert ({"workspace": "acme", "slot": "3"}, 0.0) in found["relay_token_matches"][1]


@pytest.mark.parametrize("name", [name for name, (kind, _) in CONTRACT.items() if kind == "histogram"])
def test_a_duration_s_buckets_hold_both_the_usual_and_the_bad(metrics: Metrics, name: str) -> None:
    text = generate_latest(metrics.registry).decode()
    bounds = [
        float(line.split('le="')[1].split('"')[0]) for line in text.splitlines() if line.startswith(f"{name}_bucket")
    ]
    assert bounds == sorted(bounds)
    assert bounds[0] <= 0.01
    assert bounds[-2] >= 5
