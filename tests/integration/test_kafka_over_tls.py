"""The producer and a real Kafka that it reaches over TLS."""

import asyncio
import time
import uuid
from pathlib import Path

import uvloop
from kafka_for_pods import DEAD_LETTER_TOPIC, PASSWORD, TOPIC, USER, kafka_for_pods

from relay.connection import Connection
from relay.dev.kafka_runtime import Runtime
from relay.kafka import Producer, TopicPlan
from relay.watermark import Run, Watermark

#: One start of three is slow if each waits for the broker's goodbye: 30 s then, under a second otherwise.
STARTS = 8


def test_start_does_not_wait_for_the_brokers_goodbye(kafka_runtime: Runtime, tmp_path: Path) -> None:
    plan = TopicPlan(
        [TOPIC, DEAD_LETTER_TOPIC], "rocketchat.omnichannel.watermarks", create=False, max_message_bytes=1000
    )
    identity = str(uuid.uuid4())

    async def start_again_and_again(connection: Connection) -> list[int | None]:
        found = []
        for sequence in range(1, STARTS + 1):
            producer = Producer(connection, plan, identity, "zstd")
            started = time.monotonic()
            try:
                watermark = await producer.start()
                seconds = time.monotonic() - started
                await producer.publish([], Watermark(sequence, (Run(1, "run"),)))
            finally:
                await producer.close()
            assert seconds < 20
            found.append(watermark and watermark.sequence)
        return found

    with kafka_for_pods("127.0.0.1", tmp_path, kafka_runtime) as kafka:
        ca_file = str(kafka.ca_file)
        connection = Connection(kafka.address, "relay", "SASL_SSL", "SCRAM-SHA-512", USER, PASSWORD, ssl_cafile=ca_file)
        # The loop that the relay runs on: this is about how it ends a TLS connection.
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert runner.run(start_again_and_again(connection)) == [None, *range(1, STARTS)]
