"""
The durable queue between the senders and Kafka.

`append` returns once the event is fsynced, in one transaction with all that arrived meanwhile; one thread writes.
`take` gives the events in sequence (backlog.py); what is on Kafka is trimmed in the next append's transaction. All
state but the file belongs to the event loop's thread.

Longer than other modules: what one transaction holds, and what becomes of it, is one story.
"""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from relay.backlog import Backlog
from relay.batch import Entry
from relay.dedupe import DIGEST_BYTES, DedupeMemory, new_repeat
from relay.errors import RelayError, SpoolFailed, SpoolFull
from relay.event import Event
from relay.framing import KnownId
from relay.metrics import Metrics
from relay.store import Change, Store
from relay.watermark import History, Watermark

log = logging.getLogger(__name__)

#: Seconds from one commit to the next under load: its fixed cost, some 100 us of CPU, is shared by what arrives
#: meanwhile. The first event after a pause does not wait.
COMMIT_INTERVAL = 0.002
#: Seconds until what is published is trimmed, if no append comes by to do it.
TRIM_SECONDS = 1.0
#: Seconds between two looks, whether or not events arrive, at what the dedupe window leaves behind and what of the file
#: can be given back.
TIDY_SECONDS = 60.0
#: About how many bytes of dead events are taken up at once: a commit stays short, and memory bounded.
REQUEUE_BYTES = 1 << 20
#: What a probe writes beyond the body of the event that was refused: that one had more pages to touch.
_PROBE_SLACK = 16 << 10
#: Shares of the limit at which a filling spool is logged, and at which it counts as emptying again.
_FILLING, _EMPTYING = 0.8, 0.5


class _Commit(asyncio.Future[None]):
    """What is written together; done when it is durable. Shared by all its events' handlers."""

    def __init__(self) -> None:
        super().__init__()
        self.change = Change()

    def cancel(self, msg: object = None) -> bool:  # noqa: ARG002
        # One handler that is cancelled must not take the others with it.
        return False


