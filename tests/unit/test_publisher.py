import asyncio
import logging
import shutil
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from spool_moments import copy_spool

from relay import publisher as publisher_module
from relay.batch import Entry
from relay.errors import (
    Fenced,
    KafkaLost,
    KafkaTimeout,
    KafkaUnreachable,
    RecordsRefused,
    SpoolFailed,
    TopicsMissing,
)
from relay.event import DeadLetterReason, Event
from relay.metrics import Metrics
from relay.publisher import Publisher
from relay.record import Record, RecordMaker, Topics
from relay.spool import Spool
from relay.watermark import Watermark

MakeEvent = Callable[..., Event]
Until = Callable[[Callable[[], object]], Awaitable[None]]
POISON = b"poison"


class FakeKafka:
    """A cluster with one spool's watermark: what is committed, and what goes wrong next."""

    def __init__(self, *, transactional: bool = True) -> None:
        self.transactional = transactional
        self.committed: list[Record] = []
        self.cycles: list[list[Record]] = []
        self.watermark: Watermark | None = None
        #: What the next starts and publishes raise; None for those that work.
        self.start_faults: deque[Exception | None] = deque()
        self.faults: deque[Exception | None] = deque()
        #: Raised after the commit: the answer was lost.
        self.late_faults: deque[Exception | None] = deque()
        self.on_fault: Callable[[], None] = lambda: None
        #: The places of so many records, batch by batch, if a refusal tells of them.
        self.batches: Callable[[int], list[Sequence[int]]] = lambda _: []
        #: The values of the records whose partition was tried; and whether that fails.
        self.tried: list[bytes] = []
        self.partition_is_broken = False
        #: Whether it is for their size that records are refused.
        self.for_size = True
        self.down: Exception | None = None
        self.life = 1 << 60
        #: Records that there is time for in one transaction.
        self.most = 1 << 60
        self.producers: list[FakeProducer] = []
        self.story: list[str] = []

    def connect(self) -> "FakeProducer":
        self.producers.append(FakeProducer(self))
        return self.producers[-1]

    @property
    def bodies(self) -> list[bytes]:
        return [record.value for record in self.committed]

    @property
    def sequences(self) -> list[int]:
        return [int(dict(record.headers)["relay_sequence"]) for record in self.committed]


class FakeProducer:
    """One producer, which must never be used again after its first error."""

    def __init__(self, kafka: FakeKafka) -> None:
        self._kafka = kafka
        self._usable = self._started = False
        self._written = 0
        self.closed = False

    @property
    def spent(self) -> bool:
        return self._written >= self._kafka.life

    @property
    def transactional(self) -> bool:
        return self._kafka.transactional

    async def start(self) -> Watermark | None:
        assert not self._started
        self._started = True
        kafka = self._kafka
        # The next start is what fences the one before.
        assert all(producer.closed for producer in kafka.producers[:-1])
        await asyncio.sleep(0)
        fault = kafka.down or (kafka.start_faults.popleft() if kafka.start_faults else None)
        if fault is not None:
            raise fault
        self._usable = True
        return kafka.watermark if self.transactional else None

    async def publish(self, records: Sequence[Record], watermark: Watermark) -> None:
        assert self._usable, "used again after an error"
        self._usable = False
        kafka = self._kafka
        await asyncio.sleep(0)
        fault = kafka.down or (kafka.faults.popleft() if kafka.faults else None)
        if fault is not None:
            kafka.on_fault()
            raise fault
        if len(records) > kafka.most:
            raise KafkaTimeout
        if any(POISON in record.value for record in records):
            kafka.story.append(f"refused {len(records)}")
            refusal = RecordsRefused("too large")
            refusal.for_size = kafka.for_size
            refusal.batches = [
                batch for batch in kafka.batches(len(records)) if any(POISON in records[place].value for place in batch)
            ]
            raise refusal
        kafka.story.append(f"published {len(records)}")
        kafka.committed += records
        kafka.cycles.append(list(records))
        kafka.watermark = watermark
        self._written += len(records)
        late = kafka.late_faults.popleft() if kafka.late_faults else None
        if late is not None:
            raise late
        self._usable = True

    async def try_partition(self, record: Record) -> None:
        assert self._usable, "used again after an error"
        self._usable = False
        self._kafka.tried.append(record.value)
        if self._kafka.partition_is_broken:
            raise RecordsRefused("unknown error")

    async def close(self) -> None:
        self._usable = False
        self.closed = True


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publisher_module, "INTERVAL", 0.001)
    monkeypatch.setattr(publisher_module, "REST", 0.0)
    monkeypatch.setattr(publisher_module, "FIRST_BACKOFF", 0.0001)
    monkeypatch.setattr(publisher_module, "MAX_BACKOFF", 0.001)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Spool]:
    spool = await Spool.open(path, max_bytes=1 << 28, dedupe_seconds=300, metrics=Metrics(CollectorRegistry()))
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


