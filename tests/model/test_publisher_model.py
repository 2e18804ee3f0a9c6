"""
The publisher and the real spool against the promise: every event once and in order, whatever Kafka and crashes do.

Kafka is a script: what becomes of each transaction and of each start is drawn at random. Refused events are dead, and
announced in their place. `pytest --hypothesis-profile=long --timeout=0` looks on.
"""

import asyncio
import itertools
import json
import os
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, TypeVar
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from prometheus_client import CollectorRegistry
from spool_moments import copy_spool

from relay import publisher as publisher_module
from relay import spool as spool_module
from relay.errors import Fenced, KafkaLost, KafkaTimeout, KafkaUnreachable, RecordsRefused, TopicsMissing
from relay.event import Delivery, Event
from relay.metrics import Metrics
from relay.publisher import Publisher
from relay.record import Record, RecordMaker, Topics
from relay.spool import Spool
from relay.store import Change, Store
from relay.watermark import Watermark

T = TypeVar("T")
#: Where there is one, a disk in memory: thousands of fsyncs, of which nothing here depends.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
ANNOUNCEMENT = b"{}"
POISON = b"poison"
#: How often an event must be refused alone to be dead.
TWICE = 2

Fate = Literal["committed", "not committed", "committed, untold", "committed late", "fenced", "refused"]
fates = st.lists(
    st.sampled_from(["committed", "not committed", "committed, untold", "committed late", "fenced", "refused"]),
    max_size=8,
)
start_faults = st.lists(st.sampled_from([None, KafkaUnreachable, KafkaTimeout, Fenced, TopicsMissing]), max_size=5)
#: Whether each of some events is one that the broker refuses.
arrivals = st.lists(st.sampled_from([False, False, False, True]), min_size=1, max_size=12)


async def nothing() -> None:
    """The default of what happens at a moment."""


class ScriptedKafka:
    """A cluster with one spool's watermark: what is committed, and what becomes of what comes next."""

    def __init__(self) -> None:
        self.committed: list[Record] = []
        self.watermark: Watermark | None = None
        self.fates: deque[Fate] = deque()
        self.start_faults: deque[type[KafkaLost] | None] = deque()
        #: By their ids, how often events and announcements were refused with nothing else in their transaction.
        self.refused_alone: Counter[bytes] = Counter()
        self.announcements_refused_alone: Counter[bytes] = Counter()
        #: Awaited before and after each commit.
        self.at_a_moment: Callable[[], Awaitable[None]] = nothing
        self.epoch = 0
        #: In how many batches, event by event in turn, records are written; 0: a refusal does not say which it was.
        self.partitions = 0
        self._late: tuple[Sequence[Record], Watermark] | None = None

    def connect(self) -> "ScriptedProducer":
        return ScriptedProducer(self)

    def batches(self, count: int) -> list[range]:
        """The places of so many records, batch by batch."""
        return [range(partition, count, self.partitions) for partition in range(min(self.partitions, count))]

    def commit(self, records: Sequence[Record], watermark: Watermark) -> None:
        self.committed += records
        self.watermark = watermark

    def commit_late(self, records: Sequence[Record], watermark: Watermark) -> None:
        self._late = (records, watermark)

    def begin_epoch(self) -> int:
        """Ends the transaction that a former producer left: nothing is open from then on."""
        if self._late is not None:
            self.commit(*self._late)
            self._late = None
        self.epoch += 1
        return self.epoch


