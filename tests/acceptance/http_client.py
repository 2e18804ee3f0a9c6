"""HTTP down to the byte: what is sent is what the test says, and what came back is all that came back."""

import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from relay_process import TOKEN


class Answer(NamedTuple):
    """An answer, and everything that came with it."""

    status: int
    #: Names in lower case.
    headers: Mapping[str, str]
    body: bytes
    #: What came after the answer: nothing, that is to say.
    rest: bytes = b""


@contextmanager
def connection(port: int, *, seconds: float = 15) -> Iterator[socket.socket]:
    """A connection to a port of this machine."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as open_:
        yield open_


def head(
    *,
    method: str = "POST",
    path: str = "/rocketchat",
    token: str | None = TOKEN,
    headers: Mapping[str, object] | None = None,
    close: bool = True,
) -> bytes:
    """A request's head as Rocket.Chat sends it, with *headers* in addition."""
    lines = [f"{method} {path} HTTP/1.1", "Content-Type: application/json"]
    if token is not None:
        lines.append(f"X-RocketChat-Livechat-Token: {token}")
    lines += ["Accept: */*", "Host: relay", f"Connection: {'close' if close else 'keep-alive'}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "\r\n"]).encode()


def post(
    port: int, body: bytes, *, path: str = "/rocketchat", token: str | None = TOKEN, method: str = "POST"
) -> Answer:
    """Sends a delivery on a connection of its own; returns when the other side has closed it."""
    with connection(port) as open_:
        open_.sendall(head(method=method, path=path, token=token, headers={"Content-Length": len(body)}) + body)
        return read_all(open_)


def read_all(open_: socket.socket) -> Answer:
    """The answer, with everything until the other side closes the connection."""
    answer = read_answer(open_)
    rest = b""
    while part := open_.recv(65536):
        rest += part
    return answer._replace(rest=rest)


def read_answer(open_: socket.socket) -> Answer:
    """The next answer, up to the end of its body; leaves the connection open."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        raw += _some(open_)
    told, _, body = raw.partition(b"\r\n\r\n")
    status, *lines = told.decode().split("\r\n")
    match = re.fullmatch(r"HTTP/1\.[01] (\d{3}) .*", status)
    assert match, status
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(headers.get("content-length", 0))
    while len(body) < length:
        body += _some(open_)
    return Answer(int(match[1]), headers, body[:length], body[length:])


def _some(open_: socket.socket) -> bytes:
    part = open_.recv(65536)
    if not part:
        raise ConnectionError("The connection was closed before the answer was complete.")
    return part
