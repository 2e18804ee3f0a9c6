"""
The webhook port. `_accept` is what happens to every delivery, from top to bottom.

Rocket.Chat counts exactly 200 as success and stores a response body as the room's `crmData`: so 200 with an empty body
is the one success, and everything else goes through the table in answers.py.
"""

import asyncio
import logging
import socket
import struct
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

from aiohttp import ClientPayloadError, StreamReader, hdrs, web
from aiohttp.web_protocol import RequestHandler

from relay.answers import INTERNAL, STATUS, TITLES, Accepted, problem
from relay.auth import Tokens
from relay.errors import (
    ClientDisconnected,
    Draining,
    Rejected,
    TooLarge,
)
from relay.event import (
    DEFAULT_WORKSPACE,
    EVENT_TYPES,
    NO_SCHEMAS,
    DeadLetterReason,
    Delivery,
    Event,
    EventTypes,
    is_test_delivery,
)
from relay.metrics import Metrics
from relay.redact import Redaction
from relay.reports import Reports

log = logging.getLogger(__name__)

PATH = "/rocketchat"
TOKEN_HEADER = "X-RocketChat-Livechat-Token"  # noqa: S105
#: Seconds after which Rocket.Chat gives an answer up, by default.
SENDER_PATIENCE = 5.0
_TCP_INFO_BYTES, _LAST_DATA_RECEIVED = 56, 52
#: Seconds for the body to arrive.
BODY_TIMEOUT = 60.0
#: Seconds an idle connection is kept: longer than the sender keeps it, or it would meet a closed one.
KEEP_ALIVE = 75.0


class EventStore(Protocol):
    """Where events become durable."""

    async def append(self, event: Event) -> bool:
        """Makes *event* durable; False for a retry of one that is. Raises: errors.Unavailable."""

    def answered(self, event: Event) -> None:
        """Notes that the sender has its answer."""


class Judge(Protocol):
    """Knows the schemas."""

    def judge(self, rocketchat_type: str, payload: object) -> str | None:
        """What is wrong with *payload*, if anything."""


