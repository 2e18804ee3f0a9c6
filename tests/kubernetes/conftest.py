"""Fixtures of the tests in a real Kubernetes, and what they need."""

import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.manifests import EXAMPLE, STANDALONE
from deploy.tools import installed
from kafka_for_pods import PASSWORD, KafkaForPods, kafka_for_pods
from kubernetes.cluster import Namespace, own_address
from kubernetes.ear import Ear
from kubernetes.overlays import image, patch_of, relay_at, write_kustomization
from relay_process import TOKEN, wait_until

from relay.dev.kafka_runtime import Runtime

Deploy = Callable[..., None]
_SUMMARY = pytest.StashKey[list[str]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave these tests out, unless they are asked for."""
    if "RELAY_TEST_KUBERNETES" not in os.environ:
        for item in items:
            if item.path.parent == Path(__file__).parent:
                item.add_marker(pytest.mark.skip("needs a cluster: make test-kubernetes"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which Kubernetes it was, and what it had to be given."""
    for line in terminalreporter.config.stash.get(_SUMMARY, []):
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Return a function that puts a line under the test run's results."""
    return request.config.stash.setdefault(_SUMMARY, []).append


@pytest.fixture(scope="session")
def kubectl(report: Callable[[str], None]) -> Path:
    """Return the program kubectl, once it has found the cluster."""
    if not os.environ.get("KUBECONFIG"):
        pytest.exit("KUBECONFIG must name the cluster to test in: its file's path", returncode=2)
    kubectl = installed() / "kubectl"
    answer = Namespace(kubectl, "default").tried("version", "--output", "yaml", "--request-timeout=20s")
    if answer.returncode:
        pytest.exit(f"the cluster of KUBECONFIG does not answer: {answer.stderr.strip()}", returncode=2)
    version = yaml.safe_load(answer.stdout)["serverVersion"]
    report(f"Kubernetes: {version['gitVersion']}, image {image()}")
    return kubectl


@pytest.fixture
def namespace(kubectl: Path, request: pytest.FixtureRequest) -> Iterator[Namespace]:
    """Yield a namespace of this test's own; what the pods came to is shown if the test failed."""
    name = re.sub("[^a-z0-9]+", "-", request.node.name.lower()).removeprefix("test-")[:48].strip("-")
    namespace = Namespace(kubectl, f"{name}-{uuid.uuid4().hex[:8]}")
    namespace.run("create", "namespace", namespace.name)
    yield namespace
    for what in (["get", "events"], ["describe", "pods"]):
        print(f"--- kubectl {' '.join(what)}\n{namespace.tried(*what).stdout[-8000:]}")
    namespace.run("delete", "pods", "--all", "--grace-period=1", "--wait=false")
    namespace.run("delete", "namespace", namespace.name, "--wait=false")


@pytest.fixture
def kafka(namespace: Namespace, tmp_path: Path, kafka_runtime: Runtime) -> Iterator[KafkaForPods]:
    """Yield a Kafka for this test alone, whose user, password and certificate are in the namespace as its Secrets."""
    with kafka_for_pods(own_address(namespace), tmp_path, kafka_runtime) as kafka:
        secret = ("create", "secret", "generic")
        namespace.run(*secret, "rocketchat-relay", f"--from-literal=token={TOKEN}", f"--from-literal=accepted={TOKEN}")
        namespace.run(*secret, "relay", f"--from-literal=password={PASSWORD}")
        namespace.run(*secret, "kafka-cluster-ca-cert", f"--from-file=ca.crt={kafka.ca_file}")
        namespace.run(*secret, "rocketchat", "--from-literal=mongo-uri=mongodb://nowhere")
        yield kafka


@pytest.fixture
def ear() -> Iterator[Ear]:
    """Yield what hears the stand-ins."""
    with Ear() as ear:
        yield ear


@pytest.fixture
def deploy_sidecar(namespace: Namespace, kafka: KafkaForPods, ear: Ear, tmp_path: Path) -> Deploy:
    """
    Return a function that deploys overlays/example with a stand-in for Rocket.Chat, and waits until it is ready.

    Its arguments are patched into the pods' spec, as a user would, and `replicas`.
    """

    def deploy(*, replicas: int = 1, **spec: Any) -> None:
        folder = tmp_path / "sidecar"
        folder.mkdir()
        shutil.copy(Path(__file__).parent / "rocketchat.py", folder)
        stand_in = {
            "name": "rocketchat",
            "command": ["python3", "/stand-in/rocketchat.py"],
            "env": [{"name": "TEST_LISTENS_AT", "value": f"{own_address(namespace)}:{ear.port}"}],
            "volumeMounts": [{"name": "stand-in", "mountPath": "/stand-in"}],
        }
        ours = {
            "initContainers": [relay_at(kafka)],
            "containers": [stand_in],
            "volumes": [{"name": "stand-in", "configMap": {"name": "stand-in"}}],
        }
        write_kustomization(
            folder,
            namespace,
            EXAMPLE,
            configMapGenerator=[{"name": "stand-in", "files": ["rocketchat.py"]}],
            patches=[patch_of("Deployment", "rocketchat", replicas, it) for it in (ours, spec)],
        )
        namespace.run("apply", "--kustomize", folder)
        namespace.wait_for_rollout("deployment/rocketchat")

    return deploy


@pytest.fixture
def deploy_standalone(namespace: Namespace, kafka: KafkaForPods, tmp_path: Path) -> Deploy:
    """Return a function that deploys kustomize/standalone, and waits until it is ready."""

    def deploy() -> None:
        folder = tmp_path / "standalone"
        folder.mkdir()
        spec = {"containers": [relay_at(kafka)]}
        write_kustomization(folder, namespace, STANDALONE, patches=[patch_of("StatefulSet", "relay", 2, spec)])
        namespace.run("apply", "--kustomize", folder)
        namespace.wait_for_rollout("statefulset/relay")

    return deploy


@pytest.fixture
def judge_all(namespace: Namespace, kafka: KafkaForPods, ear: Ear) -> Callable[[], str]:
    """
    Return a function that ends the Deployment, and fails unless all that it sent is on Kafka as it should.

    It returns how much that was.
    """

    def verdict() -> str:
        namespace.run("scale", "--replicas=0", "deployment/rocketchat")
        namespace.run("wait", "--for=delete", "pods", "--selector=app.kubernetes.io/name=rocketchat", "--timeout=120s")
        pods = {it["pod"] for it in ear.told}
        wait_until(lambda: {it["pod"] for it in ear.all("ends")} == pods, "every stand-in's end")
        assert not [failure for it in ear.all("ends") for failure in it["failures"]]
        return kafka.judge(*ear.sent.values())

    return verdict
