"""`relay check`: would it work? Every finding is ok, or says what to do. Changes nothing."""

import os
from collections.abc import AsyncIterator

from relay.auth import Tokens
from relay.check_kafka import kafka_findings
from relay.config import Settings
from relay.errors import GuidMissing, RegistryUnreachable
from relay.finding import Finding
from relay.framing import frame
from relay.record import Topics
from relay.registry import Standing
from relay.schemas import Schemas
from relay.subjects import Outcome, checked


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
    for finding in await kafka_findings(settings, topics.all(tokens.workspaces)):
        yield finding


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
