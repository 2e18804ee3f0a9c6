"""From a delivery to its record: once, unchanged, in order, on the right topic."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from acceptance.bodies import message, new_chat, of_type, samples, schema_uris, send_test
from acceptance.conftest import MakeRelay
from acceptance.http_client import connection, head, post
from acceptance.senders import Senders
from kafka_for_tests import FoundKafka
from oracle import Landed, Sent, judge, murmur2_partition, read_topics
from relay_process import RelayProcess, wait_until

Shared = tuple[FoundKafka, RelayProcess]
REPEATABLE = ["LivechatSessionQueued", "LivechatEdit", "LeadCapture"]


def landed(kafka: FoundKafka, relay: RelayProcess) -> list[Landed]:
    """Everything on the relay's topics, once it is drained."""
    relay.wait_until_drained()
    topics = (relay.settings["RELAY_TOPIC"], relay.settings["RELAY_DEAD_LETTER_TOPIC"])
    return read_topics(kafka.bootstrap_servers, *topics)


def faults(kafka: FoundKafka, relay: RelayProcess, *sent: Sent) -> dict[str, list[str]]:
    verdict = judge(
        sent,
        landed(kafka, relay),
        topic=relay.settings["RELAY_TOPIC"],
        dead_letter_topic=relay.settings["RELAY_DEAD_LETTER_TOPIC"],
        schema_uris=schema_uris(),
    )
    return verdict.faults


def faults_of_chats(shared: Shared, *sent: Sent) -> dict[str, list[str]]:
    """The faults of the chats of *sent* alone."""
    kafka, relay = shared
    keys = {json.loads(event.body)["_id"].encode() for event in sent}
    there = [record for record in landed(kafka, relay) if record.key in keys]
    return judge(sent, there, topic=relay.settings["RELAY_TOPIC"], schema_uris=schema_uris()).faults


# --- What arrives ---


def test_every_sample_arrives_once_with_its_key_headers_and_bytes(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka).start()
    bodies = samples()

    answers = {name: post(relay.port, body).status for name, body in bodies.items()}

    assert set(answers.values()) == {200}
    assert not faults(kafka, relay, *map(Sent, bodies.values()))


def test_records_lie_on_the_partition_that_the_java_client_would_choose(
    kafka: FoundKafka, make_relay: MakeRelay
) -> None:
    relay = make_relay(kafka).start()
    for _ in range(40):
        assert post(relay.port, message(new_chat())).status == 200

    there = landed(kafka, relay)

    assert len(there) == 40
    assert {record.partition for record in there} == {0, 1, 2, 3, 4, 5}
    assert all(record.key and record.partition == murmur2_partition(record.key, 6) for record in there)


def test_each_chat_is_in_order_under_64_concurrent_clients(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka).start()

    with Senders(relay.url, chats=64, rate=500) as senders:
        senders.wait_for_answers(1500)

    assert set(senders.tries) == {200}
    assert not faults(kafka, relay, *senders.sent)


@pytest.mark.parametrize("delivery", ["exactly-once", "at-least-once"])
@pytest.mark.parametrize("ack", ["spool", "kafka"])
def test_events_arrive_once_in_order_with_every_ack_and_delivery(
    kafka: FoundKafka, make_relay: MakeRelay, ack: str, delivery: str
) -> None:
    relay = make_relay(kafka, RELAY_ACK=ack, RELAY_DELIVERY=delivery).start(connected=True)

    with Senders(relay.url, chats=16, rate=100) as senders:
        senders.wait_for_answers(100)

    assert set(senders.tries) == {200}
    assert not faults(kafka, relay, *senders.sent)


def test_a_topic_may_hold_type_and_workspace(kafka: FoundKafka, make_relay: MakeRelay, topic_name: str) -> None:
    relay = make_relay(kafka, RELAY_TOPIC=f"{topic_name}.{{workspace}}.{{type}}").start()
    chat = new_chat()
    bodies = {"message.saved": message(chat), "session.queued": of_type("LivechatSessionQueued", chat)}

    for body in bodies.values():
        assert post(relay.port, body).status == 200

    relay.wait_until_drained()
    for slug, body in bodies.items():
        there = read_topics(kafka.bootstrap_servers, f"{topic_name}.default.{slug}")
        assert [record.value for record in there] == [body]


