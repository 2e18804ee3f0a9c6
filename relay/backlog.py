"""
What is stored and not yet on Kafka, in sequence, for one publisher.

From memory while the publisher keeps up; from the file after a start or when it is behind, so that memory is bounded
whatever the backlog. Belongs to the event loop's thread; only the reading itself is done in another.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from relay.batch import Entry
from relay.event import Event
from relay.spool_file import Progress
from relay.store import Store

#: Bodies kept in memory for the publisher; beyond it reads them from the file.
MEMORY_BYTES = 4 << 20


class Backlog:
    """The events from the first that is not known to be on Kafka."""

    def __init__(self, store: Store, progress: Progress) -> None:
        self._store = store
        # What is beyond _cursor and up to _disk_last is in the file, what follows in _memory; while _memory is shut,
        # everything is in the file.
        self._cursor = progress.published
        self._disk_last = progress.last_sequence
        self._memory: deque[Entry] = deque()
        self._memory_bytes = 0
        self._memory_shut = False
        self._untaken = progress.pending_events
        self._taken: deque[Entry] = deque()
        self._oldest_received_at = progress.oldest_received_at or 0
        self._wanted = 0
        self._arrived: asyncio.Future[None] | None = None
        self._drained: asyncio.Future[None] | None = None

    @property
    def depth(self) -> int:
        """How many events there are."""
        return self._untaken + len(self._taken)

    @property
    def oldest_age(self) -> float:
        """Seconds since the oldest of them was received; of those in the file at least that."""
        if not self.depth:
            return 0.0
        if self._taken:
            self._oldest_received_at = self._taken[0][1].received_at
        elif self._memory and self._cursor >= self._disk_last:
            self._oldest_received_at = self._memory[0][1].received_at
        return max(0.0, time.time() - self._oldest_received_at / 1000)

    def add(self, entries: Sequence[Entry]) -> None:
        """Takes up events that have just been stored."""
        if not self.depth:
            self._oldest_received_at = entries[0][1].received_at
        self._keep(entries)
        self._untaken += len(entries)
        if self._arrived and not self._arrived.done() and self._untaken >= self._wanted:
            self._arrived.set_result(None)

    def _keep(self, entries: Sequence[Entry]) -> None:
        if not self._memory_shut:
            self._memory.extend(entries)
            self._memory_bytes += sum(len(event.body) for _, event in entries)
            if self._memory_bytes <= MEMORY_BYTES:
                return
            self._memory_shut = True
            self._memory.clear()
            self._memory_bytes = 0
        self._disk_last = entries[-1][0]

    async def wait(self, count: int) -> None:
        """Returns when *count* events can be taken. For one caller at a time."""
        while self._untaken < count:
            self._wanted = count
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived

    async def take(self, max_events: int, max_bytes: int) -> list[Entry]:
        """
        The next events in sequence, each given once: about as many as the limits say; empty if there are none.

        Raises: SpoolFailed.
        """
        if self._cursor < self._disk_last:
            if self._memory_shut and self._disk_last - self._cursor <= max_events:
                self._memory_shut = False  # Nearly caught up: what comes from now on fits into memory.
            before = None if self._memory_shut else self._disk_last + 1
            entries = await asyncio.to_thread(self._store.read, self._cursor, before, max_events, max_bytes)
        else:
            entries = self._take_from_memory(max_events, max_bytes)
        if entries:
            self._cursor = entries[-1][0]
            self._untaken -= len(entries)
            self._taken.extend(entries)
        return entries

    def _take_from_memory(self, max_events: int, max_bytes: int) -> list[Entry]:
        entries: list[Entry] = []
        size = 0
        while self._memory and len(entries) < max_events and size < max_bytes:
            entry = self._memory.popleft()
            size += len(entry[1].body)
            entries.append(entry)
        self._memory_bytes -= size
        return entries

    def published(self, sequence: int) -> list[Event]:
        """Every event up to *sequence* is on Kafka; returns those of which that is news."""
        events: list[Event] = []
        while self._taken and self._taken[0][0] <= sequence:
            _, event = self._taken.popleft()
            self._oldest_received_at = event.received_at
            events.append(event)
        if self._drained and not self._drained.done() and not self.depth:
            self._drained.set_result(None)
        return events

    async def drained(self) -> None:
        """Returns when there are no events. For one caller at a time."""
        while self.depth:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained
