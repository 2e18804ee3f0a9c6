"""
Whether what lies on Kafka is what the senders were answered: each 200 once, unchanged, in order, and nothing else.

Shares no code with the relay: another client reads, and what a record must look like is worked out here a second time.
"""

import hashlib
import itertools
import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

_TYPES = {
    "LivechatSessionStart": "session.started",
    "LivechatSessionQueued": "session.queued",
    "LivechatSessionTaken": "session.taken",
    "LivechatSessionForwarded": "session.forwarded",
    "LivechatSession": "session.closed",
    "LivechatEdit": "session.edited",
    "Message": "message.saved",
    "LeadCapture": "lead.captured",
    "LivechatOfflineMessage": "offline-message.left",
}
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)")


# --- What the senders know. ---


class Sent(NamedTuple):
    """An event that was sent, once or more often. Those of one chat stand in the order in which they were sent."""

    body: bytes
    #: Whether a try was answered 200. If not, the event may be on Kafka or not: a connection that breaks tells nothing.
    answered: bool = True
    workspace: str = "default"
    #: Why it is to be on the dead-letter topic, if it is.
    reason: str | None = None
    #: What is to be on Kafka, if it is not the body.
    value: bytes | None = None


# --- What a consumer sees. ---


class Landed(NamedTuple):
    """A record as a `read_committed` consumer sees it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    #: Milliseconds since the epoch.
    timestamp: int

    @property
    def place(self) -> str:
        """Where it lies."""
        return f"{self.topic}-{self.partition}@{self.offset}"

    def header(self, name: str) -> str | None:
        """The header of that name, if there is just one."""
        values = [value for key, value in self.headers if key == name]
        return values[0].decode(errors="replace") if len(values) == 1 else None


def read_topics(
    bootstrap_servers: str, *topics: str, seconds: float = 60, isolation_level: str = "read_committed"
) -> list[Landed]:
    """Every record of *topics*, by partition and offset; as `read_on` from their beginning."""
    found = read_on(bootstrap_servers, topics, {}, seconds=seconds, isolation_level=isolation_level)
    return sorted(found, key=lambda landed: (landed.topic, landed.partition, landed.offset))


def read_on(
    bootstrap_servers: str,
    topics: Iterable[str],
    reached: dict[tuple[str, int], int],
    *,
    seconds: float = 60,
    isolation_level: str = "read_committed",
) -> Iterator[Landed]:
    """
    Every record of *topics* from the offsets in *reached* on, by topic and partition: the committed ones, unless
    *isolation_level* says otherwise. Moves *reached* on.

    Reads to the end as a `read_uncommitted` consumer sees it: a `read_committed` one's own idea of the end lies before
    any transaction that is still open, and so would hide what that holds. Fails if one stays open for *seconds*.
    """
    ends = _ends(bootstrap_servers, topics, seconds)
    consumer = _consumer(bootstrap_servers, isolation_level)
    deadline = time.monotonic() + seconds
    try:
        consumer.assign([TopicPartition(*place, reached.setdefault(place, 0)) for place in ends])
        while any(reached[place] < end for place, end in ends.items()):
            if time.monotonic() > deadline:
                hidden = [f"{topic}-{number}" for (topic, number), end in ends.items() if reached[topic, number] < end]
                raise AssertionError(f"an open transaction hides records of {', '.join(hidden)}")
            for message in consumer.consume(1000, timeout=0.1):
                error = message.error()
                place = (str(message.topic()), _number(message.partition()))
                offset = _number(message.offset())
                if error is None:
                    reached[place] = offset + 1
                    yield _landed(message)
                elif error.code() == KafkaError._PARTITION_EOF:
                    # The one sign of having passed what is no record: control marks and what was aborted.
                    reached[place] = offset
                else:
                    raise KafkaException(error)
    finally:
        consumer.close()


def _ends(bootstrap_servers: str, topics: Iterable[str], seconds: float) -> dict[tuple[str, int], int]:
    consumer = _consumer(bootstrap_servers, "read_uncommitted")
    try:
        ends: dict[tuple[str, int], int] = {}
        for topic in topics:
            described = consumer.list_topics(topic, timeout=seconds).topics[topic]
            assert described.error is None, f"{topic}: {described.error}"
            for number in described.partitions:
                ends[topic, number] = _end(consumer, TopicPartition(topic, number), seconds)
        return ends
    finally:
        consumer.close()


def _end(consumer: Consumer, place: TopicPartition, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while True:
        try:
            _, end = consumer.get_watermark_offsets(place, timeout=seconds, cached=False)
        except KafkaException as error:
            # Of a topic that was just made, or whose leader has just moved.
            if error.args[0].code() != KafkaError.NOT_LEADER_FOR_PARTITION or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return end


def _consumer(bootstrap_servers: str, isolation_level: str) -> Consumer:
    return Consumer(
        {
            "bootstrap.servers": bootstrap_servers,
            "group.id": "unused",
            "enable.auto.commit": False,
            "isolation.level": isolation_level,
            "enable.partition.eof": True,
            "check.crcs": True,
            "log_level": 2,  # That a broker is away is nothing to be told of.
        }
    )


def _landed(message: Any) -> Landed:
    _, timestamp = message.timestamp()
    return Landed(
        message.topic(),
        message.partition(),
        message.offset(),
        message.key(),
        message.value(),
        tuple((name, value or b"") for name, value in message.headers() or ()),
        timestamp,
    )


def _number(value: int | None) -> int:
    assert value is not None
    return value


# --- What must be true of the two. ---


@dataclass
class Verdict:
    """What is wrong, each fault with the place or the event; empty lists are what is wished for."""

    events: int = 0
    answered: int = 0
    on_topic: int = 0
    missing: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    reordered: list[str] = field(default_factory=list)
    corrupted: list[str] = field(default_factory=list)
    invented: list[str] = field(default_factory=list)

    @property
    def faults(self) -> dict[str, list[str]]:
        """The kinds of fault there are, with the first of each."""
        kinds = ("missing", "doubled", "reordered", "corrupted", "invented")
        return {kind: getattr(self, kind)[:5] for kind in kinds if getattr(self, kind)}

    def __str__(self) -> str:
        return (
            f"{self.events} events sent, {self.answered} answered 200, {self.events - self.answered} unknown, "
            f"{self.on_topic} on topic, {len(self.missing)} missing, {len(self.doubled)} doubled, "
            f"{len(self.reordered)} reordered, {len(self.corrupted)} corrupted, {len(self.invented)} invented"
        )


def judge(
    sent: Sequence[Sent],
    landed: Sequence[Landed],
    *,
    topic: str,
    dead_letter_topic: str | None = None,
    schema_uris: Mapping[str, str] | None = None,
) -> Verdict:
    """
    Compares what was *sent* with what has *landed* on its topics.

    A body that stands in *sent* a second time is a genuine repeat, an event of its own. *schema_uris* are the values of
    `ce_dataschema` by Rocket.Chat type.
    """
    verdict = Verdict(len(sent), sum(event.answered for event in sent), len(landed))
    expected = {id_: (index, event) for index, (id_, event) in enumerate(_with_ids(sent))}
    bodies = {event.value if event.value is not None else event.body: id_ for id_, (_, event) in expected.items()}
    found: dict[str, list[Landed]] = defaultdict(list)
    for record in landed:
        id_ = record.header("ce_id")
        if id_ not in expected and record.value in bodies:
            verdict.corrupted.append(f"{record.place}: ce_id {id_}, not {bodies[record.value]}")
            id_ = bodies[record.value]
        if id_ is None or id_ not in expected:
            verdict.invented.append(f"{record.place}: {id_}")
            continue
        found[id_].append(record)
        event = expected[id_][1]
        wanted_topic = topic if event.reason is None else dead_letter_topic
        faults = list(faults_of(record, event, wanted_topic, id_, schema_uris or {}))
        if faults:
            verdict.corrupted.append(f"{record.place}: {'; '.join(faults)}")
    for id_, (_, event) in expected.items():
        if event.answered and id_ not in found:
            verdict.missing.append(f"{id_} {event.body[:200]!r}")
        if len(found[id_]) > 1:
            verdict.doubled.append(f"{id_} {', '.join(record.place for record in found[id_])}")
    verdict.reordered += _inversions(expected, found)
    return verdict


def id_of(body: bytes, workspace: str = "default") -> str:
    """The id of an event with that body, as it occurs first."""
    return hashlib.sha256(f"{workspace}\n".encode() + body).hexdigest()


def _with_ids(sent: Iterable[Sent]) -> Iterable[tuple[str, Sent]]:
    repeats: Counter[str] = Counter()
    for event in sent:
        id_ = id_of(event.body, event.workspace)
        repeats[id_] += 1
        yield id_ if repeats[id_] == 1 else f"{id_}.{repeats[id_]}", event


def _inversions(expected: Mapping[str, tuple[int, Sent]], found: Mapping[str, list[Landed]]) -> Iterable[str]:
    # Of records that are there twice the first one counts: doubled is a fault of its own.
    firsts = {id_: records[0] for id_, records in found.items() if records}
    chats: dict[tuple[str, bytes | None], list[tuple[int, Landed]]] = defaultdict(list)
    sequences: dict[tuple[str, int], list[tuple[int, Landed]]] = defaultdict(list)
    for id_, record in firsts.items():
        if record.key is not None:
            chats[record.topic, record.key].append((expected[id_][0], record))
        number = record.header("relay_sequence") or ""
        if number.isdecimal():
            sequences[record.topic, record.partition].append((int(number), record))
    for (_, key), of_chat in chats.items():
        if len({record.partition for _, record in of_chat}) > 1:
            yield f"chat {key!r} is on several partitions"
    for what, group in [("sent", group) for group in chats.values()] + [
        ("sequence", group) for group in sequences.values()
    ]:
        group.sort(key=lambda item: (item[1].partition, item[1].offset))
        for (earlier, before), (later, after) in itertools.pairwise(group):
            if later <= earlier:
                yield f"{after.place} after {before.place}: {what} {later} after {earlier}"


def faults_of(
    record: Landed, event: Sent, topic: str | None, id_: str, schema_uris: Mapping[str, str]
) -> Iterable[str]:
    """What of *record* is not as it must be for *event*, which is to be on *topic* under that id."""
    payload = json.loads(event.body)
    key = _key(payload)
    if record.topic != topic:
        yield f"not on {topic}"
    if record.value != (event.body if event.value is None else event.value):
        yield "another value"
    if record.key != (None if key is None else key.encode()):
        yield f"key {record.key!r}"
    if not 0 < record.timestamp <= time.time() * 1000 + 1000:
        yield f"timestamp {record.timestamp}"
    wanted = {
        name: re.escape(value) for name, value in _exact_headers(record, event, payload, id_, schema_uris).items()
    }
    wanted |= {"relay_sequence": r"[1-9]\d*", "relay_received_at": _RFC3339.pattern}
    if event.reason is not None:
        wanted["relay_error_detail"] = r"(?s).+"
    if not schema_uris:
        wanted["ce_dataschema"] = r".*"
    for name, pattern in wanted.items():
        if not re.fullmatch(pattern, record.header(name) or ""):
            yield f"header {name}: {record.header(name)!r}, not {pattern!r}"
    if other := {name for name, _ in record.headers} - set(wanted):
        yield f"unknown headers {sorted(other)}"


def _exact_headers(
    record: Landed, event: Sent, payload: Mapping[str, Any], id_: str, schema_uris: Mapping[str, str]
) -> dict[str, str]:
    key, type_ = _key(payload), _type(payload)
    headers = {
        "ce_specversion": "1.0",
        "ce_id": id_,
        "ce_source": f"/rocketchat/{event.workspace}",
        "ce_type": "chat.rocket.omnichannel." + _TYPES.get(type_, "unknown"),
        "ce_time": _time(payload) or record.header("relay_received_at") or "",
        "content-type": "application/json",
    }
    if key is not None and type_ != "LivechatOfflineMessage":
        headers["ce_subject"] = key
    if type_ in schema_uris:
        headers["ce_dataschema"] = schema_uris[type_]
    if event.reason is not None:
        headers["relay_error_reason"] = event.reason
    return headers


def _type(payload: Mapping[str, Any]) -> str:
    return _text(payload, "type") or ""


def _key(payload: Mapping[str, Any]) -> str | None:
    if _type(payload) == "LivechatOfflineMessage":
        email = _text(payload, "visitor", "email")
        return f"offline:{email.lower()}" if email else None
    return _text(payload, "_id") or None


def _time(payload: Mapping[str, Any]) -> str | None:
    served_at = _text(payload, "servedBy", "ts")
    says = {
        "LivechatSessionStart": _text(payload, "createdAt"),
        "LivechatSessionTaken": served_at,
        "LivechatSessionForwarded": served_at if "oldServedBy" in payload else None,
        "LivechatSession": _text(payload, "closedAt"),
        "Message": _text(payload, "messages", 0, "editedAt") or _text(payload, "messages", 0, "ts"),
        "LivechatOfflineMessage": _text(payload, "sentAt"),
    }
    said = says.get(_type(payload))
    return said if said and _RFC3339.fullmatch(said) else None


def _text(payload: Any, *path: str | int) -> str | None:
    try:
        for step in path:
            payload = payload[step]
    except (KeyError, IndexError, TypeError):
        return None
    return payload if isinstance(payload, str) else None


# --- Where the Java client would put it. ---


def murmur2_partition(key: bytes, partitions: int) -> int:
    """The partition of *key* as the Java client's default partitioner computes it."""
    return (_murmur2(key) & 0x7FFFFFFF) % partitions


def _murmur2(data: bytes) -> int:
    factor, mask = 0x5BD1E995, 0xFFFFFFFF
    value = 0x9747B28C ^ len(data)
    whole = len(data) & ~3
    for start in range(0, whole, 4):
        word = int.from_bytes(data[start : start + 4], "little") * factor & mask
        word = (word ^ word >> 24) * factor & mask
        value = value * factor & mask ^ word
    if whole < len(data):
        value = (value ^ int.from_bytes(data[whole:], "little")) * factor & mask
    value = (value ^ value >> 13) * factor & mask
    return value ^ value >> 15
