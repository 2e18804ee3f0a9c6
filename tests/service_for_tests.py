"""A whole relay in the test's own process."""

import asyncio
import gc
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp

from relay.config import Settings
from relay.service import Service

TOKEN = "s3cret-token"
MESSAGE = b'{"_id":"c","type":"Message","messages":[{"ts":"2026-11-20T09:00:01.120Z"}]}'


@contextmanager
def process_as_it_was() -> Iterator[None]:
    """Undoes what a relay sets for its process: the garbage collector's pace and the signals."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    handlers = [signal.getsignal(number) for number in numbers]
    thresholds = gc.get_threshold()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


async def started(service: Service) -> asyncio.Task[None]:
    """Starts *service*; returns its task once its ports are open."""
    task = asyncio.create_task(service.run())
    async with asyncio.timeout(30):
        while service.ports == (0, 0):
            if task.done():
                await task
            await asyncio.sleep(0.001)
    return task


@asynccontextmanager
async def running(environ: dict[str, str]) -> AsyncIterator[Service]:
    """Yields a relay that serves, and stops it."""
    service = Service(Settings.read(environ))
    task = await started(service)
    try:
        yield service
    finally:
        service.stop()
        async with asyncio.timeout(30):
            await task


async def post(service: Service, body: bytes = MESSAGE, token: str = TOKEN, path: str = "") -> int:
    """The status of the answer to a delivery."""
    headers = {"X-RocketChat-Livechat-Token": token}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{service.ports[0]}/rocketchat{path}", data=body, headers=headers) as response,
    ):
        return response.status


async def ask(service: Service, path: str) -> tuple[int, Any]:
    """Status and content of an answer of the admin port."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{service.ports[1]}{path}") as response,
    ):
        body = await response.text()
        return response.status, await response.json() if path == "/status" else body
