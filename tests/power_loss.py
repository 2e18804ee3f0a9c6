"""
A disk that loses power: what was fsynced is kept apart from what was only written.

SQLite writes through a VFS of ours (apsw brings an SQLite that can have one) to real files, and this notes what would
survive: a file's content as of its last fsync, with any of the sectors written since; a file's name, if its directory
was fsynced. An fsync that fails loses what it was for, as Linux does: the next one does not make up for it.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import apsw

from relay import store as store_module

SECTOR = 512
#: Pages in the log after which SQLite moves them into the file: far fewer than usual, so that it often does.
CHECKPOINT_PAGES = 25


class Written(NamedTuple):
    """A write since the last fsync, or with no *data* a truncation to *offset*."""

    offset: int
    data: bytes | None


class Content(NamedTuple):
    """A file's content, durable and not."""

    durable: bytes = b""
    written: Sequence[Written] = ()

    def synced(self) -> bytes:
        return _with(self.durable, self.written)

    def surviving(self, rng: random.Random | None) -> bytes:
        """After a power cut: with *rng* any of what was only written is there too."""
        if rng is None:
            return self.durable
        kept = []
        for offset, data in self.written:
            if data is None:
                kept += [Written(offset, None)] * rng.randrange(2)
            else:
                sectors = range(0, len(data), SECTOR)
                kept += [Written(offset + at, data[at : at + SECTOR]) for at in sectors if rng.random() < 0.5]
        return _with(self.durable, kept)


def _with(content: bytes, written: Sequence[Written]) -> bytes:
    result = bytearray(content)
    for offset, data in written:
        if data is None:
            del result[offset:]
        else:
            result.extend(bytes(max(0, offset - len(result))))
            result[offset : offset + len(data)] = data
    return bytes(result)


class Disk:
    """What is written within `in_use`."""

    def __init__(self) -> None:
        self.files: dict[str, Content] = {}
        #: Files whose names a power cut leaves, and of those the ones that may just as well be gone.
        self.named: set[str] = set()
        self.deleted: set[str] = set()
        #: Called before everything that changes what would survive, in whatever thread that is.
        self.at_each_moment: Callable[[], None] = lambda: None
        #: Asked before each fsync of a file whether it fails.
        self.fails: Callable[[], bool] = lambda: False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Spools that are opened within the with-block are on this disk."""
        vfs = _Vfs(self)
        fsync = os.fsync

        def observed_fsync(descriptor: int) -> None:
            fsync(descriptor)
            self.directory_synced(os.fstat(descriptor))

        try:
            with patch.object(store_module, "sqlite3", _Sqlite3()), patch.object(os, "fsync", observed_fsync):
                yield
        finally:
            vfs.unregister()

    def after_a_power_cut(self, rng: random.Random | None = None) -> Mapping[str, bytes]:
        """What the disk holds then, by path; without *rng* nothing that was not fsynced."""
        there = [path for path in self.named if path not in self.deleted or (rng and rng.randrange(2))]
        return {path: self.files.get(path, Content()).surviving(rng) for path in there}

    # --- What is written. ---

    def wrote(self, path: str, written: Written) -> None:
        content = self.files.get(path, Content())
        self.files[path] = content._replace(written=[*content.written, written])

    def synced(self, path: str, *, new_log: bool) -> None:
        self.at_each_moment()
        content = self.files.get(path, Content())
        if self.fails():
            self.files[path] = Content(content.durable)
            raise apsw.IOError("disk I/O error")
        self.files[path] = Content(content.synced())
        if new_log:  # Whose directory SQLite fsyncs with it.
            self.named.add(path)

    def removed(self, path: str) -> None:
        self.deleted.add(path)

    def created(self, path: str) -> None:
        if path in self.deleted:
            self.deleted.discard(path)
            self.named.discard(path)
            self.files[path] = Content()

    def directory_synced(self, directory: os.stat_result) -> None:
        self.at_each_moment()
        for path in self.files:
            if os.path.samestat(directory, Path(path).parent.stat()):
                self.named.add(path)
        self.named -= self.deleted


class _Sqlite3:
    """Stands in for the module sqlite3 in store.py: the same calls, to apsw."""

    Error = apsw.Error
    SQLITE_FULL = apsw.SQLITE_FULL

    def connect(self, path: Path, **_: object) -> "_Connection":
        return _Connection(str(path), vfs=_Vfs.NAME)


class _Connection(apsw.Connection):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.set_busy_timeout(10_000)
        self.set_wal_hook(_checkpoint)

    def executescript(self, statements: str) -> None:
        self.execute(statements).fetchall()


def _checkpoint(connection: apsw.Connection, database: str, pages: int) -> int:
    # As SQLite's own hook, which does not mind a checkpoint that fails: the commit is durable without it. apsw would
    # raise what the VFS raised.
    if pages >= CHECKPOINT_PAGES:
        with contextlib.suppress(apsw.Error):
            connection.wal_checkpoint(database)
    return apsw.SQLITE_OK


class _Vfs(apsw.VFS):
    NAME = "a disk that loses power"

    def __init__(self, disk: Disk) -> None:
        super().__init__(self.NAME, "")
        self._disk = disk

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> "_File":  # noqa: N802
        return _File(name, flags, self._disk)

    def xDelete(self, name: str, sync_directory: bool) -> None:  # noqa: N802
        self._disk.at_each_moment()
        super().xDelete(name, sync_directory)
        self._disk.removed(name)


class _File(apsw.VFSFile):
    def __init__(self, name: str | apsw.URIFilename | None, flags: list[int], disk: Disk) -> None:
        self._path = name.filename() if isinstance(name, apsw.URIFilename) else str(name)
        self._is_log = bool(flags[0] & (apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL))
        self._disk = disk
        super().__init__("", name, flags)
        if self._is_log:
            disk.created(self._path)
        disk.files.setdefault(self._path, Content())

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self._disk.at_each_moment()
        super().xWrite(data, offset)
        self._disk.wrote(self._path, Written(offset, bytes(data)))

    def xTruncate(self, size: int) -> None:  # noqa: N802
        self._disk.at_each_moment()
        super().xTruncate(size)
        self._disk.wrote(self._path, Written(size, None))

    def xSync(self, flags: int) -> None:  # noqa: N802
        super().xSync(flags)
        self._disk.synced(self._path, new_log=self._is_log)
