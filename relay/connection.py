"""
How to connect to Kafka and who to be there, what its client's errors mean, and what is wrong if it lets nobody in.

With cluster.py, rights.py and kafka.py the only place that knows aiokafka.
"""

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from aiokafka import errors
from aiokafka.abc import AbstractTokenProvider
from aiokafka.conn import collect_hosts, create_conn
from aiokafka.helpers import create_ssl_context
from aiokafka.protocol.metadata import MetadataRequest

from relay.errors import (
    Fenced,
    KafkaDenied,
    KafkaLost,
    KafkaTimeout,
    KafkaUnreachable,
    PartitionLeaderless,
    RecordsRefused,
    TimeRefused,
    TopicsMissing,
)

REQUEST_TIMEOUT_MS = 10_000
RETRY_BACKOFF_MS = 100
#: Seconds for one look at why a broker cannot be used.
_LOOK_TIMEOUT = 3.0

_MEANINGS: tuple[tuple[tuple[type[BaseException], ...], type[KafkaLost]], ...] = (
    (
        (
            errors.MessageSizeTooLargeError,  # max.message.bytes of the topic
            errors.RecordListTooLargeError,  # its segment.bytes
            errors.CorruptRecordException,
            errors.UnknownError,  # What aiokafka has no name for, such as INVALID_RECORD.
        ),
        RecordsRefused,
    ),
    # Not the event's own fault: all those around it have waited as long.
    ((errors.InvalidTimestampError,), TimeRefused),
    ((errors.ProducerFenced, errors.InvalidProducerEpoch, errors.IllegalOperation), Fenced),
    (
        (
            errors.TopicAuthorizationFailedError,
            errors.TransactionalIdAuthorizationFailed,
            errors.ClusterAuthorizationFailedError,
            errors.AuthenticationFailedError,
            errors.SaslAuthenticationFailed,
        ),
        KafkaDenied,
    ),
    ((errors.UnknownTopicOrPartitionError,), TopicsMissing),
    ((errors.NotLeaderForPartitionError, errors.LeaderNotAvailableError), PartitionLeaderless),
    ((TimeoutError, errors.KafkaTimeoutError, errors.RequestTimedOutError), KafkaTimeout),
    ((errors.KafkaConnectionError, errors.NodeNotReadyError, OSError), KafkaUnreachable),
)
#: OpenSSL's verification errors: X509_V_ERR_...
_EXPIRED, _OTHER_NAMES = 10, {62, 64}


