"""A proxy in front of an HTTP server that fails as a test says: before, while or instead of passing an answer on."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from http import HTTPStatus

from yarl import URL


@dataclass(frozen=True)
class Reset:
    """Break the connection (RST) once the request has come, after so many bytes of the answer."""

    after: int = 0


@dataclass(frozen=True)
class Cut:
    """End the connection in good order after so many bytes of the answer."""

    after: int


@dataclass(frozen=True)
class Answer:
    """Answer in the server's place; it never hears of the request."""

    status: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


@dataclass
class Hold:
    """Keep the request until `release` is set: a server that is slow, or never answers."""

    release: asyncio.Event = field(default_factory=asyncio.Event)


Fault = Reset | Cut | Answer | Hold


@dataclass
class FaultyProxy:
    """Passes each request on, unless one of *faults* is for it; made by `faulty_proxy`."""

    target: URL
    port: int = 0
    #: By the beginning of the request line, such as "PUT /config"; the longest that fits counts.
    faults: dict[str, Fault] = field(default_factory=dict)
    #: The request lines that came, without the target's base path: "POST /subjects/x".
    requests: list[str] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _reserved: socket.socket | None = None
    _serving: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def _base(self) -> str:
        return self.target.path.rstrip("/")

    @property
    def url(self) -> str:
        """What to use in place of the target's URL."""
        return str(URL.build(scheme="http", host="127.0.0.1", port=self.port, path=self._base))

    def fail(self, fault: Fault, on: str = "") -> None:
        """From now on fail with *fault* where the request line begins with *on*."""
        self.faults[on] = fault

    def mend(self) -> None:
        """Pass everything on again, and what is held now too."""
        for fault in self.faults.values():
            if isinstance(fault, Hold):
                fault.release.set()
        self.faults.clear()

    async def refuse(self) -> None:
        """Refuse connections until `listen`."""
        if self._server:
            self._server.close()
            self._server = None

    async def listen(self) -> None:
        """Take connections, always on the same port."""
        if self._reserved is None:
            # Bound and never listening, it keeps the port ours while connections are refused.
            self._reserved = socket.socket()
            self._reserved.bind(("127.0.0.1", 0))
            self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.port = self._reserved.getsockname()[1]
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def close(self) -> None:
        """Break what is under way and give the port back."""
        self.mend()
        await self.refuse()
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving)
        if self._reserved:
            self._reserved.close()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Our own tasks, so that `close` knows them all: the server's would be left to the loop's end.
        task = asyncio.create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._handle(reader, writer)
        finally:
            writer.close()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request = head + await reader.readexactly(_content_length(head))
        line = self._line(head)
        self.requests.append(line)
        fault = self._fault(line)
        match fault:
            case Hold():
                await fault.release.wait()
            case Answer():
                writer.write(_answer(fault))
                await writer.drain()
                return
            case Reset(after=0):
                _reset(writer)
                return
            case _:
                pass
        answer = await self._pass_on(request)
        if isinstance(fault, Cut | Reset):
            answer = answer[: fault.after]
        writer.write(answer)
        await writer.drain()
        if isinstance(fault, Reset):
            _reset(writer)

    async def _pass_on(self, request: bytes) -> bytes:
        reader, writer = await asyncio.open_connection(self.target.host, self.target.port)
        try:
            # One request a connection: the end of the answer is the end of the connection.
            writer.write(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            return await reader.read()
        finally:
            writer.close()

    def _line(self, head: bytes) -> str:
        method, path, _ = head.split(b"\r\n", 1)[0].decode().split(" ")
        return f"{method} {path.removeprefix(self._base)}"

    def _fault(self, line: str) -> Fault | None:
        fitting = [beginning for beginning in self.faults if line.startswith(beginning)]
        return self.faults[max(fitting, key=len)] if fitting else None


@asynccontextmanager
async def faulty_proxy(target: str) -> AsyncIterator[FaultyProxy]:
    """Yield a proxy in front of the server at the URL *target*."""
    proxy = FaultyProxy(URL(target))
    await proxy.listen()
    try:
        yield proxy
    finally:
        await proxy.close()


def _content_length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def _answer(fault: Answer) -> bytes:
    headers = [("Content-Length", str(len(fault.body))), ("Connection", "close"), *fault.headers]
    lines = [f"HTTP/1.1 {fault.status} {HTTPStatus(fault.status).phrase}", *(f"{name}: {it}" for name, it in headers)]
    return "\r\n".join([*lines, "", ""]).encode() + fault.body


def _reset(writer: asyncio.StreamWriter) -> None:
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
