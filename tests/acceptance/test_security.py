"""Every way to be let in by a real Kafka, what is said when it refuses, and secrets that change meanwhile."""

import base64
import json
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from acceptance.bodies import message, new_chat
from acceptance.conftest import MakeRelay
from acceptance.http_client import post
from acceptance.secured import faults, make_topics, relay_on, ways_in
from acceptance.senders import Senders
from oracle import Sent
from relay_process import run_relay, wait_until
from secured_kafka import PASSWORD, USER, SecuredKafka, unsecured_jwt


@pytest.fixture
def topics(secured: SecuredKafka, topic_name: str) -> str:
    """Return the name that the test's topics begin with; they are made, and the user relay may use them."""
    return make_topics(secured, topic_name, USER)


@pytest.mark.parametrize("way", ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER", "mTLS"])
def test_each_way_in_connects_publishes_and_satisfies_the_check(
    secured: SecuredKafka, make_relay: MakeRelay, topics: str, way: str
) -> None:
    if way.startswith("SCRAM"):
        secured.add_user(USER, PASSWORD, way)
    relay = relay_on(make_relay, secured, topics, ways_in(secured)[way]).start(connected=True)
    sent = [Sent(message(new_chat()))]
    assert post(relay.port, sent[0].body).status == 200
    relay.wait_until_drained()

    checked = run_relay(relay.directory, "check", settings=relay.settings)

    assert (checked.returncode, "FAIL" in checked.stdout) == (0, False), checked.stdout
    assert not faults(secured, relay, sent)


# --- What is said when Kafka refuses, or is refused. ---


def wrong(secured: SecuredKafka, fault: str) -> tuple[str, dict[str, str]]:
    """The way in that has the fault, and the settings that make it."""
    ports = secured.ports
    return {
        "password": ("PLAIN", {"RELAY_KAFKA_SASL_PASSWORD": "not the password"}),
        "scram password": ("SCRAM-SHA-512", {"RELAY_KAFKA_SASL_PASSWORD": "not the password"}),
        "token": ("OAUTHBEARER", {"RELAY_KAFKA_SASL_PASSWORD": unsecured_jwt(USER, seconds=-60)}),
        "protocol": ("PLAIN", {"RELAY_KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT"}),
        "no login": ("PLAIN", {"RELAY_KAFKA_SECURITY_PROTOCOL": "SSL"}),
        "no TLS": ("PLAIN", {"RELAY_KAFKA_BOOTSTRAP_SERVERS": secured.bootstrap_servers}),
        "authority": ("PLAIN", {"RELAY_KAFKA_SSL_CAFILE": str(secured.other_cafile)}),
        "system's authorities": ("PLAIN", {"RELAY_KAFKA_SSL_CAFILE": ""}),
        "expired": ("mTLS", {"RELAY_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{ports['EXPIRED']}"}),
        "host name": ("PLAIN", {"RELAY_KAFKA_BOOTSTRAP_SERVERS": f"localhost:{ports['SASL_SSL']}"}),
        "no certificate": ("mTLS", {"RELAY_KAFKA_SSL_CERTFILE": "", "RELAY_KAFKA_SSL_KEYFILE": ""}),
        "own certificate expired": ("mTLS", dict(secured.certificate(USER, expired=True))),
        "certificate's file": ("mTLS", {"RELAY_KAFKA_SSL_KEYFILE": str(secured.cafile)}),
    }[fault]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("password", ("denied", "RELAY_KAFKA_SASL_PASSWORD")),
        ("scram password", ("denied", "RELAY_KAFKA_SASL_PASSWORD")),
        ("token", ("denied", "RELAY_KAFKA_SASL_PASSWORD")),
        ("protocol", ("unreachable", "RELAY_KAFKA_SECURITY_PROTOCOL")),
        ("no login", ("unreachable", "RELAY_KAFKA_SECURITY_PROTOCOL")),
        ("no TLS", ("unreachable", "RELAY_KAFKA_SECURITY_PROTOCOL")),
        ("authority", ("denied", "RELAY_KAFKA_SSL_CAFILE")),
        ("system's authorities", ("denied", "RELAY_KAFKA_SSL_CAFILE")),
        ("expired", ("denied", "expired")),
        ("host name", ("denied", "RELAY_KAFKA_BOOTSTRAP_SERVERS")),
        ("no certificate", ("denied", "RELAY_KAFKA_SSL_CERTFILE")),
        ("own certificate expired", ("denied", "RELAY_KAFKA_SSL_CERTFILE")),
        ("certificate's file", ("denied", "RELAY_KAFKA_SSL_CAFILE, _CERTFILE, _KEYFILE")),
    ],
)
def test_who_is_not_let_in_is_told_which_setting_to_change_and_keeps_everything(
    secured: SecuredKafka, make_relay: MakeRelay, topics: str, fault: str, expected: tuple[str, str]
) -> None:
    error, told = expected
    way, settings = wrong(secured, fault)
    right = ways_in(secured)[way]
    relay = relay_on(make_relay, secured, topics, {**right, **settings, "RELAY_DRAIN_SECONDS": "0"}).start()
    sent = [Sent(message(new_chat()))]
    assert post(relay.port, sent[0].body).status == 200

    lost = relay.wait_for("kafka_lost")

    assert (lost["error"], told in lost["message"]) == (error, True), lost
    kafka = relay.status()["kafka"]
    assert (kafka["connected"], told in kafka["error"]) == (False, True), kafka
    wait_until(lambda: relay.metrics()[f'relay_publish_errors_total{{error="{error}"}}'] > 0, "it is counted")
    checked = run_relay(relay.directory, "check", settings=relay.settings)
    (failure,) = [line for line in checked.stdout.splitlines() if line.startswith("FAIL")]
    assert (checked.returncode, told in failure) == (1, True), checked.stdout
    assert not [secret for secret in (PASSWORD, "not the password", "eyJ") if secret in relay.log_text() + failure]
    assert relay.stop() == 0
    if way.startswith("SCRAM"):
        secured.add_user(USER, PASSWORD, way)
    relay.settings |= right
    relay.start()
    relay.wait_until_drained()
    assert not faults(secured, relay, sent)


