"""An asynchronous server for tests that are not: it runs on a loop of its own, in a thread of its own."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar

Server = TypeVar("Server")
Do = Callable[[Coroutine[Any, Any, None]], None]


@contextmanager
def in_thread(made: Callable[[], AbstractAsyncContextManager[Server]]) -> Iterator[tuple[Server, Do]]:
    """Yield what *made* makes, while it serves, and a function that runs a coroutine beside it."""
    ready: list[tuple[Server, asyncio.AbstractEventLoop, asyncio.Event]] = []
    serving = threading.Event()

    async def serve() -> None:
        stop = asyncio.Event()
        async with made() as server:
            ready.append((server, asyncio.get_running_loop(), stop))
            serving.set()
            await stop.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        finally:
            serving.set()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    assert serving.wait(30)
    server, loop, stop = ready[0]
    try:
        yield server, lambda work: asyncio.run_coroutine_threadsafe(work, loop).result(30)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
