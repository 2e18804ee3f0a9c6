"""Rocket.Chats under load: many chats at once, each sending its events one after the other until they are taken."""

import asyncio
import itertools
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import uvloop
from relay_process import TOKEN, wait_until

from relay.dev.chats import conversation
from relay.dev.rocketchat import RocketChat

from .ledger import Chat, Event, Ledger

#: Seconds from one try to the next: short, so that retries meet a relay that is just starting again.
GAP = 0.3
#: After so many tries some senders give up, as Rocket.Chat does.
TRIES = 5
#: The share of chats whose senders do that; the others try until they are answered.
_IMPATIENT = 0.1
#: The share of events that go to the dead letters: half are of a type that nobody knows, half break their schema.
_STRANGE = 0.01
_MESSAGES = 12
#: Answers that a fault may bring about; any other is a fault of the relay's own.
_EXPECTED = (200, 503, None)
#: Seconds' worth of events that a chat catches up on after it had to wait. More, and a slow machine is never done.
_OWED = 10.0
_NEVER_CAME = "connection refused"


class Load:
    """
    *chats* at once send *rate* events a second altogether, while the with-block runs. A chat that had to wait catches
    up on a little of that at twice its pace: the rate that was reached is what `ledger` counts. With the same *seed*
    the chats say the same.
    """

    def __init__(self, ledger: Ledger, *, rate: float, seed: int, chats: int = 128) -> None:
        self._ledger = ledger
        self._chats = chats
        self._interval = chats / rate
        self._seed = seed
        self._rng = random.Random(seed)
        self._port = 0
        self._player = RocketChat("http://127.0.0.1:1", TOKEN)
        self._under_way: Counter[int] = Counter()
        self._cuts = self._trying = 0
        self._paused = False
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run_all, name="load")
        #: Tries by what came of them: status, or the error's name.
        self.tries: Counter[int | str] = Counter()
        #: When an event was last answered 200 that was sent at the time before it (monotonic).
        self.answered_sent_at = 0.0

    def send_to(self, port: int) -> None:
        """From now on every try goes to that port of this machine."""
        self._port, self._player = port, RocketChat(f"http://127.0.0.1:{port}/rocketchat", TOKEN, retry=False)

    def under_way(self, port: int) -> int:
        """How many tries wait for their answer from that port."""
        return self._under_way[port]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nobody sends while the with-block runs, nor waits for an answer."""
        self._paused = True
        try:
            time.sleep(GAP)
            wait_until(lambda: not self._trying, "nobody waits for an answer", pause=0.05)
            yield
        finally:
            self._paused = False

    def cut(self, count: int) -> None:
        """The next *count* senders are cut off in the middle of the request, or before they have the answer."""
        self._cuts = count

    @property
    def cutting(self) -> bool:
        """Whether there are still senders to be cut off."""
        return self._cuts > 0

    @property
    def failed(self) -> bool:
        """Whether the load itself has broken down."""
        return self._failure is not None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends once each chat's event under way is answered, or given up."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _run_all(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._all())
        except BaseException as failure:  # noqa: BLE001 (it belongs to the thread that waits)
            self._failure = failure

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as chats:
            for number in range(self._chats):
                chats.create_task(self._chat(number))

    async def _chat(self, number: int) -> None:
        rng = random.Random(f"{self._seed}-{number}")
        loop = asyncio.get_running_loop()
        begun = loop.time()
        due = begun + self._interval * number / self._chats
        while True:
            chat, insists = Chat(), rng.random() >= _IMPATIENT
            for usual in conversation(rng, started_at=datetime.now(UTC), messages=_MESSAGES):
                await asyncio.sleep(max(due, begun + self._interval / 2) - loop.time())
                begun = loop.time()
                if self._stopping.is_set():
                    return
                body, reason = _strange(rng, usual) if rng.random() < _STRANGE else (usual, None)
                await self._deliver(self._ledger.send(chat, body, reason=reason), body, insists)
                due = max(due + self._interval, loop.time() - _OWED)

    async def _deliver(self, event: Event, body: bytes, insists: bool) -> None:
        for number in itertools.count(1):
            while self._paused and not self._stopping.is_set():  # noqa: ASYNC110 - another thread says so
                await asyncio.sleep(GAP)
            self._trying += 1
            try:
                answered = await self._try(body)
            finally:
                self._trying -= 1
            if answered:
                self.answered_sent_at = event.sent_at
                self._ledger.answered(event)
                return
            if answered is None:
                self._ledger.failed(event)
            if number >= TRIES and (self._stopping.is_set() or not insists):
                self._ledger.gave_up(event)
                return
            await asyncio.sleep(GAP)

    async def _try(self, body: bytes) -> bool | None:
        # None if nobody knows what came of it.
        if self._cuts > 0:
            self._cuts -= 1
            await self._cut_off(body)
            self.tries["cut off"] += 1
            return None
        port = self._port
        self._under_way[port] += 1
        try:
            (attempt,) = (await self._player.deliver(body)).attempts
        finally:
            self._under_way[port] -= 1
        self.tries[attempt.status if attempt.status is not None else str(attempt.error)] += 1
        if attempt.status not in _EXPECTED or (attempt.delivered and attempt.answer):
            self._ledger.blame("answers", f"{attempt.status} {attempt.answer[:200]!r}")
        return attempt.delivered or (False if attempt.error == _NEVER_CAME else None)

    async def _cut_off(self, body: bytes) -> None:
        request = (
            "POST /rocketchat HTTP/1.1\r\nContent-Type: application/json\r\nHost: relay\r\nConnection: close\r\n"
            f"X-RocketChat-Livechat-Token: {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        if self._rng.random() < 0.25:
            request = request[: self._rng.randrange(1, len(request))]
        try:
            async with asyncio.timeout(self._player.timeout):
                _, writer = await asyncio.open_connection("127.0.0.1", self._port)
                writer.write(request)
                await writer.drain()
                await asyncio.sleep(self._rng.choice((0.0, 0.001, 0.003)))
        except (OSError, TimeoutError):
            return
        # None once the relay has closed it.
        connection: socket.socket | None = writer.get_extra_info("socket")
        if connection is not None and self._rng.random() < 0.5:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


def _strange(rng: random.Random, body: bytes) -> tuple[bytes, str]:
    # With the reason for which it goes to the dead letters.
    if rng.random() < 0.5:
        return body.replace(b'"type":"', b'"type":"Strange', 1), "unknown_type"
    return body.replace(b'"visitor":{', b'"visitor":7,"visitor_":{', 1), "schema"
