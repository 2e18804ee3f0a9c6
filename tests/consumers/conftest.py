"""Fixtures of the tests that run the guide's examples."""

import os
import uuid
from collections.abc import Iterator

import pytest
from consumers.published import Printing, Published, Show, published
from kafka_for_tests import FoundKafka


@pytest.fixture(scope="session", params=["none", "prefix"])
def events(
    request: pytest.FixtureRequest, kafka: FoundKafka, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Published]:
    """Yield what a real relay published, bare and framed."""
    registry = request.getfixturevalue("registry_url") if request.param == "prefix" else ""
    topic = f"guide-{request.param}-{uuid.uuid4().hex[:8]}"
    with published(tmp_path_factory.mktemp("relay"), kafka.bootstrap_servers, registry, topic) as events:
        yield events


@pytest.fixture
def show(events: Published, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Show]:
    """Yield a function that runs an example until the test ends."""
    running: list[Printing] = []

    def show(*command: object, **environ: str) -> Printing:
        given = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
        given |= {"LANG": "C.UTF-8", "PYTHONFAULTHANDLER": "1"}
        directory = tmp_path_factory.mktemp("example")
        running.append(Printing(command, {**given, **events.environ(), **environ}, directory))
        return running[-1]

    yield show
    for one in running:
        one.close()
