"""The relay as a StatefulSet: kustomize/standalone as it stands, but for the image and Kafka's address."""

import json

import pytest
from acceptance.senders import Senders
from kafka_for_pods import KafkaForPods
from kubernetes.cluster import Namespace
from kubernetes.conftest import Deploy
from oracle import Sent
from relay_process import wait_until

pytestmark = pytest.mark.timeout(900)

PODS = ("relay-0", "relay-1")


def evict(namespace: Namespace, pod: str) -> int:
    """Evicts a pod as `kubectl drain` does; 0, or 1 if the cluster refuses that for now."""
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": pod, "namespace": namespace.name},
    }
    path = f"/api/v1/namespaces/{namespace.name}/pods/{pod}/eviction"
    return namespace.tried("create", "--raw", path, "--filename", "-", given=json.dumps(eviction)).returncode


def send(namespace: Namespace, pod: str, events: int) -> list[Sent]:
    """What a Rocket.Chat sent to one replica, at least so many events of it answered 200."""
    with namespace.forwarded(f"pod/{pod}", "relay-webhook") as port:
        with Senders(f"http://127.0.0.1:{port}/rocketchat", chats=4, rate=20) as senders:
            senders.wait_for_answers(events)
        return senders.sent


def test_spool_outlives_its_pod(namespace: Namespace, kafka: KafkaForPods, deploy_standalone: Deploy) -> None:
    deploy_standalone()
    sent = {pod: send(namespace, pod, 20) for pod in PODS}
    kafka.kill()
    for pod in PODS:
        sent[pod] += send(namespace, pod, 50)

    def spools() -> dict[str, tuple[str, int]]:
        told = {pod: namespace.relay_status(pod)["spool"] for pod in PODS}
        return {pod: (spool["identity"], spool["events"]) for pod, spool in told.items()}

    def uids() -> dict[str, str]:
        return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in namespace.pods("relay")}

    before = spools()
    assert min(events for _, events in before.values()) >= 50
    assert len({identity for identity, _ in before.values()}) == 2

    # A node is drained: one replica at a time.
    first = uids()["relay-0"]
    assert evict(namespace, "relay-0") == 0
    assert evict(namespace, "relay-1") != 0, "the PodDisruptionBudget lets both go"
    wait_until(lambda: uids().get("relay-0", first) != first, "the next relay-0", seconds=120, pause=0.5)
    namespace.wait_for_rollout("statefulset/relay")
    assert spools() == before

    namespace.run("rollout", "restart", "statefulset/relay")
    namespace.wait_for_rollout("statefulset/relay")
    assert spools() == before

    kafka.start()
    for pod in PODS:
        namespace.wait_for_relay(pod, lambda status: not status["spool"]["events"], f"{pod}'s spool on Kafka")
    print(kafka.judge(*sent.values()))


def test_service_leads_to_both_replicas(namespace: Namespace, deploy_standalone: Deploy) -> None:
    deploy_standalone()
    slices = namespace.get("endpointslices", "--selector=kubernetes.io/service-name=relay")["items"]
    found = {
        (endpoint["targetRef"]["name"], port["name"], port["port"])
        for it in slices
        for endpoint in it["endpoints"]
        for port in it["ports"]
        if endpoint["conditions"]["ready"]
    }
    assert found == {(pod, "relay-webhook", 8080) for pod in PODS}
