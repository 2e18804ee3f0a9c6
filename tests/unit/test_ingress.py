import asyncio
import hashlib
import json
import logging
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiohttp import web

from relay import errors, ingress
from relay.auth import Tokens
from relay.errors import Unavailable
from relay.event import DeadLetterReason, Event
from relay.ingress import Ingress
from relay.metrics import Metrics
from relay.redact import Redaction
from relay.schemas import Schemas
from relay.values import Secret

Until = Callable[[Callable[[], object]], Awaitable[None]]
TOKEN = "s3cret-token"
MAX_BODY = 100_000
SAMPLES = Path(__file__).parents[2] / "tests" / "schemas"
MESSAGE = (SAMPLES / "message-saved" / "valid" / "Message.json").read_bytes()
LEAD = (SAMPLES / "lead-captured" / "valid" / "LeadCapture.json").read_bytes()
TEST_BUTTON = (SAMPLES / "session-closed" / "valid" / "WebhookTest.LivechatSession.json").read_bytes()


class FakeStore:
    """Where events go in these tests; says what the next append comes to."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.answered_events: list[Event] = []
        self.fault: Exception | None = None
        self.known = False
        self.gate = asyncio.Event()
        self.gate.set()
        self.appending = asyncio.Event()

    async def append(self, event: Event) -> bool:
        self.appending.set()
        await self.gate.wait()
        if self.fault is not None:
            raise self.fault
        if not self.known:
            self.events.append(event)
        return not self.known

    def answered(self, event: Event) -> None:
        self.answered_events.append(event)


class Answer(NamedTuple):
    status: int
    reason: str
    headers: dict[str, str]
    body: bytes

    @property
    def problem(self) -> dict[str, Any]:
        assert self.headers["Content-Type"] == "application/problem+json"
        problem: dict[str, Any] = json.loads(self.body)
        assert set(problem) == {"type", "title", "status", "detail"}
        assert problem["status"] == self.status
        return problem


class Client:
    """One connection to the port, byte for byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, raw: bytes) -> None:
        self.writer.write(raw)

    async def answer(self, *, head_only: bool = False) -> Answer:
        async with asyncio.timeout(10):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            line, *fields = head.rstrip("\r\n").split("\r\n")
            version, status, reason = line.split(" ", 2)
            assert version in {"HTTP/1.1", "HTTP/1.0"}
            names = [field.partition(": ")[0] for field in fields]
            assert len(names) == len(set(names))
            headers = dict(field.split(": ", 1) for field in fields)
            assert "Transfer-Encoding" not in headers
            length = 0 if head_only or int(status) < 200 else int(headers["Content-Length"])
            return Answer(int(status), reason, headers, await self.reader.readexactly(length))

    async def ended(self) -> bool:
        async with asyncio.timeout(20):
            return await self.reader.read() == b""


def request(
    body: bytes = MESSAGE,
    *headers: str,
    token: str | None = TOKEN,
    path: str = "/rocketchat",
    length: int | None = None,
) -> bytes:
    # As Rocket.Chat sends it, but for the connection that stays open.
    lines = [
        f"POST {path} HTTP/1.1",
        "Content-Type: application/json",
        *([] if token is None else [f"X-RocketChat-Livechat-Token: {token}"]),
        "Accept: */*",
        *([] if length == -1 else [f"Content-Length: {len(body) if length is None else length}"]),
        "User-Agent: node-fetch/1.0 (+https://github.com/bitinn/node-fetch)",
        "Accept-Encoding: gzip,deflate",
        "Host: relay",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Port:
    """A webhook port on loopback."""

    def __init__(self, metrics: Metrics, store: FakeStore, tmp_path: Path) -> None:
        self.metrics = metrics
        self.store = store
        self.schemas: Schemas | None = None
        self.enforce = True
        self.redact: tuple[str, ...] = ()
        (tmp_path / "workspaces").mkdir()
        (tmp_path / "workspaces" / "acme").write_text("old-of-acme\nnew-of-acme")
        self.tokens = Tokens(Secret(TOKEN), tmp_path / "workspaces")
        self.ingress: Ingress
        self.number = 0

    @asynccontextmanager
    async def open(self) -> AsyncIterator["Port"]:
        self.ingress = Ingress(
            tokens=self.tokens,
            store=self.store,
            schemas=self.schemas,
            enforce=self.enforce,
            redaction=Redaction(self.redact),
            max_body_bytes=MAX_BODY,
            metrics=self.metrics,
        )
        runner = web.ServerRunner(self.ingress.server(), shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.number = runner.addresses[0][1]
        try:
            yield self
        finally:
            await runner.cleanup()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Client]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.number)
        try:
            yield Client(reader, writer)
        finally:
            writer.close()

    async def ask(self, raw: bytes, *, head_only: bool = False) -> Answer:
        async with self.connection() as client:
            client.send(raw)
            return await client.answer(head_only=head_only)

    def count(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"relay_{name}", labels) or 0.0


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def closed_port(metrics: Metrics, store: FakeStore, tmp_path: Path) -> Port:
    return Port(metrics, store, tmp_path)


