"""The ledger of the fault harness: it sees each kind of fault, also late, and excuses no more than it may."""

import hashlib
import json
import time

import pytest
from oracle import Landed, murmur2_partition

from chaos.ledger import Chat, Event, Layout, Ledger

TOPIC, DEAD = "events", "dead"
PARTITIONS = 6
CHAT = "a-chat"


def body(number: int, type_: str = "Message") -> bytes:
    message = {"_id": f"m{number}", "ts": "2026-11-20T09:00:01.120Z"}
    return json.dumps({"_id": CHAT, "type": type_, "visitor": {}, "messages": [message]}).encode()


def landed(value: bytes, offset: int = 0, *, suffix: str = "", type_: str = "message.saved") -> Landed:
    headers = {
        "ce_specversion": "1.0",
        "ce_id": hashlib.sha256(b"default\n" + value).hexdigest() + suffix,
        "ce_source": "/rocketchat/default",
        "ce_type": f"chat.rocket.omnichannel.{type_}",
        "ce_subject": CHAT,
        "ce_time": "2026-11-20T09:00:01.120Z",
        "content-type": "application/json",
        "relay_sequence": str(offset + 1),
        "relay_received_at": "2026-11-20T09:00:01.120Z",
    }
    encoded = tuple((name, value.encode()) for name, value in headers.items())
    place = murmur2_partition(CHAT.encode(), PARTITIONS)
    return Landed(TOPIC, place, offset, CHAT.encode(), value, encoded, int(time.time() * 1000))


def with_headers(record: Landed, **values: str) -> Landed:
    others = tuple(header for header in record.headers if header[0] not in values)
    return record._replace(headers=(*others, *((name, value.encode()) for name, value in values.items())))


@pytest.fixture
def ledger() -> Ledger:
    """Return a ledger for bare values."""
    return Ledger(Layout(TOPIC, DEAD, PARTITIONS, {}, framed=False))


def send(ledger: Ledger, *numbers: int, answered: bool = True, type_: str = "Message") -> list[Event]:
    chat = Chat()
    events = [ledger.send(chat, body(number, type_)) for number in numbers]
    for event in events:
        if answered:
            ledger.answered(event)
        else:
            ledger.failed(event)
            ledger.gave_up(event)
    return events


def test_what_lands_once_in_order_is_faultless(ledger: Ledger) -> None:
    send(ledger, 1, 2, 3)

    ledger.land(landed(body(number), number) for number in (1, 2, 3))

    assert not ledger.missing(time.monotonic())
    ledger.close()
    assert not ledger.faults
    assert (ledger.sent, ledger.accepted, ledger.published) == (3, 3, 3)


def test_a_lost_event_is_missing(ledger: Ledger) -> None:
    send(ledger, 1, 2)
    ledger.land([landed(body(1))])

    assert len(ledger.missing(time.monotonic())) == 1

    ledger.close()
    assert ledger.faults == {"missing": 1}


def test_an_event_that_was_answered_later_is_not_missing_yet(ledger: Ledger) -> None:
    before = time.monotonic()
    send(ledger, 1)

    assert not ledger.missing(before)


@pytest.mark.parametrize("retired", [False, True])
def test_a_second_record_is_duplicated(ledger: Ledger, retired: bool) -> None:
    send(ledger, 1, 2)
    ledger.land([landed(body(1)), landed(body(2), 1)])
    if retired:
        ledger.retire()

    ledger.land([landed(body(1), 2)])

    assert ledger.faults == {"duplicated": 1}


def test_events_of_a_chat_in_another_order_are_reordered(ledger: Ledger) -> None:
    send(ledger, 1, 2)

    ledger.land([landed(body(2)), landed(body(1), 1)])

    assert ledger.faults == {"reordered": 1}


def test_an_event_is_reordered_also_after_one_that_was_retired(ledger: Ledger) -> None:
    send(ledger, 1, 2)
    ledger.land([landed(body(2))])
    ledger.retire()

    ledger.land([landed(body(1), 1)])

    assert ledger.faults == {"reordered": 1}


def test_an_event_without_an_answer_may_come_late_or_not_at_all(ledger: Ledger) -> None:
    chat = Chat()
    unsure, sure, lost = (ledger.send(chat, body(number)) for number in (1, 2, 3))
    for event in (unsure, lost):
        ledger.failed(event)
        ledger.gave_up(event)
    ledger.answered(sure)

    ledger.land([landed(body(2)), landed(body(1), 1)])

    ledger.close()
    assert not ledger.faults


def test_a_record_that_nobody_sent_is_invented(ledger: Ledger) -> None:
    send(ledger, 1)

    ledger.land([landed(body(1)), landed(body(2), 1), with_headers(landed(body(3), 2), ce_id="x")])

    assert ledger.faults == {"invented": 2}


