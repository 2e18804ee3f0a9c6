"""The check of millions of events: it finds what is wrong with a few."""

import json
import uuid
from collections.abc import Sequence

import pytest
from bench import landed as landed_module
from bench.landed import Landed, landed
from confluent_kafka import Producer
from kafka_for_tests import FoundKafka


def produce(kafka: FoundKafka, topic: str, numbers: Sequence[int], *, commit: bool = True) -> Producer:
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": uuid.uuid4().hex})
    producer.init_transactions(30)
    producer.begin_transaction()
    for number in numbers:
        producer.produce(topic, json.dumps({"messages": [{"_id": f"{number:017}"}]}), "chat")
    producer.flush(30)
    if commit:
        producer.commit_transaction(30)
    return producer


@pytest.mark.parametrize(
    ("numbers", "found"),
    [
        ([1, 2, 3, 11], Landed(0, 0, 0, 0)),
        ([1, 2, 11], Landed(1, 0, 0, 0)),
        ([1, 2, 3, 3, 11], Landed(0, 1, 0, 0)),
        ([2, 1, 3, 11], Landed(0, 0, 1, 0)),
        ([1, 2, 3, 7, 11], Landed(0, 0, 0, 1)),
    ],
)
def test_it_finds_what_is_missing_doubled_reordered_and_invented(
    kafka: FoundKafka, topic_name: str, numbers: Sequence[int], found: Landed
) -> None:
    kafka.create_topics(topic_name)
    produce(kafka, topic_name, numbers)
    assert landed(kafka.bootstrap_servers, topic_name, [range(1, 4), range(11, 12)]) == found


def test_a_transaction_that_is_open_does_not_hide_what_follows(
    kafka: FoundKafka, topic_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(landed_module, "_SILENCE_SECONDS", 3.0)
    kafka.create_topics(topic_name)
    produce(kafka, topic_name, [1, 2, 3])
    left_open = produce(kafka, topic_name, [3], commit=False)
    with pytest.raises(AssertionError, match="cannot be read to their end"):
        landed(kafka.bootstrap_servers, topic_name, [range(1, 4)])
    left_open.abort_transaction(30)
    assert landed(kafka.bootstrap_servers, topic_name, [range(1, 4)]) == Landed(0, 0, 0, 0)
