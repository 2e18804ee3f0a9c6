from collections.abc import Callable
from typing import Any

import orjson
import pytest

from relay.errors import SettingsInvalid
from relay.event import EVENT_TYPES, UNKNOWN_TYPE, DeadLetterReason, Delivery, Event, event_types
from relay.record import Record, RecordMaker, Topics, rfc3339

MakeEvent = Callable[..., Event]
NOW = 1_764_000_000_000
NOW_TEXT = b"2025-11-24T16:00:00.000Z"
TOPICS = Topics("events", "dead")


@pytest.fixture
def maker() -> RecordMaker:
    return RecordMaker(TOPICS, lambda type_: f"https://schemas.example/{type_}" if type_ in EVENT_TYPES else None)


def headers_of(record: Record) -> dict[str, str]:
    assert len({name for name, _ in record.headers}) == len(record.headers)
    return {name: value.decode() for name, value in record.headers}


def event_of(payload: dict[str, Any] | bytes, workspace: str = "default") -> Event:
    body = payload if isinstance(payload, bytes) else orjson.dumps(payload)
    delivery = Delivery(workspace, body, NOW)
    return Event.of(delivery, delivery.parse())


def test_an_event_becomes_a_cloud_event_in_binary_mode(maker: RecordMaker) -> None:
    event = event_of({"_id": "chat-1", "type": "LivechatSession", "closedAt": "2025-11-24T15:59:58.123Z"}, "acme")

    record = maker.record(42, event, NOW + 5_000)

    assert headers_of(record) == {
        "ce_specversion": "1.0",
        "ce_id": event.digest.hex(),
        "ce_source": "/rocketchat/acme",
        "ce_type": "chat.rocket.omnichannel.session.closed",
        "ce_subject": "chat-1",
        "ce_time": "2025-11-24T15:59:58.123Z",
        "ce_dataschema": "https://schemas.example/LivechatSession",
        "content-type": "application/json",
        "relay_sequence": "42",
        "relay_received_at": NOW_TEXT.decode(),
    }
    assert (record.topic, record.key, record.partition_key) == ("events", b"chat-1", b"chat-1")
    assert record.timestamp == NOW


@pytest.mark.parametrize(("type_", "kind"), EVENT_TYPES.items())
def test_every_type_has_its_own_ce_type(maker: RecordMaker, make_event: MakeEvent, type_: str, kind: Any) -> None:
    assert headers_of(maker.record(1, make_event(type_=type_), NOW))["ce_type"] == kind.ce_type


def test_the_value_is_the_body_byte_for_byte(maker: RecordMaker) -> None:
    body = b' { "type" : "Message", "_id":"c\\u0061t", "x": 1.50 }\n'
    assert maker.record(1, event_of(body), NOW).value == body


def test_the_time_is_that_of_receipt_where_the_body_tells_none(maker: RecordMaker, make_event: MakeEvent) -> None:
    assert headers_of(maker.record(1, make_event(type_="LeadCapture"), NOW))["ce_time"] == NOW_TEXT.decode()


def test_the_timestamp_is_never_later_than_the_moment_of_publishing(maker: RecordMaker, make_event: MakeEvent) -> None:
    event = make_event(received_at=NOW)
    assert maker.record(1, event, NOW - 1).timestamp == NOW - 1
    assert maker.record(1, event, NOW + 1).timestamp == NOW


def test_no_time_of_the_payload_becomes_the_timestamp(maker: RecordMaker) -> None:
    event = event_of({"_id": "c", "type": "LivechatSession", "closedAt": "2199-01-01T00:00:00Z"})
    record = maker.record(1, event, NOW)
    assert record.timestamp == NOW
    assert headers_of(record)["ce_time"] == "2199-01-01T00:00:00Z"


def test_the_key_is_the_chat_in_utf_8(maker: RecordMaker, make_event: MakeEvent) -> None:
    record = maker.record(1, make_event(chat="z\u00fcrich"), NOW)
    assert record.key == record.partition_key == b"z\xc3\xbcrich"
    assert dict(record.headers)["ce_subject"] == b"z\xc3\xbcrich"


def test_an_offline_message_is_about_no_chat(maker: RecordMaker) -> None:
    event = event_of({"type": "LivechatOfflineMessage", "visitor": {"email": "Ada@example.com"}})
    record = maker.record(1, event, NOW)
    assert record.key == b"offline:ada@example.com"
    assert "ce_subject" not in headers_of(record)


def test_a_genuine_repeat_has_an_id_of_its_own(maker: RecordMaker, make_event: MakeEvent) -> None:
    event = make_event(type_="LeadCapture")
    assert headers_of(maker.record(1, event._replace(occurrence=2), NOW))["ce_id"] == f"{event.digest.hex()}.2"


def test_without_a_schema_none_is_named(make_event: MakeEvent) -> None:
    record = RecordMaker(TOPICS, lambda _: None).record(1, make_event(), NOW)
    assert "ce_dataschema" not in headers_of(record)


@pytest.mark.parametrize("reason", DeadLetterReason)
def test_a_dead_letter_is_the_same_record_with_the_reason(
    maker: RecordMaker, make_event: MakeEvent, reason: DeadLetterReason
) -> None:
    event = make_event()
    alive = maker.record(7, event, NOW)

    dead = maker.record(7, event._replace(reason=reason, detail="/visitor: required"), NOW)

    assert dead.topic == "dead"
    assert dead._replace(topic=alive.topic, headers=alive.headers) == alive
    assert headers_of(dead) == headers_of(alive) | {
        "relay_error_reason": reason.value,
        "relay_error_detail": "/visitor: required",
    }