@pytest.mark.parametrize(
    "wrong",
    [
        landed(body(1))._replace(value=body(1) + b" "),
        landed(body(1))._replace(value=None),
        landed(body(1))._replace(key=b"another"),
        landed(body(1))._replace(partition=PARTITIONS),
        landed(body(1))._replace(topic=DEAD),
        landed(body(1))._replace(timestamp=int(time.time() * 1000) + 3_600_000),
        with_headers(landed(body(1)), ce_type="chat.rocket.omnichannel.session.closed"),
        with_headers(landed(body(1)), ce_subject="another"),
        with_headers(landed(body(1)), extra="1"),
        landed(body(1), suffix=".2"),
    ],
)
def test_a_changed_record_is_corrupted(ledger: Ledger, wrong: Landed) -> None:
    send(ledger, 1)

    ledger.land([wrong])

    assert ledger.faults == {"corrupted": 1}


def test_a_value_must_name_the_same_schema_each_time() -> None:
    ledger = Ledger(Layout(TOPIC, DEAD, PARTITIONS, {}, framed=True))
    send(ledger, 1, 2, 3)
    first, second, third = (landed(body(number), number) for number in (1, 2, 3))

    ledger.land([first._replace(value=b"\0\0\0\0\7" + body(1)), second._replace(value=b"\0\0\0\0\7" + body(2))])
    assert not ledger.faults

    ledger.land([third._replace(value=b"\0\0\0\0\5" + body(3))])
    assert ledger.faults == {"corrupted": 1}


# --- What faults excuse ---


def test_a_retry_may_count_as_a_repeat_only_of_types_that_repeat_and_only_if_a_try_failed(ledger: Ledger) -> None:
    for number, type_ in ((1, "LeadCapture"), (2, "Message")):
        (event,) = send(ledger, number, type_=type_)
        ledger.failed(event)
    send(ledger, 3, type_="LeadCapture")

    def land(number: int, type_: str, name: str) -> None:
        for offset, suffix in enumerate(("", ".2")):
            record = landed(body(number, type_), 2 * number + offset, suffix=suffix, type_=name)
            ledger.land([with_headers(record, ce_time="2026-11-20T09:00:01.120Z")])
            ledger.retire()  # Too early for what a failed try may have left.

    land(1, "LeadCapture", "lead.captured")
    assert not ledger.faults
    assert ledger.excused == {"repeat": 1}
    land(2, "Message", "message.saved")
    assert ledger.faults == {"duplicated": 1}
    land(3, "LeadCapture", "lead.captured")
    assert ledger.faults == {"duplicated": 2}


def test_two_relays_may_double_what_both_were_sent_and_nothing_else(ledger: Ledger) -> None:
    (done,) = send(ledger, 1)
    chat = Chat()
    tried = ledger.send(chat, body(2))
    ledger.excuse_doubled()
    for event in (done, tried):
        ledger.answered(event)
    ledger.land([landed(body(1)), landed(body(2), 1), landed(body(2), 2)])
    assert not ledger.faults
    assert ledger.excused == {"doubled": 1}

    ledger.land([landed(body(2), 3), landed(body(1), 4)])

    assert ledger.faults == {"duplicated": 2}


def test_two_relays_may_double_a_repeat_too_and_nothing_else(ledger: Ledger) -> None:
    value = body(1, "LivechatEdit")
    event = ledger.send(Chat(), value)
    for _ in range(2):
        ledger.failed(event)
    ledger.excuse_doubled()
    ledger.answered(event)

    for offset, suffix in enumerate(("", ".2", ".2", "")):
        ledger.land([landed(value, offset, suffix=suffix, type_="session.edited")])
    assert not ledger.faults
    assert ledger.excused == {"repeat": 1, "doubled": 2}

    for offset, suffix in enumerate((".2", "", ".4"), start=4):
        ledger.land([landed(value, offset, suffix=suffix, type_="session.edited")])
    assert ledger.faults == {"duplicated": 3}


def test_a_body_that_is_too_large_may_be_announced_in_place_of_itself(ledger: Ledger) -> None:
    chat = Chat()
    for number in (1, 2):
        ledger.answered(ledger.send(chat, body(number), large=number == 1))

    def announced(number: int) -> Landed:
        record = with_headers(
            landed(body(number), number), relay_error_reason="rejected_by_kafka", relay_error_detail="too large"
        )
        return record._replace(topic=DEAD, partition=0, value=b"{}")

    ledger.land([announced(1)])
    assert not ledger.faults
    assert ledger.excused == {"too large": 1}

    ledger.keep([body(1), body(7)])
    assert not ledger.faults
    ledger.keep([body(2)])
    assert ledger.faults == {"missing": 1}

    ledger.land([announced(2)])
    assert ledger.faults == {"missing": 1, "corrupted": 1}


def test_a_clock_that_was_ahead_excuses_timestamps_by_as_much_and_no_more(ledger: Ledger) -> None:
    send(ledger, 1, 2)
    ledger.clock_ahead = 3600
    now = int(time.time() * 1000)

    ledger.land([landed(body(1))._replace(timestamp=now + 3_500_000)])
    assert not ledger.faults

    ledger.land([landed(body(2), 1)._replace(timestamp=now + 3_700_000)])
    assert ledger.faults == {"corrupted": 1}