def test_send_test_is_answered_and_not_published(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka).start()
    after = message(new_chat())

    assert post(relay.port, send_test()).status == 200
    assert post(relay.port, after).status == 200

    assert not faults(kafka, relay, Sent(after))
    assert relay.metrics()["relay_test_deliveries_total"] == 1
    assert len(relay.log("test_delivery")) == 1


def test_fields_named_for_redaction_leave_neither_for_kafka_nor_the_spool(
    kafka: FoundKafka, make_relay: MakeRelay
) -> None:
    relay = make_relay(kafka, RELAY_REDACT="/visitor/token,/messages/*/msg").start()
    body = message(new_chat(), text="a secret text")
    redacted = json.loads(body)
    redacted["visitor"]["token"] = redacted["messages"][0]["msg"] = "[redacted]"

    assert post(relay.port, body).status == 200
    assert post(relay.port, body).status == 200

    (record,) = landed(kafka, relay)
    assert json.loads(record.value or b"") == redacted
    assert not faults(kafka, relay, Sent(body, value=record.value))
    assert relay.stop() == 0
    kept = b"".join(path.read_bytes() for path in relay.spool_path.parent.iterdir())
    assert b"a secret text" not in kept
    assert b"visitor-token" not in kept


# --- Retries and repeats ---


def test_a_retry_makes_no_second_record(shared: Shared) -> None:
    _, relay = shared
    body = message(new_chat())
    before = relay.metrics()['relay_events_duplicate_total{workspace="default"}']

    assert [post(relay.port, body).status for _ in range(3)] == [200, 200, 200]

    assert not faults_of_chats(shared, Sent(body))
    assert relay.metrics()['relay_events_duplicate_total{workspace="default"}'] == before + 2


def test_a_retry_makes_no_second_record_after_the_relay_was_killed(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka).start()
    bodies = [message(new_chat()), *(of_type(type_, new_chat()) for type_ in REPEATABLE)]
    first, *unanswered = bodies
    assert post(relay.port, first).status == 200
    for body in unanswered:
        break_off(relay, body)
    relay.kill()
    relay.start()

    assert [post(relay.port, body).status for body in bodies] == [200] * len(bodies)

    assert not faults(kafka, relay, *map(Sent, bodies))


def test_retries_that_come_at_once_make_one_record(shared: Shared) -> None:
    _, relay = shared
    body = message(new_chat())
    relay.freeze()
    with ExitStack() as stack:
        connections = [stack.enter_context(connection(relay.port)) for _ in range(8)]
        for open_ in connections:
            open_.sendall(head(headers={"Content-Length": len(body)}) + body)

        relay.thaw()

        assert [open_.recv(12) for open_ in connections] == [b"HTTP/1.1 200"] * 8
    assert not faults_of_chats(shared, Sent(body))


def test_an_equal_body_is_a_new_event_when_the_window_is_off(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka, RELAY_DEDUPE_WINDOW_SECONDS="0").start()
    body = message(new_chat())

    assert [post(relay.port, body).status for _ in range(2)] == [200, 200]

    assert [record.value for record in landed(kafka, relay)] == [body, body]


@pytest.mark.parametrize("type_", REPEATABLE)
def test_a_body_that_may_repeat_is_a_new_event_once_the_first_was_answered(shared: Shared, type_: str) -> None:
    _, relay = shared
    body = of_type(type_, new_chat())

    assert [post(relay.port, body).status for _ in range(3)] == [200, 200, 200]

    assert not faults_of_chats(shared, Sent(body), Sent(body), Sent(body))


@pytest.mark.parametrize("type_", REPEATABLE)
def test_a_body_that_may_repeat_is_a_retry_if_the_sender_broke_off_before_the_answer(
    shared: Shared, type_: str
) -> None:
    _, relay = shared
    body = of_type(type_, new_chat())

    break_off(relay, body)
    assert post(relay.port, body).status == 200

    assert not faults_of_chats(shared, Sent(body))


