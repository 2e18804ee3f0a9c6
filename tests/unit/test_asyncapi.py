"""`schemas/asyncapi.yaml` says what the relay really publishes."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from asyncapi import DOCUMENT, HEADERS, document
from jsonschema_rs import Draft7Validator

from relay.config import Settings
from relay.event import EVENT_TYPES, DeadLetterReason, Delivery, Event
from relay.framing import Frame, Registered, frame
from relay.operate.letters import REPLAYED_HEADER, Letter, mark
from relay.reader import Found
from relay.record import Record, RecordMaker, Topics
from relay.schemas import Schemas

ASYNCAPI: dict[str, Any] = yaml.safe_load(DOCUMENT.read_text())
MESSAGES: dict[str, Any] = ASYNCAPI["components"]["messages"]
CHAT, OFFLINE = (
    b'{"_id":"c","type":"Message"}',
    b'{"type":"LivechatOfflineMessage","visitor":{"email":"a@example.com"}}',
)


class Framed:
    """Frames every value by a header."""

    def frame(self, topic: str, event: Event) -> Frame:
        return frame("header", Registered(f"{topic}-{event.type}", 1, bytes(16)))


def records() -> Iterator[Record]:
    """One record for each set of headers that the relay has."""
    schemas = Schemas.load()
    uris = {schema.rocketchat_type: schema.uri for schema in schemas}
    settings = Settings.read({"RELAY_ALLOW_UNAUTHENTICATED": "true"})
    topics = Topics(settings.topic, settings.dead_letter_topic)
    chat, offline, unknown, keyless = (
        Event.of(delivery, delivery.parse())
        for body in (CHAT, OFFLINE, b'{"_id":"c","type":"Unheard"}', b'{"type":"Message"}')
        for delivery in (Delivery("acme", body, 1),)
    )
    for maker in (RecordMaker(topics, uris.get), RecordMaker(topics, uris.get, Framed())):
        for event in (chat, offline, unknown, keyless):
            yield maker.record(1, event, 1)
        yield maker.record(1, chat._replace(occurrence=2, detail="/messages: required"), 1)
        yield maker.record(1, chat._replace(reason=DeadLetterReason.SCHEMA, detail="/messages: required"), 1)
        yield maker.refusal(1, chat, "too large", 1)
        for event in (chat, offline):
            published = maker.record(1, event, 1)
            letter = Letter.of(Found(3, 7, published.key, published.value, tuple(published.headers)))
            assert letter
            yield mark(letter, published._replace(topic=topics.dead_letters), 1)


RECORDS = list(records())


def message_of(record: Record) -> dict[str, Any]:
    """How the document describes that record: by its topic, then by its headers."""
    [(place, channel)] = [it for it in ASYNCAPI["channels"].items() if it[1]["address"] == record.topic]
    headers = dict(record.headers)
    name = headers["ce_type"].decode()
    if place == "deadLetters":
        name = "replay-mark" if REPLAYED_HEADER in headers else "dead-letter"
    [message] = [it for it in map(resolved, channel["messages"].values()) if it["name"] == name]
    return dict(message)


def resolved(node: dict[str, Any]) -> Any:
    """What a reference within the document refers to."""
    found: Any = ASYNCAPI
    for step in node["$ref"].removeprefix("#/").split("/"):
        found = found[step]
    return found


def judged(schema: dict[str, Any], value: object) -> list[str]:
    """What is wrong with *value*, by a schema that may refer to others in the document."""
    whole = {**schema, "components": ASYNCAPI["components"]}
    return [str(error) for error in Draft7Validator(whole, validate_formats=True).iter_errors(value)]


def references(node: Any) -> Iterator[dict[str, Any]]:
    """Every reference in it."""
    if isinstance(node, dict):
        if "$ref" in node:
            yield node
        for item in node.values():
            yield from references(item)
    elif isinstance(node, list):
        for item in node:
            yield from references(item)


def test_it_is_made_from_the_code_as_it_is() -> None:
    assert document() == DOCUMENT.read_text(), "run `make docs`"


def test_every_reference_leads_somewhere() -> None:
    found = list(references(ASYNCAPI))
    assert found
    for reference in found:
        assert resolved(reference)


def test_every_type_of_event_is_described() -> None:
    described = [resolved(it)["name"] for it in ASYNCAPI["channels"]["events"]["messages"].values()]
    assert described == [kind.ce_type for kind in EVENT_TYPES.values()]


@pytest.mark.parametrize("record", RECORDS)
def test_headers_of_a_record_are_as_described(record: Record) -> None:
    schema = message_of(record)["headers"]
    headers = {name: value.decode() for name, value in record.headers}
    assert set(headers) <= set(schema["properties"])
    assert judged(schema, headers) == []


def test_no_header_is_described_that_no_record_has() -> None:
    assert set(HEADERS) == {name for record in RECORDS for name, _ in record.headers}


@pytest.mark.parametrize("name", MESSAGES)
def test_examples_are_as_described(name: str) -> None:
    message = MESSAGES[name]
    payload = message["payload"]
    schema = resolved(payload)["schema"] if "$ref" in payload else payload
    assert message["examples"]
    for example in message["examples"]:
        assert judged(message["headers"], example["headers"]) == []
        assert Draft7Validator(schema).is_valid(example["payload"])
        if name not in {"dead-letter", "replay-mark"}:
            assert Schemas.load().judge(example["payload"]["type"], example["payload"]) is None


def test_every_framing_has_its_binding() -> None:
    bindings = {name: it["kafka"] for name, it in ASYNCAPI["components"]["messageBindings"].items()}
    locations = {name: it.get("schemaIdLocation") for name, it in bindings.items()}
    assert locations == {"prefix-framing": "payload", "header-framing": "header", "no-framing": None}
    for name, message in MESSAGES.items():
        expected = "no-framing" if name in {"dead-letter", "replay-mark"} else "prefix-framing"
        assert message["bindings"]["$ref"].endswith(expected)
