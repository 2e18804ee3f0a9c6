"""A dead letter as it lies on its topic: whose it is, what the relay would make of it now, whether it was replayed."""

import hashlib
from collections.abc import Mapping
from datetime import datetime
from typing import Literal, NamedTuple

from relay.batch import Entry
from relay.errors import BadJson
from relay.event import DeadLetterReason, Delivery, Event
from relay.framing import SCHEMA_ID_HEADER
from relay.reader import Found
from relay.record import Record, rfc3339
from relay.schemas import Schemas

#: The header of a mark: the place of the dead letter that was replayed.
REPLAYED_HEADER = "relay_replayed"
_NAME = ("ce_id", "relay_sequence", "relay_received_at")
_IDENTITY_BYTES = 16
_SOURCE_PREFIX = "/rocketchat/"


class Letter(NamedTuple):
    """A record of the dead-letter topic that a relay wrote."""

    found: Found
    headers: Mapping[str, str]

    @classmethod
    def of(cls, found: Found) -> "Letter | None":
        """None for what others wrote."""
        try:
            headers = {name: value.decode() for name, value in found.headers if value is not None}
        except UnicodeDecodeError:
            return None
        return cls(found, headers) if headers.keys() >= set(_NAME) else None

    @property
    def is_mark(self) -> bool:
        """Whether it only says that a dead letter was replayed."""
        return REPLAYED_HEADER in self.headers

    @property
    def is_announcement(self) -> bool:
        """Whether it only says that there is an event that Kafka refused: the body is in the spool."""
        return self.headers.get("relay_error_reason") == DeadLetterReason.REJECTED_BY_KAFKA

    @property
    def name(self) -> tuple[str, ...]:
        """The same for a dead letter, its mark and any copy of it: of one event, whatever becomes of offsets."""
        return tuple(self.headers[name] for name in _NAME)

    @property
    def identity(self) -> bytes:
        """The name in little space."""
        return hashlib.blake2b("\n".join(self.name).encode(), digest_size=_IDENTITY_BYTES).digest()


def mark(letter: Letter, record: Record, now: int) -> Record:
    """What says on the dead-letter topic, from *now* on, that *letter* was replayed as *record*."""
    left_out = {SCHEMA_ID_HEADER, "relay_schema_error"}
    headers = [header for header in record.headers if header[0] not in left_out]
    headers.append((REPLAYED_HEADER, letter.found.place.encode()))
    # On the letter's own partition and behind it: so it is not deleted before the letter.
    return record._replace(value=b"{}", headers=headers, timestamp=now, partition=letter.found.partition)


class Judge:
    """Judges dead letters as the relay would judge their events if they came now."""

    def __init__(
        self, schemas: Schemas, fingerprints: Mapping[str, str], validation: Literal["enforce", "report", "off"]
    ) -> None:
        self._schemas = schemas
        self._fingerprints = fingerprints
        self._validation = validation

    def event(self, letter: Letter) -> Entry:
        """
        Its event, which is a dead letter still if it has a reason. What can't be told from the body any more, such as
        the id of one that was redacted, is as it was.

        Raises: ValueError if no relay wrote such a record.
        """
        found, headers = letter
        digest, _, occurrence = headers["ce_id"].partition(".")
        delivery = Delivery(
            headers.get("ce_source", "").removeprefix(_SOURCE_PREFIX),
            found.value,
            round(datetime.fromisoformat(headers["relay_received_at"]).timestamp() * 1000),
        )
        try:
            payload = delivery.parse()
        except BadJson as error:
            raise ValueError(str(error)) from error
        event = Event.of(delivery, payload, self._fingerprints, self._schemas.types)
        event = event._replace(
            key=event.key if found.key is None else found.key.decode(),
            digest=bytes.fromhex(digest),
            occurrence=int(occurrence or 1),
            time=event.time or headers.get("ce_time", ""),
        )
        sequence = int(headers["relay_sequence"])
        if (event.id, str(sequence), rfc3339(event.received_at).decode()) != letter.name:
            raise ValueError("not as a relay writes it: its mark would have another name")
        return sequence, self._judged(event, payload)

    def _judged(self, event: Event, payload: object) -> Event:
        if event.reason is not None or self._validation == "off":
            return event
        fault = self._schemas.judge(event.type, payload)
        if fault is None:
            return event
        return event._replace(reason=DeadLetterReason.SCHEMA if self._validation == "enforce" else None, detail=fault)


class Marks:
    """Which dead letters of a partition were replayed: 16 bytes each, where a set would need 100."""

    def __init__(self) -> None:
        self._buckets = [bytearray() for _ in range(4096)]

    def add(self, identity: bytes) -> None:
        """Notes one."""
        self._bucket(identity).extend(identity)

    def __contains__(self, identity: bytes) -> bool:
        bucket = self._bucket(identity)
        place = bucket.find(identity)
        while place > 0 and place % _IDENTITY_BYTES:  # Found across two others.
            place = bucket.find(identity, place + 1)
        return place >= 0

    def _bucket(self, identity: bytes) -> bytearray:
        return self._buckets[(identity[0] << 8 | identity[1]) % len(self._buckets)]
