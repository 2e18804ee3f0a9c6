"""
The spool against a model of it: random sequences of all that it is asked for, on real files, with a disk that fails
and crashes between any two statements.

The model knows neither transactions nor batches: an event is there once its append has returned True, and after a crash
what was under way has happened as a whole or not at all. `pytest --hypothesis-profile=long --timeout=0` looks on.
"""

import asyncio
import itertools
import json
import os
import sqlite3
import tempfile
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from prometheus_client import CollectorRegistry
from spool_moments import at_each_moment, copy_spool

from relay import backlog as backlog_module
from relay import batch as batch_module
from relay import spool as spool_module
from relay import store as store_module
from relay.batch import Entry
from relay.errors import SpoolFailed, SpoolFull
from relay.event import Delivery, Event
from relay.metrics import Metrics
from relay.spool import Spool
from relay.watermark import Watermark

T = TypeVar("T")
#: Where there is one, a disk in memory: thousands of fsyncs, of which nothing here depends.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
WINDOW = 300.0
#: What is delivered, by type and size: few bodies, so that many deliveries are retries and repeats.
BODIES = [("Message", 0), ("Message", 3_000), ("Message", 60_000), ("LeadCapture", 0), ("LivechatEdit", 2_000)]

bodies = st.integers(0, len(BODIES) - 1)
deliveries = st.lists(bodies, min_size=1, max_size=5)
#: Before which of the statements that follow something happens; the last ones are seldom reached.
moments = st.integers(0, 24)


class Clock:
    """Stands in for the module `time` in spool.py: moves only when it is told to."""

    def __init__(self) -> None:
        self.seconds = 1_764_000_000.0

    def time(self) -> float:
        return self.seconds

    monotonic = perf_counter = time


@dataclass(frozen=True)
class Remembered:
    """What is known of the last event with some body."""

    #: It was accepted no earlier and no later than that: after a restart it may count from when it was trimmed.
    earliest: float
    latest: float
    occurrence: int
    #: Whether its sender has the answer; None where a crash may have made the spool forget that.
    answered: bool | None = False


