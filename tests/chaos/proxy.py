"""Proxies before the brokers that reset, delay and cut connections, knowing nothing of what they carry."""

import asyncio
import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

_PART = 65536


class Proxies:
    """*count* proxies for ports of this machine, while the with-block runs. Any thread may make them fail."""

    def __init__(self, count: int) -> None:
        self._listening = [_listening() for _ in range(count)]
        #: Where they listen.
        self.ports = [listening.getsockname()[1] for listening in self._listening]
        #: Where each passes connections on to.
        self.targets = [0] * count
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),), name="proxies")
        self._writers: set[asyncio.StreamWriter] = set()
        self._delay = 0.0
        self._allowance: int | None = None

    def reset(self) -> None:
        """Breaks every connection (RST), on both sides."""
        self._loop.call_soon_threadsafe(self._reset)

    def cut(self, after: int) -> None:
        """Lets *after* bytes more pass, and breaks the connection that carries the last of them, within a message."""
        self._allowance = after

    @property
    def cutting(self) -> bool:
        """Whether there is still a connection to be cut."""
        return self._allowance is not None

    def delay(self, seconds: float) -> None:
        """From now on keeps everything for *seconds*, each way; 0 ends that."""
        self._delay = seconds

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        under_way: set[asyncio.Task[None]] = set()

        async def connected(target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            under_way.add(task)
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._connection(self.targets[target], reader, writer)
            under_way.discard(task)

        servers: list[asyncio.Server] = []
        for number, listening in enumerate(self._listening):

            def accept(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int = number
            ) -> "asyncio.Future[None]":
                return asyncio.ensure_future(connected(number, reader, writer))

            servers.append(await asyncio.start_server(accept, sock=listening))
        await self._stop.wait()
        for server in servers:
            server.close()
        for task in under_way:
            task.cancel()
        if under_way:
            await asyncio.wait(under_way)

    async def _connection(self, target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ways: set[asyncio.Task[None]] = set()
        there: asyncio.StreamWriter | None = None
        try:
            self._writers.add(writer)
            there_reader, there = await asyncio.open_connection("127.0.0.1", target)
            self._writers.add(there)
            ways = {
                asyncio.create_task(self._pass_on(reader, there)),
                asyncio.create_task(self._pass_on(there_reader, writer)),
            }
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            if ways:
                await asyncio.wait(ways)
            for end in filter(None, (writer, there)):
                self._writers.discard(end)
                end.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while part := await reader.read(_PART):
                if self._delay:
                    await asyncio.sleep(self._delay)
                if self._allowance is not None:
                    self._allowance -= len(part)
                    if self._allowance <= 0:
                        writer.write(part[: self._allowance or None])
                        self._allowance = None
                        return
                writer.write(part)
                await writer.drain()

    def _reset(self) -> None:
        for writer in self._writers:
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


def _listening() -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", 0))
    listening.listen(100)
    return listening
