import asyncio
import random
import shutil
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from relay import backlog as backlog_module
from relay import spool as spool_module
from relay import store as store_module
from relay.batch import Entry
from relay.errors import SpoolFailed, SpoolFull, SpoolInUse
from relay.event import Event
from relay.inspection import Inspection, request
from relay.metrics import Metrics
from relay.spool import Spool
from relay.store import Change, Store
from relay.watermark import Watermark

MakeEvent = Callable[..., Event]
Until = Callable[[Callable[[], object]], Awaitable[None]]
MAX_BYTES = 1 << 28
EVERYTHING = (1 << 30, 1 << 40)


@asynccontextmanager
async def opened(path: Path, *, max_bytes: int = MAX_BYTES, dedupe_seconds: float = 300) -> AsyncIterator[Spool]:
    spool = await Spool.open(
        path, max_bytes=max_bytes, dedupe_seconds=dedupe_seconds, metrics=Metrics(CollectorRegistry())
    )
    try:
        yield spool
    finally:
        await spool.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "relay.db"


@pytest.fixture
async def spool(path: Path) -> AsyncIterator[Spool]:
    async with opened(path) as spool:
        yield spool


class Writes:
    """The writes to the file: counted, and failed or held back when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changes: list[Change] = []
        self.reads = 0
        self.fault: Exception | None = None
        self._before = self._after = threading.Event()
        self._before.set()
        self._after.set()
        write, read = Store.write, Store.read

        def observed_write(store: Store, change: Change) -> int:
            assert self._before.wait(10)
            self.changes.append(change)
            if self.fault is not None:
                raise self.fault
            used = write(store, change)
            assert self._after.wait(10)
            return used

        def observed_read(store: Store, after: int, before: int | None, max_events: int, max_bytes: int) -> list[Entry]:
            self.reads += 1
            return read(store, after, before, max_events, max_bytes)

        monkeypatch.setattr(Store, "write", observed_write)
        monkeypatch.setattr(Store, "read", observed_read)

    def hold(self) -> None:
        self._before = threading.Event()

    def hold_after(self) -> None:
        self._after = threading.Event()

    def release(self) -> None:
        self._before.set()
        self._after.set()


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    return Writes(monkeypatch)


def stored(path: Path) -> list[bytes]:
    # As any other process sees it: only what is committed.
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return [body for (body,) in connection.execute("SELECT body FROM events ORDER BY sequence")]


def remembered(path: Path) -> bytes:
    """What is remembered of published events: joined digests."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return b"".join(joined for (joined,) in connection.execute("SELECT digests FROM digests"))


def size_of(path: Path) -> int:
    return path.stat().st_size


async def take_all(spool: Spool) -> list[Entry]:
    taken: list[Entry] = []
    while piece := await spool.take(*EVERYTHING):
        taken += piece
    return taken


def bodies(entries: list[Entry]) -> list[bytes]:
    return [event.body for _, event in entries]


async def outcome_of(append: Awaitable[bool]) -> object:
    try:
        return await append
    except Exception as error:  # noqa: BLE001 - it is the outcome
        return type(error)


# --- Taking in. ---


async def test_an_event_is_in_the_file_when_append_returns(spool: Spool, path: Path, make_event: MakeEvent) -> None:
    for number in range(5):
        event = make_event(number)
        assert await spool.append(event) is True
        assert stored(path)[-1] == event.body
    assert len(stored(path)) == 5


async def test_append_does_not_return_before_the_commit(
    writes: Writes, spool: Spool, make_event: MakeEvent, until: Until
) -> None:
    writes.hold_after()
    append = asyncio.create_task(spool.append(make_event()))
    await until(lambda: writes.changes)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not append.done()
    assert spool.depth == 0
    writes.release()
    assert await append is True
    assert spool.depth == 1


async def test_events_that_arrive_together_share_a_commit(writes: Writes, spool: Spool, make_event: MakeEvent) -> None:
    events = [make_event(number) for number in range(500)]
    assert await asyncio.gather(*(spool.append(event) for event in events)) == [True] * 500
    assert len(writes.changes) <= 5
    assert bodies(await take_all(spool)) == [event.body for event in events]


async def test_what_arrives_during_a_commit_shares_the_next_one(
    writes: Writes, spool: Spool, make_event: MakeEvent, until: Until
) -> None:
    writes.hold()
    appends = [asyncio.create_task(spool.append(make_event(0)))]
    await asyncio.sleep(0)
    for number in range(1, 100):
        appends.append(asyncio.create_task(spool.append(make_event(number))))
        await asyncio.sleep(0)
    writes.release()
    assert all(await asyncio.gather(*appends))
    assert len(writes.changes) <= 3


async def test_a_commit_is_timed(path: Path, make_event: MakeEvent) -> None:
    registry = CollectorRegistry()
    spool = await Spool.open(path, max_bytes=MAX_BYTES, dedupe_seconds=300, metrics=Metrics(registry))
    await spool.append(make_event())
    assert registry.get_sample_value("relay_spool_commit_duration_seconds_count") == 1
    await spool.close()


