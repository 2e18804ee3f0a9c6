"""Which Kafka the tests use: a given one, one in Docker, or the local one."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from confluent_kafka import KafkaException, admin
from relay_process import wait_until

from relay.dev.kafka import LocalKafka
from relay.dev.kafka_requests import create_topics, serving_brokers
from relay.dev.kafka_runtime import Runtime


class NoKafkaError(Exception):
    """No Kafka can be had for the tests; the message says why, and how to get one."""


@dataclass(frozen=True)
class FoundKafka:
    """A running Kafka, and in words which one it is and why no other was taken."""

    bootstrap_servers: str
    how: str

    def create_topics(self, *names: str, partitions: int = 1, config: Mapping[str, str] | None = None) -> None:
        """Create topics of one shape; raises aiokafka's KafkaError."""
        create_topics(self.bootstrap_servers, *names, partitions=partitions, config=config)


@contextmanager
def find_kafka(local_runtime: Callable[[], Runtime]) -> Iterator[FoundKafka]:
    """
    Yield the first Kafka there is: the one of RELAY_TEST_KAFKA, one in Docker, a local one on *local_runtime*.

    Raises:
        NoKafkaError: there is none, or the given one does not answer; it says how to get one.
    """
    given = os.environ.get("RELAY_TEST_KAFKA")
    if given:
        host, _, port = given.split(",")[0].rpartition(":")
        if not serving_brokers(host, int(port)):
            raise NoKafkaError(f"No Kafka answers at RELAY_TEST_KAFKA={given}. Start it, or unset the variable.")
        yield FoundKafka(given, f"{given}, as RELAY_TEST_KAFKA says")
        return
    from kafka_in_docker import kafka_in_docker  # Slow to import, so only for tests that need Kafka.

    reasons = ["RELAY_TEST_KAFKA is not set"]
    for name, way in (("Docker", kafka_in_docker()), ("local jars", _on_this_machine(local_runtime))):
        with ExitStack() as stack:
            try:
                servers = stack.enter_context(way)
            except Exception as error:  # noqa: BLE001 (whatever it is: not this way, then)
                reasons.append(f"{name}: {error}")
                continue
            yield FoundKafka(servers, f"{name}, at {servers} ({'; '.join(reasons)})")
            return
    remedy = "Set RELAY_TEST_KAFKA=host:port, or start Docker, or pip install 'rocketchat-kafka-relay[dev]'."
    raise NoKafkaError("\n".join(["There is no Kafka for this test.", remedy, *reasons]))


@contextmanager
def _on_this_machine(runtime: Callable[[], Runtime]) -> Iterator[str]:
    # No test kills it: it is not to be taken for dead because the machine is slow.
    with LocalKafka(properties={"broker.session.timeout.ms": "30000"}, runtime=runtime()) as kafka:
        yield kafka.bootstrap_servers


def set_topic_config(servers: str, topic: str, name: str, value: str) -> None:
    """Gives a setting of a topic another value; returns when the broker says that it has it."""
    known: Any = admin  # Not all of it is declared.
    entry = known.ConfigEntry(name, value, incremental_operation=known.AlterConfigOpType.SET)
    changed = known.ConfigResource(known.ResourceType.TOPIC, topic, incremental_configs=[entry])
    failure = ""

    def is_set() -> bool:
        nonlocal failure
        # A client anew each time: a broker that was just frozen or down has left one waiting for half a minute.
        client = known.AdminClient({"bootstrap.servers": servers})
        try:
            for future in client.incremental_alter_configs([changed]).values():
                future.result(10)
            (described,) = client.describe_configs([known.ConfigResource(known.ResourceType.TOPIC, topic)]).values()
            return bool(described.result(10)[name].value == value)
        except (KafkaException, TimeoutError) as error:
            failure = repr(error)
            return False

    try:
        wait_until(is_set, f"{name} of {topic} is {value}", seconds=60)
    except AssertionError as error:
        raise AssertionError(f"{error}: {failure}") from None
