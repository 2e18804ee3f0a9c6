import asyncio
import logging
import signal
import socket
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from service_for_tests import MESSAGE, TOKEN, ask, post, process_as_it_was, running, started

from relay.batch import Entry
from relay.config import Settings
from relay.errors import RelayError, SettingsInvalid, SpoolInUse
from relay.event import Event
from relay.inspection import request
from relay.service import Service
from relay.store import Change, Store

MakeEvent = Callable[..., Event]
Until = Callable[[Callable[[], object]], Awaitable[None]]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """Return settings under which there is no Kafka."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = unused.getsockname()[1]
    return {
        "RELAY_TOKEN": TOKEN,
        "RELAY_HTTP_PORT": "0",
        "RELAY_ADMIN_HOST": "127.0.0.1",
        "RELAY_ADMIN_PORT": "0",
        "RELAY_SPOOL_PATH": str(tmp_path / "spool" / "relay.db"),
        "RELAY_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{nobody}",
        "RELAY_DRAIN_SECONDS": "0",
    }


@pytest.fixture(autouse=True)
def _process_as_it_was() -> Iterator[None]:
    with process_as_it_was():
        yield


def stored(environ: dict[str, str]) -> list[bytes]:
    with closing(sqlite3.connect(environ["RELAY_SPOOL_PATH"])) as connection:
        return [body for (body,) in connection.execute("SELECT body FROM events ORDER BY sequence")]


async def test_a_request_for_a_dead_event_is_done_with_the_start_and_while_it_runs(
    environ: dict[str, str], until: Until, make_event: MakeEvent
) -> None:
    path = Path(environ["RELAY_SPOOL_PATH"])
    dead: list[Entry] = [(number, make_event(number)) for number in (1, 2)]
    with closing(Store(path, 1 << 28)) as store:
        store.write(Change(published=2, dead=[(entry, "too large") for entry in dead]))
    request(path, [2])
    async with running(environ) as service:

        async def until_dead(count: int) -> None:
            # The file knows it a moment before the relay does.
            async with asyncio.timeout(10):
                while (await ask(service, "/status"))[1]["spool"]["dead_events"] != count:  # noqa: ASYNC110 - of another task
                    await asyncio.sleep(0.001)

        await until(lambda: len(stored(environ)) == 1)
        await until_dead(1)
        request(path, [1])
        await until(lambda: len(stored(environ)) == 2)
        await until_dead(0)
        assert "relay_spool_dead_events 0.0" in (await ask(service, "/metrics"))[1]
    assert stored(environ) == [event.body for _, event in reversed(dead)]


async def test_without_kafka_it_is_ready_and_keeps_what_it_answered_200(environ: dict[str, str], until: Until) -> None:
    async with running(environ) as service:
        assert (await ask(service, "/readyz"))[0] == 200
        assert await post(service) == 200
        assert await post(service) == 200
        assert await post(service, token="wrong") == 401
        assert stored(environ) == [MESSAGE]
        assert (await ask(service, "/healthz"))[0] == 200
        metrics = (await ask(service, "/metrics"))[1]
        assert "relay_spool_events 1.0" in metrics
        assert 'relay_events_accepted_total{type="Message",workspace="default"} 1.0' in metrics
        assert 'relay_events_published_total{topic="rocketchat.omnichannel"} 0.0' in metrics
        assert 'relay_token_matches_total{slot="1",workspace="default"} 2.0' in metrics
        assert "relay_spool_capacity_bytes 1.073741824e+09" in metrics
        assert "relay_kafka_connected 0.0" in metrics
    assert stored(environ) == [MESSAGE]
    async with running(environ) as service:
        assert await post(service) == 200
        status = (await ask(service, "/status"))[1]
        assert status["spool"]["events"] == 1
    assert stored(environ) == [MESSAGE]


async def test_the_status_tells_what_is_wrong(environ: dict[str, str]) -> None:
    async with running(environ) as service:
        await post(service)
        async with asyncio.timeout(30):
            while (status := (await ask(service, "/status"))[1])["kafka"]["error"] == "not connected yet":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert status["kafka"]["connected"] is False
    assert status["kafka"]["error"]
    assert status["draining"] is False
    assert status["spool"]["events"] == 1
    assert status["spool"]["bytes"] > 0
    assert status["spool"]["dead_events"] == 0
    assert status["uptime_seconds"] >= 0
    assert MESSAGE.decode() not in str(status)
    assert TOKEN not in str(status)


async def test_a_stop_refuses_new_deliveries_and_waits_for_kafka_until_it_is_asked_again(
    environ: dict[str, str], until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    environ["RELAY_DRAIN_SECONDS"] = "600"

    def actions() -> list[str]:
        return [getattr(record, "action", "") for record in caplog.records]

    async with running(environ) as service:
        await post(service)
        service.stop()
        await until(lambda: "draining" in actions())
        assert await post(service, MESSAGE + b" ") == 503
        assert (await ask(service, "/readyz"))[0] == 503
        assert (await ask(service, "/healthz"))[0] == 200
    assert actions()[-2:] == ["not_drained", "stopped"]
    assert stored(environ) == [MESSAGE]


async def test_with_nothing_to_publish_a_stop_does_not_wait(environ: dict[str, str]) -> None:
    environ["RELAY_DRAIN_SECONDS"] = "600"
    async with asyncio.timeout(30), running(environ):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_is_a_stop(environ: dict[str, str], number: signal.Signals) -> None:
    task = await started(Service(Settings.read(environ)))
    signal.raise_signal(number)
    async with asyncio.timeout(30):
        await task


async def test_a_port_that_is_taken_is_told_and_leaves_the_spool_free(environ: dict[str, str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        with pytest.raises(RelayError, match=r"already in use.*RELAY_HTTP_PORT"):
            await Service(Settings.read(environ | {"RELAY_HTTP_PORT": port})).run()
        with pytest.raises(RelayError, match=r"already in use.*RELAY_ADMIN_PORT"):
            await Service(Settings.read(environ | {"RELAY_ADMIN_PORT": port})).run()
    async with running(environ) as service:
        assert await post(service) == 200


async def test_a_spool_that_another_relay_owns_is_told(environ: dict[str, str]) -> None:
    async with running(environ):
        with pytest.raises(SpoolInUse):
            await Service(Settings.read(environ)).run()


async def test_with_ack_kafka_there_is_no_200_without_kafka_and_no_file(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relay.memory.ACK_TIMEOUT", 0.05)
    async with running(environ | {"RELAY_ACK": "kafka"}) as service:
        assert await post(service) == 503
        assert (await ask(service, "/readyz"))[0] == 200
    assert not Path(environ["RELAY_SPOOL_PATH"]).exists()  # noqa: ASYNC240


async def test_what_the_settings_point_to_is_told_when_it_cannot_be_used(
    environ: dict[str, str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "file").write_text("neither a token of a good name nor a certificate")
    (bad / "no spaces").write_text("x")
    for wrong in (
        {"RELAY_WORKSPACES_DIR": str(bad)},
        {"RELAY_HTTP_TLS_CERTFILE": str(bad / "file"), "RELAY_HTTP_TLS_KEYFILE": str(bad / "file")},
    ):
        with pytest.raises(SettingsInvalid):
            Service(Settings.read(environ | wrong))


async def test_neither_token_nor_body_is_logged(environ: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with running(environ) as service:
        for token in (TOKEN, "visitor-guess"):
            await post(service, b'{"_id":"visitor-secret","type":"Message"}', token)
    for text in (TOKEN, "visitor-secret", "visitor-guess"):
        assert text not in caplog.text
