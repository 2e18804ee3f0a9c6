"""A whole relay on a real Kafka with a real registry: what lands, also while the registry is away or refuses."""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition
from faulty_proxy import Answer, FaultyProxy, Hold, faulty_proxy
from kafka_for_tests import FoundKafka
from registry_for_tests import registry_says, stub_registry
from service_for_tests import TOKEN, ask, post, process_as_it_was, running

from relay import auth, schema_ids
from relay.dev.chats import conversation
from relay.framing import unframed
from relay.registry import Registry
from relay.schemas import DRAFT_07, Schemas
from relay.service import Service

SAVED = "chat.rocket.omnichannel.message.saved"
#: To what the registry would have to compare SAVED's schema: a chat's id that is a number.
OTHER = json.dumps({"$schema": DRAFT_07, "type": "object", "properties": {"_id": {"type": "number"}}})
CHAT = [*conversation(random.Random(7), started_at=datetime(2026, 1, 1, tzinfo=UTC))]
TYPES = [json.loads(body)["type"] for body in CHAT]
MESSAGE = CHAT[TYPES.index("Message")]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Of Confluent's client.


@pytest.fixture(autouse=True)
def _process_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(schema_ids, "MAX_BACKOFF", 0.4)
    with process_as_it_was():
        yield


@pytest.fixture
def environ(kafka: FoundKafka, registry_url: str, topic_name: str, tmp_path: Path) -> dict[str, str]:
    """Return the settings of a relay with topics and subjects of its own."""
    return {
        "RELAY_TOKEN": TOKEN,
        "RELAY_HTTP_PORT": "0",
        "RELAY_ADMIN_HOST": "127.0.0.1",
        "RELAY_ADMIN_PORT": "0",
        "RELAY_SPOOL_PATH": str(tmp_path / "relay.db"),
        "RELAY_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "RELAY_TOPIC": topic_name,
        "RELAY_DEAD_LETTER_TOPIC": f"{topic_name}.dead",
        "RELAY_WATERMARK_TOPIC": f"{topic_name}.marks",
        "RELAY_TOPIC_CREATE": "true",
        "RELAY_SCHEMA_REGISTRY_URL": registry_url,
    }


@pytest.fixture
async def proxy(environ: dict[str, str]) -> AsyncIterator[FaultyProxy]:
    """Yield a proxy through which *environ* speaks to the registry."""
    async with faulty_proxy(environ["RELAY_SCHEMA_REGISTRY_URL"]) as proxy:
        environ["RELAY_SCHEMA_REGISTRY_URL"] = proxy.url
        yield proxy


# --- What lands ---


@pytest.mark.parametrize("strategy", ["topic-record", "record", "topic"])
async def test_confluents_client_decodes_what_lands(environ: dict[str, str], strategy: str) -> None:
    async with relay(environ | {"RELAY_SUBJECT_STRATEGY": strategy}) as service:
        await send(service, CHAT)
        await published(service)

    records = await landed(environ)
    decoded = await asyncio.to_thread(decode, environ, records)
    assert decoded == [json.loads(body) for body in CHAT]
    assert [unframed(value(record))[1] for record in records] == CHAT
    assert {header(record, "content-type") for record in records} == {"application/json"}


async def test_confluents_client_decodes_header_framing_whose_values_are_the_bodies(environ: dict[str, str]) -> None:
    async with stub_registry() as stub:
        environ |= {"RELAY_SCHEMA_REGISTRY_URL": stub.url, "RELAY_SCHEMA_FRAMING": "header"}
        async with relay(environ) as service:
            await send(service, CHAT)
            await published(service)

        records = await landed(environ)
        assert await asyncio.to_thread(decode, environ, records) == [json.loads(body) for body in CHAT]
    assert [value(record) for record in records] == CHAT


