"""
The alerts' files, a real Prometheus, and a real relay for it to scrape.

Run as a program it writes the PrometheusRule manifest anew: `PYTHONPATH=tests python -m deploy.prometheus_for_tests`.
"""

import http.client
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import textwrap
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import pytest
from prometheus_client import CollectorRegistry
from relay_process import TOKEN, RelayProcess, wait_until

from relay.dev.chats import stream
from relay.metrics import Metrics

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules.yaml"
MANIFEST = ROOT / "deploy/prometheus/prometheusrule.yaml"
RULE_TESTS = ROOT / "deploy/prometheus/rules.test.yaml"

#: The tests that need Prometheus run where this variable is set: `make test-deploy`.
WANTED = "RELAY_TEST_DEPLOY"
needs_prometheus = pytest.mark.skipif(WANTED not in os.environ, reason="needs Prometheus: make test-deploy")

#: What is known of a target without asking it: of the plain example, and of the PodMonitor.
SCRAPE_LABELS = frozenset({"job", "instance", "namespace", "pod"})

_HOST = "127.0.0.1"
#: A broker that starts again, and Prometheus, take their time.
_PATIENCE = {"seconds": 60.0, "pause": 0.2}


# --- Files. ---


def manifest(rules: str) -> str:
    """The PrometheusRule that holds *rules*, the text of a plain rules file, comments and all."""
    head = """\
        # Made from rules.yaml by `make docs`: change that file.
        apiVersion: monitoring.coreos.com/v1
        kind: PrometheusRule
        metadata:
          name: relay
          labels:
            app.kubernetes.io/name: relay
        spec:
        """
    return textwrap.dedent(head) + textwrap.indent(rules[rules.index("groups:") :], "  ")


def hurried(rules: str, *, ranges: str = "10s", replacing: Mapping[str, str] | None = None) -> str:
    """
    *rules* for the impatient: every `for:` a second, every range of minutes or hours *ranges*, weeks 15 s.

    *replacing* are other texts to exchange; each must be there.
    """
    rules = re.sub(r"for: \w+", "for: 1s", rules)
    rules = re.sub(r"\[\d+[mh]\]", f"[{ranges}]", rules)
    rules = rules.replace("offset 1w", "offset 15s")
    for old, new in (replacing or {}).items():
        assert old in rules, old
        rules = rules.replace(old, new)
    return rules


# --- What expressions may name. ---


def known_names() -> dict[str, dict[str, set[str]]]:
    """Every series of the relay by name, with the values that each of its labels may have."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.add_workspace("default", 2)
    metrics.add_topics(["topic"])
    names: dict[str, dict[str, set[str]]] = {}
    for sample in (sample for family in registry.collect() for sample in family.samples):
        labels = names.setdefault(sample.name, {})
        for label, value in sample.labels.items():
            labels.setdefault(label, set()).add(value)
    return names


def unknown_names(expression: str) -> set[str]:
    """What *expression* names that is no metric of the relay's, no label of that metric, or no value of that label."""
    names = known_names()
    unknown: set[str] = set()
    for metric, selector in re.findall(r"\b(relay_\w+)(?:\{([^}]*)\})?", expression):
        labels = names.get(metric)
        if labels is None:
            unknown.add(metric)
            continue
        for label, values in re.findall(r'(\w+)\s*[=!]=?~?\s*"([^"]*)"', selector):
            if label not in SCRAPE_LABELS:
                unknown |= {
                    f'{metric}{{{label}="{value}"}}' for value in {*values.split("|")} - labels.get(label, set())
                }
    every_label = SCRAPE_LABELS.union(*names.values())
    for labels_named in re.findall(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)", expression):
        unknown |= {*re.findall(r"\w+", labels_named)} - every_label
    return unknown


# --- Prometheus. ---


class Sample(NamedTuple):
    """One series, with a value of it."""

    labels: dict[str, str]
    value: float


def tool(name: str) -> str:
    """Where *name* of Prometheus is; fails the test, and says what to install, where it is not."""
    path = shutil.which(name)
    if path is None:
        pytest.fail(
            f"{name} is missing. Debian and Ubuntu: apt-get install prometheus. "
            f"Elsewhere: https://prometheus.io/download, with its folder in PATH.",
            pytrace=False,
        )
    return path


