"""`relay dead replay`: what is valid after a schema fix reaches its topic once, however often and however it ends."""

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from acceptance.bodies import message, new_chat
from acceptance.conftest import MakeRelay
from acceptance.http_client import post
from acceptance.kafka_proxy import END_TXN, FETCH, INIT_PRODUCER_ID, LIST_OFFSETS, KafkaProxy
from confluent_kafka import Producer, admin
from kafka_for_tests import FoundKafka, set_topic_config
from oracle import Landed, Sent, judge, read_topics
from relay_process import RelayProcess, run_relay, wait_until

from relay.dev.kafka import LocalKafka

SHIPPED = Path(__file__).parents[2] / "schemas" / "message-saved.json"


@pytest.fixture
def fixed(tmp_path: Path) -> str:
    """Return a folder with a schema of messages that takes a visitor that is a number, as the shipped one does not."""
    folder = tmp_path / "fixed"
    folder.mkdir()
    schema = json.loads(SHIPPED.read_bytes())
    schema["properties"]["visitor"] = {"type": ["object", "number"]}
    (folder / "message-saved.json").write_text(json.dumps(schema))
    return str(folder)


def broken(chat: str, number: int = 1, *, text: str = "Hello") -> bytes:
    """A message that only the fixed schema takes."""
    return json.dumps({**json.loads(message(chat, number, text=text)), "visitor": 7}).encode()


def send(relay: RelayProcess, *bodies: bytes) -> None:
    assert [post(relay.port, body).status for body in bodies] == [200] * len(bodies)


def replay(relay: RelayProcess, *options: str, code: int = 0) -> dict[str, Any]:
    """What a run says of itself, once it has ended with that exit code."""
    ended = run_relay(relay.directory, "dead", "replay", "--json", *options, settings=relay.settings)
    assert ended.returncode == code, ended.stderr
    told: dict[str, Any] = json.loads(ended.stdout)
    return told | {"left": {reason: count for reason, count in told["left"].items() if count}, "said": ended.stderr}


def landed(relay: RelayProcess, topic: str = "RELAY_TOPIC") -> list[Landed]:
    return read_topics(relay.settings["RELAY_KAFKA_BOOTSTRAP_SERVERS"], relay.settings[topic])


def letters(relay: RelayProcess) -> list[Landed]:
    return [it for it in landed(relay, "RELAY_DEAD_LETTER_TOPIC") if it.header("relay_replayed") is None]


def marks(relay: RelayProcess) -> list[Landed]:
    return [it for it in landed(relay, "RELAY_DEAD_LETTER_TOPIC") if it.header("relay_replayed") is not None]


def without(record: Landed, *headers: str) -> dict[str, bytes]:
    return {name: value for name, value in record.headers if name not in headers}


# --- What is published ---


def test_what_is_valid_after_a_schema_fix_is_published_once_as_it_would_have_been(
    kafka: FoundKafka, make_relay: MakeRelay, fixed: str
) -> None:
    relay = make_relay(kafka).start()
    chat = new_chat()
    worse = json.dumps({**json.loads(message(chat)), "visitor": "nobody"}).encode()
    keyless = json.dumps({**json.loads(message(chat)), "_id": None}).encode()
    send(relay, message(chat), broken(chat), worse, b'{"_id":"c","type":"Unheard"}', keyless, broken(chat, 2))
    relay.wait_until_drained()
    dead = [it for it in letters(relay) if it.value in {broken(chat), broken(chat, 2)}]
    assert len(dead) == 2

    relay.settings["RELAY_SCHEMAS_DIR"] = fixed
    left = {"schema": 1, "unknown_type": 1, "no_key": 1}
    dry = replay(relay, "--dry-run")
    assert (dry["read"], dry["replayed"], dry["replayed_before"], dry["left"]) == (5, 2, 0, left)
    assert (len(landed(relay)), marks(relay)) == (1, [])
    first = replay(relay)
    assert (first["read"], first["replayed"], first["replayed_before"], first["left"]) == (5, 2, 0, left)
    second = replay(relay)
    assert (second["read"], second["replayed"], second["replayed_before"], second["left"]) == (5, 0, 2, left)

    # In the order in which they became dead letters, behind what their chat has sent meanwhile.
    events = landed(relay)
    assert [it.value for it in events] == [message(chat), broken(chat), broken(chat, 2)]
    assert not judge([Sent(it.value or b"") for it in events], events, topic=relay.settings["RELAY_TOPIC"]).faults
    for event, letter in zip(events[1:], dead, strict=True):
        assert (event.key, event.timestamp) == (letter.key, letter.timestamp)
        assert dict(event.headers) == without(letter, "relay_error_reason", "relay_error_detail")
    # The relay ran all the while, and goes on.
    send(relay, message(chat, 3))
    relay.wait_until_drained()
    assert len(relay.log("kafka_connected")) == 1
    assert relay.log("kafka_lost") == []


