"""Whether as many events lie on a topic as were accepted: a check for millions, of which only the numbers are kept."""

import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import orjson
from confluent_kafka import Consumer, KafkaError, TopicPartition

_SILENCE_SECONDS = 20.0


class Landed(NamedTuple):
    """What a `read_committed` consumer found on one topic, held against what was accepted."""

    missing: int
    #: How many came a second time, how many after one with a larger number of the same chat, how many were never sent.
    doubled: int
    reordered: int
    invented: int


def landed(bootstrap_servers: str, topic: str, accepted: Sequence[range]) -> Landed:
    """
    Reads all of *topic*, whose records are those of load.Generator: numbered, growing within a chat. The numbers of
    those that were *accepted* do not overlap.
    """
    doubled = reordered = 0
    last: dict[bytes, int] = {}
    seen: set[int] = set()
    for key, value in _records(bootstrap_servers, topic):
        number = int(orjson.loads(value)["messages"][0]["_id"])
        doubled += number in seen
        seen.add(number)
        reordered += number < last.get(key, 0)
        last[key] = max(number, last.get(key, 0))
    found = [sum(number in seen for number in numbers) for numbers in accepted]
    return Landed(sum(map(len, accepted)) - sum(found), doubled, reordered, len(seen) - sum(found))


def _consumer(bootstrap_servers: str, isolation_level: str) -> Consumer:
    return Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": str(uuid.uuid4()),
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": isolation_level,
        }
    )


def _records(bootstrap_servers: str, topic: str) -> Iterator[tuple[bytes, bytes]]:
    # An open transaction hides what follows it: to a read_committed consumer, the partition ends there.
    with closing(_consumer(bootstrap_servers, "read_uncommitted")) as consumer:
        ends = {
            number: consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)[1]
            for number in consumer.list_topics(topic, timeout=10).topics[topic].partitions
        }
    with closing(_consumer(bootstrap_servers, "read_committed")) as consumer:
        consumer.assign([TopicPartition(topic, number, 0) for number in ends])
        unread = set(ends)
        deadline = time.monotonic() + _SILENCE_SECONDS
        while unread:
            for message in consumer.consume(1000, timeout=1):
                deadline = time.monotonic() + _SILENCE_SECONDS
                error = message.error()
                if error is None:
                    yield message.key() or b"", message.value() or b""
                elif error.code() == KafkaError._PARTITION_EOF and (message.offset() or 0) >= ends[message.partition()]:
                    unread.discard(message.partition())
            assert time.monotonic() < deadline, f"{topic}: partitions {unread} cannot be read to their end"
