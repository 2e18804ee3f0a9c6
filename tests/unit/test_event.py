import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from relay.errors import BadJson
from relay.event import EVENT_TYPES, DeadLetterReason, Delivery, Event, event_type, event_types, is_test_delivery

CASES = Path(__file__).parents[2] / "tests" / "schemas"
SAMPLES = sorted(CASES.glob("*/valid/*.json"))

CE_TYPES = {
    "LivechatSessionStart": "chat.rocket.omnichannel.session.started",
    "LivechatSessionQueued": "chat.rocket.omnichannel.session.queued",
    "LivechatSessionTaken": "chat.rocket.omnichannel.session.taken",
    "LivechatSessionForwarded": "chat.rocket.omnichannel.session.forwarded",
    "LivechatSession": "chat.rocket.omnichannel.session.closed",
    "LivechatEdit": "chat.rocket.omnichannel.session.edited",
    "Message": "chat.rocket.omnichannel.message.saved",
    "LeadCapture": "chat.rocket.omnichannel.lead.captured",
    "LivechatOfflineMessage": "chat.rocket.omnichannel.offline-message.left",
}
TYPES_BY_FOLDER = {
    ce_type.removeprefix("chat.rocket.omnichannel.").replace(".", "-"): name for name, ce_type in CE_TYPES.items()
}

# What a body says of when its event happened. A department forward says nothing: its servedBy is the former one.
TIMES: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "LivechatSessionStart": lambda body: body.get("createdAt"),
    "LivechatSessionQueued": lambda _: None,
    "LivechatSessionTaken": lambda body: (body.get("servedBy") or {}).get("ts"),
    "LivechatSessionForwarded": lambda body: body["servedBy"]["ts"] if body.get("oldServedBy") else None,
    "LivechatSession": lambda body: body.get("closedAt"),
    "LivechatEdit": lambda _: None,
    "Message": lambda body: body["messages"][0].get("editedAt") or body["messages"][0]["ts"],
    "LeadCapture": lambda _: None,
    "LivechatOfflineMessage": lambda body: body.get("sentAt"),
}


def event_of(body: bytes | dict[str, Any], workspace: str = "default", received_at: int = 1_000) -> Event:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    delivery = Delivery(workspace, raw, received_at)
    return Event.of(delivery, delivery.parse())


def sample_id(path: Path) -> str:
    return f"{path.parts[-3]}/{path.stem}"


@pytest.mark.parametrize("path", SAMPLES, ids=sample_id)
def test_every_body_that_rocket_chat_sends_has_its_type_key_and_time(path: Path) -> None:
    raw = path.read_bytes()
    body = json.loads(raw)
    type_ = TYPES_BY_FOLDER[path.parts[-3]]
    key = f"offline:{body['visitor']['email'].lower()}" if type_ == "LivechatOfflineMessage" else body["_id"]

    event = event_of(raw)

    assert (event.type, event.key, event.time) == (type_, key, TIMES[type_](body) or "")
    assert (event.reason, event.detail) == (None, None)
    assert event.body == raw


@pytest.mark.parametrize(
    ("sample", "time"),
    [
        ("message-saved/valid/Message.json", "2026-11-20T09:00:01.120Z"),
        ("message-saved/valid/Message.edited.json", "2026-11-20T09:01:20.002Z"),
        ("session-closed/valid/LivechatSession.json", "2026-11-20T09:12:30.051Z"),
        ("session-queued/valid/LivechatSessionQueued.json", ""),
        ("session-forwarded/valid/LivechatSessionForwarded.department.json", ""),
        ("offline-message-left/valid/LivechatOfflineMessage.json", "2026-11-20T22:41:09.337Z"),
    ],
)
def test_the_time_is_the_one_that_the_body_tells(sample: str, time: str) -> None:
    assert event_of((CASES / sample).read_bytes()).time == time


def test_the_types_are_those_of_the_contract() -> None:
    assert {name: kind.ce_type for name, kind in EVENT_TYPES.items()} == CE_TYPES
    assert {name for name, kind in EVENT_TYPES.items() if kind.repeatable} == {
        "LivechatSessionQueued",
        "LivechatEdit",
        "LeadCapture",
    }


def test_an_explicit_null_counts_as_absent() -> None:
    forward = {"_id": "c", "type": "LivechatSessionForwarded", "servedBy": {"ts": "2026-11-20T09:00:07.031Z"}}
    assert event_of(forward | {"oldServedBy": {"_id": "a"}}).time == "2026-11-20T09:00:07.031Z"
    assert event_of(forward | {"oldServedBy": None, "oldDepartmentId": "d"}).time == ""


def test_the_last_message_before_this_one_does_not_tell_its_time() -> None:
    message = {"_id": "c", "type": "Message", "lastMessageAt": "2026-11-20T10:16:09.000Z"}
    assert event_of(message | {"messages": [{"ts": "2026-11-20T10:21:05.000Z"}]}).time == "2026-11-20T10:21:05.000Z"
    assert event_of(message | {"messages": []}).time == ""


