"""Reads a whole topic as it is, page by page: what is committed, up to where it ends at that moment."""

import time
from collections.abc import AsyncGenerator
from typing import NamedTuple

from aiokafka import TopicPartition

from relay.cluster import START_TIMEOUT, Cluster
from relay.connection import Connection, translated
from relay.errors import KafkaTimeout

#: How many records a page has at most.
PAGE = 1_000
_POLL_MS = 200


class Found(NamedTuple):
    """A record as it lies on a topic."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes
    #: Others write headers without a value, too.
    headers: tuple[tuple[str, bytes | None], ...]

    @property
    def place(self) -> str:
        """Where it lies."""
        return f"{self.partition}@{self.offset}"


class Reader:
    """Reads one topic; holds no connection."""

    def __init__(self, connection: Connection, topic: str, partitions: int) -> None:
        self._cluster = Cluster(connection)
        self._places = [TopicPartition(topic, number) for number in range(partitions)]
        self._topic = topic

    async def spans(self) -> list[range]:
        """
        The offsets of each partition, up to the last record that is written now, committed or not.

        Raises: KafkaLost.
        """
        with translated(f"looking for the ends of {self._topic}"):
            # A read_committed consumer's own idea of the end lies before any open transaction.
            async with self._cluster.consumer("read_uncommitted") as consumer:
                begin = await consumer.beginning_offsets(self._places)
                end = await consumer.end_offsets(self._places)
        return [range(begin[place], end[place]) for place in self._places]

    async def pages(self, partition: int, offsets: range) -> AsyncGenerator[list[Found], None]:
        """
        The committed records at these *offsets*, in order, PAGE at most at a time.

        Raises: KafkaLost, also if a transaction stays open among them.
        """
        if not offsets:
            return
        place = self._places[partition]
        with translated(f"reading {self._topic} partition {partition}"):
            async with self._cluster.consumer("read_committed") as consumer:
                consumer.assign([place])
                consumer.seek(place, offsets.start)
                reached, reached_at = offsets.start, time.monotonic()
                while reached < offsets.stop:
                    found = (await consumer.getmany(place, timeout_ms=_POLL_MS, max_records=PAGE)).get(place, ())
                    page = [
                        Found(partition, it.offset, it.key, it.value or b"", tuple(it.headers))
                        for it in found
                        if it.offset < offsets.stop
                    ]
                    if page:
                        yield page
                    # It passes what was aborted, and the ends of transactions, too.
                    position = await consumer.position(place)
                    if page or position > reached:
                        reached, reached_at = position, time.monotonic()
                    elif time.monotonic() - reached_at > START_TIMEOUT:
                        raise KafkaTimeout(
                            f"{self._topic} partition {partition} cannot be read beyond offset {reached}."
                        )
