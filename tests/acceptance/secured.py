"""A relay on a Kafka that lets nobody in just so."""

from collections.abc import Mapping

from acceptance.conftest import MakeRelay
from oracle import Sent, judge, read_topics
from relay_process import RelayProcess
from secured_kafka import PASSWORD, USER, SecuredKafka, shipped_acls, unsecured_jwt


def make_topics(secured: SecuredKafka, name: str, user: str) -> str:
    """Makes the three topics, with the shipped rights for *user*; returns what their names begin with."""
    topic = name[-60:]
    size = {"max.message.bytes": "200000"}
    secured.local.create_topics(topic, f"{topic}.dead-letter", config=size)
    secured.local.create_topics(f"{topic}.watermarks", config={"cleanup.policy": "compact"})
    secured.allow(user, shipped_acls(topic))
    return topic


def ways_in(secured: SecuredKafka) -> Mapping[str, Mapping[str, str]]:
    """The settings for each way."""
    sasl = {
        "RELAY_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{secured.ports['SASL_SSL']}",
        "RELAY_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
        "RELAY_KAFKA_SSL_CAFILE": str(secured.cafile),
        "RELAY_KAFKA_SASL_USERNAME": USER,
        "RELAY_KAFKA_SASL_PASSWORD": PASSWORD,
    }
    ways: dict[str, dict[str, str]] = {
        name: sasl | {"RELAY_KAFKA_SASL_MECHANISM": name} for name in ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
    }
    ways["OAUTHBEARER"] = sasl | {
        "RELAY_KAFKA_SASL_MECHANISM": "OAUTHBEARER",
        "RELAY_KAFKA_SASL_USERNAME": "",
        "RELAY_KAFKA_SASL_PASSWORD": unsecured_jwt(USER),
    }
    ways["mTLS"] = {
        "RELAY_KAFKA_BOOTSTRAP_SERVERS": f"127.0.0.1:{secured.ports['SSL']}",
        "RELAY_KAFKA_SECURITY_PROTOCOL": "SSL",
        "RELAY_KAFKA_SSL_CAFILE": str(secured.cafile),
        **secured.certificate(USER),
    }
    return ways


def relay_on(make_relay: MakeRelay, secured: SecuredKafka, topics: str, settings: Mapping[str, str]) -> RelayProcess:
    """A relay on these topics, which it may not create."""
    names = {
        "RELAY_TOPIC": topics,
        "RELAY_DEAD_LETTER_TOPIC": f"{topics}.dead-letter",
        "RELAY_WATERMARK_TOPIC": f"{topics}.watermarks",
        "RELAY_TOPIC_CREATE": "false",
        "RELAY_MAX_BODY_BYTES": "100000",
    }
    return make_relay(secured.local, **{**names, **settings})


def faults(secured: SecuredKafka, relay: RelayProcess, sent: list[Sent]) -> dict[str, list[str]]:
    topic, dead_letters = relay.settings["RELAY_TOPIC"], relay.settings["RELAY_DEAD_LETTER_TOPIC"]
    landed = read_topics(secured.bootstrap_servers, topic, dead_letters)
    return judge(sent, landed, topic=topic, dead_letter_topic=dead_letters).faults
