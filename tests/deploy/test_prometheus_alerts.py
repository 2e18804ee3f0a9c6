"""Each alert fires in a real Prometheus when its fault is made in a real relay, and clears when that is mended."""

import random
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from acceptance.secured import make_topics, ways_in
from conftest import OwnKafka
from deploy.prometheus_for_tests import (
    RULES,
    Prometheus,
    chatting,
    deliver,
    events,
    hurried,
    needs_prometheus,
    repeating,
    running_relay,
    target,
)
from kafka_for_tests import FoundKafka
from relay_process import TOKEN, RelayProcess
from secured_kafka import PASSWORD, USER, SecuredKafka, shipped_acls

from relay.dev.kafka_runtime import Runtime
from relay.dev.registry import LocalRegistry

pytestmark = needs_prometheus

RULES_TEXT = RULES.read_text()
OLD_TOKEN = "the-token-before"

Start = Callable[..., RelayProcess]
Watch = Callable[..., Prometheus]


@pytest.fixture
def start(tmp_path: Path, request: pytest.FixtureRequest, topic_name: str) -> Iterator[Start]:
    """Yield a function that starts a relay with topics of its own, on *kafka* or the one that all tests share."""
    with ExitStack() as stack:

        def started(name: str = "relay", kafka: str | None = None, **settings: str) -> RelayProcess:
            servers = kafka or request.getfixturevalue("kafka").bootstrap_servers
            return stack.enter_context(running_relay(tmp_path / name, servers, topic_name, **settings))

        yield started


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    """Yield a function that starts a Prometheus on relays, with the rules hurried, and waits until it has seen them."""
    with ExitStack() as stack:

        def watching(*relays: RelayProcess, ranges: str = "10s") -> Prometheus:
            # The one wait in the rules that is neither a range nor a `for`.
            rules = hurried(RULES_TEXT, ranges=ranges, replacing={"_age_seconds > 300": "_age_seconds > 3"})
            prometheus = stack.enter_context(Prometheus(tmp_path, [target(relay) for relay in relays], rules))
            if relays:  # Until it first scrapes it knows of none.
                prometheus.wait_until_quiet("RelayDown")
            return prometheus

        yield watching


@contextmanager
def locked(spool: Path, *, seconds: float) -> Iterator[None]:
    """Meanwhile another program locks the spool's file again and again, for so many seconds each time."""
    over = threading.Event()
    with closing(sqlite3.connect(spool, timeout=30, isolation_level=None, check_same_thread=False)) as connection:

        def hold() -> None:
            connection.execute("BEGIN IMMEDIATE")
            over.wait(seconds)
            connection.execute("ROLLBACK")

        with repeating(hold, 0.3):
            try:
                yield
            finally:
                over.set()


def test_nothing_fires_while_all_works(start: Start, watch: Watch) -> None:
    relay = start()
    prometheus = watch(relay)
    prometheus.wait_until_quiet()  # Kafka counts as away until the first connection.
    begun = time.monotonic()
    with chatting(relay, rate=50):
        prometheus.wait_until_there_is("sum(relay_events_published_total) > 1000")
    seconds = time.monotonic() - begun
    assert prometheus.query_range('ALERTS{alertstate="firing"}', seconds) == []


def test_kafka_stopped(start: Start, watch: Watch, own_kafka: OwnKafka) -> None:
    kafka = own_kafka()
    relay = start(kafka=kafka.bootstrap_servers, RELAY_MAX_BODY_BYTES="100000", RELAY_SPOOL_MAX_BYTES="2000000")
    prometheus = watch(relay)
    with chatting(relay, rate=40):
        prometheus.wait_until_there_is("sum(relay_events_published_total) > 50")
        prometheus.wait_until_quiet()
        kafka.brokers[0].stop()
        prometheus.wait_for("RelayKafkaAway", "RelaySpoolOld", "RelaySpoolFillsUp")
        assert "RelaySpoolFull" not in prometheus.firing()
        prometheus.wait_for("RelayKafkaAway", "RelaySpoolOld", "RelaySpoolFull")
        kafka.brokers[0].start()
        prometheus.wait_until_quiet()


