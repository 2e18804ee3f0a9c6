"""The rights that deploy/strimzi gives are enough, none is too many, and a missing one is named and waited for."""

import pytest
from acceptance.bodies import message, new_chat
from acceptance.conftest import MakeRelay
from acceptance.http_client import post
from acceptance.secured import faults, make_topics, relay_on, ways_in
from oracle import Sent
from relay_process import RelayProcess, run_relay, wait_until
from secured_kafka import PASSWORD, Acl, SecuredKafka, shipped_acls

#: The user of each test, so that no other test's rights are its.
User = str


@pytest.fixture
def user(topic_name: str, secured: SecuredKafka) -> User:
    """Return a user that logs in by SCRAM-SHA-512, as Strimzi's does."""
    name = f"relay-{topic_name[-8:]}"
    secured.add_user(name, PASSWORD)
    return name


@pytest.fixture
def topics(secured: SecuredKafka, topic_name: str, user: User) -> str:
    """Return the name that the topics begin with, to which the user has the shipped rights."""
    return make_topics(secured, topic_name, user)


def relay_of(make_relay: MakeRelay, secured: SecuredKafka, topics: str, user: User, **settings: str) -> RelayProcess:
    way = ways_in(secured)["SCRAM-SHA-512"]
    return relay_on(make_relay, secured, topics, {**way, "RELAY_KAFKA_SASL_USERNAME": user, **settings})


def check(relay: RelayProcess) -> list[str]:
    """What `relay check` finds wrong."""
    checked = run_relay(relay.directory, "check", settings=relay.settings)
    failures = [line for line in checked.stdout.splitlines() if line.startswith("FAIL")]
    assert checked.returncode == bool(failures), checked.stdout + checked.stderr
    return failures


def wait_for_failures(relay: RelayProcess) -> list[str]:
    """The same, once there is something: the broker may apply a change a little later."""
    found: list[str] = []

    def seen() -> bool:
        found.extend(check(relay))
        return bool(found)

    wait_until(seen, "the check sees it", seconds=60)
    return found


def send(relay: RelayProcess) -> list[Sent]:
    """An event, and one for the dead letters."""
    sent = [
        Sent(message(new_chat())),
        Sent(b'{"_id":"%s","type":"Unheard"}' % new_chat().encode(), reason="unknown_type"),
    ]
    for event in sent:
        assert post(relay.port, event.body).status == 200
    return sent


@pytest.mark.parametrize("delivery", ["exactly-once", "at-least-once"])
def test_a_relay_works_with_the_shipped_rights_alone(
    secured: SecuredKafka, make_relay: MakeRelay, topics: str, user: User, delivery: str
) -> None:
    relay = relay_of(make_relay, secured, topics, user, RELAY_DELIVERY=delivery)
    assert check(relay) == []
    sent: list[Sent] = []
    for _ in range(2):
        relay.start(connected=True)
        sent += send(relay)
        relay.wait_until_drained()
        assert check(relay) == []
        sent += send(relay)
        relay.wait_until_drained()
        # Nor has the check disturbed it.
        assert relay.metrics()["relay_producer_restarts_total"] == 0
        assert not relay.log("kafka_lost")
        assert relay.stop() == 0

    assert not faults(secured, relay, sent)


SHIPPED = [f"{acl.operation} {acl.name}" for acl in shipped_acls()]


@pytest.mark.parametrize("number", range(len(SHIPPED)), ids=SHIPPED)
def test_a_right_that_is_taken_away_is_named_and_waited_for_until_it_is_given_back(
    secured: SecuredKafka, make_relay: MakeRelay, topics: str, user: User, number: int
) -> None:
    acl = shipped_acls(topics)[number]
    relay = relay_of(make_relay, secured, topics, user).start(connected=True)
    sent = send(relay)
    relay.wait_until_drained()

    secured.deny(user, acl)

    (failure,) = wait_for_failures(relay)
    assert_names(failure, acl, user)
    if acl.operation == "Read":  # Which is for the start alone.
        relay.kill()
        relay.start()
    sent += send(relay)
    if acl.operation == "DescribeConfigs":  # Which is for the check alone.
        relay.wait_until_drained()
    else:
        lost = relay.wait_for("kafka_lost")
        # Without Write the user may not see these two either.
        hidden = acl.operation == "Write" and acl.name in {topics, f"{topics}.dead-letter"}
        told = f"no right to write to topic {acl.name}. `relay check`" if hidden else acl.name
        wait_until(lambda: told in (relay.status()["kafka"]["error"] or ""), "the resource is named")
        status = relay.status()
        assert lost["error"] == "denied"
        assert (status["kafka"]["connected"], relay.admin("/readyz")[0]) == (False, 200)
        assert status["spool"]["events"] > 0
        assert relay.metrics()["relay_kafka_connected"] == 0
        assert relay.metrics()['relay_publish_errors_total{error="denied"}'] > 0

    secured.allow(user, [acl])

    relay.wait_until_drained()
    assert check(relay) == []
    assert not faults(secured, relay, sent)


def test_topics_are_created_by_who_may(
    secured: SecuredKafka, make_relay: MakeRelay, topic_name: str, user: User
) -> None:
    topic = topic_name[-60:]
    acls = shipped_acls(topic)
    secured.allow(user, acls)
    relay = relay_of(make_relay, secured, topic, user, RELAY_TOPIC_CREATE="true").start()
    assert f"Topic {topic}" in relay.wait_for("kafka_lost")["message"]
    failures = check(relay)
    for failure, name in zip(failures, (topic, f"{topic}.dead-letter", f"{topic}.watermarks"), strict=True):
        assert f"FAIL topic {name}: missing, and this user may not Create it: " in failure
        assert_names(failure, Acl("topic", name, "literal", "Create"), user)

    secured.allow(user, {acl._replace(operation="Create") for acl in acls if acl.resource == "topic"})

    sent = send(relay)
    relay.wait_until_drained()
    assert check(relay) == []
    assert not faults(secured, relay, sent)


def assert_names(failure: str, acl: Acl, user: User) -> None:
    """That the finding says what is missing, and the command that gives it back."""
    option = "--transactional-id relay- --resource-pattern-type prefixed"
    resource = option if acl.resource == "transactionalId" else f"--topic {acl.name}"
    assert f"FAIL {'topic' if acl.resource == 'topic' else 'transactional id'} {acl.name}" in failure
    assert "`kafka-acls.sh --bootstrap-server " in failure
    assert f" --add --allow-principal User:{user} " in failure
    assert f"--operation {acl.operation} " in failure
    assert f"{resource}`" in failure
