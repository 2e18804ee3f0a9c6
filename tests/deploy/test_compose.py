"""compose.yaml: its services find each other, and what it configures them with is what they take."""

import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from acceptance.senders import Senders
from conftest import OwnKafka
from deploy.manifests import CLOSING_SECONDS, COMPOSE, DEPLOY, SWITCHES, TOKEN, URL, load
from deploy.prometheus_for_tests import RULES, needs_prometheus, tool
from kafka_for_pods import DEAD_LETTER_TOPIC, TOPIC
from oracle import judge, read_topics
from relay_process import TOKEN as TOKEN_OF_TESTS
from relay_process import RelayProcess

from relay import ingress
from relay.config import Settings

#: What Kafka's own topics have unless it is told, and one broker does not: in place of those that tests' brokers have.
KAFKAS_DEFAULTS = {
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
}


@pytest.fixture
def document() -> dict[str, Any]:
    """Return all of compose.yaml."""
    return load(COMPOSE)[0]


@pytest.fixture
def services(document: dict[str, Any]) -> dict[str, Any]:
    """Return the services of compose.yaml."""
    found: dict[str, Any] = document["services"]
    return found


def config(document: dict[str, Any], name: str) -> Any:
    """A file of which compose.yaml has the content, which is YAML as well."""
    return yaml.safe_load(document["configs"][name]["content"])


def container_paths(service: dict[str, Any]) -> dict[str, str]:
    """Where in the service's container the volumes and files of this folder are, by their name."""
    return dict(volume.removesuffix(":ro").split(":") for volume in service.get("volumes", []))


def test_both_have_the_same_token(services: dict[str, Any]) -> None:
    assert services["rocketchat"]["environment"][TOKEN] == services["relay"]["environment"]["RELAY_TOKEN"]


def test_rocketchat_sends_every_event_to_the_relay(services: dict[str, Any]) -> None:
    environ = services["rocketchat"]["environment"]
    settings = Settings.read(services["relay"]["environment"])
    assert environ[URL] == f"http://relay:{settings.http_port}{ingress.PATH}"
    assert settings.http_host == "0.0.0.0"
    assert {name: environ.get(name) for name in SWITCHES} == dict.fromkeys(SWITCHES, "true")


def test_kafka_is_where_the_relay_looks_for_it(services: dict[str, Any]) -> None:
    settings = Settings.read(services["relay"]["environment"])
    assert (
        services["kafka"]["environment"]["KAFKA_ADVERTISED_LISTENERS"]
        == f"PLAINTEXT://{settings.kafka_bootstrap_servers}"
    )


def test_stop_waits_for_the_drain(services: dict[str, Any]) -> None:
    settings = Settings.read(services["relay"]["environment"])
    grace = int(services["relay"]["stop_grace_period"].removesuffix("s"))
    assert grace >= settings.drain_seconds + CLOSING_SECONDS


def test_spool_is_in_a_volume(services: dict[str, Any]) -> None:
    settings = Settings.read(services["relay"]["environment"])
    assert f"spool:{settings.spool_path.parent}" in services["relay"]["volumes"]
    assert services["relay"]["read_only"] is True


def test_what_is_mounted_is_there(document: dict[str, Any], services: dict[str, Any]) -> None:
    for service in services.values():
        for source in container_paths(service):
            assert (DEPLOY / source).exists() if source.startswith(".") else source in document["volumes"], source
        for file in service.get("configs", []):
            assert file["source"] in document["configs"]


def test_it_runs_with_the_versions_that_the_page_names(services: dict[str, Any]) -> None:
    # Its absence is what lets Docker before 25 take the file.
    assert not any("start_interval" in service.get("healthcheck", {}) for service in services.values())


def test_relay_takes_and_publishes_on_a_kafka_with_these_settings(
    services: dict[str, Any], own_kafka: OwnKafka, tmp_path: Path
) -> None:
    theirs = {
        name.removeprefix("KAFKA_").lower().replace("_", "."): value
        for name, value in services["kafka"]["environment"].items()
    }
    # What is of the container: here the broker says itself where it is.
    of_the_container = {"node.id", "listeners", "advertised.listeners", "controller.quorum.voters", "log.dirs"}
    properties = {name: value for name, value in theirs.items() if name not in of_the_container}
    kafka = own_kafka(properties={**KAFKAS_DEFAULTS, **properties})
    environ: dict[str, str] = services["relay"]["environment"]
    ours = {"RELAY_TOPIC_CREATE": environ["RELAY_TOPIC_CREATE"], "RELAY_TOKEN": TOKEN_OF_TESTS}
    with closing(RelayProcess(tmp_path / "relay", kafka.bootstrap_servers, ours)) as relay:
        relay.start(connected=True)
        with Senders(relay.url, chats=1, rate=20) as senders:
            senders.wait_for_answers(5)
        relay.wait_until_drained()
    landed = read_topics(kafka.bootstrap_servers, TOPIC, DEAD_LETTER_TOPIC)
    assert not judge(senders.sent, landed, topic=TOPIC, dead_letter_topic=DEAD_LETTER_TOPIC).faults


def test_prometheus_scrapes_the_relay(document: dict[str, Any], services: dict[str, Any]) -> None:
    settings = Settings.read(services["relay"]["environment"])
    [job] = config(document, "prometheus")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"relay:{settings.admin_port}"]}]


@needs_prometheus
def test_prometheus_takes_its_configuration_and_finds_the_rules(
    document: dict[str, Any], services: dict[str, Any], tmp_path: Path
) -> None:
    [mounted] = services["prometheus"]["configs"]
    there = {mounted["target"]: document["configs"][mounted["source"]]["content"]}
    there[container_paths(services["prometheus"])["./prometheus/rules.yaml"]] = RULES.read_text()
    for path, content in there.items():
        (tmp_path / path[1:]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path[1:]).write_text(content)
    command = [tool("promtool"), "check", "config", str(tmp_path / mounted["target"][1:])]
    check = subprocess.run(command, capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
    assert "1 rule files found" in check.stdout


def test_grafana_has_prometheus_and_the_dashboard(document: dict[str, Any], services: dict[str, Any]) -> None:
    [source] = config(document, "grafana-datasource")["datasources"]
    [published] = services["prometheus"]["ports"]
    assert source["url"] == f"http://prometheus:{published.rpartition(':')[2]}"
    assert (source["type"], source["isDefault"]) == ("prometheus", True)
    [provider] = config(document, "grafana-dashboards")["providers"]
    dashboard = container_paths(services["grafana"])["./grafana/relay.json"]
    assert str(Path(dashboard).parent) == provider["options"]["path"]
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == dashboard