def test_a_sender_that_breaks_off_is_no_fault_of_the_relays_own(shared: Shared) -> None:
    _, relay = shared

    break_off(relay, of_type("LeadCapture", new_chat()))

    assert not relay.log("handler_failed")
    assert relay.metrics()['relay_http_requests_total{code="500"}'] == 0


def break_off(relay: RelayProcess, body: bytes) -> None:
    """Deliver *body* and close the connection before the answer: both meet a relay that stands still meanwhile."""
    accepted = total_accepted(relay)
    relay.freeze()
    with connection(relay.port) as open_:
        open_.sendall(head(headers={"Content-Length": len(body)}) + body)
    relay.thaw()
    wait_until(lambda: total_accepted(relay) == accepted + 1, "the delivery was accepted")


def total_accepted(relay: RelayProcess) -> float:
    return sum(value for name, value in relay.metrics().items() if name.startswith("relay_events_accepted_total"))


# --- Dead letters ---


def dead_letters() -> Iterator[tuple[str, bytes, str, str]]:
    chat = new_chat()
    payload = json.loads(message(chat))
    yield "unknown-type", json.dumps({**payload, "type": "Surprise-4711"}).encode(), "unknown_type", "/type"
    yield "no-type", json.dumps({"_id": chat, "secret": 4711}).encode(), "unknown_type", "/type"
    yield "type-not-a-string", json.dumps({**payload, "type": [4711]}).encode(), "unknown_type", "/type"
    yield "no-chat", json.dumps({**payload, "_id": ""}).encode(), "no_key", "/_id"
    yield "no-email", b'{"type":"LivechatOfflineMessage","visitor":{"name":"4711"}}', "no_key", "/visitor/email"
    yield "schema", json.dumps({**payload, "messages": "4711"}).encode(), "schema", "/messages"
    yield "half-an-emoji-as-a-key", rb'{"_id":"\ud83d","type":"Message"}', "no_key", "/_id"


@pytest.mark.parametrize(("body", "reason", "place"), [pytest.param(*case, id=name) for name, *case in dead_letters()])
def test_what_is_not_valid_is_answered_200_and_goes_to_the_dead_letters_with_the_reason(
    shared: Shared, body: bytes, reason: str, place: str
) -> None:
    kafka, relay = shared

    assert post(relay.port, body).status == 200

    (record,) = [record for record in landed(kafka, relay) if record.value == body]
    if reason == "no_key":
        assert record.key is None
    else:
        judged = judge(
            [Sent(body, reason=reason)],
            [record],
            topic="none",
            dead_letter_topic=relay.settings["RELAY_DEAD_LETTER_TOPIC"],
            schema_uris=schema_uris(),
        )
        assert not judged.faults
    assert record.topic == relay.settings["RELAY_DEAD_LETTER_TOPIC"]
    assert record.header("relay_error_reason") == reason
    assert (record.header("relay_error_detail") or "").startswith(place)
    assert "4711" not in (record.header("relay_error_detail") or "")


def test_invalid_samples_are_all_answered_and_none_is_lost(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka).start()
    bodies = {name: body for name, body in samples("invalid").items() if isinstance(json.loads(body), dict)}

    assert {post(relay.port, body).status for body in bodies.values()} == {200}

    there = landed(kafka, relay)
    assert sorted(record.value or b"" for record in there) == sorted(bodies.values())


def test_invalid_events_are_published_with_the_reason_when_they_are_only_reported(
    kafka: FoundKafka, make_relay: MakeRelay
) -> None:
    relay = make_relay(kafka, RELAY_SCHEMA_VALIDATION="report").start()
    body = json.dumps({**json.loads(message(new_chat())), "messages": "none"}).encode()

    assert post(relay.port, body).status == 200

    (record,) = landed(kafka, relay)
    assert (record.topic, record.value) == (relay.settings["RELAY_TOPIC"], body)
    assert (record.header("relay_schema_error") or "").startswith("/messages")
    assert relay.metrics()['relay_events_invalid_total{type="Message"}'] == 1


