"""Which subject a schema has, and how a value names its schema."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Protocol

import orjson

from relay.errors import GuidMissing

#: The header of `header` framing, as Confluent's clients name it.
SCHEMA_ID_HEADER = "__value_schema_id"

Framing = Literal["none", "prefix", "header"]
Strategy = Literal["topic-record", "record", "topic"]

_PREFIX_BYTES = 5


class Described(Protocol):
    """One schema file: schemas.Schema."""

    @property
    def ce_type(self) -> str:
        """Its title."""

    @property
    def text(self) -> str:
        """The file."""


class Registration(NamedTuple):
    """What a registry is to have under one subject."""

    subject: str
    text: str
    #: Of the schema files in *text*: one, or all that share a topic's subject.
    fingerprints: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Of *text* itself: the id of a schema file may change with its neighbours in *text*, this one's may not."""
        return fingerprint(self.text)


def fingerprint(text: str) -> str:
    """A short name for what a schema file says, however it is formatted: what an event remembers of its judge."""
    return hashlib.sha256(orjson.dumps(orjson.loads(text), option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def subject(strategy: Strategy, topic: str, ce_type: str) -> str:
    """The subject of such events on *topic*: Confluent's TopicRecord-, Record- or TopicNameStrategy."""
    if strategy == "topic-record":
        return f"{topic}-{ce_type}"
    return ce_type if strategy == "record" else f"{topic}-value"


def registrations(strategy: Strategy, placed: Iterable[tuple[str, Described]]) -> list[Registration]:
    """
    What a registry is to have for schemas that are *placed* on topics, each subject once.

    With `topic` all schemas of one topic are registered as one: a `oneOf` of them.
    """
    members: dict[str, dict[str, str]] = {}
    for topic, schema in placed:
        members.setdefault(subject(strategy, topic, schema.ce_type), {})[fingerprint(schema.text)] = schema.text
    return [
        Registration(name, texts[0] if len(texts := [*found.values()]) == 1 else _one_of(name, texts), tuple(found))
        for name, found in members.items()
    ]


def _one_of(title: str, texts: list[str]) -> str:
    documents: list[dict[str, Any]] = [json.loads(text) for text in texts]
    return json.dumps({"$schema": documents[0]["$schema"], "title": title, "oneOf": documents})


# --- Framing. ---


class Registered(NamedTuple):
    """A schema as the registry knows it."""

    subject: str
    id: int
    #: Its 16 bytes, from a registry that has GUIDs.
    guid: bytes | None = None
    version: int | None = None


class KnownId(NamedTuple):
    """A schema id as the spool keeps it."""

    #: Whose id: another registry gives others.
    registry: str
    subject: str
    fingerprint: str
    id: int
    guid: bytes | None


class Frame(NamedTuple):
    """What a record gets so that its value names its schema."""

    prefix: bytes = b""
    headers: tuple[tuple[str, bytes], ...] = ()


def frame(framing: Framing, registered: Registered) -> Frame:
    """
    How records of this schema are framed: nothing; 0x00 and the id in four bytes before the value; or a header with
    0x01 and the GUID.

    Raises: GuidMissing.
    """
    if framing == "none":
        return Frame()
    if framing == "prefix":
        return Frame(prefix=b"\x00" + registered.id.to_bytes(4, "big"))
    if registered.guid is None:
        raise GuidMissing(
            registered.subject,
            f"it gave only the id {registered.id}. Set RELAY_SCHEMA_FRAMING=prefix, or use a registry with GUIDs: "
            "Confluent's has them, Apicurio's and Karapace's have not.",
        )
    return Frame(headers=((SCHEMA_ID_HEADER, b"\x01" + registered.guid),))


def unframed(value: bytes) -> tuple[int | None, bytes]:
    """The id in a value with `prefix` framing and what follows it; no JSON begins with 0x00."""
    if value[:1] != b"\x00" or len(value) < _PREFIX_BYTES:
        return None, value
    return int.from_bytes(value[1:_PREFIX_BYTES], "big"), value[_PREFIX_BYTES:]
