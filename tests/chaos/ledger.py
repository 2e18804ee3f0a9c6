"""
What was sent, what was answered, what has landed: judged as it lands, and kept in little memory however long it takes.

The oracle says what a record must look like; the ledger holds each record against its event, and forgets all of an
event but eight bytes once it has landed and its sender is done with it. Any thread may call it.
"""

import array
import bisect
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from oracle import Landed, Sent, faults_of, id_of, murmur2_partition

#: Events that may repeat byte for byte: if an answer is lost on its way, its retry is taken for one of those.
_REPEATABLE = frozenset(
    f"chat.rocket.omnichannel.{name}" for name in ("session.queued", "session.edited", "lead.captured", "unknown")
)
_EXAMPLES = 20
_FRAME = 5
_DIGEST = 8
#: Longer than any fault holds up what was accepted.
_LATE_SECONDS = 600.0


class Chat:
    """One chat, whose events are sent one after the other."""

    __slots__ = ("landed", "sent")

    def __init__(self) -> None:
        self.sent = 0
        #: The last of its events that has landed.
        self.landed = -1


class Event:
    """One event and what became of it. Its position is its place in its chat."""

    __slots__ = (
        "answered_at", "chat", "done", "failed_tries", "landed", "landings", "large", "may_double", "position",
        "reason", "sent_at",
    )  # fmt: skip

    def __init__(self, chat: Chat, position: int, reason: str | None, large: bytes | None) -> None:
        self.chat = chat
        self.position = position
        self.reason = reason
        #: The body, if the broker may refuse it for its size.
        self.large = large
        self.sent_at = time.monotonic()
        self.answered_at: float | None = None
        #: Whether its sender is done with it.
        self.done = False
        #: Tries of which nobody knows what came of them.
        self.failed_tries = 0
        self.landed = 0
        #: How often each occurrence has.
        self.landings: dict[str, int] = {}
        self.may_double = False


class Layout(NamedTuple):
    """Where events go, and how their records look."""

    topic: str
    dead_letter_topic: str
    partitions: int
    schema_uris: Mapping[str, str]
    #: Whether values name their schema by an id before the body.
    framed: bool