class Ingress:
    """Takes deliveries in and answers them."""

    def __init__(
        self,
        *,
        tokens: Tokens,
        store: EventStore,
        schemas: Judge | None,
        types: EventTypes = EVENT_TYPES,
        fingerprints: Mapping[str, str] = NO_SCHEMAS,
        enforce: bool,
        redaction: Redaction,
        max_body_bytes: int,
        metrics: Metrics,
    ) -> None:
        """Without *schemas* no payload is judged; with *enforce* invalid events become dead letters."""
        self._tokens = tokens
        self._store = store
        self._schemas = schemas
        self._types = types
        self._fingerprints = fingerprints
        self._enforce = enforce
        self._reports = Reports()
        self._redaction = redaction
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics
        self._codes = {code: metrics.http_requests.labels(str(code)) for code in (200, *TITLES)}
        self._under_way = 0
        self._settled: asyncio.Future[None] | None = None
        #: Whether every delivery is refused, because the relay is about to stop.
        self.draining = False

    def server(self) -> web.Server:
        """The protocol factory of the port: without a router, for there is one route."""
        return _Server(self)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers one request."""
        started = time.perf_counter()
        workspace = _workspace(request.path)
        if workspace is None:
            return self.problem(404, f"There is no such path; deliveries go to {PATH} or {PATH}/{{workspace}}.")
        if request.method != hdrs.METH_POST:
            refusal = self.problem(405, "Deliveries are POSTed.")
            refusal.headers[hdrs.ALLOW] = hdrs.METH_POST
            return refusal
        self._under_way += 1
        try:
            response: web.StreamResponse = await self._accept(request, workspace, started)
        except Rejected as error:
            self._metrics.reject(error)
            response = self.problem(STATUS[type(error)], str(error))
        finally:
            self._under_way -= 1
            if self._settled and not self._settled.done() and not self._under_way:
                self._settled.set_result(None)
        self._metrics.accept_duration.observe(time.perf_counter() - started)
        return response

    async def settled(self) -> None:
        """Returns when no delivery is under way. For one caller at a time."""
        while self._under_way:
            self._settled = asyncio.get_running_loop().create_future()
            await self._settled

    async def _accept(self, request: web.BaseRequest, workspace: str, started: float) -> web.StreamResponse:
        match = self._tokens.match(workspace, request.headers.get(TOKEN_HEADER))
        if self.draining:
            raise Draining
        body = await self._body(request)

        delivery = Delivery(match.workspace, body, time.time_ns() // 1_000_000)
        payload = delivery.parse()
        if match.slot:
            self._metrics.count(self._metrics.token_matches, match.workspace, match.slot)
        if is_test_delivery(payload):
            self._metrics.test_deliveries.inc()
            log.info(
                "Rocket.Chat's test button was pressed.", extra={"action": "test_delivery", "workspace": workspace}
            )
            return self._ok()
        event = self._judged(Event.of(delivery, payload, self._fingerprints, self._types), payload)
        if self._redaction:
            event = event._replace(body=self._redaction.apply(payload))

        if await self._store.append(event):
            self._metrics.count(self._metrics.events_accepted, event.workspace, event.type)
        else:
            self._metrics.events_duplicate.labels(event.workspace).inc()
        response = self._ok()
        if event.repeatable:
            await self._answer(request, response, event, started)
        return response

    async def _body(self, request: web.BaseRequest) -> bytes:
        length = request.content_length
        if length is not None and length > self._max_body_bytes:
            raise TooLarge
        if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue" and request.transport:
            # The router would do this; here it waits until the token and the length are known to be right.
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if request.content.is_eof() and length is not None:
            return request.content.read_nowait()  # The usual case: it came with the head.
        try:
            async with asyncio.timeout(BODY_TIMEOUT):
                return await self._read(request.content)
        except (ClientPayloadError, ConnectionError) as error:
            raise ClientDisconnected from error
        except TimeoutError:
            raise ClientDisconnected("The body did not arrive in time.") from None

    async def _read(self, content: StreamReader) -> bytes:
        body = bytearray()
        while chunk := await content.readany():
            body += chunk
            if len(body) > self._max_body_bytes:
                raise TooLarge
        return bytes(body)

    def _judged(self, event: Event, payload: dict[str, object]) -> Event:
        if event.reason is not None or self._schemas is None:
            return event
        fault = self._schemas.judge(event.type, payload)
        if fault is None:
            return event
        if self._enforce:
            return event._replace(reason=DeadLetterReason.SCHEMA, detail=fault)
        self._reports.invalid(event.type, fault)
        return event._replace(detail=fault)

    async def _answer(
        self, request: web.BaseRequest, response: web.StreamResponse, event: Event, started: float
    ) -> None:
        # Of the types that repeat for real, a repeat is a retry only if this answer does not get out in time.
        try:
            await response.prepare(request)
            await response.write_eof()
        except ConnectionError:
            return  # The sender is gone; it will try again.
        transport = request.transport
        if transport is None or transport.is_closing():
            return
        if max(time.perf_counter() - started, _since_sent(transport)) < SENDER_PATIENCE:
            self._store.answered(event)

    def _ok(self) -> Accepted:
        self._codes[200].inc()
        return Accepted()

    def problem(self, status: int, detail: str) -> web.Response:
        """An error answer, counted."""
        self._codes[status].inc()
        return problem(status, detail)


def _since_sent(transport: asyncio.Transport) -> float:
    """
    Seconds since the sender's last byte reached this machine, where the system tells (Linux), else 0.

    A request waits for a relay that is frozen, or has no CPU, before the relay knows of it.
    """
    connection = transport.get_extra_info("socket")
    if connection is None or sys.platform != "linux":
        return 0.0
    try:
        # tcpi_last_data_recv of struct tcp_info, in milliseconds: linux/tcp.h.
        information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        (milliseconds,) = struct.unpack_from("=I", information, _LAST_DATA_RECEIVED)
    except (OSError, struct.error):  # It has just ended, or this is a kernel that only looks like Linux.
        return 0.0
    return float(milliseconds) / 1000


def _workspace(path: str) -> str | None:
    if path == PATH:
        return DEFAULT_WORKSPACE
    prefix, _, workspace = path.rpartition("/")
    return workspace if prefix == PATH and workspace else None


class _Server(web.Server):
    """Makes connections that answer what is not even HTTP like everything else."""

    def __init__(self, ingress: Ingress) -> None:
        super().__init__(ingress.handle, access_log=None, auto_decompress=False, keepalive_timeout=KEEP_ALIVE)
        self._ingress = ingress

    def __call__(self) -> RequestHandler:
        return _Connection(self._ingress, self, loop=self._loop, **self._kwargs)


class _Connection(RequestHandler):
    __slots__ = ("_ingress",)

    def __init__(self, ingress: Ingress, manager: web.Server, **options: Any) -> None:
        super().__init__(manager, **options)
        self._ingress = ingress

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - aiohttp's text quotes the request, and so a token
    ) -> web.StreamResponse:
        if request.writer.output_size:
            raise ConnectionError("The answer had begun.")
        if status >= INTERNAL:
            log.error(
                "A delivery failed: a fault of the relay's own.", exc_info=exc, extra={"action": "handler_failed"}
            )
            response = self._ingress.problem(INTERNAL, "A fault of the relay's own; its log says more.")
        else:
            response = self._ingress.problem(400, "The request is not HTTP that can be understood.")
        response.force_close()
        return response
