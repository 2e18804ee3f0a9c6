"""
Stands in for Rocket.Chat's container: sends made-up chats as its settings say, and tells the test all that it does.

Run by the Python of the relay's image. It tells in lines of JSON, on a connection of its own: each event before its
first try, each try, and whether the event was delivered in the end.
"""

import asyncio
import base64
import json
import os
import random
import signal
import socket
import time
from contextlib import suppress

from relay.dev.chats import stream
from relay.dev.rocketchat import Attempt, RocketChat

CHATS, EVENTS_PER_SECOND = 8, 40
#: Asked to stop, it still has something to say for so long, as Rocket.Chat may.
FAREWELL_SECONDS = 3
HEALTH_PORT = 3000


async def main() -> None:
    """Begins with an event in its first moment; ends some seconds after SIGTERM, leaving open retries behind."""
    host, _, port = os.environ["TEST_LISTENS_AT"].rpartition(":")
    _, ear = await asyncio.open_connection(host, int(port))
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)

    def tell(what: str, **more: object) -> None:
        said = {"what": what, "pod": socket.gethostname(), "at": time.time(), "stopping": stopping.is_set(), **more}
        ear.write(json.dumps(said).encode() + b"\n")

    def tried(attempt: Attempt) -> None:
        tell("tried", number=attempt.number, status=attempt.status, error=attempt.error)

    player = RocketChat(
        os.environ["OVERWRITE_SETTING_Livechat_webhookUrl"],  # noqa: SIM112 (Rocket.Chat's own)
        os.environ["OVERWRITE_SETTING_Livechat_secret_token"],  # noqa: SIM112
        on_attempt=tried,
    )

    async def chat(number: int) -> None:
        for serial, (_, body) in enumerate(stream(random.Random())):
            event = f"{number}-{serial}"
            tell("sends", event=event, body=base64.b64encode(body).decode())
            outcome = await player.deliver(body)
            tell("sent", event=event, delivered=outcome.delivered)
            await asyncio.sleep(CHATS / EVENTS_PER_SECOND)

    async with await asyncio.start_server(_healthy, "0.0.0.0", HEALTH_PORT):
        chats = [asyncio.create_task(chat(number)) for number in range(CHATS)]
        await stopping.wait()
        tell("stops")
        await asyncio.sleep(FAREWELL_SECONDS)
        for task in chats:
            task.cancel()
        await asyncio.wait(chats)
    tell("ends", failures=[repr(task.exception()) for task in chats if not task.cancelled()])
    ear.close()
    await ear.wait_closed()


async def _healthy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError, EOFError):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
    writer.close()


if __name__ == "__main__":
    asyncio.run(main())
