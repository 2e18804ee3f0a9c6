"""What an operator runs with `kubectl exec` in a sidecar whose root file system is read-only, while the relay works."""

import json
import os
import random
from collections.abc import Callable
from typing import Any

import pytest
from acceptance.bodies import message, new_chat
from kafka_for_pods import TOPIC, KafkaForPods
from kafka_for_tests import set_topic_config
from kubernetes.cluster import Namespace
from kubernetes.conftest import Deploy
from kubernetes.ear import Ear
from relay_process import wait_until
from terminal import Terminal

pytestmark = pytest.mark.timeout(900)

NORMAL_SCREEN = b"\x1b[?1049l"


@pytest.fixture
def pod(namespace: Namespace, deploy_sidecar: Deploy, ear: Ear) -> str:
    """Return the name of a pod whose relay has published something and goes on doing so."""
    deploy_sidecar()
    ear.wait_for_answers(50)
    return str(namespace.pod("rocketchat")["metadata"]["name"])


@pytest.fixture
def relay(namespace: Namespace, pod: str) -> Callable[..., str]:
    """Return a function that runs a command of the relay's in the sidecar and returns what it prints."""

    def run(*command: str, given: str | None = None, code: int = 0) -> str:
        stdin = () if given is None else ("--stdin",)
        ran = namespace.tried("exec", *stdin, pod, "--container", "relay", "--", "relay", *command, given=given)
        assert ran.returncode == code, f"{ran.stdout}\n{ran.stderr}"
        return ran.stdout

    return run


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.removesuffix("\n").split("\n") if line]


def test_top_shows_the_relay(
    namespace: Namespace, pod: str, relay: Callable[..., str], judge_all: Callable[[], str]
) -> None:
    seen = json.loads(relay("top", "--once", "--json"))
    assert seen["kafka"]["connected"] is True
    assert seen["traffic"]["accepted"]["total"] >= 50
    assert seen["traffic"]["accepted"]["per_second"] > 0
    assert seen["traffic"]["published"]["per_second"] > 0
    assert relay("top", "--once").count("accepted") == 1

    command = namespace.command("exec", "--stdin", "--tty", pod, "--container", "relay", "--", "relay", "top")
    with Terminal(command, os.environ) as live:
        wait_until(lambda: live.shows("end to end"), "the screen", seconds=60)
        wait_until(lambda: live.shows("producer restarts"), "it is drawn again", seconds=60)
        live.press("\x03")
        wait_until(live.ended, "Ctrl-C ends it", seconds=60)
        live.read()
        assert live.process.returncode == 0, live.written
        assert NORMAL_SCREEN in live.written
    print(judge_all())


def test_spool_and_kafka_are_looked_at_through_an_outage(
    namespace: Namespace, kafka: KafkaForPods, pod: str, relay: Callable[..., str], judge_all: Callable[[], str]
) -> None:
    findings = json.loads(relay("check", "--json"))
    assert {it["ok"] for it in findings} == {True}, findings
    assert json_lines(relay("dead", "list", "--json")) == []

    kafka.kill()
    # Once it has noticed it goes on trying, and never says that it is connected.
    running = namespace.wait_for_relay(
        pod, lambda it: not it["kafka"]["connected"] and it["spool"]["events"] >= 50, "Kafka's absence noticed"
    )
    status = json.loads(relay("spool", "status", "--json"))
    assert status["identity"] == running["spool"]["identity"]
    assert status["events"] >= 50
    listed = json_lines(relay("spool", "list", "--json", "--limit", "5"))
    exported = json_lines(relay("spool", "export"))
    assert [it["sequence"] for it in listed] == [it["sequence"] for it in exported[:5]]
    assert len(exported) >= status["events"]
    assert all(json.loads(it["body"])["_id"] == it["key"] for it in exported)
    assert "FAIL" in relay("check", code=1)
    assert "NOT CONNECTED" in relay("top", "--once")

    kafka.start()
    namespace.wait_for_relay(pod, lambda status: status["spool"]["events"] < 50, "the spool on Kafka")
    print(judge_all())


def test_dead_event_is_looked_at_and_published_after_all(
    namespace: Namespace, kafka: KafkaForPods, pod: str, relay: Callable[..., str]
) -> None:
    set_topic_config(kafka.local.bootstrap_servers, TOPIC, "max.message.bytes", "100000")
    too_large = message(new_chat(), text=random.randbytes(100_000).hex())
    relay("send", "-", given=too_large.decode())
    namespace.wait_for_relay(pod, lambda status: status["spool"]["dead_events"] == 1, "a dead event")
    [dead] = json_lines(relay("dead", "list", "--json"))
    assert "MessageSizeTooLarge" in dead["error"]
    assert relay("dead", "show", "--body", str(dead["sequence"])).encode() == too_large
    assert f"topic {TOPIC}" in relay("check", code=1)

    set_topic_config(kafka.local.bootstrap_servers, TOPIC, "max.message.bytes", str(1 << 24 | 1 << 12))
    said = relay("dead", "requeue", "--all", "--wait", "60")
    assert said == f"{dead['sequence']}: published\n"
    assert json_lines(relay("dead", "list", "--json")) == []