# --- Tokens and workspaces ---


def test_several_tokens_are_valid_at_once(kafka: FoundKafka, make_relay: MakeRelay) -> None:
    relay = make_relay(kafka, RELAY_TOKEN="old-token\nnew-token\n").start()

    statuses = [post(relay.port, message(new_chat()), token=token).status for token in ("old-token", "new-token", "no")]

    assert statuses == [200, 200, 401]
    matches = [relay.metrics()[f'relay_token_matches_total{{slot="{slot}",workspace="default"}}'] for slot in (1, 2)]
    assert matches == [1, 1]


@pytest.mark.parametrize("way", ["written over", "replaced"])
def test_a_rotated_token_file_needs_no_restart(
    kafka: FoundKafka, make_relay: MakeRelay, tmp_path: Path, way: str
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("first\n")
    relay = make_relay(kafka, RELAY_TOKEN="", RELAY_TOKEN_FILE=str(tokens)).start()
    assert status_with(relay, "first") == 200

    if way == "replaced":
        (tmp_path / "next").write_text("second\n")
        (tmp_path / "next").replace(tokens)
    else:
        tokens.write_text("second\n")

    wait_until(lambda: status_with(relay, "second") == 200, "the new token is valid")
    assert status_with(relay, "first") == 401


def test_an_emptied_token_file_leaves_the_tokens_as_they_were(
    kafka: FoundKafka, make_relay: MakeRelay, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("first\n")
    relay = make_relay(kafka, RELAY_TOKEN="", RELAY_TOKEN_FILE=str(tokens)).start()

    tokens.write_text("")

    wait_until(lambda: status_with(relay, "first") == 200 and bool(relay.log("tokens_unreadable")), "it was looked at")
    assert status_with(relay, "") == 401
    assert status_with(relay, "first") == 200


def test_each_workspace_has_its_tokens_and_its_source(kafka: FoundKafka, make_relay: MakeRelay, tmp_path: Path) -> None:
    workspaces = tmp_path / "workspaces"
    workspaces.mkdir()
    for name in ("north", "south"):
        (workspaces / name).write_text(f"{name}-token\n")
    relay = make_relay(kafka, RELAY_TOKEN="", RELAY_WORKSPACES_DIR=str(workspaces)).start()
    body = message(new_chat())

    good = [
        post(relay.port, body, path=f"/rocketchat/{name}", token=f"{name}-token").status for name in ("north", "south")
    ]
    bad = [
        post(relay.port, body, path=f"/rocketchat/{name}", token=token)
        for name, token in (("north", "south-token"), ("west", "north-token"), ("north", None))
    ]

    assert good == [200, 200]
    assert [answer.status for answer in bad] == [401, 401, 401]
    assert len({answer.body for answer in bad}) == 1
    assert not faults(kafka, relay, Sent(body, workspace="north"), Sent(body, workspace="south"))

    (workspaces / "west").write_text("west-token\n")
    wait_until(
        lambda: post(relay.port, body, path="/rocketchat/west", token="west-token").status == 200,
        "the new workspace is known",
    )


def status_with(relay: RelayProcess, token: str) -> int:
    return post(relay.port, message(new_chat()), token=token).status


@pytest.fixture(scope="module")
def shared(kafka: FoundKafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Yield a Kafka and a relay that tests share which look at their own records only."""
    name = f"deliveries-{new_chat()}"
    settings = {
        "RELAY_TOPIC": name,
        "RELAY_DEAD_LETTER_TOPIC": f"{name}.dead-letter",
        "RELAY_WATERMARK_TOPIC": f"{name}.watermarks",
        "RELAY_TOPIC_CREATE": "true",
    }
    relay = RelayProcess(tmp_path_factory.mktemp("relay"), kafka.bootstrap_servers, settings)
    relay.start()
    yield kafka, relay
    relay.close()
