"""What the README says of the limits of the guarantees, as it stands there: each is seen, and nothing beyond it."""

import json
import shutil
import sqlite3
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from acceptance.bodies import message, new_chat, of_type
from acceptance.conftest import MakeRelay, OwnKafka
from acceptance.http_client import post
from acceptance.kafka_proxy import END_TXN, PRODUCE, KafkaProxy
from chaos.syscalls import Control, compiler
from confluent_kafka import Producer, admin
from kafka_for_tests import FoundKafka, set_topic_config
from oracle import Landed, Sent, id_of, judge, read_topics
from relay_process import RelayProcess, run_relay, wait_until

from relay.dev.kafka import LocalKafka
from relay.dev.kafka_requests import create_topics

AnyKafka = FoundKafka | LocalKafka


def deliver(relay: RelayProcess, *bodies: bytes) -> None:
    assert [post(relay.port, body).status for body in bodies] == [200] * len(bodies)


def published(relay: RelayProcess, *bodies: bytes) -> None:
    """They are delivered, and on Kafka."""
    deliver(relay, *bodies)
    relay.wait_until_drained()


def landed(relay: RelayProcess, kafka: AnyKafka) -> list[Landed]:
    return read_topics(kafka.bootstrap_servers, relay.settings["RELAY_TOPIC"])


def times(bodies: Sequence[bytes], records: Sequence[Landed]) -> list[int]:
    """How often each of *bodies* has landed, each time with the one `ce_id` of it; nothing else has."""
    ids = [id_of(body) for body in bodies]
    assert Counter(record.value for record in records).keys() <= set(bodies)
    assert all(record.header("ce_id") == ids[bodies.index(record.value or b"")] for record in records)
    found = Counter(record.value for record in records)
    return [found[body] for body in bodies]


# --- Read uncommitted. ---


def test_consumers_that_read_uncommitted_see_twice_what_was_aborted_and_made_again(
    proxied: tuple[LocalKafka, KafkaProxy], make_relay: MakeRelay
) -> None:
    kafka, proxy = proxied
    relay = make_relay(kafka).start(connected=True)
    proxy.hold_request(END_TXN)
    body = message(new_chat())
    deliver(relay, body)
    assert proxy.holding.wait(30)
    relay.kill()
    proxy.drop()
    relay.start()
    relay.wait_until_drained()
    assert relay.stop() == 0

    assert times([body], landed(relay, kafka)) == [1]
    assert [record.value for record in uncommitted(kafka, relay.settings["RELAY_TOPIC"])] == [body, body]


def test_a_dead_event_whose_announcement_is_refused_holds_up_no_other(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka)
    topic = relay.settings["RELAY_DEAD_LETTER_TOPIC"]
    # A compacted topic takes no record without a key.
    kafka.create_topics(topic, config={"cleanup.policy": "compact"})
    relay.start(connected=True)
    keyless, body = b'{"type":"LivechatOfflineMessage"}', message(new_chat())
    published(relay, keyless, body)

    assert relay.status()["spool"]["dead_events"] == 1
    assert relay.log("announcement_refused")
    assert times([body], landed(relay, kafka)) == [1]
    assert read_topics(kafka.bootstrap_servers, topic) == []
    # What its partition was tried with, for the event and for its announcement.
    assert [(record.value, record.headers) for record in uncommitted(kafka, topic)] == [(b"{}", ())] * 2
    set_topic_config(kafka.bootstrap_servers, topic, "cleanup.policy", "delete")
    requeued = run_relay(relay.directory, "dead", "requeue", "--all", settings=relay.settings)
    assert requeued.returncode == 0, requeued.stderr
    (letter,) = read_topics(kafka.bootstrap_servers, topic)
    assert (letter.value, letter.header("relay_error_reason")) == (keyless, "no_key")
    assert relay.stop() == 0


def uncommitted(kafka: AnyKafka, topic: str) -> list[Landed]:
    return read_topics(kafka.bootstrap_servers, topic, isolation_level="read_uncommitted")


# --- Retries. ---


