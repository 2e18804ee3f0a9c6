"""Fixtures of the acceptance tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from acceptance.kafka_proxy import KafkaProxy
from kafka_for_tests import FoundKafka
from relay_process import RelayProcess
from secured_kafka import SecuredKafka

from relay.dev.kafka import LocalKafka
from relay.dev.kafka_runtime import Runtime

MakeRelay = Callable[..., RelayProcess]
OwnKafka = Callable[..., LocalKafka]


@pytest.fixture(scope="session")
def one_broker(kafka_runtime: Runtime) -> Iterator[LocalKafka]:
    """Yield the Kafka behind breakable_kafka."""
    with LocalKafka(runtime=kafka_runtime) as kafka:
        yield kafka


@pytest.fixture
def breakable_kafka(one_broker: LocalKafka) -> Iterator[LocalKafka]:
    """Yield a Kafka of one broker to be stopped, frozen and killed; whole again for the next test."""
    yield one_broker
    (broker,) = one_broker.brokers
    broker.thaw()
    broker.start()


@pytest.fixture
def proxied(own_kafka: OwnKafka) -> Iterator[tuple[LocalKafka, KafkaProxy]]:
    """Yield a Kafka of one broker that is reached through a proxy."""
    with KafkaProxy() as proxy:
        kafka = own_kafka(properties={"advertised.listeners": f"PLAINTEXT://127.0.0.1:{proxy.port}"})
        proxy.target = kafka.brokers[0].port
        yield kafka, proxy


@pytest.fixture(scope="session")
def secured(kafka_runtime: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    """Yield a Kafka that lets nobody in without a login, and to nothing without a right."""
    with SecuredKafka(tmp_path_factory.mktemp("secured"), kafka_runtime) as kafka:
        yield kafka


@pytest.fixture
def make_relay(tmp_path: Path, topic_name: str, request: pytest.FixtureRequest) -> Iterator[MakeRelay]:
    """
    Yield a function that makes a relay on a given Kafka, with topics of its own that it creates; not started yet.

    When the test ends it ends with it, and the end of its log is shown if the test failed.
    """
    made: list[RelayProcess] = []

    def make(kafka: FoundKafka | LocalKafka, *, name: str = "relay", **settings: str) -> RelayProcess:
        topics = {
            "RELAY_TOPIC": topic_name,
            "RELAY_DEAD_LETTER_TOPIC": f"{topic_name}.dead-letter",
            "RELAY_WATERMARK_TOPIC": f"{topic_name}.watermarks",
            "RELAY_TOPIC_CREATE": "true",
        }
        relay = RelayProcess(tmp_path / name, kafka.bootstrap_servers, {**topics, **settings})
        made.append(relay)
        return relay

    yield make
    for relay in made:
        relay.close()
        print(f"--- {relay.directory.name}: the end of its log\n{relay.log_tail()}")
