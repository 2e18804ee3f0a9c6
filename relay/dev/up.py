"""`relay dev`: a local Kafka and a relay on it, in one terminal, gone without a trace on Ctrl-C."""

import argparse
import asyncio
import os
import random
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, aclosing, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from relay import logs
from relay.clients import connection
from relay.config import Settings
from relay.dev import tail
from relay.dev.chats import conversation
from relay.dev.download import console_progress
from relay.dev.kafka import LocalKafka
from relay.dev.registry import LocalRegistry
from relay.dev.rocketchat import RocketChat
from relay.errors import RelayError
from relay.framing import unframed
from relay.ingress import PATH
from relay.record import Topics
from relay.service import Service

_HOST = "127.0.0.1"
#: Seconds within which the chat of --play must have landed.
_LANDING_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `relay dev`."""
    parser.add_argument("--play", action="store_true", help="send a whole chat first")
    parser.add_argument("--registry", action="store_true", help="with a schema registry, whose ids frame the values")
    parser.add_argument("--once", action="store_true", help="with --play: stop when the chat has landed")
    parser.add_argument("--port", type=int, default=8080, help="webhook port (default: %(default)s; 0: a free one)")
    parser.add_argument("--admin-port", type=int, default=8081, help="admin port (default: %(default)s; 0: a free one)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="keep the data of Kafka, registry and spool in DIR")
    parser.epilog = (
        "Kafka is Apache Kafka itself: the first start fetches about 45 MB from Maven Central, later ones need no "
        "network. The registry is Apicurio Registry, 159 MB. RELAY_* variables that are set count, except for those "
        "that say where Kafka, the spool and, with --registry, the registry are.\n\n"
        "Examples:\n  relay dev --play\n  RELAY_TOPIC='chats.{type}' relay dev --registry --data ./relay-dev"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serves until Ctrl-C."""
    with _data(arguments.data) as data, ExitStack() as stack:
        token = os.environ.get("RELAY_TOKEN") or secrets.token_urlsafe(16)
        progress = stack.enter_context(console_progress("Fetching"))
        kafka = LocalKafka(data_dir=data / "kafka" if arguments.data else None, on_progress=progress)
        registry = None
        if arguments.registry:
            registry = LocalRegistry(data_dir=data / "registry" if arguments.data else None, on_progress=progress)
            stack.enter_context(closing(registry))
        print(f"Starting Kafka{' and a schema registry' if registry else ''} ...", flush=True)
        if registry:
            registry.start(wait=False)
        stack.enter_context(kafka)
        if registry:
            registry.wait_until_ready()
        own = _own(arguments, kafka.bootstrap_servers, registry.url if registry else None, data)
        settings = Settings.read(_environ(os.environ, own, token))
        logs.configure(os.environ.get("RELAY_LOG_LEVEL", "warning"), settings.log_format)
        if settings.token:
            token = settings.token.read().split()[0]
        return uvloop.run(_serve(settings, token, play=arguments.play, once=arguments.once))


@contextmanager
def _data(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        yield kept
        return
    made = Path(tempfile.mkdtemp(prefix="relay-dev-"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _own(arguments: argparse.Namespace, brokers: str, registry: str | None, data: Path) -> dict[str, str]:
    own = {
        "RELAY_HTTP_PORT": str(arguments.port),
        "RELAY_ADMIN_PORT": str(arguments.admin_port),
        "RELAY_KAFKA_BOOTSTRAP_SERVERS": brokers,
        "RELAY_SPOOL_PATH": str(data / "relay.db"),
        "RELAY_TOPIC_CREATE": "true",
    }
    return own | {"RELAY_SCHEMA_REGISTRY_URL": registry} if registry else own


def _environ(given: Mapping[str, str], own: Mapping[str, str], token: str) -> dict[str, str]:
    defaults = {"RELAY_LOG_FORMAT": "text", "RELAY_ADMIN_HOST": _HOST}
    if "RELAY_TOKEN_FILE" not in given and "RELAY_WORKSPACES_DIR" not in given:
        defaults["RELAY_TOKEN"] = token
    elsewhere = ("RELAY_KAFKA_", "RELAY_SCHEMA_REGISTRY_") if "RELAY_SCHEMA_REGISTRY_URL" in own else "RELAY_KAFKA_"
    return {**defaults, **{name: value for name, value in given.items() if not name.startswith(elsewhere)}, **own}


async def _serve(settings: Settings, token: str, *, play: bool, once: bool) -> int:
    service = Service(settings)
    serving = asyncio.create_task(service.run(), name="relay")
    company = asyncio.create_task(_accompany(service, settings, token, play=play, once=once), name="tail")
    await asyncio.wait({serving, company}, return_when=asyncio.FIRST_COMPLETED)
    if not serving.done():  # The chat has landed, or what shows the records has failed.
        service.stop()
    await asyncio.wait({serving})
    company.cancel()
    await asyncio.wait({company})
    for task in (serving, company):
        if not task.cancelled() and (error := task.exception()):
            raise error
    return 0


async def _accompany(service: Service, settings: Settings, token: str, *, play: bool, once: bool) -> None:
    await service.connected()
    port, admin_port = service.ports
    url = f"{'https' if settings.http_tls_certfile else 'http'}://{_HOST}:{port}{PATH}"
    registry = f"\nSchema registry  {settings.schema_registry_url}" if settings.schema_registry_url else ""
    print(
        f"""
Rocket.Chat: Omnichannel > Webhooks (its container must reach this address)
  Webhook URL    {url}
  Secret Token   {token}
Kafka            {settings.kafka_bootstrap_servers}{registry}
Metrics, status  http://{_HOST}:{admin_port}/metrics, /status

Records as they land (Ctrl-C ends):
""",
        flush=True,
    )
    bodies = list(conversation(random.Random(), started_at=datetime.now(UTC))) if play else []
    landed: asyncio.Queue[bytes] = asyncio.Queue()
    watching = asyncio.Semaphore(0)
    shows = [asyncio.create_task(_show(settings, landed, watching, dead=dead)) for dead in (False, True)]
    try:
        async with asyncio.timeout(_LANDING_SECONDS):
            for _ in shows:
                await watching.acquire()
        player = RocketChat(url, token)
        for body in bodies:
            outcome = await player.deliver(body)
            if not outcome.delivered:
                raise RelayError(f"The relay did not take the chat: {outcome.status or outcome.error}.")
        async with asyncio.timeout(_LANDING_SECONDS):
            values = [await landed.get() for _ in bodies]
        if bodies:
            verdict = "each on Kafka once, in order" if values == bodies else "NOT on Kafka as they were sent"
            print(f"\nA whole chat: {len(bodies)} events, {verdict}.", flush=True)
        if not once:
            await asyncio.gather(*shows)
    finally:
        for show in shows:
            show.cancel()
        await asyncio.wait(shows)


async def _show(settings: Settings, landed: asyncio.Queue[bytes], watching: asyncio.Semaphore, *, dead: bool) -> None:
    topics = Topics(settings.topic, settings.dead_letter_topic)
    records = tail.records(connection(settings), topics, dead=dead, on_ready=watching.release)
    async with aclosing(records) as landing:
        async for record in landing:
            print(f"{'dead' if dead else '    '}  {tail.line(record)}", flush=True)
            landed.put_nowait(unframed(record.value)[1])
