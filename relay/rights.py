"""
What the user that the relay is may do on Kafka: asked in a way that changes nothing there.

The broker says of a topic what this user may do with it, if it may describe it at all; else it hides it. It says of a
transactional id nothing, but refuses the end of a transaction before it looks whether there is one.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

from aiokafka import errors
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.transaction import EndTxnRequest
from aiokafka.protocol.types import Array, Boolean, Int16, Int32, Schema, String

#: The bits of Kafka's AclOperation that a relay needs, by the names of its command line.
_OPERATIONS = {3: "Read", 4: "Write", 5: "Create", 8: "Describe", 10: "DescribeConfigs"}
#: Of no producer, so that no transaction can be its.
_NOBODY = (-1, -1)


class TopicRights(NamedTuple):
    """How this user stands with a topic."""

    #: Whether it exists; None if it is hidden, existing or not.
    exists: bool | None
    #: Kafka's names of what this user may do with it; of a hidden one nothing is known.
    operations: frozenset[str]


async def topic_rights(admin: AIOKafkaAdminClient, names: Collection[str]) -> tuple[int, dict[str, TopicRights]]:
    """How many brokers there are, and how this user stands with the topics of these *names*."""
    answer = await admin._send_request(_MetadataRequest(names))  # noqa: SLF001
    found = {}
    for code, name, _internal, _partitions, bits in answer.topics:
        if code == errors.TopicAuthorizationFailedError.errno:
            found[name] = TopicRights(None, frozenset())
        else:
            exists = code != errors.UnknownTopicOrPartitionError.errno
            operations = frozenset(operation for bit, operation in _OPERATIONS.items() if bits >> bit & 1)
            found[name] = TopicRights(exists, operations)
    return len(answer.brokers), found


async def may_use_transactional_id(admin: AIOKafkaAdminClient, transactional_id: str) -> bool:
    """Whether this user has the right Write on it."""
    answer = await admin._send_request(EndTxnRequest(transactional_id, *_NOBODY, transaction_result=False))  # noqa: SLF001
    return bool(answer.error_code != errors.TransactionalIdAuthorizationFailed.errno)


# --- aiokafka has this request up to version 5 only, and that can create a topic and knows of no rights. ---


class _MetadataResponse(Response):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            Array(("node_id", Int32), ("host", String("utf-8")), ("port", Int32), ("rack", String("utf-8"))),
        ),
        ("cluster_id", String("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            Array(
                ("error_code", Int16),
                ("topic", String("utf-8")),
                ("is_internal", Boolean),
                (
                    "partitions",
                    Array(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", Array(Int32)),
                        ("isr", Array(Int32)),
                        ("offline_replicas", Array(Int32)),
                    ),
                ),
                ("authorized_operations", Int32),
            ),
        ),
        ("cluster_authorized_operations", Int32),
    )


class _MetadataRequestStruct(RequestStruct):  # type: ignore[misc]
    API_KEY = 3
    API_VERSION = 8
    RESPONSE_TYPE = _MetadataResponse
    SCHEMA = Schema(
        ("topics", Array(String("utf-8"))),
        ("allow_auto_topic_creation", Boolean),
        ("include_cluster_authorized_operations", Boolean),
        ("include_topic_authorized_operations", Boolean),
    )


class _MetadataRequest(Request[_MetadataRequestStruct]):  # type: ignore[misc]
    API_KEY = 3

    def __init__(self, topics: Collection[str]) -> None:
        self._topics = list(topics)

    def build(self, request_struct_class: type[_MetadataRequestStruct]) -> Any:
        return request_struct_class(self._topics, False, False, True)
