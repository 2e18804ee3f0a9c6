"""
The producer: the spool's events and its watermark in one transaction.

What looks odd here is there because something failed without it:

* A failed batch does not fail its transaction: commit says OK. So every delivery future is looked at before it.
* After any error a producer refuses good records for the rest of its life. So it is closed and never used again.
* aiokafka's own `stop` waits for ever when the broker is gone. So `close` takes the producer apart itself; that needs
  private attributes, and pyproject.toml holds aiokafka to the version that has them.

Longer than other modules: what a transaction does, and how it is given up, are to be read together.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import chain, zip_longest
from typing import Any, NamedTuple

from aiokafka import AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import MessageSizeTooLargeError, RecordListTooLargeError

from relay.cluster import PARTITIONS, START_TIMEOUT, Cluster, Topic, key_hash
from relay.connection import Connection, meaning_of, translated, translation
from relay.errors import KafkaDenied, KafkaLost, KafkaTimeout, PartitionLeaderless, RecordsRefused, TopicsMissing
from relay.record import Record
from relay.watermark import Watermark

log = logging.getLogger(__name__)

#: Before the spool's identity; rights are given on it.
TRANSACTIONAL_ID_PREFIX = "relay-"
#: Seconds for one transaction: less than the broker gives it.
CYCLE_TIMEOUT = 20.0
TRANSACTION_TIMEOUT_MS = 30_000
MAX_BATCH_BYTES = 256 << 10
#: A producer's sequence numbers wrap at 2^31, and aiokafka's go wrong there.
MAX_RECORDS = 1_000_000_000
#: Not by the key's hash: that is another one once the topic has been given more partitions.
_WATERMARK_PARTITION = 0
_CLOSE_TIMEOUT = _EXPLAIN_TIMEOUT = 5.0
_EXPLAIN_TRIES = 10
#: What aiokafka builds, and the places of its records among those that are published.
_Batch = tuple[Any, list[int]]
#: The places of a batch's records, its topic and its partition.
_Sent = tuple[list[int], str | None, int]
_TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)
_WATERMARK_CONFIG = {"cleanup.policy": "compact", "segment.bytes": str(16 << 20), "min.cleanable.dirty.ratio": "0.1"}


class TopicPlan(NamedTuple):
    """The topics that a relay needs."""

    topics: Collection[str]
    #: None: none are kept, so that after a crash records may be written again.
    watermarks: str | None
    #: Whether missing ones are created.
    create: bool
    #: What the topics must take, when they are created.
    max_message_bytes: int


class Producer:
    """One producer, from `start` to its first error."""

    def __init__(
        self,
        connection: Connection,
        plan: TopicPlan,
        identity: str,
        compression: str | None,
        *,
        transactional: bool | None = None,
    ) -> None:
        """*identity* names it on Kafka; it is *transactional* if it has watermarks, unless that is said."""
        #: Whether `publish` writes all or nothing.
        self.transactional = plan.watermarks is not None if transactional is None else transactional
        self._cluster = Cluster(connection)
        self._plan = plan
        self._identity = identity
        self._key = identity.encode()
        self._compression = compression
        self._producer: AIOKafkaProducer | None = None
        self._partitions: dict[str, int] = {}
        self._futures: list[asyncio.Future[Any]] = []
        self._records = 0

    @property
    def spent(self) -> bool:
        """Whether it must be replaced before its sequence numbers run out."""
        return self._records >= MAX_RECORDS

    async def start(self) -> Watermark | None:
        """
        Connects, ends what a former producer of this identity left open, and says how far that one came.

        Raises: KafkaLost.
        """
        try:
            return await self._start()
        except KafkaTimeout as error:
            raise await self._explained(error) from error

    async def _start(self) -> Watermark | None:
        await self._find_topics()
        with translated("starting the producer"):
            self._producer = AIOKafkaProducer(
                **self._cluster.connection.options(),
                **self._delivery_options(),
                compression_type=self._compression,
                max_batch_size=MAX_BATCH_BYTES,
                linger_ms=0,
            )
            # With a missing coordinator this would wait for ever.
            async with asyncio.timeout(START_TIMEOUT):
                await self._producer.start()
        if self._plan.watermarks is None:
            return None
        # Not before start: only that makes the last transaction's outcome final.
        return await self._cluster.read_watermark(self._plan.watermarks, _WATERMARK_PARTITION, self._key)

    def _delivery_options(self) -> dict[str, Any]:
        if not self.transactional:
            return {"enable_idempotence": True, "acks": "all"}
        return {
            "transactional_id": f"{TRANSACTIONAL_ID_PREFIX}{self._identity}",
            "transaction_timeout_ms": TRANSACTION_TIMEOUT_MS,
            "acks": "all",
        }

    async def publish(
        self, records: Sequence[Record], watermark: Watermark | None = None, *, commit: bool = True
    ) -> None:
        """
        Writes *records* and *watermark*, all or nothing. On success they are committed; on failure nobody knows, and
        the next producer's `start` tells. Without *commit* they are taken back by that, and this one is of no more use.

        Raises: KafkaLost; RecordsRefused if the broker refused some of the records for themselves.
        """
        try:
            with translated("publishing"):
                async with asyncio.timeout(CYCLE_TIMEOUT):
                    await self._publish(records, watermark, commit=commit)
        except (KafkaTimeout, PartitionLeaderless) as error:
            raise await self._explained(error) from error

    async def try_partition(self, record: Record) -> None:
        """
        Looks whether the partition of *record* takes anything at all: an empty object, which is never committed. This
        producer, which must be transactional, is of no more use then.

        Raises: KafkaLost; RecordsRefused if it takes nothing.
        """
        assert self.transactional, "or it would stay there"
        _, partition = self._place(record)
        harmless = record._replace(key=record.key or b"-", value=b"{}", headers=[], partition=partition)
        await self.publish([harmless], commit=False)

    async def _publish(self, records: Sequence[Record], watermark: Watermark | None, *, commit: bool) -> None:
        producer = self._producer
        assert producer is not None, "start() comes first"
        if producer._sender.sender_task.done():  # noqa: SLF001
            raise KafkaLost("The producer's sender has died.")
        futures = self._futures = list[asyncio.Future[Any]]()
        if self.transactional:
            await producer.begin_transaction()
        if self._plan.watermarks is not None and watermark is not None:
            await self._send_watermark(producer, self._plan.watermarks, watermark)
        sent: list[_Sent] = [([], self._plan.watermarks, _WATERMARK_PARTITION) for _ in futures]
        for (batch, places), topic, partition in self._batches(producer, records):
            batch.close()
            futures.append(await producer.send_batch(batch, topic, partition=partition))
            sent.append((places, topic, partition))
        outcomes = zip(await asyncio.gather(*futures, return_exceptions=True), sent, strict=True)
        if failures := [(outcome, batch) for outcome, batch in outcomes if isinstance(outcome, BaseException)]:
            raise _failure(failures)
        if self.transactional and commit:
            await producer.commit_transaction()
        self._records += len(records) + 1

    async def _send_watermark(self, producer: AIOKafkaProducer, topic: str, watermark: Watermark) -> None:
        # First, so that its partition is added to the transaction in one request with the others.
        batch = producer.create_batch()
        batch.append(key=self._key, value=watermark.encode(), timestamp=None)
        batch.close()
        self._futures.append(await producer.send_batch(batch, topic, partition=_WATERMARK_PARTITION))

    def _batches(self, producer: AIOKafkaProducer, records: Sequence[Record]) -> list[tuple[_Batch, str, int]]:
        batches: defaultdict[tuple[str, int], list[_Batch]] = defaultdict(list)
        for place, record in enumerate(records):
            _, _, key, value, headers, timestamp, _ = record
            started = batches[self._place(record)]
            # An empty batch takes a record of any size.
            while not started or not started[-1][0].append(key=key, value=value, headers=headers, timestamp=timestamp):
                started.append((producer.create_batch(), []))
            started[-1][1].append(place)
        # Every partition's first batch, then every second one: aiokafka has one of each partition under way.
        return [
            (batch, *where)
            for turn in zip_longest(*batches.values())
            for where, batch in zip(batches, turn, strict=True)
            if batch
        ]

    def _place(self, record: Record) -> tuple[str, int]:
        topic, key, *_, given = record
        if given is not None:
            return topic, given
        if topic not in self._partitions:
            raise TopicsMissing(f"Missing in Kafka, or hidden from this user: topic {topic}, for events in the spool.")
        return topic, key_hash(key) % self._partitions[topic]

    # --- Topics. ---

    async def _find_topics(self) -> None:
        found = await self._cluster.topics()
        if self._plan.create and (missing := [name for name in self._needed() if name not in found]):
            await self._create(missing)
            found = await self._cluster.topics(having=missing)
        if missing := sorted(name for name in self._needed() if name not in found):
            raise await self._not_found(missing)
        _refuse_leaderless({name: found[name] for name in self._needed()})
        # Of all there are: the spool may hold events of a workspace that is no longer in the settings.
        self._partitions = {name: topic.partitions for name, topic in found.items()}

    async def _not_found(self, missing: Collection[str]) -> KafkaLost:
        _, rights = await self._cluster.rights(missing)
        if hidden := [name for name in missing if rights[name].exists is None]:
            return KafkaDenied(
                f"This user has no right to write to topic {', '.join(hidden)}. `relay check` says which to give it."
            )
        return TopicsMissing(
            f"Missing in Kafka: topic {', '.join(missing)}. Create it, or set RELAY_TOPIC_CREATE=true."
        )

    def _needed(self) -> list[str]:
        return [*self._plan.topics, *([self._plan.watermarks] if self._plan.watermarks else [])]

    async def _create(self, missing: Collection[str]) -> None:
        log.info("Creating topics: %s.", ", ".join(missing), extra={"action": "topics_created", "topics": missing})
        watermarks = [name for name in missing if name == self._plan.watermarks]
        events = [name for name in missing if name not in watermarks]
        size = {"max.message.bytes": str(self._plan.max_message_bytes)}
        await self._cluster.create_topics(events, size, PARTITIONS)
        await self._cluster.create_topics(watermarks, _WATERMARK_CONFIG, 1)

    async def _explained(self, error: KafkaLost) -> KafkaLost:
        # One partition without a leader stops every transaction, and so does one broker that lets nobody in. aiokafka
        # does not say which.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXPLAIN_TIMEOUT):
                for _ in range(_EXPLAIN_TRIES):
                    try:
                        found = await self._cluster.topics()
                        _refuse_leaderless({name: topic for name, topic in found.items() if name in self._needed()})
                        fault = await self._cluster.fault()
                    except (PartitionLeaderless, KafkaDenied) as reason:
                        return reason
                    except KafkaLost:
                        continue  # It asks any broker, and may have asked the one that is gone.
                    return fault if isinstance(fault, KafkaDenied) else error
        return error

    # --- The end. ---

    async def close(self) -> None:
        """Drops every connection without waiting for the broker. Open transactions end with the next `start`."""
        producer, self._producer = self._producer, None
        if producer is None:
            return
        producer._closed = True  # noqa: SLF001
        client, sender = producer.client, producer._sender.sender_task  # noqa: SLF001
        _drop_connections(client)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_TIMEOUT):
                await _end(sender)
                await _end(client._sync_task)  # noqa: SLF001
        client._sync_task = None  # noqa: SLF001
        _drop_connections(client)
        batches = producer._message_accumulator  # noqa: SLF001
        left = [*batches._pending_batches, *chain.from_iterable(batches._batches.values())]  # noqa: SLF001
        waiters = [waiter for batch in left for waiter in (batch.future, batch._drain_waiter)]  # noqa: SLF001
        if transactions := producer._txn_manager:  # noqa: SLF001
            waiters.append(transactions._transaction_waiter)  # noqa: SLF001
        for future in (*self._futures, *waiters):
            if future is not None and future.done() and not future.cancelled():
                future.exception()  # Retrieved: nobody else will, and asyncio would complain.


def _failure(failures: Sequence[tuple[BaseException, _Sent]]) -> KafkaLost:
    # A right that is missing to one topic fails the others as well, with errors that say less.
    told = next((failure for failure in failures if meaning_of(failure[0]) is KafkaDenied), failures[0])
    error, (_, topic, partition) = told
    # A watermark that is refused alone is none of theirs.
    refused = [places for error, (places, *_) in failures if places and meaning_of(error) is RecordsRefused]
    failure = translation(f"publishing to {topic} partition {partition}", error, of_records=bool(refused))
    failure.__cause__ = error
    if isinstance(failure, RecordsRefused):
        failure.batches = refused
        failure.for_size = all(isinstance(error, _TOO_LARGE) for error, _ in failures)
    return failure


def _drop_connections(client: AIOKafkaClient) -> None:
    for connection in list(client._conns.values()):  # noqa: SLF001
        if connection._writer is not None:  # noqa: SLF001
            # A TLS connection that is only closed waits for the broker's goodbye, and the loop cannot end meanwhile.
            connection._writer.transport.abort()  # noqa: SLF001
        connection.close()


async def _end(task: asyncio.Task[None] | None) -> None:
    # Again and again: a cancelled sender waits for its requests, and each of those must be cancelled in turn.
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.05)
    if task is not None and not task.cancelled():
        task.exception()


def _refuse_leaderless(topics: dict[str, Topic]) -> None:
    places = [f"{name} partition {number}" for name, topic in topics.items() for number in topic.leaderless]
    if places:
        raise PartitionLeaderless(f"Without a leader: {', '.join(places)}. Nothing can be published until it is back.")
