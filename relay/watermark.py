"""
How far a spool has been published, as Kafka knows it.

The watermark is written in the transaction of the events that it covers, so it tells after a crash which of them are
on their topics. A bare sequence would not do: a spool file that was restored from a copy gives sequences a second time,
to other events. So a watermark names the runs that led to it, and covers only the history that both sides share.
"""

import logging
import uuid
from collections.abc import Sequence
from typing import NamedTuple

import orjson

log = logging.getLogger(__name__)

#: How many runs a watermark names.
RUNS_NAMED = 8


class Run(NamedTuple):
    """A start of a relay on a spool."""

    first_sequence: int
    run: str


class Watermark(NamedTuple):
    """Every event up to *sequence* is on Kafka, as *runs* (oldest first) gave the sequences."""

    sequence: int
    runs: tuple[Run, ...]

    @classmethod
    def at(cls, sequence: int, runs: Sequence[Run]) -> "Watermark":
        """The watermark at *sequence* of a spool with these *runs*."""
        return cls(sequence, tuple(run for run in runs if run.first_sequence <= sequence)[-RUNS_NAMED:])

    def covers(self, runs: Sequence[Run]) -> int:
        """
        Up to which sequence the events of a spool with these *runs* are on Kafka; 0 if none is known to be.

        Less than *sequence* where the spool was restored from a copy that had not come so far.
        """
        ours = {run.run: index for index, run in enumerate(runs)}
        for index in range(len(self.runs) - 1, -1, -1):
            if (shared := ours.get(self.runs[index].run)) is not None:
                ends = [
                    history[place + 1].first_sequence - 1
                    for history, place in ((self.runs, index), (runs, shared))
                    if place + 1 < len(history)
                ]
                return min([self.sequence, *ends])
        return 0

    def encode(self) -> bytes:
        """As JSON."""
        return orjson.dumps({"sequence": self.sequence, "runs": [[run.first_sequence, run.run] for run in self.runs]})

    @classmethod
    def decode(cls, value: bytes) -> "Watermark":
        """
        From JSON.

        Raises: ValueError.
        """
        try:
            fields = orjson.loads(value)
            return cls(int(fields["sequence"]), tuple(Run(int(first), str(run)) for first, run in fields["runs"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a watermark: {value[:100]!r}") from error


class History:
    """The runs on one spool file, and what a watermark means to them."""

    def __init__(self, stored: Sequence[Run], first_sequence: int) -> None:
        """*stored* is what the file knows; a new run begins, which will give *first_sequence*."""
        self._runs = [*stored, Run(first_sequence, str(uuid.uuid4()))]
        self._told_lost = False
        #: Of what this spool gave, but for the memory of it, when its machine was set back.
        self._undone: Watermark | None = None

    @property
    def run(self) -> Run:
        """The one that has begun."""
        return self._runs[-1]

    def watermark(self, sequence: int) -> Watermark:
        """What to write to Kafka with the events up to *sequence*."""
        return Watermark.at(sequence, self._runs)

    def covered(self, watermark: Watermark | None, published: int, last: int) -> int:
        """
        Up to which sequence events are on Kafka, after *watermark* was found there, or none was; 0 if none is known to
        be. The file itself knows it of those up to *published*, and *last* is the last sequence that was given.
        """
        if watermark is None:
            if published and not self._told_lost:
                self._told_lost = True
                log.error(
                    "Kafka has no watermark of this spool, though it has the events up to sequence %d: the watermark "
                    "topic was deleted, made anew, or is another one. Nothing is lost; of the events after that one, "
                    "those that were committed before the spool had noted it are published a second time.",
                    published,
                    extra={"action": "watermark_lost", "published": published},
                )
            return 0
        covered = watermark.covers(self._runs)
        if covered > last or watermark == self._undone:
            self._undone = watermark
            log.error(
                "Kafka has events up to sequence %d of this spool, which has given %d at most: its machine was set "
                "back to an earlier moment while the relay ran. Events that were published in between may be "
                "published a second time.",
                watermark.sequence,
                last,
                extra={"action": "spool_set_back"},
            )
            return published
        if covered < watermark.sequence:
            log.error(
                "Kafka has events up to sequence %d of this spool, which shares their history up to %d only: "
                "it was restored from a copy. Nothing is lost; what was published since the copy is not sent again.",
                watermark.sequence,
                covered,
                extra={"action": "spool_restored"},
            )
        return covered
