"""`relay schemas`: which subjects the schemas have, and what the registry says of them or is given."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple

from relay.auth import Tokens
from relay.clients import registry
from relay.config import Settings
from relay.errors import RegistryError, RegistryUnreachable, SchemaIncompatible, SettingsInvalid
from relay.framer import wanted
from relay.framing import Registered, Registration
from relay.record import Topics
from relay.registry import Registry, Standing, Verdict
from relay.schemas import Schemas


class Listed(NamedTuple):
    """One schema of this relay."""

    type: str
    ce_type: str
    uri: str
    #: The file's name.
    file: str
    subjects: list[str]


class Outcome(NamedTuple):
    """What the registry said of one subject."""

    ok: bool
    subject: str
    #: For people.
    text: str
    #: None if the registry said nothing of it.
    standing: Standing | None = None
    found: Registered | None = None

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return {
            "ok": self.ok,
            "subject": self.subject,
            "standing": self.standing,
            "id": self.found and self.found.id,
            "version": self.found and self.found.version,
            "text": self.text,
        }


def listed(settings: Settings) -> list[Listed]:
    """The schemas in force with their subjects; asks nobody."""
    topics, workspaces, schemas = _sources(settings)
    return [
        Listed(
            schema.rocketchat_type,
            schema.ce_type,
            schema.uri,
            f"{schema.name}.json",
            [it.subject for it in wanted(settings.subject_strategy, topics, workspaces, [schema])],
        )
        for schema in schemas
    ]


def checked(settings: Settings) -> AsyncIterator[Outcome]:
    """
    What registering each would come to; changes nothing.

    Raises: SettingsInvalid, RegistryUnreachable.
    """
    return _each(settings, _check)


def registered(settings: Settings) -> AsyncIterator[Outcome]:
    """
    Registers each that is not, whatever RELAY_SCHEMA_REGISTER says.

    Raises: SettingsInvalid, RegistryUnreachable.
    """
    return _each(settings, _register)


async def _check(client: Registry, it: Registration) -> Outcome:
    return _told(await client.check(it.subject, it.text))


async def _register(client: Registry, it: Registration) -> Outcome:
    try:
        found = await client.register(it.subject, it.text)
    except SchemaIncompatible:
        # Why, most registries tell to who asks for it only.
        return _told(await client.check(it.subject, it.text))
    return _told(Verdict.registered(found))


def _told(verdict: Verdict) -> Outcome:
    ok = verdict.standing is not Standing.INCOMPATIBLE
    return Outcome(ok, verdict.subject, verdict.text, verdict.standing, verdict.found)


async def _each(
    settings: Settings, ask: Callable[[Registry, Registration], Awaitable[Outcome]]
) -> AsyncIterator[Outcome]:
    client = registry(settings)
    if client is None:
        raise SettingsInvalid(["RELAY_SCHEMA_REGISTRY_URL: set it to the base URL of the schema registry."])
    async with client:
        for it in wanted(settings.subject_strategy, *_sources(settings)):
            try:
                outcome = await ask(client, it)
            except RegistryUnreachable:
                raise  # The others would only take as long to fail.
            except RegistryError as error:
                outcome = Outcome(False, it.subject, f"{type(error).__doc__} {error.reason}")
            yield outcome


def _sources(settings: Settings) -> tuple[Topics, list[str], Schemas]:
    try:
        tokens = Tokens(settings.token, settings.workspaces_dir)
    except (OSError, ValueError) as error:
        raise SettingsInvalid([str(error)]) from error
    schemas = Schemas.load(settings.schemas_dir)
    topics = Topics(settings.topic, settings.dead_letter_topic, schemas.types)
    topics.check(tokens.workspaces, settings.watermark_topic)
    return topics, tokens.workspaces, schemas
