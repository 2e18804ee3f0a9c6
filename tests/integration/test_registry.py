"""The client and its framing against a real registry, and Confluent's own client as the one who reads."""

import asyncio
import base64
import json
import random
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import pytest
from faulty_proxy import Answer, Cut, Hold, Reset, faulty_proxy
from registry_for_tests import registry_says, stub_registry

from relay.dev.chats import conversation
from relay.dev.registry import LocalRegistry, RegistryRuntime
from relay.errors import (
    GuidMissing,
    RegistryError,
    RegistryFailed,
    RegistryRefused,
    RegistryUnreachable,
    SchemaIncompatible,
    SchemaMissing,
    SchemaRefused,
)
from relay.framing import Framing, Registered, fingerprint, frame, registrations, unframed
from relay.registry import COMPATIBILITY, Registry, Standing, basic
from relay.schemas import DRAFT_07, Schemas

SHIPPED = {schema.name: schema for schema in Schemas.load()}
SAVED = SHIPPED["message-saved"]
Document = dict[str, Any]


@pytest.fixture
def url(registry_url: str) -> str:
    return registry_url


@pytest.fixture
def topic() -> str:
    """Return a topic name that no other test has."""
    return f"chats-{uuid.uuid4().hex[:12]}"


# --- Registering ---


@pytest.mark.parametrize("strategy", ["topic-record", "topic"])
async def test_every_shipped_schema_is_registered_once_and_looked_up_after_that(
    url: str, topic: str, strategy: Any
) -> None:
    wanted = registrations(strategy, [(topic, schema) for schema in SHIPPED.values()])

    async with Registry(url) as registry:
        with pytest.raises(SchemaMissing):
            await registry.look_up(wanted[0].subject, wanted[0].text)
        first = [await registry.register(it.subject, it.text) for it in wanted]
        again = [await registry.register(it.subject, it.text) for it in wanted]
        found = [await registry.look_up(it.subject, it.text) for it in wanted]
        settings = [await registry_says(registry, "GET", f"/config/{it.subject}") for it in wanted]
        versions = [await registry_says(registry, "GET", f"/subjects/{it.subject}/versions") for it in wanted]
        subjects = await registry.subjects()

    assert [it.id for it in first] == [it.id for it in again] == [it.id for it in found]
    assert len({it.id for it in first}) == len(wanted)
    assert {it["compatibilityLevel"] for it in settings} == {COMPATIBILITY}
    assert versions == [[1]] * len(wanted)
    assert {it.subject for it in wanted} <= set(subjects)


async def test_a_reformatted_schema_is_the_same_schema(url: str, topic: str) -> None:
    reformatted = json.dumps(json.loads(SAVED.text), indent=7)

    async with Registry(url) as registry:
        first = await registry.register(topic, SAVED.text)

        assert (await registry.register(topic, reformatted)).id == first.id
        assert (await registry.look_up(topic, reformatted)).id == first.id


async def test_relays_that_start_at_once_make_one_version(url: str, topic: str) -> None:
    async with Registry(url) as one, Registry(url) as two:
        ids = await asyncio.gather(*(it.register(topic, SAVED.text) for it in (one, two)), return_exceptions=True)
        # Whoever lost the race is told so, and asks again.
        last = await two.register(topic, SAVED.text)
        versions = await registry_says(one, "GET", f"/subjects/{topic}/versions")

    assert versions == [1]
    assert {it.id for it in ids if isinstance(it, Registered)} == {last.id}
    assert all(isinstance(it, Registered | RegistryError) for it in ids)


async def test_an_existing_subject_keeps_its_compatibility(url: str, topic: str) -> None:
    async with Registry(url) as registry:
        await registry.register(topic, SAVED.text)
        await registry._ask(topic, "PUT", f"/config/{topic}", {"compatibility": "NONE"})

        await registry.register(topic, evolved(lambda it: it["properties"].pop("visitor")))

        assert await registry_says(registry, "GET", f"/config/{topic}") == {"compatibilityLevel": "NONE"}


async def test_a_setting_made_before_the_subject_stays(url: str, topic: str) -> None:
    async with Registry(url) as registry:
        await registry._ask(topic, "PUT", f"/config/{topic}", {"compatibility": "FULL"})

        await registry.register(topic, SAVED.text)

        assert await registry_says(registry, "GET", f"/config/{topic}") == {"compatibilityLevel": "FULL"}


