"""The answers of the webhook port: 200 as Rocket.Chat wants it, and an error for every reason to reject a delivery."""

import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache

import orjson
from aiohttp import HttpVersion11, hdrs, web

from relay.errors import (
    BadJson,
    BadToken,
    ClientDisconnected,
    Draining,
    KafkaUnavailable,
    Rejected,
    SpoolFailed,
    SpoolFull,
    TooLarge,
)

RETRY_AFTER = "5"
INTERNAL = 500
_UNAVAILABLE = 503

STATUS: Mapping[type[Rejected], int] = {
    BadJson: 400,
    BadToken: 401,
    ClientDisconnected: 400,
    TooLarge: 413,
    SpoolFull: _UNAVAILABLE,
    SpoolFailed: _UNAVAILABLE,
    KafkaUnavailable: _UNAVAILABLE,
    Draining: _UNAVAILABLE,
}
TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    413: "Content Too Large",
    INTERNAL: "Internal Server Error",
    _UNAVAILABLE: "Service Unavailable",
}


def problem(status: int, detail: str) -> web.Response:
    """An error answer (RFC 9457)."""
    body = {"type": "about:blank", "title": TITLES[status], "status": status, "detail": detail}
    response = web.Response(status=status, body=orjson.dumps(body), content_type="application/problem+json")
    if status == _UNAVAILABLE:
        response.headers[hdrs.RETRY_AFTER] = RETRY_AFTER
    return response


class Accepted(web.StreamResponse):
    """200 with an empty body, in one write. Every answer is the same but for the date, so it is not put together."""

    _sent = _kept = False

    async def prepare(self, request: web.BaseRequest) -> None:
        if self._sent:
            return
        self._sent = True
        if request.transport is None:
            raise ConnectionResetError("The sender is gone.")
        self._kept = request.keep_alive
        request.transport.write(_accepted_head(int(time.time()), request.version < HttpVersion11, self._kept))

    async def write_eof(self, data: bytes = b"") -> None:
        """There is no body."""

    @property
    def keep_alive(self) -> bool:
        return self._kept


@lru_cache(maxsize=8)
def _accepted_head(second: int, old: bool, kept: bool) -> bytes:
    connection = {(False, False): "Connection: close\r\n", (True, True): "Connection: keep-alive\r\n"}.get(
        (old, kept), ""
    )
    date = formatdate(second, usegmt=True)
    return f"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nDate: {date}\r\n{connection}\r\n".encode()
