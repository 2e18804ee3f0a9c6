"""
The webhook's port: several connections are accepted in a turn of the event loop, however long that takes.

Knows nothing of what is served there: that is for who gives the runner.
"""

import asyncio
import socket
import ssl
from contextlib import closing

from aiohttp import web

#: libuv accepts one connection from a listening socket in each turn of the loop, and Rocket.Chat opens one for each
#: event; while a backlog is published, turns take milliseconds. From each duplicate of the socket it accepts one, too.
#: But all of them look for each connection, some 3 us of CPU: more are not worth it.
_ACCEPTED_PER_TURN = 4
#: Connections that the kernel keeps until they are accepted.
_BACKLOG = 1024


async def listen(runner: web.BaseRunner, host: str, port: int, context: ssl.SSLContext | None) -> None:
    """
    Opens *port*, 0 for any, on every address of *host*, until *runner* is cleaned up.

    Raises: OSError.
    """
    bound = await asyncio.get_running_loop().create_server(asyncio.Protocol, host, port, start_serving=False)
    with closing(bound):
        for address in bound.sockets:
            for _ in range(_ACCEPTED_PER_TURN):
                listening: socket.socket = address.dup()
                await web.SockSite(runner, listening, backlog=_BACKLOG, ssl_context=context).start()
