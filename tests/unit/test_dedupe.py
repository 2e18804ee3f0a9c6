import gc
import tracemalloc
from collections.abc import Callable

import pytest

from relay.dedupe import DIGEST_BYTES, DedupeMemory, Repeat, new_repeat
from relay.event import Event

MakeEvent = Callable[..., Event]
START = 1_764_000_000_000
WINDOW = 300_000
#: A genuine repeat of a type that is not Rocket.Chat's own must not be lost as a retry.
REPEATABLE = ("LivechatSessionQueued", "LivechatEdit", "LeadCapture", "unknown", "Survey")
OTHERS = (
    "LivechatSessionStart",
    "LivechatSessionTaken",
    "LivechatSessionForwarded",
    "LivechatSession",
    "Message",
    "LivechatOfflineMessage",
)


@pytest.fixture
def memory() -> DedupeMemory:
    return DedupeMemory(WINDOW)


@pytest.mark.parametrize("type_", OTHERS)
def test_an_equal_body_is_a_retry_within_the_window(memory: DedupeMemory, make_event: MakeEvent, type_: str) -> None:
    event = make_event(type_=type_)
    assert not memory.recognises(event, START)
    memory.accepted(event, START)
    assert memory.recognises(event, START)
    assert memory.recognises(event, START + WINDOW - 1)
    assert not memory.recognises(event, START + WINDOW)


def test_the_window_reaches_as_far_for_each_of_many_events(memory: DedupeMemory, make_event: MakeEvent) -> None:
    events = [make_event(number) for number in range(200)]
    for number, event in enumerate(events):
        memory.accepted(event, START + number * 7_001)
        memory.forget(START + number * 7_001)
    now = START + len(events) * 7_001
    for number, event in enumerate(events):
        assert memory.recognises(event, now) == (now - START - number * 7_001 < WINDOW)


def test_another_body_or_workspace_is_no_retry(memory: DedupeMemory, make_event: MakeEvent) -> None:
    memory.accepted(make_event(1), START)
    assert memory.recognises(make_event(1, received_at=0), START)
    assert not memory.recognises(make_event(2), START)
    assert not memory.recognises(make_event(1, workspace="acme"), START)


def test_an_answer_makes_no_difference_to_what_never_repeats(memory: DedupeMemory, make_event: MakeEvent) -> None:
    event = make_event()
    memory.accepted(event, START)
    assert memory.answered(event) is None
    assert memory.recognises(event, START)
    assert memory.occurrence(event, START) == 1


# --- Types that may repeat byte for byte. ---


@pytest.mark.parametrize("type_", REPEATABLE)
def test_a_repeat_is_a_retry_only_until_an_answer_got_out(
    memory: DedupeMemory, make_event: MakeEvent, type_: str
) -> None:
    event = make_event(type_=type_)
    memory.accepted(event, START)
    assert memory.recognises(event, START + 20_000)
    assert memory.answered(event) == Repeat(START, 1, answered=True)
    assert not memory.recognises(event, START + 20_000)


def test_genuine_repeats_are_counted(memory: DedupeMemory, make_event: MakeEvent) -> None:
    event = make_event(type_="LeadCapture")
    for occurrence in (1, 2, 3):
        now = START + 1_000 * occurrence
        assert not memory.recognises(event, now)
        assert memory.occurrence(event, now) == occurrence
        memory.accepted(event._replace(occurrence=occurrence), now)
        assert memory.recognises(event, now + 1)
        memory.answered(event)


def test_an_answer_is_news_once(memory: DedupeMemory, make_event: MakeEvent) -> None:
    event = make_event(type_="LeadCapture")
    assert memory.answered(event) is None
    memory.accepted(event, START)
    assert memory.answered(event) is not None
    assert memory.answered(event) is None


def test_after_the_window_a_repeat_is_a_first_one_again(memory: DedupeMemory, make_event: MakeEvent) -> None:
    event = make_event(type_="LeadCapture")
    memory.accepted(event._replace(occurrence=4), START)
    assert memory.recognises(event, START + WINDOW - 1)
    assert not memory.recognises(event, START + WINDOW)
    assert memory.occurrence(event, START + WINDOW - 1) == 5
    assert memory.occurrence(event, START + WINDOW) == 1


# --- Switched off. ---