def test_kafka_stopped_without_a_spool(start: Start, watch: Watch, own_kafka: OwnKafka) -> None:
    kafka = own_kafka()
    relay = start(kafka=kafka.bootstrap_servers, RELAY_ACK="kafka")
    prometheus = watch(relay)
    with chatting(relay):
        prometheus.wait_until_there_is("sum(relay_events_published_total) > 20")
        prometheus.wait_until_quiet()
        kafka.brokers[0].stop()
        assert prometheus.wait_for("RelayKafkaAway", "RelayCannotStore")["reason"] == "kafka_unavailable"
        assert not {"RelaySpoolFull", "RelaySpoolFillsUp"} & prometheus.firing().keys()
        kafka.brokers[0].start()
        prometheus.wait_until_quiet()


def test_full_disk(start: Start, watch: Watch) -> None:
    relay = start()
    prometheus = watch(relay)
    with chatting(relay):
        relay.limit_file_size(relay.spool_path.stat().st_size)
        assert prometheus.wait_for("RelayCannotStore")["reason"] == "spool_error"
        relay.limit_file_size(-1)
        prometheus.wait_until_quiet()


def test_slow_disk(start: Start, watch: Watch) -> None:
    relay = start()
    prometheus = watch(relay)
    with chatting(relay):
        with locked(relay.spool_path, seconds=0.6):
            prometheus.wait_for("RelayFsyncSlow")
        prometheus.wait_until_quiet()


def test_wrong_token(start: Start, watch: Watch) -> None:
    relay = start()
    prometheus = watch(relay)
    with chatting(relay, token="wrong"):
        prometheus.wait_for("RelayBadTokens")
    prometheus.wait_until_quiet()


@pytest.mark.parametrize(
    ("body", "answer", "reason"), [(b"no JSON", 400, "bad_json"), (b'{"a": "' + b"x" * 9000 + b'"}', 413, "too_large")]
)
def test_delivery_that_is_refused(start: Start, watch: Watch, body: bytes, answer: int, reason: str) -> None:
    relay = start(RELAY_MAX_BODY_BYTES="9000")
    prometheus = watch(relay)
    assert deliver(relay, body) == answer
    assert prometheus.wait_for("RelayRejects")["reason"] == reason
    prometheus.wait_until_quiet()


def test_rocketchat_falls_silent(start: Start, watch: Watch) -> None:
    relay = start()
    prometheus = watch(relay)
    with chatting(relay):
        prometheus.wait_until_there_is("sum(relay_events_accepted_total) > 100")
    assert prometheus.wait_for("RelayNoEvents")["workspace"] == "default"
    with chatting(relay):
        prometheus.wait_until_quiet()


def test_missing_topics(start: Start, watch: Watch, kafka: FoundKafka, topic_name: str) -> None:
    relay = start(RELAY_TOPIC_CREATE="false")
    prometheus = watch(relay, ranges="30s")
    assert prometheus.wait_for("RelayKafkaAway", "RelayPublishErrors")["error"] == "topic_missing"
    kafka.create_topics(topic_name, f"{topic_name}.dead", f"{topic_name}.watermarks")
    prometheus.wait_until_quiet()


def test_right_that_is_taken_away(
    start: Start, watch: Watch, kafka_runtime: Runtime, topic_name: str, tmp_path: Path
) -> None:
    with SecuredKafka(tmp_path, kafka_runtime) as secured:
        secured.add_user(USER, PASSWORD)
        topic = make_topics(secured, topic_name, USER)
        names = {"RELAY_TOPIC": topic, "RELAY_DEAD_LETTER_TOPIC": f"{topic}.dead-letter", "RELAY_TOPIC_CREATE": "false"}
        relay = start(**ways_in(secured)["SCRAM-SHA-512"], **names, RELAY_WATERMARK_TOPIC=f"{topic}.watermarks")
        prometheus = watch(relay, ranges="30s")
        with chatting(relay):
            prometheus.wait_until_there_is("sum(relay_events_published_total) > 20")
            prometheus.wait_until_quiet()
            right = shipped_acls(topic)[0]
            secured.deny(USER, right)
            assert prometheus.wait_for("RelayKafkaAway", "RelayPublishErrors")["error"] == "denied"
            secured.allow(USER, [right])
            prometheus.wait_until_quiet()