async def test_what_is_no_schema_is_refused(url: str, topic: str) -> None:
    async with Registry(url) as registry:
        for text in (json.dumps({"$schema": DRAFT_07, "type": "nothing"}), "no JSON"):
            with pytest.raises(SchemaRefused, match=f"Subject {topic}: .*422"):
                await registry.register(topic, text)


async def test_a_wrong_base_url_is_named(url: str, topic: str) -> None:
    async with Registry(url.removesuffix("/v7") + "/nowhere") as registry:
        with pytest.raises(RegistryFailed, match=f"is RELAY_SCHEMA_REGISTRY_URL right.*{topic}.*nowhere answers 404"):
            await registry.register(topic, SAVED.text)


# --- Evolution ---


def evolved(change: Callable[[Document], object]) -> str:
    document: Document = json.loads(SAVED.text)
    change(document)
    return json.dumps(document)


ALLOWED: dict[str, Callable[[Document], object]] = {
    "an-optional-property-added": lambda it: it["properties"].update(added={"type": "string"}),
    "an-optional-property-added-inside": lambda it: it["properties"]["visitor"]["properties"].update(added={}),
    "a-property-narrowed": lambda it: it["properties"]["label"].update(type="string"),
    "a-property-required": lambda it: it["required"].append("label"),
    "a-description-changed": lambda it: it.update(description="Said better."),
}
FORBIDDEN: dict[str, Callable[[Document], object]] = {
    "an-optional-property-removed": lambda it: it["properties"].pop("label"),
    "a-required-property-removed": lambda it: (it["properties"].pop("visitor"), it["required"].remove("visitor")),
    "a-property-retyped": lambda it: it["properties"].update(_id={"type": "number"}),
    "a-property-widened": lambda it: it["properties"]["label"].update(type=["string", "null", "number"]),
    "a-property-no-longer-required": lambda it: it["required"].remove("visitor"),
}


@pytest.mark.parametrize("change", ALLOWED)
async def test_what_older_consumers_can_read_is_accepted_by_check_and_registry(
    url: str, topic: str, change: str
) -> None:
    text = evolved(ALLOWED[change])
    async with Registry(url) as registry:
        first = await registry.register(topic, SAVED.text)

        assert (await registry.check(topic, text)).standing is Standing.COMPATIBLE
        assert (await registry.register(topic, text)).id != first.id
        assert (await registry.check(topic, text)).standing is Standing.REGISTERED


@pytest.mark.parametrize("change", FORBIDDEN)
async def test_what_older_consumers_cannot_read_is_refused_by_check_and_registry(
    url: str, topic: str, change: str
) -> None:
    text = evolved(FORBIDDEN[change])
    async with Registry(url) as registry:
        await registry.register(topic, SAVED.text)

        assert (await registry.check(topic, text)).standing is Standing.INCOMPATIBLE
        with pytest.raises(SchemaIncompatible, match=f"Subject {topic}: .*409"):
            await registry.register(topic, text)
        assert await registry_says(registry, "GET", f"/subjects/{topic}/versions") == [1]


async def test_every_earlier_version_counts_not_only_the_last(url: str, topic: str) -> None:
    first = evolved(lambda it: it["properties"].update(added={"type": "string"}))
    third = evolved(lambda it: it["properties"].update(added={"type": "number"}))
    async with Registry(url) as registry:
        await registry.register(topic, first)
        await registry._ask(topic, "PUT", f"/config/{topic}", {"compatibility": "NONE"})
        await registry.register(topic, SAVED.text)
        # The second one does not know the property, so it would take any type of it.
        assert (await registry.check(topic, third)).standing is Standing.COMPATIBLE
        await registry._ask(topic, "PUT", f"/config/{topic}", {"compatibility": COMPATIBILITY})

        assert (await registry.check(topic, third)).standing is Standing.INCOMPATIBLE
        with pytest.raises(SchemaIncompatible):
            await registry.register(topic, third)


async def test_a_check_of_a_new_subject_does_not_make_it(url: str, topic: str) -> None:
    async with Registry(url) as registry:
        assert (await registry.check(topic, SAVED.text)).standing is Standing.NEW
        assert topic not in await registry.subjects()
        with pytest.raises(SchemaMissing):
            await registry_says(registry, "GET", f"/config/{topic}")


