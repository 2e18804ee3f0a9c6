"""What `relay check` looks at in Kafka: the brokers, the topics, and what this user may do. Changes nothing there."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence

from relay.clients import connection
from relay.cluster import MAX_REPLICATION, PARTITIONS, Cluster, Topic
from relay.config import Settings
from relay.errors import KafkaDenied, KafkaLost
from relay.finding import Finding
from relay.kafka import TRANSACTIONAL_ID_PREFIX
from relay.record import RECORD_OVERHEAD
from relay.rights import TopicRights

_TIMEOUT = 30.0
_IN_SYNC = "min.insync.replicas"
_OLDEST = "message.timestamp.before.max.ms"
#: Kafka's default: the largest number that it takes.
_ANY_AGE = 2**63 - 1
_LONGEST_WAIT_MS = 30 * 24 * 3600 * 1000


async def kafka_findings(settings: Settings, topics: Sequence[str]) -> list[Finding]:
    """
    What there is to say of Kafka and of these *topics* and the watermarks'.

    Each finding that is not ok says what to run, as somebody who may, to mend it.
    """
    findings = []
    try:
        async with asyncio.timeout(_TIMEOUT):
            async for finding in _findings(settings, topics):
                findings.append(finding)  # noqa: PERF401 (what was found before an error is told, too)
    except (KafkaLost, TimeoutError) as error:
        late = f"{settings.kafka_bootstrap_servers}: no answer within {_TIMEOUT:g} s"
        findings.append(Finding(False, "kafka", str(error) or late))
    return findings


async def _findings(settings: Settings, topics: Sequence[str]) -> AsyncIterator[Finding]:
    cluster = Cluster(connection(settings))
    if fault := await cluster.fault():
        yield Finding(False, "kafka", str(fault))
        return
    yield Finding(True, "kafka", f"{settings.kafka_bootstrap_servers} answers")
    names = list(topics)
    if settings.delivery == "exactly-once":
        yield await _transactions(settings, cluster)
        names.append(settings.watermark_topic)
    brokers, rights = await cluster.rights(names)
    found = await cluster.topics()
    configs = await cluster.topic_configs([name for name in names if "DescribeConfigs" in rights[name].operations])
    for name in names:
        if not rights[name].exists or name not in found:
            yield await _missing(settings, cluster, name, rights[name], brokers)
            continue
        topic = found[name]
        faults = [
            *_denials(settings, name, rights[name]),
            *_topic_faults(settings, name, topic, brokers),
            *_config_faults(settings, name, topic, configs.get(name)),
        ]
        sound = f"{topic.partitions} partitions, {topic.replicas} replicas, may {', '.join(_needed(settings, name))}"
        for text in faults:
            yield Finding(False, f"topic {name}", text)
        if not faults:
            yield Finding(True, f"topic {name}", sound)


# --- Rights. ---


async def _transactions(settings: Settings, cluster: Cluster) -> Finding:
    # The relay's own id is known to its spool only. This one has the same beginning, which is what rights are given on.
    subject = f"transactional id {TRANSACTIONAL_ID_PREFIX}*"
    if await cluster.may_use(f"{TRANSACTIONAL_ID_PREFIX}check"):
        return Finding(True, subject, "may Write")
    option = f"--transactional-id {TRANSACTIONAL_ID_PREFIX} --resource-pattern-type prefixed"
    return Finding(False, subject, f"this user may not Write: {_grant(settings, ['Write'], option)}")


def _needed(settings: Settings, name: str) -> list[str]:
    # Not DescribeConfigs, which is for the check itself.
    return ["Read", "Write"] if name == settings.watermark_topic else ["Write"]


def _denials(settings: Settings, name: str, rights: TopicRights) -> Iterator[str]:
    if denied := [operation for operation in _needed(settings, name) if operation not in rights.operations]:
        yield f"this user may not {', '.join(denied)}: {_grant(settings, denied, f'--topic {name}')}"


async def _missing(settings: Settings, cluster: Cluster, name: str, rights: TopicRights, brokers: int) -> Finding:
    subject = f"topic {name}"
    if rights.exists is None:
        needed = [*_needed(settings, name), "DescribeConfigs"]
        grant = _grant(settings, needed, f"--topic {name}")
        return Finding(False, subject, f"hidden from this user, existing or not; it needs {', '.join(needed)}: {grant}")
    if settings.topic_create:
        try:
            await cluster.create_topics([name], {}, PARTITIONS, validate_only=True)
        except KafkaDenied:
            grant = _grant(settings, ["Create"], f"--topic {name}")
            return Finding(False, subject, f"missing, and this user may not Create it: {grant}")
        except KafkaLost as error:
            return Finding(False, subject, f"missing; {error}")
        return Finding(True, subject, "missing; `relay serve` creates it")
    options = [f"--partitions {PARTITIONS}", f"--replication-factor {min(brokers, MAX_REPLICATION)}"]
    if brokers > 1:
        options.append("--config min.insync.replicas=2")
    if name == settings.watermark_topic:
        options.append("--config cleanup.policy=compact")
    else:
        options.append(f"--config max.message.bytes={settings.max_body_bytes + RECORD_OVERHEAD}")
    create = _run(settings, "kafka-topics.sh", "--create", f"--topic {name}", *options)
    return Finding(False, subject, f"missing: {create}, or set RELAY_TOPIC_CREATE=true")


# --- Topics. ---


def _topic_faults(settings: Settings, name: str, topic: Topic, brokers: int) -> Iterator[str]:
    if topic.leaderless:
        yield f"no leader for partition {', '.join(map(str, topic.leaderless))}: bring its broker back"
    if topic.replicas < min(brokers, 2):
        move = _run(settings, "kafka-reassign-partitions.sh", "--execute --reassignment-json-file FILE")
        yield f"one replica, though there are {brokers} brokers: give each partition of {name} more in FILE and {move}"


def _config_faults(settings: Settings, name: str, topic: Topic, config: dict[str, str] | None) -> Iterator[str]:
    if config is None:
        grant = _grant(settings, ["DescribeConfigs"], f"--topic {name}")
        yield f"its settings cannot be looked at, since this user may not DescribeConfigs: {grant}"
        return
    in_sync = int(config.get("min.insync.replicas", "1"))
    if topic.replicas > 1 and in_sync < 2:
        yield f"{_IN_SYNC}={in_sync} confirms on one broker alone: {_set(settings, name, _IN_SYNC, 2)}"
    if in_sync > topic.replicas:
        least = _set(settings, name, _IN_SYNC, max(topic.replicas - 1, 1))
        yield f"{_IN_SYNC}={in_sync} of {topic.replicas} replicas can never be: {least}, or add replicas"
    policy = config.get("cleanup.policy", "delete")
    if name == settings.watermark_topic:
        if policy != "compact":
            compact = _set(settings, name, "cleanup.policy", "compact")
            yield f"cleanup.policy={policy} would forget an idle relay's watermark: {compact}"
        return
    if "compact" in policy:
        yield f"cleanup.policy={policy} keeps one record a chat: {_set(settings, name, 'cleanup.policy', 'delete')}"
    if (oldest := int(config.get(_OLDEST, _ANY_AGE))) < _LONGEST_WAIT_MS:
        yield (
            f"{_OLDEST}={oldest} refuses events that waited longer in the spool, and all behind them wait: "
            f"{_set(settings, name, _OLDEST, _ANY_AGE)}"
        )
    limit, needed = int(config.get("max.message.bytes", "1048588")), settings.max_body_bytes + RECORD_OVERHEAD
    if limit < needed:
        raised = _set(settings, name, "max.message.bytes", needed)
        yield f"max.message.bytes={limit} is less than bodies may have: {raised}, or lower RELAY_MAX_BODY_BYTES"


# --- What to run. ---


def _set(settings: Settings, topic: str, key: str, value: object) -> str:
    options = ("--alter --entity-type topics", f"--entity-name {topic}", f"--add-config {key}={value}")
    return _run(settings, "kafka-configs.sh", *options)


def _grant(settings: Settings, operations: Sequence[str], resource: str) -> str:
    # Whom a certificate or a token names, the broker's own rules say.
    named = settings.kafka_security_protocol.startswith("SASL") and settings.kafka_sasl_mechanism != "OAUTHBEARER"
    user = settings.kafka_sasl_username if named else "NAME"
    allowed = " ".join(f"--operation {operation}" for operation in operations)
    return _run(settings, "kafka-acls.sh", f"--add --allow-principal User:{user}", allowed, resource)


def _run(settings: Settings, tool: str, *options: str) -> str:
    return f"run `{' '.join([tool, '--bootstrap-server', settings.kafka_bootstrap_servers, *options])}`"
