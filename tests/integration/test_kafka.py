"""The producer and the cluster's questions on a real broker: watermark, fencing, bounded ends, what errors mean."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

import pytest
from confluent_kafka import Producer as OtherProducer
from confluent_kafka.admin import AdminClient, ConfigResource, NewPartitions  # type: ignore[attr-defined]
from kafka_for_tests import FoundKafka
from oracle import read_topics

import relay.kafka
from relay.connection import Connection
from relay.dev.kafka import LocalKafka
from relay.errors import (
    Fenced,
    KafkaLost,
    KafkaTimeout,
    KafkaUnreachable,
    PartitionLeaderless,
    RecordsRefused,
    TopicsMissing,
)
from relay.kafka import Producer, TopicPlan
from relay.record import Record
from relay.watermark import Run, Watermark

Kafka = FoundKafka | LocalKafka
OwnKafka = Callable[..., LocalKafka]
MakeProducer = Callable[..., Producer]


@pytest.fixture
async def make_producer(topic_name: str) -> AsyncIterator[MakeProducer]:
    """Yield a function that makes producers, closed when the test ends."""
    made: list[Producer] = []

    def make(kafka: Kafka, *, spool: str = "spool-1", create: bool = True, transactional: bool = True) -> Producer:
        watermarks = f"{topic_name}.watermarks" if transactional else None
        plan = TopicPlan(
            [topic_name, f"{topic_name}.dead-letter"], watermarks, create=create, max_message_bytes=500_000
        )
        made.append(Producer(Connection(kafka.bootstrap_servers, "test"), plan, f"{topic_name}-{spool}", None))
        return made[-1]

    yield make
    for producer in made:
        await producer.close()


def record(topic: str, value: bytes, key: bytes = b"chat-1") -> Record:
    return Record(topic, key, key, value, [("name", b"header")], time.time_ns() // 1_000_000)


def watermark(sequence: int) -> Watermark:
    return Watermark(sequence, (Run(1, "run-1"),))


def values(kafka: Kafka, topic: str) -> list[bytes | None]:
    return [landed.value for landed in read_topics(kafka.bootstrap_servers, topic)]


# --- How far a spool has come ---


async def test_a_spool_that_never_published_has_no_watermark(kafka: FoundKafka, make_producer: MakeProducer) -> None:
    assert await make_producer(kafka).start() is None


async def test_the_last_watermark_is_read_back(kafka: FoundKafka, make_producer: MakeProducer, topic_name: str) -> None:
    first = make_producer(kafka)
    await first.start()
    for sequence in (1, 2, 3):
        await first.publish([record(topic_name, b"%d" % sequence)], watermark(sequence))
    await first.close()

    assert await make_producer(kafka).start() == watermark(3)
    assert values(kafka, topic_name) == [b"1", b"2", b"3"]


async def test_a_watermark_alone_can_be_written(kafka: FoundKafka, make_producer: MakeProducer) -> None:
    first = make_producer(kafka)
    await first.start()

    await first.publish([], watermark(7))

    assert await make_producer(kafka).start() == watermark(7)


async def test_another_spools_watermark_is_not_taken(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    first = make_producer(kafka, spool="spool-1")
    await first.start()
    await first.publish([record(topic_name, b"one")], watermark(1))

    assert await make_producer(kafka, spool="spool-2").start() is None


async def test_the_last_watermark_is_found_when_its_topic_was_given_more_partitions(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    # One of them would have gone to another partition by the hash of its key.
    spools = [f"spool-{number}" for number in range(4)]
    for spool in spools:
        producer = make_producer(kafka, spool=spool)
        await producer.start()
        await producer.publish([], watermark(7))

    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    watermarks = f"{topic_name}.watermarks"
    admin.create_partitions([NewPartitions(watermarks, 8)])[watermarks].result(30)

    for spool in spools:
        assert await make_producer(kafka, spool=spool).start() == watermark(7)


async def test_a_watermark_is_found_behind_thousands_of_other_spools(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    first = make_producer(kafka)
    await first.start()
    await first.publish([record(topic_name, b"one")], watermark(1))
    others = OtherProducer({"bootstrap.servers": kafka.bootstrap_servers})
    for _ in range(2500):
        others.produce(f"{topic_name}.watermarks", key=str(uuid.uuid4()), value=watermark(9).encode())
    assert others.flush(30) == 0

    assert await make_producer(kafka).start() == watermark(1)


async def test_what_a_dead_producer_left_open_is_undone_by_the_next_start(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    first = make_producer(kafka)
    await first.start()
    await first.publish([record(topic_name, b"committed")], watermark(1))
    assert first._producer
    await first._producer.begin_transaction()
    await first._send_watermark(first._producer, f"{topic_name}.watermarks", watermark(2))
    await first._producer.send_and_wait(topic_name, b"left open")
    await first.close()

    assert await make_producer(kafka).start() == watermark(1)
    assert await asyncio.to_thread(values, kafka, topic_name) == [b"committed"]


async def test_a_successor_fences_its_predecessor(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    first, second = make_producer(kafka), make_producer(kafka)
    await first.start()
    await first.publish([record(topic_name, b"first")], watermark(1))
    assert await second.start() == watermark(1)

    with pytest.raises(Fenced):
        await first.publish([record(topic_name, b"zombie")], watermark(2))

    await second.publish([record(topic_name, b"second")], watermark(2))
    assert await asyncio.to_thread(values, kafka, topic_name) == [b"first", b"second"]


async def test_without_transactions_there_is_no_watermark(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    producer = make_producer(kafka, transactional=False)

    assert await producer.start() is None
    await producer.publish([record(topic_name, b"one")], watermark(1))

    assert values(kafka, topic_name) == [b"one"]


# --- Records ---


async def test_records_of_one_key_stay_in_order_over_many_batches(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    producer = make_producer(kafka)
    await producer.start()
    bodies = [f"{number:_<10000}".encode() for number in range(300)]

    await producer.publish(
        [record(topic_name, body, b"chat-%d" % (index % 3)) for index, body in enumerate(bodies)], watermark(300)
    )

    there = read_topics(kafka.bootstrap_servers, topic_name)
    for chat in range(3):
        assert [landed.value for landed in there if landed.key == b"chat-%d" % chat] == bodies[chat::3]
    assert {landed.headers for landed in there} == {(("name", b"header"),)}


async def test_a_record_that_the_broker_refuses_takes_the_whole_cycle_back(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    producer = make_producer(kafka)
    await producer.start()
    many = [record(topic_name, b"small", b"chat-%d" % number) for number in range(50)]

    with pytest.raises(RecordsRefused, match=rf"publishing to {topic_name} partition \d") as refusal:
        await producer.publish([*many, record(topic_name, b"x" * 600_000)], watermark(51))
    assert refusal.value.batches == [[50]]
    await producer.close()

    successor = make_producer(kafka)
    assert await successor.start() is None
    await successor.publish(many, watermark(50))
    assert await asyncio.to_thread(values, kafka, topic_name) == [b"small"] * 50


@pytest.mark.parametrize(
    "config", [{"max.message.bytes": "1000"}, {"segment.bytes": "1048576", "max.message.bytes": "4000000"}], ids=str
)
async def test_what_a_partition_is_tried_with_is_never_committed(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str, config: dict[str, str]
) -> None:
    kafka.create_topics(topic_name, partitions=2, config=config)
    refused = record(topic_name, b"x" * 1_500_000)
    producer = make_producer(kafka)
    await producer.start()
    await producer.try_partition(refused)
    await producer.close()

    producer = make_producer(kafka)
    assert await producer.start() is None
    with pytest.raises(RecordsRefused, match=rf"{topic_name} partition") as refusal:
        await producer.publish([refused], watermark(1))
    assert refusal.value.for_size
    await producer.close()

    producer = make_producer(kafka)
    await producer.start()
    await producer.publish([record(topic_name, b"committed")], watermark(1))
    assert await asyncio.to_thread(values, kafka, topic_name) == [b"committed"]


async def test_a_watermark_that_is_refused_is_no_event_s_fault(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    kafka.create_topics(f"{topic_name}.watermarks", config={"max.message.bytes": "50"})
    producer = make_producer(kafka)
    await producer.start()
    with pytest.raises(KafkaLost, match=rf"{topic_name}\.watermarks partition 0: .*MessageSize") as lost:
        await producer.publish([record(topic_name, b"small")], watermark(1))
    assert not isinstance(lost.value, RecordsRefused)


async def test_what_a_partition_refuses_for_itself_is_no_fault_of_the_partition(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    kafka.create_topics(topic_name, partitions=3, config={"cleanup.policy": "compact"})
    # A compacted topic takes no record without a key.
    refused = record(topic_name, b"no key")._replace(key=None)
    producer = make_producer(kafka)
    await producer.start()

    with pytest.raises(RecordsRefused) as refusal:
        await producer.publish([refused], watermark(1))
    assert not refusal.value.for_size
    await producer.close()

    producer = make_producer(kafka)
    await producer.start()
    await producer.try_partition(refused)


# --- Topics ---


async def test_missing_topics_are_named_and_not_created(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    kafka.create_topics(topic_name)

    with pytest.raises(TopicsMissing, match=rf"topic {topic_name}\.dead-letter, {topic_name}\.watermarks\. "):
        await make_producer(kafka, create=False).start()

    names = AdminClient({"bootstrap.servers": kafka.bootstrap_servers}).list_topics(timeout=30).topics
    assert [name for name in names if name.startswith(topic_name)] == [topic_name]


async def test_events_of_a_workspace_that_was_removed_are_published_as_long_as_their_topic_is_there(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    removed = f"{topic_name}.removed"
    kafka.create_topics(removed)
    producer = make_producer(kafka)
    await producer.start()

    await producer.publish([record(removed, b"one"), record(topic_name, b"two")], watermark(2))

    assert values(kafka, removed) == [b"one"]


async def test_a_missing_topic_of_a_workspace_that_was_removed_is_named(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    producer = make_producer(kafka)
    await producer.start()

    with pytest.raises(TopicsMissing, match=rf"topic {topic_name}\.removed, for events in the spool"):
        await producer.publish([record(f"{topic_name}.removed", b"one")], watermark(1))


async def test_created_topics_are_fit_for_their_purpose(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    await make_producer(kafka).start()

    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    names = [topic_name, f"{topic_name}.dead-letter", f"{topic_name}.watermarks"]
    partitions = [len(admin.list_topics(name, timeout=30).topics[name].partitions) for name in names]
    described = admin.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, name) for name in names])
    configs = {resource.name: future.result(30) for resource, future in described.items()}
    assert partitions == [6, 6, 1]
    assert [configs[name]["cleanup.policy"].value for name in names] == ["delete", "delete", "compact"]
    assert [configs[name]["max.message.bytes"].value for name in names[:2]] == ["500000", "500000"]


async def test_topics_that_are_there_stay_as_they_are(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str
) -> None:
    kafka.create_topics(topic_name, partitions=2)

    await make_producer(kafka).start()

    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    assert len(admin.list_topics(topic_name, timeout=30).topics[topic_name].partitions) == 2


async def test_a_topic_that_is_deleted_meanwhile_is_an_error_in_bounded_time(
    kafka: FoundKafka, make_producer: MakeProducer, topic_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.kafka, "CYCLE_TIMEOUT", 3.0)
    producer = make_producer(kafka)
    await producer.start()
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    admin.delete_topics([topic_name])[topic_name].result(30)

    with pytest.raises(KafkaLost):
        await producer.publish([record(topic_name, b"one")], watermark(1))

    with pytest.raises(TopicsMissing, match=topic_name):
        await make_producer(kafka, create=False).start()


# --- Brokers that are gone ---


async def test_a_kafka_that_is_not_there_is_an_error_at_once(make_producer: MakeProducer) -> None:
    with pytest.raises(KafkaUnreachable):
        await asyncio.wait_for(make_producer(FoundKafka("127.0.0.1:1", "none")).start(), 5)


@pytest.mark.parametrize("fault", ["frozen", "killed"])
async def test_publishing_and_closing_end_in_bounded_time_without_a_broker(
    own_kafka: OwnKafka, make_producer: MakeProducer, topic_name: str, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(relay.kafka, "CYCLE_TIMEOUT", 1.0)
    monkeypatch.setattr(relay.kafka, "_EXPLAIN_TIMEOUT", 1.0)
    kafka = await asyncio.to_thread(own_kafka)
    (broker,) = kafka.brokers
    producer = make_producer(kafka)
    await producer.start()
    await producer.publish([record(topic_name, b"one")], watermark(1))
    if fault == "frozen":
        broker.freeze()
    else:
        broker.kill()

    with pytest.raises(KafkaTimeout):
        await asyncio.wait_for(producer.publish([record(topic_name, b"two")], watermark(2)), 10)
    begun = time.monotonic()
    await producer.close()

    assert time.monotonic() - begun < 3
    broker.thaw()
    await asyncio.to_thread(broker.start)
    successor = make_producer(kafka)
    reached = await successor.start()
    assert reached in (watermark(1), watermark(2))
    there = await asyncio.to_thread(values, kafka, topic_name)
    assert there == [b"one", b"two"][: reached.sequence]


async def test_a_producer_can_be_closed_while_it_starts(own_kafka: OwnKafka, make_producer: MakeProducer) -> None:
    kafka = await asyncio.to_thread(own_kafka)
    (broker,) = kafka.brokers
    first = make_producer(kafka)
    await first.start()
    broker.freeze()
    producer = make_producer(kafka)
    starting = asyncio.create_task(producer.start())
    await asyncio.wait([starting], timeout=0.2)
    assert not starting.done()

    starting.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.wait_for(starting, 5)
    await asyncio.wait_for(producer.close(), 5)

    broker.thaw()


async def test_a_partition_without_a_leader_is_named(
    own_kafka: OwnKafka, make_producer: MakeProducer, topic_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Longer than the cluster needs to notice, also on a busy machine.
    monkeypatch.setattr(relay.kafka, "CYCLE_TIMEOUT", 12.0)
    kafka = await asyncio.to_thread(own_kafka, 3)
    kafka.create_topics(topic_name, partitions=3, replication=1)
    producer = make_producer(kafka)
    await producer.start()
    every = [record(topic_name, b"one", b"chat-%d" % number) for number in range(40)]
    await producer.publish(every, watermark(1))

    kafka.brokers[2].kill()

    with pytest.raises(PartitionLeaderless, match=rf"{topic_name} partition \d"):
        await producer.publish(every, watermark(2))
    with pytest.raises(PartitionLeaderless, match=rf"{topic_name} partition \d"):
        await make_producer(kafka).start()
