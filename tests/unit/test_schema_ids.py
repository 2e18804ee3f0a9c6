import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from faulty_proxy import FaultyProxy, faulty_proxy
from prometheus_client import CollectorRegistry
from registry_for_tests import StubRegistry, stub_registry

from relay import schema_ids
from relay.errors import SpoolFull
from relay.event import DeadLetterReason, Delivery, Event
from relay.framer import Framer
from relay.framing import KnownId, fingerprint, registrations, unframed
from relay.metrics import Metrics
from relay.publisher import Publisher
from relay.record import Record, RecordMaker, Topics
from relay.registry import Registry
from relay.schema_ids import SchemaIds
from relay.spool import Spool
from relay.watermark import Watermark

TOPICS = Topics("chats", "dead")


class Schema:
    rocketchat_type = "Message"
    ce_type = "chat.rocket.omnichannel.message.saved"

    def __init__(self, text: str) -> None:
        self.text = text

    def judge(self, _: str, payload: Any) -> str | None:
        return None if "fine" in payload or self is OLD else "/fine: required"


OLD, NEW = Schema('{"v": 1}'), Schema('{"v": 2}')


class FakeKafka:
    spent, transactional = False, True

    def __init__(self) -> None:
        self.records: list[Record] = []

    async def start(self) -> Watermark | None:
        return None

    async def publish(self, records: Sequence[Record], _: Watermark) -> None:
        self.records += records

    async def try_partition(self, _: Record) -> None:
        raise AssertionError("nothing is refused here")

    async def close(self) -> None:
        pass


@asynccontextmanager
async def relay(url: str, path: Path, schema: Schema, kafka: FakeKafka) -> AsyncIterator[Any]:
    metrics = Metrics(CollectorRegistry())
    spool = await Spool.open(path, max_bytes=1 << 24, dedupe_seconds=0, metrics=metrics)
    wanted = registrations("topic-record", [("chats", schema)])
    prints = {"Message": fingerprint(schema.text)}
    ids = SchemaIds(
        Registry(url, timeout=1), spool, framing="prefix", register=True, wanted=lambda: wanted, metrics=metrics
    )
    framer = Framer(ids, TOPICS, "topic-record", prints, schema.judge, enforce=True)
    publisher = Publisher(spool, lambda: kafka, RecordMaker(TOPICS, lambda _: None, framer), metrics, framer)
    tasks = [asyncio.create_task(publisher.run()), asyncio.create_task(ids.run())]

    async def send(number: int, *, fine: bool = True, reason: DeadLetterReason | None = None) -> None:
        body = json.dumps({"_id": "c", "type": "Message", "n": number, **({"fine": 1} if fine else {})}).encode()
        delivery = Delivery("default", body, number)
        event = Event.of(delivery, delivery.parse(), prints)._replace(reason=reason)
        assert await spool.append(event)

    try:
        yield spool, ids, send, metrics
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await spool.close()


def landed(kafka: FakeKafka) -> list[tuple[str, int | None, int]]:
    return [(it.topic, unframed(it.value)[0], json.loads(unframed(it.value)[1])["n"]) for it in kafka.records]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
async def proxy(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[StubRegistry, FaultyProxy]]:
    monkeypatch.setattr(schema_ids, "MAX_BACKOFF", 0.2)
    async with stub_registry() as stub, faulty_proxy(stub.url) as proxy:
        stub.schemas = ["{}"] * 6  # So that ids say something.
        yield stub, proxy


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "relay.db"


async def test_away_from_the_first_second_until_mended(proxy: Any, path: Path) -> None:
    _, front = proxy
    await front.refuse()
    kafka = FakeKafka()
    async with relay(front.url, path, OLD, kafka) as (spool, ids, send, metrics):
        for number in range(3):
            await send(number)
        await until(lambda: bool(ids.errors))
        assert (kafka.records, spool.depth, ids.connected) == ([], 3, False)
        assert metrics.registry.get_sample_value("relay_registry_connected") == 0
        await front.listen()
        await until(lambda: spool.depth == 0)
        assert landed(kafka) == [("chats", 7, n) for n in range(3)]
        assert metrics.registry.get_sample_value("relay_registry_connected") == 1


async def test_a_restart_without_the_registry_publishes_with_the_kept_ids(proxy: Any, path: Path) -> None:
    _, front = proxy
    async with relay(front.url, path, OLD, FakeKafka()) as (_, ids, _send, _m):
        await until(lambda: ids.connected)
    await front.refuse()
    kafka = FakeKafka()
    async with relay(front.url, path, OLD, kafka) as (spool, ids, send, _m):
        await send(1)
        await until(lambda: spool.depth == 0)
        assert (landed(kafka), ids.connected) == ([("chats", 7, 1)], False)


async def test_dead_letters_before_it_pass_and_one_behind_it_waits(proxy: Any, path: Path) -> None:
    _, front = proxy
    await front.refuse()
    kafka = FakeKafka()
    async with relay(front.url, path, OLD, kafka) as (spool, ids, send, _m):
        await send(1, reason=DeadLetterReason.SCHEMA)
        await send(2)
        await send(3, reason=DeadLetterReason.SCHEMA)
        await until(lambda: bool(ids.errors) and spool.depth == 2)
        await front.listen()
        await until(lambda: spool.depth == 0)
        assert landed(kafka) == [("dead", None, 1), ("chats", 7, 2), ("dead", None, 3)]