@pytest.fixture
async def port(closed_port: Port) -> AsyncIterator[Port]:
    async with closed_port.open() as port:
        yield port


# --- 200. ---


@pytest.mark.parametrize(
    ("path", "token", "workspace", "slot"),
    [
        ("/rocketchat", TOKEN, "default", "1"),
        ("/rocketchat/default", TOKEN, "default", "1"),
        ("/rocketchat/acme", "old-of-acme", "acme", "1"),
        ("/rocketchat/acme", "new-of-acme", "acme", "2"),
        ("/rocketchat?tenant=7", TOKEN, "default", "1"),
    ],
)
async def test_a_delivery_is_stored_and_answered_200_with_nothing_in_it(
    port: Port, path: str, token: str, workspace: str, slot: str
) -> None:
    before = time.time_ns() // 1_000_000
    answer = await port.ask(request(path=path, token=token))
    assert (answer.status, answer.reason, answer.body) == (200, "OK", b"")
    assert answer.headers["Content-Length"] == "0"
    assert set(answer.headers) <= {"Content-Length", "Content-Type", "Date", "Server"}
    (event,) = port.store.events
    assert (event.workspace, event.type, event.body) == (workspace, "Message", MESSAGE)
    assert before <= event.received_at <= time.time_ns() // 1_000_000
    assert port.count("http_requests_total", code="200") == 1
    assert port.count("events_accepted_total", workspace=workspace, type="Message") == 1
    assert port.count("token_matches_total", workspace=workspace, slot=slot) == 1
    assert port.count("accept_duration_seconds_count") == 1