class Connection(NamedTuple):
    """How to reach the cluster and who to be there."""

    bootstrap_servers: str
    client_id: str
    security_protocol: str = "PLAINTEXT"
    sasl_mechanism: str = "PLAIN"
    sasl_username: str | None = None
    sasl_password: str | None = None
    #: Gives the token of OAUTHBEARER; asked at every login. Raises: KafkaLost.
    sasl_token: Callable[[], Awaitable[str]] | None = None
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    def options(self) -> dict[str, Any]:
        """
        The keyword arguments that aiokafka's clients share; certificates are read anew.

        Raises: KafkaDenied if a certificate cannot be used.
        """
        return {
            "bootstrap_servers": self.bootstrap_servers,
            "retry_backoff_ms": RETRY_BACKOFF_MS,
            **self._broker_options(),
        }

    def _broker_options(self) -> dict[str, Any]:
        return {
            "client_id": self.client_id,
            "security_protocol": self.security_protocol,
            "sasl_mechanism": self.sasl_mechanism,
            "sasl_plain_username": self.sasl_username,
            "sasl_plain_password": self.sasl_password,
            "sasl_oauth_token_provider": _TokenProvider(self.sasl_token) if self.sasl_token else None,
            "ssl_context": self._ssl_context(),
            "request_timeout_ms": REQUEST_TIMEOUT_MS,
        }

    def _ssl_context(self) -> ssl.SSLContext | None:
        if not self.security_protocol.endswith("SSL"):
            return None
        try:
            context: ssl.SSLContext = create_ssl_context(
                cafile=self.ssl_cafile, certfile=self.ssl_certfile, keyfile=self.ssl_keyfile
            )
        except OSError as error:
            names = "RELAY_KAFKA_SSL_CAFILE, _CERTFILE, _KEYFILE"
            raise KafkaDenied(f"{names}: one of them cannot be used: {error}.") from error
        return context

    async def fault(self, known: Iterable[tuple[str, int]] = ()) -> KafkaLost | None:
        """
        Why one of the bootstrap servers or *known* brokers cannot be used, naming the setting to change; or None.

        aiokafka logs the reasons, and raises only that there is no connection.
        """
        hosts = {(host, port) for host, port, _ in collect_hosts(self.bootstrap_servers)} | {*known}
        found = await asyncio.gather(*(self._fault_of(host, port) for host, port in sorted(hosts)))
        faults = [fault for fault in found if fault]
        # Of several the one that does not mend itself.
        return next((fault for fault in faults if isinstance(fault, KafkaDenied)), faults[0] if faults else None)

    async def _fault_of(self, host: str, port: int) -> KafkaLost | None:
        try:
            async with asyncio.timeout(_LOOK_TIMEOUT):
                connection = await create_conn(host, port, **self._broker_options())
        except Exception as error:  # noqa: BLE001 (all of them keep the relay out)
            return self._explained(f"{host}:{port}", error)
        try:
            async with asyncio.timeout(_LOOK_TIMEOUT):
                if not (await connection.send(MetadataRequest([]))).brokers:
                    raise errors.KafkaConnectionError("nothing before a login")
        except (errors.KafkaError, TimeoutError) as error:
            if self.sasl_token and isinstance(error, errors.KafkaError):
                # aiokafka takes the broker's refusal for a welcome.
                return KafkaDenied(f"{host}:{port} does not accept the token: {self._login}.")
            return self._explained(f"{host}:{port}", error)
        finally:
            connection.close()
        return None

    def _explained(self, place: str, error: Exception) -> KafkaLost:
        reason = error.__cause__ if isinstance(error, errors.KafkaError) else error
        said = " ".join(map(str, error.args)) if isinstance(error, errors.KafkaError) else str(error)
        said = said or type(error).__name__
        kind: type[KafkaLost] = KafkaDenied
        match error, reason:
            case _, KafkaLost():
                return reason
            case _, ssl.SSLCertVerificationError():
                text = _untrusted(reason)
            case _, ssl.SSLError(reason=str(alert)) if "ALERT" in alert:
                text = (
                    f"does not accept the relay's certificate ({alert}): set RELAY_KAFKA_SSL_CERTFILE and "
                    "RELAY_KAFKA_SSL_KEYFILE to a valid one of an authority that Kafka trusts"
                )
            case errors.SaslAuthenticationFailed(), _:
                text = f"refuses the login ({said}): {self._login}"
            case errors.UnsupportedSaslMechanismError(), _:
                text = f"knows no login by {self.sasl_mechanism}: change RELAY_KAFKA_SASL_MECHANISM"
            case (errors.KafkaError(), _) | ((ssl.SSLError() | ConnectionResetError()), _):
                kind = KafkaUnreachable
                text = (
                    f"answers, and not as one does to RELAY_KAFKA_SECURITY_PROTOCOL={self.security_protocol} ({said}): "
                    "is that right, and RELAY_KAFKA_BOOTSTRAP_SERVERS?"
                )
            case _:
                kind = KafkaUnreachable
                text = f"does not answer ({said}): is it up, and RELAY_KAFKA_BOOTSTRAP_SERVERS right?"
        return kind(f"{place} {text}" + ("" if text.endswith("?") else "."))

    @property
    def _login(self) -> str:
        if self.sasl_mechanism != "OAUTHBEARER":
            return "change RELAY_KAFKA_SASL_USERNAME or RELAY_KAFKA_SASL_PASSWORD (or its file)"
        return "change RELAY_KAFKA_SASL_PASSWORD (or its file), or what RELAY_KAFKA_SASL_TOKEN_URL gives"


class _TokenProvider(AbstractTokenProvider):  # type: ignore[misc]
    def __init__(self, ask: Callable[[], Awaitable[str]]) -> None:
        self._ask = ask

    async def token(self) -> str:
        try:
            return await self._ask()
        except KafkaLost as error:
            # Whatever else is raised here ends the client's tasks.
            raise errors.AuthenticationFailedError(str(error)) from error


def _untrusted(error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code in _OTHER_NAMES:
        return (
            f"has a certificate for another name ({error.verify_message}): put a name that it has into "
            "RELAY_KAFKA_BOOTSTRAP_SERVERS, and into the brokers' advertised.listeners"
        )
    if error.verify_code == _EXPIRED:
        return "has a certificate that has expired, or its authority's in RELAY_KAFKA_SSL_CAFILE has: renew it"
    return (
        f"has a certificate that is not trusted ({error.verify_message}): set RELAY_KAFKA_SSL_CAFILE to the "
        "certificate of its authority"
    )


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raises what aiokafka raises as one of errors.KafkaLost, saying what the relay was *doing*."""
    try:
        yield
    except KafkaLost:
        raise
    except Exception as error:
        raise translation(doing, error) from error


def translation(doing: str, error: BaseException, *, of_records: bool = False) -> KafkaLost:
    """What is raised for an exception of aiokafka's: RecordsRefused only where it is *of_records*."""
    meaning = meaning_of(error)
    if meaning is RecordsRefused and not of_records:
        meaning = KafkaLost
    return meaning(f"{meaning.__doc__} While {doing}: {str(error) or type(error).__name__}")


def meaning_of(error: BaseException) -> type[KafkaLost]:
    """What an exception of aiokafka's means for the relay."""
    if isinstance(error, AssertionError):
        # aiokafka's own: of a fenced producer's state machine, or of a topic that lost partitions.
        return TopicsMissing if "partition" in str(error) else Fenced
    # A sender task that died carries its reason as the cause.
    for cause in (error, error.__cause__):
        for types, meaning in _MEANINGS:
            if isinstance(cause, types):
                return meaning
    return KafkaLost