def test_without_a_spool_a_retry_across_a_crash_lands_twice(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka, RELAY_ACK="kafka").start(connected=True)
    body = message(new_chat())
    deliver(relay, body, body)
    relay.kill()
    relay.start(connected=True)
    deliver(relay, body, body)
    assert relay.stop() == 0

    assert times([body], landed(relay, kafka)) == [2]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_repeat_after_a_crash_in_the_second_after_the_answer_counts_as_a_retry(
    kafka: FoundKafka, make_relay: MakeRelay, *, at_once: bool
) -> None:
    relay = make_relay(kafka).start(connected=True)
    body = of_type("LivechatSessionQueued", new_chat())
    deliver(relay, body)
    if not at_once:
        wait_until(lambda: answers_noted(relay) == 1, "the answer is in the file")
    relay.kill()
    noted = answers_noted(relay) == 1  # Which a slow machine may have had the time for, too.
    relay.start()
    published(relay, body)
    assert relay.stop() == 0

    ids = sorted(record.header("ce_id") or "" for record in landed(relay, kafka))
    assert ids == [id_of(body), *([f"{id_of(body)}.2"] if noted else [])]


def answers_noted(relay: RelayProcess) -> int:
    with closing(sqlite3.connect(f"file:{relay.spool_path}?mode=ro", uri=True)) as spool:
        return int(spool.execute("SELECT count(*) FROM repeats WHERE answered").fetchone()[0])


@pytest.mark.skipif(not compiler(), reason="no C compiler to make a clock wrong with")
@pytest.mark.parametrize(("hours", "expected"), [(0, 1), (1, 2), (-1, 1)])
def test_a_retry_across_a_restart_with_a_wrong_clock_lands_twice(
    kafka: FoundKafka, make_relay: MakeRelay, tmp_path: Path, hours: int, expected: int
) -> None:
    control = Control(tmp_path, tmp_path / "unharmed")
    relay = make_relay(kafka)
    relay.settings |= control.environ
    relay.start(connected=True)
    body = message(new_chat())
    deliver(relay, body)
    relay.kill()
    with control.clock_off(hours * 3600):
        relay.start(connected=True)
        deliver(relay, body)
        relay.wait_until_drained()
        assert relay.stop() == 0

    assert times([body], landed(relay, kafka)) == [expected]


# --- Two relays on copies of one spool. ---


def on_a_copy(make_relay: MakeRelay, kafka: AnyKafka, relay: RelayProcess) -> RelayProcess:
    """Another relay, on a copy of the spool of one that runs."""
    twin = make_relay(kafka, name="twin")
    twin.spool_path.parent.mkdir(parents=True)
    with closing(sqlite3.connect(relay.spool_path)) as spool, closing(sqlite3.connect(twin.spool_path)) as copy:
        spool.backup(copy)
    return twin


def test_of_two_relays_on_copies_each_publishes_what_it_took_and_a_retry_that_both_took_lands_twice(
    kafka: FoundKafka, make_relay: MakeRelay
) -> None:
    relay = make_relay(kafka).start(connected=True)
    before, retried, ours, theirs = (message(new_chat(), number) for number in range(4))
    published(relay, before)
    twin = on_a_copy(make_relay, kafka, relay).start(connected=True)

    published(relay, ours, retried)
    published(twin, theirs, retried)
    later: list[bytes] = []
    while not relay.log("fenced"):
        later += [message(new_chat()), message(new_chat())]
        published(relay, later[-2])
        published(twin, later[-1])

    assert twin.stop() == relay.stop() == 0
    assert times([before, ours, theirs, *later, retried], landed(relay, kafka)) == [1] * (3 + len(later)) + [2]


