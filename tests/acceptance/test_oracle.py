"""The oracle itself: it sees each kind of fault, and none where there is none."""

import hashlib
import json
import time
from collections.abc import Callable

import pytest
from confluent_kafka import Producer
from kafka_for_tests import FoundKafka
from oracle import Landed, Sent, judge, murmur2_partition, read_topics

TOPIC = "events"


def body(chat: str, number: int) -> bytes:
    message = {"_id": f"m{number}", "ts": "2026-11-20T09:00:01.120Z"}
    return json.dumps({"_id": chat, "type": "Message", "visitor": {}, "messages": [message]}).encode()


def landed(event: Sent, offset: int, *, id_: str | None = None, sequence: int | None = None) -> Landed:
    id_ = id_ or hashlib.sha256(b"default\n" + event.body).hexdigest()
    chat = json.loads(event.body)["_id"]
    headers = {
        "ce_specversion": "1.0",
        "ce_id": id_,
        "ce_source": "/rocketchat/default",
        "ce_type": "chat.rocket.omnichannel.message.saved",
        "ce_subject": chat,
        "ce_time": "2026-11-20T09:00:01.120Z",
        "content-type": "application/json",
        "relay_sequence": str(offset + 1 if sequence is None else sequence),
        "relay_received_at": "2026-11-20T09:00:02.000Z",
    }
    encoded = tuple((name, value.encode()) for name, value in headers.items())
    return Landed(TOPIC, 0, offset, chat.encode(), event.body, encoded, int(time.time() * 1000))


SENT = [Sent(body("a", 1)), Sent(body("a", 2)), Sent(body("b", 3)), Sent(body("b", 4))]
GOOD = [landed(event, offset) for offset, event in enumerate(SENT)]


def faults(there: list[Landed], sent: list[Sent] = SENT) -> set[str]:
    return set(judge(sent, there, topic=TOPIC).faults)


def with_header(record: Landed, name: str, value: bytes | None) -> Landed:
    others = tuple(header for header in record.headers if header[0] != name)
    return record._replace(headers=others if value is None else (*others, (name, value)))


def test_what_was_answered_and_is_there_once_in_order_is_faultless() -> None:
    assert faults(GOOD) == set()


def test_chats_may_be_mixed() -> None:
    mixed = [SENT[2], SENT[0], SENT[3], SENT[1]]

    assert faults([landed(event, offset) for offset, event in enumerate(mixed)]) == set()


@pytest.mark.parametrize("lost", range(4))
def test_a_lost_record_is_missing(lost: int) -> None:
    assert faults(GOOD[:lost] + GOOD[lost + 1 :]) == {"missing"}


@pytest.mark.parametrize("number", range(4))
def test_a_second_record_of_an_event_is_doubled(number: int) -> None:
    assert faults([*GOOD, GOOD[number]._replace(offset=9)]) == {"doubled"}


def test_a_second_record_that_calls_itself_a_repeat_is_invented() -> None:
    assert "invented" in faults([*GOOD, landed(SENT[0], 9, id_=f"{GOOD[0].header('ce_id')}.2")._replace(value=b"{}")])


def test_a_second_record_under_another_id_is_doubled() -> None:
    assert "doubled" in faults([*GOOD, landed(SENT[0], 9, id_=f"{GOOD[0].header('ce_id')}.2")])


def test_records_of_one_chat_in_another_order_are_reordered() -> None:
    swapped = [landed(SENT[1], 0), landed(SENT[0], 1), *GOOD[2:]]

    assert faults(swapped) == {"reordered"}


def test_sequences_that_do_not_grow_are_reordered() -> None:
    assert faults([*GOOD[:3], landed(SENT[3], 3, sequence=2)]) == {"reordered"}


def test_a_chat_on_two_partitions_is_reordered() -> None:
    assert "reordered" in faults([GOOD[0]._replace(partition=1), *GOOD[1:]])


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record._replace(value=(record.value or b"") + b" "),
        lambda record: record._replace(value=None),
        lambda record: record._replace(key=b"another"),
        lambda record: record._replace(key=None),
        lambda record: record._replace(topic="another"),
        lambda record: record._replace(timestamp=record.timestamp + 3_600_000),
        lambda record: record._replace(headers=(*record.headers, ("extra", b"1"))),
        lambda record: record._replace(headers=(*record.headers, record.headers[0])),
    ],
)
def test_a_changed_record_is_corrupted(change: Callable[[Landed], Landed]) -> None:
    assert "corrupted" in faults([change(GOOD[0]), *GOOD[1:]])


