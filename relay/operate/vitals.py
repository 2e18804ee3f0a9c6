"""What the looks at a relay come to: rates, latencies, what waits, what is wrong. Pure computation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from relay.operate.scrape import Scrape

_LATENCIES = {
    "accept": "relay_accept_duration_seconds",
    "spool_commit": "relay_spool_commit_duration_seconds",
    "publish": "relay_publish_duration_seconds",
    "end_to_end": "relay_end_to_end_duration_seconds",
}
_TRAFFIC = {
    "accepted": "relay_events_accepted_total",
    "duplicate": "relay_events_duplicate_total",
    "rejected": "relay_events_rejected_total",
    "published": "relay_events_published_total",
    "dead_lettered": "relay_events_dead_lettered_total",
}


@dataclass(frozen=True)
class Count:
    """A counter: all since the relay's start, and how fast it grew between the last two looks (None: there was one)."""

    total: int
    per_second: float | None


@dataclass(frozen=True)
class Latency:
    """Seconds, of what was done between the last two looks, as Prometheus reads quantiles; None: nothing was done."""

    p50: float | None
    p99: float | None
    #: The last bound of the buckets: a quantile that reads so is at least that.
    limit: float


@dataclass(frozen=True)
class Spool:
    """What waits."""

    events: int
    bytes: int
    #: 0: there is no spool, with RELAY_ACK=kafka.
    capacity_bytes: int
    oldest_event_age_seconds: float
    dead_events: int
    #: At the rate since the oldest event came, as far back as the looks go; None if it does not grow.
    seconds_until_full: float | None


@dataclass(frozen=True)
class Kafka:
    """The way to Kafka."""

    connected: bool
    error: str | None
    #: Only those that there were, by their error.
    publish_errors: Mapping[str, Count]
    producer_restarts: Count


@dataclass(frozen=True)
class Registry:
    """The way to the schema registry."""

    configured: bool
    connected: bool
    #: By subject.
    errors: Mapping[str, str]


@dataclass(frozen=True)
class Vitals:
    """A relay, now. Its fields are the keys of `relay top --once --json`."""

    version: str
    uptime_seconds: float
    draining: bool
    #: Why it cannot make an event durable now; None: it can.
    unready: str | None
    #: Seconds between the last two looks; None: there was one.
    interval_seconds: float | None
    traffic: Mapping[str, Count]
    latency_seconds: Mapping[str, Latency]
    spool: Spool
    kafka: Kafka
    registry: Registry
    #: Only those that there were, by their reason; invalid ones (RELAY_SCHEMA_VALIDATION=report) by their type.
    rejected: Mapping[str, Count]
    dead_letters: Mapping[str, Count]
    invalid: Mapping[str, Count]
    #: Deliveries by the token that they showed, in use or not: workspace/slot.
    tokens: Mapping[str, Count]


def same_run(earlier: Scrape, later: Scrape) -> bool:
    """Whether the same relay was met, without a restart in between: only then do their counters compare."""
    identities = (earlier.status["spool"]["identity"], later.status["spool"]["identity"])
    return identities[0] == identities[1] and bool(later.status["uptime_seconds"] >= later.at - earlier.at)


def vitals(looks: Sequence[Scrape]) -> Vitals:
    """What *looks*, all at the same run of a relay, oldest first, come to."""
    now = looks[-1]
    before = looks[-2] if len(looks) > 1 else None
    status: Mapping[str, Any] = now.status
    return Vitals(
        version=status["version"],
        uptime_seconds=status["uptime_seconds"],
        draining=status["draining"],
        unready=now.unready,
        interval_seconds=now.at - before.at if before else None,
        traffic={name: _count(before, now, metric) for name, metric in _TRAFFIC.items()},
        latency_seconds={name: _latency(before, now, metric) for name, metric in _LATENCIES.items()},
        spool=_spool(looks),
        kafka=Kafka(
            connected=status["kafka"]["connected"],
            error=status["kafka"]["error"],
            publish_errors=_that_were(_counts(before, now, "relay_publish_errors_total", "error")),
            producer_restarts=_count(before, now, "relay_producer_restarts_total"),
        ),
        registry=Registry(
            configured=status["registry"]["configured"],
            connected=status["registry"]["connected"],
            errors=status["registry"]["errors"],
        ),
        rejected=_that_were(_counts(before, now, "relay_events_rejected_total", "reason")),
        dead_letters=_that_were(_counts(before, now, "relay_events_dead_lettered_total", "reason")),
        invalid=_that_were(_counts(before, now, "relay_events_invalid_total", "type")),
        tokens=_counts(before, now, "relay_token_matches_total", "workspace", "slot"),
    )


def _count(before: Scrape | None, now: Scrape, name: str, **labels: str) -> Count:
    total = now.value(name, **labels)
    grown = total - before.value(name, **labels) if before else 0
    return Count(round(total), grown / (now.at - before.at) if before else None)


def _counts(before: Scrape | None, now: Scrape, name: str, *by: str) -> dict[str, Count]:
    having = [{label: labels[label] for label in by} for labels, _ in now.of(name)]
    return {"/".join(labels.values()): _count(before, now, name, **labels) for labels in having}


def _that_were(counts: Mapping[str, Count]) -> dict[str, Count]:
    return {name: count for name, count in counts.items() if count.total}


def _latency(before: Scrape | None, now: Scrape, name: str) -> Latency:
    # How many were at most that long, since the last look.
    within = {
        float(labels["le"]): value - (before.value(f"{name}_bucket", le=labels["le"]) if before else value)
        for labels, value in now.of(f"{name}_bucket")
    }
    limit = max((bound for bound in within if bound < math.inf), default=0.0)
    return Latency(quantile(0.5, within), quantile(0.99, within), limit)


def quantile(share: float, within: Mapping[float, float]) -> float | None:
    """
    The value below which *share* of what was observed lies, evenly spread in each bucket; None if nothing was.

    *within* says how many observations were at most each bound, infinity among them.
    """
    steps = sorted({0.0: 0.0, **within}.items())
    wanted = share * steps[-1][1]
    if not wanted:
        return None
    for (low, below), (high, up_to) in pairwise(steps):
        if up_to >= wanted:
            return low if math.isinf(high) else low + (high - low) * (wanted - below) / (up_to - below)
    raise AssertionError("The last bucket holds all.")


def _spool(looks: Sequence[Scrape]) -> Spool:
    now = looks[-1]
    age = now.value("relay_spool_oldest_event_age_seconds")
    used, capacity = now.value("relay_spool_bytes"), now.value("relay_spool_capacity_bytes")
    # Since then nothing has left it. Where only this look is so young, what comes is published: it breathes.
    since = next(look for look in looks if now.at - look.at <= age)
    grown = used - since.value("relay_spool_bytes")
    room = max(0.0, capacity - used)
    return Spool(
        events=round(now.value("relay_spool_events")),
        bytes=round(used),
        capacity_bytes=round(capacity),
        oldest_event_age_seconds=age,
        dead_events=round(now.value("relay_spool_dead_events")),
        seconds_until_full=room * (now.at - since.at) / grown if capacity and grown > 0 else None,
    )
