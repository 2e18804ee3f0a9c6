"""`relay check`: would it work? Every finding is ok, or says what to do. Changes nothing."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import NamedTuple

from relay.auth import Tokens
from relay.clients import connection
from relay.cluster import Cluster, Topic
from relay.config import Settings
from relay.errors import GuidMissing, KafkaLost, RegistryUnreachable
from relay.framing import frame
from relay.record import RECORD_OVERHEAD, Topics
from relay.registry import Standing
from relay.schemas import Schemas
from relay.subjects import Outcome, checked


class Finding(NamedTuple):
    """One thing that was looked at."""

    ok: bool
    subject: str
    #: What was found; if it is not ok, what to do.
    text: str


async def check(settings: Settings) -> list[Finding]:
    """Looks at everything that *settings* point to; each is given a few seconds."""
    return [finding async for finding in _findings(settings)]


async def _findings(settings: Settings) -> AsyncIterator[Finding]:
    yield Finding(True, "settings", "understood")
    try:
        tokens = Tokens(settings.token, settings.workspaces_dir)
    except (OSError, ValueError) as error:
        yield Finding(False, "tokens", str(error))
        return
    yield Finding(True, "tokens", f"workspaces: {', '.join(tokens.workspaces)}")
    schemas = Schemas.load(settings.schemas_dir)
    yield Finding(True, "schemas", f"{len(schemas)} event types")
    topics = Topics(settings.topic, settings.dead_letter_topic, schemas.types)
    topics.check(tokens.workspaces, settings.watermark_topic)
    if settings.ack == "spool":
        yield _spool(settings)
    if settings.schema_registry_url:
        try:
            async for outcome in checked(settings):
                yield _subject(settings, outcome)
        except RegistryUnreachable as error:
            yield Finding(False, "registry", str(error.reason))
    cluster = Cluster(connection(settings))
    try:
        async with asyncio.timeout(15):
            found = await cluster.topics()
    except (KafkaLost, TimeoutError) as error:
        yield Finding(False, "kafka", f"{settings.kafka_bootstrap_servers}: {str(error) or 'no answer within 15 s'}")
        return
    yield Finding(True, "kafka", f"{settings.kafka_bootstrap_servers} answers")
    names = topics.all(tokens.workspaces)
    if settings.delivery == "exactly-once":
        names.append(settings.watermark_topic)
    configs = await cluster.topic_configs([name for name in names if name in found])
    for name in names:
        if name not in found:
            yield _missing(settings, name)
            continue
        faults = list(_topic_faults(settings, name, found[name], configs[name]))
        topic = found[name]
        sound = f"{topic.partitions} partitions, {topic.replicas} replicas"
        yield Finding(not faults, f"topic {name}", "; ".join(faults) or sound)


def _spool(settings: Settings) -> Finding:
    directory = settings.spool_path.parent
    existing = next(path for path in (directory, *directory.resolve().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        return Finding(
            False, "spool", f"{existing} cannot be written: give this user the right, or set RELAY_SPOOL_PATH."
        )
    return Finding(True, "spool", f"{settings.spool_path} can be written")


def _subject(settings: Settings, outcome: Outcome) -> Finding:
    ok, text = outcome.ok, outcome.text
    if outcome.standing in {Standing.NEW, Standing.COMPATIBLE}:
        ok = settings.schema_register
        text = f"not registered yet; `relay {'serve' if ok else 'schemas register'}` registers it"
    if outcome.found:
        try:
            frame(settings.schema_framing, outcome.found)
        except GuidMissing as error:
            ok, text = False, str(error.reason)
    return Finding(ok, f"subject {outcome.subject}", text)


def _missing(settings: Settings, name: str) -> Finding:
    if settings.topic_create:
        return Finding(True, f"topic {name}", "missing; `relay serve` creates it")
    return Finding(
        False, f"topic {name}", "missing, or hidden from this user: create it, or set RELAY_TOPIC_CREATE=true"
    )


def _topic_faults(settings: Settings, name: str, topic: Topic, config: dict[str, str]) -> list[str]:
    faults = []
    if topic.leaderless:
        faults.append(f"no leader for partition {', '.join(map(str, topic.leaderless))}: bring its broker back")
    in_sync = int(config.get("min.insync.replicas", "1"))
    if topic.replicas > 1 and in_sync < 2:
        faults.append(f"min.insync.replicas={in_sync} confirms on one broker alone: set it to 2")
    if in_sync > topic.replicas:
        faults.append(
            f"min.insync.replicas={in_sync} of {topic.replicas} replicas can never be: lower it, or add replicas"
        )
    policy = config.get("cleanup.policy", "delete")
    if name == settings.watermark_topic:
        if "compact" not in policy:
            faults.append(f"cleanup.policy={policy} would forget a watermark: set it to compact")
        return faults
    if "compact" in policy:
        faults.append(f"cleanup.policy={policy} keeps one record a chat: set it to delete")
    limit = int(config.get("max.message.bytes", "1048588"))
    if limit < settings.max_body_bytes + RECORD_OVERHEAD:
        faults.append(
            f"max.message.bytes={limit} is less than bodies may have: set it to "
            f"{settings.max_body_bytes + RECORD_OVERHEAD} or more, or lower RELAY_MAX_BODY_BYTES"
        )
    return faults
