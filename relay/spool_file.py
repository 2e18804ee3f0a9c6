"""The layout of the spool's file: made, brought up to date, and read."""

import sqlite3
import sys
import time
import uuid
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import closing
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from relay.batch import Entry, decode
from relay.errors import SpoolUnusable

FORMAT = 2
PAGE_SIZE = 4096
#: From each older format to the next.
_MIGRATIONS = {
    1: "CREATE TABLE requests (sequence INTEGER PRIMARY KEY, requested_at INTEGER NOT NULL) STRICT;",
}


class Progress(NamedTuple):
    """How far the events of a spool have come."""

    #: The largest that was ever given to an event that is or was in the file.
    last_sequence: int
    #: Every event up to this sequence is on Kafka.
    published: int
    #: Ever stored.
    total_events: int
    #: Of them not known to be on Kafka.
    pending_events: int
    #: Of the oldest of these, or earlier; milliseconds since the epoch.
    oldest_received_at: int | None


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """
    Makes the tables in a new file, and brings a file of an older relay up to date. For the file's owner.

    Raises: SpoolUnusable if a newer relay wrote it, which is left as it is.
    """
    version = written_format(connection, path)
    if version == 0:
        _create(connection)
        return
    for older in range(version, FORMAT):
        connection.executescript(f"BEGIN IMMEDIATE; {_MIGRATIONS[older]} PRAGMA user_version={older + 1}; COMMIT;")


def written_format(connection: sqlite3.Connection, path: Path) -> int:
    """
    The format of the file, 0 if there is nothing in it.

    Raises: SpoolUnusable if a newer relay wrote it.
    """
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    if version > FORMAT:
        raise SpoolUnusable(
            f"The spool {path} was written by a newer relay: it has format {version}, this relay knows up to {FORMAT}. "
            "Run that relay, or a newer one."
        )
    return version


def _create(connection: sqlite3.Connection) -> None:
    connection.execute(f"PRAGMA page_size={PAGE_SIZE}")
    connection.execute("PRAGMA auto_vacuum=INCREMENTAL")
    connection.execute("PRAGMA journal_mode=WAL")
    schema = files("relay").joinpath("spool.sql").read_text()
    connection.executescript(f"BEGIN; {schema} PRAGMA user_version={FORMAT};")
    connection.execute("INSERT INTO spool VALUES (?, ?)", (str(uuid.uuid4()), now()))
    connection.execute("COMMIT")


def pages(connection: sqlite3.Connection) -> tuple[int, int]:
    """How many pages the file has, and how many of them are free."""
    count, free = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count"))
    return count, free


def waiting_bytes(connection: sqlite3.Connection) -> int:
    """How many bytes the bodies of the events are that wait for Kafka."""
    found: int = connection.execute("SELECT coalesce(sum(length(bodies)), 0) FROM batches").fetchone()[0]
    return found


def identity(connection: sqlite3.Connection) -> str:
    """What names the spool on Kafka."""
    found: str = connection.execute("SELECT identity FROM spool").fetchone()[0]
    return found


def progress(connection: sqlite3.Connection) -> Progress:
    """How far the events have come."""
    query = connection.execute
    published, published_events = query("SELECT sequence, total_events FROM published").fetchone()
    first = query("SELECT received_at, events FROM batches ORDER BY last_sequence LIMIT 1").fetchone()
    last = query("SELECT last_sequence, total_events FROM batches ORDER BY last_sequence DESC LIMIT 1").fetchone()
    # The first batch may be published in part.
    skipped = sum(sequence <= published for sequence, _ in decode(first[1], b"")) if first else 0
    total_events = last[1] if last else published_events
    return Progress(
        last_sequence=max(last[0], published) if last else published,
        published=published,
        total_events=total_events,
        pending_events=total_events - published_events - skipped,
        oldest_received_at=first[0] if first else None,
    )


def entries(
    connection: sqlite3.Connection, after: int, before: int | None, max_events: int, max_bytes: int
) -> list[Entry]:
    """
    The events with a sequence beyond *after* and below *before*, in order: whole rows until one of the limits is
    reached.
    """
    found: list[Entry] = []
    size = 0
    with closing(
        connection.execute(
            "SELECT events, bodies FROM batches WHERE last_sequence > ? ORDER BY last_sequence", (after,)
        )
    ) as batches:
        for events, bodies in batches:
            found.extend(
                entry for entry in decode(events, bodies) if entry[0] > after and (before is None or entry[0] < before)
            )
            size += len(bodies)
            if len(found) >= max_events or size >= max_bytes:
                break
    return found


def accepted_since(connection: sqlite3.Connection, since: int) -> Iterator[tuple[int, str]]:
    """
    The events accepted since that time, as they lie in their rows, with when they were; in order of sequence.

    A backlog of hours is not read for it: within a run no row is older than the one before, whatever is done to the
    clock, so where a run's rows begin to count is found by halving.
    """

    def begin(first: int, end: int) -> int:
        def accepted_at(sequence: int) -> int:
            row = connection.execute(
                "SELECT accepted_at FROM batches WHERE last_sequence >= ? AND last_sequence < ?"
                " ORDER BY last_sequence LIMIT 1",
                (sequence, end),
            ).fetchone()
            return row[0] if row else sys.maxsize

        return first + bisect_left(range(first, end), since, key=accepted_at)

    runs = [sequence for (sequence,) in connection.execute("SELECT first_sequence FROM runs ORDER BY first_sequence")]
    last = connection.execute("SELECT max(last_sequence) FROM batches").fetchone()[0] or 0
    for first, end in pairwise([0, *runs, last + 1]):
        yield from connection.execute(
            "SELECT accepted_at, events FROM batches WHERE last_sequence >= ? AND last_sequence < ?"
            " ORDER BY last_sequence",
            (begin(first, end), end),
        )


def requested(connection: sqlite3.Connection, max_bytes: int) -> list[Entry]:
    """
    The dead events that are to be published after all, in order of their sequence: until *max_bytes* are reached.

    Only those that were announced as dead: what is still to be announced would go to Kafka a second time.
    """
    found: list[Entry] = []
    size = 0
    with closing(
        connection.execute(
            "SELECT event, body FROM dead WHERE sequence IN (SELECT sequence FROM requests)"
            " AND sequence <= (SELECT sequence FROM published) ORDER BY sequence"
        )
    ) as dead:
        for event, body in dead:
            found.extend(decode(f"[{event}]", body))
            size += len(body)
            if size >= max_bytes:
                break
    return found


def now() -> int:
    """The time, as the file has it: milliseconds since the epoch."""
    return time.time_ns() // 1_000_000