class Spool:
    """The durable queue. Made by `open`."""

    def __init__(self, store: Store, *, max_bytes: int, dedupe_seconds: float, metrics: Metrics) -> None:
        self._loop = asyncio.get_running_loop()
        self._store = store
        self._metrics = metrics
        self._max_bytes = max_bytes
        self._dedupe = DedupeMemory(round(dedupe_seconds * 1000))
        # Wall time that no one can set: retries are told by how long ago the first try was.
        self._clock_offset = time.time() - time.monotonic()
        oldest = self._steady_now() - self._dedupe.window
        contents = store.contents(oldest)
        self._dedupe.restore(store.digests(oldest), contents.repeats, self._steady_now())
        #: Names this spool on Kafka.
        self.identity = contents.identity
        #: Events that the broker refused, by sequence, with what it said.
        self.dead = contents.dead
        #: Schema ids as they are kept.
        self.schema_ids: Sequence[KnownId] = contents.schema_ids

        progress = contents.progress
        self._next = progress.last_sequence + 1
        self._total_events = progress.total_events
        self._used_bytes = contents.used_bytes
        self._history = History(contents.runs, self._next)
        self._run_stored = False
        #: Every event up to this sequence is on Kafka.
        self._published_upto = progress.published

        # Writing.
        self._waiting_bytes = 0
        #: The size of an event that was refused.
        self._refused_bytes = 1
        self._waiting: dict[bytes, _Commit] = {}
        self._gathering: _Commit | None = None
        self._writing = self._handing_over = self._trimming = False
        self._handed_over_at = 0.0
        self._failed = False
        self._filling = False
        self._published: int | None = None
        self._digests: list[bytes] = []
        self._trim_timer: asyncio.TimerHandle | None = None
        self._tidy_timer = self._loop.call_later(TIDY_SECONDS, self._tidy)
        self._jobs: queue.SimpleQueue[_Commit | None] = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, name="spool-writer")
        self._writer.start()

        self._backlog = Backlog(store, progress)

    @classmethod
    async def open(cls, path: Path, *, max_bytes: int, dedupe_seconds: float, metrics: Metrics) -> "Spool":
        """
        Opens or makes the spool at *path*.

        Raises: SpoolInUse, SpoolUnusable.
        """
        store = await asyncio.to_thread(Store, path, max_bytes)
        return cls(store, max_bytes=max_bytes, dedupe_seconds=dedupe_seconds, metrics=metrics)

    # --- For the handlers. ---

    async def append(self, event: Event) -> bool:
        """
        Makes *event* durable. Returns False if it was recognised as a retry of one that is.

        Raises: SpoolFull, SpoolFailed. Nothing is stored then.
        """
        if self._dedupe.window:
            if (commit := self._waiting.get(event.digest)) is not None:
                await commit
                return False
            now = self._steady_now()
            if self._dedupe.recognises(event, now):
                return False
            if event.repeatable and (occurrence := self._dedupe.occurrence(event, now)) > 1:
                event = event._replace(occurrence=occurrence)
        size = len(event.body)
        if self._used_bytes + self._waiting_bytes + size > self._max_bytes:
            self._refused_bytes = size
            self._flush()  # What is published may make room.
            raise SpoolFull
        commit = self._gather()
        commit.change.entries.append((self._next, event))
        self._next += 1
        self._waiting_bytes += size
        self._waiting[event.digest] = commit
        await commit
        return True

    def answered(self, event: Event) -> None:
        """Notes that the sender has its answer for *event* in time: an equal body is no retry from now on."""
        if repeat := self._dedupe.answered(event):
            # Not worth an fsync of its own: forgotten in a crash it makes one repeat count as a retry.
            self._gather(hand_over=False).change.repeats[event.digest] = repeat
            self._trim_later()

    async def probe(self) -> RelayError | None:
        """Why an event cannot be stored now, if it cannot."""
        if self._failed:
            commit = self._gather()
            commit.change.probe_bytes = self._refused_bytes + _PROBE_SLACK
            try:
                await commit
            except (SpoolFailed, SpoolFull) as error:
                return error
        # An event like the last one that was refused.
        return SpoolFull() if self._used_bytes + self._refused_bytes > self._max_bytes else None

    # --- For the publisher. ---

    @property
    def depth(self) -> int:
        """How many events are not known to be on Kafka."""
        return self._backlog.depth

    @property
    def used_bytes(self) -> int:
        """How many bytes of the file are in use."""
        return self._used_bytes

    @property
    def oldest_age(self) -> float:
        """Seconds since the oldest of them was received; of a backlog in the file at least that."""
        return self._backlog.oldest_age

    async def wait(self, count: int = 1) -> None:
        """Returns when *count* events can be taken."""
        await self._backlog.wait(count)

    async def take(self, max_events: int, max_bytes: int) -> list[Entry]:
        """
        The next events in sequence, each given once: about as many as the limits say; empty if there are none.

        Raises: SpoolFailed.
        """
        return await self._backlog.take(max_events, max_bytes)

    def published(self, sequence: int) -> None:
        """Every event up to *sequence* is on Kafka: they need not be kept."""
        now = self._steady_now()
        # What was longer in the backlog than the dedupe window lasts need not be remembered any more.
        self._digests += (
            event.digest[:DIGEST_BYTES]
            for event in self._backlog.published(sequence)
            if not event.repeatable and self._dedupe.recognises(event, now)
        )
        self._published_upto = max(self._published_upto, sequence)
        if self._published is None or sequence > self._published:
            self._published = sequence
            self._trim_later()

    async def drained(self) -> None:
        """Returns when every event is on Kafka. For one caller at a time."""
        await self._backlog.drained()

    async def bury(self, entry: Entry, error: str) -> None:
        """
        Puts an event that the broker refuses for itself among the dead, with its body.

        Raises: SpoolFull, SpoolFailed.
        """
        commit = self._gather()
        commit.change.dead.append((entry, error))
        await commit
        self.dead[entry[0]] = error

    async def requeue(self) -> list[int]:
        """
        Puts dead events that an operator wants published after all at the end of the queue, as many as REQUEUE_BYTES
        say; returns the sequences that they had.

        Raises: SpoolFull, SpoolFailed. They are dead as before then.
        """
        requested = await asyncio.to_thread(self._store.requested, REQUEUE_BYTES)
        if requested:
            commit = self._gather()
            for sequence, event in requested:
                commit.change.requeued[self._next] = sequence
                commit.change.entries.append((self._next, event))
                self._next += 1
            await commit
        return [sequence for sequence, _ in requested]

    async def remember(self, ids: Sequence[KnownId], *, forget: str | None = None) -> None:
        """
        Keeps schema ids, in place of all that are kept of the registry *forget*.

        Raises: SpoolFull, SpoolFailed.
        """
        commit = self._gather()
        if forget is not None:
            commit.change.forget_ids_of = forget
            commit.change.schema_ids = [it for it in commit.change.schema_ids if it.registry != forget]
        commit.change.schema_ids = [*commit.change.schema_ids, *ids]
        await commit

    def watermark(self, sequence: int) -> Watermark:
        """What to write to Kafka with the events up to *sequence*."""
        return self._history.watermark(sequence)

    def resume(self, watermark: Watermark | None) -> int:
        """Up to which sequence events are on Kafka, after *watermark* was found there."""
        last = self._next - 1
        if watermark is not None:
            # Sequences stay unique for those who read them on the topics, also if the file was restored from a copy.
            self._next = max(self._next, watermark.sequence + 1)
        return self._history.covered(watermark, self._published_upto, last)

    async def close(self) -> None:
        """Writes what is still to be written, and closes the file."""
        self._tidy_timer.cancel()
        if self._trim_timer:
            self._trim_timer.cancel()
        while self._writing or self._gathering or self._published is not None:
            try:
                await self._gather()
            except RelayError as error:
                log.warning("The spool was closed without its last trim: %s", error, extra={"action": "spool_close"})
                break
        self._jobs.put(None)
        await asyncio.to_thread(self._writer.join)
        self._store.close()

    # --- Writing: one commit is written while the next one gathers. ---

    def _gather(self, *, hand_over: bool = True) -> _Commit:
        commit = self._gathering
        if commit is None:
            commit = self._gathering = _Commit()
        if hand_over and not self._writing:
            self._hand_over_soon()
        return commit

    def _hand_over_soon(self) -> None:
        if self._handing_over:
            return
        self._handing_over = True
        rest = self._handed_over_at + COMMIT_INTERVAL - self._loop.time()
        if rest > 0:
            self._loop.call_later(rest, self._hand_over)
        else:  # Soon, not now: what arrived in this turn of the loop shares the fsync too.
            self._loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        self._handing_over = False
        commit = self._gathering
        if self._writing or commit is None:
            return
        # While writing fails, what is published goes alone, every second time: it makes the room that events may lack.
        apart = self._failed and self._published is not None and bool(commit.change.entries)
        self._trimming = apart and not self._trimming
        if self._trimming:
            commit = _Commit()
        else:
            self._gathering = None
        change = commit.change
        change.accepted_at = now = self._steady_now()
        if self._published is not None and (self._trimming or not apart):
            change.published, self._published = self._published, None
            change.digests, self._digests = b"".join(self._digests), []
        if change.entries:
            self._total_events += len(change.entries)
            change.total_events = self._total_events
            if self._dedupe.window:
                change.repeats.update(
                    (event.digest, new_repeat(event, now)) for event in change.arrived if event.repeatable
                )
            if not self._run_stored:
                change.run = self._history.run
        if not self._trimming:
            change.forget_before = self._dedupe.forget(now)
        self._writing = True
        self._handed_over_at = self._loop.time()
        self._jobs.put(commit)

    def _write(self) -> None:
        while (commit := self._jobs.get()) is not None:
            error: RelayError | None = None
            used_bytes = 0
            started = time.perf_counter()
            try:
                used_bytes = self._store.write(commit.change)
            except RelayError as failure:
                error = failure
            except Exception as failure:  # Without this thread every handler would wait for ever.
                log.exception("The spool's writer failed.", extra={"action": "spool_failed"})
                error = SpoolFailed(f"The spool cannot be written: {failure!r}.")
            took = time.perf_counter() - started
            self._loop.call_soon_threadsafe(self._written, commit, used_bytes, error, took)

    def _written(self, commit: _Commit, used_bytes: int, error: RelayError | None, took: float) -> None:
        change = commit.change
        self._writing = False
        for event in change.arrived:
            self._waiting.pop(event.digest, None)
            self._waiting_bytes -= len(event.body)
        if error is None:
            self._used_bytes = used_bytes
            self._metrics.spool_commit_duration.observe(took)
            self._stored(change)
            commit.set_result(None)
        else:
            self._not_stored(change)
            commit.set_exception(error)
            commit.exception()  # Retrieved: a commit without handlers is nobody's to await.
        if error is not None or change.entries or change.probe_bytes is not None:
            self._note_state(error)
        self._note_filling()
        if self._gathering:
            self._hand_over_soon()

    def _stored(self, change: Change) -> None:
        for event in change.arrived:
            self._dedupe.accepted(event, change.accepted_at)
        for sequence in change.requeued.values():
            del self.dead[sequence]
        if not change.entries:
            return
        self._run_stored = True
        self._backlog.add(change.entries)

    def _not_stored(self, change: Change) -> None:
        self._refused_bytes = max([len(event.body) for event in change.arrived], default=self._refused_bytes)
        self._total_events -= len(change.entries)
        if change.published is not None:
            self._published = max(change.published, self._published or 0)
            self._digests.append(change.digests)
            self._trim_later()
        if answered := self._dedupe.known_answered(change.repeats):
            # The file must know it too: or after a restart a repeat that was refused would be taken for a retry.
            gathering = self._gather(hand_over=False).change
            gathering.repeats = answered | gathering.repeats
            self._trim_later()

    def _note_filling(self) -> None:
        filling = self._used_bytes > self._max_bytes * (_EMPTYING if self._filling else _FILLING)
        if filling != self._filling:
            self._filling = filling
            log.log(
                logging.WARNING if filling else logging.INFO,
                "The spool is %s: %d of %d bytes.",
                "filling" if filling else "emptying",
                self._used_bytes,
                self._max_bytes,
                extra={"action": "spool_filling" if filling else "spool_emptying"},
            )

    def _note_state(self, error: RelayError | None) -> None:
        if (error is not None) != self._failed:
            self._failed = error is not None
            if error is not None:
                log.error("The spool cannot take events: %s", error, extra={"action": "spool_failed"})
            else:
                log.info("The spool takes events again.", extra={"action": "spool_recovered"})

    def _tidy(self) -> None:
        self._tidy_timer = self._loop.call_later(TIDY_SECONDS, self._tidy)
        self._gather()

    def _flush(self) -> None:
        self._trim_timer = None
        self._gather()

    def _trim_later(self) -> None:
        if self._trim_timer is None:
            self._trim_timer = self._loop.call_later(TRIM_SECONDS, self._flush)

    def _steady_now(self) -> int:
        return round((time.monotonic() + self._clock_offset) * 1000)
