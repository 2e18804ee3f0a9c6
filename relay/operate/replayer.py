"""
Judges the dead letters of the topic again and publishes those that are valid now, once.

A replayed event and the mark that says so are written in one transaction. The transactional id belongs to the topic, so
that each run fences the one before; whatever that one committed it has marked, and the marks are read only then.
"""

import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from enum import StrEnum
from typing import NamedTuple

from relay.auth import Tokens
from relay.clients import connection, registry
from relay.cluster import Cluster
from relay.config import Settings
from relay.errors import RecordsRefused, SettingsInvalid, TopicsMissing
from relay.event import Event
from relay.framer import Framer, wanted
from relay.framing import fingerprint
from relay.kafka import Producer, TopicPlan
from relay.memory import MemoryQueue
from relay.metrics import Metrics
from relay.operate.letters import Judge, Letter, Marks, mark
from relay.reader import Found, Reader
from relay.record import RecordMaker, Topics
from relay.schema_ids import SchemaIds
from relay.schemas import Schemas

log = logging.getLogger(__name__)

#: Dead letters in one transaction, and about the bytes of their bodies.
BATCH, BATCH_BYTES = 1_000, 2 << 20

OnProgress = Callable[[int, int], None]


class Left(StrEnum):
    """Why a dead letter is left where it is."""

    SCHEMA = "schema"
    UNKNOWN_TYPE = "unknown_type"
    NO_KEY = "no_key"
    REJECTED_BY_KAFKA = "rejected_by_kafka"
    FOREIGN = "foreign"
    NO_TOPIC = "no_topic"
    NO_SCHEMA_ID = "no_schema_id"
    REFUSED = "refused"


MEANINGS = {
    Left.SCHEMA: "still break their schema",
    Left.UNKNOWN_TYPE: "still of a type without a schema",
    Left.NO_KEY: "still without a chat",
    Left.REJECTED_BY_KAFKA: "only announced here: their bodies are in a spool, for `relay dead requeue`",
    Left.FOREIGN: "not written by a relay",
    Left.NO_TOPIC: "valid, but their topic is missing in Kafka, or their workspace in RELAY_WORKSPACES_DIR",
    Left.NO_SCHEMA_ID: "valid, but the schema registry gave no id for their schema",
    Left.REFUSED: "valid, but Kafka refuses them for themselves: too large?",
}
#: What is not as it should be, unlike a dead letter that is one still.
_FAILURES = {Left.NO_TOPIC, Left.NO_SCHEMA_ID, Left.REFUSED}


class Ready(NamedTuple):
    """A dead letter that is valid now, with its event."""

    letter: Letter
    sequence: int
    event: Event