@pytest.fixture
def kafka() -> FakeKafka:
    return FakeKafka()


def publisher_of(spool: Spool, kafka: FakeKafka, metrics: Metrics | None = None) -> Publisher:
    records = RecordMaker(Topics("events", "dead"), lambda _: None)
    return Publisher(spool, kafka.connect, records, metrics or Metrics(CollectorRegistry()))


@asynccontextmanager
async def publishing(spool: Spool, kafka: FakeKafka, metrics: Metrics | None = None) -> AsyncIterator[Publisher]:
    publisher = publisher_of(spool, kafka, metrics)
    task = asyncio.create_task(publisher.run())
    try:
        yield publisher
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()
    assert all(producer.closed for producer in kafka.producers)


async def fill(spool: Spool, events: Sequence[Event]) -> list[bytes]:
    assert all(await asyncio.gather(*(spool.append(event) for event in events)))
    return [event.body for event in events]


def poison(make_event: MakeEvent, number: int) -> Event:
    event = make_event(number)
    return event._replace(body=event.body.replace(b'"padding": ""', b'"padding": "poison"'))


# --- When all goes well. ---


async def test_an_event_whose_type_is_not_known_any_more_becomes_a_dead_letter_with_its_body(
    spool: Spool, kafka: FakeKafka, metrics: Metrics, make_event: MakeEvent, until: Until
) -> None:
    gone = make_event(1)._replace(type="Survey", schema="print")
    sent = await fill(spool, [gone, make_event(2)])
    async with publishing(spool, kafka, metrics):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent
    assert [record.topic for record in kafka.committed] == ["dead", "events"]
    headers = dict(kafka.committed[0].headers)
    assert (headers["relay_error_reason"], headers["ce_type"][-8:]) == (b"unknown_type", b".unknown")
    assert headers["relay_error_detail"].startswith(b"/type: ")
    count = metrics.registry.get_sample_value("relay_events_dead_lettered_total", {"reason": "unknown_type"})
    assert count == 1