@pytest.mark.parametrize("other_commits", [True, False])
def test_of_two_relays_on_copies_what_one_has_committed_and_not_noted_lands_twice_if_the_other_commits(
    proxied: tuple[LocalKafka, KafkaProxy], make_relay: MakeRelay, *, other_commits: bool
) -> None:
    kafka, proxy = proxied
    relay = make_relay(kafka).start(connected=True)
    before, ours, theirs = (message(new_chat(), number) for number in range(3))
    published(relay, before)
    # There already: the first one's commit does not wait for its answer for ever.
    twin = on_a_copy(make_relay, kafka, relay).start(connected=True)
    proxy.hold_answer(END_TXN)
    deliver(relay, ours)
    assert proxy.holding.wait(30)

    if other_commits:
        published(twin, theirs)
    proxy.drop()

    relay.wait_until_drained()
    assert relay.stop() == twin.stop() == 0
    assert times([before, ours, theirs], landed(relay, kafka)) == ([1, 2, 1] if other_commits else [1, 1, 0])


# --- A spool restored from a copy. ---


@pytest.mark.parametrize(("starts", "expected"), [(1, 1), (7, 1), (8, 2)])
def test_what_was_published_since_a_copy_is_not_sent_again_unless_after_eight_starts(
    breakable_kafka: LocalKafka, make_relay: MakeRelay, tmp_path: Path, starts: int, expected: int
) -> None:
    (broker,) = breakable_kafka.brokers
    relay = make_relay(breakable_kafka).start(connected=True)
    before, since, restored = (message(new_chat(), number) for number in range(3))
    published(relay, before)
    broker.freeze()
    deliver(relay, since)
    relay.kill()
    shutil.copytree(relay.spool_path.parent, tmp_path / "copy")
    broker.thaw()
    each = [message(new_chat()) for _ in range(starts)]
    for body in each:
        relay.start(connected=True)
        published(relay, body)
        assert relay.stop() == 0
    shutil.rmtree(relay.spool_path.parent)
    shutil.copytree(tmp_path / "copy", relay.spool_path.parent)

    relay.start(connected=True)

    published(relay, restored)
    assert relay.stop() == 0
    assert times([before, *each, restored, since], landed(relay, breakable_kafka)) == [1] * (starts + 2) + [expected]


# --- A machine that is set back while the relay runs. ---


def come_from_the_future(kafka: AnyKafka, relay: RelayProcess, *bodies: bytes) -> None:
    """
    Does to Kafka what the relay did after the moment to which its machine is set back: publishes *bodies* and three
    other events, under its transactional id.
    """
    topic, watermarks = relay.settings["RELAY_TOPIC"], relay.settings["RELAY_WATERMARK_TOPIC"]
    last = read_topics(kafka.bootstrap_servers, watermarks)[-1]
    assert last.key
    watermark = json.loads(last.value or b"")
    watermark["sequence"] += len(bodies) + 3
    identity = last.key.decode()
    producer = Producer(
        {"bootstrap.servers": kafka.bootstrap_servers, "transactional.id": f"relay-{identity}", "acks": "all"}
    )
    producer.init_transactions(30)
    producer.begin_transaction()
    for body in bodies:
        producer.produce(topic, body, json.loads(body)["_id"].encode(), headers={"ce_id": id_of(body)})
    producer.produce(watermarks, json.dumps(watermark).encode(), last.key, partition=last.partition)
    producer.commit_transaction(30)


def test_what_a_machine_published_before_it_was_set_back_is_published_again_and_nothing_is_lost(
    proxied: tuple[LocalKafka, KafkaProxy], make_relay: MakeRelay
) -> None:
    kafka, proxy = proxied
    relay = make_relay(kafka).start(connected=True)
    before, again, since = (message(new_chat(), number) for number in range(3))
    published(relay, before)
    proxy.hold_request(PRODUCE)
    deliver(relay, again)
    assert proxy.holding.wait(30)
    come_from_the_future(kafka, relay, again)
    proxy.drop()

    published(relay, since)

    assert relay.log("spool_set_back")
    relay.kill()
    relay.start(connected=True)
    relay.wait_until_drained()
    assert relay.stop() == 0
    assert times([before, again, since], landed(relay, kafka)) == [1, 2, 1]


