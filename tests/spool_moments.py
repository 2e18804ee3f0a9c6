"""The moments of a spool's writes: what a crash between two statements leaves, or a disk that fails there."""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast
from unittest.mock import patch

from relay.store import Change, Store


def copy_spool(path: Path, directory: Path) -> Path:
    """Copies the spool at *path* as a crash leaves it, while nobody writes; returns where the copy is."""
    directory.mkdir()
    for name in (path.name, f"{path.name}-wal"):  # The rest of it lives no longer than its process.
        if path.with_name(name).exists():
            shutil.copy(path.with_name(name), directory / name)
    return directory / path.name


@contextmanager
def at_each_moment(act: Callable[[], None]) -> Iterator[None]:
    """
    Within the with-block *act* is called before each statement of every write to a spool, in the writer's thread,
    which goes on when it returns. What it raises is that statement's failure.
    """
    write, tidy = Store._write, Store._tidy

    def observed_write(store: Store, connection: sqlite3.Connection, change: Change) -> None:
        write(store, cast("sqlite3.Connection", _Observed(connection, act)), change)

    def observed_tidy(store: Store, connection: sqlite3.Connection, change: Change) -> None:
        tidy(store, cast("sqlite3.Connection", _Observed(connection, act)), change)

    with patch.object(Store, "_write", observed_write), patch.object(Store, "_tidy", observed_tidy):
        yield


class _Observed:
    def __init__(self, connection: sqlite3.Connection, act: Callable[[], None]) -> None:
        self._connection = connection
        self._act = act

    def __getattr__(self, name: str) -> Callable[..., object]:
        method: Callable[..., object] = getattr(self._connection, name)

        def call(*arguments: object) -> object:
            self._act()
            return method(*arguments)

        return call
