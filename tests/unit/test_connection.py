import asyncio
import ssl
from pathlib import Path

import pytest
from aiokafka import errors as kafka

from relay import errors
from relay.connection import Connection, meaning_of, translated


@pytest.mark.parametrize(
    ("raised", "meaning"),
    [
        # The only four that are a record's own fault.
        (kafka.MessageSizeTooLargeError(), errors.RecordsRefused),
        (kafka.RecordListTooLargeError(), errors.RecordsRefused),
        (kafka.CorruptRecordException(), errors.RecordsRefused),
        (kafka.UnknownError(), errors.RecordsRefused),
        (kafka.InvalidTimestampError(), errors.TimeRefused),
        (kafka.ProducerFenced(), errors.Fenced),
        (kafka.InvalidProducerEpoch(), errors.Fenced),
        (kafka.IllegalOperation(), errors.Fenced),
        (AssertionError("Invalid state transition"), errors.Fenced),
        (kafka.TopicAuthorizationFailedError(), errors.KafkaDenied),
        (kafka.TransactionalIdAuthorizationFailed(), errors.KafkaDenied),
        (kafka.ClusterAuthorizationFailedError(), errors.KafkaDenied),
        (kafka.SaslAuthenticationFailed(), errors.KafkaDenied),
        (kafka.UnknownTopicOrPartitionError(), errors.TopicsMissing),
        (AssertionError("Unrecognized partition"), errors.TopicsMissing),
        (kafka.NotLeaderForPartitionError(), errors.PartitionLeaderless),
        (kafka.LeaderNotAvailableError(), errors.PartitionLeaderless),
        (TimeoutError(), errors.KafkaTimeout),
        (kafka.KafkaTimeoutError(), errors.KafkaTimeout),
        (kafka.RequestTimedOutError(), errors.KafkaTimeout),
        (kafka.KafkaConnectionError(), errors.KafkaUnreachable),
        (kafka.NodeNotReadyError(), errors.KafkaUnreachable),
        (ConnectionResetError(), errors.KafkaUnreachable),
        (OSError("no route"), errors.KafkaUnreachable),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else type(value).__name__,
)
def test_an_error_of_aiokafka_s_has_its_meaning(raised: Exception, meaning: type[errors.KafkaLost]) -> None:
    assert meaning_of(raised) is meaning


@pytest.mark.parametrize(
    "raised",
    [
        kafka.InvalidTimestampError(),
        kafka.InvalidTopicError(),
        kafka.OutOfOrderSequenceNumber(),
        kafka.DuplicateSequenceNumber(),
        kafka.NotEnoughReplicasError(),
        kafka.NotEnoughReplicasAfterAppendError(),
        kafka.PolicyViolationError(),
        kafka.InvalidRequiredAcksError(),
        kafka.KafkaError("whatever"),
        ValueError("whatever"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_else_is_ever_taken_for_a_record_s_own_fault(raised: Exception) -> None:
    assert meaning_of(raised) is not errors.RecordsRefused


def test_what_is_not_about_records_refuses_none() -> None:
    with pytest.raises(errors.KafkaLost) as caught, translated("committing"):
        raise kafka.KafkaError("sender died") from kafka.UnknownError()
    assert not isinstance(caught.value, errors.RecordsRefused)


def test_a_dead_sender_s_reason_is_its_cause() -> None:
    with pytest.raises(errors.Fenced), translated("publishing"):
        raise kafka.KafkaError("sender died") from kafka.ProducerFenced()


def test_an_error_says_what_the_relay_was_doing_and_keeps_the_original() -> None:
    with pytest.raises(errors.KafkaTimeout, match=r"While looking\b.*broker 7") as caught, translated("looking"):
        raise kafka.KafkaTimeoutError("broker 7")
    assert isinstance(caught.value.__cause__, kafka.KafkaTimeoutError)


def test_what_is_translated_already_and_cancellation_pass() -> None:
    lost = errors.TopicsMissing("events")
    with pytest.raises(errors.TopicsMissing) as caught, translated("looking"):
        raise lost
    assert caught.value is lost
    with pytest.raises(asyncio.CancelledError), translated("looking"):
        raise asyncio.CancelledError


def test_no_password_is_in_a_plain_connection() -> None:
    options = Connection("a:1,b:2", "relay").options()
    assert options["bootstrap_servers"] == "a:1,b:2"
    assert options["client_id"] == "relay"
    assert options["security_protocol"] == "PLAINTEXT"
    assert options["sasl_plain_password"] is options["ssl_context"] is None


@pytest.mark.parametrize("protocol", ["SSL", "SASL_SSL"])
def test_an_encrypted_connection_checks_the_broker_s_name(protocol: str) -> None:
    context = Connection("a:1", "relay", protocol).options()["ssl_context"]
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname


def test_certificates_to_trust_are_read_from_their_file(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("not a certificate")
    with pytest.raises(errors.KafkaDenied, match="RELAY_KAFKA_SSL_CAFILE"):
        Connection("a:1", "relay", "SSL", ssl_cafile=str(file)).options()


async def test_who_cannot_give_a_token_is_told_as_what_keeps_the_relay_out() -> None:
    async def token() -> str:
        raise errors.KafkaUnreachable("no token to be had")

    provider = Connection("a:1", "relay", "SASL_PLAINTEXT", "OAUTHBEARER", sasl_token=token).options()[
        "sasl_oauth_token_provider"
    ]
    # Any other exception would end the client's own tasks.
    with pytest.raises(kafka.AuthenticationFailedError, match="no token to be had") as caught:
        await provider.token()
    assert isinstance(caught.value.__cause__, errors.KafkaUnreachable)


@pytest.mark.parametrize(
    ("servers", "told"),
    [
        ("127.0.0.1:1", "127.0.0.1:1 does not answer"),
        ("no.such.host.invalid:9092", "no.such.host.invalid:9092 does not answer"),
    ],
)
async def test_a_broker_that_is_not_there_is_named(servers: str, told: str) -> None:
    fault = await Connection(servers, "relay").fault()
    assert isinstance(fault, errors.KafkaUnreachable)
    assert str(fault).startswith(told)
    assert "RELAY_KAFKA_BOOTSTRAP_SERVERS" in str(fault)