@pytest.mark.parametrize("type_", ["Message", "LeadCapture"])
def test_without_a_window_nothing_is_a_retry(make_event: MakeEvent, type_: str) -> None:
    memory = DedupeMemory(0)
    event = make_event(type_=type_)
    memory.accepted(event, START)
    assert not memory.recognises(event, START)
    assert memory.answered(event) is None
    assert memory.forget(START) is None


# --- A restart. ---


def test_what_was_stored_is_remembered(memory: DedupeMemory, make_event: MakeEvent) -> None:
    events = [make_event(number) for number in range(50)]
    leads = [make_event(number, type_="LeadCapture") for number in range(3)]
    digests = b"".join(event.digest[:DIGEST_BYTES] for event in events)

    memory.restore([(START, digests)], {lead.digest: new_repeat(lead, START) for lead in leads}, START + 60_000)

    for event in [*events, *leads]:
        assert memory.recognises(event, START + WINDOW - 1)
        assert not memory.recognises(event, START + WINDOW)
    assert not memory.recognises(make_event(99), START + 60_000)


def test_what_was_answered_stays_answered(memory: DedupeMemory, make_event: MakeEvent) -> None:
    event = make_event(type_="LeadCapture")
    memory.restore([], {event.digest: Repeat(START, 2, answered=True)}, START)
    assert not memory.recognises(event, START)
    assert memory.occurrence(event, START) == 3


def test_restored_repeats_are_forgotten_in_the_order_of_their_age(memory: DedupeMemory, make_event: MakeEvent) -> None:
    young, old = (make_event(number, type_="LeadCapture") for number in range(2))
    repeats = {
        young.digest: Repeat(START + 1_000, 1, answered=False),
        old.digest: Repeat(START, 1, answered=False),
    }
    memory.restore([], repeats, START + 2_000)
    assert memory.forget(START + WINDOW + 500) == START + 500
    assert memory.forget(START + WINDOW + 600) is None
    assert memory.recognises(young, START + WINDOW + 600)


def test_a_former_run_s_clock_that_was_ahead_lengthens_no_window(memory: DedupeMemory, make_event: MakeEvent) -> None:
    message, lead = make_event(), make_event(type_="LeadCapture")
    ahead = START + 86_400_000
    memory.restore([(ahead, message.digest[:DIGEST_BYTES])], {lead.digest: new_repeat(lead, ahead)}, START)
    for event in (message, lead):
        assert memory.recognises(event, START + WINDOW - 1)
        assert not memory.recognises(event, START + WINDOW)


# --- Forgetting. ---


def test_forgetting_says_from_when_on_something_is_remembered(memory: DedupeMemory, make_event: MakeEvent) -> None:
    assert memory.forget(START) is None
    memory.accepted(make_event(1), START)
    memory.accepted(make_event(2, type_="LeadCapture"), START)
    assert memory.forget(START + WINDOW - 1) is None
    now = START + 3 * WINDOW
    assert memory.forget(now) == now - WINDOW
    assert memory.forget(now) is None


def test_a_repeat_that_was_accepted_again_holds_up_no_older_one(memory: DedupeMemory, make_event: MakeEvent) -> None:
    again, once = (make_event(number, type_="LeadCapture") for number in range(2))
    memory.accepted(again, START)
    memory.accepted(once, START + 1_000)
    memory.accepted(again, START + 60_000)
    assert memory.forget(START + 1_000 + WINDOW) == START + 1_000
    assert memory.recognises(again, START + 1_000 + WINDOW)


def test_what_is_within_the_window_is_never_forgotten(memory: DedupeMemory, make_event: MakeEvent) -> None:
    events: list[Event] = []
    for step in range(400):
        now = START + step * 5_003
        events.append(make_event(step, type_=("Message", "LeadCapture")[step % 2]))
        memory.accepted(events[-1], now)
        memory.forget(now)
        for event in events[-59:]:
            assert memory.recognises(event, now)


def test_an_event_takes_little_memory_and_gives_it_back(memory: DedupeMemory, make_event: MakeEvent) -> None:
    count = 40_000
    event = make_event()
    digests = [number.to_bytes(4, "little") * 8 for number in range(count)]
    tracemalloc.start()
    try:
        for number, digest in enumerate(digests):
            memory.accepted(event._replace(digest=digest), START + number)
        held, _ = tracemalloc.get_traced_memory()
        assert held < 50 * count
        memory.forget(START + 3 * WINDOW)
        gc.collect()  # The interpreter keeps freed tuples for new ones.
        left, _ = tracemalloc.get_traced_memory()
        assert left < held / 10
    finally:
        tracemalloc.stop()
