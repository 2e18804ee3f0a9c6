import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from relay.dedupe import Repeat
from relay.errors import SpoolUnusable
from relay.event import DeadLetterReason
from relay.framing import KnownId
from relay.inspection import Inspection
from relay.metrics import Metrics
from relay.spool import Spool
from relay.spool_file import FORMAT, PAGE_SIZE, Progress
from relay.store import Store
from relay.watermark import Run, Watermark

#: A spool as the first relay wrote it: seven of eleven events published, one of them and one of the waiting ones dead.
FORMAT_1 = Path(__file__).parent / "data" / "spool-format-1.db"
MAX_BYTES = 1 << 28
RUNS = [Run(1, "c8b6b915-2941-4c86-b5c3-7636b0c5bc30"), Run(7, "b6eff647-6b6a-471b-9805-d7e79b17eafc")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return where a copy of the kept file is."""
    return Path(shutil.copy(FORMAT_1, tmp_path / "relay.db"))


def test_the_kept_file_is_of_the_first_format() -> None:
    with closing(sqlite3.connect(f"{FORMAT_1.as_uri()}?immutable=1", uri=True)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)


def test_a_spool_of_the_first_format_opens_with_all_that_is_in_it(path: Path) -> None:
    with closing(Store(path, MAX_BYTES)) as store:
        contents, remembered = store.contents(0), list(store.digests(0))
        waiting = store.read(contents.progress.published, None, 1 << 40, 1 << 40)
    assert contents.identity == "24f44ddd-2077-44dd-ae93-fb1eece98e24"
    assert contents.progress == Progress(11, 7, 11, 4, 1_764_000_000_006)
    assert contents.runs == RUNS
    assert contents.dead == {3: "MessageSizeTooLargeError: 3", 8: "MessageSizeTooLargeError: 8"}
    assert contents.schema_ids == [
        KnownId("http://registry", "topic-lead", "fingerprint-2", 8, bytes(range(16))),
        KnownId("http://registry", "topic-message", "fingerprint-1", 7, None),
    ]
    # Of the types that never repeat: four published messages, the first of the next batch, and that batch's messages.
    assert [len(joined) // 16 for _, joined in remembered] == [4, 1, 3, 0]
    assert sorted(contents.repeats.values(), key=lambda repeat: repeat.accepted_at) == [
        Repeat(1_795_380_656_993, 2, answered=False),
        Repeat(1_795_380_657_039, 1, answered=False),
    ]
    assert [(sequence, event.type, event.key, event.reason, event.schema) for sequence, event in waiting] == [
        (8, "Message", "chat-1", None, "fingerprint-1"),
        (9, "unknown", "chat-1", DeadLetterReason.UNKNOWN_TYPE, ""),
        (10, "Message", None, DeadLetterReason.NO_KEY, "fingerprint-1"),
        (11, "LivechatEdit", "chat-1", None, ""),
    ]
    assert waiting[0][1].body == b'{"_id": "chat-1", "type": "Message", "number": 7, "detail": "\\u00e9\\ud83d\\ude00"}'
    with closing(Inspection(path)) as spool:
        assert spool.dead_event(3).event.body == b'{"_id": "chat-1", "type": "Message", "number": 3}'


async def test_a_spool_of_the_first_format_goes_on(path: Path) -> None:
    spool = await Spool.open(path, max_bytes=MAX_BYTES, dedupe_seconds=300, metrics=Metrics(CollectorRegistry()))
    assert spool.depth == 4
    assert spool.resume(Watermark(9, tuple(RUNS))) == 9
    assert [sequence for sequence, _ in await spool.take(1000, 1 << 30)] == [8, 9, 10, 11]
    assert await spool.requeue() == []
    await spool.close()


def test_a_file_that_was_brought_up_to_date_is_laid_out_as_a_new_one(path: Path, tmp_path: Path) -> None:
    Store(path, MAX_BYTES).close()
    Store(tmp_path / "new.db", MAX_BYTES).close()
    assert layout(path) == layout(tmp_path / "new.db")


def layout(path: Path) -> dict[str, object]:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        query = connection.execute
        names = [name for (name,) in query("SELECT name FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'")]
        tables = {name: query(f"SELECT * FROM pragma_table_info('{name}')").fetchall() for name in sorted(names)}
        strict = query("SELECT name, type, wr, strict FROM pragma_table_list ORDER BY name").fetchall()
        pragmas = [query(f"PRAGMA {name}").fetchone() for name in ("user_version", "page_size", "auto_vacuum")]
    assert pragmas == [(FORMAT,), (PAGE_SIZE,), (2,)]
    return {**tables, "strict": strict}


def test_a_file_that_cannot_be_brought_up_to_date_is_left_as_it_was(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE VIEW requests AS SELECT 1")
    with pytest.raises(SpoolUnusable, match="requests"):
        Store(path, MAX_BYTES)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)


def test_a_crash_while_it_is_brought_up_to_date_leaves_the_older_format(path: Path) -> None:
    script = """
import os, sqlite3, sys
from pathlib import Path
from relay.spool_file import prepare
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.set_trace_callback(lambda statement: os._exit(99) if "COMMIT" in statement else None)
prepare(connection, Path(sys.argv[1]))
"""
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == 99
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    with closing(Store(path, MAX_BYTES)) as store:
        assert store.contents(0).progress.pending_events == 4


@pytest.mark.parametrize("format_", [FORMAT + 1, 99])
def test_a_file_of_a_newer_relay_is_refused_clearly_and_left_as_it_is(path: Path, format_: int) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute(f"PRAGMA user_version={format_}")
    before = path.read_bytes()
    message = rf"relay\.db was written by a newer relay: it has format {format_}, this relay knows up to {FORMAT}\."
    with pytest.raises(SpoolUnusable, match=message):
        Store(path, MAX_BYTES)
    with pytest.raises(SpoolUnusable, match=message):
        Inspection(path)
    assert path.read_bytes() == before
