"""
The Kafka cluster: which topics are there, what the relay may do with them, how far a spool has come.

With connection.py, rights.py and kafka.py the only place that knows aiokafka.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import Any, NamedTuple

from aiokafka import AIOKafkaConsumer, TopicPartition, errors
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.client import AIOKafkaClient
from aiokafka.partitioner import murmur2

from relay.connection import RETRY_BACKOFF_MS, Connection, translated
from relay.errors import KafkaDenied, KafkaLost, TopicsMissing
from relay.rights import TopicRights, may_use_transactional_id, topic_rights
from relay.watermark import Watermark

#: Seconds for anything that is asked of the cluster before the first record.
START_TIMEOUT = 45.0
#: Partitions of topics that the relay creates.
PARTITIONS = 6
MAX_REPLICATION = 3
#: How far before the end the watermark is looked for first; then ten times that, and so on.
_WATERMARK_REACH = 1_000
_ALREADY_EXISTS = 36
_GOODBYE_SECONDS = 0.1
_CREATION_LOOKS = 50


@lru_cache(maxsize=8192)
def key_hash(key: bytes) -> int:
    """murmur2 as the Java client's default partitioner takes it, modulo nothing yet."""
    return int(murmur2(key)) & 0x7FFFFFFF


class Topic(NamedTuple):
    """A topic as the cluster describes it."""

    partitions: int
    #: Of the partition that has fewest.
    replicas: int
    #: Partitions without a leader.
    leaderless: tuple[int, ...]


