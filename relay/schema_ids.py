"""
The schema ids that records are framed with: got from the registry, kept in the spool, got again for ever.

What was learnt last time is used only once the registry has failed to answer: an emptied registry gives other ids.
Between two answers the ids stand still; nothing here ever waits for Kafka.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Protocol, Self

from relay.errors import RegistryError, RegistryUnreachable, RelayError, SchemaMissing
from relay.framing import Frame, Framing, KnownId, Registered, Registration, frame
from relay.metrics import Metrics

log = logging.getLogger(__name__)

#: Seconds of backoff, with jitter, after the first failure and at most.
FIRST_BACKOFF, MAX_BACKOFF = 0.2, 15.0
#: Seconds after which known ids are looked up again.
REFRESH = 300.0


class Memory(Protocol):
    """Where ids outlive the process."""

    @property
    def schema_ids(self) -> Sequence[KnownId]:
        """All that are kept from earlier runs."""

    async def remember(self, ids: Sequence[KnownId], *, forget: str | None = None) -> None:
        """Keeps *ids*, in place of all that are kept of the registry *forget*. Raises: RelayError."""


class Client(Protocol):
    """registry.Registry."""

    url: str

    async def __aenter__(self) -> Self:
        """Opens it."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""

    async def register(self, subject: str, text: str) -> Registered:
        """Raises: RegistryError."""

    async def look_up(self, subject: str, text: str) -> Registered:
        """Raises: RegistryError."""


class SchemaIds:
    """The frames of every schema that events may have been judged by."""

    def __init__(
        self,
        client: Client,
        memory: Memory,
        *,
        framing: Framing,
        register: bool,
        wanted: Callable[[], Iterable[Registration]],
        metrics: Metrics,
    ) -> None:
        self._client = client
        self._memory = memory
        self._framing = framing
        self._register = register
        self._wanted = wanted
        self._metrics = metrics
        self._frames: dict[tuple[str, str], Frame] = {}
        #: What the registry has said in the round that is under way, or was last.
        self._confirmed: dict[tuple[str, str], KnownId] = {}
        self._recalled = False
        #: Whether what the memory holds of this registry is of no more use.
        self._emptied = False
        #: Learnt, and not yet in the memory.
        self._unkept: list[KnownId] = []
        self._changed = asyncio.Event()
        self._look = asyncio.Event()
        #: What is wrong with the registry, by subject; empty while all is well.
        self.errors: dict[str, str] = {}
        #: Whether every id is as the registry said it last.
        self.connected = False

    def frame(self, subject: str, fingerprint: str) -> Frame | None:
        """How records with that schema are framed, or None as long as that is not known."""
        return self._frames.get((subject, fingerprint))

    def gone(self, subject: str, fingerprint: str) -> bool:
        """Whether that schema's id will never be known: it is not in use any more, and nothing is kept of it."""
        return (
            self._recalled
            and (subject, fingerprint) not in self._frames
            and not any(it.subject == subject and fingerprint in it.fingerprints for it in self._wanted())
        )

    def wants(self, subject: str) -> bool:
        """Whether the registry is asked for that subject."""
        return any(it.subject == subject for it in self._wanted())

    async def changed(self) -> None:
        """Returns when more has become known, or the same has failed to."""
        self._changed.clear()
        await self._changed.wait()

    def look_again(self) -> None:
        """Asks the registry now: there may be more workspaces, so more subjects."""
        self._look.set()

    async def run(self) -> None:
        """Learns for ever; ends only by being cancelled."""
        failures = 0
        while True:
            self._look.clear()
            await self.learn()
            failures = failures + 1 if self.errors else 0
            limit = REFRESH if not failures else min(MAX_BACKOFF, FIRST_BACKOFF * 2.0 ** min(failures - 1, 10))
            try:
                async with asyncio.timeout(random.uniform(limit / 2, limit)):  # noqa: S311
                    await self._look.wait()
            except TimeoutError:
                pass

    async def learn(self) -> None:
        """Asks the registry once; `errors` says what is wrong, if anything is."""
        errors: dict[str, str] = {}
        self._confirmed = {}
        async with self._client:
            for wanted in self._wanted():
                try:
                    await self._ask(wanted)
                except RegistryUnreachable as error:
                    errors[wanted.subject] = str(error)
                    break  # The others would only take as long to fail.
                except RegistryError as error:
                    errors[wanted.subject] = str(error)
        self._recall()  # Not before the registry was asked: those of older schemas, or all while it is away.
        self._say(errors)
        self._changed.set()
        await self._keep()

    async def _ask(self, wanted: Registration) -> None:
        ask = self._client.register if self._register else self._client.look_up
        try:
            registered = await ask(wanted.subject, wanted.text)
        except SchemaMissing as error:
            raise SchemaMissing(wanted.subject, f"{error.reason}; RELAY_SCHEMA_REGISTER=false: register it") from error
        made = frame(self._framing, registered)
        if self._frames.get((wanted.subject, wanted.fingerprint), made) != made:
            log.warning(
                "The schema registry gives another id for subject %s than before: %d. Was it emptied?",
                wanted.subject,
                registered.id,
                extra={"action": "schema_ids_changed", "subject": wanted.subject, "id": registered.id},
            )
            self._forget()
        for fingerprint in {*wanted.fingerprints, wanted.fingerprint}:
            place = wanted.subject, fingerprint
            known = KnownId(self._client.url, *place, registered.id, registered.guid)
            self._confirmed[place] = known
            if self._frames.get(place) != made:
                self._frames[place] = made
                self._unkept.append(known)

    def _forget(self) -> None:
        """Drops what is known from before the registry was emptied: those ids may be other schemas' by now."""
        self._frames = {place: made for place, made in self._frames.items() if place in self._confirmed}
        self._unkept = [*self._confirmed.values()]
        self._emptied = True

    def _recall(self) -> None:
        """Takes up what is kept, where the registry has not said anything newer, unless it was emptied since."""
        if self._recalled:
            return
        self._recalled = True
        kept = [it for it in self._memory.schema_ids if it.registry == self._client.url]
        kept = [it for it in kept if self._framing != "header" or it.guid is not None]
        frames = {
            (it.subject, it.fingerprint): frame(self._framing, Registered(it.subject, it.id, it.guid)) for it in kept
        }
        known = {(it.subject, it.fingerprint) for it in self._wanted()} & self._frames.keys()
        if any(frames.get(place, self._frames[place]) != self._frames[place] for place in known):
            log.warning(
                "The schema registry gives other ids than those kept: it was emptied, and they are of no more use.",
                extra={"action": "schema_ids_changed"},
            )
            self._forget()  # Kept, they would be taken up at the next start, beside ids that match again.
            return
        self._frames = {**frames, **self._frames}

    async def _keep(self) -> None:
        if not (self._unkept or self._emptied):
            return
        try:
            await self._memory.remember(self._unkept, forget=self._client.url if self._emptied else None)
            self._unkept, self._emptied = [], False
        except RelayError as error:
            log.warning("Schema ids are not kept yet: %s", error, extra={"action": "schema_ids_not_kept"})

    def _say(self, errors: dict[str, str]) -> None:
        for subject, text in errors.items():
            if self.errors.get(subject) != text:
                log.warning(
                    "Schema ids are missing or old: %s", text, extra={"action": "registry_failed", "subject": subject}
                )
        if not errors and not self.connected:
            log.info("Every schema id is known.", extra={"action": "registry_connected"})
        self.errors, self.connected = errors, not errors
        self._metrics.registry_connected.set(self.connected)
