"""
The spool's file in the hands of its owner: one transaction after the other.

Durability is SQLite's with `synchronous=FULL` in WAL mode: `write` returns after the fsync of everything it was given,
or raises and has changed nothing. Everything here blocks; spool.py calls it from its own threads.

Longer than other modules: what one transaction writes is told in one piece.
"""

import errno
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import orjson

from relay import spool_file
from relay.batch import ROW_BYTES, Entry, digests, encode, rows
from relay.dedupe import Repeat
from relay.errors import SpoolFailed, SpoolFull, SpoolUnusable
from relay.event import Event
from relay.files import Reserve, make_directory, make_private, own, sync_directory
from relay.framing import KnownId
from relay.spool_file import PAGE_SIZE, Progress
from relay.watermark import RUNS_NAMED, Run

log = logging.getLogger(__name__)

#: Beyond the limit, for what makes room again: trims, dead events, dedupe memory.
HEADROOM_BYTES = 8 << 20
#: The file is written anew, without its free pages, once so many bytes of it are free, few are left, and of events that
#: wait still fewer. Commits wait meanwhile, about half a second for a gigabyte, most of it in the file system; what is
#: left, by and large the dedupe window, is in memory then. Page by page SQLite looks through all that are free for each
#: that it gives back: half a minute of CPU for a gigabyte.
_FREE_BYTES, _LEFT_BYTES, _WAITING_BYTES = 16 << 20, 16 << 20, 1 << 20
#: Seconds until that is tried again, if it failed.
_COMPACTION_PAUSE = 60.0
#: For how many transactions the bytes in use are reckoned before they are asked for.
_ESTIMATES = 32
_INSERT = "INSERT INTO batches VALUES (?, ?, ?, ?, ?, ?)"
_FULL = 2


@dataclass
class Change:
    """What one transaction makes durable."""

    entries: list[Entry] = field(default_factory=list)
    #: Which of them are dead until then: new sequence to the one under which they are dead.
    requeued: dict[int, int] = field(default_factory=dict)
    total_events: int = 0
    #: When, for the dedupe memory.
    accepted_at: int = 0
    run: Run | None = None
    #: Every event up to this sequence is on Kafka ...
    published: int | None = None
    #: ... and the dedupe memory of those that it is news of: joined digests.
    digests: bytes = b""
    #: Dedupe memory accepted before this time (milliseconds since the epoch) is forgotten.
    forget_before: int | None = None
    repeats: dict[bytes, Repeat] = field(default_factory=dict)
    dead: list[tuple[Entry, str]] = field(default_factory=list)
    #: Tries whether an event with a body of so many bytes could be stored; leaves nothing.
    probe_bytes: int | None = None
    #: The registry whose ids are forgotten before these are written.
    forget_ids_of: str | None = None
    schema_ids: Sequence[KnownId] = ()

    @property
    def is_plain(self) -> bool:
        """Whether there are events in it and nothing else."""
        return (
            bool(self.entries)
            and not (self.run or self.repeats or self.dead or self.requeued or self.schema_ids)
            and self.published is None
            and self.forget_before is None
            and self.forget_ids_of is None
        )

    @property
    def arrived(self) -> list[Event]:
        """The events that senders have just delivered."""
        return [event for sequence, event in self.entries if sequence not in self.requeued]


class Contents(NamedTuple):
    """What a file holds when it is opened."""

    identity: str
    progress: Progress
    used_bytes: int
    runs: list[Run]
    dead: dict[int, str]
    schema_ids: list[KnownId]
    repeats: dict[bytes, Repeat]


