"""The webhook port's answers, to the byte, and the admin port's."""

import json
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance.bodies import message, new_chat
from acceptance.conftest import MakeRelay
from acceptance.http_client import Answer, connection, head, post, read_all, read_answer
from kafka_for_tests import FoundKafka
from oracle import Landed, read_topics
from relay_process import TOKEN, RelayProcess

LIMIT = 100_000
# Self-signed, for this test only: `openssl req -x509 -newkey ec -nodes -subj /CN=relay`.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBkjCCATmgAwIBAgIUBzVpCieahe396BygPxlTERo/vc8wCgYIKoZIzj0EAwIw
EDEOMAwGA1UEAwwFcmVsYXkwIBcNMjYxMTIyMTg0NDQ4WhgPMjEyNjEwMjkxODQ0
NDhaMBAxDjAMBgNVBAMMBXJlbGF5MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE
ymjZDVAunk04zX41u68wmzSZXxIHtgCy1gRxlUqhWtRmqN0Bk++FJaJHcaavW52J
cIjZig7qKJ6fnVbbBYTqmaNvMG0wHQYDVR0OBBYEFKhEwGO0mLBiq3u8elj8UHWd
xQJDMB8GA1UdIwQYMBaAFKhEwGO0mLBiq3u8elj8UHWdxQJDMA8GA1UdEwEB/wQF
MAMBAf8wGgYDVR0RBBMwEYIJbG9jYWxob3N0hwR/AAABMAoGCCqGSM49BAMCA0cA
MEQCIEmKPBQR3SKorn8bZLKbQyGLuhYsKtwO2mlof4vKbM6cAiBLau/FrtXeXoIH
BxBr6citfsxg+4G547Uv6Mgj1WhNXA==
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgzTn3BrTZNa+GbxPm
WrrOvuoq3lQFE/slUyb99dTBp3OhRANCAATKaNkNUC6eTTjNfjW7rzCbNJlfEge2
ALLWBHGVSqFa1Gao3QGT74Ulokdxpq9bnYlwiNmKDuoonp+dVtsFhOqZ
-----END PRIVATE KEY-----
"""


@pytest.fixture(scope="module")
def relay(kafka: FoundKafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """Yield a relay that takes bodies of 100,000 bytes at most."""
    name = f"http-{new_chat()}"
    settings = {
        "RELAY_TOPIC": name,
        "RELAY_DEAD_LETTER_TOPIC": f"{name}.dead-letter",
        "RELAY_WATERMARK_TOPIC": f"{name}.watermarks",
        "RELAY_TOPIC_CREATE": "true",
        "RELAY_MAX_BODY_BYTES": str(LIMIT),
    }
    running = RelayProcess(tmp_path_factory.mktemp("relay"), kafka.bootstrap_servers, settings)
    yield running.start()
    text = running.log_text()
    running.close()
    assert "handler_failed" not in text
    assert TOKEN not in text
    assert "visitor-token" not in text


def of_chat(kafka: FoundKafka, relay: RelayProcess, chat: str) -> list[Landed]:
    relay.wait_until_drained()
    there = read_topics(kafka.bootstrap_servers, relay.settings["RELAY_TOPIC"])
    return [record for record in there if record.key == chat.encode()]


def is_problem(answer: Answer, status: int) -> bool:
    problem = json.loads(answer.body)
    kept_back = TOKEN.encode() not in answer.body and b"visitor-token" not in answer.body
    content_type = answer.headers["content-type"].partition(";")[0]
    return kept_back and (answer.status, problem["status"], content_type) == (
        status,
        status,
        "application/problem+json",
    )


# --- Success ---


@pytest.mark.parametrize("path", ["/rocketchat", "/rocketchat/default"])
def test_success_is_200_with_no_body_and_nothing_after_it(relay: RelayProcess, path: str) -> None:
    answer = post(relay.port, message(new_chat()), path=path)

    assert (answer.status, answer.headers["content-length"], answer.body, answer.rest) == (200, "0", b"", b"")


def test_head_and_empty_body_come_in_one_segment(relay: RelayProcess) -> None:
    body = message(new_chat())
    with connection(relay.port) as open_:
        open_.sendall(head(headers={"Content-Length": len(body)}) + body)

        assert open_.recv(65536).endswith(b"\r\n\r\n")
        assert open_.recv(65536) == b""


def test_a_connection_may_carry_many_events(kafka: FoundKafka, relay: RelayProcess) -> None:
    chat = new_chat()
    bodies = [message(chat, number) for number in range(20)]
    with connection(relay.port) as open_:
        for body in bodies:
            open_.sendall(head(headers={"Content-Length": len(body)}, close=False) + body)
            assert read_answer(open_).status == 200

    assert [record.value for record in of_chat(kafka, relay, chat)] == bodies


def test_requests_sent_without_waiting_for_answers_are_answered_and_published_in_order(
    kafka: FoundKafka, relay: RelayProcess
) -> None:
    chat = new_chat()
    bodies = [message(chat, number) for number in range(20)]
    with connection(relay.port) as open_:
        open_.sendall(
            b"".join(head(headers={"Content-Length": len(body)}, close=False) + body for body in bodies)
            + head(headers={"Content-Length": len(bodies[0])})
            + bodies[0]
        )
        raw = b""
        while part := open_.recv(65536):
            raw += part

    assert raw.count(b"HTTP/1.1 200 OK\r\n") == 21
    assert [record.value for record in of_chat(kafka, relay, chat)] == bodies


@pytest.mark.parametrize("at_once", [True, False])
def test_a_chunked_body_is_taken(kafka: FoundKafka, relay: RelayProcess, at_once: bool) -> None:
    chat = new_chat()
    body = message(chat)
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:50], body[50:])]
    parts = [head(headers={"Transfer-Encoding": "chunked"}), *chunks, b"0\r\n\r\n"]
    with connection(relay.port) as open_:
        open_.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for part in [b"".join(parts)] if at_once else parts:
            open_.sendall(part)
        assert read_all(open_).status == 200

    assert [record.value for record in of_chat(kafka, relay, chat)] == [body]


def test_a_body_may_come_in_pieces(kafka: FoundKafka, relay: RelayProcess) -> None:
    chat = new_chat()
    body = message(chat, text="x" * 90_000)
    with connection(relay.port) as open_:
        open_.sendall(head(headers={"Content-Length": len(body)}))
        for start in range(0, len(body), 10_000):
            open_.sendall(body[start : start + 10_000])
        assert read_all(open_).status == 200

    assert [record.value for record in of_chat(kafka, relay, chat)] == [body]


def test_who_expects_100_continue_gets_it_and_then_200(kafka: FoundKafka, relay: RelayProcess) -> None:
    chat = new_chat()
    body = message(chat)
    with connection(relay.port) as open_:
        open_.sendall(head(headers={"Content-Length": len(body), "Expect": "100-continue"}))
        assert read_answer(open_).status == 100

        open_.sendall(body)

        assert read_all(open_).status == 200
    assert [record.value for record in of_chat(kafka, relay, chat)] == [body]


def test_no_content_type_is_required(relay: RelayProcess) -> None:
    body = message(new_chat())
    plain = head(headers={"Content-Length": len(body)}).replace(b"Content-Type: application/json\r\n", b"")
    with connection(relay.port) as open_:
        open_.sendall(plain + body)

        assert read_all(open_).status == 200


def test_header_names_may_be_written_in_any_case(relay: RelayProcess) -> None:
    body = message(new_chat())
    shouted = head(headers={"Content-Length": len(body)}).replace(
        b"X-RocketChat-Livechat-Token", b"X-ROCKETCHAT-LIVECHAT-TOKEN"
    )
    with connection(relay.port) as open_:
        open_.sendall(shouted + body)

        assert read_all(open_).status == 200


# --- Refusals ---


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b'"text"', b"4711", b'{"_id": "a"', b'{"a":NaN}', b"\xff\xfe{}", b"[" * 50_000, b"{}{}"],
    ids=["nothing", "null", "array", "text", "number", "half", "NaN", "no UTF-8", "deep", "two"],
)
def test_a_body_that_is_no_json_object_is_answered_400(relay: RelayProcess, body: bytes) -> None:
    assert is_problem(post(relay.port, body), 400)


def test_a_truncated_body_is_counted_and_not_published(kafka: FoundKafka, relay: RelayProcess) -> None:
    chat = new_chat()
    body = message(chat)
    before = rejected(relay, "client_disconnected")
    with connection(relay.port) as open_:
        open_.sendall(head(headers={"Content-Length": len(body) + 1}) + body)
        open_.shutdown(socket.SHUT_WR)
        while open_.recv(65536):
            pass

    assert rejected(relay, "client_disconnected") == before + 1
    assert of_chat(kafka, relay, chat) == []


@pytest.mark.parametrize(
    ("path", "token"),
    [
        ("/rocketchat", None),
        ("/rocketchat", ""),
        ("/rocketchat", TOKEN[:-1]),
        ("/rocketchat", TOKEN + "x"),
        ("/rocketchat", "ü"),
        ("/rocketchat/unknown", TOKEN),
        ("/rocketchat/..", TOKEN),
    ],
)
def test_a_wrong_token_or_workspace_is_answered_401(relay: RelayProcess, path: str, token: str | None) -> None:
    answer = post(relay.port, message(new_chat()), path=path, token=token)

    assert is_problem(answer, 401)
    assert answer.body == post(relay.port, b"", token="another").body


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/", "POST", 404),
        ("/rocketchat/", "POST", 404),
        ("/rocketchat/default/more", "POST", 404),
        ("/metrics", "GET", 404),
        ("/rocketchat?a=b", "POST", 200),
        ("/rocketchat", "PUT", 405),
        ("/rocketchat", "DELETE", 405),
        ("/rocketchat/default", "PATCH", 405),
    ],
)
def test_other_paths_and_methods_are_answered_404_and_405(
    relay: RelayProcess, path: str, method: str, status: int
) -> None:
    answer = post(relay.port, message(new_chat()), path=path, method=method)

    assert answer.status == status
    if status != 200:
        assert is_problem(answer, status)
        assert "location" not in answer.headers
    if status == 405:
        assert answer.headers["allow"] == "POST"


def test_get_is_answered_405(relay: RelayProcess) -> None:
    with connection(relay.port) as open_:
        open_.sendall(head(method="GET"))

        assert is_problem(read_all(open_), 405)


@pytest.mark.parametrize(
    "raw",
    [b"hello\r\n\r\n", b"POST /rocketchat HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n"],
)
def test_what_is_not_http_is_answered_400(relay: RelayProcess, raw: bytes) -> None:
    with connection(relay.port) as open_:
        open_.sendall(raw)

        assert is_problem(read_all(open_), 400)


@pytest.mark.parametrize(("token", "status"), [("another", 401), (TOKEN, 413)])
@pytest.mark.parametrize("size", [LIMIT + 1, 20_000_000])
def test_an_early_refusal_is_seen_by_who_still_sends_a_large_body(
    relay: RelayProcess, token: str, status: int, size: int
) -> None:
    with connection(relay.port) as open_:
        open_.sendall(head(token=token, headers={"Content-Length": size}))
        open_.sendall(b" " * size)  # Never answered by a reset: all of it is taken.

        assert is_problem(read_all(open_), status)


@pytest.mark.parametrize(("token", "status"), [("another", 401), (TOKEN, 413)])
def test_an_early_refusal_of_a_chunked_body_is_seen_by_who_still_sends_it(
    relay: RelayProcess, token: str, status: int
) -> None:
    with connection(relay.port) as open_:
        open_.sendall(head(token=token, headers={"Transfer-Encoding": "chunked"}))
        for _ in range(40):
            open_.sendall(b"%x\r\n%b\r\n" % (50_000, b" " * 50_000))
        open_.sendall(b"0\r\n\r\n")

        assert is_problem(read_all(open_), status)


@pytest.mark.parametrize(("token", "length", "status"), [("another", 10, 401), (TOKEN, LIMIT + 1, 413)])
def test_who_expects_100_continue_is_refused_before_the_body(
    relay: RelayProcess, token: str, length: int, status: int
) -> None:
    with connection(relay.port) as open_:
        open_.sendall(head(token=token, headers={"Content-Length": length, "Expect": "100-continue"}))

        assert is_problem(read_answer(open_), status)


def test_the_refused_senders_next_delivery_on_the_same_connection_is_taken(relay: RelayProcess) -> None:
    body = message(new_chat())
    length = {"Content-Length": len(body)}
    with connection(relay.port) as open_:
        open_.sendall(head(token="another", headers=length, close=False) + body)
        assert read_answer(open_).status == 401

        open_.sendall(head(headers=length) + body)

        assert read_all(open_).status == 200


def test_every_answer_is_counted_by_its_status(relay: RelayProcess) -> None:
    def counts() -> dict[int, float]:
        metrics = relay.metrics()
        return {code: metrics[f'relay_http_requests_total{{code="{code}"}}'] for code in (200, 400, 401, 404, 405, 413)}

    before = counts()
    post(relay.port, message(new_chat()))
    post(relay.port, b"[]")
    post(relay.port, b"{}", token="another")
    post(relay.port, b"{}", path="/other")
    post(relay.port, b"{}", method="PUT")
    post(relay.port, b" " * (LIMIT + 1))

    assert {code: count - before[code] for code, count in counts().items()} == dict.fromkeys(before, 1)


def rejected(relay: RelayProcess, reason: str) -> float:
    return relay.metrics()[f'relay_events_rejected_total{{reason="{reason}"}}']


# --- Slow and broken senders ---


def test_senders_that_never_finish_do_not_keep_others_waiting(relay: RelayProcess) -> None:
    body = message(new_chat())
    slow = [socket.create_connection(("127.0.0.1", relay.port)) for _ in range(100)]
    try:
        for number, open_ in enumerate(slow):
            request = head(headers={"Content-Length": len(body)}) + body
            open_.sendall(request[: 20 + number * 3])
        begun = time.monotonic()

        assert post(relay.port, body).status == 200
        assert time.monotonic() - begun < 5
    finally:
        for open_ in slow:
            open_.close()


# --- The admin port ---


def test_the_admin_port_tells_health_readiness_status_and_metrics(relay: RelayProcess) -> None:
    relay.wait_until_drained()
    status = relay.status()

    assert relay.admin("/healthz")[0] == relay.admin("/readyz")[0] == 200
    assert {"version", "uptime_seconds", "kafka", "registry", "spool"} <= set(status)
    assert status["kafka"] == {"connected": True, "error": None}
    assert relay.metrics()["relay_kafka_connected"] == 1


def test_health_and_readiness_do_not_depend_on_kafka(make_relay: MakeRelay) -> None:
    nowhere = FoundKafka("127.0.0.1:1", "none")
    relay = make_relay(nowhere).start()

    assert relay.admin("/healthz")[0] == relay.admin("/readyz")[0] == 200
    assert post(relay.port, message(new_chat())).status == 200
    relay.wait_for("kafka_lost")
    assert relay.status()["kafka"]["connected"] is False
    assert relay.metrics()["relay_kafka_connected"] == 0
    assert relay.metrics()["relay_spool_events"] == 1


def test_deliveries_are_taken_over_tls(kafka: FoundKafka, make_relay: MakeRelay, tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.write_text(CERTIFICATE)
    key.write_text(KEY)
    files = {"RELAY_HTTP_TLS_CERTFILE": str(certificate), "RELAY_HTTP_TLS_KEYFILE": str(key)}
    relay = make_relay(kafka, **files).start()
    context = ssl.create_default_context(cafile=str(certificate))
    body = message(new_chat())

    with connection(relay.port) as plain, context.wrap_socket(plain, server_hostname="localhost") as open_:
        open_.sendall(head(headers={"Content-Length": len(body)}) + body)
        answer = read_answer(open_)

    assert (answer.status, answer.body) == (200, b"")
    relay.wait_until_drained()
