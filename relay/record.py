"""What an event becomes on Kafka: topic, key, value, CloudEvents headers (binary mode), timestamp."""

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple, Protocol

from relay.errors import SettingsInvalid
from relay.event import EVENT_TYPES, OFFLINE_MESSAGE, UNKNOWN_TYPE, DeadLetterReason, Event, EventTypes, event_type
from relay.framing import Frame
from relay.values import topic as topic_name

#: By how many bytes a record is larger than its body, at most: key, headers, framing.
RECORD_OVERHEAD = 4096

Headers = list[tuple[str, bytes]]


class Record(NamedTuple):
    """One Kafka record."""

    topic: str
    #: What the partition is computed from; the key, or the event's id where there is no key.
    partition_key: bytes
    key: bytes | None
    value: bytes
    headers: Headers
    #: Milliseconds since the epoch.
    timestamp: int
    #: None: as *partition_key* says.
    partition: int | None = None


class Topics(NamedTuple):
    """The topic names of the settings; *events* may hold `{type}` and `{workspace}`."""

    events: str
    dead_letters: str
    #: Those that are known.
    types: EventTypes = EVENT_TYPES

    def of(self, workspace: str, type_name: str) -> str:
        """The topic of valid events of that type from that workspace."""
        return self.events.replace("{type}", event_type(type_name, self.types).slug).replace("{workspace}", workspace)

    def all(self, workspaces: Iterable[str]) -> list[str]:
        """Every topic that events of these *workspaces* may go to."""
        names = {self.of(workspace, name) for workspace in workspaces for name in self.types}
        return sorted(names | {self.dead_letters})

    def check(self, workspaces: Iterable[str], watermarks: str) -> None:
        """
        Makes sure that these *workspaces* and the types can stand in a topic's name.

        Raises: SettingsInvalid.
        """
        faults = [fault for workspace in workspaces for fault in self._faults(workspace, watermarks)]
        if faults:
            raise SettingsInvalid([f"RELAY_TOPIC: {fault}." for fault in dict.fromkeys(faults)])

    def _faults(self, workspace: str, watermarks: str) -> Iterator[str]:
        # To Kafka "." and "_" are the same in two topics' names.
        others = {self.dead_letters: "RELAY_DEAD_LETTER_TOPIC", watermarks: "RELAY_WATERMARK_TOPIC"}
        taken = {name.replace("_", "."): owner for name, owner in others.items()}
        for kind in self.types.values() if "{type}" in self.events else ():
            name = self.of(workspace, kind.name)
            try:
                topic_name(name)
            except ValueError as error:
                yield f"for the type {kind.name} it comes to '{name}', which {error}"
            other = taken.setdefault(name.replace("_", "."), kind.name)
            if other != kind.name:
                yield f"for the type {kind.name} it comes to {name}, which is that of {other}"


class Framer(Protocol):
    """Knows how a record names its schema."""

    def frame(self, topic: str, event: Event) -> Frame | None:
        """The frame of an event on *topic*, or None as long as its schema's id is not known."""


class RecordMaker:
    """Makes the records of events; what events of one workspace and type share is made once."""

    def __init__(self, topics: Topics, data_schema: Callable[[str], str | None], framer: Framer | None = None) -> None:
        """*data_schema* gives the `ce_dataschema` of a Rocket.Chat type; without *framer* values are bare."""
        self._framer = framer
        self._topics = topics
        self._data_schema = data_schema
        self._shared: dict[tuple[str, str], tuple[str, Headers]] = {}

    def record(self, sequence: int, event: Event, now: int) -> Record:
        """The record of *event*, published at *now* (milliseconds since the epoch)."""
        topic, shared = self._shared.get((event.workspace, event.type)) or self._share(event.workspace, event.type)
        received_at = rfc3339(event.received_at)
        key = None if event.key is None else event.key.encode()
        id_ = event.id.encode()
        headers = [
            *shared,
            ("ce_id", id_),
            ("ce_time", event.time.encode() if event.time else received_at),
            ("relay_sequence", b"%d" % sequence),
            ("relay_received_at", received_at),
        ]
        if key is not None and event.type != OFFLINE_MESSAGE:
            headers.append(("ce_subject", key))
        if event.reason is not None:
            topic = self._topics.dead_letters
            headers.append(("relay_error_reason", event.reason.encode()))
            headers.append(("relay_error_detail", (event.detail or "").encode()))
        elif event.detail is not None:
            headers.append(("relay_schema_error", event.detail.encode()))
        value = event.body
        if self._framer is not None and event.reason is None:  # Dead letters are as they came.
            framed = self._framer.frame(topic, event)
            assert framed is not None, "the publisher waits for it"
            value = framed.prefix + value
            headers += framed.headers
        # Never later than now: a broker refuses records from the future, and a clock may have been set back.
        return Record(topic, key or id_, key, value, headers, min(event.received_at, now))

    def known(self, event: Event) -> Event:
        """*event*, as a dead letter if its type is not known any more: its schema went with a restart."""
        if event.type in self._topics.types or event.type == UNKNOWN_TYPE:
            return event
        reason, detail = DeadLetterReason.UNKNOWN_TYPE, "/type: its schema was removed after the event was accepted"
        return event._replace(type=UNKNOWN_TYPE, schema="", reason=reason, detail=detail)

    def ready(self, event: Event) -> bool:
        """Whether the record of *event* can be made: whether its schema's id is known."""
        if self._framer is None or event.reason is not None:
            return True
        topic, _ = self._shared.get((event.workspace, event.type)) or self._share(event.workspace, event.type)
        return self._framer.frame(topic, event) is not None

    def refusal(self, sequence: int, event: Event, detail: str, now: int) -> Record:
        """What announces an event that the broker refuses for good: its record for the dead letters, without a body."""
        refused = event._replace(reason=DeadLetterReason.REJECTED_BY_KAFKA, detail=detail, body=b"{}")
        return self.record(sequence, refused, now)

    def _share(self, workspace: str, type_name: str) -> tuple[str, Headers]:
        headers = [
            ("ce_specversion", b"1.0"),
            ("ce_source", f"/rocketchat/{workspace}".encode()),
            ("ce_type", event_type(type_name, self._topics.types).ce_type.encode()),
            ("content-type", b"application/json"),
        ]
        if data_schema := self._data_schema(type_name):
            headers.append(("ce_dataschema", data_schema.encode()))
        topic = self._topics.dead_letters if type_name == UNKNOWN_TYPE else self._topics.of(workspace, type_name)
        shared = self._shared[workspace, type_name] = (topic, headers)
        return shared


def rfc3339(milliseconds: int) -> bytes:
    """That time since the epoch in UTC, to the millisecond."""
    second, millisecond = divmod(milliseconds, 1000)
    return b"%b.%03dZ" % (_second(second), millisecond)


@lru_cache(maxsize=64)
def _second(second: int) -> bytes:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S").encode()