async def test_events_keep_the_id_of_the_schema_that_judged_them(proxy: Any, path: Path) -> None:
    _, front = proxy
    async with relay(front.url, path, OLD, FakeKafka()) as (spool, ids, send, _m):
        await until(lambda: ids.connected)
    stuck = FakeKafka()
    stuck.start = asyncio.Event().wait  # type: ignore[method-assign, assignment]
    async with relay(front.url, path, OLD, stuck) as (spool, _ids, send, _m):
        await send(1)
    kafka = FakeKafka()
    async with relay(front.url, path, NEW, kafka) as (spool, _ids, send, _m):
        await send(2)
        await until(lambda: spool.depth == 0)
        assert landed(kafka) == [("chats", 7, 1), ("chats", 8, 2)]


async def test_events_whose_schema_is_gone_are_judged_anew(proxy: Any, path: Path) -> None:
    _, front = proxy
    await front.refuse()
    async with relay(front.url, path, OLD, FakeKafka()) as (spool, ids, send, _m):
        await send(1)
        await send(2, fine=False)
        await until(lambda: bool(ids.errors))
    await front.listen()
    kafka = FakeKafka()
    async with relay(front.url, path, NEW, kafka) as (spool, _ids, send, _m):
        await until(lambda: spool.depth == 0)
        assert landed(kafka) == [("chats", 7, 1), ("dead", None, 2)]


async def test_an_emptied_registry_gives_its_new_ids(proxy: Any, path: Path) -> None:
    stub, front = proxy
    async with relay(front.url, path, OLD, FakeKafka()) as (_s, ids, _send, _m):
        await until(lambda: ids.connected)
    stub.schemas, stub.subjects = ["{}"], {}
    kafka = FakeKafka()
    async with relay(front.url, path, OLD, kafka) as (spool, ids, send, _m):
        await send(1)
        await until(lambda: spool.depth == 0)
        assert landed(kafka) == [("chats", 2, 1)]


@pytest.mark.parametrize("restart", [False, True], ids=["while it runs", "while it is stopped"])
async def test_an_emptied_registry_s_ids_of_older_schemas_are_never_used_again(
    proxy: Any, path: Path, restart: bool
) -> None:
    stub, front = proxy
    stuck = FakeKafka()
    stuck.start = asyncio.Event().wait  # type: ignore[method-assign, assignment]
    async with relay(front.url, path, OLD, stuck) as (_s, ids, send, _m):
        await until(lambda: ids.connected)
        await send(1)
        await send(2, fine=False)
    async with relay(front.url, path, NEW, stuck) as (_s, ids, _send, _m):
        await until(lambda: ids.connected)
        if not restart:
            stub.schemas, stub.subjects = ["{}"] * 2, {}
            ids.look_again()
            await until(lambda: ids.frame("chats-" + NEW.ce_type, fingerprint(NEW.text)).prefix[-1] == 3)
            assert ids.frame("chats-" + OLD.ce_type, fingerprint(OLD.text)) is None
    if restart:
        stub.schemas, stub.subjects = ["{}"] * 2, {}
    async with relay(front.url, path, NEW, stuck) as (_s, ids, _send, _m):
        await until(lambda: ids.connected)
    await front.refuse()  # All that there is now is in the spool.
    kafka = FakeKafka()
    async with relay(front.url, path, NEW, kafka) as (spool, ids, send, _m):
        await until(lambda: spool.depth == 0)
        assert landed(kafka) == [("chats", 3, 1), ("dead", None, 2)]


class Kept:
    def __init__(self, *, full: bool = False) -> None:
        self.full = full
        self.schema_ids: list[KnownId] = []

    async def remember(self, ids: Sequence[KnownId], *, forget: str | None = None) -> None:
        if self.full:
            raise SpoolFull
        self.schema_ids = [*(it for it in self.schema_ids if it.registry != forget), *ids]


def ids_of(url: str, kept: Kept, *schemas: Schema) -> SchemaIds:
    wanted = registrations("topic", [("chats", schema) for schema in schemas])
    return SchemaIds(
        Registry(url), kept, framing="prefix", register=True, wanted=lambda: wanted,
        metrics=Metrics(CollectorRegistry()),
    )  # fmt: skip


async def test_ids_that_a_full_spool_did_not_take_are_kept_once_it_has_room(proxy: Any) -> None:
    _, front = proxy
    kept = Kept(full=True)
    ids = ids_of(front.url, kept, OLD)
    await ids.learn()
    assert (ids.connected, kept.schema_ids) == (True, [])
    kept.full = False
    await ids.learn()
    await ids.learn()
    assert [it.id for it in kept.schema_ids] == [7]


async def test_in_a_subject_for_all_types_the_ids_of_an_older_set_of_schemas_stay(
    proxy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    _, front = proxy
    kept = Kept()

    def ids(*schemas: Schema) -> SchemaIds:
        return ids_of(front.url, kept, *schemas)

    other = Schema('{"$schema": "s", "v": 0}')
    await ids(other, Schema('{"$schema": "s", "v": 1}')).learn()
    now = ids(other, Schema('{"$schema": "s", "v": 2}'))
    await now.learn()

    found = [now.frame("chats-value", fingerprint(f'{{"$schema": "s", "v": {v}}}')) for v in (1, 0, 2)]
    assert [it and unframed(it.prefix)[0] for it in found] == [7, 8, 8]
    assert "schema_ids_changed" not in [getattr(record, "action", "") for record in caplog.records]