@pytest.mark.parametrize("body", [MESSAGE, LEAD], ids=["Message", "LeadCapture"])
async def test_head_and_empty_body_leave_in_one_write(port: Port, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    writes: list[bytes] = []

    def observe(name: str) -> None:
        original = getattr(socket.socket, name)

        def observed(sock: socket.socket, data: Any, *rest: Any) -> int:
            if sock.getsockname()[1] == port.number:
                writes.append(bytes(data) if name == "send" else b"".join(data))
            return int(original(sock, data, *rest))

        monkeypatch.setattr(socket.socket, name, observed)

    observe("send")
    observe("sendmsg")
    await port.ask(request(body))
    assert len(writes) == 1
    assert writes[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert writes[0].endswith(b"\r\n\r\n")


async def test_a_retry_is_answered_200_and_counted_apart(port: Port) -> None:
    port.store.known = True
    assert (await port.ask(request())).status == 200
    assert port.count("events_duplicate_total", workspace="default") == 1
    assert port.count("events_accepted_total", workspace="default", type="Message") == 0


async def test_the_test_button_is_answered_200_and_goes_nowhere(port: Port, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    answer = await port.ask(request(TEST_BUTTON))
    assert (answer.status, answer.body) == (200, b"")
    assert port.store.events == []
    assert port.count("test_deliveries_total") == 1
    assert "test_delivery" in [getattr(record, "action", "") for record in caplog.records]


async def test_the_test_button_shows_whether_the_token_is_right(port: Port) -> None:
    assert (await port.ask(request(TEST_BUTTON, token=""))).status == 401
    assert port.count("test_deliveries_total") == 0


@pytest.mark.parametrize("header", ["Content-Type: text/plain;charset=UTF-8", "X-Nothing: else"])
async def test_no_content_type_is_needed(port: Port, header: str) -> None:
    raw = request().replace(b"Content-Type: application/json", header.encode())
    assert (await port.ask(raw)).status == 200


async def test_a_body_that_comes_in_pieces_is_put_together(port: Port, until: Until) -> None:
    raw = request()
    async with port.connection() as client:
        for start in range(0, len(raw), 97):
            client.send(raw[start : start + 97])
            await client.writer.drain()
            await asyncio.sleep(0)
        assert (await client.answer()).status == 200
    assert port.store.events[0].body == MESSAGE


async def test_a_chunked_body_is_put_together(port: Port) -> None:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (MESSAGE[:10], MESSAGE[10:]))
    raw = request(b"", "Transfer-Encoding: chunked", length=-1) + chunks + b"0\r\n\r\n"
    assert (await port.ask(raw)).status == 200
    assert port.store.events[0].body == MESSAGE


async def test_a_body_at_the_limit_is_taken(port: Port) -> None:
    body = b'{"_id":"c","type":"Message","x":"%b"}' % (b"x" * (MAX_BODY - 36))
    assert len(body) <= MAX_BODY
    body += b" " * (MAX_BODY - len(body))
    assert (await port.ask(request(body))).status == 200
    assert port.store.events[0].body == body


async def test_a_connection_may_be_used_again(port: Port) -> None:
    async with port.connection() as client:
        for expected, token in ((200, TOKEN), (401, "wrong"), (200, TOKEN)):
            client.send(request(token=token))
            assert (await client.answer()).status == expected


async def test_the_connection_ends_when_the_sender_asks_for_it(port: Port) -> None:
    async with port.connection() as client:
        client.send(request(MESSAGE, "Connection: close"))
        assert (await client.answer()).status == 200
        assert await client.ended()


async def test_expect_100_continue_is_answered_once_token_and_length_are_right(port: Port) -> None:
    async with port.connection() as client:
        client.send(request(b"", "Expect: 100-continue", length=len(MESSAGE)))
        assert (await client.answer(head_only=True)).status == 100
        client.send(MESSAGE)
        assert (await client.answer()).status == 200
    for raw, status in (
        (request(b"", "Expect: 100-continue", length=len(MESSAGE), token="wrong"), 401),
        (request(b"", "Expect: 100-continue", length=MAX_BODY + 1), 413),
    ):
        assert (await port.ask(raw)).status == status


# --- 400. ---


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'"visitor-secret"', MESSAGE.rstrip()[:-1], b"visitor-secret", b'{"a":NaN}', b"\x1f\x8b\x08"],
)
async def test_what_is_no_json_object_is_answered_400(port: Port, body: bytes) -> None:
    answer = await port.ask(request(body))
    assert answer.status == 400
    assert answer.problem["title"] == "Bad Request"
    assert b"visitor-secret" not in answer.body
    assert port.store.events == []
    assert port.count("events_rejected_total", reason="bad_json") == 1
    assert port.count("http_requests_total", code="400") == 1


async def test_a_body_that_breaks_off_is_stored_nowhere_and_counted(port: Port, until: Until) -> None:
    async with port.connection() as client:
        client.send(request(MESSAGE[:-10], length=len(MESSAGE)))
        await client.writer.drain()
    await until(lambda: port.count("events_rejected_total", reason="client_disconnected") == 1)
    assert port.store.events == []


async def test_a_body_that_never_comes_is_not_waited_for_for_ever(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "BODY_TIMEOUT", 0.01)
    async with port.connection() as client:
        client.send(request(b"", length=10))
        assert (await client.answer()).status == 400
    assert port.count("events_rejected_total", reason="client_disconnected") == 1


