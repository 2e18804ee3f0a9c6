"""What becomes of dead events that were requeued, as the spool's file shows it."""

import time
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from relay.inspection import Inspection

_PAUSE = 0.2


class State(StrEnum):
    """How far a requeued event has come."""

    REQUESTED = "requested"
    QUEUED = "queued"
    PUBLISHED = "published"
    REFUSED = "refused"


class Outcome(NamedTuple):
    """What has become of an event that was dead as *sequence*."""

    sequence: int
    state: State
    #: Of one that was refused again: its new sequence among the dead, and what the broker said.
    dead_as: int | None = None
    error: str | None = None


def watched(spool: Inspection, sequences: Sequence[int], before: Mapping[int, str], seconds: float) -> list[Outcome]:
    """
    What has become of *sequences* when the last one is settled, or after *seconds*.

    *before* tells the events that were dead before it was asked for: their sequences, with their ids.
    """
    # What Kafka must have before it is known what became of an event: all that the spool held once it was taken up.
    awaited: dict[int, int] = {}
    outcomes: dict[int, Outcome] = {}
    deadline = time.monotonic() + seconds
    while True:
        published = spool.overview().progress.published
        dead = {dead.sequence: dead for dead in spool.dead(bodies=False)}
        last = spool.overview().progress.last_sequence
        again = {it.event.id: it for it in dead.values() if it.sequence not in before}
        for sequence in sequences:
            if sequence in dead:
                outcomes[sequence] = Outcome(sequence, State.REQUESTED)
            elif published < awaited.setdefault(sequence, last):
                outcomes[sequence] = Outcome(sequence, State.QUEUED)
            elif refused := again.get(before.get(sequence, "")):
                outcomes[sequence] = Outcome(sequence, State.REFUSED, refused.sequence, refused.error)
            else:
                outcomes[sequence] = Outcome(sequence, State.PUBLISHED)
        unsettled = {State.REQUESTED, State.QUEUED} & {outcome.state for outcome in outcomes.values()}
        if not unsettled or time.monotonic() >= deadline:
            return [outcomes[sequence] for sequence in sequences]
        time.sleep(_PAUSE)
