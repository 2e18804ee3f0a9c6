"""The real helm and kustomize render what stands under deploy/: it is valid, and it is what the daily tests judge."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from deploy.manifests import DEPLOY, EXAMPLE, STANDALONE, VALUES, Manifest, Pod, as_in_the_chart, load, named, valid
from deploy.tools import CHART, chart_rendered, installed, output

pytestmark = pytest.mark.skipif(
    "RELAY_TEST_DEPLOY" not in os.environ, reason="needs helm and kubectl: make test-deploy"
)


@pytest.fixture(scope="session")
def tools() -> Path:
    """Return the folder with helm and kubectl."""
    return installed()


@pytest.fixture(scope="session")
def rendered(tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Return the Deployment of Rocket.Chat itself, as the chart renders it with values.yaml."""
    if not CHART:
        pytest.skip(
            "NOT RENDERED: Rocket.Chat's chart was not given; make test-deploy CHART=path/to/helm-charts/rocketchat"
        )
    return chart_rendered(tools, Path(CHART), tmp_path_factory.mktemp("chart"))


def _kustomized(tools: Path, folder: Path) -> dict[str, Manifest]:
    return {f"{it['kind']} {it['metadata']['name']}": it for it in output(tools / "kubectl", "kustomize", folder)}


def test_chart_renders_what_is_valid(rendered: Manifest) -> None:
    # The chart itself writes `resources: null` and `nodeSelector: null`, which Kubernetes takes for absent.
    def without_nulls(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_nulls(item) for key, item in value.items() if item is not None}
        return [without_nulls(item) for item in value] if isinstance(value, list) else value

    assert valid(without_nulls(rendered))


def test_chart_puts_the_sidecar_where_the_daily_tests_have_it(rendered: Manifest, tmp_path: Path) -> None:
    pod, expected = (it["spec"]["template"]["spec"] for it in (rendered, as_in_the_chart()))
    assert pod["initContainers"] == expected["initContainers"]
    assert pod["securityContext"] == expected["securityContext"]
    assert [it for it in pod["volumes"] if it in expected["volumes"]] == expected["volumes"]
    container, model = (named(it["containers"], "rocketchat") for it in (pod, expected))
    assert [it for it in container["env"] if it in model["env"]] == model["env"]
    for key in ("ports", "volumeMounts"):
        assert container[key] == model[key]
    assert "terminationGracePeriodSeconds" not in pod, "the chart lets it be set now: values.yaml should"
    Pod(pod, [], tmp_path)


def test_page_names_the_charts_deployment(rendered: Manifest) -> None:
    named_ = re.findall(r"deployment[/ ]([a-z][\w-]+)", (DEPLOY / "README.md").read_text())
    assert set(named_) == {rendered["metadata"]["name"]}


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in DEPLOY.rglob("kustomization.yaml")), ids=lambda path: path.name
)
def test_kustomize_renders_what_is_valid(tools: Path, folder: Path) -> None:
    if load(folder / "kustomization.yaml")[0]["kind"] == "Component":
        return  # Rendered by the example.
    documents = _kustomized(tools, folder)
    assert documents
    for document in documents.values():
        valid(document)


def test_example_has_the_sidecar_with_its_own_kafka(tools: Path, tmp_path: Path) -> None:
    deployment = _kustomized(tools, EXAMPLE)["Deployment rocketchat"]
    assert deployment["metadata"]["namespace"] == "chat"
    spec = deployment["spec"]["template"]["spec"]
    pod = Pod(spec, [], tmp_path)
    [values] = load(VALUES)
    [expected] = values["extraInitContainers"]
    ours = {it["name"]: it for it in expected["env"]}
    theirs = {it["name"]: it for it in pod.relay["env"]}
    assert {name for name in ours if ours[name] != theirs[name]} == {"RELAY_KAFKA_BOOTSTRAP_SERVERS"}
    assert {**pod.relay, "env": 0} == {**expected, "env": 0}
    assert spec["volumes"] == values["extraVolumes"]
    container = named(spec["containers"], "rocketchat")
    assert [it for it in container["env"] if it in values["extraEnv"]] == values["extraEnv"]
    assert container["image"].startswith("registry.rocket.chat/")
    assert re.fullmatch(r"rocketchat-kafka-relay:[\d.]+", pod.relay["image"])


def test_standalone_is_rendered_as_it_stands(tools: Path) -> None:
    documents = _kustomized(tools, STANDALONE)
    for name in ("statefulset", "service", "poddisruptionbudget", "networkpolicy"):
        [written] = load(STANDALONE / f"{name}.yaml")
        assert documents[f"{written['kind']} relay"] == written