# --- Secrets that change, and sessions that end. ---


def test_a_session_that_the_broker_ends_is_begun_anew_with_the_token_of_now(
    secured: SecuredKafka, make_relay: MakeRelay, topics: str, tmp_path: Path
) -> None:
    # KIP-368: no session outlives its token, and the client cannot log in anew within one.
    seconds = 20
    token = tmp_path / "token"
    token.write_text(unsecured_jwt(USER, seconds=seconds))
    settings = {**ways_in(secured)["OAUTHBEARER"], "RELAY_KAFKA_SASL_PASSWORD": ""}
    relay = relay_on(make_relay, secured, topics, {**settings, "RELAY_KAFKA_SASL_PASSWORD_FILE": str(token)})
    expired_at = time.monotonic() + seconds + 1
    relay.start(connected=True)
    token.write_text(unsecured_jwt(USER))

    with Senders(relay.url, chats=4, rate=50) as senders:
        while time.monotonic() < expired_at:
            senders.wait_for_answers(10)
        senders.wait_for_answers(100)
    relay.wait_until_drained()

    assert set(senders.tries) == {200}
    assert relay.metrics()["relay_producer_restarts_total"] == 0
    assert not relay.log("kafka_lost")
    assert not faults(secured, relay, senders.sent)


def test_a_password_that_changes_is_taken_without_a_restart(
    secured: SecuredKafka, make_relay: MakeRelay, topics: str, tmp_path: Path
) -> None:
    way = "SCRAM-SHA-256"  # Whose sessions the broker ends after two seconds.
    secured.add_user(USER, PASSWORD, way)
    file = tmp_path / "password"
    file.write_text(PASSWORD)
    settings = {**ways_in(secured)[way], "RELAY_KAFKA_SASL_PASSWORD": "", "RELAY_KAFKA_SASL_PASSWORD_FILE": str(file)}
    relay = relay_on(make_relay, secured, topics, settings).start(connected=True)

    with Senders(relay.url, chats=4, rate=50) as senders:
        senders.wait_for_answers(50)
        secured.add_user(USER, "another password", way)
        assert "RELAY_KAFKA_SASL_PASSWORD" in relay.wait_for("kafka_lost", seconds=60)["message"]
        file.write_text("another password\n")
        wait_until(lambda: len(relay.log("kafka_connected")) == 2, "it is let in again", seconds=60)
        senders.wait_for_answers(50)
    relay.wait_until_drained()

    assert set(senders.tries) == {200}
    assert not [secret for secret in (PASSWORD, "another password") if secret in relay.log_text()]
    assert not faults(secured, relay, senders.sent)


class TokenEndpoint(BaseHTTPRequestHandler):
    """Gives tokens that live as long as a session does."""

    shown: ClassVar[list[str | None]] = []

    def do_POST(self) -> None:
        """Answers."""
        self.shown.append(self.headers["Authorization"])
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = json.dumps({"access_token": unsecured_jwt(USER, seconds=3), "expires_in": 3}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def token_url(secured: SecuredKafka) -> Iterator[str]:
    """Yield the URL of a token endpoint whose certificate is of Kafka's authority."""
    with ThreadingHTTPServer(("127.0.0.1", 0), TokenEndpoint) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        secured.authority.issue_cert("127.0.0.1").configure_cert(context)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}/token"
        server.shutdown()
        thread.join()


def test_tokens_of_an_endpoint_are_renewed_before_they_expire(
    secured: SecuredKafka, make_relay: MakeRelay, topics: str, token_url: str
) -> None:
    client = {
        "RELAY_KAFKA_SASL_TOKEN_URL": token_url,
        "RELAY_KAFKA_SASL_USERNAME": "relay",
        "RELAY_KAFKA_SASL_PASSWORD": "sesame",
    }
    relay = relay_on(make_relay, secured, topics, {**ways_in(secured)["OAUTHBEARER"], **client}).start(connected=True)
    asked = len(TokenEndpoint.shown)

    with Senders(relay.url, chats=4, rate=50) as senders:
        while len(TokenEndpoint.shown) < asked + 3:
            senders.wait_for_answers(10)
    relay.wait_until_drained()

    assert set(senders.tries) == {200}
    assert set(TokenEndpoint.shown) == {f"Basic {base64.b64encode(b'relay:sesame').decode()}"}
    assert not faults(secured, relay, senders.sent)
