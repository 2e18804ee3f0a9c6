"""The relay beside a stand-in for Rocket.Chat: overlays/example as it stands, but for the image and Kafka's address."""

import time
from collections.abc import Callable

import pytest
from deploy.manifests import SIDECAR, Manifest, load, relay_of
from kafka_for_pods import KafkaForPods
from kubernetes.cluster import Namespace, container, ready, when
from kubernetes.conftest import Deploy
from kubernetes.ear import Ear
from relay_process import wait_until

pytestmark = pytest.mark.timeout(900)

APP = "rocketchat"
[_POD] = [it["spec"]["template"]["spec"] for it in load(SIDECAR)]
GRACE_SECONDS: int = _POD["terminationGracePeriodSeconds"]
#: By then a probe that asks for Kafka has failed as often as its container's life or the pod's readiness allows.
PROBED_SECONDS: int = max(
    it["periodSeconds"] * (it["failureThreshold"] + 1)
    for it in (relay_of(_POD)["readinessProbe"], relay_of(_POD)["livenessProbe"])
)


def keep_when_deleted(namespace: Namespace, pod: str) -> None:
    """Has the cluster keep a pod's object until `let_go`, so that its end can be looked at."""
    namespace.run("patch", "pod", pod, "--type=merge", "--patch", '{"metadata": {"finalizers": ["example.com/test"]}}')


def let_go(namespace: Namespace, pod: str) -> None:
    namespace.run("patch", "pod", pod, "--type=merge", "--patch", '{"metadata": {"finalizers": null}}')


def deadline_of(namespace: Namespace, pod: str) -> float:
    """When a deleted pod has had its grace period. To be read early: when its containers end it is set anew."""
    wait_until(lambda: "deletionTimestamp" in namespace.get("pod", pod)["metadata"], "the deletion", pause=0.2)
    return when(namespace.get("pod", pod)["metadata"]["deletionTimestamp"])


def wait_for_the_end(namespace: Namespace, pod: str) -> Manifest:
    """A deleted pod's object, once its containers have ended."""
    found: list[Manifest] = []

    def ended() -> bool:
        found[:] = [namespace.get("pod", pod)]
        return all("terminated" in container(found[0], name)["state"] for name in (APP, "relay"))

    wait_until(ended, f"the end of {pod}", seconds=2 * GRACE_SECONDS, pause=0.5)
    return found[0]


def test_rocketchat_starts_once_the_relay_listens(
    namespace: Namespace, deploy_sidecar: Deploy, ear: Ear, judge_all: Callable[[], str]
) -> None:
    # Otherwise the relay is there so soon that its container's start alone might do.
    seconds = 8
    deploy_sidecar(initContainers=[{"name": "relay", "startupProbe": {"initialDelaySeconds": seconds}}])
    pod = namespace.pod(APP)
    relay, rocketchat = (container(pod, name)["state"]["running"]["startedAt"] for name in ("relay", APP))
    assert when(rocketchat) - when(relay) >= seconds - 1
    assert ready(pod)[0]
    ear.wait_for_answers(50)
    assert set(ear.statuses()) == {200}, "the first event, in its first moment, was not taken at once"
    print(judge_all())


def test_pod_stays_ready_while_kafka_is_away(
    namespace: Namespace, kafka: KafkaForPods, deploy_sidecar: Deploy, ear: Ear, judge_all: Callable[[], str]
) -> None:
    deploy_sidecar()
    before = namespace.pod(APP)
    name = before["metadata"]["name"]
    ear.wait_for_answers(50)
    kafka.kill()
    namespace.wait_for_relay(name, lambda status: not status["kafka"]["connected"], "Kafka's absence noticed")
    deadline = time.monotonic() + PROBED_SECONDS
    while time.monotonic() < deadline:
        now = namespace.pod(APP)
        assert ready(now) == ready(before)
        assert {container(now, it)["restartCount"] for it in (APP, "relay")} == {0}
        ear.wait_for_answers(50)
    assert namespace.relay_status(name)["spool"]["events"] > 50
    assert set(ear.statuses()) == {200}
    kafka.start()
    namespace.wait_for_relay(name, lambda status: status["spool"]["events"] < 50, "the spool on Kafka")
    print(judge_all())