@pytest.mark.parametrize(
    "time",
    [
        1764000000,
        None,
        "",
        "yesterday",
        "2026-11-20",
        "2026-11-20T09:00:01.120",
        "2026-13-20T09:00:01.120Z",
        "2026-11-20T09:00:61Z",
        "2026-11-20T09:00:01.120Z\n",
        "2026-11-20T09:00:01+99:99",
        "\u0662\u0660\u0662\u0666-11-20T09:00:01Z",
        ["2026-11-20T09:00:01.120Z"],
        {"$date": 1},
    ],
)
def test_a_time_that_is_not_rfc_3339_counts_as_none(time: object) -> None:
    assert event_of({"_id": "c", "type": "LivechatSession", "closedAt": time}).time == ""


@pytest.mark.parametrize(
    "time", ["2026-11-20T09:00:01Z", "2026-11-20T09:00:01.123456789Z", "2026-11-20T09:00:01.1+05:30"]
)
def test_a_time_in_any_form_of_rfc_3339_is_taken_as_it_is(time: str) -> None:
    assert event_of({"_id": "c", "type": "LivechatSession", "closedAt": time}).time == time


@pytest.mark.parametrize("path", ["messages", "servedBy", "closedAt", "createdAt", "visitor", "sentAt"])
@pytest.mark.parametrize("value", [None, 1, "x", [], ["x"], [[]], {}, {"ts": {}}, True])
def test_no_shape_of_a_body_is_an_error(path: str, value: object) -> None:
    for type_ in EVENT_TYPES:
        event = event_of({"_id": "c", "type": type_, "oldServedBy": None, path: value})
        assert event.time == ""


# --- Parsing. ---


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"1",
        b'"text"',
        b"[]",
        b'[{"_id":"c"}]',
        b'{"_id":"c"',
        b'{"_id":"c"}}',
        b'{"_id":"c"} x',
        b"_id=c",
        b"{'_id':'c'}",
        b'{"_id":"\xff"}',
        b'{"_id":NaN}',
        b'{"_id":Infinity}',
        b'{"_id":-Infinity}',
        b'{"label":"\\ud83d","_id":NaN}',
        b'{"label":"\\ud83d"',
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        '{"_id":"c"}'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_not_a_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadJson):
        Delivery("default", body, 0).parse()


def test_a_refusal_does_not_quote_the_body() -> None:
    with pytest.raises(BadJson) as caught:
        Delivery("default", b'{"visitor":"secret-visitor', 0).parse()
    assert "secret-visitor" not in str(caught.value)


@pytest.mark.parametrize("text", ['"Ada \\ud83d"', '"\\ude00 Ada"', '{"\\ud83d":1}', '"\\ud83d\\ude00"'])
def test_half_an_emoji_is_json(text: str) -> None:
    raw = b'{"_id":"c","type":"LeadCapture","label":%b}' % text.encode()
    event = event_of(raw)
    assert (event.key, event.type, event.reason, event.body) == ("c", "LeadCapture", None, raw)


def test_white_space_and_order_of_keys_are_the_senders() -> None:
    raw = b' {"type":"Message",\n"_id" : "c" } '
    assert event_of(raw).body == raw
    assert event_of(raw).key == "c"


def test_numbers_beyond_64_bits_are_json() -> None:
    assert event_of(b'{"_id":"c","type":"Message","n":%b}' % (b"9" * 400)).key == "c"


# --- Keys. ---


@pytest.mark.parametrize("chat", [None, "", 0, 1, 1.5, True, [], ["c"], {}, {"$oid": "c"}, "half \ud83d"], ids=repr)
@pytest.mark.parametrize("type_", [name for name in CE_TYPES if name != "LivechatOfflineMessage"])
def test_a_chat_id_that_is_no_text_makes_a_dead_letter_without_a_key(type_: str, chat: object) -> None:
    event = event_of({"_id": chat, "type": type_})
    assert (event.key, event.reason) == (None, DeadLetterReason.NO_KEY)
    assert event.detail is not None
    assert event.detail.startswith("/_id")


def test_a_missing_chat_id_makes_a_dead_letter_without_a_key() -> None:
    assert event_of({"type": "Message"}).reason is DeadLetterReason.NO_KEY


def test_a_chat_id_too_long_for_a_key_makes_a_dead_letter_without_one() -> None:
    event = event_of({"_id": "a" * 513, "type": "Message"})
    assert (event.key, event.reason) == (None, DeadLetterReason.NO_KEY)


@pytest.mark.parametrize(
    "chat", ["c", " ", "z\u00fcrich", "\U0001f600", "a" * 512, "offline:x", "\x00", "8qTgXo3LmZrK5wYcN"]
)
def test_any_text_is_a_chat_id(chat: str) -> None:
    event = event_of({"_id": chat, "type": "Message"})
    assert (event.key, event.reason) == (chat, None)


