"""What is true when Kafka has lost the watermark of a spool: nothing is lost, and what comes twice is known."""

import json
from collections.abc import Callable

import pytest
from acceptance.bodies import message, new_chat
from acceptance.conftest import MakeRelay
from acceptance.http_client import post
from confluent_kafka.admin import AdminClient
from kafka_for_tests import FoundKafka
from oracle import Sent, judge, read_topics
from relay_process import RelayProcess, run_relay, wait_until


def delete_topic(kafka: FoundKafka, relay: RelayProcess) -> None:
    topic = relay.settings["RELAY_WATERMARK_TOPIC"]
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    for deleted in admin.delete_topics([topic]).values():
        deleted.result(30)
    wait_until(lambda: topic not in admin.list_topics(timeout=30).topics, "the topic is gone")


def name_another(_: FoundKafka, relay: RelayProcess) -> None:
    relay.settings["RELAY_WATERMARK_TOPIC"] += ".another"


Lose = Callable[[FoundKafka, RelayProcess], None]
in_each_way = pytest.mark.parametrize("lose_the_watermarks", [delete_topic, name_another])


def deliver(relay: RelayProcess, chat: str, *numbers: int) -> list[Sent]:
    bodies = [message(chat, number) for number in numbers]
    assert {post(relay.port, body).status for body in bodies} == {200}
    return [Sent(body) for body in bodies]


def noted(relay: RelayProcess) -> int:
    """Up to which sequence the spool's file knows what is published."""
    ran = run_relay(relay.directory, "spool", "status", "--json", settings=relay.settings)
    assert ran.returncode == 0, ran.stderr
    return int(json.loads(ran.stdout)["published_sequence"])


@in_each_way
def test_after_an_orderly_stop_a_lost_watermark_is_told_and_doubles_nothing(
    kafka: FoundKafka, make_relay: MakeRelay, lose_the_watermarks: Lose
) -> None:
    relay = make_relay(kafka).start(connected=True)
    chat = new_chat()
    sent = deliver(relay, chat, *range(5))
    assert relay.stop() == 0
    lose_the_watermarks(kafka, relay)

    relay.start(connected=True)

    assert relay.wait_for("watermark_lost")["published"] == 5
    sent += deliver(relay, chat, *range(5, 8))
    relay.wait_until_drained()
    assert relay.stop() == 0
    topic = relay.settings["RELAY_TOPIC"]
    assert not judge(sent, read_topics(kafka.bootstrap_servers, topic), topic=topic).faults
    relay.start(connected=True)
    assert not relay.log("watermark_lost")


@in_each_way
def test_after_a_crash_a_lost_watermark_doubles_what_the_spool_had_not_noted_and_nothing_else(
    kafka: FoundKafka, make_relay: MakeRelay, lose_the_watermarks: Lose
) -> None:
    relay = make_relay(kafka).start(connected=True)
    chat, topic = new_chat(), relay.settings["RELAY_TOPIC"]
    sent = deliver(relay, chat, *range(5))
    wait_until(lambda: noted(relay) == 5, "the file knows of the first ones")
    sent += deliver(relay, chat, *range(5, 8))
    published = f'relay_events_published_total{{topic="{topic}"}}'
    wait_until(lambda: relay.metrics()[published] == 8, "all are published", pause=0)
    relay.kill()
    known = noted(relay)
    lose_the_watermarks(kafka, relay)

    relay.start()

    relay.wait_until_drained()
    assert relay.wait_for("watermark_lost")["published"] == known
    assert relay.stop() == 0
    verdict = judge(sent, read_topics(kafka.bootstrap_servers, topic), topic=topic)
    assert len(verdict.doubled) == 8 - known
    assert not {kind for kind in verdict.faults if kind not in {"doubled", "reordered"}}
