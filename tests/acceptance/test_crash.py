"""Nothing is lost, doubled or reordered by a relay or a broker that dies, whatever the moment."""

import os
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from acceptance.bodies import message, new_chat
from acceptance.conftest import MakeRelay, OwnKafka
from acceptance.http_client import post
from acceptance.kafka_proxy import END_TXN, FETCH, INIT_PRODUCER_ID, LIST_OFFSETS, PRODUCE, KafkaProxy
from acceptance.senders import Senders
from kafka_for_tests import FoundKafka
from oracle import Sent, Verdict, judge, read_topics
from relay_process import RelayProcess, wait_until

from relay.dev.kafka import LocalKafka

#: How many times the relay and the broker are killed at random moments; the long run: 100 and 20.
KILLS = int(os.environ.get("RELAY_TEST_KILLS", "5"))
BROKER_KILLS = int(os.environ.get("RELAY_TEST_BROKER_KILLS", "2"))
SEED = int(os.environ.get("RELAY_TEST_SEED", str(random.randrange(10**9))))
RATE = 500


def verdict(kafka: FoundKafka | LocalKafka, relay: RelayProcess, sent: list[Sent]) -> Verdict:
    topic = relay.settings["RELAY_TOPIC"]
    return judge(sent, read_topics(kafka.bootstrap_servers, topic), topic=topic)


def send(relay: RelayProcess, chats: int = 8, events: int = 5) -> list[Sent]:
    """Some events of some chats, each answered 200."""
    bodies = [message(chat, number) for chat in [new_chat() for _ in range(chats)] for number in range(events)]
    assert {post(relay.port, body).status for body in bodies} == {200}
    return [Sent(body) for body in bodies]


# --- At moments that are made to last ---


@pytest.mark.parametrize("fault", ["frozen", "killed"])
def test_events_survive_a_relay_killed_between_200_and_publishing(
    breakable_kafka: LocalKafka, make_relay: MakeRelay, fault: str
) -> None:
    (broker,) = breakable_kafka.brokers
    relay = make_relay(breakable_kafka).start(connected=True)
    sent = send(relay)
    relay.wait_until_drained()
    if fault == "frozen":
        broker.freeze()
    else:
        broker.kill()
    sent += send(relay)

    relay.kill()
    broker.thaw()
    broker.start()
    relay.start()

    relay.wait_until_drained()
    assert relay.stop() == 0
    assert not verdict(breakable_kafka, relay, sent).faults


def test_events_survive_a_relay_killed_many_times_before_it_can_publish(
    breakable_kafka: LocalKafka, make_relay: MakeRelay
) -> None:
    (broker,) = breakable_kafka.brokers
    broker.freeze()
    relay = make_relay(breakable_kafka)
    sent = []
    for _ in range(5):
        relay.start()
        sent += send(relay, chats=2)
        relay.kill()

    broker.thaw()
    relay.start()

    relay.wait_until_drained()
    assert relay.stop() == 0
    assert not verdict(breakable_kafka, relay, sent).faults


@pytest.mark.parametrize("who", ["relay", "broker"])
@pytest.mark.parametrize("moment", ["before the commit", "after the commit, before its answer"])
def test_nothing_is_doubled_or_lost_by_a_death_at_the_commit(
    proxied: tuple[LocalKafka, KafkaProxy], make_relay: MakeRelay, who: str, moment: str
) -> None:
    kafka, proxy = proxied
    (broker,) = kafka.brokers
    relay = make_relay(kafka).start(connected=True)
    sent = send(relay)
    relay.wait_until_drained()
    if moment == "before the commit":
        proxy.hold_request(END_TXN)
    else:
        proxy.hold_answer(END_TXN)
    sent += send(relay)
    assert proxy.holding.wait(30)

    if who == "relay":
        relay.kill()
    else:
        broker.kill()
    proxy.drop()
    broker.start()
    if relay.ended:
        relay.start()
    sent += send(relay)

    relay.wait_until_drained()
    assert relay.stop() == 0
    assert not verdict(kafka, relay, sent).faults


def test_a_dead_relays_commit_that_arrives_late_doubles_nothing(
    proxied: tuple[LocalKafka, KafkaProxy], make_relay: MakeRelay
) -> None:
    kafka, proxy = proxied
    relay = make_relay(kafka).start(connected=True)
    proxy.hold_request(END_TXN)
    sent = send(relay)
    assert proxy.holding.wait(30)
    relay.kill()
    relay.start(connected=True)

    proxy.forward()

    sent += send(relay)
    relay.wait_until_drained()
    assert relay.stop() == 0
    assert not verdict(kafka, relay, sent).faults


