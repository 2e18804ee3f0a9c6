"""Fixtures of the unit tests."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from prometheus_client import CollectorRegistry

from relay.event import Delivery, Event
from relay.metrics import Metrics

NOW = 1_764_000_000_000


@pytest.fixture
def make_event() -> Callable[..., Event]:
    """Return a function that makes events: equal arguments make equal bodies, *received_at* apart."""

    def make(
        number: int = 0,
        *,
        type_: str = "Message",
        chat: str = "chat-1",
        workspace: str = "default",
        received_at: int = NOW,
        padding: int = 0,
    ) -> Event:
        payload = {"_id": chat, "type": type_, "number": number, "padding": "x" * padding}
        delivery = Delivery(workspace, json.dumps(payload).encode(), received_at)
        return Event.of(delivery, delivery.parse())

    return make


@pytest.fixture
def metrics() -> Metrics:
    """Return collectors on a registry of their own."""
    return Metrics(CollectorRegistry())


@pytest.fixture
def until() -> Callable[[Callable[[], object]], Awaitable[None]]:
    """Return a function that waits until a condition holds."""

    async def wait(condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - of any kind
                await asyncio.sleep(0.001)

    return wait
