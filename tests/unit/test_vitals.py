import math
from collections.abc import Callable, Iterator

import pytest

from relay.errors import BadToken
from relay.metrics import Metrics
from relay.operate.scrape import Scrape
from relay.operate.vitals import Count, quantile, same_run, vitals

Look = Callable[..., Scrape]


@pytest.fixture
def look(metrics: Metrics) -> Look:
    """Return a function that looks at a relay with these metrics, *at* seconds after its start."""
    metrics.add_workspace("default", 2)
    metrics.add_topics(["events"])

    def take(at: float, *, uptime: float | None = None, identity: str = "spool-1", unready: str = "") -> Scrape:
        status = {
            "version": "1.2.3",
            "uptime_seconds": at if uptime is None else uptime,
            "draining": False,
            "kafka": {"connected": False, "error": "nobody is there", "since": 7},
            "registry": {"configured": True, "connected": False, "errors": {"a-subject": "refused"}, "since": 7},
            "spool": {"identity": identity},
        }
        samples = (sample for family in metrics.registry.collect() for sample in family.samples)
        series = {(it.name, tuple(sorted(it.labels.items()))): it.value for it in samples}
        return Scrape(at, status, unready or None, series)

    return take


def test_rates_are_of_the_last_interval_and_totals_since_the_start(metrics: Metrics, look: Look) -> None:
    metrics.events_accepted.labels("default", "Message").inc(1000)
    first = look(10)
    metrics.events_accepted.labels("default", "Message").inc(6)
    second = look(12)
    metrics.events_accepted.labels("default", "Message").inc(30)
    metrics.events_accepted.labels("default", "LivechatSession").inc(2)

    seen = vitals([first, second, look(16)])

    assert seen.traffic["accepted"] == Count(1038, 8.0)
    assert seen.traffic["published"] == Count(0, 0.0)
    assert seen.interval_seconds == 4


def test_one_look_makes_no_rate_and_no_latency(metrics: Metrics, look: Look) -> None:
    metrics.events_accepted.labels("default", "Message").inc(3)
    metrics.accept_duration.observe(0.003)

    seen = vitals([look(10)])

    assert seen.traffic["accepted"] == Count(3, None)
    assert (seen.latency_seconds["accept"].p50, seen.interval_seconds) == (None, None)


def test_latencies_are_of_the_last_interval(metrics: Metrics, look: Look) -> None:
    for _ in range(1000):
        metrics.accept_duration.observe(4)
    before = look(10)
    for milliseconds in (6, 7, 8, 9, 80):
        metrics.accept_duration.observe(milliseconds / 1000)

    latency = vitals([before, look(12)]).latency_seconds["accept"]

    assert latency.p50 == pytest.approx(0.005 + 0.005 * 2.5 / 4)  # Four of five are from 5 to 10 ms.
    assert latency.p99 == pytest.approx(0.05 + 0.05 * 0.95)
    assert latency.limit == 5


@pytest.mark.parametrize(
    ("share", "within", "value"),
    [
        (0.5, {1.0: 0, 2.0: 10, math.inf: 10}, 1.5),
        (0.5, {1.0: 10, 2.0: 10, math.inf: 10}, 0.5),
        (0.99, {1.0: 10, 2.0: 10, math.inf: 100}, 2.0),
        (1.0, {1.0: 1, 2.0: 2, math.inf: 2}, 2.0),
        (0.5, {1.0: 0, math.inf: 0}, None),
        (0.5, {}, None),
    ],
)
def test_quantiles_are_as_prometheus_reads_them(share: float, within: dict[float, float], value: float | None) -> None:
    assert quantile(share, within) == value


def test_only_rejects_dead_letters_and_errors_that_there_were_are_named(metrics: Metrics, look: Look) -> None:
    metrics.events_dead_lettered.labels("schema").inc()
    metrics.events_invalid.labels("Message").inc()
    before = look(10)
    metrics.reject(BadToken())
    metrics.publish_errors.labels("denied").inc(4)
    metrics.producer_restarts.inc()

    seen = vitals([before, look(12)])

    assert seen.rejected == {"bad_token": Count(1, 0.5)}
    assert seen.dead_letters == {"schema": Count(1, 0.0)}
    assert seen.invalid == {"Message": Count(1, 0.0)}
    assert seen.kafka.publish_errors == {"denied": Count(4, 2.0)}
    assert seen.kafka.producer_restarts == Count(1, 0.5)


def test_every_token_is_there_with_its_use(metrics: Metrics, look: Look) -> None:
    before = look(10)
    metrics.token_matches.labels("default", "2").inc(4)

    assert vitals([before, look(12)]).tokens == {"default/1": Count(0, 0.0), "default/2": Count(4, 2.0)}


def test_what_the_relay_says_of_its_peers_and_of_itself_is_passed_on(look: Look) -> None:
    seen = vitals([look(10, unready="The spool is full.")])

    assert (seen.kafka.connected, seen.kafka.error) == (False, "nobody is there")
    assert (seen.registry.configured, seen.registry.connected) == (True, False)
    assert seen.registry.errors == {"a-subject": "refused"}
    assert (seen.version, seen.uptime_seconds, seen.unready) == ("1.2.3", 10, "The spool is full.")


def test_the_spool_is_full_when_its_room_is_used_up_at_the_rate_since_events_began_to_wait(
    metrics: Metrics, look: Look
) -> None:
    metrics.spool_capacity_bytes.set(1000)
    looks = []
    for at, used, age in ((0, 100, 0.1), (10, 100, 0.1), (20, 200, 9), (30, 400, 19)):
        metrics.spool_bytes.set(used)
        metrics.spool_oldest_event_age.set(age)
        looks.append(look(at))

    spool = vitals(looks).spool

    assert (spool.bytes, spool.capacity_bytes, spool.oldest_event_age_seconds) == (400, 1000, 19)
    assert spool.seconds_until_full == pytest.approx(600 / 20)


@pytest.mark.parametrize(
    ("used", "age", "seconds"),
    [
        (400, 0.2, None),  # What comes is published: the file grows by chance.
        (200, 60, None),  # It does not grow.
        (100, 60, None),  # It empties.
        (1100, 60, 0),  # It is full.
    ],
)
def test_a_spool_that_does_not_fill_is_never_full(
    metrics: Metrics, look: Look, used: int, age: float, seconds: float | None
) -> None:
    metrics.spool_capacity_bytes.set(1000)
    metrics.spool_oldest_event_age.set(age)
    metrics.spool_bytes.set(200)
    before = look(10)
    metrics.spool_bytes.set(used)

    assert vitals([before, look(12)]).spool.seconds_until_full == seconds


def test_memory_is_never_full(metrics: Metrics, look: Look) -> None:
    metrics.spool_oldest_event_age.set(60)
    before = look(10)
    metrics.spool_bytes.set(400)

    assert vitals([before, look(12)]).spool.seconds_until_full is None


def test_counters_of_a_restarted_relay_or_of_another_one_are_not_compared(look: Look) -> None:
    assert same_run(look(10), look(12))
    assert not same_run(look(10), look(12, uptime=1.5))
    assert not same_run(look(10), look(12, identity="spool-2"))


def test_every_series_that_is_read_exists(look: Look) -> None:
    # One that was renamed would read as 0.
    asked: set[str] = set()

    class Asked(Scrape):
        def of(self, name: str) -> Iterator[tuple[dict[str, str], float]]:
            asked.add(name)
            return super().of(name)

    seen = look(10)
    vitals([Asked(seen.at, seen.status, seen.unready, seen.series)])

    assert len(asked) > 15
    assert asked <= {name for name, _ in seen.series}
