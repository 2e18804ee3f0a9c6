import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from relay import requeue as requeue_module
from relay.errors import RelayError, SpoolFailed, SpoolFull
from relay.requeue import requeue_what_is_requested

Until = Callable[[Callable[[], object]], Awaitable[None]]


class FakeSpool:
    """Dead events that are asked for, in pieces; an error stands for a look that failed."""

    def __init__(self, *pieces: list[int] | RelayError) -> None:
        self._pieces = list(pieces)
        self.looks = 0

    async def requeue(self) -> list[int]:
        self.looks += 1
        piece = self._pieces.pop(0) if self._pieces else []
        if isinstance(piece, RelayError):
            raise piece
        return piece


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the pauses that were made, none of which took time."""
    made: list[float] = []
    sleep = asyncio.sleep

    async def at_once(seconds: float) -> None:
        if seconds >= requeue_module.PIECE_SECONDS:
            made.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", at_once)
    return made


@asynccontextmanager
async def looking(spool: FakeSpool) -> AsyncIterator[None]:
    task = asyncio.create_task(requeue_what_is_requested(spool))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def test_it_looks_at_once_and_then_every_second(pauses: list[float], until: Until) -> None:
    spool = FakeSpool()
    async with looking(spool):
        await until(lambda: spool.looks >= 3)
    assert set(pauses) == {requeue_module.LOOK_SECONDS}


async def test_many_are_taken_up_piece_after_piece_and_told(
    pauses: list[float], caplog: pytest.LogCaptureFixture, until: Until
) -> None:
    caplog.set_level(logging.INFO)
    spool = FakeSpool([3, 4], [9])
    async with looking(spool):
        await until(lambda: spool.looks >= 4)
    assert pauses[:3] == [requeue_module.PIECE_SECONDS, requeue_module.PIECE_SECONDS, requeue_module.LOOK_SECONDS]
    assert [vars(record)["sequences"] for record in caplog.records if hasattr(record, "sequences")] == [[3, 4], [9]]


async def test_a_disk_without_room_is_told_once_and_tried_again(
    pauses: list[float], caplog: pytest.LogCaptureFixture, until: Until
) -> None:
    spool = FakeSpool(SpoolFull("no room"), SpoolFailed("no disk"), [3], [], SpoolFull("no room"))
    async with looking(spool):
        await until(lambda: spool.looks >= 6)
    assert pauses[:2] == [requeue_module.RETRY_SECONDS] * 2
    failures = [record.getMessage() for record in caplog.records if vars(record).get("action") == "requeue_failed"]
    assert failures == ["Dead events stay dead for now: no room"] * 2
