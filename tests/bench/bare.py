"""What the relay is compared with: an aiohttp handler that reads the body and answers 200, and nothing else."""

import sys

import uvloop
from aiohttp import web


async def handle(request: web.Request) -> web.Response:
    await request.read()
    return web.Response()


if __name__ == "__main__":
    app = web.Application()
    app.router.add_post("/rocketchat", handle)
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        backlog=1024,
        access_log=None,
        print=None,
        loop=uvloop.new_event_loop(),
    )