def test_a_mark_says_on_the_dead_letters_own_partition_that_it_was_replayed(
    kafka: FoundKafka, make_relay: MakeRelay, fixed: str
) -> None:
    relay = make_relay(kafka, RELAY_TOPIC_CREATE="false")
    relay.settings["RELAY_SCHEMAS_DIR"] = fixed
    topic, dead = relay.settings["RELAY_TOPIC"], relay.settings["RELAY_DEAD_LETTER_TOPIC"]
    kafka.create_topics(topic, dead, partitions=3)
    kafka.create_topics(relay.settings["RELAY_WATERMARK_TOPIC"])
    del relay.settings["RELAY_SCHEMAS_DIR"]
    relay.start()
    send(relay, *(broken(new_chat()) for _ in range(8)))
    relay.wait_until_drained()
    before = {it.place.partition("-")[2]: it for it in letters(relay)}
    # Chats have another partition from now on.
    asked = admin.AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
    for future in asked.create_partitions([admin.NewPartitions(dead, 7)]).values():  # type: ignore[attr-defined]
        future.result(30)

    relay.settings["RELAY_SCHEMAS_DIR"] = fixed
    assert replay(relay)["replayed"] == 8
    assert replay(relay)["replayed_before"] == 8

    found = {it.header("relay_replayed"): it for it in marks(relay)}
    by_place = {f"{it.partition}@{it.offset}": it for it in before.values()}
    assert found.keys() == by_place.keys()
    for place, letter in by_place.items():
        mark = found[place]
        assert (mark.partition, mark.key, mark.value) == (letter.partition, letter.key, b"{}")
        assert mark.timestamp > letter.timestamp
        assert without(mark, "relay_replayed") == without(letter, "relay_error_reason", "relay_error_detail")
    ended = run_relay(relay.directory, "tail", "--dead", "--from-beginning", "--count", "16", settings=relay.settings)
    assert sum("  schema: /visitor: type (object expected)" in line for line in ended.stdout.splitlines()) == 8
    assert {line.rpartition("  replayed: ")[2] for line in ended.stdout.splitlines() if "replayed" in line} == {
        *by_place
    }


def test_a_type_that_has_become_known_is_published_with_its_ce_type(
    kafka: FoundKafka, make_relay: MakeRelay, tmp_path: Path
) -> None:
    relay = make_relay(kafka, RELAY_REDACT="/secret,/_id").start()
    body = b'{"_id":"chat","type":"Survey","secret":"4711"}'
    send(relay, body, body)  # No retry: nobody knows whether such events repeat.
    relay.wait_until_drained()
    schema = {"$schema": "http://json-schema.org/draft-07/schema#", "$id": "urn:s", "title": "com.example.survey"}
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "s.json").write_text(json.dumps({**schema, "properties": {"type": {"const": "Survey"}}}))

    relay.settings["RELAY_SCHEMAS_DIR"] = str(folder)
    assert replay(relay)["replayed"] == 2

    first, second = landed(relay)
    assert first.header("ce_type") == second.header("ce_type") == "com.example.survey"
    assert second.header("ce_id") == f"{first.header('ce_id')}.2"
    # What was redacted stays so, and the key is of before.
    assert first.value == b'{"_id":"[redacted]","type":"Survey","secret":"[redacted]"}'
    assert (first.key, first.header("ce_subject"), first.header("ce_dataschema")) == (b"chat", "chat", "urn:s")


