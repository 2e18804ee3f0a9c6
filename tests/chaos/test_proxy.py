"""The proxies of the fault harness: what passes, and how connections end."""

import socket
import threading
import time
from collections.abc import Iterator

import pytest
from relay_process import wait_until

from chaos.proxy import Proxies


@pytest.fixture
def proxies() -> Iterator[Proxies]:
    """Yield a proxy before a server that sends everything back."""
    with socket.create_server(("127.0.0.1", 0)) as server, Proxies(1) as proxies:
        proxies.targets[0] = server.getsockname()[1]
        thread = threading.Thread(target=serve, args=(server,))
        thread.start()
        yield proxies
        with socket.create_connection(server.getsockname()) as last:
            last.sendall(b"end")
        thread.join()


def serve(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        with connection:
            try:
                while part := connection.recv(65536):
                    if part == b"end":
                        return
                    connection.sendall(part)
            except ConnectionError:
                pass  # As it was meant to be.


def connect(proxies: Proxies) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxies.ports[0]), timeout=10)


def read(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size and (part := connection.recv(65536)):
        found += part
    return found


def test_everything_passes_unless_it_is_told(proxies: Proxies) -> None:
    sent = bytes(range(256)) * 1000

    with connect(proxies) as connection:
        connection.sendall(sent)
        assert read(connection, len(sent)) == sent


def test_a_reset_breaks_every_connection_and_no_later_one(proxies: Proxies) -> None:
    with connect(proxies) as connection:
        connection.sendall(b"hello")
        assert read(connection, 5) == b"hello"

        proxies.reset()

        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with connect(proxies) as connection:
        connection.sendall(b"again")
        assert read(connection, 5) == b"again"


def test_a_cut_lets_so_many_bytes_pass_both_ways_together_and_no_more(proxies: Proxies) -> None:
    with connect(proxies) as connection:
        proxies.cut(7)
        connection.sendall(b"hello")
        assert read(connection, 5) == b"he"
    with connect(proxies) as connection:
        connection.sendall(b"again")
        assert read(connection, 5) == b"again"


def test_a_delay_keeps_everything_for_so_long(proxies: Proxies) -> None:
    with connect(proxies) as connection:
        proxies.delay(0.2)
        begun = time.monotonic()
        connection.sendall(b"slow")
        assert read(connection, 4) == b"slow"
        assert time.monotonic() - begun >= 0.4

        proxies.delay(0)

        def quick() -> bool:
            begun = time.monotonic()
            connection.sendall(b"fast")
            return read(connection, 4) == b"fast" and time.monotonic() - begun < 0.4

        wait_until(quick, "nothing is kept any more")
