"""
The queue of RELAY_ACK=kafka: no disk; an event is answered once Kafka has it on all in-sync replicas.

The same to the handlers and the publisher as spool.Spool. What is lost with the process was never answered 200.
"""

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Sequence

from relay.batch import Entry
from relay.dedupe import DedupeMemory
from relay.errors import KafkaUnavailable, RelayError
from relay.event import Event
from relay.framing import KnownId
from relay.watermark import Run, Watermark

#: Seconds for which a handler waits: less than the sender's patience.
ACK_TIMEOUT = 4.0


class MemoryQueue:
    """Events on their way to Kafka, each with the handler that waits for it."""

    def __init__(self, *, dedupe_seconds: float) -> None:
        self.identity = str(uuid.uuid4())
        #: Events that the broker refused, by sequence, with what it said.
        self.dead: dict[int, str] = {}
        #: No disk: ids live as long as the process.
        self.schema_ids: Sequence[KnownId] = ()
        self._dedupe = DedupeMemory(round(dedupe_seconds * 1000))
        self._runs = [Run(1, self.identity)]
        self._next = 1
        #: By sequence; and which sequence a digest has that is on its way.
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._sequences: dict[bytes, int] = {}
        self._untaken: deque[Entry] = deque()
        self._taken: deque[Entry] = deque()
        self._changed = asyncio.Condition()

    @property
    def depth(self) -> int:
        """How many events are not known to be on Kafka."""
        return len(self._untaken) + len(self._taken)

    @property
    def used_bytes(self) -> int:
        """The bytes of their bodies."""
        return sum(len(event.body) for queue in (self._taken, self._untaken) for _, event in queue)

    @property
    def oldest_age(self) -> float:
        """Seconds since the oldest of them was received."""
        oldest = self._taken or self._untaken
        return max(0.0, time.time() - oldest[0][1].received_at / 1000) if oldest else 0.0

    async def append(self, event: Event) -> bool:
        """
        Returns once Kafka has *event*; False if it was recognised as a retry of one that it has.

        Raises: KafkaUnavailable.
        """
        known = self._sequences.get(event.digest) if self._dedupe.window else None
        if known is None:
            now = _steady_now()
            if self._dedupe.recognises(event, now):
                return False
            self._dedupe.forget(now)
            event = event._replace(occurrence=self._dedupe.occurrence(event, now) if event.repeatable else 1)
            entry = (self._next, event)
            self._next += 1
            self._waiting[entry[0]] = asyncio.get_running_loop().create_future()
            self._sequences[event.digest] = entry[0]
            self._untaken.append(entry)
            await self._notify()
        try:
            async with asyncio.timeout(ACK_TIMEOUT):
                await asyncio.shield(self._waiting[entry[0] if known is None else known])
        except TimeoutError:
            if known is None and entry in self._untaken:
                self._untaken.remove(entry)
                self._settle(entry, KafkaUnavailable())
                await self._notify()
            raise KafkaUnavailable from None
        return known is None

    def _settle(self, entry: Entry, error: RelayError | None = None) -> None:
        sequence, event = entry
        future = self._waiting.pop(sequence)
        if self._sequences.get(event.digest) == sequence:
            del self._sequences[event.digest]
        if error is None:
            self._dedupe.accepted(event, _steady_now())
            future.set_result(None)
        else:
            future.set_exception(error)
            future.exception()  # Retrieved: a retry may wait for it, or nobody.

    def answered(self, event: Event) -> None:
        """Notes that the sender has its answer for *event* in time: an equal body is no retry from now on."""
        self._dedupe.answered(event)

    async def probe(self) -> RelayError | None:
        """Why an event cannot be taken now, if it cannot."""
        return None

    async def wait(self, count: int = 1) -> None:
        """Returns when *count* events can be taken."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._untaken) >= count)

    async def take(self, max_events: int, max_bytes: int) -> list[Entry]:
        """The next events in sequence, each given once."""
        entries: list[Entry] = []
        size = 0
        while self._untaken and len(entries) < max_events and size < max_bytes:
            entry = self._untaken.popleft()
            entries.append(entry)
            size += len(entry[1].body)
        self._taken.extend(entries)
        return entries

    def published(self, sequence: int) -> None:
        """Every event up to *sequence* is on Kafka: their handlers may answer."""
        while self._taken and self._taken[0][0] <= sequence:
            entry = self._taken.popleft()
            error = self.dead.get(entry[0])
            self._settle(entry, None if error is None else KafkaUnavailable(error))
        asyncio.ensure_future(self._notify())  # noqa: RUF006 - it has nothing to wait for

    async def bury(self, entry: Entry, error: str) -> None:
        """Notes that the broker refuses an event for itself; there is no disk to keep it on."""
        self.dead[entry[0]] = error

    async def remember(self, ids: Sequence[KnownId], *, forget: str | None = None) -> None:
        """Nothing is kept."""

    def watermark(self, sequence: int) -> Watermark:
        """What to write to Kafka with the events up to *sequence*."""
        return Watermark.at(sequence, self._runs)

    def resume(self, watermark: Watermark | None) -> int:
        """Up to which sequence events are on Kafka, after *watermark* was found there."""
        return watermark.covers(self._runs) if watermark else 0

    async def drained(self) -> None:
        """Returns when every event is on Kafka."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self.depth)

    async def close(self) -> None:
        """Nothing is kept."""

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


def _steady_now() -> int:
    return round(time.monotonic() * 1000)