class Store:
    """An open spool file. One process owns it; `write` is for one thread, everything else for any other."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """
        Opens the file, or makes it.

        Raises: SpoolInUse, SpoolUnusable.
        """
        try:
            # By whatever link it is reached: what lies beside it is the file's.
            self._path = path = path.resolve()
        except (OSError, RuntimeError) as error:
            raise SpoolUnusable(f"The spool {path} cannot be opened: {error}.") from error
        self._max_pages = (max_bytes + HEADROOM_BYTES) // PAGE_SIZE
        self._reserve = Reserve(path.with_name(path.name + ".reserve"))
        self._used_bytes = self._estimates = 0
        self._compaction_failed_at = -_COMPACTION_PAUSE
        self._reading = threading.Lock()
        try:
            make_directory(path.parent)
            try:
                self._open()
            except (OSError, sqlite3.Error) as error:
                # SQLite's files beside the spool's own need room too, and what is in it is to reach Kafka.
                if not (_is_about_room(error) and self._reserve.release()):
                    raise
                self._open()
        except (OSError, sqlite3.Error) as error:
            raise SpoolUnusable(f"The spool {path} cannot be opened: {error}.") from error

    def _open(self) -> None:
        with ExitStack() as undo:
            self._lock = own(self._path)
            undo.callback(os.close, self._lock)
            make_private(self._path)
            self._writer: sqlite3.Connection | None = undo.enter_context(closing(self._connect()))
            self._reader = undo.enter_context(closing(self._connect()))
            self._reserve.keep()
            sync_directory(self._path.parent)
            undo.pop_all()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=10, isolation_level=None, check_same_thread=False)
        try:
            spool_file.prepare(connection, self._path)
            connection.execute("PRAGMA synchronous=FULL")
            # Some builds overwrite all that is deleted, and so write every body a second time.
            connection.execute("PRAGMA secure_delete=FAST")
            # What compaction puts aside is nobody else's business, and there may be no other place that can be written.
            connection.execute("PRAGMA temp_store=MEMORY")
            connection.execute(f"PRAGMA max_page_count={self._max_pages}")
            mode, level = (
                connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
            )
            if (mode, level) != ("wal", _FULL):
                raise SpoolUnusable(f"SQLite gives no durability at {self._path}: journal {mode}, synchronous {level}.")
        except BaseException:
            connection.close()
            raise
        return connection

    def contents(self, forget_before: int) -> Contents:
        """
        What the file holds, with the dedupe memory of events that may repeat, accepted since *forget_before*.

        Raises: SpoolUnusable.
        """
        with self._legible():
            query = self._reader.execute
            pages, free = spool_file.pages(self._reader)
            self._used_bytes = (pages - free) * PAGE_SIZE
            return Contents(
                identity=spool_file.identity(self._reader),
                progress=spool_file.progress(self._reader),
                used_bytes=self._used_bytes,
                runs=[Run(*row) for row in query("SELECT first_sequence, run FROM runs ORDER BY first_sequence")],
                dead=dict(query("SELECT sequence, error FROM dead").fetchall()),
                schema_ids=[KnownId(*row) for row in query("SELECT * FROM schema_ids")],
                repeats={
                    digest: Repeat(accepted_at, occurrence, bool(answered))
                    for digest, accepted_at, occurrence, answered in query(
                        "SELECT digest, accepted_at, occurrence, answered FROM repeats WHERE accepted_at >= ?",
                        (forget_before,),
                    )
                },
            )

    def digests(self, forget_before: int) -> Iterator[tuple[int, bytes]]:
        """
        The dedupe memory of all other events accepted since *forget_before*: when, and the digests of those that were
        accepted then. A row at a time: there may be millions.

        Raises: SpoolUnusable.
        """
        with self._legible():
            yield from self._reader.execute(
                "SELECT accepted_at, digests FROM digests WHERE accepted_at >= ? ORDER BY last_sequence",
                (forget_before,),
            )
            for accepted_at, events in spool_file.accepted_since(self._reader, forget_before):
                yield accepted_at, digests(events)

    @contextmanager
    def _legible(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise SpoolUnusable(f"The spool {self._path} cannot be read: {error}.") from error

    def write(self, change: Change) -> int:
        """
        Makes *change* durable: all of it or nothing. Returns the bytes of the file that are in use.

        Raises: SpoolFull, SpoolFailed.
        """
        try:
            self._make_durable(change)
        except SpoolFull:
            # What takes events out of the way must be written too, and it alone makes room.
            if change.entries or not (change.published is not None or change.dead) or not self._reserve.release():
                raise
            self._make_durable(change)
        try:
            assert self._writer is not None
            self._tidy(self._writer, change)
        except (sqlite3.Error, OSError) as error:
            # The change is durable, whatever becomes of this.
            log.warning("The spool could not be tidied: %s", error, extra={"action": "spool_not_tidied"})
            self._give_up_writer()
        return self._used_bytes

    def _make_durable(self, change: Change) -> None:
        try:
            if self._writer is None:
                self._writer = self._connect()
            self._write(self._writer, change)
        except sqlite3.Error as error:
            self._give_up_writer()
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise SpoolFull(f"The spool {self._path} or its disk is full.") from error
            raise SpoolFailed(f"The spool {self._path} cannot be written: {error}.") from error
        except SpoolUnusable as error:
            raise SpoolFailed(str(error)) from error

    def _write(self, connection: sqlite3.Connection, change: Change) -> None:
        execute = connection.execute
        inserts = list(_inserts(change))
        if len(inserts) == 1 and change.is_plain:
            # The usual case: a statement alone is a transaction of its own.
            execute(_INSERT, inserts[0])
            return
        execute("BEGIN IMMEDIATE")
        if change.probe_bytes is not None:
            execute("INSERT OR REPLACE INTO probe VALUES (1, zeroblob(?))", (change.probe_bytes,))
        if change.run:
            execute("INSERT INTO runs VALUES (?, ?)", change.run)
        # Before they are inserted: into the space that they leave, as a spool may be full of dead events.
        gone = [(sequence,) for sequence in change.requeued.values()]
        connection.executemany("DELETE FROM dead WHERE sequence = ?", gone)
        connection.executemany("DELETE FROM requests WHERE sequence = ?", gone)
        for insert in inserts:
            execute(_INSERT, insert)
        for digest, repeat in change.repeats.items():
            execute(
                "INSERT OR REPLACE INTO repeats VALUES (?, ?, ?, ?)",
                (digest, repeat.accepted_at, repeat.occurrence, repeat.answered),
            )
        if change.forget_before is not None:
            _forget(connection, change.forget_before)
        _bury(connection, change.dead)
        if change.forget_ids_of is not None:
            execute("DELETE FROM schema_ids WHERE registry = ?", (change.forget_ids_of,))
        connection.executemany("INSERT OR REPLACE INTO schema_ids VALUES (?, ?, ?, ?, ?)", change.schema_ids)
        if change.published is not None:
            _trim(connection, change.published)
            if change.digests:
                execute("INSERT INTO digests VALUES (?, ?, ?)", (change.published, change.accepted_at, change.digests))
        execute("COMMIT")

    def _tidy(self, connection: sqlite3.Connection, change: Change) -> None:
        self._estimates += 1
        if change.is_plain and self._estimates < _ESTIMATES:
            self._used_bytes += sum(len(event.body) for _, event in change.entries)
            return
        self._estimates = 0
        if change.probe_bytes is not None:
            connection.execute("DELETE FROM probe")
        self._reserve.keep()
        pages, free = spool_file.pages(connection)
        self._used_bytes = (pages - free) * PAGE_SIZE
        free_bytes = free * PAGE_SIZE
        if free_bytes > _FREE_BYTES and self._used_bytes < _LEFT_BYTES:
            self._compact(connection)

    def _compact(self, connection: sqlite3.Connection) -> None:
        now = time.monotonic()
        if now < self._compaction_failed_at + _COMPACTION_PAUSE:
            return
        if spool_file.waiting_bytes(connection) > _WAITING_BYTES:
            return
        self._compaction_failed_at = now
        connection.execute("VACUUM")
        # That alone cuts the file off, and there may be no other for long.
        connection.execute("PRAGMA wal_checkpoint").fetchall()
        self._compaction_failed_at = -_COMPACTION_PAUSE

    def _give_up_writer(self) -> None:
        # After a failed write or fsync nothing that this connection believes about the file can be relied upon;
        # closing it rolls back.
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def read(self, after: int, before: int | None, max_events: int, max_bytes: int) -> list[Entry]:
        """
        The events with a sequence beyond *after* and below *before*, in order: whole rows until one of the limits is
        reached.

        Raises: SpoolFailed.
        """
        try:
            with self._reading:
                return spool_file.entries(self._reader, after, before, max_events, max_bytes)
        except sqlite3.Error as error:
            raise SpoolFailed(f"The spool {self._path} cannot be read: {error}.") from error

    def requested(self, max_bytes: int) -> list[Entry]:
        """
        The dead events that an operator wants published after all, in order of their sequence: until *max_bytes* are
        reached.

        Raises: SpoolFailed.
        """
        try:
            with self._reading:
                return spool_file.requested(self._reader, max_bytes)
        except sqlite3.Error as error:
            raise SpoolFailed(f"The spool {self._path} cannot be read: {error}.") from error

    def close(self) -> None:
        """Closes the file; another process may own it then."""
        self._give_up_writer()
        with self._reading:  # Who waited for it may have been cancelled; the reading itself goes on in its thread.
            self._reader.close()
        os.close(self._lock)


def _is_about_room(error: OSError | sqlite3.Error) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    # Without room for its shared memory SQLite speaks of an I/O error.
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}


def _inserts(change: Change) -> Iterator[tuple[int, int, int, int, str, bytes]]:
    total = change.total_events - len(change.entries)
    for row in rows(change.entries):
        total += len(row)
        yield row[-1][0], change.accepted_at, row[0][1].received_at, total, *encode(row)


def _bury(connection: sqlite3.Connection, dead: Sequence[tuple[Entry, str]]) -> None:
    for (sequence, event), error in dead:
        fields, body = encode([(sequence, event)])
        # A large body, which has a row to itself, moves into the space that it leaves there: the spool may be full. To
        # announce the event its fields are enough.
        if len(body) > ROW_BYTES:
            connection.execute(
                "UPDATE batches SET bodies = x'' WHERE last_sequence = ? AND json_array_length(events) = 1", (sequence,)
            )
        connection.execute(
            "INSERT OR REPLACE INTO dead VALUES (?, ?, ?, ?, ?)",
            (sequence, orjson.dumps(orjson.loads(fields)[0]).decode(), body, spool_file.now(), error),
        )


def _trim(connection: sqlite3.Connection, upto: int) -> None:
    connection.execute("UPDATE published SET sequence = ?", (upto,))
    last = connection.execute(
        "SELECT total_events FROM batches WHERE last_sequence <= ? ORDER BY last_sequence DESC LIMIT 1", (upto,)
    ).fetchone()
    if last:
        connection.execute("UPDATE published SET total_events = ?", last)
        connection.execute("DELETE FROM batches WHERE last_sequence <= ?", (upto,))
    connection.execute(
        "DELETE FROM runs WHERE first_sequence <"
        " (SELECT first_sequence FROM runs WHERE first_sequence <= ? ORDER BY 1 DESC LIMIT 1 OFFSET ?)",
        (upto, RUNS_NAMED - 1),
    )


def _forget(connection: sqlite3.Connection, before: int) -> None:
    kept = connection.execute(
        "SELECT last_sequence FROM digests WHERE accepted_at >= ? ORDER BY last_sequence LIMIT 1", (before,)
    ).fetchone()
    if kept:
        connection.execute("DELETE FROM digests WHERE last_sequence < ?", kept)
    else:
        connection.execute("DELETE FROM digests")
    connection.execute("DELETE FROM repeats WHERE accepted_at < ?", (before,))