class Prometheus:
    """A real Prometheus that scrapes *targets* and evaluates *rules*, each twice a second."""

    def __init__(self, directory: Path, targets: Sequence[str], rules: str = "groups: []") -> None:
        self._directory = directory / "prometheus"
        self._targets = list(targets)
        self._rules = rules
        self._address = f"{_HOST}:{_free_port()}"
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        command = tool("prometheus")
        self._directory.mkdir()
        config = {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [{"job_name": "relay", "static_configs": [{"targets": self._targets}]}],
        }
        (self._directory / "prometheus.yaml").write_text(json.dumps(config))
        (self._directory / "rules.yaml").write_text(self._rules)
        with (self._directory / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    command,
                    f"--config.file={self._directory}/prometheus.yaml",
                    f"--storage.tsdb.path={self._directory}/data",
                    f"--web.listen-address={self._address}",
                ],
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(self._scrapes, "Prometheus scrapes the relay", **_PATIENCE)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()

    def query(self, expression: str) -> list[Sample]:
        """The series of *expression* now, without those that are no number."""
        found = self._get("query", query=expression)["result"]
        samples = [Sample(series["metric"], float(series["value"][1])) for series in found]
        return [sample for sample in samples if not math.isnan(sample.value)]

    def query_range(self, expression: str, seconds: float) -> list[Sample]:
        """The series that *expression* had in the last *seconds*, each with its greatest value."""
        now = time.time()
        found = self._get("query_range", query=expression, start=str(now - seconds), end=str(now), step="1")["result"]
        return [
            Sample(series["metric"], max(numbers))
            for series in found
            if (numbers := [float(value) for _, value in series["values"] if value != "NaN"])
        ]

    def label_values(self, metric: str, label: str) -> list[str]:
        """The values of *label* on *metric*."""
        values: list[str] = self._get(f"label/{label}/values", **{"match[]": metric})
        return values

    def firing(self) -> dict[str, dict[str, str]]:
        """The alerts that fire, by name, each with the labels and annotations of one of them."""
        return {
            alert["labels"]["alertname"]: {**alert["labels"], **alert["annotations"]}
            for alert in self._get("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def wait_for(self, *names: str) -> dict[str, str]:
        """Waits until all these alerts fire at one time; labels and annotations of the last one."""
        wait_until(lambda: set(names) <= self.firing().keys(), f"{names} fire", **_PATIENCE)
        return self.firing()[names[-1]]

    def wait_until_quiet(self, *names: str) -> None:
        """Waits until none of these alerts fires, or with no name none at all."""
        wait_until(
            lambda: not self.firing().keys() & (names or self.firing().keys()), f"{names or 'all'} clear", **_PATIENCE
        )

    def wait_until_there_is(self, expression: str) -> None:
        """Waits until *expression* has a series."""
        wait_until(lambda: bool(self.query(expression)), expression, **_PATIENCE)

    def _scrapes(self) -> bool:
        assert self._process.poll() is None, (self._directory / "log").read_text()[-2000:]
        with suppress(OSError), urllib.request.urlopen(f"http://{self._address}/-/ready", timeout=10):
            return len(self.query("up == 1")) == len(self._targets)
        return False

    def _get(self, path: str, **parameters: str) -> Any:
        url = f"http://{self._address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as response:
                return json.load(response)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from error


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port: int = probe.getsockname()[1]
        return port


# --- The relay, and what it is given to do. ---


@contextmanager
def running_relay(directory: Path, kafka: str, topic: str, **settings: str) -> Iterator[RelayProcess]:
    """Yields a relay that serves, with topics of its own."""
    topics = {
        "RELAY_TOPIC": topic,
        "RELAY_DEAD_LETTER_TOPIC": f"{topic}.dead",
        "RELAY_WATERMARK_TOPIC": f"{topic}.watermarks",
        "RELAY_TOPIC_CREATE": "true",
        "RELAY_DRAIN_SECONDS": "1",
    }
    with closing(RelayProcess(directory, kafka, {**topics, **settings})) as relay:
        yield relay.start()


def target(relay: RelayProcess) -> str:
    """What Prometheus scrapes."""
    return f"{_HOST}:{relay.admin_port}"


def deliver(relay: RelayProcess, body: bytes, token: str = TOKEN) -> int:
    """Posts *body* as Rocket.Chat would, once; the answer's status."""
    with closing(http.client.HTTPConnection(_HOST, relay.port, timeout=20)) as connection:
        connection.request("POST", "/rocketchat", body, {"X-RocketChat-Livechat-Token": token})
        return connection.getresponse().status


def events() -> Iterator[bytes]:
    """Bodies of made-up chats, without end."""
    return (body for _, body in stream(random.Random(), chats=4))


@contextmanager
def repeating(action: Callable[[], object], every: float) -> Iterator[None]:
    """Does *action* again and again meanwhile, whatever becomes of it."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(every):
            with suppress(OSError, http.client.HTTPException):
                action()

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def chatting(relay: RelayProcess, rate: float = 20, token: str = TOKEN) -> Iterator[None]:
    """Delivers about *rate* events a second meanwhile."""
    bodies = events()
    with repeating(lambda: deliver(relay, next(bodies), token), 1 / rate):
        yield


if __name__ == "__main__":
    MANIFEST.write_text(manifest(RULES.read_text()))
