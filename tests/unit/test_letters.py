import hashlib
import itertools
from collections.abc import Callable

import pytest

from relay.event import DeadLetterReason, Event
from relay.operate.letters import Judge, Letter, Marks, mark
from relay.reader import Found
from relay.record import Record, RecordMaker, Topics
from relay.schemas import Schemas

MakeEvent = Callable[..., Event]
NOW = 1_764_000_000_000
MAKER = RecordMaker(Topics("events", "dead"), lambda _: None)


def found(record: Record, place: int = 3) -> Found:
    return Found(2, place, record.key, record.value, tuple(record.headers))


def letter_of(event: Event, sequence: int = 7) -> Letter:
    dead = event._replace(reason=DeadLetterReason.SCHEMA, detail="/x: required")
    letter = Letter.of(found(MAKER.record(sequence, dead, NOW)))
    assert letter
    return letter


@pytest.mark.parametrize("occurrence", [1, 2])
@pytest.mark.parametrize("workspace", ["default", "acme"])
def test_a_letter_is_the_event_that_it_was(make_event: MakeEvent, occurrence: int, workspace: str) -> None:
    event = make_event(type_="LeadCapture", workspace=workspace)._replace(occurrence=occurrence)
    judge = Judge(Schemas.load(), {"LeadCapture": "print"}, "off")
    sequence, again = judge.event(letter_of(event))
    # A time that the body does not tell is that of receipt.
    assert (sequence, again._replace(time="")) == (7, event._replace(schema="print"))
    assert MAKER.record(7, again, NOW) == MAKER.record(7, event, NOW)


def test_a_mark_has_the_name_of_its_letter_and_lies_on_its_partition(make_event: MakeEvent) -> None:
    letter = letter_of(make_event())
    record = MAKER.record(7, make_event(), NOW)
    made = mark(letter, record, NOW + 5)
    assert (made.partition, made.value, made.timestamp) == (2, b"{}", NOW + 5)
    back = Letter.of(found(made, 9))
    assert back
    assert (back.is_mark, back.identity, back.headers["relay_replayed"]) == (True, letter.identity, "2@3")
    assert not letter.is_mark


def test_letters_differ_by_id_sequence_and_time(make_event: MakeEvent) -> None:
    same = {letter_of(make_event(), 7).identity for _ in range(2)}
    others = {
        letter_of(event, sequence).identity
        for event, sequence in ((make_event(1), 7), (make_event(), 8), (make_event(received_at=NOW - 1), 7))
    }
    assert len(same | others) == 4


def test_marks_know_what_was_noted_and_nothing_else() -> None:
    # All in one bucket, and so alike that one is found across two others.
    noted = [b"ab" + bytes([number, 97, 98, number]) + b"ab" * 5 for number in range(50)]
    noted += [b"ab" * 8]
    across = [
        (first + second)[shift : shift + 16] for first, second in itertools.pairwise(noted) for shift in range(2, 16, 2)
    ]
    marks = Marks()
    assert b"ab" * 8 not in marks
    for identity in noted:
        marks.add(identity)
    assert all(identity in marks for identity in noted)
    assert not any(identity in marks for identity in across if identity not in noted)


def test_marks_of_many_letters_are_all_known() -> None:
    marks = Marks()
    identities = [hashlib.blake2b(b"%d" % number, digest_size=16).digest() for number in range(20_000)]
    for identity in identities[:10_000]:
        marks.add(identity)
    assert all(identity in marks for identity in identities[:10_000])
    assert not any(identity in marks for identity in identities[10_000:])
