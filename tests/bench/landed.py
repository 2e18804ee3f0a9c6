"""Whether as many events lie on a topic as were accepted: a check for millions of them, in bounded memory."""

import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import orjson
from confluent_kafka import Consumer, KafkaError, TopicPartition

_SILENCE_SECONDS = 20.0


class Landed(NamedTuple):
    """What a `read_committed` consumer found on one topic."""

    records: int
    #: Of these, how many came a second time, and how many before one with a smaller number of the same chat.
    doubled: int
    reordered: int


def landed(bootstrap_servers: str, topic: str) -> Landed:
    """Reads all of *topic*, whose records are those of load.Generator: numbered, growing within a chat."""
    records = doubled = reordered = 0
    last: dict[bytes, int] = {}
    seen: set[int] = set()
    for key, value in _records(bootstrap_servers, topic):
        records += 1
        number = int(orjson.loads(value)["messages"][0]["_id"])
        doubled += number in seen
        seen.add(number)
        reordered += number < last.get(key, 0)
        last[key] = max(number, last.get(key, 0))
    return Landed(records, doubled, reordered)


def _records(bootstrap_servers: str, topic: str) -> Iterator[tuple[bytes, bytes]]:
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": str(uuid.uuid4()),
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
        }
    )
    with closing(consumer):
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        unread = set(partitions)
        deadline = time.monotonic() + _SILENCE_SECONDS
        while unread:
            for message in consumer.consume(1000, timeout=1):
                deadline = time.monotonic() + _SILENCE_SECONDS
                error = message.error()
                if error is None:
                    yield message.key() or b"", message.value() or b""
                elif error.code() == KafkaError._PARTITION_EOF:
                    unread.discard(message.partition())
            assert time.monotonic() < deadline, f"{topic}: partitions {unread} cannot be read to their end"