async def test_events_reach_kafka_once_in_order_and_leave_the_spool(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    sent = await fill(spool, [make_event(number) for number in range(30)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
        for number in range(30, 60):
            sent += await fill(spool, [make_event(number)])
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent
    assert kafka.sequences == sorted(kafka.sequences)
    assert len(kafka.producers) == 1


async def test_a_cycle_s_watermark_is_its_last_event(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "MAX_EVENTS", 4)
    seen: list[tuple[int, int]] = []
    publish = FakeProducer.publish

    async def look(producer: FakeProducer, records: Sequence[Record], watermark: Watermark) -> None:
        seen.append((int(dict(records[-1].headers)["relay_sequence"]), watermark.sequence))
        await publish(producer, records, watermark)

    monkeypatch.setattr(FakeProducer, "publish", look)
    async with publishing(spool, kafka):
        for number in range(10):
            await fill(spool, [make_event(number)])
        await until(lambda: spool.depth == 0)
    assert seen
    assert all(last == watermark for last, watermark in seen)


async def test_a_cycle_is_bounded(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "MAX_EVENTS", 7)
    sent = await fill(spool, [make_event(number) for number in range(50)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent
    assert {len(cycle) for cycle in kafka.cycles} == {7, 1}


async def test_what_arrives_within_the_interval_shares_a_cycle_and_the_first_does_not_wait(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "INTERVAL", 0.3)
    async with publishing(spool, kafka):
        started = time.monotonic()
        await fill(spool, [make_event(0)])
        await until(lambda: spool.depth == 0)
        assert time.monotonic() - started < 0.3
        for number in range(1, 6):
            await fill(spool, [make_event(number)])
        await until(lambda: spool.depth == 0)
    assert [len(cycle) for cycle in kafka.cycles] == [1, 5]


async def test_a_full_cycle_does_not_wait_for_the_interval(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "INTERVAL", 3600)
    monkeypatch.setattr(publisher_module, "MAX_EVENTS", 5)
    async with publishing(spool, kafka):
        await fill(spool, [make_event(0)])
        await until(lambda: spool.depth == 0)
        await fill(spool, [make_event(number) for number in range(1, 6)])
        await until(lambda: spool.depth == 0)
    assert [len(cycle) for cycle in kafka.cycles] == [1, 5]


async def test_a_record_is_never_from_the_future(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    await fill(spool, [make_event(received_at=time.time_ns() // 1_000_000 + 7_200_000)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.committed[0].timestamp <= time.time_ns() // 1_000_000


async def test_a_producer_that_is_spent_is_replaced_without_a_fuss(
    spool: Spool,
    kafka: FakeKafka,
    make_event: MakeEvent,
    until: Until,
    *,
    metrics: Metrics,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kafka.life = 3
    sent: list[bytes] = []
    async with publishing(spool, kafka, metrics):
        for number in range(10):
            sent += await fill(spool, [make_event(number)])
            await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent
    assert len(kafka.producers) == 4
    assert metrics.registry.get_sample_value("relay_producer_restarts_total") == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


# --- When Kafka is lost. ---


async def test_what_kafka_has_no_time_for_is_published_in_smaller_parts(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    kafka.most = 7
    sent = await fill(spool, [make_event(number) for number in range(50)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent


@pytest.mark.parametrize("fault", [KafkaTimeout, KafkaUnreachable, Fenced, TopicsMissing, KafkaLost])
async def test_what_was_in_hand_is_published_first_after_a_failure(
    spool: Spool,
    kafka: FakeKafka,
    make_event: MakeEvent,
    until: Until,
    *,
    fault: type[KafkaLost],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(publisher_module, "MAX_EVENTS", 5)
    kafka.faults.extend([None, fault(), None, fault(), fault()])
    sent = await fill(spool, [make_event(number) for number in range(20)])
    async with publishing(spool, kafka) as publisher:
        await until(lambda: spool.depth == 0)
        assert publisher.connected
    assert kafka.bodies == sent
    assert len(kafka.producers) == 4


async def test_what_was_committed_although_the_answer_was_lost_is_not_published_again(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "MAX_EVENTS", 5)
    kafka.late_faults.extend([None, KafkaTimeout(), None, KafkaTimeout(), KafkaUnreachable()])
    sent = await fill(spool, [make_event(number) for number in range(40)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent


async def test_events_stay_in_the_spool_until_kafka_has_them(
    path: Path, tmp_path: Path, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    copy = tmp_path / "copy"
    async with opened(path) as spool:
        sent = await fill(spool, [make_event(number) for number in range(5)])

        def look() -> None:
            assert spool.depth == 5
            copy_spool(path, copy)

        kafka.on_fault = look
        kafka.faults.append(KafkaTimeout())
        async with publishing(spool, kafka):
            await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent
    async with opened(copy / path.name) as spool:
        assert spool.depth == 5


async def test_a_part_of_the_hand_may_be_covered(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    sent = await fill(spool, [make_event(number) for number in range(10)])

    def four_got_through() -> None:
        kafka.watermark = spool.watermark(4)  # Sequences of a new spool begin with 1.

    kafka.on_fault = four_got_through
    kafka.faults.append(KafkaTimeout())
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent[4:]


async def test_a_crash_between_commit_and_trim_publishes_nothing_twice(
    path: Path, tmp_path: Path, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    crashed = tmp_path / "crashed.db"
    async with opened(path) as spool:
        sent = await fill(spool, [make_event(number) for number in range(10)])
        shutil.copy(path, crashed)
        shutil.copy(path.with_name("relay.db-wal"), tmp_path / "crashed.db-wal")
        async with publishing(spool, kafka):
            await until(lambda: spool.depth == 0)
    async with opened(crashed) as spool:
        assert spool.depth == 10
        sent += await fill(spool, [make_event(10)])
        async with publishing(spool, kafka):
            await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent


async def test_a_watermark_that_is_behind_the_spool_s_own_mark_brings_nothing_back(
    path: Path, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    async with opened(path) as spool:
        sent = await fill(spool, [make_event(number) for number in range(10)])
        behind = spool.watermark(3)
        async with publishing(spool, kafka):
            await until(lambda: spool.depth == 0)
    for watermark in (behind, None):
        kafka.watermark = watermark
        async with opened(path) as spool:
            sent += await fill(spool, [make_event(len(sent))])
            async with publishing(spool, kafka):
                await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent


async def test_a_spool_restored_from_a_copy_loses_nothing_and_sends_nothing_twice(
    path: Path, tmp_path: Path, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    copy = tmp_path / "copy.db"
    async with opened(path) as spool:
        sent = await fill(spool, [make_event(number) for number in range(5)])
    shutil.copy(path, copy)
    async with opened(path) as spool:
        sent += await fill(spool, [make_event(number) for number in range(5, 10)])
        async with publishing(spool, kafka):
            await until(lambda: spool.depth == 0)
    async with opened(copy) as spool:
        # These get sequences that the original gave to others.
        sent += await fill(spool, [make_event(number) for number in range(100, 103)])
        async with publishing(spool, kafka):
            await until(lambda: spool.depth == 0)
            sent += await fill(spool, [make_event(number) for number in range(103, 106)])
            await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent


async def test_while_kafka_is_down_everything_is_kept_and_told(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, *, metrics: Metrics
) -> None:
    kafka.down = KafkaUnreachable("nobody is there")
    sent = await fill(spool, [make_event(number) for number in range(10)])
    async with publishing(spool, kafka, metrics) as publisher:
        await until(lambda: len(kafka.producers) > 3)
        assert (publisher.connected, publisher.last_error) == (False, "nobody is there")
        assert metrics.registry.get_sample_value("relay_kafka_connected") == 0
        assert spool.depth == 10
        kafka.down = None
        await until(lambda: spool.depth == 0)
        assert (publisher.connected, publisher.last_error) == (True, None)
        assert metrics.registry.get_sample_value("relay_kafka_connected") == 1
    assert kafka.bodies == sent


async def test_a_change_of_state_is_logged_once(
    spool: Spool, kafka: FakeKafka, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    def actions() -> list[str]:
        return [getattr(record, "action", "") for record in caplog.records]

    async with publishing(spool, kafka):
        await until(lambda: actions() == ["kafka_connected"])
        for _ in range(2):
            caplog.clear()
            kafka.down = KafkaUnreachable("nobody is there")
            seen = len(kafka.producers)
            await spool.append(Event("w", "Message", "c", bytes([seen % 256]) * 32, 1, 0, "", None, None, b"{}"))
            await until(lambda seen=seen: len(kafka.producers) > seen + 5)  # type: ignore[misc]
            assert actions() == ["kafka_lost"]
            kafka.down = None
            await until(lambda: spool.depth == 0)
            assert actions() == ["kafka_lost", "kafka_connected"]


async def test_the_wait_grows_to_its_limit_with_jitter_and_is_short_again_after_a_success(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "FIRST_BACKOFF", 0.05)
    monkeypatch.setattr(publisher_module, "MAX_BACKOFF", 5.0)
    waits: list[tuple[float, float]] = []

    def note(low: float, high: float) -> float:
        waits.append((low, high))
        return 0.0

    monkeypatch.setattr("relay.publisher.random.uniform", note)
    kafka.faults.extend([*(KafkaTimeout() for _ in range(20)), None, KafkaTimeout()])
    async with publishing(spool, kafka):
        await fill(spool, [make_event(0)])
        await until(lambda: spool.depth == 0)
        await fill(spool, [make_event(1)])
        await until(lambda: spool.depth == 0)
    highs = [high for _, high in waits]
    assert highs[:8] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
    assert set(highs[7:20]) == {5.0}
    assert highs[20:] == [0.05]
    assert all(low == high / 2 for low, high in waits)


async def test_a_second_relay_on_the_same_spool_is_told_loudly(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    def alarms() -> int:
        return sum(getattr(record, "action", "") == "fenced" for record in caplog.records)

    async with publishing(spool, kafka):
        kafka.faults.extend(Fenced() for _ in range(3))
        await fill(spool, [make_event(0)])
        await until(lambda: spool.depth == 0)
        assert alarms() == 0
        kafka.faults.append(Fenced())
        await fill(spool, [make_event(1)])
        await until(lambda: spool.depth == 0)
        assert alarms() == 1


# --- Records that the broker refuses for themselves. ---


@pytest.mark.parametrize("place", [0, 1, 9, 18, 19])
async def test_one_refused_event_is_found_buried_and_announced_in_its_place(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, *, metrics: Metrics, place: int
) -> None:
    events = [make_event(number) for number in range(20)]
    events[place] = poison(make_event, place)
    sent = await fill(spool, events)
    async with publishing(spool, kafka, metrics) as publisher:
        await until(lambda: spool.depth == 0)
        assert publisher.connected

    assert kafka.bodies == [b"{}" if number == place else body for number, body in enumerate(sent)]
    assert kafka.sequences == sorted(kafka.sequences)
    announced = kafka.committed[place]
    assert announced.topic == "dead"
    assert dict(announced.headers)["relay_error_reason"] == b"rejected_by_kafka"
    assert b"too large" in dict(announced.headers)["relay_error_detail"]
    assert list(spool.dead) == [kafka.sequences[place]]
    value = metrics.registry.get_sample_value
    assert value("relay_events_dead_lettered_total", {"reason": "rejected_by_kafka"}) == 1
    refusals = sum(told.startswith("refused") for told in kafka.story)
    assert value("relay_publish_errors_total", {"error": "refused"}) == refusals


@pytest.mark.parametrize("place", [0, 333, 999])
@pytest.mark.parametrize(("padding", "at_most"), [(500, 3), (0, 10)])
async def test_it_takes_three_new_connections_to_find_the_largest_and_about_ten_to_find_any_other(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, *, padding: int, at_most: int, place: int
) -> None:
    kafka.batches = lambda count: [range(start, min(start + 250, count)) for start in range(0, count, 250)]
    events = [make_event(number, padding=100) for number in range(1000)]
    events[place] = make_event(place, padding=padding)
    events[place] = events[place]._replace(body=events[place].body + POISON)
    await fill(spool, events)
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert len(spool.dead) == 1
    assert len(kafka.producers) - 1 <= at_most


async def test_a_refused_announcement_is_an_alarm_and_holds_up_no_other(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, *, caplog: pytest.LogCaptureFixture
) -> None:
    (sent,) = await fill(spool, [make_event(1)])
    # Both; the event alone, twice, and its announcement, twice; what is harmless passes each time.
    kafka.faults.extend([RecordsRefused(), *[RecordsRefused(), None] * 4])
    await fill(spool, [make_event(2)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == [make_event(2).body]
    assert list(spool.dead) == [1]
    told = [getattr(record, "action", "") for record in caplog.records if record.levelname == "ERROR"]
    assert told == ["event_dead", "announcement_refused"]
    assert kafka.tried == [sent, b"{}"]


async def test_an_event_that_is_refused_in_passing_is_published_after_all(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    sent = await fill(spool, [make_event(1)])
    # Refused; the harmless passes. Something else goes wrong. Refused, and so forth.
    kafka.faults.extend([RecordsRefused(), None, KafkaTimeout(), RecordsRefused(), None])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent
    assert spool.dead == {}


async def test_an_event_that_is_there_is_not_dead_whatever_was_refused(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    sent = await fill(spool, [make_event(1)])
    refusal = RecordsRefused()
    refusal.for_size = True
    kafka.late_faults.append(refusal)
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent
    assert spool.dead == {}


async def test_a_broker_that_refuses_everything_is_lost_and_kills_no_event(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    sent = await fill(spool, [make_event(1)])
    kafka.faults.extend([RecordsRefused(), RecordsRefused()])
    async with publishing(spool, kafka) as publisher:
        await until(lambda: "refuses everything" in (publisher.last_error or ""))
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent
    assert not spool.dead


async def test_every_refused_event_among_many_is_found(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    bad = {3, 4, 17, 29}
    events = [poison(make_event, number) if number in bad else make_event(number) for number in range(30)]
    sent = await fill(spool, events)
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == [b"{}" if number in bad else body for number, body in enumerate(sent)]
    assert len(spool.dead) == len(bad)


async def test_what_lies_around_a_refused_batch_is_not_searched(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    kafka.batches = lambda count: [[place] for place in range(count)]
    bad = {0, 3, 4, 29}
    sent = await fill(spool, [poison(make_event, it) if it in bad else make_event(it) for it in range(30)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == [b"{}" if number in bad else body for number, body in enumerate(sent)]
    assert [told for told in kafka.story if told.startswith("refused")] == ["refused 30", *["refused 1"] * len(bad)]


async def test_a_refused_batch_whose_events_lie_apart_is_halved(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    kafka.batches = lambda count: [range(0, count, 2), *([range(1, count, 2)] if count > 1 else [])]
    sent = await fill(spool, [poison(make_event, it) if it == 10 else make_event(it) for it in range(40)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == [b"{}" if number == 10 else body for number, body in enumerate(sent)]
    assert sum(told.startswith("refused") for told in kafka.story) <= 7


async def test_the_largest_of_a_refused_batch_is_asked_for_alone(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    sent = await fill(spool, [poison(make_event, it) if it == 20 else make_event(it) for it in range(10, 74)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == [b"{}" if b"poison" in body else body for body in sent]
    assert [told for told in kafka.story if told.startswith("refused")] == ["refused 64", "refused 1"]


async def test_what_passed_while_a_refused_event_was_looked_for_is_not_searched_again(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    events = [poison(make_event, it) if it in (30, 37) else make_event(it, padding=10) for it in range(10, 74)]
    await fill(spool, events)
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert len(spool.dead) == 2
    searched = [int(told.split()[1]) for told in kafka.story if told.startswith("refused")]
    second = searched.index(1) + 1
    assert max(searched[second:]) <= 8


async def test_an_event_is_dead_only_after_the_broker_took_something_else_right_after(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    bury = Spool.bury

    async def told(spool: Spool, entry: Entry, error: str) -> None:
        kafka.story.append("buried")
        await bury(spool, entry, error)

    monkeypatch.setattr(Spool, "bury", told)
    await fill(spool, [poison(make_event, 0), make_event(1)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.story[:4] == ["refused 2", "refused 1", "published 0", "buried"]


async def test_without_a_word_of_size_an_event_is_dead_only_after_its_partition_took_something(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    # As it is when a whole partition is broken, and the watermark's is not.
    kafka.partition_is_broken, kafka.for_size = True, False
    sent = await fill(spool, [poison(make_event, 0), make_event(1), make_event(2)])
    async with publishing(spool, kafka) as publisher:
        await until(lambda: "refuses everything" in (publisher.last_error or ""))
        assert (spool.dead, spool.depth, publisher.connected) == ({}, 3, False)
        assert set(kafka.tried) == {sent[0]}

        kafka.partition_is_broken = False
        await until(lambda: spool.depth == 0)
    assert len(spool.dead) == 1
    assert kafka.bodies == [b"{}", *sent[1:]]


async def test_an_event_that_is_too_large_is_dead_whatever_its_partition_takes(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    kafka.partition_is_broken = True
    sent = await fill(spool, [poison(make_event, 0), make_event(1)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == [b"{}", sent[1]]
    assert not kafka.tried


@pytest.mark.parametrize("where", ["start", "publish"])
async def test_an_event_is_not_judged_while_kafka_takes_nothing_at_all(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, where: str
) -> None:
    # A broker that refuses everything, as one with a full disk may.
    sent = await fill(spool, [make_event(0)])
    if where == "publish":
        kafka.faults.extend([RecordsRefused("no"), RecordsRefused("no")] * 5)
    else:
        kafka.faults.append(RecordsRefused("no"))
        kafka.start_faults.extend([None, KafkaUnreachable()])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert spool.dead == {}
    assert [body for body in kafka.bodies if body] == sent


async def test_several_events_that_are_refused_together_are_not_dead(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    kafka.faults.append(RecordsRefused("a passing fault"))
    sent = await fill(spool, [make_event(number) for number in range(10)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent
    assert spool.dead == {}


async def test_cycles_are_wide_again_once_the_refused_event_is_out_of_the_way(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    await fill(spool, [poison(make_event, 0), make_event(1), make_event(2)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
        await fill(spool, [make_event(number) for number in range(3, 53)])
        await until(lambda: spool.depth == 0)
    assert len(kafka.cycles[-1]) == 50


async def test_a_refused_event_that_cannot_be_buried_is_kept(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    bury, failures = Spool.bury, iter([SpoolFailed("no disk"), SpoolFailed("no disk")])

    async def failing(spool: Spool, entry: Entry, error: str) -> None:
        if failure := next(failures, None):
            raise failure
        await bury(spool, entry, error)

    monkeypatch.setattr(Spool, "bury", failing)
    sent = await fill(spool, [make_event(0), poison(make_event, 1), make_event(2)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == [sent[0], b"{}", sent[2]]
    assert len(spool.dead) == 1


async def test_a_dead_event_is_announced_after_a_restart(
    path: Path, kafka: FakeKafka, make_event: MakeEvent, until: Until
) -> None:
    async with opened(path) as spool:
        await fill(spool, [make_event(0)])
        (entry,) = await spool.take(1, 1)
        await spool.bury(entry, "too large")
    async with opened(path) as spool, publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert [(record.topic, record.value) for record in kafka.committed] == [("dead", b"{}")]


async def test_without_transactions_a_refused_event_is_judged_by_a_harmless_record(
    spool: Spool, make_event: MakeEvent, until: Until
) -> None:
    kafka = FakeKafka(transactional=False)
    sent = await fill(spool, [make_event(0), poison(make_event, 1), make_event(2)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert [body for body in kafka.bodies if body != b"{}"] == [sent[0], sent[2]]
    assert {record.topic for record in kafka.committed if record.value == b"{}"} == {"dead"}
    assert len(spool.dead) == 1


async def test_without_transactions_no_watermark_is_missed(
    path: Path, make_event: MakeEvent, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    kafka = FakeKafka(transactional=False)
    for number in range(2):
        async with opened(path) as spool:
            await fill(spool, [make_event(number)])
            async with publishing(spool, kafka):
                await until(lambda: spool.depth == 0)
    assert len(kafka.bodies) == 2
    assert "watermark_lost" not in [vars(record).get("action") for record in caplog.records]


async def test_a_watermark_that_kafka_has_lost_is_told(
    path: Path, kafka: FakeKafka, make_event: MakeEvent, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(2):
        async with opened(path) as spool:
            await fill(spool, [make_event(number)])
            async with publishing(spool, kafka):
                await until(lambda: spool.depth == 0)
        kafka.watermark = None
    assert len(kafka.bodies) == 2
    told = [vars(record)["published"] for record in caplog.records if vars(record).get("action") == "watermark_lost"]
    assert told == [1]


# --- The spool's own faults. ---


async def test_a_spool_that_cannot_be_read_for_a_while_stops_nothing_for_good(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, failures = Spool.take, iter([SpoolFailed("no disk"), SpoolFailed("no disk")])

    async def failing(spool: Spool, max_events: int, max_bytes: int) -> list[Entry]:
        if failure := next(failures, None):
            raise failure
        return await take(spool, max_events, max_bytes)

    monkeypatch.setattr(Spool, "take", failing)
    sent = await fill(spool, [make_event(0)])
    async with publishing(spool, kafka):
        await until(lambda: spool.depth == 0)
    assert kafka.bodies == sent


# --- What is counted. ---


async def test_what_is_published_is_counted_by_topic_reason_and_type(
    spool: Spool, kafka: FakeKafka, make_event: MakeEvent, until: Until, *, metrics: Metrics
) -> None:
    await fill(
        spool,
        [
            make_event(1),
            make_event(2),
            make_event(3, type_="LivechatSessionEnd"),
            make_event(4)._replace(reason=DeadLetterReason.SCHEMA, detail="/visitor: required"),
            make_event(5)._replace(detail="/visitor: required"),
        ],
    )
    kafka.faults.append(KafkaTimeout())
    async with publishing(spool, kafka, metrics):
        await until(lambda: spool.depth == 0)
    value = metrics.registry.get_sample_value
    assert value("relay_events_published_total", {"topic": "events"}) == 3
    assert value("relay_events_published_total", {"topic": "dead"}) == 2
    assert value("relay_events_dead_lettered_total", {"reason": "unknown_type"}) == 1
    assert value("relay_events_dead_lettered_total", {"reason": "schema"}) == 1
    assert value("relay_events_invalid_total", {"type": "Message"}) == 1
    assert value("relay_publish_duration_seconds_count") == 2  # Halved after the timeout.
    assert value("relay_end_to_end_duration_seconds_count") == 5
    assert value("relay_publish_errors_total", {"error": "timeout"}) == 1
    assert value("relay_producer_restarts_total") == 1