def test_what_kafka_refused_and_what_others_wrote_is_left_alone(
    kafka: FoundKafka, make_relay: MakeRelay, fixed: str
) -> None:
    relay = make_relay(kafka, RELAY_SCHEMAS_DIR=fixed)
    topic, dead = relay.settings["RELAY_TOPIC"], relay.settings["RELAY_DEAD_LETTER_TOPIC"]
    kafka.create_topics(topic, dead)
    name = {"ce_id": "ab", "relay_sequence": "1", "relay_received_at": "2026-11-20T09:00:00.000Z"}
    source = {"ce_source": "/rocketchat/default"}
    body = message(new_chat())
    foreign: list[tuple[bytes | None, dict[str, Any]]] = [
        (body, {}),
        (body, {**name, **source, "ce_id": "no hex"}),
        (body, {**name, **source, "ce_id": "ab.1"}),
        (body, {**name, **source, "relay_sequence": "01"}),
        (body, {**name, **source, "relay_received_at": "yesterday"}),
        (body, {**name, **source, "relay_received_at": "0001-01-01T00:00:00.000+12:00"}),
        (body, {**name, **source, "ce_id": b"\xff"}),
        (body, {**name, **source, "ce_id": None}),
        (b"{oops", {**name, **source}),
        (None, {**name, **source}),
    ]
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers})
    for value, headers in foreign:
        producer.produce(dead, value, b"key", headers=headers)
    producer.produce(dead, b"{}", b"c", headers={**name, **source, "relay_error_reason": "rejected_by_kafka"})
    producer.produce(dead, body, b"c", headers={**name, "ce_source": "/rocketchat/elsewhere"})
    producer.flush(30)

    relay.settings["RELAY_TOPIC"] = f"{topic}{{workspace}}"
    assert replay(relay, code=1)["left"] == {"foreign": len(foreign), "rejected_by_kafka": 1, "no_topic": 1}
    relay.settings["RELAY_TOPIC"] = topic  # The same for all workspaces.
    told = replay(relay)

    assert (told["replayed"], told["left"]) == (1, {"foreign": len(foreign), "rejected_by_kafka": 1})


def test_an_event_without_a_topic_and_one_that_kafka_refuses_hold_up_no_other(
    kafka: FoundKafka, make_relay: MakeRelay, fixed: str, topic_name: str
) -> None:
    relay = make_relay(kafka, RELAY_TOPIC=f"{topic_name}.{{type}}", RELAY_MAX_BODY_BYTES="300000").start()
    chat = new_chat()
    big = broken(chat, 50, text="x" * 200_000)
    bodies = [broken(chat, number) for number in range(20)]
    bodies.insert(7, big)
    send(relay, *bodies, b'{"_id":"c","type":"LeadCapture"}')
    relay.wait_until_drained()
    relay.kill()
    saved = f"{topic_name}.message.saved"
    set_topic_config(kafka.bootstrap_servers, saved, "max.message.bytes", "100000")
    relay.settings |= {"RELAY_SCHEMAS_DIR": fixed, "RELAY_KAFKA_COMPRESSION": "none"}

    told = replay(relay, code=1)

    assert (told["replayed"], told["left"]) == (20, {"refused": 1, "schema": 1})
    assert "relay: " not in told["said"]
    assert [it.value for it in read_topics(kafka.bootstrap_servers, saved)] == [it for it in bodies if it != big]
    set_topic_config(kafka.bootstrap_servers, saved, "max.message.bytes", "1000000")
    relay.settings["RELAY_TOPIC"] = f"{topic_name}.elsewhere"
    assert replay(relay, code=1)["left"] == {"no_topic": 1, "schema": 1}
    relay.settings["RELAY_TOPIC"] = saved
    assert replay(relay)["replayed"] == 1