async def test_a_topics_schemas_together_may_gain_a_property_but_not_lose_one(url: str, topic: str) -> None:
    async with Registry(url) as registry:
        await registry.register(f"{topic}-value", together(topic, SAVED.text))

        for change, standing in (
            ("an-optional-property-added", Standing.COMPATIBLE),
            ("a-property-retyped", Standing.INCOMPATIBLE),
        ):
            text = together(topic, evolved({**ALLOWED, **FORBIDDEN}[change]))
            assert (await registry.check(f"{topic}-value", text)).standing is standing, change


def together(topic: str, saved: str) -> str:
    texts = {**{name: it.text for name, it in SHIPPED.items()}, "message-saved": saved}
    placed = [(topic, Schema(SHIPPED[name].ce_type, text)) for name, text in texts.items()]
    (registration,) = registrations("topic", placed)
    return registration.text


class Schema(NamedTuple):
    ce_type: str
    text: str


# --- Framing, as Confluent's client reads it ---


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("strategy", ["topic-record", "record", "topic"])
async def test_confluents_client_decodes_prefix_framing(url: str, topic: str, strategy: Any) -> None:
    decoded = await asyncio.to_thread(decode, url, topic, await chat(url, topic, strategy, "prefix"))

    assert [it["type"] for it in decoded][:1] == ["LivechatSessionStart"]
    assert len({it["type"] for it in decoded}) > 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
async def test_confluents_client_decodes_header_framing(topic: str) -> None:
    async with stub_registry() as stub:
        records = await chat(stub.url, topic, "topic-record", "header")
        decoded = await asyncio.to_thread(decode, stub.url, topic, records)

    assert [json.loads(value) for value, _ in records] == decoded


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("framing", ["prefix", "header"])
async def test_confluents_serializer_frames_as_the_relay_does(topic: str, framing: Framing) -> None:
    async with stub_registry() as stub:
        ours = await chat(stub.url, topic, "topic-record", framing)
        theirs = await asyncio.to_thread(encode, stub.url, topic, bodies(), framing)

    assert [(unframed(value)[0], headers) for value, headers in ours] == [
        (unframed(value)[0], headers) for value, headers in theirs
    ]


async def test_a_registry_without_guids_cannot_frame_headers(url: str, topic: str) -> None:
    async with Registry(url) as registry:
        registered = await registry.register(topic, SAVED.text)

    with pytest.raises(GuidMissing, match=f"Subject {topic}: .*RELAY_SCHEMA_FRAMING=prefix"):
        frame("header", registered)


#: A value and its headers, typed as Confluent's client types them.
Framed = list[tuple[bytes, list[tuple[str, str | bytes | None]]]]


def bodies() -> list[bytes]:
    return [*conversation(random.Random(7), started_at=datetime(2026, 1, 1, tzinfo=UTC))]


async def chat(url: str, topic: str, strategy: Any, framing: Framing) -> Framed:
    """A whole chat, framed with what the registry at *url* says."""
    schemas = {schema.rocketchat_type: schema for schema in SHIPPED.values()}
    ids: dict[str, Registered] = {}
    async with Registry(url) as registry:
        for wanted in registrations(strategy, [(topic, schema) for schema in SHIPPED.values()]):
            registered = await registry.register(wanted.subject, wanted.text)
            ids.update(dict.fromkeys(wanted.fingerprints, registered))
    records: Framed = []
    for body in bodies():
        framed = frame(framing, ids[fingerprint(schemas[json.loads(body)["type"]].text)])
        records.append((framed.prefix + body, [*framed.headers]))
    return records


def decode(url: str, topic: str, records: Framed) -> list[Document]:
    from confluent_kafka.schema_registry import SchemaRegistryClient
    from confluent_kafka.schema_registry.json_schema import JSONDeserializer
    from confluent_kafka.serialization import MessageField, SerializationContext

    with SchemaRegistryClient({"url": url, "timeout": 5}) as client:
        deserialize = JSONDeserializer(None, schema_registry_client=client)
        return [
            deserialize(value, SerializationContext(topic, MessageField.VALUE, headers)) for value, headers in records
        ]


