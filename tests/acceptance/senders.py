"""Rocket.Chats under load: many chats at once, each sending its events one after the other, with retries."""

import asyncio
import itertools
import random
import threading
import time
import uuid
from collections import Counter
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import uvloop
from oracle import Sent
from relay_process import TOKEN, wait_until

from relay.dev.chats import conversation
from relay.dev.rocketchat import Attempt, RocketChat

#: Seconds from one try to the next: short, so that retries meet a relay that is just starting again.
GAP = 0.3


class Senders:
    """
    *chats* at once send *rate* events a second altogether, while the with-block runs; each event is answered, or given
    up, before its chat's next one is sent. What a chat missed while it waited is not caught up.
    """

    def __init__(self, url: str, *, seed: int = 0, chats: int = 64, rate: float = 500.0) -> None:
        self._player = RocketChat(url, TOKEN, gap=GAP, on_attempt=self._tried)
        self._seed = seed
        self._chats = chats
        self._interval = chats / rate
        # No run's bodies are those of another run against the same Kafka.
        self._run = uuid.uuid4().hex[:8]
        self._sent: list[list[Sent]] = [[] for _ in range(chats)]
        self._stopping = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run_all, name="senders")
        #: Tries by what came of them: status, or the error's name.
        self.tries: Counter[int | str] = Counter()
        #: When a try was last answered 200.
        self.answered_at = 0.0

    @property
    def answered(self) -> int:
        """How many tries were answered 200 so far."""
        return self.tries[200]

    @property
    def sent(self) -> list[Sent]:
        """What was sent so far, chat by chat."""
        return list(itertools.chain.from_iterable(self._sent))

    def wait_for_answers(self, count: int, *, seconds: float = 60) -> None:
        """Returns when *count* more tries were answered 200."""
        target = self.answered + count
        wait_until(lambda: self.answered >= target, f"{count} more answers", seconds=seconds, pause=0.002)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def _tried(self, attempt: Attempt) -> None:
        self.tries[attempt.status if attempt.status is not None else str(attempt.error)] += 1
        if attempt.delivered:
            self.answered_at = time.monotonic()

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
        rng = random.Random(f"{self._run}-{self._seed}-{number}")
        loop = asyncio.get_running_loop()
        due = loop.time() + self._interval * number / self._chats
        while True:
            for body in conversation(rng, started_at=datetime.now(UTC), messages=40):
                await asyncio.sleep(due - loop.time())
                if self._stopping.is_set():
                    return
                outcome = await self._player.deliver(body)
                self._sent[number].append(Sent(body, outcome.delivered))
                due = max(due + self._interval, loop.time())
