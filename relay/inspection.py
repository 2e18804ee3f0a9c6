"""
What operators' commands read in a spool file, and the one thing that they write: requests.

Whether or not a relay runs on it: no lock is taken that it needs, and nothing is read for long, so that it is never
held up. What the relay does between two reads shows in the second.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from relay import spool_file
from relay.batch import decode, sizes
from relay.errors import DeadMissing, SpoolMissing, SpoolUnusable
from relay.event import Event
from relay.spool_file import FORMAT, PAGE_SIZE, Progress

#: What one read holds in memory, but for a larger event alone.
_PAGE_ROWS, _PAGE_BYTES = 100, 1 << 20


class Overview(NamedTuple):
    """A spool at a glance."""

    identity: str
    format: int
    progress: Progress
    #: Of the file, in use.
    used_bytes: int
    dead_events: int
    #: How many of them are to be published after all.
    requests: int


class Waiting(NamedTuple):
    """An event that is not known to be on Kafka."""

    sequence: int
    #: Its body is empty unless it was asked for.
    event: Event
    #: Of the body, in bytes.
    size: int


class Dead(NamedTuple):
    """An event that the broker refused."""

    sequence: int
    #: Its body is empty unless it was asked for.
    event: Event
    #: Of the body, in bytes.
    size: int
    #: What the broker said.
    error: str
    #: Milliseconds since the epoch.
    refused_at: int
    #: When it was asked to publish it after all, if it was.
    requested_at: int | None


class Inspection:
    """A spool file, open for reading."""

    def __init__(self, path: Path) -> None:
        """
        Opens the file; makes none.

        Raises: SpoolMissing; SpoolUnusable if it cannot be read, or a relay of another version wrote it.
        """
        self._path = path
        with self._reading():
            self._connection = _connected(path, "ro")

    def close(self) -> None:
        """Closes the file."""
        self._connection.close()

    def overview(self) -> Overview:
        """
        What is in it now.

        Raises: SpoolUnusable.
        """
        with self._reading():
            query = self._connection.execute
            query("BEGIN")  # All of one moment.
            try:
                pages, free = spool_file.pages(self._connection)
                return Overview(
                    spool_file.identity(self._connection),
                    FORMAT,
                    spool_file.progress(self._connection),
                    (pages - free) * PAGE_SIZE,
                    query("SELECT count(*) FROM dead").fetchone()[0],
                    query("SELECT count(*) FROM requests").fetchone()[0],
                )
            finally:
                query("COMMIT")

    def waiting(self, *, bodies: bool) -> Iterator[Waiting]:
        """
        The events that wait for Kafka, in order of sequence. What is published meanwhile may be missing.

        Raises: SpoolUnusable.
        """
        after = self.overview().progress.published
        query = (
            # A body that is not there is among the dead.
            "SELECT last_sequence, events, CASE WHEN NOT ? THEN x'' WHEN length(bodies) THEN bodies"
            " ELSE (SELECT body FROM dead WHERE sequence = last_sequence) END FROM batches"
            " WHERE last_sequence > ? ORDER BY last_sequence"
        )
        reached = after
        while page := self._page(query, bodies, reached):
            for _, events, joined in page:
                for (sequence, event), size in zip(decode(events, joined), sizes(events), strict=True):
                    if sequence > after:
                        yield Waiting(sequence, event, size)
            reached = page[-1][0]

    def dead(self, *, bodies: bool, after: int = 0) -> Iterator[Dead]:
        """
        The dead events with a sequence beyond *after*, in its order. What is taken up meanwhile may be missing.

        Raises: SpoolUnusable.
        """
        query = (
            "SELECT sequence, event, CASE WHEN ? THEN body ELSE x'' END, error, refused_at, requested_at"
            " FROM dead LEFT JOIN requests USING (sequence) WHERE sequence > ? ORDER BY sequence"
        )
        while page := self._page(query, bodies, after):
            yield from map(_dead, page)
            after = page[-1][0]

    def dead_event(self, sequence: int) -> Dead:
        """
        One dead event with its body.

        Raises: DeadMissing, SpoolUnusable.
        """
        for dead in self.dead(bodies=True, after=sequence - 1):
            if dead.sequence == sequence:
                return dead
            break
        raise DeadMissing([sequence])

    def _page(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = []
        size = 0
        with self._reading(), closing(self._connection.execute(query, values)) as found:
            for row in found:
                rows.append(row)
                size += len(row[1]) + len(row[2])
                if len(rows) >= _PAGE_ROWS or size >= _PAGE_BYTES:
                    break
        return rows

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise SpoolUnusable(f"The spool {self._path} cannot be read: {error}.") from error


def request(path: Path, sequences: Sequence[int] | None) -> list[int]:
    """
    Asks the relay on the spool at *path*, or the next one, to publish dead events after all: those, or all there are.

    Returns once the request is on disk, with the sequences that were asked for. Twice is the same as once.

    Raises: DeadMissing if one of them is not dead, and nothing is asked for then; SpoolMissing, SpoolUnusable.
    """
    try:
        with closing(_connected(path, "rw")) as connection:
            connection.execute("PRAGMA synchronous=FULL")
            there = [sequence for (sequence,) in connection.execute("SELECT sequence FROM dead ORDER BY sequence")]
            if missing := sorted(set(sequences or ()) - set(there)):
                raise DeadMissing(missing)
            wanted = there if sequences is None else sorted(set(sequences))
            # One statement, so that nothing can stop this process between taking the lock and giving it back: while it
            # is held, no event can be accepted.
            connection.execute(
                "INSERT OR IGNORE INTO requests SELECT sequence, ? FROM dead"
                " WHERE sequence IN (SELECT value FROM json_each(?))",
                (spool_file.now(), orjson.dumps(wanted).decode()),
            )
    except sqlite3.Error as error:
        raise SpoolUnusable(f"The spool {path} cannot be written: {error}.") from error
    return wanted


def _connected(path: Path, mode: str) -> sqlite3.Connection:
    missing = SpoolMissing(
        f"There is no spool at {path}. Set RELAY_SPOOL_PATH, or --path, to where the relay has it; the relay makes it "
        "when it starts."
    )
    if not path.exists():
        raise missing
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", timeout=10, isolation_level=None, uri=True)
    try:
        version = spool_file.written_format(connection, path)
        if version == 0:
            raise missing
        if version < FORMAT:
            raise SpoolUnusable(
                f"The spool {path} was written by an older relay (format {version}): this one reads it once it has "
                f"served from it and so brought it to format {FORMAT}."
            )
    except BaseException:
        connection.close()
        raise
    return connection


def _dead(row: Sequence[Any]) -> Dead:
    sequence, fields, body, *judgement = row
    events = f"[{fields}]"
    ((_, event),) = decode(events, body)
    return Dead(sequence, event, sizes(events)[0], *judgement)