def test_registry_stopped(start: Start, watch: Watch, own_registry: LocalRegistry) -> None:
    relay = start(RELAY_SCHEMA_REGISTRY_URL=own_registry.url)
    prometheus = watch(relay)
    prometheus.wait_until_there_is("relay_registry_connected == 1")
    prometheus.wait_until_quiet()
    own_registry.stop()
    # As long as nothing is asked for it looks every few minutes only; at its start at once.
    relay.stop()
    relay.start()
    prometheus.wait_for("RelayRegistryAway")
    own_registry.start()
    prometheus.wait_until_quiet()


def test_two_relays_on_copies_of_one_spool(start: Start, watch: Watch) -> None:
    first = start("first")
    assert deliver(first, next(events())) == 200
    first.stop()
    shutil.copytree(first.directory, first.directory.with_name("second"))
    first.start()
    second = start("second")
    prometheus = watch(first, second)
    with chatting(first):
        with chatting(second):
            prometheus.wait_for("RelayProducerRestarts", "RelayPublishErrors")
        second.stop()
        prometheus.wait_until_quiet("RelayProducerRestarts", "RelayPublishErrors")


def test_record_too_large_for_its_topic(start: Start, watch: Watch, kafka: FoundKafka, topic_name: str) -> None:
    kafka.create_topics(topic_name, config={"max.message.bytes": "10000"})
    relay = start(RELAY_SCHEMA_VALIDATION="off")
    prometheus = watch(relay)
    padding = random.randbytes(40_000).hex().encode()
    assert deliver(relay, b'{"_id": "x", "type": "Message", "padding": "' + padding + b'"}') == 200
    assert prometheus.wait_for("RelayDeadEvents")["description"].startswith("1 events are dead")
    relay.stop()
    # As if somebody had looked after it.
    with closing(sqlite3.connect(relay.spool_path)) as spool, spool:
        spool.execute("DELETE FROM dead")
    relay.start()
    prometheus.wait_until_quiet()


@pytest.mark.parametrize(
    ("body", "reason"), [(b'{"_id": "x", "type": "Message"}', "schema"), (b'{"_id": "x", "type": "?"}', "unknown_type")]
)
def test_event_that_goes_to_the_dead_letters(start: Start, watch: Watch, body: bytes, reason: str) -> None:
    relay = start()
    prometheus = watch(relay)
    assert deliver(relay, body) == 200
    assert prometheus.wait_for("RelayDeadLetters")["reason"] == reason
    prometheus.wait_until_quiet()


def test_old_token_in_use(start: Start, watch: Watch) -> None:
    relay = start(RELAY_TOKEN=f"{TOKEN}\n{OLD_TOKEN}")
    prometheus = watch(relay)
    with chatting(relay, token=OLD_TOKEN):
        alert = prometheus.wait_for("RelayOldToken")
        assert (alert["workspace"], alert["slot"]) == ("default", "2")
    with chatting(relay):
        prometheus.wait_until_quiet()


def test_relay_killed(start: Start, watch: Watch) -> None:
    relay = start()
    prometheus = watch(relay)
    relay.kill()
    assert target(relay) in prometheus.wait_for("RelayDown")["description"]
    relay.start()
    prometheus.wait_until_quiet()


def test_relay_that_is_not_scraped(watch: Watch) -> None:
    prometheus = watch()
    assert "Prometheus knows of no relay" in prometheus.wait_for("RelayDown")["description"]