async def test_without_framing_the_schemas_are_registered_all_the_same(environ: dict[str, str]) -> None:
    async with relay(environ | {"RELAY_SCHEMA_FRAMING": "none"}) as service:
        await send(service, [MESSAGE])
        await published(service)
        await until(lambda: connected(service))

    assert [value(record) for record in await landed(environ)] == [MESSAGE]
    assert len(await own_subjects(environ)) == len(Schemas.load())


async def test_dead_letters_are_as_they_came(environ: dict[str, str]) -> None:
    invalid = json.dumps({**json.loads(MESSAGE), "messages": "none"}).encode()
    unknown = b'{"_id":"c","type":"Unheard"}'
    async with relay(environ) as service:
        await send(service, [invalid, MESSAGE, unknown])
        await published(service)

    dead = await landed(environ, environ["RELAY_DEAD_LETTER_TOPIC"])
    assert [value(record) for record in dead] == [invalid, unknown]
    assert [header(record, "relay_error_reason") for record in dead] == ["schema", "unknown_type"]
    assert [unframed(value(record))[1] for record in await landed(environ)] == [MESSAGE]


@pytest.mark.parametrize(
    "setting", [{"RELAY_ACK": "kafka"}, {"RELAY_DELIVERY": "at-least-once"}], ids=lambda it: "-".join(it.values())
)
async def test_other_promises_frame_alike(environ: dict[str, str], setting: dict[str, str]) -> None:
    async with relay(environ | setting) as service:
        await until(lambda: connected(service))
        await service.connected()
        await send(service, CHAT)
        await published(service)

    assert await asyncio.to_thread(decode, environ, await landed(environ)) == [json.loads(body) for body in CHAT]


# --- While the registry is away ---


async def test_away_from_the_first_second_it_accepts_and_publishes_once_the_registry_comes(
    environ: dict[str, str], proxy: FaultyProxy
) -> None:
    await proxy.refuse()
    async with relay(environ) as service:
        await send(service, CHAT)
        await service.connected()
        assert (await ask(service, "/readyz"))[0] == 200
        await until(lambda: errors(service))
        status = (await ask(service, "/status"))[1]
        assert (status["kafka"]["connected"], status["registry"]["connected"]) == (True, False)
        assert all("does not answer" in text for text in status["registry"]["errors"].values())
        assert status["spool"]["events"] == len(CHAT)
        assert "relay_registry_connected 0.0" in (await ask(service, "/metrics"))[1]

        await proxy.listen()
        await published(service)

        assert (await ask(service, "/status"))[1]["registry"] == {"configured": True, "connected": True, "errors": {}}
        assert "relay_registry_connected 1.0" in (await ask(service, "/metrics"))[1]
    assert await asyncio.to_thread(decode, environ, await landed(environ)) == [json.loads(body) for body in CHAT]


async def test_a_registry_that_never_answers_holds_up_neither_deliveries_nor_the_stop(
    environ: dict[str, str], proxy: FaultyProxy
) -> None:
    proxy.fail(Hold())
    async with asyncio.timeout(8):  # Less than the registry is waited for.
        async with relay(environ) as service:
            await until(lambda: proxy.requests)
            await send(service, CHAT)
            await service.connected()
            assert (await ask(service, "/readyz"))[0] == 200
    proxy.mend()
    async with relay(environ) as service:
        await published(service)

    assert await asyncio.to_thread(decode, environ, await landed(environ)) == [json.loads(body) for body in CHAT]


async def test_what_was_spooled_before_a_restart_waits_on(environ: dict[str, str], proxy: FaultyProxy) -> None:
    proxy.fail(Answer(503))
    async with relay(environ) as service:
        await send(service, CHAT[:3])
        await until(lambda: errors(service))
    async with relay(environ) as service:
        await send(service, CHAT[3:])
        await until(lambda: errors(service))
        assert depth(service) == len(CHAT)
        proxy.mend()
        await published(service)

    assert await asyncio.to_thread(decode, environ, await landed(environ)) == [json.loads(body) for body in CHAT]


