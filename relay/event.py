"""
From a delivery as it was received to an event that can be stored.

Knows Rocket.Chat's bodies and nothing of HTTP, SQLite or Kafka. What the sender really does is told where it matters:
bodies carry no delivery id and no event time, and their key order differs by version.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

import orjson

from relay.errors import BadJson

#: The `_id` of the delivery that Rocket.Chat's "Send test" button makes, in every version.
TEST_DELIVERY_ID = "fasd6f5a4sd6f8a4sdf"

#: The workspace of deliveries to `/rocketchat`.
DEFAULT_WORKSPACE = "default"

#: Characters of a chat's id or an e-mail address: both become key and header of a record, which must stay small even
#: where the body cannot be published.
MAX_KEY_LENGTH = 512

#: The value of `type` wherever the sender's own is not one that the relay knows.
UNKNOWN_TYPE = "unknown"

_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)")

Payload = Mapping[str, Any]


class DeadLetterReason(StrEnum):
    """Why an event goes to the dead-letter topic: the header `relay_error_reason`."""

    UNKNOWN_TYPE = "unknown_type"
    SCHEMA = "schema"
    NO_KEY = "no_key"
    REJECTED_BY_KAFKA = "rejected_by_kafka"


def _nothing(_: Payload) -> object:
    return None


def _member(name: str) -> Callable[[Payload], object]:
    return lambda payload: payload.get(name)


def _inner(payload: Payload, outer: str, name: str) -> object:
    inner = payload.get(outer)
    return inner.get(name) if isinstance(inner, dict) else None


def _served_time(payload: Payload) -> object:
    return _inner(payload, "servedBy", "ts")


def _forward_time(payload: Payload) -> object:
    # A forward to a department leaves `servedBy` as it was: its time is that of an earlier event.
    return _served_time(payload) if payload.get("oldServedBy") else None


def _message_time(payload: Payload) -> object:
    messages = payload.get("messages")
    if not isinstance(messages, list) or not messages or not isinstance(messages[0], dict):
        return None
    # An edit sends the same message again; `lastMessageAt` is the time of the message before this one.
    return messages[0].get("editedAt") or messages[0].get("ts")


class EventType(NamedTuple):
    """One of Rocket.Chat's event types, or of a fork's own."""

    name: str
    ce_type: str
    #: When it happened, where the body says it.
    time: Callable[[Payload], object] = _nothing
    #: Whether a new event may equal an earlier one byte for byte.
    repeatable: bool = False

    @property
    def slug(self) -> str:
        """What `{type}` in RELAY_TOPIC stands for."""
        return self.ce_type.removeprefix(CE_TYPE_PREFIX)


CE_TYPE_PREFIX = "chat.rocket.omnichannel."
OFFLINE_MESSAGE = "LivechatOfflineMessage"
EventTypes = Mapping[str, EventType]
#: Rocket.Chat's own.
EVENT_TYPES: EventTypes = {
    event_type.name: event_type
    for event_type in (
        EventType("LivechatSessionStart", CE_TYPE_PREFIX + "session.started", _member("createdAt")),
        EventType("LivechatSessionQueued", CE_TYPE_PREFIX + "session.queued", repeatable=True),
        EventType("LivechatSessionTaken", CE_TYPE_PREFIX + "session.taken", _served_time),
        EventType("LivechatSessionForwarded", CE_TYPE_PREFIX + "session.forwarded", _forward_time),
        EventType("LivechatSession", CE_TYPE_PREFIX + "session.closed", _member("closedAt")),
        EventType("LivechatEdit", CE_TYPE_PREFIX + "session.edited", repeatable=True),
        EventType("Message", CE_TYPE_PREFIX + "message.saved", _message_time),
        EventType("LeadCapture", CE_TYPE_PREFIX + "lead.captured", repeatable=True),
        EventType(OFFLINE_MESSAGE, CE_TYPE_PREFIX + "offline-message.left", _member("sentAt")),
    )
}
# Of a type that is not Rocket.Chat's own nobody knows here whether it repeats: taken for a retry, a genuine repeat
# would be lost. So all these may, whatever the schemas are, which may be others after a restart.
_UNKNOWN = EventType(UNKNOWN_TYPE, CE_TYPE_PREFIX + UNKNOWN_TYPE, repeatable=True)
_NEVER_REPEATED = frozenset(name for name, kind in EVENT_TYPES.items() if not kind.repeatable)


def event_types(ce_types: Mapping[str, str]) -> EventTypes:
    """Rocket.Chat's own types, and for each other name in *ce_types* one with that `ce_type`."""
    added = {name: EventType(name, it, repeatable=True) for name, it in ce_types.items() if name not in EVENT_TYPES}
    return {**EVENT_TYPES, **added}


def event_type(name: str, types: EventTypes = EVENT_TYPES) -> EventType:
    """The type of that name, or the one that stands for all unknown ones."""
    return types.get(name, _UNKNOWN)


