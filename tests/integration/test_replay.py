"""Replays that come in each other's way, at moments that no kill would hit."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from confluent_kafka import Producer as OtherProducer
from kafka_for_tests import FoundKafka
from oracle import read_topics

from relay.config import Settings
from relay.errors import Fenced, RecordsRefused
from relay.event import DeadLetterReason, Delivery, Event
from relay.kafka import Producer
from relay.operate import replayer
from relay.operate.replayer import Left, Replay
from relay.record import Record, RecordMaker, Topics

COUNT, PARTITIONS = 60, 3


@pytest.fixture
def settings(kafka: FoundKafka, topic_name: str) -> Settings:
    """Return the settings of a relay with dead letters on several partitions, all of which are valid now."""
    dead = f"{topic_name}.dead"
    kafka.create_topics(topic_name, dead, partitions=PARTITIONS)
    maker = RecordMaker(Topics(topic_name, dead), lambda _: None)
    producer = OtherProducer({"bootstrap.servers": kafka.bootstrap_servers})
    for number in range(COUNT):
        delivery = Delivery("default", b'{"_id":"chat-%d","type":"Message"}' % number, 1_764_000_000_000)
        event = Event.of(delivery, delivery.parse())._replace(reason=DeadLetterReason.SCHEMA)
        _, _, key, value, headers, *_ = maker.record(number + 1, event, 1_764_000_000_001)
        named: Any = dict(headers)
        producer.produce(dead, value, key, headers=named, partition=number % PARTITIONS)
    producer.flush(30)
    return Settings.read(
        {
            "RELAY_ALLOW_UNAUTHENTICATED": "true",
            "RELAY_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
            "RELAY_TOPIC": topic_name,
            "RELAY_DEAD_LETTER_TOPIC": dead,
            "RELAY_SCHEMA_VALIDATION": "off",
        }
    )


def landed(settings: Settings) -> Counter[bytes | None]:
    return Counter(record.key for record in read_topics(settings.kafka_bootstrap_servers, settings.topic))


ONCE = Counter({f"chat-{number}".encode(): 1 for number in range(COUNT)})


async def test_what_another_run_replays_while_this_one_looks_for_a_refused_event_is_not_doubled(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Producer.publish
    other = Replay(settings)
    begun = False

    async def interrupted(producer: Producer, records: Sequence[Record]) -> None:
        nonlocal begun
        if begun:
            return await publish(producer, records)
        begun = True
        await other.run(dry=False)
        raise RecordsRefused

    monkeypatch.setattr(Producer, "publish", interrupted)
    replay = Replay(settings)
    await replay.run(dry=False)

    assert landed(settings) == ONCE
    assert (other.replayed, replay.replayed, replay.before) == (COUNT, 0, COUNT)


async def test_a_run_that_was_overtaken_is_ended_before_it_writes(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Producer.publish
    begun = False

    async def interrupted(producer: Producer, records: Sequence[Record]) -> None:
        nonlocal begun
        if not begun:
            begun = True
            await Replay(settings).run(dry=False)
        await publish(producer, records)

    monkeypatch.setattr(Producer, "publish", interrupted)
    replay = Replay(settings)
    with pytest.raises(Fenced):
        await replay.run(dry=False)

    assert landed(settings) == ONCE
    assert replay.replayed == 0


async def test_the_one_event_that_is_refused_is_found_and_left(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = Producer.publish

    async def refusing(producer: Producer, records: Sequence[Record]) -> None:
        if any(record.key == b"chat-31" for record in records):
            raise RecordsRefused
        await publish(producer, records)

    monkeypatch.setattr(Producer, "publish", refusing)
    replay = Replay(settings)
    await replay.run(dry=False)

    assert landed(settings) == ONCE - Counter([b"chat-31"])
    assert (replay.replayed, replay.left, replay.complete) == (COUNT - 1, Counter({Left.REFUSED: 1}), False)


async def test_a_batch_is_no_larger_than_it_may_be(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayer, "BATCH", 7)
    publish = Producer.publish
    sizes = []

    async def counting(producer: Producer, records: Sequence[Record]) -> None:
        sizes.append(len(records))
        await publish(producer, records)

    monkeypatch.setattr(Producer, "publish", counting)
    await Replay(settings).run(dry=False)

    assert sizes == [14, 14, 12] * PARTITIONS  # Each with its mark; a batch is of one partition.
    assert landed(settings) == ONCE


async def test_progress_ends_with_all_that_there_is(settings: Settings) -> None:
    told: list[tuple[int, int]] = []
    await Replay(settings, lambda done, total: told.append((done, total))).run(dry=True)
    assert told == sorted(told)
    assert told[-1] == (2 * COUNT, 2 * COUNT)