class Ledger:
    """All events of a run. What is wrong is in `faults`, what a fault's limit allowed in `excused`."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._lock = threading.Lock()
        self._live: dict[str, Event] = {}
        #: Of each time that events were retired, eight bytes of their ids, sorted.
        self._retired: list[array.array[int]] = []
        self.sent = self.accepted = self.published = 0
        #: How many of a kind of fault, and the first few of each.
        self.faults: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = defaultdict(list)
        self.excused: Counter[str] = Counter()
        #: Those that were announced as refused by the broker.
        self._refused: set[str] = set()
        #: Schema ids by `ce_type`, as they were read.
        self.schema_ids: dict[str, int] = {}
        #: Seconds by which the relay's clock has been ahead.
        self.clock_ahead = 0.0

    # --- For the senders. ---

    def send(self, chat: Chat, body: bytes, *, reason: str | None = None, large: bool = False) -> Event:
        """An event that is about to be sent; *large* if the broker may refuse it for its size."""
        with self._lock:
            event = Event(chat, chat.sent, reason, body if large else None)
            chat.sent += 1
            self.sent += 1
            assert id_of(body) not in self._live, "no two bodies are the same"
            self._live[id_of(body)] = event
            return event

    def answered(self, event: Event) -> None:
        """A try was answered 200: the event must land."""
        with self._lock:
            event.answered_at = time.monotonic()
            event.done = True
            self.accepted += 1

    def failed(self, event: Event) -> None:
        """A try was not answered 200, and what came of it is not known."""
        event.failed_tries += 1

    def gave_up(self, event: Event) -> None:
        """There are no more tries: the event may land or not."""
        event.done = True

    def blame(self, kind: str, what: str) -> None:
        """Notes a fault."""
        self.faults[kind] += 1
        if len(self.examples[kind]) < _EXAMPLES:
            self.examples[kind].append(what)

    # --- For faults with limits. ---

    def excuse_doubled(self) -> None:
        """Events whose sender is not done now may land twice: another relay may have taken an earlier try."""
        with self._lock:
            for event in self._live.values():
                if not event.done:
                    event.may_double = True

    # --- For what lands. ---

    def land(self, records: Iterable[Landed]) -> None:
        """Judges records, which must come in the order of their offsets."""
        for record in records:
            with self._lock:
                self._land(record)

    def _land(self, record: Landed) -> None:
        self.published += 1
        id_ = record.header("ce_id") or ""
        base, _, occurrence = id_.partition(".")
        body = self._body(record)
        event = self._live.get(base)
        announced = event is not None and event.large is not None and record.topic == self._layout.dead_letter_topic
        if not announced and id_of(body) != base:
            known = event or self._live.get(id_of(body)) or self._was_retired(base) or self._was_retired(id_of(body))
            self.blame("corrupted" if known else "invented", f"{record.place}: ce_id {id_}, value {body[:200]!r}")
            return
        if event is None:
            kind = "duplicated" if self._was_retired(base) else "invented"
            self.blame(kind, f"{record.place}: {id_} {body[:200]!r}")
            return
        if announced:
            assert event.large is not None
            body = event.large
        self._judge(record, event, body, id_, announced=announced)
        self._count(record, event, occurrence)

    def _judge(self, record: Landed, event: Event, body: bytes, id_: str, *, announced: bool) -> None:
        layout = self._layout
        reason = "rejected_by_kafka" if announced else event.reason
        wanted = Sent(body, reason=reason, value=b"{}" if announced else record.value)
        topic = layout.topic if reason is None else layout.dead_letter_topic
        if self.clock_ahead:
            now = int(time.time() * 1000)
            if now < record.timestamp <= now + self.clock_ahead * 1000:
                record = record._replace(timestamp=now)
        wrong = list(faults_of(record, wanted, topic, id_, layout.schema_uris))
        if record.topic == layout.topic and record.key is not None:
            place = murmur2_partition(record.key, layout.partitions)
            if record.partition != place:
                wrong.append(f"on partition {record.partition}, not {place}")
        if layout.framed and reason is None:
            wrong += self._frame_faults(record)
        if wrong:
            self.blame("corrupted", f"{record.place}: {'; '.join(wrong)}")

    def _count(self, record: Landed, event: Event, occurrence: str) -> None:
        event.landed += 1
        times = event.landings[occurrence] = event.landings.get(occurrence, 0) + 1
        if event.landed > 1:
            repeatable = record.header("ce_type") in _REPEATABLE
            if repeatable and times == 1 and occurrence == str(len(event.landings)) and self._may_repeat(event):
                self.excused["repeat"] += 1
            elif event.may_double and times == 2:
                # Of a repeat, too, each of two relays may have taken a try.
                self.excused["doubled"] += 1
            else:
                self.blame("duplicated", f"{record.place}: {record.header('ce_id')}, {event.landed} times")
            return
        if occurrence:
            self.blame("corrupted", f"{record.place}: the first of its kind is {record.header('ce_id')}")
        if event.large is not None and record.topic == self._layout.dead_letter_topic:
            self.excused["too large"] += 1
            self._refused.add(record.header("ce_id") or "")
        if record.topic != self._layout.topic:
            return
        # An event without an answer may come late: its last try may still have been under way when the next was sent.
        if event.position < event.chat.landed and event.answered_at is not None:
            self.blame("reordered", f"{record.place}: event {event.position} of its chat after {event.chat.landed}")
        event.chat.landed = max(event.chat.landed, event.position)

    @staticmethod
    def _may_repeat(event: Event) -> bool:
        return len(event.landings) <= event.failed_tries + 1

    def _body(self, record: Landed) -> bytes:
        value = record.value or b""
        return value[_FRAME:] if self._layout.framed and record.topic == self._layout.topic else value

    def _frame_faults(self, record: Landed) -> Iterable[str]:
        value, type_ = record.value or b"", record.header("ce_type") or ""
        id_ = int.from_bytes(value[1:_FRAME], "big")
        if value[:1] != b"\0" or id_ != self.schema_ids.setdefault(type_, id_):
            yield f"framed as {value[:_FRAME]!r}, not by {self.schema_ids.get(type_)}"

    def _was_retired(self, id_: str) -> bool:
        try:
            digest = _short(id_)
        except ValueError:
            return False
        places = ((bisect.bisect_left(ids, digest), ids) for ids in self._retired)
        return any(place < len(ids) and ids[place] == digest for place, ids in places)

    # --- What is still to come. ---

    def missing(self, answered_before: float) -> list[str]:
        """The ids of those that were answered before a time (monotonic) and have not landed."""
        with self._lock:
            return [
                id_
                for id_, event in self._live.items()
                if not event.landed and event.answered_at is not None and event.answered_at < answered_before
            ]

    def keep(self, bodies: Iterable[bytes]) -> None:
        """These bodies are kept as dead: all that were announced as refused must be among them."""
        for id_ in self._refused - {id_of(body) for body in bodies}:
            self.blame("missing", f"{id_}: announced as dead, and its body is not kept")

    def close(self) -> None:
        """Nothing lands any more: what is still missing is lost."""
        for id_ in self.missing(time.monotonic()):
            self.blame("missing", id_)

    def retire(self) -> None:
        """
        Forgets of events that have landed and whose senders are done all but that there was one.

        Not yet of those with a try that failed: what came of that one may still land, as a repeat.
        """
        since = time.monotonic() - _LATE_SECONDS
        with self._lock:
            done = [
                id_
                for id_, event in self._live.items()
                if event.done and event.landed and not (event.failed_tries and event.sent_at > since)
            ]
            self._retired.append(array.array("Q", sorted(_short(id_) for id_ in done)))
            for id_ in done:
                del self._live[id_]


def _short(id_: str) -> int:
    return int(id_[: 2 * _DIGEST], 16)