class Cluster:
    """Asks the cluster and changes its topics; holds no connection."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def topics(self, having: Collection[str] = ()) -> Mapping[str, Topic]:
        """
        Every topic that the relay may see. Asks for all: asking for a missing one by name could create it.

        With *having* waits a little for topics that were just created: not every broker knows of them at once.

        Raises: KafkaLost.
        """
        async with self._admin() as admin:
            for _ in range(_CREATION_LOOKS):
                found = {topic["topic"]: topic for topic in await admin.describe_topics() if not topic["error_code"]}
                led = [name for name in having if name in found and not _leaderless(found[name])]
                if len(led) == len(having):
                    break
                await asyncio.sleep(RETRY_BACKOFF_MS / 1000)
        return {
            name: Topic(
                len(topic["partitions"]),
                min((len(partition["replicas"]) for partition in topic["partitions"]), default=0),
                _leaderless(topic),
            )
            for name, topic in found.items()
        }

    async def topic_configs(self, names: Collection[str]) -> dict[str, dict[str, str]]:
        """
        The settings in force of these topics.

        Raises: KafkaLost.
        """
        if not names:
            return {}
        async with self._admin() as admin:
            responses = await admin.describe_configs(
                [ConfigResource(ConfigResourceType.TOPIC, name, configs=None) for name in names]
            )
        return {
            name: {entry[0]: entry[1] for entry in entries}
            for response in responses
            for _, _, _, name, entries in response.resources
        }

    async def fault(self) -> KafkaLost | None:
        """
        Why one of the brokers cannot be used, if one cannot.

        Raises: KafkaLost if none can.
        """
        async with self._admin() as admin:
            return await self.connection.fault(_addresses(admin))

    async def rights(self, names: Collection[str]) -> tuple[int, dict[str, TopicRights]]:
        """
        How many brokers there are, and what this user may do with topics that may or may not exist.

        Raises: KafkaLost.
        """
        async with self._admin() as admin:
            return await topic_rights(admin, names)

    async def may_use(self, transactional_id: str) -> bool:
        """
        Whether this user may be the producer with that id; one that is at work notices nothing.

        Raises: KafkaLost.
        """
        async with self._admin() as admin:
            return await may_use_transactional_id(admin, transactional_id)

    async def create_topics(
        self, names: Collection[str], config: Mapping[str, str], partitions: int, *, validate_only: bool = False
    ) -> None:
        """
        Creates topics, with as many replicas as there are brokers, three at most; with *validate_only* only asks
        whether they could be.

        Raises: KafkaLost; KafkaDenied, TopicsMissing if one cannot be created.
        """
        if not names:
            return
        async with self._admin() as admin:
            brokers = len((await admin.describe_cluster())["brokers"])
            response = await admin.create_topics(
                [
                    NewTopic(name, partitions, min(brokers, MAX_REPLICATION), topic_configs=dict(config))
                    for name in names
                ],
                validate_only=validate_only,
            )
        # aiokafka returns the broker's error codes and raises nothing.
        for name, code, *_ in response.topic_errors:
            if code not in {0, _ALREADY_EXISTS}:
                kind = KafkaDenied if code == errors.TopicAuthorizationFailedError.errno else TopicsMissing
                raise kind(f"Topic {name} cannot be created: {errors.for_code(code).__name__}.")

    @asynccontextmanager
    async def _admin(self) -> AsyncIterator[AIOKafkaAdminClient]:
        with translated("asking for topics"):
            admin = AIOKafkaAdminClient(**self.connection.options())
            try:
                async with asyncio.timeout(START_TIMEOUT):
                    await admin.start()
                    yield admin
            except (errors.KafkaConnectionError, errors.NodeNotReadyError) as error:
                if fault := await self.connection.fault(_addresses(admin)):
                    raise fault from error
                raise
            finally:
                await leave(admin._client, admin.close())  # noqa: SLF001

    async def read_watermark(self, topic: str, partition: int, key: bytes) -> Watermark | None:
        """
        The last committed watermark with that *key*.

        Only right after the producer's start has resolved the transactions before it. Reads to the end that a
        `read_uncommitted` reader sees: a `read_committed` one's lies before any open transaction, even another relay's.

        Raises: KafkaLost.
        """
        place = TopicPartition(topic, partition)
        with translated(f"reading the watermark from {topic} partition {partition}"):
            async with asyncio.timeout(START_TIMEOUT):
                async with self.consumer("read_uncommitted") as consumer:
                    begin = (await consumer.beginning_offsets([place]))[place]
                    end = (await consumer.end_offsets([place]))[place]
                async with self.consumer("read_committed") as consumer:
                    consumer.assign([place])
                    reach = _WATERMARK_REACH
                    while True:
                        start = max(begin, end - reach)
                        found = await _last_value(consumer, place, start, end, key)
                        if found is not None:
                            return Watermark.decode(found)
                        if start == begin:
                            return None
                        reach *= 10

    @asynccontextmanager
    async def consumer(self, isolation_level: str) -> AsyncIterator[AIOKafkaConsumer]:
        """A consumer of no group, which goes on at the beginning of what is left where records are deleted."""
        consumer = AIOKafkaConsumer(
            **self.connection.options(),
            isolation_level=isolation_level,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        try:
            await consumer.start()
            yield consumer
        finally:
            await leave(consumer._client, consumer.stop())  # noqa: SLF001


async def leave(client: AIOKafkaClient, closing: Coroutine[Any, Any, None]) -> None:
    """Closes a client, within moments."""
    # Over TLS asyncio waits 30 s for the broker's goodbye, and that does not come while a last request is under way, as
    # a consumer's next fetch is. Nothing is lost with a connection that is of no more use.
    transports = [it._writer.transport for it in client._conns.values() if it._writer is not None]  # noqa: SLF001
    task = asyncio.create_task(closing)
    await asyncio.wait([task], timeout=_GOODBYE_SECONDS)
    for transport in transports:
        transport.abort()
    await task


def _addresses(admin: AIOKafkaAdminClient) -> list[tuple[str, int]]:
    return [(broker.host, broker.port) for broker in admin._client.cluster.brokers()]  # noqa: SLF001


def _leaderless(topic: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(partition["partition"] for partition in topic["partitions"] if partition["leader"] < 0)


async def _last_value(
    consumer: AIOKafkaConsumer, place: TopicPartition, start: int, end: int, key: bytes
) -> bytes | None:
    consumer.seek(place, start)
    found: bytes | None = None
    while True:
        # At least one fetch, even of nothing: only a fetch shows that the right to read is missing.
        for record in (await consumer.getmany(place, timeout_ms=100)).get(place, ()):
            if record.key == key:
                found = record.value
        if await consumer.position(place) >= end:
            return found
