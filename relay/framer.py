"""Frames each event by the schema that judged it; judges anew those whose schema is gone."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from relay.errors import BadJson
from relay.event import DeadLetterReason, Delivery, Event, event_type
from relay.framing import Described, Frame, Registration, Strategy, registrations, subject
from relay.record import Topics
from relay.schema_ids import SchemaIds


class Schema(Described, Protocol):
    """schemas.Schema."""

    @property
    def rocketchat_type(self) -> str:
        """Rocket.Chat's name for the type of event."""


def wanted(
    strategy: Strategy, topics: Topics, workspaces: Iterable[str], schemas: Iterable[Schema]
) -> list[Registration]:
    """What a registry is to have for the events of these *workspaces*."""
    described = list(schemas)
    return registrations(
        strategy,
        [(topics.of(workspace, schema.rocketchat_type), schema) for workspace in workspaces for schema in described],
    )


class Framer:
    """What RecordMaker and Publisher ask of the schema ids."""

    def __init__(
        self,
        ids: SchemaIds,
        topics: Topics,
        strategy: Strategy,
        fingerprints: Mapping[str, str],
        judge: Callable[[str, object], str | None] | None,
        *,
        enforce: bool,
        retired: set[str] | None = None,
    ) -> None:
        """
        *fingerprints* are those in force, by type; without *judge* nothing is judged. To *retired* each workspace is
        added whose events wait for an id that is not wanted: it is no longer in the settings.
        """
        self._ids = ids
        self._topics = topics
        self._strategy = strategy
        self._fingerprints = fingerprints
        self._judge = judge
        self._enforce = enforce
        self._retired = set() if retired is None else retired

    def frame(self, topic: str, event: Event) -> Frame | None:
        """The frame of an event on *topic*, or None as long as its schema's id is not known."""
        return self._ids.frame(self._subject(topic, event), event.schema)

    def settle(self, event: Event) -> Event:
        """*event*, judged by the schema in force if the one that judged it is gone."""
        current = self._fingerprints.get(event.type, "")
        name = self._subject(self._topics.of(event.workspace, event.type), event)
        if event.workspace not in self._retired and not self._ids.wants(name):
            self._retired.add(event.workspace)
            self._ids.look_again()
        if event.schema == current or not self._ids.gone(name, event.schema):
            return event
        event = event._replace(schema=current, detail=None)
        if self._judge is None:
            return event
        try:
            fault = self._judge(event.type, Delivery(event.workspace, event.body, 0).parse())
        except BadJson as error:
            fault = str(error)
        if fault is None:
            return event
        return event._replace(detail=fault, reason=DeadLetterReason.SCHEMA if self._enforce else None)

    async def more(self) -> None:
        """Returns when schema ids may have become known."""
        await self._ids.changed()

    def _subject(self, topic: str, event: Event) -> str:
        return subject(self._strategy, topic, event_type(event.type, self._topics.types).ce_type)
