"""
Which deliveries are retries of Rocket.Chat's own.

It sends no delivery id; a retry equals its first try byte for byte, and comes within minutes. Most event types never
repeat for real, so an equal body is a retry. The `repeatable` types may: of these a repeat is a retry only if no
answer for it got out in time. Knows no clock: every time is given, in milliseconds, and must not run backwards.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from relay.event import Event

#: Of a digest's 32 bytes this many are remembered: enough that no two events ever share them.
DIGEST_BYTES = 16
_TIME_BYTES = 4
_ENTRY_BYTES = DIGEST_BYTES + _TIME_BYTES
_BUCKETS = 4096
_SLICES = 4


@dataclass(slots=True)
class Repeat:
    """What is remembered of an event whose like may come again."""

    accepted_at: int
    #: How many times it was accepted as a new event.
    occurrence: int
    #: Whether an answer got out in time, so that the next one is no retry.
    answered: bool


def new_repeat(event: Event, now: int) -> Repeat:
    """What is remembered of *event* when it has just been accepted."""
    return Repeat(now, event.occurrence, answered=False)


class _Slice:
    # A Python set needs 120 bytes a digest: 180 MB for a window at 5,000 events/s. Here it is 22, at the same speed.
    def __init__(self, started_at: int) -> None:
        self.started_at = started_at
        self._buckets = [b""] * _BUCKETS

    def add(self, digests: bytes, accepted_at: int) -> None:
        age = max(0, accepted_at - self.started_at).to_bytes(_TIME_BYTES, "big")
        buckets = self._buckets
        # As _bucket has it, but for the call: this is done a million times at a start.
        for start in range(0, len(digests), DIGEST_BYTES):
            digest = digests[start : start + DIGEST_BYTES]
            buckets[(digest[0] << 8 | digest[1]) % _BUCKETS] += digest + age

    def accepted_at(self, digest: bytes) -> int | None:
        bucket = self._buckets[_bucket(digest)]
        place = bucket.find(digest)
        if place < 0:
            return None
        return self.started_at + int.from_bytes(bucket[place + DIGEST_BYTES : place + _ENTRY_BYTES], "big")


def _bucket(digest: bytes) -> int:
    return (digest[0] << 8 | digest[1]) % _BUCKETS


class DedupeMemory:
    """The deliveries accepted within the window."""

    def __init__(self, window: int) -> None:
        """*window* in milliseconds; 0 recognises nothing."""
        self.window = window
        self._slices: deque[_Slice] = deque()
        self._repeats: dict[bytes, Repeat] = {}

    def restore(self, digests: Iterable[tuple[int, bytes]], repeats: Mapping[bytes, Repeat], now: int) -> None:
        """Takes up what a former run remembered: when accepted, and the digests, DIGEST_BYTES each."""
        for accepted_at, joined in digests:
            # That run's clock may have been ahead of this one's.
            self._add(joined, min(accepted_at, now))
        for repeat in repeats.values():
            repeat.accepted_at = min(repeat.accepted_at, now)
        self._repeats.update(sorted(repeats.items(), key=lambda item: item[1].accepted_at))

    def recognises(self, event: Event, now: int) -> bool:
        """Whether *event* is a retry of one that was accepted."""
        if not self.window:
            return False
        oldest = now - self.window
        if event.repeatable:
            repeat = self._repeats.get(event.digest)
            return repeat is not None and not repeat.answered and repeat.accepted_at > oldest
        digest = event.digest[:DIGEST_BYTES]
        for slice_ in self._slices:
            accepted_at = slice_.accepted_at(digest)
            if accepted_at is not None and accepted_at > oldest:
                return True
        return False

    def occurrence(self, event: Event, now: int) -> int:
        """The how-manieth event with this body within the window *event* would be."""
        repeat = self._repeats.get(event.digest)
        if repeat is None or repeat.accepted_at <= now - self.window:
            return 1
        return repeat.occurrence + 1

    def accepted(self, event: Event, now: int) -> None:
        """Remembers *event*, now that it is durable."""
        if not self.window:
            return
        if event.repeatable:
            self._repeats.pop(event.digest, None)  # To the end: forget() relies on the order.
            self._repeats[event.digest] = new_repeat(event, now)
        else:
            self._add(event.digest[:DIGEST_BYTES], now)

    def answered(self, event: Event) -> Repeat | None:
        """Notes that an answer for *event* got out in time; returns what is to be stored, if that is news."""
        repeat = self._repeats.get(event.digest)
        if repeat is None or repeat.answered:
            return None
        repeat.answered = True
        return repeat

    def known_answered(self, digests: Iterable[bytes]) -> dict[bytes, Repeat]:
        """Of the events with these *digests* those for which an answer got out in time."""
        known = ((digest, self._repeats.get(digest)) for digest in digests)
        return {digest: repeat for digest, repeat in known if repeat is not None and repeat.answered}

    def forget(self, now: int) -> int | None:
        """Drops what is too old; returns the time before which nothing is remembered, if anything was dropped."""
        oldest = now - self.window
        length = self.window // _SLICES
        dropped = None
        while self._slices and self._slices[0].started_at + length < oldest:
            self._slices.popleft()
            dropped = oldest
        # A dict keeps its order: the first are the oldest.
        while self._repeats:
            digest, repeat = next(iter(self._repeats.items()))
            if repeat.accepted_at > oldest:
                break
            del self._repeats[digest]
            dropped = oldest
        return dropped

    def _add(self, digests: bytes, accepted_at: int) -> None:
        if not self._slices or accepted_at - self._slices[-1].started_at > self.window // _SLICES:
            self._slices.append(_Slice(accepted_at))
        self._slices[-1].add(digests, accepted_at)
