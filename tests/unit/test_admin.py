from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as prometheus

from relay import admin
from relay.metrics import Metrics

STATUS: dict[str, Any] = {"version": "1.2.3", "kafka": {"connected": False, "error": "nobody is there"}, "events": 7}


class State:
    """What the relay says of itself."""

    reason: str | None = None


@pytest.fixture
def state() -> State:
    return State()


@pytest.fixture
async def client(state: State, metrics: Metrics) -> AsyncIterator[TestClient[Any, Any]]:
    async def unready() -> str | None:
        return state.reason

    app = admin.application(registry=metrics.registry, unready=unready, status=lambda: STATUS)
    async with TestClient(TestServer(app)) as client:
        yield client


async def test_metrics_are_prometheus_text(client: TestClient[Any, Any], metrics: Metrics) -> None:
    metrics.test_deliveries.inc(3)
    response = await client.get("/metrics")
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("text/plain")
    samples = {sample.name: sample.value for family in prometheus(await response.text()) for sample in family.samples}
    assert samples["relay_test_deliveries_total"] == 3
    assert not [name for name in samples if name.endswith("_created")]


async def test_metrics_are_openmetrics_when_asked_for(client: TestClient[Any, Any]) -> None:
    response = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["Content-Type"].startswith("application/openmetrics-text")
    families = openmetrics(await response.text())  # type: ignore[no-untyped-call]
    assert "relay_events_rejected" in {family.name for family in families}


async def test_a_gauge_s_value_is_that_of_the_moment(client: TestClient[Any, Any], metrics: Metrics) -> None:
    depth = 0
    metrics.spool_events.set_function(lambda: depth)
    for depth in (5, 6):
        assert f"relay_spool_events {depth}.0" in await (await client.get("/metrics")).text()


async def test_it_is_healthy_as_long_as_it_answers(client: TestClient[Any, Any], state: State) -> None:
    state.reason = "The spool is full."
    response = await client.get("/healthz")
    assert (response.status, await response.text()) == (200, "ok\n")


async def test_it_is_ready_unless_there_is_a_reason_not_to_be(client: TestClient[Any, Any], state: State) -> None:
    response = await client.get("/readyz")
    assert (response.status, await response.text()) == (200, "ok\n")
    state.reason = "The spool is full."
    response = await client.get("/readyz")
    assert (response.status, await response.text()) == (503, "The spool is full.\n")


async def test_the_status_is_json(client: TestClient[Any, Any]) -> None:
    response = await client.get("/status")
    assert response.status == 200
    assert response.headers["Content-Type"].startswith("application/json")
    assert await response.json() == STATUS


async def test_there_is_nothing_else(client: TestClient[Any, Any]) -> None:
    for path in ("/", "/rocketchat", "/metrics/", "/status/x"):
        assert (await client.get(path, allow_redirects=False)).status == 404
    for path in ("/metrics", "/healthz", "/readyz", "/status"):
        assert (await client.post(path)).status == 405
