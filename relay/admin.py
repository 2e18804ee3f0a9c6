"""The admin port: metrics, health, status. Never a chat id, a token or a body."""

from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder


def application(
    *,
    registry: CollectorRegistry,
    unready: Callable[[], Awaitable[str | None]],
    status: Callable[[], dict[str, Any]],
) -> web.Application:
    """
    The admin port's application.

    *unready* says why an event cannot be made durable now, if it cannot; *status* is the body of `/status`.
    """

    async def metrics(request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    async def healthz(_: web.Request) -> web.Response:
        # That this answers is the answer. Never about Kafka: a restart would not bring it back.
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        # Not about Kafka either: a sidecar that is not ready takes its whole pod out of service.
        reason = await unready()
        return web.Response(status=200 if reason is None else 503, text=f"{reason or 'ok'}\n")

    async def show_status(_: web.Request) -> web.Response:
        return web.Response(body=orjson.dumps(status()), content_type="application/json")

    app = web.Application()
    app.add_routes(
        [
            web.get("/metrics", metrics),
            web.get("/healthz", healthz),
            web.get("/readyz", readyz),
            web.get("/status", show_status),
        ]
    )
    return app