def test_an_event_of_unknown_type_goes_to_the_dead_letters(maker: RecordMaker, make_event: MakeEvent) -> None:
    record = maker.record(1, make_event(type_="LivechatSessionEnd"), NOW)
    assert (record.topic, record.key) == ("dead", b"chat-1")
    headers = headers_of(record)
    assert headers["relay_error_reason"] == "unknown_type"
    assert headers["ce_type"] == "chat.rocket.omnichannel.unknown"
    assert "ce_dataschema" not in headers


def test_a_record_without_a_key_is_spread_by_its_id(maker: RecordMaker) -> None:
    event = event_of({"type": "Message"})
    record = maker.record(1, event, NOW)
    assert record.key is None
    assert record.partition_key == event.id.encode()
    assert headers_of(record)["relay_error_reason"] == "no_key"
    assert "ce_subject" not in headers_of(record)


def test_an_invalid_event_that_is_only_reported_goes_where_it_would(maker: RecordMaker, make_event: MakeEvent) -> None:
    event = make_event()
    record = maker.record(1, event._replace(detail="/visitor: required"), NOW)
    assert record.topic == "events"
    assert headers_of(record) == headers_of(maker.record(1, event, NOW)) | {"relay_schema_error": "/visitor: required"}


def test_a_refused_event_is_announced_without_its_body(maker: RecordMaker, make_event: MakeEvent) -> None:
    event = make_event(padding=100)
    record = maker.refusal(9, event, "MessageSizeTooLarge", NOW)
    assert (record.topic, record.key, record.value) == ("dead", b"chat-1", b"{}")
    headers = headers_of(record)
    assert headers["relay_error_reason"] == "rejected_by_kafka"
    assert headers["relay_error_detail"] == "MessageSizeTooLarge"
    assert headers["ce_id"] == event.id
    assert headers["relay_sequence"] == "9"


def test_events_do_not_share_what_is_theirs_alone(maker: RecordMaker, make_event: MakeEvent) -> None:
    first = maker.record(1, make_event(1, chat="a"), NOW)
    before = list(first.headers)
    second = maker.record(2, make_event(2, chat="b", workspace="acme"), NOW)
    assert first.headers == before
    assert headers_of(second)["ce_source"] == "/rocketchat/acme"


# --- Topics. ---


def test_parts_of_a_topic_name_come_from_workspace_and_type(make_event: MakeEvent) -> None:
    maker = RecordMaker(Topics("rc.{workspace}.{type}", "dead"), lambda _: None)
    assert maker.record(1, make_event(workspace="acme"), NOW).topic == "rc.acme.message.saved"
    assert maker.record(1, make_event(workspace="acme", type_="x/y"), NOW).topic == "dead"


def test_every_topic_that_may_be_needed_is_named() -> None:
    assert Topics("events", "dead").all(["a", "b"]) == ["dead", "events"]
    assert Topics("{workspace}", "dead").all(["a", "b"]) == ["a", "b", "dead"]
    templated = Topics("{workspace}.{type}", "dead").all(["a", "b"])
    assert len(templated) == 2 * len(EVENT_TYPES) + 1
    assert "a.session.closed" in templated
    assert not any(UNKNOWN_TYPE in name for name in templated)


def test_a_type_that_a_schema_adds_has_its_topic_and_its_ce_type(make_event: MakeEvent) -> None:
    topics = Topics("rc.{type}", "dead", event_types({"Survey": "com.example.survey"}))
    record = RecordMaker(topics, lambda _: None).record(1, make_event()._replace(type="Survey"), NOW)
    assert (record.topic, headers_of(record)["ce_type"]) == ("rc.com.example.survey", "com.example.survey")
    assert "rc.com.example.survey" in topics.all(["a"])


@pytest.mark.parametrize(
    ("events", "ce_type", "fault"),
    [
        ("rc.{type}", "chat.rocket.omnichannel.dead-letter", "it comes to rc.dead-letter, which is that of RELAY_DEAD"),
        ("rc.{type}", "chat.rocket.omnichannel.water_marks", "to rc.water_marks, which is that of RELAY_WATERMARK_T"),
        ("rc.{type}", "message_saved", "it comes to rc.message_saved, which is that of Message"),
        ("{type}", "chat.rocket.omnichannel.", "it comes to '', which must be a topic name"),
        ("{type}", "..", r"it comes to '\.\.', which must be a topic name"),
        ("r" * 50 + "{type}", "t" * 200, "which must be a topic name: .*at most 249"),
    ],
)
def test_a_type_that_cannot_stand_in_a_topic_s_name_is_refused(events: str, ce_type: str, fault: str) -> None:
    types = event_types({"Survey": ce_type})
    with pytest.raises(SettingsInvalid, match=f"RELAY_TOPIC: for the type Survey .*{fault}"):
        Topics(events, "rc.dead-letter", types).check(["a", "b"], "rc.water.marks")
    Topics("rc", "rc.dead-letter", types).check(["a", "b"], "rc.water.marks")
    Topics(events, "rc.dead-letter").check(["a", "b"], "rc.water.marks")


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0, b"1970-01-01T00:00:00.000Z"),
        (NOW, NOW_TEXT),
        (NOW + 7, b"2025-11-24T16:00:00.007Z"),
        (NOW + 999, b"2025-11-24T16:00:00.999Z"),
        (951_827_696_120, b"2000-02-29T12:34:56.120Z"),
    ],
)
def test_times_are_written_in_utc_to_the_millisecond(milliseconds: int, text: bytes) -> None:
    assert rfc3339(milliseconds) == text