@pytest.mark.parametrize(
    ("validation", "count", "error"), [("report", 1, "/visitor: type (object expected)"), ("off", 1, None)]
)
def test_it_judges_as_the_relay_would(
    kafka: FoundKafka, make_relay: MakeRelay, validation: str, count: int, error: str | None
) -> None:
    relay = make_relay(kafka).start()
    send(relay, broken(new_chat()))
    relay.wait_until_drained()

    relay.settings["RELAY_SCHEMA_VALIDATION"] = validation
    assert replay(relay)["replayed"] == count

    (event,) = landed(relay)
    assert event.header("relay_schema_error") == error
    (mark,) = marks(relay)
    assert mark.header("relay_schema_error") is None


def test_a_replayed_event_names_its_schema_as_the_others_do_and_waits_for_the_registry(
    kafka: FoundKafka, make_relay: MakeRelay, fixed: str, registry_url: str
) -> None:
    relay = make_relay(kafka).start()
    chat = new_chat()
    send(relay, broken(chat))
    relay.wait_until_drained()
    relay.stop()
    relay.settings |= {"RELAY_SCHEMAS_DIR": fixed, "RELAY_SCHEMA_REGISTRY_URL": "http://127.0.0.1:1"}
    away = replay(relay, code=1)
    assert (away["replayed"], away["left"]) == (0, {"no_schema_id": 1})
    assert "does not answer" in away["said"]

    relay.settings["RELAY_SCHEMA_REGISTRY_URL"] = registry_url
    assert replay(relay)["replayed"] == 1

    relay.start(connected=True)
    send(relay, broken(chat, 2))
    relay.wait_until_drained()
    values = [it.value or b"" for it in landed(relay)]
    assert [value[5:] for value in values] == [broken(chat), broken(chat, 2)]
    assert values[0][0] == 0
    assert values[0][:5] == values[1][:5]
    assert marks(relay)[0].value == b"{}"


def test_without_the_topic_it_says_so(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka)
    told = replay(relay, code=1)
    assert relay.settings["RELAY_DEAD_LETTER_TOPIC"] in told["error"]
    relay.settings["RELAY_TOPIC"] = "no topic"
    assert run_relay(relay.directory, "dead", "replay", settings=relay.settings).returncode == 2


# --- Once ---


