"""An hour without the schema registry, on a clock that jumps from one thing that happens to the next."""

import asyncio
import gc
import itertools
import logging
import selectors
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Self

import pytest

from relay.batch import Entry
from relay.errors import RegistryError, RegistryFailed, RegistryUnreachable
from relay.event import Event
from relay.framer import Framer
from relay.framing import Registered, fingerprint, registrations
from relay.memory import MemoryQueue
from relay.metrics import Metrics
from relay.publisher import Publisher
from relay.record import Record, RecordMaker, Topics
from relay.schema_ids import MAX_BACKOFF, SchemaIds
from relay.watermark import Watermark

MINUTE, HOUR = 60, 3600
TOPICS = Topics("chats", "dead")


class JumpingLoop(asyncio.SelectorEventLoop):
    """Waits for nothing: where there is nothing to do, its time is already that of the next timer."""

    def __init__(self) -> None:
        self.now = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now


class _Jumping(selectors.DefaultSelector):
    def __init__(self, loop: JumpingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready: list[Any] = super().select(0)
        if not ready and timeout:
            self._loop.now += timeout
        return ready


class Schema:
    ce_type = "chat.rocket.omnichannel.message.saved"
    text = '{"v": 1}'


class AwayRegistry:
    """A registry that fails with *error*, until there is none; notes when it was asked."""

    url = "http://registry"

    def __init__(self) -> None:
        self.error: RegistryError | None = RegistryUnreachable("chats", "nobody there")
        self.asked_at: list[float] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def register(self, subject: str, _: str) -> Registered:
        self.asked_at.append(asyncio.get_running_loop().time())
        if self.error:
            raise self.error
        return Registered(subject, 7)

    look_up = register


class Backlog:
    """Events that lie ready."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.dead: dict[int, str] = {}
        self._untaken = list(entries)
        self.depth = len(entries)

    async def wait(self, _: int = 1) -> None:
        if not self._untaken:
            await asyncio.get_running_loop().create_future()

    async def take(self, max_events: int, _: int) -> list[Entry]:
        taken, self._untaken = self._untaken[:max_events], self._untaken[max_events:]
        return taken

    def published(self, _: int) -> None:
        self.depth = len(self._untaken)

    async def bury(self, _: Entry, __: str) -> None:
        raise AssertionError

    def watermark(self, sequence: int) -> Watermark:
        return Watermark(sequence, ())

    def resume(self, _: Watermark | None) -> int:
        return 0


class FakeKafka:
    spent, transactional = False, True

    def __init__(self) -> None:
        self.records: list[Record] = []

    async def start(self) -> Watermark | None:
        return None

    async def publish(self, records: Sequence[Record], _: Watermark) -> None:
        self.records += records

    async def try_partition(self, _: Record) -> None:
        raise AssertionError("nothing is refused here")

    async def close(self) -> None:
        pass


def test_an_hour_without_the_registry_costs_little_and_ends_by_itself(
    make_event: Callable[..., Event], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    schema, registry, kafka, metrics = Schema(), AwayRegistry(), FakeKafka(), Metrics()
    wanted = registrations("topic-record", [("chats", schema)])
    prints = {"Message": fingerprint(schema.text)}
    grown = 0

    async def hour() -> None:
        nonlocal grown
        entries = [(n, make_event(n)._replace(schema=prints["Message"])) for n in range(1, 2501)]
        ids = SchemaIds(
            registry, MemoryQueue(dedupe_seconds=0), framing="prefix", register=True, wanted=lambda: wanted,
            metrics=metrics,
        )  # fmt: skip
        framer = Framer(ids, TOPICS, "topic-record", prints, None, enforce=True)
        backlog = Backlog(entries)
        publisher = Publisher(backlog, lambda: kafka, RecordMaker(TOPICS, lambda _: None, framer), metrics, framer)
        tasks = [asyncio.create_task(ids.run()), asyncio.create_task(publisher.run())]

        await asyncio.sleep(10 * MINUTE)
        before = _allocated()
        await asyncio.sleep(10 * MINUTE)
        registry.error = RegistryFailed("chats", "503")
        await asyncio.sleep(20 * MINUTE)
        registry.error = RegistryUnreachable("chats", "nobody there")
        await asyncio.sleep(20 * MINUTE)
        grown = _allocated() - before
        assert (kafka.records, ids.connected, list(ids.errors)) == ([], False, [wanted[0].subject])

        registry.error = None
        await asyncio.sleep(MAX_BACKOFF + 1)
        assert (backlog.depth, ids.errors) == (0, {})
        for task in tasks:
            assert not task.done()
            task.cancel()
        await asyncio.wait(tasks)

    tracemalloc.start()
    try:
        with asyncio.Runner(loop_factory=JumpingLoop) as runner:
            runner.run(hour())
    finally:
        tracemalloc.stop()

    frame = b"\0" + (7).to_bytes(4, "big")
    assert [dict(it.headers)["relay_sequence"] for it in kafka.records] == [b"%d" % n for n in range(1, 2501)]
    assert {it.value[:5] for it in kafka.records} == {frame}
    during = [at for at in registry.asked_at if at <= HOUR]
    gaps = [after - before for before, after in itertools.pairwise(during)]
    assert max(gaps) <= MAX_BACKOFF
    # Soon at first, then between half the longest wait and all of it, never in step with other relays.
    assert sum(gaps[:5]) < 10
    assert all(gap >= MAX_BACKOFF / 2 for gap in gaps[10:])
    assert HOUR / MAX_BACKOFF <= len(during) <= 2 * HOUR / MAX_BACKOFF
    assert len({round(gap, 1) for gap in gaps[10:]}) > 30
    # One line for each change: unreachable, failing, unreachable, well.
    said = Counter(getattr(record, "action", "") for record in caplog.records)
    assert (said["registry_failed"], said["registry_connected"]) == (3, 1)
    # The gaps' own list and three log lines.
    assert grown < 100_000


def _allocated() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]