class Replay:
    """One run over the dead-letter topic of *settings*, and what came of it."""

    def __init__(self, settings: Settings, on_progress: OnProgress = lambda _done, _total: None) -> None:
        """Raises: SettingsInvalid."""
        try:
            workspaces = Tokens(settings.token, settings.workspaces_dir).workspaces
        except (OSError, ValueError) as error:
            raise SettingsInvalid([str(error)]) from error
        schemas = Schemas.load(settings.schemas_dir)
        fingerprints = {it.rocketchat_type: fingerprint(it.text) for it in schemas}
        self._settings = settings
        self._on_progress = on_progress
        self._topics = topics = Topics(settings.topic, settings.dead_letter_topic, schemas.types)
        topics.check(workspaces, settings.watermark_topic)
        self._destinations = set(topics.all(workspaces)) - {settings.dead_letter_topic}
        self._judge = Judge(schemas, fingerprints, settings.schema_validation)
        self._ids: SchemaIds | None = None
        framer = None
        client = registry(settings)
        if client is not None and settings.schema_framing != "none":
            strategy = settings.subject_strategy
            self._ids = SchemaIds(
                client,
                MemoryQueue(dedupe_seconds=0),
                framing=settings.schema_framing,
                register=settings.schema_register,
                wanted=lambda: wanted(strategy, topics, workspaces, schemas),
                metrics=Metrics(),
            )
            framer = Framer(self._ids, topics, strategy, fingerprints, None, enforce=True)
        self._records = RecordMaker(topics, {it.rocketchat_type: it.uri for it in schemas}.get, framer)
        self._producer: Producer | None = None
        self._reader: Reader
        self._partition = 0
        #: Of the partition that is at hand, and up to where they were read.
        self._marks = Marks()
        self._marked_to = 0
        self._done = self._total = 0
        #: Dead letters that were looked at.
        self.read = 0
        self.replayed = 0
        #: Those that were replayed by an earlier run.
        self.before = 0
        self.left: Counter[Left] = Counter()

    @property
    def complete(self) -> bool:
        """Whether all that is valid now is on its topic."""
        return not any(self.left[reason] for reason in _FAILURES)

    async def run(self, *, dry: bool) -> None:
        """
        Replays what can be; *dry* changes nothing, and counts as replayed what would be.

        Raises: KafkaLost. What was replayed until then is, and is marked.
        """
        place = connection(self._settings)
        topic = self._settings.dead_letter_topic
        found = await Cluster(place).topics()
        if topic not in found:
            raise TopicsMissing(f"There is no topic {topic}. Is the relay's RELAY_DEAD_LETTER_TOPIC another one?")
        self._destinations &= found.keys()
        if self._ids and not dry:
            await self._ids.learn()
        try:
            if not dry:
                await self._start()
            self._reader = Reader(place, topic, found[topic].partitions)
            self._total = 2 * sum(map(len, await self._reader.spans()))
            for self._partition in range(found[topic].partitions):
                await self._replay_partition(dry=dry)
        finally:
            if self._producer:
                await self._producer.close()

    async def _start(self) -> None:
        settings = self._settings
        plan = TopicPlan([settings.dead_letter_topic], None, create=False, max_message_bytes=0)
        compression = None if settings.kafka_compression == "none" else settings.kafka_compression
        identity = f"replay-{settings.dead_letter_topic}"
        self._producer = Producer(connection(settings), plan, identity, compression, transactional=True)
        await self._producer.start()

    # --- One partition: its marks, then its letters. ---

    async def _replay_partition(self, *, dry: bool) -> None:
        # Looked for after the last start: only that ends what another run has under way.
        offsets = (await self._reader.spans())[self._partition]
        self._marks, self._marked_to = Marks(), offsets.start
        await self._read_marks(offsets.stop)
        batch: list[Ready] = []
        size = 0
        async with aclosing(self._records_at(offsets)) as records:
            async for found in records:
                ready = self._look_at(found)
                if ready is None:
                    continue
                if batch and (len(batch) >= BATCH or size + len(found.value) > BATCH_BYTES):
                    await self._publish(batch, dry=dry)
                    batch, size = [], 0
                batch.append(ready)
                size += len(found.value)
        await self._publish(batch, dry=dry)

    async def _read_marks(self, end: int) -> None:
        async with aclosing(self._records_at(range(self._marked_to, end))) as records:
            async for found in records:
                if (letter := Letter.of(found)) and letter.is_mark:
                    self._marks.add(letter.identity)
        self._marked_to = end

    async def _records_at(self, offsets: range) -> AsyncGenerator[Found, None]:
        reached = offsets.start
        async with aclosing(self._reader.pages(self._partition, offsets)) as pages:
            async for page in pages:
                for found in page:
                    yield found
                self._progress(page[-1].offset + 1 - reached)
                reached = page[-1].offset + 1
        self._progress(offsets.stop - reached)

    def _progress(self, records: int) -> None:
        self._done += records
        self._on_progress(min(self._done, self._total), self._total)

    def _look_at(self, found: Found) -> Ready | None:
        """The letter there, if it can be published now; whatever else it is, is counted."""
        letter = Letter.of(found)
        if letter is not None and letter.is_mark:
            return None
        self.read += 1
        try:
            outcome = Left.FOREIGN if letter is None else self._outcome(letter)
        except (ValueError, OverflowError):
            outcome = Left.FOREIGN
        if isinstance(outcome, Ready):
            return outcome
        if outcome is None:
            self.before += 1
        else:
            self.left[outcome] += 1
        return None

    def _outcome(self, letter: Letter) -> Ready | Left | None:
        if letter.is_announcement:
            return Left.REJECTED_BY_KAFKA
        if letter.identity in self._marks:
            return None
        sequence, event = self._judge.event(letter)
        if event.reason is not None:
            return Left(event.reason)
        if self._topics.of(event.workspace, event.type) not in self._destinations:
            return Left.NO_TOPIC
        if self._producer and not self._records.ready(event):
            return Left.NO_SCHEMA_ID
        return Ready(letter, sequence, event)

    # --- Publishing. ---

    async def _publish(self, batch: Sequence[Ready], *, dry: bool) -> None:
        # A topic of at least once may hold a letter twice.
        letters = {it.letter.identity: it for it in batch if it.letter.identity not in self._marks}
        if not dry:
            try:
                await self._write([*letters.values()])
            except RecordsRefused as error:
                await self._isolate([*letters.values()], error)
                return
        for identity in letters:
            self._marks.add(identity)
        self.replayed += len(letters)
        self.before += len(batch) - len(letters)

    async def _write(self, letters: Iterable[Ready]) -> None:
        assert self._producer is not None, "a dry run writes nothing"
        now = time.time_ns() // 1_000_000
        records = []
        for letter, sequence, event in letters:
            record = self._records.record(sequence, event, now)
            records += [record, mark(letter, record._replace(topic=self._topics.dead_letters), now)]
        if records:
            await self._producer.publish(records)

    async def _isolate(self, letters: Sequence[Ready], error: RecordsRefused) -> None:
        """Goes on after a refusal with each half, until the letter that is refused is alone."""
        assert self._producer is not None, "a dry run writes nothing"
        await self._producer.close()
        await self._start()
        # Another run may have come between, and this start has ended it: its marks count too.
        await self._read_marks((await self._reader.spans())[self._partition].stop)
        if len(letters) == 1:
            self.left[Left.REFUSED] += 1
            log.warning("The event of dead letter %s is refused: %s", letters[0].letter.found.place, error)
            return
        for half in (letters[: len(letters) // 2], letters[len(letters) // 2 :]):
            await self._publish(half, dry=False)
