"""Fixtures of all tests."""

import os
import re
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from kafka_for_tests import FoundKafka, NoKafkaError, find_kafka
from registry_for_tests import find_registry

from relay.dev.download import console_progress
from relay.dev.kafka import LocalKafka, prepare_runtime
from relay.dev.kafka_runtime import Runtime
from relay.dev.registry import LocalRegistry, RegistryRuntime, prepare_registry

SUMMARY = pytest.StashKey[list[str]]()
OwnKafka = Callable[..., LocalKafka]

# A test run does the same each time; `pytest --hypothesis-profile=long --timeout=0` goes where none has been, and makes
# small what it finds.
settings.register_profile(
    "short",
    max_examples=30,
    stateful_step_count=40,
    phases=[Phase.explicit, Phase.generate],
    derandomize=True,
    deadline=None,
)
settings.register_profile("long", max_examples=5000, stateful_step_count=100, deadline=None, print_blob=True)
settings.load_profile("short")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand what a worker process of pytest-xdist has to say to the one that prints."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["summary"] = session.config.stash.get(SUMMARY, [])


def pytest_testnodedown(node: Any) -> None:
    """Take what a worker process had to say."""
    node.config.stash.setdefault(SUMMARY, []).extend(getattr(node, "workeroutput", {}).get("summary", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which Kafka and which schema registry were taken, and what the runs with random faults came to."""
    for line in terminalreporter.config.stash.get(SUMMARY, []):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_reaches_what_tests_start() -> None:
    """A shell lets what it runs in the background ignore SIGINT, and so would every process of these tests."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that puts a line under the test run's results."""
    return request.config.stash.setdefault(SUMMARY, []).append


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    """No RELAY_* variable of the caller's reaches a test, except RELAY_TEST_*."""
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("RELAY_") and not name.startswith("RELAY_TEST_"):
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def kafka_runtime(request: pytest.FixtureRequest) -> Runtime:
    """Return what local brokers are started from; the first time on a machine it is downloaded, with a progress bar."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled(), console_progress("Kafka") as on_progress:
        return prepare_runtime(on_progress)


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest, report: Callable[[str], None]) -> Iterator[FoundKafka]:
    """Yield a Kafka that all tests share; give each test topics of its own (topic_name)."""
    with ExitStack() as stack:
        failure = ""
        try:
            found = stack.enter_context(find_kafka(lambda: request.getfixturevalue("kafka_runtime")))
        except NoKafkaError as error:
            failure = str(error)
        if failure:
            pytest.fail(failure, pytrace=False)
        report(f"Kafka: {found.how}")
        yield found


@pytest.fixture
def own_kafka(kafka_runtime: Runtime) -> Iterator[OwnKafka]:
    """Yield a function that starts a local Kafka for this test alone, to be stopped, frozen and killed."""
    with ExitStack() as stack:

        def start(
            brokers: int = 1, *, data_dir: Path | None = None, properties: Mapping[str, str] | None = None
        ) -> LocalKafka:
            kafka = LocalKafka(brokers, data_dir=data_dir, properties=properties, runtime=kafka_runtime)
            return stack.enter_context(kafka)

        yield start


@pytest.fixture(scope="session")
def registry_runtime(request: pytest.FixtureRequest) -> RegistryRuntime:
    """Return what local registries are started from; the first time it is downloaded, with a progress bar."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled(), console_progress("Registry") as on_progress:
        return prepare_registry(on_progress)


@pytest.fixture(scope="session")
def registry_url(request: pytest.FixtureRequest, report: Callable[[str], None]) -> Iterator[str]:
    """Yield the URL of a schema registry that all tests share; give each test subjects of its own (topic_name)."""
    with find_registry(lambda: request.getfixturevalue("registry_runtime")) as found:
        report(f"Registry: {found.how}")
        yield found.url


@pytest.fixture
def own_registry(registry_runtime: RegistryRuntime) -> Iterator[LocalRegistry]:
    """Yield a registry for this test alone, to be stopped, frozen and killed."""
    with LocalRegistry(runtime=registry_runtime) as registry:
        yield registry


@pytest.fixture
def topic_name(request: pytest.FixtureRequest) -> str:
    """Return a topic name that no other test has, nor another run against the same Kafka."""
    return f"{re.sub('[^a-z0-9]+', '-', request.node.name.lower())[:100]}-{uuid.uuid4().hex[:8]}"