def encode(url: str, topic: str, bodies: list[bytes], framing: Framing) -> Framed:
    from confluent_kafka.schema_registry import (
        SchemaRegistryClient,
        header_schema_id_serializer,
        prefix_schema_id_serializer,
        topic_record_subject_name_strategy,
    )
    from confluent_kafka.schema_registry.json_schema import JSONSerializer
    from confluent_kafka.serialization import MessageField, SerializationContext

    schemas = {schema.rocketchat_type: schema for schema in SHIPPED.values()}
    records: Framed = []
    with SchemaRegistryClient({"url": url, "timeout": 5}) as client:
        for body in bodies:
            document = json.loads(body)
            serialize = JSONSerializer(
                schemas[document["type"]].text,
                client,
                conf={
                    "auto.register.schemas": False,
                    "subject.name.strategy": topic_record_subject_name_strategy,
                    "schema.id.serializer": header_schema_id_serializer
                    if framing == "header"
                    else prefix_schema_id_serializer,
                },
            )
            headers: list[tuple[str, str | bytes | None]] = []
            value = serialize(document, SerializationContext(topic, MessageField.VALUE, headers))
            records.append((value, headers))
    return records


# --- Faults in front of the real one ---


@pytest.mark.parametrize(
    "fault", [Reset(), Reset(after=30), Cut(after=30), Answer(503), Answer(200, b"<html>"), Answer(429)]
)
@pytest.mark.parametrize("step", ["POST /subjects/{}?", "GET /config", "PUT /config", "POST /subjects/{}/versions"])
async def test_a_registration_that_fails_at_any_step_is_completed_by_the_next_try(
    url: str, topic: str, step: str, fault: Any
) -> None:
    async with faulty_proxy(url) as proxy, Registry(proxy.url) as registry:
        proxy.fail(fault, on=step.format(topic))
        with pytest.raises((RegistryUnreachable, RegistryFailed), match=topic):
            await registry.register(topic, SAVED.text)
        proxy.mend()

        registered = await registry.register(topic, SAVED.text)

        assert registered.id == (await registry.look_up(topic, SAVED.text)).id
        assert await registry_says(registry, "GET", f"/config/{topic}") == {"compatibilityLevel": COMPATIBILITY}
        assert await registry_says(registry, "GET", f"/subjects/{topic}/versions") == [1]


async def test_a_held_request_is_given_up_and_the_next_one_served(url: str, topic: str) -> None:
    async with faulty_proxy(url) as proxy, Registry(proxy.url, timeout=0.2) as impatient:
        proxy.fail(Hold())
        with pytest.raises(RegistryUnreachable, match="no answer within"):
            await impatient.register(topic, SAVED.text)
    async with faulty_proxy(url) as proxy, Registry(proxy.url) as registry:
        assert (await registry.register(topic, SAVED.text)).id


# --- Rights ---


@pytest.fixture(scope="module")
def guarded(registry_runtime: RegistryRuntime) -> Iterator[LocalRegistry]:
    """Yield a registry with two users: `relay` may do all, `reader` may read."""
    users = "quarkus.security.users.embedded"
    properties = {
        "quarkus.http.auth.basic": "true",
        "apicurio.auth.role-based-authorization": "true",
        f"{users}.plain-text": "true",
        f"{users}.users.relay": "sesame",
        f"{users}.roles.relay": "sr-admin",
        f"{users}.users.reader": "sesame",
        f"{users}.roles.reader": "sr-readonly",
    }
    with LocalRegistry(properties=properties, runtime=registry_runtime) as registry:
        yield registry


async def test_a_reader_finds_what_is_registered_but_registers_nothing(guarded: LocalRegistry, topic: str) -> None:
    other = f"{topic}-other"
    async with (
        Registry(guarded.url, authorization=lambda: basic("relay", "sesame")) as relay,
        Registry(guarded.url, authorization=lambda: basic("reader", "sesame")) as reader,
    ):
        registered = await relay.register(topic, SAVED.text)

        assert (await reader.register(topic, SAVED.text)).id == registered.id
        assert (await reader.check(topic, SAVED.text)).standing is Standing.REGISTERED
        with pytest.raises(RegistryRefused, match=f"{other}: .*403"):
            await reader.register(other, SAVED.text)


@pytest.mark.parametrize("authorization", [None, basic("relay", "wrong"), basic("nobody", "sesame")])
async def test_a_wrong_password_is_refused_without_being_shown(
    guarded: LocalRegistry, topic: str, authorization: str | None
) -> None:
    async with Registry(guarded.url, authorization=lambda: authorization) as registry:
        with pytest.raises(RegistryRefused, match=f"{topic}: .*401") as raised:
            await registry.register(topic, SAVED.text)

    shown = base64.b64encode(b"relay:wrong").decode()
    assert "wrong" not in str(raised.value)
    assert shown not in str(raised.value)
