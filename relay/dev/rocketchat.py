"""Rocket.Chat as a sender of webhooks: its request, its timeout and its retry rule, version by version."""

import asyncio
import base64
import os
import re
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

MAX_ANSWER_BYTES = 10 * 1024 * 1024  # Rocket.Chat 9.0 reads no more of an answer's body.
_USER_AGENT = "node-fetch/1.0 (+https://github.com/bitinn/node-fetch)"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a Rocket.Chat makes of an answer. No redirect is followed: it is no success, whatever the version."""

    since: tuple[int, int, int]
    success: range
    retried: tuple[range, ...]  # Network errors and timeouts are retried by every version.
    tries: int
    gap: float | None  # Seconds from one try to the next; None: four times the timeout.
    timed: bool  # Does the timeout apply at all?
    body_counts: bool  # Is a success retried when its body stalls or is cut off?


# Newest first. The first Rocket.Chats of the last line, before 4.1, retried for ever; the player doesn't.
RULES = (
    Rule((7, 10, 4), range(200, 201), (range(429, 430), range(500, 1000)), 5, None, timed=True, body_counts=True),
    Rule((6, 4, 3), range(200, 201), (range(201, 1000),), 10, None, timed=True, body_counts=False),
    Rule((6, 2, 0), range(200, 201), (), 10, None, timed=True, body_counts=False),
    Rule((0, 0, 0), range(200, 300), (range(400, 1000),), 10, 10.0, timed=False, body_counts=True),
)


def rule_of(version: str) -> Rule:
    """The rule of a Rocket.Chat, named as it names itself: `9.0`, `7.10.3`, `6.5.0-rc.1`."""
    match = re.fullmatch(r"v?(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:[-+].*)?", version)
    if not match:
        raise ValueError(f"not a version of Rocket.Chat: {version!r} (expected something like 9.0 or 7.10.3)")
    numbers = tuple(int(part or 0) for part in match.groups())
    return next(rule for rule in RULES if numbers >= rule.since)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to deliver *body*, as its sender saw it."""

    body: bytes
    number: int  # From 1.
    seconds: float  # From the connection's first packet to the end of the answer.
    status: int | None  # None: no answer. An answer whose body failed has both status and error.
    error: str | None
    answer: bytes
    delivered: bool
    again_in: float | None  # Seconds until the next try; None: this was the last.


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one event."""

    attempts: tuple[Attempt, ...]

    @property
    def delivered(self) -> bool:
        return self.attempts[-1].delivered

    @property
    def status(self) -> int | None:
        return self.attempts[-1].status

    @property
    def error(self) -> str | None:
        return self.attempts[-1].error


class RocketChat:
    """A sender of webhooks that behaves as the Rocket.Chat of *version* does; needs no closing.

    *timeout* is its setting `Livechat_http_timeout`, here in seconds; *gap* replaces the wait between two tries;
    *on_attempt* is called after each try, before the next. The request is that of node-fetch 2.7.0, for any version.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        *,
        version: str = "9.0",
        timeout: float = 5.0,
        gap: float | None = None,
        retry: bool = True,
        on_attempt: Callable[[Attempt], None] | None = None,
    ) -> None:
        self.rule = rule_of(version)
        self.timeout = timeout
        self.tries = self.rule.tries if retry else 1
        self.gap = gap if gap is not None else self.rule.gap if self.rule.gap is not None else 4 * timeout
        self._on_attempt = on_attempt
        parts = urlsplit(url)
        if not re.fullmatch(r"[\x21-\x7e]+", url) or parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an absolute http or https URL: {url!r}")
        if not re.fullmatch(r"[\x20-\x7e]*", token or ""):
            raise ValueError("the token has characters that no HTTP header can hold")
        parts.hostname.encode("idna")  # Fails now, not at the first try.
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, parts.port or (443 if self._tls else 80)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._before_length = f"POST {target} HTTP/1.1\r\nContent-Type: application/json\r\n"
        self._before_length += f"X-RocketChat-Livechat-Token: {token}\r\n" if token else ""
        self._before_length += "Accept: */*\r\nContent-Length: "
        userinfo, _, netloc = parts.netloc.rpartition("@")
        basic = base64.b64encode(unquote(userinfo).encode()).decode()
        self._after_length = f"\r\nUser-Agent: {_USER_AGENT}\r\nAccept-Encoding: gzip,deflate\r\nHost: {netloc}\r\n"
        self._after_length += f"Authorization: Basic {basic}\r\n" if userinfo else ""
        self._after_length += "Connection: close\r\n\r\n"

    @property
    def window(self) -> float:
        """Seconds from an event to its last try's end, when all fail as slowly as they may."""
        return self.tries * self.timeout + (self.tries - 1) * self.gap

    async def deliver(self, body: bytes) -> Outcome:
        """Send *body*, and again as long as that Rocket.Chat would; never raises for what the other side does."""
        attempts: list[Attempt] = []
        while not attempts or attempts[-1].again_in is not None:
            if attempts:
                await asyncio.sleep(self.gap)
            attempts.append(await self._attempt(body, len(attempts) + 1))
            if self._on_attempt:
                self._on_attempt(attempts[-1])
        return Outcome(tuple(attempts))

    async def _attempt(self, body: bytes, number: int) -> Attempt:
        started = time.perf_counter()
        answer = _Answer()
        error = None
        try:
            async with asyncio.timeout(self.timeout if self.rule.timed else None):
                await self._exchange(body, answer)
        except (OSError, EOFError, ValueError, OverflowError, asyncio.LimitOverrunError) as exc:
            error = _name_of(exc)
        rule, status = self.rule, answer.status
        delivered = status in rule.success and not (error and rule.body_counts)
        retried = status is None or status in rule.success or any(status in statuses for statuses in rule.retried)
        again = self.gap if retried and not delivered and number < self.tries else None
        seconds = time.perf_counter() - started
        return Attempt(body, number, seconds, status, error, answer.body, delivered, again)

    async def _exchange(self, body: bytes, answer: "_Answer") -> None:
        # aiohttp's client always puts Host first; on uvloop, with a connection per event, it costs 2.7 times this CPU.
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls)
        try:
            writer.write(f"{self._before_length}{len(body)}{self._after_length}".encode() + body)
            await answer.read(reader)
        finally:
            # Nothing is left to be sent or read: with an empty buffer this is an ordinary FIN.
            writer.transport.abort()


