"""Kafka away, the spool full, the disk full: deliveries are taken as long as they can be, and none is lost."""

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from acceptance.bodies import message, new_chat
from acceptance.conftest import MakeRelay
from acceptance.http_client import Answer, post
from acceptance.senders import Senders
from kafka_for_tests import FoundKafka
from oracle import Sent, judge, read_topics
from relay_process import RelayProcess, run_relay, wait_until

from relay.dev.kafka import LocalKafka
from relay.files import RESERVE_BYTES

#: How long Kafka is away: longer than a transaction may take, so that its producer is given up. The long run: 60.
OUTAGE_SECONDS = float(os.environ.get("RELAY_TEST_OUTAGE_SECONDS", "22"))
RATE = 200
ENDLESS = 100_000


def faults(kafka: FoundKafka | LocalKafka, relay: RelayProcess, sent: list[Sent]) -> dict[str, list[str]]:
    topic = relay.settings["RELAY_TOPIC"]
    return judge(sent, read_topics(kafka.bootstrap_servers, topic), topic=topic).faults


@pytest.mark.timeout(180 + 2 * OUTAGE_SECONDS)
@pytest.mark.parametrize(("fault", "seconds"), [("killed", OUTAGE_SECONDS), ("frozen", OUTAGE_SECONDS / 3)])
def test_deliveries_are_answered_200_while_kafka_is_away_and_published_once_it_is_back(
    breakable_kafka: LocalKafka, make_relay: MakeRelay, report: Callable[[str], None], fault: str, seconds: float
) -> None:
    (broker,) = breakable_kafka.brokers
    relay = make_relay(breakable_kafka).start(connected=True)

    with Senders(relay.url, chats=32, rate=RATE) as senders:
        senders.wait_for_answers(RATE)
        if fault == "killed":
            broker.kill()
        else:
            broker.freeze()
        back_at = time.monotonic() + seconds
        while time.monotonic() < back_at:
            senders.wait_for_answers(RATE // 4, seconds=5)
        waiting = relay.status()["spool"]["events"]
        broker.thaw()
        broker.start()
        back_at = time.monotonic()
        senders.wait_for_answers(RATE)
    relay.wait_until_drained(seconds=90)
    took = time.monotonic() - back_at

    assert set(senders.tries) == {200}
    assert waiting >= RATE * seconds / 2
    if fault == "killed":
        # One line for each change of state; it may be lost in more than one way.
        assert len(relay.log("kafka_connected")) == 2
        assert 1 <= len(relay.log("kafka_lost")) <= 3
    assert relay.stop() == 0
    assert not faults(breakable_kafka, relay, senders.sent)
    report(
        f"Kafka {fault} for {seconds:g} s under {RATE} events/s: {len(senders.sent)} events, all answered 200; "
        f"{waiting} waited in the spool, published within {took:.1f} s"
    )


def test_a_full_spool_answers_503_and_takes_deliveries_again_once_kafka_is_back(
    breakable_kafka: LocalKafka, make_relay: MakeRelay
) -> None:
    (broker,) = breakable_kafka.brokers
    relay = make_relay(breakable_kafka, RELAY_SPOOL_MAX_BYTES=str(2 << 20), RELAY_MAX_BODY_BYTES="200000").start(
        connected=True
    )
    broker.kill()

    sent, refusal = send_until_refused(relay)

    assert_refused(relay, refusal, {"spool_full"})
    assert 1 << 20 < sum(len(event.body) for event in sent) < 4 << 20
    relay.kill()
    relay.start()
    assert post(relay.port, message(new_chat(), text="x" * 50_000)).status == 503

    broker.start()

    sent.append(send_until_taken(relay))
    relay.wait_until_drained()
    wait_until(lambda: relay.admin("/readyz")[0] == 200, "it is ready again")
    assert relay.stop() == 0
    assert not faults(breakable_kafka, relay, sent)


def test_a_spool_that_cannot_grow_answers_503_and_takes_deliveries_again_once_it_can(
    breakable_kafka: LocalKafka, make_relay: MakeRelay
) -> None:
    (broker,) = breakable_kafka.brokers
    relay = make_relay(breakable_kafka).start(connected=True)
    broker.kill()
    relay.limit_file_size(1 << 20)

    sent, refusal = send_until_refused(relay)

    assert_refused(relay, refusal, {"spool_error", "spool_full"})
    relay.limit_file_size(-1)
    sent.append(send_until_taken(relay))
    broker.start()
    relay.wait_until_drained()
    wait_until(lambda: relay.admin("/readyz")[0] == 200, "it is ready again")
    assert relay.stop() == 0
    assert not faults(breakable_kafka, relay, sent)


def test_a_full_disk_answers_503_and_deliveries_are_taken_again_once_there_is_space(
    breakable_kafka: LocalKafka, make_relay: MakeRelay, small_disk: Path
) -> None:
    (broker,) = breakable_kafka.brokers
    relay = make_relay(breakable_kafka, RELAY_SPOOL_PATH=str(small_disk / "relay.db")).start(connected=True)
    broker.kill()

    sent, refusal = send_until_refused(relay)

    assert_refused(relay, refusal, {"spool_error", "spool_full"})
    relay.kill()
    mount("-o", "remount,size=64m", small_disk)
    relay.start()
    sent.append(send_until_taken(relay))
    broker.start()
    relay.wait_until_drained()
    assert relay.stop() == 0
    assert not faults(breakable_kafka, relay, sent)


def test_a_disk_that_was_full_while_kafka_was_away_is_free_again_once_kafka_is_back(
    breakable_kafka: LocalKafka, make_relay: MakeRelay, small_disk: Path
) -> None:
    (broker,) = breakable_kafka.brokers
    relay = make_relay(breakable_kafka, RELAY_SPOOL_PATH=str(small_disk / "relay.db")).start(connected=True)
    broker.kill()
    sent, _ = send_until_refused(relay)

    broker.start()

    relay.wait_until_drained()
    for _ in range(50):
        sent.append(send_until_taken(relay, seconds=5))
    relay.wait_until_drained()
    assert relay.stop() == 0
    assert not faults(breakable_kafka, relay, sent)


def test_a_relay_that_is_started_on_a_full_disk_publishes_what_is_spooled(
    breakable_kafka: LocalKafka, make_relay: MakeRelay, small_disk: Path
) -> None:
    (broker,) = breakable_kafka.brokers
    spool = str(small_disk / "relay.db")
    relay = make_relay(breakable_kafka, RELAY_SPOOL_PATH=spool, RELAY_DRAIN_SECONDS="0").start(connected=True)
    broker.kill()
    body = message(new_chat())
    assert post(relay.port, body).status == 200
    assert relay.stop() == 0  # An orderly stop leaves no files beside the spool's: the next start must make them.
    assert not (small_disk / "relay.db-wal").exists()
    fill(small_disk)

    relay.start()

    broker.start()
    relay.wait_until_drained()
    assert relay.stop() == 0
    assert not faults(breakable_kafka, relay, [Sent(body)])


def test_an_event_that_kafka_refuses_holds_up_no_other_while_the_disk_is_full(
    breakable_kafka: LocalKafka, make_relay: MakeRelay, small_disk: Path
) -> None:
    (broker,) = breakable_kafka.brokers
    relay = make_relay(breakable_kafka, RELAY_SPOOL_PATH=str(small_disk / "relay.db"), RELAY_KAFKA_COMPRESSION="none")
    topic = relay.settings["RELAY_TOPIC"]
    breakable_kafka.create_topics(topic, partitions=1, config={"max.message.bytes": "50000"})
    relay.start(connected=True)
    broker.kill()
    refused = message(new_chat(), text="x" * 500_000)
    assert post(relay.port, refused).status == 200
    sent, _ = send_until_refused(relay)
    fill(small_disk)

    broker.start()

    relay.wait_until_drained()
    assert not faults(breakable_kafka, relay, sent)
    shown = run_relay(relay.directory, "dead", "export", settings=relay.settings).stdout
    assert [json.loads(line)["body"].encode() for line in shown.splitlines()] == [refused]
    assert relay.stop() == 0


def test_an_event_that_kafka_refuses_and_that_is_larger_than_the_reserve_waits_on_a_full_disk_until_there_is_room(
    breakable_kafka: LocalKafka, make_relay: MakeRelay, small_disk: Path
) -> None:
    (broker,) = breakable_kafka.brokers
    relay = make_relay(
        breakable_kafka,
        RELAY_SPOOL_PATH=str(small_disk / "relay.db"),
        RELAY_KAFKA_COMPRESSION="none",
        RELAY_DRAIN_SECONDS="0",
    )
    assert mount("-o", "remount,size=30m", small_disk).returncode == 0
    breakable_kafka.create_topics(relay.settings["RELAY_TOPIC"], partitions=1, config={"max.message.bytes": "50000"})
    relay.start(connected=True)
    broker.kill()
    refused, other = message(new_chat(), text="x" * 2 * RESERVE_BYTES), message(new_chat())
    assert [post(relay.port, body).status for body in (refused, other)] == [200, 200]
    assert relay.stop() == 0  # Or the write-ahead log has the room already.
    filler = fill(small_disk)
    broker.start()

    relay.start()

    wait_until(lambda: "full" in (relay.status()["kafka"]["error"] or ""), "it says that the disk is full", seconds=60)
    assert (relay.status()["spool"]["events"], relay.status()["spool"]["dead_events"]) == (2, 0)
    filler.unlink()
    relay.wait_until_drained()
    assert not faults(breakable_kafka, relay, [Sent(other)])
    shown = run_relay(relay.directory, "dead", "export", settings=relay.settings).stdout
    assert [json.loads(line)["body"].encode() for line in shown.splitlines()] == [refused]
    assert relay.stop() == 0


def fill(disk: Path) -> Path:
    """Leaves no room on it; returns the file that has it all."""
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)):
            pass
    return disk / "filler"


