import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from relay import inspection as inspection_module
from relay.batch import Entry
from relay.errors import DeadMissing, SpoolMissing, SpoolUnusable
from relay.event import Event
from relay.inspection import Inspection, request
from relay.spool_file import FORMAT, Progress
from relay.store import Change, Store

MakeEvent = Callable[..., Event]
MAX_BYTES = 1 << 28


@pytest.fixture
def path(tmp_path: Path) -> Path:
    # With all that a URI would take for something else.
    return tmp_path / "a spool?mode=rw#%41" / "relay.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path, MAX_BYTES)) as store:
        yield store


@pytest.fixture
def spool(store: Store, path: Path) -> Iterator[Inspection]:
    with closing(Inspection(path)) as spool:
        yield spool


def entries_from(first: int, events: list[Event]) -> list[Entry]:
    return list(enumerate(events, start=first))


def bury(store: Store, *entries: Entry) -> None:
    store.write(Change(dead=[(entry, f"error {entry[0]}") for entry in entries]))


# --- Reading. ---


def test_a_spool_at_a_glance(store: Store, spool: Inspection, path: Path, make_event: MakeEvent) -> None:
    entries = entries_from(1, [make_event(number, received_at=1000 + number) for number in range(1, 8)])
    store.write(Change(entries[:3], total_events=3))
    used = store.write(Change(entries[3:], total_events=7, published=4))
    overview = spool.overview()
    assert overview.progress == Progress(7, 4, 7, 3, 1004)
    assert overview.identity == store.contents(0).identity
    assert overview.format == FORMAT
    assert overview.used_bytes == used
    assert (overview.dead_events, overview.requests) == (0, 0)
    bury(store, *entries[:3])
    request(path, [1, 3])
    assert (spool.overview().dead_events, spool.overview().requests) == (3, 2)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_waiting_events_are_shown_in_order_page_by_page_without_what_is_published(
    store: Store, spool: Inspection, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(inspection_module, "_PAGE_ROWS", rows)
    entries = entries_from(1, [make_event(number, padding=number) for number in range(20)])
    for start in range(0, 20, 4):
        store.write(Change(entries[start : start + 4], total_events=start + 4))
    store.write(Change(published=6))
    sizes = [len(event.body) for _, event in entries]
    expected = [(sequence, event, sizes[sequence - 1]) for sequence, event in entries[6:]]
    assert list(spool.waiting(bodies=True)) == expected
    bare = [(sequence, event._replace(body=b""), size) for sequence, event, size in expected]
    assert list(spool.waiting(bodies=False)) == bare


def test_dead_events_are_shown_in_order_page_by_page(
    store: Store, spool: Inspection, path: Path, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection_module, "_PAGE_ROWS", 3)
    entries = entries_from(1, [make_event(number, padding=number * 100) for number in range(7)])
    bury(store, *entries)
    request(path, [5])
    shown = list(spool.dead(bodies=True))
    assert [(dead.sequence, dead.event) for dead in shown] == entries
    assert [dead.error for dead in shown] == [f"error {sequence}" for sequence, _ in entries]
    assert [dead.sequence for dead in shown if dead.requested_at] == [5]
    assert all(dead.size == len(event.body) for dead, (_, event) in zip(shown, entries, strict=True))
    assert [dead.event.body for dead in spool.dead(bodies=False)] == [b""] * 7
    assert [dead.sequence for dead in spool.dead(bodies=False, after=4)] == [5, 6, 7]
    assert spool.dead_event(3).event == entries[2][1]
    with pytest.raises(DeadMissing, match="no dead event 8:"):
        spool.dead_event(8)


def test_what_is_taken_out_between_two_pages_is_missing_and_nothing_else(
    store: Store, spool: Inspection, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection_module, "_PAGE_ROWS", 1)
    entries = entries_from(1, [make_event(number) for number in range(5)])
    for number, entry in enumerate(entries):
        store.write(Change([entry], total_events=number + 1))
    waiting = spool.waiting(bodies=False)
    assert next(waiting).sequence == 1
    store.write(Change(published=3))
    assert [sequence for sequence, _, _ in waiting] == [4, 5]


def test_a_page_that_is_shown_slowly_holds_nothing_up(
    store: Store, spool: Inspection, path: Path, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An open read would keep all that is written from then on in the WAL.
    monkeypatch.setattr(inspection_module, "_PAGE_ROWS", 1)
    for number in range(3):
        store.write(Change([(number + 1, make_event(number))], total_events=number + 1))
    waiting = spool.waiting(bodies=True)
    next(waiting)
    with closing(sqlite3.connect(path)) as connection:
        busy, written, moved = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        assert (busy, written, moved) == (0, 0, 0)


def test_looking_needs_no_relay_and_changes_nothing(path: Path, make_event: MakeEvent) -> None:
    with closing(Store(path, MAX_BYTES)) as store:
        store.write(Change([(1, make_event())], total_events=1))
    before = path.read_bytes()
    with closing(Inspection(path)) as spool:
        assert [waiting.sequence for waiting in spool.waiting(bodies=True)] == [1]
        Store(path, MAX_BYTES).close()  # A relay may start meanwhile.
    assert path.read_bytes() == before


def test_what_a_killed_relay_left_is_seen(path: Path, tmp_path: Path, make_event: MakeEvent) -> None:
    with closing(Store(path, MAX_BYTES)) as store:
        store.write(Change([(1, make_event())], total_events=1))
        for name in ("relay.db", "relay.db-wal"):
            (tmp_path / name).write_bytes(path.with_name(name).read_bytes())
    before = (tmp_path / "relay.db").read_bytes(), (tmp_path / "relay.db-wal").read_bytes()
    with closing(Inspection(tmp_path / "relay.db")) as spool:
        assert spool.overview().progress.pending_events == 1
    # It is the relay's to clear up.
    assert before == ((tmp_path / "relay.db").read_bytes(), (tmp_path / "relay.db-wal").read_bytes())


def test_without_a_spool_none_is_made(tmp_path: Path) -> None:
    for missing in (tmp_path / "relay.db", tmp_path / "nowhere" / "relay.db"):
        for look in (Inspection, lambda path: request(path, None)):
            with pytest.raises(SpoolMissing, match=r"no spool at .*relay\.db\. Set RELAY_SPOOL_PATH"):
                look(missing)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "relay.db").touch()
    with pytest.raises(SpoolMissing):
        Inspection(tmp_path / "relay.db")


def test_what_is_no_spool_is_told(tmp_path: Path) -> None:
    (tmp_path / "relay.db").write_bytes(b"not a database at all " * 1000)
    with pytest.raises(SpoolUnusable, match="not a database"):
        Inspection(tmp_path / "relay.db")


def test_a_spool_of_an_older_relay_is_left_to_the_relay_to_bring_up_to_date(path: Path) -> None:
    Store(path, MAX_BYTES).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={FORMAT - 1}")
    with pytest.raises(SpoolUnusable, match=rf"older relay \(format {FORMAT - 1}\)"):
        Inspection(path)
    with pytest.raises(SpoolUnusable, match=rf"older relay \(format {FORMAT - 1}\)"):
        request(path, None)


# --- Requests. ---


def requests(path: Path) -> list[int]:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
        return [sequence for (sequence,) in connection.execute("SELECT sequence FROM requests ORDER BY sequence")]


def test_a_request_is_on_disk_whether_or_not_a_relay_runs(path: Path, make_event: MakeEvent) -> None:
    with closing(Store(path, MAX_BYTES)) as store:
        bury(store, *entries_from(1, [make_event(number) for number in range(3)]))
        assert request(path, [3, 1, 3]) == [1, 3]
        assert requests(path) == [1, 3]
        store.write(Change(published=3))
        assert [sequence for sequence, _ in store.requested(1 << 30)] == [1, 3]
    assert request(path, None) == [1, 2, 3]
    assert requests(path) == [1, 2, 3]


def test_a_request_for_an_unknown_event_asks_for_nothing(store: Store, path: Path, make_event: MakeEvent) -> None:
    bury(store, *entries_from(1, [make_event()]))
    with pytest.raises(DeadMissing, match="no dead event 7, 9: `relay dead list`"):
        request(path, [9, 1, 7])
    assert requests(path) == []


def test_a_request_waits_for_the_relay_that_is_writing(store: Store, path: Path, make_event: MakeEvent) -> None:
    bury(store, *entries_from(1, [make_event()]))
    assert store._writer

    async def ask() -> None:
        assert store._writer
        store._writer.execute("BEGIN IMMEDIATE")
        asking = asyncio.create_task(asyncio.to_thread(request, path, [1]))
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert not asking.done()
        store._writer.execute("COMMIT")
        assert await asking == [1]

    asyncio.run(ask())
    assert requests(path) == [1]


def test_the_relay_waits_for_no_more_than_one_statement(
    store: Store, path: Path, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A command that was stopped by Ctrl-Z in the middle of a transaction would keep the relay from accepting events.
    bury(store, *entries_from(1, [make_event()]))
    statements: list[str] = []
    connected = inspection_module._connected

    def traced(path: Path, mode: str) -> sqlite3.Connection:
        connection = connected(path, mode)
        connection.set_trace_callback(statements.append)
        return connection

    monkeypatch.setattr(inspection_module, "_connected", traced)
    request(path, [1])
    writing = [statement for statement in statements if statement.partition(" ")[0] not in {"SELECT", "PRAGMA"}]
    assert len(writing) == 1
    assert writing[0].startswith("INSERT OR IGNORE INTO requests")