async def test_a_restart_without_the_registry_publishes_with_the_ids_in_the_spool(
    environ: dict[str, str], proxy: FaultyProxy
) -> None:
    async with relay(environ) as service:
        await until(lambda: connected(service))
    await proxy.refuse()
    async with relay(environ) as service:
        await send(service, CHAT)
        await published(service)
        assert not connected(service)
    await proxy.listen()

    assert await asyncio.to_thread(decode, environ, await landed(environ)) == [json.loads(body) for body in CHAT]


async def test_without_a_disk_nothing_is_accepted_until_the_registry_comes_and_the_retry_is_one_event(
    environ: dict[str, str], proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.memory.ACK_TIMEOUT", 0.2)
    await proxy.refuse()
    async with relay(environ | {"RELAY_ACK": "kafka"}) as service:
        await service.connected()
        assert await post(service, MESSAGE) == 503
        assert await post(service, MESSAGE) == 503
        await proxy.listen()
        await until(lambda: connected(service))
        monkeypatch.setattr("relay.memory.ACK_TIMEOUT", 10)
        assert await post(service, MESSAGE) == 200

    assert [unframed(value(record))[1] for record in await landed(environ)] == [MESSAGE]


@pytest.mark.parametrize("restart", [False, True], ids=["while it runs", "before a restart"])
async def test_events_of_a_workspace_that_is_taken_out_of_the_settings_hold_nothing_up(
    environ: dict[str, str], proxy: FaultyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    monkeypatch.setattr(auth, "RELOAD_SECONDS", 0)
    workspaces = tmp_path / "workspaces"
    workspaces.mkdir()
    (workspaces / "leaving").write_text("leaving")
    environ |= {"RELAY_WORKSPACES_DIR": str(workspaces), "RELAY_TOPIC": f"{environ['RELAY_TOPIC']}.{{workspace}}"}
    environ |= {"RELAY_DEAD_LETTER_TOPIC": "dead"}
    await proxy.refuse()
    async with AsyncExitStack() as relays:
        service = await relays.enter_async_context(relay(environ))
        await service.connected()  # So that the topics are there.
        assert await post(service, MESSAGE, "leaving", "/leaving") == 200
        await send(service, CHAT)
        await until(lambda: errors(service))
        (workspaces / "leaving").unlink()
        if restart:
            await relays.aclose()
            service = await relays.enter_async_context(relay(environ))
        else:
            assert await post(service, MESSAGE, "leaving", "/leaving") == 401
        await proxy.listen()
        await published(service)

    leaving, default = (environ["RELAY_TOPIC"].replace("{workspace}", name) for name in ("leaving", "default"))
    for topic, bodies in ((leaving, [MESSAGE]), (default, CHAT)):
        decoded = await asyncio.to_thread(decode, environ, await landed(environ, topic))
        assert decoded == [json.loads(body) for body in bodies]


# --- While the registry refuses ---


async def test_a_refused_schema_is_named_and_all_goes_on_by_itself_once_it_is_accepted(
    environ: dict[str, str], registry_url: str, topic_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    subject = f"{topic_name}-{SAVED}"
    async with Registry(registry_url) as registry:
        await registry.register(subject, OTHER)
        before = TYPES.index("Message")
        async with relay(environ) as service:
            await send(service, CHAT)
            await until(lambda: errors(service) and depth(service) == len(CHAT) - before)
            assert [*errors(service)] == [subject]
            assert "incompatible" in errors(service)[subject]
            assert "409" in errors(service)[subject]
            said = [record for record in caplog.records if getattr(record, "action", "") == "registry_failed"]
            assert [getattr(record, "subject", "") for record in said] == [subject]  # Once, not at each try.

            await registry._ask(subject, "PUT", f"/config/{subject}", {"compatibility": "NONE"})
            await published(service)

    assert await asyncio.to_thread(decode, environ, await landed(environ)) == [json.loads(body) for body in CHAT]


async def test_a_relay_that_may_not_register_looks_up_and_waits_for_who_may(
    environ: dict[str, str], registry_url: str, topic_name: str
) -> None:
    async with relay(environ | {"RELAY_SCHEMA_REGISTER": "false"}) as service:
        await send(service, [MESSAGE])
        await until(lambda: len(errors(service)) == len(Schemas.load()))
        assert "RELAY_SCHEMA_REGISTER=false" in errors(service)[f"{topic_name}-{SAVED}"]
        assert await own_subjects(environ) == []

        async with Registry(registry_url) as registry:
            for schema in Schemas.load():
                await registry.register(f"{topic_name}-{schema.ce_type}", schema.text)
        await published(service)

    assert await asyncio.to_thread(decode, environ, await landed(environ)) == [json.loads(MESSAGE)]


# --- Helpers ---


@asynccontextmanager
async def relay(environ: dict[str, str]) -> AsyncIterator[Service]:
    async with running(environ | {"RELAY_DRAIN_SECONDS": "0"}) as service:
        yield service


async def send(service: Service, bodies: Sequence[bytes]) -> None:
    assert [await post(service, body) for body in bodies] == [200] * len(bodies)


def depth(service: Service) -> int:
    return service._store.depth


def connected(service: Service) -> bool:
    return bool(service._ids and service._ids.connected)


def errors(service: Service) -> dict[str, str]:
    return service._ids.errors if service._ids else {}


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - of any kind
            await asyncio.sleep(0.01)


def published(service: Service) -> Awaitable[None]:
    return until(lambda: depth(service) == 0)


async def own_subjects(environ: dict[str, str]) -> list[str]:
    async with Registry(environ["RELAY_SCHEMA_REGISTRY_URL"]) as registry:
        return [it for it in await registry_says(registry, "GET", "/subjects") if environ["RELAY_TOPIC"] in it]


async def landed(environ: dict[str, str], topic: str = "") -> list[Message]:
    """All that a read_committed consumer finds on the topic, in the order of the relay's sequence."""
    servers = environ["RELAY_KAFKA_BOOTSTRAP_SERVERS"]
    found = await asyncio.to_thread(_consumed, servers, topic or environ["RELAY_TOPIC"])
    return sorted(found, key=lambda record: int(header(record, "relay_sequence")))


def _consumed(servers: str, topic: str) -> list[Message]:
    consumer = Consumer(
        {"bootstrap.servers": servers, "group.id": "unused", "enable.auto.commit": False, "enable.partition.eof": True}
    )
    try:
        partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        records: list[Message] = []
        ended: set[int | None] = set()
        while len(ended) < len(partitions):
            message = consumer.poll(30)
            assert message is not None, "no end of the topic within 30 s"
            error = message.error()
            if error is None:
                records.append(message)
            else:
                assert error.code() == KafkaError._PARTITION_EOF, error
                ended.add(message.partition())
        return records
    finally:
        consumer.close()


def value(record: Message) -> bytes:
    found = record.value()
    assert isinstance(found, bytes)
    return found


def header(record: Message, name: str) -> str:
    found = dict(record.headers() or [])[name]
    assert isinstance(found, bytes)
    return found.decode()


def decode(environ: dict[str, str], records: Sequence[Message]) -> list[Any]:
    from confluent_kafka.schema_registry import SchemaRegistryClient
    from confluent_kafka.schema_registry.json_schema import JSONDeserializer
    from confluent_kafka.serialization import MessageField, SerializationContext

    with SchemaRegistryClient({"url": environ["RELAY_SCHEMA_REGISTRY_URL"], "timeout": 5}) as client:
        deserialize = JSONDeserializer(None, schema_registry_client=client)
        return [
            deserialize(value(it), SerializationContext(it.topic() or "", MessageField.VALUE, it.headers()))
            for it in records
        ]