@pytest.mark.parametrize(
    "raw",
    [
        b"GARBAGE\r\n\r\n",
        b"POST /rocketchat HTTP/1.1\r\nX-RocketChat-Livechat-Token: s3cret-token\r\nContent-Length: ten\r\n\r\n",
        b"POST /rocketchat HTTP/1.1\r\nX-RocketChat-Livechat-Token s3cret-token\r\n\r\n",
        b"POST /rocketchat HTTP/1.1\r\nX-RocketChat-Livechat-Token: s3cret-token" + b"x" * 100_000 + b"\r\n\r\n",
        b"POST /rocketchat HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello\r\n\r\n",
    ],
    ids=lambda raw: repr(raw[-30:]),
)
async def test_what_is_not_http_is_answered_400_like_everything_else(
    port: Port, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await port.ask(raw)
    assert answer.status == 400
    assert answer.problem["title"] == "Bad Request"
    assert b"s3cret" not in answer.body
    assert b"GARBAGE" not in answer.body
    assert "s3cret" not in caplog.text
    assert port.store.events == []
    assert port.count("http_requests_total", code="400") == 1


# --- 401. ---


WRONG = [
    ("/rocketchat", None),
    ("/rocketchat", ""),
    ("/rocketchat", "b4d-token"),
    ("/rocketchat", "s3cret-toke"),
    ("/rocketchat/acme", TOKEN),
    ("/rocketchat/nobody", TOKEN),
    ("/rocketchat/nobody", None),
    ("/rocketchat/%00", TOKEN),
]


@pytest.mark.parametrize(("path", "token"), WRONG)
async def test_a_wrong_token_and_an_unknown_workspace_are_answered_401(
    port: Port, path: str, token: str | None
) -> None:
    answer = await port.ask(request(path=path, token=token))
    assert answer.status == 401
    assert answer.problem["title"] == "Unauthorized"
    assert not token or token.encode() not in answer.body
    assert port.store.events == []
    assert port.count("events_rejected_total", reason="bad_token") == 1
    assert port.count("http_requests_total", code="401") == 1


async def test_the_answer_401_does_not_tell_what_was_wrong(port: Port) -> None:
    answers = [await port.ask(request(path=path, token=token)) for path, token in WRONG]
    assert len({answer._replace(headers=answer.headers | {"Date": ""}).__repr__() for answer in answers}) == 1


async def test_the_token_is_judged_before_the_body_comes(port: Port) -> None:
    async with port.connection() as client:
        client.send(request(b"", token="wrong", length=len(MESSAGE)))
        assert (await client.answer()).status == 401


async def test_the_token_is_judged_before_the_body_is(port: Port) -> None:
    assert (await port.ask(request(b"no json", token="wrong"))).status == 401
    assert (await port.ask(request(b"x" * (MAX_BODY + 1), token="wrong"))).status == 401


@pytest.mark.parametrize(("token", "status"), [("wrong", 401), (TOKEN, 413)])
async def test_a_body_that_follows_an_early_answer_is_drained_and_met_by_no_reset(
    port: Port, token: str, status: int
) -> None:
    body = b"x" * 4_000_000
    async with port.connection() as client:
        client.send(request(body, token=token))
        await client.writer.drain()
        assert (await client.answer()).status == status
        # The next request on the same connection is understood.
        client.send(request(MESSAGE))
        assert (await client.answer()).status == 200
    assert port.store.events[0].body == MESSAGE


# --- 404 and 405. ---


@pytest.mark.parametrize(
    "path", ["/", "/rocketchat/", "/rocketchat//", "/rocketchat/acme/", "/rocketchat/a/b", "/Rocketchat", "/metrics"]
)
async def test_any_other_path_is_answered_404_and_never_redirected(port: Port, path: str) -> None:
    answer = await port.ask(request(path=path))
    assert answer.status == 404
    assert answer.problem["title"] == "Not Found"
    assert "Location" not in answer.headers
    assert port.count("http_requests_total", code="404") == 1
    assert port.store.events == []


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_any_other_method_is_answered_405(port: Port, method: str) -> None:
    raw = request(b"").replace(b"POST", method.encode(), 1)
    answer = await port.ask(raw, head_only=method == "HEAD")
    assert answer.status == 405
    assert answer.headers["Allow"] == "POST"
    if method != "HEAD":
        assert answer.problem["title"] == "Method Not Allowed"
    assert port.count("http_requests_total", code="405") == 1


# --- 413. ---


async def test_a_body_that_is_announced_as_too_large_is_refused_before_it_comes(port: Port) -> None:
    answer = await port.ask(request(b"", length=MAX_BODY + 1))
    assert answer.status == 413
    assert answer.problem["title"] == "Content Too Large"
    assert port.count("events_rejected_total", reason="too_large") == 1
    assert port.count("http_requests_total", code="413") == 1


async def test_a_body_that_grows_too_large_is_refused_while_it_comes(port: Port) -> None:
    async with port.connection() as client:
        client.send(request(b"", "Transfer-Encoding: chunked", length=-1))
        for _ in range(11):
            client.send(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
            await client.writer.drain()
        assert (await client.answer()).status == 413
        client.send(b"0\r\n\r\n" + request(MESSAGE))
        assert (await client.answer()).status == 200
    assert port.count("events_rejected_total", reason="too_large") == 1


# --- 503 and 500. ---


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (errors.SpoolFull(), "spool_full"),
        (errors.SpoolFailed("/var/lib/relay.db: disk I/O error"), "spool_error"),
        (errors.KafkaUnavailable(), "kafka_unavailable"),
    ],
    ids=["full", "failed", "kafka"],
)
async def test_what_cannot_be_made_durable_is_to_come_again(port: Port, fault: Unavailable, reason: str) -> None:
    port.store.fault = fault
    answer = await port.ask(request())
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) > 0
    assert answer.problem["title"] == "Service Unavailable"
    assert port.count("events_rejected_total", reason=reason) == 1
    assert port.count("http_requests_total", code="503") == 1
    assert port.count("events_accepted_total", workspace="default", type="Message") == 0
    port.store.fault = None
    assert (await port.ask(request())).status == 200


