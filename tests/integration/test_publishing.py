"""What becomes of an event that the broker refuses for itself: it is kept, announced, and nobody waits for it."""

import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from acceptance.bodies import message, new_chat
from acceptance.http_client import post
from kafka_for_tests import FoundKafka
from oracle import Sent, judge, read_topics
from relay_process import RelayProcess, wait_until

LIMIT = 50_000


@pytest.fixture
def relay(kafka: FoundKafka, topic_name: str, tmp_path: Path) -> Iterator[RelayProcess]:
    """Yield a relay that takes larger bodies than its topic does; not started yet."""
    kafka.create_topics(topic_name, partitions=6, config={"max.message.bytes": str(LIMIT)})
    settings = {
        "RELAY_TOPIC": topic_name,
        "RELAY_DEAD_LETTER_TOPIC": f"{topic_name}.dead-letter",
        "RELAY_WATERMARK_TOPIC": f"{topic_name}.watermarks",
        "RELAY_TOPIC_CREATE": "true",
        "RELAY_KAFKA_COMPRESSION": "none",
    }
    relay = RelayProcess(tmp_path / "relay", kafka.bootstrap_servers, settings)
    yield relay
    relay.close()
    print(relay.log_tail())


def too_large(chat: str, number: int) -> bytes:
    return message(chat, number, text=random.Random(number).randbytes(LIMIT).hex())


@pytest.mark.parametrize("delivery", ["exactly-once", "at-least-once"])
def test_an_event_that_the_broker_refuses_is_kept_and_announced_and_the_others_of_its_chat_go_on(
    kafka: FoundKafka, relay: RelayProcess, topic_name: str, delivery: str
) -> None:
    relay.settings["RELAY_DELIVERY"] = delivery
    chat = new_chat()
    refused = too_large(chat, 50)
    bodies = (
        [message(chat, number) for number in range(50)]
        + [refused]
        + [message(chat, number) for number in range(51, 100)]
    )
    dead_letters = relay.settings["RELAY_DEAD_LETTER_TOPIC"]
    relay.start()

    assert {post(relay.port, body).status for body in bodies} == {200}

    relay.wait_until_drained()
    there = read_topics(kafka.bootstrap_servers, topic_name)
    verdict = judge([Sent(body) for body in bodies if body != refused], there, topic=topic_name)
    assert not {
        kind: found for kind, found in verdict.faults.items() if (kind, delivery) != ("doubled", "at-least-once")
    }
    announced, *again = read_topics(kafka.bootstrap_servers, dead_letters)
    assert delivery == "at-least-once" or not again
    assert announced.key == chat.encode()
    assert announced.header("relay_error_reason") == "rejected_by_kafka"
    assert announced.header("relay_error_detail")
    assert announced.header("ce_type") == "chat.rocket.omnichannel.message.saved"
    assert json.loads(announced.value or b"null") == {}
    assert relay.status()["spool"]["dead_events"] == 1
    assert relay.metrics()["relay_spool_dead_events"] == 1
    assert relay.metrics()['relay_events_dead_lettered_total{reason="rejected_by_kafka"}'] == 1
    assert len(relay.log("event_dead")) == 1
    # Once with others and once alone: Kafka says which batch it was, and so large an event has one of its own.
    assert relay.metrics()["relay_producer_restarts_total"] <= 2

    relay.kill()
    relay.start()

    relay.wait_until_drained()
    assert relay.status()["spool"]["dead_events"] == 1
    assert relay.stop() == 0
    assert dead_bodies(relay) == [refused]
    assert delivery == "at-least-once" or len(read_topics(kafka.bootstrap_servers, dead_letters)) == 1


def test_several_refused_events_are_all_found(kafka: FoundKafka, relay: RelayProcess, topic_name: str) -> None:
    chats = [new_chat() for _ in range(3)]
    refused = {too_large(chat, number) for number, chat in enumerate(chats)}
    good = [message(chat, number) for number in range(3) for chat in chats]
    bodies = [*good[:4], *refused, *good[4:]]
    relay.start()

    assert {post(relay.port, body).status for body in bodies} == {200}

    wait_until(lambda: relay.status()["spool"]["dead_events"] == len(refused), "all are found")
    relay.wait_until_drained()
    there = read_topics(kafka.bootstrap_servers, topic_name)
    assert not judge(list(map(Sent, good)), there, topic=topic_name).faults
    assert relay.stop() == 0
    assert set(dead_bodies(relay)) == refused


def dead_bodies(relay: RelayProcess) -> list[bytes]:
    with closing(sqlite3.connect(f"file:{relay.spool_path}?mode=ro", uri=True)) as spool:
        return [body for (body,) in spool.execute("SELECT body FROM dead ORDER BY sequence")]