def test_what_a_machine_accepts_after_it_was_set_back_may_be_lost(
    breakable_kafka: LocalKafka, make_relay: MakeRelay
) -> None:
    (broker,) = breakable_kafka.brokers
    relay = make_relay(breakable_kafka).start(connected=True)
    before, since, later = (message(new_chat(), number) for number in range(3))
    published(relay, before)
    come_from_the_future(breakable_kafka, relay)
    broker.freeze()
    deliver(relay, since)
    relay.kill()
    broker.thaw()

    relay.start(connected=True)

    published(relay, later)
    assert relay.stop() == 0
    assert times([before, since, later], landed(relay, breakable_kafka)) == [1, 0, 1]


# --- Topics. ---


def test_a_deleted_topic_takes_along_what_it_had_and_what_comes_meanwhile_lands_on_the_new_one(
    kafka: FoundKafka, make_relay: MakeRelay
) -> None:
    relay = make_relay(kafka, RELAY_TOPIC_CREATE="false")
    topic = relay.settings["RELAY_TOPIC"]
    kafka.create_topics(topic, partitions=3)
    kafka.create_topics(relay.settings["RELAY_DEAD_LETTER_TOPIC"])
    kafka.create_topics(relay.settings["RELAY_WATERMARK_TOPIC"], config={"cleanup.policy": "compact"})
    relay.start(connected=True)
    chat = new_chat()
    gone, *meanwhile = (message(chat, number) for number in range(20))
    published(relay, gone)
    client = admin.AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    for deleted in client.delete_topics([topic]).values():
        deleted.result(30)
    wait_until(lambda: topic not in client.list_topics(timeout=30).topics, "the topic is gone")

    deliver(relay, *meanwhile)
    wait_until(lambda: topic in (relay.status()["kafka"]["error"] or ""), "it says which topic is missing", seconds=60)
    assert relay.status()["spool"]["events"] == len(meanwhile)
    kafka.create_topics(topic, partitions=3)

    relay.wait_until_drained()
    assert relay.stop() == 0
    assert not judge([Sent(body) for body in meanwhile], landed(relay, kafka), topic=topic).faults


def test_events_that_waited_for_longer_than_their_topic_lets_them_wait_on_until_it_does(
    breakable_kafka: LocalKafka, make_relay: MakeRelay
) -> None:
    (broker,) = breakable_kafka.brokers
    servers = breakable_kafka.bootstrap_servers
    relay = make_relay(breakable_kafka)
    topic = relay.settings["RELAY_TOPIC"]
    create_topics(servers, topic, config={"message.timestamp.before.max.ms": "2000"})
    relay.start(connected=True)
    chat = new_chat()
    bodies = [message(chat, number) for number in range(5)]
    broker.freeze()
    deliver(relay, *bodies)
    time.sleep(3)  # Longer than the topic takes: brokers go by their own clock.
    broker.thaw()

    told = "message.timestamp.before.max.ms. While publishing to " + topic
    wait_until(lambda: told in (relay.status()["kafka"]["error"] or ""), "it says what to do", seconds=60)
    assert relay.status()["spool"]["events"] == len(bodies)
    set_topic_config(servers, topic, "message.timestamp.before.max.ms", "3600000")

    relay.wait_until_drained()
    assert relay.status()["spool"]["dead_events"] == 0
    assert relay.stop() == 0
    assert not judge([Sent(body) for body in bodies], landed(relay, breakable_kafka), topic=topic).faults


@pytest.mark.skipif(not compiler(), reason="no C compiler to make a clock wrong with")
def test_the_events_of_a_relay_whose_clock_is_more_than_an_hour_ahead_wait_until_it_is_right(
    kafka: FoundKafka, make_relay: MakeRelay, tmp_path: Path
) -> None:
    control = Control(tmp_path, tmp_path / "unharmed")
    relay = make_relay(kafka)
    relay.settings |= control.environ
    relay.start(connected=True)
    bodies = [message(new_chat(), number) for number in range(3)]
    with control.clock_off(2 * 3600):
        deliver(relay, *bodies)
        wait_until(lambda: "see to the clocks" in (relay.status()["kafka"]["error"] or ""), "it says what to do")
        assert relay.status()["spool"]["events"] == len(bodies)

    relay.wait_until_drained()
    assert relay.status()["spool"]["dead_events"] == 0
    assert relay.stop() == 0
    assert times(bodies, landed(relay, kafka)) == [1, 1, 1]