class SpoolModel(RuleBasedStateMachine):
    """Each rule does something to the spool and to the model, and compares the two."""

    max_bytes = 400_000

    def __init__(self) -> None:
        super().__init__()
        self.stack = ExitStack()
        self.runner = self.stack.enter_context(asyncio.Runner())
        self.directory = Path(self.stack.enter_context(tempfile.TemporaryDirectory(dir=MEMORY)))
        self.clock = Clock()
        for module, name, value in (
            (spool_module, "time", self.clock),
            (spool_module, "COMMIT_INTERVAL", 0.0),
            (spool_module, "TRIM_SECONDS", 3600.0),  # Only with another write: which one, is for the rules to say.
            (backlog_module, "MEMORY_BYTES", 5_000),
            (batch_module, "ROW_BYTES", 4_000),
            (store_module, "_FREE_BYTES", 20_000),
            (store_module, "_LEFT_BYTES", 200_000),
            (store_module, "_WAITING_BYTES", 3_000),
        ):
            self.stack.enter_context(patch.object(module, name, value))
        self.numbers = itertools.count(1)
        self.spool: Spool | None = None

        # The model: every event ever accepted; how many of them were taken since the start, and published.
        self.events: list[Event] = []
        self.taken = self.published = 0
        #: As much of `published` as is surely on disk.
        self.trimmed = 0
        self.remembered: dict[bytes, Remembered] = {}
        self.dead: dict[int, str] = {}
        #: By place in `events`, of those that were ever taken.
        self.sequences: dict[int, int] = {}
        self.watermarks: list[Watermark] = []

    # --- Its life. ---

    @initialize()
    def first_start(self) -> None:
        self.open(self.new_directory() / "relay.db")

    @rule()
    def restart(self) -> None:
        path = self.path
        self.close()
        self.trimmed = self.published
        self.open(path)
        self.compare_files(under_way=[])

    @rule(which=deliveries, moment=moments)
    def crash_while_appending(self, which: list[int], moment: int) -> None:
        crash = Crash(self.path, self.new_directory(), moment)
        with at_each_moment(crash.at_a_moment):
            stored = self.deliver(which)
        if crash.came_too_late:
            self.accept(stored)
            stored = []
        self.accept(self.recover(crash, under_way=stored))

    @precondition(lambda self: self.trimmed < self.published)
    @rule(moment=moments)
    def crash_while_trimming(self, moment: int) -> None:
        crash = Crash(self.path, self.new_directory(), moment)
        with at_each_moment(crash.at_a_moment):
            self.do(self.spool_.remember([]))
        if crash.came_too_late:
            self.trimmed = self.published
        self.recover(crash, under_way=[])

    @precondition(lambda self: self.published < self.taken)
    @rule(moment=moments)
    def crash_while_burying(self, moment: int) -> None:
        crash = Crash(self.path, self.new_directory(), moment)
        sequence = self.sequences[self.published]
        with at_each_moment(crash.at_a_moment):
            self.do(self.spool_.bury((sequence, self.events[self.published]), "refused"))
        dead = self.spool_.dead
        self.recover(crash, under_way=[])
        if crash.came_too_late or sequence in self.spool_.dead:
            self.dead = dead

    def open(self, path: Path) -> None:
        self.path = path
        metrics = Metrics(CollectorRegistry())
        self.spool = self.do(Spool.open(path, max_bytes=self.max_bytes, dedupe_seconds=WINDOW, metrics=metrics))
        self.taken = self.published
        for digest, known in self.remembered.items():
            if known.answered is None or known.occurrence == 1:
                self.remembered[digest] = replace(known, latest=max(known.latest, self.now))

    def recover(self, crash: "Crash", under_way: Sequence[Event]) -> Sequence[Event]:
        """Goes on with what a crash left; returns what was under way if it has happened, all of it."""
        crash.happen()
        self.close()
        for digest, known in self.remembered.items():
            self.remembered[digest] = replace(known, answered=None if known.answered is not False else False)
        self.open(crash.path)
        return self.compare_files(under_way)

    def compare_files(self, under_way: Sequence[Event]) -> Sequence[Event]:
        with closing(sqlite3.connect(f"file:{self.path}?mode=ro", uri=True)) as connection:
            found = [
                received_at
                for (received_at,) in connection.execute(
                    "SELECT received_at FROM events, published WHERE events.sequence > published.sequence"
                    " ORDER BY events.sequence"
                )
            ]
        possible = {
            (mark, len(more)): [event.received_at for event in [*self.events[mark:], *more]]
            for mark in range(self.trimmed, self.published + 1)
            for more in ([], under_way)
        }
        assert found in possible.values()
        (self.published, there) = next(place for place, expected in possible.items() if expected == found)
        self.taken = self.trimmed = self.published
        return under_way[:there]

    def close(self) -> None:
        self.do(self.spool_.close())
        self.spool = None

    def teardown(self) -> None:
        with self.stack:
            if self.spool is not None:
                try:
                    while self.taken < len(self.events):
                        self.take(1000, 1 << 30)
                finally:  # The spool's thread would outlive the test.
                    self.close()

    # --- What handlers do. ---

    @rule(which=deliveries)
    def append(self, which: Sequence[int]) -> None:
        self.accept(self.deliver(which))

    @rule(which=deliveries, moment=moments)
    def append_while_the_disk_fails(self, which: list[int], moment: int) -> None:
        with disk_failing_from(moment):
            self.accept(self.deliver(which))

    def deliver(self, which: Sequence[int]) -> list[Event]:
        """Appends these bodies at once and judges what comes of it; returns the events that were stored."""
        events = [self.event(body) for body in which]
        room = self.room
        return self.judge(events, self.do(self.append_all(events)), room)

    @property
    def room(self) -> int:
        return self.max_bytes - self.spool_.used_bytes

    async def append_all(self, events: Sequence[Event]) -> Sequence[object]:
        spool = self.spool_
        outcomes = await asyncio.gather(*(spool.append(event) for event in events), return_exceptions=True)
        if any(isinstance(outcome, SpoolFull) for outcome in outcomes):
            # That began a trim, whose end nobody waits for.
            await asyncio.gather(spool.remember([]), return_exceptions=True)
        return outcomes

    def judge(self, events: Sequence[Event], outcomes: Sequence[object], room: int) -> list[Event]:
        new: dict[bytes, Event] = {}
        for event, outcome in zip(events, outcomes, strict=True):
            known = self.remembered.get(event.digest)
            if event.digest in new:
                assert outcome is False or isinstance(outcome, SpoolFailed)
            elif outcome is False:
                assert known
                assert self.may_be_retry(event, known)
            else:
                assert known is None or self.may_be_new(event, known)
                assert isinstance(outcome, SpoolFull) is (len(event.body) > room)
                if not isinstance(outcome, SpoolFull):
                    room -= len(event.body)
                    new[event.digest] = event._replace(occurrence=self.occurrence(event, known))
        failed = [outcome for outcome in outcomes if isinstance(outcome, SpoolFailed)]
        assert not (failed and True in outcomes), "one commit, and so one outcome"
        return [] if failed else list(new.values())

    def accept(self, events: Sequence[Event]) -> None:
        for event in events:
            self.events.append(event)
            self.remembered[event.digest] = Remembered(self.now, self.now, event.occurrence)

    def may_be_retry(self, event: Event, known: Remembered) -> bool:
        return known.latest > self.now - WINDOW and not (event.repeatable and known.answered is True)

    def may_be_new(self, event: Event, known: Remembered) -> bool:
        return known.earliest <= self.now - WINDOW or (event.repeatable and known.answered is not False)

    def occurrence(self, event: Event, known: Remembered | None) -> int:
        recent = known is not None and known.earliest > self.now - WINDOW
        return known.occurrence + 1 if known and recent and event.repeatable else 1

    @rule(body=bodies)
    def answered(self, body: int) -> None:
        event = self.event(body)
        self.spool_.answered(event)
        if event.digest in self.remembered:
            self.remembered[event.digest] = replace(self.remembered[event.digest], answered=True)

    @rule(seconds=st.sampled_from([1.0, 30.0, 74.0, 76.0, 150.0, WINDOW - 1, WINDOW, WINDOW + 1]))
    def time_passes(self, seconds: float) -> None:
        self.clock.seconds += seconds

    # --- What the publisher does. ---

    @rule(max_events=st.sampled_from([1, 3, 1000]), max_bytes=st.sampled_from([1, 4_000, 1 << 30]))
    def take(self, max_events: int, max_bytes: int) -> None:
        entries: list[Entry] = self.do(self.spool_.take(max_events, max_bytes))
        there = self.events[self.taken : self.taken + len(entries)]
        assert [event for _, event in entries] == there
        assert entries or self.taken == len(self.events)
        for sequence, _ in entries:
            assert self.sequences.setdefault(self.taken, sequence) == sequence
            self.taken += 1
        given = [self.sequences[place] for place in sorted(self.sequences)]
        assert given == sorted(set(given))

    @precondition(lambda self: self.published < self.taken)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        self.published = data.draw(st.integers(self.published + 1, self.taken))
        sequence = self.sequences[self.published - 1]
        self.watermarks.append(self.spool_.watermark(sequence))
        self.spool_.published(sequence)

    @rule()
    def trim(self) -> None:
        self.do(self.spool_.remember([]))
        self.trimmed = self.published

    @precondition(lambda self: self.published < self.taken)
    @rule()
    def bury(self) -> None:
        entry = (self.sequences[self.published], self.events[self.published])
        self.do(self.spool_.bury(entry, "refused"))
        self.dead[entry[0]] = "refused"

    @precondition(lambda self: self.watermarks)
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        watermark = data.draw(st.sampled_from(self.watermarks))
        assert self.spool_.resume(watermark) == watermark.sequence

    # --- At all times. ---

    @invariant()
    def depth_and_the_dead_are_told(self) -> None:
        if self.spool is not None:
            assert self.spool.depth == len(self.events) - self.published
            assert self.spool.dead == self.dead

    # --- Helpers. ---

    @property
    def spool_(self) -> Spool:
        assert self.spool
        return self.spool

    @property
    def now(self) -> float:
        return self.clock.seconds

    def do(self, work: Awaitable[T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(20):
                return await work

        return self.runner.run(bounded())

    def new_directory(self) -> Path:
        return self.directory / str(next(self.numbers))

    def event(self, body: int) -> Event:
        """A delivery of that body; told from others of the same body by when it was received."""
        type_, size = BODIES[body % len(BODIES)]
        payload = {"_id": "chat", "type": type_, "number": body, "padding": "x" * size}
        return Event.of(Delivery("default", json.dumps(payload).encode(), next(self.numbers)), payload)


@contextmanager
def disk_failing_from(moment: int) -> Iterator[None]:
    """All that is written from the how-manieth statement on fails."""
    countdown = itertools.count(-moment)

    def fail() -> None:
        if next(countdown) >= 0:
            raise sqlite3.OperationalError("disk I/O error")

    with at_each_moment(fail):
        yield


class Crash:
    """The files of a spool as they are before the how-manieth statement from now on."""

    def __init__(self, path: Path, directory: Path, moment: int) -> None:
        self._from = path
        self._directory = directory
        self._statements_left = moment
        self._happened = False
        #: Whether all statements had been executed by then.
        self.came_too_late = True
        self.path = directory / path.name

    def at_a_moment(self) -> None:
        if not self._happened and self._statements_left == 0:
            self.came_too_late = False
            self.happen()
        self._statements_left -= 1

    def happen(self) -> None:
        if not self._happened:
            copy_spool(self._from, self._directory)
            self._happened = True


TestSpoolModel = SpoolModel.TestCase
