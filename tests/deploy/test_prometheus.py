"""The alerts' files: one source, about metrics that exist, each alert tested and with a page that says what to do."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.prometheus_for_tests import (
    MANIFEST,
    ROOT,
    RULE_TESTS,
    RULES,
    SCRAPE_LABELS,
    known_names,
    manifest,
    needs_prometheus,
    tool,
    unknown_names,
)

from relay.cli import main
from relay.config import Settings, settings_table

ALERTS: list[dict[str, Any]] = yaml.safe_load(RULES.read_text())["groups"][0]["rules"]
CASES: list[dict[str, Any]] = [
    case for test in yaml.safe_load(RULE_TESTS.read_text())["tests"] for case in test["alert_rule_test"]
]
#: The part of the page that is about alerts.
RUNBOOK = (ROOT / "deploy/README.md").read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
EACH_ALERT = pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])


def anchor(heading: str) -> str:
    """The fragment that leads to *heading* on a page made from Markdown."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@EACH_ALERT
def test_alert_says_how_bad_it_is_and_where_to_read_on(alert: dict[str, Any]) -> None:
    headings = {anchor(heading) for heading in re.findall(r"^### (.+)$", RUNBOOK, re.MULTILINE)}
    assert set(alert) <= {"alert", "expr", "for", "labels", "annotations"}
    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    page, _, fragment = alert["annotations"]["runbook_url"].partition("#")
    assert page == "deploy/README.md"
    assert fragment == anchor(alert["alert"])
    assert fragment in headings


@EACH_ALERT
def test_alert_names_only_metrics_and_labels_that_exist(alert: dict[str, Any]) -> None:
    assert unknown_names(alert["expr"]) == set()
    known = SCRAPE_LABELS.union(*known_names().values())
    assert set(re.findall(r"\$labels\.(\w+)", alert["annotations"]["description"])) <= known


@EACH_ALERT
def test_alert_is_tested_to_fire_and_to_be_silent(alert: dict[str, Any]) -> None:
    cases = [case for case in CASES if case["alertname"] == alert["alert"]]
    assert {bool(case.get("exp_alerts")) for case in cases} == {True, False}


def test_manifest_holds_the_rules() -> None:
    assert MANIFEST.read_text() == manifest(RULES.read_text()), "run `make docs`"
    assert yaml.safe_load(MANIFEST.read_text())["spec"] == yaml.safe_load(RULES.read_text())


def test_names_that_do_not_exist_are_noticed() -> None:
    assert unknown_names("rate(relay_http_requests[5m])") == {"relay_http_requests"}
    assert unknown_names('relay_spool_events{chat="x"}') == {'relay_spool_events{chat="x"}'}
    assert unknown_names('relay_events_rejected_total{reason=~"bad_token|bad"}') == {
        'relay_events_rejected_total{reason="bad"}'
    }
    assert unknown_names("sum by (reasons) (relay_spool_events)") == {"reasons"}


def test_every_heading_is_an_alert_or_is_read_first() -> None:
    headings = re.findall(r"^### (.+)$", RUNBOOK, re.MULTILINE)
    assert headings == ["First", *(alert["alert"] for alert in ALERTS)]


@EACH_ALERT
def test_page_says_what_an_alert_means_how_bad_it_is_and_what_to_do_step_by_step(alert: dict[str, Any]) -> None:
    name = alert["alert"]
    row = f"| [{name}](#{anchor(name)}) | {alert['labels']['severity']} | {alert['annotations']['summary']} |"
    assert row in RUNBOOK.splitlines()
    said = RUNBOOK.partition(f"\n### {name}\n")[2].partition("\n### ")[0]
    means, how_bad, steps = said.strip().split("\n\n", 2)
    assert means.startswith("**Means.** ")
    assert how_bad.startswith("**How bad.** ")
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", steps, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 1


def test_links_within_the_page_lead_to_headings() -> None:
    page = (ROOT / "deploy/README.md").read_text()
    headings = {anchor(heading) for heading in re.findall(r"^#+ (.+)$", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= headings


def test_page_names_only_what_exists() -> None:
    commands = set(re.findall(r"(?:`|^|-- )relay ([a-z]+)", RUNBOOK, re.MULTILINE))
    assert {"check", "tail", "top"} <= commands
    for command in commands:
        with pytest.raises(SystemExit) as exit_:
            main([command, "--help"])
        assert exit_.value.code == 0, command
    assert set(re.findall(r"RELAY_[A-Z_]+[A-Z]", RUNBOOK)) <= set(re.findall(r"RELAY_\w+", settings_table()))
    assert unknown_names(RUNBOOK) == set()


def test_pod_monitor_looks_for_the_port_that_the_manifests_name() -> None:
    monitor = yaml.safe_load((ROOT / "deploy/prometheus/podmonitor.yaml").read_text())
    manifests = [ROOT / "deploy/rocketchat/values.yaml", *(ROOT / "deploy/kustomize").rglob("*.yaml")]
    port = Settings.read({"RELAY_TOKEN": "t"}).admin_port
    named = {
        name for path in manifests for name in re.findall(rf"- name: (\S+)\s+containerPort: {port}\b", path.read_text())
    }
    assert named == {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}


def test_plain_prometheus_scrapes_the_admin_port() -> None:
    (job,) = yaml.safe_load((ROOT / "deploy/prometheus/scrape.yaml").read_text())["scrape_configs"]
    port = Settings.read({"RELAY_TOKEN": "t"}).admin_port
    assert job["static_configs"] == [{"targets": [f"localhost:{port}"]}]


@needs_prometheus
def test_promtool_agrees_with_the_rules() -> None:
    check = subprocess.run([tool("promtool"), "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr


@needs_prometheus
def test_each_alert_fires_when_it_should() -> None:
    test = subprocess.run([tool("promtool"), "test", "rules", RULE_TESTS], capture_output=True, text=True, check=False)
    assert test.returncode == 0, test.stdout + test.stderr


@needs_prometheus
def test_scrape_example_is_a_configuration(tmp_path: Path) -> None:
    config = ROOT / "deploy/prometheus/scrape.yaml"
    check = subprocess.run([tool("promtool"), "check", "config", config], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
