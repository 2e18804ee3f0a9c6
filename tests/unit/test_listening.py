"""The webhook's port, on the event loop that the relay runs on."""

import asyncio
import socket
from contextlib import ExitStack

import pytest
import uvloop
from aiohttp import web

from relay.listening import listen


async def answer(request: web.BaseRequest) -> web.Response:
    return web.Response(text=request.path)


def test_connections_do_not_wait_for_a_turn_of_the_loop_each() -> None:
    async def turns_until_accepted(waiting: int) -> int:
        server = web.Server(answer)
        runner = web.ServerRunner(server)
        await runner.setup()
        await listen(runner, "127.0.0.1", 0, None)
        turns = 0
        with ExitStack() as clients:
            for _ in range(waiting):
                clients.enter_context(socket.create_connection(runner.addresses[0]))
            while len(server.connections) < waiting:
                await asyncio.sleep(0)
                turns += 1
        await runner.cleanup()
        return turns

    assert uvloop.run(turns_until_accepted(80)) <= 40


def test_each_connection_is_served_and_the_port_closes() -> None:
    async def ask_and_close() -> list[bytes]:
        runner = web.ServerRunner(web.Server(answer))
        await runner.setup()
        await listen(runner, "localhost", 0, None)
        host, port = runner.addresses[0][:2]
        answers = []
        for number in range(20):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"GET /%d HTTP/1.0\r\n\r\n" % number)
            answers.append((await reader.read()).rpartition(b"\r\n")[2])
            writer.close()
        await runner.cleanup()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(host, port)
        return answers

    assert uvloop.run(ask_and_close()) == [b"/%d" % number for number in range(20)]


def test_a_port_that_is_taken_is_not_shared() -> None:
    async def listen_twice() -> None:
        runner = web.ServerRunner(web.Server(answer))
        await runner.setup()
        await listen(runner, "127.0.0.1", 0, None)
        _, port = runner.addresses[0]
        try:
            with pytest.raises(OSError, match="already in use"):
                await listen(runner, "127.0.0.1", port, None)
        finally:
            await runner.cleanup()

    uvloop.run(listen_twice())