@pytest.mark.parametrize("name", [name for name, _ in GOOD[0].headers])
@pytest.mark.parametrize("value", [None, b"another"])
def test_a_missing_or_wrong_header_is_corrupted(name: str, value: bytes | None) -> None:
    assert "corrupted" in faults([with_header(GOOD[0], name, value), *GOOD[1:]])


def test_a_record_that_nobody_sent_is_invented() -> None:
    assert faults([*GOOD, landed(Sent(body("c", 5)), 9)]) == {"invented"}


def test_a_record_without_an_id_that_nobody_sent_is_invented() -> None:
    assert faults([*GOOD, with_header(landed(Sent(body("c", 5)), 9), "ce_id", None)]) == {"invented"}


@pytest.mark.parametrize("there", [GOOD, GOOD[:3]])
def test_an_event_with_no_answer_may_be_there_or_not(there: list[Landed]) -> None:
    assert faults(there, [*SENT[:3], SENT[3]._replace(answered=False)]) == set()


def test_an_event_with_no_answer_must_not_be_there_twice_or_out_of_order() -> None:
    unsure = [SENT[0], SENT[1]._replace(answered=False)]

    assert faults([*GOOD[:2], GOOD[1]._replace(offset=9)], unsure) == {"doubled"}
    assert faults([landed(SENT[1], 0), landed(SENT[0], 1)], unsure) == {"reordered"}


def test_a_genuine_repeat_is_wanted_with_a_suffix() -> None:
    again = landed(SENT[0], 9, id_=f"{GOOD[0].header('ce_id')}.2")

    assert faults([*GOOD, again], [*SENT, SENT[0]]) == set()
    assert faults(GOOD, [*SENT, SENT[0]]) == {"missing"}


def test_a_dead_letter_is_wanted_with_its_reason_on_its_topic() -> None:
    sent = [SENT[0]._replace(reason="schema")]
    dead = with_header(GOOD[0]._replace(topic="dead"), "relay_error_reason", b"schema")
    explained = with_header(dead, "relay_error_detail", b"/visitor: required")

    def verdict(there: Landed) -> dict[str, list[str]]:
        return judge(sent, [there], topic=TOPIC, dead_letter_topic="dead").faults

    assert not verdict(explained)
    assert verdict(dead)
    assert verdict(explained._replace(topic=TOPIC))
    assert verdict(with_header(explained, "relay_error_reason", b"no_key"))


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_partitions_are_those_of_kafkas_own_test_vectors(key: bytes, hashed: int) -> None:
    assert murmur2_partition(key, 1 << 31) == hashed & 0x7FFFFFFF


def test_only_what_was_committed_is_read(kafka: FoundKafka, topic_name: str) -> None:
    kafka.create_topics(topic_name)
    producer = transactional(kafka, topic_name)
    for value, end in ((b"one", producer.commit_transaction), (b"two", producer.abort_transaction)):
        producer.begin_transaction()
        producer.produce(topic_name, value)
        producer.flush(30)
        end(30)

    assert [record.value for record in read_topics(kafka.bootstrap_servers, topic_name)] == [b"one"]


def test_an_open_transaction_is_not_taken_for_the_end(kafka: FoundKafka, topic_name: str) -> None:
    kafka.create_topics(topic_name)
    producer = transactional(kafka, topic_name)
    producer.begin_transaction()
    producer.produce(topic_name, b"hidden")
    assert producer.flush(30) == 0

    with pytest.raises(AssertionError, match="open transaction"):
        read_topics(kafka.bootstrap_servers, topic_name, seconds=1)

    producer.commit_transaction(30)
    assert [record.value for record in read_topics(kafka.bootstrap_servers, topic_name)] == [b"hidden"]


def transactional(kafka: FoundKafka, name: str) -> Producer:
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": name})
    producer.init_transactions(30)
    return producer