async def test_a_relay_that_is_about_to_stop_takes_nothing_more(port: Port) -> None:
    port.ingress.draining = True
    answer = await port.ask(request(b"", length=len(MESSAGE)))
    assert answer.status == 503
    assert "Retry-After" in answer.headers
    assert port.count("events_rejected_total", reason="draining") == 1
    assert (await port.ask(request(token="wrong"))).status == 401


async def test_only_503_asks_for_a_retry(port: Port) -> None:
    for raw in (request(), request(b"x"), request(token="wrong"), request(path="/"), request(b"", length=MAX_BODY + 1)):
        assert "Retry-After" not in (await port.ask(raw)).headers


async def test_a_fault_of_the_relay_s_own_is_answered_500_without_its_story(
    port: Port, caplog: pytest.LogCaptureFixture
) -> None:
    port.store.fault = ZeroDivisionError("visitor-secret")
    async with port.connection() as client:
        client.send(request())
        answer = await client.answer()
        assert await client.ended()
    assert answer.status == 500
    assert answer.problem["title"] == "Internal Server Error"
    assert b"visitor-secret" not in answer.body
    assert b"ZeroDivision" not in answer.body
    assert port.count("http_requests_total", code="500") == 1
    assert [record.exc_info is not None for record in caplog.records] == [True]
    port.store.fault = None
    assert (await port.ask(request())).status == 200


async def test_neither_token_nor_payload_is_logged(port: Port, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    body = MESSAGE.replace(b"Hi, my order", b"visitor-secret")
    for raw in (
        request(body),
        request(body[:-1]),
        request(body, token=TOKEN + "x"),
        request(body, path="/rocketchat/x"),
    ):
        await port.ask(raw)
    for text in (TOKEN, "visitor-secret", "8qTgXo3LmZrK5wYcN"):
        assert text not in caplog.text


# --- What becomes of the body. ---


@pytest.mark.parametrize(
    ("enforce", "reason"), [(True, DeadLetterReason.SCHEMA), (False, None)], ids=["enforce", "report"]
)
async def test_an_event_that_breaks_its_schema_is_accepted_with_the_fault(
    closed_port: Port, enforce: bool, reason: DeadLetterReason | None
) -> None:
    closed_port.schemas = Schemas.load()
    closed_port.enforce = enforce
    body = b'{"_id":"c","type":"Message","visitor":7}'
    async with closed_port.open() as port:
        assert (await port.ask(request(body))).status == 200
        assert (await port.ask(request(MESSAGE))).status == 200
    broken, valid = closed_port.store.events
    assert (broken.reason, broken.body, broken.key) == (reason, body, "c")
    assert broken.detail
    assert (valid.reason, valid.detail) == (None, None)


async def test_invalid_events_that_are_only_reported_do_not_flood_the_log(
    closed_port: Port, caplog: pytest.LogCaptureFixture
) -> None:
    closed_port.schemas = Schemas.load()
    closed_port.enforce = False
    async with closed_port.open() as port:
        for number in range(20):
            body = b'{"_id":"%d","type":"Message","visitor":7}' % number
            assert (await port.ask(request(body))).status == 200
    assert [vars(record)["action"] for record in caplog.records] == ["event_invalid"]


async def test_without_schemas_nothing_is_judged(port: Port) -> None:
    assert (await port.ask(request(b'{"_id":"c","type":"Message","visitor":7}'))).status == 200
    assert (port.store.events[0].reason, port.store.events[0].detail) == (None, None)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"_id":"c","type":"LivechatSessionEnd"}', DeadLetterReason.UNKNOWN_TYPE),
        (b'{"type":"Message"}', DeadLetterReason.NO_KEY),
        (b"{}", DeadLetterReason.UNKNOWN_TYPE),
    ],
)
async def test_an_event_of_unknown_type_or_without_a_key_is_accepted(
    closed_port: Port, body: bytes, reason: DeadLetterReason
) -> None:
    closed_port.schemas = Schemas.load()
    async with closed_port.open() as port:
        assert (await port.ask(request(body))).status == 200
    (event,) = closed_port.store.events
    assert (event.reason, event.body) == (reason, body)


