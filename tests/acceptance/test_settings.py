"""Settings that are wrong, a topic that is missing, secrets: each is told, or kept, as it should be."""

import socket
import threading
from collections.abc import Iterator

import pytest
from acceptance.bodies import message, new_chat
from acceptance.conftest import MakeRelay
from acceptance.http_client import post
from kafka_for_tests import FoundKafka
from oracle import Sent, judge, read_topics
from relay_process import TOKEN, run_relay, wait_until

PASSWORD = "a-password-for-tests-4711"


@pytest.mark.parametrize("command", [("serve",), ("config",), ("check",)])
def test_wrong_settings_are_named_all_at_once(
    kafka: FoundKafka, make_relay: MakeRelay, command: tuple[str, ...]
) -> None:
    wrong = {
        "RELAY_HTTP_PORT": "70000",
        "RELAY_ACK": "never",
        "RELAY_SPOOL_MAX_BYTES": "much",
        "RELAY_DRAIN_SECONDS": "-1",
        "RELAY_TOPIC": "no topic",
        "RELAY_TOPIC_CRAETE": "true",
        "RELAY_TOKEN_FILE": "nowhere",
    }
    relay = make_relay(kafka, **wrong)

    ended = run_relay(relay.directory, *command, settings=relay.settings)

    lines = ended.stderr.splitlines()
    assert ended.returncode == 2
    assert len(lines) == len(wrong)
    for name in wrong:
        assert any(name in line for line in lines), name
    assert "Traceback" not in ended.stderr
    assert TOKEN not in ended.stderr
    assert not relay.spool_path.exists()


def test_no_token_at_all_must_be_asked_for(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka, RELAY_TOKEN="")

    ended = run_relay(relay.directory, "serve", settings=relay.settings)

    assert ended.returncode == 2
    assert "RELAY_TOKEN" in ended.stderr
    assert "RELAY_ALLOW_UNAUTHENTICATED" in ended.stderr

    relay.settings["RELAY_ALLOW_UNAUTHENTICATED"] = "true"
    relay.start()
    assert post(relay.port, message(new_chat()), token=None).status == 200


def test_a_port_that_is_taken_is_named(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        relay = make_relay(kafka, RELAY_HTTP_PORT=str(port))

        ended = run_relay(relay.directory, "serve", settings=relay.settings)

    assert ended.returncode == 1
    assert str(port) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_free_port_is_taken_and_logged_for_0(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka, RELAY_HTTP_PORT="0", RELAY_ADMIN_PORT="0").start()

    webhook, admin = relay.wait_for("serving")["ports"]

    assert post(webhook, message(new_chat())).status == 200
    relay.admin_port = admin
    assert relay.admin("/healthz")[0] == 200


@pytest.mark.parametrize("missing", ["RELAY_TOPIC", "RELAY_DEAD_LETTER_TOPIC", "RELAY_WATERMARK_TOPIC"])
def test_a_missing_topic_is_named_and_events_wait_for_it(
    kafka: FoundKafka, make_relay: MakeRelay, missing: str
) -> None:
    relay = make_relay(kafka, RELAY_TOPIC_CREATE="false")
    names = [relay.settings[name] for name in ("RELAY_TOPIC", "RELAY_DEAD_LETTER_TOPIC", "RELAY_WATERMARK_TOPIC")]
    topic = relay.settings[missing]
    kafka.create_topics(*(name for name in names if name != topic))
    relay.start()
    body = message(new_chat())
    assert post(relay.port, body).status == 200

    lost = relay.wait_for("kafka_lost")

    assert lost["error"] == "topic_missing"
    assert f"topic {topic}." in lost["message"]
    status = relay.status()
    assert f"topic {topic}." in status["kafka"]["error"]
    assert status["spool"]["events"] == 1
    assert relay.admin("/readyz")[0] == 200
    wait_until(lambda: relay.metrics()['relay_publish_errors_total{error="topic_missing"}'] > 0, "it is counted")

    kafka.create_topics(topic)

    relay.wait_until_drained()
    there = read_topics(kafka.bootstrap_servers, relay.settings["RELAY_TOPIC"])
    assert not judge([Sent(body)], there, topic=relay.settings["RELAY_TOPIC"]).faults


def test_no_secret_and_no_body_is_ever_logged(make_relay: MakeRelay, hanging_up: str) -> None:
    relay = make_relay(
        FoundKafka(hanging_up, "no Kafka"),
        RELAY_LOG_LEVEL="debug",
        RELAY_DRAIN_SECONDS="0",
        RELAY_KAFKA_SECURITY_PROTOCOL="SASL_PLAINTEXT",
        RELAY_KAFKA_SASL_USERNAME="someone",
        RELAY_KAFKA_SASL_PASSWORD=PASSWORD,
    ).start()
    text = "a text of a visitor's"
    post(relay.port, message(new_chat(), text=text))
    post(relay.port, message(new_chat(), text=text)[:-1])
    post(relay.port, message(new_chat(), text=text), token="another-token")
    post(relay.port, message(new_chat(), text=text).replace(b'"_id"', b'"id"'))
    post(relay.port, message(new_chat(), text=text), path=f"/other/{TOKEN}")
    relay.wait_for("kafka_lost")
    relay.admin("/status")

    assert relay.stop() == 0

    log = relay.log_text()
    assert not [secret for secret in (TOKEN, PASSWORD, "another-token", text, "visitor-token") if secret in log]


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_config_shows_the_settings_in_force_with_secrets_masked(
    kafka: FoundKafka, make_relay: MakeRelay, arguments: tuple[str, ...]
) -> None:
    relay = make_relay(kafka, RELAY_KAFKA_SASL_PASSWORD=PASSWORD)

    shown = run_relay(relay.directory, "config", *arguments, settings=relay.settings)

    assert shown.returncode == 0
    assert relay.settings["RELAY_TOPIC"] in shown.stdout
    assert "RELAY_MAX_BODY_BYTES" in shown.stdout
    assert "RELAY_KAFKA_SASL_PASSWORD" in shown.stdout
    assert PASSWORD not in shown.stdout + shown.stderr
    assert TOKEN not in shown.stdout + shown.stderr


def test_check_finds_a_missing_topic_and_then_nothing(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka, RELAY_TOPIC_CREATE="false")

    before = run_relay(relay.directory, "check", settings=relay.settings)

    assert before.returncode == 1
    assert f"FAIL topic {relay.settings['RELAY_TOPIC']}" in before.stdout
    relay.settings["RELAY_TOPIC_CREATE"] = "true"
    relay.start(connected=True)
    after = run_relay(relay.directory, "check", settings={**relay.settings, "RELAY_TOPIC_CREATE": "false"})
    assert (after.returncode, "FAIL" in after.stdout) == (0, False), after.stdout


@pytest.fixture
def hanging_up() -> Iterator[str]:
    """Yield the address of a server that closes every connection once something came."""

    def serve() -> None:
        while True:
            try:
                accepted, _ = server.accept()
            except OSError:
                return
            with accepted:
                accepted.recv(100)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
    thread.join()