@pytest.mark.parametrize(
    ("email", "key"),
    [("ada@example.com", "offline:ada@example.com"), ("Ada@EXAMPLE.Com", "offline:ada@example.com")],
)
def test_an_offline_message_has_the_address_as_its_key(email: str, key: str) -> None:
    body = {"type": "LivechatOfflineMessage", "visitor": {"email": email}}
    assert event_of(body).key == key
    assert event_of(body | {"_id": "chat"}).key == key


@pytest.mark.parametrize(
    "visitor", [None, "ada@example.com", [], {}, {"email": ""}, {"email": None}, {"email": [{"address": "a@b"}]}]
)
def test_an_offline_message_without_an_address_makes_a_dead_letter(visitor: object) -> None:
    event = event_of({"type": "LivechatOfflineMessage", "_id": "chat", "visitor": visitor})
    assert (event.key, event.reason) == (None, DeadLetterReason.NO_KEY)
    assert event.detail is not None
    assert event.detail.startswith("/visitor/email")


@pytest.mark.parametrize("type_", [None, 1, "", "message", "LivechatSessionEnd", ["Message"], {}, "half \ud83d"])
def test_an_unknown_type_makes_a_dead_letter_that_keeps_its_key(type_: object) -> None:
    event = event_of({"_id": "c", "type": type_})
    assert (event.type, event.key, event.reason) == ("unknown", "c", DeadLetterReason.UNKNOWN_TYPE)


def test_the_sender_s_own_word_for_the_type_goes_nowhere() -> None:
    event = event_of({"_id": "c", "type": "visitor-secret"})
    assert "visitor-secret" not in (event.detail or "")
    assert event_type("visitor-secret").ce_type == "chat.rocket.omnichannel.unknown"


# --- A fork's own types. ---

FORKED = event_types({"Survey": "com.example.survey.answered", "Message": "ignored"})


def forked(body: dict[str, Any]) -> Event:
    delivery = Delivery("default", json.dumps(body).encode(), 1_000)
    return Event.of(delivery, delivery.parse(), {"Survey": "print"}, FORKED)


def test_a_type_that_a_schema_adds_is_an_event_like_any_other() -> None:
    event = forked({"_id": "c", "type": "Survey", "createdAt": "2026-11-20T09:00:00Z"})
    assert (event.type, event.key, event.reason, event.schema) == ("Survey", "c", None, "print")
    assert event.time == ""
    assert event_type("Survey", FORKED).ce_type == "com.example.survey.answered"
    assert event_type("Survey", FORKED).slug == "com.example.survey.answered"


def test_an_added_type_needs_a_chat_and_leaves_the_others_as_they_are() -> None:
    assert forked({"type": "Survey"}).reason is DeadLetterReason.NO_KEY
    assert forked({"_id": "c", "type": "Poll"}).reason is DeadLetterReason.UNKNOWN_TYPE
    assert {name: FORKED[name] for name in EVENT_TYPES} == EVENT_TYPES


@pytest.mark.parametrize("type_", ["Survey", "Poll"])
def test_whether_a_type_that_is_not_rocket_chat_s_repeats_does_not_depend_on_the_schemas(type_: str) -> None:
    body = {"_id": "c", "type": type_}
    assert forked(body).repeatable
    assert event_of(body).repeatable


# --- Identity. ---


def test_the_digest_is_the_hash_of_workspace_line_feed_and_body() -> None:
    raw = b'{"_id":"c","type":"Message"}'
    digest = hashlib.sha256(b"acme\n" + raw).digest()
    event = event_of(raw, workspace="acme")
    assert event.digest == digest
    assert event.id == digest.hex()


def test_a_retry_has_the_same_id_and_another_workspace_or_body_another() -> None:
    raw = b'{"_id":"c","type":"Message"}'
    assert event_of(raw, received_at=1).id == event_of(raw, received_at=2).id
    assert len({event_of(raw).id, event_of(raw + b" ").id, event_of(raw, "other").id}) == 3


def test_a_genuine_repeat_has_its_number_in_its_id() -> None:
    event = event_of({"_id": "c", "type": "LeadCapture"})
    assert event._replace(occurrence=2).id == f"{event.id}.2"
    assert event._replace(occurrence=13).id == f"{event.id}.13"


def test_the_test_button_is_known_by_its_chat_id() -> None:
    sample = orjson.loads((CASES / "session-closed" / "valid" / "WebhookTest.LivechatSession.json").read_bytes())
    assert is_test_delivery(sample)
    assert is_test_delivery({"_id": "fasd6f5a4sd6f8a4sdf"})
    assert not is_test_delivery({"_id": "fasd6f5a4sd6f8a4sd"})
    assert not is_test_delivery({"_id": ["fasd6f5a4sd6f8a4sdf"]})
    assert not is_test_delivery({})


def test_a_type_s_place_in_a_topic_name_is_from_the_fixed_list() -> None:
    assert {event_type(name).slug for name in [*EVENT_TYPES, "made up"]} == {
        ce_type.removeprefix("chat.rocket.omnichannel.") for ce_type in CE_TYPES.values()
    } | {"unknown"}
