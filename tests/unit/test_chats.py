import json
import random
from collections import Counter, defaultdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from relay.dev.chats import conversation, offline_message, stream

NOON = datetime(2026, 11, 20, 12, 0, 0, 7000, tzinfo=UTC)
SCHEMAS = Path(__file__).parents[2] / "schemas"
SCHEMA_OF = {
    "LivechatSessionStart": "session-started.json",
    "LivechatSessionQueued": "session-queued.json",
    "LivechatSessionTaken": "session-taken.json",
    "LivechatSessionForwarded": "session-forwarded.json",
    "LivechatSession": "session-closed.json",
    "LivechatEdit": "session-edited.json",
    "Message": "message-saved.json",
    "LeadCapture": "lead-captured.json",
    "LivechatOfflineMessage": "offline-message-left.json",
}
BODY_KEYS = (
    *("_id", "label", "topic", "createdAt", "lastMessageAt", "tags", "customFields", "visitor", "agent", "type"),
    *("messages", "departmentId", "servedBy", "oldServedBy", "closedAt", "closedBy", "closer"),
)
MESSAGE_KEYS = (
    *("u", "_id", "username", "msg", "ts", "rid", "editedAt", "agentId", "closingMessage"),
    *("file", "attachments", "fileUpload", "_updatedAt"),
)


def chat(seed: int = 1, messages: int = 6) -> list[dict[str, Any]]:
    return [json.loads(body) for body in conversation(random.Random(seed), started_at=NOON, messages=messages)]


def many_bodies() -> list[bytes]:
    rng = random.Random(7)
    bodies = [body for _, body in islice(stream(rng, chats=10), 2000)]
    return [*bodies, *(offline_message(rng, sent_at=NOON) for _ in range(20))]


def test_a_chat_has_every_event_in_the_order_of_its_life() -> None:
    assert [body["type"] for body in chat()] == [
        *("LivechatSessionStart", "LivechatSessionQueued", "LivechatSessionTaken"),
        *("Message", "Message", "Message", "LeadCapture", "Message"),
        *("LivechatSessionTaken", "LivechatSessionForwarded"),
        *("Message", "Message", "Message", "LivechatSession", "LivechatEdit"),
    ]


@pytest.mark.parametrize("messages", range(9))
def test_a_chat_has_as_many_messages_as_asked_for(messages: int) -> None:
    told = [body for body in chat(messages=messages) if body["type"] == "Message"]

    assert len({body["messages"][0]["_id"] for body in told}) == messages


def test_keys_stand_in_the_order_of_rocketchat() -> None:
    for body in (json.loads(body) for body in many_bodies()):
        if body["type"] == "LivechatOfflineMessage":
            assert list(body) == ["type", "sentAt", "visitor", "message"]
            continue
        assert list(body) == [key for key in BODY_KEYS if key in body]
        for message in body["messages"]:
            assert list(message) == [key for key in MESSAGE_KEYS if key in message]


def test_bodies_are_what_json_stringify_writes() -> None:
    bodies = many_bodies()

    assert all(
        body == json.dumps(json.loads(body), ensure_ascii=False, separators=(",", ":")).encode() for body in bodies
    )
    assert any("👋".encode() in body for body in bodies)
    assert any("\u2028".encode() in body for body in bodies)


@pytest.mark.parametrize(("kind", "file"), SCHEMA_OF.items())
def test_every_body_is_valid_by_the_shipped_schema(kind: str, file: str) -> None:
    schema = jsonschema_rs.validator_for(json.loads((SCHEMAS / file).read_bytes()))
    bodies = [body for body in map(json.loads, many_bodies()) if body["type"] == kind]

    assert bodies
    for body in bodies:
        schema.validate(body)


def test_every_body_occurs_once() -> None:
    assert [body for body, times in Counter(many_bodies()).items() if times > 1] == []


def test_an_edit_repeats_its_message_with_the_time_of_the_edit() -> None:
    told = [body["messages"][0] for body in chat() if body["type"] == "Message"]
    (edit,) = (message for message in told if "editedAt" in message)
    first = next(message for message in told if message["_id"] == edit["_id"])

    assert first["ts"] == edit["ts"] < edit["editedAt"] < edit["_updatedAt"]
    assert first["msg"] != edit["msg"]


def test_the_closing_body_has_the_whole_transcript() -> None:
    bodies = chat()
    told = {body["messages"][0]["_id"]: body["messages"][0] for body in bodies if body["type"] == "Message"}
    (closed,) = (body for body in bodies if body["type"] == "LivechatSession")

    assert closed["messages"][:-1] == list(told.values())
    assert closed["messages"][-1]["closingMessage"] is True
    assert closed["closedAt"] == closed["messages"][-1]["ts"]


def test_a_forward_goes_to_another_agent() -> None:
    (forwarded,) = (body for body in chat() if body["type"] == "LivechatSessionForwarded")

    assert forwarded["servedBy"]["_id"] == forwarded["agent"]["_id"] != forwarded["oldServedBy"]["_id"]


def test_a_message_says_when_the_one_before_it_was() -> None:
    told = [body for body in chat() if body["type"] == "Message" and "editedAt" not in body["messages"][0]]

    assert [body["lastMessageAt"] for body in told[1:]] == [body["messages"][0]["ts"] for body in told[:-1]]


def test_the_same_seed_gives_the_same_bytes() -> None:
    assert chat(seed=5) == chat(seed=5) != chat(seed=6)


def test_a_chat_begins_when_it_is_told_to() -> None:
    assert chat()[0]["createdAt"] == "2026-11-20T12:00:00.007Z"


def test_a_stream_mixes_its_chats_and_replaces_those_that_close() -> None:
    chats: dict[str, list[str]] = defaultdict(list)
    open_at_once = set()
    most = 0
    for chat_id, body in islice(stream(random.Random(3), chats=4, now=lambda: NOON), 400):
        told = json.loads(body)
        assert told["_id"] == chat_id
        chats[chat_id].append(told["type"])
        open_at_once.add(chat_id)
        most = max(most, len(open_at_once))
        if told["type"] == "LivechatEdit":
            open_at_once.remove(chat_id)

    assert most == 4
    assert len(chats) > 20
    assert all(types[0] == "LivechatSessionStart" for types in chats.values())
    assert all(types[-1] == "LivechatEdit" for chat_id, types in chats.items() if chat_id not in open_at_once)
