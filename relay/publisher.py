"""
The loop from the spool to Kafka: one task, one cycle after the other, one way out of every error.

A cycle publishes the next events with their watermark, all or nothing. After any error the producer is closed, and the
next one says how far the events really came. What the loop holds in hand it tries again, so that order is kept.
Knows neither SQL nor Kafka: it takes from a Source and gives to what *connect* makes.

Longer than other modules: what follows an error must be seen beside what led to it.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Protocol

from relay.batch import Entry
from relay.errors import Fenced, KafkaLost, KafkaTimeout, RecordsRefused, RelayError
from relay.event import DeadLetterReason, Event
from relay.metrics import Metrics
from relay.record import Record, RecordMaker
from relay.watermark import Watermark

log = logging.getLogger(__name__)

MAX_EVENTS = 1000
MAX_BYTES = 2 << 20
#: Seconds between two commits under load: the fixed cost of a transaction is shared by what arrives meanwhile.
INTERVAL = 0.2
#: Seconds after a commit in which the broker would make the next transaction wait anyway.
REST = 0.02
#: Seconds of backoff, with jitter, after the first error and at most.
FIRST_BACKOFF, MAX_BACKOFF = 0.05, 5.0
#: That often fenced within so many seconds means that a second relay has the same spool.
_FENCED_TIMES, _FENCED_SECONDS = 3, 60.0


class Source(Protocol):
    """Where the events come from."""

    @property
    def depth(self) -> int:
        """How many events are not known to be on Kafka."""

    #: Events that the broker refused, by sequence, with what it said.
    dead: dict[int, str]

    async def wait(self, count: int = 1) -> None:
        """Returns when *count* events can be taken."""

    async def take(self, max_events: int, max_bytes: int) -> list[Entry]:
        """The next events in sequence, each given once."""

    def published(self, sequence: int) -> None:
        """Every event up to *sequence* is on Kafka."""

    async def bury(self, entry: Entry, error: str) -> None:
        """Keeps an event that the broker refuses for itself."""

    def watermark(self, sequence: int) -> Watermark:
        """What to write to Kafka with the events up to *sequence*."""

    def resume(self, watermark: Watermark | None) -> int:
        """Up to which sequence events are on Kafka, after *watermark* was found there."""


class Producer(Protocol):
    """One connection to Kafka, of no more use after its first error."""

    @property
    def spent(self) -> bool:
        """Whether it must be replaced."""

    @property
    def transactional(self) -> bool:
        """Whether the watermark is written with the records."""

    async def start(self) -> Watermark | None:
        """Connects, and says how far the events came."""

    async def publish(self, records: Sequence[Record], watermark: Watermark) -> None:
        """Writes all or nothing."""

    async def try_partition(self, record: Record) -> None:
        """Looks whether the partition of *record* takes anything at all, and leaves nothing there. Its last act."""

    async def close(self) -> None:
        """Gives the connection up at once."""


class Framer(Protocol):
    """Knows when events can be framed."""

    def settle(self, event: Event) -> Event:
        """*event*, judged anew if the schema that judged it is gone."""

    async def more(self) -> None:
        """Returns when schema ids may have become known."""


class Publisher:
    """Moves events from *source* to Kafka until it is stopped."""

    def __init__(
        self,
        source: Source,
        connect: Callable[[], Producer],
        records: RecordMaker,
        metrics: Metrics,
        framer: Framer | None = None,
    ) -> None:
        """*framer* is that of *records*, if they are framed."""
        self._source = source
        self._connect = connect
        self._records = records
        self._metrics = metrics
        self._framer = framer
        #: Taken and not yet published.
        self._hand: list[Entry] = []
        #: The sequences before which a cycle ends, after those in hand were too much, or one of them was refused.
        self._cuts: set[int] = set()
        #: Whether the last cycle was full: the next one does not wait for more.
        self._behind = False
        #: The sequence that was refused alone, without a word of its size, while Kafka took something else; 0 for none.
        self._suspect = 0
        self._covered = 0
        self._committed_at = -INTERVAL
        self._fenced: deque[float] = deque(maxlen=_FENCED_TIMES + 1)
        self._failures = 0
        #: Set once a producer has started.
        self.started = asyncio.Event()
        #: What keeps the events from Kafka, or none.
        self.last_error: str | None = "not connected yet"
        self._last_label = ""
        #: Whether a producer that started failed before it had published: the next start alone proves nothing.
        self._doubtful = False

    @property
    def connected(self) -> bool:
        """Whether the last thing that was tried with Kafka worked."""
        return self.last_error is None

    async def run(self) -> None:
        """Publishes for ever; ends only by being cancelled."""
        while True:
            try:
                await self._publish_with(self._connect())
            except KafkaLost as error:
                await self._back_off(error)
            except RelayError as error:  # The spool's: it says itself what is wrong.
                await self._back_off(KafkaLost(str(error)))

    async def _publish_with(self, producer: Producer) -> None:
        try:
            await self._start(producer)
            try:
                while not producer.spent:
                    await self._cycle(producer)
            except RelayError as error:
                self._metrics.producer_restarts.inc()
                self._doubtful = not isinstance(error, RecordsRefused)
                raise
        finally:
            await producer.close()

    async def _start(self, producer: Producer) -> None:
        self._covered = await self._resume(producer)
        self._drop_covered()
        if not (self._doubtful and self._hand):
            self._note_connected()

    async def _resume(self, producer: Producer) -> int:
        watermark = await producer.start()
        # Without transactions there is none to be missed.
        return self._source.resume(watermark) if producer.transactional else 0

    def _note_connected(self) -> None:
        if not self.connected:
            log.info(
                "Kafka is connected; %d events wait.",
                self._source.depth,
                extra={"action": "kafka_connected", "events": self._source.depth},
            )
            self.last_error = None
        self._metrics.kafka_connected.set(1)
        self.started.set()

    async def _cycle(self, producer: Producer) -> None:
        if not self._hand:
            await self._pace()
            taken = await self._source.take(MAX_EVENTS, MAX_BYTES)
            self._cuts.clear()
            self._hand = [(sequence, self._records.known(event)) for sequence, event in taken]
            size = sum(len(event.body) for _, event in self._hand)
            self._behind = len(self._hand) >= MAX_EVENTS or size >= MAX_BYTES
            self._drop_covered()
        if not self._hand:
            return
        entries = await self._ready()
        started = time.time()
        records = [self._record(entry) for entry in entries]
        try:
            await producer.publish(records, self._source.watermark(entries[-1][0]))
        except KafkaTimeout:
            # It may have been too much for the time there is.
            self._cuts.add(entries[len(entries) // 2][0])
            raise
        except RecordsRefused as error:
            await producer.close()
            if len(entries) > 1:
                self._cut(error.batches or [range(len(entries))])
            else:
                await self._judge(entries[0], error)
            raise
        self._committed_at = time.monotonic()
        self._failures = 0
        self._doubtful = False
        self._note_connected()
        self._hand = self._hand[len(entries) :]
        self._source.published(entries[-1][0])
        self._count(entries, records, started)

    async def _ready(self) -> list[Entry]:
        """The first in hand, as many as a cycle may hold, whose schema ids are known; waits until there is one."""
        if self._framer is None:
            return self._hand[: self._uncut]
        while True:
            ready = 0
            for place, (sequence, event) in enumerate(self._hand[: self._uncut]):
                if sequence not in self._source.dead and not self._records.ready(event):
                    settled = self._framer.settle(event)
                    if not self._records.ready(settled):
                        break
                    self._hand[place] = (sequence, settled)
                ready += 1
            if ready:
                return self._hand[:ready]
            await self._framer.more()

    @property
    def _uncut(self) -> int:
        """How many of those in hand the next cycle may hold."""
        cuts = (place for place, (sequence, _) in enumerate(self._hand) if place and sequence in self._cuts)
        return next(cuts, len(self._hand)) if self._cuts else len(self._hand)

    def _cut(self, batches: Sequence[Sequence[int]]) -> None:
        # What lies around a refused batch is not refused. The batch itself is halved, down to one event; but first of
        # all its largest is asked for alone, as it is size that brokers refuse.
        for places in batches:
            largest = max(places, key=lambda place: len(self._hand[place][1].body))
            around = {places[0], places[len(places) // 2], places[-1] + 1, largest, largest + 1}
            self._cuts.update(self._hand[place][0] for place in around if place < len(self._hand))

    def _record(self, entry: Entry) -> Record:
        sequence, event = entry
        if sequence in self._source.dead:
            return self._records.refusal(sequence, event, self._source.dead[sequence], _now())
        return self._records.record(sequence, event, _now())

    async def _pace(self) -> None:
        await self._source.wait()
        rest = self._committed_at + INTERVAL - time.monotonic()
        if rest > 0 and not self._behind:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rest):
                    await self._source.wait(MAX_EVENTS)
        await asyncio.sleep(max(0.0, self._committed_at + REST - time.monotonic()))

    def _drop_covered(self) -> None:
        covered = [sequence for sequence, _ in self._hand if sequence <= self._covered]
        if covered:
            self._hand = self._hand[len(covered) :]
            self._source.published(covered[-1])

    async def _judge(self, entry: Entry, error: RecordsRefused) -> None:
        # The broker refused this one alone. It is the event's own fault only if the broker takes something else right
        # after: a watermark that covers nothing new. Unless it spoke of size, something on the event's partition, too;
        # and then the event must be refused a second time.
        sequence = entry[0]
        convicted = error.for_size or sequence == self._suspect
        is_announcement = sequence in self._source.dead
        harmless: list[Record] = []
        probe = self._connect()
        try:
            self._covered = await self._resume(probe)
            if sequence <= self._covered:
                return
            if convicted and not (probe.transactional or is_announcement):
                harmless = [self._records.refusal(*entry, str(error), _now())]
            await probe.publish(harmless, self._source.watermark(self._covered))
            if probe.transactional and not convicted:
                await probe.try_partition(self._record(entry))
        except RecordsRefused as refusal:
            raise KafkaLost(f"Kafka refuses everything there: {refusal}") from refusal
        finally:
            await probe.close()
        self._suspect = 0 if convicted else sequence
        if convicted and is_announcement:
            self._done_with(entry)  # The spool has its body, and the commands and metrics show it.
            said, action = "The announcement of dead event %d is refused: %s", "announcement_refused"
            log.error(said, sequence, error, extra={"action": action, "sequence": sequence})
        elif convicted:
            await self._source.bury(entry, str(error))
            if harmless:  # Which has announced it.
                self._done_with(entry)
                self._count([entry], harmless, time.time())
            said, action = "Event %d is dead: %s Its body stays in the spool.", "event_dead"
            log.error(said, sequence, error, extra={"action": action, "sequence": sequence})

    def _done_with(self, entry: Entry) -> None:
        self._hand = self._hand[1:]
        self._source.published(entry[0])

    async def _back_off(self, error: KafkaLost) -> None:
        self._metrics.publish_failed(error)
        if not isinstance(error, RecordsRefused):
            self._suspect = 0
            self._metrics.kafka_connected.set(0)
            if self.connected or error.label != self._last_label:
                log.warning(
                    "Kafka is lost, events wait: %s",
                    error,
                    extra={"action": "kafka_lost", "error": error.label},
                )
            self.last_error, self._last_label = str(error), error.label
            self._failures = min(self._failures + 1, 10)
        if isinstance(error, Fenced):
            self._note_fenced()
        # As short as can be while refused records are looked for: Kafka itself is well.
        limit = min(MAX_BACKOFF, FIRST_BACKOFF * 2 ** max(0, self._failures - 1))
        await asyncio.sleep(random.uniform(limit / 2, limit))  # noqa: S311

    def _note_fenced(self) -> None:
        self._fenced.append(time.monotonic())
        if len(self._fenced) > _FENCED_TIMES and self._fenced[-1] - self._fenced[0] < _FENCED_SECONDS:
            log.error(
                "A second relay publishes from a copy of this spool: stop one of the two.",
                extra={"action": "fenced"},
            )

    def _count(self, entries: Sequence[Entry], records: Sequence[Record], started: float) -> None:
        metrics = self._metrics
        finished = time.time()
        metrics.publish_duration.observe(finished - started)
        for topic, count in Counter(record.topic for record in records).items():
            metrics.events_published.labels(topic).inc(count)
        for sequence, event in entries:
            metrics.end_to_end_duration.observe(finished - event.received_at / 1000)
            reason = DeadLetterReason.REJECTED_BY_KAFKA if sequence in self._source.dead else event.reason
            if reason is not None:
                metrics.events_dead_lettered.labels(reason).inc()
            elif event.detail is not None:
                metrics.events_invalid.labels(event.type).inc()


def _now() -> int:
    return time.time_ns() // 1_000_000
