import random
from collections.abc import Callable

import pytest

from relay.batch import ROW_BYTES, decode, encode, rows
from relay.event import EVENT_TYPES, DeadLetterReason, Event

MakeEvent = Callable[..., Event]


@pytest.fixture
def peculiar(make_event: MakeEvent) -> list[Event]:
    """Return events that differ in every field."""
    plain = make_event()
    return [
        plain,
        *(make_event(type_=name, chat=f"chat {name}", workspace="acme") for name in EVENT_TYPES),
        plain._replace(type="unknown", key=None, reason=DeadLetterReason.NO_KEY, detail="/_id: not a text"),
        plain._replace(key='z\u00fcrich "\\\n\x00\U0001f600', time="2026-11-20T09:00:01.120Z"),
        plain._replace(detail="/visitor: required"),
        plain._replace(occurrence=1 << 40, received_at=(1 << 53) - 1, body=b"\x00\xff not even text \r\n"),
        plain._replace(body=b"{}"),
        *(plain._replace(reason=reason) for reason in DeadLetterReason),
    ]


def test_what_was_written_is_read(peculiar: list[Event]) -> None:
    entries = list(enumerate(peculiar, start=1 << 40))
    read = list(decode(*encode(entries)))
    assert read == entries
    assert all(event.reason is None or isinstance(event.reason, DeadLetterReason) for _, event in read)


def test_nothing_is_written_as_nothing() -> None:
    assert list(decode(*encode([]))) == []
    assert list(rows([])) == []


def test_rows_keep_every_entry_in_order_and_hold_about_so_many_bytes(make_event: MakeEvent) -> None:
    rng = random.Random(1)
    event = make_event()
    sizes = [rng.choice([10, 1000, 200_000, ROW_BYTES - 1, ROW_BYTES, ROW_BYTES + 1]) for _ in range(100)]
    entries = [(number, event._replace(body=b"x" * size)) for number, size in enumerate(sizes, start=1)]

    made = list(rows(entries))

    assert [entry for row in made for entry in row] == entries
    for row in made:
        assert len(row) == 1 or sum(len(entry.body) for _, entry in row) <= ROW_BYTES


def test_a_body_larger_than_a_row_has_one_of_its_own(make_event: MakeEvent) -> None:
    small, large = make_event(), make_event(padding=2 * ROW_BYTES)
    made = list(rows([(1, small), (2, large), (3, small), (4, small)]))
    assert [[sequence for sequence, _ in row] for row in made] == [[1], [2], [3, 4]]