def test_a_body_that_the_brokers_take_no_request_for_holds_up_all_others(
    own_kafka: OwnKafka, make_relay: MakeRelay
) -> None:
    kafka = own_kafka(properties={"socket.request.max.bytes": "1000000"})
    relay = make_relay(kafka, RELAY_KAFKA_COMPRESSION="none").start(connected=True)
    large, other = message(new_chat(), text="x" * 2_000_000), message(new_chat())
    deliver(relay, large, other)
    relay.wait_for("kafka_lost", seconds=60)
    assert relay.status()["spool"]["events"] == 2
    # Nothing is lost.
    relay.kill()
    relay.settings["RELAY_KAFKA_COMPRESSION"] = "zstd"
    relay.start()
    relay.wait_until_drained()
    assert relay.stop() == 0
    assert times([large, other], landed(relay, kafka)) == [1, 1]


def test_partitions_added_to_a_topic_move_chats_and_lose_their_order_and_nothing_else(
    kafka: FoundKafka, make_relay: MakeRelay
) -> None:
    relay = make_relay(kafka)
    topic = relay.settings["RELAY_TOPIC"]
    kafka.create_topics(topic, partitions=2)
    chats = [new_chat() for _ in range(20)]
    older, newer = ([message(chat, number) for number in numbers for chat in chats] for numbers in ((1, 2), (3, 4)))
    relay.start(connected=True)
    published(relay, *older)
    client = admin.AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    for added in client.create_partitions([admin.NewPartitions(topic, 7)]).values():  # type: ignore[attr-defined]
        added.result(30)
    assert relay.stop() == 0
    relay.start(connected=True)
    published(relay, *newer)
    assert relay.stop() == 0

    records = landed(relay, kafka)
    verdict = judge([Sent(body) for body in older + newer], records, topic=topic)
    assert verdict.faults.keys() == {"reordered"}
    assert verdict.reordered[0].endswith("is on several partitions")
    for part in (older, newer):
        of_part = [record for record in records if record.value in part]
        assert not judge([Sent(body) for body in part], of_part, topic=topic).faults


# --- Other promises. ---


def test_without_a_spool_the_answer_is_503_while_kafka_is_away_and_200_means_that_it_is_there(
    breakable_kafka: LocalKafka, make_relay: MakeRelay
) -> None:
    (broker,) = breakable_kafka.brokers
    relay = make_relay(breakable_kafka, RELAY_ACK="kafka").start(connected=True)
    before, meanwhile = message(new_chat()), message(new_chat())
    deliver(relay, before)
    broker.kill()
    assert post(relay.port, meanwhile).status == 503
    broker.start()
    wait_until(lambda: post(relay.port, meanwhile).status == 200, "it is taken", seconds=60)
    relay.kill()

    assert times([before, meanwhile], landed(relay, breakable_kafka)) == [1, 1]


def test_at_least_once_repeats_after_a_crash_out_of_order_and_loses_nothing(
    proxied: tuple[LocalKafka, KafkaProxy], make_relay: MakeRelay
) -> None:
    kafka, proxy = proxied
    relay = make_relay(kafka, RELAY_DELIVERY="at-least-once").start(connected=True)
    chat = new_chat()
    bodies = [message(chat, number) for number in range(20)]
    published(relay, *bodies[:5])
    proxy.hold_answer(PRODUCE)
    deliver(relay, *bodies[5:10])
    assert proxy.holding.wait(30)
    relay.kill()
    proxy.drop()
    relay.start()
    published(relay, *bodies[10:])
    assert relay.stop() == 0

    records = landed(relay, kafka)
    verdict = judge([Sent(body) for body in bodies], records, topic=relay.settings["RELAY_TOPIC"])
    assert verdict.faults.keys() == {"doubled"}
    places = [bodies.index(record.value or b"") for record in records]
    assert places != sorted(places)
    assert list(dict.fromkeys(places)) == list(range(20))