def test_a_transaction_that_kafka_gave_up_while_the_relay_was_frozen_is_made_again_once(
    proxied: tuple[LocalKafka, KafkaProxy], make_relay: MakeRelay
) -> None:
    kafka, proxy = proxied
    relay = make_relay(kafka).start(connected=True)
    sent = send(relay)
    relay.wait_until_drained()
    proxy.hold_request(END_TXN)
    late = send(relay)
    assert proxy.holding.wait(30)

    relay.freeze()
    # Comes to its end once no transaction is open any more.
    there = read_topics(kafka.bootstrap_servers, relay.settings["RELAY_TOPIC"], seconds=120)
    assert len(there) == len(sent)
    proxy.forward()
    relay.thaw()

    sent += late + send(relay)
    relay.wait_until_drained()
    assert relay.stop() == 0
    assert not verdict(kafka, relay, sent).faults


def test_nothing_is_doubled_or_lost_when_produced_records_are_never_confirmed(
    proxied: tuple[LocalKafka, KafkaProxy], make_relay: MakeRelay
) -> None:
    kafka, proxy = proxied
    relay = make_relay(kafka).start(connected=True)
    proxy.hold_answer(PRODUCE)
    sent = send(relay)
    assert proxy.holding.wait(30)

    relay.kill()
    proxy.drop()
    relay.start()

    relay.wait_until_drained()
    assert relay.stop() == 0
    assert not verdict(kafka, relay, sent).faults


def test_the_former_producer_is_ended_before_the_watermark_is_read(
    proxied: tuple[LocalKafka, KafkaProxy], make_relay: MakeRelay
) -> None:
    # Read while a former producer may still commit, a watermark is wrong so seldom that no random kill shows it.
    kafka, proxy = proxied
    relay = make_relay(kafka).start(connected=True)
    send(relay)
    relay.wait_until_drained()
    relay.kill()
    proxy.requests.clear()

    relay.start(connected=True)

    topic = relay.settings["RELAY_WATERMARK_TOPIC"].encode()
    kinds = [kind for kind, frame in proxy.requests if kind == INIT_PRODUCER_ID or topic in frame]
    first_read = min(kinds.index(FETCH), kinds.index(LIST_OFFSETS))
    assert kinds.index(INIT_PRODUCER_ID) < first_read


# --- At random moments ---


@pytest.mark.timeout(180 + 10 * KILLS + 30 * BROKER_KILLS)
def test_nothing_is_lost_doubled_or_reordered_by_kills_at_random_moments(
    own_kafka: OwnKafka, make_relay: MakeRelay, report: Callable[[str], None]
) -> None:
    kafka = own_kafka()
    relay = make_relay(kafka).start(connected=True)
    rng = random.Random(SEED)
    faults = ["relay"] * KILLS + ["broker"] * BROKER_KILLS
    rng.shuffle(faults)
    recoveries, broker_recoveries = [0.0], [0.0]
    begun = time.monotonic()

    with Senders(relay.url, seed=SEED, rate=RATE) as senders, ThreadPoolExecutor(1) as thread:
        restarts: list[Future[float]] = []
        for fault in faults:
            senders.wait_for_answers(rng.randrange(20, RATE))
            if fault == "broker":
                if restarts:
                    broker_recoveries.append(restarts[-1].result())
                restarts.append(thread.submit(restart_broker, kafka, relay))
            else:
                recoveries.append(kill_relay(relay, senders))
        broker_recoveries += [restart.result() for restart in restarts]
        senders.wait_for_answers(RATE)
    relay.wait_until_drained(seconds=120)
    assert relay.stop() == 0

    outcome = verdict(kafka, relay, senders.sent)
    tries = ", ".join(f"{count} x {result}" for result, count in senders.tries.most_common())
    report(
        f"{KILLS} kills of the relay and {BROKER_KILLS} of the broker under {RATE} events/s "
        f"in {time.monotonic() - begun:.0f} s (RELAY_TEST_SEED={SEED}): {outcome}; "
        f"longest recovery: relay {max(recoveries):.1f} s to the next 200, broker {max(broker_recoveries):.1f} s "
        f"until drained; tries: {tries}"
    )
    assert not outcome.faults
    assert outcome.answered > 0.8 * outcome.events


def kill_relay(relay: RelayProcess, senders: Senders) -> float:
    """Kills the relay and starts it again; returns the seconds until it answers 200 again."""
    relay.kill()
    killed_at = time.monotonic()
    relay.start()
    senders.wait_for_answers(1)
    return time.monotonic() - killed_at


def restart_broker(kafka: LocalKafka, relay: RelayProcess) -> float:
    """Kills the broker and starts it again; returns the seconds until nothing waits for it any more."""
    (broker,) = kafka.brokers
    broker.kill()
    killed_at = time.monotonic()
    broker.start()

    def is_published() -> bool:
        try:
            status = relay.status()
        except (OSError, AssertionError):
            return False  # It was killed meanwhile.
        return bool(status["kafka"]["connected"] and status["spool"]["oldest_event_age_seconds"] < 1)

    wait_until(is_published, "the backlog is published", seconds=90, pause=0.1)
    return time.monotonic() - killed_at