async def test_a_handler_that_is_cancelled_takes_no_other_with_it(
    writes: Writes, spool: Spool, path: Path, make_event: MakeEvent
) -> None:
    writes.hold()
    appends = [asyncio.create_task(spool.append(make_event(number))) for number in range(3)]
    retry = asyncio.create_task(spool.append(make_event(1)))
    await asyncio.sleep(0)
    appends[1].cancel()
    writes.release()
    assert await appends[0] is await appends[2] is True
    with pytest.raises(asyncio.CancelledError):
        await appends[1]
    # It had been taken in, so its retry is one.
    assert await retry is False
    assert len(stored(path)) == 3


# --- Retries. ---


async def test_a_retry_is_recognised_and_not_stored_again(spool: Spool, path: Path, make_event: MakeEvent) -> None:
    assert await spool.append(make_event(1)) is True
    assert await spool.append(make_event(1)) is False
    assert await spool.append(make_event(1, workspace="acme")) is True
    assert len(stored(path)) == 2


async def test_a_retry_is_recognised_after_a_restart(path: Path, make_event: MakeEvent) -> None:
    async with opened(path) as spool:
        await spool.append(make_event(1))
        await spool.append(make_event(2, type_="LeadCapture"))
    async with opened(path) as spool:
        assert await spool.append(make_event(1)) is False
        assert await spool.append(make_event(2, type_="LeadCapture")) is False


async def test_a_retry_is_recognised_after_its_event_was_published_and_trimmed(
    path: Path, make_event: MakeEvent
) -> None:
    async with opened(path) as spool:
        await spool.append(make_event(1))
        spool.published((await take_all(spool))[-1][0])
    assert stored(path) == []
    async with opened(path) as spool:
        assert await spool.append(make_event(1)) is False


async def test_a_retry_waits_for_the_first_try_that_is_still_under_way(
    writes: Writes, spool: Spool, path: Path, make_event: MakeEvent, until: Until
) -> None:
    writes.hold_after()
    first = asyncio.create_task(spool.append(make_event()))
    await until(lambda: writes.changes)
    retry = asyncio.create_task(spool.append(make_event()))
    await asyncio.sleep(0)
    assert not retry.done()
    writes.release()
    assert (await first, await retry) == (True, False)
    assert len(stored(path)) == 1


async def test_without_a_window_every_delivery_is_an_event(path: Path, make_event: MakeEvent) -> None:
    async with opened(path, dedupe_seconds=0) as spool:
        assert await spool.append(make_event(type_="LeadCapture")) is True
        assert await asyncio.gather(*(spool.append(make_event()) for _ in range(3))) == [True] * 3
        assert await spool.append(make_event()) is True
        assert len(await take_all(spool)) == 5


@pytest.mark.parametrize("restart", [False, True])
async def test_after_an_answer_a_repeat_is_an_event_of_its_own(
    path: Path, make_event: MakeEvent, restart: bool
) -> None:
    lead = make_event(type_="LeadCapture")
    async with opened(path) as spool:
        assert await spool.append(lead) is True
        assert await spool.append(lead) is False
        spool.answered(lead)
        if not restart:
            assert await spool.append(lead) is True
            assert await spool.append(lead) is False
    async with opened(path) as spool:
        assert await spool.append(lead) is restart
        ids = [event.id for _, event in await take_all(spool)]
    assert ids == [lead.id, f"{lead.id}.2"]


@pytest.mark.parametrize("with_the_repeat", [False, True])
async def test_an_answer_is_not_forgotten_with_the_commit_that_failed_to_note_it(
    writes: Writes, path: Path, make_event: MakeEvent, with_the_repeat: bool
) -> None:
    lead = make_event(type_="LeadCapture")
    async with opened(path) as spool:
        await spool.append(lead)
        spool.answered(lead)
        writes.fault = SpoolFailed("no disk")
        with pytest.raises(SpoolFailed):
            await spool.append(lead if with_the_repeat else make_event())
        writes.fault = None
    async with opened(path) as spool:
        assert await spool.append(lead) is True


async def test_an_answer_to_a_retry_counts_too(spool: Spool, make_event: MakeEvent) -> None:
    lead = make_event(type_="LeadCapture")
    await spool.append(lead)
    assert await spool.append(lead) is False
    spool.answered(lead)
    assert await spool.append(lead) is True


# --- Faults. ---


async def test_a_commit_that_fails_fails_all_its_events_and_they_may_come_again(
    writes: Writes, spool: Spool, path: Path, make_event: MakeEvent
) -> None:
    events = [*(make_event(number) for number in range(10)), make_event(type_="LeadCapture")]
    writes.fault = SpoolFailed("no disk")
    outcomes = await asyncio.gather(*(outcome_of(spool.append(event)) for event in [*events, events[0]]))
    assert outcomes == [SpoolFailed] * 12
    assert stored(path) == []
    assert spool.depth == 0

    writes.fault = None
    assert await asyncio.gather(*(spool.append(event) for event in events)) == [True] * 11
    taken = await take_all(spool)
    assert bodies(taken) == [event.body for event in events]
    assert [event.id for _, event in taken] == [event.id for event in events]
    assert spool.depth == len(taken)


