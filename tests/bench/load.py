"""
The load: events sent as fast as they are answered or at a steady rate, and how long each answer took.

A process of its own, and a cheap one, for it shares the machine with what is measured: plain sockets, epoll, requests
cut from templates. Either as Rocket.Chat sends, one connection per event, which the server closes, or keep-alive.
"""

import json
import select
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

#: In a closed loop the clients that send one event after the other.
CLIENTS = 64
BODY_BYTES = 960
TOKEN = "bench-token"
#: Seconds until an answer counts as lost.
_PATIENCE = 10.0
_SAMPLE = Path(__file__).parents[1] / "schemas/message-saved/valid/Message.json"
_PLACE = "#" * 17


class Load(NamedTuple):
    """What to send."""

    port: int
    seconds: float
    #: Events a second; 0: each client sends the next event as soon as one is answered.
    rate: int
    keep_alive: bool
    #: The number of the first event: no two events have one number, so no two bodies are the same.
    first: int
    #: Every eighth chat's events are of a type of which the relay remembers more: one that may repeat.
    mixed: bool = False


class Outcome(NamedTuple):
    """What came of it. Times in seconds."""

    events: int
    seconds: float
    p50: float
    p99: float
    worst: float
    errors: dict[str, int]


def quantile(values: Sequence[float], share: float) -> float:
    """The value that *share* of *values* do not exceed."""
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


class _Chat:
    """
    A chat, in order: its next event is sent once the last one is answered.

    Keep-alive it has a connection of its own.
    """

    def __init__(self, number: int, load: Load) -> None:
        type_ = "LivechatEdit" if load.mixed and number % 8 == 0 else "Message"
        self.before, self.after = _template(number, type_, "keep-alive" if load.keep_alive else "close")
        self.connection: socket.socket | None = None


class Generator:
    """Sends one Load."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._epoll = select.epoll()
        #: By descriptor: what waits for an answer since when, or (0) for the connection's end.
        self._under_way: dict[int, tuple[socket.socket, _Chat, float]] = {}
        self._chats = CLIENTS
        #: Chats with nothing under way, the one that waited longest first.
        self._idle = deque(_Chat(number, load) for number in range(CLIENTS))
        self._sent = 0
        self._took: list[float] = []
        self._errors: Counter[str] = Counter()
        self._end = 0.0

    def stop(self, *_: object) -> None:
        """Ends early, once what is under way is answered."""
        self._end = time.perf_counter()

    def run(self) -> Outcome:
        """Sends all of it."""
        begun = time.perf_counter()
        self._end = begun + self._load.seconds
        while (now := time.perf_counter()) < self._end or (self._under_way and now < self._end + _PATIENCE):
            pause = self._pause(begun, now)
            if pause:
                self._read_answers(pause)
            else:
                self._send()
        self._errors["no answer"] += len(self._under_way)
        seconds = time.perf_counter() - begun
        p50, p99, worst = (quantile(self._took, share) for share in (0.5, 0.99, 1.0))
        return Outcome(len(self._took), seconds, p50, p99, worst, dict(+self._errors))

    def _pause(self, begun: float, now: float) -> float:
        # Until the next event may be sent.
        if now >= self._end or not (self._load.rate or self._idle):
            return 0.1
        return max(0.0, begun + self._sent / self._load.rate - now) if self._load.rate else 0.0

    def _send(self) -> None:
        number = self._load.first + self._sent
        chat = self._idle.popleft() if self._idle else self._new_chat()
        self._sent += 1
        started = time.perf_counter()
        connection = chat.connection or self._connect()
        if self._load.keep_alive:
            chat.connection = connection
        self._under_way[connection.fileno()] = (connection, chat, started)
        connection.sendall(b"%b%017d%b" % (chat.before, number, chat.after))

    def _new_chat(self) -> _Chat:
        # Steady: what others wait for is nothing to a new one.
        self._chats += 1
        return _Chat(self._chats - 1, self._load)

    def _connect(self) -> socket.socket:
        # On the loopback interface this returns at once: the server need not have accepted.
        connection = socket.create_connection(("127.0.0.1", self._load.port))
        self._epoll.register(connection.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
        return connection

    def _read_answers(self, pause: float) -> None:
        # select, because epoll rounds up to milliseconds.
        if not select.select((self._epoll,), (), (), pause)[0]:
            return
        for descriptor, event in self._epoll.poll(0):
            connection, chat, started = self._under_way.pop(descriptor)
            if started:
                self._note(connection, started)
                self._idle.append(chat)
            if event & ~select.EPOLLIN:
                connection.close()
                chat.connection = None
            elif not self._load.keep_alive:
                self._under_way[descriptor] = (connection, chat, 0.0)

    def _note(self, connection: socket.socket, started: float) -> None:
        try:
            answer = connection.recv(4096)
        except OSError as error:
            answer = str(error).encode()
        self._took.append(time.perf_counter() - started)
        # The whole answer in one piece, without a body.
        if not answer.startswith(b"HTTP/1.1 200 ") or not answer.endswith(b"\r\n\r\n"):
            self._errors[answer.partition(b"\r\n")[0].decode(errors="replace") or "connection lost"] += 1


def _template(chat: int, type_: str, connection: str) -> tuple[bytes, bytes]:
    # What comes before and after an event's number.
    head = (
        "POST /rocketchat HTTP/1.1\r\nContent-Type: application/json\r\n"
        f"X-RocketChat-Livechat-Token: {TOKEN}\r\nAccept: */*\r\nContent-Length: {BODY_BYTES}\r\n"
        "User-Agent: node-fetch/1.0 (+https://github.com/bitinn/node-fetch)\r\nAccept-Encoding: gzip,deflate\r\n"
        f"Host: 127.0.0.1\r\nConnection: {connection}\r\n\r\n"
    )
    event = json.loads(_sample())
    message = event["messages"][0]
    event |= {"_id": f"bench-{chat:011}", "type": type_}
    message["rid"] = event["_id"]
    message |= {"_id": _PLACE, "msg": ""}
    message["msg"] = "Where is it? ".ljust(BODY_BYTES - len(_compact(event)), ".")
    before, after = _compact(event).split(_PLACE.encode())
    return head.encode() + before, after


@cache
def _sample() -> bytes:
    return _SAMPLE.read_bytes()


def _compact(event: object) -> bytes:
    return json.dumps(event, separators=(",", ":"), ensure_ascii=False).encode()


if __name__ == "__main__":
    generator = Generator(Load(**json.loads(sys.argv[1])))
    signal.signal(signal.SIGTERM, generator.stop)
    print(json.dumps(generator.run()))
