import fcntl
import os
import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from spool_moments import at_each_moment, copy_spool

from relay import spool_file
from relay.batch import Entry
from relay.dedupe import Repeat
from relay.errors import SpoolFailed, SpoolFull, SpoolInUse, SpoolUnusable
from relay.event import DeadLetterReason, Event
from relay.framing import KnownId
from relay.spool_file import FORMAT, PAGE_SIZE, Progress
from relay.store import HEADROOM_BYTES, Change, Store
from relay.watermark import RUNS_NAMED, Run

MakeEvent = Callable[..., Event]
MAX_BYTES = 1 << 28
NO_LIMIT = 1 << 40


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool" / "relay.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path, MAX_BYTES)) as store:
        yield store


def entries_from(first: int, events: list[Event]) -> list[Entry]:
    return list(enumerate(events, start=first))


def read_all(store: Store, after: int = 0) -> list[Entry]:
    return store.read(after, None, NO_LIMIT, NO_LIMIT)


def look_into(path: Path, query: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(query).fetchall()


# --- Opening. ---


def test_sqlite_is_told_to_lose_nothing(store: Store) -> None:
    # No kill of the process could show it: the page cache would survive. So the pragmas are read back.
    for connection in (store._writer, store._reader):
        assert connection is not None
        pragma = {
            name: connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("synchronous", "journal_mode", "page_size", "auto_vacuum", "max_page_count")
        }
        assert pragma == {
            "synchronous": 2,
            "journal_mode": "wal",
            "page_size": PAGE_SIZE,
            "auto_vacuum": 2,
            "max_page_count": (MAX_BYTES + HEADROOM_BYTES) // PAGE_SIZE,
        }


def test_sqlite_is_told_so_again_after_a_failed_write(store: Store, make_event: MakeEvent) -> None:
    store.write(Change(entries_from(1, [make_event()]), total_events=1))
    with pytest.raises(SpoolFailed):
        store.write(Change(entries_from(1, [make_event()]), total_events=2))
    store.write(Change(entries_from(2, [make_event()]), total_events=2))
    assert store._writer is not None
    assert store._writer.execute("PRAGMA synchronous").fetchone()[0] == 2


def test_a_new_spool_is_empty_and_has_a_name_of_its_own(path: Path, tmp_path: Path) -> None:
    with closing(Store(path, MAX_BYTES)) as one, closing(Store(tmp_path / "other.db", MAX_BYTES)) as other:
        contents = one.contents(0)
        assert uuid.UUID(contents.identity).version == 4
        assert contents.identity != other.contents(0).identity
        assert contents._replace(identity="", used_bytes=0) == (
            *("", Progress(0, 0, 0, 0, None), 0, [], {}, [], {}),
        )  # fmt: skip
        assert list(one.digests(0)) == []
    with closing(Store(path, MAX_BYTES)) as again:
        assert again.contents(0).identity == contents.identity


def test_a_second_owner_is_refused_and_told_who_the_first_is(path: Path, store: Store) -> None:
    with pytest.raises(SpoolInUse, match=rf"process {os.getpid()}\b"):
        Store(path, MAX_BYTES)


def test_a_second_owner_is_refused_by_another_name_too(path: Path, store: Store, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(path.parent)
    (tmp_path / "link.db").symlink_to(path)
    for name in (tmp_path / "linked" / path.name, tmp_path / "link.db"):
        with pytest.raises(SpoolInUse):
            Store(name, MAX_BYTES)


def test_what_lies_beside_a_spool_is_where_its_file_is(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    link = tmp_path / "elsewhere" / "link.db"
    link.parent.mkdir()
    link.symlink_to(path)
    with closing(Store(link, MAX_BYTES)):
        assert list(link.parent.iterdir()) == [link]
    assert {file.name for file in path.parent.iterdir()} >= {"relay.db", "relay.db.lock", "relay.db.reserve"}


def test_a_link_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.db").symlink_to(tmp_path / "b.db")
    (tmp_path / "b.db").symlink_to(tmp_path / "a.db")
    with pytest.raises(SpoolUnusable, match=r"a\.db cannot be opened"):
        Store(tmp_path / "a.db", MAX_BYTES)


def test_another_process_is_refused(path: Path, store: Store) -> None:
    script = "import sys; from pathlib import Path; from relay.store import Store; Store(Path(sys.argv[1]), 1 << 28)"
    ran = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "SpoolInUse" in ran.stderr


def test_a_spool_that_was_closed_may_be_owned_again(path: Path) -> None:
    for _ in range(2):
        with closing(Store(path, MAX_BYTES)):
            pass


def test_a_crash_leaves_no_lock_behind(path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from relay.store import Store;"
        "s = Store(Path(sys.argv[1]), 1 << 28); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -9
    with closing(Store(path, MAX_BYTES)):
        pass


def test_commands_may_look_into_a_running_spool(path: Path, store: Store, make_event: MakeEvent) -> None:
    store.write(Change(entries_from(1, [make_event()]), total_events=1))
    assert look_into(path, "SELECT count(*) FROM events") == [(1,)]


def test_a_newer_format_is_refused_and_left_as_it_is(path: Path) -> None:
    Store(path, MAX_BYTES).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version={FORMAT + 1}")
    before = path.read_bytes()
    with pytest.raises(SpoolUnusable, match="newer relay"):
        Store(path, MAX_BYTES)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"not a database at all " * 1000, b"SQLite format 3\x00" + b"\xff" * 1000])
def test_a_file_that_is_no_spool_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "relay.db"
    path.write_bytes(content)
    with pytest.raises(SpoolUnusable, match=r"relay\.db"):
        Store(path, MAX_BYTES)
    assert path.read_bytes() == content


def test_a_directory_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolUnusable, match=r"relay\.db"):
        Store(tmp_path / "file" / "relay.db", MAX_BYTES)


def test_the_spool_its_lock_and_its_reserve_are_all_there_is(path: Path) -> None:
    Store(path, MAX_BYTES).close()
    assert sorted(file.name for file in path.parent.iterdir()) == ["relay.db", "relay.db.lock", "relay.db.reserve"]
    with (path.parent / "relay.db.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- Events. ---


def test_what_was_written_is_read_in_order(store: Store, make_event: MakeEvent) -> None:
    events = [make_event(number, padding=number * 997 % 5000) for number in range(300)]
    store.write(Change(entries_from(1, events[:1]), total_events=1))
    store.write(Change(entries_from(2, events[1:200]), total_events=200))
    store.write(Change(entries_from(201, events[200:]), total_events=300))
    assert read_all(store) == entries_from(1, events)


def test_reading_begins_and_ends_where_it_is_told(store: Store, make_event: MakeEvent) -> None:
    entries = entries_from(1, [make_event(number) for number in range(30)])
    for start in range(0, 30, 10):
        store.write(Change(entries[start : start + 10], total_events=start + 10))
    assert store.read(13, None, NO_LIMIT, NO_LIMIT) == entries[13:]
    assert store.read(13, 25, NO_LIMIT, NO_LIMIT) == entries[13:24]
    assert store.read(30, None, NO_LIMIT, NO_LIMIT) == []
    assert store.read(0, 1, NO_LIMIT, NO_LIMIT) == []
    # Whole rows, until there is enough.
    assert store.read(0, None, 11, NO_LIMIT) == entries[:20]
    assert store.read(0, None, NO_LIMIT, 1) == entries[:10]


def test_the_file_is_not_closed_while_it_is_read(
    path: Path, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, may_go_on = threading.Event(), threading.Event()
    entries = spool_file.entries

    def slowly(*arguments: Any) -> list[Entry]:
        reads.set()
        assert may_go_on.wait(10)
        return entries(*arguments)

    monkeypatch.setattr(spool_file, "entries", slowly)
    store = Store(path, MAX_BYTES)
    store.write(Change([(1, make_event())], total_events=1))
    with ThreadPoolExecutor(2) as threads:
        reading = threads.submit(read_all, store)
        assert reads.wait(10)
        closing_ = threads.submit(store.close)
        assert not wait([closing_], timeout=0.05).done
        may_go_on.set()
        assert reading.result(10) == [(1, make_event())]
        closing_.result(10)


def test_a_large_batch_is_read_a_piece_at_a_time(store: Store, make_event: MakeEvent) -> None:
    events = [make_event(number, padding=300_000) for number in range(40)]
    store.write(Change(entries_from(1, events), total_events=40))
    taken: list[Entry] = []
    while piece := store.read(taken[-1][0] if taken else 0, None, 1000, 1 << 20):
        assert len(piece) <= 7
        taken += piece
    assert taken == entries_from(1, events)


def test_people_see_the_events_one_by_one(store: Store, path: Path, make_event: MakeEvent) -> None:
    plain = make_event(1, workspace="acme")
    odd = plain._replace(
        key="z\u00fcrich\n\U0001f600",
        occurrence=3,
        time="2026-11-20T09:00:01Z",
        reason=DeadLetterReason.SCHEMA,
        detail="/visitor: required",
        body=b"\x00\xff body",
    )
    keyless = plain._replace(key=None, body=b"{}")
    store.write(Change(entries_from(5, [plain, odd]), total_events=2))
    store.write(Change(entries_from(9, [keyless]), total_events=3))
    rows = look_into(
        path,
        "SELECT sequence, workspace, type, key, digest, occurrence, received_at, time, reason, detail, body FROM events"
        " ORDER BY sequence",
    )
    assert rows == [
        (
            sequence,
            event.workspace,
            event.type,
            event.key,
            event.digest.hex(),
            event.occurrence,
            event.received_at,
            event.time,
            event.reason,
            event.detail,
            event.body,
        )
        for sequence, event in [(5, plain), (6, odd), (9, keyless)]
    ]


# --- What a file holds when it is opened again. ---


def test_a_spool_goes_on_where_it_was(path: Path, make_event: MakeEvent) -> None:
    events = [make_event(number, received_at=1_000 + number) for number in range(25)]
    runs = [Run(1, "first"), Run(11, "second")]
    with closing(Store(path, MAX_BYTES)) as store:
        store.write(Change(entries_from(1, events[:10]), total_events=10, run=runs[0]))
        used = store.write(Change(entries_from(11, events[10:25]), total_events=25, run=runs[1], published=13))
    with closing(Store(path, MAX_BYTES)) as store:
        contents = store.contents(0)
        assert contents.progress.last_sequence == contents.progress.total_events == 25
        assert contents.progress.published == 13
        assert contents.progress.pending_events == 12
        assert contents.progress.oldest_received_at == 1_010
        assert contents.used_bytes == used
        assert contents.runs == runs
        assert read_all(store, contents.progress.published) == entries_from(1, events)[13:]


def test_sequences_go_on_after_everything_was_published(path: Path, make_event: MakeEvent) -> None:
    with closing(Store(path, MAX_BYTES)) as store:
        store.write(Change(entries_from(1, [make_event(number) for number in range(10)]), total_events=10))
        store.write(Change(published=10))
    with closing(Store(path, MAX_BYTES)) as store:
        contents = store.contents(0)
        assert (contents.progress.last_sequence, contents.progress.published, contents.progress.pending_events) == (
            10,
            10,
            0,
        )
        assert contents.progress.oldest_received_at is None


def test_the_depth_is_right_where_sequences_have_gaps(path: Path, make_event: MakeEvent) -> None:
    events = [make_event(number) for number in range(6)]
    with closing(Store(path, MAX_BYTES)) as store:
        store.write(Change([(10, events[0]), (20, events[1])], total_events=2))
        store.write(Change([(300, events[2]), (4000, events[3])], total_events=4))
        store.write(Change([(50_000, events[4]), (50_001, events[5])], total_events=6, published=299))
        assert store.contents(0).progress.pending_events == 4
        store.write(Change(published=300))
        assert store.contents(0).progress.pending_events == 3
        store.write(Change(published=50_000))
        assert store.contents(0).progress.pending_events == 1
        store.write(Change(published=50_001))
        assert store.contents(0).progress.pending_events == 0


def test_the_last_runs_that_led_to_what_is_published_are_kept(store: Store, make_event: MakeEvent) -> None:
    runs = [Run(10 * number + 1, f"run {number}") for number in range(3 * RUNS_NAMED)]
    for number, run in enumerate(runs):
        store.write(Change([(run.first_sequence, make_event(number))], total_events=number + 1, run=run))
    last = runs[-1].first_sequence
    store.write(Change(published=last))
    kept = store.contents(0).runs
    assert kept == runs[-len(kept) :]
    assert RUNS_NAMED <= len(kept) <= RUNS_NAMED + 1


def test_schema_ids_are_kept_also_when_an_event_is_written_with_them(path: Path, make_event: MakeEvent) -> None:
    old, new, other = (
        KnownId("url", "s", fingerprint, id_, None) for fingerprint, id_ in (("a", 1), ("a", 2), ("b", 3))
    )
    with closing(Store(path, MAX_BYTES)) as store:
        store.write(Change(schema_ids=[old]))
        store.write(Change(entries_from(1, [make_event()]), total_events=1, schema_ids=[new]))
        store.write(Change(schema_ids=[other]))
    with closing(Store(path, MAX_BYTES)) as again:
        assert again.contents(0).schema_ids == [new, other]


def test_a_registry_s_schema_ids_are_forgotten_also_when_an_event_is_written_with_that(
    path: Path, make_event: MakeEvent
) -> None:
    old, elsewhere, new = (
        KnownId(url, "s", fingerprint, 1, None) for url, fingerprint in (("url", "a"), ("other", "a"), ("url", "b"))
    )
    with closing(Store(path, MAX_BYTES)) as store:
        store.write(Change(schema_ids=[old, elsewhere]))
        store.write(Change(entries_from(1, [make_event()]), total_events=1, forget_ids_of="url"))
        assert store.contents(0).schema_ids == [elsewhere]
        store.write(Change(schema_ids=[old]))
        store.write(Change(forget_ids_of="url", schema_ids=[new]))
        assert store.contents(0).schema_ids == [elsewhere, new]


def test_dead_events_are_kept_with_their_bodies(path: Path, make_event: MakeEvent) -> None:
    event = make_event(7, padding=1000)
    with closing(Store(path, MAX_BYTES)) as store:
        store.write(Change([(1, event)], total_events=1))
        store.write(Change(dead=[((1, event), "too large")]))
        store.write(Change(published=1))
        assert read_all(store) == []
    with closing(Store(path, MAX_BYTES)) as store:
        assert store.contents(0).dead == {1: "too large"}
    assert look_into(path, "SELECT sequence, json_extract(event, '$[3]'), body, error FROM dead") == [
        (1, "chat-1", event.body, "too large")
    ]


def test_a_requeued_event_goes_into_the_space_that_it_leaves(path: Path, make_event: MakeEvent) -> None:
    # A spool that is full of dead events has no other.
    event = make_event(7, padding=HEADROOM_BYTES + (1 << 20))
    with closing(Store(path, 2 << 20)) as store:
        store.write(Change(published=1, dead=[((1, event), "too large")]))
        with pytest.raises(SpoolFull):
            store.write(Change([(2, event)], total_events=1))
        store.write(Change([(2, event)], requeued={2: 1}, total_events=1))
        assert read_all(store) == [(2, event)]
        assert store.contents(0).dead == {}


def test_the_digests_of_events_are_known_as_long_as_they_are_there(store: Store, make_event: MakeEvent) -> None:
    events = [make_event(number) for number in range(3)]
    lead = make_event(9, type_="LeadCapture")
    store.write(Change(entries_from(1, [events[0], lead, events[1]]), total_events=3, accepted_at=1_000))
    store.write(Change(entries_from(4, events[2:]), total_events=4, accepted_at=2_000))
    found = list(store.digests(0))
    assert found == [(1_000, events[0].digest[:16] + events[1].digest[:16]), (2_000, events[2].digest[:16])]
    assert list(store.digests(1_500)) == found[1:]


def test_of_each_run_the_digests_are_known_that_its_clock_says_are_young(store: Store, make_event: MakeEvent) -> None:
    # By run: the clock of its first event, and how many it stored, one every 100 ms. The second run's clock was set
    # back, the fourth left nothing.
    runs = [(9_000, 20), (2_000, 30), (9_900, 1), (0, 0), (9_000, 40)]
    sequence, accepted = 0, list[tuple[int, bytes]]()
    for number, (clock, count) in enumerate(runs):
        run = Run(sequence + 1, f"run {number}")
        for place in range(count):
            sequence += 1 + place % 3
            event, accepted_at = make_event(sequence), clock + 100 * place
            change = Change([(sequence, event)], total_events=len(accepted) + 1, accepted_at=accepted_at)
            change.run = None if place else run
            store.write(change)
            accepted.append((accepted_at, event.digest[:16]))
        sequence += 50  # Which could not be stored.
    for since in (0, 1_999, 2_000, 4_950, 9_000, 9_950, 12_900, 12_901):
        assert list(store.digests(since)) == [it for it in accepted if it[0] >= since]


def test_dedupe_memory_outlives_its_events_and_goes_when_it_is_forgotten(path: Path, make_event: MakeEvent) -> None:
    repeats = {b"r" * 32: Repeat(2_000, 3, answered=True), b"s" * 32: Repeat(900, 1, answered=False)}
    with closing(Store(path, MAX_BYTES)) as store:
        for number, accepted_at in enumerate((1_000, 2_000, 3_000), start=1):
            store.write(
                Change(
                    [(number, make_event(number))],
                    total_events=number,
                    accepted_at=accepted_at,
                    published=number,
                    digests=bytes([number]) * 16,
                    repeats=repeats if number == 2 else {},
                )
            )
        assert read_all(store) == []
    with closing(Store(path, MAX_BYTES)) as store:
        assert list(store.digests(0)) == [(1_000, b"\x01" * 16), (2_000, b"\x02" * 16), (3_000, b"\x03" * 16)]
        assert store.contents(0).repeats == repeats
        assert list(store.digests(1_500)) == [(2_000, b"\x02" * 16), (3_000, b"\x03" * 16)]
        assert store.contents(1_500).repeats == {b"r" * 32: repeats[b"r" * 32]}
        store.write(Change(forget_before=2_000))
        assert list(store.digests(0)) == [(2_000, b"\x02" * 16), (3_000, b"\x03" * 16)]
        assert list(store.contents(0).repeats) == [b"r" * 32]
        store.write(Change(forget_before=9_000))
        assert list(store.digests(0)) == []
        assert store.contents(0).repeats == {}


# --- All or nothing. ---


def test_a_change_that_fails_leaves_nothing_behind(store: Store, make_event: MakeEvent) -> None:
    first = make_event(1)
    store.write(Change([(1, first)], total_events=1, run=Run(1, "first")))
    before = known(store)
    change = Change(
        [(2, make_event(2))],
        total_events=2,
        run=Run(1, "the same place twice"),
        published=1,
        digests=b"d" * 16,
        accepted_at=5,
        repeats={b"r" * 32: Repeat(1, 1, answered=False)},
        dead=[((1, first), "refused")],
    )
    with pytest.raises(SpoolFailed):
        store.write(change)
    assert known(store) == before
    change.run = None
    store.write(change)
    assert [sequence for sequence, _ in read_all(store)] == [2]


def test_a_crash_between_any_two_statements_leaves_a_change_whole_or_not_at_all(
    path: Path, tmp_path: Path, make_event: MakeEvent
) -> None:
    first, second, repeat = make_event(1), make_event(2), make_event(3, type_="LeadCapture")
    change = Change(
        [(2, second), (3, repeat)],
        total_events=3,
        run=Run(2, "second"),
        published=1,
        digests=first.digest[:16],
        accepted_at=5,
        forget_before=1,
        repeats={repeat.digest: Repeat(5, 1, answered=False)},
        dead=[((1, first), "refused")],
        schema_ids=[KnownId("url", "s", "a", 1, None)],
    )
    copies: list[Path] = []
    with closing(Store(path, MAX_BYTES)) as store:
        store.write(Change([(1, first)], total_events=1, run=Run(1, "first"), accepted_at=2))
        before = known(store)
        with at_each_moment(lambda: copies.append(copy_spool(path, tmp_path / str(len(copies))))):
            store.write(change)
        after = known(store)
    left = []
    for copy in copies:
        with closing(Store(copy, MAX_BYTES)) as store:
            left.append(known(store))
    assert len(left) > 10
    place = left.index(after)
    assert left == [before] * place + [after] * (len(left) - place)


def known(store: Store) -> tuple[object, ...]:
    return (*store.contents(0)._replace(used_bytes=0), list(store.digests(0)), read_all(store))


def test_a_change_that_fails_at_its_last_step_leaves_nothing_behind(store: Store, make_event: MakeEvent) -> None:
    store.write(Change([(1, make_event(1))], total_events=1))
    before = known(store)
    assert store._writer is not None
    store._writer.execute(
        "CREATE TEMP TRIGGER fault BEFORE UPDATE ON published BEGIN SELECT RAISE(ABORT, 'fault'); END"
    )
    with pytest.raises(SpoolFailed, match="fault"):
        store.write(Change([(2, make_event(2))], total_events=2, published=1))
    assert known(store) == before
    store.write(Change([(2, make_event(2))], total_events=2, published=1))
    assert [sequence for sequence, _ in read_all(store)] == [2]


def test_a_file_that_another_process_writes_to_is_waited_for_no_longer_than_that(
    store: Store, path: Path, make_event: MakeEvent
) -> None:
    assert store._writer is not None
    store._writer.execute("PRAGMA busy_timeout=10")
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(SpoolFailed, match="locked"):
            store.write(Change([(1, make_event())], total_events=1))
        other.execute("ROLLBACK")
    store.write(Change([(1, make_event())], total_events=1))
    assert len(read_all(store)) == 1


def test_what_a_crash_cut_off_is_not_there(path: Path, make_event: MakeEvent, tmp_path: Path) -> None:
    # The last pages of the log as a power cut leaves them: torn, or never written.
    events = [make_event(number, padding=40_000) for number in range(4)]
    with closing(Store(path, MAX_BYTES)) as store:
        sizes = []
        for number, event in enumerate(events, start=1):
            store.write(Change([(number, event)], total_events=number))
            sizes.append(path.with_name("relay.db-wal").stat().st_size)
        base, log = path.read_bytes(), path.with_name("relay.db-wal").read_bytes()
    for cut in (sizes[2] + 1, sizes[2] + 20_000, sizes[3] - 1):
        for torn in (log[:cut], log[:cut] + os.urandom(sizes[3] - cut)):
            crashed = tmp_path / f"crashed-{cut}-{len(torn)}.db"
            crashed.write_bytes(base)
            crashed.with_name(f"{crashed.name}-wal").write_bytes(torn)
            with closing(Store(crashed, MAX_BYTES)) as store:
                assert read_all(store) == entries_from(1, events[:3])
                store.write(Change([(4, events[3])], total_events=4))
                assert read_all(store) == entries_from(1, events)


# --- Space. ---


def test_a_full_spool_refuses_and_takes_again_after_a_trim(path: Path, make_event: MakeEvent) -> None:
    with closing(Store(path, 1 << 20)) as store:

        def full_with(number: int) -> bool:
            try:
                store.write(Change([(number, make_event(number, padding=100_000))], total_events=number))
            except SpoolFull:
                return True
            return False

        last = next(number for number in range(1, 1000) if full_with(number))
        assert path.stat().st_size <= (1 << 20) + HEADROOM_BYTES
        stored = [sequence for sequence, _ in read_all(store)]
        assert stored == list(range(1, last))
        store.write(Change(published=last - 1))
        store.write(Change([(last, make_event(last, padding=100_000))], total_events=last))
        assert [sequence for sequence, _ in read_all(store)] == [last]


def test_used_bytes_follow_what_is_held(store: Store, make_event: MakeEvent) -> None:
    empty = store.contents(0).used_bytes
    events = [make_event(number, padding=500_000) for number in range(20)]
    full = store.write(Change(entries_from(1, events), total_events=20))
    assert full - empty >= 20 * 500_000
    assert store.write(Change(published=10)) <= full - 9 * 500_000
    assert store.write(Change(published=20)) <= empty + 2 * PAGE_SIZE


def test_the_file_is_given_back_after_a_backlog(path: Path, make_event: MakeEvent) -> None:
    events = [make_event(number, padding=1_000_000) for number in range(30)]
    with closing(Store(path, MAX_BYTES)) as store:
        store.write(Change(entries_from(1, events), total_events=30))
        store.write(Change(published=9, digests=b"d" * 16, dead=[((9, events[8]), "refused")]))
        used = store.write(Change(published=29))
        assert read_all(store) == entries_from(30, events[29:])
        assert store.contents(0).dead == {9: "refused"}
        assert [joined for _, joined in store.digests(0)] == [b"d" * 16, events[29].digest[:16]]
        assert store.contents(0).used_bytes <= used < 3_000_000
    assert path.stat().st_size < 3_000_000
    with closing(Store(path, MAX_BYTES)) as store:
        test_sqlite_is_told_to_lose_nothing(store)
        assert read_all(store) == entries_from(30, events[29:])


def test_the_file_is_given_back_when_hardly_anything_waits_any_more(
    store: Store, path: Path, make_event: MakeEvent
) -> None:
    events = [make_event(number, padding=1_000_000) for number in range(45)]
    store.write(Change(entries_from(1, events), total_events=45))
    full = spool_file.pages(store._reader)[0]
    store.write(Change(published=40))
    assert spool_file.pages(store._reader)[0] == full
    store.write(Change(published=44))
    assert spool_file.pages(store._reader)[0] < full / 10
    assert path.stat().st_size < full * PAGE_SIZE / 10


def test_the_file_is_not_given_back_while_much_is_left_in_it(store: Store, make_event: MakeEvent) -> None:
    events = [make_event(number, padding=1_000_000) for number in range(45)]
    store.write(Change(entries_from(1, events), total_events=45))
    full = spool_file.pages(store._reader)[0]
    store.write(Change(published=45, dead=[(entry, "refused") for entry in entries_from(1, events[:18])]))
    store.write(Change(entries_from(46, [make_event(46)]), total_events=46, published=46))
    # All of that would be in memory meanwhile.
    assert spool_file.pages(store._reader)[0] >= full


def test_a_file_that_cannot_be_given_back_takes_events_all_the_same_and_is_given_back_later(
    store: Store, path: Path, make_event: MakeEvent, caplog: pytest.LogCaptureFixture
) -> None:
    def pages() -> int:
        return spool_file.pages(store._reader)[0]

    events = [make_event(number, padding=1_000_000) for number in range(30)]
    store.write(Change(entries_from(1, events), total_events=30))
    full = pages()
    assert store._writer is not None
    store._writer.set_authorizer(lambda action, *_: sqlite3.SQLITE_DENY if action == sqlite3.SQLITE_ATTACH else 0)

    store.write(Change(published=30))
    assert [getattr(record, "action", "") for record in caplog.records] == ["spool_not_tidied"]
    for number in range(31, 36):
        store.write(Change([(number, make_event(number))], total_events=number, published=number - 1))
    assert [sequence for sequence, _ in read_all(store)] == [35]
    assert pages() == full

    store._compaction_failed_at -= 3600
    store.write(Change(published=35))
    assert pages() < full / 10
    assert len(caplog.records) == 1
