"""Every exception of the relay, grouped by what its catcher does next. A docstring is the default message."""

from collections.abc import Sequence
from typing import ClassVar


class RelayError(Exception):
    """The relay could not do what was asked."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message or type(self).__doc__)


# --- Mend what is named and start again: the command ends with exit code 2. ---


class SettingsInvalid(RelayError):
    """The settings cannot be used."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


class SchemasInvalid(SettingsInvalid):
    """The schema files cannot be used."""


class SpoolUnusable(RelayError):
    """The spool file cannot be opened."""


class SpoolInUse(SpoolUnusable):
    """Another process owns the spool."""


class SpoolMissing(SpoolUnusable):
    """There is no spool."""


class DeadMissing(RelayError):
    """The spool has no such dead event."""

    def __init__(self, sequences: Sequence[int]) -> None:
        named = ", ".join(map(str, sequences))
        super().__init__(f"The spool has no dead event {named}: `relay dead list` shows those that there are.")


# --- Look again later: it may come back. ---


class AdminUnreachable(RelayError):
    """The relay's admin port does not answer."""


# --- Refuse the delivery: ingress.py answers with the status that stands beside each in its table. ---


class Rejected(RelayError):
    """The delivery was not accepted."""

    #: The value of the label `reason` in `relay_events_rejected_total`.
    reason: ClassVar[str]


class BadToken(Rejected):
    """The token is missing or wrong, or the workspace is unknown."""

    reason = "bad_token"


class BadJson(Rejected):
    """The body is not a JSON object, or is truncated."""

    reason = "bad_json"


class TooLarge(Rejected):
    """The body is larger than RELAY_MAX_BODY_BYTES."""

    reason = "too_large"


class ClientDisconnected(Rejected):
    """The sender broke the connection before its request was complete."""

    reason = "client_disconnected"


class Unavailable(Rejected):
    """The event cannot be made durable now; send it again later."""


class SpoolFull(Unavailable):
    """The spool is full: raise RELAY_SPOOL_MAX_BYTES, or bring Kafka back so that it empties."""

    reason = "spool_full"


class SpoolFailed(Unavailable):
    """The spool cannot be written: look at its disk."""

    reason = "spool_error"


class KafkaUnavailable(Unavailable):
    """Kafka did not confirm the event in time."""

    reason = "kafka_unavailable"


class Draining(Unavailable):
    """The relay is shutting down."""

    reason = "draining"


# --- Publishing: keep everything, and ... ---


class KafkaLost(RelayError):
    """The producer is of no more use: close it, wait, and start a new one."""

    #: The value of the label `error` in `relay_publish_errors_total`.
    label: ClassVar[str] = "other"


class KafkaUnreachable(KafkaLost):
    """No broker answers."""

    label = "unreachable"


class KafkaTimeout(KafkaLost):
    """Kafka did not answer in time."""

    label = "timeout"


class KafkaDenied(KafkaLost):
    """Kafka refuses the relay's rights or login: `relay check` says which."""

    label = "denied"


class TopicsMissing(KafkaLost):
    """A topic does not exist."""

    label = "topic_missing"


class PartitionLeaderless(KafkaLost):
    """A partition has no leader."""

    label = "no_leader"


class TimeRefused(KafkaLost):
    """Kafka refuses events for their time: see to the clocks, and to the topic's message.timestamp.before.max.ms."""


class Fenced(KafkaLost):
    """Another producer with the same transactional id took over."""

    label = "fenced"


class RecordsRefused(KafkaLost):
    """Kafka refused records for themselves."""

    label = "refused"
    #: The places, among what was published, of each batch that was refused; empty if Kafka did not say which.
    batches: Sequence[Sequence[int]] = ()
    #: Whether for their size, and so whatever state the broker is in.
    for_size = False


# --- Schema ids: keep everything, wait, and ask the registry again. ---


class RegistryError(RelayError):
    """The schema registry gave no schema id."""

    def __init__(self, subject: str, reason: str = "") -> None:
        place = f"Subject {subject}" if subject else ""
        super().__init__(" ".join(filter(None, (type(self).__doc__, ": ".join(filter(None, (place, reason)))))))
        #: What was asked about; empty if it was not about one subject.
        self.subject = subject
        self.reason = reason


class RegistryUnreachable(RegistryError):
    """The schema registry does not answer."""


class RegistryFailed(RegistryError):
    """The schema registry does not do what was asked."""


class RegistryNotThere(RegistryFailed):
    """Something without this part of a schema registry's API answers: is RELAY_SCHEMA_REGISTRY_URL right?"""


class RegistryRefused(RegistryError):
    """The schema registry refuses the relay's rights or password."""


class SchemaMissing(RegistryError):
    """The schema registry does not have this schema."""

    def __init__(self, subject: str, reason: str = "", *, new_subject: bool = False) -> None:
        super().__init__(subject, reason)
        #: Whether the subject does not exist either.
        self.new_subject = new_subject


class SchemaIncompatible(RegistryError):
    """The schema registry finds this schema incompatible with the subject's earlier ones."""


class SchemaRefused(RegistryError):
    """The schema registry takes this for no valid schema."""


class GuidMissing(RegistryError):
    """The schema registry gives no GUIDs, which `header` framing needs."""
