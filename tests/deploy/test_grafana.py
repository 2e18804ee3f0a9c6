"""The dashboard: well-formed, about metrics that exist, and every panel shows data of a real relay under load."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from deploy.prometheus_for_tests import (
    ROOT,
    RULES,
    Prometheus,
    needs_prometheus,
    running_relay,
    target,
    unknown_names,
)
from kafka_for_tests import FoundKafka
from relay_process import TOKEN

DASHBOARD: dict[str, Any] = json.loads((ROOT / "deploy/grafana/relay.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES: dict[str, dict[str, Any]] = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
EACH_PANEL = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
#: What Grafana makes of it for a scrape every half second.
RATE_INTERVAL = "4s"


def resolved(text: str, values: dict[str, str]) -> str:
    """*text* with Grafana's variables replaced by *values*; fails if it names another one."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda match: values[match[1] or match[2]], text)


def thresholds(title: str) -> list[float]:
    """Where the panel of that title changes its colour."""
    steps = next(p for p in PANELS if p["title"] == title)["fieldConfig"]["defaults"]["thresholds"]["steps"]
    return [step["value"] for step in steps if step["value"] is not None]


@EACH_PANEL
def test_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert all(query["legendFormat"] or query.get("format") == "table" for query in panel["targets"])


@EACH_PANEL
def test_panel_asks_the_chosen_datasource_for_the_chosen_relays(panel: dict[str, Any]) -> None:
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for query in panel["targets"]:
        metrics = re.findall(r"relay_\w+(\{[^}]*\})?", query["expr"])
        assert metrics
        assert all('{namespace=~"$namespace", instance=~"$instance"' in selector for selector in metrics)


@EACH_PANEL
def test_panel_names_only_metrics_and_labels_that_exist(panel: dict[str, Any]) -> None:
    for query in panel["targets"]:
        assert unknown_names(query["expr"]) == set()


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    covered = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(covered)) == len(covered)
    assert max(x for x, _ in covered) < 24


def test_alerts_that_are_named_exist() -> None:
    named = {name for panel in PANELS for name in re.findall(r"\bRelay[A-Z]\w+", panel["description"])}
    assert named <= set(re.findall(r"alert: (\w+)", RULES.read_text()))


def test_thresholds_are_those_of_the_alerts() -> None:
    rules = RULES.read_text()
    for title, threshold, rule in (
        ("Oldest event", 300, "relay_spool_oldest_event_age_seconds > 300"),
        ("Spool used", 0.95, "relay_spool_bytes >= 0.95 *"),
        ("Time until the spool is full", 4 * 3600, "< 4 * 3600"),
        ("Slowest of 100, until answered", 0.25, "> 0.25"),
    ):
        assert rule in rules
        assert thresholds(title)[-1] == threshold, title


@needs_prometheus
@pytest.mark.timeout(180)
def test_every_panel_shows_data_of_a_relay_under_load(
    kafka: FoundKafka, registry_url: str, topic_name: str, tmp_path: Path
) -> None:
    registry = {"RELAY_SCHEMA_REGISTRY_URL": registry_url}
    with (
        running_relay(tmp_path / "relay", kafka.bootstrap_servers, topic_name, **registry) as relay,
        Prometheus(tmp_path, [target(relay)]) as prometheus,
    ):
        load = [sys.executable, "-m", "relay", "send", "--url", relay.url, "--token", TOKEN, "--json"]
        sent = subprocess.run(
            [*load, "--chats", "16", "--rate", "200", "--duration", "30"], check=True, capture_output=True, timeout=120
        )
        assert json.loads(sent.stdout)["delivered"] > 1000

        values = {"datasource": "relay-tests", "__rate_interval": RATE_INTERVAL}
        assert VARIABLES["datasource"]["query"] == "prometheus"
        for name in ("namespace", "instance"):
            query = resolved(VARIABLES[name]["query"]["query"], values)
            metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()  # type: ignore[union-attr]
            # The relay was started by itself: it has no namespace, and what stands for all matches that, too.
            assert prometheus.label_values(metric, label) == ([target(relay)] if name == "instance" else [])
            values[name] = VARIABLES[name]["allValue"]

        for panel in PANELS:
            assert resolved(panel["datasource"]["uid"], values) == "relay-tests"
            for query in panel["targets"]:
                assert prometheus.query_range(resolved(query["expr"], values), 30), (panel["title"], query["expr"])
        busy = {"Accepted, by type", "Published, by topic", "Accept", "Write to the spool", "Kafka transaction"}
        for panel in PANELS:
            if panel["title"] in busy:
                found = prometheus.query_range(resolved(panel["targets"][0]["expr"], values), 15)
                assert any(sample.value > 0 for sample in found), panel["title"]