async def test_what_is_to_be_redacted_never_reaches_the_store(closed_port: Port) -> None:
    closed_port.redact = ("/visitor/token", "/messages/*/msg")
    closed_port.schemas = Schemas.load()
    async with closed_port.open() as port:
        assert (await port.ask(request())).status == 200
    (event,) = closed_port.store.events
    assert b"3f1c9a7e5d2b4086a1f0c3d7e9b25846" not in event.body
    assert json.loads(event.body)["visitor"]["token"] == "[redacted]"
    assert event.reason is None
    # A retry is known by what was received.
    assert event.digest == hashlib.sha256(b"default\n" + MESSAGE).digest()


# --- Whether an answer got out in time. ---


@pytest.mark.parametrize("known", [False, True])
async def test_an_answer_that_got_out_is_noted(port: Port, until: Until, known: bool) -> None:
    port.store.known = known
    assert (await port.ask(request(LEAD))).status == 200
    await until(lambda: len(port.store.answered_events) == 1)
    assert port.store.answered_events[0].body == LEAD


async def test_an_answer_to_what_never_repeats_is_not_noted(port: Port) -> None:
    async with port.connection() as client:
        for _ in range(2):
            client.send(request(MESSAGE))
            assert (await client.answer()).status == 200
    assert port.store.answered_events == []


async def test_a_late_answer_is_not_noted(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingress, "SENDER_PATIENCE", 0.0)
    async with port.connection() as client:
        for _ in range(2):
            client.send(request(LEAD))
            assert (await client.answer()).status == 200
    assert port.store.answered_events == []


@pytest.mark.parametrize(("frozen", "noted"), [(0.0, True), (0.5, False)])
async def test_an_answer_is_late_too_if_the_request_waited_for_a_frozen_relay(
    port: Port, until: Until, monkeypatch: pytest.MonkeyPatch, *, frozen: float, noted: bool
) -> None:
    monkeypatch.setattr(ingress, "SENDER_PATIENCE", 0.4)
    with socket.create_connection(("127.0.0.1", port.number)) as sock:
        sock.sendall(request(LEAD))
        time.sleep(frozen)  # noqa: ASYNC251 - the loop stands still: that is the point
        await until(lambda: port.store.events)
        assert (await port.ask(request(MESSAGE))).status == 200
        assert sock.recv(4096).startswith(b"HTTP/1.1 200 ")
    assert bool(port.store.answered_events) is noted


async def test_an_answer_that_nobody_waits_for_is_not_noted(
    port: Port, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    port.store.gate.clear()
    async with port.connection() as client:
        client.send(request(LEAD))
        await port.store.appending.wait()
    await client.writer.wait_closed()
    # Enough turns of the loop for the server's side to have seen the end.
    assert (await port.ask(request(path="/"))).status == 404
    port.store.gate.set()
    await until(lambda: port.store.events)
    assert (await port.ask(request(MESSAGE))).status == 200
    assert port.store.answered_events == []
    # A sender that hangs up is no fault of the relay's own.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_an_answer_that_meets_a_broken_connection_is_not_noted(port: Port, until: Until) -> None:
    port.store.gate.clear()
    with socket.create_connection(("127.0.0.1", port.number)) as sock:
        sock.sendall(request(LEAD))
        await port.store.appending.wait()
        # Closed with a reset, which the relay meets when it writes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    port.store.gate.set()
    await until(lambda: port.store.events)
    assert (await port.ask(request(MESSAGE))).status == 200
    assert port.store.answered_events == []