def test_relay_killed_under_load_goes_on_with_its_spool(
    namespace: Namespace, kafka: KafkaForPods, deploy_sidecar: Deploy, ear: Ear, judge_all: Callable[[], str]
) -> None:
    # Nothing within a container can SIGKILL its first process; with a shared process namespace the relay is not that.
    deploy_sidecar(shareProcessNamespace=True)
    name = namespace.pod(APP)["metadata"]["name"]
    identity = namespace.relay_status(name)["spool"]["identity"]

    def killed_and_back(times: int) -> Manifest:
        namespace.kill_relay(name)

        def back() -> bool:
            pod = namespace.pod(APP)
            return container(pod, "relay")["restartCount"] == times and ready(pod)[0]

        wait_until(back, "the relay is restarted, and its pod ready", seconds=120, pause=0.5)
        return container(namespace.pod(APP), "relay")

    ear.wait_for_answers(200)
    assert killed_and_back(1)["lastState"]["terminated"]["exitCode"] == 137
    ear.wait_for_answers(200)

    kafka.kill()
    namespace.wait_for_relay(name, lambda status: status["spool"]["events"] >= 200, "a spool with events in it")
    waiting = namespace.relay_status(name)["spool"]["events"]
    killed_and_back(2)
    spool = namespace.relay_status(name)["spool"]
    assert spool["identity"] == identity
    assert spool["events"] >= waiting
    assert container(namespace.pod(APP), APP)["restartCount"] == 0
    kafka.start()
    # Rocket.Chat's retries are due: what met a relay that was down is delivered by them.
    wait_until(
        lambda: sum(it["number"] > 1 and it["status"] == 200 for it in ear.all("tried")) > 0, "a retry", seconds=60
    )
    ear.wait_for_answers(200)
    print(judge_all())
    assert all(it["delivered"] for it in ear.all("sent"))


def test_deleted_pod_lets_rocketchat_speak_then_drains(
    namespace: Namespace, kafka: KafkaForPods, deploy_sidecar: Deploy, ear: Ear, judge_all: Callable[[], str]
) -> None:
    deploy_sidecar()
    pod = namespace.pod(APP)["metadata"]["name"]
    keep_when_deleted(namespace, pod)
    ear.wait_for_answers(100)
    # Still away when Rocket.Chat has stopped: so all that it said last is in the spool, whose volume goes with the pod.
    kafka.kill()
    ear.wait_for_answers(100)
    waiting = namespace.relay_status(pod)["spool"]["events"]
    assert waiting >= 100
    # The Deployment's next pod has a spool of its own.
    namespace.run("scale", "--replicas=0", "deployment/rocketchat")
    deadline = deadline_of(namespace, pod)
    wait_until(lambda: bool(ear.all("ends")), "the end of Rocket.Chat", seconds=GRACE_SECONDS)
    last_words = ear.statuses(stopping=True)
    assert len(last_words) > 50
    assert set(last_words) == {200}
    kafka.start()
    ended = wait_for_the_end(namespace, pod)
    states = {name: container(ended, name)["state"]["terminated"] for name in (APP, "relay")}
    let_go(namespace, pod)
    assert {name: state["exitCode"] for name, state in states.items()} == {APP: 0, "relay": 0}
    assert when(states["relay"]["finishedAt"]) >= when(states[APP]["finishedAt"])
    assert when(states["relay"]["finishedAt"]) < deadline
    print(judge_all())


def test_deleted_pod_leaves_in_time_though_kafka_is_away(
    namespace: Namespace, kafka: KafkaForPods, deploy_sidecar: Deploy, ear: Ear
) -> None:
    deploy_sidecar()
    pod = namespace.pod(APP)["metadata"]["name"]
    keep_when_deleted(namespace, pod)
    kafka.kill()
    ear.wait_for_answers(50)
    namespace.run("scale", "--replicas=0", "deployment/rocketchat")
    deadline = deadline_of(namespace, pod)
    ended = wait_for_the_end(namespace, pod)
    relay, rocketchat = (container(ended, name)["state"]["terminated"] for name in ("relay", APP))
    let_go(namespace, pod)
    assert relay["exitCode"] == 0
    assert when(relay["finishedAt"]) < deadline
    # It did wait for Kafka: as long as the manifest says.
    drained = when(relay["finishedAt"]) - when(rocketchat["finishedAt"])
    assert drained >= 20 - 1


def test_rolling_update_under_load_loses_nothing(
    namespace: Namespace, deploy_sidecar: Deploy, ear: Ear, judge_all: Callable[[], str]
) -> None:
    deploy_sidecar(replicas=2)
    ear.wait_for_answers(200)
    before = {pod["metadata"]["name"] for pod in namespace.pods(APP)}
    namespace.run("rollout", "restart", "deployment/rocketchat")
    namespace.wait_for_rollout("deployment/rocketchat")
    ear.wait_for_answers(200)
    assert not before & {pod["metadata"]["name"] for pod in namespace.pods(APP)}
    print(judge_all())
    assert set(ear.statuses()) == {200}, "no delivery had to be repeated"
