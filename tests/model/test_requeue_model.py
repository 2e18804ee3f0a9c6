"""
The spool's model, with operators who ask that dead events are published after all.

What they ask for comes again at the end of the queue: under a new sequence, in the order of the former ones, once,
and is dead no more from the same moment on. Senders and the dedupe memory see nothing of it.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from model.test_spool_model import BODIES, Crash, SpoolModel, disk_failing_from, moments
from spool_moments import at_each_moment

from relay import spool as spool_module
from relay.errors import SpoolFailed
from relay.event import Event
from relay.inspection import Inspection, request

REQUEUE_BYTES = 8_000
#: What is delivered beside a requeue, in the same commit; most of it is no retry.
beside = st.lists(st.integers(0, 99), max_size=3)


class Stored(NamedTuple):
    """What one commit put into the queue."""

    #: As what they were dead.
    requeued: Sequence[int] = ()
    arrived: Sequence[Event] = ()


class RequeueModel(SpoolModel):
    """As the spool's model; the dead may come again."""

    #: Soon full of dead events.
    max_bytes = 200_000

    def __init__(self) -> None:
        super().__init__()
        self.stack.enter_context(patch.object(spool_module, "REQUEUE_BYTES", REQUEUE_BYTES))
        #: Dead events that were asked for, by sequence.
        self.requested: set[int] = set()

    # --- What the broker refuses, and operators ask for. ---

    @initialize()
    def first_start(self) -> None:
        super().first_start()
        self.append(range(len(BODIES)))
        for body in range(len(BODIES)):
            self.answered(body)
            self.append([body])  # A retry, or a genuine repeat.
        self.refuse(len(self.events) - 1)

    @rule(count=st.integers(1, 4))
    def refuse(self, count: int) -> None:
        """As the publisher does it: from then on these may be asked for."""
        self.take(count, 1 << 30)
        for _ in range(min(count, self.taken - self.published)):
            self.bury()
            self.published += 1
            self.spool_.published(self.sequences[self.published - 1])
        self.trim()

    @precondition(lambda self: self.dead)
    @rule(data=st.data(), running=st.booleans())
    def ask(self, data: st.DataObject, *, running: bool) -> None:
        path = self.path
        if not running:
            self.close()
            self.trimmed = self.published
        self.ask_for_some(data)
        if not running:
            self.open(path)
            self.compare_files(under_way=[])

    def ask_for_some(self, data: st.DataObject) -> None:
        """Whatever was asked for before, and whether or not their announcement is known."""
        if self.dead:
            self.requested |= self.asked(data.draw(st.none() | st.lists(st.sampled_from(sorted(self.dead)))))

    def asked(self, wanted: list[int] | None) -> set[int]:
        sequences = request(self.path, wanted)
        assert sequences == sorted(self.dead if wanted is None else set(wanted))
        return set(sequences)

    # --- What the relay does then. ---

    @rule(which=beside, data=st.data())
    def requeue(self, which: list[int], data: st.DataObject) -> None:
        self.ask_for_some(data)
        self.note(self.take_up(which))

    @rule(which=beside, moment=moments, data=st.data())
    def requeue_while_the_disk_fails(self, which: list[int], moment: int, data: st.DataObject) -> None:
        self.ask_for_some(data)
        with disk_failing_from(moment):
            self.note(self.take_up(which))

    @precondition(lambda self: self.dead)
    @rule(which=beside, moment=moments, data=st.data())
    def crash_while_requeueing(self, which: list[int], moment: int, data: st.DataObject) -> None:
        self.ask_for_some(data)
        crash = Crash(self.path, self.new_directory(), moment)
        with at_each_moment(crash.at_a_moment):
            stored = self.take_up(which)
        if crash.came_too_late:
            self.note(stored)
            stored = Stored()
        if self.recover(crash, under_way=[*map(self.buried, stored.requeued), *stored.arrived]):
            self.note(stored)

    @precondition(lambda self: self.requested)
    @rule()
    def ask_again_while_it_is_taken_up(self) -> None:
        """Between the look at what is asked for and the transaction."""
        asked: set[int] = set()

        def ask() -> None:
            if not asked:
                asked.update(self.asked(None))

        with at_each_moment(ask):
            stored = self.take_up([])
        self.requested |= asked
        self.note(stored)

    def take_up(self, which: Sequence[int]) -> Stored:
        """Lets the relay look for requests while these bodies are delivered, and judges what comes of it."""
        events = [self.event(body) for body in which]
        room = self.room

        async def at_once(read: Callable[..., object], *arguments: object) -> object:
            return read(*arguments)

        async def all_in_one_commit() -> tuple[list[int] | None, Sequence[object]]:
            return await asyncio.gather(self.requeued(), self.append_all(events))

        with patch.object(asyncio, "to_thread", at_once):
            requeued, outcomes = self.do(all_in_one_commit())
        arrived = self.judge(events, outcomes, room)
        assert not (requeued and any(isinstance(outcome, SpoolFailed) for outcome in outcomes)), "one commit"
        assert not (requeued is None and arrived), "one commit"
        if requeued is not None:
            self.judge_requeued(requeued)
        return Stored(requeued or (), arrived)

    async def requeued(self) -> list[int] | None:
        await asyncio.sleep(0)  # Until the turn of the loop in which the appends begin.
        try:
            return await self.spool_.requeue()
        except SpoolFailed:  # Never SpoolFull, however full it is.
            return None

    def judge_requeued(self, sequences: Sequence[int]) -> None:
        asked = sorted(self.requested)
        assert sequences == asked[: len(sequences)]
        if sequences:
            announced = self.place(sequences[-1]) + 1
            assert announced <= self.published, "it would be announced as well"
            self.trimmed = max(self.trimmed, announced)
        sizes = [len(self.buried(sequence).body) for sequence in sequences]
        assert sum(sizes[:-1]) < REQUEUE_BYTES
        left = asked[len(sequences) :]
        assert not left or sum(sizes) >= REQUEUE_BYTES or self.place(left[0]) >= self.trimmed

    def note(self, stored: Stored) -> None:
        for sequence in stored.requeued:
            self.events.append(self.buried(sequence))
            self.requested.remove(sequence)
            del self.dead[sequence]
        self.accept(stored.arrived)

    def place(self, sequence: int) -> int:
        """In `events`."""
        return next(place for place, given in self.sequences.items() if given == sequence)

    def buried(self, sequence: int) -> Event:
        return self.events[self.place(sequence)]

    # --- At all times. ---

    @invariant()
    def the_file_shows_who_is_dead_and_who_is_asked_for(self) -> None:
        with closing(Inspection(self.path)) as spool:
            shown = {it.sequence: (it.event, it.requested_at is not None) for it in spool.dead(bodies=True)}
            assert spool.overview().requests == len(self.requested)
        assert shown == {sequence: (self.buried(sequence), sequence in self.requested) for sequence in self.dead}


TestRequeueModel = RequeueModel.TestCase
