import asyncio
import time
from collections.abc import Callable

import pytest

from relay import memory
from relay.batch import Entry
from relay.errors import KafkaUnavailable
from relay.event import Event
from relay.memory import MemoryQueue

MakeEvent = Callable[..., Event]


@pytest.fixture
def queue() -> MemoryQueue:
    return MemoryQueue(dedupe_seconds=300)


async def appended(queue: MemoryQueue, event: Event) -> asyncio.Task[bool]:
    task = asyncio.create_task(queue.append(event))
    await queue.wait(1)
    await asyncio.sleep(0)
    return task


async def take_all(queue: MemoryQueue) -> list[Entry]:
    return await queue.take(1000, 1 << 30)


async def test_an_event_is_answered_once_kafka_has_it_and_not_before(queue: MemoryQueue, make_event: MakeEvent) -> None:
    append = await appended(queue, make_event())
    ((sequence, event),) = await take_all(queue)
    assert event == make_event()
    await asyncio.sleep(0)
    assert not append.done()
    assert queue.depth == 1
    queue.published(sequence)
    assert await append is True
    assert queue.depth == 0


async def test_events_are_given_once_in_order_within_the_limits(queue: MemoryQueue, make_event: MakeEvent) -> None:
    events = [make_event(number, padding=1_000) for number in range(10)]
    appends = [await appended(queue, event) for event in events]
    taken = await queue.take(3, 1 << 30)
    assert len(taken) == 3
    taken += await queue.take(1000, 1_500)
    assert len(taken) == 5
    taken += await take_all(queue)
    assert [event for _, event in taken] == events
    assert [sequence for sequence, _ in taken] == sorted({sequence for sequence, _ in taken})
    queue.published(taken[4][0])
    assert [append.done() for append in appends] == [False] * 10
    assert await asyncio.gather(*appends[:5]) == [True] * 5
    assert not any(append.done() for append in appends[5:])
    queue.published(taken[9][0])
    assert all(await asyncio.gather(*appends))


async def test_without_kafka_the_sender_is_told_in_time_and_the_event_is_given_up(
    queue: MemoryQueue, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert memory.ACK_TIMEOUT <= 4
    monkeypatch.setattr(memory, "ACK_TIMEOUT", 0.01)
    with pytest.raises(KafkaUnavailable):
        await queue.append(make_event())
    assert queue.depth == 0
    assert await take_all(queue) == []


async def test_a_retry_that_waits_with_a_first_try_that_is_given_up_is_told_so_too(
    queue: MemoryQueue, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ACK_TIMEOUT", 0.05)
    first = await appended(queue, make_event())
    monkeypatch.setattr(memory, "ACK_TIMEOUT", 60)
    retry = await appended(queue, make_event())
    for append in (first, retry):
        with pytest.raises(KafkaUnavailable):
            await asyncio.wait_for(append, 5)


async def test_it_is_drained_when_the_last_event_is_given_up(
    queue: MemoryQueue, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ACK_TIMEOUT", 0.01)
    append = await appended(queue, make_event())
    drained = asyncio.create_task(queue.drained())
    with pytest.raises(KafkaUnavailable):
        await append
    await asyncio.wait_for(drained, 5)


async def test_an_event_that_was_given_up_may_come_again(
    queue: MemoryQueue, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as impatient:
        impatient.setattr(memory, "ACK_TIMEOUT", 0.01)
        with pytest.raises(KafkaUnavailable):
            await queue.append(make_event())
    retry = await appended(queue, make_event())
    ((sequence, _),) = await take_all(queue)
    queue.published(sequence)
    assert await retry is True


async def test_an_event_that_is_on_its_way_when_the_sender_is_told_becomes_no_second_event(
    queue: MemoryQueue, make_event: MakeEvent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "ACK_TIMEOUT", 0.01)
    append = await appended(queue, make_event())
    ((sequence, _),) = await take_all(queue)
    with pytest.raises(KafkaUnavailable):
        await append
    assert queue.depth == 1
    queue.published(sequence)
    assert await queue.append(make_event()) is False
    assert await take_all(queue) == []


async def test_a_retry_waits_with_the_first_try(queue: MemoryQueue, make_event: MakeEvent) -> None:
    first = await appended(queue, make_event())
    retry = await appended(queue, make_event())
    ((sequence, _),) = await take_all(queue)
    queue.published(sequence)
    assert (await first, await retry) == (True, False)
    assert await queue.append(make_event()) is False


async def test_after_an_answer_a_repeat_is_an_event_of_its_own(queue: MemoryQueue, make_event: MakeEvent) -> None:
    lead = make_event(type_="LeadCapture")
    first = await appended(queue, lead)
    ((sequence, _),) = await take_all(queue)
    queue.published(sequence)
    await first
    assert await queue.append(lead) is False
    queue.answered(lead)
    second = await appended(queue, lead)
    ((sequence, event),) = await take_all(queue)
    assert event.id == f"{lead.id}.2"
    queue.published(sequence)
    assert await second is True


async def test_a_handler_that_is_cancelled_takes_no_other_with_it(queue: MemoryQueue, make_event: MakeEvent) -> None:
    first = await appended(queue, make_event())
    retry = await appended(queue, make_event())
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    for sequence, _ in await take_all(queue):
        queue.published(sequence)
    assert await retry is False


async def test_an_event_that_the_broker_refuses_is_not_answered_200(queue: MemoryQueue, make_event: MakeEvent) -> None:
    append = await appended(queue, make_event())
    (entry,) = await take_all(queue)
    await queue.bury(entry, "too large")
    assert queue.dead == {entry[0]: "too large"}
    queue.published(entry[0])
    with pytest.raises(KafkaUnavailable):
        await append


async def test_it_is_drained_when_all_is_on_kafka(queue: MemoryQueue, make_event: MakeEvent) -> None:
    await asyncio.wait_for(queue.drained(), 5)
    append = await appended(queue, make_event())
    drained = asyncio.create_task(queue.drained())
    ((sequence, _),) = await take_all(queue)
    await asyncio.sleep(0)
    assert not drained.done()
    queue.published(sequence)
    await asyncio.wait_for(drained, 5)
    await append


async def test_depth_bytes_and_age_tell_of_what_is_not_on_kafka(queue: MemoryQueue, make_event: MakeEvent) -> None:
    assert (queue.depth, queue.used_bytes, queue.oldest_age) == (0, 0, 0.0)
    event = make_event(received_at=time.time_ns() // 1_000_000 - 60_000)
    append = await appended(queue, event)
    assert (queue.depth, queue.used_bytes) == (1, len(event.body))
    assert 60 <= queue.oldest_age < 70
    taken = await take_all(queue)
    assert (queue.depth, queue.used_bytes) == (1, len(event.body))
    assert 60 <= queue.oldest_age < 70
    queue.published(taken[0][0])
    await append
    assert (queue.depth, queue.used_bytes, queue.oldest_age) == (0, 0, 0.0)


async def test_a_watermark_of_this_run_is_known_and_one_of_another_is_not(
    queue: MemoryQueue, make_event: MakeEvent
) -> None:
    watermark = queue.watermark(7)
    assert queue.resume(watermark) == 7
    assert queue.resume(None) == 0
    assert queue.resume(MemoryQueue(dedupe_seconds=0).watermark(7)) == 0


async def test_it_can_always_take_events(queue: MemoryQueue) -> None:
    assert await queue.probe() is None
    await queue.close()
