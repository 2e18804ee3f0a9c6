"""A fork's own types of event: known by a schema of theirs, from the topic's name to the metrics."""

import json
from pathlib import Path

import pytest
from acceptance.bodies import message, new_chat
from acceptance.conftest import MakeRelay
from acceptance.http_client import post
from kafka_for_tests import FoundKafka
from oracle import Landed, read_topics
from relay_process import RelayProcess, run_relay

SURVEY = "com.example.survey.answered"


@pytest.fixture
def schemas_dir(tmp_path: Path) -> Path:
    """Return a folder with the schema of the type SurveyAnswered."""
    folder = tmp_path / "schemas"
    folder.mkdir()
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://example.com/survey-answered.json",
        "title": SURVEY,
        "type": "object",
        "required": ["_id", "score"],
        "properties": {"type": {"const": "SurveyAnswered"}, "score": {"type": "integer"}},
    }
    (folder / "survey-answered.json").write_text(json.dumps(schema))
    return folder


def survey(chat: str, score: object = 5) -> bytes:
    return json.dumps({"_id": chat, "type": "SurveyAnswered", "score": score}).encode()


def send(relay: RelayProcess, *bodies: bytes) -> None:
    assert [post(relay.port, body).status for body in bodies] == [200] * len(bodies)


def events(relay: RelayProcess, topic: str = "RELAY_TOPIC") -> list[Landed]:
    return read_topics(relay.settings["RELAY_KAFKA_BOOTSTRAP_SERVERS"], relay.settings[topic])


def dead_letters(relay: RelayProcess) -> list[tuple[str | None, bytes | None, bytes | None]]:
    found = events(relay, "RELAY_DEAD_LETTER_TOPIC")
    return [(record.header("relay_error_reason"), record.key, record.value) for record in found]


def test_events_of_a_type_with_a_schema_of_the_fork_s_own_are_judged_and_published(
    kafka: FoundKafka, make_relay: MakeRelay, schemas_dir: Path, topic_name: str
) -> None:
    relay = make_relay(kafka, RELAY_SCHEMAS_DIR=str(schemas_dir), RELAY_TOPIC=f"{topic_name}.{{type}}").start()
    series = 'relay_events_accepted_total{type="SurveyAnswered",workspace="default"}'
    assert relay.metrics()[series] == 0
    chat = new_chat()

    send(relay, survey(chat), survey(chat, "five"), survey(chat), message(chat))
    relay.wait_until_drained()

    metrics = relay.metrics()
    assert metrics[series] == 3
    assert metrics[f'relay_events_published_total{{topic="{topic_name}.{SURVEY}"}}'] == 2
    # An answer may be given again, byte for byte: a repeat is an event of its own.
    found = read_topics(kafka.bootstrap_servers, f"{topic_name}.{SURVEY}")
    assert [(record.key, record.value) for record in found] == [(chat.encode(), survey(chat))] * 2
    assert [record.header("ce_type") for record in found] == [SURVEY] * 2
    assert found[1].header("ce_id") == f"{found[0].header('ce_id')}.2"
    assert found[0].header("ce_dataschema") == "https://example.com/survey-answered.json"
    assert dead_letters(relay) == [("schema", chat.encode(), survey(chat, "five"))]
    (letter,) = events(relay, "RELAY_DEAD_LETTER_TOPIC")
    assert letter.header("relay_error_detail") == "/score: type (integer expected)"


@pytest.mark.parametrize("framing", ["none", "prefix"])
def test_without_their_schema_after_a_restart_spooled_events_are_dead_letters_and_hold_nothing_up(
    kafka: FoundKafka, make_relay: MakeRelay, schemas_dir: Path, registry_url: str, framing: str
) -> None:
    relay = make_relay(kafka, RELAY_SCHEMAS_DIR=str(schemas_dir), RELAY_SCHEMA_FRAMING=framing)
    relay.settings |= {"RELAY_SCHEMA_REGISTRY_URL": registry_url, "RELAY_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    relay.start()
    chat = new_chat()
    send(relay, survey(chat), message(chat))
    relay.kill()

    del relay.settings["RELAY_SCHEMAS_DIR"]
    relay.settings["RELAY_KAFKA_BOOTSTRAP_SERVERS"] = kafka.bootstrap_servers
    relay.start()
    send(relay, survey(chat, 4))
    relay.wait_until_drained()

    reason = "unknown_type"
    assert dead_letters(relay) == [(reason, chat.encode(), survey(chat)), (reason, chat.encode(), survey(chat, 4))]
    assert [(record.value or b"")[-len(message(chat)) :] for record in events(relay)] == [message(chat)]
    assert relay.metrics()[f'relay_events_dead_lettered_total{{reason="{reason}"}}'] == 2


def test_a_type_that_cannot_stand_in_the_topic_s_name_is_told_before_the_start(
    kafka: FoundKafka, make_relay: MakeRelay, schemas_dir: Path
) -> None:
    path = schemas_dir / "survey-answered.json"
    path.write_text(path.read_text().replace(SURVEY, "message_saved"))
    relay = make_relay(kafka, RELAY_SCHEMAS_DIR=str(schemas_dir), RELAY_TOPIC="chats.{type}")

    for command in ("serve", "check", "schemas list"):
        ended = run_relay(relay.directory, *command.split(), settings=relay.settings)

        assert ended.returncode == 2, command
        said = (
            "relay: RELAY_TOPIC: for the type SurveyAnswered it comes to chats.message_saved, which is that of Message."
        )
        assert ended.stderr.splitlines() == [said]