async def test_a_fault_that_nobody_thought_of_fails_its_events_alone(
    writes: Writes, spool: Spool, make_event: MakeEvent, caplog: pytest.LogCaptureFixture
) -> None:
    writes.fault = RuntimeError("out of luck")
    with pytest.raises(SpoolFailed, match="out of luck"):
        await spool.append(make_event(1))
    writes.fault = None
    assert await spool.append(make_event(1)) is True


async def test_a_spool_that_fails_and_recovers_says_so_once(
    writes: Writes, spool: Spool, make_event: MakeEvent, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    writes.fault = SpoolFailed("no disk")
    for number in range(5):
        with pytest.raises(SpoolFailed):
            await spool.append(make_event(number))
    writes.fault = None
    for number in range(5):
        await spool.append(make_event(number))
    assert [record.action for record in caplog.records if hasattr(record, "action")] == [
        "spool_failed",
        "spool_recovered",
    ]


async def test_the_depth_on_file_is_right_after_a_failed_commit(
    writes: Writes, path: Path, make_event: MakeEvent
) -> None:
    async with opened(path) as spool:
        await spool.append(make_event(1))
        writes.fault = SpoolFailed("no disk")
        await asyncio.gather(*(outcome_of(spool.append(make_event(number))) for number in range(2, 9)))
        writes.fault = None
        await spool.append(make_event(9))
    async with opened(path) as spool:
        assert spool.depth == 2
        assert bodies(await take_all(spool)) == [make_event(1).body, make_event(9).body]


async def test_a_trim_that_fails_is_tried_again(
    writes: Writes, path: Path, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "TRIM_SECONDS", 0.005)
    async with opened(path) as spool:
        await spool.append(make_event())
        writes.fault = SpoolFailed("no disk")
        spool.published((await take_all(spool))[-1][0])
        await until(lambda: len(writes.changes) >= 3)
        assert len(stored(path)) == 1
        writes.fault = None
        await until(lambda: not stored(path))


async def test_events_that_waited_for_longer_than_the_dedupe_window_leave_nothing_to_remember(
    path: Path, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "TRIM_SECONDS", 0.005)
    async with opened(path, dedupe_seconds=300) as spool:
        await spool.append(make_event(1))
        spool._clock_offset += 301
        await spool.append(make_event(2))
        spool.published((await take_all(spool))[-1][0])
        await until(lambda: not stored(path))
    assert remembered(path) == make_event(2).digest[:16]


async def test_an_idle_relay_forgets_what_the_dedupe_window_leaves_behind_and_gives_the_file_back(
    path: Path, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "TRIM_SECONDS", 0.005)
    monkeypatch.setattr(spool_module, "TIDY_SECONDS", 0.01)
    monkeypatch.setattr(store_module, "_LEFT_BYTES", 0)
    async with opened(path) as spool:
        for number in range(30):
            await spool.append(make_event(number, padding=1_000_000))
        spool.published((await take_all(spool))[-1][0])
        await until(lambda: not stored(path))
        assert remembered(path)
        assert size_of(path) > 20_000_000

        spool._clock_offset += 1000
        await until(lambda: not remembered(path))
        assert size_of(path) > 20_000_000
        monkeypatch.setattr(store_module, "_LEFT_BYTES", 16 << 20)
        await until(lambda: size_of(path) < 1_000_000)


async def test_a_full_spool_refuses_without_a_write_and_has_room_again_once_events_are_published(
    writes: Writes, path: Path, make_event: MakeEvent, until: Until
) -> None:
    async with opened(path, max_bytes=1 << 20) as spool:
        accepted = 0
        while await outcome_of(spool.append(make_event(accepted, padding=50_000))) is True:
            accepted += 1
        assert 10 <= accepted <= 20
        assert len(stored(path)) == accepted
        assert isinstance(await spool.probe(), SpoolFull) or spool.used_bytes < 1 << 20
        with pytest.raises(SpoolFull):
            await spool.append(make_event(999, padding=50_000))
        # A retry of what is stored takes no room.
        assert await spool.append(make_event(0, padding=50_000)) is False

        taken = await take_all(spool)
        spool.published(taken[-1][0])
        answers: list[object] = []
        while answers[-1:] != [True]:
            answers.append(await outcome_of(spool.append(make_event(999, padding=50_000))))
            assert len(answers) < 1000
            await asyncio.sleep(0)
        assert set(answers) <= {SpoolFull, True}
        assert await spool.probe() is None
        assert bodies(await take_all(spool)) == [make_event(999, padding=50_000).body]


async def test_events_under_way_count_against_the_limit(writes: Writes, path: Path, make_event: MakeEvent) -> None:
    async with opened(path, max_bytes=1 << 20) as spool:
        appends = [outcome_of(spool.append(make_event(number, padding=50_000))) for number in range(100)]
        outcomes = await asyncio.gather(*appends)
        assert set(outcomes) == {True, SpoolFull}
        assert outcomes == sorted(outcomes, key=lambda outcome: outcome is SpoolFull)
        assert len(stored(path)) == outcomes.count(True)


async def test_a_filling_spool_is_told_before_it_is_full(
    path: Path, make_event: MakeEvent, caplog: pytest.LogCaptureFixture, until: Until
) -> None:
    caplog.set_level("INFO")

    def actions() -> list[str]:
        return [record.action for record in caplog.records if hasattr(record, "action")]

    async with opened(path, max_bytes=1 << 20) as spool:
        for number in range(100):
            if actions():
                break
            await spool.append(make_event(number, padding=50_000))
        assert actions() == ["spool_filling"]
        assert await spool.probe() is None
        spool.published((await take_all(spool))[-1][0])
        await spool.append(make_event(999))
        await until(lambda: actions() == ["spool_filling", "spool_emptying"])


# --- Giving out. ---


async def test_events_are_given_once_in_the_order_of_their_arrival(spool: Spool, make_event: MakeEvent) -> None:
    events = [make_event(number) for number in range(50)]
    for start in range(0, 50, 10):
        await asyncio.gather(*(spool.append(event) for event in events[start : start + 10]))
    taken = await spool.take(7, 1 << 20)
    assert len(taken) == 7
    taken += await take_all(spool)
    assert bodies(taken) == [event.body for event in events]
    sequences = [sequence for sequence, _ in taken]
    assert sequences == sorted(set(sequences))
    assert await spool.take(*EVERYTHING) == []


async def test_a_publisher_that_keeps_up_never_reads_the_file(
    writes: Writes, spool: Spool, make_event: MakeEvent
) -> None:
    for number in range(20):
        await spool.append(make_event(number))
        assert bodies(await spool.take(1000, 1 << 20)) == [make_event(number).body]
    assert writes.reads == 0


async def test_a_backlog_stays_out_of_memory(
    writes: Writes, path: Path, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "MEMORY_BYTES", 100_000)
    async with opened(path) as spool:
        for start in range(0, 200, 20):
            await asyncio.gather(*(spool.append(make_event(start + n, padding=5_000)) for n in range(20)))
        assert sum(len(event.body) for _, event in spool._backlog._memory) <= 100_000
        taken: list[Entry] = []
        while piece := await spool.take(30, 1 << 30):
            taken += piece
        assert writes.reads > 1
        assert bodies(taken) == [make_event(number, padding=5_000).body for number in range(200)]
        # Caught up: soon what arrives comes from memory again.
        for number in range(900, 910):
            reads = writes.reads
            await spool.append(make_event(number))
            assert bodies(await spool.take(30, 1 << 30)) == [make_event(number).body]
        assert writes.reads == reads


async def test_an_event_that_is_read_before_its_commit_is_announced_is_given_once(
    writes: Writes, path: Path, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    monkeypatch.setattr(backlog_module, "MEMORY_BYTES", 1)
    async with opened(path) as spool:
        for number in range(5):
            await spool.append(make_event(number))
        writes.hold_after()
        append = asyncio.create_task(spool.append(make_event(5)))
        await until(lambda: len(stored(path)) == 6)
        taken = [*(await spool.take(2, 1 << 30)), *(await spool.take(2, 1 << 30)), *(await take_all(spool))]
        assert not append.done()
        writes.release()
        await append
        taken += await take_all(spool)
        assert bodies(taken) == [make_event(number).body for number in range(6)]
        assert spool.depth == 6
        spool.published(taken[-1][0])
        assert spool.depth == 0


@pytest.mark.parametrize("seed", range(15))
async def test_no_event_is_lost_doubled_or_out_of_order_however_arrival_and_taking_fall_together(
    path: Path, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(backlog_module, "MEMORY_BYTES", rng.choice([1, 300, 2_000, 20_000]))
    monkeypatch.setattr(spool_module, "TRIM_SECONDS", 0.001)
    write = Store.write

    def uneven_write(store: Store, change: Change) -> int:
        used = write(store, change)
        time.sleep(rng.choice([0, 0, 0.001]))  # So that what is committed is often not announced yet.
        return used

    monkeypatch.setattr(Store, "write", uneven_write)
    sent: list[bytes] = []
    arrived: list[bytes] = []  # Taken, and not given a second time by a restart.
    for _ in range(3):
        async with opened(path) as spool:
            appends: list[asyncio.Task[bool]] = []
            unpublished: list[Entry] = []
            assert spool.depth == len(sent) - len(arrived)
            for _ in range(rng.randrange(20, 60)):
                match rng.choice(["append", "append", "take", "take", "publish", "settle"]):
                    case "append":
                        for _ in range(rng.choice([1, 3, 10])):
                            event = make_event(len(sent), padding=rng.randrange(300))
                            sent.append(event.body)
                            appends.append(asyncio.create_task(spool.append(event)))
                        await asyncio.sleep(0)
                    case "take":
                        unpublished += await spool.take(rng.choice([1, 5, 50]), rng.choice([1, 1_000, 100_000]))
                    case "publish" if unpublished:
                        count = rng.randrange(1, len(unpublished) + 1)
                        spool.published(unpublished[count - 1][0])
                        arrived += bodies(unpublished[:count])
                        unpublished = unpublished[count:]
                    case _:
                        await asyncio.gather(*appends)
                sequences = [sequence for sequence, _ in unpublished]
                assert sequences == sorted(set(sequences))
                assert arrived + bodies(unpublished) == sent[: len(arrived) + len(unpublished)]
            assert all(await asyncio.gather(*appends))
            assert spool.depth == len(sent) - len(arrived)
    async with opened(path) as spool:
        arrived += bodies(await take_all(spool))
    assert arrived == sent


async def test_wait_returns_when_as_many_can_be_taken(spool: Spool, make_event: MakeEvent) -> None:
    waiting = asyncio.create_task(spool.wait(3))
    for number in range(2):
        await spool.append(make_event(number))
    await asyncio.sleep(0)
    assert not waiting.done()
    await spool.append(make_event(2))
    await asyncio.wait_for(waiting, 5)
    await asyncio.wait_for(spool.wait(), 5)
    await take_all(spool)
    waiting = asyncio.create_task(spool.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    waiting.cancel()
    await spool.append(make_event(3))
    await asyncio.wait_for(spool.wait(), 5)


async def test_it_is_drained_when_all_is_published_and_not_before(spool: Spool, make_event: MakeEvent) -> None:
    await asyncio.wait_for(spool.drained(), 5)
    for number in range(3):
        await spool.append(make_event(number))
    drained = asyncio.create_task(spool.drained())
    taken = await take_all(spool)
    spool.published(taken[1][0])
    await asyncio.sleep(0)
    assert not drained.done()
    spool.published(taken[2][0])
    await asyncio.wait_for(drained, 5)


async def test_what_is_published_is_trimmed_without_another_append(
    path: Path, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "TRIM_SECONDS", 0.005)
    async with opened(path) as spool:
        for number in range(3):
            await spool.append(make_event(number))
        taken = await take_all(spool)
        spool.published(taken[1][0])
        await until(lambda: stored(path) == [make_event(2).body])
        spool.published(taken[2][0])
        await until(lambda: stored(path) == [])


async def test_depth_and_age_tell_of_what_is_not_published(spool: Spool, make_event: MakeEvent) -> None:
    now = time.time_ns() // 1_000_000
    assert (spool.depth, spool.oldest_age) == (0, 0.0)
    await spool.append(make_event(1, received_at=now - 60_000))
    await spool.append(make_event(2, received_at=now - 10_000))
    await spool.append(make_event(3, received_at=now + 60_000))
    assert spool.depth == 3
    assert 60 <= spool.oldest_age < 65
    (first, second, third) = await take_all(spool)
    assert spool.depth == 3
    assert 60 <= spool.oldest_age < 65
    spool.published(first[0])
    assert 10 <= spool.oldest_age < 15
    spool.published(second[0])
    assert (spool.depth, spool.oldest_age) == (1, 0.0)
    spool.published(third[0])
    assert (spool.depth, spool.oldest_age) == (0, 0.0)


async def test_the_age_of_a_backlog_that_memory_does_not_hold_is_known_before_anything_is_published(
    spool: Spool, make_event: MakeEvent
) -> None:
    now = time.time_ns() // 1_000_000
    for number in range(3):
        padding = backlog_module.MEMORY_BYTES // 2
        await spool.append(make_event(number, received_at=now - 60_000 + number, padding=padding))
    assert 60 <= spool.oldest_age < 65


async def test_the_age_of_a_backlog_is_known_after_a_restart(path: Path, make_event: MakeEvent) -> None:
    async with opened(path) as spool:
        await spool.append(make_event(1, received_at=time.time_ns() // 1_000_000 - 60_000))
    async with opened(path) as spool:
        assert 60 <= spool.oldest_age < 70


# --- Restarts. ---


async def test_a_spool_goes_on_where_it_was(path: Path, make_event: MakeEvent) -> None:
    async with opened(path) as spool:
        identity = spool.identity
        for number in range(10):
            await spool.append(make_event(number))
        taken = await spool.take(6, 1 << 20)
        spool.published(taken[3][0])
    async with opened(path) as spool:
        assert spool.identity == identity
        assert spool.depth == 6
        await spool.append(make_event(10))
        again = await take_all(spool)
        assert bodies(again) == [make_event(number).body for number in range(4, 11)]
        assert again[:2] == taken[4:6]
        assert again[-1][0] > again[-2][0]


async def test_a_backlog_comes_before_what_arrives_after_the_start(
    path: Path, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backlog_module, "MEMORY_BYTES", 2_000)
    async with opened(path) as spool:
        await asyncio.gather(*(spool.append(make_event(number)) for number in range(25)))
        await asyncio.gather(*(spool.append(make_event(number)) for number in range(25, 50)))
    async with opened(path) as spool:
        taken: list[Entry] = []
        for start in range(50, 120, 10):
            await asyncio.gather(*(spool.append(make_event(start + number)) for number in range(10)))
            taken += await spool.take(1, 1 << 20)
        taken += await take_all(spool)
        assert bodies(taken) == [make_event(number).body for number in range(120)]


async def test_a_spool_has_one_owner(spool: Spool, path: Path) -> None:
    with pytest.raises(SpoolInUse):
        await Spool.open(path, max_bytes=MAX_BYTES, dedupe_seconds=300, metrics=Metrics(CollectorRegistry()))


async def test_closing_writes_what_is_under_way(path: Path, make_event: MakeEvent) -> None:
    async with opened(path) as spool:
        appends = [asyncio.create_task(spool.append(make_event(number))) for number in range(20)]
        await asyncio.sleep(0)
    assert all(await asyncio.gather(*appends))
    assert len(stored(path)) == 20


async def test_a_spool_whose_disk_fails_can_be_closed(writes: Writes, path: Path, make_event: MakeEvent) -> None:
    async with opened(path) as spool:
        await spool.append(make_event())
        spool.published((await take_all(spool))[-1][0])
        writes.fault = SpoolFailed("no disk")
    writes.fault = None
    async with opened(path) as spool:
        assert bodies(await take_all(spool)) == [make_event().body]


async def test_nothing_is_left_running_after_the_close(path: Path, make_event: MakeEvent) -> None:
    before = threading.active_count()
    async with opened(path) as spool:
        await spool.append(make_event())
    assert not [thread for thread in threading.enumerate() if "spool" in thread.name]
    assert threading.active_count() <= before + 1  # asyncio's own worker.


# --- Dead events. ---


async def test_a_full_spool_keeps_no_refused_event_in_the_way_of_others(path: Path, make_event: MakeEvent) -> None:
    limit = 16 << 20
    large = make_event(0, padding=12 << 20)
    small = [make_event(number, padding=20_000) for number in range(1, 400)]
    async with opened(path, max_bytes=limit) as spool:
        await spool.append(large)
        outcomes = await asyncio.gather(*(spool.append(event) for event in small), return_exceptions=True)
        assert any(isinstance(outcome, SpoolFull) for outcome in outcomes), "there is room left"
        entries = await take_all(spool)
        await spool.bury(entries[0], "too large")
        size = size_of(path)
    # The announcement is still to come, and here as there its body is among the dead.
    with closing(Inspection(path)) as inspection:
        assert [waiting.event.body for waiting in inspection.waiting(bodies=True)] == [large.body, *bodies(entries[1:])]
    async with opened(path, max_bytes=limit) as spool:
        again = await take_all(spool)
        assert again[0] == (entries[0][0], large._replace(body=b""))
        assert again[1:] == entries[1:]
        assert spool.dead == {entries[0][0]: "too large"}
        spool.published(again[-1][0])
    with closing(Inspection(path)) as inspection:
        assert inspection.dead_event(entries[0][0]).event == large
        assert not list(inspection.waiting(bodies=True))
    assert size_of(path) <= size


async def test_a_dead_event_is_kept_with_its_body_before_bury_returns(path: Path, make_event: MakeEvent) -> None:
    async with opened(path) as spool:
        await spool.append(make_event(1, padding=1000))
        (entry,) = await take_all(spool)
        await spool.bury(entry, "too large")
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            assert connection.execute("SELECT sequence, body, error FROM dead").fetchall() == [
                (entry[0], entry[1].body, "too large")
            ]
        assert spool.dead == {entry[0]: "too large"}
        spool.published(entry[0])
    async with opened(path) as spool:
        assert spool.dead == {entry[0]: "too large"}
        assert spool.depth == 0


async def test_an_event_that_cannot_be_buried_is_not_dead(writes: Writes, spool: Spool, make_event: MakeEvent) -> None:
    await spool.append(make_event())
    (entry,) = await take_all(spool)
    writes.fault = SpoolFailed("no disk")
    with pytest.raises(SpoolFailed):
        await spool.bury(entry, "too large")
    assert spool.dead == {}


# --- Dead events that are to be published after all. ---


async def dead_ones(spool: Spool, make_event: MakeEvent, numbers: Sequence[int], **event: object) -> list[Entry]:
    """Dead events, announced as such, with one that is on Kafka before and after each."""
    dead = []
    for number in numbers:
        for event_ in (make_event(100 + number), make_event(number, **event), make_event(200 + number)):
            await spool.append(event_)
        entries = await take_all(spool)
        await spool.bury(entries[1], "too large")
        spool.published(entries[-1][0])
        dead.append(entries[1])
    await noted(spool)
    return dead


async def noted(spool: Spool) -> None:
    """Returns when the file knows what is published."""
    spool._flush()
    async with asyncio.timeout(10):
        while spool._writing or spool._gathering:  # noqa: ASYNC110 - nothing is to be waited for
            await asyncio.sleep(0.001)


async def test_a_requeued_event_comes_after_all_others_as_it_was(
    spool: Spool, path: Path, make_event: MakeEvent
) -> None:
    (dead,) = await dead_ones(spool, make_event, [1])
    await spool.append(make_event(300))
    request(path, [dead[0]])

    assert await spool.requeue() == [dead[0]]

    await spool.append(make_event(301))
    entries = await take_all(spool)
    assert [event for _, event in entries] == [make_event(300), dead[1], make_event(301)]
    assert [sequence for sequence, _ in entries] == sorted({sequence for sequence, _ in entries})
    assert entries[0][0] > dead[0]
    assert spool.dead == {}
    assert await spool.requeue() == []
    assert spool.depth == 3


async def test_several_are_requeued_in_the_order_of_their_sequence(
    path: Path, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "REQUEUE_BYTES", 2500)
    async with opened(path) as spool:
        dead = await dead_ones(spool, make_event, range(5), padding=1000)
        for sequence, _ in reversed(dead[1:]):
            request(path, [sequence])
        pieces = [await spool.requeue() for _ in range(3)]
        assert pieces == [[sequence for sequence, _ in piece] for piece in (dead[1:4], dead[4:], [])]
        assert [event for _, event in await take_all(spool)] == [event for _, event in dead[1:]]
        assert list(spool.dead) == [dead[0][0]]


async def test_a_requeued_event_is_in_the_file_with_its_return_and_no_more_dead(
    path: Path, make_event: MakeEvent
) -> None:
    async with opened(path) as spool:
        (dead,) = await dead_ones(spool, make_event, [1])
        request(path, None)
        await spool.requeue()
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            counts = [connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in ("dead", "requests")]
        assert counts == [0, 0]
        assert stored(path) == [dead[1].body]
    async with opened(path) as spool:
        assert spool.dead == {}
        assert spool.depth == 1
        assert [event for _, event in await take_all(spool)] == [dead[1]]
        assert await spool.requeue() == []


async def test_a_requeued_event_whose_commit_fails_is_dead_and_requested_as_before(
    writes: Writes, path: Path, make_event: MakeEvent
) -> None:
    async with opened(path) as spool:
        (dead,) = await dead_ones(spool, make_event, [1])
        request(path, None)
        writes.fault = SpoolFull("no space left on device")
        with pytest.raises(SpoolFull):
            await spool.requeue()
        assert list(spool.dead) == [dead[0]]
        assert spool.depth == 0
        # What did not fit is no measure of what senders may deliver.
        writes.fault = None
        assert await spool.probe() is None
        assert await spool.requeue() == [dead[0]]
        assert [event for _, event in await take_all(spool)] == [dead[1]]
        assert spool.depth == 1


async def test_an_event_that_is_not_announced_as_dead_yet_is_not_requeued(
    spool: Spool, path: Path, make_event: MakeEvent
) -> None:
    # It is about to be published under its sequence: what is announced there is decided by its being dead.
    await spool.append(make_event(1))
    (entry,) = await take_all(spool)
    await spool.bury(entry, "too large")
    request(path, [entry[0]])
    assert await spool.requeue() == []
    assert list(spool.dead) == [entry[0]]
    spool.published(entry[0])
    await noted(spool)
    assert await spool.requeue() == [entry[0]]


async def test_a_spool_full_of_dead_events_takes_them_up_and_has_room_again(path: Path, make_event: MakeEvent) -> None:
    limit = 4 << 20
    async with opened(path, max_bytes=limit) as spool:
        with pytest.raises(SpoolFull):
            await dead_ones(spool, make_event, range(20), padding=300_000)
        assert spool.used_bytes > limit - 400_000
        request(path, None)
        while await spool.requeue():
            entries = await take_all(spool)
            spool.published(entries[-1][0])
        await noted(spool)
        assert spool.dead == {}
        assert spool.used_bytes < 1 << 20
        assert await spool.append(make_event(999, padding=300_000)) is True


@pytest.mark.parametrize("type_", ["Message", "LeadCapture"])
async def test_the_dedupe_memory_knows_nothing_of_a_requeue(path: Path, make_event: MakeEvent, type_: str) -> None:
    # A repeat of its body has its own count and its own answer.
    repeatable = type_ == "LeadCapture"
    async with opened(path) as spool:
        (dead,) = await dead_ones(spool, make_event, [1], type_=type_)
        spool.answered(dead[1])
        assert await spool.append(dead[1]) is repeatable
        if repeatable:
            spool.answered(dead[1])
        request(path, None)
        assert await spool.requeue() == [dead[0]]
        assert await spool.append(dead[1]) is repeatable
        ids = [event.id for _, event in await take_all(spool)]
        digest = dead[1].digest.hex()
        assert ids == ([f"{digest}.2", digest, f"{digest}.3"] if repeatable else [digest])


async def test_a_retry_waits_for_its_first_try_beside_a_requeued_event_with_the_same_body(
    writes: Writes, path: Path, make_event: MakeEvent, until: Until
) -> None:
    async with opened(path) as spool:
        (dead,) = await dead_ones(spool, make_event, [1])
        spool._clock_offset += 1000  # Out of the window: the next delivery of it is an event.
        request(path, None)
        writes.hold_after()
        requeue = asyncio.create_task(spool.requeue())
        await until(lambda: any(change.requeued for change in writes.changes))
        first = asyncio.create_task(spool.append(dead[1]))
        await asyncio.sleep(0)
        writes.release()
        await requeue
        retry = asyncio.create_task(spool.append(dead[1]))
        assert await first is True
        assert await retry is False
        assert spool.depth == 2


# --- Watermarks. ---


async def test_a_spool_knows_its_own_watermark(path: Path, make_event: MakeEvent) -> None:
    async with opened(path) as spool:
        assert spool.resume(None) == 0
        for number in range(5):
            await spool.append(make_event(number))
        watermark = spool.watermark((await spool.take(3, 1 << 20))[-1][0])
        assert spool.resume(watermark) == watermark.sequence
    async with opened(path) as spool:
        await spool.append(make_event(9))
        assert spool.resume(watermark) == watermark.sequence
        later = spool.watermark((await take_all(spool))[-1][0])
    async with opened(path) as spool:
        assert spool.resume(later) == later.sequence


async def test_a_watermark_that_is_missed_is_told_once(
    path: Path, make_event: MakeEvent, caplog: pytest.LogCaptureFixture
) -> None:
    def told() -> list[object]:
        return [vars(record)["published"] for record in caplog.records if "watermark_lost" in vars(record).values()]

    async with opened(path) as spool:
        await spool.append(make_event(1))
        assert spool.resume(None) == 0
        assert told() == []
        (entry,) = await take_all(spool)
        spool.published(entry[0])
        assert spool.resume(None) == 0
        assert spool.resume(None) == 0
        assert told() == [entry[0]]
    async with opened(path) as spool:
        assert spool.resume(None) == 0
        assert told() == [entry[0]] * 2


async def test_the_watermark_of_another_spool_covers_nothing(
    spool: Spool, tmp_path: Path, make_event: MakeEvent
) -> None:
    await spool.append(make_event())
    async with opened(tmp_path / "other.db") as other:
        await other.append(make_event())
        assert spool.resume(other.watermark(1)) == 0


async def test_what_a_machine_that_was_set_back_accepts_is_published_whatever_kafka_has(
    spool: Spool, make_event: MakeEvent, caplog: pytest.LogCaptureFixture
) -> None:
    await spool.append(make_event(1))
    (first,) = await take_all(spool)
    spool.published(first[0])
    # From a time that this machine knows nothing of.
    undone = spool.watermark(first[0])._replace(sequence=first[0] + 5)
    for number in range(2, 5):
        await spool.append(make_event(number))
    assert spool.resume(undone) == first[0]
    assert "spool_set_back" in [getattr(record, "action", "") for record in caplog.records]
    for number in range(5, 15):
        await spool.append(make_event(number))
    assert spool.resume(undone) == first[0]

    last = (await take_all(spool))[-1][0]
    assert last > undone.sequence
    assert spool.resume(spool.watermark(last)) == last


async def test_a_restored_copy_skips_what_both_published_and_nothing_else(
    path: Path, tmp_path: Path, make_event: MakeEvent, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy.db"
    async with opened(path) as spool:
        for number in range(5):
            await spool.append(make_event(number))
    shutil.copy(path, copy)
    async with opened(path) as spool:
        for number in range(5, 8):
            await spool.append(make_event(number))
        on_kafka = spool.watermark((await take_all(spool))[-1][0])

    async with opened(copy) as spool:
        await spool.append(make_event(100))
        covered = spool.resume(on_kafka)
        await spool.append(make_event(101))
        entries = await take_all(spool)
        assert bodies([entry for entry in entries if entry[0] > covered]) == [
            make_event(100).body,
            make_event(101).body,
        ]
        # What is given from now on is beyond all that readers of the topics have seen.
        assert entries[-1][0] > on_kafka.sequence
        assert "spool_restored" in [getattr(record, "action", "") for record in caplog.records]
        # And from here on this history is the one that counts.
        assert spool.resume(Watermark.decode(spool.watermark(entries[-1][0]).encode())) == entries[-1][0]