def many_letters(kafka: FoundKafka | LocalKafka, relay: RelayProcess, count: int) -> list[bytes]:
    """So many dead letters on the topic: the relay writes a few, the others are the same but for their names."""
    relay.start(connected=True)
    send(relay, broken(new_chat()))
    relay.wait_until_drained()
    assert relay.stop() == 0
    (model,) = letters(relay)
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "partitioner": "murmur2_random"})
    chats = [new_chat() for _ in range(20)]
    bodies = [broken(chat, number) for number in range(count // len(chats)) for chat in chats]
    for number, body in enumerate(bodies):
        headers: dict[str, Any] = {
            **dict(model.headers),
            "ce_id": f"{number:064x}",
            "relay_sequence": f"{number + 100}",
        }
        key = json.loads(body)["_id"].encode()
        producer.produce(relay.settings["RELAY_DEAD_LETTER_TOPIC"], body, key, headers=headers)
        producer.poll(0)
    producer.flush(60)
    return [model.value or b"", *bodies]


def assert_each_once_in_order(relay: RelayProcess, bodies: list[bytes]) -> None:
    events = landed(relay)
    assert Counter(it.value for it in events) == Counter(bodies)
    by_chat: dict[bytes | None, list[int]] = {}
    for event in events:
        by_chat.setdefault(event.key, []).append(int(event.header("relay_sequence") or 0))
    assert all(sequences == sorted(sequences) for sequences in by_chat.values())
    assert len(marks(relay)) == len(bodies)


class Running:
    """A replay that runs."""

    def __init__(self, relay: RelayProcess) -> None:
        from os import environ

        outside = {name: value for name, value in environ.items() if not name.startswith("RELAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "relay", "dead", "replay"],
            env={**outside, **relay.settings},
            cwd=relay.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def ended(self) -> tuple[int, str]:
        out, error = self.process.communicate(timeout=90)
        return self.process.returncode, out + error


@pytest.mark.parametrize("moment", ["before the commit", "after the commit, before its answer", "late"])
def test_killed_at_the_commit_the_next_run_doubles_and_misses_nothing(
    proxied: tuple[LocalKafka, KafkaProxy], make_relay: MakeRelay, fixed: str, moment: str
) -> None:
    kafka, proxy = proxied
    relay = make_relay(kafka)
    bodies = many_letters(kafka, relay, 100)
    relay.settings["RELAY_SCHEMAS_DIR"] = fixed
    if moment == "after the commit, before its answer":
        proxy.hold_answer(END_TXN)
    else:
        proxy.hold_request(END_TXN)
    first = Running(relay)
    assert proxy.holding.wait(60)
    first.process.send_signal(signal.SIGKILL)
    first.ended()
    if moment != "late":
        proxy.drop()

    told = replay(relay)
    if moment == "late":
        proxy.forward()

    assert told["replayed"] + told["replayed_before"] == len(bodies)
    assert (told["replayed_before"] > 0) == (moment == "after the commit, before its answer")
    assert replay(relay)["replayed"] == 0
    assert_each_once_in_order(relay, bodies)


def test_a_run_that_another_one_overtakes_at_its_commit_writes_nothing_more(
    proxied: tuple[LocalKafka, KafkaProxy], make_relay: MakeRelay, fixed: str
) -> None:
    kafka, proxy = proxied
    relay = make_relay(kafka)
    bodies = many_letters(kafka, relay, 100)
    relay.settings["RELAY_SCHEMAS_DIR"] = fixed
    proxy.hold_request(END_TXN)
    first = Running(relay)
    assert proxy.holding.wait(60)

    assert replay(relay)["replayed"] == len(bodies)
    proxy.forward()
    code, said = first.ended()

    assert code == 1
    assert "Another `relay dead replay` of this topic has begun" in said
    assert_each_once_in_order(relay, bodies)


def test_another_run_is_ended_before_the_marks_are_looked_for(
    proxied: tuple[LocalKafka, KafkaProxy], make_relay: MakeRelay, fixed: str
) -> None:
    # Looked for while it may still commit, they are wrong so seldom that no random kill shows it.
    kafka, proxy = proxied
    relay = make_relay(kafka)
    many_letters(kafka, relay, 20)
    relay.settings["RELAY_SCHEMAS_DIR"] = fixed
    proxy.requests.clear()

    replay(relay)

    topic = relay.settings["RELAY_DEAD_LETTER_TOPIC"].encode()
    kinds = [
        kind for kind, frame in proxy.requests if kind in {INIT_PRODUCER_ID, LIST_OFFSETS, FETCH} and topic in frame
    ]
    assert kinds[0] == INIT_PRODUCER_ID
    assert {*kinds} == {INIT_PRODUCER_ID, LIST_OFFSETS, FETCH}


@pytest.mark.timeout(600)
def test_killed_at_random_moments_and_two_at_a_time_each_is_published_once(
    kafka: FoundKafka, make_relay: MakeRelay, fixed: str, report: Callable[[str], None]
) -> None:
    relay = make_relay(kafka)
    bodies = many_letters(kafka, relay, 12_000)
    relay.settings["RELAY_SCHEMAS_DIR"] = fixed
    seed = random.randrange(10**9)
    rng = random.Random(seed)
    begun = time.monotonic()
    whole = Running(relay)
    wait_until(lambda: bool(marks(relay)), "the first marks", seconds=60)
    took = time.monotonic() - begun
    whole.process.kill()
    whole.ended()
    codes: Counter[int] = Counter()
    kills = 0
    while (runs := [Running(relay) for _ in range(rng.choice((1, 2)))]) and kills < 6:
        time.sleep(rng.uniform(0.3, 1.5) * took)  # A moment in its life, not a condition.
        for run in runs:
            run.process.kill()
            codes[run.ended()[0]] += 1
        kills += len(runs)
    codes.update(run.ended()[0] for run in runs)

    last = replay(relay)

    report(
        f"dead replay: {len(bodies)} dead letters, {kills + 1} kills (seed {seed}), exit codes {dict(codes)}, "
        f"{last['replayed']} left for the last run"
    )
    assert replay(relay)["replayed_before"] == len(bodies)
    assert_each_once_in_order(relay, bodies)