@pytest.mark.parametrize(
    "full",
    ["spool", "disk"],
)
def test_a_relay_that_refuses_deliveries_is_not_ready(make_relay: MakeRelay, full: str) -> None:
    relay = make_relay(
        FoundKafka("127.0.0.1:1", "none"), RELAY_SPOOL_MAX_BYTES=str(2 << 20), RELAY_MAX_BODY_BYTES="200000"
    )
    relay.start()
    assert relay.admin("/readyz")[0] == 200
    if full == "disk":
        relay.limit_file_size(1 << 20)

    send_until_refused(relay)
    send_until_refused(relay, size=500)

    assert relay.admin("/readyz")[0] == 503
    assert post(relay.port, message(new_chat(), text="x" * 1_000)).status == 503


def send_until_refused(relay: RelayProcess, *, size: int = 20_000) -> tuple[list[Sent], Answer]:
    """Sends one chat's events until one is not taken; returns those that were, and the answer to that one."""
    chat = new_chat()
    sent: list[Sent] = []
    for number in range(ENDLESS):
        body = message(chat, number, text=f"{number:_<{size}}")
        answer = post(relay.port, body)
        if answer.status != 200:
            return sent, answer
        sent.append(Sent(body))
    raise AssertionError("never refused")


def send_until_taken(relay: RelayProcess, *, seconds: float = 60) -> Sent:
    """Sends an event again and again, as Rocket.Chat would, until it is taken."""
    body = message(new_chat(), text="x" * 20_000)
    wait_until(lambda: post(relay.port, body).status == 200, "a delivery is taken again", seconds=seconds, pause=0.1)
    return Sent(body)


def assert_refused(relay: RelayProcess, answer: Answer, reasons: set[str]) -> None:
    """That *answer* is a 503 that asks to come again, and that everything else says so too."""
    assert (answer.status, json.loads(answer.body)["status"]) == (503, 503)
    assert int(answer.headers["retry-after"]) > 0
    assert b"visitor" not in answer.body
    assert relay.admin("/healthz")[0] == 200
    metrics = relay.metrics()
    assert sum(metrics[f'relay_events_rejected_total{{reason="{reason}"}}'] for reason in reasons) > 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a directory on a file system of 12 MB; to mount one takes rights that not everybody has."""
    place = tmp_path / "small-disk"
    place.mkdir()
    if mount("-t", "tmpfs", "-o", "size=12m", "none", place).returncode:
        pytest.skip("no right to mount a small file system; a limited file size stands in for it in another test")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def mount(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["mount", *arguments], check=False, capture_output=True)
