"""Proxies before the brokers that reset, delay and cut connections, knowing nothing of what they carry."""

import asyncio
import contextlib
import functools
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
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._serve, name="proxies")
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

    def _serve(self) -> None:
        with self._runner:  # It cancels what is still under way, and waits for that.
            self._runner.run(self._run())

    async def _run(self) -> None:
        def accept(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.create_task(self._connection(self.targets[number], reader, writer))
            task.add_done_callback(lambda _: writer.close())  # Also of one that is cancelled before its first step.

        servers = [
            await asyncio.start_server(functools.partial(accept, number), sock=listening)
            for number, listening in enumerate(self._listening)
        ]
        await self._stop.wait()
        for server in servers:
            server.close()
        await asyncio.sleep(0.01)  # What is accepted and not yet known to us would stay open for good.

    async def _connection(self, target: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there_reader, there = await asyncio.open_connection("127.0.0.1", target)
        except OSError:
            return
        ends = {writer, there}
        self._writers |= ends
        ways = {
            asyncio.create_task(self._pass_on(reader, there)),
            asyncio.create_task(self._pass_on(there_reader, writer)),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            there.close()  # First: at the end even the waiting is cancelled.
            self._writers -= ends
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)

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
            if writer.is_closing():
                continue  # Its socket may be closed already.
            connection: socket.socket = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


def _listening() -> socket.socket:
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", 0))
    listening.listen(100)
    return listening
