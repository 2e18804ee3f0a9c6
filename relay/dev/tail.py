"""`relay tail`: records as they land, as a `read_committed` consumer sees them."""

import argparse
import asyncio
import os
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition

from relay.clients import connection
from relay.cluster import Cluster, leave
from relay.config import Settings
from relay.connection import Connection, translated
from relay.errors import TopicsMissing
from relay.event import CE_TYPE_PREFIX
from relay.framing import SCHEMA_ID_HEADER, unframed
from relay.record import Topics

_CHAT_WIDTH, _TYPE_WIDTH = 24, 20
#: A header that names a schema: the version of its form, 1, and the GUID.
_GUID_BYTES = 17


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `relay tail`."""
    parser.add_argument("--chat", metavar="ID", help="only records of this chat (record key)")
    parser.add_argument("--type", metavar="TYPE", help="only records of this type, such as message.saved")
    parser.add_argument("--from-beginning", action="store_true", help="also what is on the topics already")
    parser.add_argument("--dead", action="store_true", help="the dead letters, with the reason and the place")
    parser.add_argument("--count", type=int, metavar="N", help="stop after N records")
    parser.add_argument("--json", action="store_true", help="one JSON object a record, with headers and value")
    parser.epilog = (
        "Reads the topics and brokers of the RELAY_* settings; needs no token.\n\n"
        "Examples:\n"
        "  relay tail --type message.saved --json | jq -r .value.messages[0].msg\n"
        "  relay tail --dead --from-beginning"
    )


async def run(arguments: argparse.Namespace) -> int:
    """Prints until --count or Ctrl-C."""
    # A tail takes no deliveries: it must not ask for a token.
    settings = Settings.read({"RELAY_ALLOW_UNAUTHENTICATED": "true", **os.environ})
    topics = Topics(settings.topic, settings.dead_letter_topic)
    shown = 0
    async with aclosing(
        records(connection(settings), topics, dead=arguments.dead, from_beginning=arguments.from_beginning)
    ) as landing:
        async for record in landing:
            if wanted(record, arguments.chat, arguments.type):
                print(as_json(record) if arguments.json else line(record), flush=True)
                shown += 1
                if shown == arguments.count:
                    break
    return 0


async def records(
    kafka: Connection,
    topics: Topics,
    *,
    dead: bool = False,
    from_beginning: bool = False,
    on_ready: Callable[[], None] = lambda: None,
) -> AsyncGenerator[ConsumerRecord, None]:
    """
    The events' records, or with *dead* the dead letters, as they are committed.

    Raises: KafkaLost, TopicsMissing.
    """
    with translated("tailing"):
        names = await _names(Cluster(kafka), topics, dead=dead)
        consumer = AIOKafkaConsumer(
            **kafka.options(),
            isolation_level="read_committed",
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        await consumer.start()
        try:
            places = [TopicPartition(name, number) for name, count in names.items() for number in range(count)]
            consumer.assign(places)
            if from_beginning:
                await consumer.seek_to_beginning(*places)
            else:
                await consumer.seek_to_end(*places)
                # Where the end is now, not where it is when the first fetch asks.
                await asyncio.gather(*(consumer.position(place) for place in places))
            on_ready()
            async for record in consumer:
                yield record
        finally:
            await leave(consumer._client, consumer.stop())  # noqa: SLF001


async def _names(cluster: Cluster, topics: Topics, *, dead: bool) -> dict[str, int]:
    pattern = topics.dead_letters if dead else topics.events
    found = {name: topic.partitions for name, topic in (await cluster.topics()).items()}
    if "{" in pattern:  # Workspaces are the relay's to know: whatever the template can stand for.
        prefix, suffix = pattern.partition("{")[0], pattern.rpartition("}")[2]
        names = {name: count for name, count in found.items() if name.startswith(prefix) and name.endswith(suffix)}
    else:
        names = {name: count for name, count in found.items() if name == pattern}
    if not names:
        raise TopicsMissing(f"There is no topic {pattern}. Is the relay's RELAY_TOPIC another one?")
    return names


def wanted(record: ConsumerRecord, chat: str | None, type_name: str | None) -> bool:
    """Whether *record* is of that chat and that type."""
    if chat is not None and record.key != chat.encode():
        return False
    return type_name is None or _headers(record).get("ce_type", "").removeprefix(CE_TYPE_PREFIX) == type_name


def line(record: ConsumerRecord) -> str:
    """A record on one line: time, type, chat, size, place; of a dead letter also what was wrong, or its replay."""
    headers = _headers(record)
    when = headers.get("relay_received_at", "") or datetime.fromtimestamp(record.timestamp / 1000, UTC).isoformat()
    type_name = headers.get("ce_type", "?").removeprefix(CE_TYPE_PREFIX)
    key = "-" if record.key is None else record.key.decode(errors="replace")
    size = len(record.value or b"")
    place = f"{record.partition}@{record.offset}"
    text = f"{when[11:23]}  {type_name:<{_TYPE_WIDTH}} {key:<{_CHAT_WIDTH}} {size:>7} B  {place}"
    if (schema := schema_id(record)) is not None:
        text += f"  schema {schema}"
    if reason := headers.get("relay_error_reason"):
        text += f"  {reason}: {headers.get('relay_error_detail', '')}"
    if replayed := headers.get("relay_replayed"):
        text += f"  replayed: {replayed}"
    return "".join(character if character.isprintable() else "?" for character in text)


def as_json(record: ConsumerRecord) -> str:
    """A record as one JSON object; a value that is no JSON stands there as text."""
    value: Any
    _, body = unframed(record.value or b"null")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        value = body.decode(errors="replace")
    return orjson.dumps(
        {
            "topic": record.topic,
            "partition": record.partition,
            "offset": record.offset,
            "timestamp": record.timestamp,
            "key": None if record.key is None else record.key.decode(errors="replace"),
            "headers": _headers(record),
            "schema_id": schema_id(record),
            "value": value,
        }
    ).decode()


def schema_id(record: ConsumerRecord) -> int | str | None:
    """The registry's id or GUID of the schema of *record*'s value, however it is framed."""
    for name, value in record.headers:
        if name == SCHEMA_ID_HEADER and value is not None:
            return _guid(value)
    return unframed(record.value or b"")[0]


def _headers(record: ConsumerRecord) -> dict[str, str]:
    # Others write headers without a value, too.
    return {
        name: _guid(value) if name == SCHEMA_ID_HEADER else value.decode(errors="replace")
        for name, value in record.headers
        if value is not None
    }


def _guid(value: bytes) -> str:
    return str(uuid.UUID(bytes=value[1:])) if len(value) == _GUID_BYTES else value.hex()
