"""What takes months to come: numbers that outgrow 32 bits, and producers that are replaced before theirs do."""

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from acceptance.bodies import message
from kafka_for_tests import FoundKafka
from oracle import Sent, judge, read_topics
from prometheus_client import CollectorRegistry

import relay.kafka
from relay.connection import Connection
from relay.event import Delivery, Event
from relay.kafka import Producer, TopicPlan
from relay.metrics import Metrics
from relay.publisher import Publisher
from relay.record import RecordMaker, Topics
from relay.spool import Spool

#: The sequence that a spool reaches after half a year at 100 events/s and more.
FAR = 2**31 - 250
RECORDS_OF_A_PRODUCER = 100
BODIES = [message(f"chat-{number % 7}", number) for number in range(500)]


async def test_sequences_outgrow_32_bits_and_producers_are_replaced_in_time(
    kafka: FoundKafka, topic_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay.kafka, "MAX_RECORDS", RECORDS_OF_A_PRODUCER)
    metrics = Metrics(CollectorRegistry())
    plan = TopicPlan([topic_name], f"{topic_name}.watermarks", create=True, max_message_bytes=100_000)
    producers: list[Producer] = []
    async with asyncio.timeout(120):
        spool = await old_spool(tmp_path / "relay.db", metrics)

        def connect() -> Producer:
            producers.append(Producer(Connection(kafka.bootstrap_servers, "test"), plan, spool.identity, None))
            return producers[-1]

        records = RecordMaker(Topics(topic_name, "unused"), lambda _: None)
        publishing = asyncio.create_task(Publisher(spool, connect, records, metrics).run())
        for start in range(0, len(BODIES), 50):
            for body in BODIES[start : start + 50]:
                delivery = Delivery("default", body, 1_790_000_000_000)
                assert await spool.append(Event.of(delivery, delivery.parse()))
            await spool.drained()
        publishing.cancel()
        await asyncio.wait([publishing])
        await spool.close()

    there = read_topics(kafka.bootstrap_servers, topic_name)
    assert not judge([Sent(body) for body in BODIES], there, topic=topic_name).faults
    assert sorted(int(landed.header("relay_sequence") or 0) for landed in there) == list(range(FAR + 1, FAR + 501))
    assert len(producers) >= len(BODIES) // RECORDS_OF_A_PRODUCER
    # A replacement is no fault.
    assert metrics.registry.get_sample_value("relay_producer_restarts_total") == 0


async def old_spool(path: Path, metrics: Metrics) -> Spool:
    """A spool that has come far."""
    new = await Spool.open(path, max_bytes=1 << 28, dedupe_seconds=300, metrics=metrics)
    await new.close()
    with closing(sqlite3.connect(path)) as file:
        file.execute("UPDATE published SET sequence = ?, total_events = ?", (FAR, FAR))
        file.commit()
    return await Spool.open(path, max_bytes=1 << 28, dedupe_seconds=300, metrics=metrics)