@dataclass(slots=True)
class _Answer:
    status: int | None = None
    body: bytes = b""

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Fill in the status as soon as it is known, then the body: the status may be all there is."""
        status = 100
        while status < 200:
            head = await reader.readuntil(b"\r\n\r\n")
            match = re.match(rb"HTTP/1\.[01] ([1-9]\d\d)[ \r]", head)
            if not match:
                raise ValueError
            status = int(match[1])
        self.status = status
        if status in (204, 304):
            return
        length = re.search(rb"\r\ncontent-length:[ \t]*(\d{1,18})[ \t]*\r\n", head, re.IGNORECASE)
        if re.search(rb"\r\ntransfer-encoding:[^\r]*chunked", head, re.IGNORECASE):
            while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
                self._make_room(size)
                self.body += (await reader.readexactly(size + 2))[:size]
            while await reader.readuntil(b"\r\n") != b"\r\n":
                pass
        elif length:
            self._make_room(int(length[1]))
            self.body = await reader.readexactly(int(length[1]))
        else:
            while part := await reader.read(65536):
                self._make_room(len(part))
                self.body += part

    def _make_room(self, size: int) -> None:
        if len(self.body) + size > MAX_ANSWER_BYTES:
            raise OverflowError


_FAULTS: tuple[tuple[type[Exception], str], ...] = (
    (TimeoutError, "timeout"),
    (ConnectionRefusedError, "connection refused"),
    (ConnectionError, "connection reset"),
    (EOFError, "answer cut off"),
    (OverflowError, "answer larger than 10 MiB"),
    (socket.gaierror, "unknown host"),
)


def _name_of(exc: Exception) -> str:
    """A short name, the same for the same fault: it is counted by."""
    for fault, name in _FAULTS:
        if isinstance(exc, fault):
            return name
    if isinstance(exc, ssl.SSLError):
        return f"TLS: {exc.reason}"
    if isinstance(exc, OSError):
        # No number: a name with several addresses, each with an error of its own.
        return os.strerror(exc.errno) if exc.errno else "cannot connect"
    return "not an HTTP answer"