class ScriptedProducer:
    """A producer of that cluster, which must never be used again after its first error."""

    spent = False
    transactional = True

    def __init__(self, kafka: ScriptedKafka) -> None:
        self._kafka = kafka
        self._epoch: int | None = None
        self._used_up = False

    async def start(self) -> Watermark | None:
        assert self._epoch is None, "started twice"
        await asyncio.sleep(0)
        if self._kafka.start_faults and (fault := self._kafka.start_faults.popleft()):
            raise fault
        self._epoch = self._kafka.begin_epoch()
        return self._kafka.watermark

    async def publish(self, records: Sequence[Record], watermark: Watermark) -> None:
        assert self._epoch is not None, "used before its start"
        assert not self._used_up, "used again after an error"
        self._used_up = True
        kafka = self._kafka
        await asyncio.sleep(0)
        fate = kafka.fates.popleft() if kafka.fates else "committed"
        if self._epoch != kafka.epoch or fate == "fenced":
            raise Fenced
        poisonous = poisonous_at(range(len(records)), records)
        if fate == "committed late" and not poisonous:
            kafka.commit_late(records, watermark)
        await kafka.at_a_moment()
        if fate == "refused" or poisonous:
            if len(records) == 1:
                announced = records[0].value == ANNOUNCEMENT
                refusals = kafka.announcements_refused_alone if announced else kafka.refused_alone
                refusals[header(records[0], "ce_id")] += 1
            refusal = RecordsRefused()
            refusal.batches = [batch for batch in kafka.batches(len(records)) if poisonous_at(batch, records)]
            raise refusal
        if fate in ("committed", "committed, untold"):
            kafka.commit(records, watermark)
            await kafka.at_a_moment()
        if fate != "committed":
            raise KafkaTimeout
        self._used_up = False

    async def try_partition(self, _: Record) -> None:
        assert not self._used_up, "used again after an error"
        self._used_up = True

    async def close(self) -> None:
        self._used_up = True


def poisonous_at(places: Sequence[int], records: Sequence[Record]) -> bool:
    return any(POISON in records[place].value for place in places)


def sequence_of(record: Record) -> int:
    return int(header(record, "relay_sequence"))


def header(record: Record, name: str) -> bytes:
    return dict(record.headers)[name]


