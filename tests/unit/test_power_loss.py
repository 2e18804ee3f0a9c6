"""What was answered survives the loss of power, at any moment and whatever was not fsynced: no kill could show that."""

import asyncio
import os
import random
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from power_loss import Disk
from prometheus_client import CollectorRegistry

from relay import spool as spool_module
from relay import store as store_module
from relay.errors import SpoolFailed
from relay.event import Event
from relay.metrics import Metrics
from relay.spool import Spool
from relay.store import Change, Store

MakeEvent = Callable[..., Event]
MAX_BYTES = 1 << 28
EVERYTHING = (1 << 30, 1 << 40)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool" / "relay.db"


async def opened(path: Path) -> Spool:
    return await Spool.open(path, max_bytes=MAX_BYTES, dedupe_seconds=300, metrics=Metrics(CollectorRegistry()))


class Found(NamedTuple):
    """What a start finds: up to which sequence events are published, and the bodies of those beyond."""

    published: int
    bodies: list[bytes]


def found(files: Mapping[str, bytes], directory: Path) -> Found:
    directory.mkdir()
    for name, content in files.items():
        (directory / Path(name).name).write_bytes(content)
    with closing(Store(directory / "relay.db", MAX_BYTES)) as store:
        published = store.contents(0).progress.published
        return Found(published, [event.body for _, event in store.read(published, None, *EVERYTHING)])


async def test_an_event_survives_a_power_cut_right_after_its_answer(
    path: Path, tmp_path: Path, make_event: MakeEvent
) -> None:
    disk, left = Disk(), []
    events = [make_event(number, padding=number % 7 * 3_000) for number in range(25)]
    with disk.in_use():
        spool = await opened(path)
        for event in events:
            await spool.append(event)
            left.append(disk.after_a_power_cut())
        await spool.close()
    for count, files in enumerate(left, start=1):
        assert found(files, tmp_path / str(count)).bodies == [event.body for event in events[:count]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", ["power cut", "power cut on a disk whose fsync fails at times", "kill"])
async def test_every_answered_event_is_there_after_a_fault_at_any_moment(
    path: Path, tmp_path: Path, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch, *, seed: int, fault: str
) -> None:
    monkeypatch.setattr(spool_module, "TRIM_SECONDS", 0.005)
    monkeypatch.setattr(store_module, "_FREE_BYTES", 50_000)
    monkeypatch.setattr(store_module, "_WAITING_BYTES", 20_000)
    rng, of_the_disk = random.Random(seed), random.Random(seed)
    disk = Disk()
    answered: list[bytes] = []
    given: dict[int, bytes] = {}  # Taken by the publisher, by sequence.
    published = 0
    left: list[tuple[Mapping[str, bytes], set[bytes], int]] = []

    def look() -> None:
        if of_the_disk.random() < 0.05:
            answered_by_now = set(answered)  # Before the files: what is answered meanwhile may be missing there.
            if fault == "kill":
                files: Mapping[str, bytes] = {
                    name: Path(name).read_bytes() for name in disk.files if Path(name).exists()
                }
            else:
                files = disk.after_a_power_cut(of_the_disk)
            left.append((files, answered_by_now, published))

    async def deliver(event: Event) -> None:
        while True:
            with suppress(SpoolFailed):
                await spool.append(event)
                answered.append(event.body)
                return

    with disk.in_use():
        spool = await opened(path)
        disk.at_each_moment = look
        if "fails" in fault:
            disk.fails = lambda: of_the_disk.random() < 0.05
        number = 0
        for _ in range(60):
            batch = [make_event(number + more, padding=rng.choice([0, 500, 9_000])) for more in range(rng.randrange(6))]
            number += len(batch)
            await asyncio.gather(*(deliver(event) for event in batch))
            entries = await spool.take(rng.randrange(1, 8), 1 << 20)
            given.update((sequence, event.body) for sequence, event in entries)
            if entries and rng.random() < 0.7:
                published = entries[rng.randrange(len(entries))][0]
                spool.published(published)
        disk.fails = lambda: False
        await spool.close()

    assert len(left) > 10
    for place, (files, answered_by_now, published_by_now) in enumerate(left):
        mark, bodies = found(files, tmp_path / str(place))
        assert mark <= published_by_now
        gone = {body for sequence, body in given.items() if sequence <= mark}
        assert answered_by_now - gone <= set(bodies)
        assert len(bodies) == len(set(bodies))


async def test_a_power_cut_while_the_spool_is_made_leaves_what_can_be_opened(path: Path, tmp_path: Path) -> None:
    rng = random.Random(0)
    disk = Disk()
    left: list[Mapping[str, bytes]] = []
    disk.at_each_moment = lambda: left.append(disk.after_a_power_cut(rng))
    with disk.in_use():
        await (await opened(path)).close()
    assert len(left) > 10
    for place, files in enumerate(left):
        assert found(files, tmp_path / str(place)) == Found(0, [])


async def test_an_event_whose_fsync_failed_is_not_answered_and_one_that_comes_after_it_lasts(
    path: Path, tmp_path: Path, make_event: MakeEvent
) -> None:
    disk = Disk()
    with disk.in_use():
        spool = await opened(path)
        await spool.append(make_event(1))
        disk.fails = lambda: True
        with pytest.raises(SpoolFailed):
            await spool.append(make_event(2))
        disk.fails = lambda: False
        await spool.append(make_event(3))
        files = disk.after_a_power_cut()
        await spool.close()
    assert found(files, tmp_path / "after").bodies == [make_event(1).body, make_event(3).body]


def test_the_names_of_the_spool_and_of_its_new_directories_are_durable_once_it_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_event: MakeEvent
) -> None:
    synced: list[os.stat_result] = []
    fsync = os.fsync

    def observed(descriptor: int) -> None:
        synced.append(os.fstat(descriptor))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", observed)
    path = tmp_path / "new" / "newer" / "relay.db"
    with closing(Store(path, MAX_BYTES)) as store:
        for directory in (tmp_path, tmp_path / "new", tmp_path / "new" / "newer"):
            assert any(os.path.samestat(directory.stat(), it) for it in synced), directory
        store.write(Change([(1, make_event())], total_events=1))