def is_repeatable(type_name: str) -> bool:
    """Whether a new event of that type may equal an earlier one byte for byte."""
    return type_name not in _NEVER_REPEATED


class Delivery(NamedTuple):
    """A request's body as it was received, from a sender that showed its token."""

    workspace: str
    body: bytes
    #: Milliseconds since the epoch.
    received_at: int

    def parse(self) -> dict[str, Any]:
        """
        The body as a JSON object.

        Raises: BadJson.
        """
        try:
            payload = orjson.loads(self.body)
        except orjson.JSONDecodeError:
            payload = _parse_leniently(self.body)
        if not isinstance(payload, dict):
            raise BadJson
        return payload


def _parse_leniently(body: bytes) -> object:
    # JSON.stringify escapes half an emoji (a label cut in the middle of one) as a lone surrogate. That is JSON,
    # and the event would be gone for good if it were refused; orjson refuses it.
    try:
        return json.loads(body.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadJson from error


def _refuse_constant(name: str) -> object:
    raise BadJson(f"The body is not JSON: it holds {name}.")


def is_test_delivery(payload: Payload) -> bool:
    """Whether this is Rocket.Chat's "Send test"."""
    return payload.get("_id") == TEST_DELIVERY_ID


NO_SCHEMAS: Mapping[str, str] = MappingProxyType({})


class Event(NamedTuple):
    """One event, ready to be stored. Only `Event.of` makes one from a delivery."""

    workspace: str
    #: The name of an EventType, or UNKNOWN_TYPE.
    type: str
    #: Kafka's record key; none only with the reason `no_key`.
    key: str | None
    #: SHA-256 over workspace, a line feed and the body as received: the same for every retry of one delivery.
    digest: bytes
    #: 1, or the how-manieth genuine repeat of an identical body this is.
    occurrence: int
    #: Milliseconds since the epoch.
    received_at: int
    #: RFC 3339: when it happened, as the body says; empty where it does not say.
    time: str
    #: Why it goes to the dead-letter topic, if it does.
    reason: DeadLetterReason | None
    #: What was wrong with it, without any value of the body; without a *reason* it is published all the same.
    detail: str | None
    body: bytes
    #: The fingerprint of the schema in force for its type when it was accepted; empty where there is none.
    schema: str = ""

    @classmethod
    def of(
        cls,
        delivery: Delivery,
        payload: dict[str, Any],
        schemas: Mapping[str, str] = NO_SCHEMAS,
        types: EventTypes = EVENT_TYPES,
    ) -> "Event":
        """
        The event in *delivery*, whose body was parsed as *payload*.

        *types* are those that are known; *schemas* has the fingerprint of each one's schema.
        """
        sent_type = payload.get("type")
        kind = types.get(sent_type, _UNKNOWN) if isinstance(sent_type, str) else _UNKNOWN
        key = _key(kind, payload)
        reason = detail = None
        if kind is _UNKNOWN:
            reason, detail = DeadLetterReason.UNKNOWN_TYPE, "/type: not one of the event types that are known"
        elif key is None:
            place = "/visitor/email" if kind.name == OFFLINE_MESSAGE else "/_id"
            reason, detail = DeadLetterReason.NO_KEY, f"{place}: not a string of 1 to {MAX_KEY_LENGTH} characters"
        time = kind.time(payload)
        return cls(
            delivery.workspace,
            kind.name,
            key,
            hashlib.sha256(b"%b\n%b" % (delivery.workspace.encode(), delivery.body)).digest(),
            1,
            delivery.received_at,
            time if _is_time(time) else "",
            reason,
            detail,
            delivery.body,
            schemas.get(kind.name, ""),
        )

    @property
    def id(self) -> str:
        """The CloudEvents id."""
        return self.digest.hex() if self.occurrence == 1 else f"{self.digest.hex()}.{self.occurrence}"

    @property
    def repeatable(self) -> bool:
        """Whether a new event may equal this one byte for byte."""
        return self.type not in _NEVER_REPEATED


def _key(kind: EventType, payload: Payload) -> str | None:
    if kind.name == OFFLINE_MESSAGE:
        email = _inner(payload, "visitor", "email")
        key = f"offline:{email.lower()}" if _fits(email) else None
    else:
        chat = payload.get("_id")
        key = chat if _fits(chat) else None
    if key is not None and not key.isascii():
        try:
            key.encode()
        except UnicodeEncodeError:  # A lone surrogate: no UTF-8 for it.
            return None
    return key


def _fits(text: object) -> TypeGuard[str]:
    return isinstance(text, str) and 0 < len(text) <= MAX_KEY_LENGTH


def _is_time(text: object) -> TypeGuard[str]:
    if not isinstance(text, str) or not _RFC3339.fullmatch(text):
        return False
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True
