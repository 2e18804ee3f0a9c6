"""Events that the broker refuses: looked at, and published once its limit is raised, whoever dies meanwhile."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from acceptance.bodies import message, new_chat
from acceptance.conftest import MakeRelay
from acceptance.http_client import post
from kafka_for_tests import FoundKafka, set_topic_config
from oracle import Landed, Sent, judge, read_topics
from relay_process import RelayProcess, run_relay, wait_until

from relay.dev.kafka import LocalKafka

LIMIT = 50_000


def relay_with_a_low_limit(kafka: FoundKafka | LocalKafka, make_relay: MakeRelay, **settings: str) -> RelayProcess:
    """A relay that takes larger bodies than its topic does."""
    relay = make_relay(kafka, RELAY_KAFKA_COMPRESSION="none", **settings)
    kafka.create_topics(relay.settings["RELAY_TOPIC"], partitions=6, config={"max.message.bytes": str(LIMIT)})
    return relay


def raise_the_limit(kafka: FoundKafka | LocalKafka, relay: RelayProcess) -> None:
    """Mends the cause: from now on the topic takes what it refused."""
    set_topic_config(kafka.bootstrap_servers, relay.settings["RELAY_TOPIC"], "max.message.bytes", str(1 << 24))


def too_large(chat: str, number: int) -> bytes:
    """A body that the topic refuses; not ASCII, and no two are alike."""
    text = "\u00e9\U0001f600\u2028" + random.Random(f"{chat} {number}").randbytes(LIMIT).hex()
    return message(chat, number, text="TEXT").replace(b"TEXT", text.encode())


def relay_says(relay: RelayProcess, *command: str, code: int = 0) -> str:
    """What a command of the relay's prints, with the relay's own settings."""
    ran = run_relay(relay.directory, *command, settings=relay.settings)
    assert ran.returncode == code, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout


def dead(relay: RelayProcess) -> list[dict[str, Any]]:
    return json_lines(relay_says(relay, "dead", "list", "--json"))


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.removesuffix("\n").split("\n") if line]


def deliver(relay: RelayProcess, *bodies: bytes) -> list[Sent]:
    assert {post(relay.port, body).status for body in bodies} == {200}
    return [Sent(body) for body in bodies]


def landed(kafka: FoundKafka | LocalKafka, relay: RelayProcess) -> list[Landed]:
    return read_topics(kafka.bootstrap_servers, relay.settings["RELAY_TOPIC"])


def test_dead_events_are_shown_byte_for_byte_and_published_once_the_cause_is_gone(
    kafka: FoundKafka, make_relay: MakeRelay, tmp_path: Path
) -> None:
    relay = relay_with_a_low_limit(kafka, make_relay).start(connected=True)
    chat, other = new_chat(), new_chat()
    refused = [too_large(chat, 1), too_large(chat, 2)]
    before = deliver(relay, message(chat, 0), refused[0], message(other, 0), refused[1], message(chat, 3))
    wait_until(lambda: relay.status()["spool"]["dead_events"] == 2, "both are dead")
    relay.wait_until_drained()
    published = [sent for sent in before if sent.body not in refused]
    topic = relay.settings["RELAY_TOPIC"]
    assert not judge(published, landed(kafka, relay), topic=topic).faults

    # They are shown, by the running relay's side.
    first, second = dead(relay)
    assert [first["key"], second["key"]] == [chat, chat]
    assert "MessageSizeTooLarge" in first["error"]
    exported = json_lines(relay_says(relay, "dead", "export"))
    assert [event["body"].encode() for event in exported] == refused
    assert relay_says(relay, "dead", "show", str(second["sequence"]), "--body").encode() == refused[1]
    relay_says(relay, "dead", "export", "--output", str(tmp_path / "dead.jsonl"))
    assert json_lines((tmp_path / "dead.jsonl").read_text()) == exported
    status = json.loads(relay_says(relay, "spool", "status", "--json"))
    assert (status["events"], status["dead_events"]) == (0, 2)
    assert status["identity"] == relay.status()["spool"]["identity"]

    # While the cause is still there, they are dead again, and nobody else is held up.
    said = relay_says(relay, "dead", "requeue", str(first["sequence"]), "--wait", "60", code=1)
    second, again = dead(relay)
    assert said.startswith(f"{first['sequence']}: refused again, dead as {again['sequence']}: ")
    assert again["id"] == first["id"]
    published += deliver(relay, message(chat, 4))

    raise_the_limit(kafka, relay)
    said = relay_says(relay, "dead", "requeue", "--all", "--wait", "60")

    assert said.splitlines() == [f"{event['sequence']}: published" for event in (second, again)]
    assert dead(relay) == []
    published += deliver(relay, message(chat, 5))
    relay.wait_until_drained()
    assert relay.status()["spool"]["dead_events"] == 0
    assert relay.metrics()["relay_spool_dead_events"] == 0
    # Last of their chat until then, in the order of their sequence as dead events.
    late = [Sent(body) for body in reversed(refused)]
    there = landed(kafka, relay)
    assert not judge([*published[:-1], *late, published[-1]], there, topic=topic).faults
    ids = {record.value: record.header("ce_id") for record in there}
    assert [ids[body] for body in refused] == [first["id"], second["id"]]
    # The sender's own retry of one is still one.
    assert post(relay.port, refused[0]).status == 200
    assert relay.stop() == 0
    assert not judge([*published[:-1], *late, published[-1]], landed(kafka, relay), topic=topic).faults
    announced = read_topics(kafka.bootstrap_servers, relay.settings["RELAY_DEAD_LETTER_TOPIC"])
    assert [record.header("ce_id") for record in announced].count(first["id"]) == 2
    assert len(announced) == 3


def test_a_request_made_while_no_relay_runs_is_done_by_the_next_start(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = relay_with_a_low_limit(kafka, make_relay).start(connected=True)
    body = too_large(new_chat(), 1)
    deliver(relay, body)
    wait_until(lambda: bool(dead(relay)), "it is dead")
    relay.wait_until_drained()
    relay.kill()
    raise_the_limit(kafka, relay)
    (event,) = dead(relay)

    said = relay_says(relay, "dead", "requeue", str(event["sequence"]))

    assert said == f"{event['sequence']}: requested; no relay runs on this spool, the next start takes it up\n"
    relay.start()
    wait_until(lambda: not dead(relay), "it is taken up")
    relay.wait_until_drained()
    assert relay.stop() == 0
    assert not judge([Sent(body)], landed(kafka, relay), topic=relay.settings["RELAY_TOPIC"]).faults


@pytest.mark.parametrize("moment", ["requested", "taken up", "published"])
def test_a_requeued_event_is_published_once_whenever_the_relay_is_killed(
    breakable_kafka: LocalKafka, make_relay: MakeRelay, moment: str
) -> None:
    (broker,) = breakable_kafka.brokers
    relay = relay_with_a_low_limit(breakable_kafka, make_relay).start(connected=True)
    chat = new_chat()
    body = too_large(chat, 1)
    sent = deliver(relay, message(chat, 0), body, message(chat, 2))
    wait_until(lambda: bool(dead(relay)), "it is dead")
    relay.wait_until_drained()
    raise_the_limit(breakable_kafka, relay)
    topic = f'relay_events_published_total{{topic="{relay.settings["RELAY_TOPIC"]}"}}'
    published = relay.metrics()[topic]

    if moment == "requested":
        relay.freeze()
        relay_says(relay, "dead", "requeue", "--all", "--wait", "0")
        assert len(dead(relay)) == 1
    elif moment == "taken up":
        broker.freeze()
        said = relay_says(relay, "dead", "requeue", "--all", "--wait", "5")
        assert "in the queue, waits for Kafka" in said
        assert dead(relay) == []
    else:
        relay_says(relay, "dead", "requeue", "--all", "--wait", "0")
        wait_until(lambda: relay.metrics()[topic] > published, "it is published", pause=0)
    relay.kill()
    broker.thaw()
    relay.start()

    wait_until(lambda: not dead(relay), "it is taken up")
    sent += deliver(relay, message(chat, 3))
    relay.wait_until_drained()
    assert relay.stop() == 0
    assert json.loads(relay_says(relay, "spool", "status", "--json"))["requeue_requests"] == 0
    expected = [sent[0], sent[2], sent[1], sent[3]]
    assert not judge(expected, landed(breakable_kafka, relay), topic=relay.settings["RELAY_TOPIC"]).faults


def test_requeued_events_are_published_once_through_kills_at_random_moments(
    kafka: FoundKafka, make_relay: MakeRelay
) -> None:
    relay = relay_with_a_low_limit(kafka, make_relay).start(connected=True)
    seed = random.randrange(10**9)
    print(f"seed {seed}")
    rng = random.Random(seed)
    refused = [too_large(new_chat(), number) for number in range(6)]
    sent = deliver(relay, *refused)
    wait_until(lambda: relay.status()["spool"]["dead_events"] == len(refused), "all are dead")
    relay.wait_until_drained()
    raise_the_limit(kafka, relay)

    for event in dead(relay):
        relay_says(relay, "dead", "requeue", str(event["sequence"]), "--wait", "0")
        time.sleep(rng.uniform(0, 1.2))  # To the moment of the kill, which is what is random here.
        relay.kill()
        relay.start()

    wait_until(lambda: not dead(relay), "all are taken up")
    relay.wait_until_drained()
    assert relay.stop() == 0
    assert not judge(sent, landed(kafka, relay), topic=relay.settings["RELAY_TOPIC"]).faults


def test_a_spool_that_is_looked_into_all_the_time_takes_events_as_before(
    kafka: FoundKafka, make_relay: MakeRelay
) -> None:
    relay = make_relay(kafka, RELAY_KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1", RELAY_DRAIN_SECONDS="0").start()
    chat = new_chat()
    for number in range(5):
        deliver(relay, message(chat, number))
        events = json_lines(relay_says(relay, "spool", "export"))
        assert [event["body"].encode() for event in events] == [message(chat, number) for number in range(number + 1)]
    assert len(relay_says(relay, "spool", "list").splitlines()) == 5
    assert relay.stop() == 0
    assert len(relay_says(relay, "spool", "list").splitlines()) == 5


def test_without_a_spool_the_commands_say_so(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka, RELAY_ACK="kafka").start(connected=True)
    for command in (["spool", "status"], ["dead", "list"], ["dead", "requeue", "--all"]):
        ran = run_relay(relay.directory, *command, settings=relay.settings)
        assert ran.returncode == 1
        assert "There is no spool: with RELAY_ACK=kafka" in ran.stderr
    assert not relay.spool_path.parent.exists()
