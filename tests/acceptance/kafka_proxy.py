"""A proxy between the relay and a broker that can keep one request or answer back: a moment made to last."""

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

PRODUCE, FETCH, LIST_OFFSETS, INIT_PRODUCER_ID, END_TXN = 0, 1, 2, 22, 26


class KafkaProxy:
    """
    Listens on `port` for what is meant for the broker at `target`, which must advertise the proxy's address.

    Knows of the protocol only that requests and answers begin with their length, and where a request's kind stands.
    """

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.target = 0
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._serve, name="kafka-proxy")
        self._listens = threading.Event()
        self._stop = asyncio.Event()
        self._decide: asyncio.Future[bool] = self._loop.create_future()
        self._held_request: int | None = None
        self._held_answer: int | None = None
        #: Set once what is to be kept here has come.
        self.holding = threading.Event()
        #: The kinds of all requests, in order, with their bytes.
        self.requests: list[tuple[int, bytes]] = []

    def hold_request(self, kind: int) -> None:
        """Keeps the next request of that *kind* here, with what follows it on its connection."""
        self._held_request = kind

    def hold_answer(self, kind: int) -> None:
        """Keeps the next answer to a request of that *kind* here: what was asked for is done, nobody is told."""
        self._held_answer = kind

    def drop(self) -> None:
        """Cuts the connection on which something is kept here: that never arrives."""
        self._loop.call_soon_threadsafe(self._decide.set_result, False)

    def forward(self) -> None:
        """Lets what is kept here go on to where it was meant for, late."""
        self._loop.call_soon_threadsafe(self._decide.set_result, True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listens.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _serve(self) -> None:
        with self._runner:  # It cancels what is still under way, and waits for that.
            self._runner.run(self._run())

    async def _run(self) -> None:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._connection(reader, writer))
            task.add_done_callback(lambda _: writer.close())  # Also of one that is cancelled before its first step.

        server = await asyncio.start_server(connected, sock=self._listening)
        self._listens.set()
        await self._stop.wait()
        server.close()
        await asyncio.sleep(0.01)  # What is accepted and not yet known to us would stay open for good.

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            return
        kinds: dict[int, int] = {}

        async def ask(frame: bytes) -> None:
            kind, _, correlation = struct.unpack_from(">hhi", frame)
            kinds[correlation] = kind
            self.requests.append((kind, frame))
            if kind == self._held_request:
                self._held_request = None
                await self._hold()

        async def answer(frame: bytes) -> None:
            (correlation,) = struct.unpack_from(">i", frame)
            if kinds.pop(correlation, None) == self._held_answer is not None:
                self._held_answer = None
                await self._hold()

        ways = {
            asyncio.ensure_future(_pump(reader, there_writer, ask)),
            asyncio.ensure_future(_pump(there_reader, writer, answer)),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            there_writer.close()  # First: at the end even the waiting is cancelled.
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)

    async def _hold(self) -> None:
        self.holding.set()
        if not await self._decide:
            raise ConnectionAbortedError


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, look: Callable[[bytes], Coroutine[Any, Any, None]]
) -> None:
    try:
        while True:
            size = await reader.readexactly(4)
            frame = await reader.readexactly(int.from_bytes(size, "big"))
            await look(frame)
            writer.write(size + frame)
            await writer.drain()
    except (asyncio.IncompleteReadError, OSError):
        pass