class PublisherModel(RuleBasedStateMachine):
    """Each rule lets something happen; whenever all is published, what is on Kafka is compared with what was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.runner = self.stack.enter_context(asyncio.Runner())
        self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY)))
        #: Held while the spool's file is written.
        self.writing = threading.Lock()
        write = Store.write

        def locked_write(store: Store, change: Change) -> int:
            with self.writing:
                return write(store, change)

        for owner, name, value in (
            (Store, "write", locked_write),
            (spool_module, "COMMIT_INTERVAL", 0.0),
            (spool_module, "TRIM_SECONDS", 0.001),
            (publisher_module, "MAX_EVENTS", 6),
            (publisher_module, "INTERVAL", 0.0),
            (publisher_module, "REST", 0.0),
            (publisher_module, "FIRST_BACKOFF", 0.0001),
            (publisher_module, "MAX_BACKOFF", 0.0002),
        ):
            self.stack.enter_context(patch.object(owner, name, value))
        self.kafka = ScriptedKafka()
        self.numbers = itertools.count(1)
        self.sent: list[Event] = []
        #: The records before this place were of a spool whose dead went with its disk.
        self.dead_from = 0
        self.task: asyncio.Task[None] | None = None

    # --- Its life. ---

    @initialize()
    def first_start(self) -> None:
        self.start(self.new_directory() / "relay.db")

    def start(self, path: Path) -> None:
        self.path = path
        self.do(self.started())

    async def started(self) -> None:
        metrics = Metrics(CollectorRegistry())
        self.spool = await Spool.open(self.path, max_bytes=1 << 24, dedupe_seconds=300, metrics=metrics)
        records = RecordMaker(Topics("events", "dead"), lambda _: None)
        self.task = asyncio.create_task(Publisher(self.spool, self.kafka.connect, records, metrics).run())

    def stop(self) -> None:
        self.do(self.stopped())

    async def stopped(self) -> None:
        assert self.task
        self.task.cancel()
        await asyncio.wait([self.task])
        task, self.task = self.task, None
        await self.spool.close()
        assert task.cancelled(), "the publisher had ended"

    @rule()
    def restart(self) -> None:
        self.stop()
        self.start(self.path)

    @rule(arrivals=arrivals, fates=fates, moment=st.integers(0, 12))
    def crash(self, arrivals: list[bool], fates: list[Fate], moment: int) -> None:
        """At some moment before or after a commit, or once all is published."""
        self.kafka.fates.extend(fates)
        self.start(self.do(self.crashed(arrivals, moment)))

    async def crashed(self, arrivals: list[bool], moment: int) -> Path:
        copies: list[Path] = []
        moments_left = itertools.count(moment, -1)

        async def die() -> None:
            if next(moments_left) == 0:
                copies.append(self.copied())
                await asyncio.Event().wait()

        await self.arrived(arrivals)
        self.kafka.at_a_moment = die
        while self.spool.depth and not copies:  # noqa: ASYNC110 - either of the two
            await asyncio.sleep(0.0005)
        self.kafka.at_a_moment = nothing
        path = copies[0] if copies else self.copied()
        await self.stopped()
        return path

    @rule(later=arrivals)
    def the_disk_is_restored_from_a_copy(self, later: list[bool]) -> None:
        copy = self.copied()
        self.arrive(later)
        self.drain()
        self.stop()
        self.dead_from = len(self.kafka.committed)
        self.start(copy)

    @rule()
    def the_watermark_is_lost(self) -> None:
        """With its topic, while the spool itself knows how far it came."""
        self.drain()
        self.stop()
        self.kafka.watermark = None
        self.start(self.path)

    def teardown(self) -> None:
        with self.stack:
            if self.task is not None:
                try:
                    self.drain()
                finally:  # The spool's thread would outlive the test.
                    self.stop()

    # --- What happens meanwhile. ---

    @rule(arrivals=arrivals)
    def arrive(self, arrivals: list[bool]) -> None:
        self.do(self.arrived(arrivals))

    async def arrived(self, arrivals: list[bool]) -> None:
        events = [self.event(poisonous) for poisonous in arrivals]
        assert all(await asyncio.gather(*(self.spool.append(event) for event in events)))
        self.sent += events

    @rule(fates=fates, start_faults=start_faults)
    def trouble_is_ahead(self, fates: list[Fate], start_faults: list[type[KafkaLost] | None]) -> None:
        self.kafka.fates.extend(fates)
        self.kafka.start_faults.extend(start_faults)

    @rule(partitions=st.integers(0, 4))
    def records_are_spread(self, partitions: int) -> None:
        self.kafka.partitions = partitions

    @rule()
    def drain(self) -> None:
        async def drained() -> None:
            while self.spool.depth:
                assert self.task
                assert not self.task.done()
                await asyncio.sleep(0.0005)

        self.do(drained())
        committed = self.kafka.committed
        there = {header(record, "ce_id") for record in committed}
        untold = {id_ for id_, times in self.kafka.announcements_refused_alone.items() if times >= TWICE} - there
        sent = [event for event in self.sent if event.id.encode() not in untold]
        assert [header(record, "ce_id").decode() for record in committed] == [event.id for event in sent]
        announced = [place for place, record in enumerate(committed) if record.value == ANNOUNCEMENT]
        assert all(
            record.value == event.body or place in announced
            for place, (record, event) in enumerate(zip(committed, sent, strict=True))
        )
        assert not [event for place, event in enumerate(sent) if POISON in event.body and place not in announced]
        dead = {header(committed[place], "ce_id") for place in announced} | untold
        assert all(self.kafka.refused_alone[id_] >= TWICE for id_ in dead)
        kept = {sequence_of(committed[place]) for place in announced if place >= self.dead_from}
        assert kept <= set(self.spool.dead)

    # --- Helpers. ---

    def do(self, work: Awaitable[T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(20):
                return await work

        return self.runner.run(bounded())

    def new_directory(self) -> Path:
        return self.directory / str(next(self.numbers))

    def copied(self) -> Path:
        """The spool as it would be after a crash now."""
        with self.writing:
            return copy_spool(self.path, self.new_directory())

    def event(self, poisonous: bool) -> Event:
        text = POISON.decode() if poisonous else "harmless"
        payload = {"_id": "chat", "type": "Message", "number": next(self.numbers), "text": text}
        return Event.of(Delivery("default", json.dumps(payload).encode(), 0), payload)


TestPublisherModel = PublisherModel.TestCase
