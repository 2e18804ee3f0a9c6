"""Tearing SQLite's write-ahead log: what was committed before stays, what is torn is gone, and the file still opens."""

import random
import shutil
import sqlite3
from pathlib import Path

import pytest

from chaos.wal import frames, tear


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """Return a copy of a database's files as a crash leaves them: three rows, each committed alone, in the log."""
    source = tmp_path / "source.db"
    connection = sqlite3.connect(source, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("CREATE TABLE rows (value BLOB)")
    connection.execute("PRAGMA wal_checkpoint(RESTART)")
    for number in range(3):
        connection.execute("INSERT INTO rows VALUES (?)", (bytes([number]) * 20_000,))
    copy = tmp_path / "copy.db"
    for suffix in ("", "-wal"):
        shutil.copy(f"{source}{suffix}", f"{copy}{suffix}")
    connection.close()
    return copy


def rows(path: Path) -> int:
    connection = sqlite3.connect(path)
    try:
        count: int = connection.execute("SELECT count(*) FROM rows").fetchone()[0]
        return count
    finally:
        connection.close()


def test_frames_are_those_that_sqlite_sees(database: Path) -> None:
    found = frames(Path(f"{database}-wal").read_bytes())

    assert sum(commits for _, commits in found) == 3
    assert found[-1][1]


@pytest.mark.parametrize("seed", range(20))
def test_only_the_last_transaction_is_torn(database: Path, seed: int) -> None:
    said = tear(Path(f"{database}-wal"), random.Random(seed))

    assert said is not None
    assert "into the last transaction" in said
    assert rows(database) == 2


def test_what_is_not_torn_is_all_there(database: Path) -> None:
    assert rows(database) == 3


def test_an_empty_log_has_nothing_to_tear(tmp_path: Path) -> None:
    (tmp_path / "x-wal").touch()

    assert tear(tmp_path / "x-wal", random.Random(0)) is None
