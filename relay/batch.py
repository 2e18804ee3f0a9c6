"""How events lie in a row of the spool: JSON for what is small, their bodies one after the other."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import orjson

from relay.dedupe import DIGEST_BYTES
from relay.event import DeadLetterReason, Event, is_repeatable

#: An event with its sequence.
Entry = tuple[int, Event]

#: A row holds at most about this many bytes of bodies; a larger body has a row of its own.
ROW_BYTES = 1 << 20


def rows(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    start = size = 0
    for index, (_, event) in enumerate(entries):
        if size and size + len(event.body) > ROW_BYTES:
            yield entries[start:index]
            start, size = index, 0
        size += len(event.body)
    if entries:
        yield entries[start:]


def encode(entries: Iterable[Entry]) -> tuple[str, bytes]:
    fields: list[list[Any]] = []
    bodies: list[bytes] = []
    offset = 0
    for sequence, (
        workspace,
        type_,
        key,
        digest,
        occurrence,
        received_at,
        time_,
        reason,
        detail,
        body,
        schema,
    ) in entries:
        row = (sequence, workspace, type_, key, digest.hex(), occurrence, received_at, time_, reason, detail)
        fields.append([*row, offset, len(body), schema])
        bodies.append(body)
        offset += len(body)
    return orjson.dumps(fields).decode(), b"".join(bodies)


def decode(events: str, bodies: bytes) -> Iterator[Entry]:
    for (
        sequence,
        workspace,
        type_,
        key,
        digest,
        occurrence,
        received_at,
        time_,
        reason,
        detail,
        offset,
        size,
        schema,
    ) in orjson.loads(events):
        yield (
            sequence,
            Event(
                workspace,
                type_,
                key,
                bytes.fromhex(digest),
                occurrence,
                received_at,
                time_,
                reason and DeadLetterReason(reason),
                detail,
                bodies[offset : offset + size],
                schema,
            ),
        )


def sizes(events: str) -> list[int]:
    """Of a row's bodies, in bytes."""
    return [fields[11] for fields in orjson.loads(events)]


def digests(events: str) -> bytes:
    """What the dedupe memory keeps of a row's events: those of types that never repeat byte for byte."""
    kept = [fields[4][: 2 * DIGEST_BYTES] for fields in orjson.loads(events) if not is_repeatable(fields[2])]
    return bytes.fromhex("".join(kept))
